//! `cynai webhooks`.

use clap::{Args, Subcommand};
use serde_json::json;

use super::client::ClientArgs;
use super::show;

/// Make the key that verifies your webhooks.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cynai webhooks new-key")]
pub(super) struct WebhooksArgs {
    #[command(subcommand)]
    command: Command,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a new key, in place of the one before, and print it, this once. Example: cynai webhooks new-key
    NewKey,
}

/// Runs the command.
pub(super) async fn run(args: WebhooksArgs) -> anyhow::Result<()> {
    let client = args.client.client()?;
    let Command::NewKey = args.command;
    let made = client.post("/v1/webhooks/key", &json!({})).await?;
    if args.client.json {
        show::json_line(&made);
    } else {
        show::line(show::text(&made["key"]));
        show::note(
            "this is the only time that the key is shown; receivers that have another refuse your webhooks now",
        );
    }
    Ok(())
}
