"""G1, G2: a step that is not finite changes nothing but the step, and the policy decides what happens then."""

import math
import re

import jax
import numpy as np
import pytest

from gptjax.documents import EndOfText
from gptjax.errors import DivergedError
from gptjax.optim import make_optimizer, make_schedule
from gptjax.state import TrainState
from gptjax.step import make_loss_fn, make_train_step
from tests.helpers import raises
from tests.runs import checkpoint_steps, losses, restored_bytes, rows

pytestmark = pytest.mark.faults
SHORT = {"num_steps": 8, "eval_every": 0}


@pytest.fixture(scope="module")
def broken_step(lab, tiny_run):
    """The train step of a model whose loss is not a number, jitted as the run's own."""
    config = tiny_run.config
    loss_fn = make_loss_fn(tiny_run.model, config, eot=EndOfText(tiny_run.tokenizer.eot_id, "last"))

    def broken_loss(params, tokens, key):
        sums = loss_fn(params, tokens, key)
        return sums._replace(loss=sums.loss * math.nan)

    optimizer, schedule = make_optimizer(config.optim), make_schedule(config.optim, config.train.num_steps)
    step = make_train_step(broken_loss, optimizer, schedule, config=config, parallel=tiny_run.model.parallel)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, tiny_run.abstract_state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


@pytest.fixture
def breaking_at(tiny_run, broken_step):
    """breaking_at(4) is a train step that gives no number for the update that would make step 4."""

    def make(*steps):
        def train_step(state, tokens):
            return (broken_step if int(state.step) + 1 in steps else tiny_run.train_step)(state, tokens)

        return {"train_step": train_step}

    return make


def leaving_out(tiny_run, *steps):
    """A train step that does nothing but count for these steps."""

    def train_step(state, tokens):
        if int(state.step) + 1 not in steps:
            return tiny_run.train_step(state, tokens)
        kept = jax.tree.map(lambda leaf: leaf + 0, state)
        _, metrics = tiny_run.train_step(state, tokens)
        return TrainState(kept.step + 1, kept.params, kept.opt_state), metrics

    return {"train_step": train_step}


def assert_finite_checkpoints(workdir, abstract):
    from gptjax.checkpoint import Checkpointer

    checkpointer = Checkpointer(str(workdir))
    for step in checkpointer.steps():
        record = checkpointer.read_record(step)
        trees = checkpointer.load(step, {"params": abstract.params, "opt_state": abstract.opt_state}, record)
        assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(trees))


def test_g1_skip_policy_equals_a_run_without_the_step(train_here, tiny_run, breaking_at, said, tmp_path):
    plain, skipping, reference = tmp_path / "plain", tmp_path / "skipping", tmp_path / "reference"
    policy = SHORT | {"nan_policy": "skip"}
    train_here(plain, train=policy)
    assert train_here(skipping, train=policy, parts=breaking_at(5)) == 0
    (told,) = [line for line in said if "update skipped" in line]
    assert re.fullmatch(r"step 5: loss nan, .* nan: .*\(1 .*\)", told)
    train_here(reference, train=policy, parts=leaving_out(tiny_run, 5))

    found = {row["step"]: row for row in rows(skipping) if "loss" in row}
    assert list(found) == list(range(1, 9)), "the data and the steps go on"
    assert found[5]["loss"] is None
    assert [found[step].get("skipped_steps", 0) for step in range(1, 9)] == [0] * 4 + [1] * 4
    expected, undisturbed = losses(reference), losses(plain)
    others = [step for step in range(1, 9) if step != 5]
    assert [found[step]["loss"].hex() for step in others] == [expected[step] for step in others]
    assert expected[6] != undisturbed[6], "a step that changes nothing when left out tests nothing"
    abstract = tiny_run.abstract_state
    assert restored_bytes(skipping, abstract) == restored_bytes(reference, abstract)
    assert_finite_checkpoints(skipping, abstract)


def test_g2_stop_error_names_step_rows_and_resume_command(train_here, tiny_run, breaking_at, tmp_path):
    workdir, reference = tmp_path / "run", tmp_path / "reference"
    with raises(DivergedError, "step 6", match="nan, .* nan: .*'stop'") as caught:
        train_here(workdir, train=SHORT, parts=breaking_at(6))
    cause, restart, inspect = caught.value.errors
    assert str(tiny_run.train_data.window_ids(5).tolist()) in cause.problem
    assert restart.remedy.endswith(" step 4")
    assert inspect.remedy.endswith(f" python -m gptjax.replay --workdir={workdir} --step=6")
    assert checkpoint_steps(workdir) == [4]
    assert_finite_checkpoints(workdir, tiny_run.abstract_state)
    report = workdir / "report.html"
    assert "<dd>5 <small>of" in report.read_text(), "it shows how the run came to that"
    report.unlink()
    assert train_here(workdir, train=SHORT) == 0
    train_here(reference, train=SHORT)
    assert losses(workdir) == losses(reference)


def test_g2_divergence_before_any_checkpoint_is_reported(train_here, breaking_at, tmp_path):
    with raises(DivergedError, "step 2") as caught:
        train_here(tmp_path / "run", train=SHORT, parts=breaking_at(2))
    assert caught.value.errors[1].remedy.endswith(" step 0")
    assert checkpoint_steps(tmp_path / "run") == []


def test_g2_nonfinite_count_continues_after_a_restart(train_here, tiny_run, breaking_at, said, tmp_path):
    """Steps 3 and 4, a checkpoint, a restart, step 5: three in a row."""
    workdir = tmp_path / "run"
    policy = SHORT | {"nan_policy": "skip", "max_consecutive_nonfinite": 3}
    train_here(workdir, train=policy | {"num_steps": 4}, parts=breaking_at(3, 4))
    with raises(DivergedError, "step 5", match="loss nan, .*: 3 "):
        train_here(workdir, train=policy, parts=breaking_at(5))
    assert sum("update skipped" in line for line in said) == 2
    assert checkpoint_steps(workdir) == [4]
    assert_finite_checkpoints(workdir, tiny_run.abstract_state)


def test_g2_poisoned_parameters_are_never_saved(train_here, tiny_run, tmp_path):
    """Skipping cannot help when the parameters themselves are no numbers; the save at step 4 comes before the limit."""
    workdir = tmp_path / "run"

    def train_step(state, tokens):
        if int(state.step) == 2:
            params = jax.tree.map(lambda leaf: leaf, state.params)
            params["ln_f"]["bias"] = params["ln_f"]["bias"] * math.nan
            state = TrainState(state.step, params, state.opt_state)
        return tiny_run.train_step(state, tokens)

    policy = SHORT | {"nan_policy": "skip", "max_consecutive_nonfinite": 10}
    with raises(DivergedError, "params/ln_f/bias", match="step 4"):
        train_here(workdir, train=policy, parts={"train_step": train_step})
    assert checkpoint_steps(workdir) == []
