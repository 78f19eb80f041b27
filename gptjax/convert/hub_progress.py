"""The progress of a download from the Hub: a bar on a terminal, elsewhere a line every few seconds."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator

from gptjax.exhaustion import show_bytes
from gptjax.goodput import duration
from gptjax.screen import Screen

log = logging.getLogger("gptjax")
REPORT_SECONDS = 10.0
MEGABYTE = 10**6


class Progress:
    """Counts the bytes of a download of many files."""

    def __init__(self, name: str, total: int, screen: Screen) -> None:
        """Begins the count.

        name: of what is downloaded.
        total: bytes of all its files.
        screen: shows a bar of megabytes, if there is a terminal.
        """
        self._name = name
        self._total = total
        self._screen = screen
        self._finished = 0  # bytes of files that are complete
        self._first: tuple[int, float] | None = None  # bytes and time, from which the rate is computed
        self._last_line = time.monotonic()

    def show(self, received: int) -> None:
        """Shows the progress, with `received` bytes of the present file."""
        done = self._finished + received
        now = time.monotonic()
        if self._first is None:
            self._first = done, now
        first_done, first_time = self._first
        rate = (done - first_done) / max(now - first_time, 1e-9)  # bytes per second
        if self._screen.is_live:
            self._screen.advance(done // MEGABYTE)
            self._screen.show_work(f"MB of {self._name}", done=1)
        elif now - self._last_line >= REPORT_SECONDS:
            self._last_line = now
            left = duration(math.ceil((self._total - done) / rate)) if rate else "n/a"
            amount = f"{show_bytes(done)} of {show_bytes(self._total)}"
            log.info("%s: %s, %s/s, eta %s", self._name, amount, show_bytes(rate), left)

    def finish_file(self, size: int) -> None:
        """Counts a file of `size` bytes as complete."""
        self._finished += size


@contextlib.contextmanager
def progress(name: str, total: int) -> Iterator[Progress]:
    """Yields the progress of a download of `total` bytes, which is no longer shown afterwards."""
    screen = Screen(log.info, num_steps=total // MEGABYTE)
    try:
        yield Progress(name, total, screen)
    finally:
        screen.close()
