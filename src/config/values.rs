//! Values that several sections of the configuration file hold: where a secret is, and how long something takes.
//!
//! **Invariant:** a secret that somebody writes into the file is refused, and the message does not repeat it.

use std::fmt;

use secrecy::SecretString;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// Where a secret is: the file itself never holds one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SecretSource {
    /// In the server's environment, under this name: `{env: NAME}`.
    Env(String),
    /// In the server's store of secrets, under this name: `{secret: NAME}`.
    Secret(String),
}

const EXPECTED: &str =
    "`{env: VARIABLE}` or `{secret: NAME}`: the configuration names a secret and never holds it";

impl fmt::Display for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Env(name) => write!(f, "the environment variable {name}"),
            Self::Secret(name) => write!(f, "the secret `{name}`"),
        }
    }
}

impl<'de> Deserialize<'de> for SecretSource {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Source;
        impl<'de> Visitor<'de> for Source {
            type Value = SecretSource;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(EXPECTED)
            }

            // serde's own message for these would repeat the value, which may be somebody's key.
            fn visit_str<E: Error>(self, _text: &str) -> Result<SecretSource, E> {
                Err(E::custom(format_args!("expected {EXPECTED}")))
            }

            fn visit_i64<E: Error>(self, _number: i64) -> Result<SecretSource, E> {
                Err(E::custom(format_args!("expected {EXPECTED}")))
            }

            fn visit_u64<E: Error>(self, _number: u64) -> Result<SecretSource, E> {
                Err(E::custom(format_args!("expected {EXPECTED}")))
            }

            fn visit_f64<E: Error>(self, _number: f64) -> Result<SecretSource, E> {
                Err(E::custom(format_args!("expected {EXPECTED}")))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<SecretSource, A::Error> {
                let mut found = None;
                while let Some(key) = map.next_key::<String>()? {
                    let source = match key.as_str() {
                        "env" => SecretSource::Env(map.next_value()?),
                        "secret" => SecretSource::Secret(map.next_value()?),
                        other => return Err(A::Error::unknown_field(other, &["env", "secret"])),
                    };
                    if found.replace(source).is_some() {
                        return Err(A::Error::custom(
                            "`env` and `secret` exclude each other: name one",
                        ));
                    }
                }
                let source =
                    found.ok_or_else(|| A::Error::custom(format_args!("expected {EXPECTED}")))?;
                if name_of(&source).is_empty() || name_of(&source).len() > 128 {
                    return Err(A::Error::custom("a name of 1 to 128 characters is expected here"));
                }
                Ok(source)
            }
        }
        from.deserialize_any(Source)
    }
}

fn name_of(source: &SecretSource) -> &str {
    match source {
        SecretSource::Env(name) | SecretSource::Secret(name) => name,
    }
}

/// The value of an environment variable of this process; `None` when it is not set, is empty, or is no text.
#[must_use]
pub fn environment_secret(name: &str) -> Option<SecretString> {
    let value = std::env::var_os(name)?.into_string().ok()?;
    (!value.is_empty()).then(|| SecretString::from(value))
}

/// Reads a section; one of which only the key is written has its defaults.
///
/// # Errors
/// It is not what the section holds.
pub fn section<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    from: D,
) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(from)?.unwrap_or_default())
}

/// Durations as people write them: `10s`, `5m`, `7d`.
pub mod duration {
    use std::time::Duration;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer};

    /// Reads `10s`.
    ///
    /// # Errors
    /// It is not a duration.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(from)?;
        humantime::parse_duration(&text)
            .map_err(|_| D::Error::custom("expected a duration, such as 10s, 5m, 12h or 7d"))
    }

    /// Reads `10s`, or nothing.
    pub mod optional {
        use std::time::Duration;

        use serde::{Deserialize, Deserializer};

        #[derive(Deserialize)]
        struct Some_(#[serde(deserialize_with = "super::deserialize")] Duration);

        /// Reads `10s`, or null.
        ///
        /// # Errors
        /// It is neither.
        pub fn deserialize<'de, D: Deserializer<'de>>(
            from: D,
        ) -> Result<Option<Duration>, D::Error> {
            Ok(Option::<Some_>::deserialize(from)?.map(|Some_(duration)| duration))
        }
    }
}
