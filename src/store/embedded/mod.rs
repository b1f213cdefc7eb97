//! A private PostgreSQL, for when no `DATABASE_URL` is given.
//!
//! The cluster lies in the server's data directory and is made and run with the machine's own
//! PostgreSQL, with its default durability. It listens on a Unix socket in a directory that only its
//! user can enter, and it believes the kernel alone about who connects: our user is mapped to two
//! roles, `cynai` (which owns the database and is no superuser) and `postgres` (for administration).
//!
//! The database outlives us when we are killed: it has its own process group, and the next server with
//! this data directory takes it over as it runs. A server that stops in order stops its database too.
//!
//! **Invariant:** one process holds the data directory's lock from before the first look at the cluster
//! until after the database has stopped.
//! **Invariant:** fsync, full_page_writes and synchronous_commit are on, and nothing listens on TCP.

mod account;
mod binaries;
mod cluster;
mod error;
mod layout;
mod postmaster;
mod run;
mod settings;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use sqlx::{ConnectOptions, Connection};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use account::Account;
use binaries::Binaries;
pub use binaries::{BinarySearch, OLDEST};
pub use error::EmbeddedError;
use layout::Layout;
use postmaster::{POLL, PidFile};

/// The role that Cynai works as, and its database.
const ROLE: &str = "cynai";
/// The bootstrap superuser.
const ADMIN: &str = "postgres";
/// Names the socket's file; nothing listens on a port.
const PORT: u16 = 5432;

/// A crash recovery reads at most `max_wal_size` back, so this is generous.
const START_LIMIT: Duration = Duration::from_secs(300);
/// A fast stop writes one checkpoint.
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// An immediate stop writes nothing.
const QUIT_LIMIT: Duration = Duration::from_secs(10);
/// How often [`Embedded::supervise`] looks after the database.
const WATCH: Duration = Duration::from_millis(250);
/// Between two attempts to start a database that does not.
const RETRY: Duration = Duration::from_secs(2);
/// The server's log is emptied when it grows longer than this while it runs.
const LOG_LIMIT_BYTES: u64 = 64 << 20;

/// What an embedded database is made from.
#[derive(Debug, Clone)]
pub struct EmbeddedConfig {
    /// The server's data directory; the database takes its subdirectory `postgres`.
    pub data_dir: PathBuf,
    /// Where to look for PostgreSQL's programs.
    pub binaries: BinarySearch,
    /// Who runs the database when we are root; `postgres` when not given.
    pub user: Option<String>,
    /// Settings of PostgreSQL that replace Cynai's defaults, by name.
    pub settings: Vec<(String, String)>,
}

impl EmbeddedConfig {
    /// The defaults for a data directory.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            binaries: BinarySearch::default(),
            user: None,
            settings: Vec::new(),
        }
    }
}

/// A running private database. Dropping it leaves the database running, for the next server to take
/// over; [`Embedded::stop`] stops it.
#[derive(Debug)]
pub struct Embedded {
    layout: Layout,
    account: Account,
    binaries: Binaries,
    arguments: Vec<String>,
    socket_dir: PathBuf,
    log_path: PathBuf,
    url: String,
    pid: i32,
    /// Ours to reap; none when the database survived an earlier server.
    child: Option<Child>,
    /// Released by the kernel when we die.
    _lock: File,
}

impl Embedded {
    /// Makes the database if there is none, recovers it if it crashed, takes it over if it runs, and
    /// returns when it accepts connections.
    pub async fn start(config: EmbeddedConfig) -> Result<Self, EmbeddedError> {
        settings::check(&config.settings)?;
        let account = Account::choose(config.user.as_deref())?;
        let layout = Layout::prepare(&config.data_dir, &account)?;
        let lock = layout.lock()?;
        let made_by = layout.made_by(&account)?;
        let binaries =
            Binaries::find(&config.binaries, &layout.cluster(), made_by.as_deref()).await?;
        layout.write_access_rules(&account, &[ROLE, ADMIN])?;
        layout.remove_half_made();
        if made_by.is_none() {
            cluster::make(&layout, &account, &binaries).await?;
        }
        let socket_dir = layout.socket_dir(&account)?;
        let arguments = settings::arguments(&layout, &socket_dir, &config.settings);
        let mut embedded = Self {
            log_path: layout.log(),
            url: url(&socket_dir),
            layout,
            account,
            binaries,
            arguments,
            socket_dir,
            pid: 0,
            child: None,
            _lock: lock,
        };
        embedded.bring_up().await?;
        Ok(embedded)
    }

    /// A connection URL for sqlx and for `psql`.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// How to connect, independent of the `PG*` variables of the environment.
    #[must_use]
    pub fn connect_options(&self) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .socket(&self.socket_dir)
            .port(PORT)
            .username(ROLE)
            .database(ROLE)
            .ssl_mode(PgSslMode::Disable)
    }

    /// The process id of the database's first process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Where PostgreSQL writes its log.
    #[must_use]
    pub fn log_path(&self) -> &Path {
        &self.log_path
    }

    /// Whether this process started the database, rather than taking it over as it ran.
    #[must_use]
    pub fn was_started(&self) -> bool {
        self.child.is_some()
    }

    /// Stops the database and releases the data directory. Open connections are closed by it.
    pub async fn stop(mut self) -> Result<(), EmbeddedError> {
        self.shut_down().await
    }

    /// Looks after the database until `stop` is cancelled, then stops it: one that ends is started
    /// again, with a pause between attempts that fail, and its log stays bounded.
    pub async fn supervise(mut self, stop: CancellationToken) -> Result<(), EmbeddedError> {
        loop {
            let pause = match self.watch_once().await {
                Ok(()) => WATCH,
                Err(err) => {
                    let error = &err as &dyn std::error::Error;
                    tracing::error!(error, "the database ended and does not start again");
                    RETRY
                }
            };
            tokio::select! {
                () = stop.cancelled() => return self.shut_down().await,
                () = sleep(pause) => {}
            }
        }
    }

    /// One look at the database: starts it when it is not there.
    async fn watch_once(&mut self) -> Result<(), EmbeddedError> {
        if let Ok(found) = std::fs::metadata(&self.log_path)
            && found.len() > LOG_LIMIT_BYTES
        {
            // The server appends, so it goes on at the new end.
            let emptied =
                File::options().write(true).open(&self.log_path).and_then(|log| log.set_len(0));
            tracing::warn!(ok = emptied.is_ok(), "emptied the database's log: it was too long");
        }
        if postmaster::belongs(self.pid, &self.layout.cluster()) {
            return Ok(());
        }
        tracing::warn!(pid = self.pid, "the database has ended: starting it again");
        self.bring_up().await
    }

    /// Takes over the server that runs, if it runs as we want it, or else starts one.
    async fn bring_up(&mut self) -> Result<(), EmbeddedError> {
        let cluster = self.layout.cluster();
        if let Some(running) = postmaster::alive(&cluster) {
            if postmaster::started_with(&cluster, &self.arguments) {
                tracing::info!(pid = running.pid, "the database still runs: taking it over");
                self.pid = running.pid;
                if self.await_ready().await? {
                    // It reads the rules of who may connect again: they were just rewritten.
                    postmaster::send(self.pid, &cluster, Signal::SIGHUP);
                    return self.verify().await;
                }
            } else {
                tracing::info!(
                    pid = running.pid,
                    "the database runs with other settings: restarting it"
                );
                self.pid = running.pid;
                self.shut_down().await?;
            }
        }
        postmaster::clear_left_overs(&cluster).await?;
        let log = self.layout.open_log()?;
        let since = log.metadata().map_or(0, |found| found.len());
        self.spawn(log)?;
        if self.await_ready().await? {
            return self.verify().await;
        }
        Err(EmbeddedError::Start { log: self.log_path.clone(), said: self.log_tail(since) })
    }

    fn spawn(&mut self, log: File) -> Result<(), EmbeddedError> {
        let program = self.binaries.postgres();
        let other = log.try_clone().map_err(EmbeddedError::files("open", &self.log_path))?;
        let mut command = Command::new(&program);
        command
            .args(&self.arguments)
            .env_clear()
            .env("LC_ALL", "C.UTF-8")
            .env("TZ", "UTC")
            .current_dir(self.layout.base())
            .stdin(std::process::Stdio::null())
            .stdout(log)
            .stderr(other)
            // Away from our terminal's Ctrl-C: the database ends when we say so.
            .process_group(0);
        self.account.apply(&mut command);
        let child = command
            .spawn()
            .map_err(|source| cluster::not_run(source, &program, &self.layout, &self.account))?;
        self.pid = child.id().and_then(|pid| i32::try_from(pid).ok()).unwrap_or_default();
        self.child = Some(child);
        tracing::info!(pid = self.pid, version = self.binaries.major, "starting the database");
        Ok(())
    }

    /// Waits until the server says that it is ready; false when it ended instead.
    async fn await_ready(&mut self) -> Result<bool, EmbeddedError> {
        let cluster = self.layout.cluster();
        let begun = Instant::now();
        let mut reported = begun;
        loop {
            if PidFile::read(&cluster).is_some_and(|file| file.pid == self.pid && file.ready) {
                return Ok(true);
            }
            let ended = match &mut self.child {
                Some(child) => !matches!(child.try_wait(), Ok(None)),
                None => !postmaster::belongs(self.pid, &cluster),
            };
            if ended {
                return Ok(false);
            }
            if begun.elapsed() > START_LIMIT {
                return Err(EmbeddedError::NotReady {
                    pid: self.pid,
                    seconds: START_LIMIT.as_secs(),
                    log: self.log_path.clone(),
                    said: self.log_tail(0),
                });
            }
            if reported.elapsed() > Duration::from_secs(5) {
                reported = Instant::now();
                let said = self.log_tail(0);
                let last = said.lines().last().unwrap_or_default();
                tracing::info!("still waiting for the database; it said: {last}");
            }
            sleep(POLL).await;
        }
    }

    /// Connects once: the map of users, the role and the database are as they must be.
    async fn verify(&self) -> Result<(), EmbeddedError> {
        let failed =
            |source| EmbeddedError::Connect { socket_dir: self.socket_dir.clone(), source };
        let connection = self.connect_options().connect().await.map_err(failed)?;
        connection.close().await.map_err(failed)
    }

    async fn shut_down(&mut self) -> Result<(), EmbeddedError> {
        let cluster = self.layout.cluster();
        postmaster::send(self.pid, &cluster, Signal::SIGINT);
        if !self.wait_gone(STOP_LIMIT).await {
            tracing::warn!(
                pid = self.pid,
                "the database does not stop: it will recover at its next start"
            );
            postmaster::send(self.pid, &cluster, Signal::SIGQUIT);
            if !self.wait_gone(QUIT_LIMIT).await {
                return Err(EmbeddedError::NotStopped { pids: vec![self.pid], cluster });
            }
        }
        tracing::info!(pid = self.pid, "the database has stopped");
        Ok(())
    }

    async fn wait_gone(&mut self, limit: Duration) -> bool {
        match &mut self.child {
            Some(child) => {
                let gone = tokio::time::timeout(limit, child.wait()).await.is_ok();
                if gone {
                    self.child = None;
                }
                gone
            }
            None => postmaster::gone(self.pid, &self.layout.cluster(), limit).await,
        }
    }

    /// The last lines of the log that were written after position `since`.
    fn log_tail(&self, since: u64) -> String {
        let text = std::fs::read(&self.log_path).unwrap_or_default();
        let from = usize::try_from(since).unwrap_or(0).min(text.len());
        run::tail(&text[from..])
    }
}

/// The URL of the database behind `socket_dir`.
fn url(socket_dir: &Path) -> String {
    // The directory was chosen to have no character that a URL would read otherwise, save these.
    let dir = socket_dir.to_string_lossy();
    let dir = dir.replace('+', "%2B").replace('=', "%3D").replace('@', "%40");
    format!("postgres://{ROLE}@localhost:{PORT}/{ROLE}?host={dir}")
}
