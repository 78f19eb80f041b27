import asyncio
import errno
import gc
import socket
import subprocess
import sys

import pytest

from gptjax import cli
from gptjax.errors import ConfigError
from tests.helpers import os_error, raises


def parser() -> cli.Parser:
    made = cli.Parser("what it does")
    made.add_argument("--workdir")
    return made


@pytest.mark.parametrize(
    ("flag", "field", "parts"),
    [
        ("--work=x", "--work=x", {"remedy": "nearest: --workdir"}),
        ("--workdir", "--workdir", {"match": "--workdir: expected one"}),
        ("--steps=3", "--steps=3", {"remedy": ""}),  # no flag is near
        ("--hepl", "--hepl", {"remedy": "nearest: --help"}),
        ("/tmp", "/tmp", {"remedy": "write --workdir=/tmp", "match": "not a flag"}),
        ("--rows=1,5", "--rows", {"value": "1,5", "match": "^--rows=1,5: expected a whole number$"}),
        ("--rate=1,5", "--rate", {"value": "1,5", "match": "^--rate=1,5: expected a number$"}),
    ],
)
def test_wrong_flag_is_named_and_never_ends_the_process(flag, field, parts):
    made = parser()
    made.add_argument("--rows", type=int)
    made.add_argument("--rate", type=float)
    with raises(ConfigError, field, **parts):
        made.parse_strictly([flag])


def test_forgotten_coroutines_of_orbax_are_not_reported():
    source = """
import warnings
from gptjax import cli
cli.start_logging()
async def forgotten(): pass
forgotten()
warnings.warn("another", RuntimeWarning)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=120)
    assert "never awaited" not in done.stderr
    assert "tracemalloc" not in done.stderr
    assert "another" in done.stderr


@pytest.mark.filterwarnings("ignore:unclosed event loop:ResourceWarning")
def test_event_loop_that_found_no_free_descriptor_is_not_reported(monkeypatch, capsys):
    """Its constructor failed, which was reported, and then its destructor fails too."""

    def fail(*_):
        raise os_error(errno.EMFILE)  # one that nothing keeps, and with it the event loop

    monkeypatch.setattr(sys, "unraisablehook", cli.print_unraisable)
    monkeypatch.setattr(socket, "socketpair", fail)
    with pytest.raises(OSError, match="Too many open files"):
        asyncio.SelectorEventLoop()
    gc.collect()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "told"),
    [*((text + ": (slice(0, 8),)", False) for text in cli.IGNORED_UNRAISABLE), ("the disk is gone", True)],
)
def test_known_unraisable_errors_of_libraries_are_not_printed(text, told, monkeypatch, capsys):
    class Forgotten:
        def __del__(self):
            raise ValueError(text)

    monkeypatch.setattr(sys, "unraisablehook", cli.print_unraisable)
    Forgotten()
    assert (text in capsys.readouterr().err) == told


LEAVING = """
import sys, threading, time
from gptjax import cli
from gptjax.errors import SaveError

cli.THREADS_SECONDS = 0.5

def main(arguments):
    code, seconds = map(float, arguments)
    threading.Thread(target=lambda: (time.sleep(seconds), print("thread ended", flush=True))).start()
    if code == 74:
        raise SaveError("3 saves failed")
    return int(code)

cli.run_cli(main)
"""


@pytest.mark.parametrize(("code", "seconds", "waits"), [(74, 60, False), (74, 0, True), (0, 1, True), (75, 1, True)])
def test_exit_after_failed_saves_does_not_wait_for_threads(code, seconds, waits):
    """After saves that failed, Orbax's threads may wait for minutes; an orderly end waits for all."""
    command = [sys.executable, "-c", LEAVING, str(code), str(seconds)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, "thread ended" in result.stdout) == (code, waits)
