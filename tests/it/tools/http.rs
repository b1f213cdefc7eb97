//! The same over HTTP: a server that somebody else runs.

use std::process::Stdio;
use std::time::{Duration, Instant};

use cynai::tools::error::{Outcome, ToolErrorKind};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::{SECRET, Site, call, script};

/// The hostile server, and a client of it.
struct Served {
    site: Site,
    child: Child,
    port: u16,
}

async fn served(modes: &[&str], more: Value) -> Served {
    let dir = tempfile::tempdir().unwrap();
    let (child, port) = start(dir.path(), modes).await;
    let mut config = json!({
        "url": format!("http://127.0.0.1:{port}/mcp"),
        "headers": {"authorization": {"secret": "bearer"}},
        "timeout": "20s",
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    Served { site: Site::in_dir(dir, config), child, port }
}

async fn start(dir: &std::path::Path, modes: &[&str]) -> (Child, u16) {
    let mut child = Command::new("python3")
        .arg(script())
        .arg("http")
        .args(modes)
        .env("EVENTS", dir.join("events"))
        .env("KEY", SECRET)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).await.unwrap();
    (child, line.trim().parse().unwrap())
}

#[tokio::test]
async fn both_versions_are_spoken_over_http() {
    for (modes, version) in [(&[][..], "2025-11-25"), (&["modern"][..], "2026-07-28")] {
        let served = served(modes, json!({})).await;
        assert_eq!(served.site.text("echo").await, "{}");
        let sum = served.site.call("add", json!({"list": [4, 5]})).await.unwrap();
        assert_eq!(sum.structured, Some(json!({"n": 9})));
        let status = served.site.tools.status("s").unwrap();
        assert_eq!(status.protocol.as_deref(), Some(version));
        assert!(served.site.events().contains(&format!("auth Bearer {SECRET}")));
        served.site.tools.close().await;
    }
}

#[tokio::test]
async fn a_server_that_cannot_be_reached_was_not_sent_anything() {
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let site = Site::new(json!({"url": format!("http://{address}/mcp?key=hunter2")}));
    let err = site.fail("echo", ToolErrorKind::Unavailable).await;
    assert_eq!(err.outcome, Outcome::NotSent);
}

#[tokio::test]
async fn a_server_that_dies_or_hangs_up_in_a_call_leaves_it_unknown() {
    for tool in ["reset", "die", "quiet_death"] {
        let served = served(&[], json!({})).await;
        let began = Instant::now();
        let err = served.site.fail(tool, ToolErrorKind::ServerDied).await;
        assert_eq!(err.outcome, Outcome::Unknown, "{tool}");
        assert!(began.elapsed() < Duration::from_secs(10), "{tool}: {:?}", began.elapsed());
    }
}

#[tokio::test]
async fn a_call_that_hangs_harms_no_other_over_http() {
    let served = served(&[], json!({})).await;
    served.site.text("echo").await;
    let mut hanging = call("hang", json!({}));
    hanging.timeout = Some(Duration::from_millis(600));
    let others = async {
        for _ in 0..5 {
            assert_eq!(served.site.text("echo").await, "{}");
        }
    };
    let (hung, ()) = tokio::join!(served.site.tools.call(hanging, None), others);
    let err = hung.unwrap_err();
    assert_eq!((err.kind, err.outcome), (ToolErrorKind::Timeout, Outcome::Unknown));
    served.site.saw("cancelled", 1).await;
    assert_eq!(served.site.text("echo").await, "{}");
}

#[tokio::test]
async fn repeated_and_unasked_answers_are_ignored_over_http() {
    let served = served(&[], json!({})).await;
    for _ in 0..3 {
        assert_eq!(served.site.text("twice").await, "one");
        assert_eq!(served.site.text("unknown_id").await, "right");
    }
}

#[tokio::test]
async fn progress_comes_over_http_too() {
    let served = served(&[], json!({})).await;
    let (sender, mut notes) = tokio::sync::mpsc::unbounded_channel();
    let sink = std::sync::Arc::new(move |note| drop(sender.send(note)));
    let result = served.site.tools.call(call("flood", json!({})), Some(sink)).await.unwrap();
    assert_eq!(result.text(), "done");
    let mut seen = 0;
    while notes.try_recv().is_ok() {
        seen += 1;
    }
    assert_eq!(seen + result.progress_left_out, 20_000);
    assert!((1..=300).contains(&seen), "{seen}");
}

#[tokio::test]
async fn results_over_the_limit_are_refused_on_every_kind_of_answer() {
    let served = served(&[], json!({"max_output": "64 KiB"})).await;
    for (tool, bytes) in
        [("big", 10 << 20), ("big_sse", 10 << 20), ("big", 100_000), ("big_sse", 100_000)]
    {
        let err = served.site.call(tool, json!({"bytes": bytes})).await.unwrap_err();
        assert_eq!(err.kind, ToolErrorKind::TooLarge, "{tool} {bytes}: {err}");
        assert_eq!(err.outcome, Outcome::Answered);
    }
    assert_eq!(served.site.text("echo").await, "{}");
}

#[tokio::test]
async fn errors_schemas_and_secrets_are_the_same_over_http() {
    let served = served(&[], json!({})).await;
    let err = served.site.fail("refuse", ToolErrorKind::Refused).await;
    assert!(err.message.contains("no: [redacted]"), "{err}");
    served.site.fail("bad_output", ToolErrorKind::InvalidOutput).await;
    for tool in ["bad_utf8", "not_json"] {
        let err = served.site.fail(tool, ToolErrorKind::Protocol).await;
        assert_eq!(err.outcome, Outcome::Answered);
    }
    let shown = served.site.call("env", json!({})).await.unwrap();
    assert!(!serde_json::to_string(&shown).unwrap().contains("hunter2"));
}

#[tokio::test]
async fn servers_that_are_none_are_told_apart() {
    for (mode, expected) in [("unauthorized", "headers"), ("broken", "500")] {
        let served = served(&[mode], json!({})).await;
        let err = served.site.fail("echo", ToolErrorKind::Unavailable).await;
        assert!(err.message.contains(expected), "{mode}: {err}");
        assert!(!err.message.contains("stack trace"), "{err}");
    }
    let wrong = Site::new(json!({"url": "http://127.0.0.1:1/", "headers": {"accept": "x"}}));
    let err = wrong.fail("echo", ToolErrorKind::Misconfigured).await;
    assert!(err.message.contains("accept"), "{err}");
}

#[tokio::test]
async fn redirects_are_not_followed() {
    let elsewhere = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mode = format!("redirect=http://{}/mcp", elsewhere.local_addr().unwrap());
    let served = served(&[&mode], json!({})).await;
    let err = served.site.fail("echo", ToolErrorKind::Unavailable).await;
    assert_eq!(err.outcome, Outcome::NotSent);
    let visit = tokio::time::timeout(Duration::from_millis(300), elsewhere.accept()).await;
    assert!(visit.is_err(), "{visit:?}");
}

#[tokio::test]
async fn a_server_that_accepts_and_is_silent_is_given_up_on() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/mcp", silent.local_addr().unwrap());
    let site = Site::new(json!({"url": url, "start_timeout": "300ms"}));
    let began = Instant::now();
    let err = site.fail("echo", ToolErrorKind::Unavailable).await;
    assert!(err.message.contains("start_timeout"), "{err}");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_forgotten_session_is_begun_again_and_its_tools_are_looked_at_again() {
    let served = served(&[], json!({})).await;
    let tools = served.site.tools.list("s").await.unwrap();
    let pin = tools.iter().find(|tool| tool.name == "echo").unwrap().hash();
    assert_eq!(served.site.text("echo").await, "{}");
    // The server forgets all sessions, and has other tools from then on.
    served.site.text("forget").await;
    let mut pinned = call("echo", json!({}));
    pinned.pin = Some(pin);
    let err = served.site.tools.call(pinned, None).await.unwrap_err();
    assert_eq!(err.kind, ToolErrorKind::Changed, "{err}");
    assert_eq!(served.site.text("echo").await, "{}");
    let begun = served.site.events().iter().filter(|seen| seen.starts_with("initialize")).count();
    assert_eq!(begun, 2);
}

#[tokio::test]
async fn a_server_that_comes_back_is_used_again() {
    let mut served = served(&[], json!({"timeout": "5s"})).await;
    assert_eq!(served.site.text("echo").await, "{}");
    served.child.kill().await.unwrap();
    let err = served.site.fail("echo", ToolErrorKind::Unavailable).await;
    assert_eq!(err.outcome, Outcome::NotSent);
    let port = served.port.to_string();
    let (child, _) = start(served.site.dir.path(), &["port", &port]).await;
    assert_eq!(served.site.text("echo").await, "{}");
    drop(child);
}

#[tokio::test]
async fn a_request_that_fails_says_nothing_of_the_others() {
    let served = served(&[], json!({})).await;
    for _ in 0..8 {
        let waiting = served.site.call("slow", json!({"seconds": 0.05}));
        let (broken, waiting) = tokio::join!(served.site.call("reset", json!({})), waiting);
        assert_eq!(broken.unwrap_err().kind, ToolErrorKind::ServerDied);
        assert_eq!(waiting.unwrap().text(), "at last");
    }
    let begun = served.site.events().iter().filter(|seen| seen.starts_with("initialize")).count();
    assert_eq!(begun, 1);
}
