//! The body of a request that creates a run, as clients send it.

use serde::{Deserialize, Deserializer};
use serde_json::Value;
use utoipa::ToSchema;

use super::error::ApiError;
use crate::ids::AssistantId;
use crate::services::api::{
    AssistantRef, Command, CreateRun, Durability, Goto, IfNotExists, MultitaskStrategy,
    NodeSelection, Object, OnCompletion, OnDisconnect, StreamMode,
};

/// A new run. Fields that are not listed are ignored.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct RunRequest {
    /// An assistant's id, or a graph's name.
    assistant_id: String,
    /// The graph's input.
    #[schema(value_type = Option<Object>)]
    input: Option<Value>,
    /// In place of an input.
    command: Option<CommandRequest>,
    /// Kept with the run.
    #[schema(value_type = Option<Object>)]
    metadata: Option<Object>,
    /// `tags`, `recursion_limit`, `configurable`.
    #[schema(value_type = Option<Object>)]
    config: Option<Object>,
    /// Constant values for the run.
    #[schema(value_type = Option<Object>)]
    context: Option<Value>,
    /// Starts from this checkpoint.
    checkpoint: Option<CheckpointRequest>,
    /// The same, by id alone.
    checkpoint_id: Option<String>,
    /// One mode or a list; default `values`.
    stream_mode: Option<OneOrMany>,
    /// Whether streams show subgraphs.
    stream_subgraphs: Option<bool>,
    /// Whether a stream can be taken up again from an event's id.
    stream_resumable: Option<bool>,
    /// When the thread is busy; default `enqueue`.
    multitask_strategy: Option<MultitaskStrategy>,
    /// When the thread does not exist; default `reject`.
    if_not_exists: Option<IfNotExists>,
    /// When the client goes away; default `continue`.
    on_disconnect: Option<OnDisconnect>,
    /// For a run without a thread; default `delete`.
    on_completion: Option<OnCompletion>,
    /// Starts no earlier than so many seconds from now.
    after_seconds: Option<u32>,
    /// Default `sync`.
    durability: Option<Durability>,
    /// Older clients' way to say `async` (true) or `exit` (false).
    checkpoint_during: Option<bool>,
    /// `*` or a list of nodes.
    interrupt_before: Option<OneOrMany>,
    /// `*` or a list of nodes.
    interrupt_after: Option<OneOrMany>,
    /// Larger goes first among the owner's runs; -100 to 100.
    priority: Option<i32>,
    /// An http or https URL that the end of the run is told to.
    webhook: Option<String>,
}

/// An order to a thread.
#[derive(Debug, Deserialize, ToSchema)]
struct CommandRequest {
    /// An object, or a list of `[channel, value]`.
    #[schema(value_type = Option<Object>)]
    update: Option<Value>,
    /// The answer to what waits; null is an answer too.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<Object>)]
    resume: Option<Value>,
    /// A node's name, `{node, input}`, or a list of these.
    #[schema(value_type = Option<Object>)]
    goto: Option<Value>,
}

/// A checkpoint by its name on the wire.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct CheckpointRequest {
    /// Its id.
    pub(super) checkpoint_id: Option<String>,
    /// Its namespace.
    #[serde(default)]
    pub(super) checkpoint_ns: String,
}

/// A word or a list of words.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub(super) enum OneOrMany {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl RunRequest {
    /// What the service is asked for.
    pub(super) fn into_create(self) -> Result<CreateRun, ApiError> {
        let command = self.command.map(CommandRequest::into_command).transpose()?.flatten();
        if self.input.is_some() && command.is_some() {
            let message = "`input` and `command` exclude each other: send one of them";
            return Err(ApiError::invalid_at("/command", message));
        }
        let priority = self.priority.unwrap_or(0);
        if !(-100..=100).contains(&priority) {
            return Err(ApiError::invalid_at("/priority", "`priority` must be -100 to 100"));
        }
        let during = self.checkpoint_during;
        let during = during.map(|during| if during { Durability::Async } else { Durability::Exit });
        let mut create = CreateRun::new(assistant(self.assistant_id)?, self.input);
        create.command = command;
        create.metadata = self.metadata.unwrap_or_default();
        create.config = self.config.unwrap_or_default();
        create.context = self.context.filter(|context| !context.is_null());
        create.checkpoint_id =
            self.checkpoint_id.or_else(|| self.checkpoint.and_then(|from| from.checkpoint_id));
        if let Some(modes) = self.stream_mode {
            create.stream_modes = stream_modes(modes.into_vec(), "/stream_mode")?;
        }
        create.stream_subgraphs = self.stream_subgraphs.unwrap_or(false);
        create.stream_resumable = self.stream_resumable.unwrap_or(false);
        create.multitask_strategy = self.multitask_strategy.unwrap_or(create.multitask_strategy);
        create.if_not_exists = self.if_not_exists.unwrap_or(create.if_not_exists);
        create.on_disconnect = self.on_disconnect.unwrap_or(create.on_disconnect);
        create.on_completion = self.on_completion.unwrap_or(create.on_completion);
        create.after_seconds = self.after_seconds;
        create.durability = self.durability.or(during).unwrap_or(create.durability);
        create.interrupt_before = selection(self.interrupt_before);
        create.interrupt_after = selection(self.interrupt_after);
        create.priority = priority;
        create.webhook = self.webhook.filter(|url| !url.is_empty());
        Ok(create)
    }
}

impl CommandRequest {
    /// `None` when nothing is ordered: some clients send an empty command along with every input.
    fn into_command(self) -> Result<Option<Command>, ApiError> {
        let command = Command {
            update: self.update.map(updates).transpose()?.flatten(),
            resume: self.resume,
            goto: self.goto.map(targets).transpose()?.unwrap_or_default(),
        };
        Ok((command != Command::default()).then_some(command))
    }
}

impl OneOrMany {
    /// The words.
    pub(super) fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(word) => vec![word],
            Self::Many(words) => words,
        }
    }
}

/// Reads stream modes; `path` is where they came from.
pub(super) fn stream_modes(words: Vec<String>, path: &str) -> Result<Vec<StreamMode>, ApiError> {
    let modes = words.into_iter().map(|word| {
        StreamMode::parse(&word).ok_or_else(|| {
            let known = StreamMode::ALL.iter().map(|mode| mode.as_str()).collect::<Vec<_>>();
            let message = format!("`{word}` is no stream mode; known are {}", known.join(", "));
            ApiError::invalid_at(path, message)
        })
    });
    modes.collect()
}

/// Reads an assistant's id or a graph's name.
fn assistant(text: String) -> Result<AssistantRef, ApiError> {
    if text.is_empty() {
        let message = "`assistant_id` must be an assistant's id or a graph's name";
        return Err(ApiError::invalid_at("/assistant_id", message));
    }
    Ok(text.parse::<AssistantId>().map_or(AssistantRef::Name(text), AssistantRef::Id))
}

fn selection(words: Option<OneOrMany>) -> NodeSelection {
    match words.map(OneOrMany::into_vec) {
        None => NodeSelection::None,
        Some(words) if words.is_empty() => NodeSelection::None,
        Some(words) if words == ["*"] => NodeSelection::All,
        Some(words) => NodeSelection::Named(words),
    }
}

fn updates(update: Value) -> Result<Option<Vec<(String, Value)>>, ApiError> {
    let wrong = || {
        let message = "`update` must be an object, or a list of [channel, value]";
        ApiError::invalid_at("/command/update", message)
    };
    match update {
        Value::Null => Ok(None),
        Value::Object(entries) => Ok(Some(entries.into_iter().collect())),
        Value::Array(pairs) => {
            let pairs = pairs.into_iter().map(|pair| match pair {
                Value::Array(pair) => match <[Value; 2]>::try_from(pair) {
                    Ok([Value::String(channel), value]) => Ok((channel, value)),
                    _ => Err(wrong()),
                },
                _ => Err(wrong()),
            });
            pairs.collect::<Result<_, _>>().map(Some)
        }
        _ => Err(wrong()),
    }
}

fn targets(goto: Value) -> Result<Vec<Goto>, ApiError> {
    let one = |target: Value| {
        let wrong = || {
            let message = "`goto` must be a node's name, {node, input}, or a list of these";
            ApiError::invalid_at("/command/goto", message)
        };
        match target {
            Value::String(node) => Ok(Goto { node, input: None }),
            Value::Object(mut send) => match send.remove("node") {
                Some(Value::String(node)) => Ok(Goto { node, input: send.remove("input") }),
                _ => Err(wrong()),
            },
            _ => Err(wrong()),
        }
    };
    match goto {
        Value::Null => Ok(Vec::new()),
        Value::Array(targets) => targets.into_iter().map(one).collect(),
        target => one(target).map(|target| vec![target]),
    }
}

/// Keeps a null that was sent apart from a field that was not.
fn present<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(from).map(Some)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(mut body: Value) -> Result<CreateRun, ApiError> {
        body["assistant_id"] = "graph".into();
        serde_json::from_value::<RunRequest>(body).unwrap().into_create()
    }

    fn check_refused(body: Value, path: &str) {
        let err = read(body).unwrap_err();
        assert_eq!(err.body(None).metadata.path.as_deref(), Some(path));
    }

    #[test]
    fn an_assistant_is_named_by_id_or_by_its_graph() {
        let id = AssistantId::new();
        assert_eq!(assistant(id.to_string()).unwrap(), AssistantRef::Id(id));
        assert_eq!(
            assistant("triage".to_owned()).unwrap(),
            AssistantRef::Name("triage".to_owned())
        );
        assert!(assistant(String::new()).is_err());
    }

    #[test]
    fn a_null_answer_is_an_answer_and_an_absent_one_is_none() {
        let resume = |body| read(body).unwrap().command.map(|command| command.resume);
        assert_eq!(resume(json!({"command": {"resume": null}})), Some(Some(Value::Null)));
        assert_eq!(resume(json!({"command": {"goto": "a"}})), Some(None));
        assert_eq!(resume(json!({"command": {}, "input": {}})), None);
    }

    #[test]
    fn targets_and_updates_come_in_all_their_forms() {
        let command = |body| read(json!({"command": body})).unwrap().command.unwrap();
        let two = command(json!({"goto": ["a", {"node": "b", "input": 1}]})).goto;
        assert_eq!(two[0], Goto { node: "a".to_owned(), input: None });
        assert_eq!(two[1], Goto { node: "b".to_owned(), input: Some(json!(1)) });
        let pair = vec![("x".to_owned(), json!(1))];
        assert_eq!(command(json!({"update": {"x": 1}})).update, Some(pair.clone()));
        assert_eq!(command(json!({"update": [["x", 1]]})).update, Some(pair));
    }

    #[test]
    fn what_is_wrong_is_named() {
        check_refused(json!({"input": {}, "command": {"resume": 1}}), "/command");
        check_refused(json!({"command": {"goto": 1}}), "/command/goto");
        check_refused(json!({"command": {"update": [["x"]]}}), "/command/update");
        check_refused(json!({"stream_mode": "all"}), "/stream_mode");
        check_refused(json!({"priority": 101}), "/priority");
    }

    #[test]
    fn older_clients_words_are_understood() {
        let durability = |body| read(body).unwrap().durability;
        assert_eq!(durability(json!({})), Durability::Sync);
        assert_eq!(durability(json!({"checkpoint_during": true})), Durability::Async);
        assert_eq!(durability(json!({"checkpoint_during": false})), Durability::Exit);
        let both = json!({"checkpoint_during": false, "durability": "sync"});
        assert_eq!(durability(both), Durability::Sync);
        assert_eq!(
            read(json!({"interrupt_before": "*"})).unwrap().interrupt_before,
            NodeSelection::All
        );
    }
}
