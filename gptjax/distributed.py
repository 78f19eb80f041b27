"""Starts JAX and joins the processes of a run: barriers, agreement, the vote to stop, and the exit notice to peers."""

import argparse
import contextlib
import ctypes
import json
import logging
import math
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gptjax import errors, gpu_memory, peers
from gptjax.coordinator import check_coordinator, describe_missing, is_cluster
from gptjax.cpu_memory import keep_freed_memory
from gptjax.devices import check_devices, expects_accelerator
from gptjax.errors import ConfigError, UnavailableError, UserError, first_line, is_utf8
from gptjax.redaction import print_error, redact
from gptjax.signals import Interrupt, Preemption

log = logging.getLogger("gptjax")
WAITING_SECONDS = 10.0  # between two log lines of a process that waits for others
EXIT_NOTICE_SECONDS = 60.0  # process 0, which runs JAX's service, waits at most this long until all have left a notice
COORDINATOR_GRACE_SECONDS = 2.0  # after that, for the others to exit: without the service JAX aborts them
# Removed from the source paths in a program, so that its hash and its key in the compile cache are the same wherever
# gptjax is installed: the text of a Pallas kernel contains them.
INSTALLED_AT = r"^.*[/\\](?:site|dist)-packages[/\\]|^.*[/\\](?=gptjax[/\\])"
_handlers: list[Any] = []
_joined: list[int] = []  # the number of processes, once they are joined


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name the processes of a run, for clusters that JAX cannot detect."""
    parser.add_argument(
        "--coordinator",
        default="",
        metavar="HOST:PORT",
        help="The address of process 0. By default JAX detects it; on a cluster that JAX does not know, give it.",
    )
    parser.add_argument(
        "--num_processes",
        type=int,
        default=0,
        help="The number of processes. Give it with --coordinator; by default JAX detects it.",
    )
    parser.add_argument(
        "--process_id",
        type=int,
        default=-1,
        help="The id of this process, from 0. Give it with --coordinator; by default JAX detects it.",
    )
    parser.add_argument(
        "--join_seconds",
        type=float,
        default=300,
        help="The seconds to wait until all processes have joined.",
    )


def start_jax(
    *, coordinator: str = "", num_processes: int = 0, process_id: int = -1, join_seconds: float = 300
) -> None:
    """Joins the other processes, if any, and configures JAX; call it once, before the first use of a device.

    join_seconds: time limit of the join. After it, the process ends with code 69 and a line that names the missing one.

    Raises:
        ConfigError: the numbers of the processes, or the coordinator's address, are wrong.
        UnavailableError: the platform of JAX_PLATFORMS is not available, a GPU or TPU host would fall back to its CPU,
            or the coordinator's port is in use.
    """
    if not expects_accelerator():
        keep_freed_memory()
    import jax

    _configure_jax()
    if coordinator:
        if not 0 <= process_id < num_processes:
            raise ConfigError(
                f"expected 0 <= id < --num_processes={num_processes}",
                field="--process_id",
                value=process_id,
            )
        check_coordinator(coordinator, is_here=process_id == 0)
    is_several = bool(coordinator) or is_cluster(os.environ)
    if is_several:
        _join(coordinator, num_processes, process_id, join_seconds)
    _choose_gpu_memory(join_seconds if is_several else 0)
    check_devices()
    if is_several:
        _joined.append(jax.process_count())
        if jax.process_index():
            log.setLevel(logging.WARNING)
        exit_where_jax_aborts()
        _watch_peers(coordinator)
        barrier("start", join_seconds)


def _configure_jax() -> None:
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it swallows SIGTERM, which signals.Preemption handles
    jax.config.update("jax_compilation_cache_dir", compile_cache())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a restart compiles many small programs
    jax.config.update("jax_hlo_source_file_canonicalization_regex", INSTALLED_AT)


def _join(coordinator: str, num_processes: int, process_id: int, seconds: float) -> None:
    """Starts jax.distributed. JAX finds the other processes of a cluster itself, so it gets no address there."""
    import jax

    arguments = (coordinator, num_processes, process_id) if coordinator else (None, None, None)
    this_process = f"process {process_id} of {num_processes}" if coordinator else "one process of a cluster"
    log.info(
        "%s on host %s, waiting for the other processes; run the same command on every worker",
        this_process,
        socket.gethostname(),
    )

    def describe() -> str:
        return f"{this_process}: {describe_missing(coordinator, num_processes, process_id)}"

    with _ending_after(seconds, describe):  # JAX's own limit is longer, since it ends the process with an abort
        jax.distributed.initialize(*arguments, initialization_timeout=math.ceil(seconds) + 60)


def _watch_peers(coordinator: str) -> None:
    import jax

    reason = peers.watch(
        _client(),
        number=jax.process_index(),
        count=jax.process_count(),
        coordinator=coordinator,
    )
    if reason:
        log.warning("process 0 cannot be watched (%s): a process that dies is noticed after up to 100 s", reason)


def compile_cache() -> str | None:
    """Returns the directory of compiled programs; None, with a log line, if the user has no writable home directory.

    Raises:
        ConfigError: JAX_COMPILATION_CACHE_DIR is not valid UTF-8.
    """
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if chosen:
        if not is_utf8(chosen):
            raise ConfigError("not valid UTF-8 text", field="JAX_COMPILATION_CACHE_DIR", value=chosen)
        return chosen
    with contextlib.suppress(RuntimeError):  # no HOME, and no such user in passwd, as in some containers
        path = pathlib.Path.home() / ".cache" / "gptjax" / "compiled"
        nearest = next(part for part in (path, *path.parents) if os.path.exists(part))
        if is_utf8(str(path)) and os.access(nearest, os.W_OK):
            return str(path)
    log.info(
        "no home directory to write to: programs are recompiled at each start, unless JAX_COMPILATION_CACHE_DIR names "
        "a directory for them"
    )
    return None


def _choose_gpu_memory(join_seconds: float) -> None:
    """Lets JAX take a larger share of its GPUs than by default, if nobody else uses them on any host; logs it.

    join_seconds: time limit of the processes' exchange; 0 means that there is one process.
    """
    fraction = gpu_memory.choose_fraction()
    if join_seconds:
        answers = _exchange("gptjax/gpus", str(fraction), join_seconds)
        fraction = min(map(float, answers), default=0.0)
    if fraction > 0:
        os.environ[gpu_memory.VARIABLE] = str(fraction)
        percent = f"{100 * fraction:.0f} %"
        log.info("GPU memory: nobody else uses it, so JAX takes %s; to choose: %s", percent, gpu_memory.VARIABLE)


def _exchange(question: str, answer: str, seconds: float) -> set[str]:
    """Returns the answers of all processes, or none if a process is lost: the next `barrier` names it."""
    import jax

    service = _client()
    try:
        service.key_value_set(f"{question}/{uuid.uuid4()}", answer)
        service.wait_at_barrier(question, math.ceil(1000 * seconds))
        return {value for _, value in service.key_value_dir_get(f"{question}/")}
    except jax.errors.JaxRuntimeError:
        return set()


def exit_where_jax_aborts() -> None:
    """Turns an abort of this process into an exit with code 69 and a line on stderr.

    JAX's client aborts in C++ some 85 ms after process 0 has died, whatever its settings are. A handler set by Python's
    `signal` does not run then, but a handler set by the C library does.
    """

    def handle(_: int) -> None:
        peers.settle()  # it names process 0, if that is the cause
        print_error("error: aborted, as JAX does when process 0 is lost; restart the command on every host")
        os._exit(errors.UNAVAILABLE)

    handler_type = ctypes.CFUNCTYPE(None, ctypes.c_int)
    handler = handler_type(handle)
    _handlers.append(handler)  # C holds its address only, so Python must not collect it
    library = ctypes.CDLL(None)
    library.signal.argtypes = [ctypes.c_int, handler_type]
    library.signal.restype = ctypes.c_void_p
    library.signal(signal.SIGABRT, handler)


def barrier(name: str, seconds: float) -> None:
    """Blocks until every process reaches barrier `name`, once per name; returns immediately with one process.

    After `seconds` this process ends with code 69, and a line that names the missing processes with their hosts, and
    why those have left that did. It also ends with code 69 if a peer is lost.
    """
    service = _service()
    if service is None:
        return
    import jax

    mine = jax.process_index()
    point = f"gptjax/meet/{name}"
    service.key_value_set(f"gptjax/host/{mine}", socket.gethostname(), allow_overwrite=True)
    service.key_value_set(f"{point}/{mine}", "here")

    def describe() -> str:
        return f"{name}: {_describe_absent(service, point, jax.process_count())}"

    def has_peer_left() -> bool:
        return bool(_read_by_process(service, "gptjax/left"))

    def leave() -> None:
        service.key_value_set(f"gptjax/left/{mine}", "it waited for another", allow_overwrite=True)

    with _ending_after(seconds, describe, over=has_peer_left, leave=leave):
        try:
            service.wait_at_barrier(point, math.ceil(1000 * (seconds + 60)))
        except jax.errors.JaxRuntimeError as error:
            peers.settle()
            print_error(f"error: {name}: lost a peer: {first_line(error)}; restart the command on every host")
            os._exit(errors.UNAVAILABLE)
    service.key_value_delete(f"{point}/{mine}")


def _read_by_process(service: Any, directory: str) -> dict[int, str]:
    """Returns {process: value} of the keys DIRECTORY/PROCESS in JAX's key-value store."""
    entries = service.key_value_dir_get(f"{directory}/")
    return {int(key.rsplit("/", 1)[1]): value for key, value in entries}


def _describe_absent(service: Any, point: str, count: int) -> str:
    """Returns which of `count` processes have not reached the barrier `point`, and why those left that have."""
    hosts = _read_by_process(service, "gptjax/host")
    arrived = _read_by_process(service, point)
    reasons = _read_by_process(service, "gptjax/left")
    absent = [number for number in range(count) if number not in arrived]
    named = []
    for number in absent:
        host = f" on host {hosts[number]}" if number in hosts else ""
        named.append(f"process {number}{host}")
    gone = [f"; process {number} has left: {reasons[number]}" for number in absent if number in reasons]
    return f"waiting for {', '.join(named) or 'an answer'}{''.join(gone)}"


def _service() -> Any:
    """Returns the client of JAX's key-value store and barriers, None if there is one process."""
    return None if max(_joined, default=1) == 1 else _client()


def _client() -> Any:
    from orbax.checkpoint import multihost  # JAX itself has no public way to it

    return multihost.get_jax_distributed_client()


def leave_the_others(code: int, reason: str) -> None:
    """Publishes the exit reason to peers, then exits with `code`, without JAX's shutdown barrier.

    It returns if there is one process. Process 0 runs JAX's service, so it waits until the others have left a notice.
    """
    service = _service()
    if service is None:
        return
    import jax

    peers.leave(reason)
    deadline = time.monotonic()
    if jax.process_index() == 0:
        deadline += EXIT_NOTICE_SECONDS
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        service.key_value_set(f"gptjax/left/{jax.process_index()}", redact(first_line(reason)), allow_overwrite=True)
        while time.monotonic() < deadline:
            if len(service.key_value_dir_get("gptjax/left/")) >= jax.process_count():
                break
            time.sleep(0.2)
        if deadline > time.monotonic():
            time.sleep(COORDINATOR_GRACE_SECONDS)
    with contextlib.suppress(OSError, UserError):  # the output may be closed or full
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def _ending_after(
    seconds: float,
    describe: Callable[[], str],
    *,
    over: Callable[[], bool] = lambda: False,
    leave: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Ends this process with code 69 if the context lasts longer than `seconds`, or when `over` returns True.

    A thread does so, because JAX waits in C++, and aborts there at its own limit. The thread also logs a line every
    WAITING_SECONDS.

    describe: returns the text of these lines and of the error. leave: called before the process ends.
    """
    done = threading.Event()
    ending = threading.Lock()
    start = time.monotonic()

    def watch() -> None:
        last_line = start
        while not done.wait(max(0.0, min(1.0, start + seconds - time.monotonic()))):
            waited = time.monotonic() - start
            try:
                must_end = waited >= seconds or over()
                state = describe()
            except Exception as error:  # any error of the service, whose process has ended
                peers.settle()
                must_end = True
                state = f"the other processes do not answer: {first_line(error)}"
            with ending:  # the context may just have been left
                if done.is_set():
                    return
                if must_end:
                    print_error(f"error: {state}; start the missing process or restart all")
                    with contextlib.suppress(Exception):
                        leave()
                    os._exit(errors.UNAVAILABLE)
            if start + waited >= last_line + WAITING_SECONDS:
                log.warning("%s (%.0f of %.0f s)", state, waited, seconds)
                last_line = start + waited

    threading.Thread(target=watch, daemon=True, name="joining").start()
    try:
        yield
    finally:
        with ending:
            done.set()


class StopVote:
    """Agrees across processes, at the same step, whether to stop.

    With one process its own answer counts at once. With several, `submit` starts an all-reduce (max) of the answers on
    the devices, and `result` reads it. All processes must call both, in the same order.
    """

    def __init__(self, preemption: Preemption | Interrupt, mesh: Any) -> None:
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        self._preemption = preemption
        self._agreed = False  # the result of the votes so far
        self._is_several = jax.process_count() > 1
        self._one_per_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._max = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    @property
    def stopping(self) -> bool:
        """Whether to stop, according to the results read so far."""
        return self._agreed if self._is_several else self._preemption.requested

    def submit(self) -> Any:
        """Starts a vote without waiting for it.

        Returns a replicated int32 scalar for `result`, or None with one process.
        """
        if not self._is_several:
            return None
        import jax
        import numpy as np

        answers = np.full(jax.local_device_count(), self._preemption.requested, np.int32)
        return self._max(jax.make_array_from_process_local_data(self._one_per_device, answers))

    def result(self, answer: Any) -> bool:
        """Waits for an `answer` of `submit`, None for none, and returns whether to stop."""
        if answer is not None:
            self._agreed |= bool(answer)
        return self.stopping


def gather_json(value: Any) -> list[Any]:
    """Returns the JSON-serialisable `value` of each process, in the order of the processes; all must call it."""
    import jax

    if jax.process_count() == 1:
        return [value]
    import numpy as np
    from jax.experimental import multihost_utils

    text = json.dumps(value, sort_keys=True).encode()
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.frombuffer(text.ljust(int(np.max(lengths))), np.uint8)  # JSON ignores trailing spaces
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]


def check_agreement(what: str, values: Mapping[str, Any]) -> None:
    """Checks that the JSON-serialisable `values` agree on all processes; all must call it.

    what: the subject of the message, such as "config".

    Raises:
        UnavailableError: they differ; every process raises it.
    """
    all_values = gather_json(values)
    found = []
    for number, theirs in enumerate(all_values):
        for name, first in all_values[0].items():
            if theirs.get(name) != first:
                problem = f"process {number} has {name}={theirs.get(name)!r}, process 0 {first!r}"
                found.append(UnavailableError(problem, field=what))
    if found:
        advice = UnavailableError("start the same command, with the same data, on every worker")
        raise UnavailableError.of([*found, advice])
