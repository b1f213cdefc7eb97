//! The agent over real HTTP with real sandboxes: the contract, and jobs that do not want to obey.
//!
//! A machine without bubblewrap fails these tests with the command that installs it; none is skipped.

use std::collections::BTreeMap;
use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::agent::Agent;
use super::client::{ClientError, WorkerClient};
use super::config::{Token, WorkerConfig};
use super::sandbox::Mechanism;
use super::wire::{
    JobErrorKind, JobRequest, JobResult, JobState, Resources, SandboxRequest, StopOutcome,
};
use crate::clock::SystemClock;
use crate::ids::JobId;

const INSTALL: &str = "these tests need a working sandbox: apt-get install bubblewrap";

/// An agent in this process, and a client for it.
struct TestWorker {
    client: WorkerClient,
    shutdown: CancellationToken,
    agent: JoinSet<()>,
    state: tempfile::TempDir,
}

impl TestWorker {
    async fn start() -> Self {
        Self::start_with(|_| ()).await
    }

    async fn start_with(change: impl FnOnce(&mut WorkerConfig)) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), change).await
    }

    async fn start_in(state: tempfile::TempDir, change: impl FnOnce(&mut WorkerConfig)) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut config = WorkerConfig::new(Token::random(), state.path());
        config.limits.memory_mb = 256;
        config.limits.disk_mb = 32;
        config.timeouts.stop_grace_seconds = 1;
        change(&mut config);
        let token = config.token.clone();
        let agent = Agent::bind(config, Arc::new(SystemClock)).await.unwrap();
        let client = WorkerClient::new(agent.listening().listening, token, reqwest::Client::new());
        let shutdown = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let stop = shutdown.clone();
        tasks.spawn(async move { agent.run(stop).await.unwrap() });
        Self { client, shutdown, agent: tasks, state }
    }

    async fn stop(mut self) -> tempfile::TempDir {
        self.shutdown.cancel();
        self.agent.join_next().await.unwrap().unwrap();
        self.state
    }

    async fn run(&self, request: &JobRequest) -> JobResult {
        self.client.run(request, Duration::from_secs(60)).await.expect(INSTALL)
    }

    async fn script(&self, script: &str) -> JobResult {
        self.run(&job(&["sh", "-c", script])).await
    }

    async fn raw(&self, method: &str, path: &str, token: Option<&str>, body: &str) -> (u16, Value) {
        let url = format!("{}{path}", self.client.base_url);
        let mut request =
            self.client.http.request(method.parse().unwrap(), url).body(body.to_owned());
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        let text = response.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    async fn until(&self, job: &JobRequest, state: JobState) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let now = self.client.status(job.job_id).await.unwrap().unwrap().state;
            if now == state {
                return;
            }
            assert!(Instant::now() < deadline, "still {now:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn job(command: &[&str]) -> JobRequest {
    JobRequest {
        version: 1,
        task_id: Uuid::from_u128(7),
        job_id: JobId::new(),
        sandbox: SandboxRequest {
            image: "sandbox/base".into(),
            command: command.iter().map(ToString::to_string).collect(),
            ..SandboxRequest::default()
        },
    }
}

/// Host processes whose command line holds this text.
fn processes_with(text: &str) -> usize {
    let holds = |entry: &fs::DirEntry| {
        let numeric = entry.file_name().to_string_lossy().parse::<u32>().is_ok();
        numeric
            && fs::read(entry.path().join("cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).replace('\0', " ").contains(text))
    };
    fs::read_dir("/proc").unwrap().flatten().filter(holds).count()
}

async fn check(script: &str, code: i32, stdout: &str) {
    let worker = TestWorker::start().await;
    let result = worker.script(script).await;
    assert_eq!(
        (result.exit_code, result.stdout.as_str()),
        (Some(code), stdout),
        "{}",
        result.stderr
    );
    let expected = if code == 0 { JobState::Completed } else { JobState::Failed };
    assert_eq!(result.status, expected);
    worker.stop().await;
}

#[tokio::test]
async fn a_job_sees_its_own_user_workspace_and_environment_only() {
    let worker = TestWorker::start().await;
    let mut request =
        job(&["sh", "-c", "pwd; id -un; hostname; env | sort | cut -d= -f1; echo $GREETING"]);
    request.sandbox.env.insert("GREETING".into(), "hello there".into());
    let result = worker.run(&request).await;
    assert_eq!(
        result.stdout,
        "/workspace\njob\nsandbox\nCYNAI_JOB_ID\nCYNAI_TASK_ID\nCYNAI_WORKSPACE_DIR\nGREETING\nHOME\nLANG\nPATH\nPWD\nhello there\n"
    );
    assert!(result.started_at <= result.ended_at);
    worker.stop().await;
}

#[tokio::test]
async fn a_command_that_fails_is_a_result_and_not_an_error() {
    check("echo out; echo err >&2; exit 3", 3, "out\n").await;
}

#[tokio::test]
async fn a_command_that_does_not_exist_ends_as_in_a_shell() {
    let worker = TestWorker::start().await;
    let result = worker.run(&job(&["no-such-command"])).await;
    assert_eq!((result.status, result.exit_code), (JobState::Failed, Some(127)));
    assert!(result.stderr.contains("no-such-command"), "{}", result.stderr);
    let result = worker.run(&job(&["/usr/bin/../share"])).await;
    assert_eq!(result.exit_code, Some(126));
    worker.stop().await;
}

#[tokio::test]
async fn the_wire_is_what_the_contract_says_byte_by_byte() {
    let worker = TestWorker::start().await;
    let token = worker.client.token.expose().to_owned();
    let body = r#"{"version":1,"task_id":"0190c5a2-0000-7000-8000-000000000001","job_id":"0190c5a2-0000-7000-8000-000000000002","sandbox":{"image":"sandbox/base","command":["sh","-c","printf 'a\"b\\n'; printf e >&2; exit 2"],"env":{"A":"1"},"timeout_seconds":30,"network_policy":"restricted"}}"#;
    let url = format!("{}/v1/worker/jobs:run", worker.client.base_url);
    let request = worker.client.http.post(url).bearer_auth(&token).body(body);
    let response = request.send().await.unwrap();
    assert_eq!(response.status().as_u16(), 200);
    assert_eq!(response.headers()["content-type"], "application/json");
    let text = response.text().await.unwrap();
    let parsed: Value = serde_json::from_str(&text).unwrap();
    let time = |name: &str| {
        let text = parsed[name].as_str().unwrap().to_owned();
        assert!(
            text.ends_with('Z') && chrono::DateTime::parse_from_rfc3339(&text).is_ok(),
            "{text}"
        );
        text
    };
    let golden = format!(
        r#"{{"version":1,"task_id":"0190c5a2-0000-7000-8000-000000000001","job_id":"0190c5a2-0000-7000-8000-000000000002","status":"failed","exit_code":2,"stdout":"a\"b\n","stderr":"e","started_at":"{}","ended_at":"{}","truncated":{{"stdout":false,"stderr":false}}}}"#,
        time("started_at"),
        time("ended_at")
    );
    assert_eq!(text, golden);
    worker.stop().await;
}

#[tokio::test]
async fn the_same_job_never_runs_twice_and_another_request_under_its_id_is_a_conflict() {
    let worker = TestWorker::start().await;
    let request = job(&["sh", "-c", "cat /proc/sys/kernel/random/uuid"]);
    let first = worker.run(&request).await;
    assert_eq!(worker.run(&request).await, first);
    let accepted = worker.client.accept(&request).await.unwrap();
    assert_eq!(accepted.result.as_ref(), Some(&first));
    let other = JobRequest { job_id: request.job_id, ..job(&["true"]) };
    let err = worker.client.accept(&other).await.unwrap_err();
    assert_eq!(err.problem_kind(), Some("job-conflict"), "{err}");
    let (status, _) = {
        let token = worker.client.token.expose();
        let body = serde_json::to_string(&other).unwrap();
        worker.raw("POST", "/v1/worker/jobs:run", Some(token), &body).await
    };
    assert_eq!(status, 409);
    worker.stop().await;
}

#[tokio::test]
async fn a_client_that_goes_away_does_not_end_its_job() {
    let worker = TestWorker::start().await;
    let request = job(&["sh", "-c", "sleep 1; echo done"]);
    let hasty = worker.client.run(&request, Duration::from_secs(60));
    assert!(
        tokio::time::timeout(Duration::from_millis(1200), async {
            tokio::select! {
                _ = hasty => panic!("too early"),
                () = worker.until_running(&request) => {}
            }
        })
        .await
        .is_ok()
    );
    assert_eq!(worker.run(&request).await.stdout, "done\n");
    worker.stop().await;
}

impl TestWorker {
    /// Until the job is known and runs.
    async fn until_running(&self, request: &JobRequest) {
        loop {
            let status = self.client.status(request.job_id).await.unwrap();
            if status.is_some_and(|status| status.state == JobState::Running) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

#[tokio::test]
async fn only_the_health_checks_need_no_token() {
    let worker = TestWorker::start().await;
    assert_eq!(worker.raw("GET", "/healthz", None, "").await, (200, "ok".into()));
    worker.script("true").await;
    assert_eq!(worker.raw("GET", "/readyz", None, "").await, (200, "ready".into()));
    for token in [None, Some(""), Some("wrong"), Some(&worker.client.token.expose()[1..])] {
        for (method, path) in [
            ("POST", "/v1/worker/jobs:run"),
            ("POST", "/v1/worker/jobs"),
            ("GET", "/v1/worker/jobs?state=finished"),
            ("POST", "/v1/worker/jobs:stop"),
            ("GET", "/v1/worker/capabilities"),
            ("GET", "/v1/worker/nothing"),
        ] {
            let (status, problem) = worker.raw(method, path, token, "{}").await;
            assert_eq!(
                (status, &problem["type"]),
                (401, &json!("urn:cynai:problem:unauthorized")),
                "{path}"
            );
        }
    }
    let stranger = WorkerClient { token: Token::random(), ..worker.client.clone() };
    assert!(matches!(stranger.capabilities().await, Err(ClientError::Unauthorized)));
    worker.stop().await;
}

#[tokio::test]
async fn bad_requests_are_refused_with_a_problem_that_says_what_to_change() {
    let worker = TestWorker::start().await;
    let token = worker.client.token.expose();
    let good = serde_json::to_value(job(&["true"])).unwrap();
    let with = |path: &str, value: Value| {
        let mut body = good.clone();
        let (parent, key) = path.rsplit_once('/').unwrap();
        body.pointer_mut(parent).unwrap()[key] = value;
        body.to_string()
    };
    for (body, kind, words) in [
        ("{".to_owned(), "invalid-request", "not valid"),
        (with("/version", json!(2)), "unsupported-payload-version", "version 2"),
        (with("/color", json!(1)), "invalid-request", "unknown field `color`"),
        (with("/sandbox/image", json!("nope")), "unknown-image", "known images: sandbox/base"),
        (with("/sandbox/mounts", json!(["x"])), "unknown-mount", "known mounts: none"),
        (with("/sandbox/command", json!([])), "invalid-request", "is empty"),
        (with("/sandbox/timeout_seconds", json!(-1)), "invalid-request", "-1"),
        (with("/sandbox/network_policy", json!("allowlist")), "invalid-request", "allowlist"),
        (with("/sandbox/resources", json!({"memory_mb": 1 << 20})), "invalid-request", "256"),
        (with("/sandbox/resources", json!({"cpus": 0.0})), "invalid-request", "cpus"),
        (with("/job_id", json!("x")), "invalid-request", "UUID"),
    ] {
        let (status, problem) = worker.raw("POST", "/v1/worker/jobs", Some(token), &body).await;
        assert_eq!(status, 400, "{problem}");
        assert_eq!(problem["type"], format!("urn:cynai:problem:{kind}"), "{problem}");
        assert!(problem["detail"].as_str().unwrap().contains(words), "{problem}");
        assert!(problem["instance"].is_string(), "{problem}");
    }
    let (status, _) =
        worker.raw("GET", "/v1/worker/jobs?state=finished&wait=61", Some(token), "").await;
    assert_eq!(status, 400);
    let (status, problem) =
        worker.raw("GET", &format!("/v1/worker/jobs/{}", JobId::new()), Some(token), "").await;
    assert_eq!((status, &problem["type"]), (404, &json!("urn:cynai:problem:unknown-job")));
    worker.stop().await;
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_with_or_without_a_length() {
    let worker = TestWorker::start_with(|config| config.max_request_bytes = 4096).await;
    let token = worker.client.token.expose();
    let (status, problem) =
        worker.raw("POST", "/v1/worker/jobs", Some(token), &"x".repeat(5000)).await;
    assert_eq!((status, &problem["type"]), (413, &json!("urn:cynai:problem:request-too-large")));
    let chunks = futures::stream::repeat_with(|| Ok::<_, std::io::Error>("x".repeat(1000)));
    let chunks = futures::StreamExt::take(chunks, 10);
    let url = format!("{}/v1/worker/jobs", worker.client.base_url);
    let request = worker.client.http.post(url).bearer_auth(token);
    let response = request.body(reqwest::Body::wrap_stream(chunks)).send().await.unwrap();
    assert_eq!(response.status().as_u16(), 413);
    worker.stop().await;
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_again_and_loses_nothing() {
    let worker = TestWorker::start_with(|config| {
        config.slots = Some(1);
        config.queue.jobs = 1;
    })
    .await;
    let first = job(&["sh", "-c", "sleep 30"]);
    worker.client.accept(&first).await.expect(INSTALL);
    worker.until(&first, JobState::Running).await;
    let second = job(&["echo", "second"]);
    worker.client.accept(&second).await.unwrap();
    let third = job(&["true"]);
    let err = worker.client.accept(&third).await.unwrap_err();
    assert!(
        matches!(err, ClientError::Busy { retry_after, .. } if retry_after.as_secs() > 0),
        "{err}"
    );
    assert_eq!(worker.client.status(third.job_id).await.unwrap(), None);
    worker.client.stop(first.task_id, first.job_id).await.unwrap();
    assert_eq!(worker.run(&second).await.stdout, "second\n");
    worker.stop().await;
}

#[tokio::test]
async fn unacknowledged_results_stop_new_jobs_and_acknowledging_lets_them_in() {
    let worker = TestWorker::start_with(|config| config.results.unacknowledged = 1).await;
    let first = job(&["true"]);
    worker.run(&first).await;
    let err = worker.client.accept(&job(&["true"])).await.unwrap_err();
    assert_eq!(err.problem_kind(), Some("worker-full"), "{err}");
    assert!(worker.client.acknowledge(first.job_id).await.unwrap());
    assert!(worker.client.acknowledge(first.job_id).await.unwrap());
    worker.script("true").await;
    assert!(!worker.client.acknowledge(JobId::new()).await.unwrap());
    worker.stop().await;
}

#[tokio::test]
async fn a_long_poll_returns_as_soon_as_a_job_ends_and_again_until_it_is_acknowledged() {
    let worker = TestWorker::start().await;
    let request = job(&["sh", "-c", "sleep 0.5; echo polled"]);
    worker.client.accept(&request).await.expect(INSTALL);
    let err = worker.client.acknowledge(request.job_id).await.unwrap_err();
    assert_eq!(err.problem_kind(), Some("job-not-finished"));
    let started = Instant::now();
    let found = worker.client.finished(Duration::from_secs(30), 10).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(20));
    assert_eq!(found.jobs.len(), 1);
    assert_eq!(found.jobs[0].result.as_ref().unwrap().stdout, "polled\n");
    assert_eq!(worker.client.finished(Duration::ZERO, 10).await.unwrap(), found);
    worker.client.acknowledge(request.job_id).await.unwrap();
    assert!(worker.client.finished(Duration::ZERO, 10).await.unwrap().jobs.is_empty());
    worker.stop().await;
}

#[tokio::test]
async fn a_result_survives_a_restart_until_it_is_acknowledged() {
    let worker = TestWorker::start().await;
    let request = job(&["echo", "kept"]);
    let result = worker.run(&request).await;
    let state = worker.stop().await;
    let worker = TestWorker::start_in(state, |_| ()).await;
    let found = worker.client.finished(Duration::ZERO, 10).await.unwrap();
    assert_eq!(found.jobs[0].result.as_ref(), Some(&result));
    worker.client.acknowledge(request.job_id).await.unwrap();
    let state = worker.stop().await;
    let worker = TestWorker::start_in(state, |_| ()).await;
    assert!(worker.client.finished(Duration::ZERO, 10).await.unwrap().jobs.is_empty());
    assert_eq!(worker.run(&request).await, result);
    worker.stop().await;
}

#[tokio::test]
async fn a_job_over_its_time_is_killed_and_reported_as_timeout_without_a_code() {
    let worker = TestWorker::start().await;
    let mut request =
        job(&["sh", "-c", "trap '' TERM; echo begun; sleep 61.25 & wait; sleep 61.25"]);
    request.sandbox.timeout_seconds = Some(1);
    let started = Instant::now();
    let result = worker.run(&request).await;
    assert_eq!((result.status, result.exit_code), (JobState::Timeout, None));
    assert_eq!(result.stdout, "begun\n");
    assert_eq!(result.error.unwrap().kind, JobErrorKind::TimedOut);
    assert!(started.elapsed() < Duration::from_secs(20));
    assert_eq!(processes_with("sleep 61.25"), 0);
    worker.stop().await;
}

#[tokio::test]
async fn a_stopped_job_may_clean_up_after_sigterm() {
    let worker = TestWorker::start_with(|config| config.timeouts.stop_grace_seconds = 20).await;
    let request = job(&[
        "sh",
        "-c",
        "trap 'echo cleaned; exit 0' TERM; echo ready; while :; do sleep 0.1; done",
    ]);
    worker.client.accept(&request).await.expect(INSTALL);
    worker.until(&request, JobState::Running).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let answer = worker.client.stop(request.task_id, request.job_id).await.unwrap();
    assert_eq!(answer.outcome, StopOutcome::Stopping);
    let result = worker.run(&request).await;
    assert_eq!((result.status, result.stdout.as_str()), (JobState::Canceled, "ready\ncleaned\n"));
    let answer = worker.client.stop(request.task_id, request.job_id).await.unwrap();
    assert_eq!((answer.outcome, answer.state), (StopOutcome::NotRunning, Some(JobState::Canceled)));
    let answer = worker.client.stop(request.task_id, JobId::new()).await.unwrap();
    assert_eq!((answer.outcome, answer.state), (StopOutcome::NotRunning, None));
    worker.stop().await;
}

#[tokio::test]
async fn a_job_that_ignores_sigterm_is_killed_after_the_grace() {
    let worker = TestWorker::start().await;
    let request = job(&["sh", "-c", "trap '' TERM; while :; do sleep 61.5; done"]);
    worker.client.accept(&request).await.expect(INSTALL);
    worker.until(&request, JobState::Running).await;
    worker.client.stop(request.task_id, request.job_id).await.unwrap();
    let result = worker.run(&request).await;
    assert_eq!((result.status, result.exit_code), (JobState::Canceled, None));
    assert_eq!(processes_with("sleep 61.5"), 0);
    worker.stop().await;
}

#[tokio::test]
async fn a_queued_job_is_canceled_at_once() {
    let worker = TestWorker::start_with(|config| config.slots = Some(1)).await;
    let first = job(&["sleep", "60"]);
    worker.client.accept(&first).await.expect(INSTALL);
    worker.until(&first, JobState::Running).await;
    let second = job(&["true"]);
    worker.client.accept(&second).await.unwrap();
    let answer = worker.client.stop(second.task_id, second.job_id).await.unwrap();
    assert_eq!(answer.outcome, StopOutcome::Canceled);
    assert_eq!(worker.run(&second).await.status, JobState::Canceled);
    worker.stop().await;
}

#[tokio::test]
async fn a_job_that_prints_100_mb_ends_and_only_the_head_is_kept() {
    let worker = TestWorker::start().await;
    let result = worker
        .script(
            "yes cynai | head -c 104857600; yes e | head -c 104857600 >&2; echo end >&2; exit 5",
        )
        .await;
    assert_eq!(result.exit_code, Some(5));
    assert_eq!((result.stdout.len(), result.stderr.len()), (256 << 10, 256 << 10));
    assert!(result.truncated.stdout && result.truncated.stderr);
    assert!(result.stdout.starts_with("cynai\ncynai\n"));
    worker.stop().await;
}

#[tokio::test]
async fn a_fork_bomb_is_bounded_and_cleaned_up() {
    let worker = TestWorker::start().await;
    let mut request =
        job(&["bash", "-c", "bomb() { sleep 62.5 & bomb | bomb & }; bomb; sleep 62.5"]);
    request.sandbox.resources = Some(Resources { processes: Some(24), ..Resources::default() });
    request.sandbox.timeout_seconds = Some(3);
    worker.client.accept(&request).await.expect(INSTALL);
    let mut most = 0;
    while !worker.client.status(request.job_id).await.unwrap().unwrap().state.is_terminal() {
        most = most.max(processes_with("62.5"));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // The programs around the job (bwrap twice) carry its text on their command line too.
    assert!((2..=28).contains(&most), "{most} processes");
    assert_eq!(processes_with("62.5"), 0);
    worker.script("true").await;
    worker.stop().await;
}

#[tokio::test]
async fn a_job_that_fills_its_disk_gets_an_error_and_not_the_hosts_disk() {
    let worker = TestWorker::start().await;
    let script = "for place in /workspace /tmp /dev/shm; do \
        head -c 200000000 /dev/zero >$place/big 2>/dev/null && echo \"$place is unbounded\"; \
        rm -f $place/big; done; \
        for place in / /usr /etc /dev /data /proc; do \
        (echo x >$place/x) 2>/dev/null && echo \"$place can be written\"; done; echo end";
    let result = worker.script(script).await;
    assert_eq!((result.exit_code, result.stdout.as_str()), (Some(0), "end\n"), "{}", result.stderr);
    worker.stop().await;
}

#[tokio::test]
async fn a_memory_hog_is_killed_and_the_result_says_so() {
    let worker = TestWorker::start().await;
    let capabilities = worker.client.capabilities().await.unwrap();
    let memory = capabilities.sandbox.enforcement.expect(INSTALL).memory;
    let mut request =
        job(&["sh", "-c", "head -c 400000000 /dev/zero | tail -c 400000000 >/dev/null"]);
    request.sandbox.resources = Some(Resources { memory_mb: Some(64), ..Resources::default() });
    let result = worker.run(&request).await;
    assert_eq!(result.status, JobState::Failed);
    if matches!(memory, Mechanism::CgroupV1 | Mechanism::CgroupV2) {
        assert_eq!(result.error.unwrap().kind, JobErrorKind::OutOfMemory);
    }
    worker.stop().await;
}

#[tokio::test]
async fn there_is_no_way_to_the_network_or_to_the_hosts_loopback() {
    let worker = TestWorker::start().await;
    let port = worker.client.base_url.rsplit(':').next().unwrap().to_owned();
    let name = format!("cynai-test-{}", Uuid::now_v7());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind_addr(&address).unwrap();
    let script = format!(
        "import socket\n\
         def attempt(family, address):\n\
         \x20   s = socket.socket(family, socket.SOCK_STREAM); s.settimeout(2)\n\
         \x20   try: s.connect(address); print('connected to', address)\n\
         \x20   except OSError: pass\n\
         attempt(socket.AF_INET, ('127.0.0.1', {port}))\n\
         attempt(socket.AF_INET, ('192.0.2.1', 80))\n\
         attempt(socket.AF_INET6, ('::1', {port}))\n\
         attempt(socket.AF_UNIX, '\\0{name}')\n\
         print(sorted(n for _, n in socket.if_nameindex()))\n"
    );
    // The same socket is there for those outside.
    std::os::unix::net::UnixStream::connect_addr(&address).unwrap();
    let result = worker.run(&job(&["python3", "-c", &script])).await;
    assert_eq!(
        (result.exit_code, result.stdout.as_str()),
        (Some(0), "['lo']\n"),
        "{}",
        result.stderr
    );
    worker.stop().await;
}

#[tokio::test]
async fn the_hosts_files_processes_and_secrets_are_out_of_sight() {
    let script = "for path in /root /home /etc/shadow /etc/ssh /var /opt /srv /mnt /sys /run; do \
        [ -e $path ] && echo \"$path exists\"; done; \
        ls -1 / | tr '\\n' ' '; \
        cat /proc/[0-9]*/environ | tr '\\0' '\\n' | grep -vE '^(PATH|HOME|LANG|PWD|OLDPWD|SHLVL|_|CYNAI_[A-Z_]*)=' ; \
        cat /proc/1/root/etc/shadow 2>/dev/null; \
        [ $(ls -d /proc/[0-9]* | wc -l) -lt 10 ] || echo 'too many processes'; true";
    check(script, 0, "bin data dev etc lib lib64 proc sbin tmp usr workspace ").await;
}

#[tokio::test]
async fn further_namespaces_and_privileges_are_refused() {
    let script = "for kind in --user --mount --net --pid; do \
        unshare $kind true 2>/dev/null && echo \"unshare $kind worked\"; done; \
        mount -t tmpfs none /workspace 2>/dev/null && echo mounted; \
        grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp)' /proc/self/status | head -3 | cut -f2; chroot / true 2>/dev/null && echo chroot; true";
    check(script, 0, "0000000000000000\n0000000000000000\n1\n").await;
}

#[tokio::test]
async fn daemons_are_gone_when_the_job_has_ended() {
    let worker = TestWorker::start().await;
    let result = worker
        .script("for i in 1 2 3 4 5; do (setsid sh -c 'setsid sleep 63.75 & sleep 63.75' &) ; done >/dev/null 2>&1; sleep 0.2; echo end")
        .await;
    assert_eq!((result.exit_code, result.stdout.as_str()), (Some(0), "end\n"));
    assert_eq!(processes_with("sleep 63.75"), 0);
    worker.stop().await;
}

#[tokio::test]
async fn standard_input_arrives_whole_and_may_be_left_unread() {
    let worker = TestWorker::start().await;
    let mut request = job(&["sh", "-c", "wc -c; "]);
    request.sandbox.stdin = Some("x".repeat(1 << 20));
    assert_eq!(worker.run(&request).await.stdout, "1048576\n");
    let mut request = job(&["echo", "ignored"]);
    request.sandbox.stdin = Some("x".repeat(1 << 20));
    assert_eq!(worker.run(&request).await.stdout, "ignored\n");
    assert_eq!(worker.run(&job(&["cat"])).await.stdout, "");
    worker.stop().await;
}

#[tokio::test]
async fn mounts_are_seen_read_only_wherever_they_lie() {
    let host = tempfile::tempdir().unwrap();
    let logs = host.path().join("deep/logs");
    fs::create_dir_all(&logs).unwrap();
    fs::write(logs.join("a.log"), "line\n").unwrap();
    let worker =
        TestWorker::start_with(|config| config.mounts = BTreeMap::from([("logs".into(), logs)]))
            .await;
    let mut request = job(&[
        "sh",
        "-c",
        "cat /data/logs/a.log; ls /data; (echo x >/data/logs/b) 2>/dev/null || echo read-only",
    ]);
    request.sandbox.mounts = vec!["logs".into(), "logs".into()];
    assert_eq!(worker.run(&request).await.stdout, "line\nlogs\nread-only\n");
    assert_eq!(worker.script("ls /data").await.stdout, "");
    worker.stop().await;
}

#[tokio::test]
async fn an_image_is_a_directory_that_the_operator_named() {
    let image = tempfile::tempdir().unwrap();
    for name in ["usr/bin", "etc", "tmp"] {
        fs::create_dir_all(image.path().join(name)).unwrap();
    }
    fs::write(image.path().join("etc/marker"), "mine").unwrap();
    let bound = |name: &str| fs::read_link(format!("/{name}")).ok();
    for name in ["bin", "lib", "lib64"] {
        let link = bound(name).unwrap_or_else(|| format!("usr/{name}").into());
        std::os::unix::fs::symlink(link, image.path().join(name)).unwrap();
    }
    for program in ["dash", "cat"] {
        fs::copy(format!("/usr/bin/{program}"), image.path().join("usr/bin").join(program))
            .unwrap();
    }
    std::os::unix::fs::symlink("dash", image.path().join("usr/bin/sh")).unwrap();
    for line in library_lines() {
        let target = image.path().join(line.trim_start_matches('/'));
        let target = fs::canonicalize(target.parent().unwrap())
            .map_or(target.clone(), |parent| parent.join(target.file_name().unwrap()));
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(&line, target).unwrap();
    }
    let path = image.path().to_owned();
    let worker =
        TestWorker::start_with(|config| drop(config.images.insert("tiny:1".into(), path))).await;
    let mut request = job(&["cat", "/etc/marker"]);
    request.sandbox.image = "tiny:1".into();
    let result = worker.run(&request).await;
    assert_eq!((result.exit_code, result.stdout.as_str()), (Some(0), "mine"), "{}", result.stderr);
    worker.stop().await;
}

/// The shared libraries of the programs that the tiny image holds.
fn library_lines() -> Vec<String> {
    let output = std::process::Command::new("ldd").args(["/usr/bin/dash", "/usr/bin/cat"]).output();
    let text = String::from_utf8(output.unwrap().stdout).unwrap();
    let mut lines: Vec<String> = text
        .split_ascii_whitespace()
        .filter(|word| word.starts_with('/') && !word.ends_with(':'))
        .map(|word| if word.starts_with("/lib") { format!("/usr{word}") } else { word.to_owned() })
        .collect();
    lines.sort();
    lines.dedup();
    lines
}

#[tokio::test]
async fn capabilities_tell_what_is_enforced_here() {
    let worker = TestWorker::start_with(|config| config.slots = Some(3)).await;
    let found = worker.client.capabilities().await.unwrap();
    assert!(found.sandbox.ready, "{INSTALL}: {:?}", found.sandbox.reason);
    assert_eq!((found.slots, found.images.as_slice()), (3, &["sandbox/base".to_owned()][..]));
    let enforced = found.sandbox.enforcement.unwrap();
    for mechanism in [enforced.memory, enforced.processes, enforced.cpus, enforced.disk] {
        assert_ne!(mechanism, Mechanism::None, "{enforced:?}");
    }
    assert_ne!(enforced.host_uid, 0);
    worker.stop().await;
}

#[tokio::test]
async fn without_a_sandbox_jobs_are_refused_with_the_reason_and_nothing_runs() {
    let worker = TestWorker::start_with(|config| config.bwrap = "/no/such/bwrap".into()).await;
    let request = job(&["true"]);
    let err = worker.client.run(&request, Duration::from_secs(5)).await.unwrap_err();
    assert_eq!(err.problem_kind(), Some("sandbox-unavailable"));
    assert!(err.to_string().contains("apt-get install bubblewrap"), "{err}");
    let (status, text) = worker.raw("GET", "/readyz", None, "").await;
    assert_eq!(status, 503);
    assert!(text.as_str().unwrap().contains("apt-get install bubblewrap"), "{text}");
    assert_eq!(worker.client.status(request.job_id).await.unwrap(), None);
    assert!(!worker.client.capabilities().await.unwrap().sandbox.ready);
    worker.stop().await;
}

#[tokio::test]
async fn a_slow_head_of_a_request_is_cut_off() {
    let worker = TestWorker::start().await;
    let address = worker.client.base_url.trim_start_matches("http://").to_owned();
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n").await.unwrap();
    let mut text = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(30), stream.read_to_end(&mut text)).await;
    assert!(ended.is_ok(), "the connection is still open");
    worker.stop().await;
}
