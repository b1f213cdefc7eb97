//! What else can go wrong around a server: a database that stops or dies, a server that freezes, two
//! servers where one is meant, a schema from the future.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgConnection, PgPool, Row};
use uuid::Uuid;

use crate::support::client::Client;
use crate::support::load::{GRAPHS, Load};
use crate::support::server::{PATIENCE, Server, Site, Start, until};
use crate::support::traces::{self, Trace};

/// Long activations, one after the other, each with an attempt that is numbered before it starts.
const SLOW: &str = r#"
name: slow
state:
  n: { type: integer, default: 0 }
  steps: { type: integer, default: 10 }
  sleep_ms: { type: integer, default: 200 }
nodes:
  step:
    use: test/append
    effect: idempotent
    with:
      file: "${env.TRACES}"
      label: "${env.SERVER}"
      sleep_ms: "${state.sleep_ms}"
      tick_ms: 100
    set: { n: "${state.n + 1}" }
edges:
  - start -> step
  - from: step
    choose:
      - { when: state.n < state.steps, to: step }
      - { to: end }
"#;

const SHORT: &str = r#"
name: short
state:
  n: { type: integer, default: 0 }
nodes:
  only:
    use: test/append
    effect: pure
    with: { file: "${env.TRACES}", label: "${env.SERVER}" }
    set: { n: 1 }
edges:
  - start -> only -> end
"#;

/// Servers that share the test's own database.
fn shared(pool: &PgPool, flags: &[&str]) -> Site {
    let url = pool.connect_options().to_url_lossy();
    Site::on_database(&[("slow", SLOW), ("short", SHORT)], url.as_str())
        .with_flags(&["--no-local-worker"])
        .with_flags(flags)
}

fn second() -> Start {
    Start { number: 1, ..Start::default() }
}

/// Starts `count` runs of a graph, each on a thread of its own.
async fn start_runs(client: &Client, graph: &str, request: &Value, count: usize) -> Vec<String> {
    let mut threads = Vec::new();
    for _ in 0..count {
        let thread = Uuid::now_v7().to_string();
        let mut request = request.clone();
        request["if_not_exists"] = "create".into();
        client.start_run(&thread, graph, request).await.unwrap();
        threads.push(thread);
    }
    threads
}

async fn count(db: &mut PgConnection, query: &'static str) -> i64 {
    sqlx::query_scalar(query).fetch_one(db).await.unwrap()
}

/// Waits until no run is open.
async fn all_ended(db: &mut PgConnection) {
    until("all runs end", async || {
        (count(db, "select count(*) from heads").await == 0).then_some(())
    })
    .await;
    assert_eq!(count(db, "select count(*) from runs where status <> 'success'").await, 0);
}

fn lines(site: &Site, event: &str) -> Vec<Trace> {
    let mut lines = traces::read(&site.traces());
    lines.retain(|line| line.event == event);
    lines
}

/// Panics when an activation ran twice.
fn none_repeated(site: &Site) {
    let mut ran = BTreeMap::<String, u32>::new();
    for line in lines(site, "run") {
        *ran.entry(line.task).or_default() += 1;
    }
    ran.retain(|_, times| *times > 1);
    assert_eq!(ran, BTreeMap::new(), "activations that ran again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_stands_still_for_ten_seconds_under_load_loses_nothing() {
    let site = Site::new(&GRAPHS).with_flags(&["--no-local-worker"]);
    let server = site.start(&Start::default()).await;
    let mut db = site.database().await;
    let mut load = Load::new();
    load.progress(&server, &site, &mut db, 100).await;
    site.signal_database(Signal::SIGSTOP);
    let frozen = Instant::now();
    let client = server.client();
    until("it says that it is not ready", async || {
        client.call(Method::GET, "/readyz", None).await.is_err().then_some(())
    })
    .await;
    assert_eq!(client.get("/healthz").await.unwrap()["status"], "ok");
    // Ten seconds are what is tested: the lease ends in them.
    tokio::time::sleep(Duration::from_secs(10).saturating_sub(frozen.elapsed())).await;
    site.signal_database(Signal::SIGCONT);
    load.progress(&server, &site, &mut db, 50).await;
    load.finish(&server, &site, &mut db).await;
    server.kill();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_killed_is_started_again_and_nothing_is_lost() {
    let site = Site::new(&GRAPHS).with_flags(&["--no-local-worker"]);
    let server = site.start(&Start::default()).await;
    let mut db = site.database().await;
    let mut load = Load::new();
    for _ in 0..3 {
        load.progress(&server, &site, &mut db, 60).await;
        let old = site.postmaster().expect("the database runs");
        nix::sys::signal::kill(old, Signal::SIGKILL).unwrap();
        until("another database runs", async || site.postmaster().filter(|new| *new != old)).await;
        db = until("it answers", async || site.try_database().await).await;
    }
    load.progress(&server, &site, &mut db, 60).await;
    load.finish(&server, &site, &mut db).await;
    let stopped = server.stop().await;
    assert!(stopped.success(), "{stopped:?}");
    assert_eq!(site.postmaster(), None, "the database stops with its server");
}

/// Every row that runs on these threads left, as text, with the transaction that wrote it: a row that is written
/// again as it was is seen too.
async fn rows(db: &mut PgConnection, threads: &[String]) -> Vec<String> {
    let mut all = Vec::new();
    for query in [
        "select t.xmin || ' ' || t::text from threads t where thread_id::text = any($1)",
        "select t.xmin || ' ' || t::text from runs t where thread_id::text = any($1)",
        "select t.xmin || ' ' || t::text from heads t where thread_id::text = any($1)",
        "select t.xmin || ' ' || t::text from queue t where thread_id::text = any($1)",
        "select t.xmin || ' ' || t::text from checkpoints t where thread_id::text = any($1)",
        "select t.xmin || ' ' || t::text from writes t where thread_id::text = any($1)",
        "select t.xmin || ' ' || t::text from pending t where thread_id::text = any($1)",
        "select t.xmin || ' ' || t::text from channel_values t where thread_id::text = any($1)",
    ] {
        let found = sqlx::query(query).bind(threads).fetch_all(&mut *db).await.unwrap();
        let mut found: Vec<String> = found.iter().map(|row| row.get(0)).collect();
        found.sort();
        all.append(&mut found);
    }
    all
}

/// Panics with the rows that were written.
fn unchanged(now: &[String], before: &[String]) {
    let written: Vec<&String> = now.iter().filter(|row| !before.contains(row)).collect();
    assert_eq!(written, [""; 0], "a server that had lost its runs wrote to them");
    assert_eq!(
        now.len(),
        before.len(),
        "a server that had lost its runs deleted something of them"
    );
}

/// Two servers with short leases, of which the second stops before its first COMMIT of a name; and the threads of
/// the runs that were started until then.
struct Frozen {
    stays: Server,
    frozen: Server,
    threads: Vec<String>,
}

impl Frozen {
    async fn before(site: &Site, freeze_at: (&'static str, u32), request: &Value) -> Self {
        // The one that stays is there first, so that requests have somebody to go to.
        let stays = site.start(&Start::default()).await;
        let frozen = site.start(&Start { freeze_at: Some(freeze_at), ..second() }).await;
        let mut threads = Vec::new();
        while !frozen.is_frozen() {
            assert!(threads.len() < 2000, "the second server never comes to {freeze_at:?}");
            threads.append(&mut start_runs(&stays.client(), "slow", request, 4).await);
        }
        Self { stays, frozen, threads }
    }

    /// Lets the frozen server go on, and waits until it works again: what it had in hand has gone out by then.
    async fn thaw(&mut self, site: &Site, db: &mut PgConnection) {
        let dead = "select count(*) from instances where deadline < cynai_now()";
        assert_eq!(count(db, dead).await, 1, "the frozen server's lease has ended");
        self.frozen.signal(Signal::SIGCONT);
        until("the thawed server ends a run of its own", async || {
            start_runs(&self.stays.client(), "short", &json!({ "input": {} }), 1).await;
            lines(site, "run")
                .iter()
                .any(|line| line.node == "only" && line.label == "1")
                .then_some(())
        })
        .await;
    }
}

fn began_on_thawed(site: &Site, since: usize) -> Vec<Trace> {
    let mut began = lines(site, "run").split_off(since);
    began.retain(|line| line.node != "only" && line.label == "1");
    began
}

#[sqlx::test]
async fn a_server_frozen_before_a_commit_does_not_make_it_when_it_is_thawed(pool: PgPool) {
    let site = shared(&pool, &["--lease", "2s", "--pool-size", "3"]);
    // The runs stay where they are: nothing but the fence tells the late commit from a good one.
    // What they stream is committed soon: a run that was taken over shows by it that it does no harm.
    let request =
        json!({ "input": { "steps": 1, "sleep_ms": 600_000 }, "stream_mode": ["custom"] });
    // Not the first one: by then its connections know the statement, and it goes out in one piece.
    let mut servers = Frozen::before(&site, ("commit", 12), &request).await;
    let mut db = site.database().await;
    let threads = servers.threads.clone();
    until("the other server has all the runs", async || {
        let ran = lines(&site, "run");
        let has =
            |thread: &String| ran.iter().any(|line| line.thread == *thread && line.label == "0");
        threads.iter().all(has).then_some(())
    })
    .await;
    let before = until("what they stream is committed, and nothing else moves", async || {
        let before = rows(&mut db, &threads).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        (rows(&mut db, &threads).await == before).then_some(before)
    })
    .await;
    let ran = lines(&site, "run").len();
    servers.thaw(&site, &mut db).await;
    unchanged(&rows(&mut db, &threads).await, &before);
    assert_eq!(began_on_thawed(&site, ran), [], "an activation began after its run was lost");
}

/// A server stops inside a transaction. Its locks do not keep the other one from its runs, which come to their end;
/// and what the first one has in hand when it goes on changes nothing.
async fn check_frozen_inside(pool: &PgPool, freeze_at: (&'static str, u32)) {
    let site = shared(pool, &["--lease", "2s"]);
    let mut servers =
        Frozen::before(&site, freeze_at, &json!({ "input": { "steps": 3, "sleep_ms": 100 } }))
            .await;
    let mut db = site.database().await;
    let open = "select count(*) from pg_stat_activity
                 where datname = current_database() and state = 'idle in transaction'";
    until("its transaction is open", async || (count(&mut db, open).await > 0).then_some(())).await;
    all_ended(&mut db).await;
    let (before, ran) = (rows(&mut db, &servers.threads).await, lines(&site, "run").len());
    servers.thaw(&site, &mut db).await;
    unchanged(&rows(&mut db, &servers.threads).await, &before);
    assert_eq!(began_on_thawed(&site, ran), [], "an activation began after its run was lost");
}

#[sqlx::test]
async fn a_server_frozen_while_it_ends_a_run_neither_ends_it_nor_blocks_others(pool: PgPool) {
    check_frozen_inside(&pool, ("end", 3)).await;
}

#[sqlx::test]
async fn of_two_servers_each_does_at_least_a_quarter_of_a_thousand_runs(pool: PgPool) {
    let site = shared(&pool, &[]);
    let first = site.start(&Start::default()).await;
    let other = site.start(&second()).await;
    let mut db = site.database().await;
    let (client, other_client) = (first.client(), other.client());
    let nothing = json!({ "input": {} });
    // Each client has its own server, as behind a load balancer; ten at a time.
    let starts = (0..20).map(|at| {
        start_runs(if at % 2 == 0 { &client } else { &other_client }, "short", &nothing, 50)
    });
    futures::future::join_all(starts).await;
    all_ended(&mut db).await;
    let mut shares = BTreeMap::<String, u32>::new();
    for line in lines(&site, "run") {
        *shares.entry(line.label).or_default() += 1;
    }
    none_repeated(&site);
    println!("shares of the servers: {shares:?}");
    assert_eq!(shares.values().sum::<u32>(), 1000);
    assert!(shares.len() == 2 && shares.values().all(|share| *share >= 250), "{shares:?}");
    first.kill();
    other.kill();
}

#[sqlx::test]
async fn a_rolling_restart_delays_no_run_and_repeats_nothing(pool: PgPool) {
    // A lease as long as the test's patience: whoever waited for one would fail it.
    let site = shared(&pool, &["--lease", "60s"]);
    let mut servers =
        [Some(site.start(&Start::default()).await), Some(site.start(&second()).await)];
    let mut db = site.database().await;
    let client = servers[0].as_ref().unwrap().client();
    let begun = Instant::now();
    start_runs(&client, "slow", &json!({ "input": { "steps": 40, "sleep_ms": 150 } }), 24).await;
    for (number, server) in servers.iter_mut().enumerate() {
        let at = lines(&site, "run").len();
        until("both work", async || (lines(&site, "run").len() > at + 50).then_some(())).await;
        let stopping = Instant::now();
        let stopped = server.take().unwrap().stop().await;
        assert!(stopped.success(), "{stopped:?}");
        assert!(stopping.elapsed() < Duration::from_secs(10), "{:?}", stopping.elapsed());
        *server = Some(site.start(&Start { number, ..Start::default() }).await);
    }
    all_ended(&mut db).await;
    none_repeated(&site);
    println!("two servers restarted, one after the other, in {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", begun.elapsed());
}

#[sqlx::test]
async fn a_cancelled_run_stops_soon_on_whatever_server_it_is(pool: PgPool) {
    let site = shared(&pool, &[]);
    let first = site.start(&Start::default()).await;
    let other = site.start(&second()).await;
    let clients = [first.client(), other.client()];
    let request = json!({ "input": { "steps": 1, "sleep_ms": 60_000 } });
    let threads = start_runs(&clients[0], "slow", &request, 6).await;
    let tickers = || {
        lines(&site, "tick")
            .iter()
            .map(|line| line.thread.clone())
            .collect::<std::collections::BTreeSet<_>>()
    };
    until("all of them tick", async || (tickers().len() == 6).then_some(())).await;
    for (at, thread) in threads.iter().enumerate() {
        let run = clients[0].runs(thread).await.unwrap()[0]["run_id"].as_str().unwrap().to_owned();
        let path = format!("/threads/{thread}/runs/{run}/cancel?wait=1");
        clients[at % 2].post(&path, &json!({})).await.unwrap();
    }
    let cancelled = Instant::now();
    // Ticks come every 100 ms: three of them missing is standing still.
    let mut count = lines(&site, "tick").len();
    let mut since = Instant::now();
    while since.elapsed() < Duration::from_millis(400) {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let now = lines(&site, "tick").len();
        if now != count {
            (count, since) = (now, Instant::now());
        }
        assert!(
            cancelled.elapsed() < Duration::from_secs(4),
            "activations of cancelled runs go on"
        );
    }
    let stood_still = since.duration_since(cancelled);
    println!("the last activation of a cancelled run stopped after {stood_still:?}");
    assert!(stood_still < Duration::from_secs(2), "{stood_still:?}");
    first.kill();
    other.kill();
}

/// Starts a server that is to refuse, and gives back what it said.
async fn refused(site: &Site, start: &Start) -> String {
    let mut server = site.launch(start);
    let begun = Instant::now();
    assert!(!server.ready().await, "it should have refused to start");
    assert_eq!(server.wait().await.code(), Some(1));
    assert!(begun.elapsed() < PATIENCE);
    server.log_tail()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schema_newer_than_the_program_is_refused_and_left_alone() {
    let site = Site::new(&[]).with_flags(&["--no-local-worker"]);
    site.start(&Start::default()).await.kill();
    let mut db = site.database().await;
    let newer =
        "insert into _sqlx_migrations (version, description, success, checksum, execution_time)
                 values (9999, 'from the future', true, '', 0)";
    sqlx::query(newer).execute(&mut db).await.unwrap();
    let said = refused(&site, &Start::default()).await;
    assert!(said.contains("newer than this program") && said.contains("9999"), "{said}");
    assert_eq!(site.postmaster(), None, "the database was stopped with the server");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_server_is_refused_the_same_data_directory_and_the_same_port() {
    let site = Site::new(&[]).with_flags(&["--no-local-worker"]);
    let first = site.start(&Start::default()).await;
    let said = refused(&site, &Start::default()).await;
    assert!(
        said.contains("another server uses the data directory") && said.contains("--data-dir"),
        "{said}"
    );
    let taken = first.address().trim_start_matches("http://").to_owned();
    let said = refused(&site, &Start { listen: Some(taken.clone()), ..second() }).await;
    assert!(
        said.contains(&format!("cannot listen on {taken}")) && said.contains("--listen"),
        "{said}"
    );
    assert_eq!(first.client().get("/ok").await.unwrap()["ok"], true, "the first one goes on");
    let stopped = first.stop().await;
    assert!(stopped.success(), "{stopped:?}");
}

const JOB: &str = r#"
name: one-job
state:
  said: { type: string }
nodes:
  say:
    job: { command: [echo, hello] }
    retry: { attempts: 3 }
    set: { said: "${output.stdout}" }
edges:
  - start -> say -> end
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_sandboxes_do_not_work_a_job_is_refused_with_the_reason() {
    let flags = ["--bubblewrap", "/no/such/bwrap"];
    let site = Site::new(&[("one-job", JOB)]).with_flags(&flags);
    let server = site.start(&Start::default()).await;
    let client = server.client();
    let threads = start_runs(&client, "one-job", &json!({ "input": {} }), 1).await;
    let failed = until("the run fails", async || {
        let thread = client.thread(&threads[0]).await.unwrap();
        (thread["status"] == "error").then_some(thread)
    })
    .await;
    let error = failed["error"].to_string();
    assert!(
        error.contains("job_refused") && error.contains("apt-get install bubblewrap"),
        "{failed}"
    );
}
