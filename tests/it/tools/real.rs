//! The reference servers of the protocol, unmodified, over both wires.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use cynai::tools::Tools;
use serde_json::{Value, json};

use super::{OneSecret, call, tools_config, until};

const PACKAGES: [&str; 3] = [
    "@modelcontextprotocol/server-everything@2026.8.31",
    "@modelcontextprotocol/server-filesystem@2026.8.31",
    "@modelcontextprotocol/server-memory@2026.8.31",
];

/// The installed servers.
pub async fn servers() -> PathBuf {
    installed("mcp-servers", &PACKAGES).await
}

/// Where these packages of npm's are. They are installed once, and kept beside what cargo builds.
pub async fn installed(name: &'static str, packages: &'static [&'static str]) -> PathBuf {
    tokio::task::spawn_blocking(move || {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&dir).unwrap();
        // Several tests begin at once: one installs, the others wait.
        let lock = std::fs::File::create(dir.join("lock")).unwrap();
        lock.lock().unwrap();
        let done = dir.join("installed");
        if std::fs::read_to_string(&done).is_ok_and(|text| text == packages.join("\n")) {
            return dir;
        }
        let output = Command::new("npm")
            .args(["install", "--no-audit", "--no-fund", "--no-update-notifier", "--prefix"])
            .arg(&dir)
            .args(packages)
            .stdin(Stdio::null())
            .output()
            .expect("this test needs npm: apt-get install nodejs npm");
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "this test needs a package index of npm's\n{told}");
        std::fs::write(done, packages.join("\n")).unwrap();
        dir
    })
    .await
    .unwrap()
}

fn program(dir: &Path, name: &str, arguments: &[&Value]) -> Value {
    let mut command = vec![json!(dir.join("node_modules/.bin").join(name))];
    command.extend(arguments.iter().map(|argument| (*argument).clone()));
    json!(command)
}

fn tools(dir: &Path, config: Value) -> Tools {
    let _ = rustls::crypto::ring::default_provider().install_default();
    Tools::new(tools_config(dir, config), Arc::new(OneSecret))
}

/// Uses what "everything" offers, on whichever wire.
async fn use_everything(tools: &Tools) {
    let names: Vec<String> =
        tools.list("s").await.unwrap().into_iter().map(|tool| tool.name).collect();
    assert!(names.len() >= 8, "{names:?}");
    let echo = tools.call(call("echo", json!({"message": "hello"})), None).await.unwrap();
    assert!(echo.text().contains("hello"), "{echo:?}");
    let (sender, mut notes) = tokio::sync::mpsc::unbounded_channel();
    let sink = Arc::new(move |note| drop(sender.send(note)));
    let long =
        names.iter().find(|name| name.contains("long-running") || name.contains("longRunning"));
    let long = call(long.unwrap(), json!({"duration": 1, "steps": 4}));
    let done = tools.call(long, Some(sink)).await.unwrap();
    assert!(!done.is_error, "{done:?}");
    let note = notes.try_recv().expect("there was progress");
    assert_eq!(note.total, Some(4.0));
    let structured = names.iter().find(|name| name.to_lowercase().contains("structured")).unwrap();
    let weather =
        tools.call(call(structured, json!({"location": "New York"})), None).await.unwrap();
    assert!(weather.structured.unwrap()["temperature"].is_number());
    let image = names.iter().find(|name| name.to_lowercase().contains("image")).unwrap();
    let image = tools.call(call(image, json!({})), None).await.unwrap();
    assert!(format!("{image:?}").contains("data:image/png;base64,"));
}

#[tokio::test]
async fn everything_over_pipes() {
    let (dir, home) = (servers().await, tempfile::tempdir().unwrap());
    let command = program(&dir, "mcp-server-everything", &[&json!("stdio")]);
    let tools = tools(home.path(), json!({"command": command}));
    use_everything(&tools).await;
    tools.close().await;
}

#[tokio::test]
async fn everything_over_http() {
    let (dir, home) = (servers().await, tempfile::tempdir().unwrap());
    let port = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().port()
    };
    // The server listens everywhere and cannot be told otherwise: here only this machine may reach it.
    let loopback = home.path().join("loopback.cjs");
    std::fs::write(
        &loopback,
        "const { Server } = require('net');\nconst listen = Server.prototype.listen;\n\
         Server.prototype.listen = function (port, ...rest) {\n  \
         return listen.call(this, port, '127.0.0.1', ...rest.filter((a) => typeof a === 'function'));\n};\n",
    )
    .unwrap();
    let _child = tokio::process::Command::new("node")
        .arg("--require")
        .arg(&loopback)
        .arg(dir.join("node_modules/.bin/mcp-server-everything"))
        .arg("streamableHttp")
        .env("PORT", port.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    until("the server listens", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()).await;
    let tools = tools(home.path(), json!({"url": format!("http://127.0.0.1:{port}/mcp")}));
    use_everything(&tools).await;
    tools.close().await;
}

#[tokio::test]
async fn files_are_written_and_read_where_they_may_be() {
    let (dir, home) = (servers().await, tempfile::tempdir().unwrap());
    let root = tempfile::tempdir().unwrap();
    let command = program(&dir, "mcp-server-filesystem", &[&json!(root.path())]);
    let tools = tools(home.path(), json!({"command": command}));
    let path = root.path().join("a.txt");
    let write = call("write_file", json!({"path": path, "content": "one\ntwo\n"}));
    assert!(!tools.call(write, None).await.unwrap().is_error);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\ntwo\n");
    let read = tools.call(call("read_text_file", json!({"path": path, "head": 1})), None);
    assert_eq!(read.await.unwrap().text().trim(), "one");
    let outside = tools.call(call("read_text_file", json!({"path": "/etc/passwd"})), None);
    assert!(outside.await.unwrap().is_error);
    let wrong = tools.call(call("read_text_file", json!({"path": 1})), None).await.unwrap_err();
    assert_eq!(wrong.kind.as_str(), "invalid_arguments");
    tools.close().await;
}

#[tokio::test]
async fn memory_survives_a_server_that_ends_when_it_is_not_used() {
    let (dir, home) = (servers().await, tempfile::tempdir().unwrap());
    let command = program(&dir, "mcp-server-memory", &[]);
    let env = json!({"MEMORY_FILE_PATH": home.path().join("memory.jsonl")});
    let tools = tools(home.path(), json!({"command": command, "env": env, "idle": "500ms"}));
    let entity = json!({"name": "cynai", "entityType": "program", "observations": ["remembers"]});
    let made =
        tools.call(call("create_entities", json!({"entities": [entity]})), None).await.unwrap();
    assert!(!made.is_error);
    until("it ended", || tools.status("s").unwrap().state == "stopped").await;
    let deadline = Duration::from_secs(30);
    let graph = tokio::time::timeout(deadline, tools.call(call("read_graph", json!({})), None));
    let graph = graph.await.unwrap().unwrap();
    assert!(graph.text().contains("remembers"));
    tools.close().await;
}
