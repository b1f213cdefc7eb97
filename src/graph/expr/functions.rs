//! The functions of expressions. Each may be called as `f(x, y)` or as `x.f(y)`.
//!
//! **Invariant:** every function here is pure, and counts what it looks at and what it builds.

use std::collections::HashSet;

use chrono::{DateTime, Datelike, FixedOffset, TimeDelta, Timelike};
use regex::{Regex, RegexBuilder};

use super::eval::{Machine, Outcome};
use super::operand::{List, Map, Operand, Text, int, int_of_double, unsuitable};
use super::{EvalProblem, MAX_BUILT_BYTES, MAX_VALUE_DEPTH};

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
        (Func::Int, [x]) => to_int(x),
        (Func::Double, [x]) => to_double(x),
        (Func::String, [x]) => machine.text_of(x).map(Operand::text),
        (Func::Bool, [x]) => to_bool(x),
        (Func::Type, [x]) => Ok(Operand::Text(Text::Lent(x.kind()))),
        (Func::ToJson, [x]) => {
            let text = machine.json_of(x, MAX_VALUE_DEPTH)?.to_string();
            machine.built(text.len())?;
            Ok(Operand::text(text))
        }
        (Func::FromJson, [x]) => from_json(machine, as_text(name, x)?),
        (Func::Timestamp, [x]) => to_timestamp(x),
        (Func::Duration, [x]) => to_duration(x),
        (Func::Part, [x]) => time_part(name, x),
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
        (Func::Abs | Func::Round | Func::Floor | Func::Ceil, [x]) => number(function.id, name, x),
        (Func::Min | Func::Max, _) => extreme(machine, function.id, name, &args),
        (Func::Range, _) => range(machine, name, &args),
        (id, [Operand::Text(text), rest @ ..]) => on_text(machine, id, name, text, rest),
        (id, [Operand::List(list), rest @ ..]) => on_list(machine, id, name, list, rest),
        (id, [Operand::Map(map), rest @ ..]) => on_map(machine, id, name, map, rest),
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

fn to_int<'a>(x: &Operand<'a>) -> Outcome<'a> {
    match x {
        Operand::Int(value) => Ok(Operand::Int(*value)),
        Operand::Double(value) => int_of_double(*value),
        Operand::Timestamp(at) => Ok(Operand::Int(at.timestamp().into())),
        Operand::Text(text) => match text.trim().parse() {
            Ok(value) => int(value),
            Err(_) => Err(unsuitable(format!("{} is no integer", x.describe()))),
        },
        other => Err(refused("int", std::slice::from_ref(other))),
    }
}

fn to_double<'a>(x: &Operand<'a>) -> Outcome<'a> {
    match x {
        Operand::Text(text) => match text.trim().parse::<f64>() {
            Ok(value) if value.is_finite() => Ok(Operand::Double(value)),
            _ => Err(unsuitable(format!("{} is no number", x.describe()))),
        },
        other => other
            .as_double()
            .map(Operand::Double)
            .ok_or_else(|| refused("double", std::slice::from_ref(other))),
    }
}

fn to_bool<'a>(x: &Operand<'a>) -> Outcome<'a> {
    match x {
        Operand::Bool(value) => Ok(Operand::Bool(*value)),
        Operand::Text(text) => match text.trim() {
            "true" => Ok(Operand::Bool(true)),
            "false" => Ok(Operand::Bool(false)),
            _ => Err(unsuitable(format!("{} is neither true nor false", x.describe()))),
        },
        other => Err(refused("bool", std::slice::from_ref(other))),
    }
}

fn from_json<'a>(machine: &mut Machine<'a>, text: &str) -> Outcome<'a> {
    // A parsed value takes several times the memory of its text.
    machine.built(text.len().saturating_mul(8))?;
    let json = serde_json::from_str(text)
        .map_err(|err| unsuitable(format!("fromJson(): the text is no JSON: {err}")))?;
    Ok(owned(json))
}

/// An operand that owns its JSON.
fn owned<'a>(json: serde_json::Value) -> Operand<'a> {
    use serde_json::Value;
    match json {
        Value::String(text) => Operand::text(text),
        Value::Array(items) => Operand::list(items.into_iter().map(owned).collect()),
        Value::Object(map) => {
            let map = map.into_iter().map(|(key, value)| (Text::Made(key.into()), owned(value)));
            Operand::Map(Map::Made(std::rc::Rc::new(map.collect())))
        }
        Value::Null => Operand::Null,
        Value::Bool(value) => Operand::Bool(value),
        Value::Number(number) => Operand::from(&number),
    }
}

fn to_timestamp<'a>(x: &Operand<'a>) -> Outcome<'a> {
    let wrong = || unsuitable(format!("{} is no RFC 3339 instant", x.describe()));
    match x {
        Operand::Timestamp(at) => Ok(Operand::Timestamp(*at)),
        Operand::Text(text) => {
            DateTime::parse_from_rfc3339(text.trim()).map(Operand::Timestamp).map_err(|_| wrong())
        }
        Operand::Int(seconds) => i64::try_from(*seconds)
            .ok()
            .and_then(|seconds| DateTime::from_timestamp(seconds, 0))
            .map(|at| Operand::Timestamp(at.fixed_offset()))
            .ok_or_else(wrong),
        other => Err(refused("timestamp", std::slice::from_ref(other))),
    }
}

fn to_duration<'a>(x: &Operand<'a>) -> Outcome<'a> {
    let wrong =
        || unsuitable(format!("{} is no duration such as \"90s\" or \"1h30m\"", x.describe()));
    match x {
        Operand::Duration(value) => Ok(Operand::Duration(*value)),
        Operand::Int(seconds) => i64::try_from(*seconds)
            .ok()
            .and_then(TimeDelta::try_seconds)
            .map(Operand::Duration)
            .ok_or_else(wrong),
        Operand::Text(text) => {
            let (sign, text) = match text.strip_prefix('-') {
                Some(rest) => (-1, rest),
                None => (1, &**text),
            };
            let value = crate::graph::definition::parse_duration(text).map_err(|_| wrong())?;
            TimeDelta::from_std(value)
                .map(|value| Operand::Duration(value * sign))
                .map_err(|_| wrong())
        }
        other => Err(refused("duration", std::slice::from_ref(other))),
    }
}

fn time_part<'a>(name: &str, x: &Operand<'a>) -> Outcome<'a> {
    let value = match x {
        Operand::Timestamp(at) => {
            timestamp_part(name, &at.with_timezone(&chrono::Utc).fixed_offset())
        }
        Operand::Duration(value) => match name {
            "getHours" => value.num_hours(),
            "getMinutes" => value.num_minutes(),
            "getSeconds" => value.num_seconds(),
            "getMilliseconds" => i64::from(value.subsec_millis()),
            _ => return Err(refused(name, std::slice::from_ref(x))),
        },
        other => return Err(refused(name, std::slice::from_ref(other))),
    };
    Ok(Operand::Int(value.into()))
}

fn timestamp_part(name: &str, at: &DateTime<FixedOffset>) -> i64 {
    match name {
        "getFullYear" => at.year().into(),
        "getMonth" => at.month0().into(),
        "getDate" => at.day().into(),
        "getDayOfMonth" => at.day0().into(),
        "getDayOfWeek" => at.weekday().num_days_from_sunday().into(),
        "getDayOfYear" => at.ordinal0().into(),
        "getHours" => at.hour().into(),
        "getMinutes" => at.minute().into(),
        "getSeconds" => at.second().into(),
        _ => at.timestamp_subsec_millis().into(),
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

fn number<'a>(id: Func, name: &str, x: &Operand<'a>) -> Outcome<'a> {
    match (id, x) {
        (Func::Abs, Operand::Int(value)) => int(value.abs()),
        (Func::Abs, Operand::Double(value)) => Ok(Operand::Double(value.abs())),
        (_, Operand::Int(value)) => Ok(Operand::Int(*value)),
        (Func::Round, Operand::Double(value)) => int_of_double(value.round()),
        (Func::Floor, Operand::Double(value)) => int_of_double(value.floor()),
        (Func::Ceil, Operand::Double(value)) => int_of_double(value.ceil()),
        (_, other) => Err(refused(name, std::slice::from_ref(other))),
    }
}

fn extreme<'a>(
    machine: &mut Machine<'a>,
    id: Func,
    name: &str,
    args: &[Operand<'a>],
) -> Outcome<'a> {
    let items: Vec<Operand<'a>> = match args {
        [Operand::List(list)] => list.iter().collect(),
        args => args.to_vec(),
    };
    machine.built_slots(items.len())?;
    let wanted =
        if id == Func::Min { std::cmp::Ordering::Less } else { std::cmp::Ordering::Greater };
    let mut items = items.into_iter();
    let Some(mut best) = items.next() else {
        return Err(unsuitable(format!("{name}() of an empty list")));
    };
    for item in items {
        machine.spend(1)?;
        if item.order(&best)? == wanted {
            best = item;
        }
    }
    Ok(best)
}

fn range<'a>(machine: &mut Machine<'a>, name: &str, args: &[Operand<'a>]) -> Outcome<'a> {
    let (from, to) = match args {
        [Operand::Int(to)] => (0, *to),
        [Operand::Int(from), Operand::Int(to)] => (*from, *to),
        args => return Err(refused(name, args)),
    };
    let len = usize::try_from((to - from).max(0)).unwrap_or(MAX_BUILT_BYTES);
    machine.built_slots(len)?;
    Ok(Operand::list((from..to).map(Operand::Int).collect()))
}

fn on_text<'a>(
    machine: &mut Machine<'a>,
    id: Func,
    name: &str,
    text: &Text<'a>,
    rest: &[Operand<'a>],
) -> Outcome<'a> {
    machine.built(text.len())?;
    let made = match (id, rest) {
        (Func::StartsWith, [part]) => {
            return Ok(Operand::Bool(text.starts_with(as_text(name, part)?)));
        }
        (Func::EndsWith, [part]) => {
            return Ok(Operand::Bool(text.ends_with(as_text(name, part)?)));
        }
        (Func::Split, rest) => return split(machine, name, text, rest),
        (Func::Trim, []) => text.trim().to_owned(),
        (Func::Lower, []) => text.to_lowercase(),
        (Func::Upper, []) => text.to_uppercase(),
        (Func::Replace, [old, new]) => {
            let (old, new) = (as_text(name, old)?, as_text(name, new)?);
            let found = text.matches(old).count();
            machine.built(found.saturating_mul(new.len()))?;
            text.replace(old, new)
        }
        (Func::Substring, [from, rest @ ..]) => {
            let from = as_index(name, from)?;
            let to = rest.first().map_or(Ok(usize::MAX), |to| as_index(name, to))?;
            text.chars().skip(from).take(to.saturating_sub(from)).collect()
        }
        (_, rest) => {
            let mut args = vec![Operand::Text(text.clone())];
            args.extend_from_slice(rest);
            return Err(refused(name, &args));
        }
    };
    Ok(Operand::text(made))
}

fn split<'a>(
    machine: &mut Machine<'a>,
    name: &str,
    text: &Text<'a>,
    rest: &[Operand<'a>],
) -> Outcome<'a> {
    let parts: Vec<&str> = match rest {
        [] => text.split_whitespace().collect(),
        [separator, ..] => match as_text(name, separator)? {
            "" => return Err(unsuitable("split() needs a separator that is not empty")),
            separator => text.split(separator).collect(),
        },
    };
    machine.built_slots(parts.len())?;
    Ok(Operand::list(parts.into_iter().map(Operand::text).collect()))
}

fn on_list<'a>(
    machine: &mut Machine<'a>,
    id: Func,
    name: &str,
    list: &List<'a>,
    rest: &[Operand<'a>],
) -> Outcome<'a> {
    if id == Func::Get {
        let found = as_index(name, &rest[0]).ok().and_then(|at| list.get(at));
        return Ok(found.or_else(|| rest.get(1).cloned()).unwrap_or(Operand::Null));
    }
    machine.built_slots(list.len())?;
    let mut items: Vec<Operand<'a>> = list.iter().collect();
    match (id, rest) {
        (Func::Join, rest) => return join(machine, name, &items, rest),
        (Func::Sum, []) => {
            let zero = Operand::Int(0);
            return items.iter().try_fold(zero, |sum, item| add(&sum, item));
        }
        (Func::Sort, []) => return sort(items),
        (Func::Reverse, []) => items.reverse(),
        (Func::Distinct, []) => return distinct(machine, items),
        (Func::Flatten, []) => {
            let mut flat = Vec::new();
            for item in items {
                match item {
                    Operand::List(inner) => {
                        machine.built_slots(inner.len())?;
                        flat.extend(inner.iter());
                    }
                    other => flat.push(other),
                }
            }
            items = flat;
        }
        (Func::Slice, [from, rest @ ..]) => {
            let to = rest.first().map_or(Ok(usize::MAX), |to| as_index(name, to))?;
            items.truncate(to);
            let from = as_index(name, from)?.min(items.len());
            items.drain(..from);
        }
        _ => return Err(refused(name, &[Operand::List(list.clone())])),
    }
    Ok(Operand::list(items))
}

fn add<'a>(a: &Operand<'a>, b: &Operand<'a>) -> Outcome<'a> {
    match (a, b, a.as_double(), b.as_double()) {
        (Operand::Int(a), Operand::Int(b), ..) => int(a + b),
        (_, _, Some(a), Some(b)) => Ok(Operand::Double(a + b)),
        _ => Err(unsuitable(format!("sum() adds numbers, not {}", b.describe()))),
    }
}

fn join<'a>(
    machine: &mut Machine<'a>,
    name: &str,
    items: &[Operand<'a>],
    rest: &[Operand<'a>],
) -> Outcome<'a> {
    let separator = rest.first().map_or(Ok(""), |separator| as_text(name, separator))?;
    let mut text = String::new();
    for (at, item) in items.iter().enumerate() {
        if at > 0 {
            machine.built(separator.len())?;
            text.push_str(separator);
        }
        text.push_str(&machine.text_of(item)?);
    }
    Ok(Operand::text(text))
}

/// Sorts what has one order: a mixture of integers and doubles is compared as doubles throughout,
/// because comparing some pairs exactly and some not would be no order at all.
fn sort(mut items: Vec<Operand<'_>>) -> Outcome<'_> {
    let Some(first) = items.first() else { return Ok(Operand::list(items)) };
    for item in &items {
        first.order(item)?;
        item.order(item)?;
    }
    if items.iter().any(|item| matches!(item, Operand::Double(_))) {
        let key = |item: &Operand<'_>| item.as_double().unwrap_or(f64::NAN);
        items.sort_by(|a, b| key(a).total_cmp(&key(b)));
    } else {
        items.sort_by(|a, b| a.order(b).unwrap_or(std::cmp::Ordering::Equal));
    }
    Ok(Operand::list(items))
}

fn distinct<'a>(machine: &mut Machine<'a>, items: Vec<Operand<'a>>) -> Outcome<'a> {
    let mut seen = HashSet::new();
    let mut kept = Vec::new();
    for item in items {
        // The JSON text tells values apart, with numbers by value: 1.0 is written as 1 is compared.
        let key = match &item {
            Operand::Double(value) if value.fract() == 0.0 => int_of_double(*value)
                .ok()
                .and_then(|value| value.scalar_text())
                .unwrap_or_else(|| value.to_string()),
            other => {
                let json = machine.json_of(other, MAX_VALUE_DEPTH)?.to_string();
                machine.built(json.len())?;
                json
            }
        };
        if seen.insert(key) {
            kept.push(item);
        }
    }
    Ok(Operand::list(kept))
}

fn on_map<'a>(
    machine: &mut Machine<'a>,
    id: Func,
    name: &str,
    map: &Map<'a>,
    rest: &[Operand<'a>],
) -> Outcome<'a> {
    if id == Func::Get {
        let found = map.get(as_text(name, &rest[0])?);
        return Ok(found.or_else(|| rest.get(1).cloned()).unwrap_or(Operand::Null));
    }
    machine.built_slots(map.len())?;
    match (id, rest) {
        (Func::Keys, []) => Ok(Operand::list(map.keys().into_iter().map(Operand::Text).collect())),
        (Func::Values, []) => {
            Ok(Operand::list(map.entries().into_iter().map(|(_, value)| value).collect()))
        }
        (Func::Merge, [Operand::Map(other)]) => {
            machine.built_slots(other.len())?;
            let mut merged: Vec<_> =
                map.entries().into_iter().filter(|(key, _)| other.get(key).is_none()).collect();
            machine.spend(map.len().saturating_mul(match other {
                Map::Lent(_) => 1,
                Map::Made(made) => made.len(),
            }))?;
            merged.extend(other.entries());
            Ok(Operand::Map(Map::Made(std::rc::Rc::new(merged))))
        }
        _ => Err(refused(name, &[Operand::Map(map.clone())])),
    }
}
