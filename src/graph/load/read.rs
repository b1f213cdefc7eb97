//! From the tree of a file to its definition, part by part.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::graph::check::Diagnostic;
use crate::graph::definition::{ChannelDef, GraphFile, Ordered};

const KEYS: [&str; 8] =
    ["name", "description", "state", "input", "output", "limits", "nodes", "edges"];

/// What could be read of a file.
#[derive(Debug)]
pub(super) struct Read {
    /// The definition, with a stand-in for each part that could not be read.
    pub(super) file: GraphFile,
    /// Where the stand-ins are: what is wrong there was told already.
    pub(super) broken: Vec<Vec<String>>,
}

/// The definition, unless too little can be read to say more; what is wrong is added to `problems`.
pub(super) fn graph_file(root: Value, problems: &mut Vec<Diagnostic>) -> Option<Read> {
    let Value::Object(mut map) = root else {
        let message = "a graph file is a map with `name`, `nodes` and `edges`";
        problems.push(Diagnostic::error("wrong-type", &[], message));
        return None;
    };
    for key in map.keys().filter(|key| !KEYS.contains(&key.as_str())) {
        let message = format!("a graph has no key `{key}`");
        let problem = Diagnostic::error("unknown-key", &[key], message).on_key();
        problems.push(problem.suggest(key, KEYS));
    }
    let mut reader = Reader { problems, broken: Vec::new() };
    let name = reader.required::<String>(&mut map, "name");
    let description = reader.optional(&mut map, "description");
    let state = reader.channels(&mut map);
    let input = reader.optional(&mut map, "input");
    let output = reader.optional(&mut map, "output");
    let limits = reader.optional(&mut map, "limits");
    let nodes = reader.nodes(&mut map);
    let edges = reader.edges(&mut map);
    let broken = reader.broken;
    let file = GraphFile {
        name: name?,
        description,
        state,
        input,
        output,
        limits,
        nodes: nodes?,
        edges: edges?,
    };
    Some(Read { file, broken })
}

/// Reads one part of a file; `path` leads to it.
pub(crate) fn read_value<T: DeserializeOwned>(
    path: &[&str],
    value: Value,
) -> Result<T, Box<Diagnostic>> {
    serde_path_to_error::deserialize(value).map_err(|err| {
        let inner: Vec<String> = err
            .path()
            .iter()
            .filter_map(|segment| match segment {
                serde_path_to_error::Segment::Seq { index } => Some(index.to_string()),
                serde_path_to_error::Segment::Map { key } => Some(key.clone()),
                _ => None,
            })
            .collect();
        let mut path = path.to_vec();
        path.extend(inner.iter().map(String::as_str));
        Box::new(explain(&path, &err.inner().to_string()))
    })
}

struct Reader<'a> {
    problems: &'a mut Vec<Diagnostic>,
    broken: Vec<Vec<String>>,
}

impl Reader<'_> {
    fn value<T: DeserializeOwned>(&mut self, path: &[&str], value: Value) -> Option<T> {
        read_value(path, value).map_err(|problem| self.problems.push(*problem)).ok()
    }

    fn optional<T: DeserializeOwned>(
        &mut self,
        map: &mut Map<String, Value>,
        key: &str,
    ) -> Option<T> {
        let value = map.remove(key)?;
        self.value(&[key], value)
    }

    fn required<T: DeserializeOwned>(
        &mut self,
        map: &mut Map<String, Value>,
        key: &str,
    ) -> Option<T> {
        if !map.contains_key(key) {
            self.missing(key);
        }
        self.optional(map, key)
    }

    fn missing(&mut self, key: &str) {
        let message = format!("the graph has no `{key}`");
        self.problems.push(Diagnostic::error("missing-key", &[], message));
    }

    fn entries(&mut self, map: &mut Map<String, Value>, key: &str) -> Option<Map<String, Value>> {
        match map.remove(key)? {
            Value::Object(entries) => Some(entries),
            Value::Null => Some(Map::new()),
            _ => {
                let message = format!("`{key}` is a map");
                self.problems.push(Diagnostic::error("wrong-type", &[key], message));
                None
            }
        }
    }

    fn channels(&mut self, map: &mut Map<String, Value>) -> Ordered<ChannelDef> {
        let mut channels = Ordered::default();
        for (name, value) in self.entries(map, "state").unwrap_or_default() {
            let reduce = value.get("reduce");
            if reduce.is_some_and(|reduce| !reduce.is_string()) {
                let message = "`reduce` is the name of a reducer or `${expression}`";
                let path = ["state", name.as_str(), "reduce"];
                self.problems.push(Diagnostic::error("wrong-type", &path, message));
                self.broken.push(vec!["state".into(), name.clone()]);
                channels.insert(name, ChannelDef::default());
                continue;
            }
            // A channel without a schema may be written `name:` with nothing after it.
            let value = if value.is_null() { Value::Object(Map::new()) } else { value };
            let def = self.part(["state", &name], value);
            channels.insert(name, def);
        }
        channels
    }

    /// One of the named parts, or its stand-in.
    fn part<T: DeserializeOwned + Default>(&mut self, path: [&str; 2], value: Value) -> T {
        self.value(&path, value).unwrap_or_else(|| {
            self.broken.push(path.iter().map(|step| (*step).to_owned()).collect());
            T::default()
        })
    }

    fn nodes<T: DeserializeOwned + Default>(
        &mut self,
        map: &mut Map<String, Value>,
    ) -> Option<Ordered<T>> {
        if !map.contains_key("nodes") {
            self.missing("nodes");
            return None;
        }
        let mut nodes = Ordered::default();
        for (name, value) in self.entries(map, "nodes")? {
            let def = self.part(["nodes", &name], value);
            nodes.insert(name, def);
        }
        Some(nodes)
    }

    fn edges<T: DeserializeOwned>(&mut self, map: &mut Map<String, Value>) -> Option<Vec<T>> {
        let items = match map.remove("edges") {
            Some(Value::Array(items)) => items,
            Some(_) => {
                let problem = Diagnostic::error("wrong-type", &["edges"], "`edges` is a list");
                self.problems.push(problem.help("write `- a -> b` for each edge"));
                return None;
            }
            None => {
                self.missing("edges");
                return None;
            }
        };
        let mut edges = Vec::with_capacity(items.len());
        for (at, item) in items.into_iter().enumerate() {
            edges.extend(self.value(&["edges", &at.to_string()], item));
        }
        Some(edges)
    }
}

/// serde's message in our words, with the key that it names added to the path.
fn explain(path: &[&str], message: &str) -> Diagnostic {
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let named = quoted.first().copied().unwrap_or_default();
    if message.starts_with("unknown field") {
        let mut path = path.to_vec();
        if path.last() != Some(&named) {
            path.push(named);
        }
        let problem =
            Diagnostic::error("unknown-key", &path, format!("there is no key `{named}` here"));
        return problem.on_key().suggest(named, quoted.iter().copied().skip(1));
    }
    if message.starts_with("missing field") {
        let message = format!("the key `{named}` is missing");
        return Diagnostic::error("missing-key", path, message).on_key();
    }
    let message = match message
        .strip_prefix("invalid type: ")
        .and_then(|rest| rest.split_once(", expected "))
    {
        Some((found, expected)) => format!("expected {expected}, found {found}"),
        None => message.to_owned(),
    };
    Diagnostic::error("wrong-type", path, message)
}
