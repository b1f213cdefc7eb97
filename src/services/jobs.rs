//! Jobs: sent to a worker for an activation, asked about after a crash, settled when they end.
//!
//! Sending has three steps, each harmless to repeat: the row that says what will be sent, the worker's
//! acceptance, the row that says who has it. A crash between any two leaves a job that the next process
//! sends again under the same id. What a worker finished is fetched by one watcher for each worker; it
//! decides nothing: it stores the result, which wakes the run, and then tells the worker to forget it.
//!
//! **Invariant:** a job that a worker may still have is never given out under another id.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use sha2::{Digest, Sha256};

use super::Services;
use super::error::ServiceError;
use super::fleet::{Candidates, KnownWorker};
use crate::graph::step::{Position, uuid_of};
use crate::ids::{JobId, RunId, TaskId, ThreadId};
use crate::store::crash;
use crate::store::jobs::{self, NewJob};
use crate::store::workers as store_workers;
use crate::worker::client::ClientError;
use crate::worker::wire::{JobRequest, JobResult, JobState, SandboxRequest, VERSION};

/// How long one call of the watcher waits for a result.
const WATCH: Duration = Duration::from_secs(20);
/// Results of one call.
const WATCH_LIMIT: usize = 100;
/// Between tries when a worker does not answer.
const RETRY: Duration = Duration::from_secs(1);
/// How often jobs to be stopped are looked for, beside the signals.
const STOPS_EVERY: Duration = Duration::from_secs(1);
/// How long a run stays in memory for a worker that is not there yet.
const APPEARS: Duration = Duration::from_secs(2);
/// How long a run is parked for a worker to appear before it asks again.
const NO_WORKER: Duration = Duration::from_secs(2);
/// Workers that one sending tries.
const MAX_TRIED: usize = 4;
/// No worker makes a run wait longer than this before it asks again.
const MAX_BUSY: Duration = Duration::from_secs(30);

/// A job for an activation.
#[derive(Debug, Clone)]
pub struct JobOrder<'a> {
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
    /// Which attempt.
    pub attempt: u32,
    /// How often a worker lost this attempt.
    pub lost: u32,
    /// What to run.
    pub sandbox: SandboxRequest,
}

/// What became of sending a job.
#[derive(Debug)]
pub enum Submitted {
    /// A worker has it, or will be asked again: the activation waits, and its wait is stored.
    Waiting,
    /// No worker will ever take it.
    Refused(String),
    /// The run is no longer this process's.
    Fenced,
}

/// Workers that a job may go to, the first one last.
#[derive(Default)]
struct Choice {
    workers: Vec<Arc<KnownWorker>>,
    /// The one whose name is stored with the job.
    stored: Option<String>,
}

impl Choice {
    fn first(&self) -> Option<&str> {
        self.workers.last().map(|worker| worker.name.as_str())
    }
}

impl JobOrder<'_> {
    /// The job's id: a hash, so that it is the same after a crash. Another run that takes the activation
    /// up again gives it out anew: this run's jobs were stopped with it.
    #[must_use]
    pub fn job_id(&self) -> JobId {
        let mut hash = Sha256::new();
        hash.update(b"job");
        hash.update(self.run_id.0.as_bytes());
        hash.update(self.task_id.0.as_bytes());
        hash.update(self.attempt.to_be_bytes());
        hash.update(self.lost.to_be_bytes());
        JobId(uuid_of(&hash.finalize()))
    }
}

impl Services {
    /// Sends a job for an activation, or makes sure that it was sent.
    pub async fn submit_job(&self, order: &JobOrder<'_>) -> Result<Submitted, ServiceError> {
        let job_id = order.job_id();
        let mut db = self.pool().acquire().await?;
        let known = jobs::find(&mut db, job_id).await?;
        match known.as_ref().map(|job| job.status.as_str()) {
            Some("intent") => {}
            // Somebody has it; its end will wake the run.
            Some(_) => return Ok(Submitted::Waiting),
            None => {
                let request = JobRequest {
                    version: VERSION,
                    task_id: order.run_id.0,
                    job_id,
                    sandbox: order.sandbox.clone(),
                };
                if let Err(invalid) = request.validate() {
                    return Ok(Submitted::Refused(invalid.to_string()));
                }
                let mut choice = match self.candidates(&request.sandbox, Duration::ZERO).await {
                    Candidates::Some(workers) => self.by_load(workers).await?,
                    Candidates::NoneNow | Candidates::Never(_) => Choice::default(),
                };
                if !self.begin_job(order, &request, choice.first()).await? {
                    return Ok(Submitted::Fenced);
                }
                choice.stored = choice.first().map(str::to_owned);
                drop(db);
                return self.send_job(order, job_id, choice).await;
            }
        }
        drop(db);
        self.send_job(order, job_id, Choice::default()).await
    }

    async fn begin_job(
        &self,
        order: &JobOrder<'_>,
        request: &JobRequest,
        worker: Option<&str>,
    ) -> Result<bool, ServiceError> {
        let request_json = serde_json::to_vec(request).map_err(ServiceError::internal)?;
        let wait = json!({ "job_id": request.job_id, "lost": order.lost }).to_string().into_bytes();
        let mut tx = self.transaction().await?;
        let new = NewJob {
            job_id: request.job_id,
            run_id: order.run_id,
            thread_id: order.thread_id,
            fence: order.fence,
            namespace: order.namespace,
            planned: order.planned,
            task_id: order.task_id,
            node: order.node,
            worker,
            attempt: i32::try_from(order.attempt).unwrap_or(i32::MAX),
            request: &request_json,
            wait: &wait,
        };
        let begun = jobs::begin(&mut tx, &new).await?;
        crash::commit(tx, "job intent").await?;
        Ok(begun)
    }

    /// Hands the stored request to a worker. One that may have it is asked again; another is chosen only where none
    /// was, or where the chosen one said that it did not take it.
    async fn send_job(
        &self,
        order: &JobOrder<'_>,
        job_id: JobId,
        mut choice: Choice,
    ) -> Result<Submitted, ServiceError> {
        let mut db = self.pool().acquire().await?;
        let Some(row) = jobs::find(&mut db, job_id).await? else { return Ok(Submitted::Fenced) };
        drop(db);
        let request: JobRequest =
            serde_json::from_slice(&row.request).map_err(ServiceError::internal)?;
        if choice.workers.is_empty() {
            choice = match row.worker {
                Some(name) => match self.known_worker(&name) {
                    Some(worker) => Choice { workers: vec![worker], stored: Some(name) },
                    None => {
                        // Another server's, or one that is not there now: it may have the job.
                        self.postpone(order, RETRY).await?;
                        return Ok(Submitted::Waiting);
                    }
                },
                None => match self.candidates(&request.sandbox, APPEARS).await {
                    Candidates::Some(workers) => self.by_load(workers).await?,
                    Candidates::NoneNow => {
                        self.postpone(order, NO_WORKER).await?;
                        return Ok(Submitted::Waiting);
                    }
                    Candidates::Never(reason) => return self.refuse_job(job_id, reason).await,
                },
            };
        }
        let (mut busy, mut refused) = (None, None);
        while let Some(worker) = choice.workers.pop() {
            let stored = choice.stored.take().is_some_and(|stored| stored == worker.name);
            if !stored && !self.assign_job(job_id, &worker.name).await? {
                return Ok(Submitted::Waiting);
            }
            match worker.client.accept(&request).await {
                Ok(status) => {
                    let mut tx = self.transaction().await?;
                    jobs::sent(&mut tx, job_id, &worker.name).await?;
                    crash::commit(tx, "job sent").await?;
                    // It was sent before, and has ended: its result may have been fetched already.
                    if let Some(result) = &status.result {
                        self.settle_job(job_id, result).await?;
                    }
                    return Ok(Submitted::Waiting);
                }
                Err(ClientError::Refused { problem }) => refused = Some(problem.detail.clone()),
                Err(ClientError::Busy { retry_after, .. }) => {
                    busy = Some(busy.map_or(retry_after, |other: Duration| other.min(retry_after)));
                }
                Err(err @ (ClientError::Unreachable { .. } | ClientError::Unauthorized)) => {
                    tracing::warn!(error = &err as &dyn std::error::Error, job.id = %job_id, worker = worker.label, "job {job_id} could not be sent to {}; it will be sent again", worker.label);
                    self.postpone(order, RETRY).await?;
                    return Ok(Submitted::Waiting);
                }
            }
        }
        match (busy, refused) {
            (Some(retry_after), _) => {
                // Nobody has it: whoever has room first may take it.
                let mut tx = self.transaction().await?;
                jobs::assign(&mut tx, job_id, None).await?;
                jobs::postpone(&mut tx, order.run_id, order.task_id, retry_after.min(MAX_BUSY))
                    .await?;
                crash::commit(tx, "job postponed").await?;
                Ok(Submitted::Waiting)
            }
            (None, Some(reason)) => self.refuse_job(job_id, reason).await,
            (None, None) => {
                self.postpone(order, NO_WORKER).await?;
                Ok(Submitted::Waiting)
            }
        }
    }

    async fn refuse_job(&self, job: JobId, reason: String) -> Result<Submitted, ServiceError> {
        let mut tx = self.transaction().await?;
        jobs::refuse(&mut tx, job).await?;
        crash::commit(tx, "job refused").await?;
        Ok(Submitted::Refused(reason))
    }

    /// Stores who is about to be given a job. False: the job is not to be sent any more.
    async fn assign_job(&self, job: JobId, worker: &str) -> Result<bool, ServiceError> {
        let mut tx = self.transaction().await?;
        let assigned = jobs::assign(&mut tx, job, Some(worker)).await?;
        crash::commit(tx, "job assigned").await?;
        Ok(assigned)
    }

    /// The least loaded first: open jobs for each slot, then by name.
    async fn by_load(&self, workers: Vec<Arc<KnownWorker>>) -> Result<Choice, ServiceError> {
        if workers.len() == 1 {
            return Ok(Choice { workers, stored: None });
        }
        let names: Vec<String> = workers.iter().map(|worker| worker.name.clone()).collect();
        let mut db = self.pool().acquire().await?;
        let open: HashMap<String, i64> =
            store_workers::open_jobs(&mut db, &names).await?.into_iter().collect();
        let mut workers = workers;
        workers.sort_by_cached_key(|worker| {
            let open = open.get(&worker.name).copied().unwrap_or(0).max(0).unsigned_abs();
            // In thousandths, so that a worker of many slots is not full before one of few.
            let load = open.saturating_mul(1000) / worker.slots.unwrap_or(1).max(1);
            (load, worker.label.clone(), worker.name.clone())
        });
        // The last is tried first.
        workers.reverse();
        workers.drain(..workers.len().saturating_sub(MAX_TRIED));
        Ok(Choice { workers, stored: None })
    }

    async fn postpone(&self, order: &JobOrder<'_>, after: Duration) -> Result<(), ServiceError> {
        let mut tx = self.transaction().await?;
        jobs::postpone(&mut tx, order.run_id, order.task_id, after).await?;
        crash::commit(tx, "job postponed").await?;
        Ok(())
    }

    /// Fetches what `worker` finished, and stops what is to be stopped, until dropped.
    pub async fn watch_worker(&self, worker: &KnownWorker) {
        tokio::join!(self.watch_results(worker), self.watch_stops(worker));
    }

    async fn watch_results(&self, worker: &KnownWorker) {
        let mut asked = false;
        loop {
            let result = async {
                if !asked {
                    self.ask_about_open(worker).await?;
                    asked = true;
                }
                self.fetch_results(worker).await
            };
            if let Err(err) = result.await {
                tracing::debug!(
                    error = &err as &dyn std::error::Error,
                    worker = worker.name,
                    "results could not be fetched"
                );
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    async fn fetch_results(&self, worker: &KnownWorker) -> Result<(), ServiceError> {
        let finished = worker.client.finished(WATCH, WATCH_LIMIT).await.map_err(unreachable)?;
        for job in finished.jobs {
            if let Some(result) = &job.result {
                self.settle_job(job.job_id, result).await?;
            }
            worker.client.acknowledge(job.job_id).await.map_err(unreachable)?;
        }
        Ok(())
    }

    /// After a restart: what the worker does not know will never be finished by it.
    async fn ask_about_open(&self, worker: &KnownWorker) -> Result<(), ServiceError> {
        let mut db = self.pool().acquire().await?;
        let open = jobs::open_on(&mut db, &worker.name, false, i64::MAX).await?;
        drop(db);
        for job in open {
            if worker.client.status(job.job_id).await.map_err(unreachable)?.is_none() {
                self.lose_job(job.job_id).await?;
            }
        }
        Ok(())
    }

    async fn settle_job(&self, job: JobId, result: &JobResult) -> Result<(), ServiceError> {
        let bytes = serde_json::to_vec(result).map_err(ServiceError::internal)?;
        let mut tx = self.transaction().await?;
        let settled = jobs::settle(&mut tx, job, result.status.as_str(), &bytes).await?;
        crash::commit(tx, "job settled").await?;
        if settled {
            self.hub().queued();
        } else {
            tracing::info!(job.id = %job, "the result of job {job} came too late to count");
        }
        Ok(())
    }

    /// Settles a job as lost: no worker has it any more.
    async fn lose_job(&self, job: JobId) -> Result<(), ServiceError> {
        let lost = json!({ "status": JobState::Lost.as_str() }).to_string().into_bytes();
        let mut tx = self.transaction().await?;
        let settled = jobs::settle(&mut tx, job, JobState::Lost.as_str(), &lost).await?;
        crash::commit(tx, "job lost").await?;
        if settled {
            self.hub().queued();
        }
        Ok(())
    }

    async fn watch_stops(&self, worker: &KnownWorker) {
        let mut ended = self.hub().ended();
        loop {
            if let Err(err) = self.stop_jobs(worker).await {
                tracing::debug!(
                    error = &err as &dyn std::error::Error,
                    worker = worker.name,
                    "jobs could not be stopped"
                );
            }
            // Told of the end of a run, or after a while.
            let _ = tokio::time::timeout(STOPS_EVERY, ended.recv()).await;
        }
    }

    async fn stop_jobs(&self, worker: &KnownWorker) -> Result<(), ServiceError> {
        let mut db = self.pool().acquire().await?;
        let stopping = jobs::open_on(&mut db, &worker.name, true, 1000).await?;
        drop(db);
        for job in stopping {
            worker.client.stop(job.run_id.0, job.job_id).await.map_err(unreachable)?;
            let mut tx = self.transaction().await?;
            jobs::stopped(&mut tx, job.job_id).await?;
            crash::commit(tx, "job stopped").await?;
        }
        Ok(())
    }

    /// Settles the jobs of workers that died with their servers. Every server looks for them.
    pub async fn lose_jobs_of_dead_servers(&self) -> Result<(), ServiceError> {
        let mut db = self.pool().acquire().await?;
        let lost = jobs::on_dead_servers(&mut db, 1000).await?;
        drop(db);
        for job in lost {
            self.lose_job(job).await?;
        }
        Ok(())
    }

    /// Settles every job that was on `worker`, which is no more.
    pub async fn lose_jobs_of(&self, worker: &str) -> Result<(), ServiceError> {
        let mut db = self.pool().acquire().await?;
        let given = jobs::given_to(&mut db, worker).await?;
        drop(db);
        for job in given {
            self.lose_job(job).await?;
        }
        Ok(())
    }

    /// Looks for jobs of dead servers, until dropped.
    pub async fn watch_dead_servers(&self) {
        loop {
            if let Err(err) = self.lose_jobs_of_dead_servers().await {
                tracing::debug!(
                    error = &err as &dyn std::error::Error,
                    "jobs of dead servers could not be looked for"
                );
            }
            tokio::time::sleep(Duration::from_secs(5)).await;
        }
    }
}

fn unreachable(err: ClientError) -> ServiceError {
    ServiceError::Unavailable {
        message: "the worker cannot be reached".to_owned(),
        source: Some(Box::new(err)),
    }
}
