//! Running what was accepted: one sandbox for each job, as many at once as there are slots.
//!
//! **Invariant:** a slot is free again only when the job's result is on disk and its sandbox is gone.
//! **Invariant:** nothing here outlives [`Jobs::run`]: what still runs when it returns has been killed.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{Jobs, canceled_in_queue, without_output};
use crate::ids::JobId;
use crate::worker::config::WorkerConfig;
use crate::worker::effective::Effective;
use crate::worker::sandbox::{
    Exit, SandboxDriver, SandboxError, SandboxHandle, SandboxLimits, SandboxSpec,
};
use crate::worker::wire::{
    InvalidRequest, JobError, JobErrorKind, JobRequest, JobResult, JobState, Resources, Truncated,
};

const MIB: u64 = 1 << 20;

/// How a sandbox's life ended.
enum End {
    Itself(Exit),
    TimedOut(Exit),
    Stopped(Exit),
}

impl Jobs {
    /// Runs jobs until told to stop; then waits `drain` for what runs, and kills the rest.
    pub async fn run(
        &self,
        driver: Arc<dyn SandboxDriver>,
        drain: Duration,
        shutdown: CancellationToken,
    ) {
        let slots = self.0.config.slots();
        let mut running: JoinSet<()> = JoinSet::new();
        let mut names = HashMap::new();
        while !shutdown.is_cancelled() {
            while running.len() < slots
                && let Some((request, stop)) = self.next()
            {
                let job = (request.task_id, request.job_id);
                let one = Self::run_one(self.clone(), Arc::clone(&driver), request, stop);
                names.insert(running.spawn(one).id(), job);
            }
            tokio::select! {
                () = self.0.work.notified() => {}
                Some(ended) = running.join_next_with_id() => self.reaped(ended, &mut names).await,
                () = shutdown.cancelled() => {}
            }
        }
        self.close();
        let finish = async { while running.join_next().await.is_some() {} };
        if timeout(drain, finish).await.is_err() {
            // Their records still say `accepted`: the next agent reports them as lost.
            running.shutdown().await;
        }
    }

    async fn reaped(
        &self,
        ended: Result<(tokio::task::Id, ()), JoinError>,
        names: &mut HashMap<tokio::task::Id, (Uuid, JobId)>,
    ) {
        let (id, panicked) = match ended {
            Ok((id, ())) => (id, false),
            Err(err) => (err.id(), true),
        };
        if let Some((task_id, job_id)) = names.remove(&id)
            && panicked
        {
            tracing::error!(job.id = %job_id, "the task of job {job_id} panicked");
            let now = self.0.clock.now();
            let message = "the worker's agent failed while the job ran".to_owned();
            let error = JobError { kind: JobErrorKind::AgentEnded, message };
            let lost = without_output(task_id, job_id, JobState::Lost, (now, now), Some(error));
            self.end(lost).await;
        }
    }

    /// Takes the next job from the queue and marks it as running.
    fn next(&self) -> Option<(JobRequest, CancellationToken)> {
        let now = self.0.clock.now();
        let mut table = self.table();
        let (job, request) = table.queue.pop_front()?;
        table.queued_bytes -= request.size_bytes();
        let entry = table.jobs.get_mut(&job)?;
        entry.started_at = Some(now);
        entry.state.send_replace(Some(JobState::Running));
        Some((request, entry.stop.clone()))
    }

    async fn run_one(
        self,
        driver: Arc<dyn SandboxDriver>,
        request: JobRequest,
        stop: CancellationToken,
    ) {
        let (task_id, job_id) = (request.task_id, request.job_id);
        let started_at = self.0.clock.now();
        if stop.is_cancelled() {
            return self.end(canceled_in_queue(task_id, job_id, started_at)).await;
        }
        let effective = Arc::clone(&self.0.in_force.borrow());
        let wall = wall_time(&effective, request.sandbox.timeout_seconds);
        let cut = request.sandbox.timeout_seconds.is_some_and(|asked| asked > wall.as_secs());
        let cut = cut.then_some(effective.max_seconds.rule.as_str());
        let outcome = match spec(&self.0.config, &effective, request, wall) {
            Ok(spec) => match driver.start(spec).await {
                Ok(handle) => self.supervise(handle, wall, stop).await,
                Err(err) => Err(err),
            },
            Err(err) => Err(SandboxError::Setup { reason: err.to_string() }),
        };
        let times = (started_at, self.0.clock.now());
        let result = match outcome {
            Ok(end) => ended(task_id, job_id, times, (wall, cut), end),
            Err(err) => {
                tracing::error!(error = &err as &dyn std::error::Error, job.id = %job_id, "the sandbox of job {job_id} failed");
                let message = "the sandbox failed; the worker's log has the reason".to_owned();
                let error = JobError { kind: JobErrorKind::SandboxFailed, message };
                let failed = without_output(task_id, job_id, JobState::Failed, times, Some(error));
                JobResult { exit_code: Some(125), ..failed }
            }
        };
        tracing::info!(job.id = %job_id, task.id = %task_id, status = result.status.as_str(), exit_code = result.exit_code, "job {job_id} ended");
        self.end(result).await;
    }

    async fn supervise(
        &self,
        mut handle: Box<dyn SandboxHandle>,
        wall: Duration,
        stop: CancellationToken,
    ) -> Result<End, SandboxError> {
        let deadline = tokio::time::Instant::now() + wall;
        tokio::select! {
            biased;
            exit = handle.wait() => return Ok(End::Itself(exit?)),
            () = stop.cancelled() => {}
            () = tokio::time::sleep_until(deadline) => {
                handle.kill();
                return Ok(End::TimedOut(handle.wait().await?));
            }
        }
        handle.terminate();
        tokio::select! {
            biased;
            exit = handle.wait() => return Ok(End::Stopped(exit?)),
            () = sleep(self.0.config.stop_grace()) => handle.kill(),
        }
        Ok(End::Stopped(handle.wait().await?))
    }
}

/// The smallest of what was asked for, or the default, and the worker's maximum.
fn wall_time(effective: &Effective, requested: Option<u64>) -> Duration {
    let requested = requested.unwrap_or(effective.default_seconds);
    Duration::from_secs(requested.min(effective.max_seconds.value))
}

/// Checks what depends on this worker, before a job is accepted.
pub(in crate::worker) fn admissible(
    config: &WorkerConfig,
    request: &JobRequest,
) -> Result<(), InvalidRequest> {
    request.validate()?;
    let sandbox = &request.sandbox;
    if !config.has_image(&sandbox.image) {
        let known = config.image_names().join(", ");
        return Err(InvalidRequest::UnknownImage { image: sandbox.image.clone(), known });
    }
    for mount in &sandbox.mounts {
        if !config.mounts.contains_key(mount) {
            let names: Vec<&str> = config.mounts.keys().map(String::as_str).collect();
            let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            return Err(InvalidRequest::UnknownMount { mount: mount.clone(), known });
        }
    }
    resolve(config, sandbox.resources.unwrap_or_default(), Duration::ZERO).map(drop)
}

fn spec(
    config: &WorkerConfig,
    effective: &Effective,
    request: JobRequest,
    wall: Duration,
) -> Result<SandboxSpec, InvalidRequest> {
    let JobRequest { task_id, job_id, sandbox, .. } = request;
    let limits = resolve(config, sandbox.resources.unwrap_or_default(), wall)?;
    let mut mounts = sandbox.mounts;
    mounts.sort();
    mounts.dedup();
    Ok(SandboxSpec {
        task_id,
        job_id,
        image: sandbox.image,
        command: sandbox.command,
        env: sandbox.env,
        stdin: sandbox.stdin,
        mounts,
        network: sandbox.network_policy.unwrap_or(effective.network),
        limits,
    })
}

/// The worker's limits, or the stricter ones that the job asks for.
fn resolve(
    config: &WorkerConfig,
    asked: Resources,
    wall: Duration,
) -> Result<SandboxLimits, InvalidRequest> {
    let limits = &config.limits;
    Ok(SandboxLimits {
        memory_bytes: whole("memory_mb", asked.memory_mb, 32, limits.memory_mb)? * MIB,
        processes: whole("processes", asked.processes, 4, limits.processes)?,
        cpus: stricter("cpus", asked.cpus, 0.05, limits.cpus)?,
        disk_bytes: whole("disk_mb", asked.disk_mb, 1, limits.disk_mb)? * MIB,
        tmp_bytes: limits.tmp_mb * MIB,
        output_bytes: limits.output_bytes,
        wall_seconds: wall.as_secs(),
    })
}

fn whole(
    field: &'static str,
    asked: Option<u64>,
    min: u64,
    max: u64,
) -> Result<u64, InvalidRequest> {
    let asked = asked.unwrap_or(max);
    #[expect(clippy::cast_precision_loss, reason = "only shown")]
    let [requested, low, high] = [asked as f64, min as f64, max as f64];
    if (min..=max).contains(&asked) {
        Ok(asked)
    } else {
        Err(InvalidRequest::Resource { field, requested, min: low, max: high })
    }
}

fn stricter(
    field: &'static str,
    asked: Option<f64>,
    min: f64,
    max: f64,
) -> Result<f64, InvalidRequest> {
    match asked {
        None => Ok(max),
        Some(value) if value >= min && value <= max => Ok(value),
        Some(requested) => Err(InvalidRequest::Resource { field, requested, min, max }),
    }
}

fn ended(
    task_id: Uuid,
    job_id: JobId,
    times: (DateTime<Utc>, DateTime<Utc>),
    (wall, cut): (Duration, Option<&str>),
    end: End,
) -> JobResult {
    let (exit, status, exit_code, error) = match end {
        End::TimedOut(exit) => {
            let mut message = format!("it was killed after {} seconds", wall.as_secs());
            if let Some(rule) = cut {
                message += &format!(", the most that {rule} allows");
            }
            (exit, JobState::Timeout, None, Some((JobErrorKind::TimedOut, message)))
        }
        End::Stopped(exit) => {
            let message = "it was stopped on request".to_owned();
            (exit, JobState::Canceled, None, Some((JobErrorKind::Stopped, message)))
        }
        End::Itself(exit) => {
            // Without a code of its own the sandbox was killed as a whole, as SIGKILL does.
            let code = exit.code.unwrap_or(137);
            let status = if code == 0 { JobState::Completed } else { JobState::Failed };
            let message = || "the kernel killed a process at the memory limit".to_owned();
            let oom = exit.out_of_memory && code != 0;
            (exit, status, Some(code), oom.then(|| (JobErrorKind::OutOfMemory, message())))
        }
    };
    let error = error.map(|(kind, message)| JobError { kind, message });
    let base = without_output(task_id, job_id, status, times, error);
    let truncated = Truncated { stdout: exit.stdout.truncated, stderr: exit.stderr.truncated };
    JobResult { exit_code, stdout: exit.stdout.text, stderr: exit.stderr.text, truncated, ..base }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::config::Token;
    use crate::worker::sandbox::Captured;

    fn config() -> WorkerConfig {
        WorkerConfig::new(Token::random(), "/nowhere")
    }

    #[test]
    fn the_wall_time_is_the_smallest_of_what_applies() {
        let check = |requested, expected| {
            let effective = Effective::standalone(&config());
            assert_eq!(wall_time(&effective, requested), Duration::from_secs(expected));
        };
        check(None, 900);
        check(Some(5), 5);
        check(Some(100_000), 3600);
    }

    #[test]
    fn a_job_may_ask_for_less_than_the_worker_allows_and_never_for_more() {
        let check = |asked: Resources, expected: Option<&str>| {
            let found = resolve(&config(), asked, Duration::ZERO).err().map(|err| err.to_string());
            assert_eq!(found.as_deref(), expected);
        };
        check(Resources::default(), None);
        check(Resources { memory_mb: Some(64), cpus: Some(0.5), ..Resources::default() }, None);
        check(
            Resources { memory_mb: Some(2000), ..Resources::default() },
            Some(
                "`sandbox.resources.memory_mb` is 2000, but must be between 32 and this worker's 1024",
            ),
        );
        check(
            Resources { cpus: Some(f64::NAN), ..Resources::default() },
            Some("`sandbox.resources.cpus` is NaN, but must be between 0.05 and this worker's 1"),
        );
    }

    #[test]
    fn every_end_has_its_state_its_code_and_its_reason() {
        let exit = |code, out_of_memory| Exit {
            code,
            out_of_memory,
            stdout: Captured::default(),
            stderr: Captured::default(),
        };
        let check = |end, status, code, kind: Option<JobErrorKind>| {
            let times = (DateTime::UNIX_EPOCH, DateTime::UNIX_EPOCH);
            let job = JobId(Uuid::nil());
            let result = ended(Uuid::nil(), job, times, (Duration::from_secs(9), None), end);
            let found = (result.status, result.exit_code, result.error.map(|error| error.kind));
            assert_eq!(found, (status, code, kind));
        };
        check(End::Itself(exit(Some(0), false)), JobState::Completed, Some(0), None);
        check(End::Itself(exit(Some(0), true)), JobState::Completed, Some(0), None);
        check(End::Itself(exit(Some(3), false)), JobState::Failed, Some(3), None);
        let oom = Some(JobErrorKind::OutOfMemory);
        check(End::Itself(exit(Some(137), true)), JobState::Failed, Some(137), oom);
        check(End::Itself(exit(None, true)), JobState::Failed, Some(137), oom);
        let timed_out = Some(JobErrorKind::TimedOut);
        check(End::TimedOut(exit(Some(0), false)), JobState::Timeout, None, timed_out);
        let stopped = Some(JobErrorKind::Stopped);
        check(End::Stopped(exit(Some(0), false)), JobState::Canceled, None, stopped);
    }
}
