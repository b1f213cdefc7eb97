//! Every operation, once: authorize, decide, write.
//!
//! REST handlers, MCP tools and graph nodes are three doors to this room: rules, ownership and limits
//! live here only. Every operation takes the [`api::Actor`] that asks, and every query is scoped by it.
//!
//! **Invariant:** nothing here advances a run: operations record intent, the driver moves runs.

mod accept;
pub mod access;
pub mod api;
pub mod assistants;
pub mod catalog;
mod checkpoint_id;
mod checks;
pub mod drawing;
mod effects;
pub mod error;
pub mod fleet;
mod gathered;
mod health;
pub mod jobs;
pub mod keys;
pub mod logins;
pub mod models;
pub mod runs;
pub mod secrets;
pub mod state;
pub mod stream;
mod tail;
pub mod threads;
pub mod tools;
pub mod webhooks;

use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use serde_json::Value;
use sqlx::{PgPool, Postgres, Transaction};

use crate::clock::Clock;
use crate::egress::guard::Guard;
use crate::graph::compile::{NoNodes, NodeNames};
use crate::models::Models;
use crate::store::accept::Accepter;
use crate::store::graphs::Graphs;
use crate::store::intake::Intake;
use crate::store::transaction;
use crate::tools::Tools;

use access::TokenCache;
use catalog::GraphCatalog;
use stream::Hub;

/// The operations. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Services(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    pool: PgPool,
    clock: Arc<dyn Clock>,
    limits: ServiceLimits,
    graphs: RwLock<Arc<GraphCatalog>>,
    hub: Hub,
    tails: tail::Tails,
    tokens: TokenCache,
    versions: Graphs,
    env: Value,
    directory: fleet::Directory,
    fleet: OnceLock<fleet::FleetConfig>,
    tools: OnceLock<Tools>,
    models: OnceLock<Models>,
    egress: OnceLock<Egress>,
    webhook_client: OnceLock<reqwest::Client>,
    webhook_lanes: webhooks::Lanes,
    accepter: Accepter,
    intake: OnceLock<Arc<Intake>>,
    builtin: OnceLock<GraphCatalog>,
}

/// What operations need to reach other machines: the keys of the store of secrets, and where they may connect.
#[derive(Debug, Clone, Default)]
pub struct Egress {
    /// The keys of the store of secrets.
    pub vault: secrets::Vault,
    /// Where webhooks may go.
    pub webhooks: Guard,
}

/// Bounds that an operator may change.
#[derive(Debug, Clone)]
pub struct ServiceLimits {
    /// Bytes of the JSON text of a run's input or command, or of a state update.
    pub input_bytes: usize,
    /// Bytes of the JSON text of any `metadata`, `config` or `context`.
    pub metadata_bytes: usize,
    /// Rows that one list may ask for.
    pub page: u32,
    /// Runs of one thread that have not ended.
    pub runs_per_thread: u32,
    /// Tokens of one user that are not revoked.
    pub tokens_per_user: u32,
    /// Named events of one thread that nobody has waited for yet.
    pub events_per_thread: u32,
    /// Streams of this process that are open at once.
    pub streams: usize,
}

impl Default for ServiceLimits {
    fn default() -> Self {
        Self {
            input_bytes: 8 << 20,
            metadata_bytes: 64 << 10,
            page: 1000,
            runs_per_thread: 1000,
            tokens_per_user: 1000,
            events_per_thread: 10_000,
            streams: 10_000,
        }
    }
}

impl Services {
    /// Operations on the database behind `pool`, with no graph loaded yet, no registered node and no `env`.
    #[must_use]
    pub fn new(pool: PgPool, clock: Arc<dyn Clock>, limits: ServiceLimits) -> Self {
        Self::with_nodes(
            pool,
            clock,
            limits,
            Arc::new(NoNodes),
            Value::Object(serde_json::Map::new()),
        )
    }

    /// As [`Services::new`], for graphs that use the nodes of `names` and see `env`.
    #[must_use]
    pub fn with_nodes(
        pool: PgPool,
        clock: Arc<dyn Clock>,
        limits: ServiceLimits,
        names: Arc<dyn NodeNames + Send + Sync>,
        env: Value,
    ) -> Self {
        Self(Arc::new(Inner {
            versions: Graphs::new(pool.clone(), names),
            accepter: Accepter::new(&pool),
            pool,
            clock,
            limits,
            graphs: RwLock::default(),
            hub: Hub::default(),
            tails: tail::Tails::default(),
            tokens: TokenCache::default(),
            env,
            directory: fleet::Directory::default(),
            fleet: OnceLock::new(),
            tools: OnceLock::new(),
            models: OnceLock::new(),
            egress: OnceLock::new(),
            webhook_client: OnceLock::new(),
            webhook_lanes: webhooks::Lanes::default(),
            intake: OnceLock::new(),
            builtin: OnceLock::new(),
        }))
    }

    /// Every version of every graph that a run is pinned to.
    #[must_use]
    pub fn versions(&self) -> &Graphs {
        &self.0.versions
    }

    /// Lets the driver of this process take in what is accepted here; the first one stays.
    pub fn set_intake(&self, intake: Arc<Intake>) {
        if self.0.intake.set(intake).is_err() {
            tracing::warn!("the driver's intake was set before: the first one stays");
        }
    }

    fn intake(&self) -> Option<&Arc<Intake>> {
        self.0.intake.get()
    }

    fn accepter(&self) -> &Accepter {
        &self.0.accepter
    }

    /// Gives these operations the servers of tools; the first ones stay. Without any there are no tools.
    pub fn set_tools(&self, tools: Tools) {
        let _ = self.0.tools.set(tools);
    }

    fn tools(&self) -> Option<&Tools> {
        self.0.tools.get()
    }

    /// Gives the operations what they need to reach other machines, once. Until then they have no keys, and may
    /// reach public addresses.
    pub fn set_egress(&self, egress: Egress) {
        if self.0.egress.set(egress).is_err() {
            tracing::warn!("egress was set before: the first setting stays");
        }
    }

    /// Gives the operations the graphs that the server runs for itself, once; [`Services::register_graphs`] stores
    /// them. Users cannot see or start them.
    pub fn set_builtin(&self, graphs: GraphCatalog) {
        for graph in graphs.iter() {
            self.0.versions.keep(graph);
        }
        if self.0.builtin.set(graphs).is_err() {
            tracing::warn!("the built-in graphs were set before: the first ones stay");
        }
    }

    fn builtin(&self) -> Option<&GraphCatalog> {
        self.0.builtin.get()
    }

    /// Whether runs may name a webhook: the graph that delivers is there.
    fn tells_ends(&self) -> bool {
        self.builtin().is_some_and(|graphs| graphs.get("webhook").is_some())
    }

    fn egress(&self) -> &Egress {
        self.0.egress.get_or_init(Egress::default)
    }

    fn vault(&self) -> &secrets::Vault {
        &self.egress().vault
    }

    fn directory(&self) -> &fleet::Directory {
        &self.0.directory
    }

    fn env(&self) -> &Value {
        &self.0.env
    }

    /// The graphs that new runs may start, as loaded now.
    #[must_use]
    pub fn graphs(&self) -> Arc<GraphCatalog> {
        Arc::clone(&self.0.graphs.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn set_graphs(&self, catalog: GraphCatalog) {
        for graph in catalog.iter() {
            self.0.versions.keep(graph);
        }
        *self.0.graphs.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(catalog);
    }

    /// The bounds in force.
    #[must_use]
    pub fn limits(&self) -> &ServiceLimits {
        &self.0.limits
    }

    /// The clock for what is only recorded.
    #[must_use]
    pub fn clock(&self) -> &dyn Clock {
        &*self.0.clock
    }

    /// What wakes streams and waiters of this process early.
    #[must_use]
    pub fn hub(&self) -> &Hub {
        &self.0.hub
    }

    /// Opens a transaction.
    async fn transaction(&self) -> Result<Transaction<'static, Postgres>, sqlx::Error> {
        transaction::begin(self.pool()).await
    }

    fn tails(&self) -> &tail::Tails {
        &self.0.tails
    }

    fn pool(&self) -> &PgPool {
        &self.0.pool
    }
}
