"""An MCP server over pipes that writes down each call before it answers: the tool, its idempotency key, its label.

A record goes to the file in CALLS with one write, and its length divides a page, so that a kill does not tear it.
"""
import json
import os
import sys
import threading
import time

FILE = os.open(os.environ["CALLS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
LOCK = threading.Lock()
TOOLS = [
    {"name": "act", "inputSchema": {"type": "object"}},
    {"name": "put", "inputSchema": {"type": "object"}, "annotations": {"idempotentHint": True}},
]


def write(id, result):
    with LOCK:
        sys.stdout.write(json.dumps({"jsonrpc": "2.0", "id": id, "result": result}) + "\n")
        sys.stdout.flush()


def call(id, params):
    arguments = params.get("arguments") or {}
    key = params["_meta"]["cynai/idempotency-key"]
    os.write(FILE, f"{params['name']} {key} {arguments.get('label')}".ljust(127).encode() + b"\n")
    os.fsync(FILE)
    time.sleep(arguments.get("milliseconds", 0) / 1000)
    write(id, {"content": [{"type": "text", "text": key}]})


for line in sys.stdin:
    message = json.loads(line)
    method, params = message.get("method"), message.get("params") or {}
    if method == "initialize":
        write(message["id"], {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}},
                              "serverInfo": {"name": "counting", "version": "1"}})
    elif method == "tools/list":
        write(message["id"], {"tools": TOOLS})
    elif method == "tools/call":
        threading.Thread(target=call, args=(message["id"], params), daemon=True).start()
