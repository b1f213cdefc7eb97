//! Arguments in, configuration or message out. The variables of this process play no part.

use clap::{CommandFactory, FromArgMatches, Parser};

use super::*;

#[derive(Debug, Parser)]
struct Serve {
    #[command(flatten)]
    args: ServeArgs,
}

struct Machine {
    directory: tempfile::TempDir,
    root: bool,
    variables: Vec<(&'static str, &'static str)>,
}

impl Machine {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["flows", "logs", "data"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        Self { directory, root: false, variables: vec![("HOME", "/home/ann"), ("REGION", "eu")] }
    }

    /// The configuration that `flags`, split at blanks, make here, or the message.
    fn resolve(&self, flags: &str) -> Result<ServeConfig, String> {
        let words = std::iter::once("serve").chain(flags.split_whitespace());
        let command = Serve::command().mut_args(|arg| arg.env(clap::builder::Resettable::Reset));
        let matches = command.try_get_matches_from(words).map_err(|err| err.to_string())?;
        let serve = Serve::from_arg_matches(&matches).map_err(|err| err.to_string())?;
        let variable = |name: &str| {
            let found = self.variables.iter().find(|(other, _)| *other == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        let directory = self.directory.path().canonicalize().unwrap();
        let environment = Environment { root: self.root, directory, variable: &variable };
        serve.args.resolve_in(&environment).map_err(|err| err.to_string())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().canonicalize().unwrap().join(name)
    }
}

/// `flags` are refused with a message that holds each of `expected`.
fn check(flags: &str, expected: &[&str]) {
    let message = Machine::new().resolve(flags).unwrap_err();
    for words in expected {
        assert!(message.contains(words), "{flags}: {words:?} is not in {message}");
    }
}

#[test]
fn mistakes_are_reported_with_the_flag_and_the_form_that_works() {
    check("--listen 2024", &["--listen", "127.0.0.1:2024"]);
    check("--listen example.com:80", &["--listen", "127.0.0.1:2024"]);
    check("--lease 100ms", &["--lease", "from 1s to 10m"]);
    check("--lease soon", &["--lease", "from 1s to 10m"]);
    check("--body-limit 2GiB", &["--body-limit", "from 1KiB to 1GiB"]);
    check("--body-limit 99999999999999999999G", &["--body-limit", "from 1KiB to 1GiB"]);
    check("--body-limit 8XB", &["--body-limit", "such as 10MiB"]);
    check("--pool-size 1", &["--pool-size", "2..=1000"]);
    check("--driver-capacity 0", &["--driver-capacity", "1..=100000"]);
    check("--database-url mysql://h/d", &["--database-url", "postgres://USER"]);
    check("--database-direct-url postgres://h/d", &["--database-url"]);
    check("--graphs nowhere", &["--graphs", "nowhere is not a directory"]);
    check("--mount logs", &["--mount", "NAME=DIR"]);
    check("--mount ../logs=logs", &["--mount", "NAME=DIR"]);
    check("--mount a/b=logs", &["--mount", "logs=/var/log/app"]);
    check("--image a//b=logs", &["--image", "sandbox/tools=/srv/tools"]);
    check("--slots 0", &["--slots", "1..=1024"]);
    check("--mount logs=nowhere", &["--mount", "nowhere is not a directory"]);
    check("--mount a=logs --mount a=flows", &["--mount", "\"a\" is given twice"]);
    check("--env UNSET", &["--env", "UNSET is not set", "--env UNSET=VALUE"]);
    check("--env 1X=2", &["--env", "no variable's name"]);
    check("--pg-setting work_mem", &["--pg-setting", "NAME=VALUE"]);
    check("--pool-size 95", &["--pool-size", "max_connections=105"]);
}

#[test]
fn jobs_cannot_be_shown_the_servers_data() {
    check("--data-dir data --mount all=.", &["--mount", "server's data"]);
    check("--data-dir data --mount own=data", &["--mount", "server's data"]);
    check("--data-dir data --image root=/", &["--image", "server's data"]);
}

#[test]
fn data_lies_where_the_user_expects_it() {
    let mut machine = Machine::new();
    let data_dir = |machine: &Machine| machine.resolve("").map(|config| config.data_dir);
    assert_eq!(data_dir(&machine).unwrap(), Path::new("/home/ann/.local/share/cynai"));
    machine.variables.push(("XDG_DATA_HOME", "/xdg"));
    assert_eq!(data_dir(&machine).unwrap(), Path::new("/xdg/cynai"));
    machine.root = true;
    assert_eq!(data_dir(&machine).unwrap(), Path::new("/var/lib/cynai"));
    machine.root = false;
    machine.variables = vec![("XDG_DATA_HOME", "relative")];
    assert!(data_dir(&machine).unwrap_err().contains("--data-dir ./data"));
}

#[test]
fn defaults_are_a_private_database_and_a_worker_on_loopback() {
    let config = Machine::new().resolve("").unwrap();
    assert!(config.listen.ip().is_loopback());
    assert!(matches!(config.database, DatabaseConfig::Embedded { pg_bin: None, .. }));
    let worker = LocalWorkerConfig { bubblewrap: "bwrap".into(), ..LocalWorkerConfig::default() };
    assert_eq!(config.local_worker, Some(worker));
    assert_eq!(config.body_limit_bytes, 10 << 20);
    assert_eq!(config.admin_token_file, Path::new("/home/ann/.local/share/cynai/admin-token"));
    assert!(config.graphs.is_empty());
}

#[test]
fn every_flag_reaches_the_configuration() {
    let machine = Machine::new();
    let config = machine
        .resolve(
            "--listen localhost:8080 --data-dir data --graphs flows --lease 2s --mount logs=logs \
             --image sandbox/tools=flows --env REGION --env MODE=fast --body-limit 64KiB \
             --database-url postgres://cynai:hunter2@db/cynai --pool-size 200 --log-format json",
        )
        .unwrap();
    assert_eq!(config.listen, "127.0.0.1:8080".parse().unwrap());
    assert_eq!(config.graphs, [machine.path("flows")]);
    assert_eq!(config.admin_token_file, machine.path("data/admin-token"));
    let worker = config.local_worker.as_ref().unwrap();
    assert_eq!(worker.mounts["logs"], machine.path("logs"));
    assert_eq!(worker.images["sandbox/tools"], machine.path("flows"));
    assert_eq!(config.graph_env["REGION"], "eu");
    assert_eq!(config.graph_env["MODE"], "fast");
    let DatabaseConfig::External { url, direct_url } = &config.database else {
        panic!("{:?}", config.database);
    };
    assert_eq!((url.expose(), direct_url), ("postgres://cynai:hunter2@db/cynai", url));
    let printed = format!("{config:?}");
    assert!(printed.contains("db/cynai") && !printed.contains("hunter2"), "{printed}");
}

#[test]
fn the_file_is_the_one_that_is_named_or_the_usual_one() {
    let machine = Machine::new();
    let keep = |flags: &str| machine.resolve(flags).map(|config| config.file.retention.keep_last);
    assert_eq!(keep("--data-dir data"), Ok(None));
    std::fs::write(machine.path("data/cynai.yaml"), "retention: {keep_last: 5}").unwrap();
    std::fs::write(machine.path("other.yaml"), "retention: {keep_last: 7}").unwrap();
    assert_eq!(keep("--data-dir data"), Ok(Some(5)));
    assert_eq!(keep("--data-dir data --config other.yaml"), Ok(Some(7)));
    assert!(keep("--config none.yaml").unwrap_err().contains("none.yaml cannot be read"));
    std::fs::write(machine.path("other.yaml"), "retention: {keep_lats: 7}").unwrap();
    let err = keep("--config other.yaml").unwrap_err();
    assert!(err.contains("other.yaml:1:13") && err.contains("`keep_last`"), "{err}");
}

#[test]
fn master_keys_come_from_the_environment_or_a_file_that_is_made() {
    let mut machine = Machine::new();
    let keys = machine.resolve("--data-dir data").unwrap().master_keys;
    assert!(
        keys.make && keys.environment.is_empty() && keys.file == machine.path("data/master.key")
    );
    machine.variables.push(("CYNAI_MASTER_KEY", "hunter2"));
    machine.variables.push(("CYNAI_OLD_MASTER_KEYS", "hunter3,hunter4"));
    let config = machine.resolve("--data-dir data").unwrap();
    assert_eq!((config.master_keys.environment.len(), config.master_keys.make), (3, false));
    assert!(!format!("{config:?}").contains("hunter"), "{config:?}");
    machine.variables.truncate(2);
    std::fs::write(machine.path("c.yaml"), "secrets: {master_key_file: keys}").unwrap();
    let keys = machine.resolve("--config c.yaml").unwrap().master_keys;
    assert_eq!((keys.file, keys.make), (machine.path("keys"), false));
}

#[test]
fn a_taken_port_is_reported_with_the_flag_that_changes_it() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap();
    let source = std::net::TcpListener::bind(listen).unwrap_err();
    let message = ConfigError::Listen { listen, source }.to_string();
    assert!(message.contains("--listen 127.0.0.1:2025"), "{message}");
}
