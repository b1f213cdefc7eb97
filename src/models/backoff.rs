//! How long to wait before another attempt, and whether one is worth making.

use std::time::Duration;

use chrono::{DateTime, Utc};
use reqwest::header::{HeaderMap, RETRY_AFTER};

use super::failure::Failure;

/// The wait after the first failure; it doubles with each.
const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(30);
/// What an endpoint may ask for at most.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);
/// A longer wait is not worth it while there is another candidate.
const PATIENCE: Duration = Duration::from_secs(5);

/// The wait after `tries` failed attempts of at most `attempts`; none when this endpoint is not to be
/// asked again. `left` is the time for everything, `luck` is 0 to 1.
pub(super) fn wait(
    failure: &Failure,
    tries: u32,
    attempts: u32,
    left: Duration,
    others: bool,
    luck: f64,
) -> Option<Duration> {
    if !failure.kind.again() || tries >= attempts || (others && failure.kind.slow()) {
        return None;
    }
    let doubled = FIRST.saturating_mul(1 << (tries - 1).min(16)).min(LONGEST);
    // Between half and all of it, so that many who failed together do not come back together.
    let usual = doubled.mul_f64(0.5 + 0.5 * luck.clamp(0.0, 1.0));
    // Never less than what the endpoint asked for.
    let asked = failure.retry_after.map(|asked| asked + usual.min(asked / 10));
    let wait = asked.map_or(usual, |asked| asked.max(FIRST.mul_f64(0.5 * luck)));
    let worth_it = wait < left && !(others && wait > PATIENCE);
    worth_it.then_some(wait)
}

/// What a `Retry-After` asks for: seconds or a date, cut to a minute.
pub(super) fn retry_after(headers: &HeaderMap, now: DateTime<Utc>) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok().map(str::trim);
    let milliseconds = || text("retry-after-ms")?.parse::<u64>().ok().map(Duration::from_millis);
    let asked = || {
        let text = text(RETRY_AFTER.as_str())?;
        if let Ok(seconds) = text.parse::<f64>() {
            return Duration::try_from_secs_f64(seconds)
                .ok()
                .or_else(|| (seconds > 0.0).then_some(MAX_RETRY_AFTER));
        }
        let date = DateTime::parse_from_rfc2822(text).ok()?;
        Some(date.signed_duration_since(now).to_std().unwrap_or(Duration::ZERO))
    };
    milliseconds().or_else(asked).map(|asked| asked.min(MAX_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::failure::FailureKind;

    #[test]
    fn what_an_endpoint_asks_for_is_read_in_both_forms_and_bounded() {
        let now: DateTime<Utc> = "1994-11-06T08:49:30Z".parse().unwrap();
        let check = |value: &str, expected: Option<u64>| {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, value.parse().unwrap())]);
            assert_eq!(retry_after(&headers, now), expected.map(Duration::from_secs), "{value}");
        };
        check("7", Some(7));
        check("100000", Some(60));
        check("1e300", Some(60));
        check("Sun, 06 Nov 1994 08:49:37 GMT", Some(7));
        check("Sun, 06 Nov 1994 08:40:37 GMT", Some(0));
        check("Sun, 06 Nov 2044 08:49:37 GMT", Some(60));
        check("-5", None);
        check("NaN", None);
        check("soon", None);
        assert_eq!(retry_after(&HeaderMap::new(), now), None);
    }

    #[test]
    fn waits_grow_respect_the_endpoint_and_end_where_they_are_not_worth_it() {
        let failure = |kind, asked: Option<u64>| {
            let mut failure = Failure::new(kind, "");
            failure.retry_after = asked.map(Duration::from_secs);
            failure
        };
        let minute = Duration::from_secs(60);
        let ms = |wait: Option<Duration>| wait.map(|wait| wait.as_millis());
        let busy = failure(FailureKind::Overloaded, None);
        assert_eq!(ms(wait(&busy, 1, 9, minute, false, 0.0)), Some(250));
        assert_eq!(ms(wait(&busy, 3, 9, minute, false, 1.0)), Some(2000));
        assert_eq!(ms(wait(&busy, 8, 9, minute, false, 1.0)), Some(30_000));
        assert_eq!(wait(&busy, 3, 3, minute, false, 1.0), None, "attempts are used up");
        assert_eq!(wait(&busy, 8, 9, minute, true, 1.0), None, "another candidate is there sooner");
        assert_eq!(wait(&busy, 3, 9, Duration::from_secs(1), false, 1.0), None, "time is up");
        let limited = failure(FailureKind::RateLimited, Some(3));
        assert!(wait(&limited, 1, 9, minute, true, 0.0).unwrap() >= Duration::from_secs(3));
        let long = failure(FailureKind::RateLimited, Some(20));
        assert_eq!(wait(&long, 1, 9, minute, true, 0.0), None);
        assert!(wait(&long, 1, 9, minute, false, 0.0).unwrap() >= Duration::from_secs(20));
        let slow = failure(FailureKind::TimeoutFirstToken, None);
        assert_eq!(wait(&slow, 1, 9, minute, true, 0.0), None);
        assert!(wait(&slow, 1, 9, minute, false, 0.0).is_some());
        assert_eq!(wait(&failure(FailureKind::BadRequest, None), 1, 9, minute, false, 0.0), None);
    }
}
