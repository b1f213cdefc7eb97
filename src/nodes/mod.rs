//! Node kinds that reach outside: one file each, and the registry that finds them.
//!
//! **Invariant:** a node holds services, never a database handle; what it does is one service call.

pub mod builtin;
pub mod job;
pub mod model;
#[cfg(debug_assertions)]
pub mod testing;
pub mod tool;
pub mod webhook;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::graph::compile::NodeNames;
use crate::graph::exec::{Node, NodeSource};
use crate::graph::model::{Effect, Node as NodeSpec, NodeKind};

/// The nodes that graphs of this process can use.
#[derive(Clone, Default)]
pub struct Registry {
    named: BTreeMap<String, Arc<dyn Node>>,
    job: Option<Arc<dyn Node>>,
    model: Option<Arc<dyn Node>>,
    tool: Option<Arc<dyn Node>>,
    webhook: Option<Arc<dyn Node>>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry")
            .field("named", &self.named.keys())
            .field("job", &self.job.is_some())
            .field("webhook", &self.webhook.is_some())
            .finish()
    }
}

impl Registry {
    /// Adds a node that graph files name as `use: NAME`. The name is stored with runs: it must stay stable.
    #[must_use]
    pub fn with(mut self, name: &str, node: impl Node + 'static) -> Self {
        self.named.insert(name.to_owned(), Arc::new(node));
        self
    }

    /// Adds the code of `job` nodes.
    #[must_use]
    pub fn with_job(mut self, node: impl Node + 'static) -> Self {
        self.job = Some(Arc::new(node));
        self
    }

    /// Adds the code that the built-in graph of webhooks names; files of users cannot name it.
    #[must_use]
    pub fn with_webhook(mut self, node: impl Node + 'static) -> Self {
        self.webhook = Some(Arc::new(node));
        self
    }
}

impl Registry {
    /// Adds the code of `model` nodes.
    #[must_use]
    pub fn with_model(mut self, node: impl Node + 'static) -> Self {
        self.model = Some(Arc::new(node));
        self
    }

    /// Adds the code of `tool` nodes.
    #[must_use]
    pub fn with_tool(mut self, node: impl Node + 'static) -> Self {
        self.tool = Some(Arc::new(node));
        self
    }
}

impl NodeSource for Registry {
    fn find(&self, node: &NodeSpec) -> Option<Arc<dyn Node>> {
        match &node.kind {
            NodeKind::Use { name, .. } if name == webhook::WEBHOOK => self.webhook.clone(),
            NodeKind::Use { name, .. } => self.named.get(name).cloned(),
            NodeKind::Job(_) => self.job.clone(),
            NodeKind::Model(_) => self.model.clone(),
            NodeKind::Tool(_) => self.tool.clone(),
            NodeKind::Set | NodeKind::Interrupt(_) | NodeKind::Wait(_) | NodeKind::Graph { .. } => {
                None
            }
        }
    }
}

impl NodeNames for Registry {
    fn names(&self) -> Vec<String> {
        self.named.keys().cloned().collect()
    }

    fn effect(&self, name: &str) -> Option<Effect> {
        self.named.get(name).map(|node| node.effect())
    }
}

/// What stored graphs may name: the registered nodes, and those of the built-in graphs.
#[derive(Debug, Clone)]
pub struct StoredNames(pub Registry);

impl NodeNames for StoredNames {
    fn names(&self) -> Vec<String> {
        let mut names = self.0.names();
        names.push(webhook::WEBHOOK.to_owned());
        names
    }

    fn effect(&self, name: &str) -> Option<Effect> {
        if name == webhook::WEBHOOK { Some(webhook::EFFECT) } else { self.0.effect(name) }
    }
}
