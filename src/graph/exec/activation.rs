//! One activation as its node's code sees it, and what that code may answer.

use std::sync::Mutex;
use std::time::Duration;

use serde_json::Value;

use super::super::channel::{State, View};
use super::super::checkpoint::{Due, StoredWait, WaitKind};
use super::super::expr::{EvalError, Expr, Scope, Template};
use super::super::model::{Graph, Node as NodeSpec};
use super::super::step::{Ambient, Position, Task, error_for};
use super::super::value::Shared;
use crate::ids::{RunId, ThreadId};

/// The most `custom` stream items that one attempt may have waiting to be written.
const MAX_CUSTOM: usize = 1000;

/// What a node's code gets.
pub struct Activation<'a> {
    /// The run.
    pub run_id: RunId,
    /// The thread.
    pub thread_id: ThreadId,
    /// The fence that everything done for it must name.
    pub fence: i64,
    /// How many runs of the thread were rolled back.
    pub generation: i32,
    /// The key under which this attempt was sent before, when nobody knows what came of it.
    pub sent_key: Option<String>,
    /// The namespace, empty for the root.
    pub namespace: &'a str,
    /// The checkpoint that planned it.
    pub planned: Position,
    /// The activation.
    pub task: &'a Task,
    /// Which attempt this is; the first is 1. With the task's id it makes an idempotency key.
    pub attempt: u32,
    /// How often this attempt was sent, this time included; more than 1 after an outcome that nothing told.
    pub sends: u32,
    /// The node as compiled.
    pub node: &'a NodeSpec,
    /// What was stored when an earlier call answered [`Outcome::Wait`]; its answer, when one came.
    pub previous: Option<&'a StoredWait>,
    /// Where `custom` items go.
    pub custom: &'a Custom,
    pub(super) graph: &'a Graph,
    pub(super) state: &'a State,
    pub(super) ambient: &'a Ambient,
}

/// Collects what a node's code streams while it works.
#[derive(Debug)]
pub struct Custom {
    items: Mutex<Vec<Streamed>>,
    custom: bool,
    messages: bool,
}

/// One item for the run's streams.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Streamed {
    /// For `custom`.
    Custom(Value),
    /// A message, or a piece of one, for `messages`.
    Message(Value),
}

impl Custom {
    /// Takes what somebody wants to see: `custom` items, `messages`.
    pub(super) fn new(custom: bool, messages: bool) -> Self {
        Self { items: Mutex::default(), custom, messages }
    }

    /// Adds an item to the run's `custom` stream. Over 1,000 unwritten items, the oldest is dropped.
    pub fn send(&self, item: Value) {
        if self.custom {
            let mut items = self.lock();
            if items.len() >= MAX_CUSTOM {
                items.remove(0);
            }
            items.push(Streamed::Custom(item));
        }
    }

    /// Adds a message, or a piece of one, in LangChain's form, to the run's `messages` streams. Pieces of text that
    /// follow each other are joined until they are written, so that what waits stays as small as the message.
    pub fn message(&self, message: Value) {
        if !self.messages {
            return;
        }
        let mut items = self.lock();
        if let Some(Streamed::Message(last)) = items.last_mut()
            && is_text(last)
            && is_text(&message)
            && last["id"] == message["id"]
        {
            let joined =
                [&*last, &message].map(|piece| piece["content"].as_str().unwrap_or_default());
            last["content"] = joined.concat().into();
            return;
        }
        items.push(Streamed::Message(message));
    }

    pub(super) fn take(&self) -> Vec<Streamed> {
        std::mem::take(&mut self.lock())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Streamed>> {
        self.items.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Whether a piece of a message is text and nothing else.
fn is_text(piece: &Value) -> bool {
    let empty = |key: &str| match &piece[key] {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    piece["type"] == "AIMessageChunk"
        && piece["content"].as_str().is_some_and(|text| !text.is_empty())
        && ["tool_call_chunks", "additional_kwargs", "usage_metadata", "chunk_position"]
            .into_iter()
            .all(empty)
}

/// What an attempt came to.
#[derive(Debug)]
pub enum Outcome {
    /// It is done.
    Done {
        /// What `set` sees as `output`.
        output: Value,
        /// Updates of channels, by name, beside the node's `set`.
        update: Vec<(String, Value)>,
        /// Nodes to run next beside the node's edges; each is one of its `may_goto`.
        goto: Vec<String>,
    },
    /// It waits; the node is called again when the wait is over.
    Wait(Wait),
    /// It asks a person; the node is called again with the answers so far.
    Ask(Question),
}

impl Outcome {
    /// Done, with `output` and nothing else.
    #[must_use]
    pub fn output(output: Value) -> Self {
        Self::Done { output, update: Vec::new(), goto: Vec::new() }
    }
}

/// What an activation waits for.
#[derive(Debug, Clone)]
pub struct Wait {
    /// What kind of thing.
    pub kind: WaitKind,
    /// When the wait is over by itself.
    pub due: Option<Due>,
    /// The name of the event.
    pub name: Option<String>,
    /// JSON for the node's next call.
    pub data: Option<Value>,
    /// Whether the node's code has stored the wait itself.
    pub stored: bool,
}

/// A question to a person.
#[derive(Debug, Clone)]
pub struct Question {
    /// What the person is shown.
    pub value: Value,
    /// JSON Schema of an answer.
    pub schema: Option<Value>,
    /// How long it stands.
    pub expires: Option<Duration>,
}

/// Why an attempt failed, and what the engine should do.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// Another attempt may succeed.
    #[error("{message}")]
    Retryable {
        /// A stable word for `error.kind`.
        kind: String,
        /// For people.
        message: String,
    },
    /// No further attempt can succeed.
    #[error("{message}")]
    Fatal {
        /// A stable word for `error.kind`.
        kind: String,
        /// For people.
        message: String,
    },
    /// The attempt did not happen, and did not fail: try again after a pause, without counting it.
    #[error("{message}")]
    NotStarted {
        /// For people.
        message: String,
        /// How long to wait.
        after: Duration,
    },
    /// The attempt acted on the world or did not, and nothing tells which: the node's `effects` decides.
    #[error("{message}")]
    Unknown {
        /// A stable word for `error.kind`.
        kind: String,
        /// For people.
        message: String,
    },
    /// The run is no longer this process's.
    #[error("the run belongs to another process now")]
    Fenced,
}

impl NodeError {
    /// A failure worth another attempt.
    #[must_use]
    pub fn retryable(kind: &str, message: impl Into<String>) -> Self {
        Self::Retryable { kind: kind.to_owned(), message: message.into() }
    }

    /// An outcome that nothing tells.
    #[must_use]
    pub fn unknown(kind: &str, message: impl Into<String>) -> Self {
        Self::Unknown { kind: kind.to_owned(), message: message.into() }
    }

    /// A failure for good.
    #[must_use]
    pub fn fatal(kind: &str, message: impl Into<String>) -> Self {
        Self::Fatal { kind: kind.to_owned(), message: message.into() }
    }
}

impl From<EvalError> for NodeError {
    fn from(err: EvalError) -> Self {
        Self::fatal("expression", err.to_string())
    }
}

impl Activation<'_> {
    /// Evaluates a template of the node in this activation's scope; `output` is not in it yet.
    ///
    /// # Errors
    /// The expression failed.
    pub fn eval(&self, template: &Template) -> Result<Value, EvalError> {
        let vars = self.vars(None);
        template.eval(&Scope { state: &View { graph: self.graph, state: self.state }, vars: &vars })
    }

    /// Evaluates an expression of the node in this activation's scope.
    ///
    /// # Errors
    /// The expression failed.
    pub fn eval_expr(&self, expr: &Expr) -> Result<Value, EvalError> {
        let vars = self.vars(None);
        expr.eval(&Scope { state: &View { graph: self.graph, state: self.state }, vars: &vars })
    }

    /// Names this attempt to the world: the same for each time that it is sent, another one after a recorded
    /// failure, and after a run of the thread was rolled back.
    #[must_use]
    pub fn idempotency_key(&self) -> String {
        match (&self.sent_key, self.generation) {
            (Some(key), _) => key.clone(),
            (None, 0) => format!("{}-{}", self.task.id, self.attempt),
            (None, generation) => format!("{}-{}-{generation}", self.task.id, self.attempt),
        }
    }

    /// The state as the superstep began, by channel name.
    #[must_use]
    pub fn state(&self, channel: &str) -> Option<&Value> {
        self.state.get(self.graph.find_channel(channel)?).map(Shared::json)
    }

    /// The answers that people gave to this activation's questions, in the order of asking.
    #[must_use]
    pub fn answers(&self) -> Vec<Value> {
        let asked = self.previous.filter(|wait| wait.kind == WaitKind::Interrupt);
        let answer = asked.and_then(|wait| wait.answer.as_deref());
        match answer.map(serde_json::from_slice) {
            Some(Ok(Value::Array(answers))) => answers,
            _ => Vec::new(),
        }
    }

    pub(super) fn vars(&self, output: Option<Shared>) -> Vec<(&str, Shared)> {
        let mut vars = vec![("run", self.ambient.run.clone()), ("env", self.ambient.env.clone())];
        if let (Some(item), Some(for_each)) = (&self.task.item, &self.node.for_each) {
            vars.push((&for_each.name, item.value.clone()));
            vars.push(("index", Shared::new(Value::from(item.index))));
        }
        vars.extend(error_for(self.state, self.task.node).map(|error| ("error", error)));
        vars.extend(output.map(|output| ("output", output)));
        vars
    }
}
