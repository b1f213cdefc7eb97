//! A drawing as SVG, without a program or a font of the outside.

use std::fmt::Write as _;

use super::layout::{Layout, Rect, layout};
use super::{Drawing, DrawnNode, EdgeSort, fill, short};

/// The drawing as an SVG document.
#[must_use]
pub fn svg(drawing: &Drawing) -> String {
    let layout = layout(drawing, |node| label(&drawing.nodes[node]));
    let mut text = String::new();
    let (width, height) = (layout.width.ceil(), layout.height.ceil());
    let _ = writeln!(
        text,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-family="system-ui, sans-serif" font-size="13">
<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="#57606a"/></marker></defs>
<rect width="100%" height="100%" fill="#ffffff"/>"##
    );
    edges(&mut text, drawing, &layout);
    for (node, at) in drawing.nodes.iter().zip(&layout.boxes) {
        vertex(&mut text, node, *at);
    }
    text.push_str("</svg>\n");
    text
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
        boxed(x + 4.0, y - 4.0);
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
    let mut labels = String::new();
    for (edge, line) in drawing.edges.iter().zip(&layout.lines) {
        let dash = match edge.sort {
            EdgeSort::OnError => r#" stroke-dasharray="5 4""#,
            EdgeSort::Goto => r#" stroke-dasharray="2 4""#,
            _ => "",
        };
        let width = if edge.sort == EdgeSort::Join { 2.2 } else { 1.2 };
        let path = curve(line);
        let _ = writeln!(
            text,
            r##"<path d="{path}" fill="none" stroke="#57606a" stroke-width="{width}"{dash} marker-end="url(#arrow)"/>"##
        );
        if let (Some(label), [first, second, ..]) = (&edge.label, line.as_slice()) {
            // Near the first bend, where the ways have parted.
            let (x, y) = (first.0 * 0.35 + second.0 * 0.65, first.1 * 0.42 + second.1 * 0.58);
            let _ = writeln!(
                labels,
                r##"<text x="{x:.1}" y="{y:.1}" text-anchor="middle" font-size="11" fill="#57606a" stroke="#ffffff" stroke-width="4" paint-order="stroke">{}</text>"##,
                escaped(&short(label))
            );
        }
    }
    text.push_str(&labels);
}

/// A smooth line through the points, from the edge of the first box to the edge of the last.
fn curve(points: &[(f64, f64)]) -> String {
    const HALF: f64 = 18.0;
    let mut path = String::new();
    let last = points.len().saturating_sub(1);
    for (at, (x, y)) in points.iter().enumerate() {
        if at == 0 {
            let down = points.get(1).is_none_or(|next| next.1 > *y);
            let start = if down { y + HALF } else { *y };
            let _ = write!(path, "M{x:.1} {start:.1}");
            continue;
        }
        let before = points[at - 1];
        let from = match (at == 1, before.1 < *y) {
            (true, true) => before.1 + HALF,
            _ => before.1,
        };
        let to = match (at == last, before.1 < *y) {
            (true, true) => y - HALF - 1.0,
            (true, false) if before.1 > *y => y + HALF + 1.0,
            _ => *y,
        };
        let middle = f64::midpoint(from, to);
        let _ = write!(path, "C{:.1} {middle:.1} {x:.1} {middle:.1} {x:.1} {to:.1}", before.0);
    }
    path
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
