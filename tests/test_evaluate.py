import math
import random

import pytest

from gptjax.config import Config, DataConfig
from gptjax.data.prepare import default_path
from gptjax.errors import CheckpointError, ConfigError
from gptjax.evaluate import compressed_bits_per_byte, count_sequences, describe, evaluate, parse_flags
from gptjax.loss import LossSums
from gptjax.record import Record
from gptjax.stored import at_its_data, load_params
from tests.helpers import raises


class Batches:
    """Three batches: index i has loss 10 i, i + 1 tokens, and 2 i bytes."""

    num_validation_batches = 3
    num_windows = 10
    global_batch_size = 4

    def __init__(self):
        self.seen = []

    def sources(self):
        yield "", 1.0, self

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
    expected = "validation loss 1.5000, perplexity 4.48, 2.000 bits per byte (1,024 sequences)"
    assert describe(result, 1024) == expected


@pytest.mark.parametrize(("batches", "sequences"), [(0, 10), (1, 4), (2, 8), (3, 10), (9, 10)])
def test_sequences_of_an_evaluation_are_counted(batches, sequences):
    assert count_sequences(Batches(), batches) == sequences


def make_record(**data):
    return Record(step=1, config={}, history={}, data=data, fingerprints={}, versions={})


def test_data_of_a_run_are_found_and_never_prepared(tmp_path, monkeypatch):
    """Where they were at the time of the checkpoint, otherwise where the config names them here."""
    monkeypatch.chdir(tmp_path)
    config = Config(data=DataConfig(source="text:x", tokenizer="bytes"))
    named = default_path("text:x", "bytes")
    for name in ("there", named):
        (tmp_path / name).mkdir(parents=True)
    found = at_its_data(config, make_record(fingerprint="", directory=f"{tmp_path}/there"), flag="--data")
    assert found.data.path == f"{tmp_path}/there"
    assert found.model == config.model
    for record in (make_record(fingerprint="", directory="/not/there"), make_record(fingerprint="")):
        assert at_its_data(config, record, flag="--data").data.path == named
    (tmp_path / named).rmdir()
    with raises(ConfigError, "data.path", value="/not/there", remedy="--data=DIR"):
        at_its_data(config, make_record(fingerprint="", directory="/not/there"), flag="--data")
    with raises(ConfigError, match="does not say", remedy="--data=DIR"):
        at_its_data(config, make_record(), flag="--data")
    assert not list((tmp_path / "data").iterdir())


def test_missing_work_directory_is_refused_with_those_that_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with raises(CheckpointError, "--workdir", value="runs/nothere", remedy="there are no runs here"):
        load_params("runs/nothere")
    (tmp_path / "runs" / "a" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "empty").mkdir()
    for name in ("runs/nothere", "nothere", "/tmp/of/nobody"):
        with raises(CheckpointError, "--workdir", value=name, remedy="runs: runs/a"):
            load_params(name)
    with raises(CheckpointError, "--workdir", value="runs/empty", remedy="available: none"):
        load_params("runs/empty")
    with raises(CheckpointError, "--workdir", value="runs", remedy="runs: runs/a", match="is a directory of runs"):
        load_params("runs")


@pytest.mark.parametrize(
    ("flags", "field", "remedy"),
    [
        (["--workdir=a", "--model=hf:b"], "--model", "leave one of them out"),
        (["--model=gpt2"], "--model", "write --model=hf:openai-community/gpt2"),
        (["--model=hf:x"], "--model", "gptjax prepare creates one"),
    ],
)
def test_flags_that_name_no_single_model_are_refused(flags, field, remedy):
    with raises(ConfigError, field, value=flags[-1].removeprefix("--model="), remedy=remedy):
        parse_flags(flags)


def test_negative_number_of_batches_is_refused_before_anything_is_read():
    with raises(ConfigError, "--batches", value=-1, match="must be 0, which means all, or more"):
        parse_flags(["--workdir=runs/x", "--batches=-1"])
