"""What all fuzz tests share: how many cases, which errors are allowed, and what a refused file may cost."""

import contextlib
import os
import pathlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from gptjax.errors import UserError
from tests.helpers import snapshot

# GPTJAX_FUZZ=10 makes ten times the cases, of another seed each time (pytest's --hypothesis-seed); without it they
# are always the same ones, so that a failure is the change's own.
TIMES = int(os.environ.get("GPTJAX_FUZZ", "0"))
MIB = 2**20
MOST_BYTES = 200 * MIB  # of memory for a file that is refused
MOST_SECONDS = 60  # for one case, on a machine that is busy: else it hangs
LONGEST_LINE = 600

# Values that programs do not expect.
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 16, 48, 2**31, 2**62, 2**63, 2**64, 10**30, 1.5, float("inf"), float("nan"), 10**400]),
    st.text(max_size=8),
    st.sampled_from(["../x", "/etc/passwd", "first", "\n", "\0", "x" * 5000, "²", "\udcff"]),
    st.lists(st.one_of(st.integers(-2, 60), st.integers(0, 2**64)), max_size=4),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=3),
)


def cases(number: int) -> settings:
    return settings(max_examples=number * max(1, TIMES), print_blob=True, suppress_health_check=list(HealthCheck))


def only_documented_errors(call: Callable[[], Any], *, lines: int = 1) -> UserError | None:
    """Calls it, and returns the UserError if one was raised; nothing else may be, and it must be cheap and quick.

    lines: how many lines the message may have.
    """
    with _short(), _in_little_memory():
        try:
            call()
        except UserError as error:
            message = str(error).splitlines()
            assert 1 <= len(message) <= lines, message
            assert all(line.isprintable() and len(line) < LONGEST_LINE for line in message), message
            return error
    return None


@contextlib.contextmanager
def _short() -> Iterator[None]:
    def hang(*_: object) -> None:
        raise AssertionError(f"it hangs: {MOST_SECONDS} s")

    old = signal.signal(signal.SIGALRM, hang)
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


@contextlib.contextmanager
def _in_little_memory() -> Iterator[None]:
    """Fails if the process's resident memory ever grows by MOST_BYTES inside: Linux's own count, of all libraries."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status("VmRSS")
    yield
    grown = _status("VmHWM") - before
    assert grown < MOST_BYTES, f"{grown / MIB:.0f} MiB for it"


def _status(name: str) -> int:
    """Returns a line of /proc/self/status in bytes."""
    text = pathlib.Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name}:"))


@contextlib.contextmanager
def nothing_written(root: pathlib.Path) -> Iterator[None]:
    before = snapshot(root)
    yield
    assert snapshot(root) == before, "something was written"


def patched(data: bytes, patches: list[tuple[float, bytes]], tail: int) -> bytes:
    """Returns `data` with bytes replaced at some places (0 to 1), and then cut short or made longer by `tail`."""
    changed = bytearray(data)
    for where, patch in patches:
        at = int(where * len(changed))
        changed[at : at + len(patch)] = patch
    return bytes(changed[:tail]) if tail < 0 else bytes(changed) + bytes(tail)


PATCHES = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), max_size=3)
TAILS = st.sampled_from([0, 0, 0, -1, -3, -100, 1, 64])
