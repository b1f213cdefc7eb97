//! What activations wait for, as people and services see it.
//!
//! **Invariant:** an answer settles a question once; the row's lock decides between two.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

use super::StoreError;
use crate::graph::step::Position;
use crate::ids::{RunId, TaskId, ThreadId};

/// An activation that waits.
#[derive(Debug, Clone)]
pub struct WaitingTask {
    /// The activation.
    pub task_id: TaskId,
    /// The run that asked.
    pub run_id: RunId,
    /// Its namespace, empty for the root.
    pub namespace: String,
    /// The seq of the checkpoint that planned it.
    pub seq: i64,
    /// The branch of that.
    pub branch: i32,
    /// The node's name.
    pub node: String,
    /// What is waited for.
    pub kind: String,
    /// Which attempt this is.
    pub attempt: i32,
    /// When the wait is over by itself.
    pub due: Option<DateTime<Utc>>,
    /// JSON of the wait.
    pub data: Option<Vec<u8>>,
    /// JSON of the answers so far.
    pub answer: Option<Vec<u8>>,
}

/// What is not settled in a thread's superstep: in the root after `seq`, and in the subgraphs below.
pub async fn open(
    db: &mut PgConnection,
    thread: ThreadId,
    branch: i32,
    seq: i64,
) -> Result<Vec<WaitingTask>, StoreError> {
    let rows = sqlx::query_as!(
        WaitingTask,
        r#"select task_id as "task_id: TaskId", run_id as "run_id: RunId", namespace, seq, branch, node, kind, attempt,
                  due, data, answer
             from pending p
            where thread_id = $1 and branch = $2 and not settled
              and (namespace <> '' or seq = $3)
              and (namespace = '' or not exists (
                     select from checkpoints c where c.thread_id = p.thread_id and c.namespace = p.namespace
                        and c.branch = p.branch and c.seq > p.seq))
            order by namespace, seq, task_id"#,
        thread as ThreadId,
        branch,
        seq,
    )
    .fetch_all(db)
    .await?;
    Ok(rows)
}

/// Answers a question: its answers so far and the new one. False when it was settled meanwhile.
pub async fn answer(
    db: &mut PgConnection,
    thread: ThreadId,
    waiting: &WaitingTask,
    answers: &[u8],
) -> Result<bool, StoreError> {
    let result = sqlx::query!(
        "update pending set answer = $6, settled = true
          where thread_id = $1 and namespace = $2 and branch = $3 and seq = $4 and task_id = $5 and not settled",
        thread as ThreadId,
        waiting.namespace,
        waiting.branch,
        waiting.seq,
        waiting.task_id as TaskId,
        answers,
    )
    .execute(db)
    .await?;
    Ok(result.rows_affected() == 1)
}

/// A run goes on where the thread stands: what waits there wakes this run from now on, and expires with it.
///
/// The caller holds the thread's lock, and no run is active.
pub async fn adopt(db: &mut PgConnection, thread: ThreadId, run: RunId) -> Result<(), StoreError> {
    sqlx::query!(
        "update pending set run_id = $2 where thread_id = $1 and not settled",
        thread as ThreadId,
        run as RunId,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// The thread goes on from another state: nothing that waited there is waited for any more.
///
/// Attempts under way stay: what they did to the world is as unknown as before, should the thread come back.
/// The caller holds the thread's lock, and no run is active.
pub async fn abandon(db: &mut PgConnection, thread: ThreadId) -> Result<(), StoreError> {
    sqlx::query!(
        "update pending set settled = true where thread_id = $1 and not settled and kind <> 'attempt'",
        thread as ThreadId
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Stores a question that the driver itself asks about a run, outside any activation, under the grant's fence.
pub async fn ask(
    db: &mut PgConnection,
    thread: ThreadId,
    run: RunId,
    fence: i64,
    at: Position,
    task: TaskId,
    data: &[u8],
) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into pending (thread_id, namespace, branch, seq, task_id, run_id, node, kind, data)
         select $1, '', $2, $3, $4, run_id, '', 'interrupt', $6 from heads
          where run_id = $5 and fence = $7 and status = 'running'
         on conflict (thread_id, namespace, branch, seq, task_id) do update
            set settled = false, answer = null, data = excluded.data, run_id = excluded.run_id",
        thread as ThreadId,
        at.branch,
        at.seq,
        task as TaskId,
        run as RunId,
        data,
        fence,
    )
    .execute(db)
    .await?;
    Ok(())
}
