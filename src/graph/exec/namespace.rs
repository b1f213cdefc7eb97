//! A namespace in memory, and its loop: one superstep after the other.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::FutureExt;
use futures::future::BoxFuture;

use super::super::channel::State;
use super::super::checkpoint::{
    Checkpointer, Commit, Decoder, Homes, LoadedRows, Restored, Source, decode_next, encode,
};
use super::super::model::{Graph, NodeIndex};
use super::super::step::{Failure, Position, first_nodes};
use super::superstep::StepEnd;
use super::{ExecError, Exit, Run};
use crate::ids::TaskId;

/// The deepest that subgraphs may call subgraphs.
pub(super) const MAX_DEPTH: usize = 16;

/// A namespace as it is between two supersteps.
#[derive(Debug)]
pub struct Namespace {
    /// Its path, empty for the root: `node:task` parts joined by `|`.
    pub path: String,
    /// The graph that runs in it.
    pub graph: Arc<Graph>,
    /// The channels.
    pub state: Arc<State>,
    /// Where they are stored.
    pub homes: Homes,
    /// The last checkpoint.
    pub position: Position,
    /// The seq at which this run, or this call of the subgraph, began.
    pub first_seq: i64,
    /// What runs next.
    pub next: Vec<NodeIndex>,
    /// What the superstep that is not complete already has.
    pub tasks: HashMap<TaskId, Restored>,
    /// Whether the superstep to come may have been begun before: by a process that died, or before a wait.
    pub begun: bool,
    /// Which call of its graph this is: the run, and the attempt of each calling activation on the way down. Empty
    /// until it is driven.
    pub call: String,
}

/// Puts a namespace together from what is stored.
///
/// # Errors
/// The store failed, or what it holds cannot be read with this graph.
pub async fn restore(
    checkpointer: &dyn Checkpointer,
    path: &str,
    graph: &Arc<Graph>,
) -> Result<Option<Namespace>, ExecError> {
    let Some(LoadedRows { rows, tasks }) = checkpointer.load(path).await? else { return Ok(None) };
    let Some(last) = rows.last() else { return Ok(None) };
    let (position, next) = (last.position, decode_next(graph, &last.next)?);
    let decoder = Decoder::new(graph).read(&rows)?;
    let refs = decoder.refs();
    let fetched =
        if refs.is_empty() { HashMap::new() } else { checkpointer.fetch(path, refs).await? };
    let (state, homes) = decoder.finish(fetched)?;
    Ok(Some(Namespace {
        path: path.to_owned(),
        graph: Arc::clone(graph),
        state: Arc::new(state),
        homes,
        position,
        first_seq: 0,
        next,
        tasks,
        begun: true,
        call: String::new(),
    }))
}

impl Namespace {
    /// The row of a state that came from outside: an input, an update, a fork. The caller stores it.
    #[must_use]
    pub fn depth(&self) -> usize {
        if self.path.is_empty() { 0 } else { 1 + self.path.matches('|').count() }
    }
}

impl Run {
    /// Runs a namespace until it exits.
    pub(super) fn drive<'a>(
        &'a self,
        ns: &'a mut Namespace,
    ) -> BoxFuture<'a, Result<Exit, ExecError>> {
        async move {
            let is_root = ns.path.is_empty();
            let mut may_stop_before = !self.options.resumed;
            loop {
                if is_root {
                    self.cursor.root_seq.store(ns.position.seq, Ordering::Relaxed);
                }
                if ns.next.is_empty() {
                    return Ok(Exit::Done(Arc::clone(&ns.state)));
                }
                if self.drain.load(Ordering::Relaxed) {
                    return Ok(Exit::Released);
                }
                if let Some(failure) = self.over_limit(ns) {
                    return Ok(Exit::Failed(failure));
                }
                let names = |nodes: &[NodeIndex]| -> Vec<String> {
                    nodes.iter().map(|node| ns.graph.node(*node).name.clone()).collect()
                };
                let ran = if is_root { names(&ns.next) } else { Vec::new() };
                if is_root
                    && may_stop_before
                    && self.options.interrupt_before.any(ran.iter().map(String::as_str))
                {
                    return Ok(Exit::Stopped);
                }
                may_stop_before = true;
                match self.superstep(ns).await? {
                    StepEnd::Next => {}
                    StepEnd::Exit(exit) => return Ok(exit),
                }
                if is_root {
                    self.cursor.place.store(0, Ordering::Relaxed);
                    if !ns.next.is_empty()
                        && self.options.interrupt_after.any(ran.iter().map(String::as_str))
                    {
                        return Ok(Exit::Stopped);
                    }
                }
            }
        }
        .boxed()
    }

    fn over_limit(&self, ns: &Namespace) -> Option<Failure> {
        let own = ns.graph.limits.supersteps;
        let most = self
            .options
            .supersteps
            .filter(|_| ns.path.is_empty())
            .map_or(own, |asked| asked.min(own));
        let made = ns.position.seq - ns.first_seq;
        (made >= i64::from(most)).then(|| Failure {
            kind: "superstep_limit".to_owned(),
            message: format!(
                "the run made {made} supersteps of graph `{}`, which is its limit (`limits: supersteps`)",
                ns.graph.name
            ),
            attempts: 1,
        })
    }

    /// Opens a subgraph's namespace: as stored, or with its input as its first checkpoint.
    pub(super) async fn open_subgraph(
        &self,
        path: String,
        graph: &Arc<Graph>,
        branch: i32,
        planned: Position,
        input: State,
        known: bool,
    ) -> Result<Result<Namespace, Failure>, ExecError> {
        if known && let Some(ns) = restore(self.checkpointer.as_ref(), &path, graph).await? {
            return Ok(Ok(ns));
        }
        let next = match first_nodes(graph, &input, &self.ambient) {
            Ok(next) => next,
            Err(err) => return Ok(Err(err.to_failure())),
        };
        let position = Position { branch, seq: 0 };
        let mut homes = Homes::initial(graph);
        // Seq 0 is a keyframe, so the changes need not be named.
        let row =
            encode(graph, &input, &mut homes, position, Source::Input, &[], false, &next, true);
        self.checkpointer
            .commit(Commit {
                namespace: path.clone(),
                planned,
                checkpoint: Some(row),
                writes: Vec::new(),
                waits: Vec::new(),
                settles: false,
                stream: Vec::new(),
                effects: Vec::new(),
                end: None,
            })
            .await?;
        Ok(Ok(Namespace {
            path,
            graph: Arc::clone(graph),
            state: Arc::new(input),
            homes,
            position,
            first_seq: 0,
            next,
            tasks: HashMap::new(),
            begun: false,
            call: String::new(),
        }))
    }
}
