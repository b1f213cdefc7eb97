//! What attempts do to the world: told before, recorded after, and what follows when nobody knows.

use super::*;
use crate::graph::checkpoint::EffectStatus;
use crate::graph::memory::MemoryEffect;

/// An effectful node whose process dies in its first attempt: what comes of it under each decision.
async fn effectful_after_a_crash(decision: Value) -> (Result<Value, String>, usize, MemoryEffect) {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": { "act": { "use": "act", "with": { "file": "${'a' + '.txt'}" }, "set": { "log": ["${output}"] } } },
        "edges": ["start -> act -> end"],
    });
    let calls = Arc::new(AtomicUsize::new(0));
    let called = Arc::clone(&calls);
    let act: Code = Box::new(move |activation| {
        let calls = Arc::clone(&called);
        async move {
            if calls.fetch_add(1, Ordering::SeqCst) == 0 {
                std::future::pending::<()>().await;
            }
            Ok(Outcome::output(json!(format!("attempt {}", activation.attempt))))
        }
        .boxed()
    });
    let world =
        World::new(&[file], Script::default().with_async("act", Effect::Effectful, act), json!({}));
    // The process dies while the attempt is under way.
    assert!(world.go().now_or_never().is_none());
    assert!(world.waiting().await.people_only());
    let asked = &world.open("act").data["value"];
    assert_eq!(asked["reason"], "unknown_outcome");
    assert_eq!(asked["sent"]["target"], "act");
    assert_eq!(
        asked["sent"]["request"],
        json!({ "file": "a.txt" }),
        "the person sees what was sent"
    );
    assert_eq!(only(&world).status, EffectStatus::Unknown);
    world.answer("act", decision);
    let end = match world.go().await {
        Exit::Done(state) => Ok(state.output(&world.graph)["log"].clone()),
        Exit::Failed(failure) => Err(failure.kind),
        other => panic!("{other:?}"),
    };
    (end, calls.load(Ordering::SeqCst), only(&world))
}

#[tokio::test]
async fn a_person_decides_about_an_attempt_whose_outcome_is_unknown() {
    let (end, calls, effect) = effectful_after_a_crash(json!({ "action": "retry" })).await;
    assert_eq!(
        end,
        Ok(json!(["attempt 1"])),
        "under the same number: it is not known to have failed"
    );
    assert_eq!((calls, effect.sends, effect.status), (2, 2, EffectStatus::Done));
    let decision = json!({ "action": "done", "output": "by hand" });
    let (end, calls, effect) = effectful_after_a_crash(decision).await;
    assert_eq!(end, Ok(json!(["by hand"])));
    assert_eq!((calls, effect.sends, effect.status), (1, 1, EffectStatus::Done));
    assert_eq!(effect.outcome, json!("by hand"));
    let (end, calls, effect) = effectful_after_a_crash(json!({ "action": "fail" })).await;
    assert_eq!(end, Err("given_up".to_owned()));
    assert_eq!((calls, effect.sends, effect.status), (1, 1, EffectStatus::Failed));
}

#[tokio::test]
async fn an_idempotent_attempt_is_repeated_under_its_number() {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": { "act": { "use": "act", "set": { "log": ["${output}"] } } },
        "edges": ["start -> act -> end"],
    });
    let keys = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&keys);
    let act: Code = Box::new(move |activation| {
        let keys = Arc::clone(&seen);
        async move {
            let first = {
                let mut keys = keys.lock().unwrap();
                keys.push((activation.task.id, activation.attempt));
                keys.len() == 1
            };
            if first {
                std::future::pending::<()>().await;
            }
            Ok(Outcome::output(json!("done")))
        }
        .boxed()
    });
    let world = World::new(
        &[file],
        Script::default().with_async("act", Effect::Idempotent, act),
        json!({}),
    );
    assert!(world.go().now_or_never().is_none());
    assert_eq!(world.output().await, json!({ "log": ["done"] }));
    let keys = keys.lock().unwrap();
    assert_eq!(keys.len(), 2);
    assert_eq!(keys[0], keys[1], "the idempotency key of the repeated attempt is the same");
}

/// The one effect of a thread.
fn only(world: &World) -> MemoryEffect {
    let mut effects = world.store.effects();
    assert_eq!(effects.len(), 1, "{effects:?}");
    effects.remove(0)
}

/// A world of one node with this code, and what its file says beside.
fn acting(effect: Effect, more: &Value, code: Code) -> World {
    let mut node = json!({ "use": "act", "with": { "n": 1 }, "set": { "log": ["${output}"] } });
    for (key, value) in more.as_object().unwrap() {
        node[key] = value.clone();
    }
    let file = json!({
        "name": "g", "state": { "log": log() }, "nodes": { "act": node },
        "edges": ["start -> act -> end"],
    });
    World::new(&[file], Script::default().with_async("act", effect, code), json!({}))
}

/// Code whose first `lost` calls end without telling what happened.
fn lost(lost: usize) -> (Code, Arc<Mutex<Vec<String>>>) {
    let keys = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&keys);
    let code: Code = Box::new(move |activation| {
        let mut keys = seen.lock().unwrap();
        keys.push(activation.idempotency_key());
        let end = if keys.len() <= lost {
            Err(NodeError::unknown("cut", "the connection was cut"))
        } else {
            Ok(Outcome::output(json!("done")))
        };
        async move { end }.boxed()
    });
    (code, keys)
}

#[tokio::test]
async fn the_intent_is_stored_before_the_code_runs_and_the_outcome_with_the_step() {
    let world = Arc::new(Mutex::new(None::<MemoryStore>));
    let inside = Arc::clone(&world);
    let code: Code = Box::new(move |_| {
        let found = inside.lock().unwrap().as_ref().unwrap().effects();
        assert_eq!(found[0].status, EffectStatus::Intent);
        async { Ok(Outcome::output(json!({ "id": 7 }))) }.boxed()
    });
    let acting = acting(Effect::Effectful, &json!({}), code);
    *world.lock().unwrap() = Some(acting.store.clone());
    assert_eq!(acting.output().await, json!({ "log": [{ "id": 7 }] }));
    let effect = only(&acting);
    assert_eq!((effect.kind, effect.target.as_str(), effect.sends), ("use", "act", 1));
    assert_eq!((effect.status, effect.outcome), (EffectStatus::Done, json!({ "id": 7 })));
}

#[tokio::test]
async fn a_pure_node_tells_nothing() {
    let code: Code = Box::new(|_| async { Ok(Outcome::output(json!(1))) }.boxed());
    let world = acting(Effect::Pure, &json!({}), code);
    assert_eq!(world.output().await, json!({ "log": [1] }));
    assert_eq!(world.store.effects(), []);
}

#[tokio::test]
async fn a_failed_attempt_is_recorded_and_the_next_has_another_key() {
    let keys = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&keys);
    let code: Code = Box::new(move |activation| {
        seen.lock().unwrap().push(activation.idempotency_key());
        let failed = activation.attempt == 1;
        async move {
            if failed {
                Err(NodeError::retryable("refused", "not today"))
            } else {
                Ok(Outcome::output(json!(2)))
            }
        }
        .boxed()
    });
    let retry = json!({ "retry": { "attempts": 2, "first": "1s" } });
    let world = acting(Effect::Effectful, &retry, code);
    assert_eq!(world.waiting().await.outstanding, 1);
    world.store.advance(Duration::from_secs(2));
    assert_eq!(world.output().await, json!({ "log": [2] }));
    let effects = world.store.effects();
    let statuses: Vec<_> = effects.iter().map(|effect| (effect.attempt, effect.status)).collect();
    assert_eq!(statuses, [(1, EffectStatus::Failed), (2, EffectStatus::Done)]);
    assert_eq!(effects[0].outcome, json!({ "kind": "refused", "message": "not today" }));
    let keys = keys.lock().unwrap();
    assert_ne!(keys[0], keys[1]);
}

#[tokio::test]
async fn an_outcome_that_nothing_tells_goes_to_a_person() {
    let (code, keys) = lost(1);
    let mut world = acting(Effect::Effectful, &json!({ "retry": { "attempts": 5 } }), code);
    assert!(world.waiting().await.people_only(), "it is not repeated blindly");
    let asked = world.open("act").data["value"].clone();
    assert!(asked["message"].as_str().unwrap().contains("the connection was cut"), "{asked}");
    assert_eq!(asked["sent"]["idempotency_key"], keys.lock().unwrap()[0].as_str());
    // Another answer was rolled back in between.
    world.generation = 1;
    world.answer("act", json!({ "action": "retry" }));
    assert_eq!(world.output().await, json!({ "log": ["done"] }));
    let keys = keys.lock().unwrap();
    assert_eq!(keys[0], keys[1], "what is sent again carries the same key");
}

#[tokio::test]
async fn after_a_rollback_the_same_attempt_has_another_key() {
    let mut keys = Vec::new();
    let thread = ThreadId::new();
    for generation in 0..3 {
        let (code, seen) = lost(0);
        let mut world = acting(Effect::Effectful, &json!({}), code);
        (world.thread_id, world.generation) = (thread, generation);
        world.output().await;
        let sent = seen.lock().unwrap().remove(0);
        assert!(sent.starts_with(&only(&world).task.to_string()), "{sent}");
        keys.push(sent);
    }
    keys.dedup();
    assert_eq!(keys.len(), 3, "{keys:?}");
}

#[tokio::test]
async fn an_idempotent_effect_is_sent_again_under_its_key_a_bounded_number_of_times() {
    let (code, keys) = lost(1);
    let world = acting(Effect::Idempotent, &json!({}), code);
    assert_eq!(world.waiting().await.outstanding, 1);
    world.store.advance(Duration::from_secs(1));
    assert_eq!(world.output().await, json!({ "log": ["done"] }));
    assert_eq!((only(&world).sends, only(&world).status), (2, EffectStatus::Done));
    let sent = keys.lock().unwrap().clone();
    assert_eq!(sent[0], sent[1]);

    let (code, keys) = lost(usize::MAX);
    let world = acting(Effect::Idempotent, &json!({}), code);
    for _ in 0..2 {
        assert_eq!(world.waiting().await.outstanding, 1);
        world.store.advance(Duration::from_secs(1));
    }
    assert_eq!(world.failure().await.kind, "cut");
    assert_eq!(keys.lock().unwrap().len(), 3);
    assert_eq!((only(&world).sends, only(&world).status), (3, EffectStatus::Unknown));
}

#[tokio::test]
async fn the_file_says_what_follows_an_unknown_outcome() {
    let (code, keys) = lost(1);
    let world = acting(Effect::Effectful, &json!({ "effects": "fail" }), code);
    assert_eq!(world.failure().await.kind, "unknown_outcome");
    assert_eq!(keys.lock().unwrap().len(), 1);

    let (code, keys) = lost(1);
    let world = acting(Effect::Effectful, &json!({ "effects": "retry" }), code);
    assert_eq!(world.waiting().await.outstanding, 1);
    world.store.advance(Duration::from_secs(1));
    assert_eq!(world.output().await, json!({ "log": ["done"] }));
    assert_eq!(keys.lock().unwrap().len(), 2);

    let (code, _) = lost(1);
    let world = acting(Effect::Idempotent, &json!({ "effects": "ask" }), code);
    assert!(world.waiting().await.people_only());
}

#[tokio::test]
async fn after_a_crash_the_file_decides_too() {
    for (policy, kind) in [("fail", Some("unknown_outcome")), ("retry", None)] {
        let calls = Arc::new(AtomicUsize::new(0));
        let called = Arc::clone(&calls);
        let code: Code = Box::new(move |_| {
            let first = called.fetch_add(1, Ordering::SeqCst) == 0;
            async move {
                if first {
                    std::future::pending::<()>().await;
                }
                Ok(Outcome::output(json!("done")))
            }
            .boxed()
        });
        let world = acting(Effect::Effectful, &json!({ "effects": policy }), code);
        assert!(world.go().now_or_never().is_none(), "the process dies while it acts");
        match kind {
            Some(kind) => {
                assert_eq!(world.failure().await.kind, kind);
                assert_eq!(only(&world).status, EffectStatus::Unknown);
            }
            None => {
                assert_eq!(world.output().await, json!({ "log": ["done"] }));
                assert_eq!((only(&world).sends, only(&world).status), (2, EffectStatus::Done));
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_time_of_an_effectful_attempt_ends_with_an_unknown_outcome() {
    let code: Code = Box::new(|_| std::future::pending().boxed());
    let world =
        acting(Effect::Effectful, &json!({ "timeout": "1s", "retry": { "attempts": 3 } }), code);
    assert!(world.waiting().await.people_only());
    let asked = world.open("act").data["value"]["message"].to_string();
    assert!(asked.contains("took longer than 1s"), "{asked}");
}

#[tokio::test]
async fn a_long_request_is_kept_in_part() {
    let code: Code = Box::new(|_| async { Ok(Outcome::output(json!("x".repeat(10_000)))) }.boxed());
    let long = json!({ "with": { "text": "é".repeat(20_000) } });
    let world = acting(Effect::Effectful, &long, code);
    world.output().await;
    let effect = only(&world);
    let (request, outcome) = (effect.request.as_str().unwrap(), effect.outcome.as_str().unwrap());
    assert!(request.len() < 17_000 && request.ends_with("bytes)"), "{} bytes", request.len());
    assert!(outcome.len() < 5_000 && outcome.ends_with("(10002 bytes)"), "{} bytes", outcome.len());
}
