//! The startup file of a worker in service of a server: who it is, where its server is, and what its operator allows.
//!
//! The keys are the specification's, and some additions. The server may configure a worker to be stricter than this
//! file, never to be more permissive. A key that asks for what this program does not have is refused.
//!
//! **Invariant:** the file names the registration key and never holds it.

mod checks;
mod sections;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use secrecy::ExposeSecret;
use serde::Deserialize;
use url::Url;

use super::config::{Token, WorkerConfig};
use super::node::NodeIdentity;
use crate::config::file::{FileError, parse_text, read_text, wrong_field};
use crate::config::values::{environment_secret, section};
use crate::tls::TlsError;
use crate::tls::trust::{Pin, Trust};

pub use sections::{
    ApiTls, ApiTlsMode, Directories, Format, Identity, Inference, InferenceMode, Level, Logging,
    Mounts, Resources, Sandbox, SandboxMode, SandboxTimeouts, Security, Server, ServerTimeouts,
    ServerTls, Storage, Updates, WorkerApi,
};

/// Where a worker keeps its state unless it is told otherwise.
pub const USUAL_STATE_DIR: &str = "/var/lib/cynai/worker";
/// The port of the Worker API unless it is told otherwise.
pub const USUAL_PORT: u16 = 8081;
/// Bytes of a registration key.
const MAX_KEY_BYTES: u64 = 4096;

/// The whole file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Startup {
    /// 1.
    pub version: u32,
    /// The server, which the specification calls the orchestrator.
    pub orchestrator: Server,
    /// The worker, which it calls a node.
    pub node: Identity,
    /// Where the Worker API is.
    #[serde(default, deserialize_with = "section")]
    pub worker_api: WorkerApi,
    /// What jobs may be.
    #[serde(default, deserialize_with = "section")]
    pub sandbox: Sandbox,
    /// Models on this machine: nothing runs them yet.
    #[serde(default, deserialize_with = "section")]
    pub inference: Inference,
    /// Where things lie.
    #[serde(default, deserialize_with = "section")]
    pub storage: Storage,
    /// How it logs.
    #[serde(default, deserialize_with = "section")]
    pub logging: Logging,
    /// How it learns of later configurations.
    #[serde(default, deserialize_with = "section")]
    pub updates: Updates,
}

/// The registration key cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The variable is not there.
    #[error(
        "the environment variable {0} (`orchestrator.registration_psk_env`) is not set or empty"
    )]
    NotSet(String),
    /// The file cannot be used.
    #[error("the key file {path} {problem}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// It would break the request that carries it.
    #[error("the registration key is not one line of visible characters")]
    Unusable,
}

impl Startup {
    /// What a worker needs at least: where its server is, and its own name.
    #[must_use]
    pub fn new(url: &str, id: &str) -> Self {
        Self {
            version: 1,
            orchestrator: Server { url: url.to_owned(), ..Server::default() },
            node: Identity { id: id.to_owned(), ..Identity::default() },
            worker_api: WorkerApi::default(),
            sandbox: Sandbox::default(),
            inference: Inference::default(),
            storage: Storage::default(),
            logging: Logging::default(),
            updates: Updates::default(),
        }
    }

    /// Whether a text is such a file, and not a standalone agent's configuration.
    #[must_use]
    pub fn is_one(text: &str) -> bool {
        match serde_saphyr::from_str::<serde_json::Value>(text) {
            Ok(value) => value.get("orchestrator").is_some(),
            // What is wrong with it is told by whoever reads it strictly.
            Err(_) => text.lines().any(|line| line.starts_with("orchestrator:")),
        }
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// It cannot be read, or something in it is wrong.
    pub fn read(path: &Path) -> Result<Self, FileError> {
        Self::parse(path, &read_text(path)?)
    }

    /// Reads and checks a text; `path` is what messages call it.
    ///
    /// # Errors
    /// Something in it is wrong.
    pub fn parse(path: &Path, text: &str) -> Result<Self, FileError> {
        let read: Option<Self> = parse_text(path, text)?;
        let missing = || wrong_field(path, text, "version", "is missing: the file is empty");
        let startup = read.ok_or_else(missing)?;
        startup.check().map_err(|(field, problem)| wrong_field(path, text, &field, &problem))?;
        Ok(startup)
    }

    /// What the agent itself is started with. Its token opens nothing: the server brings one.
    #[must_use]
    pub fn worker_config(&self) -> WorkerConfig {
        let sandbox = &self.sandbox;
        let mut config = WorkerConfig::new(Token::random(), self.state_dir());
        config.listen = self.listen();
        config.images.clone_from(&sandbox.images);
        config.mounts.clone_from(&sandbox.mounts.directories);
        config.allowed_images.clone_from(&sandbox.allowed_images);
        config.default_image.clone_from(&sandbox.default_image);
        if let Some(policy) = sandbox.network_policy() {
            config.default_network_policy = policy;
        }
        config.no_jobs = sandbox.mode == SandboxMode::Disabled;
        config.slots = sandbox.max_concurrency;
        let (resources, limits) = (&sandbox.resources, &mut config.limits);
        limits.cpus = resources.max_cpu_cores.unwrap_or(limits.cpus);
        limits.memory_mb = resources.max_memory_mb.unwrap_or(limits.memory_mb);
        limits.processes = resources.max_pids.unwrap_or(limits.processes);
        limits.disk_mb = resources.max_disk_mb.unwrap_or(limits.disk_mb);
        limits.tmp_mb = resources.max_tmp_mb.unwrap_or(limits.tmp_mb);
        let (given, timeouts) = (&sandbox.timeouts, &mut config.timeouts);
        timeouts.max_seconds = given.max_seconds.unwrap_or(timeouts.max_seconds);
        // A maximum below the usual default is the default as well.
        let usual = timeouts.default_seconds.min(timeouts.max_seconds);
        timeouts.default_seconds = given.default_seconds.unwrap_or(usual);
        timeouts.stop_grace_seconds =
            given.stop_grace_seconds.unwrap_or(timeouts.stop_grace_seconds);
        if let Some(bytes) = self.worker_api.max_request_bytes {
            config.max_request_bytes = bytes;
        }
        config.drain_seconds = self.worker_api.drain_seconds.unwrap_or(config.drain_seconds);
        config
    }

    /// Where records, tokens and keys are kept.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.storage.state_dir.clone().unwrap_or_else(|| PathBuf::from(USUAL_STATE_DIR))
    }

    /// Where the Worker API listens.
    #[must_use]
    pub fn listen(&self) -> SocketAddr {
        let host = self.worker_api.listen_host.as_deref().and_then(address);
        let host = host.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        SocketAddr::new(host, self.worker_api.listen_port.unwrap_or(USUAL_PORT))
    }

    /// How the Worker API is protected on its way.
    #[must_use]
    pub fn api_tls(&self) -> ApiTlsMode {
        let usual =
            if self.listen().ip().is_loopback() { ApiTlsMode::Off } else { ApiTlsMode::SelfSigned };
        self.worker_api.tls.mode.unwrap_or(usual)
    }

    /// Where the server reaches the Worker API that listens on `listening`.
    #[must_use]
    pub fn public_base_url(&self, listening: SocketAddr) -> String {
        if let Some(url) = &self.worker_api.public_base_url {
            return url.trim_end_matches('/').to_owned();
        }
        let scheme = if self.api_tls() == ApiTlsMode::Off { "http" } else { "https" };
        if listening.ip().is_unspecified() {
            let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
            let host = host.unwrap_or_else(|| "localhost".to_owned());
            return format!("{scheme}://{host}:{}", listening.port());
        }
        format!("{scheme}://{listening}")
    }

    /// The names and addresses under which the Worker API is reached: what its certificate is for.
    #[must_use]
    pub fn certificate_names(&self, listening: SocketAddr) -> Vec<String> {
        let url = Url::parse(&self.public_base_url(listening)).ok();
        let public = url.as_ref().and_then(Url::host_str);
        let mut names: Vec<String> =
            public.map(|host| host.trim_matches(['[', ']']).to_owned()).into_iter().collect();
        names.extend(["localhost".to_owned(), "127.0.0.1".to_owned()]);
        if !listening.ip().is_unspecified() {
            names.push(listening.ip().to_string());
        }
        names.sort();
        names.dedup();
        names
    }

    /// What the server is recognised by.
    ///
    /// # Errors
    /// The bundle cannot be used.
    pub fn trust(&self) -> Result<Trust, TlsError> {
        let tls = &self.orchestrator.tls;
        let mut trust = Trust::default();
        if let Some(path) = &tls.ca_bundle_path {
            trust.add_bundle(path)?;
        }
        if let Some(pin) = &tls.pinned_sha256 {
            trust.pins.insert(pin.parse::<Pin>()?);
        }
        Ok(trust)
    }

    /// The registration key, read anew: it may have been changed since.
    ///
    /// # Errors
    /// It is not where the file says.
    pub fn registration_key(&self) -> Result<Token, KeyError> {
        let server = &self.orchestrator;
        let key = match (&server.registration_psk_env, &server.registration_psk_file) {
            (Some(name), _) => {
                let found =
                    environment_secret(name).ok_or_else(|| KeyError::NotSet(name.clone()))?;
                found.expose_secret().trim().to_owned()
            }
            (None, Some(path)) => key_file(path)?,
            (None, None) => return Err(KeyError::NotSet("CYNAI_WORKER_KEY".to_owned())),
        };
        let visible = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic());
        if visible { Ok(Token::new(key)) } else { Err(KeyError::Unusable) }
    }

    /// Whether the server may be reached under this URL: the keys travel there.
    ///
    /// # Errors
    /// What is wrong with it, after its name.
    pub fn allowed_url(&self, text: &str) -> Result<Url, String> {
        let url = Url::parse(text)
            .map_err(|_| "must be an absolute URL, such as https://cynai.example.org".to_owned())?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err("must not hold a user or a password".to_owned());
        }
        match url.scheme() {
            "https" => Ok(url),
            "http" if self.orchestrator.tls.allow_plain_http || is_loopback(&url) => Ok(url),
            "http" => Err(
                "must be https: keys travel there. Plain http is for loopback addresses, or with \
                 `orchestrator.tls.allow_plain_http: true` for a network that nobody else is on"
                    .to_owned(),
            ),
            _ => Err("must begin with https://".to_owned()),
        }
    }

    /// How long a connection to the server may take, and how long an answer.
    #[must_use]
    pub fn server_timeouts(&self) -> (Duration, Duration) {
        let given = &self.orchestrator.timeouts;
        (
            Duration::from_secs(given.connect_seconds.unwrap_or(5)),
            Duration::from_secs(given.request_seconds.unwrap_or(30)),
        )
    }

    /// Who the worker is, as its reports say it.
    #[must_use]
    pub fn identity(&self) -> NodeIdentity {
        let node = &self.node;
        NodeIdentity {
            node_slug: node.id.clone(),
            name: node.name.clone(),
            labels: node.labels.clone(),
        }
    }
}

fn key_file(path: &Path) -> Result<String, KeyError> {
    use std::io::Read;

    let failed = |problem: String| KeyError::File { path: path.to_owned(), problem };
    let file = std::fs::File::open(path).map_err(|err| failed(format!("cannot be read: {err}")))?;
    let mut text = String::new();
    let read = file.take(MAX_KEY_BYTES + 1).read_to_string(&mut text);
    read.map_err(|err| failed(format!("cannot be read: {err}")))?;
    if text.len() as u64 > MAX_KEY_BYTES {
        return Err(failed(format!(
            "is over {MAX_KEY_BYTES} bytes: it should hold one line, the key"
        )));
    }
    Ok(text.trim().to_owned())
}

fn address(text: &str) -> Option<IpAddr> {
    if text == "localhost" { Some(IpAddr::V4(Ipv4Addr::LOCALHOST)) } else { text.parse().ok() }
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::wire::NetworkPolicy;

    const LEAST: &str = "version: 1\norchestrator:\n  url: https://cynai.example\n  registration_psk_env: KEY\nnode:\n  id: alpha\n";

    fn parse(text: &str) -> Result<Startup, String> {
        Startup::parse(Path::new("node.yaml"), text).map_err(|err| err.to_string())
    }

    fn check(more: &str, expected: &str) {
        let message = parse(&format!("{LEAST}{more}")).unwrap_err();
        assert!(message.starts_with("node.yaml:"), "{message}");
        assert!(message.contains(expected), "{expected:?} is not in {message}");
    }

    #[test]
    fn the_least_file_has_the_documented_defaults() {
        let startup = parse(LEAST).unwrap();
        assert!(Startup::is_one(LEAST));
        assert!(
            Startup::is_one("{\"orchestrator\": {}}") && Startup::is_one("x: [\norchestrator:\n")
        );
        assert!(!Startup::is_one("token: x\nlabels: [orchestrator]\n"));
        let config = startup.worker_config();
        assert_eq!(config.listen.to_string(), "0.0.0.0:8081");
        assert_eq!(config.state_dir, Path::new(USUAL_STATE_DIR));
        assert_eq!((config.timeouts.default_seconds, config.timeouts.max_seconds), (900, 3600));
        assert_eq!(startup.api_tls(), ApiTlsMode::SelfSigned);
        let host = nix::unistd::gethostname().unwrap().into_string().unwrap();
        assert_eq!(startup.public_base_url(config.listen), format!("https://{host}:8081"));
    }

    #[test]
    fn every_key_reaches_the_agent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().display();
        let text = format!(
            "{LEAST}  name: Alpha\n  labels: [trusted, gpu_none]\n  metadata: {{rack: 7}}\n\
             worker_api: {{listen_host: 127.0.0.1, listen_port: 9000, public_base_url: 'https://w.example:1/', max_request_bytes: 2048}}\n\
             sandbox:\n  mode: sandbox_only\n  runtime: bubblewrap\n  rootless: true\n  max_concurrency: 3\n  \
             images: {{tools: {path}}}\n  default_image: tools\n  allowed_images: [tools]\n  default_network_policy: none\n  \
             allowed_egress_domains: []\n  resources: {{max_cpu_cores: 0.5, max_memory_mb: 64, max_pids: 32}}\n  \
             timeouts: {{default_seconds: 5, max_seconds: 10}}\n  \
             mounts: {{directories: {{data: {path}}}, allowed_host_paths: ['{path}'], read_only_by_default: true}}\n  \
             security: {{allow_privileged: false, allow_host_network: false, allow_device_mounts: false}}\n\
             inference: {{mode: disabled, max_concurrency: 1, allow_gpu: false}}\n\
             storage: {{state_dir: /var/lib/x, cache_dir: /c, artifacts_dir: /a}}\n\
             logging: {{level: debug, format: json, file_path: /var/log/x}}\n\
             updates: {{enable_dynamic_config: false, poll_interval_seconds: 7, allow_service_restart: false}}\n"
        );
        let startup = parse(&text).unwrap();
        let config = startup.worker_config();
        assert_eq!(config.listen.to_string(), "127.0.0.1:9000");
        assert_eq!(startup.public_base_url(config.listen), "https://w.example:1");
        assert_eq!(config.allowed_images.as_deref(), Some(&["tools".to_owned()][..]));
        assert_eq!(config.default_network_policy, NetworkPolicy::None);
        assert_eq!((config.slots, config.max_request_bytes), (Some(3), 2048));
        let limits = config.limits;
        assert_eq!((limits.cpus, limits.memory_mb, limits.processes), (0.5, 64, 32));
        assert_eq!((config.timeouts.default_seconds, config.timeouts.max_seconds), (5, 10));
        assert_eq!(startup.api_tls(), ApiTlsMode::Off);
        assert_eq!(startup.identity().labels, ["trusted", "gpu_none"]);
    }

    #[test]
    fn mistakes_are_told_with_their_place_and_what_would_be_right() {
        check("sandbx: {}\n", "did you mean `sandbox`?");
        check(
            "sandbox:\n  runtime: podman\n",
            "`sandbox.runtime` asks for podman, but jobs run in bubblewrap",
        );
        check("sandbox:\n  default_network_policy: allowlist\n", "`none` or `restricted`");
        check("sandbox:\n  allowed_egress_domains: [a.example]\n", "jobs reach no network");
        check("sandbox:\n  mount_root: /x\n", "live in memory");
        check("sandbox:\n  security:\n    allow_privileged: true\n", "never given to a job");
        check("sandbox:\n  max_concurrency: 0\n", "from 1 to 4096");
        check("sandbox:\n  max_concurrency: many\n", "node.yaml:8:");
        check("sandbox:\n  default_image: nope\n", "there is no such image");
        check(
            "sandbox:\n  mounts:\n    directories: {x: /usr}\n    allowed_host_paths: [/srv]\n",
            "is below none of",
        );
        check("inference:\n  mode: require\n", "runs no models");
        check("worker_api:\n  listen_host: worker.example\n", "must be an address");
        check("worker_api:\n  public_base_url: ftp://x\n", "http:// or https://");
        check("worker_api:\n  tls: {mode: files}\n", "cert_file");
        check("updates:\n  poll_interval_seconds: 0\n", "from 1 to 3600");
        check("storage:\n  state_dir: relative\n", "absolute path");
        let of = |text: &str| parse(text).unwrap_err();
        let key = "registration_psk_env: KEY";
        assert!(of(&LEAST.replace(key, "tls: {}")).contains("registration_psk_file"));
        let both = LEAST.replace(key, &format!("{key}\n  registration_psk_file: /k"));
        assert!(of(&both).contains("exclude each other"));
        assert!(of(&LEAST.replace("https://", "http://")).contains("allow_plain_http"));
        assert!(parse(&LEAST.replace("https://cynai.example", "http://127.0.0.1:2024")).is_ok());
        assert!(of(&LEAST.replace("version: 1", "version: 2")).contains("must be 1"));
        assert!(of(&LEAST.replace("alpha", "Alpha!")).contains("lower case"));
        assert!(of("").contains("version"));
    }

    #[test]
    fn a_key_that_is_written_into_the_file_is_refused_and_not_repeated() {
        for name in ["registration_psk", "psk"] {
            let text = LEAST.replace(
                "registration_psk_env: KEY",
                &format!("{name}: very-secret-key-0123456789"),
            );
            let message = parse(&text).unwrap_err();
            assert!(message.contains("registration_psk_env"), "{message}");
            assert!(!message.contains("very-secret"), "{message}");
        }
        let text = LEAST.replace("KEY", "very-secret-key-0123456789");
        let message = parse(&text).unwrap_err();
        assert!(
            message.contains("the name of a variable") && !message.contains("very-secret"),
            "{message}"
        );
    }

    #[test]
    fn the_key_is_read_from_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let mut startup = parse(LEAST).unwrap();
        startup.orchestrator.registration_psk_env = None;
        startup.orchestrator.registration_psk_file = Some(path.clone());
        assert!(startup.registration_key().unwrap_err().to_string().contains("cannot be read"));
        std::fs::write(&path, "the-key\n").unwrap();
        assert_eq!(startup.registration_key().unwrap().expose(), "the-key");
        std::fs::write(&path, "two\nlines\n").unwrap();
        assert!(startup.registration_key().is_err());
    }
}
