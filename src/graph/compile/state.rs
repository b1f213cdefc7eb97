//! The channels: schemas, reducers, defaults.

use jsonschema::{PatternOptions, ValidationError, Validator};
use serde_json::{Map, Value};

use super::Compiler;
use crate::graph::check::Diagnostic;
use crate::graph::definition::{ChannelDef, GraphFile};
use crate::graph::expr::{Expr, Template};
use crate::graph::model::{Channel, Reducer};
use crate::graph::names::did_you_mean;

/// The reducers that have a name.
pub(super) const REDUCERS: [&str; 8] =
    ["replace", "append", "merge", "sum", "min", "max", "union", "messages"];

/// Keywords of JSON Schema (draft 2020-12), and of annotations in common use.
const KEYWORDS: &[&str] = &[
    "$anchor",
    "$comment",
    "$defs",
    "$dynamicAnchor",
    "$dynamicRef",
    "$id",
    "$ref",
    "$schema",
    "$vocabulary",
    "additionalProperties",
    "allOf",
    "anyOf",
    "const",
    "contains",
    "contentEncoding",
    "contentMediaType",
    "contentSchema",
    "definitions",
    "dependentRequired",
    "dependentSchemas",
    "deprecated",
    "description",
    "else",
    "enum",
    "example",
    "examples",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "format",
    "if",
    "items",
    "maxContains",
    "maxItems",
    "maxLength",
    "maxProperties",
    "maximum",
    "minContains",
    "minItems",
    "minLength",
    "minProperties",
    "minimum",
    "multipleOf",
    "not",
    "oneOf",
    "pattern",
    "patternProperties",
    "prefixItems",
    "properties",
    "propertyNames",
    "readOnly",
    "required",
    "then",
    "title",
    "type",
    "unevaluatedItems",
    "unevaluatedProperties",
    "uniqueItems",
    "writeOnly",
];

const TYPES: [&str; 7] = ["array", "boolean", "integer", "null", "number", "object", "string"];

/// Compiles a JSON Schema: draft 2020-12, patterns that match in linear time, no references out of it.
pub fn build_validator(schema: &Value) -> Result<Validator, ValidationError<'static>> {
    jsonschema::draft202012::options()
        .with_pattern_options(PatternOptions::regex().size_limit(1 << 20))
        .build(schema)
}

/// A validator that accepts everything.
pub(super) fn anything() -> Option<Validator> {
    build_validator(&Value::Bool(true)).ok()
}

/// The first thing that `validator` has against `value`, in words.
pub(super) fn complaint(validator: &Validator, value: &Value) -> Option<String> {
    let error = validator.iter_errors(value).next()?;
    let at = error.instance_path().to_string();
    let what: String = error.masked().to_string().chars().take(200).collect();
    Some(if at.is_empty() { what } else { format!("at {at}: {what}") })
}

impl Compiler<'_> {
    pub(super) fn state(&mut self, file: &GraphFile) -> Vec<Channel> {
        file.state.sorted().into_iter().filter_map(|(name, def)| self.one(name, def)).collect()
    }

    fn one(&mut self, name: &str, def: &ChannelDef) -> Option<Channel> {
        let path = ["state", name];
        self.name(&path, "a channel", name, true);
        self.keywords(&path, &def.schema);
        let schema = def.json_schema();
        let validator = self.validator(&path, &schema);
        let reducer = self.reducer(name, def);
        self.reducer_fits(name, def, &reducer);
        if let (Some(default), Some(validator)) = (&def.default, &validator)
            && let Some(complaint) = complaint(validator, default)
        {
            let message = format!("the default of `{name}` breaks its schema: {complaint}");
            self.report(Diagnostic::error("default", &["state", name, "default"], message));
        }
        let update_validator = update_schema(&def.schema, &reducer)
            .and_then(|schema| build_validator(&schema).ok().or_else(anything));
        Some(Channel {
            name: name.to_owned(),
            reducer,
            default: def.default.clone(),
            schema,
            validator: validator.or_else(anything)?,
            update_validator,
        })
    }

    pub(super) fn validator(&mut self, path: &[&str], schema: &Value) -> Option<Validator> {
        match build_validator(schema) {
            Ok(validator) => Some(validator),
            Err(err) => {
                self.refuse_schema(path, schema, &err);
                None
            }
        }
    }

    fn refuse_schema(&mut self, path: &[&str], schema: &Value, err: &ValidationError<'_>) {
        let inner = err.instance_path().to_string();
        let mut path = path.to_vec();
        path.extend(inner.split('/').filter(|step| !step.is_empty()));
        let given = schema.pointer(&inner).and_then(Value::as_str).unwrap_or_default();
        let problem = |message: String| Diagnostic::error("schema", &path, message);
        if path.last() == Some(&"type") && !given.is_empty() {
            let problem = problem(format!("JSON Schema has no type `{given}`"));
            self.report(problem.suggest(given, TYPES));
        } else if matches!(err.kind(), jsonschema::error::ValidationErrorKind::Referencing(_)) {
            let problem = problem("this schema refers to what is not in it".into());
            self.report(problem.help("put it under `$defs` and refer to `#/$defs/NAME`"));
        } else {
            let what: String = err.to_string().chars().take(200).collect();
            self.report(problem(format!("this is no JSON Schema: {what}")));
        }
    }

    fn keywords(&mut self, path: &[&str], schema: &Map<String, Value>) {
        for key in schema.keys() {
            if KEYWORDS.contains(&key.as_str()) || key.starts_with("x-") {
                continue;
            }
            let path = [path[0], path[1], key];
            let message = format!("`{key}` is no keyword of JSON Schema and has no effect");
            let known = KEYWORDS.iter().copied().chain(["reduce", "default"]);
            let problem = Diagnostic::warning("schema-keyword", &path, message).on_key();
            self.report(match did_you_mean(key, known) {
                Some(near) => problem.help(format!("did you mean `{near}`?")),
                None => problem.help("keys that start with `x-` are left alone"),
            });
        }
    }

    fn reducer(&mut self, name: &str, def: &ChannelDef) -> Reducer {
        let path = ["state", name, "reduce"];
        match def.reduce.as_deref() {
            None | Some("replace") => Reducer::Replace,
            Some("append") => Reducer::Append,
            Some("merge") => Reducer::Merge,
            Some("sum") => Reducer::Sum,
            Some("min") => Reducer::Min,
            Some("max") => Reducer::Max,
            Some("union") => Reducer::Union,
            Some("messages") => Reducer::Messages,
            Some(text) if text.contains("${") => {
                self.custom_reducer(&path, text).map_or(Reducer::Replace, Reducer::Custom)
            }
            Some(other) => {
                let message = format!("there is no reducer `{other}`");
                let problem = Diagnostic::error("reducer", &path, message).suggest(other, REDUCERS);
                self.report(problem);
                Reducer::Replace
            }
        }
    }

    fn custom_reducer(&mut self, path: &[&str], text: &str) -> Option<Expr> {
        let template = self.template(path, &text.into(), &["current", "update"])?;
        let Some(expr) = template.as_expr() else {
            let message = "a reducer of one's own is exactly one `${expression}`";
            self.report(Diagnostic::error("reducer", path, message));
            return None;
        };
        if let Some(channel) = expr.references().channels.first() {
            let message = format!("a reducer sees `current` and `update`, not state.{channel}");
            self.report(Diagnostic::error("reducer", path, message));
        }
        Some(expr.clone())
    }

    /// A reducer against the type that the schema states; a schema without `type` says nothing.
    fn reducer_fits(&mut self, name: &str, def: &ChannelDef, reducer: &Reducer) {
        let fitting: &[&str] = match reducer {
            Reducer::Append | Reducer::Union | Reducer::Messages => &["array"],
            Reducer::Merge => &["object"],
            Reducer::Sum => &["integer", "number"],
            Reducer::Min | Reducer::Max => &["integer", "number", "string"],
            Reducer::Replace | Reducer::Custom(_) => return,
        };
        let stated: Vec<&str> = match def.schema.get("type") {
            Some(Value::String(one)) => vec![one],
            Some(Value::Array(several)) => several.iter().filter_map(Value::as_str).collect(),
            _ => return,
        };
        if stated.iter().any(|stated| fitting.contains(stated)) {
            return;
        }
        let reduce = def.reduce.as_deref().unwrap_or_default();
        let message = format!(
            "the reducer `{reduce}` needs {}, `{name}` is {}",
            fitting.join(" or "),
            stated.join(" or ")
        );
        self.report(Diagnostic::error("reducer", &["state", name, "reduce"], message));
    }

    /// Reports a template without expressions whose value the channel would refuse.
    pub(super) fn literal_fits(&mut self, path: &[&str], channel: &Channel, template: &Template) {
        let Some(value) = template.as_literal() else { return };
        let validator = channel.update_validator.as_ref().unwrap_or(&channel.validator);
        if let Some(complaint) = complaint(validator, value) {
            let message = format!(
                "the value breaks the schema of the channel `{}`: {complaint}",
                channel.name
            );
            self.report(Diagnostic::error("value-type", path, message));
        }
    }
}

/// The schema of one update, where it differs from the value's: bounds that hold for the whole need not
/// hold for a part.
fn update_schema(schema: &Map<String, Value>, reducer: &Reducer) -> Option<Value> {
    let of_the_whole: &[&str] = match reducer {
        Reducer::Replace => return None,
        Reducer::Custom(_) => return Some(Value::Bool(true)),
        Reducer::Messages => return Some(serde_json::json!({ "type": "array" })),
        Reducer::Append | Reducer::Union => &[
            "minItems",
            "maxItems",
            "uniqueItems",
            "contains",
            "minContains",
            "maxContains",
            "prefixItems",
        ],
        Reducer::Merge => &["required", "minProperties", "maxProperties", "dependentRequired"],
        Reducer::Sum => &["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"],
        Reducer::Min | Reducer::Max => return None,
    };
    let always = ["allOf", "anyOf", "oneOf", "not", "if", "then", "else", "const", "enum"];
    let differs =
        |key: &String| of_the_whole.contains(&key.as_str()) || always.contains(&key.as_str());
    if !schema.keys().any(differs) {
        return None;
    }
    let rest = schema.iter().filter(|(key, _)| !differs(key));
    Some(Value::Object(rest.map(|(key, value)| (key.clone(), value.clone())).collect()))
}
