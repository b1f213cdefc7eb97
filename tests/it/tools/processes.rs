//! The processes of tool servers: idle ones end, stubborn ones are killed, and none is left behind.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cynai::tools::Tools;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::{OneSecret, Site, call, events, stdio_config, tools_config, until};

/// Names the directory of the test that started this process as the parent to be killed.
const PARENT: &str = "CYNAI_TEST_TOOLS_PARENT";

/// The processes that a server named.
fn named(dir: &Path) -> Vec<u32> {
    let events = events(dir);
    events.iter().filter_map(|event| event.strip_prefix("pid ")?.parse().ok()).collect()
}

fn alive(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim().chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}

/// Processes of a test that would leave some behind if it failed: none of them outlives it.
struct Leftovers(Vec<u32>);

impl Drop for Leftovers {
    fn drop(&mut self) {
        for pid in &self.0 {
            let command =
                std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let ours = command.contains("hostile_mcp.py") || command.contains("import signal,time");
            if ours && let Ok(pid) = i32::try_from(*pid) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}

/// Waits until every process that the server named is gone.
pub async fn all_gone(dir: &Path) {
    until(&format!("all processes of {} are gone", dir.display()), || {
        named(dir).into_iter().all(|pid| !alive(pid))
    })
    .await;
}

#[tokio::test]
async fn a_server_that_nobody_uses_is_ended_and_started_again_at_the_next_use() {
    let site = Site::stdio_with(&[], json!({"idle": "300ms"}));
    assert_eq!(site.text("echo").await, "{}");
    all_gone(site.dir.path()).await;
    until("stopped", || site.tools.status("s").unwrap().state == "stopped").await;
    assert!(site.events().contains(&"input closed".to_owned()));
    assert_eq!(site.text("echo").await, "{}");
    assert_eq!(named(site.dir.path()).len(), 2);
}

#[tokio::test]
async fn a_server_is_not_idle_while_a_call_is_under_way() {
    let site = Site::stdio_with(&[], json!({"idle": "200ms"}));
    let result = site.call("slow", json!({"seconds": 2})).await.unwrap();
    assert_eq!(result.text(), "at last");
}

#[tokio::test]
async fn closing_ends_even_a_stubborn_server_and_its_children() {
    let site = Site::stdio(&["stubborn"]);
    assert_eq!(site.text("echo").await, "{}");
    let pids = named(site.dir.path());
    assert_eq!(pids.len(), 2);
    assert!(pids.iter().all(|pid| alive(*pid)));
    let began = Instant::now();
    site.tools.close().await;
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    all_gone(site.dir.path()).await;
}

#[tokio::test]
async fn the_children_of_a_server_that_died_are_not_left() {
    let site = Site::stdio(&["stubborn"]);
    assert!(site.call("die", json!({})).await.is_err());
    all_gone(site.dir.path()).await;
}

#[tokio::test]
async fn dropping_the_last_handle_ends_the_servers() {
    let site = Site::stdio(&["stubborn"]);
    assert_eq!(site.text("echo").await, "{}");
    let Site { dir, tools } = site;
    drop(tools);
    all_gone(dir.path()).await;
}

#[tokio::test]
async fn nothing_is_left_when_the_parent_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let mut parent = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "tools::processes::the_parent_that_is_killed",
            "--ignored",
            "--nocapture",
        ])
        .env(PARENT, dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    until("the server was called", || {
        events(dir.path()).iter().any(|seen| seen.starts_with("call echo"))
    })
    .await;
    let pids = named(dir.path());
    assert_eq!(pids.len(), 2);
    assert!(pids.iter().all(|pid| alive(*pid)), "they do not even run");
    let _leftovers = Leftovers(pids);
    // SIGKILL: nothing of the parent's own runs any more.
    parent.kill().await.unwrap();
    all_gone(dir.path()).await;
}

#[tokio::test]
#[ignore = "run by the test above, as a process of its own"]
async fn the_parent_that_is_killed() {
    let Some(dir) = std::env::var_os(PARENT) else { return };
    let dir = Path::new(&dir);
    let config = tools_config(dir, stdio_config(dir, &["stubborn"], json!({})));
    let tools = Tools::new(config, Arc::new(OneSecret));
    tools.call(call("echo", json!({})), None).await.unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
}
