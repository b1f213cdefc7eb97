//! What streams show beside the checkpoints.
//!
//! **Invariant:** rows of a run are ordered by (seq, place), and are never changed.

use sqlx::PgConnection;

use super::StoreError;
use crate::ids::RunId;

/// One row.
#[derive(Debug, Clone)]
pub struct StreamEvent {
    /// The superstep's checkpoint, made or to be made.
    pub seq: i64,
    /// Order within it.
    pub place: i32,
    /// `updates`, `tasks`, `custom`.
    pub mode: String,
    /// Where it happened.
    pub namespace: String,
    /// JSON.
    pub data: Vec<u8>,
}

/// Rows after a position, in order.
pub async fn after(
    db: &mut PgConnection,
    run: RunId,
    seq: i64,
    place: i32,
    limit: i64,
) -> Result<Vec<StreamEvent>, StoreError> {
    let rows = sqlx::query_as!(
        StreamEvent,
        "select seq, place, mode, namespace, data from stream_events
          where run_id = $1 and (seq, place) > ($2, $3) order by seq, place limit $4",
        run as RunId,
        seq,
        place,
        limit,
    )
    .fetch_all(db)
    .await?;
    Ok(rows)
}

/// The place of the first row that a driver may add for `seq`.
pub async fn next_place(db: &mut PgConnection, run: RunId, seq: i64) -> Result<i32, StoreError> {
    let place = sqlx::query_scalar!(
        r#"select coalesce(max(place) + 1, 0) as "place!" from stream_events where run_id = $1 and seq = $2"#,
        run as RunId,
        seq,
    )
    .fetch_one(db)
    .await?;
    Ok(place)
}
