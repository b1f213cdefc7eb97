//! Why a tool was not called, or its call did not give a result that can be used.
//!
//! Two questions matter to whoever called: which situation it is ([`ToolErrorKind`]), and what is known of
//! the effects ([`Outcome`]). A call that was sent and not answered may or may not have acted.

use std::time::Duration;

use crate::config::tools::Effect;

/// The most characters of a foreign text that a message repeats.
const MAX_QUOTE: usize = 500;

/// Why a tool gave no usable result.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ToolError {
    /// The situation.
    pub kind: ToolErrorKind,
    /// What is known of what the call did.
    pub outcome: Outcome,
    /// What happened and what to do, for a person. It holds no secret that the server was given.
    pub message: String,
    /// JSON Pointer to the value to blame: in the arguments or in the result, as the kind says.
    pub path: Option<String>,
    /// When trying again makes sense, where that is known.
    pub retry_after: Option<Duration>,
}

/// The situations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ToolErrorKind {
    /// No server of this name is configured.
    UnknownServer,
    /// The server has no tool of this name.
    UnknownTool,
    /// The configuration does not allow this tool.
    NotAllowed,
    /// The tool is not, or not yet, what an administrator approved.
    Changed,
    /// The arguments break the tool's input schema; nothing was sent.
    InvalidArguments,
    /// Too many calls of this server are under way.
    Busy,
    /// The server cannot be started or reached now.
    Unavailable,
    /// Somebody has to log in to the server, or with more scopes.
    LoginRequired,
    /// A value that the server's configuration refers to is missing.
    Misconfigured,
    /// The server ended, or its connection broke, during the call.
    ServerDied,
    /// The call took longer than it may.
    Timeout,
    /// The server answered with an error of the protocol instead of a result.
    Refused,
    /// The server asks something back that nobody here answers.
    InputRequired,
    /// The result is over the limit.
    TooLarge,
    /// The result breaks the tool's output schema.
    InvalidOutput,
    /// What the server sends is not MCP.
    Protocol,
    /// This process is stopping.
    Closing,
}

impl ToolErrorKind {
    /// The kind as programs know it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UnknownServer => "unknown_server",
            Self::UnknownTool => "unknown_tool",
            Self::NotAllowed => "not_allowed",
            Self::Changed => "changed",
            Self::InvalidArguments => "invalid_arguments",
            Self::Busy => "busy",
            Self::Unavailable => "unavailable",
            Self::LoginRequired => "login_required",
            Self::Misconfigured => "misconfigured",
            Self::ServerDied => "server_died",
            Self::Timeout => "timeout",
            Self::Refused => "refused",
            Self::InputRequired => "input_required",
            Self::TooLarge => "too_large",
            Self::InvalidOutput => "invalid_output",
            Self::Protocol => "protocol",
            Self::Closing => "closing",
        }
    }
}

/// What is known of what a call did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The request was not sent: the tool did nothing.
    NotSent,
    /// The request was sent and no answer came: the tool may have acted.
    Unknown,
    /// The server answered: the tool did what it does.
    Answered,
}

impl Outcome {
    /// The outcome as programs know it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotSent => "not_sent",
            Self::Unknown => "unknown",
            Self::Answered => "answered",
        }
    }
}

impl ToolError {
    /// An error before anything was sent.
    pub(crate) fn new(kind: ToolErrorKind, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { kind, outcome: Outcome::NotSent, message, path: None, retry_after: None }
    }

    /// The same, with what is known of the effects.
    pub(crate) fn with_outcome(self, outcome: Outcome) -> Self {
        Self { outcome, ..self }
    }

    /// The same, with the value to blame.
    pub(crate) fn at(self, path: impl Into<String>) -> Self {
        Self { path: Some(path.into()), ..self }
    }

    /// Whether calling again, with the same idempotency key, can do no harm that the first call has not
    /// done, for a tool with this effect.
    #[must_use]
    pub fn may_repeat(&self, effect: Effect) -> bool {
        self.outcome == Outcome::NotSent || effect != Effect::Effectful
    }
}

/// A foreign text as part of a message: one line, not endless.
pub(crate) fn quoted(text: &str) -> String {
    let plain = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    let short: String = plain.take(MAX_QUOTE).collect();
    let short = short.trim();
    if text.chars().nth(MAX_QUOTE).is_some() { format!("{short}...") } else { short.to_owned() }
}
