"""What surrounds a run: flags, exit codes, logging, JAX's settings, signals, and the lock on the work directory."""

import argparse
import contextlib
import difflib
import fcntl
import logging
import os
import pathlib
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

from gptjax import errors
from gptjax.errors import ConfigError, UnavailableError, UserError, WorkdirError

log = logging.getLogger("gptjax")
OVERRIDE = "--config."


class Parser(argparse.ArgumentParser):
    """Reads a command line; what is wrong with it is a ConfigError, and a mistyped flag names the nearest ones."""

    def __init__(self, description: str | None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, allow_abbrev=False, formatter_class=formatter)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def parse_strictly(self, arguments: list[str]) -> argparse.Namespace:
        parsed, rest = self.parse_known_args(arguments)
        for argument in rest:
            raise ConfigError(self.unknown(argument))
        return parsed

    def unknown(self, argument: str) -> str:
        near = difflib.get_close_matches(argument.split("=")[0], list(self._option_string_actions), 2)
        return f"{argument}: no such flag" + (f"; nearest: {', '.join(near)}" if near else "")


def run_cli(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs main(arguments) and leaves with a documented exit code; a user's mistake never shows a traceback."""
    start_logging()
    try:
        code = main(sys.argv[1:]) or errors.OK
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = errors.PREEMPTED
    sys.exit(code)


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
            raise ConfigError(f"{argument}: needs a value, as in {argument}=VALUE")
        found[name] = value if equals else rest.pop(0)
    return found


def start_logging() -> None:
    """Sends the project's own lines to stdout as they are, and other libraries' errors only to stderr."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("absl").setLevel(logging.ERROR)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's own notices


def start_jax(*, coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Joins the other processes, if any, and sets what JAX needs; call it once, before the first use of a device.

    Raises:
        UnavailableError: the platform asked for is not there, or a GPU or TPU host would fall back to its CPU.
    """
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it swallows SIGTERM: see Preemption
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(pathlib.Path.home() / ".cache" / "gptjax" / "compiled")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if coordinator or is_cluster(os.environ):
        given = (coordinator, num_processes, process_id) if coordinator else (None, None, None)
        whom = f"process {process_id} of {num_processes}" if coordinator else "one process of a cluster"
        log.info("%s on host %s, joining the others; run the same command on every worker", whom, socket.gethostname())
        jax.distributed.initialize(*given)
        if jax.process_index():
            log.setLevel(logging.WARNING)
    _check_devices()


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

    Signals arrive through a pipe read by a thread, so that the second one works even while the main thread is inside
    a long compilation.
    """

    def __init__(self) -> None:
        self.requested = False
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
            self.requested = True
            name = signal.Signals(received[0]).name
            log.warning("%s: saving a checkpoint after this step; a second signal leaves at once", name)
        os.close(self._read)


@contextlib.contextmanager
def lock_workdir(directory: str) -> Iterator[None]:
    """Holds the work directory for this process; a dead holder's lock is gone with it.

    Raises:
        WorkdirError: another process holds it, or the directory cannot be written.
    """
    try:
        path = pathlib.Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / ".lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise WorkdirError(f"--workdir={directory}: cannot be written: {error.strerror}; choose another") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise WorkdirError(f"--workdir={directory}: in use by {holder}; stop it or choose another") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def fault_point(name: str) -> None:
    """Does nothing, unless GPTJAX_FAULT=NAME:COUNT:ACTION asks for a fault at the COUNT-th passage of this point.

    ACTION: kill (SIGKILL), term (SIGTERM), int (SIGINT). For tests: a run without the variable never gets further.
    """
    wanted = os.environ.get("GPTJAX_FAULT")
    if not wanted:
        return
    point, count, action = wanted.split(":")
    if point != name:
        return
    left = int(count) - 1
    os.environ["GPTJAX_FAULT"] = f"{point}:{left}:{action}" if left > 0 else ""
    if left == 0:
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}[action])
