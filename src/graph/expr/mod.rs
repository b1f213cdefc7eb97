//! Expressions of graph files: CEL, compiled once, evaluated within limits.
//!
//! The syntax is that of the `cel` crate's parser; the evaluation is our own, for two reasons. CEL's
//! interpreter has no fuel: three nested macros over a few hundred items run for seconds and cannot be
//! stopped, and a macro that returns a large value once for each item exhausts memory. And it wants
//! the state converted to its own values, where this evaluator reads the JSON where it lies.
//!
//! A source passes [`scan`] (size, tokens, bracket depth: the parser recurses), the parser, and
//! [`lower`], which resolves every name, so that an expression that compiled can fail only on data.
//!
//! **Invariant:** an evaluation is pure (no clock, no randomness), ends within [`MAX_STEPS`] steps,
//! and builds at most [`MAX_BUILT_BYTES`]; it never panics, whatever the data.

mod arithmetic;
mod eval;
mod functions;
mod lower;
mod operand;
mod prompt;
mod scan;
mod template;

use std::sync::Arc;

use serde_json::Value;

use super::value::Shared;
use lower::Ir;

pub use functions::FUNCTIONS;
pub use prompt::MAX_PROMPT_BYTES;
pub use template::{Template, TemplateError};

/// Bytes of one expression's source.
pub const MAX_SOURCE_BYTES: usize = 2048;
/// Tokens of one expression.
pub const MAX_TOKENS: usize = 400;
/// Brackets inside brackets, and operators inside operands.
pub const MAX_NESTING: usize = 32;
/// Macros (`all`, `map`, ..) inside macros.
pub const MAX_MACRO_NESTING: usize = 3;
/// Items of a list or keys of a map that a macro walks.
pub const MAX_MACRO_ITEMS: usize = 100_000;
/// Steps of one evaluation: an operator, an item of a macro, 64 bytes of text looked at.
pub const MAX_STEPS: u64 = 2_000_000;
/// Bytes that one evaluation may build, intermediate values included.
pub const MAX_BUILT_BYTES: usize = 32 << 20;
/// Levels of a value that an expression or a template gives. Below what a JSON parser reads back.
pub const MAX_VALUE_DEPTH: usize = 96;

/// What an expression reads: decides what an evaluation must be given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct References {
    /// Channels named as `state.NAME`, in order of first use.
    pub channels: Vec<String>,
    /// Other variables, in order of first use.
    pub vars: Vec<String>,
}

impl References {
    fn absorb(&mut self, other: &References) {
        for (mine, theirs) in [(&mut self.channels, &other.channels), (&mut self.vars, &other.vars)]
        {
            for name in theirs {
                if !mine.contains(name) {
                    mine.push(name.clone());
                }
            }
        }
    }
}

/// A compiled expression.
#[derive(Debug, Clone)]
pub struct Expr {
    source: Arc<str>,
    root: Arc<Ir>,
    references: Arc<References>,
}

/// Why a source is no expression.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ExprError {
    /// What is wrong, in words for the author of the file.
    pub message: String,
    /// Where, as a byte offset into the source, when that is known.
    pub offset: Option<usize>,
    /// What to write instead, when that can be guessed.
    pub help: Option<String>,
}

impl ExprError {
    fn at(offset: impl Into<Option<usize>>, message: impl Into<String>) -> Self {
        Self { message: message.into(), offset: offset.into(), help: None }
    }

    fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

/// Why an evaluation gave no value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{problem}, in `{expression}`")]
pub struct EvalError {
    /// What happened.
    pub problem: EvalProblem,
    /// The source of the expression.
    pub expression: Arc<str>,
}

/// What an evaluation can meet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EvalProblem {
    /// The channel has neither been written nor has it a default.
    #[error("state.{0} has no value yet")]
    MissingChannel(String),
    /// The caller gave no value for a variable.
    #[error("{0} is not available here")]
    MissingVariable(String),
    /// A map has no such key.
    #[error("there is no key {0}")]
    MissingKey(String),
    /// An operand, an argument or a result is not what was asked for.
    #[error("{0}")]
    Unsuitable(String),
    /// A limit was reached.
    #[error("the expression needs more than {limit} {what}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How much is allowed.
        limit: usize,
    },
}

/// Gives the values of channels.
pub trait StateView {
    /// The channel's value; `None` when it has none yet.
    fn get(&self, channel: &str) -> Option<Shared>;
}

/// What an evaluation sees.
#[derive(Clone, Copy)]
pub struct Scope<'a> {
    /// Behind `state.NAME`.
    pub state: &'a dyn StateView,
    /// The other variables by name.
    pub vars: &'a [(&'a str, Shared)],
}

impl Expr {
    /// Compiles `source`, in which `state` and the names of `vars` may be used.
    pub fn compile(source: &str, vars: &[&str]) -> Result<Self, ExprError> {
        scan::check(source)?;
        let parsed = scan::parse(source)?;
        let (root, references) = lower::lower(&parsed, source, vars)?;
        Ok(Self { source: source.into(), root: Arc::new(root), references: Arc::new(references) })
    }

    /// The text that this was compiled from.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The channels and variables that the expression may read.
    #[must_use]
    pub fn references(&self) -> &References {
        &self.references
    }

    /// The value in `scope`.
    pub fn eval(&self, scope: &Scope<'_>) -> Result<Value, EvalError> {
        self.eval_within(scope, MAX_VALUE_DEPTH)
    }

    /// The value in `scope`, without a copy where the expression only names a channel or a variable.
    pub fn eval_shared(&self, scope: &Scope<'_>) -> Result<Shared, EvalError> {
        let named = match &*self.root {
            Ir::Channel(at) => scope.state.get(&self.references.channels[*at]),
            Ir::Var(at) => find(scope.vars, &self.references.vars[*at]),
            _ => None,
        };
        named.map_or_else(|| self.eval(scope).map(Shared::new), Ok)
    }

    /// The value in `scope`, which must be a boolean.
    pub fn eval_bool(&self, scope: &Scope<'_>) -> Result<bool, EvalError> {
        match self.eval(scope)? {
            Value::Bool(value) => Ok(value),
            other => Err(self.failed(EvalProblem::Unsuitable(format!(
                "a condition must be true or false, this is {}",
                operand::describe(&other)
            )))),
        }
    }

    fn eval_within(&self, scope: &Scope<'_>, depth: usize) -> Result<Value, EvalError> {
        eval::evaluate(&self.root, &self.references, scope, depth).map_err(|err| self.failed(err))
    }

    fn eval_text(&self, scope: &Scope<'_>, into: &mut String) -> Result<(), EvalError> {
        eval::evaluate_text(&self.root, &self.references, scope, into)
            .map_err(|err| self.failed(err))
    }

    fn failed(&self, problem: EvalProblem) -> EvalError {
        EvalError { problem, expression: Arc::clone(&self.source) }
    }
}

fn find(vars: &[(&str, Shared)], name: &str) -> Option<Shared> {
    vars.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone())
}

#[cfg(test)]
mod tests;
