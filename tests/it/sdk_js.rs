//! The unmodified JavaScript SDKs of LangGraph against a server: `tests/sdk/test_agent.mjs`, for each version in use.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::agent;
use crate::support::model_endpoint::ModelEndpoint;
use crate::support::server::Start;

/// The one that grows, and the one that npm calls the latest.
const VERSIONS: [&str; 2] = ["1.15.0", "2.0.0"];

/// Where the SDK of this version is installed: once, and kept beside what cargo builds.
fn sdk(version: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("langgraph-sdk-js-{version}"));
    std::fs::create_dir_all(&dir).unwrap();
    let lock = std::fs::File::create(dir.join("lock")).unwrap();
    lock.lock().unwrap();
    let done = dir.join("installed");
    if done.exists() {
        return dir;
    }
    let output = Command::new("npm")
        .args(["install", "--no-audit", "--no-fund", "--no-update-notifier", "--prefix"])
        .arg(&dir)
        .args([&format!("@langchain/langgraph-sdk@{version}"), "@langchain/core@1"])
        .stdin(Stdio::null())
        .output()
        .expect("this test needs npm: apt-get install nodejs npm");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "this test needs a package index of npm's\n{told}");
    std::fs::write(done, version).unwrap();
    dir
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_javascript_sdks_work_unmodified() {
    let installed = || VERSIONS.map(sdk);
    let installed = tokio::task::spawn_blocking(installed).await.unwrap();
    let endpoint = ModelEndpoint::start().await;
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let approval = std::fs::read_to_string(root.join("examples/approval.yaml")).unwrap();
    let site = agent::site(&endpoint, &[("approval", &approval)]);
    let server = site.start(&Start::default()).await;
    let token = std::fs::read_to_string(site.path("token")).unwrap();
    for dir in installed {
        endpoint.plays(agent::one_run());
        let mut command = Command::new("node");
        command
            .arg(root.join("tests/sdk/test_agent.mjs"))
            .arg(server.address())
            .arg(&dir)
            .env("CYNAI_TOKEN", token.trim())
            .env("TEXTS", agent::texts().to_string())
            .stdin(Stdio::null());
        let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        let (said, complained) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{}\n{said}{complained}", dir.display());
        assert!(said.contains("the agent's streams all went as they should"), "{said}");
    }
    assert!(server.stop().await.success());
}
