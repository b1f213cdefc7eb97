//! What a worker's operator decides: where it listens, what it may run, and how much of it.
//!
//! The same structure is read from a file, from the command line and, for the server's own local
//! worker, from the first line of standard input. A request can only ask for less than what stands here.
//!
//! **Invariant:** the token never appears in `Debug` output, so it cannot reach a log by accident.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::wire::NetworkPolicy;

/// The image that every worker has unless its configuration says otherwise: the machine's own `/usr`.
pub const BASE_IMAGE: &str = "sandbox/base";

/// The shortest token that is accepted, in bytes.
pub(super) const MIN_TOKEN_BYTES: usize = 16;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("`{field}` must be between {min} and {max}, not {value}")]
    OutOfRange { field: &'static str, min: u64, max: u64, value: u64 },
    #[error("the token is shorter than {MIN_TOKEN_BYTES} bytes")]
    WeakToken,
    #[error(
        "{kind} `{name}`: a name is 1 to 128 of a-z, A-Z, 0-9, `.`, `_`, `-` and, for images, `/` and `:`"
    )]
    BadName { kind: &'static str, name: String },
    #[error("{kind} `{name}`: {path} is not a directory")]
    NotADirectory { kind: &'static str, name: String, path: PathBuf },
    #[error("`default_image` {name}: there is no such image; there are {known}")]
    UnknownImage { name: String, known: String },
    #[error(
        "mount `{name}`: {path} and the state directory {state_dir} hold one another, so jobs would see the agent's keys"
    )]
    Revealing { name: String, path: PathBuf, state_dir: PathBuf },
    #[error("`sandbox_uid` {uid} cannot be used: {reason}")]
    BadUid { uid: u32, reason: &'static str },
}

/// A bearer token that does not print itself.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Token(String);

impl Token {
    /// Takes the secret as it is sent in the `Authorization` header.
    #[must_use]
    pub fn new(secret: impl Into<String>) -> Self {
        Self(secret.into())
    }

    /// A fresh random token of 256 bits.
    #[must_use]
    pub fn random() -> Self {
        let bytes: [u8; 32] = rand::random();
        Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The secret itself, for the one place that sends or compares it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// What a worker's agent is started with.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerConfig {
    /// The bearer token that every call but the health checks must carry.
    pub token: Token,
    /// Where the Worker API listens; port 0 takes a free one.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Where job records live. One agent at a time; made when missing.
    pub state_dir: PathBuf,
    /// Image name to root filesystem directory. `sandbox/base` needs no entry.
    #[serde(default)]
    pub images: BTreeMap<String, PathBuf>,
    /// Mount name to a directory that jobs may ask to see, read-only, at `/data/NAME`.
    #[serde(default)]
    pub mounts: BTreeMap<String, PathBuf>,
    /// The images that jobs may name; without it all that there are.
    #[serde(default)]
    pub allowed_images: Option<Vec<String>>,
    /// The image of a job that names none; without it every job has to.
    #[serde(default)]
    pub default_image: Option<String>,
    /// For jobs that name no policy.
    #[serde(default = "default_network_policy")]
    pub default_network_policy: NetworkPolicy,
    /// Whether the worker runs no jobs at all.
    #[serde(default)]
    pub no_jobs: bool,
    /// How many jobs run at once; without it twice the number of cores.
    #[serde(default)]
    pub slots: Option<usize>,
    /// Accepted jobs that wait for a slot.
    #[serde(default)]
    pub queue: Queue,
    /// What one job may use: default and maximum at once.
    #[serde(default)]
    pub limits: Limits,
    /// How long a job may take.
    #[serde(default)]
    pub timeouts: Timeouts,
    /// How many results are kept, and for how long.
    #[serde(default)]
    pub results: Results,
    /// The largest request body.
    #[serde(default = "default_request_bytes")]
    pub max_request_bytes: usize,
    /// The user that sandboxes run as when the agent is root; without it a free one is chosen.
    #[serde(default)]
    pub sandbox_uid: Option<u32>,
    /// The bubblewrap program.
    #[serde(default = "default_bwrap")]
    pub bwrap: PathBuf,
    /// On SIGTERM: how long running jobs may still take before they are killed.
    #[serde(default)]
    pub drain_seconds: u64,
}

/// Bounds of the queue in front of the slots.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Queue {
    /// Jobs.
    pub jobs: usize,
    /// Their requests together, in memory.
    pub bytes: usize,
}

/// What one job may use. A request may ask for less, never for more.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Memory, in MiB. Files in the sandbox live in memory and count.
    pub memory_mb: u64,
    /// Processes and threads at once.
    pub processes: u64,
    /// Processors' worth of time.
    pub cpus: f64,
    /// `/workspace`, in MiB.
    pub disk_mb: u64,
    /// `/tmp`, and `/dev/shm` by itself, in MiB.
    pub tmp_mb: u64,
    /// Of standard output, and of standard error by itself, in bytes.
    pub output_bytes: usize,
}

/// How long things may take, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// For a job that names no timeout.
    pub default_seconds: u64,
    /// A longer request is cut to this.
    pub max_seconds: u64,
    /// Between SIGTERM and SIGKILL when a job is stopped.
    pub stop_grace_seconds: u64,
}

/// How many results are kept.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Results {
    /// Unfinished jobs and unacknowledged results together; beyond it new jobs are refused.
    pub unacknowledged: usize,
    /// Bytes of unacknowledged results; beyond it new jobs are refused.
    pub unacknowledged_bytes: u64,
    /// Acknowledged results, kept so that a late repetition is not run again.
    pub acknowledged: usize,
    /// Their age.
    pub acknowledged_seconds: u64,
}

impl Default for Queue {
    fn default() -> Self {
        Self { jobs: 1000, bytes: 64 << 20 }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_mb: 1024,
            processes: 256,
            cpus: 1.0,
            disk_mb: 256,
            tmp_mb: 64,
            output_bytes: 256 << 10,
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { default_seconds: 900, max_seconds: 3600, stop_grace_seconds: 10 }
    }
}

impl Default for Results {
    fn default() -> Self {
        Self {
            unacknowledged: 5000,
            unacknowledged_bytes: 1 << 30,
            acknowledged: 1000,
            acknowledged_seconds: 3600,
        }
    }
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 8081))
}

fn default_request_bytes() -> usize {
    10 << 20
}

fn default_network_policy() -> NetworkPolicy {
    NetworkPolicy::Restricted
}

fn default_bwrap() -> PathBuf {
    PathBuf::from("bwrap")
}

impl WorkerConfig {
    /// A configuration with every default, on a free port of the loopback interface.
    #[must_use]
    pub fn new(token: Token, state_dir: impl Into<PathBuf>) -> Self {
        Self {
            token,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            state_dir: state_dir.into(),
            images: BTreeMap::new(),
            mounts: BTreeMap::new(),
            allowed_images: None,
            default_image: None,
            default_network_policy: default_network_policy(),
            no_jobs: false,
            slots: None,
            queue: Queue::default(),
            limits: Limits::default(),
            timeouts: Timeouts::default(),
            results: Results::default(),
            max_request_bytes: default_request_bytes(),
            sandbox_uid: None,
            bwrap: default_bwrap(),
            drain_seconds: 0,
        }
    }

    /// How many jobs run at once.
    #[must_use]
    pub fn slots(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        self.slots.unwrap_or(cores * 2)
    }

    /// The names of all images, sorted.
    #[must_use]
    pub fn image_names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.images.keys().cloned().collect();
        if !self.images.contains_key(BASE_IMAGE) {
            names.push(BASE_IMAGE.to_owned());
        }
        names.sort();
        names
    }

    /// Whether jobs may name this image.
    #[must_use]
    pub fn has_image(&self, name: &str) -> bool {
        name == BASE_IMAGE || self.images.contains_key(name)
    }

    /// Between SIGTERM and SIGKILL when a job is stopped.
    #[must_use]
    pub fn stop_grace(&self) -> Duration {
        Duration::from_secs(self.timeouts.stop_grace_seconds)
    }

    /// Refuses what could not work, before anything is started.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.token.expose().len() < MIN_TOKEN_BYTES {
            return Err(ConfigError::WeakToken);
        }
        self.validate_numbers()?;
        for (name, path) in &self.images {
            named_directory("image", name, path)?;
        }
        for (name, path) in &self.mounts {
            named_directory("mount", name, path)?;
            self.hides_state(name, path)?;
        }
        if let Some(name) = self.default_image.as_ref().filter(|name| !self.has_image(name)) {
            let known = self.image_names().join(", ");
            return Err(ConfigError::UnknownImage { name: name.clone(), known });
        }
        Ok(())
    }

    /// Jobs see mounts: the agent's own directory must be in none.
    fn hides_state(&self, name: &str, path: &Path) -> Result<(), ConfigError> {
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let (mount, state_dir) = (real(path), real(&self.state_dir));
        if mount.starts_with(&state_dir) || state_dir.starts_with(&mount) {
            return Err(ConfigError::Revealing { name: name.to_owned(), path: mount, state_dir });
        }
        Ok(())
    }

    fn validate_numbers(&self) -> Result<(), ConfigError> {
        let limits = &self.limits;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "saturates, then compared"
        )]
        let milli_cpus = (limits.cpus * 1000.0) as u64;
        for (field, value, min, max) in [
            ("slots", self.slots() as u64, 1, 4096),
            ("queue.jobs", self.queue.jobs as u64, 1, 100_000),
            ("queue.bytes", self.queue.bytes as u64, 1 << 20, 4 << 30),
            ("limits.memory_mb", limits.memory_mb, 32, 1 << 20),
            ("limits.processes", limits.processes, 4, 32_768),
            ("limits.cpus (in thousandths)", milli_cpus, 50, 1_024_000),
            ("limits.disk_mb", limits.disk_mb, 1, 1 << 20),
            ("limits.tmp_mb", limits.tmp_mb, 1, 1 << 20),
            ("limits.output_bytes", limits.output_bytes as u64, 1024, 256 << 10),
            (
                "timeouts.default_seconds",
                self.timeouts.default_seconds,
                1,
                self.timeouts.max_seconds,
            ),
            ("timeouts.max_seconds", self.timeouts.max_seconds, 1, 7 * 24 * 3600),
            ("timeouts.stop_grace_seconds", self.timeouts.stop_grace_seconds, 0, 300),
            ("results.unacknowledged", self.results.unacknowledged as u64, 1, 1_000_000),
            ("results.unacknowledged_bytes", self.results.unacknowledged_bytes, 1 << 20, 1 << 40),
            ("results.acknowledged", self.results.acknowledged as u64, 0, 1_000_000),
            ("max_request_bytes", self.max_request_bytes as u64, 1024, 64 << 20),
            ("drain_seconds", self.drain_seconds, 0, 3600),
        ] {
            if !(min..=max).contains(&value) {
                return Err(ConfigError::OutOfRange { field, min, max, value });
            }
        }
        Ok(())
    }
}

fn named_directory(kind: &'static str, name: &str, path: &Path) -> Result<(), ConfigError> {
    let extra = if kind == "image" { "._-/:" } else { "._-" };
    let known = |c: char| c.is_ascii_alphanumeric() || extra.contains(c);
    let dotted = name.split('/').any(|part| part.is_empty() || part == "." || part == "..");
    if name.len() > 128 || dotted || !name.chars().all(known) {
        return Err(ConfigError::BadName { kind, name: name.to_owned() });
    }
    if !path.is_dir() {
        return Err(ConfigError::NotADirectory {
            kind,
            name: name.to_owned(),
            path: path.to_owned(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(change: impl FnOnce(&mut WorkerConfig), expected: Option<&str>) {
        let mut config = WorkerConfig::new(Token::random(), "/var/lib/none");
        change(&mut config);
        let found = config.validate().err().map(|err| err.to_string());
        assert_eq!(found.as_deref(), expected);
    }

    #[test]
    fn unusable_values_are_refused_with_their_field() {
        check(|_| (), None);
        check(|c| c.slots = Some(0), Some("`slots` must be between 1 and 4096, not 0"));
        check(
            |c| c.limits.memory_mb = 1,
            Some("`limits.memory_mb` must be between 32 and 1048576, not 1"),
        );
        check(|c| c.token = Token::new("short"), Some("the token is shorter than 16 bytes"));
        check(
            |c| drop(c.mounts.insert("logs".into(), "/no/such".into())),
            Some("mount `logs`: /no/such is not a directory"),
        );
        check(
            |c| drop(c.mounts.insert("..".into(), "/usr".into())),
            Some(
                "mount `..`: a name is 1 to 128 of a-z, A-Z, 0-9, `.`, `_`, `-` and, for images, `/` and `:`",
            ),
        );
    }

    #[test]
    fn debug_output_hides_the_token() {
        let config = WorkerConfig::new(Token::new("a very secret token"), "/var/lib/none");
        assert!(!format!("{config:?}").contains("very secret"));
    }

    #[test]
    fn a_misspelt_key_is_refused() {
        let text = r#"{"token":"0123456789abcdef","state_dir":"/x","slot":3}"#;
        let err = serde_json::from_str::<WorkerConfig>(text).unwrap_err();
        assert!(err.to_string().contains("unknown field `slot`"), "{err}");
    }
}
