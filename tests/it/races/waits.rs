//! Parking and waking: nothing that arrives is slept through, and what is due comes once.

use std::time::Duration;

use cynai::ids::{TaskId, ThreadId};
use cynai::services::api::{IfExists, RunStatus};
use cynai::store::queue;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::task::JoinSet;

use super::{PATIENCE, System, one};

fn waits_for(name: &str) -> Value {
    one("wait", json!({ "wait": { "event": name }, "set": { "log": ["${output}"] } }))
}

/// Takes so many events, one after the other.
fn taker(count: u32) -> Value {
    json!({
        "name": "taker", "state": { "log": { "type": "array", "reduce": "append" } },
        "nodes": { "take": { "wait": { "event": "item" }, "set": { "log": ["${output}"] } } },
        "edges": ["start -> take",
                  { "from": "take", "choose": [{ "when": format!("size(state.log) < {count}"), "to": "take" }, { "to": "end" }] }],
    })
}

#[sqlx::test]
async fn an_event_may_come_before_the_wait_or_after_it_has_begun(pool: PgPool) {
    let system = System::new(pool, &[waits_for("go")]).await;
    let driver = system.driver(System::driver_config());
    let before = ThreadId::new();
    system.services.create_thread(&system.actor, thread_with(before)).await.unwrap();
    system.event(before, "go", json!("early")).await;
    let run = system.start(before, "wait", json!({})).await;
    assert_eq!(system.wait(&run).await, json!({ "log": ["early"] }));
    let after = system.start(ThreadId::new(), "wait", json!({})).await;
    system.head(&after, "parked").await;
    assert_eq!(
        system.count("select count(*) from queue").await,
        0,
        "it costs a row and nothing else"
    );
    system.event(after.thread_id, "other", json!("not for it")).await;
    system.event(after.thread_id, "go", json!("late")).await;
    assert_eq!(system.wait(&after).await, json!({ "log": ["late"] }));
    driver.stop().await;
    system.check_tables().await;
}

fn thread_with(id: ThreadId) -> cynai::services::api::CreateThread {
    cynai::services::api::CreateThread {
        thread_id: Some(id),
        metadata: Default::default(),
        if_exists: IfExists::Raise,
    }
}

#[sqlx::test]
async fn no_event_is_lost_or_taken_twice_while_runs_park_and_wake(pool: PgPool) {
    const RUNS: usize = 12;
    const EVENTS: u32 = 25;
    let system = System::new(pool, &[taker(EVENTS)]).await;
    let first = system.driver(System::driver_config());
    let second = system.driver(System::driver_config());
    let mut runs = Vec::new();
    for _ in 0..RUNS {
        runs.push(system.start(ThreadId::new(), "taker", json!({})).await);
    }
    let mut senders = JoinSet::new();
    for run in &runs {
        let (services, actor, thread) =
            (system.services.clone(), system.actor.clone(), run.thread_id);
        senders.spawn(async move {
            for number in 0..EVENTS {
                services
                    .send_event(&actor, thread, "item".to_owned(), json!(number))
                    .await
                    .unwrap();
                if number % 3 == 0 {
                    // Lets the run get to where it parks, in some of the rounds.
                    tokio::time::sleep(Duration::from_millis(u64::from(number % 7))).await;
                }
            }
        });
    }
    senders.join_all().await;
    for run in &runs {
        assert_eq!(system.wait(run).await["log"], json!((0..EVENTS).collect::<Vec<_>>()));
    }
    assert_eq!(system.count("select count(*) from events").await, 0);
    first.stop().await;
    second.stop().await;
    system.check_tables().await;
}

#[sqlx::test]
async fn an_event_that_slipped_past_the_commit_of_its_wait_is_delivered_before_the_run_parks(
    pool: PgPool,
) {
    let graph = json!({
        "name": "both", "state": { "log": { "type": "array", "reduce": "append" } },
        "nodes": { "gate": { "use": "gate" }, "wait": { "wait": { "event": "go" }, "set": { "log": ["${output}"] } } },
        "edges": [{ "from": "start", "to": ["gate", "wait"] }, "gate -> end", "wait -> end"],
    });
    let system = System::new(pool, &[graph]).await;
    let driver = system.driver(System::driver_config());
    let run = system.start(ThreadId::new(), "both", json!({})).await;
    system.gate.wait_for(1).await;
    let stored = async {
        while system.count("select count(*) from pending").await == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, stored)
        .await
        .expect("the wait is stored while the other node still runs");
    // What is left when the sender and the commit of the wait did not see each other.
    sqlx::query(
        "insert into events (thread_id, name, payload, created_at) values ($1, 'go', '5', now())",
    )
    .bind(run.thread_id.0)
    .execute(&system.pool)
    .await
    .unwrap();
    system.sql("update heads set wake = wake + 1").await;
    system.gate.open();
    assert_eq!(system.wait(&run).await, json!({ "log": [5] }));
    assert_eq!(system.count("select count(*) from events").await, 0);
    driver.stop().await;
}

#[sqlx::test]
async fn parking_notices_what_came_since_the_grant(pool: PgPool) {
    let system = System::new(pool, &[waits_for("go")]).await;
    let run = system.start(ThreadId::new(), "wait", json!({})).await;
    let instance = cynai::ids::InstanceId::new();
    let mut db = system.pool.acquire().await.unwrap();
    let epoch = queue::register(&mut db, instance, "", Duration::from_secs(60)).await.unwrap();
    let grant =
        queue::claim(&mut db, instance, epoch, queue::Claim::Ready(1)).await.unwrap().remove(0);
    system.event(run.thread_id, "go", json!(1)).await;
    let parked =
        queue::park(&mut db, grant.run_id, grant.fence, grant.wake, 0, None).await.unwrap();
    assert_eq!(parked, queue::Parked::Awake(grant.wake + 1));
    let parked =
        queue::park(&mut db, grant.run_id, grant.fence - 1, grant.wake + 1, 0, None).await.unwrap();
    assert_eq!(parked, queue::Parked::Fenced);
    let parked =
        queue::park(&mut db, grant.run_id, grant.fence, grant.wake + 1, 0, None).await.unwrap();
    assert_eq!(parked, queue::Parked::Yes);
}

#[sqlx::test]
async fn a_run_sleeps_through_what_does_not_let_it_go_on(pool: PgPool) {
    let graph = json!({
        "name": "many", "state": { "log": { "type": "array", "reduce": "append" } },
        "nodes": { "each": { "for_each": "${['a', 'b', 'c']}", "wait": { "event": "${item}" }, "set": { "log": ["${output}"] } } },
        "edges": ["start -> each -> end"],
    });
    let system = System::new(pool, &[graph]).await;
    let driver = system.driver(System::driver_config());
    let run = system.start(ThreadId::new(), "many", json!({})).await;
    system.head(&run, "parked").await;
    let fence = "select fence from heads";
    let before = system.count(fence).await;
    for name in ["c", "a"] {
        system.event(run.thread_id, name, json!(name)).await;
        assert_eq!(
            system.count("select count(*) from heads where status = 'parked'").await,
            1,
            "{name}"
        );
    }
    assert_eq!(system.count(fence).await, before, "nobody was granted the run for that");
    system.event(run.thread_id, "b", json!("b")).await;
    assert_eq!(system.wait(&run).await, json!({ "log": ["a", "b", "c"] }));
    driver.stop().await;
}

#[sqlx::test]
async fn an_attempt_that_was_counted_does_not_keep_the_run_asleep(pool: PgPool) {
    let graph = json!({
        "name": "acts", "state": {},
        "nodes": { "act": { "use": "effect_gate" }, "wait": { "wait": { "event": "go" } } },
        "edges": ["start -> act -> wait -> end"],
    });
    let system = System::new(pool, &[graph]).await;
    system.gate.open();
    let driver = system.driver(System::driver_config());
    let run = system.start(ThreadId::new(), "acts", json!({})).await;
    system.head(&run, "parked").await;
    assert_eq!(system.count("select count(*) from pending where not settled").await, 1);
    system.event(run.thread_id, "go", Value::Null).await;
    system.wait(&run).await;
    assert_eq!(system.status(&run).await, RunStatus::Success);
    driver.stop().await;
}

#[sqlx::test]
async fn a_wait_is_settled_once_however_many_try(pool: PgPool) {
    let system = System::new(pool, &[waits_for("go")]).await;
    let driver = system.driver(System::driver_config());
    let run = system.start(ThreadId::new(), "wait", json!({})).await;
    system.head(&run, "parked").await;
    driver.stop().await;
    let task: uuid::Uuid =
        sqlx::query_scalar("select task_id from pending").fetch_one(&system.pool).await.unwrap();
    let mut tries = JoinSet::new();
    for number in 0..4 {
        let (pool, run) = (system.pool.clone(), run.run_id);
        tries.spawn(async move {
            let mut tx = pool.begin().await.unwrap();
            let settled = queue::settle(&mut tx, run, TaskId(task), number.to_string().as_bytes())
                .await
                .unwrap();
            tx.commit().await.unwrap();
            settled
        });
    }
    let settled = tries.join_all().await;
    assert_eq!(settled.iter().filter(|settled| **settled).count(), 1);
    assert_eq!(system.count("select count(*) from queue where state = 'ready'").await, 1);
    system.check_tables().await;
}

#[sqlx::test]
async fn a_timer_and_a_retry_wake_the_run_when_they_are_due(pool: PgPool) {
    let system = System::new(pool, &[one("timer", json!({ "wait": { "for": "1h" } }))]).await;
    let driver = system.driver(System::driver_config());
    let run = system.start(ThreadId::new(), "timer", json!({})).await;
    system.head(&run, "parked").await;
    assert_eq!(system.count("select count(*) from queue where state = 'later' and due > now() + interval '59 minutes'").await, 1);
    system.sql("update pending set due = now()").await;
    system.sql("update queue set due = now()").await;
    system.wait(&run).await;
    driver.stop().await;
    system.check_tables().await;
}

fn two_questions() -> Value {
    json!({
        "name": "ask", "state": { "log": { "type": "array", "reduce": "append" } },
        "nodes": {
            "a": { "interrupt": { "ask": "a?" }, "set": { "log": ["${output}"] } },
            "b": { "interrupt": { "ask": "b?", "expires": "1h" }, "set": { "log": ["${output}"] }, "on_error": "late" },
            "late": { "set": { "log": ["${error.kind}"] } },
        },
        "edges": [{ "from": "start", "to": ["a", "b"] }, "a -> end", "b -> end", "late -> end"],
    })
}

fn id_of(result: &Value, ask: &str) -> String {
    let asked = result["__interrupt__"].as_array().unwrap();
    let found = asked
        .iter()
        .find(|question| question["value"] == ask)
        .unwrap_or_else(|| panic!("{ask}: {result}"));
    found["id"].as_str().unwrap().to_owned()
}

#[sqlx::test]
async fn a_question_expires_once_also_after_another_one_was_answered(pool: PgPool) {
    let system = System::new(pool, &[two_questions()]).await;
    let drivers =
        [system.driver(System::driver_config()), system.deaf_driver(System::driver_config())];
    let thread = ThreadId::new();
    let asked = system.start(thread, "ask", json!({})).await;
    let result = system.wait(&asked).await;
    let answer = json!({ id_of(&result, "a?"): "A" });
    let partly = system.resume(thread, "ask", Some(answer)).await.unwrap();
    let result = system.wait(&partly).await;
    assert_eq!(result["__interrupt__"].as_array().unwrap().len(), 1, "{result}");
    id_of(&result, "b?");
    assert_eq!(system.count("select count(*) from queue where state = 'later'").await, 1);
    system.sql("update pending set due = now() where not settled").await;
    system.sql("update queue set due = now()").await;
    let followed = async {
        while system.count("select count(*) from runs where ended_at is not null").await < 3 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, followed).await.expect("the run after the expiry ends");
    for driver in drivers {
        driver.stop().await;
    }
    assert_eq!(system.count("select count(*) from runs").await, 3, "one run deals with the expiry");
    let state =
        system.services.thread_state(&system.actor, thread, Default::default()).await.unwrap();
    assert_eq!((&state.values["log"], state.next.len()), (&json!(["A", "expired"]), 0));
    system.check_tables().await;
}

#[sqlx::test]
async fn an_answer_before_the_expiry_removes_what_was_to_follow(pool: PgPool) {
    let system = System::new(pool, &[two_questions()]).await;
    let driver = system.driver(System::driver_config());
    let thread = ThreadId::new();
    let asked = system.start(thread, "ask", json!({})).await;
    let result = system.wait(&asked).await;
    assert_eq!(system.count("select count(*) from queue where state = 'later'").await, 1);
    let answers = json!({ id_of(&result, "a?"): "A", id_of(&result, "b?"): "B" });
    let run = system.resume(thread, "ask", Some(answers)).await.unwrap();
    assert_eq!(system.wait(&run).await, json!({ "log": ["A", "B"] }));
    assert_eq!(system.count("select count(*) from runs").await, 2);
    driver.stop().await;
    system.check_tables().await;
}

#[sqlx::test]
async fn an_answer_and_the_expiry_at_once_lead_to_one_of_the_two(pool: PgPool) {
    let graph = one(
        "ask",
        json!({ "interrupt": { "ask": "?", "expires": "1h" }, "set": { "log": ["${output}"] } }),
    );
    let system = System::new(pool, &[graph]).await;
    let driver = system.driver(System::driver_config());
    for _ in 0..8 {
        let thread = ThreadId::new();
        let asked = system.start(thread, "ask", json!({})).await;
        let question = id_of(&system.wait(&asked).await, "?");
        system.sql("update pending set due = now() where not settled").await;
        system.sql("update queue set due = now() where state = 'later'").await;
        system.services.hub().queued();
        let answered = system.resume(thread, "ask", Some(json!({ question: "yes" }))).await;
        if let Ok(run) = &answered {
            assert_eq!(system.wait(run).await, json!({ "log": ["yes"] }));
        }
        let ended = async {
            while system.count("select count(*) from heads").await > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, ended).await.unwrap();
        let runs: i64 = sqlx::query_scalar("select count(*) from runs where thread_id = $1")
            .bind(thread.0)
            .fetch_one(&system.pool)
            .await
            .unwrap();
        assert_eq!(runs, 2, "{answered:?}");
    }
    driver.stop().await;
    system.check_tables().await;
}
