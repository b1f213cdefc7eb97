//! States of a thread: latest, by checkpoint, history, update from outside.

use super::Services;
use super::api::{Actor, CheckpointRef, HistoryRequest, StateRequest, ThreadState, UpdateState};
use super::error::ServiceError;
use crate::ids::ThreadId;

const NOT_YET: &str = "states are not available in this build";

impl Services {
    /// One state of a thread; the empty one when nothing ran on it.
    pub async fn thread_state(
        &self,
        _actor: &Actor,
        _thread: ThreadId,
        _request: StateRequest,
    ) -> Result<ThreadState, ServiceError> {
        Err(ServiceError::unavailable(NOT_YET))
    }

    /// States of a thread, newest first.
    pub async fn thread_history(
        &self,
        _actor: &Actor,
        _thread: ThreadId,
        _request: HistoryRequest,
    ) -> Result<Vec<ThreadState>, ServiceError> {
        Err(ServiceError::unavailable(NOT_YET))
    }

    /// Changes the state of an idle thread; answers the checkpoint that this made.
    pub async fn update_state(
        &self,
        _actor: &Actor,
        _thread: ThreadId,
        _request: UpdateState,
    ) -> Result<CheckpointRef, ServiceError> {
        Err(ServiceError::unavailable(NOT_YET))
    }
}
