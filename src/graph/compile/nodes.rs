//! The nodes: their kinds, what goes with which kind, and what each expression may see.
//!
//! In scope are, besides `state`: `run` and `env` everywhere; the item in a `for_each` node; `output` in
//! the `set` of a node that has one; `error` in a node that some `on_error` leads to.

use std::time::Duration;

use super::{Called, Compiler};
use crate::graph::check::Diagnostic;
use crate::graph::definition::{GraphFile, NodeDef, Ordered, Period, RetryDef};
use crate::graph::expr::Template;
use crate::graph::model::{
    Channel, ChannelIndex, Effect, ForEach, Node, NodeIndex, NodeKind, OnUnknown, Retry, Route,
};
use crate::graph::names;

/// The name of an item that the file does not name.
const DEFAULT_ITEM: &str = "item";
/// The most that `attempts` may ask for.
const MAX_ATTEMPTS: u32 = 100;
/// The most that `max_parallel` may ask for.
const MAX_PARALLEL: u32 = 10_000;
/// Names that an item must not take.
const TAKEN: [&str; 6] = ["state", "output", "run", "env", "error", "now"];

/// One node under compilation: where it stands and what its expressions see.
pub(super) struct Place<'f> {
    pub(super) name: &'f str,
    pub(super) def: &'f NodeDef,
    pub(super) vars: Vec<&'f str>,
}

impl Place<'_> {
    pub(super) fn path<'p>(&'p self, rest: &[&'p str]) -> Vec<&'p str> {
        let mut path = vec!["nodes", self.name];
        path.extend(rest);
        path
    }
}

impl Compiler<'_> {
    /// All nodes without their edges, and the graphs that they call.
    pub(super) fn all_nodes(
        &mut self,
        file: &GraphFile,
        channels: &[Channel],
    ) -> (Vec<Node>, Called) {
        let handlers: Vec<&str> =
            file.nodes.iter().filter_map(|(_, def)| def.on_error.as_deref()).collect();
        let mut called = Vec::new();
        let mut nodes = Vec::with_capacity(file.nodes.len());
        for (name, def) in file.nodes.sorted() {
            let mut vars = vec!["run", "env"];
            if handlers.contains(&name) {
                vars.push("error");
            }
            let mut place = Place { name, def, vars };
            let node = self.one_node(&mut place, channels);
            // An agent's graph is made of this file's own words, and has no file of its own.
            if let NodeKind::Graph { graph, .. } = &node.kind
                && def.agent.is_none()
            {
                called.push((graph.name.clone(), graph.hash));
            }
            nodes.push(node);
        }
        (nodes, called)
    }

    fn one_node<'f>(&mut self, place: &mut Place<'f>, channels: &[Channel]) -> Node {
        let (name, def) = (place.name, place.def);
        self.name(&["nodes", name], "a node", name, false);
        let for_each = self.for_each(place);
        let item = def.item_name.as_deref().unwrap_or(DEFAULT_ITEM);
        if def.for_each.is_some() {
            place.vars.push(item);
        }
        self.one_kind(place);
        let kind = self.kind(place);
        self.options(place, &kind);
        let set = self.set(place, &kind, channels);
        Node {
            name: name.to_owned(),
            for_each,
            set,
            timeout: self.period(&place.path(&["timeout"]), def.timeout),
            // An agent's is that of each turn and each call; the agent itself is not repeated.
            retry: self.retry(place).filter(|_| def.agent.is_none()),
            on_error: self.on_error(place),
            may_goto: self.may_goto(place),
            effect: self.effect(place, &kind),
            on_unknown: def.effects.map(OnUnknown::from),
            kind,
            route: Route::default(),
            joins: Vec::new(),
        }
    }

    fn for_each(&mut self, place: &Place<'_>) -> Option<ForEach> {
        let def = place.def;
        let Some(source) = &def.for_each else {
            for (key, written) in
                [("as", def.item_name.is_some()), ("max_parallel", def.max_parallel.is_some())]
            {
                if written {
                    let message = format!("`{key}` has no meaning without `for_each`");
                    self.report(Diagnostic::error("option", &place.path(&[key]), message).on_key());
                }
            }
            return None;
        };
        let name = def.item_name.as_deref().unwrap_or(DEFAULT_ITEM);
        if !names::is_identifier(name) || TAKEN.contains(&name) {
            let message = format!("{name:?} cannot be the name of an item");
            let help = format!("use an identifier that is none of {}", names::listed(TAKEN));
            let path = place.path(&["as"]);
            self.report(Diagnostic::error("name", &path, message).help(help));
        }
        if def.max_parallel.is_some_and(|max| max == 0 || max > MAX_PARALLEL) {
            let message = format!("`max_parallel` must be 1 to {MAX_PARALLEL}");
            self.report(Diagnostic::error("option", &place.path(&["max_parallel"]), message));
        }
        let path = place.path(&["for_each"]);
        let template = self.template(&path, &source.as_str().into(), &place.vars)?;
        let Some(expr) = template.as_expr() else {
            let problem = Diagnostic::error("expression", &path, "`for_each` needs one expression")
                .help("write for_each: ${state.NAME}");
            self.report(problem);
            return None;
        };
        let items = expr.clone();
        Some(ForEach { items, name: name.to_owned(), max_parallel: def.max_parallel })
    }

    fn one_kind(&mut self, place: &Place<'_>) {
        let kinds = place.def.kinds();
        let later = place.def.later_kinds();
        let at = |key: &str, message: String| {
            Diagnostic::error("node-kind", &place.path(&[key]), message).on_key()
        };
        for kind in &later {
            let message = format!("nodes of the kind `{kind}` are not available in this version");
            self.report(at(kind, message));
        }
        if let [first, second, ..] = kinds.as_slice() {
            let message =
                format!("`{}` is `{first}` and `{second}`; a node has one kind", place.name);
            self.report(at(second, message).help("make two nodes of it"));
        }
        if kinds.is_empty() && place.def.set.as_ref().is_none_or(Ordered::is_empty) {
            let message = format!("`{}` does nothing", place.name);
            let problem = Diagnostic::error("node-kind", &place.path(&[]), message).on_key();
            self.report(
                problem.help("give it `job`, `interrupt`, `wait`, `graph`, `model`, `agent`, `tool`, `use` or `set`"),
            );
        }
    }

    /// Options that do not go with the kind.
    fn options(&mut self, place: &Place<'_>, kind: &NodeKind) {
        let def = place.def;
        let is_use = def.use_name.is_some();
        let plain = matches!(kind, NodeKind::Set) && def.kinds().is_empty();
        let mut misplaced = |key: &str, help: &str| {
            let message = format!("`{key}` does not go with this kind of node");
            let problem = Diagnostic::error("option", &place.path(&[key]), message).on_key();
            self.report(problem.help(help));
        };
        if def.with.is_some() && !is_use {
            misplaced("with", "only `use` takes an argument");
        }
        let acts = is_use || def.tool.is_some() || def.model.is_some();
        if def.effect.is_some() && !acts {
            misplaced("effect", "other kinds know what repeating them does");
        }
        if def.effects.is_some() && !acts && def.agent.is_none() {
            misplaced("effects", "only nodes that act on the world have unknown outcomes");
        }
        if def.may_goto.is_some() && !is_use {
            misplaced(
                "may_goto",
                "only the code of a `use` node chooses at run time; use `choose`",
            );
        }
        if def.retry.is_some() && (plain || def.interrupt.is_some() || def.wait.is_some()) {
            misplaced("retry", "there is nothing that another attempt would change");
        }
        if def.timeout.is_some() {
            if def.interrupt.is_some() {
                misplaced("timeout", "an interrupt has `expires`");
            } else if def.wait.is_some() {
                misplaced("timeout", "write it inside `wait`, with `event`");
            } else if plain {
                misplaced("timeout", "a `set` takes no time");
            }
        }
    }

    fn set(
        &mut self,
        place: &Place<'_>,
        kind: &NodeKind,
        channels: &[Channel],
    ) -> Vec<(ChannelIndex, Template)> {
        let Some(set) = &place.def.set else { return Vec::new() };
        let mut vars = place.vars.clone();
        if !matches!(kind, NodeKind::Set) || !place.def.kinds().is_empty() {
            vars.push("output");
        }
        let mut updates = Vec::with_capacity(set.len());
        for (name, value) in set.sorted() {
            let path = place.path(&["set", name]);
            let before = self.problems.len();
            let index = self.channel(&path, name);
            if let Some(problem) = self.problems.get_mut(before) {
                problem.part = crate::graph::check::Part::Key;
            }
            let template = self.template(&path, value, &vars);
            if let (Some(index), Some(template)) = (index, template) {
                if let Some(channel) = channels.get(index.0 as usize) {
                    self.literal_fits(&path, channel, &template);
                }
                updates.push((index, template));
            }
        }
        updates
    }

    pub(super) fn period(&mut self, path: &[&str], period: Option<Period>) -> Option<Duration> {
        let duration = period.map(|period| period.0);
        self.positive(path, duration);
        duration
    }

    fn retry(&mut self, place: &Place<'_>) -> Option<Retry> {
        let def: &RetryDef = place.def.retry.as_ref()?;
        let factor = def.factor.unwrap_or(2.0);
        let mut wrong = |key: &str, message: String| {
            let path = place.path(&["retry", key]);
            self.report(Diagnostic::error("option", &path, message));
        };
        if def.attempts == 0 || def.attempts > MAX_ATTEMPTS {
            wrong(
                "attempts",
                format!("`attempts` must be 1 to {MAX_ATTEMPTS}, the first included"),
            );
        }
        if !(1.0..=100.0).contains(&factor) {
            wrong("factor", "`factor` must be 1 to 100".into());
        }
        let first = def.first.map_or(Duration::from_secs(1), |period| period.0);
        let max = def.max.map_or(Duration::from_secs(60).max(first), |period| period.0);
        if max < first {
            wrong("max", "`max` is shorter than the first pause".into());
        }
        let jitter = def.jitter.unwrap_or(true);
        Some(Retry { attempts: def.attempts, first, factor, max, jitter })
    }

    fn on_error(&mut self, place: &Place<'_>) -> Option<NodeIndex> {
        let name = place.def.on_error.as_deref()?;
        let path = place.path(&["on_error"]);
        if name == place.name {
            let message = "a node cannot handle its own errors: it would run for ever";
            self.report(Diagnostic::error("option", &path, message).help("use `retry`"));
            return None;
        }
        self.node(&path, name)
    }

    fn may_goto(&mut self, place: &Place<'_>) -> Vec<NodeIndex> {
        let names = place.def.may_goto.as_deref().unwrap_or_default();
        let mut targets = Vec::with_capacity(names.len());
        for (at, name) in names.iter().enumerate() {
            let at = at.to_string();
            targets.extend(self.node(&place.path(&["may_goto", &at]), name));
        }
        targets
    }

    fn effect(&self, place: &Place<'_>, kind: &NodeKind) -> Effect {
        match kind {
            NodeKind::Job(_) => Effect::Idempotent,
            NodeKind::Use { name, .. } => place
                .def
                .effect
                .map(Effect::from)
                .or_else(|| self.registry.effect(name))
                .unwrap_or(Effect::Effectful),
            // Sent again under its key, at worst it costs again.
            NodeKind::Model(_) => place.def.effect.map_or(Effect::Idempotent, Effect::from),
            NodeKind::Tool(_) => place.def.effect.map_or(Effect::Effectful, Effect::from),
            _ => Effect::Pure,
        }
    }
}
