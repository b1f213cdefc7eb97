//! Checks of graph files: what is wrong, where, and what to do about it.
//!
//! A problem is found on the parsed file, which knows no lines, so a [`Diagnostic`] names the place by
//! its path; the loader, which has the text, adds file, line and column ([`super::source::Source::locate`]).

pub(crate) mod flow;
mod joins;
pub mod render;
mod rules;
mod shape;
mod writers;

use serde::Serialize;

pub use rules::{RULES, Rule, find as find_rule};

/// Whether a problem stops the graph from loading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The graph is refused.
    Error,
    /// The graph loads; the author should look.
    Warning,
}

/// What of the place that a path leads to is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The key itself.
    Key,
    /// The value.
    Value,
    /// Bytes of the value's text, from the offset on.
    Within(usize),
}

/// One problem.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Diagnostic {
    /// Whether it stops the graph.
    pub severity: Severity,
    /// The rule that found it, a stable word that docs/graph-files.md explains.
    pub code: &'static str,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
    /// Keys and positions that lead to the place in the file.
    pub path: Vec<String>,
    /// What of that place is meant.
    #[serde(skip)]
    pub part: Part,
    /// Where that is in the text; `None` until the loader has looked.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub location: Option<Location>,
}

/// A place in a text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Location {
    /// The file, as it was named when it was loaded.
    pub file: String,
    /// From 1.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
    /// Bytes from the start of the text.
    pub offset: usize,
    /// Bytes that are meant.
    pub length: usize,
}

impl Diagnostic {
    /// An error found by `code` at `path`.
    pub(crate) fn error(code: &'static str, path: &[&str], message: impl Into<String>) -> Self {
        debug_assert!(find_rule(code).is_some(), "the rule {code} is not documented");
        Self {
            severity: Severity::Error,
            code,
            message: message.into(),
            help: None,
            path: path.iter().map(|step| (*step).to_owned()).collect(),
            part: Part::Value,
            location: None,
        }
    }

    /// A warning found by `code` at `path`.
    pub(crate) fn warning(code: &'static str, path: &[&str], message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(code, path, message) }
    }

    /// Adds what to do about it.
    pub(crate) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Adds "did you mean" when there is a near candidate, else what there is to choose from.
    pub(crate) fn suggest<'a>(
        self,
        name: &str,
        candidates: impl IntoIterator<Item = &'a str> + Clone,
    ) -> Self {
        if let Some(near) = super::names::did_you_mean(name, candidates.clone()) {
            return self.help(format!("did you mean `{near}`?"));
        }
        match super::names::listed(candidates) {
            known if known.is_empty() => self,
            known => self.help(format!("there are {known}")),
        }
    }

    /// Points at the key instead of the value.
    pub(crate) fn on_key(mut self) -> Self {
        self.part = Part::Key;
        self
    }

    /// Points into the text of the value.
    pub(crate) fn within(mut self, offset: Option<usize>) -> Self {
        if let Some(offset) = offset {
            self.part = Part::Within(offset);
        }
        self
    }

    /// Whether it stops the graph.
    #[must_use]
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

impl std::fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        match &self.location {
            Some(at) => write!(f, "{}:{}:{}: ", at.file, at.line, at.column)?,
            None if !self.path.is_empty() => write!(f, "{}: ", self.path.join("."))?,
            None => {}
        }
        write!(f, "{severity}[{}]: {}", self.code, self.message)?;
        match &self.help {
            Some(help) => write!(f, " ({help})"),
            None => Ok(()),
        }
    }
}
