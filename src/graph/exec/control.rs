//! The node kinds that the engine controls itself: `set`, `interrupt`, `wait` for a time.
//!
//! A `graph` node is controlled in [`super::superstep`], where the namespace below it is run; all
//! other kinds reach outside and are found in the [`super::NodeSource`].

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use super::super::checkpoint::{Due, WaitKind};
use super::super::model::{InterruptTemplate, NodeKind, WaitTemplate};
use super::activation::{Activation, NodeError, Outcome, Question, Wait};

/// No wait is longer: a year and a day.
const MAX_WAIT: Duration = Duration::from_secs(366 * 86_400);

/// Runs a node that needs no code from outside; `None` when it does.
pub(super) fn run(activation: &Activation<'_>) -> Option<Result<Outcome, NodeError>> {
    match &activation.node.kind {
        NodeKind::Set => Some(Ok(Outcome::output(Value::Null))),
        NodeKind::Interrupt(interrupt) => Some(ask(activation, interrupt)),
        NodeKind::Wait(WaitTemplate::For(duration)) => Some(wait_for(activation, duration)),
        NodeKind::Wait(WaitTemplate::Until(instant)) => Some(wait_until(activation, instant)),
        NodeKind::Wait(WaitTemplate::Event { name, timeout }) => {
            Some(wait_event(activation, name, *timeout))
        }
        NodeKind::Job(_)
        | NodeKind::Graph { .. }
        | NodeKind::Model(_)
        | NodeKind::Tool(_)
        | NodeKind::Use { .. } => None,
    }
}

fn ask(activation: &Activation<'_>, interrupt: &InterruptTemplate) -> Result<Outcome, NodeError> {
    if let Some(answer) = activation.answers().pop() {
        return Ok(Outcome::output(answer));
    }
    Ok(Outcome::Ask(Question {
        value: activation.eval(&interrupt.ask)?,
        schema: interrupt.schema.clone(),
        expires: interrupt.expires,
    }))
}

fn is_over(activation: &Activation<'_>, kind: WaitKind) -> bool {
    activation
        .previous
        .is_some_and(|wait| wait.kind == kind && (wait.expired || wait.answer.is_some()))
}

fn wait_for(
    activation: &Activation<'_>,
    template: &super::super::expr::Template,
) -> Result<Outcome, NodeError> {
    if is_over(activation, WaitKind::Timer) {
        return Ok(Outcome::output(Value::Null));
    }
    let value = activation.eval(template)?;
    let duration = duration_of(&value).ok_or_else(|| {
        NodeError::fatal("wait", format!("`wait: for` gives {value}; it must be seconds or text such as \"90s\", at most 366 days"))
    })?;
    Ok(timer(Due::After(duration)))
}

fn wait_until(
    activation: &Activation<'_>,
    template: &super::super::expr::Template,
) -> Result<Outcome, NodeError> {
    if is_over(activation, WaitKind::Timer) {
        return Ok(Outcome::output(Value::Null));
    }
    let value = activation.eval(template)?;
    let instant = value.as_str().and_then(|text| DateTime::parse_from_rfc3339(text).ok()).ok_or_else(|| {
        NodeError::fatal("wait", format!("`wait: until` gives {value}; it must be an instant such as \"2026-03-01T08:00:00Z\""))
    })?;
    Ok(timer(Due::At(instant.with_timezone(&Utc))))
}

fn wait_event(
    activation: &Activation<'_>,
    name: &super::super::expr::Template,
    timeout: Option<Duration>,
) -> Result<Outcome, NodeError> {
    if let Some(previous) = activation.previous.filter(|wait| wait.kind == WaitKind::Event) {
        if let Some(answer) = &previous.answer {
            let payload = serde_json::from_slice(answer).unwrap_or(Value::Null);
            return Ok(Outcome::output(payload));
        }
        if previous.expired {
            return Err(NodeError::fatal("timeout", "the event did not come in time"));
        }
    }
    let name = activation.eval(name)?;
    let Some(name) = name.as_str().filter(|name| !name.is_empty() && name.len() <= 200) else {
        return Err(NodeError::fatal(
            "wait",
            format!("`wait: event` gives {name}; it must be a name of 1 to 200 bytes"),
        ));
    };
    Ok(Outcome::Wait(Wait {
        kind: WaitKind::Event,
        due: timeout.map(Due::After),
        name: Some(name.to_owned()),
        data: Some(json!({ "event": name })),
        stored: false,
    }))
}

fn timer(due: Due) -> Outcome {
    Outcome::Wait(Wait {
        kind: WaitKind::Timer,
        due: Some(due),
        name: None,
        data: None,
        stored: false,
    })
}

/// Seconds as a number, or text such as `1h 30m`; `None` when it is neither, negative or over [`MAX_WAIT`].
fn duration_of(value: &Value) -> Option<Duration> {
    let duration = match value {
        Value::Number(seconds) => Duration::try_from_secs_f64(seconds.as_f64()?).ok()?,
        Value::String(text) => humantime::parse_duration(text).ok()?,
        _ => return None,
    };
    (duration <= MAX_WAIT).then_some(duration)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(value: Value, expected: Option<Duration>) {
        assert_eq!(duration_of(&value), expected, "{value}");
    }

    #[test]
    fn durations_are_seconds_or_text_and_bounded() {
        check(json!(90), Some(Duration::from_secs(90)));
        check(json!(0.5), Some(Duration::from_millis(500)));
        check(json!("1h 30m"), Some(Duration::from_secs(5400)));
        check(json!(-1), None);
        check(json!("soon"), None);
        check(json!(true), None);
        check(json!("400days"), None);
        check(json!(1e300), None);
    }
}
