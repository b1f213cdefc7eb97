//! What was really stored, written down beside the store: so that a store that loses something is found out.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use crate::graph::checkpoint::{Commit, EffectChange, EffectStatus, WaitKind};
use crate::ids::TaskId;

/// Names an attempt to the world, as [`crate::graph::exec::Activation::idempotency_key`] does.
pub(super) fn key_of(task: TaskId, attempt: u32) -> String {
    format!("{task}-{attempt}")
}

/// What is known of an effect.
#[derive(Debug)]
struct Known {
    status: EffectStatus,
    commit: usize,
    /// How many outcomes of calls were stored.
    outcomes: usize,
    /// Whether it was called and nothing of that is stored.
    called: bool,
}

/// What the commits of a case have stored.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// In words, one for each commit.
    pub(super) commits: Vec<String>,
    /// By namespace and seq: what runs next.
    pub(super) supersteps: BTreeMap<(String, i64), String>,
    /// Effects that were under way when the process died.
    pub(super) in_flight: BTreeSet<String>,
    /// Of these, what the graph has left unknown.
    pub(super) left_unknown: BTreeSet<String>,
    effects: BTreeMap<String, Known>,
    tasks: BTreeMap<Uuid, usize>,
    planned: BTreeMap<(String, i64), usize>,
    jobs: BTreeMap<String, usize>,
}

impl Ledger {
    /// Writes a commit down that was stored; gives what is wrong with it.
    pub(super) fn stored(&mut self, commit: &Commit) -> Option<String> {
        let at = self.commits.len() + 1;
        self.commits.push(describe(commit));
        let mut wrong = None;
        for (task, _) in &commit.writes {
            self.tasks.insert(task.0, at);
        }
        for wait in commit.waits.iter().filter(|wait| wait.kind == WaitKind::Job) {
            self.jobs.insert(key_of(wait.task, wait.attempt), at);
        }
        for row in &commit.effects {
            let key = key_of(row.task, row.attempt);
            let known = self.effects.entry(key.clone()).or_insert(Known {
                status: EffectStatus::Intent,
                commit: at,
                outcomes: 0,
                called: false,
            });
            known.commit = at;
            match &row.change {
                EffectChange::Intent { .. } => known.status = EffectStatus::Intent,
                EffectChange::Outcome { status, .. } => {
                    known.status = *status;
                    if known.called {
                        known.called = false;
                        known.outcomes += 1;
                    } else if *status == EffectStatus::Unknown && self.in_flight.contains(&key) {
                        self.left_unknown.insert(key);
                    }
                }
            }
        }
        if let Some(row) = &commit.checkpoint {
            let place = (commit.namespace.clone(), row.position.seq);
            if self.supersteps.insert(place.clone(), row.next.clone()).is_some() {
                wrong = Some(format!(
                    "superstep {} of {} was stored again by commit {at}: it ran twice",
                    place.1,
                    named(&place.0),
                ));
            }
            // The first checkpoint of a called graph completes nothing.
            if commit.namespace.is_empty() || row.position.seq > 0 {
                self.planned.insert((commit.namespace.clone(), commit.planned.seq), at);
            }
        }
        wrong
    }

    /// The process has died: what was called and not stored is lost.
    pub(super) fn crashed(&mut self) {
        for (key, known) in &mut self.effects {
            known.called = false;
            if known.status == EffectStatus::Intent {
                self.in_flight.insert(key.clone());
            }
        }
    }

    /// The commit that had stored the result of an attempt already, if one had.
    pub(super) fn done(
        &self,
        key: &str,
        task: TaskId,
        namespace: &str,
        planned: i64,
    ) -> Option<usize> {
        let effect = self
            .effects
            .get(key)
            .filter(|known| matches!(known.status, EffectStatus::Done | EffectStatus::Failed));
        effect
            .map(|known| known.commit)
            .or_else(|| self.tasks.get(&task.0).copied())
            .or_else(|| self.planned.get(&(namespace.to_owned(), planned)).copied())
            .or_else(|| self.jobs.get(key).copied())
    }

    /// Which call of the attempt this one is, as far as outcomes were stored; from 0.
    pub(super) fn called(&mut self, key: &str) -> usize {
        self.effects.get_mut(key).map_or(0, |known| {
            known.called = true;
            known.outcomes
        })
    }
}

/// A namespace in the words of a report.
fn named(namespace: &str) -> String {
    if namespace.is_empty() {
        return "the graph".to_owned();
    }
    let parts =
        namespace.split('|').map(|part| part.split_once(':').map_or(part, |(name, _)| name));
    format!("`{}`", parts.collect::<Vec<_>>().join("/"))
}

/// What a commit stores, in words.
pub(super) fn describe(commit: &Commit) -> String {
    let inside = match commit.namespace.as_str() {
        "" => String::new(),
        namespace => format!(" in {}", named(namespace)),
    };
    if let Some(row) = &commit.checkpoint {
        let next = if row.next.is_empty() { "the end" } else { &row.next };
        return match row.position.seq {
            0 => format!("the input{inside}, next {next}"),
            seq => format!("superstep {seq}{inside}, next {next}"),
        };
    }
    let intent = commit.effects.iter().find_map(|row| match &row.change {
        EffectChange::Intent { node, target, .. } => Some((node, target)),
        EffectChange::Outcome { .. } => None,
    });
    if let Some((node, target)) = intent {
        return format!("`{node}`{inside} is about to call {target}");
    }
    if let Some(wait) = commit.waits.first() {
        return format!("`{}`{inside} waits ({})", wait.node, wait.kind.as_str());
    }
    format!("{} results{inside}", commit.writes.len())
}
