//! How a transaction is opened so that its caller may go away at any time.
//!
//! Callers do: a client disconnects, a run is cancelled, a lease is lost. The driver library undoes a
//! transaction that is dropped, but not one that is dropped while its BEGIN is under way: that connection
//! goes back to its pool inside a transaction that nobody knows of. What is written over it next looks
//! committed, is acknowledged, and is gone when somebody else's transaction is rolled back.
//!
//! **Invariant:** no other file opens a transaction on a pool or a connection.

use sqlx::{PgPool, Postgres, Transaction};
use tokio_util::task::TaskTracker;

/// Opens a transaction. Dropping the future, or what it gives, leaves no transaction open.
///
/// # Errors
/// The database's.
pub async fn begin(pool: &PgPool) -> Result<Transaction<'static, Postgres>, sqlx::Error> {
    let pool = pool.clone();
    // The task always comes to its end, which is soon. When nobody waits for it any more, it drops the
    // transaction that it opened, and that is undone as it should be.
    let opening = TaskTracker::new().spawn(async move { pool.begin().await });
    opening.await.map_err(|_| sqlx::Error::WorkerCrashed)?
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use sqlx::PgPool;
    use sqlx::postgres::PgPoolOptions;

    /// Gives up opening transactions at many moments; whatever is written next must be committed.
    async fn lost_writes<T>(pool: &PgPool, open: impl AsyncFn(&PgPool) -> T) -> i64 {
        let one =
            PgPoolOptions::new().max_connections(1).connect_with((*pool.connect_options()).clone());
        let one = one.await.unwrap();
        sqlx::query("create table written (n int)").execute(pool).await.unwrap();
        for at in 0..200 {
            // Time is up at the first poll, or a little later.
            let _ = tokio::time::timeout(Duration::from_micros(at * 5), open(&one)).await;
            sqlx::query("insert into written values (1)").execute(&one).await.unwrap();
            let seen: i64 =
                sqlx::query_scalar("select count(*) from written").fetch_one(pool).await.unwrap();
            if seen != i64::try_from(at).unwrap() + 1 {
                return i64::try_from(at).unwrap() + 1 - seen;
            }
        }
        0
    }

    #[sqlx::test]
    async fn a_caller_that_goes_away_leaves_no_transaction_on_the_connection(pool: PgPool) {
        assert_eq!(lost_writes(&pool, super::begin).await, 0);
    }

    #[sqlx::test]
    async fn the_library_alone_would_lose_what_is_written_after_that(pool: PgPool) {
        // When this fails, the library does it right, and this file can go.
        assert_ne!(lost_writes(&pool, async |pool| pool.begin().await).await, 0);
    }
}
