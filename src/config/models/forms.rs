//! How single values of the `models` section are written: where a key is kept, sizes, durations, addresses.
//!
//! **Invariant:** no message of these forms repeats a value: it may be a key that was pasted.

use std::fmt;
use std::time::Duration;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use url::Url;

pub use super::super::values::SecretSource as KeySource;

/// A header's value, or where it is kept.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "text, {env: VARIABLE} or {secret: NAME}")]
pub enum HeaderSource {
    /// The value itself.
    Text(String),
    /// Kept elsewhere.
    Kept(KeySource),
}

impl fmt::Debug for HeaderSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // People put tokens here, too.
            Self::Text(_) => f.write_str("Text(..)"),
            Self::Kept(source) => write!(f, "Kept({source})"),
        }
    }
}

/// A number of bytes, written as `4MiB`, `64KiB`, or a plain number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub usize);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
        let fitting = units.iter().find(|(unit, _)| self.0 > 0 && self.0.is_multiple_of(*unit));
        match fitting {
            Some((unit, name)) => write!(f, "{} {name}", self.0 / unit),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a size, such as 4MiB, 64KiB or 1000")]
        enum Form {
            Number(usize),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Number(bytes) => Ok(Self(bytes)),
            Form::Text(text) => size(&text)
                .map(Self)
                .ok_or_else(|| D::Error::custom("not a size: write 4MiB, 64KiB or 1000")),
        }
    }
}

fn size(text: &str) -> Option<usize> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit = match text[end..].trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    text[..end].parse::<usize>().ok()?.checked_mul(unit)
}

/// Reads `5s`.
pub(super) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text).map_err(|_| {
        D::Error::custom("not a duration: write a number and a unit, such as 5s, 500ms or 10m")
    })
}

/// An endpoint's address. It may hold a password, which nothing but a request sees.
#[derive(Clone, PartialEq, Eq)]
pub struct EndpointUrl(Url);

impl EndpointUrl {
    /// Reads an `http` or `https` URL.
    pub fn read(text: &str) -> Result<Self, &'static str> {
        let form = "an http or https URL is needed, such as https://api.openai.com/v1";
        let url = Url::parse(text).map_err(|_| form)?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return Err(form);
        }
        if url.fragment().is_some() {
            return Err("an endpoint's URL has no fragment (#...)");
        }
        Ok(Self(url))
    }

    /// The whole URL, with all that is secret in it.
    #[must_use]
    pub fn expose(&self) -> &Url {
        &self.0
    }

    /// Whether it carries a user or a password.
    #[must_use]
    pub fn has_user(&self) -> bool {
        !self.0.username().is_empty() || self.0.password().is_some()
    }
}

/// Without user, password and query.
impl fmt::Display for EndpointUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.0.scheme(), self.0.host_str().unwrap_or_default())?;
        if let Some(port) = self.0.port() {
            write!(f, ":{port}")?;
        }
        f.write_str(self.0.path().trim_end_matches('/'))
    }
}

impl fmt::Debug for EndpointUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EndpointUrl({self})")
    }
}

impl<'de> Deserialize<'de> for EndpointUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::read(&text).map_err(D::Error::custom)
    }
}
