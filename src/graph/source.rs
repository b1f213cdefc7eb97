//! The text of a graph file: YAML or JSON read into a tree that knows where each part stands.
//!
//! The tree is built from the parser's events, not through serde, because a diagnostic needs the place
//! of every key and value, and because plain scalars are read more strictly here than YAML does: only
//! `null`, `~`, `true`, `false` and JSON's numbers are not strings. So `no` is a country, `017` a string.
//!
//! **Invariant:** no text makes this run long, recurse or panic: bytes, parts, depth, and what aliases
//! expand to are bounded before they are built.

use std::collections::{HashMap, HashSet};

use granit_parser::{Event, Options, Parser, ScalarStyle, Span as Extent};
use serde_json::{Map, Value};

use super::check::{Diagnostic, Location, Part};

/// Bytes of one file.
pub const MAX_FILE_BYTES: usize = 1 << 20;
/// Keys and values of one file, aliases expanded.
pub const MAX_PARTS: usize = 100_000;
/// Levels of lists and maps.
pub const MAX_DEPTH: usize = 64;

/// A text and the tree that it holds.
#[derive(Debug)]
pub struct Source {
    file: String,
    text: String,
    root: Option<Node>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Span {
    start: usize,
    end: usize,
}

#[derive(Debug, Clone)]
struct Node {
    span: Span,
    size: usize,
    depth: usize,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Scalar(Value),
    List(Vec<Node>),
    Map(Vec<(String, Span, Node)>),
}

impl Source {
    /// Reads `text`; `file` is what diagnostics call it. Problems are located already.
    #[must_use]
    pub fn parse(file: &str, text: &str) -> (Self, Vec<Diagnostic>) {
        let mut source = Self { file: file.into(), text: String::new(), root: None };
        if text.len() > MAX_FILE_BYTES {
            let message =
                format!("the file has {} bytes, the limit is {MAX_FILE_BYTES}", text.len());
            let mut problems = vec![Diagnostic::error("too-large", &[], message)];
            source.locate(&mut problems);
            return (source, problems);
        }
        text.strip_prefix('\u{feff}').unwrap_or(text).clone_into(&mut source.text);
        let mut builder = Builder::default();
        match builder.run(&source.text) {
            Ok(root) => source.root = Some(root),
            Err((span, problem)) => builder.problems.push((span, *problem)),
        }
        let problems = builder.problems.into_iter().map(|(span, mut problem)| {
            problem.location = Some(source.location(span));
            problem
        });
        let problems = problems.collect();
        (source, problems)
    }

    /// The text.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What the file is called.
    #[must_use]
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The whole as JSON; null when it could not be read.
    #[must_use]
    pub fn value(&self) -> Value {
        self.root.as_ref().map_or(Value::Null, Node::value)
    }

    /// Gives each diagnostic that has no location the one that its path leads to, and sorts them.
    pub fn locate(&self, diagnostics: &mut [Diagnostic]) {
        for diagnostic in diagnostics.iter_mut() {
            if diagnostic.location.is_none() {
                let span = self.find(&diagnostic.path, diagnostic.part);
                diagnostic.location = Some(self.location(span));
            }
        }
        let key = |diagnostic: &Diagnostic| {
            diagnostic.location.as_ref().map(|at| (at.offset, diagnostic.code))
        };
        diagnostics.sort_by(|a, b| key(a).cmp(&key(b)));
    }

    /// The place that a path leads to, or as far as it leads.
    fn find(&self, path: &[String], part: Part) -> Span {
        let Some(mut node) = self.root.as_ref() else { return Span::default() };
        let mut key = None;
        let mut found = 0;
        for step in path {
            let next = match &node.kind {
                Kind::Map(entries) => entries
                    .iter()
                    .find(|(name, ..)| name == step)
                    .map(|(_, span, value)| (Some(*span), value)),
                Kind::List(items) => {
                    step.parse::<usize>().ok().and_then(|at| items.get(at)).map(|item| (None, item))
                }
                Kind::Scalar(_) => None,
            };
            let Some((span, value)) = next else { break };
            (key, node) = (span.or(key), value);
            found += 1;
        }
        match part {
            Part::Within(offset) if found == path.len() => self.within(node, offset),
            // What the path names is not there, or its key is meant.
            _ if found < path.len() => key.unwrap_or(Span { start: 0, end: 0 }),
            Part::Key => key.unwrap_or(node.span),
            Part::Value | Part::Within(_) => self.one_line(node.span),
        }
    }

    /// The word at `offset` of a string, where the text holds the string as it is.
    fn within(&self, node: &Node, offset: usize) -> Span {
        let raw = self.text.get(node.span.start..node.span.end).unwrap_or_default();
        let Kind::Scalar(Value::String(value)) = &node.kind else { return node.span };
        let Some(inner) = raw.find(value.as_str()) else { return self.one_line(node.span) };
        let start = node.span.start + inner + offset.min(value.len());
        let rest = value.get(offset..).unwrap_or_default();
        let word =
            rest.find(|char: char| !char.is_alphanumeric() && char != '_').unwrap_or(rest.len());
        Span { start, end: start + word.max(usize::from(!rest.is_empty())) }
    }

    /// A span cut at the end of its first line, so that a map is not underlined whole.
    fn one_line(&self, span: Span) -> Span {
        let text = self.text.get(span.start..span.end).unwrap_or_default();
        let line = text.split('\n').next().unwrap_or_default().trim_end();
        Span { start: span.start, end: span.start + line.len() }
    }

    fn location(&self, span: Span) -> Location {
        let mut start = span.start.min(self.text.len());
        while !self.text.is_char_boundary(start) {
            start -= 1;
        }
        let before = &self.text[..start];
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        Location {
            file: self.file.clone(),
            line: before.matches('\n').count() + 1,
            column: self.text[line_start..start].chars().count() + 1,
            offset: start,
            length: span.end.saturating_sub(start),
        }
    }
}

impl Node {
    fn value(&self) -> Value {
        match &self.kind {
            Kind::Scalar(value) => value.clone(),
            Kind::List(items) => items.iter().map(Node::value).collect(),
            Kind::Map(entries) => {
                let mut map = Map::with_capacity(entries.len());
                for (key, _, value) in entries {
                    map.insert(key.clone(), value.value());
                }
                Value::Object(map)
            }
        }
    }
}

type Failure = (Span, Box<Diagnostic>);

/// A container under construction.
#[derive(Debug)]
struct Frame {
    span: Span,
    anchor: usize,
    size: usize,
    depth: usize,
    kind: FrameKind,
}

#[derive(Debug)]
enum FrameKind {
    List(Vec<Node>),
    Map { entries: Vec<(String, Span, Node)>, key: Option<(String, Span)>, seen: HashSet<String> },
}

#[derive(Debug, Default)]
struct Builder {
    stack: Vec<Frame>,
    anchors: HashMap<usize, Node>,
    parts: usize,
    root: Option<Node>,
    problems: Vec<(Span, Diagnostic)>,
}

impl Builder {
    fn run(&mut self, text: &str) -> Result<Node, Failure> {
        let mut options = Options::default();
        options.emit_comments = false;
        options.flow_nesting_limit = MAX_DEPTH + 1;
        options.block_nesting_limit = MAX_DEPTH + 1;
        let mut documents = 0;
        for event in Parser::new_from_str_with_options(text, options) {
            let (event, extent) = event.map_err(|err| {
                let at = err.marker().byte_offset().unwrap_or(0);
                failure("syntax", Span { start: at, end: at }, err.info())
            })?;
            let span = span_of(&extent);
            match event {
                Event::DocumentStart(..) => documents += 1,
                Event::Alias(anchor) => self.alias(anchor, span)?,
                Event::Scalar(text, style, anchor, tag) => {
                    no_tag(tag.is_some(), span)?;
                    let kind = Kind::Scalar(scalar(&text, style));
                    self.add(Node { span, size: 1, depth: 0, kind }, anchor)?;
                }
                Event::SequenceStart(_, anchor, tag) => {
                    no_tag(tag.is_some(), span)?;
                    self.open(span, anchor, FrameKind::List(Vec::new()))?;
                }
                Event::MappingStart(_, anchor, tag) => {
                    no_tag(tag.is_some(), span)?;
                    let map =
                        FrameKind::Map { entries: Vec::new(), key: None, seen: HashSet::new() };
                    self.open(span, anchor, map)?;
                }
                Event::SequenceEnd | Event::MappingEnd => self.close(span)?,
                _ => {}
            }
            if documents > 1 {
                return Err(failure("syntax", span, "a file holds one graph, this starts another"));
            }
        }
        let empty = || failure("syntax", Span::default(), "the file is empty");
        self.root.take().ok_or_else(empty)
    }

    fn count(&mut self, parts: usize, span: Span) -> Result<(), Failure> {
        self.parts = self.parts.saturating_add(parts);
        if self.parts > MAX_PARTS {
            let message =
                format!("the file has more than {MAX_PARTS} keys and values, aliases expanded");
            return Err(failure("too-large", span, message));
        }
        Ok(())
    }

    fn deep(&self, inner: usize, span: Span) -> Result<(), Failure> {
        if self.stack.len() + inner > MAX_DEPTH {
            let message = format!("the file nests deeper than {MAX_DEPTH} levels");
            return Err(failure("too-large", span, message));
        }
        Ok(())
    }

    fn alias(&mut self, anchor: usize, span: Span) -> Result<(), Failure> {
        let Some(node) = self.anchors.get(&anchor) else {
            return Err(failure("syntax", span, "an alias inside the value that it stands for"));
        };
        let (size, depth) = (node.size, node.depth);
        self.count(size, span)?;
        self.deep(depth, span)?;
        let mut node = self.anchors.get(&anchor).cloned().unwrap_or(Node {
            span,
            size: 1,
            depth: 0,
            kind: Kind::Scalar(Value::Null),
        });
        node.span = span;
        self.push(node)
    }

    fn open(&mut self, span: Span, anchor: usize, kind: FrameKind) -> Result<(), Failure> {
        self.count(1, span)?;
        self.deep(1, span)?;
        self.stack.push(Frame { span, anchor, size: 1, depth: 0, kind });
        Ok(())
    }

    fn close(&mut self, end: Span) -> Result<(), Failure> {
        let Some(frame) = self.stack.pop() else { return Ok(()) };
        let span = Span { start: frame.span.start, end: end.end.max(frame.span.end) };
        let kind = match frame.kind {
            FrameKind::List(items) => Kind::List(items),
            FrameKind::Map { entries, .. } => Kind::Map(entries),
        };
        let node = Node { span, size: frame.size, depth: frame.depth + 1, kind };
        if frame.anchor > 0 {
            self.anchors.insert(frame.anchor, node.clone());
            self.count(node.size, span)?;
        }
        self.push(node)
    }

    fn add(&mut self, node: Node, anchor: usize) -> Result<(), Failure> {
        self.count(1, node.span)?;
        if anchor > 0 {
            self.anchors.insert(anchor, node.clone());
        }
        self.push(node)
    }

    /// Puts a finished node into the container that is open, as an item, a key or a value.
    fn push(&mut self, node: Node) -> Result<(), Failure> {
        let Some(frame) = self.stack.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        frame.size += node.size;
        frame.depth = frame.depth.max(node.depth);
        match &mut frame.kind {
            FrameKind::List(items) => items.push(node),
            FrameKind::Map { entries, key, seen } => match key.take() {
                None => {
                    let name = key_text(&node)?;
                    if !seen.insert(name.clone()) {
                        let message = format!("`{name}` is written twice in this map");
                        let problem = Diagnostic::error("duplicate-key", &[], message);
                        self.problems.push((node.span, problem));
                    }
                    *key = Some((name, node.span));
                }
                Some((name, span)) => entries.push((name, span, node)),
            },
        }
        Ok(())
    }
}

fn failure(code: &'static str, span: Span, message: impl Into<String>) -> Failure {
    (span, Box::new(Diagnostic::error(code, &[], message)))
}

fn no_tag(tagged: bool, span: Span) -> Result<(), Failure> {
    if tagged {
        return Err(failure("syntax", span, "YAML tags are not part of the format"));
    }
    Ok(())
}

fn key_text(node: &Node) -> Result<String, Failure> {
    match &node.kind {
        Kind::Scalar(Value::String(text)) => Ok(text.clone()),
        Kind::Scalar(other) => Ok(other.to_string()),
        _ => Err(failure("syntax", node.span, "a key must be text")),
    }
}

/// The value of a scalar: text when it is quoted or looks like nothing else that JSON has.
fn scalar(text: &str, style: ScalarStyle) -> Value {
    if style != ScalarStyle::Plain {
        return Value::from(text);
    }
    match text {
        "" | "~" | "null" => Value::Null,
        "true" => Value::Bool(true),
        "false" => Value::Bool(false),
        _ if text.starts_with(|first: char| first == '-' || first.is_ascii_digit()) => {
            serde_json::from_str::<serde_json::Number>(text)
                .map_or_else(|_| Value::from(text), Value::Number)
        }
        _ => Value::from(text),
    }
}

fn span_of(extent: &Extent) -> Span {
    let start = extent.start.byte_offset().unwrap_or(0);
    Span { start, end: extent.end.byte_offset().unwrap_or(start).max(start) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(text: &str, expected: &Value) {
        let (source, problems) = Source::parse("test.yaml", text);
        assert_eq!(problems, [], "{text}");
        assert_eq!(source.value(), *expected, "{text}");
    }

    fn check_err(text: &str, expected: &str) {
        let (_, problems) = Source::parse("test.yaml", text);
        let found: Vec<String> = problems.iter().map(ToString::to_string).collect();
        assert!(found.iter().any(|found| found.contains(expected)), "{expected}: {found:?}");
    }

    #[test]
    fn plain_scalars_are_strings_unless_json_would_read_them_otherwise() {
        check(
            "[no, on, yes, True, 017, 1_000, 0x10, .5, 1e3, -1, 1.5, ~, null, true]",
            &json!([
                "no", "on", "yes", "True", "017", "1_000", "0x10", ".5", 1e3, -1, 1.5, null, null,
                true
            ]),
        );
        check(
            "a: '1'\nb: \"true\"\nc: |\n  null\n",
            &json!({ "a": "1", "b": "true", "c": "null\n" }),
        );
    }

    #[test]
    fn json_is_read_as_it_is() {
        check(
            "{\"a\":\t[1, \"\\u00fc\\/\\n\", {}],\n\t\"b\": {\"c\":null}}",
            &json!({ "a": [1, "ü/\n", {}], "b": { "c": null } }),
        );
        check(r#"{"face": "\ud83d\ude00"}"#, &json!({ "face": "😀" }));
    }

    #[test]
    fn aliases_are_expanded_within_bounds() {
        check("a: &x { n: 1 }\nb: *x", &json!({ "a": { "n": 1 }, "b": { "n": 1 } }));
        let mut bomb = String::from("l0: &l0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..12 {
            let items = vec![format!("*l{}", level - 1); 10].join(", ");
            bomb.push_str(&format!("l{level}: &l{level} [{items}]\n"));
        }
        check_err(&bomb, "more than 100000 keys and values");
        check_err("a: &x [*x]", "alias inside the value");
    }

    #[test]
    fn what_is_no_document_is_refused_with_its_place() {
        check_err("", "test.yaml:1:1: error[syntax]: the file is empty");
        check_err("# nothing\n", "the file is empty");
        check_err("a: 1\na: 2", "test.yaml:2:1: error[duplicate-key]: `a` is written twice");
        check_err("a: [1, 2", "error[syntax]");
        check_err("a: 1\n---\nb: 2", "starts another");
        check_err("a: !!binary aGk=", "tags are not part");
        check_err(&"x".repeat(MAX_FILE_BYTES + 1), "error[too-large]");
        check_err(&format!("{}1{}", "[".repeat(1000), "]".repeat(1000)), "");
        check_err(
            &(0..200).map(|level| format!("{}a:\n", " ".repeat(level))).collect::<String>(),
            "",
        );
    }

    #[test]
    fn a_path_leads_to_line_and_column() {
        let text =
            "name: x\nnodes:\n  a:\n    use: some-thing\n  bü: { set: { n: \"${stat.n}\" } }\n";
        let (source, _) = Source::parse("f.yaml", text);
        let check = |path: &[&str], part: Part, line: usize, column: usize, word: &str| {
            let mut found = vec![Diagnostic::error("edge", path, "")];
            found[0].part = part;
            source.locate(&mut found);
            let at = found[0].location.clone().unwrap();
            assert_eq!((at.line, at.column), (line, column), "{path:?}");
            assert_eq!(&text[at.offset..at.offset + at.length], word, "{path:?}");
        };
        check(&["nodes", "a", "use"], Part::Value, 4, 10, "some-thing");
        check(&["nodes", "a", "use"], Part::Key, 4, 5, "use");
        check(&["nodes", "bü", "set", "n"], Part::Within(2), 5, 22, "stat");
        check(&["nodes", "a", "nope"], Part::Key, 3, 3, "a");
        check(&["nodes"], Part::Key, 2, 1, "nodes");
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in "[a-c0-9:{}\\[\\],&*!|>'\"#%@~ \n\t-]{0,200}") {
            let _ = Source::parse("f", &text);
        }
    }
}
