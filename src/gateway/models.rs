//! Endpoints of models (/v1).

use axum::Json;
use axum::extract::State;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Gateway;
use super::error::ApiError;
use super::extract::Caller;
use crate::services::models::Listing;

/// Routes that take as long as the slowest endpoint.
pub(super) fn long_routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new().routes(routes!(list_models))
}

/// List the endpoints of models and the routes that graphs name, and what each endpoint says that it has.
#[utoipa::path(get, path = "/v1/model-endpoints", tag = "models", responses((status = 200, body = Listing)))]
async fn list_models(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
) -> Result<Json<Listing>, ApiError> {
    Ok(Json(gateway.services().list_models(&actor).await))
}
