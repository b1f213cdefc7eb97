//! Runs a case once: process after process on one store, until nothing can go on.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use uuid::Uuid;

use super::Case;
use super::cases::{EventDef, Status};
use super::compare::Difference;
use super::ledger::key_of;
use super::nodes::Stands;
use super::script::{Said, path_of};
use super::world::{Assigned, CrashPoint, Performed, Stage, World};
use crate::graph::checkpoint::{Checkpointer, WaitKind, decode_next};
use crate::graph::exec::{
    Cursor, ExecError, Exit, Options, Run, Waiting, chain, output_of, restore,
};
use crate::graph::input::{Order, Standing, begin};
use crate::graph::memory::{MemoryStore, OpenWait};
use crate::graph::model::ChannelIndex;
use crate::graph::step::{Ambient, Failure};
use crate::graph::value::Shared;
use crate::ids::{RunId, ThreadId};

/// How often a run may leave memory.
const MAX_PARKS: usize = 20_000;
/// Activations of one superstep under way at once, as on a server.
const MAX_PARALLEL: usize = 256;
/// The instant at which runs begin: 2026-01-01T00:00:00Z.
const BEGINS: i64 = 1_767_225_600;

/// Puts another checkpointer around the one of each process: where tests make a store lose something.
pub type Wrap = dyn Fn(Arc<dyn Checkpointer>) -> Arc<dyn Checkpointer> + Send + Sync;

/// How to run a case.
pub(super) struct Way<'a> {
    pub(super) crash: Option<CrashPoint>,
    pub(super) before: Option<Arc<Assigned>>,
    pub(super) wrap: Option<&'a Wrap>,
}

/// What came of it.
#[derive(Debug, Default)]
pub(super) struct Played {
    pub(super) status: Option<Status>,
    pub(super) failure: Option<Failure>,
    pub(super) output: Value,
    pub(super) state: Value,
    pub(super) questions: Vec<Value>,
    /// The nodes of each superstep of the graph itself.
    pub(super) path: Vec<Vec<String>>,
    pub(super) supersteps: BTreeMap<(String, i64), String>,
    pub(super) performed: Vec<Performed>,
    pub(super) assigned: Assigned,
    pub(super) commits: Vec<String>,
    pub(super) elapsed: Duration,
    /// What went wrong beside the graph.
    pub(super) problems: Vec<Difference>,
    /// Attempts of unknown outcome that were sent again because the case said so to nobody.
    pub(super) retried: usize,
    /// Attempts that the graph itself leaves unknown (`effects: fail`).
    pub(super) left_unknown: usize,
}

/// One run of a case under way.
struct Play<'a> {
    case: &'a Case,
    world: Arc<World>,
    ambient: Ambient,
    started: DateTime<Utc>,
    first_seq: i64,
    events: Vec<&'a EventDef>,
    /// Questions that are left until their time is over.
    expiring: BTreeSet<String>,
    retried: usize,
    /// Whether the run is to be compared with an undisturbed one.
    disturbed: bool,
}

/// What can be done about a run that waits.
enum Next {
    Go,
    Asks,
    Fails(Failure),
}

/// Runs a case once.
pub(super) async fn play(case: &Case, way: Way<'_>) -> Played {
    let store = MemoryStore::new();
    let now = case.def.now.or_else(|| DateTime::from_timestamp(BEGINS, 0)).unwrap_or_default();
    store.advance((now - store.now()).to_std().unwrap_or_default());
    let world =
        Arc::new(World::new(Arc::clone(&case.script), store.clone(), way.crash, way.before));
    let ambient = ambient(case);
    let order = Order { input: Some(Value::Object(case.def.input.clone())), ..Order::default() };
    let begun = begin(&case.graph, &ambient, Standing::empty(&case.graph), &order, None, false);
    let first = match begun {
        Ok(begun) => begun.row,
        Err(err) => {
            // A server would refuse to start the run.
            let failure =
                Failure { kind: "invalid_input".to_owned(), message: chain(&err), attempts: 1 };
            let (status, failure) = (Some(Status::Error), Some(failure));
            return Played { status, failure, ..Played::default() };
        }
    };
    let mut path = Vec::new();
    if let Some(row) = first {
        path.push(row.next.clone());
        store.insert(row);
    }
    let mut play = Play {
        case,
        world,
        ambient,
        started: store.now(),
        first_seq: 0,
        events: case.def.events.iter().collect(),
        expiring: BTreeSet::new(),
        retried: 0,
        disturbed: way.crash.is_some(),
    };
    let mut played = play.finish(way.wrap).await;
    play.look(&mut played, path).await;
    played
}

fn ambient(case: &Case) -> Ambient {
    let mut run = json!({
        "id": RUN_ID.to_string(),
        "thread_id": THREAD_ID.to_string(),
        "graph": case.graph.name,
        "assistant_id": null,
        "user_id": null,
        "metadata": {},
        "config": {},
        "context": {},
    });
    for (key, value) in &case.def.run {
        run[key] = value.clone();
    }
    Ambient { run: Shared::new(run), env: Shared::new(json!(case.def.env)) }
}

/// The same in each run, so that activations and attempts have the same names.
const RUN_ID: Uuid = Uuid::from_u128(1);
/// See [`RUN_ID`].
const THREAD_ID: Uuid = Uuid::from_u128(2);

impl Play<'_> {
    async fn finish(&mut self, wrap: Option<&Wrap>) -> Played {
        let mut played = Played::default();
        for _ in 0..MAX_PARKS {
            let exit = match Box::pin(self.process(wrap)).await {
                Ok(Some(exit)) => exit,
                Ok(None) if self.world.revive() => continue,
                Ok(None) => return played,
                Err(err) => {
                    self.world.fail(format!("the engine could not go on: {}", chain(&err)));
                    return played;
                }
            };
            let next = match exit {
                Exit::Done(state) => {
                    played.output = output_of(&self.case.graph, &state);
                    played.status = Some(Status::Success);
                    return played;
                }
                Exit::Failed(failure) => Next::Fails(failure),
                Exit::Waiting(waiting) => match self.wake(&waiting) {
                    Ok(next) => next,
                    Err(stuck) => {
                        self.world.fail(stuck);
                        return played;
                    }
                },
                Exit::Stopped | Exit::Released => {
                    self.world.fail("the engine stopped without a reason".to_owned());
                    return played;
                }
            };
            match next {
                Next::Go => {}
                Next::Asks => {
                    played.status = Some(Status::Interrupted);
                    return played;
                }
                Next::Fails(failure) => {
                    played.status = Some(Status::Error);
                    played.failure = Some(failure);
                    return played;
                }
            }
        }
        self.world.fail(format!("the run waited {MAX_PARKS} times, which is the limit of a case"));
        played
    }

    /// One process: a grant, until the run leaves memory. `None`: the process died.
    async fn process(&self, wrap: Option<&Wrap>) -> Result<Option<Exit>, ExecError> {
        let grant: Arc<dyn Checkpointer> = Arc::new(self.world.store.grant(0));
        let inner = wrap.map_or_else(|| Arc::clone(&grant), |wrap| wrap(Arc::clone(&grant)));
        let stage = Arc::new(Stage { inner, world: Arc::clone(&self.world) });
        let Some(mut root) = restore(stage.as_ref(), "", &self.case.graph).await? else {
            self.world.fail("the run has lost its checkpoints".to_owned());
            return Ok(None);
        };
        root.first_seq = self.first_seq;
        let run = Run {
            run_id: RunId(RUN_ID),
            thread_id: ThreadId(THREAD_ID),
            fence: 1,
            generation: 0,
            cursor: Cursor::new(root.position.seq, 0),
            ambient: self.ambient.clone(),
            checkpointer: stage,
            nodes: Arc::new(Stands(Arc::clone(&self.world))),
            options: Options { max_parallel: MAX_PARALLEL, ..Options::default() },
            drain: Arc::default(),
        };
        let mut advance = pin!(run.advance(root));
        let exit = std::future::poll_fn(|context| match advance.as_mut().poll(context) {
            Poll::Pending if self.world.stopped() => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
            Poll::Ready(exit) => Poll::Ready(Some(exit)),
        });
        let exit = exit.await.transpose()?;
        Ok(exit.filter(|_| !self.world.stopped()))
    }

    /// Lets the world do what the run waits for: jobs end, people answer, events come, time passes.
    fn wake(&mut self, waiting: &Waiting) -> Result<Next, String> {
        let open = self.world.store.open();
        if self.end_jobs(&open) || self.answer(&open, waiting)? || self.send_event(&open)? {
            return Ok(Next::Go);
        }
        match self.next_instant(&open, waiting) {
            Some(due) => Ok(self.pass(due)),
            None if waiting.people_only() => Ok(Next::Asks),
            None => {
                let told = open.iter().map(|wait| {
                    let path = path_of(&wait.namespace, &wait.node);
                    format!("`{path}` waits ({}): {}", wait.kind.as_str(), wait.data)
                });
                let told = told.collect::<Vec<_>>().join("; ");
                Err(format!("the run waits for what never comes: {told}"))
            }
        }
    }

    fn end_jobs(&self, open: &[OpenWait]) -> bool {
        let mut any = false;
        for wait in open.iter().filter(|wait| wait.kind == WaitKind::Job) {
            let result = self.world.lock().jobs.get(&key_of(wait.task, wait.attempt)).cloned();
            any |= result.is_some_and(|result| self.world.store.settle(wait.task, &result));
        }
        any
    }

    fn answer(&mut self, open: &[OpenWait], waiting: &Waiting) -> Result<bool, String> {
        let mut questions: Vec<&OpenWait> =
            open.iter().filter(|wait| wait.kind == WaitKind::Interrupt).collect();
        // In an order that the case's author can see.
        questions.sort_by_cached_key(|wait| {
            (path_of(&wait.namespace, &wait.node), wait.data["value"].to_string())
        });
        let mut any = false;
        for question in questions {
            let id = question.data["id"].as_str().unwrap_or_default().to_owned();
            if self.expiring.contains(&id) {
                continue;
            }
            let key = key_of(question.task, question.attempt);
            let unknown = question.data["value"]["reason"] == "unknown_outcome";
            if unknown && self.world.lock().ledger.in_flight.remove(&key) {
                self.world.lock().ledger.left_unknown.remove(&key);
                any |= self.world.store.answer(&id, &json!({ "action": "retry" }));
                self.retried += 1;
                continue;
            }
            let path = path_of(&question.namespace, &question.node);
            match self.world.ask(&id, &path, &question.data["value"]) {
                Some(Said::Answer(answer)) => {
                    fits(&path, &question.data["response_schema"], &answer)?;
                    any |= self.world.store.answer(&id, &answer);
                }
                Some(Said::Expired) if question.due.is_none() => {
                    return Err(format!("the question of `{path}` does not expire"));
                }
                Some(_) => {
                    self.expiring.insert(id);
                }
                None => {}
            }
        }
        if any && waiting.people_only() {
            // On a server the run ended with its questions; the answer began another one.
            self.started = self.world.store.now();
            let done = self.world.lock();
            let of_root =
                done.ledger.supersteps.keys().filter(|(namespace, _)| namespace.is_empty());
            self.first_seq = of_root.map(|(_, seq)| *seq).max().unwrap_or(0);
        }
        Ok(any)
    }

    /// Sends the next event that somebody waits for, when its time has come.
    fn send_event(&mut self, open: &[OpenWait]) -> Result<bool, String> {
        let elapsed = self.world.elapsed();
        let due = self
            .events
            .iter()
            .position(|event| awaited(open, event) && event.at.is_none_or(|at| at.0 <= elapsed));
        let Some(at) = due else { return Ok(false) };
        let event = self.events.remove(at);
        if self.world.store.send_event(&event.name, &event.payload) {
            return Ok(true);
        }
        Err("too many events wait to be waited for".to_owned())
    }

    /// The next instant at which something happens by itself.
    fn next_instant(&self, open: &[OpenWait], waiting: &Waiting) -> Option<DateTime<Utc>> {
        let passes = |wait: &&OpenWait| match wait.kind {
            WaitKind::Retry | WaitKind::Timer | WaitKind::Event => true,
            WaitKind::Interrupt => {
                let id = wait.data["id"].as_str().unwrap_or_default();
                !waiting.people_only() || self.expiring.contains(id)
            }
            WaitKind::Attempt | WaitKind::Job => false,
        };
        let dues = open.iter().filter(passes).filter_map(|wait| wait.due);
        let sent = self.events.iter().filter(|event| awaited(open, event)).filter_map(|event| {
            let begun =
                self.world.store.now() - chrono::Duration::from_std(self.world.elapsed()).ok()?;
            begun.checked_add_signed(chrono::Duration::from_std(event.at?.0).ok()?)
        });
        dues.chain(sent).min()
    }

    fn pass(&self, due: DateTime<Utc>) -> Next {
        let store = &self.world.store;
        let limit = self.case.graph.limits.duration;
        let deadline = limit.and_then(|limit| {
            self.started.checked_add_signed(chrono::Duration::from_std(limit).ok()?)
        });
        let until = deadline.map_or(due, |deadline| deadline.min(due));
        store.advance((until - store.now()).to_std().unwrap_or_default());
        if deadline.is_some_and(|deadline| deadline < due) {
            let message =
                "the run took longer than `limits: duration` of its graph allows".to_owned();
            return Next::Fails(Failure {
                kind: "duration_limit".to_owned(),
                message,
                attempts: 1,
            });
        }
        Next::Go
    }

    /// Fills in what can be seen when the run is over.
    async fn look(&mut self, played: &mut Played, first: Vec<String>) {
        let store = &self.world.store;
        if let Ok(Some(root)) = restore(&store.grant(0), "", &self.case.graph).await {
            let named = (0_u32..).zip(&self.case.graph.channels).filter_map(|(at, channel)| {
                let value = root.state.get(ChannelIndex(at))?;
                Some((channel.name.clone(), value.json().clone()))
            });
            played.state = Value::Object(named.collect());
            if played.output.is_null() {
                played.output = output_of(&self.case.graph, &root.state);
            }
        }
        let asked = store.open().into_iter().filter(|wait| wait.kind == WaitKind::Interrupt);
        played.questions = asked.map(|wait| wait.data["value"].clone()).collect();
        played.questions.sort_by_cached_key(Value::to_string);
        let mut inner = self.world.lock();
        let ledger = std::mem::take(&mut inner.ledger);
        let root = ledger.supersteps.iter().filter(|((namespace, _), _)| namespace.is_empty());
        let nexts = first.into_iter().chain(root.map(|(_, next)| next.clone()));
        played.path = nexts
            .filter_map(|next| {
                let nodes = decode_next(&self.case.graph, &next).ok()?;
                let name = |node: &_| self.case.graph.node(*node).name.clone();
                Some(nodes.iter().map(name).collect::<Vec<String>>())
            })
            .filter(|nodes| !nodes.is_empty())
            .collect();
        if played.failure.as_ref().is_some_and(|failure| failure.kind == "superstep_limit") {
            // What would have been next did not run.
            played.path.pop();
        }
        played.supersteps = ledger.supersteps;
        played.commits = ledger.commits;
        played.left_unknown = ledger.left_unknown.len();
        played.retried = self.retried;
        played.performed = std::mem::take(&mut inner.performed);
        played.assigned = std::mem::take(&mut inner.assigned);
        played.problems = std::mem::take(&mut inner.problems);
        let told = |text: String| Difference { at: text, expected: None, found: None };
        if played.problems.is_empty() {
            let unused = self.case.script.unused(&inner.used).into_iter();
            let events = self.events.iter().map(|event| {
                format!("the event {} was not sent: nothing waited for it", event.name)
            });
            // Answers of a disturbed run are those of the undisturbed one.
            if !self.disturbed {
                played.problems.extend(unused.chain(events).map(told));
            }
        }
        drop(inner);
        played.elapsed = self.world.elapsed();
    }
}

fn awaited(open: &[OpenWait], event: &EventDef) -> bool {
    open.iter().any(|wait| wait.kind == WaitKind::Event && wait.data["event"] == *event.name)
}

/// A server would refuse an answer that does not fit.
fn fits(path: &str, schema: &Value, answer: &Value) -> Result<(), String> {
    if schema.is_null() {
        return Ok(());
    }
    let validator = jsonschema::validator_for(schema)
        .map_err(|err| format!("the schema of the answers of `{path}`: {err}"))?;
    validator
        .validate(answer)
        .map_err(|err| format!("the answer to `{path}` does not fit the question's schema: {err}"))
}
