//! Leases, claims and crashes: who may move a run, and what becomes of it when nobody can tell.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cynai::driver::DriverConfig;
use cynai::ids::{InstanceId, ThreadId, UserId};
use cynai::services::api::{CancelAction, MultitaskStrategy, RunKey, RunStatus};
use cynai::store::queue;
use futures::FutureExt;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::task::JoinSet;

use super::{PATIENCE, System, looping, one};

fn gated() -> Value {
    json!({
        "name": "gated", "state": { "log": { "type": "array", "reduce": "append" } },
        "nodes": { "before": { "set": { "log": ["before"] } }, "gate": { "use": "gate", "set": { "log": ["gate"] } } },
        "edges": ["start -> before -> gate -> end"],
    })
}

fn first_gate() -> Value {
    one("first", json!({ "use": "gate", "set": { "log": ["gate"] } }))
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let reached = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, reached).await.unwrap_or_else(|_| panic!("never: {what}"));
}

#[sqlx::test]
async fn a_restart_frees_its_predecessors_runs_at_once(pool: PgPool) {
    let system = System::new(pool, &[gated()]).await;
    let config = DriverConfig { lease: Duration::from_secs(600), ..System::driver_config() };
    let first = system.driver(config.clone());
    let run = system.start(ThreadId::new(), "gated", json!({})).await;
    system.gate.wait_for(1).await;
    first.kill().await;
    // Another installation leaves the run alone: the lease is good for ten minutes.
    let other = system.driver(DriverConfig { instance: InstanceId::new(), ..config.clone() });
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(system.gate.arrived.load(Ordering::SeqCst), 1);
    let began = Instant::now();
    let second = system.driver(config);
    system.gate.wait_for(2).await;
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    system.gate.open();
    assert_eq!(system.wait(&run).await, json!({ "log": ["before", "gate"] }));
    second.stop().await;
    other.stop().await;
    system.check_tables().await;
}

#[sqlx::test]
async fn a_driver_frozen_past_its_lease_commits_nothing(pool: PgPool) {
    let system = System::new(pool, &[gated()]).await;
    // Its tasks do not know yet that the lease is over: as after a process was stopped and thawed.
    let frozen =
        system.driver(DriverConfig { lease: Duration::from_secs(600), ..System::driver_config() });
    let run = system.start(ThreadId::new(), "gated", json!({})).await;
    system.gate.wait_for(1).await;
    let fence = system.count("select fence from heads").await;
    let commits = frozen.driver.committer().stats().commits;
    system.sql("update instances set deadline = now() - interval '1 second'").await;
    let other = system.driver(System::driver_config());
    system.gate.wait_for(2).await;
    assert!(system.count("select fence from heads").await > fence);
    system.gate.open();
    assert_eq!(system.wait(&run).await, json!({ "log": ["before", "gate"] }));
    assert_eq!(
        frozen.driver.committer().stats().commits,
        commits,
        "the frozen one stored nothing any more"
    );
    until("the frozen one has dropped the run", async || frozen.driver.in_memory() == 0).await;
    assert_eq!(system.count("select count(*) from checkpoints").await, 3);
    other.stop().await;
    frozen.kill().await;
    system.check_tables().await;
}

#[sqlx::test]
async fn a_driver_that_cannot_renew_begins_a_new_life(pool: PgPool) {
    let system = System::new(pool, &[gated()]).await;
    let config = DriverConfig { lease: Duration::from_millis(600), ..System::driver_config() };
    let driver = system.driver(config);
    let run = system.start(ThreadId::new(), "gated", json!({})).await;
    system.gate.wait_for(1).await;
    system.sql("update instances set deadline = now() - interval '1 minute'").await;
    // The renewal fails, everything is dropped, and the next life claims the run as a suspect.
    system.gate.wait_for(2).await;
    assert_eq!(system.count("select max(epoch) from instances").await, 2);
    system.gate.open();
    system.wait(&run).await;
    driver.stop().await;
    system.check_tables().await;
}

#[sqlx::test]
async fn a_run_that_kills_its_process_again_and_again_waits_for_a_person(pool: PgPool) {
    let system = System::new(pool, &[first_gate()]).await;
    let config = System::driver_config();
    let thread = ThreadId::new();
    let run = system.start(thread, "first", json!({})).await;
    for life in 1..=3 {
        let driver = system.driver(config.clone());
        system.gate.wait_for(life).await;
        driver.kill().await;
    }
    let driver = system.driver(config);
    let result = system.wait(&run).await;
    assert_eq!(result["__interrupt__"][0]["value"]["reason"], "process_died", "{result}");
    assert_eq!(system.gate.arrived.load(Ordering::SeqCst), 3, "it was not begun a fourth time");
    system.gate.open();
    let again = system.resume(thread, "first", Some(json!("try again"))).await.unwrap();
    assert_eq!(system.wait(&again).await, json!({ "log": ["gate"] }));
    driver.stop().await;
    system.check_tables().await;
}

#[sqlx::test]
async fn a_commit_between_two_crashes_clears_a_run(pool: PgPool) {
    let graph = json!({
        "name": "steps", "state": { "n": { "type": "integer", "reduce": "sum", "default": 0 } },
        "nodes": { "step": { "use": "gate", "set": { "n": 1 } } },
        "edges": ["start -> step", { "from": "step", "choose": [{ "when": "state.n < 6", "to": "step" }, { "to": "end" }] }],
    });
    let system = System::new(pool, &[graph]).await;
    let config = System::driver_config();
    let run = system.start(ThreadId::new(), "steps", json!({})).await;
    for life in 1..=5 {
        let driver = system.driver(config.clone());
        system.gate.wait_for(life).await;
        assert!(system.count("select claims::bigint from heads").await < 3);
        driver.kill().await;
        // As if this life had made a step before it died.
        system.sql("update heads set claims = 0").await;
    }
    system.gate.open();
    let driver = system.driver(config);
    assert_eq!(system.wait(&run).await, json!({ "n": 6 }));
    driver.stop().await;
}

#[sqlx::test]
async fn after_a_crash_suspects_run_alone(pool: PgPool) {
    let system = System::new(pool, &[first_gate()]).await;
    let config = System::driver_config();
    let mut runs = Vec::new();
    for _ in 0..4 {
        runs.push(system.start(ThreadId::new(), "first", json!({})).await);
    }
    let driver = system.driver(config.clone());
    system.gate.wait_for(4).await;
    driver.kill().await;
    let driver = system.driver(config);
    system.gate.wait_for(5).await;
    // A run that is no suspect does not wait for them.
    let innocent = system.start(ThreadId::new(), "first", json!({})).await;
    system.gate.wait_for(6).await;
    assert_eq!(system.count("select count(*) from queue where state = 'suspect'").await, 3);
    system.gate.open();
    for run in runs.iter().chain([&innocent]) {
        assert_eq!(system.wait(run).await, json!({ "log": ["gate"] }));
    }
    driver.stop().await;
    system.check_tables().await;
}

#[sqlx::test]
async fn a_stopped_driver_gives_back_what_it_holds_without_suspicion(pool: PgPool) {
    let system = System::new(pool, &[gated(), looping()]).await;
    let driver = system.driver(System::driver_config());
    let stuck = system.start(ThreadId::new(), "gated", json!({})).await;
    system.gate.wait_for(1).await;
    let busy = system.start(ThreadId::new(), "loop", json!({ "most": 1500 })).await;
    system.head(&busy, "running").await;
    driver.stop().await;
    assert_eq!(system.count("select count(*) from queue where state = 'ready'").await, 2);
    assert_eq!(
        system.count("select count(*) from heads where status = 'queued' and claims = 0").await,
        2
    );
    system.gate.open();
    let next = system.driver(System::driver_config());
    assert_eq!(system.wait(&busy).await["n"], 1500);
    assert_eq!(system.wait(&stuck).await, json!({ "log": ["before", "gate"] }));
    next.stop().await;
    system.check_tables().await;
}

#[sqlx::test]
async fn a_claim_whose_answer_was_lost_comes_back(pool: PgPool) {
    let system = System::new(pool, &[looping()]).await;
    let driver = system.driver(System::driver_config());
    until("the driver has its lease", async || driver.driver.leased().load(Ordering::Relaxed))
        .await;
    // The driver is made to claim without knowing: what a lost answer leaves behind.
    let run = {
        let mut tx = system.pool.begin().await.unwrap();
        sqlx::query("lock table queue in exclusive mode").execute(&mut *tx).await.unwrap();
        let accept = system.start(ThreadId::new(), "loop", json!({}));
        tokio::pin!(accept);
        assert!((&mut accept).now_or_never().is_none());
        tx.rollback().await.unwrap();
        let run = accept.await;
        sqlx::query("with q as (delete from queue where run_id = $1)
                     update heads set status = 'running', fence = fence + 1, instance_id = $2, epoch = 1
                      where run_id = $1 and status = 'queued'")
            .bind(run.run_id.0)
            .bind(driver.instance.0)
            .execute(&system.pool)
            .await
            .unwrap();
        run
    };
    system.wait(&run).await;
    assert_eq!(system.status(&run).await, RunStatus::Success);
    driver.stop().await;
    system.check_tables().await;
}

#[sqlx::test]
async fn a_lone_driver_with_room_holds_what_its_process_accepts_from_the_first(pool: PgPool) {
    let system = System::new(pool, &[first_gate()]).await;
    let config = DriverConfig { capacity: 2, ..System::driver_config() };
    let driver = system.driver(config.clone());
    let intake = Arc::clone(driver.driver.intake());
    system.services.set_intake(Arc::clone(&intake));
    let open = async || intake.is_open();
    until("the driver takes runs in", open).await;
    let request = || System::request("first", json!({}));
    let mut runs = Vec::new();
    // One on a thread of its own, one on a thread that is named, and one that finds no room.
    for thread in [None, Some(ThreadId::new()), None] {
        runs.push(system.services.create_run(&system.actor, thread, request()).await.unwrap());
        system.gate.wait_for(runs.len().min(2)).await;
    }
    assert_eq!(system.count("select count(*) from queue").await, 1);
    assert_eq!(
        system.count("select sum(fence)::bigint from threads where status = 'busy'").await,
        2
    );
    assert_eq!(system.count("select count(*) from heads where status = 'running'").await, 2);
    assert!(!open().await, "somebody waits");
    system.gate.open();
    for run in &runs {
        system.wait(run).await;
        assert_eq!(system.status(run).await, RunStatus::Success);
    }
    until("nobody waits any more", open).await;
    let other = system.driver(DriverConfig { instance: InstanceId::new(), ..config });
    until("beside another driver the queue shares the work", async || !open().await).await;
    driver.stop().await;
    other.stop().await;
    system.check_tables().await;
}

#[sqlx::test]
async fn two_drivers_share_the_work_and_no_run_is_moved_twice(pool: PgPool) {
    const RUNS: usize = 300;
    let graph = one("work", json!({ "use": "trace" }));
    let system = System::new(pool, &[graph]).await;
    let config = DriverConfig { capacity: 8, ..System::driver_config() };
    let drivers = [
        system.driver(config.clone()),
        system.driver(DriverConfig { instance: InstanceId::new(), ..config }),
    ];
    for moving in &drivers {
        until("both have their leases", async || moving.driver.leased().load(Ordering::Relaxed))
            .await;
    }
    let mut runs = Vec::new();
    for _ in 0..RUNS {
        runs.push(system.start(ThreadId::new(), "work", json!({})).await);
    }
    for run in &runs {
        system.wait(run).await;
    }
    let traced = system.trace.runs();
    assert_eq!((traced.len(), traced.iter().collect::<HashSet<_>>().len()), (RUNS, RUNS));
    let shares = || drivers.iter().map(|moving| moving.driver.committer().stats().commits);
    // A run ends in its last commit, and that is counted when its answer has come.
    until("all commits to be counted", async || shares().sum::<u64>() >= 300).await;
    let shares: Vec<u64> = shares().collect();
    assert_eq!(shares.iter().sum::<u64>(), 300, "{shares:?}");
    assert!(shares.iter().all(|share| *share >= 30), "{shares:?}");
    for driver in drivers {
        driver.stop().await;
    }
    system.check_tables().await;
}

/// Makes another user.
async fn user(system: &System, name: &str) -> UserId {
    let user = system.services.create_user(&system.actor, name.to_owned(), false).await.unwrap();
    user.user_id
}

#[sqlx::test]
async fn claims_go_by_priority_then_in_turn_between_owners_then_by_age(pool: PgPool) {
    let system = System::new(pool, &[looping()]).await;
    let (anna, bert) = (user(&system, "anna").await, user(&system, "bert").await);
    let mut owners = HashMap::new();
    let mut accept = async |owner: UserId, priority: i32| {
        let mut request = System::request("loop", json!({}));
        request.priority = priority;
        let actor =
            cynai::services::api::Actor { user_id: owner, name: "x".to_owned(), admin: false };
        let run = system.services.create_run(&actor, Some(ThreadId::new()), request).await.unwrap();
        owners.insert(run.run_id, (owner, priority));
        run.run_id
    };
    let mut annas = Vec::new();
    for _ in 0..20 {
        annas.push(accept(anna, 0).await);
    }
    for _ in 0..3 {
        accept(bert, 0).await;
    }
    let urgent = accept(anna, 5).await;
    let instance = InstanceId::new();
    let mut db = system.pool.acquire().await.unwrap();
    let epoch = queue::register(&mut db, instance, "", Duration::from_secs(60)).await.unwrap();
    let first = queue::claim(&mut db, instance, epoch, queue::Claim::Ready(1)).await.unwrap();
    assert_eq!(first[0].run_id, urgent);
    let claimed = queue::claim(&mut db, instance, epoch, queue::Claim::Ready(8)).await.unwrap();
    let of =
        |owner: UserId| claimed.iter().filter(|grant| owners[&grant.run_id].0 == owner).count();
    assert_eq!((of(anna), of(bert)), (5, 3), "twenty runs do not stand before three");
    let ids: HashSet<_> = claimed.iter().map(|grant| grant.run_id).collect();
    assert!(annas[..5].iter().all(|run| ids.contains(run)), "the oldest of an owner go first");
}

#[sqlx::test]
async fn a_cancelled_run_stops_and_stores_nothing_more(pool: PgPool) {
    let system = System::new(pool, &[gated()]).await;
    let driver = system.driver(System::driver_config());
    let run = system.start(ThreadId::new(), "gated", json!({})).await;
    system.gate.wait_for(1).await;
    let key = RunKey { thread: Some(run.thread_id), run: run.run_id };
    system
        .services
        .cancel_run(&system.actor, key, CancelAction::Interrupt, None, true)
        .await
        .unwrap();
    assert_eq!(system.status(&run).await, RunStatus::Interrupted);
    until("its task is gone", async || driver.driver.in_memory() == 0).await;
    system.gate.open();
    assert_eq!(system.count("select max(seq) from checkpoints").await, 1);
    let again = system.resume(run.thread_id, "gated", None).await.unwrap();
    assert_eq!(system.wait(&again).await, json!({ "log": ["before", "gate"] }));
    driver.stop().await;
    system.check_tables().await;
}

#[sqlx::test]
async fn everything_at_once_neither_locks_up_nor_leaves_a_mess(pool: PgPool) {
    let wait = json!({
        "name": "wait", "state": { "log": { "type": "array", "reduce": "append" } },
        "nodes": { "each": { "for_each": "${['a', 'b', 'a']}", "max_parallel": 2, "wait": { "event": "${item}", "timeout": "1h" } },
                   "pause": { "wait": { "for": "5ms" } }, "more": { "use": "trace", "set": { "log": [1] } } },
        "edges": ["start -> each -> pause -> more -> end"],
    });
    let system = System::new(pool, &[wait, looping()]).await;
    let drivers =
        [system.driver(System::driver_config()), system.deaf_driver(System::driver_config())];
    let threads: Vec<ThreadId> = (0..6).map(|_| ThreadId::new()).collect();
    let mut users = JoinSet::new();
    for user in 0..4_u64 {
        let (services, actor, threads) =
            (system.services.clone(), system.actor.clone(), threads.clone());
        users.spawn(async move {
            let strategies = [
                MultitaskStrategy::Enqueue,
                MultitaskStrategy::Interrupt,
                MultitaskStrategy::Rollback,
                MultitaskStrategy::Reject,
            ];
            for round in 0..40_usize {
                let at = round * 7 + usize::try_from(user).unwrap() * 3;
                let thread = threads[at % threads.len()];
                let mut request =
                    System::request(if at % 3 == 0 { "loop" } else { "wait" }, json!({}));
                request.multitask_strategy = strategies[at % strategies.len()];
                let made = services.create_run(&actor, Some(thread), request).await;
                for name in ["a", "b"] {
                    // A thread may not be there yet, or its run may be gone.
                    let _ =
                        services.send_event(&actor, thread, name.to_owned(), json!(round)).await;
                }
                if let (Ok(run), 0) = (&made, at % 5) {
                    let key = RunKey { thread: Some(thread), run: run.run_id };
                    let action =
                        if at % 2 == 0 { CancelAction::Interrupt } else { CancelAction::Rollback };
                    let _ = services.cancel_run(&actor, key, action, None, true).await;
                }
            }
        });
    }
    users.join_all().await;
    // Whoever still waits gets what it waits for.
    until("all runs have ended", async || {
        for thread in &threads {
            for name in ["a", "a", "b"] {
                let _ = system
                    .services
                    .send_event(&system.actor, *thread, name.to_owned(), json!(0))
                    .await;
            }
        }
        system.count("select count(*) from heads").await == 0
    })
    .await;
    for driver in drivers {
        driver.stop().await;
    }
    system.check_tables().await;
    system.sql("select pg_stat_force_next_flush()").await;
    let deadlocks = system
        .count("select deadlocks from pg_stat_database where datname = current_database()")
        .await;
    assert_eq!(deadlocks, 0);
}

#[sqlx::test]
async fn a_claim_and_a_wake_of_the_same_run_do_not_wait_for_each_other(pool: PgPool) {
    let system = System::new(pool, &[looping()]).await;
    let run = system.start(ThreadId::new(), "loop", json!({})).await;
    let instance = InstanceId::new();
    let mut db = system.pool.acquire().await.unwrap();
    let epoch = queue::register(&mut db, instance, "", Duration::from_secs(60)).await.unwrap();
    // Something settles a wait of a run that is queued: it has the head, the claim has the place.
    let mut waker = system.pool.begin().await.unwrap();
    queue::lock_head(&mut waker, run.run_id).await.unwrap();
    let mut claimer = system.pool.begin().await.unwrap();
    let claiming = async {
        let grants =
            queue::claim(&mut claimer, instance, epoch, queue::Claim::Ready(1)).await.unwrap();
        claimer.commit().await.unwrap();
        grants
    };
    let waking = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        queue::wake(&mut waker, run.run_id).await.unwrap();
        waker.commit().await.unwrap();
    };
    let both = async { tokio::join!(claiming, waking) };
    let (grants, ()) = tokio::time::timeout(PATIENCE, both).await.unwrap();
    assert_eq!((grants.len(), grants[0].wake), (1, 1));
}

#[sqlx::test]
async fn a_promotion_and_a_wake_of_the_same_run_do_not_wait_for_each_other(pool: PgPool) {
    let system = System::new(pool, &[one("timer", json!({ "wait": { "for": "1h" } }))]).await;
    let driver = system.driver(System::driver_config());
    let run = system.start(ThreadId::new(), "timer", json!({})).await;
    system.head(&run, "parked").await;
    driver.stop().await;
    system.sql("update queue set due = now()").await;
    let mut waker = system.pool.begin().await.unwrap();
    queue::lock_head(&mut waker, run.run_id).await.unwrap();
    let mut db = system.pool.acquire().await.unwrap();
    assert_eq!(
        queue::promote_due(&mut db, 10).await.unwrap(),
        0,
        "it is passed over while somebody has its head"
    );
    queue::wake(&mut waker, run.run_id).await.unwrap();
    waker.commit().await.unwrap();
    assert_eq!(queue::promote_due(&mut db, 10).await.unwrap(), 1);
    system.check_tables().await;
}
