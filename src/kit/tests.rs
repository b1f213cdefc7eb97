//! Cases that hold, cases that do not, and stores that lose what they were given.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;

use super::*;
use crate::graph::checkpoint::{CheckpointError, Checkpointer, Commit, LoadedRows, ValueRef};
use crate::graph::compile::NoNodes;

/// One graph file with its cases.
fn read(graph: &str, cases: &str) -> Loaded {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("g.yaml"), graph).unwrap();
    std::fs::write(dir.path().join("g.test.yaml"), cases).unwrap();
    load(&[dir.path().join("g.yaml")], &NoNodes).unwrap()
}

fn problems(graph: &str, cases: &str) -> Vec<String> {
    let place = |problem: &crate::graph::check::Diagnostic| {
        let at = problem.location.as_ref().unwrap();
        format!("{}:{}: {}", at.line, at.column, problem.message)
    };
    read(graph, cases).diagnostics.iter().map(place).collect()
}

async fn verdicts(graph: &str, cases: &str, wrap: Option<&Wrap>) -> Vec<Verdict> {
    let loaded = read(graph, cases);
    assert_eq!(loaded.diagnostics, []);
    let mut all = Vec::new();
    for case in &loaded.suites[0].cases {
        all.push(Box::pin(run(case, true, wrap)).await);
    }
    all
}

/// All cases hold, with a crash at each commit.
async fn check(graph: &str, cases: &str) -> Vec<Verdict> {
    let all = verdicts(graph, cases, None).await;
    for verdict in &all {
        let told: Vec<String> = verdict.differences.iter().map(ToString::to_string).collect();
        assert_eq!(told, Vec::<String>::new(), "{}", verdict.name);
    }
    all
}

/// The one case fails, and says so.
async fn check_fails(graph: &str, cases: &str, wrap: Option<&Wrap>, expected: &[&str]) {
    let all = verdicts(graph, cases, wrap).await;
    let told: Vec<String> = all[0].differences.iter().map(ToString::to_string).collect();
    for expected in expected {
        assert!(told.iter().any(|told| told.contains(expected)), "{expected}: {told:#?}");
    }
}

const ACT: &str = "
name: g
state: { log: { type: array, reduce: append } }
nodes:
  first: { set: { log: [begun] } }
  act: { use: pay, with: { euros: 5 }, effect: EFFECT, set: { log: ['${output}'] } }
edges: [start -> first -> act -> end]
";

fn act(effect: &str) -> String {
    ACT.replace("EFFECT", effect)
}

const PAID: &str = "
- name: paid once
  answers: { act: [{ output: paid, asks: { euros: 5 } }] }
  expect: { output: { log: [begun, paid] }, effects: [{ target: pay, count: 1 }] }
";

#[tokio::test]
async fn an_effect_is_not_repeated_and_an_unknown_one_is_sent_again_once() {
    let all = check(&act("effectful"), PAID).await;
    let crashes = all[0].crashes.clone().unwrap();
    assert_eq!((crashes.commits, crashes.runs), (3, 6));
    assert_eq!(crashes.retried, 2, "after the intent, and before the outcome");
    let all = check(&act("idempotent"), PAID).await;
    assert_eq!(all[0].crashes.as_ref().unwrap().retried, 0, "it needs no person");
}

#[tokio::test]
async fn a_run_that_fails_comes_to_the_same_failure_wherever_it_is_dropped() {
    let cases = "
- name: refused
  answers: { act: [{ error: { kind: refused, message: not today, class: fatal } }] }
  expect: { status: error, error: refused }
";
    for effect in ["effectful", "idempotent", "pure"] {
        let all = check(&act(effect), cases).await;
        let crashes = all[0].crashes.clone().unwrap();
        assert!(crashes.commits >= 2, "{effect}: {crashes:?}");
        assert_eq!(crashes.runs, 2 * crashes.commits, "no point is left out");
    }
}

/// Answers that a commit is stored, and forgets it.
struct Forgetful {
    inner: Arc<dyn Checkpointer>,
    forgets: fn(&Commit) -> bool,
}

impl Checkpointer for Forgetful {
    fn load<'a>(
        &'a self,
        namespace: &'a str,
    ) -> BoxFuture<'a, Result<Option<LoadedRows>, CheckpointError>> {
        self.inner.load(namespace)
    }

    fn fetch<'a>(
        &'a self,
        namespace: &'a str,
        refs: Vec<ValueRef>,
    ) -> BoxFuture<'a, Result<HashMap<ValueRef, Vec<u8>>, CheckpointError>> {
        self.inner.fetch(namespace, refs)
    }

    fn commit(&self, commit: Commit) -> BoxFuture<'_, Result<(), CheckpointError>> {
        if (self.forgets)(&commit) {
            return async { Ok(()) }.boxed();
        }
        self.inner.commit(commit)
    }
}

fn forgetful(forgets: fn(&Commit) -> bool) -> Box<Wrap> {
    Box::new(move |inner| Arc::new(Forgetful { inner, forgets }))
}

#[tokio::test]
async fn a_store_that_loses_an_outcome_is_found_out() {
    let last =
        forgetful(|commit| commit.checkpoint.as_ref().is_some_and(|row| row.next.is_empty()));
    let expected = [
        "right after commit 3 of 3 (superstep 2, next the end)",
        "though commit 3 had stored the outcome",
    ];
    check_fails(&act("idempotent"), PAID, Some(&*last), &expected).await;
    // An effectful one is not repeated blindly: a person would be asked of what is known.
    let expected = ["end/status: expected \"success\", found \"interrupted\""];
    check_fails(&act("effectful"), PAID, Some(&*last), &expected).await;
}

#[tokio::test]
async fn a_store_that_loses_an_intent_or_an_early_result_is_found_out() {
    let intents = forgetful(|commit| commit.checkpoint.is_none() && !commit.effects.is_empty());
    // What was begun is begun again, as if nothing had been.
    check_fails(&act("effectful"), PAID, Some(&*intents), &["though nobody knows"]).await;
}

#[tokio::test]
async fn what_is_not_as_expected_is_shown() {
    let cases = "
- name: wrong in every way
  answers: { act: [{ output: paid, asks: { euros: 6 } }, { output: twice }] }
  expect:
    output: { log: [begun, refunded] }
    path: [act, first]
    effects: [{ target: pay, count: 2 }]
    never_called: [first]
    at: 1s
";
    let expected = [
        "answers.act[0].asks/euros: expected 6, found 5",
        "output/log/1: expected \"refunded\", found \"paid\"",
        "path: expected [\"act\",\"first\"], found [\"first\",\"act\"]",
        "calls to pay: expected 2, found 1",
        "calls of first: expected 0, found 1",
        "at: expected \"1s\", found \"0s\"",
    ];
    check_fails(&act("pure"), cases, None, &expected).await;
    let cases = "[{ name: a, expect: { status: error, error: broken }, answers: { act: [{ output: 1 }] } }]";
    let expected = [
        "status: expected \"error\", found \"success\"",
        "error: expected \"broken\", found nothing",
    ];
    check_fails(&act("pure"), cases, None, &expected).await;
}

#[tokio::test]
async fn calls_without_an_answer_and_answers_without_a_call_fail() {
    let expected = ["`act` called pay with {\"euros\":5}, and no use answer is left for that"];
    check_fails(&act("pure"), "[{ name: a, expect: {} }]", None, &expected).await;
    let cases =
        "[{ name: a, expect: {}, answers: { act: [{ output: 1 }, { output: 2, times: 3 }] } }]";
    let expected = ["the answer answers.act[1] (use) was used 0 times of 3"];
    check_fails(&act("pure"), cases, None, &expected).await;
    let cases =
        "[{ name: a, expect: {}, answers: { act: [{ output: 1 }] }, events: [{ name: e }] }]";
    check_fails(&act("pure"), cases, None, &["the event e was not sent"]).await;
}

#[test]
fn cases_are_read_strictly_and_with_places() {
    let check = |cases: &str, expected: &str| {
        let told = problems(&act("pure"), cases);
        assert!(told.iter().any(|told| told.contains(expected)), "{expected}: {told:#?}");
    };
    check("- name: a\n  expcet: {}", "2:3: there is no key `expcet` here");
    check("- name: a", "the key `expect` is missing");
    check("- name: a\n  expect: {}\n- name: a\n  expect: {}", "3:9: another case of the file");
    check("name: a", "1:1: the cases are a list");
    check("- { name: a, graph: h, expect: {} }", "1:21: no graph `h` is in the directory");
    let answers = |answers: &str| format!("- name: a\n  expect: {{}}\n  answers: {answers}");
    check(&answers("{ act: [{ text: hello }] }"), "3:20: `text` does not go with an answer of use");
    check(
        &answers("{ first: [{ output: 1 }] }"),
        "3:14: node `first` of graph `g` needs no answer",
    );
    check(&answers("{ acct: [{ output: 1 }] }"), "has no node and no tool `acct`");
    check(
        &answers("{ act: [{ output: 1, error: { kind: a } }] }"),
        "an `error` or a result, not both",
    );
    check(&answers("{ act: [{ at: 1s }] }"), "nothing is answered");
    check(
        &answers("{ act: [{ output: 1, times: 10001 }] }"),
        "`times` is 10001, it must be 1 to 10000",
    );
    check("- { name: a, expect: { path: [frist] } }", "graph `g` has no node `frist`");
    check("- { name: a, expect: { never_called: [x/y] } }", "has no node and no tool `x/y`");
    let told = problems("{ name: g, nodes: {}, edges: [] }", "- { name: a, expect: {} }");
    assert!(told.iter().any(|told| told.contains("has errors")), "{told:#?}");
    assert!(told.iter().any(|told| told.contains("has no nodes")), "{told:#?}");
}

#[test]
fn files_without_cases_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let graph = dir.path().join("g.yaml");
    std::fs::write(&graph, act("pure")).unwrap();
    let err = |path: PathBuf| load(&[path], &NoNodes).unwrap_err().to_string();
    assert!(err(graph).contains("has no cases: write them into"));
    assert!(err(dir.path().to_owned()).contains("holds no file with cases"));
    assert!(err(dir.path().join("gone.yaml")).contains("cannot be read"));
}

const AGENT: &str = "
name: g
state: { answer: {}, turns: {} }
nodes:
  helper:
    agent:
      prompt: What do the files say?
      tools: [files/read, mail/*]
      approve: [mail/*]
    set: { answer: '${output.text}', turns: '${output.turns}' }
edges: [start -> helper -> end]
";

const ASKED: &str = "
- name: reads two files and sends a mail that a person looks at
  answers:
    helper:
      - model:
          tool_calls:
            - { name: files/read, args: { path: a } }
            - { name: files/read, args: { path: b } }
        asks: { messages: [{ type: human, content: What do the files say? }] }
      - tool: { name: files/read, text: A }
        asks: { path: a }
      - model: { tool_calls: [{ name: mail/send, args: { text: A and B } }, { name: nonsense }] }
      - answer: { action: approve, arguments: { text: A. } }
        asks: { tool: mail/send }
      - model: { text: They say A. }
    files/read: [{ text: B, asks: { path: b } }]
    mail/send: [{ structured: { id: 7 }, asks: { text: A. } }]
  expect:
    output: { answer: They say A., turns: 3 }
    effects:
      - { node: helper, target: files/read, count: 2 }
      - { target: mail/send, count: 1 }
- name: the mail is refused
  answers:
    helper:
      - model: { message: { content: '', tool_calls: [{ name: mail/send }] } }
      - answer: { action: reject, reason: not today }
      - model: { text: Then not. }
  expect: { contains: { answer: Then not. }, never_called: [mail/send] }
";

#[tokio::test]
async fn agents_ask_models_tools_and_people_and_survive_crashes() {
    let all = check(AGENT, ASKED).await;
    assert!(all[0].crashes.as_ref().unwrap().retried > 0);
}

#[tokio::test]
async fn time_passes_at_once() {
    let graph = "
name: g
state: { log: { type: array, reduce: append } }
limits: { duration: 2d }
nodes:
  nap: { wait: { for: 30m } }
  listen: { wait: { event: go, timeout: 20h }, on_error: late, set: { log: ['${output}'] } }
  late: { set: { log: ['${error.kind}'] } }
edges: [start -> nap -> listen -> end, late -> end]
";
    let cases = "
- name: in time
  events: [{ name: go, payload: 1, at: 3h }]
  expect: { output: { log: [1] }, at: 3h, path: [nap, listen] }
- name: too late
  expect: { output: { log: [timeout] }, at: 20h30m, path: [nap, listen, late] }
";
    check(graph, cases).await;
    let graph = graph.replace("2d", "1h");
    let cases = "[{ name: a, expect: { error: duration_limit, at: 1h } }]";
    check(&graph, cases).await;
    let graph =
        graph.replace("timeout: 20h", "").replace(", on_error: late", "").replace("late", "nap");
    let _ = graph;
}

#[tokio::test]
async fn scripted_unknown_outcomes_follow_the_file() {
    let cases = "
- name: a person says that it happened
  answers:
    act:
      - error: { kind: cut, class: unknown }
      - answer: { action: done, output: by hand }
        asks: { reason: unknown_outcome }
  expect: { output: { log: [begun, by hand] }, effects: [{ target: pay, count: 1 }] }
- name: the question stands
  answers: { act: [{ error: { kind: cut, class: unknown } }] }
  expect: { status: interrupted, question: { reason: unknown_outcome } }
";
    check(&act("effectful"), cases).await;
    let wrong = "
- name: a
  answers: { act: [{ error: { kind: cut, class: unknown } }, { answer: sure }] }
  expect: {}
";
    let expected = ["the answer to `act` does not fit the question's schema"];
    check_fails(&act("effectful"), wrong, None, &expected).await;
    let fails = act("effectful").replace("effect: effectful", "effect: effectful, effects: fail");
    let all = check(&fails, PAID).await;
    assert!(all[0].crashes.as_ref().unwrap().declared > 0);
}

#[tokio::test]
async fn failures_are_tried_again_as_often_as_the_file_says() {
    let retried = act("effectful")
        .replace("effect: effectful", "effect: effectful, retry: { attempts: 2, first: 1s }");
    let cases = "
- name: given up after two attempts
  answers: { act: [{ error: { kind: away }, times: 2 }] }
  expect: { error: away, effects: [{ target: pay, count: 2 }] }
";
    check(&retried, cases).await;
}

#[test]
fn the_committed_schema_is_current() {
    let committed = include_str!("../../docs/cases.schema.json");
    assert!(
        committed == cases::json_schema_text(),
        "docs/cases.schema.json is old: cynai graph schema --tests > docs/cases.schema.json"
    );
}
