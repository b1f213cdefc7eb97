//! `cynai graph test`: runs the cases that are written beside graphs. Needs no server and no database.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::graph::print;
use crate::graph::check::render::render;
use crate::kit::{Loaded, Verdict, load, run as run_case};
use crate::nodes::{Registry, StoredNames};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cynai graph test graphs
  cynai graph test graphs/triage.yaml --case 'a person says no'
  cynai graph test graphs --crash-everywhere

Models, tools, jobs, people and the time are the case's own: nothing outside is touched.")]
pub(super) struct TestArgs {
    /// Graph files with cases beside them (NAME.test.yaml), files with cases, or directories with such files in them.
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    /// Only the case of this name. May be repeated.
    #[arg(long = "case", value_name = "NAME")]
    cases: Vec<String>,
    /// Run each case again for each of its commits, with the engine dropped right before and right after it, and compare.
    #[arg(long)]
    crash_everywhere: bool,
    /// How to print what came of the cases.
    #[arg(long, value_enum, default_value_t = TestFormat::Text)]
    format: TestFormat,
    /// The same as --format json.
    #[arg(long, conflicts_with = "format")]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TestFormat {
    /// A line for each case, and what is not as it should be.
    Text,
    /// One JSON object.
    Json,
}

/// Runs the cases; one that fails is the command's failure.
pub(super) async fn run(args: TestArgs) -> anyhow::Result<()> {
    let as_json = args.json || args.format == TestFormat::Json;
    let loaded = load(&args.paths, &StoredNames(Registry::default()))?;
    let errors = loaded.diagnostics.iter().filter(|problem| problem.is_error()).count();
    if errors > 0 {
        return refused(&loaded, errors, as_json);
    }
    let known = |name: &String| {
        loaded.suites.iter().flat_map(|suite| &suite.cases).any(|case| case.def.name == *name)
    };
    if let Some(name) = args.cases.iter().find(|name| !known(name)) {
        bail!("there is no case {name:?} in these files");
    }
    let (mut count, mut failed, mut told) = (0_usize, 0_usize, Vec::new());
    for suite in &loaded.suites {
        let wanted = |name: &String| args.cases.is_empty() || args.cases.contains(name);
        for case in suite.cases.iter().filter(|case| wanted(&case.def.name)) {
            let began = Instant::now();
            let verdict = Box::pin(run_case(case, args.crash_everywhere, None)).await;
            let seconds = began.elapsed().as_secs_f64();
            count += 1;
            failed += usize::from(!verdict.holds());
            if as_json {
                told.push(as_value(&suite.file, &verdict, seconds)?);
            } else {
                print(&lines(&suite.file, &verdict, seconds))?;
            }
        }
    }
    if as_json {
        let all = json!({ "cases": told, "passed": count - failed, "failed": failed });
        print(&(serde_json::to_string_pretty(&all)? + "\n"))?;
    } else {
        let cases = if count == 1 { "case" } else { "cases" };
        print(&format!("{count} {cases}: {} ok, {failed} FAILED\n", count - failed))?;
    }
    if failed > 0 {
        bail!("{failed} of {count} cases failed");
    }
    Ok(())
}

fn refused(loaded: &Loaded, errors: usize, as_json: bool) -> anyhow::Result<()> {
    if as_json {
        let all = json!({ "cases": [], "diagnostics": loaded.diagnostics });
        print(&(serde_json::to_string_pretty(&all)? + "\n"))?;
    } else {
        let mut stderr = std::io::stderr().lock();
        let color = stderr.is_terminal();
        let text = render(&loaded.diagnostics, &loaded.sources, color);
        stderr.write_all(text.as_bytes()).context("standard error cannot be written")?;
    }
    bail!("no case was run: {errors} {}", if errors == 1 { "error" } else { "errors" })
}

fn as_value(file: &str, verdict: &Verdict, seconds: f64) -> anyhow::Result<Value> {
    let mut value = serde_json::to_value(verdict)?;
    value["file"] = file.into();
    value["ok"] = verdict.holds().into();
    value["seconds"] = seconds.into();
    Ok(value)
}

fn lines(file: &str, verdict: &Verdict, seconds: f64) -> String {
    let mut notes = vec![format!("{:.1} ms", seconds * 1e3)];
    if let Some(crashes) = &verdict.crashes {
        notes.push(format!("{} commits, {} crashes", crashes.commits, crashes.runs));
        if crashes.retried > 0 {
            notes.push(format!("{} unknown outcomes sent again", crashes.retried));
        }
        if crashes.declared > 0 {
            notes.push(format!("{} ended by `effects: fail`", crashes.declared));
        }
    }
    let word = if verdict.holds() { "ok    " } else { "FAILED" };
    let mut text = format!("{word}  {file}: {} ({})\n", verdict.name, notes.join(", "));
    for difference in &verdict.differences {
        for (at, line) in difference.to_string().lines().enumerate() {
            text.push_str(if at == 0 { "        - " } else { "          " });
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}
