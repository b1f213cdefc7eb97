//! Worker machines: who they are, what they are configured with, who gets jobs.
//!
//! `enrol` is what workers ask for, this file what administrators ask for; `policy` says what a configuration
//! holds, `reach` watches all workers and knows how to speak to each.
//!
//! **Invariant:** a worker's status is never stored: it follows from what it said, when it was last heard of,
//! and whether an administrator took it out of service.
//! **Invariant:** a configuration is stored without secrets, and a worker's bearer token only sealed.

mod enrol;
pub mod policy;
mod reach;

use std::time::Duration;

use chrono::{DateTime, Utc};
use secrecy::SecretString;
use serde::Serialize;
use serde_json::{Value, json};
use sqlx::PgConnection;
use ulid::Ulid;
use utoipa::ToSchema;

use super::Services;
use super::access::Secret;
use super::api::{Actor, instant, optional_instant};
use super::error::ServiceError;
use super::secrets::{SecretError, mark};
use crate::config::values::SecretSource;
use crate::egress::address::Allowed;
use crate::egress::guard::Guard;
use crate::ids::WorkerId;
use crate::store::webhooks::SYSTEM_USER;
use crate::store::workers::{self as store, WorkerFilter, WorkerInfo, WorkerRow};
use crate::store::{crash, secrets};
use crate::worker::config::Token;
use crate::worker::node::Trust;
use policy::{Content, FleetPolicy};

pub use enrol::{EnrolledWorker, Shown};
pub use reach::KnownWorker;

pub use crate::worker::node::{ConfigAck, Heartbeat};
pub(super) use reach::{Candidates, Directory};

/// Secrets whose names begin so are the server's own.
pub(super) const SECRETS: &str = "worker.";
/// The stored secret that workers register with, unless the configuration names others.
pub const REGISTRATION_KEY: &str = "worker-registration";
/// The one before it, which is still good until it is deleted.
pub const PREVIOUS_REGISTRATION_KEY: &str = "worker-registration-previous";
/// Workers of one installation.
const MAX_WORKERS: i64 = 10_000;
/// Characters of the reason of a drain.
const MAX_REASON: usize = 500;
/// Metadata addresses of clouds in networks where workers may be.
const METADATA: [&str; 2] = ["100.100.100.200", "[fd00:ec2::254]"];
/// Where a worker may be, beside public addresses: not at a link-local one.
const WORKER_NETWORKS: [&str; 7] = [
    "127.0.0.0/8",
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
    "::1/128",
    "fc00::/7",
];

/// What an operator decides about the fleet with the server's configuration.
#[derive(Debug, Clone)]
pub struct FleetConfig {
    /// Any of them lets a worker register; those that do not exist are passed over.
    pub registration_keys: Vec<SecretSource>,
    /// The server as workers reach it; without it, as they did reach it.
    pub public_url: Option<String>,
    /// Between two signs of life.
    pub heartbeat: Duration,
    /// After this without one a worker gets no new jobs.
    pub stale_after: Duration,
    /// How long a worker's token is good.
    pub node_token: Duration,
    /// Certificates, PEM, that workers may trust the server by.
    pub ca_bundle_pem: Option<String>,
}

impl Default for FleetConfig {
    fn default() -> Self {
        let stored = |name: &str| SecretSource::Secret(name.to_owned());
        Self {
            registration_keys: vec![stored(REGISTRATION_KEY), stored(PREVIOUS_REGISTRATION_KEY)],
            public_url: None,
            heartbeat: Duration::from_secs(10),
            stale_after: Duration::from_secs(30),
            node_token: Duration::from_secs(24 * 3600),
            ca_bundle_pem: None,
        }
    }
}

/// A worker, for an administrator.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct WorkerView {
    /// Its id.
    #[schema(value_type = uuid::Uuid)]
    pub worker_id: WorkerId,
    /// Its name on the wire: unique.
    pub node_slug: String,
    /// As it calls itself.
    pub name: Option<String>,
    /// As it reported them.
    pub labels: Vec<String>,
    /// `registered` (no configuration is in force), `active` (gets jobs), `inactive` (not heard of), `drained`.
    pub status: String,
    /// Why it gets no jobs, when it does not.
    pub reason: Option<String>,
    /// First registration.
    #[serde(with = "instant")]
    pub created_at: DateTime<Utc>,
    /// Latest registration.
    #[serde(with = "instant")]
    pub registered_at: DateTime<Utc>,
    /// Latest sign of life.
    #[serde(with = "optional_instant")]
    pub last_seen_at: Option<DateTime<Utc>>,
    /// Its Worker API: what an administrator said, or else what it reported.
    pub worker_api_url: Option<String>,
    /// What an administrator said.
    pub worker_api_url_override: Option<String>,
    /// Whether its certificate is pinned: only that one is accepted.
    pub tls_pinned: bool,
    /// Whether it says that it can take jobs.
    pub ready: bool,
    /// Jobs that run there, as it says.
    pub running: i32,
    /// Jobs that wait there, as it says.
    pub queued: i32,
    /// Jobs that it was given and whose end is not known here.
    pub open_jobs: i64,
    /// How many jobs it runs at once.
    pub slots: Option<i64>,
    /// Since when it is out of service.
    #[serde(with = "optional_instant")]
    pub drained_at: Option<DateTime<Utc>>,
    /// Who took it out.
    pub drained_by: Option<String>,
    /// Why.
    pub drain_reason: Option<String>,
    /// The newest configuration.
    pub issued_config_version: Option<String>,
    /// The last one that it applied.
    pub config_version: Option<String>,
    /// What it said last of a configuration: which one.
    pub config_ack_version: Option<String>,
    /// When, by its clock.
    #[serde(with = "optional_instant")]
    pub config_ack_at: Option<DateTime<Utc>>,
    /// `applied`, `failed` or `rolled_back`.
    pub config_ack_status: Option<String>,
    /// Why it was not applied.
    pub config_ack_error: Option<String>,
    /// What an administrator decided for it alone.
    pub policy_patch: Value,
    /// When its last report came.
    #[serde(with = "optional_instant")]
    pub last_capability_at: Option<DateTime<Utc>>,
    /// The report, whole. Lists leave it out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capability: Option<Value>,
}

/// The policy of all workers.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct PolicyView {
    /// As it was set; what is left out has its default.
    pub policy: Value,
    /// With all defaults.
    pub effective: FleetPolicy,
    /// Grows with each change, and when a secret changes that workers may be configured with.
    pub revision: i64,
}

/// A fresh key to register with.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct RegistrationKeyView {
    /// The key; it cannot be shown again.
    pub key: Secret,
    /// Whether the key before it is still good.
    pub previous_is_good: bool,
}

/// Which workers a list shows.
#[derive(Debug, Clone, Default)]
pub struct ListWorkers {
    /// Only with this status.
    pub status: Option<String>,
    /// Only with all of these labels.
    pub labels: Vec<String>,
    /// Only after this slug.
    pub after: Option<String>,
    /// At most so many.
    pub limit: u32,
}

/// What an administrator changes about one worker.
#[derive(Debug, Clone, Default)]
pub struct ChangeWorker {
    /// A merge patch over the policy of all workers, in place of the one before.
    pub policy_patch: Option<Value>,
    /// Where its Worker API is, whatever it reports; `Some(None)` takes that back.
    pub worker_api_url: Option<Option<String>>,
}

impl Services {
    /// Gives the operations what an operator decided about workers, once.
    pub fn set_fleet(&self, config: FleetConfig) {
        if self.0.fleet.set(config).is_err() {
            tracing::warn!("the fleet was configured before: the first configuration stays");
        }
    }

    pub(super) fn fleet(&self) -> &FleetConfig {
        self.0.fleet.get_or_init(FleetConfig::default)
    }

    /// Workers by slug. Only an admin may ask.
    pub async fn list_workers(
        &self,
        actor: &Actor,
        request: &ListWorkers,
    ) -> Result<Vec<WorkerView>, ServiceError> {
        only_admin(actor)?;
        let statuses = ["registered", "active", "inactive", "drained"];
        if let Some(status) = &request.status
            && !statuses.contains(&status.as_str())
        {
            let known = statuses.join(", ");
            return Err(ServiceError::invalid_at("/status", format!("`status` is one of {known}")));
        }
        for label in &request.labels {
            super::checks::text("label", label, 128)?;
        }
        if let Some(after) = &request.after {
            super::checks::text("after", after, 128)?;
        }
        let filter = WorkerFilter {
            status: request.status.as_deref(),
            labels: &request.labels,
            after: request.after.as_deref().unwrap_or_default(),
            ..WorkerFilter::default()
        };
        let limit = self.page_limit(request.limit)?;
        let mut db = self.pool().acquire().await?;
        let rows = store::list(&mut db, &filter, self.fleet().stale_after, limit).await?;
        Ok(rows.into_iter().map(view).collect())
    }

    /// A worker with its last report. Only an admin may ask.
    pub async fn get_worker(&self, actor: &Actor, slug: &str) -> Result<WorkerView, ServiceError> {
        only_admin(actor)?;
        possible(slug)?;
        let filter = WorkerFilter { slug: Some(slug), ..WorkerFilter::default() };
        let mut db = self.pool().acquire().await?;
        let found = store::list(&mut db, &filter, self.fleet().stale_after, 1).await?.pop();
        found.map(view).ok_or_else(|| ServiceError::not_found("worker", slug))
    }

    /// Takes a worker out of service: it gets no new jobs, also after it has started again. Only an admin may.
    pub async fn drain_worker(
        &self,
        actor: &Actor,
        slug: &str,
        reason: Option<&str>,
    ) -> Result<WorkerView, ServiceError> {
        if let Some(reason) = reason {
            super::checks::text("reason", reason, MAX_REASON)?;
        }
        self.change(actor, slug, "worker drained", async |db, worker| {
            Ok(store::drain(db, worker.worker_id, Some(&actor.name), reason).await?)
        })
        .await?;
        tracing::info!(worker = slug, by = %actor.name, reason, "the worker {slug} is drained");
        self.get_worker(actor, slug).await
    }

    /// Takes a worker back into service. Only an admin may.
    pub async fn undrain_worker(
        &self,
        actor: &Actor,
        slug: &str,
    ) -> Result<WorkerView, ServiceError> {
        self.change(actor, slug, "worker undrained", async |db, worker| {
            Ok(store::drain(db, worker.worker_id, None, None).await?)
        })
        .await?;
        tracing::info!(worker = slug, by = %actor.name, "the worker {slug} is in service again");
        self.get_worker(actor, slug).await
    }

    /// Makes a worker's configuration again; with `rotate` it brings a new bearer token. Only an admin may.
    pub async fn refresh_worker(
        &self,
        actor: &Actor,
        slug: &str,
        rotate: bool,
    ) -> Result<WorkerView, ServiceError> {
        self.change(actor, slug, "worker refreshed", async |db, worker| {
            if rotate {
                store::next_token(db, worker.worker_id).await?;
            }
            self.issue_config(db, worker.worker_id, true).await
        })
        .await?;
        tracing::info!(worker = slug, by = %actor.name, rotate, "the worker {slug} gets a new configuration");
        self.get_worker(actor, slug).await
    }

    /// Changes what was decided for one worker. Only an admin may.
    pub async fn change_worker(
        &self,
        actor: &Actor,
        slug: &str,
        change: &ChangeWorker,
    ) -> Result<WorkerView, ServiceError> {
        if let Some(Some(url)) = &change.worker_api_url {
            self.check_worker_url(url)
                .map_err(|problem| ServiceError::invalid_at("/worker_api_url", problem))?;
        }
        self.change(actor, slug, "worker changed", async |db, worker| {
            let patch = change.policy_patch.as_ref().unwrap_or(&worker.patch);
            if !patch.is_object() {
                let message = "the patch is a JSON object";
                return Err(ServiceError::invalid_at("/policy_patch", message));
            }
            self.check_policy(db, patch).await?;
            if let Some(Some(url)) = &change.worker_api_url
                && worker.pinned
                && !url.starts_with("https:")
            {
                return Err(ServiceError::invalid_at(
                    "/worker_api_url",
                    "this worker shows a certificate: its address begins with https",
                ));
            }
            let url = match &change.worker_api_url {
                Some(url) => url.as_deref(),
                None => worker.url_override.as_deref(),
            };
            store::set_patch(db, worker.worker_id, patch, url).await?;
            self.issue_config(db, worker.worker_id, false).await
        })
        .await?;
        tracing::info!(worker = slug, by = %actor.name, "the worker {slug} was changed");
        self.get_worker(actor, slug).await
    }

    /// Removes a worker: its token is refused from now on, and its jobs count as lost. Only an admin may.
    pub async fn remove_worker(&self, actor: &Actor, slug: &str) -> Result<(), ServiceError> {
        only_admin(actor)?;
        possible(slug)?;
        let mut db = self.pool().acquire().await?;
        let worker = store::find_slug(&mut db, slug).await?;
        let worker = worker.ok_or_else(|| ServiceError::not_found("worker", slug))?;
        drop(db);
        self.forget_worker(worker).await?;
        tracing::info!(worker = slug, by = %actor.name, "the worker {slug} was removed");
        Ok(())
    }

    /// The policy of all workers. Only an admin may ask.
    pub async fn fleet_policy(&self, actor: &Actor) -> Result<PolicyView, ServiceError> {
        only_admin(actor)?;
        let mut db = self.pool().acquire().await?;
        let (policy, revision) = store::policy(&mut db).await?;
        let effective = FleetPolicy::merged(&policy, &json!({}))?;
        Ok(PolicyView { policy, effective, revision })
    }

    /// Sets the policy of all workers; each gets a new configuration. Only an admin may.
    pub async fn set_fleet_policy(
        &self,
        actor: &Actor,
        policy: &Value,
    ) -> Result<PolicyView, ServiceError> {
        only_admin(actor)?;
        if !policy.is_object() {
            return Err(ServiceError::invalid("the policy is a JSON object"));
        }
        let merged = FleetPolicy::merged(policy, &json!({}))?;
        let mut tx = self.transaction().await?;
        self.secret_marks(&mut tx, &merged).await?;
        let revision = store::set_policy(&mut tx, policy, &actor.name).await?;
        crash::commit(tx, "fleet policy set").await?;
        self.fleet_changed();
        tracing::info!(by = %actor.name, revision, "the policy of all workers was set");
        self.fleet_policy(actor).await
    }

    /// Makes a key to register with. The one before stays good until it is revoked. Only an admin may.
    pub async fn make_registration_key(
        &self,
        actor: &Actor,
    ) -> Result<RegistrationKeyView, ServiceError> {
        only_admin(actor)?;
        let usual = SecretSource::Secret(REGISTRATION_KEY.to_owned());
        if !self.fleet().registration_keys.contains(&usual) {
            return Err(ServiceError::Conflict(format!(
                "the server's configuration names other keys (`fleet.registration_keys`); add {{secret: {REGISTRATION_KEY}}} to them"
            )));
        }
        let before = match self.secret_value(&usual).await {
            Ok(before) => Some(before),
            Err(SecretError::Missing(_)) => None,
            Err(err) => {
                return Err(ServiceError::Unavailable {
                    message: "the key before cannot be read, and so not be kept".to_owned(),
                    source: Some(Box::new(err)),
                });
            }
        };
        if let Some(before) = &before {
            self.put_secret(actor.user_id, PREVIOUS_REGISTRATION_KEY, before).await?;
        }
        let key = format!("cynk_{}", Token::random().expose());
        self.put_secret(actor.user_id, REGISTRATION_KEY, &SecretString::from(key.as_str())).await?;
        tracing::info!(by = %actor.name, "a key to register workers was made");
        let previous_is_good = before.is_some()
            && self
                .fleet()
                .registration_keys
                .contains(&SecretSource::Secret(PREVIOUS_REGISTRATION_KEY.to_owned()));
        Ok(RegistrationKeyView { key: Secret::new(&key), previous_is_good })
    }

    /// Refuses the key before the newest from now on. Only an admin may.
    pub async fn revoke_previous_key(&self, actor: &Actor) -> Result<(), ServiceError> {
        only_admin(actor)?;
        let mut db = self.pool().acquire().await?;
        let gone = secrets::delete(&mut db, PREVIOUS_REGISTRATION_KEY);
        if !crash::around("registration key revoked", gone).await? {
            return Err(ServiceError::not_found("registration key", "previous"));
        }
        tracing::info!(by = %actor.name, "the previous key to register workers was revoked");
        Ok(())
    }

    async fn change(
        &self,
        actor: &Actor,
        slug: &str,
        name: &'static str,
        change: impl AsyncFnOnce(&mut PgConnection, &WorkerRow) -> Result<(), ServiceError>,
    ) -> Result<(), ServiceError> {
        only_admin(actor)?;
        let mut tx = self.transaction().await?;
        let missing = || ServiceError::not_found("worker", slug);
        possible(slug)?;
        let worker = store::find_slug(&mut tx, slug).await?.ok_or_else(missing)?;
        let worker = store::lock(&mut tx, worker).await?.ok_or_else(missing)?;
        change(&mut tx, &worker).await?;
        crash::commit(tx, name).await?;
        self.fleet_changed();
        Ok(())
    }

    async fn forget_worker(&self, worker: WorkerId) -> Result<(), ServiceError> {
        let mut tx = self.transaction().await?;
        store::remove(&mut tx, worker).await?;
        secrets::delete_prefix(&mut tx, &format!("{SECRETS}{worker}.")).await?;
        crash::commit(tx, "worker removed").await?;
        self.fleet_changed();
        self.lose_jobs_of(&reach::name_of(worker)).await
    }

    /// Makes the worker's configuration, and issues it when it differs from the newest, or in any case with `force`.
    /// The caller holds the worker's lock.
    async fn issue_config(
        &self,
        db: &mut PgConnection,
        worker: WorkerId,
        force: bool,
    ) -> Result<(), ServiceError> {
        let Some(row) = store::lock(db, worker).await? else { return Ok(()) };
        let (all, revision) = store::policy(db).await?;
        let policy = FleetPolicy::merged(&all, &row.patch)?;
        let secret_marks = self.secret_marks(db, &policy).await?;
        store::made(db, worker, revision).await?;
        let Some(target_url) = row.url_override.or(row.base_url) else { return Ok(()) };
        let content = Content {
            slug: row.slug,
            base_url: self.fleet().public_url.clone().unwrap_or(row.server_url),
            target_url: target_url.trim_end_matches('/').to_owned(),
            bearer_secret: format!("{SECRETS}{worker}.{}", row.token_serial),
            policy,
            secret_marks,
            trust: self.trust(),
        };
        let content = serde_json::to_value(&content).map_err(ServiceError::internal)?;
        let newest = match &row.issued_version {
            Some(version) => store::config(db, worker, version).await?,
            None => None,
        };
        self.seal_bearer(db, worker, row.token_serial).await?;
        if !force && newest.is_some_and(|(newest, _)| newest == content) {
            return Ok(());
        }
        let version = later(row.issued_version.as_deref());
        store::issue(db, worker, &version, &content).await?;
        Ok(())
    }

    /// Makes the worker's bearer token of this number, unless there is one.
    async fn seal_bearer(
        &self,
        db: &mut PgConnection,
        worker: WorkerId,
        serial: i32,
    ) -> Result<(), ServiceError> {
        let name = format!("{SECRETS}{worker}.{serial}");
        if secrets::find(db, &name).await?.is_some() {
            return Ok(());
        }
        let token = SecretString::from(Token::random().expose());
        let row = self.sealed(&name, 1, &token).map_err(|reason| {
            ServiceError::unavailable(format!("workers cannot be configured: {reason}"))
        })?;
        secrets::put(db, &row, SYSTEM_USER, self.clock().now()).await?;
        Ok(())
    }

    async fn check_policy(&self, db: &mut PgConnection, patch: &Value) -> Result<(), ServiceError> {
        let (all, _) = store::policy(db).await?;
        let merged = FleetPolicy::merged(&all, patch)?;
        self.secret_marks(db, &merged).await.map(|_| ())
    }

    async fn secret_marks(
        &self,
        db: &mut PgConnection,
        policy: &FleetPolicy,
    ) -> Result<Vec<(String, String)>, ServiceError> {
        let mut marks = Vec::new();
        for name in policy.secrets() {
            let row = secrets::find(db, name).await?.ok_or_else(|| {
                ServiceError::invalid(format!(
                    "there is no secret `{name}`: make it with `cynai secrets set {name}`"
                ))
            })?;
            marks.push((name.to_owned(), mark(&row)));
        }
        Ok(marks)
    }

    /// Whether the server would speak to a worker there.
    fn check_worker_url(&self, text: &str) -> Result<(), String> {
        let url = policy::base_url(text)?;
        if METADATA.iter().any(|address| url.host_str() == Some(address)) {
            return Err("clouds keep their metadata there".to_owned());
        }
        worker_guard().check(&url).map_err(|refusal| refusal.to_string())
    }

    fn trust(&self) -> Option<Trust> {
        let pem = self.fleet().ca_bundle_pem.clone()?;
        Some(Trust { ca_bundle_pem: Some(pem), pinned_spki_sha256: None })
    }
}

/// Where workers may be.
fn worker_guard() -> Guard {
    // The entries are constants, and a test reads them.
    Guard::new(Allowed::parse(&WORKER_NETWORKS).unwrap_or_default())
}

/// A version that is greater than `before`, and than all that was issued earlier elsewhere.
fn later(before: Option<&str>) -> String {
    let now = Ulid::new();
    let before = before.and_then(|text| Ulid::from_string(text).ok());
    let next = match before.filter(|before| *before >= now) {
        // Another server's clock is ahead.
        Some(before) => before.increment().unwrap_or(now),
        None => now,
    };
    next.to_string()
}

/// A slug that no worker can have is that of none.
fn possible(slug: &str) -> Result<(), ServiceError> {
    if slug.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(());
    }
    Err(ServiceError::not_found("worker", "of this id"))
}

fn only_admin(actor: &Actor) -> Result<(), ServiceError> {
    if actor.admin {
        return Ok(());
    }
    Err(ServiceError::Forbidden("only an admin may do this".to_owned()))
}

fn view(row: WorkerInfo) -> WorkerView {
    let reason = match row.status.as_str() {
        "drained" => Some(match &row.drain_reason {
            Some(reason) => format!("drained: {reason}"),
            None => "drained by an administrator".to_owned(),
        }),
        "registered" => Some(match (&row.config_ack_status, &row.config_ack_error) {
            (Some(status), Some(error)) => format!("its configuration is {status}: {error}"),
            (Some(status), None) => format!("its configuration is {status}"),
            _ => "it has not applied a configuration yet".to_owned(),
        }),
        "inactive" => Some("nothing was heard of it lately".to_owned()),
        _ if !row.ready => Some("it says that it cannot take jobs".to_owned()),
        _ => None,
    };
    WorkerView {
        worker_id: row.worker_id,
        node_slug: row.slug,
        name: row.name,
        labels: row.labels,
        status: row.status,
        reason,
        created_at: row.created_at,
        registered_at: row.registered_at,
        last_seen_at: row.last_seen_at,
        worker_api_url: row.url_override.clone().or(row.base_url),
        worker_api_url_override: row.url_override,
        tls_pinned: row.pinned,
        ready: row.ready,
        running: row.running,
        queued: row.queued,
        open_jobs: row.open_jobs,
        slots: row.slots,
        drained_at: row.drained_at,
        drained_by: row.drained_by,
        drain_reason: row.drain_reason,
        issued_config_version: row.issued_version,
        config_version: row.config_version,
        config_ack_version: row.ack_version,
        config_ack_at: row.config_ack_at,
        config_ack_status: row.config_ack_status,
        config_ack_error: row.config_ack_error,
        policy_patch: row.patch,
        last_capability_at: row.received_at,
        capability: row.report,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_grow_also_when_another_clock_is_ahead() {
        let ahead = Ulid::from_parts(u64::from(u32::MAX) << 10, 7).to_string();
        assert!(later(Some(&ahead)) > ahead);
        let first = later(None);
        assert!(later(Some(&first)) > first);
        assert_eq!(first.len(), 26);
    }

    #[test]
    fn workers_may_be_on_private_networks_but_not_at_metadata_addresses() {
        assert!(Allowed::parse(&WORKER_NETWORKS).is_ok());
        let check = |url: &str| worker_guard().check(&url.parse().unwrap()).is_ok();
        assert!(check("http://127.0.0.1:8081"));
        assert!(check("https://10.1.2.3:8081"));
        assert!(check("https://[fd00::1]:8081"));
        assert!(!check("http://169.254.169.254"));
        assert!(!check("http://[fe80::1]"));
        for address in METADATA {
            assert!(
                url::Url::parse(&format!("http://{address}"))
                    .is_ok_and(|url| url.host_str() == Some(address))
            );
        }
    }
}
