"""What surrounds a run: flags, exit codes, logging, JAX's settings, signals, and the lock on the work directory."""

import argparse
import contextlib
import difflib
import faulthandler
import fcntl
import json
import logging
import math
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from gptjax import errors
from gptjax.errors import ConfigError, UnavailableError, UserError, WorkdirError, plain

log = logging.getLogger("gptjax")
OVERRIDE = "--config."
WAITING_SECONDS = 10.0  # between two lines of a process that waits for others
LAST_WORDS_SECONDS = 60.0  # for which process 0, and the service with it, stays at most until all know why it leaves
SECRETS = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)$")  # ends of the names of variables
SHORTEST_SECRET = 8  # characters; what is shorter would be found in words
LEAVING_SECONDS = 2.0  # then, for the others to have ended: one that is left without the service is aborted
# What Orbax's coroutines and tensorstore's threads meet when a read or save that failed, and was told, is over.
FORGOTTEN = ("Event loop is closed", "Encountered error while reading array index")
_joined: list[int] = []  # how many processes there are, once they are joined


class Parser(argparse.ArgumentParser):
    """Reads a command line; what is wrong with it is a ConfigError, and a mistyped flag names the nearest ones."""

    def __init__(self, description: str | None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, allow_abbrev=False, formatter_class=formatter)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(plain(message))

    def parse_strictly(self, arguments: list[str]) -> argparse.Namespace:
        parsed, rest = self.parse_known_args(arguments)
        for argument in rest:
            raise ConfigError(self.unknown(argument))
        return parsed

    def unknown(self, argument: str) -> str:
        near = difflib.get_close_matches(argument.split("=")[0], list(self._option_string_actions), 2)
        return f"{plain(argument)}: no such flag" + (f"; nearest: {', '.join(near)}" if near else "")


def run_cli(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs main(arguments) and leaves with a documented exit code; a user's mistake never shows a traceback."""
    start_logging()
    try:
        code = main(sys.argv[1:]) or errors.OK
    except UserError as error:
        for line in str(error).splitlines():
            complain(f"error: {line}")
        code = error.exit_code
        _leave_the_others(code, str(error))
    except KeyboardInterrupt:
        complain("interrupted")
        code = errors.PREEMPTED
        _leave_the_others(code, "interrupted")
    except Exception as error:  # a bug of ours
        complain(traceback.format_exc().rstrip())
        code = 1
        _leave_the_others(code, repr(error))
    try:
        sys.stdout.flush()
    except OSError:  # where it goes is full, or gone: the code still tells how it ended
        os._exit(code)
    sys.exit(code)


def complain(text: str) -> None:
    """Prints to stderr, if it can be printed to: what ends a process must do so when nobody listens any more."""
    with contextlib.suppress(OSError):
        print(redact(text), file=sys.stderr, flush=True)


def redact(text: str) -> str:
    """Returns `text` with [NAME] in place of the value of each variable of the environment that holds a secret."""
    for name, value in _secrets():
        text = text.replace(value, f"[{name}]")
    return text


def refuse_secrets(settings: Mapping[str, Any]) -> None:
    """Raises ConfigError if a setting holds a secret of the environment: it would be in every checkpoint."""
    for name, value in settings.items():
        for variable, secret in _secrets():
            if isinstance(value, str) and secret in value:
                raise ConfigError(f"{name}: contains the value of {variable}, which would stand in every checkpoint")


def _secrets() -> list[tuple[str, str]]:
    return [(n, v) for n, v in os.environ.items() if SECRETS.search(n.upper()) and len(v) >= SHORTEST_SECRET]


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def parse_overrides(parser: Parser, arguments: list[str]) -> dict[str, str]:
    """Returns {"model.n_layer": "6"} of ["--config.model.n_layer=6"] or of the same as two arguments.

    Raises:
        ConfigError: an argument is of another form.
    """
    found, rest = {}, list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith(OVERRIDE):
            raise ConfigError(parser.unknown(argument))
        name, equals, value = argument[len(OVERRIDE) :].partition("=")
        if not equals and (not rest or rest[0].startswith("--")):
            raise ConfigError(f"{plain(argument)}: needs a value, as in {plain(argument)}=VALUE")
        found[name] = value if equals else rest.pop(0)
    return found


def start_logging() -> None:
    """Sends the project's own lines to stdout as they are, and of other libraries' the gravest only to stderr."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Redacting("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    for name in ("absl", "asyncio", "concurrent.futures"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # Orbax logs a page of each error that it raises as well
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's own notices
    sys.unraisablehook = tell_unraisable
    # Orbax forgets its other coroutines when one fails; they are collected whenever.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def tell_unraisable(unraisable: Any) -> None:
    """Prints what nobody could catch, but for what is FORGOTTEN."""
    if not str(unraisable.exc_value).startswith(FORGOTTEN):
        sys.__unraisablehook__(unraisable)


def start_jax(
    *, coordinator: str = "", num_processes: int = 0, process_id: int = -1, join_seconds: float = 300
) -> None:
    """Joins the other processes, if any, and sets what JAX needs; call it once, before the first use of a device.

    join_seconds: after so long without one of the others the process ends with code 69 and a line that says so.

    Raises:
        ConfigError: the numbers of the processes are wrong.
        UnavailableError: the platform asked for is not there, or a GPU or TPU host would fall back to its CPU.
    """
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it swallows SIGTERM: see Preemption
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(pathlib.Path.home() / ".cache" / "gptjax" / "compiled")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a restart compiles many small ones
    if coordinator and not 0 <= process_id < num_processes:
        raise ConfigError(f"--process_id={process_id} --num_processes={num_processes}: expected 0 <= id < number")
    several = bool(coordinator) or is_cluster(os.environ)
    if several:
        given = (coordinator, num_processes, process_id) if coordinator else (None, None, None)
        whom = f"process {process_id} of {num_processes}" if coordinator else "one process of a cluster"
        log.info("%s on host %s, joining the others; run the same command on every worker", whom, socket.gethostname())
        with _ending_after(join_seconds, lambda: f"{whom}: {_missing(coordinator, num_processes, process_id)}"):
            jax.distributed.initialize(*given, initialization_timeout=math.ceil(join_seconds) + 60)
    _check_devices()
    if several:
        _joined.append(jax.process_count())
        if jax.process_index():
            log.setLevel(logging.WARNING)
        meet("start", join_seconds)


def meet(name: str, seconds: float) -> None:
    """Returns when all processes have come to the point `name`, which each passes once; of one process at once.

    Who is not there in time is named, with its host, and so is one that has left, with its reason; then this process
    ends with code 69, like one whose peer is gone.
    """
    service = _service()
    if service is None:
        return
    import jax

    mine, point = jax.process_index(), f"gptjax/meet/{name}"
    service.key_value_set(f"gptjax/host/{mine}", socket.gethostname(), allow_overwrite=True)
    service.key_value_set(f"{point}/{mine}", "here")

    def read(directory: str) -> dict[int, str]:
        return {int(key.rsplit("/", 1)[1]): value for key, value in service.key_value_dir_get(f"{directory}/")}

    def missing() -> str:
        hosts, here, left = read("gptjax/host"), read(point), read("gptjax/left")
        absent = [number for number in range(jax.process_count()) if number not in here]
        named = [f"process {n}" + (f" on host {hosts[n]}" if n in hosts else "") for n in absent]
        gone = [f"; process {n} has left: {left[n]}" for n in absent if n in left]
        return f"{name}: waiting for {', '.join(named) or 'an answer'}{''.join(gone)}"

    def leave() -> None:
        service.key_value_set(f"gptjax/left/{mine}", "it waited for another", allow_overwrite=True)

    with _ending_after(seconds, missing, over=lambda: bool(read("gptjax/left")), leave=leave):
        try:
            service.wait_at_barrier(point, math.ceil(1000 * (seconds + 60)))
        except jax.errors.JaxRuntimeError as error:
            complain(
                f"error: {name}: another process is gone: {first_line(error)}; start the same command again on all"
            )
            os._exit(errors.UNAVAILABLE)
    service.key_value_delete(f"{point}/{mine}")


def first_line(what: object) -> str:
    return str(what).partition("\n")[0]


def _service() -> Any:
    """Returns JAX's client of the service that joins several processes, None where there is one process."""
    if max(_joined, default=1) == 1:
        return None
    from orbax.checkpoint import multihost  # JAX itself has no public way to it

    return multihost.get_jax_distributed_client()


def _leave_the_others(code: int, reason: str) -> None:
    """Ends this process with `code` and tells the others why, where there are others: an orderly end waits for them."""
    service = _service()
    if service is None:
        return
    import jax

    deadline = time.monotonic() + (LAST_WORDS_SECONDS if jax.process_index() == 0 else 0)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        service.key_value_set(f"gptjax/left/{jax.process_index()}", redact(first_line(reason)), allow_overwrite=True)
        while time.monotonic() < deadline and len(service.key_value_dir_get("gptjax/left/")) < jax.process_count():
            time.sleep(0.2)
        if deadline > time.monotonic():
            time.sleep(LEAVING_SECONDS)
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
    """Ends this process with code 69 if what runs inside takes longer, or is `over`; says now and then what it awaits.

    A thread must: JAX waits in C++, and there it aborts at its own limit.
    """
    done, ending, start = threading.Event(), threading.Lock(), time.monotonic()

    def watch() -> None:
        said = start
        while not done.wait(max(0.0, min(1.0, start + seconds - time.monotonic()))):
            waited = time.monotonic() - start
            try:
                end = waited >= seconds or over()
                what = describe()
            except Exception as error:  # whatever the service answers that has gone with its process
                end, what = True, f"the other processes do not answer: {first_line(error)}"
            with ending:  # so that what has come to its end is not ended here
                if done.is_set():
                    return
                if end:
                    complain(f"error: {what}; start it, or start all of them again")
                    with contextlib.suppress(Exception):
                        leave()
                    os._exit(errors.UNAVAILABLE)
            if start + waited >= said + WAITING_SECONDS:
                log.warning("%s (%.0f of %.0f s)", what, waited, seconds)
                said = start + waited

    threading.Thread(target=watch, daemon=True, name="joining").start()
    try:
        yield
    finally:
        with ending:
            done.set()


def _missing(coordinator: str, num_processes: int, process_id: int) -> str:
    """Returns what a process that has not been joined waits for, as far as it can know."""
    if process_id <= 0:
        others = "process 1" if num_processes == 2 else f"one or more of processes 1 to {num_processes - 1}"
        return f"waiting for {others if coordinator else 'the other processes'}" + (
            f" to come to {coordinator}" if coordinator else ""
        )
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except (OSError, ValueError):
        return f"waiting for process 0, which does not answer at {coordinator}"
    return f"process 0 answers at {coordinator}; waiting for another one of the {num_processes}"


def is_cluster(environment: Mapping[str, str]) -> bool:
    """Returns whether the environment tells of more than one process: SLURM, Open MPI, a TPU pod, or JAX's own."""
    counts = (environment.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    workers = environment.get("TPU_WORKER_HOSTNAMES", "")
    return any(c.isdigit() and int(c) > 1 for c in counts) or "," in workers or "JAX_COORDINATOR_ADDRESS" in environment


def _check_devices() -> None:
    import jax

    wanted = os.environ.get("JAX_PLATFORMS", "")
    try:
        platform = jax.devices()[0].platform
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else "its plugin is not installed"
        raise UnavailableError(
            f"JAX_PLATFORMS={wanted or '(unset)'}: no such device: {reason}; "
            "pip install 'gptjax[cuda]' or 'gptjax[tpu]'"
        ) from error
    accelerators = {"/dev/nvidia0": "cuda", "/dev/accel0": "tpu", "/dev/vfio/0": "tpu"}
    present = next((extra for path, extra in accelerators.items() if os.path.exists(path)), "")
    if platform == "cpu" and present and not wanted:
        raise UnavailableError(
            f"this machine has a {present} device, but JAX sees only its CPU: pip install 'gptjax[{present}]', "
            "or set JAX_PLATFORMS=cpu to train on the CPU"
        )


class Preemption:
    """Notes SIGTERM and SIGINT: the first asks the run to save and leave, the second leaves at once with code 75.

    So does the first, until `has_begun`: while data are prepared or a checkpoint is read there is nothing to save.

    Signals arrive through a pipe read by a thread, so that the second one works even while the main thread is inside
    a long compilation.
    """

    def __init__(self) -> None:
        self.requested = self.has_begun = False
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)

    def __enter__(self) -> "Preemption":
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._old = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
        threading.Thread(target=self._listen, daemon=True, name="signals").start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._write)  # ends the thread

    def _listen(self) -> None:
        while received := os.read(self._read, 1):
            if received[0] not in (signal.SIGTERM, signal.SIGINT):
                continue
            if self.requested:
                os._exit(errors.PREEMPTED)
            name = signal.Signals(received[0]).name
            if not self.has_begun:
                log.warning("%s: nothing has begun, nothing is lost: start the same command again", name)
                os._exit(errors.PREEMPTED)
            self.requested = True
            log.warning("%s: saving a checkpoint after this step; a second signal leaves at once", name)
        os.close(self._read)


class Consensus:
    """Whether to stop: what one process has been asked, all of them learn at the same step.

    Of one process it is its own answer, at once. Of several, `ask` has the devices collect the answers, and `hear`
    reads what they found: all processes call both, in the same order.
    """

    def __init__(self, preemption: Preemption, mesh: Any) -> None:
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        self._preemption, self._heard = preemption, False
        self._several = jax.process_count() > 1
        self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._most = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    @property
    def stopping(self) -> bool:
        return self._heard if self._several else self._preemption.requested

    def ask(self) -> Any:
        """Returns what `hear` takes; nothing waits for it."""
        if not self._several:
            return None
        import jax
        import numpy as np

        mine = np.full(jax.local_device_count(), self._preemption.requested, np.int32)
        return self._most(jax.make_array_from_process_local_data(self._each, mine))

    def hear(self, answer: Any) -> bool:
        if answer is not None:
            self._heard |= bool(answer)
        return self.stopping


def check_agreement(what: str, values: Mapping[str, Any]) -> None:
    """Raises UnavailableError, in every process, unless all have the same `values`, which JSON can hold."""
    import jax

    if jax.process_count() == 1:
        return
    import numpy as np
    from jax.experimental import multihost_utils

    text = json.dumps(values, sort_keys=True).encode()
    length = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    padded = np.frombuffer(text.ljust(length), np.uint8)
    all_values = [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]
    lines = [
        f"{what}: process {number} has {name}={theirs.get(name)!r}, process 0 {first!r}"
        for number, theirs in enumerate(all_values)
        for name, first in all_values[0].items()
        if theirs.get(name) != first
    ]
    if lines:
        raise UnavailableError("\n".join([*lines, "start the same command, with the same data, on every worker"]))


class Watchdog:
    """Ends a process that hangs: with code 69 and the stacks of all threads, when no `beat` has come for so long."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._done, self._last = seconds, threading.Event(), time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def beat(self) -> None:
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._done.wait(max(0.0, self._last + self._seconds - time.monotonic())):
            if time.monotonic() - self._last >= self._seconds:
                what = f"nothing has ended for train.watchdog_seconds={self._seconds:g}"
                complain(f"error: {what}; the stacks of all threads follow, then start the same command again")
                with contextlib.suppress(Exception):
                    faulthandler.dump_traceback(all_threads=True)
                os._exit(errors.UNAVAILABLE)


@contextlib.contextmanager
def lock_workdir(directory: str) -> Iterator[None]:
    """Holds the work directory for this process; a dead holder's lock is gone with it.

    Raises:
        WorkdirError: another process holds it, or the directory cannot be written.
    """
    path = pathlib.Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / ".lock", "a+")  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise _not_writable(directory, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = " ".join(file.read(200).split()) or "another process"
            raise WorkdirError(f"--workdir={directory}: in use by {holder}; stop it or choose another") from error
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        except OSError as error:
            raise _not_writable(directory, error) from error
        yield


def _not_writable(directory: str, error: Exception) -> WorkdirError:
    reason = getattr(error, "strerror", None) or error
    return WorkdirError(f"--workdir={directory}: cannot be written: {reason}; choose another")


def fault_point(name: str) -> None:
    """Does nothing, unless GPTJAX_FAULT=NAME:COUNT:ACTION,... asks for a fault at the COUNT-th passage of this point.

    ACTION: kill (SIGKILL), term (SIGTERM), int (SIGINT), stop (SIGSTOP, until SIGCONT), hang (for ever). For tests:
    without the variable a run never gets further.
    """
    wanted = os.environ.get("GPTJAX_FAULT")
    if not wanted:
        return
    left, now = [], ""
    for point, count, action in (fault.split(":") for fault in wanted.split(",")):
        if (point, count) == (name, "1"):
            now = action
        else:
            left.append(f"{point}:{int(count) - (point == name)}:{action}")
    os.environ["GPTJAX_FAULT"] = ",".join(left)
    while now == "hang":
        time.sleep(60)
    if now:
        os.kill(os.getpid(), getattr(signal, f"SIG{now.upper()}"))
