//! Reads a streamed answer's bytes as whole events, before the client library sees them.
//!
//! The library keeps what is incomplete in a buffer that it searches from its start with every piece, has
//! no limit, and logs what it cannot read in full. So what is passed on to it are only events that are
//! complete, valid UTF-8 and JSON that it will be able to read, in one form; all else becomes a
//! [`Failure`] here.

use serde_json::Value;

use super::failure::{Failure, FailureKind};
use crate::config::models::Size;

/// Puts pieces of a stream together.
#[derive(Debug)]
pub(super) struct Frames {
    most: Size,
    received: usize,
    /// The line that has not ended yet.
    line: Vec<u8>,
    /// Whether the last byte was a CR, whose LF may be still to come.
    after_cr: bool,
    first_line: bool,
    data: Option<String>,
    error_event: bool,
    done: bool,
}

impl Frames {
    pub(super) fn new(most: Size) -> Self {
        Self {
            most,
            received: 0,
            line: Vec::new(),
            after_cr: false,
            first_line: true,
            data: None,
            error_event: false,
            done: false,
        }
    }

    /// Whether the end was announced (`[DONE]`).
    pub(super) fn done(&self) -> bool {
        self.done
    }

    /// Takes the next bytes, and writes the events that they complete, as the library reads them. Those
    /// before a failure count.
    pub(super) fn feed(&mut self, bytes: &[u8], events: &mut Vec<u8>) -> Result<(), Failure> {
        self.received = self.received.saturating_add(bytes.len());
        if self.received > self.most.0 {
            return Err(too_large(self.most));
        }
        // What follows the announced end is not looked at.
        let mut rest = if self.done { &[] } else { bytes };
        while let Some(at) = rest.iter().position(|b| matches!(b, b'\n' | b'\r')) {
            let ended_by_cr = rest[at] == b'\r';
            // The LF of a CR LF ends no line of its own.
            let second_half = self.after_cr && at == 0 && !ended_by_cr;
            self.line.extend_from_slice(&rest[..at]);
            rest = &rest[at + 1..];
            self.after_cr = ended_by_cr;
            if !second_half {
                self.end_line(events)?;
            }
            if self.done {
                return Ok(());
            }
        }
        self.after_cr &= rest.is_empty();
        self.line.extend_from_slice(rest);
        Ok(())
    }

    /// The stream has ended: what is still open counts when it is whole.
    pub(super) fn finish(&mut self, events: &mut Vec<u8>) -> Result<(), Failure> {
        let cut = |_| Failure::new(FailureKind::Cut, "the stream ended in the middle of an event");
        if !self.line.is_empty() {
            self.end_line(events).map_err(cut)?;
        }
        self.end_event(events).map_err(cut)
    }

    fn end_line(&mut self, events: &mut Vec<u8>) -> Result<(), Failure> {
        let line = std::mem::take(&mut self.line);
        let line = std::str::from_utf8(&line)
            .map_err(|_| Failure::new(FailureKind::Malformed, "the stream is not valid UTF-8"))?;
        let line = if std::mem::take(&mut self.first_line) {
            line.strip_prefix('\u{feff}').unwrap_or(line)
        } else {
            line
        };
        if line.is_empty() {
            return self.end_event(events);
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "data" => match &mut self.data {
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
                None => self.data = Some(value.to_owned()),
            },
            "event" => self.error_event = value == "error",
            // Comments (an empty field), ids, and what else there may be.
            _ => {}
        }
        Ok(())
    }

    fn end_event(&mut self, events: &mut Vec<u8>) -> Result<(), Failure> {
        let error_event = std::mem::take(&mut self.error_event);
        let Some(data) = self.data.take().filter(|data| !data.trim().is_empty()) else {
            return Ok(());
        };
        if data.trim() == "[DONE]" {
            self.done = true;
            events.extend_from_slice(b"data: [DONE]\n\n");
            return Ok(());
        }
        serde_json::from_str::<Value>(&data).map_err(|err| {
            Failure::new(
                FailureKind::Malformed,
                format!("an event of the stream is no JSON: {err}"),
            )
        })?;
        let wrapped = error_event && !data.contains("\"error\"");
        let (before, after) = if wrapped { ("{\"error\":", "}") } else { ("", "") };
        events.extend_from_slice(b"data: ");
        events.extend_from_slice(before.as_bytes());
        // A line break in JSON is only space between its parts.
        events.extend(data.bytes().map(|b| if b == b'\n' { b' ' } else { b }));
        events.extend_from_slice(after.as_bytes());
        events.extend_from_slice(b"\n\n");
        Ok(())
    }
}

pub(super) fn too_large(most: Size) -> Failure {
    let message = format!("the answer is over {most}, the endpoint's `max_answer`");
    Failure::new(FailureKind::TooLarge, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The events of a stream that comes in pieces of any size.
    fn check(stream: &[u8], expected: Result<&str, FailureKind>) {
        for size in 1..=stream.len().max(1) {
            let mut frames = Frames::new(Size(1 << 20));
            let mut read = || -> Result<String, Failure> {
                let mut events = Vec::new();
                for piece in stream.chunks(size) {
                    frames.feed(piece, &mut events)?;
                }
                if !frames.done() {
                    frames.finish(&mut events)?;
                }
                Ok(String::from_utf8(events).unwrap())
            };
            let found = read().map_err(|failure| failure.kind);
            assert_eq!(
                found.as_deref(),
                expected.as_ref().copied(),
                "pieces of {size}: {stream:?}"
            );
        }
    }

    #[test]
    fn events_are_whole_however_their_bytes_come() {
        let two = "data: {\"a\":\"ä\"}\n\ndata: [DONE]\n\n";
        check("data: {\"a\":\"ä\"}\n\ndata: [DONE]\n\n".as_bytes(), Ok(two));
        check("\u{feff}data:{\"a\":\"ä\"}\r\n\r\ndata:[DONE]\r\n\r\n".as_bytes(), Ok(two));
        check(": hi\rdata: {\"a\":\"ä\"}\r\rid: 1\rdata: [DONE]\r\r".as_bytes(), Ok(two));
        check(b"data: {\ndata: \"a\":1}\n\n\n: x\n\n", Ok("data: { \"a\":1}\n\n"));
        check(b"data: {\"a\":1}", Ok("data: {\"a\":1}\n\n"));
        check(b"data: [DONE]\n\ndata: {\"late\n\n", Ok("data: [DONE]\n\n"));
        check(
            b"event: error\ndata: {\"message\":\"x\"}\n\n",
            Ok("data: {\"error\":{\"message\":\"x\"}}\n\n"),
        );
        check(b"", Ok(""));
    }

    #[test]
    fn what_is_broken_is_told_from_what_is_cut() {
        check(b"data: {\"a\":\n\n", Err(FailureKind::Malformed));
        check(b"data: {\"a\":", Err(FailureKind::Cut));
        check(b"data: {\"a\":\"\xff\"}\n\n", Err(FailureKind::Malformed));
        check("data: \"ä".as_bytes().split_last().unwrap().1, Err(FailureKind::Cut));
        check(
            "data: {}\n\n".repeat(1 << 14).as_bytes().split_at(100).0,
            Ok(&"data: {}\n\n".repeat(10)),
        );
        let mut frames = Frames::new(Size(10));
        assert_eq!(
            frames.feed(b"data: {\"a\":1", &mut Vec::new()).unwrap_err().kind,
            FailureKind::TooLarge
        );
    }
}
