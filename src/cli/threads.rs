//! `cynai threads`.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::client::{Client, ClientArgs};
use super::show;

/// List and show threads and their history.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cynai threads list --status interrupted
  cynai threads show 0193…
  cynai threads history 0193… --limit 5")]
pub(super) struct ThreadsArgs {
    #[command(subcommand)]
    command: Command,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List your threads, newest first. Example: cynai threads list --status interrupted
    List {
        /// In one status: idle, busy, interrupted, error.
        #[arg(long)]
        status: Option<String>,
        /// At most so many.
        #[arg(long, default_value_t = 20)]
        limit: u32,
    },
    /// Show a thread's state and what it waits for. Example: cynai threads show 0193…
    Show {
        /// The thread's id.
        thread: uuid::Uuid,
    },
    /// Show a thread's states, newest first. Example: cynai threads history 0193… --limit 5
    History {
        /// The thread's id.
        thread: uuid::Uuid,
        /// At most so many.
        #[arg(long, default_value_t = 20)]
        limit: u32,
    },
}

/// Runs the command.
pub(super) async fn run(args: ThreadsArgs) -> anyhow::Result<()> {
    let client = args.client.client()?;
    let json = args.client.json;
    match args.command {
        Command::List { status, limit } => list(&client, status.as_deref(), limit, json).await,
        Command::Show { thread } => show_one(&client, thread, json).await,
        Command::History { thread, limit } => history(&client, thread, limit, json).await,
    }
}

async fn list(client: &Client, status: Option<&str>, limit: u32, json: bool) -> anyhow::Result<()> {
    let select = ["thread_id", "status", "created_at", "state_updated_at", "metadata"];
    let search = json!({"status": status, "limit": limit, "select": select});
    let threads = client.post("/threads/search", &search).await?;
    let threads = threads.as_array().map(Vec::as_slice).unwrap_or_default();
    if json {
        threads.iter().for_each(show::json_line);
        return Ok(());
    }
    let columns = [
        ("THREAD", "/thread_id"),
        ("STATUS", "/status"),
        ("CREATED", "/created_at"),
        ("CHANGED", "/state_updated_at"),
        ("METADATA", "/metadata"),
    ];
    show::table(&columns, threads, "no threads; `cynai run GRAPH` makes one");
    Ok(())
}

async fn show_one(client: &Client, thread: uuid::Uuid, json: bool) -> anyhow::Result<()> {
    let row = client.get(&format!("/threads/{thread}")).await?;
    let state = client.get(&format!("/threads/{thread}/state")).await?;
    if json {
        show::json_line(&json!({"thread": row, "state": state}));
        return Ok(());
    }
    for key in ["thread_id", "status", "created_at", "state_updated_at"] {
        show::line(format!("{key:<18}{}", show::text(&row[key])));
    }
    if !row["error"].is_null() {
        show::line(format!("error             {}", show::text(&row["error"]["message"])));
    }
    let next = state["next"].as_array().map(|next| names(next)).unwrap_or_default();
    if !next.is_empty() {
        show::line(format!("next              {next}"));
    }
    for question in state["interrupts"].as_array().into_iter().flatten() {
        let (id, asked) = (show::text(&question["id"]), show::text(&question["value"]));
        show::line(format!("asks              {id}: {asked}"));
    }
    show::line("values");
    show::pretty(&state["values"]);
    Ok(())
}

async fn history(
    client: &Client,
    thread: uuid::Uuid,
    limit: u32,
    json: bool,
) -> anyhow::Result<()> {
    let body = json!({"limit": limit});
    let states = client.post(&format!("/threads/{thread}/history"), &body).await?;
    let mut states = states.as_array().cloned().unwrap_or_default();
    if json {
        states.iter().for_each(show::json_line);
        return Ok(());
    }
    for state in &mut states {
        let next = state["next"].as_array().map(|next| names(next)).unwrap_or_default();
        state["next"] = next.into();
    }
    let columns = [
        ("STEP", "/metadata/step"),
        ("SOURCE", "/metadata/source"),
        ("AT", "/created_at"),
        ("NEXT", "/next"),
        ("CHECKPOINT", "/checkpoint_id"),
    ];
    show::table(&columns, &states, "nothing ran on this thread yet");
    Ok(())
}

/// Node names with how often each comes.
fn names(next: &[Value]) -> String {
    let mut counts: Vec<(String, u32)> = Vec::new();
    for name in next.iter().map(show::text) {
        match counts.iter_mut().find(|(seen, _)| *seen == name) {
            Some((_, count)) => *count += 1,
            None => counts.push((name, 1)),
        }
    }
    let show =
        |(name, count): (String, u32)| if count > 1 { format!("{name} x{count}") } else { name };
    counts.into_iter().map(show).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_nodes_are_counted() {
        fn check(input: &[&str], expected: &str) {
            let next = input.iter().map(|name| Value::from(*name)).collect::<Vec<_>>();
            assert_eq!(names(&next), expected);
        }
        check(&[], "");
        check(&["a", "b", "a"], "a x2, b");
    }
}
