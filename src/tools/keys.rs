//! Where the values come from that servers are given, and how they are kept out of what servers say.
//!
//! A server that was handed a key can print it: in an error, on its standard error, in a result. So every
//! value that is not plain text of the configuration is looked for in everything that comes back.
//!
//! **Invariant:** nothing here shows a value, not even by `Debug`.

use std::fmt;

use futures::FutureExt;
use futures::future::BoxFuture;
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

use crate::config::tools::ValueSource;

/// What stands where a value was.
const REDACTED: &str = "[redacted]";
/// Shorter values are not looked for: they would be found everywhere.
const MIN_LOOKED_FOR: usize = 6;

/// A value that cannot be had; the message names it and says what to do, and shows nothing of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct KeyError(pub String);

/// Reads the values that a configuration refers to.
pub trait Keys: Send + Sync + fmt::Debug {
    /// The value behind `source`.
    ///
    /// # Errors
    /// It is not there, or may not be read now.
    fn value<'a>(
        &'a self,
        source: &'a ValueSource,
    ) -> BoxFuture<'a, Result<SecretString, KeyError>>;

    /// The login to `server` that was kept; none when nobody has logged in.
    ///
    /// # Errors
    /// It may not be read now.
    fn login<'a>(
        &'a self,
        _server: &'a str,
    ) -> BoxFuture<'a, Result<Option<SecretString>, KeyError>> {
        async { Ok(None) }.boxed()
    }

    /// Keeps a login to `server`, in place of the one before.
    ///
    /// # Errors
    /// It cannot be kept.
    fn keep_login<'a>(
        &'a self,
        _server: &'a str,
        _login: SecretString,
    ) -> BoxFuture<'a, Result<(), KeyError>> {
        async { Err(KeyError("logins cannot be kept here".to_owned())) }.boxed()
    }
}

/// Gives texts of the configuration, and nothing else.
#[derive(Debug, Clone, Copy, Default)]
pub struct TextsOnly;

impl Keys for TextsOnly {
    fn value<'a>(
        &'a self,
        source: &'a ValueSource,
    ) -> BoxFuture<'a, Result<SecretString, KeyError>> {
        let value = match source {
            ValueSource::Text(text) => Ok(SecretString::from(text.as_str())),
            ValueSource::Env(name) => {
                Err(KeyError(format!("the variable {name} cannot be read here")))
            }
            ValueSource::Secret(name) => {
                Err(KeyError(format!("the secret {name} cannot be read here")))
            }
        };
        async move { value }.boxed()
    }
}

/// The values of one server, to be kept out of what it says.
#[derive(Default)]
pub(super) struct Redactor(Vec<SecretString>);

impl fmt::Debug for Redactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Redactor({} values)", self.0.len())
    }
}

impl Redactor {
    /// Looks for `value` from now on, unless it stands in the configuration for everybody to read.
    pub(super) fn learn(&mut self, source: &ValueSource, value: &SecretString) {
        let text = value.expose_secret();
        if matches!(source, ValueSource::Text(_)) {
            return;
        }
        // `Bearer KEY` is repeated as KEY.
        let bare = text.rsplit_once(' ').map_or(text, |(_, bare)| bare);
        for text in [text, bare] {
            if text.len() >= MIN_LOOKED_FOR {
                self.0.push(SecretString::from(text));
            }
        }
    }

    /// `text` without any of the values.
    pub(super) fn text(&self, text: &str) -> String {
        self.0.iter().fold(text.to_owned(), |text, value| {
            let value = value.expose_secret();
            if text.contains(value) { text.replace(value, REDACTED) } else { text }
        })
    }

    /// `value` without any of the values, in texts and in keys.
    pub(super) fn json(&self, value: &mut Value) {
        if self.0.is_empty() {
            return;
        }
        match value {
            Value::String(text) if self.found(text) => *text = self.text(text),
            Value::Array(items) => items.iter_mut().for_each(|item| self.json(item)),
            Value::Object(entries) => {
                if entries.keys().any(|key| self.found(key)) {
                    let old = std::mem::take(entries);
                    entries.extend(old.into_iter().map(|(key, value)| (self.text(&key), value)));
                }
                entries.values_mut().for_each(|value| self.json(value));
            }
            _ => {}
        }
    }

    fn found(&self, text: &str) -> bool {
        self.0.iter().any(|value| text.contains(value.expose_secret()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_found_in_texts_keys_and_headers() {
        let mut redactor = Redactor::default();
        redactor.learn(&ValueSource::Secret("k".into()), &"Bearer hunter2hunter2".into());
        redactor.learn(&ValueSource::Text("public text".into()), &"public text".into());
        redactor.learn(&ValueSource::Env("SHORT".into()), &"a".into());
        let mut value = json!({"hunter2hunter2": ["x hunter2hunter2 y", 1], "a": "public text"});
        redactor.json(&mut value);
        assert_eq!(value, json!({"[redacted]": ["x [redacted] y", 1], "a": "public text"}));
        assert_eq!(redactor.text("Bearer hunter2hunter2"), "[redacted]");
        assert!(!format!("{redactor:?}").contains("hunter"));
    }
}
