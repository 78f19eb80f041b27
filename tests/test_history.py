"""A run's history is a value, and what is saved of it comes back."""

import dataclasses
import json
import math

import pytest

from gptjax.history import History, SkippedRange
from gptjax.record import CorruptCheckpointError, Record
from gptjax.resume import read_history
from tests.faults import golden

FULL = History(
    restarts=3, skipped_steps=1, nonfinite_in_a_row=1, validated=8, loss_sum=6.25, loss_count=2,
    recent={"loss": (3.1, 2.9), "grad_norm": ()}, rollbacks=1, skipped_ranges=(SkippedRange(4, 3, 1, 6, "loss nan"),),
    seconds={"step": 1.25}, started_at=1.7e9, saved_at=1.7e9 + 5, machine="1 x cpu", num_microbatches=2,
    run_id="0123456789abcdef" * 2,
)  # fmt: skip


def test_every_field_survives_a_json_round_trip():
    for field in dataclasses.fields(History):
        assert getattr(FULL, field.name) != getattr(History(), field.name), f"{field.name} is not tried"
    for history in (FULL, History()):
        values = history.to_json()
        assert json.loads(json.dumps(values)) == values
        assert History.from_json(values) == history


def test_history_of_older_versions_is_read_without_unknown_fields():
    assert History.from_json(golden.HISTORY) == History(
        restarts=2, skipped_steps=1, nonfinite_in_a_row=0, validated=4, seconds={"step": 1.5}
    )
    assert History.from_json({"imported": {"from": "hf:x"}}) == History()
    assert History.from_json({"num_micro_steps": 4}) == History(num_microbatches=4), "its former name"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("restarts", "2"), ("restarts", True), ("restarts", 2.0), ("validated", None), ("started_at", "now"),
        ("saved_at", math.nan), ("started_at", 10**400),
        ("saved_at", -(10**400)),
        ("machine", 3), ("recent", []), ("recent", {"loss": 3.0}), ("recent", {"loss": ["3"]}),
        ("seconds", {"step": "1"}), ("seconds", [1.0]), ("skipped_ranges", {}), ("skipped_ranges", [3]),
        ("skipped_ranges", [{"step": 1}]), ("skipped_ranges", [{"step": 1, "batches": "2"}]),
        ("skipped_ranges", [{"step": 1, "batches": 2, "other": 3}]), ("num_microbatches", [1]),
        ("restarts", -5), ("restarts", 10**400), ("skipped_steps", -1), ("nonfinite_in_a_row", -1), ("rollbacks", -1),
        ("validated", -2), ("num_microbatches", -1), ("num_microbatches", 2**63),
        ("skipped_ranges", [{"step": -1, "batches": 3}]), ("skipped_ranges", [{"step": 1, "batches": -3}]),
        ("skipped_ranges", [{"step": 1, "batches": 10**400}]), ("skipped_ranges", [{"step": True, "batches": 1}]),
        ("skipped_ranges", [{"step": 1, "batches": 2, "rollback": -1}]),
        ("skipped_ranges", [{"step": 1, "batches": 2, "why": 3}]),
    ],
)  # fmt: skip
def test_invalid_history_field_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"history.{name} "):
        History.from_json(FULL.to_json() | {name: value})
    record = Record(4, {}, FULL.to_json() | {name: value}, {}, {}, {})
    with pytest.raises(CorruptCheckpointError, match=name):
        read_history(record)


def test_mappings_of_a_history_are_read_only():
    seconds = {"step": 1.0}
    history = History(seconds=seconds, recent={"loss": (3.0,)})
    seconds["step"] = 9.0
    assert history.seconds == {"step": 1.0}, "a later change by the caller does not count"
    for mapping in (history.seconds, history.recent, History().seconds, History.from_json(FULL.to_json()).recent):
        with pytest.raises(TypeError):
            mapping["step"] = 9
    assert dataclasses.replace(history, restarts=1).seconds == history.seconds
    values = history.to_json()
    values["seconds"]["step"] = 9.0
    assert history.seconds == {"step": 1.0}
