//! States of a thread: latest, by checkpoint, history, update from outside.

use std::collections::HashMap;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use serde_json::{Value, json};
use sqlx::PgConnection;
use uuid::Uuid;

use super::api::{
    Actor, CheckpointRef, HistoryRequest, InterruptView, Object, StateRequest, TaskView,
    ThreadState, UpdateState,
};
use super::error::ServiceError;
use super::{Services, accept, checkpoint_id};
use crate::graph::channel::{State, Write, merged};
use crate::graph::checkpoint::{Restored, Source, WaitKind, encode};
use crate::graph::exec::TaskRecord;
use crate::graph::input::{Order, OrderError, Standing, begin};
use crate::graph::model::{Graph, NodeKind};
use crate::graph::step::{self, Ambient, Finished, Position, Task};
use crate::graph::value::Shared;
use crate::ids::{RunId, TaskId, ThreadId};
use crate::store::checkpoints::{self, Kept, Listed};
use crate::store::{crash, pending, runs};

/// Updates of one request, applied in turn.
const MAX_UPDATES: usize = 1000;
/// States of subgraphs inside states.
const MAX_DEPTH: usize = 16;

/// A checkpoint with its namespace, to be shown.
struct Shown<'a> {
    thread: ThreadId,
    namespace: &'a str,
    graph: &'a Arc<Graph>,
    listed: Listed,
    subgraphs: bool,
    /// Whether it is the thread's last one: then what was answered is no longer asked.
    latest: bool,
    depth: usize,
}

impl Services {
    /// One state of a thread; the empty one when nothing ran on it.
    pub async fn thread_state(
        &self,
        actor: &Actor,
        thread: ThreadId,
        request: StateRequest,
    ) -> Result<ThreadState, ServiceError> {
        self.get_thread(actor, thread).await?;
        let mut db = self.pool().acquire().await?;
        let namespace = request.checkpoint_ns.as_str();
        let newest = checkpoints::page(&mut db, thread, namespace, None, 1).await?.pop();
        let listed = match &request.checkpoint_id {
            None => newest.clone(),
            Some(id) => {
                let position = checkpoint_id::decode(thread, id);
                let position = position.ok_or_else(|| ServiceError::not_found("checkpoint", id))?;
                let found = checkpoints::find(&mut db, thread, namespace, position).await?;
                Some(found.ok_or_else(|| ServiceError::not_found("checkpoint", id))?)
            }
        };
        let Some(listed) = listed else { return Ok(ThreadState::empty()) };
        let graph = self.graph_at(&mut db, thread, &listed, namespace).await?;
        let latest = newest.is_some_and(|newest| newest.position == listed.position);
        let shown = Shown {
            thread,
            namespace,
            graph: &graph,
            listed,
            subgraphs: request.subgraphs,
            latest,
            depth: 0,
        };
        let position = shown.listed.position;
        let mut kept = Kept::read(&mut db, thread, namespace, &[position]).await?;
        self.show(&mut db, shown, Some(&mut kept)).await
    }

    /// States of a thread, newest first.
    pub async fn thread_history(
        &self,
        actor: &Actor,
        thread: ThreadId,
        request: HistoryRequest,
    ) -> Result<Vec<ThreadState>, ServiceError> {
        self.get_thread(actor, thread).await?;
        let limit = self.page_limit(request.limit)?;
        let namespace = request.checkpoint_ns.as_str();
        let mut before = match &request.before {
            None => None,
            Some(id) => {
                let position = checkpoint_id::decode(thread, id);
                Some(position.ok_or_else(|| {
                    ServiceError::invalid_at(
                        "/before",
                        format!("{id} names no checkpoint of this thread"),
                    )
                })?)
            }
        };
        let mut db = self.pool().acquire().await?;
        let mut graphs: HashMap<RunId, Arc<Graph>> = HashMap::new();
        let mut states = Vec::new();
        let mut latest = before.is_none();
        let wanted = usize::try_from(limit).unwrap_or(usize::MAX);
        while states.len() < wanted {
            let page = checkpoints::page(&mut db, thread, namespace, before, limit).await?;
            let Some(last) = page.last() else { break };
            before = Some(last.position);
            let positions: Vec<_> = page.iter().map(|listed| listed.position).collect();
            let mut kept = match request.values {
                true => Some(Kept::read(&mut db, thread, namespace, &positions).await?),
                false => None,
            };
            for listed in page {
                let is_latest = std::mem::take(&mut latest);
                if states.len() == wanted || !matches(&request.metadata, &listed) {
                    continue;
                }
                let graph = match graphs.get(&listed.run_id) {
                    Some(graph) => Arc::clone(graph),
                    None => {
                        let graph = self.graph_at(&mut db, thread, &listed, namespace).await?;
                        graphs.insert(listed.run_id, Arc::clone(&graph));
                        graph
                    }
                };
                let shown = Shown {
                    thread,
                    namespace,
                    graph: &graph,
                    listed,
                    subgraphs: false,
                    latest: is_latest,
                    depth: 0,
                };
                states.push(self.show(&mut db, shown, kept.as_mut()).await?);
            }
        }
        Ok(states)
    }

    /// The graph that made a checkpoint: of its run, else of the thread; in a subgraph's namespace, the one called.
    async fn graph_at(
        &self,
        db: &mut PgConnection,
        thread: ThreadId,
        listed: &Listed,
        namespace: &str,
    ) -> Result<Arc<Graph>, ServiceError> {
        let hash = match runs::find(db, listed.run_id).await? {
            Some(run) => Some(run.graph_hash),
            None => runs::graph_of(db, thread).await?,
        };
        let hash = hash.ok_or_else(|| ServiceError::not_found("graph of thread", thread))?;
        let mut graph = self.versions().get(&hash).await?;
        for part in namespace.split('|').filter(|part| !part.is_empty()) {
            let name = part.split(':').next().unwrap_or_default();
            let called = graph.find_node(name).and_then(|index| match &graph.node(index).kind {
                NodeKind::Graph { graph, .. } => Some(Arc::clone(graph)),
                _ => None,
            });
            graph = called.ok_or_else(|| ServiceError::not_found("namespace", namespace))?;
        }
        Ok(graph)
    }

    /// Shows a checkpoint; without `kept`, without its values and activations.
    fn show<'a>(
        &'a self,
        db: &'a mut PgConnection,
        shown: Shown<'a>,
        kept: Option<&'a mut Kept>,
    ) -> BoxFuture<'a, Result<ThreadState, ServiceError>> {
        async move {
            let Shown { graph, listed, latest, .. } = &shown;
            let position = listed.position;
            let next: Vec<&str> = listed.next.split(',').filter(|name| !name.is_empty()).collect();
            let Some(kept) = kept else {
                let next = next.iter().map(|name| (*name).to_owned()).collect();
                return Ok(state_view(&shown, json!({}), next, Vec::new(), Vec::new()));
            };
            let standing = kept.standing(db, position, graph).await?;
            let nodes: Vec<_> = next.iter().filter_map(|name| graph.find_node(name)).collect();
            let tasks = self.planned(&shown, &standing.state, &nodes);
            let next = if tasks.is_empty() {
                next.iter().map(|name| (*name).to_owned()).collect()
            } else {
                tasks.iter().map(|task| graph.node(task.node).name.clone()).collect()
            };
            let mut restored = kept.take_tasks(position);
            let values = standing.state.to_json(graph);
            let latest = *latest;
            let mut views = Vec::with_capacity(tasks.len());
            for task in &tasks {
                let stored = restored.remove(&task.id);
                views.push(self.task_view(db, &shown, task, stored, latest).await?);
            }
            let interrupts = views.iter().flat_map(|view| view.interrupts.clone()).collect();
            Ok(state_view(&shown, values, next, views, interrupts))
        }
        .boxed()
    }

    fn planned(
        &self,
        shown: &Shown<'_>,
        state: &State,
        nodes: &[crate::graph::model::NodeIndex],
    ) -> Vec<Task> {
        let ambient = Ambient { run: Shared::new(json!({})), env: Shared::new(self.env().clone()) };
        let place = (shown.thread, shown.namespace, shown.listed.position);
        let plan = step::plan(shown.graph, state, &ambient, place, nodes);
        plan.into_iter().filter_map(|planned| planned.tasks.ok()).flatten().collect()
    }

    async fn task_view(
        &self,
        db: &mut PgConnection,
        shown: &Shown<'_>,
        task: &Task,
        stored: Option<Restored>,
        latest: bool,
    ) -> Result<TaskView, ServiceError> {
        let node = shown.graph.node(task.node);
        let record: Option<TaskRecord> = stored
            .as_ref()
            .and_then(|stored| serde_json::from_slice(stored.writes.as_deref()?).ok());
        let wait =
            stored.and_then(|stored| stored.wait).filter(|wait| wait.kind == WaitKind::Interrupt);
        let asked = wait.filter(|wait| !(latest && wait.settled)).and_then(|wait| wait.data);
        let mut interrupts: Vec<InterruptView> =
            asked.and_then(|data| interrupt_view(&data)).into_iter().collect();
        let (checkpoint, state) = match &node.kind {
            NodeKind::Graph { graph, .. } => {
                let namespace = child(shown.namespace, &node.name, task.id);
                if latest {
                    interrupts.extend(self.asked_below(db, shown, &namespace).await?);
                }
                let state = self.state_below(db, shown, graph, &namespace).await?;
                let reference = CheckpointRef {
                    thread_id: shown.thread,
                    checkpoint_ns: namespace,
                    checkpoint_id: None,
                    checkpoint_map: None,
                };
                (Some(reference), state)
            }
            _ => (None, None),
        };
        let mut path = vec![Value::from("node"), Value::from(node.name.clone())];
        path.extend(task.item.as_ref().map(|item| Value::from(item.index)));
        let error = record
            .as_ref()
            .and_then(|record| record.f.as_ref())
            .map(|failure| json!({ "error": failure.kind, "message": failure.message }));
        Ok(TaskView {
            id: task.id.to_string(),
            name: node.name.clone(),
            path,
            error,
            interrupts,
            checkpoint,
            state: state.map(Box::new),
            result: record
                .filter(|record| record.f.is_none())
                .map(|record| Value::Object(record.w.into_iter().collect())),
        })
    }

    /// Questions of the subgraphs below a namespace.
    async fn asked_below(
        &self,
        db: &mut PgConnection,
        shown: &Shown<'_>,
        namespace: &str,
    ) -> Result<Vec<InterruptView>, ServiceError> {
        let position = shown.listed.position;
        let open = pending::open(db, shown.thread, position.branch, position.seq).await?;
        let below = |path: &str| {
            path == namespace
                || path.strip_prefix(namespace).is_some_and(|rest| rest.starts_with('|'))
        };
        Ok(open
            .into_iter()
            .filter(|waiting| waiting.kind == "interrupt" && below(&waiting.namespace))
            .filter_map(|waiting| interrupt_view(&waiting.data?))
            .collect())
    }

    async fn state_below(
        &self,
        db: &mut PgConnection,
        shown: &Shown<'_>,
        graph: &Arc<Graph>,
        namespace: &str,
    ) -> Result<Option<ThreadState>, ServiceError> {
        if !shown.subgraphs || shown.depth >= MAX_DEPTH {
            return Ok(None);
        }
        let Some(listed) = checkpoints::page(db, shown.thread, namespace, None, 1).await?.pop()
        else {
            return Ok(None);
        };
        let below = Shown {
            thread: shown.thread,
            namespace,
            graph,
            listed,
            subgraphs: true,
            latest: shown.latest,
            depth: shown.depth + 1,
        };
        let mut kept = Kept::read(db, shown.thread, namespace, &[below.listed.position]).await?;
        self.show(db, below, Some(&mut kept)).await.map(Some)
    }

    /// Changes the state of an idle thread; answers the checkpoint that this made.
    ///
    /// With `as_node` the run goes on as if that node had written the values; without, what is next stays next.
    pub async fn update_state(
        &self,
        actor: &Actor,
        thread: ThreadId,
        request: UpdateState,
    ) -> Result<CheckpointRef, ServiceError> {
        if !request.checkpoint_ns.is_empty() {
            return Err(ServiceError::invalid_at(
                "/checkpoint/checkpoint_ns",
                "only the root namespace can be updated",
            ));
        }
        let updates = updates_of(&request.values)?;
        let mut tx = self.transaction().await?;
        let missing = || ServiceError::not_found("thread", thread);
        let locked = runs::lock_thread(&mut tx, thread).await?.ok_or_else(missing)?;
        if locked.user_id != actor.user_id {
            return Err(missing());
        }
        if let Some(active) = locked.active_run {
            return Err(ServiceError::Conflict(format!(
                "thread {thread} is busy with run {active}: its state can be updated when that has ended"
            )));
        }
        let graph = match &locked.graph_hash {
            Some(hash) => self.versions().get(hash).await?,
            None => self.graph_named(&mut tx, thread).await?,
        };
        let (branch, seq) = match &request.checkpoint_id {
            None => (locked.branch, None),
            Some(id) => {
                let at = checkpoint_id::decode(thread, id)
                    .ok_or_else(|| ServiceError::not_found("checkpoint", id))?;
                (at.branch, Some(at.seq))
            }
        };
        let standing = checkpoints::standing(&mut tx, thread, branch, seq, &graph).await?;
        if let (Some(id), true) =
            (&request.checkpoint_id, standing.position.map(|at| at.seq) != seq)
        {
            return Err(ServiceError::not_found("checkpoint", id));
        }
        let head =
            checkpoints::page(&mut tx, thread, "", None, 1).await?.pop().map(|head| head.position);
        let fork = (head != standing.position).then_some(locked.branch + 1);
        let (row, state, ends) = updated_row(
            &graph,
            &self.update_ambient(),
            standing,
            updates,
            request.as_node.as_deref(),
            fork,
        )?;
        pending::abandon(&mut tx, thread).await?;
        checkpoints::insert(&mut tx, thread, RunId(Uuid::nil()), &row).await?;
        runs::delete_followups(&mut tx, thread).await?;
        let status = if ends { "idle" } else { "interrupted" };
        let values = state.to_json(&graph).to_string().into_bytes();
        runs::updated(&mut tx, thread, row.position.branch, &graph.hash.0, status, &values).await?;
        crash::commit(tx, "update").await?;
        Ok(reference(thread, "", row.position))
    }

    fn update_ambient(&self) -> Ambient {
        Ambient { run: Shared::new(json!({})), env: Shared::new(self.env().clone()) }
    }

    /// For a thread on which nothing ran: the graph that its metadata names.
    async fn graph_named(
        &self,
        db: &mut PgConnection,
        thread: ThreadId,
    ) -> Result<Arc<Graph>, ServiceError> {
        let name = runs::graph_id_of(db, thread).await?;
        let name = name.ok_or_else(|| {
            ServiceError::invalid("nothing ran on this thread, and its metadata names no graph (`graph_id`): its state has no form yet")
        })?;
        self.graphs().get(&name).cloned().ok_or_else(|| ServiceError::not_found("graph", name))
    }
}

fn updates_of(values: &Value) -> Result<Vec<Object>, ServiceError> {
    let bad = || {
        ServiceError::invalid_at(
            "/values",
            "`values` must be an object, a list of objects, or null",
        )
    };
    match values {
        Value::Null => Ok(Vec::new()),
        Value::Object(update) => Ok(vec![update.clone()]),
        Value::Array(updates) if updates.len() <= MAX_UPDATES => {
            updates.iter().map(|update| update.as_object().cloned().ok_or_else(bad)).collect()
        }
        Value::Array(_) => Err(ServiceError::invalid_at(
            "/values",
            format!("at most {MAX_UPDATES} updates are accepted"),
        )),
        _ => Err(bad()),
    }
}

/// The row of an update, the state that it makes, and whether nothing is next.
fn updated_row(
    graph: &Graph,
    ambient: &Ambient,
    standing: Standing,
    updates: Vec<Object>,
    as_node: Option<&str>,
    fork: Option<i32>,
) -> Result<(crate::graph::checkpoint::CheckpointRow, State, bool), ServiceError> {
    let failed = |err: &dyn std::error::Error| {
        ServiceError::invalid_at("/values", crate::graph::exec::chain(err))
    };
    if matches!(as_node, Some("__start__" | "start")) {
        let input = updates.into_iter().fold(Object::new(), |mut all, update| {
            all.extend(update);
            all
        });
        let order = Order { input: Some(Value::Object(input)), ..Order::default() };
        let mut state = standing.state.clone();
        let begun =
            begin(graph, ambient, standing, &order, fork, false).map_err(accept::order_error)?;
        let mut row =
            begun.row.ok_or_else(|| ServiceError::internal("an input without a checkpoint"))?;
        row.source = Source::Update;
        let writes = order.input.as_ref().and_then(Value::as_object).into_iter().flatten();
        let writes: Vec<Write> = named_writes(graph, writes).map_err(accept::order_error)?;
        state.apply(graph, writes).map_err(|err| failed(&err))?;
        let ends = row.next.is_empty();
        return Ok((row, state, ends));
    }
    let Standing { mut state, mut homes, position: last, mut next } = standing;
    let mut changes = Vec::new();
    let mut joins = false;
    let (last_update, earlier) = match updates.split_last() {
        Some((last, earlier)) => (Some(last), earlier),
        None => (None, [].as_slice()),
    };
    for update in earlier {
        let writes = named_writes(graph, update).map_err(accept::order_error)?;
        changes.extend(state.apply(graph, writes).map_err(|err| failed(&err))?);
    }
    let writes =
        named_writes(graph, last_update.into_iter().flatten()).map_err(accept::order_error)?;
    match as_node {
        Some("__end__" | "end") => {
            changes.extend(state.apply(graph, writes).map_err(|err| failed(&err))?);
            next.clear();
        }
        Some(name) => {
            let node = graph.find_node(name).ok_or_else(|| {
                ServiceError::invalid_at(
                    "/as_node",
                    format!("graph `{}` has no node `{name}`", graph.name),
                )
            })?;
            let finished = Finished { node, writes, goto: Vec::new(), failure: None };
            let applied = step::apply(graph, &mut state, ambient, vec![finished])
                .map_err(|err| failed(&err))?;
            changes.extend(applied.changes);
            joins = applied.joins_changed;
            next = applied.next;
        }
        None => changes.extend(state.apply(graph, writes).map_err(|err| failed(&err))?),
    }
    let position = Position {
        branch: fork.or(last.map(|last| last.branch)).unwrap_or(0),
        seq: last.map_or(0, |last| last.seq + 1),
    };
    let changes = merged(changes);
    let keyframe = fork.is_some();
    let mut row = encode(
        graph,
        &state,
        &mut homes,
        position,
        Source::Update,
        &changes,
        joins,
        &next,
        keyframe,
    );
    row.parent = fork.and(last);
    Ok((row, state, next.is_empty()))
}

fn named_writes<'a>(
    graph: &Graph,
    named: impl IntoIterator<Item = (&'a String, &'a Value)>,
) -> Result<Vec<Write>, OrderError> {
    named
        .into_iter()
        .map(|(name, value)| {
            let channel = graph.find_channel(name).ok_or_else(|| OrderError::Unknown {
                what: "channel",
                name: name.clone(),
                graph: graph.name.clone(),
            })?;
            Ok(Write::new(graph, channel, value.clone())?)
        })
        .collect()
}

fn child(namespace: &str, node: &str, task: TaskId) -> String {
    if namespace.is_empty() {
        format!("{node}:{task}")
    } else {
        format!("{namespace}|{node}:{task}")
    }
}

fn interrupt_view(data: &[u8]) -> Option<InterruptView> {
    let question: Value = serde_json::from_slice(data).ok()?;
    Some(InterruptView {
        id: question.get("id")?.as_str()?.to_owned(),
        value: question.get("value").cloned().unwrap_or(Value::Null),
        response_schema: question
            .get("response_schema")
            .filter(|schema| !schema.is_null())
            .cloned(),
    })
}

fn reference(thread: ThreadId, namespace: &str, position: Position) -> CheckpointRef {
    CheckpointRef {
        thread_id: thread,
        checkpoint_ns: namespace.to_owned(),
        checkpoint_id: Some(checkpoint_id::encode(thread, position).to_string()),
        checkpoint_map: None,
    }
}

fn metadata_of(listed: &Listed) -> Object {
    let mut metadata = Object::new();
    metadata.insert("source".to_owned(), Value::from(Source::from_code(listed.source).as_str()));
    metadata.insert("step".to_owned(), Value::from(listed.position.seq - 1));
    metadata.insert("parents".to_owned(), json!({}));
    metadata.insert("branch".to_owned(), Value::from(listed.position.branch));
    if !listed.run_id.0.is_nil() {
        metadata.insert("run_id".to_owned(), Value::from(listed.run_id.to_string()));
    }
    metadata
}

fn matches(wanted: &Object, listed: &Listed) -> bool {
    let metadata = metadata_of(listed);
    wanted.iter().all(|(key, value)| metadata.get(key) == Some(value))
}

fn state_view(
    shown: &Shown<'_>,
    values: Value,
    next: Vec<String>,
    tasks: Vec<TaskView>,
    interrupts: Vec<InterruptView>,
) -> ThreadState {
    let listed = &shown.listed;
    let checkpoint = reference(shown.thread, shown.namespace, listed.position);
    let parent = listed.parent.map(|parent| reference(shown.thread, shown.namespace, parent));
    let values = match values {
        Value::Object(values) => values,
        _ => Object::new(),
    };
    ThreadState {
        values,
        next,
        tasks,
        metadata: metadata_of(listed),
        created_at: Some(listed.at),
        checkpoint_id: checkpoint.checkpoint_id.clone(),
        parent_checkpoint_id: parent.as_ref().and_then(|parent| parent.checkpoint_id.clone()),
        checkpoint: Some(checkpoint),
        parent_checkpoint: parent,
        interrupts,
    }
}
