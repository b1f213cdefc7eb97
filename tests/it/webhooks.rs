//! Webhooks: the end of a run is told once, signed, to addresses that may be told, whatever happens meanwhile.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::any;
use cynai::egress::address::Allowed;
use cynai::egress::guard::{Guard, Lookup};
use cynai::egress::signature::sign;
use cynai::egress::vault::{KeyRing, MasterKey};
use cynai::ids::RunId;
use cynai::nodes::{Registry, StoredNames, builtin};
use cynai::services::Egress;
use cynai::services::secrets::Vault;
use cynai::services::webhooks::{Attempt, DeliveryError};
use cynai::store::webhooks::SYSTEM_USER;
use futures::FutureExt;
use futures::future::BoxFuture;
use reqwest::Method;
use secrecy::SecretString;
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::TestSystem;
use crate::support::client::Client;
use crate::support::server::{Site, Start, until};

const GRAPHS: &[(&str, &str)] =
    &[("good", GOOD), ("bad", BAD), ("ask", ASK), ("slow", SLOW), ("late", LATE), ("large", LARGE)];

const GOOD: &str = r#"
name: good
state: { n: { type: integer, default: 0 } }
input: [n]
nodes: { add: { set: { n: "${state.n + 1}" } } }
edges: [ start -> add -> end ]
"#;
const BAD: &str = r#"
name: bad
state: { n: { type: integer, default: 0 }, word: { type: string, default: none } }
nodes: { add: { set: { n: "${int(state.word)}" } } }
edges: [ start -> add -> end ]
"#;
const ASK: &str = r#"
name: ask
state: { n: { type: integer, default: 7 }, answer: {} }
nodes: { ask: { interrupt: { ask: "Go on?" }, set: { answer: "${output}" } } }
edges: [ start -> ask -> end ]
"#;
const SLOW: &str = r#"
name: slow
state: { n: { type: integer, default: 0 } }
nodes: { sleep: { use: test/append, with: { file: "${env.TRACES}", sleep_ms: 60000 } } }
edges: [ start -> sleep -> end ]
"#;
const LATE: &str = r#"
name: late
state: { n: { type: integer, default: 0 } }
limits: { duration: 1s }
nodes: { sleep: { use: test/append, with: { file: "${env.TRACES}", sleep_ms: 60000 } } }
edges: [ start -> sleep -> end ]
"#;
const LARGE: &str = r#"
name: large
state: { text: { type: string } }
input: [text]
nodes: { double: { set: { text: "${state.text + state.text}" } } }
edges: [ start -> double -> end ]
"#;

/// One request that came.
#[derive(Debug, Clone)]
struct Message {
    headers: HeaderMap,
    body: Bytes,
}

impl Message {
    fn header(&self, name: &str) -> &str {
        self.headers[name].to_str().unwrap()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn is_signed_with(&self, key: &SecretString) -> bool {
        let at = self.header("webhook-timestamp").parse().unwrap();
        let expected = sign(key, self.header("webhook-id"), at, &self.body).unwrap();
        self.header("webhook-signature") == expected
    }
}

/// Listens for webhooks; answers from a script, then 200. Status 0 is no answer at all.
struct Receiver {
    address: SocketAddr,
    messages: Arc<Mutex<Vec<Message>>>,
    _serving: JoinSet<()>,
}

impl Receiver {
    async fn on(ip: &str, script: &[u16], location: &str) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let listener = TcpListener::bind((ip, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let messages = Arc::new(Mutex::new(Vec::new()));
        let script = Arc::new(Mutex::new(script.iter().copied().collect::<VecDeque<u16>>()));
        let (log, location) = (Arc::clone(&messages), location.to_owned());
        let receive = move |headers: HeaderMap, body: Bytes| async move {
            log.lock().unwrap().push(Message { headers, body });
            let status = script.lock().unwrap().pop_front().unwrap_or(200);
            if status == 0 {
                std::future::pending::<()>().await;
            }
            (StatusCode::from_u16(status).unwrap(), [(header::LOCATION, location)]).into_response()
        };
        let router =
            Router::new().fallback(any(receive)).layer(axum::extract::DefaultBodyLimit::disable());
        let mut serving = JoinSet::new();
        serving.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, messages, _serving: serving }
    }

    async fn good() -> Self {
        Self::on("127.0.0.2", &[], "").await
    }

    fn url(&self) -> String {
        format!("http://{}/hook?token=hunter2", self.address)
    }

    fn messages(&self) -> Vec<Message> {
        self.messages.lock().unwrap().clone()
    }

    async fn wait_for(&self, count: usize) -> Vec<Message> {
        until("webhooks come", async || (self.messages().len() >= count).then(|| self.messages()))
            .await
    }
}

/// 127.0.0.2 plays a public address, and all others of this machine private ones.
fn site(pool: &PgPool) -> Site {
    let url = pool.connect_options().to_url_lossy();
    let site = Site::on_database(GRAPHS, url.as_str());
    let file = site.path("config.yaml");
    std::fs::write(&file, "webhooks: { allow: [127.0.0.2] }\n").unwrap();
    site.with_flags(&["--no-local-worker", "--config", file.to_str().unwrap()])
}

/// Starts a run on a thread of its own, and answers both ids.
async fn start(client: &Client, graph: &str, url: &str) -> (String, String) {
    let thread = Uuid::now_v7().to_string();
    let run = start_on(client, &thread, graph, url, json!({})).await;
    (thread, run)
}

async fn start_on(client: &Client, thread: &str, graph: &str, url: &str, input: Value) -> String {
    let request = json!({ "input": input, "webhook": url, "if_not_exists": "create", "metadata": { "mine": 1 } });
    let run = client.start_run(thread, graph, request).await.unwrap();
    run["run_id"].as_str().unwrap().to_owned()
}

async fn wait(client: &Client, thread: &str, run: &str) -> Value {
    client.get(&format!("/threads/{thread}/runs/{run}/join")).await.unwrap()
}

async fn cancel(client: &Client, thread: &str, run: &str, action: &str) {
    let path = format!("/threads/{thread}/runs/{run}/cancel?action={action}");
    client.post(&path, &json!({})).await.unwrap();
}

/// How many deliveries there are: under way, and ended.
async fn deliveries(pool: &PgPool) -> (i64, i64) {
    sqlx::query_as(
        "select count(*) filter (where ended_at is null), count(*) filter (where ended_at is not null)
           from runs where user_id = $1",
    )
    .bind(SYSTEM_USER.0)
    .fetch_one(pool)
    .await
    .unwrap()
}

async fn all_delivered(pool: &PgPool, count: i64) {
    until("all is delivered", async || (deliveries(pool).await == (0, count)).then_some(())).await;
}

#[sqlx::test]
async fn every_end_is_told_once_and_signed(pool: PgPool) {
    let (site, receiver) = (site(&pool), Receiver::good().await);
    let server = site.start(&Start::default()).await;
    let (client, url) = (server.client(), receiver.url());
    let key = client.post("/v1/webhooks/key", &json!({})).await.unwrap();
    let key = SecretString::from(key["key"].as_str().unwrap());
    let mut expected = BTreeMap::new();
    for (graph, status) in
        [("good", "success"), ("bad", "error"), ("ask", "success"), ("late", "timeout")]
    {
        let (_, run) = start(&client, graph, &url).await;
        expected.insert(run, (status, graph));
    }
    for (action, status) in [("interrupt", "interrupted"), ("rollback", "interrupted")] {
        let (thread, run) = start(&client, "slow", &url).await;
        // One that waits for it, and ends before it has begun.
        let behind = start_on(&client, &thread, "good", &url, json!({})).await;
        cancel(&client, &thread, &behind, "interrupt").await;
        cancel(&client, &thread, &run, action).await;
        expected.insert(behind, ("interrupted", "good"));
        expected.insert(run, (status, "slow"));
    }
    all_delivered(&pool, i64::try_from(expected.len()).unwrap()).await;
    let messages = receiver.messages();
    assert_eq!(messages.len(), expected.len());
    let told: BTreeMap<&str, &Message> =
        messages.iter().map(|message| (message.header("webhook-id"), message)).collect();
    for (run, (status, graph)) in &expected {
        let message = told[run.as_str()];
        assert!(message.is_signed_with(&key), "{message:?}");
        assert_eq!(message.header("content-type"), "application/json");
        let body = message.json();
        assert_eq!((&body["run_id"], &body["status"]), (&json!(run), &json!(status)), "{graph}");
        assert_eq!(
            (&body["metadata"], &body["kwargs"]["webhook"]),
            (&json!({"mine": 1}), &json!(url))
        );
        for instant in ["created_at", "run_ended_at", "webhook_sent_at"] {
            let text = body[instant].as_str().unwrap_or_else(|| panic!("{instant} in {body}"));
            assert!(chrono::DateTime::parse_from_rfc3339(text).is_ok(), "{body}");
        }
        match *graph {
            "good" if *status == "success" => assert_eq!(body["values"], json!({ "n": 1 })),
            "ask" => assert_eq!(body["values"]["n"], 7),
            "bad" => assert!(body["error"]["message"].as_str().unwrap().contains("int"), "{body}"),
            "late" => assert_eq!(body["error"]["error"], "duration_limit"),
            _ => {}
        }
    }
    // Nobody sees what the server does for itself, or can be it.
    let runs = client.post("/runs/search", &json!({ "limit": 100 })).await.unwrap();
    assert!(
        runs.as_array()
            .unwrap()
            .iter()
            .all(|run| expected.contains_key(run["run_id"].as_str().unwrap()))
    );
    let threads = client.post("/threads/search", &json!({ "limit": 100 })).await.unwrap();
    assert_eq!(threads.as_array().unwrap().len(), 6);
    let found = client.post("/assistants/search", &json!({ "limit": 100 })).await.unwrap();
    assert!(!found.to_string().contains("webhook"), "{found}");
    let users = client.get("/v1/users").await.unwrap();
    assert_eq!(users.as_array().unwrap().len(), 1, "{users}");
    let token = json!({ "name": "x", "user": "cynai-system" });
    assert!(client.post("/v1/tokens", &token).await.is_err());
    assert!(client.start_run(&Uuid::now_v7().to_string(), "webhook", json!({})).await.is_err());
    let log = std::fs::read_to_string(site.path("log0")).unwrap();
    assert!(!log.contains("hunter2") && !log.contains("whsec_"), "{log}");
}

#[sqlx::test]
async fn an_answer_to_a_question_and_a_large_state_are_told_too(pool: PgPool) {
    let (site, receiver) = (site(&pool), Receiver::good().await);
    let server = site.start(&Start::default()).await;
    let (client, url) = (server.client(), receiver.url());
    let (thread, run) = start(&client, "ask", &url).await;
    wait(&client, &thread, &run).await;
    let request = json!({ "command": { "resume": "yes" }, "webhook": url });
    client.start_run(&thread, "ask", request).await.unwrap();
    let messages = receiver.wait_for(2).await;
    let answered = messages.iter().map(Message::json).find(|body| body["run_id"] != run.as_str());
    assert_eq!(answered.unwrap()["values"]["answer"], "yes");
    let thread = Uuid::now_v7().to_string();
    start_on(&client, &thread, "large", &url, json!({ "text": "x".repeat(3 << 20) })).await;
    let large = receiver.wait_for(3).await[2].json();
    assert_eq!((&large["status"], &large["values"]), (&json!("success"), &Value::Null));
    assert!(large["values_omitted"].as_str().unwrap().contains("at most 4194304"), "{large}");
}

#[sqlx::test]
async fn a_receiver_that_fails_is_told_again(pool: PgPool) {
    let (site, receiver) =
        (site(&pool), Receiver::on("127.0.0.2", &[500, 302], "http://127.0.0.1/").await);
    let server = site.start(&Start::default()).await;
    let client = server.client();
    let (thread, run) = start(&client, "good", &receiver.url()).await;
    wait(&client, &thread, &run).await;
    // The run and its thread may be gone meanwhile.
    client.call(Method::DELETE, &format!("/threads/{thread}"), None).await.unwrap();
    let messages = receiver.wait_for(3).await;
    all_delivered(&pool, 1).await;
    assert_eq!(receiver.messages().len(), 3);
    let bodies: Vec<Value> = messages
        .iter()
        .map(|message| {
            assert_eq!(message.header("webhook-id"), run);
            let mut body = message.json();
            body["webhook_sent_at"].take();
            body
        })
        .collect();
    assert!(bodies[0] == bodies[1] && bodies[1] == bodies[2]);
    // The key was made at first use; a new one signs from now on.
    let key = client.post("/v1/webhooks/key", &json!({})).await.unwrap();
    let key = SecretString::from(key["key"].as_str().unwrap());
    assert!(messages.iter().all(|message| !message.is_signed_with(&key)));
    start(&client, "good", &receiver.url()).await;
    assert!(receiver.wait_for(4).await[3].is_signed_with(&key));
}

/// Kills the server before the first commit of this name; the run has ended then, or not.
async fn check_kill(pool: PgPool, commit: &'static str, ended: bool) {
    let (site, receiver) = (site(&pool), Receiver::good().await);
    let frozen = Start { freeze_at: Some((commit, 1)), ..Start::default() };
    let mut server = site.start(&frozen).await;
    let (thread, run) = start(&server.client(), "good", &receiver.url()).await;
    until("the server stands still", async || server.is_frozen().then_some(())).await;
    server.kill();
    assert!(receiver.messages().is_empty());
    let status: String = sqlx::query_scalar("select status from runs where run_id = $1::uuid")
        .bind(&run)
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(status == "success", ended, "{status}");
    assert_eq!(deliveries(&pool).await, (i64::from(ended), 0));
    server = site.start(&Start::default()).await;
    wait(&server.client(), &thread, &run).await;
    all_delivered(&pool, 1).await;
    let messages = receiver.messages();
    assert_eq!(messages.len(), 1);
    assert_eq!(messages[0].header("webhook-id"), run);
}

#[sqlx::test]
async fn a_kill_before_the_end_is_committed_leaves_one_delivery(pool: PgPool) {
    check_kill(pool, "end", false).await;
}

#[sqlx::test]
async fn a_kill_between_the_end_and_the_delivery_leaves_one_delivery(pool: PgPool) {
    // The first commit of the delivery's own run, which the end has started.
    check_kill(pool, "begin", true).await;
}

#[sqlx::test]
async fn a_receiver_that_never_answers_slows_nobody(pool: PgPool) {
    let (site, receiver) = (site(&pool), Receiver::on("127.0.0.2", &[0; 20], "").await);
    let server = site.start(&Start::default()).await;
    let client = server.client();
    for _ in 0..20 {
        let begun = Instant::now();
        let (thread, run) = start(&client, "good", &receiver.url()).await;
        assert_eq!(wait(&client, &thread, &run).await, json!({ "n": 1 }));
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    }
    // Some hold a place each; the others wait without one, and other receivers are told meanwhile.
    receiver.wait_for(8).await;
    let good = Receiver::good().await;
    start(&client, "good", &good.url()).await;
    good.wait_for(1).await;
    assert_eq!(receiver.messages().len(), 8);
    // The good one's own run ends a moment after its receiver was told.
    until("only the silent one's are left", async || {
        (deliveries(&pool).await.0 == 20).then_some(())
    })
    .await;
    let begun = Instant::now();
    server.stop().await;
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

/// Names for deliveries without a server process.
struct Names(BTreeMap<&'static str, &'static str>);

impl Lookup for Names {
    fn addresses<'a>(&'a self, host: &'a str) -> BoxFuture<'a, std::io::Result<Vec<IpAddr>>> {
        let found = self.0.get(host).map(|ip| vec![ip.parse().unwrap()]).unwrap_or_default();
        async move { Ok(found) }.boxed()
    }
}

/// Operations that deliver, with 127.0.0.2 for a public address, and a run of the server's own.
async fn delivering(pool: PgPool) -> (TestSystem, RunId) {
    let system = TestSystem::start(pool).await;
    let ring = KeyRing::new([MasterKey::random()]).unwrap();
    let names = Names(BTreeMap::from([("good.test", "127.0.0.2"), ("evil.test", "127.0.0.1")]));
    let allowed = Allowed::parse(&["127.0.0.2"]).unwrap();
    system.services.set_egress(Egress {
        vault: Vault::Open(Arc::new(ring)),
        webhooks: Guard::with_lookup(allowed, Arc::new(names)),
    });
    system.services.set_builtin(builtin::graphs(&StoredNames(Registry::default())).unwrap());
    let run = RunId::new();
    sqlx::query(
        "insert into runs (run_id, thread_id, user_id, assistant_id, graph_hash, status, options, created_at, updated_at)
         values ($1, $1, $2, $1, '', 'running', '{}', now(), now())",
    )
    .bind(run.0)
    .bind(SYSTEM_USER.0)
    .execute(&system.pool)
    .await
    .unwrap();
    (system, run)
}

async fn deliver(system: &TestSystem, run: RunId, url: &str) -> Result<u16, DeliveryError> {
    let owner = system.services.authenticate(&system.token).await.unwrap().user_id;
    let delivery = json!({ "url": url, "owner": owner, "run": { "run_id": Uuid::now_v7() } });
    let attempt = Attempt { number: 1, last: false };
    system.services.deliver_webhook(run, attempt, delivery).await
}

#[sqlx::test]
async fn private_addresses_are_refused_when_accepted_and_at_each_attempt(pool: PgPool) {
    let (system, run) = delivering(pool).await;
    let private = Receiver::on("127.0.0.1", &[], "").await;
    let port = private.address.port();
    let here = format!("http://127.0.0.1:{port}/");
    let public = Receiver::on("127.0.0.2", &[302, 307, 410, 404], &here).await;
    let thread = system.thread().await;
    let accept = async |url: &str| {
        let body = json!({ "assistant_id": "count", "input": { "n": 1 }, "webhook": url });
        system.post(&format!("/threads/{thread}/runs"), body).await
    };
    for url in [
        here.as_str(),
        &format!("http://2130706433:{port}/"),
        &format!("http://[::ffff:7f00:1]:{port}/"),
        &format!("http://localhost:{port}/"),
        "http://169.254.169.254/latest/meta-data/",
        "http://name:hunter2@example.com/",
        "ftp://example.com/",
        "/relative",
        "nonsense",
        &format!("https://example.com/{}", "x".repeat(8192)),
    ] {
        let answer = accept(url).await.expect_error(422, "invalid");
        assert_eq!(answer["metadata"]["path"], "/webhook", "{url}: {answer}");
        assert!(!answer.to_string().contains("hunter2"), "{answer}");
    }
    let blocked = accept(&here).await.json();
    assert!(blocked["detail"].as_str().unwrap().starts_with("Webhook host blocked"), "{blocked}");
    accept("https://example.com/hook").await.expect(200);
    // What a name comes to is known at the attempt only.
    let evil = accept(&format!("http://evil.test:{port}/")).await;
    evil.expect(200);
    for url in [format!("http://evil.test:{port}/"), here] {
        let found = deliver(&system, run, &url).await;
        assert!(matches!(found, Err(DeliveryError::Refused(_))), "{found:?}");
    }
    let good = format!("http://good.test:{}/", public.address.port());
    for status in [302, 307] {
        let found = deliver(&system, run, &good).await.unwrap_err();
        let text = found.to_string();
        assert!(
            matches!(found, DeliveryError::Failed(_)) && text.contains(&status.to_string()),
            "{text}"
        );
    }
    let gone = deliver(&system, run, &good).await;
    assert!(matches!(gone, Err(DeliveryError::Refused(_))), "{gone:?}");
    let missing = deliver(&system, run, &good).await;
    assert!(matches!(missing, Err(DeliveryError::Failed(_))), "{missing:?}");
    assert_eq!(deliver(&system, run, &good).await.unwrap(), 200);
    assert!(private.messages().is_empty());
    // A run of a user's cannot deliver, whatever it says that it is.
    let users: Uuid = sqlx::query_scalar("select run_id from runs where user_id <> $1 limit 1")
        .bind(SYSTEM_USER.0)
        .fetch_one(&system.pool)
        .await
        .unwrap();
    let found = deliver(&system, RunId(users), &good).await;
    assert!(matches!(found, Err(DeliveryError::Refused(_))), "{found:?}");
    assert_eq!(public.messages().len(), 5);
}

#[sqlx::test]
async fn a_delivery_waits_for_ten_seconds_and_for_the_master_key(pool: PgPool) {
    let (system, run) = delivering(pool).await;
    let receiver = Receiver::on("127.0.0.2", &[0], "").await;
    let begun = Instant::now();
    let found = deliver(&system, run, &format!("http://{}/", receiver.address)).await;
    assert!(matches!(found, Err(DeliveryError::Failed(_))), "{found:?}");
    let took = begun.elapsed();
    assert!((Duration::from_secs(9)..Duration::from_secs(13)).contains(&took), "{took:?}");
    // Sealed with a key that this server does not have: nothing is sent, and no attempt is used up.
    sqlx::query("update secrets set key_id = 'another'").execute(&system.pool).await.unwrap();
    let found = deliver(&system, run, &format!("http://{}/", receiver.address)).await;
    let message = found.as_ref().unwrap_err().to_string();
    assert!(
        matches!(found, Err(DeliveryError::NotNow(_))) && message.contains("another"),
        "{message}"
    );
    assert_eq!(receiver.messages().len(), 1);
}
