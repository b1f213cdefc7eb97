//! The job table of a worker: what was accepted, what runs, what ended and waits to be acknowledged.
//!
//! A job id names one execution for ever: accepting it again answers with its state. A result stays on
//! disk until the caller says that it has stored it; when too many wait, new jobs are refused.
//!
//! **Invariant:** a job is announced as accepted, or as ended, only after its record is on disk.
//! **Invariant:** an unacknowledged result is never dropped.
//! **Invariant:** results are not held in memory; the table's size does not depend on what jobs print.

mod disk;
pub(super) mod run;
mod table;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::{Notify, watch};
use uuid::Uuid;

use self::disk::{Disk, Record};
use self::table::{Entry, Table};
use super::config::WorkerConfig;
use super::effective::InForce;
use super::wire::{
    FinishedJobs, JobError, JobErrorKind, JobRequest, JobResult, JobState, JobStatus, StopAnswer,
    StopOutcome, Truncated, VERSION,
};
use crate::clock::Clock;
use crate::ids::JobId;

pub use disk::DiskError;
pub(super) use disk::lock;

/// An answer with results stops growing here, so that one poll stays bounded.
const MAX_ANSWER_BYTES: u64 = 8 << 20;
/// Jobs in one answer.
pub const MAX_FINISHED: usize = 100;

/// Why the table does not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum JobsError {
    #[error("job {job} exists with another request")]
    Conflict { job: JobId },
    #[error("job {job} is not known here")]
    Unknown { job: JobId },
    #[error("job {job} has not ended yet")]
    NotFinished { job: JobId },
    #[error("{reason}")]
    Full { reason: &'static str, retry_after: Duration },
    #[error("this worker is shutting down")]
    ShuttingDown,
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// What accepting a job found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accepted {
    New,
    Known,
}

/// The table, shared by the server and the runner.
#[derive(Debug, Clone)]
pub struct Jobs(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    config: WorkerConfig,
    in_force: InForce,
    clock: Arc<dyn Clock>,
    disk: Disk,
    table: Mutex<Table>,
    /// Something was queued, or a slot may be free.
    work: Notify,
    /// Grows with every job that ends.
    finished: watch::Sender<u64>,
}

impl Jobs {
    /// Opens the state directory. Jobs that an earlier agent accepted and did not end become `lost`;
    /// their ids are returned, so that what may be left of their sandboxes can be killed.
    pub fn open(
        config: WorkerConfig,
        in_force: InForce,
        clock: Arc<dyn Clock>,
    ) -> Result<(Self, Vec<JobId>), JobsError> {
        let disk = Disk::open(&config.state_dir)?;
        let mut table = Table::default();
        let mut lost = Vec::new();
        for mut found in disk.load()? {
            if !found.record.state.is_terminal() {
                lost.push(found.record.job_id);
                lose(&mut found.record, clock.now());
                found.bytes = disk.write(&found.record)?;
            }
            table.restore(found);
        }
        let shared = Shared {
            config,
            in_force,
            clock,
            disk,
            table: Mutex::new(table),
            work: Notify::new(),
            finished: watch::Sender::new(0),
        };
        Ok((Self(Arc::new(shared)), lost))
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Accepts a job, or finds that it was accepted before. Returns when its record is on disk.
    pub async fn accept(&self, request: JobRequest) -> Result<(Accepted, JobStatus), JobsError> {
        let job = request.job_id;
        let hash = request.hash();
        let jobs = self.clone();
        let own_hash = hash.clone();
        // Not cancelled when the caller goes away: a reserved place is always filled or given back.
        let written = tokio::task::spawn_blocking(move || jobs.accept_new(request, own_hash)).await;
        let accepted = written.map_err(|_| JobsError::ShuttingDown)??;
        if let Some(mut state) = self.known(job, &hash)? {
            // Another caller may still be writing the record; if that fails, so does this.
            let on_disk = state.wait_for(Option::is_some).await.map(drop);
            on_disk.map_err(|_| JobsError::Full {
                reason: "the job's record could not be written",
                retry_after: Duration::from_secs(2),
            })?;
        }
        Ok((accepted, self.status(job).await?))
    }

    fn known(
        &self,
        job: JobId,
        hash: &str,
    ) -> Result<Option<watch::Receiver<Option<JobState>>>, JobsError> {
        match self.table().jobs.get(&job) {
            Some(entry) if entry.hash == hash => Ok(Some(entry.state.subscribe())),
            Some(_) => Err(JobsError::Conflict { job }),
            None => Ok(None),
        }
    }

    fn accept_new(&self, request: JobRequest, hash: String) -> Result<Accepted, JobsError> {
        let (job, now) = (request.job_id, self.0.clock.now());
        {
            let mut table = self.table();
            if let Some(entry) = table.jobs.get(&job) {
                return if entry.hash == hash {
                    Ok(Accepted::Known)
                } else {
                    Err(JobsError::Conflict { job })
                };
            }
            table.reserve(&self.0.config, &request)?;
            table.jobs.insert(job, Entry::new(request.task_id, hash.clone(), now));
        }
        let record = Record::accepted(job, request.task_id, hash, now);
        if let Err(err) = self.0.disk.write(&record) {
            let mut table = self.table();
            table.jobs.remove(&job);
            table.release(&request);
            return Err(err.into());
        }
        let mut table = self.table();
        if let Some(entry) = table.jobs.get(&job) {
            entry.state.send_replace(Some(JobState::Accepted));
        }
        table.queue.push_back((job, request));
        drop(table);
        self.0.work.notify_one();
        Ok(Accepted::New)
    }

    /// A job as it is now, with its result when it has ended.
    pub async fn status(&self, job: JobId) -> Result<JobStatus, JobsError> {
        let mut status = {
            let table = self.table();
            let entry = table.jobs.get(&job).filter(|entry| entry.state.borrow().is_some());
            entry.ok_or(JobsError::Unknown { job })?.status(job)
        };
        if status.state.is_terminal() {
            let record = self.read(job, status.acknowledged).await?;
            status.result = record.result;
        }
        Ok(status)
    }

    async fn read(&self, job: JobId, acknowledged: bool) -> Result<Record, JobsError> {
        let jobs = self.clone();
        let read = move || {
            // It may be acknowledged between the look at the table and the look at the disk.
            let disk = &jobs.0.disk;
            disk.read(job, acknowledged).or_else(|_| disk.read(job, !acknowledged))
        };
        let record =
            tokio::task::spawn_blocking(read).await.map_err(|_| JobsError::ShuttingDown)?;
        Ok(record?)
    }

    /// Waits until the job has ended.
    pub async fn ended(&self, job: JobId) -> Result<JobStatus, JobsError> {
        let mut state = {
            let table = self.table();
            table.jobs.get(&job).ok_or(JobsError::Unknown { job })?.state.subscribe()
        };
        let ended = state.wait_for(|state| state.is_some_and(JobState::is_terminal)).await;
        ended.map_err(|_| JobsError::Unknown { job })?;
        self.status(job).await
    }

    /// Unacknowledged results, oldest first; waits for the first one when there is none.
    pub async fn finished(&self, wait: Duration, limit: usize) -> Result<FinishedJobs, JobsError> {
        let mut news = self.0.finished.subscribe();
        let deadline = tokio::time::Instant::now() + wait;
        loop {
            news.mark_unchanged();
            let found = self.unacknowledged(limit.clamp(1, MAX_FINISHED)).await?;
            let over = async {
                tokio::select! {
                    changed = news.changed() => changed.is_err(),
                    () = tokio::time::sleep_until(deadline) => true,
                }
            };
            if !found.jobs.is_empty() || wait.is_zero() || over.await {
                return Ok(found);
            }
        }
    }

    async fn unacknowledged(&self, limit: usize) -> Result<FinishedJobs, JobsError> {
        let (chosen, more) = self.table().oldest(limit);
        let mut jobs = Vec::with_capacity(chosen.len());
        for job in chosen {
            match self.status(job).await {
                Ok(status) if !status.acknowledged => jobs.push(status),
                Ok(_) | Err(JobsError::Unknown { .. }) => {}
                Err(err) => return Err(err),
            }
        }
        Ok(FinishedJobs { version: VERSION, jobs, more })
    }

    /// The caller has stored the result: it may be deleted here.
    pub async fn acknowledge(&self, job: JobId) -> Result<(), JobsError> {
        let jobs = self.clone();
        let acknowledge = move || jobs.acknowledge_now(job);
        tokio::task::spawn_blocking(acknowledge).await.map_err(|_| JobsError::ShuttingDown)?
    }

    fn acknowledge_now(&self, job: JobId) -> Result<(), JobsError> {
        let now = self.0.clock.now();
        let mut table = self.table();
        let entry = table.jobs.get_mut(&job).ok_or(JobsError::Unknown { job })?;
        if !entry.state().is_terminal() {
            return Err(JobsError::NotFinished { job });
        }
        let Some((place, bytes)) = entry.ended.take() else { return Ok(()) };
        // Under the lock, so that nobody sees the table and the disk disagree for longer than a rename.
        if let Err(err) = self.0.disk.acknowledge(job) {
            entry.ended = Some((place, bytes));
            return Err(err.into());
        }
        entry.acknowledged = true;
        table.unacknowledged.remove(&place);
        table.unacknowledged_bytes -= bytes;
        table.open -= 1;
        table.acknowledged.push_back((job, now));
        let forgotten = table.forget(&self.0.config, now);
        drop(table);
        for job in forgotten {
            if let Err(err) = self.0.disk.delete_acknowledged(job) {
                tracing::warn!(
                    error = &err as &dyn std::error::Error,
                    "an old result was not deleted"
                );
            }
        }
        Ok(())
    }

    /// Stops a job: a queued one at once, a running one with SIGTERM and then SIGKILL.
    pub async fn stop(&self, task_id: Uuid, job_id: JobId) -> Result<StopAnswer, JobsError> {
        let jobs = self.clone();
        // Not cancelled half-way when the caller goes away.
        let stop = move || jobs.stop_now(task_id, job_id);
        tokio::task::spawn_blocking(stop).await.map_err(|_| JobsError::ShuttingDown)?
    }

    fn stop_now(&self, task_id: Uuid, job_id: JobId) -> Result<StopAnswer, JobsError> {
        let answer =
            |outcome, state| StopAnswer { version: VERSION, task_id, job_id, outcome, state };
        let (at, queued) = {
            let mut table = self.table();
            let Some(entry) = table.jobs.get(&job_id) else {
                return Ok(answer(StopOutcome::NotRunning, None));
            };
            if entry.task_id != task_id {
                return Err(JobsError::Conflict { job: job_id });
            }
            if entry.state().is_terminal() {
                return Ok(answer(StopOutcome::NotRunning, Some(entry.state())));
            }
            entry.stop.cancel();
            match table.unqueue(job_id) {
                Some(found) => found,
                None => {
                    return Ok(answer(StopOutcome::Stopping, Some(entry_state(&table, job_id))));
                }
            }
        };
        let now = self.0.clock.now();
        let result = canceled_in_queue(task_id, job_id, now);
        if let Err(err) = self.end_now(result) {
            // Its stop is remembered: the runner will end it without starting it.
            let mut table = self.table();
            table.queued_bytes += queued.1.size_bytes();
            let at = at.min(table.queue.len());
            table.queue.insert(at, queued);
            return Err(err);
        }
        Ok(answer(StopOutcome::Canceled, Some(JobState::Canceled)))
    }

    /// Refuses new jobs from now on.
    pub fn close(&self) {
        self.table().closed = true;
    }

    /// Jobs that have not ended: after a shutdown, the ones whose sandboxes were killed.
    #[must_use]
    pub fn unfinished(&self) -> Vec<JobId> {
        let table = self.table();
        let open = table.jobs.iter().filter(|(_, entry)| !entry.state().is_terminal());
        open.map(|(job, _)| *job).collect()
    }

    /// How many jobs wait and how many have started and not ended.
    #[must_use]
    pub fn load(&self) -> (usize, usize) {
        let table = self.table();
        let running =
            table.jobs.values().filter(|entry| entry.state() == JobState::Running).count();
        (table.queue.len(), running)
    }

    /// Records how a job ended, and announces it. A full disk delays the announcement, never loses it.
    async fn end(&self, result: JobResult) {
        let mut pause = Duration::from_millis(100);
        while let Err(err) = self.try_end(result.clone()).await {
            let job = result.job_id;
            tracing::error!(error = &err as &dyn std::error::Error, job.id = %job, "the result of job {job} could not be stored yet");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }

    async fn try_end(&self, result: JobResult) -> Result<(), JobsError> {
        let jobs = self.clone();
        let end = move || jobs.end_now(result);
        tokio::task::spawn_blocking(end).await.map_err(|_| JobsError::ShuttingDown)?
    }

    fn end_now(&self, result: JobResult) -> Result<(), JobsError> {
        let (job, state) = (result.job_id, result.status);
        let record = {
            let table = self.table();
            let entry = table.jobs.get(&job).ok_or(JobsError::Unknown { job })?;
            if entry.state().is_terminal() {
                return Ok(());
            }
            let mut record =
                Record::accepted(job, entry.task_id, entry.hash.clone(), entry.accepted_at);
            record.state = state;
            record.started_at = entry.started_at;
            record.result = Some(result);
            record
        };
        let bytes = self.0.disk.write(&record)?;
        self.table().ended(job, state, bytes);
        self.0.finished.send_modify(|count| *count += 1);
        Ok(())
    }
}

/// What becomes of a job whose agent ended before it.
fn lose(record: &mut Record, now: DateTime<Utc>) {
    let error = JobError {
        kind: JobErrorKind::AgentEnded,
        message: "the worker's agent ended before the job; its command may have run in part"
            .to_owned(),
    };
    let times = (record.started_at.unwrap_or(record.accepted_at), now);
    record.state = JobState::Lost;
    record.result =
        Some(without_output(record.task_id, record.job_id, JobState::Lost, times, Some(error)));
}

fn entry_state(table: &Table, job: JobId) -> JobState {
    table.jobs.get(&job).map_or(JobState::Accepted, Entry::state)
}

fn canceled_in_queue(task_id: Uuid, job_id: JobId, now: DateTime<Utc>) -> JobResult {
    let message = "it was stopped before it started".to_owned();
    let error = JobError { kind: JobErrorKind::Stopped, message };
    without_output(task_id, job_id, JobState::Canceled, (now, now), Some(error))
}

fn without_output(
    task_id: Uuid,
    job_id: JobId,
    status: JobState,
    (started_at, ended_at): (DateTime<Utc>, DateTime<Utc>),
    error: Option<JobError>,
) -> JobResult {
    JobResult {
        version: VERSION,
        task_id,
        job_id,
        status,
        exit_code: None,
        stdout: String::new(),
        stderr: String::new(),
        started_at,
        ended_at,
        truncated: Truncated::default(),
        error,
    }
}
