//! Checks of a graph's shape: what cannot be reached, what cannot end, what nothing ever writes.
//!
//! Joins have rules of their own ([`super::joins`]), and so have concurrent writes
//! ([`super::writers`]); all three look at the graph through [`Shape`].

use std::collections::HashSet;

use super::shape::Shape;
use super::{Diagnostic, joins, writers};
use crate::graph::expr::{References, Template};
use crate::graph::model::{Graph, Node, NodeKind, Reducer, ToolTarget, WaitTemplate};
use crate::graph::names::listed;

/// Problems of a compiled graph; its topology is judged only when all its edges are known.
pub(crate) fn check(graph: &Graph, edges_are_known: bool) -> Vec<Diagnostic> {
    let mut problems = Vec::new();
    if edges_are_known {
        let shape = Shape::of(graph);
        let reached = shape.reached(|_, _| true);
        unreachable(graph, &shape.led_to(), &mut problems);
        dead_ends(graph, &mut problems);
        no_exit(graph, &shape, &reached, &mut problems);
        joins::check(graph, &shape, &reached, &mut problems);
        writers::check(graph, &shape, &mut problems);
    }
    channels(graph, &mut problems);
    problems
}

/// The path of a node in the file.
pub(super) fn at(graph: &Graph, node: usize) -> [&str; 2] {
    ["nodes", &graph.nodes[node].name]
}

fn unreachable(graph: &Graph, reached: &[bool], problems: &mut Vec<Diagnostic>) {
    for (index, node) in graph.nodes.iter().enumerate() {
        if !reached[index] {
            let message = format!("no path from `start` leads to `{}`", node.name);
            problems.push(
                Diagnostic::error("unreachable", &at(graph, index), message)
                    .on_key()
                    .help("add an edge to it, or remove it"),
            );
        }
    }
}

fn dead_ends(graph: &Graph, problems: &mut Vec<Diagnostic>) {
    for (index, node) in graph.nodes.iter().enumerate() {
        let route = &node.route;
        let goes_on = route.ends
            || !route.to.is_empty()
            || !route.choose.is_empty()
            || !node.joins.is_empty()
            || !node.may_goto.is_empty();
        if !goes_on {
            let message = format!("no edge leads from `{}`", node.name);
            problems.push(
                Diagnostic::error("dead-end", &at(graph, index), message)
                    .on_key()
                    .help(format!("write `{} -> end` when the run should end there", node.name)),
            );
        }
    }
}

/// Reports each circle that no edge leaves, once.
fn no_exit(graph: &Graph, shape: &Shape, reached: &[bool], problems: &mut Vec<Diagnostic>) {
    let leaves = shape.can_end();
    let mut told: HashSet<usize> = HashSet::new();
    for index in 0..graph.nodes.len() {
        if !reached[index] || leaves[index] || told.contains(&index) {
            continue;
        }
        let around = shape.reached_from(index);
        if !around[index] {
            continue; // Not on a circle itself: what it leads to is.
        }
        let circle: Vec<usize> = (0..graph.nodes.len())
            .filter(|other| around[*other] && shape.reached_from(*other)[index])
            .collect();
        told.extend(&circle);
        if shape.leaves_set(&circle) {
            continue; // A later circle is the one without an exit.
        }
        let names = listed(circle.iter().map(|node| graph.nodes[*node].name.as_str()));
        let message = format!("no path leads out of the circle of {names}");
        problems.push(
            Diagnostic::error("no-exit", &at(graph, index), message)
                .on_key()
                .help("add a `choose` with a line that leaves it"),
        );
    }
}

/// Channels that are read and never set, and channels that are neither read nor a result.
fn channels(graph: &Graph, problems: &mut Vec<Diagnostic>) {
    let mut read = HashSet::new();
    for (path, references) in expressions(graph) {
        for channel in &references.channels {
            read.insert(channel.clone());
            let Some(index) = graph.find_channel(channel) else { continue };
            let set = graph.input.contains(&index)
                || graph.channel(index).default.is_some()
                || graph.nodes.iter().any(|node| node.set.iter().any(|(set, _)| *set == index));
            if !set {
                let path: Vec<&str> = path.iter().map(String::as_str).collect();
                let message = format!("`{channel}` is read here, and nothing ever sets it");
                problems.push(
                    Diagnostic::warning("never-written", &path, message)
                        .help("set it in a node, name it in `input`, or give it a default"),
                );
            }
        }
    }
    let sees_all = graph.nodes.iter().any(|node| matches!(node.kind, NodeKind::Use { .. }));
    if sees_all || graph.file.output.is_none() {
        return;
    }
    for (index, channel) in (0_u32..).zip(&graph.channels) {
        let is_output = graph.output.iter().any(|output| output.0 == index);
        if !is_output && !read.contains(&channel.name) {
            let message = format!("nothing reads `{}`, and it is no output", channel.name);
            let path = ["state", channel.name.as_str()];
            problems.push(Diagnostic::warning("unused-channel", &path, message).on_key());
        }
    }
}

/// Every expression of the graph: the path of what holds it, and what it reads.
fn expressions(graph: &Graph) -> Vec<(Vec<String>, &References)> {
    let mut found = Vec::new();
    for node in &graph.nodes {
        let path = |rest: &[&str]| -> Vec<String> {
            ["nodes", &node.name].iter().chain(rest).map(|step| (*step).to_owned()).collect()
        };
        if let Some(for_each) = &node.for_each {
            found.push((path(&["for_each"]), for_each.items.references()));
        }
        for (channel, template) in &node.set {
            let name = &graph.channel(*channel).name;
            found.push((path(&["set", name]), template.references()));
        }
        found.extend(
            of_kind(node).into_iter().map(|(key, template)| (path(key), template.references())),
        );
    }
    let routes = graph.nodes.iter().map(|node| &node.route).chain([&graph.start]);
    for choice in routes.flat_map(|route| route.choose.iter().flatten()) {
        if let Some(when) = &choice.when {
            found.push((vec!["edges".to_owned()], when.references()));
        }
    }
    found
}

fn of_kind(node: &Node) -> Vec<(&'static [&'static str], &Template)> {
    match &node.kind {
        NodeKind::Set => Vec::new(),
        NodeKind::Job(job) => {
            let command = job.command.iter().map(|part| (&["job", "command"][..], part));
            let env = job.env.iter().map(|(_, value)| (&["job", "env"][..], value));
            let stdin = job.stdin.iter().map(|stdin| (&["job", "stdin"][..], stdin));
            command.chain(env).chain(stdin).collect()
        }
        NodeKind::Interrupt(interrupt) => vec![(&["interrupt", "ask"], &interrupt.ask)],
        NodeKind::Wait(WaitTemplate::For(template)) => vec![(&["wait", "for"], template)],
        NodeKind::Wait(WaitTemplate::Until(template)) => vec![(&["wait", "until"], template)],
        NodeKind::Wait(WaitTemplate::Event { name, .. }) => vec![(&["wait", "event"], name)],
        NodeKind::Graph { input, .. } => {
            input.iter().map(|(_, template)| (&["graph", "input"][..], template)).collect()
        }
        NodeKind::Model(model) => {
            let texts = [
                (&["model", "system"][..], &model.system),
                (&["model", "messages"], &model.messages),
                (&["model", "prompt"], &model.prompt),
            ];
            let texts = texts.into_iter().filter_map(|(key, text)| Some((key, text.as_ref()?)));
            let images = model.images.iter().map(|image| (&["model", "images"][..], image));
            texts.chain(images).collect()
        }
        NodeKind::Tool(tool) => match &tool.target {
            ToolTarget::Named { arguments, .. } => vec![(&["tool", "arguments"], arguments)],
            ToolTarget::Call(call) => vec![(&["tool", "call"], call)],
        },
        NodeKind::Use { with, .. } => vec![(&["with"], with)],
    }
}

/// Whether writing the channel twice in one superstep is an error.
pub(super) fn is_exclusive(reducer: &Reducer) -> bool {
    matches!(reducer, Reducer::Replace)
}
