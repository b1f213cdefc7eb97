//! From a graph file to what the engine executes: every name resolved, every expression compiled.
//!
//! All problems are collected, none hides another. Nodes and channels are put in the order of their
//! names, so that a graph that was stored as canonical JSON compiles to the same graph, whatever the
//! order of keys that a database gives back.
//!
//! **Invariant:** a [`Graph`] that comes from here holds only indices that exist.

mod edges;
mod kinds;
mod models;
mod nodes;
mod state;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::check::{Diagnostic, flow};
use super::definition::{END, GraphFile, START};
use super::expr::{Expr, ExprError, Template, TemplateError};
use super::model::{Channel, ChannelIndex, Effect, Graph, GraphHash, Limits, NodeIndex};
use super::names;

pub use state::build_validator;

/// Nodes of one graph.
pub const MAX_NODES: usize = 2_000;
/// Channels of one graph.
pub const MAX_CHANNELS: usize = 500;
/// Entries of `edges:`.
pub const MAX_EDGES: usize = 10_000;
/// Supersteps of one run, when the file does not say.
pub const DEFAULT_SUPERSTEPS: u32 = 10_000;
/// The most that a file may ask for.
pub const MAX_SUPERSTEPS: u32 = 1_000_000;

/// The nodes that `use:` can name.
pub trait NodeNames {
    /// All names.
    fn names(&self) -> Vec<String>;
    /// What repeating an attempt of that node would do, when it says so.
    fn effect(&self, name: &str) -> Option<Effect>;
}

/// No registered nodes.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoNodes;

impl NodeNames for NoNodes {
    fn names(&self) -> Vec<String> {
        Vec::new()
    }

    fn effect(&self, _: &str) -> Option<Effect> {
        None
    }
}

/// Finds the compiled graph of a name.
pub type Subgraphs<'a> = &'a dyn Fn(&str) -> Option<Arc<Graph>>;

/// What compiling gave: a graph when there is no error, and everything that was found.
#[derive(Debug)]
pub struct Compiled {
    /// The graph, when nothing is wrong with it.
    pub graph: Option<Graph>,
    /// Errors and warnings.
    pub diagnostics: Vec<Diagnostic>,
}

/// Compiles a file that an author wrote, with every check.
pub fn compile(
    file: Arc<GraphFile>,
    subgraphs: Subgraphs<'_>,
    registry: &dyn NodeNames,
) -> Result<Graph, Vec<Diagnostic>> {
    let compiled = check(file, subgraphs, registry);
    compiled.graph.ok_or(compiled.diagnostics)
}

/// Compiles a graph from the canonical JSON that was stored when it was accepted.
///
/// Only what the engine depends on is checked: a newer version with stricter checks still runs it.
pub fn compile_stored(
    canonical: &str,
    subgraphs: Subgraphs<'_>,
    registry: &dyn NodeNames,
) -> Result<Graph, Vec<Diagnostic>> {
    let file: GraphFile = serde_json::from_str(canonical).map_err(|err| {
        vec![Diagnostic::error("syntax", &[], format!("the stored graph cannot be read: {err}"))]
    })?;
    let mut compiler = Compiler::new(Arc::new(file), subgraphs, registry);
    compiler.graph().filter(|_| !compiler.has_errors()).ok_or(compiler.problems)
}

/// Compiles a file that an author wrote, and tells everything that was found.
#[must_use]
pub fn check(file: Arc<GraphFile>, subgraphs: Subgraphs<'_>, registry: &dyn NodeNames) -> Compiled {
    let mut compiler = Compiler::new(file, subgraphs, registry);
    let graph = compiler.graph();
    if let Some(graph) = &graph {
        // Topology is judged only where all edges are known: a misspelled name would otherwise be
        // reported a second time as a node that nothing leads to.
        compiler.problems.extend(flow::check(graph, compiler.edges_are_sound()));
    }
    let graph = graph.filter(|_| !compiler.has_errors());
    Compiled { graph, diagnostics: compiler.problems }
}

/// What is wrong with the parts of a file that is refused anyway: its shape is not judged.
pub(super) fn check_parts(
    file: Arc<GraphFile>,
    subgraphs: Subgraphs<'_>,
    registry: &dyn NodeNames,
) -> Vec<Diagnostic> {
    let mut compiler = Compiler::new(file, subgraphs, registry);
    compiler.incomplete = true;
    compiler.graph();
    compiler.problems
}

/// One compilation under way.
struct Compiler<'a> {
    file: Arc<GraphFile>,
    subgraphs: Subgraphs<'a>,
    registry: &'a dyn NodeNames,
    registered: Vec<String>,
    nodes: HashMap<String, NodeIndex>,
    channels: HashMap<String, ChannelIndex>,
    problems: Vec<Diagnostic>,
    /// Parts of the file are missing, so that what is not there may only not have been read.
    incomplete: bool,
}

impl<'a> Compiler<'a> {
    fn new(file: Arc<GraphFile>, subgraphs: Subgraphs<'a>, registry: &'a dyn NodeNames) -> Self {
        let registered = registry.names();
        let nodes = indexed(file.nodes.sorted().iter().map(|(name, _)| *name), NodeIndex);
        let channels = indexed(file.state.sorted().iter().map(|(name, _)| *name), ChannelIndex);
        Self {
            file,
            subgraphs,
            registry,
            registered,
            nodes,
            channels,
            problems: Vec::new(),
            incomplete: false,
        }
    }

    fn report(&mut self, problem: Diagnostic) {
        self.problems.push(problem);
    }

    fn has_errors(&self) -> bool {
        self.problems.iter().any(Diagnostic::is_error)
    }

    fn edges_are_sound(&self) -> bool {
        !self.problems.iter().any(|problem| {
            problem.is_error()
                && (problem.path.first().is_some_and(|step| step == "edges")
                    || matches!(problem.code, "unknown-node" | "name"))
        })
    }

    /// The graph, as far as it can be made; `None` when there is none worth looking at.
    fn graph(&mut self) -> Option<Graph> {
        let file = Arc::clone(&self.file);
        self.sizes(&file)?;
        self.name(&["name"], "a graph", &file.name, false);
        let channels = self.state(&file);
        let (nodes, called) = self.all_nodes(&file, &channels);
        let topology = self.topology(&file, nodes);
        let input = self.channel_list("input", file.input.as_deref());
        let output = self.channel_list("output", file.output.as_deref());
        let limits = self.limits(&file);
        let input_schema = object_schema(&channels, &input);
        let input_validator = self.input_validator(&input_schema)?;
        Some(Graph {
            name: file.name.clone(),
            hash: file.hash(&called),
            output_schema: object_schema(&channels, &output),
            state_schema: object_schema(&channels, &self.every_channel()),
            file,
            channels,
            nodes: topology.nodes,
            joins: topology.joins,
            start: topology.start,
            input,
            output,
            limits,
            input_schema,
            input_validator,
        })
    }

    fn input_validator(&mut self, schema: &Value) -> Option<jsonschema::Validator> {
        match build_validator(schema) {
            Ok(validator) => Some(validator),
            // A channel's schema that is none was reported at its place.
            Err(_) if self.problems.iter().any(|problem| problem.code == "schema") => {
                state::anything()
            }
            Err(err) => {
                let message = format!("the schemas of the input do not go together: {err}");
                self.report(Diagnostic::error("schema", &["state"], message).on_key());
                None
            }
        }
    }

    fn sizes(&mut self, file: &GraphFile) -> Option<()> {
        if file.nodes.is_empty() {
            self.report(Diagnostic::error("no-nodes", &["nodes"], "the graph has no nodes"));
        }
        for (what, count, limit) in [
            ("nodes", file.nodes.len(), MAX_NODES),
            ("state", file.state.len(), MAX_CHANNELS),
            ("edges", file.edges.len(), MAX_EDGES),
        ] {
            if count > limit {
                let message = format!("`{what}` has {count} entries, the limit is {limit}");
                self.report(Diagnostic::error("too-large", &[what], message).on_key());
                return None;
            }
        }
        Some(())
    }

    fn name(&mut self, path: &[&str], what: &str, name: &str, identifier: bool) {
        let well_formed =
            if identifier { names::is_identifier(name) } else { names::is_name(name) };
        let at = |message: String| Diagnostic::error("name", path, message);
        let problem = if !well_formed {
            let rest = if identifier { "digits and `_`" } else { "digits, `_`, `-` and `.`" };
            at(format!("{name:?} is no name for {what}"))
                .help(format!("use letters, {rest}, at most {} of them", names::MAX_NAME_BYTES))
        } else if name == START || name == END || name.starts_with("__") {
            at(format!("`{name}` is reserved")).help(format!("choose another name for {what}"))
        } else {
            return;
        };
        let is_key = path.len() > 1;
        self.report(if is_key { problem.on_key() } else { problem });
    }

    fn every_channel(&self) -> Vec<ChannelIndex> {
        let mut all: Vec<ChannelIndex> = self.channels.values().copied().collect();
        all.sort_unstable();
        all
    }

    /// The channel of that name; reports it when there is none.
    fn channel(&mut self, path: &[&str], name: &str) -> Option<ChannelIndex> {
        if let Some(found) = self.channels.get(name) {
            return Some(*found);
        }
        let problem = Diagnostic::error(
            "unknown-channel",
            path,
            format!("the state has no channel `{name}`"),
        )
        .suggest(name, self.file.state.names().collect::<Vec<_>>());
        self.report(problem);
        None
    }

    /// The node of that name; reports it when there is none.
    fn node(&mut self, path: &[&str], name: &str) -> Option<NodeIndex> {
        if let Some(found) = self.nodes.get(name) {
            return Some(*found);
        }
        let problem = Diagnostic::error("unknown-node", path, format!("there is no node `{name}`"))
            .suggest(name, self.file.nodes.names().collect::<Vec<_>>());
        self.report(problem);
        None
    }

    fn channel_list(&mut self, key: &str, names: Option<&[String]>) -> Vec<ChannelIndex> {
        let Some(names) = names else { return self.every_channel() };
        let mut found = Vec::with_capacity(names.len());
        for (at, name) in names.iter().enumerate() {
            let at = at.to_string();
            let Some(channel) = self.channel(&[key, &at], name) else { continue };
            if found.contains(&channel) {
                let message = format!("`{name}` is named twice");
                self.report(Diagnostic::error("name", &[key, &at], message));
            } else {
                found.push(channel);
            }
        }
        found
    }

    fn limits(&mut self, file: &GraphFile) -> Limits {
        let def = file.limits.clone().unwrap_or_default();
        let supersteps = def.supersteps.unwrap_or(DEFAULT_SUPERSTEPS);
        if supersteps == 0 || supersteps > MAX_SUPERSTEPS {
            let message = format!("`supersteps` is {supersteps}, it must be 1 to {MAX_SUPERSTEPS}");
            self.report(Diagnostic::error("option", &["limits", "supersteps"], message));
        }
        let duration = def.duration.map(|period| period.0);
        self.positive(&["limits", "duration"], duration);
        Limits { supersteps, duration }
    }

    fn positive(&mut self, path: &[&str], duration: Option<Duration>) {
        if duration == Some(Duration::ZERO) {
            let message = "a bound of no time at all lets nothing happen";
            self.report(Diagnostic::error("option", path, message));
        }
    }

    /// A bare expression; reports it when it does not compile or reads an unknown channel.
    fn expr(&mut self, path: &[&str], source: &str, vars: &[&str]) -> Option<Expr> {
        match Expr::compile(source, vars) {
            Ok(expr) => {
                self.known_channels(path, source, &expr.references().channels);
                Some(expr)
            }
            Err(error) => {
                self.expression_error(path, error);
                None
            }
        }
    }

    /// A template; reports it when it does not compile or reads an unknown channel.
    fn template(&mut self, path: &[&str], json: &Value, vars: &[&str]) -> Option<Template> {
        match Template::compile(json, vars) {
            Ok(template) => {
                let text = json.as_str().unwrap_or_default();
                self.known_channels(path, text, &template.references().channels);
                Some(template)
            }
            Err(TemplateError { path: inner, error }) => {
                let mut path = path.to_vec();
                path.extend(inner.iter().map(String::as_str));
                self.expression_error(&path, error);
                None
            }
        }
    }

    fn known_channels(&mut self, path: &[&str], text: &str, channels: &[String]) {
        for name in channels {
            if self.channels.contains_key(name) {
                continue;
            }
            let offset = text.find(&format!("state.{name}")).map(|at| at + "state.".len());
            let before = self.problems.len();
            self.channel(path, name);
            if let Some(problem) = self.problems.get_mut(before)
                && let Some(offset) = offset
            {
                problem.part = super::check::Part::Within(offset);
            }
        }
    }

    fn expression_error(&mut self, path: &[&str], error: ExprError) {
        let problem = Diagnostic::error("expression", path, error.message).within(error.offset);
        self.report(match error.help {
            Some(help) => problem.help(help),
            None => problem,
        });
    }
}

fn indexed<'n, I>(names: impl Iterator<Item = &'n str>, index: fn(u32) -> I) -> HashMap<String, I> {
    (0..).zip(names).map(|(at, name)| (name.to_owned(), index(at))).collect()
}

/// The schema of an object of some channels, and of nothing else.
fn object_schema(channels: &[Channel], which: &[ChannelIndex]) -> Value {
    let properties: serde_json::Map<String, Value> = which
        .iter()
        .filter_map(|index| channels.get(index.0 as usize))
        .map(|channel| (channel.name.clone(), embedded(channel)))
        .collect();
    json!({ "type": "object", "properties": properties, "additionalProperties": false })
}

/// A channel's schema for use inside another one: a resource of its own where it refers to itself, so
/// that `#/$defs/..` still means its own definitions.
fn embedded(channel: &Channel) -> Value {
    let mut schema = channel.schema.clone();
    if schema.to_string().contains("\"$ref\"")
        && let Some(map) = schema.as_object_mut()
        && !map.contains_key("$id")
    {
        map.insert("$id".into(), format!("urn:cynai:channel:{}", channel.name).into());
    }
    schema
}

/// The graphs that a node calls, with their hashes.
type Called = Vec<(String, GraphHash)>;
