//! Who may advance a run: claims, leases, parking, waking, recovery.
//!
//! A run that can go on has a row in `queue`; claiming deletes it and grants a fence. A run that waits
//! is parked: no process holds it, and its due time, if it has one, is in `queue` too. What arrives
//! from outside raises `heads.wake`; parking succeeds only where `wake` is still what the driver saw,
//! so nothing that arrives in between is slept through.
//!
//! **Invariant:** locks are taken in the order threads, heads, everything else; statements that take
//! many skip what is locked.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

use super::StoreError;
use crate::ids::{AssistantId, InstanceId, RunId, TaskId, ThreadId, UserId};

/// Authority over a run, with what is needed to begin.
#[derive(Debug, Clone)]
pub struct Grant {
    /// The run.
    pub run_id: RunId,
    /// Its thread.
    pub thread_id: ThreadId,
    /// Its owner.
    pub user_id: UserId,
    /// Names this grant in every write.
    pub fence: i64,
    /// The root's last checkpoint, -1 when the run has not begun.
    pub seq: i64,
    /// The run's input checkpoint, -1 when it has not begun.
    pub first_seq: i64,
    /// The branch that it runs on.
    pub branch: i32,
    /// What had arrived when it was granted.
    pub wake: i64,
    /// Processes that died with it since its last commit.
    pub claims: i16,
    /// The graph that it is pinned to.
    pub graph_hash: Vec<u8>,
    /// Its input, when it has not begun.
    pub input: Option<Vec<u8>>,
    /// What the client asked for.
    pub options: Vec<u8>,
    /// Stream modes that rows are written for.
    pub stream_modes: Vec<String>,
    /// What the client named.
    pub assistant_id: AssistantId,
    /// The client's keys.
    pub metadata: serde_json::Value,
    /// When it first started.
    pub started_at: Option<DateTime<Utc>>,
    /// Runs of its thread that were rolled back.
    pub generation: i32,
}

/// What a driver finds when it looks at the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queued {
    /// Whether runs can be claimed.
    pub ready: bool,
    /// Whether runs wait that a process died with.
    pub suspect: bool,
    /// How long until the next run is due that waits for a time; zero when one is.
    pub due: Option<Duration>,
}

/// Looks whether there is something to do: three probes of small indexes, so that an idle look costs nearly nothing.
pub async fn look(db: &mut PgConnection) -> Result<Queued, StoreError> {
    let row = sqlx::query!(
        r#"select exists (select from queue where state = 'ready') as "ready!",
                  exists (select from queue where state = 'suspect') as "suspect!",
                  extract(epoch from (select due from queue where state = 'later' order by due limit 1)
                                     - cynai_now())::float8 as seconds"#
    )
    .fetch_one(db)
    .await?;
    let due = row
        .seconds
        .map(|seconds| Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX));
    Ok(Queued { ready: row.ready, suspect: row.suspect, due })
}

/// The most runs that one claim may take.
pub const MOST: i64 = 16;

/// How many runs a claim may take, at most [`MOST`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// Ready ones: by priority, then in turn between owners, then by age.
    Ready(i64),
    /// The oldest one that a process died with.
    Suspect,
}

/// Claims runs: each gets a new fence, and its row in the queue goes.
///
/// Both kinds are one statement with two limits, so that one plan serves all calls: made anew for each, it would
/// cost several times what the statement does. Candidates are four for each of the [`MOST`] that a claim may take, so
/// that others may hold some of them locked; the number is written out, since a planner that does not know it joins
/// them with the whole queue.
pub async fn claim(
    db: &mut PgConnection,
    instance: InstanceId,
    epoch: i64,
    claim: Claim,
) -> Result<Vec<Grant>, StoreError> {
    let (ready, suspects) = match claim {
        Claim::Ready(limit) => (limit, 0),
        Claim::Suspect => (0, 1),
    };
    let rows = sqlx::query_as!(
        Grant,
        r#"with recursive owners as (
             (select user_id from queue where state = 'ready' order by user_id limit 1)
             union all
             select (select q.user_id from queue q where q.state = 'ready' and q.user_id > o.user_id
                      order by q.user_id limit 1)
               from owners o where o.user_id is not null),
           candidates as (
             select q.run_id, 'ready' as state, q.priority, q.due,
                    row_number() over (partition by o.user_id order by q.priority desc, q.due) as turn
               from owners o cross join lateral (
                 select run_id, priority, due from queue where state = 'ready' and user_id = o.user_id
                  order by priority desc, due limit 64) q
              where o.user_id is not null and $3::bigint > 0
             union all
             (select run_id, 'suspect', priority, due, 1 from queue where state = 'suspect' and $4::bigint > 0
               order by due limit 4)),
           best as materialized (
             select * from candidates order by priority desc, turn, due limit 64),
           picked as materialized (
             select q.run_id, q.thread_id from best c join queue q using (run_id)
               join threads t on t.thread_id = q.thread_id
              where q.state = c.state
              order by c.priority desc, c.turn, c.due limit $3::bigint + $4::bigint
                for update of q, t skip locked),
           taken as (delete from queue q using picked p where q.run_id = p.run_id),
           fenced as (
             update threads t set fence = fence + 1 from picked p where t.thread_id = p.thread_id
             returning t.thread_id, t.fence, t.generation),
           granted as (
             update heads h set status = 'running', fence = f.fence, instance_id = $1, epoch = $2
               from picked p join fenced f using (thread_id)
              where h.run_id = p.run_id and h.status = 'queued'
             returning h.run_id, h.thread_id, h.fence, f.generation, h.seq, h.first_seq, h.branch, h.wake, h.claims),
           started as (
             update runs r set status = 'running', started_at = cynai_now(), updated_at = cynai_now()
               from granted g where r.run_id = g.run_id and r.status = 'pending')
           select g.run_id as "run_id!: RunId", g.thread_id as "thread_id!: ThreadId", r.user_id as "user_id!: UserId",
                  g.fence as "fence!", g.seq as "seq!", g.first_seq as "first_seq!", g.branch as "branch!",
                  g.wake as "wake!", g.claims as "claims!", r.graph_hash as "graph_hash!", r.input, r.options as "options!",
                  r.stream_modes as "stream_modes!", r.assistant_id as "assistant_id!: AssistantId",
                  r.metadata as "metadata!", coalesce(r.started_at, cynai_now()) as started_at,
                  g.generation as "generation!"
             from granted g join runs r using (run_id)"#,
        instance as InstanceId,
        epoch,
        ready,
        suspects,
    )
    .fetch_all(db)
    .await?;
    Ok(rows)
}

/// What has become due.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DueRuns {
    /// Whether runs are due that [`promote_due`] makes claimable.
    pub parked: bool,
    /// Runs that wait behind a question's expiry; each is to be activated under its thread's lock.
    pub followups: Vec<(ThreadId, RunId)>,
}

/// Looks for runs whose time has come, at most `limit` of them. Writes nothing.
pub async fn due(db: &mut PgConnection, limit: i64) -> Result<DueRuns, StoreError> {
    let rows = sqlx::query!(
        r#"select q.thread_id as "thread_id: ThreadId", q.run_id as "run_id: RunId", h.status = 'pending' as "followup!"
             from queue q join heads h using (run_id)
            where q.state = 'later' and q.due <= cynai_now()
            order by q.due limit $1"#,
        limit,
    )
    .fetch_all(db)
    .await?;
    let mut due = DueRuns::default();
    for row in rows {
        if row.followup {
            due.followups.push((row.thread_id, row.run_id));
        } else {
            due.parked = true;
        }
    }
    Ok(due)
}

/// Makes parked and delayed runs claimable whose due time has come; answers how many.
///
/// The head is locked first, as by whoever wakes a run: the other way round the two could wait for each other.
pub async fn promote_due(db: &mut PgConnection, limit: i64) -> Result<u64, StoreError> {
    let result = sqlx::query_scalar!(
        r#"with due as (
             select q.run_id from queue q join heads h using (run_id)
              where q.state = 'later' and q.due <= cynai_now() and h.status <> 'pending'
              order by q.due limit $1 for no key update of h skip locked),
           moved as (
             update queue q set state = 'ready' from due d where q.run_id = d.run_id and q.state = 'later'
             returning q.run_id),
           woken as (
             update heads h set status = 'queued', wake = wake + 1 from moved m
              where h.run_id = m.run_id and h.status = 'parked')
           select count(*) as "count!" from moved"#,
        limit,
    )
    .fetch_one(db)
    .await?;
    Ok(u64::try_from(result).unwrap_or(0))
}

/// What became of parking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parked {
    /// It is parked.
    Yes,
    /// Something arrived since `wake` was read: look again. Holds what `wake` is now.
    Awake(i64),
    /// It is not this process's any more.
    Fenced,
}

/// Parks a run until something arrives, its next due time, or `deadline`.
pub async fn park(
    db: &mut PgConnection,
    run: RunId,
    fence: i64,
    wake: i64,
    wake_below: i32,
    deadline: Option<DateTime<Utc>>,
) -> Result<Parked, StoreError> {
    let row = sqlx::query!(
        r#"with h as (
             update heads set status = 'parked', instance_id = null, epoch = null, wake_below = $4, claims = 0
              where run_id = $1 and fence = $2 and status = 'running' and wake = $3
             returning run_id, thread_id),
           q as (
             insert into queue (run_id, thread_id, user_id, priority, state, due)
             select h.run_id, h.thread_id, r.user_id, r.priority, 'later', d.due
               from h join runs r using (run_id), lateral (
                 select least(min(p.due), $5) as due from pending p where p.run_id = h.run_id and not p.settled) d
              where d.due is not null)
           select (select count(*) from h) as "parked!",
                  (select wake from heads where run_id = $1 and fence = $2 and status = 'running') as "wake""#,
        run as RunId,
        fence,
        wake,
        wake_below,
        deadline,
    )
    .fetch_one(db)
    .await?;
    Ok(match (row.parked, row.wake) {
        (1.., _) => Parked::Yes,
        (_, Some(wake)) => Parked::Awake(wake),
        (_, None) => Parked::Fenced,
    })
}

/// Gives a run back, to be claimed by anybody at once.
pub async fn release(db: &mut PgConnection, run: RunId, fence: i64) -> Result<bool, StoreError> {
    let result = sqlx::query!(
        "with h as (
           update heads set status = 'queued', instance_id = null, epoch = null, claims = 0
            where run_id = $1 and fence = $2 and status = 'running'
           returning run_id, thread_id)
         insert into queue (run_id, thread_id, user_id, priority, state, due)
         select h.run_id, h.thread_id, r.user_id, r.priority, 'ready', cynai_now() from h join runs r using (run_id)",
        run as RunId,
        fence,
    )
    .execute(db)
    .await?;
    Ok(result.rows_affected() == 1)
}

/// Gives a run back as a suspect: whoever held it came to harm.
pub async fn surrender(db: &mut PgConnection, run: RunId, fence: i64) -> Result<bool, StoreError> {
    let result = sqlx::query!(
        "with h as (
           update heads set status = 'queued', instance_id = null, epoch = null, claims = claims + 1
            where run_id = $1 and fence = $2 and status = 'running'
           returning run_id, thread_id)
         insert into queue (run_id, thread_id, user_id, priority, state, due)
         select h.run_id, h.thread_id, r.user_id, r.priority, 'suspect', cynai_now() from h join runs r using (run_id)",
        run as RunId,
        fence,
    )
    .execute(db)
    .await?;
    Ok(result.rows_affected() == 1)
}

/// Records that something arrived for a run whose head the caller has locked, and wakes the run if it is parked
/// and no more activations are outstanding than it sleeps through.
///
/// The run's place in the queue is touched only when it is parked: a claim may hold the place of a queued one, and
/// wait for the head.
pub async fn wake(db: &mut PgConnection, run: RunId) -> Result<bool, StoreError> {
    let result = sqlx::query!(
        "with known as materialized (
           select run_id, status = 'parked' and (
                    select count(*) from pending p
                     where p.run_id = h.run_id and not p.settled and p.kind not in ('interrupt', 'attempt'))
                    <= h.wake_below as wakes
             from heads h where run_id = $1 for no key update),
         h as (
           update heads h set wake = wake + 1, status = case when k.wakes then 'queued' else h.status end
             from known k where h.run_id = k.run_id
           returning h.run_id, h.thread_id, k.wakes)
         insert into queue (run_id, thread_id, user_id, priority, state, due)
         select h.run_id, h.thread_id, r.user_id, r.priority, 'ready', cynai_now()
           from h join runs r using (run_id) where h.wakes
         on conflict (run_id) do update set state = 'ready', due = excluded.due",
        run as RunId,
    )
    .execute(db)
    .await?;
    Ok(result.rows_affected() > 0)
}

/// Settles an activation's wait with `answer`, once; wakes the run when it should.
///
/// Takes the head's lock first. False: it was settled before, or the run has ended.
pub async fn settle(
    db: &mut PgConnection,
    run: RunId,
    task: TaskId,
    answer: &[u8],
) -> Result<bool, StoreError> {
    let head = sqlx::query_scalar!(
        "select 1 as one from heads where run_id = $1 for no key update",
        run as RunId
    )
    .fetch_optional(&mut *db)
    .await?;
    if head.is_none() {
        return Ok(false);
    }
    let result = sqlx::query!(
        "update pending set answer = $3, settled = true where run_id = $1 and task_id = $2 and not settled",
        run as RunId,
        task as TaskId,
        answer,
    )
    .execute(&mut *db)
    .await?;
    if result.rows_affected() == 0 {
        return Ok(false);
    }
    wake(db, run).await?;
    Ok(true)
}

/// Delivers a named event: to the activation that has waited longest for it, or into `events` until one does.
///
/// The caller holds the thread's lock.
pub async fn send_event(
    db: &mut PgConnection,
    thread: ThreadId,
    active_run: Option<RunId>,
    name: &str,
    payload: &[u8],
) -> Result<(), StoreError> {
    if let Some(run) = active_run {
        sqlx::query_scalar!(
            "select 1 as one from heads where run_id = $1 for no key update",
            run as RunId
        )
        .fetch_optional(&mut *db)
        .await?;
        let waiting = sqlx::query_scalar!(
            r#"select task_id as "task_id: TaskId" from pending
                where run_id = $1 and kind = 'event' and name = $2 and not settled
                order by namespace, seq, task_id limit 1"#,
            run as RunId,
            name,
        )
        .fetch_optional(&mut *db)
        .await?;
        if let Some(task) = waiting {
            settle(db, run, task, payload).await?;
            return Ok(());
        }
        // The run may be storing just now that it waits for this: told so, it looks once more before it parks.
        sqlx::query!("update heads set wake = wake + 1 where run_id = $1", run as RunId)
            .execute(&mut *db)
            .await?;
    }
    sqlx::query!(
        "insert into events (thread_id, name, payload, created_at) values ($1, $2, $3, cynai_now())",
        thread as ThreadId,
        name,
        payload,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Gives a held run the events that came while it stored that it waits for them.
///
/// A commit that stores a wait takes the events that it sees; one that is committed after the commit's snapshot
/// and before its lock is seen by neither side. It has raised `wake`, and so leads here.
pub async fn deliver(db: &mut PgConnection, run: RunId, fence: i64) -> Result<u64, StoreError> {
    let result = sqlx::query!(
        "with h as materialized (
           select run_id, thread_id from heads
            where run_id = $1 and fence = $2 and status = 'running' for no key update),
         w as (
           select p.thread_id, p.namespace, p.branch, p.seq, p.task_id, p.name,
                  row_number() over (partition by p.name order by p.namespace, p.seq, p.task_id) as turn
             from pending p join h using (thread_id, run_id) where p.kind = 'event' and not p.settled),
         e as (
           select e.thread_id, e.event_id, e.name, e.payload,
                  row_number() over (partition by e.name order by e.event_id) as turn
             from events e join h using (thread_id) where e.name in (select name from w)),
         gone as (
           delete from events x using e join w using (name, turn)
            where x.thread_id = e.thread_id and x.event_id = e.event_id
           returning w.namespace, w.branch, w.seq, w.task_id, x.payload)
         update pending p set answer = g.payload, settled = true from gone g, h
          where p.thread_id = h.thread_id and p.namespace = g.namespace and p.branch = g.branch and p.seq = g.seq
            and p.task_id = g.task_id and not p.settled",
        run as RunId,
        fence,
    )
    .execute(db)
    .await?;
    Ok(result.rows_affected())
}

/// How many events of a thread nobody has waited for yet.
pub async fn count_events(db: &mut PgConnection, thread: ThreadId) -> Result<i64, StoreError> {
    let count = sqlx::query_scalar!(
        r#"select count(*) as "count!" from events where thread_id = $1"#,
        thread as ThreadId
    )
    .fetch_one(db)
    .await?;
    Ok(count)
}

/// Frees the runs of processes that are dead: their lease ended, or a later life of theirs began. Each becomes a suspect.
pub async fn recover(db: &mut PgConnection, limit: i64) -> Result<Vec<RunId>, StoreError> {
    let runs = sqlx::query_scalar!(
        r#"with dead as (
             select h.run_id from heads h left join instances i using (instance_id)
              where h.status = 'running'
                and (i.instance_id is null or i.epoch <> h.epoch or i.deadline < cynai_now())
              order by h.run_id limit $1 for update of h skip locked),
           freed as (
             update heads h set status = 'queued', instance_id = null, epoch = null, claims = claims + 1
               from dead d where h.run_id = d.run_id
             returning h.run_id, h.thread_id),
           queued as (
             insert into queue (run_id, thread_id, user_id, priority, state, due)
             select f.run_id, f.thread_id, r.user_id, r.priority, 'suspect', cynai_now() from freed f join runs r using (run_id))
           select run_id as "run_id!: RunId" from freed"#,
        limit,
    )
    .fetch_all(db)
    .await?;
    Ok(runs)
}

/// The runs that the tables say a driver's life holds, with their fences.
pub async fn held_by(
    db: &mut PgConnection,
    instance: InstanceId,
    epoch: i64,
) -> Result<Vec<(RunId, i64)>, StoreError> {
    let rows = sqlx::query!(
        r#"select run_id as "run_id: RunId", fence from heads
            where instance_id = $1 and epoch = $2 and status = 'running'"#,
        instance as InstanceId,
        epoch,
    )
    .fetch_all(db)
    .await?;
    Ok(rows.into_iter().map(|row| (row.run_id, row.fence)).collect())
}

/// Locks a run's head until the end of the transaction, so that no commit of it comes in between.
pub async fn lock_head(db: &mut PgConnection, run: RunId) -> Result<(), StoreError> {
    sqlx::query_scalar!(
        "select 1 as one from heads where run_id = $1 for no key update",
        run as RunId
    )
    .fetch_optional(db)
    .await?;
    Ok(())
}

/// Begins a new life of a driver installation; its predecessor's runs are free from now on. Answers the epoch.
pub async fn register(
    db: &mut PgConnection,
    instance: InstanceId,
    host: &str,
    lease: Duration,
) -> Result<i64, StoreError> {
    let epoch = sqlx::query_scalar!(
        "insert into instances (instance_id, epoch, deadline, host, started_at)
         values ($1, 1, cynai_now() + make_interval(secs => $3), $2, cynai_now())
         on conflict (instance_id) do update
            set epoch = instances.epoch + 1, deadline = excluded.deadline, host = excluded.host,
                started_at = excluded.started_at
         returning epoch",
        instance as InstanceId,
        host,
        lease.as_secs_f64(),
    )
    .fetch_one(db)
    .await?;
    Ok(epoch)
}

/// Renews a driver's lease. False: another life of this installation has begun, or its lease had ended already.
pub async fn renew(
    db: &mut PgConnection,
    instance: InstanceId,
    epoch: i64,
    lease: Duration,
) -> Result<bool, StoreError> {
    let result = sqlx::query!(
        "update instances set deadline = cynai_now() + make_interval(secs => $3)
          where instance_id = $1 and epoch = $2 and deadline >= cynai_now()",
        instance as InstanceId,
        epoch,
        lease.as_secs_f64(),
    )
    .execute(db)
    .await?;
    Ok(result.rows_affected() == 1)
}

/// Whether another driver's lease holds.
pub async fn others(db: &mut PgConnection, instance: InstanceId) -> Result<bool, StoreError> {
    let others = sqlx::query_scalar!(
        r#"select exists (select from instances where instance_id <> $1 and deadline >= cynai_now()) as "others!""#,
        instance as InstanceId,
    )
    .fetch_one(db)
    .await?;
    Ok(others)
}

/// Ends a driver's lease at once.
pub async fn unregister(
    db: &mut PgConnection,
    instance: InstanceId,
    epoch: i64,
) -> Result<(), StoreError> {
    sqlx::query!(
        "update instances set deadline = cynai_now() - interval '1 second' where instance_id = $1 and epoch = $2",
        instance as InstanceId,
        epoch,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// What is queued: claimable, suspect, later.
pub async fn depth(db: &mut PgConnection) -> Result<(i64, i64, i64), StoreError> {
    let row = sqlx::query!(
        r#"select count(*) filter (where state = 'ready') as "ready!",
                  count(*) filter (where state = 'suspect') as "suspect!",
                  count(*) filter (where state = 'later') as "later!" from queue"#
    )
    .fetch_one(db)
    .await?;
    Ok((row.ready, row.suspect, row.later))
}

/// How long until an instant, by the database's clock; zero when it has passed.
pub async fn until(db: &mut PgConnection, instant: DateTime<Utc>) -> Result<Duration, StoreError> {
    let seconds = sqlx::query_scalar!(
        r#"select extract(epoch from $1::timestamptz - cynai_now())::float8 as "seconds!""#,
        instant
    )
    .fetch_one(db)
    .await?;
    Ok(Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX))
}
