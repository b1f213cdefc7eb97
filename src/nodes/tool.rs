//! `tool`: a call of a tool of an MCP server.
//!
//! What the call does to the world says the graph file, or else the tool's approved definition. A call that a model
//! made (`call:`) answers the model: a tool that does not exist, arguments that do not fit, a tool that failed are
//! messages for it to read, and only what nobody told is the node's own failure.

use futures::FutureExt;
use futures::future::BoxFuture;
use serde_json::{Map, Value, json};

use crate::graph::exec::{Activation, Intent, Node, NodeError, Outcome, Question, chain};
use crate::graph::model::{Effect, NodeKind, ToolTarget, ToolTemplate};
use crate::graph::names::names_tool;
use crate::models::messages::Message;
use crate::services::Services;
use crate::services::error::ServiceError;
use crate::services::tools::CallTool;
use crate::tools::error::{Outcome as Told, ToolError, ToolErrorKind};
use crate::tools::result::ToolResult;

/// Kept of a tool's text for a model, in bytes.
const MAX_TEXT: usize = 256 << 10;

/// The code of `tool` nodes.
#[derive(Debug, Clone)]
pub struct Tool {
    services: Services,
}

/// A call to make, or why there is none.
enum Plan {
    Call(Planned),
    /// What the model is told instead.
    Answer(Value),
    /// A person has to look at it first.
    Ask(Question),
}

struct Planned {
    server: String,
    tool: String,
    arguments: Map<String, Value>,
    /// Of a call that a model made.
    id: Option<String>,
}

impl Tool {
    /// Calls tools through `services`.
    #[must_use]
    pub fn new(services: Services) -> Self {
        Self { services }
    }

    /// What to call. The same each time that it is asked: its answer depends on the state and on people's answers.
    async fn plan(&self, activation: &Activation<'_>) -> Result<Plan, NodeError> {
        let template = template_of(activation)?;
        let planned = match &template.target {
            ToolTarget::Named { server, tool, arguments } => Planned {
                server: server.clone(),
                tool: tool.clone(),
                arguments: object(activation.eval(arguments)?)?,
                id: None,
            },
            ToolTarget::Call(call) => {
                match self.called(&template.allow, &activation.eval(call)?).await? {
                    Ok(planned) => planned,
                    Err(answer) => return Ok(Plan::Answer(answer)),
                }
            }
        };
        let asks = |pattern: &String| names_tool(pattern, &planned.server, &planned.tool);
        if !template.approve.iter().any(asks) {
            return Ok(Plan::Call(planned));
        }
        Ok(decided(planned, activation.answers().pop()))
    }

    /// Reads a call as a model made it; what is wrong with it is for the model to read.
    async fn called(
        &self,
        allow: &[String],
        call: &Value,
    ) -> Result<Result<Planned, Value>, NodeError> {
        let text = |key: &str| call.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (id, name) = (text("id"), text("name"));
        let told =
            |problem: String| Ok(Err(output(message(&id, &name, &problem, true), Value::Null)));
        if name.is_empty() {
            return told("This is no call of a tool: it has no name.".to_owned());
        }
        let offered = self.services.offered_tools(allow).await.map_err(unavailable)?;
        let Some((tool, _)) = offered.iter().find(|(tool, _)| tool.name == name) else {
            let known: Vec<&str> = offered.iter().map(|(tool, _)| tool.name.as_str()).collect();
            return told(format!("There is no tool `{name}`. There are: {}.", known.join(", ")));
        };
        let arguments = match call.get("args") {
            Some(Value::Object(arguments)) => arguments.clone(),
            None | Some(Value::Null) => Map::new(),
            Some(_) => {
                let why = call.get("error").and_then(Value::as_str).unwrap_or("they are none");
                return told(format!(
                    "The tool was not called: the arguments must be a JSON object ({why})."
                ));
            }
        };
        Ok(Ok(Planned {
            server: tool.server.clone(),
            tool: tool.tool.clone(),
            arguments,
            id: Some(id),
        }))
    }

    async fn effect(
        &self,
        template: &ToolTemplate,
        planned: &Planned,
    ) -> Result<Effect, NodeError> {
        use crate::services::tools::ToolEffect;
        if let Some(effect) = template.effect {
            return Ok(effect);
        }
        let effect = self.services.tool_effect(&planned.server, &planned.tool).await;
        Ok(match effect.map_err(unavailable)? {
            ToolEffect::Pure => Effect::Pure,
            ToolEffect::Idempotent => Effect::Idempotent,
            ToolEffect::Effectful => Effect::Effectful,
        })
    }

    async fn call(
        &self,
        activation: &Activation<'_>,
        planned: Planned,
    ) -> Result<Value, NodeError> {
        let only_looks = self.effect(template_of(activation)?, &planned).await? == Effect::Pure;
        let Planned { server, tool, arguments, id } = planned;
        let name = format!("{server}/{tool}");
        let call = CallTool {
            server,
            tool,
            arguments,
            idempotency_key: Some(activation.idempotency_key()),
            timeout: activation.node.timeout,
        };
        let result = self.services.call_tool("a run", call, None).await;
        match (result, id) {
            (Ok(result), None) if result.is_error => {
                Err(NodeError::fatal("tool_error", format!("{name}: {}", result.text())))
            }
            (Ok(result), id) => Ok(answered(&name, id.as_deref(), &result)),
            (Err(ServiceError::Tool(err)), Some(id)) if is_the_models_fault(err.kind) => {
                Ok(output(message(&id, &name, &err.message, true), Value::Null))
            }
            (Err(ServiceError::Tool(err)), _) => match failed(&err) {
                // Looking again harms nobody.
                NodeError::Unknown { kind, message } if only_looks => {
                    Err(NodeError::Retryable { kind, message })
                }
                failed => Err(failed),
            },
            (Err(err), _) => Err(unavailable(err)),
        }
    }
}

impl Node for Tool {
    fn run<'a>(
        &'a self,
        activation: &'a Activation<'a>,
    ) -> BoxFuture<'a, Result<Outcome, NodeError>> {
        async move {
            let mut output = match self.plan(activation).await? {
                Plan::Call(planned) => self.call(activation, planned).await?,
                Plan::Answer(answer) => answer,
                Plan::Ask(question) => return Ok(Outcome::Ask(question)),
            };
            output["message"]["id"] = answer_id(activation).into();
            if let ToolTarget::Call(_) = &template_of(activation)?.target {
                activation.custom.message(output["message"].clone());
            }
            Ok(Outcome::output(output))
        }
        .boxed()
    }

    fn intent<'a>(
        &'a self,
        activation: &'a Activation<'a>,
    ) -> BoxFuture<'a, Result<Option<Intent>, NodeError>> {
        async move {
            let Plan::Call(planned) = self.plan(activation).await? else { return Ok(None) };
            let effect = self.effect(template_of(activation)?, &planned).await?;
            Ok(Some(Intent {
                kind: "tool",
                target: format!("{}/{}", planned.server, planned.tool),
                request: Value::Object(planned.arguments),
                effect,
            }))
        }
        .boxed()
    }

    fn told(&self, activation: &Activation<'_>, value: Value) -> Result<Value, NodeError> {
        if value.get("message").is_some_and(Value::is_object) {
            return Ok(value);
        }
        let (name, id) = match &template_of(activation)?.target {
            ToolTarget::Named { server, tool, .. } => (format!("{server}/{tool}"), None),
            ToolTarget::Call(call) => {
                let call = activation.eval(call)?;
                let text = |key: &str| call[key].as_str().unwrap_or_default().to_owned();
                (text("name"), Some(text("id")))
            }
        };
        let text = match &value {
            Value::Null => "It has happened; what came of it is not known.".to_owned(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let structured = if value.is_object() { value } else { Value::Null };
        let told = message(id.as_deref().unwrap_or_default(), &name, &text, false);
        let mut output = output(told, structured);
        output["message"]["id"] = answer_id(activation).into();
        if id.is_some() {
            activation.custom.message(output["message"].clone());
        }
        Ok(output)
    }
}

fn template_of<'a>(activation: &'a Activation<'_>) -> Result<&'a ToolTemplate, NodeError> {
    match &activation.node.kind {
        NodeKind::Tool(template) => Ok(template),
        _ => Err(NodeError::fatal("internal", "not a tool node")),
    }
}

fn object(value: Value) -> Result<Map<String, Value>, NodeError> {
    match value {
        Value::Object(map) => Ok(map),
        _ => Err(NodeError::fatal("invalid_arguments", "the arguments of a tool are an object")),
    }
}

/// What a person's decision makes of a call; without one, the question.
fn decided(mut planned: Planned, decision: Option<Value>) -> Plan {
    let name = format!("{}/{}", planned.server, planned.tool);
    let Some(decision) = decision else {
        return Plan::Ask(Question {
            value: json!({
                "reason": "approve_tool",
                "tool": name,
                "arguments": planned.arguments,
                "message": format!(
                    "May {name} be called with these arguments? Answer {{\"action\": \"approve\"}}, with other \
                     \"arguments\" where they are to be changed, or {{\"action\": \"reject\", \"reason\": ..}}."
                ),
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
        });
    };
    if decision.get("action").and_then(Value::as_str) == Some("approve") {
        if let Some(Value::Object(arguments)) = decision.get("arguments") {
            planned.arguments = arguments.clone();
        }
        return Plan::Call(planned);
    }
    let reason = decision.get("reason").and_then(Value::as_str).unwrap_or("no reason was given");
    let text = format!("A person rejected this call: {reason}");
    let id = planned.id.unwrap_or_default();
    let mut answer = output(message(&id, &name, &text, true), Value::Null);
    answer["rejected"] = true.into();
    Plan::Answer(answer)
}

/// The id of the message that answers. It is the activation's and not the call's: many endpoints number the calls
/// of each message from 0, and an answer must not take the place of an earlier one.
fn answer_id(activation: &Activation<'_>) -> String {
    format!("tool-{}", activation.task.id)
}

/// The message that answers a model's call.
fn message(id: &str, tool: &str, text: &str, is_error: bool) -> Message {
    let text = if text.len() > MAX_TEXT {
        let end = text.floor_char_boundary(MAX_TEXT);
        format!("{}… ({} bytes, the rest is left out)", &text[..end], text.len())
    } else {
        text.to_owned()
    };
    let mut message = Message::tool(id, text);
    message.name = Some(tool.to_owned());
    message.status = Some(if is_error { "error" } else { "success" }.to_owned());
    message
}

fn output(message: Message, structured: Value) -> Value {
    json!({
        "text": message.text(),
        "structured": structured,
        "content": [],
        "is_error": message.status.as_deref() == Some("error"),
        "rejected": false,
        "message": message.to_langchain(),
    })
}

fn answered(tool: &str, id: Option<&str>, result: &ToolResult) -> Value {
    let mut text = result.text();
    if text.is_empty() {
        text = result.structured.as_ref().map(Value::to_string).unwrap_or_default();
    }
    let told = message(id.unwrap_or_default(), tool, &text, result.is_error);
    let mut answer = output(told, result.structured.clone().unwrap_or(Value::Null));
    answer["text"] = text.into();
    answer["content"] = json!(result.content);
    answer
}

/// What a model can do better when it is told.
fn is_the_models_fault(kind: ToolErrorKind) -> bool {
    matches!(
        kind,
        ToolErrorKind::InvalidArguments
            | ToolErrorKind::UnknownTool
            | ToolErrorKind::Refused
            | ToolErrorKind::InputRequired
            | ToolErrorKind::TooLarge
            | ToolErrorKind::InvalidOutput
    )
}

fn failed(err: &ToolError) -> NodeError {
    let kind = err.kind.as_str();
    match (err.outcome, err.kind) {
        (Told::Unknown, _) => NodeError::unknown(kind, err.message.clone()),
        (
            Told::NotSent,
            ToolErrorKind::Busy | ToolErrorKind::Unavailable | ToolErrorKind::ServerDied,
        )
        | (Told::NotSent, ToolErrorKind::Timeout) => {
            NodeError::retryable(kind, err.message.clone())
        }
        (Told::NotSent, ToolErrorKind::Closing) => NodeError::NotStarted {
            message: err.message.clone(),
            after: std::time::Duration::from_secs(1),
        },
        (Told::NotSent | Told::Answered, _) => NodeError::fatal(kind, err.message.clone()),
    }
}

/// The server's own trouble: the database, say.
pub(super) fn unavailable(err: ServiceError) -> NodeError {
    match err {
        ServiceError::Tool(err) => failed(&err),
        err => {
            NodeError::NotStarted { message: chain(&err), after: std::time::Duration::from_secs(1) }
        }
    }
}
