//! Servers are killed at random moments while runs act on the world: nothing whose outcome was recorded happens
//! again, and what nobody knows the outcome of is sent again under its key, or a person is asked.
//!
//! The world writes down what happens to it: the tool server in a file, the model endpoint in the test's own memory.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::{Value, json};
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::Desk;
use crate::crash_random::{Dice, setting};
use crate::support::client::{CallError, Client};
use crate::support::server::{PATIENCE, Server, Site, Start};
use crate::support::traces::quiet;

/// Twenty effects: in each of four rounds two calls that a person has to decide about, two that may be repeated,
/// and a model's message.
const EFFECTS: &str = r#"
name: effects
state:
  n: { type: integer, default: 0 }
  acted: { type: integer, reduce: sum, default: 0 }
  put: { type: integer, reduce: sum, default: 0 }
  said: { type: array, reduce: append }
nodes:
  act:
    tool: { server: s, name: act, arguments: { label: "${'act-' + string(state.n)}", milliseconds: 8 } }
    effects: ask
    set: { acted: 1 }
  put:
    for_each: ${['a', 'b']}
    tool: { server: s, name: put, arguments: { label: "${item}", milliseconds: 4 } }
    set: { put: 1 }
  say:
    model: { prompt: "Say {{ state.n }}." }
    set: { said: "${[output.text]}" }
  again:
    tool: { server: s, name: act, arguments: { label: "${'again-' + string(state.n)}" } }
    effects: ask
    set: { acted: 1, n: "${state.n + 1}" }
edges:
  - start -> act
  - { from: act, to: [put, say] }
  - { from: [put, say], to: again }
  - from: again
    choose:
      - { when: state.n < 4, to: act }
      - { to: end }
"#;

/// Runs under way at once.
const RUNS: usize = 4;
const EACH: usize = 20;
const LOOK: Duration = Duration::from_millis(15);

/// How often the world has met each key: by kind, `act`, `put` or `say`.
fn met(desk: &Desk) -> BTreeMap<String, (String, usize)> {
    let mut met: BTreeMap<String, (String, usize)> = BTreeMap::new();
    let text = std::fs::read_to_string(desk.site.path("calls")).unwrap_or_default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (tool, key) = (words.next().unwrap(), words.next().unwrap());
        met.entry(key.to_owned()).or_insert_with(|| (tool.to_owned(), 0)).1 += 1;
    }
    for (key, count) in desk.endpoint.calls_by_key() {
        met.insert(key, ("say".to_owned(), count));
    }
    met
}

/// What is recorded: each key with its status, and how often it was about to be sent.
async fn recorded(db: &mut PgConnection) -> BTreeMap<String, (String, usize)> {
    let rows = sqlx::query("select task_id::text || '-' || attempt, status, sends from effects")
        .fetch_all(db)
        .await
        .unwrap();
    let row = |row: &sqlx::postgres::PgRow| {
        (row.get(0), (row.get(1), usize::try_from(row.get::<i32, _>(2)).unwrap()))
    };
    rows.iter().map(row).collect()
}

/// Runs as their user sees them.
struct World {
    desk: Desk,
    /// Threads, and whether their run was accepted.
    threads: Vec<(String, bool)>,
    ended: usize,
    /// How often a person was asked what happened, and said that it had.
    asked: usize,
    had_happened: usize,
}

impl World {
    /// One look at each run. Those that ended are replaced while there are to be `more`.
    async fn look(&mut self, client: &Client, more: bool) {
        for at in (0..self.threads.len()).rev() {
            match self.attend(client, at).await {
                Ok(true) => {
                    self.ended += 1;
                    self.threads.swap_remove(at);
                    if more {
                        self.threads.push((Uuid::now_v7().to_string(), false));
                    }
                }
                Ok(false) | Err(CallError::Lost(_)) => {}
                Err(CallError::Refused(status, _)) if status.is_server_error() => {}
                // It was answered by a request whose own answer was lost.
                Err(CallError::Refused(StatusCode::CONFLICT, _)) => {}
                Err(err) => panic!("the server refuses: {err:?}"),
            }
        }
    }

    async fn attend(&mut self, client: &Client, at: usize) -> Result<bool, CallError> {
        let (thread, accepted) = self.threads[at].clone();
        if !accepted {
            client.ensure_thread(&thread).await?;
            if client.runs(&thread).await?.is_empty() {
                client.start_run(&thread, "effects", json!({ "input": {} })).await?;
            }
            self.threads[at].1 = true;
            return Ok(false);
        }
        let state = client.thread(&thread).await?;
        match state["status"].as_str().unwrap() {
            "busy" => Ok(false),
            "idle" => {
                let values = &state["values"];
                let counts = ["acted", "put", "n"].map(|name| values[name].clone());
                assert_eq!(counts, [8, 8, 4].map(Value::from), "{state}");
                assert_eq!(values["said"], json!(["ok", "ok", "ok", "ok"]));
                Ok(true)
            }
            "interrupted" => {
                let resume = self.answers(&state["interrupts"]);
                client
                    .start_run(&thread, "effects", json!({ "command": { "resume": resume } }))
                    .await?;
                Ok(false)
            }
            other => panic!("a run is {other}: {state}"),
        }
    }

    /// What a person finds out who looks at the world.
    fn answers(&mut self, interrupts: &Value) -> Value {
        let met = met(&self.desk);
        let mut answers = serde_json::Map::new();
        for question in
            interrupts.as_object().unwrap().values().flat_map(|of| of.as_array().unwrap())
        {
            let value = &question["value"];
            let answer = match value["reason"].as_str().unwrap() {
                "process_died" => json!(true),
                "unknown_outcome" => {
                    self.asked += 1;
                    assert_eq!(value["sent"]["target"], "s/act", "{question}");
                    let key = value["sent"]["idempotency_key"].as_str().unwrap();
                    if met.contains_key(key) {
                        self.had_happened += 1;
                        json!({ "action": "done" })
                    } else {
                        json!({ "action": "retry" })
                    }
                }
                other => panic!("{other}: {question}"),
            };
            answers.insert(question["id"].as_str().unwrap().to_owned(), answer);
        }
        assert!(!answers.is_empty(), "the thread waits for nobody");
        Value::Object(answers)
    }

    /// Keeps the runs going until the world has met `more` more effects, or until all have ended.
    async fn progress(&mut self, server: &Server, more: Option<usize>) {
        let client = server.client();
        let count = |desk: &Desk| met(desk).values().map(|(_, count)| count).sum::<usize>();
        let target = more.map(|more| count(&self.desk) + more);
        let begun = Instant::now();
        loop {
            self.look(&client, more.is_some()).await;
            let reached = match target {
                Some(target) => count(&self.desk) >= target,
                None => self.threads.is_empty(),
            };
            if reached {
                return;
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "no progress: {:?}\n{}",
                self.threads,
                server.log_tail()
            );
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Nothing that was recorded as over before was met by the world since.
    fn check(&self, before: &Snapshot) {
        let now = met(&self.desk);
        for (key, count) in &before.over {
            let now = now.get(key).map_or(0, |(_, count)| *count);
            assert_eq!(now, *count, "the outcome of {key} was recorded, and it happened again");
        }
    }
}

/// What was over at a moment when no server lived: how often the world had met it.
struct Snapshot {
    over: BTreeMap<String, usize>,
    open: usize,
}

impl Snapshot {
    async fn take(desk: &Desk, db: &mut PgConnection) -> Self {
        quiet(db).await;
        let (recorded, met) = (recorded(db).await, met(desk));
        let over =
            recorded.iter().filter(|(_, (status, _))| status == "done" || status == "failed");
        let times = |key: &String| met.get(key).map_or(0, |(_, count)| *count);
        let over: BTreeMap<String, usize> =
            over.map(|(key, _)| (key.clone(), times(key))).collect();
        let open = recorded.len() - over.len();
        Self { over, open }
    }
}

async fn kill_among_effects(kills: u32) {
    let seed = setting("CYNAI_CRASH_SEED")
        .unwrap_or_else(|| u64::try_from(Uuid::now_v7().as_u128() >> 64).unwrap());
    let limit =
        setting("CYNAI_CRASH_SECONDS").filter(|seconds| *seconds > 0).map(Duration::from_secs);
    println!("seed: CYNAI_CRASH_SEED={seed}");
    let mut dice = Dice(seed);
    let site = Site::new(&[("effects", EFFECTS)]).with_flags(&["--lease", "30s"]);
    let desk = Desk::at(site, "counting_mcp.py").await;
    let threads = (0..RUNS).map(|_| (Uuid::now_v7().to_string(), false)).collect();
    let mut world = World { desk, threads, ended: 0, asked: 0, had_happened: 0 };
    let begun = Instant::now();
    let mut server = world.desk.site.start(&Start::default()).await;
    let mut db = world.desk.site.database().await;
    let (mut made, mut open) = (0, 0);
    let mut before: Option<Snapshot> = None;
    while made < kills && limit.is_none_or(|limit| begun.elapsed() < limit) {
        let more = 1 + usize::try_from(dice.roll(16)).unwrap();
        world.progress(&server, Some(more)).await;
        // So that the moment is not always the end of a look.
        tokio::time::sleep(Duration::from_micros(dice.roll(25_000))).await;
        server.kill();
        made += 1;
        if let Some(before) = &before {
            world.check(before);
        }
        let now = Snapshot::take(&world.desk, &mut db).await;
        open += now.open;
        before = Some(now);
        server = world.desk.site.start(&Start::default()).await;
    }
    world.progress(&server, None).await;
    world.check(&before.expect("there was a kill"));

    let (recorded, met) = (recorded(&mut db).await, met(&world.desk));
    assert_eq!(recorded.len(), EACH * world.ended, "each effect has one key, and no run has more");
    let mut again = 0;
    for (key, (status, sends)) in &recorded {
        assert_eq!(status, "done", "{key}");
        let (kind, times) = &met[key];
        assert!(times <= sends, "{key} was met {times} times, and was to be sent {sends} times");
        if kind == "act" {
            // A person decided each time that it was not known.
            assert_eq!(*times, 1, "{key}");
        }
        again += times - 1;
    }
    assert_eq!(met.len(), recorded.len(), "nothing was sent that was not told before");
    println!(
        "{made} of {kills} kills in {:.1?}: {} runs, {} effects, {open} open at kills, {again} sent again, \
         {} asked about, of which {} had happened",
        begun.elapsed(),
        world.ended,
        recorded.len(),
        world.asked,
        world.had_happened,
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn effects_random_20() {
    kill_among_effects(20).await;
}

/// Honours `CYNAI_CRASH_SECONDS`: then it may stop before it has made all its kills, and says how many.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crash_long_effects_300() {
    kill_among_effects(300).await;
}
