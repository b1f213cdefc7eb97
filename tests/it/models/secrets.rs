//! Keys, passwords and secret headers stay between us and the endpoint.

use std::error::Error;
use std::io::Write;
use std::sync::{Arc, Mutex};

use cynai::models::failure::FailureKind;
use serde_json::{Value, json};
use tracing_subscriber::fmt::MakeWriter;

use super::*;
use crate::support::model_endpoint::{Script, event};

const SECRETS: [&str; 6] = [
    "sk-key-1234567890",
    "hunter2-password",
    "header-secret-77",
    "query-secret-88",
    "ann-the-user",
    "YW5uLXRoZS11c2VyOmh1bnRlcjItcGFzc3dvcmQ=",
];

/// Everything that is logged while it lives, at every level.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

fn secret_models(keyed: &ModelEndpoint, user: &ModelEndpoint) -> Models {
    let with_user = user.url.replace("http://", "http://ann-the-user:hunter2-password@");
    let times = json!({ "first_token": "300ms", "idle": "200ms", "total": "2s" });
    models_with(
        json!({
            "endpoints": {
                "keyed": {"url": format!("{}?code=query-secret-88", keyed.url), "key": {"env": "KEY"},
                    "headers": {"x-more": "header-secret-77"}, "timeouts": times},
                "user": {"url": with_user, "timeouts": times},
            },
            "routes": {
                "keyed": [{"endpoint": "keyed", "model": "m", "attempts": 1}],
                "user": [{"endpoint": "user", "model": "m", "attempts": 1}],
            },
        }),
        &[("KEY", SECRETS[0])],
    )
}

#[tokio::test]
async fn they_reach_the_endpoint_and_nothing_else() {
    let log = Log::default();
    let logging =
        tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(log.clone());
    // The test's runtime has one thread, which is this one.
    let _logging = tracing::subscriber::set_default(logging.finish());
    let (keyed, user) = (ModelEndpoint::start().await, ModelEndpoint::start().await);
    let models = secret_models(&keyed, &user);
    let mut seen = format!("{models:?}");
    // Each repeats what it was sent, in all places where one can.
    let scripts = |told: &str| {
        let echo = |status: &str| Script::error(status, &format!("you sent {told}"));
        [
            echo("401 Unauthorized"),
            echo("500 Internal Server Error"),
            echo("429 Too Many Requests"),
            echo("404 Not Found"),
            Script::default().hang(),
            Script::stream(format!("data: {{\"{told}\n\n")),
            Script::stream(format!("data: {}\n\n", json!({"error": {"message": told}}))),
            // An answer, so that the endpoint is not left alone.
            echo("403 Forbidden"),
            Script::stream(event(json!({"content": "x"}))).reset(),
            Script::default().then("HTTP/1.1 200 OK\r\ncontent-type: text/html\r\n\r\n").then(told),
            Script::default().then(told),
            echo("403 Forbidden"),
        ]
    };
    keyed.plays(scripts(&[SECRETS[0], SECRETS[2], SECRETS[3]].join(" ")));
    // What the header holds, too: `ann-the-user:hunter2-password`.
    user.plays(scripts(&format!("ann-the-user {} {}", SECRETS[1], SECRETS[5])));
    for _ in 0..11 {
        let mut request = request();
        for model in ["keyed", "user"] {
            request.model = model.to_owned();
            let err = ask_for(&models, &request).await.0.unwrap_err();
            seen.push_str(&format!("{err} {err:?}"));
            let mut cause = err.source();
            while let Some(inner) = cause {
                seen.push_str(&format!("{inner} {inner:?}"));
                cause = inner.source();
            }
        }
    }
    seen.push_str(&serde_json::to_string(&models.list().await).unwrap());
    let calls = keyed.calls();
    assert_eq!(calls[0].headers["authorization"], "Bearer sk-key-1234567890");
    assert_eq!(calls[0].headers["x-more"], "header-secret-77");
    assert_eq!(calls[0].path, "/v1/chat/completions?code=query-secret-88");
    assert_eq!((calls.len(), user.calls().len()), (12, 12), "every script was played");
    assert_eq!(user.calls()[0].headers["authorization"], format!("Basic {}", SECRETS[5]));
    assert!(seen.contains("[redacted]"), "{seen}");
    seen.push_str(&String::from_utf8(log.0.lock().unwrap().clone()).unwrap());
    assert!(seen.contains("the model endpoint keyed failed"), "nothing was logged");
    for secret in SECRETS {
        if let Some(at) = seen.find(secret) {
            panic!("{secret} is shown: {}", &seen[at.saturating_sub(300)..at + 20]);
        }
    }
}

#[tokio::test]
async fn a_key_that_is_missing_or_broken_is_told_by_its_name() {
    let endpoint = ModelEndpoint::start().await;
    let config = |key: Value| {
        json!({
            "endpoints": {"a": {"url": endpoint.url, "key": key}, "b": {"url": endpoint.url}},
            "routes": {"default": [{"endpoint": "a", "model": "m"}, {"endpoint": "b", "model": "m"}]},
        })
    };
    let missing = models_with(config(json!({"secret": "openai"})), &[]);
    let answer = ask(&missing).await.0.unwrap();
    assert_eq!(outcomes(&answer), [("a", Some(FailureKind::NoKey)), ("b", None)]);
    let broken = models_with(config(json!({"env": "KEY"})), &[("KEY", "sk-broken-77\n")]);
    let mut alone = request();
    alone.model = "a/m".to_owned();
    let message = ask_for(&broken, &alone).await.0.unwrap_err().to_string();
    assert!(message.contains("the environment variable KEY has characters"), "{message}");
    assert!(!message.contains("sk-broken"), "{message}");
}
