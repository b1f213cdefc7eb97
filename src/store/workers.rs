//! Worker machines: who they are, when they were seen, what they were configured with.
//!
//! **Invariant:** no row holds a secret: tokens of workers are hashes, and configurations name their secrets.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::PgConnection;

use super::StoreError;
use crate::ids::WorkerId;

/// Tokens that are kept of each worker.
const KEPT_TOKENS: i64 = 5;
/// Configurations that are kept of each worker.
const KEPT_CONFIGS: i64 = 20;

/// A worker's row.
#[derive(Debug, Clone)]
pub struct WorkerRow {
    /// Its id.
    pub worker_id: WorkerId,
    /// What people call it.
    pub slug: String,
    /// The server as it reached it.
    pub server_url: String,
    /// Its Worker API, as reported.
    pub base_url: Option<String>,
    /// The same, as an operator says.
    pub url_override: Option<String>,
    /// Merge patch over the policy of all workers.
    pub patch: Value,
    /// Which bearer token its newest configuration brings.
    pub token_serial: i32,
    /// Its newest configuration.
    pub issued_version: Option<String>,
    /// The last that was applied.
    pub config_version: Option<String>,
    /// The one that was acknowledged last.
    pub ack_version: Option<String>,
    /// Whether its Worker API must show one certificate.
    pub pinned: bool,
}

/// A worker as people see it.
#[derive(Debug, Clone)]
pub struct WorkerInfo {
    /// Its id.
    pub worker_id: WorkerId,
    /// See the schema, also for what follows.
    pub slug: String,
    pub name: Option<String>,
    pub labels: Vec<String>,
    pub status: String,
    pub created_at: DateTime<Utc>,
    pub registered_at: DateTime<Utc>,
    pub base_url: Option<String>,
    pub url_override: Option<String>,
    pub pinned: bool,
    pub drained_at: Option<DateTime<Utc>>,
    pub drained_by: Option<String>,
    pub drain_reason: Option<String>,
    pub patch: Value,
    pub issued_version: Option<String>,
    pub config_version: Option<String>,
    pub ack_version: Option<String>,
    pub config_ack_at: Option<DateTime<Utc>>,
    pub config_ack_status: Option<String>,
    pub config_ack_error: Option<String>,
    pub last_seen_at: Option<DateTime<Utc>>,
    pub ready: bool,
    pub running: i32,
    pub queued: i32,
    pub received_at: Option<DateTime<Utc>>,
    /// Only of a single worker.
    pub report: Option<Value>,
    pub slots: Option<i64>,
    pub open_jobs: i64,
}

/// A registration, as it is stored.
#[derive(Debug)]
pub struct Registered<'a> {
    /// Used when the slug is new.
    pub worker_id: WorkerId,
    /// What people call it.
    pub slug: &'a str,
    /// As it calls itself.
    pub name: Option<&'a str>,
    /// As reported.
    pub labels: &'a [String],
    /// The server as it reached it.
    pub server_url: &'a str,
    /// Its Worker API.
    pub base_url: Option<&'a str>,
    /// The certificate that its Worker API shows.
    pub server_cert: Option<&'a str>,
}

/// What an acknowledgement says.
#[derive(Debug)]
pub struct Ack<'a> {
    /// The configuration.
    pub config_version: &'a str,
    /// When, by the worker's clock.
    pub at: DateTime<Utc>,
    /// `applied`, `failed`, `rolled_back`.
    pub status: &'a str,
    /// Why not.
    pub error: Option<&'a str>,
}

/// What servers watch of every worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Its id.
    pub worker_id: WorkerId,
    /// Its newest configuration.
    pub issued_version: Option<String>,
    /// The configuration in force.
    pub config_version: Option<String>,
    /// When its last report came.
    pub received_at: Option<DateTime<Utc>>,
    /// Whether it gets new jobs.
    pub active: bool,
}

/// What is needed to speak to a worker.
#[derive(Debug, Clone)]
pub struct Reach {
    /// What people call it.
    pub slug: String,
    /// The certificate that it must show.
    pub server_cert: Option<String>,
    /// The configuration in force, as stored.
    pub content: Value,
    /// What it can do.
    pub report: Option<Value>,
}

/// What a heartbeat is answered with.
#[derive(Debug, Clone)]
pub struct BeatRow {
    /// Its newest configuration.
    pub issued_version: Option<String>,
    /// Whether an operator took it out of service.
    pub drained: bool,
}

/// Whose token this is, while it is good.
#[derive(Debug, Clone)]
pub struct TokenOwner {
    /// The worker.
    pub worker_id: WorkerId,
    /// What people call it.
    pub slug: String,
    /// Whether the token is good now.
    pub live: bool,
    /// Whether it was shown before.
    pub used: bool,
    /// Whether it proves who asks for another: none that came after it was ever shown.
    pub newest: bool,
}

/// The worker of this slug, locked until the transaction ends, and when it was last seen.
pub async fn lock_slug(
    db: &mut PgConnection,
    slug: &str,
) -> Result<Option<(WorkerId, bool)>, StoreError> {
    // What two first registrations of one slug have in common, before there is a row to lock.
    sqlx::query_scalar!(
        r#"select pg_advisory_xact_lock(hashtextextended('worker ' || $1, 0))::text as "locked""#,
        slug
    )
    .fetch_one(&mut *db)
    .await?;
    let row = sqlx::query!(
        r#"select worker_id as "worker_id: WorkerId", drained_at is not null as "drained!" from workers
            where slug = $1 for update"#,
        slug
    )
    .fetch_optional(db)
    .await?;
    Ok(row.map(|row| (row.worker_id, row.drained)))
}

/// Somebody else takes a worker's place: it is configured anew, with another bearer token. The caller holds its lock.
pub async fn replace(db: &mut PgConnection, worker: WorkerId) -> Result<(), StoreError> {
    sqlx::query!(
        "update workers set token_serial = token_serial + 1, config_version = null, ack_version = null,
                config_ack_at = null, config_ack_status = null, config_ack_error = null
          where worker_id = $1",
        worker as WorkerId
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Whether a worker was seen within this time.
pub async fn seen_within(
    db: &mut PgConnection,
    worker: WorkerId,
    time: Duration,
) -> Result<bool, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select exists (select 1 from worker_beats
            where worker_id = $1 and last_seen_at >= cynai_now() - make_interval(secs => $2)) as "seen!""#,
        worker as WorkerId,
        time.as_secs_f64(),
    )
    .fetch_one(db)
    .await?)
}

/// How many workers there are.
pub async fn count(db: &mut PgConnection) -> Result<i64, StoreError> {
    Ok(sqlx::query_scalar!(r#"select count(*) as "count!" from workers"#).fetch_one(db).await?)
}

/// Stores a registration; answers the worker's id, and whether it is new.
pub async fn register(
    db: &mut PgConnection,
    worker: &Registered<'_>,
) -> Result<(WorkerId, bool), StoreError> {
    let row = sqlx::query!(
        r#"insert into workers (worker_id, slug, name, labels, created_at, registered_at, server_url, base_url, server_cert)
           values ($1, $2, $3, $4, cynai_now(), cynai_now(), $5, $6, $7)
           on conflict (slug) do update
              set name = excluded.name, labels = excluded.labels, registered_at = excluded.registered_at,
                  server_url = excluded.server_url, base_url = coalesce(excluded.base_url, workers.base_url), server_cert = excluded.server_cert
           returning worker_id as "worker_id: WorkerId", worker_id = $1 as "new!""#,
        worker.worker_id as WorkerId,
        worker.slug,
        worker.name,
        worker.labels,
        worker.server_url,
        worker.base_url,
        worker.server_cert,
    )
    .fetch_one(db)
    .await?;
    Ok((row.worker_id, row.new))
}

/// Stores a report whole, and what is looked for in it.
pub async fn report(
    db: &mut PgConnection,
    worker: WorkerId,
    reported_at: DateTime<Utc>,
    report: &Value,
) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into worker_reports (worker_id, reported_at, received_at, report) values ($1, $2, cynai_now(), $3)
         on conflict (worker_id) do update
            set reported_at = excluded.reported_at, received_at = excluded.received_at, report = excluded.report",
        worker as WorkerId,
        reported_at,
        report,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Stores what a later report says of the worker itself.
pub async fn describe(
    db: &mut PgConnection,
    worker: WorkerId,
    name: Option<&str>,
    labels: &[String],
    base_url: Option<&str>,
    server_cert: Option<&str>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "update workers set name = $2, labels = $3, base_url = coalesce($4, base_url), server_cert = $5
          where worker_id = $1",
        worker as WorkerId,
        name,
        labels,
        base_url,
        server_cert,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// A worker that registers or reports is alive; whether it takes jobs its next heartbeat tells.
pub async fn seen(db: &mut PgConnection, worker: WorkerId) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into worker_beats (worker_id, last_seen_at) values ($1, cynai_now())
         on conflict (worker_id) do update set last_seen_at = excluded.last_seen_at, ready = false",
        worker as WorkerId
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Stores a sign of life of whoever has this token. None: the token is not good.
pub async fn beat(
    db: &mut PgConnection,
    hash: &[u8; 32],
    ready: bool,
    running: i32,
    queued: i32,
) -> Result<Option<BeatRow>, StoreError> {
    let row = sqlx::query_as!(
        BeatRow,
        r#"with t as materialized (
             select worker_id from worker_tokens where hash = $1 and expires_at > cynai_now()),
           b as (
             insert into worker_beats (worker_id, last_seen_at, ready, running, queued)
             select worker_id, cynai_now(), $2, $3, $4 from t
             on conflict (worker_id) do update
                set last_seen_at = excluded.last_seen_at, ready = excluded.ready, running = excluded.running,
                    queued = excluded.queued)
           select w.issued_version, w.drained_at is not null as "drained!" from workers w join t using (worker_id)"#,
        hash.as_slice(),
        ready,
        running,
        queued,
    )
    .fetch_optional(db)
    .await?;
    Ok(row)
}

/// Stores a token.
pub async fn insert_token(
    db: &mut PgConnection,
    worker: WorkerId,
    hash: &[u8; 32],
    life: Duration,
) -> Result<DateTime<Utc>, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"insert into worker_tokens (hash, worker_id, created_at, expires_at)
           values ($2, $1, cynai_now(), cynai_now() + make_interval(secs => $3)) returning expires_at"#,
        worker as WorkerId,
        hash.as_slice(),
        life.as_secs_f64(),
    )
    .fetch_one(db)
    .await?)
}

/// A new token takes the place of a worker's others: they are good for `grace` at most.
pub async fn retire_tokens(
    db: &mut PgConnection,
    worker: WorkerId,
    grace: Duration,
) -> Result<(), StoreError> {
    sqlx::query!(
        "delete from worker_tokens where worker_id = $1 and hash not in (
           select hash from worker_tokens where worker_id = $1 order by created_at desc limit $2)",
        worker as WorkerId,
        KEPT_TOKENS,
    )
    .execute(&mut *db)
    .await?;
    sqlx::query!(
        "update worker_tokens set expires_at = least(expires_at, cynai_now() + make_interval(secs => $2))
          where worker_id = $1",
        worker as WorkerId,
        grace.as_secs_f64(),
    )
    .execute(db)
    .await?;
    Ok(())
}

/// A token is shown for the first time: those before it prove nothing any more.
pub async fn use_token(db: &mut PgConnection, hash: &[u8; 32]) -> Result<(), StoreError> {
    sqlx::query!(
        "update worker_tokens set used = true where hash = $1 and not used",
        hash.as_slice()
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Whose token this is, also when its time is over.
pub async fn token_owner(
    db: &mut PgConnection,
    hash: &[u8; 32],
) -> Result<Option<TokenOwner>, StoreError> {
    let row = sqlx::query_as!(
        TokenOwner,
        r#"select t.worker_id as "worker_id: WorkerId", w.slug, t.expires_at > cynai_now() as "live!", t.used,
                  not exists (select 1 from worker_tokens n where n.worker_id = t.worker_id
                                 and n.created_at > t.created_at and n.used) as "newest!"
             from worker_tokens t join workers w using (worker_id) where t.hash = $1"#,
        hash.as_slice(),
    )
    .fetch_optional(db)
    .await?;
    Ok(row)
}

/// A worker, locked until the transaction ends.
pub async fn lock(
    db: &mut PgConnection,
    worker: WorkerId,
) -> Result<Option<WorkerRow>, StoreError> {
    let row = sqlx::query_as!(
        WorkerRow,
        r#"select worker_id as "worker_id: WorkerId", slug, server_url, base_url, url_override, patch, token_serial,
                  issued_version, config_version, ack_version, server_cert is not null as "pinned!"
             from workers where worker_id = $1 for update"#,
        worker as WorkerId
    )
    .fetch_optional(db)
    .await?;
    Ok(row)
}

/// The worker of this slug.
pub async fn find_slug(db: &mut PgConnection, slug: &str) -> Result<Option<WorkerId>, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select worker_id as "worker_id: WorkerId" from workers where slug = $1"#,
        slug
    )
    .fetch_optional(db)
    .await?)
}

/// The worker's newest configuration's version.
pub async fn issued_version(
    db: &mut PgConnection,
    worker: WorkerId,
) -> Result<Option<String>, StoreError> {
    Ok(sqlx::query_scalar!(
        "select issued_version from workers where worker_id = $1",
        worker as WorkerId
    )
    .fetch_optional(db)
    .await?
    .flatten())
}

/// A configuration as it was stored, and when.
pub async fn config(
    db: &mut PgConnection,
    worker: WorkerId,
    version: &str,
) -> Result<Option<(Value, DateTime<Utc>)>, StoreError> {
    let row = sqlx::query!(
        "select content, issued_at from worker_configs where worker_id = $1 and config_version = $2",
        worker as WorkerId,
        version,
    )
    .fetch_optional(db)
    .await?;
    Ok(row.map(|row| (row.content, row.issued_at)))
}

/// Stores a configuration as the newest. The caller holds the worker's lock.
pub async fn issue(
    db: &mut PgConnection,
    worker: WorkerId,
    version: &str,
    content: &Value,
) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into worker_configs (worker_id, config_version, issued_at, content) values ($1, $2, cynai_now(), $3)",
        worker as WorkerId,
        version,
        content,
    )
    .execute(&mut *db)
    .await?;
    sqlx::query!(
        "delete from worker_configs c using workers w
          where w.worker_id = $1 and c.worker_id = $1 and c.config_version is distinct from w.config_version
            and c.config_version < (select min(k.config_version) from (
                  select config_version from worker_configs where worker_id = $1
                   order by config_version desc limit $2) k)",
        worker as WorkerId,
        KEPT_CONFIGS,
    )
    .execute(&mut *db)
    .await?;
    sqlx::query!(
        "update workers set issued_version = $2 where worker_id = $1",
        worker as WorkerId,
        version
    )
    .execute(db)
    .await?;
    Ok(())
}

/// The next configuration brings a new bearer token. The caller holds the worker's lock.
pub async fn next_token(db: &mut PgConnection, worker: WorkerId) -> Result<(), StoreError> {
    sqlx::query!(
        "update workers set token_serial = token_serial + 1 where worker_id = $1",
        worker as WorkerId
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Stores an acknowledgement. The caller holds the worker's lock, and knows that it is not an older one.
pub async fn acknowledge(
    db: &mut PgConnection,
    worker: WorkerId,
    ack: &Ack<'_>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "update workers set ack_version = $2, config_ack_at = $3, config_ack_status = $4, config_ack_error = $5,
                config_version = case when $4 = 'applied' then $2 else config_version end
          where worker_id = $1",
        worker as WorkerId,
        ack.config_version,
        ack.at,
        ack.status,
        ack.error,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Takes a worker out of service, or back into it.
pub async fn drain(
    db: &mut PgConnection,
    worker: WorkerId,
    by: Option<&str>,
    reason: Option<&str>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "update workers set drained_at = case when $2::text is null then null else coalesce(drained_at, cynai_now()) end,
                drained_by = $2, drain_reason = $3
          where worker_id = $1",
        worker as WorkerId,
        by,
        reason,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Stores what an operator says of one worker. The caller holds its lock.
pub async fn set_patch(
    db: &mut PgConnection,
    worker: WorkerId,
    patch: &Value,
    url_override: Option<&str>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "update workers set patch = $2, url_override = $3 where worker_id = $1",
        worker as WorkerId,
        patch,
        url_override,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Removes a worker, with everything of it. False: there is none.
pub async fn remove(db: &mut PgConnection, worker: WorkerId) -> Result<bool, StoreError> {
    let result = sqlx::query!("delete from workers where worker_id = $1", worker as WorkerId)
        .execute(db)
        .await?;
    Ok(result.rows_affected() == 1)
}

/// Which workers a list shows.
#[derive(Debug, Clone, Default)]
pub struct WorkerFilter<'a> {
    /// One alone.
    pub slug: Option<&'a str>,
    /// Only with this status.
    pub status: Option<&'a str>,
    /// Only with all of these labels.
    pub labels: &'a [String],
    /// Only after this slug.
    pub after: &'a str,
}

/// Workers by slug.
pub async fn list(
    db: &mut PgConnection,
    filter: &WorkerFilter<'_>,
    stale: Duration,
    limit: i64,
) -> Result<Vec<WorkerInfo>, StoreError> {
    let rows = sqlx::query_as!(
        WorkerInfo,
        r#"select w.worker_id as "worker_id: WorkerId", w.slug, w.name, w.labels,
                  worker_status(w, b.last_seen_at, $1) as "status!", w.created_at, w.registered_at, w.base_url,
                  w.url_override, w.server_cert is not null as "pinned!", w.drained_at, w.drained_by, w.drain_reason,
                  w.patch, w.issued_version, w.config_version, w.ack_version, w.config_ack_at, w.config_ack_status,
                  w.config_ack_error, b.last_seen_at as "last_seen_at?", coalesce(b.ready, false) as "ready!",
                  coalesce(b.running, 0) as "running!", coalesce(b.queued, 0) as "queued!",
                  r.received_at as "received_at?",
                  case when $3::text is not null then r.report end as "report?",
                  (r.report #>> '{sandbox,max_concurrency}')::bigint as "slots?",
                  (select count(*) from jobs j where j.worker = 'worker:' || w.worker_id
                      and j.status in ('intent', 'sent', 'canceling')) as "open_jobs!"
             from workers w left join worker_beats b using (worker_id) left join worker_reports r using (worker_id)
            where w.slug > $2 and ($3::text is null or w.slug = $3) and w.labels @> $4
              and ($5::text is null or worker_status(w, b.last_seen_at, $1) = $5)
            order by w.slug limit $6"#,
        stale.as_secs_f64(),
        filter.after,
        filter.slug,
        filter.labels,
        filter.status,
        limit,
    )
    .fetch_all(db)
    .await?;
    Ok(rows)
}

/// What servers watch, of all workers.
pub async fn heads(db: &mut PgConnection, stale: Duration) -> Result<Vec<Head>, StoreError> {
    let rows = sqlx::query_as!(
        Head,
        r#"select w.worker_id as "worker_id!: WorkerId", w.issued_version, w.config_version,
                  r.received_at as "received_at?",
                  (worker_status(w, b.last_seen_at, $1) = 'active' and b.ready) is true as "active!"
             from workers w left join worker_beats b using (worker_id) left join worker_reports r using (worker_id)"#,
        stale.as_secs_f64(),
    )
    .fetch_all(db)
    .await?;
    Ok(rows)
}

/// What is needed to speak to a worker; `None` before a configuration of it is in force.
pub async fn reach(db: &mut PgConnection, worker: WorkerId) -> Result<Option<Reach>, StoreError> {
    let row = sqlx::query_as!(
        Reach,
        r#"select w.slug, w.server_cert, c.content, r.report as "report?"
             from workers w join worker_configs c using (worker_id, config_version)
                  left join worker_reports r using (worker_id)
            where w.worker_id = $1"#,
        worker as WorkerId,
    )
    .fetch_optional(db)
    .await?;
    Ok(row)
}

/// Workers whose configuration is to be made again.
pub async fn due(db: &mut PgConnection, limit: i64) -> Result<Vec<WorkerId>, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select w.worker_id as "worker_id: WorkerId" from workers w, fleet_policy p
            where w.policy_revision <> p.revision order by w.worker_id limit $1"#,
        limit,
    )
    .fetch_all(db)
    .await?)
}

/// A worker's configuration was made for this revision of the policy. The caller holds the worker's lock.
pub async fn made(
    db: &mut PgConnection,
    worker: WorkerId,
    revision: i64,
) -> Result<(), StoreError> {
    sqlx::query!(
        "update workers set policy_revision = $2 where worker_id = $1 and policy_revision < $2",
        worker as WorkerId,
        revision,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Has every worker's configuration made again when the policy, or a worker's part of it, names this secret.
pub async fn secret_changed(db: &mut PgConnection, name: &str) -> Result<(), StoreError> {
    sqlx::query!(
        "update fleet_policy set revision = revision + 1
          where $1 in (policy #>> '{sandbox_registry,pull_token_secret}', policy #>> '{model_cache,pull_token_secret}')
             or exists (select 1 from workers where patch <> '{}' and $1 in
                   (patch #>> '{sandbox_registry,pull_token_secret}', patch #>> '{model_cache,pull_token_secret}'))",
        name,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// The policy of all workers and its revision.
pub async fn policy(db: &mut PgConnection) -> Result<(Value, i64), StoreError> {
    let row = sqlx::query!("select policy, revision from fleet_policy").fetch_one(db).await?;
    Ok((row.policy, row.revision))
}

/// Stores the policy of all workers; answers its revision.
pub async fn set_policy(
    db: &mut PgConnection,
    policy: &Value,
    by: &str,
) -> Result<i64, StoreError> {
    Ok(sqlx::query_scalar!(
        "update fleet_policy set policy = $1, revision = revision + 1, updated_at = cynai_now(), updated_by = $2
         returning revision",
        policy,
        by,
    )
    .fetch_one(db)
    .await?)
}

/// How many jobs each of these workers has that have not ended.
pub async fn open_jobs(
    db: &mut PgConnection,
    workers: &[String],
) -> Result<Vec<(String, i64)>, StoreError> {
    let rows = sqlx::query!(
        r#"select w.name as "name!", (select count(*) from jobs j
                    where j.worker = w.name and j.status in ('intent', 'sent', 'canceling')) as "open!"
             from unnest($1::text[]) w (name)"#,
        workers,
    )
    .fetch_all(db)
    .await?;
    Ok(rows.into_iter().map(|row| (row.name, row.open)).collect())
}
