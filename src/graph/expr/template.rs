//! Templates: JSON in which strings may hold `${expression}`.
//!
//! A string that is exactly one `${..}` keeps the type of the value; inside other text the value is
//! formatted, strings bare and the rest as compact JSON. `$${` is a literal `${`. Keys are never
//! templates.

use serde_json::Value;

use super::prompt::Prompt;
use super::{EvalError, EvalProblem, Expr, ExprError, MAX_VALUE_DEPTH, References, Scope, scan};

/// Levels of lists and maps in a template itself.
const MAX_TEMPLATE_DEPTH: usize = 32;

/// A JSON tree with expressions in it, compiled.
#[derive(Debug, Clone)]
pub struct Template {
    part: Part,
    references: References,
}

#[derive(Debug, Clone)]
enum Part {
    Literal(Value),
    Expr(Expr),
    Text(Vec<Piece>),
    List(Vec<Part>),
    Map(Vec<(String, Part)>),
    Prompt(Prompt),
}

#[derive(Debug, Clone)]
enum Piece {
    Literal(String),
    Expr(Expr),
}

/// Why a JSON tree is no template.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{error}")]
pub struct TemplateError {
    /// Keys and positions from the root of the template to the string in question.
    pub path: Vec<String>,
    /// What is wrong; its offset counts from the start of the string.
    pub error: ExprError,
}

impl Template {
    /// Compiles `json`, in which `state` and the names of `vars` may be used.
    pub fn compile(json: &Value, vars: &[&str]) -> Result<Self, TemplateError> {
        let mut compiler = Compiler { vars, path: Vec::new(), references: References::default() };
        let part = compiler.part(json)?;
        Ok(Self { part, references: compiler.references })
    }

    /// Compiles a prompt, Markdown with `MiniJinja`, in which `state` and the names of `vars` may be used. It gives a text.
    pub fn prompt(source: &str, vars: &[&str]) -> Result<Self, ExprError> {
        let prompt = Prompt::compile(source, vars)?;
        if !source.contains(['{', '}']) {
            return Ok(Self::literal(source.into()));
        }
        let references = prompt.references();
        Ok(Self { part: Part::Prompt(prompt), references })
    }

    /// A template that gives `value` as it is, whatever its strings hold.
    #[must_use]
    pub fn literal(value: Value) -> Self {
        Self { part: Part::Literal(value), references: References::default() }
    }

    /// The value, when it does not depend on anything.
    #[must_use]
    pub fn as_literal(&self) -> Option<&Value> {
        match &self.part {
            Part::Literal(value) => Some(value),
            _ => None,
        }
    }

    /// The expression, when the template is exactly one.
    #[must_use]
    pub fn as_expr(&self) -> Option<&Expr> {
        match &self.part {
            Part::Expr(expr) => Some(expr),
            _ => None,
        }
    }

    /// The channels and variables that the template may read.
    #[must_use]
    pub fn references(&self) -> &References {
        &self.references
    }

    /// The value in `scope`.
    pub fn eval(&self, scope: &Scope<'_>) -> Result<Value, EvalError> {
        self.part.eval(scope, MAX_VALUE_DEPTH)
    }
}

impl Part {
    /// A list, which is a literal when all its items are.
    fn list(parts: Vec<Part>) -> Self {
        if !parts.iter().all(|part| matches!(part, Self::Literal(_))) {
            return Self::List(parts);
        }
        Self::Literal(Value::Array(parts.into_iter().filter_map(Self::into_literal).collect()))
    }

    /// A map, which is a literal when all its values are.
    fn map(entries: Vec<(String, Part)>) -> Self {
        if !entries.iter().all(|(_, part)| matches!(part, Self::Literal(_))) {
            return Self::Map(entries);
        }
        let literals =
            entries.into_iter().filter_map(|(key, part)| Some((key, part.into_literal()?)));
        Self::Literal(Value::Object(literals.collect()))
    }

    fn into_literal(self) -> Option<Value> {
        match self {
            Self::Literal(value) => Some(value),
            _ => None,
        }
    }

    fn eval(&self, scope: &Scope<'_>, depth: usize) -> Result<Value, EvalError> {
        let inner = depth.saturating_sub(1);
        match self {
            Self::Literal(value) => Ok(value.clone()),
            Self::Expr(expr) => expr.eval_within(scope, depth),
            Self::Text(pieces) => {
                let mut text = String::new();
                for piece in pieces {
                    match piece {
                        Piece::Literal(literal) => text.push_str(literal),
                        Piece::Expr(expr) => expr.eval_text(scope, &mut text)?,
                    }
                }
                Ok(Value::String(text))
            }
            Self::List(parts) => parts.iter().map(|part| part.eval(scope, inner)).collect(),
            Self::Map(entries) => entries
                .iter()
                .map(|(key, part)| Ok((key.clone(), part.eval(scope, inner)?)))
                .collect(),
            Self::Prompt(prompt) => prompt.render(scope).map(Value::String),
        }
    }
}

struct Compiler<'a> {
    vars: &'a [&'a str],
    path: Vec<String>,
    references: References,
}

impl Compiler<'_> {
    fn error(&self, error: ExprError) -> TemplateError {
        TemplateError { path: self.path.clone(), error }
    }

    fn part(&mut self, json: &Value) -> Result<Part, TemplateError> {
        if self.path.len() > MAX_TEMPLATE_DEPTH {
            let message = format!("the value nests deeper than {MAX_TEMPLATE_DEPTH} levels");
            return Err(self.error(ExprError::at(None, message)));
        }
        match json {
            Value::String(text) => self.text(text),
            Value::Array(items) => {
                let mut parts = Vec::with_capacity(items.len());
                for (at, item) in items.iter().enumerate() {
                    parts.push(self.inner(at.to_string(), item)?);
                }
                Ok(Part::list(parts))
            }
            Value::Object(map) => {
                let mut entries = Vec::with_capacity(map.len());
                for (key, value) in map {
                    entries.push((key.clone(), self.inner(key.clone(), value)?));
                }
                Ok(Part::map(entries))
            }
            other => Ok(Part::Literal(other.clone())),
        }
    }

    fn inner(&mut self, key: String, json: &Value) -> Result<Part, TemplateError> {
        self.path.push(key);
        let part = self.part(json);
        self.path.pop();
        part
    }

    fn text(&mut self, text: &str) -> Result<Part, TemplateError> {
        let mut pieces = Vec::new();
        let mut literal = String::new();
        let mut rest = 0;
        while let Some(found) = text[rest..].find("${").map(|at| rest + at) {
            if found > rest && text.as_bytes()[found - 1] == b'$' {
                literal.push_str(&text[rest..found - 1]);
                literal.push_str("${");
                rest = found + 2;
                continue;
            }
            literal.push_str(&text[rest..found]);
            let start = found + 2;
            let Some(end) = scan::closing_brace(text, start) else {
                let error = ExprError::at(found, "this `${` is not closed")
                    .help("close it with `}`, or write `$${` for a literal `${`");
                return Err(self.error(error));
            };
            let expr = self.expr(&text[start..end], start)?;
            if found == 0 && end + 1 == text.len() {
                return Ok(Part::Expr(expr));
            }
            if !literal.is_empty() {
                pieces.push(Piece::Literal(std::mem::take(&mut literal)));
            }
            pieces.push(Piece::Expr(expr));
            rest = end + 1;
        }
        literal.push_str(&text[rest..]);
        if pieces.is_empty() {
            return Ok(Part::Literal(Value::String(literal)));
        }
        if !literal.is_empty() {
            pieces.push(Piece::Literal(literal));
        }
        Ok(Part::Text(pieces))
    }

    fn expr(&mut self, source: &str, start: usize) -> Result<Expr, TemplateError> {
        let lead = source.len() - source.trim_start().len();
        let expr = Expr::compile(source.trim(), self.vars).map_err(|mut error| {
            error.offset = Some(start + lead + error.offset.unwrap_or(0));
            self.error(error)
        })?;
        self.references.absorb(expr.references());
        Ok(expr)
    }
}

impl EvalError {
    /// Whether the evaluation failed because a channel has no value yet.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self.problem, EvalProblem::MissingChannel(_))
    }
}
