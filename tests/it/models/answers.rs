//! What comes back when all goes well, and when endpoints differ in what they know.

use std::time::Duration;

use cynai::models::embed::EmbedRequest;
use cynai::models::failure::FailureKind;
use cynai::models::json::JsonForm;
use cynai::models::messages::{Message, Role};
use cynai::models::request::{ResponseFormat, ToolSpec};
use serde_json::{Value, json};

use super::*;
use crate::support::model_endpoint::{Script, ending, event};

#[tokio::test]
async fn an_answer_has_its_text_usage_cost_and_history() {
    let endpoint = ModelEndpoint::start().await;
    endpoint.plays([Script::text(&["Hel", "lo"])]);
    let price = json!({ "price": { "input": 1000, "output": 10_000 } });
    let (answer, deltas) = ask(&models_like(&[&endpoint], &price)).await;
    let answer = answer.unwrap();
    assert_eq!(answer.message.text(), "Hello");
    assert_eq!(deltas, [text("Hel"), text("lo")]);
    assert_eq!((answer.model.as_str(), answer.endpoint.as_str()), ("m-served", "a"));
    assert_eq!((answer.usage.input, answer.usage.output, answer.usage.total), (10, 2, 12));
    assert!((answer.usage.cost_usd.unwrap() - 0.03).abs() < 1e-9);
    assert_eq!(outcomes(&answer), [("a", None)]);
    assert!(answer.time_to_first_token.unwrap() <= answer.total_time);
    let written = answer.message.to_langchain();
    assert_eq!(written["usage_metadata"]["total_tokens"], 12);
    assert_eq!(written["response_metadata"]["finish_reason"], "stop");
    let call = &endpoint.calls()[0];
    assert_eq!((call.method.as_str(), call.path.as_str()), ("POST", "/v1/chat/completions"));
    assert_eq!(call.headers["idempotency-key"], "k-1");
    assert!(!call.headers.contains_key("authorization"));
    assert_eq!(call.body["stream_options"]["include_usage"], true);
}

#[tokio::test]
async fn pieces_arrive_while_the_answer_is_still_under_way() {
    let endpoint = ModelEndpoint::start().await;
    endpoint.plays([Script::slowly(&["a", "b"], Duration::from_millis(150))]);
    let (sink, mut pieces) = tokio::sync::mpsc::unbounded_channel();
    let models = models(&[&endpoint]);
    let request = request();
    let asking = models.chat(&request, &sink);
    tokio::pin!(asking);
    let first = tokio::select! {
        _ = &mut asking => panic!("the answer came before its first piece"),
        piece = pieces.recv() => piece.unwrap(),
    };
    assert_eq!(first, text("a"));
    assert_eq!(asking.await.unwrap().message.text(), "ab");
}

#[tokio::test]
async fn a_tool_that_nobody_knows_and_broken_arguments_are_passed_on() {
    let endpoint = ModelEndpoint::start().await;
    let call = |index: usize, name: &str, arguments: &str| {
        event(
            json!({"tool_calls": [{"index": index, "id": format!("call-{index}"), "type": "function",
            "function": {"name": name, "arguments": arguments}}]}),
        )
    };
    let calls =
        [call(0, "no_such_tool", "{\"x\": 1}"), call(1, "look", "{\"x\": "), ending("tool_calls")];
    endpoint.plays([Script::stream(calls.concat())]);
    let mut request = request();
    request.tools =
        vec![ToolSpec { name: "look".into(), description: String::new(), parameters: json!({}) }];
    request.messages.push(Message::tool("call-9", "seen"));
    let (answer, deltas) = ask_for(&models(&[&endpoint]), &request).await;
    let answer = answer.unwrap();
    assert_eq!(answer.message.tool_calls[0].name, "no_such_tool");
    assert_eq!(answer.message.invalid_tool_calls[0].args, "{\"x\": ");
    assert_eq!((deltas.len(), answer.finish_reason.as_str()), (2, "tool_calls"));
    let sent = &endpoint.calls()[0].body;
    assert_eq!(sent["tools"][0]["function"]["name"], "look");
    assert_eq!(
        sent["messages"][1],
        json!({"role": "tool", "content": "seen", "tool_call_id": "call-9"})
    );
}

#[tokio::test]
async fn an_endpoint_that_refuses_streams_is_asked_without_and_remembered() {
    let endpoint = ModelEndpoint::start().await;
    endpoint.plays([Script::error("400 Bad Request", "streaming is not supported by this model")]);
    let models = models(&[&endpoint]);
    let (answer, deltas) = ask(&models).await;
    let answer = answer.unwrap();
    assert_eq!((answer.message.text().as_str(), deltas), ("ok", vec![text("ok")]));
    assert_eq!(outcomes(&answer), [("a", None)]);
    assert!(ask(&models).await.0.is_ok());
    let streamed: Vec<bool> = endpoint.calls().iter().map(|call| call.streamed()).collect();
    assert_eq!(streamed, [true, false, false]);
}

#[tokio::test]
async fn an_endpoint_that_ignores_streams_is_understood() {
    let endpoint = ModelEndpoint::start().await;
    endpoint.plays([Script::whole("whole")]);
    let models = models(&[&endpoint]);
    assert_eq!(ask(&models).await.0.unwrap().message.text(), "whole");
    // Without a stream the answer may take longer than a first token may.
    let slow = Script::default().wait(Duration::from_millis(900));
    endpoint.plays([Script([slow.0, Script::whole("late").0].concat())]);
    assert_eq!(ask(&models).await.0.unwrap().message.text(), "late");
    assert!(!endpoint.calls()[1].streamed());
}

#[tokio::test]
async fn what_an_endpoint_does_not_know_is_left_out() {
    let endpoint = ModelEndpoint::start().await;
    endpoint.plays([
        Script::error("400 Bad Request", "unknown field: stream_options"),
        Script::error("400 Bad Request", "use 'max_completion_tokens' instead of max_tokens"),
        // This one does not even say what it minds.
        Script::error("400 Bad Request", "bad request"),
    ]);
    let mut request = request();
    request.max_tokens = Some(9);
    request.response_format = Some(ResponseFormat::JsonObject);
    let (answer, _) = ask_for(&models(&[&endpoint]), &request).await;
    assert_eq!(outcomes(&answer.unwrap()), [("a", None)]);
    let calls = endpoint.calls();
    let last = &calls[3].body;
    assert_eq!((calls.len(), &last["max_completion_tokens"]), (4, &json!(9)));
    for gone in ["stream_options", "max_tokens", "response_format"] {
        assert_eq!(last.get(gone), None, "{gone}");
    }
    // It is the same effect all along.
    assert_eq!(endpoint.calls_by_key(), [("k-1".to_owned(), 4)].into());
}

#[tokio::test]
async fn a_model_is_named_by_route_or_by_endpoint() {
    let endpoint = ModelEndpoint::start().await;
    let models = models(&[&endpoint]);
    let asked = async |name: &str| {
        let mut request = request();
        request.model = name.to_owned();
        ask_for(&models, &request).await.0
    };
    asked("default").await.unwrap();
    asked("a/org/big:7b").await.unwrap();
    let named: Vec<Value> =
        endpoint.calls().iter().map(|call| call.body["model"].clone()).collect();
    assert_eq!(named, ["m", "org/big:7b"]);
    let unknown = asked("defualt").await.unwrap_err();
    assert_eq!(unknown.kind(), FailureKind::NotFound);
    let message = unknown.to_string();
    assert!(
        message.contains("did you mean `default`?") && message.contains("ENDPOINT/MODEL"),
        "{message}"
    );
    assert!(asked("x/m").await.is_err() && asked("a/").await.is_err());
    assert_eq!(endpoint.calls().len(), 2);
}

#[tokio::test]
async fn a_request_that_cannot_be_sent_is_refused_before_anybody_is_asked() {
    let endpoint = ModelEndpoint::start().await;
    let mut request = request();
    let image =
        json!({"role": "user", "content": [{"type": "image_url", "image_url": "artifact://1"}]});
    request.messages.push(serde_json::from_value(image).unwrap());
    let (refused, _) = ask_for(&models(&[&endpoint]), &request).await;
    let message = refused.unwrap_err().to_string();
    assert!(
        message.starts_with("messages[1].content[0].image_url: an image is sent as"),
        "{message}"
    );
    assert!(endpoint.calls().is_empty());
}

#[tokio::test]
async fn no_more_calls_than_allowed_are_under_way_at_once() {
    let endpoint = ModelEndpoint::start().await;
    let slow = || Script::slowly(&["a"], Duration::from_millis(60));
    endpoint.plays((0..6).map(|_| slow()));
    let models = models_like(&[&endpoint], &json!({ "max_parallel": 2 }));
    let asking: Vec<_> = (0..6).map(|_| ask(&models)).collect();
    for (answer, _) in futures::future::join_all(asking).await {
        assert_eq!(answer.unwrap().message.text(), "a");
    }
    assert_eq!(endpoint.most_open(), 2);
    // Where no slot gets free in time, the call says so.
    endpoint
        .plays([Script::slowly(&["a"; 8], Duration::from_millis(150)), Script::default().hang()]);
    let models = models_like(&[&endpoint], &json!({ "max_parallel": 1 }));
    let ((_, _), (second, _)) = tokio::join!(ask(&models), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        ask(&models).await
    });
    let busy = second.unwrap_err();
    assert_eq!(busy.kind(), FailureKind::Busy);
    assert!(busy.is_transient() && busy.to_string().contains("`max_parallel`"), "{busy}");
}

#[tokio::test]
async fn a_conversation_in_langchains_form_reaches_the_endpoint_in_openais() {
    let endpoint = ModelEndpoint::start().await;
    let mut request = request();
    request.messages = [
        json!({"type": "system", "content": "be brief"}),
        json!({"type": "human", "content": "look"}),
        json!({"type": "ai", "content": "", "tool_calls": [{"id": "c", "name": "look", "args": {"at": 1}}]}),
        json!({"type": "tool", "content": "seen", "tool_call_id": "c"}),
    ]
    .iter()
    .map(|message| Message::read(message).unwrap())
    .collect();
    assert_eq!(request.messages[2].role, Role::Ai);
    ask_for(&models(&[&endpoint]), &request).await.0.unwrap();
    assert_eq!(
        endpoint.calls()[0].body["messages"],
        json!([
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "look"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{\"at\":1}"}}]},
            {"role": "tool", "content": "seen", "tool_call_id": "c"},
        ])
    );
}

#[tokio::test]
async fn calls_can_be_made_from_tasks_that_move_between_threads() {
    let endpoint = ModelEndpoint::start().await;
    let models = models(&[&endpoint]);
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn({
        let models = models.clone();
        async move { models.chat(&request(), &()).await.map(drop) }
    });
    tasks.spawn({
        let models = models.clone();
        async move {
            let schema = json!(true);
            let form = JsonForm { name: "any", schema: &schema, max_repairs: 0 };
            // `ok` is no JSON.
            models.chat_json(&request(), &form, &()).await.map(drop).or(Ok(()))
        }
    });
    tasks.spawn({
        let models = models.clone();
        let request = EmbedRequest { texts: vec!["x".to_owned()], ..EmbedRequest::default() };
        async move { models.embed(&request).await.map(drop) }
    });
    tasks.spawn(async move {
        drop(models.list().await);
        Ok(())
    });
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap().unwrap();
    }
    assert_eq!(endpoint.calls().len(), 4);
}

#[tokio::test]
async fn the_list_shows_what_answers_and_what_does_not() {
    let (good, bad) = (ModelEndpoint::start().await, ModelEndpoint::start().await);
    bad.plays([Script::error("503 Service Unavailable", "Loading model")]);
    let listing = models(&[&good, &bad]).list().await;
    assert_eq!(listing.routes["default"], ["a/m", "b/m"]);
    let found: Vec<_> = listing
        .endpoints
        .iter()
        .map(|one| (one.name.as_str(), one.failure, one.models.len()))
        .collect();
    assert_eq!(found, [("a", None, 1), ("b", Some(FailureKind::Overloaded), 0)]);
    assert!(listing.endpoints[1].problem.as_ref().unwrap().contains("Loading model"));
}
