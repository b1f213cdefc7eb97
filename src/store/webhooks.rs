//! The news that a run has ended, on its way to the URL that its client named.
//!
//! The transaction that ends a run inserts a run of the server's own, of the built-in graph that delivers.
//! Everything that the delivery says is copied into it: the run, its thread and its checkpoints may be gone
//! when it gets through.
//!
//! **Invariant:** one end, one delivery: inserted by the statement's transaction that ends the run, or not at all.

use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Map, Value, json};
use sqlx::PgConnection;
use uuid::Uuid;

use super::runs::{self, NewRun, RunOptions, RunRow};
use super::{StoreError, threads};
use crate::graph::input::Order;
use crate::ids::{AssistantId, RunId, ThreadId, UserId};

/// Owns the runs that the server starts for itself. The schema has its row.
pub const SYSTEM_USER: UserId = UserId(Uuid::from_u128(1));
/// The name of that user.
pub const SYSTEM_NAME: &str = "cynai-system";
/// The name under which the version of the built-in graph is kept that deliveries use. No graph file can have it.
pub const GRAPH: &str = "cynai/webhook";
/// Bytes of the JSON of a run's values that a delivery carries; larger ones are left out of it.
pub const MAX_VALUES_BYTES: usize = 4 << 20;

/// Starts the delivery for a run that has ended in this transaction. False: there is no graph that delivers.
pub(super) async fn enqueue(
    db: &mut PgConnection,
    ended: RunId,
    url: &str,
    values: Option<&[u8]>,
) -> Result<bool, StoreError> {
    let hash = sqlx::query_scalar!("select hash from graph_names where name = $1", GRAPH)
        .fetch_optional(&mut *db)
        .await?;
    let (Some(hash), Some(row)) = (hash, runs::find(db, ended).await?) else {
        tracing::error!(run.id = %ended, "the end of run {ended} cannot be told: the built-in graph is missing");
        return Ok(false);
    };
    let corrupt = |source| StoreError::Corrupt { what: "delivery", source };
    let delivery = delivery(&row, url, values);
    let order = Order { input: Some(json!({ "delivery": delivery })), ..Order::default() };
    let order = serde_json::to_vec(&order).map_err(corrupt)?;
    let empty = Value::Object(Map::new());
    let options = RunOptions {
        config: empty.clone(),
        context: empty.clone(),
        kwargs: empty.clone(),
        ..RunOptions::default()
    };
    let options = serde_json::to_vec(&options).map_err(corrupt)?;
    let thread = ThreadId::new();
    let now = row.ended_at.unwrap_or(row.updated_at);
    threads::insert(db, thread, SYSTEM_USER, &Map::new(), now).await?;
    let run = NewRun {
        run_id: RunId::new(),
        thread_id: thread,
        user_id: SYSTEM_USER,
        assistant_id: AssistantId(Uuid::nil()),
        graph_hash: &hash,
        multitask_strategy: "enqueue",
        priority: 0,
        after_seconds: None,
        input: Some(&order),
        options: &options,
        stream_modes: &[],
        metadata: &empty,
        temporary_thread: true,
        active: true,
        seq: -1,
        branch: 0,
        webhook: None,
        granted: None,
    };
    runs::insert(db, &run).await?;
    Ok(true)
}

/// What the node that delivers gets: where to, whose, the run as clients see it, and its values.
fn delivery(row: &RunRow, url: &str, values: Option<&[u8]>) -> Value {
    let read = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).ok();
    let options = serde_json::from_slice::<RunOptions>(&row.options).unwrap_or_default();
    let large = values.map(<[u8]>::len).filter(|size| *size > MAX_VALUES_BYTES);
    let mut run = json!({
        "run_id": row.run_id,
        "thread_id": row.thread_id,
        "assistant_id": row.assistant_id,
        "created_at": instant(row.created_at),
        "updated_at": instant(row.updated_at),
        "status": row.status,
        "metadata": row.metadata,
        "kwargs": options.kwargs,
        "multitask_strategy": row.multitask_strategy,
        "run_started_at": row.started_at.map(instant),
        "run_ended_at": row.ended_at.map(instant),
        "values": values.filter(|_| large.is_none()).and_then(read),
    });
    if let Some(reason) = &row.cancel_reason {
        run["cancel_reason"] = reason.as_str().into();
    }
    if let Some(error) = row.error.as_deref().and_then(read) {
        run["error"] = error;
    }
    if let Some(size) = large {
        let message = format!(
            "the values have {size} bytes of JSON; a webhook carries at most {MAX_VALUES_BYTES}: read the thread's state"
        );
        run["values_omitted"] = message.into();
    }
    json!({ "url": url, "owner": row.user_id, "run": run })
}

fn instant(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Micros, false)
}
