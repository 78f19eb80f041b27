"""What counts as a spike, and what history is gone on with after one."""

import dataclasses
import math
import random

import pytest

from gptjax.config import TrainConfig
from gptjax.data.dataset import batch_index
from gptjax.divergence import MIN_VALUES, WINDOW, Spike, Verdict, find_spike, history_after, judge, update_window
from gptjax.history import History, SkippedRange

ROW = {"loss": 3.0, "grad_norm": 1.0, "update_norm": 0.1}


def recent(count, loss=lambda n: 3.0, norm=lambda n: 1.0):
    kept = {}
    for n in range(count):
        kept = update_window(kept, ROW | {"loss": loss(n), "grad_norm": norm(n)})
    return kept


def alternating(n):
    """Mean 3, sigma 0.5."""
    return 3.0 + 0.5 * (-1) ** n


def test_spike_is_a_loss_or_gradient_norm_above_six_sigma():
    kept = recent(100, loss=alternating, norm=alternating)
    for name, told in (("loss", "loss"), ("grad_norm", "gradient norm")):
        row = ROW | {"grad_norm": 3.0}
        assert find_spike(kept, row | {name: 6.0}) == ""
        reason = f"{told} 6.001 is more than 6 sigma above its last 100: mean 3, sigma 0.5"
        assert find_spike(kept, row | {name: 6.001}) == reason
        assert find_spike(kept, row | {name: -6.001}) == "", "a fall is good news"


@pytest.mark.faults
def test_g4_fewer_than_64_values_give_no_spike():
    assert MIN_VALUES == 64
    assert find_spike(recent(63), ROW | {"loss": 1e9, "grad_norm": 1e9}) == ""
    assert find_spike(recent(64), ROW | {"loss": 1e9}) != ""


@pytest.mark.faults
@pytest.mark.parametrize("value", [0.0, 1e-4, 0.02, 3.0, 11.0, 1e4])
def test_g4_a_constant_loss_never_alarms(value):
    """Constant but for a rounding of bfloat16, whose numbers are 2**-8 apart, and 5 % of the mean above it."""
    kept = recent(128, loss=lambda n: value, norm=lambda n: value)
    for above in (1.0, 1 + 2**-8, 1 + 2**-7, 1.05):
        assert find_spike(kept, ROW | {"loss": above * value, "grad_norm": above * value}) == ""
    assert find_spike(kept, ROW | {"loss": 1.07 * value + 0.01, "grad_norm": value}) != ""


@pytest.mark.faults
def test_g4_small_rise_of_a_loss_near_zero_is_no_spike():
    kept = recent(128, loss=lambda n: 1e-6, norm=lambda n: 1e-6)
    assert find_spike(kept, ROW | {"loss": 0.006, "grad_norm": 0.006}) == ""
    assert find_spike(kept, ROW | {"loss": 0.0061, "grad_norm": 0.0}) != ""


@pytest.mark.faults
def test_g4_a_noisy_loss_that_falls_never_alarms():
    rng, kept = random.Random(0), {}
    for n in range(5000):
        row = ROW | {"loss": 3 + 8 / (1 + n / 50) + rng.gauss(0, 0.1), "grad_norm": abs(rng.gauss(1, 0.2))}
        assert find_spike(kept, row) == "", n
        kept = update_window(kept, row)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_value_is_a_spike_from_the_first_step(name, value):
    assert "not finite" in find_spike({}, ROW | {name: value})


def test_nonfinite_update_is_a_spike():
    told = find_spike({}, ROW | {"update_norm": math.inf}, finite=False)
    assert told == "loss 3, gradient norm 1, update norm inf: not finite"


def test_the_window_is_the_last_128_finite_values():
    assert WINDOW == 128
    kept = recent(300, loss=lambda n: math.nan if n == 290 else float(n))
    assert kept["loss"] == tuple(float(n) for n in range(171, 300) if n != 290)
    assert len(kept["grad_norm"]) == 128


# What becomes of a step

BAD = ROW | {"loss": math.nan}


def test_accepted_step_is_added_to_the_window():
    before = History(nonfinite_in_a_row=2, recent={"loss": (4.0,)})
    verdict = judge(before, ROW, TrainConfig(), finite=True)
    assert verdict == Verdict("accept", History(nonfinite_in_a_row=0, recent={"loss": (4.0, 3.0), "grad_norm": (1.0,)}))
    assert before == History(nonfinite_in_a_row=2, recent={"loss": (4.0,)}), "a value: nothing changes it"


def test_skip_counts_and_stops_at_the_limit():
    policy, history = TrainConfig(nan_policy="skip", max_consecutive_nonfinite=2), History(skipped_steps=5)
    first = judge(history, BAD | {"grad_norm": 1.23456789}, policy, finite=False)
    assert (first.action, first.why) == ("skip", "loss nan, gradient norm 1.23457")
    assert (first.history.skipped_steps, first.history.nonfinite_in_a_row) == (6, 1)
    second = judge(first.history, BAD, policy, finite=False)
    assert (second.action, second.why) == ("stop", "loss nan, gradient norm 1: 2 in a row")
    assert second.remedy == "lower optim.peak_lr, or raise train.max_consecutive_nonfinite"
    between = judge(first.history, ROW, policy, finite=True).history
    assert judge(between, BAD, policy, finite=False).action == "skip", "the count begins again"
    assert judge(between, ROW | {"loss": 1e9}, policy, finite=True).action == "accept", "spikes are for rollback"


def test_stop_policy_names_the_nonfinite_values():
    verdict = judge(History(), ROW | {"update_norm": math.inf}, TrainConfig(nan_policy="stop"), finite=False)
    assert verdict.action == "stop"
    assert verdict.why == "loss 3, gradient norm 1, update norm inf: train.nan_policy='stop'"
    assert "--config.train.nan_policy=skip" in verdict.remedy


def test_rollback_policy_stops_after_max_rollbacks():
    policy = TrainConfig(nan_policy="rollback", max_rollbacks=2)
    history = History(rollbacks=1, recent=recent(100))
    for row, finite in ((ROW | {"loss": 9.0}, True), (BAD, False)):
        verdict = judge(history, row, policy, finite=finite)
        assert (verdict.action, verdict.history) == ("roll back", history)
        assert verdict.why == find_spike(history.recent, row, finite=finite) != ""
    last = judge(dataclasses.replace(history, rollbacks=2), BAD, policy, finite=False)
    assert last.action == "stop"
    assert last.why.endswith("not finite: no rollback is left (train.max_rollbacks=2)")
    assert "raise train.max_rollbacks" in last.remedy
    assert judge(history, ROW, policy, finite=True).action == "accept"


# The history after a rollback

HISTORY = History(restarts=2, started_at=5.0, validated=40, run_id="a")


def test_rollback_skips_batches_from_restored_step_to_spike():
    past = History(validated=0, recent={"loss": (1.0,)})
    after = history_after(HISTORY, past, step=80, spike=Spike(91, "why"))
    part = SkippedRange(step=80, batches=11, rollback=1, spike=91, why="why")
    of_the_state = {"validated": 0, "recent": {"loss": (1.0,)}}  # the past's
    of_the_run = {"restarts": 2, "started_at": 5.0, "rollbacks": 1, "skipped_ranges": (part,), "run_id": "a"}
    assert after == History(**of_the_state, **of_the_run)
    assert [batch_index(step, [part]) for step in (0, 79, 80, 81)] == [0, 79, 91, 92]


def test_second_rollback_skips_batches_after_the_first():
    first = history_after(HISTORY, History(), step=80, spike=Spike(91, ""))
    second = history_after(first, History(), step=80, spike=Spike(85, ""))
    assert [(part.rollback, part.batches) for part in second.skipped_ranges] == [(1, 11), (2, 5)]
    assert second.rollbacks == 2
    assert batch_index(80, second.skipped_ranges) == 96
    assert batch_index(84, first.skipped_ranges) == 95, "the batch of the second spike is the last that is left out"


def test_rollback_further_back_merges_later_ranges():
    """As when the checkpoint of step 80 has been damaged since the first rollback."""
    first = history_after(HISTORY, History(), step=80, spike=Spike(91, ""))
    second = history_after(first, History(), step=60, spike=Spike(85, ""))
    assert [(part.step, part.batches) for part in second.skipped_ranges] == [(60, 36)]
    assert batch_index(60, second.skipped_ranges) == batch_index(84, first.skipped_ranges) + 1
