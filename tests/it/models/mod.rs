//! Models behind endpoints that misbehave, on real sockets.

mod answers;
mod embeddings;
mod failures;
mod json;
mod secrets;
mod streams;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cynai::clock::SystemClock;
use cynai::config::models::{KeySource, ModelsConfig};
use cynai::models::Models;
use cynai::models::answer::{ChatAnswer, Delta};
use cynai::models::failure::{FailureKind, ModelError};
use cynai::models::keys::{KeyError, Keys};
use cynai::models::request::ChatRequest;
use futures::future::BoxFuture;
use secrecy::SecretString;
use serde_json::{Value, json};

use crate::support::model_endpoint::ModelEndpoint;

/// Keys that a test makes up.
#[derive(Default)]
struct TestKeys(BTreeMap<KeySource, String>);

impl Keys for TestKeys {
    fn key<'a>(&'a self, source: &'a KeySource) -> BoxFuture<'a, Result<SecretString, KeyError>> {
        let found = self.0.get(source).map(|key| SecretString::from(key.as_str()));
        let found = found.ok_or_else(|| KeyError { problem: format!("{source} is not set") });
        Box::pin(std::future::ready(found))
    }
}

/// Models of a configuration, with the keys `{env: NAME}` of `keys`.
fn models_with(config: Value, keys: &[(&str, &str)]) -> Models {
    // Harmless when it was installed before.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let config: ModelsConfig = serde_json::from_value(config).unwrap();
    let keys = keys.iter().map(|(name, key)| (KeySource::Env((*name).into()), (*key).into()));
    Models::new(config, Arc::new(TestKeys(keys.collect())), Arc::new(SystemClock)).unwrap()
}

/// Models at these endpoints, `a`, `b`, .. in the order of failover. Each is asked twice, and patience is
/// short.
fn models(endpoints: &[&ModelEndpoint]) -> Models {
    models_like(endpoints, &json!({}))
}

/// The same, with more about each endpoint.
fn models_like(endpoints: &[&ModelEndpoint], more: &Value) -> Models {
    let names = ["a", "b", "c"];
    let mut config = json!({ "endpoints": {}, "routes": { "default": [] } });
    for (name, endpoint) in names.iter().zip(endpoints) {
        let times =
            json!({ "connect": "1s", "first_token": "600ms", "idle": "500ms", "total": "5s" });
        let mut settings = json!({ "url": endpoint.url, "timeouts": times });
        for (key, value) in more.as_object().unwrap() {
            settings[key] = value.clone();
        }
        config["endpoints"][name] = settings;
        let candidate = json!({ "endpoint": name, "model": "m", "attempts": 2 });
        config["routes"]["default"].as_array_mut().unwrap().push(candidate);
    }
    models_with(config, &[])
}

fn request() -> ChatRequest {
    let request = json!({ "messages": [{ "role": "user", "content": "hi" }] });
    ChatRequest {
        idempotency_key: Some("k-1".to_owned()),
        ..serde_json::from_value(request).unwrap()
    }
}

/// Asks, and gives what was streamed as well.
async fn ask(models: &Models) -> (Result<ChatAnswer, ModelError>, Vec<Delta>) {
    ask_for(models, &request()).await
}

async fn ask_for(
    models: &Models,
    request: &ChatRequest,
) -> (Result<ChatAnswer, ModelError>, Vec<Delta>) {
    let sink = Mutex::new(Vec::new());
    // Nothing here may take longer, whatever the other side does.
    let asking = tokio::time::timeout(Duration::from_secs(20), models.chat(request, &sink));
    let answer = asking.await.expect("the call ends by itself");
    (answer, sink.into_inner().unwrap())
}

fn outcomes(answer: &ChatAnswer) -> Vec<(&str, Option<FailureKind>)> {
    answer.attempts.iter().map(|one| (one.endpoint.as_str(), one.failure)).collect()
}

fn text(piece: &str) -> Delta {
    Delta::Text(piece.to_owned())
}
