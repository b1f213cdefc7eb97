//! Secrets (/v1/secrets): set and listed by administrators; no route answers a value.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use secrecy::SecretString;
use serde::Deserialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Gateway;
use super::error::ApiError;
use super::extract::{Caller, Ids, Params};
use crate::services::secrets::{RotationView, SecretView};

/// These routes.
pub(super) fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new()
        .routes(routes!(list_secrets))
        .routes(routes!(rotate_secrets))
        .routes(routes!(set_secret, get_secret, delete_secret))
}

/// A secret to store.
#[derive(Deserialize, ToSchema)]
struct SecretRequest {
    /// Its value: 1 to 65,536 bytes of text.
    value: String,
}

/// List the secrets by name, without their values; only an admin may.
#[utoipa::path(get, path = "/v1/secrets", tag = "secrets",
    params(("limit" = Option<u32>, Query), ("offset" = Option<u32>, Query)),
    responses((status = 200, body = [SecretView])))]
async fn list_secrets(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    params: Params,
) -> Result<Json<Vec<SecretView>>, ApiError> {
    let (limit, offset) = (params.number("limit", 100)?, params.number("offset", 0)?);
    Ok(Json(gateway.services().list_secrets(&actor, limit, offset).await?))
}

/// Store a secret, in place of what had its name; only an admin may.
#[utoipa::path(put, path = "/v1/secrets/{name}", tag = "secrets", params(("name" = String, Path)),
    request_body = SecretRequest, responses((status = 200, body = SecretView)))]
async fn set_secret(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(name): Ids<String>,
    body: Bytes,
) -> Result<Json<SecretView>, ApiError> {
    // Not by the usual reader: its message about a wrong value repeats the value.
    let request: SecretRequest = serde_json::from_slice(&body)
        .map_err(|_| ApiError::invalid("the body is {\"value\": \"TEXT\"}"))?;
    let value = SecretString::from(request.value);
    Ok(Json(gateway.services().set_secret(&actor, &name, &value).await?))
}

/// One secret, without its value; only an admin may ask.
#[utoipa::path(get, path = "/v1/secrets/{name}", tag = "secrets", params(("name" = String, Path)),
    responses((status = 200, body = SecretView)))]
async fn get_secret(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(name): Ids<String>,
) -> Result<Json<SecretView>, ApiError> {
    Ok(Json(gateway.services().get_secret(&actor, &name).await?))
}

/// Delete a secret; only an admin may.
#[utoipa::path(delete, path = "/v1/secrets/{name}", tag = "secrets", params(("name" = String, Path)),
    responses((status = 204)))]
async fn delete_secret(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(name): Ids<String>,
) -> Result<StatusCode, ApiError> {
    gateway.services().delete_secret(&actor, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Move all secrets under the newest master key; only an admin may. It may be called again after a failure.
#[utoipa::path(post, path = "/v1/secrets/rotate", tag = "secrets",
    responses((status = 200, body = RotationView)))]
async fn rotate_secrets(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
) -> Result<Json<RotationView>, ApiError> {
    Ok(Json(gateway.services().rotate_secrets(&actor).await?))
}
