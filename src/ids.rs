//! Identifiers, one type each, so that a run's id cannot be passed where a thread's is meant.
//!
//! Ids that the server makes are UUID version 7 (they sort by creation). Any UUID is accepted from a
//! client. A [`TaskId`] is the exception: it is a hash of a position in a run, never random.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, sqlx::Type)]
        #[serde(transparent)]
        #[sqlx(transparent)]
        pub struct $name(pub Uuid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::parse_str(text).map(Self)
            }
        }
    };
}

macro_rules! minted {
    ($name:ident) => {
        impl $name {
            /// A fresh id, later than every id that this process made before.
            #[must_use]
            #[expect(clippy::new_without_default, reason = "a default id would be a surprise")]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }
        }
    };
}

id!(/// A line of state: what one conversation or workflow remembers between runs.
    ThreadId);
id!(/// One execution of a graph on a thread.
    RunId);
id!(/// A configured graph that clients start by id.
    AssistantId);
id!(/// Who owns a row.
    UserId);
id!(/// An API token's row; not the secret itself.
    TokenId);
id!(/// One sandboxed execution on a worker.
    JobId);
id!(/// A driver process's installation; with its epoch it names one life of that process.
    InstanceId);
id!(/// A worker machine's row; people know it by its slug.
    WorkerId);
id!(/// One activation's durable name: a hash of thread, namespace, branch, planning sequence, node and
    /// item index. It holds no attempt and no run, so it survives restart, retry and resume.
    TaskId);

minted!(ThreadId);
minted!(RunId);
minted!(AssistantId);
minted!(UserId);
minted!(TokenId);
minted!(JobId);
minted!(InstanceId);
minted!(WorkerId);
