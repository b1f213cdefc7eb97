//! What comes back from a call: pieces while it goes on, and the whole at its end.

use std::ops::AddAssign;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use super::failure::FailureKind;
use super::messages::Message;
use crate::config::models::Price;

/// A piece of an answer, as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delta {
    /// What was streamed so far is void: another attempt begins.
    Restart,
    /// Text of the answer.
    Text(String),
    /// Text of a model that thinks aloud; no part of the answer.
    Reasoning(String),
    /// A piece of a tool call.
    ToolCall {
        /// Which of the answer's calls it belongs to, from 0.
        index: usize,
        /// The call's id, with its first piece.
        id: Option<String>,
        /// The tool's name, with the first piece that has it.
        name: Option<String>,
        /// More of the arguments' JSON text.
        arguments: String,
    },
}

/// Takes the pieces. Batching them is the sink's business; it must not block.
///
/// What one call passes on is bounded: by the endpoint's `max_answer` for each attempt.
pub trait Sink: Send + Sync {
    /// Takes one piece.
    fn take(&self, delta: Delta);
}

/// Nobody looks.
impl Sink for () {
    fn take(&self, _: Delta) {}
}

/// A receiver that is gone is no reason to stop: dropping the call is.
impl Sink for tokio::sync::mpsc::UnboundedSender<Delta> {
    fn take(&self, delta: Delta) {
        drop(self.send(delta));
    }
}

/// Collects them all.
impl Sink for Mutex<Vec<Delta>> {
    fn take(&self, delta: Delta) {
        self.lock().unwrap_or_else(PoisonError::into_inner).push(delta);
    }
}

/// Tokens that a call used, as the endpoint counted them.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Usage {
    /// Of the request.
    pub input: u64,
    /// Of the answer.
    pub output: u64,
    /// Of the request's, those that the endpoint had cached.
    pub cached: Option<u64>,
    /// Of the answer's, those that were only thought.
    pub reasoning: Option<u64>,
    /// All.
    pub total: u64,
    /// US dollars, where the endpoint has a price.
    pub cost_usd: Option<f64>,
    /// Calls that answered and told no usage: the numbers lack theirs.
    pub unreported: u32,
}

impl Usage {
    /// Reads the protocol's `usage`. What is no number counts as not told.
    pub(super) fn read(told: Option<&Value>) -> Self {
        let number =
            |path: &str| told.and_then(|usage| usage.pointer(path)).and_then(Value::as_u64);
        let (Some(input), output) = (number("/prompt_tokens"), number("/completion_tokens")) else {
            return Self { unreported: 1, ..Self::default() };
        };
        let output = output.unwrap_or(0);
        Self {
            input,
            output,
            cached: number("/prompt_tokens_details/cached_tokens"),
            reasoning: number("/completion_tokens_details/reasoning_tokens"),
            total: number("/total_tokens").unwrap_or(input.saturating_add(output)),
            cost_usd: None,
            unreported: 0,
        }
    }

    /// Adds what the tokens cost.
    pub(super) fn priced(mut self, price: Option<&Price>) -> Self {
        if let Some(price) = price.filter(|_| self.unreported == 0) {
            let cached = self.cached.unwrap_or(0).min(self.input);
            let parts = [
                (self.input - cached, price.input),
                (cached, price.cached_input.unwrap_or(price.input)),
                (self.output, price.output),
            ];
            self.cost_usd = Some(parts.iter().map(|(count, price)| dollars(*count, *price)).sum());
        }
        self
    }

    /// As LangChain's `usage_metadata`; none when the endpoint told nothing.
    pub(super) fn metadata(&self) -> Option<Value> {
        if self.unreported > 0 && self.total == 0 {
            return None;
        }
        let mut metadata = json!({
            "input_tokens": self.input,
            "output_tokens": self.output,
            "total_tokens": self.total,
        });
        if let Some(cached) = self.cached {
            metadata["input_token_details"] = json!({ "cache_read": cached });
        }
        if let Some(reasoning) = self.reasoning {
            metadata["output_token_details"] = json!({ "reasoning": reasoning });
        }
        Some(metadata)
    }
}

#[expect(clippy::cast_precision_loss, reason = "token counts are far below 2^52")]
fn dollars(count: u64, price: f64) -> f64 {
    count as f64 * price / 1e6
}

impl AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        fn add<T>(left: Option<T>, right: Option<T>, sum: impl Fn(T, T) -> T) -> Option<T> {
            match (left, right) {
                (Some(left), Some(right)) => Some(sum(left, right)),
                (left, right) => left.or(right),
            }
        }
        self.input = self.input.saturating_add(other.input);
        self.output = self.output.saturating_add(other.output);
        self.total = self.total.saturating_add(other.total);
        self.cached = add(self.cached, other.cached, u64::saturating_add);
        self.reasoning = add(self.reasoning, other.reasoning, u64::saturating_add);
        self.cost_usd = add(self.cost_usd, other.cost_usd, |left, right| left + right);
        self.unreported = self.unreported.saturating_add(other.unreported);
    }
}

/// One try of one candidate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Attempt {
    /// The endpoint's name.
    pub endpoint: String,
    /// The model's name there.
    pub model: String,
    /// Why it gave no answer; none for the one that did.
    pub failure: Option<FailureKind>,
    /// How long it took.
    pub took: Duration,
}

/// A whole answer.
#[derive(Debug, Clone)]
pub struct ChatAnswer {
    /// The assistant's message, with usage and response metadata in LangChain's form. It has no id yet.
    pub message: Message,
    /// Why the model stopped: `stop`, `length`, `tool_calls`, `content_filter`, or the endpoint's own word.
    pub finish_reason: String,
    /// Tokens and cost.
    pub usage: Usage,
    /// The model that answered, as the endpoint calls it.
    pub model: String,
    /// The endpoint that answered.
    pub endpoint: String,
    /// What was tried, in order; the last one answered.
    pub attempts: Vec<Attempt>,
    /// From the request that was answered to the first piece of its answer; none when it came at once.
    pub time_to_first_token: Option<Duration>,
    /// From the beginning of the call to its end, waits and failed attempts included.
    pub total_time: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_read_priced_and_added_up() {
        let told = json!({"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500,
            "prompt_tokens_details": {"cached_tokens": 400}});
        let price = Price { input: 2.0, output: 10.0, cached_input: Some(1.0) };
        let mut usage = Usage::read(Some(&told)).priced(Some(&price));
        let expected = (600.0 * 2.0 + 400.0 * 1.0 + 500.0 * 10.0) / 1e6;
        assert!((usage.cost_usd.unwrap() - expected).abs() < 1e-12);
        usage += Usage::read(Some(&json!({"prompt_tokens": "many"})));
        usage += Usage::read(None);
        assert_eq!((usage.input, usage.total, usage.unreported), (1000, 1500, 2));
        assert_eq!(usage.metadata().unwrap()["input_token_details"]["cache_read"], 400);
        assert_eq!(Usage::read(None).metadata(), None);
    }
}
