"""W10: what readers of streams cost: 64 runs whose model streams, and 200 readers spread over them.

The endpoint holds all answers back until every run has asked and every reader has its stream; then the
clock starts. Each reader that reads has to get every token of its run; of one reader for each run the
order is checked too.
"""

import json
import selectors
import socket
import time

import measure
from endpoint import TOKEN_BYTES, token
from measure import percentile
from system import HOST, Broken, Connection, check
from workloads import TALKS

PEER = "cynai"
RUNS, READERS, DEAF = 64, 200, 50
QUICK = (4, 8, 2)
MARK = token(0)[:3].encode()
END = b"event: end"
STREAM_LIMIT_S = 60
SMALL_BUFFER = 4096


class Reader:
    """One reader; `kept` holds all that came when the order is to be checked."""

    def __init__(self, port: int, request: bytes, keep: bool, deaf: bool):
        self.socket = socket.socket()
        if deaf:
            # What it does not read shall not lie in the kernel: the server has to keep it, or to wait.
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        self.socket.connect((HOST, port))
        self.socket.sendall(request)
        self.tail, self.tokens, self.kept = b"", 0, b"" if keep else None
        self.first: float | None = None
        # Its stream stands when the first event has come.
        self.socket.settimeout(STREAM_LIMIT_S)
        head = b""
        while b"\n\n" not in head:
            head += self.socket.recv(4096)
        check(b" 200 OK" in head, f"a stream was answered {head[:300]!r}")
        self.socket.setblocking(False)

    def read(self) -> bool:
        """Takes what has come; false at the end."""
        part = self.socket.recv(1 << 18)
        if not part:
            raise Broken("a stream was cut off")
        if self.kept is not None:
            self.kept += part
        text = self.tail + part
        found = text.count(MARK) - self.tail.count(MARK)
        if found and self.first is None:
            self.first = time.perf_counter()
        self.tokens += found
        self.tail = text[-len(END) :]
        return END not in text

    def text(self) -> str:
        """What the pieces say together."""
        pieces, body = [], self.kept.replace(b"\r\n", b"\n")
        for line in body.split(b"\n"):
            if line.startswith(b"data: ["):
                pieces.append(json.loads(line[6:])[0]["content"])
        return "".join(pieces)


def w10(bench) -> None:
    runs, readers, deaf = QUICK if bench.options.quick else (RUNS, READERS, DEAF)
    for graph, (count, rate) in TALKS.items():
        if bench.options.quick and rate:
            continue
        workload = f"W10.{graph}"
        talk(bench, graph, runs, 2, 1, count, None)  # connections, prepared statements
        alone = talk(bench, graph, runs, 0, 0, count, f"{workload}.readers0")
        for deaf_ones in (0, deaf):
            name = f"{workload}.readers{readers}" + (f".deaf{deaf_ones}" if deaf_ones else "")
            took = talk(bench, graph, runs, readers, deaf_ones, count, name)
            measure.emit(PEER, name, "run_ratio", took / alone, "x")
        if rate:
            measure.emit(PEER, workload, "run_least", count / rate, "s")


def talk(bench, graph: str, runs: int, readers: int, deaf: int, count: int, workload: str | None) -> float:
    """Lets `runs` runs talk to `readers` readers, `deaf` of which never read; the median seconds of a run."""
    client, database = bench.client, bench.database
    body = {"assistant_id": graph, "input": {}, "on_completion": "keep", "stream_mode": ["messages-tuple"]}
    answers = client.spread((client.request("POST", "/runs", body) for _ in range(runs)), 8)
    started = [(run["thread_id"], run["run_id"]) for run in (answer.json() for _, answer in answers)]
    deadline = time.monotonic() + STREAM_LIMIT_S
    while int(bench.endpoint.ask("/waiting")) < runs:
        check(time.monotonic() < deadline, "the runs do not ask their model")
        time.sleep(0.01)
    listening: list[Reader] = []
    silent: list[Reader] = []
    try:
        for number in range(readers):
            thread, run = started[number % runs]
            request = client.request("GET", f"/threads/{thread}/runs/{run}/stream?stream_mode=messages-tuple")
            reader = Reader(client.port, request, number < runs, deaf=number >= readers - deaf)
            (silent if number >= readers - deaf else listening).append(reader)
        bench.server.reset_peak()
        meter = bench.meter()
        own, endpoint = measure.cpu_of_self(), float(bench.endpoint.ask("/cpu"))
        begun_at = database.value("select cynai_now()")
        begun = time.perf_counter()
        check(int(bench.endpoint.ask("/go")) == runs, "the endpoint has not the answers of all runs")
        read_all(listening)
        delivered = time.perf_counter() - begun
        ids = ",".join(f"'{run}'" for _, run in started)
        ended = f"select count(*) from runs where run_id in ({ids}) and ended_at is not null"
        while database.number(ended) < runs:
            check(time.monotonic() < deadline, "the runs do not end")
            time.sleep(0.02)
        meter.stop()
        own = measure.cpu_of_self() - own
        endpoint = float(bench.endpoint.ask("/cpu")) - endpoint
        peak = bench.server.memory_mb("VmHWM")
    finally:
        for reader in listening + silent:
            reader.socket.close()
    judge(listening, count)
    rows = database.query(
        f"""select status, extract(epoch from ended_at - '{begun_at}'::timestamptz) from runs where run_id in ({ids})"""
    )
    check(all(status == "success" for status, _ in rows), f"not all runs succeeded: {rows}")
    took = [float(seconds) for _, seconds in rows]
    if workload:
        measure.emit(PEER, workload, "run_p50", percentile(took, 50), "s", noise=meter.noise)
        measure.emit(PEER, workload, "run_max", max(took), "s")
        measure.emit(PEER, workload, "tokens_made_per_s", runs * count / max(took), "tokens/s")
        if listening:
            tokens = len(listening) * count
            first = [1000 * (reader.first - begun) for reader in listening]
            measure.emit(PEER, workload, "tokens_read_per_s", tokens / delivered, "tokens/s")
            measure.emit(PEER, workload, "first_token_p50", percentile(first, 50), "ms")
            measure.emit(PEER, workload, "first_token_p99", percentile(first, 99), "ms")
            measure.emit(PEER, workload, "last_read_after", delivered - max(took), "s")
        for who, seconds in (("engine", meter.engine), ("pg", meter.cluster), ("endpoint", endpoint), ("readers", own)):
            measure.emit(PEER, workload, f"cpu_{who}", seconds / meter.seconds, "cores")
        measure.emit(PEER, workload, "rss_peak", peak, "MB")
    return percentile(took, 50)


def read_all(readers: list[Reader]) -> None:
    """Reads until each of them has seen its end."""
    deadline = time.monotonic() + STREAM_LIMIT_S
    with selectors.EpollSelector() as selector:
        for reader in readers:
            selector.register(reader.socket, selectors.EVENT_READ, reader)
        while selector.get_map():
            for key, _ in selector.select(timeout=1):
                if not key.data.read():
                    selector.unregister(key.fileobj)
            check(time.monotonic() < deadline, "the streams do not end")


def judge(readers: list[Reader], count: int) -> None:
    expected = "".join(map(token, range(count)))
    for reader in readers:
        check(reader.tokens == count, f"a reader got {reader.tokens} of {count} tokens")
        if reader.kept is not None:
            check(reader.text() == expected, "a reader got its tokens in another order, or not whole")
    check(len(expected) == count * TOKEN_BYTES, "tokens have another length")
