//! A tool server as a process: how it is started, watched and ended, with everything that it started.
//!
//! Between us and the program stands a shell of a few lines, the leader of a process group of its own. The
//! kernel sends it a signal when we die, however we die, and it kills the group. A program that reads its
//! standard input notices by itself; this is for those that do not, and for their children.
//!
//! The kernel looks at the thread that made the process, not at the process: so all are made by one
//! thread, which lives as long as we do.
//!
//! **Invariant:** a program's environment holds what its configuration names, PATH, HOME and LANG; nothing
//! of ours.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use secrecy::{ExposeSecret, SecretString};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::oneshot;

use super::error::quoted;
use super::keys::Redactor;

/// Where the program that asks the kernel for the signal is looked for.
const SETPRIV: [&str; 3] = ["/usr/bin/setpriv", "/bin/setpriv", "/usr/local/bin/setpriv"];
/// How long a program may take to end once its input is closed.
const AFTER_INPUT: Duration = Duration::from_millis(500);
/// How long it may take after SIGTERM, before SIGKILL.
const AFTER_TERM: Duration = Duration::from_secs(2);
/// How much of a program's standard error is kept to explain its end.
const KEPT_STDERR: usize = 2000;
/// The longest line of it that is logged.
const LOGGED_LINE: usize = 1000;

/// The shell between us and the program. Its first argument is our process id.
///
/// Signals that are caught are back to their defaults in what a shell starts; the program gets the real
/// standard input and output, and the shell keeps neither, so that their ends mean the program's.
const GUARD: &str = r#"
[ "$PPID" = "$1" ] || exit 1
shift
trap 'kill -KILL 0' USR1
trap : TERM
exec 3<&0 4>&1 </dev/null >/dev/null
"$@" <&3 >&4 3<&- 4>&- &
child=$!
exec 3<&- 4>&-
while :; do
  wait "$child"
  status=$?
  [ "$status" -gt 128 ] && kill -0 "$child" 2>/dev/null || exit "$status"
done
"#;

/// What to start.
#[derive(Debug)]
pub(super) struct Program<'a> {
    pub(super) server: &'a str,
    pub(super) command: &'a [String],
    pub(super) env: BTreeMap<String, SecretString>,
    pub(super) path: &'a str,
    pub(super) home: PathBuf,
    pub(super) cwd: Option<&'a Path>,
}

/// A started program. Dropping it kills its process group at once.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    group: Pid,
    ended: bool,
    said: LastWords,
}

/// The end of what a program said on standard error. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct LastWords(Arc<Mutex<String>>);

impl LastWords {
    /// The last line, redacted; may be empty.
    pub(super) fn get(&self) -> String {
        let said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        quoted(said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default())
    }

    fn add(&self, line: &str) {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if said.len() + line.len() > KEPT_STDERR {
            said.clear();
        }
        said.push_str(line);
        said.push('\n');
    }
}

/// Its two pipes.
#[derive(Debug)]
pub(super) struct Pipes {
    pub(super) input: ChildStdin,
    pub(super) output: ChildStdout,
}

impl Process {
    /// Starts a program. What it says on standard error is logged, without what `redactor` knows.
    ///
    /// # Errors
    /// What was missing.
    pub(super) async fn start(
        program: Program<'_>,
        redactor: Arc<Redactor>,
        tasks: &tokio_util::task::TaskTracker,
    ) -> Result<(Self, Pipes), String> {
        let setpriv = SETPRIV.iter().find(|path| Path::new(path).exists());
        let setpriv = setpriv.ok_or("setpriv is needed to start it: install util-linux")?;
        make_home(&program.home).await?;
        let mut command = Command::new(setpriv);
        command.args(["--pdeathsig", "USR1", "--", "/bin/sh", "-c", GUARD, "cynai-tools"]);
        command.arg(std::process::id().to_string()).args(program.command);
        command.env_clear().env("PATH", program.path).env("HOME", &program.home);
        command.env("LANG", "C.UTF-8");
        command.envs(program.env.iter().map(|(name, value)| (name, value.expose_secret())));
        command.current_dir(program.cwd.unwrap_or(&program.home));
        command.process_group(0).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = spawn(command).await.map_err(|err| {
            let place = program.cwd.unwrap_or(&program.home).display();
            format!("it cannot be started in {place}: {err}")
        })?;
        let taken = (child.id(), child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(pid), Some(input), Some(output), Some(stderr)) = taken else {
            return Err("it ended while it was started".to_owned());
        };
        let said = LastWords::default();
        let server = program.server.to_owned();
        tasks.spawn(listen(stderr, server, redactor, said.clone()));
        let group = Pid::from_raw(pid.cast_signed());
        Ok((Self { child, group, ended: false, said }, Pipes { input, output }))
    }

    /// Waits until it has ended by itself. May be dropped and called again.
    pub(super) async fn ended(&mut self) -> Option<ExitStatus> {
        let status = self.child.wait().await.ok();
        // The program is gone, but what it started may not be: nothing of it is left.
        self.kill();
        status
    }

    /// What it says on standard error, to explain its end.
    pub(super) fn last_words(&self) -> LastWords {
        self.said.clone()
    }

    /// Ends it: its input is closed already; then SIGTERM, then SIGKILL, to the whole group.
    pub(super) async fn stop(mut self) {
        if tokio::time::timeout(AFTER_INPUT, self.child.wait()).await.is_err() {
            let _ = killpg(self.group, Signal::SIGTERM);
            let _ = tokio::time::timeout(AFTER_TERM, self.child.wait()).await;
        }
        self.kill();
        let _ = self.child.wait().await;
    }

    fn kill(&mut self) {
        if !self.ended {
            self.ended = true;
            let _ = killpg(self.group, Signal::SIGKILL);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

async fn make_home(home: &Path) -> Result<(), String> {
    let made = tokio::fs::DirBuilder::new().recursive(true).mode(0o700).create(home).await;
    made.map_err(|err| format!("its home directory {} cannot be made: {err}", home.display()))
}

/// Logs what a program says, and keeps the end of it.
async fn listen(
    mut stderr: impl AsyncRead + Unpin,
    server: String,
    redactor: Arc<Redactor>,
    said: LastWords,
) {
    let mut bytes = [0; 4096];
    let mut line = Vec::new();
    while let Ok(count @ 1..) = stderr.read(&mut bytes).await {
        for byte in &bytes[..count] {
            if *byte != b'\n' && line.len() < LOGGED_LINE {
                line.push(*byte);
            }
            if *byte == b'\n' {
                say(&server, &redactor, &said, &std::mem::take(&mut line));
            }
        }
    }
    if !line.is_empty() {
        say(&server, &redactor, &said, &line);
    }
}

fn say(server: &str, redactor: &Redactor, said: &LastWords, line: &[u8]) {
    let line = redactor.text(&String::from_utf8_lossy(line));
    tracing::debug!(tools.server = server, "{server}: {}", quoted(&line));
    said.add(&line);
}

struct Request {
    command: Command,
    runtime: tokio::runtime::Handle,
    answer: oneshot::Sender<std::io::Result<Child>>,
}

/// Starts `command` from the thread that lives as long as this process.
async fn spawn(command: Command) -> std::io::Result<Child> {
    static THREAD: OnceLock<Mutex<mpsc::Sender<Request>>> = OnceLock::new();
    let gone = || std::io::Error::other("the thread that starts programs is gone");
    let thread = THREAD.get_or_init(|| {
        let (sender, receiver) = mpsc::channel::<Request>();
        let work = move || {
            for mut request in receiver {
                let _runtime = request.runtime.enter();
                // Whoever asked may be gone: then dropping the child kills it.
                let _ = request.answer.send(request.command.spawn());
            }
        };
        let made = std::thread::Builder::new().name("cynai-spawn".to_owned()).spawn(work);
        // Without the thread the channel is closed, which every caller is told.
        drop(made);
        Mutex::new(sender)
    });
    let (answer, answered) = oneshot::channel();
    let request = Request { command, runtime: tokio::runtime::Handle::current(), answer };
    let sent = thread.lock().unwrap_or_else(PoisonError::into_inner).send(request);
    sent.map_err(|_| gone())?;
    answered.await.map_err(|_| gone())?
}
