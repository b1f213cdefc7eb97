//! Where two JSON values differ.

use std::fmt;

use serde::Serialize;
use serde_json::Value;

/// The most differences that are told of one value.
const MAX_DIFFERENCES: usize = 20;
/// The longest JSON that is shown of one side, in bytes.
const MAX_SHOWN: usize = 300;

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// What differs, and for JSON the pointer into it: `output/total`.
    pub at: String,
    /// What should be there; `None` when nothing should.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<Value>,
    /// What is there; `None` when nothing is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub found: Option<Value>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at, expected, found } = self;
        let show = |value: &Option<Value>| value.as_ref().map_or("nothing".to_owned(), shown);
        if expected.is_none() && found.is_none() {
            return f.write_str(at);
        }
        write!(f, "{at}: expected {}, found {}", show(expected), show(found))
    }
}

/// A value's JSON, cut when it is long.
pub(super) fn shown(value: &Value) -> String {
    let text = value.to_string();
    if text.len() <= MAX_SHOWN {
        return text;
    }
    let end = text.floor_char_boundary(MAX_SHOWN);
    format!("{}… ({} bytes)", &text[..end], text.len())
}

/// Compares; with `partial`, maps may hold keys that are not expected.
pub(super) fn differences(
    at: &str,
    expected: &Value,
    found: &Value,
    partial: bool,
) -> Vec<Difference> {
    let mut all = Vec::new();
    compare(at, expected, found, partial, &mut all);
    all
}

/// Whether `found` holds all of `expected`.
pub(super) fn holds(expected: &Value, found: &Value) -> bool {
    differences("", expected, found, true).is_empty()
}

fn compare(at: &str, expected: &Value, found: &Value, partial: bool, all: &mut Vec<Difference>) {
    if all.len() >= MAX_DIFFERENCES {
        return;
    }
    let mut differs = |at: String, expected: Option<&Value>, found: Option<&Value>| {
        all.push(Difference { at, expected: expected.cloned(), found: found.cloned() });
    };
    match (expected, found) {
        (Value::Object(expected), Value::Object(found)) => {
            for (key, expected) in expected {
                let at = format!("{at}/{}", key.replace('~', "~0").replace('/', "~1"));
                match found.get(key) {
                    Some(found) => compare(&at, expected, found, partial, all),
                    None => {
                        all.push(Difference { at, expected: Some(expected.clone()), found: None })
                    }
                }
            }
            if !partial {
                for (key, found) in found.iter().filter(|(key, _)| !expected.contains_key(*key)) {
                    let at = format!("{at}/{key}");
                    all.push(Difference { at, expected: None, found: Some(found.clone()) });
                }
            }
        }
        (Value::Array(expected), Value::Array(found)) => {
            for position in 0..expected.len().max(found.len()) {
                let at = format!("{at}/{position}");
                match (expected.get(position), found.get(position)) {
                    (Some(expected), Some(found)) => compare(&at, expected, found, partial, all),
                    (expected, found) => all.push(Difference {
                        at,
                        expected: expected.cloned(),
                        found: found.cloned(),
                    }),
                }
            }
        }
        (Value::Number(one), Value::Number(other)) => {
            // 1 and 1.0 are the same number to whoever writes a case.
            if one != other && one.as_f64() != other.as_f64() {
                differs(at.to_owned(), Some(expected), Some(found));
            }
        }
        (one, other) if one == other => {}
        _ => differs(at.to_owned(), Some(expected), Some(found)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(expected: Value, found: Value, partial: bool, lines: &[&str]) {
        let told: Vec<String> = differences("output", &expected, &found, partial)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(told, lines);
    }

    #[test]
    fn differences_name_the_place_and_both_sides() {
        check(json!({"a": 1, "b": [1, 2]}), json!({"b": [1.0, 2], "a": 1}), false, &[]);
        check(
            json!({"a": {"b/c": [1, 2]}}),
            json!({"a": {"b/c": [1, 3, 4]}}),
            false,
            &["output/a/b~1c/1: expected 2, found 3", "output/a/b~1c/2: expected nothing, found 4"],
        );
        check(json!({"a": 1}), json!({"b": 2}), true, &["output/a: expected 1, found nothing"]);
        check(
            json!({"a": 1}),
            json!({"a": "1", "b": 2}),
            false,
            &["output/a: expected 1, found \"1\"", "output/b: expected nothing, found 2"],
        );
        check(json!({"a": null}), json!({}), false, &["output/a: expected null, found nothing"]);
    }
}
