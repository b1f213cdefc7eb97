//! The sections of the configuration file that have no file of their own: `webhooks`, `secrets`, `retention`.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::values::duration;

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
