"""Divergence: detects non-finite and spiking steps, and decides whether to accept, skip, roll back or stop."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gptjax.config import TrainConfig
from gptjax.data.dataset import batch_index
from gptjax.errors import DivergedError
from gptjax.history import History, Recent, SkippedRange

MONITORED = ("loss", "grad_norm")
SHOWN_WINDOWS = 8  # window ids of a batch in an error message
WINDOW = 128  # values kept per metric
MIN_VALUES = 64  # with fewer there is no spike detection
SIGMAS = 6.0
# The deviation of a constant loss is 0, or that of its rounding errors. So sigma is at least a hundredth of the mean,
# more than twice the rounding error of bfloat16 (2**-8), and at least 0.001, for a loss near 0. A spike is therefore at
# least 6 % and 0.006 above the mean.
RELATIVE_FLOOR = 0.01
ABSOLUTE_FLOOR = 0.001


@dataclasses.dataclass(frozen=True)
class Spike:
    """The step whose update must be undone, and the reason."""

    step: int
    why: str


class RollBackError(Exception):
    """Ends the loop for a rollback; it never reaches a user."""

    def __init__(self, spike: Spike) -> None:
        super().__init__(spike.why)
        self.spike = spike


def find_spike(recent: Recent, row: Mapping[str, float], *, finite: bool = True) -> str:
    """Returns why the metrics `row` of a step are a spike after the `recent` ones, '' if they are not.

    finite: whether the update was finite; a non-finite step counts as a spike.
    """
    if not finite or not all(math.isfinite(row[name]) for name in MONITORED):
        loss, gradient, update = (f"{row[name]:.6g}" for name in ("loss", "grad_norm", "update_norm"))
        return f"loss {loss}, gradient norm {gradient}, update norm {update}: not finite"
    for name in MONITORED:
        values = recent.get(name, ())
        count = len(values)
        if count < MIN_VALUES:
            continue
        # fsum rounds once: a resumed run must come to the same decision on any Python.
        mean = math.fsum(values) / count
        variance = math.fsum((value - mean) ** 2 for value in values) / count
        sigma = max(math.sqrt(variance), RELATIVE_FLOOR * abs(mean), ABSOLUTE_FLOOR)
        if row[name] > mean + SIGMAS * sigma:
            readable = name.replace("grad_norm", "gradient norm")
            statistics = f"mean {mean:.6g}, sigma {sigma:.3g}"
            return f"{readable} {row[name]:.6g} is more than {SIGMAS:g} sigma above its last {count}: {statistics}"
    return ""


def update_window(recent: Recent, row: Mapping[str, float]) -> Recent:
    """Returns the window of `recent` metrics with the finite ones of an accepted step appended."""
    updated = dict(recent)
    for name in MONITORED:
        value = row[name]
        if math.isfinite(value):  # a nan would disable the detection for a whole window
            values = (*recent.get(name, ()), value)
            updated[name] = values[-WINDOW:]
    return updated


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The decision on one step."""

    action: Literal["accept", "skip", "roll back", "stop"]
    history: History  # including this step, if its update is accepted or skipped
    why: str = ""
    remedy: str = ""  # advice for the user, if the run stops


def judge(history: History, row: Mapping[str, float], policy: TrainConfig, *, finite: bool) -> Verdict:
    """Applies train.nan_policy to one step.

    Args:
        history: up to the previous step.
        row: the step's metrics: loss, grad_norm, update_norm.
        finite: whether the update was applied; a non-finite one leaves the parameters unchanged.
    """
    if policy.nan_policy == "rollback":
        why = find_spike(history.recent, row, finite=finite)
        if why and history.rollbacks < policy.max_rollbacks:
            return Verdict("roll back", history, why)
        if why:
            why += f": no rollback is left (train.max_rollbacks={policy.max_rollbacks})"
            return Verdict("stop", history, why, "lower optim.peak_lr, or raise train.max_rollbacks")
    if not finite:
        return _judge_nonfinite(history, row, policy)
    recent = update_window(history.recent, row)
    accepted = dataclasses.replace(history, nonfinite_in_a_row=0, recent=recent)
    return Verdict("accept", accepted)


def _judge_nonfinite(history: History, row: Mapping[str, float], policy: TrainConfig) -> Verdict:
    """Applies the policies `skip` and `stop` to a step whose update the train step has discarded."""
    in_a_row = history.nonfinite_in_a_row + 1
    history = dataclasses.replace(
        history,
        skipped_steps=history.skipped_steps + 1,
        nonfinite_in_a_row=in_a_row,
    )
    why = f"loss {row['loss']:.6g}, gradient norm {row['grad_norm']:.6g}"
    if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
        why += f", update norm {row['update_norm']:.6g}"  # the only non-finite one: the optimizer overflowed
    if policy.nan_policy == "skip" and in_a_row < policy.max_consecutive_nonfinite:
        return Verdict("skip", history, why)
    if policy.nan_policy == "skip":
        why += f": {policy.max_consecutive_nonfinite} in a row"
        return Verdict("stop", history, why, "lower optim.peak_lr, or raise train.max_consecutive_nonfinite")
    why += ": train.nan_policy='stop'"
    remedy = "add --config.train.nan_policy=skip to leave such updates out, or lower optim.peak_lr"
    return Verdict("stop", history, why, remedy)


def divergence_error(
    verdict: Verdict, *, step: int, windows: Sequence[int] | np.ndarray, last_saved: int | None, workdir: Any
) -> DivergedError:
    """Returns the error that stops a run at `step`: cause, batch, last checkpoint, remedy and replay command.

    windows: window ids of the step's batch, int64 [B].
    last_saved: step of the newest checkpoint, if there is one.
    """
    first = [int(window) for window in windows[:SHOWN_WINDOWS]]
    cause = DivergedError(
        f"{verdict.why}; its batch starts with windows {first} of the training data",
        field=f"step {step}",
        remedy=verdict.remedy,
    )
    restart = f"rerun the same command to resume from the checkpoint of step {last_saved}"
    if last_saved is None:
        restart = "there is no checkpoint yet: the same command starts from step 0"
    inspect = f"inspect it with: {replay_command(workdir, step)}"
    return DivergedError.of([cause, DivergedError(remedy=restart), DivergedError(remedy=inspect)])


def replay_command(workdir: Any, step: int) -> str:
    """Returns the command that replays the update of `step`."""
    return f"python -m gptjax.replay --workdir={workdir} --step={step}"


def history_after(history: History, past: History, *, step: int, spike: Spike) -> History:
    """Returns the history with which a rollback to `step` continues.

    The batches consumed since `step` are skipped from now on, including the one of the spike.

    Args:
        history: up to the spike.
        past: the history in the checkpoint of `step`.
        step: the step of the restored state.
        spike: the reason for the rollback.
    """
    number = history.rollbacks + 1
    skipped = history.skipped_ranges
    # The update that makes step n consumes the batch of index n - 1, plus the skipped ones.
    last = batch_index(spike.step - 1, skipped)
    first = batch_index(step, skipped)
    new_range = SkippedRange(
        step=step,
        batches=last - first + 1,
        rollback=number,
        spike=spike.step,
        why=spike.why,
    )
    # Ranges of later steps come from a checkpoint that turned out to be damaged. The new range contains them.
    kept = tuple(part for part in skipped if part.step <= step)
    return dataclasses.replace(
        past,
        restarts=history.restarts,
        started_at=history.started_at,
        run_id=history.run_id,
        rollbacks=number,
        skipped_ranges=(*kept, new_range),
    )
