//! Threads, without their states and runs.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Gateway;
use super::error::ApiError;
use super::extract::{Body, Caller, Ids};
use super::view;
use crate::ids::ThreadId;
use crate::services::api::{
    CreateThread, IfExists, Object, SearchThreads, ThreadSort, ThreadStatus, ThreadView,
};

/// These routes.
pub(super) fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new()
        .routes(routes!(create))
        .routes(routes!(search))
        .routes(routes!(count))
        .routes(routes!(get, update, delete))
        .routes(routes!(send_event))
}

/// Which end of a list comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum SortOrder {
    Asc,
    Desc,
}

#[derive(Debug, Deserialize, ToSchema)]
struct CreateRequest {
    #[schema(value_type = Option<uuid::Uuid>)]
    thread_id: Option<ThreadId>,
    #[schema(value_type = Option<Object>)]
    metadata: Option<Object>,
    if_exists: Option<IfExists>,
    /// Not available in this version.
    supersteps: Option<Value>,
    /// Not available in this version.
    ttl: Option<Value>,
}

#[derive(Debug, Deserialize, ToSchema)]
struct UpdateRequest {
    /// Laid over the old.
    #[schema(value_type = Option<Object>)]
    metadata: Option<Object>,
    /// Not available in this version.
    ttl: Option<Value>,
}

#[derive(Debug, Default, Deserialize, ToSchema)]
struct SearchRequest {
    #[schema(value_type = Option<Vec<uuid::Uuid>>)]
    ids: Option<Vec<ThreadId>>,
    #[schema(value_type = Option<Object>)]
    metadata: Option<Object>,
    #[schema(value_type = Option<Object>)]
    values: Option<Object>,
    status: Option<ThreadStatus>,
    /// 1 to 1000; default 10.
    limit: Option<u32>,
    offset: Option<u32>,
    sort_by: Option<ThreadSort>,
    sort_order: Option<SortOrder>,
    /// Only these keys.
    select: Option<Vec<String>>,
    /// Alias -> path such as `values.messages[-1]`.
    extract: Option<BTreeMap<String, String>>,
}

/// A named event.
#[derive(Debug, Deserialize, ToSchema)]
struct EventRequest {
    name: String,
    /// Any JSON.
    #[serde(default)]
    payload: Value,
}

impl SearchRequest {
    fn into_search(self) -> SearchThreads {
        let select = self.select.unwrap_or_default();
        let with_values = select.is_empty()
            || select.iter().any(|key| key == "values" || key.starts_with("values."))
            || self
                .extract
                .is_some_and(|wanted| wanted.values().any(|path| path.starts_with("values")));
        SearchThreads {
            ids: self.ids.unwrap_or_default(),
            metadata: self.metadata.unwrap_or_default(),
            values: self.values.unwrap_or_default(),
            status: self.status,
            limit: self.limit.unwrap_or(10),
            offset: self.offset.unwrap_or(0),
            sort_by: self.sort_by.unwrap_or(ThreadSort::CreatedAt),
            ascending: self.sort_order == Some(SortOrder::Asc),
            with_values,
        }
    }
}

/// Make a thread.
#[utoipa::path(post, path = "/threads", tag = "threads", request_body = CreateRequest,
    responses((status = 200, body = ThreadView)))]
async fn create(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Body(request): Body<CreateRequest>,
) -> Result<Json<ThreadView>, ApiError> {
    absent("supersteps", request.supersteps.as_ref())?;
    absent("ttl", request.ttl.as_ref())?;
    let request = CreateThread {
        thread_id: request.thread_id,
        metadata: request.metadata.unwrap_or_default(),
        if_exists: request.if_exists.unwrap_or(IfExists::Raise),
    };
    Ok(Json(gateway.services().create_thread(&actor, request).await?))
}

/// List your threads.
#[utoipa::path(post, path = "/threads/search", tag = "threads", request_body = SearchRequest,
    responses((status = 200, body = [ThreadView])))]
async fn search(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Body(mut request): Body<SearchRequest>,
) -> Result<Response, ApiError> {
    let extract = request.extract.clone().unwrap_or_default();
    view::check_extract(&extract)?;
    let select = request.select.clone().unwrap_or_default();
    request.extract = Some(extract.clone());
    let page = gateway.services().search_threads(&actor, &request.into_search()).await?;
    let items = page.items.iter().map(|thread| {
        let mut item = view::select(thread, &select)?;
        if !extract.is_empty() {
            item["extracted"] = view::extract(thread, &extract)?;
        }
        Ok(item)
    });
    let items = items.collect::<Result<_, ApiError>>()?;
    Ok(view::page(&page, items))
}

/// Count your threads.
#[utoipa::path(post, path = "/threads/count", tag = "threads", request_body = SearchRequest,
    responses((status = 200, body = u64)))]
async fn count(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Body(request): Body<SearchRequest>,
) -> Result<Json<u64>, ApiError> {
    Ok(Json(gateway.services().count_threads(&actor, &request.into_search()).await?))
}

/// One thread.
#[utoipa::path(get, path = "/threads/{thread_id}", tag = "threads",
    params(("thread_id" = uuid::Uuid, Path)), responses((status = 200, body = ThreadView)))]
async fn get(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(thread): Ids<ThreadId>,
) -> Result<Json<ThreadView>, ApiError> {
    Ok(Json(gateway.services().get_thread(&actor, thread).await?))
}

/// Change a thread's metadata. With `Prefer: return=minimal` the answer is empty.
#[utoipa::path(patch, path = "/threads/{thread_id}", tag = "threads",
    params(("thread_id" = uuid::Uuid, Path)), request_body = UpdateRequest,
    responses((status = 200, body = ThreadView), (status = 204)))]
async fn update(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(thread): Ids<ThreadId>,
    headers: HeaderMap,
    Body(request): Body<UpdateRequest>,
) -> Result<Response, ApiError> {
    absent("ttl", request.ttl.as_ref())?;
    let metadata = request.metadata.unwrap_or_default();
    let view = gateway.services().update_thread(&actor, thread, &metadata).await?;
    let prefer = headers.get("prefer").and_then(|value| value.to_str().ok()).unwrap_or_default();
    if prefer.split([',', ';']).any(|wish| wish.trim().eq_ignore_ascii_case("return=minimal")) {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    Ok(Json(view).into_response())
}

/// Delete a thread with its runs and states. A busy one is refused.
#[utoipa::path(delete, path = "/threads/{thread_id}", tag = "threads",
    params(("thread_id" = uuid::Uuid, Path)), responses((status = 204)))]
async fn delete(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(thread): Ids<ThreadId>,
) -> Result<StatusCode, ApiError> {
    gateway.services().delete_thread(&actor, thread).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Send a named event: it settles a node that waits for it, now or later.
#[utoipa::path(post, path = "/threads/{thread_id}/events", tag = "threads",
    params(("thread_id" = uuid::Uuid, Path)), request_body = EventRequest,
    responses((status = 202, body = Object)))]
async fn send_event(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(thread): Ids<ThreadId>,
    Body(event): Body<EventRequest>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    gateway.services().send_event(&actor, thread, event.name, event.payload).await?;
    Ok((StatusCode::ACCEPTED, Json(json!({}))))
}

fn absent(name: &str, value: Option<&Value>) -> Result<(), ApiError> {
    match value {
        None | Some(Value::Null) => Ok(()),
        Some(_) => {
            let message = format!("`{name}` is not available in this version");
            Err(ApiError::invalid_at(format!("/{name}"), message))
        }
    }
}
