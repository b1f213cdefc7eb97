//! What is found in files with `model`, `tool` and `agent` nodes.

use super::tests::{check_graph, edges};

#[track_caller]
fn check(node: &str, expected: &[&str]) {
    check_graph(&format!("  a: {node}"), &edges(&["start -> a -> end"]), expected);
}

#[test]
fn a_model_is_asked_something_within_its_limits() {
    check(
        "{ model: { model: x } }",
        &[
            "g:7:8 <model> error[option]: the model is asked nothing (give it a `prompt`, or `messages: ${state.NAME}`)",
        ],
    );
    check(
        "{ model: { prompt: hi, images: [x], repairs: 4 } }",
        &["g:7:51 <4> error[option]: `repairs` is 4, it must be 0 to 3"],
    );
    check(
        r#"{ model: { messages: "${state.list}", images: ["${state.m}"] } }"#,
        &["g:7:44 <images> error[option]: images go with a `prompt`, and there is none"],
    );
    check(
        r#"{ model: { messages: "${state.list} and more" } }"#,
        &[
            r#"g:7:27 <"${state.list} and more"> error[expression]: this needs one expression (write ${state.NAME})"#,
        ],
    );
    check(
        r#"{ model: { prompt: "{{ state.x }}" } }"#,
        &["g:7:35 <x> error[unknown-channel]: the state has no channel `x` (did you mean `n`?)"],
    );
    check(
        r#"{ model: { prompt: "{{ state.n" } }"#,
        &[
            "g:7:35 <n> error[expression]: line 1 of the prompt: unexpected end of input, expected end of variable block",
        ],
    );
    check(
        "{ model: { prompt: { file: nowhere.md }, system: { file: ../up.md } } }",
        &[
            "g:7:33 <nowhere.md> error[prompt-file]: nowhere.md cannot be read: No such file or directory (os error 2)",
            "g:7:63 <../up.md> error[prompt-file]: ../up.md does not lie beside the graph file or below it",
        ],
    );
    check(
        "{ model: { prompt: hi, schema: { type: 7 } } }",
        &[
            "g:7:45 <7> error[schema]: this is no JSON Schema: 7 is not valid under any of the schemas listed in the 'anyOf' keyword",
        ],
    );
    check(
        r#"{ model: { prompt: hi, tools: [files, "files/", "/read", "files/*"] } }"#,
        &[
            r#"g:7:37 <files> error[tool-name]: "files" names no tool (write SERVER/TOOL, or SERVER/* for all tools of a server)"#,
            r#"g:7:44 <"files/"> error[tool-name]: "files/" names no tool (write SERVER/TOOL, or SERVER/* for all tools of a server)"#,
            r#"g:7:54 <"/read"> error[tool-name]: "/read" names no tool (write SERVER/TOOL, or SERVER/* for all tools of a server)"#,
        ],
    );
    for kind in ["model", "agent"] {
        let node = |rest: &str| format!("{{ {kind}: {{ prompt: hi, tool_choice: {rest} }} }}");
        for (rest, problem) in [
            ("required", "<required> error[option]: `required` needs `tools`"),
            ("always, tools: [s/*]", "<always> error[option]: \"always\" is no choice"),
            ("s/x, tools: [s/y, t/*]", "<s/x> error[option]: \"s/x\" is none of `tools`"),
        ] {
            let help = "(write auto, none, required, or SERVER/TOOL of one of the tools)";
            check(&node(rest), &[&format!("g:7:42 {problem} {help}")]);
        }
        for rest in ["none", "s/x, tools: [s/*]", "required, tools: [s/x]"] {
            check(&node(rest), &[]);
        }
    }
    check(
        "{ model: { prompt: hi, sampling: { temperature: 3, top_p: -1, max_tokens: 0 } } }",
        &[
            "g:7:54 <3> error[option]: `temperature` must be 0 to 2",
            "g:7:64 <-1> error[option]: `top_p` must be 0 to 1",
            "g:7:80 <0> error[option]: `max_tokens` must be at least 1",
        ],
    );
    check(
        "{ model: { prompt: hi, color: red } }",
        &[
            "g:7:29 <color> error[unknown-key]: there is no key `color` here (there are `model`, `system`, `messages`, `prompt`, `images`, `tools`, `tool_choice`, `schema`, `repairs`, `sampling`)",
        ],
    );
    check(
        "{ agent: { model: x } }",
        &[
            "g:7:8 <agent> error[option]: the agent is asked nothing (give it a `prompt`, or `messages: ${state.NAME}`)",
        ],
    );
    check(
        "{ model: { prompt: hi }, tool: { server: s, name: x } }",
        &[
            "g:7:31 <tool> error[node-kind]: `a` is `model` and `tool`; a node has one kind (make two nodes of it)",
        ],
    );
}

#[test]
fn a_tool_is_named_by_the_file_or_by_a_model() {
    check(
        "{ tool: { server: s } }",
        &["g:7:8 <tool> error[option]: a `tool` has `server` and `name`, or `call`"],
    );
    check(
        r#"{ tool: { server: s, name: x, call: "${state.m}" } }"#,
        &["g:7:8 <tool> error[option]: a `tool` has `server` and `name`, or `call`"],
    );
    check(
        r#"{ tool: { call: "${state.m}" } }"#,
        &[
            "g:7:16 <call> error[option]: a call that a model made needs a list of what it may name (write allow: [SERVER/TOOL, ..])",
        ],
    );
    check(
        r#"{ tool: { call: "${state.m}", allow: ["s/*"], arguments: {} } }"#,
        &["g:7:8 <tool> error[option]: a `tool` has `server` and `name`, or `call`"],
    );
    check(
        r#"{ tool: { call: "x ${state.m}", allow: [s] } }"#,
        &[
            r#"g:7:22 <"x ${state.m}"> error[expression]: this needs one expression (write ${state.NAME})"#,
            r#"g:7:46 <s> error[tool-name]: "s" names no tool (write SERVER/TOOL, or SERVER/* for all tools of a server)"#,
        ],
    );
    check(
        "{ tool: { server: s, name: x, arguments: [1] } }",
        &["g:7:47 <[1]> error[wrong-type]: the arguments of a tool are an object"],
    );
    check(
        "{ tool: { server: s, name: x, approve: [x] } }",
        &[
            r#"g:7:46 <x> error[tool-name]: "x" names no tool (write SERVER/TOOL, or SERVER/* for all tools of a server)"#,
        ],
    );
}

#[test]
fn an_agent_is_a_model_with_tools_and_limits() {
    check(
        "{ agent: { model: x } }",
        &[
            "g:7:8 <agent> error[option]: the agent is asked nothing (give it a `prompt`, or `messages: ${state.NAME}`)",
        ],
    );
    check(
        r#"{ agent: { prompt: "{{ state.x }}", tools: [s], approve: [x] } }"#,
        &[
            "g:7:35 <x> error[unknown-channel]: the state has no channel `x` (did you mean `n`?)",
            r#"g:7:50 <s> error[tool-name]: "s" names no tool (write SERVER/TOOL, or SERVER/* for all tools of a server)"#,
            r#"g:7:64 <x> error[tool-name]: "x" names no tool (write SERVER/TOOL, or SERVER/* for all tools of a server)"#,
        ],
    );
    check(
        "{ agent: { prompt: hi, limits: { turns: 0, calls: 10001 } } }",
        &[
            "g:7:46 <0> error[option]: `turns` is 0, it must be 1 to 1000",
            "g:7:56 <10001> error[option]: `calls` is 10001, it must be 1 to 10000",
        ],
    );
    check(
        "{ agent: { prompt: hi, limits: { turns: 1001, tokens: 0, cost_usd: -1 } } }",
        &[
            "g:7:46 <1001> error[option]: `turns` is 1001, it must be 1 to 1000",
            "g:7:60 <0> error[option]: `tokens` must be at least 1",
            "g:7:73 <-1> error[option]: `cost_usd` must be a number that is not negative",
        ],
    );
    check(
        "{ agent: { prompt: hi, schema: { type: 7 }, sampling: { temperature: 3 } } }",
        &[
            "g:7:45 <7> error[schema]: this is no JSON Schema: 7 is not valid under any of the schemas listed in the 'anyOf' keyword",
            "g:7:75 <3> error[option]: `temperature` must be 0 to 2",
        ],
    );
    check(
        "{ agent: { prompt: hi }, effect: pure }",
        &[
            "g:7:31 <effect> error[option]: `effect` does not go with this kind of node (other kinds know what repeating them does)",
        ],
    );
    check(
        r#"{ agent: { prompt: hi, limits: { turns: 1000, calls: 10000, tokens: 5, cost_usd: 0.5, duration: 1h }, tools: ["s/*"] }, retry: { attempts: 3 }, timeout: 1m, effects: retry }"#,
        &[],
    );
    check(
        r#"{ agent: { messages: "${state.list}", system: "You {{ run.graph }}", schema: { type: object } } }"#,
        &[],
    );
    check(
        "{ set: { n: 1 }, effects: ask }",
        &[
            "g:7:23 <effects> error[option]: `effects` does not go with this kind of node (only nodes that act on the world have unknown outcomes)",
        ],
    );
}
