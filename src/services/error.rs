//! What can be wrong with an operation, as its caller must know it.
//!
//! The three doors (REST, MCP, nodes) translate these situations; none of them looks at a cause.

use std::error::Error;
use std::time::Duration;

use crate::store::StoreError;
use crate::tools::error::ToolError;

/// Why an operation was not done.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// No such thing, or it belongs to somebody else: the two look the same.
    #[error("{what} {id} not found")]
    NotFound {
        /// The kind of thing: "thread", "run", "assistant".
        what: &'static str,
        /// How it was asked for.
        id: String,
    },
    /// The request is well formed but breaks a rule (422).
    #[error("{message}")]
    Invalid {
        /// What is wrong and what would be right.
        message: String,
        /// JSON Pointer to the offending value within the request, when one value is to blame.
        path: Option<String>,
    },
    /// The request cannot be understood (400).
    #[error("{0}")]
    BadRequest(String),
    /// The payload has a version that this server does not read (400).
    #[error("{0}")]
    UnsupportedVersion(String),
    /// The thing is not in a state that allows this (409).
    #[error("{0}")]
    Conflict(String),
    /// A value is over its limit (413).
    #[error("{0}")]
    TooLarge(String),
    /// A queue or a quota is full (429).
    #[error("{message}")]
    TooMany {
        /// Which one.
        message: String,
        /// When trying again makes sense.
        retry_after: Duration,
    },
    /// The caller did not prove who it is (401).
    #[error("{0}")]
    Unauthorized(String),
    /// The caller may not do this (403).
    #[error("{0}")]
    Forbidden(String),
    /// Something that is needed cannot be reached now (503).
    #[error("{message}")]
    Unavailable {
        /// What is missing.
        message: String,
        /// Why.
        #[source]
        source: Option<Box<dyn Error + Send + Sync>>,
    },
    /// A tool gave no usable result; the kind says why.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// A defect or damaged data (500); clients do not see the cause.
    #[error("internal error")]
    Internal(#[source] Box<dyn Error + Send + Sync>),
}

impl ServiceError {
    /// A thing that does not exist for this caller.
    pub fn not_found(what: &'static str, id: impl ToString) -> Self {
        Self::NotFound { what, id: id.to_string() }
    }

    /// A rule that the request as a whole breaks.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid { message: message.into(), path: None }
    }

    /// A rule that one value of the request breaks.
    pub fn invalid_at(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { message: message.into(), path: Some(path.into()) }
    }

    /// Something that is needed and missing, without a cause worth logging.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::Unavailable { message: message.into(), source: None }
    }

    /// A defect.
    pub fn internal(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Internal(cause.into())
    }
}

impl From<StoreError> for ServiceError {
    fn from(err: StoreError) -> Self {
        if err.is_unavailable() {
            Self::Unavailable {
                message: "the database cannot be reached".to_owned(),
                source: Some(Box::new(err)),
            }
        } else {
            Self::Internal(Box::new(err))
        }
    }
}

impl From<sqlx::Error> for ServiceError {
    fn from(err: sqlx::Error) -> Self {
        StoreError::from(err).into()
    }
}
