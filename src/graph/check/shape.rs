//! The shape of a graph as the checks look at it: who may run after whom, and by which decision.

use crate::graph::model::{Graph, Node, NodeIndex, Route};

/// Why a node leads to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Group {
    /// Always, after a success.
    Always,
    /// By a line of a `choose`: which one of the node's, and which line.
    Choice(usize, usize),
    /// After the attempts are spent.
    OnError,
    /// By the node's own code.
    Goto,
}

/// A place that decides between ways: one is taken each time a run comes by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Decision {
    /// The node, or `None` for `start`.
    pub(super) node: Option<usize>,
    /// Which `choose` of the route; `None` is the decision between success and `on_error`.
    pub(super) choose: Option<usize>,
    /// The number of ways.
    pub(super) ways: usize,
}

/// A join: its sources and what it leads to.
#[derive(Debug)]
pub(super) struct Barrier {
    pub(super) sources: Vec<usize>,
    pub(super) to: Vec<usize>,
}

/// Edges by node, `start` apart.
#[derive(Debug)]
pub(super) struct Shape {
    /// Where each node leads to, joins apart.
    pub(super) next: Vec<Vec<(Group, usize)>>,
    pub(super) start: Vec<(Group, usize)>,
    pub(super) joins: Vec<Barrier>,
    /// Joins by source.
    pub(super) joins_of: Vec<Vec<usize>>,
    /// Whether a way from the node leads to `end`.
    ends: Vec<bool>,
    pub(super) decisions: Vec<Decision>,
}

impl Shape {
    pub(super) fn of(graph: &Graph) -> Self {
        let joins: Vec<Barrier> = graph
            .joins
            .iter()
            .map(|join| Barrier { sources: positions(&join.sources), to: positions(&join.to) })
            .collect();
        let joins_of: Vec<Vec<usize>> = graph
            .nodes
            .iter()
            .map(|node| node.joins.iter().map(|join| join.0 as usize).collect())
            .collect();
        let ends = graph.nodes.iter().map(|node| ends(graph, node)).collect();
        let mut decisions = choices(None, &graph.start);
        for (index, node) in graph.nodes.iter().enumerate() {
            decisions.extend(choices(Some(index), &node.route));
            if node.on_error.is_some() {
                decisions.push(Decision { node: Some(index), choose: None, ways: 2 });
            }
        }
        Self {
            next: graph.nodes.iter().map(edges_of).collect(),
            start: route_edges(&graph.start),
            joins,
            joins_of,
            ends,
            decisions,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.next.len()
    }

    /// What `start` leads to, over the edges that `open` (of a node, or `start`) lets pass. A join lets
    /// pass when all its sources are reached and finish.
    pub(super) fn reached(&self, open: impl Fn(Option<usize>, Group) -> bool) -> Vec<bool> {
        let mut reached = vec![false; self.len()];
        let mut arrived = vec![0_usize; self.joins.len()];
        let mut queue: Vec<usize> = Vec::new();
        let mut visit = |node: usize, queue: &mut Vec<usize>| {
            if !std::mem::replace(&mut reached[node], true) {
                queue.push(node);
            }
        };
        for (group, to) in &self.start {
            if open(None, *group) {
                visit(*to, &mut queue);
            }
        }
        while let Some(node) = queue.pop() {
            for (group, to) in &self.next[node] {
                if open(Some(node), *group) {
                    visit(*to, &mut queue);
                }
            }
            if !open(Some(node), Group::Always) {
                continue;
            }
            for join in &self.joins_of[node] {
                arrived[*join] += 1;
                if arrived[*join] == self.joins[*join].sources.len() {
                    for to in &self.joins[*join].to {
                        visit(*to, &mut queue);
                    }
                }
            }
        }
        reached
    }

    /// What some path from `start` leads to, where a join counts from each of its sources: a join that
    /// cannot fire is told as such, and not again as a node that nothing leads to.
    pub(super) fn led_to(&self) -> Vec<bool> {
        let mut led = vec![false; self.len()];
        let mut queue: Vec<usize> = self.start.iter().map(|(_, to)| *to).collect();
        while let Some(node) = queue.pop() {
            if !std::mem::replace(&mut led[node], true) {
                queue.extend(self.after(node));
            }
        }
        led
    }

    /// What may run after `node`, over any edge; a join counts from each of its sources.
    pub(super) fn reached_from(&self, node: usize) -> Vec<bool> {
        let mut reached = vec![false; self.len()];
        let mut queue = vec![node];
        while let Some(node) = queue.pop() {
            for to in self.after(node) {
                if !std::mem::replace(&mut reached[to], true) {
                    queue.push(to);
                }
            }
        }
        reached
    }

    /// The nodes that may directly follow, joins included.
    pub(super) fn after(&self, node: usize) -> impl Iterator<Item = usize> + '_ {
        let plain = self.next[node].iter().map(|(_, to)| *to);
        plain
            .chain(self.joins_of[node].iter().flat_map(|join| self.joins[*join].to.iter().copied()))
    }

    /// Whether `end` can be reached from each node.
    pub(super) fn can_end(&self) -> Vec<bool> {
        let mut before: Vec<Vec<usize>> = vec![Vec::new(); self.len()];
        for node in 0..self.len() {
            for to in self.after(node) {
                before[to].push(node);
            }
        }
        let mut can = self.ends.clone();
        let mut queue: Vec<usize> = (0..self.len()).filter(|node| can[*node]).collect();
        while let Some(node) = queue.pop() {
            for from in &before[node] {
                if !std::mem::replace(&mut can[*from], true) {
                    queue.push(*from);
                }
            }
        }
        can
    }

    /// Whether an edge leads from one of `nodes` to another node.
    pub(super) fn leaves_set(&self, nodes: &[usize]) -> bool {
        nodes.iter().any(|node| self.after(*node).any(|to| !nodes.contains(&to)))
    }

    /// Nodes that certainly run at most once in a run: on no circle, and triggered by one thing alone.
    pub(super) fn at_most_once(&self) -> Vec<bool> {
        let mut triggers: Vec<Vec<(Option<usize>, usize)>> = vec![Vec::new(); self.len()];
        let mut add = |to: usize, from: Option<usize>, what: usize| {
            if !triggers[to].contains(&(from, what)) {
                triggers[to].push((from, what));
            }
        };
        // Lines of one `choose` exclude each other, and an error excludes a success.
        let kind = |group: &Group| match group {
            Group::Choice(choose, _) => choose + 2,
            Group::Always | Group::OnError => 0,
            Group::Goto => 1,
        };
        for (group, to) in &self.start {
            add(*to, None, kind(group));
        }
        for node in 0..self.len() {
            for (group, to) in &self.next[node] {
                add(*to, Some(node), kind(group));
            }
        }
        let far = usize::MAX / 2;
        for (at, join) in self.joins.iter().enumerate() {
            for to in &join.to {
                for source in &join.sources {
                    add(*to, Some(*source), far + at);
                }
            }
        }
        let single = |node: usize| match triggers[node].as_slice() {
            [] | [_] => true,
            [(_, first), rest @ ..] => *first >= far && rest.iter().all(|(_, what)| what == first),
        };
        // A node whose trigger runs once runs once; a circle never gets there, since it waits for itself.
        let mut once = vec![false; self.len()];
        loop {
            let before = once.iter().filter(|known| **known).count();
            for node in 0..self.len() {
                let sure = single(node)
                    && triggers[node].iter().all(|(from, _)| from.is_none_or(|from| once[from]));
                once[node] = once[node] || sure;
            }
            if once.iter().filter(|known| **known).count() == before {
                return once;
            }
        }
    }
}

fn positions(nodes: &[NodeIndex]) -> Vec<usize> {
    nodes.iter().map(|node| node.0 as usize).collect()
}

fn route_edges(route: &Route) -> Vec<(Group, usize)> {
    let mut edges: Vec<(Group, usize)> =
        route.to.iter().map(|to| (Group::Always, to.0 as usize)).collect();
    for (choose, lines) in route.choose.iter().enumerate() {
        for (line, choice) in lines.iter().enumerate() {
            edges.extend(choice.to.iter().map(|to| (Group::Choice(choose, line), to.0 as usize)));
        }
    }
    edges
}

fn edges_of(node: &Node) -> Vec<(Group, usize)> {
    let mut edges = route_edges(&node.route);
    edges.extend(node.on_error.iter().map(|to| (Group::OnError, to.0 as usize)));
    edges.extend(node.may_goto.iter().map(|to| (Group::Goto, to.0 as usize)));
    edges
}

fn choices(node: Option<usize>, route: &Route) -> Vec<Decision> {
    let lines = route.choose.iter().enumerate();
    lines
        .map(|(choose, lines)| Decision { node, choose: Some(choose), ways: lines.len() })
        .collect()
}

fn ends(graph: &Graph, node: &Node) -> bool {
    let route = &node.route;
    let by_choice = route.choose.iter().flatten().any(|choice| choice.to.is_empty());
    let by_join = node.joins.iter().any(|join| graph.joins[join.0 as usize].to.is_empty());
    // A node that chooses by its code may choose nothing, where no edge says what follows.
    let by_code = !node.may_goto.is_empty() && route.to.is_empty() && route.choose.is_empty();
    route.ends || by_choice || by_join || by_code
}
