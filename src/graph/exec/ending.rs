//! What an activation comes to: its record, what it waits for, a question to a person, another attempt.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::super::channel::{View, Write};
use super::super::checkpoint::{CheckpointError, Due, EffectStatus, WaitKind, WaitRow};
use super::super::expr::Scope;
use super::super::model::{Node as NodeSpec, OnUnknown, Retry};
use super::super::step::{self, Failure, interrupt_id};
use super::super::value::Shared;
use super::ExecError;
use super::activation::{NodeError, Outcome, Question, Wait};
use super::attempt::{End, Kept, before_of, seen_by_node, unknown_outcome_id};
use super::effect::{self, Sent};
use super::superstep::{Status, TaskRecord, Work};

/// How long nodes that could not start wait before they are asked again, at the most.
const MAX_NOT_STARTED: Duration = Duration::from_secs(60);
/// The pause before an attempt is sent again whose node says nothing of retries.
const RESEND_AFTER: Duration = Duration::from_secs(1);

impl Work<'_> {
    /// What an attempt came to, and what is to be stored of its effect.
    pub(super) fn attempt_ended(&mut self, at: usize, end: End) -> Result<(), ExecError> {
        let slot = &mut self.slots[at];
        match end {
            End::Node { end, sent: None } => self.ended(at, end),
            End::Node { end, sent: Some(sent) } => {
                slot.effect = effect::outcome_of(&slot.task, slot.attempt, &end);
                match end {
                    Err(NodeError::Unknown { kind, message }) => {
                        self.outcome_unknown(at, &sent, &kind, &message)
                    }
                    end => self.ended(at, end),
                }
            }
            End::Decided { end, status } => {
                let told = match &end {
                    Ok(Outcome::Done { output, .. }) => output.clone(),
                    Ok(_) => Value::Null,
                    Err(err) => json!({ "message": err.to_string() }),
                };
                slot.effect = Some(effect::ended(&slot.task, slot.attempt, status, &told));
                self.ended(at, end)
            }
            End::Unknown { question, kept } => {
                slot.effect = Some(effect::ended(
                    &slot.task,
                    slot.attempt,
                    EffectStatus::Unknown,
                    &json!({ "message": "the process died while it was acting" }),
                ));
                self.ask_about_outcome(at, question, &kept);
                Ok(())
            }
        }
    }

    /// The attempt was sent, and nothing tells whether it happened.
    fn outcome_unknown(
        &mut self,
        at: usize,
        sent: &Sent,
        kind: &str,
        message: &str,
    ) -> Result<(), ExecError> {
        let graph = Arc::clone(&self.graph);
        let node = graph.node(self.slots[at].task.node);
        let attempt = self.slots[at].attempt;
        match sent.on_unknown(node) {
            OnUnknown::Ask => {
                let question = effect::question(&node.name, attempt, &sent.view, Some(message));
                let before = before_of(self.slots[at].previous.as_ref()).unwrap_or(Value::Null);
                self.ask_about_outcome(at, question, &Kept { before, sends: sent.sends });
                Ok(())
            }
            OnUnknown::Retry if sent.may_resend(node) => {
                let after = node.retry.as_ref().map_or(RESEND_AFTER, |retry| {
                    backoff(retry, sent.lost.saturating_add(1), self.slots[at].task.id.0.as_u128())
                });
                self.pause(at, node, after, attempt, kind, message);
                if let Some(data) = self.slots[at].wait.as_mut().and_then(|wait| wait.data.as_mut())
                    && let Ok(mut kept) = serde_json::from_slice::<Value>(data)
                {
                    kept["sends"] = sent.sends.into();
                    kept["lost"] = sent.lost.saturating_add(1).into();
                    *data = kept.to_string().into_bytes();
                }
                Ok(())
            }
            OnUnknown::Retry => self.ended(at, Err(NodeError::fatal(kind, message))),
            OnUnknown::Fail => self
                .ended(at, Err(NodeError::fatal("unknown_outcome", format!("{kind}: {message}")))),
        }
    }

    /// What an activation came to.
    pub(super) fn ended(
        &mut self,
        at: usize,
        end: Result<Outcome, NodeError>,
    ) -> Result<(), ExecError> {
        let graph = Arc::clone(&self.graph);
        let node = graph.node(self.slots[at].task.node);
        match end {
            Ok(Outcome::Done { output, update, goto }) => {
                match self.record(at, node, output, update, goto) {
                    Ok(record) => self.slots[at].status = Status::Done(record),
                    Err(err) => return self.failed(at, node, err),
                }
            }
            Ok(Outcome::Wait(wait)) => self.wait(at, node, wait),
            Ok(Outcome::Ask(question)) => self.ask(at, node, question),
            Err(err) => return self.failed(at, node, err),
        }
        Ok(())
    }

    fn record(
        &self,
        at: usize,
        node: &NodeSpec,
        output: Value,
        update: Vec<(String, Value)>,
        goto: Vec<String>,
    ) -> Result<TaskRecord, NodeError> {
        let mut writes = Vec::with_capacity(node.set.len() + update.len());
        let invalid = |err: super::super::channel::WriteError| {
            NodeError::fatal("invalid_write", err.to_string())
        };
        for (name, value) in update {
            let channel = self.graph.find_channel(&name).ok_or_else(|| {
                NodeError::fatal(
                    "unknown_channel",
                    format!(
                        "node `{}` writes to channel `{name}`, which the graph does not have",
                        node.name
                    ),
                )
            })?;
            writes.push(Write::new(&self.graph, channel, value).map_err(invalid)?);
        }
        if !node.set.is_empty() {
            let vars = self.activation_vars(at, node, output);
            let view = View { graph: &self.graph, state: &self.state };
            let scope = Scope { state: &view, vars: &vars };
            for (channel, template) in &node.set {
                let value = template.eval(&scope)?;
                writes.push(Write::new(&self.graph, *channel, value).map_err(invalid)?);
            }
        }
        for name in &goto {
            if !node.may_goto.iter().any(|index| &self.graph.node(*index).name == name) {
                let reason = format!(
                    "node `{}` goes to `{name}`, which is not in its `may_goto`",
                    node.name
                );
                return Err(NodeError::fatal("goto", reason));
            }
        }
        let w = writes.into_iter().map(|write| write.into_named(&self.graph)).collect();
        Ok(TaskRecord { w, g: goto, f: None })
    }

    fn activation_vars<'v>(
        &'v self,
        at: usize,
        node: &'v NodeSpec,
        output: Value,
    ) -> Vec<(&'v str, Shared)> {
        let slot = &self.slots[at];
        let mut vars =
            vec![("run", self.run.ambient.run.clone()), ("env", self.run.ambient.env.clone())];
        if let (Some(item), Some(for_each)) = (&slot.task.item, &node.for_each) {
            vars.push((&for_each.name, item.value.clone()));
            vars.push(("index", Shared::new(Value::from(item.index))));
        }
        vars.extend(step::error_for(&self.state, slot.task.node).map(|error| ("error", error)));
        vars.push(("output", Shared::new(output)));
        vars
    }

    fn wait(&mut self, at: usize, node: &NodeSpec, wait: Wait) {
        let slot = &mut self.slots[at];
        slot.status = Status::Waiting(wait.kind);
        if wait.stored {
            self.waits_stored = true;
            return;
        }
        slot.wait = Some(WaitRow {
            task: slot.task.id,
            node: node.name.clone(),
            kind: wait.kind,
            attempt: slot.attempt,
            due: wait.due,
            name: wait.name,
            data: wait.data.map(|data| data.to_string().into_bytes()),
            answer: None,
            round: slot.next_round(),
        });
    }

    /// Asks a person. Answers that the activation has got before stay with it.
    fn ask(&mut self, at: usize, node: &NodeSpec, question: Question) {
        let slot = &self.slots[at];
        let seen =
            seen_by_node(slot.previous.as_ref()).filter(|wait| wait.kind == WaitKind::Interrupt);
        let answers = seen.and_then(|wait| wait.answer);
        let data = json!({
            "id": interrupt_id(slot.task.id, count(answers.as_deref())),
            "value": question.value,
            "response_schema": question.schema,
        });
        self.put_question(at, node, data, question.expires);
        if let Some(wait) = &mut self.slots[at].wait {
            wait.answer = answers;
        }
    }

    /// Asks a person what became of an attempt that nobody knows the outcome of.
    fn ask_about_outcome(&mut self, at: usize, question: Question, kept: &Kept) {
        let graph = Arc::clone(&self.graph);
        let slot = &self.slots[at];
        let node = graph.node(slot.task.node);
        let data = json!({
            "id": unknown_outcome_id(slot.task.id, slot.attempt),
            "value": question.value,
            "response_schema": question.schema,
            "unknown_outcome": { "before": kept.before },
            "sends": kept.sends,
        });
        self.put_question(at, node, data, question.expires);
    }

    fn put_question(&mut self, at: usize, node: &NodeSpec, data: Value, expires: Option<Duration>) {
        let due = expires.map(Due::After);
        self.wait(
            at,
            node,
            Wait { kind: WaitKind::Interrupt, due, name: None, data: Some(data), stored: false },
        );
    }

    /// An attempt failed: another one after a pause, the node's handler, or the end of the run.
    fn failed(&mut self, at: usize, node: &NodeSpec, err: NodeError) -> Result<(), ExecError> {
        let (kind, message, again) = match err {
            NodeError::Fenced => return Err(CheckpointError::Fenced.into()),
            NodeError::NotStarted { message, after } => {
                self.pause(
                    at,
                    node,
                    after.min(MAX_NOT_STARTED),
                    self.slots[at].attempt,
                    "not_started",
                    &message,
                );
                return Ok(());
            }
            // Nothing was told of it before it began, so it does not act: it may be done again.
            NodeError::Retryable { kind, message } | NodeError::Unknown { kind, message } => {
                (kind, message, true)
            }
            NodeError::Fatal { kind, message } => (kind, message, false),
        };
        let attempt = self.slots[at].attempt;
        if let Some(retry) = node.retry.as_ref().filter(|retry| again && attempt < retry.attempts) {
            let after = backoff(retry, attempt, self.slots[at].task.id.0.as_u128());
            self.pause(at, node, after, attempt + 1, &kind, &message);
            return Ok(());
        }
        let failure = Failure { kind, message, attempts: attempt };
        self.slots[at].status =
            Status::Done(TaskRecord { f: Some(failure), ..TaskRecord::default() });
        Ok(())
    }

    fn pause(
        &mut self,
        at: usize,
        node: &NodeSpec,
        after: Duration,
        attempt: u32,
        kind: &str,
        message: &str,
    ) {
        let slot = &mut self.slots[at];
        slot.attempt = attempt;
        let mut data = json!({ "kind": kind, "message": message });
        // What the node had waited for is there for the next attempt as well.
        if let Some(before) = before_of(slot.previous.as_ref()) {
            data["before"] = before;
        }
        let wait = Wait {
            kind: WaitKind::Retry,
            due: Some(Due::After(after)),
            name: None,
            data: Some(data),
            stored: false,
        };
        self.wait(at, node, wait);
    }
}

fn count(answers: Option<&[u8]>) -> u32 {
    let answers =
        answers.and_then(|bytes| serde_json::from_slice::<Vec<serde::de::IgnoredAny>>(bytes).ok());
    answers.map_or(0, |answers| u32::try_from(answers.len()).unwrap_or(u32::MAX))
}

/// The pause after failed attempt number `attempt`: exponential, bounded, and with jitter drawn from the
/// upper half of its length. The draw is a function of the activation and the attempt, so it needs no dice.
fn backoff(retry: &Retry, attempt: u32, seed: u128) -> Duration {
    let exponent = i32::try_from(attempt.saturating_sub(1).min(1000)).unwrap_or(1000);
    let seconds =
        (retry.first.as_secs_f64() * retry.factor.powi(exponent)).min(retry.max.as_secs_f64());
    let full = Duration::try_from_secs_f64(seconds).unwrap_or(retry.max);
    if !retry.jitter {
        return full;
    }
    let draw = step::uuid_of(&<sha2::Sha256 as sha2::Digest>::digest(
        [seed.to_be_bytes().as_slice(), &attempt.to_be_bytes()].concat(),
    ));
    let part = f64::from(u16::try_from(draw.as_u128() >> 112).unwrap_or(0)) / f64::from(u16::MAX);
    full.mul_f64(0.5 + part / 2.0)
}
