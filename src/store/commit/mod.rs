//! The commit path: what runs of this process want stored, in as few statements as possible.
//!
//! A run that is alone commits directly, with one small statement. When many are ready at once, their
//! commits go out together as one multi-row statement, and the next batch gathers while that one is
//! under way. Each statement opens with a gate: only rows of runs whose fence and head are still what
//! the committer knew pass it, so a process that lost a run writes nothing of it, however late it
//! wakes, and harms no other run of its batch.
//!
//! **Invariant:** a commit is acknowledged only after the statement that wrote it was committed with
//! `synchronous_commit` on.

mod columns;
mod light;

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sqlx::{PgConnection, PgPool};
use tokio::sync::oneshot;
use tokio_util::task::TaskTracker;

use self::columns::Columns;
use super::runs::{self, Ending, ToEnd};
use super::{StoreError, crash, transaction};
use crate::graph::checkpoint::{Commit, EffectChange, RunEnd};
use crate::ids::{RunId, ThreadId};

/// Connections that a committer can use at once.
pub const COMMITTER_CONNECTIONS: u32 = 2;
/// Statements under way at once; the next batch gathers behind them.
const SLOTS: usize = COMMITTER_CONNECTIONS as usize;
/// The most commits of one statement.
const MAX_BATCH: usize = 256;
/// No commit joins a statement that has so many bytes already.
const MAX_BATCH_BYTES: usize = 8 << 20;
/// Pauses between tries of a commit whose run was locked or whose outcome is unknown.
const RETRY_FIRST: Duration = Duration::from_millis(2);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// So long a commit is tried while the database cannot be reached; the run's lease ends long before.
const RETRY_FOR: Duration = Duration::from_secs(60);

/// Supersteps and other writes of runs that were acknowledged.
const COMMITS: &str = "cynai_commits_total";
/// Statements that wrote them: with the commits, how many went out together.
const STATEMENTS: &str = "cynai_commit_statements_total";

/// One run's commit with the authority that it is made under.
#[derive(Debug, Clone)]
pub struct Request {
    /// The run.
    pub run_id: RunId,
    /// Its thread.
    pub thread_id: ThreadId,
    /// The fence of the grant.
    pub fence: i64,
    /// The root namespace's seq that the head must have.
    pub root_seq: i64,
    /// What to write.
    pub commit: Arc<Commit>,
}

impl Request {
    /// The root's seq after this commit.
    fn next_root_seq(&self) -> i64 {
        match &self.commit.checkpoint {
            Some(row) if self.commit.namespace.is_empty() => row.position.seq,
            _ => self.root_seq,
        }
    }

    /// About how many bytes it writes.
    fn size(&self) -> usize {
        let Commit { checkpoint, writes, waits, stream, effects, .. } = &*self.commit;
        let row = checkpoint.as_ref().map_or(0, |row| {
            let values: usize = row.values.iter().map(|(_, value)| value.len()).sum();
            row.changed.len() + row.keyframe.as_ref().map_or(0, Vec::len) + values
        });
        let writes: usize = writes.iter().map(|(_, bytes)| bytes.len()).sum();
        let waits: usize = waits.iter().map(|wait| wait.data.as_ref().map_or(0, Vec::len)).sum();
        let stream: usize = stream.iter().map(|row| row.data.len()).sum();
        let effects: usize = effects
            .iter()
            .map(|row| match &row.change {
                EffectChange::Intent { request, .. } => request.len(),
                EffectChange::Outcome { outcome, .. } => outcome.len(),
            })
            .sum();
        row + writes + waits + stream + effects
    }

    /// Whether it is a root checkpoint and nothing else, which the small statements can write.
    fn is_plain(&self) -> bool {
        let Commit { namespace, checkpoint, writes, waits, settles, stream, effects, .. } =
            &*self.commit;
        let plain_row =
            checkpoint.as_ref().is_some_and(|row| row.values.is_empty() && row.parent.is_none());
        plain_row
            && namespace.is_empty()
            && writes.is_empty()
            && waits.is_empty()
            && !settles
            && stream.is_empty()
            && effects.is_empty()
    }
}

/// Why a commit was not made.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// The run has another fence or head, or is gone: it is not this process's any more.
    #[error("the run's fence or head has moved on")]
    Fenced,
    /// The database did not do it.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Commits for all runs of one process over one pool.
#[derive(Debug, Clone)]
pub struct Committer(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    pool: PgPool,
    state: Mutex<State>,
    leaders: TaskTracker,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<(Request, oneshot::Sender<Verdict>)>,
    leading: usize,
    commits: u64,
    statements: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// It is written.
    Passed(Committed),
    /// The gate left it out, or the outcome is unknown: look and try again.
    Unsure,
    /// The statement failed as a whole: try it alone.
    Alone,
}

/// What statements wrote, by the places of the requests.
#[derive(Debug, Default)]
struct Written {
    passed: HashSet<usize>,
    /// Of those, the ones whose run's end made another run claimable.
    queued: HashSet<usize>,
}

impl Written {
    fn verdict(&self, number: usize) -> Verdict {
        if self.passed.contains(&number) {
            Verdict::Passed(Committed { queues: self.queued.contains(&number) })
        } else {
            Verdict::Unsure
        }
    }
}

/// A commit that was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Committed {
    /// Whether the end of the run, which was in it, may have made another run claimable.
    pub queues: bool,
}

/// How many commits went out in how many statements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommitterStats {
    /// Commits that were acknowledged.
    pub commits: u64,
    /// Statements that wrote them.
    pub statements: u64,
}

impl Committer {
    /// A committer over `pool`.
    #[must_use]
    pub fn new(pool: PgPool) -> Self {
        Self(Arc::new(Inner { pool, state: Mutex::default(), leaders: TaskTracker::new() }))
    }

    /// How many commits and statements there were so far.
    #[must_use]
    pub fn stats(&self) -> CommitterStats {
        let state = self.0.lock();
        CommitterStats { commits: state.commits, statements: state.statements }
    }

    /// Stores `request`: all of it or nothing. Returns after it is durable.
    ///
    /// # Errors
    /// [`CommitError::Fenced`] when the run has moved on without this process.
    pub async fn commit(&self, request: Request) -> Result<Committed, CommitError> {
        let mut pause = RETRY_FIRST;
        let mut waited = Duration::ZERO;
        let mut alone = false;
        loop {
            let verdict = if alone {
                alone = false;
                match execute(&self.0.pool, std::slice::from_ref(&request)).await {
                    Ok(written) => {
                        self.0.count(written.passed.len());
                        written.verdict(0)
                    }
                    // Alone, its failure is its own.
                    Err(err) if !err.is_unavailable() => return Err(err.into()),
                    Err(_) => Verdict::Unsure,
                }
            } else {
                self.0.offer(request.clone()).await
            };
            match verdict {
                Verdict::Passed(committed) => return Ok(committed),
                Verdict::Alone => alone = true,
                Verdict::Unsure => match self.look(&request).await {
                    // An answer that was lost does not tell what the end led to: whoever looks for nothing finds nothing.
                    Ok(Look::Written) => {
                        return Ok(Committed { queues: request.commit.end.is_some() });
                    }
                    Ok(Look::Fenced) => return Err(CommitError::Fenced),
                    Ok(Look::Locked) => {}
                    Err(err) if waited >= RETRY_FOR || !err.is_unavailable() => {
                        return Err(err.into());
                    }
                    Err(_) => {}
                },
            }
            if !alone {
                tokio::time::sleep(pause).await;
                waited += pause;
                pause = (pause * 2).min(RETRY_MAX);
            }
        }
    }

    /// What became of a commit that the gate left out or whose answer was lost.
    async fn look(&self, request: &Request) -> Result<Look, StoreError> {
        let head = sqlx::query!(
            "select fence, seq, status from heads where run_id = $1",
            request.run_id as RunId
        )
        .fetch_optional(&self.0.pool)
        .await?;
        let Some(head) =
            head.filter(|head| head.fence == request.fence && head.status == "running")
        else {
            return if request.commit.end.is_some() {
                self.look_for_end(request).await
            } else {
                Ok(Look::Fenced)
            };
        };
        let advances = request.next_root_seq() != request.root_seq;
        if advances && head.seq == request.next_root_seq() {
            return Ok(Look::Written);
        }
        // Rows below the root are written with "on conflict do nothing": doing them again is harmless.
        Ok(if head.seq == request.root_seq { Look::Locked } else { Look::Fenced })
    }

    /// A run without a head has ended: as this commit said, or by somebody else.
    async fn look_for_end(&self, request: &Request) -> Result<Look, StoreError> {
        let ended = sqlx::query_scalar!(
            "select 1 as one from runs where run_id = $1 and status = 'success'",
            request.run_id as RunId
        )
        .fetch_optional(&self.0.pool)
        .await?;
        Ok(if ended.is_some() { Look::Written } else { Look::Fenced })
    }
}

enum Look {
    Written,
    Fenced,
    Locked,
}

impl Inner {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the request written: by this call when it is alone, else together with what others have ready.
    async fn offer(self: &Arc<Self>, request: Request) -> Verdict {
        let (sender, receiver) = oneshot::channel();
        let slot = {
            let mut state = self.lock();
            state.waiting.push_back((request, sender));
            let free = state.leading < SLOTS;
            state.leading += usize::from(free);
            free
        };
        if slot {
            let leading = Leading { inner: Arc::clone(self), given_up: false };
            // Who is ready at this moment comes along: one sync of the disk serves all of them.
            tokio::task::yield_now().await;
            if let Some((request, sender)) = self.only_one() {
                let verdicts = self.write(std::slice::from_ref(&request)).await;
                // It may be another run's request, when a leader took this one's meanwhile.
                let _ = sender.send(verdicts.into_iter().next().unwrap_or(Verdict::Unsure));
            }
            // Leaves what is waiting now to a task of its own: no run's end takes others' commits with it.
            drop(leading);
        }
        // A leader that was dropped with its run may have written: so who waited for it looks.
        receiver.await.unwrap_or(Verdict::Unsure)
    }

    /// The only request that waits, if just one does.
    fn only_one(&self) -> Option<(Request, oneshot::Sender<Verdict>)> {
        let mut state = self.lock();
        if state.waiting.len() == 1 { state.waiting.pop_front() } else { None }
    }

    /// Writes what is waiting, until nothing is.
    async fn lead(self: Arc<Self>) {
        let mut leading = Leading { inner: Arc::clone(&self), given_up: false };
        loop {
            let (requests, senders): (Vec<Request>, Vec<oneshot::Sender<Verdict>>) = {
                let mut state = self.lock();
                let count = batch_len(state.waiting.iter().map(|(request, _)| request));
                if count == 0 {
                    // Given up under the same lock under which others queue: nobody is left behind.
                    state.leading -= 1;
                    leading.given_up = true;
                    return;
                }
                state.waiting.drain(..count).unzip()
            };
            let verdicts = self.write(&requests).await;
            for (sender, verdict) in senders.into_iter().zip(verdicts) {
                // Nobody listens when the run was dropped meanwhile.
                let _ = sender.send(verdict);
            }
            // The runs that go on at once have their next commits ready before the next batch is made.
            tokio::task::yield_now().await;
        }
    }

    /// Counts a statement and the commits that it made.
    fn count(&self, passed: usize) {
        let passed = u64::try_from(passed).unwrap_or(0);
        metrics::counter!(STATEMENTS).increment(1);
        metrics::counter!(COMMITS).increment(passed);
        let mut state = self.lock();
        state.statements += 1;
        state.commits += passed;
    }

    async fn write(&self, requests: &[Request]) -> Vec<Verdict> {
        let result = execute(&self.pool, requests).await;
        let passed = result.as_ref().map_or(0, |written| written.passed.len());
        let verdicts: Vec<Verdict> = match &result {
            Ok(written) => (0..requests.len()).map(|number| written.verdict(number)).collect(),
            Err(err) => {
                let verdict = if err.is_unavailable() { Verdict::Unsure } else { Verdict::Alone };
                tracing::warn!(
                    error = err as &dyn std::error::Error,
                    commits = requests.len(),
                    "a batch of commits failed"
                );
                vec![verdict; requests.len()]
            }
        };
        self.count(passed);
        verdicts
    }
}

/// How many of `waiting` one statement takes: at least one.
fn batch_len<'a>(waiting: impl Iterator<Item = &'a Request>) -> usize {
    let mut bytes = 0;
    let fits = |request: &&Request| {
        let room = bytes < MAX_BATCH_BYTES;
        bytes += request.size();
        room
    };
    waiting.take(MAX_BATCH).take_while(fits).count()
}

/// A slot under way; giving it up lets what waits go on, also when the leader's run was dropped.
struct Leading {
    inner: Arc<Inner>,
    given_up: bool,
}

impl Drop for Leading {
    fn drop(&mut self) {
        if self.given_up {
            return;
        }
        let mut state = self.inner.lock();
        if state.waiting.is_empty() {
            state.leading -= 1;
            return;
        }
        drop(state);
        // The slot goes to a task that leads for those who wait.
        let inner = Arc::clone(&self.inner);
        self.inner.leaders.spawn(async move { inner.lead().await });
    }
}

/// Writes `requests`: each of them whole or not at all.
async fn execute(pool: &PgPool, requests: &[Request]) -> Result<Written, StoreError> {
    if requests.iter().any(|request| request.commit.end.is_some()) {
        return execute_ending(pool, requests).await;
    }
    let mut db = pool.acquire().await?;
    let requests: Vec<&Request> = requests.iter().collect();
    let passed = crash::around("commit", execute_rows(&mut db, &requests)).await?;
    Ok(Written { passed, queued: HashSet::new() })
}

/// Writes `requests` of which some are the last of their runs, which end in the same transaction.
///
/// The threads are locked first, as everywhere. One that somebody else holds is not waited for: the others would
/// wait as well. Its commit is left out, and tried again.
async fn execute_ending(pool: &PgPool, requests: &[Request]) -> Result<Written, StoreError> {
    let mut tx = transaction::begin(pool).await?;
    let ending = requests.iter().filter(|request| request.commit.end.is_some());
    let threads: Vec<ThreadId> = ending.map(|request| request.thread_id).collect();
    let locked = runs::lock_free_threads(&mut tx, &threads).await?;
    let (numbers, free): (Vec<usize>, Vec<&Request>) = requests
        .iter()
        .enumerate()
        .filter(|(_, one)| one.commit.end.is_none() || locked.contains(&one.thread_id))
        .unzip();
    let passed = execute_rows(&mut tx, &free).await?;
    let endings: Vec<(usize, Ending<'_>)> = passed
        .iter()
        .filter_map(|at| {
            let RunEnd { values, result } = free[*at].commit.end.as_ref()?;
            Some((*at, Ending::done(values, result)))
        })
        .collect();
    let to_end: Vec<ToEnd<'_>> = endings
        .iter()
        .map(|(at, ending)| ToEnd {
            thread: free[*at].thread_id,
            run: free[*at].run_id,
            fence: Some(free[*at].fence),
            ending,
        })
        .collect();
    let ended =
        if to_end.is_empty() { Vec::new() } else { runs::finish_all(&mut tx, &to_end).await? };
    crash::commit(tx, "end").await?;
    let queueing: HashSet<RunId> =
        ended.into_iter().filter(|(_, ended)| ended.queues()).map(|(run, _)| run).collect();
    let queued = passed.iter().filter(|at| queueing.contains(&free[**at].run_id));
    Ok(Written {
        queued: queued.map(|at| numbers[*at]).collect(),
        passed: passed.iter().map(|at| numbers[*at]).collect(),
    })
}

/// Answers which of `requests` passed the gate, by their places.
async fn execute_rows(
    db: &mut PgConnection,
    requests: &[&Request],
) -> Result<HashSet<usize>, StoreError> {
    match requests {
        [] => Ok(HashSet::new()),
        [one] if one.is_plain() => execute_one(db, one).await,
        many if many.iter().all(|request| request.is_plain()) => execute_plain(db, many).await,
        many if many.iter().all(|request| light::fits(request)) => light::execute(db, many).await,
        many => execute_full(db, many).await,
    }
}

/// One root checkpoint of one run.
async fn execute_one(
    db: &mut PgConnection,
    request: &Request,
) -> Result<HashSet<usize>, StoreError> {
    let Some(row) = &request.commit.checkpoint else { return Ok(HashSet::new()) };
    let result = sqlx::query!(
        "with gate as materialized (
           update heads set seq = $4, claims = 0
            where run_id = $1 and fence = $2 and seq = $3 and status = 'running'
           returning run_id)
         insert into checkpoints (thread_id, run_id, seq, at, branch, source, namespace, next, changed, keyframe)
         select $5, run_id, $4, cynai_now(), $6, $7, '', $8, $9, $10 from gate",
        request.run_id as RunId,
        request.fence,
        request.root_seq,
        row.position.seq,
        request.thread_id as ThreadId,
        row.position.branch,
        row.source.code(),
        row.next,
        row.changed,
        row.keyframe,
    )
    .execute(db)
    .await?;
    Ok(if result.rows_affected() == 1 { HashSet::from([0]) } else { HashSet::new() })
}

/// Root checkpoints of several runs, one each.
///
/// What the gate joins is narrow, since locking copies every row of the join; the wide columns are taken from
/// their arrays by place, which costs less than a second join (15 % of the statement with 26 runs).
async fn execute_plain(
    db: &mut PgConnection,
    requests: &[&Request],
) -> Result<HashSet<usize>, StoreError> {
    let rows = || {
        requests
            .iter()
            .filter_map(|request| request.commit.checkpoint.as_ref().map(|row| (request, row)))
    };
    let passed = sqlx::query_scalar!(
        r#"with gate as materialized (
             select b.run_id, b.seq, b.number
               from heads h
               join unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::bigint[])
                 with ordinality as b (run_id, fence, root_seq, seq, number) using (run_id)
              where h.fence = b.fence and h.seq = b.root_seq and h.status = 'running'
              order by h.run_id for no key update of h skip locked),
           moved as (
             update heads h set seq = gate.seq, claims = 0 from gate where h.run_id = gate.run_id),
           stored as (
             insert into checkpoints (thread_id, run_id, seq, at, branch, source, namespace, next, changed, keyframe)
             select ($5::uuid[])[number], run_id, seq, cynai_now(), ($6::int[])[number], ($7::smallint[])[number], '',
                    ($8::text[])[number], ($9::bytea[])[number], ($10::bytea[])[number]
               from gate)
           select (number - 1)::int as "request!" from gate"#,
        &rows().map(|(request, _)| request.run_id.0).collect::<Vec<_>>(),
        &rows().map(|(request, _)| request.fence).collect::<Vec<_>>(),
        &rows().map(|(request, _)| request.root_seq).collect::<Vec<_>>(),
        &rows().map(|(_, row)| row.position.seq).collect::<Vec<_>>(),
        &rows().map(|(request, _)| request.thread_id.0).collect::<Vec<_>>(),
        &rows().map(|(_, row)| row.position.branch).collect::<Vec<_>>(),
        &rows().map(|(_, row)| row.source.code()).collect::<Vec<_>>(),
        &rows().map(|(_, row)| row.next.clone()).collect::<Vec<_>>(),
        &rows().map(|(_, row)| row.changed.clone()).collect::<Vec<_>>(),
        &rows().map(|(_, row)| row.keyframe.clone()).collect::<Vec<_>>() as &[Option<Vec<u8>>],
    )
    .fetch_all(db)
    .await?;
    Ok(passed.into_iter().filter_map(|number| usize::try_from(number).ok()).collect())
}

/// Anything that commits can hold.
///
/// An event that a wait names may have come before the wait: it is taken from `events` in the same
/// statement. A sender of events locks the head first, so the two cannot pass each other.
#[expect(clippy::too_many_lines, reason = "one statement and its columns")]
async fn execute_full(
    db: &mut PgConnection,
    requests: &[&Request],
) -> Result<HashSet<usize>, StoreError> {
    let c = Columns::of(requests);
    let passed = sqlx::query_scalar!(
        r#"with b as (
             select * from unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::bigint[], $5::uuid[])
               with ordinality as b (run_id, fence, root_seq, next_seq, thread_id, number)),
           gate as materialized (
             select (b.number - 1)::int as request, b.run_id, b.thread_id, b.root_seq, b.next_seq
               from heads h join b using (run_id)
              where h.fence = b.fence and h.seq = b.root_seq and h.status = 'running'
              order by h.run_id for no key update of h skip locked),
           ck as (
             select g.run_id, g.thread_id, c.*, case c.namespace when '' then '' else c.namespace || '|' end as below
               from unnest($6::int[], $7::text[], $8::int[], $9::bigint[], $10::int[],
                $11::bigint[], $12::smallint[], $13::text[], $14::bytea[], $15::bytea[], $16::bigint[])
               as c (request, namespace, branch, seq, parent_branch, parent_seq, source, next, changed, keyframe, settles)
               join gate g using (request)),
           stored as (
             insert into checkpoints (thread_id, run_id, seq, at, parent_seq, branch, parent_branch, source,
                                      namespace, next, changed, keyframe)
             select thread_id, run_id, seq, cynai_now(), parent_seq, branch, parent_branch, source,
                    namespace, next, changed, keyframe from ck
             on conflict do nothing),
           stored_values as (
             insert into channel_values (thread_id, namespace, branch, seq, channel, value)
             select g.thread_id, v.namespace, v.branch, v.seq, v.channel, v.value
               from unnest($17::int[], $18::text[], $19::int[], $20::bigint[], $21::text[], $22::bytea[])
                 as v (request, namespace, branch, seq, channel, value) join gate g using (request)
             on conflict do nothing),
           w as (
             select g.thread_id, w.* from unnest($23::int[], $24::text[], $25::int[], $26::bigint[], $27::uuid[], $28::bytea[])
               as w (request, namespace, branch, seq, task_id, writes) join gate g using (request)),
           stored_writes as (
             insert into writes (thread_id, namespace, branch, seq, task_id, writes)
             select thread_id, namespace, branch, seq, task_id, writes from w
             on conflict do nothing),
           settled as (
             update pending p set settled = true from w
              where p.thread_id = w.thread_id and p.namespace = w.namespace and p.branch = w.branch
                and p.seq = w.seq and p.task_id = w.task_id and not p.settled),
           settled_all as (
             update pending p set settled = true from ck
              where ck.settles is not null and p.thread_id = ck.thread_id and p.branch = ck.branch and not p.settled
                and ((p.namespace = ck.namespace and p.seq = ck.settles) or starts_with(p.namespace, ck.below))
                and not exists (select from w where w.task_id = p.task_id)),
           asked as materialized (
             select g.run_id, g.thread_id, p.*,
                    coalesce(p.at, cynai_now() + make_interval(secs => p.after)) as due
               from unnest($29::int[], $30::text[], $31::int[], $32::bigint[], $33::uuid[], $34::text[], $35::text[],
                           $36::int[], $37::int[], $38::float8[], $39::timestamptz[], $40::text[], $41::bytea[],
                           $42::bytea[])
                 as p (request, namespace, branch, seq, task_id, node, kind, attempt, round, after, at, name, data, answer)
               join gate g using (request)),
           waits as (
             select * from asked p
              where not exists (
                select from pending x where x.thread_id = p.thread_id and x.namespace = p.namespace
                   and x.branch = p.branch and x.seq = p.seq and x.task_id = p.task_id and x.round >= p.round)),
           arrived as materialized (
             delete from events e using (
               select distinct on (e.thread_id, e.event_id) e.thread_id, e.event_id, w.task_id
                 from (select *, row_number() over (partition by thread_id, name order by task_id) as turn
                         from waits where kind = 'event') w
                 join lateral (select e.thread_id, e.event_id, row_number() over (order by e.event_id) as turn
                                 from events e where e.thread_id = w.thread_id and e.name = w.name
                                 order by e.event_id limit 1000) e on e.turn = w.turn) x
              where e.thread_id = x.thread_id and e.event_id = x.event_id
             returning x.task_id, e.payload),
           stored_waits as (
             insert into pending (thread_id, namespace, branch, seq, task_id, run_id, node, kind, attempt, round,
                                  settled, due, name, data, answer)
             select w.thread_id, w.namespace, w.branch, w.seq, w.task_id, w.run_id, w.node, w.kind, w.attempt, w.round,
                    a.task_id is not null, w.due, w.name, w.data, coalesce(a.payload, w.answer)
               from waits w left join arrived a using (task_id)
             on conflict (thread_id, namespace, branch, seq, task_id) do update
                set run_id = excluded.run_id, kind = excluded.kind, attempt = excluded.attempt, round = excluded.round,
                    settled = excluded.settled, due = excluded.due, name = excluded.name, data = excluded.data,
                    answer = excluded.answer
              where pending.round < excluded.round),
           moved as (
             update heads h set seq = g.next_seq, claims = 0, wake = h.wake + g.arrived
               from (select gate.run_id, max(gate.next_seq) as next_seq,
                            (select count(*) from waits join arrived using (task_id)
                              where waits.run_id = gate.run_id) as arrived
                       from gate group by gate.run_id) g
              where h.run_id = g.run_id),
           streamed as (
             insert into stream_events (run_id, seq, place, mode, namespace, data)
             select g.run_id, s.seq, s.place, s.mode, s.namespace, s.data
               from unnest($43::int[], $44::bigint[], $45::int[], $46::text[], $47::text[], $48::bytea[])
                 as s (request, seq, place, mode, namespace, data) join gate g using (request)
             on conflict do nothing),
           e as (
             select g.run_id, g.thread_id, e.*
               from unnest($49::int[], $50::text[], $51::int[], $52::bigint[], $53::uuid[], $54::int[], $55::text[],
                           $56::text[], $57::text[], $58::text[], $59::text[], $60::bytea[], $61::bytea[], $62::text[])
                 as e (request, namespace, branch, seq, task_id, attempt, status, node, kind, target, effect, hash, body,
                       key)
               join gate g using (request)),
           intended as (
             insert into effects (thread_id, task_id, attempt, run_id, namespace, branch, seq, node, kind, target, effect,
                                  status, sends, started_at, request_hash, request, idempotency_key)
             select thread_id, task_id, attempt, run_id, namespace, branch, seq, node, kind, target, effect,
                    status, 1, cynai_now(), hash, body, key
               from e where node is not null
             on conflict (thread_id, task_id, attempt) do update
                set run_id = excluded.run_id, status = excluded.status, sends = effects.sends + 1, ended_at = null,
                    outcome = null, idempotency_key = excluded.idempotency_key),
           came_of as (
             update effects f set status = e.status, outcome = e.body, ended_at = cynai_now()
               from e where e.node is null and f.thread_id = e.thread_id and f.task_id = e.task_id
                and f.attempt = e.attempt)
           select request as "request!" from gate"#,
        &c.runs,
        &c.fences,
        &c.root_seqs,
        &c.next_seqs,
        &c.threads,
        &c.checkpoints.request,
        &c.checkpoints.namespace,
        &c.checkpoints.branch,
        &c.checkpoints.seq,
        &c.checkpoints.parent_branch as &[Option<i32>],
        &c.checkpoints.parent_seq as &[Option<i64>],
        &c.checkpoints.source,
        &c.checkpoints.next,
        &c.checkpoints.changed,
        &c.checkpoints.keyframe as &[Option<Vec<u8>>],
        &c.checkpoints.settles as &[Option<i64>],
        &c.values.request,
        &c.values.namespace,
        &c.values.branch,
        &c.values.seq,
        &c.values.channel,
        &c.values.value,
        &c.writes.request,
        &c.writes.namespace,
        &c.writes.branch,
        &c.writes.seq,
        &c.writes.task,
        &c.writes.writes,
        &c.waits.request,
        &c.waits.namespace,
        &c.waits.branch,
        &c.waits.seq,
        &c.waits.task,
        &c.waits.node,
        &c.waits.kind,
        &c.waits.attempt,
        &c.waits.round,
        &c.waits.after as &[Option<f64>],
        &c.waits.at as &[Option<chrono::DateTime<chrono::Utc>>],
        &c.waits.name as &[Option<String>],
        &c.waits.data as &[Option<Vec<u8>>],
        &c.waits.answer as &[Option<Vec<u8>>],
        &c.stream.request,
        &c.stream.seq,
        &c.stream.place,
        &c.stream.mode,
        &c.stream.namespace,
        &c.stream.data,
        &c.effects.request,
        &c.effects.namespace,
        &c.effects.branch,
        &c.effects.seq,
        &c.effects.task,
        &c.effects.attempt,
        &c.effects.status,
        &c.effects.node as &[Option<String>],
        &c.effects.kind as &[Option<String>],
        &c.effects.target as &[Option<String>],
        &c.effects.effect as &[Option<String>],
        &c.effects.hash as &[Option<Vec<u8>>],
        &c.effects.body,
        &c.effects.key as &[Option<String>],
    )
    .fetch_all(db)
    .await?;
    Ok(passed.into_iter().filter_map(|number| usize::try_from(number).ok()).collect())
}
