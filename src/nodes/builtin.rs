//! The graphs that the server runs for itself, compiled in.

use std::sync::Arc;

use super::StoredNames;
use crate::graph::check::Diagnostic;
use crate::graph::load::{Catalog, load_str};
use crate::services::catalog::GraphCatalog;

/// Their files.
const FILES: &[(&str, &str)] =
    &[("graphs/system/webhook.yaml", include_str!("../../graphs/system/webhook.yaml"))];

/// A built-in graph that does not compile: a defect of this program.
#[derive(Debug, thiserror::Error)]
#[error("the built-in graph {file} does not compile: {problems}")]
pub struct BuiltinError {
    file: &'static str,
    problems: String,
}

/// Compiles them.
///
/// # Errors
/// One does not compile.
pub fn graphs(names: &StoredNames) -> Result<GraphCatalog, BuiltinError> {
    let mut graphs = Vec::new();
    for (file, text) in FILES.iter().copied() {
        let graph = load_str(file, text, &Catalog::default(), names).map_err(|problems| {
            let problems: Vec<&str> =
                problems.iter().map(|problem: &Diagnostic| problem.message.as_str()).collect();
            BuiltinError { file, problems: problems.join("; ") }
        })?;
        graphs.push(Arc::new(graph));
    }
    Ok(GraphCatalog::new(graphs))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::compile::NodeNames;
    use crate::nodes::Registry;

    #[test]
    fn they_compile_and_files_of_users_cannot_name_their_nodes() {
        let names = StoredNames(Registry::default());
        assert_eq!(graphs(&names).unwrap().names().collect::<Vec<_>>(), ["webhook"]);
        let (file, text) = FILES[0];
        let problems = load_str(file, text, &Catalog::default(), &names.0).unwrap_err();
        assert!(problems[0].message.contains("cynai/webhook"), "{problems:?}");
        assert!(names.0.names().is_empty());
    }
}
