//! What a worker and its server tell each other beside jobs: the specification's `node_*` payloads.
//!
//! A worker registers with a key that it was given beforehand and is answered with where everything is
//! ([`Bootstrap`]). It fetches its [`Configuration`] and says what became of it ([`ConfigAck`]), reports what it
//! can do ([`CapabilityReport`]) and that it is alive ([`Heartbeat`]). Worker and server are written and updated
//! apart: unknown fields are ignored here, a field's meaning never changes within a version, and fields marked
//! *addition* are not the specification's.
//!
//! **Invariant:** no secret of a payload is shown by `Debug`.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use ulid::Ulid;

use super::config::Token;

/// The only version of these payloads so far.
pub const VERSION: u32 = 1;

/// Where workers register, below the server's base URL: the only path that a worker knows by itself.
pub const REGISTRATION_PATH: &str = "/v1/nodes/register";

/// Characters of a worker's slug.
pub const MAX_SLUG: usize = 63;
/// Labels of a worker.
pub const MAX_LABELS: usize = 64;
/// Characters of a label, and of a display name.
pub const MAX_NAME: usize = 128;
/// Bytes of a capability report.
pub const MAX_REPORT_BYTES: usize = 256 << 10;

/// `POST` to [`REGISTRATION_PATH`]: a worker shows its key and says what it is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Registration {
    pub version: u32,
    /// The key that every worker of an installation was given beforehand.
    pub psk: Token,
    /// What the worker can do.
    pub capability: CapabilityReport,
}

/// `node_bootstrap_payload_v1`: where everything is, and the token that opens it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Bootstrap {
    pub version: u32,
    pub issued_at: DateTime<Utc>,
    pub orchestrator: Orchestrator,
    pub auth: NodeAuth,
    /// Left out where the server speaks plain HTTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust: Option<Trust>,
    /// The configuration that waits for the worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initial_config_version: Option<String>,
    /// Addition: seconds between two heartbeats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat_seconds: Option<u64>,
}

/// The server as a worker reaches it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Orchestrator {
    pub base_url: String,
    pub endpoints: Endpoints,
}

/// Absolute URLs: a worker knows no path by itself but that of its registration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoints {
    /// Where to register again.
    pub worker_registration_url: String,
    /// GET: [`Configuration`]. POST: [`ConfigAck`].
    pub node_config_url: String,
    /// POST: [`CapabilityReport`].
    pub node_report_url: String,
    /// DELETE: the worker goes for good.
    pub node_self_unregister_url: String,
    /// Addition. POST: [`Heartbeat`], answered with [`HeartbeatAnswer`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_heartbeat_url: Option<String>,
    /// Addition. POST without a body: a fresh [`NodeAuth`] before the old one expires, as [`RenewedAuth`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_token_url: Option<String>,
}

/// What a worker shows in `Authorization: Bearer` from then on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeAuth {
    /// Opaque, although the specification's name says JWT: it can be revoked at any time.
    pub node_jwt: Token,
    pub expires_at: DateTime<Utc>,
}

/// The answer to a renewal.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RenewedAuth {
    pub version: u32,
    pub auth: NodeAuth,
}

/// What a worker may trust the server by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trust {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_bundle_pem: Option<String>,
    /// Of the server's public key: SHA-256 of its SubjectPublicKeyInfo, base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pinned_spki_sha256: Option<String>,
}

/// `node_capability_report_v1`: what a worker is and can do. The server keeps the whole JSON, also what is unknown here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CapabilityReport {
    pub version: u32,
    pub reported_at: DateTime<Utc>,
    pub node: NodeIdentity,
    pub platform: Platform,
    pub compute: Compute,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container_runtime: Option<ContainerRuntime>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<Gpu>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<SandboxAbility>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkAbility>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inference: Option<InferenceAbility>,
    /// Where the server reaches the Worker API.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker_api: Option<WorkerApi>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsReport>,
}

/// Who the worker is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeIdentity {
    /// Unique among the workers: 1 to 63 of a-z, 0-9, `.`, `_`, `-`, beginning with a letter or digit.
    pub node_slug: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
}

/// What the worker runs on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// `amd64`, `arm64`.
    pub arch: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distro: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_version: Option<String>,
}

/// Processors and memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compute {
    pub cpu_cores: u32,
    pub ram_mb: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_model: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage_free_mb: Option<u64>,
}

/// The engine that runs containers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerRuntime {
    /// `podman`, `docker`; an addition: `bubblewrap`.
    pub runtime: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rootless_supported: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rootless_enabled: Option<bool>,
}

/// Graphics processors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Gpu {
    pub present: bool,
    /// As reported; kept as it is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<Value>,
}

/// Whether and how the worker runs jobs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SandboxAbility {
    pub supported: bool,
    /// What enforces the limits: `netns`, `cgroups_v2`, ...
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub features: Vec<String>,
    /// How many jobs run at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_concurrency: Option<u32>,
    /// Addition: why sandboxes do not work, where they do not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Addition: images that jobs may name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<Vec<String>>,
    /// Addition: directories that jobs may ask to see.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mounts: Option<Vec<String>>,
    /// Addition: the most that one job may use: `memory_mb`, `processes`, `cpus`, `disk_mb`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub limits: BTreeMap<String, f64>,
}

/// What the worker reaches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkAbility {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub orchestrator_reachable: Option<bool>,
    /// `unrestricted`, `restricted`, `allowlist`, `none`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outbound_policy: Option<String>,
}

/// Whether the worker can run models.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InferenceAbility {
    #[serde(default)]
    pub supported: bool,
    /// `allow`, `disabled`; left out is `allow`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// Addition, seen elsewhere: models that are loaded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub available_models: Vec<String>,
}

/// Where the Worker API is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerApi {
    /// Scheme, host and port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_url: Option<String>,
}

/// The worker's part of TLS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsReport {
    /// `ok`, `missing`, `invalid`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust_material_status: Option<String>,
    /// The certificate that the Worker API shows: the server accepts exactly this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker_api_server_cert_pem: Option<String>,
}

/// `node_configuration_payload_v1`: everything that the server decides about one worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Configuration {
    pub version: u32,
    /// A ULID: a later one is greater, compared as text.
    pub config_version: String,
    pub issued_at: DateTime<Utc>,
    pub node_slug: String,
    pub orchestrator: ConfiguredOrchestrator,
    pub sandbox_registry: Registry,
    pub model_cache: ModelCache,
    pub policy: Policy,
    pub worker_api: ConfiguredWorkerApi,
    #[serde(default)]
    pub constraints: Constraints,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notes: Option<String>,
    /// Addition: what the server is trusted by, when that changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust: Option<Trust>,
}

impl Configuration {
    /// The version, when it is one.
    #[must_use]
    pub fn ulid(&self) -> Option<Ulid> {
        Ulid::from_string(&self.config_version).ok()
    }
}

/// Where things are, as the configuration says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfiguredOrchestrator {
    pub base_url: String,
    pub endpoints: ConfiguredEndpoints,
}

/// The part of the endpoints that may change after registration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfiguredEndpoints {
    /// Where the server reaches this worker.
    pub worker_api_target_url: String,
    pub node_report_url: String,
}

/// Where images come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Registry {
    /// Empty where there is none.
    pub registry_url: String,
    #[serde(default)]
    pub require_digest_pinning: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pull_token: Option<Token>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pull_token_expires_at: Option<DateTime<Utc>>,
}

/// Where model files come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelCache {
    /// Empty where there is none.
    pub cache_url: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pull_token: Option<Token>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pull_token_expires_at: Option<DateTime<Utc>>,
}

/// What the worker may do. Its own startup file may be stricter, never more permissive.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    #[serde(default)]
    pub sandbox: SandboxPolicy,
    #[serde(default)]
    pub updates: UpdatePolicy,
}

/// What sandboxes may be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxPolicy {
    /// Names of images; `None` allows all that the worker has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_images: Option<Vec<String>>,
    /// For jobs that name none: `none` or `restricted`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_network_policy: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_egress_domains: Option<Vec<String>>,
    #[serde(default)]
    pub allow_privileged: bool,
    #[serde(default)]
    pub allow_host_network: bool,
}

/// How the worker learns of later configurations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdatePolicy {
    /// Without it the worker keeps what it got at its start.
    #[serde(default = "yes")]
    pub enable_dynamic_config: bool,
    /// Seconds between two looks; heartbeats tell of news sooner.
    #[serde(default = "minute")]
    pub poll_interval_seconds: u64,
    #[serde(default = "yes")]
    pub allow_service_restart: bool,
}

fn yes() -> bool {
    true
}

fn minute() -> u64 {
    60
}

impl Default for UpdatePolicy {
    fn default() -> Self {
        Self {
            enable_dynamic_config: true,
            poll_interval_seconds: minute(),
            allow_service_restart: true,
        }
    }
}

/// What the Worker API's callers show.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConfiguredWorkerApi {
    /// The server's token; a worker refuses every call until it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub orchestrator_bearer_token: Option<Token>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub orchestrator_bearer_token_expires_at: Option<DateTime<Utc>>,
}

/// Bounds that the server sets.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Constraints {
    /// Bytes of a request to the Worker API.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_request_bytes: Option<u64>,
    /// Seconds that a job may take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_job_timeout_seconds: Option<u64>,
}

/// `node_config_ack_v1`: what became of a configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConfigAck {
    pub version: u32,
    pub node_slug: String,
    pub config_version: String,
    pub ack_at: DateTime<Utc>,
    pub status: AckStatus,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<AckError>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effective_config_hash: Option<String>,
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AckStatus {
    /// It is in force.
    Applied,
    /// It was refused, and nothing changed.
    Failed,
    /// It was in force, did not work, and the one before is in force again.
    RolledBack,
}

impl AckStatus {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Failed => "failed",
            Self::RolledBack => "rolled_back",
        }
    }
}

/// Why it is not in force.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AckError {
    #[serde(rename = "type")]
    pub kind: String,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<Value>,
}

/// Addition: a worker is alive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    pub version: u32,
    /// The configuration in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_version: Option<String>,
    /// Jobs that run and that wait.
    pub running: u32,
    pub queued: u32,
    /// Whether the worker takes jobs, as its `/readyz` says.
    pub ready: bool,
}

/// Addition: what the worker should know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeartbeatAnswer {
    pub version: u32,
    /// The newest configuration for it: one that is greater than its own should be fetched now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_version: Option<String>,
    /// An operator took it out of service: it gets no new jobs.
    pub drained: bool,
    /// Seconds until the next heartbeat.
    pub heartbeat_seconds: u64,
}
