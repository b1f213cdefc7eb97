//! The published JSON Schema of graph files: what editors complete and check by.
//!
//! It describes shape only. What it cannot say (names, expressions, topology) `cynai graph check` says.

use serde_json::Value;

use super::definition::GraphFile;
use super::names::MAX_NAME_BYTES;

/// The JSON Schema (draft 2020-12) of a graph file.
#[must_use]
pub fn json_schema() -> Value {
    let mut schema = schemars::schema_for!(GraphFile).to_value();
    let names = serde_json::json!({
        "pattern": "^[A-Za-z0-9_][A-Za-z0-9_.-]*$",
        "maxLength": MAX_NAME_BYTES,
    });
    if let Some(name) = schema.pointer_mut("/properties/name").and_then(Value::as_object_mut) {
        name.extend(names.as_object().cloned().unwrap_or_default());
    }
    schema
}

/// The schema as it is committed and printed.
#[must_use]
pub fn json_schema_text() -> String {
    let mut text = serde_json::to_string_pretty(&json_schema()).unwrap_or_default();
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_schema_is_current() {
        let committed = include_str!("../../docs/graph.schema.json");
        assert!(
            committed == json_schema_text(),
            "docs/graph.schema.json is old; write it again with `cynai graph schema > docs/graph.schema.json`"
        );
    }

    #[test]
    fn the_schema_accepts_what_the_loader_accepts_and_refuses_unknown_keys() {
        let validator = jsonschema::validator_for(&json_schema()).unwrap();
        let check = |text: &str, expected: bool| {
            let (source, problems) = crate::graph::source::Source::parse("g", text);
            assert_eq!(problems, []);
            let found: Vec<String> =
                validator.iter_errors(&source.value()).map(|err| err.to_string()).collect();
            assert_eq!(found.is_empty(), expected, "{text}: {found:?}");
        };
        check(
            "{ name: g, nodes: { a: { use: x, with: null } }, edges: [start -> a -> end] }",
            true,
        );
        check("{ name: g, nodes: { a: { graph: x } }, edges: [{ from: [a, b], to: c }] }", true);
        check(
            "{ name: g, state: { a: { type: array, items: {}, reduce: append } }, nodes: {}, edges: [] }",
            true,
        );
        check("{ name: g, nodes: { a: { timeout: 1h30m } }, edges: [] }", true);
        check("{ name: g, nodes: { a: { timeout: soon } }, edges: [] }", false);
        check("{ name: g, nodes: { a: { usee: x } }, edges: [] }", false);
        check("{ name: g, nodes: {}, edges: [{ form: a }] }", false);
        check("{ name: 'a b', nodes: {}, edges: [] }", false);
        check("{ nodes: {}, edges: [] }", false);
    }
}
