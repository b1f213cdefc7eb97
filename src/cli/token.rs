//! `cynai token`.

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::json;

use super::client::{Client, ClientArgs};
use super::show;

/// Make, list and revoke API tokens.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cynai token create laptop --expires 90d
  cynai token list
  cynai token revoke 0193…")]
pub(super) struct TokenArgs {
    #[command(subcommand)]
    command: Command,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a token and print it, this once. Example: cynai token create laptop --expires 90d
    Create {
        /// What you call it.
        name: String,
        /// For another user; only an administrator may.
        #[arg(long, value_name = "NAME")]
        user: Option<String>,
        /// Refused after this time, such as 12h or 90d [default: never].
        #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
        expires: Option<std::time::Duration>,
    },
    /// List tokens, newest first. Example: cynai token list
    List {
        /// Another user's; only an administrator may.
        #[arg(long, value_name = "NAME")]
        user: Option<String>,
    },
    /// Revoke a token. Example: cynai token revoke 0193…
    Revoke {
        /// The token's id, as listed; not the token itself.
        #[arg(value_name = "ID")]
        id: uuid::Uuid,
    },
}

/// Runs the command.
pub(super) async fn run(args: TokenArgs) -> anyhow::Result<()> {
    let client = args.client.client()?;
    let json = args.client.json;
    match args.command {
        Command::Create { name, user, expires } => {
            let ttl = expires.map(|expires| expires.as_secs());
            let body = json!({"name": name, "user": user, "ttl_seconds": ttl});
            let made = client.post("/v1/tokens", &body).await?;
            if json {
                show::json_line(&made);
            } else {
                show::line(show::text(&made["token"]));
                show::note("this is the only time that the token is shown");
            }
            Ok(())
        }
        Command::List { user } => list(&client, user.as_deref(), json).await,
        Command::Revoke { id } => {
            client.call(Method::DELETE, &format!("/v1/tokens/{id}"), None).await?;
            if json {
                show::json_line(&json!({"token_id": id, "revoked": true}));
            } else {
                show::line(format!("revoked {id}"));
            }
            Ok(())
        }
    }
}

async fn list(client: &Client, user: Option<&str>, json: bool) -> anyhow::Result<()> {
    let user = user.map(|user| format!("&user={}", encoded(user))).unwrap_or_default();
    let tokens = client.get(&format!("/v1/tokens?limit=1000{user}")).await?;
    let tokens = tokens.as_array().map(Vec::as_slice).unwrap_or_default();
    if json {
        tokens.iter().for_each(show::json_line);
        return Ok(());
    }
    let columns = [
        ("ID", "/token_id"),
        ("NAME", "/name"),
        ("CREATED", "/created_at"),
        ("EXPIRES", "/expires_at"),
        ("LAST USED", "/last_used_at"),
        ("REVOKED", "/revoked_at"),
    ];
    show::table(&columns, tokens, "no tokens");
    Ok(())
}

/// Percent-encoded for a query.
fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    text.bytes()
        .map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_change_the_query() {
        let check = |input: &str, expected: &str| assert_eq!(encoded(input), expected);
        check("anna.b-c_1", "anna.b-c_1");
        check("a&limit=1 é", "a%26limit%3D1%20%C3%A9");
    }
}
