//! Messages of a conversation, and their two written forms.
//!
//! A graph's state holds LangChain's form (`{type: "ai", content, tool_calls: [{id, name, args}]}`), which
//! is what clients of LangGraph's API expect; endpoints want OpenAI's (`{role: "assistant", tool_calls:
//! [{id, function: {name, arguments}}]}`). [`Message::read`] takes both; [`Message::to_langchain`] and
//! `to_openai` write them.
//!
//! What a model or a person wrote is data: arguments that are no JSON object become an
//! [`InvalidToolCall`], never an error.

mod chunk;
mod content;
mod read;
#[cfg(test)]
mod tests;
mod write;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

pub use chunk::ChunkWriter;
pub use content::Content;
pub use read::MessageError;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The one who sets the rules: `system`, or `developer`.
    System,
    /// A person: `human`, or `user`.
    Human,
    /// A model: `ai`, or `assistant`.
    Ai,
    /// A tool that a model called.
    Tool,
}

/// One message.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: Content,
    /// Its id, by which a state replaces it.
    pub id: Option<String>,
    /// The speaker's name, or the tool's.
    pub name: Option<String>,
    /// Tools that the model wants to be called.
    pub tool_calls: Vec<ToolCall>,
    /// Calls whose arguments cannot be read.
    pub invalid_tool_calls: Vec<InvalidToolCall>,
    /// The call that a tool answers.
    pub tool_call_id: Option<String>,
    /// Whether a tool succeeded: `success` or `error`.
    pub status: Option<String>,
    /// What a tool made beside its text.
    pub artifact: Option<Value>,
    /// Tokens used for it.
    pub usage_metadata: Option<Value>,
    /// What the endpoint says about it.
    pub response_metadata: Map<String, Value>,
    /// What has no other place, such as `reasoning_content`.
    pub additional_kwargs: Map<String, Value>,
}

/// A call of a tool that a model asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCall {
    /// Names the call in the tool's answer.
    pub id: String,
    /// The tool; whether it exists is for the caller to see.
    pub name: String,
    /// Its arguments.
    pub args: Map<String, Value>,
}

/// A call whose arguments are no JSON object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidToolCall {
    /// Names the call in the tool's answer.
    pub id: String,
    /// The tool.
    pub name: String,
    /// The arguments as they came.
    pub args: String,
    /// What is wrong with them.
    pub error: String,
}

impl Message {
    /// A message with nothing but text.
    #[must_use]
    pub fn new(role: Role, text: impl Into<String>) -> Self {
        Self {
            role,
            content: Content::Text(text.into()),
            id: None,
            name: None,
            tool_calls: Vec::new(),
            invalid_tool_calls: Vec::new(),
            tool_call_id: None,
            status: None,
            artifact: None,
            usage_metadata: None,
            response_metadata: Map::new(),
            additional_kwargs: Map::new(),
        }
    }

    /// A tool's answer to the call `id`.
    #[must_use]
    pub fn tool(id: impl Into<String>, text: impl Into<String>) -> Self {
        Self { tool_call_id: Some(id.into()), ..Self::new(Role::Tool, text) }
    }

    /// All of its text, without images and what else is no text.
    #[must_use]
    pub fn text(&self) -> String {
        self.content.text()
    }
}

impl Serialize for Message {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.to_langchain().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Message {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        Self::read(&value).map_err(D::Error::custom)
    }
}

/// An id for a call whose endpoint gave it none.
pub(super) fn fresh_call_id() -> String {
    format!("call_{}", uuid::Uuid::new_v4().simple())
}

/// A call as a model wrote it, sorted by whether its arguments can be read.
pub(super) fn called(
    id: Option<String>,
    name: String,
    arguments: &str,
) -> Result<ToolCall, InvalidToolCall> {
    let id = id.filter(|id| !id.is_empty()).unwrap_or_else(fresh_call_id);
    let error = match serde_json::from_str::<Value>(arguments) {
        Ok(Value::Object(args)) if !name.is_empty() => return Ok(ToolCall { id, name, args }),
        Ok(Value::Object(_)) => "the call names no tool".to_owned(),
        // No arguments at all is how many endpoints write an empty object.
        Err(_) if arguments.trim().is_empty() && !name.is_empty() => {
            return Ok(ToolCall { id, name, args: Map::new() });
        }
        Ok(_) => "the arguments are no JSON object".to_owned(),
        Err(err) => format!("the arguments are no JSON: {err}"),
    };
    Err(InvalidToolCall { id, name, args: arguments.to_owned(), error })
}
