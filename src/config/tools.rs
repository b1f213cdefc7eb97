//! The configuration's `mcp_servers:` section: which tool servers there are, and how far each may go.
//!
//! A server is either a program that speaks MCP on its standard input and output (`command`), or an
//! address (`url`). Everything else has a default. Sections are read strictly: an unknown key, a bad
//! duration or both wires at once are mistakes that name what would be right.
//!
//! **Invariant:** no value of a variable or a header is shown by `Debug`: operators paste keys there.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, de};

const MAX_SERVERS: usize = 256;
const MAX_ENTRIES: usize = 256;
const MAX_NAME: usize = 63;
/// What a program finds its helpers in when the operator says nothing else.
pub const USUAL_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// All tool servers, and what they share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolsConfig {
    /// By name.
    pub servers: BTreeMap<String, ToolServerConfig>,
    /// Below it each started server gets a home directory of its own.
    pub homes: PathBuf,
    /// The `PATH` of started servers that name none themselves.
    pub path: String,
}

impl ToolsConfig {
    /// These servers, with homes below `homes` and the usual `PATH`.
    #[must_use]
    pub fn new(servers: ToolServers, homes: impl Into<PathBuf>) -> Self {
        Self { servers: servers.0, homes: homes.into(), path: USUAL_PATH.to_owned() }
    }
}

/// The section as it stands in the file: servers by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ToolServers(pub BTreeMap<String, ToolServerConfig>);

/// One tool server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolServerConfig {
    /// How it is reached.
    pub wire: WireConfig,
    /// Which version of the protocol is spoken.
    pub protocol: Protocol,
    /// How long a call may take that names no time itself.
    pub timeout: Duration,
    /// How long it may take to start and to introduce itself.
    pub start_timeout: Duration,
    /// Bytes of JSON of one result.
    pub max_output: usize,
    /// Calls that are under way at once.
    pub max_parallel: usize,
    /// A started program that was unused for so long is ended.
    pub idle: Duration,
    /// What the operator knows of a tool's effects; this wins over what the server says.
    pub effects: BTreeMap<String, Effect>,
    /// The only tools that may be used; all of them when absent.
    pub tools: Option<Vec<String>>,
    /// Who says that a tool is what it should be.
    pub approve: Approve,
    /// What the server is told when it asks for a form to be filled in.
    pub elicitation: Elicitation,
}

/// How a server is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WireConfig {
    /// A program, started when it is needed.
    Stdio {
        /// The program and its arguments.
        command: Vec<String>,
        /// Its variables, beside PATH, HOME and LANG.
        env: BTreeMap<String, ValueSource>,
        /// Where it runs; its own home directory when absent.
        cwd: Option<PathBuf>,
    },
    /// A server that somebody else runs.
    Http {
        /// Its endpoint.
        url: url::Url,
        /// Sent with every request.
        headers: BTreeMap<String, ValueSource>,
        /// How an administrator logs in to it; not at all when absent.
        oauth: Option<Box<OAuthConfig>>,
    },
}

/// How an administrator logs in to a server, by OAuth. All of it may be left out: most servers tell the rest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OAuthConfig {
    /// The client that was registered by hand with the authorization server.
    pub client_id: Option<String>,
    /// That client's secret.
    pub client_secret: Option<ValueSource>,
    /// Where a document describes this client, for authorization servers that read such documents.
    pub client_metadata_url: Option<url::Url>,
    /// What may be done with the login; what the server asks for when empty.
    #[serde(default)]
    pub scopes: Vec<String>,
}

/// Where a value comes from.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum ValueSource {
    /// It stands in the configuration.
    Text(String),
    /// A variable of the server's environment.
    Env(String),
    /// A stored secret.
    Secret(String),
}

impl fmt::Debug for ValueSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(_) => f.write_str("Text(..)"),
            Self::Env(name) => write!(f, "Env({name})"),
            Self::Secret(name) => write!(f, "Secret({name})"),
        }
    }
}

impl<'de> Deserialize<'de> for ValueSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Named {
            env: Option<String>,
            secret: Option<String>,
        }
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Text(String),
            Named(Named),
        }
        let wrong = || de::Error::custom("a text, {env: VARIABLE} or {secret: NAME}");
        match Form::deserialize(deserializer).map_err(|_| wrong())? {
            Form::Text(text) => Ok(Self::Text(text)),
            Form::Named(Named { env: Some(name), secret: None }) => Ok(Self::Env(name)),
            Form::Named(Named { env: None, secret: Some(name) }) => Ok(Self::Secret(name)),
            Form::Named(_) => Err(wrong()),
        }
    }
}

/// Which version of the protocol is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub enum Protocol {
    /// The newest that the server knows.
    #[default]
    #[serde(rename = "auto")]
    Auto,
    /// Only the last one with an `initialize` handshake.
    #[serde(rename = "2025-11-25")]
    V2025,
    /// Only the first one without a handshake.
    #[serde(rename = "2026-07-28")]
    V2026,
}

/// What a tool does to the world, and so what may be done after a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// It only looks: it may be called again at will.
    Pure,
    /// Called again with the same arguments it changes nothing more.
    Idempotent,
    /// Called again it acts again.
    Effectful,
}

/// Who says that a tool is what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Approve {
    /// What a server offers when it is first seen is trusted; an administrator approves what changes.
    #[default]
    FirstUse,
    /// An administrator approves everything.
    Always,
}

/// What a server is told when it asks for a form to be filled in, in the middle of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Elicitation {
    /// It is told beforehand that nobody fills in forms, and declined when it asks all the same.
    #[default]
    Decline,
    /// Each form is sent back as it was proposed, with its default values.
    Defaults,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    command: Option<Vec<String>>,
    #[serde(default)]
    env: BTreeMap<String, ValueSource>,
    cwd: Option<PathBuf>,
    url: Option<String>,
    #[serde(default)]
    headers: BTreeMap<String, ValueSource>,
    oauth: Option<Box<OAuthConfig>>,
    #[serde(default)]
    protocol: Protocol,
    timeout: Option<String>,
    start_timeout: Option<String>,
    max_output: Option<String>,
    max_parallel: Option<usize>,
    idle: Option<String>,
    #[serde(default)]
    effects: BTreeMap<String, Effect>,
    tools: Option<Vec<String>>,
    #[serde(default)]
    approve: Approve,
    #[serde(default)]
    elicitation: Elicitation,
}

impl<'de> Deserialize<'de> for ToolServers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = BTreeMap::<String, Raw>::deserialize(deserializer)?;
        if raw.len() > MAX_SERVERS {
            let problem = format!("mcp_servers: at most {MAX_SERVERS} servers may be configured");
            return Err(de::Error::custom(problem));
        }
        let server = |(name, raw): (String, Raw)| {
            let problem = |problem: String| format!("mcp_servers: {name}: {problem}");
            check_name(&name).map_err(problem)?;
            let config = raw.checked().map_err(problem)?;
            Ok((name, config))
        };
        let servers: Result<_, String> = raw.into_iter().map(server).collect();
        servers.map(Self).map_err(de::Error::custom)
    }
}

impl Raw {
    fn checked(self) -> Result<ToolServerConfig, String> {
        let seconds = Duration::from_secs;
        Ok(ToolServerConfig {
            timeout: duration("timeout", self.timeout.as_deref(), seconds(60), seconds(86_400))?,
            start_timeout: duration(
                "start_timeout",
                self.start_timeout.as_deref(),
                seconds(20),
                seconds(600),
            )?,
            idle: duration("idle", self.idle.as_deref(), seconds(300), seconds(86_400))?,
            max_output: size("max_output", self.max_output.as_deref(), 1 << 20)?,
            max_parallel: within("max_parallel", self.max_parallel.unwrap_or(8), 1, 256)?,
            protocol: self.protocol,
            approve: self.approve,
            elicitation: self.elicitation,
            wire: wire(self.command, self.url, self.env, (self.headers, self.oauth), self.cwd)?,
            effects: self.effects,
            tools: self.tools,
        })
    }
}

fn wire(
    command: Option<Vec<String>>,
    url: Option<String>,
    env: BTreeMap<String, ValueSource>,
    (headers, oauth): (BTreeMap<String, ValueSource>, Option<Box<OAuthConfig>>),
    cwd: Option<PathBuf>,
) -> Result<WireConfig, String> {
    within("the number of variables", env.len(), 0, MAX_ENTRIES)?;
    within("the number of headers", headers.len(), 0, MAX_ENTRIES)?;
    match (command, url) {
        (Some(command), None) => {
            if !headers.is_empty() {
                return Err("headers go with `url`; a program gets `env`".to_owned());
            }
            if oauth.is_some() {
                return Err("`oauth` goes with `url`; a program gets `env`".to_owned());
            }
            within("the number of words of `command`", command.len(), 1, MAX_ENTRIES)?;
            if command.iter().any(|word| word.contains('\0')) || command[0].is_empty() {
                return Err("`command` is a program and its arguments, without NUL".to_owned());
            }
            if let Some(name) = env.keys().find(|name| !is_variable(name)) {
                return Err(format!("{name:?} is no variable's name"));
            }
            Ok(WireConfig::Stdio { command, env, cwd })
        }
        (None, Some(text)) => {
            if !env.is_empty() || cwd.is_some() {
                return Err("`env` and `cwd` go with `command`; a server gets `headers`".to_owned());
            }
            if let Some(oauth) = &oauth {
                check_oauth(oauth, &headers)?;
            }
            Ok(WireConfig::Http { url: endpoint(&text)?, headers, oauth })
        }
        _ => {
            Err("either `command: [PROGRAM, ARGUMENT..]` or `url: https://..` is needed".to_owned())
        }
    }
}

fn check_oauth(oauth: &OAuthConfig, headers: &BTreeMap<String, ValueSource>) -> Result<(), String> {
    if headers.keys().any(|name| name.eq_ignore_ascii_case("authorization")) {
        return Err(
            "either `oauth` or a header `authorization`, since a login sends that".to_owned()
        );
    }
    if oauth.client_secret.is_some() && oauth.client_id.is_none() {
        return Err("oauth: a `client_secret` goes with a `client_id`".to_owned());
    }
    let document = oauth.client_metadata_url.as_ref();
    if document.is_some_and(|url| url.scheme() != "https" || url.path() == "/") {
        return Err("oauth: `client_metadata_url` is https:// with a path".to_owned());
    }
    let word = |scope: &String| {
        !scope.is_empty()
            && scope.bytes().all(|byte| matches!(byte, 0x21 | 0x23..=0x5b | 0x5d..=0x7e))
    };
    within("oauth: the number of `scopes`", oauth.scopes.len(), 0, MAX_ENTRIES)?;
    if !oauth.scopes.iter().all(word) {
        return Err("oauth: a scope is a word without spaces, quotes and backslashes".to_owned());
    }
    Ok(())
}

fn endpoint(text: &str) -> Result<url::Url, String> {
    let wrong =
        || "`url` is http:// or https:// with a host, without a user or a password".to_owned();
    let url = url::Url::parse(text).map_err(|_| wrong())?;
    let plain = url.username().is_empty() && url.password().is_none();
    (matches!(url.scheme(), "http" | "https") && url.has_host() && plain)
        .then_some(url)
        .ok_or_else(wrong)
}

/// Refuses a name that a server cannot have.
fn check_name(name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c);
    let first = name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    if first && name.len() <= MAX_NAME && name.chars().all(plain) {
        return Ok(());
    }
    Err(format!(
        "a name is 1 to {MAX_NAME} lower-case letters, digits, `.`, `_` and `-`, and begins with a letter or digit"
    ))
}

fn is_variable(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

fn within(name: &str, value: usize, least: usize, most: usize) -> Result<usize, String> {
    if (least..=most).contains(&value) {
        return Ok(value);
    }
    Err(format!("{name} is {value}, but must be from {least} to {most}"))
}

fn duration(
    name: &str,
    text: Option<&str>,
    default: Duration,
    most: Duration,
) -> Result<Duration, String> {
    let Some(text) = text else { return Ok(default) };
    let least = Duration::from_millis(10);
    let found = humantime::parse_duration(text).ok();
    found.filter(|found| (least..=most).contains(found)).ok_or_else(|| {
        let most = humantime::format_duration(most);
        format!("`{name}` is a duration from 10ms to {most}, such as 30s")
    })
}

fn size(name: &str, text: Option<&str>, default: usize) -> Result<usize, String> {
    let Some(text) = text else { return Ok(default) };
    let wrong = || format!("`{name}` is a size from 1 KiB to 64 MiB, such as 1 MiB");
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit: usize = match text[end..].trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        _ => return Err(wrong()),
    };
    let bytes = text[..end].parse::<usize>().ok().and_then(|count| count.checked_mul(unit));
    bytes.filter(|bytes| (1 << 10..=64 << 20).contains(bytes)).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(value: Value) -> Result<ToolServerConfig, String> {
        let servers: ToolServers =
            serde_json::from_value(json!({"a": value})).map_err(|err| err.to_string())?;
        Ok(servers.0.into_values().next().unwrap())
    }

    #[test]
    fn a_server_has_sensible_defaults() {
        let server =
            read(json!({"command": ["x"], "env": {"KEY": {"secret": "k"}, "A": "b"}})).unwrap();
        assert_eq!(server.timeout, Duration::from_secs(60));
        assert_eq!(server.start_timeout, Duration::from_secs(20));
        assert_eq!(server.idle, Duration::from_secs(300));
        assert_eq!((server.max_output, server.max_parallel), (1 << 20, 8));
        assert_eq!((server.approve, server.protocol), (Approve::FirstUse, Protocol::Auto));
        let WireConfig::Stdio { env, .. } = server.wire else { panic!("not stdio") };
        assert_eq!(env["KEY"], ValueSource::Secret("k".into()));
        assert_eq!(format!("{:?}", env["A"]), "Text(..)");
    }

    #[test]
    fn everything_can_be_said() {
        let server = read(json!({
            "url": "https://tools.example/mcp", "headers": {"authorization": {"env": "TOKEN"}},
            "protocol": "2025-11-25", "timeout": "2m", "start_timeout": "1s", "max_output": "2 MiB",
            "max_parallel": 3, "idle": "1h", "effects": {"send": "idempotent"}, "tools": ["send"],
            "approve": "always", "elicitation": "defaults",
        }))
        .unwrap();
        assert_eq!(server.max_output, 2 << 20);
        assert_eq!(server.effects["send"], Effect::Idempotent);
        assert_eq!((server.approve, server.protocol), (Approve::Always, Protocol::V2025));
        assert_eq!(server.elicitation, Elicitation::Defaults);
    }

    #[test]
    fn mistakes_say_what_would_be_right() {
        let check = |value: Value, expected: &str| {
            let problem = read(value).unwrap_err();
            assert!(problem.contains(expected), "{problem}");
        };
        check(json!({}), "either `command");
        check(json!({"command": ["x"], "url": "http://a"}), "either `command");
        check(json!({"command": []}), "from 1 to 256");
        check(json!({"command": ["x"], "headers": {"a": "b"}}), "`env`");
        check(json!({"url": "http://a", "env": {"a": "b"}}), "`headers`");
        check(json!({"url": "ftp://a"}), "https://");
        check(json!({"command": ["x"], "oauth": {}}), "`oauth` goes with `url`");
        check(json!({"url": "http://a", "oauth": {"client_secret": "x"}}), "`client_id`");
        check(json!({"url": "http://a", "oauth": {"scopes": ["a b"]}}), "without spaces");
        check(
            json!({"url": "http://a", "oauth": {"client_metadata_url": "http://a/b"}}),
            "https://",
        );
        check(
            json!({"url": "http://a", "oauth": {}, "headers": {"Authorization": "x"}}),
            "either `oauth`",
        );
        check(json!({"url": "http://me:secret@a"}), "without a user");
        check(json!({"command": ["x"], "env": {"a-b": "c"}}), "no variable's name");
        check(json!({"command": ["x"], "timeout": "soon"}), "from 10ms to 1day");
        check(json!({"command": ["x"], "max_output": "1 GB"}), "64 MiB");
        check(json!({"command": ["x"], "max_parallel": 0}), "from 1 to 256");
        check(json!({"command": ["x"], "timout": "1s"}), "timout");
        check(
            json!({"command": ["x"], "env": {"a": {"env": "b", "secret": "c"}}}),
            "{secret: NAME}",
        );
        let named: Result<ToolServers, _> =
            serde_json::from_value(json!({"A b": {"command": ["x"]}}));
        assert!(named.unwrap_err().to_string().contains("lower-case"));
    }
}
