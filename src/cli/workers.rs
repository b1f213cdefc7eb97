//! `cynai workers`.

use std::path::PathBuf;

use anyhow::bail;
use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Value, json};

use super::client::{Client, ClientArgs, json_argument};
use super::show;

/// List, configure, drain and remove worker machines.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cynai workers key
  cynai workers list --status active
  cynai workers drain build-1 --reason 'new disk'
  cynai workers policy '{\"constraints\": {\"max_job_timeout_seconds\": 600}}'")]
pub(super) struct WorkersArgs {
    #[command(subcommand)]
    command: Command,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List workers, and why they get no jobs when they do not. Example: cynai workers list --label gpu
    List {
        /// Only with this status: registered, active, inactive or drained.
        #[arg(long)]
        status: Option<String>,
        /// Only with this label; may be repeated.
        #[arg(long)]
        label: Vec<String>,
    },
    /// Show everything about a worker, with its last report. Example: cynai workers show build-1
    Show {
        /// Its id.
        worker: String,
    },
    /// Take a worker out of service: it gets no new jobs. Example: cynai workers drain build-1 --reason 'new disk'
    Drain {
        /// Its id.
        worker: String,
        /// Why.
        #[arg(long)]
        reason: Option<String>,
    },
    /// Take a worker back into service. Example: cynai workers undrain build-1
    Undrain {
        /// Its id.
        worker: String,
    },
    /// Give a worker a new configuration. Example: cynai workers refresh build-1 --rotate-token
    Refresh {
        /// Its id.
        worker: String,
        /// Also give it a new bearer token.
        #[arg(long)]
        rotate_token: bool,
    },
    /// Change what was decided for one worker. Example: cynai workers change build-1 --policy '{"notes": "the old one"}'
    Change {
        /// Its id.
        worker: String,
        /// A merge patch over the policy of all workers: JSON, @FILE, or - for standard input.
        #[arg(long, value_name = "JSON", required_unless_present_any = ["url", "own_url"])]
        policy: Option<String>,
        /// Where its Worker API is, whatever it reports.
        #[arg(long, conflicts_with = "own_url")]
        url: Option<String>,
        /// Its Worker API is where it reports.
        #[arg(long)]
        own_url: bool,
    },
    /// Remove a worker: its jobs count as lost. Example: cynai workers remove build-1
    Remove {
        /// Its id.
        worker: String,
    },
    /// Show the policy of all workers, or set it. Example: cynai workers policy @policy.json
    Policy {
        /// The new policy: JSON, @FILE, or - for standard input.
        policy: Option<String>,
    },
    /// Make a key that registers workers; it is shown this once. Example: cynai workers key > key.txt
    Key {
        /// Make none, but refuse the key before the newest from now on.
        #[arg(long, conflicts_with = "out")]
        revoke_previous: bool,
        /// Write the key to this file, which only you can read, instead of showing it.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
}

/// Runs the command.
pub(super) async fn run(args: WorkersArgs) -> anyhow::Result<()> {
    let client = args.client.client()?;
    let json = args.client.json;
    match args.command {
        Command::List { status, label } => list(&client, status.as_deref(), &label, json).await,
        Command::Show { worker } => {
            show::pretty(&client.get(&path(&worker)?).await?);
            Ok(())
        }
        Command::Drain { worker, reason } => {
            let body = json!({ "reason": reason });
            let done = client.post(&format!("{}/drain", path(&worker)?), &body).await?;
            tell(&done, json, "is drained: it gets no new jobs");
            Ok(())
        }
        Command::Undrain { worker } => {
            let done = client.post(&format!("{}/undrain", path(&worker)?), &json!({})).await?;
            tell(&done, json, "is in service again");
            Ok(())
        }
        Command::Refresh { worker, rotate_token } => {
            let body = json!({ "rotate_token": rotate_token });
            let done = client.post(&format!("{}/refresh", path(&worker)?), &body).await?;
            let version = show::text(&done["issued_config_version"]);
            tell(&done, json, &format!("gets the configuration {version}"));
            Ok(())
        }
        Command::Change { worker, policy, url, own_url } => {
            let mut body = json!({});
            if let Some(policy) = policy {
                body["policy_patch"] = json_argument("--policy", &policy)?;
            }
            if own_url {
                body["worker_api_url"] = Value::Null;
            } else if let Some(url) = url {
                body["worker_api_url"] = url.into();
            }
            let done = client.call(Method::PATCH, &path(&worker)?, Some(&body)).await?;
            tell(&done, json, "was changed");
            Ok(())
        }
        Command::Remove { worker } => {
            client.call(Method::DELETE, &path(&worker)?, None).await?;
            tell(&json!({ "node_slug": worker }), json, "was removed");
            Ok(())
        }
        Command::Policy { policy } => {
            let found = match policy {
                Some(policy) => {
                    let policy = json_argument("POLICY", &policy)?;
                    client.call(Method::PUT, "/v1/nodes/policy", Some(&policy)).await?
                }
                None => client.get("/v1/nodes/policy").await?,
            };
            show::pretty(&found);
            Ok(())
        }
        Command::Key { revoke_previous, out } => {
            if revoke_previous {
                client.call(Method::DELETE, "/v1/nodes/key/previous", None).await?;
                show::note("the key before the newest is refused from now on");
                return Ok(());
            }
            let made = client.post("/v1/nodes/key", &json!({})).await?;
            key(&made, out, json)
        }
    }
}

async fn list(
    client: &Client,
    status: Option<&str>,
    labels: &[String],
    json: bool,
) -> anyhow::Result<()> {
    let mut query = url::form_urlencoded::Serializer::new(String::new());
    query.append_pair("limit", "1000");
    query.extend_pairs(status.map(|status| ("status", status)));
    query.extend_pairs(labels.iter().map(|label| ("label", label)));
    let query = query.finish();
    let mut all: Vec<Value> = Vec::new();
    loop {
        let after = all.last().and_then(|last| last["node_slug"].as_str()).unwrap_or_default();
        let page = client.get(&format!("/v1/nodes?{query}&after={after}")).await?;
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
        ("WORKER", "/node_slug"),
        ("STATUS", "/status"),
        ("JOBS", "/open_jobs"),
        ("SLOTS", "/slots"),
        ("SEEN", "/last_seen_at"),
        ("LABELS", "/labels"),
        ("WHY NOT", "/reason"),
    ];
    for worker in &mut all {
        let labels = worker["labels"].as_array().cloned().unwrap_or_default();
        worker["labels"] =
            labels.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(",").into();
    }
    let none = "no worker machines have registered (a server's own worker is not listed): `cynai workers key` makes the key for it";
    show::table(&columns, &all, none);
    Ok(())
}

fn key(made: &Value, out: Option<PathBuf>, json: bool) -> anyhow::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;

    let text = made["key"].as_str().unwrap_or_default();
    if made["previous_is_good"] == true {
        show::note(
            "the key before it still registers workers; when it is no longer needed: cynai workers key --revoke-previous",
        );
    }
    if let Some(path) = out {
        let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let written = file.and_then(|mut file| writeln!(file, "{text}"));
        if let Err(err) = written {
            bail!(
                "the key was made but {} could not be written: {err}; make another",
                path.display()
            );
        }
        show::line(format!("the key is in {}", path.display()));
    } else if json {
        show::json_line(made);
    } else {
        show::line(text);
        show::note(
            "on the worker machine: cynai worker --server URL --id NAME --key-file FILE --state-dir DIR",
        );
    }
    Ok(())
}

fn tell(worker: &Value, json: bool, what: &str) {
    if json {
        show::json_line(worker);
    } else {
        show::line(format!("{} {what}", show::text(&worker["node_slug"])));
    }
}

/// The path of a worker whose id can stand in one; the server says what else it must be.
fn path(worker: &str) -> anyhow::Result<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if worker.is_empty() || !worker.chars().all(plain) {
        bail!("a worker's id has letters, digits, `.`, `_` and `-` only");
    }
    Ok(format!("/v1/nodes/{worker}"))
}
