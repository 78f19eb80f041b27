"""U1: a server that sends too much, too slowly, something else or elsewhere is left, and the cache stays small."""

import gzip
import itertools
import json
import pathlib
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import pytest

from gptjax.convert import hub, hub_download, hub_listing, transfer
from gptjax.errors import DataError, UnavailableError, WorkdirError
from tests.convert.hub_server import LARGE, etag, git_hash
from tests.helpers import raises

pytestmark = pytest.mark.faults
pytest.importorskip("huggingface_hub")

REPO, COMMIT = "someone/tiny-gpt2", "c" * 40
CONFIG_FIELD, WEIGHTS_FIELD = f"{REPO}@{COMMIT}: config.json", f"{REPO}@{COMMIT}: model.safetensors"
CONFIG = b"{" + b" " * 656 + b"}"  # 658 bytes
WEIGHTS = random.Random(0).randbytes(LARGE + 1)
MOST_SENT = 64 << 20  # bytes of one answer, after which a server here gives up
INFO, CONFIG_PATH, WEIGHTS_PATH = "/api/models/", "/config.json", "/model.safetensors"


class Server:
    """A server on 127.0.0.1 that answers with the bytes of `answers`, by the start or the end of a path."""

    def __init__(self) -> None:
        self.answers: dict[str, Callable[[str], Iterable[bytes]]] = {}  # takes the request's head
        self.heads: list[str] = []  # of all requests
        self.sent: list[int] = []  # bytes of each answer
        self.stopped = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while not self.stopped.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            head = b""
            while b"\r\n\r\n" not in head and (more := connection.recv(65536)):
                head += more
            text = head.decode()
            path = text.split(" ")[1].partition("?")[0]
            self.heads.append(text)
            self.sent.append(0)
            number = len(self.sent) - 1
            found = (a for name, a in self.answers.items() if path.startswith(name) or path.endswith(name))
            send = next(found, answer(b"", status="404 Not Found"))
            try:
                for piece in send(text):
                    connection.sendall(piece)
                    self.sent[number] += len(piece)
                    if self.stopped.is_set() or self.sent[number] > MOST_SENT:
                        return
            except OSError:  # the client has gone
                return

    def asked(self, path: str) -> list[str]:
        """Returns the heads of the requests for `path` so far."""
        return [head for head in self.heads if path in head.split(" ")[1]]


def answer(body: bytes, *headers: str, status: str = "200 OK") -> Callable[[str], Iterable[bytes]]:
    lines = [f"HTTP/1.1 {status}", *(headers or [f"Content-Length: {len(body)}"]), "Connection: close"]
    return lambda _: ["\r\n".join([*lines, "", ""]).encode(), body]


def endless(start: bytes, pieces: Callable[[], Iterable[bytes]], *headers: str) -> Callable[[str], Iterable[bytes]]:
    (head, body) = answer(start, *(headers or ["X: y"]))("")
    return lambda _: itertools.chain([head, body], pieces())


def listing(**files: bytes) -> Callable[[str], Iterable[bytes]]:
    siblings = []
    for name, data in files.items():
        large = {"lfs": {"sha256": etag(data), "size": len(data)}} if len(data) >= LARGE else {}
        entry = {"rfilename": name.replace("__", "."), "size": len(data), "blobId": git_hash(data)}
        siblings.append(entry | large)
    return answer(json.dumps({"sha": COMMIT, "siblings": siblings}).encode())


@pytest.fixture
def server(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that answers well, and is the Hub for this process, with an empty cache."""
    with Server() as made:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        from huggingface_hub import constants
        from huggingface_hub.utils import close_session

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub_listing, "PAUSES", (0.0, 0.0))
        monkeypatch.setattr(hub_download, "FILE_PAUSES", (0.0,) * 5)
        made.answers = {
            INFO: listing(config__json=CONFIG, model__safetensors=WEIGHTS),
            CONFIG_PATH: answer(CONFIG),
            WEIGHTS_PATH: answer(WEIGHTS),
        }
        close_session()  # of another environment
        yield made
        close_session()


def stored(folder: pathlib.Path) -> int:
    """Returns the bytes of all files in the cache."""
    return sum(p.stat().st_size for p in (folder / "cache").rglob("*") if p.is_file() and not p.is_symlink())


def fetched(name: str) -> bytes:
    return (pathlib.Path(hub.download(REPO)[0]) / name).read_bytes()


def forever(piece: bytes) -> Callable[[], Iterator[bytes]]:
    return lambda: itertools.repeat(piece)


def late() -> Iterator[bytes]:
    time.sleep(0.2)  # what was announced has been written by then
    yield b"x"


CHUNK = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
EMPTY_BLOCK = b"\x00\x00\x00\xff\xff" * 10000  # of deflate: no byte comes out of it
GZIP_HEAD = gzip.compress(b"", mtime=0)[:10]
TOO_LONG = {
    "no length": endless(CONFIG, forever(bytes(1 << 16))),
    "a wrong length": endless(CONFIG, forever(bytes(1 << 16)), "Content-Length: 1570000000"),
    "chunks": endless(b"", forever(CHUNK), "Transfer-Encoding: chunked"),
    "one byte": answer(CONFIG + b"x"),
    "more, a moment later": endless(CONFIG, late),
    "gzip that expands": answer(gzip.compress(bytes(2 << 20)), "Content-Encoding: gzip"),  # in some 2,000 bytes
    "gzip that expands far": answer(gzip.compress(bytes(32 << 20)), "Content-Encoding: gzip"),
    "gzip without an end": endless(GZIP_HEAD, forever(EMPTY_BLOCK), "Content-Encoding: gzip"),
}


@pytest.mark.parametrize("form", TOO_LONG)
def test_u1_file_longer_than_announced_is_refused(server, tmp_path, form):
    server.answers[CONFIG_PATH] = TOO_LONG[form]
    with raises(DataError, CONFIG_FIELD, remedy="to download it", match="sends more"):
        hub.download(REPO)
    assert stored(tmp_path) == 0
    assert max(server.sent) < MOST_SENT
    server.answers[CONFIG_PATH] = answer(CONFIG)
    assert fetched("config.json") == CONFIG


@pytest.mark.parametrize("form", TOO_LONG)
def test_u1_endless_file_list_is_refused(server, monkeypatch, form):
    monkeypatch.setattr(hub_listing, "LARGEST_JSON", 600)
    server.answers[INFO] = TOO_LONG[form]
    with raises(UnavailableError, server.url, remedy="check HF_ENDPOINT", match="sends more"):
        hub.download(REPO)
    assert max(server.sent) < MOST_SENT


def test_u1_unrequested_gzip_is_accepted_if_valid(server):
    server.answers[CONFIG_PATH] = answer(gzip.compress(CONFIG), "Content-Encoding: gzip")
    assert fetched("config.json") == CONFIG


@pytest.mark.parametrize(
    ("encoding", "body", "problem"),
    [
        ("br", CONFIG, "as 'br'"),
        ("gzip", CONFIG, "gzip that is damaged"),
        ("gzip", gzip.compress(CONFIG, mtime=0)[:-9], "ends too early"),
    ],
)
def test_u1_other_compression_is_refused(server, encoding, body, problem):
    server.answers[CONFIG_PATH] = answer(body, f"Content-Encoding: {encoding}")
    with raises(UnavailableError, CONFIG_FIELD, remedy="rerun the same command", match=problem):
        hub.download(REPO)


def test_u1_a_small_file_is_compared_with_the_hash_of_git(server, tmp_path):
    server.answers[CONFIG_PATH] = answer(CONFIG.replace(b" ", b"1", 1))
    with raises(DataError, f"{REPO}@{COMMIT}", match=r"config\.json is .* SHA-1"):
        hub.download(REPO)
    assert stored(tmp_path) == 0


@pytest.mark.parametrize(
    "entry",
    [{"size": size} for size in (-1, True, 658.0, 2**60, "658")]
    + [{"blobId": blob} for blob in (None, "e" * 64, "../../../x")]
    + [{"lfs": large} for large in ({}, {"sha256": "e" * 40}, [])],
)
def test_u1_file_entry_without_size_or_hash_is_refused(server, entry):
    good = {"rfilename": "config.json", "size": len(CONFIG), "blobId": git_hash(CONFIG)}
    other = {"rfilename": "model.safetensors", "size": 1, "blobId": git_hash(b"x")}
    server.answers[INFO] = answer(json.dumps({"sha": COMMIT, "siblings": [good | entry, other]}).encode())
    with raises(DataError, f"{REPO}@main", remedy="check HF_ENDPOINT", match=r"config\.json"):
        hub.download(REPO)


@pytest.mark.parametrize("told", [b"[]", b"{}", b'{"sha": "c", "siblings": null}', b"[" * 100_000, b"\xff", b""])
def test_u1_invalid_file_list_is_refused(server, told):
    server.answers[INFO] = answer(told)
    with raises(UnavailableError, server.url, remedy="check HF_ENDPOINT"):
        hub.download(REPO)


def test_u1_full_disk_is_reported_before_the_first_file(server, tmp_path, monkeypatch):
    needed, total = len(CONFIG) + len(WEIGHTS), shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: total._replace(free=needed - 1))
    store = f"{tmp_path}/cache/models--someone--tiny-gpt2"
    with raises(WorkdirError, store, remedy="HF_HOME", match=f"{needed:,} .* {needed - 1:,} are free"):
        hub.download(REPO)
    assert not server.asked("/resolve/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: total._replace(free=needed))
    assert fetched("model.safetensors") == WEIGHTS
    monkeypatch.setattr(shutil, "disk_usage", lambda path: total._replace(free=0))
    assert fetched("model.safetensors") == WEIGHTS  # nothing is to come


def drip(server: Server, start: bytes, piece: bytes) -> Callable[[str], Iterable[bytes]]:
    """Answers with `start`, and then a `piece` every 50 ms."""

    def send(_: str) -> Iterator[bytes]:
        yield start
        while not server.stopped.wait(0.05):
            yield piece

    return send


GOOD_START = answer(WEIGHTS)("")
SLOW = {
    "bytes": (b"".join(GOOD_START)[: len(next(iter(GOOD_START))) + 1000], b"x"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "a status": (b"", b"H"),
    "preliminary answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "RATE_SECONDS", 0.3)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("path", [INFO, WEIGHTS_PATH])
@pytest.mark.parametrize("form", SLOW)
def test_u1_download_from_a_too_slow_server_is_aborted(server, form, path):
    server.answers[path] = drip(server, *SLOW[form])
    field = server.url if path == INFO else WEIGHTS_FIELD
    with raises(UnavailableError, field, remedy="rerun the same command", match=r"in \d+ s, less"):
        hub.download(REPO)


@pytest.mark.usefixtures("impatient")
def test_u1_aborted_slow_download_resumes_where_it_stopped(server):
    good = server.answers[WEIGHTS_PATH]
    server.answers[WEIGHTS_PATH] = drip(server, b"".join(good(""))[:-1], b"")
    with raises(UnavailableError, WEIGHTS_FIELD, remedy="rerun the same command to resume"):
        hub.download(REPO)
    server.answers[WEIGHTS_PATH] = answer(WEIGHTS[-1:], status="206 Partial Content")
    assert fetched("model.safetensors") == WEIGHTS
    assert f"range: bytes={len(WEIGHTS) - 1}-" in server.asked(WEIGHTS_PATH)[-1].lower()


def test_u1_download_that_always_restarts_is_aborted(server):
    attempts = itertools.count(1)
    cut = [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(WEIGHTS)]
    server.answers[WEIGHTS_PATH] = lambda _: [*cut, WEIGHTS[: 1000 * next(attempts)]]  # each is farther than before
    with raises(UnavailableError, WEIGHTS_FIELD, remedy="rerun the same command", match="from the start"):
        hub.download(REPO)
    assert len(server.asked(WEIGHTS_PATH)) == hub_download.MOST_RESTARTS + 2


def redirect(address: str, body: Callable[[], Iterable[bytes]] = tuple) -> Callable[[str], Iterable[bytes]]:
    send = endless(b"", body, f"Location: {address}")
    return lambda head: (piece.replace(b"200 OK", b"302 Found") for piece in send(head))


def test_u1_endless_redirects_are_refused(server):
    for path, field in ((WEIGHTS_PATH, WEIGHTS_FIELD), (INFO, server.url)):
        server.answers[path] = redirect(server.url + path)
        before = len(server.asked(path))
        with raises(UnavailableError, field, remedy="rerun the same command", match="redirects more"):
            hub.download(REPO)
        assert len(server.asked(path)) - before == transfer.MOST_REDIRECTS + 1


def test_u1_redirect_is_followed_without_body_or_token(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_SecretOfThisTest")
    with Server() as other:
        server.answers[WEIGHTS_PATH] = redirect(f"{other.url}/elsewhere", forever(bytes(1 << 16)))
        other.answers["/elsewhere"] = answer(WEIGHTS)
        assert fetched("model.safetensors") == WEIGHTS
    assert max(server.sent) < MOST_SENT
    assert "Secret" in server.asked(WEIGHTS_PATH)[0]
    assert "Secret" not in other.heads[0]
