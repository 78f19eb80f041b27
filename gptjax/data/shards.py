"""Reads windows of many shard files, with few file descriptors, and only the windows' pages from disk."""

import contextlib
import dataclasses
import hashlib
import os
import resource
import stat
import threading
import time
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gptjax.errors import DataError

MAX_OPEN = 192  # descriptors of one reader, at most
SHARE_OPEN = 4  # and at most a quarter of all that this process may have: a run has two readers, and opens other files
RECHECK_SECONDS = 1.0  # an open file is checked for changes at most this often
CHUNK_BYTES = 2**24
# POSIX_FADV_WILLNEED makes the kernel fetch all windows of a batch at once, and it reads nothing more: 480 windows of
# 2 KB, none of them cached, take 9 ms instead of 36, and half the CPU time. macOS has no such call.
HAS_FADVISE = hasattr(os, "posix_fadvise")


class Identity(NamedTuple):
    """The file that a path led to, and its state; a file put in its place has another identity."""

    device: int
    inode: int
    size: int
    modified_ns: int


class Edges(NamedTuple):
    """The sha256 of `size` bytes at both ends of a file, in hex."""

    size: int
    head: str
    tail: str


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of token ids, as it was when it was opened and checked."""

    path: str
    dtype: np.dtype  # uint16 or uint32, little-endian
    offset: int  # bytes before the first id
    count: int  # tokens
    identity: Identity
    edges: Edges
    sha256: str = ""  # of the whole file, in hex; '' if unknown

    def __len__(self) -> int:
        return self.count

    @property
    def nbytes(self) -> int:
        """The bytes of the ids, without the header."""
        return self.count * self.dtype.itemsize

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns the ids [start, stop) in the file's own dtype: uint16 or uint32 [stop - start].

        Raises:
            DataError: the file cannot be read, or is shorter than it was.
        """
        stop = self.count if stop is None else min(stop, self.count)
        with opened(self.path) as descriptor:
            return self.read_open(descriptor, start, stop)

    def read_open(self, descriptor: int, start: int, stop: int) -> np.ndarray:
        """As `read`, from an open descriptor of the file; `stop` must not be beyond the last token."""
        width = self.dtype.itemsize
        size = max(0, stop - start) * width
        offset = self.offset + start * width
        content = self.pread(descriptor, size, offset)
        return np.frombuffer(content, self.dtype)

    def pread(self, descriptor: int, size: int, offset: int) -> bytes:
        """Returns exactly `size` bytes from `offset` on.

        Raises:
            DataError: as `read`.
        """
        try:
            content = os.pread(descriptor, size, offset)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if len(content) != size:  # a short read, or the end of the file: only another read can distinguish them
            content += pread(
                self.path,
                descriptor,
                size - len(content),
                offset=offset + len(content),
            )
        if len(content) != size:
            end = offset + len(content)
            token = (end - self.offset) // self.dtype.itemsize
            raise DataError(
                f"the shard has become shorter: it ends at token {token} of {self.count}",
                field=self.path,
            )
        return content


def open_file(path: str) -> int:
    """Returns a descriptor of the file, opened for reading; a pipe in its place is opened without waiting for a writer.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _unreadable(path, error) from error


@contextlib.contextmanager
def opened(path: str) -> Iterator[int]:
    """Yields a descriptor of the file, and closes it afterwards.

    Raises:
        DataError: as `open_file`.
    """
    descriptor = open_file(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def pread(
    path: str,
    descriptor: int,
    size: int,
    *,
    offset: int,
) -> bytes:
    """Returns `size` bytes from `offset` on, fewer at the end of the file.

    Raises:
        DataError: the file cannot be read; the message has `path`.
    """
    try:
        content = b""
        while len(content) < size:  # Linux reads at most 2 GiB at a time
            done = len(content)
            more = os.pread(descriptor, size - done, offset + done)
            if not more:
                break
            content += more
        return content
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: OSError) -> DataError:
    return DataError(f"the shard cannot be read ({error.strerror})", field=path)


def identify(path: str, descriptor: int) -> Identity:
    """Returns the identity of an open file.

    Raises:
        DataError: the file system does not answer, as for a file that a server has removed; or it is no regular file.
    """
    try:
        status = os.fstat(descriptor)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError("the shard is not a regular file", field=path)
    return Identity(
        device=status.st_dev,
        inode=status.st_ino,
        size=status.st_size,
        modified_ns=status.st_mtime_ns,
    )


def hash_whole(path: str, descriptor: int) -> str:
    """Returns the sha256 of an open file, in hex.

    Raises:
        DataError: it cannot be read.
    """
    sha256 = hashlib.sha256()
    size = identify(path, descriptor).size
    offset = 0
    while offset < size:
        wanted = min(CHUNK_BYTES, size - offset)  # asking for more than the file has takes memory
        content = pread(path, descriptor, wanted, offset=offset)
        if not content:
            break
        sha256.update(content)
        offset += len(content)
    return sha256.hexdigest()


def hash_edges(
    path: str,
    descriptor: int,
    file_size: int,
    *,
    size: int,
) -> Edges:
    """Returns the hashes of `size` bytes at both ends of an open file of `file_size` bytes.

    Raises:
        DataError: it cannot be read.
    """
    head = pread(path, descriptor, size, offset=0)
    tail_start = max(0, file_size - size)  # both ends overlap in a file that is smaller than two of them
    tail = pread(path, descriptor, size, offset=tail_start)
    return Edges(
        size,
        head=hashlib.sha256(head).hexdigest(),
        tail=hashlib.sha256(tail).hexdigest(),
    )


def same_content(shard: Shard, descriptor: int, found: Identity) -> bool:
    """Returns whether the open file, whose identity is not the shard's, is a copy of it.

    Some network file systems give a file another inode at each opening, so both ends are compared. The entire file is
    compared if it was written after the shard was checked and the shard's sha256 is known.

    Raises:
        DataError: the open file cannot be read.
    """
    size = shard.identity.size
    if found.size != size:
        return False
    edges = hash_edges(
        shard.path,
        descriptor,
        size,
        size=shard.edges.size,
    )
    if edges != shard.edges:
        return False
    if found.modified_ns == shard.identity.modified_ns or not shard.sha256:
        return True
    return hash_whole(shard.path, descriptor) == shard.sha256


def max_open() -> int:
    """Returns the number of descriptors that one reader may keep open in this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_OPEN
    share = min(MAX_OPEN, soft // SHARE_OPEN)
    return max(1, share)


class ShardReader:
    """Reads windows of shards with a limited number of descriptors, which it keeps open.

    Any thread may read. A lock lets one thread read at a time.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        offsets = [shard.offset for shard in shards]
        widths = [shard.dtype.itemsize for shard in shards]
        self._offsets = np.array(offsets, np.int64)  # bytes
        self._widths = np.array(widths, np.int64)  # bytes of an id
        self._max_open = max_open()
        # All three by the shard's number in `shards`.
        self._accepted: dict[int, Identity] = {}  # files that took a shard's place with the same content
        self._open: dict[int, int] = {}  # descriptors
        self._checked: set[int] = set()  # shards whose identity was checked since `_checked_at`
        self._checked_at = 0.0
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _close_all, self._open)

    def close(self) -> None:
        """Closes all descriptors; the reader may still be used."""
        with self._lock:
            _close_all(self._open)

    def read(
        self,
        numbers: np.ndarray,
        starts: np.ndarray,
        length: int,
    ) -> np.ndarray:
        """Returns windows of `length` ids each: uint32 [windows, length].

        Args:
            numbers: the shard of each window, int64 [windows].
            starts: the position of its first token in that shard, int64 [windows].

        Raises:
            DataError: a shard vanished, was truncated, or was replaced by one with other content.
        """
        shape = (len(numbers), length)
        rows = np.empty(shape, np.uint32)
        with self._lock:
            # Shards that are open come first: a later group may have to close them.
            wanted = sorted(
                set(numbers.tolist()),
                key=lambda number: number not in self._open,
            )
            for first in range(0, len(wanted), self._max_open):
                group = wanted[first : first + self._max_open]
                self._open_group(set(group))
                in_group = np.isin(numbers, group)
                self._read_group(
                    np.flatnonzero(in_group),
                    numbers[in_group],
                    starts[in_group],
                    rows,
                )
        return rows

    def _open_group(self, group: Collection[int]) -> None:
        """Opens the shards of `group`, closing others where the limit requires it, and checks that none has changed."""
        missing = [number for number in group if number not in self._open]
        too_many = len(self._open) + len(missing) - self._max_open
        if too_many > 0:
            unused = [number for number in self._open if number not in group]
            for number in unused[:too_many]:
                _close(self._open.pop(number))
        for number in missing:
            shard = self._shards[number]
            self._open[number] = open_file(shard.path)
        if time.monotonic() >= self._checked_at + RECHECK_SECONDS:
            self._checked.clear()
            self._checked_at = time.monotonic()
        self._checked.difference_update(missing)
        for number in group:
            if number not in self._checked:
                self._check_identity(number, self._open[number])
                self._checked.add(number)

    def _read_group(
        self,
        places: np.ndarray,
        numbers: np.ndarray,
        starts: np.ndarray,
        rows: np.ndarray,
    ) -> None:
        """Fills rows[places] with the windows at `starts` of open shards.

        Args:
            places: the row of each window, int64 [windows].
            numbers: the shard of each window, int64 [windows].
            starts: the position of its first token in that shard, int64 [windows].
            rows: uint32 [all windows, length].
        """
        widths = self._widths[numbers]
        offsets = self._offsets[numbers] + starts * widths
        sizes = rows.shape[1] * widths
        requests = list(zip(numbers.tolist(), sizes.tolist(), offsets.tolist(), strict=True))
        if HAS_FADVISE:
            with contextlib.suppress(OSError):  # it is a hint
                for number, size, offset in requests:
                    descriptor = self._open[number]
                    os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)
        contents = []
        for number, size, offset in requests:
            shard = self._shards[number]
            contents.append(shard.pread(self._open[number], size, offset))
        for width in np.unique(widths).tolist():  # one, unless uint16 and uint32 shards are mixed
            chosen = np.flatnonzero(widths == width)
            joined = b"".join([contents[i] for i in chosen.tolist()])
            ids = np.frombuffer(joined, f"<u{width}")
            rows[places[chosen]] = ids.reshape(len(chosen), -1)

    def _check_identity(self, number: int, descriptor: int) -> None:
        """Raises DataError if the open file has other content than when the shard was checked."""
        shard = self._shards[number]
        found = identify(shard.path, descriptor)
        if found in (shard.identity, self._accepted.get(number)):
            return
        if not same_content(shard, descriptor, found):
            _close(self._open.pop(number))
            raise DataError(
                "the shard was changed after this run had checked it",
                field=shard.path,
                remedy="put the old file back and rerun the same command",
            )
        self._accepted[number] = found


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # nothing was written, so an error here loses nothing
        os.close(descriptor)


def _close_all(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        _close(descriptor)
    descriptors.clear()


def total_bytes(paths: Iterable[str]) -> int:
    """Returns the sum of the files' sizes.

    Raises:
        DataError: one of them cannot be found.
    """
    total = 0
    for path in paths:
        try:
            total += os.stat(path).st_size
        except OSError as error:
            raise _unreadable(path, error) from error
    return total
