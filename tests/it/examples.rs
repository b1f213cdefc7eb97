//! Every example runs to its end, on a real server, with real jobs in real sandboxes; and what the
//! documents show of them is what the program makes.
//!
//! **Invariant:** a file under `examples/` that no case runs fails the test. (`notes-digest` has a test of its own, for
//! the servers that it needs.)

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::server::{Server, Site, Start};

const PROGRAM: &str = env!("CARGO_BIN_EXE_cynai");

/// A run of an example: what it is given, what a person answers when it asks, what comes out.
struct Case {
    graph: &'static str,
    input: Value,
    answer: Option<Value>,
    /// What the output holds at least.
    expected: Value,
}

fn case(graph: &'static str, input: Value, answer: Option<Value>, expected: Value) -> Case {
    Case { graph, input, answer, expected }
}

fn cases() -> Vec<Case> {
    let mut cases = small_cases();
    cases.extend(triage_cases());
    cases
}

fn small_cases() -> Vec<Case> {
    let small = json!({"approved": true, "note": "small enough to go without"});
    let answer = json!({"approve": true, "why": "it is worth it"});
    let count = |file: &str| json!({"file": file, "count": lines_with(file, "ERROR")});
    vec![
        case("hello", json!({}), None, json!({"greeting": "Hello, world!"})),
        case("hello", json!({"name": " you "}), None, json!({"greeting": "Hello, you!"})),
        case("approval", json!({"amount": 20}), None, small),
        case(
            "approval",
            json!({"amount": 500}),
            Some(answer),
            json!({"approved": true, "note": "it is worth it"}),
        ),
        case(
            "count-errors",
            json!({"files": ["postgresql.log", "recommend.json.log"]}),
            None,
            json!({
                "counts": [count("postgresql.log"), count("recommend.json.log")],
                "total": lines_with("postgresql.log", "ERROR"),
            }),
        ),
        case(
            "fan-out",
            json!({"words": ["a", "word"]}),
            None,
            json!({"report": "2 words, the longest has 4 letters", "lengths": {"a": 1, "word": 4}}),
        ),
        case("loop", json!({"goal": 3}), None, json!({"n": 3, "seen": [0, 1, 2]})),
        case(
            "subgraph",
            json!({"people": ["Ada", "Grace"]}),
            None,
            json!({"greetings": ["Hello, Ada!", "Hello, Grace!"]}),
        ),
    ]
}

fn triage_cases() -> Vec<Case> {
    let said_no = json!({"total": 198, "decision": "a person was asked and said no", "report": ""});
    let report = fs::read_to_string(examples().join("log-triage/report.md")).unwrap();
    vec![
        case("triage", json!({}), Some(json!(true)), json!({"total": 198, "report": report})),
        case("triage", json!({}), Some(json!(false)), said_no),
        case(
            "triage",
            json!({"pattern": "nothing*"}),
            None,
            json!({"total": 0, "decision": "nobody was asked"}),
        ),
    ]
}

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples")
}

/// The graph files of a directory and of those in it: name and text.
fn graph_files(dir: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.ends_with("notes-digest") {
            continue;
        }
        if path.is_dir() {
            found.extend(graph_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "yaml")
            && !cynai::graph::load::is_cases(&path)
        {
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            found.push((name, fs::read_to_string(&path).unwrap()));
        }
    }
    found
}

fn logs() -> PathBuf {
    examples().join("log-triage/logs")
}

fn lines_with(file: &str, word: &str) -> usize {
    fs::read_to_string(logs().join(file))
        .unwrap()
        .lines()
        .filter(|line| line.contains(word))
        .count()
}

fn site() -> Site {
    let files = graph_files(&examples());
    let files: Vec<(&str, &str)> =
        files.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    Site::new(&files).with_flags(&["--mount", &format!("logs={}", logs().display())])
}

async fn check(client: &Client, at: usize, case: &Case) {
    let thread = format!("00000000-0000-4000-8000-{at:012}");
    client.ensure_thread(&thread).await.unwrap();
    let wait = async |mut request: Value| {
        request["assistant_id"] = case.graph.into();
        client.post(&format!("/threads/{thread}/runs/wait"), &request).await.unwrap()
    };
    let mut output = wait(json!({"input": case.input})).await;
    assert_eq!(
        output.get("__interrupt__").is_some(),
        case.answer.is_some(),
        "{}: {output}",
        case.graph
    );
    if let Some(answer) = &case.answer {
        output = wait(json!({"command": {"resume": answer}})).await;
    }
    for (name, expected) in case.expected.as_object().unwrap() {
        assert_eq!(output.get(name), Some(expected), "{}: {name} in {output}", case.graph);
    }
}

#[tokio::test]
async fn every_example_runs_to_its_end() {
    let cases = cases();
    let run: BTreeSet<&str> = cases.iter().map(|case| case.graph).collect();
    let files = graph_files(&examples());
    let there: BTreeSet<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(run, there, "each file of examples/ has a case here");
    let site = site();
    let server = site.start(&Start::default()).await;
    let client = server.client();
    for (at, case) in cases.iter().enumerate() {
        check(&client, at, case).await;
    }
}

/// What `cynai ARGUMENTS` prints.
fn cynai(server: &Server, site: &Site, arguments: &[&str]) -> String {
    let done = Command::new(PROGRAM)
        .args(arguments)
        .args(["--server", server.address(), "--token-file"])
        .arg(site.path("token"))
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

#[tokio::test]
async fn who_follows_a_run_is_told_of_every_beginning_and_every_end() {
    let site = site();
    let server = site.start(&Start::default()).await;
    let input = r#"{"pattern": "checkout-*"}"#;
    let told = cynai(&server, &site, &["run", "triage", "--input", input, "--json"]);
    let told: Vec<Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (mut began, mut ended) = (Vec::new(), Vec::new());
    for event in told.iter().filter(|event| event["event"] == "tasks") {
        let list = if event["data"].get("result").is_some() { &mut ended } else { &mut began };
        list.push(event["data"]["name"].as_str().unwrap());
    }
    assert_eq!(began, ["list", "count", "count", "sum_up", "write"]);
    assert_eq!(ended, ["list", "count", "count", "sum_up", "write"]);
}

#[test]
fn the_committed_generator_writes_the_committed_logs() {
    let made = tempfile::tempdir().unwrap();
    let generator = examples().join("log-triage/generate-logs");
    let done = Command::new("python3").arg(&generator).arg(made.path()).output();
    let done = done.expect("python3 runs the generator: apt-get install python3");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let names = |dir: &Path| -> BTreeSet<_> {
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    };
    assert_eq!(names(made.path()), names(&logs()));
    for name in names(&logs()) {
        assert_eq!(
            fs::read(made.path().join(&name)).unwrap(),
            fs::read(logs().join(&name)).unwrap(),
            "{name:?}"
        );
    }
}

#[test]
fn the_documents_show_the_graph_as_it_is() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let draw = |format: &str| {
        let file = examples().join("log-triage/triage.yaml");
        let done = Command::new(PROGRAM)
            .args(["graph", "show", "--format", format])
            .arg(file)
            .output()
            .unwrap();
        assert!(done.status.success());
        String::from_utf8(done.stdout).unwrap()
    };
    let picture = fs::read_to_string(root.join("docs/triage.svg")).unwrap();
    assert_eq!(
        picture,
        draw("svg"),
        "cynai graph show --format svg -o docs/triage.svg examples/log-triage/triage.yaml"
    );
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    assert!(
        readme.contains(&draw("mermaid")),
        "README.md shows what `cynai graph show examples/log-triage/triage.yaml` prints"
    );
}
