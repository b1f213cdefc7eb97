"""W8 and W9: what a call of a model or of a tool costs through a node, beside the same call made directly.

A run makes CALLS_A_RUN calls, one after the other, so that what a run costs once is a small part of a call.
The direct caller sends the same over connections that stay open, as many at once as there are runs.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator

import measure
from measure import percentile
from system import Broken, check, spread
from workloads import CALLS_A_RUN, MODEL_CALLS, PROMPT, TEXT, TOOL_CALLS

PEER, DIRECT = "cynai", "direct"
# at once -> how many runs, for calls that answer at once, and for those that take their time
RUNS = {1: (20, 3), 16: (80, 32), 64: (192, 128)}
QUICK_RUNS = {1: (1, 1), 16: (16, 16)}
ALONE = 40
CALL_LIMIT_S = 30


class Pipes:
    """An MCP server over pipes, called by hand."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.buffer = b""
        self.send(0, "initialize", {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {}})
        next(self.receive())

    def send(self, number: int, method: str, params: dict) -> None:
        message = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
        self.process.stdin.write(json.dumps(message).encode() + b"\n")

    def receive(self) -> Iterator[dict]:
        """The messages that have come; waits for one."""
        while True:
            if not select.select([self.process.stdout], [], [], CALL_LIMIT_S)[0]:
                raise Broken("the tool server does not answer")
            *lines, self.buffer = (self.buffer + os.read(self.process.stdout.fileno(), 1 << 20)).split(b"\n")
            if lines:
                yield from map(json.loads, lines)
                return

    def spread(self, call: dict, total: int, at_once: int) -> Iterator[float]:
        """Makes `total` calls, `at_once` at a time; yields the seconds that each took."""
        begun, sent = {}, 0
        while sent < total or begun:
            while sent < total and len(begun) < at_once:
                sent += 1
                begun[sent] = time.perf_counter()
                self.send(sent, "tools/call", call)
            for message in self.receive():
                check(message["result"]["content"][0]["text"] == TEXT, f"a tool answered {message}")
                yield time.perf_counter() - begun.pop(message["id"])

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=10)
        self.process.stdout.close()


def post(path: str, body: dict) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"accept: application/json, text/event-stream\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


def w8(bench) -> None:
    """Calls of a model: answers streamed and in one piece, at once and after a while."""
    for name, (kind, delay) in MODEL_CALLS.items():
        if bench.options.quick and delay:
            continue
        body = {"model": "m", "messages": [{"role": "user", "content": PROMPT}]}
        if kind == "stream":
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        request = post(f"/{kind}/{delay}/v1/chat/completions", body)
        through_and_direct(bench, f"W8.{kind}.{delay}ms", name, delay, over_http(bench, request))


def w9(bench) -> None:
    """Calls of a tool: over pipes and HTTP, with and without a record before the call."""
    command = [sys.executable, str(bench.endpoint.script), "--stdio"]
    pipes = Pipes(command)
    try:
        for name, (server, tool, delay) in TOOL_CALLS.items():
            if bench.options.quick and delay:
                continue
            call = {"name": tool, "arguments": {"text": TEXT, "delay_ms": delay}}
            if server == "stdio":
                direct = lambda total, at_once, call=call: pipes.spread(call, total, at_once)  # noqa: E731
            else:
                message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}
                direct = over_http(bench, post("/mcp", message))
            through_and_direct(bench, f"W9.{server}.{tool}.{delay}ms", name, delay, direct)
    finally:
        pipes.close()


def over_http(bench, request: bytes):
    """Calls over HTTP: a function of how many, and how many at a time."""

    def calls(total: int, at_once: int) -> Iterator[float]:
        for seconds, answer in spread(bench.endpoint.port, (request for _ in range(total)), at_once):
            check(answer.status == 200, f"a direct call was answered {answer.status}: {answer.body[:300]!r}")
            yield seconds

    return calls


def through_and_direct(bench, workload: str, graph: str, delay: int, direct) -> None:
    quick = bench.options.quick
    bench.spread(graph, {"most": CALLS_A_RUN}, 4, 4, {"n": CALLS_A_RUN})  # connections, prepared statements
    for at_once, counts in (QUICK_RUNS if quick else RUNS).items():
        runs = counts[delay > 0]
        calls = runs * CALLS_A_RUN
        meter = bench.meter()
        bench.spread(graph, {"most": CALLS_A_RUN}, runs, at_once, {"n": CALLS_A_RUN})
        meter.stop()
        meter.check_rows(runs, calls)
        median, tail = meter.gaps()
        took = [1000 * seconds for seconds in direct(calls, at_once)]
        check(len(took) == calls, f"{len(took)} of {calls} direct calls ended")
        measure.emit(PEER, workload, f"call_p50@{at_once}", median, "ms", noise=meter.noise)
        measure.emit(PEER, workload, f"call_p99@{at_once}", tail, "ms")
        measure.emit(DIRECT, workload, f"call_p50@{at_once}", percentile(took, 50), "ms")
        measure.emit(DIRECT, workload, f"call_p99@{at_once}", percentile(took, 99), "ms")
        measure.emit(PEER, workload, f"added_p50@{at_once}", median - percentile(took, 50), "ms")
        measure.emit(PEER, workload, f"calls_per_s@{at_once}", calls / meter.seconds, "calls/s")
        measure.emit(PEER, workload, f"cpu_engine_per_call@{at_once}", 1e6 * meter.engine / calls, "us")
        measure.emit(PEER, workload, f"cpu_pg_per_call@{at_once}", 1e6 * meter.cluster / calls, "us")
    total = 3 if quick else ALONE if delay == 0 else ALONE // 4
    took = [1000 * seconds for seconds in bench.spread(graph, {"most": 1}, total, 1, {"n": 1})]
    measure.emit(PEER, workload, "run_p50@1", percentile(took, 50), "ms")
    measure.emit(PEER, workload, "run_max@1", max(took), "ms")
