"""The decisions of the loop, one by one; that they add up is tested end to end and in tests/faults."""

import contextlib
import dataclasses
import gc
import math
import threading
import time

import jax
import pytest
import tensorstore

from gptjax import main, runtime
from gptjax import metrics as metrics_module
from gptjax import run as run_module
from gptjax import train as train_module
from gptjax.config import CheckpointConfig, Config, DataConfig, GPTConfig, MeshConfig, TrainConfig
from gptjax.errors import ConfigError, DivergedError
from gptjax.metrics import Stopwatch
from gptjax.model import Compute
from gptjax.run import choose_micro_steps, memory_budget
from gptjax.start import compare_data
from gptjax.train import (
    describe_roles,
    evaluation_is_missing,
    is_due,
    note_nonfinite,
    settle_dispatch,
    train,
)
from tests.runs import checkpoint_steps, make_run_on, rows

MODEL = GPTConfig(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=32)


# How many micro-steps


def micro_steps(*, batch, wanted=0, parts=1, fits=None, monkeypatch=None):
    config = Config(model=MODEL, data=DataConfig(global_batch_size=batch), train=TrainConfig(micro_batch_size=wanted))
    mesh = run_module.make_mesh(MeshConfig(), run_module.jax.devices()[:parts])
    compute = Compute()
    if fits is not None:
        sequence = run_module.activation_bytes_per_sequence(MODEL, compute, 0)
        monkeypatch.setattr(run_module, "memory_budget", lambda device: 5 / 3 * 1000 + (fits + 0.5) * sequence)
    return choose_micro_steps(config, compute, mesh, state_bytes=1000)


def test_a_given_micro_batch_is_taken():
    assert micro_steps(batch=8, wanted=8) == 1
    assert micro_steps(batch=8, wanted=2) == 4
    assert micro_steps(batch=48, wanted=3, parts=8) == 2


@pytest.mark.parametrize(
    ("batch", "parts", "fits", "expected"),
    [(8, 1, 100, 1), (8, 1, 8, 1), (8, 1, 7, 2), (12, 1, 5, 3), (7, 1, 6, 7), (8, 1, 0, 8), (64, 8, 3, 4)],
)
def test_otherwise_the_largest_divisor_that_fits(batch, parts, fits, expected, monkeypatch):
    assert micro_steps(batch=batch, parts=parts, fits=fits, monkeypatch=monkeypatch) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 12, "parts": 8}, "data.global_batch_size=12: .* 8 devices .* nearest valid: 8, 16$"),
        ({"batch": 3, "parts": 8}, "data.global_batch_size=3: .* nearest valid: 8$"),
        ({"batch": 8, "wanted": 3}, "train.micro_batch_size=3: .* = 8; nearest valid: 2, 4$"),
        ({"batch": 16, "wanted": 16, "parts": 8}, "train.micro_batch_size=16: .* = 2; nearest valid: 1, 2$"),
    ],
)
def test_what_does_not_divide_names_the_nearest(options, message):
    with pytest.raises(ConfigError, match=message):
        micro_steps(**options)


class Device:
    def __init__(self, platform, stats=None):
        self.platform, self.stats = platform, stats

    def memory_stats(self):
        return self.stats


def test_the_memory_budget():
    assert memory_budget(Device("tpu", {"bytes_limit": 1000})) == 800
    assert memory_budget(Device("gpu", {})) == math.inf
    assert memory_budget(Device("gpu")) == math.inf
    assert 0 < memory_budget(Device("cpu")) < math.inf


# When what is due


def test_is_due():
    assert [step for step in range(1, 10) if is_due(step, 3)] == [3, 6, 9]
    assert not any(is_due(step, 0) for step in range(1, 10))


@pytest.mark.parametrize(
    ("step", "validated", "eval_every", "missing"),
    [
        (0, -1, 4, False),
        (3, -1, 4, False),
        (4, -1, 4, True),
        (4, 4, 4, False),
        (8, 4, 4, True),
        (10, 8, 4, True),
        (10, 10, 4, False),
        (10, -1, 0, True),
        (4, -1, 0, False),
        (12, -1, 4, False),
    ],
)
def test_an_evaluation_is_missing(step, validated, eval_every, missing):
    config = Config(train=TrainConfig(num_steps=10, eval_every=eval_every))
    assert evaluation_is_missing(config, step, {"validated": validated}) is missing


def test_no_steps_at_all_are_done_at_once():
    config = Config(train=TrainConfig(num_steps=0))
    assert not evaluation_is_missing(config, 0, {"validated": -1})


# Metrics of a dispatch


class Recorder:
    def __init__(self):
        self.steps, self.watch = [], Stopwatch()

    def report_step(self, step, row, *, skipped):
        self.steps.append((step, row["loss"], skipped))


class Rows:
    def row_ids(self, step):
        return train_module.np.arange(100 * step, 100 * step + 20)


@dataclasses.dataclass
class FakeRun:
    config: Config
    train_data: Rows = dataclasses.field(default_factory=Rows)


def history():
    return {"skipped_steps": 0, "nonfinite_in_a_row": 0, "recent": {}}


def test_a_dispatch_of_several_steps_is_reported_step_by_step():
    run, reporter = FakeRun(Config(train=TrainConfig(steps_per_dispatch=3, nan_policy="skip"))), Recorder()
    metrics = {"loss": [3.0, math.nan, 2.0], "grad_norm": [1.0, 1.0, 1.0], "finite": [1.0, 0.0, 1.0]}
    kept = history()
    settle_dispatch(run, reporter, kept, 9, metrics, last_saved=6, workdir="runs/x")
    assert [step for step, _, _ in reporter.steps] == [7, 8, 9]
    assert [skipped for _, _, skipped in reporter.steps] == [0, 1, 1]
    recent = {"loss": [3.0, 2.0], "grad_norm": [1.0, 1.0]}
    assert kept == {"skipped_steps": 1, "nonfinite_in_a_row": 0, "recent": recent}


def test_non_finite_steps_end_the_run_at_the_limit():
    run, kept = FakeRun(Config(train=TrainConfig(nan_policy="skip", nan_limit=2))), history()
    row = {"loss": math.inf, "grad_norm": 1.0}
    about = {"last_saved": 5, "workdir": "runs/x"}
    note_nonfinite(run, kept, 7, row, **about)
    with pytest.raises(DivergedError) as caught:
        note_nonfinite(run, kept, 8, row, **about)
    assert str(caught.value).splitlines()[0] == (
        "step 8: loss inf, gradient norm 1.0: 2 in a row; its batch starts with windows "
        "[700, 701, 702, 703, 704, 705, 706, 707] of the training data"
    ), "the batch of the update that made step 8 is batch(7)"
    assert "is of step 5, and the same command goes on from there" in str(caught.value)
    assert str(caught.value).splitlines()[2] == (
        "to look at that step: python -m gptjax.replay --workdir=runs/x --step=8"
    )


def test_an_update_that_is_not_finite_is_named_where_loss_and_gradient_are():
    run, row = FakeRun(Config()), {"loss": 3.0, "grad_norm": 1.0, "update_norm": math.inf}
    with pytest.raises(DivergedError, match=r"^step 7: loss 3.0, gradient norm 1.0, update norm inf: train.nan_policy"):
        note_nonfinite(run, history(), 7, row, last_saved=5, workdir="runs/x")


# What a restart accepts


def test_compare_data(said):
    old = {"fingerprint": "a", "data.seed": 0}
    compare_data(old, dict(old), allowed=False)
    with pytest.raises(ConfigError) as caught:
        compare_data(old, {"fingerprint": "b", "data.seed": 1}, allowed=False)
    assert str(caught.value).splitlines() == [
        "the data changed since the checkpoint: fingerprint was 'a', now 'b'",
        "the data changed since the checkpoint: data.seed was 0, now 1",
        "to go on all the same: --config.data.allow_changed=True",
    ]
    assert said == []
    compare_data(old, {"fingerprint": "b", "data.seed": 0}, allowed=True)
    assert said == ["note: the data changed since the checkpoint: fingerprint was 'a', now 'b'"]


def test_resume_never_refuses_what_is_there_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "make_run", lambda config: pytest.fail("it went on"))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="is not empty; choose another"):
        train(Config(checkpoint=CheckpointConfig(resume="never")), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_host_dispatches_the_next_step_before_it_reads_the_metrics_of_one(lab, tmp_path, monkeypatch):
    """And what a step takes is on the device already."""
    run, events = make_run_on(lab.config()), []
    read = train_module.settle_dispatch

    def train_step(state, tokens):
        events.append("dispatch")
        with jax.transfer_guard("disallow"):
            return run.train_step(state, tokens)

    monkeypatch.setattr(train_module, "settle_dispatch", lambda *a, **k: events.append("read") or read(*a, **k))
    config = lab.config(train={"num_steps": 5, "eval_every": 0})
    replaced = dataclasses.replace(run, config=config, train_step=train_step)
    monkeypatch.setattr(train_module, "make_run", lambda _: replaced)
    assert train(config, str(tmp_path / "run")) == 0
    # Before a save, too, all is read: a state that is not finite is never saved.
    assert config.checkpoint.save_every == 4
    assert events == ["dispatch", *["dispatch", "read"] * 3, "read", "dispatch", "read"]


def test_the_host_finds_its_batches_made(lab, tmp_path, monkeypatch):
    makers, batch = {}, run_module.Run.batch

    def make(run, step, **skipped):
        makers.setdefault(step, []).append(threading.current_thread().name[:8])
        return batch(run, step, **skipped)

    monkeypatch.setattr(run_module.Run, "batch", make)
    config = lab.config(train={"num_steps": 5, "eval_every": 0})
    on_one_device = dataclasses.replace(make_run_on(lab.config()), config=config)
    monkeypatch.setattr(train_module, "make_run", lambda _: on_one_device)
    assert train(config, str(tmp_path / "run")) == 0
    assert {step: makers[step] for step in range(5)} == {step: ["prefetch"] for step in range(5)}


def test_orbax_reads_no_counters_while_a_run_saves(lab, tmp_path, monkeypatch):
    """tensorstore keeps for ever what it makes of them; see gptjax.checkpoint.without_counters."""
    read = []
    monkeypatch.setattr(tensorstore, "experimental_collect_matching_metrics", lambda *of: read.append(of) or [])
    config = lab.config(train={"num_steps": 5, "eval_every": 0})
    on_one_device = dataclasses.replace(make_run_on(lab.config()), config=config)
    monkeypatch.setattr(train_module, "make_run", lambda _: on_one_device)
    assert train(config, str(tmp_path / "run")) == 0
    assert checkpoint_steps(tmp_path / "run") == [4, 5]
    assert read == []
    monkeypatch.setattr(train_module, "without_counters", contextlib.nullcontext)
    assert train(config, str(tmp_path / "again")) == 0
    assert read, "Orbax reads none any more: gptjax.checkpoint.without_counters can go"


def test_garbage_is_collected_again_once_all_is_imported(lab, monkeypatch):
    seen = []
    monkeypatch.setattr(runtime, "start_jax", lambda **where: seen.append(gc.isenabled()))
    monkeypatch.setattr(train_module, "train", lambda *of, **also: seen.append(gc.isenabled()))
    monkeypatch.setattr(runtime, "run_cli", lambda main: main([f"--config={lab.config_file}"]))
    try:
        main.cli()
        assert seen == [False, True]
        assert gc.get_freeze_count() > 0
    finally:
        gc.enable()
        gc.unfreeze()


def test_the_time_to_report_is_not_taken_for_a_wait_for_data(lab, tmp_path, monkeypatch):
    write = metrics_module.RunLog.write
    monkeypatch.setattr(metrics_module.RunLog, "write", lambda *of: time.sleep(0.2) or write(*of))
    config = lab.config(train={"num_steps": 5, "eval_every": 0})
    on_one_device = dataclasses.replace(make_run_on(lab.config()), config=config)
    monkeypatch.setattr(train_module, "make_run", lambda _: on_one_device)
    assert train(config, str(tmp_path / "run")) == 0
    last = [row for row in rows(tmp_path / "run") if "loss" in row][-1]
    assert last["seconds/report"] > 0.7
    assert last["seconds/data_wait"] < 0.5
    assert last["data_wait"] < 0.5
    assert last["step_seconds"] > 0.2, "and yet it is a part of how long steps take"


def test_no_thread_outlives_a_run_that_fails(tmp_path, monkeypatch):
    def fail(config):
        raise ConfigError("as it may")

    monkeypatch.setattr(train_module, "make_run", fail)
    before = {thread.name for thread in threading.enumerate()}
    with pytest.raises(ConfigError, match="as it may"):
        train(Config(), str(tmp_path))
    for thread in threading.enumerate():
        if thread.name == "signals":
            thread.join(5)
    assert {thread.name for thread in threading.enumerate()} <= before


# What it says


def test_describe_roles():
    row = {"parameter": "wte/embedding", "shape": [256, 32], "weight_decay": True, "optimizer": "adamw"}
    (line,) = describe_roles([row | {"sharding": "(None, 'fsdp')"}])
    assert line.split() == ["wte/embedding", "256x32", "adamw", "decay", "(None,", "'fsdp')"]


def test_the_stopwatch_goes_on_from_what_was_spent():
    watch = Stopwatch({"step": 10.0})
    watch.add("step")
    watch.add("evaluation")
    assert 10 < watch.spent["step"] < 11
    assert watch.spent.keys() == {"step", "evaluation"}


@pytest.mark.parametrize(("count", "message"), [(1, "INTERNAL: Gloo failed"), (2, "RESOURCE_EXHAUSTED: out of memory")])
def test_only_the_loss_of_another_process_is_told_as_that(monkeypatch, count, message):
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(train_module.os, "_exit", lambda code: pytest.fail(f"left with {code}"))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message), train_module.ending_without_the_others():
        raise jax.errors.JaxRuntimeError(message)
