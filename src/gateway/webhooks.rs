//! Keys of webhooks (/v1/webhooks).

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Gateway;
use super::error::ApiError;
use super::extract::Caller;
use crate::services::webhooks::WebhookKeyView;

/// These routes.
pub(super) fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new().routes(routes!(new_webhook_key))
}

/// Make a new key for your webhooks, in place of the one before. It is shown this once.
#[utoipa::path(post, path = "/v1/webhooks/key", tag = "webhooks",
    responses((status = 201, body = WebhookKeyView)))]
async fn new_webhook_key(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
) -> Result<(StatusCode, Json<WebhookKeyView>), ApiError> {
    Ok((StatusCode::CREATED, Json(gateway.services().new_webhook_key(&actor).await?)))
}
