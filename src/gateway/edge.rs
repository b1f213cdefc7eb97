//! The outermost layer: request ids, panics, access logs, metrics; and the time limit of short requests.

use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::FutureExt;
use tracing::Instrument;

use super::Gateway;
use super::error::ApiError;
use super::metrics;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Gives the request an id, runs it, and accounts for it.
pub(super) async fn edge(request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request_id(&request);
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let path = request.uri().path().to_owned();
    let span = tracing::info_span!("request", request.id = %id, %method, path);
    let outcome = AssertUnwindSafe(next.run(request)).catch_unwind().instrument(span).await;
    let mut response = outcome.unwrap_or_else(|panic| panicked(&id, &path, panic.as_ref()));
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    let route = route.as_ref().map_or("none", MatchedPath::as_str);
    account(&method, route, &path, &id, response.status(), started.elapsed());
    response
}

/// Ends a request that takes too long with an error. Not for streams and waits.
pub(super) async fn bound_time(
    State(gateway): State<Gateway>,
    request: Request,
    next: Next,
) -> Response {
    let limit = gateway.config().request_timeout;
    match tokio::time::timeout(limit, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            let message = format!("the server could not answer within {} s", limit.as_secs());
            ApiError::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message).into_response()
        }
    }
}

/// The client's own id when it is short and plain, so that it can be written to a log; else a new one.
fn request_id(request: &Request) -> String {
    let given = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok());
    let plain = |id: &&str| {
        let word = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        (1..=128).contains(&id.len()) && id.bytes().all(word)
    };
    given.filter(plain).map_or_else(|| uuid::Uuid::now_v7().to_string(), str::to_owned)
}

fn panicked(id: &str, path: &str, panic: &(dyn std::any::Any + Send)) -> Response {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    let text = text.unwrap_or("a panic without a message");
    tracing::error!(request.id = id, path, panic = text, "request {id} panicked");
    ::metrics::counter!(metrics::PANICS).increment(1);
    let err = ApiError::internal();
    let body = axum::Json(err.body(Some(id.to_owned())));
    (StatusCode::INTERNAL_SERVER_ERROR, body).into_response()
}

fn account(method: &Method, route: &str, path: &str, id: &str, status: StatusCode, took: Duration) {
    let seconds = took.as_secs_f64();
    // A method is a word of the client's choice: only the usual ones become a label.
    let label = match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        Method::HEAD => "HEAD",
        _ => "other",
    };
    let labels = [
        ("method", label.to_owned()),
        ("route", route.to_owned()),
        ("status", status.as_u16().to_string()),
    ];
    ::metrics::counter!(metrics::REQUESTS, &labels).increment(1);
    ::metrics::histogram!(metrics::SECONDS, "route" => route.to_owned()).record(seconds);
    let status = status.as_u16();
    let took_ms = seconds * 1000.0;
    if status >= 500 {
        tracing::warn!(request.id = id, %method, path, status, took_ms, "{method} {path} {status}");
    } else {
        tracing::info!(request.id = id, %method, path, status, took_ms, "{method} {path} {status}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(input: &str, kept: bool) {
        let request = Request::builder().header("x-request-id", input);
        let id = request_id(&request.body(axum::body::Body::empty()).unwrap());
        assert_eq!(id == input, kept, "{input}");
        assert!(!id.is_empty());
    }

    #[test]
    fn a_plain_request_id_is_kept_and_a_strange_one_is_replaced() {
        check("abc-1_2.3", true);
        check("", false);
        check("with space", false);
        check("{\"json\":1}", false);
        check(&"a".repeat(128), true);
        check(&"a".repeat(129), false);
    }

    #[tokio::test]
    async fn a_panic_is_an_error_with_the_requests_id() {
        use tower::ServiceExt;

        let fails = axum::routing::get(async || -> () { panic!("the secret cause") });
        let app = axum::Router::new().route("/fails", fails).layer(axum::middleware::from_fn(edge));
        let request = Request::builder().uri("/fails").header("x-request-id", "mine");
        let response = app.oneshot(request.body(axum::body::Body::empty()).unwrap()).await.unwrap();
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(response.headers()["x-request-id"], "mine");
        let body = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
        let text = String::from_utf8(body.to_vec()).unwrap();
        assert!(text.contains("\"request_id\":\"mine\"") && !text.contains("secret"), "{text}");
    }
}
