//! The protocol: one connection to one server, over its pipes or over HTTP. The only file that knows `rmcp`.
//!
//! Between the library and each wire stands a [`Tap`]. It sees every message as it passes: it knows which
//! calls were sent, passes notes of progress on, notices that the list of tools changed, and lets through
//! only what the library must see, so that a server which floods, repeats itself or answers what nobody
//! asked does not get any further.
//!
//! **Invariant:** what a server can make this process keep is bounded: one line or event, and [`MAX_ASKED`]
//! questions of its own.

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use rmcp::model::{
    CallToolRequest, CallToolRequestParams, ClientCapabilities, ClientConfig, ClientNotification,
    ClientRequest, ErrorCode, ErrorData, GetMeta, Implementation, JsonObject, JsonRpcMessage,
    ListToolsRequest, MetaObject, NumberOrString, PaginatedRequestParams, ProgressToken,
    ProtocolVersion, RequestId, RequestMetaObject, ServerJsonRpcMessage, ServerNotification,
    SubscriptionFilter,
};
use rmcp::service::{
    ClientInitializeError, ClientLifecycleMode, PeerRequestOptions, RoleClient, RunningService,
    RxJsonRpcMessage, ServiceError, TxJsonRpcMessage, serve_client_with_lifecycle_and_ct,
};
use rmcp::transport::Transport;
use rmcp::transport::common::client_side_sse::BoxedSseResponse;
use rmcp::transport::streamable_http_client::{
    StreamableHttpClient, StreamableHttpClientTransport, StreamableHttpClientTransportConfig,
    StreamableHttpError, StreamableHttpPostResponse, StreamableHttpResponseLimits,
};
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::{ChildStdin, ChildStdout};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::child::Pipes;
use super::lines::{Line, Lines, answers};
use super::progress::Flight;
use crate::config::tools::Protocol;

/// Questions of the server that are open at once; one that asks more is not served any longer.
const MAX_ASKED: usize = 64;
/// How long telling the server that nobody waits any more may take.
const CANCEL_PATIENCE: Duration = Duration::from_secs(1);
/// How often a broken stream of events is taken up again before its call has failed.
const STREAM_RETRIES: usize = 3;
const IDEMPOTENCY_KEY: &str = "cynai/idempotency-key";

/// Why a request got no result.
#[derive(Debug, PartialEq)]
pub(super) enum Failure {
    /// The connection ended.
    Closed,
    /// The server has forgotten the session; the request was not looked at.
    SessionGone,
    /// HTTP failed; with what is known of why.
    Http(String),
    /// The server answered with an error.
    Remote { code: i32, message: String },
    /// The answer is longer than what is read.
    TooLong(u64),
    /// The answer, or what came instead of one, is not MCP.
    Unreadable(String),
    /// It took too long.
    Timeout,
    /// Nobody waits for it any more.
    Abandoned,
}

/// What both wires need.
#[derive(Debug)]
pub(super) struct Terms {
    pub(super) protocol: Protocol,
    /// Bytes of one message.
    pub(super) message_bytes: usize,
    /// How long writing one message may take.
    pub(super) write_patience: Duration,
    /// Requests that are under way at once.
    pub(super) parallel: usize,
}

/// A connection whose server has introduced itself. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Connection {
    service: RunningService<RoleClient, ClientConfig>,
    shared: Arc<Shared>,
    /// The version that is spoken.
    pub(super) protocol: String,
    /// Name and version of the server, as it says.
    pub(super) name: Option<String>,
}

/// What the taps of a connection see, for its callers.
#[derive(Debug, Default)]
struct Shared {
    open: Mutex<Open>,
    tools_changed: AtomicBool,
    subscribed: AtomicBool,
    closed: CancellationToken,
}

#[derive(Debug, Default)]
struct Open {
    requests: HashMap<RequestId, Option<(ProgressToken, Arc<Flight>)>>,
    by_token: HashMap<ProgressToken, Arc<Flight>>,
    /// Questions of the server that were not answered yet.
    asked: usize,
}

impl Connection {
    /// Over the pipes of a started program.
    pub(super) async fn over_pipes(
        pipes: Pipes,
        terms: &Terms,
        tasks: &TaskTracker,
    ) -> Result<Self, Failure> {
        let shared = Arc::new(Shared::default());
        let wire = Stdio {
            lines: Lines::new(pipes.output, terms.message_bytes),
            input: Arc::new(tokio::sync::Mutex::new(Some(pipes.input))),
            patience: terms.write_patience,
            shared: Arc::clone(&shared),
        };
        Self::begin(Tap { wire, shared }, terms, tasks).await
    }

    /// Over HTTP.
    pub(super) async fn over_http(
        url: &url::Url,
        headers: HeaderMap,
        terms: &Terms,
        tasks: &TaskTracker,
    ) -> Result<Self, Failure> {
        let http = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .connect_timeout(Duration::from_secs(10))
            .build()
            .map_err(|err| Failure::Http(err.to_string()))?;
        let shared = Arc::new(Shared::default());
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
        let wire = StreamableHttpClientTransport::with_client(Http(http), config);
        Self::begin(Tap { wire, shared }, terms, tasks).await
    }

    async fn begin<T>(tap: Tap<T>, terms: &Terms, tasks: &TaskTracker) -> Result<Self, Failure>
    where
        T: Transport<RoleClient> + 'static,
    {
        let shared = Arc::clone(&tap.shared);
        let us = Implementation::new("cynai", env!("CARGO_PKG_VERSION"));
        let us = ClientConfig::new(ClientCapabilities::default(), us)
            .with_protocol_version(ProtocolVersion::V_2025_11_25);
        let newest = vec![ProtocolVersion::V_2026_07_28];
        let lifecycle = match terms.protocol {
            Protocol::V2025 => ClientLifecycleMode::Initialize,
            Protocol::V2026 => ClientLifecycleMode::Discover { preferred_versions: newest },
            Protocol::Auto => ClientLifecycleMode::Auto {
                preferred_versions: newest,
                legacy_version: Some(ProtocolVersion::V_2025_11_25),
            },
        };
        let begun =
            serve_client_with_lifecycle_and_ct(us, tap, lifecycle, CancellationToken::new());
        let service = Box::pin(begun).await.map_err(not_begun)?;
        let info = service.peer().peer_info();
        let info =
            info.ok_or_else(|| Failure::Unreadable("it did not introduce itself".to_owned()))?;
        let tools = info.capabilities.tools.as_ref();
        let announces = tools.and_then(|tools| tools.list_changed).unwrap_or(false);
        if announces && !info.protocol_version.has_initialize() {
            shared.subscribed.store(true, Ordering::SeqCst);
            let (peer, closed) = (service.peer().clone(), shared.closed.clone());
            tasks.spawn(closed.run_until_cancelled_owned(async move {
                let filter = SubscriptionFilter::builder().tools_list_changed().build();
                if let Ok(mut changes) = peer.listen(filter).await {
                    // The tap has seen each of them already.
                    while let Ok(Some(_)) = changes.next().await {}
                }
            }));
        }
        let name = info.server_info.as_ref().map(|name| format!("{} {}", name.name, name.version));
        Ok(Self { protocol: info.protocol_version.to_string(), name, service, shared })
    }

    /// Ends with the connection.
    pub(super) fn closed(&self) -> &CancellationToken {
        &self.shared.closed
    }

    /// Whether the server said, since this was last asked, that its tools are not what they were.
    pub(super) fn take_tools_changed(&self) -> bool {
        self.shared.tools_changed.swap(false, Ordering::SeqCst)
    }

    /// One page of the list of tools.
    pub(super) async fn list(
        &self,
        cursor: Option<String>,
        deadline: Instant,
    ) -> Result<Value, Failure> {
        let params = PaginatedRequestParams::default().with_cursor(cursor);
        let request = ListToolsRequest { params: Some(params), ..ListToolsRequest::default() };
        let flight = Arc::new(Flight::new(None));
        self.request(
            ClientRequest::ListToolsRequest(request),
            None,
            flight,
            deadline,
            std::future::pending(),
        )
        .await
    }

    /// Calls a tool. Ends early when `gone` does, and tells the server so.
    pub(super) async fn call(
        &self,
        tool: &str,
        arguments: JsonObject,
        key: Option<&str>,
        flight: Arc<Flight>,
        deadline: Instant,
        gone: impl Future<Output = ()> + Send,
    ) -> Result<Value, Failure> {
        let params = CallToolRequestParams::new(tool.to_owned()).with_arguments(arguments);
        let request = ClientRequest::CallToolRequest(CallToolRequest::new(params));
        self.request(request, key, flight, deadline, gone).await
    }

    async fn request(
        &self,
        mut request: ClientRequest,
        key: Option<&str>,
        flight: Arc<Flight>,
        deadline: Instant,
        gone: impl Future<Output = ()> + Send,
    ) -> Result<Value, Failure> {
        match &mut request {
            ClientRequest::CallToolRequest(call) => call.extensions.insert(Arc::clone(&flight)),
            ClientRequest::ListToolsRequest(list) => list.extensions.insert(Arc::clone(&flight)),
            _ => None,
        };
        let mut options = PeerRequestOptions::no_options();
        if let Some(key) = key {
            let mut meta = MetaObject::new();
            meta.insert(IDEMPOTENCY_KEY.to_owned(), Value::from(key));
            options = options.with_meta(RequestMetaObject::from(meta));
        }
        let peer = self.service.peer();
        let begun =
            tokio::time::timeout_at(deadline, peer.send_cancellable_request(request, options));
        let mut handle = begun.await.map_err(|_| Failure::Timeout)?.map_err(|_| Failure::Closed)?;
        let (failure, reason) = tokio::select! {
            biased;
            answer = &mut handle.rx => {
                let answer = answer.map_err(|_| Failure::Closed)?;
                let answer = answer.map_err(|err| failed(err, &flight))?;
                return serde_json::to_value(answer).map_err(|err| Failure::Unreadable(err.to_string()));
            }
            () = self.shared.closed.cancelled() => return Err(Failure::Closed),
            () = tokio::time::sleep_until(deadline) => (Failure::Timeout, "it took too long"),
            () = gone => (Failure::Abandoned, "nobody waits for it any more"),
        };
        flight.abandon();
        // One that does not even read this is looked after by whoever writes.
        let _ = tokio::time::timeout(CANCEL_PATIENCE, handle.cancel(Some(reason.to_owned()))).await;
        Err(failure)
    }
}

fn not_begun(err: ClientInitializeError) -> Failure {
    match err {
        ClientInitializeError::ConnectionClosed(_) | ClientInitializeError::Cancelled => {
            Failure::Closed
        }
        ClientInitializeError::JsonRpcError(err) => remote(&err),
        ClientInitializeError::LegacyFallbackFailed { fallback, .. } => not_begun(*fallback),
        ClientInitializeError::TransportError { error, .. } => http_failure(&*error.error),
        ClientInitializeError::NoCompatibleProtocolVersion { server_supported, .. } => {
            let versions: Vec<_> =
                server_supported.iter().take(10).map(ToString::to_string).collect();
            Failure::Unreadable(format!(
                "it speaks other versions of MCP only: {}",
                versions.join(", ")
            ))
        }
        // What it said instead is not repeated: it may be anything.
        _ => Failure::Unreadable("its introduction is not what MCP asks for".to_owned()),
    }
}

fn remote(err: &ErrorData) -> Failure {
    Failure::Remote { code: err.code.0, message: err.message.to_string() }
}

fn failed(err: ServiceError, flight: &Flight) -> Failure {
    if let Some(bytes) = flight.oversized() {
        return Failure::TooLong(bytes);
    }
    if flight.unreadable() {
        return Failure::Unreadable("its answer is not JSON in UTF-8".to_owned());
    }
    match err {
        ServiceError::McpError(err) => remote(&err),
        ServiceError::TransportSend(err) => http_failure(&*err.error),
        ServiceError::Timeout { .. } => Failure::Timeout,
        ServiceError::UnexpectedResponse => {
            Failure::Unreadable("its answer is to another question".to_owned())
        }
        _ => Failure::Closed,
    }
}

/// What is known of a failure of the wire; of pipes only that they are closed.
fn http_failure(err: &(dyn std::error::Error + Send + Sync + 'static)) -> Failure {
    match err.downcast_ref::<StreamableHttpError<reqwest::Error>>() {
        None | Some(StreamableHttpError::TransportChannelClosed) => Failure::Closed,
        Some(StreamableHttpError::SessionExpired) => Failure::SessionGone,
        Some(StreamableHttpError::AuthRequired(_) | StreamableHttpError::InsufficientScope(_)) => {
            Failure::Http("it wants other credentials; look at the configured headers".to_owned())
        }
        // An address may hold a key in its query; the cause tells enough without it.
        Some(StreamableHttpError::Client(err)) => {
            let cause =
                std::iter::successors(std::error::Error::source(err), |err| err.source()).last();
            Failure::Http(
                cause.map_or_else(|| "the connection broke".to_owned(), ToString::to_string),
            )
        }
        Some(
            err @ (StreamableHttpError::HttpStatus(_)
            | StreamableHttpError::ResponseBodyTooLarge { .. }),
        ) => Failure::Http(err.to_string()),
        Some(StreamableHttpError::UnexpectedServerResponse(what)) => {
            Failure::Http(what.to_string())
        }
        Some(_) => Failure::Http("it does not answer as an MCP server does".to_owned()),
    }
}

/// The flight that a message belongs to.
fn flight_of(message: &TxJsonRpcMessage<RoleClient>) -> Option<(ProgressToken, Arc<Flight>)> {
    let JsonRpcMessage::Request(request) = message else { return None };
    let extensions = match &request.request {
        ClientRequest::CallToolRequest(call) => &call.extensions,
        ClientRequest::ListToolsRequest(list) => &list.extensions,
        _ => return None,
    };
    let flight = Arc::clone(extensions.get::<Arc<Flight>>()?);
    Some((request.request.get_meta().get_progress_token()?, flight))
}

/// The number of a request.
fn request_number(message: &TxJsonRpcMessage<RoleClient>) -> Option<i64> {
    match message {
        JsonRpcMessage::Request(request) => match &request.id {
            NumberOrString::Number(number) => Some(*number),
            NumberOrString::String(_) => None,
        },
        _ => None,
    }
}

/// What becomes of a message that came in.
enum Verdict {
    Pass,
    Drop,
    End,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn going_out(&self, message: &TxJsonRpcMessage<RoleClient>) {
        let mut open = self.lock();
        match message {
            JsonRpcMessage::Request(request) => {
                let flight = flight_of(message);
                if let Some((token, flight)) = &flight {
                    open.by_token.insert(token.clone(), Arc::clone(flight));
                }
                open.requests.insert(request.id.clone(), flight);
            }
            JsonRpcMessage::Notification(notification) => {
                if let ClientNotification::CancelledNotification(cancelled) =
                    &notification.notification
                    && let Some(id) = &cancelled.params.request_id
                {
                    open.forget(id);
                }
            }
            _ => open.asked = open.asked.saturating_sub(1),
        }
    }

    fn coming_in(&self, message: &RxJsonRpcMessage<RoleClient>) -> Verdict {
        match message {
            JsonRpcMessage::Response(response) => self.answered(&response.id),
            JsonRpcMessage::Error(error) => {
                error.id.as_ref().map_or(Verdict::Pass, |id| self.answered(id))
            }
            JsonRpcMessage::Request(_) => {
                let mut open = self.lock();
                open.asked += 1;
                if open.asked > MAX_ASKED { Verdict::End } else { Verdict::Pass }
            }
            JsonRpcMessage::Notification(notification) => match &notification.notification {
                ServerNotification::ProgressNotification(note) => {
                    let flight = self.lock().by_token.get(&note.params.progress_token).cloned();
                    if let Some(flight) = flight {
                        flight.note(
                            note.params.progress,
                            note.params.total,
                            note.params.message.as_deref(),
                        );
                    }
                    Verdict::Drop
                }
                ServerNotification::ToolListChangedNotification(_) => {
                    self.tools_changed.store(true, Ordering::SeqCst);
                    if self.subscribed.load(Ordering::SeqCst) {
                        Verdict::Pass
                    } else {
                        Verdict::Drop
                    }
                }
                ServerNotification::CancelledNotification(_)
                | ServerNotification::SubscriptionsAcknowledgedNotification(_) => Verdict::Pass,
                _ => Verdict::Drop,
            },
        }
    }

    /// The first answer to something that was asked is an answer; others are noise.
    fn answered(&self, id: &RequestId) -> Verdict {
        if self.lock().forget(id) { Verdict::Pass } else { Verdict::Drop }
    }

    fn flight(&self, id: i64) -> Option<Arc<Flight>> {
        let open = self.lock();
        open.requests
            .get(&NumberOrString::Number(id))?
            .as_ref()
            .map(|(_, flight)| Arc::clone(flight))
    }
}

impl Open {
    fn forget(&mut self, id: &RequestId) -> bool {
        let number = match id {
            NumberOrString::String(text) => text.parse().ok().map(NumberOrString::Number),
            NumberOrString::Number(_) => None,
        };
        let found = self.requests.remove(id).or_else(|| self.requests.remove(&number?));
        if let Some(Some((token, _))) = &found {
            self.by_token.remove(token);
        }
        found.is_some()
    }
}

/// A wire, seen by [`Shared`].
struct Tap<T> {
    wire: T,
    shared: Arc<Shared>,
}

impl<T: Transport<RoleClient> + 'static> Transport<RoleClient> for Tap<T> {
    type Error = T::Error;

    fn send(
        &mut self,
        message: TxJsonRpcMessage<RoleClient>,
    ) -> impl Future<Output = Result<(), T::Error>> + Send + 'static {
        self.shared.going_out(&message);
        self.wire.send(message)
    }

    async fn receive(&mut self) -> Option<RxJsonRpcMessage<RoleClient>> {
        loop {
            let closed = self.shared.closed.clone();
            let message = tokio::select! {
                message = self.wire.receive() => message,
                () = closed.cancelled() => None,
            };
            match message.as_ref().map(|message| self.shared.coming_in(message)) {
                Some(Verdict::Pass) => return message,
                Some(Verdict::Drop) => {}
                Some(Verdict::End) | None => {
                    self.shared.closed.cancel();
                    return None;
                }
            }
        }
    }

    async fn close(&mut self) -> Result<(), T::Error> {
        self.shared.closed.cancel();
        self.wire.close().await
    }
}

impl<T> Drop for Tap<T> {
    fn drop(&mut self) {
        self.shared.closed.cancel();
    }
}

/// The pipes of a program: a message is a line.
struct Stdio {
    lines: Lines<ChildStdout>,
    input: Arc<tokio::sync::Mutex<Option<ChildStdin>>>,
    patience: Duration,
    shared: Arc<Shared>,
}

impl Transport<RoleClient> for Stdio {
    type Error = std::io::Error;

    fn send(
        &mut self,
        message: TxJsonRpcMessage<RoleClient>,
    ) -> impl Future<Output = std::io::Result<()>> + Send + 'static {
        let (input, patience, shared) =
            (Arc::clone(&self.input), self.patience, Arc::clone(&self.shared));
        async move {
            let flight = flight_of(&message).map(|(_, flight)| flight);
            let mut line = serde_json::to_vec(&message)?;
            line.push(b'\n');
            let write = async {
                let mut input = input.lock().await;
                let input = input.as_mut().ok_or(std::io::ErrorKind::NotConnected)?;
                if let Some(flight) = flight {
                    if flight.abandoned() {
                        return Ok(());
                    }
                    flight.set_sent(true);
                }
                input.write_all(&line).await?;
                input.flush().await
            };
            let written = tokio::time::timeout(patience, write).await;
            written.unwrap_or_else(|_| {
                // Half a message may be in the pipe: nothing more can be said over it.
                shared.closed.cancel();
                Err(std::io::ErrorKind::TimedOut.into())
            })
        }
    }

    async fn receive(&mut self) -> Option<RxJsonRpcMessage<RoleClient>> {
        loop {
            let id = match self.lines.next().await.ok()?? {
                Line::Whole(line) => match serde_json::from_slice(&line) {
                    Ok(message) => return Some(message),
                    Err(_) => answers(&line).inspect(|id| {
                        if let Some(flight) = self.shared.flight(*id) {
                            flight.set_unreadable();
                        }
                    }),
                },
                Line::Oversized { bytes, answers } => answers.inspect(|id| {
                    if let Some(flight) = self.shared.flight(*id) {
                        flight.set_oversized(bytes);
                    }
                }),
            };
            // Other lines are what programs print that take their standard output for a log.
            if let Some(id) = id {
                let err =
                    ErrorData::new(ErrorCode::PARSE_ERROR, "the answer could not be read", None);
                return Some(ServerJsonRpcMessage::error(err, Some(NumberOrString::Number(id))));
            }
        }
    }

    async fn close(&mut self) -> std::io::Result<()> {
        // One who writes just now is given up on by its own deadline; the pipe goes with the program.
        if let Ok(mut input) = self.input.try_lock() {
            input.take();
        }
        Ok(())
    }
}

/// A few attempts, one after the other.
#[derive(Debug)]
struct Retries;

impl rmcp::transport::common::client_side_sse::SseRetryPolicy for Retries {
    fn retry(&self, times: usize) -> Option<Duration> {
        (times < STREAM_RETRIES)
            .then(|| Duration::from_millis(200) * 2_u32.pow(u32::try_from(times).unwrap_or(0)))
    }
}

/// HTTP, with an eye on what became of each call.
#[derive(Debug, Clone)]
struct Http(reqwest::Client);

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
