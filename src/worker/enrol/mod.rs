//! A worker in service of a server: it registers, is configured, reports, and stays known.
//!
//! The agent serves the Worker API all the while; this part gives it its rules and tokens. It never gives up: a server
//! that is away, or refuses, is asked again, and until then the configuration of an earlier life stays in force.
//!
//! **Invariant:** nothing here ends the agent, and nothing that a server says can make it more permissive.
//! **Invariant:** a configuration is only taken from the configuration endpoint, over the connection that the startup
//! file describes.

mod apply;
mod facts;
mod files;
mod link;
mod pace;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures::FutureExt;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use self::apply::{Applier, Outcome, Trial, newer};
use self::facts::Told;
use self::files::{CERTIFICATE, CONFIG, Files, NODE};
use self::link::{Fetched, Link};
use self::pace::Retry;
use super::agent::{Agent, AgentError, AgentStatus};
use super::config::{Token, WorkerConfig};
use super::effective::Effective;
use super::jobs::{DiskError, lock};
use super::node::{
    AckStatus, Bootstrap, CapabilityReport, ConfigAck, Heartbeat, NodeAuth, REGISTRATION_PATH,
    VERSION,
};
use super::startup::{ApiTlsMode, KeyError, Startup};
use crate::clock::Clock;
use crate::tls::TlsError;
use crate::tls::accept::Acceptor;
use crate::tls::own::Own;
use crate::tls::trust::Trust;

pub use files::FileFailure;
pub use link::{CallError, LinkError};
pub use pace::Pace;

/// Seconds for which the server may hold the question for a newer configuration.
const LONG_POLL: u64 = 60;
/// Seconds between two heartbeats when the server does not say.
const HEARTBEAT: u64 = 10;
/// The most seconds between two heartbeats, whatever the server says.
const MAX_HEARTBEAT: u64 = 300;
/// Seconds between two looks at this machine.
const LOOK: u64 = 60;
/// Seconds that the first registration waits for the trial sandboxes.
const FIRST_TRIAL: u64 = 20;
/// Seconds until a call that failed is made again, in service.
const AGAIN: u64 = 5;
/// How long the last heartbeat of an agent that ends may take.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long the agent's own answer may take.
const TRIAL_PATIENCE: Duration = Duration::from_secs(10);

/// Why a worker cannot take up its service.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// The agent cannot start.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The server cannot be recognised.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The Worker API cannot speak TLS.
    #[error("the Worker API cannot speak TLS")]
    Tls(#[from] TlsError),
    /// The state directory cannot be used.
    #[error(transparent)]
    Files(#[from] FileFailure),
}

/// Why a worker could not leave.
#[derive(Debug, thiserror::Error)]
pub enum LeaveError {
    /// An agent runs.
    #[error("the agent must not run while its worker leaves: it would register again")]
    Running(#[source] DiskError),
    /// It never registered.
    #[error(
        "{0} holds no registration: this worker is not known to a server, or another one's state is there"
    )]
    Unknown(std::path::PathBuf),
    /// The server cannot be recognised.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The key that proves who is asking.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The server does not let it go.
    #[error("the server did not let the worker go")]
    Call(#[from] CallError),
    /// What is left here.
    #[error(transparent)]
    Files(#[from] FileFailure),
}

/// A worker's service, beside its agent.
pub struct Enrolment {
    startup: Arc<Startup>,
    config: WorkerConfig,
    clock: Arc<dyn Clock>,
    pace: Pace,
    link: Arc<Link>,
    files: Files,
    applier: Applier,
    status: AgentStatus,
    base_url: String,
    certificate_names: Vec<String>,
    acceptor: Option<Acceptor>,
    effective: watch::Receiver<Arc<Effective>>,
    /// The last report that the server has taken.
    reported: Mutex<Option<CapabilityReport>>,
    /// A heartbeat told of a newer configuration.
    news: Notify,
}

/// `node.json`. A token is shown to the server that gave it, and to no other.
#[derive(Serialize, Deserialize)]
struct Known {
    server: String,
    bootstrap: Bootstrap,
}

impl Known {
    fn load(files: &Files, startup: &Startup) -> Option<Bootstrap> {
        let known = files.load::<Self>(NODE)?;
        (known.server == startup.orchestrator.url).then_some(known.bootstrap)
    }

    fn store(bootstrap: Bootstrap, files: &Files, startup: &Startup) -> Result<(), FileFailure> {
        files.write(NODE, &Self { server: startup.orchestrator.url.clone(), bootstrap })
    }
}

/// From one registration to the next.
struct Session {
    bootstrap: Bootstrap,
    auth: Mutex<Auth>,
}

#[derive(Clone)]
struct Auth {
    token: Token,
    /// When half of its life is over.
    renew_at: Instant,
}

/// Somebody else has to act: the token is no longer good.
struct RegisterAgain;

impl Enrolment {
    /// Binds the agent, and puts the configuration of an earlier life in force. Run both beside each other.
    ///
    /// # Errors
    /// Something on this machine cannot be used. The server is not asked yet.
    pub async fn start(
        startup: Startup,
        clock: Arc<dyn Clock>,
        pace: Pace,
    ) -> Result<(Agent, Self), EnrolError> {
        let startup = Arc::new(startup);
        let config = startup.worker_config();
        let trust = startup.trust().map_err(LinkError::from)?;
        let link = Link::new(&startup, link::client(&startup, trust)?);
        let (sender, effective) = watch::channel(Arc::new(Effective::waiting(&config)));
        let mut agent =
            Agent::bind_under(config.clone(), effective.clone(), Arc::clone(&clock)).await?;
        let address = agent.address();
        let files = Files::new(&config.state_dir);
        let certificate_names = startup.certificate_names(address);
        let acceptor = acceptor(&startup, &files, &certificate_names, clock.now())?;
        if let Some(acceptor) = &acceptor {
            agent = agent.with_tls(acceptor.clone());
        }
        let trial = trial(agent.listening().listening, address, acceptor.clone());
        let applier =
            Applier::new(Arc::clone(&startup), config.clone(), Arc::clone(&link), sender, trial);
        let enrolment = Self {
            base_url: startup.public_base_url(address),
            status: agent.status(),
            startup,
            config,
            clock,
            pace,
            link,
            files,
            applier,
            certificate_names,
            acceptor,
            effective,
            reported: Mutex::new(None),
            news: Notify::new(),
        };
        Ok((agent, enrolment))
    }

    /// Serves until told to stop.
    pub async fn run(&self, shutdown: CancellationToken) {
        let known: Mutex<Option<Arc<Session>>> = Mutex::new(None);
        let serving = async {
            self.first_trial().await;
            let mut again = None;
            loop {
                let began = Instant::now();
                let session = Arc::new(self.register(again.as_deref()).await);
                *held(&known) = Some(Arc::clone(&session));
                self.serve(&session).await;
                *held(&known) = None;
                tracing::warn!(
                    "the server no longer accepts this worker's token: it registers again"
                );
                // A server that hands out tokens that it does not accept is not asked in a loop.
                let least = self.pace.seconds(AGAIN);
                sleep(least.saturating_sub(began.elapsed())).await;
                again =
                    Some(session.bootstrap.orchestrator.endpoints.worker_registration_url.clone());
            }
        };
        tokio::select! {
            () = serving => {}
            () = shutdown.cancelled() => {}
        }
        // New jobs would be refused from now on: the server should know before it finds out.
        let session = held(&known).clone();
        if let Some(session) = session {
            let _ = timeout(FAREWELL, self.heartbeat(&session, false)).await;
        }
    }

    async fn first_trial(&self) {
        let mut status = self.status.clone();
        if status.readiness().is_none() {
            let _ = timeout(self.pace.seconds(FIRST_TRIAL), status.tried()).await;
        }
    }

    /// Registers, however long that takes.
    async fn register(&self, again: Option<&str>) -> Session {
        let usual = registration_url(&self.startup);
        let mut retry = Retry::default();
        // Where the server said at the first time; where that fails, where the startup file says.
        let mut url = again.unwrap_or(&usual);
        loop {
            match self.register_once(url).await {
                Ok(bootstrap) => {
                    let server = &self.startup.orchestrator.url;
                    tracing::info!(server, "registered with {server} as {}", self.startup.node.id);
                    let auth = self.auth(&bootstrap.auth, Some(bootstrap.issued_at));
                    return Session { bootstrap, auth: Mutex::new(auth) };
                }
                Err(reason) => {
                    let wait = retry.after_failure(self.pace);
                    let seconds = wait.as_secs();
                    tracing::warn!(
                        reason,
                        seconds,
                        "not registered; the next try is in {seconds} s"
                    );
                    sleep(wait).await;
                    url = &usual;
                }
            }
        }
    }

    /// One try; the error is for the log, with what helps.
    async fn register_once(&self, url: &str) -> Result<Bootstrap, String> {
        self.startup.allowed_url(url).map_err(|problem| format!("the server's URL {problem}"))?;
        let key = self.startup.registration_key().map_err(|err| err.to_string())?;
        let earlier = Known::load(&self.files, &self.startup).map(|known| known.auth.node_jwt);
        let report = self.report();
        let answer = self.link.register(url, key, report.clone(), earlier.as_ref()).await;
        let bootstrap = answer.map_err(|err| advice(&err, &self.startup.node.id))?;
        let endpoints = &bootstrap.orchestrator.endpoints;
        for url in [
            Some(&endpoints.worker_registration_url),
            Some(&endpoints.node_config_url),
            Some(&endpoints.node_report_url),
            Some(&endpoints.node_self_unregister_url),
            endpoints.node_heartbeat_url.as_ref(),
            endpoints.node_token_url.as_ref(),
        ]
        .into_iter()
        .flatten()
        {
            let allowed = self.startup.allowed_url(url);
            allowed.map_err(|problem| {
                format!("the server names the endpoint {url}, which {problem}")
            })?;
        }
        let kept = Known::store(bootstrap.clone(), &self.files, &self.startup);
        kept.map_err(|err| err.to_string())?;
        *held(&self.reported) = Some(report);
        Ok(bootstrap)
    }

    /// Half of a token's life, by the server's clock where that is known: this machine's may be wrong.
    fn auth(&self, auth: &NodeAuth, issued_at: Option<DateTime<Utc>>) -> Auth {
        let life = auth.expires_at - issued_at.unwrap_or_else(|| self.clock.now());
        let half = life.to_std().unwrap_or_default() / 2;
        let bounded = half.clamp(self.pace.second, Duration::from_secs(7 * 24 * 3600));
        Auth { token: auth.node_jwt.clone(), renew_at: Instant::now() + bounded }
    }

    /// Everything that a registered worker does, until its token is no longer good.
    async fn serve(&self, session: &Session) {
        let RegisterAgain = tokio::select! {
            again = self.follow_configuration(session) => again,
            again = self.beat(session) => again,
            again = self.keep_reporting(session) => again,
            again = self.keep_token(session) => again,
        };
    }

    async fn follow_configuration(&self, session: &Session) -> RegisterAgain {
        let url = &session.bootstrap.orchestrator.endpoints.node_config_url;
        // The newest version that was looked at, whatever became of it.
        let mut seen: Option<String> = None;
        loop {
            let asked = Instant::now();
            let token = session.token();
            let wait = Duration::from_secs(LONG_POLL);
            let after = seen.as_deref().map(|version| (version, wait));
            let mut rest = self.poll_interval();
            match self.link.configuration(url, &token, after).await {
                Err(CallError::Unauthorized(_)) => return RegisterAgain,
                Err(err) => {
                    let version = seen.as_deref().unwrap_or("none");
                    tracing::warn!(reason = %err, version, "no configuration could be fetched");
                }
                // A server that waited may be asked again at once; one that cannot wait, later.
                Ok(None) if asked.elapsed() > self.pace.second => rest = Duration::ZERO,
                Ok(None) => {}
                Ok(Some(fetched)) => {
                    let version = match &fetched {
                        Fetched::Read(configuration) => Some(configuration.config_version.clone()),
                        Fetched::Unreadable { config_version, .. } => config_version.clone(),
                    };
                    let fresh = version.as_deref().is_some_and(|one| newer(one, seen.as_deref()));
                    if fresh || seen.is_none() {
                        if self.take(session, fetched).await.is_err() {
                            return RegisterAgain;
                        }
                        if fresh {
                            (seen, rest) = (version, Duration::ZERO);
                        }
                    }
                }
            }
            if !self.follows() {
                std::future::pending::<()>().await;
            }
            tokio::select! {
                () = sleep(rest) => {}
                () = self.news.notified(), if !rest.is_zero() => {}
            }
        }
    }

    /// Whether later configurations are wanted. Without one in force, the first one always is.
    fn follows(&self) -> bool {
        let own = self.startup.updates.enable_dynamic_config != Some(false);
        match self.applier.in_force() {
            Some(configuration) => own && configuration.policy.updates.enable_dynamic_config,
            None => true,
        }
    }

    fn poll_interval(&self) -> Duration {
        let served = self.applier.in_force();
        let served = served.map(|configuration| configuration.policy.updates.poll_interval_seconds);
        let own = self.startup.updates.poll_interval_seconds;
        self.pace.seconds(own.or(served).unwrap_or(60))
    }

    /// Applies what came, and says so.
    async fn take(&self, session: &Session, fetched: Fetched) -> Result<(), RegisterAgain> {
        let (config_version, outcome) = match fetched {
            Fetched::Read(configuration) => {
                let version = configuration.config_version.clone();
                (version, self.applier.apply(*configuration).await)
            }
            Fetched::Unreadable { config_version: Some(version), reason } => {
                let message = format!("it cannot be read: {reason}");
                (version, Outcome::refused("invalid-configuration", message))
            }
            Fetched::Unreadable { config_version: None, reason } => {
                tracing::error!(reason, "what the server sent is no configuration");
                return Ok(());
            }
        };
        let Outcome::Answered(status, error) = outcome else { return Ok(()) };
        if let (AckStatus::Failed, Some(error)) = (status, &error) {
            tracing::error!(
                version = config_version,
                reason = error.message,
                "configuration {config_version} is refused"
            );
        }
        let ack = ConfigAck {
            version: VERSION,
            node_slug: self.startup.node.id.clone(),
            config_version,
            ack_at: self.clock.now(),
            status,
            error,
            effective_config_hash: None,
        };
        self.acknowledge(session, &ack).await
    }

    async fn acknowledge(&self, session: &Session, ack: &ConfigAck) -> Result<(), RegisterAgain> {
        let url = &session.bootstrap.orchestrator.endpoints.node_config_url;
        loop {
            match self.link.acknowledge(url, &session.token(), ack).await {
                Ok(()) => return Ok(()),
                Err(CallError::Unauthorized(_)) => return Err(RegisterAgain),
                Err(err @ CallError::Refused { .. }) => {
                    tracing::error!(reason = %err, "the server refused an acknowledgement");
                    return Ok(());
                }
                Err(err) => tracing::warn!(reason = %err, "an acknowledgement is sent again"),
            }
            sleep(self.pace.seconds(AGAIN)).await;
        }
    }

    async fn beat(&self, session: &Session) -> RegisterAgain {
        let mut drained = false;
        let mut seconds = session.bootstrap.heartbeat_seconds.unwrap_or(HEARTBEAT);
        loop {
            match self.heartbeat(session, true).await {
                None => std::future::pending::<()>().await,
                Some(Ok(answer)) => {
                    seconds = answer.heartbeat_seconds;
                    if answer.drained != drained {
                        drained = answer.drained;
                        let now = if drained {
                            "out of service: it gets no new jobs"
                        } else {
                            "in service again"
                        };
                        tracing::info!(drained, "an operator took this worker {now}");
                    }
                    let own = self.applier.in_force().map(|one| one.config_version);
                    if answer.config_version.is_some_and(|version| newer(&version, own.as_deref()))
                    {
                        self.news.notify_one();
                    }
                }
                Some(Err(CallError::Unauthorized(_))) => return RegisterAgain,
                Some(Err(err)) => tracing::warn!(reason = %err, "a heartbeat was not heard"),
            }
            sleep(self.pace.seconds(seconds.min(MAX_HEARTBEAT))).await;
        }
    }

    /// One heartbeat; `None` where the server wants none.
    async fn heartbeat(
        &self,
        session: &Session,
        alive: bool,
    ) -> Option<Result<super::node::HeartbeatAnswer, CallError>> {
        let url = session.bootstrap.orchestrator.endpoints.node_heartbeat_url.as_ref()?;
        let (queued, running) = self.status.load();
        let count = |jobs: usize| u32::try_from(jobs).unwrap_or(u32::MAX);
        let works = matches!(self.status.readiness(), Some(Ok(_)));
        let beat = Heartbeat {
            version: VERSION,
            config_version: self.effective.borrow().config_version.clone(),
            running: count(running),
            queued: count(queued),
            ready: alive && works && !self.effective.borrow().waits(),
        };
        Some(self.link.heartbeat(url, &session.token(), &beat).await)
    }

    async fn keep_reporting(&self, session: &Session) -> RegisterAgain {
        let mut status = self.status.clone();
        loop {
            let report = self.report();
            let old = held(&self.reported).clone();
            if old.is_none_or(|old| !facts::same(&old, &report)) {
                let known = self.applier.in_force();
                let url = known.map(|one| one.orchestrator.endpoints.node_report_url);
                let url = url.unwrap_or_else(|| {
                    session.bootstrap.orchestrator.endpoints.node_report_url.clone()
                });
                match self.link.report(&url, &session.token(), &report).await {
                    Ok(()) => *held(&self.reported) = Some(report),
                    Err(CallError::Unauthorized(_)) => return RegisterAgain,
                    Err(err) => {
                        tracing::warn!(reason = %err, "a report is sent again");
                        sleep(self.pace.seconds(AGAIN)).await;
                        continue;
                    }
                }
            }
            tokio::select! {
                () = sleep(self.pace.seconds(LOOK)) => self.renew_certificate(),
                () = status.tried() => {}
            }
        }
    }

    async fn keep_token(&self, session: &Session) -> RegisterAgain {
        let Some(url) = &session.bootstrap.orchestrator.endpoints.node_token_url else {
            return std::future::pending().await;
        };
        loop {
            let renew_at = held(&session.auth).renew_at;
            tokio::time::sleep_until(renew_at).await;
            match self.link.renew(url, &session.token()).await {
                Ok(renewed) => {
                    *held(&session.auth) = self.auth(&renewed.auth, None);
                    let kept = Bootstrap { auth: renewed.auth, ..session.bootstrap.clone() };
                    if let Err(err) = Known::store(kept, &self.files, &self.startup) {
                        tracing::error!(
                            error = &err as &dyn std::error::Error,
                            "a renewed token cannot be kept"
                        );
                    }
                }
                Err(CallError::Unauthorized(_)) => return RegisterAgain,
                Err(err) => {
                    tracing::warn!(reason = %err, "the token is renewed later");
                    sleep(self.pace.seconds(AGAIN)).await;
                }
            }
        }
    }

    fn report(&self) -> CapabilityReport {
        let told = Told {
            startup: &self.startup,
            config: &self.config,
            readiness: self.status.readiness(),
            base_url: self.base_url.clone(),
            certificate_pem: self.acceptor.as_ref().map(Acceptor::certificate_pem),
        };
        facts::report(told, self.clock.now())
    }

    /// The next report brings a new certificate to the server.
    fn renew_certificate(&self) {
        let (Some(acceptor), ApiTlsMode::SelfSigned) = (&self.acceptor, self.startup.api_tls())
        else {
            return;
        };
        let own = own_certificate(&self.files, &self.certificate_names, self.clock.now());
        let shown = own.and_then(|own| {
            // The text of what is shown is the certificate's own: line ends may differ.
            let same = Trust::exactly(&own.certificate_pem)?
                == Trust::exactly(&acceptor.certificate_pem())?;
            if same { Ok(()) } else { Ok(acceptor.replace(&own.certificate_pem, &own.key_pem)?) }
        });
        if let Err(err) = shown {
            tracing::error!(
                error = &err as &dyn std::error::Error,
                "the certificate could not be renewed"
            );
        }
    }
}

impl Session {
    fn token(&self) -> Token {
        held(&self.auth).token.clone()
    }
}

fn held<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

fn registration_url(startup: &Startup) -> String {
    format!("{}{REGISTRATION_PATH}", startup.orchestrator.url.trim_end_matches('/'))
}

/// What somebody who reads the log can do.
fn advice(err: &CallError, slug: &str) -> String {
    let help = match err {
        CallError::Unauthorized(_) => {
            "; the registration key is not the server's: compare what `orchestrator.registration_psk_env` or \
             `registration_psk_file` names with the server's key"
        }
        CallError::Refused { status: 403, .. } => {
            "; the server has no registration key: give it one, and this worker the same"
        }
        CallError::Refused { status: 409, .. } => {
            return format!(
                "{err}; another worker that is alive has the id `{slug}`: choose another `node.id`, or wait until that \
                 one is gone"
            );
        }
        _ => "",
    };
    format!("{err}{help}")
}

fn acceptor(
    startup: &Startup,
    files: &Files,
    names: &[String],
    now: DateTime<Utc>,
) -> Result<Option<Acceptor>, EnrolError> {
    let tls = &startup.worker_api.tls;
    match (startup.api_tls(), &tls.cert_file, &tls.key_file) {
        (ApiTlsMode::Files, Some(certificate), Some(key)) => {
            Ok(Some(Acceptor::from_files(certificate, key)?))
        }
        (ApiTlsMode::SelfSigned, ..) => {
            let own = own_certificate(files, names, now)?;
            Ok(Some(Acceptor::from_pem(&own.certificate_pem, &own.key_pem)?))
        }
        _ => Ok(None),
    }
}

/// The certificate that is kept, or a new one where that does not serve any longer.
fn own_certificate(files: &Files, names: &[String], now: DateTime<Utc>) -> Result<Own, EnrolError> {
    let usable = |own: &Own| {
        own.serves(names, now) && Acceptor::from_pem(&own.certificate_pem, &own.key_pem).is_ok()
    };
    if let Some(own) = files.load::<Own>(CERTIFICATE).filter(usable) {
        return Ok(own);
    }
    let own = Own::make(names, now)?;
    files.write(CERTIFICATE, &own)?;
    tracing::info!(names = names.join(", "), "a certificate was made for the Worker API");
    Ok(own)
}

/// A call to the own Worker API, as the server would make it.
fn trial(listening: String, address: std::net::SocketAddr, acceptor: Option<Acceptor>) -> Trial {
    let scheme = listening.split("://").next().unwrap_or("http").to_owned();
    let host = if address.ip().is_unspecified() {
        format!("localhost:{}", address.port())
    } else {
        address.to_string()
    };
    Arc::new(move |token| {
        let (base, acceptor) = (format!("{scheme}://{host}"), acceptor.clone());
        async move {
            let mut builder = reqwest::Client::builder().no_proxy().timeout(TRIAL_PATIENCE);
            if let Some(acceptor) = acceptor {
                let trust = Trust::exactly(&acceptor.certificate_pem());
                let config = trust.and_then(Trust::client_config).map_err(|err| err.to_string())?;
                builder = builder.tls_backend_preconfigured(config);
            }
            let http = builder.build().map_err(|err| err.to_string())?;
            let request = match &token {
                Some(token) => http
                    .get(format!("{base}/v1/worker/jobs?state=finished&limit=1"))
                    .bearer_auth(token.expose()),
                // Nobody may call: it is enough that the agent answers.
                None => http.get(format!("{base}/healthz")),
            };
            let answer = request.send().await.map_err(|err| err.without_url().to_string())?;
            if answer.status().is_success() {
                return Ok(());
            }
            Err(format!("it answered {} to the new token", answer.status().as_u16()))
        }
        .boxed()
    })
}

/// Tells the server that the worker goes for good, and forgets what it got from it. Job records stay.
///
/// # Errors
/// The agent runs, the server cannot be asked, or it does not let the worker go.
pub async fn leave(startup: &Startup, clock: &dyn Clock) -> Result<(), LeaveError> {
    let directory = startup.state_dir();
    let _alone = lock(&directory).map_err(LeaveError::Running)?;
    let files = Files::new(&directory);
    let unknown = || LeaveError::Unknown(directory.clone());
    let bootstrap = Known::load(&files, startup).ok_or_else(unknown)?;
    let trust = startup.trust().map_err(LinkError::from)?;
    let link = Link::new(startup, link::client(startup, trust)?);
    let url = &bootstrap.orchestrator.endpoints.node_self_unregister_url;
    match link.unregister(url, &bootstrap.auth.node_jwt).await {
        // An old token: the key proves as well who is asking.
        Err(CallError::Unauthorized(_)) => {
            let report = offline_report(startup, &directory, clock.now());
            let (key, token) = (startup.registration_key()?, Some(&bootstrap.auth.node_jwt));
            let renewed = link.register(&registration_url(startup), key, report, token).await?;
            let url = &renewed.orchestrator.endpoints.node_self_unregister_url;
            link.unregister(url, &renewed.auth.node_jwt).await?;
        }
        // It is gone already.
        Err(CallError::Refused { status: 404, .. }) | Ok(()) => {}
        Err(err) => return Err(err.into()),
    }
    for name in [CONFIG, NODE] {
        files.delete(name)?;
    }
    Ok(())
}

/// What a worker says that only registers to leave: it runs nothing.
fn offline_report(startup: &Startup, directory: &Path, now: DateTime<Utc>) -> CapabilityReport {
    let config = WorkerConfig { state_dir: directory.to_owned(), ..startup.worker_config() };
    let told = Told {
        startup,
        config: &config,
        readiness: Some(Err("the worker leaves".to_owned())),
        base_url: startup.public_base_url(startup.listen()),
        certificate_pem: None,
    };
    facts::report(told, now)
}

#[cfg(test)]
mod tests;
