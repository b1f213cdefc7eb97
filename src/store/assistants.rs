//! Graphs by hash and by name, and the assistants that configure them.

use chrono::{DateTime, Utc};
use serde_json::{Map, Value};
use sqlx::PgConnection;
use sqlx::types::Json;

use super::StoreError;
use crate::ids::{AssistantId, UserId};

/// An assistant's row.
#[derive(Debug)]
pub struct AssistantRow {
    /// Its id.
    pub assistant_id: AssistantId,
    /// Whose it is; `None` for the default of a graph.
    pub user_id: Option<UserId>,
    /// The graph that it configures.
    pub graph_name: String,
    /// What people call it.
    pub name: String,
    /// What it is for.
    pub description: Option<String>,
    /// `tags`, `recursion_limit`, `configurable`.
    pub config: Json<Map<String, Value>>,
    /// Constant values for its runs.
    pub context: Json<Value>,
    /// The client's own keys.
    pub metadata: Json<Map<String, Value>>,
    /// Grows with every change.
    pub version: i32,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it last changed.
    pub updated_at: DateTime<Utc>,
}

/// Which assistants.
#[derive(Debug)]
pub struct AssistantQuery<'a> {
    /// Whose, beside the defaults.
    pub user: UserId,
    /// Names of loaded graphs: only their defaults are shown.
    pub loaded: &'a [String],
    /// Whose metadata contains this.
    pub metadata: &'a Map<String, Value>,
    /// Of this graph.
    pub graph: Option<&'a str>,
    /// Whose name contains this, in any case.
    pub name: Option<&'a str>,
}

/// Which part of the answer.
#[derive(Debug)]
pub struct AssistantPage<'a> {
    /// A column's name; unknown ones sort by id.
    pub sort_by: &'a str,
    /// Smallest first.
    pub ascending: bool,
    /// At most so many.
    pub limit: i64,
    /// Skip so many.
    pub offset: i64,
}

/// Stores a version of a graph, unless it is stored already.
pub async fn insert_graph(
    db: &mut PgConnection,
    hash: &[u8; 32],
    name: &str,
    definition: &str,
    subgraphs: &Map<String, Value>,
    now: DateTime<Utc>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into graphs (hash, name, definition, subgraphs, created_at)
         values ($1, $2, $3, $4, $5) on conflict (hash) do nothing",
        hash.as_slice(),
        name,
        definition,
        Json(subgraphs) as _,
        now,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Makes a version the one that new runs of a name get.
pub async fn set_graph_name(
    db: &mut PgConnection,
    name: &str,
    hash: &[u8; 32],
    now: DateTime<Utc>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into graph_names (name, hash, updated_at) values ($1, $2, $3)
         on conflict (name) do update set hash = excluded.hash, updated_at = excluded.updated_at
         where graph_names.hash <> excluded.hash",
        name,
        hash.as_slice(),
        now,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Adds an assistant; answers whether the id was free.
pub async fn insert(db: &mut PgConnection, row: &AssistantRow) -> Result<bool, StoreError> {
    let result = sqlx::query!(
        "insert into assistants (assistant_id, user_id, graph_name, name, description, config, context,
                                 metadata, version, created_at, updated_at)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) on conflict (assistant_id) do nothing",
        row.assistant_id as AssistantId,
        row.user_id as Option<UserId>,
        row.graph_name,
        row.name,
        row.description,
        &row.config as _,
        &row.context as _,
        &row.metadata as _,
        row.version,
        row.created_at,
        row.updated_at,
    )
    .execute(db)
    .await?;
    Ok(result.rows_affected() == 1)
}

/// An assistant that `user` may see.
pub async fn find(
    db: &mut PgConnection,
    assistant: AssistantId,
    user: UserId,
) -> Result<Option<AssistantRow>, StoreError> {
    Ok(sqlx::query_as!(
        AssistantRow,
        r#"select assistant_id as "assistant_id: AssistantId", user_id as "user_id: UserId", graph_name,
                  name, description, config as "config: Json<Map<String, Value>>",
                  context as "context: Json<Value>", metadata as "metadata: Json<Map<String, Value>>",
                  version, created_at, updated_at
           from assistants where assistant_id = $1 and (user_id = $2 or user_id is null)"#,
        assistant as AssistantId,
        user as UserId,
    )
    .fetch_optional(db)
    .await?)
}

/// Stores a changed assistant where it is still at the version before; answers whether it was.
pub async fn update(db: &mut PgConnection, row: &AssistantRow) -> Result<bool, StoreError> {
    let result = sqlx::query!(
        "update assistants set graph_name = $3, name = $4, description = $5, config = $6, context = $7,
                               metadata = $8, version = $9, updated_at = $10
         where assistant_id = $1 and user_id = $2 and version = $9 - 1",
        row.assistant_id as AssistantId,
        row.user_id as Option<UserId>,
        row.graph_name,
        row.name,
        row.description,
        &row.config as _,
        &row.context as _,
        &row.metadata as _,
        row.version,
        row.updated_at,
    )
    .execute(db)
    .await?;
    Ok(result.rows_affected() == 1)
}

/// Deletes an assistant of `user`; answers whether there was one.
pub async fn delete(
    db: &mut PgConnection,
    assistant: AssistantId,
    user: UserId,
) -> Result<bool, StoreError> {
    let result = sqlx::query!(
        "delete from assistants where assistant_id = $1 and user_id = $2",
        assistant as AssistantId,
        user as UserId,
    )
    .execute(db)
    .await?;
    Ok(result.rows_affected() == 1)
}

/// Assistants that a user may see, in the order asked for.
pub async fn search(
    db: &mut PgConnection,
    query: &AssistantQuery<'_>,
    page: &AssistantPage<'_>,
) -> Result<Vec<AssistantRow>, StoreError> {
    Ok(sqlx::query_as!(
        AssistantRow,
        r#"select assistant_id as "assistant_id: AssistantId", user_id as "user_id: UserId", graph_name,
                  name, description, config as "config: Json<Map<String, Value>>",
                  context as "context: Json<Value>", metadata as "metadata: Json<Map<String, Value>>",
                  version, created_at, updated_at
           from assistants
           where (user_id = $1 or (user_id is null and graph_name = any($2)))
             and ($3::jsonb = '{}' or metadata @> $3)
             and ($4::text is null or graph_name = $4)
             and ($5::text is null or position(lower($5) in lower(name)) > 0)
           order by
             case when $6 = 'graph_id' and $7 then graph_name when $6 = 'name' and $7 then name end,
             case when $6 = 'graph_id' and not $7 then graph_name
                  when $6 = 'name' and not $7 then name end desc,
             case when $6 = 'created_at' and $7 then created_at when $6 = 'updated_at' and $7 then updated_at end,
             case when $6 = 'created_at' and not $7 then created_at
                  when $6 = 'updated_at' and not $7 then updated_at end desc,
             case when $6 = 'assistant_id' and not $7 then assistant_id end desc,
             assistant_id
           limit $8 offset $9"#,
        query.user as UserId,
        query.loaded,
        Json(query.metadata) as _,
        query.graph,
        query.name,
        page.sort_by,
        page.ascending,
        page.limit,
        page.offset,
    )
    .fetch_all(db)
    .await?)
}

/// How many assistants a user may see.
pub async fn count(db: &mut PgConnection, query: &AssistantQuery<'_>) -> Result<i64, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select count(*) as "count!" from assistants
           where (user_id = $1 or (user_id is null and graph_name = any($2)))
             and ($3::jsonb = '{}' or metadata @> $3)
             and ($4::text is null or graph_name = $4)
             and ($5::text is null or position(lower($5) in lower(name)) > 0)"#,
        query.user as UserId,
        query.loaded,
        Json(query.metadata) as _,
        query.graph,
        query.name,
    )
    .fetch_one(db)
    .await?)
}
