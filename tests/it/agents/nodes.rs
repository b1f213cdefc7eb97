//! One `model`, one `tool`: what is sent, what comes back, what is kept of it.

use serde_json::{Value, json};
use sqlx::PgPool;

use super::{Desk, KEY, effects, end, start, values};
use crate::support::model_endpoint::Script;
use crate::support::server::Start;

const COUNT: &str = r#"
name: count
state: { word: { type: string }, n: { type: integer }, usage: {}, said: {} }
input: [word]
nodes:
  think:
    model:
      system: { file: prompts/system.md }
      prompt: "How many letters has {{ state.word }}?"
      schema: { type: object, properties: { n: { type: integer } }, required: [n] }
      repairs: 1
      sampling: { temperature: 0.5, max_tokens: 50 }
    set: { n: "${output.json.n}", usage: "${output.usage}", said: "${output.message}" }
edges: [ start -> think -> end ]
"#;

#[sqlx::test]
async fn a_model_gets_its_prompts_and_is_corrected_and_what_it_cost_is_kept(pool: PgPool) {
    let desk = Desk::new(&pool, &[("count", COUNT)]).await;
    let prompts = desk.site.path("graphs/prompts");
    std::fs::create_dir(&prompts).unwrap();
    std::fs::write(prompts.join("system.md"), "You count, as in {{ run.graph }}.").unwrap();
    let server = desk.site.start(&Start::default()).await;
    let client = server.client();
    let repaired = [Script::text(&["three"]), Script::text(&["{\"n\"", ": 3}"])];
    desk.endpoint.plays(repaired);
    let (run, values) = values(&client, "count", json!({ "word": "cat" })).await;
    assert_eq!(values["n"], 3);
    assert_eq!((&values["usage"]["input"], &values["usage"]["total"]), (&json!(20), &json!(24)));
    assert_eq!(
        (&values["said"]["type"], &values["said"]["content"]),
        (&json!("ai"), &json!("{\"n\": 3}"))
    );
    let calls = desk.endpoint.calls();
    let said = &calls[0].body["messages"];
    assert!(said[0]["content"].as_str().unwrap().starts_with("You count, as in count."), "{said}");
    assert_eq!(said[1]["content"], "How many letters has cat?");
    assert_eq!(
        (&calls[0].body["temperature"], &calls[0].body["max_tokens"]),
        (&json!(0.5), &json!(50))
    );
    // The effect is one; its repair has a key of its own, or the endpoint would repeat its answer.
    let listed = effects(&client, &run).await;
    let [effect] = listed.as_slice() else { panic!("{listed:?}") };
    let key = effect["idempotency_key"].as_str().unwrap();
    assert_eq!(calls[0].headers["idempotency-key"], key);
    assert_eq!(calls[1].headers["idempotency-key"], format!("{key}.repair1"));
    let told = ["kind", "target", "effect", "status", "node"].map(|name| effect[name].clone());
    assert_eq!(told, ["model", "default", "idempotent", "done", "think"]);
    assert_eq!(effect["request"]["messages"][1]["content"], "How many letters has cat?");
    assert_eq!((&effect["outcome"]["json"]["n"], &effect["sends"]), (&json!(3), &json!(1)));
    assert!(effect["started_at"].as_str().unwrap() <= effect["ended_at"].as_str().unwrap());

    desk.endpoint.plays([Script::text(&["three"]), Script::text(&["3"])]);
    let (thread, run) = start(&client, "count", json!({ "input": { "word": "cat" } })).await;
    let (ended, thread) = end(&client, &thread, &run).await;
    assert_eq!(
        (&ended["status"], &ended["error"]["error"]),
        (&json!("error"), &json!("invalid_json"))
    );
    let listed = effects(&client, &run).await;
    assert_eq!(listed[0]["status"], "failed");
    let shown = format!("{ended}{thread}{listed:?}{}", server.log_tail());
    assert!(!shown.contains(KEY), "{shown}");
}

/// A graph of one tool; its failure is in `failure`.
fn tool(name: &str, of: &str, more: &str) -> String {
    format!(
        r#"
name: {name}
state: {{ with: {{ type: object, default: {{}} }}, text: {{}}, structured: {{}}, failure: {{}} }}
input: [with]
nodes:
  call:
    tool: {{ {of}, arguments: "${{state.with}}" }}
    {more}
    set: {{ text: "${{output.text}}", structured: "${{output.structured}}" }}
    on_error: failed
  failed: {{ set: {{ failure: "${{error}}" }} }}
edges: [ start -> call -> end, failed -> end ]
"#
    )
}

#[sqlx::test]
async fn a_tool_is_called_once_with_its_key_and_what_fails_is_told(pool: PgPool) {
    let graphs = [
        ("add", tool("add", "server: s, name: add", "")),
        ("echo", tool("echo", "server: s, name: echo", "")),
        ("fail", tool("fail", "server: s, name: fail", "")),
        ("none", tool("none", "server: s, name: none", "")),
        ("nowhere", tool("nowhere", "server: nowhere, name: x", "")),
        ("die", tool("die", "server: s, name: die", "effects: fail")),
        ("die_asks", tool("die_asks", "server: s, name: die", "")),
    ];
    let graphs: Vec<(&str, &str)> =
        graphs.iter().map(|(name, text)| (*name, text.as_str())).collect();
    let desk = Desk::new(&pool, &graphs).await;
    let server = desk.site.start(&Start::default()).await;
    let client = server.client();

    let (run, sum) = values(&client, "add", json!({ "with": { "list": [1, 2, 3] } })).await;
    assert_eq!((&sum["structured"], &sum["text"]), (&json!({ "n": 6 }), &json!("sum")));
    let listed = effects(&client, &run).await;
    let [effect] = listed.as_slice() else { panic!("{listed:?}") };
    let told = ["kind", "target", "effect", "status"].map(|name| effect[name].clone());
    assert_eq!(told, ["tool", "s/add", "idempotent", "done"]);
    assert_eq!(effect["request"], json!({ "list": [1, 2, 3] }));
    let key = effect["idempotency_key"].as_str().unwrap().to_owned();
    assert_eq!(desk.tool_calls(), [("add".to_owned(), key)]);

    // What only looks leaves no record.
    let (run, _) = values(&client, "echo", json!({})).await;
    assert_eq!(effects(&client, &run).await, [Value::Null; 0]);

    for (graph, kind, status) in [
        ("add", "invalid_arguments", Some("failed")),
        ("fail", "tool_error", Some("failed")),
        ("none", "unknown_tool", None),
        ("nowhere", "unknown_server", None),
        ("die", "unknown_outcome", Some("unknown")),
    ] {
        let (run, values) = values(&client, graph, json!({ "with": { "a": 1 } })).await;
        assert_eq!(values["failure"]["kind"], kind, "{graph}: {values}");
        let statuses: Vec<Value> =
            effects(&client, &run).await.iter().map(|effect| effect["status"].clone()).collect();
        assert_eq!(statuses, status.map_or(vec![], |status| vec![json!(status)]), "{graph}");
    }
    assert_eq!(desk.tool_calls().len(), 4, "{:?}", desk.tool_calls());

    // Nobody knows whether it happened: a person says that it did.
    let (thread, run) = start(&client, "die_asks", json!({})).await;
    let (_, asking) = end(&client, &thread, &run).await;
    let question = asking["interrupts"].as_object().unwrap().values().next().unwrap()[0].clone();
    assert_eq!(question["value"]["reason"], "unknown_outcome");
    assert_eq!(question["value"]["sent"]["target"], "s/die");
    let resume = json!({ "command": { "resume": { "action": "done", "output": "it is dead" } } });
    let run = super::start_on(&client, &thread, "die_asks", resume).await;
    let (ended, thread) = end(&client, &thread, &run).await;
    assert_eq!(
        (&ended["status"], &thread["values"]["text"]),
        (&json!("success"), &json!("it is dead"))
    );
    assert_eq!(desk.tool_calls().len(), 5);
}
