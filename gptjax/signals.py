"""Ends a run early: signals that ask it to stop, the watchdog of a hang, and the faults that tests inject."""

import contextlib
import faulthandler
import logging
import os
import signal
import threading
import time
from typing import Any

from gptjax import errors
from gptjax.redaction import print_error

log = logging.getLogger("gptjax")

# The signals that ask a run to stop: SIGHUP comes from a closed ssh session, SIGUSR1 and SIGUSR2 from SLURM.
REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
EXITS_AT_ONCE = (signal.SIGTERM, signal.SIGINT)  # after a first request


class Preemption:
    """Handles REQUESTS: the first one asks the run to save and stop, and sets `requested`.

    A SIGTERM or SIGINT after it exits immediately with 75. Until the run sets `can_save`, the first request does so,
    too: while data are prepared or a checkpoint is read there is nothing to save. Other signals after the first request
    change nothing: the terminal and the shell may both send SIGHUP, and SLURM warns before it ends a job. SIGHUP is not
    handled where it is ignored, as under nohup.

    Signals arrive through a pipe that a thread reads, so that the second one works even while the main thread is inside
    a long compilation.
    """

    def __init__(self) -> None:
        self.requested = False  # set by the thread, polled by the run
        self.can_save = False  # set by the run
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)

    def __enter__(self) -> "Preemption":
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._old = {}
        for number in REQUESTS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            # Python writes to the wakeup pipe only for a signal that has a handler.
            self._old[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, daemon=True, name="signals").start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._write)  # ends the thread

    def _listen(self) -> None:
        while received := os.read(self._read, 1):  # one byte per signal: its number
            number = received[0]
            if number not in self._old:
                continue
            if self.requested:
                if number in EXITS_AT_ONCE:
                    os._exit(errors.PREEMPTED)
                continue
            name = signal.Signals(number).name
            if not self.can_save:
                log.warning("%s: received before training started; nothing to save: rerun the same command", name)
                os._exit(errors.PREEMPTED)
            self.requested = True
            log.warning("%s: saving a checkpoint after this step; another SIGTERM or Ctrl-C exits without it", name)
        os.close(self._read)


class Interrupt:
    """Handles SIGINT in a process that others own, such as a notebook's kernel; it never ends the process.

    The first SIGINT after the run has set `can_save` sets `requested`; any other raises KeyboardInterrupt. In a thread
    other than the main one it handles nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self.can_save = False
        self._old: Any = None

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._old is not None:
            signal.signal(signal.SIGINT, self._old)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested or not self.can_save:
            raise KeyboardInterrupt
        self.requested = True
        log.warning("interrupted: saving a checkpoint after this step; a second interrupt stops without one")


class Watchdog:
    """Ends a process that hangs, with code 69 and the stacks of all threads, after `seconds` without a `beat`.

    Time in which the process was stopped (SIGSTOP, a suspended machine) does not count.
    """

    def __init__(self, seconds: float) -> None:
        """seconds: the time limit; 0 means none."""
        self._seconds = seconds
        self._done = threading.Event()
        self._beats = 0

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def beat(self) -> None:
        """Restarts the time limit, because a step or a batch has ended."""
        self._beats += 1  # only the main thread writes it, so that no beat is lost between a read and a write

    def _watch(self) -> None:
        tick = min(1.0, self._seconds / 10)
        before = time.monotonic()
        beats = self._beats
        waited = 0.0
        while not self._done.wait(tick):
            now = time.monotonic()
            waited += min(now - before, 2 * tick)  # in a longer tick the process was stopped
            before = now
            if self._beats != beats:
                beats = self._beats
                waited = 0.0
            if waited >= self._seconds:
                self._end()

    def _end(self) -> None:
        problem = f"no step finished in train.watchdog_timeout_seconds={self._seconds:g}"
        print_error(f"error: {problem}; the stacks of all threads follow, then rerun the same command")
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback(all_threads=True)
        os._exit(errors.UNAVAILABLE)


def fault_point(name: str) -> None:
    """Injects a fault if GPTJAX_FAULT=NAME:COUNT:ACTION,... asks for it at the COUNT-th call with this `name`.

    ACTION is kill (SIGKILL), term (SIGTERM), int (SIGINT), stop (SIGSTOP, until SIGCONT) or hang (forever). This is for
    tests: without the variable it does nothing.
    """
    wanted = os.environ.get("GPTJAX_FAULT")
    if not wanted:
        return
    remaining = []
    now = ""
    for fault in wanted.split(","):
        point, count, action = fault.split(":")
        if point != name:
            remaining.append(fault)
        elif count == "1":
            now = action
        else:
            remaining.append(f"{point}:{int(count) - 1}:{action}")
    os.environ["GPTJAX_FAULT"] = ",".join(remaining)
    while now == "hang":
        time.sleep(60)
    if now:
        os.kill(os.getpid(), getattr(signal, f"SIG{now.upper()}"))
