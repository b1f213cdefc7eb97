//! The state of a namespace, and how writes change it.
//!
//! A superstep's writes arrive in a fixed order (node order of the file, then item order), never in
//! the order in which activations happened to finish, so the same results give the same state. What
//! changed is reported as a delta, so that a checkpoint can store the change and not the value.
//!
//! **Invariant:** a write that fails leaves no trace: callers apply to a state that they throw away on error.

use std::cmp::Ordering;
use std::collections::BTreeSet;

use serde_json::{Map, Number, Value};

use super::expr::{Scope, StateView};
use super::model::{Channel, ChannelIndex, Graph, NodeIndex, Reducer};
use super::value::Shared;

/// The most items that a collecting channel may hold.
pub const MAX_ITEMS: usize = 1_000_000;
/// The most bytes of JSON that one update of a channel may have.
pub const MAX_UPDATE_BYTES: usize = 16 << 20;

/// The channels' values, the joins' arrivals and the errors that wait for their handlers.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct State {
    values: Vec<Option<Shared>>,
    /// For each join, the sources that finished since it last fired.
    pub arrived: Vec<BTreeSet<NodeIndex>>,
    /// For a handler that runs in the next superstep, the error that it handles.
    pub errors: Vec<(NodeIndex, Value)>,
}

/// An update of one channel by one activation, of a shape that the channel takes.
#[derive(Debug, Clone, PartialEq)]
pub struct Write {
    channel: ChannelIndex,
    value: Value,
}

impl Write {
    /// Checks `value` against the channel's schema.
    ///
    /// # Errors
    /// [`WriteError::Schema`] with the path inside the value.
    pub fn new(graph: &Graph, channel: ChannelIndex, value: Value) -> Result<Self, WriteError> {
        validate(graph.channel(channel), &value)?;
        Ok(Self { channel, value })
    }

    /// A write that was checked before it was stored.
    pub(super) fn checked_before(channel: ChannelIndex, value: Value) -> Self {
        Self { channel, value }
    }

    /// The channel's name and the update.
    #[must_use]
    pub fn into_named(self, graph: &Graph) -> (String, Value) {
        (graph.channel(self.channel).name.clone(), self.value)
    }
}

/// What the writes of a superstep did to a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It has a new value.
    Set(ChannelIndex),
    /// Items were appended; those from `from` on are new.
    Appended {
        /// Which channel.
        channel: ChannelIndex,
        /// How many items it had before.
        from: usize,
    },
}

/// A write that the channel refuses.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Two activations of one superstep wrote to a channel that keeps one value.
    #[error(
        "channel `{channel}` got {writers} writes in one superstep; give it a reducer, or let one node write it"
    )]
    Concurrent {
        /// The channel.
        channel: String,
        /// How many writes there were.
        writers: usize,
    },
    /// The value breaks the channel's schema.
    #[error("channel `{channel}`{path}: {reason}")]
    Schema {
        /// The channel.
        channel: String,
        /// JSON pointer inside the value, empty for the whole.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// The reducer cannot combine the value with the update.
    #[error("channel `{channel}`: {reason}")]
    Reduce {
        /// The channel.
        channel: String,
        /// What is wrong.
        reason: String,
    },
}

impl State {
    /// The state before the first write: defaults, no arrivals.
    #[must_use]
    pub fn initial(graph: &Graph) -> Self {
        let values =
            graph.channels.iter().map(|channel| channel.default.clone().map(Shared::new)).collect();
        Self { values, arrived: vec![BTreeSet::new(); graph.joins.len()], errors: Vec::new() }
    }

    /// Gives channels without a value their defaults: the state was another graph's.
    pub fn fill_defaults(&mut self, graph: &Graph) {
        for (value, channel) in self.values.iter_mut().zip(&graph.channels) {
            if value.is_none() {
                *value = channel.default.clone().map(Shared::new);
            }
        }
    }

    /// The value of a channel, if it has one.
    #[must_use]
    pub fn get(&self, channel: ChannelIndex) -> Option<&Shared> {
        self.values[channel.0 as usize].as_ref()
    }

    /// Puts a value without reducing: for restoring what was stored.
    pub(super) fn put(&mut self, channel: ChannelIndex, value: Option<Value>) {
        self.values[channel.0 as usize] = value.map(Shared::new);
    }

    /// Appends items without reducing: for restoring what was stored.
    pub(super) fn extend(&mut self, channel: ChannelIndex, items: Vec<Value>) {
        list(&mut self.values[channel.0 as usize]).extend(items);
    }

    /// Cuts a list back to `len` items: for restoring what was stored.
    pub(super) fn truncate(&mut self, channel: ChannelIndex, len: usize) {
        list(&mut self.values[channel.0 as usize]).truncate(len);
    }

    /// How many items a list channel has.
    #[must_use]
    pub fn len(&self, channel: ChannelIndex) -> usize {
        self.get(channel).and_then(|value| value.json().as_array()).map_or(0, Vec::len)
    }

    /// All values by channel name, in the order of the file.
    #[must_use]
    pub fn to_json(&self, graph: &Graph) -> Value {
        self.select(
            graph,
            (0..graph.channels.len()).filter_map(|at| u32::try_from(at).ok().map(ChannelIndex)),
        )
    }

    /// The values of the graph's output channels.
    #[must_use]
    pub fn output(&self, graph: &Graph) -> Value {
        self.select(graph, graph.output.iter().copied())
    }

    fn select(&self, graph: &Graph, channels: impl Iterator<Item = ChannelIndex>) -> Value {
        let mut map = Map::new();
        for channel in channels {
            if let Some(value) = self.get(channel) {
                map.insert(graph.channel(channel).name.clone(), value.json().clone());
            }
        }
        Value::Object(map)
    }

    /// Applies the writes of one superstep, in the order given.
    ///
    /// # Errors
    /// The first write that its channel refuses; the state is then half-changed and must be dropped.
    pub fn apply(&mut self, graph: &Graph, writes: Vec<Write>) -> Result<Vec<Change>, WriteError> {
        let mut changes: Vec<Change> = Vec::new();
        let mut counts = vec![0_usize; graph.channels.len()];
        for write in &writes {
            counts[write.channel.0 as usize] += 1;
        }
        for Write { channel, value } in writes {
            let spec = graph.channel(channel);
            let writers = counts[channel.0 as usize];
            if writers > 1 && matches!(spec.reducer, Reducer::Replace) {
                return Err(WriteError::Concurrent { channel: spec.name.clone(), writers });
            }
            let slot = &mut self.values[channel.0 as usize];
            let change = reduce(spec, channel, slot, value)?;
            merge_change(&mut changes, change);
        }
        for change in &changes {
            if let Change::Set(channel) = change
                && matches!(graph.channel(*channel).reducer, Reducer::Merge | Reducer::Custom(_))
                && let Some(value) = self.get(*channel)
            {
                check_schema(
                    graph.channel(*channel),
                    &graph.channel(*channel).validator,
                    value.json(),
                )?;
            }
        }
        Ok(changes)
    }
}

/// A state with its graph, as expressions read it.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// Whose channels they are.
    pub graph: &'a Graph,
    /// Their values.
    pub state: &'a State,
}

impl StateView for View<'_> {
    fn get(&self, channel: &str) -> Option<Shared> {
        self.state.get(self.graph.find_channel(channel)?).cloned()
    }
}

/// The changes of several applications in turn as those of one: each channel at most once.
#[must_use]
pub fn merged(changes: Vec<Change>) -> Vec<Change> {
    let mut whole = Vec::with_capacity(changes.len());
    for change in changes {
        merge_change(&mut whole, change);
    }
    whole
}

fn merge_change(changes: &mut Vec<Change>, change: Change) {
    let channel_of = |change: &Change| match change {
        Change::Set(channel) | Change::Appended { channel, .. } => *channel,
    };
    match changes.iter_mut().find(|known| channel_of(known) == channel_of(&change)) {
        // A set swallows appends; an append after an append starts where the first one did.
        Some(known) => {
            if matches!(change, Change::Set(_)) {
                *known = change;
            }
        }
        None => changes.push(change),
    }
}

fn validate(spec: &Channel, update: &Value) -> Result<(), WriteError> {
    match (&spec.reducer, &spec.update_validator) {
        (_, Some(validator)) => check_schema(spec, validator, update),
        // A custom reducer may take updates of any shape; its result is checked.
        (Reducer::Custom(_) | Reducer::Merge | Reducer::Messages, None) => Ok(()),
        (_, None) => check_schema(spec, &spec.validator, update),
    }
}

fn check_schema(
    spec: &Channel,
    validator: &jsonschema::Validator,
    value: &Value,
) -> Result<(), WriteError> {
    validator.validate(value).map_err(|err| WriteError::Schema {
        channel: spec.name.clone(),
        path: err.instance_path().to_string(),
        reason: shorten(&err.to_string()),
    })
}

/// Cuts a message that may quote a large value.
pub(super) fn shorten(message: &str) -> String {
    const MOST: usize = 300;
    if message.len() <= MOST {
        return message.to_owned();
    }
    let mut end = MOST;
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    format!("{} ... ({} bytes)", &message[..end], message.len())
}

fn list(slot: &mut Option<Shared>) -> &mut Vec<Value> {
    let value = slot.get_or_insert_with(|| Shared::new(Value::Array(Vec::new()))).make_mut();
    if !value.is_array() {
        *value = Value::Array(Vec::new());
    }
    match value {
        Value::Array(items) => items,
        _ => unreachable!("made a list above"),
    }
}

fn reduce(
    spec: &Channel,
    channel: ChannelIndex,
    slot: &mut Option<Shared>,
    update: Value,
) -> Result<Change, WriteError> {
    let refuse = |reason: String| WriteError::Reduce { channel: spec.name.clone(), reason };
    match &spec.reducer {
        Reducer::Replace => *slot = Some(Shared::new(update)),
        Reducer::Append => return append(channel, slot, update).map_err(refuse),
        Reducer::Union => {
            let Value::Array(items) = update else {
                return Err(refuse(expects("a list", &update)));
            };
            let known = list(slot);
            let from = known.len();
            for item in items {
                if !known.contains(&item) {
                    known.push(item);
                }
            }
            check_len(known.len()).map_err(refuse)?;
            return Ok(Change::Appended { channel, from });
        }
        Reducer::Messages => return messages(channel, slot, update).map_err(refuse),
        Reducer::Merge => {
            let Value::Object(keys) = update else {
                return Err(refuse(expects("an object", &update)));
            };
            let value =
                slot.get_or_insert_with(|| Shared::new(Value::Object(Map::new()))).make_mut();
            match value {
                Value::Object(known) => known.extend(keys),
                other => *other = Value::Object(keys),
            }
        }
        Reducer::Sum => {
            let sum = match slot.as_ref() {
                Some(current) => add(current.json(), &update).map_err(refuse)?,
                None if update.is_number() => update,
                None => return Err(refuse(expects("a number", &update))),
            };
            *slot = Some(Shared::new(sum));
        }
        Reducer::Min | Reducer::Max => {
            let wanted = if matches!(spec.reducer, Reducer::Min) {
                Ordering::Less
            } else {
                Ordering::Greater
            };
            let keep = match slot.as_ref() {
                Some(current) => compare(&update, current.json()).map_err(refuse)? != wanted,
                None => false,
            };
            if !keep {
                *slot = Some(Shared::new(update));
            }
        }
        Reducer::Custom(expr) => {
            let current = slot.clone().unwrap_or_else(|| Shared::new(Value::Null));
            let vars = [("current", current), ("update", Shared::new(update))];
            let value = expr
                .eval(&Scope { state: &NoState, vars: &vars })
                .map_err(|err| refuse(format!("its reducer failed: {err}")))?;
            *slot = Some(Shared::new(value));
        }
    }
    Ok(Change::Set(channel))
}

/// A reducer's expression sees no state.
struct NoState;

impl StateView for NoState {
    fn get(&self, _channel: &str) -> Option<Shared> {
        None
    }
}

fn append(
    channel: ChannelIndex,
    slot: &mut Option<Shared>,
    update: Value,
) -> Result<Change, String> {
    let Value::Array(items) = update else {
        return Err(expects("a list of items to append", &update));
    };
    let known = list(slot);
    let from = known.len();
    check_len(from + items.len())?;
    known.extend(items);
    Ok(Change::Appended { channel, from })
}

fn check_len(len: usize) -> Result<(), String> {
    if len > MAX_ITEMS {
        Err(format!("it would hold {len} items; the limit is {MAX_ITEMS}"))
    } else {
        Ok(())
    }
}

/// Appends chat messages; one whose `id` is known replaces it, and `{"type": "remove", "id": ..}` removes it.
fn messages(
    channel: ChannelIndex,
    slot: &mut Option<Shared>,
    update: Value,
) -> Result<Change, String> {
    let items = match update {
        Value::Array(items) => items,
        one @ Value::Object(_) => vec![one],
        other => return Err(expects("a message or a list of messages", &other)),
    };
    let known = list(slot);
    let from = known.len();
    let mut appended_only = true;
    for item in items {
        if !item.is_object() {
            return Err(expects("a message to be an object", &item));
        }
        let id = item.get("id").filter(|id| !id.is_null()).cloned();
        let at = id
            .as_ref()
            .and_then(|id| known.iter().position(|message| message.get("id") == Some(id)));
        let remove = item.get("type").is_some_and(|kind| kind == "remove");
        match (at, remove) {
            (Some(at), true) => {
                known.remove(at);
                appended_only &= at >= from;
            }
            (None, true) => {
                return Err(format!(
                    "no message has the id {} that is to be removed",
                    id.unwrap_or(Value::Null)
                ));
            }
            (Some(at), false) => {
                known[at] = item;
                appended_only &= at >= from;
            }
            (None, false) => known.push(item),
        }
    }
    check_len(known.len())?;
    Ok(if appended_only { Change::Appended { channel, from } } else { Change::Set(channel) })
}

fn expects(what: &str, got: &Value) -> String {
    let kind = match got {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    format!("its reducer expects {what}, and the update is {kind}")
}

fn add(current: &Value, update: &Value) -> Result<Value, String> {
    if let (Some(left), Some(right)) = (current.as_i64(), update.as_i64()) {
        return left
            .checked_add(right)
            .map(Value::from)
            .ok_or_else(|| format!("{left} + {right} is more than a 64-bit integer holds"));
    }
    match (current.as_f64(), update.as_f64()) {
        (Some(left), Some(right)) => Number::from_f64(left + right)
            .map(Value::Number)
            .ok_or_else(|| format!("{left} + {right} is not a finite number")),
        _ => Err(expects("a number", if current.is_number() { update } else { current })),
    }
}

fn compare(left: &Value, right: &Value) -> Result<Ordering, String> {
    if let (Some(left), Some(right)) = (left.as_i64(), right.as_i64()) {
        return Ok(left.cmp(&right));
    }
    match (left, right) {
        (Value::Number(left), Value::Number(right)) => left
            .as_f64()
            .zip(right.as_f64())
            .and_then(|(left, right)| left.partial_cmp(&right))
            .ok_or_else(|| "numbers that cannot be compared".to_owned()),
        (Value::String(left), Value::String(right)) => Ok(left.cmp(right)),
        _ => Err("only two numbers or two texts can be compared".to_owned()),
    }
}
