//! What a tool gave: read from the JSON of its answer, whatever wire that came over.

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

/// What a tool gave.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ToolResult {
    /// The structured result; it fits the tool's output schema, when the tool has one.
    pub structured: Option<Value>,
    /// The parts for a model or a person, in order.
    pub content: Vec<ContentPart>,
    /// Whether the tool says that it failed. The content then tells why.
    pub is_error: bool,
    /// Bytes of the result's JSON as it came.
    pub bytes: usize,
    /// How many notes of progress were left out because they came too fast.
    pub progress_left_out: u64,
}

/// One part of a result.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ContentPart {
    /// A text.
    Text {
        /// The text.
        text: String,
    },
    /// An image or a sound, or a binary resource, as a `data:` URL.
    Data {
        /// `data:MEDIA/TYPE;base64,..`
        url: String,
        /// Its media type.
        media_type: String,
        /// Where the server has it, for resources.
        uri: Option<String>,
    },
    /// Something that the server has and that can be asked for.
    Link {
        /// Where.
        uri: String,
        /// What it is called.
        name: Option<String>,
        /// Its media type.
        media_type: Option<String>,
    },
    /// A resource that came along as text.
    Resource {
        /// Where the server has it.
        uri: String,
        /// The text.
        text: String,
        /// Its media type.
        media_type: Option<String>,
    },
}

/// The answer to a call, as far as it can be told without the schemas.
#[derive(Debug, PartialEq)]
pub(super) enum Answer {
    /// A result.
    Complete { structured: Option<Value>, content: Vec<ContentPart>, is_error: bool },
    /// The server wants something from the client first.
    InputRequired,
    /// What came is no result of a tool.
    Nonsense(String),
}

impl ToolResult {
    /// All texts of the content, one after the other.
    #[must_use]
    pub fn text(&self) -> String {
        let texts = self.content.iter().filter_map(|part| match part {
            ContentPart::Text { text } | ContentPart::Resource { text, .. } => Some(text.as_str()),
            _ => None,
        });
        texts.collect::<Vec<_>>().join("\n")
    }
}

impl Answer {
    /// Reads the `result` of a response to `tools/call`.
    pub(super) fn read(result: Value) -> Self {
        match result["resultType"].as_str() {
            None | Some("complete") => {}
            Some("input_required") => return Self::InputRequired,
            Some(other) => return Self::Nonsense(format!("a result of the type {other}")),
        }
        let Value::Object(mut result) = result else {
            return Self::Nonsense("a result that is no object".to_owned());
        };
        let content = match result.remove("content") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(parts)) => {
                match parts.into_iter().map(part).collect::<Result<_, _>>() {
                    Ok(parts) => parts,
                    Err(problem) => return Self::Nonsense(problem),
                }
            }
            Some(_) => return Self::Nonsense("a content that is no list".to_owned()),
        };
        let is_error = result.get("isError").and_then(Value::as_bool).unwrap_or(false);
        Self::Complete { structured: result.remove("structuredContent"), content, is_error }
    }
}

fn part(value: Value) -> Result<ContentPart, String> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let needed = |value: &Value, what: &str| {
        text(value).ok_or_else(|| format!("a part of the content without its {what}"))
    };
    match value["type"].as_str() {
        Some("text") => Ok(ContentPart::Text { text: needed(&value["text"], "text")? }),
        Some("image" | "audio") => {
            data(&needed(&value["data"], "data")?, text(&value["mimeType"]), None)
        }
        Some("resource_link") => Ok(ContentPart::Link {
            uri: needed(&value["uri"], "uri")?,
            name: text(&value["name"]),
            media_type: text(&value["mimeType"]),
        }),
        Some("resource") => {
            let inner = &value["resource"];
            let (uri, media_type) = (needed(&inner["uri"], "uri")?, text(&inner["mimeType"]));
            match (text(&inner["text"]), text(&inner["blob"])) {
                (Some(text), _) => Ok(ContentPart::Resource { uri, text, media_type }),
                (None, Some(blob)) => data(&blob, media_type, Some(uri)),
                (None, None) => Err("a resource without its text or blob".to_owned()),
            }
        }
        // What a later version of the protocol brings is shown as it is, rather than lost.
        Some(_) => Ok(ContentPart::Text { text: value.to_string() }),
        None => Err("a part of the content without a type".to_owned()),
    }
}

fn data(
    base64: &str,
    media_type: Option<String>,
    uri: Option<String>,
) -> Result<ContentPart, String> {
    let media_type = media_type.unwrap_or_else(|| "application/octet-stream".to_owned());
    let plain = |c: char| c.is_ascii_alphanumeric() || "!#$&^_.+-/; =".contains(c);
    if !media_type.chars().all(plain) {
        return Err("a media type that is none".to_owned());
    }
    if !base64.bytes().all(|b| b.is_ascii_alphanumeric() || b"+/=-_\r\n".contains(&b)) {
        return Err("data that is not base64".to_owned());
    }
    Ok(ContentPart::Data { url: format!("data:{media_type};base64,{base64}"), media_type, uri })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parts(content: Value) -> Vec<ContentPart> {
        match Answer::read(json!({"content": content})) {
            Answer::Complete { content, .. } => content,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_kind_of_part_is_read() {
        let found = parts(json!([
            {"type": "text", "text": "a"},
            {"type": "image", "data": "aGk=", "mimeType": "image/png"},
            {"type": "resource_link", "uri": "file:///x", "name": "x"},
            {"type": "resource", "resource": {"uri": "u", "text": "t"}},
            {"type": "resource", "resource": {"uri": "u", "blob": "aGk="}},
            {"type": "novel", "x": 1},
        ]));
        assert_eq!(found[0], ContentPart::Text { text: "a".into() });
        let ContentPart::Data { url, .. } = &found[1] else { panic!("no data") };
        assert_eq!(url, "data:image/png;base64,aGk=");
        assert!(matches!(&found[2], ContentPart::Link { uri, .. } if uri == "file:///x"));
        assert!(matches!(&found[3], ContentPart::Resource { text, .. } if text == "t"));
        assert!(matches!(&found[4], ContentPart::Data { uri: Some(uri), .. } if uri == "u"));
        assert!(matches!(&found[5], ContentPart::Text { text } if text.contains("novel")));
    }

    #[test]
    fn nonsense_is_named() {
        let check = |result: Value| {
            assert!(matches!(Answer::read(result.clone()), Answer::Nonsense(_)), "{result}");
        };
        check(json!(1));
        check(json!({"content": 1}));
        check(json!({"content": [1]}));
        check(json!({"content": [{"type": "text"}]}));
        check(json!({"content": [{"type": "image", "data": "a b", "mimeType": "x"}]}));
        check(json!({"content": [{"type": "image", "data": "aa", "mimeType": "x,y"}]}));
        check(json!({"resultType": "task"}));
        assert_eq!(Answer::read(json!({"resultType": "input_required"})), Answer::InputRequired);
    }

    #[test]
    fn a_null_is_a_structured_result() {
        let null = Answer::read(json!({"structuredContent": null}));
        assert!(matches!(null, Answer::Complete { structured: Some(Value::Null), .. }));
        let none = Answer::read(json!({}));
        assert!(matches!(none, Answer::Complete { structured: None, .. }));
    }
}
