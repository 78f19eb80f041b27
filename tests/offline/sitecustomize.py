"""Lets a Python process connect to this machine only. On PYTHONPATH it holds for processes that tests start, too."""

import socket

ALLOWED = ("127.0.0.1", "::1", "localhost")


def _guard(name: str) -> None:
    plain = getattr(socket.socket, name)

    def guarded(self: socket.socket, address: object) -> object:
        if isinstance(address, tuple) and address[0] not in ALLOWED:
            raise AssertionError(f"a test tried to connect to {address[0]}")
        return plain(self, address)

    setattr(socket.socket, name, guarded)


_guard("connect")
_guard("connect_ex")
