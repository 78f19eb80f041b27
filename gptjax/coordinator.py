"""Finds out, before JAX starts, whether a command is one of several processes, and whether process 0 is reachable."""

import contextlib
import errno
import re
import socket
from collections.abc import Mapping

from gptjax.errors import ConfigError, UnavailableError, shown


def is_cluster(environment: Mapping[str, str]) -> bool:
    """Returns whether the environment is that of several processes: SLURM, Open MPI, a TPU pod, or JAX's own."""
    if "JAX_COORDINATOR_ADDRESS" in environment:
        return True
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    counts = [environment.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")]
    return any(re.fullmatch("[0-9]{1,9}", count) and int(count) > 1 for count in counts)


def check_coordinator(coordinator: str, *, is_here: bool) -> None:
    """Checks HOST:PORT of process 0. If the port is in use, JAX would end in a segmentation fault.

    is_here: whether this is process 0, which listens at the port.

    Raises:
        ConfigError: `coordinator` is not of the form HOST:PORT.
        UnavailableError: this is process 0, and something else listens at the port.
    """
    host, _, text = coordinator.rpartition(":")
    is_number = text.isdecimal() and text.isascii() and len(text) <= 5
    port = int(text) if is_number else 0
    if not host or not 0 < port < 2**16:
        raise ConfigError(
            "expected HOST:PORT of process 0, as in 10.0.0.2:1234",
            field="--coordinator",
            value=coordinator,
        )
    if is_here and _is_taken(port):
        raise UnavailableError(
            f"something else listens at port {port} of this host",
            field="--coordinator",
            value=coordinator,
            remedy="stop it, or use another port on all processes",
        )


def _is_taken(port: int) -> bool:
    """Returns whether another socket of this host uses the port, so that JAX's service could not use it alone."""
    for family in (socket.AF_INET6, socket.AF_INET):
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):  # the options of JAX's service
                probe.setsockopt(socket.SOL_SOCKET, option, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return True
    # With SO_REUSEPORT the bind also succeeds next to another run's service. Each would get some of the processes.
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def describe_missing(coordinator: str, num_processes: int, process_id: int) -> str:
    """Returns which processes have not joined yet, as far as this one can know: "waiting for process 1 ..."."""
    if not coordinator:
        return "waiting for the other processes"
    host, _, port = coordinator.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), None)
    except (OSError, UnicodeError):  # UnicodeError: a label of the name is empty or too long
        return f"the name {shown(host)} of process 0's host cannot be looked up"
    if num_processes == 1:
        return f"waiting for its own service at {coordinator}"
    if process_id == 0:
        others = "process 1" if num_processes == 2 else f"one or more of processes 1 to {num_processes - 1}"
        return f"waiting for {others} to come to {coordinator}"
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except (OSError, ValueError):
        return f"waiting for process 0, which does not answer at {coordinator}"
    return f"process 0 answers at {coordinator}; waiting for another one of the {num_processes}"
