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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::gateway::disconnect::Disconnects;
    use crate::services::api::{Actor, RunKey};

    /// What a client gets when the run ends after so many seconds.
    async fn waited(seconds: u64, answer: Answer) -> Result<(u16, String), ApiError> {
        let closing = CancellationToken::new();
        let actor =
            Actor { user_id: crate::ids::UserId::new(), name: "somebody".to_owned(), admin: false };
        let key = RunKey { thread: None, run: crate::ids::RunId::new() };
        let waiting = Waiting {
            answer: Box::pin(async move {
                tokio::time::sleep(Duration::from_secs(seconds)).await;
                answer
            }),
            guard: Disconnects::new().guard(false, &actor, key, &closing),
            closing,
            heartbeat: Duration::from_secs(5),
            _slot: Slot::take(&Arc::new(tokio::sync::Semaphore::new(1)))?,
        };
        let response = response(waiting).await?;
        let status = response.status().as_u16();
        let body = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
        Ok((status, String::from_utf8(body.to_vec()).unwrap()))
    }

    fn values() -> Answer {
        Ok(RawValue::from_string("{\"n\":1}".to_owned()).unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn a_quick_answer_is_sent_as_it_is() {
        assert_eq!(waited(1, values()).await.unwrap(), (200, "{\"n\":1}".to_owned()));
        let err = waited(1, Err(ServiceError::not_found("run", "x"))).await.unwrap_err();
        assert_eq!(err.code(), "not_found");
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_answer_follows_white_space_and_is_still_json() {
        let (status, text) = waited(17, values()).await.unwrap();
        assert_eq!((status, text.as_str()), (200, "  {\"n\":1}"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_error_is_in_the_body() {
        let (status, text) =
            waited(7, Err(ServiceError::internal("the secret cause"))).await.unwrap();
        assert_eq!(status, 200);
        let body: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(body["__error__"]["error"], "internal");
        assert!(!text.contains("secret"));
    }
}
