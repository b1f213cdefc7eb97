//! The job records of a worker: one small file for each job, under a lock that one agent holds.
//!
//! `jobs/ID.json` is written when a job is accepted and again when it has ended, each time whole, synced
//! and renamed into place. Acknowledging moves the file to `acked/`, in one atomic step.
//!
//! **Invariant:** a record that exists under its name is complete, whatever instant the process died at.
//! **Invariant:** two agents never share a state directory.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use chrono::{DateTime, Utc};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::ids::JobId;
use crate::worker::wire::{JobResult, JobState};

/// The version of the record's format.
const FORMAT: u32 = 1;

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("another worker uses {path}; every worker needs a state directory of its own")]
    InUse { path: PathBuf },
    #[error("could not {action} {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the record {path} is damaged; move it away to start without it (its job may have run)"
    )]
    Damaged {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("the record {path} has format {format}, and this program knows {FORMAT}")]
    Format { path: PathBuf, format: u32 },
}

/// What is stored of one job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) format: u32,
    pub(super) job_id: JobId,
    pub(super) task_id: Uuid,
    pub(super) request_hash: String,
    pub(super) state: JobState,
    pub(super) accepted_at: DateTime<Utc>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) started_at: Option<DateTime<Utc>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) result: Option<JobResult>,
}

impl Record {
    pub(super) fn accepted(job_id: JobId, task_id: Uuid, hash: String, now: DateTime<Utc>) -> Self {
        Self {
            format: FORMAT,
            job_id,
            task_id,
            request_hash: hash,
            state: JobState::Accepted,
            accepted_at: now,
            started_at: None,
            result: None,
        }
    }
}

/// A record as it was found at start.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) record: Record,
    pub(super) bytes: u64,
    pub(super) modified: SystemTime,
    pub(super) acknowledged: bool,
}

/// The locked state directory.
#[derive(Debug)]
pub(super) struct Disk {
    jobs: PathBuf,
    acked: PathBuf,
    _lock: Flock<File>,
}

impl Disk {
    /// Makes the directory when it is missing, and takes its lock.
    pub(super) fn open(state_dir: &Path) -> Result<Self, DiskError> {
        let jobs = state_dir.join("jobs");
        let acked = state_dir.join("acked");
        for path in [&jobs, &acked] {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
            made.map_err(failed("make the directory", path))?;
        }
        Ok(Self { jobs, acked, _lock: lock(state_dir)? })
    }

    fn path(&self, job: JobId, acknowledged: bool) -> PathBuf {
        let directory = if acknowledged { &self.acked } else { &self.jobs };
        directory.join(format!("{job}.json"))
    }

    /// Stores a record so that it survives a crash of the process and of the machine.
    pub(super) fn write(&self, record: &Record) -> Result<u64, DiskError> {
        let path = self.path(record.job_id, false);
        let part = self.jobs.join(format!(".{}.part", record.job_id));
        let store = || -> io::Result<u64> {
            let text = serde_json::to_vec(record)?;
            let mut options = OpenOptions::new();
            let mut file =
                options.create(true).truncate(true).write(true).mode(0o600).open(&part)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&part, &path)?;
            File::open(&self.jobs)?.sync_all()?;
            Ok(text.len() as u64)
        };
        store().map_err(failed("write", &path))
    }

    pub(super) fn read(&self, job: JobId, acknowledged: bool) -> Result<Record, DiskError> {
        let path = self.path(job, acknowledged);
        let text = fs::read(&path).map_err(failed("read", &path))?;
        parse(&path, &text)
    }

    /// From now on the record may be deleted.
    pub(super) fn acknowledge(&self, job: JobId) -> Result<(), DiskError> {
        let path = self.path(job, false);
        fs::rename(&path, self.path(job, true)).map_err(failed("acknowledge", &path))
    }

    pub(super) fn delete_acknowledged(&self, job: JobId) -> Result<(), DiskError> {
        let path = self.path(job, true);
        match fs::remove_file(&path) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => Err(failed("delete", &path)(err)),
            _ => Ok(()),
        }
    }

    /// Everything that earlier agents stored here, in the order in which it was last written.
    pub(super) fn load(&self) -> Result<Vec<Found>, DiskError> {
        let mut found = Vec::new();
        for (directory, acknowledged) in [(&self.jobs, false), (&self.acked, true)] {
            for entry in fs::read_dir(directory).map_err(failed("list", directory))? {
                let path = entry.map_err(failed("list", directory))?.path();
                if path.extension().is_some_and(|extension| extension == "part") {
                    // Its rename never happened, so nobody was told of it.
                    fs::remove_file(&path).map_err(failed("delete", &path))?;
                } else if path.extension().is_some_and(|extension| extension == "json") {
                    found.push(find(&path, acknowledged)?);
                }
            }
        }
        found.sort_by_key(|one| (one.modified, one.record.job_id));
        Ok(found)
    }
}

/// Takes the lock of a state directory, which only one process can hold.
pub(in crate::worker) fn lock(state_dir: &Path) -> Result<Flock<File>, DiskError> {
    let path = state_dir.join("lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = file.map_err(failed("open", &path))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        if errno == nix::errno::Errno::EWOULDBLOCK {
            DiskError::InUse { path: state_dir.to_owned() }
        } else {
            failed("lock", &path)(errno.into())
        }
    })
}

fn find(path: &Path, acknowledged: bool) -> Result<Found, DiskError> {
    let text = fs::read(path).map_err(failed("read", path))?;
    let modified = fs::metadata(path).and_then(|meta| meta.modified());
    let modified = modified.map_err(failed("read", path))?;
    Ok(Found { record: parse(path, &text)?, bytes: text.len() as u64, modified, acknowledged })
}

fn parse(path: &Path, text: &[u8]) -> Result<Record, DiskError> {
    let damaged = |source| DiskError::Damaged { path: path.to_owned(), source };
    let record: Record = serde_json::from_slice(text).map_err(damaged)?;
    if record.format != FORMAT {
        return Err(DiskError::Format { path: path.to_owned(), format: record.format });
    }
    Ok(record)
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DiskError {
    let path = path.to_owned();
    move |source| DiskError::Io { action, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: u128) -> Record {
        let id = JobId(Uuid::from_u128(id));
        Record::accepted(id, Uuid::nil(), "hash".into(), DateTime::UNIX_EPOCH)
    }

    #[test]
    fn a_second_agent_is_kept_out() {
        let dir = tempfile::tempdir().unwrap();
        let first = Disk::open(dir.path()).unwrap();
        assert!(matches!(Disk::open(dir.path()), Err(DiskError::InUse { .. })));
        drop(first);
        Disk::open(dir.path()).unwrap();
    }

    #[test]
    fn records_come_back_and_half_written_ones_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::open(dir.path()).unwrap();
        disk.write(&record(1)).unwrap();
        disk.write(&record(2)).unwrap();
        disk.acknowledge(record(1).job_id).unwrap();
        fs::write(dir.path().join("jobs/.x.part"), "{").unwrap();
        let found: Vec<(JobId, bool)> =
            disk.load().unwrap().into_iter().map(|f| (f.record.job_id, f.acknowledged)).collect();
        assert_eq!(found, [(record(1).job_id, true), (record(2).job_id, false)]);
        assert!(!dir.path().join("jobs/.x.part").exists());
    }

    #[test]
    fn a_damaged_record_is_an_error_and_not_a_forgotten_job() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::open(dir.path()).unwrap();
        fs::write(dir.path().join("jobs/x.json"), "{").unwrap();
        assert!(matches!(disk.load(), Err(DiskError::Damaged { .. })));
    }
}
