#!/usr/bin/env python3
"""What models and tools are for the benchmark: a scripted OpenAI-compatible endpoint and an MCP server.

    benches/endpoint.py             HTTP on a free port of 127.0.0.1, whose number is the first line printed
    benches/endpoint.py --stdio     the same MCP server over pipes

It does as little as it can, since it shares two cores with what is measured. A request says what it gets:

    POST /stream/MS/v1/chat/completions      a streamed answer of two pieces after MS milliseconds
    POST /plain/MS/v1/chat/completions       an answer in one piece; streams are refused
    POST /gated/v1/chat/completions          waits for `POST /go`; then, for the model `COUNTxRATE`, COUNT
                                             tokens, RATE a second (0: all at once)
    POST /mcp                                MCP of 2025-11-25, without sessions
    POST /waiting                            how many requests wait for that
    POST /go                                 lets those begin that wait; answers how many they are
    POST /cpu                                the processor seconds that this process has used

The tool `act` answers its `text` after `delay_ms`; `look` is the same, and says that it only looks.
"""

import asyncio
import functools
import json
import sys
import time

HOST = "127.0.0.1"
USAGE = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
STOP = {"index": 0, "delta": {}, "finish_reason": "stop"}
TOKEN_BYTES = 8
TOOLS = [
    {
        "name": name,
        "description": "Answers its text.",
        "inputSchema": {
            "type": "object",
            "properties": {"text": {"type": "string"}, "delay_ms": {"type": "integer"}},
            "required": ["text"],
        },
        "annotations": {"readOnlyHint": name == "look"},
    }
    for name in ("act", "look")
]


def token(number: int) -> str:
    """TOKEN_BYTES long, and no two of one answer alike."""
    return f" t{number:06d}"


def event(choice: dict | None, usage: dict | None = None) -> bytes:
    data = {"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": [choice] if choice else []}
    if usage:
        data["usage"] = usage
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def piece(text: str) -> bytes:
    return event({"index": 0, "delta": {"content": text}, "finish_reason": None})


def chunk(body: bytes) -> bytes:
    return f"{len(body):x}\r\n".encode() + body + b"\r\n"


def answer(body: bytes, status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM_END = chunk(event(STOP) + event(None, USAGE) + b"data: [DONE]\n\n") + b"0\r\n\r\n"
STREAMED = STREAM_HEAD + chunk(piece("o")) + chunk(piece("k")) + STREAM_END
PLAIN = answer(
    json.dumps(
        {
            "id": "c",
            "object": "chat.completion",
            "model": "m",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}
            ],
            "usage": USAGE,
        }
    ).encode()
)
REFUSED = answer(b'{"error": {"message": "stream is not supported", "param": "stream"}}', "400 Bad Request")


@functools.cache
def at_once(count: int) -> bytes:
    """A whole streamed answer of `count` tokens."""
    return STREAM_HEAD + b"".join(chunk(piece(token(number))) for number in range(count)) + STREAM_END


def told(message: dict) -> tuple[dict | None, float]:
    """The answer to a message of MCP, and after how many seconds it goes; none for what wants no answer."""
    method, params = message.get("method"), message.get("params") or {}
    if "id" not in message:
        return None, 0
    result, delay = {}, 0
    if method == "initialize":
        result = {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}}}
        result["serverInfo"] = {"name": "bench", "version": "1"}
    elif method == "tools/list":
        result = {"tools": TOOLS}
    elif method == "tools/call":
        arguments = params["arguments"]
        delay = arguments.get("delay_ms", 0) / 1000
        result = {"content": [{"type": "text", "text": arguments["text"]}], "isError": False}
    return {"jsonrpc": "2.0", "id": message["id"], "result": result}, delay


class Http(asyncio.Protocol):
    """One connection; requests come one after the other."""

    gated: list["Http"] = []

    def connection_made(self, transport) -> None:
        self.transport, self.buffer = transport, b""
        self.loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, separator, rest = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        size = 0
        for line in head.split(b"\r\n")[1:]:
            if line[:15].lower() == b"content-length:":
                size = int(line[15:])
        if len(rest) < size:
            return
        self.buffer = rest[size:]
        self.serve(head.split(b" ", 2)[1].decode(), head.split(b" ", 1)[0], rest[:size])

    def write(self, data: bytes, delay: float = 0) -> None:
        if delay:
            self.loop.call_later(delay, self.transport.write, data)
        else:
            self.transport.write(data)

    def serve(self, path: str, method: bytes, body: bytes) -> None:
        kind, *rest = path.strip("/").split("/")
        if kind == "mcp" and method == b"POST":
            message, delay = told(json.loads(body))
            self.write(answer(json.dumps(message).encode()) if message else answer(b"", "202 Accepted"), delay)
        elif kind == "stream":
            self.write(STREAMED, int(rest[0]) / 1000)
        elif kind == "plain":
            streamed = json.loads(body).get("stream")
            self.write(REFUSED if streamed else PLAIN, 0 if streamed else int(rest[0]) / 1000)
        elif kind == "gated":
            self.count, self.rate = map(int, json.loads(body)["model"].split("x"))
            if not self.rate:
                at_once(self.count)  # Made before the clock starts.
            self.gated.append(self)
        elif kind == "go":
            waiting, self.gated[:] = list(self.gated), []
            for connection in waiting:
                connection.begin()
            self.write(answer(str(len(waiting)).encode()))
        elif kind == "waiting":
            self.write(answer(str(len(self.gated)).encode()))
        elif kind == "cpu":
            self.write(answer(str(time.process_time()).encode()))
        else:
            self.write(answer(b"{}", "405 Method Not Allowed"))

    def begin(self) -> None:
        self.sent, self.begun = 0, self.loop.time()
        if self.rate:
            self.transport.write(STREAM_HEAD)
            self.next_token()
        else:
            self.transport.write(at_once(self.count))

    def next_token(self) -> None:
        if self.transport.is_closing():
            return
        if self.sent == self.count:
            self.transport.write(STREAM_END)
            return
        self.transport.write(chunk(piece(token(self.sent))))
        self.sent += 1
        self.loop.call_at(self.begun + self.sent / self.rate, self.next_token)


class Pipes(asyncio.Protocol):
    """Standard input; each line is a message."""

    buffer = b""

    def data_received(self, data: bytes) -> None:
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            message, delay = told(json.loads(line))
            if message is None:
                continue
            text = json.dumps(message) + "\n"
            if delay:
                asyncio.get_running_loop().call_later(delay, self.write, text)
            else:
                self.write(text)

    def write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def connection_lost(self, _) -> None:
        asyncio.get_running_loop().stop()


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Http, HOST, 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    if sys.argv[1:] == ["--stdio"]:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(loop.connect_read_pipe(Pipes, sys.stdin))
        loop.run_forever()
    else:
        asyncio.run(serve())


if __name__ == "__main__":
    main()
