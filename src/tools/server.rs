//! One configured server: started when it is needed, watched, started again after a crash but not too
//! often, and ended when nobody uses it.
//!
//! All who need it at once wait for one start, which goes on when one of them leaves. A crash fails what is
//! under way and nothing else; the next use starts the server again, after a time that doubles with each
//! failure until the server has lived for a while.
//!
//! **Invariant:** the state has one owner at a time: whoever ends a connection looks, under the lock, whether
//! the state still means that connection.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::child::{LastWords, Process};
use super::error::{ToolError, ToolErrorKind};
use super::keys::{Keys, Redactor};
use super::listing::Listing;
use super::login::Login;
use super::open;
use super::wire::Connection;
use crate::config::tools::{ToolServerConfig, WireConfig};

/// The first pause after a failure; it doubles up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// A server that has lived so long has not failed at once.
const STEADY: Duration = Duration::from_secs(60);
/// A pause that is shorter is waited for; one that is longer is an answer.
const WORTH_WAITING: Duration = Duration::from_secs(2);

/// What all servers share.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) homes: std::path::PathBuf,
    pub(super) path: String,
    pub(super) keys: Arc<dyn Keys>,
    pub(super) tasks: TaskTracker,
    pub(super) closing: CancellationToken,
}

/// A configured server.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) name: String,
    pub(super) config: ToolServerConfig,
    pub(super) context: Arc<Context>,
    /// One for each call that may be under way.
    pub(super) permits: Arc<Semaphore>,
    pub(super) login: Login,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    phase: Phase,
    /// Failures since the server last lived for a while.
    failures: u32,
    not_before: Option<Instant>,
    last_error: Option<ToolError>,
}

#[derive(Default)]
enum Phase {
    #[default]
    Idle,
    Starting(Shared<BoxFuture<'static, Result<(), ToolError>>>),
    Live(Arc<Live>),
}

impl std::fmt::Debug for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Idle => "Idle",
            Self::Starting(_) => "Starting",
            Self::Live(_) => "Live",
        })
    }
}

/// A server that has introduced itself.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) connection: Connection,
    pub(super) redactor: Arc<Redactor>,
    pub(super) listing: Listing,
    pub(super) last_words: Option<LastWords>,
    since: Instant,
    used: Mutex<Instant>,
    users: AtomicUsize,
    /// Nobody is to use it any more; it ends when those who do have finished.
    retired: CancellationToken,
}

/// A live server, kept alive as long as this is held.
#[derive(Debug)]
pub(super) struct InUse(Arc<Live>);

impl std::ops::Deref for InUse {
    type Target = Live;
    fn deref(&self) -> &Live {
        &self.0
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        *self.0.used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        self.0.users.fetch_sub(1, Ordering::SeqCst);
    }
}

/// How a server is, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerStatus {
    /// `stopped`, `starting`, `running` or `failed`.
    pub state: &'static str,
    /// The version of the protocol that is spoken.
    pub protocol: Option<String>,
    /// What the server calls itself.
    pub name: Option<String>,
    /// Why it is not running.
    pub error: Option<String>,
}

/// Why a connection is over.
enum End {
    Died,
    Unused,
    Retired,
    Closing,
}

impl Server {
    /// A server that is not started yet.
    pub(super) fn new(name: String, config: ToolServerConfig, context: Arc<Context>) -> Self {
        let permits = Arc::new(Semaphore::new(config.max_parallel));
        Self { name, config, context, permits, login: Login::default(), state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How it is now.
    pub(super) fn status(&self) -> ServerStatus {
        let state = self.lock();
        let error = state.last_error.as_ref().map(|err| err.message.clone());
        let plain = |state| ServerStatus { state, protocol: None, name: None, error: None };
        match &state.phase {
            Phase::Live(live) => ServerStatus {
                state: "running",
                protocol: Some(live.connection.protocol.clone()),
                name: live.connection.name.as_deref().map(|name| live.redactor.text(name)),
                error: None,
            },
            Phase::Starting(_) => plain("starting"),
            Phase::Idle if error.is_some() => ServerStatus { error, ..plain("failed") },
            Phase::Idle => plain("stopped"),
        }
    }

    /// The running server; started, when it is not running.
    pub(super) async fn in_use(self: &Arc<Self>) -> Result<InUse, ToolError> {
        loop {
            if self.context.closing.is_cancelled() {
                return Err(ToolError::new(ToolErrorKind::Closing, "this server is stopping"));
            }
            let wait = match self.look() {
                Look::Use(live) => return Ok(live),
                Look::Wait(start) => start,
                Look::Pause(pause) if pause > WORTH_WAITING => return Err(self.paused(pause)),
                Look::Pause(pause) => sleep(pause).map(Ok).boxed().shared(),
            };
            wait.await?;
        }
    }

    fn look(self: &Arc<Self>) -> Look {
        let mut state = self.lock();
        match &state.phase {
            Phase::Live(live) if !live.connection.closed().is_cancelled() => {
                live.users.fetch_add(1, Ordering::SeqCst);
                return Look::Use(InUse(Arc::clone(live)));
            }
            Phase::Live(live) => {
                let live = Arc::clone(live);
                state.died(&live);
            }
            Phase::Starting(start) => return Look::Wait(start.clone()),
            Phase::Idle => {}
        }
        let now = Instant::now();
        if let Some(until) = state.not_before.filter(|until| *until > now) {
            return Look::Pause(until - now);
        }
        let server = Arc::clone(self);
        let start = self.context.tasks.spawn(async move { server.start().await });
        let start = start.map(|done| {
            let lost = || Err(ToolError::new(ToolErrorKind::Closing, "this server is stopping"));
            done.unwrap_or_else(|_| lost())
        });
        let start = start.boxed().shared();
        state.phase = Phase::Starting(start.clone());
        Look::Wait(start)
    }

    fn paused(&self, pause: Duration) -> ToolError {
        let last = self.lock().last_error.clone();
        let kind = match &last {
            Some(err) if err.kind == ToolErrorKind::LoginRequired => err.kind,
            _ => ToolErrorKind::Unavailable,
        };
        let why = last.map(|err| format!(": {}", err.message));
        let message = format!(
            "the tool server {} failed and is started again in {} s at the earliest{}",
            self.name,
            pause.as_secs() + 1,
            why.unwrap_or_default()
        );
        ToolError { retry_after: Some(pause), ..ToolError::new(kind, message) }
    }

    async fn start(self: Arc<Self>) -> Result<(), ToolError> {
        let opening = open::open(&self);
        let opened = tokio::select! {
            opened = tokio::time::timeout(self.config.start_timeout, opening) => {
                opened.unwrap_or_else(|_| Err(open::too_slow(&self)))
            }
            () = self.context.closing.cancelled() => {
                Err(ToolError::new(ToolErrorKind::Closing, "this server is stopping"))
            }
        };
        let mut state = self.lock();
        match opened {
            Ok(opened) => {
                let live = Arc::new(Live {
                    connection: opened.connection,
                    redactor: opened.redactor,
                    listing: Listing::default(),
                    last_words: opened.process.as_ref().map(Process::last_words),
                    since: Instant::now(),
                    used: Mutex::new(Instant::now()),
                    users: AtomicUsize::new(0),
                    retired: CancellationToken::new(),
                });
                tracing::info!(
                    tools.server = self.name,
                    protocol = live.connection.protocol,
                    "the tool server {} is there",
                    self.name
                );
                state.phase = Phase::Live(Arc::clone(&live));
                state.last_error = None;
                let server = Arc::clone(&self);
                self.context.tasks.spawn(server.watch(live, opened.process));
                Ok(())
            }
            Err(err) => {
                tracing::warn!(tools.server = self.name, "{err}");
                state.phase = Phase::Idle;
                state.failed(Some(err.clone()));
                Err(err)
            }
        }
    }

    /// Waits for the end of a connection, and cleans up after it.
    async fn watch(self: Arc<Self>, live: Arc<Live>, mut process: Option<Process>) {
        let end = loop {
            let process_ended = async {
                match &mut process {
                    Some(process) => process.ended().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = live.connection.closed().cancelled() => break End::Died,
                _ = process_ended => break End::Died,
                () = live.retired.cancelled() => break End::Retired,
                () = self.context.closing.cancelled() => break End::Closing,
                () = sleep(self.config.idle.min(Duration::from_secs(1))) => {
                    if self.end_unused(&live) { break End::Unused }
                }
            }
        };
        match end {
            End::Died => self.lock().died(&live),
            End::Unused => tracing::info!(
                tools.server = self.name,
                "the tool server {} is not used and ended",
                self.name
            ),
            End::Retired => {
                while live.users.load(Ordering::SeqCst) > 0 && !self.context.closing.is_cancelled()
                {
                    sleep(Duration::from_millis(20)).await;
                }
            }
            End::Closing => {}
        }
        live.connection.closed().cancel();
        if let Some(process) = process {
            process.stop().await;
        }
    }

    /// Takes a started program out of use that was not used for long.
    fn end_unused(&self, live: &Arc<Live>) -> bool {
        if !matches!(self.config.wire, WireConfig::Stdio { .. }) {
            return false;
        }
        let mut state = self.lock();
        let used = *live.used.lock().unwrap_or_else(PoisonError::into_inner);
        let unused = live.users.load(Ordering::SeqCst) == 0 && used.elapsed() >= self.config.idle;
        if unused && state.means(live) {
            state.phase = Phase::Idle;
            state.failures = 0;
        }
        unused
    }

    /// The next use makes a new connection, and at once, whatever failed before.
    pub(super) fn begin_anew(&self) {
        let mut state = self.lock();
        if let Phase::Live(live) = &state.phase {
            live.retired.cancel();
            state.phase = Phase::Idle;
        }
        (state.failures, state.not_before, state.last_error) = (0, None, None);
    }

    /// The next use makes a new connection; this one ends when its calls have.
    pub(super) fn retire(&self, live: &InUse, failed: bool) {
        let mut state = self.lock();
        if state.means(&live.0) {
            state.phase = Phase::Idle;
            if failed {
                state.failed(None);
            }
        }
        live.0.retired.cancel();
    }
}

enum Look {
    Use(InUse),
    Wait(Shared<BoxFuture<'static, Result<(), ToolError>>>),
    Pause(Duration),
}

impl State {
    fn means(&self, live: &Arc<Live>) -> bool {
        matches!(&self.phase, Phase::Live(current) if Arc::ptr_eq(current, live))
    }

    /// The connection broke by itself.
    fn died(&mut self, live: &Arc<Live>) {
        if !self.means(live) {
            return;
        }
        self.phase = Phase::Idle;
        if live.since.elapsed() >= STEADY {
            self.failures = 0;
        }
        let said = live.last_words.as_ref().map(LastWords::get).filter(|said| !said.is_empty());
        let said = said.map(|said| format!("; it last said: {said}")).unwrap_or_default();
        let message = format!("it ended by itself{said}");
        self.failed(Some(ToolError::new(ToolErrorKind::Unavailable, message)));
    }

    fn failed(&mut self, err: Option<ToolError>) {
        self.not_before = Some(Instant::now() + pause(self.failures));
        self.failures = self.failures.saturating_add(1);
        if err.is_some() {
            self.last_error = err;
        }
    }
}

/// The pause after a failure that has had so many before it.
fn pause(failures: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(failures)).min(MAX_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_half_a_minute() {
        let check = |failures, expected| assert_eq!(pause(failures).as_millis(), expected);
        check(0, 100);
        check(1, 200);
        check(8, 25_600);
        check(9, 30_000);
        check(u32::MAX, 30_000);
    }
}
