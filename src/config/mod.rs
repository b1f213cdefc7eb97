//! Configuration of `cynai serve`: command line flags, their environment variables, defaults, and a file.
//!
//! It is read once, here, checked as a whole, and handed down as values; nothing below looks at the
//! environment again. A mistake is reported with the flag's name and the form that works.
//!
//! **Invariant:** no other file reads environment variables.
//! **Invariant:** a database URL is never printed with its password, and a master key not at all, not even by `Debug`.

pub mod file;
pub mod sections;
pub mod values;

pub mod models;
pub mod tools;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::builder::FalseyValueParser;
use clap::{Args, ValueEnum};
use nix::unistd::Uid;
use secrecy::SecretString;

use file::{ConfigFile, FileError};

const DEFAULT_LISTEN: &str = "127.0.0.1:2024";
const ROOT_DATA_DIR: &str = "/var/lib/cynai";
/// Connections of an embedded database that stay free for listening, migrations and people.
const RESERVED_CONNECTIONS: u32 = 10;
/// What PostgreSQL allows when no --pg-setting says otherwise.
const DEFAULT_MAX_CONNECTIONS: u32 = 100;
const MAX_ENTRIES: usize = 256;

/// What an administrator can say to `cynai serve`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  cynai serve                                        everything on this machine, data in its own place
  cynai serve --graphs ./flows --listen 127.0.0.1:8080
  cynai serve --database-url postgres://cynai@db/cynai --no-local-worker
  cynai serve --mount logs=/var/log/app --env REGION")]
pub struct ServeArgs {
    /// Address and port to serve HTTP on.
    #[arg(long, env = "CYNAI_LISTEN", value_name = "ADDRESS:PORT", default_value = DEFAULT_LISTEN, value_parser = parse_listen)]
    pub listen: SocketAddr,

    /// The server's certificate in PEM form, its chain after it: HTTPS instead of HTTP. Read again when it changes.
    #[arg(long, env = "CYNAI_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,

    /// The key of the certificate.
    #[arg(long, env = "CYNAI_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// A name, beside localhost and the address itself, that clients may use to reach this server.
    #[arg(
        long = "allow-host",
        env = "CYNAI_ALLOW_HOSTS",
        value_name = "NAME",
        value_delimiter = ';'
    )]
    pub allowed_hosts: Vec<String>,

    /// Where data lies [default: /var/lib/cynai as root, else ~/.local/share/cynai].
    #[arg(long, env = "CYNAI_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,

    /// The configuration file [default: cynai.yaml in the data directory, if there is one].
    #[arg(long, env = "CYNAI_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// A PostgreSQL to use instead of a private one.
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true)]
    pub database_url: Option<DatabaseUrl>,

    /// The same database without a transaction pooler before it, for notifications and migrations.
    #[arg(
        long,
        env = "DATABASE_DIRECT_URL",
        value_name = "URL",
        hide_env_values = true,
        requires = "database_url"
    )]
    pub database_direct_url: Option<DatabaseUrl>,

    /// Connections to the database.
    #[arg(long, env = "CYNAI_POOL_SIZE", value_name = "COUNT", default_value_t = 16, value_parser = clap::value_parser!(u32).range(2..=1000))]
    pub pool_size: u32,

    /// The directory of the programs that run the private database (initdb, postgres).
    #[arg(long, env = "CYNAI_PG_BIN", value_name = "DIR")]
    pub pg_bin: Option<PathBuf>,

    /// The user that runs the private database, when started as root [default: postgres].
    #[arg(long, env = "CYNAI_PG_USER", value_name = "USER")]
    pub pg_user: Option<String>,

    /// A setting of the private database.
    #[arg(long = "pg-setting", env = "CYNAI_PG_SETTINGS", value_name = "NAME=VALUE", value_delimiter = ';', value_parser = parse_pair)]
    pub pg_settings: Vec<(String, String)>,

    /// A directory of graph files [default: ./graphs, if there is one].
    #[arg(long, env = "CYNAI_GRAPHS", value_name = "DIR", value_delimiter = ':')]
    pub graphs: Vec<PathBuf>,

    /// An environment variable that graphs may read as `env.NAME`, or one made up for them.
    #[arg(
        long = "env",
        env = "CYNAI_GRAPH_ENV",
        value_name = "NAME[=VALUE]",
        value_delimiter = ';'
    )]
    pub graph_env: Vec<String>,

    /// How long a server may be silent before others take over its runs.
    #[arg(long, env = "CYNAI_LEASE", value_name = "DURATION", default_value = "10s", value_parser = parse_lease)]
    pub lease: Duration,

    /// How many runs this server advances at once.
    #[arg(long, env = "CYNAI_DRIVER_CAPACITY", value_name = "COUNT", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub driver_capacity: u32,

    /// The longest request body that is accepted.
    #[arg(long, env = "CYNAI_BODY_LIMIT", value_name = "SIZE", default_value = "10MiB", value_parser = parse_body_limit)]
    pub body_limit: usize,

    /// Where the first start writes the administrator's token [default: admin-token in the data
    /// directory].
    #[arg(long, env = "CYNAI_ADMIN_TOKEN_FILE", value_name = "FILE")]
    pub admin_token_file: Option<PathBuf>,

    /// Run no jobs on this machine.
    #[arg(long, env = "CYNAI_NO_LOCAL_WORKER", value_parser = FalseyValueParser::new())]
    pub no_local_worker: bool,

    /// How many jobs this machine runs at once [default: twice its cores].
    #[arg(long, env = "CYNAI_SLOTS", value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub slots: Option<u16>,

    /// The bubblewrap program that makes the sandboxes of this machine.
    #[arg(long, env = "CYNAI_BUBBLEWRAP", value_name = "PROGRAM", default_value = "bwrap")]
    pub bubblewrap: PathBuf,

    /// A directory that jobs on this machine may ask for by name.
    #[arg(long = "mount", env = "CYNAI_MOUNTS", value_name = "NAME=DIR", value_delimiter = ';', value_parser = parse_mount)]
    pub mounts: Vec<(String, PathBuf)>,

    /// A root file system that jobs on this machine may name as their image.
    #[arg(long = "image", env = "CYNAI_IMAGES", value_name = "NAME=DIR", value_delimiter = ';', value_parser = parse_image)]
    pub images: Vec<(String, PathBuf)>,

    /// Register the nodes that tests use.
    #[cfg(debug_assertions)]
    #[arg(long, env = "CYNAI_TEST_NODES", hide = true, value_parser = FalseyValueParser::new())]
    pub test_nodes: bool,

    /// How to log.
    #[command(flatten)]
    pub log: LogArgs,
}

/// How a long-running command logs.
#[derive(Debug, Clone, Args)]
pub struct LogArgs {
    /// Form of the log lines on standard error.
    #[arg(long, env = "CYNAI_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// What to log: a level, or levels by module, such as `info,cynai::driver=debug`.
    #[arg(long = "log", env = "CYNAI_LOG", value_name = "FILTER", default_value = "info")]
    pub log_filter: String,
}

/// Form of the log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// A database's address, which may hold a password.
#[derive(Clone, PartialEq, Eq)]
pub struct DatabaseUrl(String);

impl DatabaseUrl {
    /// The whole URL: for connecting, not for printing.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // User, password and parameters are left out: what remains tells which server is meant.
        let place = self.0.rsplit_once('@').map_or(self.0.as_str(), |(_, place)| place);
        let place = place.split_once('?').map_or(place, |(place, _)| place);
        write!(f, "DatabaseUrl({place})")
    }
}

impl FromStr for DatabaseUrl {
    type Err = FormError;
    fn from_str(text: &str) -> Result<Self, FormError> {
        if ["postgres://", "postgresql://"].iter().any(|scheme| text.starts_with(scheme)) {
            return Ok(Self(text.to_owned()));
        }
        Err(FormError("a database URL is postgres://USER:PASSWORD@HOST:PORT/DATABASE"))
    }
}

/// A value that has not the form its flag takes; the text says which form that is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct FormError(&'static str);

/// A configuration that is well-formed but cannot work.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A flag's value does not fit this machine or the other flags.
    #[error("{flag}: {problem}")]
    Flag {
        /// The flag, as it is typed.
        flag: &'static str,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The configuration file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The address cannot be listened on.
    #[error("cannot listen on {listen}: {}", why_not_listening(.source))]
    Listen {
        /// The address.
        listen: SocketAddr,
        /// The cause.
        source: std::io::Error,
    },
}

fn why_not_listening(err: &std::io::Error) -> &'static str {
    match err.kind() {
        std::io::ErrorKind::AddrInUse => {
            "another program (perhaps another cynai) uses that port; choose one with --listen, such as \
             --listen 127.0.0.1:2025"
        }
        std::io::ErrorKind::PermissionDenied => {
            "ports below 1024 need privileges; choose a higher one with --listen"
        }
        std::io::ErrorKind::AddrNotAvailable => {
            "this machine has no such address; use --listen 127.0.0.1:PORT, or 0.0.0.0:PORT for all"
        }
        _ => "the system refused; choose another address with --listen",
    }
}

/// Where the database is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DatabaseConfig {
    /// A private one in the data directory.
    Embedded {
        /// Directory of its programs.
        pg_bin: Option<PathBuf>,
        /// The directories of `PATH`, where its programs are looked for last.
        search_path: Vec<PathBuf>,
        /// The user that runs it when we are root.
        pg_user: Option<String>,
        /// Its settings.
        settings: Vec<(String, String)>,
    },
    /// A server that somebody else runs.
    External {
        /// For everything.
        url: DatabaseUrl,
        /// For what a transaction pooler cannot carry; the same as `url` when none was given.
        direct_url: DatabaseUrl,
    },
}

/// The worker that runs jobs beside the server.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LocalWorkerConfig {
    /// How many jobs run at once; none leaves it to the worker.
    pub slots: Option<usize>,
    /// The bubblewrap program: a path, or a name to be found in `PATH`.
    pub bubblewrap: PathBuf,
    /// Directories that jobs may ask for, by name.
    pub mounts: BTreeMap<String, PathBuf>,
    /// Root file systems, by image name.
    pub images: BTreeMap<String, PathBuf>,
}

/// Where the keys are that seal the store of secrets.
#[derive(Debug, Clone)]
pub struct MasterKeys {
    /// Keys from the environment, in base64, the newest first: they come before those of the file.
    pub environment: Vec<SecretString>,
    /// The file of keys.
    pub file: PathBuf,
    /// Whether the file is made when it is missing: it is in its usual place, and the environment has no key.
    pub make: bool,
}

/// A checked configuration of `cynai serve`.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// Address and port.
    pub listen: SocketAddr,
    /// Certificate and key, for HTTPS.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Names in a request's `Host` that are accepted beside localhost and the address.
    pub allowed_hosts: Vec<String>,
    /// Where data lies; absolute.
    pub data_dir: PathBuf,
    /// What the configuration file says.
    pub file: ConfigFile,
    /// Where the keys are that seal the store of secrets.
    pub master_keys: MasterKeys,
    /// The database.
    pub database: DatabaseConfig,
    /// Connections in the pool.
    pub pool_size: u32,
    /// Directories of graph files; they exist.
    pub graphs: Vec<PathBuf>,
    /// What graphs read as `env`.
    pub graph_env: BTreeMap<String, String>,
    /// How long silence is not yet death.
    pub lease: Duration,
    /// Runs advanced at once.
    pub driver_capacity: usize,
    /// Longest request body.
    pub body_limit_bytes: usize,
    /// Where the first administrator's token is written.
    pub admin_token_file: PathBuf,
    /// The worker beside the server; none with --no-local-worker.
    pub local_worker: Option<LocalWorkerConfig>,
    /// Whether graphs may use the nodes of tests; never in a release build.
    pub test_nodes: bool,
    /// Logging.
    pub log_format: LogFormat,
    /// Logging.
    pub log_filter: String,
}

/// What a configuration needs to know about the process it is for.
struct Environment<'a> {
    root: bool,
    directory: PathBuf,
    variable: &'a dyn Fn(&str) -> Option<String>,
}

impl ServeArgs {
    /// Checks the arguments against this machine and fills in the defaults.
    pub fn resolve(self) -> Result<ServeConfig, ConfigError> {
        let directory = std::env::current_dir()
            .map_err(|err| flag("--data-dir", format!("the current directory is gone ({err})")))?;
        self.resolve_in(&Environment {
            root: Uid::effective().is_root(),
            directory,
            variable: &|name| std::env::var_os(name)?.into_string().ok(),
        })
    }

    fn resolve_in(self, environment: &Environment<'_>) -> Result<ServeConfig, ConfigError> {
        let data_dir = match &self.data_dir {
            Some(dir) => environment.directory.join(dir),
            None => default_data_dir(environment)?,
        };
        let worker = LocalWorkerConfig {
            slots: self.slots.map(usize::from),
            bubblewrap: self.bubblewrap.clone(),
            mounts: directories("--mount", &self.mounts, &data_dir, environment)?,
            images: directories("--image", &self.images, &data_dir, environment)?,
        };
        let file = match config_file(self.config.as_deref(), &data_dir, &environment.directory) {
            Some(path) => ConfigFile::read(&path)?,
            None => ConfigFile::default(),
        };
        let admin_token_file =
            self.admin_token_file.as_ref().map(|file| environment.directory.join(file));
        Ok(ServeConfig {
            listen: self.listen,
            tls: self.tls_cert.as_ref().zip(self.tls_key.as_ref()).map(|(certificate, key)| {
                let absolute = |file: &PathBuf| environment.directory.join(file);
                (absolute(certificate), absolute(key))
            }),
            database: self.database(environment)?,
            graphs: self.graph_directories(environment)?,
            graph_env: graph_env(&self.graph_env, environment)?,
            master_keys: master_keys(&file, &data_dir, environment),
            file,
            admin_token_file: admin_token_file.unwrap_or_else(|| data_dir.join("admin-token")),
            data_dir,
            pool_size: self.pool_size,
            lease: self.lease,
            driver_capacity: self.driver_capacity as usize,
            body_limit_bytes: self.body_limit,
            local_worker: (!self.no_local_worker).then_some(worker),
            #[cfg(debug_assertions)]
            test_nodes: self.test_nodes,
            #[cfg(not(debug_assertions))]
            test_nodes: false,
            allowed_hosts: self.allowed_hosts,
            log_format: self.log.log_format,
            log_filter: self.log.log_filter,
        })
    }

    fn database(&self, environment: &Environment<'_>) -> Result<DatabaseConfig, ConfigError> {
        if let Some(url) = &self.database_url {
            let direct_url = self.database_direct_url.clone().unwrap_or_else(|| url.clone());
            return Ok(DatabaseConfig::External { url: url.clone(), direct_url });
        }
        let allowed = self
            .pg_settings
            .iter()
            .rev()
            .find(|(name, _)| name.eq_ignore_ascii_case("max_connections"))
            .and_then(|(_, value)| value.parse().ok())
            .unwrap_or(DEFAULT_MAX_CONNECTIONS);
        if self.pool_size.saturating_add(RESERVED_CONNECTIONS) > allowed {
            let needed = self.pool_size.saturating_add(RESERVED_CONNECTIONS);
            return Err(flag(
                "--pool-size",
                format!(
                    "the private database allows {allowed} connections, of which {RESERVED_CONNECTIONS} \
                     stay free; lower it, or add --pg-setting max_connections={needed}"
                ),
            ));
        }
        let path = (environment.variable)("PATH").unwrap_or_default();
        Ok(DatabaseConfig::Embedded {
            pg_bin: self.pg_bin.clone(),
            search_path: std::env::split_paths(&path).filter(|dir| dir.is_absolute()).collect(),
            pg_user: self.pg_user.clone(),
            settings: self.pg_settings.clone(),
        })
    }

    fn graph_directories(
        &self,
        environment: &Environment<'_>,
    ) -> Result<Vec<PathBuf>, ConfigError> {
        if self.graphs.is_empty() {
            let usual = environment.directory.join("graphs");
            return Ok(if usual.is_dir() { vec![usual] } else { Vec::new() });
        }
        let resolve = |dir: &PathBuf| {
            let dir = environment.directory.join(dir);
            if dir.is_dir() {
                return Ok(dir);
            }
            Err(flag("--graphs", format!("{} is not a directory", dir.display())))
        };
        limited("--graphs", self.graphs.len())?;
        self.graphs.iter().map(resolve).collect()
    }
}

/// The configuration file that a server would read: the one that is named, or the usual one when there is one.
fn config_file(named: Option<&Path>, data_dir: &Path, directory: &Path) -> Option<PathBuf> {
    match named {
        Some(path) => Some(directory.join(path)),
        None => Some(data_dir.join(file::USUAL_NAME)).filter(|path| path.exists()),
    }
}

/// The configuration file that `cynai serve` would read here when none is named.
#[must_use]
pub fn usual_config_file(data_dir: Option<&Path>) -> Option<PathBuf> {
    let environment = Environment {
        root: Uid::effective().is_root(),
        directory: PathBuf::new(),
        variable: &|name| std::env::var_os(name)?.into_string().ok(),
    };
    let usual = default_data_dir(&environment).ok();
    Some(data_dir.map(Path::to_owned).or(usual)?.join(file::USUAL_NAME))
}

fn master_keys(file: &ConfigFile, data_dir: &Path, environment: &Environment<'_>) -> MasterKeys {
    let keys =
        ["CYNAI_MASTER_KEY", "CYNAI_OLD_MASTER_KEYS"].into_iter().filter_map(environment.variable);
    let keys: Vec<SecretString> = keys
        .flat_map(|keys| keys.split([',', ' ', '\n']).map(SecretString::from).collect::<Vec<_>>())
        .filter(|key| !secrecy::ExposeSecret::expose_secret(key).is_empty())
        .collect();
    let named = file.secrets.master_key_file.as_ref();
    MasterKeys {
        make: keys.is_empty() && named.is_none(),
        environment: keys,
        file: match named {
            Some(named) => environment.directory.join(named),
            None => data_dir.join("master.key"),
        },
    }
}

/// Where a server on this machine writes the administrator's token unless it is told otherwise.
#[must_use]
pub fn usual_admin_token_file() -> Option<PathBuf> {
    let environment = Environment {
        root: Uid::effective().is_root(),
        directory: PathBuf::new(),
        variable: &|name| std::env::var_os(name)?.into_string().ok(),
    };
    Some(default_data_dir(&environment).ok()?.join("admin-token"))
}

fn flag(flag: &'static str, problem: String) -> ConfigError {
    ConfigError::Flag { flag, problem }
}

fn limited(name: &'static str, count: usize) -> Result<(), ConfigError> {
    if count <= MAX_ENTRIES {
        return Ok(());
    }
    Err(flag(name, format!("given {count} times, but at most {MAX_ENTRIES} are allowed")))
}

fn default_data_dir(environment: &Environment<'_>) -> Result<PathBuf, ConfigError> {
    if environment.root {
        return Ok(PathBuf::from(ROOT_DATA_DIR));
    }
    // The XDG rules: a relative path in the variable counts as not set.
    let absolute = |name: &str| {
        let dir = PathBuf::from((environment.variable)(name)?);
        dir.is_absolute().then_some(dir)
    };
    absolute("XDG_DATA_HOME")
        .or_else(|| Some(absolute("HOME")?.join(".local/share")))
        .map(|dir| dir.join("cynai"))
        .ok_or_else(|| {
            flag(
                "--data-dir",
                "HOME is not set: name a directory, such as --data-dir ./data".to_owned(),
            )
        })
}

/// Named directories, which jobs can see: they must exist, and must not show them the server's data.
fn directories(
    name: &'static str,
    given: &[(String, PathBuf)],
    data_dir: &Path,
    environment: &Environment<'_>,
) -> Result<BTreeMap<String, PathBuf>, ConfigError> {
    limited(name, given.len())?;
    let data_dir = data_dir.canonicalize().unwrap_or_else(|_| data_dir.to_owned());
    let mut found = BTreeMap::new();
    for (key, dir) in given {
        let dir = environment.directory.join(dir);
        let dir = dir
            .canonicalize()
            .ok()
            .filter(|dir| dir.is_dir())
            .ok_or_else(|| flag(name, format!("{} is not a directory", dir.display())))?;
        if dir.starts_with(&data_dir) || data_dir.starts_with(&dir) {
            let problem = format!(
                "{} and the data directory {} hold one another, so jobs would see the server's data",
                dir.display(),
                data_dir.display()
            );
            return Err(flag(name, problem));
        }
        if found.insert(key.clone(), dir).is_some() {
            return Err(flag(name, format!("the name {key:?} is given twice")));
        }
    }
    Ok(found)
}

fn graph_env(
    given: &[String],
    environment: &Environment<'_>,
) -> Result<BTreeMap<String, String>, ConfigError> {
    limited("--env", given.len())?;
    let mut found = BTreeMap::new();
    for entry in given {
        let (name, value) = match entry.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (entry.as_str(), (environment.variable)(entry)),
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if name.is_empty()
            || name.starts_with(|c: char| c.is_ascii_digit())
            || !name.chars().all(plain)
        {
            let problem =
                format!("{name:?} is no variable's name: use --env NAME or --env NAME=VALUE");
            return Err(flag("--env", problem));
        }
        let Some(value) = value else {
            let problem =
                format!("the variable {name} is not set: set it, or use --env {name}=VALUE");
            return Err(flag("--env", problem));
        };
        found.insert(name.to_owned(), value);
    }
    Ok(found)
}

fn parse_listen(text: &str) -> Result<SocketAddr, FormError> {
    let form = "an address and a port, such as 127.0.0.1:2024, 0.0.0.0:2024 or [::1]:2024";
    let literal = text.strip_prefix("localhost:").map(|port| format!("127.0.0.1:{port}"));
    literal.as_deref().unwrap_or(text).parse().map_err(|_| FormError(form))
}

fn parse_lease(text: &str) -> Result<Duration, FormError> {
    let lease = humantime::parse_duration(text).ok();
    lease
        .filter(|lease| (Duration::from_secs(1)..=Duration::from_secs(600)).contains(lease))
        .ok_or(FormError("a duration from 1s to 10m, such as 10s"))
}

fn parse_body_limit(text: &str) -> Result<usize, FormError> {
    let error = FormError("a size from 1KiB to 1GiB, such as 10MiB");
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit: usize = match text[end..].trim() {
        "" | "B" => 1,
        "KiB" | "K" | "k" => 1 << 10,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        _ => return Err(error),
    };
    let bytes = text[..end].parse::<usize>().ok().and_then(|count| count.checked_mul(unit));
    bytes.filter(|bytes| (1 << 10..=1 << 30).contains(bytes)).ok_or(error)
}

fn parse_pair(text: &str) -> Result<(String, String), FormError> {
    let pair = text.split_once('=').filter(|(name, _)| !name.is_empty());
    let (name, value) = pair.ok_or(FormError("NAME=VALUE, such as shared_buffers=256MB"))?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

fn parse_mount(text: &str) -> Result<(String, PathBuf), FormError> {
    let form =
        "NAME=DIR with a name of letters, digits, `.`, `_` and `-`, such as logs=/var/log/app";
    parse_directory(text, "._-").ok_or(FormError(form))
}

fn parse_image(text: &str) -> Result<(String, PathBuf), FormError> {
    let form =
        "NAME=DIR with a name of letters, digits and `._-/:`, such as sandbox/tools=/srv/tools";
    parse_directory(text, "._-/:").ok_or(FormError(form))
}

fn parse_directory(text: &str, marks: &str) -> Option<(String, PathBuf)> {
    let (name, dir) = text.split_once('=')?;
    let plain = |c: char| c.is_ascii_alphanumeric() || marks.contains(c);
    let parts_are_names = name.split('/').all(|part| !part.is_empty() && !part.starts_with('.'));
    let well_formed = name.len() <= 128 && name.chars().all(plain) && parts_are_names;
    (well_formed && !dir.is_empty()).then(|| (name.to_owned(), PathBuf::from(dir)))
}

#[cfg(test)]
mod tests;
