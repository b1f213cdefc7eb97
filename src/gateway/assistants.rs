//! Assistants.

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Gateway;
use super::error::ApiError;
use super::extract::{Body, Caller, Ids, Params};
use super::threads::SortOrder;
use super::view;
use crate::ids::AssistantId;
use crate::services::api::{IfExists, Object};
use crate::services::assistants::{
    AssistantSort, AssistantView, CreateAssistant, SearchAssistants, UpdateAssistant,
};
use crate::services::drawing::{DrawingView, SchemasView};

/// These routes.
pub(super) fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new()
        .routes(routes!(create))
        .routes(routes!(search))
        .routes(routes!(count))
        .routes(routes!(get, update, delete))
        .routes(routes!(drawing))
        .routes(routes!(schemas))
        .routes(routes!(subgraphs))
        .routes(routes!(subgraph))
}

#[derive(Debug, Deserialize, ToSchema)]
struct CreateRequest {
    /// The graph's name.
    graph_id: String,
    #[schema(value_type = Option<uuid::Uuid>)]
    assistant_id: Option<AssistantId>,
    #[schema(value_type = Option<Object>)]
    config: Option<Object>,
    #[schema(value_type = Option<Object>)]
    context: Option<Value>,
    #[schema(value_type = Option<Object>)]
    metadata: Option<Object>,
    if_exists: Option<IfExists>,
    name: Option<String>,
    description: Option<String>,
}

#[derive(Debug, Deserialize, ToSchema)]
struct UpdateRequest {
    /// Another graph's name.
    graph_id: Option<String>,
    #[schema(value_type = Option<Object>)]
    config: Option<Object>,
    #[schema(value_type = Option<Object>)]
    context: Option<Value>,
    /// Laid over the old.
    #[schema(value_type = Option<Object>)]
    metadata: Option<Object>,
    name: Option<String>,
    description: Option<String>,
}

#[derive(Debug, Default, Deserialize, ToSchema)]
struct SearchRequest {
    #[schema(value_type = Option<Object>)]
    metadata: Option<Object>,
    /// The graph's name.
    graph_id: Option<String>,
    /// Part of the name, in any case.
    name: Option<String>,
    /// 1 to 1000; default 10.
    limit: Option<u32>,
    offset: Option<u32>,
    sort_by: Option<AssistantSort>,
    sort_order: Option<SortOrder>,
    /// Only these keys.
    select: Option<Vec<String>>,
}

impl SearchRequest {
    fn split(self) -> (SearchAssistants, Vec<String>) {
        let search = SearchAssistants {
            metadata: self.metadata.unwrap_or_default(),
            graph_id: self.graph_id,
            name: self.name,
            limit: self.limit.unwrap_or(10),
            offset: self.offset.unwrap_or(0),
            sort_by: self.sort_by.unwrap_or(AssistantSort::CreatedAt),
            ascending: self.sort_order == Some(SortOrder::Asc),
        };
        (search, self.select.unwrap_or_default())
    }
}

/// Make an assistant.
#[utoipa::path(post, path = "/assistants", tag = "assistants", request_body = CreateRequest,
    responses((status = 200, body = AssistantView)))]
async fn create(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Body(request): Body<CreateRequest>,
) -> Result<Json<AssistantView>, ApiError> {
    let request = CreateAssistant {
        assistant_id: request.assistant_id,
        graph_id: request.graph_id,
        config: request.config.unwrap_or_default(),
        context: request.context.filter(|context| !context.is_null()).unwrap_or_else(|| json!({})),
        metadata: request.metadata.unwrap_or_default(),
        if_exists: request.if_exists.unwrap_or(IfExists::Raise),
        name: request.name,
        description: request.description,
    };
    Ok(Json(gateway.services().create_assistant(&actor, request).await?))
}

/// List assistants: yours and every graph's default.
#[utoipa::path(post, path = "/assistants/search", tag = "assistants", request_body = SearchRequest,
    responses((status = 200, body = [AssistantView])))]
async fn search(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Body(request): Body<SearchRequest>,
) -> Result<Response, ApiError> {
    let (search, select) = request.split();
    let page = gateway.services().search_assistants(&actor, &search).await?;
    let items = page.items.iter().map(|item| view::select(item, &select));
    Ok(view::page(&page, items.collect::<Result<_, _>>()?))
}

/// Count assistants.
#[utoipa::path(post, path = "/assistants/count", tag = "assistants", request_body = SearchRequest,
    responses((status = 200, body = u64)))]
async fn count(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Body(request): Body<SearchRequest>,
) -> Result<Json<u64>, ApiError> {
    let (search, _) = request.split();
    Ok(Json(gateway.services().count_assistants(&actor, &search).await?))
}

/// One assistant.
#[utoipa::path(get, path = "/assistants/{assistant_id}", tag = "assistants",
    params(("assistant_id" = uuid::Uuid, Path)), responses((status = 200, body = AssistantView)))]
async fn get(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(id): Ids<AssistantId>,
) -> Result<Json<AssistantView>, ApiError> {
    Ok(Json(gateway.services().get_assistant(&actor, id).await?))
}

/// Change an assistant; its version grows.
#[utoipa::path(patch, path = "/assistants/{assistant_id}", tag = "assistants",
    params(("assistant_id" = uuid::Uuid, Path)), request_body = UpdateRequest,
    responses((status = 200, body = AssistantView)))]
async fn update(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(id): Ids<AssistantId>,
    Body(request): Body<UpdateRequest>,
) -> Result<Json<AssistantView>, ApiError> {
    let request = UpdateAssistant {
        graph_id: request.graph_id,
        config: request.config,
        context: request.context,
        metadata: request.metadata,
        name: request.name,
        description: request.description,
    };
    Ok(Json(gateway.services().update_assistant(&actor, id, request).await?))
}

/// Delete an assistant. Its runs go on.
#[utoipa::path(delete, path = "/assistants/{assistant_id}", tag = "assistants",
    params(("assistant_id" = uuid::Uuid, Path), ("delete_threads" = Option<bool>, Query)),
    responses((status = 200, body = Object)))]
async fn delete(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(id): Ids<AssistantId>,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    if params.flag("delete_threads")? {
        let message =
            "deleting an assistant's threads along with it is not available: delete them first";
        return Err(ApiError::invalid_at("/query/delete_threads", message));
    }
    gateway.services().delete_assistant(&actor, id).await?;
    Ok(Json(json!({})))
}

/// The picture of an assistant's graph.
#[utoipa::path(get, path = "/assistants/{assistant_id}/graph", tag = "assistants",
    params(("assistant_id" = uuid::Uuid, Path),
           ("xray" = Option<String>, Query, description = "Show subgraphs' insides: true, or to this depth")),
    responses((status = 200, body = DrawingView)))]
async fn drawing(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(id): Ids<AssistantId>,
    params: Params,
) -> Result<Json<DrawingView>, ApiError> {
    let xray = params.parsed("xray", "true, false or a depth", |text| match text {
        "true" | "True" => Some(u32::MAX),
        "false" | "False" => Some(0),
        depth => depth.parse().ok(),
    })?;
    Ok(Json(gateway.services().assistant_drawing(&actor, id, xray.unwrap_or(0)).await?))
}

/// The JSON Schemas of an assistant's graph.
#[utoipa::path(get, path = "/assistants/{assistant_id}/schemas", tag = "assistants",
    params(("assistant_id" = uuid::Uuid, Path)), responses((status = 200, body = SchemasView)))]
async fn schemas(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(id): Ids<AssistantId>,
) -> Result<Json<SchemasView>, ApiError> {
    Ok(Json(gateway.services().assistant_schemas(&actor, id).await?))
}

/// The JSON Schemas of the graphs that an assistant's graph calls, by node.
#[utoipa::path(get, path = "/assistants/{assistant_id}/subgraphs", tag = "assistants",
    params(("assistant_id" = uuid::Uuid, Path), ("recurse" = Option<bool>, Query)),
    responses((status = 200, body = BTreeMap<String, SchemasView>)))]
async fn subgraphs(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(id): Ids<AssistantId>,
    params: Params,
) -> Result<Json<BTreeMap<String, SchemasView>>, ApiError> {
    let recurse = params.flag("recurse")?;
    let found = gateway.services().assistant_subgraphs(&actor, id, None, recurse).await?;
    Ok(Json(found.into_iter().collect()))
}

/// The same, of one namespace.
#[utoipa::path(get, path = "/assistants/{assistant_id}/subgraphs/{namespace}", tag = "assistants",
    params(("assistant_id" = uuid::Uuid, Path), ("namespace" = String, Path),
           ("recurse" = Option<bool>, Query)),
    responses((status = 200, body = BTreeMap<String, SchemasView>)))]
async fn subgraph(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids((id, namespace)): Ids<(AssistantId, String)>,
    params: Params,
) -> Result<Json<BTreeMap<String, SchemasView>>, ApiError> {
    let recurse = params.flag("recurse")?;
    let services = gateway.services();
    let found = services.assistant_subgraphs(&actor, id, Some(&namespace), recurse).await?;
    Ok(Json(found.into_iter().collect()))
}
