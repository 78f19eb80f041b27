"""Fetches the published questions of tasks: from TFDS, from the Hub, or from an official file."""

import functools
import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gptjax.errors import ConfigError, DataError, UserError, WorkdirError, one_line
from gptjax.tasks.item import parse_item
from gptjax.tasks.protocols import PROTOCOLS, Protocol
from gptjax.tasks.store import DIRECTORY, is_stored, store_task

Rows = Iterator[tuple[str, Mapping[str, Any]]]  # the name of a row, and its fields


def fetch_tasks(names: str, *, log: Callable[[str], None], directory: str = DIRECTORY) -> None:
    """Stores tasks with their hashes; those that are stored already are left as they are.

    names: with commas, each NAME or NAME=PATH for a file or folder in the form of the official data.

    Raises:
        ConfigError: a name is unknown.
        DataError: a file is not in the form of the task.
        UnavailableError: a server cannot be reached.
        WorkdirError: the questions cannot be written.
    """
    wanted = []
    for item in filter(None, (item.strip() for item in names.split(","))):
        name, _, path = item.partition("=")
        if name not in PROTOCOLS:
            raise ConfigError(
                f"no such task: {one_line(name)}",
                field="--fetch_tasks",
                value=names,
                remedy=f"name some of {', '.join(PROTOCOLS)}",
            )
        wanted.append((PROTOCOLS[name], path))
    for protocol, path in wanted:
        if not path and is_stored(protocol.name, directory):
            log(f"{protocol.name}: already stored in {directory}")
            continue
        rows, origin = _open_rows(protocol, path)
        questions = [_convert(protocol, name, row) for name, row in _guarded(rows, origin)]
        if not questions:
            raise DataError("holds no question", field=origin)
        try:
            stored = store_task(protocol.name, questions, origin=origin, directory=directory)
        except OSError as error:
            raise WorkdirError(f"cannot be written: {error}", field=directory) from error
        log(f"{stored}: {len(questions):,} questions from {origin}")


def _guarded(rows: Rows, origin: str) -> Rows:
    """Yields rows, and names the file where a library cannot read it."""
    try:
        yield from rows
    except UserError:
        raise
    except (ValueError, OSError) as error:  # of decoders, and of pyarrow, whose errors are both
        raise DataError(f"cannot be read ({type(error).__name__}: {one_line(error)})", field=origin) from error


def _convert(protocol: Protocol, name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    try:
        question = protocol.convert(row)
        json.dumps(question, ensure_ascii=False).encode()  # no half of a surrogate pair
        parse_item(question, name)
        return question
    except DataError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, AssertionError) as error:
        fields = ", ".join(map(str, list(row)[:10]))
        raise DataError(
            f"is no row of {protocol.name} ({type(error).__name__}: {one_line(error)}); its fields: {fields}",
            field=name,
        ) from error


def _open_rows(protocol: Protocol, path: str) -> tuple[Rows, str]:
    """Returns the rows of a task, and where they are from."""
    if path:
        return _read_files(_find_files(os.path.expanduser(path))), path
    if protocol.tfds:
        return _read_tfds(protocol), f"tfds:{protocol.tfds}"
    return _open_hub(protocol)


def _find_files(path: str) -> list[str]:
    found = sorted(glob.glob(f"{glob.escape(path)}/**/*.jsonl", recursive=True)) if os.path.isdir(path) else [path]
    if not found or not os.path.isfile(found[0]):
        raise DataError("no such file, or no .jsonl file in it", field=path)
    return found


def _read_files(paths: list[str]) -> Rows:
    """Yields the rows of files of JSON lines, plain text or parquet."""
    for path in paths:
        labels = _labels_of(path)
        for number, row in enumerate(_rows_of(path)):
            name = f"{path}:{number + 1}"
            if labels and number >= len(labels):
                raise DataError("has no label in NAME-labels.lst", field=name)
            yield name, {"label": labels[number], **row} if labels else row


def _rows_of(path: str) -> Iterator[dict[str, Any]]:
    if path.endswith(".parquet"):
        import pyarrow.parquet  # slow to import

        yield from pyarrow.parquet.read_table(path).to_pylist()
        return
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if path.endswith(".txt"):
                yield {"text": line.strip()}
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(f"is no JSON ({one_line(error)})", field=f"{path}:{number}") from error


def _labels_of(path: str) -> list[int]:
    """Returns the labels that PIQA's authors publish in a file of their own, NAME-labels.lst; [] without one."""
    labels = f"{os.path.splitext(path)[0]}-labels.lst"
    if not os.path.isfile(labels):
        return []
    with open(labels, encoding="ascii") as file:
        return [int(line) for line in file.read().split()]


def _read_tfds(protocol: Protocol) -> Rows:
    """Yields the rows of a data set of TFDS, of all its configs if the protocol names none."""
    from gptjax.data.tfds_source import open_builders  # slow to import

    for builder in open_builders(protocol.tfds):
        data: Any = builder
        rows = data.as_data_source(protocol.split)
        for number in range(len(rows)):
            yield f"tfds:{builder.info.full_name}/{number}", _decoded(rows[number])


def _decoded(value: Any) -> Any:
    """Returns a row of TFDS with strings and lists in place of bytes and arrays."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return {name: _decoded(item) for name, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return _decoded(value) if isinstance(value, bytes) else value


def _open_hub(protocol: Protocol) -> tuple[Rows, str]:
    from gptjax.convert import hub
    from gptjax.convert.hub_listing import Kind

    owner, name, *folders = protocol.hub.split("/")
    folder = "/".join(folders)
    kind = Kind(
        choose=functools.partial(choose_names, split=protocol.split),
        missing=f"no files of the split {protocol.split}",
        needed="parquet or jsonl files",
        remedy=f"give the official file: --fetch_tasks={protocol.name}=PATH",
        repo_type="dataset",
        folder=folder,
    )
    directory, commit, names = hub.download_snapshot(f"{owner}/{name}", "", kind=kind)
    return _read_files([os.path.join(directory, file) for file in names]), f"hf:{protocol.hub}@{commit}"


def choose_names(names: Any, *, split: str) -> list[str]:
    """Returns the files of a split: parquet files, or otherwise jsonl files, with its name as a word of theirs."""
    word = re.compile(rf"(?<![a-z]){split}(?![a-z])")
    for ending in (".parquet", ".jsonl"):
        chosen = [name for name in names if name.endswith(ending) and word.search(name)]
        if chosen:
            return sorted(chosen)
    return []
