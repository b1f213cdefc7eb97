//! What attempts did to the world, as it is read. It is written by the commits of the runs: see [`super::commit`].

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

use super::StoreError;
use crate::ids::{RunId, TaskId};

/// An effect, as stored.
#[derive(Debug, Clone)]
pub struct EffectRecord {
    /// The activation.
    pub task_id: TaskId,
    /// Which attempt of it.
    pub attempt: i32,
    /// What names the attempt to the other side; an old one has none stored.
    pub idempotency_key: Option<String>,
    /// The namespace of the activation, empty for the root.
    pub namespace: String,
    /// The node's name.
    pub node: String,
    /// `tool`, `model`, `use`.
    pub kind: String,
    /// What was called.
    pub target: String,
    /// `idempotent` or `effectful`.
    pub effect: String,
    /// See [`crate::graph::checkpoint::EffectStatus`].
    pub status: String,
    /// How often it was about to be sent.
    pub sends: i32,
    /// When it was first about to be sent.
    pub started_at: DateTime<Utc>,
    /// When its outcome was stored.
    pub ended_at: Option<DateTime<Utc>>,
    /// SHA-256 of the request's JSON.
    pub request_hash: Vec<u8>,
    /// JSON of the request, clipped when long.
    pub request: Vec<u8>,
    /// JSON of the outcome, clipped when long.
    pub outcome: Option<Vec<u8>>,
}

/// A run's effects, in the order in which they were first about to be sent, after `offset` of them.
pub async fn of_run(
    db: &mut PgConnection,
    run: RunId,
    limit: i64,
    offset: i64,
) -> Result<Vec<EffectRecord>, StoreError> {
    let effects = sqlx::query_as!(
        EffectRecord,
        r#"select task_id as "task_id: TaskId", attempt, idempotency_key, namespace, node, kind, target, effect, status, sends,
                  started_at, ended_at, request_hash, request, outcome
             from effects where run_id = $1
            order by started_at, task_id, attempt limit $2 offset $3"#,
        run as RunId,
        limit,
        offset,
    )
    .fetch_all(db)
    .await?;
    Ok(effects)
}
