//! Capturing a job's output: the head is kept, the rest is read and thrown away.
//!
//! A job that prints without end must neither block on a full pipe nor fill the agent's memory.
//!
//! **Invariant:** a captured stream never takes more memory than its cap and one read buffer.

use tokio::io::{AsyncRead, AsyncReadExt};

/// One stream of a job, as text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Captured {
    pub text: String,
    pub truncated: bool,
}

/// The bytes of a stream so far.
#[derive(Debug, Default)]
pub(super) struct Head {
    kept: Vec<u8>,
    cap: usize,
    cut: bool,
}

impl Head {
    pub(super) fn new(cap: usize) -> Self {
        Self { kept: Vec::new(), cap, cut: false }
    }

    fn push(&mut self, bytes: &[u8]) {
        let room = self.cap.saturating_sub(self.kept.len());
        self.cut |= bytes.len() > room;
        self.kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    /// The text: invalid bytes replaced, a character that the cap cut in two left out.
    pub(super) fn into_captured(mut self) -> Captured {
        if self.cut {
            drop_partial_character(&mut self.kept);
        }
        let mut text = match String::from_utf8(self.kept) {
            Ok(text) => text,
            Err(err) => String::from_utf8_lossy(err.as_bytes()).into_owned(),
        };
        // A replacement character takes three bytes where the invalid one took one.
        let truncated = self.cut || text.len() > self.cap;
        text.truncate(text.floor_char_boundary(self.cap));
        Captured { text, truncated }
    }
}

fn drop_partial_character(bytes: &mut Vec<u8>) {
    for back in 1..=3.min(bytes.len()) {
        let at = bytes.len() - back;
        let Some(length) = sequence_length(bytes[at]) else { continue };
        if length > back {
            bytes.truncate(at);
        }
        return;
    }
}

/// How many bytes a character takes that starts with `first`; `None` for a byte in the middle of one.
fn sequence_length(first: u8) -> Option<usize> {
    match first {
        0x80..=0xBF => None,
        0xC0..=0xDF => Some(2),
        0xE0..=0xEF => Some(3),
        0xF0..=0xF7 => Some(4),
        _ => Some(1),
    }
}

/// Reads a stream to its end, whatever its length.
pub(super) async fn drain(mut stream: impl AsyncRead + Unpin, head: &std::sync::Mutex<Head>) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => {
                head.lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner)
                    .push(&buffer[..count]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(cap: usize, chunks: &[&[u8]], text: &str, truncated: bool) {
        let mut head = Head::new(cap);
        for chunk in chunks {
            head.push(chunk);
        }
        assert_eq!(head.into_captured(), Captured { text: text.to_owned(), truncated });
    }

    #[test]
    fn the_head_is_kept_and_cut_between_characters() {
        check(5, &[b"hello"], "hello", false);
        check(5, &[b"hel", b"lo!"], "hello", true);
        check(4, &["aaaé".as_bytes()], "aaa", true);
        check(5, &["aaaé".as_bytes()], "aaaé", false);
        check(6, &["aaaé".as_bytes(), b"xyz"], "aaaéx", true);
        check(5, &["aa🦀".as_bytes()], "aa", true);
        check(3, &["🦀".as_bytes()], "", true);
    }

    #[test]
    fn invalid_bytes_are_replaced_and_never_grow_past_the_cap() {
        check(10, &[b"a\xffb"], "a\u{fffd}b", false);
        check(4, &[b"\xff\xff"], "\u{fffd}", true);
        check(8, &[b"ab\xc3"], "ab\u{fffd}", false);
        check(2, &[b"\x80\x80\x80"], "", true);
    }
}
