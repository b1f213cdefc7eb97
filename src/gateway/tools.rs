//! Tools of MCP servers (/v1): list, approve, log in, call.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Gateway;
use super::error::ApiError;
use super::extract::{Body, Caller, Ids, Params};
use crate::services::logins::ToolLoginView;
use crate::services::tools::{ApprovedTool, CallTool, ToolServerView};
use crate::tools::result::ToolResult;

/// Routes that answer soon.
pub(super) fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new().routes(routes!(list_tools)).routes(routes!(approve_tools))
}

/// Routes that take as long as somebody else's server.
pub(super) fn long_routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new()
        .routes(routes!(call_tool))
        .routes(routes!(begin_tool_login))
        .routes(routes!(finish_tool_login))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ApproveRequest {
    /// One tool; without, all that wait.
    tool: Option<String>,
    /// Only when the tool is still this definition, as it was listed.
    hash: Option<String>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CallRequest {
    /// As the tool's `input_schema` says.
    #[serde(default)]
    #[schema(value_type = Object)]
    arguments: Map<String, Value>,
    /// The same for every attempt at the same thing, so that the server can tell.
    idempotency_key: Option<String>,
    /// How long the call may take, in seconds; what the server's configuration says when absent.
    timeout_seconds: Option<u64>,
}

/// List tool servers with their tools, and whether each is what was approved.
#[utoipa::path(get, path = "/v1/tools", tag = "tools",
    params(("server" = Option<String>, Query, description = "One server")),
    responses((status = 200, body = [ToolServerView])))]
async fn list_tools(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    params: Params,
) -> Result<Json<Vec<ToolServerView>>, ApiError> {
    Ok(Json(gateway.services().list_tools(&actor, params.get("server")).await?))
}

/// Approve tools that are new or have changed; only an admin may.
#[utoipa::path(post, path = "/v1/tools/{server}/approve", tag = "tools",
    params(("server" = String, Path)), request_body = ApproveRequest,
    responses((status = 200, body = [ApprovedTool])))]
async fn approve_tools(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(server): Ids<String>,
    Body(request): Body<ApproveRequest>,
) -> Result<Json<Vec<ApprovedTool>>, ApiError> {
    let (tool, hash) = (request.tool.as_deref(), request.hash.as_deref());
    Ok(Json(gateway.services().approve_tools(&actor, &server, tool, hash).await?))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct BeginLoginRequest {
    /// Where the person's browser is led to in the end: `http://` with a loopback address, on the person's machine.
    redirect_uri: String,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct FinishLoginRequest {
    /// The whole address that the browser was led to.
    led_to: String,
}

/// Begin a login to a server whose configuration has `oauth`; only an admin may. A person agrees on the page that is
/// answered, within ten minutes.
#[utoipa::path(post, path = "/v1/tools/{server}/login", tag = "tools",
    params(("server" = String, Path)), request_body = BeginLoginRequest,
    responses((status = 200, body = ToolLoginView)))]
async fn begin_tool_login(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(server): Ids<String>,
    Body(request): Body<BeginLoginRequest>,
) -> Result<Json<ToolLoginView>, ApiError> {
    let services = gateway.services();
    Ok(Json(services.begin_tool_login(&actor, &server, &request.redirect_uri).await?))
}

/// Finish the login that was begun last, with what the person's browser was led to; only an admin may.
#[utoipa::path(post, path = "/v1/tools/{server}/login/finish", tag = "tools",
    params(("server" = String, Path)), request_body = FinishLoginRequest,
    responses((status = 204)))]
async fn finish_tool_login(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(server): Ids<String>,
    Body(request): Body<FinishLoginRequest>,
) -> Result<StatusCode, ApiError> {
    gateway.services().finish_tool_login(&actor, &server, &request.led_to).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Call a tool. A tool that says that it failed is a result with `is_error`; a call that gave no usable
/// result is an error whose `code` is its kind and whose `metadata.outcome` says whether it was sent.
#[utoipa::path(post, path = "/v1/tools/{server}/{tool}/call", tag = "tools",
    params(("server" = String, Path), ("tool" = String, Path)), request_body = CallRequest,
    responses((status = 200, body = ToolResult)))]
async fn call_tool(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids((server, tool)): Ids<(String, String)>,
    Body(request): Body<CallRequest>,
) -> Result<Json<ToolResult>, ApiError> {
    let call = CallTool {
        server,
        tool,
        arguments: request.arguments,
        idempotency_key: request.idempotency_key,
        timeout: request.timeout_seconds.map(Duration::from_secs),
    };
    Ok(Json(gateway.services().call_tool(&actor.name, call, None).await?))
}
