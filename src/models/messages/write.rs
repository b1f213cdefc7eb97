//! Writes messages: LangChain's form for states and clients, OpenAI's for endpoints.

use serde_json::{Map, Value, json};

use super::read::MessageError;
use super::{InvalidToolCall, Message, Role, ToolCall};

impl Role {
    /// LangChain's word.
    #[must_use]
    pub fn langchain(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Human => "human",
            Self::Ai => "ai",
            Self::Tool => "tool",
        }
    }

    /// OpenAI's word.
    #[must_use]
    pub fn openai(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Human => "user",
            Self::Ai => "assistant",
            Self::Tool => "tool",
        }
    }
}

impl ToolCall {
    /// LangChain's form.
    #[must_use]
    pub fn to_langchain(&self) -> Value {
        json!({ "name": self.name, "args": self.args, "id": self.id, "type": "tool_call" })
    }
}

impl InvalidToolCall {
    /// LangChain's form.
    #[must_use]
    pub fn to_langchain(&self) -> Value {
        json!({
            "name": self.name,
            "args": self.args,
            "id": self.id,
            "error": self.error,
            "type": "invalid_tool_call",
        })
    }
}

impl Message {
    /// LangChain's form, as LangGraph's server sends it.
    #[must_use]
    pub fn to_langchain(&self) -> Value {
        let mut written = json!({
            "content": self.content.to_value(),
            "additional_kwargs": self.additional_kwargs,
            "response_metadata": self.response_metadata,
            "type": self.role.langchain(),
            "name": self.name,
            "id": self.id,
        });
        match self.role {
            Role::Ai => {
                let calls: Vec<Value> =
                    self.tool_calls.iter().map(ToolCall::to_langchain).collect();
                let invalid: Vec<Value> =
                    self.invalid_tool_calls.iter().map(InvalidToolCall::to_langchain).collect();
                written["tool_calls"] = calls.into();
                written["invalid_tool_calls"] = invalid.into();
                written["usage_metadata"] = self.usage_metadata.clone().unwrap_or(Value::Null);
            }
            Role::Tool => {
                written["tool_call_id"] = self.tool_call_id.clone().into();
                written["artifact"] = self.artifact.clone().unwrap_or(Value::Null);
                written["status"] = self.status.as_deref().unwrap_or("success").into();
            }
            Role::System | Role::Human => {}
        }
        written
    }

    /// OpenAI's form.
    ///
    /// Calls that could not be read go back as they came, so that the model sees its mistake and the
    /// tools' answers find their calls.
    pub fn to_openai(&self) -> Result<Value, MessageError> {
        let mut written = Map::new();
        written.insert("role".to_owned(), self.role.openai().into());
        let content = self.content.to_openai(self.role == Role::Ai)?;
        let calls = self.openai_calls();
        let silent = content.as_str() == Some("") && !calls.is_empty();
        written.insert("content".to_owned(), if silent { Value::Null } else { content });
        if !calls.is_empty() {
            written.insert("tool_calls".to_owned(), calls.into());
        }
        if let Some(id) = &self.tool_call_id {
            written.insert("tool_call_id".to_owned(), id.as_str().into());
        }
        // A tool's name stands in the call that it answers.
        let name = self.name.as_ref().filter(|name| self.role != Role::Tool && plain(name));
        if let Some(name) = name {
            written.insert("name".to_owned(), name.as_str().into());
        }
        Ok(Value::Object(written))
    }

    /// OpenAI's form of a message that is only text, which can always be written.
    pub(in crate::models) fn wire(&self) -> Value {
        json!({ "role": self.role.openai(), "content": self.text() })
    }

    fn openai_calls(&self) -> Vec<Value> {
        let call = |id: &str, name: &str, arguments: String| {
            let function = json!({ "name": name, "arguments": arguments });
            json!({ "id": id, "type": "function", "function": function })
        };
        let good = self
            .tool_calls
            .iter()
            .map(|one| call(&one.id, &one.name, Value::Object(one.args.clone()).to_string()));
        let bad =
            self.invalid_tool_calls.iter().map(|one| call(&one.id, &one.name, one.args.clone()));
        good.chain(bad).collect()
    }
}

/// Whether endpoints take it as a speaker's name.
fn plain(name: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b"_-".contains(&b);
    (1..=64).contains(&name.len()) && name.bytes().all(word)
}
