//! The sections of the configuration file that have no file of their own: `webhooks`, `secrets`, `retention`, `fleet`.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::values::{SecretSource, duration};

/// What webhooks may reach.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WebhooksConfig {
    /// Addresses (`10.0.0.0/8`, `192.168.1.5`) and names (`hooks.internal`, `*.internal`) that webhooks may reach
    /// although they are private. Public addresses need no entry.
    pub allow: Vec<String>,
}

/// Where the keys are that seal the store of secrets.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SecretsConfig {
    /// A file of master keys, one a line in base64, the newest first, mode 0600; without it `master.key` in the
    /// data directory, which is made when missing.
    pub master_key_file: Option<PathBuf>,
}

/// How long things are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetentionConfig {
    /// The last so many checkpoints of a thread stay; without it all.
    pub keep_last: Option<u32>,
    /// Checkpoints that are older go; without it none. With both, a checkpoint goes by either.
    #[serde(deserialize_with = "duration::optional::deserialize")]
    pub max_age: Option<Duration>,
    /// Stream rows stay so long after their run has ended; without it a day.
    #[serde(deserialize_with = "duration::optional::deserialize")]
    pub stream_rows: Option<Duration>,
    /// A temporary thread stays so long after its run has ended; without it five minutes.
    #[serde(deserialize_with = "duration::optional::deserialize")]
    pub temporary_threads: Option<Duration>,
}

/// Worker machines that register themselves.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FleetSection {
    /// Any of these keys lets a worker register; without it the stored secrets that `cynai workers key` makes.
    pub registration_keys: Option<Vec<SecretSource>>,
    /// The server as workers reach it, `https://HOST[:PORT]`; without it, as they did reach it.
    pub public_url: Option<String>,
    /// Between two signs of life of a worker; without it 10s.
    #[serde(deserialize_with = "duration::optional::deserialize")]
    pub heartbeat: Option<Duration>,
    /// After this without one a worker gets no new jobs; without it three heartbeats.
    #[serde(deserialize_with = "duration::optional::deserialize")]
    pub stale_after: Option<Duration>,
    /// How long a worker's token is good; without it 24h. Workers renew it when half of that is over.
    #[serde(deserialize_with = "duration::optional::deserialize")]
    pub node_token: Option<Duration>,
    /// Certificates, PEM, that workers may trust the server by.
    pub ca_bundle_file: Option<PathBuf>,
}

/// Keys to register with.
const MAX_KEYS: usize = 10;

impl FleetSection {
    /// Between two signs of life.
    #[must_use]
    pub fn heartbeat(&self) -> Duration {
        self.heartbeat.unwrap_or(Duration::from_secs(10))
    }

    /// After this without one a worker gets no new jobs.
    #[must_use]
    pub fn stale_after(&self) -> Duration {
        self.stale_after.unwrap_or(self.heartbeat() * 3)
    }

    /// What is wrong, and where, in the words of the file.
    pub(super) fn check(&self) -> Result<(), (String, String)> {
        let wrong = |field: &str, problem: String| Err((format!("fleet.{field}"), problem));
        if self
            .registration_keys
            .as_ref()
            .is_some_and(|keys| keys.is_empty() || keys.len() > MAX_KEYS)
        {
            return wrong(
                "registration_keys",
                format!("must be 1 to {MAX_KEYS} keys; leave it out for the stored ones"),
            );
        }
        if let Some(url) = &self.public_url {
            let good = url::Url::parse(url).is_ok_and(|url| {
                ["http", "https"].contains(&url.scheme())
                    && url.path() == "/"
                    && url.query().is_none()
                    && url.username().is_empty()
                    && url.password().is_none()
            });
            if !good || url.ends_with('/') {
                return wrong("public_url", "must be `http(s)://HOST[:PORT]`".to_owned());
            }
        }
        for (field, value, min, max) in [
            ("heartbeat", Some(self.heartbeat()), 1, 300),
            ("node_token", self.node_token, 60, 366 * 86_400),
            ("stale_after", Some(self.stale_after()), 2, 86_400),
        ] {
            let (min, max) = (Duration::from_secs(min), Duration::from_secs(max));
            if value.is_some_and(|value| value < min || value > max) {
                let (min, max) = (humantime::format_duration(min), humantime::format_duration(max));
                return wrong(field, format!("must be {min} to {max}"));
            }
        }
        if self.stale_after() < self.heartbeat() * 2 {
            return wrong(
                "stale_after",
                "must be two heartbeats or more: one may be late".to_owned(),
            );
        }
        Ok(())
    }
}

/// The longest that anything is kept by a configuration: a hundred years.
const LONGEST: Duration = Duration::from_secs(100 * 366 * 86_400);
/// Entries of `webhooks.allow`.
const MAX_ALLOWED: usize = 1000;

impl WebhooksConfig {
    /// What is wrong, and where, in the words of the file.
    pub(super) fn check(&self) -> Result<(), (String, String)> {
        if self.allow.len() > MAX_ALLOWED {
            let problem = format!("{} entries; at most {MAX_ALLOWED} are read", self.allow.len());
            return Err(("webhooks.allow".to_owned(), problem));
        }
        Ok(())
    }
}

impl RetentionConfig {
    /// What is wrong, and where, in the words of the file.
    pub(super) fn check(&self) -> Result<(), (String, String)> {
        if self.keep_last == Some(0) {
            let problem = "must be 1 or more; leave it out to keep all checkpoints";
            return Err(("retention.keep_last".to_owned(), problem.to_owned()));
        }
        for (field, value) in [
            ("retention.max_age", self.max_age),
            ("retention.stream_rows", self.stream_rows),
            ("retention.temporary_threads", self.temporary_threads),
        ] {
            if value.is_some_and(|value| value < Duration::from_secs(1) || value > LONGEST) {
                return Err((field.to_owned(), "must be 1s to 100 years".to_owned()));
            }
        }
        Ok(())
    }
}
