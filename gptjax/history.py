"""The history of a run: counters, skipped data and time spent, saved as JSON in every checkpoint."""

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any

LARGEST = 2**63
Recent = Mapping[str, tuple[float, ...]]  # the last values of each monitored metric, oldest first


@dataclasses.dataclass(frozen=True)
class SkippedRange:
    """Batches that a rollback skips: from `step` on, the batch index is higher by `batches`."""

    step: int
    batches: int
    rollback: int = 0  # its number, from 1
    spike: int = 0  # the step that diverged
    why: str = ""


FORMER_NAMES = {"num_micro_steps": "num_microbatches"}  # in checkpoints of earlier versions


@dataclasses.dataclass(frozen=True)
class History:
    """The events of a run up to one of its steps. Immutable, also its mappings: the loop replaces it."""

    restarts: int = 0  # processes that resumed from a checkpoint
    skipped_steps: int = 0  # non-finite updates that train.nan_policy=skip discarded
    nonfinite_in_a_row: int = 0
    validated: int = -1  # the step of the last evaluation
    loss_sum: float = 0.0  # of the updates since the last logged row, so that a resume logs the same mean
    loss_count: int = 0
    recent: Recent = dataclasses.field(default_factory=dict)  # see divergence.py
    rollbacks: int = 0
    skipped_ranges: tuple[SkippedRange, ...] = ()
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)  # wall time by kind: see goodput.py
    started_at: float = 0.0  # the first start, in seconds since 1970; 0 if it is not known yet
    saved_at: float = 0.0  # this checkpoint, in seconds since 1970
    # With the config, these two determine the bits of a run. Older checkpoints do not have them.
    machine: str = ""  # number and kind of the devices, as in Run.machine
    num_microbatches: int = 0
    run_id: str = ""  # see identity.py

    def __post_init__(self) -> None:
        for name in ("recent", "seconds"):
            copy = dict(getattr(self, name))  # the caller may still change its own
            object.__setattr__(self, name, types.MappingProxyType(copy))

    def with_loss(self, loss: float) -> "History":
        """Returns the history with one more loss in the sum."""
        return dataclasses.replace(self, loss_sum=self.loss_sum + loss, loss_count=self.loss_count + 1)

    def without_losses(self) -> "History":
        """Returns the history after a row was logged."""
        return dataclasses.replace(self, loss_sum=0.0, loss_count=0)

    @property
    def loss_mean(self) -> float:
        """The mean of the losses in the sum; nan if there is none."""
        return self.loss_sum / self.loss_count if self.loss_count else math.nan

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values: lists for tuples, dicts for dataclasses."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["recent"] = {name: list(numbers) for name, numbers in self.recent.items()}
        values["seconds"] = dict(self.seconds)
        values["skipped_ranges"] = [dataclasses.asdict(part) for part in self.skipped_ranges]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "History":
        """Returns the history that `to_json` of this or an older version wrote. Unknown keys are ignored.

        Raises:
            ValueError: a value has the wrong type or is out of range; the message names its field.
        """
        values = {FORMER_NAMES.get(name, name): value for name, value in values.items()}
        names = [field.name for field in dataclasses.fields(cls)]
        found = {name: values[name] for name in names if name in values}
        for name, value in found.items():
            if not _IS_VALID[name](value):
                raise ValueError(f"history.{name} is {value!r}")
        # JSON has only lists. The fields are immutable.
        if "recent" in found:
            found["recent"] = {name: tuple(numbers) for name, numbers in found["recent"].items()}
        if "skipped_ranges" in found:
            found["skipped_ranges"] = tuple(SkippedRange(**part) for part in found["skipped_ranges"])
        return cls(**found)


def _is_count(value: object, *, least: int = 0) -> bool:
    # Not isinstance: JSON's true is a bool, which is a subclass of int.
    return type(value) is int and least <= value < LARGEST


def _is_validated(value: object) -> bool:
    return _is_count(value, least=-1)


def _is_number(value: object) -> bool:
    if type(value) is int:
        return abs(value) < LARGEST  # a larger one may overflow as a float
    return type(value) is float and math.isfinite(value)


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(_is_number(number) for number in value.values())


def _are_recent(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_list_of_numbers, value.values()))


def _is_list_of_numbers(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _are_ranges(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_range, value))


def _is_range(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    kinds = {field.name: field.type for field in dataclasses.fields(SkippedRange)}
    required = {"step", "batches"}
    if not required <= value.keys() <= kinds.keys():
        return False
    numbers = {name for name, kind in kinds.items() if kind is int}
    return all(_is_count(part) if name in numbers else _is_text(part) for name, part in value.items())


def _is_text(value: object) -> bool:
    return isinstance(value, str)


_IS_VALID = {
    "restarts": _is_count,
    "skipped_steps": _is_count,
    "nonfinite_in_a_row": _is_count,
    "validated": _is_validated,
    "loss_sum": _is_number,
    "loss_count": _is_count,
    "recent": _are_recent,
    "rollbacks": _is_count,
    "skipped_ranges": _are_ranges,
    "seconds": _are_numbers,
    "started_at": _is_number,
    "saved_at": _is_number,
    "machine": _is_text,
    "num_microbatches": _is_count,
    "run_id": _is_text,
}
