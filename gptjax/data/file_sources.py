"""Documents of files on this machine: which files a source has, and reading them from any place on."""

import dataclasses
import glob
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from gptjax.data.readers import READERS, SEEKABLE, Reading
from gptjax.data.source import Document, Place, Source
from gptjax.data.text_files import PIPE, check_encoding, is_compressed, size_of
from gptjax.errors import ConfigError


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
    files = found.named()
    is_plain = kind in ("text", "lines") and not any(map(is_compressed, found.paths))
    sizes = [size for _, size in files]

    def read(start: Place, stop: Place | None) -> Iterator[Document]:
        reading.skipped = start.skipped
        for number in range(start.file, len(files)):
            first = start if number == start.file else Place(number, skipped=reading.skipped)
            last = stop.offset if stop is not None and number == stop.file else None
            if last == 0 or (stop is not None and number > stop.file):
                return
            yield from _read_file(kind, found.paths[number], files[number][0], reading, start=first, stop=last)

    return Source(
        name,
        read,
        place_of=lambda part, count: _place_of(kind, found.paths, sizes, reading, share=(part, count)),
        total_documents=len(found.paths) if kind == "text" else 0,
        total_bytes=sum(sizes) if is_plain else 0,
        files=files,
        stamp=found.stamp(),
        left_out=found.describe(),
        is_pipe=path == PIPE,
    )


def _read_file(
    kind: str,
    path: str,
    name: str,
    reading: Reading,
    *,
    start: Place,
    stop: int | None,
) -> Iterator[Document]:
    """Yields the documents of one file from `start` on, without those that begin at the offset `stop` or after it."""
    reading.reach(start.offset)
    if _is_seekable(kind, path, reading):
        rows = SEEKABLE[kind].read(path, name, reading, start=start.offset, stop=stop)
    else:
        rows = READERS[kind](path, name, reading)
    documents = (row if isinstance(row, Document) else Document(*row, start) for row in rows)
    reached = start._replace(documents=0)
    for document in documents:
        if reading.offset != reached.offset:
            reached = Place(start.file, reading.offset, skipped=reading.skipped_before)
        reached = reached._replace(documents=reached.documents + 1)
        if reached.offset > start.offset or reached.documents > start.documents:
            yield document._replace(place=reached)


def _is_seekable(kind: str, path: str, reading: Reading) -> bool:
    """Returns whether a file can be read from the middle: not if it must be decompressed or decoded from its start."""
    return kind in SEEKABLE and path != PIPE and not is_compressed(path) and not reading.encoding


def _place_of(kind: str, paths: list[str], sizes: list[int], reading: Reading, *, share: tuple[int, int]) -> Place:
    """Returns where a part of the source begins: part `share[0]`, from 0, of `share[1]` parts of equal size.

    A file that cannot be read from the middle is in one part.
    """
    part, count = share
    target = sum(sizes) * part // count
    begin = 0
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        if target <= begin:
            return Place(number)
        if target < begin + size and _is_seekable(kind, path, reading):
            return Place(number, SEEKABLE[kind].align(path, target - begin, size))
        begin += size
    return Place(len(paths))


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

    def stamp(self) -> str:
        """Returns a hash of names, sizes and times of the files: a file that was written since has another."""
        states = []
        for path in self.paths:
            if path != PIPE:
                state = os.stat(path)
                states.append((os.path.relpath(path, self.root), state.st_size, state.st_mtime_ns))
        listed = json.dumps(states).encode("utf-8", "surrogateescape")
        return hashlib.sha256(listed).hexdigest()

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
