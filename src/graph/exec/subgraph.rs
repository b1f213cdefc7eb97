//! A `graph` node: another graph, run in a namespace below the one that calls it.

use std::sync::Arc;

use super::super::channel::{State, Write};
use super::super::expr::Template;
use super::super::model::{Graph, NodeKind};
use super::super::step::{self, Failure, Task};
use super::activation::{Activation, Custom};
use super::namespace::MAX_DEPTH;
use super::superstep::Event;
use super::{ExecError, Exit, Run};
use crate::ids::TaskId;

/// A subgraph to call.
pub(super) struct Call {
    pub(super) at: usize,
    pub(super) graph: Arc<Graph>,
    pub(super) state: Arc<State>,
    pub(super) path: String,
    pub(super) planned: step::Position,
    pub(super) begun: bool,
    /// Which call of the calling graph this is part of, and the attempt.
    pub(super) call: String,
    pub(super) attempt: u32,
}

impl Run {
    pub(super) async fn call(&self, call: Call, task: Task) -> Event {
        let at = call.at;
        Event::Below(at, self.call_subgraph(call, &task).await)
    }

    async fn call_subgraph(&self, call: Call, task: &Task) -> Result<Exit, ExecError> {
        let node = call.graph.node(task.node);
        let NodeKind::Graph { graph: called, input } = &node.kind else {
            return Ok(Exit::Failed(Failure {
                kind: "internal".to_owned(),
                message: "not a subgraph".to_owned(),
                attempts: 1,
            }));
        };
        let path = child_path(&call.path, &node.name, task.id);
        if path.matches('|').count() >= MAX_DEPTH {
            let message = format!("subgraphs call each other more than {MAX_DEPTH} deep");
            return Ok(Exit::Failed(Failure { kind: "too_deep".to_owned(), message, attempts: 1 }));
        }
        let state = match self.subgraph_input(&call, task, called, input) {
            Ok(state) => state,
            Err(failure) => return Ok(Exit::Failed(failure)),
        };
        match self
            .open_subgraph(path, called, call.planned.branch, call.planned, state, call.begun)
            .await?
        {
            Ok(mut ns) => {
                ns.call = format!("{}/{}", call.call, call.attempt);
                self.drive(&mut ns).await
            }
            Err(failure) => Ok(Exit::Failed(failure)),
        }
    }

    fn subgraph_input(
        &self,
        call: &Call,
        task: &Task,
        called: &Arc<Graph>,
        input: &[(String, Template)],
    ) -> Result<State, Failure> {
        let custom = Custom::new(false, false);
        let activation = Activation {
            run_id: self.run_id,
            thread_id: self.thread_id,
            fence: self.fence,
            generation: self.generation,
            sent_key: None,
            namespace: &call.path,
            planned: call.planned,
            task,
            attempt: 1,
            sends: 1,
            node: call.graph.node(task.node),
            previous: None,
            custom: &custom,
            graph: &call.graph,
            state: &call.state,
            ambient: &self.ambient,
        };
        let fail =
            |kind: &str, message: String| Failure { kind: kind.to_owned(), message, attempts: 1 };
        let mut state = State::initial(called);
        let mut writes = Vec::with_capacity(input.len());
        for (name, template) in input {
            let value =
                activation.eval(template).map_err(|err| fail("expression", err.to_string()))?;
            let channel = called.find_channel(name).ok_or_else(|| {
                fail("unknown_channel", format!("graph `{}` has no channel `{name}`", called.name))
            })?;
            writes.push(
                Write::new(called, channel, value)
                    .map_err(|err| fail("invalid_input", err.to_string()))?,
            );
        }
        state.apply(called, writes).map_err(|err| fail("invalid_input", err.to_string()))?;
        Ok(state)
    }
}

/// The namespace below an activation.
pub(super) fn child_path(path: &str, node: &str, task: TaskId) -> String {
    if path.is_empty() { format!("{node}:{task}") } else { format!("{path}|{node}:{task}") }
}
