//! `cynai worker`.

use clap::Args;

/// The agent of a worker machine.
#[derive(Debug, Args)]
pub struct WorkerArgs {}

/// Runs until told to stop.
pub async fn run(_args: WorkerArgs) -> anyhow::Result<()> {
    Ok(())
}
