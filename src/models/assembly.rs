//! Puts an answer together from the frames of a stream, or from one whole answer.
//!
//! Endpoints differ in what they leave out and in what they add; what is missing gets a meaning, what is
//! of a wrong type is a failure, and what is unknown is ignored.

use serde_json::{Map, Value};

use super::answer::{Delta, Usage};
use super::failure::{Failure, FailureKind};
use super::messages::{Message, Role, called, fresh_call_id};
use super::redact::{Redactor, quote};
use super::refusal;

/// Tool calls of one answer.
const MAX_CALLS: usize = 128;

/// An answer in the making.
#[derive(Debug, Default)]
pub(super) struct Assembly {
    text: String,
    reasoning: String,
    refusal: String,
    calls: Vec<Call>,
    finish: Option<String>,
    usage: Option<Value>,
    model: Option<String>,
    id: Option<String>,
}

#[derive(Debug, Default)]
struct Call {
    id: Option<String>,
    name: String,
    arguments: String,
}

/// What an answer is when it is whole.
#[derive(Debug)]
pub(super) struct Assembled {
    pub message: Message,
    pub finish_reason: String,
    pub usage: Usage,
    pub model: Option<String>,
}

impl Assembly {
    /// Whether the model has said why it stopped.
    pub(super) fn finished(&self) -> bool {
        self.finish.is_some()
    }

    /// Whether anything of an answer has come.
    pub(super) fn begun(&self) -> bool {
        let texts = [&self.text, &self.reasoning, &self.refusal];
        texts.iter().any(|text| !text.is_empty()) || !self.calls.is_empty()
    }

    /// Takes one frame, and passes on what it adds.
    pub(super) fn feed(
        &mut self,
        frame: Value,
        redactor: &Redactor,
        emit: &mut dyn FnMut(Delta),
    ) -> Result<(), Failure> {
        let Value::Object(mut frame) = frame else {
            return Err(malformed("a frame that is no object"));
        };
        if let Some(error) = frame.get("error").filter(|error| !error.is_null()) {
            return Err(refusal::of_error(error, redactor));
        }
        if let Some(usage) = frame.remove("usage").filter(Value::is_object) {
            self.usage = Some(usage);
        }
        keep(&mut self.model, &frame, "model");
        keep(&mut self.id, &frame, "id");
        let choices = match frame.remove("choices") {
            None | Some(Value::Null) => return Ok(()),
            Some(Value::Array(choices)) => choices,
            Some(_) => return Err(malformed("`choices` is no list")),
        };
        for choice in choices {
            let Value::Object(choice) = choice else {
                return Err(malformed("a choice that is no object"));
            };
            // Only one was asked for.
            if choice.get("index").and_then(Value::as_u64).unwrap_or(0) == 0 {
                self.choice(&choice, emit)?;
            }
        }
        Ok(())
    }

    fn choice(
        &mut self,
        choice: &Map<String, Value>,
        emit: &mut dyn FnMut(Delta),
    ) -> Result<(), Failure> {
        match choice.get("delta").or_else(|| choice.get("message")) {
            None | Some(Value::Null) => {}
            Some(Value::Object(said)) => self.said(said, emit)?,
            Some(_) => return Err(malformed("`delta` is no object")),
        }
        match choice.get("finish_reason") {
            None | Some(Value::Null) => {}
            Some(Value::String(reason)) if reason.is_empty() => {}
            Some(Value::String(reason)) => self.finish = Some(quote(reason, 64)),
            Some(_) => return Err(malformed("`finish_reason` is no text")),
        }
        Ok(())
    }

    fn said(
        &mut self,
        said: &Map<String, Value>,
        emit: &mut dyn FnMut(Delta),
    ) -> Result<(), Failure> {
        for key in ["reasoning_content", "reasoning"] {
            let thought = text(said.get(key), "reasoning")?;
            if !thought.is_empty() {
                self.reasoning.push_str(&thought);
                emit(Delta::Reasoning(thought));
                break;
            }
        }
        let content = text(said.get("content"), "content")?;
        if !content.is_empty() {
            self.text.push_str(&content);
            emit(Delta::Text(content));
        }
        self.refusal.push_str(&text(said.get("refusal"), "refusal")?);
        match said.get("tool_calls") {
            None | Some(Value::Null) => Ok(()),
            Some(Value::Array(calls)) => calls.iter().try_for_each(|call| self.call(call, emit)),
            Some(_) => Err(malformed("`tool_calls` is no list")),
        }
    }

    fn call(&mut self, piece: &Value, emit: &mut dyn FnMut(Delta)) -> Result<(), Failure> {
        if !piece.is_object() {
            return Err(malformed("a tool call that is no object"));
        }
        let function = &piece["function"];
        if !(function.is_object() || function.is_null()) {
            return Err(malformed("`function` of a tool call is no object"));
        }
        let id = text(piece.get("id"), "id of a tool call")?;
        let name = text(function.get("name"), "name of a tool call")?;
        let arguments = match function.get("arguments") {
            // Not in the protocol, but some endpoints write the object itself.
            Some(arguments @ Value::Object(_)) => arguments.to_string(),
            other => text(other, "arguments of a tool call")?,
        };
        let at = self.place(piece, &id)?;
        // Answers of tools find their calls by id: each needs one, and one of its own.
        let first_id = self.calls[at].id.is_none().then(|| {
            let taken = self.calls.iter().any(|other| other.id.as_ref() == Some(&id));
            if id.is_empty() || taken { fresh_call_id() } else { id }
        });
        let call = &mut self.calls[at];
        if let Some(id) = &first_id {
            call.id = Some(id.clone());
        }
        // Some repeat the whole name with every piece.
        let more = if call.name == name { String::new() } else { name };
        call.name.push_str(&more);
        call.arguments.push_str(&arguments);
        if first_id.is_some() || !more.is_empty() || !arguments.is_empty() {
            let name = (!more.is_empty()).then_some(more);
            emit(Delta::ToolCall { index: at, id: first_id, name, arguments });
        }
        Ok(())
    }

    /// Which call a piece belongs to: by its index, else by its id, else the last one.
    fn place(&mut self, piece: &Value, id: &str) -> Result<usize, Failure> {
        let at = match piece.get("index") {
            Some(Value::Number(index)) => index
                .as_u64()
                .and_then(|index| usize::try_from(index).ok())
                .ok_or_else(|| malformed("the index of a tool call is no whole number"))?,
            None | Some(Value::Null) => {
                let known = self.calls.iter().position(|call| call.id.as_deref() == Some(id));
                match (known, self.calls.len()) {
                    (Some(at), _) => at,
                    (None, 0) => 0,
                    // Whole calls without index: each is its own.
                    (None, count) if !id.is_empty() || !piece["function"]["name"].is_null() => {
                        count
                    }
                    (None, count) => count - 1,
                }
            }
            Some(_) => return Err(malformed("the index of a tool call is no number")),
        };
        if at >= MAX_CALLS {
            return Err(malformed(&format!("more than {MAX_CALLS} tool calls")));
        }
        if at >= self.calls.len() {
            self.calls.resize_with(at + 1, Call::default);
        }
        Ok(at)
    }

    /// The whole answer. `announced` says that the endpoint announced the end by itself.
    pub(super) fn finish(self, announced: bool) -> Result<Assembled, Failure> {
        let complete = self.finish.is_some() || (announced && self.begun());
        if !complete {
            let message = "the answer ended before the model had finished";
            return Err(Failure::new(FailureKind::Cut, message));
        }
        let finish_reason = self.finish.unwrap_or_else(|| "unknown".to_owned());
        let usage = Usage::read(self.usage.as_ref());
        let mut message = Message::new(Role::Ai, self.text);
        for call in self.calls {
            // A gap in the indexes is no call.
            if call.id.is_none() {
                continue;
            }
            match called(call.id, call.name, &call.arguments) {
                Ok(call) => message.tool_calls.push(call),
                Err(invalid) => message.invalid_tool_calls.push(invalid),
            }
        }
        for (key, text) in [("reasoning_content", self.reasoning), ("refusal", self.refusal)] {
            if !text.is_empty() {
                message.additional_kwargs.insert(key.to_owned(), text.into());
            }
        }
        message.response_metadata.insert("finish_reason".to_owned(), finish_reason.as_str().into());
        let model = self.model.map(|model| quote(&model, 256));
        for (key, value) in [("model_name", &model), ("id", &self.id.map(|id| quote(&id, 256)))] {
            if let Some(value) = value {
                message.response_metadata.insert(key.to_owned(), value.as_str().into());
            }
        }
        message.usage_metadata = usage.metadata();
        Ok(Assembled { message, finish_reason, usage, model })
    }
}

fn keep(place: &mut Option<String>, frame: &Map<String, Value>, key: &str) {
    if place.is_none() {
        let text = frame.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
        *place = text.map(str::to_owned);
    }
}

/// Text, or a list of parts of which the texts count.
fn text(value: Option<&Value>, what: &str) -> Result<String, Failure> {
    match value {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) if parts.iter().all(Value::is_object) => {
            let texts = parts.iter().filter(|part| part["type"] == "text");
            Ok(texts.filter_map(|part| part["text"].as_str()).collect())
        }
        Some(_) => Err(malformed(&format!("the {what} is no text"))),
    }
}

fn malformed(what: &str) -> Failure {
    Failure::new(
        FailureKind::Malformed,
        format!("the answer is not as the protocol wants it: {what}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn assembled(frames: &[Value]) -> Result<(Assembled, Vec<Delta>), FailureKind> {
        let mut assembly = Assembly::default();
        let mut deltas = Vec::new();
        for frame in frames {
            let mut emit = |delta| deltas.push(delta);
            let fed = assembly.feed(frame.clone(), &Redactor::default(), &mut emit);
            fed.map_err(|failure| failure.kind)?;
        }
        let answer = assembly.finish(false).map_err(|failure| failure.kind)?;
        Ok((answer, deltas))
    }

    fn delta(delta: Value) -> Value {
        json!({"id": "c1", "model": "m-1", "choices": [{"index": 0, "delta": delta, "finish_reason": null}]})
    }

    fn stop(reason: &str) -> Value {
        json!({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    }

    fn calls(frames: &[Value]) -> Vec<(String, String, Value)> {
        let (answer, _) = assembled(frames).unwrap();
        let calls = answer.message.tool_calls.into_iter();
        calls.map(|call| (call.id, call.name, Value::Object(call.args))).collect()
    }

    #[test]
    fn pieces_become_one_message_with_all_that_is_known_about_it() {
        let usage = json!({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}});
        let (answer, deltas) = assembled(&[
            delta(json!({"role": "assistant", "content": ""})),
            delta(json!({"reasoning_content": "hm"})),
            delta(json!({"content": "Hel"})),
            delta(json!({"content": [{"type": "text", "text": "lo"}]})),
            stop("stop"),
            usage,
        ])
        .unwrap();
        assert_eq!(answer.message.text(), "Hello");
        assert_eq!((answer.finish_reason.as_str(), answer.usage.total), ("stop", 5));
        assert_eq!(answer.message.additional_kwargs["reasoning_content"], "hm");
        assert_eq!(answer.message.response_metadata["model_name"], "m-1");
        assert_eq!(answer.message.usage_metadata.unwrap()["input_tokens"], 3);
        let text = |text: &str| Delta::Text(text.to_owned());
        assert_eq!(deltas, [Delta::Reasoning("hm".to_owned()), text("Hel"), text("lo")]);
    }

    #[test]
    fn tool_calls_are_put_together_as_servers_write_them() {
        let piece = |fields: Value| delta(json!({"tool_calls": [fields]}));
        let expected = [
            ("a".to_owned(), "look".to_owned(), json!({"at": 1})),
            ("b".to_owned(), "wait".to_owned(), json!({})),
        ];
        let by_index = [
            piece(json!({"index": 0, "id": "a", "function": {"name": "look", "arguments": ""}})),
            piece(json!({"index": 1, "id": "b", "function": {"name": "wait", "arguments": "{}"}})),
            piece(json!({"index": 0, "function": {"name": "look", "arguments": "{\"at\""}})),
            piece(json!({"index": 0, "function": {"arguments": ": 1}"}})),
            stop("tool_calls"),
        ];
        assert_eq!(calls(&by_index), expected);
        let without_index = [
            piece(json!({"id": "a", "function": {"name": "look", "arguments": {"at": 1}}})),
            piece(json!({"id": "b", "function": {"name": "wait", "arguments": null}})),
            stop("stop"),
        ];
        assert_eq!(calls(&without_index), expected);
        let whole = json!({"choices": [{"message": {"content": null, "tool_calls": [
            {"id": "a", "function": {"name": "look", "arguments": "{\"at\": 1}"}},
            {"id": "b", "function": {"name": "wait", "arguments": ""}}]}, "finish_reason": "tool_calls"}]});
        assert_eq!(calls(&[whole]), expected);
    }

    #[test]
    fn every_call_has_an_id_of_its_own_from_its_first_piece_on() {
        let piece = |fields: Value| delta(json!({"tool_calls": [fields]}));
        let call = |index: usize, id: Value| {
            piece(json!({"index": index, "id": id, "function": {"name": "f", "arguments": "{}"}}))
        };
        let frames = [
            call(0, json!("call_0")),
            call(1, json!("call_0")),
            call(2, json!(null)),
            stop("stop"),
        ];
        let (answer, deltas) = assembled(&frames).unwrap();
        let ids: Vec<_> = answer.message.tool_calls.iter().map(|call| call.id.clone()).collect();
        let streamed: Vec<_> = deltas
            .iter()
            .filter_map(|delta| match delta {
                Delta::ToolCall { id, .. } => id.clone(),
                _ => None,
            })
            .collect();
        assert_eq!(ids, streamed);
        assert!(ids[0] == "call_0" && ids[1] != "call_0" && ids[2] != ids[1], "{ids:?}");
    }

    #[test]
    fn broken_arguments_are_no_failure() {
        let (answer, _) = assembled(&[
            delta(json!({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{\"x\": "}}]})),
            delta(json!({"tool_calls": [{"index": 2, "id": "", "function": {"name": "g", "arguments": "[1]"}}]})),
            stop("length"),
        ])
        .unwrap();
        assert!(answer.message.tool_calls.is_empty());
        let invalid = &answer.message.invalid_tool_calls;
        assert_eq!((invalid.len(), invalid[0].args.as_str()), (2, "{\"x\": "));
        assert!(
            invalid[0].error.contains("no JSON") && invalid[1].error.contains("no JSON object")
        );
        assert!(invalid[1].id.starts_with("call_"));
    }

    #[test]
    fn wrong_types_are_malformed_and_an_early_end_is_a_cut() {
        for frame in [
            json!([]),
            json!({"choices": "x"}),
            json!({"choices": [1]}),
            json!({"choices": [{"delta": "x"}]}),
            json!({"choices": [{"delta": {"content": 7}}]}),
            json!({"choices": [{"delta": {"tool_calls": {}}}]}),
            json!({"choices": [{"delta": {"tool_calls": [7]}}]}),
            json!({"choices": [{"delta": {"tool_calls": [{"function": "f"}]}}]}),
            json!({"choices": [{"delta": {"tool_calls": [{"index": -1}]}}]}),
            json!({"choices": [{"delta": {"tool_calls": [{"index": 1_000_000_000}]}}]}),
            json!({"choices": [{"finish_reason": 1}]}),
        ] {
            assert_eq!(
                assembled(std::slice::from_ref(&frame)).unwrap_err(),
                FailureKind::Malformed,
                "{frame}"
            );
        }
        assert_eq!(assembled(&[delta(json!({"content": "x"}))]).unwrap_err(), FailureKind::Cut);
        assert_eq!(assembled(&[]).unwrap_err(), FailureKind::Cut);
        let mut announced = Assembly::default();
        announced.feed(delta(json!({"content": "x"})), &Redactor::default(), &mut |_| ()).unwrap();
        assert_eq!(announced.finish(true).unwrap().finish_reason, "unknown");
    }
}
