//! Which operating system user runs the database, and which one connects to it.
//!
//! PostgreSQL refuses to run as root. Started as root, Cynai therefore runs it as an unprivileged user of
//! its own (Debian's `postgres`), and stays root itself; started by anybody else, both are that user.
//! Whoever connects is known by the kernel's word (peer authentication), so the names matter here.
//!
//! **Invariant:** the database never runs as root, nor as `nobody`, whom sandboxed jobs may share.

use nix::unistd::{Gid, Uid, User};
use tokio::process::Command;

use super::error::EmbeddedError;

const DEFAULT_ACCOUNT: &str = "postgres";
const NOBODY: &str = "nobody";

/// The two users of an embedded database.
#[derive(Debug, Clone)]
pub(super) struct Account {
    /// The name that our connections carry: this process's effective user.
    pub(super) client: String,
    /// Who runs the server and owns its files.
    pub(super) server: String,
    pub(super) uid: Uid,
    pub(super) gid: Gid,
    /// The server's user differs from ours: we are root.
    pub(super) separate: bool,
}

impl Account {
    /// The users for this process; `configured` names the server's, and counts only for root.
    pub(super) fn choose(configured: Option<&str>) -> Result<Self, EmbeddedError> {
        let uid = Uid::effective();
        let me = lookup_id(uid)?;
        check_name(&me.name)?;
        if !uid.is_root() {
            return Ok(Self {
                client: me.name.clone(),
                server: me.name,
                uid: me.uid,
                gid: me.gid,
                separate: false,
            });
        }
        let name = configured.unwrap_or(DEFAULT_ACCOUNT);
        let server = lookup_name(name)?;
        let refused = |reason| EmbeddedError::BadAccount { name: name.to_owned(), reason };
        if server.uid.is_root() {
            return Err(refused("PostgreSQL refuses to run as root"));
        }
        if server.name == NOBODY {
            return Err(refused(
                "sandboxed jobs may run as nobody and would own the database's files",
            ));
        }
        Ok(Self {
            client: me.name,
            server: server.name,
            uid: server.uid,
            gid: server.gid,
            separate: true,
        })
    }

    /// Makes `command` run as the server's user, without our supplementary groups.
    pub(super) fn apply(&self, command: &mut Command) {
        if self.separate {
            command.uid(self.uid.as_raw()).gid(self.gid.as_raw());
        }
    }
}

fn lookup_id(uid: Uid) -> Result<User, EmbeddedError> {
    User::from_uid(uid).ok().flatten().ok_or(EmbeddedError::Nameless { uid: uid.as_raw() })
}

fn lookup_name(name: &str) -> Result<User, EmbeddedError> {
    User::from_name(name)
        .ok()
        .flatten()
        .ok_or_else(|| EmbeddedError::NoAccount { name: name.to_owned() })
}

/// The name is written into PostgreSQL's map of users, where quotes, slashes and the like mean something.
fn check_name(name: &str) -> Result<(), EmbeddedError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-@$".contains(c);
    if !name.is_empty() && name.chars().all(plain) {
        return Ok(());
    }
    let reason = "its name has characters that PostgreSQL's map of users treats specially";
    Err(EmbeddedError::BadAccount { name: name.to_owned(), reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, expected: bool) {
        assert_eq!(check_name(name).is_ok(), expected, "{name:?}");
    }

    #[test]
    fn names_that_the_map_would_misread_are_refused() {
        check("alice", true);
        check("build-user.1", true);
        check("/alice", false);
        check("al\"ice", false);
        check("al ice", false);
        check("", false);
    }

    #[test]
    fn the_database_never_runs_as_root() {
        let account = Account::choose(None).unwrap();
        assert!(!account.uid.is_root());
    }

    #[test]
    fn root_refuses_accounts_that_must_not_own_a_database() {
        if !Uid::effective().is_root() {
            // Only root changes users; for anybody else a configured account changes nothing.
            assert!(!Account::choose(Some(NOBODY)).unwrap().separate);
            return;
        }
        let refused = |name| Account::choose(Some(name)).unwrap_err().to_string();
        assert!(refused("root").contains("refuses to run as root"));
        assert!(refused(NOBODY).contains("sandboxed jobs"));
        assert!(refused("no-such-user").contains("useradd --system"));
    }
}
