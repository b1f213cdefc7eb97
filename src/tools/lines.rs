//! Lines of JSON from a program that may print anything: no line grows past a limit, and of one that would,
//! or that cannot be read, it is still found out which request it answers.
//!
//! Some libraries write `{"jsonrpc":..,"id":7,"result":..}` and others put the id last, so the scanner reads
//! the whole line as it passes, and keeps nothing of it but the id.

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

/// What was read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// A line, without its end.
    Whole(Vec<u8>),
    /// A line over the limit, and the request that it answers, when it has the form of an answer.
    Oversized { bytes: u64, answers: Option<i64> },
}

/// Reads lines.
#[derive(Debug)]
pub(super) struct Lines<R> {
    reader: BufReader<R>,
    limit: usize,
    line: Vec<u8>,
    /// The length of the line so far, once it is over the limit, with what is known of it.
    over: Option<(u64, Scanner)>,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    /// Lines of at most `limit` bytes.
    pub(super) fn new(reader: R, limit: usize) -> Self {
        Self { reader: BufReader::new(reader), limit, line: Vec::new(), over: None }
    }

    /// The next line; none at the end. May be dropped and called again.
    ///
    /// # Errors
    /// Those of reading.
    pub(super) async fn next(&mut self) -> std::io::Result<Option<Line>> {
        loop {
            let available = self.reader.fill_buf().await?;
            if available.is_empty() {
                // What has no end was cut off: it is no message.
                return Ok(None);
            }
            let end = available.iter().position(|byte| *byte == b'\n');
            let part = &available[..end.unwrap_or(available.len())];
            match &mut self.over {
                Some((bytes, scanner)) => {
                    *bytes += part.len() as u64;
                    scanner.feed(part);
                }
                None if self.line.len() + part.len() > self.limit => {
                    let mut scanner = Scanner::default();
                    scanner.feed(&self.line);
                    scanner.feed(part);
                    self.over = Some(((self.line.len() + part.len()) as u64, scanner));
                    self.line = Vec::new();
                }
                None => self.line.extend_from_slice(part),
            }
            let taken = part.len() + usize::from(end.is_some());
            self.reader.consume(taken);
            if end.is_none() {
                continue;
            }
            if let Some((bytes, scanner)) = self.over.take() {
                return Ok(Some(Line::Oversized { bytes, answers: scanner.answers() }));
            }
            let mut line = std::mem::take(&mut self.line);
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            if !line.iter().all(u8::is_ascii_whitespace) {
                return Ok(Some(Line::Whole(line)));
            }
        }
    }
}

/// Finds the top-level `id` of a JSON object that passes by in pieces.
#[derive(Debug, Default)]
pub(super) struct Scanner {
    depth: usize,
    in_text: bool,
    escaped: bool,
    /// Whether the value of the last top-level key is being read, rather than a key.
    in_value: bool,
    key: Vec<u8>,
    id: Option<Vec<u8>>,
    /// Whether there is what an answer has, and not what a question has.
    is_answer: bool,
    is_request: bool,
}

/// The longest key that matters, and the longest id.
const MAX_WORD: usize = 19;

impl Scanner {
    /// Reads on.
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.byte(*byte));
    }

    fn byte(&mut self, byte: u8) {
        if self.in_text {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => {
                    self.in_text = false;
                    return;
                }
                _ => {}
            }
            return self.keep(byte);
        }
        match byte {
            b'"' => {
                self.in_text = true;
                if self.depth == 1 && !self.in_value {
                    self.key.clear();
                }
            }
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth = self.depth.saturating_sub(1),
            b':' if self.depth == 1 => {
                self.in_value = true;
                match self.key.as_slice() {
                    b"id" => self.id = Some(Vec::new()),
                    b"result" | b"error" => self.is_answer = true,
                    b"method" => self.is_request = true,
                    _ => {}
                }
            }
            b',' if self.depth == 1 => self.in_value = false,
            _ if byte.is_ascii_whitespace() => {}
            _ => self.keep(byte),
        }
    }

    /// Keeps a byte of a top-level key, or of the id's value.
    fn keep(&mut self, byte: u8) {
        if self.depth != 1 {
            return;
        }
        let word = match (self.in_value, self.key.as_slice(), &mut self.id) {
            (false, _, _) => &mut self.key,
            (true, b"id", Some(id)) => id,
            _ => return,
        };
        // One byte more than any that matters, so that a longer word is not taken for its beginning.
        if word.len() <= MAX_WORD {
            word.push(byte);
        }
    }

    /// The number of the request that the object answers; none when it answers none.
    pub(super) fn answers(&self) -> Option<i64> {
        if self.is_request || !self.is_answer {
            return None;
        }
        std::str::from_utf8(self.id.as_deref()?).ok()?.parse().ok()
    }
}

/// The request that `line` answers, whatever else is wrong with it.
pub(super) fn answers(line: &[u8]) -> Option<i64> {
    let mut scanner = Scanner::default();
    scanner.feed(line);
    scanner.answers()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lines(input: &[u8], limit: usize) -> Vec<Line> {
        let mut lines = Lines::new(input, limit);
        let mut found = Vec::new();
        while let Some(line) = lines.next().await.unwrap() {
            found.push(line);
        }
        found
    }

    #[tokio::test]
    async fn lines_are_whole_or_named_as_too_long() {
        let whole = |text: &str| Line::Whole(text.as_bytes().to_vec());
        assert_eq!(lines(b"{}\r\n\n  \n[1]\ncut", 10).await, [whole("{}"), whole("[1]")]);
        let long = format!("{{\"result\":\"{}\",\"id\":7}}\n{{}}\n", "x".repeat(100_000));
        let found = lines(long.as_bytes(), 1000).await;
        let bytes = u64::try_from(long.len()).unwrap() - 4;
        assert_eq!(found, [Line::Oversized { bytes, answers: Some(7) }, whole("{}")]);
    }

    #[test]
    fn the_id_is_found_wherever_it_stands() {
        let check = |line: &[u8], expected: Option<i64>| assert_eq!(answers(line), expected);
        check(br#"{"jsonrpc":"2.0","id":7,"result":{"id":8}}"#, Some(7));
        check(
            br#"{"result":{"a":[{"id":8}],"t":"\"id\":9,{"},"jsonrpc":"2.0", "id" : 12 }"#,
            Some(12),
        );
        check(br#"{"id":"5","result":1}"#, Some(5));
        check(b"{\"result\":\"\xff\xfe\",\"id\":3}", Some(3));
        check(br#"{"id":3,"result":"cut"#, Some(3));
        check(br#"{"id":3,"method":"ping"}"#, None);
        check(br#"{"id":3,"level":"info"}"#, None);
        check(br#"{"idx":3,"result":1}"#, None);
        check(br#"{"id":null,"error":{}}"#, None);
        check(br#"{"id":{"id":3},"result":1}"#, None);
        check(br#"[{"id":3}]"#, None);
        check(b"hello: id 3", None);
    }
}
