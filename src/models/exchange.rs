//! One HTTP exchange with an endpoint, through the client library.
//!
//! The library builds requests and reads events; what it is given to read was judged here first. Its own
//! transport would retry by itself, hold a whole answer of any length, quote answers in its log, and take
//! its key from the environment. So it gets a service of ours instead ([`Wire::open`]), whose answers are
//! bounded and well-formed, and its errors are never shown: the [`Failure`] that was noted is.
//!
//! **Invariant:** a key is in this file for one exchange only, in headers that are marked as sensitive.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_openai::Client;
use async_openai::config::Config;
use async_openai::error::OpenAIError;
use async_openai::middleware::HttpRequestFactory;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use tokio::time::timeout;

use super::endpoint::Endpoint;
use super::failure::{Failure, FailureKind};
use super::frames::{Frames, too_large};
use super::keys::Keys;
use super::redact::Redactor;
use super::refusal;
use crate::clock::Clock;
use crate::config::models::{HeaderSource, Size};

/// Of an error's body.
const MAX_ERROR_BYTES: usize = 64 << 10;
/// For an error's body: the status has said enough.
const ERROR_PATIENCE: Duration = Duration::from_secs(5);
/// For what follows the announced end of a stream.
const LAST_CHUNK: Duration = Duration::from_millis(20);

/// What was seen of an answer.
#[derive(Debug, Default)]
pub(super) struct Seen {
    failure: Option<Failure>,
    /// The stream's end was announced.
    pub done: bool,
    /// A stream was asked for, and a whole answer came.
    pub whole: bool,
}

pub(super) type Noted = Arc<Mutex<Seen>>;

/// The client library, set up for one exchange.
pub(super) struct Wire {
    pub client: Client<Address>,
    noted: Noted,
    pub redactor: Arc<Redactor>,
}

/// Where a call goes, and with which headers.
#[derive(Clone)]
pub(super) struct Address {
    base: String,
    query: Vec<(String, String)>,
    headers: HeaderMap,
    /// Always empty: the library wants to lend one, and nothing asks for it.
    no_key: SecretString,
}

impl Config for Address {
    fn headers(&self) -> HeaderMap {
        self.headers.clone()
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    fn query(&self) -> Vec<(&str, &str)> {
        self.query.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
    }

    fn api_base(&self) -> &str {
        &self.base
    }

    fn api_key(&self) -> &SecretString {
        &self.no_key
    }
}

impl Wire {
    /// Fetches the keys, and sets the library up.
    pub(super) async fn open(
        endpoint: &Endpoint,
        keys: &dyn Keys,
        clock: Arc<dyn Clock>,
        idempotency_key: Option<&str>,
        stream: bool,
    ) -> Result<Self, Failure> {
        let mut redactor = Redactor::default();
        let mut headers = headers(endpoint, keys, &mut redactor).await?;
        if let Some(key) = idempotency_key {
            let value = header("the idempotency key", key, false)?;
            headers.insert(HeaderName::from_static("idempotency-key"), value);
        }
        let address = address(endpoint, headers, &mut redactor);
        let noted = Noted::default();
        let guard = Guard {
            http: endpoint.http.clone(),
            redactor: Arc::new(redactor),
            noted: Arc::clone(&noted),
            clock,
            most: endpoint.config.max_answer,
            idle: endpoint.config.timeouts.idle,
            stream,
        };
        let redactor = Arc::clone(&guard.redactor);
        let service = tower::service_fn(move |request: HttpRequestFactory| {
            let guard = guard.clone();
            async move { guard.answer(request).await.map_err(|failure| guard.note(failure)) }
        });
        let client = Client::build(endpoint.http.clone(), address).with_http_service(service);
        Ok(Self { client, noted, redactor })
    }

    /// What the library's error stands for.
    pub(super) fn failure(&self, err: &OpenAIError) -> Failure {
        if let Some(failure) = self.seen(|seen| seen.failure.take()) {
            return failure;
        }
        // All that can go wrong was noted; this is for what a later version of the library may add.
        let (kind, what) = match err {
            OpenAIError::JSONDeserialize(..) => {
                (FailureKind::Malformed, "an answer of other types")
            }
            OpenAIError::InvalidArgument(_) => {
                (FailureKind::BadRequest, "the request cannot be built")
            }
            _ => (FailureKind::Cut, "the answer broke off"),
        };
        Failure::new(kind, what)
    }

    /// A failure that was noted without the library having told of one yet.
    pub(super) fn noted(&self) -> Option<Failure> {
        self.seen(|seen| seen.failure.take())
    }

    pub(super) fn seen<T>(&self, look: impl FnOnce(&mut Seen) -> T) -> T {
        look(&mut self.noted.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn address(endpoint: &Endpoint, headers: HeaderMap, redactor: &mut Redactor) -> Address {
    let mut url = endpoint.config.url.expose().clone();
    hide_user(&url, redactor);
    let query: Vec<(String, String)> = url.query_pairs().into_owned().collect();
    for (_, value) in &query {
        redactor.hide(value.as_str().into());
    }
    url.set_query(None);
    let base = url.as_str().trim_end_matches('/').to_owned();
    Address { base, query, headers, no_key: SecretString::default() }
}

/// User and password in all forms in which an endpoint may quote them: as in the URL, as they are meant,
/// and as they are sent.
fn hide_user(url: &url::Url, redactor: &mut Redactor) {
    let (user, password) = (url.username(), url.password().unwrap_or_default());
    if user.is_empty() && password.is_empty() {
        return;
    }
    let meant = |text: &str| {
        // As in a form, but where these two are only themselves.
        let field = format!("x={}", text.replace('+', "%2B").replace('&', "%26"));
        let mut fields = url::form_urlencoded::parse(field.as_bytes());
        fields.next().map_or_else(String::new, |(_, text)| text.into_owned())
    };
    let sent = STANDARD.encode(format!("{}:{}", meant(user), meant(password)));
    let forms = [sent, meant(user), meant(password), user.to_owned(), password.to_owned()];
    forms.into_iter().for_each(|form| redactor.hide(form.into()));
}

async fn headers(
    endpoint: &Endpoint,
    keys: &dyn Keys,
    redactor: &mut Redactor,
) -> Result<HeaderMap, Failure> {
    let no_key = |err: super::keys::KeyError| Failure::new(FailureKind::NoKey, err.to_string());
    let mut headers = HeaderMap::new();
    for (name, source) in &endpoint.config.headers {
        let value = match source {
            HeaderSource::Text(text) => SecretString::from(text.as_str()),
            HeaderSource::Kept(source) => keys.key(source).await.map_err(no_key)?,
        };
        let what = format!("the value of the header {name}");
        let sent = header(&what, value.expose_secret(), true)?;
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| {
            Failure::new(FailureKind::NoKey, format!("{name:?} is not a header's name"))
        })?;
        headers.insert(name, sent);
        // `Bearer KEY` may be quoted as KEY.
        if let Some((_, bare)) = value.expose_secret().rsplit_once(' ') {
            redactor.hide(bare.into());
        }
        redactor.hide(value);
    }
    if let Some(source) = &endpoint.config.key {
        let key = keys.key(source).await.map_err(no_key)?;
        let bearer = SecretString::from(format!("Bearer {}", key.expose_secret()));
        let sent = header(&source.to_string(), bearer.expose_secret(), true)?;
        headers.insert(AUTHORIZATION, sent);
        redactor.hide(key);
    }
    Ok(headers)
}

fn header(what: &str, value: &str, sensitive: bool) -> Result<HeaderValue, Failure> {
    let mut value = HeaderValue::from_str(value).map_err(|_| {
        let message = format!(
            "{what} has characters that a header cannot carry; is there a line break at its end?"
        );
        Failure::new(FailureKind::NoKey, message)
    })?;
    value.set_sensitive(sensitive);
    Ok(value)
}

/// Stands between the library and the network.
#[derive(Clone)]
struct Guard {
    http: reqwest::Client,
    redactor: Arc<Redactor>,
    noted: Noted,
    clock: Arc<dyn Clock>,
    most: Size,
    idle: Duration,
    stream: bool,
}

impl Guard {
    fn note(&self, failure: Failure) -> OpenAIError {
        note(&self.noted, failure.clone());
        OpenAIError::Boxed(Box::new(failure))
    }

    async fn answer(&self, request: HttpRequestFactory) -> Result<reqwest::Response, Failure> {
        let request = request
            .build()
            .await
            .map_err(|_| Failure::new(FailureKind::BadRequest, "the request cannot be built"))?;
        let response = self.http.execute(request).await.map_err(|err| self.transport(err))?;
        let status = response.status();
        if !status.is_success() {
            let wait = super::backoff::retry_after(response.headers(), self.clock.now());
            let body = error_body(response).await;
            let mut failure = refusal::of_status(status.as_u16(), &body, &self.redactor);
            failure.retry_after = wait;
            return Err(failure);
        }
        let kind = response.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        let kind = kind.unwrap_or_default().to_ascii_lowercase();
        if kind.contains("html") {
            let message = "the endpoint answered with a web page; is its `url` right?";
            return Err(Failure::new(FailureKind::Malformed, message));
        }
        if self.stream && !kind.contains("json") {
            return Ok(rebuilt(reqwest::Body::wrap_stream(self.events(response))));
        }
        let body = self.whole(response).await?;
        if !self.stream {
            return Ok(rebuilt(body.into()));
        }
        // It has its own idea of a stream: one event with everything.
        note_whole(&self.noted);
        let line: Vec<u8> =
            body.iter().map(|b| if matches!(b, b'\n' | b'\r') { b' ' } else { *b }).collect();
        Ok(rebuilt([b"data: ", line.as_slice(), b"\n\ndata: [DONE]\n\n"].concat().into()))
    }

    /// A whole answer, bounded, and JSON.
    async fn whole(&self, mut response: reqwest::Response) -> Result<Bytes, Failure> {
        let mut body = Vec::new();
        loop {
            let chunk = match timeout(self.idle, response.chunk()).await {
                Ok(chunk) => chunk.map_err(|err| self.transport(err))?,
                Err(_) => return Err(idle(self.idle)),
            };
            let Some(chunk) = chunk else { break };
            if body.len() + chunk.len() > self.most.0 {
                return Err(too_large(self.most));
            }
            body.extend_from_slice(&chunk);
        }
        let malformed = |what: String| Failure::new(FailureKind::Malformed, what);
        let text = std::str::from_utf8(&body)
            .map_err(|_| malformed("the answer is not valid UTF-8".to_owned()))?;
        serde_json::from_str::<Value>(text)
            .map_err(|err| malformed(format!("the answer is no JSON: {err}")))?;
        Ok(body.into())
    }

    /// The events of a stream as they become whole. A failure is noted, and ends it.
    fn events(
        &self,
        response: reqwest::Response,
    ) -> impl futures::Stream<Item = Result<Bytes, std::io::Error>> + Send + 'static {
        let reading =
            Reading { guard: self.clone(), response, frames: Frames::new(self.most), ended: None };
        futures::stream::try_unfold(reading, |mut reading| async move {
            match reading.next().await {
                Ok(Some(events)) => Ok(Some((Bytes::from(events), reading))),
                Ok(None) => Ok(None),
                Err(failure) => {
                    note(&reading.guard.noted, failure);
                    Err(std::io::Error::other("the stream broke off"))
                }
            }
        })
    }

    fn transport(&self, err: reqwest::Error) -> Failure {
        let kind = match (err.is_connect(), err.is_timeout()) {
            (true, true) => FailureKind::TimeoutConnect,
            (true, false) => FailureKind::Connect,
            (false, _) if err.is_builder() => FailureKind::BadRequest,
            (false, _) => FailureKind::Cut,
        };
        // Without the URL: it may hold a password.
        let err = err.without_url();
        let mut message = err.to_string();
        let mut source = std::error::Error::source(&err);
        while let Some(cause) = source {
            message = format!("{message}: {cause}");
            source = cause.source();
        }
        Failure::new(kind, self.redactor.clean(&message))
    }
}

struct Reading {
    guard: Guard,
    response: reqwest::Response,
    frames: Frames,
    /// Why it ended, to be told after what came before.
    ended: Option<Result<(), Failure>>,
}

impl Reading {
    async fn next(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        let mut events = Vec::new();
        while events.is_empty() {
            if let Some(ended) = self.ended.take() {
                return ended.map(|()| None);
            }
            let fed = match self.response.chunk().await {
                Ok(Some(chunk)) => self.frames.feed(&chunk, &mut events),
                Ok(None) => {
                    self.ended = Some(Ok(()));
                    self.frames.finish(&mut events)
                }
                Err(err) => Err(self.guard.transport(err)),
            };
            if let Err(failure) = fed {
                self.ended = Some(Err(failure));
            }
            if self.frames.done() {
                self.ended = Some(Ok(()));
                // The last chunk, so that the connection can be used again; it is there already.
                let _ = timeout(LAST_CHUNK, self.response.chunk()).await;
                self.guard.noted.lock().unwrap_or_else(PoisonError::into_inner).done = true;
            }
        }
        Ok(Some(events))
    }
}

fn note(noted: &Noted, failure: Failure) {
    let mut seen = noted.lock().unwrap_or_else(PoisonError::into_inner);
    seen.failure.get_or_insert(failure);
}

fn note_whole(noted: &Noted) {
    noted.lock().unwrap_or_else(PoisonError::into_inner).whole = true;
}

pub(super) fn idle(patience: Duration) -> Failure {
    let patience = humantime::format_duration(patience);
    let message = format!("nothing came for {patience}, the endpoint's `idle` timeout");
    Failure::new(FailureKind::TimeoutIdle, message)
}

/// A response that the library takes for the endpoint's.
fn rebuilt(body: reqwest::Body) -> reqwest::Response {
    hyper::Response::new(body).into()
}

/// As much of an error's body as comes in a short time.
async fn error_body(mut response: reqwest::Response) -> Vec<u8> {
    let mut body = Vec::new();
    let reading = async {
        while let Ok(Some(chunk)) = response.chunk().await {
            let room = MAX_ERROR_BYTES - body.len();
            body.extend_from_slice(&chunk[..chunk.len().min(room)]);
            if body.len() == MAX_ERROR_BYTES {
                break;
            }
        }
    };
    // What came before the time was up is enough.
    let _ = timeout(ERROR_PATIENCE, reading).await;
    body
}
