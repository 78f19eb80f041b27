import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from gptjax import signals


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


@contextlib.contextmanager
def listening(monkeypatch):
    """Yields a Preemption whose run has begun, and the codes with which it would have left."""
    left = []
    monkeypatch.setattr(signals.os, "_exit", left.append)
    with signals.Preemption() as preemption:
        preemption.can_save = True
        yield preemption, left


@pytest.fixture
def hangups():
    """SIGHUP as it is by default: these tests may run under nohup themselves."""
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, old)


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_signal_requests_a_save_and_exit(monkeypatch, said, number):
    before = signal.getsignal(signal.Signals[number])
    with listening(monkeypatch) as (preemption, left):
        os.kill(os.getpid(), signal.Signals[number])
        until(lambda: preemption.requested)
        assert left == []
    assert said[0].startswith(f"{number}: saving a checkpoint after this step; another SIGTERM or Ctrl-C exits")
    assert signal.getsignal(signal.Signals[number]) == before


@pytest.mark.usefixtures("hangups")
def test_second_hangup_is_ignored_but_sigterm_exits_at_once(monkeypatch):
    with listening(monkeypatch) as (preemption, left):
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGUSR1):
            os.kill(os.getpid(), number)
            until(lambda: preemption.requested)
        time.sleep(0.2)
        assert left == []
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: left == [75])


def test_an_ignored_hangup_stays_ignored(monkeypatch):
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with listening(monkeypatch) as (preemption, _):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)
            assert not preemption.requested
    finally:
        signal.signal(signal.SIGHUP, old)


MONITORED = """
import sys, time
from gptjax.signals import Watchdog
with Watchdog(2.0):
    print("started", flush=True)
    for seconds in sys.argv[1:]:
        time.sleep(float(seconds))
"""


def test_stopped_process_is_not_treated_as_hung():
    # The second wait begins after the stop, so that the watchdog has time to be wrong.
    command = [sys.executable, "-c", MONITORED, "1", "0.6"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=120) == 0


def test_watchdog_attributes_have_one_writing_thread_each(monkeypatch):
    writers: dict[str, set[str]] = {}

    class Recorded(signals.Watchdog):
        def __setattr__(self, name, value):
            writers.setdefault(name, set()).add(threading.current_thread().name)
            super().__setattr__(name, value)

    ticks = threading.Event()
    watchdog = Recorded(1000.0)
    waits = iter([False, False, False])

    def wait(seconds):
        done = next(waits, None) is None
        if done:
            ticks.set()
        return done

    monkeypatch.setattr(watchdog._done, "wait", wait)
    with watchdog:
        watchdog.beat()
        assert ticks.wait(60)
    assert all(len(threads) == 1 for threads in writers.values()), writers


def test_fault_point_fires_at_the_requested_passage(monkeypatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    signals.fault_point("step")
    monkeypatch.setenv("GPTJAX_FAULT", "step:2:term")
    signals.fault_point("save")
    signals.fault_point("step")
    assert sent == []
    signals.fault_point("step")
    signals.fault_point("step")
    assert sent == [(os.getpid(), signal.SIGTERM)]
