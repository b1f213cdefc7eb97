//! Answers that take as long as a run: `/wait` and `/join`.
//!
//! Clients give up reading after some minutes of silence, so a body that is not ready soon begins with
//! white space, which JSON allows before a value, and grows by one space every few seconds. Its status
//! is 200 from then on; what goes wrong later is in the body, as `__error__`, which is how clients
//! read a failed run anyway. An error within the first seconds still has its own status.

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures::future::BoxFuture;
use futures::stream;
use serde_json::json;
use serde_json::value::RawValue;
use tokio::time::{Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::disconnect::Guard;
use super::error::ApiError;
use super::sse::Slot;
use crate::services::error::ServiceError;

type Answer = Result<Box<RawValue>, ServiceError>;

/// What a wait needs.
pub(super) struct Waiting {
    /// Ends with the run.
    pub(super) answer: BoxFuture<'static, Answer>,
    /// Watches the client.
    pub(super) guard: Guard,
    /// The server stops.
    pub(super) closing: CancellationToken,
    /// Time between two signs of life.
    pub(super) heartbeat: std::time::Duration,
    /// This wait's part of the limit.
    pub(super) _slot: Slot,
}

/// Waits, with the run's values as the response's body.
pub(super) async fn response(mut waiting: Waiting) -> Result<Response, ApiError> {
    let mut beat = tokio::time::interval(waiting.heartbeat);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    beat.reset();
    tokio::select! {
        answer = &mut waiting.answer => {
            waiting.guard.done();
            let values = answer?.to_string();
            return Ok(with_type(Body::from(values)));
        }
        () = waiting.closing.cancelled() => return Err(stopping().into()),
        _ = beat.tick() => {}
    }
    Ok(with_type(Body::from_stream(stream::unfold(
        Phase::Waiting(Box::new((waiting, beat))),
        |phase| async move {
            let Phase::Waiting(mut state) = phase else { return None };
            match next(&mut state.0, &mut state.1).await {
                Some(last) => Some((Ok::<_, std::io::Error>(last), Phase::Over)),
                None => Some((Ok(Bytes::from_static(b" ")), Phase::Waiting(state))),
            }
        },
    ))))
}

enum Phase {
    Waiting(Box<(Waiting, Interval)>),
    Over,
}

/// The rest of the body, or `None` for another sign of life.
async fn next(waiting: &mut Waiting, beat: &mut Interval) -> Option<Bytes> {
    let answer = tokio::select! {
        answer = &mut waiting.answer => answer,
        () = waiting.closing.cancelled() => Err(stopping()),
        _ = beat.tick() => return None,
    };
    waiting.guard.done();
    Some(match answer {
        Ok(values) => values.to_string().into(),
        Err(err) => {
            let err = ApiError::from(err);
            let error = json!({"error": err.code(), "message": err.message()});
            json!({"__error__": error}).to_string().into()
        }
    })
}

fn stopping() -> ServiceError {
    ServiceError::unavailable("the server is stopping; the run goes on: ask again")
}

fn with_type(body: Body) -> Response {
    let json = HeaderValue::from_static("application/json");
    ([(header::CONTENT_TYPE, json)], body).into_response()
}
