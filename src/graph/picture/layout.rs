//! A layered layout: each node below those that lead to it, crossings kept few, edges through lanes.
//!
//! Edges that lead back up (loops) are turned round for the layering. An edge over several layers gets a
//! waypoint in each of them, so that it runs between the nodes and not through them.

use std::collections::HashMap;

use super::Drawing;

const CHAR: f64 = 7.4;
const PAD: f64 = 28.0;
const HEIGHT: f64 = 36.0;
const GAP_X: f64 = 34.0;
const GAP_Y: f64 = 62.0;
const MARGIN: f64 = 24.0;
/// Sweeps that reorder the layers.
const SWEEPS: usize = 8;

/// Where everything is.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) width: f64,
    pub(super) height: f64,
    /// By the position of the node in the drawing.
    pub(super) boxes: Vec<Rect>,
    /// By the position of the edge: points from the source to the target.
    pub(super) lines: Vec<Vec<(f64, f64)>>,
}

/// The centre and the size of a box.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Rect {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) width: f64,
    pub(super) height: f64,
}

/// A place in a layer: a node, or where an edge passes.
#[derive(Debug, Clone, Copy)]
struct Slot {
    width: f64,
    x: f64,
    layer: usize,
}

pub(super) fn layout(drawing: &Drawing, label: impl Fn(usize) -> String) -> Layout {
    let at: HashMap<&str, usize> =
        drawing.nodes.iter().enumerate().map(|(index, node)| (node.id.as_str(), index)).collect();
    let edges: Vec<(usize, usize)> = drawing
        .edges
        .iter()
        .filter_map(|edge| Some((*at.get(edge.source.as_str())?, *at.get(edge.target.as_str())?)))
        .collect();
    let layers = layers(drawing.nodes.len(), &edges);
    let mut slots: Vec<Slot> = (0..drawing.nodes.len())
        .map(|node| Slot { width: width_of(&label(node)), x: 0.0, layer: layers[node] })
        .collect();
    let paths = paths(&edges, &mut slots);
    let order = order(&mut slots, &paths);
    place(&mut slots, &order, &paths);
    let rows = order.len();
    let y = |layer: usize| MARGIN + HEIGHT / 2.0 + count(layer) * (HEIGHT + GAP_Y);
    let right = slots.iter().map(|slot| slot.x + slot.width / 2.0).fold(0.0, f64::max);
    let boxes = slots[..drawing.nodes.len()]
        .iter()
        .map(|slot| Rect { x: slot.x, y: y(slot.layer), width: slot.width, height: HEIGHT })
        .collect();
    let lines = paths
        .iter()
        .map(|path| path.iter().map(|slot| (slots[*slot].x, y(slots[*slot].layer))).collect())
        .collect();
    let height = 2.0 * MARGIN + count(rows) * HEIGHT + count(rows.saturating_sub(1)) * GAP_Y;
    Layout { width: right + MARGIN, height, boxes, lines }
}

fn width_of(label: &str) -> f64 {
    count(label.chars().count()).mul_add(CHAR, PAD)
}

#[expect(clippy::cast_precision_loss, reason = "counts of what is drawn are small")]
fn count(count: usize) -> f64 {
    count as f64
}

/// The layer of each node: the longest way from the first node, loops cut where they lead back.
fn layers(nodes: usize, edges: &[(usize, usize)]) -> Vec<usize> {
    let mut next: Vec<Vec<usize>> = vec![Vec::new(); nodes];
    for (from, to) in edges {
        next[*from].push(*to);
    }
    // Depth first without recursion; what is still open when met again is a way back.
    let mut state = vec![0_u8; nodes];
    let mut finished = Vec::with_capacity(nodes);
    for root in 0..nodes {
        let mut stack = vec![(root, 0)];
        while let Some((node, child)) = stack.pop() {
            if child == 0 && std::mem::replace(&mut state[node], 1) != 0 {
                continue;
            }
            match next[node].get(child) {
                Some(to) => {
                    stack.push((node, child + 1));
                    if state[*to] == 0 {
                        stack.push((*to, 0));
                    }
                }
                None => {
                    state[node] = 2;
                    finished.push(node);
                }
            }
        }
    }
    let mut rank = vec![0; nodes];
    for (position, node) in finished.iter().rev().enumerate() {
        rank[*node] = position;
    }
    let mut layer = vec![0; nodes];
    for node in finished.iter().rev() {
        for to in &next[*node] {
            if rank[*to] > rank[*node] {
                layer[*to] = layer[*to].max(layer[*node] + 1);
            }
        }
    }
    layer
}

/// The slots that each edge passes, its ends included; new ones are made between distant layers.
fn paths(edges: &[(usize, usize)], slots: &mut Vec<Slot>) -> Vec<Vec<usize>> {
    let mut paths = Vec::with_capacity(edges.len());
    for (from, to) in edges {
        let (first, last) = (slots[*from].layer, slots[*to].layer);
        let mut path = vec![*from];
        let between: Vec<usize> = if first < last {
            (first + 1..last).collect()
        } else {
            // A way back passes beside everything, its own ends included.
            (last..=first).rev().collect()
        };
        for layer in between {
            slots.push(Slot { width: 10.0, x: 0.0, layer });
            path.push(slots.len() - 1);
        }
        path.push(*to);
        paths.push(path);
    }
    paths
}

/// Neighbours of each slot in the layer above and in the layer below.
fn neighbours(slots: &[Slot], paths: &[Vec<usize>]) -> [Vec<Vec<usize>>; 2] {
    let mut above = vec![Vec::new(); slots.len()];
    let mut below = vec![Vec::new(); slots.len()];
    for pair in paths.iter().flat_map(|path| path.windows(2)) {
        let [a, b] = pair else { continue };
        let (upper, lower) = if slots[*a].layer < slots[*b].layer { (*a, *b) } else { (*b, *a) };
        above[lower].push(upper);
        below[upper].push(lower);
    }
    [above, below]
}

/// The slots of each layer from left to right, by the mean position of their neighbours.
fn order(slots: &mut [Slot], paths: &[Vec<usize>]) -> Vec<Vec<usize>> {
    let depth = slots.iter().map(|slot| slot.layer + 1).max().unwrap_or(0);
    let mut order: Vec<Vec<usize>> = vec![Vec::new(); depth];
    for (index, slot) in slots.iter().enumerate() {
        order[slot.layer].push(index);
    }
    let near = neighbours(slots, paths);
    let mut position: Vec<f64> = vec![0.0; slots.len()];
    for row in &order {
        for (at, slot) in row.iter().enumerate() {
            position[*slot] = count(at);
        }
    }
    for sweep in 0..SWEEPS {
        let near = &near[sweep % 2];
        let rows: Vec<usize> =
            if sweep % 2 == 0 { (0..depth).collect() } else { (0..depth).rev().collect() };
        for row in rows {
            let mean = |slot: usize| match near[slot].as_slice() {
                [] => position[slot],
                around => {
                    around.iter().map(|other| position[*other]).sum::<f64>() / count(around.len())
                }
            };
            let mut keyed: Vec<(f64, usize)> =
                order[row].iter().map(|slot| (mean(*slot), *slot)).collect();
            keyed.sort_by(|a, b| a.0.total_cmp(&b.0));
            order[row] = keyed.into_iter().map(|(_, slot)| slot).collect();
            for (at, slot) in order[row].iter().enumerate() {
                position[*slot] = count(at);
            }
        }
    }
    order
}

/// Gives each slot its x: as near as may be to its neighbours, in order and without overlap.
fn place(slots: &mut [Slot], order: &[Vec<usize>], paths: &[Vec<usize>]) {
    let near = neighbours(slots, paths);
    for row in order {
        pack(slots, row, &vec![0.0; row.len()]);
    }
    for sweep in 0..SWEEPS * 2 {
        let near = &near[sweep % 2];
        let rows: Vec<&Vec<usize>> =
            if sweep % 2 == 0 { order.iter().collect() } else { order.iter().rev().collect() };
        for row in rows {
            let wish: Vec<f64> = row
                .iter()
                .map(|slot| match near[*slot].as_slice() {
                    [] => slots[*slot].x,
                    around => {
                        around.iter().map(|other| slots[*other].x).sum::<f64>()
                            / count(around.len())
                    }
                })
                .collect();
            pack(slots, row, &wish);
        }
    }
    let left = slots.iter().map(|slot| slot.x - slot.width / 2.0).fold(f64::INFINITY, f64::min);
    for slot in slots {
        slot.x += MARGIN - left;
    }
}

/// Puts a row where it wishes to be, pushed apart: from the left and from the right, and their mean.
fn pack(slots: &mut [Slot], row: &[usize], wish: &[f64]) {
    let apart =
        |a: usize, b: usize, slots: &[Slot]| (slots[a].width + slots[b].width) / 2.0 + GAP_X;
    let mut from_left = wish.to_vec();
    for at in 1..row.len() {
        let least = from_left[at - 1] + apart(row[at - 1], row[at], slots);
        from_left[at] = from_left[at].max(least);
    }
    let mut from_right = wish.to_vec();
    for at in (0..row.len().saturating_sub(1)).rev() {
        let most = from_right[at + 1] - apart(row[at], row[at + 1], slots);
        from_right[at] = from_right[at].min(most);
    }
    for (at, slot) in row.iter().enumerate() {
        slots[*slot].x = f64::midpoint(from_left[at], from_right[at]);
    }
}
