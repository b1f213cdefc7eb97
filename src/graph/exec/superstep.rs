//! One superstep in memory: start its activations, gather what they come to, store it.
//!
//! An activation that finishes while others still run has its result stored at once, so that a crash
//! does not repeat it; when all finish together, their results go straight into the superstep's own
//! commit. When every activation that is left waits, what is known is stored and the run leaves memory.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::super::channel::{State, Write};
use super::super::checkpoint::{
    CheckpointError, Commit, Due, EffectRow, Restored, RunEnd, Source, StoredWait, StreamRow,
    WaitKind, WaitRow, encode,
};
use super::super::model::{Effect, Graph, Node as NodeSpec, NodeIndex, NodeKind};
use super::super::step::{self, Failure, Finished, Planned, Task};
use super::activation::{Activation, Custom, NodeError, Outcome, Streamed};
use super::attempt::{Attempt, End};
use super::namespace::Namespace;
use super::subgraph::{Call, child_path};
use super::{ExecError, Exit, Run, Waiting, control};

/// How often `custom` items of an attempt under way are written.
const CUSTOM_EVERY: Duration = Duration::from_millis(50);

/// What is stored of a finished activation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TaskRecord {
    /// Updates by channel name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub w: Vec<(String, Value)>,
    /// Nodes that its code chose.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub g: Vec<String>,
    /// Why it failed, when its node's `on_error` is to be taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub f: Option<Failure>,
}

/// How a superstep ended.
pub(super) enum StepEnd {
    /// The next one can begin.
    Next,
    /// Nothing can go on in memory.
    Exit(Exit),
}

#[derive(Debug)]
pub(super) enum Status {
    Idle,
    Running,
    Done(TaskRecord),
    /// Waits; its row is in `wait` until it is stored.
    Waiting(WaitKind),
    /// A subgraph below it waits.
    Below(Waiting),
}

pub(super) struct Slot {
    pub(super) task: Task,
    pub(super) status: Status,
    pub(super) attempt: u32,
    pub(super) previous: Option<StoredWait>,
    /// The wait to store.
    pub(super) wait: Option<WaitRow>,
    /// What came of its attempt's effect on the world, to store.
    pub(super) effect: Option<EffectRow>,
    /// Whether its result is stored.
    saved: bool,
    custom: Arc<Custom>,
}

impl Slot {
    /// The `round` of the next row of its wait. Its attempt's own row may have been written in between.
    pub(super) fn next_round(&self) -> i32 {
        self.previous.as_ref().map_or(0, |wait| wait.round).saturating_add(2)
    }
}

pub(super) enum Event {
    Ended(usize, Result<End, CheckpointError>),
    Below(usize, Result<Exit, ExecError>),
    Saved(Result<(), CheckpointError>),
    Tick,
}

/// The superstep's working memory.
pub(super) struct Work<'r> {
    pub(super) run: &'r Run,
    pub(super) graph: Arc<Graph>,
    pub(super) state: Arc<State>,
    path: String,
    /// See [`Namespace::call`].
    call: String,
    planned_at: step::Position,
    begun: bool,
    plan: Vec<Planned>,
    pub(super) slots: Vec<Slot>,
    running: usize,
    futures: FuturesUnordered<BoxFuture<'r, Event>>,
    /// Commits under way; never dropped before they are over, since nobody could tell what they wrote.
    saves: FuturesUnordered<BoxFuture<'r, Result<(), CheckpointError>>>,
    /// Whether any wait of this superstep is stored.
    pub(super) waits_stored: bool,
    /// Whether something did not go on because the process is to stop.
    released: bool,
    stream: Vec<StreamRow>,
    tick: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl Run {
    /// Runs the superstep that `ns.next` names.
    pub(super) async fn superstep(&self, ns: &mut Namespace) -> Result<StepEnd, ExecError> {
        let place = (self.thread_id, ns.path.as_str(), ns.position);
        let plan = step::plan(&ns.graph, &ns.state, &self.ambient, place, &ns.next);
        let mut work = Work::new(self, ns, plan);
        if let Some(failure) = work.unplannable() {
            return Ok(StepEnd::Exit(Exit::Failed(failure)));
        }
        let failed = work.gather().await?;
        if let Some(failure) = failed {
            work.flush().await?;
            return Ok(StepEnd::Exit(Exit::Failed(failure)));
        }
        if work.released {
            work.flush().await?;
            return Ok(StepEnd::Exit(Exit::Released));
        }
        let waiting = work.waiting();
        if waiting != Waiting::default() {
            work.flush().await?;
            return Ok(StepEnd::Exit(Exit::Waiting(waiting)));
        }
        let settles = work.settles();
        // Nobody else holds the state from here on, so the writes change it in place.
        let Work { plan, slots, mut stream, state, futures, .. } = work;
        drop((state, futures));
        self.complete(ns, plan, slots, settles, &mut stream).await
    }

    /// Applies the results and stores the next checkpoint.
    async fn complete(
        &self,
        ns: &mut Namespace,
        plan: Vec<Planned>,
        mut slots: Vec<Slot>,
        settles: bool,
        stream: &mut Vec<StreamRow>,
    ) -> Result<StepEnd, ExecError> {
        for slot in slots.iter().filter(|slot| !slot.saved) {
            if let Status::Done(record) = &slot.status {
                self.stream_end(&ns.graph, &ns.path, slot, record, stream);
            }
        }
        let effects = slots.iter_mut().filter_map(|slot| slot.effect.take()).collect();
        let finished = finish(&ns.graph, plan, slots);
        let mut state = Arc::unwrap_or_clone(std::mem::take(&mut ns.state));
        let applied = match step::apply(&ns.graph, &mut state, &self.ambient, finished) {
            Ok(applied) => applied,
            Err(err) => return Ok(StepEnd::Exit(Exit::Failed(err.to_failure()))),
        };
        let planned = ns.position;
        let position = step::Position { branch: planned.branch, seq: planned.seq + 1 };
        let row = encode(
            &ns.graph,
            &state,
            &mut ns.homes,
            position,
            Source::Loop,
            &applied.changes,
            applied.joins_changed,
            &applied.next,
            false,
        );
        // The run ends in the commit of its last superstep: one sync of the disk less.
        let end = (ns.path.is_empty() && applied.next.is_empty()).then(|| RunEnd {
            values: state.to_json(&ns.graph).to_string().into_bytes(),
            result: state.output(&ns.graph).to_string().into_bytes(),
        });
        self.checkpointer
            .commit(Commit {
                namespace: ns.path.clone(),
                planned,
                checkpoint: Some(row),
                writes: Vec::new(),
                waits: Vec::new(),
                settles,
                stream: std::mem::take(stream),
                effects,
                end,
            })
            .await?;
        ns.state = Arc::new(state);
        ns.position = position;
        ns.next = applied.next;
        ns.tasks = HashMap::new();
        ns.begun = false;
        Ok(StepEnd::Next)
    }

    fn streams(&self, path: &str) -> bool {
        path.is_empty() || self.options.stream_subgraphs
    }

    fn stream_row(&self, path: &str, mode: &'static str, data: &Value) -> StreamRow {
        StreamRow {
            seq: self.cursor.root_seq.load(Ordering::Relaxed) + 1,
            place: self.cursor.place.fetch_add(1, Ordering::Relaxed),
            mode,
            namespace: path.to_owned(),
            data: data.to_string().into_bytes(),
        }
    }

    /// Rows of what an activation's code has streamed so far. Messages of subgraphs are shown as those of the node
    /// that called them, so they are always written.
    fn stream_items(&self, graph: &Graph, path: &str, slot: &Slot) -> Vec<StreamRow> {
        let row = |item: Streamed| match item {
            Streamed::Custom(item) if self.streams(path) => {
                Some(self.stream_row(path, "custom", &item))
            }
            Streamed::Custom(_) => None,
            Streamed::Message(message) => {
                let node = &graph.node(slot.task.node).name;
                let metadata = json!({
                    "langgraph_node": node,
                    "langgraph_step": self.cursor.root_seq.load(Ordering::Relaxed) + 1,
                    "langgraph_checkpoint_ns": child_path(path, node, slot.task.id),
                    "run_id": self.run_id.to_string(),
                    "thread_id": self.thread_id.to_string(),
                });
                Some(self.stream_row(path, "messages", &json!([message, metadata])))
            }
        };
        slot.custom.take().into_iter().filter_map(row).collect()
    }

    /// Rows that tell of a finished activation.
    fn stream_end(
        &self,
        graph: &Graph,
        path: &str,
        slot: &Slot,
        record: &TaskRecord,
        out: &mut Vec<StreamRow>,
    ) {
        out.extend(self.stream_items(graph, path, slot));
        if !self.streams(path) {
            return;
        }
        let node = &graph.node(slot.task.node).name;
        let delta: serde_json::Map<String, Value> = record.w.iter().cloned().collect();
        if self.options.stream_updates && record.f.is_none() {
            out.push(self.stream_row(path, "updates", &json!({ node: delta })));
        }
        if self.options.stream_tasks {
            let error = record
                .f
                .as_ref()
                .map(|failure| json!({"error": failure.kind, "message": failure.message}));
            let end = json!({
                "id": slot.task.id.to_string(), "name": node, "error": error, "result": delta, "interrupts": [],
            });
            out.push(self.stream_row(path, "tasks", &end));
        }
    }
}

/// Gathers the records of each node, in the order of the plan.
fn finish(graph: &Graph, plan: Vec<Planned>, slots: Vec<Slot>) -> Vec<Finished> {
    let mut records: HashMap<NodeIndex, Vec<TaskRecord>> = HashMap::new();
    for slot in slots {
        if let Status::Done(record) = slot.status {
            records.entry(slot.task.node).or_default().push(record);
        }
    }
    plan.into_iter()
        .map(|planned| {
            let mut finished = Finished {
                node: planned.node,
                writes: Vec::new(),
                goto: Vec::new(),
                failure: planned.tasks.err(),
            };
            for record in records.remove(&planned.node).unwrap_or_default() {
                let writes = record.w.into_iter().filter_map(|(name, value)| {
                    graph.find_channel(&name).map(|channel| Write::checked_before(channel, value))
                });
                finished.writes.extend(writes);
                finished.goto.extend(record.g.iter().filter_map(|name| graph.find_node(name)));
                finished.failure = finished.failure.or(record.f);
            }
            finished
        })
        .collect()
}

impl<'r> Work<'r> {
    fn new(run: &'r Run, ns: &mut Namespace, plan: Vec<Planned>) -> Self {
        let mut slots = Vec::new();
        let mut waits_stored = false;
        let mut stream = Vec::new();
        // The first rows of a superstep tell what starts; a superstep that was taken up again has them.
        let untold = if ns.path.is_empty() {
            run.cursor.place.load(Ordering::Relaxed) == 0
        } else {
            !ns.begun
        };
        for task in plan.iter().filter_map(|planned| planned.tasks.as_ref().ok()).flatten() {
            let Restored { writes, wait } = ns.tasks.remove(&task.id).unwrap_or_default();
            waits_stored |= wait.is_some();
            let attempt = wait.as_ref().map_or(1, |wait| wait.attempt);
            let record = writes.and_then(|bytes| serde_json::from_slice(&bytes).ok());
            let saved = record.is_some();
            let status = record.map_or(Status::Idle, Status::Done);
            if run.options.stream_tasks && run.streams(&ns.path) && untold {
                let start = json!({
                    "id": task.id.to_string(), "name": ns.graph.node(task.node).name,
                    "input": task.item.as_ref().map(|item| item.value.json()), "triggers": [], "interrupts": [],
                });
                stream.push(run.stream_row(&ns.path, "tasks", &start));
            }
            let (custom, messages) = (run.options.stream_custom, run.options.stream_messages);
            let custom = Arc::new(Custom::new(custom, messages));
            slots.push(Slot {
                task: task.clone(),
                status,
                attempt,
                previous: wait,
                wait: None,
                effect: None,
                saved,
                custom,
            });
        }
        Self {
            run,
            graph: Arc::clone(&ns.graph),
            state: Arc::clone(&ns.state),
            path: ns.path.clone(),
            call: ns.call.clone(),
            planned_at: ns.position,
            begun: ns.begun,
            plan,
            slots,
            running: 0,
            futures: FuturesUnordered::new(),
            saves: FuturesUnordered::new(),
            waits_stored,
            released: false,
            stream,
            tick: None,
        }
    }

    /// A list that could not be made, at a node without a handler.
    fn unplannable(&self) -> Option<Failure> {
        self.plan.iter().find_map(|planned| {
            let failure = planned.tasks.as_ref().err()?;
            self.graph.node(planned.node).on_error.is_none().then(|| failure.clone())
        })
    }

    /// Runs until every activation is done or waits; gives back the failure that ends the run, if one does.
    async fn gather(&mut self) -> Result<Option<Failure>, ExecError> {
        loop {
            self.start()?;
            if let Some(failure) = self.fatal() {
                self.futures.clear();
                self.finish_saves().await?;
                return Ok(Some(failure));
            }
            let mut more = false;
            while let Some(Some(event)) = self.futures.next().now_or_never() {
                self.handle(event)?;
                more = true;
            }
            if more {
                continue;
            }
            if self.running == 0 {
                self.finish_saves().await?;
                return Ok(None);
            }
            self.save_early();
            let event = self.next_event().await;
            self.handle(event)?;
        }
    }

    /// The superstep's own commit comes after those of its parts.
    async fn finish_saves(&mut self) -> Result<(), ExecError> {
        while let Some(saved) = self.saves.next().await {
            saved?;
        }
        Ok(())
    }

    async fn next_event(&mut self) -> Event {
        let Self { futures, saves, tick, .. } = self;
        let ticked = async {
            match tick {
                Some(tick) => tick.as_mut().await,
                None => std::future::pending::<()>().await,
            }
        };
        tokio::select! {
            biased;
            Some(event) = futures.next() => event,
            Some(saved) = saves.next() => Event::Saved(saved),
            () = ticked => Event::Tick,
        }
    }

    fn fatal(&self) -> Option<Failure> {
        self.slots.iter().find_map(|slot| match &slot.status {
            Status::Done(TaskRecord { f: Some(failure), .. })
                if self.graph.node(slot.task.node).on_error.is_none() =>
            {
                Some(failure.clone())
            }
            _ => None,
        })
    }

    /// Starts what may start: within the node's and the run's bounds on what is under way.
    fn start(&mut self) -> Result<(), ExecError> {
        let most_running = match self.run.options.max_parallel {
            0 => usize::MAX,
            most => most,
        };
        let mut under_way: HashMap<NodeIndex, u32> = HashMap::new();
        for slot in &self.slots {
            if matches!(slot.status, Status::Running | Status::Waiting(_) | Status::Below(_)) {
                *under_way.entry(slot.task.node).or_default() += 1;
            }
        }
        for at in 0..self.slots.len() {
            if !matches!(self.slots[at].status, Status::Idle) {
                continue;
            }
            if self.run.drain.load(Ordering::Relaxed) {
                self.released = true;
                break;
            }
            if self.running >= most_running {
                break;
            }
            let node = self.slots[at].task.node;
            let most =
                self.graph.node(node).for_each.as_ref().and_then(|for_each| for_each.max_parallel);
            let count = under_way.entry(node).or_default();
            if most.is_some_and(|most| *count >= most) {
                continue;
            }
            self.start_one(at)?;
            if matches!(
                self.slots[at].status,
                Status::Running | Status::Waiting(_) | Status::Below(_)
            ) {
                *count += 1;
            }
        }
        Ok(())
    }

    fn start_one(&mut self, at: usize) -> Result<(), ExecError> {
        let graph = Arc::clone(&self.graph);
        let node = graph.node(self.slots[at].task.node);
        if let Some(failure) = self.failed_before(at) {
            let slot = &mut self.slots[at];
            slot.saved = true;
            slot.status = Status::Done(TaskRecord { f: Some(failure), ..TaskRecord::default() });
            return Ok(());
        }
        if let Some(previous) = &self.slots[at].previous
            && still_waits(previous)
        {
            self.slots[at].status = Status::Waiting(previous.kind);
            return Ok(());
        }
        if let Some(end) = self.run_control(at, node) {
            return self.ended(at, end);
        }
        let slot = &mut self.slots[at];
        slot.status = Status::Running;
        let (task, attempt, previous) = (slot.task.clone(), slot.attempt, slot.previous.clone());
        let custom = Arc::clone(&slot.custom);
        self.running += 1;
        if let NodeKind::Graph { .. } = &node.kind {
            let call = Call {
                at,
                graph,
                state: Arc::clone(&self.state),
                path: self.path.clone(),
                begun: self.begun,
                planned: self.planned_at,
                call: self.call.clone(),
                attempt,
            };
            self.futures.push(self.run.call(call, task).boxed());
            return Ok(());
        }
        let options = &self.run.options;
        if (options.stream_custom || options.stream_messages) && self.tick.is_none() {
            self.tick = Some(Box::pin(tokio::time::sleep(CUSTOM_EVERY)));
        }
        let attempt = Attempt {
            at,
            graph,
            state: Arc::clone(&self.state),
            path: self.path.clone(),
            planned: self.planned_at,
            attempt,
            previous,
            custom,
        };
        self.futures.push(self.run.attempt(attempt, task).boxed());
        Ok(())
    }

    /// The failure with which this very call ended before its process died: it is over, and makes no attempt more.
    fn failed_before(&self, at: usize) -> Option<Failure> {
        let wait = self.slots[at].previous.as_ref().filter(|wait| wait.kind == WaitKind::Retry)?;
        let over: Over = serde_json::from_slice(wait.data.as_deref()?).ok()?;
        (over.failed_in == self.call).then_some(over.failure)
    }

    /// The kinds that need no code from outside are run here and now.
    fn run_control(&self, at: usize, node: &NodeSpec) -> Option<Result<Outcome, NodeError>> {
        let slot = &self.slots[at];
        let activation = Activation {
            run_id: self.run.run_id,
            thread_id: self.run.thread_id,
            fence: self.run.fence,
            generation: self.run.generation,
            sent_key: None,
            namespace: &self.path,
            planned: self.planned_at,
            task: &slot.task,
            attempt: slot.attempt,
            sends: 1,
            node,
            previous: slot.previous.as_ref(),
            custom: &slot.custom,
            graph: &self.graph,
            state: &self.state,
            ambient: &self.run.ambient,
        };
        if let Some(previous) = activation.previous
            && previous.kind == WaitKind::Interrupt
            && !previous.settled
            && previous.expired
        {
            return Some(Err(NodeError::fatal("expired", "nobody answered in time")));
        }
        control::run(&activation)
    }

    fn handle(&mut self, event: Event) -> Result<(), ExecError> {
        match event {
            Event::Ended(at, end) => {
                self.running -= 1;
                self.slots[at].status = Status::Idle;
                self.attempt_ended(at, end?)
            }
            Event::Below(at, exit) => {
                self.running -= 1;
                self.slots[at].status = Status::Idle;
                self.came_back(at, exit?)
            }
            Event::Saved(result) => Ok(result?),
            Event::Tick => {
                self.tick = None;
                for slot in &self.slots {
                    self.stream.extend(self.run.stream_items(&self.graph, &self.path, slot));
                }
                if self.running > 0 {
                    self.tick = Some(Box::pin(tokio::time::sleep(CUSTOM_EVERY)));
                }
                Ok(())
            }
        }
    }

    /// A subgraph came back.
    fn came_back(&mut self, at: usize, exit: Exit) -> Result<(), ExecError> {
        match exit {
            Exit::Done(state) => {
                let graph = Arc::clone(&self.graph);
                let node = graph.node(self.slots[at].task.node);
                let NodeKind::Graph { graph: called, .. } = &node.kind else { return Ok(()) };
                self.ended(at, Ok(Outcome::output(state.output(called))))
            }
            // With `retry`, the next call goes on from the subgraph's last checkpoint.
            Exit::Failed(failure) => self.ended(
                at,
                Err(NodeError::Retryable { kind: failure.kind, message: failure.message }),
            ),
            Exit::Waiting(waiting) => {
                self.slots[at].status = Status::Below(waiting);
                Ok(())
            }
            Exit::Released | Exit::Stopped => {
                self.slots[at].status = Status::Below(Waiting::default());
                self.released = true;
                Ok(())
            }
        }
    }

    /// Stores results while other activations still run; one commit at a time, and the next takes what gathered.
    fn save_early(&mut self) {
        if !self.saves.is_empty() {
            return;
        }
        if let Some(commit) = self.unsaved() {
            self.saves.push(self.run.checkpointer.commit(commit));
        }
    }

    /// Stores what is known before the run leaves memory.
    async fn flush(&mut self) -> Result<(), ExecError> {
        match self.unsaved() {
            Some(commit) => Ok(self.run.checkpointer.commit(commit).await?),
            None => Ok(()),
        }
    }

    fn unsaved(&mut self) -> Option<Commit> {
        let mut writes = Vec::new();
        let mut waits = Vec::new();
        let mut effects = Vec::new();
        let mut rows = Vec::new();
        for slot in &mut self.slots {
            effects.extend(slot.effect.take());
            if let Some(wait) = slot.wait.take() {
                self.waits_stored = true;
                waits.push(wait);
            }
            if slot.saved {
                continue;
            }
            let Status::Done(record) = &slot.status else { continue };
            let node = self.graph.node(slot.task.node);
            if let (Some(failure), None) = (&record.f, node.on_error) {
                // The run fails with it: what is stored is that a later run makes another attempt.
                if node.kind.is_outside() {
                    let over = Over { failed_in: self.call.clone(), failure: failure.clone() };
                    waits.push(next_attempt(slot, &node.name, &over));
                }
                continue;
            }
            slot.saved = true;
            writes.push((slot.task.id, serde_json::to_vec(record).unwrap_or_default()));
            self.run.stream_end(&self.graph, &self.path, slot, record, &mut rows);
        }
        self.stream.append(&mut rows);
        if writes.is_empty() && waits.is_empty() && effects.is_empty() && self.stream.is_empty() {
            return None;
        }
        Some(Commit {
            namespace: self.path.clone(),
            planned: self.planned_at,
            checkpoint: None,
            writes,
            waits,
            settles: false,
            stream: std::mem::take(&mut self.stream),
            effects,
            end: None,
        })
    }

    /// Whether rows of waits may exist, here or in subgraphs below, that the next checkpoint has to settle.
    fn settles(&self) -> bool {
        let keeps_rows = |slot: &Slot| {
            let node = self.graph.node(slot.task.node);
            match node.kind {
                NodeKind::Use { .. } => node.effect != Effect::Pure,
                NodeKind::Graph { .. } => true,
                _ => node.kind.is_outside(),
            }
        };
        self.waits_stored || self.slots.iter().any(keeps_rows)
    }

    fn waiting(&self) -> Waiting {
        let mut own = 0;
        let mut all = Waiting::default();
        for slot in &self.slots {
            match &slot.status {
                Status::Waiting(WaitKind::Interrupt) => all.people += 1,
                Status::Waiting(_) => own += 1,
                Status::Below(below) => all.add(below),
                Status::Idle | Status::Running => all.held_back = true,
                Status::Done(_) => {}
            }
        }
        all.with_own(own)
    }
}

/// What a failure that nothing handles leaves with the number of the next attempt.
#[derive(Serialize, Deserialize)]
struct Over {
    /// The call of the graph that failed with it; only another one makes the attempt.
    failed_in: String,
    failure: Failure,
}

/// A wait that is over already: it only says which attempt comes next.
fn next_attempt(slot: &Slot, node: &str, over: &Over) -> WaitRow {
    WaitRow {
        task: slot.task.id,
        node: node.to_owned(),
        kind: WaitKind::Retry,
        attempt: slot.attempt.saturating_add(1),
        due: Some(Due::After(Duration::ZERO)),
        name: None,
        data: serde_json::to_vec(over).ok(),
        answer: None,
        round: slot.next_round(),
    }
}

/// Whether a stored wait is not over. A job's node is always asked: it knows whether the job was sent.
fn still_waits(wait: &StoredWait) -> bool {
    match wait.kind {
        WaitKind::Attempt | WaitKind::Job => false,
        WaitKind::Retry | WaitKind::Timer => !wait.expired && !wait.settled,
        WaitKind::Event => !wait.expired && wait.answer.is_none(),
        WaitKind::Interrupt => !wait.expired && !wait.settled,
    }
}
