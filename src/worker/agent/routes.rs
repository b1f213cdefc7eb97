//! The endpoints of the Worker API: extract, one call of the job table, answer.
//!
//! **Invariant:** everything but the health checks needs the bearer token, compared in constant time.
//! **Invariant:** a caller that goes away ends nothing but its own wait.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, to_bytes};
use axum::extract::{FromRequest, MatchedPath, Path, Query, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use uuid::Uuid;

use super::capabilities::Capabilities;
use super::problem::Problem;
use crate::clock::Clock;
use crate::ids::JobId;
use crate::worker::config::WorkerConfig;
use crate::worker::effective::{Effective, InForce, Ruled};
use crate::worker::jobs::run::admissible;
use crate::worker::jobs::{Accepted, Jobs};
use crate::worker::sandbox::Enforcement;
use crate::worker::wire::{
    Acknowledged, FinishedJobs, JobErrorKind, JobRequest, JobResult, JobState, JobStatus,
    StopAnswer, StopRequest, VERSION, supported,
};

/// How long a client may take to send a body.
const BODY_PATIENCE: Duration = Duration::from_secs(30);
/// The longest wait of a poll, in seconds.
const MAX_WAIT_SECONDS: u64 = 60;
/// Why a worker does not answer before its server has configured it.
const UNCONFIGURED: &str = "this worker waits for its configuration";
/// How long a request waits for the first trial sandboxes after the agent's start.
const PROBE_PATIENCE: Duration = Duration::from_secs(30);

/// What trying the sandbox found; `None` while it is being tried.
pub type Readiness = Option<Result<Enforcement, String>>;

/// What the handlers share.
#[derive(Debug, Clone)]
pub(super) struct Api {
    pub(super) config: Arc<WorkerConfig>,
    pub(super) jobs: Jobs,
    pub(super) in_force: InForce,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) readiness: watch::Receiver<Readiness>,
}

impl Api {
    fn effective(&self) -> Arc<Effective> {
        Arc::clone(&self.in_force.borrow())
    }
}

/// All routes with their layers.
pub(super) fn router(api: Api) -> Router {
    let guarded = Router::new()
        .route("/v1/worker/jobs:run", post(run))
        .route("/v1/worker/jobs:stop", post(stop))
        .route("/v1/worker/jobs", post(accept).get(finished))
        .route("/v1/worker/jobs/{id}", get(status))
        .route("/v1/worker/jobs/{id}/ack", post(acknowledge))
        .route("/v1/worker/capabilities", get(capabilities))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(api.clone(), authenticate));
    Router::new()
        .route("/healthz", get(async || "ok"))
        .route("/readyz", get(readyz))
        .merge(guarded)
        .layer(from_fn(observe))
        .with_state(api)
}

async fn unknown() -> Problem {
    Problem::new(StatusCode::NOT_FOUND, "unknown-endpoint", "there is no such endpoint")
}

async fn wrong_method() -> Problem {
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, "wrong-method", "the endpoint has other methods")
}

/// Gives every request an id, and logs it without its content.
async fn observe(mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request_id(request.headers());
    if let Ok(value) = HeaderValue::from_str(&id) {
        request.headers_mut().insert("x-request-id", value);
    }
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let mut response = next.run(request).await;
    if let Some(problem) = response.extensions_mut().remove::<Problem>() {
        let named = Problem { instance: Some(id.clone()), ..problem };
        *response.body_mut() = Body::from(serde_json::to_vec(&named).unwrap_or_default());
    }
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert("x-request-id", value);
    }
    let duration_ms = started.elapsed().as_millis();
    let status = response.status().as_u16();
    let route = route.as_deref().unwrap_or("none");
    // A server asks all the time: what it asks is told to who looks for it, what went wrong here to everybody.
    if status >= 500 {
        tracing::warn!(request_id = id, %method, route, status, duration_ms, "request");
    } else {
        tracing::debug!(request_id = id, %method, route, status, duration_ms, "request");
    }
    response
}

/// The caller's own id when it is harmless in a log, else a new one.
fn request_id(headers: &HeaderMap) -> String {
    let harmless = |id: &&str| {
        (1..=64).contains(&id.len())
            && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    };
    let given = headers.get("x-request-id").and_then(|value| value.to_str().ok()).filter(harmless);
    given.map_or_else(|| Uuid::now_v7().to_string(), str::to_owned)
}

async fn authenticate(State(api): State<Api>, request: Request, next: Next) -> Response {
    let header = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = header.and_then(|value| value.split_once(' '));
    let given = given.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    let effective = api.effective();
    if effective.waits() {
        return Problem::new(StatusCode::SERVICE_UNAVAILABLE, "not-configured", UNCONFIGURED)
            .retry_after(5)
            .into_response();
    }
    if effective.admits(given.map_or("", |(_, token)| token), api.clock.now()) {
        return next.run(request).await;
    }
    let detail = "a valid bearer token is needed";
    let mut response =
        Problem::new(StatusCode::UNAUTHORIZED, "unauthorized", detail).into_response();
    response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    response
}

/// A body of the API: bounded in size and time, of a supported version, without unknown fields.
struct Payload<T>(T);

#[derive(Deserialize)]
struct Versioned {
    version: Option<u32>,
}

impl<T: DeserializeOwned> FromRequest<Api> for Payload<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, api: &Api) -> Result<Self, Problem> {
        let bytes = read_body(request.into_body(), &api.effective().max_request_bytes).await?;
        // An unknown version is reported as such even when its fields are unknown too.
        if let Ok(Versioned { version: Some(version) }) = serde_json::from_slice(&bytes) {
            supported(version)?;
        }
        let parsed = serde_json::from_slice(&bytes);
        parsed.map(Self).map_err(|err| Problem::invalid(format!("the body is not valid: {err}")))
    }
}

async fn read_body(body: Body, limit: &Ruled<usize>) -> Result<axum::body::Bytes, Problem> {
    let Ruled { value: limit, rule } = limit;
    let limit = *limit;
    let too_large = || {
        let detail = format!("the body is over the limit of {limit} bytes that {rule} sets");
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "request-too-large", detail)
    };
    // A body that says its size is refused unread.
    if axum::body::HttpBody::size_hint(&body).lower() > limit as u64 {
        return Err(too_large());
    }
    match tokio::time::timeout(BODY_PATIENCE, to_bytes(body, limit)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(err)) => {
            let cause = std::error::Error::source(&err);
            let cut = cause.is_some_and(|cause| cause.to_string().contains("limit"));
            Err(if cut { too_large() } else { Problem::invalid("the body could not be read") })
        }
        Err(_) => {
            let detail = "the body did not arrive in time";
            Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "request-too-slow", detail))
        }
    }
}

async fn readyz(State(api): State<Api>) -> Response {
    let unavailable =
        |reason: &'static str| (StatusCode::SERVICE_UNAVAILABLE, reason).into_response();
    if api.effective().waits() {
        return unavailable(UNCONFIGURED);
    }
    let state = api.readiness.borrow().clone();
    match state {
        Some(Ok(_)) => "ready".into_response(),
        Some(Err(reason)) => (StatusCode::SERVICE_UNAVAILABLE, reason).into_response(),
        None => unavailable("the sandbox is being tried"),
    }
}

/// Waits for the trial sandboxes; refuses when they did not work.
async fn sandbox_ready(api: &Api) -> Result<(), Problem> {
    let unavailable = |kind, reason: &str, seconds| {
        Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, kind, reason).retry_after(seconds))
    };
    let mut readiness = api.readiness.clone();
    let tried = tokio::time::timeout(PROBE_PATIENCE, readiness.wait_for(Option::is_some)).await;
    match tried {
        Ok(Ok(state)) => match &*state {
            Some(Err(reason)) => unavailable("sandbox-unavailable", reason, 60),
            _ => Ok(()),
        },
        Ok(Err(_)) => unavailable("shutting-down", "this worker is shutting down", 5),
        Err(_) => unavailable("starting", "the sandbox is still being tried", 5),
    }
}

async fn admit(api: &Api, mut request: JobRequest) -> Result<(Accepted, JobStatus), Problem> {
    api.effective().admit(&mut request)?;
    admissible(&api.config, &request)?;
    sandbox_ready(api).await?;
    Ok(api.jobs.accept(request).await?)
}

async fn accept(
    State(api): State<Api>,
    Payload(request): Payload<JobRequest>,
) -> Result<(StatusCode, Json<JobStatus>), Problem> {
    let (accepted, status) = admit(&api, request).await?;
    let code = if accepted == Accepted::New { StatusCode::ACCEPTED } else { StatusCode::OK };
    Ok((code, Json(status)))
}

async fn run(
    State(api): State<Api>,
    Payload(request): Payload<JobRequest>,
) -> Result<Json<JobResult>, Problem> {
    let job = request.job_id;
    admit(&api, request).await?;
    let ended = api.jobs.ended(job).await?;
    let fault =
        |detail: &str| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "sandbox-failed", detail);
    let result = ended.result.ok_or_else(|| fault("the result is missing"))?;
    match &result.error {
        Some(error) if error.kind == JobErrorKind::SandboxFailed => Err(fault(&error.message)),
        Some(error) if result.status == JobState::Lost => {
            Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "job-lost", &error.message))
        }
        _ => Ok(Json(result)),
    }
}

async fn status(
    State(api): State<Api>,
    Path(id): Path<String>,
) -> Result<Json<JobStatus>, Problem> {
    Ok(Json(api.jobs.status(job_id(&id)?).await?))
}

fn job_id(text: &str) -> Result<JobId, Problem> {
    text.parse().map_err(|_| Problem::invalid("the job id in the path is not a UUID"))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FinishedQuery {
    state: Option<String>,
    wait: Option<u64>,
    limit: Option<usize>,
}

async fn finished(
    State(api): State<Api>,
    query: Result<Query<FinishedQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<FinishedJobs>, Problem> {
    let Query(query) = query.map_err(|err| Problem::invalid(err.body_text()))?;
    if query.state.as_deref() != Some("finished") {
        return Err(Problem::invalid("`state` must be `finished`"));
    }
    let wait = query.wait.unwrap_or(0);
    if wait > MAX_WAIT_SECONDS {
        return Err(Problem::invalid(format!(
            "`wait` is over its limit of {MAX_WAIT_SECONDS} seconds"
        )));
    }
    let limit = query.limit.unwrap_or(20);
    Ok(Json(api.jobs.finished(Duration::from_secs(wait), limit).await?))
}

async fn acknowledge(
    State(api): State<Api>,
    Path(id): Path<String>,
) -> Result<Json<Acknowledged>, Problem> {
    let job_id = job_id(&id)?;
    api.jobs.acknowledge(job_id).await?;
    Ok(Json(Acknowledged { version: VERSION, job_id, acknowledged: true }))
}

async fn stop(
    State(api): State<Api>,
    Payload(request): Payload<StopRequest>,
) -> Result<Json<StopAnswer>, Problem> {
    supported(request.version)?;
    Ok(Json(api.jobs.stop(request.task_id, request.job_id).await?))
}

async fn capabilities(State(api): State<Api>) -> Json<Capabilities> {
    let mut readiness = api.readiness.clone();
    let tried = tokio::time::timeout(PROBE_PATIENCE, readiness.wait_for(Option::is_some)).await;
    let state = tried.ok().and_then(Result::ok).and_then(|state| state.clone());
    Json(Capabilities::of(&api.config, &api.effective(), &api.jobs, state))
}
