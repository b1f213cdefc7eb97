//! The races of the commit path, the queue and the leases, each one by name, on a real PostgreSQL.
//!
//! Time that decides is the database's, so a test that needs a lease to end or a wait to be due moves the
//! row and not the clock.

mod commits;
mod drivers;
mod threads;
mod waits;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cynai::clock::SystemClock;
use cynai::driver::{Driver, DriverConfig};
use cynai::graph::compile::compile_stored;
use cynai::graph::exec::{Activation, Node, NodeError, Outcome};
use cynai::graph::model::{Effect, Graph};
use cynai::ids::{InstanceId, RunId, ThreadId, UserId};
use cynai::nodes::Registry;
use cynai::services::api::{
    Actor, AssistantRef, Command, CreateRun, IfNotExists, MultitaskStrategy, RunKey, RunStatus,
    RunView,
};
use cynai::services::catalog::GraphCatalog;
use cynai::services::error::ServiceError;
use cynai::services::{ServiceLimits, Services};
use cynai::store::signals::Signals;
use futures::FutureExt;
use futures::future::BoxFuture;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// A node that stops at a gate until the test opens it.
#[derive(Default)]
pub struct Gate {
    open: AtomicBool,
    opened: Notify,
    /// How many activations have come to the gate.
    pub arrived: AtomicUsize,
    arrival: Notify,
}

impl Gate {
    pub fn open(&self) {
        self.open.store(true, Ordering::SeqCst);
        self.opened.notify_waiters();
    }

    async fn pass(&self) {
        self.arrived.fetch_add(1, Ordering::SeqCst);
        self.arrival.notify_waiters();
        loop {
            let opened = self.opened.notified();
            if self.open.load(Ordering::SeqCst) {
                return;
            }
            opened.await;
        }
    }

    /// Waits until so many have come.
    pub async fn wait_for(&self, arrivals: usize) {
        let all = async {
            loop {
                let arrival = self.arrival.notified();
                if self.arrived.load(Ordering::SeqCst) >= arrivals {
                    return;
                }
                arrival.await;
            }
        };
        tokio::time::timeout(PATIENCE, all).await.expect("an activation comes to the gate");
    }
}

struct AtGate(Arc<Gate>, Effect);

impl Node for AtGate {
    fn run<'a>(&'a self, _: &'a Activation<'a>) -> BoxFuture<'a, Result<Outcome, NodeError>> {
        async {
            self.0.pass().await;
            Ok(Outcome::output(Value::Null))
        }
        .boxed()
    }

    fn effect(&self) -> Effect {
        self.1
    }
}

/// Notes who ran, in order.
#[derive(Default)]
pub struct Trace(Mutex<Vec<(RunId, String)>>);

impl Trace {
    pub fn nodes_of(&self, run: RunId) -> Vec<String> {
        self.0
            .lock()
            .unwrap()
            .iter()
            .filter(|(of, _)| *of == run)
            .map(|(_, node)| node.clone())
            .collect()
    }

    pub fn runs(&self) -> Vec<RunId> {
        self.0.lock().unwrap().iter().map(|(run, _)| *run).collect()
    }
}

struct Traced(Arc<Trace>);

impl Node for Traced {
    fn run<'a>(
        &'a self,
        activation: &'a Activation<'a>,
    ) -> BoxFuture<'a, Result<Outcome, NodeError>> {
        async move {
            let item = activation
                .task
                .item
                .as_ref()
                .map(|item| format!("[{}]", item.index))
                .unwrap_or_default();
            self.0
                .0
                .lock()
                .unwrap()
                .push((activation.run_id, format!("{}{item}", activation.node.name)));
            Ok(Outcome::output(Value::Null))
        }
        .boxed()
    }

    fn effect(&self) -> Effect {
        Effect::Pure
    }
}

/// No test waits longer for what has to come.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Services and drivers on the test's database.
pub struct System {
    pub pool: PgPool,
    pub services: Services,
    pub actor: Actor,
    pub gate: Arc<Gate>,
    pub trace: Arc<Trace>,
    pub registry: Registry,
    _background: JoinSet<()>,
}

/// A driver under way. It goes when it is dropped, as if its process had died.
pub struct Moving {
    pub driver: Arc<Driver>,
    pub instance: InstanceId,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Moving {
    /// Stops it in good order.
    pub async fn stop(mut self) {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
    }

    /// Ends it as a crash would: nothing is released.
    pub async fn kill(mut self) {
        self.tasks.shutdown().await;
    }
}

impl System {
    pub async fn new(pool: PgPool, files: &[Value]) -> Self {
        let (gate, trace) = (Arc::new(Gate::default()), Arc::new(Trace::default()));
        let registry = Registry::default()
            .with("gate", AtGate(Arc::clone(&gate), Effect::Pure))
            .with("effect_gate", AtGate(Arc::clone(&gate), Effect::Effectful))
            .with("trace", Traced(Arc::clone(&trace)));
        let names = Arc::new(registry.clone());
        let services = Services::with_nodes(
            pool.clone(),
            Arc::new(SystemClock),
            ServiceLimits::default(),
            names,
            json!({}),
        );
        let mut graphs: BTreeMap<String, Arc<Graph>> = BTreeMap::new();
        for file in files {
            let find = |name: &str| graphs.get(name).cloned();
            let graph = compile_stored(&file.to_string(), &find, &registry);
            let graph = Arc::new(graph.unwrap_or_else(|problems| panic!("{problems:#?}")));
            graphs.insert(graph.name.clone(), graph);
        }
        services.register_graphs(GraphCatalog::new(graphs.into_values())).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        services.bootstrap_admin(&folder.path().join("token")).await.unwrap();
        let (user, name): (uuid::Uuid, String) =
            sqlx::query_as("select user_id, name from users").fetch_one(&pool).await.unwrap();
        let actor = Actor { user_id: UserId(user), name, admin: true };
        let mut background = JoinSet::new();
        let (signals, direct) = (Arc::clone(services.hub()), pool.clone());
        background.spawn(async move { signals.run(direct).await });
        Self { pool, services, actor, gate, trace, registry, _background: background }
    }

    pub fn driver_config() -> DriverConfig {
        DriverConfig {
            lease: Duration::from_secs(30),
            grace: Duration::from_millis(300),
            ..DriverConfig::default()
        }
    }

    /// Starts a driver with this process's signals.
    pub fn driver(&self, config: DriverConfig) -> Moving {
        self.driver_with(config, Arc::clone(self.services.hub()))
    }

    /// Starts a driver that hears nothing but its own signals, as in another process.
    pub fn deaf_driver(&self, config: DriverConfig) -> Moving {
        self.driver_with(config, Arc::new(Signals::default()))
    }

    /// Starts a driver that reaches the database over another pool.
    pub fn driver_on(&self, config: DriverConfig, pool: PgPool) -> Moving {
        self.moving(config, Arc::clone(self.services.hub()), pool)
    }

    fn driver_with(&self, config: DriverConfig, signals: Arc<Signals>) -> Moving {
        self.moving(config, signals, self.pool.clone())
    }

    fn moving(&self, config: DriverConfig, signals: Arc<Signals>, pool: PgPool) -> Moving {
        let instance = config.instance;
        let nodes = Arc::new(self.registry.clone());
        let versions = self.services.versions().clone();
        let driver = Arc::new(Driver::new(pool, signals, versions, nodes, config));
        let stop = CancellationToken::new();
        let (moving, stopping) = (Arc::clone(&driver), stop.clone());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { moving.run(stopping).await });
        Moving { driver, instance, stop, tasks }
    }

    pub fn request(graph: &str, input: Value) -> CreateRun {
        let mut request = CreateRun::new(AssistantRef::Name(graph.to_owned()), Some(input));
        request.if_not_exists = IfNotExists::Create;
        request
    }

    pub async fn start(&self, thread: ThreadId, graph: &str, input: Value) -> RunView {
        self.create(thread, Self::request(graph, input)).await.unwrap()
    }

    pub async fn create(
        &self,
        thread: ThreadId,
        request: CreateRun,
    ) -> Result<RunView, ServiceError> {
        self.services.create_run(&self.actor, Some(thread), request).await
    }

    pub async fn start_with(
        &self,
        thread: ThreadId,
        graph: &str,
        strategy: MultitaskStrategy,
    ) -> Result<RunView, ServiceError> {
        let mut request = Self::request(graph, json!({}));
        request.multitask_strategy = strategy;
        self.create(thread, request).await
    }

    /// Goes on with a thread, with an answer or without.
    pub async fn resume(
        &self,
        thread: ThreadId,
        graph: &str,
        answer: Option<Value>,
    ) -> Result<RunView, ServiceError> {
        let mut request = Self::request(graph, Value::Null);
        request.command =
            answer.map(|answer| Command { resume: Some(answer), ..Command::default() });
        self.create(thread, request).await
    }

    pub async fn wait(&self, run: &RunView) -> Value {
        let key = RunKey { thread: Some(run.thread_id), run: run.run_id };
        let waiting = self.services.wait_run(&self.actor, key);
        let result = tokio::time::timeout(PATIENCE, waiting).await.expect("the run ends").unwrap();
        serde_json::from_str(result.get()).unwrap()
    }

    pub async fn view(&self, run: &RunView) -> RunView {
        let key = RunKey { thread: Some(run.thread_id), run: run.run_id };
        self.services.get_run(&self.actor, key).await.unwrap()
    }

    pub async fn status(&self, run: &RunView) -> RunStatus {
        self.view(run).await.status
    }

    /// Waits until the run's head is in this status: `gone` when it has none.
    pub async fn head(&self, run: &RunView, status: &str) {
        let reached = async {
            loop {
                let now: Option<String> =
                    sqlx::query_scalar("select status from heads where run_id = $1")
                        .bind(run.run_id.0)
                        .fetch_optional(&self.pool)
                        .await
                        .unwrap();
                if now.as_deref().unwrap_or("gone") == status {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, reached)
            .await
            .unwrap_or_else(|_| panic!("the head never is {status}"));
    }

    pub async fn event(&self, thread: ThreadId, name: &str, payload: Value) {
        self.services.send_event(&self.actor, thread, name.to_owned(), payload).await.unwrap();
    }

    pub async fn sql(&self, sql: &'static str) -> u64 {
        sqlx::query(sql).execute(&self.pool).await.unwrap().rows_affected()
    }

    pub async fn count(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(&self.pool).await.unwrap()
    }

    /// Looks at what has to hold of the tables when nothing moves any more.
    pub async fn check_tables(&self) {
        let wrong = [
            ("select count(*) from heads h left join queue q using (run_id)
               where h.status = 'queued' and (q.run_id is null or q.state = 'later' and q.due < now())", "queued without a place"),
            ("select count(*) from queue q left join heads h using (run_id) where h.run_id is null", "a place without a head"),
            ("select count(*) from queue q join heads h using (run_id) where h.status = 'running'", "claimed and queued"),
            ("select count(*) from threads t where t.status = 'busy'
               and not exists (select from heads h where h.run_id = t.active_run and h.status <> 'pending')", "busy with nothing"),
            ("select count(*) from runs r left join heads h using (run_id) where (r.ended_at is null) <> (h.run_id is not null)",
             "a head of a run that has ended, or none of one that has not"),
            ("select count(*) from (select thread_id from heads where status <> 'pending' group by 1 having count(*) > 1) x",
             "two runs move one thread"),
            ("select count(*) from (
                select seq - lag(seq) over (partition by thread_id, namespace, branch order by seq) as gap from checkpoints) x
               where gap <> 1", "a hole in a branch"),
        ];
        for (sql, what) in wrong {
            assert_eq!(self.count(sql).await, 0, "{what}");
        }
    }
}

/// A graph of one node of this kind.
pub fn one(name: &str, node: Value) -> Value {
    json!({ "name": name, "state": { "log": { "type": "array", "reduce": "append" }, "value": {} },
            "nodes": { "node": node }, "edges": ["start -> node -> end"] })
}

/// A loop of so many supersteps.
pub fn looping() -> Value {
    json!({
        "name": "loop", "state": { "n": { "type": "integer", "reduce": "sum", "default": 0 }, "most": { "type": "integer", "default": 20 } },
        "nodes": { "step": { "set": { "n": 1 } } },
        "edges": ["start -> step", { "from": "step", "choose": [{ "when": "state.n < state.most", "to": "step" }, { "to": "end" }] }],
    })
}
