//! Sealed secrets. What is in these rows opens nothing without a master key, which is elsewhere.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

use super::StoreError;
use crate::ids::UserId;

/// A secret's row.
#[derive(Debug, Clone)]
pub struct SecretRow {
    /// Its name.
    pub name: String,
    /// How often it was set.
    pub version: i32,
    /// The master key that its data key is wrapped with.
    pub key_id: String,
    /// The wrapped data key.
    pub wrapped: Vec<u8>,
    /// The sealed value.
    pub sealed: Vec<u8>,
}

/// What may be told of a secret.
#[derive(Debug, Clone)]
pub struct SecretInfo {
    /// Its name.
    pub name: String,
    /// How often it was set.
    pub version: i32,
    /// The master key that its data key is wrapped with.
    pub key_id: String,
    /// Who set it last.
    pub owner: Option<String>,
    /// When it was set last.
    pub created_at: DateTime<Utc>,
    /// When its data key was last wrapped anew.
    pub rotated_at: Option<DateTime<Utc>>,
}

/// A secret by its name.
pub async fn find(db: &mut PgConnection, name: &str) -> Result<Option<SecretRow>, StoreError> {
    let row = sqlx::query_as!(
        SecretRow,
        "select name, version, key_id, wrapped, sealed from secrets where name = $1",
        name,
    )
    .fetch_optional(db)
    .await?;
    Ok(row)
}

/// Stores a version of a secret. False: another one was stored meanwhile.
pub async fn put(
    db: &mut PgConnection,
    row: &SecretRow,
    owner: UserId,
    now: DateTime<Utc>,
) -> Result<bool, StoreError> {
    let result = sqlx::query!(
        "insert into secrets (name, version, key_id, wrapped, sealed, owner, created_at)
         values ($1, $2, $3, $4, $5, $6, $7)
         on conflict (name) do update
            set version = excluded.version, key_id = excluded.key_id, wrapped = excluded.wrapped,
                sealed = excluded.sealed, owner = excluded.owner, created_at = excluded.created_at, rotated_at = null
          where secrets.version = excluded.version - 1",
        row.name,
        row.version,
        row.key_id,
        row.wrapped,
        row.sealed,
        owner as UserId,
        now,
    )
    .execute(db)
    .await?;
    Ok(result.rows_affected() == 1)
}

/// Secrets by name: one, or all.
pub async fn list(
    db: &mut PgConnection,
    name: Option<&str>,
    limit: i64,
    offset: i64,
) -> Result<Vec<SecretInfo>, StoreError> {
    let rows = sqlx::query_as!(
        SecretInfo,
        r#"select s.name, s.version, s.key_id, u.name as "owner?", s.created_at, s.rotated_at
             from secrets s left join users u on u.user_id = s.owner
            where $1::text is null or s.name = $1
            order by s.name limit $2 offset $3"#,
        name,
        limit,
        offset,
    )
    .fetch_all(db)
    .await?;
    Ok(rows)
}

/// How many there are whose names do not begin so.
pub async fn count_but(db: &mut PgConnection, prefix: &str) -> Result<i64, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select count(*) as "count!" from secrets where not starts_with(name, $1)"#,
        prefix
    )
    .fetch_one(db)
    .await?)
}

/// How many each master key holds.
pub async fn by_key(db: &mut PgConnection) -> Result<Vec<(String, i64)>, StoreError> {
    let rows = sqlx::query!(
        r#"select key_id, count(*) as "count!" from secrets group by key_id order by key_id"#
    )
    .fetch_all(db)
    .await?;
    Ok(rows.into_iter().map(|row| (row.key_id, row.count)).collect())
}

/// Deletes a secret; answers whether there was one.
pub async fn delete(db: &mut PgConnection, name: &str) -> Result<bool, StoreError> {
    let result = sqlx::query!("delete from secrets where name = $1", name).execute(db).await?;
    Ok(result.rows_affected() == 1)
}

/// Deletes all secrets whose names begin so.
pub async fn delete_prefix(db: &mut PgConnection, prefix: &str) -> Result<(), StoreError> {
    sqlx::query!("delete from secrets where starts_with(name, $1)", prefix).execute(db).await?;
    Ok(())
}

/// Locks the next secrets that are not under `key_id`, by name, after `after`.
pub async fn lock_others(
    db: &mut PgConnection,
    key_id: &str,
    after: &str,
    limit: i64,
) -> Result<Vec<SecretRow>, StoreError> {
    let rows = sqlx::query_as!(
        SecretRow,
        "select name, version, key_id, wrapped, sealed from secrets
          where key_id <> $1 and name > $2 order by name limit $3 for no key update",
        key_id,
        after,
        limit,
    )
    .fetch_all(db)
    .await?;
    Ok(rows)
}

/// Stores data keys that were wrapped anew. The caller holds the rows' locks.
pub async fn rewrapped(
    db: &mut PgConnection,
    key_id: &str,
    names: &[String],
    wrapped: &[Vec<u8>],
    now: DateTime<Utc>,
) -> Result<u64, StoreError> {
    let result = sqlx::query!(
        "update secrets s set key_id = $1, wrapped = u.wrapped, rotated_at = $4
           from unnest($2::text[], $3::bytea[]) u (name, wrapped) where s.name = u.name",
        key_id,
        names,
        wrapped,
        now,
    )
    .execute(db)
    .await?;
    Ok(result.rows_affected())
}
