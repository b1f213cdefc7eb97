//! `cynai config`.

use std::path::PathBuf;

use anyhow::bail;
use clap::{Args, Subcommand};
use serde_json::json;

use super::show;
use crate::config::file::ConfigFile;
use crate::config::usual_config_file;
use crate::egress::address::Allowed;

/// Check the server's configuration file.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cynai config check
  cynai config check ./cynai.yaml")]
pub(super) struct ConfigArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Read a configuration file as `cynai serve` would, and say what is wrong. Example: cynai config check ./cynai.yaml
    Check {
        /// The file [default: cynai.yaml in the data directory].
        #[arg(value_name = "FILE", env = "CYNAI_CONFIG")]
        file: Option<PathBuf>,
        /// Where the server's data lies.
        #[arg(long, env = "CYNAI_DATA_DIR", value_name = "DIR")]
        data_dir: Option<PathBuf>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Runs the command.
pub(super) fn run(args: &ConfigArgs) -> anyhow::Result<()> {
    let Command::Check { file, data_dir, json } = &args.command;
    let Some(path) = file.clone().or_else(|| usual_config_file(data_dir.as_deref())) else {
        bail!("HOME is not set: name the file, as in `cynai config check ./cynai.yaml`");
    };
    let config = ConfigFile::read(&path)?;
    check_allowed(&config)?;
    if *json {
        show::json_line(&json!({"file": path.display().to_string(), "ok": true}));
    } else {
        show::line(format!("{}: nothing is wrong", path.display()));
    }
    Ok(())
}

/// What the file's own reader leaves to those who use it.
pub(super) fn check_allowed(config: &ConfigFile) -> anyhow::Result<Allowed> {
    Allowed::parse(&config.webhooks.allow)
        .map_err(|err| anyhow::Error::new(err).context("`webhooks.allow` cannot be used"))
}
