"""The logs of a run whose work directory is a bucket: they are written on this machine, and copied at each save.

Only process 0 copies them. A copy keeps the bucket's earlier rows, which another machine has written, or this one
before its local files were removed.
"""

import contextlib
import json
import logging
import pathlib
import shutil
from collections.abc import Iterator

from etils import epath

from gptjax.errors import one_line
from gptjax.logs import parse_rows
from gptjax.workdir import (
    DESCRIPTION,
    LOGS,
    METRICS_FILE,
    SAMPLES_FILE,
    TASKS_FILE,
    TENSORBOARD,
    is_bucket,
    read_file,
    read_regular,
    replace_file,
)

log = logging.getLogger("gptjax")


def fetch_logs(workdir: str, local: str) -> None:
    """Copies a bucket's logs to `local`, a directory of this machine, where its logs are missing or older.

    A failure is logged as a warning. It does nothing if `workdir` is no bucket.
    """
    if not is_bucket(workdir):
        return
    directory = pathlib.Path(local)
    with _warning_only(workdir):
        directory.mkdir(parents=True, exist_ok=True)
        is_behind = False  # whether the bucket has later steps than this machine
        for name in (METRICS_FILE, *DESCRIPTION, SAMPLES_FILE, TASKS_FILE):  # the first one decides about the others
            copy = directory / name
            original = epath.Path(workdir) / name
            if not original.exists():
                continue
            content = original.read_bytes()
            if name == METRICS_FILE:
                is_behind = not copy.exists() or _last_step(content) > _last_step(read_regular(copy))
            if copy.exists() and not is_behind:
                continue
            copy.parent.mkdir(exist_ok=True)
            replace_file(copy, content)
            if name == METRICS_FILE:  # the run re-creates TensorBoard's events from it
                shutil.rmtree(directory / TENSORBOARD, ignore_errors=True)


def store_logs(local: str, workdir: str) -> None:
    """Copies the logs in `local`, a directory of this machine, to a bucket.

    A failure is logged as a warning. It does nothing if `workdir` is no bucket.
    """
    if not is_bucket(workdir):
        return
    with _warning_only(workdir):
        for name in (*LOGS, TASKS_FILE):
            content = read_file(local, name)
            if content:
                stored = epath.Path(workdir) / name
                stored.parent.mkdir(parents=True, exist_ok=True)
                stored.write_bytes(_earlier_part(name, content, stored) + content)


@contextlib.contextmanager
def _warning_only(workdir: str) -> Iterator[None]:
    """Logs a failure as a warning, because a log never ends a run."""
    try:
        yield
    except Exception as error:  # each library of a bucket has exceptions of its own
        log.warning("%s: its logs could not be copied: %s; the run continues", workdir, one_line(error))


def _earlier_part(name: str, content: bytes, stored: epath.Path) -> bytes:
    """Returns the part of the bucket's file `stored` that precedes this machine's `content`, or b""."""
    if name not in (METRICS_FILE, SAMPLES_FILE) or not stored.exists():
        return b""
    first_line = content[: content.find(b"\n") + 1]
    with stored.open("rb") as file:
        if file.readline() == first_line:  # then `content` has all of the bucket's rows
            return b""
    old_content = stored.read_bytes()
    if name == SAMPLES_FILE:
        return old_content.partition(first_line)[0]
    first_step = min((row["step"] for row in parse_rows(content)), default=0)
    earlier = [row for row in parse_rows(old_content) if row["step"] < first_step]
    return "".join(json.dumps(row) + "\n" for row in earlier).encode()


def _last_step(metrics: bytes) -> int:
    """Returns the largest step in the content of a metrics.jsonl, -1 if it has no row."""
    return max((row["step"] for row in parse_rows(metrics)), default=-1)
