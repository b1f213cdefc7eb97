//! Whether the database answers.

use sqlx::PgConnection;

use super::StoreError;

/// Asks the database for nothing.
pub async fn ping(db: &mut PgConnection) -> Result<(), StoreError> {
    sqlx::query_scalar!(r#"select 1 as "one!""#).fetch_one(db).await?;
    Ok(())
}
