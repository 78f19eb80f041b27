"""Servers are tried within seconds, all at once, and behind the proxy of the environment."""

import socket
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from gptjax.data import reach
from gptjax.data.reach import can_connect


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def open_place() -> Iterator[str]:
    """HOST:PORT of a server that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed_place() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_one_server_that_answers_is_enough(open_place, closed_place):
    assert not can_connect([f"http://{closed_place}/a", f"http://{closed_place}/b"])
    assert can_connect([f"http://{closed_place}/a", f"https://{open_place}/b"])


def test_urls_that_are_not_of_the_web_are_not_tried():
    assert can_connect([])
    assert can_connect(["gs://bucket/a", "file:///a", ""])


@pytest.mark.parametrize("url", ["http://127.0.0.1:x/", "http://127.0.0.1:99999/", "http:///a"])
def test_impossible_address_does_not_answer(url):
    assert not can_connect([url])


def test_server_that_is_silent_is_given_up(monkeypatch):
    given_up = threading.Event()

    def wait(*_):
        given_up.wait(20)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", wait)
    start = time.monotonic()
    assert not can_connect([f"http://{name}.invalid" for name in "abcdefgh"], seconds=0.2)
    assert time.monotonic() - start < 2
    given_up.set()


def test_every_server_is_tried_once(monkeypatch):
    tried = []
    monkeypatch.setattr(reach, "_address", lambda *server: tried.append(server) or ("", 0))
    monkeypatch.setattr(socket, "create_connection", lambda *_: (_ for _ in ()).throw(OSError))
    assert not can_connect([f"https://a.org/{number}" for number in range(1000)] + ["http://a.org", "http://b.org"])
    assert sorted(tried) == [("http", "a.org"), ("http", "b.org"), ("https", "a.org")]


@pytest.mark.parametrize("form", ["http://{}", "{}", "http://me:pw@{}/"])
@pytest.mark.parametrize("variable", ["https_proxy", "HTTPS_PROXY", "all_proxy"])
def test_proxy_is_tried_in_place_of_the_server(monkeypatch, open_place, closed_place, variable, form):
    url = f"https://{closed_place}/a"
    monkeypatch.setenv(variable, form.format(open_place))
    assert can_connect([url])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert not can_connect([url])


def test_the_hub_is_that_of_huggingface_hub(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    assert reach.hub_url() == "https://hub.example"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert reach.hub_url() == ""
    assert reach.can_connect([reach.hub_url()])
