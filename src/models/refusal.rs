//! What an endpoint's refusal means: from its status and its words to a kind of failure.
//!
//! The statuses are the protocol's; the words are those of the servers that are in use. A word that is
//! not known makes no failure worse than the status says.

use serde_json::Value;

use super::failure::{Failure, FailureKind, Refused};
use super::redact::Redactor;

/// For an answer with an error's status.
pub(super) fn of_status(status: u16, body: &[u8], redactor: &Redactor) -> Failure {
    let told = serde_json::from_slice::<Value>(body).unwrap_or(Value::Null);
    let text = if told.is_null() {
        let text = String::from_utf8_lossy(body);
        // A web page explains nothing in its first line.
        if text.trim_start().starts_with('<') { String::new() } else { text.into_owned() }
    } else {
        words(&told)
    };
    judge(status, &told, &text, redactor)
}

/// For an `error` inside of a stream or of a 200.
pub(super) fn of_error(error: &Value, redactor: &Redactor) -> Failure {
    let told = serde_json::json!({ "error": error });
    let number = |key: &str| {
        let value = &error[key];
        let number = value.as_u64().or_else(|| value.as_str()?.parse().ok())?;
        u16::try_from(number).ok().filter(|status| (400..600).contains(status))
    };
    let by_words = || {
        let kind = [&error["type"], &error["code"]].map(|word| word.as_str().unwrap_or_default());
        let says = |word: &str| kind.iter().any(|kind| kind.contains(word));
        if says("rate_limit") || says("insufficient_quota") {
            429
        } else if says("invalid_request") || says("exceed_context") || says("context_length") {
            400
        } else if says("auth") || says("permission") {
            401
        } else {
            500
        }
    };
    let status = number("code").or_else(|| number("status")).unwrap_or_else(by_words);
    judge(status, &told, &words(&told), redactor)
}

/// `{error: {message}}`, `{error: ".."}`, `{message}`, `{detail}`: the usual places.
fn words(told: &Value) -> String {
    let places = [
        &told["error"]["message"],
        &told["error"],
        &told["message"],
        &told["detail"],
        &told["msg"],
    ];
    let found = places.iter().find_map(|place| place.as_str());
    found.map_or_else(|| told.to_string(), str::to_owned)
}

fn judge(status: u16, told: &Value, text: &str, redactor: &Redactor) -> Failure {
    let error = &told["error"];
    let word = |key: &str| error[key].as_str().or(told[key].as_str()).unwrap_or_default();
    let known = format!("{} {} {}", word("type"), word("code"), text).to_ascii_lowercase();
    let kind = match status {
        _ if speaks_of_context(&known) => FailureKind::ContextLength,
        401 | 403 => FailureKind::Unauthorized,
        402 => FailureKind::QuotaExceeded,
        429 if known.contains("insufficient_quota") || known.contains("billing") => {
            FailureKind::QuotaExceeded
        }
        429 => FailureKind::RateLimited,
        404 | 405 | 300..=399 => FailureKind::NotFound,
        501 => FailureKind::Unsupported,
        408 | 409 | 425 | 500.. => FailureKind::Overloaded,
        _ if speaks_of_ability(&known) => FailureKind::Unsupported,
        _ => FailureKind::BadRequest,
    };
    let hint = match status {
        300..=399 => "; redirects are not followed: `url` must be the final address",
        404 => "; is the model's name right, and does `url` end where the API begins (often /v1)?",
        _ => "",
    };
    let text = redactor.clean(text);
    let colon = if text.is_empty() { "" } else { ": " };
    let mut failure = Failure::new(kind, format!("status {status}{colon}{text}{hint}"));
    if matches!(kind, FailureKind::BadRequest | FailureKind::Unsupported) {
        failure.refused = refused(word("param"), &known.replace("upstream", ""));
    }
    failure
}

fn speaks_of_context(text: &str) -> bool {
    let phrases = [
        "context_length_exceeded",
        "exceed_context_size",
        "maximum context length",
        "context length exceeded",
        "exceeds the context",
        "exceeds the available context",
        "exceed the context",
        "context window",
        "prompt is too long",
        "input is too long",
        "too many input tokens",
    ];
    phrases.iter().any(|phrase| text.contains(phrase))
}

fn speaks_of_ability(text: &str) -> bool {
    let phrases =
        ["not support", "n't support", "unsupported", "not implemented", "not available for"];
    phrases.iter().any(|phrase| text.contains(phrase))
}

/// Which part of the request it does not want, when it says so.
fn refused(param: &str, text: &str) -> Option<Refused> {
    let about = |words: &[&str]| words.iter().any(|word| param == *word || text.contains(word));
    if about(&["max_completion_tokens"]) {
        Some(Refused::MaxTokens)
    } else if about(&["stream_options", "include_usage"]) {
        Some(Refused::StreamOptions)
    } else if about(&[
        "response_format",
        "json_schema",
        "json_object",
        "structured output",
        "guided",
    ]) {
        Some(Refused::ResponseFormat)
    } else if about(&["stream"]) {
        Some(Refused::Stream)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_and_words_become_kinds() {
        let check = |status: u16, body: &str, kind: FailureKind, refused: Option<Refused>| {
            let failure = of_status(status, body.as_bytes(), &Redactor::default());
            assert_eq!((failure.kind, failure.refused), (kind, refused), "{status} {body}");
        };
        use FailureKind as K;
        check(
            400,
            r#"{"error":{"message":"no","code":"context_length_exceeded"}}"#,
            K::ContextLength,
            None,
        );
        check(
            400,
            r#"{"error":{"message":"x","type":"exceed_context_size_error"}}"#,
            K::ContextLength,
            None,
        );
        check(
            400,
            r#"{"error":"This model's maximum context length is 8"}"#,
            K::ContextLength,
            None,
        );
        check(
            400,
            r#"{"error":{"message":"bad","param":"stream"}}"#,
            K::BadRequest,
            Some(Refused::Stream),
        );
        check(
            422,
            r#"{"detail":"streaming is not supported"}"#,
            K::Unsupported,
            Some(Refused::Stream),
        );
        check(501, "stream: not implemented", K::Unsupported, Some(Refused::Stream));
        check(
            400,
            r#"{"error":{"message":"unknown field stream_options"}}"#,
            K::BadRequest,
            Some(Refused::StreamOptions),
        );
        check(
            400,
            r#"{"error":{"message":"Use 'max_completion_tokens' instead","param":"max_tokens"}}"#,
            K::BadRequest,
            Some(Refused::MaxTokens),
        );
        check(
            400,
            r#"{"error":{"message":"response_format is not supported"}}"#,
            K::Unsupported,
            Some(Refused::ResponseFormat),
        );
        check(400, "<html>", K::BadRequest, None);
        check(302, "", K::NotFound, None);
        check(405, "", K::NotFound, None);
        check(400, r#"{"error":"this model does not support tools"}"#, K::Unsupported, None);
        check(401, "", K::Unauthorized, None);
        check(403, "{}", K::Unauthorized, None);
        check(404, r#"{"error":{"message":"no such model"}}"#, K::NotFound, None);
        check(429, r#"{"error":{"message":"slow down"}}"#, K::RateLimited, None);
        check(429, r#"{"error":{"type":"insufficient_quota"}}"#, K::QuotaExceeded, None);
        check(500, "[1]", K::Overloaded, None);
        check(503, r#"{"error":{"message":"Loading model"}}"#, K::Overloaded, None);
    }

    #[test]
    fn an_error_in_a_stream_is_judged_like_a_status() {
        let check = |error: Value, kind: FailureKind| {
            assert_eq!(of_error(&error, &Redactor::default()).kind, kind, "{error}");
        };
        use serde_json::json;
        check(json!({"message": "x", "code": 429}), FailureKind::RateLimited);
        check(json!({"message": "x", "code": "503"}), FailureKind::Overloaded);
        check(json!({"message": "x", "type": "invalid_request_error"}), FailureKind::BadRequest);
        check(json!({"message": "x", "type": "server_error"}), FailureKind::Overloaded);
        check(json!("it broke"), FailureKind::Overloaded);
        check(json!(7), FailureKind::Overloaded);
    }

    #[test]
    fn a_web_page_is_not_quoted_and_a_key_is_hidden() {
        let mut redactor = Redactor::default();
        redactor.hide("sk-secret".into());
        let failure =
            of_status(401, br#"{"error":{"message":"Incorrect key sk-secret"}}"#, &redactor);
        assert_eq!(failure.message, "status 401: Incorrect key [redacted]");
        assert_eq!(of_status(500, b" <html><body>", &redactor).message, "status 500");
    }
}
