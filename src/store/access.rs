//! Users and tokens.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

use super::StoreError;
use crate::ids::{TokenId, UserId};

/// A user's row.
#[derive(Debug, Clone)]
pub struct UserRow {
    /// Its id.
    pub user_id: UserId,
    /// Unique.
    pub name: String,
    /// Whether it may manage users.
    pub admin: bool,
    /// When it was made.
    pub created_at: DateTime<Utc>,
}

/// A token's row, without its hash.
#[derive(Debug, Clone)]
pub struct TokenRow {
    /// Its id.
    pub token_id: TokenId,
    /// What its user calls it.
    pub name: String,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// After this it is refused.
    pub expires_at: Option<DateTime<Utc>>,
    /// At a resolution of a minute.
    pub last_used_at: Option<DateTime<Utc>>,
    /// Since then it is refused.
    pub revoked_at: Option<DateTime<Utc>>,
}

/// A token that is good now, with its user.
#[derive(Debug, Clone)]
pub struct LiveToken {
    /// The token.
    pub token_id: TokenId,
    /// After this it is refused.
    pub expires_at: Option<DateTime<Utc>>,
    /// At a resolution of a minute.
    pub last_used_at: Option<DateTime<Utc>>,
    /// Whose it is.
    pub user_id: UserId,
    /// The user's name.
    pub user_name: String,
    /// Whether the user may manage users.
    pub admin: bool,
}

/// A token to store.
#[derive(Debug)]
pub struct NewTokenRow<'a> {
    /// Its id.
    pub token_id: TokenId,
    /// Whose it is.
    pub user_id: UserId,
    /// What its user calls it.
    pub name: &'a str,
    /// SHA-256 of the secret.
    pub hash: &'a [u8; 32],
    /// Now.
    pub created_at: DateTime<Utc>,
    /// After this it is refused.
    pub expires_at: Option<DateTime<Utc>>,
}

/// Adds a user; answers whether the name was free.
pub async fn insert_user(db: &mut PgConnection, user: &UserRow) -> Result<bool, StoreError> {
    let result = sqlx::query!(
        "insert into users (user_id, name, admin, created_at) values ($1, $2, $3, $4)
         on conflict (name) do nothing",
        user.user_id as UserId,
        user.name,
        user.admin,
        user.created_at,
    )
    .execute(db)
    .await?;
    Ok(result.rows_affected() == 1)
}

/// The user of this name.
pub async fn find_user(db: &mut PgConnection, name: &str) -> Result<Option<UserRow>, StoreError> {
    Ok(sqlx::query_as!(
        UserRow,
        r#"select user_id as "user_id: UserId", name, admin, created_at from users where name = $1"#,
        name,
    )
    .fetch_optional(db)
    .await?)
}

/// The user of this name, locked until the transaction ends.
pub async fn lock_user(db: &mut PgConnection, name: &str) -> Result<Option<UserRow>, StoreError> {
    Ok(sqlx::query_as!(
        UserRow,
        r#"select user_id as "user_id: UserId", name, admin, created_at from users where name = $1
           for update"#,
        name,
    )
    .fetch_optional(db)
    .await?)
}

/// All users by name but one.
pub async fn list_users(
    db: &mut PgConnection,
    but: UserId,
    limit: i64,
    offset: i64,
) -> Result<Vec<UserRow>, StoreError> {
    Ok(sqlx::query_as!(
        UserRow,
        r#"select user_id as "user_id: UserId", name, admin, created_at from users
           where user_id <> $3 order by name limit $1 offset $2"#,
        limit,
        offset,
        but as UserId,
    )
    .fetch_all(db)
    .await?)
}

/// Adds a token.
pub async fn insert_token(
    db: &mut PgConnection,
    token: &NewTokenRow<'_>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into tokens (token_id, user_id, name, hash, created_at, expires_at)
         values ($1, $2, $3, $4, $5, $6)",
        token.token_id as TokenId,
        token.user_id as UserId,
        token.name,
        token.hash.as_slice(),
        token.created_at,
        token.expires_at,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// How many tokens of a user are good now.
pub async fn count_live_tokens(db: &mut PgConnection, user: UserId) -> Result<i64, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select count(*) as "count!" from tokens where user_id = $1 and revoked_at is null
           and (expires_at is null or expires_at > cynai_now())"#,
        user as UserId,
    )
    .fetch_one(db)
    .await?)
}

/// The token with this hash, when it is good now.
pub async fn find_live_token(
    db: &mut PgConnection,
    hash: &[u8; 32],
) -> Result<Option<LiveToken>, StoreError> {
    Ok(sqlx::query_as!(
        LiveToken,
        r#"select t.token_id as "token_id: TokenId", t.expires_at, t.last_used_at,
                  u.user_id as "user_id: UserId", u.name as user_name, u.admin
           from tokens t join users u using (user_id)
           where t.hash = $1 and t.revoked_at is null
             and (t.expires_at is null or t.expires_at > cynai_now())"#,
        hash.as_slice(),
    )
    .fetch_optional(db)
    .await?)
}

/// Records that a token was used, unless that was recorded within the last minute.
pub async fn touch_token(
    db: &mut PgConnection,
    token: TokenId,
    now: DateTime<Utc>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "update tokens set last_used_at = $2 where token_id = $1
         and (last_used_at is null or last_used_at < $2::timestamptz - interval '1 minute')",
        token as TokenId,
        now,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// A user's tokens, newest first.
pub async fn list_tokens(
    db: &mut PgConnection,
    user: UserId,
    limit: i64,
    offset: i64,
) -> Result<Vec<TokenRow>, StoreError> {
    Ok(sqlx::query_as!(
        TokenRow,
        r#"select token_id as "token_id: TokenId", name, created_at, expires_at, last_used_at, revoked_at
           from tokens where user_id = $1 order by token_id desc limit $2 offset $3"#,
        user as UserId,
        limit,
        offset,
    )
    .fetch_all(db)
    .await?)
}

/// Revokes a token of `owner`, or of anybody when `owner` is absent; answers whether there was one that
/// was not revoked yet.
pub async fn revoke_token(
    db: &mut PgConnection,
    token: TokenId,
    owner: Option<UserId>,
    now: DateTime<Utc>,
) -> Result<bool, StoreError> {
    let result = sqlx::query!(
        "update tokens set revoked_at = $3 where token_id = $1 and revoked_at is null
         and ($2::uuid is null or user_id = $2)",
        token as TokenId,
        owner as Option<UserId>,
        now,
    )
    .execute(db)
    .await?;
    Ok(result.rows_affected() == 1)
}
