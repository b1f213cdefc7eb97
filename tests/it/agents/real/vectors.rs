//! Texts as vectors of real models.

use std::sync::Arc;

use cynai::clock::SystemClock;
use cynai::config::models::{KeySource, ModelsConfig};
use cynai::models::Models;
use cynai::models::embed::{EmbedRequest, Embeddings};
use cynai::models::keys::{KeyError, Keys};
use futures::future::BoxFuture;
use secrecy::SecretString;
use serde_json::json;

use super::{Engine, Kind};

struct NoKeys;

impl Keys for NoKeys {
    fn key<'a>(&'a self, source: &'a KeySource) -> BoxFuture<'a, Result<SecretString, KeyError>> {
        let none = KeyError { problem: format!("{source} is not set") };
        Box::pin(std::future::ready(Err(none)))
    }
}

async fn embed(kind: Kind, texts: &[&str]) -> Embeddings {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let engine = Engine::start(kind).await;
    let config = json!({ "endpoints": { "e": { "url": engine.address("/v1") } } });
    let config: ModelsConfig = serde_json::from_value(config).unwrap();
    let models = Models::new(config, Arc::new(NoKeys), Arc::new(SystemClock)).unwrap();
    let texts = texts.iter().map(ToString::to_string).collect();
    let request = EmbedRequest { model: "e/any".to_owned(), texts, ..EmbedRequest::default() };
    models.embed(&request).await.unwrap()
}

/// The cosine of the angle between two vectors.
fn nearness(left: &[f32], right: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| -> f32 { a.iter().zip(b).map(|(x, y)| x * y).sum() };
    dot(left, right) / (dot(left, left) * dot(right, right)).sqrt()
}

#[tokio::test]
async fn what_means_the_same_is_near_mini_lm() {
    let texts = [
        "A cat sits on the mat.",
        "A kitten is lying on a rug.",
        "The stock market fell on Monday.",
        "Shares lost much of their value at the start of the week.",
    ];
    let found = embed(Kind::MiniLm, &texts).await;
    assert!(found.vectors.iter().all(|vector| vector.len() == 384));
    let near = |a: usize, b: usize| nearness(&found.vectors[a], &found.vectors[b]);
    for unlike in [near(0, 2), near(0, 3), near(1, 2), near(1, 3)] {
        assert!(near(0, 1) > unlike + 0.2 && near(2, 3) > unlike + 0.2, "{unlike}");
    }
    assert!(found.usage.input > 20 && found.model == "all-minilm-l6-v2");
}

#[tokio::test]
async fn a_hundred_texts_keep_their_order_over_many_requests_mini_lm() {
    let texts: Vec<String> = (0..100).map(|at| format!("{at} green bottles")).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let all = embed(Kind::MiniLm, &texts).await;
    let some = embed(Kind::MiniLm, &[texts[0], texts[50], texts[99]]).await;
    for (at, vector) in [0, 50, 99].into_iter().zip(&some.vectors) {
        assert!(nearness(&all.vectors[at], vector) > 0.999, "{at}");
        assert!(
            nearness(&all.vectors[at], vector)
                > nearness(&all.vectors[at + 1 - 2 * (at / 99)], vector)
        );
    }
}

#[tokio::test]
async fn a_chat_models_vectors_are_read_as_well_llama_server() {
    let texts = ["A cat sits on the mat.", "A cat sits on the mat.", "The stock market fell."];
    let found = embed(Kind::LlamaEmbeddings, &texts).await;
    assert!(found.vectors.iter().all(|vector| vector.len() == 576));
    let near = |a: usize, b: usize| nearness(&found.vectors[a], &found.vectors[b]);
    assert!(near(0, 1) > 0.999 && near(0, 1) > near(0, 2), "{} {}", near(0, 1), near(0, 2));
    assert!(found.usage.input > 10);
}
