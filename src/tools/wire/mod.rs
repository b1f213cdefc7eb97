//! The protocol: one connection to one server, over its pipes or over HTTP.
//!
//! This folder is the only place that knows the library which speaks MCP.
//!
//! Between the library and each wire stands a [`Tap`]. It sees every message as it passes: it knows which
//! calls were sent, passes notes of progress on, notices that the list of tools changed, and lets through
//! only what the library must see, so that a server which floods, repeats itself or answers what nobody
//! asked does not get any further.
//!
//! **Invariant:** what a server can make this process keep is bounded: one line or event, and a few
//! questions of its own.

mod asked;
mod http;
pub(super) mod login;
mod pipes;
mod tap;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use reqwest::header::HeaderMap;
use rmcp::model::{
    CallToolRequest, CallToolRequestParams, ClientRequest, ErrorData, JsonObject, ListToolsRequest,
    MetaObject, PaginatedRequestParams, ProtocolVersion, RequestMetaObject, SubscriptionFilter,
};
use rmcp::service::{
    ClientInitializeError, ClientLifecycleMode, PeerRequestOptions, RoleClient, RunningService,
    ServiceError, serve_client_with_lifecycle_and_ct,
};
use rmcp::transport::{AuthClient, Transport};
use serde_json::Value;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::child;
use super::progress::Flight;
use super::questions::Round;
use crate::config::tools::{Elicitation, Protocol};
use asked::Us;
use pipes::Pipe;
use tap::{Shared, Tap};

/// How long telling the server that nobody waits any more may take.
const CANCEL_PATIENCE: Duration = Duration::from_secs(1);
const IDEMPOTENCY_KEY: &str = "cynai/idempotency-key";

/// Why a request got no result.
#[derive(Debug, PartialEq)]
pub(super) enum Failure {
    /// The connection ended.
    Closed,
    /// The server has forgotten the session; the request was not looked at.
    SessionGone,
    /// The server cannot be reached, or not with these credentials; the request was not looked at.
    Unreachable(String),
    /// The server wants a login, or one that may do more; with its own words for programs, when it has any.
    LoginRequired(Option<String>),
    /// HTTP failed for this request; with what is known of why.
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
    /// What the server is told when it asks for a form to be filled in.
    pub(super) elicitation: Elicitation,
    /// Bytes of one message.
    pub(super) message_bytes: usize,
    /// How long writing one message may take.
    pub(super) write_patience: Duration,
    /// Requests that are under way at once.
    pub(super) parallel: usize,
}

/// A call as it is sent.
#[derive(Debug)]
pub(super) struct Sending {
    pub(super) tool: String,
    pub(super) arguments: JsonObject,
    /// What the server asked back before.
    pub(super) round: Round,
    /// The idempotency key.
    pub(super) key: Option<String>,
}

/// A connection whose server has introduced itself. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Connection {
    service: RunningService<RoleClient, Us>,
    shared: Arc<Shared>,
    /// The version that is spoken.
    pub(super) protocol: String,
    /// Name and version of the server, as it says.
    pub(super) name: Option<String>,
}

impl Connection {
    /// Over the pipes of a started program.
    pub(super) async fn over_pipes(
        pipes: child::Pipes,
        terms: &Terms,
        tasks: &TaskTracker,
    ) -> Result<Self, Failure> {
        let shared = Arc::new(Shared::default());
        let wire = Pipe::new(pipes, terms, Arc::clone(&shared));
        Self::begin(Tap { wire, shared }, terms, tasks).await
    }

    /// Over HTTP.
    pub(super) async fn over_http(
        url: &url::Url,
        headers: HeaderMap,
        login: Option<login::Kept>,
        terms: &Terms,
        tasks: &TaskTracker,
    ) -> Result<Self, Failure> {
        let http = http::Http::new()?;
        let shared = Arc::new(Shared::default());
        match login {
            None => {
                let wire = http::connect(http, url, headers, terms);
                Self::begin(Tap { wire, shared }, terms, tasks).await
            }
            Some(kept) => {
                let http = AuthClient::new(http, login::resumed(url, kept).await?);
                let wire = http::connect(http, url, headers, terms);
                Self::begin(Tap { wire, shared }, terms, tasks).await
            }
        }
    }

    async fn begin<T>(tap: Tap<T>, terms: &Terms, tasks: &TaskTracker) -> Result<Self, Failure>
    where
        T: Transport<RoleClient> + 'static,
    {
        let shared = Arc::clone(&tap.shared);
        let us = Us::new(terms.elicitation);
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
        call: Sending,
        flight: Arc<Flight>,
        deadline: Instant,
        gone: impl Future<Output = ()> + Send,
    ) -> Result<Value, Failure> {
        let Sending { tool, arguments, round, key } = call;
        let mut params = CallToolRequestParams::new(tool).with_arguments(arguments);
        params.input_responses = Some(round.responses).filter(|responses| !responses.is_empty());
        params.request_state = round.state;
        let request = ClientRequest::CallToolRequest(CallToolRequest::new(params));
        self.request(request, key.as_deref(), flight, deadline, gone).await
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
        ClientInitializeError::TransportError { error, .. } => http::failure(&*error.error),
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
        ServiceError::TransportSend(err) => http::failure(&*err.error),
        ServiceError::Timeout { .. } => Failure::Timeout,
        ServiceError::UnexpectedResponse => {
            Failure::Unreadable("its answer is to another question".to_owned())
        }
        _ => Failure::Closed,
    }
}
