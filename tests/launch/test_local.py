"""launch/local.sh: with processes that do as they are told, and with real ones."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests import runs

LOCAL = runs.REPOSITORY / "launch" / "local.sh"

# Process i does what {i}.sh in the folder says; it tells of its start, its arguments and its signals.
PYTHON = """#!/usr/bin/env bash
id=${!#} && id=${id#--process_id=}
cd "$(dirname "$0")"
echo "$*" >"arguments-$id"
echo "$CUDA_VISIBLE_DEVICES" >"cards-$id"
trap 'echo TERM >>"signals-$id"' TERM
trap 'echo INT >>"signals-$id"' INT
echo $$ >"started-$id"
signals() { cat "signals-$id" 2>/dev/null | wc -l; }
. "./$id.sh"
"""
WAIT = "while (($(signals) == 0)); do sleep 0.05; done\n"


class Folder:
    def __init__(self, path: pathlib.Path, *scripts: str) -> None:
        self.path, self.count = path, len(scripts)
        (path / "python").write_text(PYTHON)
        (path / "python").chmod(0o755)
        for i, script in enumerate(scripts):
            (path / f"{i}.sh").write_text(script)

    def start(self, *, stdin: int | None = None, **variables: str) -> subprocess.Popen[str]:
        """Starts it; with `stdin`, a terminal, as its foreground job."""
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(self.path / "python"), "PORT": "12345", **variables}
        terminal = ["env", "--default-signal=HUP,INT,TERM"]  # whatever started the tests may have ignored them
        terminal += [] if stdin is None else ["setsid", "--ctty", "--wait"]
        return subprocess.Popen(
            [*terminal, LOCAL, str(self.count), "--config=x.py", "--config.train.sample_prompt=a b"],
            env=environment | {"LOGS": str(self.path / "logs")},
            stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Returns its exit code and what it said; none of what it started is left."""
        try:
            said, _ = process.communicate(timeout=120)
            runs.wait_for(lambda: not self.alive(), seconds=5)
        finally:
            for pid in self.alive():
                os.kill(pid, signal.SIGKILL)
            process.kill()
        return process.returncode, said

    def alive(self) -> list[int]:
        pids = [int(path.read_text() or 0) for path in self.path.glob("started-*")]
        return [pid for pid in pids if is_alive(pid, self.path)]

    def run(self, **variables: str) -> tuple[int, str]:
        return self.end(self.start(**variables))

    def wait(self, process: subprocess.Popen[str]) -> None:
        """Returns once all processes run."""
        runs.wait_for(lambda: all((self.path / f"started-{i}").exists() for i in range(self.count)), process)

    def signal(self, number: int, **variables: str) -> tuple[int, str]:
        """Sends the signal once all processes run."""
        process = self.start(**variables)
        self.wait(process)
        process.send_signal(number)
        return self.end(process)

    def read(self, name: str) -> str:
        path = self.path / name
        return path.read_text() if path.exists() else ""


def is_alive(pid: int, folder: pathlib.Path) -> bool:
    """Returns whether a process of that folder runs; one that has ended has no command line."""
    try:
        return str(folder) in pathlib.Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((0, 0), 0), ((0, 2), 2), ((75, 75), 75), ((75, 0), 75), ((0, 75, 3), 3), ((70, 75), 70), ((2, 70), 2)],
)
def test_exit_code_is_the_first_failure_or_75(tmp_path, codes, expected):
    code, _ = Folder(tmp_path, *(f"sleep 0.{4 * i}; exit {c}" for i, c in enumerate(codes))).run()
    assert code == expected


def test_each_process_gets_the_flags_its_index_and_a_gpu(tmp_path):
    folder = Folder(tmp_path, "exit 0", "exit 0")
    assert folder.run(CUDA_VISIBLE_DEVICES="4,6")[0] == 0
    for i in range(2):
        assert folder.read(f"arguments-{i}") == (
            "-m gptjax.main --config=x.py --config.train.sample_prompt=a b "
            f"--coordinator=127.0.0.1:12345 --num_processes=2 --process_id={i}\n"
        )
    assert [folder.read(f"cards-{i}") for i in range(2)] == ["4\n", "6\n"]
    assert folder.run()[0] == 0
    assert [folder.read(f"cards-{i}") for i in range(2)] == ["0\n", "1\n"]


def test_output_lines_are_prefixed_and_logged_per_process(tmp_path):
    folder = Folder(tmp_path, "echo out; echo err >&2; printf last", "echo other")
    code, said = folder.run()
    assert code == 0
    assert {"[0] out", "[0] err", "[0] last", "[1] other"} <= set(said.splitlines())
    assert folder.read("logs/process-0.log").splitlines() == ["out", "err", "last"]
    assert folder.read("logs/process-1.log") == "other\n"


def test_failed_process_ends_the_others_and_sets_the_code(tmp_path):
    folder = Folder(tmp_path, WAIT + "exit 75", "sleep 0.3; exit 2", WAIT + "kill -KILL $$")
    assert folder.run()[0] == 2
    assert folder.read("signals-0") == folder.read("signals-2") == "TERM\n"


def test_process_that_ignores_the_signal_is_killed(tmp_path):
    folder = Folder(tmp_path, "while :; do sleep 0.1; done", "exit 69")
    begin = time.monotonic()
    code, _ = folder.run(GRACE_SECONDS="1")
    assert code == 69
    assert time.monotonic() - begin < 20


def test_processes_continue_and_log_after_stdout_is_closed(tmp_path):
    talk = "while [ ! -e go ]; do sleep 0.05; done; for i in 1 2 3; do echo line $i; sleep 0.3; done; exit 75"
    folder = Folder(tmp_path, talk, talk)
    process = folder.start()
    folder.wait(process)
    process.stdout.close()
    (tmp_path / "go").touch()
    assert process.wait(timeout=120) == 75
    for i in range(2):  # the first one to end has the other one told, whose shell says of its sleep: Terminated
        said = [line for line in folder.read(f"logs/process-{i}.log").splitlines() if line != "Terminated"]
        assert said == ["line 1", "line 2", "line 3"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_reaches_each_process_once_and_saves_finish(tmp_path, number):
    saving = WAIT + "sleep 1; echo $(signals) >counted-$id; exit 75"
    folder = Folder(tmp_path, WAIT + "exit 75", saving, saving)
    code, _ = folder.signal(number)
    assert code == 75
    asked = "INT" if number == signal.SIGINT else "TERM"
    assert [folder.read(f"signals-{i}") for i in range(3)] == [f"{asked}\n"] * 3
    assert folder.read("counted-1") == folder.read("counted-2") == "1\n"


def test_process_killed_by_the_signal_does_not_hide_code_75(tmp_path):
    folder = Folder(tmp_path, WAIT + "exit 75", WAIT + "trap - TERM; kill -TERM $$")
    assert folder.signal(signal.SIGTERM)[0] == 75


def test_second_signal_is_forwarded_to_all_processes(tmp_path):
    stuck = "while (($(signals) < 2)); do sleep 0.05; done; exit 75"
    folder = Folder(tmp_path, stuck, stuck)
    process = folder.start()
    folder.wait(process)
    process.send_signal(signal.SIGTERM)
    runs.wait_for(lambda: all(folder.read(f"signals-{i}") for i in range(2)), process)
    process.send_signal(signal.SIGTERM)
    assert folder.end(process)[0] == 75


def test_ctrl_c_in_a_terminal_reaches_each_process_once(tmp_path):
    saving = WAIT + "sleep 0.5; echo $(signals) >counted-$id; exit 75"
    folder = Folder(tmp_path, saving, saving)
    ours, its = os.openpty()
    process = folder.start(stdin=its)
    folder.wait(process)
    os.write(ours, b"\x03")
    code, _ = folder.end(process)
    os.close(ours)
    os.close(its)
    assert code == 75
    assert [folder.read(f"counted-{i}") for i in range(2)] == ["1\n"] * 2


def test_fewer_cards_than_processes_are_refused(tmp_path):
    folder = Folder(tmp_path, "exit 0", "exit 0")
    code, said = folder.run(CUDA_VISIBLE_DEVICES="4")
    assert (code, said) == (2, "CUDA_VISIBLE_DEVICES=4: too few for 2 processes\n")
    assert folder.read("started-0") == ""


@pytest.mark.parametrize("arguments", [[], ["2"], ["0", "--config=x.py"], ["two", "--config=x.py"], ["--config=x.py"]])
def test_a_wrong_number_of_processes_is_refused(arguments):
    done = subprocess.run([LOCAL, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiles in half the time
SHORT = ("train.eval_every=0", "train.eval_batches=1", "train.micro_batch_size=0")


def real(lab: runs.Lab, workdir: pathlib.Path, *overrides: str) -> list[str]:
    return [str(LOCAL), "2", *lab.command(workdir, *SHORT, *overrides)[3:]]


def test_two_real_processes_train_and_only_the_first_writes_metrics(lab, tmp_path):
    workdir = tmp_path / "two"
    command = real(lab, workdir, "train.num_steps=4", "checkpoint.save_every=2")
    done = lab.call(command, PYTHON=sys.executable, LOGS=str(tmp_path / "logs"), **QUICK)
    assert "2 processes" in done.stdout
    assert "[0] done: 4 steps" in done.stdout
    assert list(runs.losses(workdir)) == [1, 2, 3, 4]
    assert runs.checkpoint_steps(workdir)[-1] == 4
    assert "waiting for the other processes" in (tmp_path / "logs/process-1.log").read_text()
    assert "step 4/4" not in (tmp_path / "logs/process-1.log").read_text()


def test_two_real_processes_save_the_same_step_on_sigterm(lab, tmp_path):
    workdir, logs = tmp_path / "two", tmp_path / "logs"
    command = real(lab, workdir, "train.num_steps=100000", "checkpoint.save_every=100000", "train.log_every=10")
    environment = lab.environment(PYTHON=sys.executable, LOGS=str(logs), **QUICK)
    with subprocess.Popen(command, env=environment, cwd=lab.root, stdout=subprocess.PIPE, text=True) as process:
        try:
            runs.wait_for(lambda: runs.last_step(workdir) >= 3, process)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=120)
        finally:
            for _ in range(2):  # the second one ends what hangs
                process.terminate()
                time.sleep(0.5)
    assert process.returncode == 75
    [step] = runs.checkpoint_steps(workdir)
    for i in range(2):
        said = (logs / f"process-{i}.log").read_text()
        assert f"preempted at step {step}, checkpoint written: rerun the same command to resume" in said


def test_two_real_processes_with_a_wrong_config_end_with_2(lab, tmp_path):
    command = real(lab, tmp_path / "two", "model.n_head=3")
    done = lab.call(command, expect=2, PYTHON=sys.executable, LOGS=str(tmp_path / "logs"))
    message = "error: model.n_head=3: must divide model.n_embd=32; nearest valid: 2, 4"
    assert {f"[{i}] {message}" for i in range(2)} & set(done.stdout.splitlines())  # the first to fail ends the other
    assert not (tmp_path / "two").exists()
