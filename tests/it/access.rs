//! Tokens and users: who gets in.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use chrono::TimeDelta;
use cynai::clock::{Clock, SystemClock, TestClock};
use cynai::services::access::Bootstrap;
use cynai::services::{ServiceLimits, Services};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{Answer, Options, TestSystem, start_of_time};

#[sqlx::test]
async fn a_request_without_a_good_token_is_told_how_to_send_one(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let path = "/threads/search";
    let none = Answer::of(system.request(Method::POST, path)).await;
    assert!(none.expect_error(401, "unauthorized")["detail"].as_str().unwrap().contains("Bearer"));
    assert!(none.header("www-authenticate").unwrap().starts_with("Bearer"));
    let well_formed = format!("cyn_{}", "x".repeat(43));
    for wrong in ["", "x", "cyn_x", &well_formed] {
        system
            .call_as(wrong, Method::POST, path, json!({}))
            .await
            .expect_error(401, "unauthorized");
    }
}

#[sqlx::test]
async fn a_token_works_in_both_headers(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let key = system.request(Method::GET, "/v1/me").header("x-api-key", &system.token);
    assert_eq!(Answer::of(key).await.expect(200)["name"], "admin");
    assert_eq!(system.get("/v1/me").await.expect(200)["admin"], true);
}

#[sqlx::test]
async fn the_first_start_writes_a_token_that_only_its_owner_can_read(pool: PgPool) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("admin-token");
    let clock = Arc::new(TestClock::at(start_of_time()));
    let services = Services::new(pool.clone(), clock, ServiceLimits::default());
    assert_eq!(services.bootstrap_admin(&file).await.unwrap(), Bootstrap::Written);
    let mode = std::fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let token = std::fs::read_to_string(&file).unwrap();
    assert!(services.authenticate(token.trim()).await.unwrap().admin);
    assert_eq!(services.bootstrap_admin(&file).await.unwrap(), Bootstrap::Existing);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), token);
    let stored: Vec<u8> =
        sqlx::query_scalar("select hash from tokens").fetch_one(&pool).await.unwrap();
    assert!(!token.as_bytes().windows(32).any(|part| part == stored));
}

#[sqlx::test]
async fn an_admin_without_a_usable_token_gets_one_at_the_next_start(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let tokens = system.get("/v1/tokens").await.expect(200);
    let path = format!("/v1/tokens/{}", tokens[0]["token_id"].as_str().unwrap());
    system.call(Method::DELETE, &path, Value::Null).await.expect(204);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("admin-token");
    assert_eq!(system.services.bootstrap_admin(&file).await.unwrap(), Bootstrap::Written);
    let token = std::fs::read_to_string(&file).unwrap();
    system.call_as(token.trim(), Method::GET, "/v1/me", Value::Null).await.expect(200);
}

#[sqlx::test]
async fn two_first_starts_at_once_make_one_token(pool: PgPool) {
    let folder = tempfile::tempdir().unwrap();
    let start = async |name: &str| {
        let clock = Arc::new(TestClock::at(start_of_time()));
        let services = Services::new(pool.clone(), clock, ServiceLimits::default());
        services.bootstrap_admin(&folder.path().join(name)).await.unwrap()
    };
    let (one, other) = tokio::join!(start("one"), start("other"));
    assert_ne!(one, other);
    let count: i64 =
        sqlx::query_scalar("select count(*) from tokens").fetch_one(&pool).await.unwrap();
    assert_eq!(count, 1);
}

#[sqlx::test]
async fn a_token_is_shown_once_listed_without_it_and_refused_after_its_revocation(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let made = system.post("/v1/tokens", json!({"name": "laptop"})).await.expect(201);
    let token = made["token"].as_str().unwrap();
    assert_eq!(token.len(), 47);
    system.call_as(token, Method::GET, "/v1/me", Value::Null).await.expect(200);
    let listed = system.get("/v1/tokens").await;
    assert!(!listed.text.contains(token));
    assert_eq!(listed.expect(200)[0]["name"], "laptop");
    let path = format!("/v1/tokens/{}", made["token_id"].as_str().unwrap());
    system.call(Method::DELETE, &path, Value::Null).await.expect(204);
    // It was remembered a moment ago: here it is refused at once all the same.
    system
        .call_as(token, Method::GET, "/v1/me", Value::Null)
        .await
        .expect_error(401, "unauthorized");
    system.call(Method::DELETE, &path, Value::Null).await.expect_error(404, "not_found");
}

#[sqlx::test]
async fn an_expired_token_is_refused(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    system.clock.advance(SystemClock.now() - start_of_time() - TimeDelta::hours(2));
    let request = |ttl: u64| json!({"name": "short", "ttl_seconds": ttl});
    let dead = system.post("/v1/tokens", request(3600)).await.expect(201);
    let live = system.post("/v1/tokens", request(3 * 3600)).await.expect(201);
    let me = async |made: &Value| {
        let token = made["token"].as_str().unwrap();
        system.call_as(token, Method::GET, "/v1/me", Value::Null).await
    };
    me(&dead).await.expect_error(401, "unauthorized");
    me(&live).await.expect(200);
    system.post("/v1/tokens", request(0)).await.expect_error(422, "invalid");
}

#[sqlx::test]
async fn use_of_a_token_is_recorded_at_most_once_a_minute(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let last = async || system.get("/v1/tokens").await.expect(200)[0]["last_used_at"].clone();
    assert_eq!(last().await, "2026-11-20T10:00:00.123456+00:00");
    system.clock.advance(TimeDelta::seconds(30));
    assert_eq!(last().await, "2026-11-20T10:00:00.123456+00:00");
}

#[sqlx::test]
async fn only_an_admin_manages_others(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let anna = system.user("anna").await;
    let call = async |method, path, body| system.call_as(&anna, method, path, body).await;
    call(Method::GET, "/v1/users", Value::Null).await.expect_error(403, "forbidden");
    call(Method::POST, "/v1/users", json!({"name": "eve"})).await.expect_error(403, "forbidden");
    let other = json!({"name": "x", "user": "admin"});
    call(Method::POST, "/v1/tokens", other).await.expect_error(403, "forbidden");
    call(Method::GET, "/v1/tokens?user=admin", Value::Null).await.expect_error(403, "forbidden");
    call(Method::POST, "/v1/tokens", json!({"name": "own"})).await.expect(201);
    assert_eq!(
        call(Method::GET, "/v1/tokens", Value::Null).await.expect(200).as_array().unwrap().len(),
        2
    );
    let users = system.get("/v1/users").await.expect(200);
    assert_eq!(users[1]["name"], "anna");
}

#[sqlx::test]
async fn bad_names_and_taken_ones_are_refused(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let create = async |name: &str| system.post("/v1/users", json!({"name": name})).await;
    create("Anna").await.expect_error(422, "invalid");
    create("").await.expect_error(422, "invalid");
    create("admin").await.expect_error(409, "conflict");
    system.post("/v1/tokens", json!({"name": ""})).await.expect_error(422, "invalid");
    let unknown = json!({"name": "x", "user": "nobody"});
    system.post("/v1/tokens", unknown).await.expect_error(404, "not_found");
}

#[sqlx::test]
async fn a_user_has_a_limited_number_of_tokens(pool: PgPool) {
    let limits = ServiceLimits { tokens_per_user: 2, ..ServiceLimits::default() };
    let system = TestSystem::start_with(pool, Options { limits, ..Options::default() }).await;
    system.post("/v1/tokens", json!({"name": "second"})).await.expect(201);
    system.post("/v1/tokens", json!({"name": "third"})).await.expect_error(409, "conflict");
}
