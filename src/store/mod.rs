//! All SQL, one file for each resource.
//!
//! A function is one statement on a connection that the caller gives; `services` and the driver open
//! the transactions. Names are unqualified: a pool serves one schema.
//!
//! **Invariant:** no SQL outside this folder, and no rule inside it.

pub mod accept;
pub mod access;
pub mod assistants;
pub mod checkpointer;
pub mod checkpoints;
pub mod commit;
pub mod connect;
pub mod crash;
pub mod effects;
pub mod embedded;
pub mod graphs;
pub mod health;
pub mod intake;
pub mod jobs;
pub mod pending;
pub mod queue;
pub mod retention;
pub mod runs;
pub mod secrets;
pub mod signals;
pub mod status;
pub mod stream_events;
pub mod threads;
pub mod tools;
pub mod transaction;
pub mod webhooks;
pub mod workers;

/// Why a statement did not do what it was for.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database refused the statement or could not be reached.
    #[error("the database could not do this")]
    Database(#[from] sqlx::Error),
    /// A stored value is not what this program writes.
    #[error("the stored {what} cannot be read")]
    Corrupt {
        /// Which value.
        what: &'static str,
        /// Why it cannot be read.
        #[source]
        source: serde_json::Error,
    },
}

impl StoreError {
    /// Whether the database could not be reached at all, so that trying later makes sense.
    #[must_use]
    pub fn is_unavailable(&self) -> bool {
        match self {
            Self::Corrupt { .. } => false,
            Self::Database(err) => match err {
                sqlx::Error::Io(_)
                | sqlx::Error::PoolTimedOut
                | sqlx::Error::PoolClosed
                | sqlx::Error::WorkerCrashed => true,
                // 57P01..57P03: shutting down, crashed, starting; 53300: no connection left; 08: connection.
                sqlx::Error::Database(err) => err.code().is_some_and(|code| {
                    code.starts_with("57P") || code.starts_with("08") || code == "53300"
                }),
                _ => false,
            },
        }
    }

    /// Whether a row with this key exists already.
    #[must_use]
    pub fn is_duplicate(&self) -> bool {
        matches!(self, Self::Database(sqlx::Error::Database(err)) if err.is_unique_violation())
    }
}
