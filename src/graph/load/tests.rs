use super::*;
use crate::graph::model::{Effect, NodeKind};
use crate::graph::source::{MAX_DEPTH, MAX_PARTS};

/// Two registered nodes.
struct Registered;

impl NodeNames for Registered {
    fn names(&self) -> Vec<String> {
        vec!["echo".into(), "charge-card".into()]
    }

    fn effect(&self, name: &str) -> Option<Effect> {
        (name == "echo").then_some(Effect::Pure)
    }
}

/// Every diagnostic in one line: the place, the word that stands there, and what is said.
fn described(loaded: &Loaded) -> Vec<String> {
    let describe = |problem: &crate::graph::check::Diagnostic| {
        let at = problem.location.as_ref().unwrap();
        let source = loaded.sources.iter().find(|source| source.file() == at.file).unwrap();
        let word = source.text().get(at.offset..at.offset + at.length).unwrap_or_default();
        let said = problem.to_string();
        let said = said.splitn(4, ':').nth(3).unwrap().trim_start().to_owned();
        format!("{}:{}:{} <{word}> {said}", at.file, at.line, at.column)
    };
    loaded.diagnostics.iter().map(describe).collect()
}

fn diagnostics(text: &str) -> Vec<String> {
    described(&load_all(&[("g", text)], &Registered))
}

#[track_caller]
fn compare(found: &[String], expected: &[&str], text: &str) {
    assert_eq!(found, expected, "{text}");
}

/// What is found in a file, in full.
#[track_caller]
fn check(text: &str, expected: &[&str]) {
    compare(&diagnostics(text), expected, text);
}

/// What is found in a small graph with these nodes and edges, in full.
#[track_caller]
pub(super) fn check_graph(nodes: &str, edges: &str, expected: &[&str]) {
    let text = format!(
        "name: g\nstate:\n  n: {{ type: integer }}\n  m: {{ type: integer }}\n  list: {{ type: array, reduce: append }}\nnodes:\n{nodes}\nedges:\n{edges}\n"
    );
    check(&text, expected);
}

const N: &str = "{ set: { list: [1] } }";

fn nodes(names: &str) -> String {
    names.split(' ').map(|name| format!("  {name}: {N}")).collect::<Vec<_>>().join("\n")
}

pub(super) fn edges(edges: &[&str]) -> String {
    edges.iter().map(|edge| format!("  - {edge}")).collect::<Vec<_>>().join("\n")
}

/// What is found in a graph of nodes that write a collecting channel, in full.
#[track_caller]
fn check_edges(names: &str, list: &[&str], expected: &[&str]) {
    check_graph(&nodes(names), &edges(list), expected);
}

const TRIAGE: &str = r#"
name: triage
description: Count the errors in every log file.
state:
  files:    { type: array, items: { type: string } }
  errors:   { type: array, reduce: append }
  total:    { type: integer, reduce: sum, default: 0 }
  approved: { type: boolean }
  best:     { reduce: "${current == null ? update : max(current, update)}" }
input:  [files]
output: [total, errors]
limits: { supersteps: 200, duration: 1h }
nodes:
  scan:
    for_each: ${state.files}
    as: file
    max_parallel: 16
    job:
      image: sandbox/base
      command: [grep, -c, ERROR, "${file}"]
      resources: { memory_mb: 64, cpus: 0.5 }
      ok_exit_codes: [0, 1]
    timeout: 2m
    retry: { attempts: 3, first: 1s, factor: 2, max: 1m, jitter: true }
    on_error: report_failure
    set:
      total:  ${int(output.stdout.trim())}
      errors: "${[{'file': file, 'count': int(output.stdout.trim())}]}"
      best:   ${int(output.stdout.trim())}
  ask:
    interrupt: { ask: "${state.total} errors. File a report?", schema: { type: boolean }, expires: 24h }
    set: { approved: "${output}" }
  report:
    use: echo
    with: { total: "${state.total}", approved: "${state.approved}" }
  report_failure:
    set: { errors: ["${error.message}"] }
edges:
  - start -> scan
  - from: scan
    choose:
      - { when: state.total > 100, to: ask }
      - { to: report }
  - ask -> report -> end
  - report_failure -> end
"#;

#[test]
fn a_sound_graph_compiles_to_what_the_engine_executes() {
    let graph = load_str("triage.yaml", TRIAGE, &Catalog::default(), &Registered).unwrap();
    let names: Vec<&str> = graph.nodes.iter().map(|node| node.name.as_str()).collect();
    assert_eq!(names, ["ask", "report", "report_failure", "scan"]);
    let scan = graph.node(graph.find_node("scan").unwrap());
    let NodeKind::Job(job) = &scan.kind else { panic!("scan is a job") };
    assert_eq!((job.resources.millicpus, job.resources.memory_mb), (Some(500), Some(64)));
    assert_eq!(job.ok_exit_codes, [0, 1]);
    assert_eq!(scan.effect, Effect::Idempotent);
    assert_eq!(graph.node(graph.find_node("report").unwrap()).effect, Effect::Pure);
    assert_eq!(scan.for_each.as_ref().unwrap().max_parallel, Some(16));
    assert_eq!(scan.route.choose[0].len(), 2);
    assert_eq!(graph.start.to, [graph.find_node("scan").unwrap()]);
    assert!(graph.input_validator.is_valid(&serde_json::json!({ "files": ["a"] })));
    assert!(!graph.input_validator.is_valid(&serde_json::json!({ "files": [1] })));
    assert!(!graph.input_validator.is_valid(&serde_json::json!({ "total": 1 })));
}

#[test]
fn a_stored_graph_compiles_to_the_same_hash_and_shape_whatever_the_order_of_keys() {
    let graph = load_str("triage.yaml", TRIAGE, &Catalog::default(), &Registered).unwrap();
    let stored = graph.file.canonical_json();
    let again = compile::compile_stored(&stored, &|_| None, &Registered).unwrap();
    assert_eq!(again.hash, graph.hash);
    assert_eq!(again.file.canonical_json(), stored);
    let names =
        |graph: &Graph| graph.nodes.iter().map(|node| node.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&again), names(&graph));
    let reordered = TRIAGE
        .replace("input:  [files]\noutput: [total, errors]\n", "")
        .replace("name: triage\n", "output: [total, errors]\ninput:  [files]\nname: triage\n");
    let reordered = load_str("triage.yaml", &reordered, &Catalog::default(), &Registered).unwrap();
    assert_eq!(reordered.hash, graph.hash);
    let changed = TRIAGE.replace("> 100", "> 101");
    let changed = load_str("triage.yaml", &changed, &Catalog::default(), &Registered).unwrap();
    assert_ne!(changed.hash, graph.hash);
}

#[test]
fn a_file_that_holds_no_graph_is_told_what_a_graph_is() {
    check("", &["g:1:1 <> error[syntax]: the file is empty"]);
    check(
        "[1, 2]",
        &[
            "g:1:1 <[1, 2]> error[wrong-type]: a graph file is a map with `name`, `nodes` and `edges`",
        ],
    );
    check(
        "{}",
        &[
            "g:1:1 <{}> error[missing-key]: the graph has no `name`",
            "g:1:1 <{}> error[missing-key]: the graph has no `nodes`",
            "g:1:1 <{}> error[missing-key]: the graph has no `edges`",
        ],
    );
    check("name: g\nnodes: {}\nedges: []", &["g:2:8 <{}> error[no-nodes]: the graph has no nodes"]);
}

#[test]
fn all_problems_of_a_file_are_told_in_one_go() {
    check(
        "name: start\nnoeds: {}\nstate:\n  n: { tpye: integer, reduce: sum }\nnodes:\n  a: { job: { comand: [x] } }\n  b: { set: 3 }\nedges:\n  - { form: a, to: b }\n  - 7\n",
        &[
            "g:1:7 <start> error[name]: `start` is reserved (choose another name for a graph)",
            "g:2:1 <noeds> error[unknown-key]: a graph has no key `noeds` (did you mean `nodes`?)",
            "g:4:8 <tpye> warning[schema-keyword]: `tpye` is no keyword of JSON Schema and has no effect (did you mean `type`?)",
            "g:6:15 <comand> error[unknown-key]: there is no key `comand` here (did you mean `command`?)",
            "g:7:13 <3> error[wrong-type]: expected a map, found integer `3`",
            "g:9:7 <form> error[unknown-key]: there is no key `form` here (did you mean `from`?)",
            "g:10:5 <7> error[wrong-type]: expected an edge: `a -> b`, or a map with `from` and `to` or `choose`, found integer `7`",
        ],
    );
    check(
        "name: start\nstate:\n  n: { tpye: integer, reduce: smu }\nnodes:\n  a: { use: ehco, with: \"${state.m}\", set: { k: 1 } }\nedges:\n  - start -> b\n  - a -> end\n",
        &[
            "g:1:7 <start> error[name]: `start` is reserved (choose another name for a graph)",
            "g:3:8 <tpye> warning[schema-keyword]: `tpye` is no keyword of JSON Schema and has no effect (did you mean `type`?)",
            "g:3:31 <smu> error[reducer]: there is no reducer `smu` (did you mean `sum`?)",
            "g:5:13 <ehco> error[unknown-use]: no node is registered as `ehco` (did you mean `echo`?)",
            "g:5:34 <m> error[unknown-channel]: the state has no channel `m` (did you mean `n`?)",
            "g:5:46 <k> error[unknown-channel]: the state has no channel `k` (did you mean `n`?)",
            "g:7:14 <b> error[unknown-node]: there is no node `b` (did you mean `a`?)",
        ],
    );
}

#[test]
fn a_part_that_cannot_be_read_does_not_hide_the_others() {
    check(
        "name: g\nstate: { n: { reduce: 1 }, m: { type: nmber } }\nnodes:\n  a: { job: { comand: [x] } }\n  b: { set: { n: \"${stat.n}\" } }\nedges:\n  - start -> a -> c\n",
        &[
            "g:2:23 <1> error[wrong-type]: `reduce` is the name of a reducer or `${expression}`",
            "g:2:39 <nmber> error[schema]: JSON Schema has no type `nmber` (did you mean `number`?)",
            "g:4:15 <comand> error[unknown-key]: there is no key `comand` here (did you mean `command`?)",
            "g:5:21 <stat> error[expression]: `stat` is not available here (did you mean `state`?)",
            "g:7:19 <c> error[unknown-node]: there is no node `c` (did you mean `a`?)",
        ],
    );
}

#[test]
fn channels_are_checked_against_their_own_schema_and_reducer() {
    let check = |state: &str, expected: &[&str]| {
        let text = format!(
            "name: g\nstate:\n  {state}\nnodes:\n  a: {{ use: echo }}\nedges: [start -> a -> end]\n"
        );
        super::tests::check(&text, expected);
    };
    check(
        "x: { type: strng }",
        &["g:3:14 <strng> error[schema]: JSON Schema has no type `strng` (did you mean `string`?)"],
    );
    check(
        "x: { type: string, reduce: sum }",
        &["g:3:30 <sum> error[reducer]: the reducer `sum` needs integer or number, `x` is string"],
    );
    check(
        "x: { type: object, reduce: append }",
        &["g:3:30 <append> error[reducer]: the reducer `append` needs array, `x` is object"],
    );
    check(
        "x: { type: integer, default: none }",
        &[
            "g:3:32 <none> error[default]: the default of `x` breaks its schema: value is not of type \"integer\"",
        ],
    );
    check(
        "x: { reduce: \"${current + state.y}\" }",
        &[
            "g:3:16 <\"${current + state.y}\"> error[reducer]: a reducer sees `current` and `update`, not state.y",
            "g:3:35 <y> error[unknown-channel]: the state has no channel `y` (did you mean `x`?)",
        ],
    );
    check(
        "x: { reduce: \"${old + update}\" }",
        &[
            "g:3:19 <old> error[expression]: `old` is not available here (available are `current`, `update`, `state`)",
        ],
    );
    check(
        "x-y: {}",
        &[
            "g:3:3 <x-y> error[name]: \"x-y\" is no name for a channel (use letters, digits and `_`, at most 64 of them)",
        ],
    );
    check(
        "x: { $ref: '#/$defs/n', $defs: { n: { type: integer } }, default: a }",
        &[
            "g:3:69 <a> error[default]: the default of `x` breaks its schema: value is not of type \"integer\"",
        ],
    );
    check(
        "x: { $ref: 'http://example.com/schema' }",
        &[
            "g:3:6 <{ $ref: 'http://example.com/schema' }> error[schema]: this schema refers to what is not in it (put it under `$defs` and refer to `#/$defs/NAME`)",
        ],
    );
    check("x:", &[]);
}

#[test]
fn a_schema_that_refers_to_itself_is_no_endless_loop() {
    for schema in [
        "{ $ref: '#' }",
        "{ anyOf: [{ $ref: '#' }] }",
        "{ allOf: [{ $ref: '#/$defs/a' }], $defs: { a: { $ref: '#/$defs/b' }, b: { $ref: '#/$defs/a' } } }",
        "{ properties: { x: { $ref: '#' } }, type: object }",
    ] {
        let text = format!(
            "name: g\nstate:\n  x: {schema}\nnodes:\n  a: {{ set: {{ x: {{ x: {{}} }} }} }}\nedges: [start -> a -> end]\n"
        );
        assert_eq!(diagnostics(&text), [""; 0], "{schema}");
    }
}

#[test]
fn options_are_checked_against_the_kind_of_the_node() {
    let check = |node: &str, expected: &[&str]| {
        check_graph(&format!("  a: {node}"), &edges(&["start -> a -> end"]), expected)
    };
    check(
        "{}",
        &[
            "g:7:3 <a> error[node-kind]: `a` does nothing (give it `job`, `interrupt`, `wait`, `graph`, `model`, `agent`, `tool`, `use` or `set`)",
        ],
    );
    check(
        "{ use: echo, wait: { for: 1s } }",
        &[
            "g:7:8 <use> error[node-kind]: `a` is `wait` and `use`; a node has one kind (make two nodes of it)",
        ],
    );
    check(
        "{ http: {} }",
        &[
            "g:7:8 <http> error[node-kind]: nodes of the kind `http` are not available in this version",
        ],
    );
    check(
        "{ set: { n: 1 }, timeout: 1s }",
        &[
            "g:7:23 <timeout> error[option]: `timeout` does not go with this kind of node (a `set` takes no time)",
        ],
    );
    check(
        "{ set: { n: 1 }, with: 1, effect: pure, may_goto: [a], retry: { attempts: 2 } }",
        &[
            "g:7:23 <with> error[option]: `with` does not go with this kind of node (only `use` takes an argument)",
            "g:7:32 <effect> error[option]: `effect` does not go with this kind of node (other kinds know what repeating them does)",
            "g:7:46 <may_goto> error[option]: `may_goto` does not go with this kind of node (only the code of a `use` node chooses at run time; use `choose`)",
            "g:7:61 <retry> error[option]: `retry` does not go with this kind of node (there is nothing that another attempt would change)",
        ],
    );
}

#[test]
fn options_are_checked_against_their_ranges() {
    let check = |node: &str, expected: &[&str]| {
        check_graph(&format!("  a: {node}"), &edges(&["start -> a -> end"]), expected)
    };
    check(
        "{ use: echo, as: x, max_parallel: 2 }",
        &[
            "g:7:19 <as> error[option]: `as` has no meaning without `for_each`",
            "g:7:26 <max_parallel> error[option]: `max_parallel` has no meaning without `for_each`",
        ],
    );
    check(
        "{ use: echo, for_each: \"${state.list}\", as: run, max_parallel: 0 }",
        &[
            "g:7:50 <run> error[name]: \"run\" cannot be the name of an item (use an identifier that is none of `state`, `output`, `run`, `env`, `error`, `now`)",
            "g:7:69 <0> error[option]: `max_parallel` must be 1 to 10000",
        ],
    );
    check(
        "{ use: echo, for_each: state.list }",
        &[
            "g:7:29 <state.list> error[expression]: `for_each` needs one expression (write for_each: ${state.NAME})",
        ],
    );
    check(
        "{ use: echo, timeout: 0s, retry: { attempts: 0, factor: 0.5, first: 2m, max: 1m } }",
        &[
            "g:7:28 <0s> error[option]: a bound of no time at all lets nothing happen",
            "g:7:51 <0> error[option]: `attempts` must be 1 to 100, the first included",
            "g:7:62 <0.5> error[option]: `factor` must be 1 to 100",
            "g:7:83 <1m> error[option]: `max` is shorter than the first pause",
        ],
    );
    check(
        "{ use: echo, timeout: 90 }",
        &[
            "g:7:28 <90> error[wrong-type]: expected a duration with a unit, such as 90s, 5m or 1h30m, found integer `90`",
        ],
    );
    check(
        "{ use: echo, timeout: soon }",
        &[
            "g:7:28 <soon> error[wrong-type]: \"soon\" is no duration; write a number and a unit, such as 90s, 5m or 1h30m",
        ],
    );
    check(
        "{ use: echo, on_error: a }",
        &[
            "g:7:29 <a> error[option]: a node cannot handle its own errors: it would run for ever (use `retry`)",
        ],
    );
    check(
        "{ use: echo, may_goto: [b], effect: maybe }",
        &[
            "g:7:42 <maybe> error[wrong-type]: unknown variant `maybe`, expected one of `pure`, `idempotent`, `effectful`",
        ],
    );
    check(
        "{ use: echo, may_goto: [b] }",
        &["g:7:30 <b> error[unknown-node]: there is no node `b` (did you mean `a`?)"],
    );
}

#[test]
fn jobs_interrupts_and_waits_are_checked() {
    let check = |node: &str, expected: &[&str]| {
        check_graph(&format!("  a: {node}"), &edges(&["start -> a -> end"]), expected)
    };
    check(
        "{ job: { command: [] } }",
        &[
            "g:7:24 <[]> error[option]: a job needs a command (write command: [program, argument, ..])",
        ],
    );
    check(
        "{ job: { command: [[x]], env: { A-B: x, C: {} }, mounts: [../x], ok_exit_codes: [] } }",
        &[
            "g:7:25 <[x]> error[wrong-type]: this must be text, a number or a boolean",
            "g:7:38 <A-B> error[name]: \"A-B\" is no name of an environment variable",
            "g:7:49 <{}> error[wrong-type]: this must be text, a number or a boolean",
            "g:7:64 <../x> error[name]: \"../x\" is no name of a mount, or is there twice",
            "g:7:86 <[]> error[option]: without an exit code that is a success the job always fails",
        ],
    );
    check(
        "{ job: { command: [x, \"${output}\"], resources: { cpus: 0, memory_mb: 0 } } }",
        &[
            "g:7:31 <output> error[expression]: `output` is not available here (available are `run`, `env`, `state`)",
            "g:7:61 <0> error[option]: `cpus` must be more than nothing, and within reason",
            "g:7:75 <0> error[option]: `memory_mb` must be more than nothing, and within reason",
        ],
    );
    check(
        "{ interrupt: { schema: { type: bool } }, timeout: 1h }",
        &["g:7:8 <interrupt> error[missing-key]: the key `ask` is missing"],
    );
    check(
        "{ interrupt: { ask: null, schema: { type: bool } }, timeout: 1h }",
        &[
            "g:7:48 <bool> error[schema]: JSON Schema has no type `bool` (did you mean `boolean`?)",
            "g:7:58 <timeout> error[option]: `timeout` does not go with this kind of node (an interrupt has `expires`)",
        ],
    );
    check(
        "{ wait: {} }",
        &["g:7:8 <wait> error[node-kind]: a `wait` has exactly one of `for`, `until` and `event`"],
    );
    check(
        "{ wait: { for: 1x } }",
        &[
            "g:7:21 <1x> error[option]: \"1x\" is no duration; write a number and a unit, such as 90s, 5m or 1h30m",
        ],
    );
    check(
        "{ wait: { until: tomorrow } }",
        &[
            "g:7:23 <tomorrow> error[option]: \"tomorrow\" is no instant such as 2030-01-31T09:00:00Z",
        ],
    );
    check(
        "{ wait: { for: 1s, timeout: 1s } }",
        &["g:7:25 <timeout> error[option]: only a wait for an event has a `timeout`"],
    );
    check(
        "{ wait: { event: \"order-${run.id}\", timeout: 1h }, set: { n: \"${output.n}\" } }",
        &[],
    );
}

#[test]
fn literals_are_checked_against_the_channel_they_are_written_to() {
    let check = |node: &str, expected: &[&str]| {
        check_graph(&format!("  a: {node}"), &edges(&["start -> a -> end"]), expected)
    };
    check(
        "{ set: { n: text } }",
        &[
            "g:7:18 <text> error[value-type]: the value breaks the schema of the channel `n`: value is not of type \"integer\"",
        ],
    );
    check("{ set: { n: \"${'text'}\", list: [1] } }", &[]);
    check(
        "{ set: { list: 1 } }",
        &[
            "g:7:21 <1> error[value-type]: the value breaks the schema of the channel `list`: value is not of type \"array\"",
        ],
    );
    check(
        "{ set: { n: \"${output}\" } }",
        &[
            "g:7:21 <output> error[expression]: `output` is not available here (available are `run`, `env`, `state`)",
        ],
    );
}

#[test]
fn edges_are_checked_one_by_one() {
    check_edges(
        "a b",
        &["start -> a -> b", "a", "b -> end", "a ->"],
        &[
            "g:11:5 <a> error[edge]: \"a\" is no edge (write `a -> b`, or `a -> b -> c`)",
            "g:13:5 <a ->> error[edge]: \"a ->\" is no edge (write `a -> b`, or `a -> b -> c`)",
        ],
    );
    check_edges(
        "a",
        &["start -> a -> end", "end -> a", "a -> start", "start -> end"],
        &[
            "g:10:5 <end> error[edge]: no edge leads from `end`",
            "g:11:10 <start> error[edge]: no edge leads to `start` (name the node that is to run again)",
            "g:12:14 <end> error[edge]: a run that goes from `start` to `end` does nothing",
        ],
    );
    check_edges(
        "a b",
        &["start -> a -> b -> end", "a -> b"],
        &["g:11:10 <b> warning[duplicate-edge]: this edge is already there"],
    );
    check_edges(
        "a b",
        &[
            "start -> a -> b -> end",
            "{ from: a, to: b, choose: [] }",
            "{ from: a }",
            "{ from: a, to: [] }",
            "{ from: a, choose: [] }",
        ],
        &[
            "g:11:5 <{ from: a, to: b, choose: [] }> error[edge]: an edge has exactly one of `to` and `choose`",
            "g:12:5 <{ from: a }> error[edge]: an edge has exactly one of `to` and `choose`",
            "g:13:20 <[]> error[edge]: an edge leads to 1 to 1000 nodes",
            "g:14:24 <[]> error[edge]: a `choose` has 1 to 256 lines",
        ],
    );
    check_edges(
        "a b",
        &["start -> a", "{ from: a, to: [b, b, end] }", "b -> end"],
        &[
            "g:11:24 <b> error[edge]: `b` is named twice",
            "g:11:27 <end> error[edge]: `end` does not go with other targets",
        ],
    );
    check_edges(
        "a b c",
        &[
            "start -> a",
            "start -> b",
            "{ from: [a], to: c }",
            "{ from: [a, a], to: c }",
            "{ from: [a, start], to: c }",
            "{ from: [a, b], to: c }",
            "c -> end",
        ],
        &[
            "g:13:13 <[a]> error[join-empty]: a join waits for two nodes or more (write one name, without a list)",
            "g:14:17 <a> error[join-empty]: `a` is named twice",
            "g:15:17 <start> error[edge]: `start` cannot be waited for: it is always there",
        ],
    );
}

#[test]
fn choices_need_a_way_out_and_conditions_that_can_differ() {
    check_edges(
        "a b",
        &["start -> a", "{ from: a, choose: [{ when: state.n > 1, to: b }] }", "b -> end"],
        &[
            "g:11:25 <{ when: state.n > 1, to: b }> error[choose-no-default]: every line has a condition: the run fails when none of them holds (add a last line with only a target: `- { to: NODE }`)",
        ],
    );
    check_edges(
        "a b",
        &[
            "start -> a",
            "{ from: a, choose: [{ to: b }, { when: state.n > 1, to: end }, { to: end }] }",
            "b -> end",
        ],
        &[
            "g:11:25 <{ to: b }> error[choose-unreachable]: the lines after one without a condition are never tried",
        ],
    );
    check_edges(
        "a b",
        &[
            "start -> a",
            "{ from: a, choose: [{ when: 1 > 2, to: b }, { when: \"${state.n > 1}\", to: b }, { when: 1 + 1, to: b }, { to: end }] }",
            "b -> end",
        ],
        &[
            "g:11:33 <1 > 2> warning[constant-condition]: this condition is always false",
            "g:11:57 <\"${state.n > 1}\"> error[expression]: a condition is a bare expression (write it without `${` and `}`)",
            "g:11:92 <1 + 1> error[expression]: a condition must be true or false",
        ],
    );
    check_edges(
        "a b",
        &[
            "start -> a",
            "{ from: a, choose: [{ when: state.m >, to: b }, { when: output == 1, to: b }, { to: end }] }",
            "b -> end",
        ],
        &[
            "g:11:42 <> error[expression]: syntax error: mismatched input '<EOF>'",
            "g:11:61 <output> error[expression]: `output` is not available here (available are `run`, `env`, `state`)",
        ],
    );
    check_edges(
        "a b c",
        &["start -> a", "start -> b", "{ from: [a, b], choose: [{ to: c }] }", "c -> end"],
        &[
            "g:13:13 <[a, b]> error[edge]: a choice is made after one node (join the nodes in a node first, and choose after that one)",
        ],
    );
}

#[test]
fn nodes_that_nothing_leads_to_or_from_are_told() {
    check_edges(
        "a b c",
        &["start -> a -> end", "b -> c -> b"],
        &[
            "g:8:3 <b> error[unreachable]: no path from `start` leads to `b` (add an edge to it, or remove it)",
            "g:9:3 <c> error[unreachable]: no path from `start` leads to `c` (add an edge to it, or remove it)",
        ],
    );
    check_edges(
        "a b",
        &["start -> a -> b"],
        &[
            "g:8:3 <b> error[dead-end]: no edge leads from `b` (write `b -> end` when the run should end there)",
        ],
    );
    check_edges(
        "a",
        &["a -> end"],
        &[
            "g:8:1 <edges> error[no-start]: no edge leads from `start` to a node, so nothing would run (add the edge `start -> a`)",
        ],
    );
    check_edges(
        "a b c",
        &["start -> a -> b -> c -> b"],
        &[
            "g:8:3 <b> error[no-exit]: no path leads out of the circle of `b`, `c` (add a `choose` with a line that leaves it)",
        ],
    );
    check_edges(
        "a b",
        &["start -> a -> b", "{ from: b, choose: [{ when: state.n > 3, to: end }, { to: a }] }"],
        &[],
    );
    check_graph(
        "  a: { use: echo, may_goto: [b] }\n  b: { use: echo }",
        &edges(&["start -> a", "b -> a"]),
        &[],
    );
}

#[test]
fn a_join_whose_sources_exclude_each_other_can_never_fire() {
    let choice = "{ from: a, choose: [{ when: state.n > 1, to: b }, { to: c }] }";
    check_edges(
        "a b c d",
        &["start -> a", choice, "{ from: [b, c], to: d }", "d -> end"],
        &[
            "g:14:13 <[b, c]> error[join-never]: this join can never fire: its sources are on different ways of a choice (when the choice after `a` goes to `b`, `b` runs and `c` does not) (let the ways meet in one node before the join, or join only what always runs)",
        ],
    );
    // Both run when the line leads to both.
    check_edges(
        "a b c d",
        &[
            "start -> a",
            "{ from: a, choose: [{ when: state.n > 1, to: [b, c] }, { to: end }] }",
            "{ from: [b, c], to: d }",
            "d -> end",
        ],
        &[],
    );
    // A source that nothing leads to.
    check_edges(
        "a b c",
        &["start -> a", "{ from: [a, b], to: c }", "c -> end"],
        &[
            "g:8:3 <b> error[unreachable]: no path from `start` leads to `b` (add an edge to it, or remove it)",
            "g:12:13 <[a, b]> error[join-never]: this join can never fire: `b` never runs",
        ],
    );
    // In a loop the choice may go the other way in the next round, so it is no more than possible.
    let looped = "{ from: d, choose: [{ when: state.n > 9, to: end }, { to: a }] }";
    check_edges(
        "a b c d e",
        &["start -> a", choice, "b -> d", "c -> d", looped, "{ from: [b, c], to: e }", "e -> end"],
        &[
            "g:18:13 <[b, c]> warning[join-maybe]: when the choice after `a` goes to `b`, `b` runs and `c` does not: this join would wait for ever (let the ways meet in one node before the join, or join only what always runs)",
        ],
    );
}

#[test]
fn a_join_that_can_be_bypassed_is_a_warning() {
    let choice = "{ from: b, choose: [{ when: state.n > 1, to: c }, { to: end }] }";
    check_edges(
        "a b c d",
        &["start -> a", "start -> b", choice, "{ from: [a, c], to: d }", "d -> end"],
        &[
            "g:15:13 <[a, c]> warning[join-maybe]: when the choice after `b` goes to `end`, `a` runs and `c` does not: this join would wait for ever (let the ways meet in one node before the join, or join only what always runs)",
        ],
    );
    let failing = "  a: { use: echo, on_error: h }\n  b: { use: echo }\n  c: { use: echo }\n  h: { use: echo }";
    check_graph(
        failing,
        &edges(&["start -> a", "start -> b", "{ from: [a, b], to: c }", "c -> end", "h -> end"]),
        &[
            "g:14:13 <[a, b]> warning[join-maybe]: when `a` fails and goes to its `on_error`, `b` runs and `a` does not: this join would wait for ever (let the ways meet in one node before the join, or join only what always runs)",
        ],
    );
    // The advice: both ways meet before the join.
    let meeting = format!("{failing}\n  m: {{ use: echo }}");
    check_graph(
        &meeting,
        &edges(&["start -> a -> m", "start -> b", "h -> m", "{ from: [m, b], to: c }", "c -> end"]),
        &[],
    );
    check_edges("a b c", &["start -> a", "start -> b", "{ from: [a, b], to: c }", "c -> end"], &[]);
}

#[test]
fn two_writers_of_one_channel_in_one_superstep_are_told() {
    let two = "  a: { set: { n: 1 } }\n  b: { set: { n: 2 } }\n  c: { set: { m: 1 } }";
    check_graph(
        two,
        &edges(&["start -> a", "start -> b", "{ from: [a, b], to: c }", "c -> end"]),
        &[
            "g:8:15 <n> error[two-writers]: `a` and `b` write `n` in the same superstep (give the channel a reducer, or put the nodes one after the other)",
        ],
    );
    check_graph(two, &edges(&["start -> a -> b -> c -> end"]), &[]);
    // The same number of steps after a fan-out.
    check_graph(
        &format!("{two}\n{}", nodes("p q")),
        &edges(&["start -> p -> a -> end", "start -> q -> b -> end", "start -> c -> end"]),
        &[
            "g:8:15 <n> error[two-writers]: `a` and `b` write `n` in the same superstep (give the channel a reducer, or put the nodes one after the other)",
        ],
    );
    // Another number of steps: never together.
    check_graph(
        &format!("{two}\n{}", nodes("p")),
        &edges(&["start -> p -> a -> end", "start -> b -> c -> end"]),
        &[],
    );
    // Only when the choice goes that way.
    check_graph(
        &format!("{two}\n{}", nodes("p")),
        &edges(&[
            "start -> p",
            "start -> c -> b -> end",
            "{ from: p, choose: [{ when: state.m > 1, to: a }, { to: end }] }",
            "a -> end",
        ]),
        &[
            "g:8:15 <n> warning[maybe-two-writers]: `a` and `b` may write `n` in the same superstep (give the channel a reducer, or put the nodes one after the other)",
        ],
    );
    // Two lines of one choice exclude each other.
    check_graph(
        &format!("{two}\n{}", nodes("p")),
        &edges(&[
            "start -> p",
            "{ from: p, choose: [{ when: state.m > 1, to: a }, { to: b }] }",
            "a -> c",
            "b -> c",
            "c -> end",
        ]),
        &[],
    );
    // After a join nothing of the branches runs any more.
    check_graph(
        &format!("{two}\n{}", nodes("p q")),
        &edges(&["start -> p", "start -> q -> b", "{ from: [p, b], to: a }", "a -> c -> end"]),
        &[],
    );
    check_graph(
        "  a: { for_each: \"${state.list}\", set: { n: \"${item}\", list: [\"${item}\"] } }",
        &edges(&["start -> a -> end"]),
        &[
            "g:7:42 <n> error[fan-out-writer]: every item writes `n`, which takes one write in a superstep (give the channel a reducer, such as `reduce: append`)",
        ],
    );
}

#[test]
fn channels_that_nothing_writes_or_reads_are_told() {
    check(
        "name: g\nstate: { a: {}, b: {}, c: {} }\ninput: [c]\noutput: [a]\nnodes:\n  x: { set: { a: \"${state.b}\" } }\nedges: [start -> x -> end]",
        &[
            "g:2:24 <c> warning[unused-channel]: nothing reads `c`, and it is no output",
            "g:6:18 <\"${state.b}\"> warning[never-written]: `b` is read here, and nothing ever sets it (set it in a node, name it in `input`, or give it a default)",
        ],
    );
    check(
        "name: g\nstate: { a: {} }\ninput: [a, b, a]\noutput: [aa]\nlimits: { supersteps: 0 }\nnodes:\n  x: { use: echo }\nedges: [start -> x -> end]",
        &[
            "g:3:12 <b> error[unknown-channel]: the state has no channel `b` (did you mean `a`?)",
            "g:3:15 <a> error[name]: `a` is named twice",
            "g:4:10 <aa> error[unknown-channel]: the state has no channel `aa` (did you mean `a`?)",
            "g:5:23 <0> error[option]: `supersteps` is 0, it must be 1 to 1000000",
        ],
    );
}

#[test]
fn the_error_is_in_scope_only_where_an_on_error_leads() {
    let nodes = "  a: { use: echo, on_error: h }\n  h: { set: { list: [\"${error.message}\"] } }\n  b: { set: { list: [\"${error.message}\"] } }";
    check_graph(
        nodes,
        &edges(&["start -> a -> b -> end", "h -> end"]),
        &[
            "g:9:25 <error> error[expression]: `error` is not available here (available are `run`, `env`, `state`)",
        ],
    );
}

#[track_caller]
fn check_files(files: &[(&str, &str)], expected: &[&str], graphs: &[&str]) -> Loaded {
    let loaded = load_all(files, &Registered);
    compare(&described(&loaded), expected, "");
    let names: Vec<&str> = loaded.catalog.iter().map(|graph| graph.name.as_str()).collect();
    assert_eq!(names, graphs);
    loaded
}

fn caller(name: &str, call: &str) -> String {
    format!(
        "name: {name}\nstate: {{ n: {{ type: integer }} }}\nnodes:\n  c: {{ graph: {call}, set: {{ n: \"${{output.n}}\" }} }}\nedges: [start -> c -> end]\n"
    )
}

const LEAF: &str = "name: leaf\nstate: { n: { type: integer }, hidden: {} }\ninput: [n]\nnodes:\n  x: { set: { n: \"${state.n + 1}\" } }\nedges: [start -> x -> end]\n";

#[test]
fn graphs_call_each_other_by_name_in_any_order_of_files() {
    let top = caller("top", "{ name: middle, input: { n: 1 } }");
    let middle = caller("middle", "leaf");
    let loaded = check_files(
        &[("top", &top), ("middle", &middle), ("leaf", LEAF)],
        &[],
        &["leaf", "middle", "top"],
    );
    let top_hash = loaded.catalog.get("top").unwrap().hash;
    let changed = LEAF.replace("+ 1", "+ 2");
    let loaded = check_files(
        &[("top", &top), ("middle", &middle), ("leaf", &changed)],
        &[],
        &["leaf", "middle", "top"],
    );
    assert_ne!(
        loaded.catalog.get("top").unwrap().hash,
        top_hash,
        "a change below changes the hash above"
    );
    assert_eq!(
        loaded.catalog.get("top").unwrap().subgraphs().keys().collect::<Vec<_>>(),
        ["leaf", "middle"]
    );
}

#[test]
fn calls_that_cannot_work_are_told_in_the_calling_file() {
    check_files(
        &[("a", &caller("a", "laef")), ("leaf", LEAF)],
        &["a:4:15 <laef> error[unknown-graph]: there is no graph `laef` (did you mean `leaf`?)"],
        &["leaf"],
    );
    check_files(
        &[("a", &caller("a", "{ name: leaf, input: { m: 1, hidden: 2, n: x } }")), ("leaf", LEAF)],
        &[
            "a:4:38 <m> error[unknown-channel]: the graph `leaf` has no input `m` (did you mean `n`?)",
            "a:4:44 <hidden> error[unknown-channel]: the graph `leaf` has no input `hidden` (there are `n`)",
            "a:4:58 <x> error[value-type]: the value breaks the schema of the channel `n`: value is not of type \"integer\"",
        ],
        &["leaf"],
    );
    check_files(
        &[("1", LEAF), ("2", LEAF)],
        &["2:1:7 <leaf> error[duplicate-graph]: the graph `leaf` is already defined in 1"],
        &["leaf"],
    );
    check_files(
        &[("a", &caller("a", "b")), ("b", "name: b\nnodes: {}\nedges: []")],
        &[
            "a:4:15 <b> error[unknown-graph]: there is no graph `b` (it is refused for errors of its own)",
            "b:2:8 <{}> error[no-nodes]: the graph has no nodes",
        ],
        &[],
    );
}

#[test]
fn circles_of_calls_are_refused() {
    check_files(
        &[
            ("a", &caller("a", "b")),
            ("b", &caller("b", "a")),
            ("c", &caller("c", "a")),
            ("d", &caller("d", "d")),
        ],
        &[
            "a:4:15 <b> error[graph-cycle]: graphs call each other in a circle: a -> b -> a",
            "b:4:15 <a> error[graph-cycle]: graphs call each other in a circle: b -> a -> b",
            "c:4:15 <a> error[unknown-graph]: the graph `a` cannot be loaded (it is part of a circle of calls)",
            "d:4:15 <d> error[graph-cycle]: graphs call each other in a circle: d -> d",
        ],
        &[],
    );
}

#[test]
fn a_file_over_a_limit_is_refused_quickly() {
    let started = std::time::Instant::now();
    let big = format!("name: g\nx: '{}'", "y".repeat(10 << 20));
    check(&big, &["g:1:1 <> error[too-large]: the file has 10485773 bytes, the limit is 1048576"]);
    let many: String = (0..2_001).map(|at| format!("  n{at}: {{ set: {{ n: 1 }} }}\n")).collect();
    check(
        &format!("name: g\nnodes:\n{many}edges: []"),
        &["g:2:1 <nodes> error[too-large]: `nodes` has 2001 entries, the limit is 2000"],
    );
    let mut bomb = String::from("name: g\nl0: &l0 [x, x, x, x, x, x, x, x, x, x]\n");
    for level in 1..9 {
        bomb.push_str(&format!(
            "l{level}: &l{level} [{}]\n",
            vec![format!("*l{}", level - 1); 10].join(", ")
        ));
    }
    assert!(
        diagnostics(&bomb)[0].contains(&format!("more than {MAX_PARTS} keys")),
        "{:?}",
        diagnostics(&bomb)
    );
    let deep = format!("name: g\nx: {}{}", "[".repeat(200), "]".repeat(200));
    assert!(diagnostics(&deep)[0].contains("error["), "{:?}", diagnostics(&deep));
    let deep = format!("name: g\nx: {}{}", "[".repeat(MAX_DEPTH), "]".repeat(MAX_DEPTH));
    assert!(
        diagnostics(&deep)[0].contains("error[too-large]: the file nests deeper"),
        "{:?}",
        diagnostics(&deep)
    );
    let terms = format!(
        "name: g\nstate: {{ n: {{}} }}\nnodes:\n  a: {{ set: {{ n: \"${{{}}}\" }} }}\nedges: [start -> a -> end]",
        vec!["1"; 3_000].join("+")
    );
    assert!(
        diagnostics(&terms)[0].contains("the expression has 5999 bytes, the limit is 2048"),
        "{:?}",
        diagnostics(&terms)
    );
    assert!(started.elapsed().as_secs() < 20, "took {:?}", started.elapsed());
}

#[test]
fn a_graph_of_the_largest_size_is_checked_in_time() {
    let started = std::time::Instant::now();
    let nodes: String =
        (0..1_000).map(|at| format!("  n{at}: {{ set: {{ n{}: 1 }} }}\n", at % 400)).collect();
    let state: String = (0..400).map(|at| format!("  n{at}: {{ type: integer }}\n")).collect();
    let mut edges = String::new();
    for at in (0..996).step_by(4) {
        edges.push_str(&format!("  - {{ from: n{at}, to: [n{}, n{}] }}\n  - {{ from: [n{}, n{}], to: n{} }}\n  - n{} -> n{}\n", at + 1, at + 2, at + 1, at + 2, at + 3, at + 3, at + 4));
    }
    let text = format!(
        "name: g\nstate:\n{state}nodes:\n{nodes}edges:\n  - start -> n0\n{edges}  - n996 -> n997 -> n998 -> n999 -> end\n"
    );
    check(&text, &[]);
    assert!(started.elapsed().as_secs() < 30, "took {:?}", started.elapsed());
}

#[test]
fn files_and_directories_are_loaded_and_what_cannot_be_read_is_named() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("leaf.yaml"), LEAF).unwrap();
    std::fs::write(
        dir.path().join("a.json"),
        serde_json::to_string(&serde_json::json!({
            "name": "a", "nodes": { "c": { "graph": "leaf" } }, "edges": ["start -> c -> end"],
        }))
        .unwrap(),
    )
    .unwrap();
    std::fs::write(dir.path().join("notes.txt"), "no graph").unwrap();
    let loaded = load_dir(dir.path(), &Registered).unwrap();
    assert_eq!(
        (loaded.catalog.len(), loaded.diagnostics.len()),
        (2, 0),
        "{:?}",
        loaded.diagnostics
    );
    std::fs::write(dir.path().join("big.yaml"), vec![b' '; 10 << 20]).unwrap();
    let loaded = load_dir(dir.path(), &Registered).unwrap();
    assert!(
        loaded.diagnostics[0]
            .to_string()
            .ends_with("error[too-large]: the file has 10485760 bytes, the limit is 1048576"),
        "{:?}",
        loaded.diagnostics
    );
    let err = load_paths(&[dir.path().join("nope.yaml")], &Registered).unwrap_err();
    assert!(err.to_string().ends_with("nope.yaml cannot be read"), "{err}");
}

#[test]
fn diagnostics_are_rendered_with_the_line_and_what_is_meant() {
    let text = "name: g\nstate: { n: {} }\nnodes:\n  a: { set: { n: \"${stat.n}\" } }\nedges: [start -> a -> end]\n";
    let loaded = load_all(&[("g.yaml", text)], &Registered);
    let shown = crate::graph::check::render::render(&loaded.diagnostics, &loaded.sources, false);
    for part in [
        "expression",
        "`stat` is not available here",
        "g.yaml:4:21",
        "${stat.n}",
        "──",
        "did you mean `state`?",
    ] {
        assert!(shown.contains(part), "{part:?} is not in:\n{shown}");
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(150))]

    #[test]
    fn no_mutation_of_a_file_makes_the_loader_panic(
        at in 0..TRIAGE.len(),
        remove in 0..40_usize,
        insert in "[-a-z0-9 :{}\\[\\]\"'$>&*|\n]{0,12}",
    ) {
        let mut text = TRIAGE.to_owned();
        let end = (at + remove).min(text.len());
        text.replace_range(at..end, &insert);
        for problem in load_all(&[("g.yaml", &text)], &Registered).diagnostics {
            assert!(problem.location.is_some(), "{problem} has no place");
            assert!(crate::graph::check::find_rule(problem.code).is_some(), "{problem} has no rule");
        }
    }
}

#[test]
fn every_example_loads_without_a_complaint() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let loaded = load_dir(&dir, &compile::NoNodes).unwrap();
    let found: Vec<String> = loaded.diagnostics.iter().map(ToString::to_string).collect();
    assert_eq!(found, [""; 0]);
    for name in ["hello", "loop", "fan-out", "approval", "count-errors", "subgraph"] {
        let graph = loaded.catalog.get(name).expect(name);
        assert!(graph.file.description.is_some(), "{name} says what it does");
        let again = compile::compile_stored(
            &graph.file.canonical_json(),
            &|name| loaded.catalog.get(name),
            &compile::NoNodes,
        );
        assert_eq!(again.unwrap().hash, graph.hash, "{name}");
    }
}
