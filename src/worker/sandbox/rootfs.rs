//! What a sandbox sees as its root: the parts of an image, or of the host's `/usr` for the base image.
//!
//! The root itself is an empty filesystem in memory; each top-level entry of an image is bound into it
//! read-only, so that `/workspace`, `/tmp` and `/data` exist whatever the image holds.
//!
//! **Invariant:** of the host, the base image shows `/usr`, the links into it, and files of `/etc` that
//! programs need to find their libraries. Accounts, keys and settings of the host are not among them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The user that a job is inside its sandbox.
pub(super) const JOB_UID: u32 = 1000;

/// Directories that programs expect at the root although they live in `/usr` nowadays.
const USR_MERGED: [&str; 6] = ["bin", "sbin", "lib", "lib32", "lib64", "libx32"];

/// What a sandbox provides itself, whatever an image holds under these names.
const OWN: [&str; 9] =
    ["data", "dev", "lost+found", "proc", "root", "sys", "tmp", "workspace", "run"];

/// Of the host's `/etc`, for the base image only: where libraries and alternative programs are.
const BASE_ETC: [&str; 3] = ["/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"];

/// Files of `/etc` that the base image gets instead of the host's.
pub(super) const MADE_ETC: [(&str, &str); 4] = [
    (
        "/etc/passwd",
        "root:x:0:0:root:/:/usr/sbin/nologin\n\
         job:x:1000:1000:job:/workspace:/bin/sh\n\
         nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
    ),
    ("/etc/group", "root:x:0:\njob:x:1000:\nnogroup:x:65534:\n"),
    ("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
    ("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n"),
];

/// One entry of a sandbox's root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Entry {
    /// A directory or file of the host, bound read-only.
    Bind {
        source: PathBuf,
        target: String,
    },
    Symlink {
        link: PathBuf,
        target: String,
    },
    /// A file that the agent writes.
    File {
        text: &'static str,
        target: &'static str,
    },
    Directory {
        target: &'static str,
    },
}

/// The root of the base image.
pub(super) fn base() -> Vec<Entry> {
    let bind = |path: &str| Entry::Bind { source: PathBuf::from(path), target: path.to_owned() };
    let mut entries = vec![bind("/usr")];
    for name in USR_MERGED {
        let path = format!("/{name}");
        match fs::read_link(&path) {
            Ok(link) => entries.push(Entry::Symlink { link, target: path }),
            Err(_) if Path::new(&path).is_dir() => entries.push(bind(&path)),
            Err(_) => {}
        }
    }
    entries.push(Entry::Directory { target: "/etc" });
    entries.extend(BASE_ETC.into_iter().filter(|path| Path::new(path).exists()).map(bind));
    entries.extend(MADE_ETC.map(|(target, text)| Entry::File { text, target }));
    entries
}

/// The root of an image that lies in `directory`, which the sandbox reaches as `seen_as`.
pub(super) fn image(directory: &Path, seen_as: &Path) -> io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for item in fs::read_dir(directory)? {
        let item = item?;
        let Ok(name) = item.file_name().into_string() else { continue };
        if OWN.contains(&name.as_str()) {
            continue;
        }
        let target = format!("/{name}");
        entries.push(match fs::read_link(item.path()) {
            Ok(link) => Entry::Symlink { link, target },
            Err(_) => Entry::Bind { source: seen_as.join(name), target },
        });
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_image_shows_usr_and_no_accounts_of_the_host() {
        let entries = base();
        let sources: Vec<String> = entries
            .iter()
            .filter_map(|entry| match entry {
                Entry::Bind { source, .. } => Some(source.display().to_string()),
                _ => None,
            })
            .collect();
        assert!(sources.contains(&"/usr".to_owned()), "{sources:?}");
        assert!(
            !sources
                .iter()
                .any(|s| ["/etc", "/etc/passwd", "/home", "/root"].contains(&s.as_str()))
        );
    }

    #[test]
    fn an_images_own_proc_and_tmp_are_left_out_and_links_stay_links() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["usr", "proc", "tmp", "opt"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        std::os::unix::fs::symlink("usr/bin", dir.path().join("bin")).unwrap();
        let mut entries = image(dir.path(), Path::new("/staged")).unwrap();
        entries.sort_by_key(|entry| format!("{entry:?}"));
        let bind = |name: &str| Entry::Bind {
            source: Path::new("/staged").join(name),
            target: format!("/{name}"),
        };
        let link = Entry::Symlink { link: "usr/bin".into(), target: "/bin".into() };
        assert_eq!(entries, [bind("opt"), bind("usr"), link]);
    }
}
