"""A run on a CPU keeps the memory that it frees, where nobody has chosen otherwise."""

import os
import subprocess
import sys

import pytest

from gptjax.cpu_memory import keep_freed_memory
from gptjax.devices import expects_accelerator

PAGES = 100 * 2**20 // 4096

# Takes and frees 100 MiB ten times in a thread of its own, as XLA does, and prints the page faults from the third on.
PROGRAM = """
import resource, threading
from gptjax.cpu_memory import keep_freed_memory
kept = keep_freed_memory()
def work():
    for turn in range(10):
        if turn == 2:
            start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytearray(100 * 2**20)  # NumPy would ask for huge pages
    print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def run(**variables: str) -> tuple[bool, int]:
    """Returns whether memory is kept, and the page faults."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment | variables, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(
    not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="no glibc"
)
def test_freed_memory_is_used_again_without_page_faults() -> None:
    kept, faults = run()
    assert kept
    assert faults < PAGES / 10
    chosen, faults = run(MALLOC_PERTURB_="0")
    assert not chosen, "somebody has set up memory already"
    assert faults > 6 * PAGES, "this is what it avoids"


@pytest.mark.parametrize("variable", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_a_choice_of_the_environment_stands(variable: str) -> None:
    assert not keep_freed_memory({variable: "1"})


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    assert not keep_freed_memory({})


@pytest.mark.parametrize(
    ("platforms", "files", "expected"),
    [
        ("", [], False),
        ("", ["/dev/nvidia0"], True),
        ("", ["/dev/accel0"], True),
        ("cpu", ["/dev/nvidia0"], False),
        ("cuda,cpu", [], True),
        ("tpu", [], True),
    ],
)
def test_accelerators_are_expected(
    monkeypatch: pytest.MonkeyPatch, platforms: str, files: list[str], expected: bool
) -> None:
    monkeypatch.setattr("os.path.exists", lambda path: path in files)
    assert expects_accelerator({"JAX_PLATFORMS": platforms} if platforms else {}) == expected
