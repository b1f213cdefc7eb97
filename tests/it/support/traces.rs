//! What activations left in a file, joined with what the database holds of them.
//!
//! The file tells what ran; the tables tell what was committed. An activation whose result was committed
//! when a server died must not run again, and neither must an attempt that was recorded as failed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use sqlx::{PgConnection, Row};

use super::server::until;

/// One line of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Trace {
    pub(crate) thread: String,
    pub(crate) namespace: String,
    pub(crate) branch: i32,
    pub(crate) seq: i64,
    pub(crate) task: String,
    pub(crate) attempt: i32,
    pub(crate) node: String,
    pub(crate) label: String,
    pub(crate) event: String,
}

/// The superstep that an activation belongs to: thread, namespace, branch, planning seq.
type Place = (String, String, i32, i64);

/// What was committed at one moment at which no server was alive.
#[derive(Debug, Default)]
pub(crate) struct Committed {
    lines: usize,
    /// Activations with a stored result.
    done: BTreeSet<String>,
    /// Supersteps that are complete.
    complete: BTreeSet<Place>,
    /// The attempt that comes next, where one is recorded.
    attempts: BTreeMap<String, i32>,
    /// Activations whose job is completed, and how many jobs they have had.
    jobs: BTreeMap<String, i64>,
}

/// Waits until nothing of a dead server is under way in the database.
pub(crate) async fn quiet(db: &mut PgConnection) {
    until("the dead server's statements end", async || {
        let busy: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity
              where application_name = 'cynai' and datname = current_database() and pid <> pg_backend_pid()",
        )
        .fetch_one(&mut *db)
        .await
        .unwrap();
        (busy == 0).then_some(())
    })
    .await;
}

/// Every line of the file.
pub(crate) fn read(path: &Path) -> Vec<Trace> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .map(|line| parse(line).unwrap_or_else(|| panic!("a torn line: {line:?}")))
        .collect()
}

fn parse(line: &str) -> Option<Trace> {
    let parts: Vec<&str> = line.split('|').collect();
    // What follows the last separator pads the line.
    let [thread, namespace, branch, seq, task, attempt, node, label, event, _] =
        parts.try_into().ok()?;
    Some(Trace {
        thread: thread.to_owned(),
        namespace: namespace.to_owned(),
        branch: branch.parse().ok()?,
        seq: seq.parse().ok()?,
        task: task.to_owned(),
        attempt: attempt.parse().ok()?,
        node: node.to_owned(),
        label: label.to_owned(),
        event: event.to_owned(),
    })
}

impl Committed {
    /// Reads what is committed. The servers are dead; what they had sent to the database is waited for.
    pub(crate) async fn read(db: &mut PgConnection, traces: &Path) -> Self {
        quiet(db).await;
        let mut found = Self { lines: read(traces).len(), ..Self::default() };
        let rows =
            sqlx::query("select task_id::text from writes").fetch_all(&mut *db).await.unwrap();
        found.done = rows.iter().map(|row| row.get(0)).collect();
        let rows = sqlx::query(
            "select thread_id::text, namespace, branch, seq from checkpoints where source = 1",
        )
        .fetch_all(&mut *db)
        .await
        .unwrap();
        for row in rows {
            let namespace: String = row.get(1);
            let seq: i64 = row.get(3);
            found.complete.insert((row.get(0), namespace.replace('|', "/"), row.get(2), seq - 1));
        }
        let rows = sqlx::query("select task_id::text, attempt from pending")
            .fetch_all(&mut *db)
            .await
            .unwrap();
        found.attempts = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        found.jobs = jobs_of_completed(db).await;
        found
    }

    /// Panics when something ran after this moment that was committed before it.
    pub(crate) async fn check(&self, db: &mut PgConnection, traces: &Path) {
        let jobs = jobs_of_completed(db).await;
        for (task, count) in &self.jobs {
            assert_eq!(
                jobs.get(task),
                Some(count),
                "the job of {task} was completed, and another one was made"
            );
        }
        let all = read(traces);
        for line in &all[self.lines..] {
            assert!(
                !self.done.contains(&line.task),
                "its result was committed, and it ran again: {line:?}"
            );
            let place = (line.thread.clone(), line.namespace.clone(), line.branch, line.seq);
            assert!(
                !self.complete.contains(&place),
                "its superstep was committed, and it ran again: {line:?}"
            );
            let next = self.attempts.get(&line.task).copied().unwrap_or(0);
            assert!(
                line.attempt >= next,
                "attempt {next} was recorded as the next one, and an earlier one ran: {line:?}"
            );
        }
    }
}

async fn jobs_of_completed(db: &mut PgConnection) -> BTreeMap<String, i64> {
    let query = "select task_id::text, count(*) from jobs group by task_id having bool_or(status = 'completed')";
    let rows = sqlx::query(query).fetch_all(&mut *db).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}
