//! Where the embedded database's files lie, who owns them, and the lock that guards them.
//!
//! ```text
//! DATA_DIR/                 ours, other users may at most pass through
//!   postgres/               ours
//!     lock                  locked while a cynai server owns this database; holds its process id
//!     hba.conf  ident.conf  who may connect: written at every start
//!     log  log.1            the server's own log
//!     socket-dir            where the socket is, when DATA_DIR is too long for one
//!     socket/               the server's user's, mode 0700
//!     cluster/              the server's user's, mode 0700
//!     new-*/                a cluster in the making; renamed to cluster/ when it is complete
//! ```
//!
//! **Invariant:** as root we write no file inside a directory that the server's user owns, so that a
//! link planted there leads us nowhere.
//! **Invariant:** `cluster/` exists only complete.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};

use nix::unistd::Uid;

use super::account::Account;
use super::error::EmbeddedError;

/// A socket's address holds 107 bytes; `/.s.PGSQL.5432` and a margin for the lock file leave this.
const SOCKET_DIR_BYTES: usize = 88;
/// The log is set aside at a start when it is longer than this.
const LOG_ROTATE_BYTES: u64 = 1 << 20;
/// More of a small file than we ever wrote into it.
const SMALL_FILE_BYTES: u64 = 64 << 10;

/// The paths of one embedded database.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) data_dir: PathBuf,
    base: PathBuf,
}

impl Layout {
    /// Makes the directories that are ours.
    pub(super) fn prepare(data_dir: &Path, account: &Account) -> Result<Self, EmbeddedError> {
        let mode = if account.separate { 0o711 } else { 0o700 };
        make_dir(data_dir, mode)?;
        let data_dir =
            data_dir.canonicalize().map_err(EmbeddedError::files("resolve", data_dir))?;
        if data_dir.to_str().is_none_or(|text| text.chars().any(char::is_control)) {
            // It becomes an argument of PostgreSQL's, and part of files that PostgreSQL writes.
            let source = std::io::Error::new(
                std::io::ErrorKind::InvalidFilename,
                "its path is not printable UTF-8",
            );
            return Err(EmbeddedError::Files { action: "use", path: data_dir, source });
        }
        let base = data_dir.join("postgres");
        make_dir(&base, mode)?;
        check_owner(&base)?;
        if account.separate {
            for dir in [&data_dir, &base] {
                let_pass(dir)?;
            }
        }
        Ok(Self { data_dir, base })
    }

    pub(super) fn base(&self) -> &Path {
        &self.base
    }

    pub(super) fn cluster(&self) -> PathBuf {
        self.base.join("cluster")
    }

    pub(super) fn log(&self) -> PathBuf {
        self.base.join("log")
    }

    pub(super) fn hba_file(&self) -> PathBuf {
        self.base.join("hba.conf")
    }

    pub(super) fn ident_file(&self) -> PathBuf {
        self.base.join("ident.conf")
    }

    /// Takes the lock on this database; it lasts as long as the returned file is open.
    pub(super) fn lock(&self) -> Result<File, EmbeddedError> {
        let path = self.base.join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(EmbeddedError::files("open", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                // Unreadable only costs the message its number.
                let _ = (&mut file).take(20).read_to_string(&mut pid);
                let pid = if pid.trim().is_empty() { "unknown" } else { pid.trim() }.to_owned();
                return Err(EmbeddedError::InUse { data_dir: self.data_dir.clone(), pid });
            }
            Err(TryLockError::Error(source)) => {
                return Err(EmbeddedError::Files { action: "lock", path, source });
            }
        }
        file.set_len(0)
            .and_then(|()| file.write_all(format!("{}\n", std::process::id()).as_bytes()))
            .map_err(EmbeddedError::files("write", &path))?;
        Ok(file)
    }

    /// The major version that made the cluster; none when there is no cluster yet.
    pub(super) fn made_by(&self, account: &Account) -> Result<Option<String>, EmbeddedError> {
        let cluster = self.cluster();
        let Ok(found) = fs::symlink_metadata(&cluster) else { return Ok(None) };
        if found.uid() != account.uid.as_raw() {
            return Err(EmbeddedError::OtherOwner {
                dir: cluster,
                owner: found.uid(),
                account: account.server.clone(),
            });
        }
        let path = cluster.join("PG_VERSION");
        let version = read_small(&path).map_err(EmbeddedError::files("read", &path))?;
        Ok(Some(version.trim().to_owned()))
    }

    /// An empty directory of the server's user, where a cluster may be made.
    pub(super) fn new_cluster(&self, account: &Account) -> Result<PathBuf, EmbeddedError> {
        self.remove_half_made();
        let dir = self.base.join(format!("new-{:016x}", rand::random::<u64>()));
        make_private(&dir, account)?;
        Ok(dir)
    }

    /// Gives a complete cluster its name, durably.
    pub(super) fn adopt_cluster(&self, made: &Path) -> Result<(), EmbeddedError> {
        let cluster = self.cluster();
        fs::rename(made, &cluster)
            .and_then(|()| File::open(&self.base)?.sync_all())
            .map_err(EmbeddedError::files("create", &cluster))
    }

    /// Removes clusters whose making was cut short. What cannot be removed (its maker may still be
    /// ending) is tried again at the next start.
    pub(super) fn remove_half_made(&self) {
        let Ok(entries) = fs::read_dir(&self.base) else { return };
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with("new-")
                && let Err(err) = fs::remove_dir_all(entry.path())
            {
                let path = entry.path();
                tracing::warn!(error = %err, "could not remove the unfinished {}", path.display());
            }
        }
    }

    /// Writes who may connect: only our own user, by the kernel's word, as the application's role or
    /// as the database's administrator.
    pub(super) fn write_access_rules(
        &self,
        account: &Account,
        roles: &[&str],
    ) -> Result<(), EmbeddedError> {
        let hba = "# Written by cynai at every start.\n\
                   local all         all peer map=cynai\n\
                   local replication all peer map=cynai\n";
        let mut ident = String::from("# Written by cynai at every start.\n");
        for role in roles {
            ident.push_str(&format!("cynai \"{}\" {role}\n", account.client));
        }
        write_readable(&self.hba_file(), hba)?;
        write_readable(&self.ident_file(), &ident)
    }

    /// The directory for the server's socket: in the data directory, or, when that path is too long or
    /// has characters that PostgreSQL would split it at, a fresh one with a name that nobody can guess.
    pub(super) fn socket_dir(&self, account: &Account) -> Result<PathBuf, EmbeddedError> {
        let near = self.base.join("socket");
        if fits(&near) {
            make_private(&near, account)?;
            return Ok(near);
        }
        let record = self.base.join("socket-dir");
        if let Ok(recorded) = read_small(&record) {
            let recorded = PathBuf::from(recorded.trim_end());
            if fits(&recorded) && is_private(&recorded, account) {
                return Ok(recorded);
            }
        }
        let dir = make_short_dir(account)?;
        write_readable(&record, &format!("{}\n", dir.display()))?;
        Ok(dir)
    }

    /// Opens the server's log for appending, set aside first when it has grown long.
    pub(super) fn open_log(&self) -> Result<File, EmbeddedError> {
        let path = self.log();
        if fs::metadata(&path).is_ok_and(|found| found.len() > LOG_ROTATE_BYTES) {
            let old = self.base.join("log.1");
            fs::rename(&path, &old).map_err(EmbeddedError::files("rename", &path))?;
        }
        OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .map_err(EmbeddedError::files("open", &path))
    }
}

/// Reads a file that is small or not ours to trust.
pub(super) fn read_small(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(SMALL_FILE_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

fn make_dir(dir: &Path, mode: u32) -> Result<(), EmbeddedError> {
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(dir)
        .map_err(EmbeddedError::files("create", dir))
}

/// Nobody else may own what we write into, and lock, and trust the content of.
fn check_owner(dir: &Path) -> Result<(), EmbeddedError> {
    let found = fs::symlink_metadata(dir).map_err(EmbeddedError::files("look at", dir))?;
    let me = Uid::effective();
    if !found.is_dir() || found.uid() != me.as_raw() {
        let (dir, account) = (dir.to_owned(), format!("user id {me}"));
        return Err(EmbeddedError::OtherOwner { dir, owner: found.uid(), account });
    }
    Ok(())
}

/// Lets the server's user pass through a directory of ours, without letting it list what is there.
fn let_pass(dir: &Path) -> Result<(), EmbeddedError> {
    let failed = |source| EmbeddedError::Files {
        action: "change the mode of",
        path: dir.to_owned(),
        source,
    };
    let mode = fs::metadata(dir).map_err(failed)?.permissions().mode();
    if mode & 0o001 == 0 {
        fs::set_permissions(dir, Permissions::from_mode(mode | 0o001)).map_err(failed)?;
    }
    Ok(())
}

/// Makes `dir`, or accepts the one that is there, if it is a directory of the server's user alone.
fn make_private(dir: &Path, account: &Account) -> Result<(), EmbeddedError> {
    if is_private(dir, account) {
        return Ok(());
    }
    let failed = |source| EmbeddedError::Files { action: "create", path: dir.to_owned(), source };
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(err) if err.kind() != std::io::ErrorKind::AlreadyExists => return Err(failed(err)),
        _ => {}
    }
    // A left-over with another owner (the server's user was changed) is put right, a link is not.
    if !fs::symlink_metadata(dir).map_err(failed)?.is_dir() {
        return Err(failed(std::io::Error::from(std::io::ErrorKind::NotADirectory)));
    }
    if account.separate {
        lchown(dir, Some(account.uid.as_raw()), Some(account.gid.as_raw())).map_err(failed)?;
    }
    fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(failed)
}

fn is_private(dir: &Path, account: &Account) -> bool {
    fs::symlink_metadata(dir).is_ok_and(|found| {
        found.is_dir() && found.uid() == account.uid.as_raw() && found.mode() & 0o077 == 0
    })
}

/// Whether PostgreSQL takes this path as one socket directory and the address fits.
fn fits(dir: &Path) -> bool {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._-+@=".contains(byte);
    let bytes = dir.as_os_str().as_encoded_bytes();
    bytes.len() <= SOCKET_DIR_BYTES && bytes.iter().all(plain)
}

/// A new directory in a place that is short. Its name is random and creating it fails if it exists, so
/// nobody can lay one out for us.
fn make_short_dir(account: &Account) -> Result<PathBuf, EmbeddedError> {
    let user_dir = format!("/run/user/{}", account.uid);
    let places = if account.separate { ["/run", "/tmp"] } else { [user_dir.as_str(), "/tmp"] };
    let name = format!("cynai-{:016x}", rand::random::<u64>());
    let mut last = None;
    for place in places {
        let dir = Path::new(place).join(&name);
        let made = DirBuilder::new().mode(0o700).create(&dir).and_then(|()| {
            if account.separate {
                lchown(&dir, Some(account.uid.as_raw()), Some(account.gid.as_raw()))?;
            }
            Ok(())
        });
        match made {
            Ok(()) => return Ok(dir),
            Err(source) => {
                last = Some(EmbeddedError::Files { action: "create", path: dir, source })
            }
        }
    }
    Err(last.expect("there are two places"))
}

/// Replaces a file that the server's user reads, so that a reader sees the old or the new one, whole.
fn write_readable(path: &Path, text: &str) -> Result<(), EmbeddedError> {
    let failed = |source| EmbeddedError::Files { action: "write", path: path.to_owned(), source };
    let draft = path.with_extension("draft");
    fs::write(&draft, text)
        .and_then(|()| fs::set_permissions(&draft, Permissions::from_mode(0o644)))
        .and_then(|()| fs::rename(&draft, path))
        .map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(dir: &Path) -> (Layout, Account) {
        let account = Account::choose(None).unwrap();
        (Layout::prepare(dir, &account).unwrap(), account)
    }

    fn check(path: &str, expected: bool) {
        assert_eq!(fits(Path::new(path)), expected, "{path}");
    }

    #[test]
    fn socket_paths_that_postgres_would_misread_or_cut_do_not_fit() {
        check("/var/lib/cynai/postgres/socket", true);
        check(&format!("/{}", "x".repeat(87)), true);
        check(&format!("/{}", "x".repeat(88)), false);
        check("/srv/a,b/socket", false);
        check("/srv/my data/socket", false);
    }

    #[test]
    fn second_lock_on_one_directory_names_the_first_process() {
        let dir = tempfile::tempdir().unwrap();
        let (layout, _) = layout(dir.path());
        let held = layout.lock().unwrap();
        let err = layout.lock().unwrap_err().to_string();
        assert!(err.contains(&format!("process {}", std::process::id())), "{err}");
        drop(held);
        layout.lock().unwrap();
    }

    #[test]
    fn half_made_clusters_are_removed_and_never_used() {
        let dir = tempfile::tempdir().unwrap();
        let (layout, account) = layout(dir.path());
        let half = layout.new_cluster(&account).unwrap();
        fs::write(half.join("PG_VERSION"), "15\n").unwrap();
        assert_eq!(layout.made_by(&account).unwrap(), None);
        layout.remove_half_made();
        assert!(!half.exists());
    }

    #[test]
    fn a_long_data_directory_gets_a_short_private_socket_directory_once() {
        let dir = tempfile::tempdir().unwrap();
        let (layout, account) = layout(&dir.path().join("d".repeat(120)));
        let first = layout.socket_dir(&account).unwrap();
        assert!(fits(&first) && is_private(&first, &account), "{}", first.display());
        assert_eq!(layout.socket_dir(&account).unwrap(), first);
        // Opened up, or gone: a new one, with another name.
        fs::set_permissions(&first, Permissions::from_mode(0o777)).unwrap();
        let second = layout.socket_dir(&account).unwrap();
        assert_ne!(second, first);
        fs::remove_dir(&first).unwrap();
        fs::remove_dir(&second).unwrap();
    }

    #[test]
    fn a_link_in_place_of_the_socket_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (layout, account) = layout(dir.path());
        std::os::unix::fs::symlink("/etc", layout.base().join("socket")).unwrap();
        let err = layout.socket_dir(&account).unwrap_err().to_string();
        assert!(err.contains("socket"), "{err}");
    }

    #[test]
    fn a_link_in_place_of_our_own_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/tmp", dir.path().join("postgres")).unwrap();
        let account = Account::choose(None).unwrap();
        let err = Layout::prepare(dir.path(), &account).unwrap_err().to_string();
        assert!(err.contains("postgres belongs to"), "{err}");
    }

    #[test]
    fn a_long_log_is_set_aside_at_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        let (layout, _) = layout(dir.path());
        let bytes = usize::try_from(LOG_ROTATE_BYTES).unwrap() + 1;
        fs::write(layout.log(), vec![b'x'; bytes]).unwrap();
        layout.open_log().unwrap();
        assert_eq!(fs::metadata(layout.log()).unwrap().len(), 0);
        assert_eq!(fs::metadata(layout.base().join("log.1")).unwrap().len(), LOG_ROTATE_BYTES + 1);
    }
}
