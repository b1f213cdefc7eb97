//! How results are printed: tables for people, JSON for programs.

use std::io::Write;

use comfy_table::{ContentArrangement, Table, presets};
use serde_json::Value;

/// Prints one JSON value on a line.
pub(super) fn json_line(value: &Value) {
    line(value);
}

/// Prints a JSON value for a person to read.
pub(super) fn pretty(value: &Value) {
    line(format_args!("{value:#}"));
}

/// Prints a line. A reader that has gone away, as `head` does, is no failure: what is left is not printed.
pub(super) fn line(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// Says something beside the result.
#[expect(clippy::print_stderr, reason = "printing is what this is for")]
pub(super) fn note(text: impl std::fmt::Display) {
    eprintln!("{text}");
}

/// Prints the rows of a list: a column for each `(heading, JSON Pointer)`.
pub(super) fn table(columns: &[(&str, &str)], rows: &[Value], none: &str) {
    if rows.is_empty() {
        note(none);
        return;
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(columns.iter().map(|(heading, _)| *heading));
    for row in rows {
        let cell = |pointer: &str| row.pointer(pointer).map(text).unwrap_or_default();
        table.add_row(columns.iter().map(|(_, pointer)| cell(pointer)));
    }
    line(table);
}

/// A value on one line: texts bare, instants without their fractions.
pub(super) fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => match chrono::DateTime::parse_from_rfc3339(text) {
            Ok(at) if text.len() >= 20 => at.format("%Y-%m-%d %H:%M:%S").to_string(),
            _ => printable(text),
        },
        other => printable(&other.to_string()),
    }
}

/// Without control characters: a stored text must not steer the reader's terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// The same for a text of several lines, whose ends stay.
pub(super) fn printable_lines(text: &str) -> String {
    let kept = text.replace("\r\n", "\n");
    kept.chars().map(|c| if c.is_control() && c != '\n' { ' ' } else { c }).collect()
}

/// Says a part of a line beside the result.
pub(super) fn note_part(text: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(input: &Value, expected: &str) {
        assert_eq!(text(input), expected);
    }

    #[test]
    fn values_are_shown_on_one_line() {
        check(&json!(null), "");
        check(&json!("2026-11-20T10:00:00.123456+00:00"), "2026-11-20 10:00:00");
        check(&json!("a\n\u{1b}[31mb"), "a  [31mb");
        check(&json!({"a": [1]}), "{\"a\":[1]}");
    }
}
