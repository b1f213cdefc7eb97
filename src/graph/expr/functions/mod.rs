//! The functions of expressions. Each may be called as `f(x, y)` or as `x.f(y)`.
//!
//! **Invariant:** every function here is pure, and counts what it looks at and what it builds.

mod collections;
mod convert;
mod text;

use regex::{Regex, RegexBuilder};

use super::eval::{Machine, Outcome};
use super::operand::{Operand, Text, int, unsuitable};
use super::{EvalProblem, MAX_VALUE_DEPTH};

/// A function that expressions may call.
#[derive(Debug)]
pub struct Function {
    /// The name it is called by.
    pub name: &'static str,
    /// How it is called, and what it gives: a line of documentation.
    pub usage: &'static str,
    pub(super) id: Func,
    /// Fewest arguments, the one before the dot included.
    pub(super) min: usize,
    /// Most arguments.
    pub(super) max: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Func {
    Int,
    Double,
    String,
    Bool,
    Type,
    ToJson,
    FromJson,
    Timestamp,
    Duration,
    Part,
    Size,
    Contains,
    StartsWith,
    EndsWith,
    Matches,
    Trim,
    Lower,
    Upper,
    Replace,
    Substring,
    Split,
    Join,
    Get,
    Keys,
    Values,
    Merge,
    Sum,
    Min,
    Max,
    Sort,
    Reverse,
    Distinct,
    Flatten,
    Slice,
    Range,
    Abs,
    Round,
    Floor,
    Ceil,
}

const fn function(
    name: &'static str,
    id: Func,
    arity: (usize, usize),
    usage: &'static str,
) -> Function {
    Function { name, usage, id, min: arity.0, max: arity.1 }
}

/// All functions, in the order of the documentation.
pub static FUNCTIONS: &[Function] = &[
    function(
        "int",
        Func::Int,
        (1, 1),
        "int(x): a number cut towards zero, text such as \"42\" read, a timestamp in seconds",
    ),
    function("double", Func::Double, (1, 1), "double(x): a number or text as a double"),
    function(
        "string",
        Func::String,
        (1, 1),
        "string(x): what ${x} inside text gives; lists and maps as JSON",
    ),
    function("bool", Func::Bool, (1, 1), "bool(x): \"true\" or \"false\" read as a boolean"),
    function(
        "type",
        Func::Type,
        (1, 1),
        "type(x): null, bool, int, double, string, list, map, timestamp or duration",
    ),
    function("toJson", Func::ToJson, (1, 1), "toJson(x): compact JSON text"),
    function("fromJson", Func::FromJson, (1, 1), "fromJson(text): the value that JSON text holds"),
    function(
        "timestamp",
        Func::Timestamp,
        (1, 1),
        "timestamp(text): an RFC 3339 instant; seconds since 1970 when given a number",
    ),
    function(
        "duration",
        Func::Duration,
        (1, 1),
        "duration(text): such as \"90s\" or \"1h30m\"; seconds when given a number",
    ),
    function("getFullYear", Func::Part, (1, 1), "getFullYear(t): the year, in UTC"),
    function("getMonth", Func::Part, (1, 1), "getMonth(t): 0 to 11, in UTC"),
    function("getDate", Func::Part, (1, 1), "getDate(t): the day of the month from 1, in UTC"),
    function(
        "getDayOfMonth",
        Func::Part,
        (1, 1),
        "getDayOfMonth(t): the day of the month from 0, in UTC",
    ),
    function("getDayOfWeek", Func::Part, (1, 1), "getDayOfWeek(t): 0 (Sunday) to 6, in UTC"),
    function("getDayOfYear", Func::Part, (1, 1), "getDayOfYear(t): from 0, in UTC"),
    function(
        "getHours",
        Func::Part,
        (1, 1),
        "getHours(t): the hour in UTC; of a duration, all its hours",
    ),
    function(
        "getMinutes",
        Func::Part,
        (1, 1),
        "getMinutes(t): the minute; of a duration, all its minutes",
    ),
    function(
        "getSeconds",
        Func::Part,
        (1, 1),
        "getSeconds(t): the second; of a duration, all its seconds",
    ),
    function(
        "getMilliseconds",
        Func::Part,
        (1, 1),
        "getMilliseconds(t): the millisecond within the second",
    ),
    function(
        "size",
        Func::Size,
        (1, 1),
        "size(x): characters of text, items of a list, keys of a map",
    ),
    function(
        "contains",
        Func::Contains,
        (2, 2),
        "text.contains(part), list.contains(item), map.contains(key)",
    ),
    function("startsWith", Func::StartsWith, (2, 2), "text.startsWith(part)"),
    function("endsWith", Func::EndsWith, (2, 2), "text.endsWith(part)"),
    function(
        "matches",
        Func::Matches,
        (2, 2),
        "text.matches(pattern): whether the regular expression is found in it",
    ),
    function("trim", Func::Trim, (1, 1), "text.trim(): without white space around it"),
    function("lower", Func::Lower, (1, 1), "text.lower()"),
    function("upper", Func::Upper, (1, 1), "text.upper()"),
    function("replace", Func::Replace, (3, 3), "text.replace(old, new): every occurrence"),
    function(
        "substring",
        Func::Substring,
        (2, 3),
        "text.substring(from), text.substring(from, to): by characters, to excluded",
    ),
    function("split", Func::Split, (1, 2), "text.split(separator); without one, at white space"),
    function("join", Func::Join, (1, 2), "list.join(separator): items as text"),
    function(
        "get",
        Func::Get,
        (2, 3),
        "map.get(key, default), list.get(position, default); null when no default is given",
    ),
    function("keys", Func::Keys, (1, 1), "map.keys()"),
    function("values", Func::Values, (1, 1), "map.values()"),
    function(
        "merge",
        Func::Merge,
        (2, 2),
        "map.merge(other): the keys of both, the other's value where both have it",
    ),
    function("sum", Func::Sum, (1, 1), "list.sum(): of numbers; 0 for an empty list"),
    function("min", Func::Min, (1, 16), "list.min(), min(a, b, ..): the smallest number or text"),
    function("max", Func::Max, (1, 16), "list.max(), max(a, b, ..): the largest number or text"),
    function("sort", Func::Sort, (1, 1), "list.sort(): numbers or texts in rising order"),
    function("reverse", Func::Reverse, (1, 1), "list.reverse()"),
    function("distinct", Func::Distinct, (1, 1), "list.distinct(): the first of equal items"),
    function("flatten", Func::Flatten, (1, 1), "list.flatten(): the items of its lists, one level"),
    function("slice", Func::Slice, (2, 3), "list.slice(from), list.slice(from, to): to excluded"),
    function("range", Func::Range, (1, 2), "range(n): 0 to n-1; range(from, to): to excluded"),
    function("abs", Func::Abs, (1, 1), "abs(number)"),
    function(
        "round",
        Func::Round,
        (1, 1),
        "round(number): the nearest integer, halves away from zero",
    ),
    function("floor", Func::Floor, (1, 1), "floor(number): the integer below"),
    function("ceil", Func::Ceil, (1, 1), "ceil(number): the integer above"),
];

/// The function called `name`.
pub(super) fn find(name: &str) -> Option<&'static Function> {
    FUNCTIONS.iter().find(|function| function.name == name)
}

/// A regular expression within bounds: matching takes time linear in the text.
pub(super) fn compile_pattern(pattern: &str) -> Result<Regex, String> {
    RegexBuilder::new(pattern)
        .size_limit(1 << 20)
        .dfa_size_limit(1 << 20)
        .nest_limit(50)
        .build()
        .map_err(|err| format!("the pattern is no regular expression: {err}"))
}

/// Whether `pattern` is found in `text`.
pub(super) fn matches<'a>(
    machine: &mut Machine<'a>,
    text: &Operand<'a>,
    pattern: &Regex,
) -> Outcome<'a> {
    let text = as_text("matches", text)?;
    machine.spend(text.len() / 8)?;
    Ok(Operand::Bool(pattern.is_match(text)))
}

/// Calls `function`; the number of `args` was checked when the expression was compiled.
pub(super) fn call<'a>(
    machine: &mut Machine<'a>,
    function: &'static Function,
    args: Vec<Operand<'a>>,
) -> Outcome<'a> {
    let name = function.name;
    match (function.id, args.as_slice()) {
        (Func::Int, [x]) => convert::to_int(x),
        (Func::Double, [x]) => convert::to_double(x),
        (Func::String, [x]) => machine.text_of(x).map(Operand::text),
        (Func::Bool, [x]) => convert::to_bool(x),
        (Func::Type, [x]) => Ok(Operand::Text(Text::Lent(x.kind()))),
        (Func::ToJson, [x]) => {
            let text = machine.json_of(x, MAX_VALUE_DEPTH)?.to_string();
            machine.built(text.len())?;
            Ok(Operand::text(text))
        }
        (Func::FromJson, [x]) => convert::from_json(machine, as_text(name, x)?),
        (Func::Timestamp, [x]) => convert::to_timestamp(x),
        (Func::Duration, [x]) => convert::to_duration(x),
        (Func::Part, [x]) => convert::time_part(name, x),
        (Func::Size, [x]) => size(machine, x),
        (Func::Contains, [Operand::Text(of), part]) => {
            machine.spend(of.len() / 64)?;
            Ok(Operand::Bool(of.contains(as_text(name, part)?)))
        }
        (Func::Contains, [of, item]) => machine.contains(of, item).map(Operand::Bool),
        (Func::Matches, [text, pattern]) => {
            let pattern = as_text(name, pattern)?;
            machine.built(pattern.len().saturating_mul(1024))?;
            let pattern = compile_pattern(pattern).map_err(EvalProblem::Unsuitable)?;
            matches(machine, text, &pattern)
        }
        (Func::Abs | Func::Round | Func::Floor | Func::Ceil, [x]) => {
            convert::number(function.id, name, x)
        }
        (Func::Min | Func::Max, _) => collections::extreme(machine, function.id, name, &args),
        (Func::Range, _) => collections::range(machine, name, &args),
        (id, [Operand::Text(text), rest @ ..]) => text::on_text(machine, id, name, text, rest),
        (id, [Operand::List(list), rest @ ..]) => {
            collections::on_list(machine, id, name, list, rest)
        }
        (id, [Operand::Map(map), rest @ ..]) => collections::on_map(machine, id, name, map, rest),
        _ => Err(refused(name, &args)),
    }
}

fn refused(name: &str, args: &[Operand<'_>]) -> EvalProblem {
    let args: Vec<String> = args.iter().map(Operand::describe).collect();
    unsuitable(format!("{name}() does not take {}", args.join(", ")))
}

fn as_text<'b>(name: &str, value: &'b Operand<'_>) -> Result<&'b str, EvalProblem> {
    match value {
        Operand::Text(text) => Ok(text),
        other => Err(unsuitable(format!("{name}() needs a string, not {}", other.describe()))),
    }
}

fn as_index(name: &str, value: &Operand<'_>) -> Result<usize, EvalProblem> {
    match value {
        Operand::Int(value) => usize::try_from(*value)
            .map_err(|_| unsuitable(format!("{name}() takes no negative position: {value}"))),
        other => Err(unsuitable(format!("{name}() needs an integer, not {}", other.describe()))),
    }
}

fn size<'a>(machine: &mut Machine<'a>, x: &Operand<'a>) -> Outcome<'a> {
    let size = match x {
        Operand::Text(text) => {
            machine.spend(text.len() / 64)?;
            text.chars().count()
        }
        Operand::List(list) => list.len(),
        Operand::Map(map) => map.len(),
        other => return Err(refused("size", std::slice::from_ref(other))),
    };
    count(size)
}

fn count<'a>(size: usize) -> Outcome<'a> {
    int(i128::try_from(size).unwrap_or(i128::MAX))
}
