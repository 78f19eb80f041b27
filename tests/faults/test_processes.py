"""T3, P1, P3, O1: real processes of one run, joined by jax.distributed on loopback, and what if one of them is gone."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from etils import epath

from gptjax import errors
from gptjax import train as train_module
from gptjax.data.prepare import prepare
from gptjax.data.tokenizer import load_tokenizer
from gptjax.identity import Identity, read_identity
from gptjax.record import read_record
from tests import runs
from tests.helpers import sweep
from tests.processes import SECONDS, Group, group, one_micro_batch_each, train

pytestmark = pytest.mark.faults
HOST = socket.gethostname()


def assert_near(workdir, reference, steps):
    """Asserts that the losses of these steps are there once each, and near the reference run's."""
    found, expected = runs.losses(workdir), runs.losses(reference)
    assert list(found) == list(steps)
    for step in steps:
        assert float.fromhex(found[step]) == pytest.approx(float.fromhex(expected[step]), rel=1e-6), step


@pytest.fixture
def two(lab):
    """The work directory of a finished run of two processes that nothing has disturbed."""
    once = {"JAX_SHARE_BINARY_BETWEEN_HOSTS": "true"}  # compiled once
    return runs.make_once(lab, "two", lambda workdir: train(lab, workdir, 2, "checkpoint.keep=8", **once))


def test_o1_two_processes_match_one_and_only_first_writes(reference, two):
    first, second = (two.with_name(f"two-{number}.out").read_text() for number in range(2))
    assert_near(two, reference, range(1, 17))
    assert "2 processes" in first
    assert "step 16/16" in first
    assert [line for line in second.splitlines() if "[Gloo]" not in line] == [second.splitlines()[0]]
    assert "waiting for the other processes" in second.splitlines()[0]
    assert len(list((two / "tensorboard").glob("events*"))) == 1
    identities = [read_identity(str(directory)) for directory in (two, two / "process-1")]
    assert identities == [Identity(read_record(epath.Path(two / "checkpoints" / "16"), 16).history["run_id"])] * 2


def test_o1_run_resumes_with_more_or_fewer_processes(lab, reference, two, tmp_path):
    fewer = runs.copy_until(two, tmp_path / "fewer", 8)
    assert "resumed from step 8" in lab.train(fewer).stdout
    assert_near(fewer, reference, range(1, 17))
    more = runs.copy_until(reference, tmp_path / "more", 12)
    [first, _] = train(lab, more, 2)
    assert "resumed from step 12" in first
    assert_near(more, reference, range(1, 17))


@pytest.mark.parametrize("victim", [sweep(0), 1])
def test_t3_sigterm_to_one_process_saves_one_step_for_all(lab, two, tmp_path, victim):
    """The victim is stopped in a step, so that the signal finds it there, and the other in the next collective."""
    workdir = tmp_path / "run"
    with Group(lab, workdir, 2) as made:
        for number in range(2):
            fault = {"GPTJAX_FAULT": "step:6:stop"} if number == victim else {}
            made.start(number, one_micro_batch_each(2), "checkpoint.save_every=1000", **fault)
        runs.wait_until_stopped(made.processes[victim])
        made.processes[victim].send_signal(signal.SIGTERM)
        made.processes[victim].send_signal(signal.SIGCONT)
        assert made.wait() == [runs.PREEMPTED] * 2, made.said(0) + made.said(1)
        assert "SIGTERM: saving a checkpoint after this step" in made.said(victim)
        said = [re.search(r"preempted at step (\d+)", made.said(number)) for number in range(2)]
    [step] = runs.checkpoint_steps(workdir)
    assert 6 <= step <= 8
    assert [match and int(match[1]) for match in said] == [step, step]
    assert runs.last_step(workdir) == step
    if victim == 1:  # they have saved the same whoever was asked
        train(lab, workdir, 2)
        assert runs.losses(workdir) == runs.losses(two)
        assert runs.validations(workdir) == runs.validations(two)


def test_t3_sigterm_during_evaluation_saves_one_checkpoint(lab, tmp_path):
    workdir = tmp_path / "run"
    overrides = ("train.eval_every=4", "train.eval_batches=0", "train.num_steps=100000", "checkpoint.save_every=1000")
    with group(lab, workdir, 2, *overrides) as made:
        runs.wait_for(lambda: runs.last_step(workdir) >= 4, made.processes[0])
        made.processes[1].send_signal(signal.SIGTERM)
        assert made.wait() == [runs.PREEMPTED] * 2, made.said(0) + made.said(1)
    assert len(runs.checkpoint_steps(workdir)) == 1


@pytest.mark.parametrize("victim", [0, sweep(1)])
def test_p1_killed_process_is_named_and_restart_is_bit_equal(lab, two, tmp_path, victim):
    workdir = tmp_path / "run"
    with group(lab, workdir, 2) as made:
        runs.wait_for(lambda: runs.last_step(workdir) >= 6, made.processes[0])
        made.processes[victim].kill()
        begin = time.monotonic()
        code = made.processes[1 - victim].wait(timeout=SECONDS)
        assert time.monotonic() - begin < SECONDS
        said = made.said(1 - victim)
    assert code == errors.UNAVAILABLE, said
    assert_names(victim, said)
    if victim == 0:
        train(lab, workdir, 2)
        assert runs.losses(workdir) == runs.losses(two)


def assert_names(victim, said):
    """Asserts that one line names the process that was killed, beside what JAX's own C++ may print."""
    line = f"error: process {victim} on host {HOST} is lost; restart the command on every host"
    assert [told for told in said.splitlines() if told.startswith("error:")] == [line], said
    assert "save failed" not in said, said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("victim", "point"),
    [(0, "save:1"), sweep(1, "save:2"), sweep(1, "evaluation:1"), sweep(0, "restore:1"), (1, "restore:1")],
)
def test_p1_survivor_names_a_process_killed_at_any_point(lab, tmp_path, victim, point):
    with Group(lab, tmp_path / "run", 2) as made:
        for number in range(2):
            fault = {"GPTJAX_FAULT": f"{point}:kill"} if number == victim else {}
            made.start(number, one_micro_batch_each(2), "train.eval_every=6", **fault)
        codes = made.wait()
    assert codes[victim] == -signal.SIGKILL, made.said(victim)
    assert codes[1 - victim] == errors.UNAVAILABLE, made.said(1 - victim)
    assert_names(victim, made.said(1 - victim))


def test_p5_processes_agree_on_checkpoints_and_restored_step(train_here, reference, tmp_path, monkeypatch):
    """Else two hosts with other disks, or with old lists of one, would train from two states."""
    workdir, events = runs.copy_until(reference, tmp_path / "run", 12), []
    steps, start_state = runs.checkpoint_steps(workdir), train_module.start_state

    def record_start(*arguments):
        events.append("restored")
        return start_state(*arguments)

    monkeypatch.setattr(train_module, "check_agreement", lambda what, values: events.append((what, values)))
    monkeypatch.setattr(train_module, "start_state", record_start)
    assert train_here(workdir) == 0
    at = events.index("restored")
    identity = read_identity(str(workdir)).to_json()
    assert events[at - 1] == ("checkpoints", {"steps": steps} | identity)
    assert events[at + 1] == ("restore", {"step": steps[-1]})


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (0, "waiting for process 1 to come to 127.0.0.1:"),
        (1, "waiting for process 0, which does not answer at 127.0.0.1:"),
    ],
)
def test_p3_process_alone_names_the_missing_one_and_exits(lab, tmp_path, number, message):
    with Group(lab, tmp_path / "run", 2) as made:
        made.start(number, join_seconds=4)
        assert made.wait() == [errors.UNAVAILABLE]
    assert f"process {number} of 2 on host" in made.said(number)
    assert f"error: process {number} of 2: {message}" in made.said(number)


@pytest.mark.parametrize("victim", [sweep(0), 1])
def test_p3_process_without_data_exits_2_and_others_report_it(lab, tmp_path, victim):
    (tmp_path / "elsewhere").mkdir()
    with Group(lab, tmp_path / "run", 2) as made:
        for number in range(2):
            made.start(number, "data.path=data", folder=tmp_path / "elsewhere" if number == victim else lab.root)
        begin = time.monotonic()
        codes = made.wait()
    assert codes[victim] == errors.BAD_CONFIG, made.said(victim)
    other, said = 1 - victim, made.said(1 - victim)
    assert codes[other] == errors.UNAVAILABLE, said
    assert f"error: data: waiting for process {victim} on host {HOST}; process {victim} has left: data.path=" in said
    assert time.monotonic() - begin < 90, "at once, not at the end of a timeout"


MEETING = """
import os, sys, time
from gptjax import cli, distributed, errors

def main(arguments):
    where, number, what = arguments[0], int(arguments[1]), arguments[2]
    distributed.start_jax(coordinator=where, num_processes=2, process_id=number, join_seconds=60)
    if what == "late" and number == 1:
        time.sleep(6)
    if what != "late" or number == 1:
        distributed.barrier("data", 60)
    if number == 0:
        raise errors.ConfigError("the data is elsewhere")
    time.sleep(3)  # past the meeting, whatever becomes of the other
    print("went on", flush=True)
    os._exit(0)

cli.run_cli(main)
"""


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("late", errors.UNAVAILABLE, f"data: waiting for process 0 on host {HOST}; process 0 has left: the data is "),
        ("gone after", errors.OK, "went on"),
    ],
)
def test_p1_late_process_reports_why_another_has_left(lab, tmp_path, what, code, message):
    with Group(lab, tmp_path / "run", 2) as made:
        for number in range(2):
            with open(tmp_path / f"{number}.out", "w") as out:
                command = [sys.executable, "-c", MEETING, f"127.0.0.1:{made.port}", str(number), what]
                streams = {"stdout": out, "stderr": subprocess.STDOUT}
                made.processes[number] = subprocess.Popen(command, env=lab.environment(), cwd=tmp_path, **streams)
        second = made.processes[1].wait(timeout=SECONDS)
        said = (tmp_path / "1.out").read_text()
        assert second == code, said
        assert message in said
        if what == "late":
            assert made.processes[0].wait(timeout=SECONDS) == errors.BAD_CONFIG


@pytest.mark.long
def test_p3_process_missing_at_a_save_is_named(lab, tmp_path):
    with Group(lab, tmp_path / "run", 2) as made:
        overrides = (one_micro_batch_each(2), "train.barrier_timeout_seconds=25", "train.eval_every=0")
        made.start(0, *overrides)
        made.start(1, *overrides, GPTJAX_FAULT="step:4:hang")
        assert made.processes[0].wait(timeout=SECONDS) == errors.UNAVAILABLE, made.said(0)
        assert f"error: save of step 4: waiting for process 1 on host {HOST}; start the missing" in made.said(0)
    assert runs.checkpoint_steps(tmp_path / "run") == []


def refused(made, message):
    """Asserts that both processes end with code 69 and tell the difference."""
    assert made.wait() == [errors.UNAVAILABLE] * 2, made.said(0) + made.said(1)
    for number in range(2):
        assert f"error: {message}" in made.said(number)


def test_b1_hosts_with_different_configs_are_refused(lab, tmp_path):
    with Group(lab, tmp_path / "run", 2) as made:
        made.start(0)
        made.start(1, "optim.peak_lr=0.5")
        refused(made, "config: process 1 has optim.peak_lr=0.5, process 0 0.002")
    assert runs.checkpoint_steps(tmp_path / "run") == []


@pytest.mark.parametrize("differs", ["source", "program"])
def test_o3_hosts_with_different_code_are_refused(differs, lab, tmp_path):
    """Both say the same version; the second has one more line, or computes products otherwise."""
    with Group(lab, tmp_path / "run", 2) as made:
        made.start(0)
        if differs == "source":
            shutil.copytree(runs.REPOSITORY / "gptjax", tmp_path / "other" / "gptjax")
            with open(tmp_path / "other" / "gptjax" / "optim.py", "a") as file:
                file.write("# Another version.\n")
            made.start(1, PYTHONPATH=os.pathsep.join([str(tmp_path / "other"), lab.environment()["PYTHONPATH"]]))
            refused(made, "source: process 1 has sha256 of gptjax's files='")
        else:
            made.start(1, JAX_DEFAULT_MATMUL_PRECISION="highest")
            refused(made, "program: process 1 has sha256 of the train step='")
    assert runs.checkpoint_steps(tmp_path / "run") == []


def test_o2_hosts_with_different_data_are_refused(lab, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("Another text. " * 500)
    (tmp_path / "text" / "b.txt").write_text("And one to validate on. " * 500)
    source, tokenizer = f"text:{tmp_path / 'text'}", load_tokenizer("bytes")
    prepare(source=source, tokenizer=tokenizer, out=str(tmp_path / "data"), log=lambda line: None, val_fraction=0.5)
    with Group(lab, tmp_path / "run", 2) as made:
        made.start(0, "data.path=data")
        made.start(1, "data.path=data", folder=tmp_path)
        refused(made, "data: process 1 has fingerprint=")
