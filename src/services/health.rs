//! Whether what everything needs is there.

use std::time::Duration;

use super::Services;
use super::error::ServiceError;
use crate::store::health as store;

const PATIENCE: Duration = Duration::from_secs(2);

impl Services {
    /// Fails when the database does not answer soon.
    pub async fn check_database(&self) -> Result<(), ServiceError> {
        let ping = async {
            let mut db = self.pool().acquire().await?;
            store::ping(&mut db).await?;
            Ok(())
        };
        let late = |_| ServiceError::unavailable("the database does not answer in time");
        tokio::time::timeout(PATIENCE, ping).await.map_err(late)?
    }
}
