"""H1: a step that hangs ends the process, with the stacks of all threads."""

import subprocess
import sys

import pytest

from gptjax.errors import UNAVAILABLE
from tests import runs

pytestmark = pytest.mark.faults


@pytest.mark.long
def test_h1_a_step_that_hangs_ends_with_all_stacks(lab, reference, tmp_path):
    workdir = tmp_path / "run"
    done = lab.train(workdir, "train.watchdog_timeout_seconds=15", expect=UNAVAILABLE, GPTJAX_FAULT="step:3:hang")
    assert "error: no step finished in train.watchdog_timeout_seconds=15; " in done.stderr
    assert "in fault_point" in done.stderr, "the thread that hangs"
    assert done.stderr.count("Thread 0x") > 1
    lab.train(workdir)
    assert runs.losses(workdir) == runs.losses(reference)


SILENT = """
import sys, time
from gptjax import signals

with signals.Watchdog(1):
    sys.stdin.read()  # until nobody reads stderr any more
    time.sleep(120)
"""


def test_h1_watchdog_exits_even_if_stderr_is_closed(lab):
    """Whoever started it is gone, and with it the pipe that its stderr was."""
    process = subprocess.Popen(
        [sys.executable, "-c", SILENT], env=lab.environment(), stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        process.stderr.close()
        process.stdin.close()
        assert process.wait(timeout=120) == UNAVAILABLE
    finally:
        process.kill()
        process.wait()
