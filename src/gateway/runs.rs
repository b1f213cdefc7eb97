//! Runs of a thread. What runs with and without a thread have in common is here too.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Gateway;
use super::error::ApiError;
use super::extract::{Body, Caller, Ids, Params};
use super::run_request::{RunRequest, stream_modes};
use super::sse::{self, Slot, Streaming};
use super::view;
use super::wait::{self, Waiting};
use crate::ids::{RunId, ThreadId};
use crate::services::api::{
    Actor, CancelAction, CreateRun, Object, OnDisconnect, RunFilter, RunKey, RunStatus, RunView,
    StreamFrom, StreamRequest,
};

/// Routes that answer soon.
pub(super) fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new().routes(routes!(create, list)).routes(routes!(get, delete))
}

/// Routes that take as long as a run.
pub(super) fn long_routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new()
        .routes(routes!(create_and_stream))
        .routes(routes!(create_and_wait))
        .routes(routes!(stream))
        .routes(routes!(join))
        .routes(routes!(cancel))
}

/// Start a run.
#[utoipa::path(post, path = "/threads/{thread_id}/runs", tag = "runs",
    params(("thread_id" = uuid::Uuid, Path)), request_body = RunRequest,
    responses((status = 200, body = RunView)))]
async fn create(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(thread): Ids<ThreadId>,
    Body(request): Body<RunRequest>,
) -> Result<Response, ApiError> {
    let request = request.into_create()?;
    let run = gateway.services().create_run(&actor, Some(thread), request).await?;
    Ok(with_location(&Place::of(&run, Some(thread)), None, Json(run).into_response()))
}

/// Start a run and stream its events.
#[utoipa::path(post, path = "/threads/{thread_id}/runs/stream", tag = "runs",
    params(("thread_id" = uuid::Uuid, Path)), request_body = RunRequest,
    responses((status = 200, body = String, content_type = "text/event-stream")))]
async fn create_and_stream(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(thread): Ids<ThreadId>,
    Body(request): Body<RunRequest>,
) -> Result<Response, ApiError> {
    start_and_stream(&gateway, &actor, Some(thread), request.into_create()?).await
}

/// Start a run and wait for its values.
///
/// After some seconds the answer begins, with white space that goes on until the run has ended: from
/// then on its status is 200, and a failure is in the body as `__error__`.
#[utoipa::path(post, path = "/threads/{thread_id}/runs/wait", tag = "runs",
    params(("thread_id" = uuid::Uuid, Path)), request_body = RunRequest,
    responses((status = 200, body = Object)))]
async fn create_and_wait(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(thread): Ids<ThreadId>,
    Body(request): Body<RunRequest>,
) -> Result<Response, ApiError> {
    start_and_wait(&gateway, &actor, Some(thread), request.into_create()?).await
}

/// List a thread's runs, newest first.
#[utoipa::path(get, path = "/threads/{thread_id}/runs", tag = "runs",
    params(("thread_id" = uuid::Uuid, Path), ("limit" = Option<u32>, Query),
           ("offset" = Option<u32>, Query), ("status" = Option<RunStatus>, Query),
           ("select" = Option<Vec<String>>, Query)),
    responses((status = 200, body = [RunView])))]
async fn list(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(thread): Ids<ThreadId>,
    params: Params,
) -> Result<Json<Vec<Value>>, ApiError> {
    let filter = RunFilter {
        thread: Some(thread),
        status: params.parsed("status", "a run's status", RunStatus::parse)?,
        metadata: Object::new(),
        limit: params.number("limit", 10)?,
        offset: params.number("offset", 0)?,
    };
    let runs = gateway.services().list_runs(&actor, filter).await?;
    let select = params.all("select");
    runs.iter().map(|run| view::select(run, &select)).collect::<Result<_, _>>().map(Json)
}

/// One run.
#[utoipa::path(get, path = "/threads/{thread_id}/runs/{run_id}", tag = "runs",
    params(("thread_id" = uuid::Uuid, Path), ("run_id" = uuid::Uuid, Path)),
    responses((status = 200, body = RunView)))]
async fn get(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids((thread, run)): Ids<(ThreadId, RunId)>,
) -> Result<Json<RunView>, ApiError> {
    let key = RunKey { thread: Some(thread), run };
    Ok(Json(gateway.services().get_run(&actor, key).await?))
}

/// Delete a run that has ended.
#[utoipa::path(delete, path = "/threads/{thread_id}/runs/{run_id}", tag = "runs",
    params(("thread_id" = uuid::Uuid, Path), ("run_id" = uuid::Uuid, Path)),
    responses((status = 204)))]
async fn delete(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids((thread, run)): Ids<(ThreadId, RunId)>,
) -> Result<StatusCode, ApiError> {
    gateway.services().delete_run(&actor, RunKey { thread: Some(thread), run }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Stream a run's events.
///
/// `Last-Event-ID` says where to begin: after that event, or with `-1` at the first one; without, with
/// what happens from now on.
#[utoipa::path(get, path = "/threads/{thread_id}/runs/{run_id}/stream", tag = "runs",
    params(("thread_id" = uuid::Uuid, Path), ("run_id" = uuid::Uuid, Path),
           ("stream_mode" = Option<Vec<String>>, Query),
           ("cancel_on_disconnect" = Option<bool>, Query),
           ("Last-Event-ID" = Option<String>, Header)),
    responses((status = 200, body = String, content_type = "text/event-stream")))]
async fn stream(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids((thread, run)): Ids<(ThreadId, RunId)>,
    params: Params,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    follow(&gateway, &actor, RunKey { thread: Some(thread), run }, &params, &headers).await
}

/// Wait for a run's values. The answer begins as that of starting and waiting.
#[utoipa::path(get, path = "/threads/{thread_id}/runs/{run_id}/join", tag = "runs",
    params(("thread_id" = uuid::Uuid, Path), ("run_id" = uuid::Uuid, Path),
           ("cancel_on_disconnect" = Option<bool>, Query)),
    responses((status = 200, body = Object)))]
async fn join(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids((thread, run)): Ids<(ThreadId, RunId)>,
    params: Params,
) -> Result<Response, ApiError> {
    let cancel = params.flag("cancel_on_disconnect")?;
    let key = RunKey { thread: Some(thread), run };
    let response = wait_for(&gateway, &actor, key, cancel).await?;
    Ok(with_location(&Place { thread: Some(thread), run }, Some("join"), response))
}

/// Cancel a run. With `wait` the answer comes when it has ended.
#[utoipa::path(post, path = "/threads/{thread_id}/runs/{run_id}/cancel", tag = "runs",
    params(("thread_id" = uuid::Uuid, Path), ("run_id" = uuid::Uuid, Path),
           ("wait" = Option<bool>, Query), ("action" = Option<CancelAction>, Query),
           ("reason" = Option<String>, Query)),
    responses((status = 202), (status = 200, body = Object)))]
async fn cancel(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids((thread, run)): Ids<(ThreadId, RunId)>,
    params: Params,
) -> Result<Response, ApiError> {
    cancel_one(&gateway, &actor, RunKey { thread: Some(thread), run }, &params).await
}

/// Starts a run and streams it.
pub(super) async fn start_and_stream(
    gateway: &Gateway,
    actor: &Actor,
    thread: Option<ThreadId>,
    request: CreateRun,
) -> Result<Response, ApiError> {
    let slot = Slot::take(&gateway.0.slots)?;
    let cancel = request.on_disconnect == OnDisconnect::Cancel;
    let run = gateway.services().create_run(actor, thread, request).await?;
    let key = RunKey { thread: Some(run.thread_id), run: run.run_id };
    let request = StreamRequest { modes: Vec::new(), subgraphs: None, from: StreamFrom::Start };
    let response = open_stream(gateway, actor, key, &run, request, cancel, slot).await?;
    Ok(with_location(&Place::of(&run, thread), Some("stream"), response))
}

/// Starts a run and waits for it.
pub(super) async fn start_and_wait(
    gateway: &Gateway,
    actor: &Actor,
    thread: Option<ThreadId>,
    request: CreateRun,
) -> Result<Response, ApiError> {
    let cancel = request.on_disconnect == OnDisconnect::Cancel;
    let run = gateway.services().create_run(actor, thread, request).await?;
    let key = RunKey { thread: Some(run.thread_id), run: run.run_id };
    let response = wait_for(gateway, actor, key, cancel).await?;
    Ok(with_location(&Place::of(&run, thread), Some("join"), response))
}

/// Streams a run that exists.
pub(super) async fn follow(
    gateway: &Gateway,
    actor: &Actor,
    key: RunKey,
    params: &Params,
    headers: &HeaderMap,
) -> Result<Response, ApiError> {
    let mut modes = params.all("stream_mode");
    modes.extend(params.all("stream_modes"));
    let request = StreamRequest {
        modes: stream_modes(modes, "/query/stream_mode")?,
        subgraphs: None,
        from: stream_from(headers)?,
    };
    let cancel = params.flag("cancel_on_disconnect")?;
    let slot = Slot::take(&gateway.0.slots)?;
    let run = gateway.services().get_run(actor, key).await?;
    let response = open_stream(gateway, actor, key, &run, request, cancel, slot).await?;
    Ok(with_location(&Place { thread: key.thread, run: key.run }, Some("stream"), response))
}

async fn open_stream(
    gateway: &Gateway,
    actor: &Actor,
    key: RunKey,
    run: &RunView,
    request: StreamRequest,
    cancel: bool,
    slot: Slot,
) -> Result<Response, ApiError> {
    let closing = gateway.0.closing.clone();
    let guard = gateway.0.disconnects.guard(cancel, actor, key, &closing);
    let items = gateway.services().stream_run(actor, key, request).await?;
    let heartbeat = gateway.config().heartbeat;
    Ok(sse::response(run, Streaming { items, guard, closing, heartbeat, _slot: slot }))
}

/// Waits for the values of a run that exists.
pub(super) async fn wait_for(
    gateway: &Gateway,
    actor: &Actor,
    key: RunKey,
    cancel: bool,
) -> Result<Response, ApiError> {
    let slot = Slot::take(&gateway.0.slots)?;
    let closing = gateway.0.closing.clone();
    let guard = gateway.0.disconnects.guard(cancel, actor, key, &closing);
    let (services, actor) = (gateway.services().clone(), actor.clone());
    let answer = Box::pin(async move { services.wait_run(&actor, key).await });
    let heartbeat = gateway.config().heartbeat;
    wait::response(Waiting { answer, guard, closing, heartbeat, _slot: slot }).await
}

/// Cancels a run.
pub(super) async fn cancel_one(
    gateway: &Gateway,
    actor: &Actor,
    key: RunKey,
    params: &Params,
) -> Result<Response, ApiError> {
    let wait = params.flag("wait")?;
    let action = cancel_action(params)?;
    let reason = params.get("reason").map(str::to_owned);
    gateway.services().cancel_run(actor, key, action, reason, wait).await?;
    if !wait {
        return Ok(StatusCode::ACCEPTED.into_response());
    }
    let response = Json(json!({})).into_response();
    Ok(with_location(&Place { thread: key.thread, run: key.run }, Some("join"), response))
}

/// `?action=`.
pub(super) fn cancel_action(params: &Params) -> Result<CancelAction, ApiError> {
    let action = params.parsed("action", "interrupt or rollback", CancelAction::parse)?;
    Ok(action.unwrap_or(CancelAction::Interrupt))
}

fn stream_from(headers: &HeaderMap) -> Result<StreamFrom, ApiError> {
    let Some(id) = headers.get("last-event-id") else { return Ok(StreamFrom::Now) };
    let wrong = |_| ApiError::invalid("the Last-Event-ID header must be plain text");
    Ok(match id.to_str().map_err(wrong)?.trim() {
        "" => StreamFrom::Now,
        "-1" | "-" => StreamFrom::Start,
        id => StreamFrom::After(id.to_owned()),
    })
}

/// Where a run is found: under its thread, or, when it was started without one, by itself.
pub(super) struct Place {
    thread: Option<ThreadId>,
    run: RunId,
}

impl Place {
    /// Of a run that was started on `thread`.
    pub(super) fn of(run: &RunView, thread: Option<ThreadId>) -> Self {
        Self { thread, run: run.run_id }
    }

    fn path(&self) -> String {
        match self.thread {
            Some(thread) => format!("/threads/{thread}/runs/{}", self.run),
            None => format!("/runs/{}", self.run),
        }
    }
}

/// Tells where the run is, and where to take up `again` what the connection may cut.
pub(super) fn with_location(
    place: &Place,
    again: Option<&str>,
    mut response: Response,
) -> Response {
    let path = place.path();
    let again = again.map(|again| format!("{path}/{again}"));
    let headers: [(HeaderName, Option<String>); 2] =
        [(header::CONTENT_LOCATION, Some(path)), (header::LOCATION, again)];
    for (name, value) in headers {
        if let Some(value) = value.and_then(|value| HeaderValue::try_from(value).ok()) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(input: Option<&str>, expected: &StreamFrom) {
        let mut headers = HeaderMap::new();
        if let Some(id) = input {
            headers.insert("last-event-id", id.parse().unwrap());
        }
        assert_eq!(stream_from(&headers).unwrap(), *expected);
    }

    #[test]
    fn a_stream_begins_where_the_client_says() {
        check(None, &StreamFrom::Now);
        check(Some("-1"), &StreamFrom::Start);
        check(Some("-"), &StreamFrom::Start);
        check(Some("7-2"), &StreamFrom::After("7-2".to_owned()));
    }
}
