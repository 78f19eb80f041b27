"""Several steps in one dispatch: as many as the time of a step allows, and the same run to the bit."""

import itertools
import math
import types

import jax
import numpy as np
import pytest

from gptjax.config import Config, from_dict, load
from gptjax.dispatch import Batches, choose_steps_per_dispatch, dispatch_end, last_batch
from tests.runs import leaf_bytes, losses, make_run_on, restored_bytes, rows, validations


def chosen(config, *, kind="cpu", devices=1, processes=1):
    """K of a config on devices of a kind, the same number in each process."""
    platform = kind if kind == "cpu" else "gpu"
    found = [
        types.SimpleNamespace(device_kind=kind, platform=platform, process_index=number % processes)
        for number in range(devices)
    ]
    return choose_steps_per_dispatch(config, types.SimpleNamespace(devices=np.array(found), size=devices))


def quickstart(**train):
    overrides = {f"train.{name}": str(value) for name, value in train.items()}
    return load("configs/quickstart.py", overrides)


def test_short_steps_share_a_dispatch():
    assert chosen(quickstart()) == 7, "of about 36 ms"
    assert chosen(quickstart(log_every=8)) == 4, "two dispatches of the same length, not of 7 and 1"
    assert chosen(quickstart(log_every=1)) == 1
    assert chosen(quickstart(stats_every=5)) == 5
    assert chosen(quickstart(), kind="NVIDIA H200") == 50


def test_long_steps_have_their_own():
    small = load("configs/gpt2_small.py", {})
    for kind, devices in (("cpu", 1), ("NVIDIA H200", 1), ("NVIDIA H200", 64)):
        assert chosen(small, kind=kind, devices=devices) == 1
    assert chosen(load("configs/quickstart.py", {"data.global_batch_size": "12"})) == 1, "53 ms"


def test_choice_depends_on_processes_and_not_on_simulated_devices():
    assert chosen(quickstart(), devices=8) == chosen(quickstart())
    assert chosen(quickstart(), devices=8, processes=2) == 13, "of about 18 ms"


def test_no_choice_is_made_for_an_unknown_chip_or_a_given_number():
    assert chosen(quickstart(), kind="a chip of tomorrow") == 1
    assert chosen(quickstart(steps_per_dispatch=10)) == 10
    assert chosen(quickstart(steps_per_dispatch=1)) == 1


def ends(config, at_most, first=0):
    """The ends of all dispatches of a process that starts at step `first`."""
    step = first
    while step < config.train.num_steps:
        step = dispatch_end(config, step, at_most=at_most, start=first)
        yield step


@pytest.mark.parametrize("first", [0, 1, 13, 34])
@pytest.mark.parametrize("at_most", [1, 3, 50])
def test_dispatches_end_wherever_something_is_due(first, at_most):
    periods = {"log_every": 7, "eval_every": 10, "sample_every": 0, "stats_every": 25}
    config = from_dict({"train": {**periods, "num_steps": 101, "profile_step": 45}, "checkpoint": {"save_every": 30}})
    found = list(ends(config, at_most, first))
    due = [step for step in range(first + 1, 102) if any(step % every == 0 for every in (7, 10, 25, 30))]
    due += [45, 46, 101]
    assert set(due) <= set(found)
    lengths = [end - start for start, end in itertools.pairwise([first, *found])]
    assert lengths[0] == 1, "the dispatch that compiles"
    assert min(lengths) >= 1
    assert max(lengths) == min(at_most, 7), "from 91 to 98 nothing is due"
    if at_most == 50:
        assert set(found) == {first + 1, *due}


def test_dispatch_beyond_the_last_step_has_an_end():
    """A replay of a run whose num_steps was lowered."""
    config = from_dict({"train": {"num_steps": 5, "log_every": 100}})
    assert dispatch_end(config, 7, at_most=4) == 11


def test_last_batch_is_that_of_the_last_step():
    tokens = jax.numpy.arange(12).reshape(3, 2, 2, 1)
    assert last_batch(Batches(tokens, jax.numpy.int32(2))).tolist() == tokens[1].tolist()
    one = tokens[2]
    assert last_batch(one) is one


# The same bits


VARIANTS = {
    "every option of the update": (
        {
            "optim": {"name": "muon", "ema_decay": 0.9},
            "train": {"z_loss": 1e-3, "stats_every": 4},
            "compute": {"scan_unroll": 0, "remat": "full", "loss_chunk": 8},
        },
        1,
    ),
    "eight devices": (
        {
            "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
            "train": {"micro_batch_size": 1},
            "compute": {"dtype": "bfloat16"},
        },
        8,
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dispatch_of_several_steps_gives_the_same_bits(lab, variant):
    """In dispatches of 1 and 3 steps of at most 4, and with the program without a loop.

    The tiny config has dropout and accumulation. On one device and in float32 they are in the next test.
    """
    sections, devices = VARIANTS[variant]
    train = sections.get("train", {})
    one = make_run_on(lab.config(**sections | {"train": {**train, "steps_per_dispatch": 1}}), devices)
    many = make_run_on(lab.config(**sections | {"train": {**train, "steps_per_dispatch": 4, "log_every": 4}}), devices)
    expected, single = one.init(), []
    for step in range(4):
        expected, metrics = one.train_step(expected, one.batch(step))
        single.append(metrics)
    state, first = many.train_step(many.init(), many.batch(0, end=1))
    state, rest = many.train_step(state, many.batch(1, end=4))
    assert len({float(metrics["loss"]) for metrics in single}) == 4
    assert int(state.step) == 4
    assert leaf_bytes(state) == leaf_bytes(expected)
    together = jax.tree.map(lambda a, b: np.concatenate([a[:1], b[:3]]), first, rest)
    assert leaf_bytes(together) == leaf_bytes(jax.tree.map(lambda *steps: np.stack(steps), *single))


def test_run_that_is_resumed_with_another_choice_is_the_same(lab, reference, tmp_path):
    """It first ends at step 5, where a dispatch of the second choice would not end."""
    workdir = tmp_path / "run"
    periods = ["checkpoint.save_every=16", "train.eval_every=8"]
    lab.train(workdir, *periods, "train.log_every=4", "train.num_steps=5")
    lab.train(workdir, *periods, "train.log_every=7", "train.profile_step=9")
    assert len(list((workdir / "profile").rglob("*.xplane.pb"))) == 1
    assert losses(workdir) == {step: losses(reference)[step] for step in (4, 5, 7, 14, 16)}
    assert list(validations(workdir)) == [5, 8, 16]
    assert validations(workdir).items() >= validations(reference).items()
    state = make_run_on(lab.config()).abstract_state
    assert restored_bytes(workdir, state) == restored_bytes(reference, state)
    timed = [row for row in rows(workdir) if "loss" in row]
    assert all(0 < row["step_seconds"] < math.inf for row in timed), "also in the first row of a process"


def test_default_is_the_automatic_choice():
    assert Config().train.steps_per_dispatch == 0
