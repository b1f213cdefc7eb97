//! Clients that go away while they wait: their run is cancelled when they asked for that.
//!
//! A connection that closes drops the future or the body that served it, and a drop cannot wait for
//! anything. So it leaves a note here, and a task of the server acts on the notes.

use std::sync::{Mutex, PoisonError};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::error::chain;
use crate::services::Services;
use crate::services::api::{Actor, CancelAction, RunKey};
use crate::services::error::ServiceError;

const NOTES_AT_MOST: usize = 10_000;

/// Takes notes of clients that went away.
#[derive(Debug)]
pub(super) struct Disconnects {
    sender: mpsc::Sender<Note>,
    receiver: Mutex<Option<mpsc::Receiver<Note>>>,
}

#[derive(Debug)]
struct Note {
    actor: Actor,
    key: RunKey,
}

/// Held while a client waits for a run; leaves a note when it is dropped before [`Guard::done`].
#[derive(Debug)]
pub(super) struct Guard {
    note: Option<Note>,
    sender: mpsc::Sender<Note>,
    closing: CancellationToken,
}

impl Disconnects {
    pub(super) fn new() -> Self {
        let (sender, receiver) = mpsc::channel(NOTES_AT_MOST);
        Self { sender, receiver: Mutex::new(Some(receiver)) }
    }

    /// Watches over a client of `key`, when its run ends with its going away.
    pub(super) fn guard(
        &self,
        cancel: bool,
        actor: &Actor,
        key: RunKey,
        closing: &CancellationToken,
    ) -> Guard {
        let note = cancel.then(|| Note { actor: actor.clone(), key });
        Guard { note, sender: self.sender.clone(), closing: closing.clone() }
    }

    /// Acts on notes until `closing`; the second call returns at once.
    pub(super) async fn run(&self, services: &Services, closing: &CancellationToken) {
        let receiver = self.receiver.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut receiver) = receiver else { return };
        while let Some(Some(note)) = closing.run_until_cancelled(receiver.recv()).await {
            cancel(services, &note).await;
        }
    }
}

async fn cancel(services: &Services, note: &Note) {
    let run = note.key.run;
    let reason = Some("the client that waited for it went away".to_owned());
    let done =
        services.cancel_run(&note.actor, note.key, CancelAction::Interrupt, reason, false).await;
    match done {
        Ok(()) => tracing::info!(run.id = %run, "run {run} cancelled: its client went away"),
        // It has ended in the meantime.
        Err(ServiceError::NotFound { .. }) => {}
        Err(err) => tracing::warn!(
            error = chain(&err), run.id = %run,
            "run {run} goes on, although its client went away"
        ),
    }
}

impl Guard {
    /// The client has its answer.
    pub(super) fn done(&mut self) {
        self.note = None;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // A server that stops is not a client that goes away: the client will come back.
        let Some(note) = self.note.take().filter(|_| !self.closing.is_cancelled()) else { return };
        let run = note.key.run;
        if self.sender.try_send(note).is_err() {
            tracing::warn!(run.id = %run, "run {run} goes on, although its client went away: too many at once");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{RunId, UserId};

    fn check(cancel: bool, done: bool, stopping: bool, expected: bool) {
        let disconnects = Disconnects::new();
        let closing = CancellationToken::new();
        let actor = Actor { user_id: UserId::new(), name: "somebody".to_owned(), admin: false };
        let key = RunKey { thread: None, run: RunId::new() };
        let mut guard = disconnects.guard(cancel, &actor, key, &closing);
        if done {
            guard.done();
        }
        if stopping {
            closing.cancel();
        }
        drop(guard);
        let mut receiver = disconnects.receiver.lock().unwrap().take().unwrap();
        assert_eq!(receiver.try_recv().is_ok(), expected);
    }

    #[test]
    fn only_a_client_that_goes_away_early_and_asked_for_it_cancels_its_run() {
        check(true, false, false, true);
        check(false, false, false, false);
        check(true, true, false, false);
        check(true, false, true, false);
    }
}
