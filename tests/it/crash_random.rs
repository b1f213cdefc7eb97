//! Servers are killed at random moments under load, and every run that was accepted ends right.
//!
//! Sixty-four runs are under way at any time. Each kill comes after some progress, at a moment drawn
//! from a seed that is printed and can be given again as `CYNAI_CRASH_SEED`. After each kill the tables
//! are read while no server lives: nothing that was committed then may run again later.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures::future::join_all;
use reqwest::StatusCode;
use serde_json::json;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use crate::support::client::{CallError, Client};
use crate::support::graphs;
use crate::support::server::{PATIENCE, Server, Site, Start};
use crate::support::traces::{self, Committed};

/// Runs under way at once.
const RUNS: usize = 64;

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
struct Tally {
    kills: u32,
    ended: u32,
    /// Runs that nobody heard of being accepted, and that were there after all.
    found: u32,
    /// Runs that several servers in a row died with: a person was asked.
    suspected: u32,
}

/// Numbers that look random and come again with the same seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % sides
    }
}

#[expect(clippy::disallowed_methods, reason = "what a person sets for a test")]
fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn wanted(number: u64) -> Wanted {
    let graph = ["crash", "loop", "fan", "loop"][usize::try_from(number % 4).unwrap()];
    Wanted { thread: Uuid::now_v7().to_string(), graph, accepted: false }
}

/// The threads' statuses as stored, which costs the server nothing.
async fn statuses(db: &mut PgConnection) -> HashMap<String, String> {
    let rows = sqlx::query("select thread_id::text, status from threads").fetch_all(db).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

/// Starts what is not accepted yet. A request whose answer was lost is asked about, not repeated blindly.
async fn start(client: &Client, run: &mut Wanted, known: bool, tally: &mut u32) -> Result<(), CallError> {
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
            match client.start_run(&run.thread, run.graph, json!({ "command": { "resume": resume } })).await {
                // Answered by the request before, whose answer was lost.
                Err(CallError::Refused(StatusCode::CONFLICT, _)) => Ok(false),
                result => result.map(|_| false),
            }
        }
        // The thread's row was seen when the run was accepted: it cannot be gone.
        other => panic!("an accepted run is lost or failed: {run:?} is {other:?}"),
    }
}

/// One look at all runs. Those that ended are replaced while `more`.
async fn look(
    server: &mut Server,
    site: &Site,
    db: &mut PgConnection,
    runs: &mut Vec<Wanted>,
    tally: &mut Tally,
    more: bool,
) {
    let statuses = statuses(db).await;
    let client = server.client();
    let looks = runs.iter_mut().map(|run| {
        let status = statuses.get(&run.thread).cloned();
        let client = client.clone();
        async move {
            let mut counts = (0, 0);
            let result = attend(&client, site, run, status.as_deref(), &mut counts).await;
            (result, counts)
        }
    });
    let results = join_all(looks).await;
    let mut ended = Vec::new();
    for (at, (result, (found, suspected))) in results.into_iter().enumerate() {
        tally.found += found;
        tally.suspected += suspected;
        match result {
            Ok(true) => ended.push(at),
            Ok(false) | Err(CallError::Lost(_)) => {}
            Err(err) => panic!("the server refuses: {err:?}"),
        }
    }
    for at in ended.into_iter().rev() {
        tally.ended += 1;
        if more {
            runs[at] = wanted(u64::from(tally.ended) + at as u64);
        } else {
            runs.swap_remove(at);
        }
    }
}

/// Works until there are `target` more lines, then a little longer, and kills the server.
async fn work_and_kill(
    mut server: Server,
    site: &Site,
    db: &mut PgConnection,
    runs: &mut Vec<Wanted>,
    tally: &mut Tally,
    dice: &mut Dice,
) {
    let target = traces::read(&site.traces()).len() + 5 + usize::try_from(dice.roll(120)).unwrap();
    let begun = Instant::now();
    while traces::read(&site.traces()).len() < target {
        look(&mut server, site, db, runs, tally, true).await;
        assert!(begun.elapsed() < PATIENCE, "no progress:\n{}", server.log_tail());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // So that the moment is not always the end of a look.
    tokio::time::sleep(Duration::from_micros(dice.roll(20_000))).await;
    server.kill();
    tally.kills += 1;
}

async fn kill_at_random(kills: u32) {
    let seed = setting("CYNAI_CRASH_SEED").unwrap_or_else(|| u64::try_from(Uuid::now_v7().as_u128() >> 64).unwrap());
    let limit = setting("CYNAI_CRASH_SECONDS").filter(|seconds| *seconds > 0).map(Duration::from_secs);
    println!("seed: CYNAI_CRASH_SEED={seed}");
    let mut dice = Dice(seed);
    let sources =
        [("crash", graphs::CRASH), ("crash-below", graphs::BELOW), ("loop", graphs::LOOP), ("fan", graphs::FAN)];
    let site = Site::new(&sources).with_flags(&["--no-local-worker", "--lease", "30s"]);
    let begun = Instant::now();
    let mut tally = Tally::default();
    let mut runs: Vec<Wanted> = (0..RUNS as u64).map(wanted).collect();
    let mut server = site.start(&Start::default()).await;
    let mut db = site.database().await;
    let mut before: Option<Committed> = None;
    while tally.kills < kills && limit.is_none_or(|limit| begun.elapsed() < limit) {
        work_and_kill(server, &site, &mut db, &mut runs, &mut tally, &mut dice).await;
        let now = Committed::read(&mut db, &site.traces()).await;
        if let Some(before) = before.replace(now) {
            before.check(&mut db, &site.traces()).await;
        }
        server = site.start(&Start::default()).await;
    }
    let ending = Instant::now();
    while !runs.is_empty() {
        look(&mut server, &site, &mut db, &mut runs, &mut tally, false).await;
        assert!(ending.elapsed() < PATIENCE * 2, "these runs do not end: {runs:?}\n{}", server.log_tail());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    before.expect("there was a kill").check(&mut db, &site.traces()).await;
    let left: i64 = sqlx::query_scalar("select (select count(*) from heads) + (select count(*) from queue)")
        .fetch_one(&mut db)
        .await
        .unwrap();
    assert_eq!(left, 0, "every run has ended");
    println!("{tally:?} of {kills} kills in {:.1?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crash_random_20() {
    kill_at_random(20).await;
}

/// Honours `CYNAI_CRASH_SECONDS`: then it may stop before it has made all its kills, and says how many.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crash_long_random_200() {
    kill_at_random(200).await;
}
