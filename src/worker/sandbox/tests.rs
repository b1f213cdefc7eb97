//! The driver against real sandboxes. A machine without bubblewrap fails these tests, it skips none.

use std::collections::BTreeMap;
use std::time::Duration;

use uuid::Uuid;

use super::bubblewrap::Bubblewrap;
use super::{Exit, Mechanism, SandboxDriver, SandboxLimits, SandboxSpec};
use crate::ids::JobId;
use crate::worker::config::{Token, WorkerConfig};

const INSTALL: &str = "these tests need bubblewrap: apt-get install bubblewrap";

fn spec(command: &[&str]) -> SandboxSpec {
    SandboxSpec {
        task_id: Uuid::nil(),
        job_id: JobId::new(),
        image: "sandbox/base".into(),
        command: command.iter().map(ToString::to_string).collect(),
        env: BTreeMap::new(),
        stdin: None,
        mounts: Vec::new(),
        limits: SandboxLimits {
            memory_bytes: 128 << 20,
            processes: 32,
            cpus: 1.0,
            disk_bytes: 16 << 20,
            tmp_bytes: 4 << 20,
            output_bytes: 64 << 10,
            wall_seconds: 30,
        },
    }
}

struct Bench {
    driver: Bubblewrap,
    _state: tempfile::TempDir,
}

async fn bench() -> Bench {
    let state = tempfile::tempdir().unwrap();
    let driver = Bubblewrap::new(&WorkerConfig::new(Token::random(), state.path())).unwrap();
    driver.probe().await.expect(INSTALL);
    Bench { driver, _state: state }
}

async fn run(bench: &Bench, spec: SandboxSpec) -> Exit {
    let mut handle = bench.driver.start(spec).await.unwrap();
    tokio::time::timeout(Duration::from_secs(60), handle.wait()).await.expect("it ends").unwrap()
}

async fn check(script: &str, code: i32, stdout: &str) {
    let bench = bench().await;
    let exit = run(&bench, spec(&["sh", "-c", script])).await;
    assert_eq!((exit.code, exit.stdout.text.as_str()), (Some(code), stdout), "{}", exit.stderr.text);
}

#[tokio::test]
async fn the_probe_finds_an_enforcing_mechanism_for_every_limit() {
    let state = tempfile::tempdir().unwrap();
    let driver = Bubblewrap::new(&WorkerConfig::new(Token::random(), state.path())).unwrap();
    let found = driver.probe().await.expect(INSTALL);
    for mechanism in [found.memory, found.processes, found.cpus, found.disk, found.wall_time] {
        assert_ne!(mechanism, Mechanism::None, "{found:?}");
    }
    assert_ne!(found.host_uid, 0);
}

#[tokio::test]
async fn a_command_sees_only_its_own_environment_and_descriptors() {
    check("env | sort; ls -l /proc/self/fd; tr '\\0' '\\n' </proc/1/environ", 0, "").await;
}
