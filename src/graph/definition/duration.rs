//! Durations as people write them: `90s`, `1h30m`, `0.5s`.

use std::borrow::Cow;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The longest duration of a graph file: ten years.
pub const MAX_DURATION: Duration = Duration::from_secs(3660 * 86_400);

const UNITS: [(&str, u128); 8] = [
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
    ("w", 604_800_000_000_000),
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
];

/// A duration in a graph file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Period(pub Duration);

/// Reads numbers with units, in any number: `90s`, `1h30m`, `1h 30m`, `0.5s`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong =
        || format!("{text:?} is no duration; write a number and a unit, such as 90s, 5m or 1h30m");
    let mut rest = text.trim();
    if rest.is_empty() || rest.len() > 64 {
        return Err(wrong());
    }
    let mut nanos: u128 = 0;
    while !rest.is_empty() {
        let digits =
            rest.find(|char: char| !char.is_ascii_digit() && char != '.').ok_or_else(wrong)?;
        let (number, tail) = rest.split_at(digits);
        let (unit, scale) =
            UNITS.iter().find(|(unit, _)| tail.starts_with(unit)).ok_or_else(wrong)?;
        let part = scaled(number, *scale).ok_or_else(wrong)?;
        nanos = nanos.checked_add(part).ok_or_else(wrong)?;
        rest = tail[unit.len()..].trim_start();
    }
    let value = Duration::from_nanos_u128(nanos.min(MAX_DURATION.as_nanos() + 1));
    if value > MAX_DURATION {
        return Err(format!("{text:?} is longer than ten years"));
    }
    Ok(value)
}

/// `number` times `scale`, exactly; `None` when it is no number, or finer than a nanosecond.
fn scaled(number: &str, scale: u128) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.len() > 9 || (number.contains('.') && fraction.is_empty()) {
        return None;
    }
    let mut nanos = whole.parse::<u64>().ok().map(u128::from)?.checked_mul(scale)?;
    if !fraction.is_empty() {
        let tenth = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
        let part = u128::from(fraction.parse::<u64>().ok()?).checked_mul(scale)?;
        if !part.is_multiple_of(tenth) {
            return None;
        }
        nanos = nanos.checked_add(part / tenth)?;
    }
    Some(nanos)
}

impl std::fmt::Display for Period {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let nanos = self.0.as_nanos();
        if nanos == 0 {
            return f.write_str("0s");
        }
        let by_size = ["d", "h", "m", "s", "ms", "us", "ns"];
        let fitting = by_size.iter().find_map(|unit| {
            let (_, scale) = UNITS.iter().find(|(known, _)| known == unit)?;
            nanos.is_multiple_of(*scale).then(|| (nanos / scale, unit))
        });
        match fitting {
            Some((count, unit)) => write!(f, "{count}{unit}"),
            None => write!(f, "{nanos}ns"),
        }
    }
}

impl Serialize for Period {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Period {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl de::Visitor<'_> for Text {
            type Value = Period;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a duration with a unit, such as 90s, 5m or 1h30m")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Period, E> {
                parse_duration(text).map(Period).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Text)
    }
}

impl JsonSchema for Period {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": r"^\s*([0-9]+(\.[0-9]+)?(ms|us|ns|w|d|h|m|s)\s*)+$",
            "examples": ["90s", "5m", "1h30m"],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_exactly_and_written_in_the_largest_unit_that_fits() {
        let check = |text: &str, expected: &str| {
            let read = parse_duration(text).map(|value| Period(value).to_string());
            assert_eq!(read.as_deref(), Ok(expected), "{text}");
        };
        check("90s", "90s");
        check("120s", "2m");
        check("1h30m", "90m");
        check("1h 30m", "90m");
        check("0.5s", "500ms");
        check("1w", "7d");
        check("0s", "0s");
        check("3660d", "3660d");
    }

    #[test]
    fn what_is_no_duration_is_refused() {
        for text in [
            "",
            "90",
            "s",
            "1x",
            "-1s",
            "1.s",
            ".5s",
            "1e3s",
            "3661d",
            "99999999999999999999d",
            "0.1ns",
        ] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
