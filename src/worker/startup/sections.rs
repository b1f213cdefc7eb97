//! The sections of the startup file as they are written.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;

use crate::config::values::section;
use crate::worker::wire::NetworkPolicy;

/// Names and directories.
pub type Directories = BTreeMap<String, PathBuf>;

/// `orchestrator`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Server {
    /// Its base URL.
    pub url: String,
    /// The environment variable that holds the registration key.
    #[serde(default)]
    pub registration_psk_env: Option<String>,
    /// The file that holds it.
    #[serde(default)]
    pub registration_psk_file: Option<PathBuf>,
    /// What it is recognised by.
    #[serde(default, deserialize_with = "section")]
    pub tls: ServerTls,
    /// How long it may take.
    #[serde(default, deserialize_with = "section")]
    pub timeouts: ServerTimeouts,
}

/// `orchestrator.tls`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerTls {
    /// Certificates that its chain may lead to; without it this machine's.
    pub ca_bundle_path: Option<PathBuf>,
    /// SHA-256 of its public key.
    pub pinned_sha256: Option<String>,
    /// Addition: keys and tokens may travel unencrypted.
    pub allow_plain_http: bool,
}

/// `orchestrator.timeouts`, in seconds.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerTimeouts {
    /// For a connection; 5.
    pub connect_seconds: Option<u64>,
    /// For an answer; 30.
    pub request_seconds: Option<u64>,
}

/// `node`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// The slug.
    pub id: String,
    /// For people.
    #[serde(default)]
    pub name: Option<String>,
    /// What graphs may ask for.
    #[serde(default)]
    pub labels: Vec<String>,
    /// The operator's own notes: no payload carries them.
    #[serde(default)]
    pub metadata: BTreeMap<String, Value>,
}

/// `worker_api`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WorkerApi {
    /// An address; 0.0.0.0.
    pub listen_host: Option<String>,
    /// 8081; 0 takes a free one.
    pub listen_port: Option<u16>,
    /// Where the server reaches it.
    pub public_base_url: Option<String>,
    /// The largest body; 10 MiB.
    pub max_request_bytes: Option<usize>,
    /// Addition: how it is protected on its way.
    #[serde(deserialize_with = "section")]
    pub tls: ApiTls,
    /// Addition: how long jobs may still take when the agent is told to stop; 0.
    pub drain_seconds: Option<u64>,
}

/// `worker_api.tls`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ApiTls {
    /// Where the certificate comes from; `self_signed`, but `off` on a loopback address.
    pub mode: Option<ApiTlsMode>,
    /// With `files`: the chain.
    pub cert_file: Option<PathBuf>,
    /// With `files`: its key.
    pub key_file: Option<PathBuf>,
}

/// Where the Worker API's certificate comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ApiTlsMode {
    /// The agent makes one, and tells the server which.
    SelfSigned,
    /// Two files.
    Files,
    /// Plain HTTP.
    Off,
}

/// `sandbox`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sandbox {
    /// Whether there are jobs.
    pub mode: SandboxMode,
    /// `bubblewrap`.
    pub runtime: Option<String>,
    /// Sandboxes never have privileges, whatever this says.
    pub rootless: Option<bool>,
    /// Jobs at once.
    pub max_concurrency: Option<usize>,
    /// Addition: image name to a root filesystem directory.
    pub images: Directories,
    /// For jobs that name no image.
    pub default_image: Option<String>,
    /// What jobs may name; without it all.
    pub allowed_images: Option<Vec<String>>,
    /// For jobs that name none: `restricted` or `none`.
    pub default_network_policy: Option<String>,
    /// Jobs have no network: only an empty list is true.
    pub allowed_egress_domains: Vec<String>,
    /// The most that one job may use.
    #[serde(deserialize_with = "section")]
    pub resources: Resources,
    /// How long a job may take.
    #[serde(deserialize_with = "section")]
    pub timeouts: SandboxTimeouts,
    /// Workspaces live in memory.
    pub mount_root: Option<PathBuf>,
    /// What jobs may see of this machine.
    #[serde(deserialize_with = "section")]
    pub mounts: Mounts,
    /// What no job gets.
    #[serde(deserialize_with = "section")]
    pub security: Security,
}

impl Sandbox {
    /// The policy, where it is one.
    #[must_use]
    pub fn network_policy(&self) -> Option<NetworkPolicy> {
        NetworkPolicy::parse(self.default_network_policy.as_deref()?)
    }
}

/// What the worker is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SandboxMode {
    /// Jobs, and models where there are any.
    #[default]
    Allow,
    /// Jobs.
    SandboxOnly,
    /// No jobs.
    Disabled,
}

/// `sandbox.resources`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Resources {
    /// Processors' worth of time.
    pub max_cpu_cores: Option<f64>,
    /// Memory, in MiB.
    pub max_memory_mb: Option<u64>,
    /// Processes and threads.
    pub max_pids: Option<u64>,
    /// Addition: `/workspace`, in MiB.
    pub max_disk_mb: Option<u64>,
    /// Addition: `/tmp`, in MiB.
    pub max_tmp_mb: Option<u64>,
}

/// `sandbox.timeouts`, in seconds.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SandboxTimeouts {
    /// For a job that names none.
    pub default_seconds: Option<u64>,
    /// A longer request is cut to it.
    pub max_seconds: Option<u64>,
    /// Addition: between SIGTERM and SIGKILL.
    pub stop_grace_seconds: Option<u64>,
}

/// `sandbox.mounts`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mounts {
    /// Addition: mount name to a directory, seen read-only at `/data/NAME`.
    pub directories: Directories,
    /// When given, every mount is below one of them.
    pub allowed_host_paths: Option<Vec<PathBuf>>,
    /// Mounts are always read-only.
    pub read_only_by_default: Option<bool>,
}

/// `sandbox.security`: all of it is always refused to jobs.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Security {
    /// False.
    pub allow_privileged: bool,
    /// False.
    pub allow_host_network: bool,
    /// False.
    pub allow_device_mounts: bool,
}

/// `inference`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Inference {
    /// Whether the server may run models here.
    pub mode: InferenceMode,
    /// Of nothing, so far.
    pub max_concurrency: Option<u64>,
    /// Whether a model may use the graphics processors.
    pub allow_gpu: Option<bool>,
}

/// Whether the server may run models here.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InferenceMode {
    /// It may, once that exists.
    #[default]
    Allow,
    /// It may not.
    Disabled,
    /// It must: refused.
    Require,
}

/// `storage`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Storage {
    /// Job records, tokens and keys.
    pub state_dir: Option<PathBuf>,
    /// Nothing is cached.
    pub cache_dir: Option<PathBuf>,
    /// There are no artifacts.
    pub artifacts_dir: Option<PathBuf>,
}

/// `logging`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Logging {
    /// The least that is logged.
    pub level: Option<Level>,
    /// How a line looks.
    pub format: Option<Format>,
    /// Where to, instead of standard error.
    pub file_path: Option<PathBuf>,
}

/// The least that is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    Debug,
    Info,
    Warn,
    Error,
}

impl Level {
    /// The word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }
}

/// How a line of the log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// `updates`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Updates {
    /// False keeps the configuration that the worker got at its start.
    pub enable_dynamic_config: Option<bool>,
    /// Seconds between two looks when the server cannot be asked to tell.
    pub poll_interval_seconds: Option<u64>,
    /// Nothing is restarted.
    pub allow_service_restart: Option<bool>,
}
