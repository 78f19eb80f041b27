"""Reads the metrics of an earlier run, from the newest row to the oldest."""

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from gptjax.errors import one_line
from gptjax.logs import lines_backwards, parse_rows
from gptjax.workdir import METRICS_FILE, is_bucket, open_regular, read_file


def newest_rows(workdir: str, *, having: bytes = b"") -> Iterator[dict[str, Any]]:
    """Yields the rows of a run's metrics.jsonl, the newest first; none if the file is missing.

    A local file is read a block at a time, so that a caller that stops early reads little of a large one.

    workdir: local or in a bucket.
    having: the rows of lines without these bytes are left out, unparsed.

    Raises:
        OSError: it cannot be read, is not a regular file, or LARGEST_FILE bytes of it do not suffice.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_metrics(workdir))
        except FileNotFoundError:
            return
        for _, line in lines_backwards(file):
            if having in line:
                yield from parse_rows(line)


def open_metrics(workdir: str) -> BinaryIO:
    """Returns a run's metrics.jsonl, open for reading; of one in a bucket, its content.

    Raises:
        FileNotFoundError: a local one is missing.
        OSError: it cannot be read, or is not a regular file.
    """
    if not is_bucket(workdir):
        return os.fdopen(open_regular(os.path.join(workdir, METRICS_FILE), os.O_RDONLY), "rb")
    try:
        return io.BytesIO(read_file(workdir, METRICS_FILE) or b"")
    except Exception as error:  # each library of a bucket has exceptions of its own
        raise OSError(one_line(error)) from error
