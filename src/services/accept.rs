//! Accepting a run: the moment from which nothing of it can be lost.
//!
//! Everything that can be wrong with a request is found before anything is written; then the run, its
//! first checkpoint, the answers that it brings and its place in the queue are one transaction under
//! the thread's lock. Where the driver of this process has room and nobody waits, the run is granted to
//! it in that transaction, and takes no place in the queue.

use std::collections::HashMap;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use sqlx::PgConnection;

use super::Services;
use super::api::{
    Actor, Command, CreateRun, IfNotExists, MultitaskStrategy, NodeSelection, Object, OnCompletion,
    RunStatus, RunView, StreamMode,
};
use super::assistants::ResolvedAssistant;
use super::error::ServiceError;
use super::{checkpoint_id, checks};
use crate::graph::exec::{Namespace, Options, Stops};
use crate::graph::input::{self, Begun, Order, OrderError, Standing};
use crate::graph::model::Graph;
use crate::graph::step::{Ambient, Position};
use crate::graph::value::Shared;
use crate::ids::{RunId, ThreadId};
use crate::store::accept::{FIRST_FENCE, FreshRun};
use crate::store::intake::Place;
use crate::store::pending::{self, WaitingTask};
use crate::store::queue::Grant;
use crate::store::runs::{self, Inserted, LockedThread, NewRun, RunOptions};
use crate::store::{checkpoints, crash, threads};

/// The longest delay of a run's start: 366 days.
const MAX_AFTER_SECONDS: u32 = 366 * 86_400;

/// A request that was found good, apart from what depends on the thread.
struct Accepted<'a> {
    actor: &'a Actor,
    run_id: RunId,
    resolved: ResolvedAssistant,
    order: Order,
    resume: Option<Value>,
    options: RunOptions,
    modes: Vec<String>,
    request: CreateRun,
    temporary: bool,
}

impl Accepted<'_> {
    /// The delay of its start, if there is one.
    fn after_seconds(&self) -> Option<f64> {
        self.request.after_seconds.filter(|after| *after > 0).map(f64::from)
    }

    /// What the driver needs of a run that was granted to it when it was stored.
    fn grant(
        &self,
        thread: ThreadId,
        position: Position,
        options: Vec<u8>,
        Inserted { created_at, fence, generation }: Inserted,
    ) -> Grant {
        Grant {
            run_id: self.run_id,
            thread_id: thread,
            user_id: self.actor.user_id,
            fence,
            seq: position.seq,
            first_seq: position.seq,
            branch: position.branch,
            wake: 0,
            claims: 0,
            graph_hash: self.resolved.graph.hash.0.to_vec(),
            input: None,
            options,
            stream_modes: self.modes.clone(),
            assistant_id: self.resolved.assistant_id,
            metadata: Value::Object(self.request.metadata.clone()),
            started_at: Some(created_at),
            generation,
        }
    }
}

/// What was decided under the thread's lock.
struct Placed {
    active: bool,
    position: Option<Position>,
    branch: i32,
    /// Runs that had to make room.
    ended: Vec<RunId>,
}

impl Services {
    /// Accepts a run on `thread`, or on a thread of its own. When this returns, the run is stored.
    pub async fn create_run(
        &self,
        actor: &Actor,
        thread: Option<ThreadId>,
        request: CreateRun,
    ) -> Result<RunView, ServiceError> {
        let mut accepted = self.check_run(actor, thread.is_none(), request).await?;
        let options = serde_json::to_vec(&accepted.options).map_err(ServiceError::internal)?;
        let (thread_id, created_at) = match thread {
            None => self.store_fresh(&accepted, options).await?,
            Some(thread) => {
                self.keep_graph(&mut accepted, thread).await?;
                (thread, self.store_on(&accepted, thread, options).await?)
            }
        };
        Ok(RunView {
            run_id: accepted.run_id,
            thread_id,
            assistant_id: accepted.resolved.assistant_id,
            created_at,
            updated_at: created_at,
            started_at: None,
            ended_at: None,
            status: RunStatus::Pending,
            metadata: accepted.request.metadata,
            kwargs: accepted.options.kwargs,
            multitask_strategy: accepted.request.multitask_strategy,
            cancel_reason: None,
            error: None,
        })
    }

    /// Stores a run on a thread that is there, or is to be made under a known id: under the thread's lock.
    async fn store_on(
        &self,
        accepted: &Accepted<'_>,
        thread: ThreadId,
        options: Vec<u8>,
    ) -> Result<DateTime<Utc>, ServiceError> {
        let mut tx = self.transaction().await?;
        let locked = self.thread_for(&mut tx, accepted, thread).await?;
        let placed = self.place(&mut tx, accepted, thread, &locked).await?;
        let input = match placed.position {
            Some(_) => None,
            None => Some(serde_json::to_vec(&accepted.order).map_err(ServiceError::internal)?),
        };
        let metadata = Value::Object(accepted.request.metadata.clone());
        let after_seconds = accepted.after_seconds();
        let begun = placed.position.filter(|_| placed.active && after_seconds.is_none());
        let place = begun.and_then(|_| self.intake()?.reserve(accepted.run_id));
        let inserted = runs::insert(
            &mut tx,
            &NewRun {
                run_id: accepted.run_id,
                thread_id: thread,
                user_id: accepted.actor.user_id,
                assistant_id: accepted.resolved.assistant_id,
                graph_hash: &accepted.resolved.graph.hash.0,
                multitask_strategy: accepted.request.multitask_strategy.as_str(),
                priority: accepted.request.priority,
                after_seconds,
                input: input.as_deref(),
                options: &options,
                stream_modes: &accepted.modes,
                metadata: &metadata,
                temporary_thread: accepted.temporary,
                active: placed.active,
                seq: placed.position.map_or(-1, |position| position.seq),
                branch: placed.branch,
                webhook: accepted.request.webhook.as_deref(),
                granted: place.as_ref().map(Place::life),
            },
        )
        .await?;
        crash::commit(tx, "accept").await?;
        for run in placed.ended {
            self.hub().run_ended(run);
        }
        match (place, placed.position) {
            (Some(place), Some(position)) => {
                let grant = accepted.grant(thread, position, options, inserted);
                place.deliver(grant, None);
            }
            _ if placed.active => self.hub().queued(),
            _ => {}
        }
        Ok(inserted.created_at)
    }

    /// Stores a run on a thread of its own. Nobody knows it before the commit, so nothing of it is looked up.
    async fn store_fresh(
        &self,
        accepted: &Accepted<'_>,
        options: Vec<u8>,
    ) -> Result<(ThreadId, DateTime<Utc>), ServiceError> {
        let thread = ThreadId::new();
        if let Some(id) = &accepted.request.checkpoint_id {
            return Err(ServiceError::not_found("checkpoint", id));
        }
        if accepted.resume.is_some() {
            let message = format!("nothing on thread {thread} waits for an answer");
            return Err(ServiceError::Conflict(message));
        }
        let graph = &accepted.resolved.graph;
        let ambient = self.ambient(accepted, thread);
        let begun =
            input::begin(graph, &ambient, Standing::empty(graph), &accepted.order, None, false)
                .map_err(order_error)?;
        let Begun { row: Some(row), position, start } = begun else {
            return Err(order_error(OrderError::Nothing));
        };
        let after_seconds = accepted.after_seconds();
        let place = match after_seconds {
            None => self.intake().and_then(|intake| intake.reserve(accepted.run_id)),
            Some(_) => None,
        };
        let created_at = self
            .accepter()
            .accept(FreshRun {
                run_id: accepted.run_id,
                thread_id: thread,
                user_id: accepted.actor.user_id,
                assistant_id: accepted.resolved.assistant_id,
                graph_hash: graph.hash.0.to_vec(),
                multitask_strategy: accepted.request.multitask_strategy.as_str(),
                priority: accepted.request.priority,
                after_seconds,
                options: options.clone(),
                stream_modes: accepted.modes.clone(),
                metadata: Value::Object(accepted.request.metadata.clone()),
                temporary_thread: accepted.temporary,
                webhook: accepted.request.webhook.clone(),
                row,
                thread_metadata: json!({ "graph_id": graph.name }),
                thread_made_at: self.clock().now(),
                granted: place.as_ref().map(Place::life),
            })
            .await?;
        match place {
            None => self.hub().queued(),
            Some(place) => {
                let root = start.map(|(state, homes, next)| Namespace {
                    path: String::new(),
                    graph: Arc::clone(graph),
                    state: Arc::new(state),
                    homes,
                    position,
                    first_seq: position.seq,
                    next,
                    tasks: HashMap::new(),
                    begun: false,
                    call: String::new(),
                });
                let inserted = Inserted { created_at, fence: FIRST_FENCE, generation: 0 };
                let grant = accepted.grant(thread, position, options, inserted);
                place.deliver(grant, root);
            }
        }
        Ok((thread, created_at))
    }

    /// What goes on where the thread stands goes on with the graph that brought it there, also when another
    /// version of that graph has been loaded since; only an input begins with the version of today.
    async fn keep_graph(
        &self,
        accepted: &mut Accepted<'_>,
        thread: ThreadId,
    ) -> Result<(), ServiceError> {
        if accepted.order.input.is_some() {
            return Ok(());
        }
        let mut db = self.pool().acquire().await?;
        let hash = runs::graph_of(&mut db, thread).await?;
        drop(db);
        let Some(hash) = hash.filter(|hash| *hash != accepted.resolved.graph.hash.0) else {
            return Ok(());
        };
        let graph = self.versions().get(&hash).await?;
        if graph.name == accepted.resolved.graph.name {
            input::check(&graph, &accepted.order).map_err(order_error)?;
            accepted.resolved.graph = graph;
        }
        Ok(())
    }

    /// Everything about a request that does not depend on the thread.
    async fn check_run<'a>(
        &self,
        actor: &'a Actor,
        stateless: bool,
        request: CreateRun,
    ) -> Result<Accepted<'a>, ServiceError> {
        let resolved = self.resolve_assistant(actor, &request.assistant).await?;
        let graph = &resolved.graph;
        self.check_metadata(&request.metadata)?;
        if let Some(webhook) = &request.webhook {
            self.check_webhook(webhook)?;
        }
        let order = self.order(graph, &request)?;
        let resume = request.command.as_ref().and_then(|command| command.resume.clone());
        if stateless && order.input.is_none() {
            return Err(ServiceError::invalid_at(
                "/input",
                "a run without a thread needs an input",
            ));
        }
        let after = request.after_seconds.unwrap_or(0);
        if after > MAX_AFTER_SECONDS {
            let message =
                format!("`after_seconds` is {after}; at most {MAX_AFTER_SECONDS} are accepted");
            return Err(ServiceError::invalid_at("/after_seconds", message));
        }
        let modes = kept_modes(&request.stream_modes);
        let mut config = resolved.config.clone();
        config.extend(request.config.clone());
        let context = match (&resolved.context, &request.context) {
            (Value::Object(base), Some(Value::Object(over))) => {
                let mut merged = base.clone();
                merged.extend(over.clone());
                Value::Object(merged)
            }
            (_, Some(context)) => context.clone(),
            (base, None) => base.clone(),
        };
        let engine = Options {
            stream_updates: request.stream_modes.contains(&StreamMode::Updates),
            stream_tasks: request
                .stream_modes
                .iter()
                .any(|mode| matches!(mode, StreamMode::Tasks | StreamMode::Debug)),
            stream_custom: request.stream_modes.contains(&StreamMode::Custom),
            stream_messages: request
                .stream_modes
                .iter()
                .any(|mode| matches!(mode, StreamMode::Messages | StreamMode::MessagesTuple)),
            stream_subgraphs: request.stream_subgraphs,
            interrupt_before: stops("interrupt_before", graph, &request.interrupt_before)?,
            interrupt_after: stops("interrupt_after", graph, &request.interrupt_after)?,
            resumed: order.input.is_none() && order.goto.is_empty(),
            max_parallel: 0,
            supersteps: recursion_limit(&config)?,
        };
        let kwargs = kwargs(&request, &config, &context);
        let options = RunOptions { engine, config: Value::Object(config), context, kwargs };
        let temporary = stateless && request.on_completion == OnCompletion::Delete;
        Ok(Accepted {
            actor,
            run_id: RunId::new(),
            resolved,
            order,
            resume,
            options,
            modes,
            request,
            temporary,
        })
    }

    fn order(&self, graph: &Graph, request: &CreateRun) -> Result<Order, ServiceError> {
        let input = request.input.clone().filter(|input| !input.is_null());
        if input.is_some() && request.command.is_some() {
            return Err(ServiceError::invalid(
                "`input` and `command` exclude each other: give one of them",
            ));
        }
        let Command { update, resume, goto } = request.command.clone().unwrap_or_default();
        if resume.is_some() && request.checkpoint_id.is_some() {
            return Err(ServiceError::invalid(
                "`command.resume` answers what waits now: it cannot be given with a checkpoint",
            ));
        }
        if resume.is_some()
            && (update.as_ref().is_some_and(|update| !update.is_empty()) || !goto.is_empty())
        {
            let message = "`command.resume` goes on with what waits, which `update` and `goto` would do away with: \
                           answer first, and update the state in the next run";
            return Err(ServiceError::invalid_at("/command", message));
        }
        if let Some(goto) = goto.iter().find(|goto| goto.input.is_some()) {
            let message = format!(
                "`goto` with an input is not supported (node `{}`): use a node with `for_each`",
                goto.node
            );
            return Err(ServiceError::invalid_at("/command/goto", message));
        }
        let goto = goto.into_iter().map(|goto| goto.node).collect();
        let order = Order { input, update: update.unwrap_or_default(), goto };
        let size = serde_json::to_vec(&order).map_err(ServiceError::internal)?.len();
        let size = size + resume.as_ref().map_or(0, |resume| resume.to_string().len());
        if size > self.limits().input_bytes {
            return Err(checks::over("input", size, self.limits().input_bytes));
        }
        input::check(graph, &order).map_err(order_error)?;
        Ok(order)
    }

    /// Adds the run's thread, if there is none of that id; answers whether there was not.
    async fn insert_thread(
        &self,
        tx: &mut PgConnection,
        accepted: &Accepted<'_>,
        thread: ThreadId,
    ) -> Result<bool, ServiceError> {
        let mut metadata = Object::new();
        metadata.insert("graph_id".to_owned(), Value::from(accepted.resolved.graph.name.clone()));
        let (owner, now) = (accepted.actor.user_id, self.clock().now());
        Ok(threads::insert(tx, thread, owner, &metadata, now).await?)
    }

    /// Finds and locks the thread, or makes it.
    async fn thread_for(
        &self,
        tx: &mut PgConnection,
        accepted: &Accepted<'_>,
        thread: ThreadId,
    ) -> Result<LockedThread, ServiceError> {
        let missing = || ServiceError::not_found("thread", thread);
        if accepted.request.if_not_exists == IfNotExists::Create {
            self.insert_thread(tx, accepted, thread).await?;
        }
        let locked = runs::lock_thread(tx, thread).await?.ok_or_else(missing)?;
        if locked.user_id == accepted.actor.user_id { Ok(locked) } else { Err(missing()) }
    }

    /// Decides, under the thread's lock, whether the run goes on with the thread now, and stores where it begins.
    async fn place(
        &self,
        tx: &mut PgConnection,
        accepted: &Accepted<'_>,
        thread: ThreadId,
        locked: &LockedThread,
    ) -> Result<Placed, ServiceError> {
        let mut ended = Vec::new();
        let mut locked = locked.clone();
        if let Some(active) = locked.active_run {
            match accepted.request.multitask_strategy {
                MultitaskStrategy::Reject => {
                    return Err(ServiceError::Conflict(format!(
                        "thread {thread} is busy with run {active}; wait for it, or choose another `multitask_strategy`"
                    )));
                }
                MultitaskStrategy::Enqueue => {
                    self.check_enqueue(tx, accepted, thread, active).await?;
                    return Ok(Placed {
                        active: false,
                        position: None,
                        branch: locked.branch,
                        ended,
                    });
                }
                MultitaskStrategy::Interrupt | MultitaskStrategy::Rollback => {
                    let roll_back =
                        accepted.request.multitask_strategy == MultitaskStrategy::Rollback;
                    ended = self.make_room(tx, thread, active, roll_back).await?;
                    locked = runs::lock_thread(tx, thread)
                        .await?
                        .ok_or_else(|| ServiceError::not_found("thread", thread))?;
                }
            }
        }
        runs::delete_followups(tx, thread).await?;
        let begun = self.begin(tx, accepted, thread, &locked).await?;
        match &begun.row {
            Some(row) => {
                pending::abandon(tx, thread).await?;
                checkpoints::insert(tx, thread, accepted.run_id, row).await?;
            }
            None => pending::adopt(tx, thread, accepted.run_id).await?,
        }
        Ok(Placed {
            active: true,
            position: Some(begun.position),
            branch: begun.position.branch,
            ended,
        })
    }

    async fn check_enqueue(
        &self,
        tx: &mut PgConnection,
        accepted: &Accepted<'_>,
        thread: ThreadId,
        active: RunId,
    ) -> Result<(), ServiceError> {
        if accepted.resume.is_some() || accepted.request.checkpoint_id.is_some() {
            return Err(ServiceError::Conflict(format!(
                "thread {thread} is busy with run {active}: an answer or a fork needs the thread to stand still"
            )));
        }
        let most = i64::from(self.limits().runs_per_thread);
        if runs::count_open(tx, thread).await? >= most {
            return Err(ServiceError::TooMany {
                message: format!("{most} runs wait for thread {thread} already"),
                retry_after: std::time::Duration::from_secs(1),
            });
        }
        Ok(())
    }

    async fn begin(
        &self,
        tx: &mut PgConnection,
        accepted: &Accepted<'_>,
        thread: ThreadId,
        locked: &LockedThread,
    ) -> Result<Begun, ServiceError> {
        let graph = &accepted.resolved.graph;
        let (branch, seq, fork) = match &accepted.request.checkpoint_id {
            None => (locked.branch, None, None),
            Some(id) => {
                let at = checkpoint_id::decode(thread, id)
                    .ok_or_else(|| ServiceError::not_found("checkpoint", id))?;
                (at.branch, Some(at.seq), Some(locked.branch + 1))
            }
        };
        let standing = checkpoints::standing(tx, thread, branch, seq, graph).await?;
        if let (Some(id), true) =
            (&accepted.request.checkpoint_id, standing.position.map(|at| at.seq) != seq)
        {
            return Err(ServiceError::not_found("checkpoint", id));
        }
        if let Some(resume) = &accepted.resume {
            let seq = standing.position.map_or(-1, |position| position.seq);
            self.answer(tx, thread, branch, seq, resume).await?;
        }
        let fresh = standing.position.is_some()
            && locked.graph_hash.as_deref() != Some(graph.hash.0.as_slice());
        let ambient = self.ambient(accepted, thread);
        input::begin(graph, &ambient, standing, &accepted.order, fork, fresh).map_err(order_error)
    }

    fn ambient(&self, accepted: &Accepted<'_>, thread: ThreadId) -> Ambient {
        Ambient {
            run: Shared::new(self.run_var(accepted, thread)),
            env: Shared::new(self.env().clone()),
        }
    }

    fn run_var(&self, accepted: &Accepted<'_>, thread: ThreadId) -> Value {
        json!({
            "id": accepted.run_id,
            "thread_id": thread,
            "graph": accepted.resolved.graph.name,
            "assistant_id": accepted.resolved.assistant_id,
            "user_id": accepted.actor.user_id,
            "metadata": accepted.request.metadata,
            "config": accepted.options.config,
            "context": accepted.options.context,
        })
    }

    /// Stores the answers to what waits: one value for the only question, or a map from question ids to values.
    async fn answer(
        &self,
        tx: &mut PgConnection,
        thread: ThreadId,
        branch: i32,
        seq: i64,
        resume: &Value,
    ) -> Result<(), ServiceError> {
        let mut open = pending::open(tx, thread, branch, seq).await?;
        open.retain(|waiting| waiting.kind == "interrupt");
        if open.is_empty() {
            return Err(ServiceError::Conflict(format!(
                "nothing on thread {thread} waits for an answer"
            )));
        }
        for (waiting, answer) in match_answers(&open, resume)? {
            check_answer(waiting, answer)?;
            let mut answers: Vec<Value> = waiting
                .answer
                .as_deref()
                .and_then(|bytes| serde_json::from_slice(bytes).ok())
                .unwrap_or_default();
            answers.push(answer.clone());
            let answers = serde_json::to_vec(&answers).map_err(ServiceError::internal)?;
            if !pending::answer(tx, thread, waiting, &answers).await? {
                return Err(ServiceError::Conflict(
                    "the question was answered meanwhile".to_owned(),
                ));
            }
        }
        Ok(())
    }
}

fn question_of(waiting: &WaitingTask) -> Value {
    waiting
        .data
        .as_deref()
        .and_then(|bytes| serde_json::from_slice(bytes).ok())
        .unwrap_or(Value::Null)
}

fn id_of(waiting: &WaitingTask) -> String {
    question_of(waiting).get("id").and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn match_answers<'a>(
    open: &'a [WaitingTask],
    resume: &'a Value,
) -> Result<Vec<(&'a WaitingTask, &'a Value)>, ServiceError> {
    let ids: Vec<String> = open.iter().map(id_of).collect();
    let looks_like_id =
        |key: &String| key.len() == 32 && key.bytes().all(|byte| byte.is_ascii_hexdigit());
    if let Value::Object(map) = resume
        && !map.is_empty()
        && (map.keys().any(|key| ids.contains(key)) || map.keys().all(looks_like_id))
    {
        return map
            .iter()
            .map(|(id, answer)| {
                let at = ids.iter().position(|known| known == id).ok_or_else(|| {
                    ServiceError::invalid_at(
                        format!("/command/resume/{id}"),
                        format!(
                            "no question with the id {id} waits; those that do: {}",
                            ids.join(", ")
                        ),
                    )
                })?;
                Ok((&open[at], answer))
            })
            .collect();
    }
    match open {
        [only] => Ok(vec![(only, resume)]),
        several => Err(ServiceError::invalid_at(
            "/command/resume",
            format!(
                "{} questions wait, so an answer must name its question: {{\"ID\": answer}}, with ids among {}",
                several.len(),
                ids.join(", ")
            ),
        )),
    }
}

fn check_answer(waiting: &WaitingTask, answer: &Value) -> Result<(), ServiceError> {
    let question = question_of(waiting);
    let Some(schema) = question.get("response_schema").filter(|schema| !schema.is_null()) else {
        return Ok(());
    };
    let validator =
        jsonschema::validator_for(schema).map_err(|err| ServiceError::internal(err.to_string()))?;
    validator.validate(answer).map_err(|err| {
        ServiceError::invalid_at(
            format!("/command/resume{}", err.instance_path()),
            format!("the answer to `{}` is not of its schema: {err}", waiting.node),
        )
    })
}

fn stops(field: &str, graph: &Graph, selection: &NodeSelection) -> Result<Stops, ServiceError> {
    match selection {
        NodeSelection::None => Ok(Stops::Never),
        NodeSelection::All => Ok(Stops::All),
        NodeSelection::Named(names) => {
            match names.iter().find(|name| graph.find_node(name).is_none()) {
                Some(name) => Err(ServiceError::invalid_at(
                    format!("/{field}"),
                    format!("graph `{}` has no node `{name}`", graph.name),
                )),
                None => Ok(Stops::At(names.clone())),
            }
        }
    }
}

fn recursion_limit(config: &Object) -> Result<Option<u32>, ServiceError> {
    let Some(limit) = config.get("recursion_limit").filter(|limit| !limit.is_null()) else {
        return Ok(None);
    };
    let limit =
        limit.as_u64().and_then(|limit| u32::try_from(limit).ok()).filter(|limit| *limit > 0);
    limit.map(Some).ok_or_else(|| {
        ServiceError::invalid_at(
            "/config/recursion_limit",
            "`recursion_limit` must be a whole number from 1 on",
        )
    })
}

/// The modes for which rows are kept; the others show checkpoints.
fn kept_modes(modes: &[StreamMode]) -> Vec<String> {
    use StreamMode::{Custom, Debug, Messages, MessagesTuple, Tasks, Updates};
    let kept = modes
        .iter()
        .filter(|mode| matches!(mode, Updates | Tasks | Custom | Messages | MessagesTuple | Debug));
    kept.map(|mode| mode.as_str().to_owned()).collect()
}

/// The request as it is echoed. A large input is not kept twice.
fn kwargs(request: &CreateRun, config: &Object, context: &Value) -> Value {
    const MOST: usize = 8192;
    let input = request.input.as_ref().filter(|input| input.to_string().len() <= MOST);
    json!({
        "input": input,
        "config": config,
        "context": context,
        "stream_mode": request.stream_modes,
        "subgraphs": request.stream_subgraphs,
        "resumable": request.stream_resumable,
        "durability": request.durability,
        "webhook": request.webhook,
    })
}

/// What is wrong with an order, for the client.
pub(super) fn order_error(err: OrderError) -> ServiceError {
    let message = crate::graph::exec::chain(&err);
    match err {
        OrderError::Input { path, .. } => {
            ServiceError::invalid_at(format!("/input{path}"), message)
        }
        OrderError::Unknown { .. } => ServiceError::invalid_at("/command", message),
        OrderError::Nothing => ServiceError::invalid_at("/input", message),
        OrderError::Write(_) | OrderError::Step(_) => ServiceError::invalid(message),
    }
}

impl From<checkpoints::StandingError> for ServiceError {
    fn from(err: checkpoints::StandingError) -> Self {
        match err {
            checkpoints::StandingError::Store(err) => err.into(),
            checkpoints::StandingError::Decode(err) => Self::internal(err),
        }
    }
}

impl From<crate::store::graphs::GraphError> for ServiceError {
    fn from(err: crate::store::graphs::GraphError) -> Self {
        match err {
            crate::store::graphs::GraphError::Store(err) => err.into(),
            other => Self::internal(other),
        }
    }
}
