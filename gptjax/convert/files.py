"""Finds the files of a model directory that somebody else made, and nothing outside it."""

import json
import os
from typing import Any

from gptjax.errors import DataError, plain

LONGEST_NAME = 255  # letters
LARGEST_JSON = 32 * 2**20  # an index of ten thousand tensors takes one


def resolve_inside(directory: str, name: str) -> str:
    """Returns the real path of the file `name` of `directory`, which may be a link.

    A link has to stay in the directory. In a snapshot of a Hugging Face cache it may lead to the cache's own `blobs`.

    Raises:
        DataError: the name or a link leads elsewhere, or to what is not a file.
        FileNotFoundError: there is no such file.
    """
    unlike = not name or not name.isprintable() or len(name) > LONGEST_NAME or os.path.isabs(name) or "\\" in name
    if unlike or ".." in name.split("/"):
        raise DataError(f"{directory}: {name[:LONGEST_NAME]!r} is not the name of a file inside it")
    root = os.path.realpath(directory)
    allowed = [root]
    if os.path.basename(os.path.dirname(root)) == "snapshots":
        # Not resolved: a `blobs` that is itself a link leads elsewhere.
        allowed.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
    path = os.path.realpath(os.path.join(root, name))
    if not any(os.path.commonpath([path, place]) == place for place in allowed):
        raise DataError(f"{directory}: {name!r} is a link that leads out of the directory")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{directory}: there is no {name!r}")
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise DataError(f"{directory}: {name!r} is not a file")
    return path


def locate(directory: str, name: str) -> str | None:
    """Returns the path of the file `name` of `directory` after the checks of `resolve_inside`; None if it is not there.

    Raises:
        DataError: the name or a link leads elsewhere, or to what is not a file.
    """
    try:
        resolve_inside(directory, name)
    except FileNotFoundError:
        return None
    return os.path.join(directory, name)


def read_json(path: str) -> Any:
    """Returns what a small JSON file says.

    Raises:
        DataError: it is no JSON, or enormous.
    """
    if os.path.getsize(path) > LARGEST_JSON:
        raise DataError(f"{path}: {os.path.getsize(path)} bytes; expected a small JSON file")
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({plain(error)})") from error
