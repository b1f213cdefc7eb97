//! What is deleted in time: old checkpoints, stream rows of ended runs, temporary threads.
//!
//! A state is the nearest keyframe and the rows after it, so checkpoints go in whole blocks, from one
//! keyframe to the next, and never the block of a thread's last checkpoint. A value that was stored long
//! ago may still be a part of the state: the first keyframe that is kept names every older value that any
//! later one can name, because a value that has left the state does not come back. What a fork began from
//! stays as long as the fork's first checkpoint does.
//!
//! A pass looks at a bounded number of threads and deletes a bounded number of rows of each, under the
//! thread's lock, which forks and updates take as well; a superstep's commit only adds rows behind the
//! last block, and needs no lock.
//!
//! **Invariant:** a checkpoint that is listed can be read.

use std::time::Duration;

use sqlx::PgPool;
use uuid::Uuid;

use super::{StoreError, crash, threads};
use crate::graph::checkpoint::KEYFRAME_EVERY;
use crate::ids::{ThreadId, UserId};

/// Threads that one pass looks at.
const THREADS: i64 = 500;
/// Checkpoints of one branch that one pass deletes.
const ROWS: i64 = 2_000;
/// Runs whose stream rows one pass looks at.
const RUNS: i64 = 500;
/// Temporary threads that one pass deletes.
const TEMPORARY: i64 = 200;
/// Names the lock that one process at a time holds: "cynai" and a number.
const LOCK: i64 = 0x0063_796e_6169_0001;

/// How long things are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retention {
    /// The last so many checkpoints of a thread stay; `None` keeps all.
    pub keep_last: Option<u32>,
    /// Checkpoints younger than this stay; `None` keeps all. With both, a checkpoint goes by either.
    pub max_age: Option<Duration>,
    /// Stream rows stay so long after their run has ended.
    pub stream_rows: Duration,
    /// A temporary thread stays so long after its run has ended.
    pub temporary_threads: Duration,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            keep_last: None,
            max_age: None,
            stream_rows: Duration::from_secs(86_400),
            temporary_threads: Duration::from_secs(300),
        }
    }
}

/// Where the passes of a process are; each begins where the one before stopped.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    thread: Option<Uuid>,
    run: Option<Uuid>,
}

/// What a pass deleted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Deleted {
    /// Checkpoints, those of subgraphs too.
    pub checkpoints: u64,
    /// Rows of streams.
    pub stream_rows: u64,
    /// Temporary threads.
    pub threads: u64,
}

/// One pass. Nothing is done while another process is at it.
pub async fn pass(
    pool: &PgPool,
    keep: &Retention,
    progress: &mut Progress,
) -> Result<Deleted, StoreError> {
    let mut lock = pool.begin().await?;
    let mine = sqlx::query_scalar!(r#"select pg_try_advisory_xact_lock($1) as "mine!""#, LOCK)
        .fetch_one(&mut *lock)
        .await?;
    let mut deleted = Deleted::default();
    if !mine {
        return Ok(deleted);
    }
    deleted.threads = temporary_threads(pool, keep).await?;
    deleted.stream_rows = stream_rows(pool, keep, progress).await?;
    if keep.keep_last.is_some() || keep.max_age.is_some() {
        deleted.checkpoints = checkpoints(pool, keep, progress).await?;
    }
    lock.rollback().await?;
    Ok(deleted)
}

async fn temporary_threads(pool: &PgPool, keep: &Retention) -> Result<u64, StoreError> {
    let mut db = pool.acquire().await?;
    let old = sqlx::query!(
        r#"select thread_id as "thread_id: ThreadId", user_id as "user_id: UserId" from runs
            where temporary_thread and ended_at is not null and ended_at < cynai_now() - make_interval(secs => $1)
            order by ended_at limit $2"#,
        keep.temporary_threads.as_secs_f64(),
        TEMPORARY,
    )
    .fetch_all(&mut *db)
    .await?;
    let mut deleted = 0;
    for thread in old {
        let deleting = threads::delete(&mut db, thread.thread_id, thread.user_id);
        deleted += u64::from(crash::around("delete temporary thread", deleting).await?);
    }
    Ok(deleted)
}

/// Walks over the runs that have stream rows, in the order of their ids.
async fn stream_rows(
    pool: &PgPool,
    keep: &Retention,
    progress: &mut Progress,
) -> Result<u64, StoreError> {
    let mut db = pool.acquire().await?;
    let runs = sqlx::query!(
        r#"with recursive listed as (
             (select run_id, 1::bigint as number from stream_events where $1::uuid is null or run_id > $1
               order by run_id limit 1)
             union all
             select (select s.run_id from stream_events s where s.run_id > l.run_id order by s.run_id limit 1), number + 1
               from listed l where l.run_id is not null and number < $2)
           select l.run_id as "run_id!", coalesce(r.ended_at < cynai_now() - make_interval(secs => $3), r.run_id is null)
                    as "over!"
             from listed l left join runs r using (run_id) where l.run_id is not null order by l.number"#,
        progress.run,
        RUNS,
        keep.stream_rows.as_secs_f64(),
    )
    .fetch_all(&mut *db)
    .await?;
    let all = i64::try_from(runs.len()).unwrap_or(i64::MAX) < RUNS;
    progress.run = runs.last().filter(|_| !all).map(|run| run.run_id);
    let over: Vec<Uuid> = runs.into_iter().filter(|run| run.over).map(|run| run.run_id).collect();
    if over.is_empty() {
        return Ok(0);
    }
    let deleting =
        sqlx::query!("delete from stream_events where run_id = any($1)", &over).execute(&mut *db);
    Ok(crash::around("delete stream rows", deleting).await?.rows_affected())
}

async fn checkpoints(
    pool: &PgPool,
    keep: &Retention,
    progress: &mut Progress,
) -> Result<u64, StoreError> {
    let listed = sqlx::query_scalar!(
        "select thread_id from threads where $1::uuid is null or thread_id > $1 order by thread_id limit $2",
        progress.thread,
        THREADS,
    )
    .fetch_all(pool)
    .await?;
    let all = i64::try_from(listed.len()).unwrap_or(i64::MAX) < THREADS;
    let mut deleted = 0;
    for thread in &listed {
        deleted += of_thread(pool, ThreadId(*thread), keep).await?;
    }
    progress.thread = listed.last().copied().filter(|_| !all);
    Ok(deleted)
}

/// A branch of a thread, as far as its beginning and its end tell of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Branch {
    branch: i32,
    first: i64,
    last: i64,
    /// What it was forked from, when its first checkpoint is still there.
    parent: Option<(i32, i64)>,
    /// How many checkpoints it has, as far as it matters: counted to one more than are to be kept.
    count: i64,
    /// The first that is young enough, as far as was looked; `None` when none is.
    young: Option<i64>,
}

/// What goes of a branch: all before `floor` that is not in a block of `pinned`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Cut {
    branch: i32,
    floor: i64,
    /// The beginnings and ends of blocks that a fork began from.
    pinned: Vec<(i64, i64)>,
}

/// Decides what goes. `branches` is in the order of their numbers; the last one is the thread's current one.
fn cuts(branches: &[Branch], keep_last: Option<u32>, by_age: bool) -> Vec<Cut> {
    let mut left = keep_last.map_or(i64::MAX, i64::from).max(1);
    let mut cuts: Vec<Cut> = Vec::new();
    let mut pins: Vec<(i32, i64)> = Vec::new();
    for (number, branch) in branches.iter().rev().enumerate() {
        let kept = branch.count.min(left);
        left -= kept;
        let by_count = if keep_last.is_some() { branch.last - kept + 1 } else { i64::MIN };
        let by_time = if by_age { branch.young.unwrap_or(branch.last + 1) } else { i64::MIN };
        // The thread stands on the last checkpoint of its current branch.
        let most = if number == 0 { branch.last } else { branch.last + 1 };
        let first_kept = by_count.max(by_time).min(most);
        let floor = if first_kept > branch.last {
            first_kept
        } else {
            first_kept - first_kept % KEYFRAME_EVERY
        };
        let block = |seq: i64| (seq - seq % KEYFRAME_EVERY, seq);
        let pinned: Vec<(i64, i64)> = pins
            .iter()
            .filter(|(of, _)| *of == branch.branch)
            .map(|(_, seq)| block(*seq))
            .collect();
        let has_first = branch.first >= floor
            || pinned.iter().any(|(from, to)| (*from..=*to).contains(&branch.first));
        pins.extend(branch.parent.filter(|_| has_first));
        cuts.push(Cut { branch: branch.branch, floor, pinned });
    }
    cuts.retain(|cut| {
        branches.iter().any(|branch| branch.branch == cut.branch && branch.first < cut.floor)
    });
    cuts
}

/// Deletes what is too much of one thread; nothing when somebody else has its lock.
async fn of_thread(pool: &PgPool, thread: ThreadId, keep: &Retention) -> Result<u64, StoreError> {
    let mut tx = pool.begin().await?;
    let locked = sqlx::query_scalar!(
        "select branch from threads where thread_id = $1 for no key update skip locked",
        thread as ThreadId
    )
    .fetch_optional(&mut *tx)
    .await?;
    let Some(current) = locked else { return Ok(0) };
    let branches = branches(&mut tx, thread, current, keep).await?;
    let cuts = cuts(&branches, keep.keep_last, keep.max_age.is_some());
    let mut deleted = 0;
    for cut in &cuts {
        deleted += delete_rows(&mut tx, thread, cut).await?;
    }
    if deleted == 0 {
        tx.rollback().await?;
        return Ok(0);
    }
    deleted += delete_below(&mut tx, thread, current).await?;
    delete_values(&mut tx, thread).await?;
    delete_results(&mut tx, thread).await?;
    crash::commit(tx, "retention").await?;
    Ok(deleted)
}

async fn branches(
    db: &mut sqlx::PgConnection,
    thread: ThreadId,
    current: i32,
    keep: &Retention,
) -> Result<Vec<Branch>, StoreError> {
    let rows = sqlx::query!(
        r#"select b.branch as "branch!", f.seq as first, l.seq as last, f.parent_branch, f.parent_seq,
                  (select count(*) from (
                     select from checkpoints c where c.thread_id = $1 and c.namespace = '' and c.branch = b.branch
                      limit $3) x) as "count!",
                  (select x.seq from (
                     select c.seq, c.at from checkpoints c
                      where c.thread_id = $1 and c.namespace = '' and c.branch = b.branch
                      order by c.seq limit $4) x
                    where x.at >= cynai_now() - make_interval(secs => $5) order by x.seq limit 1) as young,
                  (select max(x.seq) from (
                     select c.seq from checkpoints c
                      where c.thread_id = $1 and c.namespace = '' and c.branch = b.branch
                      order by c.seq limit $4) x) as looked
             from generate_series(0, $2::int) as b (branch)
             join lateral (select seq, parent_branch, parent_seq from checkpoints c
                            where c.thread_id = $1 and c.namespace = '' and c.branch = b.branch
                            order by c.seq limit 1) f on true
             join lateral (select seq from checkpoints c
                            where c.thread_id = $1 and c.namespace = '' and c.branch = b.branch
                            order by c.seq desc limit 1) l on true
            order by b.branch"#,
        thread as ThreadId,
        current,
        keep.keep_last.map_or(1, |last| i64::from(last) + 1),
        ROWS,
        keep.max_age.map_or(0.0, |age| age.as_secs_f64()),
    )
    .fetch_all(db)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Branch {
            branch: row.branch,
            first: row.first,
            last: row.last,
            parent: row.parent_branch.zip(row.parent_seq),
            count: row.count,
            // All that was looked at is old, and there is more: the next pass looks further.
            young: row.young.or(row.looked.filter(|looked| *looked < row.last)),
        })
        .collect())
}

/// Deletes up to about [`ROWS`] rows: whole blocks, so that what is left of a branch begins with a keyframe.
async fn delete_rows(
    db: &mut sqlx::PgConnection,
    thread: ThreadId,
    cut: &Cut,
) -> Result<u64, StoreError> {
    let (from, to): (Vec<i64>, Vec<i64>) = cut.pinned.iter().copied().unzip();
    let most = sqlx::query_scalar!(
        "select seq from checkpoints
          where thread_id = $1 and namespace = '' and branch = $2 and seq < $3
            and not exists (select from unnest($4::bigint[], $5::bigint[]) as p (low, high)
                             where seq between p.low and p.high)
          order by seq offset $6 limit 1",
        thread as ThreadId,
        cut.branch,
        cut.floor,
        &from,
        &to,
        ROWS,
    )
    .fetch_optional(&mut *db)
    .await?;
    let floor = most.map_or(cut.floor, |most| most - most % KEYFRAME_EVERY);
    let result = sqlx::query!(
        "delete from checkpoints
          where thread_id = $1 and namespace = '' and branch = $2 and seq < $3
            and not exists (select from unnest($4::bigint[], $5::bigint[]) as p (low, high)
                             where seq between p.low and p.high)",
        thread as ThreadId,
        cut.branch,
        floor,
        &from,
        &to,
    )
    .execute(db)
    .await?;
    Ok(result.rows_affected())
}

/// Subgraphs whose last checkpoint is older than the current branch's first have long come back.
async fn delete_below(
    db: &mut sqlx::PgConnection,
    thread: ThreadId,
    current: i32,
) -> Result<u64, StoreError> {
    let result = sqlx::query!(
        "with floor as (
           select at from checkpoints where thread_id = $1 and namespace = '' and branch = $2 order by seq limit 1)
         delete from checkpoints c using floor f
          where c.thread_id = $1 and c.namespace <> '' and c.at < f.at
            and not exists (select from checkpoints d
                             where d.thread_id = c.thread_id and d.namespace = c.namespace and d.branch = c.branch
                               and d.at >= f.at)",
        thread as ThreadId,
        current,
    )
    .execute(db)
    .await?;
    Ok(result.rows_affected())
}

/// Values whose checkpoint is gone, and that no keyframe names at which reading can begin.
///
/// PostgreSQL's `jsonb` refuses a `\u0000`, so it is replaced: only references are looked for.
async fn delete_values(db: &mut sqlx::PgConnection, thread: ThreadId) -> Result<(), StoreError> {
    sqlx::query!(
        r#"with starts as (
             select namespace, branch, keyframe from (
               select namespace, branch, seq, keyframe,
                      lag(seq) over (partition by namespace, branch order by seq) as before
                 from checkpoints where thread_id = $1) c
              where keyframe is not null and (before is null or before <> seq - 1)),
           keys as (
             select s.namespace, k.key, k.value
               from starts s, jsonb_each(replace(convert_from(s.keyframe, 'UTF8'), '\u0000', '\ufffd')::jsonb) k
              where left(k.key, 1) in ('@', '+')),
           refs as (
             select namespace, substr(key, 2) as channel, (value ->> 0)::int as branch, (value ->> 1)::bigint as seq
               from keys where left(key, 1) = '@'
             union all
             select k.namespace, substr(k.key, 2), (r.value ->> 0)::int, (r.value ->> 1)::bigint
               from keys k, jsonb_array_elements(k.value) r where left(k.key, 1) = '+')
           delete from channel_values v
            where v.thread_id = $1
              and not exists (select from checkpoints c where c.thread_id = v.thread_id and c.namespace = v.namespace
                                 and c.branch = v.branch and c.seq = v.seq)
              and not exists (select from refs r where r.namespace = v.namespace and r.branch = v.branch
                                 and r.seq = v.seq and r.channel = v.channel)"#,
        thread as ThreadId,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Results and waits of supersteps whose checkpoint is gone.
async fn delete_results(db: &mut sqlx::PgConnection, thread: ThreadId) -> Result<(), StoreError> {
    sqlx::query!(
        "with w as (
           delete from writes w where w.thread_id = $1 and not exists (
             select from checkpoints c where c.thread_id = w.thread_id and c.namespace = w.namespace
                and c.branch = w.branch and c.seq = w.seq))
         delete from pending p where p.thread_id = $1 and not exists (
           select from checkpoints c where c.thread_id = p.thread_id and c.namespace = p.namespace
              and c.branch = p.branch and c.seq = p.seq)",
        thread as ThreadId,
    )
    .execute(db)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn branch(branch: i32, first: i64, last: i64, parent: Option<(i32, i64)>) -> Branch {
        Branch { branch, first, last, parent, count: last - first + 1, young: Some(first) }
    }

    fn cut(branch: i32, floor: i64, pinned: &[(i64, i64)]) -> Cut {
        Cut { branch, floor, pinned: pinned.to_vec() }
    }

    #[track_caller]
    fn check(branches: &[Branch], keep_last: u32, expected: &[Cut]) {
        assert_eq!(cuts(branches, Some(keep_last), false), expected);
    }

    #[test]
    fn whole_blocks_go_and_the_last_one_stays() {
        check(&[branch(0, 0, 10, None)], 5, &[]);
        check(&[branch(0, 0, 63, None)], 1, &[]);
        check(&[branch(0, 0, 64, None)], 1, &[cut(0, 64, &[])]);
        check(&[branch(0, 0, 64, None)], 2, &[]);
        check(&[branch(0, 0, 1000, None)], 100, &[cut(0, 896, &[])]);
        check(&[branch(0, 896, 1000, None)], 100, &[]);
        check(&[branch(0, 0, 1000, None)], 0, &[cut(0, 960, &[])]);
    }

    #[test]
    fn what_a_fork_began_from_stays_while_the_fork_has_its_first_checkpoint() {
        let origin = branch(0, 0, 500, None);
        check(&[origin, branch(1, 131, 140, Some((0, 130)))], 10, &[cut(0, 501, &[(128, 130)])]);
        check(&[origin, branch(1, 131, 140, Some((0, 130)))], 200, &[cut(0, 256, &[(128, 130)])]);
        check(
            &[origin, branch(1, 131, 900, Some((0, 130)))],
            10,
            &[cut(1, 832, &[]), cut(0, 501, &[])],
        );
        // A fork of a fork keeps its own origin, which keeps the first one.
        let forks =
            [origin, branch(1, 131, 140, Some((0, 130))), branch(2, 134, 150, Some((1, 133)))];
        check(&forks, 5, &[cut(1, 141, &[(128, 133)]), cut(0, 501, &[(128, 130)])]);
    }

    #[test]
    fn age_and_number_each_let_a_checkpoint_go() {
        let old = Branch { young: Some(700), ..branch(0, 0, 1000, None) };
        let floor = |cuts: Vec<Cut>| cuts.first().map(|cut| cut.floor);
        // Where no number is asked for, nothing is counted.
        assert_eq!(floor(cuts(&[Branch { count: 1, ..old }], None, true)), Some(640));
        assert_eq!(floor(cuts(&[old], Some(10), true)), Some(960));
        assert_eq!(floor(cuts(&[old], Some(2000), true)), Some(640));
        let all_old = Branch { young: None, ..old };
        assert_eq!(
            floor(cuts(&[all_old], None, true)),
            Some(960),
            "the last checkpoint is never too old"
        );
    }
}
