//! `cynai secrets`.

use std::io::{IsTerminal, Read};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Value, json};

use super::client::{Client, ClientArgs};
use super::show;
use crate::services::secrets::MAX_VALUE_BYTES;

/// Set, list, delete and rotate the secrets of the server's store.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cynai secrets set openai < key.txt
  cynai secrets list
  cynai secrets delete openai
  cynai secrets rotate")]
pub(super) struct SecretsArgs {
    #[command(subcommand)]
    command: Command,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Store a secret that is read from standard input, without the line break at its end. Example: cynai secrets set openai < key.txt
    Set {
        /// What configurations call it.
        name: String,
    },
    /// List secrets, without their values. Example: cynai secrets list
    List,
    /// Delete a secret. Example: cynai secrets delete openai
    Delete {
        /// Its name.
        name: String,
    },
    /// Move all secrets under the newest master key. Example: cynai secrets rotate
    Rotate,
}

/// Runs the command.
pub(super) async fn run(args: SecretsArgs) -> anyhow::Result<()> {
    let client = args.client.client()?;
    let json = args.client.json;
    match args.command {
        Command::Set { name } => {
            let body = json!({"value": value_from_stdin()?});
            let path = format!("/v1/secrets/{}", checked(&name)?);
            let set = client.call(Method::PUT, &path, Some(&body)).await?;
            if json {
                show::json_line(&set);
            } else {
                show::line(format!("set {name}, version {}", set["version"]));
            }
        }
        Command::List => list(&client, json).await?,
        Command::Delete { name } => {
            client.call(Method::DELETE, &format!("/v1/secrets/{}", checked(&name)?), None).await?;
            if json {
                show::json_line(&json!({"name": name, "deleted": true}));
            } else {
                show::line(format!("deleted {name}"));
            }
        }
        Command::Rotate => rotate(&client, json).await?,
    }
    Ok(())
}

async fn list(client: &Client, json: bool) -> anyhow::Result<()> {
    let mut all = Vec::new();
    loop {
        let page = client.get(&format!("/v1/secrets?limit=1000&offset={}", all.len())).await?;
        let page = page.as_array().cloned().unwrap_or_default();
        let last = page.len() < 1000;
        all.extend(page);
        if last {
            break;
        }
    }
    if json {
        all.iter().for_each(show::json_line);
        return Ok(());
    }
    let columns = [
        ("NAME", "/name"),
        ("VERSION", "/version"),
        ("KEY", "/key_id"),
        ("SET BY", "/owner"),
        ("SET", "/created_at"),
        ("ROTATED", "/rotated_at"),
    ];
    show::table(&columns, &all, "no secrets");
    Ok(())
}

async fn rotate(client: &Client, json: bool) -> anyhow::Result<()> {
    let done = client.post("/v1/secrets/rotate", &json!({})).await?;
    if json {
        show::json_line(&done);
    } else {
        let key = show::text(&done["key_id"]);
        show::line(format!("{} secrets were moved under the master key {key}", done["rotated"]));
    }
    let failed = done["failed"].as_array().map(Vec::as_slice).unwrap_or_default();
    if failed.is_empty() {
        return Ok(());
    }
    for secret in failed {
        show::note(show::text(&secret["reason"]));
    }
    bail!("{} secrets could not be moved", failed.len())
}

/// Never from the command line, which every user of the machine can read.
fn value_from_stdin() -> anyhow::Result<Value> {
    let input = std::io::stdin();
    if input.is_terminal() {
        show::note("type or paste the secret, then end the input with Ctrl-D");
    }
    let mut text = String::new();
    let most = MAX_VALUE_BYTES as u64 + 3;
    input.lock().take(most).read_to_string(&mut text).context("the secret is not text in UTF-8")?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    if text.is_empty() {
        bail!("the input is empty: pass the secret as in `cynai secrets set NAME < FILE`");
    }
    Ok(text.into())
}

/// A name that can stand in a path; the server says what else it must be.
fn checked(name: &str) -> anyhow::Result<&str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.is_empty() || !name.chars().all(plain) {
        bail!("a secret's name has letters, digits, `.`, `_` and `-` only");
    }
    Ok(name)
}
