//! A drawing as Mermaid text.

use std::fmt::Write as _;

use super::{Drawing, EdgeSort, fill, short};

/// The drawing as a Mermaid flowchart.
#[must_use]
pub fn mermaid(drawing: &Drawing) -> String {
    let mut text = String::from("flowchart TD\n");
    let id = |name: &str| {
        let at = drawing.nodes.iter().position(|node| node.id == name).unwrap_or_default();
        format!("n{at}")
    };
    for node in &drawing.nodes {
        let mark = if node.for_each { " × each" } else { "" };
        let name = escaped(&format!("{}{mark}", node.name.trim_matches('_')));
        let (open, close) = match node.kind {
            "start" | "end" => ("([", "])"),
            "interrupt" => ("{{", "}}"),
            "wait" => ("(", ")"),
            "graph" => ("[[", "]]"),
            _ => ("[", "]"),
        };
        let _ = writeln!(text, "  {}{open}\"{name}\"{close}:::{}", id(&node.id), node.kind);
    }
    for edge in &drawing.edges {
        let arrow = match edge.sort {
            EdgeSort::OnError | EdgeSort::Goto => "-.->",
            EdgeSort::Join => "==>",
            EdgeSort::Plain | EdgeSort::Choice => "-->",
        };
        let label = edge.label.as_ref().map(|label| format!("|\"{}\"|", escaped(&short(label))));
        let label = label.unwrap_or_default();
        let _ = writeln!(text, "  {} {arrow}{label} {}", id(&edge.source), id(&edge.target));
    }
    for kind in ["start", "end", "set", "job", "interrupt", "wait", "graph", "use"] {
        if drawing.nodes.iter().any(|node| node.kind == kind) {
            let ink = if matches!(kind, "start" | "end") { "#fff" } else { "#1f2328" };
            // `end` is a word of Mermaid's own, so its class has another name.
            let class = if kind == "end" { "start" } else { kind };
            if kind != "end" {
                let _ = writeln!(
                    text,
                    "  classDef {class} fill:{},stroke:#57606a,color:{ink}",
                    fill(kind)
                );
            }
        }
    }
    text.replace(":::end\n", ":::start\n")
}

fn escaped(text: &str) -> String {
    text.replace('&', "#amp;").replace('"', "#quot;").replace('<', "#lt;").replace('>', "#gt;")
}
