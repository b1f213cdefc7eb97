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
    use std::path::Path;
    use std::pin::pin;
    use std::task::Poll;

    use sqlx::PgPool;
    use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
    use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional};
    use tokio::net::{TcpStream, UnixListener, UnixStream};
    use tokio::task::JoinSet;

    trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
    impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

    async fn connect(to: &PgConnectOptions) -> Box<dyn Stream> {
        let Some(directory) = to.get_socket() else {
            return Box::new(TcpStream::connect((to.get_host(), to.get_port())).await.unwrap());
        };
        let path = directory.join(format!(".s.PGSQL.{}", to.get_port()));
        Box::new(UnixStream::connect(path).await.unwrap())
    }

    /// Listens in a directory and passes on what it hears, on the caller's thread: no answer arrives
    /// before the caller has waited for it, however fast the database is and however busy the machine.
    fn pass_on(directory: &Path, to: PgConnectOptions) -> (PgConnectOptions, JoinSet<()>) {
        let path = directory.join(format!(".s.PGSQL.{}", to.get_port()));
        let listener = UnixListener::bind(path).unwrap();
        let through = to.clone().socket(directory);
        let mut passing = JoinSet::new();
        passing.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (mut near, _) = listener.accept().await.unwrap();
                let mut far = connect(&to).await;
                connections.spawn(async move { copy_bidirectional(&mut near, &mut far).await });
            }
        });
        (through, passing)
    }

    /// Polls a future until it is ready or was pending so often, and drops it then.
    async fn give_up_after(pending: u32, future: impl Future) {
        let mut future = pin!(future);
        let mut seen = 0;
        std::future::poll_fn(|context| {
            if future.as_mut().poll(context).is_ready() {
                return Poll::Ready(());
            }
            seen += 1;
            if seen == pending { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Gives up opening transactions at each point where that waits, and counts what was written next
    /// and is not committed.
    async fn lost_writes<T>(pool: &PgPool, open: impl AsyncFn(&PgPool) -> T) -> i64 {
        let directory = tempfile::tempdir().unwrap();
        let (through, _passing) = pass_on(directory.path(), (*pool.connect_options()).clone());
        let one = PgPoolOptions::new().max_connections(1).connect_with(through).await.unwrap();
        sqlx::query("create table written (n int)").execute(pool).await.unwrap();
        let mut written = 0;
        // It waits a handful of times: for the connection, its ping, and the answer to BEGIN.
        for pending in (1..=12).cycle().take(12 * 10) {
            give_up_after(pending, open(&one)).await;
            sqlx::query("insert into written values (1)").execute(&one).await.unwrap();
            written += 1;
            let seen: i64 =
                sqlx::query_scalar("select count(*) from written").fetch_one(pool).await.unwrap();
            if seen != written {
                return written - seen;
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
