"""T1, T4: a signal ends in a checkpoint of the current step and code 75; a second SIGTERM or SIGINT leaves at once."""

import shutil
import signal
import sys
import time

import pytest

from gptjax.distributed import StopVote
from gptjax.periodic import TOKENS_BETWEEN_STOP_CHECKS, write_samples
from tests.helpers import fake_reporter
from tests.runs import (
    PREEMPTED,
    checkpoint_steps,
    copy_until,
    is_compiling,
    last_step,
    losses,
    restored_bytes,
    rows,
    validations,
    wait_for,
)

pytestmark = pytest.mark.faults

# Saves and stops only where a signal asks for it; long evaluations, so that one can be met.
CALM = ("checkpoint.save_every=1000", "train.eval_batches=0", "train.eval_every=8", "train.sample_every=12")


def preempt(lab, workdir, when, *, number=signal.SIGTERM, **environment):
    """Starts the run, sends the signal once when() says so, and returns the step of the checkpoint it leaves."""
    with lab.start(workdir, *CALM, **environment) as process:
        wait_for(when, process)
        process.send_signal(number)
        code = process.wait(timeout=120)
    output = workdir.with_suffix(".out").read_text()
    assert code == PREEMPTED, output
    assert "Traceback" not in output
    assert f"{number.name}: saving a checkpoint after this step" in output
    step = checkpoint_steps(workdir)[-1]
    assert f"preempted at step {step}, checkpoint written: rerun the same command to resume" in output
    assert last_step(workdir) == step, "steps were taken that the checkpoint does not hold"
    return step


@pytest.mark.long
def test_t1_signal_in_any_phase_saves_the_current_step(lab, reference, tiny_run, tmp_path):
    workdir = tmp_path / "run"

    def step_is(step):
        return lambda: last_step(workdir) >= step

    cold = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cold"), "JAX_LOG_COMPILES": "1"}
    step = preempt(lab, workdir, lambda: is_compiling(workdir), **cold)
    assert step == 1

    step = preempt(lab, workdir, step_is(8), number=signal.SIGUSR1)
    assert step == 8
    assert validations(workdir) == {}, "the evaluation was not cut short: it was over before the signal"

    def sampling():
        if last_step(workdir) < 12:
            return False
        time.sleep(0.1)
        return True

    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # these tests run under nohup
    step = preempt(lab, workdir, sampling, number=signal.SIGUSR2 if ignored else signal.SIGHUP)
    assert step == 12
    assert list(validations(workdir)) == [8], "the interrupted evaluation runs at the next start"
    assert (workdir / "samples.txt").read_text().startswith("--- step 12")

    lab.train(workdir, *CALM)
    assert losses(workdir) == losses(reference)
    assert list(validations(workdir)) == [8, 16]
    abstract = tiny_run.abstract_state
    assert restored_bytes(workdir, abstract) == restored_bytes(reference, abstract)
    assert max(checkpoint_steps(workdir)) == 16


def test_t1_signal_in_the_last_evaluation_defers_it_to_restart(lab, reference, tmp_path):
    """All steps are taken, but the run is not done: the next start evaluates."""
    workdir = copy_until(reference, tmp_path / "run", 12)
    with lab.start(workdir, "train.eval_batches=0", "train.eval_every=0") as process:
        wait_for(lambda: last_step(workdir) == 12, process)  # the log is cut first
        wait_for(lambda: last_step(workdir) == 16, process)
        process.terminate()
        assert process.wait(timeout=120) == PREEMPTED
    assert 16 not in validations(workdir)
    assert "done: 16 steps" in lab.train(workdir, "train.eval_every=0").stdout
    assert validations(workdir)[16] == validations(reference)[16]
    assert losses(workdir) == losses(reference)


def test_t1_preempted_twice_before_the_first_step_saves_once(train_here, tmp_path, monkeypatch, said):
    """The second time, the checkpoint of step 0 exists already."""
    monkeypatch.setattr(StopVote, "stopping", True)
    codes = [train_here(tmp_path / "run") for _ in range(2)]
    assert codes == [PREEMPTED, PREEMPTED]
    assert checkpoint_steps(tmp_path / "run") == [0]
    assert [line for line in said if "save failed" in line] == []


def test_t1_a_sample_is_cut_short(tiny_run):
    """One of 256 tokens may take minutes on a CPU: the run looks at the signal while it is made."""
    told, looks = [], []

    def stop():
        looks.append(len(looks))
        return len(looks) == 3

    reporter = fake_reporter(report_sample=lambda step, text: told.append((step, text)))
    write_samples(tiny_run, tiny_run.init().params, reporter, step=12, should_stop=stop)
    [(step, text)] = told
    assert step == 12
    assert len(looks) == 3
    assert 0 < len(text.encode()) <= 3 * 3 * TOKENS_BETWEEN_STOP_CHECKS, "bytes that are not UTF-8 become three"


EARLY = """
import os, signal, sys, time
from gptjax import cli, signals

def main(arguments):
    with signals.Preemption() as preemption:
        preemption.can_save = arguments == ["begun"]
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1 if preemption.can_save else 60)
        print("saved" if preemption.requested else "nothing was asked for")

cli.run_cli(main)
"""


@pytest.mark.parametrize(("when", "code", "line"), [("early", PREEMPTED, "nothing to save"), ("begun", 0, "saved")])
def test_t1_signal_before_training_exits_at_once(when, code, line, lab):
    """While data are prepared, which may take hours, there is nothing to save and nobody to look at the signal."""
    begin = time.monotonic()
    done = lab.call([sys.executable, "-c", EARLY, when], expect=code)
    assert line in done.stdout
    assert time.monotonic() - begin < 30


def test_t4_second_signal_exits_at_once(lab, reference, tiny_run, tmp_path):
    """Even in the middle of a compilation; the checkpoint before it stands."""
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    before = rows(workdir)
    (workdir / "metrics.jsonl").touch()
    cold = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cold"), "JAX_LOG_COMPILES": "1"}
    with lab.start(workdir, "train.num_steps=20", **cold) as process:
        wait_for(lambda: is_compiling(workdir), process)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        assert process.wait(timeout=120) == PREEMPTED
        assert time.monotonic() - begin < 2
    assert rows(workdir) == before
    abstract = tiny_run.abstract_state
    assert restored_bytes(workdir, abstract) == restored_bytes(reference, abstract)
