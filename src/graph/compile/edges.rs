//! The edges: paths, fan-outs, joins and choices, resolved to routes.

use serde_json::Value;

use super::Compiler;
use crate::graph::check::{Diagnostic, Part};
use crate::graph::definition::{ChoiceDef, END, EdgeDef, EdgeTable, GraphFile, Names, START};
use crate::graph::expr::{Expr, Scope, StateView};
use crate::graph::model::{Choice, Join, JoinIndex, Node, NodeIndex, Route};
use crate::graph::value::Shared;

/// Nodes in one list of an edge.
const MAX_LIST: usize = 1_000;
/// Lines of one `choose`.
const MAX_CHOICES: usize = 256;

/// What a condition sees besides `state`.
const CONDITION_VARS: [&str; 2] = ["run", "env"];

/// The graph's shape.
pub(super) struct Topology {
    pub(super) nodes: Vec<Node>,
    pub(super) joins: Vec<Join>,
    pub(super) start: Route,
}

/// Where an edge comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum From {
    Start,
    Node(NodeIndex),
}

/// Where an edge goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum To {
    End,
    Node(NodeIndex),
}

/// A path for messages and how to point into a path string.
type At<'p> = (&'p [&'p str], Option<usize>);

impl Compiler<'_> {
    /// The nodes with their routes, the joins, and the route from `start`.
    pub(super) fn topology(&mut self, file: &GraphFile, nodes: Vec<Node>) -> Topology {
        let mut topology = Topology { nodes, joins: Vec::new(), start: Route::default() };
        for (at, edge) in file.edges.iter().enumerate() {
            let at = at.to_string();
            match edge {
                EdgeDef::Path(text) => self.path_edge(&mut topology, &["edges", &at], text),
                EdgeDef::Table(table) => self.table_edge(&mut topology, &at, table),
            }
        }
        let has_start = !topology.start.to.is_empty() || !topology.start.choose.is_empty();
        if !has_start && !self.incomplete && !file.nodes.is_empty() && self.edges_are_sound() {
            let message = "no edge leads from `start` to a node, so nothing would run";
            let first = file.nodes.names().next().unwrap_or("NODE");
            let problem = Diagnostic::error("no-start", &["edges"], message).on_key();
            self.report(problem.help(format!("add the edge `start -> {first}`")));
        }
        topology
    }

    fn path_edge(&mut self, topology: &mut Topology, path: &[&str], text: &str) {
        let mut stops = Vec::new();
        let mut offset = 0;
        for part in text.split("->") {
            let lead = part.len() - part.trim_start().len();
            stops.push((offset + lead, part.trim()));
            offset += part.len() + "->".len();
        }
        if stops.len() < 2 || stops.iter().any(|(_, name)| name.is_empty()) {
            let problem = Diagnostic::error("edge", path, format!("{text:?} is no edge"));
            self.report(problem.help("write `a -> b`, or `a -> b -> c`"));
            return;
        }
        for pair in stops.windows(2) {
            let [(from_at, from), (to_at, to)] = pair else { continue };
            let from = self.source((path, Some(*from_at)), from);
            let to = self.target((path, Some(*to_at)), to);
            if let (Some(from), Some(to)) = (from, to) {
                self.connect(topology, (path, Some(*to_at)), from, to);
            }
        }
    }

    fn source(&mut self, (path, offset): At<'_>, name: &str) -> Option<From> {
        if name == START {
            return Some(From::Start);
        }
        if name == END {
            let problem = Diagnostic::error("edge", path, "no edge leads from `end`");
            self.report(problem.within(offset));
            return None;
        }
        self.located((path, offset), name).map(From::Node)
    }

    fn target(&mut self, (path, offset): At<'_>, name: &str) -> Option<To> {
        if name == END {
            return Some(To::End);
        }
        if name == START {
            let problem = Diagnostic::error("edge", path, "no edge leads to `start`");
            self.report(problem.within(offset).help("name the node that is to run again"));
            return None;
        }
        self.located((path, offset), name).map(To::Node)
    }

    fn located(&mut self, (path, offset): At<'_>, name: &str) -> Option<NodeIndex> {
        let before = self.problems.len();
        let found = self.node(path, name);
        if let (Some(problem), Some(offset)) = (self.problems.get_mut(before), offset) {
            problem.part = Part::Within(offset);
        }
        found
    }

    /// Adds a plain edge.
    fn connect(&mut self, topology: &mut Topology, (path, offset): At<'_>, from: From, to: To) {
        let Some(route) = route_of(topology, from) else { return };
        let known = match to {
            To::End => std::mem::replace(&mut route.ends, true),
            To::Node(node) if route.to.contains(&node) => true,
            To::Node(node) => {
                route.to.push(node);
                false
            }
        };
        if known {
            let message = "this edge is already there";
            self.report(Diagnostic::warning("duplicate-edge", path, message).within(offset));
        }
        if from == From::Start && to == To::End {
            let message = "a run that goes from `start` to `end` does nothing";
            self.report(Diagnostic::error("edge", path, message).within(offset));
        }
    }

    fn table_edge(&mut self, topology: &mut Topology, at: &str, table: &EdgeTable) {
        let path = ["edges", at];
        match (&table.to, &table.choose) {
            (Some(to), None) => self.edge_to(topology, at, table, to),
            (None, Some(choose)) => self.choose_edge(topology, at, table, choose),
            _ => {
                let message = "an edge has exactly one of `to` and `choose`";
                self.report(Diagnostic::error("edge", &path, message));
            }
        }
    }

    fn edge_to(&mut self, topology: &mut Topology, at: &str, table: &EdgeTable, to: &Names) {
        let targets = self.targets(&["edges", at, "to"], to);
        match &table.from {
            Names::One(name) => {
                let Some(from) = self.source((&["edges", at, "from"], None), name) else { return };
                for target in targets {
                    self.connect(topology, (&["edges", at, "to"], None), from, target);
                }
            }
            Names::Many(names) => {
                let Some(sources) = self.join_sources(at, names) else { return };
                if targets.is_empty() {
                    return;
                }
                let index = JoinIndex(u32::try_from(topology.joins.len()).unwrap_or(u32::MAX));
                for source in &sources {
                    if let Some(node) = topology.nodes.get_mut(source.0 as usize) {
                        node.joins.push(index);
                    }
                }
                topology.joins.push(Join { sources, to: nodes_of(&targets) });
            }
        }
    }

    fn join_sources(&mut self, at: &str, names: &[String]) -> Option<Vec<NodeIndex>> {
        let mut sources = Vec::with_capacity(names.len());
        let mut sound = true;
        for (position, name) in names.iter().enumerate() {
            let position = position.to_string();
            let path = ["edges", at, "from", position.as_str()];
            match self.source((&path, None), name) {
                Some(From::Node(node)) if sources.contains(&node) => {
                    let message = format!("`{name}` is named twice");
                    self.report(Diagnostic::error("join-empty", &path, message));
                    sound = false;
                }
                Some(From::Node(node)) => sources.push(node),
                Some(From::Start) => {
                    let message = "`start` cannot be waited for: it is always there";
                    self.report(Diagnostic::error("edge", &path, message));
                    sound = false;
                }
                None => sound = false,
            }
        }
        if sound && sources.len() < 2 {
            let message = "a join waits for two nodes or more";
            let problem = Diagnostic::error("join-empty", &["edges", at, "from"], message);
            self.report(problem.help("write one name, without a list"));
            return None;
        }
        sound.then_some(sources)
    }

    /// The targets of a list, each once; `end` stands alone.
    fn targets(&mut self, path: &[&str], names: &Names) -> Vec<To> {
        let list = names.as_slice();
        if list.is_empty() || list.len() > MAX_LIST {
            let message = format!("an edge leads to 1 to {MAX_LIST} nodes");
            self.report(Diagnostic::error("edge", path, message));
            return Vec::new();
        }
        let mut targets = Vec::with_capacity(list.len());
        for (at, name) in list.iter().enumerate() {
            let at = at.to_string();
            let mut path = path.to_vec();
            if matches!(names, Names::Many(_)) {
                path.push(&at);
            }
            let Some(target) = self.target((&path, None), name) else { continue };
            if targets.contains(&target) {
                let message = format!("`{name}` is named twice");
                self.report(Diagnostic::error("edge", &path, message));
            } else if target == To::End && list.len() > 1 {
                let message = "`end` does not go with other targets";
                self.report(Diagnostic::error("edge", &path, message));
            } else {
                targets.push(target);
            }
        }
        targets
    }

    fn choose_edge(
        &mut self,
        topology: &mut Topology,
        at: &str,
        table: &EdgeTable,
        lines: &[ChoiceDef],
    ) {
        let Names::One(name) = &table.from else {
            let message = "a choice is made after one node";
            let problem = Diagnostic::error("edge", &["edges", at, "from"], message);
            self.report(problem.help("join the nodes in a node first, and choose after that one"));
            return;
        };
        let from = self.source((&["edges", at, "from"], None), name);
        if lines.is_empty() || lines.len() > MAX_CHOICES {
            let message = format!("a `choose` has 1 to {MAX_CHOICES} lines");
            self.report(Diagnostic::error("edge", &["edges", at, "choose"], message));
            return;
        }
        let choices: Vec<Choice> = lines
            .iter()
            .enumerate()
            .filter_map(|(line, def)| self.choice(at, line, lines.len(), def))
            .collect();
        if let Some(route) = from.and_then(|from| route_of(topology, from)) {
            route.choose.push(choices);
        }
    }

    fn choice(&mut self, at: &str, line: usize, lines: usize, def: &ChoiceDef) -> Option<Choice> {
        let line_text = line.to_string();
        let base = ["edges", at, "choose", line_text.as_str()];
        let path = |key| [base[0], base[1], base[2], base[3], key];
        match &def.when {
            None if line + 1 < lines => {
                let message = "the lines after one without a condition are never tried";
                self.report(Diagnostic::error("choose-unreachable", &base, message));
            }
            Some(_) if line + 1 == lines => {
                let message = "every line has a condition: the run fails when none of them holds";
                let problem = Diagnostic::error("choose-no-default", &base, message);
                self.report(problem.help("add a last line with only a target: `- { to: NODE }`"));
            }
            _ => {}
        }
        let when = match &def.when {
            None => None,
            Some(source) => {
                let expr = self.condition(&path("when"), source);
                Some(expr?)
            }
        };
        let to = nodes_of(&self.targets(&path("to"), &def.to));
        Some(Choice { when, to })
    }

    fn condition(&mut self, path: &[&str], source: &str) -> Option<Expr> {
        let trimmed = source.trim();
        if trimmed.starts_with("${") && trimmed.ends_with('}') {
            let problem = Diagnostic::error("expression", path, "a condition is a bare expression");
            self.report(problem.help("write it without `${` and `}`"));
            return None;
        }
        let expr = self.expr(path, source, &CONDITION_VARS)?;
        self.constant(path, &expr);
        Some(expr)
    }

    /// Evaluates a condition that reads nothing: it is always the same, or no condition.
    fn constant(&mut self, path: &[&str], expr: &Expr) {
        if !expr.references().channels.is_empty() || !expr.references().vars.is_empty() {
            return;
        }
        let scope = Scope { state: &Nothing, vars: &[] };
        let problem = match expr.eval(&scope) {
            Ok(Value::Bool(value)) => {
                let message = format!("this condition is always {value}");
                Diagnostic::warning("constant-condition", path, message)
            }
            Ok(_) => Diagnostic::error("expression", path, "a condition must be true or false"),
            Err(err) => {
                Diagnostic::error("expression", path, format!("this always fails: {}", err.problem))
            }
        };
        self.report(problem);
    }
}

/// A state without channels.
struct Nothing;

impl StateView for Nothing {
    fn get(&self, _: &str) -> Option<Shared> {
        None
    }
}

fn route_of(topology: &mut Topology, from: From) -> Option<&mut Route> {
    match from {
        From::Start => Some(&mut topology.start),
        From::Node(index) => topology.nodes.get_mut(index.0 as usize).map(|node| &mut node.route),
    }
}

/// The nodes among the targets: none is `end`.
fn nodes_of(targets: &[To]) -> Vec<NodeIndex> {
    targets
        .iter()
        .filter_map(|target| match target {
            To::End => None,
            To::Node(node) => Some(*node),
        })
        .collect()
}
