//! What stands before the parser: limits that keep its recursion within any thread's stack.
//!
//! The parser and everything that walks its tree recurse once for each term of a chain such as
//! `1 + 1 + ..`, and a stack that overflows ends the process: no error can be made of it. So the
//! number of tokens and the depth of brackets are counted here, without recursion, before it runs. The
//! parser takes many frames for each bracket, so it gets a stack of its own.

use cel::Env;
use cel::common::ast::{IdedExpr, SourceInfo};

use super::{ExprError, MAX_NESTING, MAX_SOURCE_BYTES, MAX_TOKENS};

/// The parser's tree and the place of each of its nodes.
pub(super) struct Parsed {
    pub(super) root: IdedExpr,
    pub(super) info: SourceInfo,
}

/// Refuses a source that is too long, has too many tokens, or nests too deeply.
pub(super) fn check(source: &str) -> Result<(), ExprError> {
    if source.trim().is_empty() {
        return Err(ExprError::at(0, "the expression is empty"));
    }
    if source.len() > MAX_SOURCE_BYTES {
        return Err(ExprError::at(
            MAX_SOURCE_BYTES,
            format!("the expression has {} bytes, the limit is {MAX_SOURCE_BYTES}", source.len()),
        ));
    }
    let mut scan = Scan { bytes: source.as_bytes(), at: 0, tokens: 0, depth: 0, prefixes: 0 };
    while scan.at < scan.bytes.len() {
        scan.token()?;
    }
    Ok(())
}

/// What the parser needs for [`MAX_NESTING`] brackets in an unoptimised build, four times over.
const PARSER_STACK_BYTES: usize = 64 << 20;

/// Parses a source that passed [`check`].
pub(super) fn parse(source: &str) -> Result<Parsed, ExprError> {
    let failed = || ExprError::at(None, "the expression could not be parsed");
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("cel-parser".into())
            .stack_size(PARSER_STACK_BYTES)
            .spawn_scoped(scope, || parse_here(source))
            .map_err(|_| failed())?
            .join()
            .unwrap_or_else(|_| Err(failed()))
    })
}

fn parse_here(source: &str) -> Result<Parsed, ExprError> {
    let nesting = u16::try_from(MAX_NESTING + 1).unwrap_or(u16::MAX);
    let parser = Env::default().with_optional_support(false).parser().max_recursion_depth(nesting);
    match parser.parse_with_source_info(source) {
        Ok((root, info)) => Ok(Parsed { root, info }),
        Err(errors) => Err(errors.errors.first().map_or_else(
            || ExprError::at(None, "this is not an expression"),
            |first| ExprError::at(offset_of(source, first.pos), tidy(&first.msg)),
        )),
    }
}

/// The byte offset of the parser's (line, column), the column counted from 1 in characters.
fn offset_of(source: &str, (line, column): (isize, isize)) -> Option<usize> {
    let line = usize::try_from(line).ok()?.checked_sub(1)?;
    let column = usize::try_from(column).ok()?.saturating_sub(1);
    let start: usize = source.split_inclusive('\n').take(line).map(str::len).sum();
    let rest = source.get(start..)?;
    Some(start + rest.char_indices().nth(column).map_or(rest.len(), |(at, _)| at))
}

/// The parser's message in the voice of ours: its token lists help nobody.
fn tidy(message: &str) -> String {
    let message = message.strip_prefix("Syntax error: ").unwrap_or(message);
    let short = message.split(" expecting ").next().unwrap_or(message).trim();
    let short: String = short.chars().take(200).collect();
    format!("syntax error: {short}")
}

struct Scan<'a> {
    bytes: &'a [u8],
    at: usize,
    tokens: usize,
    depth: usize,
    prefixes: usize,
}

impl Scan<'_> {
    fn token(&mut self) -> Result<(), ExprError> {
        let start = self.at;
        let byte = self.bytes[start];
        if byte.is_ascii_whitespace() {
            self.at += 1;
            return Ok(());
        }
        if byte == b'/' && self.bytes.get(start + 1) == Some(&b'/') {
            self.skip_while(|byte| byte != b'\n');
            return Ok(());
        }
        self.tokens += 1;
        if self.tokens > MAX_TOKENS {
            return Err(ExprError::at(
                start,
                format!("the expression has more than {MAX_TOKENS} tokens"),
            )
            .help("compute parts of it in `set` nodes and channels of their own"));
        }
        self.prefixes = if matches!(byte, b'!' | b'-') { self.prefixes + 1 } else { 0 };
        match byte {
            b'\'' | b'"' => self.string(false),
            b'(' | b'[' | b'{' => {
                self.depth += 1;
                self.at += 1;
            }
            b')' | b']' | b'}' => {
                self.depth = self.depth.saturating_sub(1);
                self.at += 1;
            }
            b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | b'_' => self.word(start),
            _ => self.at += 1,
        }
        if self.depth > MAX_NESTING || self.prefixes > MAX_NESTING {
            return Err(ExprError::at(
                start,
                format!("the expression nests deeper than {MAX_NESTING} levels"),
            ));
        }
        Ok(())
    }

    fn skip_while(&mut self, keep: impl Fn(u8) -> bool) {
        while self.bytes.get(self.at).is_some_and(|byte| keep(*byte)) {
            self.at += 1;
        }
    }

    fn word(&mut self, start: usize) {
        self.skip_while(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        let word = &self.bytes[start..self.at];
        let prefix = word.len() <= 2 && word.iter().all(|byte| b"rRbB".contains(byte));
        if prefix && matches!(self.bytes.get(self.at), Some(b'\'' | b'"')) {
            self.string(word.iter().any(|byte| b"rR".contains(byte)));
        }
    }

    /// Moves past a string literal; one that is not closed runs to the end, for the parser to refuse.
    fn string(&mut self, raw: bool) {
        let quote = self.bytes[self.at];
        let triple = self.bytes[self.at..].starts_with(&[quote; 3]);
        let close: &[u8] = if triple { &[quote; 3] } else { &[quote] };
        self.at += close.len();
        while self.at < self.bytes.len() {
            if !raw && self.bytes[self.at] == b'\\' {
                self.at += 2;
            } else if self.bytes[self.at..].starts_with(close) {
                self.at += close.len();
                return;
            } else {
                self.at += 1;
            }
        }
        self.at = self.bytes.len();
    }
}

/// The end of the `${` expression that starts at `start` in `text`: the offset of its closing brace.
pub(super) fn closing_brace(text: &str, start: usize) -> Option<usize> {
    let mut scan = Scan { bytes: text.as_bytes(), at: start, tokens: 0, depth: 0, prefixes: 0 };
    while scan.at < scan.bytes.len() {
        if scan.depth == 0 && scan.bytes[scan.at] == b'}' {
            return Some(scan.at);
        }
        // A limit that is passed is reported when the expression itself is compiled.
        scan.tokens = 0;
        if scan.token().is_err() {
            scan.prefixes = 0;
        }
    }
    None
}
