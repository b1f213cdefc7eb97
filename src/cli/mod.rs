//! The command line: one file for each command family.
//!
//! A command parses its arguments, calls one entry point of the library or the REST API, and prints.
//! Exit codes: 0 it worked, 1 it failed (the reason is on stderr), 2 the arguments are wrong.
//!
//! **Invariant:** only this folder prints.

mod answer;
mod client;
mod config;
mod follow;
mod form;
mod graph;
mod graph_test;
mod login;
mod models;
mod run;
mod runs;
mod secrets;
mod serve;
mod show;
mod speech;
mod threads;
mod token;
mod tools;
mod webhooks;
mod worker;
mod workers;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Runs work as checkpointed state graphs stored in PostgreSQL.
#[derive(Debug, Parser)]
#[command(
    name = "cynai",
    version,
    propagate_version = true,
    after_help = "Examples:
  cynai serve --graphs examples
  cynai run hello --input '{\"name\": \"you\"}'
  cynai threads list --status interrupted"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a run of a graph and follow it to its end.
    Run(run::RunArgs),
    /// List what waits for a person, or answer it.
    Answer(answer::AnswerArgs),
    /// List, show and cancel runs.
    Runs(runs::RunsArgs),
    /// List and show threads and their history.
    Threads(threads::ThreadsArgs),
    /// Make, list and revoke API tokens.
    Token(token::TokenArgs),
    /// List, approve and call the tools of MCP servers.
    Tools(tools::ToolsArgs),
    /// List the endpoints of models.
    Models(models::ModelsArgs),
    /// Set, list, delete and rotate secrets.
    Secrets(secrets::SecretsArgs),
    /// Make the key that verifies webhooks.
    Webhooks(webhooks::WebhooksArgs),
    /// Run the server: REST API, driver and, unless told otherwise, a private database and a local worker.
    Serve(Box<crate::config::ServeArgs>),
    /// Check the server's configuration file.
    Config(config::ConfigArgs),
    /// Check, draw, describe and test graph files.
    Graph(graph::GraphArgs),
    /// List, configure, drain and remove worker machines.
    Workers(workers::WorkersArgs),
    /// Run the agent of a worker machine: accepts jobs and runs them in sandboxes.
    Worker(worker::WorkerArgs),
}

/// Parses the process's arguments, runs the command, and says how it ended.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    // reqwest is built without a TLS provider of its own; a second installation is harmless.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(err) => return failed(&anyhow::Error::new(err).context("could not start the runtime")),
    };
    let result = runtime.block_on(async {
        match cli.command {
            Command::Run(args) => run::run(args).await,
            Command::Answer(args) => answer::run(args).await,
            Command::Runs(args) => runs::run(args).await,
            Command::Threads(args) => threads::run(args).await,
            Command::Token(args) => token::run(args).await,
            Command::Tools(args) => tools::run(args).await,
            Command::Models(args) => models::run(args).await,
            Command::Secrets(args) => secrets::run(args).await,
            Command::Webhooks(args) => webhooks::run(args).await,
            Command::Serve(args) => serve::run(*args).await,
            Command::Config(args) => config::run(&args),
            Command::Graph(args) => graph::run(args).await,
            Command::Workers(args) => workers::run(args).await,
            Command::Worker(args) => Box::pin(worker::run(args)).await,
        }
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => failed(&err),
    }
}

#[expect(clippy::print_stderr, reason = "the one place that reports a command's failure")]
fn failed(err: &anyhow::Error) -> ExitCode {
    eprintln!("error: {err:#}");
    ExitCode::FAILURE
}
