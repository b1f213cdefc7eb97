//! The graphs that new runs may start, by name. A run that has begun is pinned to a hash instead.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::graph::model::Graph;

/// The loaded graphs.
#[derive(Debug, Clone, Default)]
pub struct GraphCatalog {
    by_name: BTreeMap<String, Arc<Graph>>,
}

impl GraphCatalog {
    /// A catalog of `graphs`; the last one of a name wins (the loader refuses duplicates).
    #[must_use]
    pub fn new(graphs: impl IntoIterator<Item = Arc<Graph>>) -> Self {
        Self { by_name: graphs.into_iter().map(|graph| (graph.name.clone(), graph)).collect() }
    }

    /// The graph of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Arc<Graph>> {
        self.by_name.get(name)
    }

    /// Every graph, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Graph>> {
        self.by_name.values()
    }

    /// The names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }
}
