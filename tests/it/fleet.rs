//! Worker machines as the server sees them: who may register, what they are configured with, who gets jobs.
//!
//! The worker here is a script of the test that speaks the wire by hand; where jobs run, a real agent stands
//! behind it.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use cynai::clock::SystemClock;
use cynai::egress::vault::{KeyRing, MasterKey};
use cynai::services::fleet::FleetConfig;
use cynai::services::secrets::Vault;
use cynai::services::{Egress, ServiceLimits, Services};
use cynai::worker::agent::Agent;
use cynai::worker::config::{Token, WorkerConfig};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::support::client::{Client, http};
use crate::support::server::{Server, Site, Start, until};
use crate::support::{Answer, TestSystem};

const KEY: &str = "a key that was handed out beforehand";

/// The same master key in every server of a test.
fn egress() -> Egress {
    let key = MasterKey::parse("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=").unwrap();
    Egress { vault: Vault::Open(Arc::new(KeyRing::new([key]).unwrap())), ..Egress::default() }
}

struct Fleet {
    system: TestSystem,
    _keeper: JoinSet<()>,
}

impl Fleet {
    async fn start(pool: PgPool) -> Self {
        Self::start_with(pool, FleetConfig::default()).await
    }

    async fn start_with(pool: PgPool, config: FleetConfig) -> Self {
        let system = TestSystem::start(pool).await;
        system.services.set_egress(egress());
        system.services.set_fleet(config);
        let mut keeper = JoinSet::new();
        let services = system.services.clone();
        keeper.spawn(async move { services.watch_fleet().await });
        let fleet = Self { system, _keeper: keeper };
        let set = json!({ "value": KEY });
        fleet.call(Method::PUT, "/v1/secrets/worker-registration", set).await.expect(200);
        fleet
    }

    async fn call(&self, method: Method, path: &str, body: Value) -> Answer {
        self.system.call(method, path, body).await
    }

    async fn post(&self, path: &str, body: Value) -> Answer {
        self.system.post(path, body).await
    }

    async fn worker(&self, slug: &str) -> Value {
        self.system.get(&format!("/v1/nodes/{slug}")).await.expect(200)
    }

    /// Waits until the worker's view is so.
    async fn until(&self, slug: &str, what: &str, reached: impl Fn(&Value) -> bool) -> Value {
        until(what, async || Some(self.worker(slug).await).filter(&reached)).await
    }

    async fn register_with(&self, psk: &str, token: Option<&str>, report: &Value) -> Answer {
        let body = json!({ "version": 1, "psk": psk, "capability": report });
        let request = self.system.request(Method::POST, "/v1/nodes/register").json(&body);
        Answer::of(match token {
            Some(token) => request.bearer_auth(token),
            None => request,
        })
        .await
    }

    async fn register(&self, slug: &str) -> Enrolled {
        let answer = self.register_with(KEY, None, &report(slug)).await;
        Enrolled::new(answer.expect(201), slug)
    }
}

/// A worker that has registered: it knows what it was told, and nothing else.
struct Enrolled {
    http: reqwest::Client,
    bootstrap: Value,
    slug: String,
}

impl Enrolled {
    fn new(bootstrap: Value, slug: &str) -> Self {
        Self { http: http(), bootstrap, slug: slug.to_owned() }
    }

    fn token(&self) -> &str {
        self.bootstrap["auth"]["node_jwt"].as_str().unwrap()
    }

    async fn call(&self, method: Method, endpoint: &str, query: &str, body: Value) -> Answer {
        let url = self.bootstrap["orchestrator"]["endpoints"][endpoint].as_str().unwrap();
        let request = self.http.request(method, format!("{url}{query}")).bearer_auth(self.token());
        Answer::of(if body.is_null() { request } else { request.json(&body) }).await
    }

    async fn config(&self) -> Value {
        self.call(Method::GET, "node_config_url", "", Value::Null).await.expect(200)
    }

    async fn ack(&self, config: &Value, status: &str, error: Option<&str>) -> Answer {
        let error = error.map(|message| json!({ "type": "test", "message": message }));
        let ack = json!({ "version": 1, "node_slug": self.slug, "config_version": config["config_version"],
            "ack_at": "2026-11-20T10:00:00Z", "status": status, "error": error });
        self.call(Method::POST, "node_config_url", "", ack).await
    }

    async fn beat(&self) -> Value {
        let beat = json!({ "version": 1, "running": 1, "queued": 2, "ready": true });
        self.call(Method::POST, "node_heartbeat_url", "", beat).await.expect(200)
    }

    async fn activate(&self) -> Value {
        let config = self.config().await;
        self.ack(&config, "applied", None).await.expect(204);
        self.beat().await;
        config
    }
}

fn report(slug: &str) -> Value {
    json!({
        "version": 1, "reported_at": "2026-11-20T10:00:00Z",
        "node": { "node_slug": slug, "labels": ["fast", "eu"] },
        "platform": { "os": "linux", "arch": "amd64" },
        "compute": { "cpu_cores": 2, "ram_mb": 1024 },
        "sandbox": { "supported": true, "max_concurrency": 4, "images": ["sandbox/base"], "mounts": [] },
        "worker_api": { "base_url": "http://127.0.0.1:9" },
        "something_new": { "kept": [1, 2.5, null] },
    })
}

fn bearer(config: &Value) -> &str {
    config["worker_api"]["orchestrator_bearer_token"].as_str().unwrap()
}

#[sqlx::test]
async fn a_worker_registers_is_configured_and_becomes_active(pool: PgPool) {
    let fleet = Fleet::start(pool).await;
    let worker = fleet.register("build-1").await;
    assert_eq!(fleet.worker("build-1").await["status"], "registered");
    let config = worker.config().await;
    assert_eq!(config["version"], 1);
    assert_eq!(config["node_slug"], "build-1");
    assert_eq!(config["config_version"], worker.bootstrap["initial_config_version"]);
    assert_eq!(config["config_version"].as_str().unwrap().len(), 26);
    assert_eq!(config["orchestrator"]["endpoints"]["worker_api_target_url"], "http://127.0.0.1:9");
    assert!(bearer(&config).len() >= 32);
    worker.ack(&config, "applied", None).await.expect(204);
    let answer = worker.beat().await;
    assert_eq!(answer["config_version"], config["config_version"]);
    assert_eq!(answer["drained"], false);
    let seen = fleet.worker("build-1").await;
    assert_eq!(seen["status"], "active");
    assert_eq!(seen["reason"], Value::Null);
    assert_eq!(seen["config_version"], config["config_version"]);
    assert_eq!(seen["config_ack_status"], "applied");
    assert_eq!(seen["config_ack_at"], "2026-11-20T10:00:00.000000+00:00");
    assert_eq!(
        (&seen["running"], &seen["queued"], &seen["slots"]),
        (&json!(1), &json!(2), &json!(4))
    );
    // Whole, also what this version does not know.
    assert_eq!(seen["capability"], report("build-1"));
    let listed = fleet.system.get("/v1/nodes?label=eu&label=fast&status=active").await.expect(200);
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert_eq!(fleet.system.get("/v1/nodes?label=us").await.expect(200), json!([]));
    assert_eq!(fleet.system.get("/v1/nodes?after=build-1").await.expect(200), json!([]));
    let first = fleet.system.get("/v1/nodes?limit=1000&after=").await.expect(200);
    assert_eq!(first.as_array().unwrap().len(), 1);
    fleet.system.get("/v1/nodes?status=asleep").await.expect_error(422, "invalid");
}

#[sqlx::test]
async fn only_who_has_a_key_registers(pool: PgPool) {
    let fleet = Fleet::start(pool).await;
    fleet.register_with("another key", None, &report("a")).await.expect_error(401, "unauthorized");
    fleet.register_with("", None, &report("a")).await.expect_error(401, "unauthorized");
    let made = fleet.post("/v1/nodes/key", json!({})).await.expect(201);
    assert_eq!(made["previous_is_good"], true);
    let fresh = made["key"].as_str().unwrap().to_owned();
    fleet.register_with(KEY, None, &report("old-key")).await.expect(201);
    fleet.register_with(&fresh, None, &report("new-key")).await.expect(201);
    fleet.call(Method::DELETE, "/v1/nodes/key/previous", Value::Null).await.expect(204);
    fleet.register_with(KEY, None, &report("b")).await.expect_error(401, "unauthorized");
    fleet.register_with(&fresh, None, &report("b")).await.expect(201);
    let gone = fleet.call(Method::DELETE, "/v1/nodes/key/previous", Value::Null).await;
    gone.expect_error(404, "not_found");
    fleet.call(Method::DELETE, "/v1/secrets/worker-registration", Value::Null).await.expect(204);
    let off = fleet.register_with(KEY, None, &report("b")).await.expect_error(403, "forbidden");
    assert!(off["detail"].as_str().unwrap().contains("cynai workers key"), "{off}");
}

#[sqlx::test]
async fn what_cannot_be_used_is_named(pool: PgPool) {
    let fleet = Fleet::start(pool).await;
    let check = async |change: &dyn Fn(&mut Value), status, words: &str| {
        let mut report = report("a");
        change(&mut report);
        let answer = fleet.register_with(KEY, None, &report).await;
        assert_eq!(answer.status.as_u16(), status, "{}", answer.text);
        assert!(answer.text.contains(words), "{words:?} is not in {}", answer.text);
    };
    check(
        &|report| report["version"] = json!(2),
        400,
        "has version 2; this server reads version 1",
    )
    .await;
    check(&|report| report["node"]["node_slug"] = json!("Build 1"), 422, "a-z, 0-9").await;
    check(&|report| report["node"]["node_slug"] = json!("self"), 422, "none of self").await;
    check(&|report| report["node"]["labels"] = json!(vec!["x"; 65]), 422, "at most 64 labels")
        .await;
    check(&|report| report["compute"] = json!({}), 422, "cpu_cores").await;
    check(&|report| report["worker_api"] = Value::Null, 422, "says where its Worker API is").await;
    for url in
        ["http://169.254.169.254", "ftp://a", "http://u:p@127.0.0.1", "http://127.0.0.1/path"]
    {
        check(&|report| report["worker_api"]["base_url"] = json!(url), 422, "/worker_api/base_url")
            .await;
    }
    check(
        &|report| {
            report["tls"] = json!({ "worker_api_server_cert_pem": "x" });
            report["worker_api"]["base_url"] = json!("https://127.0.0.1:9");
        },
        422,
        "no certificate",
    )
    .await;
    check(&|report| report["padding"] = json!("x".repeat(300 << 10)), 413, "at most").await;
    check(&|report| report["nul"] = json!("\u{0}"), 422, "U+0000").await;
    assert_eq!(fleet.system.get("/v1/nodes").await.expect(200), json!([]));
}

#[sqlx::test]
async fn nobody_takes_the_place_of_a_worker_that_is_alive(pool: PgPool) {
    let config = FleetConfig { stale_after: Duration::from_secs(4), ..FleetConfig::default() };
    let fleet = Fleet::start_with(pool, config).await;
    let worker = fleet.register("a").await;
    let refused = fleet.register_with(KEY, None, &report("a")).await.expect_error(409, "conflict");
    assert!(refused["detail"].as_str().unwrap().contains("is alive"), "{refused}");
    fleet.register_with(KEY, Some("cynw_other"), &report("a")).await.expect_error(409, "conflict");
    // The worker itself may, and gets another token; the one before is refused.
    let again = fleet.register_with(KEY, Some(worker.token()), &report("a")).await.expect(200);
    assert_ne!(again["auth"]["node_jwt"], worker.bootstrap["auth"]["node_jwt"]);
    worker
        .call(Method::GET, "node_config_url", "", Value::Null)
        .await
        .expect_error(401, "unauthorized");
    // The configuration is the same: nothing that it depends on has changed.
    assert_eq!(again["initial_config_version"], worker.bootstrap["initial_config_version"]);
    // What came before a token that was used proves nothing any more.
    let again = Enrolled::new(again, "a");
    let config = again.activate().await;
    fleet
        .register_with(KEY, Some(worker.token()), &report("a"))
        .await
        .expect_error(409, "conflict");
    assert_eq!(fleet.worker("a").await["status"], "active");
    // One that was not heard of may be replaced: its machine may have been set up anew. It is configured as a new one, and
    // does not get the token that opens the old machine.
    tokio::time::sleep(Duration::from_millis(4200)).await;
    let other = fleet.register_with(KEY, None, &report("a")).await.expect(200);
    let other = Enrolled::new(other, "a");
    assert_eq!(fleet.worker("a").await["status"], "registered");
    assert_ne!(bearer(&other.config().await), bearer(&config));
    assert_eq!(fleet.worker("a").await["config_version"], Value::Null);
}

#[sqlx::test]
async fn a_drained_worker_stays_drained_when_it_starts_again(pool: PgPool) {
    let fleet = Fleet::start(pool).await;
    let worker = fleet.register("a").await;
    worker.activate().await;
    let reason = json!({ "reason": "new disk" });
    let drained = fleet.post("/v1/nodes/a/drain", reason).await.expect(200);
    assert_eq!(drained["status"], "drained");
    assert_eq!(drained["drained_by"], "admin");
    assert_eq!(drained["reason"], "drained: new disk");
    assert_eq!(worker.beat().await["drained"], true);
    let token = worker.token().to_owned();
    let bootstrap = fleet.register_with(KEY, Some(&token), &report("a")).await.expect(200);
    let again = Enrolled::new(bootstrap, "a");
    again.activate().await;
    assert_eq!(fleet.worker("a").await["status"], "drained");
    assert_eq!(fleet.post("/v1/nodes/a/undrain", json!({})).await.expect(200)["status"], "active");
    assert_eq!(again.beat().await["drained"], false);
}

#[sqlx::test]
async fn a_worker_that_is_silent_is_inactive_until_it_is_heard_again(pool: PgPool) {
    let config = FleetConfig { stale_after: Duration::from_secs(3), ..FleetConfig::default() };
    let fleet = Fleet::start_with(pool, config).await;
    let worker = fleet.register("a").await;
    worker.activate().await;
    fleet.until("a", "the worker to be inactive", |view| view["status"] == "inactive").await;
    worker.beat().await;
    assert_eq!(fleet.worker("a").await["status"], "active");
}

#[sqlx::test]
async fn a_changed_policy_is_a_new_version_that_waiting_workers_get_at_once(pool: PgPool) {
    let fleet = Fleet::start(pool).await;
    let worker = fleet.register("a").await;
    let first = worker.activate().await;
    let after = format!("?after={}", first["config_version"].as_str().unwrap());
    let none = worker.call(Method::GET, "node_config_url", &after, Value::Null).await;
    assert_eq!(none.status, 204);
    let query = format!("{after}&wait=30");
    let waiting = worker.call(Method::GET, "node_config_url", &query, Value::Null);
    let policy = json!({ "constraints": { "max_job_timeout_seconds": 60 }, "notes": "hello" });
    let setting = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        fleet.call(Method::PUT, "/v1/nodes/policy", policy.clone()).await.expect(200)
    };
    let began = std::time::Instant::now();
    let (second, set) = tokio::join!(waiting, setting);
    assert!(began.elapsed() < Duration::from_secs(15), "it was not told");
    let second = second.expect(200);
    assert_eq!(set["effective"]["updates"]["poll_interval_seconds"], 60);
    assert!(second["config_version"].as_str() > first["config_version"].as_str());
    assert_eq!(second["constraints"]["max_job_timeout_seconds"], 60);
    assert_eq!(second["notes"], "hello");
    assert_eq!(bearer(&second), bearer(&first));
    // The same policy again is the same configuration.
    fleet.call(Method::PUT, "/v1/nodes/policy", policy).await.expect(200);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(worker.config().await["config_version"], second["config_version"]);
    // For one worker alone.
    let patch =
        json!({ "policy_patch": { "notes": null, "sandbox": { "allowed_images": ["x"] } } });
    fleet.call(Method::PATCH, "/v1/nodes/a", patch).await.expect(200);
    let third = worker.config().await;
    assert_eq!(third["policy"]["sandbox"]["allowed_images"], json!(["x"]));
    assert_eq!(third["notes"], Value::Null);
    let wrong = json!({ "policy_patch": { "sandbox": { "image": [] } } });
    fleet.call(Method::PATCH, "/v1/nodes/a", wrong).await.expect_error(422, "invalid");
}

#[sqlx::test]
async fn acknowledgements_are_kept_and_late_ones_change_nothing(pool: PgPool) {
    let fleet = Fleet::start(pool).await;
    let worker = fleet.register("a").await;
    let first = worker.activate().await;
    fleet.post("/v1/nodes/a/refresh", json!({})).await.expect(200);
    let second = worker.config().await;
    worker.ack(&second, "failed", Some("no such\nregistry")).await.expect(204);
    let seen = fleet.worker("a").await;
    assert_eq!(seen["status"], "registered");
    assert_eq!(seen["config_ack_status"], "failed");
    assert_eq!(seen["config_ack_error"], "test: no suchregistry");
    assert_eq!(seen["config_version"], first["config_version"], "the last one that was applied");
    assert_eq!(seen["config_ack_version"], second["config_version"]);
    // An answer that was held up on the way.
    worker.ack(&first, "applied", None).await.expect(204);
    assert_eq!(fleet.worker("a").await["config_ack_status"], "failed");
    worker.ack(&second, "rolled_back", Some("it did not answer")).await.expect(204);
    assert_eq!(fleet.worker("a").await["config_ack_status"], "rolled_back");
    worker.ack(&second, "applied", None).await.expect(204);
    let seen = fleet.worker("a").await;
    assert_eq!(seen["status"], "active");
    assert_eq!(seen["config_ack_error"], Value::Null);
    worker.ack(&second, "failed", None).await.expect_error(400, "bad_request");
    // What is none of the worker's.
    let other = json!({ "config_version": "01ARZ3NDEKTSV4RRFFQ69G5FAV" });
    worker.ack(&other, "applied", None).await.expect_error(400, "bad_request");
    let stranger = Enrolled::new(worker.bootstrap.clone(), "b");
    stranger.ack(&second, "applied", None).await.expect_error(400, "bad_request");
    worker.ack(&second, "perhaps", None).await.expect_error(422, "invalid");
}

#[sqlx::test]
async fn a_bearer_token_changes_over_with_the_acknowledgement_and_is_stored_sealed(pool: PgPool) {
    let fleet = Fleet::start(pool.clone()).await;
    let worker = fleet.register("a").await;
    let first = worker.activate().await;
    fleet.post("/v1/nodes/a/refresh", json!({ "rotate_token": true })).await.expect(200);
    let second = worker.config().await;
    assert_ne!(bearer(&first), bearer(&second));
    let names = async || {
        let listed = fleet.system.get("/v1/secrets").await.expect(200);
        let names: Vec<String> = listed
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|row| row["name"].as_str().map(str::to_owned))
            .collect();
        names.into_iter().filter(|name| name.starts_with("worker.")).collect::<Vec<_>>()
    };
    assert_eq!(names().await.len(), 2, "until the worker has said that it applied the new one");
    worker.ack(&second, "applied", None).await.expect(204);
    assert_eq!(names().await.len(), 1);
    let set = json!({ "value": "x" });
    let own = fleet.call(Method::PUT, &format!("/v1/secrets/{}", names().await[0]), set).await;
    own.expect_error(422, "invalid");
    // Nothing in the database opens a worker, and nothing that an administrator sees does.
    let dump: String = {
        let mut all = String::new();
        for table in ["workers", "worker_configs", "worker_tokens", "worker_reports", "secrets"] {
            // Columns of bytes are shown in hexadecimal.
            let query = format!("select coalesce(string_agg(x::text, ' '), '') from {table} x");
            all += &sqlx::query_scalar::<_, String>(sqlx::AssertSqlSafe(query))
                .fetch_one(&pool)
                .await
                .unwrap();
        }
        all + &fleet.worker("a").await.to_string()
    };
    for secret in [bearer(&first), bearer(&second), worker.token(), KEY] {
        let hex: String = secret.bytes().map(|byte| format!("{byte:02x}")).collect();
        assert!(!dump.contains(secret) && !dump.contains(&hex));
    }
    fleet.call(Method::DELETE, "/v1/nodes/a", Value::Null).await.expect(204);
    assert_eq!(names().await.len(), 0);
}

#[sqlx::test]
async fn tokens_are_renewed_expire_and_end_with_the_worker(pool: PgPool) {
    let config = FleetConfig { node_token: Duration::from_secs(5), ..FleetConfig::default() };
    let fleet = Fleet::start_with(pool, config).await;
    let mut worker = fleet.register("a").await;
    let renewed = worker.call(Method::POST, "node_token_url", "", Value::Null).await.expect(200);
    assert_eq!(renewed["version"], 1);
    worker.config().await;
    worker.bootstrap["auth"] = renewed["auth"].clone();
    worker.config().await;
    tokio::time::sleep(Duration::from_millis(5200)).await;
    let beat = json!({ "version": 1, "running": 0, "queued": 0, "ready": true });
    let late = worker.call(Method::POST, "node_heartbeat_url", "", beat.clone()).await;
    late.expect_error(401, "unauthorized");
    worker
        .call(Method::POST, "node_token_url", "", Value::Null)
        .await
        .expect_error(401, "unauthorized");
    // An expired token still proves who asks for another.
    let bootstrap = fleet.register_with(KEY, Some(worker.token()), &report("a")).await.expect(200);
    let worker = Enrolled::new(bootstrap, "a");
    worker.call(Method::DELETE, "node_self_unregister_url", "", Value::Null).await.expect(204);
    worker
        .call(Method::POST, "node_heartbeat_url", "", beat)
        .await
        .expect_error(401, "unauthorized");
    fleet.system.get("/v1/nodes/a").await.expect_error(404, "not_found");
    fleet.register("a").await;
}

#[sqlx::test]
async fn a_pull_secret_that_changes_is_a_new_configuration(pool: PgPool) {
    let fleet = Fleet::start(pool).await;
    let worker = fleet.register("a").await;
    let policy = json!({ "sandbox_registry": { "registry_url": "https://registry.internal", "pull_token_secret": "pull-images" } });
    let missing = fleet.call(Method::PUT, "/v1/nodes/policy", policy.clone()).await;
    assert!(
        missing.expect_error(422, "invalid")["detail"]
            .as_str()
            .unwrap()
            .contains("cynai secrets set pull-images")
    );
    fleet.call(Method::PUT, "/v1/secrets/pull-images", json!({ "value": "one" })).await.expect(200);
    fleet.call(Method::PUT, "/v1/nodes/policy", policy).await.expect(200);
    let pulls = async |token: &str| {
        until("the worker to be told the secret", async || {
            let config = worker.config().await;
            (config["sandbox_registry"]["pull_token"] == token).then_some(config)
        })
        .await
    };
    let first = pulls("one").await;
    fleet.call(Method::PUT, "/v1/secrets/pull-images", json!({ "value": "two" })).await.expect(200);
    let second = pulls("two").await;
    assert!(second["config_version"].as_str() > first["config_version"].as_str());
    // One that was deleted and set again is another one, although it has the first version again.
    fleet.call(Method::DELETE, "/v1/secrets/pull-images", Value::Null).await.expect(204);
    fleet
        .call(Method::PUT, "/v1/secrets/pull-images", json!({ "value": "three" }))
        .await
        .expect(200);
    let third = pulls("three").await;
    assert!(third["config_version"].as_str() > second["config_version"].as_str());
    // An administrator reads no other secret this way.
    let other = json!({ "model_cache": { "pull_token_secret": "worker-registration" } });
    let refused = fleet.call(Method::PUT, "/v1/nodes/policy", other).await;
    assert!(refused.expect_error(422, "invalid")["detail"].as_str().unwrap().contains("pull-"));
    // Without the secret the worker keeps what it has, and the reason is told.
    fleet.call(Method::DELETE, "/v1/secrets/pull-images", Value::Null).await.expect(204);
    let answer = worker.call(Method::GET, "node_config_url", "", Value::Null).await;
    answer.expect_error(503, "unavailable");
}

#[sqlx::test]
async fn only_an_administrator_sees_and_changes_workers(pool: PgPool) {
    let fleet = Fleet::start(pool).await;
    let worker = fleet.register("a").await;
    let anna = fleet.system.user("anna").await;
    for (method, path) in [
        (Method::GET, "/v1/nodes"),
        (Method::GET, "/v1/nodes/a"),
        (Method::PATCH, "/v1/nodes/a"),
        (Method::DELETE, "/v1/nodes/a"),
        (Method::POST, "/v1/nodes/a/drain"),
        (Method::POST, "/v1/nodes/a/undrain"),
        (Method::POST, "/v1/nodes/a/refresh"),
        (Method::GET, "/v1/nodes/policy"),
        (Method::PUT, "/v1/nodes/policy"),
        (Method::POST, "/v1/nodes/key"),
    ] {
        fleet
            .system
            .call_as(&anna, method.clone(), path, json!({}))
            .await
            .expect_error(403, "forbidden");
        // A worker's token opens its own routes only, and a user's opens none of those.
        fleet
            .system
            .call_as(worker.token(), method, path, json!({}))
            .await
            .expect_error(401, "unauthorized");
    }
    for path in ["/v1/nodes/self/report", "/v1/nodes/self/token", "/v1/nodes/self/config"] {
        let answer = fleet.system.post(path, report("a")).await;
        answer.expect_error(401, "unauthorized");
    }
}

/// Another server's operations on the same database see the same worker, and both may watch it.
#[sqlx::test]
async fn two_servers_configure_a_worker_once(pool: PgPool) {
    let fleet = Fleet::start(pool.clone()).await;
    let other = Services::new(pool.clone(), Arc::new(SystemClock), ServiceLimits::default());
    other.set_egress(egress());
    let mut watching = JoinSet::new();
    watching.spawn(async move { other.watch_fleet().await });
    let worker = fleet.register("a").await;
    worker.activate().await;
    for number in 1..=5 {
        let policy = json!({ "notes": format!("number {number}") });
        fleet.call(Method::PUT, "/v1/nodes/policy", policy).await.expect(200);
        until("the policy to arrive", async || {
            (worker.config().await["notes"] == format!("number {number}")).then_some(())
        })
        .await;
    }
    let configs: i64 =
        sqlx::query_scalar("select count(*) from worker_configs").fetch_one(&pool).await.unwrap();
    assert_eq!(configs, 6, "one for each policy, whoever made it");
}

/// An agent in this process, which is the worker's Worker API.
async fn agent(token: &str, folder: &std::path::Path) -> (String, CancellationToken, JoinSet<()>) {
    let config = WorkerConfig::new(Token::new(token), folder);
    let agent = Agent::bind(config, Arc::new(SystemClock)).await.unwrap();
    let (url, stop, mut tasks) =
        (agent.listening().listening, CancellationToken::new(), JoinSet::new());
    let stopped = stop.clone();
    tasks.spawn(async move { agent.run(stopped).await.unwrap() });
    (url, stop, tasks)
}

const JOBS: &str = r#"
name: jobs
state:
  names: { type: array, items: { type: string } }
  lines: { type: array, reduce: append }
input: [names]
nodes:
  say:
    for_each: ${state.names}
    as: name
    job:
      image: sandbox/base
      command: [echo, "${name}"]
    set: { lines: "${[output.stdout.trim()]}" }
edges: [start -> say -> end]
"#;

const ABSENT: &str = r#"
name: absent
state: { line: { type: string } }
input: []
nodes:
  say:
    job: { image: no/such, command: [echo] }
    set: { line: "${output.stdout}" }
edges: [start -> say -> end]
"#;

const SLOW: &str = r#"
name: slow
state: { line: { type: string } }
input: []
nodes:
  say:
    job: { image: sandbox/base, command: [sleep, "3"] }
    set: { line: "${output.stdout}" }
edges: [start -> say -> end]
"#;

/// A server without a worker of its own, and workers: scripts of this test before real agents.
struct Yard {
    site: Site,
    server: Server,
    client: Client,
    key: Value,
    agents: Vec<(CancellationToken, JoinSet<()>, tempfile::TempDir)>,
}

impl Yard {
    async fn start() -> Self {
        let graphs = [("jobs", JOBS), ("absent", ABSENT), ("slow", SLOW)];
        let site = Site::new(&graphs).with_flags(&["--no-local-worker"]);
        let server = site.start(&Start::default()).await;
        let client = server.client();
        let key = client.post("/v1/nodes/key", &json!({})).await.unwrap();
        Self { site, server, client, key, agents: Vec::new() }
    }

    async fn add(&mut self, slug: &str) {
        let body = json!({ "version": 1, "psk": self.key["key"], "capability": report(slug) });
        let bootstrap = self.client.post("/v1/nodes/register", &body).await.unwrap();
        let worker = Enrolled::new(bootstrap, slug);
        let folder = tempfile::tempdir().unwrap();
        let (url, stop, tasks) = agent(bearer(&worker.config().await), folder.path()).await;
        let mut report = report(slug);
        report["worker_api"]["base_url"] = url.into();
        worker.call(Method::POST, "node_report_url", "", report).await.expect(204);
        worker.activate().await;
        self.agents.push((stop, tasks, folder));
    }

    /// Starts a run on a thread of its own.
    async fn run(&self, graph: &str, input: Value) -> String {
        let thread = uuid::Uuid::new_v4().to_string();
        self.client.ensure_thread(&thread).await.unwrap();
        self.client.start_run(&thread, graph, json!({ "input": input })).await.unwrap();
        thread
    }

    async fn is(&self, thread: &str, status: &str) -> bool {
        self.client.thread(thread).await.unwrap()["status"] == status
    }

    /// Waits for the end of a thread's run; answers the lines that its jobs printed.
    async fn lines(&self, thread: &str) -> Value {
        until("the run to end", async || self.is(thread, "idle").await.then_some(())).await;
        let state = self.client.get(&format!("/threads/{thread}/state")).await.unwrap();
        state["values"]["lines"].clone()
    }

    async fn worker(&self, slug: &str) -> Value {
        self.client.get(&format!("/v1/nodes/{slug}")).await.unwrap()
    }

    /// How many jobs a worker has done.
    async fn done(&self, slug: &str) -> i64 {
        let name = format!("worker:{}", self.worker(slug).await["worker_id"].as_str().unwrap());
        let count = "select count(*) from jobs where worker = $1 and status = 'completed'";
        sqlx::query_scalar(count)
            .bind(name)
            .fetch_one(&mut self.site.database().await)
            .await
            .unwrap()
    }

    /// Takes a worker out of service or back, and waits until the server must have seen it.
    async fn serve(&self, slug: &str, change: &str) {
        self.client.post(&format!("/v1/nodes/{slug}/{change}"), &json!({})).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1500)).await;
    }

    async fn end(self) {
        for (stop, mut tasks, _folder) in self.agents {
            stop.cancel();
            while tasks.join_next().await.is_some() {}
        }
        assert!(self.server.stop().await.success());
    }
}

/// Zero workers is a normal state: jobs wait for the first one. Then they are shared out, and a worker that is out of
/// service gets none.
#[tokio::test]
async fn jobs_wait_for_a_worker_and_go_to_those_in_service() {
    let mut yard = Yard::start().await;
    let names: Vec<String> = (0..6).map(|number| format!("job {number}")).collect();
    let first = yard.run("jobs", json!({ "names": names[..1] })).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(yard.is(&first, "busy").await);
    yard.add("one").await;
    yard.add("two").await;
    assert_eq!(yard.lines(&first).await, json!(names[..1]));

    let shared = yard.run("jobs", json!({ "names": names })).await;
    assert_eq!(yard.lines(&shared).await, json!(names));
    let (one, two) = (yard.done("one").await, yard.done("two").await);
    assert_eq!(one + two, 7);
    assert!(one >= 2 && two >= 2, "{one} and {two}: jobs that are sent at once are shared out");

    // An image that no worker has: the reason names each of them.
    let absent = yard.run("absent", json!({})).await;
    until("the run to fail", async || yard.is(&absent, "error").await.then_some(())).await;
    let error = yard.client.runs(&absent).await.unwrap().remove(0).to_string()
        + &yard.client.thread(&absent).await.unwrap().to_string();
    assert!(error.contains("one has no image `no/such`; two has no image `no/such`"), "{error}");

    yard.serve("one", "drain").await;
    let again = yard.run("jobs", json!({ "names": names })).await;
    assert_eq!(yard.lines(&again).await, json!(names));
    assert_eq!((yard.done("one").await, yard.done("two").await), (one, two + 6));
    yard.end().await;
}

/// What a worker was doing when it was removed is lost there, and done again where there is somebody.
#[tokio::test]
async fn jobs_of_a_worker_that_is_removed_are_done_by_another() {
    let mut yard = Yard::start().await;
    yard.add("one").await;
    let slow = yard.run("slow", json!({})).await;
    until("the job to be sent", async || {
        (yard.worker("one").await["open_jobs"] == 1).then_some(())
    })
    .await;
    yard.add("two").await;
    yard.client.call(Method::DELETE, "/v1/nodes/one", None).await.unwrap();
    yard.lines(&slow).await;
    assert_eq!(yard.done("two").await, 1);
    yard.end().await;
}

/// A worker machine's agent as a process, started with a file as its operator has one.
struct Machine {
    slug: &'static str,
    folder: tempfile::TempDir,
    child: Option<Child>,
}

impl Machine {
    fn new(yard: &Yard, slug: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let key = folder.path().join("key");
        std::fs::write(&key, yard.key["key"].as_str().unwrap()).unwrap();
        let file = json!({
            "version": 1,
            "orchestrator": { "url": yard.server.address(), "registration_psk_file": key },
            "node": { "id": slug, "labels": ["test"] },
            "worker_api": {
                "listen_host": "127.0.0.1", "listen_port": 0, "tls": { "mode": "self_signed" },
            },
            "storage": { "state_dir": folder.path().join("state") },
        });
        std::fs::write(folder.path().join("worker.yaml"), file.to_string()).unwrap();
        let mut machine = Self { slug, folder, child: None };
        machine.start();
        machine
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cynai"));
        command
            .arg("worker")
            .args(words)
            .arg("--config")
            .arg(self.folder.path().join("worker.yaml"));
        command.stdout(Stdio::null());
        command
    }

    fn start(&mut self) {
        let path = self.folder.path().join("log");
        let log = std::fs::File::options().create(true).append(true).open(path).unwrap();
        self.child = Some(self.command(&[]).stderr(log).spawn().unwrap());
    }

    /// As a power cut does.
    fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    async fn until(&self, yard: &Yard, what: &str, reached: impl Fn(&Value) -> bool) -> Value {
        until(what, async || {
            let view = yard.client.get(&format!("/v1/nodes/{}", self.slug)).await.ok()?;
            Some(view).filter(&reached)
        })
        .await
    }

    async fn is_active(&self, yard: &Yard) -> Value {
        self.until(yard, "the worker to be active", |view| {
            view["status"] == "active" && view["reason"].is_null()
        })
        .await
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(30).collect();
            eprintln!(
                "--- the end of the log of {}, last line first\n{}",
                self.slug,
                tail.join("\n")
            );
        }
    }
}

/// Workers as people have them: processes that register, take what they are configured with, and do jobs, over TLS.
#[tokio::test]
async fn real_workers_do_jobs_and_follow_what_is_decided_about_them() {
    let yard = Yard::start().await;
    let (mut alpha, beta) = (Machine::new(&yard, "alpha"), Machine::new(&yard, "beta"));
    let view = alpha.is_active(&yard).await;
    assert!(view["worker_api_url"].as_str().unwrap().starts_with("https://127.0.0.1:"));
    assert_eq!((&view["tls_pinned"], &view["labels"]), (&json!(true), &json!(["test"])));
    beta.is_active(&yard).await;
    let names: Vec<String> = (0..6).map(|number| format!("job {number}")).collect();
    let run = yard.run("jobs", json!({ "names": names })).await;
    assert_eq!(yard.lines(&run).await, json!(names));
    assert!(yard.done("alpha").await > 0 && yard.done("beta").await > 0);

    // Another bearer token: the worker acknowledges it, and the server goes on with it.
    let change = json!({ "rotate_token": true });
    let issued = yard.client.post("/v1/nodes/alpha/refresh", &change).await.unwrap();
    alpha
        .until(&yard, "the worker to apply its configuration", |view| {
            view["config_version"] == issued["issued_config_version"]
        })
        .await;
    yard.serve("beta", "drain").await;
    let run = yard.run("jobs", json!({ "names": names })).await;
    assert_eq!(yard.lines(&run).await, json!(names));

    // A stricter policy holds as soon as it is acknowledged.
    let policy = json!({ "constraints": { "max_job_timeout_seconds": 1 } });
    let set = async |policy: &Value| {
        let before = yard.worker("alpha").await["config_version"].clone();
        yard.client.call(Method::PUT, "/v1/nodes/policy", Some(policy)).await.unwrap();
        alpha
            .until(&yard, "the policy to be applied", |view| view["config_version"] != before)
            .await;
    };
    set(&policy).await;
    let run = yard.run("slow", json!({})).await;
    until("the job to run out of time", async || yard.is(&run, "error").await.then_some(())).await;
    set(&json!({})).await;

    // Killed with a job under way: it comes back by itself, and the job is done again.
    let run = yard.run("slow", json!({})).await;
    alpha.until(&yard, "the job to be sent", |view| view["open_jobs"] == 1).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    alpha.kill();
    alpha.start();
    yard.lines(&run).await;

    // Drained, it stays so when it starts again.
    yard.serve("alpha", "drain").await;
    let registered = yard.worker("alpha").await["registered_at"].clone();
    alpha.kill();
    alpha.start();
    let again = |view: &Value| view["registered_at"] != registered && view["ready"] == true;
    assert_eq!(alpha.until(&yard, "the worker to come back", again).await["status"], "drained");

    // It goes for good.
    alpha.kill();
    assert!(alpha.command(&["leave"]).stderr(Stdio::null()).status().unwrap().success());
    assert!(yard.client.get("/v1/nodes/alpha").await.is_err());
    drop(beta);
    yard.end().await;
}
