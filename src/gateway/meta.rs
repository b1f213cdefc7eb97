//! About the server itself: is it up, is it ready, which version, how busy, what can it do.

use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Gateway;
use super::error::ApiError;
use super::extract::Params;
use super::metrics;

const CHECK_TIMEOUT: Duration = Duration::from_secs(3);

/// Routes that need no token.
pub(super) fn public_routes(public_metrics: bool) -> OpenApiRouter<Gateway> {
    let routes = OpenApiRouter::new()
        .routes(routes!(ok))
        .routes(routes!(info))
        .routes(routes!(healthz))
        .routes(routes!(readyz));
    if public_metrics { routes.routes(routes!(prometheus)) } else { routes }
}

/// Routes that need a token.
pub(super) fn private_routes(public_metrics: bool) -> OpenApiRouter<Gateway> {
    let routes = OpenApiRouter::new();
    if public_metrics { routes } else { routes.routes(routes!(prometheus)) }
}

/// Serves the finished description, which is made once.
pub(super) fn openapi_route(api: &utoipa::openapi::OpenApi) -> Router<Gateway> {
    let text = api.to_json().unwrap_or_else(|err| json!({"error": err.to_string()}).to_string());
    let text = axum::body::Bytes::from(text);
    let json = HeaderValue::from_static("application/json");
    Router::new().route("/openapi.json", get(async move || ([(header::CONTENT_TYPE, json)], text)))
}

/// Answers as long as the process serves.
#[utoipa::path(get, path = "/ok", tag = "server", security(()),
    params(("check_db" = Option<bool>, Query, description = "Ask the database too")),
    responses((status = 200, body = Object)))]
async fn ok(State(gateway): State<Gateway>, params: Params) -> Result<Json<Value>, ApiError> {
    if params.flag("check_db")? {
        gateway.services().check_database().await?;
    }
    Ok(Json(json!({"ok": true})))
}

/// Version and abilities.
#[utoipa::path(get, path = "/info", tag = "server", security(()),
    responses((status = 200, body = Object)))]
async fn info() -> Json<Value> {
    Json(json!({
        "name": "cynai",
        "version": env!("CARGO_PKG_VERSION"),
        "langgraph_py_version": null,
        "flags": {"assistants": true, "crons": false, "langsmith": false, "strict_resume": true},
        "host": {"kind": "cynai"},
    }))
}

/// Whether the process lives: it does, when this answers.
#[utoipa::path(get, path = "/healthz", tag = "server", security(()),
    responses((status = 200, body = Object)))]
async fn healthz() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// Whether requests should be sent here, and what is wrong when not.
#[derive(Debug, Serialize, ToSchema)]
struct Readiness {
    /// Whether every check passed.
    ready: bool,
    /// Check -> `ok`, or what is wrong.
    checks: BTreeMap<String, String>,
}

/// Whether requests should be sent here.
#[utoipa::path(get, path = "/readyz", tag = "server", security(()),
    responses((status = 200, body = Readiness), (status = 503, body = Readiness)))]
async fn readyz(State(gateway): State<Gateway>) -> Response {
    let services = gateway.services().clone();
    let database = async move { services.check_database().await.map_err(|err| err.to_string()) };
    let mut pending: Vec<(_, futures::future::BoxFuture<'static, _>)> =
        vec![("database", Box::pin(database))];
    pending.extend(gateway.0.checks.iter().map(|check| (check.name, (check.check)())));
    let results = futures::future::join_all(pending.into_iter().map(async |(name, check)| {
        let result = tokio::time::timeout(CHECK_TIMEOUT, check).await;
        (name, result.unwrap_or_else(|_| Err("no answer in time".to_owned())))
    }));
    let mut results = results.await;
    if gateway.0.closing.is_cancelled() {
        results.push(("server", Err("stopping".to_owned())));
    }
    let ready = results.iter().all(|(_, result)| result.is_ok());
    let checks = results
        .into_iter()
        .map(|(name, result)| (name.to_owned(), result.err().unwrap_or_else(|| "ok".to_owned())));
    let body = Readiness { ready, checks: checks.collect() };
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(body)).into_response()
}

/// Metrics for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "server",
    responses((status = 200, body = String, content_type = "text/plain")))]
async fn prometheus() -> Result<Response, ApiError> {
    let registry = metrics::registry().ok_or_else(ApiError::internal)?;
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    Ok(([(header::CONTENT_TYPE, kind)], registry.render()).into_response())
}
