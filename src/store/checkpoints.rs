//! Checkpoints as they are read: the rows that make a state, values stored apart, pages of a history.
//!
//! **Invariant:** how much is read depends on the state and on the page, never on the thread's length.

use std::collections::{BTreeMap, HashMap};

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

use super::StoreError;
use crate::graph::checkpoint::{
    DecodeError, Decoder, KEYFRAME_EVERY, Restored, StoredRow, StoredWait, ValueRef, WaitKind,
};
use crate::graph::input::Standing;
use crate::graph::model::Graph;
use crate::graph::step::Position;
use crate::ids::{RunId, TaskId, ThreadId};

/// A checkpoint without its state.
#[derive(Debug, Clone)]
pub struct Listed {
    /// Where it stands.
    pub position: Position,
    /// What it extends.
    pub parent: Option<Position>,
    /// The run that made it.
    pub run_id: RunId,
    /// What made it: see [`crate::graph::checkpoint::Source`].
    pub source: i16,
    /// The nodes that run next, by name.
    pub next: String,
    /// When.
    pub at: DateTime<Utc>,
}

/// The rows that make the state at `seq`, or at the latest checkpoint of the branch, from the last keyframe on.
///
/// A keyframe stands at every multiple of [`KEYFRAME_EVERY`] and at a fork's first row, so the range is bounded.
pub async fn rows(
    db: &mut PgConnection,
    thread: ThreadId,
    namespace: &str,
    branch: i32,
    seq: Option<i64>,
) -> Result<Vec<StoredRow>, StoreError> {
    let rows = sqlx::query!(
        "with last as (
           select seq from checkpoints
            where thread_id = $1 and namespace = $2 and branch = $3 and seq <= $4
            order by seq desc limit 1)
         select c.seq, c.next, c.changed, c.keyframe from checkpoints c, last
          where thread_id = $1 and namespace = $2 and branch = $3
            and c.seq >= last.seq - last.seq % $5 and c.seq <= last.seq
          order by c.seq",
        thread as ThreadId,
        namespace,
        branch,
        seq.unwrap_or(i64::MAX),
        KEYFRAME_EVERY,
    )
    .fetch_all(db)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| StoredRow {
            position: Position { branch, seq: row.seq },
            next: row.next,
            changed: row.changed,
            keyframe: row.keyframe,
        })
        .collect())
}

/// Why where a thread stands cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum StandingError {
    /// It could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It is not what this program writes.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

/// Where a thread stands: at `seq` of a branch, or at the branch's last checkpoint.
pub async fn standing(
    db: &mut PgConnection,
    thread: ThreadId,
    branch: i32,
    seq: Option<i64>,
    graph: &Graph,
) -> Result<Standing, StandingError> {
    let rows = rows(db, thread, "", branch, seq).await?;
    standing_of(db, thread, "", &rows, graph).await
}

/// Where the last of `rows` stands; they begin with a keyframe.
async fn standing_of(
    db: &mut PgConnection,
    thread: ThreadId,
    namespace: &str,
    rows: &[StoredRow],
    graph: &Graph,
) -> Result<Standing, StandingError> {
    let Some(last) = rows.last() else { return Ok(Standing::empty(graph)) };
    let decoder = Decoder::new(graph).read(rows)?;
    let refs = decoder.refs();
    let fetched =
        if refs.is_empty() { HashMap::new() } else { values(db, thread, namespace, &refs).await? };
    let (state, homes) = decoder.finish(fetched)?;
    // Nodes of another graph are not this graph's: whoever goes on from here names its own.
    let next = last.next.split(',').filter_map(|name| graph.find_node(name)).collect();
    Ok(Standing { state, homes, position: Some(last.position), next })
}

/// What a page of a history shows, read in as many statements for twenty checkpoints of a branch as for one.
#[derive(Debug)]
pub struct Kept {
    thread: ThreadId,
    namespace: String,
    /// By branch, then by seq, each branch from a keyframe on.
    rows: Vec<StoredRow>,
    tasks: HashMap<Position, HashMap<TaskId, Restored>>,
}

impl Kept {
    /// Reads what is kept of the checkpoints at `positions`.
    pub async fn read(
        db: &mut PgConnection,
        thread: ThreadId,
        namespace: &str,
        positions: &[Position],
    ) -> Result<Self, StoreError> {
        let mut ranges: BTreeMap<i32, (i64, i64)> = BTreeMap::new();
        for Position { branch, seq } in positions {
            let range = ranges.entry(*branch).or_insert((*seq, *seq));
            *range = (range.0.min(*seq), range.1.max(*seq));
        }
        let mut rows = Vec::new();
        // Almost always one branch; as one statement for several, the planner reads the whole thread.
        for (branch, (first, last)) in ranges {
            let found = sqlx::query!(
                "select seq, next, changed, keyframe from checkpoints
                  where thread_id = $1 and namespace = $2 and branch = $3 and seq between $4 and $5
                  order by seq",
                thread as ThreadId,
                namespace,
                branch,
                first - first % KEYFRAME_EVERY,
                last,
            )
            .fetch_all(&mut *db)
            .await?;
            rows.extend(found.into_iter().map(|row| StoredRow {
                position: Position { branch, seq: row.seq },
                next: row.next,
                changed: row.changed,
                keyframe: row.keyframe,
            }));
        }
        let tasks = tasks_of(db, thread, namespace, positions).await?;
        Ok(Self { thread, namespace: namespace.to_owned(), rows, tasks })
    }

    /// Where the thread stood at `position`, one of those that were read.
    pub async fn standing(
        &self,
        db: &mut PgConnection,
        position: Position,
        graph: &Graph,
    ) -> Result<Standing, StandingError> {
        let keyframe = Position { seq: position.seq - position.seq % KEYFRAME_EVERY, ..position };
        let first = self.rows.partition_point(|row| row.position < keyframe);
        let last = self.rows.partition_point(|row| row.position <= position);
        standing_of(db, self.thread, &self.namespace, &self.rows[first..last], graph).await
    }

    /// Takes what the activations of the superstep after `position` already have.
    pub fn take_tasks(&mut self, position: Position) -> HashMap<TaskId, Restored> {
        self.tasks.remove(&position).unwrap_or_default()
    }
}

/// Values that are stored apart from their rows.
pub async fn values(
    db: &mut PgConnection,
    thread: ThreadId,
    namespace: &str,
    refs: &[ValueRef],
) -> Result<HashMap<ValueRef, Vec<u8>>, StoreError> {
    let rows = sqlx::query!(
        r#"select v.branch, v.seq, v.channel, v.value
           from unnest($3::int[], $4::bigint[], $5::text[]) as r (branch, seq, channel)
           join channel_values v on v.thread_id = $1 and v.namespace = $2 and v.branch = r.branch
            and v.seq = r.seq and v.channel = r.channel"#,
        thread as ThreadId,
        namespace,
        &refs.iter().map(|value| value.at.branch).collect::<Vec<_>>(),
        &refs.iter().map(|value| value.at.seq).collect::<Vec<_>>(),
        &refs.iter().map(|value| value.channel.clone()).collect::<Vec<_>>(),
    )
    .fetch_all(db)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            (
                ValueRef {
                    channel: row.channel,
                    at: Position { branch: row.branch, seq: row.seq },
                },
                row.value,
            )
        })
        .collect())
}

/// What the activations of the superstep after `planned` already have.
pub async fn tasks(
    db: &mut PgConnection,
    thread: ThreadId,
    namespace: &str,
    planned: Position,
) -> Result<HashMap<TaskId, Restored>, StoreError> {
    let mut found = tasks_of(db, thread, namespace, &[planned]).await?;
    Ok(found.remove(&planned).unwrap_or_default())
}

/// As [`tasks`], after each of several checkpoints.
async fn tasks_of(
    db: &mut PgConnection,
    thread: ThreadId,
    namespace: &str,
    planned: &[Position],
) -> Result<HashMap<Position, HashMap<TaskId, Restored>>, StoreError> {
    let rows = sqlx::query!(
        r#"select coalesce(w.branch, p.branch) as "branch!", coalesce(w.seq, p.seq) as "seq!",
                  coalesce(w.task_id, p.task_id) as "task_id!: TaskId", w.writes as "writes?",
                  p.kind as "kind?", p.attempt as "attempt?", p.settled as "settled?",
                  (p.due <= cynai_now()) as "expired?", p.data, p.answer, p.round as "round?"
             from (select w.* from unnest($3::int[], $4::bigint[]) as r (branch, seq)
                     join writes w on w.thread_id = $1 and w.namespace = $2 and w.branch = r.branch
                      and w.seq = r.seq) w
             full join (select p.* from unnest($3::int[], $4::bigint[]) as r (branch, seq)
                          join pending p on p.thread_id = $1 and p.namespace = $2 and p.branch = r.branch
                           and p.seq = r.seq) p
               on w.task_id = p.task_id"#,
        thread as ThreadId,
        namespace,
        &planned.iter().map(|position| position.branch).collect::<Vec<_>>(),
        &planned.iter().map(|position| position.seq).collect::<Vec<_>>(),
    )
    .fetch_all(db)
    .await?;
    let mut found: HashMap<Position, HashMap<TaskId, Restored>> = HashMap::new();
    for row in rows {
        let wait = row.kind.as_deref().and_then(WaitKind::parse).map(|kind| StoredWait {
            kind,
            attempt: row.attempt.and_then(|attempt| u32::try_from(attempt).ok()).unwrap_or(1),
            settled: row.settled.unwrap_or(false),
            expired: row.expired.unwrap_or(false),
            data: row.data,
            answer: row.answer,
            round: row.round.unwrap_or(0),
        });
        found
            .entry(Position { branch: row.branch, seq: row.seq })
            .or_default()
            .insert(row.task_id, Restored { writes: row.writes, wait });
    }
    Ok(found)
}

/// One checkpoint without its state.
pub async fn find(
    db: &mut PgConnection,
    thread: ThreadId,
    namespace: &str,
    position: Position,
) -> Result<Option<Listed>, StoreError> {
    Ok(page(db, thread, namespace, Some(Position { seq: position.seq + 1, ..position }), 1)
        .await?
        .pop()
        .filter(|found| found.position == position))
}

/// Checkpoints of all branches, newest first, those older than `before`.
///
/// A branch gets no more checkpoints once there is a later one, so (branch, seq) is the order of time.
pub async fn page(
    db: &mut PgConnection,
    thread: ThreadId,
    namespace: &str,
    before: Option<Position>,
    limit: i64,
) -> Result<Vec<Listed>, StoreError> {
    let before = before.unwrap_or(Position { branch: i32::MAX, seq: i64::MAX });
    let rows = sqlx::query!(
        r#"select branch, seq, parent_branch, parent_seq, run_id as "run_id: RunId", source, next, at
             from checkpoints
            where thread_id = $1 and namespace = $2 and (branch, seq) < ($3, $4)
            order by branch desc, seq desc limit $5"#,
        thread as ThreadId,
        namespace,
        before.branch,
        before.seq,
        limit,
    )
    .fetch_all(db)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let position = Position { branch: row.branch, seq: row.seq };
            let parent = match (row.parent_branch, row.parent_seq) {
                (Some(branch), Some(seq)) => Some(Position { branch, seq }),
                _ if row.seq > 0 => Some(Position { branch: row.branch, seq: row.seq - 1 }),
                _ => None,
            };
            Listed {
                position,
                parent,
                run_id: row.run_id,
                source: row.source,
                next: row.next,
                at: row.at,
            }
        })
        .collect())
}

/// Stores a checkpoint from outside a run: an input, an update, a fork. The caller holds the thread's lock.
pub async fn insert(
    db: &mut PgConnection,
    thread: ThreadId,
    run: RunId,
    row: &crate::graph::checkpoint::CheckpointRow,
) -> Result<(), StoreError> {
    sqlx::query!(
        "with stored_values as (
           insert into channel_values (thread_id, namespace, branch, seq, channel, value)
           select $1, '', $4, $3, v.channel, v.value from unnest($11::text[], $12::bytea[]) as v (channel, value))
         insert into checkpoints (thread_id, run_id, seq, at, parent_seq, branch, parent_branch, source,
                                  namespace, next, changed, keyframe)
         values ($1, $2, $3, cynai_now(), $5, $4, $6, $7, '', $8, $9, $10)",
        thread as ThreadId,
        run as RunId,
        row.position.seq,
        row.position.branch,
        row.parent.map(|parent| parent.seq),
        row.parent.map(|parent| parent.branch),
        row.source.code(),
        row.next,
        row.changed,
        row.keyframe,
        &row.values.iter().map(|(channel, _)| channel.clone()).collect::<Vec<_>>(),
        &row.values.iter().map(|(_, value)| value.clone()).collect::<Vec<_>>(),
    )
    .execute(db)
    .await?;
    Ok(())
}
