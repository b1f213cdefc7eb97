//! Signals that shorten a wait: something was queued, a run moved, a run was ended from outside.
//!
//! Everything that they tell of is in the tables, and whoever waits also polls; a lost signal costs
//! time, never a result. Within the process a signal is a function call. Between processes one
//! connection sends at most one NOTIFY a millisecond, with everything that gathered meanwhile: a NOTIFY
//! in each step's commit would put all commits in a row.
//!
//! **Invariant:** nothing is decided here.

use std::collections::{HashMap, HashSet};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sqlx::PgPool;
use sqlx::postgres::PgListener;
use tokio::sync::{Notify, broadcast, watch};

use super::crash;
use crate::ids::RunId;

/// The PostgreSQL channel.
const CHANNEL: &str = "cynai";
/// The least time between two NOTIFYs.
const GATHER: Duration = Duration::from_millis(1);
/// A payload may have 8,000 bytes; over that many names the receivers are told to look at everything.
const MAX_NAMES: usize = 150;
/// After a lost connection.
const RECONNECT: Duration = Duration::from_secs(1);

/// The signals of one process.
#[derive(Debug)]
pub struct Signals {
    waiters: Mutex<HashMap<RunId, Waiter>>,
    outbox: Mutex<Outbox>,
    send: Notify,
    queued: Notify,
    driver: Notify,
    ended: broadcast::Sender<RunId>,
}

#[derive(Debug, Default)]
struct Outbox {
    queued: bool,
    driver: bool,
    moved: HashSet<RunId>,
    ended: HashSet<RunId>,
}

/// Counts for those who wait for one run: what each counts may have happened, so they look.
#[derive(Debug, Default)]
struct Waiter {
    moved: watch::Sender<u64>,
    /// Apart, so that who waits for the end is not woken at every step.
    ended: watch::Sender<u64>,
}

/// Waits for one run to move or to end.
#[derive(Debug)]
pub struct Subscription {
    run: RunId,
    moved: watch::Receiver<u64>,
    ended: watch::Receiver<u64>,
    signals: Arc<Signals>,
}

impl Default for Signals {
    fn default() -> Self {
        Self {
            waiters: Mutex::default(),
            outbox: Mutex::default(),
            send: Notify::new(),
            queued: Notify::new(),
            driver: Notify::new(),
            ended: broadcast::channel(1024).0,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Signals {
    /// A run was made claimable: drivers of all processes look, this one's at once.
    pub fn queued(&self) {
        self.queued.notify_one();
        lock(&self.outbox).queued = true;
        self.send.notify_one();
    }

    /// A driver has begun to live: those of other processes look who is there.
    pub fn driver_began(&self) {
        lock(&self.outbox).driver = true;
        self.send.notify_one();
    }

    /// Waits until a driver has begun to live, in whatever process.
    pub async fn wait_driver(&self) {
        self.driver.notified().await;
    }

    /// A run committed something; with `everywhere`, readers in other processes are told too.
    pub fn run_moved(&self, run: RunId, everywhere: bool) {
        self.wake(run, false);
        if everywhere {
            lock(&self.outbox).moved.insert(run);
            self.send.notify_one();
        }
    }

    /// A run has ended: its readers finish, and a driver that still holds it drops it.
    pub fn run_ended(&self, run: RunId) {
        self.wake(run, true);
        lock(&self.outbox).ended.insert(run);
        self.send.notify_one();
    }

    /// Waits until something was queued, in whatever process.
    pub async fn wait_queued(&self) {
        self.queued.notified().await;
    }

    /// Runs that ended, as they are told.
    #[must_use]
    pub fn ended(&self) -> broadcast::Receiver<RunId> {
        self.ended.subscribe()
    }

    /// Is told of each move of `run` from now on, and of its end.
    #[must_use]
    pub fn subscribe(self: &Arc<Self>, run: RunId) -> Subscription {
        let mut waiters = lock(&self.waiters);
        let waiter = waiters.entry(run).or_default();
        let (moved, ended) = (waiter.moved.subscribe(), waiter.ended.subscribe());
        Subscription { run, moved, ended, signals: Arc::clone(self) }
    }

    fn wake(&self, run: RunId, ended: bool) {
        if let Some(waiter) = lock(&self.waiters).get(&run) {
            waiter.wake(ended);
        }
    }

    fn wake_all(&self) {
        for waiter in lock(&self.waiters).values() {
            waiter.wake(true);
        }
        self.queued.notify_one();
        self.driver.notify_one();
    }

    /// Sends what gathers, and hears what others send, until dropped. `direct` must not go through a pooler that
    /// hands the session to others.
    pub async fn run(&self, direct: PgPool) {
        tokio::join!(self.send_all(&direct), self.hear_all(&direct));
    }

    async fn send_all(&self, pool: &PgPool) {
        loop {
            self.send.notified().await;
            while let Some(payload) = self.take() {
                if let Err(err) = notify(pool, &payload).await {
                    tracing::debug!(
                        error = &err as &dyn std::error::Error,
                        "a signal could not be sent"
                    );
                    tokio::time::sleep(RECONNECT).await;
                }
                tokio::time::sleep(GATHER).await;
            }
        }
    }

    fn take(&self) -> Option<String> {
        let Outbox { queued, driver, moved, ended } = std::mem::take(&mut *lock(&self.outbox));
        if !queued && !driver && moved.is_empty() && ended.is_empty() {
            return None;
        }
        let mut parts: Vec<String> = Vec::new();
        if queued {
            parts.push("q".to_owned());
        }
        if driver {
            parts.push("d".to_owned());
        }
        if moved.len() + ended.len() > MAX_NAMES {
            parts.push("*".to_owned());
        } else {
            parts.extend(ended.iter().map(|run| format!("e{run}")));
            parts.extend(moved.difference(&ended).map(|run| format!("m{run}")));
        }
        Some(parts.join(" "))
    }

    async fn hear_all(&self, pool: &PgPool) {
        loop {
            if let Err(err) = self.hear(pool).await {
                tracing::debug!(
                    error = &err as &dyn std::error::Error,
                    "signals cannot be heard; polling goes on"
                );
            }
            self.wake_all();
            tokio::time::sleep(RECONNECT).await;
        }
    }

    async fn hear(&self, pool: &PgPool) -> Result<(), sqlx::Error> {
        let mut listener = PgListener::connect_with(pool).await?;
        listener.listen(CHANNEL).await?;
        self.wake_all();
        // `None` is a connection that was lost: what was sent meanwhile is lost too.
        while let Some(notification) = listener.try_recv().await? {
            self.heard(notification.payload());
        }
        Ok(())
    }

    fn heard(&self, payload: &str) {
        for part in payload.split(' ') {
            match part.split_at_checked(1) {
                Some(("q", _)) => self.queued.notify_one(),
                Some(("d", _)) => self.driver.notify_one(),
                Some(("*", _)) => self.wake_all(),
                Some((kind @ ("e" | "m"), id)) => {
                    let Ok(run) = RunId::from_str(id) else { continue };
                    self.wake(run, kind == "e");
                    if kind == "e" {
                        // No receiver is no driver in this process.
                        let _ = self.ended.send(run);
                    }
                }
                _ => {}
            }
        }
    }
}

async fn notify(pool: &PgPool, payload: &str) -> Result<(), sqlx::Error> {
    crash::before("signal");
    // A signal need not survive a crash, so its commit need not wait for the disk. The setting ends with the statement.
    sqlx::query!(
        "select set_config('synchronous_commit', 'off', true), pg_notify($1, $2)",
        CHANNEL,
        payload
    )
    .fetch_one(pool)
    .await?;
    crash::after("signal");
    Ok(())
}

impl Waiter {
    fn wake(&self, ended: bool) {
        self.moved.send_modify(|times| *times += 1);
        if ended {
            self.ended.send_modify(|times| *times += 1);
        }
    }
}

impl Subscription {
    /// Waits for the next move, at most `most`. The end is a move too.
    pub async fn moved(&mut self, most: Duration) {
        // Time's up and a sender that is gone both mean: look.
        let _ = tokio::time::timeout(most, self.moved.changed()).await;
    }

    /// Waits for the run's end, at most `most`.
    pub async fn ended(&mut self, most: Duration) {
        let _ = tokio::time::timeout(most, self.ended.changed()).await;
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut waiters = lock(&self.signals.waiters);
        if waiters.get(&self.run).is_some_and(|waiter| waiter.moved.receiver_count() <= 1) {
            waiters.remove(&self.run);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);
    const NEVER: Duration = Duration::from_secs(600);

    /// Whether a wait for `what` was over before its time.
    async fn check(subscription: &mut Subscription, what: &str, expected: bool) {
        let begun = tokio::time::Instant::now();
        match what {
            "moved" => subscription.moved(NEVER).await,
            _ => subscription.ended(NEVER).await,
        }
        assert_eq!(begun.elapsed() < SOON, expected, "{what}");
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_the_end_is_not_woken_by_steps() {
        let signals = Arc::new(Signals::default());
        let run = RunId::new();
        let mut waiting = signals.subscribe(run);
        signals.run_moved(run, false);
        check(&mut waiting, "moved", true).await;
        check(&mut waiting, "ended", false).await;
        // Told between a look and the next wait: not missed.
        signals.run_ended(run);
        check(&mut waiting, "ended", true).await;
        check(&mut waiting, "moved", true).await;
        check(&mut waiting, "ended", false).await;
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_lost_connection_everybody_looks() {
        let signals = Arc::new(Signals::default());
        let mut waiting = signals.subscribe(RunId::new());
        signals.wake_all();
        check(&mut waiting, "ended", true).await;
        check(&mut waiting, "moved", true).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_driver_that_began_is_heard_of_in_another_process() {
        let (here, there) = (Signals::default(), Signals::default());
        assert!(here.take().is_none());
        here.driver_began();
        let heard = tokio::time::timeout(SOON, there.wait_driver());
        assert!(heard.await.is_err());
        there.heard(&here.take().unwrap());
        tokio::time::timeout(SOON, there.wait_driver()).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_run_that_nobody_waits_for_is_forgotten() {
        let signals = Arc::new(Signals::default());
        let run = RunId::new();
        let (first, second) = (signals.subscribe(run), signals.subscribe(run));
        drop(first);
        assert_eq!(lock(&signals.waiters).len(), 1);
        drop(second);
        assert_eq!(lock(&signals.waiters).len(), 0);
    }
}
