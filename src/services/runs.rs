//! Runs: create, get, list, cancel, delete, wait.

use serde_json::Value;
use serde_json::value::RawValue;

use super::Services;
use super::api::{Actor, BulkCancel, CancelAction, CreateRun, RunFilter, RunKey, RunView};
use super::error::ServiceError;
use crate::ids::ThreadId;

const NOT_YET: &str = "runs are not available in this build";

impl Services {
    /// Accepts a run on `thread`, or on a thread of its own. When this returns, the run is stored.
    pub async fn create_run(
        &self,
        _actor: &Actor,
        _thread: Option<ThreadId>,
        _request: CreateRun,
    ) -> Result<RunView, ServiceError> {
        Err(ServiceError::unavailable(NOT_YET))
    }

    /// One run.
    pub async fn get_run(&self, _actor: &Actor, _key: RunKey) -> Result<RunView, ServiceError> {
        Err(ServiceError::unavailable(NOT_YET))
    }

    /// Runs, newest first.
    pub async fn list_runs(
        &self,
        _actor: &Actor,
        _filter: RunFilter,
    ) -> Result<Vec<RunView>, ServiceError> {
        Err(ServiceError::unavailable(NOT_YET))
    }

    /// Cancels a run; with `wait` returns when it has ended. A run that has ended already is
    /// [`ServiceError::NotFound`].
    pub async fn cancel_run(
        &self,
        _actor: &Actor,
        _key: RunKey,
        _action: CancelAction,
        _reason: Option<String>,
        _wait: bool,
    ) -> Result<(), ServiceError> {
        Err(ServiceError::unavailable(NOT_YET))
    }

    /// Cancels several runs without waiting; answers how many. Runs that have ended are passed over.
    pub async fn cancel_runs(
        &self,
        _actor: &Actor,
        _which: BulkCancel,
        _action: CancelAction,
    ) -> Result<u64, ServiceError> {
        Err(ServiceError::unavailable(NOT_YET))
    }

    /// Deletes a run that has ended; [`ServiceError::Conflict`] while it has not.
    pub async fn delete_run(&self, _actor: &Actor, _key: RunKey) -> Result<(), ServiceError> {
        Err(ServiceError::unavailable(NOT_YET))
    }

    /// Waits for the end of a run and answers its final values: an object, with `__interrupt__` when it
    /// waits for a person, or `{"__error__": {"error", "message"}}` when it failed.
    pub async fn wait_run(
        &self,
        _actor: &Actor,
        _key: RunKey,
    ) -> Result<Box<RawValue>, ServiceError> {
        Err(ServiceError::unavailable(NOT_YET))
    }

    /// Sends a named event to a thread: it settles a `wait: event`, now or when one begins to wait.
    pub async fn send_event(
        &self,
        _actor: &Actor,
        _thread: ThreadId,
        _name: String,
        _payload: Value,
    ) -> Result<(), ServiceError> {
        Err(ServiceError::unavailable(NOT_YET))
    }
}
