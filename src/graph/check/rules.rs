//! The list of rules: every code that a diagnostic may carry, and why the rule exists.

/// A rule of the checker.
#[derive(Debug)]
pub struct Rule {
    /// The code in diagnostics.
    pub code: &'static str,
    /// What it finds, and why that matters.
    pub why: &'static str,
}

/// The rule of that code.
#[must_use]
pub fn find(code: &str) -> Option<&'static Rule> {
    RULES.iter().find(|rule| rule.code == code)
}

const fn rule(code: &'static str, why: &'static str) -> Rule {
    Rule { code, why }
}

/// All rules, in the order of the documentation.
pub static RULES: &[Rule] = &[
    rule("syntax", "The text is no YAML or JSON, or not one document."),
    rule("too-large", "The file, its nesting, or the number of its parts is over a limit."),
    rule("duplicate-key", "A key is written twice in one map; one of the two would be lost."),
    rule("unknown-key", "A key that the format does not have; most are misspelled."),
    rule("missing-key", "A key that must be written is not."),
    rule("wrong-type", "A value has another type than the format asks for."),
    rule("name", "A name is malformed, reserved, or used twice."),
    rule("no-nodes", "A graph without nodes does nothing."),
    rule("node-kind", "A node has two kinds, none, or one that this version does not run."),
    rule("option", "An option that does not go with the node's kind, or is out of its range."),
    rule("schema", "A JSON Schema of a channel or an answer is invalid."),
    rule("schema-keyword", "A word that JSON Schema does not know has no effect there."),
    rule("default", "The default of a channel breaks the channel's own schema."),
    rule("reducer", "The reducer is unknown, or does not fit the channel's type."),
    rule(
        "prompt-file",
        "The file of a prompt cannot be read, is too long, or does not lie beside the graph.",
    ),
    rule("tool-name", "A tool is named as SERVER/TOOL, or SERVER/* for all of a server."),
    rule("expression", "An expression does not compile, or uses what is not in scope."),
    rule(
        "constant-condition",
        "A condition is always the same, so one side of the choice never happens.",
    ),
    rule("unknown-channel", "A channel is named that the state does not have."),
    rule("unknown-node", "A node is named that the graph does not have."),
    rule("unknown-graph", "A graph is called that was not loaded."),
    rule("unknown-use", "No node of that name is registered."),
    rule("graph-cycle", "Graphs call each other in a circle and would never end."),
    rule("duplicate-graph", "Two files define a graph of the same name."),
    rule("value-type", "A literal breaks the schema of the channel that it is written to."),
    rule("edge", "An edge is malformed, or goes from or to where none can."),
    rule("duplicate-edge", "The same edge is written twice."),
    rule("no-start", "No edge leads from `start`, so nothing would run."),
    rule("unreachable", "No path from `start` leads to the node."),
    rule("dead-end", "A node has no way on; write `-> end` when the run should end there."),
    rule("no-exit", "A cycle that no path leaves: the run can only stop at its limit."),
    rule(
        "choose-no-default",
        "Every line of a `choose` has a condition, so it can come to nothing.",
    ),
    rule("choose-unreachable", "A line after one without a condition is never tried."),
    rule(
        "join-never",
        "A join whose sources never all run: it could not fire, and the run would fail.",
    ),
    rule(
        "join-maybe",
        "A join one of whose sources can be bypassed: on that path the run would fail.",
    ),
    rule("join-empty", "A join of one source, or that names a source twice, is no join."),
    rule("two-writers", "Two nodes certainly write one `replace` channel in the same superstep."),
    rule("maybe-two-writers", "Two nodes may write one `replace` channel in the same superstep."),
    rule("fan-out-writer", "Every item of a `for_each` writes one `replace` channel."),
    rule("never-written", "An expression reads a channel that nothing ever sets."),
    rule("unused-channel", "A channel that nothing reads and no output names."),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_and_every_function_is_documented() {
        let text = include_str!("../../../docs/graph-files.md");
        for rule in RULES {
            let line = format!("| `{}` | {} |", rule.code, rule.why);
            assert!(text.contains(&line), "docs/graph-files.md lacks {line}");
        }
        for function in crate::graph::expr::FUNCTIONS {
            let line = format!("| `{}` | {} |", function.name, function.usage);
            assert!(text.contains(&line), "docs/graph-files.md lacks {line}");
        }
    }

    #[test]
    fn codes_are_used_once() {
        for (at, rule) in RULES.iter().enumerate() {
            assert!(!RULES[..at].iter().any(|other| other.code == rule.code), "{}", rule.code);
        }
    }
}
