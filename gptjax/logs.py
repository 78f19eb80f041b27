"""The logs of a run: metrics.jsonl, TensorBoard, Weights & Biases."""

import contextlib
import errno
import io
import json
import logging
import math
import os
import pathlib
import queue
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

from gptjax.config import Config
from gptjax.errors import install
from gptjax.log_tags import STATS, tagged
from gptjax.redaction import shown
from gptjax.strict_json import InvalidTextError, parse_json
from gptjax.workdir import LARGEST_FILE, METRICS_FILE, TENSORBOARD, is_at, open_file, open_regular

log = logging.getLogger("gptjax")
BLOCK_BYTES = 2**16
LONGEST_LINE = 2**20  # bytes; a row of a run has a few hundred
DAMAGED = b"\0"  # the end of a line that is too long: no row contains it
LARGEST_BACKLOG = 2**26  # bytes kept of a log that cannot be written
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
WAITING_ROWS = 1000  # rows queued for the tracker before it counts as hung
EVENTS_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\.")
SHOWN_ROWS = 10_000  # rows of an earlier log given to TensorBoard, which draws 1,000 per metric
LAST_ROWS_SECONDS = 5.0  # how long the end of a run waits for its tracker
LARGEST_INT = 2**63  # larger integers of a damaged row are not plotted


class RunLog:
    """The log files of one run, in `directory`; close it.

    metrics.jsonl is the source of truth: rows after step `resumed_from` are removed from it. TensorBoard's files are
    not changed: the new one begins with an event at which TensorBoard drops the events after that step. So no step
    appears twice in either, and a restart reads only as much as it removes.
    """

    def __init__(self, directory: str, config: Config, *, resumed_from: int) -> None:
        path = pathlib.Path(directory) / METRICS_FILE
        project = config.log.wandb_project
        kept = _cut_or_warn(path, resumed_from)
        validations = [row["step"] for row in kept if "val_loss" in row]
        self.last_validation = max(validations, default=-1)
        self._file = GrowingFile(path)
        self._tensorboard = _open_events(path.parent, resumed_from) if config.log.tensorboard else None
        self._tracker = _Tracker(project, directory, config.to_dict()) if project else None

    def write(self, row: dict[str, Any]) -> None:
        """Appends one object, which has a `step`; a number that is not finite becomes null."""
        row = _finite(row)
        line = json.dumps(row) + "\n"
        self._file.write(line.encode())
        if self._tensorboard:
            self._tensorboard.write(row)
        if self._tracker:
            self._tracker.write(row)

    def write_text(self, name: str, text: str, step: int) -> None:
        """Writes a text to TensorBoard, under `name`."""
        if self._tensorboard:
            # Indented, so that TensorBoard's Markdown shows it verbatim: a sample must not load links or pictures.
            lines = [f"    {line}\n" for line in shown(text).split("\n")]
            self._tensorboard.write_text(name, "".join(lines), step)

    def sync(self) -> None:
        """Flushes all metrics to disk, with a warning where that fails; files that were removed are re-created."""
        self._file.sync()
        if self._tensorboard:
            self._tensorboard.renew()

    def close(self) -> None:
        """Closes all logs."""
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._tracker:
            self._tracker.close()


class GrowingFile:
    """A file to which bytes are appended. Bytes that cannot be written are kept, up to LARGEST_BACKLOG, for later.

    It never raises OSError, because a log must not end a run. It warns about the first one.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._kept = b""
        self._has_warned = False
        self._file: BinaryIO | None = None
        self.write(b"")  # creates the file

    def write(self, data: bytes) -> None:
        """Appends all kept bytes and `data`, as far as they can be written."""
        self._kept = (self._kept + data)[-LARGEST_BACKLOG:]
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open_file(self._path.parent, self._path.name, "ab")
            while self._kept:
                # The file is unbuffered, so a write may take only a part: a full disk does so before it raises.
                written = self._file.write(self._kept)
                self._kept = self._kept[written:]
        except OSError as error:
            self._fail(error)

    def renew(self) -> None:
        """Re-creates the file if its path no longer refers to it: it was removed, moved or replaced."""
        if self._file is not None and not is_at(self._file, self._path):
            self._drop()
        self.write(b"")

    def sync(self) -> None:
        """Flushes to disk all bytes that could be written."""
        self.renew()
        try:
            if self._file is not None:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Writes the kept bytes, warns about bytes that are lost, and closes the file."""
        self.write(b"")
        if self._kept:
            log.warning("%s: the last %d bytes could not be written", self._path, len(self._kept))
        self._drop()

    def _fail(self, error: OSError) -> None:
        """Warns once. The next write reopens the file, because its descriptor may be stale (ESTALE)."""
        if not self._has_warned:
            until = "there is space" if error.errno in NO_ROOM else "it can be written"
            log.warning("%s: %s: buffering until %s; training continues", self._path, error.strerror, until)
        self._has_warned = True
        self._drop()

    def _drop(self) -> None:
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        self._file = None


def _open_events(directory: pathlib.Path, resumed_from: int) -> "_Events | None":
    try:
        return _Events(directory, resumed_from)
    except OSError as error:
        log.warning("%s: %s: TensorBoard is off, training continues", directory / TENSORBOARD, error.strerror)
        return None


class _Events:
    """TensorBoard's event file. tensorboardX's own writer could hang a run: its thread dies when the disk is full.

    Each start writes a new file. The first one receives the rows that metrics.jsonl already has.
    """

    def __init__(self, directory: pathlib.Path, resumed_from: int) -> None:
        with _without_torch():
            from tensorboardX import record_writer, summary  # slow to import
            from tensorboardX.proto import event_pb2, summary_pb2

        # Any, because protobuf creates their classes at import time, where no type checker sees them.
        events: Any = event_pb2
        summaries: Any = summary_pb2
        self._masked_crc = record_writer.masked_crc32c
        self._text_summary = summary.text
        self._event = events.Event
        self._summary = summaries.Summary

        folder = directory / TENSORBOARD
        folder.mkdir(exist_ok=True)
        matches = [EVENTS_NAME.match(name) for name in os.listdir(folder)]
        earlier = [int(match[1]) for match in matches if match]
        # TensorBoard reads files in the order of their names, which must not depend on a clock that was set back.
        number = max([int(time.time()), *(n + 1 for n in earlier)])
        self._file = GrowingFile(folder / f"events.out.tfevents.{number:010}.{socket.gethostname()}")
        self._append(file_version="brain.Event:2")
        if earlier:
            start = events.SessionLog(status=events.SessionLog.START)
            self._append(step=resumed_from + 1, session_log=start)
            return
        with contextlib.suppress(FileNotFoundError):
            for row in thinned_rows(directory / METRICS_FILE):
                self.write(row)

    def write(self, row: dict[str, Any]) -> None:
        values = []
        for name, value in tagged(row).items():
            # A row of an earlier log can have any keys and values.
            if name.isascii() and _is_plottable(value):
                values.append(self._summary.Value(tag=name, simple_value=value))
        self._append(step=row["step"], summary=self._summary(value=values))

    def renew(self) -> None:
        """Re-creates the file if it was removed."""
        self._file.renew()

    def write_text(self, name: str, text: str, step: int) -> None:
        self._append(step=step, summary=self._text_summary(name, text))

    def _append(self, **fields: Any) -> None:
        """Appends an event as a TFRecord: length, its checksum, data, its checksum."""
        event = self._event(wall_time=time.time(), **fields)
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        record = [length, self._checksum(length), data, self._checksum(data)]
        self._file.write(b"".join(record))  # in one write, so that a kill tears at most the last record

    def _checksum(self, data: bytes) -> bytes:
        return struct.pack("<I", self._masked_crc(data))

    def close(self) -> None:
        self._file.close()


def _is_plottable(value: object) -> bool:
    if isinstance(value, int):
        return abs(value) < LARGEST_INT
    return isinstance(value, float)


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Keeps tensorboardX from importing torch, which would add 1.7 s to each start."""
    if "torch" in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    modules["torch"] = None  # makes `import torch` raise ImportError, which tensorboardX handles
    try:
        yield
    finally:
        del modules["torch"]


class _Tracker:
    """Weights & Biases in a thread of its own, so that neither its errors nor its network stop a run."""

    def __init__(self, project: str, directory: str, config: Any) -> None:
        self._project = project
        self._is_on = True
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue(WAITING_ROWS)  # None ends the thread
        # A daemon: a process must be able to exit while wandb waits for a server.
        self._thread = threading.Thread(
            target=self._run,
            args=(directory, config),
            daemon=True,
            name="tracker",
        )
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

            run = wandb.init(
                project=self._project,
                dir=directory,
                config=config,
                resume="allow",
                id=_run_id(directory),
            )
            while self._is_on and (row := self._rows.get()) is not None:
                run.log(tagged(row), step=row["step"])
            run.finish()
        except ModuleNotFoundError as error:
            self._turn_off(f"{error.name} is not installed; {install('wandb')}")
        except Exception as error:  # a tracker must not end a run
            self._turn_off(error)

    def _turn_off(self, reason: object) -> None:
        if self._is_on:
            one_line = " ".join(str(reason).split())
            log.warning("log.wandb_project=%r: wandb is off: %s", self._project, one_line)
        self._is_on = False


def cut_to_step(path: pathlib.Path, step: int) -> list[dict[str, Any]]:
    """Removes the rows after `step`, and damaged lines among them, from a metrics file, in place.

    It reads backwards from the end of the file, until a stretch of BLOCK_BYTES has nothing to remove.

    Returns:
        The rows that it has read and kept, the newest first.

    Raises:
        OSError: the file cannot be read or truncated.
    """
    try:
        file = os.fdopen(open_regular(path, os.O_RDWR), "r+b")
    except FileNotFoundError:
        return []
    kept_lines: list[bytes] = []  # the newest first, as is `kept`
    kept: list[dict[str, Any]] = []
    with file:
        size = os.fstat(file.fileno()).st_size
        cut = size  # the file is rewritten from here on
        num_moved = 0  # kept lines after `cut`, which are written again
        next_start = size  # where the line after the current one starts
        for start, line in lines_backwards(file):
            if cut - next_start > BLOCK_BYTES:
                break
            next_start = start
            rows = [row for row in parse_rows(line) if row["step"] <= step]
            kept_lines += [line] * len(rows)
            kept += rows
            lacks_line_end = start + len(line) == size
            if not rows or lacks_line_end:
                cut = start
                num_moved = len(kept)
        if cut < size:
            file.seek(cut)
            moved = reversed(kept_lines[:num_moved])
            file.writelines(line + b"\n" for line in moved)
            file.truncate()
    return kept


def _cut_or_warn(path: pathlib.Path, step: int) -> list[dict[str, Any]]:
    try:
        return cut_to_step(path, step)
    except OSError as error:
        message = "%s: %s: not truncated to step %d: some steps will appear twice; training continues"
        log.warning(message, path, error.strerror, step)
        return []


def rows_after(directory: str, step: int) -> Iterator[dict[str, Any]]:
    """Yields the rows of a run's metrics after `step`, the newest first; none where the file cannot be read."""
    path = os.path.join(directory, METRICS_FILE)
    # Suppressed, because the rows only feed the account of lost time.
    with contextlib.suppress(OSError), os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        for _, line in lines_backwards(file):
            for row in parse_rows(line):
                if row["step"] <= step:
                    return
                yield row


def thinned_rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a metrics file; if it has more than SHOWN_ROWS, every n-th row and all validations.

    Rows of steps and of statistics are counted separately: they alternate, and a stride could leave one kind out.

    Raises:
        OSError: it cannot be read.
    """
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        blocks = iter(lambda: file.read(LONGEST_LINE), b"")
        num_lines = sum(block.count(b"\n") for block in blocks)
        stride = 1 + num_lines // SHOWN_ROWS
        file.seek(0)
        lines = iter(lambda: file.readline(LONGEST_LINE), b"")  # bounded: a hole has no line end
        counts = {True: 0, False: 0}
        stats_key = f'"{STATS}'.encode()
        for line in lines:
            is_stats = stats_key in line
            if counts[is_stats] % stride == 0 or b'"val_loss"' in line:
                yield from parse_rows(line)
            counts[is_stats] += 1


def lines_backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, line without its end), from the last to the first, with one block and one line in memory.

    A line of more than LONGEST_LINE bytes, such as a hole left by a power failure, ends in DAMAGED.

    Raises:
        OSError: more than LARGEST_FILE bytes have been read.
    """
    size = file.seek(0, os.SEEK_END)
    end = size
    rest = b""  # the part of a line that was found in the later blocks
    while end > 0:
        if size - end > LARGEST_FILE:
            raise OSError(errno.EFBIG, f"more than {LARGEST_FILE:,} bytes to be searched")
        start = max(0, end - BLOCK_BYTES)
        file.seek(start)
        block = file.read(end - start)
        stop = len(block)
        while (found := block.rfind(b"\n", 0, stop)) >= 0:
            yield start + found + 1, block[found + 1 : stop] + rest
            stop = found
            rest = b""
        rest = block[:stop] + rest if len(rest) <= LONGEST_LINE else DAMAGED
        end = start
    yield 0, rest


def parse_rows(content: bytes) -> Iterator[dict[str, Any]]:
    """Yields the rows of a metrics file. Invalid lines, such as a last one truncated by a kill, are skipped.

    Numbers that are not finite become None.
    """
    for line in io.BytesIO(content):
        try:
            row = parse_json(line, dict, nan="null")
        except InvalidTextError:
            continue
        step = row.get("step")
        if type(step) is int and 0 <= step <= sys.maxsize:  # not isinstance: true is an int, too
            yield row


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """Returns `row` with None, JSON's null, for nan and infinities, which JSON does not have."""
    finite = dict(row)
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            finite[name] = None
    return finite


def _run_id(directory: str) -> str:
    """Returns a run id that wandb accepts, the same after each restart."""
    name = "".join(c if c.isalnum() else "-" for c in os.path.abspath(directory))
    return name[-64:].strip("-")
