//! The client under test of MCP's conformance suite: the tools of this crate, used as a run uses them.
//!
//! The suite starts it for each scenario, with the address of the scenario's server as the last argument, the
//! version of the protocol in `MCP_CONFORMANCE_PROTOCOL_VERSION`, and sometimes with the calls to make, or a
//! client that is registered already, in `MCP_CONFORMANCE_CONTEXT`. It lists the tools and calls each of them;
//! where a login is asked for, it does what the administrator and the administrator's browser would do. What it
//! sent is judged by the suite.

#![expect(clippy::print_stderr, reason = "what happened is for whoever reads the suite's results")]
#![expect(clippy::disallowed_methods, reason = "the suite speaks through the environment")]

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use cynai::config::tools::{ToolServers, ToolsConfig, ValueSource};
use cynai::tools::definition::ToolDefinition;
use cynai::tools::error::{ToolError, ToolErrorKind};
use cynai::tools::keys::{KeyError, Keys, TextsOnly};
use cynai::tools::{ToolCall, Tools};
use futures::FutureExt;
use futures::future::BoxFuture;
use reqwest::header::LOCATION;
use secrecy::SecretString;
use serde_json::{Map, Value, json};
use url::Url;

/// The name of the scenario's server.
const SERVER: &str = "suite";
/// The document about this client that the suite expects.
const DOCUMENT: &str = "https://conformance-test.local/client-metadata.json";
/// Where the browser is led to in the end. Nobody listens there: the address is all that matters.
const REDIRECT: &str = "http://127.0.0.1:1/callback";
/// How often an administrator tries to log in.
const LOGINS: usize = 3;

/// Keeps a login as long as the process lives.
#[derive(Debug, Default)]
struct Memory(Mutex<Option<SecretString>>);

impl Keys for Memory {
    fn value<'a>(
        &'a self,
        source: &'a ValueSource,
    ) -> BoxFuture<'a, Result<SecretString, KeyError>> {
        TextsOnly.value(source)
    }

    fn login<'a>(
        &'a self,
        _server: &'a str,
    ) -> BoxFuture<'a, Result<Option<SecretString>, KeyError>> {
        let login = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        async move { Ok(login) }.boxed()
    }

    fn keep_login<'a>(
        &'a self,
        _server: &'a str,
        login: SecretString,
    ) -> BoxFuture<'a, Result<(), KeyError>> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(login);
        async { Ok(()) }.boxed()
    }
}

/// The tools, and an administrator beside them.
struct Site {
    tools: Tools,
    logins: usize,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let url = std::env::args().next_back().context("the address of a server is needed")?;
    let version = std::env::var("MCP_CONFORMANCE_PROTOCOL_VERSION")?;
    let context = std::env::var("MCP_CONFORMANCE_CONTEXT").unwrap_or_else(|_| "{}".to_owned());
    let context: Value = serde_json::from_str(&context)?;
    let _ = rustls::crypto::ring::default_provider().install_default();

    let oauth = json!({
        "client_id": context["client_id"],
        "client_secret": context["client_secret"],
        "client_metadata_url": DOCUMENT,
    });
    let server = json!({
        "url": url,
        "protocol": version,
        "elicitation": "defaults",
        "oauth": oauth,
        "timeout": "20s",
    });
    let servers: ToolServers = serde_json::from_value(json!({SERVER: server}))?;
    let config = ToolsConfig::new(servers, std::env::temp_dir());
    let mut site = Site { tools: Tools::new(config, Arc::new(Memory::default())), logins: 0 };
    let worked = site.use_all(&context).await;
    site.tools.close().await;
    worked
}

impl Site {
    /// Makes the calls that the suite asks for, or else calls every tool with arguments that fit.
    async fn use_all(&mut self, context: &Value) -> anyhow::Result<()> {
        let listed = loop {
            match self.tools.list(SERVER).await {
                Ok(listed) => break listed,
                Err(err) => self.log_in(err).await?,
            }
        };
        let calls: Vec<(String, Map<String, Value>)> = match context["toolCalls"].as_array() {
            Some(calls) => calls.iter().map(asked_for).collect(),
            None => listed.iter().map(|tool| (tool.name.clone(), fitting(tool, &listed))).collect(),
        };
        let mut failed = 0;
        for (tool, arguments) in calls {
            if let Err(err) = self.call(&tool, arguments).await {
                eprintln!("{tool}: {err:#}");
                failed += 1;
            }
        }
        anyhow::ensure!(failed == 0, "{failed} calls failed");
        Ok(())
    }

    async fn call(&mut self, tool: &str, arguments: Map<String, Value>) -> anyhow::Result<()> {
        loop {
            let call = ToolCall {
                server: SERVER.to_owned(),
                tool: tool.to_owned(),
                arguments: arguments.clone(),
                idempotency_key: None,
                timeout: None,
                pin: None,
            };
            match self.tools.call(call, None).await {
                Ok(result) => {
                    eprintln!("{tool}: {}", result.text());
                    return Ok(());
                }
                Err(err) => self.log_in(err).await?,
            }
        }
    }

    /// Logs in when that is what is wanted: begins a login, opens the page, agrees, and tells where it led to.
    async fn log_in(&mut self, wanted: ToolError) -> anyhow::Result<()> {
        eprintln!("{}: {wanted}", wanted.kind.as_str());
        if wanted.kind != ToolErrorKind::LoginRequired || self.logins == LOGINS {
            return Err(wanted.into());
        }
        self.logins += 1;
        let page = self.tools.begin_login(SERVER, &Url::parse(REDIRECT)?).await?;
        let browser = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none());
        let answer = browser.no_proxy().build()?.get(page).send().await?;
        let led_to = answer.headers().get(LOCATION).context("the page leads nowhere")?;
        self.tools.finish_login(SERVER, &Url::parse(led_to.to_str()?)?).await?;
        Ok(())
    }
}

/// A call of the suite's. An argument that is null is left out: as the value of a boolean it would be refused
/// before it is sent, and a caller of ours leaves it out too.
fn asked_for(call: &Value) -> (String, Map<String, Value>) {
    let mut arguments = call["arguments"].as_object().cloned().unwrap_or_default();
    arguments.retain(|_, value| !value.is_null());
    (call["name"].as_str().unwrap_or_default().to_owned(), arguments)
}

/// A value for everything that the tool requires. One that wants a schema gets that of the first tool.
fn fitting(tool: &ToolDefinition, listed: &[ToolDefinition]) -> Map<String, Value> {
    let schema = &tool.input_schema;
    let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let value = |name: &str| match schema["properties"][name]["type"].as_str() {
        Some("number" | "integer") => json!(7),
        Some("boolean") => json!(true),
        Some("object") if name == "schema" => listed[0].input_schema.clone(),
        Some("object") => json!({}),
        Some("array") => json!([]),
        _ => json!("a"),
    };
    required.map(|name| (name.to_owned(), value(name))).collect()
}
