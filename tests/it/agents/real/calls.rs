//! An agent that calls a tool of a real server.

use serde_json::{Value, json};
use sqlx::PgPool;

use super::super::{effects, end, start};
use super::{Kind, Lab, on_both};
use crate::support::server::Start;
use crate::tools::real::servers;

/// Examples show a model of this size what it is to do.
const REPEAT: &str = r#"
name: repeat
state: { words: { type: string }, before: { type: array, items: {} }, out: {} }
input: [words, before]
nodes:
  work:
    agent:
      messages: ${state.before}
      prompt: "Echo: {{ state.words }}"
      tools: [s/echo]
      tool_choice: required
      limits: { turns: 3 }
      sampling: { temperature: 0, max_tokens: 120 }
    set: { out: "${output}" }
edges: [ start -> work -> end ]
"#;

const EXAMPLES: [&str; 4] = ["good morning", "the sky is blue", "birds can fly", "one two three"];

/// A conversation in which it was done a few times.
fn examples() -> Vec<Value> {
    let example = |(at, words): (usize, &&str)| {
        let id = format!("example-{at}");
        let call = json!({ "id": id, "name": "s__echo", "args": { "message": words } });
        [
            json!({ "type": "human", "content": format!("Echo: {words}") }),
            json!({ "type": "ai", "content": "", "tool_calls": [call] }),
            json!({ "type": "tool", "content": format!("Echo: {words}"), "tool_call_id": id }),
            json!({ "type": "ai", "content": words }),
        ]
    };
    EXAMPLES.iter().enumerate().flat_map(example).collect()
}

on_both!(an_agent_calls_a_tool_and_goes_on_with_its_answer);

async fn an_agent_calls_a_tool_and_goes_on_with_its_answer(kind: Kind, pool: PgPool) {
    let everything = servers().await.join("node_modules/.bin/mcp-server-everything");
    let tools = json!({ "s": { "command": [everything, "stdio"] } });
    let lab = Lab::with_tools(kind, &pool, &[("repeat", REPEAT)], tools).await;
    let server = lab.site.start(&Start::default()).await;
    let client = server.client();
    let runs = ["hello world", "it rains"].map(|words| {
        let input = json!({ "words": words, "before": examples() });
        start(&client, "repeat", json!({ "input": input }))
    });
    for (thread, run) in futures::future::join_all(runs).await {
        let (ended, thread) = end(&client, &thread, &run).await;
        assert_eq!(ended["status"], "success", "{}", ended["error"]);
        let out = &thread["values"]["out"];
        let count = |name: &str| out[name].as_u64().unwrap();
        // Whether it stops by itself is a matter of wisdom.
        assert!((2..=3).contains(&count("turns")), "{out}");
        let stopped = &out["stopped"];
        assert!(stopped.is_null() || (stopped == "turns" && count("turns") == 3), "{out}");
        assert!(count("input_tokens") > 0 && count("output_tokens") > 0, "{out}");
        // After the examples and the question.
        let messages = out["messages"].as_array().unwrap();
        let after = &messages[examples().len() + 1..];
        let call = &after[0]["tool_calls"][0];
        assert_eq!((&after[0]["type"], &call["name"]), (&json!("ai"), &json!("s__echo")), "{out}");
        // The tool said what the model made it say, and the model went on from there.
        let said = call["args"]["message"].as_str().unwrap();
        let answer = ["type", "tool_call_id", "content"].map(|name| after[1][name].clone());
        assert_eq!(answer, [json!("tool"), call["id"].clone(), json!(format!("Echo: {said}"))]);
        assert_eq!(after[2]["type"], "ai");
        let ids = |list: &Value| -> Vec<Value> {
            list.as_array().into_iter().flatten().map(|call| call["id"].clone()).collect()
        };
        let called: Vec<Value> = after.iter().flat_map(|one| ids(&one["tool_calls"])).collect();
        let tools = after.iter().filter(|one| one["type"] == "tool");
        let answered: Vec<Value> = tools.map(|one| one["tool_call_id"].clone()).collect();
        assert_eq!(called, answered, "each call has its answer, and there is no other");
        let told = effects(&client, &run).await;
        let asked = told.iter().filter(|one| one["kind"] == "model").count();
        assert_eq!(u64::try_from(asked).unwrap(), count("turns"));
        assert!(told.iter().all(|one| one["status"] == "done" && one["sends"] == 1), "{told:?}");
    }
}
