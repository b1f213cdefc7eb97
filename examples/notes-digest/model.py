#!/usr/bin/env python3
"""A stand-in for a language model: an OpenAI-compatible endpoint that sums up a note by its heading.

    model.py [PORT]     prints its address

It streams word by word, as a model does, and keeps nothing. For trying out the example where no model is at hand.
"""

import http.server
import json
import re
import sys
import time

NOTE = re.compile(r'<note file="([^"]*)">\s*(.*?)\s*</note>', re.DOTALL)
PACE = 0.03  # seconds for a word
MOST = 4 << 20  # bytes of a request


def answer(messages):
    """A line for each note of the last message: its file and its heading."""
    content = messages[-1].get("content") or ""
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    lines = [f"- {file}: {note.splitlines()[0].lstrip('# ') if note else 'nothing'}" for file, note in NOTE.findall(text)]
    return "\n".join(lines) or "There are no notes."


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def whole(self, status, body):
        body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.whole(200, {"object": "list", "data": [{"id": "headings", "object": "model"}]})

    def do_POST(self):
        length = int(self.headers.get("content-length") or 0)
        if not self.path.endswith("/chat/completions") or length > MOST:
            self.close_connection = True
            return self.whole(400, {"error": {"message": "not a chat, or too long"}})
        request = json.loads(self.rfile.read(length))
        text = answer(request["messages"])
        usage = {"prompt_tokens": length // 4, "completion_tokens": len(text.split()), "total_tokens": length // 4 + len(text.split())}
        if not request.get("stream"):
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return self.whole(200, {"id": "1", "object": "chat.completion", "model": "headings", "choices": [choice], "usage": usage})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        for word in re.findall(r"\S+\s*", text):
            self.event({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]})
            time.sleep(PACE)
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, chunk):
        chunk = {"id": "1", "object": "chat.completion.chunk", "model": "headings"} | chunk
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()


server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0), Handler)
print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
server.serve_forever()
