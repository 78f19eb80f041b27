"""Documents of files on this machine: text, lines, jsonl, csv and parquet."""

import csv
import dataclasses
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from gptjax.data.source import Document, Source
from gptjax.data.text_files import PIPE, check_encoding, is_compressed, open_text, size_of
from gptjax.errors import ConfigError, DataError, one_line

LARGEST_FIELD = 2**31 - 1  # characters of a field in a csv file; Python's own limit is 131,072
SHOWN_NAMES = 10  # of the fields that a row has


@dataclasses.dataclass
class Reading:
    """How files are read, and what was left out."""

    text_feature: str = "text"  # the field of a row that holds the text
    encoding: str = ""  # of text; "" means UTF-8
    skip_bad: bool = False  # leave bad rows out, instead of an error
    skipped: int = 0  # bad rows so far

    def bad(self, name: str, problem: str, *, remedy: str = "") -> None:
        """Counts a bad row.

        Raises:
            DataError: bad rows are not skipped.
        """
        if not self.skip_bad:
            raise DataError(problem, field=name, remedy=remedy or "repair it, or give --skip_bad to gptjax prepare")
        self.skipped += 1


# Yields the documents of one file, from its path and its name. Their ids begin with the name.
Reader = Callable[[str, str, Reading], Iterator[Document]]


def open_files(kind: str, path: str, reading: Reading) -> Source:
    """Returns the documents of a file, a folder or a glob pattern.

    Raises:
        ConfigError: there is no such file.
        DataError: a file cannot be read.
    """
    check_encoding(reading.encoding)
    name = f"{kind}:{path}"
    found = find_files(path)
    if not found.paths:
        raise ConfigError(
            "no such file or folder, or no file in it",
            field="data.source",
            value=name,
            remedy=found.describe(),
        )
    read = READERS[kind]
    files = found.named()
    is_plain = kind in ("text", "lines") and not any(map(is_compressed, found.paths))

    def documents() -> Iterator[Document]:
        reading.skipped = 0
        for file, (file_name, _) in zip(found.paths, files, strict=True):
            yield from read(file, file_name, reading)

    return Source(
        name,
        documents,
        total_documents=len(found.paths) if kind == "text" else 0,
        total_bytes=sum(size for _, size in files) if is_plain else 0,
        files=files,
        left_out=found.describe(),
        is_pipe=path == PIPE,
    )


def describe_files(files: tuple[tuple[str, int], ...]) -> dict[str, Any]:
    """Returns number, bytes, and a hash of the names and sizes of files, as meta.json records them; {} for none."""
    if not files:
        return {}
    listed = json.dumps(files).encode("utf-8", "surrogateescape")
    return {
        "number": len(files),
        "bytes": sum(size for _, size in files),
        "names_sha256": hashlib.sha256(listed).hexdigest(),
    }


@dataclasses.dataclass
class Found:
    """The files of a source, and how many were left out."""

    paths: list[str]
    root: str  # names are relative to it
    hidden: int = 0
    linked: int = 0  # folders behind symbolic links

    def named(self) -> tuple[tuple[str, int], ...]:
        """Returns the name and the size of each file.

        Raises:
            DataError: a file cannot be read.
        """
        if self.paths == [PIPE]:
            return (("stdin", 0),)
        return tuple((os.path.relpath(file, self.root), size_of(file)) for file in self.paths)

    def describe(self) -> str:
        """Returns what was left out, for a message; "" if nothing was."""
        parts = []
        if self.hidden:
            parts.append(f"{self.hidden} hidden files or folders")
        if self.linked:
            parts.append(f"{self.linked} linked folders")
        return f"left out: {' and '.join(parts)}" if parts else ""


def find_files(path: str) -> Found:
    """Returns the file, all files below the folder, or those that a glob pattern matches, sorted by path."""
    if path == PIPE:
        return Found([PIPE], root="")
    if os.path.isdir(path):
        return list_files(path)
    if os.path.isfile(path):
        return Found([path], root=os.path.dirname(path))
    if not glob.has_magic(path):
        return Found([], root="")
    matches = [match for match in glob.glob(path, recursive=True) if os.path.isfile(match)]
    fixed = path[: min(path.index(sign) for sign in "*?[" if sign in path)]
    return Found(sorted(matches), root=os.path.dirname(fixed))


def list_files(path: str) -> Found:
    """Returns all files below a folder, without hidden ones and without the content of linked folders."""
    found = Found([], root=path)
    for folder, folders, names in os.walk(path):
        visible = [name for name in folders if not name.startswith(".")]
        found.hidden += len(folders) - len(visible)
        found.linked += sum(os.path.islink(os.path.join(folder, name)) for name in visible)
        folders[:] = visible  # in place: os.walk does not descend into the others
        for name in names:
            file = os.path.join(folder, name)
            if name.startswith("."):
                found.hidden += 1
            elif os.path.isfile(file):
                found.paths.append(file)
    found.paths.sort()
    return found


def _read_whole(path: str, name: str, reading: Reading) -> Iterator[Document]:
    with open_text(path, encoding=reading.encoding) as file:
        yield name, file.read()


def _read_lines(path: str, name: str, reading: Reading) -> Iterator[Document]:
    with open_text(path, encoding=reading.encoding) as file:
        for number, line in enumerate(file, 1):
            yield f"{name}:{number}", line.rstrip("\r\n")


def _read_jsonl(path: str, name: str, reading: Reading) -> Iterator[Document]:
    with open_text(path, encoding=reading.encoding) as file:
        for number, line in enumerate(file, 1):
            row_name = f"{name}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                reading.bad(f"{path}:{number}", f"is no JSON ({one_line(error)})")
                continue
            if not isinstance(row, dict):
                reading.bad(f"{path}:{number}", f"is {_kind(row)}, not an object")
                continue
            text = _text_of(row, f"{path}:{number}", reading)
            if text is not None:
                yield row_name, text


def _read_csv(path: str, name: str, reading: Reading) -> Iterator[Document]:
    csv.field_size_limit(LARGEST_FIELD)
    with open_text(path, encoding=reading.encoding, newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            for number, row in enumerate(rows, 1):
                text = _text_of(row, f"{path}:{number}", reading)
                if text is not None:
                    yield f"{name}:{number}", text
        except csv.Error as error:
            raise DataError(f"is no csv ({one_line(error)})", field=f"{path}, line {rows.line_num}") from error


def _text_of(row: dict[Any, Any], name: str, reading: Reading) -> str | None:
    """Returns the text of a row; None if it is bad and left out."""
    feature = reading.text_feature
    if feature not in row:
        available = ", ".join(one_line(key) for key in list(row)[:SHOWN_NAMES] if key is not None) or "none"
        reading.bad(name, f"has no field {feature!r}", remedy=f"set data.text_feature; its fields: {available}")
        return None
    text = row[feature]
    if not isinstance(text, str):
        reading.bad(name, f"its field {feature!r} is {_kind(text)}, not a string")
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        reading.bad(name, f"its field {feature!r} is no valid Unicode")
        return None
    return text


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _read_parquet(path: str, name: str, reading: Reading) -> Iterator[Document]:
    import pyarrow  # slow to import
    import pyarrow.parquet

    if path == PIPE:
        raise ConfigError("parquet cannot be read from a pipe", field="data.source", value=f"parquet:{PIPE}")
    feature = reading.text_feature
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if feature not in file.schema_arrow.names:
                available = ", ".join(map(one_line, file.schema_arrow.names[:SHOWN_NAMES])) or "none"
                raise ConfigError(
                    f"{path} has no such column",
                    field="data.text_feature",
                    value=feature,
                    remedy=f"its columns: {available}",
                )
            for group in range(file.num_row_groups):
                number = 0
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=[feature]):
                    for value in batch.column(0):
                        row_name = f"{name}:{group}:{number}"
                        text = _parquet_text(value.as_py(), f"{path}:{group}:{number}", reading)
                        number += 1
                        if text is not None:
                            yield row_name, text
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"is no parquet file, or is cut off ({one_line(error)})", field=path) from error


def _parquet_text(value: object, name: str, reading: Reading) -> str | None:
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            reading.bad(name, f"its field {reading.text_feature!r} is no UTF-8")
            return None
    return _text_of({reading.text_feature: value}, name, reading)


# By the kind of source: functions that yield the documents of one file. text: a file is one document.
READERS: dict[str, Reader] = {
    "text": _read_whole,
    "lines": _read_lines,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
