//! Runs after they were accepted: read, cancel, delete, wait; and events for the threads that they run on.
//!
//! Cancelling ends the run right here, in one transaction under the thread's lock. Whoever advances it
//! finds its fence gone at the next commit, and is told so that it stops at once.

use std::time::Duration;

use serde_json::value::RawValue;
use serde_json::{Value, json};
use sqlx::PgConnection;

use super::Services;
use super::api::{
    Actor, BulkCancel, CancelAction, MultitaskStrategy, Object, RunFilter, RunKey, RunStatus,
    RunView,
};
use super::error::ServiceError;
use crate::ids::{RunId, ThreadId};
use crate::store::runs::{self, Ended, Ending, RunOptions, RunRow, Which};
use crate::store::{checkpoints, crash, queue};

/// Without a signal, a waiter looks this often.
const POLL: Duration = Duration::from_secs(1);
/// Runs that one bulk request may end.
const MAX_BULK: i64 = 1000;
/// Bytes of an event's name.
const MAX_EVENT_NAME: usize = 200;

impl Services {
    /// One run.
    pub async fn get_run(&self, actor: &Actor, key: RunKey) -> Result<RunView, ServiceError> {
        view(self.run_row(actor, key).await?)
    }

    pub(super) async fn run_row(&self, actor: &Actor, key: RunKey) -> Result<RunRow, ServiceError> {
        let mut db = self.pool().acquire().await?;
        // By its key alone: a listing's filters would have the statement planned anew for each call.
        runs::find(&mut db, key.run)
            .await?
            .filter(|row| row.user_id == actor.user_id)
            .filter(|row| key.thread.is_none_or(|thread| thread == row.thread_id))
            .ok_or_else(|| ServiceError::not_found("run", key.run))
    }

    /// Runs, newest first.
    pub async fn list_runs(
        &self,
        actor: &Actor,
        filter: RunFilter,
    ) -> Result<Vec<RunView>, ServiceError> {
        let limit = self.page_limit(filter.limit)?;
        if let Some(thread) = filter.thread {
            self.get_thread(actor, thread).await?;
        }
        let metadata = Value::Object(filter.metadata);
        let which = Which {
            thread: filter.thread,
            status: filter.status.map(RunStatus::as_str),
            metadata: metadata.as_object().filter(|keys| !keys.is_empty()).map(|_| &metadata),
        };
        let mut db = self.pool().acquire().await?;
        let rows = runs::list(&mut db, actor.user_id, &which, limit, filter.offset.into()).await?;
        rows.into_iter().map(view).collect()
    }

    /// Cancels a run: it has ended when this returns. A run that had ended already is [`ServiceError::NotFound`].
    pub async fn cancel_run(
        &self,
        actor: &Actor,
        key: RunKey,
        action: CancelAction,
        reason: Option<String>,
        _wait: bool,
    ) -> Result<(), ServiceError> {
        let row = self.run_row(actor, key).await?;
        let mut tx = self.transaction().await?;
        let ended = self
            .end_run(&mut tx, &row, action == CancelAction::Rollback, reason.as_deref())
            .await?;
        let ended = ended.ok_or_else(|| ServiceError::NotFound {
            what: "nothing to cancel: run",
            id: key.run.to_string(),
        })?;
        crash::commit(tx, "cancel").await?;
        self.tell_ended(key.run, &ended);
        Ok(())
    }

    fn tell_ended(&self, run: RunId, ended: &Ended) {
        self.hub().run_ended(run);
        if ended.queues() {
            self.hub().queued();
        }
    }

    /// Cancels several runs; answers how many. Runs that have ended are passed over.
    pub async fn cancel_runs(
        &self,
        actor: &Actor,
        which: BulkCancel,
        action: CancelAction,
    ) -> Result<u64, ServiceError> {
        let keys = match which {
            BulkCancel::Runs { thread, runs } => {
                runs.into_iter().map(|run| RunKey { thread: Some(thread), run }).collect()
            }
            BulkCancel::Status(status) => self.open_runs(actor, status).await?,
        };
        let mut count = 0;
        for key in keys {
            match self.cancel_run(actor, key, action, None, false).await {
                Ok(()) => count += 1,
                Err(ServiceError::NotFound { .. }) => {}
                Err(err) => return Err(err),
            }
        }
        Ok(count)
    }

    async fn open_runs(
        &self,
        actor: &Actor,
        status: Option<RunStatus>,
    ) -> Result<Vec<RunKey>, ServiceError> {
        let statuses = match status {
            Some(status) if status.is_terminal() => Vec::new(),
            Some(status) => vec![status],
            None => vec![RunStatus::Pending, RunStatus::Running],
        };
        let mut keys = Vec::new();
        let mut db = self.pool().acquire().await?;
        for status in statuses {
            let which = Which { status: Some(status.as_str()), ..Which::default() };
            let rows = runs::list(&mut db, actor.user_id, &which, MAX_BULK, 0).await?;
            keys.extend(
                rows.into_iter().map(|row| RunKey { thread: Some(row.thread_id), run: row.run_id }),
            );
        }
        Ok(keys)
    }

    /// Ends a run from outside, whatever its fence. `None`: it had ended.
    async fn end_run(
        &self,
        tx: &mut PgConnection,
        row: &RunRow,
        roll_back: bool,
        reason: Option<&str>,
    ) -> Result<Option<Ended>, ServiceError> {
        let locked = runs::lock_thread(tx, row.thread_id).await?;
        let locked = locked.ok_or_else(|| ServiceError::not_found("thread", row.thread_id))?;
        let graph = self.versions().get(&row.graph_hash).await?;
        // What it is shown to have come to is what it came to: no commit slips in between.
        queue::lock_head(tx, row.run_id).await?;
        let active = locked.active_run == Some(row.run_id);
        let standing =
            checkpoints::standing(tx, row.thread_id, locked.branch, None, &graph).await?;
        let values = standing.state.to_json(&graph).to_string().into_bytes();
        let result = standing.state.output(&graph).to_string().into_bytes();
        let error = json!({ "error": "UserInterrupt", "message": reason.unwrap_or("the run was cancelled") });
        let error = error.to_string().into_bytes();
        let ending = Ending {
            status: RunStatus::Interrupted.as_str(),
            error: None,
            result: Some(&result),
            cancel_reason: reason,
            thread_status: if roll_back { "idle" } else { "interrupted" },
            values: active.then_some(values.as_slice()),
            interrupts: None,
            thread_error: (!roll_back).then_some(error.as_slice()),
        };
        let Some(ended) = runs::finish(tx, row.thread_id, row.run_id, None, &ending).await? else {
            return Ok(None);
        };
        if roll_back {
            runs::roll_back(tx, row.thread_id, row.run_id).await?;
            runs::delete(tx, row.run_id).await?;
        }
        Ok(Some(ended))
    }

    /// Ends everything that a thread has under way, for a run that may not wait.
    pub(super) async fn make_room(
        &self,
        tx: &mut PgConnection,
        thread: ThreadId,
        active: RunId,
        roll_back: bool,
    ) -> Result<Vec<RunId>, ServiceError> {
        let mut ended = Vec::new();
        let mut open = runs::pending_of(tx, thread).await?;
        // Those that wait go first, so that none of them is promoted on the way.
        open.push(active);
        for run in open {
            let Some(row) = runs::find(tx, run).await? else { continue };
            let reason = Some("another run took its place");
            if self.end_run(tx, &row, roll_back && run == active, reason).await?.is_some() {
                ended.push(run);
            }
        }
        Ok(ended)
    }

    /// Deletes a run that has ended; [`ServiceError::Conflict`] while it has not.
    pub async fn delete_run(&self, actor: &Actor, key: RunKey) -> Result<(), ServiceError> {
        let row = self.run_row(actor, key).await?;
        if row.ended_at.is_none() {
            return Err(ServiceError::Conflict(format!(
                "run {} has not ended: cancel it first",
                key.run
            )));
        }
        let mut tx = self.transaction().await?;
        runs::delete(&mut tx, key.run).await?;
        crash::commit(tx, "delete run").await?;
        Ok(())
    }

    /// Waits for the end of a run and answers its final values: an object, with `__interrupt__` when it
    /// waits for a person, or `{"__error__": {"error", "message"}}` when it failed.
    pub async fn wait_run(
        &self,
        actor: &Actor,
        key: RunKey,
    ) -> Result<Box<RawValue>, ServiceError> {
        let mut run = self.hub().subscribe(key.run);
        loop {
            let row = self.run_row(actor, key).await?;
            if row.ended_at.is_some() {
                let result = row.result.unwrap_or_else(|| b"{}".to_vec());
                let text = String::from_utf8(result).map_err(ServiceError::internal)?;
                return RawValue::from_string(text).map_err(ServiceError::internal);
            }
            run.ended(POLL).await;
        }
    }

    /// Sends a named event to a thread: it settles a `wait: event`, now or when one begins to wait.
    pub async fn send_event(
        &self,
        actor: &Actor,
        thread: ThreadId,
        name: String,
        payload: Value,
    ) -> Result<(), ServiceError> {
        if name.is_empty() || name.len() > MAX_EVENT_NAME || name.contains('\0') {
            let message =
                format!("an event's name has 1 to {MAX_EVENT_NAME} bytes, none of them NUL");
            return Err(ServiceError::invalid_at("/name", message));
        }
        let payload = payload.to_string().into_bytes();
        if payload.len() > self.limits().input_bytes {
            return Err(super::checks::over("payload", payload.len(), self.limits().input_bytes));
        }
        let mut tx = self.transaction().await?;
        let missing = || ServiceError::not_found("thread", thread);
        let locked = runs::lock_thread(&mut tx, thread).await?.ok_or_else(missing)?;
        if locked.user_id != actor.user_id {
            return Err(missing());
        }
        let most = i64::from(self.limits().events_per_thread);
        if queue::count_events(&mut tx, thread).await? >= most {
            return Err(ServiceError::TooMany {
                message: format!("{most} events of thread {thread} wait to be taken already"),
                retry_after: Duration::from_secs(60),
            });
        }
        queue::send_event(&mut tx, thread, locked.active_run, &name, &payload).await?;
        crash::commit(tx, "event").await?;
        self.hub().queued();
        Ok(())
    }
}

fn view(row: RunRow) -> Result<RunView, ServiceError> {
    let options: RunOptions =
        serde_json::from_slice(&row.options).map_err(ServiceError::internal)?;
    let error = row
        .error
        .as_deref()
        .map(serde_json::from_slice)
        .transpose()
        .map_err(ServiceError::internal)?;
    let metadata: Object = match row.metadata {
        Value::Object(keys) => keys,
        _ => Object::new(),
    };
    Ok(RunView {
        run_id: row.run_id,
        thread_id: row.thread_id,
        assistant_id: row.assistant_id,
        created_at: row.created_at,
        updated_at: row.updated_at,
        started_at: row.started_at,
        ended_at: row.ended_at,
        status: RunStatus::parse(&row.status)
            .ok_or_else(|| ServiceError::internal("an unknown run status"))?,
        metadata,
        kwargs: options.kwargs,
        multitask_strategy: MultitaskStrategy::parse(&row.multitask_strategy)
            .unwrap_or(MultitaskStrategy::Enqueue),
        cancel_reason: row.cancel_reason,
        error,
    })
}
