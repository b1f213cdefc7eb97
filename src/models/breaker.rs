//! The circuit breaker of one endpoint: after some failures in a row it is left alone for a while, then
//! one call may try whether it works again.
//!
//! It is a value that is told the time, so that it can be judged without waiting.

use std::time::Duration;

use tokio::time::Instant;

/// Failures in a row that open the circuit.
const FAILURES: u32 = 5;
/// How long it stays open.
const PAUSE: Duration = Duration::from_secs(10);
/// After so long a probe that never reported counts as lost.
const PROBE: Duration = Duration::from_secs(120);

/// What an attempt says about its endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Health {
    /// It works.
    Well,
    /// It does not.
    Ill,
    /// Nothing can be said: the caller went away, or had too little time.
    Unknown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed { failures: u32 },
    Open { since: Instant },
    Probing { since: Instant },
}

/// Whether an endpoint may be called.
#[derive(Debug)]
pub(super) struct Breaker(State);

impl Default for Breaker {
    fn default() -> Self {
        Self(State::Closed { failures: 0 })
    }
}

impl Breaker {
    /// How long the endpoint is to be left alone; none when a call would be admitted.
    pub(super) fn closed_for(&self, now: Instant) -> Option<Duration> {
        let left = match self.0 {
            State::Closed { .. } => return None,
            State::Open { since } => PAUSE.saturating_sub(now.saturating_duration_since(since)),
            // The probe will tell soon.
            State::Probing { since } if now.saturating_duration_since(since) < PROBE => {
                Duration::from_secs(1)
            }
            State::Probing { .. } => Duration::ZERO,
        };
        (left > Duration::ZERO).then_some(left)
    }

    /// Admits a call, or says how long to leave the endpoint alone. The call must be reported.
    pub(super) fn admit(&mut self, now: Instant) -> Result<(), Duration> {
        if let Some(left) = self.closed_for(now) {
            return Err(left);
        }
        if !matches!(self.0, State::Closed { .. }) {
            self.0 = State::Probing { since: now };
        }
        Ok(())
    }

    /// Takes the outcome of a call that was admitted.
    pub(super) fn report(&mut self, health: Health, now: Instant) {
        self.0 = match (self.0, health) {
            (_, Health::Well) => State::Closed { failures: 0 },
            (State::Closed { failures }, Health::Ill) if failures + 1 < FAILURES => {
                State::Closed { failures: failures + 1 }
            }
            (_, Health::Ill) => State::Open { since: now },
            // A probe that came to nothing: the next call is the probe.
            (State::Probing { .. }, Health::Unknown) => {
                State::Open { since: now.checked_sub(PAUSE).unwrap_or(now) }
            }
            (state, Health::Unknown) => state,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_after_failures_in_a_row_and_lets_one_probe_through() {
        let mut now = Instant::now() + Duration::from_secs(3600);
        let mut breaker = Breaker::default();
        for _ in 0..FAILURES - 1 {
            breaker.admit(now).unwrap();
            breaker.report(Health::Ill, now);
        }
        breaker.report(Health::Well, now);
        for _ in 0..FAILURES {
            breaker.admit(now).unwrap();
            breaker.report(Health::Ill, now);
        }
        assert_eq!(breaker.admit(now), Err(PAUSE));
        now += PAUSE;
        assert_eq!(breaker.admit(now), Ok(()));
        assert!(breaker.admit(now).is_err(), "one probe at a time");
        breaker.report(Health::Unknown, now);
        assert_eq!(breaker.admit(now), Ok(()), "a probe that came to nothing frees its place");
        breaker.report(Health::Ill, now);
        assert_eq!(breaker.admit(now), Err(PAUSE));
        now += PAUSE;
        breaker.admit(now).unwrap();
        breaker.report(Health::Well, now);
        assert_eq!(breaker.closed_for(now), None);
    }

    #[test]
    fn a_probe_that_is_lost_does_not_keep_it_open_for_ever() {
        let mut now = Instant::now() + Duration::from_secs(3600);
        let mut breaker = Breaker::default();
        (0..FAILURES).for_each(|_| breaker.report(Health::Ill, now));
        now += PAUSE;
        breaker.admit(now).unwrap();
        now += PROBE;
        assert_eq!(breaker.admit(now), Ok(()));
    }
}
