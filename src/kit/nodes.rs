//! The nodes that reach outside, as far as the graph can tell: what they ask, and the forms of their outputs.

use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use serde_json::{Map, Value, json};

use super::cases::{ErrorClass, ErrorDef, ToolCallDef, UsageDef};
use super::script::{Asker, Call, Said, path_of};
use super::tools::{Plan, Planned, plan, tool_output};
use super::world::{Caller, World};
use crate::graph::checkpoint::WaitKind;
use crate::graph::exec::{Activation, Intent, Node, NodeError, NodeSource, Outcome, Wait};
use crate::graph::expr::Template;
use crate::graph::model::{
    Effect, JobTemplate, ModelTemplate, Node as NodeSpec, NodeKind, OnUnknown, ToolTemplate,
};
use crate::graph::names::offered_name;

/// Finds the stand-ins.
pub(super) struct Stands(pub(super) Arc<World>);

impl NodeSource for Stands {
    fn find(&self, _: &NodeSpec) -> Option<Arc<dyn Node>> {
        Some(Arc::new(StandIn(Arc::clone(&self.0))))
    }
}

/// Stands in for a node that reaches outside.
struct StandIn(Arc<World>);

impl Node for StandIn {
    fn run<'a>(
        &'a self,
        activation: &'a Activation<'a>,
    ) -> BoxFuture<'a, Result<Outcome, NodeError>> {
        async move {
            match &activation.node.kind {
                NodeKind::Model(template) => self.model(activation, template).await,
                NodeKind::Tool(template) => self.tool(activation, template).await,
                NodeKind::Job(template) => self.job(activation, template).await,
                NodeKind::Use { name, with } => {
                    let request = activation.eval(with)?;
                    match self.ask(activation, Asker::Use, name, &request).await {
                        Said::Use { output, goto } => {
                            Ok(Outcome::Done { output, update: Vec::new(), goto })
                        }
                        said => Err(refused(said)),
                    }
                }
                _ => Err(NodeError::fatal("internal", "this node needs no code")),
            }
        }
        .boxed()
    }

    fn intent<'a>(
        &'a self,
        activation: &'a Activation<'a>,
    ) -> BoxFuture<'a, Result<Option<Intent>, NodeError>> {
        futures::future::ready(intent(activation)).boxed()
    }
}

fn intent(activation: &Activation<'_>) -> Result<Option<Intent>, NodeError> {
    let effect = activation.node.effect;
    Ok(match &activation.node.kind {
        NodeKind::Model(template) => Some(Intent {
            kind: "model",
            target: template.model.clone(),
            request: model_request(activation, template)?,
            effect,
        }),
        NodeKind::Tool(template) => match plan(activation, template)? {
            Plan::Call(planned) => Some(Intent {
                kind: "tool",
                target: planned.tool,
                request: Value::Object(planned.arguments),
                // The definition of the tool, which could say less, is the server's.
                effect: template.effect.unwrap_or(Effect::Effectful),
            }),
            Plan::Answer(_) | Plan::Ask(_) => None,
        },
        NodeKind::Use { name, with } if effect != Effect::Pure => Some(Intent {
            kind: "use",
            target: name.clone(),
            request: activation.eval(with)?,
            effect,
        }),
        _ => None,
    })
}

/// Whether a person decides about attempts of the node whose outcome is unknown.
fn must_ask(node: &NodeSpec) -> bool {
    let effect = match &node.kind {
        NodeKind::Tool(template) => template.effect.unwrap_or(Effect::Effectful),
        _ => node.effect,
    };
    match node.on_unknown {
        Some(policy) => policy == OnUnknown::Ask,
        None => effect == Effect::Effectful,
    }
}

fn refused(said: Said) -> NodeError {
    match said {
        Said::Error(ErrorDef { kind, message, class }) => {
            let message = message.unwrap_or_else(|| kind.clone());
            match class {
                ErrorClass::Retryable => NodeError::retryable(&kind, message),
                ErrorClass::Fatal => NodeError::fatal(&kind, message),
                ErrorClass::Unknown => NodeError::unknown(&kind, message),
            }
        }
        _ => NodeError::fatal("internal", "the script answers with something else"),
    }
}

impl StandIn {
    /// What the world says. It never comes when the world has stopped.
    async fn ask(
        &self,
        activation: &Activation<'_>,
        asker: Asker,
        target: &str,
        request: &Value,
    ) -> Said {
        let path = path_of(activation.namespace, &activation.node.name);
        let item = activation.task.item.as_ref();
        let key = activation.idempotency_key();
        let caller = Caller {
            key: &key,
            task: activation.task.id,
            namespace: activation.namespace,
            planned: activation.planned.seq,
            must_ask: must_ask(activation.node),
        };
        let call = Call {
            path: &path,
            asker,
            target: Some(target),
            item: item.map(|item| item.value.json()),
            request,
        };
        let Some(said) = self.0.call(&caller, &call) else {
            return std::future::pending().await;
        };
        // Calls that run side by side come back one after the other, so that results are also stored apart.
        for _ in 0..(activation.task.node.0 + item.map_or(0, |item| item.index)) % 3 {
            tokio::task::yield_now().await;
        }
        said
    }

    async fn model(
        &self,
        activation: &Activation<'_>,
        template: &ModelTemplate,
    ) -> Result<Outcome, NodeError> {
        let request = model_request(activation, template)?;
        let said = self.ask(activation, Asker::Model, &template.model, &request).await;
        let Said::Model { content, calls, json, usage } = said else { return Err(refused(said)) };
        let text = text_of(&content);
        let json = match (&template.schema, json) {
            (Some(schema), json) if calls.is_empty() => Some(fitting(schema, json, &text)?),
            (_, json) => json,
        };
        let at = self.0.store.now().timestamp_millis();
        Ok(Outcome::output(model_output(activation, template, &content, &calls, json, &usage, at)))
    }

    async fn tool(
        &self,
        activation: &Activation<'_>,
        template: &ToolTemplate,
    ) -> Result<Outcome, NodeError> {
        let Planned { tool, arguments, id } = match plan(activation, template)? {
            Plan::Call(planned) => planned,
            Plan::Answer(answer) => return Ok(Outcome::output(answer)),
            Plan::Ask(question) => return Ok(Outcome::Ask(question)),
        };
        let request = Value::Object(arguments);
        match self.ask(activation, Asker::Tool, &tool, &request).await {
            Said::Tool { text, is_error: true, .. } if id.is_none() => {
                Err(NodeError::fatal("tool_error", format!("{tool}: {text}")))
            }
            Said::Tool { text, structured, is_error, .. } => {
                let id = id.unwrap_or_default();
                Ok(Outcome::output(tool_output(&id, &tool, &text, structured, is_error, false)))
            }
            said => Err(refused(said)),
        }
    }

    /// A job is accepted, and its result comes later.
    async fn job(
        &self,
        activation: &Activation<'_>,
        template: &JobTemplate,
    ) -> Result<Outcome, NodeError> {
        let waiting = || {
            Ok(Outcome::Wait(Wait {
                kind: WaitKind::Job,
                due: None,
                name: None,
                data: None,
                stored: false,
            }))
        };
        if let Some(previous) = activation.previous.filter(|wait| wait.kind == WaitKind::Job) {
            return match &previous.answer {
                Some(answer) => {
                    let read = serde_json::from_slice(answer);
                    job_end(template, read.unwrap_or(Value::Null))
                }
                None => waiting(),
            };
        }
        let request = job_request(activation, template)?;
        let said = self.ask(activation, Asker::Job, &template.image, &request).await;
        let now = self.0.store.now().to_rfc3339();
        let result = match said {
            Said::Job { exit_code, stdout, stderr } => json!({
                "status": if exit_code == 0 { "completed" } else { "failed" },
                "exit_code": exit_code,
                "stdout": stdout,
                "stderr": stderr,
                "started_at": now,
                "ended_at": now,
                "truncated": { "stdout": false, "stderr": false },
            }),
            Said::Error(ErrorDef { kind, message, class }) => json!({
                "status": "scripted",
                "kind": kind,
                "message": message.unwrap_or_else(|| kind.clone()),
                "again": class == ErrorClass::Retryable,
            }),
            said => return Err(refused(said)),
        };
        self.0.lock().jobs.insert(activation.idempotency_key(), result);
        waiting()
    }
}

fn job_end(template: &JobTemplate, result: Value) -> Result<Outcome, NodeError> {
    let text = |key: &str| result.get(key).and_then(Value::as_str).unwrap_or_default();
    if text("status") == "scripted" {
        let (kind, message) = (text("kind"), text("message"));
        return Err(match result["again"] {
            Value::Bool(true) => NodeError::retryable(kind, message),
            _ => NodeError::fatal(kind, message),
        });
    }
    let code = result.get("exit_code").and_then(Value::as_i64).unwrap_or_default();
    if template.ok_exit_codes.iter().any(|ok| i64::from(*ok) == code) {
        return Ok(Outcome::output(result));
    }
    let end = text("stderr").trim_end();
    let parts = [format!("exit code {code}"), end.to_owned()];
    let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    Err(NodeError::retryable("job_failed", format!("the job failed: {}", parts.join("; "))))
}

fn words(value: Value) -> String {
    match value {
        Value::String(text) => text,
        other => other.to_string(),
    }
}

fn job_request(activation: &Activation<'_>, template: &JobTemplate) -> Result<Value, NodeError> {
    let text = |template: &Template| match activation.eval(template)? {
        Value::Null => Err(NodeError::fatal("job_refused", "a part of the command is null")),
        value => Ok(words(value)),
    };
    let command = template.command.iter().map(text).collect::<Result<Vec<_>, NodeError>>()?;
    let mut env = Map::new();
    for (name, value) in &template.env {
        env.insert(name.clone(), text(value)?.into());
    }
    let stdin = template.stdin.as_ref().map(text).transpose()?;
    Ok(json!({
        "image": template.image,
        "command": command,
        "env": env,
        "stdin": stdin,
        "mounts": template.mounts,
    }))
}

fn model_request(
    activation: &Activation<'_>,
    template: &ModelTemplate,
) -> Result<Value, NodeError> {
    let mut messages = Vec::new();
    if let Some(system) = &template.system {
        messages.push(json!({ "type": "system", "content": words(activation.eval(system)?) }));
    }
    if let Some(list) = &template.messages {
        match activation.eval(list)? {
            Value::Array(list) => messages.extend(list),
            _ => return Err(NodeError::fatal("invalid_messages", "the messages are no list")),
        }
    }
    if let Some(prompt) = &template.prompt {
        let mut parts = vec![json!({ "type": "text", "text": words(activation.eval(prompt)?) })];
        for image in &template.images {
            let url = words(activation.eval(image)?);
            parts.push(json!({ "type": "image_url", "image_url": { "url": url } }));
        }
        let content = match parts.as_mut_slice() {
            [only] => only["text"].take(),
            _ => parts.into(),
        };
        messages.push(json!({ "type": "human", "content": content }));
    }
    Ok(json!({ "messages": messages, "tools": template.tools }))
}

/// The text of a message's content.
fn text_of(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(blocks) => blocks.iter().filter_map(|block| block["text"].as_str()).collect(),
        _ => String::new(),
    }
}

/// The value of an answer that has to fit a schema.
fn fitting(schema: &Value, json: Option<Value>, text: &str) -> Result<Value, NodeError> {
    let wrong = |why: String| NodeError::fatal("invalid_json", why);
    let value = match json {
        Some(value) => value,
        None => serde_json::from_str(text)
            .map_err(|err| wrong(format!("the model's answer is no JSON: {err}")))?,
    };
    let validator = jsonschema::validator_for(schema).map_err(|err| wrong(err.to_string()))?;
    match validator.validate(&value) {
        Ok(()) => Ok(value),
        Err(err) => Err(wrong(format!("the model's answer does not fit the schema: {err}"))),
    }
}

fn model_output(
    activation: &Activation<'_>,
    template: &ModelTemplate,
    content: &Value,
    calls: &[ToolCallDef],
    json: Option<Value>,
    usage: &UsageDef,
    at: i64,
) -> Value {
    let key = activation.idempotency_key();
    let calls: Vec<Value> = calls
        .iter()
        .enumerate()
        .map(|(at, call)| {
            let name = match call.name.split_once('/') {
                Some((server, tool)) => offered_name(server, tool),
                None => call.name.clone(),
            };
            let id = call.id.clone().unwrap_or_else(|| format!("call-{key}-{at}"));
            json!({ "name": name, "args": call.args, "id": id, "type": "tool_call" })
        })
        .collect();
    let UsageDef { input, output, cost_usd } = usage;
    let message = json!({
        "content": content,
        "additional_kwargs": {},
        "response_metadata": {},
        "type": "ai",
        "name": null,
        "id": format!("run-{key}"),
        "tool_calls": calls,
        "invalid_tool_calls": [],
        "usage_metadata": {
            "input_tokens": input, "output_tokens": output, "total_tokens": input + output,
        },
    });
    json!({
        "message": message,
        "text": text_of(content),
        "json": json,
        "tool_calls": calls,
        "invalid_tool_calls": [],
        "finish_reason": if calls.is_empty() { "stop" } else { "tool_calls" },
        "usage": { "input": input, "output": output, "cost_usd": cost_usd },
        "model": template.model,
        "endpoint": "test",
        "attempts": 1,
        "repairs": 0,
        "at": at,
    })
}
