//! What a message says: text, or parts of which some are images.
//!
//! Parts are kept as they came, so that a state reads back what was written into it. Only when they go to
//! an endpoint are they put into OpenAI's form, and only then is it judged whether they can go.

use serde_json::{Map, Value, json};

use super::read::MessageError;

/// What a message says.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// Text.
    Text(String),
    /// Parts in LangChain's or OpenAI's form: objects with a `type`, or bare texts.
    Parts(Vec<Value>),
}

impl Content {
    pub(super) fn read(value: Option<&Value>) -> Result<Self, MessageError> {
        match value {
            None | Some(Value::Null) => Ok(Self::Text(String::new())),
            Some(Value::String(text)) => Ok(Self::Text(text.clone())),
            Some(Value::Array(parts)) => {
                let readable = |part: &Value| part.is_string() || part["type"].is_string();
                if let Some(at) = parts.iter().position(|part| !readable(part)) {
                    return Err(MessageError::new(
                        format!("content[{at}]"),
                        "a part is a text or an object with a `type`, such as {\"type\": \"text\", \"text\": ..}",
                    ));
                }
                Ok(Self::Parts(parts.clone()))
            }
            Some(_) => Err(MessageError::new("content", "must be a text or a list of parts")),
        }
    }

    pub(super) fn to_value(&self) -> Value {
        match self {
            Self::Text(text) => Value::String(text.clone()),
            Self::Parts(parts) => Value::Array(parts.clone()),
        }
    }

    pub(super) fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Parts(parts) => parts.iter().filter_map(text_of).collect(),
        }
    }

    /// OpenAI's form. A model's own parts that only its maker understands (thoughts, calls) are left out.
    pub(super) fn to_openai(&self, of_model: bool) -> Result<Value, MessageError> {
        let parts = match self {
            Self::Text(text) => return Ok(Value::String(text.clone())),
            Self::Parts(parts) => parts,
        };
        // Many endpoints take parts only where there is more than text.
        if of_model || parts.iter().all(|part| text_of(part).is_some()) {
            return Ok(Value::String(self.text()));
        }
        let written = parts.iter().enumerate().map(|(at, part)| {
            part_to_openai(part).map_err(|(inner, problem)| {
                let dot = if inner.is_empty() { "" } else { "." };
                MessageError::new(format!("content[{at}]{dot}{inner}"), problem)
            })
        });
        written.collect::<Result<Vec<Value>, _>>().map(Value::Array)
    }
}

fn text_of(part: &Value) -> Option<&str> {
    match part {
        Value::String(text) => Some(text),
        _ if matches!(part["type"].as_str(), Some("text" | "input_text" | "output_text")) => {
            part["text"].as_str()
        }
        _ => None,
    }
}

type PartProblem = (&'static str, String);

fn part_to_openai(part: &Value) -> Result<Value, PartProblem> {
    if let Some(text) = text_of(part) {
        return Ok(json!({ "type": "text", "text": text }));
    }
    match part["type"].as_str().unwrap_or_default() {
        "image_url" => image_url(part),
        "image" => image(part),
        other => Err((
            "type",
            format!("a part of type {other:?} cannot be sent to a model; text and images can"),
        )),
    }
}

/// `{type: image_url, image_url: {url, detail} | URL}`.
fn image_url(part: &Value) -> Result<Value, PartProblem> {
    let image = &part["image_url"];
    let Some(url) = image.as_str().or_else(|| image["url"].as_str()) else {
        return Err(("image_url", "must be a URL or an object with a `url`".to_owned()));
    };
    let mut written = Map::from_iter([("url".to_owned(), reference(url, "image_url")?.into())]);
    if let Some(detail) = image.get("detail").filter(|detail| detail.is_string()) {
        written.insert("detail".to_owned(), detail.clone());
    }
    Ok(json!({ "type": "image_url", "image_url": written }))
}

/// LangChain's own: `{type: image, url}`, or `{type: image, base64 | data, mime_type}`.
fn image(part: &Value) -> Result<Value, PartProblem> {
    let text = |key: &str| part.get(key).and_then(Value::as_str);
    let url = match (text("url"), text("base64").or_else(|| text("data")), text("mime_type")) {
        (Some(url), ..) => reference(url, "url")?,
        (None, Some(data), Some(kind)) => {
            reference(&format!("data:{kind};base64,{data}"), "base64")?
        }
        (None, Some(_), None) => {
            return Err((
                "mime_type",
                "an image's data needs its type, such as image/png".to_owned(),
            ));
        }
        _ => return Err(("", not_by_reference())),
    };
    Ok(json!({ "type": "image_url", "image_url": { "url": url } }))
}

/// An address that an endpoint can read by itself.
fn reference(url: &str, field: &'static str) -> Result<String, PartProblem> {
    let scheme = url.split_once(':').map_or("", |(scheme, _)| scheme).to_ascii_lowercase();
    match scheme.as_str() {
        "http" | "https" => Ok(url.to_owned()),
        "data" => {
            let form =
                || (field, "a data URL of an image is data:image/TYPE;base64,DATA".to_owned());
            let (head, data) = url.split_once(',').ok_or_else(form)?;
            let head = head.to_ascii_lowercase();
            let base64 = |b: u8| b.is_ascii_alphanumeric() || b"+/=-_".contains(&b);
            let well_formed = head.starts_with("data:image/")
                && head.ends_with(";base64")
                && !data.is_empty()
                && data.bytes().all(base64);
            if well_formed { Ok(url.to_owned()) } else { Err(form()) }
        }
        _ => Err((field, not_by_reference())),
    }
}

fn not_by_reference() -> String {
    "an image is sent as an http(s) or data: URL; a reference to an artifact or a file cannot be sent \
     to a model yet"
        .to_owned()
}
