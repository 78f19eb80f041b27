"""D1, D2: a disk that fills up, and work directories that cannot be written or have odd names."""

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest

from gptjax.errors import WorkdirError
from gptjax.identity import Identity
from gptjax.setup import write_description
from tests import runs
from tests.helpers import raises, sweep
from tests.runs import (
    checkpoint_steps,
    copy_until,
    event_steps,
    losses,
    restored_bytes,
    temporary_directories,
    wait_until_stopped,
)

pytestmark = pytest.mark.faults
LONG = ("train.num_steps=48", "checkpoint.save_every=4")


@contextlib.contextmanager
def mounted(path, options):
    """Mounts a tmpfs at `path` while the test runs; skips the test where that is not allowed."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


class SmallDisk:
    """A tmpfs that can be filled to the last byte."""

    def __init__(self, root, stack):
        stack.enter_context(mounted(root / "disk", "size=12m"))
        self.workdir, self._ballast = root / "run", root / "disk" / "ballast"
        (root / "disk" / "run").mkdir()
        self.workdir.symlink_to(root / "disk" / "run")  # so that what is printed lies elsewhere

    def fill(self, process=None, leave=0):
        with open(self._ballast, "ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        if leave:
            os.truncate(self._ballast, self._ballast.stat().st_size - leave)
        assert shutil.disk_usage(self._ballast).free == leave

    def free(self, process=None):
        self._ballast.unlink()


class SmallFiles:
    """No file of the process may grow beyond 32 KiB: large arrays do not fit, logs do."""

    def __init__(self, root, stack):
        self.workdir = root / "run"

    def fill(self, process):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**15, resource.RLIM_INFINITY))

    def free(self, process=None):
        if process is not None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("kind", [sweep(SmallDisk), SmallFiles])
def test_d1_full_disk_ends_the_run_after_three_failed_saves(kind, lab, reference, long_reference, tiny_run, tmp_path):
    """The disk is full before a save begins: one that has begun may end in time."""
    with contextlib.ExitStack() as stack:
        disk = kind(tmp_path, stack)
        workdir = disk.workdir
        shutil.copytree(copy_until(reference, tmp_path / "at-4", 4), workdir, dirs_exist_ok=True)

        # It stays full: three saves fail, and then the run ends.
        with lab.start(workdir, *LONG, GPTJAX_FAULT="step:1:stop") as process:
            wait_until_stopped(process)
            disk.fill(process)
            process.send_signal(signal.SIGCONT)
            assert process.wait(timeout=120) == 74, runs.said(workdir)
        lines = runs.said(workdir).splitlines()
        assert sum("checkpoint save failed, training continues: " in line for line in lines) == 2, lines
        assert lines[-1].startswith(f"error: {workdir}/checkpoints: 3 "), lines
        assert "Traceback" not in runs.said(workdir)
        assert temporary_directories(workdir) == []
        assert checkpoint_steps(workdir) == [4]
        disk.free()

        # It is full for a while: training goes on, and the next save succeeds.
        with lab.start(workdir, *LONG, GPTJAX_FAULT="step:1:stop,step:9:stop") as process:  # at 5, 13
            wait_until_stopped(process)
            disk.fill(process)
            process.send_signal(signal.SIGCONT)
            wait_until_stopped(process)
            disk.free(process)
            process.send_signal(signal.SIGCONT)
            assert process.wait(timeout=120) == 0, runs.said(workdir)
        said = runs.said(workdir)
        assert "resumed from step 4" in said
        assert 1 <= said.count("checkpoint save failed, training continues: ") <= 2
        assert losses(workdir) == losses(long_reference)
        assert event_steps(workdir, "train/loss") == list(losses(long_reference))
        assert temporary_directories(workdir) == []
        assert restored_bytes(workdir, tiny_run.abstract_state) == restored_bytes(
            long_reference, tiny_run.abstract_state
        )


def test_d1_too_little_disk_space_is_reported_before_training(lab, tmp_path):
    with contextlib.ExitStack() as stack:
        disk = SmallDisk(tmp_path, stack)
        disk.fill(leave=2**16)
        line = lab.refusal(disk.workdir, expect=73)
        assert line.startswith(f"{disk.workdir}/checkpoints: ")
        assert re.search(r"\d kB.* \d\S* kB .*; .* --workdir$", line)
        disk.fill()
        assert "No space left on device" in lab.refusal(disk.workdir, expect=73)


@pytest.mark.parametrize("name", ["config.json", "parameters.json", "tokenizer.json"])
def test_d3_unwritable_description_file_ends_the_run(name, tiny_run, tmp_path):
    (tmp_path / name).mkdir()
    with raises(WorkdirError, f"{tmp_path}/{name}", remedy="make room ", match="cannot be written: Is a directory"):
        write_description(tiny_run, str(tmp_path), Identity(), has_roles=False)


def test_d2_read_only_disk_is_refused(lab, reference, tmp_path):
    with mounted(tmp_path / "disk", "size=12m"):
        shutil.copytree(reference, tmp_path / "disk" / "run")
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        for workdir in (tmp_path / "disk" / "run", tmp_path / "disk" / "new"):
            assert re.fullmatch(f"--workdir={workdir}: .* Read-only file system; .*", lab.refusal(workdir, expect=73))


def test_d2_unwritable_work_directory_is_refused(lab):
    workdir = "/proc/self/gptjax" if sys.platform == "linux" else "/dev/null/x"
    assert lab.refusal(workdir, expect=73).startswith(f"--workdir={workdir}: ")


def test_d2_file_in_place_of_the_checkpoints_is_refused(lab, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").write_text("mine")
    assert lab.refusal(workdir, expect=73).startswith(f"{workdir}/checkpoints: ")
    assert (workdir / "checkpoints").read_text() == "mine"
    assert not (workdir / "metrics.jsonl").exists()
