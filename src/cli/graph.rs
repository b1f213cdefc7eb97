//! `cynai graph`: check, draw, describe and test graph files. Needs no server and no database.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand, ValueEnum};

use crate::graph::check::render::{render, summary};
use crate::graph::compile::NodeNames;
use crate::graph::load::{Loaded, load_paths};
use crate::graph::model::Effect;
use crate::graph::picture::{Drawing, mermaid, svg};
use crate::graph::schema::json_schema_text;
use crate::kit::cases;

/// Check, draw, describe and test graph files.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cynai graph check graphs
  cynai graph show graphs/triage.yaml
  cynai graph schema > graph.schema.json
  cynai graph test graphs --crash-everywhere

Nothing of this needs a server.")]
pub(super) struct GraphArgs {
    #[command(subcommand)]
    command: GraphCommand,
}

#[derive(Debug, Subcommand)]
enum GraphCommand {
    /// Look for mistakes. Example: cynai graph check graphs --deny-warnings
    ///
    /// Prints every one in all files, with its place and what to do about it. Exit code 1 when there is an error.
    Check(CheckArgs),
    /// Draw a graph. Example: cynai graph show triage.yaml --format svg --output triage.svg
    Show(ShowArgs),
    /// Print the JSON Schema of the format, for editors. Example: cynai graph schema > graph.schema.json
    Schema(SchemaArgs),
    /// Run the cases that are written beside graphs. Example: cynai graph test graphs --crash-everywhere
    ///
    /// Prints a line for each, and what is not as it should be. Exit code 1 when a case fails.
    Test(super::graph_test::TestArgs),
}

#[derive(Debug, Args)]
struct SchemaArgs {
    /// The format of files with cases (NAME.test.yaml) in place of that of graphs.
    #[arg(long)]
    tests: bool,
}

#[derive(Debug, Args)]
struct Files {
    /// Graph files, or directories of them. Graphs that call each other are given together.
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    /// A name that `use:` may say: a node that your own program registers. May be repeated.
    #[arg(long = "node", value_name = "NAME")]
    nodes: Vec<String>,
}

#[derive(Debug, Args)]
struct CheckArgs {
    #[command(flatten)]
    files: Files,
    /// How to print what is found.
    #[arg(long, value_enum, default_value_t = CheckFormat::Text)]
    format: CheckFormat,
    /// The same as --format json.
    #[arg(long, conflicts_with = "format")]
    json: bool,
    /// Exit with 1 on a warning too.
    #[arg(long)]
    deny_warnings: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum CheckFormat {
    /// For people, with the lines in question.
    Text,
    /// One JSON object.
    Json,
}

#[derive(Debug, Args)]
struct ShowArgs {
    #[command(flatten)]
    files: Files,
    /// Which graph, when the files hold several.
    #[arg(long, value_name = "NAME")]
    graph: Option<String>,
    /// How to draw it.
    #[arg(long, value_enum, default_value_t = ShowFormat::Mermaid)]
    format: ShowFormat,
    /// How many levels of subgraphs to draw open.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=16))]
    xray: u8,
    /// Write to a file instead of the terminal.
    #[arg(long, short)]
    output: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ShowFormat {
    /// Text that Markdown viewers draw.
    Mermaid,
    /// A picture.
    Svg,
    /// Nodes and edges.
    Json,
}

/// The nodes that the command line names.
struct Named(Vec<String>);

impl NodeNames for Named {
    fn names(&self) -> Vec<String> {
        self.0.clone()
    }

    fn effect(&self, _: &str) -> Option<Effect> {
        None
    }
}

/// Runs the command; an error is the command's failure.
pub(super) async fn run(args: GraphArgs) -> anyhow::Result<()> {
    match args.command {
        GraphCommand::Check(args) => check(&args),
        GraphCommand::Show(args) => show(&args),
        GraphCommand::Schema(SchemaArgs { tests: false }) => print(&json_schema_text()),
        GraphCommand::Schema(SchemaArgs { tests: true }) => print(&cases::json_schema_text()),
        GraphCommand::Test(args) => super::graph_test::run(args).await,
    }
}

fn load(files: &Files) -> anyhow::Result<Loaded> {
    Ok(load_paths(&files.paths, &Named(files.nodes.clone()))?)
}

fn check(args: &CheckArgs) -> anyhow::Result<()> {
    let loaded = load(&args.files)?;
    let found = summary(&loaded.diagnostics, loaded.sources.len());
    if args.json || args.format == CheckFormat::Json {
        print(&as_json(&loaded)?)?;
    } else {
        tell(&loaded)?;
    }
    if loaded.has_errors() || (args.deny_warnings && !loaded.diagnostics.is_empty()) {
        bail!("{found}");
    }
    if args.json || args.format == CheckFormat::Json {
        Ok(())
    } else {
        print(&format!("{found}\n"))
    }
}

fn as_json(loaded: &Loaded) -> anyhow::Result<String> {
    let graphs: Vec<_> = loaded
        .catalog
        .iter()
        .map(|graph| serde_json::json!({ "name": graph.name, "hash": graph.hash.to_string() }))
        .collect();
    let json = serde_json::json!({ "graphs": graphs, "diagnostics": loaded.diagnostics });
    Ok(serde_json::to_string_pretty(&json)? + "\n")
}

fn show(args: &ShowArgs) -> anyhow::Result<()> {
    let loaded = load(&args.files)?;
    if loaded.has_errors() {
        tell(&loaded)?;
        bail!("{}", summary(&loaded.diagnostics, loaded.sources.len()));
    }
    let names =
        || loaded.catalog.iter().map(|graph| graph.name.as_str()).collect::<Vec<_>>().join(", ");
    let graph = match &args.graph {
        Some(name) => loaded
            .catalog
            .get(name)
            .with_context(|| format!("there is no graph {name}; the files hold {}", names()))?,
        None if loaded.catalog.len() == 1 => {
            loaded.catalog.iter().next().cloned().context("the files hold no graph")?
        }
        None => bail!("the files hold {}; say which with --graph", names()),
    };
    let drawing = Drawing::of(&graph, usize::from(args.xray));
    let picture = match args.format {
        ShowFormat::Mermaid => mermaid(&drawing),
        ShowFormat::Svg => svg(&drawing),
        ShowFormat::Json => serde_json::to_string_pretty(&drawing)? + "\n",
    };
    match &args.output {
        Some(path) => std::fs::write(path, picture)
            .with_context(|| format!("could not write {}", path.display())),
        None => print(&picture),
    }
}

/// Prints diagnostics for people, beside what the command gives.
fn tell(loaded: &Loaded) -> anyhow::Result<()> {
    let mut stderr = std::io::stderr().lock();
    let color = stderr.is_terminal();
    stderr.write_all(render(&loaded.diagnostics, &loaded.sources, color).as_bytes())?;
    Ok(())
}

/// Prints to standard output; a reader that has gone away is no failure.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(err) if err.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use futures::FutureExt;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        args: GraphArgs,
    }

    fn check(text: &str, flags: &[&str], expected: Result<(), &str>) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("g.yaml");
        std::fs::write(&file, text).unwrap();
        let file = file.to_str().unwrap();
        let line = ["graph", "check", file].into_iter().chain(flags.iter().copied());
        let result = run(Cli::parse_from(line).args).now_or_never().unwrap();
        let result = result.map_err(|err| err.to_string());
        assert_eq!(result, expected.map_err(str::to_owned), "{text} {flags:?}");
    }

    #[test]
    fn errors_fail_the_command_and_warnings_only_when_they_are_denied() {
        let sound = "{ name: g, nodes: { a: { use: mine } }, edges: [start -> a -> end] }";
        check(sound, &["--node", "mine"], Ok(()));
        check(sound, &["--node", "mine", "--json"], Ok(()));
        check(sound, &[], Err("1 graph: 1 error"));
        let warned =
            "{ name: g, nodes: { a: { use: mine } }, edges: [start -> a -> end, a -> end] }";
        check(warned, &["--node", "mine"], Ok(()));
        check(warned, &["--node", "mine", "--deny-warnings"], Err("1 graph: 1 warning"));
    }
}
