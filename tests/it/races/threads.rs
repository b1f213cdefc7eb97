//! Several runs, forks and updates that want one thread.

use std::collections::HashSet;

use cynai::ids::{RunId, ThreadId};
use cynai::services::api::{
    CancelAction, MultitaskStrategy, RunKey, RunStatus, RunView, UpdateState,
};
use cynai::services::error::ServiceError;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::task::JoinSet;

use super::{System, looping, one};

fn traced() -> Value {
    json!({
        "name": "traced", "state": { "log": { "type": "array", "reduce": "append" } },
        "nodes": { "a": { "use": "trace", "set": { "log": ["a"] } }, "b": { "use": "trace", "set": { "log": ["b"] } } },
        "edges": ["start -> a -> b -> end"],
    })
}

fn gated() -> Value {
    one("gated", json!({ "use": "gate", "set": { "log": ["gate"] } }))
}

fn asking() -> Value {
    one("ask", json!({ "interrupt": { "ask": "?" }, "set": { "log": ["${output}"] } }))
}

async fn cancel(system: &System, run: &RunView, action: CancelAction) -> Result<(), ServiceError> {
    let key = RunKey { thread: Some(run.thread_id), run: run.run_id };
    system.services.cancel_run(&system.actor, key, action, Some("test".to_owned()), true).await
}

async fn checkpoint_ids(system: &System, thread: ThreadId) -> Vec<String> {
    let request = cynai::services::api::HistoryRequest {
        limit: 100,
        before: None,
        metadata: Default::default(),
        checkpoint_ns: String::new(),
        values: true,
    };
    let history = system.services.thread_history(&system.actor, thread, request).await.unwrap();
    history.into_iter().map(|state| state.checkpoint_id.unwrap()).collect()
}

async fn log_of(system: &System, thread: ThreadId) -> Value {
    let state =
        system.services.thread_state(&system.actor, thread, Default::default()).await.unwrap();
    state.values["log"].clone()
}

#[sqlx::test]
async fn two_forks_of_one_thread_at_once_get_a_branch_each(pool: PgPool) {
    let system = System::new(pool, &[traced()]).await;
    let driver = system.driver(System::driver_config());
    let thread = ThreadId::new();
    system.wait(&system.start(thread, "traced", json!({})).await).await;
    let ids = checkpoint_ids(&system, thread).await;
    assert_eq!(ids.len(), 3);
    let mut forks = JoinSet::new();
    for (number, id) in [&ids[1], &ids[2], &ids[1], &ids[2]].into_iter().enumerate() {
        let (services, actor) = (system.services.clone(), system.actor.clone());
        let mut request = System::request("traced", Value::Null);
        request.input = None;
        request.checkpoint_id = Some(id.clone());
        request.multitask_strategy = MultitaskStrategy::Reject;
        forks.spawn(async move {
            // Whoever finds the thread busy comes again.
            loop {
                match services.create_run(&actor, Some(thread), request.clone()).await {
                    Err(ServiceError::Conflict(_)) => {
                        tokio::time::sleep(std::time::Duration::from_millis(3)).await
                    }
                    other => return (number, other.unwrap()),
                }
            }
        });
    }
    for (number, run) in forks.join_all().await {
        let expected = json!({ "log": ["a", "b"] });
        assert_eq!(system.wait(&run).await, expected, "fork {number}");
        let nodes = system.trace.nodes_of(run.run_id);
        assert_eq!(nodes, if number % 2 == 0 { vec!["b"] } else { vec!["a", "b"] });
    }
    assert_eq!(system.count("select count(distinct branch) from checkpoints").await, 5);
    assert_eq!(system.count("select branch::bigint from threads").await, 4);
    driver.stop().await;
    system.check_tables().await;
}

#[sqlx::test]
async fn runs_accepted_at_once_on_one_thread_go_one_after_the_other(pool: PgPool) {
    const RUNS: usize = 30;
    let system = System::new(pool, &[traced()]).await;
    let drivers =
        [system.driver(System::driver_config()), system.deaf_driver(System::driver_config())];
    let thread = ThreadId::new();
    let mut accepts = JoinSet::new();
    for _ in 0..RUNS {
        let (services, actor) = (system.services.clone(), system.actor.clone());
        accepts.spawn(async move {
            services
                .create_run(
                    &actor,
                    Some(thread),
                    System::request("traced", json!({ "log": ["in"] })),
                )
                .await
                .unwrap()
        });
    }
    let runs = accepts.join_all().await;
    for run in &runs {
        let log = system.wait(run).await["log"].as_array().unwrap().len();
        assert_eq!(log % 3, 0, "each begins where the one before has ended");
        assert_eq!(system.trace.nodes_of(run.run_id), ["a", "b"]);
    }
    let round = [json!("in"), json!("a"), json!("b")];
    let expected: Vec<Value> = std::iter::repeat_n(round, RUNS).flatten().collect();
    assert_eq!(log_of(&system, thread).await, json!(expected));
    // In the trace too, no run stands between the nodes of another.
    let order: Vec<RunId> = system.trace.runs();
    assert!(order.chunks(2).all(|pair| pair[0] == pair[1]), "{order:?}");
    for driver in drivers {
        driver.stop().await;
    }
    system.check_tables().await;
}

#[sqlx::test]
async fn the_multitask_strategies_do_as_they_say(pool: PgPool) {
    let system = System::new(pool, &[gated(), traced()]).await;
    let driver = system.driver(System::driver_config());
    let thread = ThreadId::new();
    system.wait(&system.start(thread, "traced", json!({})).await).await;
    let holding = system.start(thread, "gated", json!({})).await;
    system.gate.wait_for(1).await;
    let refused = system.start_with(thread, "traced", MultitaskStrategy::Reject).await;
    assert!(matches!(refused, Err(ServiceError::Conflict(_))), "{refused:?}");
    let queued = system.start_with(thread, "traced", MultitaskStrategy::Enqueue).await.unwrap();
    assert_eq!(system.status(&queued).await, RunStatus::Pending);
    let interrupting =
        system.start_with(thread, "traced", MultitaskStrategy::Interrupt).await.unwrap();
    assert_eq!(system.status(&holding).await, RunStatus::Interrupted);
    assert_eq!(
        system.status(&queued).await,
        RunStatus::Interrupted,
        "what waited behind it goes too"
    );
    assert_eq!(system.wait(&interrupting).await, json!({ "log": ["a", "b", "a", "b"] }));
    let rolled_back = system.start(thread, "gated", json!({ "log": ["gone"] })).await;
    system.gate.wait_for(2).await;
    let last = system.start_with(thread, "traced", MultitaskStrategy::Rollback).await.unwrap();
    assert_eq!(system.wait(&last).await, json!({ "log": ["a", "b", "a", "b", "a", "b"] }));
    let gone = system
        .services
        .get_run(&system.actor, RunKey { thread: Some(thread), run: rolled_back.run_id })
        .await;
    assert!(matches!(gone, Err(ServiceError::NotFound { .. })), "{gone:?}");
    driver.stop().await;
    system.check_tables().await;
}

#[sqlx::test]
async fn running_parked_and_pending_runs_can_be_cancelled_once(pool: PgPool) {
    let parked = one("parked", json!({ "wait": { "event": "never" } }));
    let system = System::new(pool, &[gated(), parked, traced()]).await;
    let driver = system.driver(System::driver_config());
    let (one_thread, other_thread) = (ThreadId::new(), ThreadId::new());
    let running = system.start(one_thread, "gated", json!({})).await;
    system.gate.wait_for(1).await;
    let pending = system.start(one_thread, "traced", json!({})).await;
    let parked = system.start(other_thread, "parked", json!({})).await;
    system.head(&parked, "parked").await;
    let after = system.start(other_thread, "traced", json!({})).await;
    for run in [&pending, &running, &parked] {
        cancel(&system, run, CancelAction::Interrupt).await.unwrap();
        assert_eq!(system.status(run).await, RunStatus::Interrupted);
        assert!(matches!(
            cancel(&system, run, CancelAction::Interrupt).await,
            Err(ServiceError::NotFound { .. })
        ));
    }
    assert_eq!(system.trace.nodes_of(pending.run_id), Vec::<String>::new());
    assert_eq!(
        system.wait(&after).await,
        json!({ "log": ["a", "b"] }),
        "the end of one promotes the next"
    );
    driver.stop().await;
    system.check_tables().await;
}

#[sqlx::test]
async fn a_run_that_goes_on_after_a_cancel_is_woken_by_what_waited_before(pool: PgPool) {
    let graph = json!({
        "name": "waits", "state": { "log": { "type": "array", "reduce": "append" } },
        "nodes": { "timer": { "wait": { "for": "1h" }, "set": { "log": ["timer"] } },
                   "event": { "wait": { "event": "go" }, "set": { "log": ["event"] } } },
        "edges": [{ "from": "start", "to": ["timer", "event"] }, "timer -> end", "event -> end"],
    });
    let system = System::new(pool, &[graph]).await;
    let driver = system.driver(System::driver_config());
    let thread = ThreadId::new();
    let first = system.start(thread, "waits", json!({})).await;
    system.head(&first, "parked").await;
    cancel(&system, &first, CancelAction::Interrupt).await.unwrap();
    let second = system.resume(thread, "waits", None).await.unwrap();
    system.head(&second, "parked").await;
    assert_eq!(
        system.count("select count(*) from queue where state = 'later'").await,
        1,
        "the timer goes on"
    );
    system.event(thread, "go", Value::Null).await;
    system.sql("update pending set due = now() where kind = 'timer'").await;
    system.sql("update queue set due = now()").await;
    assert_eq!(system.wait(&second).await, json!({ "log": ["event", "timer"] }));
    assert_eq!(system.count("select count(*) from events").await, 0);
    driver.stop().await;
    system.check_tables().await;
}

#[sqlx::test]
async fn a_new_input_takes_back_the_questions_also_those_of_subgraphs(pool: PgPool) {
    let outer = json!({
        "name": "outer", "state": { "log": { "type": "array", "reduce": "append" } },
        "nodes": { "inner": { "graph": "ask", "set": { "log": ["${output.log[0]}"] } } },
        "edges": ["start -> inner -> end"],
    });
    let system = System::new(pool, &[asking(), outer]).await;
    let driver = system.driver(System::driver_config());
    let thread = ThreadId::new();
    let first = system.wait(&system.start(thread, "outer", json!({})).await).await;
    let second = system.wait(&system.start(thread, "outer", json!({})).await).await;
    assert_eq!(second["__interrupt__"].as_array().unwrap().len(), 1, "{second}");
    let id = |result: &Value| result["__interrupt__"][0]["id"].as_str().unwrap().to_owned();
    assert_ne!(id(&first), id(&second));
    let old = system.resume(thread, "outer", Some(json!({ id(&first): "x" }))).await;
    assert!(matches!(old, Err(ServiceError::Invalid { .. })), "{old:?}");
    let run = system.resume(thread, "outer", Some(json!("yes"))).await.unwrap();
    assert_eq!(system.wait(&run).await, json!({ "log": ["yes"] }));
    driver.stop().await;
    system.check_tables().await;
}

#[sqlx::test]
async fn an_answer_is_given_once_however_many_answer(pool: PgPool) {
    let system = System::new(pool, &[asking()]).await;
    let driver = system.driver(System::driver_config());
    let thread = ThreadId::new();
    let asked = system.wait(&system.start(thread, "ask", json!({})).await).await;
    let id = asked["__interrupt__"][0]["id"].as_str().unwrap().to_owned();
    let tries =
        (0..6).map(|number| system.resume(thread, "ask", Some(json!({ id.clone(): number }))));
    let results = futures::future::join_all(tries).await;
    let accepted: Vec<&RunView> =
        results.iter().filter_map(|result| result.as_ref().ok()).collect();
    assert_eq!(accepted.len(), 1, "{results:?}");
    assert_eq!(system.wait(accepted[0]).await["log"].as_array().unwrap().len(), 1);
    driver.stop().await;
    system.check_tables().await;
}

#[sqlx::test]
async fn an_enqueued_run_begins_on_the_branch_that_the_thread_has_then(pool: PgPool) {
    let system = System::new(pool, &[gated(), traced()]).await;
    let driver = system.driver(System::driver_config());
    let thread = ThreadId::new();
    system.wait(&system.start(thread, "traced", json!({})).await).await;
    let ids = checkpoint_ids(&system, thread).await;
    let mut fork = System::request("gated", json!({ "log": ["forked"] }));
    fork.checkpoint_id = Some(ids[0].clone());
    let fork = system.create(thread, fork).await.unwrap();
    system.gate.wait_for(1).await;
    let next = system.start_with(thread, "traced", MultitaskStrategy::Enqueue).await.unwrap();
    // The branch that the fork had opened goes away with it.
    cancel(&system, &fork, CancelAction::Rollback).await.unwrap();
    assert_eq!(system.wait(&next).await, json!({ "log": ["a", "b", "a", "b"] }));
    assert_eq!(system.count("select max(branch)::bigint from checkpoints").await, 0);
    driver.stop().await;
    system.check_tables().await;
}

#[sqlx::test]
async fn several_updates_in_one_may_change_a_channel_more_than_once(pool: PgPool) {
    let system = System::new(pool, &[traced()]).await;
    let driver = system.driver(System::driver_config());
    let thread = ThreadId::new();
    system.wait(&system.start(thread, "traced", json!({})).await).await;
    let large = "x".repeat(2000);
    let values = json!([{ "log": [large] }, { "log": [large, 1] }, { "log": [2] }]);
    let update =
        UpdateState { values, as_node: None, checkpoint_id: None, checkpoint_ns: String::new() };
    system.services.update_state(&system.actor, thread, update).await.unwrap();
    let expected = json!(["a", "b", large, large, 1, 2]);
    assert_eq!(log_of(&system, thread).await, expected);
    let run = system.start(thread, "traced", json!({})).await;
    let mut longer = expected.as_array().unwrap().clone();
    longer.extend([json!("a"), json!("b")]);
    assert_eq!(system.wait(&run).await, json!({ "log": longer }));
    driver.stop().await;
}

#[sqlx::test]
async fn an_update_and_a_run_at_once_take_turns(pool: PgPool) {
    let system = System::new(pool, &[looping()]).await;
    let driver = system.driver(System::driver_config());
    let thread = ThreadId::new();
    system.wait(&system.start(thread, "loop", json!({ "most": 1 })).await).await;
    let mut updates = 0;
    for round in 0..20 {
        let update = UpdateState {
            values: json!({ "n": 1000 }),
            as_node: None,
            checkpoint_id: None,
            checkpoint_ns: String::new(),
        };
        let (run, updated) = tokio::join!(
            system.start(thread, "loop", json!({ "most": 1 })),
            system.services.update_state(&system.actor, thread, update)
        );
        updates += i64::from(updated.is_ok());
        assert!(matches!(updated, Ok(_) | Err(ServiceError::Conflict(_))), "{updated:?}");
        let n = system.wait(&run).await["n"].as_i64().unwrap();
        assert_eq!(n, 1000 * updates + round + 2);
    }
    driver.stop().await;
    system.check_tables().await;
}

#[sqlx::test]
async fn a_run_that_takes_the_place_of_one_rolled_back_acts_under_other_keys(pool: PgPool) {
    let system = System::new(pool, &[one("acts", json!({ "use": "effect_gate" }))]).await;
    let driver = system.driver(System::driver_config());
    let thread = ThreadId::new();
    let mut keys = HashSet::new();
    for arrived in 1..=3 {
        system.start_with(thread, "acts", MultitaskStrategy::Rollback).await.unwrap();
        system.gate.wait_for(arrived).await;
        let told: Vec<(uuid::Uuid, String)> =
            sqlx::query_as("select task_id, idempotency_key from effects")
                .fetch_all(&system.pool)
                .await
                .unwrap();
        assert_eq!(told.len(), 1, "what was rolled back is not listed");
        keys.insert(told[0].1.clone());
    }
    assert_eq!(keys.len(), 3, "{keys:?}");
    driver.stop().await;
}

#[sqlx::test]
async fn a_rollback_of_the_run_that_went_on_leaves_the_questions_open(pool: PgPool) {
    let graph = json!({
        "name": "both", "state": { "log": { "type": "array", "reduce": "append" } },
        "nodes": { "ask": { "interrupt": { "ask": "?" }, "set": { "log": ["${output}"] } },
                   "event": { "wait": { "event": "go" }, "set": { "log": ["event"] } } },
        "edges": [{ "from": "start", "to": ["ask", "event"] }, "ask -> end", "event -> end"],
    });
    let system = System::new(pool, &[graph]).await;
    let driver = system.driver(System::driver_config());
    let thread = ThreadId::new();
    let first = system.start(thread, "both", json!({})).await;
    system.head(&first, "parked").await;
    cancel(&system, &first, CancelAction::Interrupt).await.unwrap();
    let second = system.resume(thread, "both", None).await.unwrap();
    system.head(&second, "parked").await;
    cancel(&system, &second, CancelAction::Rollback).await.unwrap();
    let third = system.resume(thread, "both", Some(json!("yes"))).await.unwrap();
    system.head(&third, "parked").await;
    system.event(thread, "go", Value::Null).await;
    assert_eq!(system.wait(&third).await, json!({ "log": ["yes", "event"] }));
    driver.stop().await;
    system.check_tables().await;
}
