//! The columns of the statement that writes everything a commit can hold: an array each, a row for each thing.

use super::Request;
use crate::graph::checkpoint::{Commit, Due, EffectChange, EffectStatus};

/// Columns of the multi-row statement that writes everything a commit can hold.
#[derive(Default)]
pub(super) struct Columns {
    pub(super) runs: Vec<uuid::Uuid>,
    pub(super) fences: Vec<i64>,
    pub(super) root_seqs: Vec<i64>,
    pub(super) next_seqs: Vec<i64>,
    pub(super) threads: Vec<uuid::Uuid>,
    pub(super) checkpoints: CheckpointColumns,
    pub(super) values: ValueColumns,
    pub(super) writes: WriteColumns,
    pub(super) waits: WaitColumns,
    pub(super) stream: StreamColumns,
    pub(super) effects: EffectColumns,
}

#[derive(Default)]
pub(super) struct CheckpointColumns {
    pub(super) request: Vec<i32>,
    pub(super) namespace: Vec<String>,
    pub(super) branch: Vec<i32>,
    pub(super) seq: Vec<i64>,
    pub(super) parent_branch: Vec<Option<i32>>,
    pub(super) parent_seq: Vec<Option<i64>>,
    pub(super) source: Vec<i16>,
    pub(super) next: Vec<String>,
    pub(super) changed: Vec<Vec<u8>>,
    pub(super) keyframe: Vec<Option<Vec<u8>>>,
    /// The seq that planned the superstep, when its waits are to be settled.
    pub(super) settles: Vec<Option<i64>>,
}

#[derive(Default)]
pub(super) struct ValueColumns {
    pub(super) request: Vec<i32>,
    pub(super) namespace: Vec<String>,
    pub(super) branch: Vec<i32>,
    pub(super) seq: Vec<i64>,
    pub(super) channel: Vec<String>,
    pub(super) value: Vec<Vec<u8>>,
}

#[derive(Default)]
pub(super) struct WriteColumns {
    pub(super) request: Vec<i32>,
    pub(super) namespace: Vec<String>,
    pub(super) branch: Vec<i32>,
    pub(super) seq: Vec<i64>,
    pub(super) task: Vec<uuid::Uuid>,
    pub(super) writes: Vec<Vec<u8>>,
}

#[derive(Default)]
pub(super) struct WaitColumns {
    pub(super) request: Vec<i32>,
    pub(super) namespace: Vec<String>,
    pub(super) branch: Vec<i32>,
    pub(super) seq: Vec<i64>,
    pub(super) task: Vec<uuid::Uuid>,
    pub(super) node: Vec<String>,
    pub(super) kind: Vec<String>,
    pub(super) attempt: Vec<i32>,
    pub(super) round: Vec<i32>,
    pub(super) after: Vec<Option<f64>>,
    pub(super) at: Vec<Option<chrono::DateTime<chrono::Utc>>>,
    pub(super) name: Vec<Option<String>>,
    pub(super) data: Vec<Option<Vec<u8>>>,
    pub(super) answer: Vec<Option<Vec<u8>>>,
}

#[derive(Default)]
pub(super) struct StreamColumns {
    pub(super) request: Vec<i32>,
    pub(super) seq: Vec<i64>,
    pub(super) place: Vec<i32>,
    pub(super) mode: Vec<String>,
    pub(super) namespace: Vec<String>,
    pub(super) data: Vec<Vec<u8>>,
}

/// Of an outcome, `key` and what follows it up to `request` is empty.
#[derive(Default)]
pub(super) struct EffectColumns {
    pub(super) request: Vec<i32>,
    pub(super) namespace: Vec<String>,
    pub(super) branch: Vec<i32>,
    pub(super) seq: Vec<i64>,
    pub(super) task: Vec<uuid::Uuid>,
    pub(super) attempt: Vec<i32>,
    pub(super) status: Vec<String>,
    pub(super) key: Vec<Option<String>>,
    pub(super) node: Vec<Option<String>>,
    pub(super) kind: Vec<Option<String>>,
    pub(super) target: Vec<Option<String>>,
    pub(super) effect: Vec<Option<String>>,
    pub(super) hash: Vec<Option<Vec<u8>>>,
    /// The request of an intent, the outcome of an outcome.
    pub(super) body: Vec<Vec<u8>>,
}

impl Columns {
    pub(super) fn of(requests: &[&Request]) -> Self {
        let mut columns = Self::default();
        for (number, request) in (0_i32..).zip(requests) {
            columns.push(number, request);
        }
        columns
    }

    fn push(&mut self, number: i32, request: &Request) {
        let commit = &*request.commit;
        self.runs.push(request.run_id.0);
        self.fences.push(request.fence);
        self.root_seqs.push(request.root_seq);
        self.next_seqs.push(request.next_root_seq());
        self.threads.push(request.thread_id.0);
        if let Some(row) = &commit.checkpoint {
            let to = &mut self.checkpoints;
            to.request.push(number);
            to.namespace.push(commit.namespace.clone());
            to.branch.push(row.position.branch);
            to.seq.push(row.position.seq);
            to.parent_branch.push(row.parent.map(|parent| parent.branch));
            to.parent_seq.push(row.parent.map(|parent| parent.seq));
            to.source.push(row.source.code());
            to.next.push(row.next.clone());
            to.changed.push(row.changed.clone());
            to.keyframe.push(row.keyframe.clone());
            to.settles.push(commit.settles.then_some(commit.planned.seq));
            for (channel, value) in &row.values {
                let to = &mut self.values;
                to.request.push(number);
                to.namespace.push(commit.namespace.clone());
                to.branch.push(row.position.branch);
                to.seq.push(row.position.seq);
                to.channel.push(channel.clone());
                to.value.push(value.clone());
            }
        }
        for (task, writes) in &commit.writes {
            let to = &mut self.writes;
            to.request.push(number);
            to.namespace.push(commit.namespace.clone());
            to.branch.push(commit.planned.branch);
            to.seq.push(commit.planned.seq);
            to.task.push(task.0);
            to.writes.push(writes.clone());
        }
        self.push_waits(number, commit);
        self.push_effects(number, commit);
        for row in &commit.stream {
            let to = &mut self.stream;
            to.request.push(number);
            to.seq.push(row.seq);
            to.place.push(row.place);
            to.mode.push(row.mode.to_owned());
            to.namespace.push(row.namespace.clone());
            to.data.push(row.data.clone());
        }
    }

    fn push_effects(&mut self, number: i32, commit: &Commit) {
        for row in &commit.effects {
            let to = &mut self.effects;
            to.request.push(number);
            to.namespace.push(commit.namespace.clone());
            to.branch.push(commit.planned.branch);
            to.seq.push(commit.planned.seq);
            to.task.push(row.task.0);
            to.attempt.push(i32::try_from(row.attempt).unwrap_or(i32::MAX));
            match &row.change {
                EffectChange::Intent { key, node, kind, target, effect, request_hash, request } => {
                    to.key.push(Some(key.clone()));
                    to.status.push(EffectStatus::Intent.as_str().to_owned());
                    to.node.push(Some(node.clone()));
                    to.kind.push(Some((*kind).to_owned()));
                    to.target.push(Some(target.clone()));
                    to.effect.push(Some(effect.as_str().to_owned()));
                    to.hash.push(Some(request_hash.to_vec()));
                    to.body.push(request.clone());
                }
                EffectChange::Outcome { status, outcome } => {
                    to.status.push(status.as_str().to_owned());
                    to.key.push(None);
                    to.node.push(None);
                    to.kind.push(None);
                    to.target.push(None);
                    to.effect.push(None);
                    to.hash.push(None);
                    to.body.push(outcome.clone());
                }
            }
        }
    }

    fn push_waits(&mut self, number: i32, commit: &Commit) {
        for wait in &commit.waits {
            let to = &mut self.waits;
            to.request.push(number);
            to.namespace.push(commit.namespace.clone());
            to.branch.push(commit.planned.branch);
            to.seq.push(commit.planned.seq);
            to.task.push(wait.task.0);
            to.node.push(wait.node.clone());
            to.kind.push(wait.kind.as_str().to_owned());
            to.attempt.push(i32::try_from(wait.attempt).unwrap_or(i32::MAX));
            to.round.push(wait.round);
            to.answer.push(wait.answer.clone());
            to.after.push(match wait.due {
                Some(Due::After(duration)) => Some(duration.as_secs_f64()),
                _ => None,
            });
            to.at.push(match wait.due {
                Some(Due::At(at)) => Some(at),
                _ => None,
            });
            to.name.push(wait.name.clone());
            to.data.push(wait.data.clone());
        }
    }
}
