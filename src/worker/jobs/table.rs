//! The table in memory: every job that the worker knows, its queue, and what counts against the bounds.
//!
//! Nothing here touches the disk or waits: the methods are called under the table's lock.
//!
//! **Invariant:** `open` counts exactly the jobs that were accepted and not acknowledged.
//! **Invariant:** `queued_bytes` is the size of exactly the requests in `queue`, and of those whose
//! record is being written.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, SystemTime};

use chrono::{DateTime, Utc};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::disk::Found;
use super::{JobsError, MAX_ANSWER_BYTES};
use crate::ids::JobId;
use crate::worker::config::WorkerConfig;
use crate::worker::wire::{JobRequest, JobState, JobStatus, VERSION};

#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) jobs: HashMap<JobId, Entry>,
    pub(super) queue: VecDeque<(JobId, JobRequest)>,
    pub(super) queued_bytes: usize,
    /// Jobs that were accepted and not acknowledged yet.
    pub(super) open: usize,
    /// Unacknowledged results, oldest first.
    pub(super) unacknowledged: BTreeMap<u64, JobId>,
    pub(super) unacknowledged_bytes: u64,
    /// Acknowledged ones, oldest first, with the time of their acknowledgement.
    pub(super) acknowledged: VecDeque<(JobId, DateTime<Utc>)>,
    pub(super) next_end: u64,
    pub(super) closed: bool,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) task_id: Uuid,
    pub(super) hash: String,
    pub(super) accepted_at: DateTime<Utc>,
    pub(super) started_at: Option<DateTime<Utc>>,
    /// `None` until the record is on disk.
    pub(super) state: watch::Sender<Option<JobState>>,
    pub(super) stop: CancellationToken,
    /// Its place among the unacknowledged results, and its size there.
    pub(super) ended: Option<(u64, u64)>,
    pub(super) acknowledged: bool,
}

impl Entry {
    pub(super) fn new(task_id: Uuid, hash: String, accepted_at: DateTime<Utc>) -> Self {
        Self {
            task_id,
            hash,
            accepted_at,
            started_at: None,
            state: watch::Sender::new(None),
            stop: CancellationToken::new(),
            ended: None,
            acknowledged: false,
        }
    }

    pub(super) fn state(&self) -> JobState {
        self.state.borrow().unwrap_or(JobState::Accepted)
    }

    pub(super) fn status(&self, job_id: JobId) -> JobStatus {
        JobStatus {
            version: VERSION,
            task_id: self.task_id,
            job_id,
            state: self.state(),
            accepted_at: self.accepted_at,
            started_at: self.started_at,
            acknowledged: self.acknowledged,
            result: None,
        }
    }
}

impl Table {
    /// Takes a place for a new job, when there is one.
    pub(super) fn reserve(
        &mut self,
        config: &WorkerConfig,
        request: &JobRequest,
    ) -> Result<(), JobsError> {
        let full = |reason, seconds| {
            Err(JobsError::Full { reason, retry_after: Duration::from_secs(seconds) })
        };
        if self.closed {
            return Err(JobsError::ShuttingDown);
        }
        if self.queue.len() >= config.queue.jobs {
            return full("the queue is full", 2);
        }
        if self.queued_bytes + request.size_bytes() > config.queue.bytes {
            return full("the queued requests take all the memory they may", 2);
        }
        if self.open >= config.results.unacknowledged
            || self.unacknowledged_bytes >= config.results.unacknowledged_bytes
        {
            return full("too many results wait to be acknowledged", 10);
        }
        self.open += 1;
        self.queued_bytes += request.size_bytes();
        Ok(())
    }

    pub(super) fn release(&mut self, request: &JobRequest) {
        self.open -= 1;
        self.queued_bytes -= request.size_bytes();
    }

    /// Takes a job out of the queue, with the place that it had.
    pub(super) fn unqueue(&mut self, job: JobId) -> Option<(usize, (JobId, JobRequest))> {
        let at = self.queue.iter().position(|(queued, _)| *queued == job)?;
        let queued = self.queue.remove(at)?;
        self.queued_bytes -= queued.1.size_bytes();
        Some((at, queued))
    }

    pub(super) fn ended(&mut self, job: JobId, state: JobState, bytes: u64) {
        let Some(entry) = self.jobs.get_mut(&job) else { return };
        let place = self.next_end;
        self.next_end += 1;
        entry.ended = Some((place, bytes));
        self.unacknowledged.insert(place, job);
        self.unacknowledged_bytes += bytes;
        entry.state.send_replace(Some(state));
    }

    /// The oldest unacknowledged jobs, as many as fit into one answer, and whether there are more.
    pub(super) fn oldest(&self, limit: usize) -> (Vec<JobId>, bool) {
        let mut bytes = 0;
        let mut chosen = Vec::new();
        for job in self.unacknowledged.values() {
            let size = self.jobs.get(job).and_then(|entry| entry.ended).map_or(0, |(_, size)| size);
            if chosen.len() == limit || (bytes + size > MAX_ANSWER_BYTES && !chosen.is_empty()) {
                return (chosen, true);
            }
            bytes += size;
            chosen.push(*job);
        }
        (chosen, false)
    }

    /// Acknowledged jobs beyond the number and the age that are kept.
    pub(super) fn forget(&mut self, config: &WorkerConfig, now: DateTime<Utc>) -> Vec<JobId> {
        let age = chrono::Duration::seconds(config.results.acknowledged_seconds.cast_signed());
        let mut forgotten = Vec::new();
        while let Some((job, since)) = self.acknowledged.front().copied() {
            if self.acknowledged.len() <= config.results.acknowledged && now - since <= age {
                break;
            }
            self.acknowledged.pop_front();
            self.jobs.remove(&job);
            forgotten.push(job);
        }
        forgotten
    }

    pub(super) fn restore(&mut self, found: Found) {
        let Found { record, bytes, modified, acknowledged } = found;
        let mut entry = Entry::new(record.task_id, record.request_hash, record.accepted_at);
        entry.started_at = record.started_at;
        entry.acknowledged = acknowledged;
        entry.state.send_replace(Some(record.state));
        self.jobs.insert(record.job_id, entry);
        if acknowledged {
            self.acknowledged.push_back((record.job_id, instant(modified)));
        } else {
            self.open += 1;
            self.ended(record.job_id, record.state, bytes);
        }
    }
}

fn instant(time: SystemTime) -> DateTime<Utc> {
    DateTime::<Utc>::from(time)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::config::Token;
    use crate::worker::wire::SandboxRequest;

    fn request(id: u128, stdin: usize) -> JobRequest {
        let sandbox =
            SandboxRequest { stdin: Some("x".repeat(stdin)), ..SandboxRequest::default() };
        JobRequest { version: 1, task_id: Uuid::nil(), job_id: JobId(Uuid::from_u128(id)), sandbox }
    }

    fn config(change: impl FnOnce(&mut WorkerConfig)) -> WorkerConfig {
        let mut config = WorkerConfig::new(Token::random(), "/nowhere");
        change(&mut config);
        config
    }

    fn accept(
        table: &mut Table,
        config: &WorkerConfig,
        request: JobRequest,
    ) -> Option<&'static str> {
        match table.reserve(config, &request) {
            Ok(()) => {
                let entry = Entry::new(request.task_id, request.hash(), DateTime::UNIX_EPOCH);
                entry.state.send_replace(Some(JobState::Accepted));
                table.jobs.insert(request.job_id, entry);
                table.queue.push_back((request.job_id, request));
                None
            }
            Err(JobsError::Full { reason, .. }) => Some(reason),
            Err(_) => Some("other"),
        }
    }

    #[test]
    fn the_queue_is_bounded_in_jobs_and_in_bytes() {
        let config = config(|config| {
            config.queue.jobs = 2;
            config.queue.bytes = 10_000;
        });
        let mut table = Table::default();
        assert_eq!(accept(&mut table, &config, request(1, 6_000)), None);
        let full = Some("the queued requests take all the memory they may");
        assert_eq!(accept(&mut table, &config, request(2, 6_000)), full);
        assert_eq!(accept(&mut table, &config, request(2, 0)), None);
        assert_eq!(accept(&mut table, &config, request(3, 0)), Some("the queue is full"));
        assert!(table.unqueue(request(1, 0).job_id).is_some());
        assert!(table.unqueue(request(1, 0).job_id).is_none());
        assert_eq!(accept(&mut table, &config, request(3, 6_000)), None);
    }

    #[test]
    fn one_answer_holds_the_oldest_results_up_to_its_size() {
        let config = config(|_| ());
        let mut table = Table::default();
        for id in 1..=4 {
            accept(&mut table, &config, request(id, 0));
            table.ended(request(id, 0).job_id, JobState::Completed, MAX_ANSWER_BYTES / 2);
        }
        let ids = |found: Vec<JobId>| found.iter().map(|id| id.0.as_u128()).collect::<Vec<_>>();
        let (found, more) = table.oldest(10);
        assert_eq!((ids(found), more), (vec![1, 2], true));
        let (found, more) = table.oldest(1);
        assert_eq!((ids(found), more), (vec![1], true));
    }

    #[test]
    fn acknowledged_jobs_are_forgotten_by_number_and_by_age() {
        let config = config(|config| {
            config.results.acknowledged = 2;
            config.results.acknowledged_seconds = 60;
        });
        let at = |seconds: i64| DateTime::UNIX_EPOCH + chrono::Duration::seconds(seconds);
        let mut table = Table::default();
        for (id, seconds) in [(1, 0), (2, 10), (3, 20)] {
            accept(&mut table, &config, request(id, 0));
            table.acknowledged.push_back((request(id, 0).job_id, at(seconds)));
        }
        assert_eq!(table.forget(&config, at(21)), [request(1, 0).job_id]);
        assert_eq!(table.forget(&config, at(70)), []);
        assert_eq!(table.forget(&config, at(71)), [request(2, 0).job_id]);
        assert_eq!(table.jobs.len(), 1);
    }
}
