//! A [`Checkpointer`] that keeps a thread in memory: for embedding the engine without a database, and for tests.
//!
//! It holds what the database's would hold, byte for byte, and passes the same conformance suite, so that a
//! graph that runs on one runs on the other. Its time stands still until [`MemoryStore::advance`] moves it.
//!
//! **Invariant:** nothing here outlives the process; whoever needs that wants the database.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures::FutureExt;
use futures::future::BoxFuture;
use serde_json::Value;

use super::checkpoint::{
    CheckpointError, CheckpointRow, Checkpointer, Commit, Due, EffectChange, EffectRow,
    EffectStatus, KEYFRAME_EVERY, LoadedRows, Restored, StoredRow, StoredWait, StreamRow, ValueRef,
    WaitKind, WaitRow,
};
use super::step::Position;
use crate::ids::TaskId;

/// The most events that wait to be waited for.
const MAX_EVENTS: usize = 10_000;

/// One thread in memory. Clones are the same thread.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    fence: i64,
    now: DateTime<Utc>,
    /// By namespace and branch, then by seq.
    rows: HashMap<(String, i32), BTreeMap<i64, StoredRow>>,
    values: HashMap<(String, ValueRef), Vec<u8>>,
    writes: HashMap<Key, Vec<u8>>,
    waits: BTreeMap<Key, MemoryWait>,
    events: VecDeque<(String, Vec<u8>)>,
    stream: BTreeMap<(i64, i32), StreamRow>,
    effects: BTreeMap<(TaskId, u32), MemoryEffect>,
    commits: u64,
}

/// Namespace, branch, seq, activation.
type Key = (String, i32, i64, uuid::Uuid);

#[derive(Debug)]
struct MemoryWait {
    node: String,
    kind: WaitKind,
    attempt: u32,
    round: i32,
    settled: bool,
    due: Option<DateTime<Utc>>,
    name: Option<String>,
    data: Option<Vec<u8>>,
    answer: Option<Vec<u8>>,
}

/// What is stored of an effect on the world.
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryEffect {
    /// The activation.
    pub task: TaskId,
    /// Which attempt of it.
    pub attempt: u32,
    /// `tool`, `model`, `use`.
    pub kind: &'static str,
    /// What is called.
    pub target: String,
    /// What is sent.
    pub request: Value,
    /// What is known of it.
    pub status: EffectStatus,
    /// What came of it.
    pub outcome: Value,
    /// How often it was about to be sent.
    pub sends: u32,
}

/// An activation that waits.
#[derive(Debug, Clone, PartialEq)]
pub struct OpenWait {
    /// The activation.
    pub task: TaskId,
    /// Its namespace, empty for the root.
    pub namespace: String,
    /// Its node's name.
    pub node: String,
    /// What it waits for.
    pub kind: WaitKind,
    /// Which attempt it is.
    pub attempt: u32,
    /// When the wait is over by itself.
    pub due: Option<DateTime<Utc>>,
    /// JSON of the wait: a question with its `id`, say.
    pub data: Value,
}

/// Authority over a [`MemoryStore`]: it ends with the next grant.
#[derive(Debug, Clone)]
pub struct MemoryCheckpointer {
    store: MemoryStore,
    fence: i64,
    branch: i32,
}

impl MemoryStore {
    /// An empty thread at the beginning of time.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes authority over a branch of the thread; all earlier grants end.
    #[must_use]
    pub fn grant(&self, branch: i32) -> MemoryCheckpointer {
        let mut inner = self.lock();
        inner.fence += 1;
        MemoryCheckpointer { store: self.clone(), fence: inner.fence, branch }
    }

    /// Stores a root checkpoint from outside a run: an input, an update, a fork. What waited on the state
    /// before waits no longer.
    pub fn insert(&self, row: CheckpointRow) {
        let mut inner = self.lock();
        inner.waits.values_mut().for_each(|wait| wait.settled = true);
        inner.store("", row);
    }

    /// The effects on the world, by activation and attempt.
    #[must_use]
    pub fn effects(&self) -> Vec<MemoryEffect> {
        self.lock().effects.values().cloned().collect()
    }

    /// The time now.
    #[must_use]
    pub fn now(&self) -> DateTime<Utc> {
        self.lock().now
    }

    /// Lets time pass.
    pub fn advance(&self, by: Duration) {
        let mut inner = self.lock();
        let by = chrono::Duration::from_std(by).unwrap_or(chrono::Duration::MAX);
        inner.now = inner.now.checked_add_signed(by).unwrap_or(DateTime::<Utc>::MAX_UTC);
    }

    /// What waits now, in a stable order.
    #[must_use]
    pub fn open(&self) -> Vec<OpenWait> {
        let inner = self.lock();
        let open = inner.waits.iter().filter(|(_, wait)| !wait.settled);
        open.map(|((namespace, _, _, task), wait)| OpenWait {
            task: TaskId(*task),
            namespace: namespace.clone(),
            node: wait.node.clone(),
            kind: wait.kind,
            attempt: wait.attempt,
            due: wait.due,
            data: json_of(wait.data.as_deref()),
        })
        .collect()
    }

    /// Ends an activation's wait with `answer`; false when it does not wait.
    pub fn settle(&self, task: TaskId, answer: &Value) -> bool {
        let mut inner = self.lock();
        let wait = inner.waits.iter_mut().find(|((.., id), wait)| *id == task.0 && !wait.settled);
        wait.is_some_and(|(_, wait)| {
            wait.answer = Some(answer.to_string().into_bytes());
            wait.settled = true;
            true
        })
    }

    /// Answers the question with this id; false when nobody asks it.
    pub fn answer(&self, question: &str, answer: &Value) -> bool {
        let mut inner = self.lock();
        let wait = inner.waits.values_mut().find(|wait| {
            let asks = wait.kind == WaitKind::Interrupt && !wait.settled;
            asks && json_of(wait.data.as_deref()).get("id").and_then(Value::as_str)
                == Some(question)
        });
        wait.is_some_and(|wait| {
            let mut answers = match json_of(wait.answer.as_deref()) {
                Value::Array(answers) => answers,
                _ => Vec::new(),
            };
            answers.push(answer.clone());
            wait.answer = Some(Value::Array(answers).to_string().into_bytes());
            wait.settled = true;
            true
        })
    }

    /// Sends a named event: to an activation that waits for it, or to the next that will. False: too many wait.
    pub fn send_event(&self, name: &str, payload: &Value) -> bool {
        let inner = &mut *self.lock();
        let payload = payload.to_string().into_bytes();
        let waiting = inner.waits.values_mut().find(|wait| {
            wait.kind == WaitKind::Event && !wait.settled && wait.name.as_deref() == Some(name)
        });
        match waiting {
            Some(wait) => {
                wait.answer = Some(payload);
                wait.settled = true;
            }
            None if inner.events.len() >= MAX_EVENTS => return false,
            None => inner.events.push_back((name.to_owned(), payload)),
        }
        true
    }

    /// Rows for streams, in order.
    #[must_use]
    pub fn stream(&self) -> Vec<StreamRow> {
        self.lock().stream.values().cloned().collect()
    }

    /// How many commits there were.
    #[must_use]
    pub fn commits(&self) -> u64 {
        self.lock().commits
    }

    /// How many results of activations were stored before their superstep was complete.
    #[must_use]
    pub fn early_writes(&self) -> usize {
        self.lock().writes.len()
    }
}

fn json_of(bytes: Option<&[u8]>) -> Value {
    bytes.and_then(|bytes| serde_json::from_slice(bytes).ok()).unwrap_or(Value::Null)
}

impl Inner {
    fn last(&self, namespace: &str, branch: i32) -> Option<i64> {
        let rows = self.rows.get(&(namespace.to_owned(), branch))?;
        rows.last_key_value().map(|(seq, _)| *seq)
    }

    /// A row that is there already stays as it is.
    fn store(&mut self, namespace: &str, row: CheckpointRow) {
        let CheckpointRow { position, next, changed, keyframe, values, .. } = row;
        let rows = self.rows.entry((namespace.to_owned(), position.branch)).or_default();
        rows.entry(position.seq).or_insert(StoredRow { position, next, changed, keyframe });
        for (channel, value) in values {
            let key = (namespace.to_owned(), ValueRef { channel, at: position });
            self.values.entry(key).or_insert(value);
        }
    }

    fn apply(&mut self, commit: Commit) {
        self.commits += 1;
        // How a run ends is up to whoever plays the driver.
        let Commit {
            namespace,
            planned,
            checkpoint,
            writes,
            waits,
            settles,
            stream,
            effects,
            end: _,
        } = commit;
        let key = |task: TaskId| (namespace.clone(), planned.branch, planned.seq, task.0);
        for (task, result) in writes {
            self.writes.entry(key(task)).or_insert(result);
            if let Some(wait) = self.waits.get_mut(&key(task)) {
                wait.settled = true;
            }
        }
        for wait in waits {
            self.wait(key(wait.task), wait);
        }
        for row in stream {
            self.stream.entry((row.seq, row.place)).or_insert(row);
        }
        for row in effects {
            self.effect(row);
        }
        if let Some(row) = checkpoint {
            if settles {
                self.settle_all(&namespace, planned);
            }
            self.store(&namespace, row);
        }
    }

    fn effect(&mut self, row: EffectRow) {
        let key = (row.task, row.attempt);
        match row.change {
            EffectChange::Intent { kind, target, request, .. } => {
                let request = serde_json::from_slice(&request).unwrap_or_default();
                let known = self.effects.entry(key).or_insert_with(|| MemoryEffect {
                    task: row.task,
                    attempt: row.attempt,
                    kind,
                    target,
                    request,
                    status: EffectStatus::Intent,
                    outcome: Value::Null,
                    sends: 0,
                });
                known.status = EffectStatus::Intent;
                known.sends += 1;
            }
            EffectChange::Outcome { status, outcome } => {
                if let Some(known) = self.effects.get_mut(&key) {
                    known.status = status;
                    known.outcome = serde_json::from_slice(&outcome).unwrap_or_default();
                }
            }
        }
    }

    fn settle_all(&mut self, namespace: &str, planned: Position) {
        let below = if namespace.is_empty() { String::new() } else { format!("{namespace}|") };
        for ((path, branch, seq, _), wait) in &mut self.waits {
            let same = path == namespace && *seq == planned.seq;
            if *branch == planned.branch
                && (same || (path != namespace && path.starts_with(&below)))
            {
                wait.settled = true;
            }
        }
    }

    fn wait(&mut self, key: Key, row: WaitRow) {
        if self.waits.get(&key).is_some_and(|known| known.round >= row.round) {
            return;
        }
        let due = row.due.and_then(|due| match due {
            Due::After(after) => {
                self.now.checked_add_signed(chrono::Duration::from_std(after).ok()?)
            }
            Due::At(at) => Some(at),
        });
        let arrived = match row.kind {
            WaitKind::Event => {
                self.events.iter().position(|(name, _)| Some(name) == row.name.as_ref())
            }
            _ => None,
        };
        let arrived = arrived.and_then(|at| self.events.remove(at)).map(|(_, payload)| payload);
        let wait = MemoryWait {
            node: row.node,
            kind: row.kind,
            attempt: row.attempt,
            round: row.round,
            settled: arrived.is_some(),
            due,
            name: row.name,
            data: row.data,
            answer: arrived.or(row.answer),
        };
        self.waits.insert(key, wait);
    }

    fn tasks(&self, namespace: &str, at: Position) -> HashMap<TaskId, Restored> {
        let mut tasks: HashMap<TaskId, Restored> = HashMap::new();
        let here = |key: &Key| key.0 == namespace && key.1 == at.branch && key.2 == at.seq;
        for (key, result) in self.writes.iter().filter(|(key, _)| here(key)) {
            tasks.entry(TaskId(key.3)).or_default().writes = Some(result.clone());
        }
        for (key, wait) in self.waits.iter().filter(|(key, _)| here(key)) {
            tasks.entry(TaskId(key.3)).or_default().wait = Some(StoredWait {
                kind: wait.kind,
                attempt: wait.attempt,
                settled: wait.settled,
                expired: wait.due.is_some_and(|due| due <= self.now),
                data: wait.data.clone(),
                answer: wait.answer.clone(),
                round: wait.round,
            });
        }
        tasks
    }
}

impl Checkpointer for MemoryCheckpointer {
    fn load<'a>(
        &'a self,
        namespace: &'a str,
    ) -> BoxFuture<'a, Result<Option<LoadedRows>, CheckpointError>> {
        async move {
            let inner = self.store.lock();
            let Some(last) = inner.last(namespace, self.branch) else { return Ok(None) };
            let rows = &inner.rows[&(namespace.to_owned(), self.branch)];
            let rows =
                rows.range(last - last % KEYFRAME_EVERY..).map(|(_, row)| row.clone()).collect();
            let tasks = inner.tasks(namespace, Position { branch: self.branch, seq: last });
            Ok(Some(LoadedRows { rows, tasks }))
        }
        .boxed()
    }

    fn fetch<'a>(
        &'a self,
        namespace: &'a str,
        refs: Vec<ValueRef>,
    ) -> BoxFuture<'a, Result<HashMap<ValueRef, Vec<u8>>, CheckpointError>> {
        async move {
            let inner = self.store.lock();
            let find = |value: ValueRef| {
                let key = (namespace.to_owned(), value);
                inner.values.get(&key).cloned().map(|bytes| (key.1, bytes))
            };
            Ok(refs.into_iter().filter_map(find).collect())
        }
        .boxed()
    }

    fn commit(&self, commit: Commit) -> BoxFuture<'_, Result<(), CheckpointError>> {
        async move {
            let mut inner = self.store.lock();
            if inner.fence != self.fence {
                return Err(CheckpointError::Fenced);
            }
            if let Some(row) = commit.checkpoint.as_ref().filter(|_| commit.namespace.is_empty()) {
                let head = inner.last("", self.branch);
                if head.is_some_and(|head| row.position.seq <= head) {
                    // This grant has stored it before: nobody else can have.
                    return Ok(());
                }
                if head.is_some_and(|head| row.position.seq != head + 1) {
                    return Err(CheckpointError::Fenced);
                }
            }
            inner.apply(commit);
            Ok(())
        }
        .boxed()
    }
}
