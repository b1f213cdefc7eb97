//! Every route, found in the API's own description: which ones need a token, and that no foreign id
//! opens any of them.

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{Answer, TestSystem};

/// Routes that serve everybody.
const OPEN: &[&str] = &["/ok", "/info", "/healthz", "/readyz"];

#[sqlx::test]
async fn every_route_but_the_open_ones_needs_a_token(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let mut closed = 0;
    for (method, path) in operations(&system).await {
        let filled = filled(&path, &uuid::Uuid::nil().to_string());
        let answer = Answer::of(system.request(method.clone(), &filled)).await;
        let expected = match path.as_str() {
            open if OPEN.contains(&open) => 200,
            // Workers that register show a key in the body; without one nothing is looked at.
            "/v1/nodes/register" => 400,
            _ => 401,
        };
        assert_eq!(answer.status.as_u16(), expected, "{method} {path}");
        closed += usize::from(expected == 401);
    }
    assert!(closed > 40, "the description lists {closed} routes only");
    Answer::of(system.request(Method::GET, "/openapi.json")).await.expect(200);
}

#[sqlx::test]
async fn the_description_lists_what_clients_need(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let mut listed = operations(&system).await;
    listed.sort_by(|one, other| (&one.1, one.0.as_str()).cmp(&(&other.1, other.0.as_str())));
    let listed =
        listed.iter().map(|(method, path)| format!("{method} {path}\n")).collect::<String>();
    assert_eq!(listed, include_str!("routes.txt"));
}

#[sqlx::test]
async fn a_foreign_id_is_not_found_on_any_route(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    check_foreign(&system, |path| !needs_engine(path)).await;
}

#[sqlx::test]
async fn a_foreign_run_or_state_is_not_found_on_any_route(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    check_foreign(&system, needs_engine).await;
}

fn needs_engine(path: &str) -> bool {
    ["/runs", "/state", "/history", "/events"].iter().any(|part| path.contains(part))
}

/// Calls every route that names an id, with ids of the administrator's, as somebody else.
async fn check_foreign(system: &TestSystem, wanted: impl Fn(&str) -> bool) {
    let anna = system.user("anna").await;
    let thread = system.thread().await;
    let made = system.post("/assistants", json!({"graph_id": "count"})).await.expect(200);
    let assistant = made["assistant_id"].as_str().unwrap();
    let tokens = system.get("/v1/tokens").await.expect(200);
    let token = tokens[0]["token_id"].as_str().unwrap();
    insert_run(system, &thread).await;
    let mut called = 0;
    for (method, path) in operations(system).await {
        // These belong to the installation: nobody but an administrator learns which names there are.
        let shared = ["/v1/secrets/", "/v1/nodes/"].iter().any(|prefix| path.starts_with(prefix));
        if !path.contains('{') || shared || !wanted(&path) {
            continue;
        }
        let filled = path
            .replace("{thread_id}", &thread)
            .replace("{run_id}", &thread)
            .replace("{assistant_id}", assistant)
            .replace("{token_id}", token)
            .replace("{checkpoint_id}", "0-0")
            .replace("{namespace}", "inner");
        let answer = system.call_as(&anna, method.clone(), &filled, body(&method, &path)).await;
        assert_eq!(answer.status.as_u16(), 404, "{method} {path}: {}", answer.text);
        assert_eq!(answer.json()["code"], "not_found");
        // The same request finds nothing under an id that does not exist: the two look the same.
        let nil = self::filled(&path, &uuid::Uuid::nil().to_string());
        let other = system.call_as(&anna, method.clone(), &nil, body(&method, &path)).await;
        assert_eq!(other.status.as_u16(), 404, "{method} {path}: {}", other.text);
        called += 1;
    }
    assert!(called >= 9, "only {called} routes were called");
}

/// A run of the administrator's that has ended; its id is the thread's.
async fn insert_run(system: &TestSystem, thread: &str) {
    sqlx::query(
        "insert into runs (run_id, thread_id, user_id, assistant_id, graph_hash, status, options,
                           created_at, updated_at, ended_at)
         select thread_id, thread_id, user_id, thread_id, (select hash from graphs limit 1), 'success',
                '{}', now(), now(), now()
         from threads where thread_id = $1::uuid",
    )
    .bind(thread)
    .execute(&system.pool)
    .await
    .unwrap();
}

/// A body that the route accepts.
fn body(method: &Method, path: &str) -> Value {
    match (method.as_str(), path) {
        ("GET" | "DELETE", _) => Value::Null,
        (_, path)
            if path.ends_with("/runs") || path.ends_with("/stream") || path.ends_with("/wait") =>
        {
            json!({"assistant_id": "count", "input": {"n": 1}})
        }
        (_, path) if path.ends_with("/events") => json!({"name": "e"}),
        (_, path) if path.ends_with("/state/checkpoint") => json!({"checkpoint": {}}),
        (_, path) if path.ends_with("/state") => json!({"values": {"n": 1}}),
        (_, path) if path.ends_with("/login") => json!({"redirect_uri": "http://127.0.0.1:1/"}),
        (_, path) if path.ends_with("/login/finish") => json!({"led_to": "http://127.0.0.1:1/"}),
        _ => json!({}),
    }
}

/// Every id in the path is `id`.
fn filled(path: &str, id: &str) -> String {
    let parts = path.split('/').map(|part| if part.starts_with('{') { id } else { part });
    parts.collect::<Vec<_>>().join("/")
}

/// Every operation of the description.
async fn operations(system: &TestSystem) -> Vec<(Method, String)> {
    let api = system.get("/openapi.json").await.expect(200);
    let mut found = Vec::new();
    for (path, methods) in api["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let Ok(method) = method.to_uppercase().parse::<Method>() else { continue };
            assert!(
                operation["responses"]["default"].is_object(),
                "{method} {path} describes no errors"
            );
            found.push((method, path.clone()));
        }
    }
    found
}
