//! `model:`, `agent:` and `tool:` of a node.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Period;

/// Text for a model: Markdown with `MiniJinja`, over the state and what else is in scope.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum TextDef {
    /// The text itself.
    Text(String),
    /// A file beside the graph file; its text is taken when the graph is loaded.
    File(TextFile),
}

/// A file that holds a text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TextFile {
    /// Its path from the directory of the graph file.
    pub file: String,
}

/// What a model is asked with, beside the conversation.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SamplingDef {
    /// 0 to 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// The longest answer, in tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// For answers that repeat, where the endpoint can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// Texts at which the answer ends.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
}

/// `model:`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelDef {
    /// A route of the configuration, or `ENDPOINT/MODEL`; `default` when not written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// What the model is told first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<TextDef>,
    /// `${expression}` that gives the conversation so far: a list of messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub messages: Option<String>,
    /// What the user says last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<TextDef>,
    /// Images that go with `prompt`: addresses or `data:` URLs, templates.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<Value>,
    /// Tools that the model may ask for, as `SERVER/TOOL` or `SERVER/*`. It only asks: `agent` also calls.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<String>,
    /// Whether it asks for them: `auto`, `none`, `required` (at least one), or the `SERVER/TOOL` that it has to ask for;
    /// or `${expression}` that gives one of these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_choice: Option<String>,
    /// JSON Schema of the answer; `output.json` then holds a value that fits it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<Value>,
    /// How often an answer that does not fit `schema` is sent back to be repaired: 0 to 3; 2 when not written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repairs: Option<u32>,
    /// How the model is asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling: Option<SamplingDef>,
}

/// `tool:`: `server`, `name` and `arguments`; or `call`, as a model made it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ToolDef {
    /// The server's name in the configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// The tool's name on that server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its arguments: an object, a template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arguments: Option<Value>,
    /// `${expression}` that gives a tool call of a model's message. What is wrong with it, and what the tool says,
    /// is `output.message`, for the model to read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub call: Option<String>,
    /// What `call` may name, as `SERVER/TOOL` or `SERVER/*`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<String>,
    /// Of these a person decides each time, and may change the arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub approve: Vec<String>,
}

/// `agent:`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentDef {
    /// A route of the configuration, or `ENDPOINT/MODEL`; `default` when not written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// What the model is told first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<TextDef>,
    /// `${expression}` that gives the conversation so far: a list of messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub messages: Option<String>,
    /// What the agent is to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<TextDef>,
    /// Tools that it may call, as `SERVER/TOOL` or `SERVER/*`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<String>,
    /// Whether its first message calls them: `auto`, `none`, `required` (at least one), or the `SERVER/TOOL` that it has to
    /// call. Those after it are as the model likes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_choice: Option<String>,
    /// Of these a person decides each call, and may change the arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub approve: Vec<String>,
    /// JSON Schema of the last answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<Value>,
    /// How the model is asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling: Option<SamplingDef>,
    /// Where it stops without an answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<AgentLimitsDef>,
}

/// `limits:` of an agent. What is reached is named in `output.stopped`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AgentLimitsDef {
    /// Messages of the model: 1 to 1000; 20 when not written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub turns: Option<u32>,
    /// Calls of tools: 100 when not written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calls: Option<u32>,
    /// Tokens of all requests and answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// US dollars, where the endpoints have prices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_usd: Option<f64>,
    /// Time, from its first message on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<Period>,
}
