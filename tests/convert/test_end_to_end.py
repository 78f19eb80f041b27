"""Weights brought from elsewhere: trained, exported to each form, brought back, sampled and evaluated as they are."""

import dataclasses
import itertools
import json
import re
import sys

import numpy as np
import pytest

from gptjax.config import GPTConfig
from gptjax.convert import __main__ as command
from gptjax.convert import formats
from gptjax.convert.formats import ModelRef
from gptjax.convert.tokenizer_files import write_tokenizer
from gptjax.convert.weights import read_tensors
from gptjax.data.tokenizer import load_tokenizer
from gptjax.errors import ConfigError
from gptjax.resume import compare_models
from gptjax.stored import load_params
from tests.convert.models import make_tensors, write_hf, write_llmc
from tests.helpers import raises
from tests.runs import rows

# As large as the model of tests/runs.py, so that its data and its compiled steps serve here.
SIZES = {"vocab_size": 257, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model of someone else's, with its tokenizer."""
    directory = tmp_path_factory.mktemp("source") / "hf"
    write_hf(directory, config=SIZES)
    write_tokenizer(load_tokenizer("bytes"), str(directory), block_size=32)
    return directory


@pytest.fixture(scope="module")
def tuned(lab, source, tmp_path_factory):
    """The work directory of a run of five steps that began with the weights of `source`."""
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    said = lab.train(workdir, f"init_from=hf:{source}", "train.num_steps=5", "train.eval_every=5").stdout
    assert f"parameters from hf:{source}" in said
    return workdir


def convert(lab, source, target, **options):
    command = [sys.executable, "-m", "gptjax.convert", f"--from={source}", f"--to={target}"]
    return lab.call(command, **options).stdout


def bits(place):
    kind, _, path = place.partition(":")
    return {n: t.tobytes() for n, t in read_tensors(formats.open_weights(ModelRef(kind, str(path))))}


def test_training_starts_from_the_weights(lab, source, tuned):
    first = rows(tuned)[0]
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(np.log(257), abs=0.2), "so small are the random weights"
    trained = bits(f"gptjax:{tuned}")
    before = {name: tensor.tobytes() for name, tensor in make_tensors(SIZES).items()}
    assert [name for name in before if before[name] == trained[name]] == []


def test_first_step_starts_from_the_exact_imported_weights(lab, source, tmp_path):
    lab.train(tmp_path / "run", f"init_from=hf:{source}", "train.num_steps=1", "optim.warmup_steps=1000000")
    _, params, step = load_params(str(tmp_path / "run"))
    moved = np.asarray(params["wpe"]["embedding"]) - make_tensors(SIZES)["wpe.weight"]
    assert step == 1
    assert 0 < np.abs(moved).max() < 1e-8


@pytest.mark.parametrize(
    "form", ["hf:{0}/out", "llmc:{0}/out.bin", pytest.param("nanogpt:{0}/out.pt", marks=pytest.mark.torch)]
)
def test_export_and_reimport_of_each_format_is_bit_equal(lab, tuned, tmp_path, form):
    if form.startswith("nanogpt"):
        pytest.importorskip("torch")
    there = form.format(tmp_path)
    convert(lab, f"gptjax:{tuned}", there)
    assert bits(there) == bits(f"gptjax:{tuned}")
    convert(lab, there, f"gptjax:{tmp_path}/back")
    _, params, step = load_params(str(tmp_path / "back"))
    _, expected, trained = load_params(str(tuned))
    # nanoGPT's form holds AdamW's moments, with which a run resumes; the others hold parameters only.
    assert step == (trained if form.startswith("nanogpt") else 0)
    found, trained = (np.asarray(tree["h"]["attn"]["c_attn"]["kernel"]) for tree in (params, expected))
    assert found.tobytes() == trained.tobytes()
    assert bits(f"gptjax:{tmp_path}/back") == bits(f"gptjax:{tuned}")


@pytest.mark.torch
def test_chain_of_all_format_conversions_is_bit_equal(lab, source, tmp_path):
    """A round trip through all of them, each made from the one before."""
    pytest.importorskip("torch")
    places = [f"hf:{source}", f"nanogpt:{tmp_path}/a.pt", f"llmc:{tmp_path}/b.bin", f"gptjax:{tmp_path}/c"]
    places += [f"llmc:{tmp_path}/d.bin", f"nanogpt:{tmp_path}/e.pt", f"hf:{tmp_path}/f"]
    for before, after in itertools.pairwise(places):
        convert(lab, before, after)
    assert bits(places[-1]) == bits(places[0])


def test_sampling_gives_the_same_text_from_every_format(lab, source, tuned, tmp_path):
    """The same text from the work directory and from each form of it."""
    flags = ["--prompt=def ", "--max_new_tokens=24", "--temperature=0.7", "--seed=3"]
    sample = [sys.executable, "-m", "gptjax.sample"]
    expected = lab.call([*sample, f"--workdir={tuned}", *flags]).stdout
    convert(lab, f"gptjax:{tuned}", f"hf:{tmp_path}/hf")
    convert(lab, f"gptjax:{tuned}", f"llmc:{tmp_path}/m.bin")
    assert lab.call([*sample, f"--model=hf:{tmp_path}/hf", *flags]).stdout == expected
    assert lab.call([*sample, f"--model=llmc:{tmp_path}/m.bin", "--tokenizer=bytes", *flags]).stdout == expected
    assert lab.call([*sample, f"--model=gptjax:{tuned}@5", *flags]).stdout == expected
    assert lab.call([*sample, f"--model=hf:{source}", *flags]).stdout != expected


def test_a_model_without_a_tokenizer_cannot_be_sampled(lab, tmp_path):
    write_llmc(tmp_path / "m.bin")
    command = [sys.executable, "-m", "gptjax.sample", f"--model=llmc:{tmp_path}/m.bin"]
    assert "has no tokenizer; give one with --tokenizer" in lab.call(command, expect=2).stderr


def test_evaluation_of_an_export_equals_that_of_the_run(lab, tuned, tmp_path):
    evaluate = [sys.executable, "-m", "gptjax.evaluate"]
    pattern = r"validation loss ([\d.]+), perplexity ([\d.]+), ([\d.]+) bits per byte"
    expected = re.search(pattern, lab.call([*evaluate, f"--workdir={tuned}", "--batches=4"]).stdout)
    convert(lab, f"gptjax:{tuned}", f"hf:{tmp_path}/hf")
    model = [*evaluate, f"--model=hf:{tmp_path}/hf", f"--data={lab.data}"]
    said = lab.call([*model, "--batches=2"], devices=2).stdout  # twice as large as the run's
    assert re.search(pattern, said).groups() == expected.groups()
    assert said.startswith(f"hf:{tmp_path}/hf: validation loss")
    refused = lab.call([*evaluate, f"--model=hf:{tmp_path}/hf"], expect=2).stderr
    assert refused.startswith(f"error: --model=hf:{tmp_path}/hf: needs --data=DIR")


def test_import_with_a_larger_vocabulary_can_be_evaluated(lab, tmp_path):
    write_llmc(tmp_path / "m.bin", config=SIZES | {"vocab_size": 260}, padded=384)
    command.main([f"--from=llmc:{tmp_path}/m.bin", f"--to=gptjax:{tmp_path}/c", "--tokenizer=bytes"])
    evaluate = [sys.executable, "-m", "gptjax.evaluate", f"--data={lab.data}", "--batches=1"]
    said = lab.call([*evaluate, f"--workdir={tmp_path}/c"], devices=1).stdout
    assert re.match(r"step 0: validation loss 5\.\d", said)


def test_training_refuses_to_resume_from_converted_weights(lab, source, tmp_path):
    convert(lab, f"hf:{source}", f"gptjax:{tmp_path}/c")
    refused = lab.train(tmp_path / "c", "train.num_steps=2", expect=2).stderr
    assert f"choose another, with --config.init_from=gptjax:{tmp_path}/c" in refused
    lab.train(tmp_path / "run", f"init_from=gptjax:{tmp_path}/c", "train.num_steps=1")
    sample = [sys.executable, "-m", "gptjax.sample", f"--workdir={tmp_path}/c", "--max_new_tokens=3"]
    lab.call(sample)


def test_positions_that_a_run_does_not_use_are_left_out(lab, source, tmp_path):
    said = lab.train(tmp_path / "run", f"init_from=hf:{source}", "model.block_size=16", "train.num_steps=1").stdout
    assert "positions from 16 on are left out" in said
    refused = lab.train(tmp_path / "b", f"init_from=hf:{source}", "model.block_size=64", expect=2).stderr
    assert "it has block_size=32, this run model.block_size=64" in refused


def test_import_with_a_larger_vocabulary_can_be_trained(lab, tmp_path):
    """As of a nanoGPT checkpoint, whose 50,304 rows are more than GPT-2's 50,257 tokens."""
    write_llmc(tmp_path / "m.bin", config=SIZES | {"vocab_size": 260}, padded=384)
    flags = ["model.vocab_size=260", "train.num_steps=1"]
    lab.train(tmp_path / "run", f"init_from=llmc:{tmp_path}/m.bin", *flags)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["vocab_size"] == 260
    assert "set model.vocab_size=257" in lab.train(tmp_path / "b", *flags, expect=2).stderr


@pytest.mark.parametrize("field", dataclasses.fields(GPTConfig), ids=lambda field: field.name)
def test_model_with_any_other_field_except_dropout_is_refused(field):
    """But for dropout, which is the run's own, and for positions that are left out."""
    found = GPTConfig(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=16)
    value = getattr(found, field.name)
    other = {bool: lambda: not value, str: lambda: "gelu"}.get(type(value), lambda: value * 4 + 0.5)
    wanted = dataclasses.replace(found, **{field.name: other()})
    if field.name == "dropout":
        compare_models(found, wanted, "x")
        return
    with raises(ConfigError, "init_from", value="x", match=f"{field.name}={value}, .*model.{field.name}={other()}"):
        compare_models(found, wanted, "x")
