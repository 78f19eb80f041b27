"""An output is written under a temporary name beside its own, and moved to its name when it is complete."""

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator

from gptjax.errors import ConfigError, WorkdirError
from gptjax.workdir import is_empty, sync_path, sync_tree


def refuse_existing(path: str, *, force: bool) -> None:
    """Checks that nothing at `path` would be replaced, except an empty directory.

    Raises:
        ConfigError: something exists at `path`, and `force` is off.
        UnavailableError: it is a directory that cannot be listed now.
    """
    # abspath drops a trailing slash, with which a dangling link would seem not to exist.
    exists = os.path.lexists(os.path.abspath(path))
    if exists and not force and not is_empty(path):
        raise ConfigError("exists", field=path, remedy="--force replaces it")


@contextlib.contextmanager
def staged(path: str, *, force: bool) -> Iterator[str]:
    """Yields a temporary path next to `path`, which is moved to `path` at the end, or removed on failure.

    A link to an empty directory is followed; any other link is replaced, and its target is kept.

    Raises:
        ConfigError: something has appeared at `path` meanwhile, and `force` is off.
        WorkdirError: `path` cannot be written.
    """
    final = os.path.realpath(path) if is_empty(path) else os.path.abspath(path)
    parent, name = os.path.split(final)
    missing = itertools.takewhile(lambda directory: not os.path.lexists(directory), parents(parent))
    made = list(missing)  # before they are made
    try:
        os.makedirs(parent, exist_ok=True)
        staging = tempfile.mkdtemp(prefix=f".{name}.partial-", dir=parent)
    except OSError as error:
        raise WorkdirError(
            f"cannot be written: {error.strerror}",
            field=path,
            remedy="choose another",
        ) from error
    try:
        new = os.path.join(staging, "new")
        yield new
        refuse_existing(path, force=force)  # it may have appeared meanwhile
        replace(new, final, aside=os.path.join(staging, "old"))
    except OSError as error:
        raise WorkdirError(f"cannot be written: {error.strerror or error}", field=path) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for directory in made:
            with contextlib.suppress(OSError):  # not empty: it has the result, or another process uses it
                os.rmdir(directory)


def parents(path: str) -> Iterator[str]:
    """Yields `path` and the directories above it."""
    while True:
        yield path
        parent = os.path.dirname(path)
        if parent == path:
            return
        path = parent


def replace(
    new: str,
    path: str,
    *,
    aside: str,
) -> None:
    """Moves `new`, synced to disk, to `path`, and whatever was at `path` to `aside`.

    Raises:
        OSError: a move fails; whatever was at `path` is there as before.
    """
    sync_tree(new)
    if not os.path.lexists(path):
        os.rename(new, path)
        sync_path(os.path.dirname(os.path.abspath(path)))
        return
    os.rename(path, aside)
    try:
        os.rename(new, path)
        sync_path(os.path.dirname(os.path.abspath(path)))
    except BaseException:  # also a KeyboardInterrupt between the two moves
        os.rename(aside, path)
        raise
