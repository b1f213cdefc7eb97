//! Finds files with cases and the graphs beside them, and reads both strictly.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::Case;
use super::cases::{CaseDef, MAX_CASES};
use super::script::{Script, may_call, place_of};
use crate::graph::check::Diagnostic;
use crate::graph::compile::NodeNames;
use crate::graph::load::{
    LoadError, Loaded as Graphs, files_of, is_cases, load_all, parse_str, read_text, read_value,
};
use crate::graph::model::Effect;
use crate::graph::source::Source;

/// Files with cases that one command runs.
const MAX_FILES: usize = 1_000;
/// Levels of directories that are looked into.
const MAX_LEVELS: usize = 16;
/// Files and directories that are looked at.
const MAX_ENTRIES: usize = 100_000;

/// Why there is nothing to run.
#[derive(Debug, thiserror::Error)]
pub enum KitError {
    /// A path cannot be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A graph file has no cases.
    #[error("{file} has no cases: write them into {cases}")]
    NoCases {
        /// The graph file.
        file: String,
        /// Where its cases would be.
        cases: String,
    },
    /// A directory holds no cases.
    #[error("{path} holds no file with cases: NAME.test.yaml")]
    NoFiles {
        /// The directory.
        path: String,
    },
    /// Too much to look through.
    #[error("there are more than {most} {what} under {path}; name the files that you mean")]
    TooMany {
        /// The limit.
        most: usize,
        /// Of what.
        what: &'static str,
        /// The directory.
        path: String,
    },
}

/// The cases of one file.
#[derive(Debug)]
pub struct Suite {
    /// The file.
    pub file: String,
    /// Those in which nothing is wrong.
    pub cases: Vec<Case>,
}

/// What was read.
#[derive(Debug, Default)]
pub struct Loaded {
    /// File by file.
    pub suites: Vec<Suite>,
    /// Errors of graphs and cases, located.
    pub diagnostics: Vec<Diagnostic>,
    /// The texts, for snippets.
    pub sources: Vec<Source>,
}

/// Names of nodes written in Rust: whatever the files name, since their answers are scripted.
struct AnyName<'a> {
    named: BTreeSet<String>,
    known: &'a dyn NodeNames,
}

impl NodeNames for AnyName<'_> {
    fn names(&self) -> Vec<String> {
        self.named.iter().cloned().collect()
    }

    fn effect(&self, name: &str) -> Option<Effect> {
        self.known.effect(name)
    }
}

/// Reads the cases that `paths` name: files with cases, graph files that have some, directories of them. `known` says
/// what is known of the nodes that are written in Rust.
///
/// # Errors
/// A path cannot be read, or there is nothing to run. What is wrong in the files is in the diagnostics.
pub fn load(paths: &[PathBuf], known: &dyn NodeNames) -> Result<Loaded, KitError> {
    let mut files = BTreeSet::new();
    for path in paths {
        find(path, &mut files)?;
        if files.len() > MAX_FILES {
            let path = path.display().to_string();
            return Err(KitError::TooMany { most: MAX_FILES, what: "files with cases", path });
        }
    }
    let mut loaded = Loaded::default();
    let mut graphs: BTreeMap<PathBuf, Graphs> = BTreeMap::new();
    for file in files {
        let directory = file.parent().unwrap_or(Path::new("")).to_owned();
        if !graphs.contains_key(&directory) {
            graphs.insert(directory.clone(), load_graphs(&directory, known)?);
        }
        if let Some(beside) = graphs.get(&directory) {
            read(&file, beside, &mut loaded)?;
        }
    }
    for graphs in graphs.into_values() {
        loaded.sources.extend(graphs.sources);
    }
    Ok(loaded)
}

fn find(path: &Path, files: &mut BTreeSet<PathBuf>) -> Result<(), KitError> {
    if path.is_dir() {
        let before = files.len();
        let mut left = MAX_ENTRIES;
        walk(path, MAX_LEVELS, &mut left, files)?;
        if left == 0 {
            let path = path.display().to_string();
            return Err(KitError::TooMany { most: MAX_ENTRIES, what: "files", path });
        }
        if files.len() == before {
            return Err(KitError::NoFiles { path: path.display().to_string() });
        }
        return Ok(());
    }
    if is_cases(path) {
        files.insert(path.to_owned());
        return Ok(());
    }
    // So that a path that is not there is told as such.
    read_text(path)?;
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let beside = |extension: &str| path.with_file_name(format!("{stem}.test.{extension}"));
    let there = ["yaml", "yml", "json"].into_iter().map(beside).find(|file| file.is_file());
    let file = there.ok_or_else(|| KitError::NoCases {
        file: path.display().to_string(),
        cases: beside("yaml").display().to_string(),
    })?;
    files.insert(file);
    Ok(())
}

/// Looks through a directory and those in it; links and hidden ones are not followed.
fn walk(
    directory: &Path,
    levels: usize,
    left: &mut usize,
    files: &mut BTreeSet<PathBuf>,
) -> Result<(), KitError> {
    let failed = |source| LoadError::Read { path: directory.display().to_string(), source };
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        *left = left.saturating_sub(1);
        if *left == 0 {
            break;
        }
        let path = entry.path();
        let kind = entry.file_type().map_err(failed)?;
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        if kind.is_dir() && levels > 0 && !hidden {
            walk(&path, levels - 1, left, files)?;
        }
        let extension = path.extension().and_then(|extension| extension.to_str());
        if kind.is_file() && matches!(extension, Some("yaml" | "yml" | "json")) && is_cases(&path) {
            files.insert(path);
        }
    }
    Ok(())
}

/// The graphs of a directory, whatever nodes written in Rust they use.
fn load_graphs(directory: &Path, known: &dyn NodeNames) -> Result<Graphs, LoadError> {
    let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
    let mut texts = Vec::new();
    let mut named = BTreeSet::new();
    for file in files_of(directory)? {
        let (name, text) = (file.display().to_string(), read_text(&file)?);
        if let (Some(graph), ..) = parse_str(&name, &text) {
            named.extend(graph.nodes.iter().filter_map(|(_, node)| node.use_name.clone()));
        }
        texts.push((name, text));
    }
    let texts: Vec<_> = texts.iter().map(|(file, text)| (file.as_str(), text.as_str())).collect();
    Ok(load_all(&texts, &AnyName { named, known }))
}

fn read(file: &Path, graphs: &Graphs, loaded: &mut Loaded) -> Result<(), LoadError> {
    let name = file.display().to_string();
    let (source, mut problems) = Source::parse(&name, &read_text(file)?);
    let cases = if problems.is_empty() {
        match source.value() {
            Value::Array(cases) if cases.len() <= MAX_CASES => cases,
            Value::Array(cases) => {
                let message = format!("there are {} cases; the limit is {MAX_CASES}", cases.len());
                problems.push(Diagnostic::error("too-large", &[], message));
                Vec::new()
            }
            _ => {
                let problem = Diagnostic::error("wrong-type", &[], "the cases are a list");
                problems.push(problem.help("write `- name: ..` for each case"));
                Vec::new()
            }
        }
    } else {
        Vec::new()
    };
    let mut reader =
        Reader { file, graphs, problems, names: BTreeSet::new(), refused: BTreeSet::new() };
    let cases = (0..).zip(cases).filter_map(|(at, case)| reader.case(at, case)).collect();
    let Reader { mut problems, refused, .. } = reader;
    source.locate(&mut problems);
    loaded.diagnostics.extend(problems);
    for file in refused {
        let of_file = |problem: &&Diagnostic| {
            problem.is_error() && problem.location.as_ref().is_some_and(|at| at.file == file)
        };
        for problem in graphs.diagnostics.iter().filter(of_file) {
            if !loaded.diagnostics.contains(problem) {
                loaded.diagnostics.push(problem.clone());
            }
        }
    }
    loaded.suites.push(Suite { file: name, cases });
    loaded.sources.push(source);
    Ok(())
}

struct Reader<'a> {
    file: &'a Path,
    graphs: &'a Graphs,
    problems: Vec<Diagnostic>,
    names: BTreeSet<String>,
    /// Graph files that a case needs and that have errors.
    refused: BTreeSet<String>,
}

impl Reader<'_> {
    fn case(&mut self, at: usize, value: Value) -> Option<Case> {
        let at = at.to_string();
        let def: CaseDef =
            read_value(&[&at], value).map_err(|problem| self.problems.push(*problem)).ok()?;
        if !self.names.insert(def.name.clone()) {
            let message = format!("another case of the file is called {:?}", def.name);
            self.problems.push(Diagnostic::error("name", &[&at, "name"], message));
        }
        let graph = match &def.graph {
            Some(name) => self.graphs.catalog.get(name),
            None => self.beside(),
        };
        let Some(graph) = graph else {
            self.no_graph(&at, def.graph.as_deref());
            return None;
        };
        let before = self.problems.len();
        let script = Script::read(&graph, &def, &at, &mut self.problems);
        let path = def.expect.path.iter().flatten();
        for node in path.flat_map(super::cases::PathStep::nodes) {
            if graph.find_node(node).is_none() {
                let message = format!("graph `{}` has no node `{node}`", graph.name);
                let problem =
                    Diagnostic::error("unknown-node", &[&at, "expect", "path"], message).on_key();
                let names = graph.nodes.iter().map(|node| node.name.as_str());
                self.problems.push(problem.suggest(node, names));
            }
        }
        for node in def.expect.effects.iter().filter_map(|effect| effect.node.as_deref()) {
            if place_of(&graph, node).is_none() {
                let message = format!("graph `{}` has no node `{node}`", graph.name);
                let path = [at.as_str(), "expect", "effects"];
                self.problems.push(Diagnostic::error("unknown-node", &path, message).on_key());
            }
        }
        for name in &def.expect.never_called {
            if place_of(&graph, name).is_none() && !may_call(&graph, name) {
                let message = format!("graph `{}` has no node and no tool `{name}`", graph.name);
                let path = [at.as_str(), "expect", "never_called"];
                self.problems.push(Diagnostic::error("unknown-node", &path, message).on_key());
            }
        }
        (self.problems.len() == before).then(|| Case { def, graph, script: Arc::new(script) })
    }

    /// Which file is the graph's own.
    fn graph_files(&self) -> Vec<String> {
        let stem = self.file.file_stem().map(Path::new).and_then(Path::file_stem);
        let stem = stem.unwrap_or_default().to_string_lossy().into_owned();
        let directory = self.file.parent().filter(|parent| !parent.as_os_str().is_empty());
        let directory = directory.unwrap_or(Path::new("."));
        let named = |extension| directory.join(format!("{stem}.{extension}")).display().to_string();
        ["yaml", "yml", "json"].map(named).into()
    }

    fn beside(&self) -> Option<Arc<crate::graph::model::Graph>> {
        let files = self.graph_files();
        let source =
            self.graphs.sources.iter().find(|one| files.iter().any(|f| f == one.file()))?;
        let value = source.value();
        self.graphs.catalog.get(value.get("name")?.as_str()?)
    }

    fn no_graph(&mut self, at: &str, name: Option<&str>) {
        let files = self.graph_files();
        let named = |source: &&Source| match name {
            Some(name) => source.value().get("name").and_then(Value::as_str) == Some(name),
            None => files.iter().any(|file| file == source.file()),
        };
        let source = self.graphs.sources.iter().find(named).map(Source::file);
        let (path, message): (&[&str], String) = match (name, source) {
            (_, Some(file)) => {
                // The graph is there, and something in it or in a graph that it calls is wrong.
                let all = self.graphs.diagnostics.iter().filter(|problem| problem.is_error());
                self.refused.extend(
                    all.filter_map(|problem| Some(problem.location.as_ref()?.file.clone())),
                );
                (&["name"], format!("the graph in {file} has errors"))
            }
            (Some(name), None) => (&["graph"], format!("no graph `{name}` is in the directory")),
            (None, None) => (&["name"], format!("there is no graph in {}", files[0])),
        };
        let path: Vec<&str> = std::iter::once(at).chain(path.iter().copied()).collect();
        let problem = Diagnostic::error("unknown-graph", &path, message);
        let names: Vec<String> =
            self.graphs.catalog.iter().map(|graph| graph.name.clone()).collect();
        let names = names.iter().map(String::as_str);
        self.problems.push(match (name, source) {
            (Some(name), None) => problem.suggest(name, names),
            (None, None) => problem.help("say which one with `graph:`"),
            (_, Some(_)) => problem,
        });
    }
}
