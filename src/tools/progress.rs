//! What is known of a call while it is under way, shared by whoever waits and the wire.
//!
//! Notes of progress are passed on as they come, but a server may send them by the million: a call gets so
//! many a second, and the rest is counted.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::error::quoted;

/// Notes of progress that a call passes on in a second.
const PER_SECOND: u32 = 10;

/// How far a call is, as its server says.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// Grows with the work.
    pub progress: f64,
    /// What it grows to, when the server knows.
    pub total: Option<f64>,
    /// What is being done.
    pub message: Option<String>,
    /// How many notes were left out before this one.
    pub left_out: u64,
}

/// Takes notes of progress. It is called by the wire, so it must not wait.
pub type ProgressSink = Arc<dyn Fn(Progress) + Send + Sync>;

/// A call under way.
pub(super) struct Flight {
    sent: AtomicBool,
    oversized: AtomicU64,
    unreadable: AtomicBool,
    abandoned: AtomicBool,
    left_out: AtomicU64,
    sink: Option<ProgressSink>,
    window: Mutex<Window>,
}

#[derive(Debug)]
struct Window {
    since: Instant,
    passed: u32,
    left_out: u64,
}

impl fmt::Debug for Flight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flight").field("sent", &self.sent).finish_non_exhaustive()
    }
}

impl Flight {
    /// A call that was not sent yet.
    pub(super) fn new(sink: Option<ProgressSink>) -> Self {
        Self {
            sent: AtomicBool::new(false),
            oversized: AtomicU64::new(0),
            unreadable: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
            left_out: AtomicU64::new(0),
            sink,
            window: Mutex::new(Window { since: Instant::now(), passed: 0, left_out: 0 }),
        }
    }

    /// The first byte is about to be written: from here on nobody knows what the server did.
    pub(super) fn set_sent(&self, sent: bool) {
        self.sent.store(sent, Ordering::SeqCst);
    }

    /// Whether the server may have seen the request.
    pub(super) fn sent(&self) -> bool {
        self.sent.load(Ordering::SeqCst)
    }

    /// The answer came and was longer than what is read.
    pub(super) fn set_oversized(&self, bytes: u64) {
        self.oversized.store(bytes.max(1), Ordering::SeqCst);
    }

    /// The length of an answer that was too long to be read; at least that.
    pub(super) fn oversized(&self) -> Option<u64> {
        Some(self.oversized.load(Ordering::SeqCst)).filter(|bytes| *bytes > 0)
    }

    /// The answer came and is not JSON, or not UTF-8.
    pub(super) fn set_unreadable(&self) {
        self.unreadable.store(true, Ordering::SeqCst);
    }

    /// Whether the answer came and could not be read.
    pub(super) fn unreadable(&self) -> bool {
        self.unreadable.load(Ordering::SeqCst)
    }

    /// Nobody waits any more: what was not sent yet is not sent.
    pub(super) fn abandon(&self) {
        self.abandoned.store(true, Ordering::SeqCst);
    }

    /// Whether nobody waits any more.
    pub(super) fn abandoned(&self) -> bool {
        self.abandoned.load(Ordering::SeqCst)
    }

    /// How many notes were left out.
    pub(super) fn left_out(&self) -> u64 {
        self.left_out.load(Ordering::SeqCst)
    }

    /// Passes a note on, or counts it.
    pub(super) fn note(&self, progress: f64, total: Option<f64>, message: Option<&str>) {
        let Some(sink) = &self.sink else { return };
        let left_out = {
            let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
            if window.since.elapsed() >= Duration::from_secs(1) {
                (window.since, window.passed) = (Instant::now(), 0);
            }
            if window.passed >= PER_SECOND {
                window.left_out += 1;
                self.left_out.fetch_add(1, Ordering::SeqCst);
                return;
            }
            window.passed += 1;
            std::mem::take(&mut window.left_out)
        };
        sink(Progress { progress, total, message: message.map(quoted), left_out });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_that_come_too_fast_are_counted() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&seen);
        let flight = Flight::new(Some(Arc::new(move |note| kept.lock().unwrap().push(note))));
        for number in 0..1000 {
            flight.note(f64::from(number), None, Some("x"));
        }
        let seen = seen.lock().unwrap().len();
        assert_eq!(seen as u64 + flight.left_out(), 1000);
        assert!((10..=30).contains(&seen), "{seen}");
    }
}
