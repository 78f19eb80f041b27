"""What a run tells of itself: metrics.jsonl, TensorBoard, Weights & Biases, and one line on the screen."""

import contextlib
import json
import logging
import math
import os
import pathlib
import queue
import shutil
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from gptjax import goodput
from gptjax.chips import find_chip
from gptjax.config import Config
from gptjax.goodput import Stopwatch, duration

log = logging.getLogger("gptjax")
WAITING_ROWS = 1000  # for a tracker that does not answer: then it is off
LAST_ROWS_SECONDS = 5.0  # for which a run that ends waits for its tracker


def peak_flops(device: Any) -> float:
    """Returns the peak FLOP/s of a device, or nan where it is not known."""
    chip = find_chip(device.device_kind)
    return chip.peak_flops if chip else math.nan


class RunLog:
    """The log files of one run, in `directory`; close it.

    metrics.jsonl is the truth: what comes after step `resumed_from` is cut from it, and TensorBoard's events are
    written anew from what is left, so that no step stands in either of them twice.
    """

    def __init__(self, directory: str, config: Config, *, resumed_from: int) -> None:
        path, project = pathlib.Path(directory) / "metrics.jsonl", config.log.wandb_project
        kept = cut_to_step(path, resumed_from)
        self.last_validation = max((row["step"] for row in kept if "val_loss" in row), default=-1)
        self._file = _GrowingFile(path)
        self._tensorboard = _Events(path.parent / "tensorboard", kept) if config.log.tensorboard else None
        self._tracker = _Tracker(project, directory, config.to_dict()) if project else None

    def write(self, row: dict[str, Any]) -> None:
        """Appends one object, which has a `step`; a number that is not finite becomes null."""
        row = _finite(row)
        self._file.write((json.dumps(row) + "\n").encode())
        if self._tensorboard:
            self._tensorboard.write(row)
        if self._tracker:
            self._tracker.write(row)

    def write_text(self, name: str, text: str, step: int) -> None:
        if self._tensorboard:
            self._tensorboard.write_text(name, text, step)

    def sync(self) -> None:
        """Returns when all that was written is on disk, or has been told not to be."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._tracker:
            self._tracker.close()


class _GrowingFile:
    """A file to which bytes are appended; what a full disk does not take is kept, and written when there is room."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path, self._file = path, open(path, "ab", buffering=0)  # noqa: SIM115
        self._kept, self._told = b"", False

    def write(self, data: bytes) -> None:
        self._kept += data
        try:
            while self._kept:
                self._kept = self._kept[self._file.write(self._kept) :]  # which may be a part of it
        except OSError as error:
            self._tell(error)

    def sync(self) -> None:
        self.write(b"")
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._tell(error)

    def close(self) -> None:
        self.write(b"")
        if self._kept:
            log.warning("%s: there was no room for the last %d bytes", self._path, len(self._kept))
        self._file.close()

    def _tell(self, error: OSError) -> None:
        if not self._told:
            log.warning("%s: %s: kept until there is room, training goes on", self._path, error.strerror)
        self._told = True


class _Events:
    """TensorBoard's file of events. tensorboardX's own writer would hang a run: its thread ends at a full disk."""

    def __init__(self, directory: pathlib.Path, rows: list[dict[str, Any]]) -> None:
        with _without_torch():
            from tensorboardX import record_writer, summary  # slow to import
            from tensorboardX.proto import event_pb2, summary_pb2

        events: Any = event_pb2  # their classes are made when they are imported
        values: Any = summary_pb2

        self._checksum, self._summary = record_writer.masked_crc32c, summary
        self._event, self._values = events.Event, values.Summary
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(exist_ok=True)
        self._file = _GrowingFile(directory / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}")
        self._append(self._event(wall_time=time.time(), file_version="brain.Event:2"))
        for row in rows:
            self.write(row)

    def write(self, row: dict[str, Any]) -> None:
        numbers = {n: v for n, v in row.items() if n != "step" and n.isascii() and isinstance(v, int | float)}
        numbers = {name: value for name, value in numbers.items() if isinstance(value, float) or abs(value) < 2**63}
        values = [self._values.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._append(self._event(wall_time=time.time(), step=row["step"], summary=self._values(value=values)))

    def write_text(self, name: str, text: str, step: int) -> None:
        self._append(self._event(wall_time=time.time(), step=step, summary=self._summary.text(name, text)))

    def _append(self, event: Any) -> None:
        data = event.SerializeToString()  # as a TFRecord: length, its checksum, data, its checksum
        length = struct.pack("<Q", len(data))
        sums = [struct.pack("<I", self._checksum(part)) for part in (length, data)]
        self._file.write(length + sums[0] + data + sums[1])

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Keeps tensorboardX from importing torch, whose arrays it would take: 1.7 s of each start."""
    if "torch" in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    modules["torch"] = None
    try:
        yield
    finally:
        del modules["torch"]


class _Tracker:
    """Weights & Biases in a thread of its own: neither what it raises nor what it waits for stops a run."""

    def __init__(self, project: str, directory: str, config: Any) -> None:
        self._project, self._is_on = project, True
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue(WAITING_ROWS)
        self._thread = threading.Thread(target=self._run, args=(directory, config), daemon=True, name="tracker")
        self._thread.start()

    def write(self, row: dict[str, Any] | None) -> None:
        try:
            if self._is_on:
                self._rows.put_nowait(row)
        except queue.Full:
            self._turn_off("it does not answer")

    def close(self) -> None:
        self.write(None)
        self._thread.join(LAST_ROWS_SECONDS)
        if self._thread.is_alive():
            self._turn_off(f"it has not taken the last rows in {LAST_ROWS_SECONDS:.0f} s")

    def _run(self, directory: str, config: Any) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]

            run = wandb.init(project=self._project, dir=directory, config=config, resume="allow", id=_run_id(directory))
            while self._is_on and (row := self._rows.get()) is not None:
                run.log(row, step=row["step"])
            run.finish()
        except Exception as error:
            self._turn_off(error)

    def _turn_off(self, reason: object) -> None:
        if self._is_on:
            log.warning("log.wandb_project=%r: wandb is off: %s", self._project, " ".join(str(reason).split()))
        self._is_on = False


def cut_to_step(path: pathlib.Path, step: int) -> list[dict[str, Any]]:
    """Cuts a metrics file after `step`, dropping a torn last line too, and returns the rows that are left."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] <= step:
            kept.append(row)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    os.replace(temporary, path)
    return kept


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _run_id(directory: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in os.path.abspath(directory))[-64:].strip("-")


class Reporter:
    """Tells of a run's steps, validations and samples: in its log files, and on the screen; close it.

    On a terminal one line follows the run; elsewhere each report is a line of its own.
    """

    def __init__(
        self,
        directory: str,
        config: Config,
        *,
        resumed_from: int,
        watch: Stopwatch,
        compiled: bool,
        started_at: float,
        rollbacks: int,
        tokens_per_step: int,
        flops_per_step: float,
        peak_flops: float,
    ) -> None:
        """Opens the logs, cut to step `resumed_from`.

        compiled: whether the first dispatch will be one like the others. started_at: when the run was first started.
        """
        self.directory, self._train, self._save_every = directory, config.train, config.checkpoint.save_every
        self._log = RunLog(directory, config, resumed_from=resumed_from)
        self.watch, self._started_at, self._rollbacks = watch, started_at, rollbacks
        self._accounted = resumed_from
        self._tokens, self._flops, self._peak = tokens_per_step, flops_per_step, peak_flops
        self._since, self._spent = resumed_from, dict(self.watch.spent)
        if not compiled:
            self._since += config.train.steps_per_dispatch
        self._live = _start_live()

    def report_step(self, step: int, row: dict[str, float], *, skipped: int) -> None:
        """Reports the metrics of one step, every train.log_every steps and at the last one."""
        if step % self._train.log_every and step != self._train.num_steps:
            return
        since = {kind: self.watch.spent.get(kind, 0.0) - self._spent.get(kind, 0.0) for kind in goodput.OF_STEPS}
        steps, seconds = step - self._since, sum(since.values())
        self._since, self._spent = step, dict(self.watch.spent)
        rate = steps * self._tokens / seconds if steps > 0 and seconds else math.nan
        row = {
            "step": step,
            **row,
            "tokens_per_second": rate,
            "mfu": rate * self._flops / self._tokens / self._peak,
            "step_seconds": self._tokens / rate,
            "data_wait": since["data_wait"] / seconds if steps > 0 and seconds else math.nan,
        }
        counts = {"skipped_steps": skipped, "rollbacks": self._rollbacks}
        self._log.write(row | {name: count for name, count in counts.items() if count} | self._account(step))
        self._show(step_line(row, self._train.num_steps))

    def _account(self, step: int) -> dict[str, float]:
        """Returns where the time has gone, about once a save and at the last step."""
        if step - self._accounted < self._save_every and step != self._train.num_steps:
            return {}
        self._accounted = step
        return goodput.scalars(self.watch.spent, time.time() - self._started_at)

    def report_validation(self, step: int, result: dict[str, float]) -> None:
        if step > self._log.last_validation:  # it is there already where a preemption came right after it
            self._log.write({"step": step, **result})
        log.info("step %d  validation loss %.4f  perplexity %.2f  bits per byte %.3f", step, *result.values())

    def report_sample(self, step: int, text: str) -> None:
        self._log.write_text("sample", text, step)
        samples = _GrowingFile(pathlib.Path(self.directory) / "samples.txt")
        samples.write(f"--- step {step}\n{text}\n".encode())
        samples.close()
        log.info("step %d  sample:\n%s", step, text)

    def _show(self, line: str) -> None:
        if self._live is None:
            log.info("%s", line)
        else:
            self._live.update(line)

    def sync(self) -> None:
        self._log.sync()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            _follow_stdout()
        self._log.close()


def step_line(row: dict[str, float], num_steps: int) -> str:
    """Returns a step's metrics as one line."""
    what = f"step {row['step']}/{num_steps}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  grad {row['grad_norm']:.2f}"
    if not math.isfinite(row["tokens_per_second"]):  # the first dispatch of a process: its time is compilation
        return what
    left = (num_steps - row["step"]) * row["step_seconds"]
    return (
        f"{what}  {row['tokens_per_second']:,.0f} tokens/s  mfu {_percent(row['mfu'])}  "
        f"{duration(row['step_seconds'])}/step  wait {_percent(row['data_wait'])}  eta {duration(left)}"
    )


def _start_live() -> Any:
    """Returns a line at the bottom of the terminal that log lines scroll above, or None where there is no terminal."""
    if not sys.stdout.isatty():
        return None
    from rich.live import Live

    live = Live(refresh_per_second=4, redirect_stdout=True)
    live.start()
    _follow_stdout()
    return live


def _follow_stdout() -> None:
    """Makes log lines go where stdout goes now: while the live line runs, above it."""
    for handler in log.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stdout)


def _percent(share: float | None) -> str:
    return "n/a" if share is None or not math.isfinite(share) else f"{100 * share:.1f}%"
