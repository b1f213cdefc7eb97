//! One call: checked before it is sent, followed until it is answered, checked again.
//!
//! The call itself runs as a task. Whoever asked may leave at any time; the task then tells the server that
//! nobody waits any more, instead of leaving the request to itself.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::Instant;

use super::child::LastWords;
use super::definition::DefinitionHash;
use super::error::{Outcome, ToolError, ToolErrorKind, quoted};
use super::listing::Tool;
use super::progress::{Flight, ProgressSink};
use super::questions::{self, Round};
use super::result::{Answer, ToolResult};
use super::schema::check_in_time;
use super::server::{InUse, Server};
use super::wire::{Failure, Sending};

/// Bytes of JSON of a call's arguments.
const MAX_ARGUMENTS: usize = 4 << 20;
/// The longest time that a call may ask for.
const MAX_TIMEOUT: Duration = Duration::from_secs(86_400);
/// The longest idempotency key, in bytes.
const MAX_KEY: usize = 256;
/// How often a server may ask something back before it answers a call.
const MAX_ROUNDS: usize = 8;

/// A tool to call.
#[derive(Debug, Clone)]
pub struct ToolCall {
    /// The server's name in the configuration.
    pub server: String,
    /// The tool's name on that server.
    pub tool: String,
    /// Its arguments.
    pub arguments: Map<String, Value>,
    /// The same for every attempt at the same thing, so that the server can tell.
    pub idempotency_key: Option<String>,
    /// How long it may take once it is sent; what the configuration says when absent.
    pub timeout: Option<Duration>,
    /// The definition that the caller relies on: a tool that is another by now is not called.
    pub pin: Option<DefinitionHash>,
}

impl Server {
    /// Calls a tool of this server.
    pub(super) async fn call(
        self: &Arc<Self>,
        call: ToolCall,
        sink: Option<ProgressSink>,
    ) -> Result<ToolResult, ToolError> {
        self.check(&call)?;
        let mut rounds = 0;
        let result = self.rounds(&call, sink, &mut rounds).await;
        result.map_err(|err| match err.outcome {
            // The server has seen the call, and only its answers to what it asked back are missing.
            Outcome::NotSent if rounds > 0 => err.with_outcome(Outcome::Unknown),
            _ => err,
        })
    }

    /// Sends a call, and again with answers as often as the server asks something back.
    async fn rounds(
        self: &Arc<Self>,
        call: &ToolCall,
        sink: Option<ProgressSink>,
        rounds: &mut usize,
    ) -> Result<ToolResult, ToolError> {
        let timeout = call.timeout.unwrap_or(self.config.timeout).min(MAX_TIMEOUT);
        let mut permit = self.permit(timeout).await?;
        let mut second = false;
        let (mut round, mut deadline) = (Round::default(), None);
        loop {
            let live = self.in_use().await?;
            let tool = self.tool(&live, call).await?;
            let (arguments, kept) = self.fitting(&tool, call.arguments.clone(), permit).await?;
            permit = kept;
            let flight = Arc::new(Flight::new(sink.clone()));
            let until = *deadline.get_or_insert_with(|| Instant::now() + timeout);
            let sending = Sending {
                tool: call.tool.clone(),
                arguments,
                round: round.clone(),
                key: call.idempotency_key.clone(),
            };
            let (live, answered) = self.send(live, sending, &flight, until).await?;
            match answered {
                Ok(result) => {
                    let bytes = self.size(&result, &live)?;
                    match questions::next(self.config.elicitation, &result) {
                        Some(next) if *rounds < MAX_ROUNDS => {
                            *rounds += 1;
                            round = next;
                        }
                        _ => {
                            let flight = (bytes, flight.left_out());
                            return self.accept(result, &tool, &live, flight, permit).await;
                        }
                    }
                }
                Err(Failure::SessionGone) if !second => {
                    deadline = None;
                    // The server has not looked at it, and may have other tools by now.
                    self.retire(&live, false);
                    second = true;
                }
                Err(failure) => {
                    // One request that fails says nothing of the others.
                    let broken = matches!(failure, Failure::Unreachable(_) | Failure::SessionGone);
                    let err = self.failure(failure, &live, flight.sent());
                    if broken {
                        self.retire(&live, true);
                    }
                    return Err(err);
                }
            }
        }
    }

    /// What can be wrong before the server is even asked.
    fn check(&self, call: &ToolCall) -> Result<(), ToolError> {
        if !self.allows(&call.tool) {
            let message = format!(
                "the tool {} of {} is not among the `tools` that its configuration allows",
                quoted(&call.tool),
                self.name
            );
            return Err(ToolError::new(ToolErrorKind::NotAllowed, message));
        }
        let wrong = |message: String| Err(ToolError::new(ToolErrorKind::InvalidArguments, message));
        let size = serde_json::to_vec(&call.arguments).map_or(usize::MAX, |json| json.len());
        if size > MAX_ARGUMENTS {
            return wrong(format!(
                "the arguments are {size} bytes of JSON; at most {MAX_ARGUMENTS} are sent"
            ));
        }
        if call.idempotency_key.as_ref().is_some_and(|key| key.len() > MAX_KEY) {
            return wrong(format!("an idempotency key has at most {MAX_KEY} bytes"));
        }
        Ok(())
    }

    async fn permit(&self, patience: Duration) -> Result<OwnedSemaphorePermit, ToolError> {
        let permit = Arc::clone(&self.permits).acquire_owned();
        match tokio::time::timeout(patience, permit).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) => Err(ToolError::new(ToolErrorKind::Closing, "this server is stopping")),
            Err(_) => {
                let message = format!(
                    "the tool server {} has {} calls under way, which is its limit (max_parallel)",
                    self.name, self.config.max_parallel
                );
                Err(ToolError::new(ToolErrorKind::Busy, message))
            }
        }
    }

    async fn tool(&self, live: &InUse, call: &ToolCall) -> Result<Arc<Tool>, ToolError> {
        let tools = self.tools(live).await?;
        let tool = tools.iter().find(|tool| tool.definition.name == call.tool);
        let tool = tool.ok_or_else(|| {
            let message =
                format!("the tool server {} has no tool {}", self.name, quoted(&call.tool));
            ToolError::new(ToolErrorKind::UnknownTool, message)
        })?;
        if call.pin.as_ref().is_some_and(|pin| *pin != tool.hash) {
            let message = format!(
                "the tool {0} of {1} is not what was approved: see `cynai tools list {1}`, and approve it \
                 with `cynai tools approve {1} {0}`",
                quoted(&call.tool),
                self.name
            );
            return Err(ToolError::new(ToolErrorKind::Changed, message));
        }
        Ok(Arc::clone(tool))
    }

    async fn fitting(
        &self,
        tool: &Tool,
        arguments: Map<String, Value>,
        permit: OwnedSemaphorePermit,
    ) -> Result<(Map<String, Value>, OwnedSemaphorePermit), ToolError> {
        let checked = check_in_time(Arc::clone(&tool.input), Value::Object(arguments), permit);
        match checked.await {
            Ok((Value::Object(arguments), permit)) => Ok((arguments, permit)),
            Ok(_) => Err(ToolError::new(ToolErrorKind::InvalidArguments, "no arguments")),
            Err(mismatch) => {
                let at = if mismatch.path.is_empty() {
                    String::new()
                } else {
                    format!(" at {}", quoted(&mismatch.path))
                };
                let message = format!(
                    "the arguments of {} do not fit its schema{at}: {}",
                    quoted(&tool.definition.name),
                    mismatch.problem
                );
                Err(ToolError::new(ToolErrorKind::InvalidArguments, message).at(mismatch.path))
            }
        }
    }

    /// Sends the call, as a task that outlives whoever waits for it.
    async fn send(
        &self,
        live: InUse,
        sending: Sending,
        flight: &Arc<Flight>,
        deadline: Instant,
    ) -> Result<(InUse, Result<Value, Failure>), ToolError> {
        let (mut answer, answered) = oneshot::channel();
        let flight = Arc::clone(flight);
        self.context.tasks.spawn(async move {
            let gone = answer.closed();
            let result = live.connection.call(sending, flight, deadline, gone).await;
            let _ = answer.send((live, result));
        });
        answered.await.map_err(|_| {
            ToolError::new(ToolErrorKind::Closing, "this server is stopping")
                .with_outcome(Outcome::Unknown)
        })
    }

    /// The bytes of a result's JSON, when they are not too many.
    fn size(&self, result: &Value, live: &InUse) -> Result<usize, ToolError> {
        let bytes = serde_json::to_vec(result).map_or(usize::MAX, |json| json.len());
        if bytes > self.config.max_output {
            return Err(self.failure(Failure::TooLong(bytes as u64), live, true));
        }
        Ok(bytes)
    }

    /// Looks at a result before anybody else does.
    async fn accept(
        &self,
        mut result: Value,
        tool: &Tool,
        live: &InUse,
        (bytes, progress_left_out): (usize, u64),
        permit: OwnedSemaphorePermit,
    ) -> Result<ToolResult, ToolError> {
        live.redactor.json(&mut result);
        let (mut structured, content, is_error) = match Answer::read(result) {
            Answer::Complete { structured, content, is_error } => (structured, content, is_error),
            Answer::InputRequired => {
                let message = format!(
                    "the tool {} of {} asks something back, which nobody here answers",
                    quoted(&tool.definition.name),
                    self.name
                );
                let err = ToolError::new(ToolErrorKind::InputRequired, message);
                return Err(err.with_outcome(Outcome::Answered));
            }
            Answer::Nonsense(problem) => {
                return Err(self.failure(Failure::Unreadable(problem), live, true));
            }
        };
        if let Some(schema) = tool.output.as_ref().filter(|_| !is_error) {
            let value = structured.take().ok_or_else(|| {
                self.invalid_output(tool, String::new(), "there is no structured result")
            })?;
            let checked = check_in_time(Arc::clone(schema), value, permit).await;
            let (value, _) = checked
                .map_err(|mismatch| self.invalid_output(tool, mismatch.path, &mismatch.problem))?;
            structured = Some(value);
        }
        Ok(ToolResult { structured, content, is_error, bytes, progress_left_out })
    }

    fn invalid_output(&self, tool: &Tool, path: String, problem: &str) -> ToolError {
        let at = if path.is_empty() { String::new() } else { format!(" at {}", quoted(&path)) };
        let message = format!(
            "the result of {} of {} does not fit its schema{at}: {problem}",
            quoted(&tool.definition.name),
            self.name
        );
        ToolError::new(ToolErrorKind::InvalidOutput, message)
            .with_outcome(Outcome::Answered)
            .at(path)
    }

    /// A failure of the wire, in words. `sent` tells whether the server may have seen the request.
    pub(super) fn failure(&self, failure: Failure, live: &InUse, sent: bool) -> ToolError {
        let name = &self.name;
        let error = |kind, outcome, message: String| {
            ToolError::new(kind, live.redactor.text(&message)).with_outcome(outcome)
        };
        let (unanswered, known) = if sent {
            (Outcome::Unknown, "the request was sent: whether it was carried out is not known")
        } else {
            (Outcome::NotSent, "the request was not sent")
        };
        match failure {
            Failure::Closed if self.context.closing.is_cancelled() => error(
                ToolErrorKind::Closing,
                unanswered,
                format!("this server is stopping; {known}"),
            ),
            Failure::Closed => {
                let said = live.last_words.as_ref().map(LastWords::get).unwrap_or_default();
                let said = if said.is_empty() { said } else { format!("; it last said: {said}") };
                let message =
                    format!("the tool server {name} ended during the call; {known}{said}");
                error(ToolErrorKind::ServerDied, unanswered, message)
            }
            Failure::Unreachable(problem) => {
                let problem = quoted(&problem);
                let message = format!("the tool server {name} cannot be used now: {problem}");
                error(ToolErrorKind::Unavailable, Outcome::NotSent, message)
            }
            Failure::LoginRequired(challenge) => self.login_required(challenge),
            Failure::Http(problem) => {
                let kind =
                    if sent { ToolErrorKind::ServerDied } else { ToolErrorKind::Unavailable };
                let problem = quoted(&problem);
                error(
                    kind,
                    unanswered,
                    format!("the tool server {name} failed: {problem}; {known}"),
                )
            }
            Failure::SessionGone => {
                let message = format!("the tool server {name} forgets its sessions at once");
                error(ToolErrorKind::Unavailable, Outcome::NotSent, message)
            }
            Failure::Remote { code, message } => {
                let message = quoted(&message);
                let message =
                    format!("the tool server {name} refused the call: {message} ({code})");
                error(ToolErrorKind::Refused, Outcome::Answered, message)
            }
            Failure::TooLong(bytes) => {
                let limit = self.config.max_output;
                let message = format!(
                    "the result of {name} is {bytes} bytes or more, over the limit of {limit} (max_output)"
                );
                error(ToolErrorKind::TooLarge, Outcome::Answered, message)
            }
            Failure::Unreadable(problem) => {
                let problem = quoted(&problem);
                let message =
                    format!("the tool server {name} does not answer as MCP asks for: {problem}");
                error(ToolErrorKind::Protocol, Outcome::Answered, message)
            }
            Failure::Timeout | Failure::Abandoned => {
                let message = format!("the tool server {name} did not answer in time; {known}");
                error(ToolErrorKind::Timeout, unanswered, message)
            }
        }
    }
}
