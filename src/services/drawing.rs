//! A graph as a picture's nodes and edges, and as JSON Schemas: what clients draw and make forms of.

use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use crate::graph::model::{Graph, Node, NodeIndex, NodeKind, Route};

const START: &str = "__start__";
const END: &str = "__end__";

/// Nodes and edges.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct DrawingView {
    /// Start first, end last, the file's order between.
    pub nodes: Vec<DrawnNode>,
    /// In the order of their sources.
    pub edges: Vec<DrawnEdge>,
}

/// A vertex.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct DrawnNode {
    /// Unique: the node's name, after its subgraphs' names.
    pub id: String,
    /// The node's kind; `schema` for start and end.
    pub r#type: String,
    /// What to write on it.
    pub data: DrawnData,
}

/// A vertex's label.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct DrawnData {
    /// The node's name.
    pub name: String,
}

/// An arrow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct DrawnEdge {
    /// A node's id.
    pub source: String,
    /// A node's id.
    pub target: String,
    /// Whether it is taken at times only.
    pub conditional: bool,
}

/// What goes in and out of a graph, as JSON Schemas.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct SchemasView {
    /// The graph's name.
    pub graph_id: String,
    /// Of a run's input.
    #[schema(value_type = Object)]
    pub input_schema: Value,
    /// Of a run's result.
    #[schema(value_type = Object)]
    pub output_schema: Value,
    /// Of the state.
    #[schema(value_type = Object)]
    pub state_schema: Value,
    /// Graphs take no configuration of their own.
    #[schema(value_type = Option<Object>)]
    pub config_schema: Option<Value>,
    /// As above.
    #[schema(value_type = Option<Object>)]
    pub context_schema: Option<Value>,
}

impl SchemasView {
    /// The schemas of `graph`.
    #[must_use]
    pub fn of(graph: &Graph) -> Self {
        Self {
            graph_id: graph.name.clone(),
            input_schema: graph.input_schema.clone(),
            output_schema: graph.output_schema.clone(),
            state_schema: graph.state_schema.clone(),
            config_schema: None,
            context_schema: None,
        }
    }
}

/// Draws `graph`, with the insides of its subgraphs to a depth of `xray`.
#[must_use]
pub fn drawing(graph: &Graph, xray: u32) -> DrawingView {
    let mut nodes = vec![drawn(START, "schema")];
    nodes.extend(graph.nodes.iter().map(|node| drawn(&node.name, kind(node))));
    nodes.push(drawn(END, "schema"));
    let mut edges = edges(graph);
    if xray > 0 {
        for (node, inner) in calls(graph) {
            let inner = drawing(inner, xray - 1);
            replace_node(&mut nodes, node, &inner);
            edges = splice(&edges, node, &inner.edges);
        }
    }
    DrawingView { nodes, edges }
}

/// The graphs that `graph`'s nodes call, by the node's name; with `recurse` also what those call, as
/// `outer|inner`.
#[must_use]
pub fn subgraphs(graph: &Graph, recurse: bool) -> Vec<(String, Arc<Graph>)> {
    let mut found = Vec::new();
    for (node, inner) in calls(graph) {
        found.push((node.to_owned(), Arc::clone(inner)));
        if recurse {
            let below = subgraphs(inner, true);
            found.extend(below.into_iter().map(|(name, graph)| (format!("{node}|{name}"), graph)));
        }
    }
    found
}

fn calls(graph: &Graph) -> impl Iterator<Item = (&str, &Arc<Graph>)> {
    graph.nodes.iter().filter_map(|node| match &node.kind {
        NodeKind::Graph { graph, .. } => Some((node.name.as_str(), graph)),
        _ => None,
    })
}

fn kind(node: &Node) -> &'static str {
    match node.kind {
        NodeKind::Set => "set",
        NodeKind::Job(_) => "job",
        NodeKind::Interrupt(_) => "interrupt",
        NodeKind::Wait(_) => "wait",
        NodeKind::Graph { .. } => "graph",
        NodeKind::Model(_) => "model",
        NodeKind::Tool(_) => "tool",
        NodeKind::Use { .. } => "use",
    }
}

fn drawn(name: &str, kind: &str) -> DrawnNode {
    let data = DrawnData { name: name.to_owned() };
    DrawnNode { id: name.to_owned(), r#type: kind.to_owned(), data }
}

fn edge(source: &str, target: &str, conditional: bool) -> DrawnEdge {
    DrawnEdge { source: source.to_owned(), target: target.to_owned(), conditional }
}

fn edges(graph: &Graph) -> Vec<DrawnEdge> {
    let mut edges = Vec::new();
    route(graph, START, &graph.start, &mut edges);
    for node in &graph.nodes {
        route(graph, &node.name, &node.route, &mut edges);
        for join in &node.joins {
            let join = &graph.joins[join.0 as usize];
            edges.extend(targets(graph, &join.to).map(|to| edge(&node.name, to, false)));
        }
        let sometimes = node.may_goto.iter().chain(&node.on_error);
        edges.extend(sometimes.map(|to| edge(&node.name, &graph.node(*to).name, true)));
    }
    let mut seen = std::collections::HashSet::new();
    edges.retain(|edge| seen.insert((edge.source.clone(), edge.target.clone())));
    edges
}

fn route(graph: &Graph, source: &str, route: &Route, edges: &mut Vec<DrawnEdge>) {
    edges.extend(route.to.iter().map(|to| edge(source, &graph.node(*to).name, false)));
    for choice in route.choose.iter().flatten() {
        edges.extend(targets(graph, &choice.to).map(|to| edge(source, to, true)));
    }
    if route.ends {
        edges.push(edge(source, END, false));
    }
}

/// The names of `to`; no target at all is the end.
fn targets<'a>(graph: &'a Graph, to: &'a [NodeIndex]) -> impl Iterator<Item = &'a str> {
    let end = to.is_empty().then_some(END);
    to.iter().map(|to| graph.node(*to).name.as_str()).chain(end)
}

fn replace_node(nodes: &mut Vec<DrawnNode>, name: &str, inner: &DrawingView) {
    let Some(at) = nodes.iter().position(|node| node.id == name) else { return };
    let inside = inner.nodes.iter().filter(|node| node.id != START && node.id != END);
    let renamed =
        inside.map(|node| DrawnNode { id: format!("{name}:{}", node.id), ..node.clone() });
    nodes.splice(at..=at, renamed.collect::<Vec<_>>());
}

/// Leads the edges into `node` to where its inside starts, and those out of it from where it ends.
fn splice(edges: &[DrawnEdge], node: &str, inner: &[DrawnEdge]) -> Vec<DrawnEdge> {
    let inside = |name: &str| format!("{node}:{name}");
    let firsts = inner.iter().filter(|edge| edge.source == START && edge.target != END);
    let firsts = firsts.collect::<Vec<_>>();
    let lasts = inner.iter().filter(|edge| edge.target == END && edge.source != START);
    let lasts = lasts.collect::<Vec<_>>();
    let mut led = Vec::new();
    for outer in edges {
        let sources = if outer.source == node {
            lasts.iter().map(|last| (inside(&last.source), last.conditional)).collect()
        } else {
            vec![(outer.source.clone(), false)]
        };
        let targets = if outer.target == node {
            firsts.iter().map(|first| (inside(&first.target), first.conditional)).collect()
        } else {
            vec![(outer.target.clone(), false)]
        };
        for (source, leaves) in &sources {
            for (target, enters) in &targets {
                led.push(edge(source, target, outer.conditional || *leaves || *enters));
            }
        }
    }
    let between = inner.iter().filter(|edge| edge.source != START && edge.target != END);
    led.extend(
        between.map(|own| edge(&inside(&own.source), &inside(&own.target), own.conditional)),
    );
    led
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(outer: &[(&str, &str)], inner: &[(&str, &str)], expected: &[(&str, &str)]) {
        let drawn = |edges: &[(&str, &str)]| {
            edges.iter().map(|(from, to)| edge(from, to, false)).collect::<Vec<_>>()
        };
        assert_eq!(splice(&drawn(outer), "sub", &drawn(inner)), drawn(expected));
    }

    #[test]
    fn a_subgraph_is_spliced_in_place_of_its_node() {
        check(
            &[(START, "sub"), ("sub", END)],
            &[(START, "a"), ("a", "b"), ("b", END)],
            &[(START, "sub:a"), ("sub:b", END), ("sub:a", "sub:b")],
        );
    }

    #[test]
    fn every_start_and_every_end_of_a_subgraph_is_led_on() {
        check(
            &[("x", "sub"), ("sub", "y")],
            &[(START, "a"), (START, "b"), ("a", END), ("b", END)],
            &[("x", "sub:a"), ("x", "sub:b"), ("sub:a", "y"), ("sub:b", "y")],
        );
    }

    #[test]
    fn a_node_that_follows_itself_follows_itself_inside() {
        check(&[("sub", "sub")], &[(START, "a"), ("a", END)], &[("sub:a", "sub:a")]);
    }
}
