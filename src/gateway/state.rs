//! States of a thread.

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Gateway;
use super::error::ApiError;
use super::extract::{Body, Caller, Ids, Params};
use super::run_request::CheckpointRequest;
use super::view;
use crate::ids::ThreadId;
use crate::services::api::{Actor, HistoryRequest, Object, StateRequest, ThreadState, UpdateState};

/// These routes.
pub(super) fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new()
        .routes(routes!(latest, update))
        .routes(routes!(at_checkpoint))
        .routes(routes!(by_checkpoint))
        .routes(routes!(history, history_by_query))
}

#[derive(Debug, Deserialize, ToSchema)]
struct CheckpointBody {
    checkpoint: CheckpointRequest,
    #[serde(default)]
    subgraphs: bool,
    #[serde(default)]
    select: Vec<String>,
}

#[derive(Debug, Deserialize, ToSchema)]
struct UpdateRequest {
    /// Channel updates: an object, a list of objects, or null.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    values: Value,
    /// The node in whose name it is done.
    as_node: Option<String>,
    checkpoint: Option<CheckpointRequest>,
    checkpoint_id: Option<String>,
}

#[derive(Debug, Default, Deserialize, ToSchema)]
struct HistoryBody {
    /// 1 to 1000; default 10.
    limit: Option<u32>,
    /// A checkpoint's id, `{checkpoint_id}` or `{configurable: {checkpoint_id}}`.
    #[schema(value_type = Option<Object>)]
    before: Option<Value>,
    #[schema(value_type = Option<Object>)]
    metadata: Option<Object>,
    checkpoint: Option<CheckpointRequest>,
    /// Only these keys; without `values` among them, no values are read.
    select: Option<Vec<String>>,
}

/// The latest state.
#[utoipa::path(get, path = "/threads/{thread_id}/state", tag = "states",
    params(("thread_id" = uuid::Uuid, Path), ("subgraphs" = Option<bool>, Query),
           ("select" = Option<Vec<String>>, Query)),
    responses((status = 200, body = ThreadState)))]
async fn latest(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(thread): Ids<ThreadId>,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let request = StateRequest { subgraphs: params.flag("subgraphs")?, ..StateRequest::default() };
    show(&gateway, &actor, thread, request, &params.all("select")).await
}

/// The state at a checkpoint.
#[utoipa::path(get, path = "/threads/{thread_id}/state/{checkpoint_id}", tag = "states",
    params(("thread_id" = uuid::Uuid, Path), ("checkpoint_id" = String, Path),
           ("subgraphs" = Option<bool>, Query), ("select" = Option<Vec<String>>, Query)),
    responses((status = 200, body = ThreadState)))]
async fn at_checkpoint(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids((thread, checkpoint)): Ids<(ThreadId, String)>,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let request = StateRequest {
        checkpoint_id: Some(checkpoint),
        subgraphs: params.flag("subgraphs")?,
        ..StateRequest::default()
    };
    show(&gateway, &actor, thread, request, &params.all("select")).await
}

/// The state at a checkpoint, which may be a subgraph's.
#[utoipa::path(post, path = "/threads/{thread_id}/state/checkpoint", tag = "states",
    params(("thread_id" = uuid::Uuid, Path)), request_body = CheckpointBody,
    responses((status = 200, body = ThreadState)))]
async fn by_checkpoint(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(thread): Ids<ThreadId>,
    Body(body): Body<CheckpointBody>,
) -> Result<Json<Value>, ApiError> {
    let request = StateRequest {
        checkpoint_id: body.checkpoint.checkpoint_id,
        checkpoint_ns: body.checkpoint.checkpoint_ns,
        subgraphs: body.subgraphs,
    };
    show(&gateway, &actor, thread, request, &body.select).await
}

/// Change the state of an idle thread.
#[utoipa::path(post, path = "/threads/{thread_id}/state", tag = "states",
    params(("thread_id" = uuid::Uuid, Path)), request_body = UpdateRequest,
    responses((status = 200, body = Object)))]
async fn update(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(thread): Ids<ThreadId>,
    Body(request): Body<UpdateRequest>,
) -> Result<Json<Value>, ApiError> {
    let given = request.checkpoint.unwrap_or_default();
    let request = UpdateState {
        values: request.values,
        as_node: request.as_node,
        checkpoint_id: request.checkpoint_id.or(given.checkpoint_id),
        checkpoint_ns: given.checkpoint_ns,
    };
    let made = gateway.services().update_state(&actor, thread, request).await?;
    Ok(Json(json!({
        "checkpoint": made,
        "configurable": made,
        "checkpoint_id": made.checkpoint_id,
    })))
}

/// States, newest first.
#[utoipa::path(post, path = "/threads/{thread_id}/history", tag = "states",
    params(("thread_id" = uuid::Uuid, Path)), request_body = HistoryBody,
    responses((status = 200, body = [ThreadState])))]
async fn history(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(thread): Ids<ThreadId>,
    Body(body): Body<HistoryBody>,
) -> Result<Json<Vec<Value>>, ApiError> {
    let select = body.select.unwrap_or_default();
    let request = HistoryRequest {
        limit: body.limit.unwrap_or(10),
        before: body.before.map(before).transpose()?.flatten(),
        checkpoint_ns: body.checkpoint.unwrap_or_default().checkpoint_ns,
        metadata: body.metadata.unwrap_or_default(),
        values: wants_values(&select),
    };
    list(&gateway, &actor, thread, request, &select).await
}

/// States, newest first.
#[utoipa::path(get, path = "/threads/{thread_id}/history", tag = "states",
    params(("thread_id" = uuid::Uuid, Path), ("limit" = Option<u32>, Query),
           ("before" = Option<String>, Query), ("select" = Option<Vec<String>>, Query)),
    responses((status = 200, body = [ThreadState])))]
async fn history_by_query(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(thread): Ids<ThreadId>,
    params: Params,
) -> Result<Json<Vec<Value>>, ApiError> {
    let select = params.all("select");
    let request = HistoryRequest {
        limit: params.number("limit", 10)?,
        before: params.get("before").map(str::to_owned),
        checkpoint_ns: String::new(),
        metadata: Object::new(),
        values: wants_values(&select),
    };
    list(&gateway, &actor, thread, request, &select).await
}

async fn show(
    gateway: &Gateway,
    actor: &Actor,
    thread: ThreadId,
    request: StateRequest,
    select: &[String],
) -> Result<Json<Value>, ApiError> {
    let state = gateway.services().thread_state(actor, thread, request).await?;
    view::select(&state, select).map(Json)
}

async fn list(
    gateway: &Gateway,
    actor: &Actor,
    thread: ThreadId,
    request: HistoryRequest,
    select: &[String],
) -> Result<Json<Vec<Value>>, ApiError> {
    let states = gateway.services().thread_history(actor, thread, request).await?;
    let states = states.iter().map(|state| view::select(state, select));
    states.collect::<Result<_, _>>().map(Json)
}

fn wants_values(select: &[String]) -> bool {
    select.is_empty() || select.iter().any(|key| key == "values" || key.starts_with("values."))
}

/// Clients send a checkpoint's id in three forms.
fn before(value: Value) -> Result<Option<String>, ApiError> {
    match value {
        Value::Null => Ok(None),
        Value::String(id) => Ok(Some(id)),
        Value::Object(mut given) => {
            let inner = match given.remove("configurable") {
                Some(Value::Object(inner)) => inner,
                _ => given,
            };
            match inner.get("checkpoint_id") {
                None | Some(Value::Null) => Ok(None),
                Some(Value::String(id)) => Ok(Some(id.clone())),
                Some(_) => Err(wrong_before()),
            }
        }
        _ => Err(wrong_before()),
    }
}

fn wrong_before() -> ApiError {
    ApiError::invalid_at(
        "/before",
        "`before` must be a checkpoint's id, or an object with `checkpoint_id`",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(input: Value, expected: Option<Option<&str>>) {
        let found = before(input.clone()).ok();
        assert_eq!(found, expected.map(|id| id.map(str::to_owned)), "{input}");
    }

    #[test]
    fn a_checkpoint_is_named_in_three_forms() {
        check(json!("a"), Some(Some("a")));
        check(json!({"checkpoint_id": "a"}), Some(Some("a")));
        check(json!({"configurable": {"checkpoint_id": "a"}}), Some(Some("a")));
        check(json!(null), Some(None));
        check(json!({}), Some(None));
        check(json!(1), None);
        check(json!({"checkpoint_id": 1}), None);
    }
}
