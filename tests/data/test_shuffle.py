"""The order of an epoch is a permutation, and to the bit the one with which gptjax began: Grain's."""

import numpy as np
import pytest
from grain.experimental import index_shuffle

from gptjax.data.shuffle import ROUNDS, shuffle

SEEDS = (0, 1, 20190214, 2**31, 2**32 - 1)


@pytest.mark.parametrize(
    "count",
    [
        1, 2, 3, 10, 101, 5_000, 2**16 - 1, 2**16, 2**16 + 2, 10**5, 2**18, 29_300_000, 2**26, 2**26 + 2, 10**9,
        2**31, 2**31 + 1, 2**32 - 1,
    ],
)  # fmt: skip
def test_order_equals_that_of_grain(count):
    few = 3 if count < 1_000 else 50  # Grain takes milliseconds for a number where there are few
    for seed in SEEDS:
        positions = np.unique(np.r_[0, count - 1, np.random.default_rng(seed).integers(0, count, few)])
        expected = [index_shuffle(position, count - 1, seed, ROUNDS) for position in positions.tolist()]
        assert shuffle(positions, count, seed).tolist() == expected, seed


@pytest.mark.parametrize("count", [1, 2, 77, 4_096, 2**16, 2**16 + 1, 2**16 + 2, 100_000, 2**18 + 1])
def test_shuffle_is_a_permutation(count):
    """Grain's order has 0 twice and never the last of 2**16 + 1 and of 2**18 + 1."""
    for seed in SEEDS:
        found = shuffle(np.arange(count), count, seed)
        assert found.dtype == np.int64
        assert np.array_equal(np.sort(found), np.arange(count)), seed


def test_shuffle_does_not_modify_its_argument():
    positions = np.array([5, 0, 5])
    for count in (10, 100_000):
        first = shuffle(positions, count, 7)
        assert positions.tolist() == [5, 0, 5]
        first[:] = -1
        assert shuffle(positions, count, 7).min() >= 0, "what is kept of an epoch was changed"
