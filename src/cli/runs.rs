//! `cynai runs`.

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Value, json};

use super::client::{Client, ClientArgs};
use super::show;

/// List, show and cancel runs.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cynai runs list --status running
  cynai runs show 0193…
  cynai runs effects 0193…
  cynai runs cancel 0193… --wait")]
pub(super) struct RunsArgs {
    #[command(subcommand)]
    command: Command,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List your runs, newest first. Example: cynai runs list --thread 0193…
    List {
        /// Of one thread.
        #[arg(long, value_name = "ID")]
        thread: Option<uuid::Uuid>,
        /// In one status: pending, running, success, error, timeout, interrupted.
        #[arg(long)]
        status: Option<String>,
        /// At most so many.
        #[arg(long, default_value_t = 20)]
        limit: u32,
    },
    /// Show one run. Example: cynai runs show 0193… --json
    Show {
        /// The run's id.
        run: uuid::Uuid,
    },
    /// List what a run did to the world: calls of tools and models, and what came of them. Example: cynai
    /// runs effects 0193…
    Effects {
        /// The run's id.
        run: uuid::Uuid,
        /// At most so many.
        #[arg(long, default_value_t = 100)]
        limit: u32,
    },
    /// Cancel a run. Example: cynai runs cancel 0193… --rollback
    Cancel {
        /// The run's id.
        run: uuid::Uuid,
        /// Delete the run and what it did to the thread's state.
        #[arg(long)]
        rollback: bool,
        /// Return when it has ended.
        #[arg(long)]
        wait: bool,
    },
}

/// Runs the command.
pub(super) async fn run(args: RunsArgs) -> anyhow::Result<()> {
    let client = args.client.client()?;
    let json = args.client.json;
    match args.command {
        Command::List { thread, status, limit } => {
            let search = json!({"thread_id": thread, "status": status, "limit": limit});
            list(&client, &search, json).await
        }
        Command::Show { run } => show_one(&client, run, json).await,
        Command::Effects { run, limit } => effects(&client, run, limit, json).await,
        Command::Cancel { run, rollback, wait } => {
            let action = if rollback { "rollback" } else { "interrupt" };
            let wait_flag = u8::from(wait);
            let path = format!("/runs/{run}/cancel?action={action}&wait={wait_flag}");
            client.call(Method::POST, &path, None).await?;
            let done = if wait { "cancelled" } else { "cancelling" };
            if json {
                show::json_line(&json!({"run_id": run, "status": done}));
            } else {
                show::line(format!("{done} {run}"));
            }
            Ok(())
        }
    }
}

async fn list(client: &Client, search: &Value, json: bool) -> anyhow::Result<()> {
    let runs = client.post("/runs/search", search).await?;
    let runs = runs.as_array().map(Vec::as_slice).unwrap_or_default();
    if json {
        runs.iter().for_each(show::json_line);
        return Ok(());
    }
    let columns = [
        ("RUN", "/run_id"),
        ("STATUS", "/status"),
        ("THREAD", "/thread_id"),
        ("CREATED", "/created_at"),
        ("ENDED", "/ended_at"),
        ("ERROR", "/error/message"),
    ];
    show::table(&columns, runs, "no runs; `cynai run GRAPH` starts one");
    Ok(())
}

async fn effects(client: &Client, run: uuid::Uuid, limit: u32, json: bool) -> anyhow::Result<()> {
    let effects = client.get(&format!("/runs/{run}/effects?limit={limit}")).await?;
    let effects = effects.as_array().map(Vec::as_slice).unwrap_or_default();
    if json {
        effects.iter().for_each(show::json_line);
        return Ok(());
    }
    let columns = [
        ("NODE", "/node"),
        ("KIND", "/kind"),
        ("TARGET", "/target"),
        ("STATUS", "/status"),
        ("ATTEMPT", "/attempt"),
        ("SENT", "/sends"),
        ("STARTED", "/started_at"),
        ("KEY", "/idempotency_key"),
    ];
    show::table(&columns, effects, "the run did nothing to the world");
    Ok(())
}

async fn show_one(client: &Client, run: uuid::Uuid, json: bool) -> anyhow::Result<()> {
    let run = client.get(&format!("/runs/{run}")).await?;
    if json {
        show::json_line(&run);
        return Ok(());
    }
    for key in
        ["run_id", "status", "thread_id", "assistant_id", "created_at", "started_at", "ended_at"]
    {
        let value = show::text(&run[key]);
        if !value.is_empty() {
            show::line(format!("{key:<14}{value}"));
        }
    }
    for key in ["error", "cancel_reason", "metadata", "kwargs"] {
        if run.get(key).is_some_and(|value| !value.is_null()) {
            show::line(format!("{key:<14}{:#}", run[key]));
        }
    }
    Ok(())
}
