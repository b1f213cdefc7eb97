//! A small client of the REST API, for tests.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

/// Speaks to one server.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    http: reqwest::Client,
    base: String,
    token: String,
}

/// Why a call has no answer that says yes.
#[derive(Debug)]
#[expect(dead_code, reason = "what they hold is printed when a test fails")]
pub(crate) enum CallError {
    /// The connection broke or could not be made: what became of the request is not known.
    Lost(reqwest::Error),
    /// The server answered, but not with a success.
    Refused(StatusCode, Value),
}

pub(crate) type Called = Result<Value, CallError>;

/// What clients of one test share: making it reads the machine's certificates, which takes its time.
pub(crate) fn http() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(60)).build().unwrap()
}

impl Client {
    pub(crate) fn new(http: reqwest::Client, base: &str, token: &str) -> Self {
        Self { http, base: base.to_owned(), token: token.to_owned() }
    }

    /// Whether the server at `base` says that it is ready.
    pub(crate) async fn is_ready(http: &reqwest::Client, base: &str) -> bool {
        let answer = http.get(format!("{base}/readyz")).send().await;
        answer.is_ok_and(|answer| answer.status().is_success())
    }

    /// One call.
    pub(crate) async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> Called {
        let mut request = self.request(method, path);
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request.send().await.map_err(CallError::Lost)?;
        let status = answer.status();
        let bytes = answer.bytes().await.map_err(CallError::Lost)?;
        let value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        if status.is_success() { Ok(value) } else { Err(CallError::Refused(status, value)) }
    }

    /// A request with everything about it open.
    pub(crate) fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, format!("{}{path}", self.base)).bearer_auth(&self.token)
    }

    pub(crate) async fn get(&self, path: &str) -> Called {
        self.call(Method::GET, path, None).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Called {
        self.call(Method::POST, path, Some(body)).await
    }

    /// Makes sure that a thread with this id exists.
    pub(crate) async fn ensure_thread(&self, id: &str) -> Called {
        self.post("/threads", &json!({ "thread_id": id, "if_exists": "do_nothing" })).await
    }

    /// Starts a run; what is not in `request` has its default.
    pub(crate) async fn start_run(&self, thread: &str, graph: &str, mut request: Value) -> Called {
        request["assistant_id"] = graph.into();
        self.post(&format!("/threads/{thread}/runs"), &request).await
    }

    /// The thread's runs, newest first.
    pub(crate) async fn runs(&self, thread: &str) -> Result<Vec<Value>, CallError> {
        let runs = self.get(&format!("/threads/{thread}/runs?limit=100")).await?;
        Ok(runs.as_array().cloned().unwrap_or_default())
    }

    pub(crate) async fn thread(&self, id: &str) -> Called {
        self.get(&format!("/threads/{id}")).await
    }
}
