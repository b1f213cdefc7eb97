//! Streams that break the rules, or keep them in ways of their own.

use std::time::{Duration, Instant};

use cynai::models::failure::FailureKind;
use serde_json::json;

use super::*;
use crate::support::model_endpoint::{Script, ending, event, head};

/// Models whose route asks once.
fn once_each(endpoint: &ModelEndpoint) -> Models {
    let times = json!({ "connect": "1s", "first_token": "600ms", "idle": "500ms", "total": "5s" });
    let models = json!({
        "endpoints": {"a": {"url": endpoint.url, "timeouts": times, "max_answer": "64KiB"}},
        "routes": {"default": [{"endpoint": "a", "model": "m", "attempts": 1}]},
    });
    models_with(models, &[])
}

/// What one answer comes to.
async fn outcome(script: Script) -> Result<String, FailureKind> {
    let endpoint = ModelEndpoint::start().await;
    endpoint.plays([script]);
    let (answer, _) = ask(&once_each(&endpoint)).await;
    if let Err(err) = &answer {
        assert_eq!(err.attempts().len(), 1, "{err}");
    }
    answer.map(|answer| answer.message.text()).map_err(|err| err.kind())
}

fn piece(text: &str) -> String {
    event(json!({ "content": text }))
}

#[tokio::test]
async fn streams_of_all_accents_are_understood() {
    let usual = format!("{}{}{}", piece("Hä"), piece("llo"), ending("stop"));
    let crlf = usual.replace('\n', "\r\n");
    assert_eq!(outcome(Script::stream(&crlf)).await.unwrap(), "Hällo");
    let commented = format!(": ping\n\nevent: message\nid: 7\n{usual}");
    assert_eq!(outcome(Script::stream(&commented)).await.unwrap(), "Hällo");
    // Byte by byte, so that every character and every line end is torn once.
    let mut torn = Script::stream("");
    for byte in crlf.bytes().take(400) {
        torn = torn.then([byte]).wait(Duration::from_micros(10));
    }
    let torn = torn.then(&crlf.as_bytes()[400..]);
    assert_eq!(outcome(torn).await.unwrap(), "Hällo");
    assert_eq!(outcome(Script::chunked(usual.as_bytes(), 7)).await.unwrap(), "Hällo");
}

#[tokio::test]
async fn a_connection_is_used_again_after_a_stream() {
    let endpoint = ModelEndpoint::start().await;
    let usual = format!("{}{}", piece("x"), ending("stop"));
    endpoint.plays((0..3).map(|_| Script::chunked(usual.as_bytes(), 1000)));
    let models = models(&[&endpoint]);
    for _ in 0..3 {
        assert_eq!(ask(&models).await.0.unwrap().message.text(), "x");
        // The pool takes it back a moment after the answer.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!((endpoint.calls().len(), endpoint.connections()), (3, 1));
}

#[tokio::test]
async fn a_missing_announcement_of_the_end_is_no_failure() {
    let usual = format!("{}{}", piece("x"), ending("stop"));
    let silent = usual.replace("data: [DONE]\n\n", "");
    assert_eq!(outcome(Script::stream(&silent)).await.unwrap(), "x");
    // Neither is one that stays open, or is reset, after the model has finished.
    let started = Instant::now();
    assert_eq!(outcome(Script::stream(&silent).hang()).await.unwrap(), "x");
    assert!(started.elapsed() < Duration::from_secs(2));
    let reset = Script::stream(&silent).wait(Duration::from_millis(50)).reset();
    assert_eq!(outcome(reset).await.unwrap(), "x");
    // Nor is one that goes wrong then.
    let late = format!("{silent}data: {}\n\ndata: {{\n\n", json!({"error": {"message": "late"}}));
    assert_eq!(outcome(Script::stream(late)).await.unwrap(), "x");
    // The announcement alone is enough, too; the model's reason is then unknown.
    let abrupt = format!("{}data: [DONE]\n\n", piece("x"));
    assert_eq!(outcome(Script::stream(abrupt)).await.unwrap(), "x");
}

#[tokio::test]
async fn a_stream_that_ends_early_is_cut() {
    let cut = Err(FailureKind::Cut);
    assert_eq!(outcome(Script::stream(piece("x"))).await, cut);
    assert_eq!(outcome(Script::stream("")).await, cut);
    assert_eq!(outcome(Script::stream("data: [DONE]\n\n")).await, cut);
    let whole = piece("x");
    let (half, _) = whole.split_at(whole.len() - 20);
    assert_eq!(outcome(Script::stream(format!("{}{half}", piece("y")))).await, cut);
    let reset = Script::stream(piece("x")).wait(Duration::from_millis(50)).reset();
    assert_eq!(outcome(reset).await, cut);
    let short = head("200 OK", "content-type: text/event-stream\r\ncontent-length: 5000\r\n");
    assert_eq!(outcome(Script::default().then(short).then(piece("x"))).await, cut);
}

#[tokio::test]
async fn what_is_no_event_of_the_protocol_is_malformed() {
    let malformed = Err(FailureKind::Malformed);
    for body in [
        "data: {\"choices\": [\n\n".to_owned(),
        "data: <html>\n\n".to_owned(),
        "data: {\"choices\": \"x\"}\n\n".to_owned(),
        "data: [1, 2]\n\n".to_owned(),
        "data: {\"n\": 1e999}\n\n".to_owned(),
        format!("data: {}\n\n", "[".repeat(5000)),
        format!("{}{}", piece("x"), event(json!({"content": 7}))),
        format!("{}{}", piece("x"), event(json!({"tool_calls": "x"}))),
    ] {
        assert_eq!(outcome(Script::stream(&body)).await, malformed, "{body:.60}");
    }
    let invalid = Script::stream("data: {\"choices\": [{\"delta\": {\"content\": \"")
        .then(b"\xff\xfe\"}}]}\n\n");
    assert_eq!(outcome(invalid).await, malformed);
    let page = head("200 OK", "content-type: text/html\r\n");
    assert_eq!(outcome(Script::default().then(page).then("<html>")).await, malformed);
    let cut_json = head("200 OK", "content-type: application/json\r\ncontent-length: 12\r\n");
    assert_eq!(outcome(Script::default().then(cut_json).then("{\"choices\": ")).await, malformed);
}

#[tokio::test]
async fn an_answer_of_any_length_is_read_only_to_the_limit() {
    let large = Err(FailureKind::TooLarge);
    let ten_megabytes = "x".repeat(10 << 20);
    let in_pieces = piece("x").repeat((10 << 20) / 100);
    let one_event = piece(&ten_megabytes);
    let whole = Script::whole(&ten_megabytes);
    for script in [
        Script::stream(in_pieces),
        Script::stream(one_event),
        Script::stream(&ten_megabytes),
        whole,
    ] {
        let started = Instant::now();
        assert_eq!(outcome(script).await, large);
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    }
    let endpoint = ModelEndpoint::start().await;
    endpoint.plays([Script::whole(&ten_megabytes)]);
    let message = ask(&once_each(&endpoint)).await.0.unwrap_err().to_string();
    assert!(message.contains("over 64 KiB, the endpoint's `max_answer`"), "{message}");
}

#[tokio::test]
async fn an_error_inside_of_a_stream_has_its_kind() {
    let error = |error: serde_json::Value| {
        format!("{}data: {}\n\ndata: [DONE]\n\n", piece("x"), json!({"error": error}))
    };
    let overloaded = error(json!({"message": "out of memory", "type": "server_error"}));
    assert_eq!(outcome(Script::stream(overloaded)).await, Err(FailureKind::Overloaded));
    let limited = error(json!({"message": "slow", "code": 429}));
    assert_eq!(outcome(Script::stream(limited)).await, Err(FailureKind::RateLimited));
    let event = "event: error\ndata: {\"message\": \"broken\"}\n\n";
    assert_eq!(outcome(Script::stream(event)).await, Err(FailureKind::Overloaded));
}

#[tokio::test]
async fn another_attempt_after_some_pieces_tells_the_reader_to_start_again() {
    let (first, second) = (ModelEndpoint::start().await, ModelEndpoint::start().await);
    first.plays([
        Script::stream(piece("wrong ")),
        Script::stream(format!("{}data: {{\n\n", piece("bad "))),
    ]);
    second.plays([Script::text(&["right"])]);
    let (answer, deltas) = ask(&models(&[&first, &second])).await;
    let answer = answer.unwrap();
    assert_eq!(answer.message.text(), "right");
    assert_eq!(
        deltas,
        [text("wrong "), Delta::Restart, text("bad "), Delta::Restart, text("right")]
    );
    let expected =
        [("a", Some(FailureKind::Cut)), ("a", Some(FailureKind::Malformed)), ("b", None)];
    assert_eq!(outcomes(&answer), expected);
    assert_eq!(first.calls_by_key(), [("k-1".to_owned(), 2)].into());
    assert_eq!(second.calls_by_key(), [("k-1".to_owned(), 1)].into());
}

#[tokio::test]
async fn a_refusal_after_some_pieces_makes_the_reader_start_again_as_well() {
    let endpoint = ModelEndpoint::start().await;
    let refusal = json!({"error": {"message": "streaming is not supported", "code": 400}});
    endpoint.plays([Script::stream(format!("{}data: {refusal}\n\n", piece("x")))]);
    let (answer, deltas) = ask(&models(&[&endpoint])).await;
    assert_eq!(outcomes(&answer.unwrap()), [("a", None)]);
    assert_eq!(deltas, [text("x"), Delta::Restart, text("ok")]);
}

#[tokio::test]
async fn dropping_the_call_ends_the_request() {
    let endpoint = ModelEndpoint::start().await;
    endpoint.plays([Script::stream(piece("x")).hang(), Script::default().hang()]);
    let models = models_like(&[&endpoint], &json!({ "max_parallel": 1 }));
    for _ in 0..2 {
        let asking = tokio::time::timeout(Duration::from_millis(100), ask(&models));
        assert!(asking.await.is_err());
    }
    // Its slot is free again at once.
    assert!(ask(&models).await.0.is_ok());
}
