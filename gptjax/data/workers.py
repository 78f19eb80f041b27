"""Processes that tokenize documents. Threads do not help: tiktoken's results are made under Python's global lock.

The processes are started by a command, not by `multiprocessing`, which runs the caller's own script again in each.
"""

import collections
import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from gptjax.data.encoding import Encoded, encode_documents
from gptjax.data.source import Document
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import UnavailableError, UserError

ALONE_CHARACTERS = 2**24  # of a source's beginning that this process encodes before it starts others
TASKS_PER_PROCESS = 3  # that wait or run, so that none is idle

Batch = list[Document]

_CHILD = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from gptjax.data import workers
workers.serve()
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
        size += sum(len(document.text) for document in batch)
        if processes > 1 and size >= ALONE_CHARACTERS:
            break
    with contextlib.ExitStack() as stack:
        pool: _Pool | None = None
        waiting: collections.deque[tuple[Batch, Future[Encoded]]] = collections.deque()
        for batch in remaining:
            if pool is None:  # only now, since a source may have ended
                pool = stack.enter_context(_Pool(tokenizer, processes))
            waiting.append((batch, pool.submit(batch)))
            if len(waiting) > TASKS_PER_PROCESS * processes:
                yield _result(waiting)
        while waiting:
            yield _result(waiting)


def _result(waiting: "collections.deque[tuple[Batch, Future[Encoded]]]") -> tuple[Batch, Encoded]:
    batch, future = waiting.popleft()
    return batch, future.result()


class _Pool:
    """Worker processes, each with a thread that waits for its results."""

    def __init__(self, tokenizer: Tokenizer, processes: int) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(processes)
        path = [place for place in sys.path if isinstance(place, str)]
        start = pickle.dumps(path) + pickle.dumps(tokenizer)
        try:
            for _ in range(processes):
                process = subprocess.Popen([sys.executable, "-I", "-c", _CHILD], stdin=-1, stdout=-1)
                self._processes.append(process)
                _send(process, start)
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
            _send(process, pickle.dumps(batch))
            assert process.stdout is not None
            result: Any = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            status = process.wait()
            raise UnavailableError(
                f"a process that tokenizes has ended (status {status}); memory may be full",
                field="--processes",
                value=len(self._processes),
                remedy="give a smaller number; the same command continues where it was",
            ) from error
        finally:
            self._idle.put(process)
        if isinstance(result, UserError):
            raise result
        return result

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


def _send(process: "subprocess.Popen[bytes]", message: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(message)
    process.stdin.flush()


def serve() -> None:
    """Encodes the batches that arrive on standard input, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which stops this process
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)  # what a library prints must not be among the results
        tokenizer = pickle.load(sys.stdin.buffer)
        while True:
            try:
                batch = pickle.load(sys.stdin.buffer)
            except EOFError:  # the parent has ended
                return
            result: Encoded | UserError
            try:
                result = encode_documents(batch, tokenizer)
            except UserError as error:
                result = error
            pickle.dump(result, output)
            output.flush()
