//! Logins to a server by OAuth: made by an administrator, kept sealed, renewed when they run out. The protocol
//! itself is what the conformance suite looks at.

use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::{Form, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use cynai::egress::vault::{KeyRing, MasterKey};
use cynai::services::Egress;
use cynai::services::secrets::Vault;
use cynai::tools::Tools;
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::task::JoinSet;
use url::Url;

use super::tools_config;
use crate::support::TestSystem;

/// A tool server that wants a login, and the authorization server beside it.
#[derive(Clone)]
struct Wants {
    base: String,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    /// Tokens that were granted; the last one counts.
    tokens: usize,
    /// How long a token lasts, in seconds.
    lasts: u64,
    /// The scopes that were last asked for.
    scope: String,
    /// What came to the place where tokens are granted.
    grants: Vec<String>,
    /// A scope without which no tool may be called.
    needs: Option<&'static str>,
}

impl Wants {
    /// Both, as long as the set lives.
    async fn start(lasts: u64) -> (Self, JoinSet<std::io::Result<()>>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let wants = Self { base, seen: Arc::default() };
        wants.seen.lock().unwrap().lasts = lasts;
        let router = Router::new()
            .route("/mcp", post(mcp))
            .route("/.well-known/oauth-protected-resource/mcp", get(resource))
            .route("/.well-known/oauth-authorization-server", get(metadata))
            .route("/register", post(register))
            .route("/authorize", get(authorize))
            .route("/token", post(token))
            .with_state(wants.clone());
        let mut serving = JoinSet::new();
        serving.spawn(async move { axum::serve(listener, router).await });
        (wants, serving)
    }
}

async fn resource(State(wants): State<Wants>) -> Json<Value> {
    let base = &wants.base;
    Json(json!({"resource": format!("{base}/mcp"), "authorization_servers": [base]}))
}

async fn metadata(State(wants): State<Wants>) -> Json<Value> {
    let at = |path: &str| format!("{}{path}", wants.base);
    Json(json!({
        "issuer": wants.base,
        "authorization_endpoint": at("/authorize"),
        "token_endpoint": at("/token"),
        "registration_endpoint": at("/register"),
        "response_types_supported": ["code"],
        "code_challenge_methods_supported": ["S256"],
        "token_endpoint_auth_methods_supported": ["client_secret_post"],
    }))
}

async fn register(Json(client): Json<Value>) -> Response {
    let client = json!({"client_id": "we", "client_secret": "our-secret",
        "redirect_uris": client["redirect_uris"]});
    (StatusCode::CREATED, Json(client)).into_response()
}

async fn authorize(State(wants): State<Wants>, Query(asked): Query<Value>) -> Redirect {
    let text = |name: &str| asked[name].as_str().unwrap_or_default().to_owned();
    wants.seen.lock().unwrap().scope = text("scope");
    Redirect::to(&format!("{}?code=agreed&state={}", text("redirect_uri"), text("state")))
}

async fn token(State(wants): State<Wants>, Form(asked): Form<Value>) -> Response {
    let mut seen = wants.seen.lock().unwrap();
    let kind = asked["grant_type"].as_str().unwrap().to_owned();
    seen.grants.push(kind.clone());
    let known = asked["client_id"] == "we" && asked["client_secret"] == "our-secret";
    let fits = match kind.as_str() {
        "authorization_code" => asked["code"] == "agreed",
        _ => asked["refresh_token"] == format!("renew-{}", seen.tokens),
    };
    if !known || !fits {
        return (StatusCode::BAD_REQUEST, Json(json!({"error": "invalid_grant"}))).into_response();
    }
    seen.tokens += 1;
    let number = seen.tokens;
    let granted = json!({"access_token": format!("token-{number}"), "token_type": "Bearer",
        "refresh_token": format!("renew-{number}"), "expires_in": seen.lasts, "scope": seen.scope});
    Json(granted).into_response()
}

async fn mcp(State(wants): State<Wants>, headers: HeaderMap, Json(asked): Json<Value>) -> Response {
    let seen = wants.seen.lock().unwrap();
    let with = headers.get(header::AUTHORIZATION).map(|with| with.to_str().unwrap());
    let refused = |status, more: &str| {
        let place = format!("{}/.well-known/oauth-protected-resource/mcp", wants.base);
        let challenge = format!("Bearer resource_metadata=\"{place}\"{more}");
        (status, [(header::WWW_AUTHENTICATE, challenge)]).into_response()
    };
    if with != Some(format!("Bearer token-{}", seen.tokens).as_str()) {
        return refused(StatusCode::UNAUTHORIZED, ", scope=\"look\"");
    }
    let result = match asked["method"].as_str().unwrap() {
        "initialize" => json!({"protocolVersion": "2025-11-25", "capabilities": {"tools": {}},
            "serverInfo": {"name": "wants", "version": "1"}}),
        "tools/list" => json!({"tools": [{"name": "who", "inputSchema": {"type": "object"}}]}),
        "tools/call" => {
            if let Some(scope) = seen.needs.filter(|scope| !seen.scope.contains(scope)) {
                let more = format!(", error=\"insufficient_scope\", scope=\"{scope}\"");
                return refused(StatusCode::FORBIDDEN, &more);
            }
            json!({"content": [{"type": "text", "text": format!("token {}", seen.tokens)}]})
        }
        _ => return StatusCode::ACCEPTED.into_response(),
    };
    Json(json!({"jsonrpc": "2.0", "id": asked["id"], "result": result})).into_response()
}

async fn system(pool: PgPool, wants: &Wants) -> TestSystem {
    let system = TestSystem::start(pool).await;
    let vault = Vault::Open(Arc::new(KeyRing::new([MasterKey::random()]).unwrap()));
    system.services.set_egress(Egress { vault, ..Egress::default() });
    let _ = rustls::crypto::ring::default_provider().install_default();
    let server =
        json!({"url": format!("{}/mcp", wants.base), "oauth": {}, "protocol": "2025-11-25"});
    let config = tools_config(&std::env::temp_dir(), server);
    let tools = Tools::new(config, Arc::new(system.services.keys()));
    system.services.set_tools(tools);
    system
}

/// Logs in as an administrator with a browser does, by the command.
async fn log_in(system: &TestSystem) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cynai"))
        .args(["tools", "login", "s"])
        .env_clear()
        .env("CYNAI_SERVER", &system.base)
        .env("CYNAI_TOKEN", &system.token)
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(command.stdout.take().unwrap()).lines();
    let page = lines.next_line().await.unwrap().unwrap();
    let shown = reqwest::get(&page).await.unwrap().text().await.unwrap();
    assert!(shown.contains("You are logged in"), "{shown}");
    assert_eq!(lines.next_line().await.unwrap().unwrap(), "logged in to s");
    assert!(command.wait().await.unwrap().success());
}

async fn who(system: &TestSystem) -> String {
    let answer = system.post("/v1/tools/s/who/call", json!({})).await.expect(200);
    answer["content"][0]["text"].as_str().unwrap().to_owned()
}

#[sqlx::test]
async fn a_server_that_wants_a_login_is_used_after_one(pool: PgPool) {
    let (wants, _serving) = Wants::start(3600).await;
    let system = system(pool, &wants).await;
    let refused = system.post("/v1/tools/s/who/call", json!({})).await;
    let body = refused.expect_error(503, "login_required");
    assert!(body["detail"].as_str().unwrap().contains("cynai tools login s"), "{body}");
    assert_eq!(body["metadata"]["outcome"], "not_sent");

    log_in(&system).await;
    assert_eq!(who(&system).await, "token 1");
    assert_eq!(wants.seen.lock().unwrap().scope, "look");
    // It is kept as a secret is, and nothing tells it.
    let secrets = system.get("/v1/secrets").await.expect(200);
    assert_eq!(secrets[0]["name"], "mcp-login.s");
    assert!(!secrets.to_string().contains("token-1"));

    // A call that needs more says so; the next login may do both.
    wants.seen.lock().unwrap().needs = Some("write");
    system.post("/v1/tools/s/who/call", json!({})).await.expect_error(503, "login_required");
    log_in(&system).await;
    assert_eq!(who(&system).await, "token 2");
    assert_eq!(wants.seen.lock().unwrap().scope, "write look");
    // Logging out is deleting it.
    system.call(Method::DELETE, "/v1/secrets/mcp-login.s", Value::Null).await.expect(204);
    system.post("/v1/tools/s/who/call", json!({})).await.expect_error(503, "login_required");
}

#[sqlx::test]
async fn a_login_that_runs_out_is_renewed_by_every_process(pool: PgPool) {
    let (wants, _serving) = Wants::start(4).await;
    let system = system(pool, &wants).await;
    log_in(&system).await;
    let first = who(&system).await;
    tokio::time::sleep(Duration::from_millis(4100)).await;
    let renewed = who(&system).await;
    assert_ne!(renewed, first);
    // A process that starts later knows the client that the login was made with.
    let server =
        json!({"url": format!("{}/mcp", wants.base), "oauth": {}, "protocol": "2025-11-25"});
    let later =
        Tools::new(tools_config(&std::env::temp_dir(), server), Arc::new(system.services.keys()));
    tokio::time::sleep(Duration::from_millis(4100)).await;
    let answer = later.call(super::call("who", json!({})), None).await.unwrap();
    assert_ne!(answer.text(), renewed);
    let grants = wants.seen.lock().unwrap().grants.clone();
    assert_eq!(grants[0], "authorization_code");
    assert!(
        grants.len() >= 3 && grants[1..].iter().all(|kind| kind == "refresh_token"),
        "{grants:?}"
    );
    later.close().await;
}

#[sqlx::test]
async fn a_login_is_begun_and_finished_by_an_administrator_and_not_by_others(pool: PgPool) {
    let (wants, _serving) = Wants::start(3600).await;
    let system = system(pool, &wants).await;
    let begin = json!({"redirect_uri": "http://127.0.0.1:1/callback"});
    let other = system.user("somebody").await;
    let path = "/v1/tools/s/login";
    system.call_as(&other, Method::POST, path, begin.clone()).await.expect_error(403, "forbidden");
    for elsewhere in ["https://evil.example/callback", "http://10.0.0.1/callback", "x"] {
        let refused = system.post(path, json!({"redirect_uri": elsewhere})).await;
        refused.expect_error(422, "invalid");
    }
    let finish = |led_to: Url| {
        let body = json!({"led_to": led_to.as_str()});
        system.post("/v1/tools/s/login/finish", body)
    };
    let forged = Url::parse("http://127.0.0.1:1/callback?code=agreed&state=guessed").unwrap();
    finish(forged.clone()).await.expect_error(503, "login_required");

    let page = system.post(path, begin).await.expect(200)["authorization_url"].clone();
    let browser = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none());
    let led = browser.build().unwrap().get(page.as_str().unwrap()).send().await.unwrap();
    let led_to = Url::parse(led.headers()[header::LOCATION].to_str().unwrap()).unwrap();
    // An answer that nobody gave does not end the login that waits.
    finish(forged).await.expect_error(503, "login_required");
    finish(led_to.clone()).await.expect(204);
    assert_eq!(who(&system).await, "token 1");
    // The same answer does not count twice.
    finish(led_to).await.expect_error(503, "login_required");
}
