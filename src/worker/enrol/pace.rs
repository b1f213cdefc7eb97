//! How often a worker asks its server, and how long it waits when that does not answer.

use std::time::Duration;

use tokio::time::Instant;

/// Seconds between two tries while the server has been away for less than [`EARLY`].
const RETRY_EARLY: u32 = 60;
/// Seconds after the first failure from which tries are rarer.
const EARLY: u32 = 300;
/// Seconds between two tries from then on.
const RETRY_LATE: u32 = 300;

/// The length of everything that is counted in seconds. Tests make a second short.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// How long a second of this worker's waits lasts.
    pub second: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { second: Duration::from_secs(1) }
    }
}

impl Pace {
    /// So many seconds; at least one, at most an hour.
    #[must_use]
    pub fn seconds(&self, seconds: u64) -> Duration {
        self.second * u32::try_from(seconds.clamp(1, 3600)).unwrap_or(3600)
    }
}

/// When to try again.
#[derive(Debug, Default)]
pub(super) struct Retry {
    failing_since: Option<Instant>,
}

impl Retry {
    /// After a failure: how long to wait.
    pub(super) fn after_failure(&mut self, pace: Pace) -> Duration {
        let since = *self.failing_since.get_or_insert_with(Instant::now);
        let early = since.elapsed() < pace.second * EARLY;
        pace.second * if early { RETRY_EARLY } else { RETRY_LATE }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn tries_are_a_minute_apart_for_five_minutes_and_then_five() {
        let mut retry = Retry::default();
        let mut waits = Vec::new();
        for _ in 0..8 {
            let wait = retry.after_failure(Pace::default());
            waits.push(wait.as_secs());
            tokio::time::advance(wait).await;
        }
        assert_eq!(waits, [60, 60, 60, 60, 60, 300, 300, 300]);
    }

    #[test]
    fn intervals_are_bounded() {
        let pace = Pace::default();
        assert_eq!(pace.seconds(0), Duration::from_secs(1));
        assert_eq!(pace.seconds(u64::MAX), Duration::from_secs(3600));
    }
}
