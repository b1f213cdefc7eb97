//! Runs on their way from being accepted to the driver of this process, which holds them from the first.
//!
//! A run usually goes through the queue, where some driver claims it: a statement and a sync of the disk for each. While a
//! driver is the only one, has room, and has found the queue empty, runs that its own process accepts are granted to it
//! in the transaction that accepts them. The grant is the same: a fence, and a head that names instance and epoch.
//!
//! **Invariant:** nobody is overtaken: a run that finds no room closes the door, until a claim finds the queue empty.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

use super::queue::Grant;
use crate::graph::exec::Namespace;
use crate::ids::{InstanceId, RunId};

/// A life of a driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    /// The installation.
    pub instance: InstanceId,
    /// Which of its lives.
    pub epoch: i64,
}

/// The door between those who accept runs and the driver.
#[derive(Debug, Default)]
pub struct Intake {
    state: Mutex<State>,
    arrived: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Who takes runs in; `None` is a closed door.
    open: Option<Life>,
    /// How many more may come.
    room: usize,
    /// Places that are given and runs that have not been fetched.
    expected: HashSet<RunId>,
    arrived: Vec<Arrival>,
}

/// A run that was granted when it was accepted.
#[derive(Debug)]
pub struct Arrival {
    /// Whom it was granted to.
    pub life: Life,
    /// The grant.
    pub grant: Grant,
    /// The root as it begins, when it need not be read.
    pub root: Option<Namespace>,
}

/// The driver's promise to take a run, until it is dropped.
#[derive(Debug)]
pub struct Place {
    intake: Arc<Intake>,
    run: RunId,
    life: Life,
}

impl Intake {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for `run`, if there is one.
    pub fn reserve(self: &Arc<Self>, run: RunId) -> Option<Place> {
        let mut state = self.lock();
        let life = state.open?;
        if state.room == 0 {
            state.open = None;
            return None;
        }
        state.room -= 1;
        state.expected.insert(run);
        Some(Place { intake: Arc::clone(self), run, life })
    }

    /// The driver takes `room` more runs in.
    pub fn open(&self, life: Life, room: usize) {
        let mut state = self.lock();
        (state.open, state.room) = (Some(life), room);
    }

    /// Whether places are given.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.lock().open.is_some()
    }

    /// No more places are given.
    pub fn close(&self) {
        self.lock().open = None;
    }

    /// How many runs have a place and were not fetched.
    #[must_use]
    pub fn count(&self) -> usize {
        self.lock().expected.len()
    }

    /// Whether a run has a place and was not fetched.
    #[must_use]
    pub fn expects(&self, run: RunId) -> bool {
        self.lock().expected.contains(&run)
    }

    /// Fetches the runs that have arrived.
    pub fn take(&self) -> Vec<Arrival> {
        let mut state = self.lock();
        let arrived = std::mem::take(&mut state.arrived);
        for arrival in &arrived {
            state.expected.remove(&arrival.grant.run_id);
        }
        arrived
    }

    /// Waits until a run has arrived.
    pub async fn wait(&self) {
        self.arrived.notified().await;
    }
}

impl Place {
    /// Whom the run is to be granted to.
    #[must_use]
    pub fn life(&self) -> Life {
        self.life
    }

    /// Hands the run over, whose grant was committed.
    pub fn deliver(self, grant: Grant, root: Option<Namespace>) {
        let arrival = Arrival { life: self.life, grant, root };
        self.intake.lock().arrived.push(arrival);
        self.intake.arrived.notify_one();
    }
}

impl Drop for Place {
    /// A run that does not come may have been granted all the same, when the answer to its COMMIT was lost: the driver
    /// finds it in the tables and gives it back.
    fn drop(&mut self) {
        let mut state = self.intake.lock();
        if !state.arrived.iter().any(|arrival| arrival.grant.run_id == self.run) {
            state.expected.remove(&self.run);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life() -> Life {
        Life { instance: InstanceId::new(), epoch: 1 }
    }

    #[test]
    fn who_finds_no_room_closes_the_door_for_those_behind() {
        let intake = Arc::new(Intake::default());
        assert!(intake.reserve(RunId::new()).is_none());
        intake.open(life(), 1);
        let place = intake.reserve(RunId::new()).unwrap();
        assert!(intake.reserve(RunId::new()).is_none());
        drop(place);
        assert_eq!(intake.count(), 0);
        assert!(intake.reserve(RunId::new()).is_none(), "the run before it went to the queue");
        intake.open(life(), 1);
        assert!(intake.reserve(RunId::new()).is_some());
    }
}
