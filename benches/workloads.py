"""The graphs that are measured. Every step does nothing but count: what is measured is the engine."""

import json
from pathlib import Path

from measure import BRANCHES, STEPS

COUNT = {"type": "integer", "default": 0}
MANY_SUPERSTEPS = 20_000


def chain() -> dict:
    """STEPS nodes in a row."""
    names = [f"step_{number}" for number in range(STEPS)]
    return {
        "name": "chain",
        "state": {"n": COUNT},
        "nodes": {name: {"set": {"n": "${state.n + 1}"}} for name in names},
        "edges": [" -> ".join(["start", *names, "end"])],
    }


def loop(name: str = "loop", state: dict | None = None, updates: dict | None = None) -> dict:
    """One node, `most` times."""
    return {
        "name": name,
        "state": {"n": COUNT, "most": {"type": "integer", "default": STEPS}} | (state or {}),
        "limits": {"supersteps": MANY_SUPERSTEPS},
        "nodes": {"step": {"set": {"n": "${state.n + 1}"} | (updates or {})}},
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


def write_all(folder: Path) -> Path:
    folder.mkdir(mode=0o755)
    for graph in (chain(), loop(), fan(), large(), append(), nap()):
        (folder / f"{graph['name']}.json").write_text(json.dumps(graph))
    return folder
