#!/usr/bin/env python3
"""Measures `cynai serve` as its users meet it: runs started over REST, durability `sync`, its own
private PostgreSQL with default durability.

    benches/bench.py --server PROGRAM [--floor PROGRAM] [--quick] [--only W1,W2] [--parked COUNT]

Prints one JSON object a line, of the shape that benches/peers/measure.py describes; what goes on is
told on standard error. docs/benchmarks.md says what each figure is. It fails when the system does not
do what a figure rests on: a step that left no checkpoint, a run that was lost, a wrong result.
"""

import argparse
import base64
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "peers"))

import calls
import measure
import readers
import workloads
from measure import BRANCHES, STEPS, percentile
from system import Broken, Client, Connection, Database, Endpoint, Server, check

PEER, FLOOR = "cynai", "floor"
RUNS = {1: 40, 16: 160, 64: 512}  # at once -> how many in all
QUICK_RUNS = {1: 3, 16: 16, 64: 64}
FLOOR_STEPS = {1: 3000, 64: 1000}
QUICK_FLOOR_STEPS = {1: 200, 64: 50}
LARGE_BYTES = 1 << 20
SHORT_STEPS = 10
SETTLE_S = 0.5
END_LIMIT_S = 300


def emit(workload: str, metric: str, value: float, unit: str, peer: str = PEER, **more) -> None:
    measure.emit(peer, workload, metric, value, unit, **more)


def tell(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


class Meter:
    """What the server and its database used while something ran, and what they stored."""

    def __init__(self, bench: "Bench"):
        self.bench = bench
        self.noise = measure.wait_quiet()
        self.begun_at = bench.database.value("select cynai_now()")
        counters = bench.client.metrics()
        self.commits = counters.get("cynai_commits_total", 0)
        self.statements = counters.get("cynai_commit_statements_total", 0)
        self.wal = bench.database.wal_bytes()
        self.engine, self.cluster = bench.server.cpu_seconds(), measure.cpu_of_database()
        self.begun = time.perf_counter()

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self.begun
        bench = self.bench
        self.engine = bench.server.cpu_seconds() - self.engine
        self.cluster = measure.cpu_of_database() - self.cluster
        self.wal = bench.database.wal_bytes() - self.wal
        counters = bench.client.metrics()
        self.commits = counters.get("cynai_commits_total", 0) - self.commits
        self.statements = counters.get("cynai_commit_statements_total", 0) - self.statements

    def check_rows(self, runs: int, steps: int) -> None:
        """Each step left a row; each run has one more, its input's."""
        rows = self.bench.database.number(
            f"select count(*) from checkpoints join runs using (run_id) where created_at > '{self.begun_at}'"
        )
        check(rows == steps + runs, f"{steps} steps of {runs} runs left {rows} checkpoints, not {steps + runs}")

    def gaps(self) -> tuple[float, float]:
        """The time from one step's commit to the next one's, in milliseconds: median and 99th percentile."""
        row = self.bench.database.query(
            f"""select percentile_disc(array[0.5, 0.99]) within group (order by gap) from (
                  select extract(epoch from c.at - lag(c.at) over (partition by c.thread_id order by c.seq)) as gap, c.seq
                    from checkpoints c join runs r using (run_id) where r.created_at > '{self.begun_at}') g
                 where seq >= 2"""
        )[0][0]
        median, tail = row.strip("{}").split(",")
        return 1000 * float(median), 1000 * float(tail)


class Bench:
    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.folder = Path(tempfile.mkdtemp(prefix="cynai-bench-graphs."))
        self.graphs = workloads.write_all(self.folder / "graphs")
        self.endpoint = Endpoint()
        config = self.folder / "cynai.yaml"
        config.write_text(json.dumps(workloads.config(self.endpoint.script, self.endpoint.port)))
        self.server = Server(options.server, self.graphs)
        self.server.arguments = ["--config", str(config)]
        self.client: Client | None = None
        self.database: Database | None = None

    def begin(self) -> None:
        self.server.start()
        self.server.wait_ready()
        self.client = Client(self.server)
        self.database = Database(self.server.socket_folder())
        os.environ["PGDATA"] = str(self.server.cluster)
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            value = self.database.value(f"show {setting}")
            emit("settings", setting, value == "on", "bool", setting=value)
            tell(f"{setting} is {value}")
            check(value == "on", f"{setting} is {value}: these figures would be of another system")

    def close(self) -> None:
        if self.database:
            self.database.close()
        self.server.remove()
        self.endpoint.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def restart(self) -> float:
        """Stops server and database in order, and starts both; the seconds until it is ready."""
        self.client.close()
        self.database.close()
        self.server.stop()
        begun = time.time()
        self.server.start()
        ready = self.server.wait_ready()
        self.client = Client(self.server)
        self.database = Database(self.server.socket_folder())
        return ready - begun

    def meter(self) -> Meter:
        return Meter(self)

    def spread(self, graph: str, state: dict, total: int, at_once: int, expected: dict) -> list[float]:
        """Runs a graph `total` times; each answer must hold what is expected."""
        request = self.client.run(graph, state)
        took = []
        for seconds, answer in self.client.spread((request for _ in range(total)), at_once):
            values = answer.json()
            for name, value in expected.items():
                check(values.get(name) == value, f"a run of {graph} answered {answer.body[:300]!r}")
            took.append(seconds)
        check(len(took) == total, f"{len(took)} of {total} runs of {graph} ended")
        return took

    # -------------------------------------------------------------------------------------- floor

    def floor(self) -> None:
        """What a bare statement costs on the same database, just before the steps are measured."""
        if not self.options.floor:
            tell("no --floor: it is not measured")
            return
        for at_once, steps in (QUICK_FLOOR_STEPS if self.options.quick else FLOOR_STEPS).items():
            noise = measure.wait_quiet()
            wal, cluster = self.database.wal_bytes(), measure.cpu_of_database()
            own = resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [str(self.options.floor), self.server.database_url(), str(at_once), str(steps)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            check(done.returncode == 0, f"the floor failed: {done.stderr}")
            report = json.loads(done.stdout)
            made = report["steps"]
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            engine = used.ru_utime + used.ru_stime - own.ru_utime - own.ru_stime
            cluster, wal = measure.cpu_of_database() - cluster, self.database.wal_bytes() - wal
            figures = [
                ("steps_per_s", made / report["seconds"], "steps/s"),
                ("step_p50", report["p50_ms"], "ms"),
                ("step_p99", report["p99_ms"], "ms"),
                ("cpu_engine_per_step", 1e6 * engine / made, "us"),
                ("cpu_pg_per_step", 1e6 * cluster / made, "us"),
                ("wal_bytes_per_step", wal / made, "B"),
                ("commits_per_statement", made / report["statements"], "commits"),
            ]
            for metric, value, unit in figures:
                emit("W1.chain", f"{metric}@{at_once}", value, unit, peer=FLOOR, noise=noise)

    # ----------------------------------------------------------------------------------------- W1

    def w1(self) -> None:
        """Steps that do nothing, each durable before the next."""
        runs = QUICK_RUNS if self.options.quick else RUNS
        for shape in ("chain", "loop"):
            self.spread(shape, {"n": 0}, 8, 8, {"n": STEPS})  # connections, prepared statements
            for at_once, total in runs.items():
                self.steps(shape, at_once, total)

    def steps(self, shape: str, at_once: int, total: int) -> None:
        workload, steps = f"W1.{shape}", total * STEPS
        meter = Meter(self)
        self.spread(shape, {"n": 0}, total, at_once, {"n": STEPS})
        meter.stop()
        meter.check_rows(total, steps)
        median, tail = meter.gaps()
        check(meter.commits >= steps, f"{meter.commits} commits were counted for {steps} steps")
        emit(workload, f"steps_per_s@{at_once}", steps / meter.seconds, "steps/s", noise=meter.noise)
        emit(workload, f"step_p50@{at_once}", median, "ms")
        emit(workload, f"step_p99@{at_once}", tail, "ms")
        emit(workload, f"cpu_engine_per_step@{at_once}", 1e6 * meter.engine / steps, "us")
        emit(workload, f"cpu_pg_per_step@{at_once}", 1e6 * meter.cluster / steps, "us")
        emit(workload, f"wal_bytes_per_step@{at_once}", meter.wal / steps, "B")
        emit(workload, f"commits_per_statement@{at_once}", meter.commits / meter.statements, "commits")

    # ----------------------------------------------------------------------------------------- W2

    def w2(self) -> None:
        """BRANCHES activations in one superstep, and a join."""
        expected = {"total": BRANCHES * (BRANCHES - 1) // 2}
        alone, crowd = (3, 16) if self.options.quick else (100, 320)
        self.spread("fan", {"n": 0}, 4, 2, expected)
        for at_once, total in ((1, alone), (16, crowd)):
            meter = Meter(self)
            took = [1000 * seconds for seconds in self.spread("fan", {"n": 0}, total, at_once, expected)]
            meter.stop()
            meter.check_rows(total, 3 * total)
            branches = total * BRANCHES
            emit("W2", f"run_p50@{at_once}", percentile(took, 50), "ms", noise=meter.noise)
            emit("W2", f"run_max@{at_once}", max(took), "ms")
            emit("W2", f"branches_per_s@{at_once}", branches / meter.seconds, "branches/s")
            emit("W2", f"cpu_engine_per_branch@{at_once}", 1e6 * meter.engine / branches, "us")
            emit("W2", f"cpu_pg_per_branch@{at_once}", 1e6 * meter.cluster / branches, "us")
            emit("W2", f"wal_bytes_per_branch@{at_once}", meter.wal / branches, "B")

    # ----------------------------------------------------------------------------------------- W3

    def w3(self) -> None:
        """A large value that never changes, and a long list that grows: what a step writes beside them."""
        text = base64.b64encode(os.urandom(LARGE_BYTES * 3 // 4)).decode()  # It must not compress.
        self.slope("W3.str", "large", {"n": 0, "big": text})
        for length in (10, 1000):
            items = [f"entry number {number} of a list that is there from the start" for number in range(length)]
            self.slope(f"W3.append.{length}", "append", {"n": 0, "log": items})

    def slope(self, workload: str, graph: str, state: dict) -> None:
        """What each further step costs: the difference of a long run and a short one. What a run costs
        once, such as storing its input, is told apart."""
        lengths = (64, 192) if self.options.quick else (64, 1088)
        wal, seconds = [], []
        for length in lengths:
            meter = Meter(self)
            self.spread(graph, state | {"most": length}, 1, 1, {"n": length})
            meter.stop()
            meter.check_rows(1, length)
            wal.append(meter.wal)
            seconds.append(meter.seconds)
        further = lengths[1] - lengths[0]
        per_step = (wal[1] - wal[0]) / further
        emit(workload, "wal_bytes_per_step", per_step, "B", noise=meter.noise)
        emit(workload, "wal_bytes_once", wal[0] - per_step * lengths[0], "B")
        emit(workload, "step_mean", 1000 * (seconds[1] - seconds[0]) / further, "ms")

    # ----------------------------------------------------------------------------------------- W4

    def w4(self) -> None:
        """kill -9 half-way, then a restart: one run of STEPS steps, and 64 at once."""
        for workload, runs, length in (("W4", 1, STEPS), ("W4.64", 64, 2 * STEPS)):
            self.kill_half_way(workload, runs, length)

    def kill_half_way(self, workload: str, runs: int, length: int) -> None:
        database = self.database
        noise = measure.wait_quiet()
        body = {"assistant_id": "loop", "input": {"n": 0, "most": length}, "on_completion": "keep"}
        request = self.client.request("POST", "/runs", body)
        accepted = []
        for _, answer in self.client.spread((request for _ in range(runs)), min(runs, 8)):
            accepted.append(answer.json()["run_id"])
        half = runs * length // 2
        deadline = time.monotonic() + END_LIMIT_S
        while database.number("select coalesce(sum(seq), 0) from heads") < half:
            check(time.monotonic() < deadline, "the runs do not come to their middle")
            left = database.number("select count(*) from heads")
            check(left > 0, "the runs ended before the server could be killed")
        self.server.kill()
        self.client.close()
        # What the dead server had sent may still be committed: the database outlives it.
        gone = "select count(*) from pg_stat_activity where application_name = 'cynai'"
        while database.number(gone) > 0:
            check(time.monotonic() < deadline, "the dead server's connections stay")
            time.sleep(0.001)
        ids = ",".join(f"'{run}'" for run in accepted)
        database.query(
            f"create temp table stood as select c.* from checkpoints c where run_id in ({ids})"
        )
        stood = database.number("select count(*) from stood")
        check(stood < runs * (length + 1), "the runs ended before the server was killed")
        restarted = time.time()
        ready = self.server.start()
        self.client = Client(self.server)
        ended = f"select count(*) from runs where run_id in ({ids}) and status = 'success'"
        while database.number(ended) < runs:
            check(time.monotonic() < deadline, "the runs do not end after the restart")
            time.sleep(0.005)
        new = f"""select extract(epoch from min(first)), extract(epoch from max(first)) from (
                    select min(c.at) as first from checkpoints c left join stood s
                        on s.thread_id = c.thread_id and s.namespace = c.namespace and s.branch = c.branch and s.seq = c.seq
                     where c.run_id in ({ids}) and s.seq is null group by c.run_id) f"""
        first, last = map(float, database.query(new)[0])
        # A stored step that ran again would have stored itself again: at another time, or twice.
        again = database.number(
            """select count(*) from stood s where not exists (
                 select from checkpoints c where c.thread_id = s.thread_id and c.namespace = s.namespace
                    and c.branch = s.branch and c.seq = s.seq and c.at = s.at and c.changed = s.changed)"""
        )
        rows = database.number(f"select count(*) from checkpoints where run_id in ({ids})")
        check(rows == runs * (length + 1), f"{runs} runs of {length} steps left {rows} checkpoints")
        lost = runs - database.number(ended)
        database.query("drop table stood")
        emit(workload, "restart_to_ready", 1000 * (ready - restarted), "ms", noise=noise)
        emit(workload, "restart_to_first_step", 1000 * (first - restarted), "ms")
        emit(workload, "ready_to_first_step", 1000 * (first - ready), "ms", by_itself=True)
        emit(workload, "ready_to_all_moving", 1000 * (last - ready), "ms")
        emit(workload, "steps_run_again", again, "steps", stored_before=stood, complete=True)
        emit(workload, "runs_lost", lost, "runs", accepted=runs)

    # ----------------------------------------------------------------------------------------- W5

    def w5(self) -> None:
        """Long threads: what reading them costs, and what a checkpoint takes on disk."""
        for length in (200, 1000) if self.options.quick else (1000, 10_000):
            self.long_thread(length)

    def long_thread(self, length: int) -> None:
        workload, database = f"W5.{length}", self.database
        thread = self.client.ask("POST", "/threads", {})["thread_id"]
        size = "select pg_database_size(current_database())"
        before = database.number(size)
        begun = time.perf_counter()
        body = {"assistant_id": "loop", "input": {"n": 0, "most": length}}
        values = self.client.ask("POST", f"/threads/{thread}/runs/wait", body)
        emit(workload, "build_s", time.perf_counter() - begun, "s")
        check(values.get("n") == length, f"a thread of {length} ended with {values}")
        emit(workload, "db_growth_per_checkpoint", (database.number(size) - before) / length, "B")
        database.query("vacuum analyze checkpoints")
        noise = measure.wait_quiet()
        latest, page = [], []
        read_state = self.client.request("GET", f"/threads/{thread}/state")
        read_page = self.client.request("POST", f"/threads/{thread}/history", {"limit": 20})
        for took, request in ((latest, read_state), (page, read_page)):
            for _ in range(100):
                begun = time.perf_counter()
                answer = self.client.connection.ask(request)
                took.append(1000 * (time.perf_counter() - begun))
            check(answer.status == 200, f"reading the thread answered {answer.status}")
        check(len(answer.json()) == 20, "the page has not 20 checkpoints")
        emit(workload, "load_latest_p50", percentile(latest, 50), "ms", noise=noise)
        emit(workload, "load_latest_p99", percentile(latest, 99), "ms")
        emit(workload, "list_20", percentile(page, 50), "ms")

    # ----------------------------------------------------------------------------------------- W7

    def w7(self) -> None:
        """Memory and start; then the same with many parked runs."""
        noise = measure.wait_quiet()
        self.server.arguments = []  # Endpoints and tools that are configured take memory of their own.
        emit("W7", "start_to_ready", 1000 * self.restart(), "ms", noise=noise)
        self.spread("chain", {"n": 0}, 1, 1, {"n": STEPS})
        time.sleep(SETTLE_S)
        emit("W7", "rss_idle", self.server.memory_mb(), "MB")
        self.server.reset_peak()
        self.spread("chain", {"n": 0}, 128, 64, {"n": STEPS})
        emit("W7", "rss_64", self.server.memory_mb("VmHWM"), "MB")
        self.parked(self.options.parked)

    def parked(self, count: int) -> None:
        self.park(max(count // 20, 100))  # What serving so many requests takes is not the parked runs'.
        time.sleep(SETTLE_S)
        before = self.server.memory_mb()
        meter = Meter(self)
        self.park(count)
        meter.stop()
        time.sleep(SETTLE_S)
        scale = 100_000 / count
        emit("W7", "rss_per_100k_parked", scale * (self.server.memory_mb() - before), "MB", parked=count)
        emit("W7", "park_runs_per_s", count / meter.seconds, "runs/s", noise=meter.noise)
        emit("W7", "cpu_engine_per_parked_run", 1e6 * meter.engine / count, "us")
        emit("W7", "cpu_pg_per_parked_run", 1e6 * meter.cluster / count, "us")
        emit("W7", "start_to_ready_100k_parked", 1000 * self.restart(), "ms", parked=count)
        self.spread("chain", {"n": 0}, 1, 1, {"n": STEPS})
        time.sleep(SETTLE_S)
        emit("W7", "rss_idle_100k_parked", self.server.memory_mb(), "MB", parked=count)

    def park(self, count: int) -> None:
        """Starts runs that wait for an hour, and returns when all of them are parked."""
        batch = min(count, 100)
        run = {"assistant_id": "nap", "input": {"n": 0}, "on_completion": "keep"}
        request = self.client.request("POST", "/runs/batch", [run] * batch)
        parked = "select count(*) from heads where status = 'parked'"
        target = self.database.number(parked) + count // batch * batch
        for _, answer in self.client.spread((request for _ in range(count // batch)), 16):
            check(answer.status == 200, f"a batch of runs was answered {answer.status}: {answer.body[:300]!r}")
        deadline = time.monotonic() + END_LIMIT_S
        while self.database.number(parked) < target:
            check(time.monotonic() < deadline, "the runs are not parked")
            time.sleep(0.05)

    # ------------------------------------------------------------------------------------ replicas

    def replicas(self) -> None:
        """Two servers on one database, both ready before 1,000 short runs start."""
        runs = 100 if self.options.quick else 1000
        second = Server(self.options.server, self.graphs, beside=self.server)
        try:
            second.start()
            second.wait_ready()
            clients = [self.client, Client(second)]
            key = "cynai_commits_total"
            noise = measure.wait_quiet()
            before = [client.metrics().get(key, 0) for client in clients]
            run = {"assistant_id": "loop", "input": {"n": 0, "most": SHORT_STEPS}, "on_completion": "keep"}
            request = self.client.request("POST", "/runs/batch", [run] * 20)
            begun, started = time.perf_counter(), self.database.value("select cynai_now()")
            for _, answer in self.client.spread((request for _ in range(runs // 20)), 10):
                check(answer.status == 200, f"a batch of runs was answered {answer.status}")
            done = f"select count(*) from runs where created_at > '{started}' and status = 'success'"
            deadline = time.monotonic() + END_LIMIT_S
            while self.database.number(done) < runs:
                check(time.monotonic() < deadline, "the runs do not end")
                time.sleep(0.005)
            seconds = time.perf_counter() - begun
            made = [client.metrics().get(key, 0) - first for client, first in zip(clients, before)]
            clients[1].close()
            check(sum(made) == runs * SHORT_STEPS, f"{made} commits for {runs} runs of {SHORT_STEPS} steps")
            emit("replicas", "least_share", min(made) / sum(made), "of 1", noise=noise, commits=made)
            emit("replicas", "runs_per_s", runs / seconds, "runs/s")
            second.stop()
        finally:
            second.remove()


WORKLOADS = {"floor": Bench.floor, "W1": Bench.w1, "W2": Bench.w2, "W3": Bench.w3, "W4": Bench.w4, "W5": Bench.w5,
             "W8": calls.w8, "W9": calls.w9, "W10": readers.w10, "replicas": Bench.replicas, "W7": Bench.w7}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures cynai serve; prints JSON lines.")
    parser.add_argument("--server", type=Path, required=True, help="the cynai program")
    parser.add_argument("--floor", type=Path, help="the program of benches/floor.rs")
    parser.add_argument("--quick", action="store_true", help="small numbers: whether it works, not how fast")
    parser.add_argument("--only", default=",".join(WORKLOADS), help="some of %(default)s")
    parser.add_argument("--parked", type=int, help="how many parked runs W7 makes (100,000)")
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(WORKLOADS):
        parser.error(f"no such workload: {', '.join(sorted(unknown))}")
    options.parked = options.parked or (500 if options.quick else 100_000)
    options.server = options.server.resolve()
    return options


@contextmanager
def ended_by_signals():
    """A signal ends the measurement as an error does; what was started is then removed undisturbed."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(number: int, _frame) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in numbers:
        signal.signal(number, stop)
    yield


def main() -> None:
    options = arguments()
    bench = Bench(options)
    begun = time.monotonic()
    with ended_by_signals():
        try:
            bench.begin()
            for name, workload in WORKLOADS.items():
                if name in options.only:
                    since = time.monotonic()
                    workload(bench)
                    tell(f"{name} took {time.monotonic() - since:.0f} s")
        except Broken as err:
            sys.exit(f"bench: {err}\nthe end of the server's log:\n{bench.server.log_tail()}")
        finally:
            bench.close()
    tell(f"all took {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
