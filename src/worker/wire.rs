//! The Worker API's payloads: what travels between the control plane and a worker's agent.
//!
//! `POST /v1/worker/jobs:run` is the specification's; the rest is the asynchronous surface on which it
//! stands. docs/worker.md describes both, and marks what is an addition.
//!
//! **Invariant:** every body carries `version: 1`, and unknown fields of a request are refused.
//! **Invariant:** no text of a request reaches a file or an argument list with a NUL in it.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::ids::JobId;

/// The only version of the payloads so far.
pub const VERSION: u32 = 1;

/// Standard input of a job, in bytes.
pub const MAX_STDIN_BYTES: usize = 1 << 20;
/// Arguments of a command, each at most [`MAX_TEXT_BYTES`], together [`MAX_COMMAND_BYTES`].
pub const MAX_ARGUMENTS: usize = 1024;
/// The kernel takes at most 128 KiB for one argument or variable.
pub const MAX_TEXT_BYTES: usize = 100 << 10;
/// All arguments together; the kernel's own bound is 2 MiB with the environment.
pub const MAX_COMMAND_BYTES: usize = 512 << 10;
/// Variables of an environment.
pub const MAX_VARIABLES: usize = 256;
/// All names and values of an environment together.
pub const MAX_ENVIRONMENT_BYTES: usize = 512 << 10;
/// Mounts of one job.
pub const MAX_MOUNTS: usize = 32;
/// Variables that start so are the worker's own.
pub const RESERVED_PREFIX: &str = "CYNAI_";

/// A request for one sandboxed execution.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobRequest {
    pub version: u32,
    /// What the job belongs to: a task, or a run where no task exists.
    pub task_id: Uuid,
    /// Names the execution: the same id never runs twice.
    pub job_id: JobId,
    pub sandbox: SandboxRequest,
}

/// What to run, and in what.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxRequest {
    /// The name of a root filesystem that the worker knows. May be left out where the worker has a default.
    #[serde(default)]
    pub image: String,
    /// The argument vector; no shell is involved.
    pub command: Vec<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Cut to the worker's maximum; without it the worker's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<u64>,
    /// Both values mean no network at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_policy: Option<NetworkPolicy>,
    /// Addition: what the command reads from standard input; without it, nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// Addition: read-only directories of the worker, by name, seen at `/data/NAME`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<String>,
    /// Addition: stricter limits than the worker's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
}

/// How a job may reach the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkPolicy {
    Restricted,
    None,
}

impl NetworkPolicy {
    /// Reads the word on the wire.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        match word {
            "restricted" => Some(Self::Restricted),
            "none" => Some(Self::None),
            _ => None,
        }
    }
}

/// Limits that a job asks for.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resources {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mb: Option<u64>,
}

/// Where a job is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Recorded; waits for a slot.
    Accepted,
    /// Its sandbox is alive.
    Running,
    /// The command ended with 0.
    Completed,
    /// The command ended with something else, or the sandbox could not be made.
    Failed,
    /// It was killed because its time was over.
    Timeout,
    /// It was stopped on request.
    Canceled,
    /// The agent ended before the job did; how far the command came is unknown.
    Lost,
}

impl JobState {
    /// Whether the state is final.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        !matches!(self, Self::Accepted | Self::Running)
    }

    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Timeout => "timeout",
            Self::Canceled => "canceled",
            Self::Lost => "lost",
        }
    }
}

/// How a job ended: the answer of `jobs:run`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobResult {
    pub version: u32,
    pub task_id: Uuid,
    pub job_id: JobId,
    /// Always a terminal state.
    pub status: JobState,
    /// Present when completed or failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub started_at: DateTime<Utc>,
    pub ended_at: DateTime<Utc>,
    pub truncated: Truncated,
    /// Addition: why the job ended so, when its own output cannot tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<JobError>,
}

/// Which outputs were cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Truncated {
    pub stdout: bool,
    pub stderr: bool,
}

/// Why a job ended as it did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobError {
    pub kind: JobErrorKind,
    pub message: String,
}

/// What a caller can branch on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobErrorKind {
    /// The sandbox could not be made: the command never ran.
    SandboxFailed,
    /// The kernel killed a process of the job because of the memory limit.
    OutOfMemory,
    /// The job's time was over.
    TimedOut,
    /// Somebody stopped it.
    Stopped,
    /// The agent ended before the job: the command may have run in part, or not at all.
    AgentEnded,
}

/// A job as the worker sees it now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobStatus {
    pub version: u32,
    pub task_id: Uuid,
    pub job_id: JobId,
    pub state: JobState,
    pub accepted_at: DateTime<Utc>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<DateTime<Utc>>,
    pub acknowledged: bool,
    /// Present in a terminal state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<JobResult>,
}

/// Finished jobs that nobody has acknowledged yet, oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinishedJobs {
    pub version: u32,
    pub jobs: Vec<JobStatus>,
    /// Whether there are more than were asked for.
    pub more: bool,
}

/// The answer to an acknowledgement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acknowledged {
    pub version: u32,
    pub job_id: JobId,
    pub acknowledged: bool,
}

/// Asks for the end of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    pub version: u32,
    pub task_id: Uuid,
    pub job_id: JobId,
}

/// What a stop did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopAnswer {
    pub version: u32,
    pub task_id: Uuid,
    pub job_id: JobId,
    pub outcome: StopOutcome,
    /// Absent when the worker does not know the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<JobState>,
}

/// What a stop found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopOutcome {
    /// SIGTERM is on its way, SIGKILL follows; the job ends as `canceled`.
    Stopping,
    /// It was still queued and is `canceled` now.
    Canceled,
    /// It is unknown, or had ended before.
    NotRunning,
}

/// A request that cannot be accepted as it is.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum InvalidRequest {
    #[error("version {received} is not supported; this worker speaks version {VERSION}")]
    UnsupportedVersion { received: u32 },
    #[error("`{field}` is empty")]
    Empty { field: &'static str },
    #[error("`{field}` is over its limit of {limit}")]
    TooLarge { field: &'static str, limit: usize },
    #[error("`{field}` contains a NUL character")]
    Nul { field: &'static str },
    #[error("`sandbox.command` must not start with `-`: `{command}`")]
    DashCommand { command: String },
    #[error("`sandbox.env` has a name that is not a variable's: `{name}`")]
    BadVariable { name: String },
    #[error(
        "`sandbox.env` sets `{name}`: names that start with {RESERVED_PREFIX} are the worker's own"
    )]
    ReservedVariable { name: String },
    #[error("`sandbox.timeout_seconds` must be at least 1")]
    ZeroTimeout,
    #[error("image `{image}` is not known here; known images: {known}")]
    UnknownImage { image: String, known: String },
    #[error("image `{image}` is refused by {rule}; allowed are: {allowed}")]
    ImageNotAllowed { image: String, rule: String, allowed: String },
    #[error("mount `{mount}` is not known here; known mounts: {known}")]
    UnknownMount { mount: String, known: String },
    #[error(
        "`sandbox.resources.{field}` is {requested}, but must be between {min} and this worker's {max}"
    )]
    Resource { field: &'static str, requested: f64, min: f64, max: f64 },
}

impl JobRequest {
    /// A hash of the meaning of the request: the order of keys and unset fields make no difference.
    #[must_use]
    pub fn hash(&self) -> String {
        let canonical = serde_json::to_vec(self).unwrap_or_default();
        Sha256::digest(&canonical).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// About how much memory the request takes while it waits.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        let sandbox = &self.sandbox;
        let env: usize =
            sandbox.env.iter().map(|(name, value)| name.len() + value.len() + 64).sum();
        let command: usize = sandbox.command.iter().map(|text| text.len() + 24).sum();
        512 + env + command + sandbox.stdin.as_ref().map_or(0, String::len) + sandbox.image.len()
    }

    /// Checks everything that does not depend on the worker's configuration.
    pub fn validate(&self) -> Result<(), InvalidRequest> {
        supported(self.version)?;
        self.sandbox.validate()
    }
}

/// Refuses a payload of another version.
pub fn supported(received: u32) -> Result<(), InvalidRequest> {
    if received == VERSION { Ok(()) } else { Err(InvalidRequest::UnsupportedVersion { received }) }
}

impl SandboxRequest {
    fn validate(&self) -> Result<(), InvalidRequest> {
        use InvalidRequest as E;
        text("sandbox.image", &self.image, 256)?;
        let Some(program) = self.command.first() else {
            return Err(E::Empty { field: "sandbox.command" });
        };
        if program.starts_with('-') {
            return Err(E::DashCommand { command: program.chars().take(64).collect() });
        }
        text("sandbox.command", program, MAX_TEXT_BYTES)?;
        bounded("sandbox.command", self.command.len(), MAX_ARGUMENTS)?;
        for argument in &self.command {
            free_of_nul("sandbox.command", argument)?;
            bounded("sandbox.command", argument.len(), MAX_TEXT_BYTES)?;
        }
        bounded("sandbox.command", self.command.iter().map(String::len).sum(), MAX_COMMAND_BYTES)?;
        self.validate_env()?;
        bounded("sandbox.stdin", self.stdin.as_ref().map_or(0, String::len), MAX_STDIN_BYTES)?;
        bounded("sandbox.mounts", self.mounts.len(), MAX_MOUNTS)?;
        for mount in &self.mounts {
            text("sandbox.mounts", mount, 128)?;
        }
        if self.timeout_seconds == Some(0) { Err(E::ZeroTimeout) } else { Ok(()) }
    }

    fn validate_env(&self) -> Result<(), InvalidRequest> {
        use InvalidRequest as E;
        bounded("sandbox.env", self.env.len(), MAX_VARIABLES)?;
        let bytes = self.env.iter().map(|(name, value)| name.len() + value.len()).sum();
        bounded("sandbox.env", bytes, MAX_ENVIRONMENT_BYTES)?;
        for (name, value) in &self.env {
            let shown = || name.chars().take(64).collect::<String>();
            if name.is_empty() || name.len() > 256 || name.contains(['=', '\0']) {
                return Err(E::BadVariable { name: shown().replace('\0', "\\0") });
            }
            if name.starts_with(RESERVED_PREFIX) {
                return Err(E::ReservedVariable { name: shown() });
            }
            free_of_nul("sandbox.env", value)?;
            bounded("sandbox.env", value.len(), MAX_TEXT_BYTES)?;
        }
        Ok(())
    }
}

fn text(field: &'static str, value: &str, limit: usize) -> Result<(), InvalidRequest> {
    if value.is_empty() {
        return Err(InvalidRequest::Empty { field });
    }
    free_of_nul(field, value)?;
    bounded(field, value.len(), limit)
}

fn free_of_nul(field: &'static str, value: &str) -> Result<(), InvalidRequest> {
    if value.contains('\0') { Err(InvalidRequest::Nul { field }) } else { Ok(()) }
}

fn bounded(field: &'static str, size: usize, limit: usize) -> Result<(), InvalidRequest> {
    if size > limit { Err(InvalidRequest::TooLarge { field, limit }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> JobRequest {
        JobRequest {
            version: 1,
            task_id: Uuid::from_u128(1),
            job_id: JobId(Uuid::from_u128(2)),
            sandbox: SandboxRequest {
                image: "sandbox/base".into(),
                command: vec!["true".into()],
                ..SandboxRequest::default()
            },
        }
    }

    fn check(change: impl FnOnce(&mut JobRequest), expected: &str) {
        let mut request = request();
        change(&mut request);
        let found = request.validate().err().map_or(String::new(), |err| err.to_string());
        assert_eq!(found, expected);
    }

    #[test]
    fn requests_are_checked_field_by_field() {
        check(|_| (), "");
        check(|r| r.version = 2, "version 2 is not supported; this worker speaks version 1");
        check(|r| r.sandbox.image.clear(), "`sandbox.image` is empty");
        check(|r| r.sandbox.command.clear(), "`sandbox.command` is empty");
        check(|r| r.sandbox.command[0].clear(), "`sandbox.command` is empty");
        check(
            |r| r.sandbox.command[0] = "--help".into(),
            "`sandbox.command` must not start with `-`: `--help`",
        );
        check(
            |r| r.sandbox.command = vec!["x".into(); 1025],
            "`sandbox.command` is over its limit of 1024",
        );
        check(
            |r| r.sandbox.command.push("a\0b".into()),
            "`sandbox.command` contains a NUL character",
        );
        check(
            |r| r.sandbox.timeout_seconds = Some(0),
            "`sandbox.timeout_seconds` must be at least 1",
        );
        check(
            |r| r.sandbox.stdin = Some("x".repeat(MAX_STDIN_BYTES + 1)),
            "`sandbox.stdin` is over its limit of 1048576",
        );
    }

    #[test]
    fn environments_cannot_smuggle_options_or_shadow_the_workers_own() {
        let set = |name: &str, value: &str| {
            let (name, value) = (name.to_owned(), value.to_owned());
            move |r: &mut JobRequest| drop(r.sandbox.env.insert(name, value))
        };
        check(set("A", "1"), "");
        check(set("A", "x\0--bind\0/\0/host"), "`sandbox.env` contains a NUL character");
        check(set("A=B", ""), "`sandbox.env` has a name that is not a variable's: `A=B`");
        check(set("", "x"), "`sandbox.env` has a name that is not a variable's: ``");
        check(
            set("CYNAI_JOB_ID", "x"),
            "`sandbox.env` sets `CYNAI_JOB_ID`: names that start with CYNAI_ are the worker's own",
        );
    }

    #[test]
    fn the_hash_sees_meaning_and_not_the_order_of_keys() {
        let parse = |text: &str| serde_json::from_str::<JobRequest>(text).unwrap().hash();
        let ids = r#""task_id":"00000000-0000-0000-0000-000000000001","job_id":"00000000-0000-0000-0000-000000000002""#;
        let one = parse(&format!(
            r#"{{"version":1,{ids},"sandbox":{{"image":"a","command":["b"],"env":{{"X":"1","Y":"2"}}}}}}"#
        ));
        let other = parse(&format!(
            r#"{{"sandbox":{{"env":{{"Y":"2","X":"1"}},"command":["b"],"image":"a"}},{ids},"version":1}}"#
        ));
        assert_eq!(one, other);
        assert_ne!(one, request().hash());
    }

    #[test]
    fn unknown_fields_are_refused() {
        let mut value = serde_json::to_value(request()).unwrap();
        value["sandbox"]["privileged"] = true.into();
        let err = serde_json::from_value::<JobRequest>(value).unwrap_err();
        assert!(err.to_string().starts_with("unknown field `privileged`"), "{err}");
    }
}
