//! Whether a run came to what its case expects.

use std::time::Duration;

use serde_json::{Value, json};

use super::cases::{EffectDef, ExpectDef, PathStep, Status};
use super::compare::{Difference, differences, holds};
use super::play::Played;

/// What is not as the case expects.
pub(super) fn judge(expect: &ExpectDef, played: &Played) -> Vec<Difference> {
    let mut found = played.problems.clone();
    let Some(status) = played.status else { return found };
    let expected = expect.status.unwrap_or(if expect.error.is_some() {
        Status::Error
    } else {
        Status::Success
    });
    if status != expected {
        let why = match (&played.failure, played.questions.first()) {
            (Some(failure), _) => format!("status ({}: {})", failure.kind, failure.message),
            (None, Some(question)) if status == Status::Interrupted => {
                format!("status (it asks {})", super::compare::shown(question))
            }
            _ => "status".to_owned(),
        };
        found.push(Difference {
            at: why,
            expected: Some(expected.as_str().into()),
            found: Some(status.as_str().into()),
        });
    }
    if let Some(kind) = &expect.error {
        let is = played.failure.as_ref().map(|failure| Value::from(failure.kind.clone()));
        if is.as_ref() != Some(&Value::from(kind.as_str())) {
            let expected = Some(kind.as_str().into());
            found.push(Difference { at: "error".to_owned(), expected, found: is });
        }
    }
    if let Some(output) = &expect.output {
        found.extend(differences("output", output, &played.output, false));
    }
    if let Some(contains) = &expect.contains {
        found.extend(differences("output", contains, &played.output, true));
    }
    if let Some(question) = &expect.question {
        match played.questions.as_slice() {
            [asked] => found.extend(differences("question", question, asked, true)),
            several if several.iter().any(|asked| holds(question, asked)) => {}
            several => found.push(Difference {
                at: "question".to_owned(),
                expected: Some(question.clone()),
                found: several.first().map(|_| several.to_vec().into()),
            }),
        }
    }
    found.extend(path(expect, played));
    found.extend(expect.effects.iter().filter_map(|effect| effect_count(effect, played)));
    found.extend(expect.never_called.iter().filter_map(|name| never_called(name, played)));
    if let Some(at) =
        expect.at.filter(|at| at.0.abs_diff(played.elapsed) > Duration::from_millis(1))
    {
        let shown = |time: Duration| Some(humantime::format_duration(time).to_string().into());
        let (expected, is) = (shown(at.0), shown(played.elapsed));
        found.push(Difference { at: "at".to_owned(), expected, found: is });
    }
    found
}

fn path(expect: &ExpectDef, played: &Played) -> Vec<Difference> {
    let Some(expected) = &expect.path else { return Vec::new() };
    let one = |nodes: &[String]| match nodes {
        [only] => json!(only),
        several => json!(several),
    };
    let step = |step: &PathStep| match step {
        PathStep::One(node) => json!(node),
        PathStep::Several(nodes) => {
            let mut nodes = nodes.clone();
            nodes.sort();
            one(&nodes)
        }
    };
    let ran = |nodes: &Vec<String>| {
        let mut nodes = nodes.clone();
        nodes.sort();
        one(&nodes)
    };
    let expected: Value = expected.iter().map(step).collect();
    let is: Value = played.path.iter().map(ran).collect();
    if expected == is {
        return Vec::new();
    }
    vec![Difference { at: "path".to_owned(), expected: Some(expected), found: Some(is) }]
}

fn effect_count(effect: &EffectDef, played: &Played) -> Option<Difference> {
    let named = |wanted: &Option<String>, is: &str| wanted.as_ref().is_none_or(|name| name == is);
    let count = played
        .performed
        .iter()
        .filter(|done| named(&effect.node, &done.node) && named(&effect.target, &done.target))
        .count();
    let who = effect.node.as_ref().map(|node| format!(" of {node}")).unwrap_or_default();
    let what = effect.target.as_ref().map(|target| format!(" to {target}")).unwrap_or_default();
    (count != usize::try_from(effect.count).unwrap_or(usize::MAX)).then(|| Difference {
        at: format!("calls{who}{what}"),
        expected: Some(effect.count.into()),
        found: Some(count.into()),
    })
}

fn never_called(name: &str, played: &Played) -> Option<Difference> {
    let called = played.performed.iter().filter(|done| done.node == name || done.target == name);
    let ran = played.path.iter().flatten().filter(|node| *node == name);
    let count = called.count().max(ran.count());
    (count > 0).then(|| Difference {
        at: format!("calls of {name}"),
        expected: Some(0.into()),
        found: Some(count.into()),
    })
}
