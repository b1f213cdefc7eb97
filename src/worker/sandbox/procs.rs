//! The machine's process table, as `/proc` shows it: who descends from whom, and which sandboxes an
//! earlier agent left behind.
//!
//! A process is named by its id and its start time together, because ids are used again.
//!
//! **Invariant:** nothing is signalled that was not seen to be part of one of our sandboxes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::ids::JobId;

/// One line of the process table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) pid: i32,
    pub(super) parent: i32,
    /// In clock ticks since the machine started.
    pub(super) started: u64,
    /// Dead, but not yet waited for.
    pub(super) zombie: bool,
    /// Waits for something, in a system call.
    pub(super) sleeping: bool,
}

impl Process {
    pub(super) fn find(pid: i32) -> Option<Self> {
        parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// Whether this very process, not another one with its id, is still running.
    pub(super) fn is_alive(&self) -> bool {
        Self::find(self.pid).is_some_and(|now| now.started == self.started && !now.zombie)
    }

    /// Signals this very process; it may be gone already.
    pub(super) fn signal(&self, signal: Signal) {
        if self.is_alive() {
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }
}

/// Fields 1, 3, 4 and 22; the name in field 2 may hold anything, even parentheses.
fn parse_stat(stat: &str) -> Option<Process> {
    let (head, tail) = stat.rsplit_once(')')?;
    let pid = head.split_once(' ')?.0.parse().ok()?;
    let fields: Vec<&str> = tail.split_ascii_whitespace().collect();
    Some(Process {
        pid,
        zombie: matches!(*fields.first()?, "Z" | "X"),
        sleeping: *fields.first()? == "S",
        parent: fields.get(1)?.parse().ok()?,
        started: fields.get(19)?.parse().ok()?,
    })
}

fn all() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(Process::find)
        .collect()
}

/// Everything that descends from `root`, without `root` itself.
pub(super) fn descendants(root: Process) -> Vec<Process> {
    if !root.is_alive() {
        return Vec::new();
    }
    let mut children: BTreeMap<i32, Vec<Process>> = BTreeMap::new();
    for process in all() {
        children.entry(process.parent).or_default().push(process);
    }
    let mut found = Vec::new();
    let mut open = vec![root.pid];
    while let Some(pid) = open.pop() {
        for child in children.remove(&pid).unwrap_or_default() {
            open.push(child.pid);
            found.push(child);
        }
    }
    found
}

/// The bubblewrap processes of these jobs, recognised by the marker on their command line.
pub(super) fn sandboxes_of(jobs: &[JobId]) -> Vec<Process> {
    let wanted: BTreeSet<String> = jobs.iter().map(ToString::to_string).collect();
    if wanted.is_empty() {
        return Vec::new();
    }
    let is_ours = |process: &Process| {
        let Ok(line) = fs::read(format!("/proc/{}/cmdline", process.pid)) else { return false };
        marked_job(&line).is_some_and(|job| wanted.contains(&job))
    };
    all().into_iter().filter(is_ours).collect()
}

/// The job that a command line of ours names: `.. --setenv CYNAI_JOB_ID ID --args ..`.
fn marked_job(command_line: &[u8]) -> Option<String> {
    let parts: Vec<&[u8]> = command_line.split(|byte| *byte == 0).collect();
    let at = parts.windows(2).position(|pair| pair == [&b"--setenv"[..], b"CYNAI_JOB_ID"])?;
    Some(String::from_utf8_lossy(parts.get(at + 2)?).into_owned())
}

/// Kills the processes and waits until they are gone; returns how many are still there at the end.
pub(super) async fn kill_and_wait(processes: &[Process], patience: Duration) -> usize {
    let deadline = tokio::time::Instant::now() + patience;
    let mut pause = Duration::from_micros(200);
    loop {
        let alive = processes.iter().filter(|process| process.is_alive());
        let alive = alive.inspect(|process| process.signal(Signal::SIGKILL)).count();
        if alive == 0 || tokio::time::Instant::now() >= deadline {
            return alive;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(stat: &str, expected: Option<Process>) {
        assert_eq!(parse_stat(stat), expected);
    }

    #[test]
    fn a_process_may_have_any_name() {
        let tail = "1 5 5 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 777 8 9";
        let process = Process { pid: 42, parent: 1, started: 777, zombie: false, sleeping: true };
        check(&format!("42 (sh) S {tail}"), Some(process));
        check(&format!("42 (a) R 9 9 (b) S {tail}"), Some(process));
        check(
            &format!("42 (sh) Z {tail}"),
            Some(Process { zombie: true, sleeping: false, ..process }),
        );
        check("42 (sh) S 1", None);
        check("", None);
    }

    #[test]
    fn only_our_marker_names_a_job() {
        let line = |text: &str| marked_job(text.replace(' ', "\0").as_bytes());
        assert_eq!(line("bwrap --setenv CYNAI_JOB_ID abc --args 3"), Some("abc".to_owned()));
        assert_eq!(line("bwrap --setenv OTHER abc --args 3"), None);
        assert_eq!(line("bwrap --setenv CYNAI_JOB_ID"), None);
    }

    #[test]
    fn this_process_is_alive_and_not_its_own_descendant() {
        let me = Process::find(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(me.is_alive());
        assert!(!descendants(me).contains(&me));
        assert!(!Process { started: me.started + 1, ..me }.is_alive());
    }
}
