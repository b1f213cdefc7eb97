//! `cynai/webhook`: tells the end of a run to a URL. Of the built-in graph only: files of users cannot name it.

use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use serde_json::json;

use crate::graph::exec::{Activation, Node, NodeError, Outcome};
use crate::graph::model::{Effect, NodeKind};
use crate::services::Services;
use crate::services::webhooks::{Attempt, DeliveryError};

/// The name in the built-in graph. It is stored with runs: it must stay stable.
pub const WEBHOOK: &str = "cynai/webhook";
/// Receivers tell repetitions by the message's id, which is the run's.
pub(super) const EFFECT: Effect = Effect::Idempotent;
/// When this server could not even try.
const LATER: Duration = Duration::from_secs(30);
/// When others are before it.
const SOON: Duration = Duration::from_secs(2);

/// The code of the node.
#[derive(Debug, Clone)]
pub struct Webhook {
    services: Services,
}

impl Webhook {
    /// Delivers through `services`.
    #[must_use]
    pub fn new(services: Services) -> Self {
        Self { services }
    }
}

impl Node for Webhook {
    fn run<'a>(
        &'a self,
        activation: &'a Activation<'a>,
    ) -> BoxFuture<'a, Result<Outcome, NodeError>> {
        async move {
            let NodeKind::Use { with, .. } = &activation.node.kind else {
                return Err(NodeError::fatal("internal", "not a `use` node"));
            };
            let delivery = activation.eval(with)?;
            let most = activation.node.retry.as_ref().map_or(1, |retry| retry.attempts);
            let attempt = Attempt { number: activation.attempt, last: activation.attempt >= most };
            match self.services.deliver_webhook(activation.run_id, attempt, delivery).await {
                Ok(status) => Ok(Outcome::output(json!({ "status": status }))),
                Err(DeliveryError::Refused(message)) => {
                    Err(NodeError::fatal("webhook_refused", message))
                }
                Err(DeliveryError::Failed(message)) => {
                    Err(NodeError::retryable("webhook_failed", message))
                }
                Err(DeliveryError::NotNow(message)) => {
                    Err(NodeError::NotStarted { message, after: LATER })
                }
                Err(DeliveryError::Busy(message)) => {
                    Err(NodeError::NotStarted { message: message.to_owned(), after: SOON })
                }
            }
        }
        .boxed()
    }

    fn effect(&self) -> Effect {
        EFFECT
    }
}
