//! Runs that bring a thread of their own, stored together: those that arrive while others are being stored are one
//! statement, and one sync of the disk.
//!
//! Nobody knows such a thread before the commit, so nothing is looked up and nothing is locked.
//!
//! **Invariant:** a run is acknowledged only after the statement that stored it, whole, was committed.

use std::sync::{Arc, Mutex, PoisonError};

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::{PgConnection, PgPool};
use tokio::sync::oneshot;
use tokio_util::task::TaskTracker;

use super::intake::Life;
use super::{StoreError, crash};
use crate::graph::checkpoint::CheckpointRow;
use crate::ids::{AssistantId, RunId, ThreadId, UserId};

/// Statements under way at once, each on a connection of its own.
const SLOTS: u32 = 1;
/// The most runs of one statement.
const MAX_BATCH: usize = 64;
/// No run joins a statement that has so many bytes already.
const MAX_BATCH_BYTES: usize = 8 << 20;
/// The fence of a thread's first grant.
pub const FIRST_FENCE: i64 = 1;

/// A run with a thread of its own, at its first checkpoint. See [`super::runs::NewRun`] for what is not told here.
#[derive(Debug)]
pub struct FreshRun {
    /// The run.
    pub run_id: RunId,
    /// Its thread, which is made.
    pub thread_id: ThreadId,
    /// The owner of both.
    pub user_id: UserId,
    /// What the client named.
    pub assistant_id: AssistantId,
    /// The graph that it is pinned to.
    pub graph_hash: Vec<u8>,
    /// See the schema.
    pub multitask_strategy: &'static str,
    /// Larger first.
    pub priority: i32,
    /// Seconds until it may start.
    pub after_seconds: Option<f64>,
    /// JSON of what the client asked for.
    pub options: Vec<u8>,
    /// Stream modes that rows are written for; none has a comma.
    pub stream_modes: Vec<String>,
    /// The client's keys.
    pub metadata: Value,
    /// Whether the thread goes when the run ends.
    pub temporary_thread: bool,
    /// Where its end is told.
    pub webhook: Option<String>,
    /// Its first checkpoint.
    pub row: CheckpointRow,
    /// The thread's keys.
    pub thread_metadata: Value,
    /// When the thread was made, by the server's clock.
    pub thread_made_at: DateTime<Utc>,
    /// The driver that it is granted to at once, with [`FIRST_FENCE`].
    pub granted: Option<Life>,
}

impl FreshRun {
    fn size(&self) -> usize {
        let row = &self.row;
        let values: usize = row.values.iter().map(|(_, value)| value.len()).sum();
        self.options.len() + row.changed.len() + row.keyframe.as_ref().map_or(0, Vec::len) + values
    }
}

type Answer = oneshot::Sender<Result<DateTime<Utc>, StoreError>>;

/// Stores fresh runs of one process.
#[derive(Debug, Clone)]
pub struct Accepter(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    pool: PgPool,
    state: Mutex<State>,
    writers: TaskTracker,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<(FreshRun, Answer)>,
    /// Tasks that write what waits, at most [`SLOTS`]. One for each run would be as many as were ever accepted while
    /// there was always something to write.
    writing: u32,
}

/// A task that writes; when it panics, the next run begins another.
struct Writing<'a> {
    inner: &'a Inner,
    ended: bool,
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.inner.lock().writing -= 1;
        }
    }
}

impl Accepter {
    /// Over connections of its own to where `pool` leads.
    #[must_use]
    pub fn new(pool: &PgPool) -> Self {
        let options = pool.connect_options().as_ref().clone();
        Self(Arc::new(Inner {
            pool: super::connect::lane(options, SLOTS),
            state: Mutex::default(),
            writers: TaskTracker::new(),
        }))
    }

    /// Stores a run; answers when it was accepted, by the database's clock.
    ///
    /// # Errors
    /// The database's. Where it could not be reached, the run may be stored all the same.
    pub async fn accept(&self, run: FreshRun) -> Result<DateTime<Utc>, StoreError> {
        let (sender, receiver) = oneshot::channel();
        let begins = {
            let mut state = self.0.lock();
            state.waiting.push((run, sender));
            let begins = state.writing < SLOTS;
            state.writing += u32::from(begins);
            begins
        };
        if begins {
            let inner = Arc::clone(&self.0);
            // A task of its own: a client that goes away takes nobody else's run with it.
            self.0.writers.spawn(async move { inner.write_waiting().await });
        }
        receiver.await.unwrap_or(Err(StoreError::Database(sqlx::Error::WorkerCrashed)))
    }
}

impl Inner {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores what waits, until nothing does.
    async fn write_waiting(&self) {
        let mut writing = Writing { inner: self, ended: false };
        loop {
            let batch: Vec<(FreshRun, Answer)> = {
                let mut state = self.lock();
                let count = batch_len(&state.waiting);
                if count == 0 {
                    // Under the lock that finds nothing: who comes after it begins a writer.
                    state.writing -= 1;
                    writing.ended = true;
                    return;
                }
                state.waiting.drain(..count).collect()
            };
            self.write_batch(batch).await;
        }
    }

    async fn write_batch(&self, batch: Vec<(FreshRun, Answer)>) {
        let (runs, answers): (Vec<FreshRun>, Vec<Answer>) = batch.into_iter().unzip();
        match self.write(&runs).await {
            Ok(at) => answers.into_iter().for_each(|answer| drop(answer.send(Ok(at)))),
            Err(err) if runs.len() == 1 || err.is_unavailable() => {
                let mut first = Some(err);
                for answer in answers {
                    let err =
                        first.take().unwrap_or(StoreError::Database(sqlx::Error::WorkerCrashed));
                    drop(answer.send(Err(err)));
                }
            }
            Err(err) => {
                tracing::warn!(
                    error = &err as &dyn std::error::Error,
                    runs = runs.len(),
                    "a batch of runs could not be stored"
                );
                // What the database refuses is one run's fault.
                for (run, answer) in runs.iter().zip(answers) {
                    drop(answer.send(self.write(std::slice::from_ref(run)).await));
                }
            }
        }
    }

    async fn write(&self, runs: &[FreshRun]) -> Result<DateTime<Utc>, StoreError> {
        let mut db = self.pool.acquire().await?;
        crash::around("accept", insert(&mut db, runs)).await
    }
}

/// How many of `waiting` one statement takes: at least one, if there is one.
fn batch_len(waiting: &[(FreshRun, Answer)]) -> usize {
    let mut bytes = 0;
    let fits = |(run, _): &&(FreshRun, Answer)| {
        let room = bytes < MAX_BATCH_BYTES;
        bytes += run.size();
        room
    };
    waiting.iter().take(MAX_BATCH).take_while(fits).count()
}

fn column<T>(runs: &[FreshRun], of: impl Fn(&FreshRun) -> T) -> Vec<T> {
    runs.iter().map(of).collect()
}

async fn insert(db: &mut PgConnection, runs: &[FreshRun]) -> Result<DateTime<Utc>, StoreError> {
    let values =
        || runs.iter().flat_map(|run| run.row.values.iter().map(move |value| (run, value)));
    let at = sqlx::query_scalar!(
        r#"with n as (
             select * from unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::uuid[], $5::bytea[], $6::text[], $7::int[],
                                  $8::float8[], $9::bytea[], $10::text[], $11::jsonb[], $12::bool[], $13::text[],
                                  $14::jsonb[], $15::timestamptz[], $16::uuid[], $17::bigint[], $18::bigint[],
                                  $19::int[], $20::smallint[], $21::text[], $22::bytea[], $23::bytea[])
               as n (run_id, thread_id, user_id, assistant_id, graph_hash, strategy, priority, after, options, modes,
                     metadata, temporary, webhook, thread_metadata, thread_at, instance_id, epoch, seq, branch, source,
                     next, changed, keyframe)),
           t as (
             insert into threads (thread_id, user_id, status, fence, branch, active_run, metadata, graph_hash,
                                  created_at, updated_at, state_updated_at)
             select thread_id, user_id, 'busy', case when epoch is null then 0 else $24::bigint end, branch, run_id,
                    thread_metadata, graph_hash, thread_at, cynai_now(), thread_at
               from n),
           r as (
             insert into runs (run_id, thread_id, user_id, assistant_id, graph_hash, multitask_strategy, priority,
                               not_before, options, stream_modes, metadata, temporary_thread, branch, webhook, status,
                               started_at, created_at, updated_at)
             select run_id, thread_id, user_id, assistant_id, graph_hash, strategy, priority,
                    cynai_now() + make_interval(secs => after), options, string_to_array(modes, ','), metadata,
                    temporary, branch, webhook, case when epoch is null then 'pending' else 'running' end,
                    case when epoch is not null then cynai_now() end, cynai_now(), cynai_now()
               from n),
           h as (
             insert into heads (run_id, thread_id, fence, seq, first_seq, branch, status, instance_id, epoch)
             select run_id, thread_id, case when epoch is null then 0 else $24::bigint end, seq, seq, branch,
                    case when epoch is null then 'queued' else 'running' end, instance_id, epoch
               from n),
           q as (
             insert into queue (run_id, thread_id, user_id, priority, state, due)
             select run_id, thread_id, user_id, priority, case when after is null then 'ready' else 'later' end,
                    coalesce(cynai_now() + make_interval(secs => after), cynai_now())
               from n where epoch is null),
           c as (
             insert into checkpoints (thread_id, run_id, seq, at, branch, source, namespace, next, changed, keyframe)
             select thread_id, run_id, seq, cynai_now(), branch, source, '', next, changed, keyframe from n),
           v as (
             insert into channel_values (thread_id, namespace, branch, seq, channel, value)
             select thread_id, '', branch, seq, channel, value
               from unnest($25::uuid[], $26::int[], $27::bigint[], $28::text[], $29::bytea[])
                 as v (thread_id, branch, seq, channel, value))
           select cynai_now() as "at!""#,
        &column(runs, |run| run.run_id.0),
        &column(runs, |run| run.thread_id.0),
        &column(runs, |run| run.user_id.0),
        &column(runs, |run| run.assistant_id.0),
        &column(runs, |run| run.graph_hash.clone()),
        &column(runs, |run| run.multitask_strategy.to_owned()),
        &column(runs, |run| run.priority),
        &column(runs, |run| run.after_seconds) as &[Option<f64>],
        &column(runs, |run| run.options.clone()),
        &column(runs, |run| run.stream_modes.join(",")),
        &column(runs, |run| run.metadata.clone()),
        &column(runs, |run| run.temporary_thread),
        &column(runs, |run| run.webhook.clone()) as &[Option<String>],
        &column(runs, |run| run.thread_metadata.clone()),
        &column(runs, |run| run.thread_made_at),
        &column(runs, |run| run.granted.map(|life| life.instance.0)) as &[Option<uuid::Uuid>],
        &column(runs, |run| run.granted.map(|life| life.epoch)) as &[Option<i64>],
        &column(runs, |run| run.row.position.seq),
        &column(runs, |run| run.row.position.branch),
        &column(runs, |run| run.row.source.code()),
        &column(runs, |run| run.row.next.clone()),
        &column(runs, |run| run.row.changed.clone()),
        &column(runs, |run| run.row.keyframe.clone()) as &[Option<Vec<u8>>],
        FIRST_FENCE,
        &values().map(|(run, _)| run.thread_id.0).collect::<Vec<_>>(),
        &values().map(|(run, _)| run.row.position.branch).collect::<Vec<_>>(),
        &values().map(|(run, _)| run.row.position.seq).collect::<Vec<_>>(),
        &values().map(|(_, (channel, _))| channel.clone()).collect::<Vec<_>>(),
        &values().map(|(_, (_, value))| value.clone()).collect::<Vec<_>>(),
    )
    .fetch_one(db)
    .await?;
    Ok(at)
}
