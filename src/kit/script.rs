//! The answers of a case, checked against the graph, and which of them are used up.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::cases::{AnswerDef, CaseDef, ErrorDef, MAX_ANSWERS, ToolCallDef, UsageDef};
use crate::graph::check::Diagnostic;
use crate::graph::model::{Graph, NodeKind, ToolTarget};

/// What asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asker {
    Model,
    Tool,
    Job,
    Use,
    Person,
}

impl Asker {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Tool => "tool",
            Self::Job => "job",
            Self::Use => "use",
            Self::Person => "person",
        }
    }
}

/// What is answered.
#[derive(Debug, Clone)]
pub(super) enum Said {
    Model { content: Value, calls: Vec<ToolCallDef>, json: Option<Value>, usage: UsageDef },
    Tool { name: Option<String>, text: String, structured: Value, is_error: bool },
    Job { exit_code: i32, stdout: String, stderr: String },
    Use { output: Value, goto: Vec<String> },
    Answer(Value),
    Expired,
    Error(ErrorDef),
}

/// One answer of the script.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) asker: Asker,
    pub(super) said: Said,
    pub(super) item: Option<Value>,
    pub(super) asks: Option<Value>,
    pub(super) at: Option<Duration>,
    pub(super) times: u32,
}

/// All answers of a case.
#[derive(Debug)]
pub(super) struct Script {
    graph: Arc<Graph>,
    queues: BTreeMap<String, Vec<Entry>>,
}

/// Names an entry: its key, and its position.
pub(super) type EntryId = (String, usize);

/// What stands at a path of node names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Something that asks.
    Asks(Asker),
    /// An agent: its model and its tools ask.
    Agent,
    /// Something that needs no answer.
    Silent,
}

/// What `OUTER/INNER` leads to, with the node's own graph.
pub(super) fn place_of(graph: &Graph, path: &str) -> Option<Place> {
    let (first, rest) = path.split_once('/').map_or((path, None), |(a, b)| (a, Some(b)));
    let node = graph.node(graph.find_node(first)?);
    let is_agent = graph.file.nodes.get(first).is_some_and(|def| def.agent.is_some());
    match (&node.kind, rest) {
        (NodeKind::Graph { graph, .. }, Some(rest)) => place_of(graph, rest),
        (_, Some(_)) => None,
        (NodeKind::Graph { .. }, None) if is_agent => Some(Place::Agent),
        (NodeKind::Graph { .. } | NodeKind::Set | NodeKind::Wait(_), None) => Some(Place::Silent),
        (NodeKind::Model(_), None) => Some(Place::Asks(Asker::Model)),
        (NodeKind::Tool(_), None) => Some(Place::Asks(Asker::Tool)),
        (NodeKind::Job(_), None) => Some(Place::Asks(Asker::Job)),
        (NodeKind::Use { .. }, None) => Some(Place::Asks(Asker::Use)),
        (NodeKind::Interrupt(_), None) => Some(Place::Asks(Asker::Person)),
    }
}

/// The path of a node in a namespace: `OUTER/INNER`.
pub(super) fn path_of(namespace: &str, node: &str) -> String {
    let outer = namespace.split('|').filter(|part| !part.is_empty());
    let mut path: Vec<&str> =
        outer.map(|part| part.split_once(':').map_or(part, |(name, _)| name)).collect();
    path.push(node);
    path.join("/")
}

/// Whether some tool node of the graph, or of those that it calls, may call `SERVER/TOOL`.
pub(super) fn may_call(graph: &Graph, name: &str) -> bool {
    let called = std::iter::once(graph).chain(graph.nodes.iter().filter_map(|node| {
        if let NodeKind::Graph { graph, .. } = &node.kind { Some(graph.as_ref()) } else { None }
    }));
    let below = graph.subgraphs();
    called.chain(below.values().map(AsRef::as_ref)).flat_map(|graph| &graph.nodes).any(|node| {
        let NodeKind::Tool(tool) = &node.kind else { return false };
        match &tool.target {
            ToolTarget::Named { server, tool, .. } => name == format!("{server}/{tool}"),
            ToolTarget::Call(_) => tool.allow.iter().any(|pattern| names_tool(pattern, name)),
        }
    })
}

/// Whether a pattern (`SERVER/TOOL`, `SERVER/*`) names `SERVER/TOOL`.
pub(super) fn names_tool(pattern: &str, name: &str) -> bool {
    pattern == name
        || pattern
            .strip_suffix('*')
            .is_some_and(|server| server.ends_with('/') && name.starts_with(server))
}

impl Script {
    /// The script of a case; `at` leads to the case in its file.
    pub(super) fn read(
        graph: &Arc<Graph>,
        case: &CaseDef,
        at: &str,
        problems: &mut Vec<Diagnostic>,
    ) -> Self {
        let mut queues = BTreeMap::new();
        let mut total = 0_u32;
        for (key, answers) in case.answers.iter() {
            let place = place_of(graph, key).or_else(|| {
                (key.matches('/').count() == 1 && may_call(graph, key))
                    .then_some(Place::Asks(Asker::Tool))
            });
            let path = [at, "answers", key];
            let Some(place) = place.filter(|place| *place != Place::Silent) else {
                let problem = Diagnostic::error(
                    "unknown-node",
                    &path,
                    if place.is_some() {
                        format!("node `{key}` of graph `{}` needs no answer", graph.name)
                    } else {
                        format!("graph `{}` has no node and no tool `{key}`", graph.name)
                    },
                );
                let names = graph.nodes.iter().map(|node| node.name.as_str());
                problems.push(problem.on_key().suggest(key, names));
                continue;
            };
            let mut queue = Vec::with_capacity(answers.len());
            for (position, answer) in answers.iter().enumerate() {
                let position = position.to_string();
                let path = [at, "answers", key, &position];
                match entry(place, answer) {
                    Ok(entry) => {
                        total = total.saturating_add(entry.times);
                        queue.push(entry);
                    }
                    Err(why) => problems.push(Diagnostic::error("option", &path, why)),
                }
            }
            queues.insert(key.to_owned(), queue);
        }
        if total > MAX_ANSWERS {
            let message = format!("the case has {total} answers; the limit is {MAX_ANSWERS}");
            problems.push(Diagnostic::error("too-large", &[at, "answers"], message).on_key());
        }
        Self { graph: Arc::clone(graph), queues }
    }

    /// The node as reports name it: what is inside an agent goes by the agent's name.
    pub(super) fn reported(&self, path: &str) -> String {
        match path.rsplit_once('/') {
            Some((outer, _)) if place_of(&self.graph, outer) == Some(Place::Agent) => {
                outer.to_owned()
            }
            _ => path.to_owned(),
        }
    }

    /// The first entry that answers such a call and is not used up.
    pub(super) fn find(&self, call: &Call<'_>, used: &BTreeMap<EntryId, u32>) -> Option<EntryId> {
        let reported = self.reported(call.path);
        let mut keys = vec![call.path];
        if reported != call.path {
            keys.push(&reported);
        }
        keys.extend(call.target.filter(|_| call.asker == Asker::Tool));
        keys.into_iter().find_map(|key| {
            let queue = self.queues.get(key)?;
            (0..queue.len()).find_map(|at| {
                let entry = &queue[at];
                let id = (key.to_owned(), at);
                let left = used.get(&id).copied().unwrap_or(0) < entry.times;
                let fits = entry.item.as_ref().is_none_or(|item| call.item == Some(item));
                (left && fits && entry.asker == call.asker).then_some(id)
            })
        })
    }

    pub(super) fn entry(&self, id: &EntryId) -> Option<&Entry> {
        self.queues.get(&id.0)?.get(id.1)
    }

    /// What is left of the script.
    pub(super) fn unused(&self, used: &BTreeMap<EntryId, u32>) -> Vec<String> {
        let entries = self.queues.iter().flat_map(|(key, queue)| {
            queue.iter().enumerate().map(move |(at, entry)| ((key.clone(), at), entry))
        });
        entries
            .filter_map(|(id, entry)| {
                let given = used.get(&id).copied().unwrap_or(0);
                (given < entry.times).then(|| {
                    let what = entry.asker.as_str();
                    let often = match (entry.times, given) {
                        (1, _) => "was not used".to_owned(),
                        (times, given) => format!("was used {given} times of {times}"),
                    };
                    format!("the answer answers.{}[{}] ({what}) {often}", id.0, id.1)
                })
            })
            .collect()
    }
}

/// A call that wants an answer.
#[derive(Debug)]
pub(super) struct Call<'a> {
    /// The node's path.
    pub(super) path: &'a str,
    pub(super) asker: Asker,
    /// What is called.
    pub(super) target: Option<&'a str>,
    /// The item of a `for_each`.
    pub(super) item: Option<&'a Value>,
    /// What is asked.
    pub(super) request: &'a Value,
}

fn entry(place: Place, def: &AnswerDef) -> Result<Entry, String> {
    let keys = written(def);
    let common = ["item", "asks", "at", "times"];
    let (asker, said) = if keys.iter().any(|key| matches!(*key, "answer" | "expired")) {
        only(&keys, &["answer", "expired", "asks", "at", "times"], "a person")?;
        (Asker::Person, person(def)?)
    } else if place == Place::Agent {
        only(&keys, &["model", "tool", "item", "asks", "at", "times"], "an agent")?;
        match (&def.model, &def.tool) {
            (Some(model), None) => (Asker::Model, said(Asker::Model, model, &[])?),
            (None, Some(tool)) => (Asker::Tool, said(Asker::Tool, tool, &["name"])?),
            _ => return Err("an agent's answer is `model:`, `tool:` or `answer:`".to_owned()),
        }
    } else if let Place::Asks(asker) = place {
        (asker, said(asker, def, &common)?)
    } else {
        return Err("nothing asks here".to_owned());
    };
    let times = def.times.unwrap_or(1);
    if times == 0 || times > MAX_ANSWERS {
        return Err(format!("`times` is {times}, it must be 1 to {MAX_ANSWERS}"));
    }
    Ok(Entry {
        asker,
        said,
        item: def.item.clone(),
        asks: def.asks.clone(),
        at: def.at.map(|at| at.0),
        times,
    })
}

fn person(def: &AnswerDef) -> Result<Said, String> {
    match (&def.answer, def.expired) {
        (Some(answer), None) => Ok(Said::Answer(answer.clone())),
        (None, Some(true)) => Ok(Said::Expired),
        _ => Err("a person gives an `answer`, or it is `expired: true`".to_owned()),
    }
}

fn said(asker: Asker, def: &AnswerDef, more: &[&str]) -> Result<Said, String> {
    let own: &[&str] = match asker {
        Asker::Model => &["text", "message", "tool_calls", "json", "usage", "error"],
        Asker::Tool => &["text", "structured", "is_error", "error"],
        Asker::Job => &["exit_code", "stdout", "stderr", "error"],
        Asker::Use => &["output", "goto", "error"],
        Asker::Person => &["answer", "expired"],
    };
    let keys = written(def);
    let allowed: Vec<&str> = own.iter().chain(more).copied().collect();
    only(&keys, &allowed, asker.as_str())?;
    if !keys.iter().any(|key| own.contains(key)) {
        return Err(format!("nothing is answered; write one of {}", own.join(", ")));
    }
    if let Some(error) = &def.error {
        if keys.iter().any(|key| *key != "error" && own.contains(key)) {
            return Err("an answer is an `error` or a result, not both".to_owned());
        }
        return Ok(Said::Error(error.clone()));
    }
    Ok(match asker {
        Asker::Model => {
            let message = def.message.as_ref();
            if message.is_some() && (def.text.is_some() || def.tool_calls.is_some()) {
                return Err("`message` stands in place of `text` and `tool_calls`".to_owned());
            }
            let content = match (message, &def.text, &def.json) {
                (Some(message), ..) => message.content.clone(),
                (None, Some(text), _) => text.clone().into(),
                (None, None, Some(json)) => json.to_string().into(),
                (None, None, None) => "".into(),
            };
            let calls = message.map(|message| message.tool_calls.clone());
            let calls = calls.or_else(|| def.tool_calls.clone()).unwrap_or_default();
            let usage = def.usage.clone().unwrap_or_default();
            Said::Model { content, calls, json: def.json.clone(), usage }
        }
        Asker::Tool => {
            let structured = def.structured.clone().unwrap_or(Value::Null);
            let text = def.text.clone().unwrap_or_else(|| match &structured {
                Value::Null => String::new(),
                structured => structured.to_string(),
            });
            let (name, is_error) = (def.name.clone(), def.is_error.unwrap_or(false));
            Said::Tool { name, text, structured, is_error }
        }
        Asker::Job => Said::Job {
            exit_code: def.exit_code.unwrap_or(0),
            stdout: def.stdout.clone().unwrap_or_default(),
            stderr: def.stderr.clone().unwrap_or_default(),
        },
        Asker::Use => Said::Use {
            output: def.output.clone().unwrap_or(Value::Null),
            goto: def.goto.clone().unwrap_or_default(),
        },
        Asker::Person => person(def)?,
    })
}

fn only(keys: &[&str], allowed: &[&str], who: &str) -> Result<(), String> {
    match keys.iter().find(|key| !allowed.contains(key)) {
        Some(key) => Err(format!(
            "`{key}` does not go with an answer of {who}; there are {}",
            allowed.join(", ")
        )),
        None => Ok(()),
    }
}

/// The keys of an answer that are written.
fn written(def: &AnswerDef) -> Vec<&'static str> {
    let AnswerDef {
        text,
        message,
        tool_calls,
        json,
        usage,
        structured,
        is_error,
        name,
        exit_code,
        stdout,
        stderr,
        output,
        goto,
        answer,
        expired,
        error,
        model,
        tool,
        item,
        asks,
        at,
        times,
    } = def;
    let keys = [
        ("text", text.is_some()),
        ("message", message.is_some()),
        ("tool_calls", tool_calls.is_some()),
        ("json", json.is_some()),
        ("usage", usage.is_some()),
        ("structured", structured.is_some()),
        ("is_error", is_error.is_some()),
        ("name", name.is_some()),
        ("exit_code", exit_code.is_some()),
        ("stdout", stdout.is_some()),
        ("stderr", stderr.is_some()),
        ("output", output.is_some()),
        ("goto", goto.is_some()),
        ("answer", answer.is_some()),
        ("expired", expired.is_some()),
        ("error", error.is_some()),
        ("model", model.is_some()),
        ("tool", tool.is_some()),
        ("item", item.is_some()),
        ("asks", asks.is_some()),
        ("at", at.is_some()),
        ("times", times.is_some()),
    ];
    keys.into_iter().filter(|(_, written)| *written).map(|(key, _)| key).collect()
}
