"""Helpers of the tests that start real runs: a tiny config, data, command lines, and what a run leaves behind."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tensorboardX.proto import event_pb2

from gptjax import setup as run_setup
from gptjax.checkpoint import Checkpointer
from gptjax.config import Config, from_dict
from gptjax.data.prepare import prepare
from gptjax.data.tokenizer import load_tokenizer
from gptjax.sharding import make_mesh

REPOSITORY = pathlib.Path(__file__).parents[1]
OFFLINE = REPOSITORY / "tests" / "offline"  # a sitecustomize.py that refuses all connections but those to loopback
PREEMPTED = 75

# Small, but with all that could make a restart differ: dropout, accumulation, a schedule, validation, several epochs.
TINY = {
    "model": {"block_size": 32, "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 32, "dropout": 0.1},
    # A warm-up that outlasts every cut, then constant: the compiled schedule does not depend on num_steps.
    "optim": {"schedule": "constant", "warmup_steps": 12, "peak_lr": 2e-3},
    "data": {"tokenizer": "bytes", "global_batch_size": 8},
    "train": {"num_steps": 16, "micro_batch_size": 4, "log_every": 1, "eval_every": 8, "eval_batches": 2},
    "checkpoint": {"save_every": 4, "keep": 2},
}


@dataclasses.dataclass(frozen=True)
class Lab:
    """One directory with data, config file and compile cache that all runs of a test session share."""

    root: pathlib.Path

    @property
    def data(self) -> pathlib.Path:
        return self.root / "data"

    @property
    def config_file(self) -> pathlib.Path:
        return self.root / "tiny.py"

    def config(self, **sections: Any) -> Config:
        values: dict[str, Any] = {name: dict(section) for name, section in TINY.items()}
        values["data"]["path"] = str(self.data)
        for name, changes in sections.items():
            values[name] = {**values.get(name, {}), **changes} if isinstance(changes, dict) else changes
        return from_dict(values)

    def environment(self, devices: int = 1, **extra: str) -> dict[str, str]:
        """Returns the variables of a run that never touches the user's home and imports this very source tree."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("GPTJAX_", "XLA_", "JAX_", "HF_", "WANDB_"))}
        return kept | {
            "HOME": str(self.root / "home"),
            "JAX_COMPILATION_CACHE_DIR": str(self.root / "compiled"),
            "JAX_PLATFORMS": "cpu",
            "OPENBLAS_NUM_THREADS": "1",  # NumPy's threads spin for a while when it is imported
            "PYTHONPATH": os.pathsep.join([str(OFFLINE), str(REPOSITORY)]),
            "PYTHONUNBUFFERED": "1",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            **extra,
        }

    def command(self, workdir: pathlib.Path, *overrides: str) -> list[str]:
        arguments = [f"--config={self.config_file}", f"--workdir={workdir}", *(f"--config.{o}" for o in overrides)]
        return [sys.executable, "-m", "gptjax.main", *arguments]

    def train(
        self, workdir: pathlib.Path, *overrides: str, expect: int = 0, devices: int = 1, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs the command to its end, which must have the exit code `expect` and show no traceback."""
        assert not self.is_shared(workdir), f"{workdir} is other tests', too: train in a copy"
        return self.call(self.command(workdir, *overrides), expect=expect, devices=devices, **extra)

    def refusal(self, workdir: pathlib.Path, *overrides: str, expect: int, **extra: str) -> str:
        """Returns the one line with which the command ends before it trains, without "error: "."""
        done = self.train(workdir, *overrides, expect=expect, **extra)
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: "), line
        assert "compiled the train step" not in done.stdout
        return line.removeprefix("error: ")

    def is_shared(self, workdir: pathlib.Path | str) -> bool:
        """Returns whether this is a finished run of make_reference, which tests read at the same time."""
        workdir = pathlib.Path(workdir)
        return workdir.parent == self.root and (self.root / f"{workdir.name}-done").exists()

    def call(
        self, command: list[str], *, expect: int = 0, devices: int = 1, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        environment = self.environment(devices, **extra)
        done = subprocess.run(
            command, env=environment, cwd=self.root, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr, done.stderr
        return done

    @contextlib.contextmanager
    def start(self, workdir: pathlib.Path, *overrides: str, **extra: str) -> Iterator[subprocess.Popen[str]]:
        """Yields the command as a running process, whose output is in `workdir`.out; kills what is left of it."""
        with open(workdir.with_suffix(".out"), "w") as out:
            command, environment = self.command(workdir, *overrides), self.environment(**extra)
            pipes: dict[str, Any] = {"stdout": out, "stderr": subprocess.STDOUT, "text": True}
            process = subprocess.Popen(command, env=environment, cwd=self.root, **pipes)
            try:
                yield process
            finally:
                process.kill()
                process.wait()


def make_lab(root: pathlib.Path) -> Lab:
    """Returns the lab in `root`, made by the first of the processes that ask for it."""
    lab = Lab(root)
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not lab.config_file.exists():
            text = root / "text"
            text.mkdir()
            for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("[a-e]*.py")):
                shutil.copy(path, text)
            options = {"tokenizer": load_tokenizer("bytes"), "log": lambda line: None, "val_fraction": 0.2}
            prepare(source=f"text:{text}", out=str(lab.data), **options)
            lab.config_file.write_text(f"def get_config():\n    return {lab.config().to_dict()!r}\n")
    return lab


def make_once(lab: Lab, name: str, make: Callable[[pathlib.Path], Any]) -> pathlib.Path:
    """Returns the lab's directory of this name, made by the first process that asks for it with make(directory)."""
    directory = lab.root / name
    with open(lab.root / f"{name}-lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (lab.root / f"{name}-done").exists():
            shutil.rmtree(directory, ignore_errors=True)
            make(directory)
            (lab.root / f"{name}-done").touch()
    return directory


def make_reference(lab: Lab, name: str = "reference", *overrides: str) -> pathlib.Path:
    """Returns the work directory of a run that nothing has disturbed."""
    return make_once(lab, name, lambda workdir: lab.train(workdir, "checkpoint.keep=8", *overrides))


def copy_until(source: pathlib.Path, target: pathlib.Path, last: int, *, cut: bool = True) -> pathlib.Path:
    """Copies a finished run as it was after the checkpoint of step `last`, and returns the target.

    cut: the log, too.
    """
    shutil.copytree(source, target)
    if cut:
        kept = [row for row in rows(source) if row["step"] <= last]
        (target / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    for step in checkpoint_steps(target):
        if step > last:
            shutil.rmtree(target / "checkpoints" / str(step))
    return target


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns metrics.jsonl as far as it has been written."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def losses(workdir: pathlib.Path) -> dict[int, str]:
    """Returns each step's loss to the bit; no step stands there twice, and they rise."""
    found = [(row["step"], row["loss"].hex()) for row in rows(workdir) if "loss" in row]
    steps = [step for step, _ in found]
    assert steps == sorted(set(steps)), f"steps are not strictly rising: {steps}"
    return dict(found)


def validations(workdir: pathlib.Path) -> dict[int, str]:
    found = [(row["step"], row["val_loss"].hex()) for row in rows(workdir) if "val_loss" in row]
    steps = [step for step, _ in found]
    assert steps == sorted(set(steps)), f"validations are not strictly rising: {steps}"
    return dict(found)


def assert_equals_reference(workdir: pathlib.Path, reference: pathlib.Path, abstract: Any) -> None:
    """Asserts that a run has the losses, the logs and the newest state of the reference run, to the bit."""
    assert list(losses(workdir)) == list(range(1, max(losses(reference)) + 1))
    assert losses(workdir) == losses(reference)
    assert validations(workdir) == validations(reference)
    assert len(rows(workdir)) == len(losses(reference)) + len(validations(reference)), "there are other lines"
    assert event_steps(workdir, "train/loss") == list(losses(reference))
    assert event_steps(workdir, "eval/loss") == list(validations(reference))
    assert restored_bytes(workdir, abstract) == restored_bytes(reference, abstract)


def last_step(workdir: pathlib.Path) -> int:
    return max((row["step"] for row in rows(workdir)), default=0)


def checkpoint_steps(workdir: pathlib.Path) -> list[int]:
    directory = workdir / "checkpoints"
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit()) if directory.exists() else []


def temporary_directories(workdir: pathlib.Path) -> list[str]:
    directory = workdir / "checkpoints"
    return sorted(p.name for p in directory.iterdir() if "tmp" in p.name) if directory.exists() else []


def event_steps(workdir: pathlib.Path, tag: str) -> list[int]:
    """Returns the steps of the scalar `tag` that TensorBoard shows of its files, in their order."""
    steps = []
    for path in sorted((workdir / "tensorboard").glob("events*")):
        data, start = path.read_bytes(), 0
        while start + 16 < len(data):
            (length,) = struct.unpack_from("<Q", data, start)  # a TFRecord: length, its checksum, data, its checksum
            if start + 16 + length > len(data):  # torn by a kill: TensorBoard continues with the next file
                break
            event = event_pb2.Event.FromString(data[start + 12 : start + 12 + length])
            if event.session_log.status == event_pb2.SessionLog.START:
                steps = [step for step in steps if step < event.step]
            steps += [event.step for value in event.summary.value if value.tag == tag]
            start += 16 + length
    return steps


def said(workdir: pathlib.Path) -> str:
    """Returns what the process of Lab.start has printed."""
    path = workdir.with_suffix(".out")
    return path.read_text(errors="replace") if path.exists() else ""


def is_compiling(workdir: pathlib.Path) -> bool:
    """Returns whether a process of Lab.start with JAX_LOG_COMPILES=1 has begun to compile the train step."""
    return "Compiling jit(train_step)" in said(workdir)


def wait_until_stopped(process: subprocess.Popen[str]) -> None:
    """Waits for GPTJAX_FAULT=...:stop, after which nothing moves in the process until SIGCONT."""
    stat = pathlib.Path(f"/proc/{process.pid}/stat")
    wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", process)


def make_run_on(config: Config, devices: int = 1, **_: object) -> Any:
    """Returns the Run of `config` on the first so many of this process's devices."""
    original = run_setup.make_mesh
    run_setup.make_mesh = lambda mesh: make_mesh(mesh, jax.devices()[:devices])
    try:
        return run_setup.make_run(config)
    finally:
        run_setup.make_mesh = original


def restored_bytes(workdir: pathlib.Path, abstract: Any) -> tuple[int, list[bytes]]:
    """Returns the step and the raw bytes of every array of the newest checkpoint."""
    restored = Checkpointer(str(workdir)).restore_latest(abstract)
    assert restored is not None
    return restored[1].step, state_bytes(restored[0])


def leaf_bytes(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def state_bytes(state: Any) -> list[bytes]:
    return leaf_bytes((state.params, state.opt_state))


def wait_for(
    condition: Callable[[], Any],
    process: subprocess.Popen[str] | None = None,
    *,
    seconds: float = 120,
    pause: float = 0.005,
) -> Any:
    """Returns the first true value of condition(), asked every `pause` seconds; fails when the process has ended.

    To ask more often takes the processor from what is waited for.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        assert process is None or process.poll() is None, f"the process has ended with code {process.returncode}"
        time.sleep(pause)
    return value


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
