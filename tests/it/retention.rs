//! What is deleted in time, and that nothing which can still be reached changes by it.

use std::collections::BTreeMap;
use std::time::Duration;

use cynai::ids::ThreadId;
use cynai::services::api::{
    HistoryRequest, IfNotExists, MultitaskStrategy, OnCompletion, StreamMode, UpdateState,
};
use cynai::store::retention::{Deleted, Progress, Retention, pass};
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::races::System;

/// A large value that never changes, a list that grows, a subgraph in each round.
fn files() -> Vec<Value> {
    let inner = json!({
        "name": "inner", "state": { "n": { "type": "integer", "default": 0 } }, "input": ["n"],
        "nodes": { "one": { "set": { "n": "${state.n + 1}" } }, "two": { "set": { "n": "${state.n * 2}" } } },
        "edges": ["start -> one -> two -> end"],
    });
    let grow = json!({
        "name": "grow",
        "state": { "n": { "type": "integer", "reduce": "sum", "default": 0 }, "most": { "type": "integer" }, "blob": {},
                   "list": { "type": "array", "reduce": "append" } },
        "nodes": { "step": { "set": { "n": 1, "list": ["${'item \\u0000 ' + string(state.n) + state.blob.substring(0, 40)}"] } } },
        "edges": ["start -> step",
                  { "from": "step", "choose": [{ "when": "state.n < state.most", "to": "step" }, { "to": "end" }] }],
    });
    let calls = json!({
        "name": "calls", "state": { "n": { "type": "integer", "default": 0 } },
        "nodes": { "call": { "graph": { "name": "inner", "input": { "n": "${state.n}" } }, "set": { "n": "${state.n + 1}" } } },
        "edges": ["start -> call", { "from": "call", "choose": [{ "when": "state.n < 100", "to": "call" }, { "to": "end" }] }],
    });
    vec![inner, grow, calls]
}

fn input(most: u32) -> Value {
    json!({ "most": most, "blob": "b".repeat(5000) })
}

/// All states of a thread that can be listed, by their checkpoints' ids.
async fn states(system: &System, thread: ThreadId) -> BTreeMap<String, Value> {
    let mut states = BTreeMap::new();
    let mut before = None;
    loop {
        let request = HistoryRequest {
            limit: 1000,
            before: before.clone(),
            metadata: Default::default(),
            checkpoint_ns: String::new(),
            values: true,
        };
        let page = system.services.thread_history(&system.actor, thread, request).await.unwrap();
        let Some(last) = page.last() else { return states };
        before.clone_from(&last.checkpoint_id);
        for state in page {
            states.insert(state.checkpoint_id.unwrap(), Value::Object(state.values));
        }
    }
}

/// Passes until nothing more is deleted.
async fn retain(pool: &PgPool, keep: &Retention) -> Deleted {
    let mut progress = Progress::default();
    let mut all = Deleted::default();
    loop {
        let deleted = pass(pool, keep, &mut progress).await.unwrap();
        all.checkpoints += deleted.checkpoints;
        all.stream_rows += deleted.stream_rows;
        all.threads += deleted.threads;
        if deleted == Deleted::default() {
            return all;
        }
    }
}

fn last(keep_last: u32) -> Retention {
    Retention { keep_last: Some(keep_last), ..Retention::default() }
}

#[sqlx::test]
async fn what_is_kept_reads_as_before_and_what_is_not_is_gone(pool: PgPool) {
    let system = System::new(pool, &files()).await;
    let driver = system.driver(System::driver_config());
    let thread = ThreadId::new();
    system.wait(&system.start(thread, "grow", input(300)).await).await;
    let before = states(&system, thread).await;
    assert_eq!(before.len(), 301);
    assert_eq!(
        retain(&system.pool, &Retention::default()).await,
        Deleted::default(),
        "all is kept unless told otherwise"
    );
    let values = system.count("select count(*) from channel_values").await;
    assert_eq!(retain(&system.pool, &last(50)).await.checkpoints, 192);
    let after = states(&system, thread).await;
    assert_eq!(after.len(), 109, "the last 50, and what their keyframe's block holds beside");
    for (id, state) in &after {
        assert_eq!(state, &before[id], "{id}");
    }
    assert!(system.count("select count(*) from channel_values").await < values);
    assert_eq!(
        system.count("select count(*) from channel_values where seq = 0").await,
        1,
        "the blob is still in the state"
    );
    let next = system.wait(&system.start(thread, "grow", input(302)).await).await;
    assert_eq!((&next["n"], next["list"].as_array().unwrap().len()), (&json!(302), 302));
    driver.stop().await;
}

#[sqlx::test]
async fn a_fork_keeps_what_it_began_from(pool: PgPool) {
    let system = System::new(pool, &files()).await;
    let driver = system.driver(System::driver_config());
    let thread = ThreadId::new();
    system.wait(&system.start(thread, "grow", input(200)).await).await;
    let ids: Vec<String> = states(&system, thread).await.into_keys().collect();
    let mut fork = System::request("grow", json!({ "most": 80 }));
    fork.checkpoint_id = Some(ids[70].clone());
    system.wait(&system.create(thread, fork).await.unwrap()).await;
    let before = states(&system, thread).await;
    retain(&system.pool, &last(5)).await;
    let after = states(&system, thread).await;
    assert!(after.len() < 40, "{}", after.len());
    assert!(after.contains_key(&ids[70]), "the origin of the fork");
    assert!(!after.contains_key(&ids[71]) && !after.contains_key(&ids[10]));
    for (id, state) in &after {
        assert_eq!(state, &before[id], "{id}");
    }
    let mut again = System::request("grow", json!({ "most": 75 }));
    again.checkpoint_id = Some(ids[70].clone());
    let result = system.wait(&system.create(thread, again).await.unwrap()).await;
    assert_eq!(json!(result["list"].as_array().unwrap().len()), result["n"]);
    driver.stop().await;
}

#[sqlx::test]
async fn deleting_under_load_changes_no_state_that_can_be_reached(pool: PgPool) {
    let system = System::new(pool, &files()).await;
    let driver = system.driver(System::driver_config());
    let threads: Vec<ThreadId> = (0..4).map(|_| ThreadId::new()).collect();
    let mut runs = Vec::new();
    for thread in &threads {
        runs.push(system.start(*thread, "grow", input(260)).await);
        runs.push(system.start(*thread, "grow", json!({ "most": 400 })).await);
    }
    let calls = system.start(ThreadId::new(), "calls", json!({})).await;
    let (mut progress, mut deleted) = (Progress::default(), 0);
    while system.count("select count(*) from heads").await > 0 {
        deleted += pass(&system.pool, &last(20), &mut progress).await.unwrap().checkpoints;
        // Forks and updates come in between.
        let update = UpdateState {
            values: json!({ "n": 0 }),
            as_node: None,
            checkpoint_id: None,
            checkpoint_ns: String::new(),
        };
        let _ = system.services.update_state(&system.actor, threads[0], update).await;
        tokio::time::sleep(Duration::from_millis(15)).await;
    }
    assert!(deleted > 0, "it was under way while the runs were");
    for run in &runs {
        let result = system.wait(run).await;
        let list = result["list"].as_array().unwrap();
        assert_eq!(json!(list.len()), result["n"]);
        for (number, item) in list.iter().enumerate() {
            assert_eq!(item, &json!(format!("item \u{0} {number}{}", "b".repeat(40))));
        }
    }
    assert_eq!(system.wait(&calls).await["n"], 100);
    retain(&system.pool, &last(20)).await;
    for thread in &threads {
        assert!(states(&system, *thread).await.len() < 20 + 64);
    }
    assert!(
        system.count("select count(*) from checkpoints where namespace <> ''").await < 100 * 3,
        "old subgraphs went too"
    );
    driver.stop().await;
    system.check_tables().await;
}

#[sqlx::test]
async fn a_long_thread_is_cut_in_several_passes(pool: PgPool) {
    let system = System::new(pool, &files()).await;
    let driver = system.driver(System::driver_config());
    let thread = ThreadId::new();
    system.wait(&system.start(thread, "grow", input(3)).await).await;
    driver.stop().await;
    // The last checkpoint again and again, with a keyframe where one belongs.
    sqlx::query(
        "insert into checkpoints (thread_id, run_id, seq, at, branch, source, namespace, next, changed, keyframe)
         select thread_id, run_id, n, at, branch, source, '', next, '{}', case when n % 64 = 0 then k.keyframe end
           from (select * from checkpoints order by seq desc limit 1) c,
                (select keyframe from checkpoints where seq = 0) k, generate_series(4, 5000) n",
    )
    .execute(&system.pool)
    .await
    .unwrap();
    let mut progress = Progress::default();
    let first = pass(&system.pool, &last(1), &mut progress).await.unwrap();
    assert_eq!(first.checkpoints, 1984, "whole blocks only");
    let rest = states(&system, thread).await;
    assert_eq!(rest.len(), 5001 - 1984, "what is listed can be read");
    retain(&system.pool, &last(1)).await;
    assert_eq!(states(&system, thread).await.len(), 5001 - 4992);
}

#[sqlx::test]
async fn checkpoints_go_by_age(pool: PgPool) {
    let system = System::new(pool, &files()).await;
    let driver = system.driver(System::driver_config());
    let thread = ThreadId::new();
    system.wait(&system.start(thread, "grow", input(200)).await).await;
    let keep = Retention { max_age: Some(Duration::from_secs(3600)), ..Retention::default() };
    assert_eq!(retain(&system.pool, &keep).await.checkpoints, 0);
    system.sql("update checkpoints set at = at - interval '2 hours' where seq < 130").await;
    assert_eq!(retain(&system.pool, &keep).await.checkpoints, 128);
    system.sql("update checkpoints set at = at - interval '2 hours'").await;
    retain(&system.pool, &keep).await;
    assert_eq!(states(&system, thread).await.len(), 9, "the last one's block stays, however old");
    driver.stop().await;
}

#[sqlx::test]
async fn stream_rows_and_temporary_threads_go_after_their_time(pool: PgPool) {
    let system = System::new(pool, &files()).await;
    let driver = system.driver(System::driver_config());
    let mut request = System::request("grow", input(5));
    request.stream_modes = vec![StreamMode::Updates];
    request.multitask_strategy = MultitaskStrategy::Enqueue;
    let kept = system.create(ThreadId::new(), request.clone()).await.unwrap();
    request.if_not_exists = IfNotExists::Reject;
    request.on_completion = OnCompletion::Delete;
    let temporary = system.services.create_run(&system.actor, None, request).await.unwrap();
    for run in [&kept, &temporary] {
        system.wait(run).await;
    }
    driver.stop().await;
    assert_eq!(system.count("select count(distinct run_id) from stream_events").await, 2);
    let keep = Retention::default();
    assert_eq!(retain(&system.pool, &keep).await, Deleted::default());
    system.sql("update runs set ended_at = ended_at - interval '6 minutes'").await;
    assert_eq!(retain(&system.pool, &keep).await, Deleted { threads: 1, ..Deleted::default() });
    assert_eq!(system.count("select count(*) from threads").await, 1);
    assert_eq!(system.count("select count(distinct run_id) from stream_events").await, 1);
    system.sql("update runs set ended_at = ended_at - interval '1 day'").await;
    assert!(retain(&system.pool, &keep).await.stream_rows >= 5);
    assert_eq!(system.count("select count(*) from stream_events").await, 0);
    assert_eq!(system.wait(&kept).await["n"], 5, "the run itself stays");
}

#[sqlx::test]
async fn one_process_at_a_time_deletes(pool: PgPool) {
    let system = System::new(pool, &files()).await;
    let driver = system.driver(System::driver_config());
    system.wait(&system.start(ThreadId::new(), "grow", input(100)).await).await;
    driver.stop().await;
    let mut other = system.pool.begin().await.unwrap();
    let lock = "select pg_advisory_xact_lock(x'0063796e61690001'::bigint)";
    sqlx::query(lock).execute(&mut *other).await.unwrap();
    assert_eq!(retain(&system.pool, &last(1)).await, Deleted::default());
    other.rollback().await.unwrap();
    assert_eq!(retain(&system.pool, &last(1)).await.checkpoints, 64);
}
