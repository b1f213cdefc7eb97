//! Sandboxes: where a job's command runs.
//!
//! A driver makes one sandbox for each job. [`bubblewrap`] is the one driver so far. What a driver
//! promises it has tried: [`SandboxDriver::probe`] runs real sandboxes and reports which limit is
//! enforced by what, so that nobody relies on a limit that this machine cannot keep.
//!
//! **Invariant:** when [`SandboxHandle::wait`] has returned, no process of the sandbox is alive.
//! **Invariant:** dropping a handle kills its sandbox.

pub mod bubblewrap;
mod cgroup;
mod output;
mod probe;
mod procs;
mod rootfs;
mod spawn;

use std::collections::BTreeMap;

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::ids::JobId;
use crate::worker::wire::NetworkPolicy;

pub use output::Captured;

/// Everything a driver needs to know about one job. Limits are resolved: nothing is optional.
#[derive(Debug, Clone)]
pub struct SandboxSpec {
    pub task_id: Uuid,
    pub job_id: JobId,
    pub image: String,
    pub command: Vec<String>,
    pub env: BTreeMap<String, String>,
    pub stdin: Option<String>,
    pub mounts: Vec<String>,
    pub network: NetworkPolicy,
    pub limits: SandboxLimits,
}

/// What one sandbox may use.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SandboxLimits {
    pub memory_bytes: u64,
    pub processes: u64,
    pub cpus: f64,
    pub disk_bytes: u64,
    pub tmp_bytes: u64,
    pub output_bytes: usize,
    /// The wall time that the caller will enforce; bounds a process's CPU time where no cgroup can.
    pub wall_seconds: u64,
}

/// How a sandbox ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// The command's exit code, 128 + N when signal N ended it; `None` when the sandbox was killed.
    pub code: Option<i32>,
    /// Whether the kernel killed a process of the job because of the memory limit.
    pub out_of_memory: bool,
    pub stdout: Captured,
    pub stderr: Captured,
}

/// Why there is no sandbox, or no clean end of one.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// Sandboxing does not work on this machine; the text says why and what helps.
    #[error("{reason}")]
    Unavailable { reason: String },
    /// This one sandbox could not be made; the text is for the operator's log.
    #[error("the sandbox could not be set up: {reason}")]
    Setup { reason: String },
    /// The image or a mount is not in the configuration.
    #[error("{kind} `{name}` is not configured")]
    NotConfigured { kind: &'static str, name: String },
    /// Processes were still alive long after they were killed.
    #[error("{count} processes of the sandbox would not die")]
    Unkillable { count: usize },
    /// The operating system refused something.
    #[error("could not {action}")]
    Io {
        action: &'static str,
        #[source]
        source: std::io::Error,
    },
}

impl SandboxError {
    fn io(action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { action, source }
    }
}

/// What keeps a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mechanism {
    CgroupV2,
    CgroupV1,
    /// A resource limit: it binds each process by itself, not the job as a whole.
    Prlimit,
    /// The size of a filesystem in memory.
    Tmpfs,
    /// The agent's own timer.
    Timer,
    /// Nothing: a job can exceed this limit.
    None,
}

/// Which limit is enforced by what, as tried on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enforcement {
    /// The driver and its version.
    pub driver: String,
    pub memory: Mechanism,
    pub processes: Mechanism,
    pub cpus: Mechanism,
    pub disk: Mechanism,
    pub wall_time: Mechanism,
    /// The user that sandboxes run as, seen from the host.
    pub host_uid: u32,
    /// What every sandbox was seen to be cut off from.
    pub isolation: Vec<String>,
    /// What an operator should know: weaker mechanisms, and what would make them stronger.
    pub notes: Vec<String>,
}

/// Makes sandboxes.
pub trait SandboxDriver: Send + Sync + std::fmt::Debug {
    /// Tries what this machine can do. The first call decides how later sandboxes are limited.
    fn probe(&self) -> BoxFuture<'_, Result<Enforcement, SandboxError>>;

    /// Starts one sandbox.
    fn start(
        &self,
        spec: SandboxSpec,
    ) -> BoxFuture<'_, Result<Box<dyn SandboxHandle>, SandboxError>>;

    /// Kills what an earlier process left behind of these jobs, and waits until it is gone.
    fn reap<'a>(&'a self, jobs: &'a [JobId]) -> BoxFuture<'a, Result<usize, SandboxError>>;
}

/// One living sandbox.
pub trait SandboxHandle: Send {
    /// Waits for the command's end, kills what it left behind and collects the output. May be dropped
    /// and called again; after it has returned once it must not be called again.
    fn wait(&mut self) -> BoxFuture<'_, Result<Exit, SandboxError>>;

    /// Sends SIGTERM to every process of the sandbox.
    fn terminate(&mut self);

    /// Kills the whole sandbox at once.
    fn kill(&mut self);
}
