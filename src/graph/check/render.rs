//! Diagnostics for people: the place in the file, the line, what is meant, and what to do.

use miette::{
    GraphicalReportHandler, GraphicalTheme, LabeledSpan, MietteDiagnostic, NamedSource, Report,
};

use super::{Diagnostic, Severity};
use crate::graph::source::Source;

/// Diagnostics with snippets of the sources that they were found in, for a terminal or a log.
#[must_use]
pub fn render(diagnostics: &[Diagnostic], sources: &[Source], color: bool) -> String {
    let theme = if color { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
    let handler = GraphicalReportHandler::new_themed(theme).with_links(false).with_width(100);
    let mut text = String::new();
    for diagnostic in diagnostics {
        let report = report(diagnostic, sources);
        if handler.render_report(&mut text, report.as_ref()).is_err() {
            text.push_str(&diagnostic.to_string());
        }
        text.push('\n');
    }
    text
}

/// How many errors and warnings there are, in words.
#[must_use]
pub fn summary(diagnostics: &[Diagnostic], graphs: usize) -> String {
    let errors = diagnostics.iter().filter(|diagnostic| diagnostic.is_error()).count();
    let counted = |count: usize, what: &str| match count {
        1 => format!("1 {what}"),
        count => format!("{count} {what}s"),
    };
    let problems = match (errors, diagnostics.len() - errors) {
        (0, 0) => "no problems".to_owned(),
        (0, warnings) => counted(warnings, "warning"),
        (errors, 0) => counted(errors, "error"),
        (errors, warnings) => {
            format!("{}, {}", counted(errors, "error"), counted(warnings, "warning"))
        }
    };
    format!("{}: {problems}", counted(graphs, "graph"))
}

fn report(diagnostic: &Diagnostic, sources: &[Source]) -> Report {
    let severity = match diagnostic.severity {
        Severity::Error => miette::Severity::Error,
        Severity::Warning => miette::Severity::Warning,
    };
    let mut shown = MietteDiagnostic::new(diagnostic.message.clone())
        .with_code(diagnostic.code)
        .with_severity(severity);
    if let Some(help) = &diagnostic.help {
        shown = shown.with_help(help.clone());
    }
    let Some(at) = &diagnostic.location else { return Report::new(shown) };
    let source = sources.iter().find(|source| source.file() == at.file);
    let Some(source) = source.filter(|source| !source.text().is_empty()) else {
        shown.message = format!("{}: {}", at.file, shown.message);
        return Report::new(shown);
    };
    let span = at.offset..at.offset + at.length;
    let shown = shown.with_label(LabeledSpan::underline(span));
    Report::new(shown).with_source_code(NamedSource::new(&at.file, source.text().to_owned()))
}
