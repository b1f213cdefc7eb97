//! A graph file that changes under runs and threads that are under way.

use std::fs;

use serde_json::json;

use crate::support::server::{Site, Start};

const THREAD: &str = "00000000-0000-4000-8000-000000000001";

/// A graph that asks in a node of this name, and then says which version it is.
fn asks(node: &str, version: u32) -> String {
    format!(
        r#"
name: asks
state:
  answer:  {{ type: boolean }}
  version: {{ type: integer, default: 0 }}
input: []
output: [answer, version]
nodes:
  {node}:
    interrupt: {{ ask: "go on?" }}
    set: {{ answer: "${{output}}" }}
  say:
    set: {{ version: {version} }}
edges:
  - start -> {node} -> say -> end
"#
    )
}

#[tokio::test]
async fn an_answer_goes_on_with_the_graph_that_asked_and_an_input_begins_with_the_new_one() {
    let site = Site::new(&[("asks", &asks("first", 1))]).with_flags(&["--no-local-worker"]);
    let server = site.start(&Start::default()).await;
    let client = server.client();
    client.ensure_thread(THREAD).await.unwrap();
    let path = format!("/threads/{THREAD}/runs/wait");
    let begin = json!({"assistant_id": "asks", "input": {}});
    let answer = json!({"assistant_id": "asks", "command": {"resume": true}});
    assert!(client.post(&path, &begin).await.unwrap().get("__interrupt__").is_some());
    server.kill();

    fs::write(site.path("graphs").join("asks.yaml"), asks("second", 2)).unwrap();
    let server = site.start(&Start::default()).await;
    let client = server.client();
    let old = client.post(&path, &answer).await.unwrap();
    assert_eq!(old, json!({"answer": true, "version": 1}));
    let asked = client.post(&path, &begin).await.unwrap();
    assert!(asked.get("__interrupt__").is_some(), "{asked}");
    let new = client.post(&path, &answer).await.unwrap();
    assert_eq!(new, json!({"answer": true, "version": 2}));
}
