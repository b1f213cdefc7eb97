//! The benchmark itself: its smallest workload, so that it does not rot between measurements.

use std::path::Path;
use std::process::Command;

const PROGRAM: &str = env!("CARGO_BIN_EXE_cynai");
const FLOOR: &str = env!("CARGO_BIN_EXE_cynai-floor");

/// Runs workloads of `benches/bench.py` at their smallest, and gives its lines.
fn measure(workloads: &str) -> Vec<serde_json::Value> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/bench.py");
    let output = Command::new("python3")
        .arg(script)
        .args(["--quick", "--only", workloads, "--server", PROGRAM, "--floor", FLOOR])
        // No measurement waits for a quiet machine here: nobody looks at the figures.
        .env("QUIET_WAIT", "0")
        .env_remove("DATABASE_URL")
        .output()
        .expect("python3 runs: apt-get install python3");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "the benchmark failed:\n{told}");
    let lines = String::from_utf8(output.stdout).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn value(lines: &[serde_json::Value], peer: &str, workload: &str, metric: &str) -> f64 {
    let found = lines.iter().find(|line| {
        line["peer"] == peer && line["workload"] == workload && line["metric"] == metric
    });
    let line = found.unwrap_or_else(|| panic!("no {peer} {workload} {metric} in {lines:#?}"));
    line["value"].as_f64().unwrap()
}

#[test]
fn the_benchmark_measures_kills_and_loses_nothing() {
    let lines = measure("floor,W2,W4");
    for setting in ["fsync", "synchronous_commit", "full_page_writes"] {
        assert_eq!(value(&lines, "cynai", "settings", setting), 1.0, "{setting}");
    }
    // A step is one row and its index entry: many times as much would be a defect, whatever the machine.
    let wal = value(&lines, "floor", "W1.chain", "wal_bytes_per_step@64");
    assert!((100.0..2000.0).contains(&wal), "the floor writes {wal} bytes of WAL a step");
    assert!(value(&lines, "cynai", "W2", "branches_per_s@16") > 1.0);
    for workload in ["W4", "W4.64"] {
        assert_eq!(value(&lines, "cynai", workload, "runs_lost"), 0.0, "{workload}");
        assert_eq!(value(&lines, "cynai", workload, "steps_run_again"), 0.0, "{workload}");
    }
}

#[test]
fn calls_and_readers_are_measured_beside_those_that_go_without() {
    let lines = measure("W8,W9,W10");
    for workload in ["W8.stream.0ms", "W8.plain.0ms", "W9.stdio.act.0ms", "W9.http.look.0ms"] {
        let (ours, direct) = ("cynai", "direct");
        let [through, by_hand] =
            [ours, direct].map(|peer| value(&lines, peer, workload, "call_p50@16"));
        assert!(
            by_hand > 0.0 && through > by_hand,
            "{workload}: {through} ms, directly {by_hand} ms"
        );
    }
    // That every reader got every token in order is checked by the benchmark itself.
    assert!(value(&lines, "cynai", "W10.flat.readers8.deaf2", "tokens_read_per_s") > 1.0);
    assert!(value(&lines, "cynai", "W10.flat.readers8", "run_ratio") > 0.0);
}
