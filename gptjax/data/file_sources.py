"""Documents of files on this machine: which files a source has, and reading them from any place on."""

import dataclasses
import glob
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from gptjax.data.readers import READERS, SEEKABLE, Reading
from gptjax.data.remote_files import RemoteFile, is_remote, list_remote
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
    return open_found(name, kind, found=found, reading=reading)


def open_found(
    name: str,
    kind: str,
    *,
    found: "Found",
    reading: Reading,
) -> Source:
    """Returns the documents of files that were found, one of READERS by `kind`; `name` is that of the source.

    Raises:
        DataError: a file cannot be read.
    """
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
        is_pipe=found.paths == [PIPE],
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
    reading.reach(start.offset, (start.read_bytes, start.invalid))
    if _is_seekable(kind, path, reading):
        rows = SEEKABLE[kind].read(path, name, reading, start=start.offset, stop=stop)
    else:
        rows = READERS[kind](path, name, reading)
    documents = (row if isinstance(row, Document) else Document(*row, start) for row in rows)
    reached = start._replace(documents=0)
    for document in documents:
        if reading.offset != reached.offset:
            reached = Place(start.file, reading.offset, 0, reading.skipped_before, *reading.seen)
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


def describe_files(files: tuple[tuple[str, int], ...], revision: str = "") -> dict[str, Any]:
    """Returns number, bytes, and a hash of the names and sizes of files, as meta.json records them; {} for none.

    revision: the commit of the repository that they are from, which is recorded, too.
    """
    if not files:
        return {}
    listed = json.dumps(files).encode("utf-8", "surrogateescape")
    described: dict[str, Any] = {
        "number": len(files),
        "bytes": sum(size for _, size in files),
        "names_sha256": hashlib.sha256(listed).hexdigest(),
    }
    if revision:
        described["revision"] = revision
    return described


@dataclasses.dataclass
class Found:
    """The files of a source, and how many were left out."""

    paths: list[str]
    root: str  # names are relative to it
    hidden: int = 0
    linked: int = 0  # folders behind symbolic links
    remote: dict[str, RemoteFile] = dataclasses.field(default_factory=dict)  # by path, if they are in a bucket

    def named(self) -> tuple[tuple[str, int], ...]:
        """Returns the name and the size of each file.

        Raises:
            DataError: a file cannot be read.
        """
        if self.paths == [PIPE]:
            return (("stdin", 0),)
        if self.remote:
            return tuple((path[len(self.root) + 1 :], self.remote[path].size) for path in self.paths)
        return tuple((os.path.relpath(file, self.root), size_of(file)) for file in self.paths)

    def stamp(self) -> str:
        """Returns a hash of names, sizes and times of the files: a file that was written since has another."""
        states: list[tuple[str, int, int | str]] = [
            (self.remote[path].url, self.remote[path].size, self.remote[path].version) for path in self.remote
        ]
        for path in self.paths if not self.remote else ():
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
    """Returns the file, all files below the folder, or those that a glob pattern matches, sorted by path.

    Raises:
        ConfigError: it is a URL of an unknown kind.
        UnavailableError: it is a URL of a bucket that cannot be reached.
    """
    if path == PIPE:
        return Found([PIPE], root="")
    if is_remote(path):
        return _find_remote(path)
    if os.path.isdir(path):
        return list_files(path)
    if os.path.isfile(path):
        return Found([path], root=os.path.dirname(path))
    if not glob.has_magic(path):
        return Found([], root="")
    matches = [match for match in glob.glob(path, recursive=True) if os.path.isfile(match)]
    fixed = path[: min(path.index(sign) for sign in "*?[" if sign in path)]
    return Found(sorted(matches), root=os.path.dirname(fixed))


def _find_remote(url: str) -> Found:
    files = list_remote(url)
    fixed = url.rstrip("/")
    if glob.has_magic(url):
        fixed = os.path.dirname(url[: min(url.index(sign) for sign in "*?[" if sign in url)])
    elif [file.url for file in files] == [fixed]:  # a file, not a folder
        fixed = os.path.dirname(fixed)
    found = Found([], root=fixed)
    for file in files:
        if any(part.startswith(".") for part in file.url[len(fixed) :].split("/")):
            found.hidden += 1
            continue
        found.paths.append(file.url)
        found.remote[file.url] = file
    return found


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
