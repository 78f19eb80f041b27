"""An output is written under a temporary name beside its own, and moved to its name when it is complete."""

import contextlib
import itertools
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

from gptjax.errors import ConfigError, WorkdirError
from gptjax.workdir import is_empty, sync_path, sync_tree


class SideFile(NamedTuple):
    """A file that belongs beside an output, in the same directory."""

    name: str
    content: bytes


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


def _refuse_other(path: str, content: bytes, *, force: bool) -> None:
    """Checks that nothing but a file with `content` would be replaced at `path`; a directory never is."""
    if not os.path.lexists(path) or _holds_content(path, content):
        return
    if os.path.isdir(path):
        raise ConfigError("is a directory", field=path, remedy="remove it, or choose another directory")
    if not force:
        problem = "exists and differs from the file that belongs beside the output"
        raise ConfigError(problem, field=path, remedy="--force replaces it")


def _holds_content(path: str, content: bytes) -> bool:
    """Returns whether `path` is a regular file, or a link to one, with `content`."""
    with contextlib.suppress(OSError):  # a dangling link, or a file that only another user may read
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode) and status.st_size == len(content):
            with open(path, "rb") as file:
                return file.read() == content
    return False


@contextlib.contextmanager
def staged(
    path: str,
    *,
    force: bool,
    beside: SideFile | None = None,
) -> Iterator[str]:
    """Yields a temporary path next to `path`, which is moved to `path` at the end, or removed on failure.

    A link to an empty directory is followed; any other link is replaced, and its target is kept.

    beside: a file that appears with the output, or not at all. It may be there already with the same content.

    Raises:
        ConfigError: something has appeared at `path` meanwhile, or the file beside it exists with another content,
            and `force` is off; or both have one name.
        WorkdirError: `path` cannot be written.
    """
    final = os.path.realpath(path) if is_empty(path) else os.path.abspath(path)
    parent, name = os.path.split(final)
    if beside:
        if beside.name == name:
            raise ConfigError("the tokenizer's file has that name", field=path, remedy="choose another")
        _refuse_other(os.path.join(parent, beside.name), beside.content, force=force)
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
        with _placed(beside, parent, staging=staging, force=force):
            replace(new, final, aside=os.path.join(staging, "old"))
    except OSError as error:
        raise WorkdirError(f"cannot be written: {error.strerror or error}", field=path) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for directory in made:
            with contextlib.suppress(OSError):  # not empty: it has the result, or another process uses it
                os.rmdir(directory)


@contextlib.contextmanager
def _placed(
    beside: SideFile | None,
    directory: str,
    *,
    staging: str,
    force: bool,
) -> Iterator[None]:
    """Moves the file into `directory` before the body, and what was there back if the body fails.

    staging: a directory of the same file system for the new file and the old one.
    """
    if beside is None:
        yield
        return
    path = os.path.join(directory, beside.name)
    _refuse_other(path, beside.content, force=force)
    if _holds_content(path, beside.content):
        yield
        return
    new = os.path.join(staging, "new-beside")
    old = os.path.join(staging, "old-beside")
    with open(new, "wb") as file:
        file.write(beside.content)
    replace(new, path, aside=old)
    try:
        yield
    except BaseException:
        if os.path.lexists(old):
            os.rename(old, path)
        else:
            os.unlink(path)
        raise


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
