//! What workers ask for: to register, their configuration, to be heard.
//!
//! **Invariant:** a key or a token is compared by its hash, in a time that tells nothing of it.

use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use ulid::Ulid;

use super::policy::{Content, Opened};
use super::{MAX_WORKERS, SECRETS};
use crate::ids::WorkerId;
use crate::services::Services;
use crate::services::checks;
use crate::services::error::ServiceError;
use crate::services::secrets::SecretError;
use crate::store::workers::{self as store, Ack, Registered};
use crate::store::{crash, secrets};
use crate::tls::trust::Trust;
use crate::worker::config::Token;
use crate::worker::node::{
    AckStatus, Bootstrap, CapabilityReport, ConfigAck, Configuration, Endpoints, Heartbeat,
    HeartbeatAnswer, MAX_LABELS, MAX_NAME, MAX_REPORT_BYTES, MAX_SLUG, NodeAuth, Orchestrator,
    RenewedAuth, VERSION,
};

/// How long a token stays good after another took its place.
const GRACE: Duration = Duration::from_secs(300);
/// The longest wait for a newer configuration.
const MAX_WAIT: Duration = Duration::from_secs(60);
/// Characters of an error of an acknowledgement that are kept.
const MAX_ERROR: usize = 2000;
/// Bytes of a certificate.
const MAX_CERT_BYTES: usize = 16 << 10;
/// Times that a configuration is made again because a secret of it changed meanwhile.
const TRIES: u32 = 5;
/// Words that are routes, and so no slugs.
const RESERVED: [&str; 4] = ["self", "register", "policy", "key"];

/// A worker that proved who it is.
#[derive(Debug, Clone)]
pub struct EnrolledWorker {
    /// Its id.
    pub worker_id: WorkerId,
    /// What people call it.
    pub slug: String,
    hash: [u8; 32],
}

/// What a registration showed.
pub struct Shown<'a> {
    /// Of the payload.
    pub version: u32,
    /// The server as the worker reached it.
    pub server_url: String,
    /// The key.
    pub psk: &'a SecretString,
    /// The token of an earlier registration.
    pub token: Option<&'a str>,
}

impl Services {
    /// Registers a worker, or registers it again: its tokens before are retired. Answers whether it is new.
    ///
    /// # Errors
    /// The key is wrong (`Unauthorized`) or there is none (`Forbidden`); the slug is that of a worker that is alive, and
    /// its token was not shown (`Conflict`); the report cannot be used.
    pub async fn register_worker(
        &self,
        shown: &Shown<'_>,
        report: Value,
    ) -> Result<(Bootstrap, bool), ServiceError> {
        check_version(shown.version)?;
        self.check_key(shown.psk).await?;
        let parsed = read_report(&report)?;
        let slug = parsed.node.node_slug.as_str();
        check_slug(slug)?;
        let base_url = self.check_report(&parsed)?;
        let token = fresh_token();
        let mut tx = self.transaction().await?;
        let known = store::lock_slug(&mut tx, slug).await?;
        if let Some((known, _)) = known {
            let proven = match shown.token {
                Some(token) => store::token_owner(&mut tx, &hash_of(token))
                    .await?
                    .is_some_and(|owner| owner.worker_id == known && owner.newest),
                None => false,
            };
            // Whoever has the key could otherwise take the place of any worker, and its jobs.
            if !proven && store::seen_within(&mut tx, known, self.fleet().stale_after).await? {
                return Err(ServiceError::Conflict(format!(
                    "a worker `{slug}` is alive: choose another id, or wait until it has not been heard of for {}",
                    humantime::format_duration(self.fleet().stale_after)
                )));
            }
            if !proven {
                // It may be another machine: the old one's bearer token is none of its business.
                store::replace(&mut tx, known).await?;
            }
        } else {
            if base_url.is_none() {
                return Err(ServiceError::invalid_at(
                    "/capability/worker_api/base_url",
                    "a worker says where its Worker API is when it registers",
                ));
            }
            if store::count(&mut tx).await? >= MAX_WORKERS {
                return Err(ServiceError::Conflict(format!(
                    "there are {MAX_WORKERS} workers, which is the limit: remove some first"
                )));
            }
        }
        let registered = Registered {
            worker_id: WorkerId::new(),
            slug,
            name: parsed.node.name.as_deref(),
            labels: &parsed.node.labels,
            server_url: &shown.server_url,
            base_url,
            server_cert: server_cert(&parsed),
        };
        let (worker, new) = store::register(&mut tx, &registered).await?;
        store::report(&mut tx, worker, parsed.reported_at, &report).await?;
        store::seen(&mut tx, worker).await?;
        store::retire_tokens(&mut tx, worker, Duration::ZERO).await?;
        let life = self.fleet().node_token;
        let expires_at =
            store::insert_token(&mut tx, worker, &hash_of(token.expose()), life).await?;
        self.issue_config(&mut tx, worker, false).await?;
        let initial_config_version = store::issued_version(&mut tx, worker).await?;
        crash::commit(tx, "worker registered").await?;
        self.fleet_changed();
        tracing::info!(worker = slug, new, "the worker {slug} registered");
        let base_url = self.fleet().public_url.clone().unwrap_or_else(|| shown.server_url.clone());
        let bootstrap = Bootstrap {
            version: VERSION,
            issued_at: self.clock().now(),
            orchestrator: Orchestrator { endpoints: endpoints(&base_url), base_url },
            auth: NodeAuth { node_jwt: token, expires_at },
            trust: self.trust(),
            initial_config_version,
            heartbeat_seconds: Some(self.fleet().heartbeat.as_secs().max(1)),
        };
        Ok((bootstrap, new))
    }

    /// Who has this token.
    pub async fn authenticate_worker(&self, token: &str) -> Result<EnrolledWorker, ServiceError> {
        let hash = hash_of(token);
        let mut db = self.pool().acquire().await?;
        match store::token_owner(&mut db, &hash).await? {
            Some(owner) if owner.live => {
                if !owner.used {
                    crash::around("worker token used", store::use_token(&mut db, &hash)).await?;
                }
                Ok(EnrolledWorker { worker_id: owner.worker_id, slug: owner.slug, hash })
            }
            _ => Err(refused_token()),
        }
    }

    /// The worker's newest configuration. With `after` only one that is greater, which is waited for.
    pub async fn worker_config(
        &self,
        worker: &EnrolledWorker,
        after: Option<&str>,
        wait: Duration,
    ) -> Result<Option<Configuration>, ServiceError> {
        let mut version = {
            let mut db = self.pool().acquire().await?;
            store::issued_version(&mut db, worker.worker_id).await?
        };
        let newer = |version: &Option<String>| match (version, after) {
            (Some(version), Some(after)) => version.as_str() > after,
            (Some(_), None) => true,
            (None, _) => false,
        };
        if !newer(&version) {
            version = self.later_config(worker.worker_id, wait.min(MAX_WAIT), newer).await;
            // Somebody else may have taken its place meanwhile.
            let mut db = self.pool().acquire().await?;
            if !store::token_owner(&mut db, &worker.hash).await?.is_some_and(|owner| owner.live) {
                return Err(refused_token());
            }
        }
        let Some(version) = version.filter(|version| newer(&Some(version.clone()))) else {
            return match after {
                Some(_) => Ok(None),
                None => {
                    Err(ServiceError::unavailable("there is no configuration for this worker yet"))
                }
            };
        };
        self.opened_config(worker, version).await.map(Some)
    }

    /// A configuration with its secrets. One whose secrets have changed since is made again first: what a version
    /// holds never changes.
    async fn opened_config(
        &self,
        worker: &EnrolledWorker,
        mut version: String,
    ) -> Result<Configuration, ServiceError> {
        for _ in 0..TRIES {
            let mut db = self.pool().acquire().await?;
            let found = store::config(&mut db, worker.worker_id, &version).await?;
            let (content, issued_at) =
                found.ok_or_else(|| ServiceError::not_found("configuration", &version))?;
            drop(db);
            let content: Content =
                serde_json::from_value(content).map_err(ServiceError::internal)?;
            let mut current = true;
            let registry = content.policy.sandbox_registry.pull_token_secret.as_deref();
            let cache = content.policy.model_cache.pull_token_secret.as_deref();
            let opened = Opened {
                bearer: self.opened(&content.bearer_secret).await?.0,
                registry: self.pull_token(&content, registry, &mut current).await?,
                cache: self.pull_token(&content, cache, &mut current).await?,
            };
            if current {
                return Ok(content.configuration(version, issued_at, &opened));
            }
            let mut tx = self.transaction().await?;
            self.issue_config(&mut tx, worker.worker_id, false).await?;
            version = store::issued_version(&mut tx, worker.worker_id).await?.unwrap_or(version);
            crash::commit(tx, "worker config made").await?;
        }
        Err(ServiceError::unavailable("the configuration changes too fast: ask again"))
    }

    /// Stores what became of a configuration. One about an older configuration than the last changes nothing.
    pub async fn acknowledge_config(
        &self,
        worker: &EnrolledWorker,
        ack: &ConfigAck,
    ) -> Result<(), ServiceError> {
        check_version(ack.version)?;
        if ack.node_slug != worker.slug {
            return Err(ServiceError::BadRequest(format!(
                "`node_slug` is `{}`, but this token is that of `{}`",
                ack.node_slug.chars().take(MAX_SLUG).collect::<String>(),
                worker.slug
            )));
        }
        let mut tx = self.transaction().await?;
        let Some(row) = store::lock(&mut tx, worker.worker_id).await? else {
            return Err(refused_token());
        };
        let found = match Ulid::from_string(&ack.config_version) {
            Ok(_) => store::config(&mut tx, worker.worker_id, &ack.config_version).await?,
            Err(_) => None,
        };
        let Some((content, _)) = found else {
            return Err(ServiceError::BadRequest(
                "`config_version` is none of those that were issued to this worker".to_owned(),
            ));
        };
        if row.ack_version.as_ref().is_some_and(|last| *last > ack.config_version) {
            return Ok(());
        }
        if row.config_version.as_ref() == Some(&ack.config_version)
            && ack.status != AckStatus::Applied
        {
            return Err(ServiceError::BadRequest(
                "this configuration was acknowledged as applied: only a later one can fail"
                    .to_owned(),
            ));
        }
        let error = ack.error.as_ref().map(|error| {
            let text = format!("{}: {}", error.kind, error.message);
            text.chars().filter(|c| !c.is_control()).take(MAX_ERROR).collect::<String>()
        });
        let stored = Ack {
            config_version: &ack.config_version,
            at: ack.ack_at,
            status: ack.status.as_str(),
            error: error.as_deref().filter(|_| ack.status != AckStatus::Applied),
        };
        store::acknowledge(&mut tx, worker.worker_id, &stored).await?;
        if ack.status == AckStatus::Applied {
            let content: Content =
                serde_json::from_value(content).map_err(ServiceError::internal)?;
            // The tokens before it will not be shown any more.
            let prefix = format!("{SECRETS}{}.", worker.worker_id);
            let serial = content.bearer_secret.strip_prefix(&prefix).and_then(|n| n.parse().ok());
            for earlier in 1..serial.unwrap_or(1_i32) {
                secrets::delete(&mut tx, &format!("{prefix}{earlier}")).await?;
            }
        }
        crash::commit(tx, "config acknowledged").await?;
        self.fleet_changed();
        let status = ack.status.as_str();
        match &error {
            Some(error) => {
                tracing::warn!(
                    worker = worker.slug,
                    version = ack.config_version,
                    error,
                    "the worker {}: {status}",
                    worker.slug
                );
            }
            None => {
                tracing::info!(
                    worker = worker.slug,
                    version = ack.config_version,
                    "the worker {}: {status}",
                    worker.slug
                );
            }
        }
        Ok(())
    }

    /// Stores what a worker says that it can do.
    pub async fn report_worker(
        &self,
        worker: &EnrolledWorker,
        report: Value,
    ) -> Result<(), ServiceError> {
        let parsed = read_report(&report)?;
        if parsed.node.node_slug != worker.slug {
            return Err(ServiceError::invalid_at(
                "/node/node_slug",
                format!("this token is that of `{}`", worker.slug),
            ));
        }
        let base_url = self.check_report(&parsed)?;
        let mut tx = self.transaction().await?;
        if store::lock(&mut tx, worker.worker_id).await?.is_none() {
            return Err(refused_token());
        }
        let name = parsed.node.name.as_deref();
        let labels = &parsed.node.labels;
        let cert = server_cert(&parsed);
        store::describe(&mut tx, worker.worker_id, name, labels, base_url, cert).await?;
        store::report(&mut tx, worker.worker_id, parsed.reported_at, &report).await?;
        store::seen(&mut tx, worker.worker_id).await?;
        self.issue_config(&mut tx, worker.worker_id, false).await?;
        crash::commit(tx, "worker reported").await?;
        self.fleet_changed();
        Ok(())
    }

    /// Stores a sign of life of whoever has this token, in one statement.
    pub async fn beat(
        &self,
        token: &str,
        heartbeat: &Heartbeat,
    ) -> Result<HeartbeatAnswer, ServiceError> {
        check_version(heartbeat.version)?;
        let number = |number: u32| i32::try_from(number).unwrap_or(i32::MAX);
        let mut db = self.pool().acquire().await?;
        let (running, queued) = (number(heartbeat.running), number(heartbeat.queued));
        let hash = hash_of(token);
        let beat = store::beat(&mut db, &hash, heartbeat.ready, running, queued);
        let row = crash::around("heartbeat", beat).await?.ok_or_else(refused_token)?;
        Ok(HeartbeatAnswer {
            version: VERSION,
            config_version: row.issued_version,
            drained: row.drained,
            heartbeat_seconds: self.fleet().heartbeat.as_secs().max(1),
        })
    }

    /// A fresh token; the one that was shown stays good for a few minutes.
    pub async fn renew_worker_token(
        &self,
        worker: &EnrolledWorker,
    ) -> Result<RenewedAuth, ServiceError> {
        let token = fresh_token();
        let mut tx = self.transaction().await?;
        if store::lock(&mut tx, worker.worker_id).await?.is_none() {
            return Err(refused_token());
        }
        // Somebody else may have registered this worker anew since the token was looked at.
        if !store::token_owner(&mut tx, &worker.hash).await?.is_some_and(|owner| owner.live) {
            return Err(refused_token());
        }
        store::retire_tokens(&mut tx, worker.worker_id, GRACE).await?;
        let life = self.fleet().node_token;
        let hash = hash_of(token.expose());
        let expires_at = store::insert_token(&mut tx, worker.worker_id, &hash, life).await?;
        crash::commit(tx, "worker token renewed").await?;
        Ok(RenewedAuth { version: VERSION, auth: NodeAuth { node_jwt: token, expires_at } })
    }

    /// A worker goes for good.
    pub async fn unregister_worker(&self, worker: &EnrolledWorker) -> Result<(), ServiceError> {
        self.forget_worker(worker.worker_id).await?;
        tracing::info!(worker = worker.slug, "the worker {} unregistered", worker.slug);
        Ok(())
    }

    async fn check_key(&self, shown: &SecretString) -> Result<(), ServiceError> {
        let shown = hash_of(shown.expose_secret());
        let (mut any, mut right) = (false, subtle::Choice::from(0));
        for source in &self.fleet().registration_keys {
            let key = match self.secret_value(source).await {
                Ok(key) => key,
                Err(err @ (SecretError::Missing(_) | SecretError::NoVariable(_))) => {
                    tracing::debug!(
                        error = &err as &dyn std::error::Error,
                        "{source} is no key to register with"
                    );
                    continue;
                }
                Err(err) => {
                    return Err(ServiceError::Unavailable {
                        message: "the keys that register workers cannot be read now".to_owned(),
                        source: Some(Box::new(err)),
                    });
                }
            };
            any = true;
            right |= hash_of(key.expose_secret()).ct_eq(&shown);
        }
        if !any {
            return Err(ServiceError::Forbidden(
                "workers cannot register: there is no key; make one with `cynai workers key`"
                    .to_owned(),
            ));
        }
        if !bool::from(right) {
            return Err(ServiceError::Unauthorized(
                "this key does not register workers".to_owned(),
            ));
        }
        Ok(())
    }

    /// Checks what a report says of the worker itself; answers where its Worker API is.
    fn check_report<'a>(
        &self,
        report: &'a CapabilityReport,
    ) -> Result<Option<&'a str>, ServiceError> {
        let node = &report.node;
        if let Some(name) = &node.name {
            checks::text("name", name, MAX_NAME)?;
        }
        if node.labels.len() > MAX_LABELS {
            let message = format!("at most {MAX_LABELS} labels are kept");
            return Err(ServiceError::invalid_at("/node/labels", message));
        }
        for label in &node.labels {
            checks::text("labels", label, MAX_NAME)?;
        }
        if server_cert(report).is_some_and(|pem| pem.len() > MAX_CERT_BYTES) {
            let message = format!("a certificate has at most {MAX_CERT_BYTES} bytes");
            return Err(ServiceError::invalid_at("/tls/worker_api_server_cert_pem", message));
        }
        let api = report.worker_api.as_ref().and_then(|api| api.base_url.as_deref());
        if server_cert(report).is_some() && api.is_some_and(|url| !url.starts_with("https:")) {
            return Err(ServiceError::invalid_at(
                "/worker_api/base_url",
                "a worker that shows a certificate is reached by https",
            ));
        }
        if let Some(pem) = server_cert(report) {
            Trust::exactly(pem).and_then(Trust::client_config).map_err(|_| {
                ServiceError::invalid_at(
                    "/tls/worker_api_server_cert_pem",
                    "this is no certificate in PEM",
                )
            })?;
        }
        let url = report.worker_api.as_ref().and_then(|api| api.base_url.as_deref());
        if let Some(url) = url {
            self.check_worker_url(url)
                .map_err(|problem| ServiceError::invalid_at("/worker_api/base_url", problem))?;
        }
        Ok(url)
    }

    async fn opened(&self, name: &str) -> Result<(SecretString, String), ServiceError> {
        self.stored_secret(name).await.map_err(|err| ServiceError::Unavailable {
            message: "the configuration cannot be made complete: a secret of it does not open"
                .to_owned(),
            source: Some(Box::new(err)),
        })
    }

    /// A secret that the policy names; `current` becomes false when it is not the one that the configuration means.
    async fn pull_token(
        &self,
        content: &Content,
        name: Option<&str>,
        current: &mut bool,
    ) -> Result<Option<SecretString>, ServiceError> {
        let Some(name) = name else { return Ok(None) };
        let (value, mark) = self.opened(name).await?;
        *current &= content.secret_marks.iter().any(|(known, of)| known == name && *of == mark);
        Ok(Some(value))
    }
}

fn endpoints(base_url: &str) -> Endpoints {
    let at = |path: &str| format!("{base_url}/v1/nodes/{path}");
    Endpoints {
        worker_registration_url: at("register"),
        node_config_url: at("self/config"),
        node_report_url: at("self/report"),
        node_self_unregister_url: at("self"),
        node_heartbeat_url: Some(at("self/heartbeat")),
        node_token_url: Some(at("self/token")),
    }
}

fn read_report(report: &Value) -> Result<CapabilityReport, ServiceError> {
    let version = report["version"].as_u64().and_then(|version| u32::try_from(version).ok());
    check_version(version.unwrap_or(0))?;
    let size = report.to_string().len();
    if size > MAX_REPORT_BYTES {
        return Err(checks::over("capability", size, MAX_REPORT_BYTES));
    }
    if let Some(object) = report.as_object() {
        checks::object("capability", object, MAX_REPORT_BYTES)?;
    }
    serde::Deserialize::deserialize(report).map_err(|err| {
        ServiceError::invalid_at("/capability", format!("the report is not right: {err}"))
    })
}

fn check_version(received: u32) -> Result<(), ServiceError> {
    if received == VERSION {
        return Ok(());
    }
    Err(ServiceError::UnsupportedVersion(format!(
        "the payload has version {received}; this server reads version {VERSION}"
    )))
}

fn check_slug(slug: &str) -> Result<(), ServiceError> {
    let word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let good = slug.len() <= MAX_SLUG
        && slug.bytes().next().is_some_and(word)
        && slug.bytes().all(|byte| word(byte) || b"._-".contains(&byte))
        && !RESERVED.contains(&slug);
    if good {
        return Ok(());
    }
    Err(ServiceError::invalid_at(
        "/capability/node/node_slug",
        format!(
            "a worker's id is 1 to {MAX_SLUG} of a-z, 0-9, `.`, `_` and `-`, beginning with a letter or digit, and none of {}",
            RESERVED.join(", ")
        ),
    ))
}

fn server_cert(report: &CapabilityReport) -> Option<&str> {
    report.tls.as_ref()?.worker_api_server_cert_pem.as_deref()
}

fn fresh_token() -> Token {
    Token::new(format!("cynw_{}", Token::random().expose()))
}

fn hash_of(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

fn refused_token() -> ServiceError {
    ServiceError::Unauthorized(
        "this token is not that of a worker, or its time is over: register again".to_owned(),
    )
}
