//! Texts as vectors.

use cynai::models::embed::EmbedRequest;
use cynai::models::failure::FailureKind;
use serde_json::{Value, json};

use super::*;
use crate::support::model_endpoint::Script;

fn request_of(texts: &[&str]) -> EmbedRequest {
    EmbedRequest {
        texts: texts.iter().map(|text| (*text).to_owned()).collect(),
        idempotency_key: Some("e".to_owned()),
        ..EmbedRequest::default()
    }
}

#[tokio::test]
async fn vectors_come_in_the_order_of_their_texts_over_many_requests() {
    let endpoint = ModelEndpoint::start().await;
    let texts: Vec<String> = (1..=100).map(|length| "x".repeat(length)).collect();
    let mut request = request_of(&[]);
    request.texts = texts;
    let found = models(&[&endpoint]).embed(&request).await.unwrap();
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let expected: Vec<Vec<f32>> = (1..=100).map(|length| vec![length as f32, 0.5]).collect();
    assert_eq!(found.vectors, expected);
    assert_eq!((found.usage.input, found.model.as_str(), found.endpoint.as_str()), (100, "e", "a"));
    let keys: Vec<String> = endpoint.calls_by_key().into_keys().collect();
    assert_eq!(keys, ["e.0", "e.1", "e.2", "e.3"]);
}

#[tokio::test]
async fn wrong_vectors_are_malformed_and_all_come_from_one_candidate() {
    let vectors = |data: Value| Script::json(json!({ "data": data }));
    let vector = |index: usize, of: Value| json!({ "index": index, "embedding": of });
    for wrong in [
        json!([vector(0, json!([1.0]))]),
        json!([vector(0, json!([1.0])), vector(0, json!([1.0]))]),
        json!([vector(0, json!([1.0])), vector(5, json!([1.0]))]),
        json!([vector(0, json!([1.0])), vector(1, json!([1.0, 2.0]))]),
        json!([vector(0, json!([1.0])), vector(1, json!([]))]),
        json!([vector(0, json!(["x"])), vector(1, json!([1.0]))]),
        json!("none"),
    ] {
        let (first, second) = (ModelEndpoint::start().await, ModelEndpoint::start().await);
        first.plays([vectors(wrong.clone()), vectors(wrong.clone())]);
        let found = models(&[&first, &second]).embed(&request_of(&["a", "bc"])).await.unwrap();
        assert_eq!(found.vectors, [[1.0, 0.5], [2.0, 0.5]], "{wrong}");
        let kinds: Vec<_> = found.attempts.iter().map(|one| one.failure).collect();
        assert_eq!(
            kinds,
            [Some(FailureKind::Malformed), Some(FailureKind::Malformed), None],
            "{wrong}"
        );
    }
}

#[tokio::test]
async fn texts_have_limits() {
    let endpoint = ModelEndpoint::start().await;
    let models = models(&[&endpoint]);
    let refused =
        async |request: EmbedRequest| models.embed(&request).await.unwrap_err().to_string();
    assert!(refused(request_of(&[])).await.contains("texts: 0, but 1 to 2048"));
    assert!(refused(request_of(&["a", ""])).await.contains("texts[1] (bytes)"));
    assert!(refused(request_of(&["a"; 2049])).await.contains("2049"));
    let mut long = request_of(&["a"]);
    long.texts.push("x".repeat(300 << 10));
    assert!(refused(long).await.contains("texts[1] (bytes): 307200"));
    assert!(endpoint.calls().is_empty());
}
