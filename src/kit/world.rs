//! The world that a case's graph acts on: it answers from the script, keeps book, and can stop.
//!
//! An answer belongs to an attempt, as in the world outside: asked again under the same idempotency key before
//! its outcome was stored, the world says the same again. After a crash the answers are those of the undisturbed
//! run, attempt by attempt.
//!
//! **Invariant:** once the world has stopped, nothing is stored and nothing is called until [`World::revive`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures::FutureExt;
use futures::future::BoxFuture;
use serde_json::Value;

use super::compare::{Difference, differences, shown};
use super::ledger::{Ledger, describe};
use super::script::{Asker, Call, EntryId, Said, Script};
use crate::graph::checkpoint::{CheckpointError, Checkpointer, Commit, LoadedRows, ValueRef};
use crate::graph::memory::MemoryStore;
use crate::ids::TaskId;

/// Which entries answered which attempts and questions.
pub(super) type Assigned = BTreeMap<String, Vec<EntryId>>;

/// Where the process dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CrashPoint {
    /// Which commit; the first is 1.
    pub(super) commit: usize,
    /// Whether that commit is stored.
    pub(super) stored: bool,
}

/// Something that was done to the world.
#[derive(Debug, Clone)]
pub(super) struct Performed {
    pub(super) key: String,
    pub(super) node: String,
    pub(super) target: String,
}

#[derive(Debug, Default)]
pub(super) struct Inner {
    pub(super) used: BTreeMap<EntryId, u32>,
    pub(super) assigned: Assigned,
    pub(super) performed: Vec<Performed>,
    pub(super) problems: Vec<Difference>,
    pub(super) ledger: Ledger,
    /// Results of jobs that were accepted, by attempt.
    pub(super) jobs: BTreeMap<String, Value>,
    /// How often questions were answered.
    asked: BTreeMap<String, usize>,
    stopped: bool,
    begun: usize,
    crash: Option<CrashPoint>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct World {
    pub(super) script: Arc<Script>,
    pub(super) store: MemoryStore,
    start: DateTime<Utc>,
    /// The answers of the undisturbed run.
    before: Option<Arc<Assigned>>,
    inner: Mutex<Inner>,
}

/// An attempt that calls.
pub(super) struct Caller<'a> {
    pub(super) key: &'a str,
    pub(super) task: TaskId,
    pub(super) namespace: &'a str,
    pub(super) planned: i64,
    /// Whether somebody has to be asked before an attempt of unknown outcome is sent again.
    pub(super) must_ask: bool,
}

impl World {
    pub(super) fn new(
        script: Arc<Script>,
        store: MemoryStore,
        crash: Option<CrashPoint>,
        before: Option<Arc<Assigned>>,
    ) -> Self {
        let start = store.now();
        let inner = Mutex::new(Inner { crash, ..Inner::default() });
        Self { script, store, start, before, inner }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long the run has taken.
    pub(super) fn elapsed(&self) -> Duration {
        (self.store.now() - self.start).to_std().unwrap_or_default()
    }

    /// Whether the process is dead.
    pub(super) fn stopped(&self) -> bool {
        self.lock().stopped
    }

    /// Another process begins; false when the world has stopped for good.
    pub(super) fn revive(&self) -> bool {
        let mut inner = self.lock();
        if !inner.problems.is_empty() {
            return false;
        }
        inner.stopped = false;
        inner.ledger.crashed();
        true
    }

    /// Something is wrong that makes going on useless.
    pub(super) fn fail(&self, text: String) {
        let mut inner = self.lock();
        inner.problems.push(Difference { at: text, expected: None, found: None });
        inner.stopped = true;
    }

    /// What the world says to a call; `None` when it has stopped.
    pub(super) fn call(&self, caller: &Caller<'_>, call: &Call<'_>) -> Option<Said> {
        if self.stopped() {
            return None;
        }
        let reported = self.script.reported(call.path);
        let target = call.target.unwrap_or_default();
        let what = format!("`{}` called {target} with {}", call.path, shown(call.request));
        let done = {
            let inner = self.lock();
            inner.ledger.done(caller.key, caller.task, caller.namespace, caller.planned)
        };
        if let Some(commit) = done {
            self.fail(format!("{what} again, though commit {commit} had stored the outcome"));
            return None;
        }
        if caller.must_ask && self.lock().ledger.in_flight.contains(caller.key) {
            self.fail(format!("{what} again, though nobody knows whether it had happened"));
            return None;
        }
        let ordinal = self.lock().ledger.called(caller.key);
        let id = self.assign(caller.key, ordinal, call, &what)?;
        let performed =
            Performed { key: caller.key.to_owned(), node: reported, target: target.to_owned() };
        self.lock().performed.push(performed);
        self.script.entry(&id).map(|entry| entry.said.clone())
    }

    /// What a person says to a question; `None` when nobody answers.
    pub(super) fn ask(&self, question: &str, path: &str, value: &Value) -> Option<Said> {
        let call = Call { path, asker: Asker::Person, target: None, item: None, request: value };
        let ordinal = self.lock().asked.get(question).copied().unwrap_or(0);
        let id = match &self.before {
            Some(before) => before.get(question)?.get(ordinal)?.clone(),
            None => {
                let id = self.script.find(&call, &self.lock().used)?;
                self.take(question, &call, &id);
                id
            }
        };
        self.lock().asked.insert(question.to_owned(), ordinal + 1);
        self.script.entry(&id).map(|entry| entry.said.clone())
    }

    fn assign(&self, key: &str, ordinal: usize, call: &Call<'_>, what: &str) -> Option<EntryId> {
        let known =
            |assigned: &Assigned| assigned.get(key).and_then(|ids| ids.get(ordinal)).cloned();
        if let Some(before) = &self.before {
            let id = known(before);
            if id.is_none() {
                self.fail(format!("{what}, which the undisturbed run does not"));
            }
            return id;
        }
        if let Some(id) = known(&self.lock().assigned) {
            return Some(id);
        }
        let found = self.script.find(call, &self.lock().used);
        let Some(id) = found else {
            let item = call.item.map(|item| format!(" for the item {}", shown(item)));
            self.fail(format!(
                "{what}{}, and no {} answer is left for that",
                item.unwrap_or_default(),
                call.asker.as_str()
            ));
            return None;
        };
        self.take(key, call, &id);
        Some(id)
    }

    /// Uses an entry up, and checks what it wants of the call.
    fn take(&self, key: &str, call: &Call<'_>, id: &EntryId) {
        let elapsed = self.elapsed();
        let mut inner = self.lock();
        *inner.used.entry(id.clone()).or_default() += 1;
        inner.assigned.entry(key.to_owned()).or_default().push(id.clone());
        let Some(entry) = self.script.entry(id) else { return };
        let place = format!("answers.{}[{}]", id.0, id.1);
        if let Some(asks) = &entry.asks {
            let at = format!("{place}.asks");
            inner.problems.extend(differences(&at, asks, call.request, true));
        }
        if let Some(name) = said_name(&entry.said)
            && Some(name) != call.target
        {
            let found = call.target.map(Value::from);
            inner.problems.push(Difference {
                at: format!("{place}.tool.name"),
                expected: Some(name.into()),
                found,
            });
        }
        if let Some(at) = entry.at.filter(|at| at.abs_diff(elapsed) > Duration::from_millis(1)) {
            inner.problems.push(Difference {
                at: format!("{place}.at"),
                expected: Some(humantime::format_duration(at).to_string().into()),
                found: Some(humantime::format_duration(elapsed).to_string().into()),
            });
        }
    }

    /// Whether a commit may be stored.
    fn begins(&self, commit: &Commit) -> bool {
        let mut inner = self.lock();
        if inner.stopped {
            return false;
        }
        inner.begun += 1;
        let at = inner.begun;
        let dies = inner.crash.is_some_and(|crash| crash.commit == at && !crash.stored);
        if dies {
            inner.stopped = true;
            inner.crash = None;
            tracing::trace!(commit = at, "the engine is dropped before {}", describe(commit));
        }
        !dies
    }

    /// Writes down what was stored; false when the process dies with it.
    fn ends(&self, commit: &Commit) -> bool {
        let wrong = {
            let mut inner = self.lock();
            let wrong = inner.ledger.stored(commit);
            let at = inner.begun;
            if inner.crash.is_some_and(|crash| crash.commit == at && crash.stored) {
                inner.stopped = true;
                inner.crash = None;
            }
            wrong
        };
        if let Some(wrong) = wrong {
            self.fail(wrong);
        }
        !self.stopped()
    }
}

fn said_name(said: &Said) -> Option<&str> {
    match said {
        Said::Tool { name, .. } => name.as_deref(),
        _ => None,
    }
}

/// A [`Checkpointer`] that the world watches.
pub(super) struct Stage {
    pub(super) inner: Arc<dyn Checkpointer>,
    pub(super) world: Arc<World>,
}

impl Checkpointer for Stage {
    fn load<'a>(
        &'a self,
        namespace: &'a str,
    ) -> BoxFuture<'a, Result<Option<LoadedRows>, CheckpointError>> {
        self.inner.load(namespace)
    }

    fn fetch<'a>(
        &'a self,
        namespace: &'a str,
        refs: Vec<ValueRef>,
    ) -> BoxFuture<'a, Result<std::collections::HashMap<ValueRef, Vec<u8>>, CheckpointError>> {
        self.inner.fetch(namespace, refs)
    }

    fn commit(&self, commit: Commit) -> BoxFuture<'_, Result<(), CheckpointError>> {
        async move {
            if !self.world.begins(&commit) {
                // A dead process stores nothing and hears nothing.
                std::future::pending::<()>().await;
            }
            let seen = commit.clone();
            self.inner.commit(commit).await?;
            if !self.world.ends(&seen) {
                std::future::pending::<()>().await;
            }
            Ok(())
        }
        .boxed()
    }
}
