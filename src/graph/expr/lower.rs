//! From the parser's tree to what is evaluated: every name resolved, every call checked.
//!
//! Channels, variables and macro variables become positions, functions become table entries, constant
//! patterns become compiled ones. What cannot work is refused here, where a line number is at hand.

use cel::common::ast::{CallExpr, EntryExpr, Expr as Ast, IdedExpr, LiteralValue, operators};
use regex::Regex;
use serde_json::Value;

use super::functions::{Func, Function, compile_pattern, find as find_function};
use super::scan::Parsed;
use super::{ExprError, FUNCTIONS, MAX_MACRO_NESTING, References};
use crate::graph::names::{did_you_mean, listed};

/// What is evaluated.
#[derive(Debug)]
pub(super) enum Ir {
    Const(Value),
    /// Position in [`References::channels`].
    Channel(usize),
    /// Position in [`References::vars`].
    Var(usize),
    /// Position among the macro variables in scope.
    Local(usize),
    Select(Box<Ir>, String),
    Has(Box<Ir>, String),
    HasChannel(usize),
    Index(Box<Ir>, Box<Ir>),
    And(Box<Ir>, Box<Ir>),
    Or(Box<Ir>, Box<Ir>),
    Not(Box<Ir>),
    Negate(Box<Ir>),
    Conditional(Box<Ir>, Box<Ir>, Box<Ir>),
    Binary(Op, Box<Ir>, Box<Ir>),
    List(Vec<Ir>),
    Map(Vec<(Ir, Ir)>),
    Macro(Box<Macro>),
    Call(&'static Function, Vec<Ir>),
    Matches(Box<Ir>, Regex),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    Add,
    Subtract,
    Multiply,
    Divide,
    Modulo,
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    In,
}

/// `range.kind(variable, condition?, body)`.
#[derive(Debug)]
pub(super) struct Macro {
    pub(super) kind: MacroKind,
    pub(super) range: Ir,
    pub(super) condition: Option<Ir>,
    pub(super) body: Ir,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MacroKind {
    All,
    Exists,
    ExistsOne,
    Map,
    Filter,
}

/// Resolves the names of a parsed expression, which may use `state` and `vars`.
pub(super) fn lower(
    parsed: &Parsed,
    source: &str,
    vars: &[&str],
) -> Result<(Ir, References), ExprError> {
    let mut lowering =
        Lowering { parsed, source, vars, locals: Vec::new(), references: References::default() };
    let root = lowering.expr(&parsed.root)?;
    Ok((root, lowering.references))
}

struct Lowering<'a> {
    parsed: &'a Parsed,
    source: &'a str,
    vars: &'a [&'a str],
    locals: Vec<String>,
    references: References,
}

impl Lowering<'_> {
    fn error(&self, at: &IdedExpr, message: impl Into<String>) -> ExprError {
        let offset = self.parsed.info.offset_for(at.id).and_then(|(start, _)| {
            let start = usize::try_from(start).ok()?;
            self.source.char_indices().nth(start).map(|(at, _)| at)
        });
        ExprError::at(offset, message)
    }

    fn boxed(&mut self, expr: &IdedExpr) -> Result<Box<Ir>, ExprError> {
        self.expr(expr).map(Box::new)
    }

    fn expr(&mut self, expr: &IdedExpr) -> Result<Ir, ExprError> {
        match &expr.expr {
            Ast::Literal(literal) => self.literal(expr, literal),
            Ast::Ident(name) => self.ident(expr, name),
            Ast::Select(select) if self.is_state(&select.operand) => {
                Ok(Ir::Channel(self.channel(&select.field)))
            }
            Ast::Select(select) => {
                Ok(Ir::Select(self.boxed(&select.operand)?, select.field.clone()))
            }
            Ast::List(list) => list
                .elements
                .iter()
                .map(|item| self.expr(item))
                .collect::<Result<_, _>>()
                .map(Ir::List),
            Ast::Map(map) => map
                .entries
                .iter()
                .map(|entry| match &entry.expr {
                    EntryExpr::MapEntry(entry) => {
                        Ok((self.expr(&entry.key)?, self.expr(&entry.value)?))
                    }
                    EntryExpr::StructField(_) => Err(self.error(expr, "a map needs `key: value`")),
                })
                .collect::<Result<_, _>>()
                .map(Ir::Map),
            Ast::Call(call) => self.call(expr, call),
            Ast::Struct(strct) => Err(self
                .error(expr, format!("there is no type {} to build", strct.type_name))
                .help("a map is written {'key': value}")),
            Ast::Comprehension(_) | Ast::Unspecified => {
                Err(self.error(expr, "this is not an expression"))
            }
        }
    }

    fn literal(&self, at: &IdedExpr, literal: &LiteralValue) -> Result<Ir, ExprError> {
        let value = match literal {
            LiteralValue::Boolean(value) => Value::from(*value.inner()),
            LiteralValue::Double(value) => serde_json::Number::from_f64(*value.inner())
                .map(Value::Number)
                .ok_or_else(|| self.error(at, "this number is too large"))?,
            LiteralValue::Int(value) => Value::from(*value.inner()),
            LiteralValue::UInt(value) => Value::from(*value.inner()),
            LiteralValue::Null => Value::Null,
            LiteralValue::String(value) => Value::from(value.inner()),
            LiteralValue::Bytes(_) => {
                return Err(self.error(at, "bytes have no place in JSON: use a string"));
            }
        };
        Ok(Ir::Const(value))
    }

    fn ident(&mut self, at: &IdedExpr, name: &str) -> Result<Ir, ExprError> {
        if let Some(local) = self.locals.iter().position(|local| local == name) {
            return Ok(Ir::Local(local));
        }
        if name == "state" {
            return Err(self
                .error(at, "`state` alone is no value")
                .help("name a channel, as in state.NAME"));
        }
        if self.vars.contains(&name) {
            return Ok(Ir::Var(intern(&mut self.references.vars, name)));
        }
        let error = self.error(at, format!("`{name}` is not available here"));
        if name == "now" {
            return Err(error.help("expressions are pure and do not know the time"));
        }
        if find_function(name).is_some() {
            return Err(error.help(format!("a function is called: {name}(..)")));
        }
        let mut known = self.vars.to_vec();
        known.push("state");
        known.extend(self.locals.iter().map(String::as_str));
        Err(error.help(match did_you_mean(name, known.iter().copied()) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("available are {}", listed(known.iter().copied())),
        }))
    }

    fn is_state(&self, expr: &IdedExpr) -> bool {
        matches!(&expr.expr, Ast::Ident(name) if name == "state")
    }

    fn channel(&mut self, name: &str) -> usize {
        intern(&mut self.references.channels, name)
    }

    fn call(&mut self, expr: &IdedExpr, call: &CallExpr) -> Result<Ir, ExprError> {
        if call.target.is_none()
            && let Some(ir) = self.operator(call)?
        {
            return Ok(ir);
        }
        if let Some(target) = &call.target
            && let Some(kind) = macro_kind(&call.func_name)
        {
            return self.expand(expr, kind, target, &call.args);
        }
        if call.func_name == "has" && call.target.is_none() {
            return self.has(expr, &call.args);
        }
        self.function(expr, call)
    }

    fn operator(&mut self, call: &CallExpr) -> Result<Option<Ir>, ExprError> {
        Ok(Some(match (call.func_name.as_str(), call.args.as_slice()) {
            (operators::CONDITIONAL, [condition, yes, no]) => {
                Ir::Conditional(self.boxed(condition)?, self.boxed(yes)?, self.boxed(no)?)
            }
            (operators::LOGICAL_AND, [a, b]) => Ir::And(self.boxed(a)?, self.boxed(b)?),
            (operators::LOGICAL_OR, [a, b]) => Ir::Or(self.boxed(a)?, self.boxed(b)?),
            (operators::LOGICAL_NOT, [a]) => Ir::Not(self.boxed(a)?),
            (operators::NEGATE, [a]) => Ir::Negate(self.boxed(a)?),
            (operators::INDEX, [a, key]) => match &key.expr {
                Ast::Literal(LiteralValue::String(name)) if self.is_state(a) => {
                    Ir::Channel(self.channel(name.inner()))
                }
                _ if self.is_state(a) => {
                    return Err(self
                        .error(a, "a channel is named by a constant")
                        .help("write state.NAME or state['NAME']"));
                }
                _ => Ir::Index(self.boxed(a)?, self.boxed(key)?),
            },
            (name, [a, b]) => match binary(name) {
                Some(op) => Ir::Binary(op, self.boxed(a)?, self.boxed(b)?),
                None => return Ok(None),
            },
            _ => return Ok(None),
        }))
    }

    fn expand(
        &mut self,
        expr: &IdedExpr,
        kind: MacroKind,
        target: &IdedExpr,
        args: &[IdedExpr],
    ) -> Result<Ir, ExprError> {
        let (variable, condition, body) = match args {
            [variable, body] => (variable, None, body),
            [variable, condition, body] if kind == MacroKind::Map => {
                (variable, Some(condition), body)
            }
            _ => return Err(self.error(expr, "a macro is written list.map(item, expression)")),
        };
        let Ast::Ident(name) = &variable.expr else {
            return Err(self.error(variable, "the first argument of a macro is a name"));
        };
        if name == "state" || self.vars.contains(&name.as_str()) || self.locals.contains(name) {
            return Err(self
                .error(variable, format!("`{name}` already has a meaning here"))
                .help("choose another name for the item"));
        }
        if self.locals.len() >= MAX_MACRO_NESTING {
            let message = format!("macros nest deeper than {MAX_MACRO_NESTING} levels");
            return Err(self.error(expr, message));
        }
        let range = self.expr(target)?;
        self.locals.push(name.clone());
        let condition = condition.map(|condition| self.expr(condition)).transpose();
        let body = self.expr(body);
        self.locals.pop();
        Ok(Ir::Macro(Box::new(Macro { kind, range, condition: condition?, body: body? })))
    }

    fn has(&mut self, expr: &IdedExpr, args: &[IdedExpr]) -> Result<Ir, ExprError> {
        let ir = match args {
            [arg] => self.expr(arg)?,
            _ => return Err(self.error(expr, "has() takes one argument")),
        };
        match ir {
            Ir::Channel(at) => Ok(Ir::HasChannel(at)),
            Ir::Select(of, field) => Ok(Ir::Has(of, field)),
            Ir::Index(of, key) => match *key {
                Ir::Const(Value::String(field)) => Ok(Ir::Has(of, field)),
                _ => Err(self.error(expr, "has() takes a field, as in has(state.user.name)")),
            },
            _ => Err(self.error(expr, "has() takes a field, as in has(state.user.name)")),
        }
    }

    fn function(&mut self, expr: &IdedExpr, call: &CallExpr) -> Result<Ir, ExprError> {
        let name = call.func_name.as_str();
        let Some(function) = find_function(name) else {
            let error = self.error(expr, format!("there is no function `{name}`"));
            let known = FUNCTIONS.iter().map(|function| function.name);
            return Err(match did_you_mean(name, known) {
                Some(near) => error.help(format!("did you mean `{near}`?")),
                None => error,
            });
        };
        let given = call.args.len() + usize::from(call.target.is_some());
        if given < function.min || given > function.max {
            return Err(self
                .error(expr, format!("{name}() is given {given} arguments"))
                .help(format!("it is used as {}", function.usage)));
        }
        let mut args = Vec::with_capacity(given);
        for arg in call.target.as_deref().into_iter().chain(&call.args) {
            args.push(self.expr(arg)?);
        }
        if function.id == Func::Matches
            && let [_, Ir::Const(Value::String(pattern))] = args.as_slice()
        {
            let pattern = compile_pattern(pattern).map_err(|err| self.error(expr, err))?;
            return Ok(Ir::Matches(Box::new(args.swap_remove(0)), pattern));
        }
        Ok(Ir::Call(function, args))
    }
}

fn intern(names: &mut Vec<String>, name: &str) -> usize {
    names.iter().position(|known| known == name).unwrap_or_else(|| {
        names.push(name.to_owned());
        names.len() - 1
    })
}

fn macro_kind(name: &str) -> Option<MacroKind> {
    Some(match name {
        "all" => MacroKind::All,
        "exists" => MacroKind::Exists,
        "exists_one" => MacroKind::ExistsOne,
        "map" => MacroKind::Map,
        "filter" => MacroKind::Filter,
        _ => return None,
    })
}

fn binary(name: &str) -> Option<Op> {
    Some(match name {
        operators::ADD => Op::Add,
        operators::SUBSTRACT => Op::Subtract,
        operators::MULTIPLY => Op::Multiply,
        operators::DIVIDE => Op::Divide,
        operators::MODULO => Op::Modulo,
        operators::EQUALS => Op::Equal,
        operators::NOT_EQUALS => Op::NotEqual,
        operators::LESS => Op::Less,
        operators::LESS_EQUALS => Op::LessEqual,
        operators::GREATER => Op::Greater,
        operators::GREATER_EQUALS => Op::GreaterEqual,
        operators::IN => Op::In,
        _ => return None,
    })
}
