"""The graphs that are measured. Every step does nothing but count, or makes one call of a model or a tool."""

import json
import sys
from pathlib import Path

from measure import BRANCHES, STEPS

COUNT = {"type": "integer", "default": 0}
MANY_SUPERSTEPS = 20_000
MAX_PARALLEL = 128

PROMPT, TEXT = "Say ok.", "a text of no interest"
CALLS_A_RUN = 10
# Graph -> how the endpoint answers, and after how many milliseconds.
MODEL_CALLS = {f"{kind}_{delay}": (kind, delay) for kind in ("stream", "plain") for delay in (0, 50)}
# Graph -> server, tool, and after how many milliseconds it answers.
TOOL_CALLS = {
    f"{server}_{tool}_{delay}": (server, tool, delay)
    for server, tool, delay in [
        ("stdio", "act", 0),
        ("stdio", "act", 50),
        ("stdio", "look", 0),
        ("http", "act", 0),
        ("http", "act", 50),
        ("http", "look", 0),
    ]
}
# Graph -> how many tokens its model says, and how many a second; 0 is as fast as it can.
TALKS = {"rate": (200, 50), "flat": (2000, 0)}


def chain() -> dict:
    """STEPS nodes in a row."""
    names = [f"step_{number}" for number in range(STEPS)]
    return {
        "name": "chain",
        "state": {"n": COUNT},
        "nodes": {name: {"set": {"n": "${state.n + 1}"}} for name in names},
        "edges": [" -> ".join(["start", *names, "end"])],
    }


def loop(
    name: str = "loop", state: dict | None = None, updates: dict | None = None, does: dict | None = None
) -> dict:
    """One node, `most` times."""
    return {
        "name": name,
        "state": {"n": COUNT, "most": {"type": "integer", "default": STEPS}} | (state or {}),
        "limits": {"supersteps": MANY_SUPERSTEPS},
        "nodes": {"step": (does or {}) | {"set": {"n": "${state.n + 1}"} | (updates or {})}},
        "edges": [
            "start -> step",
            {"from": "step", "choose": [{"when": "state.n < state.most", "to": "step"}, {"to": "end"}]},
        ],
    }


def fan() -> dict:
    """BRANCHES activations in one superstep, and a node that adds up what they found."""
    return {
        "name": "fan",
        "state": {"n": COUNT, "parts": {"type": "array", "reduce": "append"}, "total": COUNT},
        "nodes": {
            "source": {"set": {"n": 1}},
            "branch": {"for_each": f"${{range({BRANCHES})}}", "as": "i", "set": {"parts": "${[i]}"}},
            "join": {"set": {"total": "${state.parts.sum()}"}},
        },
        "edges": ["start -> source -> branch -> join -> end"],
    }


def large() -> dict:
    """A counter, beside a large value that nobody writes."""
    return loop("large", {"big": {"type": "string"}})


def append() -> dict:
    """A counter, and a list that grows by one entry of some ninety bytes a step."""
    entry = "entry number ${state.n} of a list that only grows, with ninety bytes or so of text in each"
    return loop("append", {"log": {"type": "array", "reduce": "append"}}, {"log": [entry]})


def nap() -> dict:
    """Parks at once, for longer than anybody measures."""
    return {
        "name": "nap",
        "state": {"n": COUNT},
        "nodes": {"sleep": {"wait": {"for": "1h"}, "set": {"n": "${state.n + 1}"}}},
        "edges": ["start -> sleep -> end"],
    }


def model_call(name: str) -> dict:
    """A model is asked `most` times."""
    return loop(name, does={"model": {"model": f"{name}/m", "prompt": PROMPT}})


def tool_call(name: str, server: str, tool: str, delay: int) -> dict:
    """A tool is called `most` times."""
    arguments = {"text": TEXT, "delay_ms": delay}
    return loop(name, does={"tool": {"server": server, "name": tool, "arguments": arguments}})


def talk(name: str, count: int, rate: int) -> dict:
    """A model says `count` tokens, `rate` a second, once the endpoint lets it."""
    return {
        "name": name,
        "state": {"length": COUNT},
        "nodes": {"talk": {"model": {"model": f"gated/{count}x{rate}", "prompt": PROMPT},
                           "set": {"length": "${output.text.size()}"}}},
        "edges": ["start -> talk -> end"],
    }  # fmt: skip


def write_all(folder: Path) -> Path:
    folder.mkdir(mode=0o755)
    calls = [*map(model_call, MODEL_CALLS), *(tool_call(name, *call) for name, call in TOOL_CALLS.items())]
    talks = [talk(name, *how) for name, how in TALKS.items()]
    for graph in (chain(), loop(), fan(), large(), append(), nap(), *calls, *talks):
        (folder / f"{graph['name']}.json").write_text(json.dumps(graph))
    return folder


def config(script: Path, port: int) -> dict:
    """The server's configuration: the models and tools of `benches/endpoint.py`."""
    root = f"http://127.0.0.1:{port}"
    models = {name: f"{root}/{kind}/{delay}/v1" for name, (kind, delay) in MODEL_CALLS.items()}
    models["gated"] = f"{root}/gated/v1"
    tools = {"protocol": "2025-11-25", "max_parallel": MAX_PARALLEL}
    return {
        "models": {"endpoints": {name: {"url": url, "max_parallel": MAX_PARALLEL} for name, url in models.items()}},
        "mcp_servers": {
            "stdio": {"command": [sys.executable, str(script), "--stdio"]} | tools,
            "http": {"url": f"{root}/mcp"} | tools,
        },
    }
