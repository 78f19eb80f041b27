"""Where time goes, over restarts and rollbacks."""

import math

import pytest

from gptjax import goodput

SAVED = {"restarts": 1, "started_at": 1000.0, "saved_at": 1100.0, "seconds": {"start": 20.0, "step": 70.0, "lost": 3.0}}


def test_a_first_start_spends_time_on_starting_only():
    fresh = {"restarts": 0, "seconds": {}}
    assert goodput.first_start(fresh, 50.0) == 50.0
    assert goodput.at_start(fresh, started=50.0, last_sign=0.0, now=57.0) == {"start": 7.0}


def test_a_restart_tells_lost_work_from_downtime():
    spent = goodput.at_start(SAVED, started=1200.0, last_sign=1130.0, now=1209.0)
    assert spent == {"start": 20.0, "step": 70.0, "lost": 33.0, "down": 70.0, "restart": 9.0}
    assert SAVED["seconds"] == {"start": 20.0, "step": 70.0, "lost": 3.0}


@pytest.mark.parametrize("last_sign", [0.0, 900.0, 1100.0])
def test_an_orderly_end_loses_nothing(last_sign):
    spent = goodput.at_start(SAVED, started=1200.0, last_sign=last_sign, now=1209.0)
    assert (spent["lost"], spent["down"]) == (3.0, 100.0)


def test_logs_that_were_copied_later_are_no_sign_of_life_after_the_start():
    spent = goodput.at_start(SAVED, started=1200.0, last_sign=5000.0, now=1209.0)
    assert (spent["lost"], spent["down"]) == (103.0, 0.0)


def test_a_clock_that_went_back_takes_nothing_away():
    spent = goodput.at_start(SAVED, started=1090.0, last_sign=0.0, now=1099.0)
    assert (spent["lost"], spent["down"], spent["restart"]) == (3.0, 0.0, 9.0)


def test_a_run_of_before_these_times_were_kept_starts_as_long_ago_as_it_has_spent():
    old = {"restarts": 1, "seconds": {"step": 30.0}}
    assert goodput.first_start(old, 100.0) == 70.0
    assert goodput.at_start(old, started=100.0, last_sign=0.0, now=104.0)["down"] == 0.0


def test_rolled_back_steps_are_lost_and_the_rest_stands():
    spent = {"step": 50.0, "data_wait": 5.0, "report": 0.5, "evaluation": 7.0, "checkpoint": 2.0, "lost": 1.0}
    past = {"step": 40.0, "data_wait": 4.5, "evaluation": 1.0}
    assert goodput.after_rollback(spent, past) == {
        "step": 40.0, "data_wait": 4.5, "report": 0.0, "evaluation": 7.0, "checkpoint": 2.0, "lost": 12.0
    }  # fmt: skip
    assert goodput.after_rollback({"step": 2.0}, {}) == {
        "step": 0.0, "data_wait": 0.0, "report": 0.0, "lost": 2.0
    }  # fmt: skip


def test_the_share_and_its_names():
    assert goodput.share({"step": 30.0, "lost": 50.0}, 120.0) == 0.25
    assert goodput.share({}, 120.0) == 0.0
    assert math.isnan(goodput.share({"step": 1.0}, 0.0))
    assert goodput.scalars({"step": 30.0, "lost": 5.0}, 60.0) == {
        "goodput": 0.5, "seconds/step": 30.0, "seconds/lost": 5.0
    }  # fmt: skip


def test_the_table_has_the_largest_first_and_what_no_kind_has():
    assert goodput.describe({"data_wait": 2.0, "step": 75.0, "sampling": 0.01}, 100.0) == [
        "goodput 75.0%: 1m15s of steps that count, of 1m40s since the first start",
        "  step        1m15s  75.0%",
        "  other         23s  23.0%",
        "  data wait    2.0s   2.0%",
    ]


def test_every_kind_that_is_booked_is_defined():
    import pathlib
    import re

    text = pathlib.Path(goodput.__file__).with_name("train.py").read_text()
    booked = {*re.findall(r'watch\.add\("(\w+)"\)', text), "start", "restart", "rollback", "lost", "down"}
    assert booked >= {"step", "data_wait", "compile", "evaluation", "sampling", "checkpoint"}
    defined = set(re.findall(r"[a-z_]+", " ".join(re.findall(r"^- ([a-z_, ]+):", goodput.__doc__ or "", re.MULTILINE))))
    assert booked == defined
