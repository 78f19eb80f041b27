"""Text in files: decompressed by the file's suffix, decoded, and refused where it is not text."""

import codecs
import contextlib
import gzip
import io
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from gptjax.data.remote_files import is_remote, open_remote
from gptjax.errors import ConfigError, DataError, UnavailableError, install, one_line

COMPRESSED = (".gz", ".zst", ".xz")
PIPE = "-"  # the path of standard input
UNDECODABLE = 0.001  # the largest share of a file's bytes that may be invalid; they become U+FFFD
CHUNK_BYTES = 2**16
CHECKED_BYTES = 2**20  # a file's first bytes, in which NULs and signatures are looked for
LEAST_INVALID = 2  # invalid sequences; one alone may be a text that was cut
# What a file begins with, if it is not text. The suffix for the compressed ones says how to read them.
SIGNATURES = {
    b"\x1f\x8b": "gzip data, which need the suffix .gz",
    b"\x28\xb5\x2f\xfd": "zstandard data, which need the suffix .zst",
    b"\xfd7zXZ\x00": "xz data, which need the suffix .xz",
    b"BZh91AY&SY": "bzip2 data",
    b"PK\x03\x04": "a zip archive, or a document of an office program",
    b"PAR1": "a parquet file, which --source=parquet: reads",
    b"ARROW1": "an Arrow file",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"%PDF-": "a PDF document",
    b"\x7fELF": "a program",
    b"\x93NUMPY": "a NumPy array",
    b"SQLite format 3": "a database of SQLite",
}
UTF_32 = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
UTF_16 = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def check_encoding(encoding: str) -> None:
    """Checks the name of an encoding; "" means UTF-8.

    Raises:
        ConfigError: Python does not know it, or it does not decode bytes to text.
    """
    try:
        "a".encode(encoding or "utf-8").decode(encoding or "utf-8")
        codecs.getincrementaldecoder(encoding or "utf-8")
    except LookupError as error:
        raise ConfigError(
            "no such encoding",
            field="--encoding",
            value=encoding,
            remedy="give one that Python knows, such as utf-16, latin-1 or cp1252",
        ) from error


def is_compressed(path: str) -> bool:
    """Returns whether the suffix of a path says that its content is compressed."""
    return path.endswith(COMPRESSED)


@contextlib.contextmanager
def open_bytes(path: str) -> Iterator[Any]:
    """Yields the content of a file, decompressed; `-` is standard input.

    Raises:
        DataError: it cannot be read, or its compressed data are damaged or cut off.
        UnavailableError: the library for zstandard is missing.
    """
    try:
        with contextlib.ExitStack() as stack:
            raw: Any = sys.stdin.buffer if path == PIPE else stack.enter_context(open_raw(path))
            stream = raw
            if path.endswith(".gz"):
                stream = stack.enter_context(gzip.open(raw))
            elif path.endswith(".xz"):
                stream = _Frames(raw, lzma.LZMADecompressor, lzma.LZMAError, padding=b"\0")
            elif path.endswith(".zst"):
                stream = _open_zstandard(raw, path)
            yield stream
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"its compressed data are damaged or cut off ({one_line(error)})", field=path) from error
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or one_line(error)})", field=path) from error


@contextlib.contextmanager
def open_raw(path: str) -> Iterator[Any]:
    """Yields a file of this machine or of a bucket, opened for reading as it is stored; it can seek.

    Raises:
        OSError: a file of this machine cannot be opened.
        UnavailableError: a bucket cannot be reached, also while it is read.
    """
    if is_remote(path):
        with open_remote(path) as remote:
            yield io.BufferedReader(remote, CHECKED_BYTES)
        return
    with open(path, "rb", CHECKED_BYTES) as file:
        yield file


def _open_zstandard(raw: BinaryIO, path: str) -> io.RawIOBase:
    try:
        import zstandard
    except ImportError as error:
        raise UnavailableError("needs the package zstandard", field=path, remedy=install("data")) from error

    def start() -> Any:
        return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()

    return _Frames(raw, start, zstandard.ZstdError)


class _Frames(io.RawIOBase):
    """The content of zstandard frames or xz streams, one after the other.

    zstandard's own reader takes a cut-off frame for the end, and Python's lzma a damaged second stream.
    """

    def __init__(
        self, raw: BinaryIO, start: Callable[[], Any], error: type[Exception], *, padding: bytes = b""
    ) -> None:
        """start: returns a decompressor of one frame. error: of damaged data. padding: allowed between frames."""
        self._raw = raw
        self._start = start
        self._error = error
        self._padding = padding
        self._frame: Any = None
        self._compressed = b""
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            if not self._compressed:
                self._compressed = self._raw.read(CHUNK_BYTES)
            if self._padding and self._frame is None and self._compressed:
                self._compressed = self._compressed.lstrip(self._padding)
                if not self._compressed:
                    continue
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self._decompress()
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    def _decompress(self) -> None:
        frame = self._frame = self._frame or self._start()
        try:
            self._rest = frame.decompress(self._compressed)
        except self._error as error:
            raise EOFError(str(error)) from error
        self._compressed = b""
        if frame.eof:
            self._compressed = frame.unused_data
            self._frame = None


@contextlib.contextmanager
def open_text(path: str, *, encoding: str = "", newline: str = "\n") -> Iterator[io.TextIOBase]:
    """Yields a file as text: UTF-8 without its byte-order mark, or another `encoding`.

    newline: as of `open`; the default keeps the line ends.

    Raises:
        DataError: it cannot be read or is not text; the message guesses what it is.
        UnavailableError: a library is missing.
    """
    with open_bytes(path) as stream:
        buffered: Any = stream if hasattr(stream, "peek") else io.BufferedReader(stream)  # pyright: ignore[reportArgumentType]
        head = _peek(buffered)
        if not encoding:
            check_head(path, head)
        checked = _Checked(path, buffered, encoding)
        text = io.TextIOWrapper(io.BufferedReader(checked), encoding="utf-8", newline=newline)
        try:
            yield text
        finally:
            text.detach()


Seen = tuple[int, int]  # bytes of a file that were read, and how many of them are invalid


class Line(NamedTuple):
    """One line of a file, with its end."""

    text: str
    offset: int  # the byte at which it begins; 0 where the file must be read from its beginning
    number: int  # from 1; 0 if it is not known
    seen: Seen = (0, 0)  # before it

    @property
    def place(self) -> str:
        """The number of the line, or the byte at which it begins."""
        return str(self.number) if self.number else f"byte {self.offset}"


def read_lines(
    path: str, *, encoding: str = "", start: int = 0, stop: int | None = None, seen: Seen = (0, 0)
) -> Iterator[Line]:
    """Yields the lines of a file that begin at the byte `start` or after it, and before `stop`.

    start, stop: the beginnings of lines, or the file's ends, in a file that is neither compressed nor encoded.
    seen: the bytes that were read before; whether the file is text is judged by them, too.

    Raises:
        DataError: as `open_text`.
        UnavailableError: as `open_text`.
    """
    if path == PIPE or is_compressed(path) or encoding:
        with open_text(path, encoding=encoding) as file:
            for number, line in enumerate(file, 1):
                yield Line(line, 0, number)
        return
    with open_bytes(path) as stream:
        check_head(path, _peek(stream))
        stream.seek(start)
        validity = _Validity(path, seen)
        offset = start
        for number, line in enumerate(stream, 1):
            if stop is not None and offset >= stop:
                break
            text = line.decode("utf-8", "replace")
            before = validity.seen
            validity.count(line, text)
            if offset == 0:
                text = text.removeprefix("\ufeff")  # a byte-order mark
            yield Line(text, offset, 0 if start else number, before)
            offset += len(line)
        validity.check()


def next_line(path: str, target: int) -> int:
    """Returns the byte at which the first line begins that begins at the byte `target` or after it."""
    with open_bytes(path) as stream:
        stream.seek(target - 1)
        return target - 1 + len(stream.readline())


def count_lines(path: str, end: int) -> int:
    """Returns the number of line ends before the byte `end` of a file."""
    count = 0
    with open_bytes(path) as stream:
        while end > 0:
            data = stream.read(min(end, CHECKED_BYTES))
            if not data:
                break
            count += data.count(b"\n")
            end -= len(data)
    return count


def _peek(stream: Any) -> bytes:
    """Returns the first bytes of a buffered stream without taking them."""
    return stream.peek(CHECKED_BYTES)[:CHECKED_BYTES]


def check_head(path: str, head: bytes) -> None:
    """Checks that a file may be UTF-8 text, by its first bytes.

    Raises:
        DataError: it is not; the message guesses what it is.
    """
    for bom, encoding in (UTF_32 | UTF_16).items():
        if head.startswith(bom):
            raise _not_text(path, f"looks like {encoding}", encoding=encoding)
    for signature, what in SIGNATURES.items():
        # A text may begin with the letters of a signature.
        if head.startswith(signature) and not _may_be_text(head):
            raise _not_text(path, f"looks like {what}")
    if b"\0" in head:
        pairs = head[: len(head) // 2 * 2]
        even, odd = pairs[::2].count(0), pairs[1::2].count(0)
        if max(even, odd) > 0.2 * len(pairs) / 2:
            encoding = "utf-16-le" if odd > even else "utf-16-be"
            raise _not_text(path, f"looks like {encoding}", encoding=encoding)
        raise _not_text(path, "holds NUL bytes, so it is binary")


def _may_be_text(head: bytes) -> bool:
    """Returns whether the first bytes of a file are UTF-8 without NULs; the last character may be cut off."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _not_text(path: str, what: str, *, encoding: str = "") -> DataError:
    remedy = "leave the file out"
    if encoding:
        remedy = f"give --encoding={encoding} to gptjax prepare, if all files have it"
    return DataError(f"is not UTF-8 text: {what}", field=path, remedy=remedy)


class _Checked(io.RawIOBase):
    """The bytes of a stream, decoded from `encoding` and encoded in UTF-8, while it is checked that they are text."""

    def __init__(self, path: str, stream: BinaryIO, encoding: str) -> None:
        self._path = path
        self._stream = stream
        self._encoding = encoding
        errors = "strict" if encoding else "replace"
        self._decoder = codecs.getincrementaldecoder(encoding or "utf-8")(errors)
        self._validity = _Validity(path)
        self._rest = b""
        self._read_bytes = 0
        self._is_start = True
        self._is_end = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest and not self._is_end:
            data = self._stream.read(CHECKED_BYTES)
            self._is_end = not data
            self._rest = self._convert(data)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    def _convert(self, data: bytes) -> bytes:
        try:
            text = self._decoder.decode(data, final=self._is_end)
        except UnicodeDecodeError as error:
            raise DataError(
                f"is not {self._encoding}: {error.reason} near byte {self._read_bytes + error.start:,}",
                field=self._path,
                remedy="give the right --encoding",
            ) from error
        if self._is_start and text:
            text = text.removeprefix("\ufeff")  # a byte-order mark
            self._is_start = False
        self._read_bytes += len(data)
        if not self._encoding:
            self._validity.count(data, text)
            if self._is_end:
                self._validity.check()
        return text.encode("utf-8", "surrogatepass")


class _Validity:
    """Counts the bytes of a file that are no UTF-8, and refuses it where they are many."""

    def __init__(self, path: str, seen: Seen = (0, 0)) -> None:
        self._path = path
        self._bytes, self._invalid = seen
        self._checked = self._bytes

    @property
    def seen(self) -> Seen:
        """The bytes so far, and how many of them are invalid."""
        return self._bytes, self._invalid

    def count(self, data: bytes, text: str) -> None:
        """Counts the invalid sequences in `data`, which are U+FFFD in `text`.

        Raises:
            DataError: there are NULs, or too many invalid ones so far.
        """
        if b"\0" in data:
            raise _not_text(self._path, "holds NUL bytes, so it is binary")
        # A file may hold the character U+FFFD itself, in three bytes.
        found = text.count("\ufffd")
        if found:
            self._invalid += max(0, found - data.count("\ufffd".encode()))
        self._bytes += len(data)
        if self._bytes >= self._checked + CHECKED_BYTES:  # a share of a few bytes says nothing
            self.check()

    def check(self) -> None:
        """Raises DataError if too many bytes so far were invalid."""
        self._checked = self._bytes
        if self._invalid >= LEAST_INVALID and self._invalid > UNDECODABLE * self._bytes:
            share = 100 * self._invalid / self._bytes
            raise _not_text(
                self._path,
                f"{self._invalid:,} of {self._bytes:,} bytes ({share:.2g} %) are invalid; perhaps it is latin-1",
                encoding="latin-1",
            )


def size_of(path: str) -> int:
    """Returns the size of a file in bytes; 0 for standard input.

    Raises:
        DataError: it cannot be read.
    """
    if path == PIPE:
        return 0
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", field=path) from error
