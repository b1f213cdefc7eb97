//! A whole system for one test: the services on the test's own database, the gateway on a loopback
//! port, and a client that shows what came back.

pub(crate) mod agent;
pub(crate) mod client;
pub(crate) mod graphs;
pub(crate) mod load;
pub(crate) mod model_endpoint;
pub(crate) mod server;
pub(crate) mod traces;

use std::sync::Arc;

use chrono::{DateTime, Utc};
use cynai::clock::TestClock;
use cynai::gateway::{Gateway, GatewayConfig, ReadyCheck, serve};
use cynai::graph::compile::{NoNodes, compile_stored};
use cynai::graph::model::Graph;
use cynai::services::catalog::GraphCatalog;
use cynai::services::{ServiceLimits, Services};
use cynai::tls::accept::Acceptor;
use cynai::tls::trust::Trust;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// When the test clock stands at first.
pub fn start_of_time() -> DateTime<Utc> {
    "2026-11-20T10:00:00.123456Z".parse().unwrap()
}

/// A running system. Dropping it ends its server.
pub struct TestSystem {
    pub pool: PgPool,
    pub services: Services,
    pub clock: TestClock,
    /// The administrator's token.
    pub token: String,
    /// `http://127.0.0.1:PORT`.
    pub base: String,
    http: reqwest::Client,
    stop: CancellationToken,
    server: JoinSet<()>,
    _folder: tempfile::TempDir,
}

/// What came back.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: reqwest::header::HeaderMap,
    pub text: String,
}

/// How a test's system differs from the usual one.
#[derive(Default)]
pub struct Options {
    pub gateway: GatewayConfig,
    pub limits: ServiceLimits,
    pub checks: Vec<ReadyCheck>,
    /// Served over TLS, and the certificate that the test's client accepts.
    pub tls: Option<(Acceptor, String)>,
}

impl TestSystem {
    pub async fn start(pool: PgPool) -> Self {
        Self::start_with(pool, Options::default()).await
    }

    pub async fn start_with(pool: PgPool, options: Options) -> Self {
        // Harmless when it was installed before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let clock = TestClock::at(start_of_time());
        let services = Services::new(pool.clone(), Arc::new(clock.clone()), options.limits);
        services.register_graphs(GraphCatalog::new(graphs())).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("admin-token");
        services.bootstrap_admin(&file).await.unwrap();
        let token = std::fs::read_to_string(&file).unwrap().trim().to_owned();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let scheme = if options.tls.is_some() { "https" } else { "http" };
        let base = format!("{scheme}://{}", listener.local_addr().unwrap());
        let gateway = Gateway::new(services.clone(), options.gateway, options.checks);
        let stop = CancellationToken::new();
        let mut server = JoinSet::new();
        let stopped = stop.clone().cancelled_owned();
        let mut http = reqwest::Client::builder().no_proxy();
        let acceptor = options.tls.map(|(acceptor, pem)| {
            let trust = Trust::exactly(&pem).unwrap().client_config().unwrap();
            http = std::mem::take(&mut http).tls_backend_preconfigured(trust);
            acceptor
        });
        server.spawn(
            async move { serve::serve(listener, gateway, acceptor, stopped).await.unwrap() },
        );
        let http = http.build().unwrap();
        Self { pool, services, clock, token, base, http, stop, server, _folder: folder }
    }

    /// Stops the server and waits until it has ended.
    pub async fn stop(mut self) {
        self.stop.cancel();
        while let Some(ended) = self.server.join_next().await {
            ended.unwrap();
        }
    }

    /// A request with everything about it open.
    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, format!("{}{path}", self.base))
    }

    /// A request with this token and, unless it is null, this body.
    pub async fn call_as(&self, token: &str, method: Method, path: &str, body: Value) -> Answer {
        let request = self.request(method, path).bearer_auth(token);
        Answer::of(if body.is_null() { request } else { request.json(&body) }).await
    }

    /// A request of the administrator's.
    pub async fn call(&self, method: Method, path: &str, body: Value) -> Answer {
        self.call_as(&self.token, method, path, body).await
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.call(Method::GET, path, Value::Null).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.call(Method::POST, path, body).await
    }

    /// Another user, who is no administrator, and a token of theirs.
    pub async fn user(&self, name: &str) -> String {
        self.post("/v1/users", json!({"name": name})).await.expect(201);
        let token =
            self.post("/v1/tokens", json!({"name": "test", "user": name})).await.expect(201);
        token["token"].as_str().unwrap().to_owned()
    }

    /// A fresh thread of the administrator's.
    pub async fn thread(&self) -> String {
        let thread = self.post("/threads", json!({})).await.expect(200);
        thread["thread_id"].as_str().unwrap().to_owned()
    }
}

impl Answer {
    pub async fn of(request: reqwest::RequestBuilder) -> Self {
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status(), response.headers().clone());
        Self { status, headers, text: response.text().await.unwrap() }
    }

    /// The body as JSON, after a look at the status.
    #[track_caller]
    pub fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        self.json()
    }

    /// The body as JSON; null when it is empty.
    #[track_caller]
    pub fn json(&self) -> Value {
        if self.text.is_empty() {
            return Value::Null;
        }
        serde_json::from_str(&self.text).unwrap_or_else(|err| panic!("{err}: {}", self.text))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// Looks at an error's status, code and form.
    #[track_caller]
    pub fn expect_error(&self, status: u16, code: &str) -> Value {
        let body = self.expect(status);
        assert_eq!(body["code"], code, "{body}");
        assert_eq!(body["detail"], body["message"], "{body}");
        assert!(body["metadata"].is_object(), "{body}");
        assert!(self.header("x-request-id").is_some());
        body
    }
}

/// The graphs that every test system serves.
pub fn graphs() -> Vec<Arc<Graph>> {
    let count = compiled(
        &json!({
            "name": "count",
            "state": {"n": {"type": "integer", "default": 0}, "text": {"type": "string"}},
            "input": ["n", "text"],
            "output": ["n"],
            "nodes": {"add": {"set": {"n": "${state.n + 1}"}}},
            "edges": ["start -> add -> end"],
        }),
        &[],
    );
    let outer = compiled(
        &json!({
            "name": "outer",
            "state": {"n": {"type": "integer", "default": 0}},
            "input": ["n"],
            "output": ["n"],
            "nodes": {
                "inner": {"graph": {"name": "count", "input": {"n": "${state.n}"}},
                          "set": {"n": "${output.n}"}},
            },
            "edges": ["start -> inner -> end"],
        }),
        &[Arc::clone(&count)],
    );
    vec![count, outer]
}

/// Compiles a graph file.
pub fn compiled(file: &Value, others: &[Arc<Graph>]) -> Arc<Graph> {
    let find = |name: &str| others.iter().find(|graph| graph.name == name).cloned();
    Arc::new(compile_stored(&file.to_string(), &find, &NoNodes).unwrap())
}
