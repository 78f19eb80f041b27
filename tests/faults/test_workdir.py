"""L1, D2, S2, W2: one trainer per work directory, odd names, no secrets in it, and trackers that fail."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from gptjax import metrics
from gptjax.config import Config, LogConfig
from gptjax.errors import WorkdirError
from gptjax.metrics import RunLog
from gptjax.runtime import lock_workdir
from tests.runs import checkpoint_steps, kill, last_step, losses, rows, validations, wait_for

pytestmark = pytest.mark.faults


def test_l1_a_second_trainer_is_refused_and_a_dead_ones_lock_taken_over(lab, twin, tmp_path):
    workdir = tmp_path / "run"
    with lab.start(workdir) as first:
        wait_for(lambda: last_step(workdir) >= 2, first)
        first.send_signal(signal.SIGSTOP)  # so that it is still running when the second looks
        stopped_at, begin = last_step(workdir), time.monotonic()
        cpu = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        refused = lab.train(workdir, expect=73)
        cpu = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - cpu
        assert f"in use by process {first.pid} on {os.uname().nodename}" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
        assert cpu < 5, "seconds of work before it says so; time itself depends on who else is at work here"
        assert time.monotonic() - begin < 60
        first.send_signal(signal.SIGCONT)
        wait_for(lambda: last_step(workdir) >= min(stopped_at + 2, 16), first)
        kill(first)
    lab.train(workdir)
    assert losses(workdir) == losses(twin)
    assert validations(workdir) == validations(twin)


def test_l1_the_lock_is_free_again_when_it_is_left(tmp_path):
    with lock_workdir(str(tmp_path)), pytest.raises(WorkdirError, match=f"in use by process {os.getpid()} on "):
        lock_workdir(str(tmp_path)).__enter__()
    with lock_workdir(str(tmp_path)):
        pass


def test_d2_a_file_in_the_way(lab, tmp_path):
    workdir = tmp_path / "run"
    workdir.write_text("not a directory")
    refused = lab.train(workdir, expect=73)
    (line,) = refused.stderr.splitlines()
    assert line.startswith(f"error: --workdir={workdir}: cannot be written: ")
    assert workdir.read_text() == "not a directory"


def test_d2_s2_a_name_with_spaces_and_unicode_and_no_secrets(lab, twin, tmp_path):
    workdir = tmp_path / "mein Lauf № 1 ✓ 走る"
    secrets = {"HF_TOKEN": "hf_SeCrEtHuggingFace", "WANDB_API_KEY": "5ecre7weightsandbiases"}
    first = lab.train(workdir, "train.num_steps=4", "log.wandb_project=x", **secrets)
    second = lab.train(workdir, "train.num_steps=8", "train.sample_every=8", **secrets)
    assert checkpoint_steps(workdir) == [4, 8]
    assert losses(workdir) == {step: loss for step, loss in losses(twin).items() if step <= 8}
    assert "log.wandb_project='x': wandb is off: " in first.stdout
    texts = [first.stdout + first.stderr + second.stdout + second.stderr]
    texts += [path.read_bytes().decode(errors="replace") for path in workdir.rglob("*") if path.is_file()]
    assert len(texts) > 20
    for secret in secrets.values():
        assert not any(secret in text for text in texts)


def test_s2_a_secret_in_a_setting_is_refused(lab, tmp_path):
    secret = "hf_SeCrEtHuggingFace"
    refused = lab.train(tmp_path / "run", f"log.wandb_project={secret}", expect=2, HF_TOKEN=secret)
    assert refused.stderr == (
        "error: log.wandb_project: contains the value of HF_TOKEN, which would stand in every checkpoint\n"
    )
    assert not (tmp_path / "run").exists()


LEAKS = """
import logging, sys
from gptjax import errors, runtime

def main(arguments):
    logging.getLogger("gptjax").warning("wandb is off: %s", RuntimeError("key 5ecre7weightsandbiases was refused"))
    if arguments[0] == "user":
        raise errors.DataError("https://x/?token=hf_SeCrEtHuggingFace: 401")
    raise KeyError("hf_SeCrEtHuggingFace")

runtime.run_cli(main)
"""


@pytest.mark.parametrize(("kind", "code"), [("user", 65), ("bug", 1)])
def test_s2_what_other_libraries_say_is_told_without_the_secrets(kind, code, lab, tmp_path):
    secrets = {"HF_TOKEN": "hf_SeCrEtHuggingFace", "WANDB_API_KEY": "5ecre7weightsandbiases"}
    done = subprocess.run(
        [sys.executable, "-c", LEAKS, kind], env=lab.environment(**secrets), capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert done.stdout == "wandb is off: key [WANDB_API_KEY] was refused\n"
    assert "[HF_TOKEN]" in done.stderr
    assert not any(secret in done.stdout + done.stderr for secret in secrets.values())


class Tracker(types.ModuleType):
    """Stands for wandb, and fails where it is told to."""

    def __init__(self, fails_at: str) -> None:
        super().__init__("wandb")
        self.fails_at, self.calls = fails_at, []

    def call(self, name: str) -> "Tracker":
        self.calls.append(name)
        if name == self.fails_at:
            raise RuntimeError("the service\nis down")
        return self

    def init(self, **_: object) -> "Tracker":
        return self.call("init")

    def log(self, *_: object, **__: object) -> None:
        self.call("log")

    def finish(self) -> None:
        self.call("finish")


@pytest.mark.parametrize("fails_at", ["init", "log", "finish", ""])
def test_w2_a_failing_tracker_warns_once(fails_at, said, monkeypatch, tmp_path):
    tracker = Tracker(fails_at)
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    config = Config(log=LogConfig(tensorboard=False, wandb_project="x"))
    log = RunLog(str(tmp_path), config, resumed_from=0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1.0})
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    assert len(said) == (fails_at != "")
    assert all("wandb is off" in line for line in said)
    expected = {"init": ["init"], "log": ["init", "log"]}.get(fails_at, ["init", "log", "log", "log", "finish"])
    assert tracker.calls == expected


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_w2_a_tracker_that_blocks_holds_nothing_up(where, said, monkeypatch, tmp_path):
    tracker, release = Tracker(""), threading.Event()
    monkeypatch.setattr(tracker, "call", lambda name: release.wait() if name == where else tracker)
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    monkeypatch.setattr(metrics, "WAITING_ROWS", 10)
    monkeypatch.setattr(metrics, "LAST_ROWS_SECONDS", 0.2)
    log = RunLog(str(tmp_path), Config(log=LogConfig(tensorboard=False, wandb_project="x")), resumed_from=0)
    begin = time.monotonic()
    for step in range(1, 31):
        log.write({"step": step, "loss": 1.0})
    log.close()
    assert time.monotonic() - begin < 10
    assert len(rows(tmp_path)) == 30
    (line,) = said
    assert "wandb is off: it " in line
    release.set()


def test_w2_training_is_unaffected(train_here, said, monkeypatch, tmp_path):
    tracker = Tracker("log")
    plain, tracked = tmp_path / "plain", tmp_path / "tracked"
    train_here(plain, train={"num_steps": 4})
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    assert train_here(tracked, train={"num_steps": 4}, log={"wandb_project": "x"}) == 0
    assert len(losses(plain)) == 4
    assert losses(tracked) == losses(plain)
    assert sum("wandb is off" in line for line in said) == 1
    assert tracker.calls == ["init", "log"]
