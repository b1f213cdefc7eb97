//! A drawing as SVG, without a program or a font of the outside.

use std::fmt::Write as _;

use super::layout::{Layout, Rect, layout};
use super::{Drawing, DrawnNode, EdgeSort, fill, short};

/// The drawing as an SVG document.
#[must_use]
pub fn svg(drawing: &Drawing) -> String {
    let layout = layout(drawing, |node| label(&drawing.nodes[node]));
    let labels = labels(drawing, &layout);
    // Labels beside the outermost lines may stand out of the layout.
    let left = labels.iter().map(|label| label.x - label.half).fold(0.0, f64::min).floor();
    let right = labels.iter().map(|label| label.x + label.half).fold(layout.width, f64::max).ceil();
    let (width, height) = (right - left, layout.height.ceil());
    let mut text = String::new();
    let _ = writeln!(
        text,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} 0 {width} {height}" width="{width}" height="{height}" font-family="system-ui, sans-serif" font-size="13">
<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="9" markerHeight="9" markerUnits="userSpaceOnUse" orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="#57606a"/></marker></defs>
<rect x="{left}" width="{width}" height="{height}" fill="#ffffff"/>"##
    );
    edges(&mut text, drawing, &layout);
    for (node, at) in drawing.nodes.iter().zip(&layout.boxes) {
        vertex(&mut text, node, *at);
    }
    for label in &labels {
        let _ = writeln!(
            text,
            r##"<text x="{:.1}" y="{:.1}" text-anchor="middle" font-size="11" fill="#57606a" stroke="#ffffff" stroke-width="4" paint-order="stroke">{}</text>"##,
            label.x,
            label.y,
            escaped(&label.text)
        );
    }
    text.push_str("</svg>\n");
    text
}

/// A label of an edge, with half of its width.
struct Label {
    x: f64,
    y: f64,
    half: f64,
    text: String,
}

fn labels(drawing: &Drawing, layout: &Layout) -> Vec<Label> {
    const HALF_CHAR: f64 = 3.2;
    let mut labels: Vec<Label> = Vec::new();
    for (edge, line) in drawing.edges.iter().zip(&layout.lines) {
        let (Some(label), [first, second, ..]) = (&edge.label, line.as_slice()) else { continue };
        let text = short(label);
        let half = HALF_CHAR * f64::from(u32::try_from(text.chars().count()).unwrap_or(u32::MAX));
        // Near the first bend, where the ways have parted; on the way back, beside it.
        let (x, mut y) = if goes_down(line) {
            (first.0 * 0.35 + second.0 * 0.65, first.1 * 0.42 + second.1 * 0.58)
        } else {
            (second.0, second.1 - 24.0)
        };
        while labels
            .iter()
            .any(|other| (other.y - y).abs() < 12.0 && (other.x - x).abs() < other.half + half)
        {
            y += 13.0;
        }
        labels.push(Label { x, y, half, text });
    }
    labels
}

/// Whether a line leads to a later layer; the others are ways back.
fn goes_down(line: &[(f64, f64)]) -> bool {
    matches!((line.first(), line.last()), (Some(first), Some(last)) if first.1 < last.1)
}

fn label(node: &DrawnNode) -> String {
    let name = match node.kind {
        "start" | "end" => node.kind.to_owned(),
        kind => format!("{} · {kind}", node.name),
    };
    if node.for_each { format!("{name} ×n") } else { name }
}

fn vertex(text: &mut String, node: &DrawnNode, at: Rect) {
    let (x, y) = (at.x - at.width / 2.0, at.y - at.height / 2.0);
    let terminal = matches!(node.kind, "start" | "end");
    let (radius, ink) = match node.kind {
        "start" | "end" | "wait" => (18, if terminal { "#ffffff" } else { "#1f2328" }),
        _ => (5, "#1f2328"),
    };
    let mut boxed = |x: f64, y: f64| {
        let _ = writeln!(
            text,
            r##"<rect x="{x:.1}" y="{y:.1}" width="{:.1}" height="{:.1}" rx="{radius}" fill="{}" stroke="#57606a"/>"##,
            at.width,
            at.height,
            fill(node.kind)
        );
    };
    if node.for_each {
        boxed(x + 4.0, y + 4.0);
    }
    boxed(x, y);
    let _ = writeln!(
        text,
        r#"<text x="{:.1}" y="{:.1}" text-anchor="middle" fill="{ink}">{}</text>"#,
        at.x,
        at.y + 4.5,
        escaped(&label(node))
    );
}

fn edges(text: &mut String, drawing: &Drawing, layout: &Layout) {
    let half = |id: &str| {
        let at = drawing.nodes.iter().position(|node| node.id == id).unwrap_or_default();
        layout.boxes.get(at).map_or(0.0, |at| at.width / 2.0)
    };
    for (edge, line) in drawing.edges.iter().zip(&layout.lines) {
        let dash = match edge.sort {
            EdgeSort::OnError => r#" stroke-dasharray="5 4""#,
            EdgeSort::Goto => r#" stroke-dasharray="2 4""#,
            _ => "",
        };
        let width = if edge.sort == EdgeSort::Join { 2.2 } else { 1.2 };
        let path = if goes_down(line) {
            down(line)
        } else {
            back(line, half(&edge.source), half(&edge.target))
        };
        let _ = writeln!(
            text,
            r##"<path d="{path}" fill="none" stroke="#57606a" stroke-width="{width}"{dash} marker-end="url(#arrow)"/>"##
        );
    }
}

/// A smooth line downwards, from the bottom of the first box to the top of the last.
fn down(points: &[(f64, f64)]) -> String {
    const HALF: f64 = 18.0;
    let last = points.len().saturating_sub(1);
    let mut path = String::new();
    let mut from = (0.0, 0.0);
    for (at, (x, y)) in points.iter().enumerate() {
        let y = match at {
            0 => y + HALF,
            at if at == last => y - HALF,
            _ => *y,
        };
        if at == 0 {
            let _ = write!(path, "M{x:.1} {y:.1}");
        } else {
            let middle = f64::midpoint(from.1, y);
            let _ = write!(path, "C{:.1} {middle:.1} {x:.1} {middle:.1} {x:.1} {y:.1}", from.0);
        }
        from = (*x, y);
    }
    path
}

/// A way back: out of the side of the first box, up its lane, into the side of the last.
fn back(points: &[(f64, f64)], half_first: f64, half_last: f64) -> String {
    const OFF: f64 = 7.0;
    let ([(x, y), (lane, _), ..], [.., (last_lane, _), (to_x, to_y)]) = (points, points) else {
        return String::new();
    };
    let side = |centre: f64, half: f64, lane: f64| centre + half * (lane - centre).signum();
    let mut path = format!("M{:.1} {:.1}", side(*x, half_first, *lane), y + OFF);
    let _ = write!(path, "C{lane:.1} {:.1} {lane:.1} {y:.1} {lane:.1} {y:.1}", y + OFF);
    let mut from = (*lane, *y);
    for (next_x, next_y) in points.iter().skip(2).take(points.len().saturating_sub(3)) {
        let middle = f64::midpoint(from.1, *next_y);
        let _ = write!(
            path,
            "C{:.1} {middle:.1} {next_x:.1} {middle:.1} {next_x:.1} {next_y:.1}",
            from.0
        );
        from = (*next_x, *next_y);
    }
    let into = side(*to_x, half_last, *last_lane);
    let high = to_y - OFF;
    let _ = write!(path, "C{:.1} {high:.1} {:.1} {high:.1} {into:.1} {high:.1}", from.0, from.0);
    path
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
