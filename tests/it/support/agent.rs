//! A server with an agent: its model is a scripted endpoint that speaks slowly, its tool one of a real MCP server.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::model_endpoint::{ModelEndpoint, Script, ending, event};
use super::server::Site;

const HELPER: &str = r#"
name: helper
state:
  answer: { type: string }
input: []
nodes:
  help:
    agent:
      prompt: Look, and tell what you see.
      tools: [things/echo]
    set: { answer: "${output.text}" }
edges: [start -> help -> end]
"#;

const CAREFUL: &str = r#"
name: careful
state:
  answer: { type: string }
input: []
nodes:
  help:
    agent:
      prompt: Look, and tell what you see.
      tools: [things/echo]
      approve: [things/*]
    set: { answer: "${output.text}" }
edges: [start -> help -> end]
"#;

/// Between two pieces of an answer.
const GAP: Duration = Duration::from_millis(12);
/// Pieces of one answer: together longer than several writes of pieces are apart.
const PIECES: usize = 50;

/// A site with the graphs `helper` and `careful` (where a person decides of each call) and these others.
pub(crate) fn site(endpoint: &ModelEndpoint, more: &[(&str, &str)]) -> Site {
    let graphs = [&[("helper", HELPER), ("careful", CAREFUL)], more].concat();
    let site = Site::new(&graphs);
    let server = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/support/hostile_mcp.py");
    let config = json!({
        "models": {
            "endpoints": { "scripted": { "url": endpoint.url } },
            "routes": { "default": [{ "endpoint": "scripted", "model": "m" }] },
        },
        "mcp_servers": { "things": { "command": ["python3", server, "stdio"] } },
    });
    let file = site.path("config.yaml");
    std::fs::write(&file, config.to_string()).unwrap();
    site.with_flags(&["--no-local-worker", "--config", file.to_str().unwrap()])
}

/// The two answers of the model in one run: words and a call of the tool, then words.
pub(crate) fn one_run() -> [Script; 2] {
    let call = json!({"tool_calls": [{"index": 0, "id": "call-1", "type": "function",
        "function": {"name": "things__echo", "arguments": "{\"words\": \"hello\"}"}}]});
    [
        speaks("look").then(event(call)).then(ending("tool_calls")),
        speaks("see").then(ending("stop")),
    ]
}

/// What the model says in one run, message by message.
pub(crate) fn texts() -> Value {
    json!([pieces("look").concat(), pieces("see").concat()])
}

fn pieces(word: &str) -> Vec<String> {
    (0..PIECES).map(|at| format!("{word}{at} ")).collect()
}

fn speaks(word: &str) -> Script {
    let mut script = Script::stream(event(json!({"role": "assistant"})));
    for piece in pieces(word) {
        script = script.then(event(json!({"content": piece}))).wait(GAP);
    }
    script
}
