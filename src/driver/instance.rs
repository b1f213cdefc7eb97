//! Which installation a driver is: an id in the data directory, under a file lock.
//!
//! **Invariant:** two processes never use one id at once, so a later epoch of an id is a later life.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::str::FromStr;

use crate::ids::InstanceId;

/// An installation's id, held until it is dropped.
#[derive(Debug)]
pub struct Instance {
    /// The id.
    pub id: InstanceId,
    _lock: File,
}

/// Why the id cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// Another process has it.
    #[error(
        "another server uses the data directory {0}: stop it, or give this one a directory of its own with --data-dir"
    )]
    Taken(String),
    /// The file cannot be used.
    #[error("the file {path} cannot be used")]
    File {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl Instance {
    /// Takes the id of the installation in `data_dir`, making one at the first start.
    ///
    /// # Errors
    /// See [`InstanceError`].
    pub fn take(data_dir: &Path) -> Result<Self, InstanceError> {
        let path = data_dir.join("instance");
        let failed = |source| InstanceError::File { path: path.display().to_string(), source };
        std::fs::create_dir_all(data_dir).map_err(failed)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(InstanceError::Taken(data_dir.display().to_string()));
            }
            Err(TryLockError::Error(err)) => return Err(failed(err)),
        }
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(failed)?;
        let id = match InstanceId::from_str(text.trim()) {
            Ok(id) => id,
            Err(_) => {
                let id = InstanceId::new();
                file.rewind().map_err(failed)?;
                file.set_len(0).map_err(failed)?;
                writeln!(file, "{id}").and_then(|()| file.sync_all()).map_err(failed)?;
                id
            }
        };
        Ok(Self { id, _lock: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_installation_keeps_its_id_and_has_one_user_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = Instance::take(dir.path()).unwrap();
        assert!(matches!(Instance::take(dir.path()), Err(InstanceError::Taken(_))));
        let id = first.id;
        drop(first);
        assert_eq!(Instance::take(dir.path()).unwrap().id, id);
    }
}
