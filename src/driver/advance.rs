//! One grant, from the claim to the moment when the run leaves memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};
use tokio::sync::OwnedSemaphorePermit;

use super::Shared;
use crate::graph::channel::State;
use crate::graph::checkpoint::CheckpointError;
use crate::graph::exec::{Cursor, ExecError, Exit, Namespace, Options, Run, Waiting, restore};
use crate::graph::input::{Order, Standing, begin};
use crate::graph::model::Graph;
use crate::graph::step::{Ambient, Failure, Position, uuid_of};
use crate::graph::value::Shared as SharedValue;
use crate::ids::{RunId, TaskId, ThreadId};
use crate::store::checkpointer::{RunCheckpointer, Shown};
use crate::store::graphs::GraphError;
use crate::store::queue::{self, Grant, Parked};
use crate::store::runs::{self, Ending, RunOptions};
use crate::store::{StoreError, checkpoints, crash, pending, stream_events, transaction};

/// A suspect that has run so long without killing the process lets the next one start.
const SUSPECT_FOR: Duration = Duration::from_secs(5);
/// Pauses before a run that could not be moved is given back.
const GIVE_BACK_AFTER: Duration = Duration::from_millis(500);

/// Why a grant came to nothing.
#[derive(Debug, thiserror::Error)]
enum AdvanceError {
    #[error(transparent)]
    Exec(#[from] ExecError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// The run belongs to somebody else.
    #[error("the run is no longer held")]
    Fenced,
    /// What is stored of the run is not what this program writes.
    #[error("{0}")]
    Unreadable(String),
}

impl From<sqlx::Error> for AdvanceError {
    fn from(err: sqlx::Error) -> Self {
        Self::Store(err.into())
    }
}

/// Moves a run until it leaves memory; `root` is where it stands, when that is known.
pub(super) async fn advance(
    shared: &Arc<Shared>,
    grant: Grant,
    root: Option<Namespace>,
    suspect: Option<OwnedSemaphorePermit>,
) {
    let run = grant.run_id;
    let result = match suspect {
        Some(permit) => move_suspect(shared, &grant, permit).await,
        None => move_run(shared, &grant, root).await,
    };
    let Err(err) = result else { return };
    match &err {
        AdvanceError::Fenced
        | AdvanceError::Exec(ExecError::Checkpoint(CheckpointError::Fenced)) => {
            tracing::info!(run.id = %run, fence = grant.fence, "run {run} went on elsewhere");
        }
        AdvanceError::Exec(ExecError::Decode(_))
        | AdvanceError::Graph(GraphError::Unusable { .. } | GraphError::Unknown(_))
        | AdvanceError::Unreadable(_) => {
            tracing::error!(error = &err as &dyn std::error::Error, run.id = %run, "run {run} cannot be read");
            let failure = Failure {
                kind: "unreadable".to_owned(),
                message: crate::graph::exec::chain(&err),
                attempts: 1,
            };
            if let Err(err) = end_failed(shared, &grant, None, &failure).await {
                give_back(shared, &grant, &err).await;
            }
        }
        _ => give_back(shared, &grant, &err).await,
    }
}

/// Moves a run that a process died with; the next suspect waits until this one has committed, or a while.
async fn move_suspect(
    shared: &Arc<Shared>,
    grant: &Grant,
    permit: OwnedSemaphorePermit,
) -> Result<(), AdvanceError> {
    let mut moved = shared.signals.subscribe(grant.run_id);
    let let_go = async {
        moved.moved(SUSPECT_FOR).await;
        drop(permit);
        shared.look.notify_one();
        std::future::pending::<()>().await;
    };
    let result = tokio::select! {
        result = move_run(shared, grant, None) => result,
        () = let_go => Ok(()),
    };
    shared.look.notify_one();
    result
}

/// The engine panicked: the run goes back as a suspect, so that it cannot do so for ever.
pub(super) async fn surrender(shared: &Arc<Shared>, run: RunId, fence: i64) {
    loop {
        let result = async {
            let mut db = shared.pool.acquire().await?;
            crash::around("surrender", queue::surrender(&mut db, run, fence)).await
        };
        if result.await.is_ok() {
            shared.look.notify_one();
            return;
        }
        tokio::time::sleep(GIVE_BACK_AFTER).await;
    }
}

/// The database failed: the run goes back to the queue as soon as it can.
async fn give_back(shared: &Arc<Shared>, grant: &Grant, err: &AdvanceError) {
    let run = grant.run_id;
    tracing::warn!(error = err as &dyn std::error::Error, run.id = %run, "run {run} could not be advanced");
    // Until that succeeds or the lease is lost, which ends this task.
    loop {
        tokio::time::sleep(GIVE_BACK_AFTER).await;
        let result = async {
            let mut db = shared.pool.acquire().await?;
            crash::around("give back", queue::release(&mut db, run, grant.fence)).await
        };
        if result.await.is_ok() {
            shared.signals.queued();
            return;
        }
    }
}

/// Moves a run from `root`, or from what is stored of it.
async fn move_run(
    shared: &Arc<Shared>,
    grant: &Grant,
    mut root: Option<Namespace>,
) -> Result<(), AdvanceError> {
    let graph = shared.graphs.get(&grant.graph_hash).await?;
    let stored: RunOptions = serde_json::from_slice(&grant.options)
        .map_err(|err| AdvanceError::Unreadable(format!("the run's options: {err}")))?;
    if grant.claims >= shared.config.max_claims {
        return ask_about_poison(shared, grant, &graph).await;
    }
    let ambient = ambient(shared, grant, &graph, &stored);
    let mut grant = grant.clone();
    if grant.seq == -1 {
        let Some(position) = begin_run(shared, &grant, &graph, &ambient).await? else {
            return Ok(());
        };
        // The thread may stand on another branch than when the run was accepted.
        (grant.seq, grant.first_seq, grant.branch) = (position.seq, position.seq, position.branch);
    }
    let grant = &grant;
    let (seq, first_seq) = (grant.seq, grant.first_seq);
    let streamed = !grant.stream_modes.is_empty();
    let place = if streamed && root.is_none() {
        let mut db = shared.pool.acquire().await?;
        stream_events::next_place(&mut db, grant.run_id, seq + 1).await?
    } else {
        0
    };
    let checkpointer = Arc::new(RunCheckpointer {
        pool: shared.pool.clone(),
        committer: shared.committer.clone(),
        signals: Arc::clone(&shared.signals),
        run_id: grant.run_id,
        thread_id: grant.thread_id,
        fence: grant.fence,
        authority: shared.authority.clone(),
        branch: grant.branch,
        root_seq: AtomicI64::new(seq),
        streamed,
        shown: Shown::default(),
        ended: AtomicBool::new(false),
    });
    let run = Run {
        run_id: grant.run_id,
        thread_id: grant.thread_id,
        fence: grant.fence,
        generation: grant.generation,
        ambient,
        checkpointer: Arc::clone(&checkpointer) as _,
        nodes: Arc::clone(&shared.nodes),
        options: Options { max_parallel: shared.config.max_parallel, ..stored.engine.clone() },
        drain: Arc::clone(&shared.drain),
        cursor: Cursor::new(seq, place),
    };
    let deadline = deadline(grant, &graph);
    let mut wake = grant.wake;
    loop {
        let stored = match root.take() {
            Some(root) => Some(root),
            None => restore(checkpointer.as_ref(), "", &graph).await?,
        };
        let Some(mut root) = stored else {
            return Err(AdvanceError::Unreadable("the run has no checkpoint".to_owned()));
        };
        root.first_seq = first_seq;
        let exit = match until(shared, deadline, run.advance(root)).await? {
            Some(exit) => exit?,
            None => {
                let message =
                    "the run took longer than `limits: duration` of its graph allows".to_owned();
                let failure = Failure { kind: "duration_limit".to_owned(), message, attempts: 1 };
                return end_failed(shared, grant, Some(&graph), &failure).await;
            }
        };
        if checkpointer.ended.load(Ordering::Relaxed) {
            // Its last commit has ended it.
            return Ok(());
        }
        match leave(shared, grant, &graph, exit, wake, deadline).await? {
            Some(now) => wake = now,
            None => return Ok(()),
        }
    }
}

/// What to do with a run that cannot go on in memory. Answers what `wake` is now when it can after all.
async fn leave(
    shared: &Arc<Shared>,
    grant: &Grant,
    graph: &Arc<Graph>,
    exit: Exit,
    wake: i64,
    deadline: Option<DateTime<Utc>>,
) -> Result<Option<i64>, AdvanceError> {
    match exit {
        Exit::Done(state) => end_done(shared, grant, graph, &state).await?,
        Exit::Failed(failure) => end_failed(shared, grant, Some(graph), &failure).await?,
        Exit::Stopped => end_asking(shared, grant, graph).await?,
        Exit::Waiting(waiting) if waiting.people_only() => {
            // An answer cannot come while the run is active, so nothing is missed here.
            end_asking(shared, grant, graph).await?;
        }
        Exit::Waiting(waiting) => return park(shared, grant, &waiting, wake, deadline).await,
        Exit::Released => {
            let mut db = shared.pool.acquire().await?;
            crash::around("release", queue::release(&mut db, grant.run_id, grant.fence)).await?;
            shared.signals.queued();
        }
    }
    Ok(None)
}

async fn park(
    shared: &Arc<Shared>,
    grant: &Grant,
    waiting: &Waiting,
    wake: i64,
    deadline: Option<DateTime<Utc>>,
) -> Result<Option<i64>, AdvanceError> {
    let below = i32::try_from(waiting.wake_below()).unwrap_or(i32::MAX);
    let mut db = shared.pool.acquire().await?;
    let parking = queue::park(&mut db, grant.run_id, grant.fence, wake, below, deadline);
    let parked = crash::around("park", parking).await?;
    match parked {
        Parked::Yes => {
            shared.signals.run_moved(grant.run_id, false);
            shared.look.notify_one();
            Ok(None)
        }
        Parked::Awake(now) => {
            crash::around("deliver", queue::deliver(&mut db, grant.run_id, grant.fence)).await?;
            Ok(Some(now))
        }
        Parked::Fenced => Err(AdvanceError::Fenced),
    }
}

/// Runs `work` until `deadline`; `None` when that came first. The clock is the database's.
async fn until<T>(
    shared: &Shared,
    deadline: Option<DateTime<Utc>>,
    work: impl Future<Output = T>,
) -> Result<Option<T>, AdvanceError> {
    let Some(deadline) = deadline else { return Ok(Some(work.await)) };
    let mut db = shared.pool.acquire().await?;
    let left = queue::until(&mut db, deadline).await?;
    drop(db);
    // `timeout` lets the work begin even when no time is left.
    if left.is_zero() {
        return Ok(None);
    }
    Ok(tokio::time::timeout(left, work).await.ok())
}

fn deadline(grant: &Grant, graph: &Graph) -> Option<DateTime<Utc>> {
    let limit = graph.limits.duration?;
    Some(grant.started_at? + chrono::Duration::from_std(limit).ok()?)
}

fn ambient(shared: &Shared, grant: &Grant, graph: &Graph, stored: &RunOptions) -> Ambient {
    let run = json!({
        "id": grant.run_id,
        "thread_id": grant.thread_id,
        "graph": graph.name,
        "assistant_id": grant.assistant_id,
        "user_id": grant.user_id,
        "metadata": grant.metadata,
        "config": stored.config,
        "context": stored.context,
    });
    Ambient { run: SharedValue::new(run), env: SharedValue::new(shared.config.env.clone()) }
}

/// The first checkpoint of a run that waited for its thread. `None`: it could not begin and has ended.
async fn begin_run(
    shared: &Arc<Shared>,
    grant: &Grant,
    graph: &Arc<Graph>,
    ambient: &Ambient,
) -> Result<Option<Position>, AdvanceError> {
    let order: Order = match &grant.input {
        Some(bytes) => serde_json::from_slice(bytes)
            .map_err(|err| AdvanceError::Unreadable(format!("the run's input: {err}")))?,
        None => Order::default(),
    };
    let mut tx = transaction::begin(&shared.pool).await?;
    let thread = runs::lock_thread(&mut tx, grant.thread_id).await?.ok_or(AdvanceError::Fenced)?;
    let standing = standing(&mut tx, grant.thread_id, thread.branch, graph).await?;
    let fresh = thread.graph_hash.as_deref() != Some(grant.graph_hash.as_slice());
    let begun = match begin(graph, ambient, standing, &order, None, fresh) {
        Ok(begun) => begun,
        Err(err) => {
            tx.rollback().await?;
            let failure = Failure {
                kind: "invalid_input".to_owned(),
                message: crate::graph::exec::chain(&err),
                attempts: 1,
            };
            end_failed(shared, grant, Some(graph), &failure).await?;
            return Ok(None);
        }
    };
    let position = begun.position;
    if !runs::begin(&mut tx, grant.run_id, grant.fence, position.seq, position.branch).await? {
        return Err(AdvanceError::Fenced);
    }
    match &begun.row {
        Some(row) => {
            pending::abandon(&mut tx, grant.thread_id).await?;
            checkpoints::insert(&mut tx, grant.thread_id, grant.run_id, row).await?;
        }
        None => pending::adopt(&mut tx, grant.thread_id, grant.run_id).await?,
    }
    crash::commit(tx, "begin").await?;
    Ok(Some(position))
}

/// Where a thread stands on a branch, read on the caller's connection.
async fn standing(
    db: &mut sqlx::PgConnection,
    thread: ThreadId,
    branch: i32,
    graph: &Graph,
) -> Result<Standing, AdvanceError> {
    checkpoints::standing(db, thread, branch, None, graph).await.map_err(|err| match err {
        checkpoints::StandingError::Store(err) => err.into(),
        checkpoints::StandingError::Decode(err) => ExecError::from(err).into(),
    })
}

async fn end_done(
    shared: &Arc<Shared>,
    grant: &Grant,
    graph: &Graph,
    state: &State,
) -> Result<(), AdvanceError> {
    let values = state.to_json(graph).to_string().into_bytes();
    let result = state.output(graph).to_string().into_bytes();
    end(shared, grant, &Ending::done(&values, &result), None).await
}

/// The run ends well, and the thread waits for people: or for whoever goes on after a stop that the client asked for.
async fn end_asking(
    shared: &Arc<Shared>,
    grant: &Grant,
    graph: &Arc<Graph>,
) -> Result<(), AdvanceError> {
    let mut db = shared.pool.acquire().await?;
    let standing = standing(&mut db, grant.thread_id, grant.branch, graph).await?;
    let seq = standing.position.map_or(0, |position| position.seq);
    let open = pending::open(&mut db, grant.thread_id, grant.branch, seq).await?;
    drop(db);
    let mut by_task = Map::new();
    let mut all = Vec::new();
    for waiting in open.iter().filter(|waiting| waiting.kind == "interrupt") {
        let Some(Ok(question)) = waiting.data.as_deref().map(serde_json::from_slice::<Value>)
        else {
            continue;
        };
        all.push(question.clone());
        by_task.insert(waiting.task_id.to_string(), json!([question]));
    }
    let expires = open.iter().any(|waiting| waiting.due.is_some());
    let values = standing.state.to_json(graph).to_string().into_bytes();
    let mut result = standing.state.output(graph);
    if let Value::Object(result) = &mut result {
        result.insert("__interrupt__".to_owned(), Value::Array(all));
    }
    let result = result.to_string().into_bytes();
    let interrupts = Value::Object(by_task).to_string().into_bytes();
    let ending = Ending {
        status: "success",
        error: None,
        result: Some(&result),
        cancel_reason: None,
        thread_status: "interrupted",
        values: Some(&values),
        interrupts: Some(&interrupts),
        thread_error: None,
    };
    end(shared, grant, &ending, expires.then(RunId::new)).await
}

async fn end_failed(
    shared: &Arc<Shared>,
    grant: &Grant,
    graph: Option<&Arc<Graph>>,
    failure: &Failure,
) -> Result<(), AdvanceError> {
    let values = match graph {
        Some(graph) => {
            let mut db = shared.pool.acquire().await?;
            // A state that cannot be read is no reason to keep the failure from the client.
            match standing(&mut db, grant.thread_id, grant.branch, graph).await {
                Ok(standing) => Some(standing.state.to_json(graph).to_string().into_bytes()),
                Err(AdvanceError::Store(err)) => return Err(err.into()),
                Err(_) => None,
            }
        }
        None => None,
    };
    let error =
        json!({ "error": failure.kind, "message": failure.message }).to_string().into_bytes();
    let result = json!({ "__error__": { "error": failure.kind, "message": failure.message } })
        .to_string()
        .into_bytes();
    let ending = Ending {
        status: if failure.kind == "duration_limit" { "timeout" } else { "error" },
        error: Some(&error),
        result: Some(&result),
        cancel_reason: None,
        thread_status: "error",
        values: values.as_deref(),
        interrupts: None,
        thread_error: Some(&error),
    };
    end(shared, grant, &ending, None).await
}

/// Ends the run under its fence; `followup` is the run that starts when a question expires.
async fn end(
    shared: &Arc<Shared>,
    grant: &Grant,
    ending: &Ending<'_>,
    followup: Option<RunId>,
) -> Result<(), AdvanceError> {
    let mut tx = transaction::begin(&shared.pool).await?;
    runs::lock_thread(&mut tx, grant.thread_id).await?.ok_or(AdvanceError::Fenced)?;
    let ended =
        runs::finish(&mut tx, grant.thread_id, grant.run_id, Some(grant.fence), ending).await?;
    let Some(ended) = ended else { return Err(AdvanceError::Fenced) };
    if let (Some(followup), None) = (followup, ended.promoted) {
        let options = followup_options(grant)?;
        runs::insert_followup(&mut tx, grant.run_id, followup, &options).await?;
    }
    crash::commit(tx, "end").await?;
    shared.signals.run_ended(grant.run_id);
    if ended.queues() {
        shared.signals.queued();
    }
    Ok(())
}

/// The run after a question's expiry sees what its predecessor saw, and nobody reads its stream.
fn followup_options(grant: &Grant) -> Result<Vec<u8>, AdvanceError> {
    let unreadable =
        |err: serde_json::Error| AdvanceError::Unreadable(format!("the run's options: {err}"));
    let mut options: RunOptions = serde_json::from_slice(&grant.options).map_err(unreadable)?;
    options.engine = Options {
        resumed: true,
        interrupt_before: options.engine.interrupt_before,
        interrupt_after: options.engine.interrupt_after,
        supersteps: options.engine.supersteps,
        ..Options::default()
    };
    serde_json::to_vec(&options).map_err(unreadable)
}

/// Several processes died with this run and nothing else: a person decides whether it may try again.
async fn ask_about_poison(
    shared: &Arc<Shared>,
    grant: &Grant,
    graph: &Arc<Graph>,
) -> Result<(), AdvanceError> {
    let run = grant.run_id;
    tracing::error!(run.id = %run, claims = grant.claims, "run {run} killed its process again and again; a person is asked");
    if grant.seq == -1 {
        // It has no checkpoint to ask at, and nothing that a second try could go on with.
        let message =
            format!("the server process died {} times while this run was to begin", grant.claims);
        let failure = Failure { kind: "process_died".to_owned(), message, attempts: 1 };
        return end_failed(shared, grant, Some(graph), &failure).await;
    }
    let hash =
        <sha2::Sha256 as sha2::Digest>::digest([b"poison".as_slice(), run.0.as_bytes()].concat());
    let task = TaskId(uuid_of(&hash));
    let message = format!(
        "The server process died {} times while it worked on this run and on nothing else. Answer anything to let it try again.",
        grant.claims
    );
    let question = json!({
        "id": crate::graph::step::interrupt_id(task, 0),
        "value": { "reason": "process_died", "times": grant.claims, "message": message },
        "response_schema": null,
    });
    let mut db = shared.pool.acquire().await?;
    let question = question.to_string();
    let asking = pending::ask(
        &mut db,
        grant.thread_id,
        run,
        grant.fence,
        Position { branch: grant.branch, seq: grant.seq },
        task,
        question.as_bytes(),
    );
    crash::around("poison", asking).await?;
    drop(db);
    end_asking(shared, grant, graph).await
}

/// A question expired on an idle thread: the run that deals with it becomes the thread's active one.
pub(super) async fn activate_followup(
    shared: &Arc<Shared>,
    thread: ThreadId,
    run: RunId,
) -> Result<(), StoreError> {
    let mut tx = transaction::begin(&shared.pool).await?;
    let locked = runs::lock_thread(&mut tx, thread).await?;
    if locked.is_some_and(|thread| thread.active_run.is_none())
        && runs::activate(&mut tx, thread, run).await?
    {
        crash::commit(tx, "activate").await?;
    }
    Ok(())
}
