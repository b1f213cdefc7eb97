//! Tools of MCP servers that misbehave, and of some that do not: real processes, real sockets.

mod conformance;
mod hostile;
mod http;
mod login;
mod pinning;
mod processes;
pub mod real;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cynai::config::tools::{ToolServers, ToolsConfig, ValueSource};
use cynai::tools::error::{ToolError, ToolErrorKind};
use cynai::tools::keys::{KeyError, Keys};
use cynai::tools::result::ToolResult;
use cynai::tools::{ToolCall, Tools};
use futures::FutureExt;
use futures::future::BoxFuture;
use secrecy::SecretString;
use serde_json::{Value, json};

/// The value of every secret here.
pub const SECRET: &str = "hunter2-is-not-shown";

/// Knows one secret.
#[derive(Debug)]
pub struct OneSecret;

impl Keys for OneSecret {
    fn value<'a>(
        &'a self,
        source: &'a ValueSource,
    ) -> BoxFuture<'a, Result<SecretString, KeyError>> {
        let value = match source {
            ValueSource::Text(text) => Ok(text.as_str().into()),
            ValueSource::Secret(name) if name == "key" => Ok(SECRET.into()),
            ValueSource::Secret(name) if name == "bearer" => Ok(format!("Bearer {SECRET}").into()),
            _ => Err(KeyError("there is no such secret: add it".to_owned())),
        };
        async move { value }.boxed()
    }
}

/// Servers for one test.
pub struct Site {
    pub dir: tempfile::TempDir,
    pub tools: Tools,
}

impl Site {
    /// One server, `s`, with this configuration.
    pub fn new(config: Value) -> Self {
        Self::in_dir(tempfile::tempdir().unwrap(), config)
    }

    fn in_dir(dir: tempfile::TempDir, config: Value) -> Self {
        // Harmless when it was installed before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let tools = Tools::new(tools_config(dir.path(), config), Arc::new(OneSecret));
        Self { dir, tools }
    }

    /// The hostile server over pipes, in these modes.
    pub fn stdio(modes: &[&str]) -> Self {
        Self::stdio_with(modes, json!({}))
    }

    /// The same, with more in its configuration.
    pub fn stdio_with(modes: &[&str], more: Value) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = stdio_config(dir.path(), modes, more);
        Self::in_dir(dir, config)
    }

    pub async fn call(&self, tool: &str, arguments: Value) -> Result<ToolResult, ToolError> {
        self.tools.call(call(tool, arguments), None).await
    }

    /// Calls a tool that works, and gives its text.
    pub async fn text(&self, tool: &str) -> String {
        self.call(tool, json!({})).await.unwrap().text()
    }

    /// Calls a tool that does not.
    pub async fn fail(&self, tool: &str, kind: ToolErrorKind) -> ToolError {
        let err = self.call(tool, json!({})).await.unwrap_err();
        assert_eq!(err.kind, kind, "{err:?}");
        assert!(!err.message.contains("hunter2"), "{err}");
        err
    }

    /// What the server saw so far.
    pub fn events(&self) -> Vec<String> {
        events(self.dir.path())
    }

    /// Waits until the server saw this, so many times.
    pub async fn saw(&self, event: &str, times: usize) {
        until(&format!("{event} {times} times"), || {
            self.events().iter().filter(|seen| seen.starts_with(event)).count() >= times
        })
        .await;
    }
}

pub fn events(dir: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(dir.join("events")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

pub fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/support/hostile_mcp.py")
}

pub fn tools_config(dir: &Path, config: Value) -> ToolsConfig {
    let servers: ToolServers = serde_json::from_value(json!({"s": config})).unwrap();
    ToolsConfig::new(servers, dir.join("homes"))
}

pub fn stdio_config(dir: &Path, modes: &[&str], more: Value) -> Value {
    let mut command = vec![json!("python3"), json!(script()), json!("stdio")];
    command.extend(modes.iter().map(|mode| json!(mode)));
    let env = json!({"EVENTS": dir.join("events"), "KEY": {"secret": "key"}});
    let mut config = json!({"command": command, "env": env, "timeout": "20s"});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

pub fn call(tool: &str, arguments: Value) -> ToolCall {
    ToolCall {
        server: "s".to_owned(),
        tool: tool.to_owned(),
        arguments: arguments.as_object().unwrap().clone(),
        idempotency_key: None,
        timeout: None,
        pin: None,
    }
}

/// Waits until something is so.
pub async fn until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !so() {
        assert!(Instant::now() < deadline, "not within 20 s: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
