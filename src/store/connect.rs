//! Pools and the schema.
//!
//! **Invariant:** a schema that this program does not know is not touched.

use std::time::Duration;

use sqlx::PgPool;
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

/// The schema's steps, compiled in.
static MIGRATIONS: Migrator = sqlx::migrate!();

/// How long a caller waits for a free connection.
const ACQUIRE: Duration = Duration::from_secs(10);

/// A transaction of ours that says nothing for so long belongs to a process that is frozen or cut off: the
/// database ends it, so that its locks do not keep others from the runs that they took over.
const SILENCE: Duration = Duration::from_secs(5);

/// Why the schema could not be brought up to date.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// A newer program has been here.
    #[error(
        "the database's schema is newer than this program (it has migration {0}, which this program does not know): start a newer cynai"
    )]
    Newer(i64),
    /// A step was changed after it was applied.
    #[error(
        "migration {0} of the database is not this program's: the database was made by a different build"
    )]
    Different(i64),
    /// A step failed.
    #[error("the schema could not be brought up to date")]
    Failed(#[source] MigrateError),
}

/// A pool of `size` connections, opened when needed.
pub fn pool(options: PgConnectOptions, size: u32) -> PgPool {
    connections(options, size, "auto")
}

/// As [`pool`], for a few statements that are sent again and again with arrays of different lengths: they are planned
/// once, for any length.
pub fn lane(options: PgConnectOptions, size: u32) -> PgPool {
    connections(options, size, "force_generic_plan")
}

fn connections(options: PgConnectOptions, size: u32, plans: &'static str) -> PgPool {
    let options = options.application_name("cynai");
    PgPoolOptions::new()
        .max_connections(size)
        .min_connections(size.min(2))
        .acquire_timeout(ACQUIRE)
        .test_before_acquire(false)
        .after_connect(move |connection, _| {
            Box::pin(async move {
                // As a statement, since a pooler may refuse it as a parameter of the connection.
                let milliseconds = SILENCE.as_millis().to_string();
                // Every statement finds its rows by a key. A plan is kept for the connection's life, and one that was
                // made when a table was empty would read all of it when it holds a million rows. (What must scan all
                // the same has a plan of such cost that it would be compiled first, for a third of a second.)
                sqlx::query!(
                    "select set_config('idle_in_transaction_session_timeout', $1, false) as timeout,
                            set_config('enable_seqscan', 'off', false) as scans,
                            set_config('jit', 'off', false) as jit,
                            set_config('plan_cache_mode', $2, false) as plans",
                    milliseconds,
                    plans
                )
                .fetch_one(connection)
                .await?;
                Ok(())
            })
        })
        .connect_lazy_with(options)
}

/// Brings the schema up to date, one process at a time.
///
/// # Errors
/// See [`SchemaError`].
pub async fn migrate(pool: &PgPool) -> Result<(), SchemaError> {
    MIGRATIONS.run(pool).await.map_err(|err| match err {
        MigrateError::VersionMissing(version) => SchemaError::Newer(version),
        MigrateError::VersionMismatch(version) => SchemaError::Different(version),
        other => SchemaError::Failed(other),
    })
}

/// Whether every step of this program is applied.
///
/// # Errors
/// The database's.
pub async fn is_current(pool: &PgPool) -> Result<bool, sqlx::Error> {
    let applied =
        sqlx::query_scalar!(r#"select to_regclass('_sqlx_migrations') is not null as "there!""#)
            .fetch_one(pool)
            .await?;
    Ok(applied)
}
