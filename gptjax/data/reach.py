"""Whether servers can be reached, before a library spends minutes on retries."""

import queue
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable

SECONDS = 5.0  # for a connection
MOST_SERVERS = 16  # that are tried, all at once
PORTS = {"http": 80, "https": 443, "ftp": 21}


def can_connect(urls: Iterable[str], *, seconds: float = SECONDS) -> bool:
    """Returns whether a server of `urls` accepts a connection, or the proxy that the environment names for it.

    It is True as well if no URL is of the web.

    seconds: for all of them together.
    """
    parts = map(urllib.parse.urlsplit, urls)
    servers = sorted({(part.scheme, part.netloc) for part in parts if part.scheme in PORTS})[:MOST_SERVERS]
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
    for server in servers:  # (scheme, network location)
        # A thread that still waits for a name server must not delay the end of the process.
        threading.Thread(
            target=_try_server,
            args=(*server, seconds, answers),
            daemon=True,
        ).start()
    deadline = time.monotonic() + seconds
    for _ in servers:
        try:
            if answers.get(timeout=max(0.0, deadline - time.monotonic())):
                return True
        except queue.Empty:
            return False
    return not servers


def _try_server(
    scheme: str,
    netloc: str,
    seconds: float,
    answers: "queue.SimpleQueue[bool]",
) -> None:
    """Puts whether the server accepts a connection into `answers`."""
    try:
        address = _address(scheme, netloc)
        with socket.create_connection(address, seconds):
            accepts = True
    except (OSError, ValueError):  # ValueError: a port or a proxy that is none
        accepts = False
    answers.put(accepts)


def _address(scheme: str, netloc: str) -> tuple[str, int]:
    """Returns (host, port) of a server, or of its proxy if it has one."""
    server = urllib.parse.urlsplit(f"{scheme}://{netloc}")
    host = server.hostname or ""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(host):
        server = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return server.hostname or "", server.port or PORTS.get(server.scheme, 1080)


def hub_url() -> str:
    """Returns the address of the Hugging Face Hub, which HF_ENDPOINT may set; "" without huggingface_hub."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return ""
    return constants.ENDPOINT
