//! The engine over the checkpointer in memory, with nodes whose code is written in the test.

mod effects;

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::FutureExt;
use serde_json::json;

use super::super::channel::State;
use super::super::compile::{NodeNames, compile_stored};
use super::super::input::{Order, Standing, begin};
use super::super::memory::{MemoryStore, OpenWait};
use super::super::value::Shared;
use super::*;

type Code = Box<
    dyn for<'a> Fn(&'a Activation<'a>) -> BoxFuture<'a, Result<Outcome, NodeError>> + Send + Sync,
>;

struct Scripted {
    effect: Effect,
    code: Code,
}

impl Node for Scripted {
    fn run<'a>(
        &'a self,
        activation: &'a Activation<'a>,
    ) -> BoxFuture<'a, Result<Outcome, NodeError>> {
        (self.code)(activation)
    }

    fn effect(&self) -> Effect {
        self.effect
    }
}

#[derive(Default)]
struct Script(BTreeMap<String, Arc<Scripted>>);

impl Script {
    /// A node whose code has no wait in it.
    fn with(
        self,
        name: &str,
        effect: Effect,
        code: impl Fn(&Activation<'_>) -> Result<Outcome, NodeError> + Send + Sync + 'static,
    ) -> Self {
        let code = Arc::new(code);
        self.with_async(
            name,
            effect,
            Box::new(move |activation| {
                let code = Arc::clone(&code);
                async move { code(activation) }.boxed()
            }),
        )
    }

    fn with_async(mut self, name: &str, effect: Effect, code: Code) -> Self {
        self.0.insert(name.to_owned(), Arc::new(Scripted { effect, code }));
        self
    }
}

impl NodeSource for Script {
    fn find(&self, node: &NodeSpec) -> Option<Arc<dyn Node>> {
        match &node.kind {
            NodeKind::Use { name, .. } => {
                self.0.get(name).map(|node| Arc::clone(node) as Arc<dyn Node>)
            }
            _ => None,
        }
    }
}

impl NodeNames for Script {
    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    fn effect(&self, name: &str) -> Option<Effect> {
        self.0.get(name).map(|node| node.effect)
    }
}

use super::super::model::NodeKind;

/// A thread in memory with its graph, and a process that can die.
struct World {
    store: MemoryStore,
    graph: Arc<Graph>,
    script: Arc<Script>,
    run_id: RunId,
    thread_id: ThreadId,
    options: Options,
    drain: Arc<AtomicBool>,
    first_seq: i64,
    generation: i32,
}

fn ambient() -> Ambient {
    Ambient { run: Shared::new(json!({})), env: Shared::new(json!({})) }
}

impl World {
    /// `files`: the subgraphs first, the graph last.
    fn new(files: &[Value], script: Script, input: Value) -> Self {
        let mut graphs: HashMap<String, Arc<Graph>> = HashMap::new();
        let mut last = None;
        for file in files {
            let find = |name: &str| graphs.get(name).cloned();
            let graph = compile_stored(&file.to_string(), &find, &script);
            let graph = Arc::new(graph.unwrap_or_else(|problems| panic!("{problems:#?}")));
            graphs.insert(graph.name.clone(), Arc::clone(&graph));
            last = Some(graph);
        }
        let graph = last.unwrap();
        let order = Order { input: Some(input), ..Order::default() };
        let begun =
            begin(&graph, &ambient(), Standing::empty(&graph), &order, None, false).unwrap();
        let store = MemoryStore::new();
        store.insert(begun.row.unwrap());
        Self {
            store,
            graph,
            script: Arc::new(script),
            run_id: RunId::new(),
            thread_id: ThreadId::new(),
            options: Options { max_parallel: 256, ..Options::default() },
            drain: Arc::default(),
            first_seq: 0,
            generation: 0,
        }
    }

    /// The run has ended, and another one goes on with the thread.
    fn another_run(&mut self) {
        self.run_id = RunId::new();
    }

    /// A process takes the run and moves it until it leaves memory.
    async fn go(&self) -> Exit {
        self.try_go().await.unwrap()
    }

    async fn try_go(&self) -> Result<Exit, ExecError> {
        let checkpointer = Arc::new(self.store.grant(0));
        let mut root = restore(&*checkpointer, "", &self.graph).await?.unwrap();
        root.first_seq = self.first_seq;
        let run = Run {
            run_id: self.run_id,
            thread_id: self.thread_id,
            fence: 1,
            generation: self.generation,
            cursor: Cursor::new(root.position.seq, 0),
            ambient: ambient(),
            checkpointer,
            nodes: Arc::clone(&self.script) as Arc<dyn NodeSource>,
            options: self.options.clone(),
            drain: Arc::clone(&self.drain),
        };
        run.advance(root).await
    }

    /// The result of a run that comes to its end.
    async fn output(&self) -> Value {
        match self.go().await {
            Exit::Done(state) => state.output(&self.graph),
            other => panic!("{other:?}"),
        }
    }

    async fn failure(&self) -> Failure {
        match self.go().await {
            Exit::Failed(failure) => failure,
            other => panic!("{other:?}"),
        }
    }

    async fn waiting(&self) -> Waiting {
        match self.go().await {
            Exit::Waiting(waiting) => waiting,
            other => panic!("{other:?}"),
        }
    }

    /// The questions that are asked, by the name of the node.
    fn questions(&self) -> Vec<(String, String)> {
        let asked = self
            .store
            .open()
            .into_iter()
            .filter(|open| open.kind == super::super::checkpoint::WaitKind::Interrupt);
        asked.map(|open| (open.node, open.data["id"].as_str().unwrap().to_owned())).collect()
    }

    fn answer(&self, node: &str, answer: Value) {
        let open = self.questions();
        let (_, id) = open
            .iter()
            .find(|(asked, _)| asked == node)
            .unwrap_or_else(|| panic!("{node}: {open:?}"));
        assert!(self.store.answer(id, &answer));
    }

    fn open(&self, node: &str) -> OpenWait {
        self.store.open().into_iter().find(|open| open.node == node).unwrap()
    }
}

async fn check(file: Value, input: Value, expected: Value) {
    assert_eq!(World::new(&[file], Script::default(), input).output().await, expected);
}

async fn check_failure(file: Value, kind: &str) -> Failure {
    let failure = World::new(&[file], Script::default(), json!({})).failure().await;
    assert_eq!(failure.kind, kind, "{failure:?}");
    failure
}

/// Counts how many run at once.
#[derive(Default)]
struct Gauge {
    now: AtomicUsize,
    most: AtomicUsize,
    ran: AtomicUsize,
}

impl Gauge {
    async fn pass(&self, polls: usize) {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        self.ran.fetch_add(1, Ordering::SeqCst);
        for _ in 0..polls {
            tokio::task::yield_now().await;
        }
        self.now.fetch_sub(1, Ordering::SeqCst);
    }
}

fn done() -> Result<Outcome, NodeError> {
    Ok(Outcome::output(Value::Null))
}

fn log() -> Value {
    json!({ "type": "array", "reduce": "append" })
}

#[tokio::test]
async fn writes_of_a_fan_out_come_in_the_order_of_the_names_whoever_finishes_first() {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": {
            "c": { "use": "slow", "with": 0, "set": { "log": ["c"] } },
            "a": { "use": "slow", "with": 9, "set": { "log": ["a"] } },
            "b": { "use": "slow", "with": 4, "set": { "log": ["b"] } },
        },
        "edges": [{ "from": "start", "to": ["c", "a", "b"] }, "a -> end", "b -> end", "c -> end"],
    });
    let slow: Code = Box::new(|activation| {
        async move {
            let NodeKind::Use { with, .. } = &activation.node.kind else { panic!() };
            for _ in 0..activation.eval(with)?.as_u64().unwrap() {
                tokio::task::yield_now().await;
            }
            done()
        }
        .boxed()
    });
    let script = Script::default().with_async("slow", Effect::Pure, slow);
    let world = World::new(&[file], script, json!({}));
    assert_eq!(world.output().await, json!({ "log": ["a", "b", "c"] }));
    assert!(
        world.store.early_writes() >= 1,
        "what finished first was stored while the others still ran"
    );
}

#[tokio::test]
async fn a_join_fires_once_and_again_in_the_next_round_of_a_loop() {
    let file = json!({
        "name": "g", "state": { "n": { "type": "integer", "reduce": "sum", "default": 0 }, "log": log() },
        "nodes": {
            "head": { "set": { "n": 1 } }, "a": { "set": { "log": ["a"] } },
            "b1": { "set": { "log": ["b1"] } }, "b2": { "set": { "log": ["b2"] } },
            "join": { "set": { "log": ["${'join ' + string(state.n)}"] } },
        },
        "edges": [
            "start -> head", { "from": "head", "to": ["a", "b1"] }, "b1 -> b2", { "from": ["a", "b2"], "to": "join" },
            { "from": "join", "choose": [{ "when": "state.n < 3", "to": "head" }, { "to": "end" }] },
        ],
    });
    let round =
        |n: u32| vec!["a".to_owned(), "b1".to_owned(), "b2".to_owned(), format!("join {n}")];
    let log: Vec<String> = (1..=3).flat_map(round).collect();
    check(file, json!({}), json!({ "n": 3, "log": log })).await;
}

#[tokio::test]
async fn a_join_that_can_no_longer_fire_fails_the_run() {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": { "a": { "set": { "log": ["a"] } }, "b": { "set": { "log": ["b"] } },
                   "c": { "set": { "log": ["c"] } }, "d": { "set": { "log": ["d"] } } },
        "edges": [{ "from": "start", "to": ["a", "d"] },
                  { "from": "d", "choose": [{ "when": "false", "to": "b" }, { "to": "end" }] },
                  { "from": ["a", "b"], "to": "c" }],
    });
    let failure = check_failure(file, "unsatisfied_join").await;
    assert!(
        failure.message.contains("`b`") && failure.message.contains("`c`"),
        "{}",
        failure.message
    );
}

#[tokio::test]
async fn a_choose_takes_the_first_line_that_holds() {
    let file = |limit: i64| {
        json!({
            "name": "g", "state": { "n": { "type": "integer", "default": 5 }, "log": log() },
            "nodes": { "a": { "set": { "n": "${state.n + 1}" } }, "x": { "set": { "log": ["x"] } },
                       "y": { "set": { "log": ["y"] } } },
            "edges": ["start -> a", "x -> end", "y -> end",
                      { "from": "a", "choose": [{ "when": format!("state.n > {limit}"), "to": "x" },
                                                { "when": "state.n == 6", "to": ["x", "y"] }, { "to": "end" }] }],
        })
    };
    check(file(5), json!({}), json!({ "n": 6, "log": ["x"] })).await;
    check(file(6), json!({}), json!({ "n": 6, "log": ["x", "y"] })).await;
    check(file(6), json!({ "n": 0 }), json!({ "n": 1 })).await;
}

#[tokio::test]
async fn a_handler_sees_the_error_also_after_it_has_waited() {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": {
            "bad": { "set": { "log": ["${string(1 / (size(state.log) * 0))}"] }, "on_error": "handler" },
            "handler": { "interrupt": { "ask": "${error.kind}" },
                         "set": { "log": ["${error.node + ' ' + error.kind + ' ' + string(error.attempts)}"] } },
        },
        "edges": ["start -> bad -> end", "handler -> end"],
    });
    let world = World::new(&[file], Script::default(), json!({ "log": [] }));
    assert!(world.waiting().await.people_only());
    assert_eq!(world.open("handler").data["value"], json!("expression"));
    world.answer("handler", json!(1));
    assert_eq!(world.output().await, json!({ "log": ["bad expression 1"] }));
}

#[tokio::test]
async fn a_list_without_items_goes_on_and_one_that_is_no_list_is_an_error() {
    let file = json!({
        "name": "g", "state": { "items": {}, "log": log() },
        "nodes": { "each": { "for_each": "${state.items}", "set": { "log": ["${item}"] }, "on_error": "handler" },
                   "next": { "set": { "log": ["next"] } }, "handler": { "set": { "log": ["${error.kind}"] } } },
        "edges": ["start -> each -> next -> end", "handler -> end"],
    });
    check(file.clone(), json!({ "items": [] }), json!({ "items": [], "log": ["next"] })).await;
    check(
        file.clone(),
        json!({ "items": ["b", "a"] }),
        json!({ "items": ["b", "a"], "log": ["b", "a", "next"] }),
    )
    .await;
    check(file, json!({ "items": 7 }), json!({ "items": 7, "log": ["for_each"] })).await;
}

#[tokio::test]
async fn no_more_items_run_at_once_than_max_parallel_says() {
    let file = json!({
        "name": "g", "state": { "items": { "type": "array" }, "done": { "type": "integer", "reduce": "sum", "default": 0 } },
        "nodes": { "each": { "for_each": "${state.items}", "max_parallel": 3, "use": "work", "set": { "done": 1 } } },
        "edges": ["start -> each -> end"],
    });
    let gauge = Arc::new(Gauge::default());
    let (counted, items) = (Arc::clone(&gauge), (0..20).collect::<Vec<_>>());
    let work: Code = Box::new(move |activation| {
        let gauge = Arc::clone(&counted);
        async move {
            gauge.pass(1 + activation.task.item.as_ref().unwrap().index as usize % 5).await;
            done()
        }
        .boxed()
    });
    let world = World::new(
        &[file],
        Script::default().with_async("work", Effect::Pure, work),
        json!({ "items": items }),
    );
    assert_eq!(world.output().await["done"], 20);
    assert_eq!((gauge.most.load(Ordering::SeqCst), gauge.ran.load(Ordering::SeqCst)), (3, 20));
}

#[tokio::test]
async fn the_bound_of_a_run_holds_and_zero_is_no_bound() {
    for (bound, most) in [(2, 2), (0, 5)] {
        let file = json!({
            "name": "g", "state": { "items": { "type": "array" }, "done": { "type": "integer", "reduce": "sum", "default": 0 } },
            "nodes": { "each": { "for_each": "${state.items}", "use": "work", "set": { "done": 1 } } },
            "edges": ["start -> each -> end"],
        });
        let gauge = Arc::new(Gauge::default());
        let counted = Arc::clone(&gauge);
        let work: Code = Box::new(move |_| {
            let gauge = Arc::clone(&counted);
            async move {
                gauge.pass(3).await;
                done()
            }
            .boxed()
        });
        let script = Script::default().with_async("work", Effect::Pure, work);
        let mut world = World::new(&[file], script, json!({ "items": [1, 2, 3, 4, 5] }));
        world.options.max_parallel = bound;
        assert_eq!(world.output().await["done"], 5);
        assert_eq!(gauge.most.load(Ordering::SeqCst), most);
    }
}

#[tokio::test]
async fn items_that_wait_take_a_place_and_a_free_place_wakes_the_run() {
    let file = json!({
        "name": "g", "state": { "items": { "type": "array" }, "log": log() },
        "nodes": { "each": { "for_each": "${state.items}", "max_parallel": 2, "wait": { "event": "${item}" },
                             "set": { "log": ["${output}"] } } },
        "edges": ["start -> each -> end"],
    });
    let world = World::new(&[file], Script::default(), json!({ "items": ["a", "b", "c"] }));
    let waiting = world.waiting().await;
    assert_eq!((waiting.outstanding, waiting.held_back, waiting.wake_below()), (2, true, 1));
    assert!(world.store.send_event("b", &json!("B")));
    let waiting = world.waiting().await;
    assert_eq!((waiting.outstanding, waiting.held_back, waiting.wake_below()), (2, false, 0));
    // One comes before anybody waits for it.
    world.store.send_event("a", &json!("A"));
    assert_eq!(world.waiting().await.outstanding, 1);
    world.store.send_event("c", &json!("C"));
    assert_eq!(world.output().await["log"], json!(["A", "B", "C"]));
}

#[tokio::test]
async fn the_items_that_succeed_keep_their_writes_when_one_goes_to_the_handler() {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": { "each": { "for_each": "${[1, 0, 2]}", "set": { "log": ["${10 / item}"] }, "on_error": "handler" },
                   "next": { "set": { "log": ["never"] } },
                   "handler": { "set": { "log": ["${error.node}"] } } },
        "edges": ["start -> each -> next -> end", "handler -> end"],
    });
    check(file, json!({}), json!({ "log": [10, 5, "each"] })).await;
}

#[tokio::test]
async fn retries_have_committed_numbers_and_pauses_that_park() {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": { "flaky": { "use": "flaky", "retry": { "attempts": 3, "first": "10s", "factor": 2, "jitter": false },
                              "set": { "log": ["${output}"] }, "on_error": "handler" },
                   "handler": { "set": { "log": ["${error.message + ' ' + string(error.attempts)}"] } } },
        "edges": ["start -> flaky -> end", "handler -> end"],
    });
    for (succeeds_at, expected) in
        [(3, json!({ "log": [3] })), (9, json!({ "log": ["no luck 3 3"] }))]
    {
        let script = Script::default().with("flaky", Effect::Idempotent, move |activation| {
            if activation.attempt < succeeds_at {
                return Err(NodeError::retryable(
                    "bad_luck",
                    format!("no luck {}", activation.attempt),
                ));
            }
            Ok(Outcome::output(json!(activation.attempt)))
        });
        let world = World::new(std::slice::from_ref(&file), script, json!({}));
        for (attempt, pause) in [(2, 10), (3, 20)] {
            assert_eq!(
                world.waiting().await,
                Waiting { outstanding: 1, step: 1, ..Waiting::default() }
            );
            let open = world.open("flaky");
            assert_eq!(open.attempt, attempt);
            assert_eq!(open.due.unwrap() - world.store.now(), chrono::Duration::seconds(pause));
            // Looked at too early, it still waits.
            assert_eq!(world.waiting().await.outstanding, 1);
            world.store.advance(Duration::from_secs(pause.unsigned_abs()));
        }
        assert_eq!(world.output().await, expected);
    }
}

#[tokio::test]
async fn a_failure_for_good_is_not_tried_again() {
    let file = json!({
        "name": "g", "state": {},
        "nodes": { "bad": { "use": "bad", "retry": { "attempts": 5 } } },
        "edges": ["start -> bad -> end"],
    });
    let script = Script::default()
        .with("bad", Effect::Pure, |_| Err(NodeError::fatal("broken", "for good")));
    let failure = World::new(&[file], script, json!({})).failure().await;
    assert_eq!((failure.kind.as_str(), failure.attempts), ("broken", 1));
}

#[tokio::test]
async fn a_run_that_goes_on_after_a_failure_makes_another_attempt_and_asks_nobody() {
    let file = json!({
        "name": "g", "state": { "attempt": { "type": "integer" } },
        "nodes": { "act": { "use": "act", "set": { "attempt": "${output}" } } },
        "edges": ["start -> act -> end"],
    });
    let script = Script::default().with("act", Effect::Effectful, |activation| {
        if activation.attempt == 1 {
            return Err(NodeError::fatal("broken", "known to have failed"));
        }
        Ok(Outcome::output(json!(activation.attempt)))
    });
    let mut world = World::new(&[file], script, json!({}));
    assert_eq!(world.failure().await.kind, "broken");
    world.another_run();
    assert_eq!(world.output().await, json!({ "attempt": 2 }));
}

/// A graph that fails in attempt number `attempts`, as a process dies that has stored this and not the run's end: the
/// next one comes to the same failure, and makes no attempt.
async fn check_failed_for_good(below: bool, retry: Value, attempts: u32) {
    let mut inner = json!({
        "name": "inner", "state": { "log": log() },
        "nodes": { "act": { "use": "act", "set": { "log": ["${output}"] } } },
        "edges": ["start -> act -> end"],
    });
    if !retry.is_null() {
        inner["nodes"]["act"]["retry"] = retry;
    }
    let outer = json!({
        "name": "outer", "state": { "log": log() },
        "nodes": { "call": { "graph": "inner" } },
        "edges": ["start -> call -> end"],
    });
    let made = Arc::new(Mutex::new(Vec::new()));
    let counted = Arc::clone(&made);
    let script = Script::default().with("act", Effect::Effectful, move |activation| {
        counted.lock().unwrap().push(activation.attempt);
        if activation.attempt > attempts {
            return done();
        }
        Err(NodeError::retryable("broken", format!("attempt {}", activation.attempt)))
    });
    let files = if below { vec![inner, outer] } else { vec![inner] };
    let mut world = World::new(&files, script, json!({}));
    let failure = loop {
        match world.go().await {
            Exit::Failed(failure) => break failure,
            Exit::Waiting(_) => world.store.advance(Duration::from_secs(60)),
            other => panic!("{other:?}"),
        }
    };
    let expected: Vec<u32> = (1..=attempts).collect();
    for _ in 0..2 {
        assert_eq!(world.failure().await, failure);
        assert_eq!(*made.lock().unwrap(), expected);
    }
    // Only the next run makes another attempt.
    world.another_run();
    world.output().await;
    assert_eq!(made.lock().unwrap().last(), Some(&(attempts + 1)));
}

#[tokio::test]
async fn a_failure_that_was_stored_is_the_run_s_end_also_for_the_next_process() {
    for below in [false, true] {
        check_failed_for_good(below, Value::Null, 1).await;
        check_failed_for_good(below, json!({ "attempts": 3, "first": "1s" }), 3).await;
    }
}

#[tokio::test]
async fn an_attempt_that_did_not_start_is_not_counted() {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": { "late": { "use": "late", "set": { "log": ["${output}"] } } },
        "edges": ["start -> late -> end"],
    });
    let calls = Arc::new(AtomicUsize::new(0));
    let called = Arc::clone(&calls);
    let script = Script::default().with("late", Effect::Effectful, move |activation| {
        if called.fetch_add(1, Ordering::SeqCst) < 3 {
            return Err(NodeError::NotStarted {
                message: "busy".to_owned(),
                after: Duration::from_secs(1),
            });
        }
        Ok(Outcome::output(json!(activation.attempt)))
    });
    let world = World::new(&[file], script, json!({}));
    for _ in 0..3 {
        assert_eq!(world.waiting().await.outstanding, 1);
        world.store.advance(Duration::from_secs(1));
    }
    assert_eq!(world.output().await, json!({ "log": [1] }));
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_takes_too_long_fails_and_is_tried_again() {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": { "slow": { "use": "slow", "timeout": "5s", "retry": { "attempts": 2, "first": "1s" },
                             "set": { "log": ["${output}"] } } },
        "edges": ["start -> slow -> end"],
    });
    let slow: Code = Box::new(|activation| {
        async move {
            if activation.attempt == 1 {
                tokio::time::sleep(Duration::from_secs(60)).await;
            }
            Ok(Outcome::output(json!(activation.attempt)))
        }
        .boxed()
    });
    let world = World::new(
        &[file],
        Script::default().with_async("slow", Effect::Idempotent, slow),
        json!({}),
    );
    assert_eq!(world.waiting().await.outstanding, 1);
    assert_eq!(world.open("slow").data["kind"], "timeout");
    world.store.advance(Duration::from_secs(1));
    assert_eq!(world.output().await, json!({ "log": [2] }));
}

#[tokio::test]
async fn a_panic_in_a_node_is_its_failure_wherever_it_happens() {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": { "bad": { "use": "bad", "on_error": "handler" },
                   "handler": { "set": { "log": ["${error.kind + ': ' + error.message}"] } } },
        "edges": ["start -> bad -> end", "handler -> end"],
    });
    let early: Code = Box::new(|_| panic!("at once"));
    let late: Code = Box::new(|_| {
        async {
            tokio::task::yield_now().await;
            panic!("later")
        }
        .boxed()
    });
    for (code, what) in [(early, "at once"), (late, "later")] {
        let script = Script::default().with_async("bad", Effect::Pure, code);
        let output = World::new(std::slice::from_ref(&file), script, json!({})).output().await;
        assert_eq!(output, json!({ "log": [format!("panic: the node's code panicked: {what}")] }));
    }
}

#[tokio::test]
async fn a_node_goes_where_its_code_says_within_may_goto() {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": { "pick": { "use": "pick", "may_goto": ["left", "right"] },
                   "left": { "set": { "log": ["left"] } }, "right": { "set": { "log": ["right"] } },
                   "other": { "set": { "log": ["other"] } } },
        "edges": ["start -> pick -> end", "left -> end", "right -> end", "start -> other -> end"],
    });
    let pick = |goto: &'static str| {
        Script::default().with("pick", Effect::Pure, move |_| {
            let update = vec![("log".to_owned(), json!(["pick"]))];
            Ok(Outcome::Done { output: Value::Null, update, goto: vec![goto.to_owned()] })
        })
    };
    let world = World::new(std::slice::from_ref(&file), pick("right"), json!({}));
    assert_eq!(world.output().await, json!({ "log": ["other", "pick", "right"] }));
    assert_eq!(World::new(&[file], pick("other"), json!({})).failure().await.kind, "goto");
}

#[tokio::test]
async fn of_parallel_questions_only_the_unanswered_stay() {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": { "a": { "interrupt": { "ask": "a?" }, "set": { "log": ["${output}"] } },
                   "b": { "interrupt": { "ask": "b?" }, "set": { "log": ["${output}"] } } },
        "edges": [{ "from": "start", "to": ["a", "b"] }, "a -> end", "b -> end"],
    });
    let world = World::new(&[file], Script::default(), json!({}));
    assert_eq!(world.waiting().await.people, 2);
    let before = world.questions();
    world.answer("b", json!("B"));
    assert_eq!(world.waiting().await, Waiting { people: 1, ..Waiting::default() });
    assert_eq!(
        world.questions(),
        before.into_iter().filter(|(node, _)| node == "a").collect::<Vec<_>>()
    );
    world.answer("a", json!("A"));
    assert_eq!(world.output().await, json!({ "log": ["A", "B"] }));
}

/// A node that asks twice, whose process dies at its `dies`th call, if it has so many.
async fn two_questions(effect: Effect, dies: usize) -> (World, Arc<AtomicUsize>) {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": { "both": { "use": "both", "set": { "log": ["${output}"] } } },
        "edges": ["start -> both -> end"],
    });
    let calls = Arc::new(AtomicUsize::new(0));
    let called = Arc::clone(&calls);
    let both: Code = Box::new(move |activation| {
        let calls = Arc::clone(&called);
        async move {
            if calls.fetch_add(1, Ordering::SeqCst) + 1 == dies {
                std::future::pending::<()>().await;
            }
            let ask = |what: &str| {
                Ok(Outcome::Ask(Question { value: json!(what), schema: None, expires: None }))
            };
            match activation.answers().as_slice() {
                [] => ask("first"),
                [_] => ask("second"),
                answers => Ok(Outcome::output(json!(answers))),
            }
        }
        .boxed()
    });
    (World::new(&[file], Script::default().with_async("both", effect, both), json!({})), calls)
}

#[tokio::test]
async fn a_node_may_ask_twice_and_keeps_its_first_answer() {
    for effect in [Effect::Pure, Effect::Idempotent, Effect::Effectful] {
        let (world, calls) = two_questions(effect, 99).await;
        assert!(world.waiting().await.people_only());
        let first = world.questions();
        world.answer("both", json!("one"));
        assert!(world.waiting().await.people_only(), "{effect:?}");
        let second = world.questions();
        assert_ne!(first, second, "each question has its own id");
        assert_eq!(world.open("both").data["value"], "second");
        world.answer("both", json!("two"));
        assert_eq!(world.output().await, json!({ "log": [["one", "two"]] }), "{effect:?}");
        assert_eq!(calls.load(Ordering::SeqCst), 3);
    }
}

#[tokio::test]
async fn the_first_answer_survives_a_crash_of_the_second_call() {
    let (world, _) = two_questions(Effect::Idempotent, 2).await;
    assert!(world.waiting().await.people_only());
    world.answer("both", json!("one"));
    assert!(world.go().now_or_never().is_none(), "the process dies in the second call");
    assert!(world.waiting().await.people_only());
    assert_eq!(world.open("both").data["value"], "second");
    world.answer("both", json!("two"));
    assert_eq!(world.output().await, json!({ "log": [["one", "two"]] }));

    let (world, _) = two_questions(Effect::Effectful, 2).await;
    assert!(world.waiting().await.people_only());
    world.answer("both", json!("one"));
    assert!(world.go().now_or_never().is_none());
    assert!(world.waiting().await.people_only());
    assert_eq!(world.open("both").data["value"]["reason"], "unknown_outcome");
    world.answer("both", json!({ "action": "retry" }));
    assert!(world.waiting().await.people_only());
    assert_eq!(
        world.open("both").data["value"],
        "second",
        "the decision is not an answer to the node's own question"
    );
    world.answer("both", json!("two"));
    assert_eq!(world.output().await, json!({ "log": [["one", "two"]] }));
}

#[tokio::test]
async fn an_answer_survives_a_failed_attempt() {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": { "ask": { "use": "ask", "retry": { "attempts": 2, "first": "1s" }, "set": { "log": ["${output}"] } } },
        "edges": ["start -> ask -> end"],
    });
    let script = Script::default().with("ask", Effect::Effectful, |activation| {
        match activation.answers().as_slice() {
            [] => Ok(Outcome::Ask(Question { value: json!("?"), schema: None, expires: None })),
            _ if activation.attempt == 1 => Err(NodeError::retryable("bad_luck", "once")),
            answers => Ok(Outcome::output(json!(answers))),
        }
    });
    let world = World::new(&[file], script, json!({}));
    assert!(world.waiting().await.people_only());
    world.answer("ask", json!("yes"));
    assert_eq!(world.waiting().await.outstanding, 1);
    world.store.advance(Duration::from_secs(2));
    assert_eq!(world.output().await, json!({ "log": [["yes"]] }));
}

#[tokio::test]
async fn a_question_expires_also_when_it_is_the_second() {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": { "both": { "use": "both", "on_error": "handler" },
                   "handler": { "set": { "log": ["${error.kind}"] } } },
        "edges": ["start -> both -> end", "handler -> end"],
    });
    for answers_before in [0, 1] {
        let script = Script::default().with("both", Effect::Pure, |activation| {
            let value = json!(activation.answers().len());
            Ok(Outcome::Ask(Question {
                value,
                schema: None,
                expires: Some(Duration::from_secs(60)),
            }))
        });
        let world = World::new(std::slice::from_ref(&file), script, json!({}));
        assert!(world.waiting().await.people_only());
        for _ in 0..answers_before {
            world.answer("both", json!(1));
            assert!(world.waiting().await.people_only());
        }
        world.store.advance(Duration::from_secs(59));
        assert!(world.waiting().await.people_only());
        world.store.advance(Duration::from_secs(1));
        assert_eq!(world.output().await, json!({ "log": ["expired"] }));
    }
}

#[tokio::test]
async fn an_answer_in_time_counts_even_when_the_run_goes_on_later() {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": { "a": { "interrupt": { "ask": "?", "expires": "1m" }, "set": { "log": ["${output}"] } } },
        "edges": ["start -> a -> end"],
    });
    let world = World::new(&[file], Script::default(), json!({}));
    assert!(world.waiting().await.people_only());
    world.answer("a", json!("in time"));
    world.store.advance(Duration::from_secs(3600));
    assert_eq!(world.output().await, json!({ "log": ["in time"] }));
}

fn inner() -> Value {
    json!({
        "name": "inner", "state": { "x": {}, "steps": { "type": "array", "reduce": "append" } }, "input": ["x"], "output": ["steps"],
        "nodes": { "one": { "wait": { "event": "${'one ' + state.x}" }, "set": { "steps": ["${output}"] } },
                   "two": { "wait": { "event": "${'two ' + state.x}" }, "set": { "steps": ["${output}"] } } },
        "edges": ["start -> one -> two -> end"],
    })
}

fn outer(max_parallel: u32) -> Value {
    json!({
        "name": "outer", "state": { "log": log() },
        "nodes": { "each": { "for_each": "${['a', 'b', 'c']}", "max_parallel": max_parallel,
                             "graph": { "name": "inner", "input": { "x": "${item}" } },
                             "set": { "log": ["${output.steps}"] } } },
        "edges": ["start -> each -> end"],
    })
}

#[tokio::test]
async fn subgraphs_of_a_list_go_on_each_at_its_own_pace() {
    let world = World::new(&[inner(), outer(3)], Script::default(), json!({}));
    let waiting = world.waiting().await;
    assert_eq!(
        (waiting.outstanding, waiting.wake_below()),
        (3, 2),
        "each of the three may go on alone"
    );
    world.store.send_event("one b", &json!(1));
    let waiting = world.waiting().await;
    assert_eq!((waiting.outstanding, waiting.wake_below()), (3, 2), "b has begun its second step");
    assert!(world.store.send_event("two b", &json!(2)));
    assert_eq!(world.waiting().await.outstanding, 2);
    for event in ["one a", "one c", "two c", "two a"] {
        world.store.send_event(event, &json!(event));
    }
    // Events that nobody waited for yet are taken when somebody does: that wakes the run again.
    assert_eq!(world.waiting().await.outstanding, 2);
    let output = world.output().await;
    assert_eq!(output, json!({ "log": [["one a", "two a"], [1, 2], ["one c", "two c"]] }));
}

#[tokio::test]
async fn subgraphs_that_wait_take_a_place_of_max_parallel() {
    let world = World::new(&[inner(), outer(1)], Script::default(), json!({}));
    for item in ["a", "b", "c"] {
        for step in ["one", "two"] {
            let waiting = world.waiting().await;
            assert_eq!(waiting.outstanding, 1);
            let open = world.store.open();
            assert_eq!(open.len(), 1, "{open:?}");
            assert!(
                world.store.send_event(&format!("{step} {item}"), &json!(format!("{step} {item}")))
            );
        }
    }
    assert_eq!(world.output().await["log"][2], json!(["one c", "two c"]));
}

#[tokio::test]
async fn questions_in_items_and_subgraphs_have_different_ids() {
    let ask = json!({
        "name": "inner", "state": { "x": {}, "a": {} }, "input": ["x"], "output": ["a"],
        "nodes": { "ask": { "interrupt": { "ask": "${state.x}" }, "set": { "a": "${output}" } } },
        "edges": ["start -> ask -> end"],
    });
    let mut file = outer(3);
    file["nodes"]["each"]["set"] = json!({ "log": ["${output.a}"] });
    let world = World::new(&[ask, file], Script::default(), json!({}));
    assert_eq!(world.waiting().await.people, 3);
    let mut ids: Vec<String> = world.questions().into_iter().map(|(_, id)| id).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 3);
    for open in world.store.open() {
        assert!(world.store.answer(open.data["id"].as_str().unwrap(), &open.data["value"]));
    }
    assert_eq!(world.output().await, json!({ "log": ["a", "b", "c"] }));
}

#[tokio::test]
async fn waits_below_a_subgraph_that_failed_are_over() {
    let inner = json!({
        "name": "inner", "state": { "x": {} },
        "nodes": { "bad": { "use": "bad" }, "stuck": { "wait": { "event": "never" } } },
        "edges": [{ "from": "start", "to": ["bad", "stuck"] }, "bad -> end", "stuck -> end"],
    });
    let outer = json!({
        "name": "outer", "state": { "log": log() },
        "nodes": { "call": { "graph": "inner", "on_error": "handler" },
                   "handler": { "wait": { "event": "go" }, "set": { "log": ["${error.kind}"] } } },
        "edges": ["start -> call -> end", "handler -> end"],
    });
    let script = Script::default()
        .with("bad", Effect::Pure, |_| Err(NodeError::fatal("broken", "for good")));
    let world = World::new(&[inner, outer], script, json!({}));
    assert_eq!(world.waiting().await.outstanding, 1);
    let open = world.store.open();
    assert_eq!(open.iter().map(|open| open.node.as_str()).collect::<Vec<_>>(), ["handler"]);
    world.store.send_event("go", &Value::Null);
    assert_eq!(world.output().await, json!({ "log": ["broken"] }));
}

#[tokio::test]
async fn a_subgraph_that_is_tried_again_goes_on_where_it_failed() {
    let inner = json!({
        "name": "inner", "state": { "log": log() }, "output": ["log"],
        "nodes": { "first": { "use": "count", "set": { "log": ["first"] } }, "bad": { "use": "bad", "set": { "log": ["bad"] } } },
        "edges": ["start -> first -> bad -> end"],
    });
    let outer = json!({
        "name": "outer", "state": { "log": log() },
        "nodes": { "call": { "graph": "inner", "retry": { "attempts": 2, "first": "1s" }, "set": { "log": "${output.log}" } } },
        "edges": ["start -> call -> end"],
    });
    let (calls, tries) = (Arc::new(AtomicUsize::new(0)), AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let script = Script::default()
        .with("count", Effect::Pure, move |_| {
            counted.fetch_add(1, Ordering::SeqCst);
            done()
        })
        .with("bad", Effect::Pure, move |_| match tries.fetch_add(1, Ordering::SeqCst) {
            0 => Err(NodeError::fatal("broken", "the first time")),
            _ => done(),
        });
    let world = World::new(&[inner, outer], script, json!({}));
    assert_eq!(world.waiting().await.outstanding, 1);
    world.store.advance(Duration::from_secs(1));
    assert_eq!(world.output().await, json!({ "log": ["first", "bad"] }));
    assert_eq!(calls.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_run_that_makes_too_many_supersteps_fails_and_says_so() {
    let file = json!({
        "name": "g", "state": { "n": { "type": "integer", "reduce": "sum", "default": 0 } }, "limits": { "supersteps": 7 },
        "nodes": { "a": { "set": { "n": 1 } } },
        "edges": ["start -> a", { "from": "a", "choose": [{ "when": "state.n < 100", "to": "a" }, { "to": "end" }] }],
    });
    let mut world = World::new(&[file], Script::default(), json!({}));
    let failure = world.failure().await;
    assert_eq!(failure.kind, "superstep_limit");
    assert!(failure.message.contains('7'), "{}", failure.message);
    // The next run counts for itself and goes on from what was stored.
    world.first_seq = 7;
    world.options.supersteps = Some(3);
    assert_eq!(world.failure().await.kind, "superstep_limit");
    let last = restore(&world.store.grant(0), "", &world.graph).await.unwrap().unwrap();
    assert_eq!((last.position.seq, last.state.output(&world.graph)), (10, json!({ "n": 10 })));
}

#[tokio::test]
async fn an_activation_whose_result_is_stored_is_not_run_again() {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": { "each": { "for_each": "${[0, 1, 2, 3]}", "use": "work", "set": { "log": ["${item}"] } } },
        "edges": ["start -> each -> end"],
    });
    let ran = Arc::new(Mutex::new(Vec::new()));
    let (seen, dies) = (Arc::clone(&ran), Arc::new(AtomicBool::new(true)));
    let dying = Arc::clone(&dies);
    let work: Code = Box::new(move |activation| {
        let (ran, dies) = (Arc::clone(&seen), Arc::clone(&dying));
        async move {
            let item = activation.task.item.as_ref().unwrap().index;
            ran.lock().unwrap().push(item);
            if item == 2 && dies.load(Ordering::SeqCst) {
                std::future::pending::<()>().await;
            }
            done()
        }
        .boxed()
    });
    let world =
        World::new(&[file], Script::default().with_async("work", Effect::Pure, work), json!({}));
    assert!(world.go().now_or_never().is_none());
    assert_eq!(world.store.early_writes(), 3);
    dies.store(false, Ordering::SeqCst);
    assert_eq!(world.output().await, json!({ "log": [0, 1, 2, 3] }));
    assert_eq!(*ran.lock().unwrap(), [0, 1, 2, 3, 2]);
}

#[tokio::test]
async fn results_of_siblings_are_stored_when_one_fails_the_run() {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": { "each": { "for_each": "${[0, 1, 2]}", "use": "work", "set": { "log": ["${item}"] } } },
        "edges": ["start -> each -> end"],
    });
    let (ran, broken) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(true)));
    let (counted, breaks) = (Arc::clone(&ran), Arc::clone(&broken));
    let script = Script::default().with("work", Effect::Pure, move |activation| {
        counted.fetch_add(1, Ordering::SeqCst);
        let last = activation.task.item.as_ref().unwrap().index == 2;
        if last && breaks.load(Ordering::SeqCst) {
            Err(NodeError::fatal("broken", "now"))
        } else {
            done()
        }
    });
    let mut world = World::new(&[file], script, json!({}));
    assert_eq!(world.failure().await.kind, "broken");
    broken.store(false, Ordering::SeqCst);
    world.another_run();
    assert_eq!(world.output().await, json!({ "log": [0, 1, 2] }));
    assert_eq!(ran.load(Ordering::SeqCst), 4, "only what failed ran again");
}

#[tokio::test]
async fn a_drain_stops_between_supersteps_and_starts_no_more_items() {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": { "each": { "for_each": "${[0, 1, 2, 3, 4]}", "max_parallel": 1, "use": "work", "set": { "log": ["${item}"] } },
                   "next": { "set": { "log": ["next"] } } },
        "edges": ["start -> each -> next -> end"],
    });
    let drain = Arc::new(AtomicBool::new(false));
    let draining = Arc::clone(&drain);
    let script = Script::default().with("work", Effect::Pure, move |activation| {
        if activation.task.item.as_ref().unwrap().index == 1 {
            draining.store(true, Ordering::SeqCst);
        }
        done()
    });
    let mut world = World::new(&[file], script, json!({}));
    world.drain = Arc::clone(&drain);
    assert!(matches!(world.go().await, Exit::Released));
    assert_eq!(world.store.early_writes(), 2);
    assert!(matches!(world.go().await, Exit::Released), "told again at once");
    world.drain = Arc::default();
    assert_eq!(world.output().await, json!({ "log": [0, 1, 2, 3, 4, "next"] }));
}

#[tokio::test]
async fn a_drain_inside_a_subgraph_releases_the_run() {
    let inner = json!({
        "name": "inner", "state": { "log": log() }, "output": ["log"],
        "nodes": { "a": { "use": "work", "set": { "log": ["a"] } }, "b": { "set": { "log": ["b"] } } },
        "edges": ["start -> a -> b -> end"],
    });
    let outer = json!({
        "name": "outer", "state": { "log": log() },
        "nodes": { "call": { "graph": "inner", "set": { "log": "${output.log}" } } },
        "edges": ["start -> call -> end"],
    });
    let drain = Arc::new(AtomicBool::new(false));
    let draining = Arc::clone(&drain);
    let script = Script::default().with("work", Effect::Pure, move |_| {
        draining.store(true, Ordering::SeqCst);
        done()
    });
    let mut world = World::new(&[inner, outer], script, json!({}));
    world.drain = drain;
    let exit = world.go().await;
    assert!(matches!(exit, Exit::Released), "{exit:?}");
    world.drain = Arc::default();
    assert_eq!(world.output().await, json!({ "log": ["a", "b"] }));
}

#[tokio::test]
async fn nothing_is_left_waiting_when_a_run_has_gone_past_it() {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": { "act": { "use": "act" }, "wait": { "wait": { "event": "go" } } },
        "edges": ["start -> act -> wait -> end"],
    });
    let script = Script::default().with("act", Effect::Effectful, |_| done());
    let world = World::new(&[file], script, json!({}));
    assert_eq!(world.waiting().await.outstanding, 1);
    let open = world.store.open();
    assert_eq!(
        open.iter().map(|open| open.node.as_str()).collect::<Vec<_>>(),
        ["wait"],
        "the attempt's row is settled"
    );
}

#[tokio::test]
async fn a_process_that_lost_the_run_stores_nothing() {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": { "a": { "use": "steal" }, "b": { "set": { "log": ["b"] } } },
        "edges": ["start -> a -> b -> end"],
    });
    let thief = Arc::new(Mutex::new(None::<MemoryStore>));
    let stealing = Arc::clone(&thief);
    let script = Script::default().with("steal", Effect::Pure, move |_| {
        if let Some(store) = stealing.lock().unwrap().take() {
            let _ = store.grant(0);
        }
        done()
    });
    let world = World::new(&[file], script, json!({}));
    *thief.lock().unwrap() = Some(world.store.clone());
    let lost = world.try_go().await;
    assert!(matches!(lost, Err(ExecError::Checkpoint(CheckpointError::Fenced))), "{lost:?}");
    assert_eq!(world.store.commits(), 0);
    assert_eq!(world.output().await, json!({ "log": ["b"] }));
}

#[tokio::test]
async fn the_state_is_changed_in_place() {
    let file = json!({
        "name": "g", "state": { "log": log() },
        "nodes": { "a": { "set": { "log": ["new"] } }, "b": { "set": { "log": ["new"] } } },
        "edges": ["start -> a -> b -> end"],
    });
    let world = World::new(&[file], Script::default(), json!({ "log": ["old"] }));
    let checkpointer = Arc::new(world.store.grant(0));
    let root = restore(&*checkpointer, "", &world.graph).await.unwrap().unwrap();
    let channel = world.graph.find_channel("log").unwrap();
    let first_item =
        |state: &State| state.get(channel).unwrap().json()[0].as_str().unwrap().as_ptr();
    let before = first_item(&root.state);
    let run = Run {
        run_id: world.run_id,
        thread_id: world.thread_id,
        fence: 1,
        generation: 0,
        cursor: Cursor::new(0, 0),
        ambient: ambient(),
        checkpointer,
        nodes: Arc::clone(&world.script) as Arc<dyn NodeSource>,
        options: Options::default(),
        drain: Arc::default(),
    };
    let Exit::Done(state) = run.advance(root).await.unwrap() else { panic!() };
    assert_eq!(state.output(&world.graph), json!({ "log": ["old", "new", "new"] }));
    assert_eq!(
        first_item(&state),
        before,
        "a copy of the list would have another text in its first place"
    );
}
