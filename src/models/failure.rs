//! Why a call has no answer, and what its caller may do about it.
//!
//! A [`Failure`] is one attempt's; a [`ModelError`] is the whole call's. Both name endpoints by their
//! configured names, and both carry only text that went through a
//! [`Redactor`](super::redact::Redactor).
//!
//! **Invariant:** no key, no URL and no header's value is in a failure.

use std::time::Duration;

use serde::Serialize;

use super::answer::{Attempt, ChatAnswer};

/// What kind of thing went wrong. The words are stable: graphs route by them, metrics count them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The key is not there, or cannot be sent.
    NoKey,
    /// All of the endpoint's `max_parallel` calls were under way for too long.
    Busy,
    /// The endpoint failed so often in a row that it is left alone for some seconds.
    CircuitOpen,
    /// No connection: refused, unknown host, TLS.
    Connect,
    /// No connection in time.
    TimeoutConnect,
    /// The answer did not begin in time.
    TimeoutFirstToken,
    /// The answer stopped coming.
    TimeoutIdle,
    /// The time for all attempts is up.
    TimeoutTotal,
    /// 429: too many requests now.
    RateLimited,
    /// 429 or 402: nothing is left to spend.
    QuotaExceeded,
    /// 5xx: the endpoint is overloaded, loading, or broken.
    Overloaded,
    /// The answer ended in its middle.
    Cut,
    /// The answer is longer than `max_answer`.
    TooLarge,
    /// The request is longer than the model's context.
    ContextLength,
    /// 4xx: the endpoint will never accept this request, and another one hardly would.
    BadRequest,
    /// 4xx or 501: this model or endpoint cannot do what the request asks, such as tools or images.
    Unsupported,
    /// 401 or 403.
    Unauthorized,
    /// 404, 405 or a redirect: no such model, or the wrong `url`.
    NotFound,
    /// The answer is no JSON, no UTF-8, or of other types than the protocol's.
    Malformed,
    /// The answer does not match the schema, after all repairs.
    InvalidJson,
}

impl FailureKind {
    /// The word for logs, metrics and graphs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoKey => "no_key",
            Self::Busy => "busy",
            Self::CircuitOpen => "circuit_open",
            Self::Connect => "connect",
            Self::TimeoutConnect => "timeout_connect",
            Self::TimeoutFirstToken => "timeout_first_token",
            Self::TimeoutIdle => "timeout_idle",
            Self::TimeoutTotal => "timeout_total",
            Self::RateLimited => "rate_limited",
            Self::QuotaExceeded => "quota_exceeded",
            Self::Overloaded => "overloaded",
            Self::Cut => "cut",
            Self::TooLarge => "too_large",
            Self::ContextLength => "context_length",
            Self::BadRequest => "bad_request",
            Self::Unsupported => "unsupported",
            Self::Unauthorized => "unauthorized",
            Self::NotFound => "not_found",
            Self::Malformed => "malformed",
            Self::InvalidJson => "invalid_json",
        }
    }

    /// Whether the same request to the same endpoint may succeed soon.
    #[must_use]
    pub fn again(self) -> bool {
        self.unhealthy() || self == Self::RateLimited
    }

    /// Whether another candidate may succeed where this one did not.
    #[must_use]
    pub fn next(self) -> bool {
        !matches!(self, Self::BadRequest | Self::InvalidJson)
    }

    /// Whether the same call may succeed at another time without anybody changing anything.
    #[must_use]
    pub fn transient(self) -> bool {
        self.again() || matches!(self, Self::Busy | Self::CircuitOpen | Self::TimeoutTotal)
    }

    /// Whether the attempt itself took so long that another candidate is worth more than another try.
    pub(super) fn slow(self) -> bool {
        matches!(self, Self::TimeoutFirstToken | Self::TimeoutIdle | Self::TimeoutConnect)
    }

    /// Whether it says that the endpoint does not work, rather than that it does not like the request.
    pub(super) fn unhealthy(self) -> bool {
        matches!(
            self,
            Self::Connect
                | Self::TimeoutConnect
                | Self::TimeoutFirstToken
                | Self::TimeoutIdle
                | Self::Overloaded
                | Self::Cut
                | Self::Malformed
        )
    }
}

impl std::fmt::Display for FailureKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Something in a request that an endpoint does not know, and that the request can do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// `stream: true`.
    Stream,
    /// `stream_options`, which asks for usage at the end of a stream.
    StreamOptions,
    /// `response_format`.
    ResponseFormat,
    /// `max_tokens`, where the endpoint wants `max_completion_tokens`.
    MaxTokens,
}

/// Why one attempt has no answer.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{kind}: {message}")]
pub struct Failure {
    /// What kind of thing went wrong.
    pub kind: FailureKind,
    /// What happened, for a person; at most some hundred bytes.
    pub message: String,
    /// How long the endpoint asks to be left alone; at most a minute.
    pub retry_after: Option<Duration>,
    pub(super) refused: Option<Refused>,
}

impl Failure {
    pub(super) fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), retry_after: None, refused: None }
    }
}

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The request cannot be sent as it is; nothing was.
    #[error("{field}: {problem}")]
    Request {
        /// The field to blame, such as `messages[2].content[0].image_url`.
        field: String,
        /// What is wrong with it, and what would be right.
        problem: String,
    },
    /// There is no such model; nothing was sent.
    #[error("there is no model `{model}`: {problem}")]
    UnknownModel {
        /// As the request named it.
        model: String,
        /// Which ones there are.
        problem: String,
    },
    /// No candidate answered.
    #[error("the model `{model}` did not answer ({}): {failure}", attempted(.attempts))]
    Failed {
        /// As the request named it.
        model: String,
        /// Of the last attempt; the message has it, so it is no source.
        failure: Failure,
        /// All attempts, the last one included.
        attempts: Vec<Attempt>,
    },
    /// An answer came, but none that matches the schema.
    #[error("the answer of `{model}` does not match the schema after {repairs} repairs: {}", .problems.join("; "))]
    InvalidJson {
        /// As the request named it.
        model: String,
        /// How often it was sent back.
        repairs: u32,
        /// What the validator says about the last answer.
        problems: Vec<String>,
        /// The last answer; its usage and attempts are those of all calls together.
        answer: Box<ChatAnswer>,
    },
}

impl ModelError {
    /// The kind of failure; `bad_request` and `not_found` for what was never sent.
    #[must_use]
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Request { .. } => FailureKind::BadRequest,
            Self::UnknownModel { .. } => FailureKind::NotFound,
            Self::Failed { failure, .. } => failure.kind,
            Self::InvalidJson { .. } => FailureKind::InvalidJson,
        }
    }

    /// Whether the same call may succeed later: when any candidate's failure is one that passes.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        let passes = |attempt: &Attempt| attempt.failure.is_some_and(FailureKind::transient);
        match self {
            // A request that one candidate refused for good will not get better by another's recovery.
            Self::Failed { failure, attempts, .. } => {
                failure.kind.next() && (failure.kind.transient() || attempts.iter().any(passes))
            }
            _ => false,
        }
    }

    /// How long to wait before the same call is made again, when the endpoint said so.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Failed { failure, .. } => failure.retry_after,
            _ => None,
        }
    }

    /// What was tried, in order.
    #[must_use]
    pub fn attempts(&self) -> &[Attempt] {
        match self {
            Self::Failed { attempts, .. } => attempts,
            Self::InvalidJson { answer, .. } => &answer.attempts,
            Self::Request { .. } | Self::UnknownModel { .. } => &[],
        }
    }
}

/// `local: timeout_connect, connect; cloud: rate_limited`.
fn attempted(attempts: &[Attempt]) -> String {
    let mut text = String::new();
    let mut endpoint = "";
    for attempt in attempts {
        let outcome = attempt.failure.map_or("ok", FailureKind::as_str);
        if attempt.endpoint == endpoint {
            text.push_str(", ");
        } else {
            let gap = if text.is_empty() { "" } else { "; " };
            text.push_str(&format!("{gap}{}: ", attempt.endpoint));
            endpoint = &attempt.endpoint;
        }
        text.push_str(outcome);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_call_says_what_was_tried_and_whether_it_may_be_tried_later() {
        let attempt = |endpoint: &str, kind| Attempt {
            endpoint: endpoint.to_owned(),
            model: "m".to_owned(),
            failure: Some(kind),
            took: Duration::ZERO,
        };
        let err = |last: FailureKind, before: &[(&str, FailureKind)]| ModelError::Failed {
            model: "default".to_owned(),
            failure: Failure::new(last, "status 400"),
            attempts: before.iter().map(|(name, kind)| attempt(name, *kind)).collect(),
        };
        use FailureKind::{BadRequest, Connect, Unauthorized};
        let failed = err(Unauthorized, &[("a", Connect), ("a", Connect), ("b", Unauthorized)]);
        assert_eq!(
            failed.to_string(),
            "the model `default` did not answer (a: connect, connect; b: unauthorized): unauthorized: status 400"
        );
        assert!(failed.is_transient());
        assert!(!err(Unauthorized, &[("b", Unauthorized)]).is_transient());
        assert!(!err(BadRequest, &[("a", Connect), ("b", BadRequest)]).is_transient());
    }

    #[test]
    fn the_words_are_those_of_serde() {
        for kind in [FailureKind::TimeoutFirstToken, FailureKind::NoKey, FailureKind::Malformed] {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.as_str());
        }
    }
}
