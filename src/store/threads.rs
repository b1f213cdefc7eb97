//! Threads: their rows, and the deletion of everything that hangs on one.

use chrono::{DateTime, Utc};
use serde_json::{Map, Value};
use sqlx::PgConnection;
use sqlx::types::Json;

use super::StoreError;
use super::status::ThreadStatus;
use crate::ids::{ThreadId, UserId};

/// A thread's row, as readers need it.
#[derive(Debug)]
pub struct ThreadRow {
    /// Its id.
    pub thread_id: ThreadId,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it last changed.
    pub updated_at: DateTime<Utc>,
    /// When its state last changed.
    pub state_updated_at: DateTime<Utc>,
    /// The client's own keys.
    pub metadata: Json<Map<String, Value>>,
    /// Of its last run.
    pub config: Json<Map<String, Value>>,
    /// What it is doing.
    pub status: ThreadStatus,
    /// JSON of the state when the last run ended; absent when it was not asked for.
    pub state_values: Option<Vec<u8>>,
    /// JSON: task id -> interrupts.
    pub interrupts: Option<Vec<u8>>,
    /// JSON: why the last run failed.
    pub error: Option<Vec<u8>>,
}

/// Which threads of a user.
#[derive(Debug)]
pub struct ThreadQuery<'a> {
    /// Whose.
    pub user: UserId,
    /// Only these; `None` is all.
    pub ids: Option<&'a [uuid::Uuid]>,
    /// Whose metadata contains this.
    pub metadata: &'a Map<String, Value>,
    /// Whose state contains this; `None` does not look at states.
    pub values: Option<&'a Map<String, Value>>,
    /// In this status.
    pub status: Option<ThreadStatus>,
}

/// Which part of the answer.
#[derive(Debug)]
pub struct ThreadPage<'a> {
    /// A column's name; unknown ones sort by id.
    pub sort_by: &'a str,
    /// Smallest first.
    pub ascending: bool,
    /// At most so many.
    pub limit: i64,
    /// Skip so many.
    pub offset: i64,
    /// Whether to read the states.
    pub with_values: bool,
}

/// Adds an idle thread; answers whether the id was free.
pub async fn insert(
    db: &mut PgConnection,
    thread: ThreadId,
    user: UserId,
    metadata: &Map<String, Value>,
    now: DateTime<Utc>,
) -> Result<bool, StoreError> {
    let result = sqlx::query!(
        "insert into threads (thread_id, user_id, metadata, created_at, updated_at, state_updated_at)
         values ($1, $2, $3, $4, $4, $4) on conflict (thread_id) do nothing",
        thread as ThreadId,
        user as UserId,
        Json(metadata) as _,
        now,
    )
    .execute(db)
    .await?;
    Ok(result.rows_affected() == 1)
}

/// A thread of `user`.
pub async fn find(
    db: &mut PgConnection,
    thread: ThreadId,
    user: UserId,
) -> Result<Option<ThreadRow>, StoreError> {
    Ok(sqlx::query_as!(
        ThreadRow,
        r#"select thread_id as "thread_id: ThreadId", created_at, updated_at, state_updated_at,
                  metadata as "metadata: Json<Map<String, Value>>",
                  config as "config: Json<Map<String, Value>>",
                  status as "status: ThreadStatus", state_values, interrupts, error
           from threads where thread_id = $1 and user_id = $2"#,
        thread as ThreadId,
        user as UserId,
    )
    .fetch_optional(db)
    .await?)
}

/// What a thread of `user` is doing.
pub async fn find_status(
    db: &mut PgConnection,
    thread: ThreadId,
    user: UserId,
) -> Result<Option<ThreadStatus>, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select status as "status: ThreadStatus" from threads where thread_id = $1 and user_id = $2"#,
        thread as ThreadId,
        user as UserId,
    )
    .fetch_optional(db)
    .await?)
}

/// Lays `metadata` over a thread's own; answers the size of the result, or `None` without such a thread.
pub async fn merge_metadata(
    db: &mut PgConnection,
    thread: ThreadId,
    user: UserId,
    metadata: &Map<String, Value>,
    now: DateTime<Utc>,
) -> Result<Option<i32>, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"update threads set metadata = metadata || $3, updated_at = $4
           where thread_id = $1 and user_id = $2
           returning octet_length(metadata::text) as "size!""#,
        thread as ThreadId,
        user as UserId,
        Json(metadata) as _,
        now,
    )
    .fetch_optional(db)
    .await?)
}

/// Deletes a thread that is not busy, and all that hangs on it; answers whether there was one.
///
/// A run that is being accepted holds the thread's row lock, so this waits and then sees it busy.
pub async fn delete(
    db: &mut PgConnection,
    thread: ThreadId,
    user: UserId,
) -> Result<bool, StoreError> {
    let gone = sqlx::query_scalar!(
        r#"with gone as (
             delete from threads where thread_id = $1 and user_id = $2 and status <> 'busy'
             returning thread_id),
           old_runs as (delete from runs using gone where runs.thread_id = gone.thread_id returning run_id),
           a as (delete from heads using gone where heads.thread_id = gone.thread_id),
           b as (delete from queue using old_runs where queue.run_id = old_runs.run_id),
           c as (delete from stream_events using old_runs where stream_events.run_id = old_runs.run_id),
           d as (delete from jobs using old_runs where jobs.run_id = old_runs.run_id),
           e as (delete from checkpoints using gone where checkpoints.thread_id = gone.thread_id),
           f as (delete from channel_values using gone where channel_values.thread_id = gone.thread_id),
           g as (delete from writes using gone where writes.thread_id = gone.thread_id),
           h as (delete from pending using gone where pending.thread_id = gone.thread_id),
           i as (delete from events using gone where events.thread_id = gone.thread_id),
           j as (delete from effects using gone where effects.thread_id = gone.thread_id)
           select count(*) as "count!" from gone"#,
        thread as ThreadId,
        user as UserId,
    )
    .fetch_one(db)
    .await?;
    Ok(gone == 1)
}

/// Threads of a user, in the order asked for.
///
/// PostgreSQL's JSON refuses `\u0000`, so a state is compared with that character replaced.
pub async fn search(
    db: &mut PgConnection,
    query: &ThreadQuery<'_>,
    page: &ThreadPage<'_>,
) -> Result<Vec<ThreadRow>, StoreError> {
    Ok(sqlx::query_as!(
        ThreadRow,
        r#"select thread_id as "thread_id: ThreadId", created_at, updated_at, state_updated_at,
                  metadata as "metadata: Json<Map<String, Value>>",
                  config as "config: Json<Map<String, Value>>",
                  status as "status: ThreadStatus",
                  case when $6 then state_values end as state_values, interrupts, error
           from threads
           where user_id = $1
             and ($2::uuid[] is null or thread_id = any($2))
             and ($3::jsonb = '{}' or metadata @> $3)
             and ($4::text is null or status = $4)
             and ($5::jsonb is null or (state_values is not null and
                  replace(convert_from(state_values, 'UTF8'), '\u0000', '\ufffd')::jsonb @> $5))
           order by
             case when $7 = 'status' and $8 then status end,
             case when $7 = 'status' and not $8 then status end desc,
             case when $7 = 'created_at' and $8 then created_at end,
             case when $7 = 'created_at' and not $8 then created_at end desc,
             case when $7 = 'updated_at' and $8 then updated_at end,
             case when $7 = 'updated_at' and not $8 then updated_at end desc,
             case when $7 = 'state_updated_at' and $8 then state_updated_at end,
             case when $7 = 'state_updated_at' and not $8 then state_updated_at end desc,
             case when $7 = 'thread_id' and not $8 then thread_id end desc,
             thread_id
           limit $9 offset $10"#,
        query.user as UserId,
        query.ids,
        Json(query.metadata) as _,
        query.status as Option<ThreadStatus>,
        query.values.map(Json) as _,
        page.with_values,
        page.sort_by,
        page.ascending,
        page.limit,
        page.offset,
    )
    .fetch_all(db)
    .await?)
}

/// How many threads of a user there are.
pub async fn count(db: &mut PgConnection, query: &ThreadQuery<'_>) -> Result<i64, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select count(*) as "count!" from threads
           where user_id = $1
             and ($2::uuid[] is null or thread_id = any($2))
             and ($3::jsonb = '{}' or metadata @> $3)
             and ($4::text is null or status = $4)
             and ($5::jsonb is null or (state_values is not null and
                  replace(convert_from(state_values, 'UTF8'), '\u0000', '\ufffd')::jsonb @> $5))"#,
        query.user as UserId,
        query.ids,
        Json(query.metadata) as _,
        query.status as Option<ThreadStatus>,
        query.values.map(Json) as _,
    )
    .fetch_one(db)
    .await?)
}
