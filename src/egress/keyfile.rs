//! Master keys from the environment and from their file.
//!
//! The file holds one key a line, the newest first; empty lines and those that begin with `#` do not count.
//! It is refused when others may read it: a key that was readable must be thought known.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use super::vault::{KeyRing, MasterKey, NotAKey};
use crate::config::MasterKeys;

/// Bytes of a file of keys.
const MAX_BYTES: u64 = 64 << 10;
/// Keys of one ring.
const MAX_KEYS: usize = 100;

/// Why there are no master keys.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// A variable does not hold keys.
    #[error("CYNAI_MASTER_KEY or CYNAI_OLD_MASTER_KEYS cannot be used")]
    Environment(#[source] NotAKey),
    /// The file cannot be read or made.
    #[error("the master key file {path} cannot be used")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Others may read it.
    #[error(
        "the master key file {path} may be read or written by others (mode {mode:04o}): make a new key, then `chmod 600 {path}`"
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A line of it is no key.
    #[error("line {line} of the master key file {path} cannot be used")]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// Why.
        #[source]
        source: NotAKey,
    },
    /// It is too large.
    #[error("the master key file {path} has over {MAX_KEYS} keys or {MAX_BYTES} bytes")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// There is none.
    #[error(
        "there is no master key: set CYNAI_MASTER_KEY, or put one into {path} (`openssl rand -base64 32`, mode 0600)"
    )]
    None {
        /// Where it is looked for.
        path: PathBuf,
    },
}

/// Reads the master keys; makes the first one where that is asked for.
///
/// # Errors
/// See [`KeyFileError`].
pub fn load(from: &MasterKeys) -> Result<KeyRing, KeyFileError> {
    let mut keys = Vec::new();
    for text in &from.environment {
        keys.push(parse(text).map_err(KeyFileError::Environment)?);
    }
    let path = &from.file;
    match read(path) {
        Ok(more) => keys.extend(more),
        Err(KeyFileError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
            if from.make {
                let key = make(path)?;
                tracing::info!(path = %path.display(), key = %key.id(), "the master key {} was made and written to {}", key.id(), path.display());
                keys.push(key);
            }
        }
        Err(err) => return Err(err),
    }
    KeyRing::new(keys).ok_or_else(|| KeyFileError::None { path: path.clone() })
}

fn parse(text: &SecretString) -> Result<MasterKey, NotAKey> {
    MasterKey::parse(text.expose_secret())
}

fn read(path: &Path) -> Result<Vec<MasterKey>, KeyFileError> {
    let failed = |source| KeyFileError::Io { path: path.to_owned(), source };
    let too_large = || KeyFileError::TooLarge { path: path.to_owned() };
    let file = std::fs::File::open(path).map_err(failed)?;
    // Of the file that is open: another could be put in its place between two looks.
    let mode = file.metadata().map_err(failed)?.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Open { path: path.to_owned(), mode });
    }
    let mut text = Zeroizing::new(String::new());
    file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(too_large());
    }
    let mut keys = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let wrong = |source| KeyFileError::Line { path: path.to_owned(), line: number, source };
        keys.push(MasterKey::parse(line).map_err(wrong)?);
        if keys.len() > MAX_KEYS {
            return Err(too_large());
        }
    }
    Ok(keys)
}

/// Writes a new key so that nobody else can read it at any moment, and that a crash leaves all of it or nothing.
fn make(path: &Path) -> Result<MasterKey, KeyFileError> {
    let failed = |source| KeyFileError::Io { path: path.to_owned(), source };
    let key = MasterKey::random();
    let temporary = path.with_extension("key.new");
    match std::fs::remove_file(&temporary) {
        Err(err) if err.kind() != ErrorKind::NotFound => return Err(failed(err)),
        _ => {}
    }
    let written = || {
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(b"# Master keys of Cynai, the newest first. Without them the stored secrets are lost.\n")?;
        file.write_all(key.to_text().as_bytes())?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        // Not over a file that appeared meanwhile: its key may be in use.
        std::fs::hard_link(&temporary, path)?;
        std::fs::remove_file(&temporary)?;
        match path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            Some(folder) => std::fs::File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    };
    written().map_err(failed)?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn at(path: &Path) -> MasterKeys {
        MasterKeys { environment: Vec::new(), file: path.to_owned(), make: true }
    }

    #[test]
    fn the_first_start_makes_a_key_that_later_ones_find() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("master.key");
        let first = load(&at(&path)).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(load(&at(&path)).unwrap().newest(), first.newest());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_others_may_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("master.key");
        load(&at(&path)).unwrap();
        for mode in [0o640, 0o604, 0o660] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let err = load(&at(&path)).unwrap_err().to_string();
            assert!(err.contains("chmod 600"), "{err}");
        }
    }

    #[test]
    fn keys_of_the_environment_come_first_and_none_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("master.key");
        let in_file = load(&at(&path)).unwrap().newest().clone();
        let key = MasterKey::random();
        let environment = vec![SecretString::from(key.to_text().as_str())];
        let ring = load(&MasterKeys { environment, make: false, ..at(&path) }).unwrap();
        assert_eq!(ring.ids().collect::<Vec<_>>(), [key.id(), &in_file]);
        let wrong = vec![SecretString::from("not-a-key-but-secret")];
        let err = load(&MasterKeys { environment: wrong, ..at(&path) }).unwrap_err();
        assert!(!format!("{err:?}{err}").contains("not-a-key"), "{err:?}");
        std::fs::write(&path, "# comment\n\nnonsense-but-secret\n").unwrap();
        let err = load(&at(&path)).unwrap_err();
        assert!(err.to_string().starts_with("line 3 "), "{err}");
        assert!(!format!("{err:?}{err}").contains("nonsense"), "{err:?}");
        let missing = dir.path().join("no.key");
        let err = load(&MasterKeys { make: false, ..at(&missing) }).unwrap_err();
        assert!(matches!(err, KeyFileError::None { .. }), "{err}");
    }
}
