//! A server is killed before and after every COMMIT of a run, and the run ends as if it had not been.
//!
//! One run goes undisturbed and tells how many crash points it passes. Then, for each of them, a server
//! is started that is killed there; another one takes over, and the run must come to the same end, with
//! the same checkpoints, and without running anything again whose result was committed.
//!
//! That the points cover every COMMIT is not taken from the points: PostgreSQL counts the transactions
//! that write.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use futures::future::join_all;
use reqwest::StatusCode;
use serde_json::{Value, json};
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use crate::support::client::{CallError, Client};
use crate::support::graphs;
use crate::support::server::{PATIENCE, Server, Site, Start};
use crate::support::traces::{self, Committed};

/// Sites that work side by side.
const LANES: usize = 3;

const JOBS: &str = r#"
name: crash-jobs
state:
  numbers: { type: array, items: { type: integer } }
  total: { type: integer, reduce: sum, default: 0 }
input: [numbers]
nodes:
  count:
    for_each: ${state.numbers}
    as: n
    max_parallel: 2
    job: { command: [cat], stdin: "${string(n)}" }
    timeout: 30s
    retry: { attempts: 2, first: 20ms }
    set: { total: "${int(output.stdout.trim())}" }
edges:
  - start -> count -> end
"#;

/// A run to be killed.
#[derive(Debug, Clone, Copy)]
struct Scenario {
    graph: &'static str,
    flags: &'static [&'static str],
    /// PostgreSQL must count at least so many transactions, or the scenario is not what it was.
    transactions: u64,
}

// The leases are long: a run that is free again soon was freed by the restart.
const EVERYTHING: Scenario =
    Scenario { graph: "crash", flags: &["--no-local-worker", "--lease", "60s"], transactions: 36 };
const WITH_JOBS: Scenario =
    Scenario { graph: "crash-jobs", flags: &["--lease", "60s"], transactions: 12 };

impl Scenario {
    fn site(self) -> Site {
        Site::new(&[("crash", graphs::CRASH), ("crash-below", graphs::BELOW), ("crash-jobs", JOBS)])
            .with_flags(self.flags)
    }

    fn input(self) -> Value {
        match self.graph {
            "crash-jobs" => json!({ "numbers": [1, 2, 3] }),
            graph => graphs::input(graph),
        }
    }

    fn expected(self) -> Value {
        match self.graph {
            "crash" => graphs::expected("crash"),
            _ => json!({ "numbers": [1, 2, 3], "total": 6 }),
        }
    }
}

/// The user: starts the run, answers its questions, reads its end. `None`: the server died.
async fn drive(
    scenario: Scenario,
    server: &mut Server,
    traces: &Path,
    thread: &str,
) -> Option<Value> {
    let client = server.client();
    let deadline = Instant::now() + PATIENCE;
    loop {
        match look(scenario, &client, traces, thread).await {
            Ok(Some(values)) => return Some(values),
            Ok(None) => {}
            Err(CallError::Lost(_)) if server.has_ended() => return None,
            Err(CallError::Lost(_)) => {}
            Err(err) => panic!("the server refuses: {err:?}"),
        }
        assert!(
            Instant::now() < deadline,
            "thread {thread} does not come to an end:\n{}",
            server.log_tail()
        );
        tokio::time::sleep(Duration::from_millis(4)).await;
    }
}

async fn look(
    scenario: Scenario,
    client: &Client,
    traces: &Path,
    thread: &str,
) -> Result<Option<Value>, CallError> {
    let runs = match client.runs(thread).await {
        // It is made once: looking writes nothing.
        Err(CallError::Refused(StatusCode::NOT_FOUND, _)) => {
            client.ensure_thread(thread).await?;
            Vec::new()
        }
        runs => runs?,
    };
    if runs.is_empty() {
        client.start_run(thread, scenario.graph, json!({ "input": scenario.input() })).await?;
    }
    let found = client.thread(thread).await?;
    match found["status"].as_str() {
        Some("idle") => Ok(Some(found["values"].clone())),
        Some("interrupted") => {
            let answers = graphs::answers(&found["interrupts"], traces);
            client
                .start_run(thread, scenario.graph, json!({ "command": { "resume": answers } }))
                .await?;
            Ok(None)
        }
        Some("busy") => Ok(None),
        _ => panic!("the thread is not as it should be: {found}"),
    }
}

/// The thread's checkpoints, with what differs between threads left out.
async fn chain(db: &mut PgConnection, thread: &str) -> Vec<String> {
    let rows = sqlx::query(
        "select namespace, branch, seq, source, next from checkpoints where thread_id = $1::uuid order by 1, 2, 3",
    )
    .bind(thread)
    .fetch_all(db)
    .await
    .unwrap();
    let mut chain: Vec<String> = rows
        .iter()
        .map(|row| {
            let namespace: String = row.get(0);
            let node = namespace.split(':').next().unwrap_or_default();
            let (branch, seq, source): (i32, i64, i16) = (row.get(1), row.get(2), row.get(3));
            format!("{node} {branch} {seq} {source} {}", row.get::<String, _>(4))
        })
        .collect();
    chain.sort();
    chain
}

/// What a thread must be like when it has come to its end, whatever happened on the way.
async fn check_end(
    scenario: Scenario,
    site: &Site,
    thread: &str,
    values: &Value,
    chain_of_undisturbed: Option<&[String]>,
) {
    assert_eq!(*values, scenario.expected());
    let mut db = site.database().await;
    if let Some(undisturbed) = chain_of_undisturbed {
        assert_eq!(chain(&mut db, thread).await, undisturbed);
    }
    let lines = traces::read(&site.traces());
    let of = |node: &str| {
        lines.iter().filter(|line| line.thread == thread && line.node == node).collect::<Vec<_>>()
    };
    if scenario.graph == EVERYTHING.graph {
        assert_eq!(of("act").len(), 1, "what acts on the world acted once");
        let attempts: BTreeSet<i32> = of("flaky").iter().map(|line| line.attempt).collect();
        assert_eq!(attempts, BTreeSet::from([1, 2]));
        let effects: i64 = sqlx::query_scalar(
            "select count(*) from effects where thread_id = $1::uuid and node = 'act'",
        )
        .bind(thread)
        .fetch_one(&mut db)
        .await
        .unwrap();
        assert_eq!(effects, 1, "what acts is written down once");
    }
    let open: Vec<String> = sqlx::query_scalar(
        "select 'head ' || status from heads where thread_id = $1::uuid
         union all select 'queued ' || state from queue where thread_id = $1::uuid
         union all select 'run ' || status from runs where thread_id = $1::uuid and status <> 'success'
         union all select 'pending ' || kind || ' of ' || node from pending where thread_id = $1::uuid and not settled
         union all select 'effect ' || status || ' of ' || node from effects
                    where thread_id = $1::uuid and status not in ('done', 'failed')",
    )
    .bind(thread)
    .fetch_all(&mut db)
    .await
    .unwrap();
    assert_eq!(open, [""; 0], "something of the thread is left open");
}

/// What the undisturbed run was like.
#[derive(Debug, Clone)]
struct Undisturbed {
    /// Crash points from the server's start to the run's end.
    points: u64,
    /// Transactions that wrote while the run was under way, as PostgreSQL counted them.
    transactions: u64,
    chain: Vec<String>,
}

async fn transactions(db: &mut PgConnection) -> i64 {
    let text: String = sqlx::query_scalar("select pg_snapshot_xmax(pg_current_snapshot())::text")
        .fetch_one(db)
        .await
        .unwrap();
    text.parse().unwrap()
}

fn points(log: &Path, when: &str) -> u64 {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let count = text.lines().filter(|line| line.contains(when)).count();
    u64::try_from(count).unwrap()
}

async fn undisturbed(scenario: Scenario, site: &Site) -> Undisturbed {
    let log = site.path("points");
    let mut server = site.start(&Start { crash_log: Some(log.clone()), ..Start::default() }).await;
    let mut db = site.database().await;
    let before = points(&log, " after ");
    let begun = transactions(&mut db).await;
    let thread = Uuid::now_v7().to_string();
    let values =
        drive(scenario, &mut server, &site.traces(), &thread).await.expect("nobody kills it");
    let ended = transactions(&mut db).await;
    let passed = points(&log, " after ") - before;
    let transactions = u64::try_from(ended - begun).unwrap();
    check_end(scenario, site, &thread, &values, None).await;
    assert!(
        transactions >= scenario.transactions,
        "PostgreSQL counts only {transactions} transactions"
    );
    assert!(
        passed >= transactions,
        "PostgreSQL committed {transactions} transactions, and only {passed} of them have crash points:\n{}",
        std::fs::read_to_string(&log).unwrap()
    );
    let chain = chain(&mut db, &thread).await;
    server.kill();
    Undisturbed { points: points(&log, " "), transactions, chain }
}

/// Kills a server at `point`, and lets another one finish. True: the point was reached.
async fn kill_at(scenario: Scenario, site: &Site, point: u64, chain: &[String]) -> bool {
    let thread = Uuid::now_v7().to_string();
    let mut first = site.launch(&Start { crash_at: Some(point), ..Start::default() });
    let mut values = None;
    if first.ready().await {
        values = drive(scenario, &mut first, &site.traces(), &thread).await;
    }
    let reached = first.has_ended();
    first.kill();
    let mut db = site.database().await;
    let committed = Committed::read(&mut db, &site.traces()).await;
    if values.is_none() {
        let mut second = site.start(&Start::default()).await;
        values = drive(scenario, &mut second, &site.traces(), &thread).await;
        second.kill();
    }
    committed.check(&mut db, &site.traces()).await;
    check_end(
        scenario,
        site,
        &thread,
        &values.expect("nobody kills the second server"),
        Some(chain),
    )
    .await;
    reached
}

/// Which of the points a pass kills at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pass {
    All,
    /// One for each commit: before the first, after the second, before the third.
    Half,
}

/// Kills at the points of a pass, in several sites side by side.
async fn pass(scenario: Scenario, pass: Pass) {
    let begun = Instant::now();
    let first = scenario.site();
    let undisturbed = undisturbed(scenario, &first).await;
    let wanted: Vec<u64> = (1..=undisturbed.points)
        .filter(|point| pass == Pass::All || matches!(point % 4, 0 | 1))
        .collect();
    let mut lanes = Vec::new();
    let mut sites = Some(first);
    for lane in 0..LANES {
        let site = sites.take().unwrap_or_else(|| scenario.site());
        let mine: Vec<u64> = wanted.iter().copied().skip(lane).step_by(LANES).collect();
        let chain = undisturbed.chain.clone();
        lanes.push(async move {
            let mut reached = 0_u64;
            if lane > 0 {
                // Makes the database, so that the first kill is not in the making of it.
                site.start(&Start::default()).await.kill();
            }
            for point in mine {
                reached += u64::from(kill_at(scenario, &site, point, &chain).await);
            }
            reached
        });
    }
    let killed: u64 = join_all(lanes).await.into_iter().sum();
    println!(
        "killed at {killed} of {} crash points around {} transactions in {:.1?}",
        undisturbed.points,
        undisturbed.transactions,
        begun.elapsed()
    );
    // Points that come together in one server may come apart in another, so that a few are not reached.
    let commits = undisturbed.transactions * if pass == Pass::All { 2 } else { 1 };
    assert!(
        killed * 10 >= commits * 9,
        "{killed} kills are fewer than the run has commits: {commits} were needed"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_killed_around_each_commit_loses_and_repeats_nothing() {
    pass(EVERYTHING, Pass::Half).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_killed_around_each_commit_of_a_run_with_jobs_loses_and_repeats_nothing() {
    pass(WITH_JOBS, Pass::Half).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crash_long_points_before_and_after_every_commit() {
    pass(EVERYTHING, Pass::All).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crash_long_points_before_and_after_every_commit_of_a_run_with_jobs() {
    pass(WITH_JOBS, Pass::All).await;
}
