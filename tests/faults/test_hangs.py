"""H1: a step that hangs ends the process, with the stacks of all threads."""

import pytest

from gptjax.errors import UNAVAILABLE
from tests import runs

pytestmark = pytest.mark.faults


def test_h1_a_step_that_hangs_ends_with_all_stacks(lab, twin, tmp_path):
    workdir = tmp_path / "run"
    done = lab.train(workdir, "train.watchdog_seconds=15", expect=UNAVAILABLE, GPTJAX_FAULT="step:3:hang")
    assert "error: nothing has ended for train.watchdog_seconds=15; " in done.stderr
    assert "in fault_point" in done.stderr, "the thread that hangs"
    assert done.stderr.count("Thread 0x") > 1
    lab.train(workdir)
    assert runs.losses(workdir) == runs.losses(twin)
