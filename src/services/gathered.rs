//! Messages gathered from their pieces, for streams of mode `messages`.

use std::collections::HashMap;

use serde_json::{Value, json};

/// Messages that are kept at once; of more, the one that was touched longest ago is forgotten.
const MAX_MESSAGES: usize = 256;

/// The messages of a run as far as they have come.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    messages: HashMap<String, (u64, Value)>,
    touched: u64,
}

impl Gathered {
    /// Takes a stored row, `[message or piece, metadata]`; gives the events that follow from it: a name, and data.
    pub(super) fn take(&mut self, row: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
        let Ok(Value::Array(row)) = serde_json::from_slice(row) else { return Vec::new() };
        let [piece, metadata] = row.as_slice() else { return Vec::new() };
        let id = piece["id"].as_str().unwrap_or_default().to_owned();
        let bytes = |value: Value| value.to_string().into_bytes();
        let mut events = Vec::new();
        if !self.messages.contains_key(&id) {
            events.push(("messages/metadata", bytes(json!({ &id: { "metadata": metadata } }))));
        }
        if piece["type"] != "AIMessageChunk" {
            // It came whole.
            events.push(("messages/complete", bytes(json!([piece]))));
            return events;
        }
        let message = self.entry(&id);
        add(message, piece);
        let whole = bytes(json!([message]));
        let last = piece["chunk_position"] == "last";
        events.push((if last { "messages/complete" } else { "messages/partial" }, whole));
        events
    }

    fn entry(&mut self, id: &str) -> &mut Value {
        self.touched += 1;
        if self.messages.len() >= MAX_MESSAGES && !self.messages.contains_key(id) {
            let oldest = self.messages.iter().min_by_key(|(_, (touched, _))| *touched);
            if let Some(oldest) = oldest.map(|(id, _)| id.clone()) {
                self.messages.remove(&oldest);
            }
        }
        let entry = self.messages.entry(id.to_owned()).or_insert_with(|| {
            let message = json!({
                "type": "ai", "id": id, "content": "", "tool_calls": [], "invalid_tool_calls": [],
                "additional_kwargs": {}, "response_metadata": {}, "usage_metadata": null, "name": null,
            });
            (0, message)
        });
        entry.0 = self.touched;
        &mut entry.1
    }
}

/// Adds a piece to the message that it belongs to.
fn add(message: &mut Value, piece: &Value) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    message["content"] = (text(&message["content"]) + &text(&piece["content"])).into();
    for call in piece["tool_call_chunks"].as_array().into_iter().flatten() {
        let at = call["index"].as_u64().and_then(|at| usize::try_from(at).ok()).unwrap_or(0);
        let Some(calls) = message["tool_calls"].as_array_mut() else { continue };
        // A model numbers its calls from 0, one after the other.
        if at >= calls.len() {
            calls
                .push(json!({ "type": "tool_call", "id": "", "name": "", "args": {}, "text": "" }));
        }
        let last = calls.len() - 1;
        let known = &mut calls[at.min(last)];
        for key in ["id", "name"] {
            if let Some(value) = call[key].as_str() {
                known[key] = value.into();
            }
        }
        let arguments = text(&known["text"]) + &text(&call["args"]);
        if let Ok(parsed @ Value::Object(_)) = serde_json::from_str(&arguments) {
            known["args"] = parsed;
        }
        known["text"] = arguments.into();
    }
    for key in ["response_metadata", "additional_kwargs"] {
        for (name, value) in piece[key].as_object().into_iter().flatten() {
            message[key][name] = value.clone();
        }
    }
    if !piece["usage_metadata"].is_null() {
        message["usage_metadata"] = piece["usage_metadata"].clone();
    }
    if piece["chunk_position"] == "last" {
        for call in message["tool_calls"].as_array_mut().into_iter().flatten() {
            if let Some(call) = call.as_object_mut() {
                call.remove("text");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(id: &str, content: &str, more: Value) -> Vec<u8> {
        let mut piece = json!({ "type": "AIMessageChunk", "id": id, "content": content });
        for (key, value) in more.as_object().unwrap() {
            piece[key] = value.clone();
        }
        json!([piece, { "langgraph_node": "n" }]).to_string().into_bytes()
    }

    fn names(events: &[(&'static str, Vec<u8>)]) -> Vec<&'static str> {
        events.iter().map(|(name, _)| *name).collect()
    }

    fn message(events: &[(&'static str, Vec<u8>)]) -> Value {
        serde_json::from_slice::<Value>(&events.last().unwrap().1).unwrap()[0].clone()
    }

    #[test]
    fn each_event_holds_the_message_so_far() {
        let mut gathered = Gathered::default();
        let first = gathered.take(&piece("a", "Hel", json!({})));
        assert_eq!(names(&first), ["messages/metadata", "messages/partial"]);
        assert_eq!(message(&first)["content"], "Hel");
        let second = gathered.take(&piece("a", "lo", json!({})));
        assert_eq!(names(&second), ["messages/partial"]);
        assert_eq!(message(&second)["content"], "Hello");
        let usage = json!({ "usage_metadata": { "total_tokens": 3 }, "chunk_position": "last" });
        let last = gathered.take(&piece("a", "", usage));
        assert_eq!(names(&last), ["messages/complete"]);
        assert_eq!(message(&last)["usage_metadata"]["total_tokens"], 3);
    }

    #[test]
    fn pieces_of_calls_become_calls() {
        let mut gathered = Gathered::default();
        let call = |index: u32, id: Value, name: Value, args: &str| json!({ "tool_call_chunks": [{ "index": index, "id": id, "name": name, "args": args }] });
        gathered.take(&piece("a", "", call(0, json!("c1"), json!("read"), "{\"pa")));
        gathered.take(&piece("a", "", call(1, json!("c2"), json!("list"), "")));
        let events = gathered.take(&piece("a", "", call(0, Value::Null, Value::Null, "th\": 1}")));
        let calls = message(&events)["tool_calls"].clone();
        assert_eq!(calls[0]["args"], json!({ "path": 1 }));
        assert_eq!((&calls[0]["name"], &calls[1]["id"]), (&json!("read"), &json!("c2")));
    }

    #[test]
    fn what_comes_whole_is_complete_and_nonsense_is_nothing() {
        let mut gathered = Gathered::default();
        let row = json!([{ "type": "tool", "id": "t", "content": "x" }, {}]).to_string();
        assert_eq!(
            names(&gathered.take(row.as_bytes())),
            ["messages/metadata", "messages/complete"]
        );
        assert!(gathered.take(b"{").is_empty() && gathered.take(b"[1]").is_empty());
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut gathered = Gathered::default();
        for number in 0..2 * MAX_MESSAGES {
            gathered.take(&piece(&number.to_string(), "x", json!({})));
        }
        assert_eq!(gathered.messages.len(), MAX_MESSAGES);
    }
}
