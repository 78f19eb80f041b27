"""Processes that tokenize documents.

Threads do not help: tiktoken's results are made under Python's global lock. The processes are started by a command, not
by `multiprocessing`, which runs the caller's own script again in each.
"""

import collections
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, cast

import numpy as np

from gptjax.data.encoding import Encoded, encode_documents
from gptjax.data.header import token_dtype
from gptjax.data.source import Document, Place, Whole
from gptjax.data.tokenizer import Tokenizer, load_tokenizer
from gptjax.errors import DataError, UnavailableError, UserError

ALONE_CHARACTERS = 2**24  # of a source's beginning that this process encodes before it starts others
TASKS_PER_PROCESS = 3  # that wait or run, so that none is idle
MOST_CHARACTERS = 2**28  # that wait or are encoded, of documents that are longer than a task should be

Batch = list[Document]

_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from gptjax.data import workers
workers.serve(sys.argv[2])
"""


def usable_cpus() -> int:
    """Returns the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def encode_all(batches: Iterable[Batch], tokenizer: Tokenizer, *, processes: int) -> Iterator[tuple[Batch, Encoded]]:
    """Yields each batch with its ids, in order, computed by `processes` processes where there is much text.

    Raises:
        DataError: as `encode_documents`.
        UnavailableError: a process cannot be started, or has ended.
    """
    remaining = iter(batches)
    size = 0
    for batch in remaining:
        yield batch, encode_documents(batch, tokenizer)
        size += _characters(batch)
        if processes > 1 and size >= ALONE_CHARACTERS:
            break
    with contextlib.ExitStack() as stack:
        pool: _Pool | None = None
        held = 0  # characters that wait or are encoded
        waiting: collections.deque[tuple[Batch, Future[Encoded]]] = collections.deque()
        for batch in remaining:
            if pool is None:  # only now, since a source may have ended
                pool = stack.enter_context(_Pool(tokenizer, processes))
            waiting.append((batch, pool.submit(batch)))
            held += _characters(batch)
            while len(waiting) > TASKS_PER_PROCESS * processes or (held > MOST_CHARACTERS and len(waiting) > 1):
                held -= _characters(waiting[0][0])
                yield _result(waiting)
        while waiting:
            yield _result(waiting)


def _characters(batch: Batch) -> int:
    return sum(len(document.text) for document in batch)


def _result(waiting: "collections.deque[tuple[Batch, Future[Encoded]]]") -> tuple[Batch, Encoded]:
    batch, future = waiting.popleft()
    return batch, future.result()


class _Pool:
    """Worker processes, each with a thread that waits for its results."""

    def __init__(self, tokenizer: Tokenizer, processes: int) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(processes)
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._folder = tempfile.TemporaryDirectory()
        path = json.dumps([place for place in sys.path if isinstance(place, str)])
        saved = os.path.join(self._folder.name, "tokenizer.json")
        try:
            tokenizer.save(saved)
            for _ in range(processes):
                process = subprocess.Popen(
                    [sys.executable, "-I", "-c", _CHILD, path, saved],
                    stdin=-1,
                    stdout=-1,
                    start_new_session=True,  # Ctrl-C reaches the parent alone, which stops them
                )
                self._processes.append(process)
                self._idle.put(process)
        except OSError as error:
            self._stop()
            raise UnavailableError(
                f"no process can be started: {error.strerror}", field="--processes", value=processes, remedy="give 1"
            ) from error

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def submit(self, batch: Batch) -> "Future[Encoded]":
        """Returns the future ids of a batch."""
        return self._threads.submit(self._encode, batch)

    def _encode(self, batch: Batch) -> Encoded:
        process = self._idle.get()
        try:
            _write_batch(cast(BinaryIO, process.stdin), batch)
            return _read_encoded(cast(BinaryIO, process.stdout), self._dtype)
        except (OSError, EOFError) as error:
            status = process.wait()
            raise UnavailableError(
                f"a process that tokenizes has ended (status {status}); memory may be full",
                field="--processes",
                value=len(self._processes),
                remedy="give a smaller number; the same command continues where it was",
            ) from error
        finally:
            self._idle.put(process)

    def _stop(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()  # it has nothing to save
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was left in it has no reader any more
                    if pipe:
                        pipe.close()
        self._folder.cleanup()


def serve(tokenizer_path: str) -> None:
    """Encodes the batches that arrive on standard input, until it ends."""
    with contextlib.suppress(BrokenPipeError), os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)  # what a library prints must not be among the results
        tokenizer = load_tokenizer(tokenizer_path)
        while True:
            try:
                batch = _read_batch(sys.stdin.buffer)
            except EOFError:  # the parent has ended
                return
            try:
                encoded = encode_documents(batch, tokenizer)
            except UserError as error:
                _write(output, {"error": [error.exit_code, error.field, error.problem, error.remedy]})
                continue
            arrays = [encoded.ids, encoded.tokens, encoded.text_bytes, encoded.hashes]
            _write(output, {}, *(array.tobytes() for array in arrays))


# Messages: the length of a header of JSON, the header, and parts of bytes.


def _write(stream: BinaryIO, header: dict[str, Any], *parts: bytes) -> None:
    encoded = json.dumps(header | {"sizes": [len(part) for part in parts]}).encode()
    stream.write(len(encoded).to_bytes(8, "little") + encoded)
    for part in parts:
        stream.write(part)
    stream.flush()


def _read(stream: BinaryIO) -> tuple[dict[str, Any], list[bytes]]:
    """Returns the header and the parts of the next message.

    Raises:
        EOFError: there is none, or not all of it.
    """
    header = json.loads(_read_exactly(stream, int.from_bytes(_read_exactly(stream, 8), "little")))
    return header, [_read_exactly(stream, size) for size in header["sizes"]]


def _read_exactly(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content


def _write_batch(stream: BinaryIO, batch: Batch) -> None:
    described = []
    for document in batch:
        whole = [document.whole.text_hash.hex(), document.whole.characters] if document.whole else None
        described.append([document.name, whole, document.is_end])
    _write(stream, {"documents": described}, *(document.text.encode() for document in batch))


def _read_batch(stream: BinaryIO) -> Batch:
    header, texts = _read(stream)
    batch = []
    for (name, whole, is_end), text in zip(header["documents"], texts, strict=True):
        of_whole = Whole(bytes.fromhex(whole[0]), whole[1]) if whole else None
        batch.append(Document(name, text.decode(), Place(), of_whole, is_end))
    return batch


def _read_encoded(stream: BinaryIO, dtype: np.dtype) -> Encoded:
    """Returns the ids of a batch.

    Raises:
        UserError: the process could not encode it.
        EOFError: the process has ended.
    """
    header, parts = _read(stream)
    if "error" in header:
        code, field, problem, remedy = header["error"]
        kind = UnavailableError if code == UnavailableError.exit_code else DataError
        error = kind(problem, remedy=remedy)
        error.field = field  # the problem begins with it already
        raise error
    ids, tokens, text_bytes, hashes = parts
    return Encoded(
        ids=np.frombuffer(ids, dtype),
        tokens=np.frombuffer(tokens, np.int64),
        text_bytes=np.frombuffer(text_bytes, np.int64),
        hashes=np.frombuffer(hashes, np.uint8).reshape(-1, 32),
    )
