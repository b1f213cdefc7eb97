//! The server's own local worker: this same program as a child process.
//!
//! A process of its own, with an empty environment, so that nothing of the server (keys, the database's
//! address, open files) is near a sandbox. The child watches its standard input: when the server dies,
//! however it dies, the pipe closes, and the child kills its sandboxes and ends.
//!
//! **Invariant:** the child's token is random, lives only in the two processes, and is on no command line.

use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};

use super::agent::Listening;
use super::config::{Token, WorkerConfig};

/// How long the child may take to say where it listens.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// How long it may take to end once its input is closed, beyond its own drain.
const STOP_PATIENCE: Duration = Duration::from_secs(15);
/// The longest first line.
const MAX_LINE_BYTES: u64 = 64 << 10;

/// Why there is no local worker.
#[derive(Debug, thiserror::Error)]
pub enum LocalWorkerError {
    #[error("could not find this program's own file")]
    NoProgram(#[source] std::io::Error),
    #[error("could not start {program}")]
    Spawn {
        program: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("could not hand the worker its configuration")]
    Configure(#[source] std::io::Error),
    #[error("the worker ended before it listened; its messages are above")]
    EndedEarly,
    #[error("the worker did not say where it listens within {START_PATIENCE:?}")]
    TooSlow,
    #[error("the worker's first line is not what an agent prints: {line}")]
    BadLine { line: String },
}

/// A running child agent. Dropping it closes its input and kills it.
#[derive(Debug)]
pub struct LocalWorker {
    child: Child,
    /// Closing it ends the child.
    input: Option<ChildStdin>,
    base_url: String,
    token: Token,
    pid: u32,
}

impl LocalWorker {
    /// Starts this program's `worker` command with the given configuration.
    pub async fn start(config: &WorkerConfig) -> Result<Self, LocalWorkerError> {
        let program = std::env::current_exe().map_err(LocalWorkerError::NoProgram)?;
        Self::start_program(program, config).await
    }

    /// Starts the `worker` command of another build of this program.
    pub async fn start_program(
        program: PathBuf,
        config: &WorkerConfig,
    ) -> Result<Self, LocalWorkerError> {
        let mut command = Command::new(&program);
        command.args(["worker", "--stdin-config"]);
        command.env_clear().current_dir("/").process_group(0).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let spawned = command.spawn();
        let mut child = spawned.map_err(|source| LocalWorkerError::Spawn { program, source })?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let (Some(mut input), Some(output)) = (input, output) else {
            return Err(LocalWorkerError::EndedEarly);
        };
        let mut line =
            serde_json::to_vec(config).map_err(|err| LocalWorkerError::Configure(err.into()))?;
        line.push(b'\n');
        let first_line = async {
            input.write_all(&line).await.map_err(LocalWorkerError::Configure)?;
            let mut text = String::new();
            let read = BufReader::new(output.take(MAX_LINE_BYTES)).read_line(&mut text).await;
            match read {
                Ok(count) if count > 0 => Ok(text),
                _ => Err(LocalWorkerError::EndedEarly),
            }
        };
        let text = tokio::time::timeout(START_PATIENCE, first_line)
            .await
            .map_err(|_| LocalWorkerError::TooSlow)??;
        let said: Listening = serde_json::from_str(&text)
            .map_err(|_| LocalWorkerError::BadLine { line: text.trim().to_owned() })?;
        let token = config.token.clone();
        Ok(Self { child, input: Some(input), base_url: said.listening, token, pid: said.pid })
    }

    /// Where the Worker API is.
    #[must_use]
    pub fn base_url(&self) -> &str {
        &self.base_url
    }

    /// What to show it.
    #[must_use]
    pub fn token(&self) -> &Token {
        &self.token
    }

    /// The child's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits until the child has ended by itself. May be dropped and called again.
    pub async fn exited(&mut self) -> std::io::Result<ExitStatus> {
        self.child.wait().await
    }

    /// Ends the child: closes its input, and kills it when that is not enough.
    pub async fn stop(mut self) -> std::io::Result<ExitStatus> {
        self.input = None;
        if let Ok(status) = tokio::time::timeout(STOP_PATIENCE, self.child.wait()).await {
            return status;
        }
        tracing::warn!(pid = self.pid, "the local worker did not end in time and is killed");
        let _ = killpg(Pid::from_raw(self.pid.cast_signed()), Signal::SIGKILL);
        self.child.wait().await
    }
}
