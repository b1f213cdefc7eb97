//! What a worker keeps between its starts beside its jobs: its token, the configuration in force, its certificate.
//!
//! **Invariant:** a file is whole or not there, whatever instant the process died at, and only its owner reads it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The last answer to a registration: the token, and where everything is.
pub(super) const NODE: &str = "node.json";
/// The configuration in force.
pub(super) const CONFIG: &str = "config.json";
/// The certificate that the agent made for itself, with its key.
pub(super) const CERTIFICATE: &str = "certificate.json";
/// Bytes of one file.
const MAX_BYTES: u64 = 4 << 20;

/// A file that cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("could not {action} {path}")]
pub struct FileFailure {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The state directory.
#[derive(Debug, Clone)]
pub(super) struct Files {
    directory: PathBuf,
}

impl Files {
    pub(super) fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// What a file holds. One that cannot be read is as good as none: the server tells everything again.
    pub(super) fn load<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        let path = self.directory.join(name);
        let mut bytes = Vec::new();
        let read = File::open(&path).and_then(|file| file.take(MAX_BYTES).read_to_end(&mut bytes));
        match read {
            Err(err) if err.kind() == io::ErrorKind::NotFound => None,
            Err(err) => {
                tracing::error!(error = %err, "{} cannot be read and is ignored", path.display());
                None
            }
            Ok(_) => serde_json::from_slice(&bytes)
                .inspect_err(|err| {
                    // Where it is wrong, not what stands there.
                    let line = err.line();
                    tracing::error!(line, "{} is damaged and is ignored", path.display());
                })
                .ok(),
        }
    }

    /// Writes beside the file; [`Files::commit`] puts it in place.
    pub(super) fn stage(&self, name: &str, value: &impl Serialize) -> Result<(), FileFailure> {
        let path = self.staged(name);
        let store = || -> io::Result<()> {
            DirBuilder::new().recursive(true).mode(0o700).create(&self.directory)?;
            let text = serde_json::to_vec(value)?;
            // Made anew each time: the mode of one that somebody else has made would stay.
            match fs::remove_file(&path) {
                Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
                _ => {}
            }
            let mut file =
                OpenOptions::new().create_new(true).write(true).mode(0o600).open(&path)?;
            file.write_all(&text)?;
            file.sync_all()
        };
        store().map_err(|source| FileFailure { action: "write", path: path.clone(), source })
    }

    pub(super) fn commit(&self, name: &str) -> Result<(), FileFailure> {
        let path = self.directory.join(name);
        let renamed = fs::rename(self.staged(name), &path);
        renamed
            .and_then(|()| File::open(&self.directory)?.sync_all())
            .map_err(|source| FileFailure { action: "put in place", path, source })
    }

    pub(super) fn write(&self, name: &str, value: &impl Serialize) -> Result<(), FileFailure> {
        self.stage(name, value)?;
        self.commit(name)
    }

    pub(super) fn delete(&self, name: &str) -> Result<(), FileFailure> {
        let path = self.directory.join(name);
        match fs::remove_file(&path) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => {
                Err(FileFailure { action: "delete", path, source: err })
            }
            _ => Ok(()),
        }
    }

    fn staged(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.new"))
    }
}
