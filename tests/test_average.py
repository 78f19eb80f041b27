"""The moving average of the parameters: its values, what uses it, and that nothing else changes."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint import Checkpointer
from gptjax.config import OptimConfig
from gptjax.convert import formats, native
from gptjax.convert.model_ref import ModelRef
from gptjax.errors import ConfigError, DataError
from gptjax.optim import make_optimizer
from gptjax.setup import make_run
from gptjax.state import make_init
from tests.helpers import assert_near, mesh_of, raises
from tests.runs import copy_until, losses, make_run_on, rows, validations

DECAY = 0.9


@pytest.fixture(scope="module")
def averaged(lab):
    """A run with an average on one device of this process, not trained."""
    return make_run_on(lab.config(optim={"ema_decay": DECAY}))


def snapshot(tree):
    return jax.tree.map(np.array, tree)


def move(average, params, step):
    """The average after update `step` has made `params`."""
    decay = min(DECAY, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, snapshot(params))


def test_average_follows_the_recursion(averaged):
    state = averaged.init()
    expected = snapshot(state.params)
    for step in range(14):
        state, _ = averaged.train_step(state, averaged.batch(step))
        expected = move(expected, state.params, step)
        assert_near(state.average, expected, 1e-5)
    assert not np.array_equal(state.average["wte"]["embedding"], state.params["wte"]["embedding"])
    assert state.evaluated is state.average


def test_skipped_update_leaves_the_average(averaged):
    state = averaged.init()
    state, _ = averaged.train_step(state, averaged.batch(0))
    before = snapshot(state.average)
    broken = dataclasses.replace(state, params=jax.tree.map(lambda p: p * jnp.nan, state.params))
    after, metrics = averaged.train_step(broken, averaged.batch(1))
    assert not metrics["finite"]
    for found, wanted in zip(jax.tree.leaves(after.average), jax.tree.leaves(before), strict=True):
        assert np.array_equal(found, wanted)


def test_average_is_placed_like_the_parameters(averaged):
    mesh = mesh_of(2, 2, 2)
    optimizer = make_optimizer(OptimConfig())
    abstract, _ = make_init(averaged.model, optimizer, mesh=mesh, seed=0, has_average=True)
    placed = [[leaf.sharding for leaf in jax.tree.leaves(tree)] for tree in (abstract.average, abstract.params)]
    assert placed[0] == placed[1]
    without, _ = make_init(averaged.model, optimizer, mesh=mesh, seed=0)
    assert without.average is None
    assert set(without.trees) == {"params", "opt_state"}
    assert without.evaluated is without.params


# Runs


@pytest.fixture(scope="module")
def trained(lab, tmp_path_factory):
    root = tmp_path_factory.mktemp("average")
    settings = [f"optim.ema_decay={DECAY}", "checkpoint.keep=8"]
    lab.train(root / "run", *settings)
    return root / "run", settings


def trees(workdir, step):
    record = Checkpointer(str(workdir)).read_record(step)
    return {name: value for name, value in record.fingerprints.items() if name.startswith("average/")}


def test_killed_run_ends_with_the_same_average(trained, lab, tmp_path):
    workdir, settings = trained
    lab.train(tmp_path / "run", *settings, expect=-9, GPTJAX_FAULT="step:11:kill")
    lab.train(tmp_path / "run", *settings)
    assert losses(tmp_path / "run") == losses(workdir)
    assert validations(tmp_path / "run") == validations(workdir)
    assert trees(tmp_path / "run", 16) == trees(workdir, 16) != {}


def test_updates_are_those_without_an_average(trained, reference):
    workdir, _ = trained
    assert losses(workdir) == losses(reference)
    assert validations(workdir) != validations(reference)


def test_average_continues_on_another_mesh(trained, lab, averaged):
    workdir, _ = trained
    mesh = {"data": 1, "fsdp": 2, "tensor": 2}
    other = make_run_on(lab.config(optim={"ema_decay": DECAY}, mesh=mesh, train={"micro_batch_size": 4}), devices=4)
    checkpointer = Checkpointer(str(workdir))
    record = checkpointer.read_record(16)
    states = [checkpointer.restore(record, run.abstract_state) for run in (averaged, other)]
    assert np.array_equal(*(state.average["wte"]["embedding"] for state in states))
    before = snapshot(states[1].average)
    after, _ = other.train_step(states[1], other.batch(16))
    assert_near(after.average, move(before, after.params, 16), 1e-5)


def test_every_command_says_which_weights_it_used(trained, lab, tmp_path):
    workdir, _ = trained
    evaluate = [sys.executable, "-m", "gptjax.evaluate", f"--workdir={workdir}", "--batches=2"]
    plain, raw = (lab.call([*evaluate, *flags]).stdout.splitlines()[0] for flags in ([], ["--raw"]))
    assert plain.startswith("step 16, averaged weights: validation loss ")
    assert raw.startswith("step 16, raw weights: validation loss ")
    last = [row for row in rows(workdir) if "val_loss" in row][-1]
    assert f"validation loss {last['val_loss']:.4f}" in plain
    assert plain.split("loss")[1] != raw.split("loss")[1]
    convert = [sys.executable, "-m", "gptjax.convert", f"--from=gptjax:{workdir}"]
    lab.call([*convert, f"--to=hf:{tmp_path}/average"])
    lab.call([*convert, "--raw", f"--to=hf:{tmp_path}/raw"])
    scores = {}
    for name in ("average", "raw"):
        model = [sys.executable, "-m", "gptjax.evaluate", f"--model=hf:{tmp_path}/{name}", f"--data={lab.data}"]
        scores[name] = lab.call([*model, "--batches=2"]).stdout.split("loss ")[1].split(",")[0]
    assert f"loss {scores['average']}," in plain
    assert f"loss {scores['raw']}," in raw
    sample = [sys.executable, "-m", "gptjax.sample", f"--workdir={workdir}", "--prompt=def", "--max_new_tokens=8"]
    assert lab.call(sample).stdout
    assert lab.call([*sample, "--raw"]).stdout
    refused = lab.call(
        [sys.executable, "-m", "gptjax.evaluate", f"--model=hf:{tmp_path}/raw", "--raw"], expect=2
    ).stderr
    assert "--raw: is for runs of gptjax" in refused


def read_leaf(path):
    weights = formats.open_weights(ModelRef("gptjax", path), dropout=0.0)
    return np.asarray(formats.load_params(weights, lambda _, leaf: leaf)["wte"]["embedding"]), weights


def test_checkpoints_are_averaged_afterwards(reference):
    single = [read_leaf(f"{reference}@{step}")[0] for step in (8, 12, 16)]
    mean, weights = read_leaf(f"{reference}@8,12,16")
    assert np.array_equal(mean, np.mean(single, axis=0, dtype=np.float64).astype(np.float32))
    assert weights.origin == f"gptjax:{reference}@8,12,16"
    assert weights.adamw is None
    assert read_leaf(f"{reference}@16")[1].adamw is not None
    with raises(DataError, str(reference), match="no checkpoint of step 9"):
        read_leaf(f"{reference}@8,9")


def test_path_of_a_run_may_end_in_raw(trained, tmp_path):
    workdir, _ = trained
    assert native.locate(f"{workdir}@8@raw") == (str(workdir), (8,), True)
    assert native.locate(f"{workdir}@raw") == (str(workdir), (), True)
    assert native.locate(f"{workdir}@8,16") == (str(workdir), (8, 16), False)
    (tmp_path / "run@raw").mkdir()
    assert native.locate(f"{tmp_path}/run@raw") == (f"{tmp_path}/run@raw", (), False)
    average, raw = (read_leaf(f"{workdir}{end}") for end in ("", "@raw"))
    assert not np.array_equal(average[0], raw[0])
    assert (average[1].adamw, raw[1].adamw is None) == (None, False)
    assert raw[1].origin.endswith("@16@raw")


def test_average_that_begins_or_ends_in_a_run_is_refused(trained, reference, lab, tmp_path):
    workdir, settings = trained
    without = copy_until(reference, tmp_path / "run", 16)
    for source, changed in ((workdir, ["checkpoint.keep=8"]), (without, settings)):
        refused = lab.refusal(source, *changed, "train.num_steps=20", expect=2)
        assert refused.startswith("optim.ema_decay: the checkpoint has ")
        assert "choose another --workdir" in refused


def test_run_that_starts_from_an_average_takes_it(trained, lab):
    workdir, _ = trained
    run = make_run_on(lab.config(init_from=f"gptjax:{workdir}", optim={"ema_decay": DECAY}))
    from gptjax.resume import initial_state

    state = initial_state(run)
    for found, average in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.average), strict=True):
        assert np.array_equal(found, average)
    assert np.array_equal(state.params["wte"]["embedding"], read_leaf(str(workdir))[0])


def test_decay_of_one_is_refused(lab):
    with raises(ConfigError, "optim.ema_decay", value=1.0):
        make_run(lab.config(optim={"ema_decay": 1.0}))
