//! How a run begins: an input, a command, or a fork becomes the run's first checkpoint.
//!
//! **Invariant:** pure, like a superstep: the same thread state and the same order give the same row.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::channel::{Change, State, Write, WriteError};
use super::checkpoint::{CheckpointRow, Homes, Source, encode};
use super::model::{ChannelIndex, Graph, NodeIndex};
use super::step::{Ambient, Position, StepError, first_nodes};

/// What a run begins with, as it is stored until then.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Order {
    /// The graph's input; `None` goes on where the thread stands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<Value>,
    /// Channel updates to apply first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub update: Vec<(String, Value)>,
    /// Nodes to run in place of those that would be next.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub goto: Vec<String>,
}

/// Where a thread stands.
#[derive(Debug)]
pub struct Standing {
    /// Its channels.
    pub state: State,
    /// Where they are stored.
    pub homes: Homes,
    /// Its last checkpoint; `None` when it has none.
    pub position: Option<Position>,
    /// What would run next.
    pub next: Vec<NodeIndex>,
}

/// What a run begins from.
#[derive(Debug)]
pub struct Begun {
    /// Its first checkpoint, to be stored; `None` when it goes on from the one that is there.
    pub row: Option<CheckpointRow>,
    /// Where the run stands then.
    pub position: Position,
    /// The state that the first checkpoint holds, where it is stored, and what runs next.
    pub start: Option<(State, Homes, Vec<NodeIndex>)>,
}

/// Why a run cannot begin so.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// The input breaks the schema. Clients that show nothing but the message see the place too.
    #[error("input{path}: {reason}")]
    Input {
        /// JSON pointer inside the input.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// A channel refuses an update.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A name that the graph does not have.
    #[error("graph `{graph}` has no {what} `{name}`")]
    Unknown {
        /// `channel` or `node`.
        what: &'static str,
        /// The name.
        name: String,
        /// The graph.
        graph: String,
    },
    /// The edges from `start` cannot be followed.
    #[error(transparent)]
    Step(#[from] StepError),
    /// There is nothing to go on from.
    #[error("the thread has no checkpoint to go on from; give the run an input")]
    Nothing,
}

impl Standing {
    /// A thread on which nothing ran.
    #[must_use]
    pub fn empty(graph: &Graph) -> Self {
        Self {
            state: State::initial(graph),
            homes: Homes::initial(graph),
            position: None,
            next: Vec::new(),
        }
    }
}

/// Checks an order as far as that goes without the thread's state.
///
/// # Errors
/// See [`OrderError`].
pub fn check(graph: &Graph, order: &Order) -> Result<(), OrderError> {
    if let Some(input) = &order.input {
        check_input(graph, input)?;
    }
    writes_of(graph, order)?;
    nodes_of(graph, &order.goto)?;
    Ok(())
}

fn check_input(graph: &Graph, input: &Value) -> Result<(), OrderError> {
    if input.is_null() {
        return Err(OrderError::Input {
            path: String::new(),
            reason: "the input is null; it must be an object".to_owned(),
        });
    }
    if let (Some(given), false) = (input.as_object(), graph.input.is_empty()) {
        let known: BTreeSet<&str> =
            graph.input.iter().map(|at| graph.channel(*at).name.as_str()).collect();
        if let Some(name) = given.keys().find(|name| !known.contains(name.as_str())) {
            let known: Vec<&str> = known.into_iter().collect();
            return Err(OrderError::Input {
                path: format!("/{name}"),
                reason: format!(
                    "`{name}` is not an input of graph `{}`; its inputs are {}",
                    graph.name,
                    known.join(", ")
                ),
            });
        }
    }
    graph.input_validator.validate(input).map_err(|err| OrderError::Input {
        path: err.instance_path().to_string(),
        reason: super::channel::shorten(&err.to_string()),
    })
}

fn writes_of(graph: &Graph, order: &Order) -> Result<Vec<Write>, OrderError> {
    let input = order.input.as_ref().and_then(Value::as_object).into_iter().flatten();
    let update = order.update.iter().map(|(name, value)| (name, value));
    input
        .chain(update)
        .map(|(name, value)| {
            let channel =
                graph.find_channel(name).ok_or_else(|| unknown(graph, "channel", name))?;
            Ok(Write::new(graph, channel, value.clone())?)
        })
        .collect()
}

fn nodes_of(graph: &Graph, names: &[String]) -> Result<Vec<NodeIndex>, OrderError> {
    let mut nodes = names
        .iter()
        .map(|name| graph.find_node(name).ok_or_else(|| unknown(graph, "node", name)))
        .collect::<Result<Vec<NodeIndex>, OrderError>>()?;
    nodes.sort_unstable();
    nodes.dedup();
    Ok(nodes)
}

fn unknown(graph: &Graph, what: &'static str, name: &str) -> OrderError {
    OrderError::Unknown { what, name: name.to_owned(), graph: graph.name.clone() }
}

/// Makes a run's first checkpoint.
///
/// With `fork_branch` the row opens that branch and holds the whole state; `fresh_graph` says that the thread's last
/// run had another graph, so that this graph's names have to be written down anew, and its defaults hold where the
/// other graph left nothing.
///
/// # Errors
/// See [`OrderError`].
pub fn begin(
    graph: &Graph,
    ambient: &Ambient,
    standing: Standing,
    order: &Order,
    fork_branch: Option<i32>,
    fresh_graph: bool,
) -> Result<Begun, OrderError> {
    let Standing { mut state, mut homes, position: last, next: standing_next } = standing;
    let changes_nothing = order.input.is_none() && order.update.is_empty() && order.goto.is_empty();
    if changes_nothing && fork_branch.is_none() {
        let position = last.ok_or(OrderError::Nothing)?;
        return Ok(Begun { row: None, position, start: None });
    }
    if fresh_graph {
        // The row is a keyframe, so they are written down without being named as changes.
        state.fill_defaults(graph);
    }
    if let Some(input) = &order.input {
        check_input(graph, input)?;
        // A new input starts over: what joins had gathered belongs to the input before.
        state.arrived.iter_mut().for_each(BTreeSet::clear);
        state.errors.clear();
    }
    let changes = state.apply(graph, writes_of(graph, order)?)?;
    let changes = with_defaults(graph, &state, last, changes);
    let next = if !order.goto.is_empty() {
        nodes_of(graph, &order.goto)?
    } else if order.input.is_some() {
        first_nodes(graph, &state, ambient)?
    } else {
        standing_next
    };
    let position = Position {
        branch: fork_branch.or(last.map(|last| last.branch)).unwrap_or(0),
        seq: last.map_or(0, |last| last.seq + 1),
    };
    let source = if fork_branch.is_some() { Source::Fork } else { Source::Input };
    let keyframe = fork_branch.is_some() || fresh_graph;
    let joins = order.input.is_some() && last.is_some() && !graph.joins.is_empty();
    let mut row =
        encode(graph, &state, &mut homes, position, source, &changes, joins, &next, keyframe);
    row.parent = fork_branch.and(last);
    Ok(Begun { row: Some(row), position, start: Some((state, homes, next)) })
}

/// A thread's first row also names the defaults, so that they are a part of its history.
fn with_defaults(
    graph: &Graph,
    state: &State,
    last: Option<Position>,
    mut changes: Vec<Change>,
) -> Vec<Change> {
    if last.is_some() {
        return changes;
    }
    for at in (0_u32..).take(graph.channels.len()).map(ChannelIndex) {
        let named = changes.iter().any(|change| match change {
            Change::Set(channel) | Change::Appended { channel, .. } => *channel == at,
        });
        if !named && state.get(at).is_some() {
            changes.push(Change::Set(at));
        }
    }
    changes
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::compile::{NoNodes, compile_stored};
    use super::super::value::Shared;
    use super::*;

    fn check(fresh: bool, expected: &Value) {
        let file = json!({
            "name": "g",
            "state": {"n": {"type": "integer", "default": 3}, "m": {"type": "integer", "default": 4},
                      "k": {"type": "integer"}},
            "nodes": {"a": {"set": {"k": 1}}},
            "edges": ["start -> a -> end"],
        });
        let graph = compile_stored(&file.to_string(), &|_| None, &NoNodes).unwrap();
        let mut standing = Standing::empty(&graph);
        // As it is read from a thread on which a graph ran that had `m` alone.
        standing.position = Some(Position { branch: 0, seq: 5 });
        for (at, value) in [(0, None), (1, Some(json!(9))), (2, None)] {
            standing.state.put(ChannelIndex(at), value);
        }
        let ambient = Ambient { run: Shared::new(json!({})), env: Shared::new(json!({})) };
        let order = Order { input: Some(json!({})), ..Order::default() };
        let begun = begin(&graph, &ambient, standing, &order, None, fresh).unwrap();
        let row = begun.row.unwrap();
        let keyframe = row.keyframe.map(|bytes| serde_json::from_slice::<Value>(&bytes).unwrap());
        assert_eq!(keyframe.unwrap_or_default(), *expected);
    }

    #[test]
    fn a_thread_that_goes_on_with_another_graph_has_that_graph_s_defaults() {
        check(true, &json!({"n": 3, "m": 9}));
        check(false, &Value::Null);
    }
}
