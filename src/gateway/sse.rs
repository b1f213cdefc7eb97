//! A run's events as server-sent events.
//!
//! First `metadata` (which run this is), then what the service gives, last `end`: a stream that stops
//! without `end` or `error` was cut on the way, and the client comes back. A comment every few seconds
//! shows clients and proxies that the connection lives.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures::stream::BoxStream;
use futures::{StreamExt, stream};
use serde_json::json;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::disconnect::Guard;
use super::error::ApiError;
use super::metrics;
use crate::services::api::{RunView, StreamItem};
use crate::services::error::ServiceError;

/// What a stream needs beside its events.
pub(super) struct Streaming {
    /// The events.
    pub(super) items: BoxStream<'static, Result<StreamItem, ServiceError>>,
    /// Watches the client.
    pub(super) guard: Guard,
    /// The server stops.
    pub(super) closing: CancellationToken,
    /// Time between two signs of life.
    pub(super) heartbeat: Duration,
    /// This stream's part of the limit.
    pub(super) _slot: Slot,
}

/// One of a limited number of open streams and waits.
#[derive(Debug)]
pub(super) struct Slot(#[expect(dead_code, reason = "held, not read")] OwnedSemaphorePermit);

impl Slot {
    /// Takes one, or says that there is none.
    pub(super) fn take(slots: &Arc<tokio::sync::Semaphore>) -> Result<Self, ServiceError> {
        let permit = Arc::clone(slots).try_acquire_owned();
        let permit = permit.map_err(|_| ServiceError::TooMany {
            message: "too many streams are open on this server".to_owned(),
            retry_after: Duration::from_secs(5),
        })?;
        ::metrics::gauge!(metrics::STREAMS).increment(1);
        Ok(Self(permit))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        ::metrics::gauge!(metrics::STREAMS).decrement(1);
    }
}

/// The response that streams `run`.
pub(super) fn response(run: &RunView, streaming: Streaming) -> Response {
    let metadata = json!({"run_id": run.run_id, "attempt": 1}).to_string();
    let first = frame("metadata", metadata.as_bytes(), None);
    let body = stream::once(async { first }).chain(frames(streaming)).map(Ok::<_, ApiError>);
    let mut response = Body::from_stream(body.map(|frame| frame.map_err(|_| Cut))).into_response();
    let headers = response.headers_mut();
    headers
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// A body's error type must be an error; ours never happens.
#[derive(Debug, thiserror::Error)]
#[error("the stream was cut")]
struct Cut;

struct State {
    streaming: Streaming,
    beat: Interval,
    over: bool,
}

fn frames(streaming: Streaming) -> impl futures::Stream<Item = Bytes> + Send {
    let mut beat = tokio::time::interval(streaming.heartbeat);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    beat.reset();
    stream::unfold(State { streaming, beat, over: false }, |mut state| async move {
        if state.over {
            return None;
        }
        let bytes = next(&mut state).await?;
        Some((bytes, state))
    })
}

/// The next bytes; `None` cuts the stream.
async fn next(state: &mut State) -> Option<Bytes> {
    let Streaming { items, guard, closing, .. } = &mut state.streaming;
    tokio::select! {
        biased;
        () = closing.cancelled() => None,
        item = items.next() => Some(match item {
            Some(Ok(item)) => frame(&item.event, &item.data, item.id.as_deref()),
            Some(Err(err)) => {
                guard.done();
                state.over = true;
                error_frame(err)
            }
            None => {
                guard.done();
                state.over = true;
                frame("end", b"null", None)
            }
        }),
        _ = state.beat.tick() => Some(Bytes::from_static(b": heartbeat\n\n")),
    }
}

fn error_frame(err: ServiceError) -> Bytes {
    let err = ApiError::from(err);
    let data = json!({"error": err.code(), "message": err.message()}).to_string();
    frame("error", data.as_bytes(), None)
}

/// One event, in the order of fields that clients of this API are used to.
fn frame(event: &str, data: &[u8], id: Option<&str>) -> Bytes {
    let mut bytes = Vec::with_capacity(event.len() + data.len() + 48);
    field(&mut bytes, "event", event.as_bytes());
    for line in data.split(|&byte| byte == b'\n') {
        field(&mut bytes, "data", line);
    }
    if let Some(id) = id {
        field(&mut bytes, "id", id.as_bytes());
    }
    bytes.push(b'\n');
    bytes.into()
}

fn field(bytes: &mut Vec<u8>, name: &str, value: &[u8]) {
    bytes.extend_from_slice(name.as_bytes());
    bytes.extend_from_slice(b": ");
    // A line end inside a value would begin another field: JSON has none, names are ours.
    bytes.extend(value.iter().copied().filter(|byte| !matches!(byte, b'\r' | b'\n' | 0)));
    bytes.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(event: &str, data: &str, id: Option<&str>, expected: &str) {
        assert_eq!(frame(event, data.as_bytes(), id), expected.as_bytes());
    }

    fn run() -> RunView {
        let at = chrono::DateTime::UNIX_EPOCH;
        RunView {
            run_id: crate::ids::RunId(uuid::Uuid::nil()),
            thread_id: crate::ids::ThreadId(uuid::Uuid::nil()),
            assistant_id: crate::ids::AssistantId(uuid::Uuid::nil()),
            created_at: at,
            updated_at: at,
            started_at: None,
            ended_at: None,
            status: crate::services::api::RunStatus::Running,
            metadata: serde_json::Map::new(),
            kwargs: json!({}),
            multitask_strategy: crate::services::api::MultitaskStrategy::Enqueue,
            cancel_reason: None,
            error: None,
        }
    }

    /// The text of a stream of `items`, each after so many seconds; `true` waits for more for ever.
    async fn streamed(
        items: Vec<(u64, Result<StreamItem, ServiceError>)>,
        open: bool,
        closing: CancellationToken,
    ) -> String {
        let slots = Arc::new(tokio::sync::Semaphore::new(1));
        let timed = stream::iter(items).then(|(seconds, item)| async move {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            item
        });
        let rest = if open { stream::pending().boxed() } else { stream::empty().boxed() };
        let actor = crate::services::api::Actor {
            user_id: crate::ids::UserId::new(),
            name: "somebody".to_owned(),
            admin: false,
        };
        let key = crate::services::api::RunKey { thread: None, run: run().run_id };
        let disconnects = crate::gateway::disconnect::Disconnects::new();
        let streaming = Streaming {
            items: timed.chain(rest).boxed(),
            guard: disconnects.guard(false, &actor, key, &closing),
            closing,
            heartbeat: Duration::from_secs(5),
            _slot: Slot::take(&slots).unwrap(),
        };
        let response = response(&run(), streaming);
        assert_eq!(response.headers()["x-accel-buffering"], "no");
        let body = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
        assert_eq!(slots.available_permits(), 1);
        String::from_utf8(body.to_vec()).unwrap()
    }

    const FIRST: &str = "event: metadata\n\
        data: {\"run_id\":\"00000000-0000-0000-0000-000000000000\",\"attempt\":1}\n\n";

    fn values(id: &str) -> StreamItem {
        StreamItem {
            id: Some(id.to_owned()),
            event: "values".to_owned(),
            data: Bytes::from_static(b"{}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_begins_with_metadata_ends_with_end_and_beats_in_between() {
        let items = vec![(0, Ok(values("1"))), (12, Ok(values("2")))];
        let text = streamed(items, false, CancellationToken::new()).await;
        let beat = ": heartbeat\n\n";
        let expected = format!(
            "{FIRST}event: values\ndata: {{}}\nid: 1\n\n{beat}{beat}event: values\ndata: {{}}\nid: 2\n\n\
             event: end\ndata: null\n\n"
        );
        assert_eq!(text, expected);
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_is_the_last_event_and_hides_its_cause() {
        let items =
            vec![(0, Err(ServiceError::internal("the secret cause"))), (0, Ok(values("1")))];
        let text = streamed(items, false, CancellationToken::new()).await;
        let rest = text.strip_prefix(FIRST).unwrap();
        assert!(rest.starts_with("event: error\ndata: {\"error\":\"internal\""), "{rest}");
        assert!(!rest.contains("secret") && !rest.contains("values"), "{rest}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stopping_server_cuts_a_stream_without_an_end() {
        let closing = CancellationToken::new();
        let (stop, later) = (closing.clone(), Duration::from_secs(7));
        let stopping = async move {
            tokio::time::sleep(later).await;
            stop.cancel();
        };
        let (text, ()) = tokio::join!(streamed(Vec::new(), true, closing), stopping);
        assert_eq!(text, format!("{FIRST}: heartbeat\n\n"));
    }

    #[test]
    fn a_frame_is_event_data_id_and_an_empty_line() {
        check("values", r#"{"a":1}"#, Some("3-1"), "event: values\ndata: {\"a\":1}\nid: 3-1\n\n");
        check("end", "null", None, "event: end\ndata: null\n\n");
    }

    #[test]
    fn a_line_end_cannot_forge_another_field() {
        check("a\nid: 9", "1\n2", None, "event: aid: 9\ndata: 1\ndata: 2\n\n");
        check("a", "1\r2", None, "event: a\ndata: 12\n\n");
    }
}
