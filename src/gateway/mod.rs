//! HTTP: the REST surface that LangGraph's clients speak, and this project's own under /v1.
//!
//! A handler takes a request apart, calls one operation of [`Services`], and puts the answer together.
//! One file for each resource; what all share (ids, errors, authentication, streams) has its own.
//!
//! **Invariant:** no rule lives here, and no SQL: this is a door.

mod access;
mod assistants;
mod auth;
mod disconnect;
mod edge;
mod error;
mod extract;
mod meta;
pub mod metrics;
mod models;
mod nodes;
pub mod openapi;
pub mod origin;
mod run_request;
mod runs;
mod secrets;
pub mod serve;
mod sse;
mod state;
mod stateless;
mod threads;
mod tools;
mod view;
mod wait;
mod webhooks;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{from_fn, from_fn_with_state};
use futures::future::BoxFuture;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tower::util::option_layer;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use utoipa_axum::router::OpenApiRouter;

use crate::services::Services;
use disconnect::Disconnects;
use error::ApiError;
use origin::OriginPolicy;

/// What an operator may change.
#[derive(Debug, Clone)]
pub struct GatewayConfig {
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// How long a request may take that is not a stream or a wait.
    pub request_timeout: Duration,
    /// Time between two signs of life on a stream or a wait.
    pub heartbeat: Duration,
    /// Connections that are open at once.
    pub connections: usize,
    /// How long a stopping server waits for requests under way.
    pub drain: Duration,
    /// What Host and Origin may be.
    pub origin: OriginPolicy,
    /// Whether /metrics answers without a token.
    pub public_metrics: bool,
    /// How clients reach this server: `http` or `https`.
    pub scheme: &'static str,
}

impl Default for GatewayConfig {
    fn default() -> Self {
        Self {
            body_bytes: 10 << 20,
            request_timeout: Duration::from_secs(30),
            heartbeat: Duration::from_secs(5),
            connections: 10_000,
            drain: Duration::from_secs(10),
            origin: OriginPolicy { loopback: true, ..OriginPolicy::default() },
            public_metrics: false,
            scheme: "http",
        }
    }
}

/// Something that must be right before this process should get requests.
#[derive(Clone)]
pub struct ReadyCheck {
    /// What it is: "database", "migrations", "driver".
    pub name: &'static str,
    /// Answers, soon, what is wrong.
    pub check: Arc<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>,
}

impl std::fmt::Debug for ReadyCheck {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReadyCheck").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What handlers share. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Gateway(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    services: Services,
    config: GatewayConfig,
    checks: Vec<ReadyCheck>,
    disconnects: Disconnects,
    slots: Arc<Semaphore>,
    closing: CancellationToken,
}

impl Gateway {
    /// A door to `services`. `checks` decide about /readyz, beside the database.
    #[must_use]
    pub fn new(services: Services, config: GatewayConfig, checks: Vec<ReadyCheck>) -> Self {
        let slots = Arc::new(Semaphore::new(services.limits().streams));
        let (disconnects, closing) = (Disconnects::new(), CancellationToken::new());
        Self(Arc::new(Inner { services, config, checks, disconnects, slots, closing }))
    }

    fn services(&self) -> &Services {
        &self.0.services
    }

    fn config(&self) -> &GatewayConfig {
        &self.0.config
    }
}

/// Every route, with what surrounds it.
pub fn router(gateway: Gateway) -> Router {
    let (routes, openapi) = routes(&gateway).split_for_parts();
    let routes = routes.merge(meta::openapi_route(&openapi::finished(openapi)));
    let config = gateway.config();
    routes
        .fallback(async || {
            ApiError::new(StatusCode::NOT_FOUND, "not_found", "there is no such route")
        })
        .method_not_allowed_fallback(async || {
            let message = "this route does not have this method";
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
        })
        .layer(DefaultBodyLimit::max(config.body_bytes))
        .layer(option_layer(cors(&config.origin)))
        .layer(from_fn_with_state(gateway.clone(), origin::check_origin))
        .layer(from_fn(edge::edge))
        .with_state(gateway)
}

/// Four kinds of routes: open ones; those that answer soon; those that take as long as a run; those of workers, which
/// have tokens of their own.
fn routes(gateway: &Gateway) -> OpenApiRouter<Gateway> {
    let soon = OpenApiRouter::with_openapi(openapi::base())
        .merge(assistants::routes())
        .merge(threads::routes())
        .merge(state::routes())
        .merge(runs::routes())
        .merge(stateless::routes())
        .merge(access::routes())
        .merge(tools::routes())
        .merge(secrets::routes())
        .merge(webhooks::routes())
        .merge(nodes::routes())
        .merge(meta::private_routes(gateway.config().public_metrics))
        .route_layer(from_fn_with_state(gateway.clone(), edge::bound_time));
    let long = OpenApiRouter::new()
        .merge(runs::long_routes())
        .merge(stateless::long_routes())
        .merge(tools::long_routes())
        .merge(models::long_routes());
    soon.merge(long)
        .route_layer(from_fn_with_state(gateway.clone(), auth::authenticate))
        .merge(
            nodes::worker_routes()
                .route_layer(from_fn_with_state(gateway.clone(), edge::bound_time)),
        )
        .merge(nodes::worker_long_routes())
        .merge(meta::public_routes(gateway.config().public_metrics))
}

/// Lets the listed origins' pages call, and read the headers that clients need. Off without any.
fn cors(policy: &OriginPolicy) -> Option<CorsLayer> {
    if policy.origins.is_empty() {
        return None;
    }
    let origins = policy.origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok());
    let layer = CorsLayer::new()
        .allow_origin(AllowOrigin::list(origins))
        .allow_headers(AllowHeaders::mirror_request())
        .allow_methods([Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE])
        .expose_headers([
            HeaderName::from_static("x-pagination-total"),
            HeaderName::from_static("x-pagination-next"),
            HeaderName::from_static("x-request-id"),
            header::CONTENT_LOCATION,
            header::LOCATION,
            header::RETRY_AFTER,
        ])
        .max_age(Duration::from_secs(600));
    Some(layer)
}
