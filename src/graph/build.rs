//! Graphs made in Rust instead of in a file.
//!
//! The result is a [`GraphFile`], the same as a file gives, so it is checked, hashed, stored and drawn in
//! the same way, and a run started with it survives the program that made it.
//!
//! ```
//! use cynai::graph::build::GraphBuilder;
//! use cynai::graph::compile::NoNodes;
//! use cynai::graph::definition::NodeDef;
//! use serde_json::json;
//!
//! let graph = GraphBuilder::new("count")
//!     .channel("n", json!({ "type": "integer", "default": 0 }))
//!     .node("add", NodeDef::set([("n", json!("${state.n + 1}"))]))
//!     .edge("start -> add")
//!     .choose("add", [("state.n < 10", "add")], "end")
//!     .compile(&|_| None, &NoNodes)
//!     .expect("the graph is sound");
//! assert_eq!(graph.nodes.len(), 1);
//! ```

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::check::Diagnostic;
use super::compile::{self, NodeNames, Subgraphs};
use super::definition::{
    ChannelDef, ChoiceDef, EdgeDef, EdgeTable, EffectDef, EffectsDef, GraphCall, GraphFile,
    GraphRef, InterruptDef, JobDef, LimitsDef, Names, NodeDef, Ordered, Period, RetryDef, WaitDef,
};
use super::model::Graph;

/// Puts a graph together.
#[derive(Debug, Clone)]
pub struct GraphBuilder {
    file: GraphFile,
}

impl GraphBuilder {
    /// A graph of that name, still empty.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            file: GraphFile {
                name: name.into(),
                description: None,
                state: Ordered::default(),
                input: None,
                output: None,
                limits: None,
                nodes: Ordered::default(),
                edges: Vec::new(),
            },
        }
    }

    /// What the graph does, for people.
    #[must_use]
    pub fn description(mut self, description: impl Into<String>) -> Self {
        self.file.description = Some(description.into());
        self
    }

    /// Adds a channel, or replaces the one of that name. `schema` is what a file writes under the name: a
    /// JSON Schema, `reduce` and `default`; what is no object stands for a channel without a schema.
    #[must_use]
    pub fn channel(mut self, name: impl Into<String>, schema: Value) -> Self {
        let mut def = ChannelDef::default();
        if let Value::Object(mut schema) = schema {
            def.default = schema.remove("default");
            match schema.remove("reduce") {
                Some(Value::String(reduce)) => def.reduce = Some(reduce),
                // Kept as it is, so that the check says what is wrong with it.
                Some(other) => def.reduce = Some(other.to_string()),
                None => {}
            }
            def.schema = schema;
        }
        self.file.state.insert(name, def);
        self
    }

    /// The channels that a run's input may set; all, when this is not called.
    #[must_use]
    pub fn input<N: Into<String>>(mut self, channels: impl IntoIterator<Item = N>) -> Self {
        self.file.input = Some(channels.into_iter().map(Into::into).collect());
        self
    }

    /// The channels that are a run's result; all, when this is not called.
    #[must_use]
    pub fn output<N: Into<String>>(mut self, channels: impl IntoIterator<Item = N>) -> Self {
        self.file.output = Some(channels.into_iter().map(Into::into).collect());
        self
    }

    /// Bounds of one run.
    #[must_use]
    pub fn limits(mut self, supersteps: Option<u32>, duration: Option<Duration>) -> Self {
        self.file.limits = Some(LimitsDef { supersteps, duration: duration.map(Period) });
        self
    }

    /// Adds a node, or replaces the one of that name.
    #[must_use]
    pub fn node(mut self, name: impl Into<String>, node: NodeDef) -> Self {
        self.file.nodes.insert(name, node);
        self
    }

    /// Adds edges as a file writes them: `start -> a -> b`.
    #[must_use]
    pub fn edge(mut self, path: impl Into<String>) -> Self {
        self.file.edges.push(EdgeDef::Path(path.into()));
        self
    }

    /// `to` runs when all of `from` have finished.
    #[must_use]
    pub fn join<N: Into<String>>(
        mut self,
        from: impl IntoIterator<Item = N>,
        to: impl Into<String>,
    ) -> Self {
        let from = Names::Many(from.into_iter().map(Into::into).collect());
        let to = Some(Names::One(to.into()));
        self.file.edges.push(EdgeDef::Table(EdgeTable { from, to, choose: None }));
        self
    }

    /// The first of `(condition, node)` that holds after `from`, else `otherwise`.
    #[must_use]
    pub fn choose<W: Into<String>, N: Into<String>>(
        mut self,
        from: impl Into<String>,
        lines: impl IntoIterator<Item = (W, N)>,
        otherwise: impl Into<String>,
    ) -> Self {
        let mut choose: Vec<ChoiceDef> = lines
            .into_iter()
            .map(|(when, to)| ChoiceDef { when: Some(when.into()), to: Names::One(to.into()) })
            .collect();
        choose.push(ChoiceDef { when: None, to: Names::One(otherwise.into()) });
        let from = Names::One(from.into());
        self.file.edges.push(EdgeDef::Table(EdgeTable { from, to: None, choose: Some(choose) }));
        self
    }

    /// The definition, unchecked.
    #[must_use]
    pub fn build(self) -> GraphFile {
        self.file
    }

    /// Checks the graph and compiles it.
    pub fn compile(
        self,
        subgraphs: Subgraphs<'_>,
        registry: &dyn NodeNames,
    ) -> Result<Graph, Vec<Diagnostic>> {
        compile::compile(Arc::new(self.file), subgraphs, registry)
    }
}

/// Nodes in Rust: one constructor for each kind, then what goes with it.
impl NodeDef {
    /// A node that only writes channels.
    #[must_use]
    pub fn set<N: Into<String>>(updates: impl IntoIterator<Item = (N, Value)>) -> Self {
        Self { set: Some(updates.into_iter().collect()), ..Self::default() }
    }

    /// A node written in Rust, by its registered name; `with` is a template.
    #[must_use]
    pub fn using(name: impl Into<String>, with: Value) -> Self {
        Self { use_name: Some(name.into()), with: Some(with), ..Self::default() }
    }

    /// A sandboxed execution of `command`, whose parts are templates.
    #[must_use]
    pub fn job<P: Into<Value>>(command: impl IntoIterator<Item = P>) -> Self {
        let command = command.into_iter().map(Into::into).collect();
        Self { job: Some(JobDef { command, ..JobDef::default() }), ..Self::default() }
    }

    /// A question to a person: a template, and the schema of an answer.
    #[must_use]
    pub fn interrupt(ask: Value, schema: Option<Value>) -> Self {
        let interrupt = InterruptDef { ask, schema, expires: None };
        Self { interrupt: Some(interrupt), ..Self::default() }
    }

    /// A pause, such as `90s`, or a template that gives one.
    #[must_use]
    pub fn wait_for(duration: impl Into<String>) -> Self {
        let wait = WaitDef { duration: Some(duration.into()), ..WaitDef::default() };
        Self { wait: Some(wait), ..Self::default() }
    }

    /// A wait for a named event.
    #[must_use]
    pub fn wait_event(name: impl Into<String>, timeout: Option<Duration>) -> Self {
        let timeout = timeout.map(Period);
        let wait = WaitDef { event: Some(name.into()), timeout, ..WaitDef::default() };
        Self { wait: Some(wait), ..Self::default() }
    }

    /// A call of another graph.
    #[must_use]
    pub fn graph<N: Into<String>>(
        name: impl Into<String>,
        input: impl IntoIterator<Item = (N, Value)>,
    ) -> Self {
        let call = GraphCall { name: name.into(), input: input.into_iter().collect() };
        Self { graph: Some(GraphRef::Call(call)), ..Self::default() }
    }

    /// Writes `value`, a template, to `channel` after the node.
    #[must_use]
    pub fn writes(mut self, channel: impl Into<String>, value: Value) -> Self {
        self.set.get_or_insert_default().insert(channel, value);
        self
    }

    /// Runs once for each item of the list that the template `items` gives.
    #[must_use]
    pub fn for_each(mut self, items: impl Into<String>, name: impl Into<String>) -> Self {
        self.for_each = Some(items.into());
        self.item_name = Some(name.into());
        self
    }

    /// How many items may be under way at once.
    #[must_use]
    pub fn max_parallel(mut self, max: u32) -> Self {
        self.max_parallel = Some(max);
        self
    }

    /// Bounds one attempt.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(Period(timeout));
        self
    }

    /// Repeats a failed attempt until there were `attempts`, with the default pauses.
    #[must_use]
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.retry = Some(RetryDef { attempts, ..RetryDef::default() });
        self
    }

    /// Where the run goes when the attempts are spent.
    #[must_use]
    pub fn on_error(mut self, node: impl Into<String>) -> Self {
        self.on_error = Some(node.into());
        self
    }

    /// What repeating an attempt of a `using` node would do.
    #[must_use]
    pub fn effect(mut self, effect: EffectDef) -> Self {
        self.effect = Some(effect);
        self
    }

    /// What follows when nothing tells whether an attempt acted on the world.
    #[must_use]
    pub fn effects(mut self, effects: EffectsDef) -> Self {
        self.effects = Some(effects);
        self
    }

    /// Nodes that the code of a `using` node may choose.
    #[must_use]
    pub fn may_goto<N: Into<String>>(mut self, nodes: impl IntoIterator<Item = N>) -> Self {
        self.may_goto = Some(nodes.into_iter().map(Into::into).collect());
        self
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::graph::compile::NoNodes;
    use crate::graph::load::parse_str;

    #[test]
    fn the_documented_example_is_sound() {
        let graph = GraphBuilder::new("count")
            .channel("n", json!({ "type": "integer", "default": 0 }))
            .node("add", NodeDef::set([("n", json!("${state.n + 1}"))]))
            .edge("start -> add")
            .choose("add", [("state.n < 10", "add")], "end")
            .compile(&|_| None, &NoNodes)
            .unwrap();
        assert_eq!(graph.nodes.len(), 1);
    }

    #[test]
    fn a_graph_made_in_code_is_the_one_that_the_file_gives() {
        let built = GraphBuilder::new("g")
            .description("Counts.")
            .channel("n", json!({ "type": "integer", "default": 0 }))
            .channel("seen", json!({ "type": "array", "reduce": "append" }))
            .input(["n"])
            .output(["seen"])
            .limits(Some(50), Some(Duration::from_secs(60)))
            .node("add", NodeDef::set([("n", json!("${state.n + 1}"))]))
            .node("nap", NodeDef::wait_for("1s").writes("seen", json!(["${state.n}"])))
            .node("ask", NodeDef::interrupt(json!("On?"), Some(json!({ "type": "boolean" }))))
            .node(
                "each",
                NodeDef::job(["true"])
                    .for_each("${state.seen}", "x")
                    .max_parallel(2)
                    .timeout(Duration::from_secs(5))
                    .attempts(3)
                    .on_error("nap"),
            )
            .edge("start -> add -> nap")
            .edge("add -> ask")
            .join(["nap", "ask"], "each")
            .choose("each", [("state.n < 3", "add")], "end")
            .build();
        let text = "{ name: g, description: Counts., state: { n: { type: integer, default: 0 }, seen: { type: array, reduce: append } }, input: [n], output: [seen], limits: { supersteps: 50, duration: 1m }, nodes: { add: { set: { n: '${state.n + 1}' } }, nap: { wait: { for: 1s }, set: { seen: ['${state.n}'] } }, ask: { interrupt: { ask: 'On?', schema: { type: boolean } } }, each: { job: { command: ['true'] }, for_each: '${state.seen}', as: x, max_parallel: 2, timeout: 5s, retry: { attempts: 3 }, on_error: nap } }, edges: [start -> add -> nap, add -> ask, { from: [nap, ask], to: each }, { from: each, choose: [{ when: state.n < 3, to: add }, { to: end }] }] }";
        let (file, _, problems) = parse_str("g", text);
        assert_eq!(problems, []);
        assert_eq!(built, file.unwrap());
    }

    #[test]
    fn a_mistake_in_code_is_told_by_its_path() {
        let err = GraphBuilder::new("g")
            .channel("n", json!({ "reduce": 3 }))
            .node("a", NodeDef::using("nope", json!("${stat.n}")))
            .edge("start -> a -> end")
            .compile(&|_| None, &NoNodes)
            .unwrap_err();
        let found: Vec<String> = err.iter().map(ToString::to_string).collect();
        assert_eq!(
            found,
            [
                "state.n.reduce: error[reducer]: there is no reducer `3` (there are `replace`, `append`, `merge`, `sum`, `min`, `max`, `union`, `messages`)",
                "nodes.a.use: error[unknown-use]: no node is registered as `nope`",
                "nodes.a.with: error[expression]: `stat` is not available here (did you mean `state`?)",
            ]
        );
    }
}
