//! The workers that this process can speak to: the local one, and those that are enrolled.
//!
//! One loop watches the rows of all workers. It makes configurations again that are due, tells those who wait
//! for one, and keeps a client and a watcher of results for each worker that has a configuration in force, also
//! for one that gets no new jobs: it may still have some.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::Value;
use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, JoinSet};

use super::policy::Content;
use super::worker_guard;
use crate::config::values::SecretSource;
use crate::egress::guard::Bounds;
use crate::ids::WorkerId;
use crate::services::Services;
use crate::services::error::ServiceError;
use crate::store::crash;
use crate::store::workers::{self as store, Head};
use crate::tls::trust::Trust;
use crate::worker::client::WorkerClient;
use crate::worker::config::Token;
use crate::worker::wire::SandboxRequest;
use secrecy::ExposeSecret;

/// The metric: worker machines that get jobs, and those that do not.
const WORKERS: &str = "cynai_workers";
/// Between two looks at the rows, when nothing tells earlier.
const LOOK: Duration = Duration::from_secs(1);
/// Between two looks at least: many workers that come at once are seen together.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Configurations that one look makes again.
const DUE: i64 = 200;
/// How long a connection to a worker may take to be made.
const CONNECT: Duration = Duration::from_secs(5);
/// Between two bytes of an answer: longer than a worker may let a call wait. Each call has a bound of its own as well.
const IDLE: Duration = Duration::from_secs(120);

/// A worker that this process can send jobs to.
#[derive(Debug, Clone)]
pub struct KnownWorker {
    /// Its name in `jobs.worker`.
    pub name: String,
    /// What people call it.
    pub label: String,
    /// How to speak to it.
    pub client: WorkerClient,
    /// How many jobs it runs at once; `None` when it did not say.
    pub slots: Option<u64>,
    /// Images that jobs may name there; `None` when it did not say.
    pub images: Option<Vec<String>>,
    /// Directories that jobs may ask to see there; `None` when it did not say.
    pub mounts: Option<Vec<String>>,
    /// The most that one job may use there: `memory_mb`, `processes`, `cpus`, `disk_mb`, as far as it said.
    pub limits: BTreeMap<String, f64>,
    /// Jobs that this process is about to give it.
    pub sending: Arc<AtomicU64>,
}

/// What this process knows of all workers.
#[derive(Debug, Default)]
pub(in crate::services) struct Directory {
    local: watch::Sender<Option<Arc<KnownWorker>>>,
    enrolled: watch::Sender<Arc<Enrolled>>,
    changed: Notify,
    /// For all workers without a certificate of their own.
    unpinned: OnceLock<reqwest::Client>,
}

#[derive(Debug, Default)]
struct Enrolled {
    /// Whether the rows were looked at: until then nothing is known of who is missing.
    looked: bool,
    /// Whether there are workers that nothing is known of yet: one of them may be able to do more than the others.
    unknown: bool,
    /// By name; whether it gets new jobs.
    workers: BTreeMap<String, (Arc<KnownWorker>, bool)>,
    /// The newest configuration of each.
    versions: HashMap<WorkerId, String>,
}

/// Who could run a job.
#[derive(Debug)]
pub(in crate::services) enum Candidates {
    /// These, in no order.
    Some(Vec<Arc<KnownWorker>>),
    /// None now; one may come.
    NoneNow,
    /// None of those that there are ever will; why.
    Never(String),
}

/// A worker as it was found last.
struct Watched {
    config_version: Option<String>,
    received_at: Option<DateTime<Utc>>,
    known: Arc<KnownWorker>,
    watcher: AbortHandle,
}

/// The name of a worker in `jobs.worker`.
pub(super) fn name_of(worker: WorkerId) -> String {
    format!("worker:{worker}")
}

impl KnownWorker {
    /// Why this worker cannot run a job, by what it said of itself.
    fn lacks(&self, sandbox: &SandboxRequest) -> Option<String> {
        if self.images.as_ref().is_some_and(|images| !images.contains(&sandbox.image)) {
            return Some(format!("{} has no image `{}`", self.label, sandbox.image));
        }
        let missing = |mounts: &Vec<String>| {
            sandbox.mounts.iter().find(|mount| !mounts.contains(mount)).cloned()
        };
        if let Some(mount) = self.mounts.as_ref().and_then(missing) {
            return Some(format!("{} has no mount `{mount}`", self.label));
        }
        if self.slots == Some(0) {
            return Some(format!("{} runs no jobs", self.label));
        }
        let wanted = sandbox.resources.unwrap_or_default();
        #[expect(clippy::cast_precision_loss, reason = "no limit is that large")]
        let wanted = [
            ("memory_mb", wanted.memory_mb.map(|value| value as f64)),
            ("processes", wanted.processes.map(|value| value as f64)),
            ("cpus", wanted.cpus),
            ("disk_mb", wanted.disk_mb.map(|value| value as f64)),
        ];
        wanted.into_iter().find_map(|(name, wanted)| {
            let (wanted, most) = (wanted?, *self.limits.get(name)?);
            (wanted > most)
                .then(|| format!("{} gives a job {name} {most}, not {wanted}", self.label))
        })
    }
}

impl Services {
    /// Sets the worker that is this server's own child; `None` while there is none.
    pub fn set_local_worker(&self, worker: Option<KnownWorker>) {
        self.directory().local.send_replace(worker.map(Arc::new));
    }

    /// Something about a worker was committed: this process looks at once.
    pub(in crate::services) fn fleet_changed(&self) {
        self.directory().changed.notify_one();
    }

    /// The worker of this name in `jobs.worker`.
    pub(in crate::services) fn known_worker(&self, name: &str) -> Option<Arc<KnownWorker>> {
        let local = self.directory().local.borrow().clone();
        if let Some(local) = local.filter(|local| local.name == name) {
            return Some(local);
        }
        self.directory().enrolled.borrow().workers.get(name).map(|(known, _)| Arc::clone(known))
    }

    /// Who could run a job now. Where nobody could, a worker that is just being started is waited for.
    pub(in crate::services) async fn candidates(
        &self,
        sandbox: &SandboxRequest,
        patience: Duration,
    ) -> Candidates {
        // Before the first look, so that nothing that comes in between is missed.
        let (mut local, mut enrolled) =
            (self.directory().local.subscribe(), self.directory().enrolled.subscribe());
        let found = self.candidates_now(sandbox);
        if !matches!(found, Candidates::NoneNow) {
            return found;
        }
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            let changed = async {
                tokio::select! {
                    changed = local.changed() => changed,
                    changed = enrolled.changed() => changed,
                }
            };
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                return Candidates::NoneNow;
            }
            let found = self.candidates_now(sandbox);
            if !matches!(found, Candidates::NoneNow) {
                return found;
            }
        }
    }

    fn candidates_now(&self, sandbox: &SandboxRequest) -> Candidates {
        let local = self.directory().local.borrow().clone();
        let enrolled = Arc::clone(&self.directory().enrolled.borrow());
        let all = local.iter().map(|local| (local, true));
        let all = all.chain(enrolled.workers.values().map(|(known, active)| (known, *active)));
        let (mut able, mut lacking, mut later) = (Vec::new(), Vec::new(), false);
        for (known, active) in all {
            match known.lacks(sandbox) {
                None if active => able.push(Arc::clone(known)),
                None => later = true,
                Some(lack) => lacking.push(lack),
            }
        }
        if !able.is_empty() {
            return Candidates::Some(able);
        }
        if later || lacking.is_empty() || !enrolled.looked || enrolled.unknown {
            return Candidates::NoneNow;
        }
        lacking.truncate(10);
        Candidates::Never(format!("no worker can run this: {}", lacking.join("; ")))
    }

    /// Waits for a newer configuration of a worker.
    pub(super) async fn later_config(
        &self,
        worker: WorkerId,
        wait: Duration,
        newer: impl Fn(&Option<String>) -> bool,
    ) -> Option<String> {
        let mut enrolled = self.directory().enrolled.subscribe();
        let version = |enrolled: &Arc<Enrolled>| enrolled.versions.get(&worker).cloned();
        let found = enrolled.wait_for(|enrolled| newer(&version(enrolled)));
        let found = tokio::time::timeout(wait, found).await.ok()?.ok()?;
        version(&found)
    }

    /// Watches the rows of all workers, until dropped.
    pub async fn watch_fleet(&self) {
        let (mut watched, mut watchers) = (HashMap::new(), JoinSet::new());
        loop {
            if let Err(err) = self.make_due_configs().await {
                tracing::warn!(
                    error = &err as &dyn std::error::Error,
                    "configurations of workers could not be made"
                );
            }
            if let Err(err) = self.look_at_workers(&mut watched, &mut watchers).await {
                tracing::warn!(
                    error = &err as &dyn std::error::Error,
                    "the workers could not be looked at"
                );
            }
            while watchers.try_join_next().is_some() {}
            tokio::time::sleep(LOOK_AGAIN).await;
            let _ = tokio::time::timeout(LOOK, self.directory().changed.notified()).await;
        }
    }

    async fn make_due_configs(&self) -> Result<(), ServiceError> {
        let (due, revision) = {
            let mut db = self.pool().acquire().await?;
            let (_, revision) = store::policy(&mut db).await?;
            (store::due(&mut db, DUE).await?, revision)
        };
        for worker in due {
            let mut tx = self.transaction().await?;
            if let Err(err) = self.issue_config(&mut tx, worker, false).await {
                tracing::error!(error = &err as &dyn std::error::Error, worker.id = %worker, "a worker's configuration could not be made");
                if matches!(err, ServiceError::Unavailable { .. } | ServiceError::Internal(_)) {
                    continue;
                }
                // Until the policy or a secret changes, trying again would change nothing.
                drop(tx);
                tx = self.transaction().await?;
                store::made(&mut tx, worker, revision).await?;
            }
            crash::commit(tx, "worker config made").await?;
        }
        Ok(())
    }

    async fn look_at_workers(
        &self,
        watched: &mut HashMap<WorkerId, Watched>,
        watchers: &mut JoinSet<()>,
    ) -> Result<(), ServiceError> {
        let heads = {
            let mut db = self.pool().acquire().await?;
            store::heads(&mut db, self.fleet().stale_after).await?
        };
        let there: HashSet<WorkerId> = heads.iter().map(|head| head.worker_id).collect();
        watched.retain(|worker, watched| {
            let there = there.contains(worker);
            if !there {
                watched.watcher.abort();
            }
            there
        });
        let active = heads.iter().filter(|head| head.active).count();
        for (state, count) in [("active", active), ("other", heads.len() - active)] {
            #[expect(clippy::cast_precision_loss, reason = "there are far fewer workers")]
            metrics::gauge!(WORKERS, "state" => state).set(count as f64);
        }
        let mut next = Enrolled { looked: true, ..Enrolled::default() };
        for head in heads {
            if let Some(version) = &head.issued_version {
                next.versions.insert(head.worker_id, version.clone());
            }
            if head.config_version.is_none() {
                next.unknown = true;
                continue;
            }
            let same = watched.get(&head.worker_id).is_some_and(|watched| {
                watched.config_version == head.config_version
                    && watched.received_at == head.received_at
            });
            if !same && let Err(err) = self.reach(&head, watched, watchers).await {
                tracing::warn!(error = &err as &dyn std::error::Error, worker.id = %head.worker_id, "a worker cannot be spoken to");
                // What was known of it before is better than nothing.
                next.unknown = true;
            }
            if let Some(watched) = watched.get(&head.worker_id) {
                let known = Arc::clone(&watched.known);
                next.workers.insert(known.name.clone(), (known, head.active));
            }
        }
        self.directory().enrolled.send_if_modified(|enrolled| {
            let same = (enrolled.looked, enrolled.unknown) == (next.looked, next.unknown)
                && enrolled.versions == next.versions
                && enrolled.workers.len() == next.workers.len()
                && enrolled.workers.iter().zip(&next.workers).all(|(old, new)| {
                    old.0 == new.0 && old.1.1 == new.1.1 && Arc::ptr_eq(&old.1.0, &new.1.0)
                });
            if !same {
                *enrolled = Arc::new(next);
            }
            !same
        });
        Ok(())
    }

    /// Goes only where workers may be, follows nothing, and accepts the pinned certificate alone where there is one.
    fn worker_http(&self, server_cert: Option<&str>) -> Result<reqwest::Client, ServiceError> {
        let bounds = Bounds { connect: CONNECT, idle: IDLE, total: None, ..Bounds::default() };
        let Some(pem) = server_cert else {
            if let Some(shared) = self.directory().unpinned.get() {
                return Ok(shared.clone());
            }
            let client = worker_guard().builder(&bounds).build().map_err(ServiceError::internal)?;
            return Ok(self.directory().unpinned.get_or_init(|| client).clone());
        };
        let pinned = Trust::exactly(pem).and_then(Trust::client_config);
        let pinned = pinned.map_err(ServiceError::internal)?;
        let builder = worker_guard().builder(&bounds).tls_backend_preconfigured(pinned);
        builder.https_only(true).build().map_err(ServiceError::internal)
    }

    /// Makes a client for a worker as it is now, and has its results fetched with it.
    async fn reach(
        &self,
        head: &Head,
        watched: &mut HashMap<WorkerId, Watched>,
        watchers: &mut JoinSet<()>,
    ) -> Result<(), ServiceError> {
        let reach = {
            let mut db = self.pool().acquire().await?;
            store::reach(&mut db, head.worker_id).await?
        };
        let Some(reach) = reach else { return Ok(()) };
        let content: Content =
            serde_json::from_value(reach.content).map_err(ServiceError::internal)?;
        let bearer = self.secret_value(&SecretSource::Secret(content.bearer_secret)).await;
        let bearer = bearer.map_err(|err| ServiceError::Unavailable {
            message: format!("the bearer token of the worker {} does not open", reach.slug),
            source: Some(Box::new(err)),
        })?;
        let http = self.worker_http(reach.server_cert.as_deref())?;
        let client =
            WorkerClient::new(content.target_url, Token::new(bearer.expose_secret()), http);
        let sandbox = reach.report.as_ref().map(|report| &report["sandbox"]);
        let mut images = sandbox.and_then(|sandbox| words(&sandbox["images"]));
        if let (Some(images), Some(allowed)) = (&mut images, &content.policy.sandbox.allowed_images)
        {
            images.retain(|image| allowed.contains(image));
        }
        let supported = sandbox.is_none_or(|sandbox| sandbox["supported"] != false);
        let known = Arc::new(KnownWorker {
            name: name_of(head.worker_id),
            label: reach.slug,
            client,
            slots: if supported {
                sandbox.and_then(|sandbox| sandbox["max_concurrency"].as_u64())
            } else {
                Some(0)
            },
            images,
            mounts: sandbox.and_then(|sandbox| words(&sandbox["mounts"])),
            limits: sandbox.map(|sandbox| numbers(&sandbox["limits"])).unwrap_or_default(),
            sending: Arc::default(),
        });
        let (services, watching) = (self.clone(), Arc::clone(&known));
        let watcher = watchers.spawn(async move { services.watch_results(&watching).await });
        let now = Watched {
            config_version: head.config_version.clone(),
            received_at: head.received_at,
            known,
            watcher,
        };
        if let Some(before) = watched.insert(head.worker_id, now) {
            before.watcher.abort();
        }
        Ok(())
    }
}

fn numbers(object: &Value) -> BTreeMap<String, f64> {
    let fields = object.as_object().into_iter().flatten();
    fields.filter_map(|(name, value)| Some((name.clone(), value.as_f64()?))).collect()
}

fn words(list: &Value) -> Option<Vec<String>> {
    let list = list.as_array()?;
    Some(list.iter().filter_map(Value::as_str).map(str::to_owned).collect())
}
