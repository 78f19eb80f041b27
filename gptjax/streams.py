"""Standard output and standard error of a command, also where they are closed, broken or full.

Standard error never raises. Standard output raises OutputError, so that a command whose product it is can end. After
`go_on_without_output` it never raises either. Log lines never end a command: see cli.
"""

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any

from gptjax.errors import OK, OutputError

NOBODY_READS = (errno.EPIPE, errno.EBADF)  # the reader has exited, or the shell closed the stream: no warning is needed
STDERR = 2  # file descriptor


class _Descriptor(io.RawIOBase):
    """A file descriptor for writing. Bytes that cannot be written are dropped, or raise OutputError."""

    def __init__(self, descriptor: int, *, required: bool, is_closed: bool) -> None:
        """required: whether a failure raises. is_closed: whether each write fails, since the stream was closed."""
        self._descriptor = descriptor
        self._is_closed = is_closed
        self.required = required
        self.is_told = False  # whether the user knows already that the stream fails

    def write(self, data: Any, /) -> int:
        content = bytes(data)
        try:
            self._write(content)
        except OSError as error:
            if self.required:
                raise _lost(error) from error
            self._warn(error)
        return len(content)

    def _write(self, content: bytes) -> None:
        if self._is_closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        while content:
            try:
                written = os.write(self._descriptor, content)
            except BlockingIOError:  # another process has set the pipe or terminal that we share to non-blocking
                select.select([], [self._descriptor], [])
                continue
            content = content[written:]

    def _warn(self, error: OSError) -> None:
        """Warns once on standard error that standard output fails."""
        if self.is_told or error.errno in NOBODY_READS or self._descriptor == STDERR:
            return
        self.is_told = True
        print(
            f"standard output: {error.strerror}: output that cannot be written is dropped", file=sys.stderr, flush=True
        )

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


_output: list[_Descriptor] = []  # standard output, once `open_streams` has replaced it


def _lost(error: OSError) -> OutputError:
    if error.errno == errno.EPIPE:  # the reader has exited because it had enough, as `head` does
        lost = OutputError("")
        lost.exit_code = OK
        return lost
    return OutputError(
        "it is closed" if error.errno == errno.EBADF else str(error.strerror),
        field="standard output",
        remedy="send it to a file or a pipe that can be written",
    )


def open_streams() -> None:
    """Replaces sys.stdout and sys.stderr of this process by the streams of this module.

    They write characters that their encoding lacks as backslash escapes. Descriptors 0 to 2 that are closed are opened
    on /dev/null. Otherwise the next files to be opened would get their numbers, and the output of libraries. Streams
    that are not the process's own, such as those of a test, are not replaced.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is `descriptor`
            os.set_inheritable(opened, True)
    if sys.stderr is sys.__stderr__:
        sys.stderr, _ = _replace(sys.__stderr__, STDERR, required=False)
    if sys.stdout is sys.__stdout__:
        sys.stdout, raw = _replace(sys.__stdout__, 1, required=True)
        _output[:] = [raw]


def _replace(old: Any, descriptor: int, *, required: bool) -> tuple[io.TextIOWrapper, _Descriptor]:
    is_closed = old is None
    if is_closed:
        descriptor = os.open(os.devnull, os.O_WRONLY)
    else:
        with contextlib.suppress(OSError):
            old.flush()
    raw = _Descriptor(descriptor, required=required, is_closed=is_closed)
    is_unbuffered = not is_closed and old.write_through  # set by PYTHONUNBUFFERED
    buffer: Any = raw if is_unbuffered else io.BufferedWriter(raw)
    text = io.TextIOWrapper(
        buffer,
        encoding="utf-8" if is_closed else old.encoding,
        errors="backslashreplace",
        line_buffering=is_closed or old.line_buffering,
        write_through=is_unbuffered,
    )
    return text, raw


def go_on_without_output(*, is_told: bool = False) -> None:
    """Lets the command continue if standard output cannot be written, because its product is not the output.

    is_told: whether the user knows already that it fails; otherwise one line on standard error reports it.
    """
    for raw in _output:
        raw.required = False
        raw.is_told = raw.is_told or is_told
