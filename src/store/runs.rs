//! Runs as records: accepted, read, listed, ended.
//!
//! Accepting a run and ending one move the thread with it, under the thread's row lock, so that
//! exactly one run of a thread is active and the end of one promotes the next.
//!
//! **Invariant:** a run row and its first checkpoint are inserted in the same transaction.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::PgConnection;

use super::{StoreError, webhooks};
use crate::graph::exec::Options;
use crate::ids::{AssistantId, RunId, ThreadId, UserId};

/// What a client asked of a run: `runs.options`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunOptions {
    /// What the engine is to do.
    pub engine: Options,
    /// `tags`, `recursion_limit`, `configurable`: seen by expressions as `run.config`.
    pub config: Value,
    /// Seen by expressions as `run.context`.
    pub context: Value,
    /// The request as it is echoed to clients.
    pub kwargs: Value,
}

/// A thread under its row lock.
#[derive(Debug, Clone)]
pub struct LockedThread {
    /// Its owner.
    pub user_id: UserId,
    /// Its status.
    pub status: String,
    /// The branch that runs go on with.
    pub branch: i32,
    /// The run that may move it.
    pub active_run: Option<RunId>,
    /// The graph of its last run or update.
    pub graph_hash: Option<Vec<u8>>,
}

/// Locks a thread's row until the end of the transaction.
pub async fn lock_thread(
    db: &mut PgConnection,
    thread: ThreadId,
) -> Result<Option<LockedThread>, StoreError> {
    let row = sqlx::query_as!(
        LockedThread,
        r#"select user_id as "user_id: UserId", status, branch, active_run as "active_run: RunId", graph_hash
             from threads where thread_id = $1 for no key update"#,
        thread as ThreadId,
    )
    .fetch_optional(db)
    .await?;
    Ok(row)
}

/// A run to insert.
#[derive(Debug)]
pub struct NewRun<'a> {
    /// Its id.
    pub run_id: RunId,
    /// Its thread.
    pub thread_id: ThreadId,
    /// Its owner.
    pub user_id: UserId,
    /// What the client named.
    pub assistant_id: AssistantId,
    /// The graph that it is pinned to.
    pub graph_hash: &'a [u8],
    /// See the schema.
    pub multitask_strategy: &'a str,
    /// Larger first.
    pub priority: i32,
    /// Seconds until it may start.
    pub after_seconds: Option<f64>,
    /// JSON of its input, for a run that has not begun.
    pub input: Option<&'a [u8]>,
    /// JSON of what the client asked for.
    pub options: &'a [u8],
    /// Stream modes that rows are written for.
    pub stream_modes: &'a [String],
    /// The client's keys.
    pub metadata: &'a Value,
    /// Whether the thread goes when the run ends.
    pub temporary_thread: bool,
    /// Whether it is the thread's active run; the others wait for it.
    pub active: bool,
    /// Where it begins: the seq of its input checkpoint; -1 when it has none yet.
    pub seq: i64,
    /// The branch that it runs on.
    pub branch: i32,
    /// Where its end is told.
    pub webhook: Option<&'a str>,
}

/// Inserts a run; an active one becomes claimable at once, or when its time has come.
pub async fn insert(db: &mut PgConnection, run: &NewRun<'_>) -> Result<DateTime<Utc>, StoreError> {
    let created_at = sqlx::query_scalar!(
        "with r as (
           insert into runs (run_id, thread_id, user_id, assistant_id, graph_hash, multitask_strategy, priority,
                             not_before, input, options, stream_modes, metadata, temporary_thread,
                             branch, webhook, created_at, updated_at)
           values ($1, $2, $3, $4, $5, $6, $7, cynai_now() + make_interval(secs => $8), $9, $10, $11, $12, $13,
                   $16, $17, cynai_now(), cynai_now())
           returning run_id, thread_id, user_id, priority, not_before, created_at),
         h as (
           insert into heads (run_id, thread_id, seq, first_seq, branch, status)
           select run_id, thread_id, $15, $15, $16, case when $14 then 'queued' else 'pending' end from r),
         q as (
           insert into queue (run_id, thread_id, user_id, priority, state, due)
           select run_id, thread_id, user_id, priority, case when not_before is null then 'ready' else 'later' end,
                  coalesce(not_before, cynai_now())
             from r where $14),
         t as (
           update threads set status = 'busy', active_run = $1, branch = $16, graph_hash = $5, updated_at = cynai_now()
            where thread_id = $2 and $14)
         select created_at from r",
        run.run_id as RunId,
        run.thread_id as ThreadId,
        run.user_id as UserId,
        run.assistant_id as AssistantId,
        run.graph_hash,
        run.multitask_strategy,
        run.priority,
        run.after_seconds,
        run.input,
        run.options,
        run.stream_modes,
        run.metadata,
        run.temporary_thread,
        run.active,
        run.seq,
        run.branch,
        run.webhook,
    )
    .fetch_one(db)
    .await?;
    Ok(created_at)
}

/// A run that has not begun gets its first checkpoint; false when the fence has moved on.
pub async fn begin(
    db: &mut PgConnection,
    run: RunId,
    fence: i64,
    seq: i64,
    branch: i32,
) -> Result<bool, StoreError> {
    let result = sqlx::query!(
        "with h as (
           update heads set seq = $3, first_seq = $3, branch = $4, claims = 0
            where run_id = $1 and fence = $2 and status = 'running' and seq = -1
           returning thread_id),
         r as (update runs set branch = $4 where run_id = $1 returning graph_hash)
         update threads t set branch = $4, graph_hash = r.graph_hash from h, r where t.thread_id = h.thread_id",
        run as RunId,
        fence,
        seq,
        branch,
    )
    .execute(db)
    .await?;
    Ok(result.rows_affected() == 1)
}

/// How a run ends.
#[derive(Debug)]
pub struct Ending<'a> {
    /// `success`, `error`, `timeout`, `interrupted`.
    pub status: &'a str,
    /// JSON `{"error", "message"}`.
    pub error: Option<&'a [u8]>,
    /// JSON of what waiting for the run answers.
    pub result: Option<&'a [u8]>,
    /// Why it was cancelled.
    pub cancel_reason: Option<&'a str>,
    /// `idle`, `interrupted`, `error`.
    pub thread_status: &'a str,
    /// JSON of the state; `None` keeps what the thread has.
    pub values: Option<&'a [u8]>,
    /// JSON of the interrupts by task.
    pub interrupts: Option<&'a [u8]>,
    /// JSON of why the thread is in error.
    pub thread_error: Option<&'a [u8]>,
}

/// What the end of a run led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// The run that goes on with the thread.
    pub promoted: Option<RunId>,
    /// Whether a run was started that tells the end to the client's URL.
    pub told: bool,
}

impl Ended {
    /// Whether there is something new to claim.
    #[must_use]
    pub fn queues(&self) -> bool {
        self.promoted.is_some() || self.told
    }
}

/// Ends a run under its fence, or whatever its fence is when the caller says `None`, and promotes the thread's next.
/// Its jobs that have not ended are to be stopped, and its end is to be told to its webhook.
///
/// The caller holds the thread's lock. `None`: the run had ended already or is somebody else's.
pub async fn finish(
    db: &mut PgConnection,
    thread: ThreadId,
    run: RunId,
    fence: Option<i64>,
    ending: &Ending<'_>,
) -> Result<Option<Ended>, StoreError> {
    let row = sqlx::query!(
        r#"with h as (
             delete from heads where run_id = $2 and thread_id = $1
                and ($3::bigint is null or (fence = $3 and status = 'running'))
             returning run_id, status),
           unqueued as (delete from queue q using h where q.run_id = h.run_id),
           r as (
             update runs r set status = $4, error = $5, result = $6, cancel_reason = $7,
                    ended_at = cynai_now(), updated_at = cynai_now()
               from h where r.run_id = h.run_id
             returning r.run_id, r.webhook),
           j as (
             update jobs j set status = case when j.worker is null then 'canceled' else 'canceling' end
               from h where j.run_id = h.run_id and j.status in ('intent', 'sent')),
           active as (
             select h.run_id from h join threads t on t.thread_id = $1 and t.active_run = h.run_id),
           n as (
             select r.run_id, r.thread_id, r.user_id, r.priority, r.not_before
               from active, lateral (
                 select * from runs r where r.thread_id = $1 and r.status = 'pending' and r.run_id <> $2
                  order by r.run_id limit 1) r),
           hn as (
             update heads h set status = 'queued' from n where h.run_id = n.run_id and h.status = 'pending'),
           q as (
             insert into queue (run_id, thread_id, user_id, priority, state, due)
             select run_id, thread_id, user_id, priority,
                    case when not_before > cynai_now() then 'later' else 'ready' end,
                    greatest(not_before, cynai_now())
               from n),
           t as (
             update threads t
                set status = case when n.run_id is null then $8 else 'busy' end,
                    active_run = n.run_id, fence = t.fence + 1,
                    state_values = coalesce($9, t.state_values), interrupts = $10, error = $11,
                    updated_at = cynai_now(), state_updated_at = cynai_now()
               from active left join n on true
              where t.thread_id = $1)
           select (select count(*) from h) as "ended!", (select run_id from n) as "promoted: RunId",
                  (select webhook from r) as webhook"#,
        thread as ThreadId,
        run as RunId,
        fence,
        ending.status,
        ending.error,
        ending.result,
        ending.cancel_reason,
        ending.thread_status,
        ending.values,
        ending.interrupts,
        ending.thread_error,
    )
    .fetch_one(&mut *db)
    .await?;
    if row.ended != 1 {
        return Ok(None);
    }
    let told = match &row.webhook {
        Some(url) => webhooks::enqueue(db, run, url, ending.values).await?,
        None => false,
    };
    Ok(Some(Ended { promoted: row.promoted, told }))
}

/// Stores a run that starts when a question on an idle thread expires. The caller holds the thread's lock.
pub async fn insert_followup(
    db: &mut PgConnection,
    after: RunId,
    followup: RunId,
    options: &[u8],
) -> Result<(), StoreError> {
    sqlx::query!(
        r#"with due as (
             select min(due) as due from pending where run_id = $1 and not settled and kind = 'interrupt'),
           r as (
             insert into runs (run_id, thread_id, user_id, assistant_id, graph_hash, priority, not_before, options,
                               stream_modes, metadata, webhook, created_at, updated_at)
             select $2, thread_id, user_id, assistant_id, graph_hash, priority, due.due, $3, '{}',
                    '{"source": "interrupt_expiry"}', webhook, cynai_now(), cynai_now()
               from runs, due where run_id = $1 and due.due is not null
             returning run_id, thread_id, user_id, priority, not_before),
           h as (
             insert into heads (run_id, thread_id, status) select run_id, thread_id, 'pending' from r)
         insert into queue (run_id, thread_id, user_id, priority, state, due)
         select run_id, thread_id, user_id, priority, 'later', not_before from r"#,
        after as RunId,
        followup as RunId,
        options,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Removes the runs of a thread that wait for a question to expire: it is being answered. Under the thread's lock.
pub async fn delete_followups(db: &mut PgConnection, thread: ThreadId) -> Result<(), StoreError> {
    sqlx::query!(
        "with q as (
           delete from queue q using heads h
            where q.thread_id = $1 and h.run_id = q.run_id and h.status = 'pending' returning q.run_id),
         h as (delete from heads h using q where h.run_id = q.run_id)
         delete from runs r using q where r.run_id = q.run_id",
        thread as ThreadId,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Makes a waiting run the active one of an idle thread, under the thread's lock.
pub async fn activate(
    db: &mut PgConnection,
    thread: ThreadId,
    run: RunId,
) -> Result<bool, StoreError> {
    let result = sqlx::query!(
        "with h as (
           update heads set status = 'queued' where run_id = $2 and status = 'pending' returning run_id),
         q as (update queue q set state = 'ready' from h where q.run_id = h.run_id)
         update threads t set status = 'busy', active_run = $2, updated_at = cynai_now()
           from h where t.thread_id = $1 and t.active_run is null",
        thread as ThreadId,
        run as RunId,
    )
    .execute(db)
    .await?;
    Ok(result.rows_affected() == 1)
}

/// A run as stored.
#[derive(Debug, Clone)]
pub struct RunRow {
    /// See the schema for all of these.
    pub run_id: RunId,
    /// Its thread.
    pub thread_id: ThreadId,
    /// Its owner.
    pub user_id: UserId,
    /// What the client named.
    pub assistant_id: AssistantId,
    /// The graph that it is pinned to.
    pub graph_hash: Vec<u8>,
    /// The branch that it runs on.
    pub branch: i32,
    /// How far it is.
    pub status: String,
    /// See the schema.
    pub multitask_strategy: String,
    /// JSON of what the client asked for.
    pub options: Vec<u8>,
    /// The client's keys.
    pub metadata: Value,
    /// Stream modes that rows are written for.
    pub stream_modes: Vec<String>,
    /// JSON of why it failed.
    pub error: Option<Vec<u8>>,
    /// JSON of what waiting for it answers.
    pub result: Option<Vec<u8>>,
    /// Why it was cancelled.
    pub cancel_reason: Option<String>,
    /// When it was accepted.
    pub created_at: DateTime<Utc>,
    /// When it last changed status.
    pub updated_at: DateTime<Utc>,
    /// When it began.
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended.
    pub ended_at: Option<DateTime<Utc>>,
}

/// Runs of a user, newest first: one by id, or those that match.
#[derive(Debug, Clone, Default)]
pub struct Which<'a> {
    /// On this thread.
    pub thread: Option<ThreadId>,
    /// In this status.
    pub status: Option<&'a str>,
    /// Whose metadata contains this.
    pub metadata: Option<&'a Value>,
}

/// Reads runs.
pub async fn list(
    db: &mut PgConnection,
    user: UserId,
    which: &Which<'_>,
    limit: i64,
    offset: i64,
) -> Result<Vec<RunRow>, StoreError> {
    let rows = sqlx::query_as!(
        RunRow,
        r#"select run_id as "run_id: RunId", thread_id as "thread_id: ThreadId", user_id as "user_id: UserId",
                  assistant_id as "assistant_id: AssistantId", graph_hash, branch, status, multitask_strategy, options,
                  metadata, stream_modes, error, result, cancel_reason, created_at, updated_at, started_at, ended_at
             from runs
            where user_id = $1 and ($2::uuid is null or thread_id = $2)
              and ($3::text is null or status = $3) and ($4::jsonb is null or metadata @> $4)
            order by run_id desc limit $5 offset $6"#,
        user as UserId,
        which.thread.map(|thread| thread.0),
        which.status,
        which.metadata,
        limit,
        offset,
    )
    .fetch_all(db)
    .await?;
    Ok(rows)
}

/// A run by its id, whoever owns it: the caller checks that, or has done so by its thread.
pub async fn find(db: &mut PgConnection, run: RunId) -> Result<Option<RunRow>, StoreError> {
    let row = sqlx::query_as!(
        RunRow,
        r#"select run_id as "run_id: RunId", thread_id as "thread_id: ThreadId", user_id as "user_id: UserId",
                  assistant_id as "assistant_id: AssistantId", graph_hash, branch, status, multitask_strategy, options,
                  metadata, stream_modes, error, result, cancel_reason, created_at, updated_at, started_at, ended_at
             from runs where run_id = $1"#,
        run as RunId,
    )
    .fetch_optional(db)
    .await?;
    Ok(row)
}

/// How many runs of a thread have not ended.
pub async fn count_open(db: &mut PgConnection, thread: ThreadId) -> Result<i64, StoreError> {
    let count = sqlx::query_scalar!(
        r#"select count(*) as "count!" from heads where thread_id = $1"#,
        thread as ThreadId
    )
    .fetch_one(db)
    .await?;
    Ok(count)
}

/// The runs of a thread that wait for its active one, oldest first.
pub async fn pending_of(db: &mut PgConnection, thread: ThreadId) -> Result<Vec<RunId>, StoreError> {
    let runs = sqlx::query_scalar!(
        r#"select run_id as "run_id: RunId" from heads where thread_id = $1 and status = 'pending' order by run_id"#,
        thread as ThreadId
    )
    .fetch_all(db)
    .await?;
    Ok(runs)
}

/// Deletes a run's record, its effects and its stream rows. Its checkpoints stay: they are the thread's.
pub async fn delete(db: &mut PgConnection, run: RunId) -> Result<(), StoreError> {
    sqlx::query!(
        "with s as (delete from stream_events where run_id = $1), j as (delete from jobs where run_id = $1),
         e as (delete from effects where run_id = $1)
         delete from runs where run_id = $1",
        run as RunId
    )
    .execute(db)
    .await?;
    Ok(())
}

/// The graph of a thread's last run or update.
pub async fn graph_of(
    db: &mut PgConnection,
    thread: ThreadId,
) -> Result<Option<Vec<u8>>, StoreError> {
    let hash = sqlx::query_scalar!(
        "select graph_hash from threads where thread_id = $1",
        thread as ThreadId
    )
    .fetch_optional(db)
    .await?;
    Ok(hash.flatten())
}

/// The graph that a thread's metadata names.
pub async fn graph_id_of(
    db: &mut PgConnection,
    thread: ThreadId,
) -> Result<Option<String>, StoreError> {
    let name = sqlx::query_scalar!(
        "select metadata ->> 'graph_id' from threads where thread_id = $1",
        thread as ThreadId
    )
    .fetch_optional(db)
    .await?;
    Ok(name.flatten())
}

/// Records that the state of an idle thread was changed from outside: a grant of authority like any other.
///
/// The caller holds the thread's lock.
pub async fn updated(
    db: &mut PgConnection,
    thread: ThreadId,
    branch: i32,
    graph_hash: &[u8],
    status: &str,
    values: &[u8],
) -> Result<(), StoreError> {
    sqlx::query!(
        "update threads set fence = fence + 1, branch = $2, graph_hash = $3, status = $4, state_values = $5,
                interrupts = null, error = null, updated_at = cynai_now(), state_updated_at = cynai_now()
          where thread_id = $1",
        thread as ThreadId,
        branch,
        graph_hash,
        status,
        values,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Deletes what a run wrote on a thread: its checkpoints, and the branch pointer goes back with them. What waited
/// where the run began waits again.
///
/// The caller holds the thread's lock and the run has ended.
pub async fn roll_back(
    db: &mut PgConnection,
    thread: ThreadId,
    run: RunId,
) -> Result<(), StoreError> {
    sqlx::query!(
        "with gone as (
           delete from checkpoints where thread_id = $1 and run_id = $2
           returning namespace, branch, seq),
         v as (
           delete from channel_values v using gone g
            where v.thread_id = $1 and v.namespace = g.namespace and v.branch = g.branch and v.seq = g.seq),
         w as (
           delete from writes w using gone g
            where w.thread_id = $1 and w.namespace = g.namespace and w.branch = g.branch and w.seq = g.seq),
         p as (
           delete from pending p using gone g
            where p.thread_id = $1 and p.namespace = g.namespace and p.branch = g.branch and p.seq = g.seq)
         select 1 as one",
        thread as ThreadId,
        run as RunId,
    )
    .fetch_optional(&mut *db)
    .await?;
    sqlx::query!(
        "update threads set branch = coalesce(
           (select max(branch) from checkpoints where thread_id = $1 and namespace = ''), 0) where thread_id = $1",
        thread as ThreadId,
    )
    .execute(db)
    .await?;
    Ok(())
}
