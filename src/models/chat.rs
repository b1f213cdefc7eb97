//! A chat: one message for a conversation.

use std::time::Duration;

use futures::StreamExt;
use serde_json::Value;
use tokio::time::{Instant, timeout_at};

use super::answer::{ChatAnswer, Delta, Sink};
use super::assembly::{Assembled, Assembly};
use super::calls::{self, Operation, Target, time_is_up};
use super::exchange::{self, Wire};
use super::failure::{Failure, FailureKind, ModelError};
use super::request::{ChatRequest, Prepared, Quirks};
use super::{Models, metrics};

/// How long the usage, or the end of the stream, may come after the end of the answer.
const EPILOGUE: Duration = Duration::from_secs(2);

impl Models {
    /// Asks for one message. Its pieces go to `sink` as they come.
    ///
    /// A failed attempt is repeated where that makes sense, and then the next candidate is asked; when
    /// pieces had been passed on, [`Delta::Restart`] comes before those of the new attempt. After an error
    /// all that was passed on is void. Dropping the future ends the request.
    pub async fn chat(
        &self,
        request: &ChatRequest,
        sink: &dyn Sink,
    ) -> Result<ChatAnswer, ModelError> {
        let prepared = request.prepare()?;
        let mut relay = Relay { sink, passed: false };
        self.ask(request, &prepared, request.idempotency_key.clone(), &mut relay).await
    }

    /// As [`Models::chat`], for a request that was checked, and perhaps changed.
    pub(super) async fn ask(
        &self,
        request: &ChatRequest,
        prepared: &Prepared,
        idempotency_key: Option<String>,
        relay: &mut Relay<'_>,
    ) -> Result<ChatAnswer, ModelError> {
        let targets = self.targets(&request.model)?;
        let started = Instant::now();
        let mut chat = Chat { models: self, prepared, idempotency_key, relay };
        let outcome = Box::pin(calls::run(&targets, request.timeout, &mut chat)).await;
        match outcome.result {
            Ok(turn) => Ok(ChatAnswer {
                message: turn.assembled.message,
                finish_reason: turn.assembled.finish_reason,
                usage: turn.assembled.usage,
                model: turn.assembled.model.unwrap_or(turn.model),
                endpoint: turn.endpoint,
                attempts: outcome.attempts,
                time_to_first_token: turn.first_token,
                total_time: started.elapsed(),
            }),
            Err(failure) => Err(ModelError::Failed {
                model: super::named(&request.model).to_owned(),
                failure,
                attempts: outcome.attempts,
            }),
        }
    }
}

/// Passes pieces on, and remembers whether there were any.
pub(super) struct Relay<'a> {
    pub sink: &'a dyn Sink,
    pub passed: bool,
}

impl Relay<'_> {
    fn pass(&mut self, delta: Delta) {
        self.passed = true;
        self.sink.take(delta);
    }

    /// What was passed on is void.
    pub(super) fn restart(&mut self) {
        if std::mem::take(&mut self.passed) {
            self.sink.take(Delta::Restart);
        }
    }
}

struct Chat<'a, 'b> {
    models: &'a Models,
    prepared: &'a Prepared,
    idempotency_key: Option<String>,
    relay: &'a mut Relay<'b>,
}

struct Turn {
    assembled: Assembled,
    model: String,
    endpoint: String,
    first_token: Option<Duration>,
}

impl Operation for Chat<'_, '_> {
    type Output = Turn;

    /// An endpoint that refuses a part of the request which it can do without is asked again at once.
    async fn attempt(&mut self, target: &Target, until: Instant) -> Result<Turn, Failure> {
        let known = target.endpoint.quirks(&target.model);
        let mut quirks = known;
        loop {
            // A refusal, too, may come after some pieces.
            self.relay.restart();
            let failure = match self.exchange(target, &mut quirks, until).await {
                Ok(turn) => {
                    if quirks != known {
                        target.endpoint.remember(&target.model, quirks);
                    }
                    return Ok(turn);
                }
                Err(failure) => failure,
            };
            let blamed = failure.refused.or_else(|| {
                let unexplained =
                    matches!(failure.kind, FailureKind::BadRequest | FailureKind::Unsupported);
                self.prepared.suspect(quirks).filter(|_| unexplained)
            });
            if !blamed.is_some_and(|refused| quirks.learn(refused)) {
                return Err(failure);
            }
        }
    }
}

impl Chat<'_, '_> {
    async fn exchange(
        &mut self,
        target: &Target,
        quirks: &mut Quirks,
        until: Instant,
    ) -> Result<Turn, Failure> {
        let endpoint = &target.endpoint;
        let (keys, clock) = (self.models.keys(), self.models.clock());
        let stream = !quirks.no_stream;
        let opening = Wire::open(endpoint, keys, clock, self.idempotency_key.as_deref(), stream);
        let wire = timeout_at(until, opening).await.map_err(|_| time_is_up())??;
        let body = self.prepared.body(&target.model, *quirks);
        let started = Instant::now();
        let (mut assembled, first_token) = if stream {
            let mut first_token = None;
            let assembly = self.stream(target, &wire, body, until, &mut first_token).await?;
            // It answers streams with wholes: next time it is given the time that these take.
            quirks.no_stream = wire.seen(|seen| seen.whole);
            let announced = wire.seen(|seen| seen.done);
            (assembly.finish(announced)?, first_token.map(|at: Instant| at - started))
        } else {
            (self.plain(&wire, body, until).await?, None)
        };
        if let Some(after) = first_token {
            metrics::first_token(&endpoint.name, after);
        }
        assembled.usage = assembled.usage.priced(endpoint.config.price.as_ref());
        metrics::tokens(&endpoint.name, &assembled.usage);
        let message = &assembled.message;
        // There are servers that do not enforce it, and say nothing.
        if self.prepared.must_call
            && message.tool_calls.is_empty()
            && message.invalid_tool_calls.is_empty()
        {
            let problem = format!(
                "`tool_choice` wants a call of a tool, and the answer has none (it ended with `{}`); can this \
                 model, as it is served there, be made to call tools?",
                assembled.finish_reason
            );
            return Err(Failure::new(FailureKind::Unsupported, problem));
        }
        Ok(Turn {
            assembled,
            model: target.model.clone(),
            endpoint: endpoint.name.clone(),
            first_token,
        })
    }

    async fn stream(
        &mut self,
        target: &Target,
        wire: &Wire,
        body: Value,
        until: Instant,
        first_token: &mut Option<Instant>,
    ) -> Result<Assembly, Failure> {
        let times = target.endpoint.config.timeouts;
        let begin_by = Instant::now() + times.first_token;
        let mut heard = Instant::now();
        let mut finished = None;
        let mut assembly = Assembly::default();
        let chat = wire.client.chat();
        let opening = chat.create_stream_byot::<Value, Value>(body);
        let opened = timeout_at(begin_by.min(until), opening).await;
        let opened = opened.map_err(|_| late(until, begin_by, times.first_token))?;
        let mut frames = opened.map_err(|err| wire.failure(&err))?;
        loop {
            let patience = match (finished, &first_token) {
                (Some(finished), _) => finished + EPILOGUE.min(times.idle),
                (None, Some(_)) => heard + times.idle,
                (None, None) => begin_by,
            };
            let frame = match timeout_at(patience.min(until), frames.next()).await {
                Ok(Some(Ok(frame))) => frame,
                // What is only missing its epilogue is an answer.
                Ok(_) | Err(_) if finished.is_some() => break,
                Ok(Some(Err(err))) => return Err(wire.failure(&err)),
                Ok(None) => match wire.noted() {
                    Some(failure) => return Err(failure),
                    None => break,
                },
                Err(_) if Instant::now() >= until => return Err(time_is_up()),
                Err(_) if first_token.is_some() => return Err(exchange::idle(times.idle)),
                Err(_) => return Err(late(until, begin_by, times.first_token)),
            };
            heard = Instant::now();
            let relay = &mut *self.relay;
            let fed = assembly.feed(frame, &wire.redactor, &mut |delta| relay.pass(delta));
            match fed {
                Err(_) if finished.is_some() => break,
                fed => fed?,
            }
            if finished.is_none() && assembly.finished() {
                finished = Some(heard);
            }
            if first_token.is_none() && (assembly.begun() || assembly.finished()) {
                *first_token = Some(heard);
            }
        }
        Ok(assembly)
    }

    /// Without a stream nothing comes before everything has: only `total` bounds the wait.
    async fn plain(
        &mut self,
        wire: &Wire,
        body: Value,
        until: Instant,
    ) -> Result<Assembled, Failure> {
        let chat = wire.client.chat();
        let answer = timeout_at(until, chat.create_byot::<Value, Value>(body)).await;
        let answer = answer.map_err(|_| time_is_up())?.map_err(|err| wire.failure(&err))?;
        let mut assembly = Assembly::default();
        let mut deltas = Vec::new();
        assembly.feed(answer, &wire.redactor, &mut |delta| deltas.push(delta))?;
        // A whole answer is complete, even when it does not say why the model stopped.
        let assembled = assembly.finish(true)?;
        deltas.into_iter().for_each(|delta| self.relay.pass(delta));
        Ok(assembled)
    }
}

fn late(until: Instant, begin_by: Instant, patience: Duration) -> Failure {
    if until < begin_by {
        return time_is_up();
    }
    let patience = humantime::format_duration(patience);
    let message =
        format!("no answer began within {patience}, the endpoint's `first_token` timeout");
    Failure::new(FailureKind::TimeoutFirstToken, message)
}
