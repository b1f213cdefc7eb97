//! Graphs of tests with killed servers, how they end, and how their questions are answered.

use std::path::Path;

use serde_json::{Value, json};

use super::traces;

/// Everything that a run can meet: fan-out, subgraphs, questions, retries, a wait, an act on the world.
pub(crate) const CRASH: &str = r#"
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

/// What `crash` calls.
pub(crate) const BELOW: &str = r#"
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

/// A loop of twelve supersteps.
pub(crate) const LOOP: &str = r#"
name: loop
state:
  n: { type: integer, default: 0 }
nodes:
  step:
    use: test/append
    effect: pure
    with: { file: "${env.TRACES}", label: "${state.n}" }
    set: { n: "${state.n + 1}" }
edges:
  - start -> step
  - from: step
    choose:
      - { when: state.n < 12, to: step }
      - { to: end }
"#;

/// Eight activations of different length at once, three at a time.
pub(crate) const FAN: &str = r#"
name: fan
state:
  total: { type: integer, reduce: sum, default: 0 }
nodes:
  work:
    for_each: ${[1, 2, 3, 4, 5, 6, 7, 8]}
    as: n
    max_parallel: 3
    use: test/append
    with: { file: "${env.TRACES}", label: "${n}", sleep_ms: "${n * 2}" }
    set: { total: "${n}" }
  more:
    for_each: ${[1, 2]}
    as: n
    use: test/append
    effect: pure
    with: { file: "${env.TRACES}", label: "${n}", sleep_ms: 1 }
    set: { total: "${n}" }
edges:
  - start -> work -> more -> end
"#;

/// What `crash` needs.
pub(crate) fn input(graph: &str) -> Value {
    if graph == "crash" { json!({ "numbers": [1, 2, 3, 4, 5] }) } else { json!({}) }
}

/// The values at the end of a run of each graph.
pub(crate) fn expected(graph: &str) -> Value {
    match graph {
        "crash" => json!({
            "numbers": [1, 2, 3, 4, 5],
            "seen": [1, 2, 3, 4, 5],
            "total": 150,
            "below": ["a!", "b!"],
            "steps": ["flaky", "acted", "last"],
            "approved": true,
        }),
        "loop" => json!({ "n": 12 }),
        "fan" => json!({ "total": 39 }),
        _ => panic!("no such graph: {graph}"),
    }
}

/// An answer to each question, by its id.
pub(crate) fn answers(interrupts: &Value, traces: &Path) -> Value {
    let mut answers = serde_json::Map::new();
    for (task, questions) in interrupts.as_object().unwrap() {
        for question in questions.as_array().unwrap() {
            let answer = match question["value"]["reason"].as_str() {
                // Nobody but us knows whether the attempt acted: the file tells.
                Some("unknown_outcome")
                    if traces::read(traces).iter().any(|line| line.task == *task) =>
                {
                    json!({ "action": "done", "output": "acted" })
                }
                Some("unknown_outcome") => json!({ "action": "retry" }),
                // Killed by us several times in a row: it is not the run's fault.
                Some("process_died") => json!(true),
                Some(other) => panic!("an unexpected question: {other}: {question}"),
                None => json!(true),
            };
            answers.insert(question["id"].as_str().unwrap().to_owned(), answer);
        }
    }
    assert!(!answers.is_empty(), "the thread waits for nobody: {interrupts}");
    Value::Object(answers)
}
