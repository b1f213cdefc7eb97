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
use crate::support::server::{PATIENCE, Server, Site, Start};
use crate::support::traces::{self, Committed};

/// Sites that work side by side.
const LANES: usize = 3;

const GRAPH: &str = r#"
name: crash
state:
  numbers: { type: array, items: { type: integer } }
  seen: { type: array, reduce: append }
  total: { type: integer, reduce: sum, default: 0 }
  below: { type: array, reduce: append }
  steps: { type: array, reduce: append }
  approved: { type: boolean }
input: [numbers]
limits: { duration: 10m }
nodes:
  fan:
    for_each: ${state.numbers}
    as: n
    max_parallel: 3
    use: test/append
    with: { file: "${env.TRACES}", label: "${n}", sleep_ms: "${n * 3}", output: "${n * 10}" }
    set: { total: "${output}", seen: "${[n]}" }
  below:
    for_each: "${['a', 'b']}"
    as: part
    graph: { name: crash-below, input: { part: "${part}" } }
    set: { below: "${[output.result]}" }
  flaky:
    use: test/append
    with: { file: "${env.TRACES}", fail_first: 2, output: flaky }
    retry: { attempts: 3, first: 20ms, factor: 1, jitter: false }
    set: { steps: "${[output]}" }
  nap:
    wait: { for: 30ms }
  act:
    use: test/append
    effect: effectful
    with: { file: "${env.TRACES}", sleep_ms: 5, output: acted }
    set: { steps: "${[output]}" }
  ask:
    interrupt: { ask: "${state.total} in all: go on?", schema: { type: boolean } }
    set: { approved: "${output}" }
  last:
    use: test/append
    effect: pure
    with: { file: "${env.TRACES}", output: last }
    set: { steps: "${[output]}" }
edges:
  - start -> fan -> below -> flaky -> nap -> act -> ask -> last -> end
"#;

const BELOW: &str = r#"
name: crash-below
state:
  part: { type: string }
  allowed: { type: boolean }
  result: { type: string }
input: [part]
output: [result]
nodes:
  first:
    use: test/append
    with: { file: "${env.TRACES}", label: "${state.part}" }
  allow:
    interrupt: { ask: "may ${state.part} go on?" }
    set: { allowed: "${output}" }
  second:
    use: test/append
    effect: pure
    with: { file: "${env.TRACES}", label: "${state.part}" }
    set: { result: "${state.part + '!'}" }
edges:
  - start -> first -> allow -> second -> end
"#;

fn expected() -> Value {
    json!({
        "numbers": [1, 2, 3, 4, 5],
        "seen": [1, 2, 3, 4, 5],
        "total": 150,
        "below": ["a!", "b!"],
        "steps": ["flaky", "acted", "last"],
        "approved": true,
    })
}

fn site() -> Site {
    // The lease is long: a run that is free again soon was freed by the restart.
    Site::new(&[("crash", GRAPH), ("crash-below", BELOW)]).with_flags(&["--no-local-worker", "--lease", "60s"])
}

/// The user: starts the run, answers its questions, reads its end. `None`: the server died.
async fn drive(server: &mut Server, traces: &Path, thread: &str) -> Option<Value> {
    let client = server.client();
    let deadline = Instant::now() + PATIENCE;
    loop {
        match look(&client, traces, thread).await {
            Ok(Some(values)) => return Some(values),
            Ok(None) => {}
            Err(CallError::Lost(_)) if server.has_ended() => return None,
            Err(CallError::Lost(_)) => {}
            Err(err) => panic!("the server refuses: {err:?}"),
        }
        assert!(Instant::now() < deadline, "thread {thread} does not come to an end:\n{}", server.log_tail());
        tokio::time::sleep(Duration::from_millis(4)).await;
    }
}

async fn look(client: &Client, traces: &Path, thread: &str) -> Result<Option<Value>, CallError> {
    let runs = match client.runs(thread).await {
        // It is made once: looking writes nothing.
        Err(CallError::Refused(StatusCode::NOT_FOUND, _)) => {
            client.ensure_thread(thread).await?;
            Vec::new()
        }
        runs => runs?,
    };
    if runs.is_empty() {
        client.start_run(thread, "crash", json!({ "input": { "numbers": [1, 2, 3, 4, 5] } })).await?;
    }
    let found = client.thread(thread).await?;
    match found["status"].as_str() {
        Some("idle") => Ok(Some(found["values"].clone())),
        Some("interrupted") => {
            let answers = answers(&found["interrupts"], traces);
            client.start_run(thread, "crash", json!({ "command": { "resume": answers } })).await?;
            Ok(None)
        }
        Some("busy") => Ok(None),
        _ => panic!("the thread is not as it should be: {found}"),
    }
}

/// An answer to each question, by its id.
fn answers(interrupts: &Value, traces: &Path) -> Value {
    let mut answers = serde_json::Map::new();
    for (task, questions) in interrupts.as_object().unwrap() {
        for question in questions.as_array().unwrap() {
            let answer = match question["value"]["reason"].as_str() {
                // Nobody but us knows whether the attempt acted: the file tells.
                Some("unknown_outcome") if traces::read(traces).iter().any(|line| line.task == *task) => {
                    json!({ "action": "done", "output": "acted" })
                }
                Some("unknown_outcome") => json!({ "action": "retry" }),
                Some(other) => panic!("an unexpected question: {other}: {question}"),
                None => json!(true),
            };
            answers.insert(question["id"].as_str().unwrap().to_owned(), answer);
        }
    }
    assert!(!answers.is_empty(), "the thread waits for nobody: {interrupts}");
    Value::Object(answers)
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
async fn check_end(site: &Site, thread: &str, values: &Value, chain_of_undisturbed: Option<&[String]>) {
    assert_eq!(*values, expected());
    let mut db = site.database().await;
    if let Some(undisturbed) = chain_of_undisturbed {
        assert_eq!(chain(&mut db, thread).await, undisturbed);
    }
    let lines = traces::read(&site.traces());
    let of = |node: &str| lines.iter().filter(|line| line.thread == thread && line.node == node).collect::<Vec<_>>();
    assert_eq!(of("act").len(), 1, "what acts on the world acted once");
    let attempts: BTreeSet<i32> = of("flaky").iter().map(|line| line.attempt).collect();
    assert_eq!(attempts, BTreeSet::from([1, 2, 3]));
    let open: Vec<String> = sqlx::query_scalar(
        "select 'head ' || status from heads where thread_id = $1::uuid
         union all select 'queued ' || state from queue where thread_id = $1::uuid
         union all select 'run ' || status from runs where thread_id = $1::uuid and status <> 'success'
         union all select 'pending ' || kind || ' of ' || node from pending where thread_id = $1::uuid and not settled",
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
    let text: String =
        sqlx::query_scalar("select pg_snapshot_xmax(pg_current_snapshot())::text").fetch_one(db).await.unwrap();
    text.parse().unwrap()
}

fn points(log: &Path, when: &str) -> u64 {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let count = text.lines().filter(|line| line.contains(when)).count();
    u64::try_from(count).unwrap()
}

async fn undisturbed(site: &Site) -> Undisturbed {
    let log = site.path("points");
    let mut server = site.start(&Start { crash_log: Some(log.clone()), ..Start::default() }).await;
    let mut db = site.database().await;
    let before = points(&log, " after ");
    let begun = transactions(&mut db).await;
    let thread = Uuid::now_v7().to_string();
    let values = drive(&mut server, &site.traces(), &thread).await.expect("nobody kills it");
    let ended = transactions(&mut db).await;
    let passed = points(&log, " after ") - before;
    let transactions = u64::try_from(ended - begun).unwrap();
    check_end(site, &thread, &values, None).await;
    assert!(transactions > 30, "PostgreSQL counts only {transactions} transactions");
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
async fn kill_at(site: &Site, point: u64, chain: &[String]) -> bool {
    let thread = Uuid::now_v7().to_string();
    let mut first = site.launch(&Start { crash_at: Some(point), ..Start::default() });
    let mut values = None;
    if first.ready().await {
        values = drive(&mut first, &site.traces(), &thread).await;
    }
    let reached = first.has_ended();
    first.kill();
    let mut db = site.database().await;
    let committed = Committed::read(&mut db, &site.traces()).await;
    if values.is_none() {
        let mut second = site.start(&Start::default()).await;
        values = drive(&mut second, &site.traces(), &thread).await;
        second.kill();
    }
    committed.check(&site.traces());
    check_end(site, &thread, &values.expect("nobody kills the second server"), Some(chain)).await;
    reached
}

/// Kills at every `every`th point, in several sites side by side.
async fn pass(every: u64) {
    let begun = Instant::now();
    let first = site();
    let undisturbed = undisturbed(&first).await;
    let wanted: Vec<u64> = (1..=undisturbed.points).filter(|point| point % every == 0).collect();
    let mut lanes = Vec::new();
    let mut sites = Some(first);
    for lane in 0..LANES {
        let site = sites.take().unwrap_or_else(self::site);
        let mine: Vec<u64> = wanted.iter().copied().skip(lane).step_by(LANES).collect();
        let chain = undisturbed.chain.clone();
        lanes.push(async move {
            let mut reached = 0_u64;
            if lane > 0 {
                // Makes the database, so that the first kill is not in the making of it.
                site.start(&Start::default()).await.kill();
            }
            for point in mine {
                reached += u64::from(kill_at(&site, point, &chain).await);
            }
            reached
        });
    }
    let killed: u64 = join_all(lanes).await.into_iter().sum();
    println!(
        "killed at {killed} of {} crash points (every {every}.) around {} transactions in {:.1?}",
        undisturbed.points,
        undisturbed.transactions,
        begun.elapsed()
    );
    // The last few of a run may come in another order, or together.
    let least = undisturbed.transactions * 2 * 9 / 10 / every;
    assert!(killed >= least, "{killed} kills are fewer than the run has commits: at least {least} were needed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_killed_around_every_commit_loses_and_repeats_nothing() {
    pass(1).await;
}
