//! What an expression computes with: JSON borrowed from the state, and what was built from it.
//!
//! Integers are held in 128 bits and kept within what JSON carries (`i64::MIN` to `u64::MAX`), so signed
//! and unsigned never meet as different types, and an overflow is noticed instead of wrapped.

use std::cmp::Ordering;
use std::ops::Deref;
use std::rc::Rc;

use chrono::{DateTime, FixedOffset, TimeDelta};
use serde_json::{Number, Value};

use super::EvalProblem;

/// A value during an evaluation.
#[derive(Debug, Clone)]
pub(super) enum Operand<'a> {
    Null,
    Bool(bool),
    Int(i128),
    Double(f64),
    Text(Text<'a>),
    List(List<'a>),
    Map(Map<'a>),
    Duration(TimeDelta),
    Timestamp(DateTime<FixedOffset>),
}

/// Text of the state, or made.
#[derive(Debug, Clone)]
pub(super) enum Text<'a> {
    Lent(&'a str),
    Made(Rc<str>),
}

/// A list of the state, or made.
#[derive(Debug, Clone)]
pub(super) enum List<'a> {
    Lent(&'a [Value]),
    Made(Rc<Vec<Operand<'a>>>),
}

/// A map of the state, or made.
#[derive(Debug, Clone)]
pub(super) enum Map<'a> {
    Lent(&'a serde_json::Map<String, Value>),
    Made(Rc<Vec<(Text<'a>, Operand<'a>)>>),
}

impl Deref for Text<'_> {
    type Target = str;
    fn deref(&self) -> &str {
        match self {
            Self::Lent(text) => text,
            Self::Made(text) => text,
        }
    }
}

impl<'a> List<'a> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Lent(items) => items.len(),
            Self::Made(items) => items.len(),
        }
    }

    pub(super) fn get(&self, at: usize) -> Option<Operand<'a>> {
        match self {
            Self::Lent(items) => items.get(at).map(Operand::from),
            Self::Made(items) => items.get(at).cloned(),
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Operand<'a>> + '_ {
        (0..self.len()).filter_map(|at| self.get(at))
    }
}

impl<'a> Map<'a> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Lent(map) => map.len(),
            Self::Made(map) => map.len(),
        }
    }

    pub(super) fn get(&self, key: &str) -> Option<Operand<'a>> {
        match self {
            Self::Lent(map) => map.get(key).map(Operand::from),
            Self::Made(map) => {
                map.iter().find(|(known, _)| &**known == key).map(|(_, value)| value.clone())
            }
        }
    }

    pub(super) fn entries(&self) -> Vec<(Text<'a>, Operand<'a>)> {
        match self {
            Self::Lent(map) => {
                map.iter().map(|(key, value)| (Text::Lent(key), value.into())).collect()
            }
            Self::Made(map) => map.to_vec(),
        }
    }

    pub(super) fn keys(&self) -> Vec<Text<'a>> {
        match self {
            Self::Lent(map) => map.keys().map(|key| Text::Lent(key)).collect(),
            Self::Made(map) => map.iter().map(|(key, _)| key.clone()).collect(),
        }
    }
}

impl<'a> From<&'a Value> for Operand<'a> {
    fn from(json: &'a Value) -> Self {
        match json {
            Value::Null => Self::Null,
            Value::Bool(value) => Self::Bool(*value),
            Value::Number(number) => Self::from(number),
            Value::String(text) => Self::Text(Text::Lent(text)),
            Value::Array(items) => Self::List(List::Lent(items)),
            Value::Object(map) => Self::Map(Map::Lent(map)),
        }
    }
}

impl From<&Number> for Operand<'_> {
    fn from(number: &Number) -> Self {
        match (number.as_i64(), number.as_u64()) {
            (Some(value), _) => Self::Int(value.into()),
            (None, Some(value)) => Self::Int(value.into()),
            (None, None) => Self::Double(number.as_f64().unwrap_or(f64::NAN)),
        }
    }
}

impl<'a> Operand<'a> {
    pub(super) fn text(text: impl Into<Rc<str>>) -> Self {
        Self::Text(Text::Made(text.into()))
    }

    pub(super) fn list(items: Vec<Operand<'a>>) -> Self {
        Self::List(List::Made(Rc::new(items)))
    }

    /// The name of the type, as messages and `type()` give it.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Double(_) => "double",
            Self::Text(_) => "string",
            Self::List(_) => "list",
            Self::Map(_) => "map",
            Self::Duration(_) => "duration",
            Self::Timestamp(_) => "timestamp",
        }
    }

    /// A scalar as text; `None` for a list or a map.
    pub(super) fn scalar_text(&self) -> Option<String> {
        Some(match self {
            Self::Null => "null".into(),
            Self::Bool(value) => value.to_string(),
            Self::Int(value) => value.to_string(),
            Self::Double(value) => Number::from_f64(*value)
                .map_or_else(|| value.to_string(), |number| number.to_string()),
            Self::Text(text) => (**text).to_owned(),
            Self::Duration(value) => duration_text(*value),
            Self::Timestamp(value) => timestamp_text(value),
            Self::List(_) | Self::Map(_) => return None,
        })
    }

    /// The type and, when it is short, the value: for messages.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Null => "null".into(),
            Self::Text(text) => {
                let short: String = text.chars().take(40).collect();
                let dots = if short.len() < text.len() { ".." } else { "" };
                format!("the string {short:?}{dots}")
            }
            Self::List(list) => format!("a list of {} items", list.len()),
            Self::Map(map) => format!("a map of {} keys", map.len()),
            other => {
                format!("the {} {}", other.kind(), other.scalar_text().unwrap_or_default())
            }
        }
    }

    /// The order of two values of one sort; numbers are one sort.
    pub(super) fn order(&self, other: &Self) -> Result<Ordering, EvalProblem> {
        let order = match (self, other) {
            (Self::Int(a), Self::Int(b)) => Some(a.cmp(b)),
            (Self::Text(a), Self::Text(b)) => Some((**a).cmp(b)),
            (Self::Bool(a), Self::Bool(b)) => Some(a.cmp(b)),
            (Self::Duration(a), Self::Duration(b)) => Some(a.cmp(b)),
            (Self::Timestamp(a), Self::Timestamp(b)) => Some(a.cmp(b)),
            (a, b) => match (a.as_double(), b.as_double()) {
                (Some(a), Some(b)) => a.partial_cmp(&b),
                _ => None,
            },
        };
        order.ok_or_else(|| {
            unsuitable(format!("{} and {} have no order", self.describe(), other.describe()))
        })
    }

    /// A number as a double.
    #[expect(clippy::cast_precision_loss, reason = "what converting to double means")]
    pub(super) fn as_double(&self) -> Option<f64> {
        match self {
            Self::Int(value) => Some(*value as f64),
            Self::Double(value) => Some(*value),
            _ => None,
        }
    }
}

/// An integer that JSON carries.
pub(super) fn int<'a>(value: i128) -> Result<Operand<'a>, EvalProblem> {
    if value < i64::MIN.into() || value > u64::MAX.into() {
        return Err(unsuitable(format!("{value} is out of the range of integers")));
    }
    Ok(Operand::Int(value))
}

/// A double as an integer, cut towards zero.
#[expect(clippy::cast_possible_truncation, reason = "checked to be within i64 above the cast")]
pub(super) fn int_of_double<'a>(value: f64) -> Result<Operand<'a>, EvalProblem> {
    const BOUND: f64 = 9_223_372_036_854_775_808.0;
    if !(-BOUND..BOUND).contains(&value) {
        return Err(unsuitable(format!("{value} is out of the range of integers")));
    }
    Ok(Operand::Int(value as i128))
}

/// JSON as messages describe it.
pub(super) fn describe(json: &Value) -> String {
    Operand::from(json).describe()
}

pub(super) fn unsuitable(message: impl Into<String>) -> EvalProblem {
    EvalProblem::Unsuitable(message.into())
}

/// RFC 3339, with `Z` for UTC.
pub(super) fn timestamp_text(value: &DateTime<FixedOffset>) -> String {
    value.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true)
}

/// Seconds with a unit, as CEL writes durations: `90s`, `0.5s`.
pub(super) fn duration_text(value: TimeDelta) -> String {
    let sign = if value < TimeDelta::zero() { "-" } else { "" };
    let value = value.abs();
    let nanos = value.subsec_nanos();
    if nanos == 0 {
        return format!("{sign}{}s", value.num_seconds());
    }
    let fraction = format!("{nanos:09}");
    format!("{sign}{}.{}s", value.num_seconds(), fraction.trim_end_matches('0'))
}
