//! What surrounds the routes: errors, ids, limits, origins, readiness, metrics, the end of a server.

use std::sync::Arc;
use std::time::Duration;

use cynai::clock::{Clock, SystemClock};
use cynai::gateway::origin::OriginPolicy;
use cynai::gateway::{GatewayConfig, ReadyCheck};
use cynai::tls::accept::Acceptor;
use cynai::tls::own::Own;
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{Answer, Options, TestSystem};

#[sqlx::test]
async fn errors_have_one_form(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    system.get("/nothing").await.expect_error(404, "not_found");
    system.call(Method::PUT, "/threads", json!({})).await.expect_error(405, "method_not_allowed");
    system.get("/threads/not-a-uuid").await.expect_error(422, "invalid");
    system.get(&format!("/threads/{}", uuid::Uuid::nil())).await.expect_error(404, "not_found");
    let broken = system.request(Method::POST, "/threads").bearer_auth(&system.token);
    let broken = Answer::of(broken.body("{\"metadata\": ")).await.expect_error(422, "invalid");
    assert!(broken["detail"].as_str().unwrap().starts_with("Invalid JSON"));
    system.post("/threads", json!({"metadata": 5})).await.expect_error(422, "invalid");
    system.post("/threads", json!([1])).await.expect_error(422, "invalid");
    let deep = "[".repeat(100_000);
    let deep = system.request(Method::POST, "/threads").bearer_auth(&system.token).body(deep);
    Answer::of(deep).await.expect_error(422, "invalid");
    let empty = system.request(Method::POST, "/threads").bearer_auth(&system.token);
    Answer::of(empty).await.expect(200);
}

#[sqlx::test]
async fn a_request_id_comes_back_and_a_strange_one_is_replaced(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let send = async |id: &str| {
        Answer::of(system.request(Method::GET, "/ok").header("x-request-id", id)).await
    };
    assert_eq!(send("mine-1").await.header("x-request-id"), Some("mine-1"));
    let made = send("not mine").await;
    assert!(uuid::Uuid::parse_str(made.header("x-request-id").unwrap()).is_ok());
}

#[sqlx::test]
async fn a_server_with_a_certificate_speaks_https_and_nothing_else(pool: PgPool) {
    let own = Own::make(&["127.0.0.1".to_owned()], SystemClock.now()).unwrap();
    let acceptor = Acceptor::from_pem(&own.certificate_pem, &own.key_pem).unwrap();
    let tls = Some((acceptor, own.certificate_pem.clone()));
    let system = TestSystem::start_with(pool, Options { tls, ..Options::default() }).await;
    system.get("/ok").await.expect(200);
    let plain = reqwest::Client::builder().no_proxy().build().unwrap();
    assert!(plain.get(system.base.replace("https:", "http:")).send().await.is_err());
    // Who never shakes hands does not keep the server from ending.
    let address = system.base.trim_start_matches("https://").to_owned();
    let _silent = tokio::net::TcpStream::connect(&address).await.unwrap();
    let began = std::time::Instant::now();
    system.stop().await;
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[sqlx::test]
async fn a_body_over_the_limit_is_refused(pool: PgPool) {
    let gateway = GatewayConfig { body_bytes: 1000, ..GatewayConfig::default() };
    let system = TestSystem::start_with(pool, Options { gateway, ..Options::default() }).await;
    let body = |size: usize| json!({"metadata": {"a": "x".repeat(size)}});
    system.post("/threads", body(900)).await.expect(200);
    system.post("/threads", body(1000)).await.expect_error(413, "too_large");
}

#[sqlx::test]
async fn a_head_over_the_limit_is_refused(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let request = system.request(Method::GET, "/ok").header("x-long", "x".repeat(1 << 20));
    // The server may close while the client still writes: both ends of the story are a refusal.
    if let Ok(response) = request.send().await {
        assert_eq!(response.status().as_u16(), 431);
    }
    system.get("/ok").await.expect(200);
}

#[sqlx::test]
async fn a_page_of_another_origin_cannot_call(pool: PgPool) {
    let origins = vec!["https://console.example".to_owned()];
    let origin = OriginPolicy { loopback: true, hosts: Vec::new(), origins };
    let gateway = GatewayConfig { origin, ..GatewayConfig::default() };
    let system = TestSystem::start_with(pool, Options { gateway, ..Options::default() }).await;
    let send = async |name: &'static str, value: &str| {
        Answer::of(system.request(Method::GET, "/ok").header(name, value)).await
    };
    send("host", "rebound.example").await.expect_error(403, "wrong_origin");
    send("host", "localhost:1").await.expect(200);
    send("origin", "https://evil.example").await.expect_error(403, "wrong_origin");
    let allowed = send("origin", "https://console.example").await;
    assert_eq!(allowed.header("access-control-allow-origin"), Some("https://console.example"));
    let exposed = allowed.header("access-control-expose-headers").unwrap();
    assert!(exposed.contains("x-pagination-total") && exposed.contains("content-location"));
    let preflight = system
        .request(Method::OPTIONS, "/threads")
        .header("origin", "https://console.example")
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "x-api-key");
    let preflight = Answer::of(preflight).await;
    assert_eq!(preflight.status.as_u16(), 200);
    assert_eq!(preflight.header("access-control-allow-headers"), Some("x-api-key"));
}

#[sqlx::test]
async fn without_listed_origins_no_cors_headers_are_sent(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let own =
        Answer::of(system.request(Method::GET, "/ok").header("origin", "http://localhost:9")).await;
    assert_eq!(own.status.as_u16(), 200);
    assert_eq!(own.header("access-control-allow-origin"), None);
    assert_eq!(own.header("vary"), None);
}

#[sqlx::test]
async fn readiness_names_what_is_wrong(pool: PgPool) {
    let fine = ReadyCheck { name: "migrations", check: Arc::new(|| Box::pin(async { Ok(()) })) };
    let bad = ReadyCheck {
        name: "driver",
        check: Arc::new(|| Box::pin(async { Err("has no lease yet".to_owned()) })),
    };
    let options = Options { checks: vec![fine, bad], ..Options::default() };
    let system = TestSystem::start_with(pool, options).await;
    let expected = json!({"ready": false, "checks": {"database": "ok", "migrations": "ok", "driver": "has no lease yet"}});
    assert_eq!(system.get("/readyz").await.expect(503), expected);
    assert_eq!(system.get("/healthz").await.expect(200)["status"], "ok");
}

#[sqlx::test]
async fn without_a_database_requests_are_told_to_come_back(pool: PgPool) {
    let system = TestSystem::start(pool.clone()).await;
    assert_eq!(system.get("/readyz").await.expect(200)["ready"], true);
    assert_eq!(system.get("/ok?check_db=1").await.expect(200), json!({"ok": true}));
    pool.close().await;
    let ready = system.get("/readyz").await.expect(503);
    assert_eq!(ready["checks"]["database"], "the database cannot be reached");
    let answer = system.get("/ok?check_db=true").await;
    answer.expect_error(503, "unavailable");
    assert_eq!(answer.header("retry-after"), Some("1"));
    system.get("/ok").await.expect(200);
}

#[sqlx::test]
async fn metrics_count_requests_by_route(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    system.get(&format!("/threads/{}", uuid::Uuid::nil())).await.expect(404);
    let metrics = system.get("/metrics").await;
    assert_eq!(metrics.status.as_u16(), 200);
    let line =
        "cynai_http_requests_total{method=\"GET\",route=\"/threads/{thread_id}\",status=\"404\"}";
    assert!(metrics.text.contains(line), "{}", metrics.text);
    assert!(metrics.text.contains("cynai_http_request_seconds_bucket"));
    Answer::of(system.request(Method::GET, "/metrics")).await.expect_error(401, "unauthorized");
}

#[sqlx::test]
async fn metrics_can_be_public(pool: PgPool) {
    let gateway = GatewayConfig { public_metrics: true, ..GatewayConfig::default() };
    let system = TestSystem::start_with(pool, Options { gateway, ..Options::default() }).await;
    let metrics = Answer::of(system.request(Method::GET, "/metrics")).await;
    assert_eq!(metrics.status.as_u16(), 200);
}

#[sqlx::test]
async fn a_request_that_takes_too_long_ends_with_an_error(pool: PgPool) {
    let request_timeout = Duration::from_millis(300);
    let gateway = GatewayConfig { request_timeout, ..GatewayConfig::default() };
    let system = TestSystem::start_with(pool, Options { gateway, ..Options::default() }).await;
    let thread = system.thread().await;
    let mut tx = system.pool.begin().await.unwrap();
    sqlx::query("lock table threads in access exclusive mode").execute(&mut *tx).await.unwrap();
    system.get(&format!("/threads/{thread}")).await.expect_error(504, "timeout");
    tx.rollback().await.unwrap();
    system.get(&format!("/threads/{thread}")).await.expect(200);
}

#[sqlx::test]
async fn a_bad_run_request_is_refused_before_anything_is_stored(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let path = format!("/threads/{}/runs", system.thread().await);
    let refused = async |body: Value, at: &str| {
        let answer = system.post(&path, body).await.expect_error(422, "invalid");
        assert_eq!(answer["metadata"]["path"].as_str().unwrap_or_default(), at);
    };
    refused(json!({}), "").await;
    refused(json!({"assistant_id": ""}), "/assistant_id").await;
    refused(json!({"assistant_id": "count", "multitask_strategy": "wait"}), "").await;
    refused(json!({"assistant_id": "count", "stream_mode": ["values", "x"]}), "/stream_mode").await;
    let both = json!({"assistant_id": "count", "input": {}, "command": {"resume": 1}});
    refused(both, "/command").await;
    let batch = json!(vec![json!({"assistant_id": "count"}); 101]);
    system.post("/runs/batch", batch).await.expect_error(422, "invalid");
    system.post("/runs/cancel", json!({"status": "x"})).await.expect_error(422, "invalid");
}

#[sqlx::test]
async fn a_stopping_server_ends_idle_connections_at_once(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let address = system.base.strip_prefix("http://").unwrap().to_owned();
    let mut idle = tokio::net::TcpStream::connect(&address).await.unwrap();
    idle.write_all(b"GET /ok HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut byte = [0; 1];
    idle.read_exact(&mut byte).await.unwrap();
    // Far sooner than the time that requests under way would get.
    tokio::time::timeout(Duration::from_secs(5), system.stop()).await.unwrap();
    let mut rest = Vec::new();
    idle.read_to_end(&mut rest).await.unwrap();
    assert!(rest.ends_with(b"{\"ok\":true}"));
    assert!(tokio::net::TcpStream::connect(&address).await.is_err());
}
