//! What this machine is, for the server: read from the kernel, never guessed; what cannot be read is left out.

use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use crate::worker::agent::Readiness;
use crate::worker::config::WorkerConfig;
use crate::worker::effective::Effective;
use crate::worker::node::{
    CapabilityReport, Compute, ContainerRuntime, Gpu, InferenceAbility, NetworkAbility, Platform,
    SandboxAbility, TlsReport, VERSION, WorkerApi,
};
use crate::worker::sandbox::Mechanism;
use crate::worker::startup::{InferenceMode, SandboxMode, Startup};

/// What a report says of the agent itself.
pub(super) struct Told<'a> {
    pub(super) startup: &'a Startup,
    pub(super) config: &'a WorkerConfig,
    pub(super) readiness: Readiness,
    pub(super) base_url: String,
    pub(super) certificate_pem: Option<String>,
}

pub(super) fn report(told: Told<'_>, now: DateTime<Utc>) -> CapabilityReport {
    let Told { startup, config, readiness, base_url, certificate_pem } = told;
    let tls = TlsReport {
        trust_material_status: Some("ok".to_owned()),
        worker_api_server_cert_pem: certificate_pem,
    };
    CapabilityReport {
        version: VERSION,
        reported_at: now,
        node: startup.identity(),
        platform: platform(),
        compute: compute(&config.state_dir),
        container_runtime: runtime(&readiness),
        gpu: Some(gpu(startup)),
        sandbox: Some(sandbox(config, readiness)),
        network: Some(NetworkAbility {
            orchestrator_reachable: Some(true),
            outbound_policy: Some("none".to_owned()),
        }),
        inference: Some(inference(startup)),
        worker_api: Some(WorkerApi { base_url: Some(base_url) }),
        tls: Some(tls),
    }
}

/// Whether two reports say the same but for their time and the free space, which changes all the time.
pub(super) fn same(one: &CapabilityReport, other: &CapabilityReport) -> bool {
    let mut one = one.clone();
    one.reported_at = other.reported_at;
    one.compute.storage_free_mb = other.compute.storage_free_mb;
    one == *other
}

fn line(path: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().next()?.trim();
    (!line.is_empty()).then(|| line.to_owned())
}

/// The value of `key` in a file of lines `key: value` or `KEY="value"`.
fn value(path: &str, key: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let rest = text.lines().find_map(|line| {
        line.strip_prefix(key).and_then(|rest| rest.trim_start().strip_prefix([':', '=']))
    })?;
    Some(rest.trim().trim_matches('"').to_owned())
}

fn platform() -> Platform {
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    Platform {
        os: std::env::consts::OS.to_owned(),
        arch: arch.to_owned(),
        distro: value("/etc/os-release", "PRETTY_NAME"),
        kernel_version: line("/proc/sys/kernel/osrelease"),
    }
}

fn compute(state_dir: &Path) -> Compute {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let memory = value("/proc/meminfo", "MemTotal");
    let memory = memory.and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
    let free = nix::sys::statvfs::statvfs(state_dir).ok();
    let free = free.map(|of| of.blocks_available().saturating_mul(of.fragment_size()) >> 20);
    Compute {
        cpu_cores: u32::try_from(cores).unwrap_or(u32::MAX),
        ram_mb: memory.unwrap_or(0) >> 10,
        cpu_model: value("/proc/cpuinfo", "model name"),
        storage_free_mb: free,
    }
}

fn runtime(readiness: &Readiness) -> Option<ContainerRuntime> {
    let driver = readiness.as_ref()?.as_ref().ok()?.driver.as_str();
    let (runtime, version) = driver.split_once(' ').unwrap_or((driver, ""));
    Some(ContainerRuntime {
        runtime: runtime.to_owned(),
        version: (!version.is_empty()).then(|| version.to_owned()),
        rootless_supported: Some(true),
        rootless_enabled: Some(!nix::unistd::geteuid().is_root()),
    })
}

/// Graphics processors on the PCI bus that models could run on.
fn gpu(startup: &Startup) -> Gpu {
    let hidden = startup.sandbox.mode == SandboxMode::SandboxOnly
        || startup.inference.allow_gpu == Some(false);
    let devices = if hidden { Vec::new() } else { graphics("/sys/bus/pci/devices") };
    Gpu { present: !devices.is_empty(), devices }
}

fn graphics(bus: &str) -> Vec<Value> {
    /// Display controllers: VGA and 3D.
    const CLASSES: [&str; 2] = ["0x0300", "0x0302"];
    let Ok(entries) = fs::read_dir(bus) else { return Vec::new() };
    let mut found: Vec<Value> = entries
        .flatten()
        .filter_map(|entry| {
            let read = |name: &str| line(entry.path().join(name).to_str()?);
            let class = read("class")?;
            CLASSES.iter().any(|wanted| class.starts_with(wanted)).then_some(())?;
            let vendor = match read("vendor")?.as_str() {
                "0x10de" => "NVIDIA",
                "0x1002" => "AMD",
                _ => return None,
            };
            Some(json!({ "vendor": vendor, "device_id": read("device")? }))
        })
        .collect();
    found.sort_by_key(Value::to_string);
    found
}

fn sandbox(config: &WorkerConfig, readiness: Readiness) -> SandboxAbility {
    let limits = &config.limits;
    #[expect(clippy::cast_precision_loss, reason = "bounded far below that")]
    let limits = [
        ("memory_mb", limits.memory_mb as f64),
        ("processes", limits.processes as f64),
        ("cpus", limits.cpus),
        ("disk_mb", limits.disk_mb as f64),
    ];
    let (features, reason) = match readiness {
        Some(Ok(found)) => {
            let mut features = vec!["netns".to_owned()];
            for (mechanism, name) in [
                (Mechanism::CgroupV2, "cgroups_v2"),
                (Mechanism::CgroupV1, "cgroups_v1"),
                (Mechanism::Prlimit, "prlimit"),
            ] {
                if [found.memory, found.processes, found.cpus].contains(&mechanism) {
                    features.push(name.to_owned());
                }
            }
            (features, None)
        }
        Some(Err(reason)) => (Vec::new(), Some(reason)),
        None => (Vec::new(), Some("the sandbox is being tried".to_owned())),
    };
    SandboxAbility {
        supported: reason.is_none(),
        features,
        max_concurrency: u32::try_from(config.slots()).ok(),
        reason,
        images: Some(Effective::waiting(config).allowed(config.image_names())),
        mounts: Some(config.mounts.keys().cloned().collect()),
        limits: limits.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
    }
}

fn inference(startup: &Startup) -> InferenceAbility {
    let refused = startup.inference.mode == InferenceMode::Disabled
        || startup.sandbox.mode == SandboxMode::SandboxOnly;
    InferenceAbility {
        supported: false,
        mode: Some(if refused { "disabled" } else { "allow" }.to_owned()),
        available_models: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::node::MAX_REPORT_BYTES;

    #[test]
    fn a_report_tells_what_this_machine_is() {
        let startup = Startup::new("http://127.0.0.1:1", "alpha");
        let config = startup.worker_config();
        let told = |readiness| Told {
            startup: &startup,
            config: &config,
            readiness,
            base_url: "http://127.0.0.1:2".to_owned(),
            certificate_pem: None,
        };
        let one = report(told(None), DateTime::UNIX_EPOCH);
        assert!(one.compute.cpu_cores >= 1 && one.compute.ram_mb > 100, "{:?}", one.compute);
        assert!(one.platform.kernel_version.is_some());
        assert!(!one.sandbox.as_ref().unwrap().supported);
        assert!(serde_json::to_vec(&one).unwrap().len() < MAX_REPORT_BYTES);
        let later = report(told(None), DateTime::UNIX_EPOCH + chrono::TimeDelta::days(1));
        assert!(same(&one, &later));
        let broken = report(told(Some(Err("no bubblewrap".to_owned()))), DateTime::UNIX_EPOCH);
        assert!(!same(&one, &broken));
    }

    #[test]
    fn graphics_processors_are_found_by_class_and_vendor() {
        let dir = tempfile::tempdir().unwrap();
        let device = |name: &str, class: &str, vendor: &str| {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            for (file, text) in [("class", class), ("vendor", vendor), ("device", "0x2684")] {
                fs::write(path.join(file), format!("{text}\n")).unwrap();
            }
        };
        device("a", "0x030000", "0x10de");
        device("b", "0x030000", "0x1234");
        device("c", "0x040300", "0x10de");
        let found = graphics(dir.path().to_str().unwrap());
        assert_eq!(found, [json!({"vendor": "NVIDIA", "device_id": "0x2684"})]);
    }
}
