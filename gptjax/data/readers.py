"""The documents in one file: text, lines, jsonl, csv and parquet."""

import contextlib
import csv
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from gptjax.data.remote_files import is_remote, open_remote
from gptjax.data.sections import LONG_TEXT, sections
from gptjax.data.source import Document, Place, Whole
from gptjax.data.text_files import PIPE, Line, Seen, count_lines, next_line, open_text, read_lines
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
    offset: int = 0  # of the file that is read: the last place from which reading it can continue
    skipped_before: int = 0  # bad rows before that place
    seen: Seen = (0, 0)  # bytes of the file before that place, and how many are invalid

    def reach(self, offset: int, seen: Seen = (0, 0)) -> None:
        """Records that reading can continue from `offset` of the file that is read, after `seen` bytes of it."""
        self.offset = offset
        self.skipped_before = self.skipped
        self.seen = seen

    def bad(self, name: str, problem: str, *, remedy: str = "") -> None:
        """Counts a bad row.

        Raises:
            DataError: bad rows are not skipped.
        """
        if not self.skip_bad:
            raise DataError(problem, field=name, remedy=remedy or "repair it, or give --skip_bad to gptjax prepare")
        self.skipped += 1


Row = tuple[str, str]  # id and text of a document
# Yields the documents of one file, from its path and its name. Their ids begin with the name.
Reader = Callable[[str, str, Reading], Iterator[Row] | Iterator[Document]]


def read_text(path: str, name: str, reading: Reading) -> Iterator[Document]:
    """Yields the text of a file: one document, in sections if it is long."""
    with open_text(path, encoding=reading.encoding) as file:
        text = file.read(-1 if path == PIPE else LONG_TEXT)  # a pipe cannot be read twice
        if len(text) < LONG_TEXT or path == PIPE:
            yield Document(name, text, Place())
            return
        digest = hashlib.sha256()
        characters = 0
        while text:
            digest.update(text.encode())
            characters += len(text)
            text = file.read(LONG_TEXT)
    whole = Whole(digest.digest(), characters)
    with open_text(path, encoding=reading.encoding) as file:
        for section, is_end in sections(file):
            yield Document(name, section, Place(), whole, is_end)


def _read_lines(path: str, name: str, reading: Reading, *, start: int = 0, stop: int | None = None) -> Iterator[Row]:
    for line in read_lines(path, encoding=reading.encoding, start=start, stop=stop, seen=reading.seen):
        reading.reach(line.offset, line.seen)
        yield f"{name}:{line.place}", line.text.rstrip("\r\n")


def _read_jsonl(path: str, name: str, reading: Reading, *, start: int = 0, stop: int | None = None) -> Iterator[Row]:
    for line in read_lines(path, encoding=reading.encoding, start=start, stop=stop, seen=reading.seen):
        reading.reach(line.offset, line.seen)
        if not line.text.strip():
            continue
        try:
            row = json.loads(line.text)
        except (ValueError, RecursionError) as error:
            reading.bad(_row_name(path, line, reading), f"is no JSON ({one_line(error)})")
            continue
        if not isinstance(row, dict):
            reading.bad(_row_name(path, line, reading), f"is {_kind(row)}, not an object")
            continue
        text = _text_of(row, reading, lambda line=line: _row_name(path, line, reading))
        if text is not None:
            yield f"{name}:{line.place}", text


def _row_name(path: str, line: Line, reading: Reading) -> str:
    """Returns the name of a bad row, with its number."""
    if line.number or reading.skip_bad:  # bad rows that are left out are counted, and not named
        return f"{path}:{line.number}"
    return f"{path}:{count_lines(path, line.offset) + 1}"


def _read_csv(path: str, name: str, reading: Reading) -> Iterator[Row]:
    csv.field_size_limit(LARGEST_FIELD)
    with open_text(path, encoding=reading.encoding, newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            for number, row in enumerate(rows, 1):
                text = _text_of(row, reading, lambda number=number: f"{path}:{number}")
                if text is not None:
                    yield f"{name}:{number}", text
        except csv.Error as error:
            raise DataError(f"is no csv ({one_line(error)})", field=f"{path}, line {rows.line_num}") from error


def _text_of(row: dict[Any, Any], reading: Reading, name: Callable[[], str]) -> str | None:
    """Returns the text of a row; None if it is bad and left out.

    name: returns the name of the row, for an error.
    """
    feature = reading.text_feature
    if feature not in row:
        available = ", ".join(one_line(key) for key in list(row)[:SHOWN_NAMES] if key is not None) or "none"
        reading.bad(name(), f"has no field {feature!r}", remedy=f"set data.text_feature; its fields: {available}")
        return None
    text = row[feature]
    if not isinstance(text, str):
        reading.bad(name(), f"its field {feature!r} is {_kind(text)}, not a string")
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        reading.bad(name(), f"its field {feature!r} is no valid Unicode")
        return None
    return text


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _read_parquet(path: str, name: str, reading: Reading, *, start: int = 0, stop: int | None = None) -> Iterator[Row]:
    """Yields the rows of the row groups from `start` to `stop`."""
    import pyarrow  # slow to import
    import pyarrow.parquet

    if path == PIPE:
        raise ConfigError("parquet cannot be read from a pipe", field="data.source", value=f"parquet:{PIPE}")
    feature = reading.text_feature
    try:
        with _open_parquet(path) as file:
            if feature not in file.schema_arrow.names:
                available = ", ".join(map(one_line, file.schema_arrow.names[:SHOWN_NAMES])) or "none"
                raise ConfigError(
                    f"{path} has no such column",
                    field="data.text_feature",
                    value=feature,
                    remedy=f"its columns: {available}",
                )
            for group in range(file.num_row_groups)[start:stop]:
                reading.reach(group)
                number = 0
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=[feature]):
                    for value in batch.column(0):
                        row = f"{group}:{number}"
                        number += 1
                        text = _parquet_text(value.as_py(), reading, lambda row=row: f"{path}:{row}")
                        if text is not None:
                            yield f"{name}:{row}", text
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"is no parquet file, or is cut off ({one_line(error)})", field=path) from error


@contextlib.contextmanager
def _open_parquet(path: str) -> Iterator[Any]:
    """Yields pyarrow's file, which asks a bucket only for the parts that it needs."""
    import pyarrow.parquet

    with contextlib.ExitStack() as stack:
        opened: Any = stack.enter_context(open_remote(path)) if is_remote(path) else path
        yield stack.enter_context(pyarrow.parquet.ParquetFile(opened))


def _parquet_text(value: object, reading: Reading, name: Callable[[], str]) -> str | None:
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            reading.bad(name(), f"its field {reading.text_feature!r} is no UTF-8")
            return None
    return _text_of({reading.text_feature: value}, reading, name)


def _align_parquet(path: str, target: int, size: int) -> int:
    """Returns the row group that begins at the byte `target` of `size` or after it, taking groups as equal in size."""
    import pyarrow  # slow to import
    import pyarrow.parquet

    try:
        with _open_parquet(path) as file:
            groups = file.num_row_groups
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"is no parquet file, or is cut off ({one_line(error)})", field=path) from error
    return -(-groups * target // size)


def _align_line(path: str, target: int, size: int) -> int:
    """Returns where the first line begins that begins at the byte `target` or after it."""
    return next_line(path, target)


class ReadFrom(Protocol):
    """Yields the documents of one file that begin at the offset `start` or after it, and before `stop`."""

    def __call__(self, path: str, name: str, reading: Reading, *, start: int, stop: int | None) -> Iterator[Row]:
        """Calls reading.reach with the offset of each document, before it is yielded."""
        ...


class Seekable(NamedTuple):
    """How a file is read from the middle, and where a part of it may begin."""

    read: ReadFrom
    align: Callable[[str, int, int], int]  # from a path, a byte and the file's size: the first offset there or after it


# By the kind of source: functions that yield the documents of one file. text: a file is one document.
READERS: dict[str, Reader] = {
    "text": read_text,
    "lines": _read_lines,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
}

# Offsets are bytes of lines, and row groups of parquet.
SEEKABLE = {
    "lines": Seekable(_read_lines, _align_line),
    "jsonl": Seekable(_read_jsonl, _align_line),
    "parquet": Seekable(_read_parquet, _align_parquet),
}
