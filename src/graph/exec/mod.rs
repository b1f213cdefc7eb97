//! Runs a graph: superstep after superstep, each stored before the next begins.
//!
//! The executor knows no database and no clock. It asks a [`Checkpointer`] to store, a [`NodeSource`]
//! for the nodes that reach outside, and gives back an [`Exit`] when nothing can go on in memory: the
//! run is done, failed, or waits, and then costs nothing until something arrives.
//!
//! **Invariant:** an activation whose writes were committed is never run again: its stored result is
//! found by its task id before it could start.

mod activation;
mod attempt;
mod control;
mod effect;
mod ending;
mod namespace;
mod subgraph;
mod superstep;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64};

use futures::FutureExt;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use activation::{Activation, Custom, NodeError, Outcome, Question, Wait};
pub use effect::Intent;
pub use namespace::{Namespace, restore};
pub use superstep::TaskRecord;

use super::channel::State;
use super::checkpoint::{CheckpointError, Checkpointer, DecodeError};
use super::model::{Effect, Graph, Node as NodeSpec, NodeKind};
use super::step::{Ambient, Failure, StepError};
use crate::ids::{RunId, ThreadId};

/// A node's code. One value serves all activations, so it holds no state of a run.
pub trait Node: Send + Sync {
    /// Does the work of one attempt.
    ///
    /// The future is dropped when the run is cancelled or the attempt's time is up.
    fn run<'a>(
        &'a self,
        activation: &'a Activation<'a>,
    ) -> BoxFuture<'a, Result<Outcome, NodeError>>;

    /// What repeating an attempt would do, unless the graph file says otherwise.
    fn effect(&self) -> Effect {
        Effect::Effectful
    }

    /// What the attempt is about to do to the world. It is stored before [`Node::run`] is called; an answer of
    /// `None`, or of a pure one, stores nothing. Of a `use` node it is the node's argument.
    ///
    /// # Errors
    /// What is to be sent cannot be made: the attempt has failed.
    fn intent<'a>(
        &'a self,
        activation: &'a Activation<'a>,
    ) -> BoxFuture<'a, Result<Option<Intent>, NodeError>> {
        let intent = match &activation.node.kind {
            NodeKind::Use { name, with } if activation.node.effect != Effect::Pure => {
                activation.eval(with).map(|request| {
                    let (target, effect) = (name.clone(), activation.node.effect);
                    Some(Intent { kind: "use", target, request, effect })
                })
            }
            _ => Ok(None),
        };
        futures::future::ready(intent.map_err(NodeError::from)).boxed()
    }

    /// The output of an attempt that acted on the world and of which a person tells what came of it: what the person
    /// says, in the form that this node's output has.
    ///
    /// # Errors
    /// It cannot be given that form.
    fn told(&self, _activation: &Activation<'_>, value: Value) -> Result<Value, NodeError> {
        Ok(value)
    }
}

/// Finds the code of nodes that the engine does not control itself.
pub trait NodeSource: Send + Sync {
    /// The code for `node`, a `job`, `wait` for an event, or `use`; `None` when it is not registered here.
    fn find(&self, node: &NodeSpec) -> Option<Arc<dyn Node>>;
}

/// What is fixed for one run.
pub struct Run {
    /// Its id.
    pub run_id: RunId,
    /// Its thread.
    pub thread_id: ThreadId,
    /// The fence of the grant that it is moved under.
    pub fence: i64,
    /// How many runs of the thread were rolled back: what they did had keys of its own.
    pub generation: i32,
    /// What expressions see beside the state.
    pub ambient: Ambient,
    /// Where it is stored.
    pub checkpointer: Arc<dyn Checkpointer>,
    /// Where node code is found.
    pub nodes: Arc<dyn NodeSource>,
    /// What the client asked for.
    pub options: Options,
    /// Set to make the run stop between supersteps; it then exits as [`Exit::Released`].
    pub drain: Arc<AtomicBool>,
    /// The root namespace's seq, and the place of the next stream row after it.
    pub cursor: Cursor,
}

/// Counts stream rows in the order in which a reader sees them.
#[derive(Debug, Default)]
pub struct Cursor {
    pub(super) root_seq: AtomicI64,
    pub(super) place: AtomicI32,
}

impl Cursor {
    /// For a run whose root stands at `root_seq` and has `place` stream rows after it already.
    #[must_use]
    pub fn new(root_seq: i64, place: i32) -> Self {
        Self { root_seq: AtomicI64::new(root_seq), place: AtomicI32::new(place) }
    }
}

/// What a client asked of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Options {
    /// Whether rows for `updates` streams are written.
    pub stream_updates: bool,
    /// Whether rows for `tasks` streams are written.
    pub stream_tasks: bool,
    /// Whether rows for `custom` streams are written.
    pub stream_custom: bool,
    /// Whether rows for `messages` streams are written.
    pub stream_messages: bool,
    /// Whether subgraphs write stream rows too.
    pub stream_subgraphs: bool,
    /// Stop before these nodes.
    pub interrupt_before: Stops,
    /// Stop after these nodes.
    pub interrupt_after: Stops,
    /// Whether the run goes on where the thread stopped, so that its first superstep is not stopped before.
    pub resumed: bool,
    /// The most activations of one superstep under way at once; 0 is no bound but the nodes' own.
    pub max_parallel: usize,
    /// Supersteps that the run may make; the graph's own limit holds as well.
    pub supersteps: Option<u32>,
}

/// Nodes at which a run stops.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stops {
    /// None.
    #[default]
    Never,
    /// Every node.
    All,
    /// These.
    At(Vec<String>),
}

impl Stops {
    fn any<'a>(&self, mut names: impl Iterator<Item = &'a str>) -> bool {
        match self {
            Self::Never => false,
            Self::All => names.next().is_some(),
            Self::At(stops) => names.any(|name| stops.iter().any(|stop| stop == name)),
        }
    }
}

/// Why a run is no longer in memory.
#[derive(Debug)]
pub enum Exit {
    /// Nothing is left to do.
    Done(Arc<State>),
    /// Every activation that is left waits.
    Waiting(Waiting),
    /// The run failed; what was stored stays.
    Failed(Failure),
    /// It stopped at a node that the client named.
    Stopped,
    /// It was told to stop; another process goes on.
    Released,
}

/// What a run waits for.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Activations that wait for a job, a time, an event or their next attempt.
    pub outstanding: u32,
    /// Activations that wait for a person.
    pub people: u32,
    /// Whether activations have not started because of `max_parallel`.
    pub held_back: bool,
    /// How many of the outstanding ones have to come in before anything can go on: all of a superstep, in the
    /// namespace that has the fewest. 0 when nothing is outstanding.
    pub step: u32,
}

impl Waiting {
    /// Adds what a subgraph waits for.
    fn add(&mut self, below: &Self) {
        self.outstanding += below.outstanding;
        self.people += below.people;
        self.held_back |= below.held_back;
        self.step = match (self.step, below.step) {
            (0, step) | (step, 0) => step,
            (one, other) => one.min(other),
        };
    }

    /// Adds the activations that the superstep itself waits for. It is complete after its subgraphs only, so
    /// where those have something outstanding, they go on first.
    fn with_own(mut self, own: u32) -> Self {
        self.outstanding += own;
        if self.step == 0 {
            self.step = own;
        }
        if self.held_back {
            self.step = self.outstanding.min(1);
        }
        self
    }

    /// Whether only people can let the run go on.
    #[must_use]
    pub fn people_only(&self) -> bool {
        self.outstanding == 0 && self.people > 0
    }

    /// The run wakes when at most so many activations are outstanding.
    #[must_use]
    pub fn wake_below(&self) -> u32 {
        self.outstanding - self.step.min(self.outstanding)
    }
}

/// Why a run could not be moved: not the graph's failure.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The store refused or failed.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// What is stored cannot be read.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

impl StepError {
    /// The failure that it is for the run.
    #[must_use]
    pub fn to_failure(&self) -> Failure {
        let kind = match self {
            Self::Write(super::channel::WriteError::Concurrent { .. }) => "concurrent_writes",
            Self::Write(_) => "invalid_write",
            Self::Condition { .. } => "expression",
            Self::NoChoice { .. } => "no_choice",
            Self::UnsatisfiedJoin { .. } => "unsatisfied_join",
        };
        Failure { kind: kind.to_owned(), message: chain(self), attempts: 1 }
    }
}

/// An error with its causes, on one line.
#[must_use]
pub fn chain(err: &dyn std::error::Error) -> String {
    let mut text = err.to_string();
    let mut cause = err.source();
    while let Some(err) = cause {
        let next = err.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = err.source();
    }
    text
}

impl Run {
    /// Runs the root namespace until it exits.
    ///
    /// # Errors
    /// The store failed or the run belongs to somebody else; the run is then as it was last stored.
    pub async fn advance(&self, mut root: Namespace) -> Result<Exit, ExecError> {
        root.call = self.run_id.to_string();
        self.drive(&mut root).await
    }
}

/// The value of the channels that a graph gives back.
#[must_use]
pub fn output_of(graph: &Graph, state: &State) -> Value {
    state.output(graph)
}
