"""Profiler traces of a run, for TensorBoard or Perfetto.

A trace is a log: a failure to write it is a warning.
"""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator

import jax

from gptjax.errors import one_line
from gptjax.workdir import PROFILE, TRACES, check_profile

log = logging.getLogger("gptjax")


@contextlib.contextmanager
def profiled(wanted: bool, directory: str) -> Iterator[None]:
    """Writes a profiler trace of the block to `directory`/profile if `wanted`."""
    temporary = _start(directory) if wanted else ""
    try:
        yield
    finally:
        if temporary:
            _finish(temporary, directory)


def _start(directory: str) -> str:
    """Starts a trace and returns the directory that JAX will write it to; "" where that fails.

    JAX follows links, so it gets a new directory, at whose name nobody can have put one.
    """
    temporary = ""
    try:
        temporary = tempfile.mkdtemp(prefix=f"{PROFILE}-", dir=directory)
        jax.profiler.start_trace(temporary)
    except Exception as error:  # of the file system, or of JAX, whose profiler may be in use
        _warn(directory, error)
        shutil.rmtree(temporary, ignore_errors=True)
        return ""
    return temporary


def _finish(temporary: str, directory: str) -> None:
    """Stops the trace, and moves it to its place."""
    try:
        jax.profiler.stop_trace()
        target = os.path.join(check_profile(directory), TRACES)
        os.makedirs(target, exist_ok=True)
        with os.scandir(os.path.join(temporary, TRACES)) as entries:
            for entry in entries:
                os.rename(entry.path, os.path.join(target, entry.name))
    except Exception as error:  # as in _start
        _warn(directory, error)
    else:
        log.info("profile written to %s", os.path.join(directory, PROFILE))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _warn(directory: str, error: Exception) -> None:
    reason = getattr(error, "strerror", None) or one_line(error)
    path = os.path.join(directory, PROFILE)
    log.warning("%s: no trace was written: %s; training continues", path, reason)
