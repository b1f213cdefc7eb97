//! Secrets: set, listed, deleted and rotated by administrators; read by nobody but this process, for a call
//! that needs one.
//!
//! **Invariant:** no operation that a user can ask for answers a value. Worker machines are told their own token, and the
//! secrets that were made for them (`fleet::policy`).
//! **Invariant:** a server without the right master key serves everything else.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use sha2::{Digest, Sha256};
use utoipa::ToSchema;

use super::api::{Actor, instant, optional_instant};
use super::error::ServiceError;
use super::{Services, fleet};
use crate::config::values::{SecretSource, environment_secret};
use crate::egress::vault::{KeyId, KeyRing, Place, Sealed, VaultError};
use crate::ids::UserId;
use crate::store::secrets::{self as store, SecretInfo, SecretRow};
use crate::store::{StoreError, crash, workers};

/// Bytes of one value.
pub const MAX_VALUE_BYTES: usize = 64 << 10;
/// Secrets of one installation.
const MAX_SECRETS: i64 = 10_000;
/// Secrets that one transaction wraps anew.
const BATCH: i64 = 100;
/// Times that setting a secret is tried anew because somebody else set it.
const TRIES: u32 = 5;

/// The master keys, or why there are none.
#[derive(Debug, Clone)]
pub enum Vault {
    /// Secrets can be sealed and opened.
    Open(Arc<KeyRing>),
    /// They cannot; the reason is for the operator.
    Closed(String),
}

impl Default for Vault {
    fn default() -> Self {
        Self::Closed("this process has no master key".to_owned())
    }
}

/// A secret as an administrator sees it: never its value.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct SecretView {
    /// Its name.
    pub name: String,
    /// Grows each time that it is set.
    pub version: i32,
    /// The master key that it is sealed with.
    pub key_id: String,
    /// Who set it last.
    pub owner: Option<String>,
    /// When it was set last.
    #[serde(with = "instant")]
    pub created_at: DateTime<Utc>,
    /// When it was last moved to another master key.
    #[serde(with = "optional_instant")]
    pub rotated_at: Option<DateTime<Utc>>,
}

/// What a rotation did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct RotationView {
    /// The newest master key, which all but the failed ones are under now.
    pub key_id: String,
    /// How many were moved to it by this call.
    pub rotated: u64,
    /// Those that could not be, with the reason.
    pub failed: Vec<FailedView>,
}

/// A secret that could not be moved to the newest master key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct FailedView {
    /// Its name.
    pub name: String,
    /// Why, and what to do.
    pub reason: String,
}

/// Why the value of a secret is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// No such secret.
    #[error("there is no secret `{0}`: make it with `cynai secrets set {0}`")]
    Missing(String),
    /// No such variable.
    #[error("the environment variable {0} of the server is not set")]
    NoVariable(String),
    /// It does not open.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// There is no master key.
    #[error("secrets cannot be opened: {0}")]
    Closed(String),
    /// The database failed.
    #[error("the secret could not be read")]
    Store(#[from] StoreError),
}

impl From<sqlx::Error> for SecretError {
    fn from(err: sqlx::Error) -> Self {
        Self::Store(err.into())
    }
}

impl Services {
    /// Stores a secret, in place of what had its name. Only an admin may.
    pub async fn set_secret(
        &self,
        actor: &Actor,
        name: &str,
        value: &SecretString,
    ) -> Result<SecretView, ServiceError> {
        only_admin(actor)?;
        check_name(name)?;
        let size = value.expose_secret().len();
        if size == 0 {
            return Err(ServiceError::invalid_at("/value", "an empty secret is none"));
        }
        if size > MAX_VALUE_BYTES {
            return Err(ServiceError::TooLarge(format!(
                "the secret has {size} bytes; at most {MAX_VALUE_BYTES} are stored"
            )));
        }
        self.put_secret(actor.user_id, name, value).await?;
        tracing::info!(secret = name, by = %actor.name, "the secret `{name}` was set");
        self.get_secret(actor, name).await
    }

    /// Stores a value under a name that was checked, whoever asks.
    pub(super) async fn put_secret(
        &self,
        owner: UserId,
        name: &str,
        value: &SecretString,
    ) -> Result<(), ServiceError> {
        for _ in 0..TRIES {
            let mut db = self.pool().acquire().await?;
            let before = store::find(&mut db, name).await?.map(|row| row.version);
            if before.is_none() && store::count_but(&mut db, fleet::SECRETS).await? >= MAX_SECRETS {
                return Err(ServiceError::Conflict(format!(
                    "there are {MAX_SECRETS} secrets, which is the limit: delete one first"
                )));
            }
            let version = before.unwrap_or(0) + 1;
            // Whoever holds a connection must not wait for another.
            drop(db);
            let row = self.sealed(name, version, value).map_err(closed)?;
            let mut tx = self.transaction().await?;
            if store::put(&mut tx, &row, owner, self.clock().now()).await? {
                // Workers may be configured with it.
                workers::secret_changed(&mut tx, name).await?;
                crash::commit(tx, "secret set").await?;
                self.fleet_changed();
                return Ok(());
            }
        }
        Err(ServiceError::Conflict(format!(
            "the secret `{name}` was set by somebody else at the same time: try again"
        )))
    }

    /// A version of a secret as it is stored; the reason when there is no master key.
    pub(super) fn sealed(
        &self,
        name: &str,
        version: i32,
        value: &SecretString,
    ) -> Result<SecretRow, String> {
        let Sealed { key_id, wrapped, sealed } = self.ring()?.seal(Place { name, version }, value);
        Ok(SecretRow { name: name.to_owned(), version, key_id, wrapped, sealed })
    }

    /// What may be told of a secret. Only an admin may ask.
    pub async fn get_secret(&self, actor: &Actor, name: &str) -> Result<SecretView, ServiceError> {
        only_admin(actor)?;
        let mut db = self.pool().acquire().await?;
        let found = store::list(&mut db, Some(name), 1, 0).await?.pop();
        found.map(view).ok_or_else(|| ServiceError::not_found("secret", name))
    }

    /// All secrets by name, without their values. Only an admin may ask.
    pub async fn list_secrets(
        &self,
        actor: &Actor,
        limit: u32,
        offset: u32,
    ) -> Result<Vec<SecretView>, ServiceError> {
        only_admin(actor)?;
        let limit = self.page_limit(limit)?;
        let mut db = self.pool().acquire().await?;
        let rows = store::list(&mut db, None, limit, offset.into()).await?;
        Ok(rows.into_iter().map(view).collect())
    }

    /// Deletes a secret. Only an admin may.
    pub async fn delete_secret(&self, actor: &Actor, name: &str) -> Result<(), ServiceError> {
        only_admin(actor)?;
        check_name(name)?;
        let mut db = self.pool().acquire().await?;
        if !crash::around("secret deleted", store::delete(&mut db, name)).await? {
            return Err(ServiceError::not_found("secret", name));
        }
        tracing::info!(secret = name, by = %actor.name, "the secret `{name}` was deleted");
        Ok(())
    }

    /// Moves all secrets under the newest master key, a batch in each transaction: called again after a failure it
    /// goes on with what is left. Only an admin may.
    pub async fn rotate_secrets(&self, actor: &Actor) -> Result<RotationView, ServiceError> {
        only_admin(actor)?;
        let ring = self.ring().map_err(closed)?;
        let mut done =
            RotationView { key_id: ring.newest().to_string(), ..RotationView::default() };
        let mut after = String::new();
        loop {
            let mut tx = self.transaction().await?;
            let rows = store::lock_others(&mut tx, &done.key_id, &after, BATCH).await?;
            let Some(last) = rows.last() else { break };
            after.clone_from(&last.name);
            let (mut names, mut wrapped) = (Vec::new(), Vec::new());
            for row in rows {
                let place = Place { name: &row.name, version: row.version };
                match ring.rewrap(place, &row.key_id, &row.wrapped) {
                    Ok((_, key)) => {
                        wrapped.push(key);
                        names.push(row.name);
                    }
                    Err(err) => {
                        done.failed.push(FailedView { reason: err.to_string(), name: row.name });
                    }
                }
            }
            let now = self.clock().now();
            done.rotated += store::rewrapped(&mut tx, &done.key_id, &names, &wrapped, now).await?;
            crash::commit(tx, "secrets rotated").await?;
        }
        tracing::info!(key = done.key_id, rotated = done.rotated, failed = done.failed.len(), by = %actor.name, "secrets were rotated");
        Ok(done)
    }

    /// The value behind a source, for one call of this process.
    ///
    /// # Errors
    /// There is none, or it does not open; the message says what to do and tells nothing of the value.
    pub async fn secret_value(&self, source: &SecretSource) -> Result<SecretString, SecretError> {
        match source {
            SecretSource::Env(name) => {
                environment_secret(name).ok_or_else(|| SecretError::NoVariable(name.clone()))
            }
            SecretSource::Secret(name) => Ok(self.stored_secret(name).await?.0),
        }
    }

    /// The value of a stored secret, and what tells it from others that have or had its name.
    pub(super) async fn stored_secret(
        &self,
        name: &str,
    ) -> Result<(SecretString, String), SecretError> {
        let ring = self.ring().map_err(SecretError::Closed)?;
        let mut db = self.pool().acquire().await?;
        let row = store::find(&mut db, name).await?;
        let row = row.ok_or_else(|| SecretError::Missing(name.to_owned()))?;
        let mark = mark(&row);
        let SecretRow { version, key_id, wrapped, sealed, .. } = row;
        let sealed = Sealed { key_id, wrapped, sealed };
        Ok((ring.open(Place { name, version }, &sealed)?, mark))
    }

    /// Tells the operator, in the log, of secrets that cannot be opened. A server starts all the same.
    pub async fn check_secrets(&self) -> Result<(), ServiceError> {
        let mut db = self.pool().acquire().await?;
        let stored = store::by_key(&mut db).await?;
        let ring = match self.vault() {
            Vault::Open(ring) => ring,
            Vault::Closed(reason) => {
                tracing::error!(
                    secrets = stored.iter().map(|(_, count)| count).sum::<i64>(),
                    "secrets cannot be used: {reason}"
                );
                return Ok(());
            }
        };
        for (key, count) in stored {
            if ring.ids().all(|known| known.as_str() != key) {
                let known = ring.ids().map(KeyId::as_str).collect::<Vec<_>>().join(", ");
                tracing::error!(
                    key,
                    count,
                    "{count} secrets are sealed with the master key {key}, which this server does not have (it has {known}): \
                     give it back in the master key file or CYNAI_OLD_MASTER_KEYS, or set them anew"
                );
            }
        }
        Ok(())
    }

    fn ring(&self) -> Result<Arc<KeyRing>, String> {
        match self.vault() {
            Vault::Open(ring) => Ok(Arc::clone(ring)),
            Vault::Closed(reason) => Err(reason.clone()),
        }
    }
}

fn closed(reason: String) -> ServiceError {
    ServiceError::unavailable(format!("secrets cannot be used: {reason}"))
}

fn only_admin(actor: &Actor) -> Result<(), ServiceError> {
    if actor.admin {
        return Ok(());
    }
    Err(ServiceError::Forbidden("only an admin may do this".to_owned()))
}

fn check_name(name: &str) -> Result<(), ServiceError> {
    let word = |byte: &u8| byte.is_ascii_alphanumeric();
    let good = name.len() <= 128
        && name.as_bytes().first().is_some_and(word)
        && name.bytes().all(|byte| word(&byte) || b"._-".contains(&byte))
        && name != "rotate";
    if good && name.starts_with(fleet::SECRETS) {
        return Err(ServiceError::invalid_at(
            "/name",
            format!("names that begin with `{}` are the server's own", fleet::SECRETS),
        ));
    }
    if good {
        return Ok(());
    }
    Err(ServiceError::invalid_at(
        "/name",
        "a secret's name is 1 to 128 letters, digits, `.`, `_` and `-`, beginning with a letter or digit, and not `rotate`",
    ))
}

/// Tells a stored secret from others that have or had its name: each sealing differs.
pub(super) fn mark(row: &SecretRow) -> String {
    let hash = Sha256::digest(&row.sealed);
    hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn view(row: SecretInfo) -> SecretView {
    let SecretInfo { name, version, key_id, owner, created_at, rotated_at } = row;
    SecretView { name, version, key_id, owner, created_at, rotated_at }
}
