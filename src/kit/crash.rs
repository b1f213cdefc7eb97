//! A case again and again, each time with the engine dropped at another commit: what comes of it must be the same.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};

use super::Case;
use super::compare::{Difference, differences};
use super::play::{Played, Way, Wrap, play};
use super::world::CrashPoint;

/// The most commits of a case that is run with crashes: it is run twice for each.
const MAX_COMMITS: usize = 2_000;
/// Crashes that are told of; the others would say the same.
const MAX_TOLD: usize = 3;

/// What the crashes of a case came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Crashes {
    /// Commits of the undisturbed run.
    pub commits: usize,
    /// Runs with a crash.
    pub runs: usize,
    /// Attempts whose outcome was unknown and that were sent again because the kit said so in a person's place.
    pub retried: usize,
    /// Runs that ended otherwise because the graph says so of unknown outcomes (`effects: fail`).
    pub declared: usize,
}

/// Runs the case once for each side of each commit.
pub(super) async fn everywhere(
    case: &Case,
    undisturbed: &Played,
    wrap: Option<&Wrap>,
) -> (Crashes, Vec<Difference>) {
    let commits = undisturbed.commits.len();
    let mut crashes = Crashes { commits, ..Crashes::default() };
    let mut found = Vec::new();
    if commits > MAX_COMMITS {
        let at = format!(
            "the case makes {commits} commits; with --crash-everywhere the limit is {MAX_COMMITS}"
        );
        return (crashes, vec![Difference { at, expected: None, found: None }]);
    }
    let before = Arc::new(undisturbed.assigned.clone());
    let mut told = 0;
    for (commit, stored) in (1..=commits).flat_map(|commit| [(commit, false), (commit, true)]) {
        let crash = Some(CrashPoint { commit, stored });
        let way = Way { crash, before: Some(Arc::clone(&before)), wrap };
        let played = Box::pin(play(case, way)).await;
        crashes.runs += 1;
        crashes.retried += played.retried;
        let differs = compare(undisturbed, &played);
        if differs.is_empty() {
            continue;
        }
        if played.left_unknown > 0 && played.problems.is_empty() {
            crashes.declared += 1;
            continue;
        }
        let side = if stored { "right after" } else { "right before" };
        let place = format!(
            "the engine was dropped {side} commit {commit} of {commits} ({})",
            undisturbed.commits.get(commit - 1).map_or("", String::as_str)
        );
        found.extend(differs.into_iter().map(|mut one| {
            one.at = format!("{place}: {}", one.at);
            one
        }));
        told += 1;
        if told == MAX_TOLD {
            break;
        }
    }
    (crashes, found)
}

/// What a disturbed run may not change.
fn compare(undisturbed: &Played, played: &Played) -> Vec<Difference> {
    let mut found = played.problems.clone();
    if !found.is_empty() {
        return found;
    }
    let end = |played: &Played| {
        json!({
            "status": played.status.map(super::cases::Status::as_str),
            "error": played.failure.as_ref().map(|failure| &failure.kind),
            "questions": played.questions,
        })
    };
    found.extend(differences("end", &end(undisturbed), &end(played), false));
    found.extend(differences("output", &undisturbed.output, &played.output, false));
    found.extend(differences("state", &undisturbed.state, &played.state, false));
    let steps = |played: &Played| -> Value {
        let step = |((namespace, seq), next): (&(String, i64), &String)| {
            (format!("{namespace}#{seq}"), Value::from(next.as_str()))
        };
        Value::Object(played.supersteps.iter().map(step).collect())
    };
    found.extend(differences("supersteps", &steps(undisturbed), &steps(played), false));
    found.extend(differences("calls", &calls(undisturbed), &calls(played), false));
    found
}

/// The attempts that were made; how often each was sent is the ledger's to judge.
fn calls(played: &Played) -> Value {
    let mut all: BTreeMap<String, String> = BTreeMap::new();
    for done in &played.performed {
        all.insert(done.key.clone(), format!("{} -> {}", done.node, done.target));
    }
    json!(all)
}
