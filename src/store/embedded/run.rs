//! Running a helper program to its end: bounded in time, its output kept only as far as people read it.

use std::io;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::error::EmbeddedError;

/// For a program that only prints something.
pub(super) const QUICK: Duration = Duration::from_secs(20);
/// For making a cluster, with every file synced to disk.
pub(super) const SLOW: Duration = Duration::from_secs(300);

const TAIL_LINES: usize = 20;
const TAIL_BYTES: usize = 4096;

/// Runs `command` to its end and returns what it printed.
pub(super) async fn finish(
    command: Command,
    program: &Path,
    limit: Duration,
) -> Result<Output, EmbeddedError> {
    feed(command, program, limit, "").await
}

/// Runs `command` to its end with `input` on its standard input.
///
/// It gets a process group of its own, so that a terminal's Ctrl-C reaches only us, and it is killed
/// when the caller is cancelled.
pub(super) async fn feed(
    mut command: Command,
    program: &Path,
    limit: Duration,
    input: &str,
) -> Result<Output, EmbeddedError> {
    let failed = |source: io::Error| EmbeddedError::Run { program: program.to_owned(), source };
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ended early closes its input; its exit status and output tell more.
        let _ = stdin.write_all(input.as_bytes()).await;
    }
    match tokio::time::timeout(limit, child.wait_with_output()).await {
        Ok(output) => output.map_err(failed),
        Err(_) => {
            Err(EmbeddedError::TooSlow { program: program.to_owned(), seconds: limit.as_secs() })
        }
    }
}

/// The last lines of `text`: what a person needs to see of a log.
pub(super) fn tail(text: &[u8]) -> String {
    let text = &text[text.len().saturating_sub(TAIL_BYTES)..];
    let text = String::from_utf8_lossy(text);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let from = lines.len().saturating_sub(TAIL_LINES);
    if lines.is_empty() { "(nothing)".to_owned() } else { lines[from..].join("\n") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        assert_eq!(tail(text.as_bytes()), expected);
    }

    #[test]
    fn tail_keeps_the_last_lines_and_drops_empty_ones() {
        check("", "(nothing)");
        check("one\n\ntwo\n", "one\ntwo");
        let many: Vec<String> = (0..50).map(|n| format!("line {n}")).collect();
        check(&many.join("\n"), &many[30..].join("\n"));
    }

    #[tokio::test]
    async fn a_program_that_hangs_is_ended_with_an_error() {
        let mut command = Command::new("/bin/sleep");
        command.arg("60");
        let limit = Duration::from_millis(50);
        let err = finish(command, Path::new("/bin/sleep"), limit).await.unwrap_err();
        assert!(matches!(err, EmbeddedError::TooSlow { .. }), "{err}");
    }
}
