//! Answers of a form: with the endpoint's help, with less, with none.

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;

use super::super::{effects, end, start};
use super::{Kind, Lab, on_both};
use crate::support::client::Client;
use crate::support::server::Start;

/// Of a size that no model can exceed. `MODEL` is a route or an endpoint.
const SORT: &str = r#"
name: sort
state: { say: { type: string }, out: {}, failure: {} }
input: [say]
nodes:
  think:
    model:
      model: MODEL
      prompt: "{{ state.say }}"
      schema:
        type: object
        properties:
          animal: { type: string, enum: [cat, dog, fish] }
          legs: { type: integer, enum: [0, 2, 4] }
          tame: { type: boolean }
        required: [animal, legs, tame]
        additionalProperties: false
      repairs: REPAIRS
      sampling: { temperature: 0, max_tokens: 100 }
    set: { out: "${output}" }
    on_error: failed
  failed: { set: { failure: "${error}" } }
edges: [ start -> think -> end, failed -> end ]
"#;

const SAY: [&str; 2] = ["Which animal says meow?", "Which animal lives in the sea?"];

fn sort(model: &str, repairs: u32) -> String {
    SORT.replace("MODEL", model).replace("REPAIRS", &repairs.to_string())
}

fn fits(value: &Value) -> bool {
    let animals = [json!("cat"), json!("dog"), json!("fish")];
    let legs = [json!(0), json!(2), json!(4)];
    value.as_object().is_some_and(|fields| fields.len() == 3)
        && animals.contains(&value["animal"])
        && legs.contains(&value["legs"])
        && value["tame"].is_boolean()
}

/// The values at the end of two runs at a time, and their ids.
async fn two(client: &Client) -> Vec<(String, Value)> {
    let runs = SAY.map(|say| start(client, "sort", json!({ "input": { "say": say } })));
    let mut values = Vec::new();
    for (thread, run) in futures::future::join_all(runs).await {
        let (ended, thread) = end(client, &thread, &run).await;
        assert_eq!(ended["status"], "success", "{ended}");
        values.push((run, thread["values"].clone()));
    }
    values
}

/// How many calls of an endpoint had this outcome, as it is counted.
async fn counted(client: &Client, endpoint: &str, outcome: &str) -> u64 {
    let answer = client.request(Method::GET, "/metrics").send().await.unwrap();
    let text = answer.error_for_status().unwrap().text().await.unwrap();
    let found = text.lines().find(|line| {
        line.starts_with("cynai_model_calls_total{")
            && line.contains(&format!("endpoint=\"{endpoint}\""))
            && line.contains(&format!("outcome=\"{outcome}\""))
    });
    found.map_or(0, |line| line.rsplit_once(' ').unwrap().1.parse().unwrap())
}

on_both!(an_endpoint_that_helps_gives_the_form_at_once);

async fn an_endpoint_that_helps_gives_the_form_at_once(kind: Kind, pool: PgPool) {
    let lab = Lab::new(kind, &pool, &[("sort", &sort("default", 2))]).await;
    let server = lab.site.start(&Start::default()).await;
    let client = server.client();
    for (_, got) in two(&client).await {
        assert!(fits(&got["out"]["json"]), "{got}");
        assert_eq!((&got["out"]["repairs"], &got["out"]["attempts"]), (&json!(0), &json!(1)));
        assert_eq!(got["out"]["finish_reason"], "stop");
    }
    assert_eq!(counted(&client, "e", "ok").await, 2);
}

/// The model answers in prose, is told what is wrong, and is helped then.
#[sqlx::test]
async fn what_does_not_fit_is_sent_back_and_comes_repaired_node(pool: PgPool) {
    let model = format!("late/{}", super::NAME);
    let lab = Lab::new(Kind::Node, &pool, &[("sort", &sort(&model, 2))]).await;
    let server = lab.site.start(&Start::default()).await;
    let client = server.client();
    for (run, got) in two(&client).await {
        assert!(fits(&got["out"]["json"]), "{got}");
        assert_eq!((&got["out"]["repairs"], &got["out"]["attempts"]), (&json!(1), &json!(2)));
        // Both answers were paid for: the form alone needs less than the prose and the form.
        let usage = &got["out"]["usage"];
        assert!(usage["input"].as_u64().unwrap() > 200, "{usage}");
        assert_eq!(got["out"]["message"]["usage_metadata"]["total_tokens"], usage["total"]);
        let told = effects(&client, &run).await;
        assert_eq!(
            (told.len(), &told[0]["status"], &told[0]["sends"]),
            (1, &json!("done"), &json!(1))
        );
    }
    assert_eq!(counted(&client, "late", "ok").await, 4);
}

/// No help at all, as `response_format` is ignored or refused: a model of this size cannot do it.
#[sqlx::test]
async fn a_model_that_cannot_is_given_up_with_a_clear_error_node(pool: PgPool) {
    let cases = [("plain", 3), ("strict", 1)];
    let model = |endpoint: &str| format!("{endpoint}/{}", super::NAME);
    let files = cases.map(|(endpoint, repairs)| {
        sort(&model(endpoint), repairs).replace("name: sort", &format!("name: {endpoint}"))
    });
    let graphs = [("plain", files[0].as_str()), ("strict", files[1].as_str())];
    let lab = Lab::new(Kind::Node, &pool, &graphs).await;
    let server = lab.site.start(&Start::default()).await;
    let client = server.client();
    for (endpoint, repairs) in cases {
        let (thread, run) = start(&client, endpoint, json!({ "input": { "say": SAY[0] } })).await;
        let (_, thread) = end(&client, &thread, &run).await;
        let failure = &thread["values"]["failure"];
        assert_eq!(failure["kind"], "invalid_json", "{thread}");
        let message = failure["message"].as_str().unwrap();
        let wanted = format!(
            "the answer of `{}` does not match the schema after {repairs} repairs: the answer is no JSON",
            model(endpoint)
        );
        assert!(message.starts_with(&wanted), "{message}");
        assert_eq!(counted(&client, endpoint, "ok").await, u64::from(repairs) + 1);
        // A refusal of what can be left out is no failed attempt.
        for outcome in ["bad_request", "unsupported"] {
            assert_eq!(counted(&client, endpoint, outcome).await, 0);
        }
        let told = effects(&client, &run).await;
        assert_eq!((told.len(), &told[0]["status"]), (1, &json!("failed")));
    }
}
