//! Attempts, waits and failover: what every kind of call does around its exchanges.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::answer::Attempt;
use super::endpoint::Endpoint;
use super::failure::{Failure, FailureKind};
use super::{backoff, metrics};

/// A candidate: an endpoint, and a model there.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub endpoint: Arc<Endpoint>,
    pub model: String,
    pub attempts: u32,
}

/// Something that is tried at one candidate after the other.
pub(super) trait Operation: Send {
    /// What comes of it.
    type Output: Send;

    /// One attempt, which ends by itself at `until`.
    fn attempt(
        &mut self,
        target: &Target,
        until: Instant,
    ) -> impl Future<Output = Result<Self::Output, Failure>> + Send;
}

/// What came of a call, and how.
pub(super) struct Outcome<T> {
    pub result: Result<T, Failure>,
    pub attempts: Vec<Attempt>,
}

/// Tries the candidates in their order, each as often as it is worth it.
pub(super) async fn run<O: Operation>(
    targets: &[Target],
    budget: Option<Duration>,
    operation: &mut O,
) -> Outcome<O::Output> {
    let end = budget.and_then(|budget| Instant::now().checked_add(budget));
    let mut attempts = Vec::new();
    let mut last = Failure::new(FailureKind::NotFound, "the route has no candidate");
    for (at, target) in targets.iter().enumerate() {
        let total = Instant::now() + target.endpoint.config.timeouts.total;
        let until = end.map_or(total, |end| end.min(total));
        let others = at + 1 < targets.len();
        for tries in 1.. {
            let started = Instant::now();
            let result = attempt(target, until, operation).await;
            let took = started.elapsed();
            let failure = result.as_ref().err().map(|failure| failure.kind);
            metrics::attempt(&target.endpoint.name, failure, took);
            attempts.push(Attempt {
                endpoint: target.endpoint.name.clone(),
                model: target.model.clone(),
                failure,
                took,
            });
            last = match result {
                Ok(output) => return Outcome { result: Ok(output), attempts },
                Err(failure) => failure,
            };
            log(target, &last, tries);
            let left = until.saturating_duration_since(Instant::now());
            let luck = rand::random::<f64>();
            match backoff::wait(&last, tries, target.attempts, left, others, luck) {
                Some(wait) => sleep(wait).await,
                None => break,
            }
        }
        let time_is_up = end.is_some_and(|end| Instant::now() >= end);
        if !last.kind.next() || time_is_up {
            break;
        }
    }
    Outcome { result: Err(last), attempts }
}

async fn attempt<O: Operation>(
    target: &Target,
    until: Instant,
    operation: &mut O,
) -> Result<O::Output, Failure> {
    let admitted = target.endpoint.admit(until).await?;
    let result = operation.attempt(target, until).await;
    admitted.ended(result.as_ref().err());
    result
}

fn log(target: &Target, failure: &Failure, tries: u32) {
    let endpoint = target.endpoint.name.as_str();
    tracing::info!(
        model.endpoint = endpoint,
        model.name = target.model,
        failure = failure.kind.as_str(),
        tries,
        "the model endpoint {endpoint} failed: {failure}"
    );
}

/// The time for all attempts at an endpoint is up, or that of the whole call.
pub(super) fn time_is_up() -> Failure {
    let message = "the time is up: the call's own timeout, or the endpoint's `total`";
    Failure::new(FailureKind::TimeoutTotal, message)
}
