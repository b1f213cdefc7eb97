//! A configuration comes into force, or nothing changes.
//!
//! Everything that can be wrong is looked for first. Then the configuration is written beside the one in force, put in
//! force, tried by a call to the agent's own Worker API, and only then put in the file's place: a process that dies in
//! between starts with the old one.
//!
//! **Invariant:** what is in `config.json` has been in force and answered.
//! **Invariant:** only a newer configuration replaces one.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use ulid::Ulid;

use super::files::{CONFIG, Files};
use super::link::{Link, LinkError, client};
use crate::tls::trust::{Pin, Trust};
use crate::worker::config::{Token, WorkerConfig};
use crate::worker::effective::{Effective, Saved, TimedToken};
use crate::worker::node::{AckError, AckStatus, Configuration};
use crate::worker::startup::Startup;

/// Calls the own Worker API with a token; an error says what came of it.
pub(super) type Trial =
    Arc<dyn Fn(Option<Token>) -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// What became of a configuration.
#[derive(Debug, PartialEq)]
pub(super) enum Outcome {
    /// It is older than the one in force: nobody is told.
    Ignored,
    /// To be acknowledged.
    Answered(AckStatus, Option<AckError>),
}

impl Outcome {
    const APPLIED: Self = Self::Answered(AckStatus::Applied, None);

    pub(super) fn refused(kind: &str, message: impl Into<String>) -> Self {
        Self::Answered(AckStatus::Failed, Some(error(kind, message)))
    }
}

fn error(kind: &str, message: impl Into<String>) -> AckError {
    AckError { kind: format!("urn:cynai:problem:{kind}"), message: message.into(), details: None }
}

pub(super) struct Applier {
    startup: Arc<Startup>,
    config: WorkerConfig,
    files: Files,
    link: Arc<Link>,
    effective: watch::Sender<Arc<Effective>>,
    trial: Trial,
    saved: Mutex<Option<Saved>>,
}

/// `config.json`. Versions of one server say nothing about another's.
#[derive(Serialize, Deserialize)]
struct Kept {
    server: String,
    saved: Saved,
}

/// Everything that a configuration changes, ready to be put in force.
struct Prepared {
    saved: Saved,
    effective: Effective,
    http: Option<reqwest::Client>,
}

impl Applier {
    /// Puts the configuration of an earlier life in force, when there is one that can be used.
    pub(super) fn new(
        startup: Arc<Startup>,
        config: WorkerConfig,
        link: Arc<Link>,
        effective: watch::Sender<Arc<Effective>>,
        trial: Trial,
    ) -> Self {
        let files = Files::new(&config.state_dir);
        let applier =
            Self { startup, config, files, link, effective, trial, saved: Mutex::new(None) };
        if let Some(saved) = applier.kept() {
            let version = saved.configuration.config_version.clone();
            match applier.prepare(saved) {
                Ok(prepared) => {
                    applier.put_in_force(prepared);
                    tracing::info!(version, "the saved configuration {version} is in force");
                }
                Err(refused) => {
                    tracing::error!(version, ?refused, "the saved configuration cannot be used");
                }
            }
        }
        applier
    }

    /// What an earlier life left, when it served the same server under the same name.
    fn kept(&self) -> Option<Saved> {
        let Kept { server, saved } = self.files.load(CONFIG)?;
        let own = server == self.startup.orchestrator.url
            && saved.configuration.node_slug == self.startup.node.id;
        if !own {
            tracing::warn!(
                "the saved configuration is ignored: it is another server's, or another worker's"
            );
        }
        own.then_some(saved)
    }

    /// The configuration in force.
    pub(super) fn in_force(&self) -> Option<Configuration> {
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        saved.as_ref().map(|saved| saved.configuration.clone())
    }

    /// Applies one. The caller acknowledges.
    pub(super) async fn apply(&self, given: Configuration) -> Outcome {
        let version = given.config_version.clone();
        let own = &self.startup.node.id;
        if given.node_slug != *own {
            let message =
                format!("it is for `{}`, and this worker is `{own}`", shown(&given.node_slug));
            return Outcome::refused("foreign-configuration", message);
        }
        let Some(ulid) = given.ulid() else {
            let message = "`config_version` must be a ULID, 26 characters";
            return Outcome::refused("invalid-configuration", message);
        };
        let before = self.saved.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let current = before.as_ref().and_then(|saved| saved.configuration.ulid());
        match current.map(|current| ulid.cmp(&current)) {
            Some(std::cmp::Ordering::Less) => return Outcome::Ignored,
            Some(std::cmp::Ordering::Equal) => return Outcome::APPLIED,
            _ => {}
        }
        let saved = Saved { previous: previous(before.as_ref(), &given), configuration: given };
        let prepared = match self.prepare(saved) {
            Ok(prepared) => prepared,
            Err(refused) => return Outcome::Answered(AckStatus::Failed, Some(*refused)),
        };
        let server = self.startup.orchestrator.url.clone();
        let kept = Kept { server, saved: prepared.saved.clone() };
        if let Err(err) = self.files.stage(CONFIG, &kept) {
            tracing::error!(
                error = &err as &dyn std::error::Error,
                "a configuration cannot be kept"
            );
            return Outcome::refused(
                "worker-fault",
                "the worker cannot write to its state directory",
            );
        }
        let token = prepared.saved.configuration.worker_api.orchestrator_bearer_token.clone();
        let old = Arc::clone(&self.effective.borrow());
        self.effective.send_replace(Arc::new(prepared.effective.clone()));
        let tried = match (self.trial)(token).await {
            Ok(()) => self.files.commit(CONFIG).map_err(|err| err.to_string()),
            Err(reason) => Err(reason),
        };
        if let Err(reason) = tried {
            self.effective.send_replace(old);
            tracing::error!(
                version,
                reason,
                "configuration {version} did not work; the one before is in force again"
            );
            let message =
                format!("with it in force the Worker API did not answer as it should: {reason}");
            let error = error("configuration-failed", message);
            return Outcome::Answered(AckStatus::RolledBack, Some(error));
        }
        self.put_in_force(prepared);
        tracing::info!(version, "configuration {version} is in force");
        Outcome::APPLIED
    }

    fn put_in_force(&self, prepared: Prepared) {
        self.effective.send_replace(Arc::new(prepared.effective));
        if let Some(http) = prepared.http {
            self.link.change(http);
        }
        let policy = &prepared.saved.configuration.policy.sandbox;
        if policy.allow_privileged || policy.allow_host_network {
            tracing::warn!(
                "the server allows privileged jobs or the host's network; no worker grants that"
            );
        }
        *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some(prepared.saved);
    }

    fn prepare(&self, saved: Saved) -> Result<Prepared, Box<AckError>> {
        let refused = |message: String| Box::new(error("invalid-configuration", message));
        let effective = Effective::configured(&self.config, &saved).map_err(|err| {
            let kind = if err.field == "version" {
                "unsupported-payload-version"
            } else {
                "invalid-configuration"
            };
            Box::new(error(kind, err.to_string()))
        })?;
        let endpoints = &saved.configuration.orchestrator.endpoints;
        let report = self.startup.allowed_url(&endpoints.node_report_url);
        report.map_err(|err| refused(format!("`orchestrator.endpoints.node_report_url` {err}")))?;
        let http = self
            .recognise(&saved.configuration)
            .map_err(|err| refused(format!("`trust` cannot be used: {err}")))?;
        Ok(Prepared { saved, effective, http })
    }

    /// A client that also recognises the server by what the configuration says, in the manner that the startup file
    /// chose: another pin where the key is pinned, other roots elsewhere.
    fn recognise(&self, given: &Configuration) -> Result<Option<reqwest::Client>, LinkError> {
        let Some(said) = &given.trust else { return Ok(None) };
        let mut trust = self.startup.trust()?;
        if trust.pins.is_empty() {
            let Some(bundle) = &said.ca_bundle_pem else { return Ok(None) };
            if trust.roots.is_empty() {
                trust.add_machine_roots().or_else(|err| match err {
                    // The bundle is enough by itself.
                    crate::tls::TlsError::NoRoots => Ok(()),
                    err => Err(err),
                })?;
            }
            trust.add_bundle_pem(bundle)?;
        } else {
            let Some(pin) = &said.pinned_spki_sha256 else { return Ok(None) };
            trust = Trust { pins: &trust.pins | &BTreeSet::from([pin.parse::<Pin>()?]), ..trust };
        }
        client(&self.startup, trust).map(Some)
    }
}

/// The token that stays good beside the new one. Where the token does not change, what was good before it stays: the
/// server may have missed the acknowledgement of the configuration that brought it.
fn previous(before: Option<&Saved>, given: &Configuration) -> Option<TimedToken> {
    let before = before?;
    let api = &before.configuration.worker_api;
    let token = api.orchestrator_bearer_token.as_ref()?;
    if given.worker_api.orchestrator_bearer_token.as_ref() == Some(token) {
        return before.previous.clone();
    }
    let expires_at = api.orchestrator_bearer_token_expires_at;
    Some(TimedToken { token: token.clone(), expires_at })
}

/// A word of the server's as it may be repeated.
fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(64).collect()
}

/// Whether `version` is a newer one than `than`; any is newer than none.
pub(super) fn newer(version: &str, than: Option<&str>) -> bool {
    let Ok(version) = Ulid::from_string(version) else { return false };
    than.and_then(|than| Ulid::from_string(than).ok()).is_none_or(|than| version > than)
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use futures::FutureExt;
    use serde_json::{Value, json};

    use super::*;
    use crate::clock::{Clock, SystemClock};

    const FIRST: &str = "01KB0000000000000000000001";
    const SECOND: &str = "01KB0000000000000000000002";
    const THIRD: &str = "01KB0000000000000000000003";

    struct Bench {
        applier: Applier,
        in_force: watch::Receiver<Arc<Effective>>,
        works: watch::Sender<bool>,
        dir: tempfile::TempDir,
    }

    impl Bench {
        fn new() -> Self {
            Self::at(tempfile::tempdir().unwrap())
        }

        fn at(dir: tempfile::TempDir) -> Self {
            Self::serving("http://127.0.0.1:1", dir)
        }

        fn serving(server: &str, dir: tempfile::TempDir) -> Self {
            let mut startup = Startup::new(server, "alpha");
            startup.storage.state_dir = Some(dir.path().to_owned());
            let config = startup.worker_config();
            let startup = Arc::new(startup);
            let http = client(&startup, startup.trust().unwrap()).unwrap();
            let link = Link::new(&startup, http);
            let (effective, in_force) = watch::channel(Arc::new(Effective::waiting(&config)));
            let works = watch::Sender::new(true);
            let tried = works.subscribe();
            let trial: Trial = Arc::new(move |_| {
                let works = *tried.borrow();
                async move { if works { Ok(()) } else { Err("no answer".to_owned()) } }.boxed()
            });
            Self {
                applier: Applier::new(startup, config, link, effective, trial),
                in_force,
                works,
                dir,
            }
        }

        fn admits(&self, token: &str) -> bool {
            self.in_force.borrow().admits(token, SystemClock.now())
        }

        async fn apply(&self, version: &str, token: &str, more: &Value) -> (String, String) {
            let given = configuration(version, token, more);
            match self.applier.apply(given).await {
                Outcome::Ignored => ("ignored".to_owned(), String::new()),
                Outcome::Answered(status, error) => (
                    status.as_str().to_owned(),
                    error.map(|error| error.message).unwrap_or_default(),
                ),
            }
        }
    }

    fn configuration(version: &str, token: &str, more: &Value) -> Configuration {
        let mut value = json!({
            "version": 1, "config_version": version, "issued_at": DateTime::UNIX_EPOCH, "node_slug": "alpha",
            "orchestrator": {"base_url": "http://127.0.0.1:1", "endpoints": {
                "worker_api_target_url": "http://127.0.0.1:2", "node_report_url": "http://127.0.0.1:1/report"}},
            "sandbox_registry": {"registry_url": ""}, "model_cache": {"cache_url": ""},
            "policy": {}, "worker_api": {"orchestrator_bearer_token": token}, "constraints": {}
        });
        for (key, part) in more.as_object().unwrap() {
            value[key] = part.clone();
        }
        serde_json::from_value(value).unwrap()
    }

    fn applied() -> (String, String) {
        ("applied".to_owned(), String::new())
    }

    #[tokio::test]
    async fn a_token_is_good_until_the_one_after_the_next_comes() {
        let bench = Bench::new();
        let (one, two, three) = ("token-number-one", "token-number-two", "token-number-three");
        assert_eq!(bench.apply(FIRST, one, &json!({})).await, applied());
        assert_eq!(bench.apply(SECOND, two, &json!({})).await, applied());
        assert!(bench.admits(one) && bench.admits(two));
        assert_eq!(bench.apply(THIRD, three, &json!({})).await, applied());
        assert!(!bench.admits(one) && bench.admits(two) && bench.admits(three));
        // The same again, as after a lost acknowledgement; and one that comes late.
        assert_eq!(bench.apply(THIRD, three, &json!({})).await, applied());
        assert_eq!(bench.apply(SECOND, two, &json!({})).await.0, "ignored");
        assert!(bench.admits(three));
        // The next life begins with it.
        let next = Bench::at(bench.dir);
        assert!(next.admits(two) && next.admits(three));
        assert_eq!(next.applier.in_force().unwrap().config_version, THIRD);
        // In the service of another server it does not.
        let elsewhere = Bench::serving("http://127.0.0.1:2", next.dir);
        assert!(!elsewhere.admits(three) && elsewhere.applier.in_force().is_none());
        assert_eq!(elsewhere.apply(FIRST, one, &json!({})).await, applied());
    }

    #[tokio::test]
    async fn what_cannot_be_used_changes_nothing_and_is_refused_by_name() {
        let bench = Bench::new();
        let token = "token-number-one";
        assert_eq!(bench.apply(FIRST, token, &json!({})).await, applied());
        let endpoints = |report: &str| {
            json!({"orchestrator": {"base_url": "http://127.0.0.1:1", "endpoints": {
                "worker_api_target_url": "http://127.0.0.1:2", "node_report_url": report}}})
        };
        for (version, token, more, expected) in [
            (SECOND, "short", json!({}), "orchestrator_bearer_token"),
            (SECOND, "token-number-two", json!({"node_slug": "beta"}), "it is for `beta`"),
            ("2", "token-number-two", json!({}), "must be a ULID"),
            (SECOND, "token-number-two", json!({"version": 2}), "`version` is 2"),
            (
                SECOND,
                "token-number-two",
                json!({"trust": {"ca_bundle_pem": "x"}}),
                "`trust` cannot be used",
            ),
            (SECOND, "token-number-two", endpoints("http://elsewhere.example/r"), "must be https"),
        ] {
            let (status, message) = bench.apply(version, token, &more).await;
            assert_eq!(status, "failed", "{expected}");
            assert!(message.contains(expected), "{message}");
        }
        assert!(bench.admits(token) && !bench.admits("token-number-two"));
        assert_eq!(Bench::at(bench.dir).applier.in_force().unwrap().config_version, FIRST);
    }

    #[tokio::test]
    async fn one_that_does_not_work_is_rolled_back() {
        let bench = Bench::new();
        bench.works.send_replace(false);
        // The first one: back to waiting.
        let (status, message) = bench.apply(FIRST, "token-number-one", &json!({})).await;
        assert_eq!(status, "rolled_back");
        assert!(message.contains("no answer"), "{message}");
        assert!(bench.in_force.borrow().waits());
        bench.works.send_replace(true);
        assert_eq!(bench.apply(FIRST, "token-number-one", &json!({})).await, applied());
        bench.works.send_replace(false);
        assert_eq!(bench.apply(SECOND, "token-number-two", &json!({})).await.0, "rolled_back");
        assert!(bench.admits("token-number-one") && !bench.admits("token-number-two"));
        assert_eq!(Bench::at(bench.dir).applier.in_force().unwrap().config_version, FIRST);
    }
}
