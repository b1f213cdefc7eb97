//! Sixty-four runs at once, as their users see them: started, answered, watched to their end.
//!
//! A server may die or be away at any time. A request whose answer was lost is asked about, never
//! repeated blindly: so that what the server said it accepted is known, and must end right.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures::future::join_all;
use reqwest::StatusCode;
use serde_json::json;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::client::{CallError, Client};
use super::graphs;
use super::server::{PATIENCE, Server, Site};
use super::traces;

/// Runs under way at once.
pub(crate) const RUNS: usize = 64;
/// Between two looks at all of them.
const LOOK: Duration = Duration::from_millis(20);

/// A run that a user wants done.
#[derive(Debug, Clone)]
struct Wanted {
    thread: String,
    graph: &'static str,
    /// Whether the server said that it has the run.
    accepted: bool,
}

/// What happened so far.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) ended: u32,
    /// Runs that nobody heard of being accepted, and that were there after all.
    pub(crate) found: u32,
    /// Runs that several servers in a row died with: a person was asked.
    pub(crate) suspected: u32,
}

/// Runs under way, and what became of those before them.
#[derive(Debug)]
pub(crate) struct Load {
    runs: Vec<Wanted>,
    pub(crate) tally: Tally,
}

/// The graph files that a load needs.
pub(crate) const GRAPHS: [(&str, &str); 4] = [
    ("crash", graphs::CRASH),
    ("crash-below", graphs::BELOW),
    ("loop", graphs::LOOP),
    ("fan", graphs::FAN),
];

fn wanted(number: u64) -> Wanted {
    let graph = ["crash", "loop", "fan", "loop"][usize::try_from(number % 4).unwrap()];
    Wanted { thread: Uuid::now_v7().to_string(), graph, accepted: false }
}

/// The threads' statuses as stored, which costs the server nothing.
async fn statuses(db: &mut PgConnection) -> HashMap<String, String> {
    let rows =
        sqlx::query("select thread_id::text, status from threads").fetch_all(db).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

/// Starts what is not accepted yet. A request whose answer was lost is asked about, not repeated blindly.
async fn start(
    client: &Client,
    run: &mut Wanted,
    known: bool,
    tally: &mut u32,
) -> Result<(), CallError> {
    if !known {
        client.ensure_thread(&run.thread).await?;
    } else if !client.runs(&run.thread).await?.is_empty() {
        *tally += 1;
        run.accepted = true;
        return Ok(());
    }
    client.start_run(&run.thread, run.graph, json!({ "input": graphs::input(run.graph) })).await?;
    run.accepted = true;
    Ok(())
}

/// What the server has to be asked about one run: its start, its answers, its end. True: it has ended.
async fn attend(
    client: &Client,
    site: &Site,
    run: &mut Wanted,
    status: Option<&str>,
    tally: &mut (u32, u32),
) -> Result<bool, CallError> {
    if !run.accepted {
        start(client, run, status.is_some(), &mut tally.0).await?;
        return Ok(false);
    }
    match status {
        Some("busy") => Ok(false),
        Some("idle") => {
            let thread = client.thread(&run.thread).await?;
            if thread["status"] != "idle" {
                return Ok(false);
            }
            assert_eq!(thread["values"], graphs::expected(run.graph), "{run:?}");
            Ok(true)
        }
        Some("interrupted") => {
            let thread = client.thread(&run.thread).await?;
            if thread["status"] != "interrupted" {
                return Ok(false);
            }
            if thread["interrupts"].to_string().contains("process_died") {
                tally.1 += 1;
            }
            let resume = graphs::answers(&thread["interrupts"], &site.traces());
            match client
                .start_run(&run.thread, run.graph, json!({ "command": { "resume": resume } }))
                .await
            {
                // Answered by the request before, whose answer was lost.
                Err(CallError::Refused(StatusCode::CONFLICT, _)) => Ok(false),
                result => result.map(|_| false),
            }
        }
        // The thread's row was seen when the run was accepted: it cannot be gone.
        other => panic!("an accepted run is lost or failed: {run:?} is {other:?}"),
    }
}

impl Load {
    /// Runs to be started by the first look.
    pub(crate) fn new() -> Self {
        Self { runs: (0..RUNS as u64).map(wanted).collect(), tally: Tally::default() }
    }

    /// One look at all runs. Those that ended are replaced while there are to be `more`.
    pub(crate) async fn look(
        &mut self,
        client: &Client,
        site: &Site,
        db: &mut PgConnection,
        more: bool,
    ) {
        let statuses = statuses(db).await;
        let looks = self.runs.iter_mut().map(|run| {
            let status = statuses.get(&run.thread).cloned();
            async move {
                let mut counts = (0, 0);
                let result = attend(client, site, run, status.as_deref(), &mut counts).await;
                (result, counts)
            }
        });
        let results = join_all(looks).await;
        let mut ended = Vec::new();
        for (at, (result, (found, suspected))) in results.into_iter().enumerate() {
            self.tally.found += found;
            self.tally.suspected += suspected;
            match result {
                Ok(true) => ended.push(at),
                Ok(false) | Err(CallError::Lost(_)) => {}
                // The database was away: what became of the request is not known either.
                Err(CallError::Refused(status, _)) if status.is_server_error() => {}
                Err(err) => panic!("the server refuses: {err:?}"),
            }
        }
        for at in ended.into_iter().rev() {
            self.tally.ended += 1;
            if more {
                self.runs[at] = wanted(u64::from(self.tally.ended) + at as u64);
            } else {
                self.runs.swap_remove(at);
            }
        }
    }

    /// Keeps the runs under way until the file has `lines` more lines.
    pub(crate) async fn progress(
        &mut self,
        server: &Server,
        site: &Site,
        db: &mut PgConnection,
        lines: usize,
    ) {
        let client = server.client();
        let target = traces::read(&site.traces()).len() + lines;
        let begun = Instant::now();
        while traces::read(&site.traces()).len() < target {
            self.look(&client, site, db, true).await;
            assert!(begun.elapsed() < PATIENCE, "no progress:\n{}", server.log_tail());
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Lets every run come to its end; nothing is left in the tables of what moves runs.
    pub(crate) async fn finish(&mut self, server: &Server, site: &Site, db: &mut PgConnection) {
        let client = server.client();
        let begun = Instant::now();
        while !self.runs.is_empty() {
            self.look(&client, site, db, false).await;
            let left = &self.runs;
            assert!(
                begun.elapsed() < PATIENCE * 2,
                "these runs do not end: {left:?}\n{}",
                server.log_tail()
            );
            tokio::time::sleep(LOOK).await;
        }
        let left: i64 = sqlx::query_scalar(
            "select (select count(*) from heads) + (select count(*) from queue)",
        )
        .fetch_one(db)
        .await
        .unwrap();
        assert_eq!(left, 0, "every run has ended");
    }
}
