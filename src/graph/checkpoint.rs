//! How a state becomes checkpoint rows and comes back, and the trait that stores them.
//!
//! A row holds what its superstep changed and no more. Small values stand in the row; a large one is
//! stored once and the row refers to it. A collecting channel stores the new items only. Every 64th
//! row of a branch, and the first row of a fork, is also a *keyframe*: the whole state, by value or by
//! reference, so that loading reads at most 64 rows however long the thread is.
//!
//! A list's items are in the rows until a keyframe gathers them into a *segment* (a value of its own);
//! when the segments after the first weigh more than the first, one segment takes the place of all. So
//! each item is written a bounded number of times, and a step costs the same however long the list is.
//!
//! Keys of a row's JSON: `name` a value; `@name` a value stored apart; `+name` appended items; `*name`
//! appended items that went into a segment at this row; `&3` the arrivals of the third join; `!name`
//! the error that handler `name` handles next. Channel names cannot begin with these signs.
//!
//! **Invariant:** decoding never panics on stored bytes; what cannot be read is a [`DecodeError`].

use std::collections::{BTreeSet, HashMap};

use futures::future::BoxFuture;
use serde_json::{Map, Value, json};

use super::channel::{Change, State};
use super::model::{ChannelIndex, Effect, Graph, NodeIndex};
use super::step::Position;
use crate::ids::TaskId;

/// Every so many checkpoints of a branch there is a keyframe.
pub const KEYFRAME_EVERY: i64 = 64;
/// A value of more bytes of JSON is stored apart from its row.
pub const INLINE_BYTES: usize = 1024;

/// What a checkpoint was made by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A run's input.
    Input,
    /// A superstep.
    Loop,
    /// A client's update of the state.
    Update,
    /// A run that starts from an earlier checkpoint.
    Fork,
}

impl Source {
    /// As stored.
    #[must_use]
    pub fn code(self) -> i16 {
        match self {
            Self::Input => 0,
            Self::Loop => 1,
            Self::Update => 2,
            Self::Fork => 3,
        }
    }

    /// From what is stored; an unknown code reads as a superstep.
    #[must_use]
    pub fn from_code(code: i16) -> Self {
        match code {
            0 => Self::Input,
            2 => Self::Update,
            3 => Self::Fork,
            _ => Self::Loop,
        }
    }

    /// As clients see it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Input => "input",
            Self::Loop => "loop",
            Self::Update => "update",
            Self::Fork => "fork",
        }
    }
}

/// A row of `checkpoints`, as written.
#[derive(Debug, Clone)]
pub struct CheckpointRow {
    /// Where it stands.
    pub position: Position,
    /// The row that it extends, when that is not the one before on the same branch.
    pub parent: Option<Position>,
    /// What made it.
    pub source: Source,
    /// The nodes that run next.
    pub next: String,
    /// What changed.
    pub changed: Vec<u8>,
    /// The whole state, in a keyframe.
    pub keyframe: Option<Vec<u8>>,
    /// Values stored apart: channel name and JSON.
    pub values: Vec<(String, Vec<u8>)>,
}

/// A row of `checkpoints`, as read.
#[derive(Debug, Clone)]
pub struct StoredRow {
    /// Where it stands.
    pub position: Position,
    /// See [`CheckpointRow::next`].
    pub next: String,
    /// See [`CheckpointRow::changed`].
    pub changed: Vec<u8>,
    /// See [`CheckpointRow::keyframe`].
    pub keyframe: Option<Vec<u8>>,
}

/// Names a value that is stored apart.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ValueRef {
    /// The channel's name.
    pub channel: String,
    /// The checkpoint that wrote it.
    pub at: Position,
}

/// Where a channel's value is stored: what the next keyframe has to say about it.
#[derive(Debug, Clone, Default, PartialEq)]
enum Home {
    /// In the rows.
    #[default]
    Rows,
    /// Apart, whole.
    Apart(Position),
    /// A list: segments apart, and from `covered` on in the rows.
    Segments { list: Vec<Segment>, covered: usize },
}

#[derive(Debug, Clone, PartialEq)]
struct Segment {
    at: Position,
    items: usize,
    bytes: usize,
}

/// Where the values of a state are stored.
#[derive(Debug, Clone, Default)]
pub struct Homes(Vec<Home>);

/// Stored bytes that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Not JSON, or not of the form that this version writes.
    #[error("checkpoint {position:?}: {reason}")]
    Form {
        /// Which checkpoint.
        position: Position,
        /// What is wrong.
        reason: String,
    },
    /// A value that a row refers to is gone.
    #[error("the value of channel `{channel}` stored by checkpoint {at:?} is missing")]
    Missing {
        /// The channel.
        channel: String,
        /// Where it should be.
        at: Position,
    },
    /// A checkpoint names a node that the graph does not have: it was made by another graph.
    #[error("the checkpoint's next node `{node}` is not in graph `{graph}`")]
    UnknownNode {
        /// The node.
        node: String,
        /// The graph.
        graph: String,
    },
}

impl Homes {
    /// For a state that nothing is stored of.
    #[must_use]
    pub fn initial(graph: &Graph) -> Self {
        Self(vec![Home::Rows; graph.channels.len()])
    }

    fn at(&mut self, channel: ChannelIndex) -> &mut Home {
        &mut self.0[channel.0 as usize]
    }
}

/// Makes the row of the checkpoint at `position`, and brings `homes` up to date.
///
/// With `keyframe`, the row also holds the whole state: for the first row of a fork, or of a thread that
/// goes on with another graph. Every [`KEYFRAME_EVERY`]th row does so anyway.
#[must_use]
#[expect(clippy::too_many_arguments, reason = "each is one fact of the row, and all are needed")]
pub fn encode(
    graph: &Graph,
    state: &State,
    homes: &mut Homes,
    position: Position,
    source: Source,
    changes: &[Change],
    joins_changed: bool,
    next: &[NodeIndex],
    keyframe: bool,
) -> CheckpointRow {
    let mut changed = Map::new();
    let mut values = Vec::new();
    for change in changes {
        encode_change(graph, state, homes, position, *change, &mut changed, &mut values);
    }
    if joins_changed {
        encode_joins(graph, state, &mut changed, false);
    }
    encode_errors(graph, state, &mut changed);
    let keyframe = (keyframe || position.seq % KEYFRAME_EVERY == 0).then(|| {
        let whole = encode_keyframe(graph, state, homes, position, &mut values);
        to_bytes(&Value::Object(whole))
    });
    CheckpointRow {
        position,
        parent: None,
        source,
        next: encode_next(graph, next),
        changed: to_bytes(&Value::Object(changed)),
        keyframe,
        values,
    }
}

/// The names of the next nodes as a row holds them.
#[must_use]
pub fn encode_next(graph: &Graph, next: &[NodeIndex]) -> String {
    let names: Vec<&str> = next.iter().map(|index| graph.node(*index).name.as_str()).collect();
    names.join(",")
}

/// The next nodes of a row.
///
/// # Errors
/// A name that the graph does not have.
pub fn decode_next(graph: &Graph, next: &str) -> Result<Vec<NodeIndex>, DecodeError> {
    next.split(',')
        .filter(|name| !name.is_empty())
        .map(|name| {
            graph.find_node(name).ok_or_else(|| DecodeError::UnknownNode {
                node: name.to_owned(),
                graph: graph.name.clone(),
            })
        })
        .collect()
}

fn to_bytes(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

fn encode_change(
    graph: &Graph,
    state: &State,
    homes: &mut Homes,
    position: Position,
    change: Change,
    changed: &mut Map<String, Value>,
    values: &mut Vec<(String, Vec<u8>)>,
) {
    match change {
        Change::Set(channel) => {
            let Some(value) = state.get(channel) else { return };
            let name = &graph.channel(channel).name;
            // A value that fits is written into the row as it is; its text is made once more with the row.
            if fits_inline(value.json()) {
                changed.insert(name.clone(), value.json().clone());
                *homes.at(channel) = Home::Rows;
            } else {
                let bytes = to_bytes(value.json());
                *homes.at(channel) = match value.json().as_array() {
                    Some(items) if is_list(graph, channel) => Home::Segments {
                        list: vec![Segment {
                            at: position,
                            items: items.len(),
                            bytes: bytes.len(),
                        }],
                        covered: items.len(),
                    },
                    _ => Home::Apart(position),
                };
                values.push((name.clone(), bytes));
                changed.insert(format!("@{name}"), Value::Null);
            }
        }
        Change::Appended { channel, from } => {
            let Some(items) = state.get(channel).and_then(|value| value.json().as_array()) else {
                return;
            };
            let name = &graph.channel(channel).name;
            let new = Value::Array(items[from..].to_vec());
            if fits_inline(&new) {
                changed.insert(format!("+{name}"), new);
            } else {
                cut_segment(name, items, homes.at(channel), position, false, values);
                changed.insert(format!("*{name}"), Value::Null);
            }
        }
    }
}

fn is_list(graph: &Graph, channel: ChannelIndex) -> bool {
    use super::model::Reducer;
    matches!(graph.channel(channel).reducer, Reducer::Append | Reducer::Union | Reducer::Messages)
}

/// Whether the value's JSON surely has at most [`INLINE_BYTES`] bytes; reads no more of it than needed.
fn fits_inline(value: &Value) -> bool {
    fn rest(value: &Value, left: usize) -> Option<usize> {
        match value {
            Value::Null | Value::Bool(_) => left.checked_sub(5),
            Value::Number(_) => left.checked_sub(20),
            Value::String(text) => left.checked_sub(text.len() + 2),
            Value::Array(items) => {
                items.iter().try_fold(left.checked_sub(2)?, |left, item| rest(item, left))
            }
            Value::Object(keys) => {
                keys.iter().try_fold(left.checked_sub(2)?, |left, (key, item)| {
                    rest(item, left.checked_sub(key.len() + 4)?)
                })
            }
        }
    }
    rest(value, INLINE_BYTES).is_some()
}

/// Stores the items that no segment covers yet as a new one; with `merge`, all of them when the later
/// segments have come to weigh more than the first.
fn cut_segment(
    name: &str,
    items: &[Value],
    home: &mut Home,
    position: Position,
    merge: bool,
    values: &mut Vec<(String, Vec<u8>)>,
) {
    let (mut list, covered) = match std::mem::take(home) {
        Home::Segments { list, covered } => (list, covered.min(items.len())),
        Home::Rows | Home::Apart(_) => (Vec::new(), 0),
    };
    if covered == items.len() && !list.is_empty() {
        *home = Home::Segments { list, covered };
        return;
    }
    let tail = items_json(&items[covered..]);
    let later: usize = list.iter().skip(1).map(|segment| segment.bytes).sum::<usize>() + tail.len();
    if list.first().is_some_and(|first| !merge || later <= first.bytes) {
        list.push(Segment { at: position, items: items.len() - covered, bytes: tail.len() });
        values.push((name.to_owned(), tail));
    } else {
        let whole = if covered == 0 { tail } else { items_json(items) };
        list = vec![Segment { at: position, items: items.len(), bytes: whole.len() }];
        values.push((name.to_owned(), whole));
    }
    *home = Home::Segments { list, covered: items.len() };
}

fn items_json(items: &[Value]) -> Vec<u8> {
    serde_json::to_vec(items).expect("JSON values always have a JSON text")
}

fn encode_joins(graph: &Graph, state: &State, out: &mut Map<String, Value>, non_empty_only: bool) {
    for (at, arrived) in state.arrived.iter().enumerate() {
        if non_empty_only && arrived.is_empty() {
            continue;
        }
        let names: Vec<&str> =
            arrived.iter().map(|index| graph.node(*index).name.as_str()).collect();
        out.insert(format!("&{at}"), json!(names));
    }
}

fn encode_errors(graph: &Graph, state: &State, out: &mut Map<String, Value>) {
    for (handler, error) in &state.errors {
        out.insert(format!("!{}", graph.node(*handler).name), error.clone());
    }
}

fn encode_keyframe(
    graph: &Graph,
    state: &State,
    homes: &mut Homes,
    position: Position,
    values: &mut Vec<(String, Vec<u8>)>,
) -> Map<String, Value> {
    let mut whole = Map::new();
    for (at, channel) in (0_u32..).zip(&graph.channels) {
        let index = ChannelIndex(at);
        let Some(value) = state.get(index) else { continue };
        let name = &channel.name;
        if !is_list(graph, index) || fits_inline(value.json()) {
            match homes.at(index) {
                Home::Apart(at) => whole.insert(format!("@{name}"), json!([at.branch, at.seq])),
                Home::Rows | Home::Segments { .. } => {
                    *homes.at(index) = Home::Rows;
                    whole.insert(name.clone(), value.json().clone())
                }
            };
            continue;
        }
        let Some(items) = value.json().as_array() else { continue };
        // This row may have stored the channel already, whole or as a segment: one value a row and channel.
        let stored_here = values.iter().any(|(channel, _)| channel == name);
        if !stored_here {
            cut_segment(name, items, homes.at(index), position, true, values);
        }
        if let Home::Segments { list, .. } = homes.at(index) {
            let refs: Vec<Value> = list.iter().map(|s| json!([s.at.branch, s.at.seq])).collect();
            whole.insert(format!("+{name}"), Value::Array(refs));
        }
    }
    encode_joins(graph, state, &mut whole, true);
    encode_errors(graph, state, &mut whole);
    whole
}

/// A state put together from rows, as far as it goes without the values that are stored apart.
#[derive(Debug)]
pub struct Decoder<'a> {
    graph: &'a Graph,
    state: State,
    homes: Homes,
    /// Values to fetch, and what to do with each, in order.
    steps: Vec<Step>,
}

#[derive(Debug)]
enum Step {
    Set(ChannelIndex, Value),
    Extend(ChannelIndex, Vec<Value>),
    SetFrom(ChannelIndex, Position),
    /// The segment holds the items from `covered` on, some of which the rows held before.
    SegmentFrom(ChannelIndex, Position),
}

impl<'a> Decoder<'a> {
    /// Starts with the state before any checkpoint.
    #[must_use]
    pub fn new(graph: &'a Graph) -> Self {
        Self {
            graph,
            state: State::initial(graph),
            homes: Homes::initial(graph),
            steps: Vec::new(),
        }
    }

    /// Reads rows in the order of `seq`; a keyframe makes those before it needless.
    ///
    /// # Errors
    /// Bytes that are not of this version's form.
    pub fn read(mut self, rows: &[StoredRow]) -> Result<Self, DecodeError> {
        let start = rows.iter().rposition(|row| row.keyframe.is_some()).unwrap_or(0);
        for row in &rows[start..] {
            let keyframe = row.keyframe.as_ref();
            let whole = keyframe.is_some();
            if whole {
                self = Self::new(self.graph);
                // A keyframe holds every value that there is: a default that was removed stays removed.
                for at in 0..self.graph.channels.len() {
                    self.state.put(ChannelIndex(u32::try_from(at).unwrap_or(u32::MAX)), None);
                }
            }
            let bytes = keyframe.unwrap_or(&row.changed);
            let fail = |reason: String| DecodeError::Form { position: row.position, reason };
            let Ok(Value::Object(keys)) = serde_json::from_slice(bytes) else {
                return Err(fail("not a JSON object".to_owned()));
            };
            self.state.errors.clear();
            for (key, value) in keys {
                self.read_key(row.position, whole, &key, value).map_err(fail)?;
            }
        }
        Ok(self)
    }

    fn read_key(
        &mut self,
        here: Position,
        whole: bool,
        key: &str,
        value: Value,
    ) -> Result<(), String> {
        let (sign, name) = match key.as_bytes().first() {
            Some(sign @ (b'@' | b'+' | b'*' | b'&' | b'!')) => (*sign, &key[1..]),
            _ => (b' ', key),
        };
        match sign {
            b'&' => return self.read_join(name, &value),
            b'!' => {
                if let Some(handler) = self.graph.find_node(name) {
                    self.state.errors.push((handler, value));
                }
                return Ok(());
            }
            _ => {}
        }
        // A channel that the graph no longer has is not an error: a thread may go on with another graph.
        let Some(channel) = self.graph.find_channel(name) else { return Ok(()) };
        match (sign, whole) {
            (b'@', true) => {
                let at = position_of(&value)?;
                *self.homes.at(channel) = Home::Apart(at);
                self.steps.push(Step::SetFrom(channel, at));
            }
            (b'@', false) => {
                // A list's home follows from its segments, in `finish`.
                *self.homes.at(channel) =
                    if is_list(self.graph, channel) { Home::Rows } else { Home::Apart(here) };
                self.steps.retain(|step| step.channel() != channel);
                self.steps.push(Step::SetFrom(channel, here));
            }
            (b'+', true) => self.read_segments(channel, &value)?,
            (b'+', false) => {
                let Value::Array(items) = value else {
                    return Err(format!("`{key}` is not a list"));
                };
                self.steps.push(Step::Extend(channel, items));
            }
            (b'*', _) => self.steps.push(Step::SegmentFrom(channel, here)),
            _ => {
                *self.homes.at(channel) = Home::Rows;
                self.steps.retain(|step| step.channel() != channel);
                self.steps.push(Step::Set(channel, value));
            }
        }
        Ok(())
    }

    fn read_join(&mut self, at: &str, names: &Value) -> Result<(), String> {
        let at: usize = at.parse().map_err(|_| "a join without a number".to_owned())?;
        let Some(arrived) = self.state.arrived.get_mut(at) else { return Ok(()) };
        let names = names.as_array().ok_or("a join's arrivals are not a list")?;
        *arrived = names
            .iter()
            .filter_map(|name| self.graph.find_node(name.as_str()?))
            .collect::<BTreeSet<NodeIndex>>();
        Ok(())
    }

    fn read_segments(&mut self, channel: ChannelIndex, value: &Value) -> Result<(), String> {
        let refs = value.as_array().ok_or("segments are not a list")?;
        for segment in refs {
            self.steps.push(Step::SegmentFrom(channel, position_of(segment)?));
        }
        Ok(())
    }

    /// The values that must be fetched before [`Decoder::finish`].
    #[must_use]
    pub fn refs(&self) -> Vec<ValueRef> {
        self.steps
            .iter()
            .filter_map(|step| match step {
                Step::SetFrom(channel, at) | Step::SegmentFrom(channel, at) => {
                    Some(ValueRef { channel: self.graph.channel(*channel).name.clone(), at: *at })
                }
                Step::Set(..) | Step::Extend(..) => None,
            })
            .collect()
    }

    /// Puts the fetched values in their places.
    ///
    /// # Errors
    /// A value that was not fetched, or that is not JSON.
    pub fn finish(
        mut self,
        mut fetched: HashMap<ValueRef, Vec<u8>>,
    ) -> Result<(State, Homes), DecodeError> {
        // How many items of each list are in segments so far, and those segments.
        let mut segments: HashMap<ChannelIndex, (Vec<Segment>, usize)> = HashMap::new();
        for step in std::mem::take(&mut self.steps) {
            match step {
                Step::Set(channel, value) => {
                    segments.remove(&channel);
                    self.state.put(channel, Some(value));
                }
                Step::Extend(channel, items) => self.state.extend(channel, items),
                Step::SetFrom(channel, at) => {
                    let (value, bytes) = self.fetch(&mut fetched, channel, at)?;
                    if let (true, Some(items)) = (is_list(self.graph, channel), value.as_array()) {
                        let whole = Segment { at, items: items.len(), bytes };
                        segments.insert(channel, (vec![whole], items.len()));
                    }
                    self.state.put(channel, Some(value));
                }
                Step::SegmentFrom(channel, at) => {
                    let (value, bytes) = self.fetch(&mut fetched, channel, at)?;
                    let Value::Array(items) = value else {
                        return Err(DecodeError::Form {
                            position: at,
                            reason: "a segment is not a list".to_owned(),
                        });
                    };
                    let (list, covered) = segments.entry(channel).or_default();
                    // The rows since the last segment held these items too.
                    self.state.truncate(channel, *covered);
                    *covered += items.len();
                    list.push(Segment { at, items: items.len(), bytes });
                    self.state.extend(channel, items);
                }
            }
        }
        for (channel, (list, covered)) in segments {
            *self.homes.at(channel) = Home::Segments { list, covered };
        }
        Ok((self.state, self.homes))
    }

    fn fetch(
        &self,
        fetched: &mut HashMap<ValueRef, Vec<u8>>,
        channel: ChannelIndex,
        at: Position,
    ) -> Result<(Value, usize), DecodeError> {
        let name = &self.graph.channel(channel).name;
        let key = ValueRef { channel: name.clone(), at };
        let bytes = fetched
            .remove(&key)
            .ok_or_else(|| DecodeError::Missing { channel: name.clone(), at })?;
        let value = serde_json::from_slice(&bytes).map_err(|err| DecodeError::Form {
            position: at,
            reason: format!("channel `{name}`: {err}"),
        })?;
        Ok((value, bytes.len()))
    }
}

impl Step {
    fn channel(&self) -> ChannelIndex {
        match self {
            Self::Set(channel, _)
            | Self::Extend(channel, _)
            | Self::SetFrom(channel, _)
            | Self::SegmentFrom(channel, _) => *channel,
        }
    }
}

fn position_of(value: &Value) -> Result<Position, String> {
    let branch = value.get(0).and_then(Value::as_i64).and_then(|n| i32::try_from(n).ok());
    let seq = value.get(1).and_then(Value::as_i64);
    match (branch, seq) {
        (Some(branch), Some(seq)) => Ok(Position { branch, seq }),
        _ => Err("a reference without branch and seq".to_owned()),
    }
}

/// A value that settles an activation, or what it waits for, as stored beside a checkpoint.
#[derive(Debug, Clone, Default)]
pub struct Restored {
    /// The final result of the activation, when it finished: see [`super::exec`].
    pub writes: Option<Vec<u8>>,
    /// What it waits for, or how often it was tried.
    pub wait: Option<StoredWait>,
}

/// A row of `pending`, as read.
#[derive(Debug, Clone)]
pub struct StoredWait {
    /// What is waited for.
    pub kind: WaitKind,
    /// Which attempt this is; the first is 1.
    pub attempt: u32,
    /// Whether it was settled: an answer came, or the activation finished.
    pub settled: bool,
    /// Whether its due time has passed, by the database's clock.
    pub expired: bool,
    /// JSON of the wait: the interrupts, the job's id, the last failure.
    pub data: Option<Vec<u8>>,
    /// JSON of what settled it; for a question, the list of all answers so far.
    pub answer: Option<Vec<u8>>,
    /// See [`WaitRow::round`].
    pub round: i32,
}

/// What an activation waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WaitKind {
    /// Nothing yet: an attempt began.
    Attempt,
    /// The pause before the next attempt.
    Retry,
    /// A job's result.
    Job,
    /// A time.
    Timer,
    /// A named event.
    Event,
    /// A person.
    Interrupt,
}

impl WaitKind {
    /// As stored.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Attempt => "attempt",
            Self::Retry => "retry",
            Self::Job => "job",
            Self::Timer => "timer",
            Self::Event => "event",
            Self::Interrupt => "interrupt",
        }
    }

    /// From what is stored.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Attempt, Self::Retry, Self::Job, Self::Timer, Self::Event, Self::Interrupt]
            .into_iter()
            .find(|kind| kind.as_str() == text)
    }
}

/// When a wait is over by itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Due {
    /// So long after the commit that stores it, by the database's clock.
    After(std::time::Duration),
    /// At an instant.
    At(chrono::DateTime<chrono::Utc>),
}

/// A row of `pending`, as written.
#[derive(Debug, Clone)]
pub struct WaitRow {
    /// Whose wait it is.
    pub task: TaskId,
    /// The node's name.
    pub node: String,
    /// What is waited for.
    pub kind: WaitKind,
    /// Which attempt this is.
    pub attempt: u32,
    /// When it is over by itself.
    pub due: Option<Due>,
    /// The event's name.
    pub name: Option<String>,
    /// See [`StoredWait::data`].
    pub data: Option<Vec<u8>>,
    /// JSON of the answers that the activation has got before.
    pub answer: Option<Vec<u8>>,
    /// Grows with each row of the activation. A row takes the place of one with a smaller round only, so
    /// that a commit that is repeated cannot undo what has settled the wait meanwhile.
    pub round: i32,
}

/// What a stream shows beside the checkpoints.
#[derive(Debug, Clone)]
pub struct StreamRow {
    /// The superstep's checkpoint, made or to be made.
    pub seq: i64,
    /// Order within it.
    pub place: i32,
    /// `updates`, `tasks`, `custom`.
    pub mode: &'static str,
    /// Where it happened.
    pub namespace: String,
    /// JSON.
    pub data: Vec<u8>,
}

/// What is stored of an attempt's effect on the world. See [`super::exec::Intent`].
#[derive(Debug, Clone)]
pub struct EffectRow {
    /// Whose attempt it is.
    pub task: TaskId,
    /// Which attempt; with the task it makes the idempotency key.
    pub attempt: u32,
    /// What is told.
    pub change: EffectChange,
}

/// One of the two things that are told of an effect.
#[derive(Debug, Clone)]
pub enum EffectChange {
    /// It is about to be sent, or to be sent again.
    Intent {
        /// What names the attempt to the other side.
        key: String,
        /// The node's name.
        node: String,
        /// `tool`, `model`, `use`.
        kind: &'static str,
        /// What is called.
        target: String,
        /// What repeating it would do.
        effect: Effect,
        /// SHA-256 of the whole request's JSON.
        request_hash: [u8; 32],
        /// JSON of the request; of a long one, a text with its beginning.
        request: Vec<u8>,
    },
    /// What came of it.
    Outcome {
        /// In a word.
        status: EffectStatus,
        /// JSON: the output, or the failure's kind and message; of a long one, a text with its beginning.
        outcome: Vec<u8>,
    },
}

/// What is known of an effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EffectStatus {
    /// It is under way, or its process died: nothing is known.
    Intent,
    /// It happened.
    Done,
    /// It failed; another attempt is another effect.
    Failed,
    /// It was not sent.
    NotSent,
    /// It was sent, and nothing tells whether it happened.
    Unknown,
    /// Its node waits for something before it goes on.
    Waiting,
}

impl EffectStatus {
    /// As stored and shown.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Intent => "intent",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::NotSent => "not_sent",
            Self::Unknown => "unknown",
            Self::Waiting => "waiting",
        }
    }
}

/// Everything that one commit of a run writes, in one namespace.
#[derive(Debug, Clone)]
pub struct Commit {
    /// Which namespace; empty is the root.
    pub namespace: String,
    /// The checkpoint that planned the superstep: `writes` and `waits` belong to it.
    pub planned: Position,
    /// The next checkpoint, when the superstep is complete.
    pub checkpoint: Option<CheckpointRow>,
    /// Results of activations of a superstep that is not complete.
    pub writes: Vec<(TaskId, Vec<u8>)>,
    /// What activations wait for.
    pub waits: Vec<WaitRow>,
    /// Whether waits of the superstep were stored, which the checkpoint settles.
    pub settles: bool,
    /// Rows for streams.
    pub stream: Vec<StreamRow>,
    /// What activations do to the world; at most one row for each attempt.
    pub effects: Vec<EffectRow>,
    /// How the run ends with this checkpoint, the root's last.
    pub end: Option<RunEnd>,
}

/// What a run that has nothing left to do came to, as JSON.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunEnd {
    /// Its state.
    pub values: Vec<u8>,
    /// What it gives back.
    pub result: Vec<u8>,
}

/// A namespace as stored: its last rows and what its superstep already has.
#[derive(Debug)]
pub struct LoadedRows {
    /// Rows from the last keyframe to the latest, in the order of `seq`.
    pub rows: Vec<StoredRow>,
    /// By activation.
    pub tasks: HashMap<TaskId, Restored>,
}

/// Why nothing was stored.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Another grant has authority over the run: this process must forget it.
    #[error("the run is no longer this process's: its fence has grown")]
    Fenced,
    /// The store failed, and whether it wrote is settled: it did not.
    #[error("the checkpoint could not be stored")]
    Storage(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Stores the checkpoints of one run, under its fence. Every implementation passes one conformance suite.
pub trait Checkpointer: Send + Sync {
    /// The latest of a namespace on the run's branch, or `None` when it has no checkpoint.
    fn load<'a>(
        &'a self,
        namespace: &'a str,
    ) -> BoxFuture<'a, Result<Option<LoadedRows>, CheckpointError>>;

    /// Values that are stored apart.
    fn fetch<'a>(
        &'a self,
        namespace: &'a str,
        refs: Vec<ValueRef>,
    ) -> BoxFuture<'a, Result<HashMap<ValueRef, Vec<u8>>, CheckpointError>>;

    /// Writes everything of `commit` or nothing. Doing the same again is harmless.
    fn commit(&self, commit: Commit) -> BoxFuture<'_, Result<(), CheckpointError>>;
}

#[cfg(test)]
#[path = "checkpoint_tests.rs"]
mod tests;
