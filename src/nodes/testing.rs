//! `test/append`: a node whose executions leave a trace outside the database, for tests with killed servers.
//!
//! It is registered when a build with debug assertions is started with `CYNAI_TEST_NODES=1`; a release
//! build does not have it. Each attempt appends one line to a file, in one write, so that lines of
//! several servers do not mix and none is torn by a kill:
//!
//! ```text
//! THREAD|NAMESPACE|BRANCH|SEQ|TASK|ATTEMPT|NODE|LABEL|EVENT
//! ```
//!
//! **Invariant:** the line is in the file before the attempt does anything else.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::graph::exec::{Activation, Node, NodeError, Outcome};
use crate::graph::model::{Effect, NodeKind};

/// The name in graph files.
pub const APPEND: &str = "test/append";

/// The longest that an attempt may sleep.
const MAX_SLEEP_MS: u64 = 600_000;

/// Appends `THREAD|..|LABEL|EVENT` to a file, then sleeps, fails or answers as it is told.
#[derive(Debug, Clone, Copy, Default)]
pub struct Append;

/// `with:` of the node.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Argument {
    /// The file, made when it is missing.
    file: String,
    /// Ends each line: tells activations apart for people.
    #[serde(default)]
    label: Value,
    /// How long an attempt takes.
    #[serde(default)]
    sleep_ms: u64,
    /// So many attempts fail; the next one succeeds.
    #[serde(default)]
    fail_first: u32,
    /// What the node gives back.
    #[serde(default)]
    output: Value,
    /// Whether the end of the sleep is traced too.
    #[serde(default)]
    trace_end: bool,
    /// While it sleeps, a line is traced this often.
    #[serde(default)]
    tick_ms: u64,
}

impl Node for Append {
    fn run<'a>(
        &'a self,
        activation: &'a Activation<'a>,
    ) -> BoxFuture<'a, Result<Outcome, NodeError>> {
        async move {
            let argument = argument(activation)?;
            trace(activation, &argument, "run")?;
            if argument.sleep_ms > 0 {
                activation.custom.send(json!({ "sleeping_ms": argument.sleep_ms }));
                sleep(activation, &argument).await?;
            }
            if argument.trace_end {
                trace(activation, &argument, "end")?;
            }
            if activation.attempt <= argument.fail_first {
                return Err(NodeError::retryable(
                    "told_to_fail",
                    format!("attempt {} was told to fail", activation.attempt),
                ));
            }
            Ok(Outcome::output(argument.output))
        }
        .boxed()
    }

    fn effect(&self) -> Effect {
        Effect::Idempotent
    }
}

/// Sleeps, in parts when it is to trace between them.
async fn sleep(activation: &Activation<'_>, argument: &Argument) -> Result<(), NodeError> {
    let mut left = argument.sleep_ms.min(MAX_SLEEP_MS);
    let part = if argument.tick_ms > 0 { argument.tick_ms } else { left };
    while left > 0 {
        tokio::time::sleep(Duration::from_millis(part.min(left))).await;
        left = left.saturating_sub(part);
        if argument.tick_ms > 0 {
            trace(activation, argument, "tick")?;
        }
    }
    Ok(())
}

fn argument(activation: &Activation<'_>) -> Result<Argument, NodeError> {
    let NodeKind::Use { with, .. } = &activation.node.kind else {
        return Err(NodeError::fatal("internal", "not a `use` node"));
    };
    serde_json::from_value(activation.eval(with)?)
        .map_err(|err| NodeError::fatal("argument", format!("`with` of {APPEND}: {err}")))
}

fn trace(activation: &Activation<'_>, argument: &Argument, event: &str) -> Result<(), NodeError> {
    let label = match &argument.label {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let line = format!(
        "{}|{}|{}|{}|{}|{}|{}|{label}|{event}|",
        activation.thread_id,
        // Namespaces of subgraphs hold the separator.
        activation.namespace.replace('|', "/"),
        activation.planned.branch,
        activation.planned.seq,
        activation.task.id,
        activation.attempt,
        activation.node.name,
    );
    append(Path::new(&argument.file), &line)
        .map_err(|err| NodeError::fatal("append", format!("{}: {err}", argument.file)))
}

/// The length of a record. It divides a page: the kernel writes a page at a time and may stop between two of
/// them when the process is killed, so a record of another length could be torn.
const RECORD: usize = 256;

fn append(path: &Path, line: &str) -> std::io::Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    if line.len() >= RECORD {
        return Err(std::io::Error::other(format!("a line of {RECORD} bytes or more")));
    }
    let mut record = line.as_bytes().to_vec();
    record.resize(RECORD - 1, b' ');
    record.push(b'\n');
    file.write_all(&record)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(with: Value, expected: Result<(u64, u32), &str>) {
        let read = serde_json::from_value::<Argument>(with);
        let found = read
            .map(|argument| (argument.sleep_ms, argument.fail_first))
            .map_err(|err| err.to_string());
        match (found, expected) {
            (Err(found), Err(expected)) => assert!(found.contains(expected), "{found}"),
            (found, expected) => assert_eq!(found, expected.map_err(str::to_owned)),
        }
    }

    #[test]
    fn an_argument_names_a_file_and_nothing_that_is_not_known() {
        check(json!({ "file": "f" }), Ok((0, 0)));
        check(json!({ "file": "f", "sleep_ms": 5, "fail_first": 2 }), Ok((5, 2)));
        check(json!({ "sleep_ms": 5 }), Err("missing field `file`"));
        check(json!({ "file": "f", "slep_ms": 5 }), Err("unknown field `slep_ms`"));
    }

    #[test]
    fn lines_are_appended_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lines");
        append(&path, "a|1|").unwrap();
        append(&path, "b|2|").unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().map(str::trim_end).collect::<Vec<_>>(), ["a|1|", "b|2|"]);
        assert_eq!(text.len(), 2 * RECORD);
        assert!(append(&path, &"x".repeat(RECORD)).is_err());
    }
}
