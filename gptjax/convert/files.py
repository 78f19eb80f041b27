"""Finds the files of an untrusted model directory, and nothing outside it."""

import os
from typing import Any

from gptjax.errors import DataError, one_line
from gptjax.strict_json import InvalidTextError, parse_json, read_at_most
from gptjax.workdir import kind_of

LONGEST_NAME = 255  # characters
LARGEST_JSON = 32 * 2**20  # bytes; the index of a model with ten thousand tensors needs about one MiB


def resolve_inside(directory: str, name: str) -> str:
    """Returns the real path of the file `name` of `directory`, which may be a link.

    A link must stay in the directory. In a snapshot of a Hugging Face cache it may lead to the cache's own `blobs`.

    Raises:
        DataError: the name or a link leads outside, or to something that is not a regular file.
        FileNotFoundError: the file does not exist.
    """
    if not is_relative_name(name):
        raise DataError(f"{name[:LONGEST_NAME]!r} is not the name of a file inside it", field=directory)
    root = os.path.realpath(directory)
    path = os.path.realpath(os.path.join(root, name))
    if not any(os.path.commonpath([path, allowed]) == allowed for allowed in _allowed_roots(root)):
        raise DataError(f"{name!r} is a link that leads out of the directory", field=directory)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{directory}: no file {name!r}")
    if not os.path.isfile(path):  # opening a pipe would block forever
        raise DataError(f"{name!r} is not a file", field=directory)
    return path


def name_of(directory: str) -> str:
    """Returns the name of a model directory: in a cache of Hugging Face that of the repository, not of the commit."""
    parent, name = os.path.split(os.path.abspath(directory))
    store, kind = os.path.split(parent)
    # The directory of OWNER/NAME is models--OWNER--NAME.
    return os.path.basename(store).split("--")[-1] if kind == "snapshots" else name


def is_relative_name(name: str) -> bool:
    """Returns whether `name` is a printable relative path without `..`."""
    if not name or not name.isprintable() or len(name) > LONGEST_NAME:
        return False
    return not os.path.isabs(name) and "\\" not in name and ".." not in name.split("/")


def _allowed_roots(root: str) -> list[str]:
    """Returns the directories in which a file of the real directory `root` may be stored."""
    parent = os.path.dirname(root)
    if os.path.basename(parent) != "snapshots":
        return [root]
    # Not resolved: a `blobs` that is itself a link leads outside the cache.
    return [root, os.path.join(os.path.dirname(parent), "blobs")]


def require_regular(path: str) -> None:
    """Checks that a path, if it exists, is a regular file or a link to one, before it is opened or given to a library.

    Opening a pipe would block forever, and a device such as /dev/zero has no end.

    Raises:
        DataError: it is something else; the message says what it is.
    """
    try:
        kind = kind_of(os.stat(path).st_mode)
    except (OSError, ValueError):  # it does not exist, or its name is no name: opening it reports that
        return
    if kind:
        raise DataError(f"is {kind}, not a regular file", field=path)


def locate(directory: str, name: str) -> str | None:
    """Returns the path of the file `name` of `directory` after the checks of `resolve_inside`; None if it is missing.

    Raises:
        DataError: the name or a link leads outside, or to something that is not a regular file.
    """
    try:
        resolve_inside(directory, name)
    except FileNotFoundError:
        return None
    return os.path.join(directory, name)


def read_json(path: str) -> Any:
    """Returns the value in a small JSON file. NaN and infinities are accepted, because transformers writes them.

    Raises:
        DataError: `parse_json` rejects the file, or it is longer than LARGEST_JSON.
    """
    try:
        return parse_json(read_at_most(path, LARGEST_JSON), nan="keep")
    except OSError as error:
        raise DataError(f"cannot be read: {one_line(error)}", field=path) from error
    except InvalidTextError as error:
        raise DataError(one_line(error), field=path, remedy="expected a small JSON file") from error
