"""Lets a Python process connect to this machine only. On PYTHONPATH it holds for processes that tests start, too.

And several processes of one run share what they have compiled (Python loads one sitecustomize only). On CPU, JAX 0.10
and 0.12 would look for it under another key in each process, and let only the first one write.
"""

import contextlib
import socket
import sys

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

if any(argument.startswith("--process_id=") for argument in sys.orig_argv):
    with contextlib.suppress(ImportError, AttributeError):  # without it, tests take longer
        from jax._src import cache_key

        cache_key._hash_accelerator_config = cache_key._hash_devices
