//! Threads over REST, as far as no run is needed.

use cynai::services::ServiceLimits;
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{Answer, Options, TestSystem};

#[sqlx::test]
async fn a_new_thread_is_idle_and_empty(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let made = system.post("/threads", json!({"metadata": {"a": 1}})).await.expect(200);
    let expected = json!({
        "thread_id": made["thread_id"],
        "created_at": "2026-11-20T10:00:00.123456+00:00",
        "updated_at": "2026-11-20T10:00:00.123456+00:00",
        "state_updated_at": "2026-11-20T10:00:00.123456+00:00",
        "metadata": {"a": 1}, "status": "idle", "config": {},
        "values": null, "interrupts": {}, "error": null,
    });
    assert_eq!(made, expected);
    let path = format!("/threads/{}", made["thread_id"].as_str().unwrap());
    assert_eq!(system.get(&path).await.expect(200), expected);
}

#[sqlx::test]
async fn a_taken_id_is_a_conflict_unless_the_client_says_otherwise(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let id = system.thread().await;
    system.post("/threads", json!({"thread_id": id})).await.expect_error(409, "conflict");
    let again = json!({"thread_id": id, "if_exists": "do_nothing", "metadata": {"new": true}});
    let found = system.post("/threads", again.clone()).await.expect(200);
    assert_eq!(found["metadata"], json!({}));
    let anna = system.user("anna").await;
    system.call_as(&anna, Method::POST, "/threads", again).await.expect_error(409, "conflict");
}

#[sqlx::test]
async fn metadata_is_merged_and_bounded(pool: PgPool) {
    let limits = ServiceLimits { metadata_bytes: 100, ..ServiceLimits::default() };
    let system = TestSystem::start_with(pool, Options { limits, ..Options::default() }).await;
    let path = format!("/threads/{}", system.thread().await);
    let patch = async |metadata: Value| {
        system.call(Method::PATCH, &path, json!({"metadata": metadata})).await
    };
    patch(json!({"a": 1, "b": "x".repeat(40)})).await.expect(200);
    let merged = patch(json!({"a": 2})).await.expect(200);
    assert_eq!(merged["metadata"], json!({"a": 2, "b": "x".repeat(40)}));
    patch(json!({"c": "x".repeat(101)})).await.expect_error(413, "too_large");
    // Small enough by itself, but not together with what is there.
    patch(json!({"c": "x".repeat(60)})).await.expect_error(413, "too_large");
    assert_eq!(system.get(&path).await.expect(200)["metadata"], merged["metadata"]);
    let nul = patch(json!({"c": {"d": "\u{0}"}})).await.expect_error(422, "invalid");
    assert_eq!(nul["metadata"]["path"], "/metadata/c/d");
}

#[sqlx::test]
async fn a_client_may_prefer_no_answer(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let path = format!("/threads/{}", system.thread().await);
    let request = system.request(Method::PATCH, &path).bearer_auth(&system.token);
    let request = request.header("prefer", "return=minimal").json(&json!({"metadata": {"a": 1}}));
    let answer = Answer::of(request).await;
    assert_eq!((answer.status.as_u16(), answer.text.as_str()), (204, ""));
    assert_eq!(system.get(&path).await.expect(200)["metadata"]["a"], 1);
}

#[sqlx::test]
async fn a_deleted_thread_is_gone_with_all_that_hangs_on_it(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let id = system.thread().await;
    let path = format!("/threads/{id}");
    insert_everything(&system, &id).await;
    set_busy(&system, &id, true).await;
    system.call(Method::DELETE, &path, Value::Null).await.expect_error(409, "conflict");
    set_busy(&system, &id, false).await;
    system.call(Method::DELETE, &path, Value::Null).await.expect(204);
    system.call(Method::DELETE, &path, Value::Null).await.expect_error(404, "not_found");
    let left: i64 = sqlx::query_scalar(
        "select (select count(*) from threads) + (select count(*) from runs) + (select count(*) from heads)
              + (select count(*) from queue) + (select count(*) from checkpoints)
              + (select count(*) from channel_values) + (select count(*) from writes)
              + (select count(*) from pending) + (select count(*) from events)
              + (select count(*) from stream_events) + (select count(*) from jobs)",
    )
    .fetch_one(&system.pool)
    .await
    .unwrap();
    assert_eq!(left, 0);
}

async fn set_busy(system: &TestSystem, id: &str, busy: bool) {
    sqlx::query(
        "update threads set status = case when $2 then 'busy' else 'idle' end,
                            active_run = case when $2 then thread_id end where thread_id = $1::uuid",
    )
    .bind(id)
    .bind(busy)
    .execute(&system.pool)
    .await
    .unwrap();
}

/// A row of the thread in every table; its only run has the thread's id.
async fn insert_everything(system: &TestSystem, id: &str) {
    let statements = [
        "insert into runs (run_id, thread_id, user_id, assistant_id, graph_hash, status, options,
                           created_at, updated_at, ended_at)
         select thread_id, thread_id, user_id, thread_id, '\\x00', 'success', '', now(), now(), now()
         from threads where thread_id = $1::uuid",
        "insert into heads (run_id, thread_id, status) values ($1::uuid, $1::uuid, 'parked')",
        "insert into queue (run_id, thread_id, user_id, state, due)
         values ($1::uuid, $1::uuid, $1::uuid, 'ready', now())",
        "insert into checkpoints (thread_id, run_id, seq, at, branch, source, namespace, next, changed)
         values ($1::uuid, $1::uuid, 0, now(), 0, 0, '', '', '')",
        "insert into channel_values (thread_id, namespace, branch, seq, channel, value)
         values ($1::uuid, '', 0, 0, 'a', '')",
        "insert into writes (thread_id, namespace, branch, seq, task_id, writes)
         values ($1::uuid, '', 0, 0, $1::uuid, '')",
        "insert into pending (thread_id, namespace, branch, seq, task_id, run_id, node, kind)
         values ($1::uuid, '', 0, 0, $1::uuid, $1::uuid, 'n', 'timer')",
        "insert into events (thread_id, name, payload, created_at) values ($1::uuid, 'e', '', now())",
        "insert into stream_events (run_id, seq, place, mode, namespace, data)
         values ($1::uuid, 0, 0, 'custom', '', '')",
        "insert into jobs (job_id, run_id, thread_id, user_id, namespace, branch, seq, task_id, attempt,
                           node, status, request, created_at)
         values ($1::uuid, $1::uuid, $1::uuid, $1::uuid, '', 0, 0, $1::uuid, 1, 'n', 'completed', '', now())",
    ];
    for statement in statements {
        sqlx::query(statement).bind(id).execute(&system.pool).await.unwrap();
    }
}

#[sqlx::test]
async fn search_pages_through_all_threads_once(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let mut made = Vec::new();
    for number in 0..5 {
        system.clock.advance(chrono::TimeDelta::seconds(1));
        let thread =
            system.post("/threads", json!({"metadata": {"number": number}})).await.expect(200);
        made.push(thread["thread_id"].clone());
    }
    made.reverse();
    let mut seen = Vec::new();
    let mut offset = Some("0".to_owned());
    let mut totals = Vec::new();
    while let Some(at) = offset {
        let at: u32 = at.parse().unwrap();
        let page = system.post("/threads/search", json!({"limit": 2, "offset": at})).await;
        seen.extend(
            page.expect(200).as_array().unwrap().iter().map(|item| item["thread_id"].clone()),
        );
        totals.push(page.header("x-pagination-total").unwrap().to_owned());
        offset = page.header("x-pagination-next").map(str::to_owned);
    }
    assert_eq!(seen, made);
    assert_eq!(totals, ["3", "5", "5"]);
    let ascending = json!({"sort_by": "created_at", "sort_order": "asc", "limit": 1});
    let first = system.post("/threads/search", ascending).await.expect(200);
    assert_eq!(first[0]["thread_id"], *made.last().unwrap());
    system.post("/threads/search", json!({"limit": 0})).await.expect_error(422, "invalid");
    system.post("/threads/search", json!({"limit": 1001})).await.expect_error(422, "invalid");
    system.post("/threads/search", json!({"sort_by": "x"})).await.expect_error(422, "invalid");
}

#[sqlx::test]
async fn search_finds_by_what_threads_hold(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let red = system
        .post("/threads", json!({"metadata": {"tag": {"color": "red"}, "x": 1}}))
        .await
        .expect(200);
    let plain = system.thread().await;
    let state = json!({"total": 3, "text": "a\u{0}b", "list": [{"id": 1}, {"id": 2}]}).to_string();
    sqlx::query(
        "update threads set state_values = $2, status = 'error' where thread_id = $1::uuid",
    )
    .bind(&plain)
    .bind(state.as_bytes())
    .execute(&system.pool)
    .await
    .unwrap();
    let found = async |search: Value| {
        let counted = system.post("/threads/count", search.clone()).await.expect(200);
        let found = system.post("/threads/search", search).await.expect(200);
        let ids = found.as_array().unwrap().iter().map(|item| item["thread_id"].clone());
        let ids = ids.collect::<Vec<_>>();
        assert_eq!(counted, ids.len());
        ids
    };
    let (red, plain) = (red["thread_id"].clone(), Value::from(plain));
    assert_eq!(found(json!({"metadata": {"tag": {"color": "red"}}})).await, vec![red.clone()]);
    assert!(found(json!({"metadata": {"tag": {"color": "blue"}}})).await.is_empty());
    assert_eq!(found(json!({"status": "error"})).await, vec![plain.clone()]);
    assert_eq!(found(json!({"values": {"total": 3}})).await, vec![plain.clone()]);
    assert_eq!(found(json!({"values": {"list": [{"id": 2}]}})).await, vec![plain.clone()]);
    assert_eq!(found(json!({"ids": [red]})).await, vec![red]);
    assert_eq!(found(json!({})).await.len(), 2);
    let shown = json!({"ids": [plain], "select": ["thread_id", "values.total"],
                       "extract": {"last": "values.list[-1].id", "none": "values.none"}});
    let shown = system.post("/threads/search", shown).await.expect(200);
    let expected = json!([{"thread_id": plain, "values": {"total": 3}, "extracted": {"last": 2, "none": null}}]);
    assert_eq!(shown, expected);
    let outside = json!({"extract": {"a": "user_id"}});
    system.post("/threads/search", outside).await.expect_error(422, "invalid");
}

#[sqlx::test]
async fn keys_of_a_client_are_values_and_never_sql(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let key = "'; drop table threads; --";
    let made = system.post("/threads", json!({"metadata": {key: key}})).await.expect(200);
    let search = json!({"metadata": {key: key}, "values": {}, "select": [key, "thread_id"]});
    let found = system.post("/threads/search", search).await.expect(200);
    assert_eq!(found, json!([{"thread_id": made["thread_id"]}]));
}

#[sqlx::test]
async fn what_is_not_available_says_so(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    system.post("/threads", json!({"ttl": 5})).await.expect_error(422, "invalid");
    system.post("/threads", json!({"supersteps": []})).await.expect_error(422, "invalid");
    system.post("/threads", json!({"ttl": null, "unknown": 1})).await.expect(200);
}
