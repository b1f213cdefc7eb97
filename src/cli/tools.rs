//! `cynai tools`.

use std::time::Duration;

use anyhow::bail;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::client::{Client, ClientArgs, json_argument};
use super::{login, show};

/// List, approve and call the tools of MCP servers.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cynai tools list
  cynai tools approve files write_file
  cynai tools call files read_text_file '{\"path\": \"notes.txt\"}'")]
pub(super) struct ToolsArgs {
    #[command(subcommand)]
    command: Command,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List servers and tools, and what changed since it was approved. Example: cynai tools list files
    List {
        /// One server.
        #[arg(id = "tool_server", value_name = "SERVER")]
        server: Option<String>,
    },
    /// Approve tools that are new or have changed; prints what it approves. Example: cynai tools approve files
    Approve {
        /// The server.
        #[arg(id = "tool_server", value_name = "SERVER")]
        server: String,
        /// One tool [default: all that wait].
        tool: Option<String>,
    },
    /// Log in to a server whose configuration has `oauth`. Example: cynai tools login issues
    Login {
        /// The server.
        #[arg(id = "tool_server", value_name = "SERVER")]
        server: String,
        /// The port that the browser is led back to, where the authorization server knows only one [default: any].
        #[arg(long, value_name = "PORT", default_value_t = 0, hide_default_value = true)]
        port: u16,
        /// Finish a login that another `login` has begun, with the address that the browser was led to.
        #[arg(long, value_name = "ADDRESS", conflicts_with = "port")]
        finish: Option<String>,
    },
    /// Call a tool. Example: cynai tools call memory read_graph '{}'
    Call {
        /// The server.
        #[arg(id = "tool_server", value_name = "SERVER")]
        server: String,
        /// The tool.
        tool: String,
        /// Its arguments: JSON, @FILE, or - for standard input.
        #[arg(default_value = "{}")]
        arguments: String,
        /// The same for every attempt at the same thing.
        #[arg(long, value_name = "KEY")]
        idempotency_key: Option<String>,
        /// How long it may take, such as 30s [default: what the server's configuration says].
        #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
        timeout: Option<Duration>,
    },
}

/// Runs the command.
pub(super) async fn run(args: ToolsArgs) -> anyhow::Result<()> {
    let json = args.client.json;
    match args.command {
        Command::List { server } => {
            let client = args.client.client()?;
            list(&client, server.as_deref(), json).await
        }
        Command::Approve { server, tool } => {
            let client = args.client.client()?;
            approve(&client, &server, tool.as_deref(), json).await
        }
        Command::Login { server, port, finish } => {
            let client = args.client.client()?;
            let path = format!("/v1/tools/{}", encoded(&server));
            match finish {
                Some(led_to) => login::finish(&client, &server, &path, &led_to).await,
                None => login::login(&client, &server, &path, port).await,
            }
        }
        Command::Call { server, tool, arguments, idempotency_key, timeout } => {
            let arguments = json_argument("ARGUMENTS", &arguments)?;
            let body = json!({
                "arguments": arguments,
                "idempotency_key": idempotency_key,
                "timeout_seconds": timeout.map(|timeout| timeout.as_secs().max(1)),
            });
            let client = args.client.patient_client()?;
            let path = format!("/v1/tools/{}/{}/call", encoded(&server), encoded(&tool));
            let result = client.post(&path, &body).await?;
            if json {
                show::json_line(&result)
            } else {
                print(&result)
            }
            if result["is_error"] == true {
                bail!("the tool says that it failed");
            }
            Ok(())
        }
    }
}

async fn fetch(client: &Client, server: Option<&str>) -> anyhow::Result<Vec<Value>> {
    let query = server.map(|server| format!("?server={}", encoded(server))).unwrap_or_default();
    let listed = client.get(&format!("/v1/tools{query}")).await?;
    Ok(listed.as_array().cloned().unwrap_or_default())
}

async fn list(client: &Client, server: Option<&str>, json: bool) -> anyhow::Result<()> {
    let servers = fetch(client, server).await?;
    if json {
        servers.iter().for_each(show::json_line);
        return Ok(());
    }
    let mut rows = Vec::new();
    for server in &servers {
        if let Some(problem) = server["error"].as_str() {
            show::note(format_args!(
                "{}: {}",
                show::text(&server["server"]),
                show::printable(problem)
            ));
        }
        for tool in tools(server) {
            let mut row = tool.clone();
            row["server"] = server["server"].clone();
            let description = tool["description"].as_str().unwrap_or_default();
            row["description"] = description.lines().next().unwrap_or_default().into();
            rows.push(row);
        }
    }
    let columns = [
        ("SERVER", "/server"),
        ("TOOL", "/tool"),
        ("STATE", "/state"),
        ("EFFECT", "/effect"),
        ("DESCRIPTION", "/description"),
    ];
    show::table(&columns, &rows, "no tools: name servers under `mcp_servers` in the configuration");
    for row in rows.iter().filter(|row| waits(row)) {
        let name = format!("{} {}", show::text(&row["server"]), show::text(&row["tool"]));
        changes(row, &name);
        show::note(format_args!("  approve it with `cynai tools approve {name}`"));
    }
    Ok(())
}

/// Approves exactly what is shown: each tool by the hash that was listed.
async fn approve(
    client: &Client,
    server: &str,
    tool: Option<&str>,
    json: bool,
) -> anyhow::Result<()> {
    let servers = fetch(client, Some(server)).await?;
    let waiting = servers
        .iter()
        .flat_map(tools)
        .filter(|row| waits(row) && tool.is_none_or(|tool| row["tool"] == tool));
    let mut approved = 0;
    for row in waiting {
        if !json {
            changes(row, &format!("{server} {}", show::text(&row["tool"])));
        }
        let body = json!({"tool": row["tool"], "hash": row["hash"]});
        let path = format!("/v1/tools/{}/approve", encoded(server));
        let done = client.post(&path, &body).await?;
        for done in done.as_array().into_iter().flatten() {
            if json {
                show::json_line(done)
            } else {
                show::line(format!("approved {}", show::text(&done["tool"])))
            }
            approved += 1;
        }
    }
    if approved == 0 {
        let problem = servers.first().and_then(|server| server["error"].as_str());
        match problem {
            Some(problem) => bail!("{}", show::printable(problem)),
            None => bail!("no such tool of {server} waits for an approval"),
        }
    }
    Ok(())
}

fn tools(server: &Value) -> impl Iterator<Item = &Value> {
    server["tools"].as_array().into_iter().flatten()
}

fn waits(tool: &Value) -> bool {
    tool["state"] == "changed" || tool["state"] == "new"
}

/// What an administrator should read before approving.
fn changes(tool: &Value, name: &str) {
    show::note(format_args!("{name} is {}:", show::text(&tool["state"])));
    if tool["state"] == "new" {
        show::note(format_args!("  {}", show::text(&tool["description"])));
        show::note(format_args!("  arguments: {}", show::text(&tool["input_schema"])));
    }
    for change in tool["changes"].as_array().into_iter().flatten() {
        show::note(format_args!("  {}", show::text(change)));
    }
}

/// A result for a person: its texts, or else its structured value.
fn print(result: &Value) {
    let mut shown = false;
    for part in result["content"].as_array().into_iter().flatten() {
        let text = match part["text"].as_str() {
            Some(text) => text.lines().map(show::printable).collect::<Vec<_>>().join("\n"),
            None => show::text(part).chars().take(200).collect(),
        };
        show::line(text);
        shown = true;
    }
    if !shown {
        show::pretty(&result["structured"]);
    }
}

/// Percent-encoded for a path or a query.
fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    text.bytes()
        .map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") })
        .collect()
}
