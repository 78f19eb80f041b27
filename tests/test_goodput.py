"""Where time goes, over restarts and rollbacks."""

import dataclasses
import math
import pathlib
import re

import pytest

from gptjax import goodput
from gptjax.history import History

T = 1.8e9  # a time of day
SECONDS = {"start": 20.0, "step": 70.0, "lost": 3.0, "down": 7.0}
SAVED = History(restarts=1, started_at=T, saved_at=T + 100.0, seconds=SECONDS)


def test_a_first_start_spends_time_on_starting_only():
    fresh = History()
    assert goodput.first_start(fresh, T) == T
    assert goodput.spent_at_start(fresh, started=T, seconds=7.0, lost=0.0) == {"start": 7.0}


def test_restart_separates_lost_work_from_downtime():
    spent = goodput.spent_at_start(SAVED, started=T + 200, seconds=9.0, lost=30.0)
    assert spent == {"start": 20.0, "step": 70.0, "lost": 33.0, "down": 77.0, "restart": 9.0}
    assert SAVED.seconds == SECONDS
    assert sum(spent.values()) == 209.0


def test_orderly_end_counts_no_lost_work():
    spent = goodput.spent_at_start(SAVED, started=T + 200, seconds=9.0, lost=0.0)
    assert (spent["lost"], spent["down"]) == (3.0, 107.0)


@pytest.mark.faults
@pytest.mark.parametrize("back", [10.0, 400 * 86400.0, T])
def test_a1_clock_set_back_never_reduces_counted_time(back):
    spent = goodput.spent_at_start(SAVED, started=T + 200 - back, seconds=9.0, lost=30.0)
    assert min(spent.values()) >= 0.0
    assert (spent["step"], spent["lost"], spent["restart"]) == (70.0, 33.0, 9.0)
    saved = dataclasses.replace(SAVED, saved_at=T + 250 - back, seconds=spent)
    healed = goodput.spent_at_start(saved, started=T + 300, seconds=9.0, lost=0.0)
    assert sum(healed.values()) <= 309.0
    assert (healed["step"], healed["lost"], healed["restart"]) == (70.0, 33.0, 18.0)


@pytest.mark.faults
def test_a1_unset_clock_counts_no_downtime():
    """A machine that starts in 1970, and gets the time after the run was started."""
    history = History(restarts=1, started_at=50.0, saved_at=150.0, seconds={"step": 90.0})
    spent = goodput.spent_at_start(history, started=T, seconds=5.0, lost=0.0)
    assert spent == {"step": 90.0, "lost": 0.0, "down": 0.0, "restart": 5.0}


@pytest.mark.faults
def test_a1_invalid_seconds_of_earlier_versions_are_ignored():
    history = dataclasses.replace(SAVED, seconds={"step": 70.0, "down": -3e10, "lost": math.nan, "other": math.inf})
    assert goodput.spent_at_start(history, started=T + 200, seconds=9.0, lost=0.0) == {
        "step": 70.0, "lost": 0.0, "down": 100.0, "restart": 9.0
    }  # fmt: skip


def test_lost_seconds_are_summed_from_the_metrics():
    measured = ((10, 2.0), (12, 3.0), (14, None), (15, 1e300), (17, 0.5))
    rows = [{"step": step, "loss": 1.0, "step_seconds": seconds} for step, seconds in measured]
    rows.insert(2, {"step": 12, "val_loss": 1.0})
    assert goodput.seconds_after(rows[::-1], 10) == 2 * 3.0 + 2 * 0.5
    assert goodput.seconds_after(rows[::-1], 17) == 0.0
    twice = [{"step": step, "loss": 1.0, "step_seconds": 1.0} for step in (5, 6, 7, 6, 7)]  # a log that was not cut
    assert goodput.seconds_after(twice[::-1], 4) == 4.0


def test_first_start_is_estimated_from_the_spent_seconds():
    old = History(restarts=1, seconds={"step": 30.0})
    assert goodput.first_start(old, T) == T - 30
    assert goodput.spent_at_start(old, started=T, seconds=4.0, lost=0.0)["down"] == 0.0


def test_rollback_counts_undone_steps_as_lost():
    spent = {"step": 50.0, "data_wait": 5.0, "report": 0.5, "evaluation": 7.0, "checkpoint": 2.0, "lost": 1.0}
    past = {"step": 40.0, "data_wait": 4.5, "evaluation": 1.0}
    assert goodput.after_rollback(spent, past) == {
        "step": 40.0, "data_wait": 4.5, "report": 0.0, "evaluation": 7.0, "checkpoint": 2.0, "lost": 12.0
    }  # fmt: skip
    assert goodput.after_rollback({"step": 2.0}, {}) == {
        "step": 0.0, "data_wait": 0.0, "report": 0.0, "lost": 2.0
    }  # fmt: skip


def test_goodput_is_the_share_of_step_seconds():
    assert goodput.share({"step": 30.0, "lost": 90.0}) == 0.25
    assert goodput.share({}) == 0.0
    assert goodput.scalars({"step": 30.0, "lost": 30.0}) == {
        "goodput": 0.5, "seconds/step": 30.0, "seconds/lost": 30.0
    }  # fmt: skip


def test_the_table_has_the_largest_first():
    assert goodput.describe({"data_wait": 2.0, "step": 75.0, "sampling": 0.01, "lost": 22.99}) == [
        "goodput 75.0%: 1m15s productive of 1m40s wall time since the first start",
        "  step        1m15s  75.0%",
        "  lost          23s  23.0%",
        "  data wait    2.0s   2.0%",
    ]


def test_every_recorded_kind_of_time_is_documented():
    package = pathlib.Path(goodput.__file__).parent
    text = "".join((package / name).read_text() for name in ("train.py", "loop.py", "periodic.py"))
    booked = {*re.findall(r'watch\.lap\("(\w+)"\)', text), "start", "restart", "rollback", "lost", "down"}
    assert booked >= {"step", "data_wait", "compile", "evaluation", "sampling", "checkpoint"}
    defined = set(re.findall(r"[a-z_]+", " ".join(re.findall(r"^- ([a-z_, ]+):", goodput.__doc__ or "", re.MULTILINE))))
    assert booked == defined


def test_durations_are_formatted_for_people():
    written = [goodput.duration(s) for s in (0.0042, 4.2, 42, 59.6, 3700, 200_000, math.inf)]
    assert written == ["4ms", "4.2s", "42s", "1m00s", "1h01m", "2d07h", "n/a"]


def test_stopwatch_records_the_time_between_calls(monkeypatch):
    times = iter([10.0, 12.0, 15.0, 16.0])
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: next(times))
    watch = goodput.Stopwatch({"step": 100.0})
    assert [watch.lap("step"), watch.lap("evaluation"), watch.lap("step")] == [2.0, 3.0, 1.0]
    assert watch.spent == {"step": 103.0, "evaluation": 3.0}
