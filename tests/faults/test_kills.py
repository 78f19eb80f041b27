"""K1, K2, K3, W1: SIGKILL at any moment, then the same command again, ends in the bits of a run never disturbed."""

import json
import random
import re
import shutil
import time

import pytest

from tests import runs
from tests.runs import checkpoint_steps, copy_until, kill, last_step, temporary_directories, wait_for

pytestmark = pytest.mark.faults
STEPS, SAVE_EVERY = 48, 4
OFTEN = 0.0002  # seconds between two looks at a directory that changes within milliseconds
LONG = (f"train.num_steps={STEPS}", f"checkpoint.save_every={SAVE_EVERY}")


def assert_equals_reference(workdir, reference, tiny_run):
    runs.assert_equals_reference(workdir, reference, tiny_run.abstract_state)
    assert temporary_directories(workdir) == []


def start_and_kill(lab, workdir, when):
    """Starts the run, waits until it trains, and kills it at when(process); returns the step that it went on from."""
    reached = last_step(workdir)
    with lab.start(workdir, *LONG) as process:
        before = last_step(workdir)
        wait_for(lambda: (workdir / "metrics.jsonl").exists() and last_step(workdir) != before, process)
        when(process)
        kill(process)
    resumed = resumed_from(workdir)
    assert reached - resumed <= 2 * SAVE_EVERY, f"killed at step {reached}, went on from {resumed}"
    assert len(temporary_directories(workdir)) <= 1, "an earlier kill's temporary directory is still there"
    return resumed


def resumed_from(workdir):
    lines = workdir.with_suffix(".out").read_text().splitlines()
    return next((int(line.split()[3]) for line in lines if line.startswith("resumed from step ")), 0)


def finish(lab, workdir):
    reached = last_step(workdir)
    done = lab.train(workdir, *LONG)
    found = re.search(r"^resumed from step (\d+)", done.stdout, re.MULTILINE)
    assert found, done.stdout[:2000]
    resumed = int(found[1])
    assert reached - resumed <= 2 * SAVE_EVERY
    return resumed


@pytest.mark.long
def test_k1_run_killed_at_random_moments_ends_bit_equal(lab, long_reference, tiny_run, tmp_path):
    """Every other time a save is waited for first, so that the run gets on however slow the disk is."""
    workdir, moment = tmp_path / "run", random.Random(1)
    resumed = []
    for number in range(4):  # 200 in the soak
        is_saved = a_save_was_renamed(workdir)

        def at_random(process, number=number, is_saved=is_saved):
            if number % 2:
                wait_for(is_saved, process)
            else:
                target = min(last_step(workdir) + moment.randrange(2 * SAVE_EVERY), STEPS - 2)
                wait_for(lambda: last_step(workdir) >= target, process)
            time.sleep(moment.uniform(0, 0.1))

        resumed.append(start_and_kill(lab, workdir, at_random))
    resumed.append(finish(lab, workdir))
    assert resumed == sorted(resumed)
    assert len(set(resumed)) > 2, f"it was killed again and again at the same place: {resumed}"
    assert_equals_reference(workdir, long_reference, tiny_run)


def names(workdir):
    directory = workdir / "checkpoints"
    try:
        return {entry.name for entry in directory.iterdir()}
    except FileNotFoundError:
        return set()


def a_save_was_renamed(workdir):
    """Returns the condition: a checkpoint has its name that had none at the start."""
    before = max(checkpoint_steps(workdir), default=0)
    return lambda: max(checkpoint_steps(workdir), default=0) > before


@pytest.mark.long
def test_k2_run_killed_around_saves_ends_bit_equal(lab, long_reference, tiny_run, tmp_path):
    """A save's temporary directory appears; it is renamed; an old step is being removed."""
    workdir, half_removed = tmp_path / "run", []

    def appears(process):
        seen = {name for name in names(workdir) if "tmp" in name}
        wait_for(lambda: any("tmp" in name and name not in seen for name in names(workdir)), process, pause=OFTEN)

    def is_renamed(process):
        wait_for(a_save_was_renamed(workdir), process, pause=OFTEN)

    def is_being_removed(process):
        def half_gone():
            for step in checkpoint_steps(workdir):
                path = workdir / "checkpoints" / str(step)
                if not (path / "_CHECKPOINT_METADATA").exists() or not (path / "params" / "_METADATA").exists():
                    return True
            return False

        wait_for(half_gone, process, pause=OFTEN)
        process.kill()
        process.wait()
        half_removed.append(half_gone())

    for when in (appears, is_renamed):
        start_and_kill(lab, workdir, when)
        assert checkpoint_steps(workdir) or when is appears
    while not any(half_removed) and len(half_removed) < 4:
        start_and_kill(lab, workdir, is_being_removed)
    assert any(half_removed), "no kill has met a half-removed step: the moment was missed"
    finish(lab, workdir)
    assert_equals_reference(workdir, long_reference, tiny_run)


def test_k3_run_killed_in_the_first_compilation_ends_bit_equal(lab, reference, tiny_run, tmp_path):
    workdir, cold = tmp_path / "run", str(tmp_path / "cold")
    with lab.start(workdir, JAX_COMPILATION_CACHE_DIR=cold, JAX_LOG_COMPILES="1") as process:
        wait_for(lambda: runs.is_compiling(workdir), process)
        kill(process)
    assert last_step(workdir) == 0
    assert checkpoint_steps(workdir) == []
    assert "resumed from" not in lab.train(workdir).stdout
    assert_equals_reference(workdir, reference, tiny_run)


def test_w1_run_killed_between_evaluation_and_save_ends_bit_equal(lab, reference, tiny_run, tmp_path):
    """The log then knows more than the newest checkpoint; a torn line, as a power cut leaves it, is added by hand."""
    workdir = tmp_path / "run"
    lab.train(workdir, GPTJAX_FAULT="evaluation:1:kill", expect=-9)
    assert last_step(workdir) == 8
    assert checkpoint_steps(workdir)[-1:] in ([], [4])
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert list(runs.validations(workdir)) == [8]
    lab.train(workdir)
    assert_equals_reference(workdir, reference, tiny_run)


def test_w1_logs_ahead_of_the_checkpoint_are_cut(lab, reference, tiny_run, tmp_path):
    workdir = copy_until(reference, tmp_path / "run", 4, cut=False)
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write("\0\0\0\n[1]\n{}\n" + json.dumps({"step": 17, "loss": 1.0}) + '\n{"step"')
    lab.train(workdir)
    assert_equals_reference(workdir, reference, tiny_run)


def test_c4_a_dead_runs_temporary_directory_is_removed(lab, reference, tiny_run, tmp_path):
    """C4, through the command line: of a step that is not saved again. What else may lie there is in test_damage.py."""
    workdir = copy_until(reference, tmp_path / "run", 4)
    shutil.copytree(workdir / "checkpoints/4", workdir / "checkpoints/6.orbax-checkpoint-tmp")
    lab.train(workdir)
    assert_equals_reference(workdir, reference, tiny_run)
