//! Configuration files: YAML, read strictly, every mistake with its place; and that of `cynai serve`.
//!
//! What a machine's operator types once belongs to flags; what has structure (model endpoints, tool
//! servers, what webhooks may reach, how long things are kept) stands in this file. Unknown keys are
//! refused, because a misspelt limit is a limit that does not hold.
//!
//! **Invariant:** no message repeats a value of the file: a key that was pasted into it must not reach a log.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_saphyr::{Error as YamlError, Options};

use super::models::ModelsConfig;
use super::sections::{FleetSection, RetentionConfig, SecretsConfig, WebhooksConfig};
use super::tools::ToolServers;
use super::values::section;

/// The name of the file in the data directory that is read when no other is named.
pub const USUAL_NAME: &str = "cynai.yaml";
/// Bytes of the file.
pub const MAX_BYTES: u64 = 1 << 20;
/// Keys, values and marks of the file, aliases expanded.
const MAX_EVENTS: usize = 200_000;
const MAX_DEPTH: usize = 64;

/// The file's content. Sections that are left out have their defaults.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConfigFile {
    /// Endpoints of models, and what graphs call them.
    #[serde(deserialize_with = "section")]
    pub models: ModelsConfig,
    /// Servers of tools.
    #[serde(deserialize_with = "section")]
    pub mcp_servers: ToolServers,
    /// What webhooks may reach.
    #[serde(deserialize_with = "section")]
    pub webhooks: WebhooksConfig,
    /// Where the keys are that seal the store of secrets.
    #[serde(deserialize_with = "section")]
    pub secrets: SecretsConfig,
    /// How long things are kept.
    #[serde(deserialize_with = "section")]
    pub retention: RetentionConfig,
    /// Worker machines that register themselves.
    #[serde(deserialize_with = "section")]
    pub fleet: FleetSection,
}

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("{path} cannot be read")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is too large.
    #[error("{path} has {size} bytes; a configuration has at most {MAX_BYTES}")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// It is no text.
    #[error("{path} is not text in UTF-8")]
    NotText {
        /// The file.
        path: PathBuf,
    },
    /// Something in it is wrong.
    #[error("{path}{place}: {problem}")]
    Wrong {
        /// The file.
        path: PathBuf,
        /// Where.
        place: Place,
        /// What is wrong, and what would be right.
        problem: String,
    },
}

/// A place in a text; nothing where it is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place(Option<(u64, u64)>);

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some((line, column)) => write!(f, ":{line}:{column}"),
            None => Ok(()),
        }
    }
}

impl ConfigFile {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// See [`FileError`].
    pub fn read(path: &Path) -> Result<Self, FileError> {
        Self::parse(path, &read_text(path)?)
    }

    /// Reads and checks a text; `path` is what messages call it.
    ///
    /// # Errors
    /// Something in it is wrong.
    pub fn parse(path: &Path, text: &str) -> Result<Self, FileError> {
        // A file of comments alone, or of nothing, leaves everything as it is.
        let config: Self = parse_text(path, text)?.unwrap_or_default();
        config.check().map_err(|(field, problem)| wrong_field(path, text, &field, &problem))?;
        Ok(config)
    }

    /// What serde cannot tell: the field's path and what is wrong, of the first section that cannot be used.
    fn check(&self) -> Result<(), (String, String)> {
        self.models.check().map_err(|err| (err.field, err.problem))?;
        self.webhooks.check()?;
        self.retention.check()?;
        self.fleet.check()
    }
}

/// The text of a configuration file.
///
/// # Errors
/// It cannot be read, is too large, or is no text.
pub fn read_text(path: &Path) -> Result<String, FileError> {
    use std::io::Read;

    let failed = |source| FileError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    // A pipe has no size: what is read is bounded as well.
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    let size = size.max(bytes.len() as u64);
    if size > MAX_BYTES {
        return Err(FileError::TooLarge { path: path.to_owned(), size });
    }
    String::from_utf8(bytes).map_err(|_| FileError::NotText { path: path.to_owned() })
}

/// Reads YAML strictly; `None` where there is nothing but comments. `path` is what messages call the text.
///
/// # Errors
/// Something in it is wrong: its place, and what would be right.
pub fn parse_text<T: DeserializeOwned>(path: &Path, text: &str) -> Result<Option<T>, FileError> {
    let read = serde_saphyr::from_str_with_options::<Option<T>>(text, options());
    read.map_err(|err| FileError::Wrong {
        path: path.to_owned(),
        place: place(&err),
        problem: explain(&err, text),
    })
}

/// What is wrong with a field (a dotted path) that was read: its place is looked for in the text.
#[must_use]
pub fn wrong_field(path: &Path, text: &str, field: &str, problem: &str) -> FileError {
    let problem = format!("`{field}` {problem}");
    FileError::Wrong { path: path.to_owned(), place: find(text, field), problem }
}

fn options() -> Options {
    serde_saphyr::options! {
        strict_booleans: true,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        with_snippet: false,
        budget: serde_saphyr::budget! { max_events: MAX_EVENTS, max_depth: MAX_DEPTH },
    }
}

fn place(err: &YamlError) -> Place {
    let known = err.location().map(|at| (at.line(), at.column()));
    Place(known.filter(|(line, _)| *line > 0))
}

/// The parser's message in our words, where it would repeat a value or could say what was meant.
fn explain(err: &YamlError, text: &str) -> String {
    match err.without_snippet() {
        YamlError::SerdeUnknownField { field, expected, .. } => {
            let known = expected.iter().copied();
            let meant = closest(field, known.clone())
                .map(|meant| format!("; did you mean `{meant}`?"))
                .unwrap_or_default();
            let known = known.collect::<Vec<_>>().join("`, `");
            format!("there is no key `{}` here{meant} Known are `{known}`", shown(field))
        }
        YamlError::SerdeInvalidType { expected, .. }
        | YamlError::SerdeInvalidValue { expected, .. } => format!("expected {expected}"),
        YamlError::SerdeMissingField { field, .. } => format!("the key `{field}` is missing"),
        YamlError::Message { msg, .. } => msg.clone(),
        _ => {
            // The first line of the parser's own message; the others draw the place.
            let message = err.without_snippet().to_string();
            let message = message.lines().next().unwrap_or_default();
            // It may quote what it could not read.
            if quotes_a_value(message, text) {
                return "this cannot be read as a value of this kind".to_owned();
            }
            // The place is told already.
            message.split(" at line ").next().unwrap_or(message).to_owned()
        }
    }
}

/// Whether a message holds a long word of the text, which could be somebody's key.
fn quotes_a_value(message: &str, text: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric() || "+/=_-.".contains(c);
    message.split(|c| !word(c)).any(|part| part.len() >= 12 && text.contains(part))
}

/// A key as it may be shown: not when it is so long that it is rather a value.
fn shown(key: &str) -> String {
    if key.len() <= 40 { key.to_owned() } else { "(a long word)".to_owned() }
}

fn closest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|candidate| (strsim::damerau_levenshtein(word, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= (candidate.len().max(word.len()) / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Where the key that a dotted path leads to stands, for a mistake that is found after reading: its line, or that of
/// the last key on the way that is written on a line of its own.
fn find(text: &str, path: &str) -> Place {
    let mut lines = (1_u64..).zip(text.lines()).filter(|(_, line)| {
        let bare = line.trim_start();
        !bare.is_empty() && !bare.starts_with('#')
    });
    let mut found = Place(None);
    // The indentation of the key before; a line that stands no deeper is not below it.
    let mut above: Option<usize> = None;
    'keys: for key in path.split('.') {
        let mut level = None;
        for (number, line) in lines.by_ref() {
            let indent = line.len() - line.trim_start().len();
            if above.is_some_and(|above| indent <= above) {
                break 'keys;
            }
            if indent != *level.get_or_insert(indent) {
                continue;
            }
            let bare = line.trim_start().trim_start_matches(['"', '\'']);
            let rest = bare.strip_prefix(key).map(|rest| rest.trim_start_matches(['"', '\'']));
            if rest.is_some_and(|rest| rest.trim_start().starts_with(':')) {
                found = Place(Some((number, indent as u64 + 1)));
                above = Some(indent);
                continue 'keys;
            }
        }
        break;
    }
    found
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn parse(text: &str) -> Result<ConfigFile, String> {
        ConfigFile::parse(Path::new("cynai.yaml"), text).map_err(|err| err.to_string())
    }

    fn check(text: &str, expected: &[&str]) {
        let message = parse(text).unwrap_err();
        for words in expected {
            assert!(message.contains(words), "{words:?} is not in {message}");
        }
    }

    #[test]
    fn sections_are_read_and_may_be_left_out() {
        assert_eq!(parse("").unwrap(), ConfigFile::default());
        assert_eq!(parse("# nothing\n").unwrap(), ConfigFile::default());
        assert_eq!(parse("webhooks:\nretention:\n").unwrap(), ConfigFile::default());
        let text = "webhooks:\n  allow: [10.0.0.0/8, hooks.internal]\nretention:\n  keep_last: 100\n  max_age: 30d\n";
        let config = parse(text).unwrap();
        assert_eq!(config.webhooks.allow, ["10.0.0.0/8", "hooks.internal"]);
        assert_eq!(config.retention.keep_last, Some(100));
        assert_eq!(config.retention.max_age, Some(Duration::from_secs(30 * 86_400)));
        assert_eq!(config.retention.stream_rows, None);
    }

    #[test]
    fn mistakes_are_told_with_file_line_column_and_what_was_meant() {
        check(
            "webhooks:\n  alow: []\n",
            &["cynai.yaml:2:3: ", "no key `alow`", "did you mean `allow`?"],
        );
        check("retension: {}\n", &["cynai.yaml:1:1: ", "did you mean `retention`?"]);
        check("retention:\n  max_age: soon\n", &["cynai.yaml:2:", "such as 10s"]);
        check(
            "retention:\n  max_age: 1ms\n",
            &["cynai.yaml:2:3: ", "`retention.max_age` must be 1s"],
        );
        check("retention:\n  keep_last: 0\n", &["cynai.yaml:2:3: ", "must be 1 or more"]);
        check("retention:\n  keep_last: [1]\n", &["cynai.yaml:2:"]);
        check("webhooks: {allow: [a]}\nwebhooks: {}\n", &["cynai.yaml:2:1: "]);
        check("webhooks: [\n", &["cynai.yaml:"]);
    }

    #[test]
    fn the_place_of_a_key_is_found_again() {
        let text = "# a\nb:\n  d: 1\na:\n  b:\n    c: 1\n    \"d\": 2\n  d: 3\n";
        for (path, line, column) in
            [("a", 4, 1), ("a.b.d", 7, 5), ("a.d", 8, 3), ("b.d", 3, 3), ("b.c", 2, 1)]
        {
            assert_eq!(find(text, path), Place(Some((line, column))), "{path}");
        }
        assert_eq!(find(text, "c"), Place(None));
    }

    #[test]
    fn a_message_never_repeats_a_value() {
        for text in [
            "retention: {keep_last: sk-very-secret-key-0123456789}\n",
            "retention: {max_age: sk-very-secret-key-0123456789}\n",
            "webhooks: sk-very-secret-key-0123456789\n",
            "sk-very-secret-key-0123456789\n",
            "secrets: {master_key_file: [sk-very-secret-key-0123456789]}\n",
            "secrets: {sk-very-secret-key-0123456789-sk-very-secret-key-0123456789: 1}\n",
        ] {
            let message = parse(text).unwrap_err();
            assert!(!message.contains("very-secret"), "{message}");
            assert!(message.contains("cynai.yaml:1:"), "{message}");
        }
    }

    #[test]
    fn a_file_that_is_too_large_or_explodes_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cynai.yaml");
        std::fs::write(&path, vec![b'#'; usize::try_from(MAX_BYTES).unwrap() + 1]).unwrap();
        let message = ConfigFile::read(&path).unwrap_err().to_string();
        assert!(message.contains("at most 1048576"), "{message}");
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..9 {
            let last = format!("*a{}", level - 1);
            bomb += &format!("a{level}: &a{level} [{}]\n", vec![last; 10].join(", "));
        }
        check(&bomb, &["cynai.yaml"]);
        std::fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(ConfigFile::read(&path).unwrap_err().to_string().contains("UTF-8"));
        let missing = ConfigFile::read(Path::new("/no/such/file")).unwrap_err();
        assert_eq!(missing.to_string(), "/no/such/file cannot be read");
    }

    #[test]
    fn a_secret_is_named_and_never_written_down() {
        use super::super::values::SecretSource;

        #[derive(Debug, Deserialize)]
        struct Holder {
            key: SecretSource,
        }
        let read = |text: &str| {
            serde_saphyr::from_str_with_options::<Holder>(text, options())
                .map(|holder| holder.key)
                .map_err(|err| explain(&err, text))
        };
        assert_eq!(read("key: {env: KEY}").unwrap(), SecretSource::Env("KEY".to_owned()));
        assert_eq!(read("key: {secret: a}").unwrap(), SecretSource::Secret("a".to_owned()));
        for wrong in ["key: sk-1234567890123", "key: 12345", "key: {}", "key: {env: a, secret: b}"]
        {
            let message = read(wrong).unwrap_err();
            assert!(message.contains("secret"), "{wrong}: {message}");
            assert!(!message.contains("12345"), "{wrong}: {message}");
        }
        assert!(read("key: {evn: KEY}").unwrap_err().contains("did you mean `env`?"));
    }
}
