//! Two writers of one `replace` channel in one superstep: an error at run time, found here.
//!
//! Supersteps go in lock-step, so which nodes may run in the same one is a walk over pairs: two targets
//! of one fan-out are a pair, and whatever follows both members of a pair is one. Where all edges of
//! the walk are unconditional the two certainly meet: an error. Where a decision lies on the way, they
//! may: a warning. A join is assumed to fire late enough: not before its other sources had their turn.

use std::collections::{HashSet, VecDeque};

use super::Diagnostic;
use super::flow::{at, is_exclusive};
use super::shape::{Group, Shape};
use crate::graph::model::Graph;

/// Pairs that are walked over; a graph with more is spared these warnings.
const MAX_PAIRS: usize = 500_000;

pub(super) fn check(graph: &Graph, shape: &Shape, problems: &mut Vec<Diagnostic>) {
    fan_out_writers(graph, problems);
    let writers = exclusive_writers(graph);
    if writers.iter().all(|(_, nodes)| nodes.len() < 2) {
        return;
    }
    let certain = Walk::new(shape, true).run();
    let possible = Walk::new(shape, false).run();
    for (channel, nodes) in writers {
        for (position, first) in nodes.iter().enumerate() {
            for second in &nodes[position + 1..] {
                let pair = (*first.min(second), *first.max(second));
                if certain.contains(&pair) || possible.contains(&pair) {
                    problems.push(tell(graph, &channel, pair, certain.contains(&pair)));
                }
            }
        }
    }
}

fn tell(graph: &Graph, channel: &str, (a, b): (usize, usize), certain: bool) -> Diagnostic {
    let (a, b) = (&graph.nodes[a].name, &graph.nodes[b].name);
    let path = ["nodes", b.as_str(), "set", channel];
    let help = "give the channel a reducer, or put the nodes one after the other";
    if certain {
        let message = format!("`{a}` and `{b}` write `{channel}` in the same superstep");
        return Diagnostic::error("two-writers", &path, message).on_key().help(help);
    }
    let message = format!("`{a}` and `{b}` may write `{channel}` in the same superstep");
    Diagnostic::warning("maybe-two-writers", &path, message).on_key().help(help)
}

/// Nodes that write one exclusive channel once for each item.
fn fan_out_writers(graph: &Graph, problems: &mut Vec<Diagnostic>) {
    for (index, node) in graph.nodes.iter().enumerate() {
        if node.for_each.is_none() {
            continue;
        }
        for (channel, _) in &node.set {
            let channel = graph.channel(*channel);
            if is_exclusive(&channel.reducer) {
                let [nodes, name] = at(graph, index);
                let path = [nodes, name, "set", channel.name.as_str()];
                let message = format!(
                    "every item writes `{}`, which takes one write in a superstep",
                    channel.name
                );
                problems.push(
                    Diagnostic::error("fan-out-writer", &path, message)
                        .on_key()
                        .help("give the channel a reducer, such as `reduce: append`"),
                );
            }
        }
    }
}

/// Exclusive channels and the nodes that set them.
fn exclusive_writers(graph: &Graph) -> Vec<(String, Vec<usize>)> {
    let exclusive = graph.channels.iter().enumerate().filter(|(_, one)| is_exclusive(&one.reducer));
    exclusive
        .map(|(index, channel)| {
            let sets =
                |node: usize| graph.nodes[node].set.iter().any(|(set, _)| set.0 as usize == index);
            (channel.name.clone(), (0..graph.nodes.len()).filter(|node| sets(*node)).collect())
        })
        .collect()
}

/// The walk over pairs of nodes that run in one superstep.
struct Walk<'s> {
    shape: &'s Shape,
    /// Only over edges that are always taken.
    certain: bool,
    /// What may run after each node.
    later: Vec<Vec<bool>>,
    pairs: HashSet<(usize, usize)>,
    queue: VecDeque<(usize, usize)>,
}

impl<'s> Walk<'s> {
    fn new(shape: &'s Shape, certain: bool) -> Self {
        let later = if certain || shape.joins.is_empty() {
            Vec::new()
        } else {
            (0..shape.len()).map(|node| shape.reached_from(node)).collect()
        };
        Self { shape, certain, later, pairs: HashSet::new(), queue: VecDeque::new() }
    }

    fn run(mut self) -> HashSet<(usize, usize)> {
        let shape = self.shape;
        self.fan_out(&shape.start);
        for next in &shape.next {
            self.fan_out(next);
        }
        for join in &shape.joins {
            for (position, a) in join.to.iter().enumerate() {
                for b in &join.to[position + 1..] {
                    self.add(*a, *b);
                }
            }
        }
        while let Some((a, b)) = self.queue.pop_front() {
            if self.pairs.len() > MAX_PAIRS {
                return HashSet::new();
            }
            let (after_a, after_b) = (self.after(a, b), self.after(b, a));
            for next_a in &after_a {
                for next_b in &after_b {
                    self.add(*next_a, *next_b);
                }
            }
        }
        self.pairs
    }

    fn add(&mut self, a: usize, b: usize) {
        let pair = (a.min(b), a.max(b));
        if a != b && self.pairs.insert(pair) {
            self.queue.push_back(pair);
        }
    }

    /// Pairs of targets that one activation can trigger together.
    fn fan_out(&mut self, next: &[(Group, usize)]) {
        for (position, (group, a)) in next.iter().enumerate() {
            for (other, b) in &next[position + 1..] {
                if together(*group, *other, self.certain) {
                    self.add(*a, *b);
                }
            }
        }
    }

    /// What may run in the superstep after the one in which `node` ran together with `partner`.
    fn after(&self, node: usize, partner: usize) -> Vec<usize> {
        let edges = self.shape.next[node].iter();
        let mut after: Vec<usize> = edges
            .filter(|(group, _)| !self.certain || *group == Group::Always)
            .map(|(_, to)| *to)
            .collect();
        if !self.certain {
            for join in &self.shape.joins_of[node] {
                let join = &self.shape.joins[*join];
                let still_due = |source: &usize| {
                    *source != partner && *source != node && self.later[partner][*source]
                };
                if !join.sources.iter().any(still_due) {
                    after.extend(&join.to);
                }
            }
        }
        after
    }
}

/// Whether two ways of one node are taken together.
fn together(a: Group, b: Group, certain: bool) -> bool {
    match (a, b) {
        (Group::Always, Group::Always) => true,
        // One line with several targets: all of them run, whenever it is taken.
        (Group::Choice(one, line), Group::Choice(other, same)) if one == other => line == same,
        (Group::OnError, _) | (_, Group::OnError) => false,
        _ => !certain,
    }
}
