//! The pipes of a program: a message is a line.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use rmcp::model::{ErrorCode, ErrorData, NumberOrString, ServerJsonRpcMessage};
use rmcp::service::{RoleClient, RxJsonRpcMessage, TxJsonRpcMessage};
use rmcp::transport::Transport;
use tokio::io::AsyncWriteExt;
use tokio::process::{ChildStdin, ChildStdout};

use super::Terms;
use super::tap::{Shared, flight_of};
use crate::tools::child::Pipes;
use crate::tools::lines::{Line, Lines, answers};

/// The two pipes.
pub(super) struct Pipe {
    lines: Lines<ChildStdout>,
    input: Arc<tokio::sync::Mutex<Option<ChildStdin>>>,
    patience: Duration,
    shared: Arc<Shared>,
}

impl Pipe {
    /// These pipes, under these terms.
    pub(super) fn new(pipes: Pipes, terms: &Terms, shared: Arc<Shared>) -> Self {
        Self {
            lines: Lines::new(pipes.output, terms.message_bytes),
            input: Arc::new(tokio::sync::Mutex::new(Some(pipes.input))),
            patience: terms.write_patience,
            shared,
        }
    }
}

impl Transport<RoleClient> for Pipe {
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
