//! Tokens and users (/v1).

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Gateway;
use super::error::ApiError;
use super::extract::{Body, Caller, Ids, Params};
use crate::ids::TokenId;
use crate::services::access::{CreateToken, NewTokenView, TokenView, UserView};

/// These routes.
pub(super) fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new()
        .routes(routes!(me))
        .routes(routes!(create_token, list_tokens))
        .routes(routes!(revoke_token))
        .routes(routes!(create_user, list_users))
}

/// Who the token belongs to.
#[derive(Debug, Serialize, ToSchema)]
struct Me {
    #[schema(value_type = uuid::Uuid)]
    user_id: crate::ids::UserId,
    name: String,
    admin: bool,
}

#[derive(Debug, Deserialize, ToSchema)]
struct TokenRequest {
    /// What you call it.
    name: String,
    /// For another user; only an admin may.
    user: Option<String>,
    /// Good for so long; without, until it is revoked.
    ttl_seconds: Option<u64>,
}

#[derive(Debug, Deserialize, ToSchema)]
struct UserRequest {
    /// 1 to 63 lower-case letters, digits, `.`, `_` and `-`.
    name: String,
    /// Whether it may manage users.
    #[serde(default)]
    admin: bool,
}

/// Who asks.
#[utoipa::path(get, path = "/v1/me", tag = "access", responses((status = 200, body = Me)))]
async fn me(Caller(actor): Caller) -> Json<Me> {
    Json(Me { user_id: actor.user_id, name: actor.name, admin: actor.admin })
}

/// Make a token. It is shown this once.
#[utoipa::path(post, path = "/v1/tokens", tag = "access", request_body = TokenRequest,
    responses((status = 201, body = NewTokenView)))]
async fn create_token(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Body(request): Body<TokenRequest>,
) -> Result<(StatusCode, Json<NewTokenView>), ApiError> {
    let ttl = request.ttl_seconds.map(Duration::from_secs);
    let request = CreateToken { name: request.name, user: request.user, ttl };
    let token = gateway.services().create_token(&actor, request).await?;
    Ok((StatusCode::CREATED, Json(token)))
}

/// List your tokens, newest first.
#[utoipa::path(get, path = "/v1/tokens", tag = "access",
    params(("user" = Option<String>, Query, description = "Another user's; only an admin may"),
           ("limit" = Option<u32>, Query), ("offset" = Option<u32>, Query)),
    responses((status = 200, body = [TokenView])))]
async fn list_tokens(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    params: Params,
) -> Result<Json<Vec<TokenView>>, ApiError> {
    let (limit, offset) = (params.number("limit", 100)?, params.number("offset", 0)?);
    let services = gateway.services();
    Ok(Json(services.list_tokens(&actor, params.get("user"), limit, offset).await?))
}

/// Revoke a token.
#[utoipa::path(delete, path = "/v1/tokens/{token_id}", tag = "access",
    params(("token_id" = uuid::Uuid, Path)), responses((status = 204)))]
async fn revoke_token(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(token): Ids<TokenId>,
) -> Result<StatusCode, ApiError> {
    gateway.services().revoke_token(&actor, token).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Make a user; only an admin may.
#[utoipa::path(post, path = "/v1/users", tag = "access", request_body = UserRequest,
    responses((status = 201, body = UserView)))]
async fn create_user(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Body(request): Body<UserRequest>,
) -> Result<(StatusCode, Json<UserView>), ApiError> {
    let user = gateway.services().create_user(&actor, request.name, request.admin).await?;
    Ok((StatusCode::CREATED, Json(user)))
}

/// List users by name; only an admin may.
#[utoipa::path(get, path = "/v1/users", tag = "access",
    params(("limit" = Option<u32>, Query), ("offset" = Option<u32>, Query)),
    responses((status = 200, body = [UserView])))]
async fn list_users(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    params: Params,
) -> Result<Json<Vec<UserView>>, ApiError> {
    let (limit, offset) = (params.number("limit", 100)?, params.number("offset", 0)?);
    Ok(Json(gateway.services().list_users(&actor, limit, offset).await?))
}
