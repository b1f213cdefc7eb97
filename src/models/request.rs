//! What a caller asks for, its limits, and how it is written for an endpoint.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::failure::{ModelError, Refused};
use super::messages::Message;

/// Messages of one request.
const MAX_MESSAGES: usize = 10_000;
/// Tools of one request.
const MAX_TOOLS: usize = 512;
/// The whole request as JSON text, images included.
const MAX_REQUEST_BYTES: usize = 16 << 20;
/// A schema as JSON text.
const MAX_SCHEMA_BYTES: usize = 256 << 10;
const MAX_STOPS: usize = 16;
const MAX_EXTRA: usize = 32;
/// What a request says in its own words, and what it may not say: `n` answers, or how they are sent.
const OWN_FIELDS: [&str; 16] = [
    "model",
    "messages",
    "tools",
    "tool_choice",
    "response_format",
    "temperature",
    "top_p",
    "max_tokens",
    "max_completion_tokens",
    "seed",
    "stop",
    "user",
    "n",
    "stream",
    "stream_options",
    "functions",
];
const MAX_TEXT_BYTES: usize = 1024;

/// A request for a message.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ChatRequest {
    /// A route's name, or `ENDPOINT/MODEL`.
    pub model: String,
    /// The conversation.
    pub messages: Vec<Message>,
    /// What the model may call.
    pub tools: Vec<ToolSpec>,
    /// Whether it must, or must not; the endpoint's own choice when absent.
    pub tool_choice: Option<ToolChoice>,
    /// The form of the answer's text.
    pub response_format: Option<ResponseFormat>,
    /// 0 to 2.
    pub temperature: Option<f64>,
    /// 0 to 1.
    pub top_p: Option<f64>,
    /// The longest answer, in tokens.
    pub max_tokens: Option<u32>,
    /// For answers that repeat, where the endpoint can.
    pub seed: Option<i64>,
    /// Texts at which the answer ends.
    pub stop: Vec<String>,
    /// Whom the request is for, as the endpoint is to know them.
    pub user: Option<String>,
    /// Fields of the endpoint's own, such as `reasoning_effort` or `chat_template_kwargs`; at most 32.
    pub extra: Map<String, Value>,
    /// Names the effect: sent as `Idempotency-Key` with every attempt.
    #[serde(skip)]
    pub idempotency_key: Option<String>,
    /// For the whole call, all candidates together; none leaves it to the endpoints' own `total`.
    #[serde(skip)]
    pub timeout: Option<Duration>,
}

/// A tool that a model may call.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ToolSpec {
    /// 1 to 64 letters, digits, `_` and `-`.
    pub name: String,
    /// What it does, for the model.
    #[serde(default)]
    pub description: String,
    /// The JSON Schema of its arguments: an object's.
    #[serde(default = "no_arguments")]
    pub parameters: Value,
}

fn no_arguments() -> Value {
    json!({ "type": "object", "properties": {} })
}

/// Whether a model calls tools.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolChoice {
    /// As it likes.
    Auto,
    /// Not at all.
    None,
    /// At least one.
    Required,
    /// This one.
    Tool(String),
}

/// The form of an answer's text.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResponseFormat {
    /// Any JSON object.
    JsonObject,
    /// JSON that a schema describes. The endpoint is asked for it; what comes is not checked here
    /// (`chat_json` does).
    JsonSchema {
        /// A name for the schema: 1 to 64 letters, digits, `_` and `-`.
        name: String,
        /// The JSON Schema.
        schema: Value,
        /// Whether the endpoint is to follow it to the letter; such endpoints accept few schemas.
        #[serde(default)]
        strict: bool,
    },
}

/// What an endpoint has shown not to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Quirks {
    pub no_stream: bool,
    pub no_stream_options: bool,
    pub no_response_format: bool,
    pub completion_tokens: bool,
}

impl Quirks {
    /// Takes note of a refusal; false when it was known, so that asking again is in vain.
    pub(super) fn learn(&mut self, refused: Refused) -> bool {
        let known = match refused {
            Refused::Stream => &mut self.no_stream,
            Refused::StreamOptions => &mut self.no_stream_options,
            Refused::ResponseFormat => &mut self.no_response_format,
            Refused::MaxTokens => &mut self.completion_tokens,
        };
        !std::mem::replace(known, true)
    }
}

/// A request that was checked, written as far as it is the same for all endpoints.
#[derive(Debug, Clone)]
pub(super) struct Prepared {
    fields: Map<String, Value>,
    response_format: Option<Value>,
    max_tokens: Option<u32>,
    /// An answer without a call of a tool is none.
    pub(super) must_call: bool,
}

impl ChatRequest {
    /// Checks all that can be wrong without asking an endpoint.
    pub(super) fn prepare(&self) -> Result<Prepared, ModelError> {
        counted("messages", self.messages.len(), 1, MAX_MESSAGES)?;
        let mut messages = Vec::with_capacity(self.messages.len());
        for (at, message) in self.messages.iter().enumerate() {
            messages.push(
                message
                    .to_openai()
                    .map_err(|err| wrong(format!("messages[{at}].{}", err.field), err.problem))?,
            );
        }
        let mut fields = Map::new();
        fields.insert("messages".to_owned(), messages.into());
        self.write_tools(&mut fields)?;
        self.write_sampling(&mut fields)?;
        idempotency(self.idempotency_key.as_deref())?;
        counted("extra", self.extra.len(), 0, MAX_EXTRA)?;
        if let Some(own) = OWN_FIELDS.iter().find(|own| self.extra.contains_key(**own)) {
            let problem = "this field is written by the request itself; leave it out here";
            return Err(wrong(format!("extra.{own}"), problem));
        }
        fields.extend(self.extra.clone());
        let response_format =
            self.response_format.as_ref().map(ResponseFormat::to_openai).transpose()?;
        let bytes = serde_json::to_vec(&fields).map_or(usize::MAX, |text| text.len());
        if bytes > MAX_REQUEST_BYTES {
            let problem = format!(
                "{bytes} bytes with images and tools, but a request has at most {} MiB: send less of the \
                 conversation, or images by their addresses",
                MAX_REQUEST_BYTES >> 20
            );
            return Err(wrong("messages", problem));
        }
        let must_call =
            matches!(self.tool_choice, Some(ToolChoice::Required | ToolChoice::Tool(_)));
        Ok(Prepared { fields, response_format, max_tokens: self.max_tokens, must_call })
    }

    fn write_tools(&self, fields: &mut Map<String, Value>) -> Result<(), ModelError> {
        counted("tools", self.tools.len(), 0, MAX_TOOLS)?;
        let mut names = BTreeSet::new();
        let mut tools = Vec::with_capacity(self.tools.len());
        for (at, tool) in self.tools.iter().enumerate() {
            plain_name(&format!("tools[{at}].name"), &tool.name)?;
            if !names.insert(tool.name.as_str()) {
                let problem = format!("the name {:?} is taken by another tool", tool.name);
                return Err(wrong(format!("tools[{at}].name"), problem));
            }
            let field = format!("tools[{at}].parameters");
            if !tool.parameters.is_object() {
                return Err(wrong(field, "must be the JSON Schema of an object"));
            }
            small_schema(&field, &tool.parameters)?;
            let function = json!({
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
            });
            tools.push(json!({ "type": "function", "function": function }));
        }
        let choice = match &self.tool_choice {
            None => None,
            Some(ToolChoice::Auto) => Some("auto".into()),
            Some(ToolChoice::None) => Some("none".into()),
            Some(ToolChoice::Required) => Some("required".into()),
            Some(ToolChoice::Tool(name)) if names.contains(name.as_str()) => {
                Some(json!({ "type": "function", "function": { "name": name } }))
            }
            Some(ToolChoice::Tool(name)) => {
                return Err(wrong("tool_choice", format!("there is no tool {name:?} in `tools`")));
            }
        };
        if !tools.is_empty() {
            fields.insert("tools".to_owned(), tools.into());
            fields.extend(choice.map(|choice| ("tool_choice".to_owned(), choice)));
        } else if self.tool_choice == Some(ToolChoice::Required) {
            return Err(wrong("tool_choice", "`required` needs `tools`"));
        }
        Ok(())
    }

    fn write_sampling(&self, fields: &mut Map<String, Value>) -> Result<(), ModelError> {
        for (name, value, most) in
            [("temperature", self.temperature, 2.0), ("top_p", self.top_p, 1.0)]
        {
            let Some(value) = value else { continue };
            if !(0.0..=most).contains(&value) {
                return Err(wrong(name, format!("must be 0 to {most}, not {value}")));
            }
            fields.insert(name.to_owned(), value.into());
        }
        if self.max_tokens == Some(0) {
            return Err(wrong("max_tokens", "must be at least 1"));
        }
        if let Some(seed) = self.seed {
            fields.insert("seed".to_owned(), seed.into());
        }
        counted("stop", self.stop.len(), 0, MAX_STOPS)?;
        if !self.stop.is_empty() {
            for (at, stop) in self.stop.iter().enumerate() {
                counted(&format!("stop[{at}] (bytes)"), stop.len(), 1, MAX_TEXT_BYTES)?;
            }
            fields.insert("stop".to_owned(), self.stop.clone().into());
        }
        if let Some(user) = &self.user {
            counted("user (bytes)", user.len(), 1, MAX_TEXT_BYTES)?;
            fields.insert("user".to_owned(), user.as_str().into());
        }
        Ok(())
    }
}

impl ResponseFormat {
    fn to_openai(&self) -> Result<Value, ModelError> {
        match self {
            Self::JsonObject => Ok(json!({ "type": "json_object" })),
            Self::JsonSchema { name, schema, strict } => {
                plain_name("response_format.name", name)?;
                small_schema("response_format.schema", schema)?;
                let described = json!({ "name": name, "schema": schema, "strict": strict });
                Ok(json!({ "type": "json_schema", "json_schema": described }))
            }
        }
    }
}

impl Prepared {
    /// The body for one endpoint.
    pub(super) fn body(&self, model: &str, quirks: Quirks) -> Value {
        let mut body = self.fields.clone();
        body.insert("model".to_owned(), model.into());
        if let Some(tokens) = self.max_tokens {
            let name =
                if quirks.completion_tokens { "max_completion_tokens" } else { "max_tokens" };
            body.insert(name.to_owned(), tokens.into());
        }
        if let Some(format) = self.response_format.as_ref().filter(|_| !quirks.no_response_format) {
            body.insert("response_format".to_owned(), format.clone());
        }
        if !quirks.no_stream {
            body.insert("stream".to_owned(), true.into());
            if !quirks.no_stream_options {
                body.insert("stream_options".to_owned(), json!({ "include_usage": true }));
            }
        }
        Value::Object(body)
    }

    /// The conversation as it will be sent.
    pub(super) fn messages_mut(&mut self) -> Option<&mut Vec<Value>> {
        self.fields.get_mut("messages")?.as_array_mut()
    }

    pub(super) fn set_response_format(
        &mut self,
        format: &ResponseFormat,
    ) -> Result<(), ModelError> {
        self.response_format = Some(format.to_openai()?);
        Ok(())
    }

    /// What of the body could be the reason for a 400 that gives none.
    pub(super) fn suspect(&self, quirks: Quirks) -> Option<Refused> {
        (self.response_format.is_some() && !quirks.no_response_format)
            .then_some(Refused::ResponseFormat)
    }
}

pub(super) fn wrong(field: impl Into<String>, problem: impl Into<String>) -> ModelError {
    ModelError::Request { field: field.into(), problem: problem.into() }
}

pub(super) fn counted(
    field: &str,
    count: usize,
    least: usize,
    most: usize,
) -> Result<(), ModelError> {
    if (least..=most).contains(&count) {
        return Ok(());
    }
    Err(wrong(field, format!("{count}, but {least} to {most} are allowed")))
}

pub(super) fn idempotency(key: Option<&str>) -> Result<(), ModelError> {
    let plain =
        |key: &str| (1..=200).contains(&key.len()) && key.bytes().all(|b| b.is_ascii_graphic());
    if key.is_none_or(plain) {
        return Ok(());
    }
    Err(wrong("idempotency_key", "must be 1 to 200 visible ASCII characters"))
}

fn plain_name(field: &str, name: &str) -> Result<(), ModelError> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b"_-".contains(&b);
    if (1..=64).contains(&name.len()) && name.bytes().all(word) {
        return Ok(());
    }
    Err(wrong(
        field,
        format!("{name:?} is no name for a model: 1 to 64 letters, digits, `_` and `-`"),
    ))
}

pub(super) fn small_schema(field: &str, schema: &Value) -> Result<(), ModelError> {
    let bytes = serde_json::to_vec(schema).map_or(usize::MAX, |text| text.len());
    if bytes <= MAX_SCHEMA_BYTES {
        return Ok(());
    }
    Err(wrong(
        field,
        format!("a schema has at most {} KiB, not {bytes} bytes", MAX_SCHEMA_BYTES >> 10),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::messages::Role;

    fn request(more: Value) -> ChatRequest {
        let mut fields =
            json!({"model": "default", "messages": [{"role": "user", "content": "hi"}]});
        if let (Some(fields), Value::Object(more)) = (fields.as_object_mut(), more) {
            fields.extend(more);
        }
        serde_json::from_value(fields).unwrap()
    }

    #[test]
    fn a_request_is_written_in_the_words_of_the_protocol() {
        let prepared = request(json!({
            "tools": [{"name": "look", "description": "Looks."}],
            "tool_choice": {"tool": "look"},
            "response_format": {"json_schema": {"name": "n", "schema": {"type": "object"}}},
            "max_tokens": 5, "temperature": 0, "stop": ["x"], "seed": 1,
            "extra": {"reasoning_effort": "low"},
        }))
        .prepare()
        .unwrap();
        let body = prepared.body("m", Quirks::default());
        assert_eq!(body["messages"], json!([{"role": "user", "content": "hi"}]));
        assert_eq!(body["tool_choice"], json!({"type": "function", "function": {"name": "look"}}));
        assert_eq!(body["response_format"]["json_schema"]["name"], "n");
        assert_eq!(body["reasoning_effort"], "low");
        assert_eq!((&body["max_tokens"], &body["stream"]), (&json!(5), &json!(true)));
        let mut quirks = Quirks::default();
        for refused in [Refused::Stream, Refused::ResponseFormat, Refused::MaxTokens] {
            assert!(quirks.learn(refused) && !quirks.learn(refused));
        }
        let body = prepared.body("m", quirks);
        for gone in ["stream", "stream_options", "response_format", "max_tokens"] {
            assert_eq!(body.get(gone), None, "{gone}");
        }
        assert_eq!(body["max_completion_tokens"], 5);
    }

    #[test]
    fn what_no_endpoint_would_take_is_refused_with_its_field() {
        let check = |more: Value, field: &str, problem: &str| {
            let message = request(more).prepare().unwrap_err().to_string();
            assert!(message.starts_with(field) && message.contains(problem), "{message}");
        };
        check(json!({"messages": []}), "messages: 0, but 1 to", "");
        check(json!({"temperature": 3}), "temperature", "must be 0 to 2");
        check(json!({"max_tokens": 0}), "max_tokens", "at least 1");
        check(json!({"tools": [{"name": "a.b"}]}), "tools[0].name", "no name for a model");
        check(json!({"tools": [{"name": "a"}, {"name": "a"}]}), "tools[1].name", "taken");
        check(
            json!({"tools": [{"name": "a", "parameters": 1}]}),
            "tools[0].parameters",
            "JSON Schema",
        );
        check(json!({"tool_choice": {"tool": "x"}}), "tool_choice", "no tool \"x\"");
        check(json!({"tool_choice": "required"}), "tool_choice", "needs `tools`");
        check(json!({"stop": [""]}), "stop[0]", "1 to 1024");
        check(json!({"extra": {"n": 2}}), "extra.n", "leave it out");
        let image = |url: &str| {
            json!({"messages": [{"role": "user", "content": [
            {"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": url}}]}]})
        };
        let field = "messages[0].content[1].image_url";
        check(
            image("artifact://x/1"),
            field,
            "a reference to an artifact or a file cannot be sent",
        );
        check(image("file:///etc/passwd"), field, "a reference to an artifact");
        check(image("data:text/html;base64,AA"), field, "data:image/TYPE");
        request(image("https://h/a.png")).prepare().unwrap();
        request(image("data:image/png;base64,iVBORw0KGgo=")).prepare().unwrap();
        let mut keyed = request(json!({}));
        keyed.idempotency_key = Some("a\nb".to_owned());
        assert!(keyed.prepare().unwrap_err().to_string().contains("visible ASCII"));
        let mut long = request(json!({}));
        long.messages.push(Message::new(Role::Human, "x".repeat(MAX_REQUEST_BYTES)));
        assert!(long.prepare().unwrap_err().to_string().contains("at most 16 MiB"));
    }
}
