"""Where the time of a run goes, over all its restarts, and which share of it counts.

Seconds by kind, on the clock of the first process; together they are the time since the first start:

- step: waiting for the devices to finish a dispatch and reading its metrics, for steps that the state still has.
- data_wait: waiting for the batch of a dispatch.
- report: writing metrics, to files and the screen, while the devices are at the next dispatch.
- compile: the first dispatch of a process, whole: XLA compiles, or reads what it compiled before, and runs it once.
- evaluation, sampling: theirs, the compilation of their programs included.
- checkpoint: from the start of a save to where training goes on, and waiting for the last one.
- start: of the first process, from the start of the command to its first dispatch or evaluation: imports, joining
  the other processes, data, initial state, logs.
- restart: the same of each later process, where the state comes from a checkpoint.
- rollback: from the step that spiked to the next dispatch or evaluation.
- lost: work that the state no longer has: after the last save before a kill, as far as the run's metrics tell when that
  was, and the steps, data waits and reports that a rollback undid.
- down: from there to the start of the next command, with what an orderly end took after its last save.

A process that was killed before its first save leaves nothing behind: the process after it is the first.

Goodput is `step` over the time since the first start.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

OF_STEPS = ("step", "data_wait", "report")


class Stopwatch:
    """Seconds spent by kind, for throughput and the final account."""

    def __init__(self, spent: dict[str, float] | None = None) -> None:
        self.spent = dict(spent or {})
        self._since = time.perf_counter()

    def add(self, kind: str) -> float:
        """Books the time since the last call under `kind`, and returns it."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self.spent[kind] = self.spent.get(kind, 0.0) + seconds
        return seconds


def first_start(history: Mapping[str, Any], started: float) -> float:
    """Returns when the run was first started, for a command that was started at `started`, in seconds since 1970."""
    return history.get("started_at", started - sum(history["seconds"].values()))


def at_start(history: Mapping[str, Any], *, started: float, last_sign: float, now: float) -> dict[str, float]:
    """Returns the seconds spent so far, of a process that has just got its state and history.

    started: when its command was. last_sign: when the process before was last seen to work; 0 where that is not known.
    """
    spent = dict(history["seconds"])
    if not history["restarts"]:
        return spent | {"start": now - started}
    saved = min(history.get("saved_at", started), started)
    last = min(max(last_sign, saved), started)
    for kind, seconds in (("lost", last - saved), ("down", started - last), ("restart", now - started)):
        spent[kind] = spent.get(kind, 0.0) + seconds
    return spent


def after_rollback(spent: Mapping[str, float], past: Mapping[str, float]) -> dict[str, float]:
    """Returns the seconds spent so far, when steps are undone down to a state by which `past` had been."""
    undone = {kind: spent.get(kind, 0.0) - past.get(kind, 0.0) for kind in OF_STEPS}
    kept = {kind: past.get(kind, 0.0) for kind in undone}
    return dict(spent) | kept | {"lost": spent.get("lost", 0.0) + sum(undone.values())}


def share(spent: Mapping[str, float], total: float) -> float:
    """Returns the goodput of a run that was first started `total` seconds ago, from 0 to 1."""
    return spent.get("step", 0.0) / total if total > 0 else math.nan


def scalars(spent: Mapping[str, float], total: float) -> dict[str, float]:
    """Returns goodput and the seconds of each kind, by the names that they have in metrics.jsonl and TensorBoard."""
    return {"goodput": share(spent, total)} | {f"seconds/{kind}": seconds for kind, seconds in spent.items()}


def describe(spent: Mapping[str, float], total: float) -> list[str]:
    """Returns goodput as a line, and a line for each kind, the largest first."""
    rows = dict(spent) | {"other": total - sum(spent.values())}
    counted = f"{duration(rows.get('step', 0.0))} of steps that count, of {duration(total)} since the first start"
    lines = [f"goodput {100 * share(spent, total):.1f}%: {counted}"]
    for kind, seconds in sorted(rows.items(), key=lambda row: -row[1]):
        if seconds > 0.05:
            lines.append(f"  {kind.replace('_', ' '):<10} {duration(seconds):>6} {100 * seconds / total:5.1f}%")
    return lines


def duration(seconds: float) -> str:
    """Returns seconds as people write them.

    >>> duration(59.6), duration(3700), duration(200000)
    ('1m00s', '1h01m', '2d07h')
    """
    if not math.isfinite(seconds):
        return "n/a"
    whole = round(seconds)
    if seconds < 1:
        return f"{1e3 * seconds:.0f}ms"
    if whole < 60:
        return f"{whole}s" if whole >= 10 else f"{seconds:.1f}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
