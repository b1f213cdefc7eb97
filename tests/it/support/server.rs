//! A child `cynai serve` that tests start, kill, freeze and start again.
//!
//! Its database is the embedded one of its own directory, which outlives a killed server, or one that
//! the test names. Waiting is polling with an end, never a fixed sleep.
//!
//! **Invariant:** only processes that were started here, or recognised as this directory's database, get
//! a signal; and none is left when the test ends, however it ends.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sqlx::ConnectOptions;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgSslMode};

use super::client::{Client, http};

const PROGRAM: &str = env!("CARGO_BIN_EXE_cynai");
/// The longest that anything here may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(5);

/// Where servers of one test live: directories, graph files, traces, and the embedded database.
#[derive(Debug)]
pub(crate) struct Site {
    dir: tempfile::TempDir,
    http: reqwest::Client,
    flags: Vec<String>,
    database_url: Option<String>,
}

/// A started server.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    http: reqwest::Client,
    address: Option<String>,
    output: mpsc::Receiver<String>,
    log: PathBuf,
    token_file: PathBuf,
}

/// What a server is started with beside its site's flags.
#[derive(Debug, Default, Clone)]
pub(crate) struct Start {
    /// Which of the site's data directories; servers that live at once have different ones.
    pub(crate) number: usize,
    /// Killed at this crash point.
    pub(crate) crash_at: Option<u64>,
    /// Stops itself before the COMMIT of this name and number.
    pub(crate) freeze_at: Option<(&'static str, u32)>,
    /// Where its crash points are logged.
    pub(crate) crash_log: Option<PathBuf>,
    /// Where it listens, when not on a port of the system's choice.
    pub(crate) listen: Option<String>,
}

impl Site {
    /// A directory with these graph files, for servers with the embedded database.
    pub(crate) fn new(graphs: &[(&str, &str)]) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::Builder::new().prefix("cy").tempdir().unwrap();
        let site = Self { dir, http: http(), flags: Vec::new(), database_url: None };
        fs::create_dir(site.path("graphs")).unwrap();
        for (name, text) in graphs {
            fs::write(site.path("graphs").join(format!("{name}.yaml")), text).unwrap();
        }
        site
    }

    /// For servers that share the database behind `url`.
    pub(crate) fn on_database(graphs: &[(&str, &str)], url: &str) -> Self {
        let mut site = Self::new(graphs);
        site.database_url = Some(url.to_owned());
        site
    }

    /// Every server of this site gets these flags too.
    pub(crate) fn with_flags(mut self, flags: &[&str]) -> Self {
        self.flags.extend(flags.iter().map(ToString::to_string));
        self
    }

    /// A path in the site's directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The file that `test/append` nodes write.
    pub(crate) fn traces(&self) -> PathBuf {
        self.path("traces")
    }

    fn data_dir(&self, number: usize) -> PathBuf {
        self.path(&format!("data{number}"))
    }

    /// The command line of a server, not started.
    pub(crate) fn command(&self, start: &Start) -> Command {
        let mut command = Command::new(PROGRAM);
        // The environment of whoever runs the tests plays no part.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("CYNAI_") || text.starts_with("DATABASE_") || text.starts_with("PG")
            {
                command.env_remove(name);
            }
        }
        command
            .args([
                "serve",
                "--listen",
                start.listen.as_deref().unwrap_or("127.0.0.1:0"),
                "--graphs",
            ])
            .arg(self.path("graphs"))
            .arg("--data-dir")
            .arg(self.data_dir(start.number))
            .arg("--env")
            .arg(format!("TRACES={}", self.traces().display()))
            .arg("--env")
            .arg(format!("SERVER={}", start.number))
            .arg("--admin-token-file")
            .arg(self.path("token"))
            .args(&self.flags)
            .args(["--log", "info,cynai::gateway=warn"])
            .env("CYNAI_TEST_NODES", "1")
            .env("NO_COLOR", "1")
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        match &self.database_url {
            Some(url) => command.args(["--database-url", url]),
            // What PostgreSQL does by itself would be counted as ours.
            None => command.args(["--pg-setting", "autovacuum=off"]),
        };
        if let Some(at) = start.crash_at {
            command.env("CYNAI_CRASH_AT", at.to_string());
        }
        if let Some((name, number)) = start.freeze_at {
            command.env("CYNAI_FREEZE_AT", format!("{name}:{number}"));
        }
        if let Some(log) = &start.crash_log {
            command.env("CYNAI_CRASH_LOG", log);
        }
        command
    }

    /// Starts a server and does not wait for it.
    pub(crate) fn launch(&self, start: &Start) -> Server {
        let log = self.path(&format!("log{}", start.number));
        let log_file = File::options().create(true).append(true).open(&log).unwrap();
        let mut child = self
            .command(start)
            .stdout(Stdio::piped())
            .stderr(log_file)
            .spawn()
            .expect("the server can be started");
        let output = child.stdout.take().unwrap();
        let (sender, receiver) = mpsc::channel();
        // Reads until the server ends, so that it never writes into a closed pipe.
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Server {
            child,
            http: self.http.clone(),
            address: None,
            output: receiver,
            log,
            token_file: self.path("token"),
        }
    }

    /// Starts a server and waits until it is ready.
    pub(crate) async fn start(&self, start: &Start) -> Server {
        let mut server = self.launch(start);
        assert!(
            server.ready().await,
            "the server ended instead of becoming ready:\n{}",
            server.log_tail()
        );
        server
    }

    /// Sends a signal to every process of the embedded database.
    pub(crate) fn signal_database(&self, signal: Signal) {
        let cluster = self.data_dir(0).join("postgres/cluster").canonicalize().unwrap();
        let pids = fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let mut count = 0;
        for pid in pids.filter(|pid| is_postgres_in(*pid, &cluster)) {
            // One that has just ended is no loss.
            count += usize::from(kill(Pid::from_raw(pid), signal).is_ok());
        }
        assert!(count > 0, "the database does not run");
    }

    /// A connection to the site's database, as its superuser where it is the embedded one.
    pub(crate) async fn database(&self) -> PgConnection {
        self.try_database().await.expect("the database can be reached")
    }

    /// The same; `None` while it cannot be reached.
    pub(crate) async fn try_database(&self) -> Option<PgConnection> {
        let options = match &self.database_url {
            Some(url) => url.parse().unwrap(),
            None => PgConnectOptions::new_without_pgpass()
                .socket(self.data_dir(0).join("postgres/socket"))
                .port(5432)
                .username("postgres")
                .database("cynai")
                .ssl_mode(PgSslMode::Disable),
        };
        options.connect().await.ok()
    }

    /// The process id of the embedded database, while it lives.
    pub(crate) fn postmaster(&self) -> Option<Pid> {
        postmaster(&self.data_dir(0))
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for number in 0..3 {
                let log = self.path(&format!("log{number}"));
                if log.exists() {
                    eprintln!("--- the end of the log of server {number}\n{}", tail(&log));
                }
            }
        }
        let Some(pid) = postmaster(&self.data_dir(0)) else { return };
        // A test may have frozen it.
        self.signal_database(Signal::SIGCONT);
        let _ = kill(pid, Signal::SIGQUIT);
        let deadline = Instant::now() + Duration::from_secs(10);
        while postmaster(&self.data_dir(0)) == Some(pid) && Instant::now() < deadline {
            std::thread::sleep(LOOK);
        }
    }
}

/// The first process of the cluster in `data_dir`, recognised by where it works and what it is.
fn postmaster(data_dir: &Path) -> Option<Pid> {
    let cluster = data_dir.join("postgres/cluster").canonicalize().ok()?;
    let pid: i32 = fs::read_to_string(cluster.join("postmaster.pid"))
        .ok()?
        .lines()
        .next()?
        .trim()
        .parse()
        .ok()?;
    is_postgres_in(pid, &cluster).then_some(Pid::from_raw(pid))
}

fn is_postgres_in(pid: i32, cluster: &Path) -> bool {
    let process = PathBuf::from(format!("/proc/{pid}"));
    fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd == cluster)
        && fs::read_to_string(process.join("comm")).is_ok_and(|name| name.trim() == "postgres")
}

impl Server {
    /// Waits until the server is ready; false when it ended instead.
    pub(crate) async fn ready(&mut self) -> bool {
        let begun = Instant::now();
        loop {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "the server does not become ready:\n{}",
                self.log_tail()
            );
            if let Ok(line) = self.output.try_recv()
                && let Some(address) = line.strip_prefix("cynai is ready on ")
            {
                self.address = Some(address.to_owned());
            }
            if let Some(address) = &self.address
                && Client::is_ready(&self.http, address).await
            {
                return true;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> &str {
        self.address.as_deref().expect("the server was ready once")
    }

    /// A client with the administrator's token.
    pub(crate) fn client(&self) -> Client {
        let token = fs::read_to_string(&self.token_file).expect("the first start wrote a token");
        Client::new(self.http.clone(), self.address(), token.trim())
    }

    /// Whether it has ended, by itself or not.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    /// Sends a signal, unless it has ended.
    pub(crate) fn signal(&mut self, signal: Signal) {
        if !self.has_ended() {
            kill(self.pid(), signal).unwrap();
        }
    }

    /// Whether it stands still.
    pub(crate) fn is_frozen(&self) -> bool {
        let stat =
            fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
    }

    /// Kills it, as a power cut would, and waits until it is gone.
    pub(crate) fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        // One that has ended is no error.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks it to stop and waits until it has.
    pub(crate) async fn stop(mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.wait().await
    }

    /// Waits for its end.
    pub(crate) async fn wait(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "the server does not end:\n{}", self.log_tail());
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The end of what it logged.
    pub(crate) fn log_tail(&self) -> String {
        tail(&self.log)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

/// Polls until `reached` gives something; the test fails when it takes longer than [`PATIENCE`].
pub(crate) async fn until<T>(what: &str, mut reached: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = reached().await {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(LOOK).await;
    }
}
