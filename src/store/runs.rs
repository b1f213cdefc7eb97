//! Runs as records: accepted, read, listed, ended.
//!
//! Accepting a run and ending one move the thread with it, under the thread's row lock, so that
//! exactly one run of a thread is active and the end of one promotes the next.
//!
//! **Invariant:** a run row and its first checkpoint are inserted in the same transaction.

use std::collections::HashSet;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::PgConnection;

use super::intake::Life;
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

/// Locks those of `threads` that nobody else has locked, until the end of the transaction; answers which.
pub async fn lock_free_threads(
    db: &mut PgConnection,
    threads: &[ThreadId],
) -> Result<HashSet<ThreadId>, StoreError> {
    let locked = sqlx::query_scalar!(
        r#"select thread_id as "thread_id: ThreadId" from threads
            where thread_id = any($1) order by thread_id for no key update skip locked"#,
        &threads.iter().map(|thread| thread.0).collect::<Vec<_>>(),
    )
    .fetch_all(db)
    .await?;
    Ok(locked.into_iter().collect())
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
    /// The driver that it is granted to at once; it must be active, have begun, and not be delayed.
    pub granted: Option<Life>,
}

/// What was decided when a run was inserted.
#[derive(Debug, Clone, Copy)]
pub struct Inserted {
    /// When it was accepted.
    pub created_at: DateTime<Utc>,
    /// The fence of its grant; 0 when it was not granted.
    pub fence: i64,
    /// Runs of the thread that were rolled back.
    pub generation: i32,
}

/// Inserts a run; an active one becomes claimable at once, or when its time has come, unless it is granted.
pub async fn insert(db: &mut PgConnection, run: &NewRun<'_>) -> Result<Inserted, StoreError> {
    let inserted = sqlx::query_as!(
        Inserted,
        r#"with t as (
           update threads set status = 'busy', active_run = $1, branch = $16, graph_hash = $5, updated_at = cynai_now(),
                  fence = fence + case when $18::uuid is null then 0 else 1 end
            where thread_id = $2 and $14 returning fence, generation),
         r as (
           insert into runs (run_id, thread_id, user_id, assistant_id, graph_hash, multitask_strategy, priority,
                             not_before, input, options, stream_modes, metadata, temporary_thread,
                             branch, webhook, status, started_at, created_at, updated_at)
           values ($1, $2, $3, $4, $5, $6, $7, cynai_now() + make_interval(secs => $8), $9, $10, $11, $12, $13,
                   $16, $17, case when $18::uuid is null then 'pending' else 'running' end,
                   case when $18::uuid is not null then cynai_now() end, cynai_now(), cynai_now())
           returning run_id, thread_id, user_id, priority, not_before, created_at),
         h as (
           insert into heads (run_id, thread_id, fence, seq, first_seq, branch, status, instance_id, epoch)
           select run_id, thread_id, case when $18::uuid is null then 0 else t.fence end, $15, $15, $16,
                  case when $18::uuid is not null then 'running' when $14 then 'queued' else 'pending' end, $18, $19
             from r left join t on true
           returning fence),
         q as (
           insert into queue (run_id, thread_id, user_id, priority, state, due)
           select run_id, thread_id, user_id, priority, case when not_before is null then 'ready' else 'later' end,
                  coalesce(not_before, cynai_now())
             from r where $14 and $18::uuid is null)
         select r.created_at, h.fence as "fence!", coalesce((select generation from t), 0) as "generation!" from r, h"#,
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
        run.granted.map(|life| life.instance.0),
        run.granted.map(|life| life.epoch),
    )
    .fetch_one(db)
    .await?;
    Ok(inserted)
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

impl<'a> Ending<'a> {
    /// Of a run that has nothing left to do.
    #[must_use]
    pub fn done(values: &'a [u8], result: &'a [u8]) -> Self {
        Self {
            status: "success",
            error: None,
            result: Some(result),
            cancel_reason: None,
            thread_status: "idle",
            values: Some(values),
            interrupts: None,
            thread_error: None,
        }
    }
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

/// A run that is to end.
#[derive(Debug)]
pub struct ToEnd<'a> {
    /// Its thread, which the caller has locked.
    pub thread: ThreadId,
    /// The run.
    pub run: RunId,
    /// Its grant's fence; `None` ends it whatever its fence is.
    pub fence: Option<i64>,
    /// How it ends.
    pub ending: &'a Ending<'a>,
}

/// Ends a run and promotes the thread's next; see [`finish_all`]. `None`: the run had ended already or is somebody else's.
pub async fn finish(
    db: &mut PgConnection,
    thread: ThreadId,
    run: RunId,
    fence: Option<i64>,
    ending: &Ending<'_>,
) -> Result<Option<Ended>, StoreError> {
    let ended = finish_all(db, &[ToEnd { thread, run, fence, ending }]).await?;
    Ok(ended.into_iter().next().map(|(_, ended)| ended))
}

fn column<'a, T>(runs: &'a [ToEnd<'a>], of: impl Fn(&'a ToEnd<'a>) -> T) -> Vec<T> {
    runs.iter().map(of).collect()
}

/// Ends runs of different threads under their fences, and promotes the next run of each thread. Answers what became of
/// those that have ended by this; the others had ended already or are somebody else's.
///
/// Their jobs that have not ended are to be stopped, what they did to the world and nobody has told of is unknown, and
/// their ends are to be told to their webhooks. The caller holds the threads' locks.
pub async fn finish_all(
    db: &mut PgConnection,
    runs: &[ToEnd<'_>],
) -> Result<Vec<(RunId, Ended)>, StoreError> {
    let rows = sqlx::query!(
        r#"with b as (
             select * from unnest($1::uuid[], $2::uuid[], $3::bigint[], $4::text[], $5::bytea[], $6::bytea[], $7::text[],
                                  $8::text[], $9::bytea[], $10::bytea[], $11::bytea[])
               as b (thread_id, run_id, fence, status, error, result, cancel_reason, thread_status, state_values,
                     interrupts, thread_error)),
           h as (
             delete from heads h using b
              where h.run_id = b.run_id and h.thread_id = b.thread_id
                and (b.fence is null or (h.fence = b.fence and h.status = 'running'))
             returning b.*),
           unqueued as (delete from queue q using h where q.run_id = h.run_id),
           r as (
             update runs r set status = h.status, error = h.error, result = h.result, cancel_reason = h.cancel_reason,
                    ended_at = cynai_now(), updated_at = cynai_now()
               from h where r.run_id = h.run_id
             returning r.run_id, r.webhook),
           j as (
             update jobs j set status = case j.status when 'intent' then 'canceled' else 'canceling' end
               from h where j.run_id = h.run_id and j.status in ('intent', 'sent')),
           e as (
             update effects e set status = 'unknown', ended_at = cynai_now(), outcome = convert_to(
                      '{"kind":"abandoned","message":"the run ended while this was under way"}', 'UTF8')
               from h where e.run_id = h.run_id and e.status = 'intent'),
           active as (
             select h.*, n.run_id as next_run from h
               join threads t on t.thread_id = h.thread_id and t.active_run = h.run_id
               left join lateral (
                 select n.run_id from heads n
                  where n.thread_id = h.thread_id and n.status = 'pending' and n.run_id <> h.run_id
                  order by n.run_id limit 1) n on true),
           hn as (
             update heads n set status = 'queued' from active a where n.run_id = a.next_run and n.status = 'pending'),
           q as (
             insert into queue (run_id, thread_id, user_id, priority, state, due)
             select n.run_id, n.thread_id, n.user_id, n.priority,
                    case when n.not_before > cynai_now() then 'later' else 'ready' end,
                    greatest(n.not_before, cynai_now())
               from active a join runs n on n.run_id = a.next_run),
           t as (
             update threads t
                set status = case when a.next_run is null then a.thread_status else 'busy' end,
                    active_run = a.next_run, fence = t.fence + 1,
                    state_values = coalesce(a.state_values, t.state_values), interrupts = a.interrupts,
                    error = a.thread_error, updated_at = cynai_now(), state_updated_at = cynai_now()
               from active a
              where t.thread_id = a.thread_id)
           select h.run_id as "run_id!: RunId", a.next_run as "promoted: RunId", r.webhook
             from h left join active a using (run_id) left join r using (run_id)"#,
        &column(runs, |end| end.thread.0),
        &column(runs, |end| end.run.0),
        &column(runs, |end| end.fence) as &[Option<i64>],
        &column(runs, |end| end.ending.status) as &[&str],
        &column(runs, |end| end.ending.error) as &[Option<&[u8]>],
        &column(runs, |end| end.ending.result) as &[Option<&[u8]>],
        &column(runs, |end| end.ending.cancel_reason) as &[Option<&str>],
        &column(runs, |end| end.ending.thread_status) as &[&str],
        &column(runs, |end| end.ending.values) as &[Option<&[u8]>],
        &column(runs, |end| end.ending.interrupts) as &[Option<&[u8]>],
        &column(runs, |end| end.ending.thread_error) as &[Option<&[u8]>],
    )
    .fetch_all(&mut *db)
    .await?;
    let mut ended = Vec::with_capacity(rows.len());
    for row in rows {
        let told = match &row.webhook {
            Some(url) => {
                let values = runs.iter().find(|end| end.run == row.run_id);
                let values = values.and_then(|end| end.ending.values);
                webhooks::enqueue(db, row.run_id, url, values).await?
            }
            None => false,
        };
        ended.push((row.run_id, Ended { promoted: row.promoted, told }));
    }
    Ok(ended)
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
/// where the run began waits again. The thread's generation grows: what later runs do has other idempotency keys.
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
        "update threads set generation = generation + 1, branch = coalesce(
           (select max(branch) from checkpoints where thread_id = $1 and namespace = ''), 0) where thread_id = $1",
        thread as ThreadId,
    )
    .execute(db)
    .await?;
    Ok(())
}
