"""The system under test: a `cynai serve` process, its private database, and a client that costs little.

The client speaks just enough HTTP/1.1 to start runs and wait for them: requests are made once, sent as
they are, and of the answers only what is needed is read. On two cores a usual HTTP library would be a
good part of what is measured.
"""

import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import measure

HOST = "127.0.0.1"
START_LIMIT_S = 60
STOP_LIMIT_S = 60
RUN_LIMIT_S = 300


class Broken(Exception):
    """The system did not do what a measurement rests on."""


def check(holds: bool, text: str) -> None:
    if not holds:
        raise Broken(text)


class Endpoint:
    """The process of benches/endpoint.py: models and tools."""

    def __init__(self):
        self.script = Path(__file__).parent / "endpoint.py"
        self.process = subprocess.Popen([sys.executable, str(self.script)], stdout=subprocess.PIPE)
        self.port = int(self.process.stdout.readline())

    def ask(self, path: str) -> bytes:
        with Connection(self.port) as connection:
            answer = connection.ask(f"POST {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        check(answer.status == 200, f"the endpoint answered {answer.status} to {path}")
        return answer.body

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Database:
    """One `psql` that stays connected, so that a query costs no process."""

    END = "--end--"

    def __init__(self, folder: Path):
        self.folder = folder
        command = ["psql", "--no-psqlrc", "-qAtX", "-v", "ON_ERROR_STOP=1", "-h", str(folder), "-p", "5432"]
        command += ["-U", "cynai", "-d", "cynai"]
        environment = {name: text for name, text in os.environ.items() if not name.startswith("PG")}
        self.psql = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    @property
    def url(self) -> str:
        return f"postgres://cynai@localhost/cynai?host={self.folder}"

    def query(self, sql: str) -> list[list[str]]:
        self.psql.stdin.write(f"{sql};\n\\echo {self.END}\n")
        self.psql.stdin.flush()
        rows = []
        for line in self.psql.stdout:
            line = line.rstrip("\n")
            if line == self.END:
                return rows
            rows.append(line.split("|"))
        raise Broken(f"psql ended at: {sql}")

    def value(self, sql: str) -> str:
        return self.query(sql)[0][0]

    def number(self, sql: str) -> float:
        return float(self.value(sql))

    def wal_bytes(self) -> int:
        return int(self.value("select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint"))

    def close(self) -> None:
        self.psql.stdin.close()
        self.psql.wait(timeout=10)
        self.psql.stdout.close()


class Server:
    """`cynai serve` with a data directory of its own, or beside another on the same database."""

    def __init__(self, program: Path, graphs: Path, beside: "Server | None" = None):
        self.program, self.graphs, self.beside = program, graphs, beside
        self.folder = Path(tempfile.mkdtemp(prefix="cynai-bench."))
        # The database's user passes through it.
        self.folder.chmod(0o711)
        self.data = self.folder / "data"
        self.log = self.folder / "log"
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port = probe.getsockname()[1]
        self.arguments: list[str] = []  # more of them, for whoever profiles
        self.process: subprocess.Popen | None = None

    def start(self) -> float:
        """Starts the server; returns when its line says that it is ready, with that instant."""
        command = [str(self.program), "serve", "--listen", f"{HOST}:{self.port}", "--data-dir", str(self.data)]
        command += ["--graphs", str(self.graphs), "--no-local-worker", "--log", "warn"]
        if self.beside:
            command += ["--database-url", self.beside.database_url()]
        command += self.arguments
        kept = ("PATH", "HOME", "LANG", "CYNAI_PG_BIN")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, env=environment, cwd=self.folder
            )
        line = self.process.stdout.readline()
        ready = time.time()
        if b"ready" not in line:
            raise Broken("the server did not start")
        return ready

    def log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""

    def wait_ready(self) -> float:
        """Asks until requests are welcome, the driver's lease included."""
        request = b"GET /readyz HTTP/1.1\r\nhost: localhost\r\n\r\n"
        deadline = time.monotonic() + START_LIMIT_S
        with Connection(self.port) as connection:
            while connection.ask(request).status != 200:
                if time.monotonic() > deadline:
                    raise Broken("the server does not become ready")
                time.sleep(0.001)
        return time.time()

    @property
    def cluster(self) -> Path:
        return self.data / "postgres" / "cluster"

    def socket_folder(self) -> Path:
        # When the data directory's path is too long for a socket's, this file names another place.
        elsewhere = self.data / "postgres" / "socket-dir"
        if elsewhere.exists():
            return Path(elsewhere.read_text().strip())
        return self.data / "postgres" / "socket"

    def database_url(self) -> str:
        return f"postgres://cynai@localhost/cynai?host={self.socket_folder()}"

    def token(self) -> str:
        if self.beside:
            return self.beside.token()
        return (self.data / "admin-token").read_text().strip()

    def cpu_seconds(self) -> float:
        """What the server's process has used; its database is counted apart."""
        fields = measure.stat(self.process.pid)
        return (int(fields[11]) + int(fields[12])) / measure.TICKS

    def memory_mb(self, key: str = "VmRSS") -> float:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) / 1024
        raise Broken(f"no {key} of the server")

    def reset_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=STOP_LIMIT_S)
        self.process.stdout.close()

    def remove(self) -> None:
        """Ends what is left, the database too, and removes every file."""
        if self.process and self.process.poll() is None:
            self.kill()
        try:
            postmaster = int((self.cluster / "postmaster.pid").read_text().split("\n", 1)[0])
            os.kill(postmaster, signal.SIGQUIT)
            deadline = time.monotonic() + 10
            while measure.stat(postmaster) and time.monotonic() < deadline:
                time.sleep(0.02)
        except (OSError, ValueError):
            pass  # It has ended.
        shutil.rmtree(self.folder, ignore_errors=True)


class Answer:
    __slots__ = ("body", "status")

    def __init__(self, status: int, body: bytes):
        self.status, self.body = status, body

    def json(self):
        if self.status >= 300:
            raise Broken(f"HTTP {self.status}: {self.body[:500]!r}")
        return json.loads(self.body)


class Connection:
    """One kept-alive HTTP connection."""

    def __init__(self, port: int):
        self.socket = socket.create_connection((HOST, port), timeout=RUN_LIMIT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_) -> None:
        self.socket.close()

    def send(self, request: bytes) -> None:
        self.socket.sendall(request)

    def ask(self, request: bytes) -> Answer:
        self.send(request)
        while (answer := self.receive()) is None:
            pass
        return answer

    def receive(self) -> Answer | None:
        """Reads what has come; gives the answer when it is whole."""
        part = self.socket.recv(1 << 20)
        if not part:
            raise Broken("the server closed the connection")
        self.buffer += part
        head, separator, rest = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return None
        head = head.lower()
        status = int(head.split(b" ", 2)[1])
        if b"transfer-encoding: chunked" in head:
            body = unchunked(rest)
        else:
            size = 0
            if b"\r\ncontent-length: " in head:
                size = int(head.split(b"\r\ncontent-length: ", 1)[1].split(b"\r\n", 1)[0])
            body = rest if len(rest) == size else None
        if body is None:
            return None
        self.buffer = b""
        return Answer(status, body)


def unchunked(rest: bytes) -> bytes | None:
    """The body of a chunked answer; none when its last chunk has not come."""
    if not rest.endswith(b"0\r\n\r\n"):
        return None
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        size = int(size, 16)
        if size == 0:
            return body
        if len(rest) < size + 2:
            return None
        body, rest = body + rest[:size], rest[size + 2 :]
    return None


def spread(port: int, requests: Iterable[bytes], at_once: int) -> Iterator[tuple[float, Answer]]:
    """Makes the requests, `at_once` at a time; yields each answer with the seconds that it took."""
    requests = iter(requests)
    with selectors.EpollSelector() as selector:
        connections = [Connection(port) for _ in range(at_once)]
        sent: dict[Connection, float] = {}

        def send_next(connection: Connection) -> None:
            request = next(requests, None)
            if request is None:
                selector.unregister(connection.socket)
                connection.socket.close()
                return
            sent[connection] = time.perf_counter()
            connection.send(request)

        for connection in connections:
            selector.register(connection.socket, selectors.EVENT_READ, connection)
            send_next(connection)
        while selector.get_map():
            ready = selector.select(timeout=RUN_LIMIT_S)
            if not ready:
                raise Broken("no answer came in time")
            for key, _ in ready:
                connection = key.data
                if (answer := connection.receive()) is not None:
                    seconds = time.perf_counter() - sent[connection]
                    send_next(connection)
                    yield seconds, answer


class Client:
    """Makes requests to one server as its administrator."""

    def __init__(self, server: Server):
        self.port, self.token = server.port, server.token()
        self.connection = Connection(self.port)

    def request(self, method: str, path: str, body=None) -> bytes:
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {self.token}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        return head.encode() + content

    def ask(self, method: str, path: str, body=None):
        return self.connection.ask(self.request(method, path, body)).json()

    def metrics(self) -> dict[str, float]:
        # A connection of its own: the server closes one that nobody used for a while.
        with Connection(self.port) as connection:
            answer = connection.ask(self.request("GET", "/metrics"))
        lines = answer.body.decode().splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
        return {name: float(value) for name, value in pairs}

    def run(self, graph: str, state: dict) -> bytes:
        """The request that starts a run on a thread of its own, and answers with its values when it ends."""
        body = {"assistant_id": graph, "input": state, "on_completion": "keep"}
        return self.request("POST", "/runs/wait", body)

    def spread(self, requests: Iterable[bytes], at_once: int) -> Iterator[tuple[float, Answer]]:
        return spread(self.port, requests, at_once)

    def close(self) -> None:
        self.connection.socket.close()
