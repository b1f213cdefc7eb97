//! What workers are configured with: a policy for all of them, a patch over it for one, and what follows.
//!
//! A configuration is made from stored rows alone and stored without its secrets; equal contents are one
//! version. Making it again is therefore harmless, and is done whenever something that it depends on changes.

use chrono::{DateTime, Utc};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use url::Url;
use utoipa::ToSchema;

use crate::services::error::ServiceError;
use crate::worker::config::Token;
use crate::worker::node::{
    Configuration, ConfiguredEndpoints, ConfiguredOrchestrator, ConfiguredWorkerApi, Constraints,
    ModelCache, Policy, Registry, SandboxPolicy, Trust, UpdatePolicy, VERSION,
};

/// Entries of a list of images or domains.
const MAX_ENTRIES: usize = 1000;
/// Characters of one of them.
const MAX_ENTRY: usize = 256;
/// Secrets whose names begin so may be given to workers; an administrator must not read others that way.
const PULL_SECRETS: &str = "pull-";
/// Characters of the notes.
const MAX_NOTES: usize = 2000;

/// What an operator decides about workers. Keys that are left out have their defaults.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FleetPolicy {
    /// Where images come from.
    pub sandbox_registry: RegistrySettings,
    /// Where model files come from.
    pub model_cache: CacheSettings,
    /// What sandboxes may be.
    pub sandbox: SandboxSettings,
    /// How workers learn of later configurations.
    pub updates: UpdateSettings,
    /// Bounds of jobs.
    pub constraints: ConstraintSettings,
    /// For the people who run the workers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub notes: Option<String>,
}

/// Where images come from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RegistrySettings {
    /// `https://HOST[:PORT]`; empty where there is none.
    pub registry_url: String,
    /// Whether images must be named by digest.
    pub require_digest_pinning: bool,
    /// The stored secret that workers pull with; its name begins with `pull-`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pull_token_secret: Option<String>,
}

/// Where model files come from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CacheSettings {
    /// `https://HOST[:PORT]`; empty where there is none.
    pub cache_url: String,
    /// The stored secret that workers pull with; its name begins with `pull-`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pull_token_secret: Option<String>,
}

/// What sandboxes may be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SandboxSettings {
    /// Names of images; left out, all that a worker has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_images: Option<Vec<String>>,
    /// For jobs that name none: `none` or `restricted`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_network_policy: Option<String>,
}

/// How workers learn of later configurations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct UpdateSettings {
    /// Off: a worker keeps what it got at its start.
    pub enable_dynamic_config: bool,
    /// Seconds between two looks, 5 to 86,400.
    pub poll_interval_seconds: u64,
}

impl Default for UpdateSettings {
    fn default() -> Self {
        let usual = UpdatePolicy::default();
        Self {
            enable_dynamic_config: usual.enable_dynamic_config,
            poll_interval_seconds: usual.poll_interval_seconds,
        }
    }
}

/// Bounds of jobs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ConstraintSettings {
    /// Bytes of a request to a worker, 1,024 to 67,108,864.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_request_bytes: Option<u64>,
    /// Seconds that a job may take, 1 to 604,800.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_job_timeout_seconds: Option<u64>,
}

impl FleetPolicy {
    /// The policy of a worker: that of all workers, with the worker's own patch over it (RFC 7396).
    ///
    /// # Errors
    /// Something in it is unknown or out of range; the message says what.
    pub fn merged(all: &Value, patch: &Value) -> Result<Self, ServiceError> {
        let mut merged = all.clone();
        merge(&mut merged, patch);
        let policy: Self = serde_json::from_value(merged)
            .map_err(|err| ServiceError::invalid(format!("the policy is not right: {err}")))?;
        policy.check()?;
        Ok(policy)
    }

    /// The names of the secrets that it needs.
    pub fn secrets(&self) -> impl Iterator<Item = &str> {
        let names = [&self.sandbox_registry.pull_token_secret, &self.model_cache.pull_token_secret];
        names.into_iter().flatten().map(String::as_str)
    }

    fn check(&self) -> Result<(), ServiceError> {
        for (path, url) in [
            ("/sandbox_registry/registry_url", &self.sandbox_registry.registry_url),
            ("/model_cache/cache_url", &self.model_cache.cache_url),
        ] {
            if !url.is_empty() {
                base_url(url).map_err(|problem| ServiceError::invalid_at(path, problem))?;
            }
        }
        for (path, name) in [
            ("/sandbox_registry/pull_token_secret", &self.sandbox_registry.pull_token_secret),
            ("/model_cache/pull_token_secret", &self.model_cache.pull_token_secret),
        ] {
            if name.as_ref().is_some_and(|name| !name.starts_with(PULL_SECRETS)) {
                return Err(ServiceError::invalid_at(
                    path,
                    format!(
                        "only secrets whose names begin with `{PULL_SECRETS}` are given to workers"
                    ),
                ));
            }
        }
        if let Some(images) = &self.sandbox.allowed_images {
            let fits = |image: &String| {
                !image.is_empty()
                    && image.len() <= MAX_ENTRY
                    && !image.chars().any(char::is_control)
            };
            if images.len() > MAX_ENTRIES || !images.iter().all(fits) {
                return Err(ServiceError::invalid_at(
                    "/sandbox/allowed_images",
                    format!(
                        "at most {MAX_ENTRIES} names of 1 to {MAX_ENTRY} characters are expected"
                    ),
                ));
            }
        }
        if let Some(policy) = &self.sandbox.default_network_policy
            && !["none", "restricted"].contains(&policy.as_str())
        {
            return Err(ServiceError::invalid_at(
                "/sandbox/default_network_policy",
                "the network policy is `none` or `restricted`",
            ));
        }
        if self
            .notes
            .as_ref()
            .is_some_and(|notes| notes.chars().count() > MAX_NOTES || notes.contains('\0'))
        {
            return Err(ServiceError::invalid_at(
                "/notes",
                format!("notes have at most {MAX_NOTES} characters"),
            ));
        }
        for (path, value, min, max) in [
            ("/updates/poll_interval_seconds", Some(self.updates.poll_interval_seconds), 5, 86_400),
            ("/constraints/max_request_bytes", self.constraints.max_request_bytes, 1024, 64 << 20),
            (
                "/constraints/max_job_timeout_seconds",
                self.constraints.max_job_timeout_seconds,
                1,
                7 * 86_400,
            ),
        ] {
            if value.is_some_and(|value| !(min..=max).contains(&value)) {
                return Err(ServiceError::invalid_at(path, format!("must be {min} to {max}")));
            }
        }
        Ok(())
    }
}

/// Merges a patch into a value (RFC 7396): null removes, objects go deeper, everything else replaces.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let Value::Object(fields) = target else { return };
    for (key, value) in patch {
        if value.is_null() {
            fields.remove(key);
        } else {
            merge(fields.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

/// Scheme, host and port of a service: nothing else belongs into it.
pub(super) fn base_url(text: &str) -> Result<Url, String> {
    let wrong = |problem: &str| format!("`http(s)://HOST[:PORT]` is expected: {problem}");
    let url = Url::parse(text).map_err(|err| wrong(&err.to_string()))?;
    if !["http", "https"].contains(&url.scheme()) {
        return Err(wrong("another scheme"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(wrong("it holds a user or a password"));
    }
    if url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("it goes on after the port"));
    }
    Ok(url)
}

/// A configuration as it is stored: without its secrets, its version and its time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// Whom it is for.
    pub slug: String,
    /// The server as the worker reaches it.
    pub base_url: String,
    /// Where the server reaches the worker.
    pub target_url: String,
    /// The stored secret that holds the worker's bearer token.
    pub bearer_secret: String,
    /// The policy in force.
    pub policy: FleetPolicy,
    /// The secrets that the policy names, and a mark of each: another one of the name is another configuration.
    pub secret_marks: Vec<(String, String)>,
    /// What the server is trusted by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust: Option<Trust>,
}

/// The secrets of a configuration, opened for the one answer that carries them.
#[derive(Debug)]
pub struct Opened {
    /// What the server will show the worker.
    pub bearer: SecretString,
    /// For the registry.
    pub registry: Option<SecretString>,
    /// For the model cache.
    pub cache: Option<SecretString>,
}

impl Content {
    /// The payload that the worker gets.
    #[must_use]
    pub fn configuration(
        &self,
        config_version: String,
        issued_at: DateTime<Utc>,
        opened: &Opened,
    ) -> Configuration {
        let token = |secret: &SecretString| Token::new(secret.expose_secret());
        let policy = self.policy.clone();
        Configuration {
            version: VERSION,
            config_version,
            issued_at,
            node_slug: self.slug.clone(),
            orchestrator: ConfiguredOrchestrator {
                base_url: self.base_url.clone(),
                endpoints: ConfiguredEndpoints {
                    worker_api_target_url: self.target_url.clone(),
                    node_report_url: format!("{}/v1/nodes/self/report", self.base_url),
                },
            },
            sandbox_registry: Registry {
                registry_url: policy.sandbox_registry.registry_url,
                require_digest_pinning: policy.sandbox_registry.require_digest_pinning,
                pull_token: opened.registry.as_ref().map(token),
                pull_token_expires_at: None,
            },
            model_cache: ModelCache {
                cache_url: policy.model_cache.cache_url,
                pull_token: opened.cache.as_ref().map(token),
                pull_token_expires_at: None,
            },
            policy: Policy {
                sandbox: SandboxPolicy {
                    allowed_images: policy.sandbox.allowed_images,
                    default_network_policy: policy.sandbox.default_network_policy,
                    ..SandboxPolicy::default()
                },
                updates: UpdatePolicy {
                    enable_dynamic_config: policy.updates.enable_dynamic_config,
                    poll_interval_seconds: policy.updates.poll_interval_seconds,
                    ..UpdatePolicy::default()
                },
            },
            worker_api: ConfiguredWorkerApi {
                orchestrator_bearer_token: Some(token(&opened.bearer)),
                orchestrator_bearer_token_expires_at: None,
            },
            constraints: Constraints {
                max_request_bytes: policy.constraints.max_request_bytes,
                max_job_timeout_seconds: policy.constraints.max_job_timeout_seconds,
            },
            notes: policy.notes,
            trust: self.trust.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(all: &Value, patch: &Value, expected: Result<&Value, &str>) {
        match (FleetPolicy::merged(all, patch), expected) {
            (Ok(policy), Ok(expected)) => {
                let found = serde_json::to_value(&policy).unwrap();
                for (key, value) in expected.as_object().unwrap() {
                    assert_eq!(&found[key], value, "{key}");
                }
            }
            (Err(err), Err(words)) => {
                let text = format!("{err:?}");
                assert!(text.contains(words), "{words:?} is not in {text}");
            }
            (found, expected) => panic!("{found:?} instead of {expected:?}"),
        }
    }

    #[test]
    fn a_workers_patch_goes_over_the_policy_of_all() {
        let all = json!({"sandbox": {"allowed_images": ["a"], "default_network_policy": "none"}, "notes": "n"});
        let patch = json!({"sandbox": {"allowed_images": ["b"]}, "notes": null});
        let merged =
            json!({"sandbox": {"allowed_images": ["b"], "default_network_policy": "none"}});
        check(&all, &patch, Ok(&merged));
        check(
            &json!({}),
            &json!({}),
            Ok(&json!({"updates": {"enable_dynamic_config": true, "poll_interval_seconds": 60}})),
        );
    }

    #[test]
    fn what_is_unknown_or_out_of_range_is_named() {
        check(&json!({"sandbx": {}}), &json!({}), Err("unknown field `sandbx`"));
        check(
            &json!({}),
            &json!({"updates": {"poll_interval_seconds": 1}}),
            Err("/updates/poll_interval_seconds"),
        );
        check(&json!({}), &json!({"constraints": {"max_request_bytes": 1}}), Err("1024 to"));
        check(
            &json!({"sandbox": {"default_network_policy": "allowlist"}}),
            &json!({}),
            Err("`none` or `restricted`"),
        );
        check(
            &json!({"model_cache": {"cache_url": "ftp://a"}}),
            &json!({}),
            Err("/model_cache/cache_url"),
        );
        check(
            &json!({"sandbox_registry": {"registry_url": "https://a/b"}}),
            &json!({}),
            Err("after the port"),
        );
        check(
            &json!({"sandbox_registry": {"registry_url": "https://u:p@a"}}),
            &json!({}),
            Err("password"),
        );
        check(
            &json!({"sandbox": {"allowed_images": [""]}}),
            &json!({}),
            Err("/sandbox/allowed_images"),
        );
    }
}
