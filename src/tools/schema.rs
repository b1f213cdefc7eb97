//! The schemas of tools, which come from servers that may be hostile, compiled and applied.
//!
//! A small schema can still ask for very much work (alternatives of alternatives of ..), so the work is done
//! on a thread of its own, and given up on after [`PATIENCE`].
//!
//! **Invariant:** a schema refers to nothing outside itself, its patterns match in linear time, and
//! following its references always moves down into the value.

use std::sync::Arc;
use std::time::Duration;

use jsonschema::{PatternOptions, Validator};
use serde_json::Value;

use super::error::quoted;

/// How deep a schema or a value may be nested.
const MAX_DEPTH: usize = 64;
/// How long looking at one value may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// The keywords that refer to other schemas.
const REFERENCES: [&str; 3] = ["$ref", "$dynamicRef", "$recursiveRef"];

/// What a value has to be.
#[derive(Debug)]
pub(super) struct Schema(Validator);

/// A value that is not what it has to be.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mismatch {
    /// JSON Pointer to the value to blame.
    pub(super) path: String,
    /// What is wrong with it.
    pub(super) problem: String,
}

impl Schema {
    /// Compiles a schema: draft 2020-12 unless it names another.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub(super) fn compile(schema: &Value) -> Result<Self, String> {
        if deeper(schema, MAX_DEPTH) {
            return Err(format!("it is nested more than {MAX_DEPTH} deep"));
        }
        let mut references = Vec::new();
        collect(schema, true, &mut references)?;
        if circular(schema, &references) {
            return Err("a reference in it leads back to itself".to_owned());
        }
        jsonschema::options()
            .with_pattern_options(PatternOptions::regex().size_limit(1 << 20))
            .build(schema)
            .map(Self)
            .map_err(|err| quoted(&err.to_string()))
    }

    /// Looks whether `value` is what it has to be.
    pub(super) fn check(&self, value: &Value) -> Result<(), Mismatch> {
        if deeper(value, MAX_DEPTH) {
            let problem = format!("it is nested more than {MAX_DEPTH} deep");
            return Err(Mismatch { path: String::new(), problem });
        }
        let Some(err) = self.0.iter_errors(value).next() else { return Ok(()) };
        // The value itself is not repeated: it may be a secret.
        let problem = quoted(&err.masked().to_string());
        Err(Mismatch { path: err.instance_path().to_string(), problem })
    }
}

/// Compiles `schema`, when that was not done before, and looks whether `value` is what it asks for.
/// `kept` is held as long as the work really takes, which may be longer than anybody waits for it.
///
/// # Errors
/// The mismatch, or a schema that cannot be used: then without a path.
pub(super) async fn check_in_time<K: Send + 'static>(
    schema: Arc<Lazy>,
    value: Value,
    kept: K,
) -> Result<(Value, K), Mismatch> {
    let work = tokio::task::spawn_blocking(move || {
        let result = match schema.get() {
            Ok(schema) => schema.check(&value),
            Err(problem) => Err(Mismatch {
                path: String::new(),
                problem: format!("the schema itself cannot be used: {problem}"),
            }),
        };
        result.map(|()| (value, kept))
    });
    let failed = |problem: String| Mismatch { path: String::new(), problem };
    match tokio::time::timeout(PATIENCE, work).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(failed("the value could not be checked".to_owned())),
        Err(_) => Err(failed(format!("checking the value takes longer than {PATIENCE:?}"))),
    }
}

/// A schema that is compiled when it is first needed.
#[derive(Debug)]
pub(super) struct Lazy {
    source: Value,
    compiled: std::sync::OnceLock<Result<Schema, String>>,
}

impl Lazy {
    /// The schema `source`, not looked at yet.
    pub(super) fn new(source: Value) -> Self {
        Self { source, compiled: std::sync::OnceLock::new() }
    }

    fn get(&self) -> Result<&Schema, &String> {
        self.compiled.get_or_init(|| Schema::compile(&self.source)).as_ref()
    }
}

/// Whether `value` is nested more than so deep.
fn deeper(value: &Value, than: usize) -> bool {
    let inner = |value: &Value| deeper(value, than - 1);
    match value {
        Value::Array(items) => than == 0 || items.iter().any(inner),
        Value::Object(entries) => than == 0 || entries.values().any(inner),
        _ => false,
    }
}

/// Keywords whose schemas apply to the very value that the schema around them applies to.
const IN_PLACE: [&str; 9] =
    ["allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "dependencies"];

/// Whether following references can come back to the same schema without having moved into the value.
fn circular(root: &Value, references: &[&str]) -> bool {
    references.iter().any(|start| {
        let (mut open, mut seen) = (vec![*start], Vec::<&str>::new());
        while let Some(at) = open.pop() {
            if seen.contains(&at) {
                continue;
            }
            seen.push(at);
            let Some(target) = at.strip_prefix('#').and_then(|path| root.pointer(path)) else {
                continue;
            };
            let mut next = Vec::new();
            in_place(target, &mut next);
            if next.contains(start) {
                return true;
            }
            open.extend(next);
        }
        false
    })
}

/// Every reference in `schema`, which must be of the one plain form that is followed here.
fn collect<'a>(schema: &'a Value, root: bool, found: &mut Vec<&'a str>) -> Result<(), String> {
    match schema {
        Value::Object(entries) => {
            for reference in REFERENCES.iter().filter_map(|key| entries.get(*key)?.as_str()) {
                let plain = reference == "#" || reference.starts_with("#/");
                if !plain || reference.contains('%') {
                    let reference = quoted(reference);
                    return Err(format!("it refers to {reference}, which is not `#/..` within it"));
                }
                found.push(reference);
            }
            // An `$anchor` does no harm: nothing that refers to one is followed.
            let renamed = ["$id", "$dynamicAnchor"]
                .into_iter()
                .find(|key| entries.get(*key).is_some_and(Value::is_string));
            if let Some(key) = renamed.filter(|key| !root || *key != "$id") {
                return Err(format!("it uses {key} below its root"));
            }
            entries.values().try_for_each(|value| collect(value, false, found))
        }
        Value::Array(items) => items.iter().try_for_each(|item| collect(item, false, found)),
        _ => Ok(()),
    }
}

/// The references that `schema` follows for the value itself.
fn in_place<'a>(schema: &'a Value, found: &mut Vec<&'a str>) {
    let Value::Object(entries) = schema else { return };
    found.extend(REFERENCES.iter().filter_map(|key| entries.get(*key)?.as_str()));
    for value in IN_PLACE.iter().filter_map(|key| entries.get(*key)) {
        match value {
            Value::Array(items) => items.iter().for_each(|item| in_place(item, found)),
            Value::Object(inner) => {
                in_place(value, found);
                inner.values().for_each(|value| in_place(value, found));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_mismatch_says_where_and_does_not_repeat_the_value() {
        let schema = json!({"type": "object", "properties": {"a": {"items": {"type": "integer"}}}});
        let schema = Schema::compile(&schema).unwrap();
        assert_eq!(schema.check(&json!({"a": [1]})), Ok(()));
        let mismatch = schema.check(&json!({"a": [1, "hunter2"]})).unwrap_err();
        assert_eq!(mismatch.path, "/a/1");
        assert!(!mismatch.problem.contains("hunter2"), "{}", mismatch.problem);
    }

    #[test]
    fn schemas_that_could_harm_are_refused() {
        let check = |schema: Value, fine: bool| {
            assert_eq!(Schema::compile(&schema).is_ok(), fine, "{schema}");
        };
        check(json!({"$ref": "https://example.com/x.json"}), false);
        check(json!({"$ref": "file:///etc/passwd"}), false);
        check(json!({"$ref": "#"}), false);
        check(
            json!({"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}}}),
            false,
        );
        check(json!({"$ref": "#a", "$defs": {"x": {"$anchor": "a", "$ref": "#a"}}}), false);
        check(json!({"$defs": {"x": {"$dynamicAnchor": "a"}}}), false);
        check(json!({"$defs": {"x": {"$anchor": "a"}}, "$ref": "#/$defs/x"}), true);
        check(json!({"pattern": "(?=a)b"}), false);
        check(json!({"type": "wrong"}), false);
        let deep = (0..70).fold(json!({}), |inner, _| json!({"items": inner}));
        check(deep, false);
        // A tree refers to itself for its children, which is fine: each step moves down.
        check(json!({"type": "object", "properties": {"next": {"$ref": "#"}}}), true);
        check(json!({"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}), true);
        check(
            json!({"$schema": "http://json-schema.org/draft-07/schema#", "type": "object"}),
            true,
        );
    }

    #[test]
    fn a_value_that_is_too_deep_is_a_mismatch() {
        let tree = Schema::compile(&json!({"properties": {"next": {"$ref": "#"}}})).unwrap();
        let deep = (0..100).fold(json!({}), |inner, _| json!({"next": inner}));
        let mismatch = tree.check(&deep).unwrap_err();
        assert!(mismatch.problem.contains("64"), "{}", mismatch.problem);
    }
}
