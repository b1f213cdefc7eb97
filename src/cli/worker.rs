//! `cynai worker`: the agent of a worker machine, in the foreground or as a child of the server.

use std::fs;
use std::io::{BufRead, Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

use crate::clock::SystemClock;
use crate::config::file::read_text;
use crate::worker::agent::{Agent, close_inherited_descriptors};
use crate::worker::config::{Token, WorkerConfig};
use crate::worker::enrol::{self, Enrolment, Pace};
use crate::worker::startup::{Format, Level, Logging, Startup};

/// The longest configuration, in bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Run the agent of a worker machine: it accepts jobs over HTTP and runs each in a sandbox.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
#[command(after_help = "Examples:\n  \
    cynai worker --state-dir /var/lib/cynai/worker\n  \
    cynai worker --state-dir ./worker --listen 127.0.0.1:8081 --mount logs=/var/log/app --slots 4\n  \
    cynai worker --config /etc/cynai/worker.yaml\n  \
    cynai worker --server https://cynai.example --id alpha --key-file /etc/cynai/worker.key\n  \
    cynai worker leave --config /etc/cynai/worker.yaml\n\n\
    With a server the worker registers there and takes its rules and tokens from it.\n\
    Without a token file a token is made on the first start and kept in the state directory.\n\
    The sandbox needs bubblewrap: apt-get install bubblewrap")]
pub(super) struct WorkerArgs {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Tell the server that this worker goes for good; its agent must not run.
    Leave(LeaveArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  cynai worker leave --config /etc/cynai/worker.yaml")]
struct LeaveArgs {
    /// The worker's startup file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Where its state is kept, when not where the file says.
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Configuration file, YAML or JSON: of an agent by itself, or, with `orchestrator`, of one in service of a server.
    /// The options below override it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where job records are kept; one agent at a time.
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Address of the Worker API; port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// File that holds the bearer token.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Directory that jobs may see read-only at /data/NAME; may be repeated.
    #[arg(long, value_name = "NAME=DIR", value_parser = named_directory)]
    mount: Vec<(String, PathBuf)>,
    /// Root filesystem for jobs that name this image; may be repeated.
    #[arg(long, value_name = "NAME=DIR", value_parser = named_directory)]
    image: Vec<(String, PathBuf)>,
    /// Jobs that run at once; twice the number of cores when not given.
    #[arg(long, value_name = "N")]
    slots: Option<usize>,
    /// The server to register with; what a startup file calls `orchestrator.url`.
    #[arg(
        long,
        value_name = "URL",
        requires_all = ["id", "key_file"],
        conflicts_with_all = ["config", "token_file"]
    )]
    server: Option<String>,
    /// The worker's name at its server: lower case letters, digits, `.`, `_` and `-`.
    #[arg(long, value_name = "SLUG", requires = "server")]
    id: Option<String>,
    /// File that holds the server's registration key.
    #[arg(long, value_name = "FILE", requires = "server")]
    key_file: Option<PathBuf>,
    /// Label that jobs may ask for; may be repeated.
    #[arg(long, value_name = "LABEL", requires = "server")]
    label: Vec<String>,
    /// Take the configuration as one JSON line from standard input, and end when it closes.
    #[arg(
        long,
        conflicts_with_all = ["config", "state_dir", "listen", "token_file", "mount", "image", "slots", "server"]
    )]
    stdin_config: bool,
}

/// Runs until a signal, or the end of standard input when that brought the configuration.
pub(super) async fn run(args: WorkerArgs) -> anyhow::Result<()> {
    if let Some(Action::Leave(args)) = args.action {
        return leave(args).await;
    }
    let args = args.run;
    close_inherited_descriptors();
    let startup = startup(&args)?;
    log(startup.as_ref().map(|startup| &startup.logging))?;
    let shutdown = CancellationToken::new();
    let (agent, enrolment) = match startup {
        Some(startup) => {
            let started = Enrolment::start(startup, Arc::new(SystemClock), Pace::default()).await;
            let (agent, enrolment) = started.context("the worker could not start")?;
            (agent, Some(enrolment))
        }
        None => {
            let config = if args.stdin_config {
                config_from_stdin(shutdown.clone()).await?
            } else {
                config_from_args(&args)?
            };
            (Agent::bind(config, Arc::new(SystemClock)).await?, None)
        }
    };
    announce(&agent)?;
    let mut terminate = signal(SignalKind::terminate()).context("could not watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("could not watch for SIGINT")?;
    let signals = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = shutdown.cancelled() => {}
        }
        shutdown.cancel();
        // A second signal does not wait for the drain.
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let enrolled = async {
        if let Some(enrolment) = enrolment {
            enrolment.run(shutdown.clone()).await;
        }
    };
    let serving = async { futures::join!(agent.run(shutdown.clone()), enrolled).0 };
    tokio::select! {
        ended = serving => ended.context("the agent failed"),
        () = signals => Ok(()),
    }
}

/// Logs to standard error, or as the startup file says.
fn log(logging: Option<&Logging>) -> anyhow::Result<()> {
    let level = logging.and_then(|logging| logging.level).map_or("info", Level::as_str);
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    let writer = match logging.and_then(|logging| logging.file_path.as_ref()) {
        Some(path) => {
            let file = fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path);
            let file = file.with_context(|| format!("could not open {}", path.display()))?;
            BoxMakeWriter::new(Mutex::new(file))
        }
        None => BoxMakeWriter::new(std::io::stderr),
    };
    let logs =
        tracing_subscriber::fmt().with_writer(writer).with_ansi(false).with_env_filter(filter);
    // Somebody may have set up logging before; then that stays.
    let _ = match logging.and_then(|logging| logging.format) {
        Some(Format::Json) => logs.json().try_init(),
        _ => logs.try_init(),
    };
    Ok(())
}

/// What a worker in service of a server is started with; `None` for an agent by itself.
fn startup(args: &RunArgs) -> anyhow::Result<Option<Startup>> {
    let mut startup = match (&args.server, &args.id, &args.config) {
        (Some(server), Some(id), _) => {
            let mut startup = Startup::new(server, id);
            let key = args.key_file.as_ref().map(|path| absolute(path)).transpose()?;
            startup.orchestrator.registration_psk_file = key;
            startup.node.labels.clone_from(&args.label);
            startup
        }
        (_, _, Some(path)) => {
            let text = read_text(path)?;
            if !Startup::is_one(&text) {
                return Ok(None);
            }
            if args.token_file.is_some() {
                bail!("--token-file is for an agent by itself: a server brings its own token");
            }
            Startup::parse(path, &text)?
        }
        _ => return Ok(None),
    };
    if let Some(directory) = &args.state_dir {
        startup.storage.state_dir = Some(absolute(directory)?);
    }
    if let Some(address) = args.listen {
        startup.worker_api.listen_host = Some(address.ip().to_string());
        startup.worker_api.listen_port = Some(address.port());
    }
    startup.sandbox.max_concurrency = args.slots.or(startup.sandbox.max_concurrency);
    for (name, directory) in &args.mount {
        startup.sandbox.mounts.directories.insert(name.clone(), absolute(directory)?);
    }
    for (name, directory) in &args.image {
        startup.sandbox.images.insert(name.clone(), absolute(directory)?);
    }
    // A file was checked already, but not with what the options changed.
    let wrong = |(field, problem): (String, String)| anyhow::anyhow!("`{field}` {problem}");
    startup.check().map_err(wrong).context("the worker's options cannot be used")?;
    Ok(Some(startup))
}

async fn leave(args: LeaveArgs) -> anyhow::Result<()> {
    let mut startup = Startup::read(&args.config)?;
    if let Some(directory) = &args.state_dir {
        startup.storage.state_dir = Some(absolute(directory)?);
    }
    enrol::leave(&startup, &SystemClock).await?;
    say(&format!("{} is no longer a worker of {}", startup.node.id, startup.orchestrator.url))
}

fn say(line: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).context("could not write to standard output")
}

/// One JSON line for whoever started the agent.
fn announce(agent: &Agent) -> anyhow::Result<()> {
    say(&serde_json::to_string(&agent.listening())?)
}

/// Reads the first line; afterwards a thread waits for the end of the input. A plain thread, because a
/// read that never ends must not keep the runtime from ending.
async fn config_from_stdin(shutdown: CancellationToken) -> anyhow::Result<WorkerConfig> {
    let (tell, line) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("stdin".into()).spawn(move || {
        let mut input = std::io::stdin().lock();
        let mut line = String::new();
        let read = (&mut input).take(MAX_CONFIG_BYTES).read_line(&mut line);
        let _ = tell.send(read.map(|_| line));
        let _ = std::io::copy(&mut input, &mut std::io::sink());
        shutdown.cancel();
    })?;
    let line = line.await?.context("could not read the configuration from standard input")?;
    serde_json::from_str(&line).context("the configuration on standard input is not valid")
}

fn config_from_args(args: &RunArgs) -> anyhow::Result<WorkerConfig> {
    let mut config = match &args.config {
        Some(path) => from_file(path, args)?,
        None => {
            let Some(state_dir) = &args.state_dir else {
                bail!(
                    "a worker needs --state-dir, --config or --server; see `cynai worker --help`"
                );
            };
            let mut config = WorkerConfig::new(token(args, state_dir)?, state_dir);
            config.listen = SocketAddr::from(([127, 0, 0, 1], 8081));
            config
        }
    };
    config.state_dir = absolute(args.state_dir.as_ref().unwrap_or(&config.state_dir))?;
    config.listen = args.listen.unwrap_or(config.listen);
    config.slots = args.slots.or(config.slots);
    for (name, directory) in &args.mount {
        config.mounts.insert(name.clone(), absolute(directory)?);
    }
    for (name, directory) in &args.image {
        config.images.insert(name.clone(), absolute(directory)?);
    }
    Ok(config)
}

/// A file may leave the token out: then it comes from the token file, as without a configuration.
fn from_file(path: &Path, args: &RunArgs) -> anyhow::Result<WorkerConfig> {
    let text =
        fs::read_to_string(path).with_context(|| format!("could not read {}", path.display()))?;
    if text.len() as u64 > MAX_CONFIG_BYTES {
        bail!("{} is over {MAX_CONFIG_BYTES} bytes", path.display());
    }
    let invalid = || format!("{} is not a valid worker configuration", path.display());
    let mut value: serde_json::Value = serde_saphyr::from_str(&text).with_context(invalid)?;
    let state_dir = value.get("state_dir").and_then(serde_json::Value::as_str).map(PathBuf::from);
    let state_dir = args.state_dir.clone().or(state_dir);
    if let (Some(fields), Some(state_dir)) = (value.as_object_mut(), state_dir) {
        fields.insert("state_dir".into(), state_dir.to_string_lossy().into());
        if args.token_file.is_some() || !fields.contains_key("token") {
            fields.insert("token".into(), token(args, &state_dir)?.expose().into());
        }
    }
    serde_json::from_value(value).with_context(invalid)
}

/// The token from its file; without one, a token that is made once and kept in the state directory.
fn token(args: &RunArgs, state_dir: &Path) -> anyhow::Result<Token> {
    let own = state_dir.join("token");
    let path = args.token_file.as_deref().unwrap_or(&own);
    match fs::read_to_string(path) {
        Ok(text) => Ok(Token::new(text.trim())),
        Err(err) if err.kind() == std::io::ErrorKind::NotFound && args.token_file.is_none() => {
            let token = Token::random();
            fs::DirBuilder::new().recursive(true).mode(0o700).create(state_dir)?;
            let mut file =
                fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&own)?;
            writeln!(file, "{}", token.expose())?;
            tracing::info!("a token was made and written to {}", own.display());
            Ok(token)
        }
        Err(err) => {
            Err(err).with_context(|| format!("could not read the token in {}", path.display()))
        }
    }
}

fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("could not resolve {}", path.display()))
}

fn named_directory(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => {
            Ok((name.to_owned(), PathBuf::from(path)))
        }
        _ => Err("expected NAME=DIR".to_owned()),
    }
}
