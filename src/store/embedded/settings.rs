//! The embedded database's settings: what Cynai fixes, its defaults, and what an operator may replace.
//!
//! All of them are arguments of the server, which PostgreSQL puts above its configuration files, so what
//! a start asks for is what runs, and a running server's arguments tell whether it is the one we want.

use std::path::Path;

use super::PORT;
use super::error::EmbeddedError;
use super::layout::Layout;

/// What our promises (durability) and our doors (socket, authentication, paths) stand on.
const FIXED: [(&str, &str); 10] = [
    ("fsync", "on"),
    ("full_page_writes", "on"),
    ("synchronous_commit", "on"),
    ("listen_addresses", ""),
    ("unix_socket_permissions", "0700"),
    ("logging_collector", "off"),
    ("log_destination", "stderr"),
    ("cluster_name", "cynai"),
    ("ssl", "off"),
    // Statements may hold what must not reach a log; the client that sent one has its error anyway.
    ("log_min_error_statement", "panic"),
];

/// Fixed too, but their values depend on where the data lies.
const FIXED_PATHS: [&str; 8] = [
    "unix_socket_directories",
    "unix_socket_group",
    "hba_file",
    "ident_file",
    "data_directory",
    "config_file",
    "external_pid_file",
    "port",
];

/// For one machine that also runs everything else; an operator may replace each.
const DEFAULTS: [(&str, &str); 9] = [
    ("max_connections", "100"),
    ("shared_buffers", "128MB"),
    // A hot table of the queue is small, and wants its dead rows gone soon.
    ("autovacuum_naptime", "10s"),
    // Our statements are short: compiling them costs more than it saves.
    ("jit", "off"),
    ("log_checkpoints", "off"),
    ("log_error_verbosity", "terse"),
    ("log_line_prefix", "%m [%p] "),
    ("timezone", "UTC"),
    ("log_timezone", "UTC"),
];

const MAX_SETTINGS: usize = 64;
const MAX_VALUE_BYTES: usize = 256;

/// Refuses settings that cannot be passed on, or are not the operator's to change.
pub(super) fn check(settings: &[(String, String)]) -> Result<(), EmbeddedError> {
    for (at, (name, value)) in settings.iter().enumerate() {
        let bad = |reason| EmbeddedError::BadSetting { name: name.clone(), reason };
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
        if at >= MAX_SETTINGS {
            return Err(bad("there are more than 64 settings"));
        }
        if name.is_empty() || !name.chars().all(plain) {
            return Err(bad("a name has only letters, digits, dots and underscores"));
        }
        if value.len() > MAX_VALUE_BYTES || value.chars().any(char::is_control) {
            return Err(bad("a value has at most 256 bytes and no control characters"));
        }
        let lower = name.to_ascii_lowercase();
        let fixed = FIXED.iter().map(|(fixed, _)| *fixed).chain(FIXED_PATHS);
        if fixed.into_iter().any(|fixed| fixed == lower) {
            return Err(EmbeddedError::FixedSetting { name: name.clone() });
        }
    }
    Ok(())
}

/// The server's arguments.
pub(super) fn arguments(
    layout: &Layout,
    socket_dir: &Path,
    settings: &[(String, String)],
) -> Vec<String> {
    let mut arguments = vec!["-D".to_owned(), layout.cluster().display().to_string()];
    let mut set = |name: &str, value: &str| {
        arguments.push("-c".to_owned());
        arguments.push(format!("{name}={value}"));
    };
    for (name, value) in DEFAULTS {
        if !settings.iter().any(|(other, _)| other.eq_ignore_ascii_case(name)) {
            set(name, value);
        }
    }
    for (name, value) in settings {
        set(name, value);
    }
    for (name, value) in FIXED {
        set(name, value);
    }
    set("unix_socket_directories", &socket_dir.display().to_string());
    set("hba_file", &layout.hba_file().display().to_string());
    set("ident_file", &layout.ident_file().display().to_string());
    set("port", &PORT.to_string());
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_one(name: &str, value: &str, expected: &str) {
        let outcome = match check(&[(name.to_owned(), value.to_owned())]) {
            Ok(()) => "passes".to_owned(),
            Err(err) => err.to_string(),
        };
        assert!(outcome.contains(expected), "{name}={value}: {outcome}");
    }

    #[test]
    fn settings_that_guarantees_stand_on_cannot_be_changed() {
        check_one("shared_buffers", "1GB", "passes");
        check_one("pg_stat_statements.max", "100", "passes");
        check_one("fsync", "off", "fixed by cynai");
        check_one("FSYNC", "off", "fixed by cynai");
        check_one("hba_file", "/tmp/mine", "fixed by cynai");
        check_one("listen_addresses", "*", "fixed by cynai");
        check_one("work_mem -c fsync", "off", "not valid");
        check_one("work_mem", "4MB\nfsync=off", "not valid");
        check_one("work_mem", &"x".repeat(257), "not valid");
    }
}
