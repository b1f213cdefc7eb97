//! What can go wrong with the embedded database, each with what to do about it.
//!
//! People meet these on their first start, so a message names the path, the cause that is likely, and
//! the command or flag that helps. Where PostgreSQL itself said why, its last lines are part of the text.

use std::io;
use std::path::{Path, PathBuf};

/// Why the embedded database could not be made, started or stopped.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// Neither a configured directory nor the usual places hold a server.
    #[error(
        "no PostgreSQL server programs (initdb, postgres) in {searched}: install them with \
         `apt-get install postgresql`, name their directory with --pg-bin or CYNAI_PG_BIN, or set \
         DATABASE_URL to use a server that runs already"
    )]
    NoBinaries {
        /// The places that were looked at.
        searched: String,
    },
    /// The newest server found is older than what Cynai's SQL needs.
    #[error(
        "{program} is PostgreSQL {found}, but {needed} or newer is needed: install a newer one \
         (`apt-get install postgresql`), or name its directory with --pg-bin or CYNAI_PG_BIN"
    )]
    TooOld {
        /// The program that was asked.
        program: PathBuf,
        /// Its major version.
        found: u32,
        /// The oldest major version that works.
        needed: u32,
    },
    /// The program answered `--version` with something else than PostgreSQL's line.
    #[error("{program} does not look like PostgreSQL: it answered {answer:?} to --version")]
    NotPostgres {
        /// The program that was asked.
        program: PathBuf,
        /// The first part of its answer.
        answer: String,
    },
    /// The cluster was made by another major version than the one installed now.
    #[error(
        "the database in {cluster} was made by PostgreSQL {made_by}, and {program} is version {found}: \
         install the matching server (`apt-get install postgresql-{made_by}`), or bring the data over \
         with pg_upgrade"
    )]
    OtherVersion {
        /// The cluster's directory.
        cluster: PathBuf,
        /// The major version in its PG_VERSION file.
        made_by: String,
        /// The program that was found.
        program: PathBuf,
        /// Its major version.
        found: u32,
    },
    /// Another server holds the lock of this data directory.
    #[error(
        "{data_dir} is in use by another cynai server (process {pid}): stop it, or choose another \
         --data-dir"
    )]
    InUse {
        /// The data directory.
        data_dir: PathBuf,
        /// The other server's process id, as it wrote it down.
        pid: String,
    },
    /// Started as root, and there is no account that the database may run as.
    #[error(
        "PostgreSQL refuses to run as root, and there is no user {name:?} to run it as: create one \
         (`useradd --system --no-create-home {name}`) or name another with --pg-user"
    )]
    NoAccount {
        /// The account that was looked for.
        name: String,
    },
    /// The account exists but must not own a database.
    #[error("the database cannot run as {name:?}: {reason}; name another user with --pg-user")]
    BadAccount {
        /// The account.
        name: String,
        /// Why not.
        reason: &'static str,
    },
    /// This process's user id has no name, and peer authentication works with names.
    #[error(
        "the user id {uid} of this process has no entry in the password file, which PostgreSQL needs: \
         add one, or set DATABASE_URL to use a server that runs elsewhere"
    )]
    Nameless {
        /// The effective user id.
        uid: u32,
    },
    /// The cluster belongs to another account than the one that would run it.
    #[error(
        "{dir} belongs to user id {owner}, but the database would run as {account}: start cynai as \
         the user that made it, name that user with --pg-user (as root), or choose another --data-dir"
    )]
    OtherOwner {
        /// The directory.
        dir: PathBuf,
        /// Its owner.
        owner: u32,
        /// The account that would run the server.
        account: String,
    },
    /// The database's account may not walk down to the data directory.
    #[error(
        "the user {account} that runs the database may not enter {dir}: make every directory above it \
         passable (`chmod o+x`), or choose another --data-dir, such as /var/lib/cynai"
    )]
    Unreachable {
        /// The directory.
        dir: PathBuf,
        /// The account.
        account: String,
    },
    /// A file operation failed.
    #[error("could not {action} {path}{}", advice_for(.source))]
    Files {
        /// The verb.
        action: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A program could not be run at all.
    #[error("could not run {program}{}", advice_for(.source))]
    Run {
        /// The program.
        program: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A program took longer than it may.
    #[error("{program} did not finish within {seconds} s: is the disk overloaded or full?")]
    TooSlow {
        /// The program.
        program: PathBuf,
        /// The limit.
        seconds: u64,
    },
    /// The database cluster could not be made.
    #[error("could not make the database in {dir}{}; PostgreSQL said:\n{said}", advice_in(.said))]
    Init {
        /// Where it was to be.
        dir: PathBuf,
        /// The last lines of the program's output.
        said: String,
    },
    /// The server ended while it was starting.
    #[error(
        "PostgreSQL did not start{}; the last lines of {log}:\n{said}",
        advice_in(.said)
    )]
    Start {
        /// The server's log file.
        log: PathBuf,
        /// Its last lines.
        said: String,
    },
    /// The server runs but was not ready in time.
    #[error(
        "PostgreSQL (process {pid}) was not ready within {seconds} s; it may still be recovering: see \
         {log}; its last lines:\n{said}"
    )]
    NotReady {
        /// The server's process id.
        pid: i32,
        /// The limit.
        seconds: u64,
        /// The server's log file.
        log: PathBuf,
        /// Its last lines.
        said: String,
    },
    /// The server is ready but refuses our connection.
    #[error("PostgreSQL runs, but a connection to its socket in {socket_dir} failed")]
    Connect {
        /// The socket's directory.
        socket_dir: PathBuf,
        /// The cause.
        source: sqlx::Error,
    },
    /// Processes of this cluster do not end.
    #[error(
        "the database processes {pids:?} of {cluster} do not end: end them by hand and try again"
    )]
    NotStopped {
        /// The processes.
        pids: Vec<i32>,
        /// The cluster's directory.
        cluster: PathBuf,
    },
    /// A setting that Cynai's guarantees or its authentication stand on.
    #[error("the database setting {name:?} is fixed by cynai and cannot be changed")]
    FixedSetting {
        /// The setting's name.
        name: String,
    },
    /// A setting that cannot be passed on.
    #[error("the database setting {name:?} is not valid: {reason}")]
    BadSetting {
        /// The setting's name.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
}

impl EmbeddedError {
    /// For `map_err` on a file operation.
    pub(super) fn files(
        action: &'static str,
        path: &Path,
    ) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Files { action, path, source }
    }
}

/// What to do about an operating system error, as the tail of a sentence.
fn advice_for(err: &io::Error) -> &'static str {
    match err.kind() {
        io::ErrorKind::PermissionDenied => {
            " (permission denied: start cynai as the owner of that directory, or choose another --data-dir)"
        }
        io::ErrorKind::ReadOnlyFilesystem => {
            " (the file system is read-only: choose another --data-dir)"
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            " (the disk is full: free some space, or choose another --data-dir)"
        }
        io::ErrorKind::OutOfMemory => " (not enough memory)",
        _ => "",
    }
}

/// What to do about something that PostgreSQL reported, as the tail of a sentence.
fn advice_in(said: &str) -> &'static str {
    const KNOWN: [(&str, &str); 7] = [
        ("No space left on device", " (the disk is full: free some space)"),
        ("Disk quota exceeded", " (the disk quota is used up: free some space)"),
        ("Read-only file system", " (the file system is read-only: choose another --data-dir)"),
        ("Permission denied", " (a file's owner or mode is wrong: see the line below)"),
        (
            "Cannot allocate memory",
            " (not enough memory: lower --pg-setting shared_buffers and max_connections)",
        ),
        (
            "unrecognized configuration parameter",
            " (a --pg-setting has a name that this PostgreSQL does not know)",
        ),
        ("invalid value for parameter", " (a --pg-setting has a value that PostgreSQL refuses)"),
    ];
    KNOWN.iter().find(|(words, _)| said.contains(words)).map_or("", |(_, advice)| advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(kind: io::ErrorKind, expected: &str) {
        let err = EmbeddedError::files("create", Path::new("/data"))(io::Error::from(kind));
        assert!(err.to_string().contains(expected), "{err}");
    }

    #[test]
    fn file_errors_say_what_to_do() {
        check(io::ErrorKind::PermissionDenied, "could not create /data (permission denied: start");
        check(io::ErrorKind::StorageFull, "free some space");
        check(io::ErrorKind::ReadOnlyFilesystem, "choose another --data-dir");
    }

    #[test]
    fn errors_of_the_server_say_what_to_do() {
        let said =
            "FATAL:  could not map anonymous shared memory: Cannot allocate memory".to_owned();
        let err = EmbeddedError::Start { log: PathBuf::from("/data/log"), said };
        assert!(err.to_string().contains("lower --pg-setting shared_buffers"), "{err}");
    }
}
