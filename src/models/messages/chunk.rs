//! Pieces of a message in LangChain's form, for streams: `AIMessageChunk`.

use serde_json::{Value, json};

use super::Message;
use crate::models::answer::Delta;

/// Writes the pieces of one message. Clients put together what has the same id.
#[derive(Debug, Clone)]
pub struct ChunkWriter {
    id: String,
}

impl ChunkWriter {
    /// For the message that will have this id.
    #[must_use]
    pub fn new(id: impl Into<String>) -> Self {
        Self { id: id.into() }
    }

    /// One piece; none for [`Delta::Restart`], after which the caller takes a writer with another id.
    #[must_use]
    pub fn piece(&self, delta: &Delta) -> Option<Value> {
        let mut chunk = self.empty();
        match delta {
            Delta::Restart => return None,
            Delta::Text(text) => chunk["content"] = text.as_str().into(),
            Delta::Reasoning(text) => {
                chunk["additional_kwargs"] = json!({ "reasoning_content": text });
            }
            Delta::ToolCall { index, id, name, arguments } => {
                chunk["tool_call_chunks"] = json!([{
                    "name": name,
                    "args": arguments,
                    "id": id,
                    "index": index,
                    "type": "tool_call_chunk",
                }]);
            }
        }
        Some(chunk)
    }

    /// The last piece: what is known only at the end.
    #[must_use]
    pub fn last(&self, message: &Message) -> Value {
        let mut chunk = self.empty();
        chunk["response_metadata"] = message.response_metadata.clone().into();
        chunk["usage_metadata"] = message.usage_metadata.clone().unwrap_or(Value::Null);
        chunk["chunk_position"] = "last".into();
        chunk
    }

    fn empty(&self) -> Value {
        json!({
            "content": "",
            "additional_kwargs": {},
            "response_metadata": {},
            "type": "AIMessageChunk",
            "name": null,
            "id": self.id,
            "tool_calls": [],
            "invalid_tool_calls": [],
            "usage_metadata": null,
            "tool_call_chunks": [],
            "chunk_position": null,
        })
    }
}
