import math
import random

import pytest

from gptjax.evaluate import compressed_bits_per_byte, describe, evaluate
from gptjax.loss import LossSums


class Batches:
    """Three batches: index i has loss 10 i, i + 1 tokens, and 2 i bytes."""

    num_validation_batches = 3
    seen: list[int]

    def __init__(self):
        self.seen = []

    def validation_batch(self, index, *, sharding, num_microbatches):
        self.seen.append(index)
        return index


def sums(params, index, token_bytes):
    return LossSums(10.0 * index, 0.0, index + 1.0), 2.0 * index


def run(batches, **options):
    data = Batches()
    options = {"token_bytes_V": None, "sharding": None, "num_microbatches": 1, "batches": batches} | options
    return evaluate(sums, None, dataset=data, **options), data.seen


def test_the_mean_is_over_tokens_and_bits_are_over_bytes():
    result, seen = run(0)
    assert seen == [0, 1, 2]
    assert result["val_loss"] == pytest.approx(30 / 6)
    assert result["val_perplexity"] == pytest.approx(math.exp(5))
    assert result["val_bits_per_byte"] == pytest.approx(30 / math.log(2) / 6)


def test_evaluation_uses_the_first_batches_that_exist():
    assert run(2)[1] == [0, 1]
    assert run(9)[1] == [0, 1, 2]


def test_stopped_evaluation_has_no_result():
    answers = iter([False, True])
    assert run(0, should_stop=lambda: next(answers)) == ({}, [0])


def test_compressors_shrink_repetition_but_not_noise():
    noise = random.Random(0).randbytes(4000)
    assert all(bits > 8 for bits in compressed_bits_per_byte(noise).values())
    assert all(bits < 0.2 for bits in compressed_bits_per_byte(b"abc " * 4000).values())
    assert set(compressed_bits_per_byte(b"")) == {"gzip -9", "xz -9"}


def test_describe_states_loss_perplexity_and_bits():
    result = {"val_loss": 1.5, "val_perplexity": 4.4817, "val_bits_per_byte": 2.0}
    assert describe(result) == "validation loss 1.5000, perplexity 4.48, 2.000 bits per byte"
