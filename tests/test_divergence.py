"""What counts as a spike, and what history is gone on with after one."""

import math
import random

import pytest

from gptjax.data.dataset import data_index
from gptjax.divergence import LEAST, WINDOW, Spike, find_spike, history_after, remember

ROW = {"loss": 3.0, "grad_norm": 1.0, "update_norm": 0.1}


def recent(count, loss=lambda n: 3.0, norm=lambda n: 1.0):
    kept = {}
    for n in range(count):
        remember(kept, ROW | {"loss": loss(n), "grad_norm": norm(n)})
    return kept


def alternating(n):
    """Mean 3, sigma 0.5."""
    return 3.0 + 0.5 * (-1) ** n


def test_six_sigma_above_the_mean_is_no_spike_and_more_is_one():
    kept = recent(100, loss=alternating)
    assert find_spike(kept, ROW | {"loss": 6.0}) == ""
    assert find_spike(kept, ROW | {"loss": 6.001}) == (
        "loss 6.001 is more than 6 sigma above its last 100: mean 3, sigma 0.5"
    )
    assert find_spike(kept, ROW | {"loss": -6.001}) == "", "a fall is good news"


def test_the_gradient_norm_is_watched_as_well():
    kept = recent(100, norm=alternating)
    assert find_spike(kept, ROW | {"grad_norm": 6.0}) == ""
    assert find_spike(kept, ROW | {"grad_norm": 6.001}).startswith("gradient norm 6.001 is more than 6 sigma")


@pytest.mark.faults
def test_g4_fewer_than_64_steps_are_no_measure():
    assert LEAST == 64
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
def test_g4_a_loss_that_has_come_to_0_may_leave_it_a_little():
    kept = recent(128, loss=lambda n: 1e-6, norm=lambda n: 1e-6)
    assert find_spike(kept, ROW | {"loss": 0.006, "grad_norm": 0.006}) == ""
    assert find_spike(kept, ROW | {"loss": 0.0061, "grad_norm": 0.0}) != ""


@pytest.mark.faults
def test_g4_a_noisy_loss_that_falls_never_alarms():
    rng, kept = random.Random(0), {}
    for n in range(5000):
        row = ROW | {"loss": 3 + 8 / (1 + n / 50) + rng.gauss(0, 0.1), "grad_norm": abs(rng.gauss(1, 0.2))}
        assert find_spike(kept, row) == "", n
        remember(kept, row)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_spike_from_the_first_step_on(name, value):
    assert "not finite" in find_spike({}, ROW | {name: value})


def test_so_is_an_update_that_is_not():
    assert find_spike({}, ROW | {"update_norm": math.inf}, finite=False) == (
        "loss 3.0, gradient norm 1.0, update norm inf: not finite"
    )


def test_the_window_is_the_last_128_finite_values():
    assert WINDOW == 128
    kept = recent(300, loss=lambda n: math.nan if n == 290 else float(n))
    assert kept["loss"] == [float(n) for n in range(171, 300) if n != 290]
    assert len(kept["grad_norm"]) == 128


# The history after a rollback


def history(**changes):
    return {"restarts": 2, "started_at": 5.0, "rollbacks": 0, "skipped_ranges": [], "validated": 40} | changes


def test_all_batches_from_the_restored_step_to_the_spike_are_left_out():
    past = {"validated": 0, "recent": {"loss": [1.0]}, "restarts": 0, "rollbacks": 0, "skipped_ranges": []}
    after = history_after(history(), past, 80, Spike(91, "why"))
    [part] = after.pop("skipped_ranges")
    assert part == {"rollback": 1, "step": 80, "batches": 11, "spike": 91, "why": "why"}
    assert after == {
        "validated": 0, "recent": {"loss": [1.0]}, "restarts": 2, "started_at": 5.0, "rollbacks": 1
    }, "what belongs to the state is the past's, and what to the run is not"  # fmt: skip
    assert past["skipped_ranges"] == []
    assert [data_index(step, [part]) for step in (0, 79, 80, 81)] == [0, 79, 91, 92]


def test_a_second_rollback_to_the_same_step_goes_on_after_the_first():
    first = history_after(history(), {}, 80, Spike(91, ""))
    second = history_after(first, {"rollbacks": 0, "skipped_ranges": []}, 80, Spike(85, ""))
    assert [(part["rollback"], part["batches"]) for part in second["skipped_ranges"]] == [(1, 11), (2, 5)]
    assert second["rollbacks"] == 2
    assert data_index(80, second["skipped_ranges"]) == 96
    assert data_index(84, first["skipped_ranges"]) == 95, "the batch of the second spike is the last that is left out"


def test_a_rollback_further_back_takes_later_ranges_in():
    """As when the checkpoint of step 80 has been damaged since the first rollback."""
    first = history_after(history(), {}, 80, Spike(91, ""))
    second = history_after(first, {}, 60, Spike(85, ""))
    assert [(part["step"], part["batches"]) for part in second["skipped_ranges"]] == [(60, 36)]
    assert data_index(60, second["skipped_ranges"]) == data_index(84, first["skipped_ranges"]) + 1
