//! The evaluator: walks a lowered expression over borrowed JSON, and counts what it does.
//!
//! As CEL has it, `&&`, `||`, `all` and `exists` give their result when one operand decides it, even
//! where another one fails. Where CEL is stricter than JSON users expect, this is lenient: an integer
//! meets a double as a double, because JSON does not tell 1 from 1.0.
//!
//! **Invariant:** a limit that is reached ends the evaluation; no operator absorbs that error.

use std::cmp::Ordering;

use serde_json::{Number, Value};

use super::arithmetic::{arithmetic, negate};
use super::functions;
use super::lower::{Ir, Macro, MacroKind, Op};
use super::operand::{self, List, Map, Operand, Text, unsuitable};
use super::{EvalProblem, MAX_BUILT_BYTES, MAX_MACRO_ITEMS, MAX_STEPS, References, Scope, find};
use crate::graph::value::Shared;

/// What the slots of one list item or map entry are counted as.
const SLOT_BYTES: usize = 32;

pub(super) type Outcome<'a> = Result<Operand<'a>, EvalProblem>;

/// The value of `root`, at most `depth` levels deep.
pub(super) fn evaluate(
    root: &Ir,
    references: &References,
    scope: &Scope<'_>,
    depth: usize,
) -> Result<Value, EvalProblem> {
    let inputs = Inputs::gather(references, scope);
    let mut machine = Machine::new(references, &inputs);
    let value = machine.eval(root)?;
    machine.json_of(&value, depth)
}

/// Appends the value of `root` as text: strings bare, lists and maps as compact JSON.
pub(super) fn evaluate_text(
    root: &Ir,
    references: &References,
    scope: &Scope<'_>,
    into: &mut String,
) -> Result<(), EvalProblem> {
    let inputs = Inputs::gather(references, scope);
    let mut machine = Machine::new(references, &inputs);
    let value = machine.eval(root)?;
    let text = machine.text_of(&value)?;
    machine.built(into.len())?;
    into.push_str(&text);
    Ok(())
}

/// The values that an evaluation may read, held while it borrows from them.
struct Inputs {
    channels: Vec<Option<Shared>>,
    vars: Vec<Option<Shared>>,
}

impl Inputs {
    fn gather(references: &References, scope: &Scope<'_>) -> Self {
        Self {
            channels: references.channels.iter().map(|name| scope.state.get(name)).collect(),
            vars: references.vars.iter().map(|name| find(scope.vars, name)).collect(),
        }
    }
}

/// One evaluation: its inputs, the macro variables in scope, and what it has used of its limits.
pub(super) struct Machine<'a> {
    references: &'a References,
    inputs: &'a Inputs,
    locals: Vec<Operand<'a>>,
    steps: u64,
    bytes: usize,
}

impl<'a> Machine<'a> {
    fn new(references: &'a References, inputs: &'a Inputs) -> Self {
        Self { references, inputs, locals: Vec::new(), steps: 0, bytes: 0 }
    }

    /// Counts steps.
    pub(super) fn spend(&mut self, steps: usize) -> Result<(), EvalProblem> {
        self.steps = self.steps.saturating_add(u64::try_from(steps).unwrap_or(u64::MAX));
        if self.steps > MAX_STEPS {
            let limit = usize::try_from(MAX_STEPS).unwrap_or(usize::MAX);
            return Err(EvalProblem::Limit { what: "steps", limit });
        }
        Ok(())
    }

    /// Counts bytes that are made, before they are.
    pub(super) fn built(&mut self, bytes: usize) -> Result<(), EvalProblem> {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > MAX_BUILT_BYTES {
            let what = "bytes of memory";
            return Err(EvalProblem::Limit { what, limit: MAX_BUILT_BYTES });
        }
        self.spend(bytes / 64)
    }

    /// Counts the slots of a list or map of `len` entries.
    pub(super) fn built_slots(&mut self, len: usize) -> Result<(), EvalProblem> {
        self.built(len.saturating_mul(SLOT_BYTES))
    }

    fn eval(&mut self, ir: &'a Ir) -> Outcome<'a> {
        self.spend(1)?;
        match ir {
            Ir::Const(value) => Ok(value.into()),
            Ir::Channel(at) => self.channel(*at),
            Ir::Var(at) => self.inputs.vars[*at].as_ref().map_or_else(
                || Err(EvalProblem::MissingVariable(self.references.vars[*at].clone())),
                |value| Ok(value.json().into()),
            ),
            Ir::Local(at) => Ok(self.locals[*at].clone()),
            Ir::Select(of, field) => {
                let of = self.eval(of)?;
                select(&of, field)
            }
            Ir::Has(of, field) => Ok(Operand::Bool(self.has(of, field)?)),
            Ir::HasChannel(at) => Ok(Operand::Bool(self.inputs.channels[*at].is_some())),
            Ir::Index(of, key) => {
                let of = self.eval(of)?;
                let key = self.eval(key)?;
                index(&of, &key)
            }
            Ir::And(a, b) => self.connect(a, b, false),
            Ir::Or(a, b) => self.connect(a, b, true),
            Ir::Not(a) => self.boolean(a).map(|value| Operand::Bool(!value)),
            Ir::Negate(a) => negate(&self.eval(a)?),
            Ir::Conditional(condition, yes, no) => {
                if self.boolean(condition)? {
                    self.eval(yes)
                } else {
                    self.eval(no)
                }
            }
            Ir::Binary(op, a, b) => {
                let a = self.eval(a)?;
                let b = self.eval(b)?;
                self.binary(*op, &a, &b)
            }
            Ir::List(items) => {
                self.built_slots(items.len())?;
                items
                    .iter()
                    .map(|item| self.eval(item))
                    .collect::<Result<_, _>>()
                    .map(Operand::list)
            }
            Ir::Map(entries) => self.map(entries),
            Ir::Macro(expansion) => self.expand(expansion),
            Ir::Call(function, args) => {
                let args = args.iter().map(|arg| self.eval(arg)).collect::<Result<Vec<_>, _>>()?;
                functions::call(self, function, args)
            }
            Ir::Matches(text, pattern) => {
                let text = self.eval(text)?;
                functions::matches(self, &text, pattern)
            }
        }
    }

    fn channel(&self, at: usize) -> Outcome<'a> {
        self.inputs.channels[at].as_ref().map_or_else(
            || Err(EvalProblem::MissingChannel(self.references.channels[at].clone())),
            |value| Ok(value.json().into()),
        )
    }

    /// Whether the path leads to a value: what is missing or null on the way is an answer, no error.
    fn has(&mut self, of: &'a Ir, field: &str) -> Result<bool, EvalProblem> {
        match self.eval(of) {
            Ok(Operand::Map(map)) => Ok(map.get(field).is_some()),
            Ok(_) | Err(EvalProblem::MissingKey(_) | EvalProblem::MissingChannel(_)) => Ok(false),
            Err(problem) => Err(problem),
        }
    }

    fn boolean(&mut self, ir: &'a Ir) -> Result<bool, EvalProblem> {
        truth(&self.eval(ir)?)
    }

    /// `a && b` (`decisive` false) or `a || b` (`decisive` true).
    fn connect(&mut self, a: &'a Ir, b: &'a Ir, decisive: bool) -> Outcome<'a> {
        let a = self.boolean(a);
        if a == Ok(decisive) || matches!(a, Err(EvalProblem::Limit { .. })) {
            return a.map(Operand::Bool);
        }
        let b = self.boolean(b)?;
        if b == decisive { Ok(Operand::Bool(b)) } else { a.map(Operand::Bool) }
    }

    fn map(&mut self, entries: &'a [(Ir, Ir)]) -> Outcome<'a> {
        self.built_slots(entries.len())?;
        let mut map: Vec<(Text<'a>, Operand<'a>)> = Vec::with_capacity(entries.len());
        for (key, value) in entries {
            let Operand::Text(key) = self.eval(key)? else {
                return Err(unsuitable("the keys of a map must be strings, as in JSON"));
            };
            if map.iter().any(|(known, _)| **known == *key) {
                return Err(unsuitable(format!("the key {:?} is there twice", &*key)));
            }
            let value = self.eval(value)?;
            map.push((key, value));
        }
        Ok(Operand::Map(Map::Made(map.into())))
    }

    fn expand(&mut self, expansion: &'a Macro) -> Outcome<'a> {
        let items = match self.eval(&expansion.range)? {
            Operand::List(list) => list,
            Operand::Map(map) => {
                self.built_slots(map.len())?;
                let keys = map.keys().into_iter().map(Operand::Text).collect();
                List::Made(std::rc::Rc::new(keys))
            }
            other => {
                let message = format!("a macro walks a list or a map, not {}", other.describe());
                return Err(unsuitable(message));
            }
        };
        if items.len() > MAX_MACRO_ITEMS {
            return Err(EvalProblem::Limit { what: "items in a macro", limit: MAX_MACRO_ITEMS });
        }
        let at = self.locals.len();
        let result = self.walk(expansion, &items);
        self.locals.truncate(at);
        result
    }

    fn walk(&mut self, expansion: &'a Macro, items: &List<'a>) -> Outcome<'a> {
        let at = self.locals.len();
        let mut kept = Vec::new();
        let (mut count, mut pending) = (0_usize, None);
        for item in items.iter() {
            self.spend(1)?;
            self.locals.truncate(at);
            self.locals.push(item.clone());
            if let Some(condition) = &expansion.condition
                && !self.boolean(condition)?
            {
                continue;
            }
            match expansion.kind {
                MacroKind::Map => kept.push(self.eval(&expansion.body)?),
                MacroKind::Filter if self.boolean(&expansion.body)? => kept.push(item),
                MacroKind::Filter => continue,
                MacroKind::ExistsOne => {
                    count += usize::from(self.boolean(&expansion.body)?);
                    continue;
                }
                MacroKind::All | MacroKind::Exists => {
                    let decisive = expansion.kind == MacroKind::Exists;
                    match self.boolean(&expansion.body) {
                        Ok(value) if value == decisive => return Ok(Operand::Bool(decisive)),
                        Ok(_) => {}
                        Err(problem @ EvalProblem::Limit { .. }) => return Err(problem),
                        Err(problem) => pending = pending.or(Some(problem)),
                    }
                    continue;
                }
            }
            self.built_slots(1)?;
        }
        match (expansion.kind, pending) {
            (_, Some(problem)) => Err(problem),
            (MacroKind::All, None) => Ok(Operand::Bool(true)),
            (MacroKind::Exists, None) => Ok(Operand::Bool(false)),
            (MacroKind::ExistsOne, None) => Ok(Operand::Bool(count == 1)),
            (MacroKind::Map | MacroKind::Filter, None) => Ok(Operand::list(kept)),
        }
    }

    fn binary(&mut self, op: Op, a: &Operand<'a>, b: &Operand<'a>) -> Outcome<'a> {
        match op {
            Op::Equal => self.equal(a, b).map(Operand::Bool),
            Op::NotEqual => self.equal(a, b).map(|equal| Operand::Bool(!equal)),
            Op::Less => a.order(b).map(|order| Operand::Bool(order == Ordering::Less)),
            Op::LessEqual => a.order(b).map(|order| Operand::Bool(order != Ordering::Greater)),
            Op::Greater => a.order(b).map(|order| Operand::Bool(order == Ordering::Greater)),
            Op::GreaterEqual => a.order(b).map(|order| Operand::Bool(order != Ordering::Less)),
            Op::In => self.contains(b, a).map(Operand::Bool),
            Op::Add => match (a, b) {
                (Operand::Text(a), Operand::Text(b)) => {
                    self.built(a.len() + b.len())?;
                    Ok(Operand::text([&**a, &**b].concat()))
                }
                (Operand::List(a), Operand::List(b)) => {
                    self.built_slots(a.len() + b.len())?;
                    Ok(Operand::list(a.iter().chain(b.iter()).collect()))
                }
                _ => arithmetic(op, a, b),
            },
            _ => arithmetic(op, a, b),
        }
    }

    /// Whether `item` is in the list, or a key of the map.
    pub(super) fn contains(
        &mut self,
        of: &Operand<'a>,
        item: &Operand<'a>,
    ) -> Result<bool, EvalProblem> {
        match (of, item) {
            (Operand::List(list), item) => {
                for known in list.iter() {
                    if self.equal(&known, item)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            (Operand::Map(map), Operand::Text(key)) => Ok(map.get(key).is_some()),
            (Operand::Map(_), _) => Ok(false),
            (other, _) => Err(unsuitable(format!("{} holds nothing", other.describe()))),
        }
    }

    /// Deep equality; numbers are equal by value, things of different sorts are not equal.
    pub(super) fn equal(&mut self, a: &Operand<'a>, b: &Operand<'a>) -> Result<bool, EvalProblem> {
        self.spend(1)?;
        Ok(match (a, b) {
            (Operand::Null, Operand::Null) => true,
            (Operand::Text(a), Operand::Text(b)) => {
                self.spend(a.len().min(b.len()) / 64)?;
                **a == **b
            }
            (Operand::List(a), Operand::List(b)) => {
                if a.len() != b.len() {
                    return Ok(false);
                }
                for (a, b) in a.iter().zip(b.iter()) {
                    if !self.equal(&a, &b)? {
                        return Ok(false);
                    }
                }
                true
            }
            (Operand::Map(a), Operand::Map(b)) => {
                if a.len() != b.len() {
                    return Ok(false);
                }
                self.spend(a.len())?;
                for (key, value) in a.entries() {
                    match b.get(&key) {
                        Some(other) if self.equal(&value, &other)? => {}
                        _ => return Ok(false),
                    }
                }
                true
            }
            (a, b)
                if a.kind() == b.kind() || (a.as_double().is_some() && b.as_double().is_some()) =>
            {
                matches!(a.order(b), Ok(Ordering::Equal))
            }
            _ => false,
        })
    }

    /// The text that interpolation and `string()` make of a value.
    pub(super) fn text_of(&mut self, value: &Operand<'a>) -> Result<String, EvalProblem> {
        let text = match value.scalar_text() {
            Some(text) => text,
            None => self.json_of(value, super::MAX_VALUE_DEPTH)?.to_string(),
        };
        self.built(text.len())?;
        Ok(text)
    }

    /// The value as JSON, at most `depth` levels deep.
    pub(super) fn json_of(
        &mut self,
        value: &Operand<'a>,
        depth: usize,
    ) -> Result<Value, EvalProblem> {
        self.spend(1)?;
        let inner = || depth.checked_sub(1).ok_or_else(too_deep);
        match value {
            Operand::Null => Ok(Value::Null),
            Operand::Bool(value) => Ok(Value::Bool(*value)),
            Operand::Int(value) => match (i64::try_from(*value), u64::try_from(*value)) {
                (Ok(value), _) => Ok(value.into()),
                (_, Ok(value)) => Ok(value.into()),
                _ => Err(unsuitable(format!("{value} is out of the range of integers"))),
            },
            Operand::Double(value) => Number::from_f64(*value)
                .map(Value::Number)
                .ok_or_else(|| unsuitable(format!("the result {value} is no number in JSON"))),
            Operand::Text(text) => {
                self.built(text.len())?;
                Ok(Value::from(&**text))
            }
            Operand::Duration(value) => Ok(operand::duration_text(*value).into()),
            Operand::Timestamp(value) => Ok(operand::timestamp_text(value).into()),
            Operand::List(list) => {
                let depth = inner()?;
                self.built_slots(list.len())?;
                list.iter().map(|item| self.json_of(&item, depth)).collect()
            }
            Operand::Map(map) => {
                let depth = inner()?;
                self.built_slots(map.len())?;
                let mut object = serde_json::Map::with_capacity(map.len());
                for (key, value) in map.entries() {
                    self.built(key.len())?;
                    object.insert((*key).to_owned(), self.json_of(&value, depth)?);
                }
                Ok(Value::Object(object))
            }
        }
    }
}

fn too_deep() -> EvalProblem {
    EvalProblem::Limit { what: "levels of lists and maps", limit: super::MAX_VALUE_DEPTH }
}

pub(super) fn truth(value: &Operand<'_>) -> Result<bool, EvalProblem> {
    match value {
        Operand::Bool(value) => Ok(*value),
        other => Err(unsuitable(format!("expected true or false, not {}", other.describe()))),
    }
}

fn select<'a>(of: &Operand<'a>, field: &str) -> Outcome<'a> {
    match of {
        Operand::Map(map) => {
            map.get(field).ok_or_else(|| EvalProblem::MissingKey(format!("`{field}`")))
        }
        other => Err(unsuitable(format!("{} has no fields, so no `{field}`", other.describe()))),
    }
}

fn index<'a>(of: &Operand<'a>, key: &Operand<'a>) -> Outcome<'a> {
    match (of, key) {
        (Operand::Map(_), Operand::Text(key)) => select(of, key),
        (Operand::List(list), Operand::Int(at)) => {
            usize::try_from(*at).ok().and_then(|at| list.get(at)).ok_or_else(|| {
                EvalProblem::MissingKey(format!("{at} in a list of {} items", list.len()))
            })
        }
        (of, key) => {
            Err(unsuitable(format!("{} is not indexed by {}", of.describe(), key.describe())))
        }
    }
}
