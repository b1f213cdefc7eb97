//! Pictures of graphs: the plain drawing that the REST API gives, Mermaid text, and SVG.
//!
//! All three come from one [`Drawing`], so that they show the same nodes and edges.

mod layout;
mod mermaid;
mod svg;

use serde::Serialize;

use super::model::{Choice, Graph, Node, NodeIndex, NodeKind, Route};

pub use mermaid::mermaid;
pub use svg::svg;

/// The node that a run comes from.
pub const START_ID: &str = "__start__";
/// The node that a run ends in.
pub const END_ID: &str = "__end__";

/// A graph as nodes and edges.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Drawing {
    /// `__start__`, the nodes in the order of their names, `__end__`.
    pub nodes: Vec<DrawnNode>,
    /// In the order of their sources.
    pub edges: Vec<DrawnEdge>,
}

/// A node of a drawing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DrawnNode {
    /// Unique; inside a subgraph that is drawn open, `CALLER:NODE`.
    pub id: String,
    /// `start`, `end`, or the node's kind: `set`, `job`, `interrupt`, `wait`, `graph`, `use`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// What to write on it.
    pub name: String,
    /// Whether it runs once for each item of a list.
    pub for_each: bool,
}

/// An edge of a drawing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DrawnEdge {
    /// The id of a node.
    pub source: String,
    /// The id of a node.
    pub target: String,
    /// Whether something decides if it is taken.
    pub conditional: bool,
    /// The condition, or `on error`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// What sort of edge it is.
    pub sort: EdgeSort,
}

/// The sort of an edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EdgeSort {
    /// Always taken.
    Plain,
    /// A line of a `choose`.
    Choice,
    /// A source of a join.
    Join,
    /// After the attempts are spent.
    OnError,
    /// By the node's own code.
    Goto,
}

impl Drawing {
    /// Draws `graph`, its subgraphs open for `xray` levels.
    #[must_use]
    pub fn of(graph: &Graph, xray: usize) -> Self {
        let mut drawing = Self { nodes: Vec::new(), edges: Vec::new() };
        drawing.add(graph, "", xray);
        drawing
    }

    fn add(&mut self, graph: &Graph, prefix: &str, xray: usize) {
        self.node(format!("{prefix}{START_ID}"), "start", START_ID, false);
        for node in &graph.nodes {
            if let Some(inner) = opened(node, xray) {
                self.add(inner, &format!("{prefix}{}:", node.name), xray - 1);
            } else {
                let id = format!("{prefix}{}", node.name);
                self.node(id, kind_name(&node.kind), &node.name, node.for_each.is_some());
            }
        }
        self.node(format!("{prefix}{END_ID}"), "end", END_ID, false);
        let ends = Ends { graph, prefix, xray };
        self.route(&ends, &format!("{prefix}{START_ID}"), &graph.start);
        for node in &graph.nodes {
            let source = ends.leaving(node);
            self.route(&ends, &source, &node.route);
            for join in &node.joins {
                self.lead_to(
                    &ends,
                    &source,
                    &graph.joins[join.0 as usize].to,
                    EdgeSort::Join,
                    None,
                );
            }
            if let Some(target) = &node.on_error {
                let label = Some("on error".to_owned());
                self.lead_to(&ends, &source, &[*target], EdgeSort::OnError, label);
            }
            for target in &node.may_goto {
                self.lead_to(&ends, &source, &[*target], EdgeSort::Goto, None);
            }
        }
    }

    fn node(&mut self, id: String, kind: &'static str, name: &str, for_each: bool) {
        self.nodes.push(DrawnNode { id, kind, name: name.to_owned(), for_each });
    }

    fn route(&mut self, ends: &Ends<'_>, source: &str, route: &Route) {
        for target in &route.to {
            self.lead_to(ends, source, &[*target], EdgeSort::Plain, None);
        }
        for Choice { when, to } in route.choose.iter().flatten() {
            let label = when.as_ref().map_or("otherwise", |when| when.source()).to_owned();
            self.lead_to(ends, source, to, EdgeSort::Choice, Some(label));
        }
        if route.ends {
            self.lead_to(ends, source, &[], EdgeSort::Plain, None);
        }
    }

    /// Edges to all of `targets`, or to the end when there are none.
    fn lead_to(
        &mut self,
        ends: &Ends<'_>,
        source: &str,
        targets: &[NodeIndex],
        sort: EdgeSort,
        label: Option<String>,
    ) {
        let mut ids: Vec<String> = targets.iter().map(|target| ends.entering(*target)).collect();
        if ids.is_empty() {
            ids.push(format!("{}{END_ID}", ends.prefix));
        }
        for target in ids {
            self.edges.push(DrawnEdge {
                source: source.to_owned(),
                target,
                conditional: matches!(sort, EdgeSort::Choice | EdgeSort::OnError | EdgeSort::Goto),
                label: label.clone(),
                sort,
            });
        }
    }
}

/// Where the edges of one graph of the drawing end.
struct Ends<'g> {
    graph: &'g Graph,
    prefix: &'g str,
    xray: usize,
}

impl Ends<'_> {
    fn entering(&self, index: NodeIndex) -> String {
        let node = self.graph.node(index);
        match opened(node, self.xray) {
            Some(_) => format!("{}{}:{START_ID}", self.prefix, node.name),
            None => format!("{}{}", self.prefix, node.name),
        }
    }

    fn leaving(&self, node: &Node) -> String {
        match opened(node, self.xray) {
            Some(_) => format!("{}{}:{END_ID}", self.prefix, node.name),
            None => format!("{}{}", self.prefix, node.name),
        }
    }
}

/// The graph inside a node, when it is to be drawn.
fn opened(node: &Node, xray: usize) -> Option<&Graph> {
    match &node.kind {
        NodeKind::Graph { graph, .. } if xray > 0 => Some(graph),
        _ => None,
    }
}

/// The name of a node's kind, as files write it.
#[must_use]
pub fn kind_name(kind: &NodeKind) -> &'static str {
    match kind {
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

/// The background of each kind, the same in every picture.
fn fill(kind: &str) -> &'static str {
    match kind {
        "start" | "end" => "#3a3f47",
        "job" => "#d7ead9",
        "interrupt" => "#fbe3b5",
        "wait" => "#e8e4f3",
        "graph" => "#d5e5f5",
        "use" => "#f5dcdc",
        _ => "#f1f1ef",
    }
}

/// A label short enough to read in a picture.
fn short(label: &str) -> String {
    const SHOWN: usize = 36;
    let flat = label.split_whitespace().collect::<Vec<_>>().join(" ");
    if flat.chars().count() <= SHOWN {
        return flat;
    }
    let cut: String = flat.chars().take(SHOWN - 1).collect();
    format!("{cut}…")
}

#[cfg(test)]
mod tests;
