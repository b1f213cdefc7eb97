#!/usr/bin/env python3
"""Sets our figures beside their peers', their floor's, and their targets.

    benches/ratios.py FILE...        JSON lines of our benchmark and of benches/peers/run

Prints a Markdown table. Of several repetitions the median counts. A figure that was not measured is
shown as missing, never left out: a table cannot look better by measuring less.
"""

import json
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass

OURS, FLOOR, DIRECT = "cynai", "floor", "direct"
LANGGRAPH, RESTATE = "langgraph-py/sync", "restate-ts"


@dataclass(frozen=True)
class Target:
    """A bound on one of our figures: absolute, or as a multiple of somebody's figure of the same workload.

    `of` names who that is; or a peer and another workload of its.
    """

    workload: str
    metric: str
    bound: float
    at_least: bool
    of: str | tuple[str, str] | None = None


def at_most(workload: str, metric: str, bound: float, of: str | tuple[str, str] | None = None) -> Target:
    return Target(workload, metric, bound, at_least=False, of=of)


def at_least(workload: str, metric: str, bound: float, of: str | None = None) -> Target:
    return Target(workload, metric, bound, at_least=True, of=of)


# `cpu_per_step` is a sum: see `with_sums`.
TARGETS = [
    at_least("W1.chain", "steps_per_s@64", 0.6, of=FLOOR),
    at_least("W1.chain", "steps_per_s@64", 4, of=RESTATE),
    at_least("W1.chain", "steps_per_s@64", 30, of=LANGGRAPH),
    at_least("W1.loop", "steps_per_s@64", 30, of=LANGGRAPH),
    at_most("W1.chain", "step_p99@64", 8),
    at_most("W1.chain", "step_p50@1", 1.3, of=FLOOR),
    at_least("W1.chain", "steps_per_s@1", 2.5, of=RESTATE),
    at_most("W1.chain", "cpu_per_step@64", 90),
    at_most("W1.chain", "wal_bytes_per_step@64", 650),
    at_most("W1.loop", "wal_bytes_per_step@64", 650),
    at_most("W2", "run_p50@1", 6),
    at_least("W2", "branches_per_s@1", 4, of=RESTATE),
    at_least("W2", "branches_per_s@16", 4, of=RESTATE),
    at_most("W3.str", "wal_bytes_per_step", 1024),
    at_most("W4", "ready_to_first_step", 150),
    at_most("W4", "steps_run_again", 0),
    at_most("W5.10000", "load_latest_p50", 0.6),
    at_most("W5.10000", "list_20", 2),
    at_most("W5.10000", "db_growth_per_checkpoint", 300),
    at_most("W7", "rss_idle", 30),
    at_most("W7", "rss_64", 60),
    at_most("W7", "rss_per_100k_parked", 5),
    at_most("W7", "start_to_ready", 200),
    at_most("W7", "start_to_ready_100k_parked", 500),
    at_most("W8.stream.0ms", "added_p50@1", 5),
    at_most("W8.stream.50ms", "call_p50@1", 1.1, of=DIRECT),
    at_most("W8.stream.50ms", "call_p50@64", 1.2, of=DIRECT),
    at_most("W8.plain.50ms", "call_p50@64", 1.2, of=DIRECT),
    at_most("W9.stdio.act.0ms", "added_p50@1", 5),
    at_most("W9.stdio.act.50ms", "call_p50@64", 1.2, of=DIRECT),
    at_most("W9.http.act.0ms", "added_p50@1", 5),
    at_most("W9.http.act.50ms", "call_p50@64", 1.2, of=DIRECT),
    *(
        at_most(f"W10.{talk}.readers200{deaf}", "run_p50", 1.2, of=(OURS, f"W10.{talk}.readers0"))
        for talk in ("rate", "flat")
        for deaf in ("", ".deaf50")
    ),
]

Figures = dict[tuple[str, str, str], float]


def read(paths: list[str]) -> tuple[Figures, dict[str, str]]:
    values, units = defaultdict(list), {}
    for path in paths:
        with open(path, encoding="utf-8") as lines:
            for line in filter(str.strip, lines):
                row = json.loads(line)
                values[row["peer"], row["workload"], row["metric"]].append(row["value"])
                units[row["metric"]] = row["unit"]
    return {key: statistics.median(found) for key, found in values.items()}, units


def with_sums(figures: Figures, units: dict[str, str]) -> None:
    """A step costs what the engine and its database use together."""
    for (peer, workload, metric), value in list(figures.items()):
        database = figures.get((peer, workload, metric.replace("engine", "pg")))
        if metric.startswith("cpu_engine_per_step") and database is not None:
            total = metric.replace("cpu_engine", "cpu")
            figures[peer, workload, total] = value + database
            units[total] = "us"


def row(target: Target, figures: Figures, units: dict[str, str]) -> list[str]:
    ours = figures.get((OURS, target.workload, target.metric))
    sign = ">=" if target.at_least else "<="
    name = f"{target.workload} {target.metric}"
    unit = units.get(target.metric, "")
    shown = "missing" if ours is None else f"{ours:,.4g} {unit}"
    if target.of is None:
        measured, beside, wanted = ours, "", f"{sign} {target.bound:g} {unit}"
    else:
        peer, workload = target.of if isinstance(target.of, tuple) else (target.of, target.workload)
        other = figures.get((peer, workload, target.metric))
        measured = ours / other if ours is not None and other else None
        ratio = "missing" if measured is None else f"{measured:.2f}x"
        name_of = peer if workload == target.workload else workload
        beside = f"{name_of} {'missing' if other is None else f'{other:,.4g}'}: {ratio}"
        wanted = f"{sign} {target.bound:g}x"
    if measured is None:
        verdict = "not measured"
    else:
        met = measured >= target.bound if target.at_least else measured <= target.bound
        verdict = "met" if met else "MISSED"
    return [name, shown, beside, wanted, verdict]


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: ratios.py FILE...")
    figures, units = read(sys.argv[1:])
    with_sums(figures, units)
    print("| figure | cynai | beside | target | |", "| --- | --- | --- | --- | --- |", sep="\n")
    for target in TARGETS:
        print("|", " | ".join(row(target, figures, units)), "|")


if __name__ == "__main__":
    main()
