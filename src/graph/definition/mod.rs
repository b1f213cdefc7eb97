//! The format of graph files, as serde reads it and as the published JSON Schema describes it.
//!
//! One type for each shape that an author writes, nothing resolved and nothing checked beyond shape:
//! names, expressions and topology are the business of [`super::check`] and [`super::compile`].
//! Serialising a file and reading it back gives the same file.
//!
//! **Invariant:** unknown keys are errors everywhere; what was not written is not serialised.

mod duration;
pub mod models;
mod ordered;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use self::models::{AgentDef, ModelDef, ToolDef};
use super::model::{Effect, GraphHash, OnUnknown};

pub use duration::{MAX_DURATION, Period, parse_duration};
pub use ordered::Ordered;

/// Names of nodes that stand for the beginning and the end of a run.
pub const START: &str = "start";
/// See [`START`].
pub const END: &str = "end";

/// A graph file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Cynai graph file")]
pub struct GraphFile {
    /// The name of the graph, unique among the loaded graphs: letters, digits, `_`, `-`, `.`.
    pub name: String,
    /// What the graph does, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The channels of the state.
    #[serde(default, skip_serializing_if = "Ordered::is_empty")]
    pub state: Ordered<ChannelDef>,
    /// Channels that a run's input may set. All, when this is not written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<Vec<String>>,
    /// Channels that are a run's result. All, when this is not written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<Vec<String>>,
    /// Bounds of one run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitsDef>,
    /// The nodes.
    pub nodes: Ordered<NodeDef>,
    /// Where runs go: `a -> b -> c`, `{from, to}` or `{from, choose}`.
    pub edges: Vec<EdgeDef>,
}

/// A channel: a JSON Schema, and beside its keywords `reduce` and `default`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct ChannelDef {
    /// How the writes of one superstep combine with the value: `replace` (the default; two writers in
    /// one superstep are an error), `append`, `merge`, `sum`, `min`, `max`, `union`, `messages`, or
    /// `${expression}` over `current` and `update`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reduce: Option<String>,
    /// The value before the first write. Without it the channel has no value until it is written.
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    pub default: Option<Value>,
    /// The keywords of the JSON Schema (draft 2020-12) that every value of the channel must match.
    #[serde(flatten)]
    pub schema: Map<String, Value>,
}

/// Bounds of one run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitsDef {
    /// Supersteps of one run; 10,000 when not written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub supersteps: Option<u32>,
    /// From the first claim to the end, waiting included; no bound when not written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<Period>,
}

/// A node. Exactly one of `job`, `interrupt`, `wait`, `graph` and `use`, or none and a `set`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NodeDef {
    /// What the node does, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// `${expression}` that gives a list: one activation for each item, all in one superstep.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub for_each: Option<String>,
    /// The name of the item in the node's expressions; `item` when not written.
    #[serde(default, rename = "as", skip_serializing_if = "Option::is_none")]
    pub item_name: Option<String>,
    /// How many activations of a `for_each` may be under way at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_parallel: Option<u32>,
    /// A sandboxed execution on a worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<JobDef>,
    /// A question to a person.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interrupt: Option<InterruptDef>,
    /// A time or an event to wait for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait: Option<WaitDef>,
    /// Another graph, run in a namespace of its own: its name, or a name and an input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub graph: Option<GraphRef>,
    /// The name of a node written in Rust.
    #[serde(default, rename = "use", skip_serializing_if = "Option::is_none")]
    pub use_name: Option<String>,
    /// The argument of `use`: any JSON, a template.
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    pub with: Option<Value>,
    /// What repeating an attempt would do to the world.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effect: Option<EffectDef>,
    /// What follows when nothing tells whether an attempt acted on the world: `ask` a person (the default where
    /// repeating would act twice), `retry` under the same idempotency key (the default elsewhere), or `fail`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effects: Option<EffectsDef>,
    /// Nodes that the code of a `use` node may choose at run time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub may_goto: Option<Vec<String>>,
    /// The bound of one attempt, such as `30s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Period>,
    /// What happens after a failed attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<RetryDef>,
    /// The node to go to when the attempts are spent; it sees `error`. Without it the run fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_error: Option<String>,
    /// Channel updates: templates over `output` and everything in scope.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set: Option<Ordered<Value>>,
    /// A message from a language model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelDef>,
    /// A language model that calls tools until it has an answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<AgentDef>,
    /// A call of a tool of an MCP server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool: Option<ToolDef>,
    // Kinds that a later version brings: written today they are an error that says so.
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schemars(skip)]
    pub(super) http: Option<Value>,
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schemars(skip)]
    pub(super) browse: Option<Value>,
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schemars(skip)]
    pub(super) start: Option<Value>,
}

/// `job:`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JobDef {
    /// The root filesystem, a name that the worker's configuration maps; `sandbox/base` when not written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// The argument vector: templates that give text or numbers. No shell is involved.
    pub command: Vec<Value>,
    /// Environment variables: templates.
    #[serde(default, skip_serializing_if = "Ordered::is_empty")]
    pub env: Ordered<Value>,
    /// Text for standard input: a template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// Read-only directories of the worker by name, seen at /data/NAME.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<String>,
    /// Limits stricter than the worker's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourcesDef>,
    /// Exit codes that are a success; `[0]` when not written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ok_exit_codes: Option<Vec<i32>>,
}

/// `resources:` of a job.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ResourcesDef {
    /// MiB of memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u32>,
    /// Processes and threads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processes: Option<u32>,
    /// Processors, such as `0.5`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<f64>,
    /// MiB of /workspace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mb: Option<u32>,
}

/// `interrupt:`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InterruptDef {
    /// What the person is shown: any JSON, a template.
    #[serde(deserialize_with = "any_json")]
    pub ask: Value,
    /// The JSON Schema that an answer must match.
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    pub schema: Option<Value>,
    /// How long the question stands, such as `24h`; then the node fails with the kind `expired`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<Period>,
}

/// `wait:`; exactly one of `for`, `until` and `event`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WaitDef {
    /// A duration such as `90s`, or `${expression}` that gives one or a number of seconds.
    #[serde(default, rename = "for", skip_serializing_if = "Option::is_none")]
    pub duration: Option<String>,
    /// An RFC 3339 instant, or a template that gives one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
    /// The name of an event that is sent to the thread: a template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<String>,
    /// How long to wait for the event; then the node fails with the kind `timeout`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Period>,
}

/// `graph:`: a name, or a name and an input.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum GraphRef {
    /// Run with an empty input.
    Name(String),
    /// Run with an input.
    Call(GraphCall),
}

/// `graph:` written out.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GraphCall {
    /// The graph's name.
    pub name: String,
    /// A template for each input channel of that graph.
    #[serde(default, skip_serializing_if = "Ordered::is_empty")]
    pub input: Ordered<Value>,
}

/// `retry:`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RetryDef {
    /// All attempts, the first one included.
    pub attempts: u32,
    /// The pause after the first failure; `1s` when not written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first: Option<Period>,
    /// Each pause is the last times this; 2 when not written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub factor: Option<f64>,
    /// No pause is longer; `1m` when not written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<Period>,
    /// Whether pauses are drawn at random from the upper half of their length; true when not written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jitter: Option<bool>,
}

/// `effect:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum EffectDef {
    /// Nothing outside the run: may run again at will.
    Pure,
    /// Twice is the same as once.
    Idempotent,
    /// Twice is different: an unknown outcome goes to a person.
    Effectful,
}

/// `effects:`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum EffectsDef {
    /// A person decides.
    Ask,
    /// It is sent again under the same idempotency key.
    Retry,
    /// The attempt fails with kind `unknown_outcome`.
    Fail,
}

/// An edge.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum EdgeDef {
    /// `a -> b -> c`.
    Path(String),
    /// `{from, to}` or `{from, choose}`.
    Table(EdgeTable),
}

/// An edge written out; exactly one of `to` and `choose`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EdgeTable {
    /// A node, or a list of nodes: a join, which waits for all of them.
    pub from: Names,
    /// A node, or a list of nodes that all run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Names>,
    /// Conditions in order: the first that holds is taken. The last one needs none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub choose: Option<Vec<ChoiceDef>>,
}

/// One line of a `choose`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ChoiceDef {
    /// A bare expression that gives true or false; without one the line always matches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<String>,
    /// A node, or a list of nodes that all run.
    pub to: Names,
}

/// A name, or a list of names.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Names {
    /// One name.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl Names {
    /// The names as a slice.
    #[must_use]
    pub fn as_slice(&self) -> &[String] {
        match self {
            Self::One(name) => std::slice::from_ref(name),
            Self::Many(names) => names,
        }
    }
}

impl From<EffectDef> for Effect {
    fn from(effect: EffectDef) -> Self {
        match effect {
            EffectDef::Pure => Self::Pure,
            EffectDef::Idempotent => Self::Idempotent,
            EffectDef::Effectful => Self::Effectful,
        }
    }
}

impl From<EffectsDef> for OnUnknown {
    fn from(effects: EffectsDef) -> Self {
        match effects {
            EffectsDef::Ask => Self::Ask,
            EffectsDef::Retry => Self::Retry,
            EffectsDef::Fail => Self::Fail,
        }
    }
}

impl GraphRef {
    /// The graph's name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Name(name) => name,
            Self::Call(call) => &call.name,
        }
    }
}

impl NodeDef {
    /// The node kinds that are written, by their keys.
    #[must_use]
    pub fn kinds(&self) -> Vec<&'static str> {
        let written = [
            ("job", self.job.is_some()),
            ("interrupt", self.interrupt.is_some()),
            ("wait", self.wait.is_some()),
            ("graph", self.graph.is_some()),
            ("use", self.use_name.is_some()),
            ("model", self.model.is_some()),
            ("agent", self.agent.is_some()),
            ("tool", self.tool.is_some()),
        ];
        let kinds = written.iter().filter(|(_, there)| *there).map(|(kind, _)| *kind);
        kinds.chain(self.later_kinds()).collect()
    }

    /// The kinds among them that this version does not run.
    #[must_use]
    pub fn later_kinds(&self) -> Vec<&'static str> {
        let written = [("http", &self.http), ("browse", &self.browse), ("start", &self.start)];
        written.iter().filter(|(_, value)| value.is_some()).map(|(kind, _)| *kind).collect()
    }
}

impl ChannelDef {
    /// The channel's JSON Schema, with the default as its annotation.
    #[must_use]
    pub fn json_schema(&self) -> Value {
        let mut schema = self.schema.clone();
        if let Some(default) = &self.default {
            schema.insert("default".into(), default.clone());
        }
        Value::Object(schema)
    }
}

impl GraphFile {
    /// The one JSON text of this file: no white space, all keys sorted. Stored, and hashed.
    #[must_use]
    pub fn canonical_json(&self) -> String {
        let mut json =
            serde_json::to_value(self).expect("a file has string keys and finite numbers");
        json.sort_all_objects();
        json.to_string()
    }

    /// SHA-256 of the canonical JSON and of the `(name, hash)` of every graph that the file calls.
    #[must_use]
    pub fn hash(&self, subgraphs: &[(String, GraphHash)]) -> GraphHash {
        let mut called = subgraphs.to_vec();
        called.sort();
        called.dedup();
        let mut hasher = Sha256::new();
        let mut part = |bytes: &[u8]| {
            hasher.update(u64::try_from(bytes.len()).unwrap_or(u64::MAX).to_be_bytes());
            hasher.update(bytes);
        };
        part(b"cynai graph 1");
        part(self.canonical_json().as_bytes());
        for (name, hash) in &called {
            part(name.as_bytes());
            part(&hash.0);
        }
        GraphHash(hasher.finalize().into())
    }
}

/// A value that is there, even when it is null.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// Any JSON, null included; the key itself must be there.
fn any_json<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Value, D::Error> {
    Value::deserialize(deserializer)
}

/// Deserialises what is either text or something else, keeping the error of the one that was tried.
struct TextOr<T, R> {
    expecting: &'static str,
    text: fn(String) -> T,
    other: fn(R) -> T,
}

impl<'de, T, R: Deserialize<'de>> de::Visitor<'de> for TextOr<T, R> {
    type Value = T;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.expecting)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        Ok((self.text)(text.to_owned()))
    }

    fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        R::deserialize(de::value::MapAccessDeserializer::new(map)).map(self.other)
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, seq: A) -> Result<T, A::Error> {
        R::deserialize(de::value::SeqAccessDeserializer::new(seq)).map(self.other)
    }
}

impl<'de> Deserialize<'de> for GraphRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expecting = "the name of a graph, or a map with `name` and `input`";
        deserializer.deserialize_any(TextOr { expecting, text: Self::Name, other: Self::Call })
    }
}

impl<'de> Deserialize<'de> for EdgeDef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expecting = "an edge: `a -> b`, or a map with `from` and `to` or `choose`";
        deserializer.deserialize_any(TextOr { expecting, text: Self::Path, other: Self::Table })
    }
}

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expecting = "a name or a list of names";
        deserializer.deserialize_any(TextOr { expecting, text: Self::One, other: Self::Many })
    }
}
