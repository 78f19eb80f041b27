"""L1, D2, S2, W2: one trainer per work directory, odd names, no secrets in it, and trackers that fail."""

import errno
import fcntl
import hashlib
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from gptjax import logs
from gptjax.config import Config, LogConfig
from gptjax.convert.hub_download import fetch
from gptjax.convert.hub_listing import File
from gptjax.data.partial import hold
from gptjax.errors import WorkdirError
from gptjax.logs import RunLog
from gptjax.workdir import lock_workdir
from tests.helpers import failing, os_error, raises
from tests.runs import (
    checkpoint_steps,
    kill,
    last_step,
    losses,
    restored_bytes,
    rows,
    said,
    validations,
    wait_for,
    wait_until_stopped,
)

pytestmark = pytest.mark.faults


def test_l1_second_trainer_is_refused_while_the_first_lives(lab, reference, tmp_path):
    workdir = tmp_path / "run"
    with lab.start(workdir) as first:
        wait_for(lambda: last_step(workdir) >= 2, first)
        first.send_signal(signal.SIGSTOP)  # so that it is still running when the second looks
        stopped_at, begin = last_step(workdir), time.monotonic()
        cpu = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        line = lab.refusal(workdir, expect=73)
        cpu = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - cpu
        assert f"--workdir={workdir}: " in line
        assert f" process {first.pid} on {os.uname().nodename};" in line
        assert cpu < 5, "seconds of work before it says so; time itself depends on who else is at work here"
        assert time.monotonic() - begin < 60
        first.send_signal(signal.SIGCONT)
        wait_for(lambda: last_step(workdir) >= min(stopped_at + 2, 16), first)
        kill(first)
    lab.train(workdir)
    assert losses(workdir) == losses(reference)
    assert validations(workdir) == validations(reference)


def in_use(workdir):
    """Asserts that the block finds the work directory in use by this process."""
    holder = f" process {os.getpid()} on "
    return raises(WorkdirError, "--workdir", value=str(workdir), remedy="choose another", match=holder)


def test_l1_lock_is_released_on_exit(tmp_path):
    with lock_workdir(str(tmp_path)), in_use(tmp_path):
        lock_workdir(str(tmp_path)).__enter__()
    with lock_workdir(str(tmp_path)):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EIO])
def test_l1_file_system_without_locks_gives_only_a_warning(number, said, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", failing(os_error(number)))
    with lock_workdir(str(tmp_path)):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    [line] = said
    assert line.startswith(f"--workdir={tmp_path}: ")
    assert f"({os.strerror(number)})" in line


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_l1_preparation_without_locks_gives_only_a_warning(number, said, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", failing(os_error(number)))
    with hold(str(tmp_path), "out", pytest.fail):
        pass
    [line] = said
    assert line.startswith(f"{tmp_path}/lock: its file system has no locks ({os.strerror(number)}): ")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_l1_download_without_locks_gives_only_a_warning(number, said, tmp_path, monkeypatch):
    content = b"weights"
    etag, blob, path = hashlib.sha256(content).hexdigest(), tmp_path / "blobs" / "one", tmp_path / "snapshot" / "m.bin"
    file = File(name="model.bin", size=len(content), etag=etag, blob=str(blob), path=str(path))
    blob.parent.mkdir()
    path.parent.mkdir()
    pathlib.Path(file.partial).write_bytes(content)  # received already, so that no server is needed
    monkeypatch.setattr(fcntl, "flock", failing(os_error(number)))
    fetch(file, "owner/name", "0" * 40, token="")
    assert path.read_bytes() == content
    [line] = said
    assert line.startswith(f"{file.partial}: its file system has no locks ({os.strerror(number)}): ")


def test_d4_removed_lock_is_retaken_unless_another_holds_it(tmp_path):
    workdir = tmp_path / "run"
    with lock_workdir(str(workdir)) as lock:
        assert not lock.renew()
        (workdir / ".lock").unlink()
        assert lock.renew()
        with in_use(workdir), lock_workdir(str(workdir)):
            pass
        shutil.rmtree(workdir)
        assert lock.renew()
        assert (workdir / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        (workdir / ".lock").unlink()
        with lock_workdir(str(workdir)), in_use(workdir):
            lock.renew()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_d4_failed_lock_renewal_is_reported_and_retried(number, said, monkeypatch, tmp_path):
    with lock_workdir(str(tmp_path)) as lock:
        (tmp_path / ".lock").unlink()
        with monkeypatch.context() as patch:
            patch.setattr("gptjax.workdir.open_file", failing(os_error(number)))
            assert lock.renew()
        assert lock.renew()
        assert not lock.renew()
    [line] = said
    assert line.startswith(f"--workdir={tmp_path}: ")
    assert f": {os.strerror(number)}; " in line
    assert " lock " in line


def test_d4_stale_lock_is_renewed(tmp_path):
    """Of a network disk where another host removed it and made it again: the path is there, the open file is not."""
    with lock_workdir(str(tmp_path)) as lock:
        lock._file.close()
        lock._file = types.SimpleNamespace(fileno=lambda: 10**6, close=lambda: None)
        assert lock.renew()
        assert not lock.renew()


def test_d4_removed_work_directory_is_recreated(lab, reference, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    with lab.start(workdir, GPTJAX_FAULT="save:1:stop") as process:
        wait_until_stopped(process)
        shutil.rmtree(workdir)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=120) == 0, said(workdir)
    assert said(workdir).count("removed during the run") == 1
    for name in ("config.json", "tokenizer.json", "parameters.json", ".lock"):
        assert (workdir / name).read_bytes()[:1] == (reference / name).read_bytes()[:1], name
    assert list(losses(workdir)) == [step for step in losses(reference) if step > 8], "told at the save of step 8"
    assert restored_bytes(workdir, tiny_run.abstract_state) == restored_bytes(reference, tiny_run.abstract_state)


def test_d4_files_removed_without_the_lock_are_written_again(train_here, said, reference, monkeypatch, tmp_path):
    """As by `rm -rf RUN/*`."""
    workdir, before, saves = tmp_path / "run", {}, []

    def remove_once(point):
        if point != "save":
            return
        saves.append(point)
        for path in workdir.iterdir() if len(saves) == 1 else ():
            if path.is_file() and path.name != ".lock":
                before[path.name] = path.read_bytes()
                path.unlink()

    monkeypatch.setattr("gptjax.loop.fault_point", remove_once)
    assert train_here(workdir) == 0
    names = ["config.json", "parameters.json", "tokenizer.json"]
    assert [(workdir / name).read_bytes() for name in names] == [before[name] for name in names]
    assert "run_id" in (workdir / "config.json").read_text()
    assert list(losses(workdir)) == [step for step in losses(reference) if step > 8], "noticed at the save of step 8"
    [line] = [line for line in said if "removed during the run" in line]
    assert line == f"{workdir}: removed during the run: {', '.join(names)}; re-creating the files"


def test_d2_file_in_place_of_the_workdir_is_refused(lab, tmp_path):
    workdir = tmp_path / "run"
    workdir.write_text("not a directory")
    assert lab.refusal(workdir, expect=73).startswith(f"--workdir={workdir}: ")
    assert workdir.read_text() == "not a directory"


def test_d2_s2_unicode_workdir_works_and_holds_no_secrets(lab, reference, tmp_path):
    workdir = tmp_path / "mein Lauf № 1 ✓ 走る"
    secrets = {"HF_TOKEN": "hf_SeCrEtHuggingFace", "WANDB_API_KEY": "5ecre7weightsandbiases"}
    first = lab.train(workdir, "train.num_steps=4", "log.wandb_project=x", **secrets)
    second = lab.train(workdir, "train.num_steps=8", "train.sample_every=8", **secrets)
    assert checkpoint_steps(workdir) == [4, 8]
    assert losses(workdir) == {step: loss for step, loss in losses(reference).items() if step <= 8}
    assert "log.wandb_project='x': wandb is off: wandb is not installed; pip install 'gptjax[wandb]'" in first.stdout
    texts = [first.stdout + first.stderr + second.stdout + second.stderr]
    texts += [path.read_bytes().decode(errors="replace") for path in workdir.rglob("*") if path.is_file()]
    assert len(texts) > 20
    for secret in secrets.values():
        assert not any(secret in text for text in texts)


def test_s2_a_secret_in_a_setting_is_refused(lab, tmp_path):
    secret = "hf_SeCrEtHuggingFace"
    line = lab.refusal(tmp_path / "run", f"log.wandb_project={secret}", expect=2, HF_TOKEN=secret)
    assert line.startswith("log.wandb_project: ")
    assert " HF_TOKEN" in line
    assert secret not in line
    assert not (tmp_path / "run").exists()


LEAKS = """
import logging, sys
from gptjax import cli, errors

def main(arguments):
    logging.getLogger("gptjax").warning("wandb is off: %s", RuntimeError("key 5ecre7weightsandbiases was refused"))
    if arguments[0] == "user":
        raise errors.DataError("https://x/?token=hf_SeCrEtHuggingFace: 401")
    raise KeyError("hf_SeCrEtHuggingFace")

cli.run_cli(main)
"""


@pytest.mark.parametrize(("kind", "code"), [("user", 65), ("bug", 1)])
def test_s2_messages_of_other_libraries_are_redacted(kind, code, lab, tmp_path):
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
def test_w2_blocking_tracker_does_not_delay_the_run(where, said, monkeypatch, tmp_path):
    tracker, release = Tracker(""), threading.Event()
    monkeypatch.setattr(tracker, "call", lambda name: release.wait() if name == where else tracker)
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    monkeypatch.setattr(logs, "WAITING_ROWS", 10)
    monkeypatch.setattr(logs, "LAST_ROWS_SECONDS", 0.2)
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


def test_w2_failing_tracker_does_not_change_the_losses(train_here, said, monkeypatch, tmp_path):
    tracker = Tracker("log")
    plain, tracked = tmp_path / "plain", tmp_path / "tracked"
    train_here(plain, train={"num_steps": 4})
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    assert train_here(tracked, train={"num_steps": 4}, log={"wandb_project": "x"}) == 0
    assert len(losses(plain)) == 4
    assert losses(tracked) == losses(plain)
    assert sum("wandb is off" in line for line in said) == 1
    assert tracker.calls == ["init", "log"]
