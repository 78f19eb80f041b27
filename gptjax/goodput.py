"""Wall-time accounting across restarts, and goodput.

Seconds are counted by kind, on the first process. Their sum is the time since the first start. Within a process a
monotonic clock measures them. Only `down` compares times of day: those of the last save and of this start. If the clock
was wrong, a later start corrects `down`, so that the sum is the time since the first start. File times are not used: a
copy has different ones.

- step: waiting for the devices to finish a dispatch and reading its metrics, for steps that the state still has.
- data_wait: waiting for the batch of a dispatch.
- report: writing metrics, to files and the screen, while the devices run the next dispatch.
- compile: the entire first dispatch of a process: XLA compiles, or loads from its cache, and runs it once.
- evaluation, sampling: including the compilation of their programs.
- checkpoint: from the start of a save until training continues, and waiting for the last one.
- start: in the first process, from the start of the command to its first dispatch or evaluation: imports, joining
  the other processes, data, initial state, logs.
- restart: the same in each later process, which restores the state from a checkpoint.
- rollback: from the step that spiked to the next dispatch or evaluation.
- lost: work that the state no longer has: the steps after the last save before a kill, as far as metrics.jsonl has
  them, and the steps, data waits and reports that a rollback undid.
- down: from the last save to the start of the next command, without the lost steps.

A process that was killed before its first save leaves nothing behind: the process after it counts as the first.

Goodput is `step` divided by the sum of all kinds.
"""

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from gptjax.history import History

STEP_KINDS = ("step", "data_wait", "report")
CLOCK_IS_SET = 1.75e9  # June 2025, in seconds since 1970; an earlier time comes from a clock that is not set
LONGEST_STEP = 1e6  # seconds; a row with more is damaged
LEAST_SHOWN = 0.05  # seconds; shorter kinds are left out of the final account


class Stopwatch:
    """Seconds spent by kind, for throughput and the final account."""

    def __init__(self, spent: dict[str, float] | None = None) -> None:
        self.spent = dict(spent or {})
        self._since = time.perf_counter()

    def lap(self, kind: str) -> float:
        """Books the time since the last call under `kind`, and returns it."""
        now = time.perf_counter()
        seconds = now - self._since
        self._since = now
        self.spent[kind] = self.spent.get(kind, 0.0) + seconds
        return seconds


def first_start(history: History, started: float) -> float:
    """Returns when the run was first started, in seconds since 1970; `started` is the start of this command."""
    if history.started_at:
        return history.started_at
    # Checkpoints of older versions lack it. For a fresh run the sum is 0.
    return started - sum(history.seconds.values())


def spent_at_start(history: History, *, started: float, seconds: float, lost: float) -> dict[str, float]:
    """Returns the seconds spent so far, in a process that has just restored or initialised its state.

    started: the start of its command, in seconds since 1970.
    seconds: the time since then.
    lost: the seconds of the steps that the restored state lacks, from `seconds_after`.
    """
    spent = {}
    for kind, value in history.seconds.items():
        if math.isfinite(value) and value > 0:  # earlier versions could save others
            spent[kind] = value
    if not history.restarts:
        return spent | {"start": seconds}
    away = 0.0
    if history.saved_at > CLOCK_IS_SET:
        away = started - history.saved_at
    new = {
        "lost": lost,
        "down": max(0.0, away - lost),
        "restart": seconds,
    }
    for kind, added in new.items():
        spent[kind] = spent.get(kind, 0.0) + added
    wall = started + seconds - history.started_at
    return _without_excess(spent, wall)


def _without_excess(spent: dict[str, float], wall: float) -> dict[str, float]:
    """Returns `spent`, with `down` reduced where the sum exceeds `wall`, the seconds since the first start."""
    excess = sum(spent.values()) - wall
    if wall <= 0 or excess <= 0:  # wall <= 0: the clock is wrong now, so it cannot correct anything
        return spent
    down = spent.get("down", 0.0)
    return spent | {"down": max(0.0, down - excess)}


def seconds_after(rows: Iterable[Mapping[str, Any]], step: int) -> float:
    """Returns the seconds that the steps after `step` took, from rows of metrics, the newest first."""
    total = 0.0
    # Of the previous row, which is of a later step. Its step_seconds holds for all steps since the row before it.
    last = step
    seconds = 0.0
    for row in rows:
        if row["step"] <= step or "loss" not in row:
            continue
        total += max(0, last - row["step"]) * seconds
        last = row["step"]
        seconds = _valid_seconds(row.get("step_seconds"))
    return total + (last - step) * seconds


def _valid_seconds(value: object) -> float:
    """Returns step_seconds of a row; 0 where it is null, as after a compilation, or damaged."""
    if isinstance(value, int | float) and 0 <= value < LONGEST_STEP:
        return value
    return 0.0


def after_rollback(spent: Mapping[str, float], past: Mapping[str, float]) -> dict[str, float]:
    """Returns `spent` after a rollback to a state at which `past` had been spent: undone steps count as lost."""
    after = dict(spent)
    lost = after.get("lost", 0.0)
    undone = 0.0
    for kind in STEP_KINDS:
        kept = past.get(kind, 0.0)
        undone += spent.get(kind, 0.0) - kept
        after[kind] = kept
    return after | {"lost": lost + undone}


def share(spent: Mapping[str, float]) -> float:
    """Returns the goodput of a run, from 0 to 1."""
    total = sum(spent.values())
    if total <= 0:
        return 0.0
    return spent.get("step", 0.0) / total


def scalars(spent: Mapping[str, float]) -> dict[str, float]:
    """Returns goodput and the seconds of each kind, under their names in metrics.jsonl and TensorBoard."""
    named = {f"seconds/{kind}": seconds for kind, seconds in spent.items()}
    return {"goodput": share(spent), **named}


def describe(spent: Mapping[str, float]) -> list[str]:
    """Returns goodput as a line, and a line for each kind, the largest first."""
    total = sum(spent.values())
    productive = duration(spent.get("step", 0.0))
    percent = 100 * share(spent)
    lines = [f"goodput {percent:.1f}%: {productive} productive of {duration(total)} wall time since the first start"]
    for kind in sorted(spent, key=lambda kind: -spent[kind]):
        seconds = spent[kind]
        if seconds > LEAST_SHOWN:
            name = kind.replace("_", " ")
            lines.append(f"  {name:<10} {duration(seconds):>6} {100 * seconds / total:5.1f}%")
    return lines


def duration(seconds: float) -> str:
    """Returns seconds in one or two units.

    >>> duration(59.6), duration(3700), duration(200000)
    ('1m00s', '1h01m', '2d07h')
    """
    if not math.isfinite(seconds):
        return "n/a"
    if seconds < 1:
        return f"{1e3 * seconds:.0f}ms"
    # Rounded once, before it is split: otherwise 59.6 seconds would print as 60s.
    rounded = round(seconds)
    if rounded < 10:
        return f"{seconds:.1f}s"
    if rounded < 60:
        return f"{rounded}s"
    minutes, seconds_left = divmod(rounded, 60)
    if minutes < 60:
        return f"{minutes}m{seconds_left:02d}s"
    hours, minutes_left = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes_left:02d}m"
    days, hours_left = divmod(hours, 24)
    return f"{days}d{hours_left:02d}h"
