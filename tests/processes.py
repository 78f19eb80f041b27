"""Several real processes of one run, joined by jax.distributed on loopback."""

import contextlib
import pathlib
import socket
import subprocess

SECONDS = 120


def one_micro_batch_each(count):
    """The override with which `count` processes make the same two micro-batches of four sequences."""
    return f"train.micro_batch_size={4 // count}"


class Group:
    """Processes of one run, numbered from 0; what each says is in its file."""

    def __init__(self, lab, workdir: pathlib.Path, count: int) -> None:
        # Kept, so that no other test is given this port; processes of this user may listen there all the same.
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._lab, self._workdir, self.count = lab, workdir, count
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(
        self,
        number: int,
        *overrides: str,
        join_seconds: float = SECONDS,
        folder: pathlib.Path | None = None,
        **environment: str,
    ) -> None:
        where = [f"--coordinator=127.0.0.1:{self.port}", f"--num_processes={self.count}", f"--process_id={number}"]
        command = [*self._lab.command(self._workdir, *overrides), *where, f"--join_seconds={join_seconds}"]
        with open(self._file(number), "w") as out:
            where, variables = folder or self._lab.root, self._lab.environment(**environment)
            process = subprocess.Popen(command, env=variables, cwd=where, stdout=out, stderr=subprocess.STDOUT)
            self.processes[number] = process

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        """Kills what is left."""
        for process in self.processes.values():
            process.kill()
            process.wait()
        self._socket.close()

    def _file(self, number: int) -> pathlib.Path:
        return self._workdir.with_name(f"{self._workdir.name}-{number}.out")

    def said(self, number: int) -> str:
        return self._file(number).read_text()

    def wait(self) -> list[int]:
        """Returns the exit codes, in the order of the numbers."""
        return [self.processes[number].wait(timeout=SECONDS) for number in sorted(self.processes)]


@contextlib.contextmanager
def group(lab, workdir, count, *overrides, **environment):
    """Yields `count` running processes of the run in `workdir`; kills what is left of them."""
    with Group(lab, workdir, count) as made:
        for number in range(count):
            made.start(number, one_micro_batch_each(count), *overrides, **environment)
        yield made


def train(lab, workdir, count, *overrides, **environment):
    """Runs `count` processes to their end."""
    with group(lab, workdir, count, *overrides, **environment) as made:
        codes = made.wait()
        assert codes == [0] * count, "\n".join(made.said(number) for number in range(count))
        return [made.said(number) for number in range(count)]
