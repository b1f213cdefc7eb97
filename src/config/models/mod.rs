//! The `models` section of the configuration: which model endpoints there are, and the names by which
//! graphs ask for a model.
//!
//! The section is read by serde and then checked as a whole by [`ModelsConfig::check`]; a mistake names
//! the field by its path and says which form is right.
//!
//! **Invariant:** no key stands here, only where one is kept; and neither `Debug` nor an error shows a
//! URL's user, password or query, or a header's value.

mod forms;

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use reqwest::header::{HeaderName, HeaderValue};
use serde::Deserialize;

use forms::duration;
pub use forms::{EndpointUrl, HeaderSource, KeySource, Size};

/// How many endpoints, and how many routes, one configuration may name.
const MAX_ENTRIES: usize = 256;
/// How many candidates one route may have.
const MAX_CANDIDATES: usize = 16;
/// How many headers one endpoint may have.
const MAX_HEADERS: usize = 32;
const MAX_NAME_BYTES: usize = 64;
const MAX_MODEL_BYTES: usize = 256;
const PATIENCE: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(7200);
const ANSWER_BYTES: RangeInclusive<usize> = 1 << 10..=64 << 20;
/// Headers that a call sets itself.
const OWN_HEADERS: [&str; 8] = [
    "host",
    "content-type",
    "content-length",
    "content-encoding",
    "transfer-encoding",
    "connection",
    "accept-encoding",
    "idempotency-key",
];

/// A value of the `models` section that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct ModelsConfigError {
    /// The field's path, such as `models.endpoints.local.timeouts.idle`.
    pub field: String,
    /// What is wrong, and what would be right.
    pub problem: String,
}

/// The whole section.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelsConfig {
    /// OpenAI-compatible endpoints by name.
    pub endpoints: BTreeMap<String, EndpointConfig>,
    /// What graphs name (`model: default`): candidates in the order in which they are tried.
    pub routes: BTreeMap<String, Vec<Candidate>>,
}

/// One OpenAI-compatible endpoint.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointConfig {
    /// What stands before `/chat/completions`, such as `https://api.openai.com/v1`.
    pub url: EndpointUrl,
    /// Where the bearer token is kept; none for an endpoint that asks for none.
    #[serde(default)]
    pub key: Option<KeySource>,
    /// How long its answers may take.
    #[serde(default)]
    pub timeouts: Timeouts,
    /// The longest answer that is read, as it comes over the wire.
    #[serde(default = "default_max_answer")]
    pub max_answer: Size,
    /// How many calls may be under way at once, of this process.
    #[serde(default = "default_max_parallel")]
    pub max_parallel: usize,
    /// What its tokens cost.
    #[serde(default)]
    pub price: Option<Price>,
    /// Headers of every call, such as `api-key` or `OpenAI-Project`.
    #[serde(default)]
    pub headers: BTreeMap<String, HeaderSource>,
}

/// How long an endpoint's answers may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// Until the connection stands.
    #[serde(deserialize_with = "duration")]
    pub connect: Duration,
    /// From the request to the first piece of the answer.
    #[serde(deserialize_with = "duration")]
    pub first_token: Duration,
    /// Between two pieces of the answer.
    #[serde(deserialize_with = "duration")]
    pub idle: Duration,
    /// All attempts at this endpoint for one call together, waits between them included.
    #[serde(deserialize_with = "duration")]
    pub total: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            first_token: Duration::from_secs(60),
            idle: Duration::from_secs(30),
            total: Duration::from_secs(600),
        }
    }
}

/// US dollars for a million tokens.
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Price {
    /// Of the request.
    pub input: f64,
    /// Of the answer.
    pub output: f64,
    /// Of the part of the request that the endpoint had cached; the same as `input` when absent.
    pub cached_input: Option<f64>,
}

/// One place to try for a route.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Candidate {
    /// The endpoint's name.
    pub endpoint: String,
    /// The model's name there.
    pub model: String,
    /// How often it is asked before the next candidate is.
    #[serde(default = "default_attempts")]
    pub attempts: u32,
}

/// Attempts where a candidate names no number, or is named directly as `ENDPOINT/MODEL`.
pub const DEFAULT_ATTEMPTS: u32 = 3;

fn default_attempts() -> u32 {
    DEFAULT_ATTEMPTS
}

fn default_max_answer() -> Size {
    Size(4 << 20)
}

fn default_max_parallel() -> usize {
    16
}

impl ModelsConfig {
    /// Finds what serde cannot: values out of range, names of endpoints that do not exist.
    pub fn check(&self) -> Result<(), ModelsConfigError> {
        counted("models.endpoints", self.endpoints.len(), MAX_ENTRIES)?;
        counted("models.routes", self.routes.len(), MAX_ENTRIES)?;
        for (name, endpoint) in &self.endpoints {
            let field = format!("models.endpoints.{name}");
            named(&field, name)?;
            endpoint.check(&field)?;
        }
        for (name, candidates) in &self.routes {
            let field = format!("models.routes.{name}");
            named(&field, name)?;
            if candidates.is_empty() {
                return Err(wrong(field, "a route needs at least one candidate"));
            }
            counted(&field, candidates.len(), MAX_CANDIDATES)?;
            for (at, candidate) in candidates.iter().enumerate() {
                self.check_candidate(&format!("{field}[{at}]"), candidate)?;
            }
        }
        Ok(())
    }

    fn check_candidate(&self, field: &str, candidate: &Candidate) -> Result<(), ModelsConfigError> {
        if !self.endpoints.contains_key(&candidate.endpoint) {
            let known: Vec<&str> = self.endpoints.keys().map(String::as_str).collect();
            let problem = format!(
                "there is no endpoint {:?}; there are: {}",
                candidate.endpoint,
                known.join(", ")
            );
            return Err(wrong(format!("{field}.endpoint"), problem));
        }
        if candidate.model.is_empty() || candidate.model.len() > MAX_MODEL_BYTES {
            let problem = format!("a model's name has 1 to {MAX_MODEL_BYTES} bytes");
            return Err(wrong(format!("{field}.model"), problem));
        }
        if !(1..=10).contains(&candidate.attempts) {
            let problem = format!("must be 1 to 10, not {}", candidate.attempts);
            return Err(wrong(format!("{field}.attempts"), problem));
        }
        Ok(())
    }
}

impl EndpointConfig {
    fn check(&self, field: &str) -> Result<(), ModelsConfigError> {
        let times = &self.timeouts;
        let named = [
            ("connect", times.connect),
            ("first_token", times.first_token),
            ("idle", times.idle),
            ("total", times.total),
        ];
        for (name, value) in named {
            if !PATIENCE.contains(&value) {
                let problem =
                    format!("must be 10ms to 2h, not {}", humantime::format_duration(value));
                return Err(wrong(format!("{field}.timeouts.{name}"), problem));
            }
        }
        if !ANSWER_BYTES.contains(&self.max_answer.0) {
            let problem = format!("must be 1KiB to 64MiB, not {}", self.max_answer);
            return Err(wrong(format!("{field}.max_answer"), problem));
        }
        if !(1..=1024).contains(&self.max_parallel) {
            let problem = format!("must be 1 to 1024, not {}", self.max_parallel);
            return Err(wrong(format!("{field}.max_parallel"), problem));
        }
        if self.key.is_some() && self.url.has_user() {
            let problem = "give a `key` or a user in `url`, not both: a request carries only one";
            return Err(wrong(format!("{field}.key"), problem));
        }
        if let Some(price) = &self.price {
            price.check(&format!("{field}.price"))?;
        }
        self.check_headers(&format!("{field}.headers"))
    }

    fn check_headers(&self, field: &str) -> Result<(), ModelsConfigError> {
        counted(field, self.headers.len(), MAX_HEADERS)?;
        for (name, value) in &self.headers {
            let field = format!("{field}.{name}");
            let Ok(known) = HeaderName::from_bytes(name.as_bytes()) else {
                return Err(wrong(field, "not a header's name"));
            };
            if OWN_HEADERS.contains(&known.as_str()) {
                return Err(wrong(field, "every call sets this header itself; leave it out"));
            }
            if known == "authorization" && (self.key.is_some() || self.url.has_user()) {
                return Err(wrong(
                    field,
                    "`key`, or the user in `url`, is sent in this header already",
                ));
            }
            if let HeaderSource::Text(text) = value
                && HeaderValue::from_str(text).is_err()
            {
                return Err(wrong(field, "has characters that a header cannot carry"));
            }
        }
        Ok(())
    }
}

impl Price {
    fn check(&self, field: &str) -> Result<(), ModelsConfigError> {
        let cached = self.cached_input.unwrap_or(self.input);
        for (name, value) in
            [("input", self.input), ("output", self.output), ("cached_input", cached)]
        {
            if !(0.0..=1_000_000.0).contains(&value) {
                let problem = "US dollars for a million tokens, from 0 to 1000000";
                return Err(wrong(format!("{field}.{name}"), problem));
            }
        }
        Ok(())
    }
}

/// An environment variable's value, for a key that a [`KeySource::Env`] names.
#[must_use]
pub fn variable(name: &str) -> Option<String> {
    std::env::var_os(name)?.into_string().ok().filter(|value| !value.is_empty())
}

fn wrong(field: impl Into<String>, problem: impl Into<String>) -> ModelsConfigError {
    ModelsConfigError { field: field.into(), problem: problem.into() }
}

fn counted(field: &str, count: usize, most: usize) -> Result<(), ModelsConfigError> {
    if count <= most {
        return Ok(());
    }
    Err(wrong(field, format!("{count} entries, but at most {most} are allowed")))
}

fn named(field: &str, name: &str) -> Result<(), ModelsConfigError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    let first = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if first && name.len() <= MAX_NAME_BYTES && name.chars().all(plain) {
        return Ok(());
    }
    let problem = format!(
        "a name is 1 to {MAX_NAME_BYTES} letters, digits, `_`, `.` and `-`, and begins with a letter or digit"
    );
    Err(wrong(field, problem))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<ModelsConfig, String> {
        let config: ModelsConfig = serde_json::from_str(text).map_err(|err| err.to_string())?;
        config.check().map_err(|err| err.to_string())?;
        Ok(config)
    }

    fn refused(text: &str, expected: &str) {
        let message = read(text).expect_err(text);
        assert!(message.contains(expected), "{text}: {message}");
    }

    const USUAL: &str = r#"{
        "endpoints": {
            "local": {"url": "http://127.0.0.1:8080/v1/", "timeouts": {"first_token": "5m"}, "max_answer": "64KiB"},
            "cloud": {"url": "https://api.openai.com/v1", "key": {"env": "OPENAI_API_KEY"},
                      "price": {"input": 2.5, "output": 10}, "headers": {"OpenAI-Project": "p", "x-key": {"secret": "x"}}}
        },
        "routes": {"default": [{"endpoint": "local", "model": "small"}, {"endpoint": "cloud", "model": "big", "attempts": 2}]}
    }"#;

    #[test]
    fn a_usual_section_is_read_with_its_defaults() {
        let config = read(USUAL).unwrap();
        let local = &config.endpoints["local"];
        assert_eq!(local.timeouts.connect, Duration::from_secs(5));
        assert_eq!(local.timeouts.first_token, Duration::from_secs(300));
        assert_eq!((local.max_answer, local.max_parallel), (Size(64 << 10), 16));
        assert_eq!(config.endpoints["cloud"].max_answer.to_string(), "4 MiB");
        assert_eq!(config.endpoints["cloud"].key, Some(KeySource::Env("OPENAI_API_KEY".into())));
        let attempts: Vec<u32> = config.routes["default"].iter().map(|one| one.attempts).collect();
        assert_eq!(attempts, [3, 2]);
        assert!(read("{}").unwrap().endpoints.is_empty());
    }

    #[test]
    fn a_mistake_names_its_field() {
        let endpoint =
            |more: &str| format!(r#"{{"endpoints":{{"a":{{"url":"http://h/v1"{more}}}}}}}"#);
        refused(
            &endpoint(r#","timeouts":{"idle":"0s"}"#),
            "models.endpoints.a.timeouts.idle: must be",
        );
        refused(&endpoint(r#","timeouts":{"idle":5}"#), "string");
        refused(&endpoint(r#","timeouts":{"idle":"5"}"#), "not a duration");
        refused(&endpoint(r#","max_answer":"1B""#), "models.endpoints.a.max_answer: must be 1KiB");
        refused(&endpoint(r#","max_answer":"many""#), "not a size");
        refused(
            &endpoint(r#","max_parallel":0"#),
            "models.endpoints.a.max_parallel: must be 1 to 1024",
        );
        refused(&endpoint(r#","price":{"input":-1}"#), "models.endpoints.a.price.input");
        refused(&endpoint(r#","headers":{"Content-Type":"x"}"#), "leave it out");
        refused(&endpoint(r#","headers":{"a b":"x"}"#), "not a header's name");
        refused(
            &endpoint(r#","key":{"file":"x"}"#),
            "unknown field `file`, expected `env` or `secret`",
        );
        let pasted = read(&endpoint(r#","key":"sk-pasted""#)).unwrap_err();
        assert!(
            pasted.contains("the configuration names a secret") && !pasted.contains("sk-"),
            "{pasted}"
        );
        refused(&endpoint(r#","keys":{}"#), "unknown field `keys`");
        refused(r#"{"endpoints":{"a/b":{"url":"http://h"}}}"#, "models.endpoints.a/b: a name is");
        refused(r#"{"endpoints":{"a":{"url":"ftp://h"}}}"#, "an http or https URL");
        refused(r#"{"routes":{"r":[]}}"#, "models.routes.r: a route needs");
        refused(
            r#"{"routes":{"r":[{"endpoint":"x","model":"m"}]}}"#,
            "models.routes.r[0].endpoint: there is no endpoint \"x\"",
        );
    }

    #[test]
    fn what_is_secret_in_an_address_or_a_header_is_not_shown() {
        let text = r#"{"endpoints":{"a":{"url":"https://ann:hunter2@h:8443/v1?code=hunter3","headers":{"x":"hunter4"}}}}"#;
        let printed = format!("{:?}", read(text).unwrap());
        assert!(printed.contains("https://h:8443/v1"), "{printed}");
        for secret in ["ann", "hunter"] {
            assert!(!printed.contains(secret), "{printed}");
        }
        let wrong = r#"{"endpoints":{"a":{"url":"ftp://ann:hunter2@h"}}}"#;
        assert!(!read(wrong).unwrap_err().contains("hunter2"));
        refused(
            r#"{"endpoints":{"a":{"url":"http://ann:x@h","key":{"env":"K"}}}}"#,
            "models.endpoints.a.key: give a `key` or a user",
        );
    }
}
