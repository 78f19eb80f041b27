"""A run takes more of a GPU than JAX does by default, but only where nobody else uses it and nobody has chosen."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from gptjax import gpu_memory
from gptjax.chips import device_memory, find_chip
from gptjax.gpu_memory import choose_fraction, empty_fraction, planned_fraction
from gptjax.plan import __main__ as plan
from gptjax.plan import report, search
from gptjax.plan.topology import parse_topology

ROOT = Path(__file__).parent.parent
EMPTY = "0, GPU-aaaa, 4, 81559\n1, GPU-bbbb, 611, 81559\n"  # of 80 GB, the driver's own memory only
BUSY = "0, GPU-aaaa, 4, 81559\n1, GPU-bbbb, 61170, 81559\n"


@pytest.mark.parametrize(
    ("answer", "visible", "empty"),
    [
        (EMPTY, None, True), (BUSY, None, False), (BUSY, "0", True), (BUSY, "1", False), (BUSY, " 0 , 1", False),
        (BUSY, "GPU-aaaa", True), (BUSY, "GPU-bbbb", False), (BUSY, "2", False), (EMPTY, "MIG-1234", False),
        (BUSY, "GPU-aa", True),  # CUDA takes the beginning of a name
        (BUSY, "", False),  # no card at all
        ("0, GPU-aaaa, 4, 24576\n1, GPU-bbbb, 9000, 81559\n", "0", False),  # CUDA may call the larger card 0
        ("0, GPU-aaaa, 400, 24576\n", None, False),  # a desktop is on it
        ("0, GPU-aaaa, [N/A], [N/A]\n", None, False), ("No devices were found\n", None, False), ("", None, False),
    ],
)  # fmt: skip
def test_only_visible_gpus_must_be_empty(answer, visible, empty):
    assert empty_fraction(answer, visible) == (0.92 if empty else 0)


@pytest.mark.parametrize(("mib", "fraction"), [(8192, 0.81), (16384, 0.9), (24576, 0.92), (143771, 0.92)])
def test_a_small_card_keeps_enough_for_cuda(mib, fraction):
    assert empty_fraction(f"0, GPU-a, 3, {mib}\n", None) == fraction
    assert (1 - fraction) * mib >= 1536


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a machine with two empty GPUs and JAX's plugin for them, as far as this module looks."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\n[ "$*" = "{" ".join(gpu_memory.QUERY[1:])}" ] && printf "{EMPTY}"\n')
    program.chmod(0o755)
    (tmp_path / "jax_cuda13_plugin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.syspath_prepend(tmp_path)
    return {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": f"{ROOT}:{tmp_path}"}


@pytest.mark.parametrize(
    ("setting", "free"),
    [
        ({}, True), ({"CUDA_VISIBLE_DEVICES": ""}, False), ({"CUDA_VISIBLE_DEVICES": "1"}, True),
        ({"JAX_PLATFORMS": "cuda"}, True), ({"JAX_PLATFORMS": "cuda,cpu"}, True), ({"JAX_PLATFORMS": "cpu"}, False),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}, False), ({"XLA_CLIENT_MEM_FRACTION": ".5"}, False),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, False), ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, False),
    ],
)  # fmt: skip
def test_user_choice_of_gpu_memory_is_kept(machine, setting, free):
    assert choose_fraction(setting) == (0.92 if free else 0)


def test_missing_plugin_or_driver_gives_fraction_zero(machine, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert choose_fraction({}) == 0
    (tmp_path / "nvidia-smi").unlink()
    with monkeypatch.context() as changed:
        changed.setattr(gpu_memory, "QUERY", ("no-such-program",))
        assert choose_fraction({}) == 0
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{EMPTY}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert choose_fraction({}) > 0
    monkeypatch.setattr(gpu_memory, "PLUGINS", ("no_such_plugin",))
    assert choose_fraction({}) == 0


START = """
from gptjax import cli, distributed
cli.start_logging()
distributed.start_jax()
import os
print(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"))
"""


@pytest.mark.parametrize(("setting", "share"), [({}, "0.92"), ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, "0.5")])
def test_a_run_sets_and_logs_its_share(machine, setting, share):
    started = subprocess.check_output([sys.executable, "-c", START], env=machine | setting, text=True)
    *lines, last = started.splitlines()
    assert last == share
    line = "GPU memory: nobody else uses it, so JAX takes 92 %; to choose: XLA_PYTHON_CLIENT_MEM_FRACTION"
    assert lines == ([] if setting else [line])


def test_importing_gptjax_sets_no_memory_fraction(machine):
    code = "import gptjax.train, jax, os; jax.devices(); print('XLA_PYTHON_CLIENT_MEM_FRACTION' in os.environ)"
    assert subprocess.check_output([sys.executable, "-c", code], env=machine, text=True) == "False\n"


class Absent:
    device_kind = "NVIDIA H100 80GB HBM3"

    def memory_stats(self) -> dict[str, int]:
        raise RuntimeError("this device is not here")


def test_plans_count_the_share_that_a_run_gets(monkeypatch):
    for name in gpu_memory.FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    h100, tpu = parse_topology("h100:8", 1), parse_topology("v5e:4x4", 1)
    assert planned_fraction() == 0.92
    assert h100.memory_bytes == device_memory(Absent()) == 0.92 * 80e9
    assert tpu.memory_bytes == tpu.chip.memory_bytes
    for name in gpu_memory.FRACTIONS:
        monkeypatch.setenv(name, "0.5")
        assert h100.memory_bytes == device_memory(Absent()) == 40e9
        monkeypatch.delenv(name)
    monkeypatch.setenv(gpu_memory.VARIABLE, "half")
    assert planned_fraction() == 0.92
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # then a run leaves the share to JAX
    assert planned_fraction() == 0.75
    assert find_chip("NVIDIA H100").memory_bytes == 80e9  # the data sheet's, which the compiler is told


class Card:
    """A GPU of 80 GB as JAX shows it, once it has taken the share that the environment sets."""

    device_kind = Absent.device_kind

    def memory_stats(self) -> dict[str, float]:
        return {"bytes_limit": 80e9 * float(os.environ.get(gpu_memory.VARIABLE, gpu_memory.JAX_FRACTION))}


@pytest.mark.parametrize(
    ("setting", "share"),
    [({}, 0.92), ({gpu_memory.VARIABLE: "0.5"}, 0.5), ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, 0.75)],
)
def test_local_plans_count_the_share_that_a_run_gets(machine, monkeypatch, setting, share):
    for name in (*gpu_memory.FRACTIONS, *gpu_memory.SHARING, "JAX_PLATFORMS"):
        monkeypatch.setenv(name, "")  # and what the plan sets is unset after the test
        monkeypatch.delenv(name)
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    planned = []
    monkeypatch.setattr(jax, "devices", lambda: [Card()])
    monkeypatch.setattr(search, "plan", lambda config, topology, args: planned.append(topology))
    monkeypatch.setattr(report, "describe", lambda found: [])
    plan.main(["--config=configs/gpt2_small.py", "--topology=local"])
    assert [topology.memory_bytes for topology in planned] == [80e9 * share]
