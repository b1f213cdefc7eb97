//! HTTP, with an eye on what became of each call.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use rmcp::service::{RoleClient, TxJsonRpcMessage};
use rmcp::transport::common::client_side_sse::{BoxedSseResponse, SseRetryPolicy};
use rmcp::transport::streamable_http_client::{
    StreamableHttpClient, StreamableHttpClientTransport, StreamableHttpClientTransportConfig,
    StreamableHttpError, StreamableHttpPostResponse, StreamableHttpResponseLimits,
};

use super::tap::{flight_of, request_number};
use super::{Failure, Terms, login};
use crate::tools::lines::answers;

/// How often a broken stream of events is taken up again before its call has failed.
const STREAM_RETRIES: usize = 3;
/// How long making a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A wire to the server at `url`. Nothing is sent yet.
pub(super) fn connect<C: StreamableHttpClient>(
    http: C,
    url: &url::Url,
    headers: HeaderMap,
    terms: &Terms,
) -> StreamableHttpClientTransport<C> {
    let mut config = StreamableHttpClientTransportConfig::with_uri(url.as_str())
        .max_concurrent_requests(terms.parallel + 4)
        .max_sse_event_size(terms.message_bytes)
        .max_json_response_size(terms.message_bytes)
        // A new session may offer other tools: they are looked at before anything is called.
        .reinit_on_expired_session(false)
        .custom_headers(
            headers.into_iter().filter_map(|(name, value)| Some((name?, value))).collect(),
        );
    config.retry_config = Arc::new(Retries);
    StreamableHttpClientTransport::with_client(http, config)
}

/// What is known of a failure of the wire; of pipes only that they are closed.
pub(super) fn failure(err: &(dyn std::error::Error + Send + Sync + 'static)) -> Failure {
    match err.downcast_ref::<StreamableHttpError<reqwest::Error>>() {
        None | Some(StreamableHttpError::TransportChannelClosed) => Failure::Closed,
        Some(StreamableHttpError::SessionExpired) => Failure::SessionGone,
        Some(StreamableHttpError::AuthRequired(err)) => {
            Failure::LoginRequired(Some(err.www_authenticate_header.clone()))
        }
        Some(StreamableHttpError::InsufficientScope(err)) => {
            Failure::LoginRequired(Some(err.www_authenticate_header.clone()))
        }
        Some(StreamableHttpError::Auth(err)) => login::failure(err),
        // An address may hold a key in its query; the cause tells enough without it.
        Some(StreamableHttpError::Client(err)) => {
            let cause =
                std::iter::successors(std::error::Error::source(err), |err| err.source()).last();
            let cause =
                cause.map_or_else(|| "the connection broke".to_owned(), ToString::to_string);
            if err.is_connect() { Failure::Unreachable(cause) } else { Failure::Http(cause) }
        }
        Some(
            err @ (StreamableHttpError::HttpStatus(_)
            | StreamableHttpError::ResponseBodyTooLarge { .. }),
        ) => Failure::Http(err.to_string()),
        Some(StreamableHttpError::UnexpectedServerResponse(what)) => {
            if what.starts_with("could not parse JSON") {
                return Failure::Unreadable("its answer is not JSON in UTF-8".to_owned());
            }
            Failure::Http(what.to_string())
        }
        Some(_) => Failure::Http("it does not answer as an MCP server does".to_owned()),
    }
}

/// A few attempts, one after the other.
#[derive(Debug)]
struct Retries;

impl SseRetryPolicy for Retries {
    fn retry(&self, times: usize) -> Option<Duration> {
        (times < STREAM_RETRIES)
            .then(|| Duration::from_millis(200) * 2_u32.pow(u32::try_from(times).unwrap_or(0)))
    }
}

/// A client.
#[derive(Debug, Clone)]
pub(super) struct Http(reqwest::Client);

impl Http {
    /// A client that goes where it is sent and nowhere else.
    ///
    /// # Errors
    /// There is no client to be had.
    pub(super) fn new() -> Result<Self, Failure> {
        let http = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .connect_timeout(CONNECT_TIMEOUT)
            .build();
        http.map(Self).map_err(|err| Failure::Http(err.to_string()))
    }
}

type HttpError = StreamableHttpError<reqwest::Error>;
type Headers = HashMap<HeaderName, HeaderValue>;

impl StreamableHttpClient for Http {
    type Error = reqwest::Error;

    async fn post_message(
        &self,
        uri: Arc<str>,
        message: TxJsonRpcMessage<RoleClient>,
        session: Option<Arc<str>>,
        token: Option<String>,
        headers: Headers,
    ) -> Result<StreamableHttpPostResponse, HttpError> {
        let limits = StreamableHttpResponseLimits::default();
        self.post_message_with_response_limits(uri, message, session, token, headers, limits).await
    }

    async fn post_message_with_response_limits(
        &self,
        uri: Arc<str>,
        message: TxJsonRpcMessage<RoleClient>,
        session: Option<Arc<str>>,
        token: Option<String>,
        headers: Headers,
        limits: StreamableHttpResponseLimits,
    ) -> Result<StreamableHttpPostResponse, HttpError> {
        let Some((_, flight)) = flight_of(&message) else {
            return self
                .0
                .post_message_with_response_limits(uri, message, session, token, headers, limits)
                .await;
        };
        let ours = request_number(&message);
        flight.set_sent(true);
        let answer = self
            .0
            .post_message_with_response_limits(uri, message, session, token, headers, limits)
            .await;
        match &answer {
            Err(StreamableHttpError::ResponseBodyTooLarge { max_size }) => {
                flight.set_oversized(*max_size as u64)
            }
            Err(StreamableHttpError::Client(err)) if err.is_connect() => flight.set_sent(false),
            Err(
                StreamableHttpError::SessionExpired
                | StreamableHttpError::AuthRequired(_)
                | StreamableHttpError::InsufficientScope(_),
            ) => flight.set_sent(false),
            Err(StreamableHttpError::HttpStatus(status)) if status.status == 429 => {
                flight.set_sent(false)
            }
            _ => {}
        }
        let Ok(StreamableHttpPostResponse::Sse(events, session)) = answer else { return answer };
        let limit = limits.max_sse_event_size as u64;
        let events = events.filter(move |event| {
            // The library keeps the type of this error to itself.
            if event.as_ref().is_err_and(|err| format!("{err:?}").contains("EventTooLarge")) {
                flight.set_oversized(limit);
            }
            // The library takes any answer on a request's own stream for the end of the stream.
            let data = event.as_ref().ok().and_then(|event| event.data.as_deref());
            let other =
                data.and_then(|data| answers(data.as_bytes())).is_some_and(|id| Some(id) != ours);
            std::future::ready(!other)
        });
        Ok(StreamableHttpPostResponse::Sse(events.boxed(), session))
    }

    async fn delete_session(
        &self,
        uri: Arc<str>,
        session: Arc<str>,
        token: Option<String>,
        headers: Headers,
    ) -> Result<(), HttpError> {
        self.0.delete_session(uri, session, token, headers).await
    }

    async fn get_stream(
        &self,
        uri: Arc<str>,
        session: Option<Arc<str>>,
        last: Option<String>,
        token: Option<String>,
        headers: Headers,
    ) -> Result<BoxedSseResponse, HttpError> {
        self.0.get_stream(uri, session, last, token, headers).await
    }

    async fn get_stream_with_max_sse_event_size(
        &self,
        uri: Arc<str>,
        session: Option<Arc<str>>,
        last: Option<String>,
        token: Option<String>,
        headers: Headers,
        limit: usize,
    ) -> Result<BoxedSseResponse, HttpError> {
        self.0.get_stream_with_max_sse_event_size(uri, session, last, token, headers, limit).await
    }
}
