//! One attempt of a node's code: its number stored first, its time bounded, its panics caught.
//!
//! What an attempt does to the world may be known to nobody after a crash. So the attempt of a node that
//! is not pure stores a row before it starts. Found again without an outcome, the row means that an
//! attempt was under way when a process died: an idempotent node is run again under the same number; for
//! an effectful one a person decides. The row also keeps what the node had waited for before, so that the
//! node sees its own answers after all that.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures::FutureExt;
use serde_json::{Value, json};

use super::super::channel::State;
use super::super::checkpoint::{CheckpointError, Commit, StoredWait, WaitKind, WaitRow};
use super::super::model::{Effect, Graph, Node as NodeSpec, NodeKind};
use super::super::step::{self, Task, interrupt_id};
use super::activation::{Activation, Custom, NodeError, Outcome, Question};
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
    /// What the node's code says, or what became of it.
    Node(Result<Outcome, NodeError>),
    /// An earlier attempt may have acted on the world: this one was not made.
    Unknown {
        /// What a person is asked.
        question: Question,
        /// What the node had waited for before, to be kept with the question.
        before: Value,
    },
}

/// Whether an attempt may be made.
enum Begin {
    Go,
    Over(Outcome),
    GivenUp,
    Unknown { before: Value },
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
            return Ok(End::Node(Err(NodeError::fatal("not_registered", message))));
        };
        let seen = seen_by_node(call.previous.as_ref());
        if matches!(spec.kind, NodeKind::Use { .. }) && spec.effect != Effect::Pure {
            match self.begin_attempt(&call, &task, spec, seen.as_ref()).await? {
                Begin::Go => {}
                Begin::Over(outcome) => return Ok(End::Node(Ok(outcome))),
                Begin::GivenUp => {
                    let message = "a person gave the attempt up, whose outcome was unknown";
                    return Ok(End::Node(Err(NodeError::fatal("given_up", message))));
                }
                Begin::Unknown { before } => {
                    return Ok(End::Unknown {
                        question: unknown_outcome(&spec.name, call.attempt),
                        before,
                    });
                }
            }
        }
        let activation = Activation {
            run_id: self.run_id,
            thread_id: self.thread_id,
            namespace: &call.path,
            planned: call.planned,
            fence: self.fence,
            task: &task,
            attempt: call.attempt,
            node: spec,
            previous: seen.as_ref(),
            custom: &call.custom,
            graph: &call.graph,
            state: &call.state,
            ambient: &self.ambient,
        };
        Ok(End::Node(run_bounded(&*node, &activation).await))
    }

    /// Makes the attempt's number durable before it starts. After a crash in an effectful attempt nobody
    /// knows what happened: a person decides.
    async fn begin_attempt(
        &self,
        call: &Attempt,
        task: &Task,
        spec: &NodeSpec,
        seen: Option<&StoredWait>,
    ) -> Result<Begin, CheckpointError> {
        let previous = call.previous.as_ref();
        if previous.is_some_and(|wait| !wait.settled && wait.kind == WaitKind::Attempt) {
            // The number is stored already.
            return Ok(match spec.effect {
                Effect::Effectful => Begin::Unknown { before: to_json(seen) },
                Effect::Idempotent | Effect::Pure => Begin::Go,
            });
        }
        if let Some(decision) = decided(previous) {
            match decision.get("action").and_then(Value::as_str) {
                Some("done") => {
                    let output = decision.get("output").cloned().unwrap_or(Value::Null);
                    return Ok(Begin::Over(Outcome::output(output)));
                }
                Some("retry") => {}
                _ => return Ok(Begin::GivenUp),
            }
        }
        let row = WaitRow {
            task: task.id,
            node: spec.name.clone(),
            kind: WaitKind::Attempt,
            attempt: call.attempt,
            due: None,
            name: None,
            data: seen.map(|_| to_json(seen).to_string().into_bytes()),
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
        };
        self.checkpointer.commit(commit).await?;
        Ok(Begin::Go)
    }
}

async fn run_bounded(node: &dyn Node, activation: &Activation<'_>) -> Result<Outcome, NodeError> {
    // Also what the code does before its first await is caught.
    let work = AssertUnwindSafe(async { node.run(activation).await }).catch_unwind();
    // A job's time is its worker's to measure.
    let end =
        match activation.node.timeout.filter(|_| !matches!(activation.node.kind, NodeKind::Job(_)))
        {
            Some(timeout) => match tokio::time::timeout(timeout, work).await {
                Ok(end) => end,
                Err(_) => Ok(Err(NodeError::retryable(
                    "timeout",
                    format!("the attempt took longer than {}", humantime::format_duration(timeout)),
                ))),
            },
            None => work.await,
        };
    end.unwrap_or_else(|panic| {
        let what = panic
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "no message".to_owned());
        Err(NodeError::fatal("panic", format!("the node's code panicked: {what}")))
    })
}

/// The question after an attempt whose outcome nobody knows.
fn unknown_outcome(node: &str, attempt: u32) -> Question {
    Question {
        value: json!({
            "reason": "unknown_outcome",
            "node": node,
            "attempt": attempt,
            "message": format!(
                "The process died while `{node}` was acting on the world, and nothing tells whether it did. \
                 Answer {{\"action\": \"retry\"}}, {{\"action\": \"done\", \"output\": ..}} or {{\"action\": \"fail\"}}."
            ),
        }),
        schema: Some(json!({
            "type": "object",
            "properties": { "action": { "enum": ["retry", "done", "fail"] }, "output": {} },
            "required": ["action"],
        })),
        expires: None,
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

/// What the node's own code had waited for: what is stored, without the engine's rows around it.
pub(super) fn seen_by_node(previous: Option<&StoredWait>) -> Option<StoredWait> {
    let previous = previous?;
    let data =
        || previous.data.as_deref().and_then(|bytes| serde_json::from_slice::<Value>(bytes).ok());
    match previous.kind {
        WaitKind::Attempt => from_json(previous, &data()?),
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
    kept.then(|| to_json(Some(&seen)))
}

fn to_json(wait: Option<&StoredWait>) -> Value {
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
