//! Runs without a thread of the client's, and runs by their id alone.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Gateway;
use super::error::ApiError;
use super::extract::{Body, Caller, Ids, Params};
use super::run_request::RunRequest;
use super::runs::{
    Place, cancel_action, cancel_one, follow, start_and_stream, start_and_wait, wait_for,
    with_location,
};
use crate::ids::{RunId, ThreadId};
use crate::services::api::{
    BulkCancel, CancelAction, EffectView, Object, RunFilter, RunKey, RunStatus, RunView,
};

const BATCH_AT_MOST: usize = 100;

/// Routes that answer soon.
pub(super) fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new()
        .routes(routes!(create))
        .routes(routes!(create_batch))
        .routes(routes!(search))
        .routes(routes!(cancel_many))
        .routes(routes!(get, delete))
        .routes(routes!(effects))
}

/// Routes that take as long as a run.
pub(super) fn long_routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new()
        .routes(routes!(create_and_stream))
        .routes(routes!(create_and_wait))
        .routes(routes!(stream))
        .routes(routes!(wait))
        .routes(routes!(join))
        .routes(routes!(cancel))
}

#[derive(Debug, Default, Deserialize, ToSchema)]
struct SearchRequest {
    #[schema(value_type = Option<uuid::Uuid>)]
    thread_id: Option<ThreadId>,
    status: Option<RunStatus>,
    #[schema(value_type = Option<Object>)]
    metadata: Option<Object>,
    /// 1 to 1000; default 10.
    limit: Option<u32>,
    offset: Option<u32>,
}

/// Either a thread with its runs, or a status.
#[derive(Debug, Deserialize, ToSchema)]
struct CancelRequest {
    #[schema(value_type = Option<uuid::Uuid>)]
    thread_id: Option<ThreadId>,
    #[schema(value_type = Option<Vec<uuid::Uuid>>)]
    run_ids: Option<Vec<RunId>>,
    /// pending, running or all.
    status: Option<String>,
}

/// Start a run on a thread of its own.
#[utoipa::path(post, path = "/runs", tag = "stateless runs", request_body = RunRequest,
    responses((status = 200, body = RunView)))]
async fn create(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Body(request): Body<RunRequest>,
) -> Result<Response, ApiError> {
    let run = gateway.services().create_run(&actor, None, request.into_create()?).await?;
    Ok(with_location(&Place::of(&run, None), None, Json(run).into_response()))
}

/// Start several runs, each on a thread of its own. When one is refused, those before it have started.
#[utoipa::path(post, path = "/runs/batch", tag = "stateless runs", request_body = Vec<RunRequest>,
    responses((status = 200, body = [RunView])))]
async fn create_batch(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Body(requests): Body<Vec<RunRequest>>,
) -> Result<Json<Vec<RunView>>, ApiError> {
    if requests.len() > BATCH_AT_MOST {
        return Err(ApiError::invalid(format!("a batch starts at most {BATCH_AT_MOST} runs")));
    }
    let requests = requests.into_iter().map(RunRequest::into_create);
    let requests = requests.collect::<Result<Vec<_>, _>>()?;
    let mut runs = Vec::with_capacity(requests.len());
    for request in requests {
        runs.push(gateway.services().create_run(&actor, None, request).await?);
    }
    Ok(Json(runs))
}

/// Start a run on a thread of its own and stream its events.
#[utoipa::path(post, path = "/runs/stream", tag = "stateless runs", request_body = RunRequest,
    responses((status = 200, body = String, content_type = "text/event-stream")))]
async fn create_and_stream(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Body(request): Body<RunRequest>,
) -> Result<Response, ApiError> {
    start_and_stream(&gateway, &actor, None, request.into_create()?).await
}

/// Start a run on a thread of its own and wait for its values.
#[utoipa::path(post, path = "/runs/wait", tag = "stateless runs", request_body = RunRequest,
    responses((status = 200, body = Object)))]
async fn create_and_wait(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Body(request): Body<RunRequest>,
) -> Result<Response, ApiError> {
    start_and_wait(&gateway, &actor, None, request.into_create()?).await
}

/// List your runs on all threads, newest first.
#[utoipa::path(post, path = "/runs/search", tag = "stateless runs", request_body = SearchRequest,
    responses((status = 200, body = [RunView])))]
async fn search(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Body(request): Body<SearchRequest>,
) -> Result<Json<Vec<RunView>>, ApiError> {
    let filter = RunFilter {
        thread: request.thread_id,
        status: request.status,
        metadata: request.metadata.unwrap_or_default(),
        limit: request.limit.unwrap_or(10),
        offset: request.offset.unwrap_or(0),
    };
    Ok(Json(gateway.services().list_runs(&actor, filter).await?))
}

/// Cancel several runs.
#[utoipa::path(post, path = "/runs/cancel", tag = "stateless runs", request_body = CancelRequest,
    params(("action" = Option<CancelAction>, Query)), responses((status = 204)))]
async fn cancel_many(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    params: Params,
    Body(request): Body<CancelRequest>,
) -> Result<StatusCode, ApiError> {
    let action = cancel_action(&params)?;
    let which = request.into_which()?;
    if gateway.services().cancel_runs(&actor, which, action).await? == 0 {
        let message = "no run was found that could be cancelled";
        return Err(ApiError::new(StatusCode::NOT_FOUND, "not_found", message));
    }
    Ok(StatusCode::NO_CONTENT)
}

impl CancelRequest {
    fn into_which(self) -> Result<BulkCancel, ApiError> {
        match (self.thread_id, self.run_ids, self.status.as_deref()) {
            (Some(thread), Some(runs), None) => Ok(BulkCancel::Runs { thread, runs }),
            (None, None, Some("all")) => Ok(BulkCancel::Status(None)),
            (None, None, Some("pending")) => Ok(BulkCancel::Status(Some(RunStatus::Pending))),
            (None, None, Some("running")) => Ok(BulkCancel::Status(Some(RunStatus::Running))),
            _ => Err(ApiError::invalid(
                "send `thread_id` with `run_ids`, or `status`: pending, running or all",
            )),
        }
    }
}

/// One run.
#[utoipa::path(get, path = "/runs/{run_id}", tag = "stateless runs",
    params(("run_id" = uuid::Uuid, Path)), responses((status = 200, body = RunView)))]
async fn get(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(run): Ids<RunId>,
) -> Result<Json<RunView>, ApiError> {
    Ok(Json(gateway.services().get_run(&actor, RunKey { thread: None, run }).await?))
}

/// Delete a run that has ended.
#[utoipa::path(delete, path = "/runs/{run_id}", tag = "stateless runs",
    params(("run_id" = uuid::Uuid, Path)), responses((status = 204)))]
async fn delete(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(run): Ids<RunId>,
) -> Result<StatusCode, ApiError> {
    gateway.services().delete_run(&actor, RunKey { thread: None, run }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What a run did to the world: each attempt that was about to act, and what came of it.
#[utoipa::path(get, path = "/runs/{run_id}/effects", tag = "stateless runs",
    params(("run_id" = uuid::Uuid, Path), ("limit" = Option<u32>, Query), ("offset" = Option<u32>, Query)),
    responses((status = 200, body = [EffectView])))]
async fn effects(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(run): Ids<RunId>,
    params: Params,
) -> Result<Json<Vec<EffectView>>, ApiError> {
    let key = RunKey { thread: None, run };
    let (limit, offset) = (params.number("limit", 100)?, params.number("offset", 0)?);
    Ok(Json(gateway.services().list_effects(&actor, key, limit, offset).await?))
}

/// Stream a run's events.
#[utoipa::path(get, path = "/runs/{run_id}/stream", tag = "stateless runs",
    params(("run_id" = uuid::Uuid, Path), ("stream_mode" = Option<Vec<String>>, Query),
           ("cancel_on_disconnect" = Option<bool>, Query),
           ("Last-Event-ID" = Option<String>, Header)),
    responses((status = 200, body = String, content_type = "text/event-stream")))]
async fn stream(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(run): Ids<RunId>,
    params: Params,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    follow(&gateway, &actor, RunKey { thread: None, run }, &params, &headers).await
}

/// Wait for a run's values; the same as join.
#[utoipa::path(get, path = "/runs/{run_id}/wait", tag = "stateless runs",
    params(("run_id" = uuid::Uuid, Path), ("cancel_on_disconnect" = Option<bool>, Query)),
    responses((status = 200, body = Object)))]
async fn wait(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(run): Ids<RunId>,
    params: Params,
) -> Result<Response, ApiError> {
    join_one(&gateway, &actor, run, &params).await
}

/// Wait for a run's values.
#[utoipa::path(get, path = "/runs/{run_id}/join", tag = "stateless runs",
    params(("run_id" = uuid::Uuid, Path), ("cancel_on_disconnect" = Option<bool>, Query)),
    responses((status = 200, body = Object)))]
async fn join(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(run): Ids<RunId>,
    params: Params,
) -> Result<Response, ApiError> {
    join_one(&gateway, &actor, run, &params).await
}

async fn join_one(
    gateway: &Gateway,
    actor: &crate::services::api::Actor,
    run: RunId,
    params: &Params,
) -> Result<Response, ApiError> {
    let key = RunKey { thread: None, run };
    wait_for(gateway, actor, key, params.flag("cancel_on_disconnect")?).await
}

/// Cancel a run.
#[utoipa::path(post, path = "/runs/{run_id}/cancel", tag = "stateless runs",
    params(("run_id" = uuid::Uuid, Path), ("wait" = Option<bool>, Query),
           ("action" = Option<CancelAction>, Query), ("reason" = Option<String>, Query)),
    responses((status = 202), (status = 200, body = Object)))]
async fn cancel(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(run): Ids<RunId>,
    params: Params,
) -> Result<Response, ApiError> {
    cancel_one(&gateway, &actor, RunKey { thread: None, run }, &params).await
}
