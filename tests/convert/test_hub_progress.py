"""The progress of downloads: lines every few seconds, or a bar on a terminal."""

import io
import itertools
import logging
import sys

import pytest

from gptjax.convert import hub_progress
from gptjax.convert.hub_progress import progress

MB = 10**6


def test_long_download_reports_bytes_rate_and_time_left(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=4)  # seconds, at each look
    monkeypatch.setattr(hub_progress.time, "monotonic", lambda: next(clock))
    with progress("someone/corpus", 100 * MB) as shown:
        shown.show(0)  # the count and the line begin here
        for received in range(5, 25, 5):
            shown.show(received * MB)
        shown.finish_file(40 * MB)
        shown.show(5 * MB)
        shown.show(10 * MB)
    assert said == [
        "someone/corpus: 10 MB of 100 MB, 1.25 MB/s, eta 1m12s",
        "someone/corpus: 45 MB of 100 MB, 2.25 MB/s, eta 25s",
    ]


def test_bar_is_shown_on_a_terminal(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    handler = logging.StreamHandler(sys.stdout)
    logger = logging.getLogger("gptjax")
    logger.addHandler(handler)
    try:
        with progress("someone/corpus", 100 * MB) as shown:
            shown.show(0)
            shown.show(40 * MB)
            text = shown._screen.line()
            assert shown._screen.is_live
    finally:
        logger.removeHandler(handler)
    assert text.startswith("40/100  40%")
    assert "MB of someone/corpus" in text
    assert said == []
