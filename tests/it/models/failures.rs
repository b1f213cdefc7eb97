//! Endpoints that hang, refuse, or are not there; and what is done about it.

use std::time::{Duration, Instant};

use cynai::models::failure::FailureKind;
use serde_json::json;

use super::*;
use crate::support::model_endpoint::Script;

#[tokio::test]
async fn an_endpoint_that_hangs_before_or_in_its_answer_is_left_for_the_next() {
    for (script, kind) in [
        (Script::default().hang(), FailureKind::TimeoutFirstToken),
        (Script::stream("").hang(), FailureKind::TimeoutFirstToken),
        (Script::stream(": ping\n\n").hang(), FailureKind::TimeoutFirstToken),
        (
            Script::stream("data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n").hang(),
            FailureKind::TimeoutIdle,
        ),
    ] {
        let (first, second) = (ModelEndpoint::start().await, ModelEndpoint::start().await);
        first.plays([script]);
        let started = Instant::now();
        let (answer, _) = ask(&models(&[&first, &second])).await;
        // Another candidate is there, so a slow failure is not repeated.
        assert_eq!(outcomes(&answer.unwrap()), [("a", Some(kind)), ("b", None)]);
        let took = started.elapsed();
        assert!((400..2500).contains(&took.as_millis()), "{took:?}");
    }
}

#[tokio::test]
async fn comments_and_empty_pieces_do_not_count_as_progress() {
    let mut pings = Script::stream("");
    let mut empties = Script::stream("");
    for _ in 0..20 {
        pings = pings.then(": ping\n\n").wait(Duration::from_millis(50));
        let empty =
            "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n";
        empties = empties.then(empty).wait(Duration::from_millis(50));
    }
    let endpoint = ModelEndpoint::start().await;
    endpoint.plays([pings, empties]);
    let err = ask(&models(&[&endpoint])).await.0.unwrap_err();
    let kinds: Vec<_> = err.attempts().iter().filter_map(|one| one.failure).collect();
    assert_eq!(kinds, [FailureKind::TimeoutFirstToken; 2]);
    assert!(err.to_string().contains("600ms, the endpoint's `first_token` timeout"), "{err}");
}

#[tokio::test]
async fn the_time_for_everything_bounds_what_trickles() {
    let endpoint = ModelEndpoint::start().await;
    endpoint.plays([Script::slowly(&["x"; 40], Duration::from_millis(100))]);
    let mut request = request();
    request.timeout = Some(Duration::from_millis(600));
    let started = Instant::now();
    let err = ask_for(&models(&[&endpoint]), &request).await.0.unwrap_err();
    assert_eq!(err.kind(), FailureKind::TimeoutTotal);
    assert!(started.elapsed() < Duration::from_millis(1200), "{:?}", started.elapsed());
    assert!(err.is_transient());
}

#[tokio::test]
async fn an_endpoint_that_is_not_there_is_left_for_the_next() {
    let (gone, good) = (ModelEndpoint::start().await, ModelEndpoint::start().await);
    let url = gone.url.clone();
    drop(gone);
    let models = models_with(
        json!({
            "endpoints": {
                "gone": {"url": url},
                // A network that swallows packets: no answer comes from a test network.
                "void": {"url": "http://192.0.2.1:9/v1", "timeouts": {"connect": "100ms"}},
                "name": {"url": "http://no-such-host.invalid/v1"},
                "good": {"url": good.url},
            },
            "routes": {"default": [
                {"endpoint": "gone", "model": "m", "attempts": 1},
                {"endpoint": "void", "model": "m", "attempts": 1},
                {"endpoint": "name", "model": "m", "attempts": 1},
                {"endpoint": "good", "model": "m"}]},
        }),
        &[],
    );
    let answer = ask(&models).await.0.unwrap();
    let found = outcomes(&answer);
    assert_eq!(found[0], ("gone", Some(FailureKind::Connect)));
    // Where a machine has no route at all, it says so at once.
    let void = found[1].1.unwrap();
    assert!(matches!(void, FailureKind::TimeoutConnect | FailureKind::Connect), "{void}");
    assert_eq!(found[2..], [("name", Some(FailureKind::Connect)), ("good", None)]);
}

#[tokio::test]
async fn a_refusal_for_good_is_not_repeated() {
    for (script, kind, next) in [
        (Script::error("400 Bad Request", "temperature is wrong"), FailureKind::BadRequest, false),
        (
            Script::error("400 Bad Request", "This model's maximum context length is 8192 tokens"),
            FailureKind::ContextLength,
            true,
        ),
        (
            Script::error("400 Bad Request", "m does not support tools"),
            FailureKind::Unsupported,
            true,
        ),
        (Script::error("401 Unauthorized", "who are you"), FailureKind::Unauthorized, true),
        (Script::error("404 Not Found", "no such model"), FailureKind::NotFound, true),
        (Script::error("402 Payment Required", "no money"), FailureKind::QuotaExceeded, true),
        (
            Script::status("302 Found", "location: http://127.0.0.1:1/\r\n", json!({})),
            FailureKind::NotFound,
            true,
        ),
    ] {
        let (first, second) = (ModelEndpoint::start().await, ModelEndpoint::start().await);
        first.plays([script]);
        let answer = ask(&models(&[&first, &second])).await.0;
        assert_eq!(first.calls().len(), 1, "{kind}");
        assert_eq!(second.calls().len(), usize::from(next), "{kind}");
        match answer {
            Ok(answer) => assert_eq!(outcomes(&answer), [("a", Some(kind)), ("b", None)]),
            Err(err) => assert!(err.kind() == kind && !next && !err.is_transient(), "{err}"),
        }
    }
}

#[tokio::test]
async fn a_storm_of_429_is_waited_out_as_long_as_the_endpoint_asks() {
    let endpoint = ModelEndpoint::start().await;
    let limited = |headers: &str| {
        Script::status("429 Too Many Requests", headers, json!({"error": {"message": "slow down"}}))
    };
    endpoint.plays([limited("retry-after: 1\r\n")]);
    let started = Instant::now();
    let answer = ask(&models(&[&endpoint])).await.0.unwrap();
    assert_eq!(outcomes(&answer), [("a", Some(FailureKind::RateLimited)), ("a", None)]);
    assert!(started.elapsed() >= Duration::from_secs(1), "{:?}", started.elapsed());
    // An hour is not waited for: the time for everything is shorter, so the call ends at once.
    endpoint.plays([limited("retry-after: 3600\r\n")]);
    let started = Instant::now();
    let err = ask(&models(&[&endpoint])).await.0.unwrap_err();
    assert!(started.elapsed() < Duration::from_millis(900), "{:?}", started.elapsed());
    assert_eq!(
        (err.kind(), err.retry_after()),
        (FailureKind::RateLimited, Some(Duration::from_secs(60)))
    );
    assert!(err.is_transient());
    // With another candidate a long wait is not worth it.
    let second = ModelEndpoint::start().await;
    endpoint.plays([limited("retry-after: 30\r\n")]);
    let answer = ask(&models(&[&endpoint, &second])).await.0.unwrap();
    assert_eq!(outcomes(&answer), [("a", Some(FailureKind::RateLimited)), ("b", None)]);
}

#[tokio::test]
async fn a_model_that_is_still_loading_is_asked_again() {
    let endpoint = ModelEndpoint::start().await;
    endpoint.plays([Script::error("503 Service Unavailable", "Loading model")]);
    let (answer, deltas) = ask(&models(&[&endpoint])).await;
    let answer = answer.unwrap();
    assert_eq!(outcomes(&answer), [("a", Some(FailureKind::Overloaded)), ("a", None)]);
    assert_eq!(deltas, [text("o"), text("k")]);
    assert_eq!(endpoint.calls_by_key(), [("k-1".to_owned(), 2)].into());
}

#[tokio::test]
async fn candidates_are_tried_in_order_until_none_is_left() {
    let endpoints =
        [ModelEndpoint::start().await, ModelEndpoint::start().await, ModelEndpoint::start().await];
    for endpoint in &endpoints {
        endpoint.plays((0..2).map(|_| Script::error("500 Internal Server Error", "broken")));
    }
    let err = ask(&models(&endpoints.each_ref())).await.0.unwrap_err();
    assert_eq!(
        err.to_string(),
        "the model `default` did not answer (a: overloaded, overloaded; b: overloaded, overloaded; \
         c: overloaded, overloaded): overloaded: status 500: broken"
    );
    assert_eq!(endpoints.map(|endpoint| endpoint.calls().len()), [2, 2, 2]);
}

#[tokio::test]
async fn an_endpoint_that_fails_again_and_again_is_left_alone() {
    let (bad, good) = (ModelEndpoint::start().await, ModelEndpoint::start().await);
    bad.plays((0..50).map(|_| Script::stream("data: {\n\n")));
    let models = models(&[&bad, &good]);
    for _ in 0..5 {
        assert_eq!(ask(&models).await.0.unwrap().endpoint, "b");
    }
    assert_eq!(bad.calls().len(), 5, "it is not asked while its circuit is open");
    let answer = ask(&models).await.0.unwrap();
    assert_eq!(outcomes(&answer), [("a", Some(FailureKind::CircuitOpen)), ("b", None)]);
    let mut alone = request();
    alone.model = "a/m".to_owned();
    let err = ask_for(&models, &alone).await.0.unwrap_err();
    assert!(err.is_transient() && err.retry_after().is_some(), "{err}");
}

#[tokio::test]
async fn attempts_and_tokens_are_counted() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    // The test's runtime has one thread, which is this one.
    let _counting = metrics::set_default_local_recorder(&recorder);
    let endpoint = ModelEndpoint::start().await;
    endpoint.plays([Script::error("503 Service Unavailable", "Loading model")]);
    ask(&models(&[&endpoint])).await.0.unwrap();
    let shown = handle.render();
    for line in [
        "cynai_model_calls_total{endpoint=\"a\",outcome=\"overloaded\"} 1",
        "cynai_model_calls_total{endpoint=\"a\",outcome=\"ok\"} 1",
        "cynai_model_tokens_total{endpoint=\"a\",direction=\"input\"} 10",
        "cynai_model_tokens_total{endpoint=\"a\",direction=\"output\"} 2",
        "cynai_model_first_token_seconds_count{endpoint=\"a\"} 1",
        "cynai_model_call_seconds_count{endpoint=\"a\"} 2",
    ] {
        assert!(shown.contains(line), "{line} is not in {shown}");
    }
}
