//! The format of files with cases, as serde reads it and as the published JSON Schema describes it.
//!
//! **Invariant:** unknown keys are errors everywhere.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use crate::graph::definition::{Ordered, Period};

/// Cases of one file.
pub const MAX_CASES: usize = 1_000;
/// Answers of one case, each counted as often as it may be given.
pub const MAX_ANSWERS: u32 = 10_000;

/// A case: a run of a graph, what the world says to it, and what is to come of it.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CaseDef {
    /// What it shows, in a few words; unique in the file.
    pub name: String,
    /// The graph that runs; the one of the file `NAME.yaml` beside `NAME.test.yaml` when not written.
    pub graph: Option<String>,
    /// The run's input.
    #[serde(default)]
    pub input: Map<String, Value>,
    /// What expressions see as `env`.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Added to what expressions see as `run`: `metadata`, `config`, `context`.
    #[serde(default)]
    pub run: Map<String, Value>,
    /// The instant at which the run begins; 2026-01-01T00:00:00Z when not written.
    pub now: Option<DateTime<Utc>>,
    /// What the world answers, by the name of the node that asks (`OUTER/INNER` in a called graph; the agent's own
    /// name in an agent) or by `SERVER/TOOL`. Each list is used up in order.
    #[serde(default)]
    pub answers: Ordered<Vec<AnswerDef>>,
    /// Events that are sent to the thread, in order.
    #[serde(default)]
    pub events: Vec<EventDef>,
    /// What is to come of it.
    pub expect: ExpectDef,
}

/// One answer of the world. Which keys go together depends on what asks.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AnswerDef {
    /// `model`: what the model says. `tool`: the text of the result.
    pub text: Option<String>,
    /// `model`: a whole message.
    pub message: Option<MessageDef>,
    /// `model`: the tools that the model asks for.
    pub tool_calls: Option<Vec<ToolCallDef>>,
    /// `model` with a `schema`: the value that the model answers with.
    #[serde(default, deserialize_with = "present")]
    pub json: Option<Value>,
    /// `model`: what the answer cost.
    pub usage: Option<UsageDef>,
    /// `tool`: the structured part of the result.
    #[serde(default, deserialize_with = "present")]
    pub structured: Option<Value>,
    /// `tool`: whether the result is a failure of the tool.
    pub is_error: Option<bool>,
    /// `tool` of an agent: which tool has to be called, as `SERVER/TOOL`.
    pub name: Option<String>,
    /// `job`: the command's exit code; 0 when not written.
    pub exit_code: Option<i32>,
    /// `job`: what it wrote to standard output.
    pub stdout: Option<String>,
    /// `job`: what it wrote to standard error.
    pub stderr: Option<String>,
    /// `use`: the node's output.
    #[serde(default, deserialize_with = "present")]
    pub output: Option<Value>,
    /// `use`: nodes that it chooses.
    pub goto: Option<Vec<String>>,
    /// A person's answer to a question of the node.
    #[serde(default, deserialize_with = "present")]
    pub answer: Option<Value>,
    /// Nobody answers the question, and its time passes.
    pub expired: Option<bool>,
    /// The call fails.
    pub error: Option<ErrorDef>,
    /// `agent`: what its model answers.
    pub model: Option<Box<AnswerDef>>,
    /// `agent`: what a tool answers.
    pub tool: Option<Box<AnswerDef>>,
    /// Only for this item of a `for_each`.
    #[serde(default, deserialize_with = "present")]
    pub item: Option<Value>,
    /// What the request has to hold: keys that are not written here may be anything.
    #[serde(default, deserialize_with = "present")]
    pub asks: Option<Value>,
    /// How long after the beginning of the run the call has to come.
    pub at: Option<Period>,
    /// How often the answer is given; 1 when not written.
    pub times: Option<u32>,
}

/// A message of a model.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MessageDef {
    /// Text, or a list of content blocks.
    #[serde(default)]
    pub content: Value,
    /// The tools that it asks for.
    #[serde(default)]
    pub tool_calls: Vec<ToolCallDef>,
}

/// A tool that a model asks for.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ToolCallDef {
    /// `SERVER/TOOL`, or the name as the model sees it.
    pub name: String,
    /// Its arguments.
    #[serde(default)]
    pub args: Map<String, Value>,
    /// The call's id; made from the activation when not written.
    pub id: Option<String>,
}

/// Tokens and US dollars.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct UsageDef {
    /// Tokens of the request.
    #[serde(default)]
    pub input: u64,
    /// Tokens of the answer.
    #[serde(default)]
    pub output: u64,
    /// US dollars.
    #[serde(default)]
    pub cost_usd: f64,
}

/// A failure.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ErrorDef {
    /// What `error.kind` is to be.
    pub kind: String,
    /// What `error.message` is to be; the kind when not written.
    pub message: Option<String>,
    /// What another attempt could do; `retryable` when not written.
    #[serde(default)]
    pub class: ErrorClass,
}

/// What another attempt could do about a failure.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorClass {
    /// It may succeed.
    #[default]
    Retryable,
    /// It fails as well.
    Fatal,
    /// Nothing tells whether the call acted on the world.
    Unknown,
}

/// An event for the thread.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EventDef {
    /// Its name.
    pub name: String,
    /// What it brings.
    #[serde(default)]
    pub payload: Value,
    /// How long after the beginning of the run it is sent; as soon as somebody waits for it when not written.
    pub at: Option<Period>,
}

/// What is to come of a case. What is not written may be anything.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExpectDef {
    /// How the run ends; `success` when not written.
    pub status: Option<Status>,
    /// The whole output.
    #[serde(default, deserialize_with = "present")]
    pub output: Option<Value>,
    /// What the output holds: keys of maps that are not written here may be anything.
    #[serde(default, deserialize_with = "present")]
    pub contains: Option<Value>,
    /// The kind of the failure.
    pub error: Option<String>,
    /// What the run asks when it ends `interrupted`, in the same way as `contains`.
    #[serde(default, deserialize_with = "present")]
    pub question: Option<Value>,
    /// The nodes that ran, superstep after superstep; those that ran side by side as a list.
    pub path: Option<Vec<PathStep>>,
    /// What was done to the world, and how often.
    #[serde(default)]
    pub effects: Vec<EffectDef>,
    /// Nodes, and tools as `SERVER/TOOL`, that were not called.
    #[serde(default)]
    pub never_called: Vec<String>,
    /// How long the run took, waits included.
    pub at: Option<Period>,
}

/// How a run ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, serde::Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It came to its end.
    Success,
    /// It failed.
    Error,
    /// It asks a person, and nobody answers.
    Interrupted,
}

impl Status {
    /// As written.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Error => "error",
            Self::Interrupted => "interrupted",
        }
    }
}

/// What ran in one superstep.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum PathStep {
    /// One node.
    One(String),
    /// Several, side by side.
    Several(Vec<String>),
}

impl PathStep {
    /// The nodes.
    pub fn nodes(&self) -> impl Iterator<Item = &str> {
        match self {
            Self::One(node) => std::slice::from_ref(node),
            Self::Several(nodes) => nodes.as_slice(),
        }
        .iter()
        .map(String::as_str)
    }
}

/// What was done to the world.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EffectDef {
    /// The node that did it; every node when not written.
    pub node: Option<String>,
    /// What was called: the model, `SERVER/TOOL`, the image of a job, the name of a `use`; everything when not
    /// written.
    pub target: Option<String>,
    /// How often.
    pub count: u32,
}

/// A key that is written with `null` is written.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// The JSON Schema (draft 2020-12) of a file with cases.
#[must_use]
pub fn json_schema() -> Value {
    let mut schema = schemars::schema_for!(Vec<CaseDef>).to_value();
    schema["title"] = "Cases of a Cynai graph".into();
    schema["maxItems"] = MAX_CASES.into();
    schema
}

/// The schema as it is committed and printed.
#[must_use]
pub fn json_schema_text() -> String {
    let mut text = serde_json::to_string_pretty(&json_schema()).unwrap_or_default();
    text.push('\n');
    text
}
