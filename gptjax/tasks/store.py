"""The questions of tasks in files: stored by `gptjax evaluate --fetch_tasks`, checked by hash, and read by runs."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from gptjax.errors import ConfigError, DataError, one_line
from gptjax.strict_json import parse_json, read_at_most
from gptjax.tasks.item import Item, parse_item
from gptjax.tasks.protocols import PROTOCOLS
from gptjax.workdir import replace_file

DIRECTORY = "data/tasks"
LARGEST_FILE = 2**31  # bytes
FILE = "file:"


class Task(NamedTuple):
    """The questions of a task, and the protocol by which they are asked."""

    name: str  # of its metrics
    protocol: str
    items: tuple[Item, ...]
    has_lengths: bool = True  # whether accuracy by length is reported
    only_last_token: bool = False  # whether the continuation is the last token of the text
    sha256: str = ""  # of its file


def parse_names(names: str, *, field: str = "--tasks") -> list[str]:
    """Returns the tasks that a list with commas names: those of PROTOCOLS, and file:PATH.

    Raises:
        ConfigError: a name is unknown or repeated.
    """
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if not name.startswith(FILE) and name not in PROTOCOLS:
            raise ConfigError(
                f"no such task: {one_line(name)}",
                field=field,
                value=names,
                remedy=f"name some of {', '.join(PROTOCOLS)}, file:PATH",
            )
    if not found:
        raise ConfigError("names no task", field=field, value=names, remedy=f"name some of {', '.join(PROTOCOLS)}")
    labels = [metric_name(name) for name in found]
    repeated = [label for label in labels if labels.count(label) > 1]
    if repeated:
        raise ConfigError(f"names {repeated[0]} twice", field=field, value=names)
    return found


def identify(tasks: Iterable[Task]) -> dict[str, str]:
    """Returns what must be equal on all hosts: each scores its own rows of the same questions."""
    return {task.name: f"{len(task.items)} questions of sha256 {task.sha256}" for task in tasks}


def metric_name(name: str) -> str:
    """Returns the name of a task in metrics: that of the file for file:PATH, without its ending."""
    if not name.startswith(FILE):
        return name
    return os.path.splitext(os.path.basename(name.removeprefix(FILE)))[0]


def task_path(name: str, directory: str = DIRECTORY) -> str:
    """Returns the file of a task's questions."""
    if name.startswith(FILE):
        return os.path.expanduser(name.removeprefix(FILE))
    return os.path.join(directory, f"{name}.jsonl")


def open_tasks(names: Sequence[str], *, limit: int = 0, directory: str = DIRECTORY) -> list[Task]:
    """Returns tasks by their names; limit: the first questions of each, 0 for all.

    Raises:
        DataError: a task is not stored here, or its file is damaged.
    """
    return [_open_task(name, limit=limit, directory=directory) for name in names]


def _open_task(name: str, *, limit: int, directory: str) -> Task:
    path = task_path(name, directory)
    if not os.path.isfile(path):
        remedy = "correct the path" if name.startswith(FILE) else f"run: gptjax evaluate --fetch_tasks={name}"
        raise DataError("the task's questions are not there", field=path, remedy=remedy)
    try:
        content = read_at_most(path, LARGEST_FILE)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {one_line(error)}", field=path) from error
    sha256 = hashlib.sha256(content).hexdigest()
    if not name.startswith(FILE) and _recorded(path).get("sha256") != sha256:
        raise DataError(
            "was changed since it was fetched",
            field=path,
            remedy=f"remove it and run: gptjax evaluate --fetch_tasks={name}",
        )
    rows = list(_parse_rows(content, path))
    rows = rows[: limit or None]
    items = tuple(parse_item(row, f"{path}:{number}") for number, row in enumerate(rows, 1))
    if not items:
        raise DataError("holds no question", field=path)
    if len({item.has_choices for item in items}) > 1:
        raise DataError("mixes questions with choices and questions without", field=path, remedy="divide it")
    protocol = PROTOCOLS.get(name)
    return Task(
        name=metric_name(name),
        protocol=name if protocol else "file",
        items=items,
        has_lengths=protocol.has_lengths if protocol else True,
        only_last_token=protocol.only_last_token if protocol else False,
        sha256=sha256,
    )


def _parse_rows(content: bytes, path: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield parse_json(line, dict)
        except ValueError as error:
            raise DataError(f"is no JSON object ({one_line(error)})", field=f"{path}:{number}") from error


def _recorded(path: str) -> dict[str, Any]:
    """Returns what store_task has recorded of a file; {} if that is missing or damaged."""
    try:
        return parse_json(read_at_most(_record_path(path), LARGEST_FILE), dict)
    except (OSError, ValueError):
        return {}


def _record_path(path: str) -> str:
    return f"{os.path.splitext(path)[0]}.json"


def store_task(name: str, rows: Sequence[dict[str, Any]], *, origin: str, directory: str = DIRECTORY) -> str:
    """Writes the questions of a task and a record of where they come from; returns the path of the questions.

    rows: in the forms of item.py.

    Raises:
        OSError: they cannot be written.
    """
    os.makedirs(directory, exist_ok=True)
    path = task_path(name, directory)
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    record = {
        "task": name,
        "origin": origin,
        "questions": len(rows),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    replace_file(path, content)
    # Last: questions without their record are fetched again.
    replace_file(_record_path(path), (json.dumps(record, indent=2) + "\n").encode())
    return path


def is_stored(name: str, directory: str = DIRECTORY) -> bool:
    """Returns whether a task's questions are here and undamaged."""
    path = task_path(name, directory)
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return _recorded(path).get("sha256") == hashlib.file_digest(file, "sha256").hexdigest()
