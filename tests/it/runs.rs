//! Runs over REST as far as nobody advances them: what is accepted, shown, cancelled and deleted.

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::TestSystem;

#[sqlx::test]
async fn an_accepted_run_is_pending_and_says_where_it_is(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let thread = system.thread().await;
    let path = format!("/threads/{thread}/runs");
    let body = json!({"assistant_id": "count", "input": {"n": 1}, "metadata": {"a": 1}});
    let made = system.post(&path, body).await;
    let run = made.expect(200);
    assert_eq!(
        (&run["status"], &run["multitask_strategy"]),
        (&json!("pending"), &json!("enqueue"))
    );
    assert_eq!((&run["thread_id"], &run["metadata"]["a"]), (&json!(thread), &json!(1)));
    let place = format!("{path}/{}", run["run_id"].as_str().unwrap());
    assert_eq!(made.header("content-location"), Some(place.as_str()));
    assert_eq!(system.get(&place).await.expect(200), run);
    assert_eq!(system.get(&format!("/threads/{thread}")).await.expect(200)["status"], "busy");
    let busy = system.call(Method::DELETE, &format!("/threads/{thread}"), Value::Null).await;
    busy.expect_error(409, "conflict");
    system.call(Method::DELETE, &place, Value::Null).await.expect_error(409, "conflict");
}

#[sqlx::test]
async fn runs_are_listed_newest_first_and_by_status(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let path = format!("/threads/{}/runs", system.thread().await);
    let mut made = Vec::new();
    for _ in 0..3 {
        let run = system
            .post(&path, json!({"assistant_id": "count", "input": {"n": 1}}))
            .await
            .expect(200);
        made.push(run["run_id"].clone());
    }
    made.reverse();
    let ids = |runs: &Value| {
        runs.as_array().unwrap().iter().map(|run| run["run_id"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(ids(&system.get(&path).await.expect(200)), made);
    assert_eq!(ids(&system.get(&format!("{path}?limit=1&offset=1")).await.expect(200)), made[1..2]);
    assert!(ids(&system.get(&format!("{path}?status=success")).await.expect(200)).is_empty());
    assert_eq!(
        ids(&system.post("/runs/search", json!({"status": "pending"})).await.expect(200)),
        made
    );
    let chosen = system.get(&format!("{path}?select=status&limit=1")).await.expect(200);
    assert_eq!(chosen, json!([{"status": "pending"}]));
    system.get(&format!("{path}?status=x")).await.expect_error(422, "invalid");
    system.get(&format!("{path}?limit=0")).await.expect_error(422, "invalid");
}

#[sqlx::test]
async fn a_pending_run_is_cancelled_once_and_then_deleted(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let path = format!("/threads/{}/runs", system.thread().await);
    let run =
        system.post(&path, json!({"assistant_id": "count", "input": {"n": 1}})).await.expect(200);
    let place = format!("{path}/{}", run["run_id"].as_str().unwrap());
    let cancel = async |query: &str| {
        system.call(Method::POST, &format!("{place}/cancel{query}"), Value::Null).await
    };
    cancel("?action=x").await.expect_error(422, "invalid");
    let done = cancel("?wait=1&reason=enough").await;
    assert_eq!(done.expect(200), json!({}));
    assert_eq!(done.header("location"), Some(format!("{place}/join").as_str()));
    let run = system.get(&place).await.expect(200);
    assert_eq!((&run["status"], &run["cancel_reason"]), (&json!("interrupted"), &json!("enough")));
    cancel("?wait=0").await.expect_error(404, "not_found");
    system.post("/runs/cancel", json!({"status": "all"})).await.expect_error(404, "not_found");
    system.call(Method::DELETE, &place, Value::Null).await.expect(204);
    system.get(&place).await.expect_error(404, "not_found");
}

#[sqlx::test]
async fn a_run_without_a_thread_is_found_by_its_id_alone(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let made = system.post("/runs", json!({"assistant_id": "count", "input": {"n": 1}})).await;
    let id = made.expect(200)["run_id"].as_str().unwrap().to_owned();
    let place = format!("/runs/{id}");
    assert_eq!(made.header("content-location"), Some(place.as_str()));
    assert_eq!(system.get(&place).await.expect(200)["run_id"], id.as_str());
    let batch = json!([{"assistant_id": "count", "input": {"n": 1}}, {"assistant_id": "outer", "input": {}}]);
    assert_eq!(system.post("/runs/batch", batch).await.expect(200).as_array().unwrap().len(), 2);
    system.post("/runs/cancel", json!({"status": "pending"})).await.expect(204);
    assert_eq!(system.get(&place).await.expect(200)["status"], "interrupted");
}

#[sqlx::test]
async fn what_cannot_run_is_refused(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let thread = system.thread().await;
    let path = format!("/threads/{thread}/runs");
    let run = async |body: Value| system.post(&path, body).await;
    run(json!({"assistant_id": "nothing"})).await.expect_error(404, "not_found");
    run(json!({"assistant_id": uuid::Uuid::nil()})).await.expect_error(404, "not_found");
    let wrong = run(json!({"assistant_id": "count", "input": {"n": "x"}})).await;
    assert_eq!(wrong.expect_error(422, "invalid")["metadata"]["path"], "/input/n");
    run(json!({"assistant_id": "count", "input": {"other": 1}})).await.expect_error(422, "invalid");
    let nowhere = format!("/threads/{}/runs", uuid::Uuid::nil());
    let body = json!({"assistant_id": "count", "input": {"n": 1}});
    system.post(&nowhere, body.clone()).await.expect_error(404, "not_found");
    let mut create = body.clone();
    create["if_not_exists"] = "create".into();
    system.post(&nowhere, create).await.expect(200);
    run(body.clone()).await.expect(200);
    let mut reject = body;
    reject["multitask_strategy"] = "reject".into();
    run(reject).await.expect_error(409, "conflict");
}
