//! Both written forms, in both directions.

use serde_json::{Value, json};

use super::*;
use crate::models::answer::Delta;

fn read(value: Value) -> Message {
    Message::read(&value).unwrap()
}

fn refused(value: Value, field: &str, problem: &str) {
    let err = Message::read(&value).unwrap_err();
    assert!(err.field == field && err.problem.contains(problem), "{value}: {err}");
}

#[test]
fn all_forms_of_a_persons_message_are_the_same_message() {
    let expected = Message::new(Role::Human, "hi");
    for form in [
        json!("hi"),
        json!(["user", "hi"]),
        json!(["human", "hi"]),
        json!({"role": "user", "content": "hi"}),
        json!({"type": "human", "content": "hi"}),
        json!({"role": "human", "content": "hi"}),
        json!({"type": "human", "content": "hi", "id": null, "name": null, "example": false,
            "additional_kwargs": {}, "response_metadata": {}}),
        json!({"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", "HumanMessage"],
            "kwargs": {"content": "hi"}}),
    ] {
        assert_eq!(read(form.clone()), expected, "{form}");
    }
    assert_eq!(read(json!({"role": "developer", "content": "x"})).role, Role::System);
    assert_eq!(read(json!({"type": "AIMessageChunk", "content": "x"})).role, Role::Ai);
}

#[test]
fn what_is_no_message_is_refused_with_its_field() {
    refused(json!(7), "", "an object");
    refused(json!(["user"]), "", "[ROLE, CONTENT]");
    refused(json!({"content": "x"}), "role", "who speaks");
    refused(json!({"role": "function", "content": "x"}), "role", "does not speak");
    refused(json!({"type": "remove", "id": "x"}), "type", "does not speak");
    refused(json!({"role": "user", "content": 7}), "content", "a text or a list");
    refused(
        json!({"role": "user", "content": ["a", {"text": "x"}]}),
        "content[1]",
        "with a `type`",
    );
    refused(json!({"role": "tool", "content": "x"}), "tool_call_id", "names the call");
    refused(json!({"role": "user", "content": "x", "id": 7}), "id", "must be a text");
    refused(json!({"role": "assistant", "tool_calls": {}}), "tool_calls", "must be a list");
    refused(
        json!({"type": "ai", "tool_calls": [{"args": {}}]}),
        "tool_calls[0].name",
        "names its tool",
    );
    refused(
        json!({"type": "ai", "tool_calls": [{"name": "f", "args": 1}]}),
        "tool_calls[0].args",
        "object",
    );
    let many = vec![json!({"name": "f", "args": {}}); 257];
    refused(json!({"type": "ai", "tool_calls": many}), "tool_calls", "at most 256");
}

#[test]
fn tool_calls_go_from_openai_to_langchain_and_back() {
    let wire = json!({"role": "assistant", "content": null, "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{\"at\":1}"}},
        {"id": "b", "type": "function", "function": {"name": "wait", "arguments": "{\"for\":"}},
    ]});
    let message = read(wire.clone());
    let written = message.to_langchain();
    assert_eq!(
        written["tool_calls"],
        json!([{"name": "look", "args": {"at": 1}, "id": "a", "type": "tool_call"}])
    );
    let invalid = &written["invalid_tool_calls"][0];
    assert_eq!(
        (&invalid["args"], &invalid["type"]),
        (&json!("{\"for\":"), &json!("invalid_tool_call"))
    );
    assert!(invalid["error"].as_str().unwrap().contains("no JSON"));
    assert_eq!(written["content"], "");
    assert_eq!(read(written).to_openai().unwrap(), wire);
}

#[test]
fn broken_calls_of_all_kinds_are_kept_apart() {
    let check = |arguments: Value, expected: Result<Value, &str>| {
        let message = read(json!({"role": "assistant", "tool_calls": [
            {"id": "a", "function": {"name": "f", "arguments": arguments}}]}));
        match expected {
            Ok(args) => assert_eq!(Value::Object(message.tool_calls[0].args.clone()), args),
            Err(error) => {
                assert!(message.tool_calls.is_empty());
                assert!(message.invalid_tool_calls[0].error.contains(error), "{message:?}");
            }
        }
    };
    check(json!(""), Ok(json!({})));
    check(json!(null), Ok(json!({})));
    check(json!({"x": 1}), Ok(json!({"x": 1})));
    check(json!("[1]"), Err("no JSON object"));
    check(json!("{\"a\": \"\\ud800\"}"), Err("no JSON"));
    check(json!("[".repeat(100_000)), Err("no JSON"));
    let unnamed =
        read(json!({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}));
    assert_eq!(unnamed.invalid_tool_calls[0].error, "the call names no tool");
    assert!(unnamed.invalid_tool_calls[0].id.starts_with("call_"));
    let old = read(json!({"type": "ai", "content": "", "additional_kwargs": {"tool_calls": [
        {"id": "a", "function": {"name": "f", "arguments": "{}"}}]}}));
    assert_eq!(old.tool_calls[0].name, "f");
}

#[test]
fn langchains_form_is_kept_to_the_last_field() {
    let ai = json!({"content": [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "t"}],
        "additional_kwargs": {"reasoning_content": "r"}, "response_metadata": {"model_name": "m"},
        "type": "ai", "name": "ann", "id": "run-1", "tool_calls": [], "invalid_tool_calls": [],
        "usage_metadata": {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}});
    assert_eq!(read(ai.clone()).to_langchain(), ai);
    let tool = json!({"content": "done", "additional_kwargs": {}, "response_metadata": {}, "type": "tool",
        "name": "look", "id": "t1", "tool_call_id": "a", "artifact": {"x": 1}, "status": "error"});
    assert_eq!(read(tool.clone()).to_langchain(), tool);
    assert_eq!(serde_json::to_value(read(tool.clone())).unwrap(), tool);
    let plain = Message::tool("a", "done").to_langchain();
    assert_eq!((&plain["status"], &plain["type"]), (&json!("success"), &json!("tool")));
}

#[test]
fn an_endpoint_gets_text_and_images_in_its_own_form() {
    let check = |content: Value, expected: Result<Value, &str>| {
        let message = read(json!({"role": "user", "content": content}));
        let found = message.to_openai();
        match expected {
            Ok(content) => assert_eq!(found.unwrap()["content"], content),
            Err(expected) => {
                let err = found.unwrap_err().to_string();
                assert!(err.contains(expected), "{err}");
            }
        }
    };
    let url = |url: &str| json!([{"type": "image_url", "image_url": {"url": url}}]);
    check(json!("hi"), Ok(json!("hi")));
    check(json!(["a", {"type": "text", "text": "b"}]), Ok(json!("ab")));
    check(url("https://h/x.png"), Ok(url("https://h/x.png")));
    check(json!([{"type": "image_url", "image_url": "http://h/x"}]), Ok(url("http://h/x")));
    check(json!([{"type": "image", "url": "https://h/x"}]), Ok(url("https://h/x")));
    let data = url("data:image/png;base64,AA==");
    check(json!([{"type": "image", "base64": "AA==", "mime_type": "image/png"}]), Ok(data.clone()));
    let old = json!([{"type": "image", "source_type": "base64", "data": "AA==", "mime_type": "image/png"}]);
    check(old, Ok(data));
    check(json!([{"type": "image", "base64": "AA=="}]), Err("content[0].mime_type: "));
    check(json!([{"type": "image", "file_id": "f"}]), Err("content[0]: an image is sent as"));
    check(json!(["a", {"type": "image", "artifact": "x"}]), Err("content[1]: an image is sent as"));
    check(url("artifact:x"), Err("content[0].image_url: an image is sent as"));
    check(json!([{"type": "audio"}]), Err("content[0].type: a part of type \"audio\""));
}

#[test]
fn pieces_are_written_as_chunks_with_one_id() {
    let writer = ChunkWriter::new("run-1");
    let text = writer.piece(&Delta::Text("Hel".to_owned())).unwrap();
    assert_eq!((&text["type"], &text["content"]), (&json!("AIMessageChunk"), &json!("Hel")));
    assert_eq!((&text["id"], &text["chunk_position"]), (&json!("run-1"), &Value::Null));
    let call = Delta::ToolCall {
        index: 1,
        id: Some("a".to_owned()),
        name: Some("f".to_owned()),
        arguments: "{".to_owned(),
    };
    assert_eq!(
        writer.piece(&call).unwrap()["tool_call_chunks"],
        json!([{"name": "f", "args": "{", "id": "a", "index": 1, "type": "tool_call_chunk"}])
    );
    assert_eq!(writer.piece(&Delta::Restart), None);
    let mut whole = Message::new(Role::Ai, "Hello");
    whole.usage_metadata = Some(json!({"total_tokens": 3}));
    let last = writer.last(&whole);
    assert_eq!((&last["chunk_position"], &last["content"]), (&json!("last"), &json!("")));
    assert_eq!(last["usage_metadata"]["total_tokens"], 3);
}
