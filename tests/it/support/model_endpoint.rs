//! An OpenAI-compatible endpoint that does what a test tells it to, on a real socket.
//!
//! It speaks HTTP by hand, so that it can break every rule of it. Each request takes the next script of
//! its queue; when none is left, the endpoint answers `ok` like a good one. All calls are kept.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// One thing that an answer does.
#[derive(Debug, Clone)]
pub enum Step {
    /// Writes bytes.
    Send(Vec<u8>),
    /// Waits.
    Wait(Duration),
    /// Does nothing more, and keeps the connection open.
    Hang,
    /// Resets the connection, in place of ending it.
    Reset,
}

/// What one request gets. The connection is closed after it, unless its head says how long it is and does
/// not say `connection: close`.
#[derive(Debug, Clone, Default)]
pub struct Script(pub Vec<Step>);

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Call {
    pub method: String,
    pub path: String,
    pub headers: BTreeMap<String, String>,
    pub body: Value,
}

impl Call {
    /// Whether a stream was asked for.
    pub fn streamed(&self) -> bool {
        self.body["stream"] == true
    }
}

#[derive(Default)]
struct State {
    scripts: VecDeque<Script>,
    calls: Vec<Call>,
    connections: usize,
    open: usize,
    most_open: usize,
}

/// The endpoint. Dropping it ends it.
pub struct ModelEndpoint {
    /// `http://127.0.0.1:PORT/v1`.
    pub url: String,
    state: Arc<Mutex<State>>,
    _server: JoinSet<()>,
}

impl ModelEndpoint {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let state = Arc::<Mutex<State>>::default();
        let mut server = JoinSet::new();
        let shared = Arc::clone(&state);
        server.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                connections.spawn(serve(socket, Arc::clone(&shared)));
                while connections.try_join_next().is_some() {}
            }
        });
        Self { url, state, _server: server }
    }

    /// What the next requests get, one script each.
    pub fn plays(&self, scripts: impl IntoIterator<Item = Script>) {
        self.state.lock().unwrap().scripts.extend(scripts);
    }

    /// All requests so far.
    pub fn calls(&self) -> Vec<Call> {
        self.state.lock().unwrap().calls.clone()
    }

    /// How many requests came with each idempotency key; those without one under an empty text.
    pub fn calls_by_key(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for call in self.calls() {
            let key = call.headers.get("idempotency-key").cloned().unwrap_or_default();
            *counts.entry(key).or_default() += 1;
        }
        counts
    }

    /// How many connections were opened.
    pub fn connections(&self) -> usize {
        self.state.lock().unwrap().connections
    }

    /// How many requests were under way at once, at most.
    pub fn most_open(&self) -> usize {
        self.state.lock().unwrap().most_open
    }
}

async fn serve(mut socket: TcpStream, state: Arc<Mutex<State>>) {
    state.lock().unwrap().connections += 1;
    while let Some(call) = read_request(&mut socket).await {
        let script = {
            let mut state = state.lock().unwrap();
            state.calls.push(call.clone());
            state.open += 1;
            state.most_open = state.most_open.max(state.open);
            state.scripts.pop_front()
        };
        let script = script.unwrap_or_else(|| usual(&call));
        let stays = play(&mut socket, script).await;
        state.lock().unwrap().open -= 1;
        if !stays {
            break;
        }
    }
}

/// Plays a script; true when another request may follow on the same connection.
async fn play(socket: &mut TcpStream, script: Script) -> bool {
    let mut stays = script.0.first().is_some_and(|first| match first {
        Step::Send(head) => {
            let head = String::from_utf8_lossy(head);
            !head.contains("connection: close") && head.contains("transfer-encoding: chunked")
        }
        _ => false,
    });
    for step in script.0 {
        match step {
            Step::Send(bytes) => stays &= socket.write_all(&bytes).await.is_ok(),
            Step::Wait(time) => tokio::time::sleep(time).await,
            Step::Hang => {
                // Until the other side goes away.
                let _ = socket.read(&mut [0; 64]).await;
                return false;
            }
            Step::Reset => {
                socket.set_zero_linger().unwrap();
                return false;
            }
        }
    }
    let _ = socket.flush().await;
    stays
}

async fn read_request(socket: &mut TcpStream) -> Option<Call> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break at;
        }
        if socket.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let mut lines = head.split("\r\n");
    let mut start = lines.next()?.split(' ');
    let (method, path) = (start.next()?.to_owned(), start.next()?.to_owned());
    let headers: BTreeMap<String, String> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
    while bytes.len() < end + 4 + length {
        if socket.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
    let body = serde_json::from_slice(&bytes[end + 4..]).unwrap_or(Value::Null);
    Some(Call { method, path, headers, body })
}

/// What a good endpoint says.
fn usual(call: &Call) -> Script {
    if call.path.ends_with("/models") {
        return Script::json(json!({"object": "list", "data": [{"id": "m", "object": "model"}]}));
    }
    if call.path.ends_with("/embeddings") {
        let texts = call.body["input"].as_array().unwrap();
        let vectors = texts.iter().enumerate().map(|(at, text)| {
            let length = text.as_str().unwrap().len();
            json!({"index": at, "embedding": [length, 0.5], "object": "embedding"})
        });
        let data: Vec<Value> = vectors.rev().collect();
        return Script::json(json!({"object": "list", "model": "e", "data": data,
            "usage": {"prompt_tokens": texts.len(), "total_tokens": texts.len()}}));
    }
    if call.streamed() { Script::text(&["o", "k"]) } else { Script::whole("ok") }
}

/// The head of an answer whose end is the end of the connection.
pub fn head(status: &str, more: &str) -> String {
    format!("HTTP/1.1 {status}\r\nconnection: close\r\n{more}\r\n")
}

/// One event with a piece of an answer.
pub fn event(delta: Value) -> String {
    let chunk = json!({"id": "c-1", "object": "chat.completion.chunk", "model": "m-served",
        "choices": [{"index": 0, "delta": delta, "finish_reason": null}]});
    format!("data: {chunk}\n\n")
}

/// The events that end an answer: why it stopped, the usage, and the announcement.
pub fn ending(reason: &str) -> String {
    let stop =
        json!({"id": "c-1", "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]});
    let usage = json!({"id": "c-1", "choices": [], "usage":
        {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}});
    format!("data: {stop}\n\ndata: {usage}\n\ndata: [DONE]\n\n")
}

impl Script {
    /// Bytes after the head of a stream.
    pub fn stream(body: impl AsRef<[u8]>) -> Self {
        Self::default().then(head("200 OK", "content-type: text/event-stream\r\n")).then(body)
    }

    /// A good stream with these pieces of text.
    pub fn text(pieces: &[&str]) -> Self {
        let events: String = pieces.iter().map(|piece| event(json!({"content": piece}))).collect();
        Self::stream(format!("{}{events}{}", event(json!({"role": "assistant"})), ending("stop")))
    }

    /// The bytes as chunks of this size, on a connection that stays open.
    pub fn chunked(body: &[u8], size: usize) -> Self {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        let mut script = Self::default().then(head);
        for part in body.chunks(size) {
            script =
                script.then([format!("{:x}\r\n", part.len()).as_bytes(), part, b"\r\n"].concat());
        }
        // The end of the body comes a little later than the end of what is in it.
        script.wait(Duration::from_millis(5)).then("0\r\n\r\n")
    }

    /// A good stream that comes slowly.
    pub fn slowly(pieces: &[&str], gap: Duration) -> Self {
        let mut script = Self::stream("");
        for piece in pieces {
            script = script.then(event(json!({"content": piece}))).wait(gap);
        }
        script.then(ending("stop"))
    }

    /// A good answer that is no stream.
    pub fn whole(text: &str) -> Self {
        Self::json(
            json!({"id": "c-1", "object": "chat.completion", "model": "m-served", "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}}),
        )
    }

    /// 200 with this JSON.
    pub fn json(body: Value) -> Self {
        Self::status("200 OK", "", body)
    }

    /// A status with headers (each ended by CR LF) and a JSON body.
    pub fn status(status: &str, headers: &str, body: Value) -> Self {
        let body = body.to_string();
        let length = body.len();
        let more =
            format!("content-type: application/json\r\ncontent-length: {length}\r\n{headers}");
        Self::default().then(head(status, &more)).then(body)
    }

    /// An error as endpoints write it.
    pub fn error(status: &str, message: &str) -> Self {
        Self::status(status, "", json!({"error": {"message": message, "type": null, "code": null}}))
    }

    pub fn then(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.0.push(Step::Send(bytes.as_ref().to_vec()));
        self
    }

    pub fn wait(mut self, time: Duration) -> Self {
        self.0.push(Step::Wait(time));
        self
    }

    pub fn hang(mut self) -> Self {
        self.0.push(Step::Hang);
        self
    }

    pub fn reset(mut self) -> Self {
        self.0.push(Step::Reset);
        self
    }
}
