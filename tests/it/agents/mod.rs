//! `model`, `tool` and `agent` nodes as their users meet them: a server's process between an endpoint that plays
//! scripts and a tool server that writes down what it is asked.

mod agent;
mod crash;
mod nodes;
mod real;
mod streams;

use futures::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};
use uuid::Uuid;

use crate::support::client::Client;
use crate::support::model_endpoint::{ModelEndpoint, Script, ending, event};
use crate::support::server::{Site, until};

/// The key of the model endpoint, which nobody may be shown.
const KEY: &str = "sk-hunter2-is-not-shown";

/// What a server stands between.
struct Desk {
    site: Site,
    endpoint: ModelEndpoint,
}

impl Desk {
    /// With the hostile tool server as `s`, on the test's own database.
    async fn new(pool: &PgPool, graphs: &[(&str, &str)]) -> Self {
        let url = pool.connect_options().to_url_lossy();
        Self::at(Site::on_database(graphs, url.as_str()), "hostile_mcp.py").await
    }

    /// With this tool server as `s`. Both are configured for every server of the site.
    async fn at(site: Site, script: &str) -> Self {
        let endpoint = ModelEndpoint::start().await;
        let script = format!("{}/tests/it/support/{script}", env!("CARGO_MANIFEST_DIR"));
        let config = json!({
            "models": {
                "endpoints": { "e": { "url": endpoint.url, "headers": { "x-key": KEY } } },
                "routes": { "default": [{ "endpoint": "e", "model": "m", "attempts": 1 }] },
            },
            "mcp_servers": { "s": {
                "command": ["python3", script, "stdio"],
                "protocol": "2025-11-25",
                "env": { "EVENTS": site.path("events"), "CALLS": site.path("calls") },
            } },
        });
        let file = site.path("config.yaml");
        std::fs::write(&file, config.to_string()).unwrap();
        let site = site.with_flags(&["--no-local-worker", "--config", file.to_str().unwrap()]);
        Self { site, endpoint }
    }

    /// What the hostile tool server was asked, and with which key.
    fn tool_calls(&self) -> Vec<(String, String)> {
        let text = std::fs::read_to_string(self.site.path("events")).unwrap_or_default();
        let calls = text.lines().filter_map(|line| line.strip_prefix("call ")?.split_once(' '));
        calls.map(|(name, key)| (name.to_owned(), key.to_owned())).collect()
    }
}

/// A model's answer that asks for these tools: id, name, the text of the arguments.
fn asks(calls: &[(&str, &str, &str)]) -> Script {
    let calls = calls.iter().enumerate().map(|(at, (id, name, arguments))| {
        json!({
            "index": at, "id": id, "type": "function",
            "function": { "name": name, "arguments": arguments },
        })
    });
    let calls: Vec<Value> = calls.collect();
    let said = event(json!({ "role": "assistant", "content": null, "tool_calls": calls }));
    Script::stream(format!("{said}{}", ending("tool_calls")))
}

/// Starts a run on a fresh thread: the thread, and the run.
async fn start(client: &Client, graph: &str, mut request: Value) -> (String, String) {
    if request["input"].is_null() {
        request["input"] = json!({});
    }
    let thread = Uuid::now_v7().to_string();
    client.ensure_thread(&thread).await.unwrap();
    let run = start_on(client, &thread, graph, request).await;
    (thread, run)
}

async fn start_on(client: &Client, thread: &str, graph: &str, request: Value) -> String {
    let run = client.start_run(thread, graph, request).await.unwrap();
    run["run_id"].as_str().unwrap().to_owned()
}

/// Waits for the end of a run: the run, and its thread.
async fn end(client: &Client, thread: &str, run: &str) -> (Value, Value) {
    let path = format!("/threads/{thread}/runs/{run}");
    let run = until("the run ends", async || {
        let run = client.get(&path).await.ok()?;
        let under_way = ["pending", "running"].map(|status| run["status"] == status);
        (!under_way.contains(&true)).then_some(run)
    })
    .await;
    (run, client.thread(thread).await.unwrap())
}

/// The values at the end of a run that succeeds.
async fn values(client: &Client, graph: &str, input: Value) -> (String, Value) {
    let (thread, run) = start(client, graph, json!({ "input": input })).await;
    let (ended, thread) = end(client, &thread, &run).await;
    assert_eq!(ended["status"], "success", "{ended}");
    (run, thread["values"].clone())
}

async fn effects(client: &Client, run: &str) -> Vec<Value> {
    let effects = client.get(&format!("/runs/{run}/effects")).await.unwrap();
    effects.as_array().unwrap().clone()
}

/// One event of a stream.
#[derive(Debug, Clone, PartialEq)]
struct Event {
    id: Option<String>,
    name: String,
    data: Value,
}

/// Reads a run's stream after an event (`-1` is from its beginning), until it ends or `enough` says so.
async fn read(
    client: &Client,
    path: &str,
    after: &str,
    mut enough: impl FnMut(&[Event]) -> bool,
) -> Vec<Event> {
    let request = client.request(Method::GET, path).header("last-event-id", after);
    let mut body = request.send().await.unwrap().error_for_status().unwrap().bytes_stream();
    let (mut bytes, mut events) = (Vec::new(), Vec::new());
    while let Some(Ok(more)) = body.next().await {
        bytes.extend_from_slice(&more);
        while let Some(at) = bytes.windows(2).position(|window| window == b"\n\n") {
            let block: Vec<u8> = bytes.drain(..at + 2).collect();
            events.extend(parsed(&String::from_utf8(block).unwrap()));
            if enough(&events) {
                return events;
            }
        }
    }
    events
}

/// What is no comment and tells of the run.
fn parsed(block: &str) -> Option<Event> {
    let field = |name: &str| {
        block.lines().find_map(|line| line.strip_prefix(name)).map(|rest| rest.trim().to_owned())
    };
    let name = field("event:").filter(|name| !["metadata", "end"].contains(&name.as_str()))?;
    let data = field("data:").map(|data| serde_json::from_str(&data).unwrap());
    Some(Event { id: field("id:"), name, data: data.unwrap_or_default() })
}
