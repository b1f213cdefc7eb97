//! What is counted about calls of models.
//!
//! **Invariant:** labels are names of the configuration and kinds of failure, so their values are bounded.

use std::time::Duration;

use super::answer::Usage;
use super::failure::FailureKind;

/// Attempts by endpoint and outcome: `ok`, or a kind of failure.
const CALLS: &str = "cynai_model_calls_total";
/// From a request to the first piece of its answer.
const FIRST_TOKEN: &str = "cynai_model_first_token_seconds";
/// From a request to its end.
const SECONDS: &str = "cynai_model_call_seconds";
/// Tokens by endpoint and direction: `input` or `output`.
const TOKENS: &str = "cynai_model_tokens_total";

pub(super) fn describe() {
    metrics::describe_counter!(CALLS, "Attempts to call models, by endpoint and outcome");
    metrics::describe_histogram!(
        FIRST_TOKEN,
        "Seconds from a request to the first piece of an answer"
    );
    metrics::describe_histogram!(SECONDS, "Seconds that attempts to call models took");
    metrics::describe_counter!(TOKENS, "Tokens by endpoint and direction");
}

/// Counts one attempt.
pub(super) fn attempt(endpoint: &str, failure: Option<FailureKind>, took: Duration) {
    let outcome = failure.map_or("ok", FailureKind::as_str);
    metrics::counter!(CALLS, "endpoint" => endpoint.to_owned(), "outcome" => outcome).increment(1);
    metrics::histogram!(SECONDS, "endpoint" => endpoint.to_owned()).record(took.as_secs_f64());
}

pub(super) fn first_token(endpoint: &str, after: Duration) {
    metrics::histogram!(FIRST_TOKEN, "endpoint" => endpoint.to_owned()).record(after.as_secs_f64());
}

pub(super) fn tokens(endpoint: &str, usage: &Usage) {
    for (direction, count) in [("input", usage.input), ("output", usage.output)] {
        metrics::counter!(TOKENS, "endpoint" => endpoint.to_owned(), "direction" => direction)
            .increment(count);
    }
}
