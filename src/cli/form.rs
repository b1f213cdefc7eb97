//! A form for an answer: a JSON Schema, asked field by field at a terminal.
//!
//! A choice is a number, yes or no a letter, the fields of an object come in turn; what a schema says otherwise is
//! typed as JSON. What was typed is held against the schema, and asked again where it does not fit.
//!
//! **Invariant:** what the server sends never steers the terminal.

use std::io::{BufRead, Write};

use anyhow::{Context, bail};
use serde_json::{Map, Value};

use super::show;

/// Fields inside fields; what lies deeper is typed as JSON.
const MAX_DEPTH: usize = 4;
/// Choices that are listed; of more, the answer is typed as JSON.
const MAX_CHOICES: usize = 100;

/// Somebody who answers.
pub(super) struct Form<R, W> {
    input: R,
    output: W,
    /// How often something was asked.
    asked: usize,
}

impl<R: BufRead, W: Write> Form<R, W> {
    /// Reads from `input`, asks on `output`.
    pub(super) fn new(input: R, output: W) -> Self {
        Self { input, output, asked: 0 }
    }

    /// Shows a question (`value`, `response_schema`) and asks for its answer until it fits.
    ///
    /// # Errors
    /// When the input ends, when nothing can be shown, and for a schema that leaves nothing to ask and fits nothing.
    pub(super) fn answer(&mut self, question: &Value) -> anyhow::Result<Value> {
        self.say(&format!("\n{}", in_words(&question["value"])))?;
        let schema = question.get("response_schema").filter(|schema| !schema.is_null());
        let schema = schema.unwrap_or(&Value::Bool(true));
        loop {
            let before = self.asked;
            let answer = self.field("", schema, true, 0)?.unwrap_or_default();
            let Some(why) = problem(schema, &answer) else { return Ok(answer) };
            if self.asked == before {
                bail!("there is no form for this answer ({why}): give it as JSON");
            }
            self.say(&format!("  that does not fit: {why}"))?;
        }
    }

    /// Asks for one value until it fits; `None` when it is left out.
    fn field(
        &mut self,
        name: &str,
        schema: &Value,
        is_required: bool,
        depth: usize,
    ) -> anyhow::Result<Option<Value>> {
        if let Some(constant) = schema.get("const") {
            return Ok(Some(constant.clone()));
        }
        let fields = schema.get("properties").and_then(Value::as_object);
        if let Some(fields) = fields.filter(|_| is_type(schema, "object") && depth < MAX_DEPTH) {
            let answer = self.object(name, schema, fields, is_required, depth)?;
            let is_left_out = answer.is_empty() && !is_required;
            return Ok(Some(answer).filter(|_| !is_left_out).map(Value::Object));
        }
        let choices = schema.get("enum").and_then(Value::as_array);
        let choices = choices.filter(|choices| choices.len() <= MAX_CHOICES);
        self.describe(name, schema, choices.map_or(&[], Vec::as_slice))?;
        loop {
            let line = self.ask(name, schema, choices.is_some(), is_required)?;
            let value = match (line.trim(), choices) {
                ("", _) if schema.get("default").is_some() => schema["default"].clone(),
                ("", _) if !is_required => return Ok(None),
                (typed, Some(choices)) => match chosen(typed, choices) {
                    Some(value) => value,
                    None => {
                        self.say(&format!("  a number from 1 to {}, please", choices.len()))?;
                        continue;
                    }
                },
                (typed, None) => match read(typed, schema) {
                    Ok(value) => value,
                    Err(wanted) => {
                        self.say(&format!("  {wanted}, please"))?;
                        continue;
                    }
                },
            };
            match problem(schema, &value) {
                None => return Ok(Some(value)),
                Some(why) => self.say(&format!("  that does not fit: {why}"))?,
            }
        }
    }

    fn object(
        &mut self,
        name: &str,
        schema: &Value,
        fields: &Map<String, Value>,
        is_required: bool,
        depth: usize,
    ) -> anyhow::Result<Map<String, Value>> {
        if !name.is_empty() {
            self.describe(name, schema, &[])?;
        }
        let required: Vec<&str> =
            schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let mut answer = Map::new();
        // What is required and not described is asked as well.
        let undescribed = required.iter().filter(|key| !fields.contains_key(**key));
        let undescribed = undescribed.map(|key| (*key, &Value::Bool(true)));
        let fields = fields.iter().map(|(key, field)| (key.as_str(), field)).chain(undescribed);
        for (key, field) in fields {
            let path = if name.is_empty() { key.to_owned() } else { format!("{name}.{key}") };
            let must = is_required && required.contains(&key);
            if let Some(value) = self.field(&path, field, must, depth + 1)? {
                answer.insert(key.to_owned(), value);
            }
        }
        Ok(answer)
    }

    /// What the schema says of a value in words, and the choices.
    fn describe(&mut self, name: &str, schema: &Value, choices: &[Value]) -> anyhow::Result<()> {
        for key in ["title", "description"] {
            if let Some(text) = schema.get(key).and_then(Value::as_str) {
                self.say(&format!("  {}", show::printable(text)))?;
            }
        }
        if !choices.is_empty() && !name.is_empty() {
            self.say(&format!("  {}:", show::printable(name)))?;
        }
        for (at, choice) in choices.iter().enumerate() {
            self.say(&format!("  {:>3}  {}", at + 1, bare(choice)))?;
        }
        Ok(())
    }

    /// Asks for a line.
    fn ask(
        &mut self,
        name: &str,
        schema: &Value,
        is_choice: bool,
        is_required: bool,
    ) -> anyhow::Result<String> {
        self.asked += 1;
        let mut hints = Vec::new();
        if !is_choice {
            hints.push(wanted(schema).to_owned());
        }
        match schema.get("default") {
            Some(default) => hints.push(format!("nothing for {}", bare(default))),
            None if !is_required => hints.push("may be left out".to_owned()),
            None => {}
        }
        let hints =
            if hints.is_empty() { String::new() } else { format!(" ({})", hints.join("; ")) };
        write!(self.output, "{}{hints}> ", show::printable(name))
            .and_then(|()| self.output.flush())
            .context("could not ask")?;
        let mut line = String::new();
        if self.input.read_line(&mut line).context("could not read the answer")? == 0 {
            bail!("no answer was given; the question stays");
        }
        Ok(line)
    }

    fn say(&mut self, text: &str) -> anyhow::Result<()> {
        writeln!(self.output, "{text}").context("could not ask")
    }
}

/// Why an answer does not fit its schema. A schema that cannot be read here is left to the server.
pub(super) fn problem(schema: &Value, answer: &Value) -> Option<String> {
    let validator = jsonschema::validator_for(schema).ok()?;
    let err = validator.validate(answer).err()?;
    let place = err.instance_path().to_string();
    let at = if place.is_empty() { String::new() } else { format!("{place}: ") };
    Some(show::printable(&format!("{at}{err}")))
}

/// A question's value as a person reads it: its words first, then what else it holds.
pub(super) fn in_words(value: &Value) -> String {
    let Value::Object(fields) = value else { return bare(value) };
    let mut rest = fields.clone();
    let words = ["message", "question", "ask"].iter().find_map(|key| match rest.get(*key) {
        Some(Value::String(_)) => rest.remove(*key),
        _ => None,
    });
    let mut lines: Vec<String> = words.iter().map(bare).collect();
    for (key, value) in &rest {
        let text = match value {
            Value::Object(_) | Value::Array(_) => format!("{value:#}").replace('\n', "\n    "),
            other => bare(other),
        };
        lines.push(format!("  {}: {}", show::printable(key), show::printable_lines(&text)));
    }
    lines.join("\n")
}

/// Texts without quotes, everything else as JSON.
fn bare(value: &Value) -> String {
    match value {
        Value::String(text) => show::printable_lines(text),
        other => show::printable(&other.to_string()),
    }
}

fn is_type(schema: &Value, name: &str) -> bool {
    schema.get("type").and_then(Value::as_str) == Some(name)
}

/// What is to be typed.
fn wanted(schema: &Value) -> &'static str {
    match schema.get("type").and_then(Value::as_str) {
        Some("boolean") => "y or n",
        Some("string") => "a text",
        Some("integer") => "a whole number",
        Some("number") => "a number",
        Some("array") => "a JSON list",
        Some("object") => "a JSON object",
        _ => "JSON, or a text",
    }
}

/// Reads a line as what the schema wants.
fn read(typed: &str, schema: &Value) -> Result<Value, &'static str> {
    let wanted = wanted(schema);
    let json = serde_json::from_str::<Value>(typed);
    match schema.get("type").and_then(Value::as_str) {
        Some("boolean") => match typed.to_lowercase().as_str() {
            "y" | "yes" | "true" => Ok(true.into()),
            "n" | "no" | "false" => Ok(false.into()),
            _ => Err(wanted),
        },
        Some("string") => Ok(typed.into()),
        Some("integer" | "number") => json.ok().filter(Value::is_number).ok_or(wanted),
        Some("array") => json.ok().filter(Value::is_array).ok_or(wanted),
        Some("object") => json.ok().filter(Value::is_object).ok_or(wanted),
        _ => Ok(json.unwrap_or_else(|_| typed.into())),
    }
}

/// A choice by its number, or by its own text.
fn chosen(typed: &str, choices: &[Value]) -> Option<Value> {
    let by_text = choices.iter().find(|choice| choice.as_str() == Some(typed)).cloned();
    by_text.or_else(|| choices.get(typed.parse::<usize>().ok()?.checked_sub(1)?).cloned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Types these lines into the form of a question; gives the answer and what was shown.
    fn typed(schema: &Value, lines: &str) -> (anyhow::Result<Value>, String) {
        let question = json!({ "id": "q", "value": "Well?", "response_schema": schema });
        let mut shown = Vec::new();
        let answer = Form::new(lines.as_bytes(), &mut shown).answer(&question);
        (answer, String::from_utf8(shown).unwrap())
    }

    fn check(schema: Value, lines: &str, expected: Value) {
        let (answer, shown) = typed(&schema, lines);
        assert_eq!(answer.unwrap(), expected, "{shown}");
    }

    #[test]
    fn one_value_is_typed_as_its_schema_says() {
        check(json!({ "type": "boolean" }), "maybe\ny\n", json!(true));
        check(json!({ "type": "string", "minLength": 2 }), "x\n12\n", json!("12"));
        check(json!({ "type": "integer", "minimum": 3 }), "2\n2.5\n\"4\"\n4\n", json!(4));
        check(json!({ "enum": ["red", 7, "2"] }), "0\n4\n1\n", json!("red"));
        check(json!({ "enum": ["red", 7, "2"] }), "2\n", json!("2"));
        check(
            json!({ "type": "array", "items": { "type": "integer" } }),
            "[\"a\"]\n[1]\n",
            json!([1]),
        );
        check(json!(true), "free words\n", json!("free words"));
        check(Value::Null, "{\"a\": 1}\n", json!({ "a": 1 }));
        check(json!({ "type": "string", "default": "usual" }), "\n", json!("usual"));
        check(json!({ "const": 5 }), "", json!(5));
    }

    #[test]
    fn an_object_is_asked_field_by_field_and_what_is_optional_can_be_left_out() {
        let schema = json!({
            "type": "object",
            "properties": {
                "action": { "enum": ["approve", "reject"] },
                "arguments": { "type": "object" },
                "reason": { "type": "string" },
            },
            "required": ["action"],
            "additionalProperties": false,
        });
        check(
            schema.clone(),
            "\n2\n\nnot now\n",
            json!({ "action": "reject", "reason": "not now" }),
        );
        check(
            schema,
            "1\n{\"path\": \"a\"}\n\n",
            json!({ "action": "approve", "arguments": { "path": "a" } }),
        );
        let inner = json!({ "type": "object", "required": ["n"], "properties": { "n": { "type": "number" } } });
        let outer = json!({ "type": "object", "required": ["o"], "properties": { "o": inner } });
        check(outer, "1.5\n", json!({ "o": { "n": 1.5 } }));
        let optional = json!({ "type": "object", "properties": { "o": inner_of_one("n"), "x": { "type": "boolean" } } });
        check(optional, "\ny\n", json!({ "x": true }));
        // What is required is asked, described or not.
        check(
            json!({ "type": "object", "properties": {}, "required": ["b"] }),
            "7\n",
            json!({ "b": 7 }),
        );
    }

    fn inner_of_one(name: &str) -> Value {
        json!({ "type": "object", "properties": { name: { "type": "number" } } })
    }

    #[test]
    fn a_schema_that_leaves_nothing_to_ask_and_fits_nothing_is_no_endless_loop() {
        let schema =
            json!({ "type": "object", "properties": { "a": { "const": 1 } }, "minProperties": 2 });
        let (answer, shown) = typed(&schema, "");
        assert!(answer.unwrap_err().to_string().contains("give it as JSON"), "{shown}");
    }

    #[test]
    fn what_does_not_fit_as_a_whole_is_asked_again() {
        let schema = json!({
            "type": "object", "minProperties": 1,
            "properties": { "a": { "type": "string" }, "b": { "type": "string" } },
        });
        let (answer, shown) = typed(&schema, "\n\nx\n\n");
        assert_eq!(answer.unwrap(), json!({ "a": "x" }));
        assert!(shown.contains("does not fit"), "{shown}");
    }

    #[test]
    fn an_end_of_the_input_is_no_answer_and_no_question_steers_the_terminal() {
        let schema =
            json!({ "type": "string", "description": "\u{1b}[2J\u{9b}31m", "default": "\u{7}" });
        let (answer, shown) = typed(&schema, "");
        assert!(answer.unwrap_err().to_string().contains("no answer was given"));
        assert!(shown.chars().all(|c| c == '\n' || !c.is_control()), "{shown:?}");
        let words = in_words(
            &json!({ "message": "a\u{1b}c\nb", "args": { "x": "\u{9b}y" }, "k\u{1b}": 1 }),
        );
        assert!(words.starts_with("a c\nb\n"), "{words:?}");
        assert!(words.chars().all(|c| c == '\n' || !c.is_control()), "{words:?}");
    }
}
