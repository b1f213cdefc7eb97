//! What models and tools say in a run, from the pieces of a `messages-tuple` stream to what a person reads.
//!
//! It keeps no text of a model: a piece is shown and forgotten. Of the calls of tools, which come in pieces too, it
//! keeps the beginnings until their message is whole.

use std::collections::BTreeMap;

use serde_json::Value;

use super::show;

/// Shown of a call's arguments and of a tool's answer, in characters.
const MOST_SHOWN: usize = 200;
/// Kept of a call's arguments, in bytes.
const MOST_KEPT: usize = 4 << 10;
/// Messages that are under way at once and kept apart; of more, calls of tools are not shown.
const MAX_MESSAGES: usize = 256;
/// Calls of one message.
const MAX_CALLS: usize = 128;

/// Something to print.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Said {
    /// A piece of the text of a message, in the activation of this node.
    Piece {
        /// What tells messages that come at once apart.
        speaker: String,
        /// The node.
        node: String,
        /// The text, without what would steer a terminal; it may have line ends.
        text: String,
    },
    /// The message of this speaker has come to its end.
    Over(String),
    /// A line of its own.
    Line(String),
}

/// A call of a tool, as far as it has come.
#[derive(Debug, Default)]
struct Call {
    name: String,
    arguments: String,
}

/// A message that is under way.
#[derive(Debug, Default)]
struct Message {
    id: String,
    calls: BTreeMap<u64, Call>,
}

/// The messages of a run that are under way.
#[derive(Debug, Default)]
pub(super) struct Speech {
    /// By the namespace of their activation: one activation makes one message at a time.
    messages: BTreeMap<String, Message>,
}

impl Speech {
    /// Takes the data of an event, `[message or piece, metadata]`.
    pub(super) fn take(&mut self, data: &Value) -> Vec<Said> {
        let (message, metadata) = (&data[0], &data[1]);
        let node = place(metadata);
        match message["type"].as_str() {
            Some("AIMessageChunk") => {
                let speaker =
                    metadata["langgraph_checkpoint_ns"].as_str().unwrap_or_default().to_owned();
                self.piece(message, node, speaker)
            }
            Some("tool") => vec![Said::Line(answered(&node, message))],
            _ => Vec::new(),
        }
    }

    fn piece(&mut self, piece: &Value, node: String, speaker: String) -> Vec<Said> {
        let id = piece["id"].as_str().unwrap_or_default();
        let mut said = Vec::new();
        let is_known = self.messages.contains_key(&speaker);
        if is_known || self.messages.len() < MAX_MESSAGES {
            let message = self.messages.entry(speaker.clone()).or_default();
            if is_known && message.id != id {
                // It was cut off, by a failure or with its server.
                said.push(Said::Line(format!("  {node} begins again")));
                message.calls.clear();
            }
            id.clone_into(&mut message.id);
            message.add(piece);
        }
        let text = piece["content"].as_str().unwrap_or_default();
        if !text.is_empty() {
            let text = show::printable_lines(text);
            said.push(Said::Piece { speaker: speaker.clone(), node: node.clone(), text });
        }
        if piece["chunk_position"] == "last"
            && let Some(message) = self.messages.remove(&speaker)
        {
            let line = |call: Call| {
                let (name, arguments) =
                    (show::printable(&call.name), clipped(&show::printable(&call.arguments)));
                Said::Line(format!("  {node} calls {name} {arguments}"))
            };
            said.push(Said::Over(speaker));
            said.extend(message.calls.into_values().map(line));
        }
        said
    }
}

impl Message {
    fn add(&mut self, piece: &Value) {
        for part in piece["tool_call_chunks"].as_array().into_iter().flatten() {
            let index = part["index"].as_u64().unwrap_or(0);
            if !self.calls.contains_key(&index) && self.calls.len() >= MAX_CALLS {
                continue;
            }
            let call = self.calls.entry(index).or_default();
            if let Some(name) = part["name"].as_str() {
                name.clone_into(&mut call.name);
            }
            let arguments = part["args"].as_str().unwrap_or_default();
            let room = MOST_KEPT.saturating_sub(call.arguments.len());
            call.arguments.push_str(&arguments[..arguments.floor_char_boundary(room)]);
        }
    }
}

/// The node with those that it lies in: `agent/think`.
fn place(metadata: &Value) -> String {
    let namespace = metadata["langgraph_checkpoint_ns"].as_str().unwrap_or_default();
    let nodes: Vec<&str> = namespace.split('|').filter_map(|part| part.split(':').next()).collect();
    let nodes = nodes.join("/");
    if nodes.is_empty() { show::text(&metadata["langgraph_node"]) } else { show::printable(&nodes) }
}

fn answered(node: &str, message: &Value) -> String {
    let name = show::text(&message["name"]);
    let verb = if message["status"] == "error" { "did not" } else { "answered" };
    let text = match &message["content"] {
        Value::String(text) => show::printable(text),
        parts => show::text(parts),
    };
    format!("  {node}: {name} {verb}: {}", clipped(text.trim()))
}

/// The beginning of a text.
fn clipped(text: &str) -> String {
    match text.char_indices().nth(MOST_SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn piece(id: &str, more: &Value) -> Value {
        let mut piece = json!({
            "type": "AIMessageChunk", "id": id, "content": "", "tool_call_chunks": [], "chunk_position": null,
        });
        for (key, value) in more.as_object().unwrap() {
            piece[key] = value.clone();
        }
        json!([piece, { "langgraph_node": "think", "langgraph_checkpoint_ns": "think:1" }])
    }

    fn text(text: &str) -> Said {
        Said::Piece {
            speaker: "think:1".to_owned(),
            node: "think".to_owned(),
            text: text.to_owned(),
        }
    }

    fn line(text: &str) -> Said {
        Said::Line(text.to_owned())
    }

    #[test]
    fn pieces_are_shown_as_they_come_and_calls_when_they_are_whole() {
        let mut speech = Speech::default();
        let call = |more: Value| json!({ "tool_call_chunks": [more] });
        assert_eq!(speech.take(&piece("m", &json!({ "content": "I look\n" }))), [text("I look\n")]);
        let begin = call(json!({ "index": 0, "id": "c", "name": "read", "args": "{\"a\"" }));
        assert_eq!(speech.take(&piece("m", &begin)), []);
        assert_eq!(speech.take(&piece("m", &call(json!({ "index": 0, "args": ":1}" })))), []);
        let last = piece("m", &json!({ "chunk_position": "last" }));
        let over = Said::Over("think:1".to_owned());
        assert_eq!(speech.take(&last), [over, line("  think calls read {\"a\":1}")]);
        assert!(speech.messages.is_empty());
    }

    #[test]
    fn a_message_that_begins_again_says_so_and_forgets_its_calls() {
        let mut speech = Speech::default();
        let call = json!({ "content": "a", "tool_call_chunks": [{ "index": 0, "name": "x", "args": "" }] });
        speech.take(&piece("m", &call));
        let again = speech.take(&piece("m.1", &json!({ "content": "b" })));
        assert_eq!(again, [line("  think begins again"), text("b")]);
        let last = piece("m.1", &json!({ "chunk_position": "last" }));
        assert_eq!(speech.take(&last), [Said::Over("think:1".to_owned())]);
    }

    #[test]
    fn answers_of_tools_are_clipped_and_steer_no_terminal() {
        let mut speech = Speech::default();
        let told = json!([
            { "type": "tool", "name": "files/read", "status": "success", "content": format!("\u{1b}[2J\u{9b}x{}", "é".repeat(500)) },
            { "langgraph_node": "act", "langgraph_checkpoint_ns": "helper:1|act:2" }
        ]);
        let said = speech.take(&told);
        let [Said::Line(shown)] = said.as_slice() else { panic!("{said:?}") };
        assert!(shown.starts_with("  helper/act: files/read answered: [2J x"), "{shown}");
        assert!(shown.ends_with('…') && shown.chars().count() < 240, "{shown}");
    }

    #[test]
    fn long_arguments_take_no_room() {
        let mut speech = Speech::default();
        for _ in 0..100 {
            let part = json!({ "index": 0, "name": "w", "args": "ü".repeat(1000) });
            speech.take(&piece("m", &json!({ "tool_call_chunks": [part] })));
        }
        let kept = &speech.messages["think:1"].calls[&0].arguments;
        assert!(kept.len() <= MOST_KEPT && kept.len() > MOST_KEPT - 4);
    }
}
