//! One attempt of a node's code: its number stored first, its time bounded, its panics caught.
//!
//! What an attempt does to the world may be known to nobody after a crash. So the attempt of a node that
//! acts stores a row before it starts: see [`super::effect`]. The row also keeps what the node had waited
//! for before, so that the node sees its own answers after all that.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures::FutureExt;
use serde_json::{Value, json};

use super::super::channel::State;
use super::super::checkpoint::{
    CheckpointError, Commit, EffectStatus, StoredWait, WaitKind, WaitRow,
};
use super::super::model::{Effect, Graph, NodeKind, OnUnknown};
use super::super::step::{self, Task, interrupt_id};
use super::activation::{Activation, Custom, NodeError, Outcome, Question};
use super::effect::{self, Intent, Sent};
use super::superstep::Event;
use super::{Node, Run};
use crate::ids::TaskId;

/// An attempt to run, with all that it borrows nothing of.
pub(super) struct Attempt {
    pub(super) at: usize,
    pub(super) graph: Arc<Graph>,
    pub(super) state: Arc<State>,
    pub(super) path: String,
    pub(super) planned: step::Position,
    pub(super) attempt: u32,
    pub(super) previous: Option<StoredWait>,
    pub(super) custom: Arc<Custom>,
}

/// What an attempt came to.
pub(super) enum End {
    /// What the node's code says, or what became of it; and what it had told that it would do.
    Node { end: Result<Outcome, NodeError>, sent: Option<Sent> },
    /// A person has decided what became of an attempt; or the node's `effects` has.
    Decided { end: Result<Outcome, NodeError>, status: EffectStatus },
    /// An earlier attempt may have acted on the world: this one was not made.
    Unknown {
        /// What a person is asked.
        question: Question,
        /// What the node had waited for before, and how often it was sent: to be kept with the question.
        kept: Kept,
    },
}

/// What a question about an attempt keeps for when the attempt is made after all.
pub(super) struct Kept {
    /// What the node had waited for before.
    pub(super) before: Value,
    /// How often the attempt was sent.
    pub(super) sends: u32,
}

/// Whether an attempt may be made.
enum Begin {
    Go(Sent),
    Over(End),
}

impl Run {
    pub(super) async fn attempt(&self, call: Attempt, task: Task) -> Event {
        let at = call.at;
        Event::Ended(at, self.make_attempt(call, task).await)
    }

    async fn make_attempt(&self, call: Attempt, task: Task) -> Result<End, CheckpointError> {
        let spec = call.graph.node(task.node);
        let Some(node) = self.nodes.find(spec) else {
            let message = format!("this server has no code for node `{}`", spec.name);
            let end = Err(NodeError::fatal("not_registered", message));
            return Ok(End::Node { end, sent: None });
        };
        let seen = seen_by_node(call.previous.as_ref());
        let mut activation = Activation {
            run_id: self.run_id,
            thread_id: self.thread_id,
            namespace: &call.path,
            planned: call.planned,
            fence: self.fence,
            generation: self.generation,
            sent_key: key_sent_before(call.previous.as_ref(), call.attempt),
            task: &task,
            attempt: call.attempt,
            sends: 1,
            node: spec,
            previous: seen.as_ref(),
            custom: &call.custom,
            graph: &call.graph,
            state: &call.state,
            ambient: &self.ambient,
        };
        let intent = match caught(node.intent(&activation)).await {
            Ok(intent) => intent.filter(|intent| intent.effect != Effect::Pure),
            Err(err) => return Ok(End::Node { end: Err(err), sent: None }),
        };
        let sent = match &intent {
            None => None,
            Some(intent) => match self.begin_attempt(&call, &activation, intent).await? {
                Begin::Go(sent) => Some(sent),
                Begin::Over(End::Decided { end: Ok(Outcome::Done { output, .. }), status }) => {
                    let end = node.told(&activation, output).map(Outcome::output);
                    return Ok(End::Decided { end, status });
                }
                Begin::Over(end) => return Ok(end),
            },
        };
        activation.sends = sent.as_ref().map_or(1, |sent| sent.sends);
        let acts = sent.as_ref().is_some_and(|sent| sent.effect == Effect::Effectful);
        Ok(End::Node { end: run_bounded(&*node, &activation, acts).await, sent })
    }

    /// Makes the attempt's number and what it is about to do durable before it starts. After a crash in an
    /// attempt nobody knows what happened: the node's `effects` tells what follows.
    async fn begin_attempt(
        &self,
        call: &Attempt,
        activation: &Activation<'_>,
        intent: &Intent,
    ) -> Result<Begin, CheckpointError> {
        let (task, spec) = (activation.task, activation.node);
        let previous = call.previous.as_ref();
        let (mut sends, mut lost) = (count_of(previous, "sends"), count_of(previous, "lost"));
        if previous.is_some_and(|wait| !wait.settled && wait.kind == WaitKind::Attempt) {
            match Sent::new(intent, "", sends, lost).on_unknown(spec) {
                OnUnknown::Retry => {}
                OnUnknown::Ask => {
                    let question =
                        effect::question(&spec.name, call.attempt, &sent_before(previous), None);
                    let kept = Kept { before: json_of(activation.previous), sends };
                    return Ok(Begin::Over(End::Unknown { question, kept }));
                }
                OnUnknown::Fail => {
                    let message = "the process died while the attempt was acting on the world";
                    return Ok(Begin::Over(End::Decided {
                        end: Err(NodeError::fatal("unknown_outcome", message)),
                        status: EffectStatus::Unknown,
                    }));
                }
            }
        } else if let Some(decision) = decided(previous) {
            match decision.get("action").and_then(Value::as_str) {
                Some("done") => {
                    let output = decision.get("output").cloned().unwrap_or(Value::Null);
                    return Ok(Begin::Over(End::Decided {
                        end: Ok(Outcome::output(output)),
                        status: EffectStatus::Done,
                    }));
                }
                Some("retry") => {}
                _ => {
                    let message = "a person gave the attempt up, whose outcome was unknown";
                    return Ok(Begin::Over(End::Decided {
                        end: Err(NodeError::fatal("given_up", message)),
                        status: EffectStatus::Failed,
                    }));
                }
            }
        } else if previous.is_none_or(|wait| wait.attempt != call.attempt) {
            (sends, lost) = (0, 0);
        }
        let sent = Sent::new(intent, &activation.idempotency_key(), sends.saturating_add(1), lost);
        let data = json!({
            "before": json_of(activation.previous),
            "sent": sent.view,
            "sends": sent.sends,
            "lost": sent.lost,
        });
        let row = WaitRow {
            task: task.id,
            node: spec.name.clone(),
            kind: WaitKind::Attempt,
            attempt: call.attempt,
            due: None,
            name: None,
            data: Some(data.to_string().into_bytes()),
            answer: None,
            round: previous.map_or(0, |wait| wait.round).saturating_add(1),
        };
        let commit = Commit {
            namespace: call.path.clone(),
            planned: call.planned,
            checkpoint: None,
            writes: Vec::new(),
            waits: vec![row],
            settles: false,
            stream: Vec::new(),
            effects: vec![effect::intended(activation, intent)],
            end: None,
        };
        self.checkpointer.commit(commit).await?;
        Ok(Begin::Go(sent))
    }
}

/// What a node's code says; a panic of it is a failure.
async fn caught<T>(work: impl Future<Output = Result<T, NodeError>>) -> Result<T, NodeError> {
    AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|panic| {
        let what = panic
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "no message".to_owned());
        Err(NodeError::fatal("panic", format!("the node's code panicked: {what}")))
    })
}

/// Runs the node's code within its time. What `acts` on the world may have done so when its time is up.
async fn run_bounded(
    node: &dyn Node,
    activation: &Activation<'_>,
    acts: bool,
) -> Result<Outcome, NodeError> {
    // Also what the code does before its first await is caught.
    let work = caught(async { node.run(activation).await });
    let bound = match &activation.node.kind {
        // A job's time is its worker's to measure.
        NodeKind::Job(_) => None,
        _ => activation.node.timeout,
    };
    let Some(timeout) = bound else { return work.await };
    match tokio::time::timeout(timeout, work).await {
        Ok(end) => end,
        Err(_) => {
            let took = humantime::format_duration(timeout);
            let message = format!("the attempt took longer than {took}");
            Err(if acts {
                NodeError::unknown("timeout", message)
            } else {
                NodeError::retryable("timeout", message)
            })
        }
    }
}

/// The id of the question about an attempt; no question of the node itself has it.
pub(super) fn unknown_outcome_id(task: TaskId, attempt: u32) -> String {
    interrupt_id(task, u32::MAX - attempt)
}

/// What a person decided about an attempt whose outcome was unknown.
fn decided(previous: Option<&StoredWait>) -> Option<Value> {
    let previous = previous.filter(|wait| wait.kind == WaitKind::Interrupt)?;
    let data: Value = serde_json::from_slice(previous.data.as_deref()?).ok()?;
    data.get("unknown_outcome")?;
    let answers: Vec<Value> = serde_json::from_slice(previous.answer.as_deref()?).ok()?;
    answers.into_iter().next_back()
}

fn data_of(previous: Option<&StoredWait>) -> Option<Value> {
    serde_json::from_slice(previous?.data.as_deref()?).ok()
}

/// A count that is kept with what the attempt waits for.
fn count_of(previous: Option<&StoredWait>, key: &str) -> u32 {
    let data = data_of(previous);
    let count = data.as_ref().and_then(|data| data.get(key)).and_then(Value::as_u64);
    count.and_then(|count| u32::try_from(count).ok()).unwrap_or(0)
}

/// What was sent by the attempt that is under way, for people.
fn sent_before(previous: Option<&StoredWait>) -> Value {
    data_of(previous).and_then(|mut data| Some(data.get_mut("sent")?.take())).unwrap_or_default()
}

/// The key of an attempt whose outcome nobody knows, when it is to be sent again.
fn key_sent_before(previous: Option<&StoredWait>, attempt: u32) -> Option<String> {
    let previous = previous.filter(|wait| wait.attempt == attempt)?;
    let path = match previous.kind {
        WaitKind::Attempt if !previous.settled => "/sent/idempotency_key",
        WaitKind::Interrupt => {
            decided(Some(previous))?;
            "/value/sent/idempotency_key"
        }
        _ => return None,
    };
    Some(data_of(Some(previous))?.pointer(path)?.as_str()?.to_owned())
}

/// What the node's own code had waited for: what is stored, without the engine's rows around it.
pub(super) fn seen_by_node(previous: Option<&StoredWait>) -> Option<StoredWait> {
    let previous = previous?;
    let data =
        || previous.data.as_deref().and_then(|bytes| serde_json::from_slice::<Value>(bytes).ok());
    match previous.kind {
        WaitKind::Attempt => from_json(previous, data()?.get("before")?),
        WaitKind::Interrupt => match data().as_ref().and_then(|data| data.get("unknown_outcome")) {
            Some(about) => from_json(previous, about.get("before")?),
            None => Some(previous.clone()),
        },
        WaitKind::Retry => match data().as_ref().and_then(|data| data.get("before")) {
            Some(before) => from_json(previous, before),
            None => Some(previous.clone()),
        },
        WaitKind::Job | WaitKind::Timer | WaitKind::Event => Some(previous.clone()),
    }
}

/// What a pause before the next attempt has to keep.
pub(super) fn before_of(previous: Option<&StoredWait>) -> Option<Value> {
    let seen = seen_by_node(previous)?;
    let kept = matches!(seen.kind, WaitKind::Interrupt | WaitKind::Timer | WaitKind::Event);
    kept.then(|| json_of(Some(&seen)))
}

fn json_of(wait: Option<&StoredWait>) -> Value {
    let Some(wait) = wait else { return Value::Null };
    let value = |bytes: &Option<Vec<u8>>| {
        bytes.as_deref().and_then(|bytes| serde_json::from_slice::<Value>(bytes).ok())
    };
    json!({
        "kind": wait.kind.as_str(),
        "settled": wait.settled,
        "expired": wait.expired,
        "data": value(&wait.data),
        // A missing answer is not the answer null.
        "answer": value(&wait.answer).map(|answer| json!([answer])),
    })
}

fn from_json(around: &StoredWait, before: &Value) -> Option<StoredWait> {
    let flag = |key: &str| before.get(key).and_then(Value::as_bool).unwrap_or(false);
    let bytes = |value: &Value| value.to_string().into_bytes();
    Some(StoredWait {
        kind: WaitKind::parse(before.get("kind")?.as_str()?)?,
        attempt: around.attempt,
        settled: flag("settled"),
        expired: flag("expired"),
        data: before.get("data").filter(|data| !data.is_null()).map(bytes),
        answer: before.pointer("/answer/0").map(bytes),
        round: around.round,
    })
}
