//! Jobs: what was sent to a worker for an activation, and what came back.
//!
//! **Invariant:** a job's row is inserted before anything is sent, and its result settles the
//! activation in the transaction that stores it.

use sqlx::PgConnection;

use super::StoreError;
use crate::ids::RunId;

/// The run has ended: its jobs that have not are to be stopped.
pub async fn cancel_of(db: &mut PgConnection, run: RunId) -> Result<(), StoreError> {
    sqlx::query!(
        "update jobs set status = case status when 'intent' then 'canceled' else 'canceling' end
          where run_id = $1 and status in ('intent', 'sent')",
        run as RunId,
    )
    .execute(db)
    .await?;
    Ok(())
}
