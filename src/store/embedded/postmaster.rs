//! The database's processes: is one alive, are any left over, how to end them.
//!
//! A process id alone proves nothing: after a crash or a reboot it may be anybody's. A process counts as
//! this cluster's when its working directory is the cluster (every PostgreSQL process stays there) and
//! its program is `postgres`; both are the kernel's word, read from /proc.
//!
//! **Invariant:** no signal goes to a process that was not recognised in that way just before.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::{Instant, sleep};

use super::error::EmbeddedError;
use super::layout::read_small;

/// How often a start or a stop looks whether it is done.
pub(super) const POLL: Duration = Duration::from_millis(10);
/// How long processes without a postmaster may take to notice, before they are told, then made to end.
const LEFT_OVER: [(Duration, Option<Signal>); 3] = [
    (Duration::from_secs(5), None),
    (Duration::from_secs(5), Some(Signal::SIGQUIT)),
    (Duration::from_secs(5), Some(Signal::SIGKILL)),
];

/// What PostgreSQL wrote about its running server into the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PidFile {
    pub(super) pid: i32,
    pub(super) ready: bool,
}

impl PidFile {
    pub(super) fn path(cluster: &Path) -> PathBuf {
        cluster.join("postmaster.pid")
    }

    /// The file's content; none when it is missing, or not completely written yet.
    pub(super) fn read(cluster: &Path) -> Option<Self> {
        Self::parse(&read_small(&Self::path(cluster)).ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let pid: i32 = lines.next()?.trim().parse().ok().filter(|pid| *pid > 1)?;
        // The eighth line is the status, which comes last.
        let ready = lines.nth(6).is_some_and(|status| status.trim() == "ready");
        Some(Self { pid, ready })
    }
}

/// Whether process `pid` belongs to `cluster`.
pub(super) fn belongs(pid: i32, cluster: &Path) -> bool {
    let process = PathBuf::from(format!("/proc/{pid}"));
    fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd == cluster)
        && fs::read_to_string(process.join("comm")).is_ok_and(|name| name.trim() == "postgres")
}

/// The postmaster of `cluster`, if one is alive.
pub(super) fn alive(cluster: &Path) -> Option<PidFile> {
    PidFile::read(cluster).filter(|file| belongs(file.pid, cluster))
}

/// Whether the running server was started with exactly these arguments.
pub(super) fn started_with(cluster: &Path, arguments: &[String]) -> bool {
    let expected: String = arguments.iter().map(|argument| format!(" \"{argument}\"")).collect();
    read_small(&cluster.join("postmaster.opts"))
        .is_ok_and(|opts| opts.trim_end().ends_with(expected.as_str()))
}

/// Sends `signal` to a process of `cluster`; to nobody when it is not one.
pub(super) fn send(pid: i32, cluster: &Path, signal: Signal) {
    if belongs(pid, cluster) {
        // It may end in between; then there is nothing left to do.
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// Waits until `pid` is gone; false when it still lives after `limit`.
pub(super) async fn gone(pid: i32, cluster: &Path, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    while belongs(pid, cluster) {
        if Instant::now() >= deadline {
            return false;
        }
        sleep(POLL).await;
    }
    true
}

/// Makes sure that a cluster without a living postmaster can be started: waits for the processes that
/// a dead one left behind (they hold its shared memory), and removes a pid file that would make
/// PostgreSQL take a stranger for it.
pub(super) async fn clear_left_overs(cluster: &Path) -> Result<(), EmbeddedError> {
    for (limit, signal) in LEFT_OVER {
        let left = processes(cluster);
        if left.is_empty() {
            return remove_misleading_pid_file(cluster);
        }
        tracing::info!("waiting for {} processes of a database that was killed", left.len());
        if let Some(signal) = signal {
            left.iter().for_each(|pid| send(*pid, cluster, signal));
        }
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline && !processes(cluster).is_empty() {
            sleep(POLL).await;
        }
    }
    let pids = processes(cluster);
    if pids.is_empty() {
        return remove_misleading_pid_file(cluster);
    }
    Err(EmbeddedError::NotStopped { pids, cluster: cluster.to_owned() })
}

/// PostgreSQL clears a stale file by itself, but not when the process id in it is in use again.
fn remove_misleading_pid_file(cluster: &Path) -> Result<(), EmbeddedError> {
    let path = PidFile::path(cluster);
    let Some(file) = PidFile::read(cluster) else { return Ok(()) };
    if !Path::new(&format!("/proc/{}", file.pid)).exists() {
        return Ok(());
    }
    tracing::info!("removing {}: process {} is not a database", path.display(), file.pid);
    match fs::remove_file(&path) {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
            Err(EmbeddedError::Files { action: "remove", path, source: err })
        }
        _ => Ok(()),
    }
}

/// Every process of `cluster`.
fn processes(cluster: &Path) -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| belongs(*pid, cluster))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Option<(i32, bool)>) {
        let expected = expected.map(|(pid, ready)| PidFile { pid, ready });
        assert_eq!(PidFile::parse(text), expected, "{text:?}");
    }

    #[test]
    fn pid_file_is_read_in_every_state_of_its_writing() {
        let whole = "4711\n/data/cluster\n1732320000\n5432\n/sock\n\n  5432001  32768\nready   \n";
        check(whole, Some((4711, true)));
        check(&whole.replace("ready   ", "starting"), Some((4711, false)));
        check("4711\n/data/cluster\n", Some((4711, false)));
        check("", None);
        check("0\n", None);
        check("-1\n", None);
        check("1\n", None);
    }

    #[test]
    fn a_stranger_with_the_pid_of_a_dead_server_is_not_taken_for_it() {
        let cluster = tempfile::tempdir().unwrap();
        let me = std::process::id();
        let file = format!("{me}\n{}\n1\n5432\n/s\n\n 1 1\nready   \n", cluster.path().display());
        fs::write(PidFile::path(cluster.path()), file).unwrap();
        assert_eq!(alive(cluster.path()), None);
    }

    #[tokio::test]
    async fn a_pid_file_that_names_a_stranger_is_removed_and_a_stale_one_is_left_to_postgres() {
        let cluster = tempfile::tempdir().unwrap();
        let path = PidFile::path(cluster.path());
        fs::write(&path, format!("{}\n", std::process::id())).unwrap();
        clear_left_overs(cluster.path()).await.unwrap();
        assert!(!path.exists());
        // Above any pid that Linux gives out.
        fs::write(&path, "2147483646\n").unwrap();
        clear_left_overs(cluster.path()).await.unwrap();
        assert!(path.exists());
    }
}
