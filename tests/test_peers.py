"""Connections between the processes of a run, here all of them in one process."""

import contextlib
import json
import queue
import socket
import threading

import pytest

from gptjax import peers
from tests.helpers import failing, os_error

SECONDS = 30


class Ended(BaseException):
    """Ends the thread of a watcher, as os._exit ends its process."""


class Store:
    """JAX's key-value store."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value):
        self.values[key] = value

    def blocking_key_value_get(self, key, milliseconds):
        return self.values[key]


@pytest.fixture
def group(monkeypatch):
    """Starts watchers that put (number, last line) in a queue where they would end their process."""
    ends, numbers = queue.Queue(), {}
    lines = {}

    def end(code):
        thread = threading.current_thread()
        assert code == 69
        ends.put((numbers[thread], lines.pop(thread)))
        raise Ended

    monkeypatch.setattr(peers.os, "_exit", end)
    monkeypatch.setattr(peers, "print_error", lambda line: lines.__setitem__(threading.current_thread(), line))
    monkeypatch.setattr(peers, "PRINT_SECONDS", 1e6)  # longer than any run of the tests: the timer would end one
    monkeypatch.setattr(peers, "LEFT_SECONDS", 0.2)
    monkeypatch.setattr(peers, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(peers.atexit, "register", lambda *of: None)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    made = {}

    class Group:
        store, watchers = Store(), made

        def start(self, count, coordinator="127.0.0.1:1"):
            for number in range(count):
                before = set(threading.enumerate())
                assert peers.watch(self.store, number=number, count=count, coordinator=coordinator) == ""
                made[number] = peers._watchers.pop()
                [thread] = set(threading.enumerate()) - before
                numbers[thread] = number
            wait_for(lambda: sum(peer.number is not None for peer in made[0]._peers) == count - 1)

        def die(self, number):
            """As the kernel does for a killed process: its connections are closed, and it says nothing."""
            made[number]._closed = True
            for peer in list(made[number]._peers):  # its own thread may take some away
                with contextlib.suppress(OSError):
                    peer.socket.shutdown(socket.SHUT_RDWR)

        def ended(self, count):
            return sorted(ends.get(timeout=SECONDS) for _ in range(count))

        def nobody_ends(self):
            with pytest.raises(queue.Empty):
                ends.get(timeout=0.5)

    yield Group()
    for watcher in made.values():
        watcher._closed = True
    for thread in numbers:
        thread.join(SECONDS)
    for watcher in made.values():
        for key in list(watcher._selector.get_map().values()):
            key.fileobj.close()
        watcher._selector.close()


def wait_for(condition):
    event = threading.Event()
    for _ in range(100 * SECONDS):
        if condition():
            return
        event.wait(0.01)
    raise AssertionError("it did not happen")


def lost(number):
    return f"error: process {number} on host {socket.gethostname()} is lost; restart the command on every host"


@pytest.mark.faults
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_p1_all_others_name_the_process_that_died(group, victim):
    group.start(3)
    group.die(victim)
    assert group.ended(2) == [(number, lost(victim)) for number in range(3) if number != victim]


@pytest.mark.parametrize("first", [0, 1])
def test_finished_process_is_not_reported_lost(group, first):
    group.start(3)
    group.watchers[first].leave("")
    group.die(first)
    group.nobody_ends()
    group.die(2)
    if first == 1:
        assert group.ended(1) == [(0, lost(2))]
    else:
        group.nobody_ends()  # it has no connection to process 2, and process 0 is no more


@pytest.mark.parametrize("who", [0, 1])
def test_leaving_process_ends_the_others_with_its_reason(group, who):
    group.start(3)
    group.watchers[who].leave("3 saves failed: No space left on device")
    group.die(who)
    line = f"error: process {who} on host {socket.gethostname()} has left: 3 saves failed: No space left on device"
    assert group.ended(2) == [(n, f"{line}; restart the command on every host") for n in range(3) if n != who]


def test_survivor_gets_time_to_end_itself(group, monkeypatch):
    monkeypatch.setattr(peers, "LEFT_SECONDS", 1000.0)
    group.start(2)
    group.watchers[1].leave("its reason")
    group.die(1)
    group.nobody_ends()


@pytest.mark.parametrize(
    "said",
    [
        b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"\xff\n", b"[" * 10_000 + b"\n", b'{"end": "it is over"}\n',
        b"x" * 2 * peers.LONGEST_MESSAGE, b'{"token": "wrong", "process": 1, "host": "h"}\n',
        b'{"token": {}, "process": 1, "host": "h"}\n',
    ],
    ids=range(9),
)  # fmt: skip
def test_unknown_connection_ends_no_process(group, said):
    group.start(2)
    port = json.loads(group.store.values[peers.ADDRESS])["port"]
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(said)
        if said:  # it is hung up on, and does not fill memory
            stranger.settimeout(SECONDS)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
    group.nobody_ends()
    assert len(group.watchers[0]._peers) == 1
    group.die(1)
    assert [number for number, _ in group.ended(1)] == [0]


def test_a_reason_holds_no_secret_and_is_short(group, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "long-and-secret")
    group.start(2)
    group.watchers[1].leave("it was long-and-secret" + 10_000 * "é")
    [(_, line)] = group.ended(1)
    assert "it was [MY_TOKEN]éé" in line
    assert len(line) < 1200


def test_refused_connection_is_returned_as_a_reason(monkeypatch):
    store = Store()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = {"token": "t", "port": unused.getsockname()[1], "hosts": ["127.0.0.1"]}
        store.values[peers.ADDRESS] = json.dumps(address)
        reason = peers.watch(store, number=1, count=2, coordinator="127.0.0.1:1")
    assert reason == f"127.0.0.1:{address['port']}: Connection refused"
    assert peers._watchers == []


def test_all_processes_end_with_the_same_reason(group, monkeypatch):
    """Not with its end: it reads the clock before the others do."""
    monkeypatch.setattr(peers, "LEFT_SECONDS", 1000.0)
    group.start(3)
    group.watchers[1].leave("its reason")
    wait_for(lambda: group.watchers[2]._reason)
    group.watchers[0]._deadline = 0.0
    told = f"process 1 on host {socket.gethostname()} has left: its reason; restart the command on every host"
    assert group.ended(2) == [(0, f"error: {told}"), (2, f"error: {told}")]


def test_failure_to_listen_is_returned_to_all_processes(monkeypatch):
    store = Store()
    monkeypatch.setattr(peers.socket, "create_server", failing(os_error(97)))
    reasons = [peers.watch(store, number=number, count=2, coordinator="127.0.0.1:1") for number in range(2)]
    assert reasons == ["[Errno 97] Address family not supported by protocol"] * 2
    assert peers._watchers == []


IPV6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")


@pytest.mark.parametrize(
    ("coordinator", "host"),
    [
        ("127.0.0.1:5", "127.0.0.1"),
        *(pytest.param(*pair, marks=IPV6) for pair in (("[::1]:5", "::1"), ("10.0.0.1:5", "::"), ("", "::"))),
    ],
)
def test_watcher_listens_on_loopback_or_everywhere(group, monkeypatch, coordinator, host):
    monkeypatch.setattr(peers, "_local_addresses", list)
    group.start(1, coordinator)
    [server] = group.watchers[0]._selector.get_map().values()
    assert server.fileobj.getsockname()[0] == host
