//! Answers that must match a schema.

use cynai::models::failure::{FailureKind, ModelError};
use cynai::models::json::JsonForm;
use serde_json::{Value, json};

use super::*;
use crate::support::model_endpoint::{ModelEndpoint, Script};

fn schema() -> Value {
    json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
}

async fn ask_json(
    endpoint: &ModelEndpoint,
    max_repairs: u32,
) -> (Result<cynai::models::json::JsonAnswer, ModelError>, Vec<Delta>) {
    let models = models_like(&[endpoint], &json!({ "price": { "input": 1000, "output": 0 } }));
    let (request, schema) = (request(), schema());
    let form = JsonForm { name: "count", schema: &schema, max_repairs };
    let sink = Mutex::new(Vec::new());
    let answer = models.chat_json(&request, &form, &sink).await;
    (answer, sink.into_inner().unwrap())
}

#[tokio::test]
async fn a_good_answer_is_taken_even_from_a_fence() {
    let endpoint = ModelEndpoint::start().await;
    endpoint.plays([Script::text(&["```json\n{\"n\":", " 7}\n```"])]);
    let answer = ask_json(&endpoint, 0).await.0.unwrap();
    assert_eq!((answer.value, answer.repairs), (json!({"n": 7}), 0));
    let sent = &endpoint.calls()[0].body;
    assert_eq!(sent["response_format"]["json_schema"]["schema"], schema());
    let instruction = sent["messages"][0]["content"].as_str().unwrap();
    assert!(
        sent["messages"][0]["role"] == "system" && instruction.contains("\"required\":[\"n\"]")
    );
}

#[tokio::test]
async fn a_wrong_answer_is_sent_back_with_what_is_wrong() {
    let endpoint = ModelEndpoint::start().await;
    endpoint.plays([
        Script::text(&["{\"n\": \"seven\"}"]),
        Script::text(&["Sorry!"]),
        Script::text(&["{\"n\": 7}"]),
    ]);
    let (answer, deltas) = ask_json(&endpoint, 3).await;
    let answer = answer.unwrap();
    assert_eq!((answer.value, answer.repairs), (json!({"n": 7}), 2));
    assert_eq!((answer.answer.usage.input, answer.answer.usage.total), (30, 36));
    assert!((answer.answer.usage.cost_usd.unwrap() - 0.03).abs() < 1e-9);
    assert_eq!(answer.answer.attempts.len(), 3);
    assert_eq!(deltas.iter().filter(|delta| **delta == Delta::Restart).count(), 2);
    let calls = endpoint.calls();
    let last = calls[2].body["messages"].as_array().unwrap();
    assert_eq!((last.len(), &last[2]["content"]), (6, &json!("{\"n\": \"seven\"}")));
    let complaint = last[3]["content"].as_str().unwrap();
    assert!(complaint.contains("/n: \"seven\" is not of type \"integer\""), "{complaint}");
    assert!(last[5]["content"].as_str().unwrap().contains("the answer is no JSON"));
    // Each is an effect of its own.
    let keys: Vec<String> = endpoint.calls_by_key().into_keys().collect();
    assert_eq!(keys, ["k-1", "k-1.repair1", "k-1.repair2"]);
}

#[tokio::test]
async fn after_the_bound_the_last_errors_are_told() {
    let endpoint = ModelEndpoint::start().await;
    endpoint.plays((0..2).map(|_| Script::text(&["{}"])));
    let err = ask_json(&endpoint, 1).await.0.unwrap_err();
    assert_eq!(err.kind(), FailureKind::InvalidJson);
    assert!(
        err.to_string().contains("after 1 repairs: the whole value: \"n\" is a required"),
        "{err}"
    );
    let ModelError::InvalidJson { answer, .. } = err else { panic!("{err}") };
    assert_eq!((answer.usage.input, endpoint.calls().len()), (20, 2));
}

#[tokio::test]
async fn an_endpoint_that_refuses_the_form_is_asked_without() {
    let endpoint = ModelEndpoint::start().await;
    endpoint.plays([
        Script::error("400 Bad Request", "'response_format' is not supported"),
        Script::text(&["{\"n\": 7}"]),
    ]);
    assert_eq!(ask_json(&endpoint, 0).await.0.unwrap().value, json!({"n": 7}));
    let calls = endpoint.calls();
    assert!(calls[0].body.get("response_format").is_some());
    assert!(calls[1].body.get("response_format").is_none());
}

#[tokio::test]
async fn a_form_that_cannot_be_asked_for_is_refused() {
    let endpoint = ModelEndpoint::start().await;
    let models = models(&[&endpoint]);
    let asked = async |schema: Value, max_repairs: u32| {
        let form = JsonForm { name: "n", schema: &schema, max_repairs };
        models.chat_json(&request(), &form, &()).await.unwrap_err().to_string()
    };
    assert!(asked(json!({"type": "nonsense"}), 0).await.starts_with("schema: "));
    assert!(asked(json!({}), 4).await.contains("max_repairs: must be 0 to 3"));
    assert!(asked(json!({"$ref": "http://127.0.0.1:1/schema"}), 0).await.starts_with("schema: "));
    assert!(endpoint.calls().is_empty());
}
