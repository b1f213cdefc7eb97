//! What is in force at a worker: its operator's rules and those of its server, the stricter of the two, as one value.
//!
//! The agent looks at one such value for each request and each job. A new configuration is a new value: nothing is
//! ever half changed.
//!
//! **Invariant:** no rule of the server's makes anything possible that the operator's configuration does not allow.
//! **Invariant:** tokens are kept as hashes, and compared in constant time.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};
use tokio::sync::watch;

use super::config::{MIN_TOKEN_BYTES, Token, WorkerConfig};
use super::node::{Configuration, VERSION};
use super::wire::{InvalidRequest, JobRequest, NetworkPolicy};

/// Bytes of a token.
const MAX_TOKEN_BYTES: usize = 4096;
/// Images that a configuration may allow, and the characters of one.
const MAX_IMAGES: usize = 1000;
const MAX_IMAGE_NAME: usize = 256;
/// The least that a server may allow for a request.
const MIN_REQUEST_BYTES: u64 = 1024;

/// Where the value in force is read.
pub type InForce = watch::Receiver<Arc<Effective>>;

/// A configuration that was applied, as it is kept for the next start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Saved {
    /// The server's configuration.
    pub configuration: Configuration,
    /// The token of the one before: accepted too, because the server changes over when it has the acknowledgement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<TimedToken>,
}

/// A token with its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimedToken {
    /// The token.
    pub token: Token,
    /// When it is no longer accepted; without it, never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<DateTime<Utc>>,
}

/// A field of a configuration that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` {problem}")]
pub struct Unusable {
    /// Its path.
    pub field: &'static str,
    /// What is wrong.
    pub problem: String,
}

/// The value in force.
#[derive(Debug, Clone)]
pub struct Effective {
    /// The server's configuration that it was made of.
    pub config_version: Option<String>,
    /// For jobs that name no policy.
    pub network: NetworkPolicy,
    /// The image of a job that names none.
    pub default_image: Option<String>,
    /// The largest body of a request, and whose rule that is.
    pub max_request_bytes: Ruled<usize>,
    /// The longest that a job may take, in seconds, and whose rule that is.
    pub max_seconds: Ruled<u64>,
    /// For jobs that name no time, in seconds.
    pub default_seconds: u64,
    waits: bool,
    tokens: Vec<Accepted>,
    images: Vec<Ruled<Vec<String>>>,
}

/// A value, and the rule that it comes from, for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ruled<T> {
    /// The value.
    pub value: T,
    /// Which rule, and whose.
    pub rule: String,
}

#[derive(Debug, Clone)]
struct Accepted {
    hash: [u8; 32],
    expires_at: Option<DateTime<Utc>>,
}

impl Accepted {
    fn new(token: &Token, expires_at: Option<DateTime<Utc>>) -> Self {
        Self { hash: Sha256::digest(token.expose().as_bytes()).into(), expires_at }
    }
}

fn own<T>(value: T, key: &str) -> Ruled<T> {
    Ruled { value, rule: format!("`{key}` of this worker's own configuration") }
}

impl Effective {
    /// For an agent that no server configures: its operator's rules, and the operator's token.
    #[must_use]
    pub fn standalone(config: &WorkerConfig) -> Self {
        Self {
            waits: false,
            tokens: vec![Accepted::new(&config.token, None)],
            ..Self::waiting(config)
        }
    }

    /// Before the first configuration of the server: the operator's rules, and nobody may call.
    #[must_use]
    pub fn waiting(config: &WorkerConfig) -> Self {
        let images = config.allowed_images.clone();
        Self {
            config_version: None,
            network: config.default_network_policy,
            default_image: config.default_image.clone(),
            max_request_bytes: own(config.max_request_bytes, "max_request_bytes"),
            max_seconds: own(config.timeouts.max_seconds, "timeouts.max_seconds"),
            default_seconds: config.timeouts.default_seconds,
            waits: true,
            tokens: Vec::new(),
            images: images.map(|names| own(names, "allowed_images")).into_iter().collect(),
        }
    }

    /// With a configuration of the server's. What is over the operator's rules is not granted.
    ///
    /// # Errors
    /// A field cannot be used.
    pub fn configured(config: &WorkerConfig, saved: &Saved) -> Result<Self, Unusable> {
        let given = &saved.configuration;
        check(given)?;
        let served = |key: &str| {
            format!(
                "`{key}` of the server's configuration {} for this worker",
                given.config_version
            )
        };
        let mut effective = Self { waits: false, ..Self::waiting(config) };
        effective.config_version = Some(given.config_version.clone());
        let api = &given.worker_api;
        let current = api.orchestrator_bearer_token.as_ref();
        let current =
            current.map(|token| Accepted::new(token, api.orchestrator_bearer_token_expires_at));
        let previous =
            saved.previous.as_ref().map(|timed| Accepted::new(&timed.token, timed.expires_at));
        effective.tokens = current.into_iter().chain(previous).collect();
        let policy = &given.policy.sandbox;
        if let Some(names) = &policy.allowed_images {
            let rule = served("policy.sandbox.allowed_images");
            effective.images.push(Ruled { value: names.clone(), rule });
        }
        if policy.default_network_policy.as_deref() == Some("none") {
            effective.network = NetworkPolicy::None;
        }
        let bounds = &given.constraints;
        let bytes =
            bounds.max_request_bytes.map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
        if let Some(value) = bytes.filter(|bytes| *bytes < effective.max_request_bytes.value) {
            let rule = served("constraints.max_request_bytes");
            effective.max_request_bytes = Ruled { value, rule };
        }
        let seconds = bounds.max_job_timeout_seconds;
        if let Some(value) = seconds.filter(|seconds| *seconds < effective.max_seconds.value) {
            let rule = served("constraints.max_job_timeout_seconds");
            effective.max_seconds = Ruled { value, rule };
            effective.default_seconds = effective.default_seconds.min(value);
        }
        Ok(effective)
    }

    /// Whether there is no configuration yet.
    #[must_use]
    pub fn waits(&self) -> bool {
        self.waits
    }

    /// Whether a caller that shows this token may call now.
    #[must_use]
    pub fn admits(&self, token: &str, now: DateTime<Utc>) -> bool {
        let given = Sha256::digest(token.as_bytes());
        let mut found = Choice::from(0);
        for accepted in &self.tokens {
            let current = accepted.expires_at.is_none_or(|end| now < end);
            found |= accepted.hash.as_slice().ct_eq(&given) & Choice::from(u8::from(current));
        }
        found.into()
    }

    /// Fills in what the request leaves to the worker, and refuses an image that a rule does not allow.
    ///
    /// # Errors
    /// The image is refused.
    pub fn admit(&self, request: &mut JobRequest) -> Result<(), InvalidRequest> {
        let image = &mut request.sandbox.image;
        if let (true, Some(default)) = (image.is_empty(), &self.default_image) {
            image.clone_from(default);
        }
        for Ruled { value, rule } in &self.images {
            if !value.contains(image) {
                let allowed = value.join(", ");
                return Err(InvalidRequest::ImageNotAllowed {
                    image: image.clone(),
                    rule: rule.clone(),
                    allowed: if allowed.is_empty() { "none".to_owned() } else { allowed },
                });
            }
        }
        Ok(())
    }

    /// The images of these that every rule allows.
    #[must_use]
    pub fn allowed(&self, images: Vec<String>) -> Vec<String> {
        let allowed = |name: &String| self.images.iter().all(|rule| rule.value.contains(name));
        images.into_iter().filter(allowed).collect()
    }
}

/// What can be said about a configuration without this worker's own.
fn check(given: &Configuration) -> Result<(), Unusable> {
    let wrong = |field, problem: String| Err(Unusable { field, problem });
    if given.version != VERSION {
        return wrong("version", format!("is {}, but this worker speaks {VERSION}", given.version));
    }
    if let Some(token) = &given.worker_api.orchestrator_bearer_token {
        let text = token.expose();
        let sized = (MIN_TOKEN_BYTES..=MAX_TOKEN_BYTES).contains(&text.len());
        if !sized || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            let problem =
                format!("must be {MIN_TOKEN_BYTES} to {MAX_TOKEN_BYTES} visible ASCII characters");
            return wrong("worker_api.orchestrator_bearer_token", problem);
        }
    }
    let policy = &given.policy.sandbox;
    if let Some(word) = &policy.default_network_policy
        && NetworkPolicy::parse(word).is_none()
    {
        let problem = "must be `none` or `restricted`: jobs reach no network here".to_owned();
        return wrong("policy.sandbox.default_network_policy", problem);
    }
    if let Some(names) = &policy.allowed_images
        && (names.len() > MAX_IMAGES || names.iter().any(|name| name.len() > MAX_IMAGE_NAME))
    {
        let problem =
            format!("must be at most {MAX_IMAGES} names of at most {MAX_IMAGE_NAME} bytes");
        return wrong("policy.sandbox.allowed_images", problem);
    }
    let bounds = &given.constraints;
    if bounds.max_request_bytes.is_some_and(|bytes| bytes < MIN_REQUEST_BYTES) {
        return wrong(
            "constraints.max_request_bytes",
            format!("must be {MIN_REQUEST_BYTES} or more"),
        );
    }
    if bounds.max_job_timeout_seconds == Some(0) {
        return wrong("constraints.max_job_timeout_seconds", "must be 1 or more".to_owned());
    }
    if given.policy.updates.poll_interval_seconds == 0 {
        return wrong("policy.updates.poll_interval_seconds", "must be 1 or more".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;
    use serde_json::{Value, json};

    use super::*;

    const T: DateTime<Utc> = DateTime::UNIX_EPOCH;

    fn configuration(more: &Value) -> Configuration {
        let mut value = json!({
            "version": 1, "config_version": "01KB0000000000000000000001", "issued_at": T, "node_slug": "alpha",
            "orchestrator": {"base_url": "http://127.0.0.1:1", "endpoints": {
                "worker_api_target_url": "http://127.0.0.1:2", "node_report_url": "http://127.0.0.1:1/report"}},
            "sandbox_registry": {"registry_url": ""}, "model_cache": {"cache_url": ""},
            "policy": {}, "worker_api": {"orchestrator_bearer_token": "0123456789abcdef"}, "constraints": {}
        });
        for (key, part) in more.as_object().unwrap() {
            value[key] = part.clone();
        }
        serde_json::from_value(value).unwrap()
    }

    fn config() -> WorkerConfig {
        WorkerConfig::new(Token::new("the operator's own"), "/nowhere")
    }

    fn effective(config: &WorkerConfig, more: &Value) -> Result<Effective, String> {
        let saved = Saved { configuration: configuration(more), previous: None };
        Effective::configured(config, &saved).map_err(|err| err.to_string())
    }

    #[test]
    fn the_stricter_rule_wins_whoever_made_it() {
        let bounds = |bytes: u64, seconds: u64| json!({"constraints": {"max_request_bytes": bytes, "max_job_timeout_seconds": seconds}});
        let strict = effective(&config(), &bounds(4096, 60)).unwrap();
        assert_eq!((strict.max_request_bytes.value, strict.max_seconds.value), (4096, 60));
        assert_eq!(strict.default_seconds, 60);
        assert!(strict.max_seconds.rule.contains("server's configuration 01KB"));
        let lenient = effective(&config(), &bounds(1 << 40, 1 << 40)).unwrap();
        assert_eq!((lenient.max_request_bytes.value, lenient.max_seconds.value), (10 << 20, 3600));
        assert!(lenient.max_seconds.rule.contains("own configuration"));
        let policy = |word: &str| json!({"policy": {"sandbox": {"default_network_policy": word}}});
        assert_eq!(effective(&config(), &policy("none")).unwrap().network, NetworkPolicy::None);
        let own_none = WorkerConfig { default_network_policy: NetworkPolicy::None, ..config() };
        let both = effective(&own_none, &policy("restricted")).unwrap();
        assert_eq!(both.network, NetworkPolicy::None);
    }

    #[test]
    fn an_image_needs_everybodys_leave_and_the_refusal_says_whose_is_missing() {
        let own = WorkerConfig {
            allowed_images: Some(vec!["a".into(), "b".into()]),
            default_image: Some("a".into()),
            ..config()
        };
        let value =
            effective(&own, &json!({"policy": {"sandbox": {"allowed_images": ["b", "c"]}}}))
                .unwrap();
        let admit = |image: &str| {
            let mut request: JobRequest = serde_json::from_value(json!({
                "version": 1, "task_id": uuid::Uuid::nil(), "job_id": uuid::Uuid::nil(),
                "sandbox": {"image": image, "command": ["true"]}
            }))
            .unwrap();
            value.admit(&mut request).map(|()| request.sandbox.image).map_err(|err| err.to_string())
        };
        assert_eq!(admit("b").unwrap(), "b");
        assert!(admit("c").unwrap_err().contains("`allowed_images` of this worker's own"));
        // The default is an image like any other.
        let refused = admit("").unwrap_err();
        assert!(
            refused.contains("image `a` is refused by `policy.sandbox.allowed_images`"),
            "{refused}"
        );
        assert_eq!(value.allowed(vec!["a".into(), "b".into()]), ["b"]);
    }

    #[test]
    fn tokens_are_accepted_until_their_end() {
        let saved = Saved {
            configuration: configuration(&json!({"worker_api": {
                "orchestrator_bearer_token": "0123456789abcdef",
                "orchestrator_bearer_token_expires_at": T + TimeDelta::seconds(10)}})),
            previous: Some(TimedToken { token: Token::new("the one before it"), expires_at: None }),
        };
        let value = Effective::configured(&config(), &saved).unwrap();
        assert!(value.admits("0123456789abcdef", T));
        assert!(!value.admits("0123456789abcdef", T + TimeDelta::seconds(10)));
        assert!(value.admits("the one before it", T + TimeDelta::seconds(10)));
        for wrong in ["", "0123456789abcde", "the operator's own"] {
            assert!(!value.admits(wrong, T), "{wrong}");
        }
        assert!(Effective::standalone(&config()).admits("the operator's own", T));
        assert!(!Effective::waiting(&config()).admits("the operator's own", T));
        assert!(!Effective::waiting(&config()).admits("", T));
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let check = |more: Value, expected: &str| {
            let err = effective(&config(), &more).unwrap_err();
            assert!(err.contains(expected), "{err}");
        };
        check(json!({"version": 2}), "`version` is 2");
        check(json!({"worker_api": {"orchestrator_bearer_token": "short"}}), "16 to 4096");
        check(json!({"policy": {"sandbox": {"default_network_policy": "allowlist"}}}), "`none` or");
        check(json!({"constraints": {"max_request_bytes": 1}}), "1024 or more");
        check(json!({"constraints": {"max_job_timeout_seconds": 0}}), "1 or more");
    }
}
