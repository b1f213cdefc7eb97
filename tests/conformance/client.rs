//! The client under test of MCP's conformance suite: the tools of this crate, used as a run uses them.
//!
//! The suite starts it for each scenario, with the address of the scenario's server as the last argument, the
//! version of the protocol in `MCP_CONFORMANCE_PROTOCOL_VERSION`, and sometimes with the calls to make in
//! `MCP_CONFORMANCE_CONTEXT`. It lists the tools and calls each of them. What it sent is judged by the suite.

#![expect(clippy::print_stderr, reason = "what happened is for whoever reads the suite's results")]
#![expect(clippy::disallowed_methods, reason = "the suite speaks through the environment")]

use std::sync::Arc;

use anyhow::Context as _;
use cynai::config::tools::{ToolServers, ToolsConfig};
use cynai::tools::definition::ToolDefinition;
use cynai::tools::keys::TextsOnly;
use cynai::tools::{ToolCall, Tools};
use serde_json::{Map, Value, json};

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let url = std::env::args().next_back().context("the address of a server is needed")?;
    let version = std::env::var("MCP_CONFORMANCE_PROTOCOL_VERSION")?;
    let context = std::env::var("MCP_CONFORMANCE_CONTEXT").unwrap_or_else(|_| "{}".to_owned());
    let context: Value = serde_json::from_str(&context)?;
    let _ = rustls::crypto::ring::default_provider().install_default();

    let server =
        json!({"url": url, "protocol": version, "elicitation": "defaults", "timeout": "20s"});
    let servers: ToolServers = serde_json::from_value(json!({"suite": server}))?;
    let tools = Tools::new(ToolsConfig::new(servers, std::env::temp_dir()), Arc::new(TextsOnly));
    let worked = use_all(&tools, &context).await;
    tools.close().await;
    worked
}

/// Makes the calls that the suite asks for, or else calls every tool with arguments that fit.
async fn use_all(tools: &Tools, context: &Value) -> anyhow::Result<()> {
    let listed = tools.list("suite").await?;
    let calls: Vec<(String, Map<String, Value>)> = match context["toolCalls"].as_array() {
        Some(calls) => calls.iter().map(asked_for).collect(),
        None => listed.iter().map(|tool| (tool.name.clone(), fitting(tool))).collect(),
    };
    let mut failed = 0;
    for (tool, arguments) in calls {
        let call = ToolCall {
            server: "suite".to_owned(),
            tool: tool.clone(),
            arguments,
            idempotency_key: None,
            timeout: None,
            pin: None,
        };
        match tools.call(call, None).await {
            Ok(result) => eprintln!("{tool}: {}", result.text()),
            Err(err) => {
                eprintln!("{tool}: {}: {err}", err.kind.as_str());
                failed += 1;
            }
        }
    }
    anyhow::ensure!(failed == 0, "{failed} calls failed");
    Ok(())
}

/// A call of the suite's. An argument that is null is left out: as the value of a boolean it would be refused
/// before it is sent, and a caller of ours leaves it out too.
fn asked_for(call: &Value) -> (String, Map<String, Value>) {
    let mut arguments = call["arguments"].as_object().cloned().unwrap_or_default();
    arguments.retain(|_, value| !value.is_null());
    (call["name"].as_str().unwrap_or_default().to_owned(), arguments)
}

/// A value for everything that the tool requires.
fn fitting(tool: &ToolDefinition) -> Map<String, Value> {
    let schema = &tool.input_schema;
    let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let value = |name: &str| match schema["properties"][name]["type"].as_str() {
        Some("number" | "integer") => json!(7),
        Some("boolean") => json!(true),
        Some("object") => json!({}),
        Some("array") => json!([]),
        _ => json!("a"),
    };
    required.map(|name| (name.to_owned(), value(name))).collect()
}
