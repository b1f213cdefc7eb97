//! A whole worker against a small server that plays the other half: over real HTTP, with short seconds.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use chrono::{TimeDelta, Utc};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::clock::{Clock, SystemClock};
use crate::tls::own::Own;
use crate::tls::trust::Pin;
use crate::worker::startup::ApiTlsMode;

const KEY: &str = "the-registration-key";
const FIRST: &str = "01KB0000000000000000000001";
const SECOND: &str = "01KB0000000000000000000002";
const THIRD: &str = "01KB0000000000000000000003";
/// How long a second lasts.
const PACE: Pace = Pace { second: Duration::from_millis(5) };

/// What the scripted server knows and answers.
#[derive(Default)]
struct Script {
    base: String,
    /// Statuses that registrations are refused with, before one succeeds.
    refusals: VecDeque<u16>,
    configuration: Value,
    /// Tokens that are good: an old one stays so for a while when it is renewed. And how many were given.
    good: Vec<String>,
    tokens: u32,
    life: Option<TimeDelta>,
    drained: bool,
    registrations: Vec<(Value, Option<String>)>,
    acks: Vec<Value>,
    reports: Vec<Value>,
    beats: Vec<Value>,
    renewals: u32,
    gone: bool,
}

type Shared = Arc<Mutex<Script>>;

struct Server {
    script: Shared,
    stop: CancellationToken,
    tasks: JoinSet<()>,
    address: std::net::SocketAddr,
}

impl Script {
    fn auth(&mut self) -> Value {
        self.tokens += 1;
        let token = format!("node-token-{}", self.tokens);
        self.good.push(token.clone());
        let life = self.life.unwrap_or(TimeDelta::hours(24));
        json!({"node_jwt": token, "expires_at": now() + life})
    }

    fn knows(&self, headers: &HeaderMap) -> bool {
        bearer(headers).is_some_and(|token| self.good.contains(&token))
    }
}

fn now() -> chrono::DateTime<Utc> {
    SystemClock.now()
}

fn bearer(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    value.strip_prefix("Bearer ").map(str::to_owned)
}

fn refused(status: u16) -> Response {
    let body = json!({"detail": "not so"});
    (StatusCode::from_u16(status).unwrap(), Json(body)).into_response()
}

async fn register(
    State(script): State<Shared>,
    headers: HeaderMap,
    Json(body): Json<Value>,
) -> Response {
    let mut script = script.lock().unwrap();
    if let Some(status) = script.refusals.pop_front() {
        return refused(status);
    }
    if body["psk"] != KEY {
        return refused(401);
    }
    script.registrations.push((body, bearer(&headers)));
    let auth = script.auth();
    let base = script.base.clone();
    let answer = json!({
        "version": 1, "issued_at": now(), "auth": auth, "heartbeat_seconds": 10,
        "orchestrator": {"base_url": base, "endpoints": {
            "worker_registration_url": format!("{base}/v1/nodes/register"),
            "node_config_url": format!("{base}/config"), "node_report_url": format!("{base}/report"),
            "node_self_unregister_url": format!("{base}/self"),
            "node_heartbeat_url": format!("{base}/beat"), "node_token_url": format!("{base}/token")}}
    });
    (StatusCode::CREATED, Json(answer)).into_response()
}

#[derive(Deserialize)]
struct Asked {
    after: Option<String>,
}

async fn configuration(
    State(script): State<Shared>,
    headers: HeaderMap,
    Query(asked): Query<Asked>,
) -> Response {
    for _ in 0..20 {
        {
            let script = script.lock().unwrap();
            if !script.knows(&headers) {
                return refused(401);
            }
            let version = script.configuration["config_version"].as_str();
            let fresh = match (&asked.after, version) {
                (_, None) => false,
                (None, Some(_)) => true,
                (Some(after), Some(version)) => version > after.as_str(),
            };
            if fresh {
                return Json(script.configuration.clone()).into_response();
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    StatusCode::NO_CONTENT.into_response()
}

async fn acknowledge(
    State(script): State<Shared>,
    headers: HeaderMap,
    Json(body): Json<Value>,
) -> Response {
    let mut script = script.lock().unwrap();
    if !script.knows(&headers) {
        return refused(401);
    }
    script.acks.push(body);
    StatusCode::NO_CONTENT.into_response()
}

async fn report(
    State(script): State<Shared>,
    headers: HeaderMap,
    Json(body): Json<Value>,
) -> Response {
    let mut script = script.lock().unwrap();
    if !script.knows(&headers) {
        return refused(401);
    }
    script.reports.push(body);
    StatusCode::NO_CONTENT.into_response()
}

async fn beat(
    State(script): State<Shared>,
    headers: HeaderMap,
    Json(body): Json<Value>,
) -> Response {
    let mut script = script.lock().unwrap();
    if !script.knows(&headers) {
        return refused(401);
    }
    script.beats.push(body);
    let answer = json!({
        "version": 1, "config_version": script.configuration["config_version"],
        "drained": script.drained, "heartbeat_seconds": 2
    });
    Json(answer).into_response()
}

async fn renew(State(script): State<Shared>, headers: HeaderMap) -> Response {
    let mut script = script.lock().unwrap();
    if !script.knows(&headers) {
        return refused(401);
    }
    script.renewals += 1;
    let auth = script.auth();
    Json(json!({"version": 1, "auth": auth})).into_response()
}

async fn unregister(State(script): State<Shared>, headers: HeaderMap) -> Response {
    let mut script = script.lock().unwrap();
    if !script.knows(&headers) {
        return refused(401);
    }
    script.gone = true;
    StatusCode::NO_CONTENT.into_response()
}

impl Server {
    async fn start() -> Self {
        Self::start_on("127.0.0.1:0", Shared::default(), None).await
    }

    async fn start_on(address: &str, script: Shared, tls: Option<Acceptor>) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let scheme = if tls.is_some() { "https" } else { "http" };
        script.lock().unwrap().base = format!("{scheme}://{address}");
        let router = Router::new()
            .route("/v1/nodes/register", post(register))
            .route("/config", get(configuration).post(acknowledge))
            .route("/report", post(report))
            .route("/beat", post(beat))
            .route("/token", post(renew))
            .route("/self", axum::routing::delete(unregister))
            .with_state(Arc::clone(&script));
        let (stop, mut tasks) = (CancellationToken::new(), JoinSet::new());
        let stopped = stop.clone();
        match tls {
            None => {
                let serving =
                    axum::serve(listener, router).with_graceful_shutdown(stopped.cancelled_owned());
                tasks.spawn(async move { serving.await.unwrap() });
            }
            Some(tls) => {
                let _ = tasks.spawn(serve_tls(listener, router, tls));
            }
        }
        Self { script, stop, tasks, address }
    }

    /// Ends it; its port is free for the next one.
    async fn stop(mut self) -> (Shared, String) {
        self.stop.cancel();
        self.tasks.shutdown().await;
        (self.script, self.address.to_string())
    }

    fn script<T>(&self, look: impl FnOnce(&mut Script) -> T) -> T {
        look(&mut self.script.lock().unwrap())
    }

    fn configure(&self, version: &str, token: &str, more: &Value) {
        let base = self.script(|script| script.base.clone());
        let mut value = json!({
            "version": 1, "config_version": version, "issued_at": now(), "node_slug": "alpha",
            "orchestrator": {"base_url": base, "endpoints": {
                "worker_api_target_url": "http://127.0.0.1:2", "node_report_url": format!("{base}/report")}},
            "sandbox_registry": {"registry_url": ""}, "model_cache": {"cache_url": ""},
            "policy": {}, "worker_api": {"orchestrator_bearer_token": token}, "constraints": {}
        });
        for (key, part) in more.as_object().unwrap() {
            value[key] = part.clone();
        }
        self.script(|script| script.configuration = value);
    }

    async fn acked(&self, version: &str) -> Value {
        let of = |script: &mut Script| {
            script.acks.iter().rev().find(|ack| ack["config_version"] == version).cloned()
        };
        until(version, async || self.script(of).is_some()).await;
        self.script(of).unwrap()
    }
}

async fn serve_tls(listener: TcpListener, router: Router, tls: Acceptor) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (router, tls) = (router.clone(), tls.clone());
        connections.spawn(async move {
            let Ok(stream) = tls.accept(stream).await else { return };
            let service = hyper_util::service::TowerToHyperService::new(router);
            let io = hyper_util::rt::TokioIo::new(stream);
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
        });
    }
}

async fn until(what: &str, mut reached: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !reached().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

struct Worker {
    base: String,
    http: reqwest::Client,
    stop: CancellationToken,
    tasks: JoinSet<()>,
    dir: tempfile::TempDir,
}

fn directory() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("key"), KEY).unwrap();
    dir
}

fn plan(server: &str, dir: &tempfile::TempDir) -> Startup {
    let mut startup = Startup::new(server, "alpha");
    startup.orchestrator.registration_psk_file = Some(dir.path().join("key"));
    startup.storage.state_dir = Some(dir.path().join("state"));
    startup.worker_api.listen_host = Some("127.0.0.1".to_owned());
    startup.worker_api.listen_port = Some(0);
    // What these tests are about needs no sandbox.
    startup.sandbox.mode = crate::worker::startup::SandboxMode::Disabled;
    startup
}

impl Worker {
    async fn start(server: &Server) -> Self {
        Self::start_with(&server.script(|script| script.base.clone()), directory(), |_| ()).await
    }

    async fn start_with(
        base: &str,
        dir: tempfile::TempDir,
        change: impl FnOnce(&mut Startup),
    ) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut startup = plan(base, &dir);
        change(&mut startup);
        startup.check().unwrap();
        let (agent, enrolment) =
            Enrolment::start(startup, Arc::new(SystemClock), PACE).await.unwrap();
        let base = agent.listening().listening;
        let (stop, mut tasks) = (CancellationToken::new(), JoinSet::new());
        let stopped = stop.clone();
        tasks.spawn(async move { agent.run(stopped).await.unwrap() });
        let stopped = stop.clone();
        tasks.spawn(async move { enrolment.run(stopped).await });
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { base, http, stop, tasks, dir }
    }

    async fn stop(mut self) -> tempfile::TempDir {
        self.stop.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
        self.dir
    }

    /// What the Worker API answers to this token.
    async fn answers(&self, token: &str) -> u16 {
        let request = self.http.get(format!("{}/v1/worker/capabilities", self.base));
        request.bearer_auth(token).send().await.unwrap().status().as_u16()
    }

    async fn ready(&self) -> (u16, String) {
        let answer = self.http.get(format!("{}/readyz", self.base)).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }
}

#[tokio::test]
async fn tokens_rotate_with_configurations_and_both_are_good_in_between() {
    let server = Server::start().await;
    let worker = Worker::start(&server).await;
    let (status, reason) = worker.ready().await;
    assert_eq!((status, reason.as_str()), (503, "this worker waits for its configuration"));
    assert_eq!(worker.answers("token-number-one").await, 503);
    server.configure(FIRST, "token-number-one", &json!({}));
    assert_eq!(server.acked(FIRST).await["status"], "applied");
    assert_eq!(worker.answers("token-number-one").await, 200);
    assert_eq!(worker.answers("token-number-two").await, 401);
    server.configure(SECOND, "token-number-two", &json!({}));
    let ack = server.acked(SECOND).await;
    assert_eq!((&ack["status"], &ack["node_slug"]), (&json!("applied"), &json!("alpha")));
    assert_eq!(worker.answers("token-number-one").await, 200);
    assert_eq!(worker.answers("token-number-two").await, 200);
    server.configure(THIRD, "token-number-three", &json!({}));
    server.acked(THIRD).await;
    assert_eq!(worker.answers("token-number-one").await, 401);
    assert_eq!(worker.answers("token-number-two").await, 200);
    assert_eq!(worker.answers("token-number-three").await, 200);
    until("a heartbeat tells of it", async || {
        server.script(|script| {
            script.beats.last().is_some_and(|beat| beat["config_version"] == THIRD)
        })
    })
    .await;
    let dir = worker.stop().await;
    // The key went to the server once, and nothing of it stays here but in its own file.
    let kept = std::fs::read_to_string(dir.path().join("state/node.json")).unwrap();
    assert!(!kept.contains(KEY));
    // The last words: no more jobs, please.
    server.script(|script| assert_eq!(script.beats.last().unwrap()["ready"], false));
}

#[tokio::test]
async fn a_broken_configuration_is_refused_and_the_one_before_serves_on() {
    let server = Server::start().await;
    server.configure(FIRST, "token-number-one", &json!({}));
    let worker = Worker::start(&server).await;
    server.acked(FIRST).await;
    server.configure(SECOND, "short", &json!({}));
    let ack = server.acked(SECOND).await;
    assert_eq!(ack["status"], "failed");
    let message = ack["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("orchestrator_bearer_token") && !message.contains("short"),
        "{message}"
    );
    assert_eq!(worker.answers("token-number-one").await, 200);
    // One that cannot even be read, but is named.
    server.script(|script| script.configuration = json!({"version": 1, "config_version": THIRD}));
    let ack = server.acked(THIRD).await;
    assert!(ack["error"]["message"].as_str().unwrap().contains("missing field"), "{ack}");
    assert_eq!(worker.answers("token-number-one").await, 200);
    worker.stop().await;
}

#[tokio::test]
async fn a_server_that_is_away_or_refuses_is_asked_until_it_agrees() {
    let server = Server::start().await;
    server.configure(FIRST, "token-number-one", &json!({}));
    server.script(|script| script.refusals = VecDeque::from([401, 403, 409, 500]));
    let worker = Worker::start(&server).await;
    server.acked(FIRST).await;
    let (body, shown) = server.script(|script| {
        assert!(script.refusals.is_empty());
        script.registrations[0].clone()
    });
    assert_eq!(shown, None);
    assert_eq!(body["capability"]["node"]["node_slug"], "alpha");
    assert_eq!(body["capability"]["worker_api"]["base_url"], worker.base);
    assert_eq!(body["capability"]["sandbox"]["supported"], false);
    worker.stop().await;
}

#[tokio::test]
async fn a_restart_without_the_server_serves_with_the_saved_configuration() {
    let server = Server::start().await;
    server.configure(FIRST, "token-number-one", &json!({}));
    let worker = Worker::start(&server).await;
    server.acked(FIRST).await;
    let dir = worker.stop().await;
    let (script, address) = server.stop().await;
    let worker = Worker::start_with(&format!("http://{address}"), dir, |_| ()).await;
    assert_eq!(worker.answers("token-number-one").await, 200);
    // It comes back, and knows the worker by the token that it shows.
    script.lock().unwrap().acks.clear();
    let server = Server::start_on(&address, script, None).await;
    server.acked(FIRST).await;
    let shown = server.script(|script| script.registrations[1].1.clone());
    assert_eq!(shown.as_deref(), Some("node-token-1"));
    worker.stop().await;
}

#[tokio::test]
async fn tokens_are_renewed_in_time_and_a_lost_one_is_replaced_by_registering() {
    let server = Server::start().await;
    server.configure(FIRST, "token-number-one", &json!({}));
    server.script(|script| script.life = Some(TimeDelta::milliseconds(200)));
    let worker = Worker::start(&server).await;
    until("the token is renewed", async || server.script(|script| script.renewals >= 2)).await;
    assert_eq!(server.script(|script| script.registrations.len()), 1);
    // Revoked.
    server.script(|script| script.good.clear());
    until("it registers again", async || server.script(|script| script.registrations.len() >= 2))
        .await;
    let beats = server.script(|script| script.beats.len());
    until("it is heard again", async || server.script(|script| script.beats.len() > beats + 1))
        .await;
    assert_eq!(worker.answers("token-number-one").await, 200);
    worker.stop().await;
}

#[tokio::test]
async fn a_drained_worker_stays_and_what_changes_is_reported() {
    let server = Server::start().await;
    server.configure(FIRST, "token-number-one", &json!({}));
    server.script(|script| script.drained = true);
    let worker =
        Worker::start_with(&server.script(|script| script.base.clone()), directory(), |startup| {
            startup.sandbox.mode = crate::worker::startup::SandboxMode::Allow
        })
        .await;
    server.acked(FIRST).await;
    let beats = server.script(|script| script.beats.len());
    until("heartbeats go on", async || server.script(|script| script.beats.len() > beats + 2))
        .await;
    // The trial sandboxes take longer than the first registration waits for them.
    until("the trial's end is reported", async || {
        server.script(|script| {
            script.reports.last().is_some_and(|report| report["sandbox"]["supported"] == true)
        })
    })
    .await;
    let report = server.script(|script| script.reports.last().cloned()).unwrap();
    assert_eq!(report["container_runtime"]["runtime"], "bubblewrap");
    assert_eq!(report["sandbox"]["images"], json!(["sandbox/base"]));
    worker.stop().await;
}

#[tokio::test]
async fn the_servers_rules_refuse_by_name() {
    let server = Server::start().await;
    let more = json!({
        "policy": {"sandbox": {"allowed_images": ["other"]}},
        "constraints": {"max_request_bytes": 2048}
    });
    server.configure(FIRST, "token-number-one", &more);
    let worker = Worker::start(&server).await;
    server.acked(FIRST).await;
    let run = async |image: &str, padding: usize| {
        let body = json!({
            "version": 1, "task_id": uuid::Uuid::new_v4(), "job_id": uuid::Uuid::new_v4(),
            "sandbox": {"image": image, "command": ["true", "x".repeat(padding)]}
        });
        let request = worker.http.post(format!("{}/v1/worker/jobs", worker.base)).json(&body);
        let answer = request.bearer_auth("token-number-one").send().await.unwrap();
        let status = answer.status().as_u16();
        let problem: Value = answer.json().await.unwrap();
        (status, problem["detail"].as_str().unwrap().to_owned())
    };
    let (status, detail) = run("sandbox/base", 1).await;
    assert_eq!(status, 400);
    assert!(
        detail.contains("`policy.sandbox.allowed_images` of the server's configuration"),
        "{detail}"
    );
    let (status, detail) = run("other", 4096).await;
    assert_eq!(status, 413);
    assert!(
        detail.contains("2048") && detail.contains("`constraints.max_request_bytes`"),
        "{detail}"
    );
    worker.stop().await;
}

/// A server that speaks TLS, its certificate, and a base URL with a name that the certificate is for.
async fn secure_server() -> (Server, Own) {
    let own = Own::make(&["127.0.0.1".to_owned()], now()).unwrap();
    let acceptor = Acceptor::from_pem(&own.certificate_pem, &own.key_pem).unwrap();
    let server = Server::start_on("127.0.0.1:0", Shared::default(), Some(acceptor)).await;
    server.configure(FIRST, "token-number-one", &json!({}));
    (server, own)
}

#[tokio::test]
async fn both_sides_recognise_each_other_and_a_wrong_pin_gets_nothing() {
    let (server, own) = secure_server().await;
    let base = server.script(|script| script.base.clone());
    let pinned = |pin: &str| {
        let pin = pin.to_owned();
        move |startup: &mut Startup| {
            startup.orchestrator.tls.pinned_sha256 = Some(pin);
            startup.worker_api.tls.mode = Some(ApiTlsMode::SelfSigned);
        }
    };
    let other = Own::make(&["127.0.0.1".to_owned()], now()).unwrap();
    let wrong = Pin::of_pem(&other.certificate_pem).unwrap().to_string();
    let stranger = Worker::start_with(&base, directory(), pinned(&wrong)).await;
    // As many tries as a minute of short seconds has.
    tokio::time::sleep(PACE.second * 100).await;
    assert!(server.script(|script| script.registrations.is_empty()));
    stranger.stop().await;

    let pin = Pin::of_pem(&own.certificate_pem).unwrap().to_string();
    let worker = Worker::start_with(&base, directory(), pinned(&pin)).await;
    server.acked(FIRST).await;
    assert!(worker.base.starts_with("https://"));
    let shown = server.script(|script| script.registrations[0].0["capability"]["tls"].clone());
    let shown = shown["worker_api_server_cert_pem"].as_str().unwrap().to_owned();
    let call = async |pem: &str| {
        let config = Trust::exactly(pem).unwrap().client_config().unwrap();
        let http = reqwest::Client::builder().no_proxy().tls_backend_preconfigured(config).build();
        let request = http.unwrap().get(format!("{}/v1/worker/capabilities", worker.base));
        let answer = request.bearer_auth("token-number-one").send().await;
        answer.map(|answer| answer.status().as_u16()).ok()
    };
    assert_eq!(call(&shown).await, Some(200));
    assert_eq!(call(&other.certificate_pem).await, None);
    // The certificate stays the same over a restart.
    let dir = worker.stop().await;
    let worker = Worker::start_with(&base, dir, pinned(&pin)).await;
    until("it is back", async || server.script(|script| script.registrations.len() == 2)).await;
    let again = server.script(|script| script.registrations[1].0["capability"]["tls"].clone());
    assert_eq!(again["worker_api_server_cert_pem"], *shown);
    worker.stop().await;
}

#[tokio::test]
async fn a_bundle_recognises_the_server_and_nothing_does_without_one() {
    let (server, own) = secure_server().await;
    let base = server.script(|script| script.base.clone());
    let stranger = Worker::start_with(&base, directory(), |_| ()).await;
    tokio::time::sleep(PACE.second * 100).await;
    assert!(server.script(|script| script.registrations.is_empty()));
    stranger.stop().await;
    let dir = directory();
    let bundle = dir.path().join("ca.pem");
    std::fs::write(&bundle, &own.certificate_pem).unwrap();
    let worker = Worker::start_with(&base, dir, |startup| {
        startup.orchestrator.tls.ca_bundle_path = Some(bundle);
    })
    .await;
    server.acked(FIRST).await;
    worker.stop().await;
}

#[tokio::test]
async fn a_worker_leaves_for_good_and_only_when_its_agent_has_ended() {
    let server = Server::start().await;
    server.configure(FIRST, "token-number-one", &json!({}));
    let worker = Worker::start(&server).await;
    server.acked(FIRST).await;
    let startup = plan(&server.script(|script| script.base.clone()), &worker.dir);
    let err = leave(&startup, &SystemClock).await.unwrap_err().to_string();
    assert!(err.contains("must not run"), "{err}");
    let _dir = worker.stop().await;
    // Its token has become invalid meanwhile: the key opens the door once more.
    server.script(|script| script.good.clear());
    leave(&startup, &SystemClock).await.unwrap();
    assert!(server.script(|script| script.gone));
    assert!(!startup.state_dir().join("node.json").exists());
    assert!(!startup.state_dir().join("config.json").exists());
    assert!(matches!(leave(&startup, &SystemClock).await, Err(LeaveError::Unknown(_))));
}

#[tokio::test]
async fn a_client_that_never_shakes_hands_keeps_nobody_out() {
    let server = Server::start().await;
    server.configure(FIRST, "token-number-one", &json!({}));
    let base = server.script(|script| script.base.clone());
    let worker = Worker::start_with(&base, directory(), |startup| {
        startup.worker_api.tls.mode = Some(ApiTlsMode::SelfSigned);
    })
    .await;
    let address = worker.base.trim_start_matches("https://").to_owned();
    let mut silent = Vec::new();
    for _ in 0..10 {
        silent.push(TcpStream::connect(&address).await.unwrap());
    }
    // The trial of a configuration is a call like any other.
    assert_eq!(server.acked(FIRST).await["status"], "applied");
    // Neither do they keep the agent from ending.
    let began = Instant::now();
    worker.stop().await;
    assert!(began.elapsed() < Duration::from_secs(5));
}
