//! Calls of tools: which one is meant, whether a person has to look at it, and the form of its result.

use serde_json::{Map, Value, json};

use super::script::names_tool;
use crate::graph::exec::{Activation, NodeError, Question};
use crate::graph::model::{ToolTarget, ToolTemplate};
use crate::graph::names::offered_name;

/// What a tool node does next; as the server's own node decides it.
pub(super) enum Plan {
    Call(Planned),
    Answer(Value),
    Ask(Question),
}

pub(super) struct Planned {
    /// `SERVER/TOOL`.
    pub(super) tool: String,
    pub(super) arguments: Map<String, Value>,
    /// Of a call that a model made.
    pub(super) id: Option<String>,
}

pub(super) fn plan(
    activation: &Activation<'_>,
    template: &ToolTemplate,
) -> Result<Plan, NodeError> {
    let mut planned = match &template.target {
        ToolTarget::Named { server, tool, arguments } => match activation.eval(arguments)? {
            Value::Object(arguments) => {
                Planned { tool: format!("{server}/{tool}"), arguments, id: None }
            }
            _ => {
                let message = "the arguments of a tool are an object";
                return Err(NodeError::fatal("invalid_arguments", message));
            }
        },
        ToolTarget::Call(call) => match called(&template.allow, &activation.eval(call)?) {
            Ok(planned) => planned,
            Err(answer) => return Ok(Plan::Answer(answer)),
        },
    };
    if !template.approve.iter().any(|pattern| names_tool(pattern, &planned.tool)) {
        return Ok(Plan::Call(planned));
    }
    let Some(decision) = activation.answers().pop() else {
        return Ok(Plan::Ask(approval(&planned)));
    };
    if decision["action"] == "approve" {
        if let Some(Value::Object(arguments)) = decision.get("arguments") {
            planned.arguments = arguments.clone();
        }
        return Ok(Plan::Call(planned));
    }
    let reason = decision.get("reason").and_then(Value::as_str).unwrap_or("no reason was given");
    let text = format!("A person rejected this call: {reason}");
    let id = planned.id.unwrap_or_default();
    Ok(Plan::Answer(tool_output(&id, &planned.tool, &text, Value::Null, true, true)))
}

/// A call as a model made it; what is wrong with it is for the model to read.
fn called(allow: &[String], call: &Value) -> Result<Planned, Value> {
    let text = |key: &str| call.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (id, name) = (text("id"), text("name"));
    let tool = allow.iter().find_map(|pattern| {
        let (server, tool) = pattern.split_once('/')?;
        match tool {
            "*" => name
                .strip_prefix(&offered_name(server, ""))
                .filter(|tool| !tool.is_empty())
                .map(|tool| format!("{server}/{tool}")),
            tool => (offered_name(server, tool) == name).then(|| pattern.clone()),
        }
    });
    let told = |text: &str| Err(tool_output(&id, &name, text, Value::Null, true, false));
    let Some(tool) = tool else { return told(&format!("There is no tool `{name}`.")) };
    match call.get("args") {
        Some(Value::Object(arguments)) => {
            Ok(Planned { tool, arguments: arguments.clone(), id: Some(id) })
        }
        None | Some(Value::Null) => Ok(Planned { tool, arguments: Map::new(), id: Some(id) }),
        Some(_) => told("The arguments must be a JSON object."),
    }
}

fn approval(planned: &Planned) -> Question {
    Question {
        value: json!({
            "reason": "approve_tool",
            "tool": planned.tool,
            "arguments": planned.arguments,
        }),
        schema: Some(json!({
            "type": "object",
            "properties": {
                "action": { "enum": ["approve", "reject"] },
                "arguments": { "type": "object" },
                "reason": { "type": "string", "maxLength": 4096 },
            },
            "required": ["action"],
            "additionalProperties": false,
        })),
        expires: None,
    }
}

pub(super) fn tool_output(
    id: &str,
    tool: &str,
    text: &str,
    structured: Value,
    is_error: bool,
    rejected: bool,
) -> Value {
    json!({
        "text": text,
        "structured": structured,
        "content": [{ "type": "text", "text": text }],
        "is_error": is_error,
        "rejected": rejected,
        "message": {
            "content": text,
            "additional_kwargs": {},
            "response_metadata": {},
            "type": "tool",
            "name": tool,
            "id": format!("{id}-answer"),
            "tool_call_id": id,
            "artifact": null,
            "status": if is_error { "error" } else { "success" },
        },
    })
}
