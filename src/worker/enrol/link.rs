//! The server as a worker calls it: one function for each endpoint, one meaning for each failure.
//!
//! **Invariant:** no redirect is followed and no proxy is used: keys and tokens go where the operator said, or nowhere.
//! **Invariant:** answers are bounded in size and time.

use std::error::Error;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use reqwest::{Method, RequestBuilder, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use url::Url;

use crate::tls::TlsError;
use crate::tls::trust::Trust;
use crate::worker::config::Token;
use crate::worker::node::{
    Bootstrap, CapabilityReport, ConfigAck, Configuration, Heartbeat, HeartbeatAnswer,
    Registration, RenewedAuth, VERSION,
};
use crate::worker::startup::Startup;

/// Bytes of an answer.
const MAX_ANSWER_BYTES: usize = 1 << 20;
/// Characters of a server's reason that are shown.
const MAX_REASON: usize = 300;

/// Why a call had no success.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The token is unknown, expired or revoked; at registration, the key is wrong.
    #[error("the server did not accept it: {0}")]
    Unauthorized(String),
    /// The server understood, and refuses.
    #[error("the server refused it with {status}: {reason}")]
    Refused {
        /// The status.
        status: u16,
        /// What it said.
        reason: String,
    },
    /// No answer, or none that can be used.
    #[error("the server could not be reached: {0}")]
    Unreachable(String),
}

/// A configuration as it came.
#[derive(Debug)]
pub(super) enum Fetched {
    Read(Box<Configuration>),
    /// It cannot be read; of which version it is, where that can.
    Unreadable {
        config_version: Option<String>,
        reason: String,
    },
}

/// No client can be made.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// What the server is recognised by cannot be used.
    #[error("the server could not be recognised by what the startup file names")]
    Trust(#[from] TlsError),
    /// The HTTP library refuses.
    #[error("there is no HTTP client")]
    Client(#[source] reqwest::Error),
}

#[derive(Debug)]
pub(super) struct Link {
    http: RwLock<reqwest::Client>,
    patience: Duration,
}

/// A client that recognises the server by `trust`.
pub(super) fn client(startup: &Startup, trust: Trust) -> Result<reqwest::Client, LinkError> {
    let (connect, _) = startup.server_timeouts();
    let mut builder = reqwest::Client::builder();
    match trust.client_config() {
        // Without TLS nothing has to be recognised.
        Err(TlsError::NoRoots) if startup.orchestrator.url.starts_with("http:") => {}
        config => builder = builder.tls_backend_preconfigured(config?),
    }
    builder
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .connect_timeout(connect)
        .build()
        .map_err(LinkError::Client)
}

impl Link {
    pub(super) fn new(startup: &Startup, http: reqwest::Client) -> Arc<Self> {
        let (_, patience) = startup.server_timeouts();
        Arc::new(Self { http: RwLock::new(http), patience })
    }

    /// Calls with another client from now on.
    pub(super) fn change(&self, http: reqwest::Client) {
        *self.http.write().unwrap_or_else(PoisonError::into_inner) = http;
    }

    /// Shows the key; with the token that the worker had before, which proves that the slug is its own.
    pub(super) async fn register(
        &self,
        url: &str,
        psk: Token,
        capability: CapabilityReport,
        known_by: Option<&Token>,
    ) -> Result<Bootstrap, CallError> {
        let mut request = self.request(Method::POST, url);
        if let Some(token) = known_by {
            request = request.bearer_auth(token.expose());
        }
        let body = Registration { version: VERSION, psk, capability };
        let bootstrap: Bootstrap = read(&self.send(request.json(&body), self.patience).await?.1)?;
        supported(bootstrap.version)?;
        Ok(bootstrap)
    }

    /// The configuration; with `after`, one that is newer, for which the server may wait.
    pub(super) async fn configuration(
        &self,
        url: &str,
        token: &Token,
        after: Option<(&str, Duration)>,
    ) -> Result<Option<Fetched>, CallError> {
        let mut url = Url::parse(url).map_err(|err| CallError::Unreachable(err.to_string()))?;
        let mut patience = self.patience;
        if let Some((version, wait)) = after {
            let wait = wait.as_secs().clamp(1, 60);
            url.query_pairs_mut()
                .append_pair("after", version)
                .append_pair("wait", &wait.to_string());
            patience += Duration::from_secs(wait);
        }
        let request = self.request(Method::GET, url.as_str()).bearer_auth(token.expose());
        let (status, body) = self.send(request, patience).await?;
        if status == StatusCode::NO_CONTENT {
            return Ok(None);
        }
        Ok(Some(match serde_json::from_slice::<Configuration>(&body) {
            Ok(configuration) => Fetched::Read(Box::new(configuration)),
            Err(err) => unreadable(&body, &err),
        }))
    }

    pub(super) async fn acknowledge(
        &self,
        url: &str,
        token: &Token,
        ack: &ConfigAck,
    ) -> Result<(), CallError> {
        let request = self.request(Method::POST, url).bearer_auth(token.expose()).json(ack);
        self.send(request, self.patience).await.map(drop)
    }

    pub(super) async fn report(
        &self,
        url: &str,
        token: &Token,
        report: &CapabilityReport,
    ) -> Result<(), CallError> {
        let request = self.request(Method::POST, url).bearer_auth(token.expose()).json(report);
        self.send(request, self.patience).await.map(drop)
    }

    pub(super) async fn heartbeat(
        &self,
        url: &str,
        token: &Token,
        heartbeat: &Heartbeat,
    ) -> Result<HeartbeatAnswer, CallError> {
        let request = self.request(Method::POST, url).bearer_auth(token.expose()).json(heartbeat);
        read(&self.send(request, self.patience).await?.1)
    }

    pub(super) async fn renew(&self, url: &str, token: &Token) -> Result<RenewedAuth, CallError> {
        let request = self.request(Method::POST, url).bearer_auth(token.expose());
        let renewed: RenewedAuth = read(&self.send(request, self.patience).await?.1)?;
        supported(renewed.version)?;
        Ok(renewed)
    }

    pub(super) async fn unregister(&self, url: &str, token: &Token) -> Result<(), CallError> {
        let request = self.request(Method::DELETE, url).bearer_auth(token.expose());
        self.send(request, self.patience).await.map(drop)
    }

    fn request(&self, method: Method, url: &str) -> RequestBuilder {
        self.http.read().unwrap_or_else(PoisonError::into_inner).request(method, url)
    }

    async fn send(
        &self,
        request: RequestBuilder,
        patience: Duration,
    ) -> Result<(StatusCode, Vec<u8>), CallError> {
        let mut response = request.timeout(patience).send().await.map_err(|err| transport(&err))?;
        let status = response.status();
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|err| transport(&err))? {
            if body.len() + chunk.len() > MAX_ANSWER_BYTES {
                let reason = format!("its answer is over {MAX_ANSWER_BYTES} bytes");
                return Err(CallError::Unreachable(reason));
            }
            body.extend_from_slice(&chunk);
        }
        if status.is_success() {
            return Ok((status, body));
        }
        let reason = reason(&body);
        Err(match status {
            StatusCode::UNAUTHORIZED => CallError::Unauthorized(reason),
            status if status.is_client_error() && !later(status) => {
                CallError::Refused { status: status.as_u16(), reason }
            }
            status => CallError::Unreachable(format!("it answered {}: {reason}", status.as_u16())),
        })
    }
}

/// Statuses that say nothing about the request itself.
fn later(status: StatusCode) -> bool {
    matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS)
}

fn transport(err: &reqwest::Error) -> CallError {
    // The library's own message is of little use without its causes; the URL holds no secret.
    let mut reason = err.to_string();
    let mut cause = err.source();
    while let Some(next) = cause {
        reason = format!("{reason}: {next}");
        cause = next.source();
    }
    CallError::Unreachable(reason.chars().take(MAX_REASON).collect())
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, CallError> {
    serde_json::from_slice(body).map_err(|err| {
        CallError::Unreachable(format!("its answer cannot be read: {}", place(&err)))
    })
}

/// Where JSON is wrong, without what stands there, which may be a token.
fn place(err: &serde_json::Error) -> String {
    format!("line {}, column {}", err.line(), err.column())
}

fn supported(version: u32) -> Result<(), CallError> {
    if version == VERSION {
        return Ok(());
    }
    let reason = format!("it answers in version {version}, and this worker speaks {VERSION}");
    Err(CallError::Unreachable(reason))
}

fn unreadable(body: &[u8], err: &serde_json::Error) -> Fetched {
    #[derive(Deserialize)]
    struct Named {
        config_version: Option<String>,
    }
    let named = serde_json::from_slice::<Named>(body).ok();
    let config_version = named.and_then(|named| named.config_version);
    // serde names the field; a value could be a token.
    let message = err.to_string();
    let named = message.starts_with("missing field");
    let reason = if named { message } else { format!("it is wrong at {}", place(err)) };
    Fetched::Unreadable { config_version, reason }
}

/// What an error's body says: its `detail`, made harmless for a log.
fn reason(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Problem {
        detail: Option<serde_json::Value>,
    }
    let detail = serde_json::from_slice::<Problem>(body).ok().and_then(|problem| problem.detail);
    let detail = match detail {
        Some(serde_json::Value::String(text)) => text,
        Some(other) => other.to_string(),
        None => "it gave no reason".to_owned(),
    };
    detail.chars().filter(|c| !c.is_control()).take(MAX_REASON).collect()
}
