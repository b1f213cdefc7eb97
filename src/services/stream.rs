//! Streams of a run's events, read from what is stored.

use futures::stream::BoxStream;

use super::Services;
use super::api::{Actor, RunKey, StreamItem, StreamRequest};
use super::error::ServiceError;

/// Wakes the streams and waiters of this process when something was committed.
#[derive(Debug, Default)]
pub struct Hub;

impl Services {
    /// The events of a run, until it has ended. The stream does not hold the run: dropping it leaves the
    /// run as it is.
    pub async fn stream_run(
        &self,
        _actor: &Actor,
        _key: RunKey,
        _request: StreamRequest,
    ) -> Result<BoxStream<'static, Result<StreamItem, ServiceError>>, ServiceError> {
        Err(ServiceError::unavailable("streams are not available in this build"))
    }
}
