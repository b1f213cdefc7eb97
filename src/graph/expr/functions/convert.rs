//! Functions that convert, round, and take instants and durations apart.

use chrono::{DateTime, Datelike, FixedOffset, TimeDelta, Timelike};

use super::{Func, refused};
use crate::graph::expr::eval::{Machine, Outcome};
use crate::graph::expr::operand::{Map, Operand, Text, int, int_of_double, unsuitable};

pub(super) fn to_int<'a>(x: &Operand<'a>) -> Outcome<'a> {
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

pub(super) fn to_double<'a>(x: &Operand<'a>) -> Outcome<'a> {
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

pub(super) fn to_bool<'a>(x: &Operand<'a>) -> Outcome<'a> {
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

pub(super) fn from_json<'a>(machine: &mut Machine<'a>, text: &str) -> Outcome<'a> {
    // A parsed value takes several times the memory of its text.
    machine.built(text.len().saturating_mul(8))?;
    let json = serde_json::from_str(text)
        .map_err(|err| unsuitable(format!("fromJson(): the text is no JSON: {err}")))?;
    Ok(owned(json))
}

/// An operand that owns its JSON.
pub(super) fn owned<'a>(json: serde_json::Value) -> Operand<'a> {
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

pub(super) fn to_timestamp<'a>(x: &Operand<'a>) -> Outcome<'a> {
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

pub(super) fn to_duration<'a>(x: &Operand<'a>) -> Outcome<'a> {
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

pub(super) fn time_part<'a>(name: &str, x: &Operand<'a>) -> Outcome<'a> {
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

pub(super) fn timestamp_part(name: &str, at: &DateTime<FixedOffset>) -> i64 {
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

pub(super) fn number<'a>(id: Func, name: &str, x: &Operand<'a>) -> Outcome<'a> {
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
