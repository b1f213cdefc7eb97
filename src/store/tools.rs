//! Pinned definitions of tools, and those that wait for an approval.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

use super::StoreError;

/// A definition that may be used.
#[derive(Debug, Clone)]
pub struct PinRow {
    /// The tool's name.
    pub tool: String,
    /// The definition's hash.
    pub hash: String,
    /// The definition's JSON.
    pub definition: Vec<u8>,
    /// The administrator who approved it; none when it was trusted at first sight.
    pub approved_by: Option<String>,
    /// When.
    pub approved_at: DateTime<Utc>,
}

/// A definition that was seen and not approved.
#[derive(Debug, Clone)]
pub struct PendingRow {
    /// The tool's name.
    pub tool: String,
    /// The definition's hash.
    pub hash: String,
    /// The definition's JSON.
    pub definition: Vec<u8>,
}

/// Records a server; answers whether it was never seen before.
pub async fn insert_server(
    db: &mut PgConnection,
    server: &str,
    now: DateTime<Utc>,
) -> Result<bool, StoreError> {
    let result = sqlx::query!(
        "insert into tool_servers (server, first_seen_at) values ($1, $2) on conflict do nothing",
        server,
        now,
    )
    .execute(db)
    .await?;
    Ok(result.rows_affected() == 1)
}

/// Locks a server's row until the transaction ends; answers whether it was seen before.
pub async fn lock_server(db: &mut PgConnection, server: &str) -> Result<bool, StoreError> {
    let found =
        sqlx::query_scalar!("select server from tool_servers where server = $1 for update", server)
            .fetch_optional(db)
            .await?;
    Ok(found.is_some())
}

/// The pins of a server, by tool.
pub async fn pins(db: &mut PgConnection, server: &str) -> Result<Vec<PinRow>, StoreError> {
    Ok(sqlx::query_as!(
        PinRow,
        "select tool, hash, definition, approved_by, approved_at from tool_pins
         where server = $1 order by tool",
        server,
    )
    .fetch_all(db)
    .await?)
}

/// The pin of one tool.
pub async fn pin(
    db: &mut PgConnection,
    server: &str,
    tool: &str,
) -> Result<Option<PinRow>, StoreError> {
    Ok(sqlx::query_as!(
        PinRow,
        "select tool, hash, definition, approved_by, approved_at from tool_pins
         where server = $1 and tool = $2",
        server,
        tool,
    )
    .fetch_optional(db)
    .await?)
}

/// What waits for an approval on a server, by tool.
pub async fn pending(db: &mut PgConnection, server: &str) -> Result<Vec<PendingRow>, StoreError> {
    Ok(sqlx::query_as!(
        PendingRow,
        "select tool, hash, definition from tool_pending where server = $1 order by tool",
        server,
    )
    .fetch_all(db)
    .await?)
}

/// Pins definitions, in place of the tools' older ones.
pub async fn insert_pins(
    db: &mut PgConnection,
    server: &str,
    rows: &[PendingRow],
    approved_by: Option<&str>,
    now: DateTime<Utc>,
) -> Result<(), StoreError> {
    let (tools, hashes, definitions) = columns(rows);
    sqlx::query!(
        "insert into tool_pins (server, tool, hash, definition, approved_by, approved_at)
         select $1, tool, hash, definition, $5, $6
         from unnest($2::text[], $3::text[], $4::bytea[]) as seen (tool, hash, definition)
         on conflict (server, tool) do update set hash = excluded.hash,
           definition = excluded.definition, approved_by = excluded.approved_by,
           approved_at = excluded.approved_at",
        server,
        &tools,
        &hashes,
        &definitions,
        approved_by,
        now,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Makes `rows` all that waits for an approval on a server.
pub async fn replace_pending(
    db: &mut PgConnection,
    server: &str,
    rows: &[PendingRow],
    now: DateTime<Utc>,
) -> Result<(), StoreError> {
    let (tools, hashes, definitions) = columns(rows);
    sqlx::query!(
        "with seen as (
           select * from unnest($2::text[], $3::text[], $4::bytea[]) as seen (tool, hash, definition)
         ), gone as (
           delete from tool_pending where server = $1 and tool not in (select tool from seen)
         )
         insert into tool_pending (server, tool, hash, definition, seen_at)
         select $1, tool, hash, definition, $5 from seen
         on conflict (server, tool) do update set hash = excluded.hash,
           definition = excluded.definition, seen_at = excluded.seen_at",
        server,
        &tools,
        &hashes,
        &definitions,
        now,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Removes what waited for an approval.
pub async fn delete_pending(
    db: &mut PgConnection,
    server: &str,
    tools: &[String],
) -> Result<(), StoreError> {
    sqlx::query!("delete from tool_pending where server = $1 and tool = any($2)", server, tools)
        .execute(db)
        .await?;
    Ok(())
}

fn columns(rows: &[PendingRow]) -> (Vec<String>, Vec<String>, Vec<Vec<u8>>) {
    let tools = rows.iter().map(|row| row.tool.clone()).collect();
    let hashes = rows.iter().map(|row| row.hash.clone()).collect();
    let definitions = rows.iter().map(|row| row.definition.clone()).collect();
    (tools, hashes, definitions)
}
