import asyncio
import errno
import gc
import socket
import subprocess
import sys

import pytest

from gptjax import cli
from gptjax.errors import ConfigError
from tests.helpers import raises


def parser() -> cli.Parser:
    made = cli.Parser("what it does")
    made.add_argument("--workdir")
    return made


def test_flags_are_never_abbreviated_and_never_end_the_process():
    with raises(ConfigError, "--work=x", remedy="nearest: --workdir"):
        parser().parse_strictly(["--work=x"])
    with raises(ConfigError, "--workdir", match="--workdir: expected one"):
        parser().parse_strictly(["--workdir"])


@pytest.mark.parametrize(("kind", "expected"), [(int, "a whole number"), (float, "a number")])
def test_flag_with_a_wrong_number_is_named_with_its_value(kind, expected):
    made = parser()
    made.add_argument("--rows", type=kind)
    with raises(ConfigError, "--rows", value="1,5", match=f"^--rows=1,5: expected {expected}$"):
        made.parse_strictly(["--rows=1,5"])


def test_suggested_flag_is_really_near():
    with raises(ConfigError, "--steps=3", remedy=""):
        parser().parse_strictly(["--steps=3"])
    with raises(ConfigError, "--hepl", remedy="nearest: --help"):
        parser().parse_strictly(["--hepl"])


def test_directory_without_a_flag_is_a_work_directory(tmp_path):
    with raises(ConfigError, str(tmp_path), remedy=f"write --workdir={tmp_path}", match="not a flag"):
        parser().parse_strictly([str(tmp_path)])


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
        raise OSError(errno.EMFILE, "Too many open files")

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
    result = subprocess.run(
        [sys.executable, "-c", LEAVING, str(code), str(seconds)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, "thread ended" in result.stdout) == (code, waits)
