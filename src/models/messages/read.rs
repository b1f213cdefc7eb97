//! Reads messages: LangChain's form, LangChain's serialized objects, OpenAI's form, `[role, text]` and a
//! bare text of a person.

use serde_json::{Map, Value};

use super::content::Content;
use super::{InvalidToolCall, Message, Role, ToolCall, called, fresh_call_id};

/// How many tool calls one message may have.
pub(crate) const MAX_TOOL_CALLS: usize = 256;

/// A message that cannot be read, or cannot be sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct MessageError {
    /// The field to blame, from the message on: `tool_calls[0].args`.
    pub field: String,
    /// What is wrong, and what would be right.
    pub problem: String,
}

impl MessageError {
    pub(super) fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }
}

impl Message {
    /// Reads a message in any of the known forms.
    pub fn read(value: &Value) -> Result<Self, MessageError> {
        match value {
            Value::String(text) => Ok(Self::new(Role::Human, text)),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(role), content] => {
                    let mut message = Self::new(role_named(role, "[0]")?, "");
                    message.content = Content::read(Some(content))?;
                    message.checked()
                }
                _ => Err(MessageError::new("", "a list is [ROLE, CONTENT]")),
            },
            Value::Object(fields) => read_object(fields)?.checked(),
            _ => Err(MessageError::new(
                "",
                "a message is an object with `role` or `type`, or a text",
            )),
        }
    }

    fn checked(self) -> Result<Self, MessageError> {
        if self.role == Role::Tool && self.tool_call_id.is_none() {
            let problem = "a tool's message names the call that it answers";
            return Err(MessageError::new("tool_call_id", problem));
        }
        Ok(self)
    }
}

fn read_object(fields: &Map<String, Value>) -> Result<Message, MessageError> {
    // {"lc": 1, "type": "constructor", "id": ["langchain", .., "AIMessage"], "kwargs": {..}}
    if fields.get("type").and_then(Value::as_str) == Some("constructor") {
        let class = fields.get("id").and_then(Value::as_array).and_then(|path| path.last());
        let class = class.and_then(Value::as_str).unwrap_or_default();
        let Some(Value::Object(inner)) = fields.get("kwargs") else {
            return Err(MessageError::new("kwargs", "a serialized message has its fields here"));
        };
        return read_fields(role_named(class, "id")?, inner);
    }
    let named = |key: &'static str| fields.get(key).and_then(Value::as_str).map(|name| (key, name));
    // OpenAI's `role` goes first: its objects may have a `type` of another meaning.
    let Some((key, name)) = named("role").or_else(|| named("type")) else {
        return Err(MessageError::new("role", "a message says who speaks: `role` or `type`"));
    };
    read_fields(role_named(name, key)?, fields)
}

fn role_named(name: &str, field: &str) -> Result<Role, MessageError> {
    match name {
        "system" | "developer" | "SystemMessage" | "SystemMessageChunk" => Ok(Role::System),
        "human" | "user" | "HumanMessage" | "HumanMessageChunk" => Ok(Role::Human),
        "ai" | "assistant" | "AIMessage" | "AIMessageChunk" => Ok(Role::Ai),
        "tool" | "ToolMessage" | "ToolMessageChunk" => Ok(Role::Tool),
        _ => Err(MessageError::new(
            field,
            format!(
                "{name:?} does not speak to models; system, human (user), ai (assistant) and tool do"
            ),
        )),
    }
}

fn read_fields(role: Role, fields: &Map<String, Value>) -> Result<Message, MessageError> {
    let text = |key: &str| match fields.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(MessageError::new(key, "must be a text")),
    };
    let object = |key: &str| match fields.get(key) {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(object)) => Ok(object.clone()),
        Some(_) => Err(MessageError::new(key, "must be an object")),
    };
    let mut message = Message {
        content: Content::read(fields.get("content"))?,
        id: text("id")?,
        name: text("name")?,
        tool_call_id: text("tool_call_id")?,
        status: text("status")?,
        artifact: fields.get("artifact").filter(|value| !value.is_null()).cloned(),
        usage_metadata: fields.get("usage_metadata").filter(|value| value.is_object()).cloned(),
        response_metadata: object("response_metadata")?,
        additional_kwargs: object("additional_kwargs")?,
        ..Message::new(role, "")
    };
    if role == Role::Ai {
        read_calls(&mut message, fields)?;
        // OpenAI's relatives put these beside the content.
        for key in ["reasoning_content", "refusal"] {
            if let Some(said) = fields.get(key).filter(|said| said.is_string()) {
                message.additional_kwargs.entry(key).or_insert_with(|| said.clone());
            }
        }
    }
    Ok(message)
}

fn read_calls(message: &mut Message, fields: &Map<String, Value>) -> Result<(), MessageError> {
    let (calls, invalid) = (list(fields, "tool_calls")?, list(fields, "invalid_tool_calls")?);
    // Old messages of LangChain's have them there, in OpenAI's form.
    let kept = message.additional_kwargs.remove("tool_calls");
    let old = kept.as_ref().and_then(Value::as_array).filter(|_| calls.is_empty());
    let calls = old.map_or(calls, Vec::as_slice);
    if calls.len() + invalid.len() > MAX_TOOL_CALLS {
        let problem = format!("a message has at most {MAX_TOOL_CALLS} tool calls");
        return Err(MessageError::new("tool_calls", problem));
    }
    for (at, call) in calls.iter().enumerate() {
        match read_call(call).map_err(|(field, problem)| {
            MessageError::new(format!("tool_calls[{at}].{field}"), problem)
        })? {
            Ok(call) => message.tool_calls.push(call),
            Err(invalid) => message.invalid_tool_calls.push(invalid),
        }
    }
    for call in invalid {
        let text = |key: &str| call[key].as_str().unwrap_or_default().to_owned();
        message.invalid_tool_calls.push(InvalidToolCall {
            id: text("id"),
            name: text("name"),
            args: text("args"),
            error: text("error"),
        });
    }
    Ok(())
}

fn list<'a>(fields: &'a Map<String, Value>, key: &str) -> Result<&'a [Value], MessageError> {
    match fields.get(key) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(items)) => Ok(items),
        Some(_) => Err(MessageError::new(key, "must be a list")),
    }
}

/// One call, in either form.
fn read_call(
    call: &Value,
) -> Result<Result<ToolCall, InvalidToolCall>, (&'static str, &'static str)> {
    let id = call["id"].as_str().map(str::to_owned);
    if let Some(function) = call.get("function").filter(|function| function.is_object()) {
        let name = function["name"].as_str().unwrap_or_default().to_owned();
        return match &function["arguments"] {
            Value::String(arguments) => Ok(called(id, name, arguments)),
            Value::Null => Ok(called(id, name, "")),
            // Not in the protocol, but some endpoints write the object itself.
            other => Ok(called(id, name, &other.to_string())),
        };
    }
    let name = call["name"].as_str().ok_or(("name", "a call names its tool"))?.to_owned();
    match &call["args"] {
        Value::Object(args) => {
            let id = id.unwrap_or_else(fresh_call_id);
            Ok(Ok(ToolCall { id, name, args: args.clone() }))
        }
        Value::String(arguments) => Ok(called(id, name, arguments)),
        Value::Null => Ok(called(id, name, "")),
        _ => Err(("args", "must be an object")),
    }
}
