//! Leases runnable runs, advances them, renews, parks, releases.
//!
//! The loop wakes by a signal, by the next due time, or after [`POLL`]; it always looks at the tables.
//! Each claimed run is one task of this process. Authority is a row: the driver's lease (one update for
//! all its runs), and each run's fence. When the lease cannot be renewed the driver drops everything
//! that it holds and begins a new life; the runs are claimed again by whoever is alive.
//!
//! **Invariant:** knows no HTTP; and only what it holds a grant for does it move.

mod advance;
pub mod instance;

use std::collections::HashMap;
use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;
use serde_json::Value;
use sqlx::PgPool;
use tokio::sync::{Notify, Semaphore, broadcast};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::graph::exec::{Namespace, NodeSource};
use crate::ids::{InstanceId, RunId};
use crate::store::checkpointer::Authority;
use crate::store::commit::{COMMITTER_CONNECTIONS, Committer};
use crate::store::graphs::Graphs;
use crate::store::intake::{Arrival, Intake, Life};
use crate::store::queue::{self, Claim, Grant};
use crate::store::retention::{self, Retention};
use crate::store::signals::Signals;
use crate::store::{StoreError, connect, crash, transaction};

/// Without a signal, the tables are looked at this often.
const POLL: Duration = Duration::from_millis(500);
/// Dead drivers' runs are looked for this often, and whether the own ones are still held.
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// How often what is too old is deleted.
const RETAIN_EVERY: Duration = Duration::from_secs(60);
/// How long a driver that stops waits for runs that are just being accepted and granted to it.
const LAST_ARRIVALS: Duration = Duration::from_secs(1);
/// Due rows that one statement moves.
const PROMOTE: i64 = 1000;

/// What an operator sets.
#[derive(Debug, Clone)]
pub struct DriverConfig {
    /// This installation; it must not be used by two processes at once.
    pub instance: InstanceId,
    /// The machine, for people.
    pub host: String,
    /// How long authority lasts without renewal.
    pub lease: Duration,
    /// Runs in memory at once.
    pub capacity: usize,
    /// Activations of one run under way at once.
    pub max_parallel: usize,
    /// What graphs may see as `env`.
    pub env: Value,
    /// Processes that may die with a run, without a commit between them, before a person is asked.
    pub max_claims: i16,
    /// How long a stopping driver lets activations finish.
    pub grace: Duration,
    /// How long things are kept.
    pub retention: Retention,
}

impl Default for DriverConfig {
    fn default() -> Self {
        Self {
            instance: InstanceId::new(),
            host: String::new(),
            lease: Duration::from_secs(15),
            capacity: 256,
            max_parallel: 256,
            env: Value::Object(serde_json::Map::new()),
            max_claims: 3,
            grace: Duration::from_secs(10),
            retention: Retention::default(),
        }
    }
}

/// What all runs of a driver share.
pub(crate) struct Shared {
    pub(crate) pool: PgPool,
    pub(crate) committer: Committer,
    pub(crate) signals: Arc<Signals>,
    pub(crate) graphs: Graphs,
    pub(crate) nodes: Arc<dyn NodeSource>,
    pub(crate) config: DriverConfig,
    pub(crate) drain: Arc<AtomicBool>,
    pub(crate) authority: Authority,
    /// Tells the driver's loop to look at what is due.
    pub(crate) look: Notify,
}

/// Moves runs.
pub struct Driver {
    shared: Arc<Shared>,
    leased: Arc<AtomicBool>,
    running: Arc<Mutex<HashMap<RunId, Held>>>,
    intake: Arc<Intake>,
}

struct Held {
    fence: i64,
    abort: AbortHandle,
}

/// What the loop does next.
struct Rounds {
    /// When the tables are looked at for what is due, whatever is signalled.
    due: Instant,
    /// Whether there may be something to claim.
    claim: bool,
    /// Whether the last claim found nothing.
    empty: bool,
}

/// A life of the driver that has ended: why.
enum End {
    Stop,
    LeaseLost,
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver")
            .field("instance", &self.shared.config.instance)
            .finish_non_exhaustive()
    }
}

impl Driver {
    /// A driver over `pool`.
    #[must_use]
    pub fn new(
        pool: PgPool,
        signals: Arc<Signals>,
        graphs: Graphs,
        nodes: Arc<dyn NodeSource>,
        config: DriverConfig,
    ) -> Self {
        // Its own few connections: a pool hands its connections out in turn, and a statement that comes to
        // another of PostgreSQL's processes each time finds cold caches there. Measured with 64 runs at once:
        // 50,000 steps/s on two connections, 39,000 in turn on sixteen.
        let options = pool.connect_options().as_ref().clone();
        let committer = Committer::new(connect::lane(options, COMMITTER_CONNECTIONS));
        let drain = Arc::new(AtomicBool::new(false));
        let shared = Shared {
            pool,
            committer,
            signals,
            graphs,
            nodes,
            config,
            drain,
            authority: Authority::default(),
            look: Notify::new(),
        };
        Self {
            shared: Arc::new(shared),
            leased: Arc::new(AtomicBool::new(false)),
            running: Arc::default(),
            intake: Arc::default(),
        }
    }

    /// Where runs come in that this process accepts.
    #[must_use]
    pub fn intake(&self) -> &Arc<Intake> {
        &self.intake
    }

    /// The commit path, for its figures.
    #[must_use]
    pub fn committer(&self) -> &Committer {
        &self.shared.committer
    }

    /// True while this driver's lease holds.
    #[must_use]
    pub fn leased(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.leased)
    }

    /// How many runs are in memory.
    #[must_use]
    pub fn in_memory(&self) -> usize {
        self.held().len()
    }

    fn held(&self) -> std::sync::MutexGuard<'_, HashMap<RunId, Held>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves runs until `stop`, then lets what runs come to a checkpoint, releases it, and returns.
    pub async fn run(&self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            match self.live(&stop).await {
                Ok(End::Stop) => return,
                Ok(End::LeaseLost) => {
                    tracing::error!(instance = %self.shared.config.instance, "the lease was lost: all runs are dropped");
                }
                Err(err) => {
                    tracing::warn!(
                        error = &err as &dyn std::error::Error,
                        "the driver cannot reach the database; it tries again"
                    );
                    tokio::select! {
                        () = tokio::time::sleep(Duration::from_secs(1)) => {}
                        () = stop.cancelled() => return,
                    }
                }
            }
        }
    }

    /// One life: from taking a lease to losing it or stopping.
    async fn live(&self, stop: &CancellationToken) -> Result<End, StoreError> {
        let config = &self.shared.config;
        let asked = Instant::now();
        let epoch = {
            let mut db = self.shared.pool.acquire().await?;
            let registering = queue::register(&mut db, config.instance, &config.host, config.lease);
            crash::around("register", registering).await?
        };
        self.shared.authority.hold_until(asked + config.lease);
        tracing::info!(instance = %config.instance, epoch, "the driver has its lease");
        // A driver that was alone until now leaves what its process accepts to the queue from here on.
        self.shared.signals.driver_began();
        self.leased.store(true, Ordering::Relaxed);
        let mut runs = JoinSet::new();
        let end = tokio::select! {
            end = self.keep_lease(epoch, asked) => end,
            end = self.claim_and_run(epoch, &mut runs, stop) => end,
            never = self.delete_old() => match never {},
        };
        self.leased.store(false, Ordering::Relaxed);
        self.intake.close();
        match end {
            End::Stop => {
                tokio::select! {
                    () = self.drain(&mut runs) => {}
                    _ = self.keep_lease(epoch, Instant::now()) => {}
                }
                runs.shutdown().await;
                // What did not come to a checkpoint in time has done nothing wrong: it is no suspect.
                let mut held: Vec<(RunId, i64)> =
                    self.held().iter().map(|(run, held)| (*run, held.fence)).collect();
                held.extend(self.last_arrivals().await);
                self.release_all(&held).await;
                let mut db = self.shared.pool.acquire().await?;
                crash::around("unregister", queue::unregister(&mut db, config.instance, epoch))
                    .await?;
                self.shared.signals.queued();
            }
            End::LeaseLost => runs.shutdown().await,
        }
        self.held().clear();
        Ok(end)
    }

    /// Renews the lease, which holds since `renewed` at the latest, until that fails for good.
    async fn keep_lease(&self, epoch: i64, mut renewed: Instant) -> End {
        let config = &self.shared.config;
        loop {
            tokio::time::sleep(config.lease / 3).await;
            let asked = Instant::now();
            // Authority ends when the lease does, whether or not an answer comes.
            let left = config.lease.saturating_sub(renewed.elapsed());
            let renewal = async {
                let mut db = self.shared.pool.acquire().await?;
                crash::around("renew", queue::renew(&mut db, config.instance, epoch, config.lease))
                    .await
            };
            match tokio::time::timeout(left, renewal).await {
                Ok(Ok(true)) => {
                    renewed = asked;
                    self.shared.authority.hold_until(asked + config.lease);
                }
                Ok(Ok(false)) => return End::LeaseLost,
                Ok(Err(err)) => {
                    tracing::warn!(
                        error = &err as &dyn std::error::Error,
                        "the lease could not be renewed"
                    );
                }
                Err(_) => return End::LeaseLost,
            }
            if renewed.elapsed() >= config.lease {
                return End::LeaseLost;
            }
        }
    }

    /// Deletes what is too old, a little at a time.
    async fn delete_old(&self) -> Infallible {
        let mut progress = retention::Progress::default();
        loop {
            tokio::time::sleep(RETAIN_EVERY).await;
            match retention::pass(&self.shared.pool, &self.shared.config.retention, &mut progress)
                .await
            {
                Ok(deleted) if deleted == retention::Deleted::default() => {}
                Ok(deleted) => tracing::debug!(?deleted, "what was too old was deleted"),
                Err(err) => {
                    tracing::warn!(
                        error = &err as &dyn std::error::Error,
                        "what is too old could not be deleted"
                    );
                }
            }
        }
    }

    async fn claim_and_run(
        &self,
        epoch: i64,
        runs: &mut JoinSet<(RunId, i64)>,
        stop: &CancellationToken,
    ) -> End {
        let mut ended = self.shared.signals.ended();
        let suspects = Arc::new(Semaphore::new(1));
        let mut swept: Option<Instant> = None;
        let mut rounds = Rounds { due: Instant::now(), claim: true, empty: false };
        let mut alone = false;
        loop {
            self.start_arrivals(epoch, runs);
            if swept.is_none_or(|at| at.elapsed() >= SWEEP_EVERY) {
                self.recover().await;
                self.reconcile(epoch).await;
                alone = self.is_alone().await;
                swept = Some(Instant::now());
            }
            let more = match self.round(epoch, runs, &suspects, &mut rounds).await {
                Ok(more) => more,
                Err(err) => {
                    tracing::warn!(
                        error = &err as &dyn std::error::Error,
                        "runs could not be claimed"
                    );
                    false
                }
            };
            let room = self.room();
            let full = room == 0;
            if alone && rounds.empty && !full {
                self.intake.open(Life { instance: self.shared.config.instance, epoch }, room);
            } else {
                self.intake.close();
            }
            rounds.claim = more;
            let pause =
                if more { Duration::ZERO } else { rounds.due.duration_since(Instant::now()) };
            tokio::select! {
                biased;
                () = stop.cancelled() => return End::Stop,
                Some(done) = runs.join_next(), if !runs.is_empty() => {
                    self.forget(done);
                    // What could not be claimed for want of room can be now.
                    rounds.claim |= full;
                }
                () = self.intake.wait() => {}
                // The next sweep finds out whether it stays.
                () = self.shared.signals.wait_driver() => alone = false,
                run = ended.recv() => self.heard_end(epoch, run).await,
                () = self.shared.signals.wait_queued(), if !more => rounds.claim = true,
                // A run was parked until a time, or a suspect has proved harmless.
                () = self.shared.look.notified() => rounds.due = Instant::now(),
                () = tokio::time::sleep(pause) => {}
            }
            while let Some(done) = runs.try_join_next() {
                self.forget(done);
                rounds.claim |= full;
            }
        }
    }

    /// Does what its time has come for. True: there may be more to claim.
    async fn round(
        &self,
        epoch: i64,
        runs: &mut JoinSet<(RunId, i64)>,
        suspects: &Arc<Semaphore>,
        rounds: &mut Rounds,
    ) -> Result<bool, StoreError> {
        if Instant::now() >= rounds.due {
            // Set first: an error is not repeated in a hot loop.
            rounds.due = Instant::now() + POLL;
            let mut db = self.shared.pool.acquire().await?;
            let queued = queue::look(&mut db).await?;
            drop(db);
            rounds.claim |= queued.ready;
            if queued.due == Some(Duration::ZERO) {
                self.promote_due().await?;
                rounds.claim = true;
            }
            let again = queued.suspect && self.claim_suspect(epoch, runs, suspects).await?;
            let due = if again { Duration::ZERO } else { queued.due.unwrap_or(POLL) };
            rounds.due = Instant::now() + due.clamp(Duration::from_millis(1), POLL);
        }
        if !rounds.claim {
            return Ok(false);
        }
        rounds.empty = false;
        let room = i64::try_from(self.room()).unwrap_or(i64::MAX);
        if room == 0 {
            return Ok(false);
        }
        let more = self.claim_ready(epoch, runs, room.min(queue::MOST)).await?;
        rounds.empty = !more;
        Ok(more)
    }

    /// Starts the runs that were granted when this process accepted them.
    fn start_arrivals(&self, epoch: i64, runs: &mut JoinSet<(RunId, i64)>) {
        for Arrival { life, grant, root } in self.intake.take() {
            // What was granted to an earlier life is free, and is claimed again.
            if life.epoch == epoch {
                self.start(runs, grant, root, None);
            }
        }
    }

    /// The runs that were still being accepted when this driver stopped.
    async fn last_arrivals(&self) -> Vec<(RunId, i64)> {
        let mut arrived = Vec::new();
        let deadline = Instant::now() + LAST_ARRIVALS;
        loop {
            let arrivals = self.intake.take();
            arrived.extend(arrivals.iter().map(|one| (one.grant.run_id, one.grant.fence)));
            if self.intake.count() == 0 || Instant::now() >= deadline {
                return arrived;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Whether no other driver is alive: beside others, the queue shares the work.
    async fn is_alone(&self) -> bool {
        let asked = async {
            let mut db = self.shared.pool.acquire().await?;
            queue::others(&mut db, self.shared.config.instance).await
        };
        matches!(asked.await, Ok(false))
    }

    fn forget(&self, done: Result<(RunId, i64), tokio::task::JoinError>) {
        match done {
            Ok((run, fence)) => {
                // The run may have been claimed again before this task was seen to have ended.
                let mut held = self.held();
                if held.get(&run).is_some_and(|held| held.fence == fence) {
                    held.remove(&run);
                }
            }
            Err(err) if err.is_cancelled() => {}
            Err(err) => {
                tracing::error!(error = &err as &dyn std::error::Error, "a run's task panicked")
            }
        }
    }

    /// Somebody ended a run; if it is held here, its task goes.
    async fn heard_end(&self, epoch: i64, run: Result<RunId, broadcast::error::RecvError>) {
        match run {
            Ok(run) => {
                let held = self.held().contains_key(&run);
                if held {
                    self.reconcile(epoch).await;
                }
            }
            Err(_) => self.reconcile(epoch).await,
        }
    }

    /// Makes what is in memory what the tables say is held here: runs that were cancelled or taken over are
    /// dropped, and runs that were claimed without this driver's knowing are given back.
    async fn reconcile(&self, epoch: i64) {
        let result = async {
            let mut db = self.shared.pool.acquire().await?;
            queue::held_by(&mut db, self.shared.config.instance, epoch).await
        };
        let Ok(rows) = result.await else { return };
        let rows: HashMap<RunId, i64> = rows.into_iter().collect();
        let orphans: Vec<(RunId, i64)> = {
            let mut held = self.held();
            // A run that has just ended by itself is aborted after its last commit: nothing is lost.
            held.retain(|run, known| {
                let keep = rows.get(run) == Some(&known.fence);
                if !keep {
                    known.abort.abort();
                }
                keep
            });
            rows.into_iter()
                .filter(|(run, _)| !held.contains_key(run) && !self.intake.expects(*run))
                .collect()
        };
        // The answer to a claim's COMMIT can be lost: then nobody but the tables knows of the grant.
        self.release_all(&orphans).await;
    }

    /// Gives runs back that no task moves.
    async fn release_all(&self, runs: &[(RunId, i64)]) {
        for (run, fence) in runs {
            let result = async {
                let mut db = self.shared.pool.acquire().await?;
                crash::around("release", queue::release(&mut db, *run, *fence)).await
            };
            if let Err(err) = result.await {
                tracing::warn!(error = &err as &dyn std::error::Error, run.id = %run, "run {run} could not be given back");
            }
        }
        if !runs.is_empty() {
            self.shared.signals.queued();
        }
    }

    async fn recover(&self) {
        let result = async {
            let mut tx = transaction::begin(&self.shared.pool).await?;
            let freed = queue::recover(&mut tx, PROMOTE).await?;
            if freed.is_empty() {
                tx.rollback().await?;
            } else {
                crash::commit(tx, "recover").await?;
            }
            Ok::<_, StoreError>(freed)
        };
        match result.await {
            Ok(freed) if freed.is_empty() => {}
            Ok(freed) => {
                tracing::warn!(runs = freed.len(), "runs of a dead driver were freed");
                self.shared.look.notify_one();
            }
            Err(err) => {
                tracing::debug!(error = &err as &dyn std::error::Error, "recovery failed");
            }
        }
    }

    /// Makes claimable what is due.
    async fn promote_due(&self) -> Result<(), StoreError> {
        let mut db = self.shared.pool.acquire().await?;
        let due = queue::due(&mut db, PROMOTE).await?;
        drop(db);
        for (thread, run) in due.followups {
            advance::activate_followup(&self.shared, thread, run).await?;
        }
        if due.parked {
            let mut tx = transaction::begin(&self.shared.pool).await?;
            if queue::promote_due(&mut tx, PROMOTE).await? > 0 {
                crash::commit(tx, "promote").await?;
            } else {
                tx.rollback().await?;
            }
        }
        Ok(())
    }

    fn room(&self) -> usize {
        self.shared.config.capacity.saturating_sub(self.in_memory() + self.intake.count())
    }

    /// After a crash one of many runs killed the process: they go one at a time until each has committed.
    async fn claim_suspect(
        &self,
        epoch: i64,
        runs: &mut JoinSet<(RunId, i64)>,
        suspects: &Arc<Semaphore>,
    ) -> Result<bool, StoreError> {
        let Ok(permit) = Arc::clone(suspects).try_acquire_owned() else { return Ok(false) };
        if self.room() == 0 {
            return Ok(false);
        }
        let mut db = self.shared.pool.acquire().await?;
        let Some(grant) = self.claim(&mut db, epoch, Claim::Suspect).await?.pop() else {
            return Ok(false);
        };
        self.start(runs, grant, None, Some(permit));
        Ok(true)
    }

    /// Claims at most `limit` runs and starts them. True: there may be more.
    async fn claim_ready(
        &self,
        epoch: i64,
        runs: &mut JoinSet<(RunId, i64)>,
        limit: i64,
    ) -> Result<bool, StoreError> {
        let mut db = self.shared.pool.acquire().await?;
        let grants = self.claim(&mut db, epoch, Claim::Ready(limit)).await?;
        let more = !grants.is_empty();
        for grant in grants {
            self.start(runs, grant, None, None);
        }
        Ok(more)
    }

    async fn claim(
        &self,
        db: &mut sqlx::PgConnection,
        epoch: i64,
        claim: Claim,
    ) -> Result<Vec<Grant>, StoreError> {
        let claiming = queue::claim(db, self.shared.config.instance, epoch, claim);
        crash::around("claim", claiming).await
    }

    fn start(
        &self,
        runs: &mut JoinSet<(RunId, i64)>,
        grant: Grant,
        root: Option<Namespace>,
        suspect: Option<tokio::sync::OwnedSemaphorePermit>,
    ) {
        let (run, fence) = (grant.run_id, grant.fence);
        let shared = Arc::clone(&self.shared);
        let abort = runs.spawn(async move {
            let moving =
                AssertUnwindSafe(advance::advance(&shared, grant, root, suspect)).catch_unwind();
            if moving.await.is_err() {
                tracing::error!(run.id = %run, "run {run} made the driver panic");
                advance::surrender(&shared, run, fence).await;
            }
            (run, fence)
        });
        self.held().insert(run, Held { fence, abort });
    }

    /// Lets runs come to a checkpoint and releases them; after the grace period the rest is dropped.
    async fn drain(&self, runs: &mut JoinSet<(RunId, i64)>) {
        self.shared.drain.store(true, Ordering::Relaxed);
        let wait = async {
            while let Some(done) = runs.join_next().await {
                self.forget(done);
            }
        };
        if tokio::time::timeout(self.shared.config.grace, wait).await.is_err() {
            tracing::warn!(
                runs = self.in_memory(),
                "activations did not end in time; they run again elsewhere"
            );
        }
    }
}
