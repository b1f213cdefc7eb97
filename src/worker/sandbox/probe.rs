//! Trying what this machine can enforce: small sandboxes that do what a bad job would do.
//!
//! For each limit the control group is tried first, then the resource limit of a process. A limit that
//! no trial could confirm is reported as `none`; a sandbox that is not isolated is not used at all.
//!
//! **Invariant:** nothing is reported as enforced that did not stop a trial on this machine.

use std::collections::BTreeMap;
use std::time::Duration;

use uuid::Uuid;

use super::bubblewrap::{Bubblewrap, Plan, version};
use super::cgroup::Controller;
use super::{
    Enforcement, Exit, Mechanism, SandboxError, SandboxHandle, SandboxLimits, SandboxSpec,
};
use crate::ids::JobId;
use crate::worker::config::BASE_IMAGE;
use crate::worker::wire::NetworkPolicy;

/// How long one trial may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// What a trial's script ends with when its harmless first half did not work.
const BROKEN: i32 = 9;

/// Looks for everything that a sandbox must not have; prints what it found and ends with 1.
const ISOLATION: &str = "
bad() { echo \"$1\"; exit 1; }
[ -e /etc/shadow ] && bad 'the host'\\''s accounts are visible'
[ -e /home ] && bad 'home directories are visible'
{ touch /probe || touch /usr/probe || touch /dev/probe; } 2>/dev/null && bad 'the root can be written'
touch /workspace/probe /tmp/probe || bad 'the workspace cannot be written'
tail -n +3 /proc/net/dev | grep -qv '^ *lo:' && bad 'there is a network interface'
grep -q 'NoNewPrivs:.*1' /proc/self/status || bad 'privileges can be gained'
grep -q 'CapEff:.*0000000000000000' /proc/self/status || bad 'there are capabilities'
[ \"$$\" -lt 10 ] || bad 'there is no process namespace'
{ unshare -U true; } 2>/dev/null && bad 'further namespaces can be made'
exit 0";

const MEMORY: &str = "head -c 4194304 /dev/zero | tail -c 4194304 >/dev/null || exit 9
head -c 268435456 /dev/zero | tail -c 268435456 >/dev/null";
const PROCESSES: &str = "/bin/sh -c : || exit 9
i=0; while [ $i -lt 60 ]; do sleep 4 & i=$((i+1)); done";
const DISK: &str = "head -c 262144 /dev/zero >/workspace/a || exit 9
head -c 4194304 /dev/zero >/workspace/b";
const BUSY: &str = "while :; do :; done";

/// What happened in one trial.
struct Trial {
    /// `None` when it had to be killed.
    exit: Option<Exit>,
    throttled: u64,
}

impl Trial {
    fn code(&self) -> Option<i32> {
        self.exit.as_ref().and_then(|exit| exit.code)
    }

    /// Whether the harmless half worked and the harmful half did not.
    fn stopped(&self) -> bool {
        self.exit.as_ref().is_none_or(|exit| exit.out_of_memory)
            || self.code().is_some_and(|code| code != 0 && code != BROKEN)
    }
}

/// Finds out how sandboxes can be limited, keeps that as the driver's plan, and reports it.
pub(super) async fn run(driver: &Bubblewrap) -> Result<Enforcement, SandboxError> {
    let name = version(&driver.bwrap).await?;
    let plan = driver.plan.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
    let mut bare = plan.clone();
    for controller in Controller::ALL {
        bare.cgroups.give_up(controller);
    }
    isolated(driver, &bare).await?;
    let (memory, processes, cpus, disk) = futures::join!(
        memory(driver, &plan, &bare),
        processes(driver, &plan, &bare),
        cpus(driver, &plan, &bare),
        disk(driver, &bare),
    );
    let mut plan = plan;
    for (controller, mechanism) in
        [(Controller::Memory, memory), (Controller::Pids, processes), (Controller::Cpu, cpus)]
    {
        if plan.cgroups.mechanism(controller) != Some(mechanism) {
            plan = plan.without(controller);
        }
    }
    plan.rlimits.memory = memory == Mechanism::Prlimit;
    plan.rlimits.processes = processes == Mechanism::Prlimit;
    plan.rlimits.cpus = cpus == Mechanism::Prlimit;
    // The plan as it will be used must work as well as its parts did.
    isolated(driver, &plan).await?;
    *driver.plan.write().unwrap_or_else(std::sync::PoisonError::into_inner) = plan;
    Ok(report(name, driver.host_uid(), [memory, processes, cpus, disk]))
}

async fn isolated(driver: &Bubblewrap, plan: &Plan) -> Result<(), SandboxError> {
    let unavailable = |reason: String| Err(SandboxError::Unavailable { reason });
    match trial(driver, plan, ISOLATION, limits(), PATIENCE).await {
        Ok(Trial { exit: None, .. }) => {
            unavailable("a trial sandbox did not end in time".to_owned())
        }
        Ok(trial) if trial.code() == Some(0) => Ok(()),
        Ok(trial) => {
            let found =
                trial.exit.map(|exit| exit.stdout.text + &exit.stderr.text).unwrap_or_default();
            unavailable(format!("a trial sandbox is not isolated: {}", found.trim()))
        }
        Err(SandboxError::Setup { reason }) => {
            unavailable(format!("a trial sandbox could not be made: {reason}{}", hint(&reason)))
        }
        Err(err) => Err(err),
    }
}

/// What usually helps, for the messages of bubblewrap that people meet.
fn hint(reason: &str) -> &'static str {
    if reason.contains("namespace") || reason.contains("uid map") {
        "; user namespaces must be allowed: see sysctl user.max_user_namespaces, and on Ubuntu \
         kernel.apparmor_restrict_unprivileged_userns or an AppArmor profile for bwrap"
    } else if reason.contains("bwrap") && reason.contains("not found") {
        "; on Debian: apt-get install bubblewrap"
    } else if reason.contains("setpriv") {
        "; setpriv is part of util-linux"
    } else {
        ""
    }
}

async fn memory(driver: &Bubblewrap, plan: &Plan, bare: &Plan) -> Mechanism {
    let tight = SandboxLimits { memory_bytes: 64 << 20, ..limits() };
    let with_rlimit = |mut plan: Plan| {
        plan.rlimits.memory = true;
        plan
    };
    first_that_stops(driver, plan, with_rlimit(bare.clone()), Controller::Memory, MEMORY, tight)
        .await
}

async fn processes(driver: &Bubblewrap, plan: &Plan, bare: &Plan) -> Mechanism {
    let tight = SandboxLimits { processes: 16, ..limits() };
    let with_rlimit = |mut plan: Plan| {
        plan.rlimits.processes = true;
        plan
    };
    first_that_stops(driver, plan, with_rlimit(bare.clone()), Controller::Pids, PROCESSES, tight)
        .await
}

async fn first_that_stops(
    driver: &Bubblewrap,
    plan: &Plan,
    fallback: Plan,
    controller: Controller,
    script: &str,
    limits: SandboxLimits,
) -> Mechanism {
    // A shell may retry a fork for a while: not being done in time is being stopped.
    let patience = Duration::from_secs(3);
    let stops = async |plan: &Plan| {
        trial(driver, plan, script, limits, patience).await.is_ok_and(|trial| trial.stopped())
    };
    match plan.cgroups.mechanism(controller) {
        Some(mechanism) if stops(plan).await => mechanism,
        _ if stops(&fallback).await => Mechanism::Prlimit,
        _ => Mechanism::None,
    }
}

async fn cpus(driver: &Bubblewrap, plan: &Plan, bare: &Plan) -> Mechanism {
    let tight = SandboxLimits { cpus: 0.1, wall_seconds: 10, ..limits() };
    if let Some(mechanism) = plan.cgroups.mechanism(Controller::Cpu) {
        let burnt = trial(driver, plan, BUSY, tight, Duration::from_millis(400)).await;
        if burnt.is_ok_and(|trial| trial.throttled > 0) {
            return mechanism;
        }
    }
    let mut fallback = bare.clone();
    fallback.rlimits.cpus = true;
    match trial(driver, &fallback, BUSY, tight, PATIENCE).await {
        Ok(trial) if trial.code().is_some_and(|code| code > 128) => Mechanism::Prlimit,
        _ => Mechanism::None,
    }
}

async fn disk(driver: &Bubblewrap, bare: &Plan) -> Mechanism {
    let tight = SandboxLimits { disk_bytes: 1 << 20, ..limits() };
    match trial(driver, bare, DISK, tight, PATIENCE).await {
        Ok(trial) if trial.exit.is_some() && trial.stopped() => Mechanism::Tmpfs,
        _ => Mechanism::None,
    }
}

fn limits() -> SandboxLimits {
    SandboxLimits {
        memory_bytes: 512 << 20,
        processes: 128,
        cpus: 1.0,
        disk_bytes: 8 << 20,
        tmp_bytes: 1 << 20,
        output_bytes: 4096,
        wall_seconds: 60,
    }
}

async fn trial(
    driver: &Bubblewrap,
    plan: &Plan,
    script: &str,
    limits: SandboxLimits,
    patience: Duration,
) -> Result<Trial, SandboxError> {
    let spec = SandboxSpec {
        task_id: Uuid::nil(),
        job_id: JobId::new(),
        image: BASE_IMAGE.to_owned(),
        command: ["sh", "-c", script].map(str::to_owned).to_vec(),
        env: BTreeMap::new(),
        stdin: None,
        mounts: Vec::new(),
        network: NetworkPolicy::None,
        limits,
    };
    let mut handle = driver.launch(plan, spec).await?;
    if let Ok(exit) = tokio::time::timeout(patience, handle.wait()).await {
        return Ok(Trial { exit: Some(exit?), throttled: 0 });
    }
    let throttled = handle.cgroup.throttled();
    handle.kill();
    handle.wait().await?;
    Ok(Trial { exit: None, throttled })
}

fn report(driver: String, host_uid: u32, found: [Mechanism; 4]) -> Enforcement {
    let [memory, processes, cpus, disk] = found;
    let mut notes = Vec::new();
    for (limit, mechanism) in
        [("memory", memory), ("processes", processes), ("cpus", cpus), ("disk", disk)]
    {
        match mechanism {
            Mechanism::None => notes.push(format!("{limit}: nothing enforces this limit here")),
            Mechanism::Prlimit => notes.push(format!(
                "{limit}: {}; control groups that the agent may write to would bind the job as a whole",
                match limit {
                    "memory" => "bound for each process by itself, as address space",
                    "cpus" => "bound for each process by itself, as seconds of CPU time",
                    _ => "bound for all sandboxes' processes in one user namespace",
                }
            )),
            _ => {}
        }
    }
    let isolation = [
        "no network interface but loopback",
        "read-only root",
        "private /tmp and /workspace",
        "no capabilities and no new privileges",
        "own process, user, ipc, uts and cgroup namespaces",
        "no further namespaces",
    ];
    let isolation = isolation.map(str::to_owned).to_vec();
    let wall_time = Mechanism::Timer;
    Enforcement { driver, memory, processes, cpus, disk, wall_time, host_uid, isolation, notes }
}
