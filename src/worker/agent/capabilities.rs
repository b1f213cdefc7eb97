//! What a worker can do, as `GET /v1/worker/capabilities` tells it.

use serde::{Deserialize, Serialize};

use super::routes::Readiness;
use crate::worker::config::{Limits, Timeouts, WorkerConfig};
use crate::worker::effective::Effective;
use crate::worker::jobs::Jobs;
use crate::worker::sandbox::Enforcement;
use crate::worker::wire::VERSION;

/// What a caller needs to know before it sends jobs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Capabilities {
    pub version: u32,
    /// The program's own version.
    pub agent_version: String,
    pub arch: String,
    pub slots: usize,
    pub queue: usize,
    /// Jobs that wait, and jobs that run, at this moment.
    pub queued: usize,
    pub running: usize,
    pub images: Vec<String>,
    pub mounts: Vec<String>,
    pub limits: Limits,
    pub timeouts: Timeouts,
    pub sandbox: SandboxReport,
}

/// Whether sandboxes work here, and what they enforce.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxReport {
    pub ready: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enforcement: Option<Enforcement>,
}

impl Capabilities {
    pub(super) fn of(
        config: &WorkerConfig,
        effective: &Effective,
        jobs: &Jobs,
        readiness: Readiness,
    ) -> Self {
        let (queued, running) = jobs.load();
        let sandbox = match readiness {
            Some(Ok(found)) => {
                SandboxReport { ready: true, reason: None, enforcement: Some(found) }
            }
            Some(Err(reason)) => {
                SandboxReport { ready: false, reason: Some(reason), enforcement: None }
            }
            None => SandboxReport {
                ready: false,
                reason: Some("the sandbox is being tried".to_owned()),
                enforcement: None,
            },
        };
        Self {
            version: VERSION,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            arch: std::env::consts::ARCH.to_owned(),
            slots: config.slots(),
            queue: config.queue.jobs,
            queued,
            running,
            images: effective.allowed(config.image_names()),
            mounts: config.mounts.keys().cloned().collect(),
            limits: config.limits,
            timeouts: Timeouts {
                default_seconds: effective.default_seconds,
                max_seconds: effective.max_seconds.value,
                ..config.timeouts
            },
            sandbox,
        }
    }
}
