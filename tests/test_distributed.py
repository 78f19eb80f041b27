import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading

import pytest

from gptjax import distributed
from gptjax.coordinator import check_coordinator, describe_missing, is_cluster
from gptjax.errors import ConfigError, UnavailableError
from tests.helpers import failing, raises

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False), ({"OMPI_COMM_WORLD_SIZE": "8"}, True), ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False), ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"SLURM_NTASKS": "1"}, False), ({"SLURM_NTASKS": "2"}, True), ({"SLURM_NTASKS": "\u00b2"}, False),
        ({"SLURM_NTASKS": "9" * 5000}, False),
    ],
    ids=range(9),
)  # fmt: skip
def test_cluster_is_recognized_by_its_environment(environment, expected):
    assert is_cluster(environment) is expected


def test_watcher_does_not_exit_after_the_work_finished(monkeypatch):
    exits, asked, past = [], threading.Event(), threading.Event()
    monkeypatch.setattr(distributed.os, "_exit", exits.append)

    def over():
        asked.set()
        return past.wait(5)

    with distributed._ending_after(60, lambda: "waiting", over=over):
        assert asked.wait(5)
    past.set()
    for thread in threading.enumerate():
        if thread.name == "joining":
            thread.join(5)
    assert exits == []


LOWERED = """
import jax, gptjax
from gptjax import distributed
from gptjax.coordinator import check_coordinator, is_cluster
from gptjax.kernels.cross_entropy import linear_cross_entropy
distributed.start_jax()
shapes = [jax.ShapeDtypeStruct(*one) for one in (((64, 16), "bfloat16"), ((16, 512), "bfloat16"), ((64,), "int32"))]
loss = lambda x, head, targets: linear_cross_entropy(x, head, targets, vocab_size=257)[0].sum()
step = jax.jit(lambda *arrays: (loss(*arrays), jax.grad(loss)(*arrays)))
gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
print(gptjax.__file__)
with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=gpu)):
    print(step.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text())
"""


def test_a_program_is_the_same_wherever_gptjax_is_installed(tmp_path):
    """Else `check_agreement` would refuse hosts with other paths: the text of a Pallas kernel contains them."""
    places = [tmp_path / "a", tmp_path / "of another length" / "gptjax"]
    for place in places:
        shutil.copytree(ROOT / "gptjax", place / "gptjax", ignore=shutil.ignore_patterns("__pycache__"))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOWERED],
            env=os.environ | {"PYTHONPATH": str(place), "JAX_PLATFORMS": "cpu"},
            cwd=place, stdout=subprocess.PIPE, text=True,
        )
        for place in places
    ]  # fmt: skip
    files, programs = zip(*(process.communicate(timeout=120)[0].split("\n", 1) for process in processes), strict=True)
    assert list(files) == [str(place / "gptjax" / "__init__.py") for place in places]
    assert programs[0] == programs[1]
    assert "gptjax/kernels/cross_entropy.py" in programs[0], "a profile still names the file"


@pytest.mark.faults
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::"])
def test_p4_port_in_use_is_refused(address):
    """JAX ends in a segmentation fault there."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as other:
        other.bind((address, 0))
        other.listen()
        port = other.getsockname()[1]
        coordinator = f"127.0.0.1:{port}"
        with raises(UnavailableError, "--coordinator", value=coordinator, remedy="another port"):
            check_coordinator(coordinator, is_here=True)
        check_coordinator(coordinator, is_here=False)
        command = [sys.executable, "-m", "gptjax.main", "--config=configs/quickstart.py", "--num_processes=2"]
        if address == "127.0.0.1":
            flags = [f"--coordinator={coordinator}", "--process_id=0", f"--workdir={os.devnull}/none"]
            command += flags
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
            assert (result.returncode, f"port {port}" in result.stderr) == (69, True), result.stderr
    check_coordinator(coordinator, is_here=True)


@pytest.mark.faults
def test_p4_reserved_port_is_free_until_someone_listens():
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as gRPC's servers do
        other.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{other.getsockname()[1]}"
        check_coordinator(coordinator, is_here=True)
        other.listen()
        with raises(UnavailableError, "--coordinator", value=coordinator):
            check_coordinator(coordinator, is_here=True)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("count", "number", "expected"),
    [
        (1, 0, "waiting for its own service at 127.0.0.1:1"),
        (2, 0, "waiting for process 1 to come to 127.0.0.1:1"),
        (3, 0, "waiting for one or more of processes 1 to 2 to come to 127.0.0.1:1"),
        (2, 1, "waiting for process 0, which does not answer at 127.0.0.1:1"),
    ],
)
def test_p3_missing_process_is_described(count, number, expected, monkeypatch):
    assert describe_missing("127.0.0.1:1", count, number) == expected
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", failing(unknown))
    assert describe_missing("no.host:1", count, number) == "the name no.host of process 0's host cannot be looked up"


@pytest.mark.faults
def test_p3_bracketed_address_is_looked_up(monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: asked.append(arguments[0]))
    assert describe_missing("[::1]:1", 2, 0) == "waiting for process 1 to come to [::1]:1"
    assert asked == ["::1"]


@pytest.mark.parametrize("wrong", ["host", ":80", "host:", "host:0", "host:65536", "host:8o", "host:\u0661", "host:-1"])
def test_a_coordinator_is_a_host_and_a_port(wrong):
    with raises(ConfigError, "--coordinator", value=wrong):
        check_coordinator(wrong, is_here=False)


ABORTED = """
import ctypes, threading, time
from gptjax.distributed import exit_where_jax_aborts
exit_where_jax_aborts()
threading.Thread(target=ctypes.CDLL(None).abort).start()
while True:  # as a main thread in the middle of Python code
    time.sleep(0.001)
"""


@pytest.mark.faults
def test_p1_abort_in_jax_exits_with_69():
    result = subprocess.run([sys.executable, "-c", ABORTED], capture_output=True, text=True, timeout=120, check=False)
    told = "error: aborted, as JAX does when process 0 is lost; restart the command on every host\n"
    assert (result.returncode, result.stderr) == (69, told)
