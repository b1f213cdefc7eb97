use super::*;
use crate::graph::compile::NoNodes;
use crate::graph::load::{Catalog, load_all};

const INNER: &str = "name: inner\nnodes:\n  x: { wait: { for: 1s } }\nedges: [start -> x -> end]\n";
const OUTER: &str = "name: outer\nstate: { n: { type: integer, reduce: sum } }\nnodes:\n  a: { set: { n: 1 } }\n  b: { graph: inner }\n  c: { for_each: \"${[1, 2]}\", job: { command: [\"true\"] }, on_error: d }\n  d: { interrupt: { ask: \"go on?\" } }\nedges:\n  - start -> a\n  - { from: a, choose: [{ when: state.n > 1 && state.n < 3, to: [b, c] }, { to: end }] }\n  - b -> d\n  - c -> d -> end\n";

fn catalog() -> Catalog {
    let loaded = load_all(&[("i", INNER), ("o", OUTER)], &NoNodes);
    assert!(!loaded.has_errors(), "{:?}", loaded.diagnostics);
    loaded.catalog
}

#[test]
fn a_drawing_has_every_node_and_edge_with_its_sort() {
    let drawing = Drawing::of(&catalog().get("outer").unwrap(), 0);
    let nodes: Vec<String> = drawing
        .nodes
        .iter()
        .map(|node| format!("{} {} {}", node.id, node.kind, node.for_each))
        .collect();
    assert_eq!(
        nodes,
        [
            "__start__ start false",
            "a set false",
            "b graph false",
            "c job true",
            "d interrupt false",
            "__end__ end false"
        ]
    );
    let edges: Vec<String> = drawing
        .edges
        .iter()
        .map(|edge| {
            format!(
                "{} -> {} {:?} {}",
                edge.source,
                edge.target,
                edge.sort,
                edge.label.as_deref().unwrap_or("")
            )
            .trim_end()
            .to_owned()
        })
        .collect();
    assert_eq!(
        edges,
        [
            "__start__ -> a Plain",
            "a -> b Choice state.n > 1 && state.n < 3",
            "a -> c Choice state.n > 1 && state.n < 3",
            "a -> __end__ Choice otherwise",
            "b -> d Plain",
            "c -> d Plain",
            "c -> d OnError on error",
            "d -> __end__ Plain",
        ]
    );
}

#[test]
fn xray_draws_a_subgraph_open_under_the_name_of_its_caller() {
    let drawing = Drawing::of(&catalog().get("outer").unwrap(), 1);
    let ids: Vec<&str> = drawing.nodes.iter().map(|node| node.id.as_str()).collect();
    assert_eq!(ids, ["__start__", "a", "b:__start__", "b:x", "b:__end__", "c", "d", "__end__"]);
    let edge = |source: &str, target: &str| {
        drawing.edges.iter().any(|edge| edge.source == source && edge.target == target)
    };
    assert!(edge("a", "b:__start__") && edge("b:__start__", "b:x") && edge("b:__end__", "d"));
    for edge in &drawing.edges {
        assert!(
            ids.contains(&edge.source.as_str()) && ids.contains(&edge.target.as_str()),
            "{edge:?}"
        );
    }
}

#[test]
fn mermaid_text_escapes_labels_and_styles_kinds() {
    let text = mermaid(&Drawing::of(&catalog().get("outer").unwrap(), 0));
    for line in [
        "flowchart TD",
        "  n0([\"start\"]):::start",
        "  n3[\"c × each\"]:::job",
        "  n1 -->|\"state.n #gt; 1 #amp;#amp; state.n #lt; 3\"| n2",
        "  n3 -.->|\"on error\"| n4",
        "  classDef interrupt fill:#fbe3b5,stroke:#57606a,color:#1f2328",
    ] {
        assert!(text.lines().any(|found| found == line), "{line:?} is not in:\n{text}");
    }
    assert!(!text.contains(":::end"), "{text}");
}

#[test]
fn svg_is_well_formed_and_keeps_boxes_apart() {
    let drawing = Drawing::of(&catalog().get("outer").unwrap(), 1);
    let text = svg(&drawing);
    assert!(text.starts_with("<svg ") && text.ends_with("</svg>\n"));
    assert!(text.contains("state.n &gt; 1 &amp;&amp; state.n &lt; 3"), "{text}");
    let placed = layout::layout(&drawing, |node| drawing.nodes[node].name.clone());
    for (at, a) in placed.boxes.iter().enumerate() {
        assert!(a.x - a.width / 2.0 >= 0.0 && a.x + a.width / 2.0 <= placed.width, "{a:?}");
        assert!(a.y - a.height / 2.0 >= 0.0 && a.y + a.height / 2.0 <= placed.height, "{a:?}");
        for b in &placed.boxes[at + 1..] {
            let apart =
                (a.x - b.x).abs() >= (a.width + b.width) / 2.0 || (a.y - b.y).abs() >= a.height;
            assert!(apart, "{a:?} and {b:?} overlap");
        }
    }
}

#[test]
fn a_graph_with_loops_is_laid_out() {
    let text = "name: l\nstate: { n: { type: integer } }\nnodes: { a: { set: { n: 1 } }, b: { set: { n: 2 } } }\nedges:\n  - start -> a -> b\n  - { from: b, choose: [{ when: state.n > 1, to: a }, { when: state.n < 0, to: b }, { to: end }] }\n";
    let loaded = load_all(&[("l", text)], &NoNodes);
    let drawing = Drawing::of(&loaded.catalog.get("l").unwrap(), 0);
    assert!(svg(&drawing).contains("otherwise"));
}
