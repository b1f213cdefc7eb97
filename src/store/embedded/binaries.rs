//! Which PostgreSQL programs run the embedded database.
//!
//! Cynai ships no database: it uses the machine's own. The order is: the directory that a person named,
//! the newest of Debian's versioned directories, then `PATH`. An existing cluster narrows the second
//! step to the version that made it, so that installing a newer PostgreSQL beside it changes nothing.
//!
//! **Invariant:** a directory that a person named is used or refused, never silently passed over.

use std::path::{Path, PathBuf};

use tokio::process::Command;

use super::error::EmbeddedError;
use super::run;

/// The oldest major version that Cynai's SQL runs on.
pub const OLDEST: u32 = 15;

const PACKAGED: &str = "/usr/lib/postgresql";

/// Where to look for `initdb` and `postgres`.
#[derive(Debug, Clone)]
pub struct BinarySearch {
    /// The directory that the configuration names; nothing else is looked at when it is set.
    pub configured: Option<PathBuf>,
    /// The folder with one `VERSION/bin` for each installed major version.
    pub packaged: PathBuf,
    /// The directories of `PATH`.
    pub path: Vec<PathBuf>,
}

impl Default for BinarySearch {
    fn default() -> Self {
        Self { configured: None, packaged: PathBuf::from(PACKAGED), path: Vec::new() }
    }
}

/// The programs of one installed PostgreSQL.
#[derive(Debug, Clone)]
pub(super) struct Binaries {
    dir: PathBuf,
    pub(super) major: u32,
}

impl Binaries {
    /// Finds the programs, and checks their version against ours and against `made_by`, the version
    /// that made the cluster if there is one.
    pub(super) async fn find(
        search: &BinarySearch,
        cluster: &Path,
        made_by: Option<&str>,
    ) -> Result<Self, EmbeddedError> {
        let dir = locate(search, made_by)?;
        let program = dir.join("postgres");
        let major = major_version(&program).await?;
        if major < OLDEST {
            return Err(EmbeddedError::TooOld { program, found: major, needed: OLDEST });
        }
        match made_by {
            Some(made_by) if made_by != major.to_string() => Err(EmbeddedError::OtherVersion {
                cluster: cluster.to_owned(),
                made_by: made_by.to_owned(),
                program,
                found: major,
            }),
            _ => Ok(Self { dir, major }),
        }
    }

    pub(super) fn initdb(&self) -> PathBuf {
        self.dir.join("initdb")
    }

    pub(super) fn postgres(&self) -> PathBuf {
        self.dir.join("postgres")
    }
}

fn locate(search: &BinarySearch, made_by: Option<&str>) -> Result<PathBuf, EmbeddedError> {
    if let Some(dir) = &search.configured {
        return if complete(dir) {
            Ok(dir.clone())
        } else {
            Err(EmbeddedError::NoBinaries { searched: dir.display().to_string() })
        };
    }
    let mut packaged = packaged(&search.packaged);
    let matching =
        packaged.iter().position(|(major, _)| Some(major.to_string().as_str()) == made_by);
    let newest = packaged.len().checked_sub(1);
    if let Some(at) = matching.or(newest) {
        return Ok(packaged.swap_remove(at).1);
    }
    search.path.iter().find(|dir| complete(dir)).cloned().ok_or_else(|| EmbeddedError::NoBinaries {
        searched: format!("{}/*/bin or PATH", search.packaged.display()),
    })
}

/// The versioned directories that hold a server, oldest first.
fn packaged(root: &Path) -> Vec<(u32, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(root) else { return Vec::new() };
    let mut found: Vec<(u32, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| {
            Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin")))
        })
        .filter(|(_, dir)| complete(dir))
        .collect();
    found.sort();
    found
}

fn complete(dir: &Path) -> bool {
    ["initdb", "postgres"].iter().all(|name| dir.join(name).is_file())
}

async fn major_version(program: &Path) -> Result<u32, EmbeddedError> {
    let mut command = Command::new(program);
    command.arg("--version").env_clear();
    let output = run::finish(command, program, run::QUICK).await?;
    let answer: String = String::from_utf8_lossy(&output.stdout).trim().chars().take(80).collect();
    parse_version(&answer)
        .ok_or_else(|| EmbeddedError::NotPostgres { program: program.to_owned(), answer })
}

/// The major version in a line such as `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`, also of
/// a beta (`19beta1`).
fn parse_version(answer: &str) -> Option<u32> {
    let version = answer.split_once("(PostgreSQL)")?.1.trim_start();
    let end = version.find(|c: char| !c.is_ascii_digit()).unwrap_or(version.len());
    version[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn check(answer: &str, expected: Option<u32>) {
        assert_eq!(parse_version(answer), expected, "{answer}");
    }

    #[test]
    fn major_version_is_read_from_every_known_form() {
        check("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)", Some(15));
        check("postgres (PostgreSQL) 9.6.24", Some(9));
        check("postgres (PostgreSQL) 19beta1", Some(19));
        check("postgres (PostgreSQL) ", None);
        check("mysqld 8.0", None);
        check("", None);
    }

    fn fake(dir: &Path, version: &str) {
        std::fs::create_dir_all(dir).unwrap();
        for name in ["initdb", "postgres"] {
            let path = dir.join(name);
            std::fs::write(&path, format!("#!/bin/sh\necho '{version}'\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
    }

    fn empty_search(root: &Path) -> BinarySearch {
        BinarySearch { configured: None, packaged: root.join("none"), path: Vec::new() }
    }

    #[tokio::test]
    async fn missing_binaries_are_reported_with_the_package_to_install() {
        let root = tempfile::tempdir().unwrap();
        let err = Binaries::find(&empty_search(root.path()), root.path(), None).await.unwrap_err();
        assert!(err.to_string().contains("apt-get install postgresql"), "{err}");
    }

    #[tokio::test]
    async fn a_configured_directory_without_a_server_is_refused_even_when_another_exists() {
        let root = tempfile::tempdir().unwrap();
        fake(&root.path().join("pg/17/bin"), "postgres (PostgreSQL) 17.2");
        let search = BinarySearch {
            configured: Some(root.path().join("nowhere")),
            packaged: root.path().join("pg"),
            path: Vec::new(),
        };
        let err = Binaries::find(&search, root.path(), None).await.unwrap_err();
        assert!(err.to_string().contains("nowhere"), "{err}");
    }

    #[tokio::test]
    async fn an_old_server_is_refused_with_both_versions() {
        let root = tempfile::tempdir().unwrap();
        fake(&root.path().join("old"), "postgres (PostgreSQL) 14.9");
        let mut search = empty_search(root.path());
        search.path.push(root.path().join("old"));
        let err = Binaries::find(&search, root.path(), None).await.unwrap_err();
        assert!(matches!(err, EmbeddedError::TooOld { found: 14, needed: 15, .. }), "{err}");
    }

    #[tokio::test]
    async fn newest_version_is_taken_by_number_unless_a_cluster_asks_for_another() {
        let root = tempfile::tempdir().unwrap();
        for major in ["9", "15", "17"] {
            let version = format!("postgres (PostgreSQL) {major}.1");
            fake(&root.path().join("pg").join(major).join("bin"), &version);
        }
        let mut search = empty_search(root.path());
        search.packaged = root.path().join("pg");
        let found = async |made_by| {
            Binaries::find(&search, root.path(), made_by).await.map(|binaries| binaries.major)
        };
        assert_eq!(found(None).await.unwrap(), 17);
        assert_eq!(found(Some("15")).await.unwrap(), 15);
        let err = found(Some("16")).await.unwrap_err();
        assert!(err.to_string().contains("apt-get install postgresql-16"), "{err}");
    }

    #[tokio::test]
    async fn a_program_that_is_not_postgres_is_refused_with_its_answer() {
        let root = tempfile::tempdir().unwrap();
        fake(&root.path().join("bin"), "hello");
        let mut search = empty_search(root.path());
        search.path.push(root.path().join("bin"));
        let err = Binaries::find(&search, root.path(), None).await.unwrap_err();
        assert!(err.to_string().contains("\"hello\""), "{err}");
    }
}
