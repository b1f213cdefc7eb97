//! Users and API tokens: who asks, and what proves it.
//!
//! A token is 256 random bits, shown once; what is stored is its SHA-256, so a copy of the database
//! opens nothing. Looking a hash up needs no constant time: whoever can choose a hash's prefix can
//! already choose its input.
//!
//! Tokens that were verified are remembered for [`REMEMBERED`], so that a busy client costs no query
//! for each request. That is also how long another replica may still accept a token that this one
//! revoked; here it is refused at once.
//!
//! **Invariant:** no secret is logged or stored, and [`Secret`] does not print itself.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use sha2::{Digest, Sha256};
use utoipa::ToSchema;

use super::api::{Actor, instant, optional_instant};
use super::error::ServiceError;
use super::{Services, checks};
use crate::ids::{TokenId, UserId};
use crate::store::access::{self as store, NewTokenRow, TokenRow, UserRow};
use crate::store::crash;
use crate::store::webhooks::{SYSTEM_NAME, SYSTEM_USER};

/// How long a verified token is not looked up again.
pub const REMEMBERED: Duration = Duration::from_secs(2);

const REMEMBERED_AT_MOST: usize = 10_000;
const PREFIX: &str = "cyn_";
const ADMIN: &str = "admin";

/// An API token's text. Its `Debug` shows nothing of it.
#[derive(Clone, PartialEq, Eq, Serialize, ToSchema)]
#[schema(value_type = String)]
pub struct Secret(String);

impl Secret {
    /// 256 fresh random bits.
    fn random() -> Self {
        let mut bits = [0_u8; 32];
        rand::fill(&mut bits);
        Self(format!("{PREFIX}{}", base64url(bits)))
    }

    /// Something that is shown once, whatever it is.
    pub(super) fn new(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// The text, to be shown or sent once.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// A token as its user sees it: never the secret.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct TokenView {
    /// Its id.
    #[schema(value_type = uuid::Uuid)]
    pub token_id: TokenId,
    /// What its user calls it.
    pub name: String,
    /// When it was made.
    #[serde(with = "instant")]
    pub created_at: DateTime<Utc>,
    /// After this it is refused.
    #[serde(with = "optional_instant")]
    pub expires_at: Option<DateTime<Utc>>,
    /// At a resolution of a minute.
    #[serde(with = "optional_instant")]
    pub last_used_at: Option<DateTime<Utc>>,
    /// Since then it is refused.
    #[serde(with = "optional_instant")]
    pub revoked_at: Option<DateTime<Utc>>,
}

/// A fresh token: the only view that holds a secret.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct NewTokenView {
    /// The secret; it cannot be shown again.
    pub token: Secret,
    /// Everything else.
    #[serde(flatten)]
    pub view: TokenView,
}

/// A user.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct UserView {
    /// Its id.
    #[schema(value_type = uuid::Uuid)]
    pub user_id: UserId,
    /// Unique.
    pub name: String,
    /// Whether it may manage users.
    pub admin: bool,
    /// When it was made.
    #[serde(with = "instant")]
    pub created_at: DateTime<Utc>,
}

/// A token to make.
#[derive(Debug, Clone)]
pub struct CreateToken {
    /// What its user calls it.
    pub name: String,
    /// For another user, which only an admin may ask for.
    pub user: Option<String>,
    /// Good for so long; `None` is until it is revoked.
    pub ttl: Option<Duration>,
}

/// What the first start did.
#[derive(Debug, PartialEq, Eq)]
pub enum Bootstrap {
    /// There was no usable admin token: one was written to the file.
    Written,
    /// An admin has a token already.
    Existing,
}

impl Services {
    /// Who holds this token.
    pub async fn authenticate(&self, token: &str) -> Result<Actor, ServiceError> {
        let refused =
            || ServiceError::Unauthorized("this token is not known, expired or revoked".to_owned());
        if !well_formed(token) {
            return Err(refused());
        }
        let hash: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        let now = self.clock().now();
        if let Some(actor) = self.0.tokens.recall(&hash, now) {
            return Ok(actor);
        }
        let generation = self.0.tokens.generation();
        let mut db = self.pool().acquire().await?;
        let live = store::find_live_token(&mut db, &hash).await?.ok_or_else(refused)?;
        if live.last_used_at.is_none_or(|at| now - at > TimeDelta::minutes(1)) {
            crash::around("token used", store::touch_token(&mut db, live.token_id, now)).await?;
        }
        let actor = Actor { user_id: live.user_id, name: live.user_name, admin: live.admin };
        self.0.tokens.remember(hash, live.token_id, actor.clone(), live.expires_at, generation);
        Ok(actor)
    }

    /// Makes a token for the actor, or for another user when the actor is an admin.
    pub async fn create_token(
        &self,
        actor: &Actor,
        request: CreateToken,
    ) -> Result<NewTokenView, ServiceError> {
        checks::text("name", &request.name, 100)?;
        let now = self.clock().now();
        let expires_at = request.ttl.map(|ttl| expiry(now, ttl)).transpose()?;
        let mut tx = self.transaction().await?;
        let owner_name = self.token_owner(actor, request.user.as_deref())?;
        // The lock makes the count below true until the commit.
        let owner = store::lock_user(&mut tx, owner_name)
            .await?
            .ok_or_else(|| ServiceError::not_found("user", owner_name))?;
        let limit = self.limits().tokens_per_user;
        if store::count_live_tokens(&mut tx, owner.user_id).await? >= i64::from(limit) {
            return Err(ServiceError::Conflict(format!(
                "user {owner_name} has {limit} tokens, which is the limit: revoke one first"
            )));
        }
        let secret = Secret::random();
        let view =
            insert_token(&mut tx, owner.user_id, &request.name, &secret, now, expires_at).await?;
        crash::commit(tx, "token made").await?;
        tracing::info!(token.id = %view.token_id, user = %owner.name, by = %actor.name, "token {} made", view.token_id);
        Ok(NewTokenView { token: secret, view })
    }

    /// The tokens of the actor, or of another user when the actor is an admin; newest first.
    pub async fn list_tokens(
        &self,
        actor: &Actor,
        user: Option<&str>,
        limit: u32,
        offset: u32,
    ) -> Result<Vec<TokenView>, ServiceError> {
        let mut db = self.pool().acquire().await?;
        let name = self.token_owner(actor, user)?;
        let owner = store::find_user(&mut db, name)
            .await?
            .ok_or_else(|| ServiceError::not_found("user", name))?;
        let limit = self.page_limit(limit)?;
        let rows = store::list_tokens(&mut db, owner.user_id, limit, offset.into()).await?;
        Ok(rows.into_iter().map(token_view).collect())
    }

    /// Revokes a token of the actor, or anybody's when the actor is an admin.
    pub async fn revoke_token(&self, actor: &Actor, token: TokenId) -> Result<(), ServiceError> {
        let owner = (!actor.admin).then_some(actor.user_id);
        let mut db = self.pool().acquire().await?;
        let revoked = crash::around(
            "token revoked",
            store::revoke_token(&mut db, token, owner, self.clock().now()),
        )
        .await?;
        self.0.tokens.forget(token);
        if !revoked {
            return Err(ServiceError::not_found("token", token));
        }
        tracing::info!(token.id = %token, by = %actor.name, "token {token} revoked");
        Ok(())
    }

    /// Makes a user. Only an admin may.
    pub async fn create_user(
        &self,
        actor: &Actor,
        name: String,
        admin: bool,
    ) -> Result<UserView, ServiceError> {
        only_admin(actor)?;
        check_user_name(&name)?;
        let user = UserRow { user_id: UserId::new(), name, admin, created_at: self.clock().now() };
        let mut db = self.pool().acquire().await?;
        if !crash::around("user made", store::insert_user(&mut db, &user)).await? {
            return Err(ServiceError::Conflict(format!("there is a user {} already", user.name)));
        }
        tracing::info!(user = %user.name, by = %actor.name, "user {} made", user.name);
        Ok(user_view(user))
    }

    /// All users by name. Only an admin may ask.
    pub async fn list_users(
        &self,
        actor: &Actor,
        limit: u32,
        offset: u32,
    ) -> Result<Vec<UserView>, ServiceError> {
        only_admin(actor)?;
        let limit = self.page_limit(limit)?;
        let mut db = self.pool().acquire().await?;
        let rows = store::list_users(&mut db, SYSTEM_USER, limit, offset.into()).await?;
        Ok(rows.into_iter().map(user_view).collect())
    }

    /// Makes sure that somebody can get in: when the user `admin` has no usable token, one is written
    /// to `token_file`, readable by its owner only.
    ///
    /// The file is in place before the token is committed, so a crash in between leaves a file that
    /// opens nothing and the next start writes it again, never a token that nobody knows.
    pub async fn bootstrap_admin(&self, token_file: &Path) -> Result<Bootstrap, ServiceError> {
        let now = self.clock().now();
        let mut tx = self.transaction().await?;
        let row = UserRow {
            user_id: UserId::new(),
            name: ADMIN.to_owned(),
            admin: true,
            created_at: now,
        };
        store::insert_user(&mut tx, &row).await?;
        let admin = store::lock_user(&mut tx, ADMIN)
            .await?
            .ok_or_else(|| ServiceError::internal("the user admin vanished"))?;
        if store::count_live_tokens(&mut tx, admin.user_id).await? > 0 {
            crash::commit(tx, "admin found").await?;
            return Ok(Bootstrap::Existing);
        }
        let secret = Secret::random();
        insert_token(&mut tx, admin.user_id, "first start", &secret, now, None).await?;
        write_secret(token_file, &secret).await.map_err(ServiceError::internal)?;
        crash::commit(tx, "admin made").await?;
        tracing::info!(path = %token_file.display(), "the admin's token is in {}", token_file.display());
        Ok(Bootstrap::Written)
    }

    fn token_owner<'a>(
        &self,
        actor: &'a Actor,
        user: Option<&'a str>,
    ) -> Result<&'a str, ServiceError> {
        match user {
            // A token of it would open what the server does for itself.
            Some(SYSTEM_NAME) => Err(ServiceError::not_found("user", SYSTEM_NAME)),
            Some(other) if other != actor.name => only_admin(actor).map(|()| other),
            _ => Ok(&actor.name),
        }
    }
}

async fn insert_token(
    db: &mut sqlx::PgConnection,
    user_id: UserId,
    name: &str,
    secret: &Secret,
    created_at: DateTime<Utc>,
    expires_at: Option<DateTime<Utc>>,
) -> Result<TokenView, ServiceError> {
    let token_id = TokenId::new();
    let hash: [u8; 32] = Sha256::digest(secret.expose().as_bytes()).into();
    let row = NewTokenRow { token_id, user_id, name, hash: &hash, created_at, expires_at };
    store::insert_token(db, &row).await?;
    let name = name.to_owned();
    Ok(TokenView { token_id, name, created_at, expires_at, last_used_at: None, revoked_at: None })
}

/// Writes the secret so that no other user can read it at any moment, and so that a crash leaves the
/// old file or the new one.
async fn write_secret(path: &Path, secret: &Secret) -> std::io::Result<()> {
    use tokio::io::AsyncWriteExt;

    let temporary = path.with_extension("new");
    match tokio::fs::remove_file(&temporary).await {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => return Err(err),
        _ => {}
    }
    let mut file = tokio::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .await?;
    file.write_all(secret.expose().as_bytes()).await?;
    file.write_all(b"\n").await?;
    file.sync_all().await?;
    drop(file);
    tokio::fs::rename(&temporary, path).await?;
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        tokio::fs::File::open(folder).await?.sync_all().await?;
    }
    Ok(())
}

pub(super) fn only_admin(actor: &Actor) -> Result<(), ServiceError> {
    if actor.admin {
        return Ok(());
    }
    Err(ServiceError::Forbidden("only an admin may do this".to_owned()))
}

fn check_user_name(name: &str) -> Result<(), ServiceError> {
    let word = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let good = name.len() <= 63
        && name.as_bytes().first().is_some_and(word)
        && name.bytes().all(|byte| word(&byte) || b"._-".contains(&byte));
    if good {
        return Ok(());
    }
    Err(ServiceError::invalid_at(
        "/name",
        "a user's name is 1 to 63 lower-case letters, digits, `.`, `_` and `-`, beginning with a letter or digit",
    ))
}

fn expiry(now: DateTime<Utc>, ttl: Duration) -> Result<DateTime<Utc>, ServiceError> {
    const LONGEST: Duration = Duration::from_secs(100 * 366 * 24 * 3600);
    let wrong =
        || ServiceError::invalid_at("/ttl_seconds", "a token lives for 1 second to 100 years");
    if ttl.is_zero() || ttl > LONGEST {
        return Err(wrong());
    }
    now.checked_add_signed(TimeDelta::from_std(ttl).map_err(|_| wrong())?).ok_or_else(wrong)
}

fn token_view(row: TokenRow) -> TokenView {
    let TokenRow { token_id, name, created_at, expires_at, last_used_at, revoked_at } = row;
    TokenView { token_id, name, created_at, expires_at, last_used_at, revoked_at }
}

fn user_view(row: UserRow) -> UserView {
    let UserRow { user_id, name, admin, created_at } = row;
    UserView { user_id, name, admin, created_at }
}

/// Whether a text can be a token at all, so that nonsense costs no query.
fn well_formed(token: &str) -> bool {
    token.strip_prefix(PREFIX).is_some_and(|rest| {
        rest.len() == 43
            && rest.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    })
}

/// 43 characters of the URL-safe alphabet of RFC 4648, without padding.
fn base64url(bits: [u8; 32]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::with_capacity(43);
    for chunk in bits.chunks(3) {
        let mut group = [0_u8; 4];
        group[1..=chunk.len()].copy_from_slice(chunk);
        let group = u32::from_be_bytes(group);
        for place in 0..=chunk.len() {
            let index = (group >> (18 - 6 * place)) & 63;
            text.push(char::from(ALPHABET[index as usize]));
        }
    }
    text
}

/// Tokens that were verified a moment ago.
#[derive(Debug, Default)]
pub(super) struct TokenCache(Mutex<Remembered>);

#[derive(Debug, Default)]
struct Remembered {
    /// Grows with every revocation: what was looked up before one is not remembered after it.
    generation: u64,
    by_hash: HashMap<[u8; 32], Verified>,
}

#[derive(Debug)]
struct Verified {
    token: TokenId,
    actor: Actor,
    expires_at: Option<DateTime<Utc>>,
    at: Instant,
}

impl TokenCache {
    fn lock(&self) -> std::sync::MutexGuard<'_, Remembered> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn generation(&self) -> u64 {
        self.lock().generation
    }

    fn recall(&self, hash: &[u8; 32], now: DateTime<Utc>) -> Option<Actor> {
        let remembered = self.lock();
        let verified = remembered.by_hash.get(hash)?;
        let fresh = verified.at.elapsed() < REMEMBERED;
        let live = verified.expires_at.is_none_or(|at| at > now);
        (fresh && live).then(|| verified.actor.clone())
    }

    fn remember(
        &self,
        hash: [u8; 32],
        token: TokenId,
        actor: Actor,
        expires_at: Option<DateTime<Utc>>,
        generation: u64,
    ) {
        let mut remembered = self.lock();
        if remembered.generation != generation {
            return;
        }
        if remembered.by_hash.len() >= REMEMBERED_AT_MOST {
            remembered.by_hash.retain(|_, verified| verified.at.elapsed() < REMEMBERED);
        }
        if remembered.by_hash.len() < REMEMBERED_AT_MOST {
            let at = Instant::now();
            remembered.by_hash.insert(hash, Verified { token, actor, expires_at, at });
        }
    }

    fn forget(&self, token: TokenId) {
        let mut remembered = self.lock();
        remembered.generation += 1;
        remembered.by_hash.retain(|_, verified| verified.token != token);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64url_is_the_alphabet_of_rfc_4648() {
        let check = |input: [u8; 32], expected: &str| assert_eq!(base64url(input), expected);
        check([0; 32], "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA");
        check([255; 32], "__________________________________________8");
        let mut counting = [0; 32];
        (0_u8..).zip(&mut counting).for_each(|(value, place)| *place = value);
        check(counting, "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8");
    }

    #[test]
    fn random_secrets_are_well_formed_and_differ() {
        let (one, other) = (Secret::random(), Secret::random());
        assert!(well_formed(one.expose()) && well_formed(other.expose()));
        assert_ne!(one, other);
        assert_eq!(format!("{one:?}"), "Secret(..)");
    }

    #[test]
    fn only_texts_of_the_right_shape_are_looked_up() {
        let check =
            |input: &str, expected: bool| assert_eq!(well_formed(input), expected, "{input}");
        check("", false);
        check("cyn_", false);
        check(&format!("cyn_{}", "a".repeat(43)), true);
        check(&format!("cyn_{}", "a".repeat(44)), false);
        check(&format!("xyz_{}", "a".repeat(43)), false);
        check(&format!("cyn_{}=", "a".repeat(42)), false);
    }

    #[test]
    fn user_names_are_lower_case_words() {
        let check = |input: &str, expected: bool| {
            assert_eq!(check_user_name(input).is_ok(), expected, "{input}");
        };
        check("a", true);
        check("0-x.y_z", true);
        check("", false);
        check("-a", false);
        check("Anna", false);
        check(&"a".repeat(63), true);
        check(&"a".repeat(64), false);
    }

    fn somebody() -> Actor {
        Actor { user_id: UserId::new(), name: "somebody".to_owned(), admin: false }
    }

    #[test]
    fn a_token_revoked_during_its_lookup_is_not_remembered() {
        let cache = TokenCache::default();
        let (token, now) = (TokenId::new(), DateTime::UNIX_EPOCH);
        let before = cache.generation();
        cache.forget(token);
        cache.remember([1; 32], token, somebody(), None, before);
        assert_eq!(cache.recall(&[1; 32], now), None);
        cache.remember([1; 32], token, somebody(), None, cache.generation());
        assert!(cache.recall(&[1; 32], now).is_some());
        cache.forget(token);
        assert_eq!(cache.recall(&[1; 32], now), None);
    }

    #[test]
    fn a_remembered_token_still_expires() {
        let cache = TokenCache::default();
        let end = DateTime::UNIX_EPOCH + TimeDelta::seconds(5);
        cache.remember([1; 32], TokenId::new(), somebody(), Some(end), 0);
        assert!(cache.recall(&[1; 32], end - TimeDelta::seconds(1)).is_some());
        assert_eq!(cache.recall(&[1; 32], end), None);
    }

    #[test]
    fn the_cache_stays_within_its_bound() {
        let cache = TokenCache::default();
        let mut hash = [0; 32];
        for number in 0..REMEMBERED_AT_MOST + 10 {
            hash[..8].copy_from_slice(&number.to_be_bytes());
            cache.remember(hash, TokenId::new(), somebody(), None, 0);
        }
        assert_eq!(cache.lock().by_hash.len(), REMEMBERED_AT_MOST);
    }
}
