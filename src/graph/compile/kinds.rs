//! What each kind of node holds: jobs, interrupts, waits, calls of graphs, registered nodes.

use std::sync::Arc;

use serde_json::Value;

use super::Compiler;
use super::nodes::Place;
use crate::graph::check::Diagnostic;
use crate::graph::definition::{GraphRef, InterruptDef, JobDef, WaitDef, parse_duration};
use crate::graph::expr::Template;
use crate::graph::model::{
    ChannelIndex, Graph, InterruptTemplate, JobResources, JobTemplate, NodeKind, WaitTemplate,
};
use crate::graph::names;

/// The image of a job that names none.
const DEFAULT_IMAGE: &str = "sandbox/base";
/// Arguments of a job's command.
const MAX_COMMAND: usize = 256;

impl Compiler<'_> {
    pub(super) fn kind(&mut self, place: &Place<'_>) -> NodeKind {
        let def = place.def;
        if let Some(job) = &def.job {
            NodeKind::Job(self.job(place, job))
        } else if let Some(interrupt) = &def.interrupt {
            self.interrupt(place, interrupt)
        } else if let Some(wait) = &def.wait {
            self.wait(place, wait).map_or(NodeKind::Set, NodeKind::Wait)
        } else if let Some(reference) = &def.graph {
            self.subgraph(place, reference).unwrap_or(NodeKind::Set)
        } else if let Some(model) = &def.model {
            self.model_node(place, model)
        } else if let Some(tool) = &def.tool {
            self.tool_node(place, tool)
        } else if let Some(agent) = &def.agent {
            self.agent_node(place, agent).unwrap_or(NodeKind::Set)
        } else if let Some(name) = &def.use_name {
            self.use_node(place, name)
        } else {
            NodeKind::Set
        }
    }

    /// A template, or one that gives null where it does not compile: that was reported.
    fn template_or_null(&mut self, path: &[&str], json: &Value, vars: &[&str]) -> Template {
        self.template(path, json, vars).unwrap_or_else(|| Template::literal(Value::Null))
    }

    fn job(&mut self, place: &Place<'_>, job: &JobDef) -> JobTemplate {
        let command_path = place.path(&["job", "command"]);
        if job.command.is_empty() {
            let problem = Diagnostic::error("option", &command_path, "a job needs a command");
            self.report(problem.help("write command: [program, argument, ..]"));
        } else if job.command.len() > MAX_COMMAND {
            let message = format!("a command has at most {MAX_COMMAND} parts");
            self.report(Diagnostic::error("too-large", &command_path, message));
        }
        let mut command = Vec::with_capacity(job.command.len());
        for (at, part) in job.command.iter().enumerate() {
            let at = at.to_string();
            let path = place.path(&["job", "command", &at]);
            self.text_like(&path, part);
            command.push(self.template_or_null(&path, part, &place.vars));
        }
        let mut env = Vec::with_capacity(job.env.len());
        for (name, value) in job.env.sorted() {
            let path = place.path(&["job", "env", name]);
            if !names::is_identifier(name) {
                let message = format!("{name:?} is no name of an environment variable");
                self.report(Diagnostic::error("name", &path, message).on_key());
            }
            self.text_like(&path, value);
            env.push((name.to_owned(), self.template_or_null(&path, value, &place.vars)));
        }
        let stdin = job.stdin.as_ref().map(|stdin| {
            let path = place.path(&["job", "stdin"]);
            self.template_or_null(&path, &stdin.as_str().into(), &place.vars)
        });
        self.mounts(place, &job.mounts);
        if job.ok_exit_codes.as_ref().is_some_and(Vec::is_empty) {
            let path = place.path(&["job", "ok_exit_codes"]);
            let message = "without an exit code that is a success the job always fails";
            self.report(Diagnostic::error("option", &path, message));
        }
        JobTemplate {
            image: job.image.clone().unwrap_or_else(|| DEFAULT_IMAGE.into()),
            command,
            env,
            stdin,
            mounts: job.mounts.clone(),
            resources: self.resources(place, job),
            ok_exit_codes: job.ok_exit_codes.clone().unwrap_or_else(|| vec![0]),
        }
    }

    /// Reports what can never be text: an argument or a variable of a process is text or a number.
    fn text_like(&mut self, path: &[&str], value: &Value) {
        if matches!(value, Value::String(_) | Value::Number(_) | Value::Bool(_)) {
            return;
        }
        let message = "this must be text, a number or a boolean";
        self.report(Diagnostic::error("wrong-type", path, message));
    }

    fn mounts(&mut self, place: &Place<'_>, mounts: &[String]) {
        for (at, mount) in mounts.iter().enumerate() {
            if names::is_name(mount) && !mounts[..at].contains(mount) {
                continue;
            }
            let message = format!("{mount:?} is no name of a mount, or is there twice");
            let at = at.to_string();
            let path = place.path(&["job", "mounts", &at]);
            self.report(Diagnostic::error("name", &path, message));
        }
    }

    fn resources(&mut self, place: &Place<'_>, job: &JobDef) -> JobResources {
        let Some(def) = &job.resources else { return JobResources::default() };
        let mut zero = |key: &str, is_zero: bool| {
            if is_zero {
                let path = place.path(&["job", "resources", key]);
                let message = format!("`{key}` must be more than nothing, and within reason");
                self.report(Diagnostic::error("option", &path, message));
            }
        };
        zero("memory_mb", def.memory_mb == Some(0));
        zero("processes", def.processes == Some(0));
        zero("disk_mb", def.disk_mb == Some(0));
        let in_range = |cpus: f64| (0.001..=1024.0).contains(&cpus);
        zero("cpus", def.cpus.is_some_and(|cpus| !in_range(cpus)));
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "within 1 and 1,024,000"
        )]
        let millicpus =
            def.cpus.filter(|cpus| in_range(*cpus)).map(|cpus| (cpus * 1000.0).round() as u32);
        JobResources {
            memory_mb: def.memory_mb,
            processes: def.processes,
            millicpus,
            disk_mb: def.disk_mb,
        }
    }

    fn interrupt(&mut self, place: &Place<'_>, def: &InterruptDef) -> NodeKind {
        let ask = self.template_or_null(&place.path(&["interrupt", "ask"]), &def.ask, &place.vars);
        if let Some(schema) = &def.schema {
            self.validator(&place.path(&["interrupt", "schema"]), schema);
        }
        let expires = self.period(&place.path(&["interrupt", "expires"]), def.expires);
        NodeKind::Interrupt(InterruptTemplate { ask, schema: def.schema.clone(), expires })
    }

    fn wait(&mut self, place: &Place<'_>, def: &WaitDef) -> Option<WaitTemplate> {
        let mut fields: Vec<(&str, &String)> = Vec::new();
        fields.extend(def.duration.as_ref().map(|text| ("for", text)));
        fields.extend(def.until.as_ref().map(|text| ("until", text)));
        fields.extend(def.event.as_ref().map(|text| ("event", text)));
        let [(key, text)] = fields.as_slice() else {
            let message = "a `wait` has exactly one of `for`, `until` and `event`";
            self.report(Diagnostic::error("node-kind", &place.path(&["wait"]), message).on_key());
            return None;
        };
        if *key != "event" && def.timeout.is_some() {
            let message = "only a wait for an event has a `timeout`";
            let path = place.path(&["wait", "timeout"]);
            self.report(Diagnostic::error("option", &path, message).on_key());
        }
        let path = place.path(&["wait", key]);
        let template = self.template(&path, &text.as_str().into(), &place.vars)?;
        let literal = template.as_literal().and_then(Value::as_str);
        let complaint = match (*key, literal) {
            ("for", Some(text)) => parse_duration(text).err(),
            ("until", Some(text)) => chrono::DateTime::parse_from_rfc3339(text)
                .err()
                .map(|_| format!("{text:?} is no instant such as 2030-01-31T09:00:00Z")),
            ("event", Some("")) => Some("the event needs a name".into()),
            _ => None,
        };
        if let Some(complaint) = complaint {
            self.report(Diagnostic::error("option", &path, complaint));
        }
        Some(match *key {
            "for" => WaitTemplate::For(template),
            "until" => WaitTemplate::Until(template),
            _ => {
                let timeout = self.period(&place.path(&["wait", "timeout"]), def.timeout);
                WaitTemplate::Event { name: template, timeout }
            }
        })
    }

    fn subgraph(&mut self, place: &Place<'_>, reference: &GraphRef) -> Option<NodeKind> {
        let name = reference.name();
        let name_path: &[&str] = match reference {
            GraphRef::Name(_) => &["graph"],
            GraphRef::Call(_) => &["graph", "name"],
        };
        let Some(graph) = (self.subgraphs)(name) else {
            let message = format!("there is no graph `{name}`");
            self.report(Diagnostic::error("unknown-graph", &place.path(name_path), message));
            return None;
        };
        let mut input = Vec::new();
        if let GraphRef::Call(call) = reference {
            for (channel, value) in call.input.sorted() {
                let path = place.path(&["graph", "input", channel]);
                let template = self.template(&path, value, &place.vars);
                if let (Some(template), Some(known)) =
                    (template, self.input_of(&path, &graph, channel))
                {
                    self.literal_fits(&path, graph.channel(known), &template);
                    input.push((channel.to_owned(), template));
                }
            }
        }
        Some(NodeKind::Graph { graph: Arc::clone(&graph), input })
    }

    fn input_of(&mut self, path: &[&str], graph: &Graph, name: &str) -> Option<ChannelIndex> {
        let found = graph.find_channel(name).filter(|index| graph.input.contains(index));
        if found.is_none() {
            let message = format!("the graph `{}` has no input `{name}`", graph.name);
            let known = graph.input.iter().map(|index| graph.channel(*index).name.as_str());
            let problem = Diagnostic::error("unknown-channel", path, message).on_key();
            self.report(problem.suggest(name, known));
        }
        found
    }

    fn use_node(&mut self, place: &Place<'_>, name: &str) -> NodeKind {
        if !self.registered.iter().any(|known| known == name) {
            let message = format!("no node is registered as `{name}`");
            let problem = Diagnostic::error("unknown-use", &place.path(&["use"]), message)
                .suggest(name, self.registered.iter().map(String::as_str));
            self.report(problem);
        }
        let with = place.def.with.clone().unwrap_or(Value::Null);
        let with = self.template_or_null(&place.path(&["with"]), &with, &place.vars);
        NodeKind::Use { name: name.to_owned(), with }
    }
}
