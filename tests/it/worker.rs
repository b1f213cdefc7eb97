//! The worker as the processes that users have: killed without warning, unprivileged, a server's child.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use cynai::ids::JobId;
use cynai::tls::own::Own;
use cynai::tls::trust::Trust;
use cynai::worker::agent::Listening;
use cynai::worker::client::WorkerClient;
use cynai::worker::config::{Token, WorkerConfig};
use cynai::worker::local::LocalWorker;
use cynai::worker::sandbox::Mechanism;
use cynai::worker::wire::{JobErrorKind, JobRequest, JobState, SandboxRequest};
use uuid::Uuid;

const PROGRAM: &str = env!("CARGO_BIN_EXE_cynai");
const INSTALL: &str = "these tests need a working sandbox: apt-get install bubblewrap";

/// An agent as a process of its own, started as the server starts it.
struct Agent {
    child: Child,
    input: Option<ChildStdin>,
    client: WorkerClient,
}

impl Agent {
    fn start(mut command: Command, state: &Path) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let config = WorkerConfig::new(Token::random(), state);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        writeln!(input, "{}", serde_json::to_string(&config).unwrap()).unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let said: Listening = serde_json::from_str(&line).expect("the agent listens");
        let client = WorkerClient::new(said.listening, config.token, reqwest::Client::new());
        Self { child, input: Some(input), client }
    }

    fn plain(state: &Path) -> Self {
        let mut command = Command::new(PROGRAM);
        command.args(["worker", "--stdin-config"]);
        Self::start(command, state)
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Closes the agent's input and waits for its end.
    async fn end(mut self) {
        self.input = None;
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "the agent does not end");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn job(command: &[&str]) -> JobRequest {
    JobRequest {
        version: 1,
        task_id: Uuid::from_u128(9),
        job_id: JobId::new(),
        sandbox: SandboxRequest {
            image: "sandbox/base".into(),
            command: command.iter().map(ToString::to_string).collect(),
            ..SandboxRequest::default()
        },
    }
}

/// The command lines of all processes of the machine.
fn command_lines() -> Vec<String> {
    let numeric = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().parse::<u32>().is_ok();
    let entries = fs::read_dir("/proc").unwrap().flatten().filter(numeric);
    entries
        .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .collect()
}

fn processes_with(text: &str) -> usize {
    command_lines().iter().filter(|line| line.contains(text)).count()
}

/// Processes that are this very command, not the programs around it.
fn processes_with_start(text: &str) -> usize {
    command_lines().iter().filter(|line| line.starts_with(text)).count()
}

async fn until(what: &str, mut reached: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !reached().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn state(client: &WorkerClient, job: &JobRequest) -> Option<JobState> {
    client.status(job.job_id).await.unwrap().map(|status| status.state)
}

#[tokio::test]
async fn a_killed_agent_leaves_no_process_and_its_jobs_are_reported_as_lost() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::plain(dir.path());
    let finished = job(&["echo", "finished"]);
    agent.client.run(&finished, Duration::from_secs(30)).await.expect(INSTALL);
    let running =
        job(&["sh", "-c", "(setsid sleep 71.25 &); trap '' TERM HUP; sleep 71.25; sleep 71.25"]);
    agent.client.accept(&running).await.unwrap();
    until("the job runs", async || processes_with("sleep 71.25") >= 4).await;
    agent.kill();
    until("the sandbox is dead", async || processes_with("sleep 71.25") == 0).await;

    let agent = Agent::plain(dir.path());
    let found = agent.client.finished(Duration::from_secs(10), 10).await.unwrap().jobs;
    assert_eq!(found.len(), 2);
    let of = |request: &JobRequest| {
        found.iter().find(|one| one.job_id == request.job_id).unwrap().result.clone().unwrap()
    };
    assert_eq!(of(&finished).stdout, "finished\n");
    let lost = of(&running);
    assert_eq!((lost.status, lost.exit_code), (JobState::Lost, None));
    assert_eq!(lost.error.unwrap().kind, JobErrorKind::AgentEnded);
    // Not run again, whoever asks.
    let again = agent.client.accept(&running).await.unwrap();
    assert_eq!(again.state, JobState::Lost);
    agent.end().await;
}

#[tokio::test]
async fn an_agent_killed_while_a_sandbox_starts_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    for delay in [0, 1, 2, 4, 8, 16] {
        let agent = Agent::plain(dir.path());
        for _ in 0..2 {
            let request = job(&["sh", "-c", "setsid sleep 75.25 & sleep 75.25"]);
            agent.client.accept(&request).await.expect(INSTALL);
        }
        // The delay itself is what is tried out here.
        tokio::time::sleep(Duration::from_millis(delay)).await;
        agent.kill();
        // Whatever had begun to run dies with the agent. A sandbox that was just being made may wait
        // for its dead parent for ever, before it runs anything: the next agent ends that.
        until("no command is left", async || processes_with_start("sleep 75.25") == 0).await;
    }
    let agent = Agent::plain(dir.path());
    until("no process is left", async || processes_with("sleep 75.25") == 0).await;
    let found = agent.client.finished(Duration::ZERO, 100).await.unwrap().jobs;
    assert_eq!(found.len(), 12);
    assert!(found.iter().all(|job| job.state == JobState::Lost));
    agent.end().await;
}

#[tokio::test]
async fn closing_the_input_kills_the_sandboxes_and_ends_the_agent() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::plain(dir.path());
    let request = job(&["sh", "-c", "trap '' TERM; sleep 72.25; sleep 72.25"]);
    agent.client.accept(&request).await.expect(INSTALL);
    until("the job runs", async || processes_with("sleep 72.25") >= 2).await;
    agent.end().await;
    assert_eq!(processes_with("sleep 72.25"), 0);
}

#[tokio::test]
async fn requests_are_logged_for_who_asks_for_them() {
    for (level, told) in [("info", false), ("debug", true)] {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut command = Command::new(PROGRAM);
        command.args(["worker", "--stdin-config"]).env("RUST_LOG", level);
        command.stderr(fs::File::create(&log).unwrap());
        let agent = Agent::start(command, dir.path());
        agent.client.run(&job(&["true"]), Duration::from_secs(30)).await.expect(INSTALL);
        agent.end().await;
        let text = fs::read_to_string(&log).unwrap();
        assert!(text.contains("ended"), "the end of a job is told: {text}");
        assert_eq!(text.contains("/v1/worker/jobs"), told, "{level}: {text}");
    }
}

#[tokio::test]
async fn a_second_agent_on_the_same_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::plain(dir.path());
    let output = Command::new(PROGRAM)
        .args(["worker", "--listen", "127.0.0.1:0", "--state-dir"])
        .arg(dir.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("another worker uses"), "{text}");
    agent.end().await;
}

#[tokio::test]
async fn a_sandbox_inherits_no_descriptor_even_when_the_agent_did() {
    let dir = tempfile::tempdir().unwrap();
    let secret = dir.path().join("secret");
    fs::write(&secret, "the host's secret").unwrap();
    let mut command = Command::new("/bin/sh");
    command
        .arg("-c")
        .arg(format!("exec 7<{}; exec {PROGRAM} worker --stdin-config", secret.display()));
    let agent = Agent::start(command, dir.path());
    let request = job(&["sh", "-c", "ls /proc/$$/fd; (cat <&7) 2>/dev/null; true"]);
    let result = agent.client.run(&request, Duration::from_secs(30)).await.expect(INSTALL);
    assert_eq!(result.stdout, "0\n1\n2\n", "{}", result.stderr);
    agent.end().await;
}

/// A directory and a copy of the program that an ordinary user can reach.
fn reachable_by_all() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("cynai");
    fs::copy(PROGRAM, &program).unwrap();
    for path in [dir.path(), &program] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let state = dir.path().join("state");
    fs::create_dir(&state).unwrap();
    fs::set_permissions(&state, fs::Permissions::from_mode(0o777)).unwrap();
    (dir, program)
}

#[tokio::test]
async fn an_unprivileged_agent_isolates_and_limits_as_well_as_its_host_lets_it() {
    let (dir, program) = reachable_by_all();
    let mut command = Command::new(&program);
    if fs::metadata("/proc/self").unwrap().uid() == 0 {
        command = Command::new("setpriv");
        command
            .args(["--reuid", "nobody", "--regid", "nogroup", "--clear-groups", "--"])
            .arg(&program);
    }
    command.args(["worker", "--stdin-config"]).current_dir("/");
    let agent = Agent::start(command, &dir.path().join("state"));
    let report = agent.client.capabilities().await.unwrap().sandbox;
    assert!(report.ready, "{INSTALL}: {:?}", report.reason);
    let found = report.enforcement.unwrap();
    for mechanism in [found.memory, found.processes, found.cpus, found.disk] {
        assert_ne!(mechanism, Mechanism::None, "{found:?}");
    }
    let script = "cat /etc/shadow 2>/dev/null; touch /x 2>/dev/null && echo wrote; id -u; \
                  (setsid sleep 73.25 &); echo end";
    let result =
        agent.client.run(&job(&["sh", "-c", script]), Duration::from_secs(30)).await.unwrap();
    assert_eq!(result.stdout, "1000\nend\n", "{}", result.stderr);
    assert_eq!(processes_with("sleep 73.25"), 0);
    let mut hog = job(&["sh", "-c", "head -c 400000000 /dev/zero | tail -c 400000000 >/dev/null"]);
    hog.sandbox.resources =
        Some(cynai::worker::wire::Resources { memory_mb: Some(64), ..Default::default() });
    let result = agent.client.run(&hog, Duration::from_secs(30)).await.unwrap();
    assert_eq!(result.status, JobState::Failed);
    let mut bomb = job(&["bash", "-c", "bomb() { sleep 74.5 & bomb | bomb & }; bomb; sleep 74.5"]);
    bomb.sandbox.resources =
        Some(cynai::worker::wire::Resources { processes: Some(24), ..Default::default() });
    bomb.sandbox.timeout_seconds = Some(2);
    agent.client.accept(&bomb).await.unwrap();
    let mut most = 0;
    until("the bomb ends", async || {
        most = most.max(processes_with("74.5"));
        state(&agent.client, &bomb).await.unwrap().is_terminal()
    })
    .await;
    assert!((2..=30).contains(&most), "{most} processes");
    assert_eq!(processes_with("74.5"), 0);
    agent.end().await;
}

#[tokio::test]
async fn the_servers_local_worker_runs_jobs_and_ends_with_it() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let dir = tempfile::tempdir().unwrap();
    let config = WorkerConfig::new(Token::random(), dir.path());
    let worker = LocalWorker::start_program(PROGRAM.into(), &config).await.unwrap();
    let client =
        WorkerClient::new(worker.base_url(), worker.token().clone(), reqwest::Client::new());
    let result =
        client.run(&job(&["echo", "local"]), Duration::from_secs(30)).await.expect(INSTALL);
    assert_eq!(result.stdout, "local\n");
    let environ = fs::read(format!("/proc/{}/environ", worker.pid())).unwrap();
    assert_eq!(String::from_utf8_lossy(&environ), "");
    let status = worker.stop().await.unwrap();
    assert!(status.success(), "{status}");
}

#[tokio::test]
async fn a_local_worker_that_dies_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let config = WorkerConfig::new(Token::random(), dir.path());
    let mut worker = LocalWorker::start_program(PROGRAM.into(), &config).await.unwrap();
    let pid = worker.pid().to_string();
    assert!(Command::new("kill").args(["-9", &pid]).status().unwrap().success());
    let status = tokio::time::timeout(Duration::from_secs(10), worker.exited()).await.unwrap();
    assert!(!status.unwrap().success());
}

#[tokio::test]
async fn a_startup_file_starts_a_worker_whose_server_is_not_there() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let dir = tempfile::tempdir().unwrap();
    let (file, key) = (dir.path().join("node.yaml"), dir.path().join("key"));
    fs::write(&key, "the-registration-key\n").unwrap();
    let text = format!(
        "version: 1\norchestrator:\n  url: http://127.0.0.1:1\n  registration_psk_file: {}\nnode:\n  id: alpha\n\
         worker_api: {{listen_host: 127.0.0.1, listen_port: 0, tls: {{mode: self_signed}}}}\n\
         storage: {{state_dir: {}}}\n",
        key.display(),
        dir.path().join("state").display()
    );
    // No jobs: nothing has to be tried before it registers.
    let text = format!("{text}sandbox:\n  mode: disabled\n");
    let start = |text: &str| {
        fs::write(&file, text).unwrap();
        let mut command = Command::new(PROGRAM);
        command.arg("worker").arg("--config").arg(&file).stdout(Stdio::piped());
        command.stderr(Stdio::piped()).spawn().unwrap()
    };
    let output = start(&format!("{text}  runtime: podman\n")).wait_with_output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(message.contains("node.yaml:11:3: `sandbox.runtime` asks for podman"), "{message}");

    let mut child = start(&text);
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let said: Listening = serde_json::from_str(&line).expect("the agent listens");
    assert!(said.listening.starts_with("https://127.0.0.1:"), "{line}");
    let kept = fs::read_to_string(dir.path().join("state/certificate.json")).unwrap();
    let mode = fs::metadata(dir.path().join("state/certificate.json")).unwrap().mode();
    assert_eq!(mode & 0o777, 0o600);
    let kept: Own = serde_json::from_str(&kept).unwrap();
    let trust = Trust::exactly(&kept.certificate_pem).unwrap().client_config().unwrap();
    let http = reqwest::Client::builder().no_proxy().tls_backend_preconfigured(trust).build();
    let ready = http.unwrap().get(format!("{}/readyz", said.listening)).send();
    let ready = tokio::time::timeout(Duration::from_secs(10), ready).await.unwrap().unwrap();
    assert_eq!(ready.status().as_u16(), 503);
    assert_eq!(ready.text().await.unwrap(), "this worker waits for its configuration");
    let mut log = String::new();
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    while !log.contains("not registered") {
        assert!(lines.read_line(&mut log).unwrap() > 0, "{log}");
    }
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let status = child.wait().unwrap();
    assert!(status.success(), "{status:?}");
    std::io::Read::read_to_string(&mut lines, &mut log).unwrap();
    assert!(!log.contains("the-registration-key"), "{log}");
}

#[tokio::test]
async fn a_worker_that_cannot_start_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let config = WorkerConfig::new(Token::new("short"), dir.path());
    assert!(LocalWorker::start_program(PROGRAM.into(), &config).await.is_err());
    let output = Command::new(PROGRAM).arg("worker").output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("--state-dir"), "{text}");
    let program = PathBuf::from("/no/such/program");
    assert!(LocalWorker::start_program(program, &config).await.is_err());
}
