"""The decisions of the loop, one by one; that they add up is tested end to end and in tests/faults."""

import contextlib
import dataclasses
import gc
import math
import re
import shutil
import threading
import time

import jax
import numpy as np
import pytest
import tensorstore

from gptjax import distributed, loop, main
from gptjax import setup as run_setup
from gptjax import train as train_module
from gptjax.compute import ResolvedCompute
from gptjax.config import Config, DataConfig, GPTConfig, MeshConfig, TrainConfig
from gptjax.errors import ConfigError, DivergedError
from gptjax.goodput import Stopwatch
from gptjax.history import History
from gptjax.logs import RunLog
from gptjax.loop import evaluation_due, is_due, process_metrics
from gptjax.resume import compare_data
from gptjax.setup import choose_num_microbatches, describe_roles, memory_budget
from gptjax.train import train
from tests.helpers import failing, raises
from tests.runs import checkpoint_steps, rows

MODEL = GPTConfig(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=32)


# How many micro-batches


def num_microbatches(*, batch, wanted=0, parts=1, fits=None, monkeypatch=None):
    config = Config(model=MODEL, data=DataConfig(global_batch_size=batch), train=TrainConfig(micro_batch_size=wanted))
    mesh = run_setup.make_mesh(MeshConfig(), run_setup.jax.devices()[:parts])
    compute = ResolvedCompute()
    if fits is not None:
        sequence = run_setup.activation_bytes_per_sequence(MODEL, compute, 0)
        monkeypatch.setattr(run_setup, "memory_budget", lambda device: 5 / 3 * 1000 + (fits + 0.5) * sequence)
    return choose_num_microbatches(config, compute, mesh, state_bytes=1000)


def test_configured_micro_batch_size_is_used():
    assert num_microbatches(batch=8, wanted=8) == 1
    assert num_microbatches(batch=8, wanted=2) == 4
    assert num_microbatches(batch=48, wanted=3, parts=8) == 2


@pytest.mark.parametrize(
    ("batch", "parts", "fits", "expected"),
    [(8, 1, 100, 1), (8, 1, 8, 1), (8, 1, 7, 2), (12, 1, 5, 3), (7, 1, 6, 7), (8, 1, 0, 8), (64, 8, 3, 4)],
)
def test_default_micro_batch_is_the_largest_divisor_that_fits(batch, parts, fits, expected, monkeypatch):
    assert num_microbatches(batch=batch, parts=parts, fits=fits, monkeypatch=monkeypatch) == expected


class Device:
    def __init__(self, platform, stats=None):
        self.platform, self.stats = platform, stats

    def memory_stats(self):
        return self.stats


def test_memory_budget_follows_the_device_limit():
    assert memory_budget(Device("tpu", {"bytes_limit": 1000})) == 800
    assert memory_budget(Device("gpu", {})) == math.inf
    assert memory_budget(Device("gpu")) == math.inf
    assert 0 < memory_budget(Device("cpu")) < math.inf


# When what is due


def test_is_due_at_multiples_of_the_period():
    assert [step for step in range(1, 10) if is_due(step, 3)] == [3, 6, 9]
    assert not any(is_due(step, 0) for step in range(1, 10))


@pytest.mark.parametrize(
    ("step", "validated", "eval_every", "missing"),
    [
        (0, -1, 4, False), (3, -1, 4, False), (4, -1, 4, True), (4, 4, 4, False), (8, 4, 4, True), (10, 8, 4, True),
        (10, 10, 4, False), (10, -1, 0, True), (4, -1, 0, False), (12, -1, 4, False),
    ],
)  # fmt: skip
def test_evaluation_is_due_unless_that_step_was_validated(step, validated, eval_every, missing):
    config = Config(train=TrainConfig(num_steps=10, eval_every=eval_every))
    assert evaluation_due(config, step, History(validated=validated)) is missing


# Metrics of a dispatch


class Recorder:
    def __init__(self):
        self.steps, self.means, self.watch = [], [], Stopwatch()

    def report_step(self, step, row, *, skipped):
        self.steps.append((step, row["loss"], skipped))
        self.means.append(row["loss_mean"])


class Rows:
    def window_ids(self, step):
        return np.arange(100 * step, 100 * step + 20)

    def epochs(self, samples):
        return {}


@dataclasses.dataclass
class FakeRun:
    config: Config
    train_data: Rows = dataclasses.field(default_factory=Rows)


def test_a_dispatch_of_several_steps_is_reported_step_by_step():
    train = TrainConfig(nan_policy="skip", log_every=8)
    run, reporter = FakeRun(Config(train=train)), Recorder()
    metrics = {"loss": [3.0, math.nan, 2.0], "grad_norm": [1.0, 1.0, 1.0], "finite": [1.0, 0.0, 1.0]}
    metrics = {name: [*values, 0.0] for name, values in metrics.items()}  # it might have had a fourth step
    after = process_metrics(run, reporter, History(), start=6, end=9, metrics=metrics, last_saved=6, workdir="runs/x")
    assert [step for step, _, _ in reporter.steps] == [7, 8, 9]
    assert [skipped for _, _, skipped in reporter.steps] == [0, 1, 1]
    recent = {"loss": (3.0, 2.0), "grad_norm": (1.0, 1.0)}
    assert after == History(skipped_steps=1, recent=recent, loss_sum=2.0, loss_count=1), "a row was logged at step 8"
    assert reporter.means == [3.0, 3.0, 2.0], "an update that was skipped has no part in the mean"


def test_mean_loss_of_an_interval_without_updates_is_nan():
    run, reporter = FakeRun(Config(train=TrainConfig(nan_policy="skip"))), Recorder()
    metrics = {"loss": [math.nan], "grad_norm": [1.0], "finite": [0.0]}
    process_metrics(run, reporter, History(), start=8, end=9, metrics=metrics, last_saved=6, workdir="runs/x")
    assert math.isnan(reporter.means[0])


@pytest.mark.parametrize("log_every", [3, 100])
def test_resumed_run_logs_the_same_mean_losses(train_here, tmp_path, log_every):
    """Also when the interval of a row began before the checkpoint, here of step 4."""
    every = {"num_steps": 8, "eval_every": 0, "log_every": log_every}
    assert train_here(tmp_path / "run", train=every | {"log_every": 1}) == 0
    single = {row["step"]: row["loss"] for row in rows(tmp_path / "run") if "loss" in row}
    assert train_here(tmp_path / "whole", train=every) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/8")
    assert train_here(tmp_path / "resumed", train=every) == 0
    whole, resumed = ([row for row in rows(tmp_path / name) if "loss" in row] for name in ("whole", "resumed"))
    assert [row["loss_mean"] for row in resumed] == [row["loss_mean"] for row in whole]
    first = 1
    for row in whole:
        window = [single[step] for step in range(first, row["step"] + 1)]
        assert row["loss_mean"] == pytest.approx(math.fsum(window) / len(window), rel=1e-12)
        first = row["step"] + 1


def test_divergence_error_names_step_and_resume_command():
    run = FakeRun(Config(train=TrainConfig(nan_policy="skip", max_consecutive_nonfinite=2)))
    metrics = {"loss": [math.inf], "grad_norm": [1.0], "finite": [0.0]}
    about = {"last_saved": 5, "workdir": "runs/x"}
    after = process_metrics(run, Recorder(), History(), start=6, end=7, metrics=metrics, **about)
    with raises(DivergedError, "step 8", remedy="train.max_consecutive_nonfinite") as caught:
        process_metrics(run, Recorder(), after, start=7, end=8, metrics=metrics, **about)
    cause, restart, inspect = map(str, caught.value.errors)
    assert re.search(r"inf, .* 1: 2 ", cause)
    assert str(list(range(700, 708))) in cause, "the batch of the update that made step 8 is batch(7)"
    assert restart.endswith("step 5")
    assert inspect.endswith("python -m gptjax.replay --workdir=runs/x --step=8")


# What a restart accepts


def test_compare_data_refuses_changes_unless_allowed(said):
    old = {"fingerprint": "a", "data.seed": 0}
    compare_data(old, dict(old), allowed=False)
    expected = "fingerprint a, this is data with fingerprint b\n.*seed was 0, now 1"
    with raises(ConfigError, remedy="--config.data.allow_changed=True", match=expected):
        compare_data(old, {"fingerprint": "b", "data.seed": 1}, allowed=False)
    assert said == []
    compare_data(old, {"fingerprint": "b", "data.seed": 0}, allowed=True)
    (line,) = said
    assert line.endswith("it was trained on data with fingerprint a, this is data with fingerprint b")
    strange = {"fingerprint": "a", "directory": 3, "tokens": "many"}
    compare_data(strange, {"fingerprint": "b", "data.seed": 0}, allowed=True)
    named = [{"fingerprint": name * 64, "directory": f"/data/{name}", "tokens": 1000} for name in "ab"]
    compare_data(named[0], named[0] | {"directory": "/moved", "tokens": 2}, allowed=False)
    told = r"on /data/a \(1,000 tokens, fingerprint a{8}\), this is /data/b \(1,000 tokens, fing"
    with raises(ConfigError, match=told):
        compare_data(*named, allowed=False)


FIVE = {"num_steps": 5, "eval_every": 0}


def test_next_step_is_dispatched_before_metrics_are_read(train_here, tiny_run, tmp_path, monkeypatch):
    """And what a step takes is on the device already."""
    events, read = [], loop.process_metrics

    def train_step(state, tokens):
        events.append("dispatch")
        with jax.transfer_guard("disallow"):
            return tiny_run.train_step(state, tokens)

    monkeypatch.setattr(loop, "process_metrics", lambda *a, **k: events.append("read") or read(*a, **k))
    assert train_here(tmp_path / "run", train=FIVE, parts={"train_step": train_step}) == 0
    # Before a save, too, all is read: a state that is not finite is never saved.
    assert tiny_run.config.checkpoint.save_every == 4
    assert events == ["dispatch", *["dispatch", "read"] * 3, "read", "dispatch", "read"]


def test_batches_are_made_by_prefetch_threads(train_here, tmp_path, monkeypatch):
    makers, batch = {}, run_setup.Run.batch

    def make(run, step, **how):
        makers.setdefault(step, []).append(threading.current_thread().name[:8])
        return batch(run, step, **how)

    monkeypatch.setattr(run_setup.Run, "batch", make)
    assert train_here(tmp_path / "run", train=FIVE) == 0
    assert {step: makers[step] for step in range(5)} == {step: ["prefetch"] for step in range(5)}


def test_orbax_reads_no_counters_while_a_run_saves(train_here, tmp_path, monkeypatch):
    """tensorstore keeps for ever what it makes of them; see gptjax.orbax_context.suppress_tensorstore_metrics."""
    read = []
    monkeypatch.setattr(tensorstore, "experimental_collect_matching_metrics", lambda *of: read.append(of) or [])
    assert train_here(tmp_path / "run", train=FIVE) == 0
    assert checkpoint_steps(tmp_path / "run") == [4, 5]
    assert read == []
    monkeypatch.setattr(train_module, "suppress_tensorstore_metrics", contextlib.nullcontext)
    assert train_here(tmp_path / "again", train=FIVE) == 0
    assert read, "Orbax reads none any more: gptjax.orbax_context.suppress_tensorstore_metrics can go"


def test_garbage_collection_is_disabled_only_during_imports(lab, monkeypatch):
    seen = []
    monkeypatch.setattr(distributed, "start_jax", lambda **where: seen.append(gc.isenabled()))
    monkeypatch.setattr(train_module, "train", lambda *of, **also: seen.append(gc.isenabled()))
    monkeypatch.setattr(main, "run_cli", lambda main: main([f"--config={lab.config_file}"]))
    try:
        main.cli()
        assert seen == [False, True]
        assert gc.get_freeze_count() > 0
    finally:
        gc.enable()
        gc.unfreeze()


def test_report_time_is_not_counted_as_data_wait(train_here, tmp_path, monkeypatch):
    write = RunLog.write
    monkeypatch.setattr(RunLog, "write", lambda *of: time.sleep(0.2) or write(*of))
    assert train_here(tmp_path / "run", train=FIVE) == 0
    last = [row for row in rows(tmp_path / "run") if "loss" in row][-1]
    assert last["seconds/report"] > 0.7
    assert last["seconds/data_wait"] < 0.5
    assert last["data_wait"] < 0.5
    assert last["step_seconds"] > 0.2, "and yet it is a part of how long steps take"


def test_no_thread_outlives_a_run_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "make_run", failing(ConfigError("as it may")))
    before = {thread.name for thread in threading.enumerate()}
    with raises(ConfigError, match="as it may"):
        train(Config(), str(tmp_path))
    for thread in threading.enumerate():
        if thread.name == "signals":
            thread.join(5)
    assert {thread.name for thread in threading.enumerate()} <= before


# What it says


def test_describe_roles_prints_one_line_per_parameter():
    row = {"parameter": "wte/embedding", "shape": [256, 32], "weight_decay": True, "optimizer": "adamw"}
    (line,) = describe_roles([row | {"sharding": "(None, 'fsdp')"}])
    assert line.split() == ["wte/embedding", "256x32", "adamw", "decay", "(None,", "'fsdp')"]


def test_stopwatch_continues_from_spent_seconds():
    watch = Stopwatch({"step": 10.0})
    watch.lap("step")
    watch.lap("evaluation")
    assert 10 < watch.spent["step"] < 11
    assert watch.spent.keys() == {"step", "evaluation"}


@pytest.mark.parametrize(("count", "message"), [(1, "INTERNAL: Gloo failed"), (2, "RESOURCE_EXHAUSTED: out of memory")])
def test_other_jax_errors_are_not_reported_as_peer_failure(monkeypatch, count, message):
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(train_module.os, "_exit", lambda code: pytest.fail(f"left with {code}"))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message), train_module.exit_on_peer_failure():
        raise jax.errors.JaxRuntimeError(message)
