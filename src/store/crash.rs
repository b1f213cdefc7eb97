//! Points at which a test may kill this process: before and after every COMMIT.
//!
//! A test starts a server with `CYNAI_CRASH_LOG=FILE` to have each point's number and name appended to
//! a file, and with `CYNAI_CRASH_AT=N` to have the process killed (SIGKILL, as by a power cut) at the
//! Nth point. With `CYNAI_FREEZE_AT=NAME:N` it stops (SIGSTOP, as by a long pause of its machine) before the
//! Nth COMMIT of that name, and goes on from there when it is told to. The points exist in builds with debug assertions only; in others they are nothing.
//!
//! **Invariant:** every COMMIT of a write goes through [`before`] and [`after`]: a transaction's through
//! [`commit`], a single statement's through [`around`].

/// A write is about to be committed.
pub fn before(name: &'static str) {
    point("before", name);
}

/// A write was committed.
pub fn after(name: &'static str) {
    point("after", name);
}

#[cfg(not(debug_assertions))]
fn point(_when: &'static str, _name: &'static str) {}

#[cfg(debug_assertions)]
fn point(when: &'static str, name: &'static str) {
    use std::io::Write;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    struct Plan {
        at: Option<u64>,
        freeze: Option<(String, u64)>,
        log: Option<std::path::PathBuf>,
    }
    static PLAN: OnceLock<Plan> = OnceLock::new();
    static PASSED: AtomicU64 = AtomicU64::new(0);
    static NAMED: AtomicU64 = AtomicU64::new(0);

    let plan = PLAN.get_or_init(|| {
        #[expect(
            clippy::disallowed_methods,
            reason = "a switch for tests, absent from release builds"
        )]
        let var = |name: &str| std::env::var(name).ok();
        Plan {
            at: var("CYNAI_CRASH_AT").and_then(|at| at.parse().ok()),
            freeze: var("CYNAI_FREEZE_AT")
                .and_then(|at| {
                    at.rsplit_once(':').map(|(name, at)| (name.to_owned(), at.to_owned()))
                })
                .and_then(|(name, at)| Some((name, at.parse().ok()?))),
            log: var("CYNAI_CRASH_LOG").map(Into::into),
        }
    });
    if plan.at.is_none() && plan.freeze.is_none() && plan.log.is_none() {
        return;
    }
    let number = PASSED.fetch_add(1, Ordering::SeqCst) + 1;
    if let Some(log) = &plan.log
        && let Ok(mut file) = std::fs::OpenOptions::new().create(true).append(true).open(log)
    {
        let _ = writeln!(file, "{number} {when} {name}");
    }
    if let Some((_, at)) =
        plan.freeze.as_ref().filter(|(named, _)| when == "before" && named == name)
        && NAMED.fetch_add(1, Ordering::SeqCst) + 1 == *at
    {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGSTOP);
        // Another thread may take the signal: this one must not go on until it stands still too.
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    if plan.at == Some(number) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
        // The signal is delivered before this returns to the caller; parking makes that certain.
        loop {
            std::thread::park();
        }
    }
}

/// Commits `tx` between two crash points.
///
/// # Errors
/// The database's.
pub async fn commit(
    tx: sqlx::Transaction<'_, sqlx::Postgres>,
    name: &'static str,
) -> Result<(), sqlx::Error> {
    before(name);
    tx.commit().await?;
    after(name);
    Ok(())
}

/// Runs a single statement, which commits by itself, between two crash points.
pub async fn around<T>(name: &'static str, statement: impl Future<Output = T>) -> T {
    before(name);
    let result = statement.await;
    after(name);
    result
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }

    #[test]
    fn no_transaction_is_committed_past_the_crash_points() {
        let mut files = Vec::new();
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
        // Put together, so that this line is not one of those it looks for.
        let needle = ["tx", ".commit()"].concat();
        let with: Vec<_> = files
            .iter()
            .filter(|path| std::fs::read_to_string(path).unwrap().contains(&needle))
            .filter_map(|path| path.file_name()?.to_str())
            .collect();
        assert_eq!(with, ["crash.rs"], "use crash::commit");
    }
}
