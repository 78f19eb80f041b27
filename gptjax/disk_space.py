"""Checks, before a run starts, that a directory can be written; and measures its free space."""

import math
import secrets
import shutil

from etils import epath

from gptjax.errors import WorkdirError
from gptjax.workdir import is_bucket


def measure_free_space(directory: epath.Path, *, flag: str = "--workdir") -> float:
    """Returns the free bytes at `directory`, after a small file was written there and removed; inf for a bucket.

    A directory that was missing is removed afterwards, so that a run that is refused later leaves nothing behind.

    flag: names the directory.

    Raises:
        WorkdirError: nothing can be written there.
    """
    probe = directory / f".probe-{secrets.token_hex(8)}"  # a name that nobody can guess and put a link at
    try:
        is_missing = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_text("can be written\n")
        probe.unlink()
        free = math.inf if is_bucket(str(directory)) else shutil.disk_usage(directory).free
        if is_missing:
            directory.rmdir()
    except OSError as error:
        raise WorkdirError(
            f"cannot be written: {error.strerror}",
            field=str(directory),
            remedy=f"free it, or choose another {flag}",
        ) from error
    return free
