//! Loading graph files: text to definition, definitions to compiled graphs, with places in the text.
//!
//! The parts of a file (each channel, each node, each edge) are read one by one, so that a mistake in one
//! does not hide the mistakes in the others.

mod prompts;
mod read;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::check::Diagnostic;
use super::compile::{self, NodeNames};
use super::definition::GraphFile;
use super::model::Graph;
use super::source::{MAX_FILE_BYTES, Source};
use read::Read;
pub(crate) use read::read_value;

/// Files of one directory.
pub const MAX_FILES: usize = 1_000;
/// Graphs that call graphs that call graphs.
pub const MAX_GRAPH_NESTING: usize = 16;

/// Compiled graphs by name.
#[derive(Debug, Clone, Default)]
pub struct Catalog {
    graphs: BTreeMap<String, Arc<Graph>>,
}

impl Catalog {
    /// The graph of that name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Arc<Graph>> {
        self.graphs.get(name).cloned()
    }

    /// All graphs in the order of their names.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Arc<Graph>> {
        self.graphs.values()
    }

    /// Adds a graph, or replaces the one of its name.
    pub fn insert(&mut self, graph: Arc<Graph>) {
        self.graphs.insert(graph.name.clone(), graph);
    }

    /// The number of graphs.
    #[must_use]
    pub fn len(&self) -> usize {
        self.graphs.len()
    }

    /// Whether there is no graph.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.graphs.is_empty()
    }
}

/// What loading gave.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The graphs in which nothing is wrong.
    pub catalog: Catalog,
    /// Errors and warnings, located, file by file.
    pub diagnostics: Vec<Diagnostic>,
    /// The texts, for snippets.
    pub sources: Vec<Source>,
}

impl Loaded {
    /// Whether some graph was refused.
    #[must_use]
    pub fn has_errors(&self) -> bool {
        self.diagnostics.iter().any(Diagnostic::is_error)
    }
}

/// Why files could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A path cannot be read.
    #[error("{path} cannot be read")]
    Read {
        /// The path.
        path: String,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// A directory holds too many graph files.
    #[error("{path} holds more than {MAX_FILES} graph files")]
    TooMany {
        /// The directory.
        path: String,
    },
}

/// Reads one file's text, without compiling it; no definition when anything is wrong with its shape. The
/// diagnostics are located.
#[must_use]
pub fn parse_str(file: &str, text: &str) -> (Option<GraphFile>, Source, Vec<Diagnostic>) {
    let (read, source, mut problems) = read_str(file, text);
    source.locate(&mut problems);
    let sound = !problems.iter().any(Diagnostic::is_error);
    (read.filter(|_| sound).map(|read| read.file), source, problems)
}

fn read_str(file: &str, text: &str) -> (Option<Read>, Source, Vec<Diagnostic>) {
    let (source, mut problems) = Source::parse(file, text);
    let mut read = None;
    if !problems.iter().any(|problem| problem.code != "duplicate-key") {
        read = read::graph_file(source.value(), &mut problems);
        if let Some(read) = &mut read {
            problems.extend(prompts::take(file, &mut read.file));
        }
    }
    (read, source, problems)
}

/// Compiles what was read. A file of which parts could not be read gives no graph, but what is wrong with
/// the other parts is told as well.
fn compile_read(
    file: Arc<GraphFile>,
    broken: &[Vec<String>],
    subgraphs: compile::Subgraphs<'_>,
    registry: &dyn NodeNames,
    problems: &mut Vec<Diagnostic>,
) -> Option<Graph> {
    let incomplete = problems.iter().any(Diagnostic::is_error);
    if !incomplete {
        let compiled = compile::check(file, subgraphs, registry);
        problems.extend(compiled.diagnostics);
        return compiled.graph;
    }
    let found = compile::check_parts(file, subgraphs, registry);
    let told = |problem: &Diagnostic| broken.iter().any(|part| problem.path.starts_with(part));
    problems.extend(found.into_iter().filter(|problem| !told(problem)));
    None
}

/// Loads one graph from text; `catalog` holds the graphs that it may call.
pub fn load_str(
    file: &str,
    text: &str,
    catalog: &Catalog,
    registry: &dyn NodeNames,
) -> Result<Graph, Vec<Diagnostic>> {
    let (read, source, mut problems) = read_str(file, text);
    let graph = read.and_then(|read| {
        let subgraphs = |name: &str| catalog.get(name);
        compile_read(Arc::new(read.file), &read.broken, &subgraphs, registry, &mut problems)
    });
    source.locate(&mut problems);
    graph.ok_or(problems)
}

/// Loads every `*.yaml`, `*.yml` and `*.json` of a directory, not of those inside it.
pub fn load_dir(path: &Path, registry: &dyn NodeNames) -> Result<Loaded, LoadError> {
    load_paths(&[path.to_path_buf()], registry)
}

/// Loads files, and all graph files of directories, that may call each other.
pub fn load_paths(paths: &[PathBuf], registry: &dyn NodeNames) -> Result<Loaded, LoadError> {
    let mut texts = Vec::new();
    for path in paths {
        let failed = |source| LoadError::Read { path: path.display().to_string(), source };
        if path.is_dir() {
            for file in files_of(path)? {
                texts.push((file.display().to_string(), read_text(&file)?));
            }
        } else if path.exists() {
            texts.push((path.display().to_string(), read_text(path)?));
        } else {
            return Err(failed(std::io::ErrorKind::NotFound.into()));
        }
    }
    let texts: Vec<_> = texts.iter().map(|(file, text)| (file.as_str(), text.as_str())).collect();
    Ok(load_all(&texts, registry))
}

/// Whether a file beside graphs holds cases of a test: `NAME.test.yaml`.
#[must_use]
pub fn is_cases(file: &Path) -> bool {
    let stem = file.file_stem().map(Path::new).and_then(Path::extension);
    stem.is_some_and(|stem| stem == "test")
}

/// The graph files of a directory, sorted.
///
/// # Errors
/// It cannot be read, or holds too many.
pub fn files_of(path: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let failed = |source| LoadError::Read { path: path.display().to_string(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        let extension = file.extension().and_then(|extension| extension.to_str());
        let format = matches!(extension, Some("yaml" | "yml" | "json"));
        if format && !is_cases(&file) && file.is_file() {
            files.push(file);
        }
    }
    if files.len() > MAX_FILES {
        return Err(LoadError::TooMany { path: path.display().to_string() });
    }
    files.sort();
    Ok(files)
}

/// The text of a file, or a little more than may be: the rest of a large file is not read.
///
/// # Errors
/// It cannot be read, or is no UTF-8.
pub fn read_text(path: &Path) -> Result<String, LoadError> {
    use std::io::Read as _;
    let failed = |source| LoadError::Read { path: path.display().to_string(), source };
    let mut bytes = Vec::new();
    let most = u64::try_from(MAX_FILE_BYTES).unwrap_or(u64::MAX).saturating_add(1);
    std::fs::File::open(path)
        .map_err(failed)?
        .take(most)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() > MAX_FILE_BYTES {
        let size = path.metadata().map_err(failed)?.len();
        // The text of a file that is refused for its size does not matter; its length does.
        let size = usize::try_from(size).unwrap_or(usize::MAX).min(MAX_FILE_BYTES * 64);
        return Ok(" ".repeat(size.max(bytes.len())));
    }
    String::from_utf8(bytes)
        .map_err(|err| failed(std::io::Error::new(std::io::ErrorKind::InvalidData, err)))
}

/// Loads graphs from `(file, text)` pairs that may call each other.
#[must_use]
pub fn load_all(texts: &[(&str, &str)], registry: &dyn NodeNames) -> Loaded {
    let mut set = Set::default();
    for (file, text) in texts {
        set.read(file, text);
    }
    set.compile_all(registry)
}

/// Files that are loaded together.
#[derive(Debug, Default)]
struct Set {
    sources: Vec<Source>,
    problems: Vec<Vec<Diagnostic>>,
    /// File by the name of its graph.
    names: BTreeMap<String, usize>,
    definitions: BTreeMap<usize, Arc<GraphFile>>,
    /// Parts that could not be read, by file.
    broken: BTreeMap<usize, Vec<Vec<String>>>,
}

impl Set {
    fn read(&mut self, file: &str, text: &str) {
        let at = self.sources.len();
        let (read, source, mut problems) = read_str(file, text);
        if let Some(Read { file: definition, broken }) = read {
            self.broken.insert(at, broken);
            match self.names.get(&definition.name) {
                Some(first) => {
                    let message = format!(
                        "the graph `{}` is already defined in {}",
                        definition.name,
                        self.sources[*first].file()
                    );
                    problems.push(Diagnostic::error("duplicate-graph", &["name"], message));
                }
                None => {
                    self.names.insert(definition.name.clone(), at);
                    self.definitions.insert(at, Arc::new(definition));
                }
            }
        }
        self.sources.push(source);
        self.problems.push(problems);
    }

    fn compile_all(mut self, registry: &dyn NodeNames) -> Loaded {
        let mut catalog = Catalog::default();
        for name in self.in_order() {
            let Some(at) = self.names.get(&name).copied() else { continue };
            let Some(definition) = self.definitions.get(&at).cloned() else { continue };
            let mut problems = std::mem::take(&mut self.problems[at]);
            let broken = self.broken.get(&at).map_or(&[][..], Vec::as_slice);
            let subgraphs = |name: &str| catalog.get(name);
            let graph = compile_read(definition, broken, &subgraphs, registry, &mut problems);
            self.problems[at] = problems.into_iter().map(|problem| self.explain(problem)).collect();
            if let Some(graph) = graph {
                catalog.insert(Arc::new(graph));
            }
        }
        let mut diagnostics = Vec::new();
        for (source, mut problems) in self.sources.iter().zip(self.problems) {
            source.locate(&mut problems);
            diagnostics.append(&mut problems);
        }
        Loaded { catalog, diagnostics, sources: self.sources }
    }

    /// A call of a graph that is not there: refused for its own errors, or misspelled.
    fn explain(&self, problem: Diagnostic) -> Diagnostic {
        if problem.code != "unknown-graph" || problem.help.is_some() {
            return problem;
        }
        let called = self.called(&problem);
        if self.names.contains_key(&called) {
            return problem.help("it is refused for errors of its own");
        }
        problem.suggest(&called, self.names.keys().map(String::as_str))
    }

    fn called(&self, problem: &Diagnostic) -> String {
        problem.message.split('`').nth(1).unwrap_or_default().to_owned()
    }

    /// The graphs, each after those that it calls. Circles and deep nesting are reported and left out.
    fn in_order(&mut self) -> Vec<String> {
        let mut order = Vec::new();
        let mut depth: BTreeMap<String, usize> = BTreeMap::new();
        let mut left: BTreeSet<String> = self.names.keys().cloned().collect();
        loop {
            let ready: Vec<String> = left
                .iter()
                .filter(|name| self.calls(name).all(|call| !left.contains(&call)))
                .cloned()
                .collect();
            if ready.is_empty() {
                break;
            }
            for name in ready {
                left.remove(&name);
                let below = self.calls(&name).filter_map(|call| depth.get(&call).copied()).max();
                let level = below.map_or(0, |below| below + 1);
                if level > MAX_GRAPH_NESTING {
                    let message =
                        format!("graphs call each other over more than {MAX_GRAPH_NESTING} levels");
                    self.report(&name, Diagnostic::error("too-large", &["name"], message));
                    continue;
                }
                depth.insert(name.clone(), level);
                order.push(name);
            }
        }
        for name in &left {
            self.report_circle(name, &left);
        }
        order
    }

    fn calls<'s>(&'s self, name: &str) -> impl Iterator<Item = String> + 's {
        let definition = self.names.get(name).and_then(|at| self.definitions.get(at));
        definition.into_iter().flat_map(|definition| {
            definition
                .nodes
                .iter()
                .filter_map(|(_, node)| Some(node.graph.as_ref()?.name().to_owned()))
        })
    }

    fn report(&mut self, name: &str, problem: Diagnostic) {
        if let Some(at) = self.names.get(name) {
            self.problems[*at].push(problem);
        }
    }

    /// Reports at each call inside a circle; a graph that only calls into one is left out silently, since
    /// the graphs that it waits for say why.
    fn report_circle(&mut self, name: &str, left: &BTreeSet<String>) {
        let Some(definition) =
            self.names.get(name).and_then(|at| self.definitions.get(at)).cloned()
        else {
            return;
        };
        for (node, def) in definition.nodes.iter() {
            let Some(call) = def.graph.as_ref().map(|graph| graph.name().to_owned()) else {
                continue;
            };
            if !left.contains(&call) {
                continue;
            }
            let circle = self.path(&call, name);
            let problem = match circle {
                Some(path) => {
                    let message = format!(
                        "graphs call each other in a circle: {name} -> {}",
                        path.join(" -> ")
                    );
                    Diagnostic::error("graph-cycle", &["nodes", node, "graph"], message)
                }
                None => {
                    let message = format!("the graph `{call}` cannot be loaded");
                    Diagnostic::error("unknown-graph", &["nodes", node, "graph"], message)
                        .help("it is part of a circle of calls")
                }
            };
            self.report(name, problem);
        }
    }

    /// A shortest path of calls from `from` to `to`.
    fn path(&self, from: &str, to: &str) -> Option<Vec<String>> {
        let mut queue = std::collections::VecDeque::from([vec![from.to_owned()]]);
        let mut seen = BTreeSet::from([from.to_owned()]);
        while let Some(path) = queue.pop_front() {
            let last = path.last()?;
            if last == to {
                return Some(path);
            }
            for call in self.calls(last) {
                if seen.insert(call.clone()) {
                    let mut longer = path.clone();
                    longer.push(call);
                    queue.push_back(longer);
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;
