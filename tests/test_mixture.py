"""A mixture: which source gives a sample is arithmetic on its number, through resumes, meshes and processes."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
from grain._src.python.dataset.transformations import mix as grain_mix
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import Config, DataConfig, find_problems
from gptjax.data import prepare
from gptjax.data.dataset import Dataset
from gptjax.data.mixture import Mixture, counts_before
from gptjax.errors import ConfigError
from gptjax.mix import LARGEST_SUM, Part, parse_mix, write_mix
from tests.data.test_dataset import make_dataset, read_by_processes
from tests.helpers import raises
from tests.processes import train as train_processes
from tests.runs import last_step, losses, rows, validations

WEIGHTS = st.lists(st.integers(1, 1000), min_size=1, max_size=6).map(tuple)


def make_mixture(weights, *lengths, seed=0):
    datasets = tuple(make_dataset(length, batch=8, seed=seed + number) for number, length in enumerate(lengths))
    return Mixture(tuple("abcdef"[: len(weights)]), weights, datasets)


# The text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("data/web:70,data/code:20,data/books:10",
         [("data/web", 7, "web"), ("data/code", 2, "code"), ("data/books", 1, "books")]),
        ("a:0.5, b:0.25", [("a", 2, "a"), ("b", 1, "b")]),
        ("one:3", [("one", 1, "one")]),
        ("x/en:1,y/en:1", [("x/en", 1, "x-en"), ("y/en", 1, "y-en")]),
        ("c:/data:2,d:1", [("c:/data", 2, "data"), ("d", 1, "d")]),
    ],
)  # fmt: skip
def test_weights_become_integers_without_a_common_divisor(text, parts):
    assert parse_mix(text) == tuple(Part(*part) for part in parts)
    assert [part.weight for part in parse_mix(write_mix(parse_mix(text)))] == [part[1] for part in parts]


@given(numbers=st.lists(st.integers(1, 9999), min_size=2, max_size=4))
def test_decimals_are_exact(numbers):
    decimals = ",".join(f"d{number}:{weight // 100}.{weight % 100:02}" for number, weight in enumerate(numbers))
    assert [part.weight for part in parse_mix(decimals)] == [weight // math.gcd(*numbers) for weight in numbers]


@pytest.mark.parametrize(
    "text",
    ["data/web", "a:0,b:1", "a:-1", "a:1e3", "a:nan", "a:1,,b:2", ":1", "a:1/3", "a:0.0", "a:1,a:2", "a:1,./a:2",
     "a:\u0661"],
)  # fmt: skip
def test_text_that_is_no_mixture_is_refused(text):
    with raises(ConfigError, "data.mix", value=text):
        parse_mix(text)
    [error] = find_problems(Config(data=DataConfig(mix=text)))
    assert (error.field, error.value) == ("data.mix", text)


def test_weights_too_fine_for_the_arithmetic_are_refused():
    with raises(ConfigError, "data.mix", value="a:0.0000001,b:1", remedy="round them", match="1:10000000 as integers"):
        parse_mix("a:0.0000001,b:1")
    assert (2**63 - 1) // LARGEST_SUM > 10**12, "samples of the longest run"


def test_directories_whose_paths_look_alike_have_different_names():
    parts = parse_mix("/a-b/c:1,/a/b-c:1,/z/c:1")
    assert [part.name for part in parts] == ["1-c", "2-b-c", "3-c"]


def test_path_with_a_comma_is_not_written_as_a_mixture():
    assert write_mix((Part("/x,y/a", 1, "a"), Part("/b", 1, "b"))) == ""


def test_a_path_and_a_mixture_contradict_each_other():
    [error] = find_problems(Config(data=DataConfig(path="a", mix="b:1,c:2")))
    assert (error.field, error.value) == ("data.path", "a")


# The arithmetic


@given(weights=WEIGHTS, start=st.integers(0, 10**12))
@settings(deadline=None)
def test_selection_is_that_of_grain(weights, start):
    samples = np.arange(start, start + 50)
    before, after = counts_before(samples, weights), counts_before(samples + 1, weights)
    for sample, old, new in zip(samples.tolist(), before.tolist(), after.tolist(), strict=True):
        source, key = grain_mix._dataset_and_key_of_next_element(sample, weights)
        assert [n - o for n, o in zip(new, old, strict=True)] == [int(i == source) for i in range(len(weights))]
        assert old[source] == key


@given(weights=WEIGHTS)
@settings(deadline=None)
def test_each_prefix_has_nearly_the_proportions(weights):
    samples = np.arange(3000)
    counts = counts_before(samples, weights)
    assert (counts.sum(axis=1) == samples).all()
    assert np.abs(counts - np.outer(samples, weights) / sum(weights)).max() < max(1, len(weights) - 1)


def test_each_source_goes_through_its_own_epochs():
    mixture = make_mixture((3, 1), 801, 201)
    ids = np.concatenate([mixture.window_ids(step) for step in range(80)])  # 640 samples: 480 and 160
    first, second = ids[ids < 80], ids[ids >= 80] - 80
    assert first.tolist() == mixture.datasets[0].windows_of(np.arange(480)).tolist()
    assert second.tolist() == mixture.datasets[1].windows_of(np.arange(160)).tolist()
    assert [sorted(part.tolist()) for part in np.split(first, 6)] == [list(range(80))] * 6
    assert mixture.epochs(640) == {"epochs/a": 6.0, "epochs/b": 8.0}


def test_windows_are_read_from_their_sources():
    mixture = make_mixture((2, 1, 1), 801, 201, 101)
    assert mixture.num_windows == 110
    ids = mixture.window_ids(3)
    expected = np.concatenate([dataset.read(np.arange(dataset.num_windows)) for dataset in mixture.datasets])
    assert np.array_equal(mixture.read(ids), expected[ids])
    places = [mixture.shard_of(window) for window in (0, 79, 80, 99, 100, 109)]
    files = [dataset.shard_of(0)[0] for dataset in mixture.datasets]
    ends = zip("abc", files, (790, 190, 90), strict=True)
    assert places == [(f"{name}/{file}", at) for name, file, last in ends for at in (0, last)]


def test_one_source_gives_the_batches_of_the_dataset():
    mixture, dataset = make_mixture((1,), 801), make_dataset(801, batch=8)
    for step in (0, 7, 99, 10**9):
        assert np.array_equal(mixture.window_ids(step), dataset.window_ids(step))
        assert np.array_equal(mixture.read(mixture.window_ids(step)), dataset.read(dataset.window_ids(step)))


@pytest.mark.parametrize(("processes", "num_microbatches"), [(1, 1), (2, 4), (8, 1), (4, 2), (1, 8)])
def test_batches_do_not_depend_on_processes_or_accumulation(processes, num_microbatches):
    mixture = make_mixture((5, 3), 801, 301)
    for step in (0, 1, 40, 10**6):
        whole = read_by_processes(mixture, step, processes=processes, num_microbatches=num_microbatches)
        assert np.array_equal(whole.reshape(8, -1), mixture.read(mixture.window_ids(step)))


# Runs


@pytest.fixture(scope="module")
def mixed(lab, tmp_path_factory):
    """The settings of a run on two sources; the shorter one is repeated. And that run, undisturbed."""
    root = tmp_path_factory.mktemp("mixed")
    source = sorted((lab.root / "text").iterdir())
    for name, files in (("long", source[::2]), ("short", source[1:9:2])):
        (root / "text" / name).mkdir(parents=True)
        for file in files:
            shutil.copy(file, root / "text" / name)
        flags = [f"--source=text:{root}/text/{name}", "--tokenizer=bytes", f"--out={root}/{name}", "--val_fraction=0.2"]
        prepare.main(flags)
    settings = ["data.path=", f"data.mix={root}/long:70,{root}/short:30", "train.num_steps=12"]
    lab.train(root / "whole", *settings)
    return root, settings


def test_run_reports_each_source(mixed):
    root, _ = mixed
    [last] = [row for row in rows(root / "whole") if row["step"] == 12 and "val_loss" in row]
    by_source = [last[f"val_loss/{name}"] for name in ("long", "short")]
    assert by_source[0] != by_source[1]
    assert last["val_loss"] == pytest.approx(0.7 * by_source[0] + 0.3 * by_source[1], rel=1e-12)
    assert last["val_bits_per_byte"] == pytest.approx(last["val_loss"] / math.log(2), rel=1e-2)  # bytes: one per token
    epochs = [(row["epochs/long"], row["epochs/short"]) for row in rows(root / "whole") if "lr" in row]
    assert len(epochs) == 12
    assert epochs == sorted(epochs)


def test_run_resumes_and_replays(mixed, lab, tmp_path):
    root, settings = mixed
    lab.train(tmp_path / "cut", *settings, "train.num_steps=6")
    lab.train(tmp_path / "cut", *settings)
    assert losses(tmp_path / "cut") == losses(root / "whole")
    assert validations(tmp_path / "cut")[12] == validations(root / "whole")[12]
    flags = [f"--workdir={tmp_path}/cut", "--step=6", f"--out={tmp_path}/p.html"]
    replay = [sys.executable, "-m", "gptjax.replay", *flags]
    said = lab.call(replay).stdout
    assert "equal to metrics.jsonl, bit for bit" in said
    assert "long/train_000000.bin" in said
    assert "short/train_000000.bin" in said


def test_killed_run_ends_in_the_same_bits(mixed, lab, tmp_path):
    root, settings = mixed
    lab.train(tmp_path / "run", *settings, expect=-9, GPTJAX_FAULT="step:7:kill")
    lab.train(tmp_path / "run", *settings)
    assert losses(tmp_path / "run") == losses(root / "whole")


def test_two_processes_have_the_batches_of_one(mixed, lab, tmp_path):
    root, settings = mixed
    train_processes(lab, tmp_path / "run", 2, *settings)
    assert last_step(tmp_path / "run") == 12
    for step, loss in losses(tmp_path / "run").items():
        assert float.fromhex(loss) == pytest.approx(float.fromhex(losses(root / "whole")[step]), rel=1e-5)


def test_changed_weights_are_changed_data(mixed, lab, tmp_path):
    root, settings = mixed
    shutil.copytree(root / "whole", tmp_path / "run")
    other = [*settings, f"data.mix={root}/long:60,{root}/short:40", "train.num_steps=14"]
    refused = lab.call(lab.command(tmp_path / "run", *other), expect=2).stderr
    assert "data.mix weights was '7:3', now '3:2'" in refused
    assert "fingerprint of source" not in refused
    assert "--config.data.allow_changed=True" in refused
    lab.train(tmp_path / "run", *other, "data.allow_changed=True")


def test_evaluation_reads_the_mixture_of_the_run(mixed, lab):
    root, _ = mixed
    command = [sys.executable, "-m", "gptjax.evaluate", f"--workdir={root}/whole", "--batches=2"]
    said = lab.call(command).stdout.splitlines()
    [last] = [row for row in rows(root / "whole") if row["step"] == 12 and "val_loss" in row]
    assert f"validation loss {last['val_loss']:.4f}" in said[0]
    assert said[1].startswith(f"  long: loss {last['val_loss/long']:.4f}, ")
    assert said[2].startswith(f"  short: loss {last['val_loss/short']:.4f}, ")
    alone = lab.call([*command, f"--data={root}/short"]).stdout
    assert f"validation loss {last['val_loss/short']:.4f}" in alone


def test_run_on_one_source_is_the_run_on_its_directory(lab, reference, tmp_path):
    lab.train(tmp_path / "run", "data.path=", f"data.mix={lab.data}:1", "train.num_steps=8")
    assert losses(tmp_path / "run") == {step: loss for step, loss in losses(reference).items() if step <= 8}
    lab.train(tmp_path / "run", "train.num_steps=9")  # and the other way round
    assert losses(tmp_path / "run")[9] == losses(reference)[9]


def test_missing_directory_and_other_end_of_text_are_named(mixed, lab, tmp_path):
    root, settings = mixed
    missing = lab.refusal(tmp_path / "run", *settings, f"data.mix={root}/long:1,{root}/none:2", expect=2)
    assert missing.startswith(f"data.mix={root}/long:1,{root}/none:2: no data in {root}/none; ")
    assert f"--out={root}/none" in missing
    assert not (tmp_path / "run").exists()
    prepare.main([f"--source=text:{root}/text/short", "--tokenizer=gpt2", f"--out={tmp_path}/gpt2"])
    refused = lab.refusal(tmp_path / "run", *settings, f"data.mix={root}/long:1,{tmp_path}/gpt2:2", expect=2)
    assert refused.startswith(f"data.tokenizer=bytes: {tmp_path}/gpt2 was prepared with another tokenizer, 'gpt2'")
    shutil.copytree(root / "short", tmp_path / "first")
    meta = json.loads((tmp_path / "first" / "meta.json").read_text()) | {"eot_position": "first"}
    (tmp_path / "first" / "meta.json").write_text(json.dumps(meta))
    refused = lab.refusal(tmp_path / "run", *settings, f"data.mix={root}/long:1,{tmp_path}/first:2", expect=65)
    assert refused.startswith(f"{tmp_path}/first: has end-of-text")


def test_dataset_and_mixture_have_the_same_methods():
    used = {"batch", "window_ids", "read", "shard_of", "sources", "epochs", "num_windows", "eot", "tokens"}
    used.add("fingerprint")
    for cls in (Dataset, Mixture):
        assert used <= set(dir(cls))
