//! The floor: what one durable step costs when nothing stands above it.
//!
//!     cynai-floor DATABASE_URL RUNS STEPS
//!
//! Each of RUNS loops makes STEPS steps; a step writes one row of the size and columns of a no-op
//! checkpoint, and moves one narrow head row under its old seq. A run that is alone sends one statement
//! for each step; several send what is waiting as one multi-row statement, over two connections. That is
//! the least that the engine's guarantees can cost on this machine: no fence, no queue, no engine.
//!
//! Prints one JSON object: seconds, latencies in milliseconds, the mean batch.

#![expect(clippy::print_stdout, reason = "its output is what it prints")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use uuid::Uuid;

const WRITERS: usize = 2;
const MAX_BATCH: usize = 256;
/// What a step of the engine stores beside its keys.
const NEXT: &str = "step_42";
const CHANGED: &[u8] = br#"{"n":42}"#;

const SCHEMA: [&str; 4] = [
    "create schema if not exists floor",
    "drop table if exists floor.heads, floor.checkpoints",
    "create table floor.heads (run_id uuid primary key, seq bigint not null) with (fillfactor = 50)",
    "create table floor.checkpoints (
       thread_id uuid not null, run_id uuid not null, seq bigint not null, at timestamptz not null,
       branch int not null, source smallint not null, namespace text not null, next text not null,
       changed bytea not null, primary key (thread_id, namespace, branch, seq))",
];
const ONE: &str = "
    with moved as (update floor.heads set seq = $2 where run_id = $1 and seq = $2 - 1 returning run_id)
    insert into floor.checkpoints (thread_id, run_id, seq, at, branch, source, namespace, next, changed)
    select run_id, run_id, $2, statement_timestamp(), 0, 1, '', $3, $4 from moved";
const MANY: &str = "
    with b as (select * from unnest($1::uuid[], $2::bigint[], $3::text[], $4::bytea[]) as b (run_id, seq, next, changed)),
    moved as (update floor.heads h set seq = b.seq from b where h.run_id = b.run_id and h.seq = b.seq - 1 returning h.run_id)
    insert into floor.checkpoints (thread_id, run_id, seq, at, branch, source, namespace, next, changed)
    select run_id, run_id, seq, statement_timestamp(), 0, 1, '', next, changed from b join moved using (run_id)";

struct Step {
    run: Uuid,
    seq: i64,
    done: oneshot::Sender<()>,
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, runs, steps] = arguments.as_slice() else {
        bail!("usage: cynai-floor DATABASE_URL RUNS STEPS")
    };
    let (runs, steps) = (runs.parse()?, steps.parse()?);
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(measure(url, runs, steps))
}

async fn measure(url: &str, runs: usize, steps: i64) -> anyhow::Result<()> {
    ensure!(
        (1..=1024).contains(&runs) && (1..=1_000_000).contains(&steps),
        "1 to 1024 runs, 1 to 1,000,000 steps"
    );
    let pool = PgPoolOptions::new()
        .max_connections(4)
        .connect(url)
        .await
        .context("the database cannot be reached")?;
    for statement in SCHEMA {
        sqlx::query(statement).execute(&pool).await?;
    }
    let ids: Vec<Uuid> = (0..runs).map(|_| Uuid::now_v7()).collect();
    sqlx::query("insert into floor.heads select run_id, 0 from unnest($1::uuid[]) as r (run_id)")
        .bind(&ids)
        .execute(&pool)
        .await?;
    let statements = Arc::new(AtomicU64::new(0));
    let begun = Instant::now();
    let mut latencies = if let [run] = ids.as_slice() {
        alone(&pool, *run, steps, &statements).await?
    } else {
        together(&pool, &ids, steps, &statements).await?
    };
    let seconds = begun.elapsed().as_secs_f64();
    let stored: i64 =
        sqlx::query_scalar("select count(*) from floor.checkpoints").fetch_one(&pool).await?;
    ensure!(
        usize::try_from(stored)? == latencies.len(),
        "{stored} rows are stored for {} steps",
        latencies.len()
    );
    latencies.sort_unstable();
    let percentile =
        |percent: usize| millis(latencies[(latencies.len() * percent).div_ceil(100) - 1]);
    let report = serde_json::json!({
        "steps": latencies.len(),
        "seconds": seconds,
        "p50_ms": percentile(50),
        "p99_ms": percentile(99),
        "statements": statements.load(Ordering::Relaxed),
    });
    println!("{report}");
    sqlx::query("drop schema floor cascade").execute(&pool).await?;
    Ok(())
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

async fn alone(
    pool: &PgPool,
    run: Uuid,
    steps: i64,
    statements: &AtomicU64,
) -> anyhow::Result<Vec<Duration>> {
    let mut latencies = Vec::new();
    for seq in 1..=steps {
        let begun = Instant::now();
        let written = sqlx::query(ONE)
            .bind(run)
            .bind(seq)
            .bind(NEXT)
            .bind(CHANGED)
            .execute(pool)
            .await?
            .rows_affected();
        ensure!(written == 1, "step {seq} was not written");
        statements.fetch_add(1, Ordering::Relaxed);
        latencies.push(begun.elapsed());
    }
    Ok(latencies)
}

async fn together(
    pool: &PgPool,
    ids: &[Uuid],
    steps: i64,
    statements: &Arc<AtomicU64>,
) -> anyhow::Result<Vec<Duration>> {
    let mut writers = JoinSet::new();
    let doors: Vec<mpsc::Sender<Step>> = (0..WRITERS)
        .map(|_| {
            let (door, waiting) = mpsc::channel(4096);
            writers.spawn(write(pool.clone(), waiting, Arc::clone(statements)));
            door
        })
        .collect();
    let mut runs = JoinSet::new();
    for (number, run) in ids.iter().copied().enumerate() {
        runs.spawn(walk(run, steps, doors[number % WRITERS].clone()));
    }
    drop(doors);
    let mut latencies = Vec::new();
    while let Some(run) = runs.join_next().await {
        latencies.extend(run??);
    }
    while let Some(writer) = writers.join_next().await {
        writer??;
    }
    Ok(latencies)
}

async fn walk(run: Uuid, steps: i64, door: mpsc::Sender<Step>) -> anyhow::Result<Vec<Duration>> {
    let mut latencies = Vec::new();
    for seq in 1..=steps {
        let begun = Instant::now();
        let (done, durable) = oneshot::channel();
        door.send(Step { run, seq, done }).await?;
        durable.await?;
        latencies.push(begun.elapsed());
    }
    Ok(latencies)
}

async fn write(
    pool: PgPool,
    mut waiting: mpsc::Receiver<Step>,
    statements: Arc<AtomicU64>,
) -> anyhow::Result<()> {
    let mut batch = Vec::new();
    while waiting.recv_many(&mut batch, MAX_BATCH).await > 0 {
        let runs: Vec<Uuid> = batch.iter().map(|step| step.run).collect();
        let seqs: Vec<i64> = batch.iter().map(|step| step.seq).collect();
        let (next, changed) = (vec![NEXT; batch.len()], vec![CHANGED; batch.len()]);
        let written = sqlx::query(MANY)
            .bind(&runs)
            .bind(&seqs)
            .bind(&next)
            .bind(&changed)
            .execute(&pool)
            .await?
            .rows_affected();
        ensure!(
            usize::try_from(written)? == batch.len(),
            "{written} of {} steps were written",
            batch.len()
        );
        statements.fetch_add(1, Ordering::Relaxed);
        for step in batch.drain(..) {
            // Nobody listens when its run failed.
            let _ = step.done.send(());
        }
    }
    Ok(())
}
