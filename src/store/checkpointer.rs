//! The [`Checkpointer`] of one granted run: PostgreSQL, under the grant's fence.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use futures::FutureExt;
use futures::future::BoxFuture;
use sqlx::PgPool;

use super::StoreError;
use super::commit::{CommitError, Committer, Request};
use super::signals::Signals;
use crate::graph::checkpoint::{
    CheckpointError, Checkpointer, Commit, LoadedRows, StreamRow, ValueRef,
};
use crate::ids::{RunId, ThreadId};

/// Until when a driver may act, by this process's own clock: the end of its lease as it knows it.
///
/// The database decides about commits. This is for what follows a commit: a process that stood still in
/// between finds here that it must not act on it any more.
#[derive(Debug, Clone, Default)]
pub struct Authority(Arc<Mutex<Option<Instant>>>);

impl Authority {
    /// The lease holds until then.
    pub fn hold_until(&self, end: Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(end);
    }

    /// Whether the lease has not ended. One that was never limited has not.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_none_or(|end| Instant::now() < end)
    }
}

/// Stores one run's checkpoints.
#[derive(Debug)]
pub struct RunCheckpointer {
    /// Where to read.
    pub pool: PgPool,
    /// Where to write.
    pub committer: Committer,
    /// Who to tell.
    pub signals: Arc<Signals>,
    /// The run.
    pub run_id: RunId,
    /// Its thread.
    pub thread_id: ThreadId,
    /// The grant's fence.
    pub fence: i64,
    /// What the grant stands on.
    pub authority: Authority,
    /// The branch that the run is on.
    pub branch: i32,
    /// The root's last checkpoint.
    pub root_seq: AtomicI64,
    /// Whether readers in other processes are told of each commit.
    pub streamed: bool,
    /// Which stream row comes next.
    pub shown: Shown,
    /// Whether a commit has ended the run.
    pub ended: AtomicBool,
}

/// Where the stream rows of a run stand: the seq of the last one, and the place of the next.
///
/// Subgraphs that run side by side commit on their own. A reader that has seen a row does not look before it again,
/// so their commits with rows go one at a time, and the places are given in that order.
#[derive(Debug)]
pub struct Shown(tokio::sync::Mutex<(i64, i32)>);

impl Default for Shown {
    fn default() -> Self {
        Self(tokio::sync::Mutex::new((i64::MIN, 0)))
    }
}

impl Shown {
    /// Gives rows their places, after all that were given before.
    fn place(next: &mut (i64, i32), rows: &mut [StreamRow]) {
        for row in rows {
            if row.seq > next.0 {
                *next = (row.seq, row.place);
            }
            row.seq = next.0;
            row.place = row.place.max(next.1);
            next.1 = row.place.saturating_add(1);
        }
    }
}

impl From<CommitError> for CheckpointError {
    fn from(err: CommitError) -> Self {
        match err {
            CommitError::Fenced => Self::Fenced,
            CommitError::Store(err) => err.into(),
        }
    }
}

impl From<StoreError> for CheckpointError {
    fn from(err: StoreError) -> Self {
        Self::Storage(Box::new(err))
    }
}

impl Checkpointer for RunCheckpointer {
    fn load<'a>(
        &'a self,
        namespace: &'a str,
    ) -> BoxFuture<'a, Result<Option<LoadedRows>, CheckpointError>> {
        async move {
            let mut db = self.pool.acquire().await.map_err(StoreError::from)?;
            let rows =
                super::checkpoints::rows(&mut db, self.thread_id, namespace, self.branch, None)
                    .await?;
            let Some(last) = rows.last() else { return Ok(None) };
            let tasks =
                super::checkpoints::tasks(&mut db, self.thread_id, namespace, last.position)
                    .await?;
            Ok(Some(LoadedRows { rows, tasks }))
        }
        .boxed()
    }

    fn fetch<'a>(
        &'a self,
        namespace: &'a str,
        refs: Vec<ValueRef>,
    ) -> BoxFuture<'a, Result<HashMap<ValueRef, Vec<u8>>, CheckpointError>> {
        async move {
            let mut db = self.pool.acquire().await.map_err(StoreError::from)?;
            Ok(super::checkpoints::values(&mut db, self.thread_id, namespace, &refs).await?)
        }
        .boxed()
    }

    fn commit(&self, mut commit: Commit) -> BoxFuture<'_, Result<(), CheckpointError>> {
        async move {
            let mut turn = None;
            if !commit.stream.is_empty() {
                let next = turn.insert(self.shown.0.lock().await);
                Shown::place(next, &mut commit.stream);
            }
            let known = self.root_seq.load(Ordering::Relaxed);
            let advanced = commit
                .checkpoint
                .as_ref()
                .filter(|_| commit.namespace.is_empty())
                .map(|row| row.position.seq);
            if advanced.is_some_and(|seq| seq <= known) {
                // This grant has stored it before.
                return Ok(());
            }
            let request = Request {
                run_id: self.run_id,
                thread_id: self.thread_id,
                fence: self.fence,
                root_seq: known,
                commit: Arc::new(commit),
            };
            let ends = request.commit.end.is_some();
            let committed = self.committer.commit(request).await?;
            drop(turn);
            if ends {
                // Nothing is left to do that would need authority.
                self.ended.store(true, Ordering::Relaxed);
                self.signals.run_ended(self.run_id);
                if committed.queues {
                    self.signals.queued();
                }
                return Ok(());
            }
            if !self.authority.holds() {
                // It is stored, but what it allows may have been allowed to somebody else meanwhile.
                return Err(CheckpointError::Fenced);
            }
            if let Some(seq) = advanced {
                self.root_seq.store(seq, Ordering::Relaxed);
            }
            self.signals.run_moved(self.run_id, self.streamed);
            Ok(())
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn rows_that_come_late_get_places_after_those_that_are_seen() {
        let rows = |seq: i64, places: &[i32]| -> Vec<StreamRow> {
            let row = |place: &i32| StreamRow {
                seq,
                place: *place,
                mode: "custom",
                namespace: String::new(),
                data: Vec::new(),
            };
            places.iter().map(row).collect()
        };
        let mut next = (i64::MIN, 0);
        let mut given = |mut rows: Vec<StreamRow>| -> Vec<(i64, i32)> {
            Shown::place(&mut next, &mut rows);
            rows.iter().map(|row| (row.seq, row.place)).collect()
        };
        assert_eq!(given(rows(4, &[2, 4])), [(4, 2), (4, 4)]);
        assert_eq!(given(rows(4, &[3, 5])), [(4, 5), (4, 6)]);
        assert_eq!(given(rows(4, &[6])), [(4, 7)]);
        assert_eq!(given(rows(5, &[0])), [(5, 0)]);
    }

    #[test]
    fn authority_ends_with_the_lease_and_comes_back_with_its_renewal() {
        let authority = Authority::default();
        assert!(authority.holds());
        authority.hold_until(Instant::now());
        assert!(!authority.holds());
        authority.clone().hold_until(Instant::now() + Duration::from_secs(60));
        assert!(authority.holds());
    }
}
