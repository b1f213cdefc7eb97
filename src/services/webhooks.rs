//! Webhooks: the end of a run, told to a URL that the client chose, signed with a key of its owner's.
//!
//! What can be refused is refused when the run is accepted; what a name comes to is checked at each attempt.
//! A receiver verifies the signature with the owner's key, which is made at first use and shown when its owner
//! makes a new one: as with tokens, that is the only time.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use url::Url;
use utoipa::ToSchema;

use super::Services;
use super::access::Secret;
use super::api::Actor;
use super::error::ServiceError;
use super::secrets::SecretError;
use crate::config::values::SecretSource;
use crate::egress::guard::{Bounds, EgressError, Redirects, send};
use crate::egress::signature;
use crate::ids::{RunId, UserId};
use crate::store::webhooks::SYSTEM_USER;
use crate::store::{crash, runs};

/// Bytes of a webhook's URL.
const MAX_URL_BYTES: usize = 8192;
/// For a whole delivery: connection, request and the head of the answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Counts what became of attempts.
const DELIVERIES: &str = "cynai_webhook_attempts_total";

/// Attempts of this process under way at once. Each holds a place among the runs in memory as long as its receiver
/// is silent: the rest of the places are for runs that work.
const UNDER_WAY: usize = 32;
/// Of these, attempts at one receiver, so that one that is silent leaves room for the others.
const UNDER_WAY_TO_ONE: usize = 8;

/// What a delivery says, as the store wrote it.
#[derive(Deserialize)]
struct Delivery {
    url: String,
    owner: UserId,
    run: serde_json::Map<String, Value>,
}

/// Why an attempt did not deliver.
#[derive(Debug, thiserror::Error)]
pub enum DeliveryError {
    /// No further attempt can succeed.
    #[error("{0}")]
    Refused(String),
    /// Another attempt may.
    #[error("{0}")]
    Failed(String),
    /// This server cannot try now; nothing was sent.
    #[error("{0}")]
    NotNow(String),
    /// As many attempts are under way as may be; nothing was sent.
    #[error("{0}")]
    Busy(&'static str),
}

/// Which attempt this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempt {
    /// Counted from 1.
    pub number: u32,
    /// Whether none follows a failure.
    pub last: bool,
}

/// Counts attempts under way, by receiver.
#[derive(Debug, Default)]
pub(super) struct Lanes(Mutex<HashMap<String, usize>>);

/// One attempt under way, until dropped.
struct Lane<'a> {
    lanes: &'a Lanes,
    receiver: String,
}

impl Lanes {
    fn enter(&self, url: &Url) -> Result<Lane<'_>, DeliveryError> {
        let port = url.port_or_known_default().unwrap_or_default();
        let receiver = format!("{}:{port}", url.host_str().unwrap_or_default());
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.values().sum::<usize>() >= UNDER_WAY {
            return Err(DeliveryError::Busy("as many deliveries are under way as may be"));
        }
        let count = counts.entry(receiver.clone()).or_default();
        if *count >= UNDER_WAY_TO_ONE {
            return Err(DeliveryError::Busy(
                "as many deliveries to this receiver are under way as may be",
            ));
        }
        *count += 1;
        Ok(Lane { lanes: self, receiver })
    }
}

impl Drop for Lane<'_> {
    fn drop(&mut self) {
        let mut counts = self.lanes.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.receiver) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.receiver);
            }
        }
    }
}

/// A key that verifies webhooks. It is shown this once.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct WebhookKeyView {
    /// `whsec_` and the key in base64, as libraries for Standard Webhooks take it.
    pub key: Secret,
}

impl Services {
    /// Refuses a URL that could not be delivered to, as far as that can be told without resolving its name.
    pub(super) fn check_webhook(&self, url: &str) -> Result<(), ServiceError> {
        let wrong = |message: String| ServiceError::invalid_at("/webhook", message);
        if !self.tells_ends() {
            return Err(wrong("this server does not deliver webhooks".to_owned()));
        }
        if url.len() > MAX_URL_BYTES {
            let size = url.len();
            return Err(wrong(format!(
                "the URL has {size} bytes; at most {MAX_URL_BYTES} are accepted"
            )));
        }
        let parsed = Url::parse(url).map_err(|_| {
            wrong("`webhook` must be an absolute URL, such as https://example.com/hook".to_owned())
        })?;
        let guard = &self.egress().webhooks;
        guard.check(&parsed).map_err(|refusal| wrong(format!("Webhook host blocked: {refusal}")))
    }

    /// Makes a new key for the actor's webhooks, in place of the one before. It is shown this once.
    pub async fn new_webhook_key(&self, actor: &Actor) -> Result<WebhookKeyView, ServiceError> {
        let key = signature::new_key();
        self.put_secret(actor.user_id, &key_name(actor.user_id), &key).await?;
        tracing::info!(by = %actor.name, "a new key for webhooks was made");
        Ok(WebhookKeyView { key: Secret::new(key.expose_secret()) })
    }

    /// One attempt at a delivery, for the built-in graph alone. Answers the receiver's status.
    ///
    /// # Errors
    /// It was not delivered, or `delivering` is not a run of the server's own.
    pub async fn deliver_webhook(
        &self,
        delivering: RunId,
        attempt: Attempt,
        delivery: Value,
    ) -> Result<u16, DeliveryError> {
        let mut db = self.pool().acquire().await.map_err(not_now)?;
        let row = runs::find(&mut db, delivering).await.map_err(not_now)?;
        drop(db);
        if row.is_none_or(|row| row.user_id != SYSTEM_USER) {
            let message = "only the server's own runs deliver webhooks";
            return Err(DeliveryError::Refused(message.to_owned()));
        }
        let delivery: Delivery = serde_json::from_value(delivery)
            .map_err(|_| DeliveryError::Refused("the delivery cannot be read".to_owned()))?;
        let run = delivery.run.get("run_id").and_then(Value::as_str).unwrap_or_default().to_owned();
        let url = Url::parse(&delivery.url)
            .map_err(|_| DeliveryError::Refused("the URL cannot be read".to_owned()))?;
        let host = url.host_str().unwrap_or_default().to_owned();
        let lane = self.0.webhook_lanes.enter(&url)?;
        let result = self.attempt(&run, url, delivery).await;
        drop(lane);
        let outcome = match &result {
            Ok(_) => "delivered",
            Err(DeliveryError::Refused(_)) => "refused",
            Err(DeliveryError::Failed(_)) => "failed",
            Err(DeliveryError::NotNow(_) | DeliveryError::Busy(_)) => "not_started",
        };
        metrics::counter!(DELIVERIES, "outcome" => outcome).increment(1);
        if let Err(err) = &result {
            let number = attempt.number;
            let last = match err {
                DeliveryError::Refused(_) => true,
                DeliveryError::Failed(_) => attempt.last,
                DeliveryError::NotNow(_) | DeliveryError::Busy(_) => false,
            };
            if last {
                tracing::error!(
                    run.id = run,
                    host,
                    attempt = number,
                    "the end of run {run} is not told to {host}, for good: {err}"
                );
            } else {
                tracing::warn!(
                    run.id = run,
                    host,
                    attempt = number,
                    "the end of run {run} was not told to {host} yet: {err}"
                );
            }
        }
        result
    }

    async fn attempt(&self, run: &str, url: Url, delivery: Delivery) -> Result<u16, DeliveryError> {
        let key = self.webhook_key(delivery.owner).await.map_err(|err| match err {
            // The operator has to do something; until then no attempt is used up.
            err @ (SecretError::Closed(_) | SecretError::Vault(_)) => {
                DeliveryError::NotNow(err.to_string())
            }
            err => not_now(err),
        })?;
        let now = self.clock().now();
        let mut body = delivery.run;
        let sent = now.to_rfc3339_opts(chrono::SecondsFormat::Micros, false);
        body.insert("webhook_sent_at".to_owned(), sent.into());
        let body = Value::Object(body).to_string().into_bytes();
        let signature = signature::sign(&key, run, now.timestamp(), &body).map_err(|err| {
            DeliveryError::NotNow(format!("the owner's webhook key is none: {err}"))
        })?;
        let client = self.webhook_client()?;
        let request = client
            .post(url)
            .header("content-type", "application/json")
            .header("webhook-id", run)
            .header("webhook-timestamp", now.timestamp())
            .header("webhook-signature", signature)
            .body(body)
            .build()
            .map_err(|_| DeliveryError::Refused("no request can be made of this URL".to_owned()))?;
        let answer =
            send(&self.egress().webhooks, client, request).await.map_err(|err| match err {
                EgressError::Refused(refusal) => DeliveryError::Refused(refusal.to_string()),
                err => DeliveryError::Failed(err.to_string()),
            })?;
        // What the receiver says beside its status is not read.
        let status = answer.status();
        match status.as_u16() {
            200..=299 => Ok(status.as_u16()),
            300..=399 => Err(DeliveryError::Failed(format!(
                "the receiver answered {}, and redirects are not followed",
                status.as_u16()
            ))),
            410 => Err(DeliveryError::Refused("the receiver is gone (410)".to_owned())),
            other => Err(DeliveryError::Failed(format!("the receiver answered {other}"))),
        }
    }

    /// The key of a user's webhooks; made when there is none.
    async fn webhook_key(&self, owner: UserId) -> Result<SecretString, SecretError> {
        let name = key_name(owner);
        let source = SecretSource::Secret(name.clone());
        match self.secret_value(&source).await {
            Err(SecretError::Missing(_)) => {}
            found => return found,
        }
        let mut db = self.pool().acquire().await?;
        let row = self.sealed(&name, 1, &signature::new_key()).map_err(SecretError::Closed)?;
        let put = crate::store::secrets::put(&mut db, &row, owner, self.clock().now());
        // Somebody else may have made one meanwhile: whichever is stored is the key.
        crash::around("webhook key", put).await?;
        drop(db);
        self.secret_value(&source).await
    }

    fn webhook_client(&self) -> Result<&reqwest::Client, DeliveryError> {
        let kept = &self.0.webhook_client;
        if let Some(client) = kept.get() {
            return Ok(client);
        }
        let bounds = Bounds {
            idle: PATIENCE,
            total: Some(PATIENCE),
            redirects: Redirects::None,
            ..Bounds::default()
        };
        let client = self.egress().webhooks.client(&bounds).map_err(not_now)?;
        Ok(kept.get_or_init(|| client))
    }
}

fn key_name(owner: UserId) -> String {
    format!("webhooks.{owner}")
}

fn not_now(err: impl std::error::Error) -> DeliveryError {
    let mut text = err.to_string();
    let mut cause = err.source();
    while let Some(at) = cause {
        text = format!("{text}: {at}");
        cause = at.source();
    }
    DeliveryError::NotNow(text)
}
