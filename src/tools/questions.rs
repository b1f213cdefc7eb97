//! What a server asks back before it answers a call, and what it is told.
//!
//! Nobody sits behind a call. So a form is declined, or, where the configuration says so, sent back with what
//! it proposes itself: the server learns nothing that it did not say. It is asked in two ways: by a question
//! on the connection up to 2025-11-25, and from 2026-07-28 by a result that lists questions and has the call
//! sent again with the answers.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::config::tools::Elicitation;

/// What goes with a call that is sent again because the server asked something back.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Round {
    /// Answers by the names of their questions.
    pub(super) responses: BTreeMap<String, Value>,
    /// What the server wants to see again, exactly as it sent it.
    pub(super) state: Option<String>,
}

/// What to send next when `result` asks something back; none when it does not, or asks what is not answered.
pub(super) fn next(policy: Elicitation, result: &Value) -> Option<Round> {
    if result["resultType"] != "input_required" {
        return None;
    }
    let state = result["requestState"].as_str().map(str::to_owned);
    let none = Map::new();
    let questions = result["inputRequests"].as_object().unwrap_or(&none);
    let may_go_on = match policy {
        Elicitation::Decline => questions.is_empty(),
        Elicitation::Defaults => {
            questions.values().all(|question| question["method"] == "elicitation/create")
        }
    };
    if !may_go_on || (questions.is_empty() && state.is_none()) {
        return None;
    }
    let answered =
        |(name, question): (&String, &Value)| (name.clone(), answer(policy, &question["params"]));
    Some(Round { responses: questions.iter().map(answered).collect(), state })
}

/// The answer to a form, as JSON of the protocol.
pub(super) fn answer(policy: Elicitation, params: &Value) -> Value {
    match (policy, filled(params)) {
        (Elicitation::Defaults, Some(content)) => json!({"action": "accept", "content": content}),
        _ => json!({"action": "decline"}),
    }
}

/// A form with what it proposes; none when that leaves out what it requires, or when it is no form.
fn filled(params: &Value) -> Option<Map<String, Value>> {
    if params.get("mode").is_some_and(|mode| mode != "form") {
        return None;
    }
    let schema = &params["requestedSchema"];
    let fields = schema["properties"].as_object()?;
    let proposed =
        |(name, field): (&String, &Value)| Some((name.clone(), field.get("default")?.clone()));
    let content: Map<String, Value> = fields.iter().filter_map(proposed).collect();
    let mut required = schema["required"].as_array().into_iter().flatten();
    let complete =
        required.all(|name| name.as_str().is_some_and(|name| content.contains_key(name)));
    complete.then_some(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(required: Value) -> Value {
        let fields = json!({"a": {"type": "integer", "default": 3}, "b": {"type": "string"}});
        json!({"message": "?", "requestedSchema": {"properties": fields, "required": required}})
    }

    #[test]
    fn forms_are_answered_with_what_they_propose_or_not_at_all() {
        let check = |policy, params: Value, expected: Value| {
            assert_eq!(answer(policy, &params), expected, "{params}");
        };
        let declined = json!({"action": "decline"});
        let accepted = json!({"action": "accept", "content": {"a": 3}});
        check(Elicitation::Defaults, form(json!(["a"])), accepted.clone());
        check(Elicitation::Defaults, form(json!([])), accepted);
        check(Elicitation::Defaults, form(json!(["a", "b"])), declined.clone());
        check(Elicitation::Defaults, json!({"mode": "url", "url": "https://a"}), declined.clone());
        check(Elicitation::Defaults, json!(1), declined.clone());
        check(Elicitation::Decline, form(json!([])), declined);
    }

    #[test]
    fn a_call_goes_on_when_all_that_is_asked_can_be_answered() {
        let asks = |method: &str| {
            json!({"resultType": "input_required", "requestState": " s ",
                "inputRequests": {"q": {"method": method, "params": form(json!([]))}}})
        };
        let round = next(Elicitation::Defaults, &asks("elicitation/create")).unwrap();
        assert_eq!(round.state.as_deref(), Some(" s "));
        assert_eq!(round.responses["q"]["content"], json!({"a": 3}));
        assert_eq!(next(Elicitation::Defaults, &asks("sampling/createMessage")), None);
        assert_eq!(next(Elicitation::Decline, &asks("elicitation/create")), None);
        // A server may also only want to be asked again.
        let later = json!({"resultType": "input_required", "requestState": "s"});
        assert_eq!(next(Elicitation::Decline, &later).unwrap().responses, BTreeMap::new());
        assert_eq!(next(Elicitation::Defaults, &json!({"resultType": "input_required"})), None);
        assert_eq!(next(Elicitation::Defaults, &json!({"content": []})), None);
    }
}
