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
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rand::seq::IndexedRandom;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::Services;
use super::error::ServiceError;
use super::fleet::{Candidates, KnownWorker};
use crate::graph::step::{Position, uuid_of};
use crate::ids::{JobId, RunId, TaskId, ThreadId};
use crate::store::crash;
use crate::store::jobs::{self, JobRow, NewJob};
use crate::store::workers as store_workers;
use crate::worker::client::ClientError;
use crate::worker::wire::{JobRequest, JobResult, JobState, JobStatus, SandboxRequest, VERSION};

/// How long one call of the watcher waits for a result.
const WATCH: Duration = Duration::from_secs(20);
/// Results of one call.
const WATCH_LIMIT: usize = 100;
/// Between tries when a worker does not answer.
const RETRY: Duration = Duration::from_secs(1);
/// How often jobs to be stopped are looked for, beside the signals.
const STOPS_EVERY: Duration = Duration::from_secs(1);
/// How long one round of stopping waits for a worker.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
/// How long a run stays in memory for a worker that is not there yet.
const APPEARS: Duration = Duration::from_secs(2);
/// How long a run is parked for a worker to appear before it asks again.
const NO_WORKER: Duration = Duration::from_secs(2);
/// Workers without room that one sending asks before the job waits.
const MAX_BUSY_TRIED: usize = 4;
/// Workers whose loads are compared for one job.
const MOST_COMPARED: usize = 16;
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

/// Workers that a job may go to, the first one last. The first counts as busier while this lives.
#[derive(Default)]
struct Choice {
    workers: Vec<Arc<KnownWorker>>,
    sending: Option<Arc<AtomicU64>>,
}

impl Choice {
    fn of(workers: Vec<Arc<KnownWorker>>) -> Self {
        let sending = workers.last().map(|worker| Arc::clone(&worker.sending));
        if let Some(sending) = &sending {
            sending.fetch_add(1, Ordering::Relaxed);
        }
        Self { workers, sending }
    }

    fn first(&self) -> Option<&str> {
        self.workers.last().map(|worker| worker.name.as_str())
    }

    fn next(&mut self) -> Option<Arc<KnownWorker>> {
        self.workers.pop()
    }
}

impl Drop for Choice {
    fn drop(&mut self) {
        if let Some(sending) = &self.sending {
            sending.fetch_sub(1, Ordering::Relaxed);
        }
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
                // Whoever holds a connection must not wait for another.
                drop(db);
                let choice = match self.candidates(&request.sandbox, Duration::ZERO).await {
                    Candidates::Some(workers) => self.by_load(workers).await?,
                    Candidates::NoneNow | Candidates::Never(_) => Choice::default(),
                };
                if !self.begin_job(order, &request, choice.first()).await? {
                    return Ok(Submitted::Fenced);
                }
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
    /// was, or where the chosen one certainly did not take it.
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
        let mut stored = row.worker;
        // Whether the stored worker was named by this call: nothing was sent to it before.
        let mut fresh = !choice.workers.is_empty();
        let mut others = stored.is_some() && !fresh;
        if choice.workers.is_empty() {
            choice = match &stored {
                Some(name) => match self.known_worker(name) {
                    Some(worker) => Choice::of(vec![worker]),
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
        let (mut tried, mut busy, mut refused) = (Vec::new(), Vec::new(), None);
        loop {
            let Some(worker) = choice.next() else {
                // The one that had been named does not take it: the others are asked.
                let found = match std::mem::take(&mut others) {
                    true => self.candidates(&request.sandbox, Duration::ZERO).await,
                    false => break,
                };
                let Candidates::Some(mut workers) = found else { break };
                workers.retain(|worker| !tried.contains(&worker.name));
                choice = self.by_load(workers).await?;
                continue;
            };
            if stored.as_deref() != Some(&worker.name) {
                if !self.assign_job(order, job_id, stored.as_deref(), Some(&worker.name)).await? {
                    return Ok(Submitted::Waiting);
                }
                (stored, fresh) = (Some(worker.name.clone()), true);
            }
            match worker.client.accept(&request).await {
                Ok(status) => return self.job_accepted(order, &worker, &status).await,
                Err(ClientError::Refused { problem }) => refused = Some(problem.detail.clone()),
                Err(ClientError::Busy { retry_after, .. }) => busy.push(retry_after),
                Err(err) if fresh && err.nothing_was_sent() => {
                    tracing::warn!(error = &err as &dyn std::error::Error, job.id = %job_id, "{} could not be reached", worker.label);
                    busy.push(RETRY);
                }
                Err(err @ (ClientError::Unreachable { .. } | ClientError::Unauthorized)) => {
                    tracing::warn!(error = &err as &dyn std::error::Error, job.id = %job_id, "job {job_id} could not be sent to {}; it will be sent again", worker.label);
                    self.postpone(order, RETRY).await?;
                    return Ok(Submitted::Waiting);
                }
            }
            tried.push(worker.name.clone());
            if busy.len() >= MAX_BUSY_TRIED {
                break;
            }
        }
        match (busy.into_iter().min(), refused) {
            (Some(retry_after), _) => {
                // Nobody has it: whoever has room first may take it.
                if self.assign_job(order, job_id, stored.as_deref(), None).await? {
                    self.postpone(order, retry_after.min(MAX_BUSY)).await?;
                }
                Ok(Submitted::Waiting)
            }
            (None, Some(reason)) => self.refuse_job(job_id, reason).await,
            (None, None) => {
                self.postpone(order, NO_WORKER).await?;
                Ok(Submitted::Waiting)
            }
        }
    }

    async fn job_accepted(
        &self,
        order: &JobOrder<'_>,
        worker: &KnownWorker,
        status: &JobStatus,
    ) -> Result<Submitted, ServiceError> {
        let job_id = status.job_id;
        let mut tx = self.transaction().await?;
        let its = jobs::sent(&mut tx, job_id, &worker.name).await?;
        crash::commit(tx, "job sent").await?;
        if !its {
            // This process was away so long that another gave the job to somebody else.
            tracing::warn!(job.id = %job_id, "job {job_id} was given to another worker meanwhile; {} is to stop it", worker.label);
            if let Err(err) = worker.client.stop(order.run_id.0, job_id).await {
                tracing::warn!(error = &err as &dyn std::error::Error, job.id = %job_id, "it could not be stopped");
            }
            return Ok(Submitted::Waiting);
        }
        // It was sent before, and has ended: its result may have been fetched already.
        if let Some(result) = &status.result {
            self.settle_job(job_id, result).await?;
        }
        Ok(Submitted::Waiting)
    }

    async fn refuse_job(&self, job: JobId, reason: String) -> Result<Submitted, ServiceError> {
        let mut tx = self.transaction().await?;
        jobs::refuse(&mut tx, job).await?;
        crash::commit(tx, "job refused").await?;
        Ok(Submitted::Refused(reason))
    }

    /// Stores who is about to be given a job in place of `before`. False: it is not to be sent by this process any more.
    async fn assign_job(
        &self,
        order: &JobOrder<'_>,
        job: JobId,
        before: Option<&str>,
        worker: Option<&str>,
    ) -> Result<bool, ServiceError> {
        let mut tx = self.transaction().await?;
        let assigned = jobs::assign(&mut tx, job, order.fence, before, worker).await?;
        crash::commit(tx, "job assigned").await?;
        Ok(assigned)
    }

    /// The least loaded first: open jobs for each slot, then by name.
    async fn by_load(&self, mut workers: Vec<Arc<KnownWorker>>) -> Result<Choice, ServiceError> {
        if workers.len() > MOST_COMPARED {
            // Whoever is least loaded among some is nearly as good as the least loaded of all.
            workers = workers.sample(&mut rand::rng(), MOST_COMPARED).cloned().collect();
        }
        if workers.len() > 1 {
            let names: Vec<String> = workers.iter().map(|worker| worker.name.clone()).collect();
            let mut db = self.pool().acquire().await?;
            let open: HashMap<String, i64> =
                store_workers::open_jobs(&mut db, &names).await?.into_iter().collect();
            workers.sort_by_cached_key(|worker| {
                let open = open.get(&worker.name).copied().unwrap_or(0).max(0).unsigned_abs();
                let open = open + worker.sending.load(Ordering::Relaxed);
                // In thousandths, so that a worker of many slots is not full before one of few.
                let load = open.saturating_mul(1000) / worker.slots.unwrap_or(1).max(1);
                (load, worker.label.clone(), worker.name.clone())
            });
            // The last is tried first.
            workers.reverse();
        }
        Ok(Choice::of(workers))
    }

    async fn postpone(&self, order: &JobOrder<'_>, after: Duration) -> Result<(), ServiceError> {
        let mut tx = self.transaction().await?;
        jobs::postpone(&mut tx, order.run_id, order.task_id, after).await?;
        crash::commit(tx, "job postponed").await?;
        Ok(())
    }

    /// Fetches what `worker` finished, until dropped.
    pub async fn watch_results(&self, worker: &KnownWorker) {
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
        let sent = jobs::sent_to(&mut db, &worker.name).await?;
        drop(db);
        for job in sent {
            if worker.client.status(job).await.map_err(unreachable)?.is_none() {
                self.lose_job(job).await?;
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

    /// Has workers stop the jobs of runs that have ended, until dropped.
    pub async fn watch_stops(&self) {
        let mut ended = self.hub().ended();
        loop {
            if let Err(err) = self.stop_jobs().await {
                tracing::debug!(
                    error = &err as &dyn std::error::Error,
                    "jobs could not be stopped"
                );
            }
            // Told of the end of a run, or after a while.
            let _ = tokio::time::timeout(STOPS_EVERY, ended.recv()).await;
        }
    }

    async fn stop_jobs(&self) -> Result<(), ServiceError> {
        let mut db = self.pool().acquire().await?;
        let canceling = jobs::canceling(&mut db, 100).await?;
        drop(db);
        let mut of: HashMap<String, Vec<JobRow>> = HashMap::new();
        for job in canceling {
            of.entry(job.worker.clone().unwrap_or_default()).or_default().push(job);
        }
        // A worker that does not answer holds up its own jobs only.
        let stopping = of.iter().filter_map(|(name, jobs)| Some((self.known_worker(name)?, jobs)));
        let stopping = stopping.map(async |(worker, jobs)| {
            let stopping = async {
                for job in jobs {
                    worker.client.stop(job.run_id.0, job.job_id).await.map_err(unreachable)?;
                    let mut tx = self.transaction().await?;
                    jobs::stopped(&mut tx, job.job_id).await?;
                    crash::commit(tx, "job stopped").await?;
                }
                Ok::<(), ServiceError>(())
            };
            // What is left is asked for again.
            tokio::time::timeout(STOP_PATIENCE, stopping).await.unwrap_or(Ok(()))
        });
        let results = futures::future::join_all(stopping).await;
        results.into_iter().collect()
    }

    /// Settles the jobs of workers that died with their servers, or were removed. Every server looks for them.
    pub async fn lose_jobs_of_dead_servers(&self) -> Result<(), ServiceError> {
        let mut db = self.pool().acquire().await?;
        let mut lost = jobs::on_dead_servers(&mut db, 1000).await?;
        lost.extend(jobs::on_removed_workers(&mut db, 1000).await?);
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
