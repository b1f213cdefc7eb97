//! `cynai serve`: the whole system in one process, with a private database unless told otherwise.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures::FutureExt;
use sqlx::PgPool;
use sqlx::postgres::PgConnectOptions;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::clock::SystemClock;
use crate::config::sections::{FleetSection, RetentionConfig};
use crate::config::tools::ToolsConfig;
use crate::config::{
    ConfigError, DatabaseConfig, LocalWorkerConfig, LogFormat, ServeArgs, ServeConfig,
};
use crate::driver::instance::Instance;
use crate::driver::{Driver, DriverConfig};
use crate::egress::guard::Guard;
use crate::egress::keyfile;
use crate::gateway::origin::OriginPolicy;
use crate::gateway::{self, Gateway, GatewayConfig, ReadyCheck};
use crate::graph::check::render;
use crate::graph::load::load_paths;
use crate::models::Models;
use crate::nodes::job::Job;
use crate::nodes::model::Model;
use crate::nodes::tool::Tool;
use crate::nodes::webhook::Webhook;
use crate::nodes::{Registry, StoredNames, builtin};
use crate::services::catalog::GraphCatalog;
use crate::services::fleet::{FleetConfig, KnownWorker};
use crate::services::secrets::Vault;
use crate::services::{Egress, ServiceLimits, Services};
use crate::store::connect;
use crate::store::embedded::{BinarySearch, Embedded, EmbeddedConfig};
use crate::store::retention::Retention;
use crate::tls::accept::Acceptor;
use crate::tools::Tools;
use crate::worker::client::WorkerClient;
use crate::worker::config::{Token, WorkerConfig};
use crate::worker::local::LocalWorker;

/// Connections of the pool for signals and migrations.
const DIRECT_POOL: u32 = 3;
/// How long an address may be in use before that is an error.
const ADDRESS_PATIENCE: Duration = Duration::from_secs(2);
/// Between the end of the local worker and its next start.
const WORKER_RESTART: Duration = Duration::from_secs(1);

/// The connections to the database.
struct Database {
    pool: PgPool,
    direct: PgPool,
}

/// Runs until SIGTERM or SIGINT.
pub(super) async fn run(args: ServeArgs) -> anyhow::Result<()> {
    let config = args.resolve()?;
    super::config::check_allowed(&config.file)?;
    init_logs(&config);
    let stop = stop_signal()?;
    // The port is taken first: a second server on it must not even wake the database.
    let listener = listen(config.listen)
        .await
        .map_err(|source| ConfigError::Listen { listen: config.listen, source })?;
    let instance = Instance::take(&config.data_dir)?;
    let (database, embedded) = open_database(&config).await?;
    // Looked after as long as anything uses it: a database that dies is started again.
    let (mut keeping, unused) = (JoinSet::new(), CancellationToken::new());
    if let Some(embedded) = embedded {
        keeping.spawn(embedded.supervise(unused.clone()));
    }
    let served = async {
        connect::migrate(&database.direct).await?;
        serve(&config, listener, &instance, &database, stop).await
    };
    let served = served.await;
    database.pool.close().await;
    database.direct.close().await;
    unused.cancel();
    let mut stopped = Ok(());
    while let Some(ended) = keeping.join_next().await {
        let ended =
            ended.map_err(anyhow::Error::from).and_then(|ended| ended.map_err(anyhow::Error::from));
        stopped = ended.context("the database did not stop in good order");
    }
    // Why the server ended matters more than how its database did.
    served.and(stopped)
}

async fn serve(
    config: &ServeConfig,
    listener: TcpListener,
    instance: &Instance,
    database: &Database,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let env = serde_json::to_value(&config.graph_env)?;
    let registry = registry(config);
    let stored = StoredNames(registry.clone());
    let limits = ServiceLimits::default();
    let services = Services::with_nodes(
        database.pool.clone(),
        Arc::new(SystemClock),
        limits,
        Arc::new(stored.clone()),
        env.clone(),
    );
    services.set_egress(Egress {
        vault: open_vault(config),
        webhooks: Guard::new(super::config::check_allowed(&config.file)?),
    });
    services.set_fleet(fleet(&config.file.fleet)?);
    services.check_secrets().await?;
    services.set_builtin(builtin::graphs(&stored)?);
    let tools = ToolsConfig::new(config.file.mcp_servers.clone(), config.data_dir.join("tools"));
    let tools = Tools::new(tools, Arc::new(services.keys()));
    services.set_tools(tools.clone());
    let models = config.file.models.clone();
    services.set_models(Models::new(models, Arc::new(services.keys()), Arc::new(SystemClock))?);
    let registry = registry
        .with_job(Job::new(services.clone()))
        .with_webhook(Webhook::new(services.clone()))
        .with_model(Model::new(services.clone()))
        .with_tool(Tool::new(services.clone()));
    services.register_graphs(load_graphs(config, &registry)?).await?;
    services.bootstrap_admin(&config.admin_token_file).await?;
    let driver = Arc::new(Driver::new(
        database.pool.clone(),
        Arc::clone(services.hub()),
        services.versions().clone(),
        Arc::new(registry),
        DriverConfig {
            instance: instance.id,
            host: nix::unistd::gethostname()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default(),
            lease: config.lease,
            capacity: config.driver_capacity,
            env,
            retention: retention(&config.file.retention),
            ..DriverConfig::default()
        },
    ));
    services.set_intake(Arc::clone(driver.intake()));
    let address = listener.local_addr()?;
    let tls = acceptor(config)?;
    let gateway =
        Gateway::new(services.clone(), gateway_config(config), vec![driver_check(&driver)]);
    let mut background = JoinSet::new();
    let (signals, direct) = (Arc::clone(services.hub()), database.direct.clone());
    background.spawn(async move { signals.run(direct).await });
    watch_workers(&services, &mut background);
    let worker_name = format!("local:{}", instance.id);
    match &config.local_worker {
        Some(worker) => {
            let worker = worker_config(config, worker);
            let services = services.clone();
            background.spawn(async move { keep_worker(&services, worker_name, worker).await });
        }
        None => services.lose_jobs_of(&worker_name).await?,
    }
    let (moving, moving_stop) = (Arc::clone(&driver), stop.clone());
    let mut moving = JoinSet::from_iter([async move { moving.run(moving_stop).await }]);
    tracing::info!(%address, data_dir = %config.data_dir.display(), "ready");
    announce(if tls.is_some() { "https" } else { "http" }, address);
    let served =
        gateway::serve::serve(listener, gateway, tls, stop.clone().cancelled_owned()).await;
    stop.cancel();
    while moving.join_next().await.is_some() {}
    tools.close().await;
    // The last signal tells the other servers that runs were released.
    tokio::time::sleep(Duration::from_millis(20)).await;
    background.shutdown().await;
    served.context("the server ended")
}

/// The keys of the store of secrets. Without them the server starts all the same, and says so.
fn open_vault(config: &ServeConfig) -> Vault {
    match keyfile::load(&config.master_keys) {
        Ok(ring) => Vault::Open(Arc::new(ring)),
        Err(err) => Vault::Closed(format!("{:#}", anyhow::Error::new(err))),
    }
}

/// What every server does for jobs and workers, whoever started them.
fn watch_workers(services: &Services, background: &mut JoinSet<()>) {
    let (dead, stops, fleet) = (services.clone(), services.clone(), services.clone());
    background.spawn(async move { dead.watch_dead_servers().await });
    background.spawn(async move { stops.watch_stops().await });
    background.spawn(async move { fleet.watch_fleet().await });
}

fn fleet(section: &FleetSection) -> anyhow::Result<FleetConfig> {
    let usual = FleetConfig::default();
    let ca_bundle_pem = match &section.ca_bundle_file {
        Some(path) => Some(std::fs::read_to_string(path).with_context(|| {
            format!("`fleet.ca_bundle_file`: {} cannot be read", path.display())
        })?),
        None => None,
    };
    Ok(FleetConfig {
        registration_keys: section.registration_keys.clone().unwrap_or(usual.registration_keys),
        public_url: section.public_url.clone(),
        heartbeat: section.heartbeat(),
        stale_after: section.stale_after(),
        node_token: section.node_token.unwrap_or(usual.node_token),
        ca_bundle_pem,
    })
}

fn retention(config: &RetentionConfig) -> Retention {
    let usual = Retention::default();
    Retention {
        keep_last: config.keep_last,
        max_age: config.max_age,
        stream_rows: config.stream_rows.unwrap_or(usual.stream_rows),
        temporary_threads: config.temporary_threads.unwrap_or(usual.temporary_threads),
    }
}

/// The nodes that are there before the services are.
fn registry(config: &ServeConfig) -> Registry {
    let registry = Registry::default();
    #[cfg(debug_assertions)]
    if config.test_nodes {
        return registry.with(crate::nodes::testing::APPEND, crate::nodes::testing::Append);
    }
    let _ = config;
    registry
}

/// Listens. A server that was killed a moment ago may hold the address until the system has cleared it away.
async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let deadline = Instant::now() + ADDRESS_PATIENCE;
    loop {
        match TcpListener::bind(address).await {
            Err(err)
                if err.kind() == std::io::ErrorKind::AddrInUse && Instant::now() < deadline =>
            {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            result => return result,
        }
    }
}

/// The local worker's configuration; its token is new with each start.
fn worker_config(config: &ServeConfig, worker: &LocalWorkerConfig) -> WorkerConfig {
    WorkerConfig {
        mounts: worker.mounts.clone(),
        images: worker.images.clone(),
        slots: worker.slots,
        bwrap: worker.bubblewrap.clone(),
        ..WorkerConfig::new(Token::random(), config.data_dir.join("worker"))
    }
}

/// Keeps a local worker alive, and fetches what it finishes, until dropped.
async fn keep_worker(services: &Services, name: String, config: WorkerConfig) {
    let http = match reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .build()
    {
        Ok(http) => http,
        Err(err) => {
            tracing::error!(
                error = &err as &dyn std::error::Error,
                "no HTTP client for the local worker"
            );
            return;
        }
    };
    loop {
        match LocalWorker::start(&config).await {
            Ok(mut worker) => {
                tracing::info!(
                    address = worker.base_url(),
                    pid = worker.pid(),
                    "the local worker runs"
                );
                let client =
                    WorkerClient::new(worker.base_url(), worker.token().clone(), http.clone());
                let known = KnownWorker {
                    name: name.clone(),
                    label: "local".to_owned(),
                    client,
                    slots: u64::try_from(config.slots()).ok(),
                    images: Some(config.image_names()),
                    mounts: Some(config.mounts.keys().cloned().collect()),
                    limits: BTreeMap::new(),
                    sending: Arc::default(),
                };
                services.set_local_worker(Some(known.clone()));
                tokio::select! {
                    ended = worker.exited() => tracing::warn!(?ended, "the local worker ended; it is started again"),
                    () = services.watch_results(&known) => {}
                }
                services.set_local_worker(None);
            }
            Err(err) => tracing::error!(
                error = &err as &dyn std::error::Error,
                "the local worker could not be started"
            ),
        }
        tokio::time::sleep(WORKER_RESTART).await;
    }
}

#[expect(clippy::print_stdout, reason = "scripts wait for this line")]
fn announce(scheme: &str, address: SocketAddr) {
    println!("cynai is ready on {scheme}://{address}");
}

fn acceptor(config: &ServeConfig) -> anyhow::Result<Option<Acceptor>> {
    let tls = config.tls.as_ref().map(|(certificate, key)| Acceptor::from_files(certificate, key));
    tls.transpose().context("there is no TLS (--tls-cert, --tls-key)")
}

fn gateway_config(config: &ServeConfig) -> GatewayConfig {
    GatewayConfig {
        body_bytes: config.body_limit_bytes,
        scheme: if config.tls.is_some() { "https" } else { "http" },
        origin: OriginPolicy {
            loopback: config.listen.ip().is_loopback(),
            hosts: config.allowed_hosts.clone(),
            ..OriginPolicy::default()
        },
        ..GatewayConfig::default()
    }
}

fn driver_check(driver: &Driver) -> ReadyCheck {
    let leased = driver.leased();
    ReadyCheck {
        name: "driver",
        check: Arc::new(move || {
            let leased = leased.load(Ordering::Relaxed);
            async move { if leased { Ok(()) } else { Err("the driver has no lease yet".to_owned()) } }.boxed()
        }),
    }
}

fn load_graphs(config: &ServeConfig, registry: &Registry) -> anyhow::Result<GraphCatalog> {
    if config.graphs.is_empty() {
        return Ok(GraphCatalog::default());
    }
    let loaded = load_paths(&config.graphs, registry)?;
    if loaded.has_errors() {
        bail!("{}", render::render(&loaded.diagnostics, &loaded.sources, false));
    }
    for graph in loaded.catalog.iter() {
        tracing::info!(graph = graph.name, hash = %graph.hash, "graph {} is loaded", graph.name);
    }
    Ok(GraphCatalog::new(loaded.catalog.iter().map(Arc::clone)))
}

async fn open_database(config: &ServeConfig) -> anyhow::Result<(Database, Option<Embedded>)> {
    let (options, direct, embedded) = match &config.database {
        DatabaseConfig::Embedded { pg_bin, search_path, pg_user, settings } => {
            let binaries = BinarySearch {
                configured: pg_bin.clone(),
                path: search_path.clone(),
                ..BinarySearch::default()
            };
            let embedded = Embedded::start(EmbeddedConfig {
                binaries,
                user: pg_user.clone(),
                settings: settings.clone(),
                ..EmbeddedConfig::new(&config.data_dir)
            })
            .await?;
            (embedded.connect_options(), embedded.connect_options(), Some(embedded))
        }
        DatabaseConfig::External { url, direct_url } => {
            let parse = |url: &str| {
                PgConnectOptions::from_str(url).context("the database's address cannot be read")
            };
            (parse(url.expose())?, parse(direct_url.expose())?, None)
        }
    };
    let (pool, direct) =
        (connect::pool(options, config.pool_size), connect::pool(direct, DIRECT_POOL));
    Ok((Database { pool, direct }, embedded))
}

fn stop_signal() -> anyhow::Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};
    let stop = CancellationToken::new();
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let token = stop.clone();
    // Ends with the process: there is nothing to await.
    #[expect(clippy::disallowed_methods, reason = "lives exactly as long as the process")]
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        token.cancel();
    });
    Ok(stop)
}

fn init_logs(config: &ServeConfig) {
    // The library that speaks MCP logs whole messages, with whatever is in them: only who asks for that.
    let filter = format!("rmcp=off,{}", config.log_filter);
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("rmcp=off,info"));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Colours are for terminals; and not there either when NO_COLOR is set, which is the default's own rule.
    let logs = if std::io::stderr().is_terminal() { logs } else { logs.with_ansi(false) };
    // A test may have set up its own.
    let _ = match config.log_format {
        LogFormat::Json => logs.json().try_init(),
        LogFormat::Text => logs.try_init(),
    };
}
