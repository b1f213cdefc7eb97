//! Where keys come from. A key is fetched for one call and dropped with it.

use futures::future::BoxFuture;
use secrecy::SecretString;

use crate::config::models::{KeySource, variable};

/// Resolves the sources of keys.
pub trait Keys: Send + Sync {
    /// The value that `source` names, for one call.
    fn key<'a>(&'a self, source: &'a KeySource) -> BoxFuture<'a, Result<SecretString, KeyError>>;
}

/// Why there is no key. It names the source, never a value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{problem}")]
pub struct KeyError {
    /// What is missing, and what to do.
    pub problem: String,
}

/// Keys from the environment alone.
#[derive(Debug, Clone, Copy, Default)]
pub struct EnvKeys;

impl Keys for EnvKeys {
    fn key<'a>(&'a self, source: &'a KeySource) -> BoxFuture<'a, Result<SecretString, KeyError>> {
        let found = match source {
            KeySource::Env(name) => variable(name).map(SecretString::from).ok_or_else(|| {
                format!("the environment variable {name} is not set: set it and start again")
            }),
            KeySource::Secret(name) => {
                Err(format!("the secret {name} cannot be read: there is no secret store here"))
            }
        };
        Box::pin(std::future::ready(found.map_err(|problem| KeyError { problem })))
    }
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret;

    use super::*;

    #[tokio::test]
    async fn the_environment_is_read_and_what_is_missing_is_named() {
        let path = EnvKeys.key(&KeySource::Env("PATH".to_owned())).await.unwrap();
        assert!(!path.expose_secret().is_empty());
        let missing =
            EnvKeys.key(&KeySource::Env("CYNAI_NO_SUCH_KEY".to_owned())).await.unwrap_err();
        assert!(missing.to_string().contains("CYNAI_NO_SUCH_KEY is not set"));
        assert!(EnvKeys.key(&KeySource::Secret("x".to_owned())).await.is_err());
    }
}
