//! Worker machines (/v1/nodes): what they ask for themselves, and what administrators ask for.
//!
//! Workers have tokens of their own, which open `/v1/nodes/self/...` and nothing else.

use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequestParts, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use secrecy::SecretString;
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Gateway;
use super::auth::bearer;
use super::error::{ApiError, unauthorized};
use super::extract::{Body, Caller, Ids, Params};
use super::sse::Slot;
use crate::services::fleet::{
    ChangeWorker, ConfigAck, EnrolledWorker, Heartbeat, ListWorkers, PolicyView,
    RegistrationKeyView, Shown, WorkerView,
};

/// What administrators ask for.
pub(super) fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new()
        .routes(routes!(list_workers))
        .routes(routes!(get_worker, change_worker, remove_worker))
        .routes(routes!(drain_worker))
        .routes(routes!(undrain_worker))
        .routes(routes!(refresh_worker))
        .routes(routes!(get_policy, set_policy))
        .routes(routes!(make_key))
        .routes(routes!(revoke_key))
}

/// Bytes of a worker's request: what it says is read before it is known who says it.
const WORKER_BODY_BYTES: usize = 512 << 10;

/// What workers ask for: each answers soon.
pub(super) fn worker_routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new()
        .routes(routes!(register))
        .routes(routes!(report))
        .routes(routes!(heartbeat))
        .routes(routes!(renew_token))
        .routes(routes!(unregister))
        .layer(DefaultBodyLimit::max(WORKER_BODY_BYTES))
}

/// What workers ask for, and may wait for.
pub(super) fn worker_long_routes() -> OpenApiRouter<Gateway> {
    let routes = OpenApiRouter::new().routes(routes!(configuration, acknowledge));
    routes.layer(DefaultBodyLimit::max(WORKER_BODY_BYTES))
}

/// A worker that showed its token.
struct Worker(EnrolledWorker);

impl FromRequestParts<Gateway> for Worker {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, gateway: &Gateway) -> Result<Self, ApiError> {
        let token = worker_token(&parts.headers)?;
        Ok(Self(gateway.services().authenticate_worker(token).await?))
    }
}

/// The token of a worker, for an operation that looks at it itself.
struct WorkerToken(String);

impl<S: Sync> FromRequestParts<S> for WorkerToken {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        worker_token(&parts.headers).map(|token| Self(token.to_owned()))
    }
}

fn worker_token(headers: &HeaderMap) -> Result<&str, ApiError> {
    bearer(headers).ok_or_else(|| {
        unauthorized("a worker's token is needed: send `Authorization: Bearer TOKEN`")
    })
}

/// A worker shows its key.
#[derive(Deserialize)]
struct RegistrationRequest {
    version: u32,
    psk: SecretString,
    capability: Value,
}

/// Register a worker machine with a key, or register it again. The body is `{"version": 1, "psk": KEY, "capability":
/// node_capability_report_v1}`, the answer `node_bootstrap_payload_v1`.
#[utoipa::path(post, path = "/v1/nodes/register", tag = "workers (wire)", request_body = Object, security(()),
    responses((status = 200, body = Object), (status = 201, body = Object)))]
async fn register(
    State(gateway): State<Gateway>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, ApiError> {
    // Not by the usual reader: its message about a wrong value repeats the value, which may be the key.
    let request: RegistrationRequest = serde_json::from_slice(&body).map_err(|_| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            "bad_request",
            "the body is {\"version\": 1, \"psk\": KEY, \"capability\": REPORT}",
        )
    })?;
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    // Only its own answer depends on what a client says here.
    let forwarded = headers.get("x-forwarded-proto").is_some_and(|scheme| scheme == "https");
    let scheme = if forwarded { "https" } else { gateway.config().scheme };
    let server_url = format!("{scheme}://{host}");
    let shown =
        Shown { version: request.version, server_url, psk: &request.psk, token: bearer(&headers) };
    let (bootstrap, new) = gateway.services().register_worker(&shown, request.capability).await?;
    let status = if new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(bootstrap)).into_response())
}

/// The worker's configuration (`node_configuration_payload_v1`). With `after` only a greater version, which is waited for;
/// 204 when there is none.
#[utoipa::path(get, path = "/v1/nodes/self/config", tag = "workers (wire)",
    params(("after" = Option<String>, Query), ("wait" = Option<u32>, Query, description = "seconds, at most 60")),
    responses((status = 200, body = Object), (status = 204)))]
async fn configuration(
    State(gateway): State<Gateway>,
    Worker(worker): Worker,
    params: Params,
) -> Result<Response, ApiError> {
    let wait = Duration::from_secs(params.number("wait", 0)?.into());
    let after = params.get("after");
    // As streams: neither may they take all places, nor hold up the end of the server.
    let slot = (!wait.is_zero()).then(|| Slot::take(&gateway.0.slots)).transpose()?;
    let found = tokio::select! {
        found = gateway.services().worker_config(&worker, after, wait) => found?,
        () = gateway.0.closing.cancelled() => None,
    };
    drop(slot);
    Ok(match found {
        Some(configuration) => Json(configuration).into_response(),
        None => StatusCode::NO_CONTENT.into_response(),
    })
}

/// Say what became of a configuration (`node_config_ack_v1`).
#[utoipa::path(post, path = "/v1/nodes/self/config", tag = "workers (wire)", request_body = Object,
    responses((status = 204)))]
async fn acknowledge(
    State(gateway): State<Gateway>,
    Worker(worker): Worker,
    Body(ack): Body<ConfigAck>,
) -> Result<StatusCode, ApiError> {
    gateway.services().acknowledge_config(&worker, &ack).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Say what the worker can do (`node_capability_report_v1`).
#[utoipa::path(post, path = "/v1/nodes/self/report", tag = "workers (wire)", request_body = Object,
    responses((status = 204)))]
async fn report(
    State(gateway): State<Gateway>,
    Worker(worker): Worker,
    Body(report): Body<Value>,
) -> Result<StatusCode, ApiError> {
    gateway.services().report_worker(&worker, report).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Say that the worker is alive.
#[utoipa::path(post, path = "/v1/nodes/self/heartbeat", tag = "workers (wire)", request_body = Object,
    responses((status = 200, body = Object)))]
async fn heartbeat(
    State(gateway): State<Gateway>,
    WorkerToken(token): WorkerToken,
    Body(beat): Body<Heartbeat>,
) -> Result<Response, ApiError> {
    Ok(Json(gateway.services().beat(&token, &beat).await?).into_response())
}

/// A fresh token before the old one expires.
#[utoipa::path(post, path = "/v1/nodes/self/token", tag = "workers (wire)", responses((status = 200, body = Object)))]
async fn renew_token(
    State(gateway): State<Gateway>,
    Worker(worker): Worker,
) -> Result<Response, ApiError> {
    Ok(Json(gateway.services().renew_worker_token(&worker).await?).into_response())
}

/// The worker goes for good.
#[utoipa::path(delete, path = "/v1/nodes/self", tag = "workers (wire)", responses((status = 204)))]
async fn unregister(
    State(gateway): State<Gateway>,
    Worker(worker): Worker,
) -> Result<StatusCode, ApiError> {
    gateway.services().unregister_worker(&worker).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// List the workers by id; only an admin may.
#[utoipa::path(get, path = "/v1/nodes", tag = "workers",
    params(("status" = Option<String>, Query, description = "registered, active, inactive or drained"),
           ("label" = Option<Vec<String>>, Query, description = "all of them"),
           ("after" = Option<String>, Query, description = "after this id"),
           ("limit" = Option<u32>, Query)),
    responses((status = 200, body = [WorkerView])))]
async fn list_workers(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    params: Params,
) -> Result<Json<Vec<WorkerView>>, ApiError> {
    let request = ListWorkers {
        status: params.get("status").map(str::to_owned),
        labels: params.all("label"),
        after: params.get("after").filter(|after| !after.is_empty()).map(str::to_owned),
        limit: params.number("limit", 100)?,
    };
    Ok(Json(gateway.services().list_workers(&actor, &request).await?))
}

/// One worker with its last report; only an admin may ask.
#[utoipa::path(get, path = "/v1/nodes/{node_slug}", tag = "workers", params(("node_slug" = String, Path)),
    responses((status = 200, body = WorkerView)))]
async fn get_worker(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(slug): Ids<String>,
) -> Result<Json<WorkerView>, ApiError> {
    Ok(Json(gateway.services().get_worker(&actor, &slug).await?))
}

/// What to change about one worker; what is left out stays.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct WorkerChange {
    /// A merge patch (RFC 7396) over the policy of all workers.
    policy_patch: Option<Value>,
    /// Where its Worker API is, whatever it reports; null takes that back.
    #[serde(default, deserialize_with = "present")]
    worker_api_url: Option<Option<String>>,
}

/// A field that may be left out, or be null.
fn present<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Option<String>>, D::Error> {
    Deserialize::deserialize(from).map(Some)
}

/// Change what was decided for one worker; only an admin may.
#[utoipa::path(patch, path = "/v1/nodes/{node_slug}", tag = "workers", params(("node_slug" = String, Path)),
    request_body = WorkerChange, responses((status = 200, body = WorkerView)))]
async fn change_worker(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(slug): Ids<String>,
    Body(change): Body<WorkerChange>,
) -> Result<Json<WorkerView>, ApiError> {
    let WorkerChange { policy_patch, worker_api_url } = change;
    let change = ChangeWorker { policy_patch, worker_api_url };
    Ok(Json(gateway.services().change_worker(&actor, &slug, &change).await?))
}

/// Remove a worker: its jobs count as lost; only an admin may.
#[utoipa::path(delete, path = "/v1/nodes/{node_slug}", tag = "workers", params(("node_slug" = String, Path)),
    responses((status = 204)))]
async fn remove_worker(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(slug): Ids<String>,
) -> Result<StatusCode, ApiError> {
    gateway.services().remove_worker(&actor, &slug).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct DrainRequest {
    /// Why.
    reason: Option<String>,
}

/// Take a worker out of service: it gets no new jobs; only an admin may.
#[utoipa::path(post, path = "/v1/nodes/{node_slug}/drain", tag = "workers", params(("node_slug" = String, Path)),
    request_body = DrainRequest, responses((status = 200, body = WorkerView)))]
async fn drain_worker(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(slug): Ids<String>,
    Body(request): Body<DrainRequest>,
) -> Result<Json<WorkerView>, ApiError> {
    let reason = request.reason.as_deref();
    Ok(Json(gateway.services().drain_worker(&actor, &slug, reason).await?))
}

/// Take a worker back into service; only an admin may.
#[utoipa::path(post, path = "/v1/nodes/{node_slug}/undrain", tag = "workers", params(("node_slug" = String, Path)),
    responses((status = 200, body = WorkerView)))]
async fn undrain_worker(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(slug): Ids<String>,
) -> Result<Json<WorkerView>, ApiError> {
    Ok(Json(gateway.services().undrain_worker(&actor, &slug).await?))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RefreshRequest {
    /// Whether it also gets a new bearer token.
    #[serde(default)]
    rotate_token: bool,
}

/// Give a worker a new configuration; only an admin may.
#[utoipa::path(post, path = "/v1/nodes/{node_slug}/refresh", tag = "workers", params(("node_slug" = String, Path)),
    request_body = RefreshRequest, responses((status = 200, body = WorkerView)))]
async fn refresh_worker(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Ids(slug): Ids<String>,
    Body(request): Body<RefreshRequest>,
) -> Result<Json<WorkerView>, ApiError> {
    Ok(Json(gateway.services().refresh_worker(&actor, &slug, request.rotate_token).await?))
}

/// The policy of all workers; only an admin may ask.
#[utoipa::path(get, path = "/v1/nodes/policy", tag = "workers", responses((status = 200, body = PolicyView)))]
async fn get_policy(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
) -> Result<Json<PolicyView>, ApiError> {
    Ok(Json(gateway.services().fleet_policy(&actor).await?))
}

/// Set the policy of all workers: each gets a new configuration; only an admin may.
#[utoipa::path(put, path = "/v1/nodes/policy", tag = "workers", request_body = Object,
    responses((status = 200, body = PolicyView)))]
async fn set_policy(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
    Body(policy): Body<Value>,
) -> Result<Json<PolicyView>, ApiError> {
    Ok(Json(gateway.services().set_fleet_policy(&actor, &policy).await?))
}

/// Make a key that registers workers. It is shown this once, and the one before it stays good; only an admin may.
#[utoipa::path(post, path = "/v1/nodes/key", tag = "workers",
    responses((status = 201, body = RegistrationKeyView)))]
async fn make_key(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
) -> Result<(StatusCode, Json<RegistrationKeyView>), ApiError> {
    let key = gateway.services().make_registration_key(&actor).await?;
    Ok((StatusCode::CREATED, Json(key)))
}

/// Refuse the key before the newest from now on; only an admin may.
#[utoipa::path(delete, path = "/v1/nodes/key/previous", tag = "workers", responses((status = 204)))]
async fn revoke_key(
    State(gateway): State<Gateway>,
    Caller(actor): Caller,
) -> Result<StatusCode, ApiError> {
    gateway.services().revoke_previous_key(&actor).await?;
    Ok(StatusCode::NO_CONTENT)
}
