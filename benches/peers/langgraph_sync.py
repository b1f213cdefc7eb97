"""LangGraph (Python) with its PostgreSQL checkpointer and durability "sync", in which a checkpoint is
committed before the next superstep begins.

    python langgraph_sync.py W1|W2|W4

It is measured as a program would use it: one process, one connection pool, `ainvoke`.
"""

import asyncio
import operator
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from contextlib import asynccontextmanager
from typing import Annotated, TypedDict

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

import measure
from measure import BRANCHES, RUNS, STEPS, emit, percentile

PEER = "langgraph-py/sync"
DATABASE = "peer_langgraph"
POOL = 20

step_times: dict[str, list[float]] = defaultdict(list)


class Count(TypedDict):
    n: int


class Fan(TypedDict):
    n: int
    parts: Annotated[list, operator.add]
    total: int


def counting_step(log: str | None):
    async def step(state: Count, config: RunnableConfig) -> dict:
        step_times[config["configurable"]["thread_id"]].append(time.perf_counter())
        if log:
            measure.append_step(log, state["n"])
        return {"n": state["n"] + 1}

    return step


def chain(saver, log: str | None = None):
    """STEPS nodes in a row."""
    graph, before = StateGraph(Count), START
    for number in range(STEPS):
        name = f"step_{number}"
        graph.add_node(name, counting_step(log))
        graph.add_edge(before, name)
        before = name
    graph.add_edge(before, END)
    return graph.compile(checkpointer=saver)


def loop(saver):
    """One node, STEPS times."""
    graph = StateGraph(Count)
    graph.add_node("step", counting_step(None))
    graph.add_edge(START, "step")
    graph.add_conditional_edges("step", lambda state: "step" if state["n"] < STEPS else END)
    return graph.compile(checkpointer=saver)


def fan(saver):
    """BRANCHES tasks in one superstep, and a node that adds up what they found."""
    async def source(_state) -> dict:
        return {"n": 1}

    async def branch(task) -> dict:
        return {"parts": [task["i"]]}

    async def join(state) -> dict:
        return {"total": sum(state["parts"])}

    graph = StateGraph(Fan)
    graph.add_node("source", source)
    graph.add_node("branch", branch)
    graph.add_node("join", join)
    graph.add_edge(START, "source")
    targets = lambda _state: [Send("branch", {"i": i}) for i in range(BRANCHES)]
    graph.add_conditional_edges("source", targets, ["branch"])
    graph.add_edge("branch", "join")
    graph.add_edge("join", END)
    return graph.compile(checkpointer=saver)


def fresh_database() -> None:
    measure.psql(f"drop database if exists {DATABASE} with (force)")
    measure.psql(f"create database {DATABASE}")


@asynccontextmanager
async def checkpointer():
    options = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
    where = make_conninfo(os.environ["DATABASE_URL"], dbname=DATABASE)
    async with AsyncConnectionPool(where, min_size=4, max_size=POOL, open=False, kwargs=options) as pool:
        saver = AsyncPostgresSaver(pool)
        await saver.setup()
        yield saver


async def invoke(graph, state: dict | None, thread: str) -> dict:
    config = {"configurable": {"thread_id": thread}, "recursion_limit": 10 * STEPS}
    return await graph.ainvoke(state, config, durability="sync")


async def invoke_new(graph, state: dict) -> tuple[str, dict]:
    thread = uuid.uuid4().hex
    return thread, await invoke(graph, state, thread)


async def measure_steps(graph, workload: str, at_once: int) -> None:
    total = RUNS[at_once]
    steps = total * STEPS
    queue = iter(range(total))
    threads = []

    async def client() -> None:
        for _ in queue:
            thread, result = await invoke_new(graph, {"n": 0})
            assert result["n"] == STEPS, result
            threads.append(thread)

    noise = measure.wait_quiet()
    wal, cpu, cpu_database = measure.wal_bytes(), measure.cpu_of_self(), measure.cpu_of_database()
    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(at_once)))
    seconds = time.perf_counter() - begun
    gaps = [
        1000 * (later - earlier)
        for thread in threads
        for earlier, later in zip(step_times[thread], step_times[thread][1:])
    ]
    emit(PEER, workload, f"steps_per_s@{at_once}", steps / seconds, "steps/s", noise=noise)
    emit(PEER, workload, f"step_p50@{at_once}", percentile(gaps, 50), "ms")
    emit(PEER, workload, f"step_p99@{at_once}", percentile(gaps, 99), "ms")
    engine = (measure.cpu_of_self() - cpu) * 1e6 / steps
    emit(PEER, workload, f"cpu_engine_per_step@{at_once}", engine, "us")
    if cpu_database is not None:
        database = (measure.cpu_of_database() - cpu_database) * 1e6 / steps
        emit(PEER, workload, f"cpu_pg_per_step@{at_once}", database, "us")
    emit(PEER, workload, f"wal_bytes_per_step@{at_once}", (measure.wal_bytes() - wal) / steps, "B")


async def w1() -> None:
    fresh_database()
    async with checkpointer() as saver:
        for name, graph in (("chain", chain(saver)), ("loop", loop(saver))):
            await invoke_new(graph, {"n": 0})  # connections, prepared statements
            for at_once in RUNS:
                await measure_steps(graph, f"W1.{name}", at_once)


async def w2() -> None:
    fresh_database()
    async with checkpointer() as saver:
        graph, empty = fan(saver), {"n": 0, "parts": [], "total": 0}
        expected = BRANCHES * (BRANCHES - 1) // 2

        async def one() -> float:
            begun = time.perf_counter()
            _, result = await invoke_new(graph, empty)
            assert result["total"] == expected, result
            return 1000 * (time.perf_counter() - begun)

        await one()
        noise = measure.wait_quiet()
        took = [await one() for _ in range(10)]
        emit(PEER, "W2", "run_p50@1", percentile(took, 50), "ms", noise=noise)
        emit(PEER, "W2", "run_max@1", max(took), "ms")
        emit(PEER, "W2", "branches_per_s@1", 1000 * len(took) * BRANCHES / sum(took), "branches/s")
        begun = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(16)))
        rate = 16 * BRANCHES / (time.perf_counter() - begun)
        emit(PEER, "W2", "branches_per_s@16", rate, "branches/s")


async def w4_child(thread: str, log: str, begin: bool) -> None:
    async with checkpointer() as saver:
        graph = chain(saver, log)
        print(time.time(), flush=True)  # ready
        result = await invoke(graph, {"n": 0} if begin else None, thread)
        assert result["n"] == STEPS, result


def w4() -> None:
    """Kills the process half-way. Nothing goes on by itself: here the harness calls again."""
    fresh_database()
    with tempfile.TemporaryDirectory() as folder:
        log, thread = os.path.join(folder, "steps"), uuid.uuid4().hex
        command = [sys.executable, __file__, "w4-child", thread, log]
        noise = measure.wait_quiet()
        child = subprocess.Popen([*command, "begin"], stdout=subprocess.DEVNULL)
        while len(measure.read_steps(log)) < STEPS // 2:
            assert child.poll() is None, "it ended before it could be killed"
            time.sleep(0.0005)
        child.kill()
        child.wait()
        before = len(measure.read_steps(log))
        restarted = time.time()
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        rows = measure.read_steps(log)
        steps = [step for step, _ in rows]
        first = rows[before][1]
        again = len(steps) - len(set(steps))
        complete = set(steps) == set(range(STEPS))
        emit(PEER, "W4", "restart_to_first_step", 1000 * (first - restarted), "ms", noise=noise)
        ready_to_first = 1000 * (first - float(done.stdout.split()[0]))
        emit(PEER, "W4", "ready_to_first_step", ready_to_first, "ms")
        emit(PEER, "W4", "steps_run_again", again, "steps", complete=complete, by_itself=False)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["W1"]:
            asyncio.run(w1())
        case ["W2"]:
            asyncio.run(w2())
        case ["W4"]:
            w4()
        case ["w4-child", thread, log, *begin]:
            asyncio.run(w4_child(thread, log, bool(begin)))
        case _:
            sys.exit("usage: langgraph_sync.py W1|W2|W4")
