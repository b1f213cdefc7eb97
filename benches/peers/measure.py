"""What every measurement shares: result lines, percentiles, CPU time, a quiet moment to begin in.

A result is one JSON object a line: peer, workload, metric, value, unit, the repetition, the machine's
load, and `noise`: how many tasks that are not ours wanted a core just before.
"""

import json
import math
import os
import subprocess
import time
from pathlib import Path

REP = int(os.environ.get("REP", "1"))
QUIET_WAIT_S = float(os.environ.get("QUIET_WAIT", "10"))
QUIET_AT = 0.6
TICKS = os.sysconf("SC_CLK_TCK")

RUNS = {1: 10, 16: 32, 64: 64}  # at once -> how many in all
STEPS = 100
BRANCHES = 100


def emit(peer: str, workload: str, metric: str, value: float, unit: str, **more) -> None:
    load = float(Path("/proc/loadavg").read_text().split()[0])
    line = {"peer": peer, "workload": workload, "metric": metric, "value": round(value, 4)}
    print(json.dumps(line | {"unit": unit, "rep": REP, "load": load} | more), flush=True)


def percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[math.ceil(percent / 100 * len(ordered)) - 1] if ordered else math.nan


def stat(pid: int | str) -> list[str] | None:
    """The fields of /proc/PID/stat after the name: state, parent, ... ; none when it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None


def processes() -> list[tuple[int, list[str]]]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [(pid, fields) for pid in pids if (fields := stat(pid))]


def noise(samples: int = 8) -> float:
    """The mean number of others' runnable tasks that do not step back for us (nice below 5)."""
    seen, kernel = 0, 2
    for _ in range(samples):
        for pid, fields in processes():
            ours = pid == os.getpid() or int(fields[1]) in (os.getpid(), kernel)
            seen += not ours and fields[0] == "R" and int(fields[16]) < 5
        time.sleep(0.1)
    return seen / samples


def wait_quiet() -> float:
    """Waits, for a bounded time, until the machine is ours; returns the noise that is left."""
    deadline = time.monotonic() + QUIET_WAIT_S
    samples = 8 if QUIET_WAIT_S > 0 else 1
    while (level := noise(samples)) > QUIET_AT and time.monotonic() < deadline:
        pass
    return level


def cpu_of_database() -> float | None:
    """Seconds that the cluster in PGDATA has used, ended processes included; none if it is unknown."""
    data = os.environ.get("PGDATA")
    if not data:
        return None
    postmaster = int(Path(data, "postmaster.pid").read_text().split("\n", 1)[0])
    ticks = 0
    for pid, fields in processes():
        user, system, ended_user, ended_system = map(int, fields[11:15])
        if pid == postmaster:
            ticks += user + system + ended_user + ended_system
        elif int(fields[1]) == postmaster:
            ticks += user + system
    return ticks / TICKS


def cpu_of_self() -> float:
    times = os.times()
    return times.user + times.system


def append_step(path: str, step: int) -> None:
    """Notes that a step ran, so that it survives a kill of this process: one write, appended."""
    with open(path, "ab", buffering=0) as log:
        log.write(f"{step} {time.time():.6f}\n".encode())


def read_steps(path: str) -> list[tuple[int, float]]:
    try:
        lines = Path(path).read_text().splitlines()
    except FileNotFoundError:
        return []
    rows = [line.split() for line in lines]
    return [(int(row[0]), float(row[1])) for row in rows if len(row) == 2]


def psql(sql: str, database: str = "postgres") -> str:
    """Runs one statement on the server that the PG* variables name."""
    command = ["psql", "--no-psqlrc", "-qAt", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", sql]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return done.stdout.strip()


def wal_bytes() -> int:
    return int(psql("select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint"))
