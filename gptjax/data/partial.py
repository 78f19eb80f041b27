"""The directory of an unfinished preparation: one process at a time holds it, and removes it at the end."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator

from gptjax.errors import WorkdirError
from gptjax.workdir import lock_file, open_regular

LOCK_FILE = "lock"


@contextlib.contextmanager
def hold(
    partial: str,
    out: str,
    log: Callable[[str], None],
) -> Iterator[None]:
    """Creates the directory `partial`, and locks it while the context lasts.

    While another process prepares `out`, this logs a line and waits. The kernel frees the lock of a process that died.

    Raises:
        OSError: the directory or its lock cannot be created.
    """
    path = os.path.join(partial, LOCK_FILE)
    descriptor = None
    while descriptor is None:
        os.makedirs(partial, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the process that held it has just removed the directory
            descriptor = _try_lock(path, out, log)
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def reporting_write_errors(out: str) -> Iterator[None]:
    """Raises WorkdirError about `out` for an OSError of the block."""
    try:
        yield
    except OSError as error:
        raise WorkdirError(f"cannot be written: {error}", field=out) from error


def _try_lock(
    path: str,
    out: str,
    log: Callable[[str], None],
) -> int | None:
    """Returns a descriptor of the locked file, None if its holder finished and removed it while we waited."""
    descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
    try:
        lock_file(descriptor, path, wait=False)
    except BlockingIOError:
        log(f"{out}: another process is preparing it: waiting")
        lock_file(descriptor, path, wait=True)
    if os.path.exists(path):
        locked = os.fstat(descriptor)
        if os.path.samestat(locked, os.stat(path)):  # otherwise this is the lock of a preparation that has finished
            return descriptor
    os.close(descriptor)
    return None


def remove(partial: str) -> None:
    """Removes the directory `partial`, which this process holds: its lock last.

    Raises:
        OSError: something in it cannot be removed.
    """
    for name in os.listdir(partial):
        path = os.path.join(partial, name)
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif name != LOCK_FILE:
            os.remove(path)
    os.remove(os.path.join(partial, LOCK_FILE))
    # Another process may have made a new lock in it by now. It will remove both.
    with contextlib.suppress(OSError):
        os.rmdir(partial)
