//! What goes into an operation and what comes out of it, free of HTTP and of SQL.
//!
//! Requests are made by the doors from what their clients sent. Views carry the wire's field names and
//! are sent as they are, so a name here is a promise to clients.
//!
//! **Invariant:** no view holds a secret: a token appears in one type only, made once.

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use utoipa::ToSchema;

pub use crate::store::status::{MultitaskStrategy, RunStatus, ThreadStatus};

use crate::ids::{AssistantId, RunId, TaskId, ThreadId, UserId};
use crate::store::status::words;

/// A JSON object.
pub type Object = Map<String, Value>;

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor {
    /// Whose rows it may see.
    pub user_id: UserId,
    /// The user's name.
    pub name: String,
    /// Whether it may manage users.
    pub admin: bool,
}

/// How a client names an assistant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AssistantRef {
    /// By id.
    Id(AssistantId),
    /// By its graph's name: the default assistant.
    Name(String),
}

words! {
    /// Which events a stream carries.
    StreamMode {
        /// The whole state after each superstep.
        Values = "values",
        /// What each finished activation wrote.
        Updates = "updates",
        /// A model's messages as they grow, as whole messages.
        Messages = "messages",
        /// A model's messages as they grow, as pieces.
        MessagesTuple = "messages-tuple",
        /// What nodes emit themselves.
        Custom = "custom",
        /// Activations as they start and end.
        Tasks = "tasks",
        /// Checkpoints as they are made.
        Checkpoints = "checkpoints",
        /// Tasks and checkpoints together, with their superstep.
        Debug = "debug",
        /// Everything that happens inside nodes.
        Events = "events",
        /// Tool calls of a model.
        Tools = "tools",
        /// Begin and end of the run and of its subgraphs.
        Lifecycle = "lifecycle",
    }
}

words! {
    /// How far a superstep must be stored before the next one begins.
    Durability {
        /// Committed.
        Sync = "sync",
        /// On its way.
        Async = "async",
        /// Not before the end of the run.
        Exit = "exit",
    }
}

words! {
    /// What a request about an absent thread does.
    IfNotExists {
        /// The thread is made.
        Create = "create",
        /// The request is refused.
        Reject = "reject",
    }
}

words! {
    /// What creating a thing that exists already does.
    IfExists {
        /// The request is refused.
        Raise = "raise",
        /// The existing thing is the answer.
        DoNothing = "do_nothing",
    }
}

words! {
    /// What happens to a run when the client that waits for it goes away.
    OnDisconnect {
        /// It is cancelled.
        Cancel = "cancel",
        /// It goes on.
        Continue = "continue",
    }
}

words! {
    /// What happens to the thread of a stateless run when the run ends.
    OnCompletion {
        /// It is deleted.
        Delete = "delete",
        /// It stays.
        Keep = "keep",
    }
}

words! {
    /// What cancelling does to what the run has done so far.
    CancelAction {
        /// Its checkpoints stay.
        Interrupt = "interrupt",
        /// The run and its checkpoints are deleted.
        Rollback = "rollback",
    }
}

/// Nodes at which a run stops to ask.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum NodeSelection {
    /// None.
    #[default]
    None,
    /// Every node.
    All,
    /// These.
    Named(Vec<String>),
}

/// An order to a thread in place of an input.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Command {
    /// Channel updates to apply first.
    pub update: Option<Vec<(String, Value)>>,
    /// The answer to what waits: a value for the only interrupt, or an object interrupt id -> value.
    /// `Some(Null)` is an answer, `None` is no answer.
    pub resume: Option<Value>,
    /// Nodes to run next.
    pub goto: Vec<Goto>,
}

/// A node to run next.
#[derive(Debug, Clone, PartialEq)]
pub struct Goto {
    /// Its name.
    pub node: String,
    /// What it is given in place of the state.
    pub input: Option<Value>,
}

/// A new run.
#[derive(Debug, Clone)]
pub struct CreateRun {
    /// What runs.
    pub assistant: AssistantRef,
    /// The graph's input; `None` with a command, or to go on from a checkpoint.
    pub input: Option<Value>,
    /// In place of an input.
    pub command: Option<Command>,
    /// Kept with the run.
    pub metadata: Object,
    /// `tags`, `recursion_limit`, `configurable`; merged over the assistant's.
    pub config: Object,
    /// Merged over the assistant's.
    pub context: Option<Value>,
    /// Starts from this checkpoint instead of the thread's last one.
    pub checkpoint_id: Option<String>,
    /// What its streams carry unless they ask for something else.
    pub stream_modes: Vec<StreamMode>,
    /// Whether streams show subgraphs too.
    pub stream_subgraphs: bool,
    /// Whether a stream can be taken up again from an event's id.
    pub stream_resumable: bool,
    /// When the thread is busy.
    pub multitask_strategy: MultitaskStrategy,
    /// When the thread does not exist.
    pub if_not_exists: IfNotExists,
    /// When the client goes away.
    pub on_disconnect: OnDisconnect,
    /// For a run without a thread.
    pub on_completion: OnCompletion,
    /// Starts no earlier than so many seconds from now.
    pub after_seconds: Option<u32>,
    /// How far supersteps are stored.
    pub durability: Durability,
    /// Stops before these nodes.
    pub interrupt_before: NodeSelection,
    /// Stops after these nodes.
    pub interrupt_after: NodeSelection,
    /// Larger goes first among the owner's runs.
    pub priority: i32,
    /// The URL that its end is told to.
    pub webhook: Option<String>,
}

impl CreateRun {
    /// A run of `assistant` with `input` and the defaults for everything else.
    #[must_use]
    pub fn new(assistant: AssistantRef, input: Option<Value>) -> Self {
        Self {
            assistant,
            input,
            command: None,
            metadata: Object::new(),
            config: Object::new(),
            context: None,
            checkpoint_id: None,
            stream_modes: vec![StreamMode::Values],
            stream_subgraphs: false,
            stream_resumable: false,
            multitask_strategy: MultitaskStrategy::Enqueue,
            if_not_exists: IfNotExists::Reject,
            on_disconnect: OnDisconnect::Continue,
            on_completion: OnCompletion::Delete,
            after_seconds: None,
            durability: Durability::Sync,
            interrupt_before: NodeSelection::None,
            interrupt_after: NodeSelection::None,
            priority: 0,
            webhook: None,
        }
    }
}

/// Names a run: within a thread, or by its id alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunKey {
    /// The thread that it must be on; `None` accepts any of the actor's threads.
    pub thread: Option<ThreadId>,
    /// The run.
    pub run: RunId,
}

/// A run as clients see it.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct RunView {
    /// Its id.
    #[schema(value_type = uuid::Uuid)]
    pub run_id: RunId,
    /// Its thread.
    #[schema(value_type = uuid::Uuid)]
    pub thread_id: ThreadId,
    /// What it runs.
    #[schema(value_type = uuid::Uuid)]
    pub assistant_id: AssistantId,
    /// When it was accepted.
    #[serde(with = "instant")]
    pub created_at: DateTime<Utc>,
    /// When it last changed status.
    #[serde(with = "instant")]
    pub updated_at: DateTime<Utc>,
    /// When it began.
    #[serde(with = "optional_instant", skip_serializing_if = "Option::is_none")]
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended.
    #[serde(with = "optional_instant", skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<DateTime<Utc>>,
    /// How far it is.
    pub status: RunStatus,
    /// The client's own keys.
    #[schema(value_type = Object)]
    pub metadata: Object,
    /// What the client asked for.
    #[schema(value_type = Object)]
    pub kwargs: Value,
    /// What it does on a busy thread.
    pub multitask_strategy: MultitaskStrategy,
    /// Why it was cancelled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cancel_reason: Option<String>,
    /// `{"error": class, "message": text}` of a run that failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub error: Option<Value>,
}

/// What one attempt of a node did to the world.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct EffectView {
    /// The activation.
    #[schema(value_type = uuid::Uuid)]
    pub task_id: TaskId,
    /// Which attempt of it; a new number follows a recorded failure only.
    pub attempt: i32,
    /// What names the attempt to the other side; the same each time that it is sent.
    pub idempotency_key: String,
    /// The namespace of the activation, empty for the root.
    pub checkpoint_ns: String,
    /// The node's name.
    pub node: String,
    /// `tool`, `model`, or `use` for a node written in Rust.
    pub kind: String,
    /// What was called.
    pub target: String,
    /// What repeating it would do: `idempotent` or `effectful`.
    pub effect: String,
    /// `intent` (under way, or its process died), `done`, `failed`, `not_sent`, `unknown` (it may have happened),
    /// `waiting`.
    pub status: String,
    /// How often it was about to be sent.
    pub sends: i32,
    /// When it was first about to be sent.
    #[serde(with = "instant")]
    pub started_at: DateTime<Utc>,
    /// When its outcome was stored.
    #[serde(with = "optional_instant", skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<DateTime<Utc>>,
    /// SHA-256 of the request's JSON, in hexadecimal.
    pub request_hash: String,
    /// What was sent; of more than 16 KiB, a text with its beginning.
    #[schema(value_type = Object)]
    pub request: Value,
    /// What came of it; of more than 4 KiB, a text with its beginning.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub outcome: Option<Value>,
}

/// Which runs to list, newest first.
#[derive(Debug, Clone)]
pub struct RunFilter {
    /// Of one thread, or all of the actor's.
    pub thread: Option<ThreadId>,
    /// In one status.
    pub status: Option<RunStatus>,
    /// Whose metadata contains this.
    pub metadata: Object,
    /// At most so many, 1 to 1000.
    pub limit: u32,
    /// Skip so many.
    pub offset: u32,
}

/// Several runs to cancel.
#[derive(Debug, Clone)]
pub enum BulkCancel {
    /// These runs of one thread.
    Runs {
        /// The thread.
        thread: ThreadId,
        /// The runs.
        runs: Vec<RunId>,
    },
    /// All of the actor's runs in this status; `None` is pending and running.
    Status(Option<RunStatus>),
}

/// A thread as clients see it.
#[derive(Debug, Serialize, ToSchema)]
pub struct ThreadView {
    /// Its id.
    #[schema(value_type = uuid::Uuid)]
    pub thread_id: ThreadId,
    /// When it was made.
    #[serde(with = "instant")]
    pub created_at: DateTime<Utc>,
    /// When its row last changed.
    #[serde(with = "instant")]
    pub updated_at: DateTime<Utc>,
    /// When its state last changed.
    #[serde(with = "instant")]
    pub state_updated_at: DateTime<Utc>,
    /// The client's own keys.
    #[schema(value_type = Object)]
    pub metadata: Object,
    /// What it is doing.
    pub status: ThreadStatus,
    /// Of its last run.
    #[schema(value_type = Object)]
    pub config: Object,
    /// The state when the last run ended; null before.
    #[schema(value_type = Option<Object>)]
    pub values: Option<Box<RawValue>>,
    /// Task id -> what it waits for.
    #[schema(value_type = Object)]
    pub interrupts: Box<RawValue>,
    /// Why the last run failed.
    #[schema(value_type = Option<Object>)]
    pub error: Option<Box<RawValue>>,
}

/// A new thread.
#[derive(Debug, Clone)]
pub struct CreateThread {
    /// The client's choice of an id.
    pub thread_id: Option<ThreadId>,
    /// The client's own keys.
    pub metadata: Object,
    /// When the id is taken.
    pub if_exists: IfExists,
}

/// Which threads to list.
#[derive(Debug, Clone)]
pub struct SearchThreads {
    /// Only these; empty is all.
    pub ids: Vec<ThreadId>,
    /// Whose metadata contains this.
    pub metadata: Object,
    /// Whose state contains this.
    pub values: Object,
    /// In this status.
    pub status: Option<ThreadStatus>,
    /// At most so many.
    pub limit: u32,
    /// Skip so many.
    pub offset: u32,
    /// By what.
    pub sort_by: ThreadSort,
    /// Smallest first.
    pub ascending: bool,
    /// Whether the views carry their values: without, none are read.
    pub with_values: bool,
}

words! {
    /// What threads are sorted by.
    ThreadSort {
        /// Their id.
        ThreadId = "thread_id",
        /// Their status.
        Status = "status",
        /// When they were made.
        CreatedAt = "created_at",
        /// When their row last changed.
        UpdatedAt = "updated_at",
        /// When their state last changed.
        StateUpdatedAt = "state_updated_at",
    }
}

/// Part of a longer list.
#[derive(Debug)]
pub struct Page<T> {
    /// The rows that were asked for.
    pub items: Vec<T>,
    /// How many there are at least: exact on the last page, one more than seen before it.
    pub total: u64,
    /// The offset of the next part; `None` on the last one.
    pub next: Option<u64>,
}

/// A checkpoint's name on the wire.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CheckpointRef {
    /// Its thread.
    #[schema(value_type = uuid::Uuid)]
    pub thread_id: ThreadId,
    /// Empty for the root, else `node:task id` parts joined by `|`.
    pub checkpoint_ns: String,
    /// Opaque; sorts by age within one branch.
    pub checkpoint_id: Option<String>,
    /// Always null here; clients expect the key.
    #[schema(value_type = Option<Object>)]
    pub checkpoint_map: Option<Value>,
}

/// A question that waits for a person.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct InterruptView {
    /// What an answer names.
    pub id: String,
    /// What the person is shown.
    pub value: Value,
    /// JSON Schema of an answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_schema: Option<Value>,
}

/// An activation of the superstep that comes after a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct TaskView {
    /// Its durable name.
    pub id: String,
    /// The node.
    pub name: String,
    /// Where it comes from: `["node", name]`, and the item's index for `for_each`.
    pub path: Vec<Value>,
    /// Why it failed.
    pub error: Option<Value>,
    /// What it asks.
    pub interrupts: Vec<InterruptView>,
    /// Its subgraph's checkpoint.
    pub checkpoint: Option<CheckpointRef>,
    /// Its subgraph's state, when asked for.
    #[schema(no_recursion)]
    pub state: Option<Box<ThreadState>>,
    /// What it wrote.
    pub result: Option<Value>,
}

/// A state in a thread's history.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ThreadState {
    /// Channel -> value.
    #[schema(value_type = Object)]
    pub values: Object,
    /// Nodes that run next; a node appears once for each activation.
    pub next: Vec<String>,
    /// Those activations.
    pub tasks: Vec<TaskView>,
    /// `source`, `step`, `parents`, `run_id`.
    #[schema(value_type = Object)]
    pub metadata: Object,
    /// When it was made; null for a thread without a checkpoint.
    #[serde(with = "optional_instant")]
    pub created_at: Option<DateTime<Utc>>,
    /// Its name.
    pub checkpoint: Option<CheckpointRef>,
    /// The state before it.
    pub parent_checkpoint: Option<CheckpointRef>,
    /// Everything that waits for a person here.
    pub interrupts: Vec<InterruptView>,
    /// The id in `checkpoint`.
    pub checkpoint_id: Option<String>,
    /// The id in `parent_checkpoint`.
    pub parent_checkpoint_id: Option<String>,
}

impl ThreadState {
    /// The state of a thread on which nothing ran.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            values: Object::new(),
            next: Vec::new(),
            tasks: Vec::new(),
            metadata: Object::new(),
            created_at: None,
            checkpoint: None,
            parent_checkpoint: None,
            interrupts: Vec::new(),
            checkpoint_id: None,
            parent_checkpoint_id: None,
        }
    }
}

/// Which state.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StateRequest {
    /// Of this checkpoint; `None` is the latest.
    pub checkpoint_id: Option<String>,
    /// Of this namespace; empty is the root.
    pub checkpoint_ns: String,
    /// Whether tasks carry their subgraphs' states.
    pub subgraphs: bool,
}

/// Which states, newest first.
#[derive(Debug, Clone)]
pub struct HistoryRequest {
    /// At most so many, 1 to 1000.
    pub limit: u32,
    /// Only what came before this checkpoint.
    pub before: Option<String>,
    /// Of this namespace; empty is the root.
    pub checkpoint_ns: String,
    /// Whose metadata contains this (`source`, `step`, `run_id`).
    pub metadata: Object,
    /// Whether the states carry their values: without, none are read.
    pub values: bool,
}

/// A change of a thread's state from outside.
#[derive(Debug, Clone)]
pub struct UpdateState {
    /// Channel updates: an object, a list of objects applied in turn, or null.
    pub values: Value,
    /// The node in whose name it is done, which decides what runs next; `end` clears what waits.
    pub as_node: Option<String>,
    /// On top of this checkpoint; `None` is the latest.
    pub checkpoint_id: Option<String>,
    /// In this namespace; empty is the root.
    pub checkpoint_ns: String,
}

/// Where a stream begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamFrom {
    /// At the run's first event.
    Start,
    /// With what happens from now on.
    Now,
    /// After the event with this id. An id that is not one of the run's replays nothing.
    After(String),
}

/// What a stream carries.
#[derive(Debug, Clone)]
pub struct StreamRequest {
    /// Empty: the run's own `stream_modes`.
    pub modes: Vec<StreamMode>,
    /// `None`: the run's own `stream_subgraphs`.
    pub subgraphs: Option<bool>,
    /// Where it begins.
    pub from: StreamFrom,
}

/// One event of a stream. The door adds the first `metadata` and the last `end`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamItem {
    /// For taking the stream up again after it; unique and growing within the run. None when more of the same
    /// moment follows.
    pub id: Option<String>,
    /// `values`, `updates|node:task`, `error`, ...
    pub event: String,
    /// JSON text on one line.
    pub data: Bytes,
}

/// Instants on the wire: RFC 3339 in UTC, always with microseconds.
pub mod instant {
    use chrono::{DateTime, SecondsFormat, Utc};
    use serde::Serializer;

    /// Writes `at`.
    pub fn serialize<S: Serializer>(at: &DateTime<Utc>, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{}", at.to_rfc3339_opts(SecondsFormat::Micros, false)))
    }
}

/// As [`instant`], or null.
pub mod optional_instant {
    use chrono::{DateTime, Utc};
    use serde::Serializer;

    /// Writes `at`.
    pub fn serialize<S: Serializer>(at: &Option<DateTime<Utc>>, to: S) -> Result<S::Ok, S::Error> {
        match at {
            Some(at) => super::instant::serialize(at, to),
            None => to.serialize_none(),
        }
    }
}
