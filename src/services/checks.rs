//! Checks that several operations share: sizes, and text that PostgreSQL's own types refuse.

use serde_json::{Map, Value};

use super::error::ServiceError;

/// Refuses an object whose JSON text is over `limit` bytes, or that cannot be stored as `jsonb`.
/// `name` is the field that it came in.
pub(super) fn object(
    name: &str,
    object: &Map<String, Value>,
    limit: usize,
) -> Result<(), ServiceError> {
    let mut size = ByteCount::default();
    serde_json::to_writer(&mut size, object).map_err(ServiceError::internal)?;
    if size.0 > limit {
        return Err(over(name, size.0, limit));
    }
    for (key, value) in object {
        let path = format!("/{name}/{}", pointer(key));
        if key.contains('\0') {
            return Err(nul(path));
        }
        storable(path, value)?;
    }
    Ok(())
}

/// The error of a field that is larger than it may be.
pub(super) fn over(name: &str, size: usize, limit: usize) -> ServiceError {
    ServiceError::TooLarge(format!(
        "`{name}` is {size} bytes of JSON; at most {limit} are accepted"
    ))
}

/// Refuses a text that is empty, over `limit` characters, or holds control characters.
pub(super) fn text(name: &str, text: &str, limit: usize) -> Result<(), ServiceError> {
    let length = text.chars().count();
    if length == 0 || length > limit || text.chars().any(char::is_control) {
        return Err(ServiceError::invalid_at(
            format!("/{name}"),
            format!("`{name}` must be 1 to {limit} characters, without control characters"),
        ));
    }
    Ok(())
}

fn storable(path: String, value: &Value) -> Result<(), ServiceError> {
    match value {
        Value::String(text) if text.contains('\0') => Err(nul(path)),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .try_for_each(|(index, item)| storable(format!("{path}/{index}"), item)),
        Value::Object(entries) => entries.iter().try_for_each(|(key, item)| {
            let path = format!("{path}/{}", pointer(key));
            if key.contains('\0') { Err(nul(path)) } else { storable(path, item) }
        }),
        _ => Ok(()),
    }
}

fn nul(path: String) -> ServiceError {
    ServiceError::invalid_at(path, "the character U+0000 cannot be stored here")
}

fn pointer(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1").replace('\0', "\u{fffd}")
}

#[derive(Default)]
struct ByteCount(usize);

impl std::io::Write for ByteCount {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(input: &Value, limit: usize, expected: Result<(), &str>) {
        let found = object("metadata", input.as_object().unwrap(), limit);
        match (found, expected) {
            (Ok(()), Ok(())) => {}
            (Err(err), Err(part)) => {
                let text = format!("{err:?}");
                assert!(text.contains(part), "{text} does not contain {part}");
            }
            (found, expected) => panic!("{found:?} instead of {expected:?}"),
        }
    }

    #[test]
    fn an_object_within_its_limit_passes() {
        check(&json!({"a": [1, {"b": "c"}]}), 100, Ok(()));
        check(&json!({"a": 1}), 7, Ok(()));
    }

    #[test]
    fn an_object_over_its_limit_is_too_large() {
        check(&json!({"a": 1}), 6, Err("TooLarge"));
    }

    #[test]
    fn a_nul_is_found_wherever_it_is_and_named() {
        check(&json!({"a": "x\u{0}"}), 100, Err("/metadata/a"));
        check(&json!({"a": [1, {"b/c": "\u{0}"}]}), 100, Err("/metadata/a/1/b~1c"));
        check(&json!({"a": {"k\u{0}": 1}}), 100, Err("/metadata/a/k"));
    }
}
