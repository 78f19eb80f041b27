"""launch/slurm.sbatch against a SLURM in a folder: srun, its tasks, scontrol, and the signal before the time limit."""

import contextlib
import os
import pathlib
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests import runs

SCRIPT = runs.REPOSITORY / "launch" / "slurm.sbatch"
OPTIONS = [line.split(" ", 1)[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH ")]

# Runs its command as two tasks and ends with the highest of their codes. As the real one, it answers a signal to itself
# by killing them.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$FOLDER/srun"
while [[ $1 == --* ]]; do shift; done
for SLURM_PROCID in 0 1; do
    export SLURM_PROCID
    "$@" &
    tasks[SLURM_PROCID]=$!
done
trap 'kill -KILL "${tasks[@]}"; exit 137' TERM HUP
highest=0
for task in "${tasks[@]}"; do
    wait "$task" && code=0 || code=$?
    ((code > highest)) && highest=$code
done
exit $highest
"""
TASK = """#!/usr/bin/env bash
echo "$JAX_LOCAL_DEVICE_IDS" >"$FOLDER/devices"
trap 'echo TERM >>"$FOLDER/signals-$SLURM_PROCID"; sleep 0.3; exit "${CODE%,*}"' TERM
echo $$ >"$FOLDER/task.tmp-$SLURM_PROCID" && mv "$FOLDER/task.tmp-$SLURM_PROCID" "$FOLDER/task-$SLURM_PROCID"
while [ "$HOLD" ]; do sleep 0.05; done
if [ "$SLURM_PROCID" = 0 ]; then exit "${CODE%,*}"; else exit "${CODE#*,}"; fi
"""


class Job:
    """One job; `code` is what its tasks end with, "75,0" where they differ."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        scripts = {"srun": SRUN, "python": TASK, "scontrol": '#!/bin/sh\necho "$@" >>"$FOLDER/scontrol"\n'}
        (folder / "bin").mkdir()
        for name, text in scripts.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def start(self, code: int | str = 0, *, hold: bool = False, **variables: str) -> subprocess.Popen[str]:
        environment = {"PATH": f"{self.folder / 'bin'}:/usr/bin:/bin", "FOLDER": str(self.folder), "CODE": str(code)}
        environment |= {"HOLD": "1" if hold else "", "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2"}
        environment |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "96"} | variables
        command = ["bash", str(SCRIPT), "--config=c.py", "--config.train.sample_prompt=a b"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, code: int | str = 0, **variables: str) -> int:
        process = self.start(code, **variables)
        process.communicate(timeout=120)
        return process.returncode

    def come_to_the_limit(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Sends the signal that --signal asks for: with B: to the script alone, without to the tasks alone."""
        tasks = [self.folder / f"task-{i}" for i in range(2)]
        runs.wait_for(lambda: all(task.exists() for task in tasks), process)
        [asked] = [option.removeprefix("--signal=") for option in OPTIONS if option.startswith("--signal=")]
        pids = [process.pid] if asked.startswith("B:") else [int(task.read_text()) for task in tasks]
        for pid in pids:
            os.kill(pid, signal.Signals[f"SIG{asked.removeprefix('B:').split('@')[0]}"])
        said, _ = process.communicate(timeout=120)
        return process.returncode, said

    def read(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def job(tmp_path: pathlib.Path) -> Iterator[Job]:
    yield Job(tmp_path)
    for task in tmp_path.glob("task-*"):  # what a failed test has left
        pid = int(task.read_text())
        with contextlib.suppress(OSError):
            if str(tmp_path) in pathlib.Path(f"/proc/{pid}/cmdline").read_text():  # not another one of that number
                os.kill(pid, signal.SIGKILL)


PER_NODE = {"--ntasks-per-node=1", "--ntasks=2", "--cpus-per-task=96"}


@pytest.mark.parametrize(
    ("variables", "flags", "devices"),
    [
        ({}, {"--ntasks-per-node=8", "--ntasks=16", "--cpus-per-task=12"}, ""),
        ({"PROCESS_PER": "node"}, PER_NODE, "0,1,2,3,4,5,6,7"),
        ({"SLURM_GPUS_ON_NODE": "0"}, PER_NODE, ""),
    ],
)
def test_job_starts_a_process_per_gpu_or_node(job, variables, flags, devices):
    assert job.run(**variables) == 0
    arguments = job.read("srun")
    assert flags <= set(arguments)
    assert arguments[-5:] == ["python", "-m", "gptjax.main", "--config=c.py", "--config.train.sample_prompt=a b"]
    assert job.read("devices") == [devices]
    assert {"--kill-on-bad-exit=0", "--wait=300"} <= set(arguments), "as long as the signal precedes the limit"


def test_unknown_process_per_value_is_refused(job):
    assert job.run(PROCESS_PER="core") == 2
    assert job.read("srun") == []


@pytest.mark.parametrize("code", [0, 2, 65, 69, 70, 75, 137, "75,0"])
def test_only_a_preempted_run_is_requeued(job, code):
    assert job.run(code) == (75 if code == "75,0" else code)
    assert job.read("scontrol") == (["requeue 77"] if code in (75, "75,0") else [])


def test_time_limit_signal_reaches_each_process_once_before_requeue(job):
    code, said = job.come_to_the_limit(job.start(75, hold=True))
    assert code == 75
    assert "srun ended with exit code 75" in said
    assert [job.read(f"signals-{i}") for i in range(2)] == [["TERM"]] * 2
    assert job.read("scontrol") == ["requeue 77"]


def test_cancelled_job_is_not_requeued(job):
    process = job.start(75, hold=True)
    runs.wait_for(lambda: all((job.folder / f"task-{i}").exists() for i in range(2)), process)
    for name in ("task-0", "task-1"):
        os.kill(int(job.read(name)[0]), signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # scancel sends it to all that there is, the script included
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGTERM
    assert job.read("scontrol") == []


def test_options_request_an_early_signal_and_allow_requeue():
    assert "--signal=TERM@300" in OPTIONS
    assert "--requeue" in OPTIONS
    assert "--open-mode=append" in OPTIONS  # or the log of the time before would be lost
