"""One answer of an HTTP server, received within limits on its bytes, its redirects and its time.

Another thread reads the answer, so that a server cannot block the caller by sending a byte now and then, or headers
without end.
"""

import contextlib
import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gptjax.errors import DataError, UnavailableError, one_line

LEAST_RATE = 1024  # bytes per second; a slower server counts as unreachable
RATE_SECONDS = 60.0  # over which the rate is averaged
MOST_REDIRECTS = 10
WAITING_PIECES = 64  # received and not yet taken, of about 64 KiB each
UNZIPPED_BYTES = 2**16  # of one piece that gzip expands
TICK_SECONDS = 0.25  # between two checks of a waiting thread
GZIP = 16 + zlib.MAX_WBITS  # zlib's code for the gzip format
GZIP_OVERHEAD = 4096  # bytes by which gzip may enlarge a file, in addition to a thousandth of it


class TooLongError(DataError):
    """A server sends more bytes than it announced, or more than an answer may have."""


class TooSlowError(UnavailableError):
    """A server sends fewer bytes per second than LEAST_RATE."""


class RefusedError(Exception):
    """A server answers with the status of an error."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"status {status} {one_line(code)}")
        self.status = status
        self.code = code  # of the Hub, such as RevisionNotFound


class Pace:
    """The rate of one download over all of its connections; only time spent waiting for the server counts."""

    def __init__(self) -> None:
        self._waited = 0.0  # seconds
        self._received = 0  # bytes

    def add_bytes(self, count: int) -> None:
        """Counts `count` received bytes."""
        self._received += count

    def add_wait(self, seconds: float) -> None:
        """Counts a wait for the server.

        Raises:
            TooSlowError: RATE_SECONDS have passed, and fewer bytes have arrived than LEAST_RATE allows.
        """
        self._waited += seconds
        if self._waited < RATE_SECONDS:
            return
        if self._received < LEAST_RATE * self._waited:
            raise TooSlowError(
                f"the server sent {self._received:,} bytes in {self._waited:.0f} s, "
                f"less than {LEAST_RATE:,} bytes per second"
            )
        self._waited = 0.0
        self._received = 0

    def sleep(self, seconds: float) -> None:
        """Waits before another attempt.

        Raises:
            TooSlowError: as in `add_wait`.
        """
        time.sleep(seconds)
        self.add_wait(seconds)


class Answer:
    """An answer whose headers have arrived. `pieces` yields its bytes once."""

    def __init__(
        self,
        status: int,
        headers: Mapping[str, str],
        take: Callable[[], bytes | None],
    ) -> None:
        self.status = status
        self._headers = headers
        self._take = take

    def header(self, name: str) -> str:
        """Returns a header by its name in lower case, "" if there is none."""
        return self._headers.get(name, "")

    def pieces(self, limit: int) -> Iterator[bytes]:
        """Yields the bytes of the answer as they arrive, uncompressed, at most `limit` of them.

        The limit counts bytes that arrive, whatever Content-Length announces.

        Raises:
            TooLongError: the server sends more than `limit`.
            TooSlowError: it sends fewer bytes per second than LEAST_RATE.
            UnavailableError: the bytes are compressed in another way than gzip, or the gzip is damaged.
        """
        encoding = self._headers.get("content-encoding", "").strip().lower()
        if encoding in ("", "identity"):
            yield from _at_most(self._received(), limit)
        elif encoding in ("gzip", "x-gzip"):
            # Not requested, but some servers compress anyway.
            most_compressed = limit + limit // 1000 + GZIP_OVERHEAD
            compressed = _at_most(self._received(), most_compressed)
            yield from _at_most(_unzip(compressed), limit)
        else:
            raise UnavailableError(
                f"the server compresses its answer as {one_line(encoding)!r}, which was not asked for"
            )

    def _received(self) -> Iterator[bytes]:
        while (piece := self._take()) is not None:
            yield piece


def _at_most(pieces: Iterator[bytes], limit: int) -> Iterator[bytes]:
    remaining = limit
    for piece in pieces:
        if len(piece) > remaining:
            raise TooLongError(f"the server sends more than the {limit:,} bytes that are expected")
        remaining -= len(piece)
        yield piece


def _unzip(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yields the uncompressed bytes in pieces of at most UNZIPPED_BYTES; bytes after the gzip's end are dropped."""
    unzipper = zlib.decompressobj(GZIP)
    for piece in pieces:
        while piece and not unzipper.eof:
            try:
                yield unzipper.decompress(piece, UNZIPPED_BYTES)
            except zlib.error as error:
                raise UnavailableError(f"the server sends gzip that is damaged: {one_line(error)}") from error
            piece = unzipper.unconsumed_tail
    if not unzipper.eof:
        raise UnavailableError("the server sends gzip that ends too early")


@contextlib.contextmanager
def opened(
    client: Any,
    url: str,
    headers: Mapping[str, str],
    *,
    timeout: float,
    pace: Pace,
) -> Iterator[Answer]:
    """Requests `url` and yields its answer, after at most MOST_REDIRECTS redirects, whose bodies are not read.

    client: httpx's, from huggingface_hub.
    timeout: seconds for a connection, and for the next bytes.
    pace: counts the bytes and the time spent waiting, over all attempts of one download.

    Raises:
        RefusedError: the status is an error.
        TooSlowError: the headers do not arrive.
        UnavailableError: there are more redirects.
    """
    plain_headers = {**headers, "Accept-Encoding": "identity"}
    reader = _Reader(client, url, plain_headers, timeout)
    try:
        status, answered = reader.take(pace)
        if status >= 400:
            raise RefusedError(status, answered.get("x-error-code", ""))
        yield Answer(status, answered, lambda: reader.take(pace))
    finally:
        reader.stop()


class _Reader:
    """Reads one answer in a thread.

    The queue has (status, headers), then pieces of bytes, then None; or the error that ended the thread.
    """

    def __init__(
        self,
        client: Any,
        url: str,
        headers: Mapping[str, str],
        timeout: float,
    ) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(WAITING_PIECES)
        self._stopped = threading.Event()
        request = client.build_request("GET", url, headers=headers, timeout=timeout)
        # A daemon, so that a server that blocks it after `stop` does not keep the process alive.
        thread = threading.Thread(target=self._run, args=(client, request), daemon=True)
        thread.start()

    def take(self, pace: Pace) -> Any:
        """Returns the next item, or raises the connection's error; `pace` counts the time until then."""
        while True:
            start = time.monotonic()
            try:
                item = self._queue.get(timeout=TICK_SECONDS)
            except queue.Empty:
                item = self  # nothing yet
            # At most one tick counts. A longer wait means that this process was suspended, or had no CPU.
            waited = time.monotonic() - start
            pace.add_wait(min(waited, TICK_SECONDS))
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, bytes):
                pace.add_bytes(len(item))
            if item is not self:
                return item

    def stop(self) -> None:
        self._stopped.set()

    def _run(self, client: Any, request: Any) -> None:
        try:
            response = _follow(client, request)
            with contextlib.closing(response):
                self._put((response.status_code, dict(response.headers)))
                for piece in response.iter_raw():
                    if not self._put(piece):
                        return
            self._put(None)
        except BaseException as error:  # `take` raises it in the caller's thread
            self._put(error)

    def _put(self, item: Any) -> bool:
        """Returns False if `stop` was called before the queue had space for the item."""
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=TICK_SECONDS)
                return True
        return False


def _follow(client: Any, request: Any) -> Any:
    """Follows the redirects and returns the last response, whose body is not read.

    httpx does not send the token to another server.
    """
    for _ in range(MOST_REDIRECTS + 1):
        response = client.send(request, stream=True, follow_redirects=False)
        if response.next_request is None:
            return response
        response.close()
        request = response.next_request
    raise UnavailableError(f"the server redirects more than {MOST_REDIRECTS} times")
