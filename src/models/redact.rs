//! Makes text from an endpoint fit for logs and errors.
//!
//! Endpoints quote what they were sent: a 401 often repeats the key. Whatever an endpoint says goes
//! through here before it becomes part of an error.

use std::cmp::Reverse;
use std::fmt;

use secrecy::{ExposeSecret, SecretString};

/// The longest text of an endpoint's that an error quotes, in bytes.
const MAX_QUOTE_BYTES: usize = 400;
/// Shorter values are words that any text may hold.
const MIN_SECRET_BYTES: usize = 4;

/// Knows the secrets of one call.
#[derive(Default)]
pub(super) struct Redactor(Vec<SecretString>);

impl Redactor {
    /// Text with this in it will be shown without it.
    pub(super) fn hide(&mut self, secret: SecretString) {
        if secret.expose_secret().len() >= MIN_SECRET_BYTES {
            self.0.push(secret);
            // The longest first: a part that is a secret itself must not save the rest.
            self.0.sort_by_key(|secret| Reverse(secret.expose_secret().len()));
        }
    }

    /// One short line without the secrets.
    pub(super) fn clean(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for secret in &self.0 {
            if text.contains(secret.expose_secret()) {
                text = text.replace(secret.expose_secret(), "[redacted]");
            }
        }
        quote(&text, MAX_QUOTE_BYTES)
    }
}

impl fmt::Debug for Redactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Redactor({})", self.0.len())
    }
}

/// The text on one line, cut to about `most` bytes.
pub(super) fn quote(text: &str, most: usize) -> String {
    let mut line = String::new();
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()) {
        if word.is_empty() {
            continue;
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
        if line.len() > most {
            line.truncate(line.floor_char_boundary(most));
            line.push('…');
            break;
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_and_what_would_break_a_line_are_gone() {
        let mut redactor = Redactor::default();
        redactor.hide("sk-12345".into());
        redactor.hide("a".into());
        let found = redactor.clean("Incorrect key\n\u{1b}[31m sk-12345,\tsk-12345x provided");
        assert_eq!(found, "Incorrect key [31m [redacted], [redacted]x provided");
        redactor.hide("hunter".into());
        redactor.hide("hunter2-password".into());
        assert_eq!(redactor.clean("hunter:hunter2-password"), "[redacted]:[redacted]");
        let long = redactor.clean(&"ä".repeat(5000));
        assert!(long.len() < 410 && long.ends_with('…'), "{}", long.len());
        assert!(!format!("{redactor:?}").contains("sk-"));
    }
}
