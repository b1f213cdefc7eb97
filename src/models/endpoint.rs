//! One endpoint as this process knows it: its connections, its free slots, its health, its quirks.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use reqwest::redirect;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::breaker::{Breaker, Health};
use super::failure::{Failure, FailureKind};
use super::request::Quirks;
use crate::config::models::EndpointConfig;

/// Models whose quirks are remembered for one endpoint.
const MAX_QUIRKS: usize = 256;

/// An endpoint.
pub(super) struct Endpoint {
    pub name: String,
    pub config: EndpointConfig,
    pub http: reqwest::Client,
    slots: Arc<Semaphore>,
    breaker: Mutex<Breaker>,
    quirks: Mutex<HashMap<String, Quirks>>,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What an HTTP client of an endpoint begins with. Redirects are not followed and no proxy is used: a key
/// goes to the address that the operator wrote, and nowhere else.
pub(super) fn http(connect: Duration) -> reqwest::ClientBuilder {
    reqwest::Client::builder()
        .connect_timeout(connect)
        .redirect(redirect::Policy::none())
        .no_proxy()
        .referer(false)
        .user_agent(concat!("cynai/", env!("CARGO_PKG_VERSION")))
}

impl Endpoint {
    pub(super) fn new(name: String, config: EndpointConfig, http: reqwest::Client) -> Self {
        let slots = Arc::new(Semaphore::new(config.max_parallel));
        Self { name, config, http, slots, breaker: Mutex::default(), quirks: Mutex::default() }
    }

    /// Waits for a free slot, and asks the breaker.
    pub(super) async fn admit(self: &Arc<Self>, until: Instant) -> Result<Admitted, Failure> {
        if let Some(left) = lock(&self.breaker).closed_for(Instant::now()) {
            return Err(self.left_alone(left));
        }
        let patience = self.config.timeouts.first_token;
        let waiting = Arc::clone(&self.slots).acquire_owned();
        let until = until.min(Instant::now() + patience);
        let Ok(Ok(slot)) = timeout_at(until, waiting).await else {
            let message = format!(
                "all {} slots of the endpoint were taken; its `max_parallel` is the limit",
                self.config.max_parallel
            );
            return Err(Failure::new(FailureKind::Busy, message));
        };
        lock(&self.breaker).admit(Instant::now()).map_err(|left| self.left_alone(left))?;
        Ok(Admitted { endpoint: Arc::clone(self), health: Health::Unknown, _slot: slot })
    }

    fn left_alone(&self, left: Duration) -> Failure {
        let message = format!(
            "the endpoint {} failed too often in a row; it is tried again in {} s",
            self.name,
            left.as_secs().max(1)
        );
        let mut failure = Failure::new(FailureKind::CircuitOpen, message);
        failure.retry_after = Some(left);
        failure
    }

    pub(super) fn quirks(&self, model: &str) -> Quirks {
        lock(&self.quirks).get(model).copied().unwrap_or_default()
    }

    pub(super) fn remember(&self, model: &str, quirks: Quirks) {
        let mut known = lock(&self.quirks);
        if known.len() < MAX_QUIRKS || known.contains_key(model) {
            known.insert(model.to_owned(), quirks);
        }
    }
}

/// The right to make one call. It is reported to the breaker when it is dropped.
#[derive(Debug)]
pub(super) struct Admitted {
    endpoint: Arc<Endpoint>,
    health: Health,
    _slot: OwnedSemaphorePermit,
}

impl Admitted {
    /// Says how the call went. Without it the caller went away.
    pub(super) fn ended(mut self, failure: Option<&Failure>) {
        self.health = match failure.map(|failure| failure.kind) {
            // It was never reached, or had too little time: nothing is known.
            Some(FailureKind::NoKey | FailureKind::TimeoutTotal) => Health::Unknown,
            Some(kind) if kind.unhealthy() => Health::Ill,
            // A refusal is an answer, too.
            Some(_) | None => Health::Well,
        };
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        lock(&self.endpoint.breaker).report(self.health, Instant::now());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
