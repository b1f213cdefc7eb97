//! `cynai graph test` as a person uses it; and the cases of every graph that is shipped.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn cynai(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cynai"))
        .args(["graph", "test"])
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env_clear()
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn yaml_files(dir: &Path, found: &mut BTreeSet<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            yaml_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "yaml") {
            found.insert(path);
        }
    }
}

#[test]
fn every_shipped_graph_has_cases_that_hold_wherever_the_engine_dies() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for dir in ["examples", "graphs"] {
        let mut files = BTreeSet::new();
        yaml_files(&root.join(dir), &mut files);
        assert!(!files.is_empty());
        for file in files.iter().filter(|file| !cynai::graph::load::is_cases(file)) {
            let cases = file.with_extension("test.yaml");
            assert!(files.contains(&cases), "{} is missing", cases.display());
        }
        let done = cynai(&[dir, "--crash-everywhere", "--json"]);
        let told: Value = serde_json::from_slice(&done.stdout).unwrap();
        assert!(done.status.success(), "{told:#}");
        assert_eq!(told["failed"], 0);
        for case in told["cases"].as_array().unwrap() {
            let commits = case["crashes"]["commits"].as_u64().unwrap();
            let runs = case["crashes"]["runs"].as_u64().unwrap();
            assert!(runs == 2 * commits || runs + 1 == 2 * commits, "{case}");
        }
    }
}

#[test]
fn a_case_that_fails_fails_the_command_and_says_where() {
    let dir = tempfile::tempdir().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    std::fs::copy(root.join("examples/hello.yaml"), dir.path().join("hello.yaml")).unwrap();
    let cases =
        "- name: wrong\n  expect: { output: { greeting: Bye } }\n- { name: right, expect: {} }\n";
    let file = dir.path().join("hello.test.yaml");
    std::fs::write(&file, cases).unwrap();
    let graph = dir.path().join("hello.yaml");
    let graph = graph.to_str().unwrap();
    let done = cynai(&[graph]);
    assert_eq!(done.status.code(), Some(1));
    let told = text(&done.stdout);
    assert!(told.contains("FAILED") && told.contains("hello.test.yaml: wrong ("), "{told}");
    let line = "- output/greeting: expected \"Bye\", found \"Hello, world!\"";
    assert!(told.contains(line) && told.contains("2 cases: 1 ok, 1 FAILED"), "{told}");
    assert!(text(&done.stderr).contains("1 of 2 cases failed"));
    let done = cynai(&[graph, "--case", "right"]);
    assert!(done.status.success() && text(&done.stdout).starts_with("ok"), "{done:?}");
    let done = cynai(&[graph, "--case", "rihgt"]);
    assert_eq!(done.status.code(), Some(1));
    assert!(text(&done.stderr).contains("there is no case"));
    std::fs::write(&file, "- name: a\n  expcet: {}\n").unwrap();
    let done = cynai(&[graph]);
    assert_eq!(done.status.code(), Some(1));
    let told = text(&done.stderr);
    assert!(told.contains("expcet") && told.contains("no case was run: 1 error"), "{told}");
}
