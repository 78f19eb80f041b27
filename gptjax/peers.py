"""Ends every process of a run at once when one of them dies, even during a collective.

Process 0 listens, and every other process keeps a TCP connection to it. The kernel closes a connection when its process
dies, also by SIGKILL; keep-alive probes detect a dead host within a minute. Then every process ends with code 69 and a
line that names the lost one. Without this, JAX notices after 100 s, or aborts, and a collective may wait forever. A
process that exits in an orderly way sends a notice first, so it does not count as lost.

A message is one line of JSON:
    {"token", "process", "host"}  the first message of a process to process 0
    {"left", "process", "host"}   the process exits; "left" is its reason, "" if its work is done
    {"end"}                       from process 0: exit with this reason
"""

import atexit
import contextlib
import dataclasses
import hmac
import json
import os
import secrets
import selectors
import socket
import threading
import time
from typing import Any

from gptjax import errors
from gptjax.errors import first_line
from gptjax.redaction import print_error, redact
from gptjax.strict_json import parse_json

ADDRESS = "gptjax/peers"  # key of process 0's address in JAX's key-value store
CONNECT_SECONDS = 5.0  # time limit for each address that process 0 may have
LEFT_SECONDS = 10.0  # after a process has left with a reason, the others may still exit by themselves for this long
SETTLE_SECONDS = 3.0  # after a collective has failed, the loss of a peer is known here within this time
LAST_SECONDS = 0.5  # process 0 exits this much later: JAX aborts the others when it exits, before they print the reason
PRINT_SECONDS = 2.0  # time limit of the last line: nobody may be reading stderr
POLL_SECONDS = 1.0  # the deadline after LEFT_SECONDS is checked this often
LONGEST_MESSAGE = 2**14  # bytes
LONGEST_REASON = 1000  # characters
KEEP_ALIVE = (
    ("TCP_KEEPIDLE", 20),  # seconds
    ("TCP_KEEPINTVL", 10),  # seconds
    ("TCP_KEEPCNT", 4),
    ("TCP_USER_TIMEOUT", 60_000),  # milliseconds
)
LOOPBACK = {"localhost", "127.0.0.1", "::1", "[::1]"}


@dataclasses.dataclass(eq=False)
class Peer:
    """A connection to another process."""

    socket: socket.socket
    number: int | None = None  # None until its first message has arrived
    host: str = ""
    received: bytes = b""  # the beginning of an incomplete message
    has_left: bool = False  # it has sent a notice, so the end of the connection is no loss


class Watcher:
    """The connections of one process of a run, and a thread that reads them."""

    def __init__(self, number: int, token: str) -> None:
        """number: of this process. token: shared by the processes of the run, which keeps other connections out."""
        self._number = number
        self._token = token
        self._peers: list[Peer] = []
        self._selector = selectors.DefaultSelector()
        self._reason = ""  # why a peer has left
        self._deadline = float("inf")  # when this process ends for that reason
        self._lock = threading.Lock()
        self._closed = False  # this process is exiting: nothing is watched any more

    def listen(self, host: str, count: int) -> int:
        """Listens at `host` ("" means all interfaces) for `count` processes, and returns the port.

        Raises:
            OSError: it cannot listen there.
        """
        is_dual_stack = not host and socket.has_dualstack_ipv6()
        server = socket.create_server(
            (host, 0),
            family=socket.AF_INET6 if is_dual_stack or ":" in host else socket.AF_INET,
            backlog=count,
            dualstack_ipv6=is_dual_stack,
        )
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ)
        return server.getsockname()[1]

    def connect(self, hosts: list[str], port: int, *, name: str) -> str:
        """Connects to process 0 at the first of `hosts` that answers, and returns "" or why none does.

        name: of process 0's host, for messages.
        """
        reason = "it has no address"
        for host in hosts:
            try:
                connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
            except OSError as error:
                reason = f"{host}:{port}: {error.strerror or error}"
                continue
            process_0 = self._add(connection, 0, name)
            self._send(process_0, token=self._token, process=self._number, host=socket.gethostname())
            return ""
        return reason

    def start(self) -> None:
        """Starts the thread that reads the connections."""
        threading.Thread(target=self._watch, daemon=True, name="peers").start()

    def leave(self, reason: str) -> None:
        """Sends the others a notice that this process exits, and stops watching.

        reason: "" if the work of this process is done.
        """
        with self._lock:
            self._closed = True
        self._broadcast(
            left=redact(reason)[:LONGEST_REASON],
            process=self._number,
            host=socket.gethostname(),
        )

    def _watch(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select(timeout=POLL_SECONDS):
                if key.data is None:  # the server's socket
                    self._accept(key.fileobj)
                else:
                    self._read(key.data)
            if time.monotonic() >= self._deadline:
                self._end(self._reason)

    def _accept(self, server: Any) -> None:
        with contextlib.suppress(OSError):
            self._add(server.accept()[0], None, "")

    def _add(self, connection: socket.socket, number: int | None, host: str) -> Peer:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE:
            if hasattr(socket, name):  # not every system has all of them
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        peer = Peer(connection, number, host)
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)
        return peer

    def _read(self, peer: Peer) -> None:
        try:
            data = peer.socket.recv(LONGEST_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        *messages, peer.received = (peer.received + data).split(b"\n")
        try:
            for message in messages:
                self._handle(peer, parse_json(message, dict))
        except (ValueError, TypeError, KeyError):  # it is no process of this run: its end is no loss
            peer.number = None
            data = b""
        if not data or len(peer.received) > LONGEST_MESSAGE:
            self._drop(peer)

    def _drop(self, peer: Peer) -> None:
        self._selector.unregister(peer.socket)
        self._peers.remove(peer)
        peer.socket.close()
        if peer.number is not None and not peer.has_left:
            self._end(f"process {peer.number} on host {peer.host} is lost")

    def _handle(self, peer: Peer, message: dict[str, Any]) -> None:
        if peer.number is None:
            if not hmac.compare_digest(str(message["token"]), self._token):
                raise ValueError("wrong token")
            peer.number = int(message["process"])
            peer.host = str(message["host"])
        elif "end" in message:
            self._end(str(message["end"]))
        elif "left" in message:
            self._handle_notice(peer, message)

    def _handle_notice(self, peer: Peer, message: dict[str, Any]) -> None:
        number = int(message["process"])
        reason = str(message["left"])
        if number == peer.number:  # process 0 forwards the notices of others
            peer.has_left = True
        if not reason:
            return
        host = str(message["host"])
        self._broadcast(left=reason, process=number, host=host)
        self._reason = self._reason or f"process {number} on host {host} has left: {reason}"
        self._deadline = min(self._deadline, time.monotonic() + LEFT_SECONDS)

    def _broadcast(self, **message: object) -> None:
        """Sends a message from process 0 to all others, and from another process, if it is about itself, to process 0.

        A message about another process came from process 0, so it is not sent back.
        """
        for peer in list(self._peers):
            if self._number == 0 or message.get("process") == self._number:
                self._send(peer, **message)

    def _send(self, peer: Peer, **message: object) -> None:
        with contextlib.suppress(OSError):  # a peer that cannot be reached has exited, or the thread finds it lost
            peer.socket.send(json.dumps(message).encode() + b"\n")

    def _end(self, reason: str) -> None:
        """Ends this process with code 69, at most once. Process 0 makes the others end with the same reason."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._broadcast(end=reason)
        late = threading.Timer(PRINT_SECONDS, os._exit, [errors.UNAVAILABLE])
        late.daemon = True
        late.start()
        print_error(f"error: {reason}; restart the command on every host")
        if self._number == 0:
            time.sleep(LAST_SECONDS)
        os._exit(errors.UNAVAILABLE)


_watchers: list[Watcher] = []  # at most one outside of tests


def watch(service: Any, *, number: int, count: int, coordinator: str) -> str:
    """Starts to watch the other processes; call it once, when all have joined. Returns "" or why it cannot.

    Args:
        service: the client of JAX's key-value store.
        number: of this process.
        count: of all processes.
        coordinator: HOST:PORT of process 0, "" if JAX has found it out itself.
    """
    host = coordinator.rpartition(":")[0]
    try:
        watcher = _listen(service, host, count) if number == 0 else _connect(service, host, number)
    except Exception as error:  # also of JAX's store, which has no class of its own; the barrier names a lost process
        return first_line(error)
    watcher.start()
    _watchers.append(watcher)
    atexit.register(leave, "")  # it runs before JAX's own handler, which waits for the others
    return ""


def _listen(service: Any, host: str, count: int) -> Watcher:
    """Returns the listening watcher of process 0, and publishes its address.

    Raises:
        OSError: it cannot listen; the others are informed.
    """
    token = secrets.token_hex(16)
    watcher = Watcher(0, token)
    is_local = host in LOOPBACK
    try:
        port = watcher.listen(host.strip("[]") if is_local else "", count)
    except OSError as error:
        service.key_value_set(ADDRESS, json.dumps({"failed": str(error)}))  # the others wait for the key
        raise
    local_addresses = [] if is_local else _local_addresses()
    hosts = [host, *local_addresses, socket.gethostname()]
    service.key_value_set(ADDRESS, json.dumps({"token": token, "port": port, "hosts": hosts}))
    return watcher


def _connect(service: Any, host: str, number: int) -> Watcher:
    """Returns the watcher of another process, connected to process 0.

    Raises:
        ConnectionError: process 0 cannot listen, or cannot be reached.
    """
    address = json.loads(service.blocking_key_value_get(ADDRESS, 60_000))
    if "failed" in address:
        raise ConnectionError(address["failed"])
    watcher = Watcher(number, address["token"])
    candidates = dict.fromkeys([host, *address["hosts"]])  # without duplicates, in order
    hosts = [name.strip("[]") for name in candidates if name]
    reason = watcher.connect(hosts, address["port"], name=address["hosts"][-1])
    if reason:
        raise ConnectionError(reason)
    return watcher


def leave(reason: str) -> None:
    """Sends the watched processes a notice that this one exits; `reason` is "" if its work is done."""
    for watcher in _watchers:
        watcher.leave(reason)
    _watchers.clear()


def settle() -> None:
    """Waits after an error that the loss of another process may have caused; if it did, this process ends here."""
    if _watchers:
        time.sleep(SETTLE_SECONDS)


def _local_addresses() -> list[str]:
    """Returns the address at which others reach this host, if it has a default route."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing, but chooses the interface of the default route
        return [probe.getsockname()[0]]
    return []
