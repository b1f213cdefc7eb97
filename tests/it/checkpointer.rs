//! What every checkpointer has to do, done to each of them: the one in memory and the one in PostgreSQL.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64};
use std::time::Duration;

use cynai::graph::channel::{State, Write};
use cynai::graph::checkpoint::{
    CheckpointError, CheckpointRow, Checkpointer, Commit, Due, Homes, Restored, Source, ValueRef,
    WaitKind, WaitRow, encode,
};
use cynai::graph::exec::restore;
use cynai::graph::memory::MemoryStore;
use cynai::graph::model::Graph;
use cynai::graph::step::Position;
use cynai::ids::{InstanceId, RunId, TaskId, ThreadId, UserId};
use cynai::store::checkpointer::{Authority, RunCheckpointer, Shown};
use cynai::store::commit::Committer;
use cynai::store::signals::Signals;
use cynai::store::{checkpoints, queue};
use futures::FutureExt;
use futures::future::BoxFuture;
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

use crate::support::compiled;

/// A store with one thread, and what happens to it from outside.
trait Backend {
    /// Takes authority over the thread; earlier grants end.
    fn grant(&self) -> BoxFuture<'_, Arc<dyn Checkpointer>>;
    /// Settles an activation's wait; false when it does not wait.
    fn settle(&self, task: TaskId, answer: Value) -> BoxFuture<'_, bool>;
    fn send_event(&self, name: &'static str, payload: Value) -> BoxFuture<'_, ()>;
    /// Lets time pass, as far as waits see it.
    fn pass(&self, time: Duration) -> BoxFuture<'_, ()>;
}

impl Backend for MemoryStore {
    fn grant(&self) -> BoxFuture<'_, Arc<dyn Checkpointer>> {
        let grant: Arc<dyn Checkpointer> = Arc::new(MemoryStore::grant(self, 0));
        async move { grant }.boxed()
    }

    fn settle(&self, task: TaskId, answer: Value) -> BoxFuture<'_, bool> {
        async move { MemoryStore::settle(self, task, &answer) }.boxed()
    }

    fn send_event(&self, name: &'static str, payload: Value) -> BoxFuture<'_, ()> {
        async move { assert!(MemoryStore::send_event(self, name, &payload)) }.boxed()
    }

    fn pass(&self, time: Duration) -> BoxFuture<'_, ()> {
        async move { self.advance(time) }.boxed()
    }
}

struct Database {
    pool: PgPool,
    committer: Committer,
    thread: ThreadId,
    run: RunId,
}

impl Database {
    async fn new(pool: PgPool) -> Self {
        let (user, thread, run) = (UserId::new(), ThreadId::new(), RunId::new());
        let statements = [
            "insert into users (user_id, name, created_at) values ($1, 'test', now())",
            "insert into threads (thread_id, user_id, status, active_run, created_at, updated_at, state_updated_at)
             values ($2, $1, 'busy', $3, now(), now(), now())",
            "insert into runs (run_id, thread_id, user_id, assistant_id, graph_hash, options, created_at, updated_at)
             values ($3, $2, $1, $3, '', '{}', now(), now())",
            "insert into heads (run_id, thread_id, status) values ($3, $2, 'queued')",
        ];
        for sql in statements {
            // All parameters are named, so that each statement takes the same three.
            let sql = format!("with p as (select $1::uuid, $2::uuid, $3::uuid) {sql}");
            let query =
                sqlx::query(sqlx::AssertSqlSafe(sql)).bind(user.0).bind(thread.0).bind(run.0);
            query.execute(&pool).await.unwrap();
        }
        Self { committer: Committer::new(pool.clone()), pool, thread, run }
    }
}

impl Backend for Database {
    fn grant(&self) -> BoxFuture<'_, Arc<dyn Checkpointer>> {
        async move {
            let (fence, root_seq): (i64, i64) = sqlx::query_as(
                "with t as (update threads set fence = fence + 1 where thread_id = $1 returning fence)
                 update heads set status = 'running', instance_id = $3, epoch = 1, fence = t.fence,
                        seq = coalesce((select max(seq) from checkpoints where thread_id = $1 and namespace = ''), -1)
                   from t where run_id = $2 returning heads.fence, heads.seq",
            )
            .bind(self.thread.0)
            .bind(self.run.0)
            .bind(InstanceId::new().0)
            .fetch_one(&self.pool)
            .await
            .unwrap();
            let grant: Arc<dyn Checkpointer> = Arc::new(RunCheckpointer {
                pool: self.pool.clone(),
                committer: self.committer.clone(),
                signals: Arc::new(Signals::default()),
                run_id: self.run,
                thread_id: self.thread,
                fence,
                authority: Authority::default(),
                branch: 0,
                root_seq: AtomicI64::new(root_seq),
                streamed: false,
                shown: Shown::default(),
                ended: AtomicBool::new(false),
            });
            grant
        }
        .boxed()
    }

    fn settle(&self, task: TaskId, answer: Value) -> BoxFuture<'_, bool> {
        async move {
            let mut tx = self.pool.begin().await.unwrap();
            let settled = queue::settle(&mut tx, self.run, task, answer.to_string().as_bytes())
                .await
                .unwrap();
            tx.commit().await.unwrap();
            settled
        }
        .boxed()
    }

    fn send_event(&self, name: &'static str, payload: Value) -> BoxFuture<'_, ()> {
        async move {
            let mut tx = self.pool.begin().await.unwrap();
            let payload = payload.to_string();
            queue::send_event(&mut tx, self.thread, Some(self.run), name, payload.as_bytes())
                .await
                .unwrap();
            tx.commit().await.unwrap();
        }
        .boxed()
    }

    fn pass(&self, time: Duration) -> BoxFuture<'_, ()> {
        async move {
            let query = sqlx::query("update pending set due = due - make_interval(secs => $1)");
            query.bind(time.as_secs_f64()).execute(&self.pool).await.unwrap();
        }
        .boxed()
    }
}

macro_rules! conformance {
    ($($name:ident),+ $(,)?) => {
        mod in_memory {
            $(#[tokio::test]
            async fn $name() {
                super::$name(&super::MemoryStore::new()).await;
            })+
        }

        mod in_postgres {
            $(#[sqlx::test]
            async fn $name(pool: sqlx::PgPool) {
                super::$name(&super::Database::new(pool).await).await;
            })+
        }
    };
}

conformance!(
    nothing_is_found_where_nothing_was_stored,
    rows_come_back_from_the_last_keyframe_on,
    an_older_grant_stores_nothing,
    a_repeated_commit_changes_nothing,
    the_first_result_of_an_activation_stays,
    large_values_and_odd_characters_come_back,
    long_lists_come_back_whole_and_are_stored_once,
    a_wait_is_over_by_its_time_its_answer_or_its_result,
    a_repeated_wait_does_not_undo_its_answer,
    a_later_wait_takes_the_place_of_an_earlier_one,
    a_finished_superstep_settles_its_waits_and_those_below,
    events_go_to_whoever_waits_in_their_order,
    namespaces_do_not_see_each_other,
);

fn at(seq: i64) -> Position {
    Position { branch: 0, seq }
}

fn task(number: u128) -> TaskId {
    TaskId(Uuid::from_u128(number))
}

fn row(seq: i64, changed: &Value) -> CheckpointRow {
    CheckpointRow {
        position: at(seq),
        parent: None,
        source: Source::Loop,
        next: format!("node{seq}"),
        changed: changed.to_string().into_bytes(),
        keyframe: (seq % 64 == 0).then(|| b"{}".to_vec()),
        values: Vec::new(),
    }
}

/// A commit that holds nothing yet, of the superstep that the checkpoint `planned` planned.
fn commit(namespace: &str, planned: i64) -> Commit {
    Commit {
        namespace: namespace.to_owned(),
        planned: at(planned),
        checkpoint: None,
        writes: Vec::new(),
        waits: Vec::new(),
        settles: false,
        stream: Vec::new(),
        effects: Vec::new(),
        end: None,
    }
}

fn checkpoint(namespace: &str, seq: i64) -> Commit {
    Commit { checkpoint: Some(row(seq, &json!({ "seq": seq }))), ..commit(namespace, seq - 1) }
}

fn wait(number: u128, kind: WaitKind, round: i32) -> WaitRow {
    WaitRow {
        task: task(number),
        node: "node".to_owned(),
        kind,
        attempt: 1,
        due: None,
        name: None,
        data: None,
        answer: None,
        round,
    }
}

fn event(number: u128, name: &str) -> WaitRow {
    WaitRow { name: Some(name.to_owned()), ..wait(number, WaitKind::Event, 1) }
}

fn waits(waits: Vec<WaitRow>) -> Commit {
    Commit { waits, ..commit("", 0) }
}

async fn tasks(store: &dyn Checkpointer, namespace: &str) -> HashMap<TaskId, Restored> {
    store.load(namespace).await.unwrap().unwrap().tasks
}

async fn answer_of(store: &dyn Checkpointer, number: u128) -> Option<Value> {
    let wait = tasks(store, "").await.remove(&task(number)).unwrap().wait.unwrap();
    wait.answer.map(|bytes| serde_json::from_slice(&bytes).unwrap())
}

async fn begun(backend: &dyn Backend) -> Arc<dyn Checkpointer> {
    let store = backend.grant().await;
    store.commit(checkpoint("", 0)).await.unwrap();
    store
}

async fn nothing_is_found_where_nothing_was_stored(backend: &dyn Backend) {
    let store = begun(backend).await;
    assert!(store.load("none").await.unwrap().is_none());
    let unknown = ValueRef { channel: "x".to_owned(), at: at(0) };
    assert!(store.fetch("", vec![unknown]).await.unwrap().is_empty());
    assert!(tasks(&*store, "").await.is_empty());
}

async fn rows_come_back_from_the_last_keyframe_on(backend: &dyn Backend) {
    let store = backend.grant().await;
    for seq in 0..131 {
        store.commit(checkpoint("", seq)).await.unwrap();
    }
    let rows = store.load("").await.unwrap().unwrap().rows;
    assert_eq!(
        rows.iter().map(|row| row.position).collect::<Vec<_>>(),
        [at(128), at(129), at(130)]
    );
    assert_eq!(
        rows.iter().map(|row| row.keyframe.is_some()).collect::<Vec<_>>(),
        [true, false, false]
    );
    assert_eq!(
        (rows[2].next.as_str(), rows[2].changed.as_slice()),
        ("node130", br#"{"seq":130}"#.as_slice())
    );
}

async fn an_older_grant_stores_nothing(backend: &dyn Backend) {
    let old = begun(backend).await;
    let new = backend.grant().await;
    let all = Commit {
        writes: vec![(task(1), b"{}".to_vec())],
        waits: vec![wait(2, WaitKind::Timer, 1)],
        ..checkpoint("", 1)
    };
    for refused in [all, checkpoint("sub", 0), waits(vec![wait(3, WaitKind::Timer, 1)])] {
        let result = old.commit(refused).await;
        assert!(matches!(result, Err(CheckpointError::Fenced)), "{result:?}");
    }
    let found = new.load("").await.unwrap().unwrap();
    assert_eq!((found.rows.len(), found.tasks.len()), (1, 0));
    assert!(new.load("sub").await.unwrap().is_none());
    new.commit(checkpoint("", 1)).await.unwrap();
}

async fn a_repeated_commit_changes_nothing(backend: &dyn Backend) {
    let store = begun(backend).await;
    let early = Commit { writes: vec![(task(1), b"{\"w\":[]}".to_vec())], ..commit("", 0) };
    let different =
        Commit { checkpoint: Some(row(0, &json!({ "other": true }))), ..commit("sub", 0) };
    for commit in [early, checkpoint("sub", 0), different, checkpoint("", 1), checkpoint("", 1)] {
        store.commit(commit.clone()).await.unwrap();
        store.commit(commit).await.unwrap();
    }
    let root = store.load("").await.unwrap().unwrap();
    assert_eq!(root.rows.iter().map(|row| row.position).collect::<Vec<_>>(), [at(0), at(1)]);
    let sub = store.load("sub").await.unwrap().unwrap();
    assert_eq!(sub.rows[0].changed, br#"{"seq":0}"#, "a subgraph's row that is there stays");
}

async fn the_first_result_of_an_activation_stays(backend: &dyn Backend) {
    let store = begun(backend).await;
    for result in ["1", "2"] {
        store
            .commit(Commit { writes: vec![(task(1), result.into())], ..commit("", 0) })
            .await
            .unwrap();
    }
    assert_eq!(tasks(&*store, "").await[&task(1)].writes.as_deref(), Some(b"1".as_slice()));
    store.commit(checkpoint("", 1)).await.unwrap();
    assert!(
        tasks(&*store, "").await.is_empty(),
        "results belong to the superstep of their checkpoint"
    );
}

async fn large_values_and_odd_characters_come_back(backend: &dyn Backend) {
    let store = begun(backend).await;
    let big =
        json!(format!("a\u{0}b\u{7f}ü\u{1F980}{}", "x".repeat(3 << 20))).to_string().into_bytes();
    let mut one = checkpoint("", 1);
    let row = one.checkpoint.as_mut().unwrap();
    row.changed = json!({ "small": "\u{0}", "@big": null }).to_string().into_bytes();
    row.values = vec![("big".to_owned(), big.clone())];
    store.commit(one).await.unwrap();
    let fetch = |channel: &str, seq| vec![ValueRef { channel: channel.to_owned(), at: at(seq) }];
    let found = store.fetch("", fetch("big", 1)).await.unwrap();
    assert_eq!(found[&fetch("big", 1)[0]], big);
    assert!(store.fetch("", fetch("big", 0)).await.unwrap().is_empty());
    let rows = store.load("").await.unwrap().unwrap().rows;
    let changed: Value = serde_json::from_slice(&rows[1].changed).unwrap();
    assert_eq!(changed["small"], "\u{0}");
}

fn collecting() -> Arc<Graph> {
    compiled(
        &json!({
            "name": "collecting",
            "state": { "list": { "type": "array", "reduce": "append" }, "blob": {}, "n": { "type": "integer" } },
            "nodes": { "a": { "set": { "n": 1 } } },
            "edges": ["start -> a -> end"],
        }),
        &[],
    )
}

async fn long_lists_come_back_whole_and_are_stored_once(backend: &dyn Backend) {
    let graph = collecting();
    let channel = |name: &str| graph.find_channel(name).unwrap();
    let mut store = backend.grant().await;
    let (mut state, mut homes) = (State::initial(&graph), Homes::initial(&graph));
    let mut bytes = 0;
    for seq in 0..200_i64 {
        let items: Vec<Value> = (0..10)
            .map(|item| json!({ "seq": seq, "item": item, "pad": "x".repeat(20) }))
            .collect();
        let mut updates = vec![("list", json!(items)), ("n", json!(seq))];
        if seq == 3 {
            updates.push(("blob", json!("b".repeat(100_000))));
        }
        let writes = updates
            .into_iter()
            .map(|(name, value)| Write::new(&graph, channel(name), value).unwrap());
        let changes = state.apply(&graph, writes.collect()).unwrap();
        let row =
            encode(&graph, &state, &mut homes, at(seq), Source::Loop, &changes, false, &[], false);
        bytes += row.changed.len() + row.keyframe.as_ref().map_or(0, Vec::len);
        bytes += row.values.iter().map(|(_, value)| value.len()).sum::<usize>();
        store.commit(Commit { checkpoint: Some(row), ..commit("", seq - 1) }).await.unwrap();
        if seq % 37 == 0 {
            // Another process takes over, and goes on from what is stored.
            store = backend.grant().await;
            let found = restore(&*store, "", &graph).await.unwrap().unwrap();
            assert_eq!(
                (found.state.to_json(&graph), found.position),
                (state.to_json(&graph), at(seq))
            );
            (state, homes) = (Arc::unwrap_or_clone(found.state), found.homes);
        }
    }
    let found = restore(&*store, "", &graph).await.unwrap().unwrap();
    assert_eq!(found.state.len(channel("list")), 2000);
    assert_eq!(found.state.to_json(&graph), state.to_json(&graph));
    let whole = state.to_json(&graph).to_string().len();
    assert!(bytes < 4 * whole, "{bytes} bytes were written for a state of {whole}");
}

async fn a_wait_is_over_by_its_time_its_answer_or_its_result(backend: &dyn Backend) {
    let store = begun(backend).await;
    let due = Some(Due::After(Duration::from_secs(60)));
    let timer = |number| WaitRow { due, ..wait(number, WaitKind::Timer, 1) };
    store.commit(waits(vec![timer(1), timer(2), timer(3)])).await.unwrap();
    assert!(backend.settle(task(2), json!({ "done": true })).await);
    assert!(!backend.settle(task(2), json!("again")).await);
    assert!(!backend.settle(task(9), json!("nobody")).await);
    store
        .commit(Commit { writes: vec![(task(3), b"{}".to_vec())], ..commit("", 0) })
        .await
        .unwrap();
    let state = |found: &HashMap<TaskId, Restored>, number| {
        let wait = found[&task(number)].wait.clone().unwrap();
        (wait.expired, wait.settled)
    };
    let found = tasks(&*store, "").await;
    assert_eq!(
        [1, 2, 3].map(|number| state(&found, number)),
        [(false, false), (false, true), (false, true)]
    );
    assert_eq!(answer_of(&*store, 2).await, Some(json!({ "done": true })));
    backend.pass(Duration::from_secs(61)).await;
    assert_eq!(state(&tasks(&*store, "").await, 1), (true, false));
}

async fn a_repeated_wait_does_not_undo_its_answer(backend: &dyn Backend) {
    let store = begun(backend).await;
    let commit = waits(vec![event(1, "go"), wait(2, WaitKind::Interrupt, 1)]);
    store.commit(commit.clone()).await.unwrap();
    backend.send_event("go", json!(1)).await;
    assert!(backend.settle(task(2), json!(["yes"])).await);
    backend.send_event("go", json!(2)).await;
    // As after a commit whose answer was lost.
    store.commit(commit).await.unwrap();
    assert_eq!(answer_of(&*store, 1).await, Some(json!(1)));
    assert_eq!(answer_of(&*store, 2).await, Some(json!(["yes"])));
    // The second event is still there for who waits for it.
    store.commit(waits(vec![event(3, "go")])).await.unwrap();
    assert_eq!(answer_of(&*store, 3).await, Some(json!(2)));
}

async fn a_later_wait_takes_the_place_of_an_earlier_one(backend: &dyn Backend) {
    let store = begun(backend).await;
    store.commit(waits(vec![wait(1, WaitKind::Attempt, 1)])).await.unwrap();
    let data = Some(b"{\"why\":\"later\"}".to_vec());
    let later =
        WaitRow { attempt: 2, data, answer: Some(b"[1]".to_vec()), ..wait(1, WaitKind::Retry, 2) };
    store.commit(waits(vec![later])).await.unwrap();
    // Late, and out of order.
    store.commit(waits(vec![wait(1, WaitKind::Attempt, 1)])).await.unwrap();
    let found = tasks(&*store, "").await.remove(&task(1)).unwrap().wait.unwrap();
    assert_eq!((found.kind, found.attempt, found.round), (WaitKind::Retry, 2, 2));
    assert_eq!((found.settled, found.answer.as_deref()), (false, Some(b"[1]".as_slice())));
}

async fn a_finished_superstep_settles_its_waits_and_those_below(backend: &dyn Backend) {
    let store = begun(backend).await;
    for namespace in ["a", "a|b", "ab"] {
        let waits = vec![wait(1, WaitKind::Timer, 1)];
        store.commit(Commit { waits, ..checkpoint(namespace, 0) }).await.unwrap();
        let waits = vec![wait(2, WaitKind::Timer, 1)];
        store.commit(Commit { waits, ..commit(namespace, 0) }).await.unwrap();
    }
    let open = async |namespace: &str| {
        let found = store.load(namespace).await.unwrap().unwrap();
        found.tasks.values().filter(|task| !task.wait.as_ref().unwrap().settled).count()
    };
    let settling = |namespace, seq| Commit { settles: true, ..checkpoint(namespace, seq) };
    store.commit(settling("a", 1)).await.unwrap();
    assert_eq!((open("a|b").await, open("ab").await), (0, 1));
    store.commit(settling("", 1)).await.unwrap();
    assert_eq!(open("ab").await, 0);
}

async fn events_go_to_whoever_waits_in_their_order(backend: &dyn Backend) {
    let store = begun(backend).await;
    for number in [1, 2] {
        backend.send_event("before", json!(number)).await;
    }
    store
        .commit(waits(vec![
            event(1, "before"),
            event(2, "before"),
            event(3, "before"),
            event(4, "other"),
        ]))
        .await
        .unwrap();
    let mut got = Vec::new();
    for number in 1..=4 {
        got.push(answer_of(&*store, number).await);
    }
    let answered: Vec<Value> = got.iter().flatten().cloned().collect();
    assert_eq!((answered.len(), &got[3]), (2, &None), "{got:?}");
    assert!(answered.contains(&json!(1)) && answered.contains(&json!(2)));
    backend.send_event("before", json!(3)).await;
    backend.send_event("before", json!(4)).await;
    let mut got = Vec::new();
    for number in 1..=3 {
        got.extend(answer_of(&*store, number).await.and_then(|value| value.as_i64()));
    }
    got.sort_unstable();
    assert_eq!(got, [1, 2, 3], "each event once, and the fourth to nobody");
}

async fn namespaces_do_not_see_each_other(backend: &dyn Backend) {
    let store = begun(backend).await;
    let write = |namespace| Commit {
        writes: vec![(task(1), namespace_bytes(namespace))],
        ..commit(namespace, 0)
    };
    for namespace in ["x", "x|y"] {
        store.commit(checkpoint(namespace, 0)).await.unwrap();
        store.commit(write(namespace)).await.unwrap();
    }
    store.commit(checkpoint("x", 1)).await.unwrap();
    assert_eq!(store.load("x|y").await.unwrap().unwrap().rows.len(), 1);
    assert_eq!(tasks(&*store, "x|y").await[&task(1)].writes, Some(namespace_bytes("x|y")));
    assert!(tasks(&*store, "").await.is_empty());
    assert!(tasks(&*store, "x").await.is_empty());
}

fn namespace_bytes(namespace: &str) -> Vec<u8> {
    json!(namespace).to_string().into_bytes()
}

#[sqlx::test]
async fn the_rows_of_a_commit_are_as_others_read_them(pool: PgPool) {
    let database = Database::new(pool).await;
    begun(&database).await;
    let mut db = database.pool.acquire().await.unwrap();
    let page = checkpoints::page(&mut db, database.thread, "", None, 10).await.unwrap();
    assert_eq!(page.len(), 1);
    assert_eq!(
        (page[0].position, page[0].run_id, page[0].next.as_str()),
        (at(0), database.run, "node0")
    );
}
