//! Graphs by content hash: what a run is pinned to, whatever the files on disk say now.
//!
//! **Invariant:** a hash names one graph for ever, so a compiled one is kept as long as there is room.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use sqlx::PgPool;

use super::StoreError;
use crate::graph::compile::{NodeNames, compile_stored};
use crate::graph::model::{Graph, GraphHash};

/// Compiled graphs that are kept; above it, those that nobody uses go.
const MAX_KEPT: usize = 1000;

/// Every version of every graph, compiled when first asked for.
#[derive(Clone)]
pub struct Graphs {
    pool: PgPool,
    names: Arc<dyn NodeNames + Send + Sync>,
    kept: Arc<RwLock<HashMap<[u8; 32], Arc<Graph>>>>,
}

impl std::fmt::Debug for Graphs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Graphs").finish_non_exhaustive()
    }
}

/// Why a stored graph cannot be run here.
#[derive(Debug, thiserror::Error)]
pub enum GraphError {
    /// No graph of that hash is stored.
    #[error("no graph with the hash {0} is stored")]
    Unknown(GraphHash),
    /// It does not compile with this version or without nodes that this process does not have.
    #[error("the stored graph `{name}` cannot be run by this server: {reason}")]
    Unusable {
        /// Its name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// It could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Graphs {
    /// Graphs stored in `pool`, whose `use:` nodes are among `names`.
    #[must_use]
    pub fn new(pool: PgPool, names: Arc<dyn NodeNames + Send + Sync>) -> Self {
        Self { pool, names, kept: Arc::default() }
    }

    /// Keeps a graph that was compiled from a file.
    pub fn keep(&self, graph: &Arc<Graph>) {
        let mut kept = self.kept.write().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= MAX_KEPT {
            kept.retain(|_, graph| Arc::strong_count(graph) > 1);
        }
        kept.insert(graph.hash.0, Arc::clone(graph));
    }

    /// The graph with this hash.
    ///
    /// # Errors
    /// It is not stored, cannot be read, or does not compile.
    pub async fn get(&self, hash: &[u8]) -> Result<Arc<Graph>, GraphError> {
        let hash: [u8; 32] =
            hash.try_into().map_err(|_| GraphError::Unknown(GraphHash([0; 32])))?;
        if let Some(graph) = self.kept.read().unwrap_or_else(PoisonError::into_inner).get(&hash) {
            return Ok(Arc::clone(graph));
        }
        self.load(hash).await
    }

    /// Reads a graph with all that it calls, and compiles them from the leaves up.
    async fn load(&self, hash: [u8; 32]) -> Result<Arc<Graph>, GraphError> {
        let rows = sqlx::query!(
            r#"select g.hash, g.name, g.definition from graphs g
                where g.hash = $1
                   or g.hash in (select decode(s.value, 'hex') from graphs r, jsonb_each_text(r.subgraphs) s
                                  where r.hash = $1)"#,
            hash.as_slice(),
        )
        .fetch_all(&self.pool)
        .await
        .map_err(StoreError::from)?;
        let mut wanted: Vec<(Vec<u8>, String, String)> =
            rows.into_iter().map(|row| (row.hash, row.name, row.definition)).collect();
        let mut made: HashMap<String, Arc<Graph>> = HashMap::new();
        let mut reason = String::new();
        while !wanted.is_empty() {
            let before = wanted.len();
            wanted.retain(|(_, name, definition)| {
                let find = |name: &str| made.get(name).cloned();
                match compile_stored(definition, &find, &*self.names) {
                    Ok(graph) => {
                        made.insert(name.clone(), Arc::new(graph));
                        false
                    }
                    Err(problems) => {
                        reason = problems
                            .iter()
                            .map(|problem| problem.message.clone())
                            .collect::<Vec<_>>()
                            .join("; ");
                        true
                    }
                }
            });
            if wanted.len() == before {
                let name = wanted.first().map(|(_, name, _)| name.clone()).unwrap_or_default();
                return Err(GraphError::Unusable { name, reason });
            }
        }
        let found = made
            .into_values()
            .find(|graph| graph.hash.0 == hash)
            .ok_or(GraphError::Unknown(GraphHash(hash)))?;
        self.keep(&found);
        Ok(found)
    }
}
