//! The one thread that starts sandboxes.
//!
//! A thread of its own, for three reasons. The kernel ties "die with your parent" to the *thread* that
//! spawned, so that thread must live as long as the driver. Descriptors are passed to bubblewrap by
//! number, so no other spawn may happen while they are inheritable. And as root the thread has a mount
//! namespace of its own, in which the configured directories are bound to places that the sandbox's
//! user can reach, however private the directories above the originals are.
//!
//! **Invariant:** a sandbox inherits no descriptor but its three standard streams.
//! **Invariant:** when the driver is dropped, or the process dies, the kernel kills every command. A
//! sandbox that was just being made may be left waiting for its dead parent, before it has run anything;
//! the next agent on the same state directory ends it.

use std::fs::{self, File};
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl, open};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::Mode;
use tokio::net::unix::pipe::Receiver;
use tokio::process::{Child, Command};
use tokio::sync::oneshot;

/// Where programs of the host are found; the agent's own environment plays no part.
const HOST_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Directories that every Linux has; one of them becomes the staging place, for this thread alone.
const STAGING: [&str; 4] = ["/mnt", "/run", "/srv", "/tmp"];

/// One sandbox to be started.
#[derive(Debug, Default)]
pub(super) struct Launch {
    /// Groups that the process joins before it gives up root.
    pub(super) entrances: Vec<PathBuf>,
    /// Shell commands for limits that are set before the sandbox exists. Numbers only, no user's text.
    pub(super) limits: String,
    /// The user to become; without it the agent's own.
    pub(super) uid: Option<u32>,
    pub(super) bwrap: PathBuf,
    /// Options that may be seen in the process table.
    pub(super) marker: Vec<String>,
    /// Options that are passed out of sight.
    pub(super) options: Vec<String>,
    /// Text and target of files that are made after `options` and before `last`.
    pub(super) files: Vec<(&'static str, &'static str)>,
    pub(super) last: Vec<String>,
    pub(super) command: Vec<String>,
}

/// A started sandbox program and the pipe on which it reports.
#[derive(Debug)]
pub(super) struct Launched {
    pub(super) child: Child,
    pub(super) status: Receiver,
}

type Request = (Launch, oneshot::Sender<io::Result<Launched>>);

/// Owns the thread.
#[derive(Debug)]
pub(super) struct Spawner {
    requests: Option<mpsc::Sender<Request>>,
    thread: Option<JoinHandle<()>>,
    staged: Vec<PathBuf>,
}

impl Spawner {
    /// Starts the thread. `sources` are the directories that sandboxes will be shown.
    pub(super) fn start(sources: Vec<PathBuf>, change_user: bool) -> io::Result<Self> {
        let runtime = tokio::runtime::Handle::current();
        let (requests, inbox) = mpsc::channel::<Request>();
        let (ready, staged) = mpsc::channel();
        let thread = std::thread::Builder::new().name("sandboxes".into()).spawn(move || {
            let staged = if change_user { stage(&sources) } else { Ok(sources.clone()) };
            let _ = ready.send(staged.unwrap_or_else(|err| {
                tracing::info!(error = %err, "no mount namespace: configured directories are used in place");
                sources
            }));
            let _context = runtime.enter();
            for (launch, answer) in inbox {
                let _ = answer.send(start(&launch));
            }
        })?;
        let staged = staged.recv().map_err(io::Error::other)?;
        Ok(Self { requests: Some(requests), thread: Some(thread), staged })
    }

    /// How sandboxes reach the source with this index.
    pub(super) fn seen_as(&self, index: usize) -> Option<&Path> {
        self.staged.get(index).map(PathBuf::as_path)
    }

    pub(super) async fn launch(&self, launch: Launch) -> io::Result<Launched> {
        let (answer, launched) = oneshot::channel();
        let gone = || io::Error::other("the sandbox thread has ended");
        self.requests.as_ref().ok_or_else(gone)?.send((launch, answer)).map_err(|_| gone())?;
        launched.await.map_err(|_| gone())?
    }
}

impl Drop for Spawner {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Binds each source to a place that anybody can reach, in a mount namespace of this thread alone.
fn stage(sources: &[PathBuf]) -> io::Result<Vec<PathBuf>> {
    if sources.is_empty() {
        return Ok(Vec::new());
    }
    let no_path = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(no_path, "/", no_path, MsFlags::MS_SLAVE | MsFlags::MS_REC, no_path)?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let opened: Vec<OwnedFd> = sources
        .iter()
        .map(|source| open(source, flags, Mode::empty()))
        .collect::<Result<_, _>>()?;
    let place = STAGING.iter().map(Path::new).find(|place| place.is_dir());
    let place = place.ok_or_else(|| io::Error::other("no directory to stage in"))?;
    mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::MS_NOSUID, Some("mode=0755,size=1m"))?;
    let mut staged = Vec::new();
    for (index, source) in opened.iter().enumerate() {
        let target = place.join(index.to_string());
        fs::create_dir(&target)?;
        let source = format!("/proc/thread-self/fd/{}", source.as_raw_fd());
        mount(
            Some(source.as_str()),
            &target,
            no_path,
            MsFlags::MS_BIND | MsFlags::MS_REC,
            no_path,
        )?;
        staged.push(target);
    }
    Ok(staged)
}

/// Joins the groups, gives up what is not needed, and becomes the sandbox program.
fn script(limits: &str) -> String {
    format!(
        "while [ \"$1\" != -- ]; do echo 0 >\"$1\" || exit 125; shift; done; shift; \
         echo 500 >/proc/self/oom_score_adj; ulimit -c 0; {limits} exec \"$@\""
    )
}

/// Held while descriptors are inheritable: a process may hold several drivers, as tests do.
static INHERITABLE: Mutex<()> = Mutex::new(());

fn start(launch: &Launch) -> io::Result<Launched> {
    let _alone = INHERITABLE.lock().unwrap_or_else(PoisonError::into_inner);
    // Dropped at the end of this function, when the child has its copies.
    let mut inherited: Vec<OwnedFd> = Vec::new();
    let mut options = launch.options.clone();
    for (text, target) in &launch.files {
        let file = inheritable(text.as_bytes())?;
        options.extend(["--ro-bind-data".into(), file.as_raw_fd().to_string(), (*target).into()]);
        inherited.push(file);
    }
    options.extend(launch.last.iter().cloned());
    let arguments = inheritable(nul_separated(&options)?.as_bytes())?;
    let (status, reports) = io::pipe()?;
    fcntl(reports.as_fd(), FcntlArg::F_SETFD(FdFlag::empty()))?;

    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(script(&launch.limits)).arg("cynai-sandbox");
    command.args(&launch.entrances).arg("--");
    if let Some(uid) = launch.uid {
        let id = uid.to_string();
        command.args([
            "setpriv",
            "--reuid",
            &id,
            "--regid",
            &id,
            "--clear-groups",
            "--inh-caps=-all",
        ]);
        command.arg("--");
    }
    command.arg(&launch.bwrap).args(&launch.marker);
    command.args(["--args", &arguments.as_raw_fd().to_string()]);
    command.args(["--json-status-fd", &reports.as_raw_fd().to_string()]);
    command.arg("--").args(&launch.command);
    command.env_clear().env("PATH", HOST_PATH).current_dir("/").process_group(0).kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn()?;
    Ok(Launched { child, status: Receiver::from_owned_fd(status.into())? })
}

/// A file in memory that a child inherits.
fn inheritable(content: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create("cynai", MFdFlags::empty())?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file.into())
}

/// The wire refuses NUL long before; here it would be an injected option.
fn nul_separated(options: &[String]) -> io::Result<String> {
    if options.iter().any(|option| option.contains('\0')) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "an option contains NUL"));
    }
    Ok(options.iter().fold(String::new(), |all, option| all + option + "\0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_with_nul_in_it_is_refused() {
        assert_eq!(nul_separated(&["a".into(), "b c".into()]).unwrap(), "a\0b c\0");
        assert!(nul_separated(&["x\0--bind".into()]).is_err());
    }
}
