//! Answers that are JSON of a given schema. What does not match is sent back with the validator's words.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::Models;
use super::answer::{ChatAnswer, Sink};
use super::chat::Relay;
use super::failure::ModelError;
use super::messages::Message;
use super::redact::quote;
use super::request::{ChatRequest, Prepared, ResponseFormat, small_schema, wrong};

/// How often an answer may be sent back.
const MAX_REPAIRS: u32 = 3;
/// What of the validator's errors goes back.
const MAX_PROBLEMS: usize = 10;
const MAX_PROBLEM_BYTES: usize = 300;
/// What of a wrong answer goes back.
const MAX_QUOTED_BYTES: usize = 64 << 10;

/// The form that an answer must have.
#[derive(Debug, Clone)]
pub struct JsonForm<'a> {
    /// A name for the schema, for the endpoint: 1 to 64 letters, digits, `_` and `-`.
    pub name: &'a str,
    /// The JSON Schema.
    pub schema: &'a Value,
    /// How often a wrong answer is sent back; at most 3.
    pub max_repairs: u32,
}

/// An answer that matches its schema.
#[derive(Debug, Clone)]
pub struct JsonAnswer {
    /// The value.
    pub value: Value,
    /// How often it was sent back.
    pub repairs: u32,
    /// The last answer; its usage, attempts and total time are those of all calls together.
    pub answer: ChatAnswer,
}

impl Models {
    /// Asks for JSON that matches a schema. `request.response_format` and `request.tools` must be empty.
    ///
    /// An endpoint that does not know `response_format` is asked without it; the schema stands in the
    /// conversation as well. Each repair is a call of its own, with `request.timeout` of its own.
    pub async fn chat_json(
        &self,
        request: &ChatRequest,
        form: &JsonForm<'_>,
        sink: &dyn Sink,
    ) -> Result<JsonAnswer, ModelError> {
        let validator = form.validator(request)?;
        let mut prepared = request.prepare()?;
        form.instruct(&mut prepared)?;
        let mut relay = Relay { sink, passed: false };
        let mut so_far: Option<ChatAnswer> = None;
        let mut repairs = 0;
        loop {
            let key = request.idempotency_key.as_ref().map(|key| match repairs {
                0 => key.clone(),
                // Another request, so another effect.
                _ => format!("{key}.repair{repairs}"),
            });
            let answer = self.ask(request, &prepared, key, &mut relay).await?;
            let answer = joined(so_far.take(), answer);
            let text = answer.message.text();
            let problems = match read(&text) {
                Ok(value) => {
                    let problems = problems(&validator, &value);
                    if problems.is_empty() {
                        return Ok(JsonAnswer { value, repairs, answer });
                    }
                    problems
                }
                Err(problem) if answer.finish_reason == "stop" => vec![problem],
                Err(problem) => {
                    vec![format!("{problem} (it ended with `{}`)", answer.finish_reason)]
                }
            };
            if repairs == form.max_repairs {
                return Err(ModelError::InvalidJson {
                    model: super::named(&request.model).to_owned(),
                    repairs,
                    problems,
                    answer: Box::new(answer),
                });
            }
            repairs += 1;
            send_back(&mut prepared, &text, &problems);
            relay.restart();
            so_far = Some(answer);
        }
    }
}

/// The JSON value in a text, when it fits the schema.
#[must_use]
pub fn parse_fitting(text: &str, schema: &Value) -> Option<Value> {
    let validator = jsonschema::validator_for(schema).ok()?;
    read(text).ok().filter(|value| validator.is_valid(value))
}

impl JsonForm<'_> {
    fn validator(&self, request: &ChatRequest) -> Result<jsonschema::Validator, ModelError> {
        if self.max_repairs > MAX_REPAIRS {
            let problem = format!("must be 0 to {MAX_REPAIRS}, not {}", self.max_repairs);
            return Err(wrong("max_repairs", problem));
        }
        if request.response_format.is_some() || !request.tools.is_empty() {
            let problem =
                "an answer with a schema has no `response_format` and no `tools` beside it";
            return Err(wrong("schema", problem));
        }
        small_schema("schema", self.schema)?;
        jsonschema::validator_for(self.schema)
            .map_err(|err| wrong("schema", quote(&err.to_string(), MAX_PROBLEM_BYTES)))
    }

    /// Says it in both ways: many endpoints ignore the one, many models the other.
    fn instruct(&self, prepared: &mut Prepared) -> Result<(), ModelError> {
        prepared.set_response_format(&ResponseFormat::JsonSchema {
            name: self.name.to_owned(),
            schema: self.schema.clone(),
            strict: false,
        })?;
        let instruction = format!(
            "Answer with one JSON value that matches this JSON Schema, and with nothing else:\n{}",
            self.schema
        );
        let Some(messages) = prepared.messages_mut() else { return Ok(()) };
        // Some models take one system message only, at the beginning.
        match messages.first_mut() {
            Some(first) if first["role"] == "system" && first["content"].is_string() => {
                let said = first["content"].as_str().unwrap_or_default();
                first["content"] = format!("{said}\n\n{instruction}").into();
            }
            _ => messages.insert(0, json!({ "role": "system", "content": instruction })),
        }
        Ok(())
    }
}

/// The later answer, with what both used.
fn joined(before: Option<ChatAnswer>, mut answer: ChatAnswer) -> ChatAnswer {
    if let Some(before) = before {
        let mut usage = before.usage;
        usage += answer.usage;
        answer.usage = usage;
        answer.message.usage_metadata = usage.metadata();
        answer.total_time += before.total_time;
        answer.attempts.splice(0..0, before.attempts);
    }
    answer
}

fn send_back(prepared: &mut Prepared, text: &str, problems: &[String]) {
    let Some(messages) = prepared.messages_mut() else { return };
    let said = &text[..text.floor_char_boundary(MAX_QUOTED_BYTES)];
    let mut back = "That is not what was asked for:".to_owned();
    for problem in problems {
        // Writing to a string cannot fail.
        let _ = write!(back, "\n- {problem}");
    }
    back.push_str("\nAnswer again with the corrected JSON value, and with nothing else.");
    messages.push(Message::new(super::messages::Role::Ai, said).wire());
    messages.push(Message::new(super::messages::Role::Human, back).wire());
}

fn problems(validator: &jsonschema::Validator, value: &Value) -> Vec<String> {
    let errors = validator.iter_errors(value).take(MAX_PROBLEMS);
    errors
        .map(|err| {
            let path = err.instance_path().to_string();
            let place = if path.is_empty() { "the whole value".to_owned() } else { path };
            quote(&format!("{place}: {err}"), MAX_PROBLEM_BYTES)
        })
        .collect()
}

/// The JSON in an answer: alone, in a fence, or after thoughts.
fn read(text: &str) -> Result<Value, String> {
    let mut text = text.trim();
    if let Some((_, rest)) =
        text.strip_prefix("<think>").and_then(|rest| rest.split_once("</think>"))
    {
        text = rest.trim();
    }
    if text.is_empty() {
        return Err("the answer is empty".to_owned());
    }
    let bare = serde_json::from_str::<Value>(text);
    let found = match (bare, fenced(text)) {
        (Err(_), Some(inner)) => serde_json::from_str(inner.trim()),
        (bare, _) => bare,
    };
    found.map_err(|err| format!("the answer is no JSON: {err}"))
}

/// What stands in the first fence of backticks.
fn fenced(text: &str) -> Option<&str> {
    let (_, after) = text.split_once("```")?;
    // The rest of the line names a language.
    let (_, inner) = after.split_once('\n')?;
    Some(inner.rsplit_once("```").map_or(inner, |(inner, _)| inner))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_found_in_what_models_write_around_it() {
        let check = |text: &str| assert_eq!(read(text).unwrap(), json!({"a": "```"}), "{text}");
        check("{\"a\": \"```\"}");
        check(" \n{\"a\": \"```\"}\n");
        check("```json\n{\"a\": \"```\"}\n```");
        check("Here it is:\n```\n{\"a\": \"```\"}\n```\nDone.");
        check("<think>```\nhm {</think>\n{\"a\": \"```\"}");
        assert_eq!(read("").unwrap_err(), "the answer is empty");
        assert!(read("I cannot.").unwrap_err().starts_with("the answer is no JSON"));
        assert!(read("```json\n{").is_err());
    }

    #[test]
    fn a_problem_names_its_place_and_is_short() {
        let schema =
            json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["m"]});
        let validator = jsonschema::validator_for(&schema).unwrap();
        let found = problems(&validator, &json!({"n": "x".repeat(10_000)}));
        assert_eq!(found.len(), 2);
        assert!(found.iter().any(|one| one.starts_with("/n: ")), "{found:?}");
        assert!(found.iter().any(|one| one.starts_with("the whole value: ")), "{found:?}");
        assert!(found.iter().all(|one| one.len() < 320), "{found:?}");
        assert_eq!(problems(&validator, &json!({"m": 1})), [""; 0]);
    }
}
