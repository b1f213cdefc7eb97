//! Batches of commits: what one of them does to the others, and answers that never arrive.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::time::Duration;

use cynai::graph::checkpoint::{
    CheckpointRow, Commit, EffectChange, EffectRow, EffectStatus, RunEnd, Source, WaitKind, WaitRow,
};
use cynai::graph::model::Effect;
use cynai::graph::step::Position;
use cynai::ids::{InstanceId, TaskId, ThreadId};
use cynai::services::api::{CancelAction, RunKey, RunStatus};
use cynai::store::commit::{CommitError, Committed, Committer, Request};
use cynai::store::queue::{self, Grant};
use cynai::store::{connect, runs};
use serde_json::{Value, json};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, PgPool};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::JoinSet;

use super::{System, looping, one};

/// Runs that a process has claimed, each at its input checkpoint.
async fn grants(system: &System, count: usize) -> Vec<Grant> {
    for _ in 0..count {
        system.start(ThreadId::new(), "loop", json!({})).await;
    }
    let instance = InstanceId::new();
    let mut db = system.pool.acquire().await.unwrap();
    let epoch = queue::register(&mut db, instance, "test", Duration::from_secs(60)).await.unwrap();
    let limit = i64::try_from(count).unwrap();
    let mut grants =
        queue::claim(&mut db, instance, epoch, queue::Claim::Ready(limit)).await.unwrap();
    assert_eq!(grants.len(), count);
    grants.sort_by_key(|grant| grant.run_id);
    grants
}

fn superstep(grant: &Grant, next: &str) -> Request {
    let position = Position { branch: grant.branch, seq: grant.seq + 1 };
    let row = CheckpointRow {
        position,
        parent: None,
        source: Source::Loop,
        next: next.to_owned(),
        changed: b"{}".to_vec(),
        keyframe: None,
        values: Vec::new(),
    };
    Request {
        run_id: grant.run_id,
        thread_id: grant.thread_id,
        fence: grant.fence,
        root_seq: grant.seq,
        commit: Arc::new(Commit {
            namespace: String::new(),
            planned: Position { branch: grant.branch, seq: grant.seq },
            checkpoint: Some(row),
            writes: Vec::new(),
            waits: Vec::new(),
            settles: false,
            stream: Vec::new(),
            effects: Vec::new(),
            end: None,
        }),
    }
}

fn with_waits(mut request: Request, waits: Vec<WaitRow>) -> Request {
    let commit = Commit { checkpoint: None, waits, ..(*request.commit).clone() };
    request.commit = Arc::new(commit);
    request
}

fn event(name: &str) -> WaitRow {
    WaitRow {
        task: TaskId(uuid::Uuid::from_u128(7)),
        node: "node".to_owned(),
        kind: WaitKind::Event,
        attempt: 1,
        due: None,
        name: Some(name.to_owned()),
        data: None,
        answer: None,
        round: 1,
    }
}

/// Commits all of `requests` so that those from the third on are one batch: the first two hold both slots,
/// and wait for a lock that is given up when the others are queued. Also answers how many statements there were.
async fn as_one_batch(
    system: &System,
    requests: Vec<Request>,
) -> (Vec<Result<Committed, CommitError>>, u64) {
    let committer = Committer::new(system.pool.clone());
    let mut lock = system.pool.begin().await.unwrap();
    for request in &requests[..2] {
        queue::lock_head(&mut lock, request.run_id).await.unwrap();
    }
    let mut tasks = JoinSet::new();
    for (number, request) in requests.into_iter().enumerate() {
        let committer = committer.clone();
        tasks.spawn(async move { (number, committer.commit(request).await) });
        // Each is under way or queued before the next comes.
        tokio::time::sleep(Duration::from_millis(if number < 2 { 100 } else { 2 })).await;
    }
    lock.rollback().await.unwrap();
    let mut results = tasks.join_all().await;
    results.sort_by_key(|(number, _)| *number);
    let results = results.into_iter().map(|(_, result)| result).collect();
    (results, committer.stats().statements)
}

fn fenced<T>(result: &Result<T, CommitError>) -> bool {
    matches!(result, Err(CommitError::Fenced))
}

#[sqlx::test]
async fn a_stale_row_in_a_batch_is_left_out_and_the_others_commit(pool: PgPool) {
    let system = System::new(pool, &[looping()]).await;
    let grants = grants(&system, 12).await;
    let mut requests: Vec<Request> = grants.iter().map(|grant| superstep(grant, "step")).collect();
    requests[5].fence -= 1;
    requests[7].root_seq += 1;
    let (results, statements) = as_one_batch(&system, requests).await;
    assert_eq!(statements, 3, "two that were alone, and one for the others");
    let refused: Vec<usize> = (0..12).filter(|number| fenced(&results[*number])).collect();
    assert_eq!(refused, [5, 7]);
    assert!(
        results
            .iter()
            .enumerate()
            .all(|(number, result)| refused.contains(&number) || result.is_ok()),
        "{results:?}"
    );
    assert_eq!(system.count("select count(*) from checkpoints where seq = 1").await, 10);
    assert_eq!(system.count("select count(*) from heads where seq = 1").await, 10);
}

#[sqlx::test]
async fn an_old_grant_in_the_batch_of_the_new_one_is_told_that_it_is_old(pool: PgPool) {
    let system = System::new(pool, &[looping()]).await;
    let grants = grants(&system, 4).await;
    let new = superstep(&grants[3], "step");
    let old = Request { fence: new.fence - 1, ..with_waits(new.clone(), vec![event("x")]) };
    let requests = vec![superstep(&grants[0], "step"), superstep(&grants[1], "step"), old, new];
    let (results, statements) = as_one_batch(&system, requests).await;
    assert_eq!(statements, 3);
    assert!(fenced(&results[2]) && results[3].is_ok(), "{results:?}");
    assert_eq!(system.count("select count(*) from pending").await, 0);
}

#[sqlx::test]
async fn a_value_that_the_database_refuses_sinks_nobody_else(pool: PgPool) {
    let system = System::new(pool, &[looping()]).await;
    let grants = grants(&system, 10).await;
    let requests: Vec<Request> = grants
        .iter()
        .enumerate()
        .map(|(number, grant)| superstep(grant, if number == 6 { "a\0b" } else { "step" }))
        .collect();
    let (results, _) = as_one_batch(&system, requests).await;
    for (number, result) in results.iter().enumerate() {
        assert_eq!(result.is_ok(), number != 6, "{number}: {result:?}");
    }
    assert!(matches!(results[6], Err(CommitError::Store(_))));
    assert_eq!(system.count("select count(*) from checkpoints where seq = 1").await, 9);
}

#[sqlx::test]
async fn a_nul_in_a_value_goes_through_input_state_stream_and_result(pool: PgPool) {
    let echo = one("echo", json!({ "set": { "log": ["${state.value}"] } }));
    let system = System::new(pool, &[echo]).await;
    let driver = system.driver(System::driver_config());
    let value = json!({ "a\u{0}b": "x\u{0}y", "big": "\u{0}".repeat(2000) });
    let run = system.start(ThreadId::new(), "echo", json!({ "value": value })).await;
    assert_eq!(system.wait(&run).await, json!({ "log": [value], "value": value }));
    driver.stop().await;
}

#[sqlx::test]
async fn a_leader_that_is_dropped_leaves_nobody_behind(pool: PgPool) {
    let system = System::new(pool, &[looping()]).await;
    let grants = grants(&system, 8).await;
    let committer = Committer::new(system.pool.clone());
    let mut lock = system.pool.begin().await.unwrap();
    for grant in &grants[..2] {
        queue::lock_head(&mut lock, grant.run_id).await.unwrap();
    }
    let (mut leaders, mut followers) = (JoinSet::new(), JoinSet::new());
    for (number, grant) in grants.iter().enumerate() {
        let (committer, request) = (committer.clone(), superstep(grant, "step"));
        let tasks = if number < 2 { &mut leaders } else { &mut followers };
        tasks.spawn(async move { committer.commit(request).await });
        tokio::time::sleep(Duration::from_millis(if number < 2 { 100 } else { 2 })).await;
    }
    leaders.shutdown().await;
    let rest = tokio::time::timeout(super::PATIENCE, followers.join_all()).await.unwrap();
    assert!(rest.iter().all(Result::is_ok), "{rest:?}");
    lock.rollback().await.unwrap();
}

/// Stands between a pool and PostgreSQL, and loses answers.
struct Proxy {
    options: PgConnectOptions,
    /// How many answers still pass before one is lost with its connection; below zero, all pass.
    until_loss: Arc<AtomicI64>,
    lost: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    /// Answers to statements in which the text `only` stands are counted; with an empty one, all are.
    async fn before(pool: &PgPool, only: &'static str) -> Self {
        let target = pool.connect_options();
        let folder = target.get_socket().expect("the tests' database is reached by its socket");
        let socket = folder.join(format!(".s.PGSQL.{}", target.get_port()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (until_loss, lost) = (Arc::new(AtomicI64::new(-1)), Arc::new(AtomicUsize::new(0)));
        let mut tasks = JoinSet::new();
        let (left, losses) = (Arc::clone(&until_loss), Arc::clone(&lost));
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let server = UnixStream::connect(&socket).await.unwrap();
                connections.spawn(forward(
                    client,
                    server,
                    only,
                    Arc::clone(&left),
                    Arc::clone(&losses),
                ));
            }
        });
        let options = PgConnectOptions::new_without_pgpass()
            .host("127.0.0.1")
            .port(port)
            .username(target.get_username())
            .database(target.get_database().unwrap())
            .ssl_mode(sqlx::postgres::PgSslMode::Disable);
        Self { options, until_loss, lost, _tasks: tasks }
    }

    fn lose_after(&self, answers: i64) {
        self.until_loss.store(answers, Ordering::SeqCst);
    }

    fn lost(&self) -> usize {
        self.lost.load(Ordering::SeqCst)
    }
}

async fn forward(
    mut client: TcpStream,
    mut server: UnixStream,
    only: &'static str,
    until_loss: Arc<AtomicI64>,
    lost: Arc<AtomicUsize>,
) {
    let (mut up, mut down) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    let mut counts = only.is_empty();
    loop {
        tokio::select! {
            read = client.read(&mut up) => match read {
                Ok(0) | Err(_) => return,
                Ok(length) => {
                    let text = &up[..length];
                    counts = only.is_empty() || text.windows(only.len()).any(|window| window == only.as_bytes());
                    if server.write_all(text).await.is_err() { return }
                }
            },
            read = server.read(&mut down) => match read {
                Ok(0) | Err(_) => return,
                Ok(length) => {
                    if counts && until_loss.fetch_sub(1, Ordering::SeqCst) == 0 {
                        lost.fetch_add(1, Ordering::SeqCst);
                        return;
                    }
                    if client.write_all(&down[..length]).await.is_err() { return }
                }
            },
        }
    }
}

#[sqlx::test]
async fn a_commit_whose_answer_was_lost_is_found_and_not_repeated(pool: PgPool) {
    let system = System::new(pool, &[looping()]).await;
    let grants = grants(&system, 2).await;
    // The text stands in all three forms of the statement, also when it was prepared before.
    let proxy = Proxy::before(&system.pool, "").await;
    let committer = Committer::new(connect::pool(proxy.options.clone(), 2));
    // The statement is prepared and answered once, so that the next answer is the commit's.
    committer.commit(superstep(&grants[0], "step")).await.unwrap();
    let mut moved = grants[1].clone();
    committer.commit(superstep(&moved, "step")).await.unwrap();
    moved.seq += 1;
    proxy.lose_after(0);
    committer.commit(superstep(&moved, "step")).await.unwrap();
    assert_eq!(proxy.lost(), 1);
    assert_eq!(system.count("select count(*) from checkpoints where seq = 2").await, 1);
    assert_eq!(system.count("select max(seq) from heads").await, 2);
    system.check_tables().await;
}

#[sqlx::test]
async fn a_wait_whose_answer_was_lost_keeps_what_came_meanwhile(pool: PgPool) {
    let system = System::new(pool, &[looping()]).await;
    let grant = grants(&system, 1).await.remove(0);
    system.event(grant.thread_id, "go", json!("first")).await;
    system.event(grant.thread_id, "go", json!("second")).await;
    let proxy = Proxy::before(&system.pool, "").await;
    let committer = Committer::new(connect::pool(proxy.options.clone(), 2));
    let mut other = event("other");
    other.task = TaskId(uuid::Uuid::from_u128(8));
    committer.commit(with_waits(superstep(&grant, "step"), vec![other])).await.unwrap();
    proxy.lose_after(0);
    committer.commit(with_waits(superstep(&grant, "step"), vec![event("go")])).await.unwrap();
    assert_eq!(proxy.lost(), 1);
    let answers: Vec<Vec<u8>> = sqlx::query_scalar("select answer from pending where name = 'go'")
        .fetch_all(&system.pool)
        .await
        .unwrap();
    assert_eq!(answers, [b"\"first\"".to_vec()]);
    assert_eq!(system.count("select count(*) from events").await, 1, "the second is still there");
}

#[sqlx::test]
async fn a_commit_whose_answer_was_lost_and_whose_run_was_lost_too_is_fenced(pool: PgPool) {
    let system = System::new(pool, &[looping()]).await;
    let grant = grants(&system, 1).await.remove(0);
    system.sql("update heads set fence = fence + 1").await;
    let committer = Committer::new(system.pool.clone());
    let result = committer.commit(superstep(&grant, "step")).await;
    assert!(fenced(&result), "{result:?}");
    system.sql("delete from heads").await;
    let result = committer.commit(superstep(&grant, "step")).await;
    assert!(fenced(&result), "{result:?}");
}

fn ending(mut request: Request) -> Request {
    let end = RunEnd { values: b"{\"n\":1}".to_vec(), result: b"{}".to_vec() };
    request.commit = Arc::new(Commit { end: Some(end), ..(*request.commit).clone() });
    request
}

#[sqlx::test]
async fn a_run_ends_with_its_last_commit_and_one_whose_thread_is_held_stops_no_other(pool: PgPool) {
    let system = System::new(pool, &[looping()]).await;
    let grants = grants(&system, 3).await;
    let committer = Committer::new(system.pool.clone());
    let mut lock = system.pool.begin().await.unwrap();
    runs::lock_thread(&mut lock, grants[1].thread_id).await.unwrap().unwrap();
    let mut tasks = JoinSet::new();
    for grant in [&grants[0], &grants[1]] {
        let (committer, request) = (committer.clone(), ending(superstep(grant, "")));
        tasks.spawn(async move { committer.commit(request).await });
    }
    committer.commit(superstep(&grants[2], "step")).await.unwrap();
    tasks.join_next().await.unwrap().unwrap().unwrap();
    let ended = "select count(*) from runs where status = 'success' and ended_at is not null";
    assert_eq!(system.count(ended).await, 1, "the other one's thread is held");
    assert_eq!(system.count("select count(*) from checkpoints where seq = 1").await, 2);
    lock.rollback().await.unwrap();
    tasks.join_next().await.unwrap().unwrap().unwrap();
    assert_eq!(system.count(ended).await, 2);
    let idle = "select count(*) from threads where status = 'idle' and convert_from(state_values, 'UTF8') = '{\"n\":1}'";
    assert_eq!(system.count(idle).await, 2);
    let late = committer.commit(superstep(&grants[0], "step")).await;
    assert!(fenced(&late), "{late:?}");
    system.check_tables().await;
}

#[sqlx::test]
async fn a_last_commit_whose_answer_was_lost_ends_the_run_once(pool: PgPool) {
    let system = System::new(pool, &[looping()]).await;
    let grants = grants(&system, 14).await;
    let proxy = Proxy::before(&system.pool, "").await;
    let committer = Committer::new(connect::pool(proxy.options.clone(), 2));
    // The transaction has a handful of answers; each of them gets lost once.
    for (answers, grant) in (0..).zip(&grants) {
        proxy.lose_after(answers);
        committer.commit(ending(superstep(grant, ""))).await.unwrap();
    }
    assert!(proxy.lost() > 5, "{}", proxy.lost());
    assert_eq!(system.count("select count(*) from runs where status = 'success'").await, 14);
    assert_eq!(system.count("select count(*) from checkpoints where seq = 1").await, 14);
    system.check_tables().await;
}

#[sqlx::test]
async fn an_effect_that_was_under_way_when_its_run_ended_is_unknown(pool: PgPool) {
    let system = System::new(pool, &[looping()]).await;
    let grants = grants(&system, 2).await;
    let committer = Committer::new(system.pool.clone());
    for grant in &grants {
        let intent = |task: u128, status: Option<EffectStatus>| EffectRow {
            task: TaskId(uuid::Uuid::from_u128(task)),
            attempt: 1,
            change: match status {
                None => EffectChange::Intent {
                    key: format!("key-{task}"),
                    node: "act".to_owned(),
                    kind: "use",
                    target: "act".to_owned(),
                    effect: Effect::Effectful,
                    request_hash: [0; 32],
                    request: b"{}".to_vec(),
                },
                Some(status) => EffectChange::Outcome { status, outcome: b"1".to_vec() },
            },
        };
        for effects in
            [vec![intent(1, None), intent(2, None)], vec![intent(2, Some(EffectStatus::Done))]]
        {
            let mut request = superstep(grant, "step");
            let commit = Commit { checkpoint: None, effects, ..(*request.commit).clone() };
            request.commit = Arc::new(commit);
            committer.commit(request).await.unwrap();
        }
    }
    committer.commit(ending(superstep(&grants[0], ""))).await.unwrap();
    let key = RunKey { thread: None, run: grants[1].run_id };
    let cancel =
        system.services.cancel_run(&system.actor, key, CancelAction::Interrupt, None, false);
    cancel.await.unwrap();
    let known = "select count(*) from effects where ended_at is not null and status = case task_id
                   when '00000000-0000-0000-0000-000000000001' then 'unknown' else 'done' end";
    assert_eq!(system.count(known).await, 4);
    let why = "select count(*) from effects where convert_from(outcome, 'UTF8')::jsonb ->> 'kind' = 'abandoned'";
    assert_eq!(system.count(why).await, 2);
}

#[sqlx::test]
async fn a_terminated_connection_is_replaced_and_nothing_is_lost(pool: PgPool) {
    let system = System::new(pool, &[looping()]).await;
    let driver = system.driver(System::driver_config());
    let runs: Vec<_> = futures::future::join_all(
        (0..20).map(|_| system.start(ThreadId::new(), "loop", json!({ "most": 60 }))),
    )
    .await;
    let mut own = system.pool.connect_options().connect().await.unwrap();
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(40)).await;
        let sql = "select count(pg_terminate_backend(pid)) from pg_stat_activity
                    where datname = current_database() and pid <> pg_backend_pid()";
        sqlx::query(sql).execute(&mut own).await.unwrap();
    }
    own.close().await.unwrap();
    for run in &runs {
        // A waiter's own connection may have been among those.
        system.head(run, "gone").await;
        assert_eq!(system.wait(run).await["n"], 60);
    }
    driver.stop().await;
    system.check_tables().await;
}

#[sqlx::test]
async fn any_answer_may_be_lost_on_the_way_of_a_run(pool: PgPool) {
    let graph = json!({
        "name": "all", "state": { "n": { "type": "integer", "reduce": "sum", "default": 0 } },
        "nodes": {
            "fan": { "for_each": "${[1, 2, 3]}", "use": "trace", "set": { "n": 1 } },
            "pause": { "wait": { "for": "10ms" }, "set": { "n": 10 } },
            "loop": { "set": { "n": 100 } },
        },
        "edges": ["start -> fan -> pause -> loop",
                  { "from": "loop", "choose": [{ "when": "state.n < 500", "to": "loop" }, { "to": "end" }] }],
    });
    let system = System::new(pool, &[graph]).await;
    let proxy = Proxy::before(&system.pool, "").await;
    let proxied = connect::pool(proxy.options.clone(), 6);
    let mut config = System::driver_config();
    config.lease = Duration::from_secs(120);
    let driver = system.driver_on(config, proxied);
    let mut runs = Vec::new();
    // Later and later in the life of a run, in steps that hit every kind of statement.
    for answers in 0..24 {
        runs.push(system.start(ThreadId::new(), "all", json!({})).await);
        proxy.lose_after(answers * 2 + answers % 3);
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
    proxy.lose_after(-1);
    for run in &runs {
        let result = system.wait(run).await;
        assert_eq!(
            (result["n"].as_i64().map(|n| n >= 513), system.status(run).await),
            (Some(true), RunStatus::Success)
        );
        assert_eq!(result["n"], Value::from(513), "each write counted once");
    }
    assert!(proxy.lost() >= 10, "{} answers were lost", proxy.lost());
    driver.stop().await;
    system.check_tables().await;
}
