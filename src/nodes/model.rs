//! `model`: a message from a language model.
//!
//! The request carries the attempt's idempotency key, and the answer is a durable fact: after a crash what was not
//! stored is asked again under the same key. Pieces of the answer go to the run's streams as they come.

use std::sync::Mutex;

use futures::FutureExt;
use futures::future::BoxFuture;
use serde_json::{Value, json};

use crate::graph::exec::{Activation, Custom, Intent, Node, NodeError, Outcome};
use crate::graph::model::{Effect, ModelTemplate, NodeKind};
use crate::graph::names::offered_name;
use crate::models::answer::{ChatAnswer, Delta, Sink};
use crate::models::failure::ModelError;
use crate::models::json::{JsonAnswer, JsonForm, parse_fitting};
use crate::models::messages::{ChunkWriter, Message, Role};
use crate::models::request::{ChatRequest, ToolChoice, ToolSpec};
use crate::nodes::tool::unavailable;
use crate::services::Services;
use crate::services::models::read_messages;

/// The name of a schema, for endpoints.
const SCHEMA_NAME: &str = "answer";

/// The code of `model` nodes.
#[derive(Debug, Clone)]
pub struct Model {
    services: Services,
}

impl Model {
    /// Asks models through `services`.
    #[must_use]
    pub fn new(services: Services) -> Self {
        Self { services }
    }

    async fn ask(&self, activation: &Activation<'_>) -> Result<Outcome, NodeError> {
        let template = template_of(activation)?;
        let mut request = request_of(template, activation)?;
        request.tools = self.tools(template).await?;
        request.tool_choice = tool_choice_of(template, activation)?;
        // What was streamed before a crash is void: the message begins again under another id.
        let id = match activation.sends {
            1 => format!("run-{}", activation.idempotency_key()),
            sends => format!("run-{}-{sends}", activation.idempotency_key()),
        };
        let stream = Pieces::new(activation.custom, &id);
        let answered = match &template.schema {
            None => self.services.chat(&request, &stream).await.map(without_form),
            Some(schema) if request.tools.is_empty() => {
                self.json(&request, schema, template.repairs, &stream).await
            }
            Some(schema) => self.json_after_tools(&request, schema, template, &stream).await,
        };
        let JsonAnswer { value, repairs, answer } = answered.map_err(|err| failed(&err))?;
        let (id, message) = stream.end(answer.message.clone());
        let now = self.services.clock().now().timestamp_millis();
        let mut output = output(&answer, message, &id, &value, now);
        output["repairs"] = repairs.into();
        Ok(Outcome::output(output))
    }

    async fn json(
        &self,
        request: &ChatRequest,
        schema: &Value,
        max_repairs: u32,
        stream: &Pieces<'_>,
    ) -> Result<JsonAnswer, ModelError> {
        let form = JsonForm { name: SCHEMA_NAME, schema, max_repairs };
        self.services.chat_json(request, &form, stream).await
    }

    /// A model that may call tools answers in its own words; only its last message has to fit the schema.
    async fn json_after_tools(
        &self,
        request: &ChatRequest,
        schema: &Value,
        template: &ModelTemplate,
        stream: &Pieces<'_>,
    ) -> Result<JsonAnswer, ModelError> {
        let first = self.services.chat(request, stream).await?;
        if !first.message.tool_calls.is_empty() || !first.message.invalid_tool_calls.is_empty() {
            return Ok(without_form(first));
        }
        if let Some(value) = parse_fitting(&first.message.text(), schema) {
            return Ok(JsonAnswer { value, repairs: 0, answer: first });
        }
        let mut again = request.clone();
        again.tools.clear();
        again.tool_choice = None;
        again.messages.push(first.message.clone());
        again.messages.push(Message::new(
            Role::Human,
            "Give this answer as JSON that fits the schema, and nothing else.",
        ));
        again.idempotency_key = request.idempotency_key.as_ref().map(|key| format!("{key}.json"));
        stream.take(Delta::Restart);
        let mut last = self.json(&again, schema, template.repairs, stream).await?;
        last.answer.usage += first.usage;
        Ok(last)
    }

    async fn tools(&self, template: &ModelTemplate) -> Result<Vec<ToolSpec>, NodeError> {
        if template.tools.is_empty() {
            return Ok(Vec::new());
        }
        let offered = self.services.offered_tools(&template.tools).await.map_err(unavailable)?;
        Ok(offered.into_iter().map(|(_, spec)| spec).collect())
    }
}

impl Node for Model {
    fn run<'a>(
        &'a self,
        activation: &'a Activation<'a>,
    ) -> BoxFuture<'a, Result<Outcome, NodeError>> {
        self.ask(activation).boxed()
    }

    fn effect(&self) -> Effect {
        Effect::Idempotent
    }

    fn intent<'a>(
        &'a self,
        activation: &'a Activation<'a>,
    ) -> BoxFuture<'a, Result<Option<Intent>, NodeError>> {
        let intent = || {
            let template = template_of(activation)?;
            let request = request_of(template, activation)?;
            let messages: Vec<Value> = request.messages.iter().map(Message::to_langchain).collect();
            let mut request = json!({ "messages": messages, "tools": template.tools });
            if let Some(choice) = &template.tool_choice {
                request["tool_choice"] = activation.eval(choice)?;
            }
            Ok(Some(Intent {
                kind: "model",
                target: template.model.clone(),
                request,
                effect: activation.node.effect,
            }))
        };
        futures::future::ready(intent()).boxed()
    }
}

fn template_of<'a>(activation: &'a Activation<'_>) -> Result<&'a ModelTemplate, NodeError> {
    match &activation.node.kind {
        NodeKind::Model(template) => Ok(template),
        _ => Err(NodeError::fatal("internal", "not a model node")),
    }
}

/// An answer of which no form was asked, or which calls tools first.
fn without_form(answer: ChatAnswer) -> JsonAnswer {
    JsonAnswer { value: Value::Null, repairs: 0, answer }
}

fn tool_choice_of(
    template: &ModelTemplate,
    activation: &Activation<'_>,
) -> Result<Option<ToolChoice>, NodeError> {
    let Some(choice) = &template.tool_choice else { return Ok(None) };
    let value = activation.eval(choice)?;
    let choice = match value.as_str() {
        Some("auto") => ToolChoice::Auto,
        Some("none") => ToolChoice::None,
        Some("required") => ToolChoice::Required,
        Some(named) if named.contains('/') => {
            let (server, tool) = named.split_once('/').unwrap_or_default();
            ToolChoice::Tool(offered_name(server, tool))
        }
        _ => {
            let problem = format!(
                "`tool_choice` is {value}, and not \"auto\", \"none\", \"required\" or \"SERVER/TOOL\""
            );
            return Err(NodeError::fatal("invalid_tool_choice", problem));
        }
    };
    Ok(Some(choice))
}

/// The request without its tools.
fn request_of(
    template: &ModelTemplate,
    activation: &Activation<'_>,
) -> Result<ChatRequest, NodeError> {
    let text = |value: Value| match value {
        Value::String(text) => text,
        other => other.to_string(),
    };
    let mut messages = Vec::new();
    if let Some(system) = &template.system {
        messages.push(Message::new(Role::System, text(activation.eval(system)?)));
    }
    if let Some(list) = &template.messages {
        let read = read_messages(&activation.eval(list)?);
        messages.extend(read.map_err(|why| NodeError::fatal("invalid_messages", why))?);
    }
    if let Some(prompt) = &template.prompt {
        let words = text(activation.eval(prompt)?);
        let mut images = Vec::new();
        for image in &template.images {
            let url = text(activation.eval(image)?);
            images.push(json!({ "type": "image_url", "image_url": { "url": url } }));
        }
        if images.is_empty() {
            messages.push(Message::new(Role::Human, words));
        } else {
            let mut parts = vec![json!({ "type": "text", "text": words })];
            parts.extend(images);
            let message = Message::read(&json!({ "type": "human", "content": parts }));
            messages.push(
                message.map_err(|err| NodeError::fatal("invalid_messages", err.to_string()))?,
            );
        }
    }
    let sampling = &template.sampling;
    Ok(ChatRequest {
        model: template.model.clone(),
        messages,
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        max_tokens: sampling.max_tokens,
        seed: sampling.seed,
        stop: sampling.stop.clone(),
        idempotency_key: Some(activation.idempotency_key()),
        timeout: activation.node.timeout,
        ..ChatRequest::default()
    })
}

fn output(answer: &ChatAnswer, message: Message, id: &str, value: &Value, now: i64) -> Value {
    let mut message = message;
    message.id = Some(id.to_owned());
    let calls: Vec<Value> = message.tool_calls.iter().map(|call| call.to_langchain()).collect();
    let invalid: Vec<Value> =
        message.invalid_tool_calls.iter().map(|call| call.to_langchain()).collect();
    let mut usage = json!(answer.usage);
    // A sum over turns needs a number.
    if usage["cost_usd"].is_null() {
        usage["cost_usd"] = 0.into();
    }
    json!({
        "message": message.to_langchain(),
        "text": message.text(),
        "json": value,
        "tool_calls": calls,
        "invalid_tool_calls": invalid,
        "finish_reason": answer.finish_reason,
        "usage": usage,
        "model": answer.model,
        "endpoint": answer.endpoint,
        "attempts": answer.attempts.len(),
        "at": now,
    })
}

fn failed(err: &ModelError) -> NodeError {
    let kind = err.kind().as_str();
    if err.is_transient() {
        NodeError::retryable(kind, err.to_string())
    } else {
        NodeError::fatal(kind, err.to_string())
    }
}

/// Passes pieces on to the run's streams. A message that begins again has another id.
struct Pieces<'a> {
    custom: &'a Custom,
    base: String,
    writer: Mutex<(u32, ChunkWriter)>,
}

impl<'a> Pieces<'a> {
    fn new(custom: &'a Custom, base: &str) -> Self {
        let writer = Mutex::new((0, ChunkWriter::new(base)));
        Self { custom, base: base.to_owned(), writer }
    }

    fn id(&self, restarts: u32) -> String {
        if restarts == 0 { self.base.clone() } else { format!("{}.{restarts}", self.base) }
    }

    /// Tells the end of the message; gives its id.
    fn end(&self, message: Message) -> (String, Message) {
        let state = self.writer.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.custom.message(state.1.last(&message));
        (self.id(state.0), message)
    }
}

impl Sink for Pieces<'_> {
    fn take(&self, delta: Delta) {
        let mut state = self.writer.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if delta == Delta::Restart {
            state.0 += 1;
            state.1 = ChunkWriter::new(self.id(state.0));
        } else if let Some(chunk) = state.1.piece(&delta) {
            self.custom.message(chunk);
        }
    }
}
