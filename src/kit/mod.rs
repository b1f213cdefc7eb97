//! Tests of graphs: cases beside a graph file, run on the engine with answers from a script.
//!
//! No server, no database, no network and no worker takes part. Time passes at once: a wait, a retry or a question
//! that expires moves the clock of the case to the next instant at which something happens.
//!
//! **Invariant:** a case is a function of its files: it gives the same result each time and everywhere.

pub mod cases;
mod compare;
mod crash;
mod files;
mod judge;
mod ledger;
mod nodes;
mod play;
mod script;
#[cfg(test)]
mod tests;
mod tools;
mod world;

use std::sync::Arc;

use serde::Serialize;

pub use compare::Difference;
pub use crash::Crashes;
pub use files::{KitError, Loaded, Suite, load};
pub use play::Wrap;

use self::cases::CaseDef;
use self::script::Script;
use crate::graph::model::Graph;

/// A case that can run.
#[derive(Debug)]
pub struct Case {
    /// As written.
    pub def: CaseDef,
    /// The graph that runs.
    pub graph: Arc<Graph>,
    script: Arc<Script>,
}

/// What came of a case.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// The case's name.
    pub name: String,
    /// The graph's name.
    pub graph: String,
    /// What is not as it should be; empty when the case holds.
    pub differences: Vec<Difference>,
    /// What the crashes came to, when there were some.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crashes: Option<Crashes>,
}

impl Verdict {
    /// Whether the case holds.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.differences.is_empty()
    }
}

/// Runs a case; with `crash_everywhere` once more for each side of each of its commits, where the undisturbed run
/// holds. `wrap` stands between the engine and the store of each process.
pub async fn run(case: &Case, crash_everywhere: bool, wrap: Option<&Wrap>) -> Verdict {
    let way = play::Way { crash: None, before: None, wrap };
    let played = Box::pin(play::play(case, way)).await;
    let mut differences = judge::judge(&case.def.expect, &played);
    let mut crashes = None;
    if crash_everywhere && differences.is_empty() {
        let (made, found) = Box::pin(crash::everywhere(case, &played, wrap)).await;
        crashes = Some(made);
        differences = found;
    }
    Verdict { name: case.def.name.clone(), graph: case.graph.name.clone(), differences, crashes }
}
