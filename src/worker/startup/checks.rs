//! What reading the startup file cannot tell: ranges, things that exclude each other, and what is not there.

use std::path::Path;

use url::Url;

use super::sections::{ApiTlsMode, InferenceMode, Sandbox};
use super::{Startup, address};
use crate::tls::trust::Pin;
use crate::worker::config::ConfigError;
use crate::worker::node::{MAX_LABELS, MAX_NAME, MAX_SLUG, VERSION};

/// Names of one list.
const MAX_ENTRIES: usize = 1000;

/// A field's path, and what is wrong with it.
type Wrong = (String, String);

fn wrong(field: &str, problem: impl Into<String>) -> Wrong {
    (field.to_owned(), problem.into())
}

fn within(field: &str, value: Option<u64>, min: u64, max: u64) -> Result<(), Wrong> {
    match value {
        Some(value) if !(min..=max).contains(&value) => {
            Err(wrong(field, format!("must be from {min} to {max}")))
        }
        _ => Ok(()),
    }
}

fn absolute(field: &str, path: Option<&Path>) -> Result<(), Wrong> {
    match path {
        Some(path) if !path.is_absolute() => Err(wrong(field, "must be an absolute path")),
        _ => Ok(()),
    }
}

/// Whether a text can be a worker's slug.
fn is_slug(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    text.len() <= MAX_SLUG
        && text.bytes().next().is_some_and(plain)
        && text.bytes().all(|byte| plain(byte) || b"._-".contains(&byte))
}

impl Startup {
    /// Finds the first field that cannot be used.
    ///
    /// # Errors
    /// Its path, and what is wrong.
    pub fn check(&self) -> Result<(), (String, String)> {
        if self.version != VERSION {
            return Err(wrong("version", format!("must be {VERSION}")));
        }
        self.check_server()?;
        self.check_node()?;
        self.check_api()?;
        self.check_sandbox()?;
        if self.inference.mode == InferenceMode::Require {
            let problem = "asks for models on this machine, but a worker runs no models yet: use `allow` or `disabled`";
            return Err(wrong("inference.mode", problem));
        }
        within("updates.poll_interval_seconds", self.updates.poll_interval_seconds, 1, 3600)?;
        for (field, path) in [
            ("storage.state_dir", &self.storage.state_dir),
            ("storage.cache_dir", &self.storage.cache_dir),
            ("storage.artifacts_dir", &self.storage.artifacts_dir),
            ("logging.file_path", &self.logging.file_path),
            ("orchestrator.registration_psk_file", &self.orchestrator.registration_psk_file),
            ("orchestrator.tls.ca_bundle_path", &self.orchestrator.tls.ca_bundle_path),
        ] {
            absolute(field, path.as_deref())?;
        }
        self.check_agent()
    }

    fn check_server(&self) -> Result<(), Wrong> {
        let server = &self.orchestrator;
        let url =
            self.allowed_url(&server.url).map_err(|problem| wrong("orchestrator.url", problem))?;
        if url.query().is_some() || url.fragment().is_some() {
            return Err(wrong("orchestrator.url", "must have no query and no fragment"));
        }
        match (&server.registration_psk_env, &server.registration_psk_file) {
            (Some(_), Some(_)) => {
                let problem = "and `registration_psk_file` exclude each other: name one";
                return Err(wrong("orchestrator.registration_psk_env", problem));
            }
            (None, None) => {
                let problem = "needs `registration_psk_env` (the name of a variable) or `registration_psk_file` (a path): \
                     the server knows a worker by the key that is there";
                return Err(wrong("orchestrator", problem));
            }
            (Some(name), None) => {
                let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
                let first = name.bytes().next().is_some_and(|byte| !byte.is_ascii_digit());
                if !first || !name.bytes().all(plain) || name.len() > MAX_NAME {
                    let problem = "must be the name of a variable, not the key itself";
                    return Err(wrong("orchestrator.registration_psk_env", problem));
                }
            }
            (None, Some(_)) => {}
        }
        if let Some(pin) = &server.tls.pinned_sha256 {
            pin.parse::<Pin>().map_err(|err| {
                wrong("orchestrator.tls.pinned_sha256", format!("cannot be used: {err}"))
            })?;
        }
        within("orchestrator.timeouts.connect_seconds", server.timeouts.connect_seconds, 1, 300)?;
        within("orchestrator.timeouts.request_seconds", server.timeouts.request_seconds, 1, 600)
    }

    fn check_node(&self) -> Result<(), Wrong> {
        let node = &self.node;
        if !is_slug(&node.id) {
            let problem = format!(
                "must be 1 to {MAX_SLUG} of lower case letters, digits, `.`, `_` and `-`, and begin with a letter or a digit"
            );
            return Err(wrong("node.id", problem));
        }
        let good = |text: &str| {
            (1..=MAX_NAME).contains(&text.chars().count()) && !text.chars().any(char::is_control)
        };
        if node.name.as_deref().is_some_and(|name| !good(name)) {
            return Err(wrong("node.name", format!("must be 1 to {MAX_NAME} visible characters")));
        }
        if node.labels.len() > MAX_LABELS || !node.labels.iter().all(|label| good(label)) {
            let problem =
                format!("must be at most {MAX_LABELS} labels of 1 to {MAX_NAME} characters");
            return Err(wrong("node.labels", problem));
        }
        Ok(())
    }

    fn check_api(&self) -> Result<(), Wrong> {
        let api = &self.worker_api;
        if api.listen_host.as_deref().is_some_and(|host| address(host).is_none()) {
            let problem = "must be an address of this machine, such as 0.0.0.0, 127.0.0.1 or ::; names go into `public_base_url`";
            return Err(wrong("worker_api.listen_host", problem));
        }
        if let Some(text) = &api.public_base_url {
            let url = Url::parse(text)
                .ok()
                .filter(|url| matches!(url.scheme(), "http" | "https") && url.host_str().is_some());
            let url = url.ok_or_else(|| {
                wrong(
                    "worker_api.public_base_url",
                    "must begin with http:// or https:// and name a host",
                )
            })?;
            let plain = self.api_tls() == ApiTlsMode::Off;
            if !plain && url.scheme() == "http" {
                let problem = "must begin with https://: the Worker API speaks TLS (`worker_api.tls.mode: off` ends that)";
                return Err(wrong("worker_api.public_base_url", problem));
            }
        }
        let tls = &api.tls;
        let files = tls.cert_file.is_some() && tls.key_file.is_some();
        if self.api_tls() == ApiTlsMode::Files && !files {
            return Err(wrong(
                "worker_api.tls",
                "needs `cert_file` and `key_file` with `mode: files`",
            ));
        }
        if self.api_tls() != ApiTlsMode::Files
            && (tls.cert_file.is_some() || tls.key_file.is_some())
        {
            return Err(wrong(
                "worker_api.tls",
                "needs `mode: files` for `cert_file` and `key_file` to be used",
            ));
        }
        absolute("worker_api.tls.cert_file", tls.cert_file.as_deref())?;
        absolute("worker_api.tls.key_file", tls.key_file.as_deref())
    }

    fn check_sandbox(&self) -> Result<(), Wrong> {
        let sandbox = &self.sandbox;
        if let Some(runtime) = &sandbox.runtime
            && runtime != "bubblewrap"
        {
            let known = ["podman", "docker"].into_iter().find(|known| known == runtime);
            let asked = known.unwrap_or("something else");
            let problem =
                format!("asks for {asked}, but jobs run in bubblewrap: leave the key out");
            return Err(wrong("sandbox.runtime", problem));
        }
        if sandbox.default_network_policy.is_some() && sandbox.network_policy().is_none() {
            let problem = "must be `none` or `restricted`; both mean that jobs reach no network";
            return Err(wrong("sandbox.default_network_policy", problem));
        }
        if !sandbox.allowed_egress_domains.is_empty() {
            let problem = "must be empty or left out: jobs reach no network";
            return Err(wrong("sandbox.allowed_egress_domains", problem));
        }
        if sandbox.mount_root.is_some() {
            return Err(wrong("sandbox.mount_root", "must be left out: workspaces live in memory"));
        }
        if sandbox.allowed_images.as_ref().is_some_and(|names| names.len() > MAX_ENTRIES) {
            return Err(wrong("sandbox.allowed_images", format!("has over {MAX_ENTRIES} entries")));
        }
        let security = &sandbox.security;
        for (field, asked) in [
            ("sandbox.security.allow_privileged", security.allow_privileged),
            ("sandbox.security.allow_host_network", security.allow_host_network),
            ("sandbox.security.allow_device_mounts", security.allow_device_mounts),
        ] {
            if asked {
                return Err(wrong(field, "must be false: that is never given to a job"));
            }
        }
        check_mounts(sandbox)
    }

    /// The agent's own rules, under the names that they have in this file.
    fn check_agent(&self) -> Result<(), Wrong> {
        let config = self.worker_config();
        let cpus = self.sandbox.resources.max_cpu_cores;
        if cpus.is_some_and(|cpus| !(0.05..=1024.0).contains(&cpus)) {
            return Err(wrong("sandbox.resources.max_cpu_cores", "must be from 0.05 to 1024"));
        }
        config.validate().map_err(|err| match &err {
            ConfigError::OutOfRange { field, min, max, .. } => {
                wrong(name_here(field), format!("must be from {min} to {max}"))
            }
            ConfigError::UnknownImage { .. } => {
                wrong("sandbox.default_image", format!("cannot be used: {err}"))
            }
            ConfigError::BadName { kind: "image", .. }
            | ConfigError::NotADirectory { kind: "image", .. } => {
                wrong("sandbox.images", format!("cannot be used: {err}"))
            }
            _ => wrong("sandbox.mounts.directories", format!("cannot be used: {err}")),
        })?;
        let allowed = self.sandbox.allowed_images.as_ref();
        let default = self.sandbox.default_image.as_deref();
        if let (Some(allowed), Some(default)) = (allowed, default)
            && !allowed.iter().any(|name| name == default)
        {
            return Err(wrong("sandbox.default_image", "must be one of `sandbox.allowed_images`"));
        }
        for (field, count) in [
            ("sandbox.images", self.sandbox.images.len()),
            ("sandbox.mounts.directories", self.sandbox.mounts.directories.len()),
        ] {
            if count > MAX_ENTRIES {
                return Err(wrong(field, format!("has over {MAX_ENTRIES} entries")));
            }
        }
        Ok(())
    }
}

fn check_mounts(sandbox: &Sandbox) -> Result<(), Wrong> {
    let mounts = &sandbox.mounts;
    if mounts.read_only_by_default == Some(false) {
        let problem = "must be true: jobs see mounts read-only";
        return Err(wrong("sandbox.mounts.read_only_by_default", problem));
    }
    let Some(allowed) = &mounts.allowed_host_paths else { return Ok(()) };
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let allowed: Vec<_> = allowed.iter().map(|path| real(path)).collect();
    for (name, path) in &mounts.directories {
        if !allowed.iter().any(|allowed| real(path).starts_with(allowed)) {
            let problem = format!("has `{name}`, which is below none of `allowed_host_paths`");
            return Err(wrong("sandbox.mounts.directories", problem));
        }
    }
    Ok(())
}

/// What the startup file calls a field of the agent's configuration.
fn name_here(field: &str) -> &str {
    match field {
        "slots" => "sandbox.max_concurrency",
        "limits.memory_mb" => "sandbox.resources.max_memory_mb",
        "limits.processes" => "sandbox.resources.max_pids",
        "limits.disk_mb" => "sandbox.resources.max_disk_mb",
        "limits.tmp_mb" => "sandbox.resources.max_tmp_mb",
        "timeouts.default_seconds" => "sandbox.timeouts.default_seconds",
        "timeouts.max_seconds" => "sandbox.timeouts.max_seconds",
        "timeouts.stop_grace_seconds" => "sandbox.timeouts.stop_grace_seconds",
        "max_request_bytes" => "worker_api.max_request_bytes",
        "drain_seconds" => "worker_api.drain_seconds",
        other => other,
    }
}
