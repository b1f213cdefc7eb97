//! Joins: whether all their sources run whenever one of them does.
//!
//! For every decision (a `choose`, or success against `on_error`) and every way it can go, the sources
//! that are reached are compared. A way that reaches some sources of a join and not the others leaves
//! it half filled: the run fails there, so it is told. When no way reaches all of them, and the
//! decision is made at most once in a run, the join can never fire: that is an error, not a warning.
//! A decision on a circle may go one way in one round and another in the next, and so fill the join.

use super::Diagnostic;
use super::shape::{Decision, Group, Shape};
use crate::graph::definition::{EdgeDef, Names};
use crate::graph::model::Graph;
use crate::graph::names::listed;

/// Decisions times joins that are looked at; a larger graph is spared these warnings.
const MAX_WORK: usize = 4_000_000;

pub(super) fn check(
    graph: &Graph,
    shape: &Shape,
    reached: &[bool],
    problems: &mut Vec<Diagnostic>,
) {
    if shape.joins.is_empty() {
        return;
    }
    let places = places(graph);
    let mut judged = vec![false; shape.joins.len()];
    for (index, join) in shape.joins.iter().enumerate() {
        if let Some(missing) = join.sources.iter().find(|source| !reached[**source]) {
            judged[index] = true;
            let name = &graph.nodes[*missing].name;
            let message = format!("this join can never fire: `{name}` never runs");
            problems.push(Diagnostic::error("join-never", &place(&places[index]), message));
        }
    }
    let ways: usize = shape.decisions.iter().map(|decision| decision.ways).sum();
    if ways.saturating_mul(shape.len()) > MAX_WORK {
        return;
    }
    let once = shape.at_most_once();
    for decision in &shape.decisions {
        let by_way: Vec<Vec<bool>> =
            (0..decision.ways).map(|way| taken(shape, decision, way)).collect();
        for (index, join) in shape.joins.iter().enumerate() {
            if judged[index] {
                continue;
            }
            let lost = by_way.iter().enumerate().find_map(|(way, finished)| {
                let (there, missing): (Vec<usize>, Vec<usize>) =
                    join.sources.iter().partition(|source| finished[**source]);
                (!there.is_empty() && !missing.is_empty()).then_some((way, there, missing))
            });
            let Some((way, there, missing)) = lost else { continue };
            let never = decision.node.is_none_or(|node| once[node])
                && decision.choose.is_some()
                && !by_way.iter().any(|way| join.sources.iter().all(|source| way[*source]));
            judged[index] = true;
            let names =
                |nodes: &[usize]| listed(nodes.iter().map(|node| graph.nodes[*node].name.as_str()));
            problems.push(tell(
                &place(&places[index]),
                &whence(graph, decision, way),
                (&names(&there), &names(&missing)),
                never,
            ));
        }
    }
}

fn tell(path: &[&str], whence: &str, (there, missing): (&str, &str), never: bool) -> Diagnostic {
    let help = "let the ways meet in one node before the join, or join only what always runs";
    if never {
        let message = format!(
            "this join can never fire: its sources are on different ways of a choice ({whence} {there} runs and {missing} does not)"
        );
        return Diagnostic::error("join-never", path, message).help(help);
    }
    let message =
        format!("{whence} {there} runs and {missing} does not: this join would wait for ever");
    Diagnostic::warning("join-maybe", path, message).help(help)
}

/// The nodes that run to success when `decision` goes `way` each time.
fn taken(shape: &Shape, decision: &Decision, way: usize) -> Vec<bool> {
    let fails = decision.choose.is_none() && way == 1;
    let mut reached = shape.reached(|node, group| {
        if node != decision.node {
            return true;
        }
        match (decision.choose, group) {
            (Some(choose), Group::Choice(this, line)) if this == choose => line == way,
            (Some(_), _) => true,
            (None, Group::OnError) => fails,
            (None, _) => !fails,
        }
    });
    if let (true, Some(node)) = (fails, decision.node) {
        reached[node] = false;
    }
    reached
}

/// The way of a decision in words.
fn whence(graph: &Graph, decision: &Decision, way: usize) -> String {
    let name = decision.node.map_or("start", |node| graph.nodes[node].name.as_str());
    let Some(choose) = decision.choose else {
        return format!("when `{name}` fails and goes to its `on_error`,");
    };
    let route = decision.node.map_or(&graph.start, |node| &graph.nodes[node].route);
    let line = route.choose.get(choose).and_then(|lines| lines.get(way));
    let to = line.map_or(&[][..], |line| &line.to);
    let to = match to {
        [] => "`end`".to_owned(),
        nodes => listed(nodes.iter().map(|node| graph.node(*node).name.as_str())),
    };
    format!("when the choice after `{name}` goes to {to},")
}

/// The positions in `edges:` of the joins, in their order.
fn places(graph: &Graph) -> Vec<String> {
    let edges = graph.file.edges.iter().enumerate();
    edges
        .filter(|(_, edge)| {
            matches!(edge, EdgeDef::Table(table) if matches!(table.from, Names::Many(_)))
        })
        .map(|(at, _)| at.to_string())
        .collect()
}

fn place(position: &str) -> [&str; 3] {
    ["edges", position, "from"]
}
