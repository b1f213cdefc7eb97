//! Control groups: limits that bind a job as a whole, on version 2 or version 1 hosts, or both at once.
//!
//! Each agent makes one group per hierarchy, named after its state directory, and one group in it for
//! each job. What cannot be made is left to the next mechanism; the probe finds out what really holds.
//!
//! **Invariant:** a group is removed only after it was seen empty.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Mechanism, SandboxLimits};
use crate::ids::JobId;

/// The processes of the sandbox program itself: the outer one and the sandbox's init.
const OVERHEAD_PROCESSES: u64 = 2;
/// The period of CPU quotas.
const PERIOD_MICROS: u64 = 100_000;

/// A resource that a group can limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Controller {
    Memory,
    Pids,
    Cpu,
}

impl Controller {
    pub(super) const ALL: [Self; 3] = [Self::Memory, Self::Pids, Self::Cpu];

    fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Pids => "pids",
            Self::Cpu => "cpu",
        }
    }
}

/// The groups of this agent, one for each hierarchy that it could use.
#[derive(Debug, Clone, Default)]
pub(super) struct Cgroups {
    controllers: BTreeMap<Controller, (Mechanism, PathBuf)>,
    /// A version 2 group without controllers, on hosts where version 1 has them.
    plain: Option<PathBuf>,
}

/// The groups of one job.
#[derive(Debug, Default)]
pub(super) struct JobCgroup {
    directories: Vec<PathBuf>,
    memory: Option<PathBuf>,
    cpu: Option<PathBuf>,
}

impl Cgroups {
    /// Makes the agent's groups where that is possible. `agent` is unique to the state directory.
    pub(super) fn discover(agent: &str) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let mounts = Mounts::parse(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"));
        let mut found = Self::default();
        if let Some(unified) = &mounts.unified {
            let roots = [Some(unified.own.as_path()), is_root().then_some(unified.mount.as_path())];
            found.use_unified(roots.into_iter().flatten(), agent);
        }
        for controller in Controller::ALL {
            if found.controllers.contains_key(&controller) {
                continue;
            }
            let Some(own) = mounts.legacy.get(controller.name()) else { continue };
            let group = own.join(agent);
            if make(&group).is_ok() {
                found.controllers.insert(controller, (Mechanism::CgroupV1, group));
            }
        }
        found
    }

    fn use_unified<'a>(&mut self, roots: impl Iterator<Item = &'a Path>, agent: &str) {
        for root in roots {
            let group = root.join(agent);
            if make(&group).is_err() {
                continue;
            }
            let wanted: Vec<Controller> = Controller::ALL
                .into_iter()
                .filter(|controller| enable(root, &group, *controller, agent))
                .collect();
            if wanted.is_empty() && self.plain.is_none() && group.join("cgroup.kill").exists() {
                self.plain = Some(group);
                continue;
            }
            for controller in wanted {
                self.controllers.insert(controller, (Mechanism::CgroupV2, group.clone()));
            }
            if !self.controllers.is_empty() {
                return;
            }
        }
    }

    /// What would limit this resource; the probe tells whether it does.
    pub(super) fn mechanism(&self, controller: Controller) -> Option<Mechanism> {
        self.controllers.get(&controller).map(|(mechanism, _)| *mechanism)
    }

    /// Forgets a controller that was seen not to work.
    pub(super) fn give_up(&mut self, controller: Controller) {
        self.controllers.remove(&controller);
    }

    fn groups(&self) -> Vec<&PathBuf> {
        let mut groups: Vec<&PathBuf> = self.controllers.values().map(|(_, path)| path).collect();
        groups.extend(&self.plain);
        groups.sort();
        groups.dedup();
        groups
    }

    /// Makes the groups of one job and writes its limits into them.
    pub(super) fn job(&self, job: JobId, limits: &SandboxLimits) -> io::Result<JobCgroup> {
        let mut made = JobCgroup::default();
        for group in self.groups() {
            let directory = group.join(format!("job-{job}"));
            made.directories.push(directory.clone());
            make(&directory)?;
        }
        for (controller, (mechanism, group)) in &self.controllers {
            let directory = group.join(format!("job-{job}"));
            match controller {
                Controller::Memory => {
                    limit_memory(&directory, *mechanism, limits.memory_bytes)?;
                    made.memory = Some(directory);
                }
                Controller::Pids => {
                    let most = limits.processes + OVERHEAD_PROCESSES;
                    write(&directory, "pids.max", &most.to_string())?;
                }
                Controller::Cpu => {
                    limit_cpus(&directory, *mechanism, limits.cpus)?;
                    made.cpu = Some(directory);
                }
            }
        }
        Ok(made)
    }

    /// The groups that jobs left behind: of a predecessor, or of sandboxes that were dropped.
    pub(super) fn leftovers(&self) -> JobCgroup {
        let mut found = JobCgroup::default();
        for group in self.groups() {
            let Ok(entries) = fs::read_dir(group) else { continue };
            let jobs =
                entries.flatten().filter(|e| e.file_name().to_string_lossy().starts_with("job-"));
            found.directories.extend(jobs.map(|entry| entry.path()));
        }
        found
    }

    /// Removes the agent's own groups, when nothing is in them.
    pub(super) fn remove(&self) {
        for group in self.groups() {
            let _ = fs::remove_dir(group);
        }
    }
}

impl JobCgroup {
    /// The files that a process writes itself into to join.
    pub(super) fn entrances(&self) -> Vec<PathBuf> {
        self.directories.iter().map(|directory| directory.join("cgroup.procs")).collect()
    }

    /// Whether the kernel killed a process of this job because of the memory limit.
    pub(super) fn out_of_memory(&self) -> bool {
        let Some(directory) = &self.memory else { return false };
        ["memory.events", "memory.oom_control"].iter().any(|file| {
            let text = fs::read_to_string(directory.join(file)).unwrap_or_default();
            counter(&text, "oom_kill") > 0
        })
    }

    /// How often the job had to wait because its share of the processors was used up.
    pub(super) fn throttled(&self) -> u64 {
        let Some(directory) = &self.cpu else { return 0 };
        counter(&fs::read_to_string(directory.join("cpu.stat")).unwrap_or_default(), "nr_throttled")
    }

    /// The ids of the processes that are in one of the groups.
    pub(super) fn members(&self) -> Vec<i32> {
        let mut members: Vec<i32> = self
            .entrances()
            .iter()
            .filter_map(|file| fs::read_to_string(file).ok())
            .flat_map(|text| {
                text.lines().filter_map(|line| line.parse().ok()).collect::<Vec<i32>>()
            })
            .collect();
        members.sort_unstable();
        members.dedup();
        members
    }

    /// Kills every member at once where the kernel can do that.
    pub(super) fn kill(&self) {
        for directory in &self.directories {
            let file = directory.join("cgroup.kill");
            if file.exists() {
                let _ = fs::write(file, "1");
            }
        }
    }

    /// Removes the groups; false when one is still in use.
    pub(super) fn remove(&self) -> bool {
        let mut all_gone = true;
        for directory in &self.directories {
            let removed = fs::remove_dir(directory);
            all_gone &= removed.is_ok() || !directory.exists();
        }
        all_gone
    }
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

fn make(directory: &Path) -> io::Result<()> {
    match fs::create_dir(directory) {
        Err(err) if err.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

fn write(directory: &Path, file: &str, value: &str) -> io::Result<()> {
    fs::write(directory.join(file), value)
}

fn limit_memory(directory: &Path, mechanism: Mechanism, bytes: u64) -> io::Result<()> {
    let bytes = bytes.to_string();
    if mechanism == Mechanism::CgroupV2 {
        write(directory, "memory.max", &bytes)?;
        // Swap may be off, and the group option is newer than the rest: both are extras.
        let _ = write(directory, "memory.swap.max", "0");
        let _ = write(directory, "memory.oom.group", "1");
        return Ok(());
    }
    write(directory, "memory.limit_in_bytes", &bytes)?;
    let _ = write(directory, "memory.memsw.limit_in_bytes", &bytes);
    Ok(())
}

fn limit_cpus(directory: &Path, mechanism: Mechanism, cpus: f64) -> io::Result<()> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "the configuration bounds it between 0.05 and 1024 processors"
    )]
    let quota = (cpus * PERIOD_MICROS as f64) as u64;
    if mechanism == Mechanism::CgroupV2 {
        return write(directory, "cpu.max", &format!("{quota} {PERIOD_MICROS}"));
    }
    write(directory, "cpu.cfs_period_us", &PERIOD_MICROS.to_string())?;
    write(directory, "cpu.cfs_quota_us", &quota.to_string())
}

/// Makes a version 2 controller available to the groups inside `group`.
fn enable(root: &Path, group: &Path, controller: Controller, agent: &str) -> bool {
    let listed = |file: PathBuf| {
        let text = fs::read_to_string(file).unwrap_or_default();
        text.split_ascii_whitespace().any(|name| name == controller.name())
    };
    if !listed(root.join("cgroup.controllers")) {
        return false;
    }
    let order = format!("+{}", controller.name());
    if !listed(root.join("cgroup.subtree_control"))
        && write(root, "cgroup.subtree_control", &order).is_err()
    {
        // Only a group without processes of its own may pass controllers on: step aside and try again.
        if !step_aside(root, agent) || write(root, "cgroup.subtree_control", &order).is_err() {
            return false;
        }
    }
    listed(group.join("cgroup.subtree_control"))
        || write(group, "cgroup.subtree_control", &order).is_ok()
}

/// Moves this process into a group of its own, when it is the only one in `root`.
fn step_aside(root: &Path, agent: &str) -> bool {
    let members = fs::read_to_string(root.join("cgroup.procs")).unwrap_or_default();
    if members.trim() != std::process::id().to_string() {
        return false;
    }
    let own = root.join(format!("{agent}-agent"));
    make(&own).is_ok() && write(&own, "cgroup.procs", "0").is_ok()
}

fn counter(text: &str, name: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(key, _)| *key == name)
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0)
}

/// Where the hierarchies are mounted, and where in them this process is.
#[derive(Debug, Default, PartialEq, Eq)]
struct Mounts {
    unified: Option<Place>,
    legacy: BTreeMap<String, PathBuf>,
}

#[derive(Debug, PartialEq, Eq)]
struct Place {
    mount: PathBuf,
    own: PathBuf,
}

impl Mounts {
    fn parse(mountinfo: &str, membership: &str) -> Self {
        let mut places = Self::default();
        for line in mountinfo.lines() {
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let left: Vec<&str> = left.split(' ').collect();
            let right: Vec<&str> = right.split(' ').collect();
            let ([_, _, _, root, mount, ..], [kind, _, options, ..]) = (&left[..], &right[..])
            else {
                continue;
            };
            let own = |path: &str| own_directory(mount, root, path);
            if *kind == "cgroup2" {
                let path = membership.lines().find_map(|line| line.strip_prefix("0::"));
                places.unified =
                    path.map(|path| Place { mount: PathBuf::from(*mount), own: own(path) });
            } else if *kind == "cgroup" {
                for name in options.split(',') {
                    if let Some(path) = legacy_path(membership, name) {
                        places.legacy.insert(name.to_owned(), own(path));
                    }
                }
            }
        }
        places
    }
}

fn legacy_path<'a>(membership: &'a str, controller: &str) -> Option<&'a str> {
    membership.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        fields.next()?.split(',').any(|name| name == controller).then(|| fields.next())?
    })
}

/// In a container the mount shows only a part of the hierarchy, which `root` names.
fn own_directory(mount: &str, root: &str, path: &str) -> PathBuf {
    let inside = Path::new(path).strip_prefix(root).unwrap_or(Path::new(""));
    Path::new(mount).join(inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
30 25 0:26 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
31 25 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
32 25 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
33 25 0:29 / /proc rw - proc proc rw";

    #[test]
    fn hybrid_hosts_have_both_versions() {
        let own = "4:cpu,cpuacct:/a\n3:memory:/a/b\n0::/init.scope";
        let mounts = Mounts::parse(HYBRID, own);
        assert_eq!(mounts.unified.unwrap().own, Path::new("/sys/fs/cgroup/unified/init.scope"));
        assert_eq!(mounts.legacy["cpu"], Path::new("/sys/fs/cgroup/cpu,cpuacct/a"));
        assert_eq!(mounts.legacy["memory"], Path::new("/sys/fs/cgroup/memory/a/b"));
        assert!(!mounts.legacy.contains_key("pids"));
    }

    #[test]
    fn a_container_sees_its_own_part_of_the_hierarchy() {
        let line = "32 25 0:28 /docker/x /sys/fs/cgroup ro - cgroup2 cgroup rw";
        let own = |membership: &str| Mounts::parse(line, membership).unified.unwrap().own;
        assert_eq!(own("0::/docker/x/app"), Path::new("/sys/fs/cgroup/app"));
        assert_eq!(own("0::/"), Path::new("/sys/fs/cgroup"));
    }

    #[test]
    fn a_host_without_cgroups_has_none() {
        assert_eq!(Mounts::parse("", ""), Mounts::default());
    }

    #[test]
    fn version_2_controllers_are_passed_on_and_limits_written() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("cgroup.controllers"), "cpu memory pids").unwrap();
        fs::write(root.path().join("cgroup.subtree_control"), "cpu memory pids").unwrap();
        let mut groups = Cgroups::default();
        let agent = root.path().join("cynai-x");
        fs::create_dir(&agent).unwrap();
        groups.use_unified([root.path()].into_iter(), "cynai-x");
        assert_eq!(groups.mechanism(Controller::Memory), Some(Mechanism::CgroupV2));
        let limits = SandboxLimits {
            memory_bytes: 1000,
            processes: 10,
            cpus: 0.5,
            disk_bytes: 1,
            tmp_bytes: 1,
            output_bytes: 1,
            wall_seconds: 1,
        };
        let job = groups.job(JobId(uuid::Uuid::nil()), &limits).unwrap();
        let directory = agent.join("job-00000000-0000-0000-0000-000000000000");
        let read = |file: &str| fs::read_to_string(directory.join(file)).unwrap();
        assert_eq!(
            [read("memory.max"), read("pids.max"), read("cpu.max")],
            ["1000", "12", "50000 100000"]
        );
        assert_eq!(job.entrances(), [directory.join("cgroup.procs")]);
    }

    #[test]
    fn counters_are_read_by_their_exact_name() {
        assert_eq!(counter("oom 3\noom_kill 2\n", "oom_kill"), 2);
        assert_eq!(counter("oom_kill_disable 1", "oom_kill"), 0);
    }
}
