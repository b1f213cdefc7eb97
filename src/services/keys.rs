//! Keys for the clients of models and tools: from the environment and from the store of secrets.

use std::fmt;
use std::sync::Weak;

use futures::FutureExt;
use futures::future::BoxFuture;
use secrecy::SecretString;

use super::{Inner, Services};
use crate::config::tools::ValueSource;
use crate::config::values::SecretSource;
use crate::{models, tools};

/// Resolves keys as long as the [`Services`] live that made it; these in turn hold the clients that ask it.
#[derive(Clone)]
pub struct StoredKeys(Weak<Inner>);

impl fmt::Debug for StoredKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StoredKeys")
    }
}

impl Services {
    /// What the clients of models and tools ask for keys.
    #[must_use]
    pub fn keys(&self) -> StoredKeys {
        StoredKeys(std::sync::Arc::downgrade(&self.0))
    }
}

impl StoredKeys {
    async fn find(&self, source: &SecretSource) -> Result<SecretString, String> {
        self.services()?.secret_value(source).await.map_err(|err| err.to_string())
    }

    fn services(&self) -> Result<Services, String> {
        self.0.upgrade().map(Services).ok_or_else(|| "the server is stopping".to_owned())
    }
}

impl models::keys::Keys for StoredKeys {
    fn key<'a>(
        &'a self,
        source: &'a SecretSource,
    ) -> BoxFuture<'a, Result<SecretString, models::keys::KeyError>> {
        async move { self.find(source).await.map_err(|problem| models::keys::KeyError { problem }) }
            .boxed()
    }
}

impl tools::keys::Keys for StoredKeys {
    fn value<'a>(
        &'a self,
        source: &'a ValueSource,
    ) -> BoxFuture<'a, Result<SecretString, tools::keys::KeyError>> {
        async move {
            let source = match source {
                ValueSource::Text(text) => return Ok(SecretString::from(text.as_str())),
                ValueSource::Env(name) => SecretSource::Env(name.clone()),
                ValueSource::Secret(name) => SecretSource::Secret(name.clone()),
            };
            self.find(&source).await.map_err(tools::keys::KeyError)
        }
        .boxed()
    }

    fn login<'a>(
        &'a self,
        server: &'a str,
    ) -> BoxFuture<'a, Result<Option<SecretString>, tools::keys::KeyError>> {
        async move { self.services()?.kept_login(server).await }
            .map(|login| login.map_err(tools::keys::KeyError))
            .boxed()
    }

    fn keep_login<'a>(
        &'a self,
        server: &'a str,
        login: SecretString,
    ) -> BoxFuture<'a, Result<(), tools::keys::KeyError>> {
        async move { self.services()?.keep_login(server, login).await }
            .map(|kept| kept.map_err(tools::keys::KeyError))
            .boxed()
    }
}
