//! The states that rows are in, as stored and as clients see them.

/// Declares an enum whose variants are words: stored as `text`, and the same on the wire.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
                 sqlx::Type, utoipa::ToSchema)]
        #[sqlx(type_name = "text")]
        pub enum $name {
            $($(#[$variant_doc])* #[serde(rename = $word)] #[sqlx(rename = $word)] $variant,)+
        }

        impl $name {
            /// Every value, in the order of declaration.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The word that is stored and sent.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }

            /// Reads the word; `None` when it is not one of them.
            #[must_use]
            pub fn parse(word: &str) -> Option<Self> {
                match word { $($word => Some(Self::$variant),)+ _ => None }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}
pub(crate) use words;

words! {
    /// How far a run is.
    RunStatus {
        /// Accepted; not begun, or not due yet.
        Pending = "pending",
        /// Begun; also while it is parked for a job or a timer.
        Running = "running",
        /// Ended as its graph says; also when only people are left to wait for.
        Success = "success",
        /// Ended by a failure.
        Error = "error",
        /// Ended by its duration limit.
        Timeout = "timeout",
        /// Cancelled.
        Interrupted = "interrupted",
    }
}

impl RunStatus {
    /// Whether the run has ended.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        !matches!(self, Self::Pending | Self::Running)
    }
}

words! {
    /// What a thread is doing.
    ThreadStatus {
        /// Nothing; its last run, if any, succeeded.
        Idle = "idle",
        /// A run is pending or running.
        Busy = "busy",
        /// Waits for a person, or its last run was cancelled.
        Interrupted = "interrupted",
        /// Its last run failed.
        Error = "error",
    }
}

words! {
    /// What a new run does when the thread is busy.
    MultitaskStrategy {
        /// It is refused.
        Reject = "reject",
        /// The run under way is cancelled; what it committed stays.
        Interrupt = "interrupt",
        /// The run under way is cancelled and its checkpoints are deleted.
        Rollback = "rollback",
        /// It waits for its turn.
        Enqueue = "enqueue",
    }
}
