//! Jobs: what was sent to a worker for an activation, and what came back.
//!
//! A job's id is a hash of its activation and attempt, so sending it twice is harmless, and the row is
//! inserted before anything is sent: after a crash the worker is asked about it, not given it anew.
//!
//! **Invariant:** a job's result settles its activation in the transaction that stores it, once; what
//! comes later changes nothing.

use std::time::Duration;

use sqlx::PgConnection;

use super::StoreError;
use super::queue;
use crate::graph::step::Position;
use crate::ids::{JobId, RunId, TaskId, ThreadId};

/// A job to be sent.
#[derive(Debug, Clone)]
pub struct NewJob<'a> {
    /// Its id.
    pub job_id: JobId,
    /// The run.
    pub run_id: RunId,
    /// The thread.
    pub thread_id: ThreadId,
    /// The fence of the grant.
    pub fence: i64,
    /// The namespace of the activation.
    pub namespace: &'a str,
    /// The checkpoint that planned it.
    pub planned: Position,
    /// The activation.
    pub task_id: TaskId,
    /// The node's name.
    pub node: &'a str,
    /// The worker that it is about to be given to, when one was chosen.
    pub worker: Option<&'a str>,
    /// Which attempt.
    pub attempt: i32,
    /// JSON of the request.
    pub request: &'a [u8],
    /// JSON of the wait, for the node's next call.
    pub wait: &'a [u8],
}

/// Where a job is.
#[derive(Debug, Clone)]
pub struct JobRow {
    /// See the schema.
    pub job_id: JobId,
    /// The run.
    pub run_id: RunId,
    /// The activation.
    pub task_id: TaskId,
    /// `intent`, `sent`, `canceling`, or how it ended.
    pub status: String,
    /// The worker that it was sent to.
    pub worker: Option<String>,
    /// JSON of the request.
    pub request: Vec<u8>,
}

/// Records that a job is about to be sent, and that its activation waits for it. False: the fence has grown.
pub async fn begin(db: &mut PgConnection, job: &NewJob<'_>) -> Result<bool, StoreError> {
    let result = sqlx::query!(
        "with gate as materialized (
           select h.run_id, r.user_id from heads h join runs r using (run_id)
            where h.run_id = $2 and h.fence = $4 and h.status = 'running' for no key update of h),
         j as (
           insert into jobs (job_id, run_id, thread_id, user_id, namespace, branch, seq, task_id, attempt, node,
                             worker, status, request, created_at)
           select $1, run_id, $3, user_id, $5, $6, $7, $8, $9, $10, $13, 'intent', $11, cynai_now() from gate
           on conflict (job_id) do nothing)
         insert into pending (thread_id, namespace, branch, seq, task_id, run_id, node, kind, attempt, data)
         select $3, $5, $6, $7, $8, run_id, $10, 'job', $9, $12 from gate
         on conflict (thread_id, namespace, branch, seq, task_id) do update
            set run_id = excluded.run_id, kind = 'job', attempt = excluded.attempt, settled = false, due = null,
                data = excluded.data, answer = null",
        job.job_id as JobId,
        job.run_id as RunId,
        job.thread_id as ThreadId,
        job.fence,
        job.namespace,
        job.planned.branch,
        job.planned.seq,
        job.task_id as TaskId,
        job.attempt,
        job.node,
        job.request,
        job.wait,
        job.worker,
    )
    .execute(db)
    .await?;
    Ok(result.rows_affected() == 1)
}

/// A job by its id.
pub async fn find(db: &mut PgConnection, job: JobId) -> Result<Option<JobRow>, StoreError> {
    let row = sqlx::query_as!(
        JobRow,
        r#"select job_id as "job_id: JobId", run_id as "run_id: RunId", task_id as "task_id: TaskId", status, worker,
                  request
             from jobs where job_id = $1"#,
        job as JobId,
    )
    .fetch_optional(db)
    .await?;
    Ok(row)
}

/// Stores who is about to be given a job in place of `before`, or with `None` that nobody has it. False: it is not to be
/// sent by this process any more.
pub async fn assign(
    db: &mut PgConnection,
    job: JobId,
    fence: i64,
    before: Option<&str>,
    worker: Option<&str>,
) -> Result<bool, StoreError> {
    let result = sqlx::query!(
        "update jobs j set worker = $2 from heads h
          where j.job_id = $1 and j.status = 'intent' and j.worker is not distinct from $3
            and h.run_id = j.run_id and h.fence = $4 and h.status = 'running'",
        job as JobId,
        worker,
        before,
        fence,
    )
    .execute(db)
    .await?;
    Ok(result.rows_affected() == 1)
}

/// A worker has accepted a job. Nothing changes when it has been settled meanwhile. False: it was given to another one.
pub async fn sent(db: &mut PgConnection, job: JobId, worker: &str) -> Result<bool, StoreError> {
    sqlx::query!(
        "with j as (
           update jobs set sent_at = coalesce(sent_at, cynai_now()),
                  status = case when status = 'intent' then 'sent' when status = 'canceled' then 'canceling' else status end
            where job_id = $1 and worker = $2 and status in ('intent', 'sent', 'canceled') and ended_at is null
           returning run_id, task_id)
         update pending p set due = null from j where p.run_id = j.run_id and p.task_id = j.task_id and not p.settled",
        job as JobId,
        worker,
    )
    .execute(&mut *db)
    .await?;
    Ok(sqlx::query_scalar!(
        r#"select coalesce(worker = $2, false) as "same!" from jobs where job_id = $1"#,
        job as JobId,
        worker,
    )
    .fetch_optional(db)
    .await?
    .unwrap_or(false))
}

/// No worker could take the job: its run wakes after a while to try again.
pub async fn postpone(
    db: &mut PgConnection,
    run: RunId,
    task: TaskId,
    after: Duration,
) -> Result<(), StoreError> {
    sqlx::query!(
        "update pending set due = cynai_now() + make_interval(secs => $3)
          where run_id = $1 and task_id = $2 and kind = 'job' and not settled",
        run as RunId,
        task as TaskId,
        after.as_secs_f64(),
    )
    .execute(db)
    .await?;
    Ok(())
}

/// No worker will take the job: its node fails with the reason.
pub async fn refuse(db: &mut PgConnection, job: JobId) -> Result<(), StoreError> {
    sqlx::query!(
        "update jobs set status = 'failed', ended_at = cynai_now() where job_id = $1 and status = 'intent'",
        job as JobId
    )
    .execute(db)
    .await?;
    Ok(())
}

/// A job that was to be stopped is being stopped by its worker; nobody waits for its result.
pub async fn stopped(db: &mut PgConnection, job: JobId) -> Result<(), StoreError> {
    sqlx::query!(
        "update jobs set status = 'canceled', ended_at = cynai_now() where job_id = $1 and status = 'canceling'",
        job as JobId
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Stores how a job ended and settles its activation. False: it had ended before, or its run has.
pub async fn settle(
    db: &mut PgConnection,
    job: JobId,
    status: &str,
    result: &[u8],
) -> Result<bool, StoreError> {
    let row = sqlx::query!(
        r#"select run_id as "run_id: RunId", task_id as "task_id: TaskId" from jobs where job_id = $1"#,
        job as JobId
    )
    .fetch_optional(&mut *db)
    .await?;
    let Some(row) = row else { return Ok(false) };
    // The head is locked first, as everywhere.
    sqlx::query_scalar!(
        "select 1 as one from heads where run_id = $1 for no key update",
        row.run_id as RunId
    )
    .fetch_optional(&mut *db)
    .await?;
    let ended = sqlx::query!(
        "update jobs set status = $2, result = $3, ended_at = cynai_now()
          where job_id = $1 and status in ('intent', 'sent', 'canceling')",
        job as JobId,
        status,
        result,
    )
    .execute(&mut *db)
    .await?;
    if ended.rows_affected() == 0 {
        return Ok(false);
    }
    queue::settle(db, row.run_id, row.task_id, result).await
}

/// Jobs that a worker accepted and that have not ended.
pub async fn sent_to(db: &mut PgConnection, worker: &str) -> Result<Vec<JobId>, StoreError> {
    let jobs = sqlx::query_scalar!(
        r#"select job_id as "job_id: JobId" from jobs where worker = $1 and status = 'sent' order by job_id"#,
        worker,
    )
    .fetch_all(db)
    .await?;
    Ok(jobs)
}

/// Jobs that a worker was or may have been given, and that have not ended.
pub async fn given_to(db: &mut PgConnection, worker: &str) -> Result<Vec<JobId>, StoreError> {
    let jobs = sqlx::query_scalar!(
        r#"select job_id as "job_id: JobId" from jobs
            where worker = $1 and status in ('intent', 'sent', 'canceling') order by job_id"#,
        worker,
    )
    .fetch_all(db)
    .await?;
    Ok(jobs)
}

/// Jobs on workers that were removed: nobody will hear of them.
pub async fn on_removed_workers(
    db: &mut PgConnection,
    limit: i64,
) -> Result<Vec<JobId>, StoreError> {
    let jobs = sqlx::query_scalar!(
        r#"select j.job_id as "job_id: JobId" from jobs j
            where j.status in ('intent', 'sent', 'canceling') and j.worker like 'worker:%'
              and not exists (select 1 from workers w where j.worker = 'worker:' || w.worker_id)
            order by j.job_id limit $1"#,
        limit,
    )
    .fetch_all(db)
    .await?;
    Ok(jobs)
}

/// Jobs that workers were given and that are to be stopped, at most so many of each.
pub async fn canceling(db: &mut PgConnection, limit: i64) -> Result<Vec<JobRow>, StoreError> {
    let rows = sqlx::query_as!(
        JobRow,
        r#"select job_id as "job_id: JobId", run_id as "run_id: RunId", task_id as "task_id: TaskId", status, worker,
                  request
             from (select distinct worker as name from jobs where status = 'canceling') w,
                  lateral (select * from jobs where worker = w.name and status = 'canceling'
                            order by job_id limit $1) j"#,
        limit,
    )
    .fetch_all(db)
    .await?;
    Ok(rows)
}

/// Jobs on local workers of servers whose lease has ended: those workers are dead with their servers.
pub async fn on_dead_servers(db: &mut PgConnection, limit: i64) -> Result<Vec<JobId>, StoreError> {
    let jobs = sqlx::query_scalar!(
        r#"select j.job_id as "job_id: JobId" from jobs j join instances i on j.worker = 'local:' || i.instance_id
            where j.status in ('intent', 'sent', 'canceling') and i.deadline < cynai_now()
            order by j.job_id limit $1"#,
        limit,
    )
    .fetch_all(db)
    .await?;
    Ok(jobs)
}
