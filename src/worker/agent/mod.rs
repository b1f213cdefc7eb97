//! The agent of a worker machine: the Worker API's server and the loop that runs its jobs.
//!
//! The agent is made to be killed: what it accepted is on disk, what ran is reported as lost by the
//! next agent on the same directory, and the kernel kills the sandboxes of a dead agent.
//!
//! **Invariant:** everything that was started here has ended when [`Agent::run`] returns.

mod capabilities;
mod problem;
mod routes;
mod server;

use std::fs;
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::routes::Api;
use super::config::{ConfigError, WorkerConfig};
use super::effective::{Effective, InForce};
use super::jobs::{Jobs, JobsError};
use super::sandbox::bubblewrap::Bubblewrap;
use super::sandbox::{SandboxDriver, SandboxError};
use crate::clock::Clock;
use crate::ids::JobId;
use crate::tls::accept::Acceptor;

pub use capabilities::{Capabilities, SandboxReport};
pub use problem::Problem;
pub use routes::Readiness;

/// How long a sandbox that does not work waits for the next try.
const PROBE_AGAIN: Duration = Duration::from_secs(60);
/// Why a worker that is to run no jobs runs none.
const NO_JOBS: &str = "this worker is configured to run no jobs";
/// How long open connections may take to end after the jobs have.
const CONNECTION_PATIENCE: Duration = Duration::from_secs(2);

/// Why an agent could not start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("the configuration cannot be used")]
    Config(#[from] ConfigError),
    #[error("could not listen on {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("the state directory cannot be used")]
    Jobs(#[from] JobsError),
    #[error("the sandbox driver could not start")]
    Sandbox(#[from] SandboxError),
}

/// The line that an agent prints when it is ready to be called.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listening {
    /// The base URL of the Worker API.
    pub listening: String,
    pub pid: u32,
}

/// What is known of an agent while it runs. Clones see the same agent.
#[derive(Debug, Clone)]
pub struct AgentStatus {
    jobs: Jobs,
    readiness: watch::Receiver<Readiness>,
}

impl AgentStatus {
    /// Jobs that wait, and jobs that run.
    #[must_use]
    pub fn load(&self) -> (usize, usize) {
        self.jobs.load()
    }

    /// What trying the sandbox found; `None` while it is being tried.
    #[must_use]
    pub fn readiness(&self) -> Readiness {
        self.readiness.borrow().clone()
    }

    /// Waits for the next finding.
    pub async fn tried(&mut self) {
        if self.readiness.changed().await.is_err() {
            // The agent ends: nothing is found any more.
            std::future::pending::<()>().await;
        }
    }
}

/// An agent that is bound to its address and owns its state directory.
#[derive(Debug)]
pub struct Agent {
    config: Arc<WorkerConfig>,
    jobs: Jobs,
    lost: Vec<JobId>,
    in_force: InForce,
    clock: Arc<dyn Clock>,
    acceptor: Option<Acceptor>,
    readiness: watch::Sender<Readiness>,
    driver: Arc<dyn SandboxDriver>,
    listener: TcpListener,
    address: SocketAddr,
}

impl Agent {
    /// Takes the state directory and the address. Nothing is accepted before [`Agent::run`].
    pub async fn bind(config: WorkerConfig, clock: Arc<dyn Clock>) -> Result<Self, AgentError> {
        let (_, in_force) = watch::channel(Arc::new(Effective::standalone(&config)));
        Self::bind_under(config, in_force, clock).await
    }

    /// The same for an agent whose rules and tokens change while it runs.
    pub async fn bind_under(
        config: WorkerConfig,
        in_force: InForce,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, AgentError> {
        config.validate()?;
        let (jobs, lost) = Jobs::open(config.clone(), in_force.clone(), Arc::clone(&clock))?;
        let driver = Arc::new(Bubblewrap::new(&config)?);
        let address = config.listen;
        let failed = |source| AgentError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let (readiness, _) = watch::channel::<Readiness>(None);
        Ok(Self {
            config: Arc::new(config),
            jobs,
            lost,
            in_force,
            clock,
            acceptor: None,
            readiness,
            driver,
            listener,
            address,
        })
    }

    /// Speaks TLS.
    #[must_use]
    pub fn with_tls(self, acceptor: Acceptor) -> Self {
        Self { acceptor: Some(acceptor), ..self }
    }

    /// The address that was taken.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What is known of the agent while it runs.
    #[must_use]
    pub fn status(&self) -> AgentStatus {
        AgentStatus { jobs: self.jobs.clone(), readiness: self.readiness.subscribe() }
    }

    /// Where the agent can be reached.
    #[must_use]
    pub fn listening(&self) -> Listening {
        let scheme = if self.acceptor.is_some() { "https" } else { "http" };
        Listening { listening: format!("{scheme}://{}", self.address), pid: std::process::id() }
    }

    /// Serves until told to stop; then drains, kills what is left, and returns.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), AgentError> {
        // Before anything is accepted: what a predecessor left alive must be dead.
        let reaped = self.driver.reap(&self.lost).await?;
        if !self.lost.is_empty() {
            let jobs = self.lost.len();
            tracing::warn!(jobs, reaped, "{jobs} jobs of an earlier agent are lost");
        }
        let api = Api {
            config: Arc::clone(&self.config),
            jobs: self.jobs.clone(),
            in_force: self.in_force.clone(),
            clock: Arc::clone(&self.clock),
            readiness: self.readiness.subscribe(),
        };
        let tell = self.readiness;
        let serving = CancellationToken::new();
        let drain = Duration::from_secs(self.config.drain_seconds);
        let work = async {
            let driver = Arc::clone(&self.driver);
            self.jobs.run(driver, drain, shutdown.clone()).await;
            serving.cancel();
        };
        let probing = async {
            if self.config.no_jobs {
                tell.send_replace(Some(Err(NO_JOBS.to_owned())));
            }
            tokio::select! {
                () = probe(self.driver.as_ref(), &tell), if !self.config.no_jobs => {}
                () = shutdown.cancelled() => {}
            }
            // Kept open as long as requests may still ask.
            serving.cancelled().await;
            drop(tell);
        };
        let router = routes::router(api);
        let serve = server::serve(
            &self.listener,
            self.acceptor.as_ref(),
            router,
            &serving,
            CONNECTION_PATIENCE,
        );
        futures::join!(work, probing, serve);
        if let Err(err) = self.driver.reap(&self.jobs.unfinished()).await {
            tracing::error!(error = &err as &dyn std::error::Error, "a sandbox outlived the agent");
        }
        Ok(())
    }
}

/// Tries the sandbox until it works: an operator may repair the machine while the agent runs.
async fn probe(driver: &dyn SandboxDriver, tell: &watch::Sender<Readiness>) {
    loop {
        match driver.probe().await {
            Ok(found) => {
                tracing::info!(driver = found.driver, memory = ?found.memory, processes = ?found.processes, cpus = ?found.cpus, disk = ?found.disk, host_uid = found.host_uid, "sandboxes work");
                for note in &found.notes {
                    tracing::warn!("{note}");
                }
                tell.send_replace(Some(Ok(found)));
                return;
            }
            Err(err) => {
                tracing::error!(
                    error = &err as &dyn std::error::Error,
                    "sandboxes do not work: jobs are refused"
                );
                tell.send_replace(Some(Err(err.to_string())));
            }
        }
        tokio::time::sleep(PROBE_AGAIN).await;
    }
}

/// Closes descriptors that this process inherited by accident, so that no sandbox can inherit them in
/// turn. Call it once, early: whatever this program opened itself closes on exec and is left alone.
pub fn close_inherited_descriptors() {
    let Ok(entries) = fs::read_dir("/proc/self/fdinfo") else { return };
    let numbers = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let inherited: Vec<RawFd> =
        numbers.filter(|number| *number > 2 && survives_exec(*number)).collect();
    for number in inherited {
        let _ = nix::unistd::close(number);
    }
}

fn survives_exec(number: RawFd) -> bool {
    /// `O_CLOEXEC` as the kernel prints it.
    const CLOSE_ON_EXEC: u32 = 0o2_000_000;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap_or_default();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
    flags.is_some_and(|flags| flags & CLOSE_ON_EXEC == 0)
}
