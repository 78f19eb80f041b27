"""When a step counts as diverged: it is not finite, or far above what the steps before it had."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.data.dataset import data_index

WATCHED = ("loss", "grad_norm")
WINDOW = 128  # the last so many values of each
LEAST = 64  # with fewer there is no judging
SIGMAS = 6.0
# A constant loss has no sigma, and one of roundings alone next to none. So sigma is at least a hundredth of the mean,
# twice what one rounding of bfloat16 may be off (2**-8), and at least 0.001, where a loss is near 0: what is not 6 %
# and 0.006 above the mean is no spike.
RELATIVE_FLOOR, ABSOLUTE_FLOOR = 0.01, 0.001

Recent = dict[str, list[float]]  # of each of WATCHED the last values, oldest first


@dataclasses.dataclass(frozen=True)
class Spike:
    """The update that made `step`, and why it is to be undone."""

    step: int
    why: str


class RollBackError(Exception):
    """Ends the loop for a rollback; it never reaches a user."""

    def __init__(self, spike: Spike) -> None:
        super().__init__(spike.why)
        self.spike = spike


def find_spike(recent: Mapping[str, Sequence[float]], row: Mapping[str, float], *, finite: bool = True) -> str:
    """Returns why the metrics `row` of a step are a spike after the `recent` ones, '' if they are none."""
    if not finite or not all(math.isfinite(row[name]) for name in WATCHED):
        return f"loss {row['loss']}, gradient norm {row['grad_norm']}, update norm {row['update_norm']}: not finite"
    for name in WATCHED:
        values = recent.get(name, [])
        if len(values) < LEAST:
            continue
        mean = math.fsum(values) / len(values)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
        sigma = max(deviation, RELATIVE_FLOOR * abs(mean), ABSOLUTE_FLOOR)
        if row[name] > mean + SIGMAS * sigma:
            what = f"{name.replace('grad_norm', 'gradient norm')} {row[name]:.6g}"
            return (
                f"{what} is more than {SIGMAS:g} sigma above its last {len(values)}: mean {mean:.6g}, sigma {sigma:.3g}"
            )
    return ""


def remember(recent: Recent, row: Mapping[str, float]) -> None:
    """Adds the metrics `row` of a step that stands to the `recent` ones."""
    for name in WATCHED:
        if math.isfinite(row[name]):
            recent[name] = [*recent.get(name, []), row[name]][-WINDOW:]


def history_after(history: Mapping[str, Any], past: Mapping[str, Any], step: int, spike: Spike) -> dict[str, Any]:
    """Returns the history to go on with from `step` after a spike: the `past` that goes with it, and this rollback.

    All batches that were read from `step` on are left out, the last of them that of the spike.
    """
    number, skipped = history["rollbacks"] + 1, history["skipped_ranges"]
    batches = data_index(spike.step - 1, skipped) - data_index(step, skipped) + 1
    # Ranges of later steps, of which a damaged checkpoint knew, are among those batches.
    ranges = [part for part in skipped if part["step"] <= step]
    ranges.append({"rollback": number, "step": step, "batches": batches, "spike": spike.step, "why": spike.why})
    kept = {name: history[name] for name in ("restarts", "started_at")}
    return dict(past) | kept | {"rollbacks": number, "skipped_ranges": ranges}
