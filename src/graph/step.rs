//! One superstep as two pure functions: [`plan`] says which activations run, [`apply`] turns their
//! results into the next state and the next nodes.
//!
//! Activations read the state as it was when the superstep was planned; their writes meet only in
//! `apply`. Edges are judged on the state that `apply` made, once for each node, after all of its
//! items: so a `choose` sees what the whole superstep wrote, and a fan-out goes on once.
//!
//! **Invariant:** the result depends on the results' position in the graph, never on who finished first.

use serde_json::Value;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::channel::{Change, State, View, Write, WriteError};
use super::expr::{EvalError, Scope};
use super::model::{Choice, Graph, JoinIndex, NodeIndex, Route};
use super::value::Shared;
use crate::ids::{TaskId, ThreadId};

/// The most activations of one superstep.
pub const MAX_TASKS: usize = 10_000;

/// Where a checkpoint stands within its namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Position {
    /// Grows by one with each fork of the thread.
    pub branch: i32,
    /// Grows by one with each checkpoint of the branch, and goes on from its parent's in a fork.
    pub seq: i64,
}

/// The names in scope beside the state: who runs, and what the operator lets graphs see.
#[derive(Debug, Clone)]
pub struct Ambient {
    /// `run`: its id, thread, graph and metadata.
    pub run: Shared,
    /// `env`: allowed environment variables.
    pub env: Shared,
}

/// An activation to run.
#[derive(Debug, Clone)]
pub struct Task {
    /// Its durable name.
    pub id: TaskId,
    /// Which node.
    pub node: NodeIndex,
    /// Which item of a `for_each`.
    pub item: Option<Item>,
}

/// One item of a `for_each`.
#[derive(Debug, Clone)]
pub struct Item {
    /// Its position in the list.
    pub index: u32,
    /// The item.
    pub value: Shared,
}

/// A node of the superstep with its activations; none when its `for_each` list is empty.
#[derive(Debug)]
pub struct Planned {
    /// Which node.
    pub node: NodeIndex,
    /// Its activations, or why its list could not be made.
    pub tasks: Result<Vec<Task>, Failure>,
}

/// Why an activation failed for good. It is what `error` holds in the handler.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Failure {
    /// A stable word: `timeout`, `expression`, `job_failed`, ...
    pub kind: String,
    /// What happened, for people.
    pub message: String,
    /// How many attempts there were.
    pub attempts: u32,
}

/// How a node of the superstep ended.
#[derive(Debug)]
pub struct Finished {
    /// Which node.
    pub node: NodeIndex,
    /// The writes of its activations in item order, or its first failure with the writes of those that succeeded.
    pub writes: Vec<Write>,
    /// Nodes that its code chose.
    pub goto: Vec<NodeIndex>,
    /// Set when an activation failed and the node's `on_error` is to be taken.
    pub failure: Option<Failure>,
}

/// What a superstep made of the state.
#[derive(Debug)]
pub struct Applied {
    /// What changed.
    pub changes: Vec<Change>,
    /// What runs next, in the order of the file; empty when the run is done.
    pub next: Vec<NodeIndex>,
    /// Whether a join's arrivals changed.
    pub joins_changed: bool,
}

/// Why a superstep cannot be applied: the run fails.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// A channel refused a write.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A condition of an edge could not be evaluated.
    #[error("the edge after `{node}`: `{source_text}` failed")]
    Condition {
        /// The node that the edge leaves; `start` for the first.
        node: String,
        /// The condition.
        source_text: String,
        /// Why.
        #[source]
        source: EvalError,
    },
    /// No line of a `choose` matched.
    #[error("no line of `choose` after `{node}` matches; add a last line without a condition")]
    NoChoice {
        /// The node that the edge leaves.
        node: String,
    },
    /// Nothing is left to run, but a join still waits.
    #[error(
        "the run came to its end while the join to {to} still waits for {missing}, which cannot run any more"
    )]
    UnsatisfiedJoin {
        /// What the join leads to.
        to: String,
        /// Which sources are missing.
        missing: String,
    },
}

/// The durable name of an activation: the same after a restart, another fork, never of two activations.
#[must_use]
pub fn task_id(
    thread: ThreadId,
    namespace: &str,
    planned: Position,
    node: &str,
    item: Option<u32>,
) -> TaskId {
    let mut hash = Sha256::new();
    hash.update(thread.0.as_bytes());
    hash.update(planned.branch.to_be_bytes());
    hash.update(planned.seq.to_be_bytes());
    hash.update(item.map_or(-1, i64::from).to_be_bytes());
    hash.update(u64::try_from(namespace.len()).unwrap_or(u64::MAX).to_be_bytes());
    hash.update(namespace.as_bytes());
    hash.update(node.as_bytes());
    TaskId(uuid_of(&hash.finalize()))
}

/// The id of an activation's `ordinal`th interrupt: 32 hexadecimal digits.
#[must_use]
pub fn interrupt_id(task: TaskId, ordinal: u32) -> String {
    let mut hash = Sha256::new();
    hash.update(b"interrupt");
    hash.update(task.0.as_bytes());
    hash.update(ordinal.to_be_bytes());
    uuid_of(&hash.finalize()).simple().to_string()
}

/// A custom (version 8) UUID from the first 128 bits of a hash.
#[must_use]
pub fn uuid_of(hash: &[u8]) -> Uuid {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

/// The activations of the superstep that follows the checkpoint at `planned`.
#[must_use]
pub fn plan(
    graph: &Graph,
    state: &State,
    ambient: &Ambient,
    place: (ThreadId, &str, Position),
    next: &[NodeIndex],
) -> Vec<Planned> {
    next.iter()
        .map(|node| Planned { node: *node, tasks: tasks_of(graph, state, ambient, place, *node) })
        .collect()
}

fn tasks_of(
    graph: &Graph,
    state: &State,
    ambient: &Ambient,
    (thread, namespace, planned): (ThreadId, &str, Position),
    index: NodeIndex,
) -> Result<Vec<Task>, Failure> {
    let node = graph.node(index);
    let Some(for_each) = &node.for_each else {
        return Ok(vec![Task {
            id: task_id(thread, namespace, planned, &node.name, None),
            node: index,
            item: None,
        }]);
    };
    let fail = |message: String| Failure { kind: "for_each".to_owned(), message, attempts: 1 };
    let view = View { graph, state };
    let error = error_for(state, index);
    let mut vars = vec![("run", ambient.run.clone()), ("env", ambient.env.clone())];
    vars.extend(error.map(|error| ("error", error)));
    let items = match for_each.items.eval(&Scope { state: &view, vars: &vars }) {
        Ok(Value::Array(items)) => items,
        Ok(other) => {
            return Err(fail(format!(
                "`for_each` of `{}` gives {}, and must give a list",
                node.name,
                super::channel::shorten(&other.to_string())
            )));
        }
        Err(err) => return Err(fail(format!("`for_each` of `{}` failed: {err}", node.name))),
    };
    if items.len() > MAX_TASKS {
        return Err(fail(format!(
            "`for_each` of `{}` has {} items; the limit is {MAX_TASKS}",
            node.name,
            items.len()
        )));
    }
    Ok((0_u32..)
        .zip(items)
        .map(|(at, value)| Task {
            id: task_id(thread, namespace, planned, &node.name, Some(at)),
            node: index,
            item: Some(Item { index: at, value: Shared::new(value) }),
        })
        .collect())
}

/// The error that `handler` is to handle in this superstep.
#[must_use]
pub fn error_for(state: &State, handler: NodeIndex) -> Option<Shared> {
    state
        .errors
        .iter()
        .find(|(node, _)| *node == handler)
        .map(|(_, error)| Shared::new(error.clone()))
}

/// Applies an input or an update from outside: its writes, and nothing of the graph's edges.
///
/// # Errors
/// A channel that refuses a write.
pub fn apply_writes(
    graph: &Graph,
    state: &mut State,
    writes: Vec<Write>,
) -> Result<Vec<Change>, WriteError> {
    state.apply(graph, writes)
}

/// The nodes that run first.
///
/// # Errors
/// A condition at the start that fails, or no line of it that matches.
pub fn first_nodes(
    graph: &Graph,
    state: &State,
    ambient: &Ambient,
) -> Result<Vec<NodeIndex>, StepError> {
    let mut next = Vec::new();
    follow(graph, state, ambient, "start", &graph.start, &mut next)?;
    Ok(sorted(next))
}

/// Applies the results of a superstep. `finished` is in the order of the plan.
///
/// # Errors
/// See [`StepError`]; the state is then half-changed and must be dropped.
pub fn apply(
    graph: &Graph,
    state: &mut State,
    ambient: &Ambient,
    mut finished: Vec<Finished>,
) -> Result<Applied, StepError> {
    let writes: Vec<Write> =
        finished.iter_mut().flat_map(|node| std::mem::take(&mut node.writes)).collect();
    let changes = state.apply(graph, writes)?;
    state.errors.clear();
    let mut next = Vec::new();
    let mut joins_changed = false;
    for Finished { node: index, goto, failure, .. } in finished {
        let node = graph.node(index);
        if let Some(failure) = failure {
            let Some(handler) = node.on_error else { continue };
            if !state.errors.iter().any(|(known, _)| *known == handler) {
                state.errors.push((handler, error_value(&node.name, &failure)));
            }
            next.push(handler);
            continue;
        }
        next.extend(goto);
        for join in &node.joins {
            joins_changed |= state.arrived[join.0 as usize].insert(index);
        }
        follow(graph, state, ambient, &node.name, &node.route, &mut next)?;
    }
    for (at, join) in (0_u32..).map(JoinIndex).zip(&graph.joins) {
        let arrived = &mut state.arrived[at.0 as usize];
        if !arrived.is_empty() && join.sources.iter().all(|source| arrived.contains(source)) {
            arrived.clear();
            joins_changed = true;
            next.extend(join.to.iter().copied());
        }
    }
    let next = sorted(next);
    if next.is_empty() {
        check_joins(graph, state)?;
    }
    Ok(Applied { changes, next, joins_changed })
}

fn error_value(node: &str, failure: &Failure) -> Value {
    serde_json::json!({
        "node": node, "kind": failure.kind, "message": failure.message, "attempts": failure.attempts,
    })
}

fn sorted(mut next: Vec<NodeIndex>) -> Vec<NodeIndex> {
    next.sort_unstable();
    next.dedup();
    next
}

fn follow(
    graph: &Graph,
    state: &State,
    ambient: &Ambient,
    from: &str,
    route: &Route,
    next: &mut Vec<NodeIndex>,
) -> Result<(), StepError> {
    next.extend(route.to.iter().copied());
    for choices in &route.choose {
        next.extend(choose(graph, state, ambient, from, choices)?.to.iter().copied());
    }
    Ok(())
}

fn choose<'a>(
    graph: &Graph,
    state: &State,
    ambient: &Ambient,
    from: &str,
    choices: &'a [Choice],
) -> Result<&'a Choice, StepError> {
    let view = View { graph, state };
    let vars = [("run", ambient.run.clone()), ("env", ambient.env.clone())];
    for choice in choices {
        let Some(when) = &choice.when else { return Ok(choice) };
        let holds = when.eval_bool(&Scope { state: &view, vars: &vars }).map_err(|source| {
            StepError::Condition {
                node: from.to_owned(),
                source_text: when.source().to_owned(),
                source,
            }
        })?;
        if holds {
            return Ok(choice);
        }
    }
    Err(StepError::NoChoice { node: from.to_owned() })
}

fn check_joins(graph: &Graph, state: &State) -> Result<(), StepError> {
    for (join, arrived) in graph.joins.iter().zip(&state.arrived) {
        if arrived.is_empty() {
            continue;
        }
        let name = |index: &NodeIndex| format!("`{}`", graph.node(*index).name);
        let missing: Vec<String> =
            join.sources.iter().filter(|source| !arrived.contains(source)).map(name).collect();
        let to: Vec<String> = join.to.iter().map(name).collect();
        return Err(StepError::UnsatisfiedJoin {
            to: if to.is_empty() { "`end`".to_owned() } else { to.join(", ") },
            missing: missing.join(", "),
        });
    }
    Ok(())
}
