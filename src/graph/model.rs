//! A graph, checked and compiled: what the engine executes.
//!
//! Made by [`super::compile`] from a [`super::definition::GraphFile`] that passed every check, never by
//! hand, so the engine needs no check of names: nodes and channels are indices that exist.
//!
//! **Invariant:** nothing here changes after it was made; a `Graph` is shared by all runs pinned to it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::definition::GraphFile;
use super::expr::{Expr, Template};

/// SHA-256 of the canonical JSON of a graph file and of the hashes of its subgraphs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GraphHash(pub [u8; 32]);

/// Position of a channel in [`Graph::channels`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ChannelIndex(pub u32);

/// Position of a node in [`Graph::nodes`], which is the order of the names.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct NodeIndex(pub u32);

/// Position of a join in [`Graph::joins`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct JoinIndex(pub u32);

/// A checked graph.
#[derive(Debug)]
pub struct Graph {
    /// The `name:` of the file, unique among the loaded graphs.
    pub name: String,
    /// What a run is pinned to.
    pub hash: GraphHash,
    /// The file that this was compiled from; its canonical JSON is what is stored.
    pub file: Arc<GraphFile>,
    /// State slots in the order of their names.
    pub channels: Vec<Channel>,
    /// Nodes in the order of their names, so that a graph compiled from its stored form is the same.
    pub nodes: Vec<Node>,
    /// Barriers of several sources.
    pub joins: Vec<Join>,
    /// What runs first.
    pub start: Route,
    /// Channels that a run's input may name. Never empty unless the graph declares no input.
    pub input: Vec<ChannelIndex>,
    /// Channels that are the run's result.
    pub output: Vec<ChannelIndex>,
    /// Bounds of one run.
    pub limits: Limits,
    /// JSON Schema of the input: an object of the input channels' schemas, no other keys.
    pub input_schema: Value,
    /// JSON Schema of the output.
    pub output_schema: Value,
    /// JSON Schema of the whole state.
    pub state_schema: Value,
    /// Checks an input; compiled once from `input_schema`.
    pub input_validator: jsonschema::Validator,
}

/// A state slot.
#[derive(Debug)]
pub struct Channel {
    /// Its key in the state.
    pub name: String,
    /// How the writes of one superstep combine with the value.
    pub reducer: Reducer,
    /// Its value before the first write; `None` leaves the channel absent.
    pub default: Option<Value>,
    /// Its JSON Schema as written.
    pub schema: Value,
    /// Checks a value of the channel; for a reducer that collects, one update is checked by `update_validator`.
    pub validator: jsonschema::Validator,
    /// Checks one update where its shape differs from the value's; `None` when they are the same.
    pub update_validator: Option<jsonschema::Validator>,
}

/// How the writes of a superstep, in deterministic order, change a channel.
#[derive(Debug)]
pub enum Reducer {
    /// The one write replaces the value; two writers in one superstep are an error.
    Replace,
    /// Each write is a list; its items are appended.
    Append,
    /// Each write is an object; its keys replace the value's, shallowly.
    Merge,
    /// Numbers are added.
    Sum,
    /// The smallest number or string stays.
    Min,
    /// The largest number or string stays.
    Max,
    /// Each write is a list; items that are not in the value yet are appended.
    Union,
    /// Chat messages: appended, replaced when the `id` is known, removed by `{"type": "remove", "id": ..}`.
    Messages,
    /// A CEL expression over `current` (null when absent) and `update`, for each write in turn.
    Custom(Expr),
}

/// A vertex of the graph.
#[derive(Debug)]
pub struct Node {
    /// Its name in the file.
    pub name: String,
    /// What an activation does.
    pub kind: NodeKind,
    /// An activation for each item of a list, in one superstep.
    pub for_each: Option<ForEach>,
    /// Channel updates computed from `output` (and everything in scope) after the activation.
    pub set: Vec<(ChannelIndex, Template)>,
    /// Bound of one attempt.
    pub timeout: Option<Duration>,
    /// What happens after a failed attempt; `None` is no second attempt.
    pub retry: Option<Retry>,
    /// Where the run goes when the attempts are spent; `None` fails the run.
    pub on_error: Option<NodeIndex>,
    /// Nodes that this node's code may choose at run time.
    pub may_goto: Vec<NodeIndex>,
    /// What repeating an attempt would do to the world.
    pub effect: Effect,
    /// What follows when nobody knows whether an attempt acted; `None` leaves it to the effect.
    pub on_unknown: Option<OnUnknown>,
    /// Where the run goes after a success.
    pub route: Route,
    /// Joins that wait for this node.
    pub joins: Vec<JoinIndex>,
}

/// What an activation does; a node has exactly one kind.
#[derive(Debug)]
pub enum NodeKind {
    /// Only its `set`.
    Set,
    /// A sandboxed execution on a worker.
    Job(JobTemplate),
    /// Asks a person.
    Interrupt(InterruptTemplate),
    /// Waits for a time or an event.
    Wait(WaitTemplate),
    /// Runs another graph in a namespace of its own.
    Graph {
        /// The graph, compiled.
        graph: Arc<Graph>,
        /// Its input: one template for each input channel that is given.
        input: Vec<(String, Template)>,
    },
    /// A message from a language model.
    Model(Box<ModelTemplate>),
    /// A call of a tool of an MCP server.
    Tool(ToolTemplate),
    /// A node written in Rust, found by name in the registry when the graph is loaded.
    Use {
        /// The registered name.
        name: String,
        /// Its argument, evaluated for each activation; null when the file gives none.
        with: Template,
    },
}

impl NodeKind {
    /// Whether its code is found outside the engine.
    #[must_use]
    pub fn is_outside(&self) -> bool {
        match self {
            Self::Job(_) | Self::Model(_) | Self::Tool(_) | Self::Use { .. } => true,
            Self::Set | Self::Interrupt(_) | Self::Wait(_) | Self::Graph { .. } => false,
        }
    }
}

/// `job:` with its templates.
#[derive(Debug)]
pub struct JobTemplate {
    /// Names a root filesystem of the worker.
    pub image: String,
    /// The argument vector; every part evaluates to text.
    pub command: Vec<Template>,
    /// Environment variables.
    pub env: Vec<(String, Template)>,
    /// Text for standard input.
    pub stdin: Option<Template>,
    /// Names of read-only directories of the worker, seen at /data/NAME.
    pub mounts: Vec<String>,
    /// Stricter limits than the worker's.
    pub resources: JobResources,
    /// Exit codes that are a success; `[0]` unless the file says otherwise.
    pub ok_exit_codes: Vec<i32>,
}

/// Limits that a job asks for; `None` leaves the worker's own.
#[derive(Debug, Clone, Copy, Default)]
pub struct JobResources {
    /// MiB of memory.
    pub memory_mb: Option<u32>,
    /// Processes and threads.
    pub processes: Option<u32>,
    /// Processor share in thousandths of one processor.
    pub millicpus: Option<u32>,
    /// MiB of /workspace.
    pub disk_mb: Option<u32>,
}

/// `model:` with its templates.
#[derive(Debug)]
pub struct ModelTemplate {
    /// A route of the configuration, or `ENDPOINT/MODEL`.
    pub model: String,
    /// What the model is told first.
    pub system: Option<Template>,
    /// The conversation so far: a list of messages.
    pub messages: Option<Template>,
    /// What the user says last.
    pub prompt: Option<Template>,
    /// Addresses or `data:` URLs of images that go with the prompt.
    pub images: Vec<Template>,
    /// Tools that the model may ask for, as `SERVER/TOOL` or `SERVER/*`.
    pub tools: Vec<String>,
    /// Whether it asks for them: what this becomes is `auto`, `none`, `required` or `SERVER/TOOL`.
    pub tool_choice: Option<Template>,
    /// JSON Schema of the answer.
    pub schema: Option<Value>,
    /// How often an answer that does not fit is sent back.
    pub repairs: u32,
    /// How the model is asked.
    pub sampling: Sampling,
}

/// How a model is asked; what is absent is the endpoint's own choice.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sampling {
    /// 0 to 2.
    pub temperature: Option<f64>,
    /// 0 to 1.
    pub top_p: Option<f64>,
    /// The longest answer, in tokens.
    pub max_tokens: Option<u32>,
    /// For answers that repeat.
    pub seed: Option<i64>,
    /// Texts at which the answer ends.
    pub stop: Vec<String>,
}

/// `tool:` with its templates.
#[derive(Debug)]
pub struct ToolTemplate {
    /// What is called.
    pub target: ToolTarget,
    /// What a call that a model made may name, as `SERVER/TOOL` or `SERVER/*`.
    pub allow: Vec<String>,
    /// Of these a person decides each time.
    pub approve: Vec<String>,
    /// What repeating a call would do, where the file says; else the tool's own annotations do.
    pub effect: Option<Effect>,
}

/// What a `tool` node calls.
#[derive(Debug)]
pub enum ToolTarget {
    /// A tool that the file names.
    Named {
        /// The server's name in the configuration.
        server: String,
        /// The tool's name on that server.
        tool: String,
        /// Its arguments: an object.
        arguments: Template,
    },
    /// A tool call of a model's message.
    Call(Template),
}

/// `interrupt:` with its templates.
#[derive(Debug)]
pub struct InterruptTemplate {
    /// What the person is shown: any JSON.
    pub ask: Template,
    /// The schema of an answer as written; `None` accepts anything.
    pub schema: Option<Value>,
    /// How long the question stands; after that the activation fails with kind `expired`.
    pub expires: Option<Duration>,
}

/// `wait:` with its templates.
#[derive(Debug)]
pub enum WaitTemplate {
    /// For a duration: a literal, or an expression that gives seconds or text such as `90s`.
    For(Template),
    /// Until an instant (RFC 3339 text).
    Until(Template),
    /// For a named event sent to the thread; after `timeout` it fails with kind `timeout`.
    Event {
        /// The event's name.
        name: Template,
        /// How long at most.
        timeout: Option<Duration>,
    },
}

/// `for_each:`.
#[derive(Debug)]
pub struct ForEach {
    /// Evaluates to a list.
    pub items: Expr,
    /// The item's name in expressions; `item` unless the file says otherwise.
    pub name: String,
    /// How many activations may be under way at once; `None` is no bound but the driver's.
    pub max_parallel: Option<u32>,
}

/// `retry:`.
#[derive(Debug, Clone)]
pub struct Retry {
    /// All attempts, the first one included; at least 1.
    pub attempts: u32,
    /// Pause after the first failure.
    pub first: Duration,
    /// Each pause is the last times this.
    pub factor: f64,
    /// No pause is longer.
    pub max: Duration,
    /// Whether a pause is drawn from the upper half of its length, so that failures do not return together.
    pub jitter: bool,
}

/// What follows when an attempt may have acted on the world and nothing tells whether it did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnUnknown {
    /// A person decides. The default where repeating would act twice.
    Ask,
    /// It is sent again under the same idempotency key. The default where repeating is harmless.
    Retry,
    /// The attempt fails for good, with kind `unknown_outcome`.
    Fail,
}

/// What repeating an attempt would do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing outside the run: it may run again at will.
    Pure,
    /// The same as doing it once.
    Idempotent,
    /// Something twice: an unknown outcome goes to a person.
    Effectful,
}

impl Effect {
    /// As written, stored and shown.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pure => "pure",
            Self::Idempotent => "idempotent",
            Self::Effectful => "effectful",
        }
    }
}

/// Where a run goes after a node.
#[derive(Debug, Default)]
pub struct Route {
    /// Nodes that always follow.
    pub to: Vec<NodeIndex>,
    /// One list for each `choose` edge: the first match wins.
    pub choose: Vec<Vec<Choice>>,
    /// Whether an edge leads to `end`.
    pub ends: bool,
}

/// One line of a `choose`.
#[derive(Debug)]
pub struct Choice {
    /// Bare CEL that gives a boolean; `None` always matches.
    pub when: Option<Expr>,
    /// Nodes to go to; empty is `end`.
    pub to: Vec<NodeIndex>,
}

/// A barrier: `to` runs once every source has finished since the join last fired.
#[derive(Debug)]
pub struct Join {
    /// All of these must have finished.
    pub sources: Vec<NodeIndex>,
    /// What runs then; empty is `end`.
    pub to: Vec<NodeIndex>,
}

/// Bounds of one run.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Supersteps of one run, in the root namespace and in each subgraph call alike.
    pub supersteps: u32,
    /// From the first claim to the end, waiting included; `None` is no bound.
    pub duration: Option<Duration>,
}

impl Graph {
    /// The node at `index`.
    #[must_use]
    pub fn node(&self, index: NodeIndex) -> &Node {
        &self.nodes[index.0 as usize]
    }

    /// The channel at `index`.
    #[must_use]
    pub fn channel(&self, index: ChannelIndex) -> &Channel {
        &self.channels[index.0 as usize]
    }

    /// Finds a node by its name.
    #[must_use]
    pub fn find_node(&self, name: &str) -> Option<NodeIndex> {
        let at = self.nodes.iter().position(|node| node.name == name)?;
        u32::try_from(at).ok().map(NodeIndex)
    }

    /// Finds a channel by its name.
    #[must_use]
    pub fn find_channel(&self, name: &str) -> Option<ChannelIndex> {
        let at = self.channels.iter().position(|channel| channel.name == name)?;
        u32::try_from(at).ok().map(ChannelIndex)
    }

    /// Every graph that this one calls, by name, itself not included, at any depth.
    #[must_use]
    pub fn subgraphs(&self) -> BTreeMap<String, Arc<Graph>> {
        let mut found = BTreeMap::new();
        for node in &self.nodes {
            if let NodeKind::Graph { graph, .. } = &node.kind
                && !found.contains_key(&graph.name)
            {
                found.extend(graph.subgraphs());
                found.insert(graph.name.clone(), Arc::clone(graph));
            }
        }
        found
    }
}

impl std::fmt::Display for GraphHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for GraphHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GraphHash({self})")
    }
}
