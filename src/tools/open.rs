//! Opening a connection: values are read, the program is started or the address called, and the server
//! introduces itself. What fails on the way is told in words that an operator can act on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use secrecy::{ExposeSecret, SecretString};

use super::child::{Process, Program};
use super::error::{ToolError, ToolErrorKind, quoted};
use super::keys::Redactor;
use super::server::Server;
use super::wire::{Connection, Failure, Terms};
use crate::config::tools::{ValueSource, WireConfig};

/// Lists may be longer than results: the limit of one message is at least this.
const MIN_MESSAGE: usize = 4 << 20;
/// What a message has around its result.
const ENVELOPE: usize = 64 << 10;
/// Writing one message may always take so long.
const MIN_WRITE_PATIENCE: Duration = Duration::from_secs(30);

/// An opened connection.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) connection: Connection,
    pub(super) process: Option<Process>,
    pub(super) redactor: Arc<Redactor>,
}

/// Opens a connection to `server`. Dropping this before its end leaves no process.
///
/// # Errors
/// Why there is none, redacted.
pub(super) async fn open(server: &Server) -> Result<Opened, ToolError> {
    let mut redactor = Redactor::default();
    match &server.config.wire {
        WireConfig::Stdio { command, env, cwd } => {
            let env = values(server, "env", env, &mut redactor).await?;
            let redactor = Arc::new(redactor);
            let program = Program {
                server: &server.name,
                command,
                env,
                path: &server.context.path,
                home: server.context.homes.join(&server.name),
                cwd: cwd.as_deref(),
            };
            started(server, program, redactor).await
        }
        WireConfig::Http { url, headers, oauth } => {
            let headers = values(server, "headers", headers, &mut redactor).await?;
            let headers = header_map(server, headers)?;
            let (terms, tasks) = (terms(server), &server.context.tasks);
            let login = oauth.as_ref().map(|_| server.kept_login());
            let opened = Connection::over_http(url, headers, login, &terms, tasks).await;
            let redactor = Arc::new(redactor);
            let connection = opened.map_err(|failure| refused(server, failure, &redactor))?;
            Ok(Opened { connection, process: None, redactor })
        }
    }
}

async fn started(
    server: &Server,
    program: Program<'_>,
    redactor: Arc<Redactor>,
) -> Result<Opened, ToolError> {
    let tasks = &server.context.tasks;
    let (mut process, pipes) = Process::start(program, Arc::clone(&redactor), tasks)
        .await
        .map_err(|problem| unavailable(server, &redactor.text(&problem)))?;
    let terms = terms(server);
    let opened = tokio::select! {
        opened = Connection::over_pipes(pipes, &terms, tasks) => opened,
        _ = process.ended() => Err(Failure::Closed),
    };
    match opened {
        Ok(connection) => Ok(Opened { connection, process: Some(process), redactor }),
        Err(Failure::Closed) => {
            // What it said may still be on its way, and its status tells whether it ran at all.
            let ended = tokio::time::timeout(Duration::from_millis(200), process.ended()).await;
            let status = ended.ok().flatten().map(|status| format!(" ({status})"));
            let said = process.last_words().get();
            let said = if said.is_empty() { said } else { format!(": {said}") };
            let status = status.unwrap_or_default();
            Err(unavailable(server, &format!("it ended before it introduced itself{status}{said}")))
        }
        Err(failure) => Err(refused(server, failure, &redactor)),
    }
}

fn terms(server: &Server) -> Terms {
    let config = &server.config;
    Terms {
        protocol: config.protocol,
        elicitation: config.elicitation,
        message_bytes: config.max_output.max(MIN_MESSAGE) + ENVELOPE,
        write_patience: config.timeout.max(MIN_WRITE_PATIENCE),
        parallel: config.max_parallel,
    }
}

/// Reads what the configuration refers to.
async fn values(
    server: &Server,
    section: &str,
    sources: &BTreeMap<String, ValueSource>,
    redactor: &mut Redactor,
) -> Result<BTreeMap<String, SecretString>, ToolError> {
    let mut found = BTreeMap::new();
    for (name, source) in sources {
        let value = server.context.keys.value(source).await.map_err(|err| {
            let message = format!("the tool server {}: {section}: {name}: {err}", server.name);
            ToolError::new(ToolErrorKind::Misconfigured, message)
        })?;
        redactor.learn(source, &value);
        found.insert(name.clone(), value);
    }
    Ok(found)
}

fn header_map(
    server: &Server,
    values: BTreeMap<String, SecretString>,
) -> Result<HeaderMap, ToolError> {
    let mut headers = HeaderMap::new();
    for (name, value) in values {
        let wrong = |problem: &str| {
            let message = format!("the tool server {}: headers: {name}: {problem}", server.name);
            ToolError::new(ToolErrorKind::Misconfigured, message)
        };
        let header = HeaderName::try_from(name.as_str()).map_err(|_| wrong("no header's name"))?;
        let reserved = ["accept", "mcp-session-id", "mcp-protocol-version", "last-event-id"];
        if reserved.contains(&header.as_str()) {
            return Err(wrong("this header is the protocol's own"));
        }
        let mut value = HeaderValue::from_str(value.expose_secret())
            .map_err(|_| wrong("its value has characters that a header cannot have"))?;
        value.set_sensitive(true);
        headers.insert(header, value);
    }
    Ok(headers)
}

fn unavailable(server: &Server, problem: &str) -> ToolError {
    let message = format!("the tool server {} is not there: {problem}", server.name);
    ToolError::new(ToolErrorKind::Unavailable, message)
}

/// The error of a server that does not introduce itself in time.
pub(super) fn too_slow(server: &Server) -> ToolError {
    let limit = humantime::format_duration(server.config.start_timeout);
    unavailable(server, &format!("it did not introduce itself within {limit} (start_timeout)"))
}

fn refused(server: &Server, failure: Failure, redactor: &Redactor) -> ToolError {
    let problem = match failure {
        Failure::Closed => "the connection broke".to_owned(),
        Failure::SessionGone => "it forgot the session at once".to_owned(),
        Failure::Remote { code, message } => format!("it refused: {message} ({code})"),
        Failure::TooLong(bytes) => format!("its introduction has {bytes} bytes"),
        Failure::Unreachable(problem) | Failure::Http(problem) | Failure::Unreadable(problem) => {
            problem
        }
        Failure::LoginRequired(challenge) => return server.login_required(challenge),
        Failure::Timeout | Failure::Abandoned => return too_slow(server),
    };
    unavailable(server, &quoted(&redactor.text(&problem)))
}
