//! What attempts do to the world: told before it is done, and what came of it afterwards.
//!
//! An attempt of a node that acts commits an [`Intent`] before it acts and an outcome after; both ride in
//! the run's own commits. Found again without an outcome, an intent means that a process died while it
//! was acting. Then the same idempotency key goes out again where repeating is harmless, and else a person
//! decides: the node's `effects` says which.
//!
//! **Invariant:** an attempt's number grows only after a recorded failure, so that whatever is sent twice for
//! one number carries the same idempotency key.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::super::checkpoint::{EffectChange, EffectRow, EffectStatus};
use super::super::model::{Effect, Node as NodeSpec, OnUnknown};
use super::super::step::Task;
use super::activation::{Activation, NodeError, Outcome, Question};

/// The most of a request that is kept for people, in bytes of JSON.
const MAX_REQUEST: usize = 16 << 10;
/// The most of an outcome that is kept for people, in bytes of JSON.
const MAX_OUTCOME: usize = 4 << 10;
/// How often one attempt is sent, where its node says nothing of retries.
const DEFAULT_SENDS: u32 = 3;

/// What an attempt is about to do to the world.
#[derive(Debug, Clone, PartialEq)]
pub struct Intent {
    /// What kind of thing is called: `tool`, `model`, `use`.
    pub kind: &'static str,
    /// Which one: `files/write_file`, say.
    pub target: String,
    /// What is sent. It is shown to people and stored: no secret is in it.
    pub request: Value,
    /// What repeating it would do.
    pub effect: Effect,
}

/// An intent that is stored, and what the attempt needs to know of it later.
#[derive(Debug, Clone)]
pub(super) struct Sent {
    pub(super) effect: Effect,
    /// The intent, for people.
    pub(super) view: Value,
    /// How often this attempt was sent, this time included.
    pub(super) sends: u32,
    /// How often it came back without telling what happened.
    pub(super) lost: u32,
}

impl Sent {
    pub(super) fn new(intent: &Intent, key: &str, sends: u32, lost: u32) -> Self {
        let (request, whole) = clipped(&intent.request, MAX_REQUEST);
        let mut view = json!({
            "kind": intent.kind,
            "target": intent.target,
            "idempotency_key": key,
            "request": request,
        });
        if !whole {
            view["truncated"] = true.into();
        }
        Self { effect: intent.effect, view, sends, lost }
    }

    /// What an unknown outcome of it means, at a node.
    pub(super) fn on_unknown(&self, node: &NodeSpec) -> OnUnknown {
        node.on_unknown.unwrap_or(match self.effect {
            Effect::Effectful => OnUnknown::Ask,
            Effect::Idempotent | Effect::Pure => OnUnknown::Retry,
        })
    }

    /// Whether it may be sent once more under the same key after it came back without telling what happened. A
    /// process that died in between is no reason to stop: of those the driver keeps count.
    pub(super) fn may_resend(&self, node: &NodeSpec) -> bool {
        self.lost.saturating_add(1)
            < node.retry.as_ref().map_or(DEFAULT_SENDS, |retry| retry.attempts.max(1))
    }
}

/// The row of an intent.
pub(super) fn intended(activation: &Activation<'_>, intent: &Intent) -> EffectRow {
    let (request, _) = clipped(&intent.request, MAX_REQUEST);
    EffectRow {
        task: activation.task.id,
        attempt: activation.attempt,
        change: EffectChange::Intent {
            key: activation.idempotency_key(),
            node: activation.node.name.clone(),
            kind: intent.kind,
            target: intent.target.clone(),
            effect: intent.effect,
            request_hash: Sha256::digest(intent.request.to_string()).into(),
            request: request.to_string().into_bytes(),
        },
    }
}

/// The row of what an attempt came to; `None` when that says nothing about it.
pub(super) fn outcome_of(
    task: &Task,
    attempt: u32,
    end: &Result<Outcome, NodeError>,
) -> Option<EffectRow> {
    let failure = |kind: &str, message: &str| json!({ "kind": kind, "message": message });
    let (status, outcome) = match end {
        Ok(Outcome::Done { output, .. }) => (EffectStatus::Done, output.clone()),
        Ok(Outcome::Wait(_) | Outcome::Ask(_)) => (EffectStatus::Waiting, Value::Null),
        Err(NodeError::Retryable { kind, message } | NodeError::Fatal { kind, message }) => {
            (EffectStatus::Failed, failure(kind, message))
        }
        Err(NodeError::Unknown { kind, message }) => {
            (EffectStatus::Unknown, failure(kind, message))
        }
        Err(NodeError::NotStarted { message, .. }) => {
            (EffectStatus::NotSent, failure("not_started", message))
        }
        Err(NodeError::Fenced) => return None,
    };
    Some(ended(task, attempt, status, &outcome))
}

/// The row of an outcome.
pub(super) fn ended(task: &Task, attempt: u32, status: EffectStatus, outcome: &Value) -> EffectRow {
    let (outcome, _) = clipped(outcome, MAX_OUTCOME);
    let change = EffectChange::Outcome { status, outcome: outcome.to_string().into_bytes() };
    EffectRow { task: task.id, attempt, change }
}

/// The question about an attempt whose outcome nobody knows.
pub(super) fn question(node: &str, attempt: u32, sent: &Value, why: Option<&str>) -> Question {
    let why = why.map_or_else(
        || format!("The process died while `{node}` was acting on the world, and nothing tells whether it did."),
        |why| format!("`{node}` acted on the world, and nothing tells whether it did: {why}."),
    );
    Question {
        value: json!({
            "reason": "unknown_outcome",
            "node": node,
            "attempt": attempt,
            "sent": sent,
            "message": format!(
                "{why} Answer {{\"action\": \"retry\"}} to send it again under the same idempotency key, \
                 {{\"action\": \"done\", \"output\": ..}} when it has happened, or {{\"action\": \"fail\"}}."
            ),
        }),
        schema: Some(json!({
            "type": "object",
            "properties": { "action": { "enum": ["retry", "done", "fail"] }, "output": {} },
            "required": ["action"],
            "additionalProperties": false,
        })),
        expires: None,
    }
}

/// A value, or when its text is over `most` bytes, the beginning of its text; and whether it is whole.
fn clipped(value: &Value, most: usize) -> (Value, bool) {
    let text = value.to_string();
    if text.len() <= most {
        return (value.clone(), true);
    }
    let end = text.floor_char_boundary(most);
    (Value::String(format!("{}… ({} bytes)", &text[..end], text.len())), false)
}
