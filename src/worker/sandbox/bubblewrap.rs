//! The bubblewrap driver: a sandbox made of kernel namespaces by an unprivileged program.
//!
//! No network, a read-only root, `/workspace` and `/tmp` in memory with a size, no capabilities, no
//! further namespaces. A small shell joins the job's control groups and, when the agent is root, becomes
//! a dedicated user before bubblewrap starts, so that even a way out of the sandbox does not end as root.
//!
//! **Invariant:** the command is preceded by nothing of the agent's environment, files or descriptors.
//! **Invariant:** options that hold a job's text travel in memory, not on a command line.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use nix::sys::signal::Signal;
use nix::unistd::{Uid, User};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::cgroup::{Cgroups, Controller, JobCgroup};
use super::output::{Head, drain};
use super::procs::{self, Process};
use super::rootfs::{self, Entry, JOB_UID};
use super::spawn::{Launch, Launched, Spawner};
use super::{Enforcement, Exit, SandboxDriver, SandboxError, SandboxHandle, SandboxSpec, probe};
use crate::ids::JobId;
use crate::worker::config::{BASE_IMAGE, ConfigError, WorkerConfig};
use crate::worker::wire::NetworkPolicy;

/// Host users for sandboxes when nothing is configured: a range that neither Debian nor systemd uses.
const UID_RANGE: std::ops::RangeInclusive<u32> = 60_706..=61_183;
/// How long killed processes may take to disappear.
const DEATH_PATIENCE: Duration = Duration::from_secs(10);
/// How long the pipes may stay open after the last process is gone.
const DRAIN_PATIENCE: Duration = Duration::from_secs(5);
/// Open files of one process.
const OPEN_FILES: u32 = 1024;

/// Makes sandboxes with bubblewrap.
#[derive(Debug)]
pub struct Bubblewrap {
    pub(super) bwrap: PathBuf,
    /// The user to become; `None` when the agent is not root.
    uid: Option<u32>,
    /// Name to (directory, index of the staged source).
    images: BTreeMap<String, (PathBuf, usize)>,
    mounts: BTreeMap<String, usize>,
    spawner: Spawner,
    pub(super) plan: RwLock<Plan>,
}

/// How sandboxes are limited; the probe finds the best that works.
#[derive(Debug, Clone, Default)]
pub(super) struct Plan {
    pub(super) cgroups: Cgroups,
    pub(super) rlimits: Rlimits,
}

/// Which limits fall to resource limits of single processes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Rlimits {
    pub(super) memory: bool,
    pub(super) processes: bool,
    pub(super) cpus: bool,
}

impl Bubblewrap {
    /// Prepares the driver; call inside a tokio runtime. Nothing is tried before the first probe.
    pub fn new(config: &WorkerConfig) -> Result<Self, SandboxError> {
        let uid = sandbox_uid(config.sandbox_uid)
            .map_err(|err| SandboxError::Unavailable { reason: err.to_string() })?;
        let mut sources = Vec::new();
        let mut images = BTreeMap::new();
        let mut mounts = BTreeMap::new();
        for (name, directory) in &config.images {
            images.insert(name.clone(), (directory.clone(), sources.len()));
            sources.push(directory.clone());
        }
        for (name, directory) in &config.mounts {
            mounts.insert(name.clone(), sources.len());
            sources.push(directory.clone());
        }
        let spawner = Spawner::start(sources, uid.is_some())
            .map_err(SandboxError::io("start the sandbox thread"))?;
        let plan = Plan { cgroups: Cgroups::discover(&agent_name(config)), ..Plan::default() };
        let bwrap = config.bwrap.clone();
        Ok(Self { bwrap, uid, images, mounts, spawner, plan: RwLock::new(plan) })
    }

    /// The host's user that sandboxes run as.
    pub(super) fn host_uid(&self) -> u32 {
        self.uid.unwrap_or_else(|| nix::unistd::geteuid().as_raw())
    }

    fn current_plan(&self) -> Plan {
        self.plan.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn root_of(&self, image: &str) -> Result<Vec<Entry>, SandboxError> {
        let missing = || SandboxError::NotConfigured { kind: "image", name: image.to_owned() };
        let Some((directory, index)) = self.images.get(image) else {
            return if image == BASE_IMAGE { Ok(rootfs::base()) } else { Err(missing()) };
        };
        let seen_as = self.spawner.seen_as(*index).ok_or_else(missing)?;
        rootfs::image(directory, seen_as).map_err(SandboxError::io("read the image's directory"))
    }

    /// Starts one sandbox under the given plan.
    pub(super) async fn launch(
        &self,
        plan: &Plan,
        spec: SandboxSpec,
    ) -> Result<BubblewrapHandle, SandboxError> {
        let mut launch = Launch {
            limits: outer_limits(plan, &spec),
            uid: self.uid,
            bwrap: self.bwrap.clone(),
            marker: words(&["--setenv", "CYNAI_JOB_ID", &spec.job_id.to_string()]),
            last: words(&["--chdir", "/workspace", "--remount-ro", "/"]),
            command: inner_command(plan, &spec),
            ..Launch::default()
        };
        isolation(&mut launch.options, spec.network);
        for entry in self.root_of(&spec.image)? {
            add_entry(&mut launch, entry);
        }
        writable_places(&mut launch.options, &spec);
        for name in &spec.mounts {
            let missing = || SandboxError::NotConfigured { kind: "mount", name: name.clone() };
            let source = self.mounts.get(name).and_then(|index| self.spawner.seen_as(*index));
            let source = source.ok_or_else(missing)?.to_string_lossy().into_owned();
            launch.options.extend(words(&["--ro-bind", &source, &format!("/data/{name}")]));
        }
        environment(&mut launch.options, &spec);
        let cgroup = plan
            .cgroups
            .job(spec.job_id, &spec.limits)
            .map_err(SandboxError::io("make the job's control groups"))?;
        launch.entrances = cgroup.entrances();
        let launched = self.spawner.launch(launch).await;
        let launched = launched.map_err(SandboxError::io("start the sandbox program"))?;
        Ok(BubblewrapHandle::new(launched, cgroup, spec))
    }
}

impl SandboxDriver for Bubblewrap {
    fn probe(&self) -> BoxFuture<'_, Result<Enforcement, SandboxError>> {
        probe::run(self).boxed()
    }

    fn start(
        &self,
        spec: SandboxSpec,
    ) -> BoxFuture<'_, Result<Box<dyn SandboxHandle>, SandboxError>> {
        async move {
            let plan = self.current_plan();
            let handle = self.launch(&plan, spec).await?;
            Ok(Box::new(handle) as Box<dyn SandboxHandle>)
        }
        .boxed()
    }

    fn reap<'a>(&'a self, jobs: &'a [JobId]) -> BoxFuture<'a, Result<usize, SandboxError>> {
        async move {
            let groups = self.current_plan().cgroups.leftovers();
            groups.kill();
            let mut found = procs::sandboxes_of(jobs);
            let of_groups = groups.members().into_iter().filter_map(Process::find);
            found.extend(
                of_groups.filter(|process| process.pid != std::process::id().cast_signed()),
            );
            let inside: Vec<Process> =
                found.iter().flat_map(|one| procs::descendants(*one)).collect();
            found.extend(inside);
            let count = procs::kill_and_wait(&found, DEATH_PATIENCE).await;
            if count > 0 {
                return Err(SandboxError::Unkillable { count });
            }
            groups.remove();
            Ok(found.len())
        }
        .boxed()
    }
}

impl Drop for Bubblewrap {
    fn drop(&mut self) {
        self.current_plan().cgroups.remove();
    }
}

/// Unique to the state directory, the same for every agent that ever uses it.
fn agent_name(config: &WorkerConfig) -> String {
    let digest = Sha256::digest(config.state_dir.as_os_str().as_encoded_bytes());
    digest.iter().take(6).fold(String::from("cynai-"), |name, byte| name + &format!("{byte:02x}"))
}

/// The user to become when the agent is root: the configured one, or one that nobody uses.
fn sandbox_uid(configured: Option<u32>) -> Result<Option<u32>, ConfigError> {
    let account = |uid| User::from_uid(Uid::from_raw(uid)).ok().flatten();
    match configured {
        Some(uid) => {
            let bad = |reason| Err(ConfigError::BadUid { uid, reason });
            if uid == 0 {
                return bad("sandboxes never run as root");
            }
            if account(uid).is_some_and(|user| user.name == "postgres") {
                return bad("it is the database's user");
            }
            if !nix::unistd::geteuid().is_root() && uid != nix::unistd::geteuid().as_raw() {
                return bad("only root can become another user");
            }
            Ok(nix::unistd::geteuid().is_root().then_some(uid))
        }
        None if nix::unistd::geteuid().is_root() => {
            let mut range = UID_RANGE;
            let free = range.find(|uid| account(*uid).is_none());
            free.map(Some).ok_or(ConfigError::BadUid {
                uid: *UID_RANGE.start(),
                reason: "every user of the default range has an account; name one",
            })
        }
        None => Ok(None),
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(ToString::to_string).collect()
}

fn isolation(options: &mut Vec<String>, network: NetworkPolicy) {
    let id = JOB_UID.to_string();
    options.extend(words(&["--unshare-user", "--unshare-pid", "--unshare-ipc"]));
    match network {
        NetworkPolicy::None | NetworkPolicy::Restricted => options.push("--unshare-net".to_owned()),
    }
    options.extend(words(&["--unshare-uts", "--unshare-cgroup", "--disable-userns"]));
    options.extend(words(&["--uid", &id, "--gid", &id, "--hostname", "sandbox"]));
    options.extend(words(&["--die-with-parent", "--new-session", "--cap-drop", "ALL"]));
}

fn add_entry(launch: &mut Launch, entry: Entry) {
    match entry {
        Entry::Bind { source, target } => {
            launch.options.extend(words(&["--ro-bind", &source.to_string_lossy(), &target]));
        }
        Entry::Symlink { link, target } => {
            launch.options.extend(words(&["--symlink", &link.to_string_lossy(), &target]));
        }
        Entry::Directory { target } => launch.options.extend(words(&["--dir", target])),
        Entry::File { text, target } => launch.files.push((text, target)),
    }
}

/// `/proc`, a minimal `/dev`, and the three places that a job may write to, each with its size.
fn writable_places(options: &mut Vec<String>, spec: &SandboxSpec) {
    let tmp = spec.limits.tmp_bytes.to_string();
    let disk = spec.limits.disk_bytes.to_string();
    options.extend(words(&["--proc", "/proc", "--dev", "/dev"]));
    options.extend(words(&["--perms", "1777", "--size", &tmp, "--tmpfs", "/dev/shm"]));
    options.extend(words(&["--remount-ro", "/dev"]));
    options.extend(words(&["--perms", "1777", "--size", &tmp, "--tmpfs", "/tmp"]));
    options.extend(words(&["--perms", "0755", "--size", &disk, "--tmpfs", "/workspace"]));
    options.extend(words(&["--perms", "0755", "--dir", "/data"]));
}

fn environment(options: &mut Vec<String>, spec: &SandboxSpec) {
    let mut set = |name: &str, value: &str| options.extend(words(&["--setenv", name, value]));
    set("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    set("HOME", "/workspace");
    set("LANG", "C.UTF-8");
    for (name, value) in &spec.env {
        set(name, value);
    }
    set("CYNAI_TASK_ID", &spec.task_id.to_string());
    set("CYNAI_JOB_ID", &spec.job_id.to_string());
    set("CYNAI_WORKSPACE_DIR", "/workspace");
}

/// Limits that bubblewrap itself may run under; the job inherits them.
fn outer_limits(plan: &Plan, spec: &SandboxSpec) -> String {
    let mut limits = format!("ulimit -n {OPEN_FILES} 2>/dev/null;");
    if plan.rlimits.memory {
        limits += &format!(" ulimit -v {} || exit 125;", spec.limits.memory_bytes / 1024);
    }
    if plan.rlimits.cpus {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "both are bounded"
        )]
        #[expect(clippy::cast_precision_loss, reason = "at most a week of seconds")]
        let seconds = (spec.limits.cpus * spec.limits.wall_seconds as f64).ceil() as u64;
        limits += &format!(" ulimit -t {} || exit 125;", seconds.max(1));
    }
    limits
}

/// The command, behind a shell of the sandbox that does three things. It starts the command only when
/// the agent says so (see [`give_the_word`]). It reports a missing program as 127. And where no control
/// group counts processes, it sets a limit that must not bind the sandbox program itself.
fn inner_command(plan: &Plan, spec: &SandboxSpec) -> Vec<String> {
    let mut script = String::from("echo; read -r word || exit 125; ");
    if plan.rlimits.processes {
        let most = spec.limits.processes;
        script += &format!(
            "if (ulimit -u {most}) 2>/dev/null; then ulimit -u {most}; else ulimit -p {most} || exit 125; fi; "
        );
    }
    script += "exec \"$@\"";
    let mut command = words(&["/bin/sh", "-c", &script, "sh"]);
    command.extend(spec.command.iter().cloned());
    command
}

/// Lets the command start, once the sandbox is sure to die with this process.
///
/// Bubblewrap's init ties itself to its parent only after it has forked, and does not look whether the
/// parent was still there: an agent killed in that moment would leave a command running for ever. So
/// the shell in front of the command prints an empty line and waits for a word on standard input, and
/// the word is given when init sleeps, which it does only after it has tied itself. If the agent dies
/// earlier, the shell reads the end of its input and ends instead.
async fn give_the_word(
    mut input: ChildStdin,
    ready: oneshot::Receiver<()>,
    report: &Mutex<Report>,
    text: &str,
) -> std::io::Result<()> {
    if ready.await.is_err() {
        return Ok(());
    }
    loop {
        let init = report.lock().unwrap_or_else(PoisonError::into_inner).init;
        let now = init.map(|init| Process::find(init.pid));
        match now {
            Some(None) => return Ok(()),
            Some(Some(process)) if process.sleeping => break,
            _ => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
    input.write_all(b"go\n").await?;
    // The job may end without reading it all; that is its own affair.
    input.write_all(text.as_bytes()).await
}

/// What bubblewrap tells about itself while it runs.
#[derive(Debug, Default)]
struct Report {
    /// The sandbox's first process, as the host sees it.
    init: Option<Process>,
    /// Present once the command was really started and has ended.
    exit_code: Option<i32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ReportLine {
    child_pid: Option<i32>,
    exit_code: Option<i32>,
}

/// A sandbox that was started by bubblewrap.
pub(super) struct BubblewrapHandle {
    job: JobId,
    child: Child,
    report: Arc<Mutex<Report>>,
    stdout: Arc<Mutex<Head>>,
    stderr: Arc<Mutex<Head>>,
    pumps: JoinSet<()>,
    pub(super) cgroup: JobCgroup,
    killed: bool,
}

impl BubblewrapHandle {
    fn new(launched: Launched, cgroup: JobCgroup, spec: SandboxSpec) -> Self {
        let Launched { mut child, status } = launched;
        let head = || Arc::new(Mutex::new(Head::new(spec.limits.output_bytes)));
        let (stdout, stderr, report) = (head(), head(), Arc::new(Mutex::new(Report::default())));
        let mut pumps = JoinSet::new();
        let (tell, ready) = oneshot::channel();
        if let Some(mut stream) = child.stdout.take() {
            let head = Arc::clone(&stdout);
            pumps.spawn(async move {
                // The empty line of the shell in front of the command.
                if stream.read_u8().await.is_ok() {
                    let _ = tell.send(());
                    drain(stream, &head).await;
                }
            });
        }
        if let Some(stream) = child.stderr.take() {
            let head = Arc::clone(&stderr);
            pumps.spawn(async move { drain(stream, &head).await });
        }
        if let Some(input) = child.stdin.take() {
            let (shared, text) = (Arc::clone(&report), spec.stdin.unwrap_or_default());
            pumps.spawn(async move { drop(give_the_word(input, ready, &shared, &text).await) });
        }
        let shared = Arc::clone(&report);
        pumps.spawn(async move { read_reports(status, &shared).await });
        Self { job: spec.job_id, child, report, stdout, stderr, pumps, cgroup, killed: false }
    }

    fn init(&self) -> Option<Process> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).init
    }

    /// Kills what the command left behind and waits until all of it is gone.
    async fn clear(&mut self) -> Result<(), SandboxError> {
        self.cgroup.kill();
        let mut left: Vec<Process> = self.init().into_iter().collect();
        left.extend(self.cgroup.members().into_iter().filter_map(Process::find));
        if left.is_empty() {
            // The program died before it could tell who its child is.
            left = procs::sandboxes_of(&[self.job]);
        }
        let count = procs::kill_and_wait(&left, DEATH_PATIENCE).await;
        if count > 0 { Err(SandboxError::Unkillable { count }) } else { Ok(()) }
    }

    async fn collect(&mut self) -> Result<Exit, SandboxError> {
        let pumps = &mut self.pumps;
        let drained = async { while pumps.join_next().await.is_some() {} };
        if tokio::time::timeout(DRAIN_PATIENCE, drained).await.is_err() {
            tracing::warn!(job.id = %self.job, "a pipe of job {} stayed open after its end", self.job);
            self.pumps.abort_all();
        }
        let out_of_memory = self.cgroup.out_of_memory();
        for _ in 0..40 {
            if self.cgroup.remove() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let take = |head: &Mutex<Head>| {
            std::mem::take(&mut *head.lock().unwrap_or_else(PoisonError::into_inner))
                .into_captured()
        };
        let (stdout, stderr) = (take(&self.stdout), take(&self.stderr));
        let code = self.report.lock().unwrap_or_else(PoisonError::into_inner).exit_code;
        if code.is_none() && !self.killed && !out_of_memory {
            return Err(SandboxError::Setup { reason: stderr.text.trim().to_owned() });
        }
        Ok(Exit { code, out_of_memory, stdout, stderr })
    }
}

impl SandboxHandle for BubblewrapHandle {
    fn wait(&mut self) -> BoxFuture<'_, Result<Exit, SandboxError>> {
        async move {
            self.child.wait().await.map_err(SandboxError::io("wait for the sandbox program"))?;
            self.clear().await?;
            self.collect().await
        }
        .boxed()
    }

    fn terminate(&mut self) {
        if let Some(init) = self.init() {
            for process in procs::descendants(init) {
                process.signal(Signal::SIGTERM);
            }
        }
    }

    fn kill(&mut self) {
        self.killed = true;
        let _ = self.child.start_kill();
        self.cgroup.kill();
        if let Some(init) = self.init() {
            init.signal(Signal::SIGKILL);
        }
    }
}

async fn read_reports(mut status: impl AsyncRead + Unpin, report: &Mutex<Report>) {
    let mut text = Vec::new();
    let mut buffer = [0; 1024];
    loop {
        match status.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => text.extend_from_slice(&buffer[..count]),
        }
        while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = text.drain(..=end).collect();
            let Ok(line) = serde_json::from_slice::<ReportLine>(&line) else { continue };
            let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
            report.init = report.init.or_else(|| line.child_pid.and_then(Process::find));
            report.exit_code = report.exit_code.or(line.exit_code);
        }
        if text.len() > 64 << 10 {
            return;
        }
    }
}

/// The version of the bubblewrap program, or why it cannot be used.
pub(super) async fn version(bwrap: &PathBuf) -> Result<String, SandboxError> {
    let mut command = tokio::process::Command::new(bwrap);
    command.arg("--version").stdin(Stdio::null()).kill_on_drop(true);
    match command.output().await {
        Ok(output) => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => Err(SandboxError::Unavailable {
            reason: "bubblewrap is not installed; on Debian: apt-get install bubblewrap".to_owned(),
        }),
        Err(source) => Err(SandboxError::Io { action: "run bubblewrap", source }),
    }
}

/// The best plan that this host's control groups allow, minus what was seen not to work.
impl Plan {
    pub(super) fn without(mut self, controller: Controller) -> Self {
        self.cgroups.give_up(controller);
        self
    }
}
