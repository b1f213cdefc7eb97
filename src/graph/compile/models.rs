//! `model:`, `tool:` and `agent:`. An agent is a graph of the other two, made here.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::Compiler;
use super::nodes::Place;
use crate::graph::check::Diagnostic;
use crate::graph::definition::models::{AgentDef, ModelDef, SamplingDef, TextDef, ToolDef};
use crate::graph::expr::Template;
use crate::graph::model::{Effect, ModelTemplate, NodeKind, Sampling, ToolTarget, ToolTemplate};
use crate::graph::names::names_tool;

/// What graphs mean that name no model.
const DEFAULT_MODEL: &str = "default";
/// How often an answer that does not fit its schema is sent back, when the file does not say.
const DEFAULT_REPAIRS: u32 = 2;
/// The most of it.
const MAX_REPAIRS: u32 = 3;
/// Images of one message.
const MAX_IMAGES: usize = 16;
/// Patterns of tools in one list.
const MAX_PATTERNS: usize = 256;
/// Messages of an agent's model, when the file does not say.
const DEFAULT_TURNS: u32 = 20;
/// The most of them.
const MAX_TURNS: u32 = 1000;
/// Calls of an agent, when the file does not say.
const DEFAULT_CALLS: u32 = 100;
/// The most of them.
const MAX_CALLS: u32 = 10_000;
/// Calls of one agent under way at once.
const CALLS_AT_ONCE: u32 = 8;

impl Compiler<'_> {
    pub(super) fn model_node(&mut self, place: &Place<'_>, def: &ModelDef) -> NodeKind {
        if def.messages.is_none() && def.prompt.is_none() {
            let problem =
                Diagnostic::error("option", &place.path(&["model"]), "the model is asked nothing");
            self.report(problem.on_key().help("give it a `prompt`, or `messages: ${state.NAME}`"));
        }
        if def.images.len() > MAX_IMAGES {
            let path = place.path(&["model", "images"]);
            let message = format!("a message has at most {MAX_IMAGES} images");
            self.report(Diagnostic::error("too-large", &path, message));
        }
        if !def.images.is_empty() && def.prompt.is_none() {
            let path = place.path(&["model", "images"]);
            let message = "images go with a `prompt`, and there is none";
            self.report(Diagnostic::error("option", &path, message).on_key());
        }
        let repairs = def.repairs.unwrap_or(DEFAULT_REPAIRS);
        if repairs > MAX_REPAIRS {
            let message = format!("`repairs` is {repairs}, it must be 0 to {MAX_REPAIRS}");
            self.report(Diagnostic::error("option", &place.path(&["model", "repairs"]), message));
        }
        if let Some(schema) = &def.schema {
            self.validator(&place.path(&["model", "schema"]), schema);
        }
        let mut images = Vec::with_capacity(def.images.len());
        for (at, image) in def.images.iter().enumerate() {
            let at = at.to_string();
            let path = place.path(&["model", "images", &at]);
            images.extend(self.template(&path, image, &place.vars));
        }
        self.patterns(&place.path(&["model", "tools"]), &def.tools);
        let tool_choice = def.tool_choice.as_ref().and_then(|choice| {
            let path = place.path(&["model", "tool_choice"]);
            let template = self.template(&path, &choice.as_str().into(), &place.vars)?;
            if template.as_literal().is_some() {
                self.tool_choice(&path, choice, &def.tools);
            }
            Some(template)
        });
        NodeKind::Model(Box::new(ModelTemplate {
            model: def.model.clone().unwrap_or_else(|| DEFAULT_MODEL.to_owned()),
            system: self.text(place, &["model", "system"], def.system.as_ref()),
            messages: self.list_expr(place, &["model", "messages"], def.messages.as_deref()),
            prompt: self.text(place, &["model", "prompt"], def.prompt.as_ref()),
            images,
            tools: def.tools.clone(),
            tool_choice,
            schema: def.schema.clone(),
            repairs,
            sampling: self.sampling(place, "model", def.sampling.as_ref()),
        }))
    }

    fn sampling(&mut self, place: &Place<'_>, kind: &str, def: Option<&SamplingDef>) -> Sampling {
        let def = def.cloned().unwrap_or_default();
        for (key, value, most) in [("temperature", def.temperature, 2.0), ("top_p", def.top_p, 1.0)]
        {
            if value.is_some_and(|value| !(0.0..=most).contains(&value)) {
                let path = place.path(&[kind, "sampling", key]);
                let message = format!("`{key}` must be 0 to {most}");
                self.report(Diagnostic::error("option", &path, message));
            }
        }
        if def.max_tokens == Some(0) {
            let path = place.path(&[kind, "sampling", "max_tokens"]);
            self.report(Diagnostic::error("option", &path, "`max_tokens` must be at least 1"));
        }
        Sampling {
            temperature: def.temperature,
            top_p: def.top_p,
            max_tokens: def.max_tokens,
            seed: def.seed,
            stop: def.stop,
        }
    }

    /// A prompt, where one is written.
    fn text(
        &mut self,
        place: &Place<'_>,
        rest: &[&str],
        def: Option<&TextDef>,
    ) -> Option<Template> {
        let path = place.path(rest);
        match def? {
            TextDef::File(file) => {
                let message = format!("the text of {} was not read", file.file);
                self.report(Diagnostic::error("prompt-file", &path, message));
                None
            }
            TextDef::Text(text) => match Template::prompt(text, &place.vars) {
                Ok(template) => {
                    self.known_channels(&path, text, &template.references().channels);
                    Some(template)
                }
                Err(error) => {
                    self.expression_error(&path, error);
                    None
                }
            },
        }
    }

    /// One expression that gives a list, where one is written.
    fn list_expr(
        &mut self,
        place: &Place<'_>,
        rest: &[&str],
        source: Option<&str>,
    ) -> Option<Template> {
        let path = place.path(rest);
        let template = self.template(&path, &source?.into(), &place.vars)?;
        if template.as_expr().is_none() {
            let problem = Diagnostic::error("expression", &path, "this needs one expression");
            self.report(problem.help("write ${state.NAME}"));
        }
        Some(template)
    }

    /// Reports what is no `SERVER/TOOL` and no `SERVER/*`.
    fn patterns(&mut self, path: &[&str], patterns: &[String]) {
        if patterns.len() > MAX_PATTERNS {
            let message = format!("there are at most {MAX_PATTERNS} of them");
            self.report(Diagnostic::error("too-large", path, message));
        }
        for (at, pattern) in patterns.iter().enumerate() {
            let parts = pattern.split_once('/');
            if parts.is_some_and(|(server, tool)| !server.is_empty() && !tool.is_empty()) {
                continue;
            }
            let at = at.to_string();
            let mut path = path.to_vec();
            path.push(&at);
            let message = format!("{pattern:?} names no tool");
            let problem = Diagnostic::error("tool-name", &path, message);
            self.report(problem.help("write SERVER/TOOL, or SERVER/* for all tools of a server"));
        }
    }

    /// Reports a choice that no endpoint could be told.
    fn tool_choice(&mut self, path: &[&str], choice: &str, tools: &[String]) {
        let problem = match choice {
            "auto" | "none" => return,
            "required" if tools.is_empty() => "`required` needs `tools`".to_owned(),
            "required" => return,
            named => match named.split_once('/') {
                Some((server, tool))
                    if tools.iter().any(|pattern| names_tool(pattern, server, tool)) =>
                {
                    return;
                }
                Some(_) => format!("{named:?} is none of `tools`"),
                None => format!("{named:?} is no choice"),
            },
        };
        let problem = Diagnostic::error("option", path, problem);
        self.report(problem.help("write auto, none, required, or SERVER/TOOL of one of the tools"));
    }

    pub(super) fn tool_node(&mut self, place: &Place<'_>, def: &ToolDef) -> NodeKind {
        let named = def.server.is_some() || def.name.is_some() || def.arguments.is_some();
        let target = match (&def.server, &def.name, &def.call) {
            (Some(server), Some(name), None) => {
                let arguments = def.arguments.clone().unwrap_or_else(|| json!({}));
                let path = place.path(&["tool", "arguments"]);
                let is_object = arguments.is_object()
                    || arguments.as_str().is_some_and(|text| text.starts_with("${"));
                if !is_object {
                    let message = "the arguments of a tool are an object";
                    self.report(Diagnostic::error("wrong-type", &path, message));
                }
                let arguments = self.template(&path, &arguments, &place.vars);
                ToolTarget::Named {
                    server: server.clone(),
                    tool: name.clone(),
                    arguments: arguments.unwrap_or_else(|| Template::literal(json!({}))),
                }
            }
            (None, None, Some(call)) if !named => {
                let call = self.list_expr(place, &["tool", "call"], Some(call));
                if def.allow.is_empty() {
                    let path = place.path(&["tool", "call"]);
                    let message = "a call that a model made needs a list of what it may name";
                    let problem = Diagnostic::error("option", &path, message).on_key();
                    self.report(problem.help("write allow: [SERVER/TOOL, ..]"));
                }
                ToolTarget::Call(call.unwrap_or_else(|| Template::literal(Value::Null)))
            }
            _ => {
                let message = "a `tool` has `server` and `name`, or `call`";
                let path = place.path(&["tool"]);
                self.report(Diagnostic::error("option", &path, message).on_key());
                return NodeKind::Set;
            }
        };
        self.patterns(&place.path(&["tool", "allow"]), &def.allow);
        self.patterns(&place.path(&["tool", "approve"]), &def.approve);
        NodeKind::Tool(ToolTemplate {
            target,
            allow: def.allow.clone(),
            approve: def.approve.clone(),
            effect: place.def.effect.map(Effect::from),
        })
    }

    /// An agent, as the graph that it is.
    pub(super) fn agent_node(&mut self, place: &Place<'_>, def: &AgentDef) -> Option<NodeKind> {
        if def.prompt.is_none() && def.messages.is_none() {
            let problem =
                Diagnostic::error("option", &place.path(&["agent"]), "the agent is asked nothing");
            self.report(problem.on_key().help("give it a `prompt`, or `messages: ${state.NAME}`"));
        }
        self.patterns(&place.path(&["agent", "tools"]), &def.tools);
        self.patterns(&place.path(&["agent", "approve"]), &def.approve);
        if let Some(choice) = &def.tool_choice {
            self.tool_choice(&place.path(&["agent", "tool_choice"]), choice, &def.tools);
        }
        self.sampling(place, "agent", def.sampling.as_ref());
        if let Some(schema) = &def.schema {
            self.validator(&place.path(&["agent", "schema"]), schema);
        }
        let limits = def.limits.clone().unwrap_or_default();
        for (key, value, most) in [
            ("turns", limits.turns.unwrap_or(1), MAX_TURNS),
            ("calls", limits.calls.unwrap_or(1), MAX_CALLS),
        ] {
            if value == 0 || value > most {
                let path = place.path(&["agent", "limits", key]);
                let message = format!("`{key}` is {value}, it must be 1 to {most}");
                self.report(Diagnostic::error("option", &path, message));
            }
        }
        if limits.tokens == Some(0) {
            let path = place.path(&["agent", "limits", "tokens"]);
            self.report(Diagnostic::error("option", &path, "`tokens` must be at least 1"));
        }
        if limits.cost_usd.is_some_and(|cost| !cost.is_finite() || cost < 0.0) {
            let path = place.path(&["agent", "limits", "cost_usd"]);
            let message = "`cost_usd` must be a number that is not negative";
            self.report(Diagnostic::error("option", &path, message));
        }
        self.period(&place.path(&["agent", "limits", "duration"]), limits.duration);
        let mut input = Vec::new();
        for (channel, text) in [("system", &def.system), ("prompt", &def.prompt)] {
            let template = self.text(place, &["agent", channel], text.as_ref());
            input.extend(template.map(|template| (channel.to_owned(), template)));
        }
        let messages = self.list_expr(place, &["agent", "messages"], def.messages.as_deref());
        input.extend(messages.map(|template| ("messages".to_owned(), template)));
        if self.has_errors() {
            return None;
        }
        let file = agent_graph(place, def);
        let file = match serde_json::from_value(file) {
            Ok(file) => Arc::new(file),
            Err(err) => {
                let message = format!("the agent's graph cannot be made: {err}");
                self.report(Diagnostic::error("option", &place.path(&["agent"]), message));
                return None;
            }
        };
        let mut inner = Compiler::new(file, self.subgraphs, self.registry);
        let graph = inner.graph().filter(|_| !inner.has_errors());
        for problem in inner.problems.iter().filter(|problem| problem.is_error()) {
            let message = problem.message.clone();
            self.report(Diagnostic::error("option", &place.path(&["agent"]), message).on_key());
        }
        Some(NodeKind::Graph { graph: Arc::new(graph?), input })
    }
}

/// The file of an agent's graph: the model speaks, the tools that it asks for are called side by side, and so on.
fn agent_graph(place: &Place<'_>, def: &AgentDef) -> Value {
    let mut nodes = Map::new();
    let mut edges = Vec::new();
    if def.prompt.is_some() {
        let said = json!({ "messages": "${[{'type': 'human', 'content': state.prompt}]}" });
        nodes.insert("ask".to_owned(), json!({ "set": said }));
        edges.push(json!("start -> ask -> think"));
    } else {
        edges.push(json!("start -> think"));
    }
    nodes.insert("think".to_owned(), of_attempts(place, think(def)));
    if def.tools.is_empty() {
        edges.push(json!("think -> end"));
    } else {
        nodes.insert("act".to_owned(), of_attempts(place, act(def)));
        edges.push(json!("act -> think"));
        let mut choices = vec![json!({ "when": "size(state.calls) == 0", "to": "end" })];
        for (name, when) in stops(def) {
            choices.push(json!({ "when": when, "to": name }));
            edges.push(json!(format!("{name} -> end")));
            // Each call has an answer, so that the conversation can go on after the agent.
            let unanswered = "${state.calls.map(call, {'type': 'tool', 'tool_call_id': call.id, 'name': call.name, \
                              'id': state.messages[size(state.messages) - 1].id + '-' + call.id, 'status': 'error', \
                              'content': 'This call was not made: the agent has reached a limit.'})}";
            let set = json!({ "set": { "stopped": name, "messages": unanswered } });
            nodes.insert(name.to_owned(), set);
        }
        choices.push(json!({ "to": "act" }));
        edges.push(json!({ "from": "think", "choose": choices }));
    }
    json!({
        "name": "agent",
        "state": agent_state(),
        "input": ["system", "prompt", "messages"],
        "output": [
            "messages", "text", "json", "turns", "tool_calls", "input_tokens", "output_tokens", "cost_usd", "stopped",
        ],
        "limits": { "supersteps": u64::from(turns_of(def)) * 2 + 2 },
        "nodes": nodes,
        "edges": edges,
    })
}

fn turns_of(def: &AgentDef) -> u32 {
    def.limits.as_ref().and_then(|limits| limits.turns).unwrap_or(DEFAULT_TURNS)
}

/// Where an agent stops that has calls to make: the name of the limit, and when it is reached.
fn stops(def: &AgentDef) -> Vec<(&'static str, String)> {
    let limits = def.limits.clone().unwrap_or_default();
    let calls = limits.calls.unwrap_or(DEFAULT_CALLS);
    let mut stops = vec![
        ("turns", format!("state.turns >= {}", turns_of(def))),
        ("calls", format!("state.tool_calls + size(state.calls) > {calls}")),
    ];
    if let Some(tokens) = limits.tokens {
        stops.push(("tokens", format!("state.input_tokens + state.output_tokens >= {tokens}")));
    }
    if let Some(cost) = limits.cost_usd {
        stops.push(("cost", format!("state.cost_usd >= {cost:?}")));
    }
    if let Some(duration) = limits.duration {
        let milliseconds = duration.0.as_millis();
        stops.push(("duration", format!("state.now - state.began >= {milliseconds}")));
    }
    stops
}

fn think(def: &AgentDef) -> Value {
    let mut think = json!({
        "model": {
            "model": def.model.as_deref().unwrap_or(DEFAULT_MODEL),
            "messages": "${state.messages}",
            "tools": def.tools,
        },
        "set": {
            "messages": "${[output.message]}",
            // What cannot be called is answered like what can.
            "calls": "${output.tool_calls + output.invalid_tool_calls}",
            "turns": 1,
            "input_tokens": "${output.usage.input}",
            "output_tokens": "${output.usage.output}",
            "cost_usd": "${output.usage.cost_usd}",
            "text": "${output.text}",
            "json": "${output.json}",
            "began": "${output.at}",
            "now": "${output.at}",
        },
    });
    if def.system.is_some() {
        think["model"]["system"] = "{{ state.system }}".into();
    }
    if let Some(choice) = &def.tool_choice {
        // Later it has answers of tools: one that had to call again and again would never end.
        let choice = format!("${{state.turns == 0 ? {} : 'auto'}}", json!(choice));
        think["model"]["tool_choice"] = choice.into();
    }
    if let Some(schema) = &def.schema {
        think["model"]["schema"] = schema.clone();
    }
    if let Some(sampling) = &def.sampling {
        think["model"]["sampling"] = json!(sampling);
    }
    think
}

fn act(def: &AgentDef) -> Value {
    json!({
        "for_each": "${state.calls}",
        "as": "call",
        "max_parallel": CALLS_AT_ONCE,
        "tool": { "call": "${call}", "allow": def.tools, "approve": def.approve },
        "set": { "messages": "${[output.message]}", "tool_calls": 1 },
    })
}

/// What the node says of attempts holds for each turn and each call.
fn of_attempts(place: &Place<'_>, mut node: Value) -> Value {
    for (key, value) in [
        ("retry", place.def.retry.as_ref().map(|retry| json!(retry))),
        ("timeout", place.def.timeout.map(|timeout| json!(timeout))),
        ("effects", place.def.effects.map(|effects| json!(effects))),
    ] {
        if let Some(value) = value {
            node[key] = value;
        }
    }
    node
}

fn agent_state() -> Value {
    let counter = |kind: &str| json!({ "type": kind, "reduce": "sum", "default": 0 });
    json!({
        "system": { "type": "string", "default": "" },
        "prompt": { "type": "string", "default": "" },
        "messages": { "type": "array", "reduce": "messages" },
        "calls": { "type": "array", "default": [] },
        "turns": counter("integer"),
        "tool_calls": counter("integer"),
        "input_tokens": counter("integer"),
        "output_tokens": counter("integer"),
        "cost_usd": counter("number"),
        "text": { "type": "string", "default": "" },
        "json": { "default": null },
        "began": { "type": "integer", "reduce": "min" },
        "now": { "type": "integer", "default": 0 },
        "stopped": { "type": ["string", "null"], "default": null },
    })
}
