"""A small Hugging Face Hub on 127.0.0.1 that keeps what is uploaded, records all requests, and fails on demand."""

import base64
import dataclasses
import hashlib
import http.server
import json
import re
import socket
import struct
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

from gptjax.convert import hub_download, hub_listing

LARGE = 1 << 20  # from here on the Hub's hash is SHA-256, as with git's large files


@dataclasses.dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]  # with lower-case names
    status: int = 0
    sent: int = 0  # bytes of the file that went out


class Hub:
    """The server, while in its `with` block. Faults are set by assignment, before or during a download."""

    def __init__(self) -> None:
        self.snapshots: dict[tuple[str, str], dict[str, bytes]] = {}  # (repository, commit) -> its files
        self.refs: dict[tuple[str, str], str] = {}  # (repository, branch or tag) -> commit
        self.requests: list[Request] = []
        self.token = ""  # if set, whoever does not send it gets 401
        self.statuses: dict[str, Iterator[int]] = {}  # regular expression of a path -> its next answers, instead
        self.reason = "refused"  # of statuses
        self.code = ""  # of statuses, in X-Error-Code
        self.cuts: dict[str, Iterator[int]] = {}  # file -> after how many bytes each of its next answers is cut
        self.reset = False  # cuts are resets by the peer, not early ends
        self.stalls: dict[str, int] = {}  # file -> after how many bytes its answers wait for `released`
        self.released = threading.Event()
        self.announced: dict[str, int] = {}  # file -> a size that is not its own
        self.objects: dict[str, bytes] = {}  # SHA-256 -> what was uploaded apart from a commit, as large files are
        self.damaged: set[str] = set()  # files whose contents go out wrong
        self.deaf = False  # Range is not understood
        self.page = 1000  # entries of a data set's tree in one answer
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, repo: str, files: dict[str, bytes], ref: str = "main") -> str:
        """Returns the commit of the files, which `ref` now means."""
        text = repr((repo, sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())))
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.snapshots[repo, commit] = files
        self.refs[repo, ref] = commit
        return commit

    def fetched(self, name: str = "") -> list[Request]:
        """Returns the requests for the contents of files, or of one file, so far."""
        ending = f"/{name}" if name else ""
        return [r for r in self.requests if "/resolve/" in r.path and r.path.endswith(ending)]

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        class Handler(_Handler):
            hub = self

        return Handler


def use(hub: Hub, monkeypatch: Any, cache: Any) -> None:
    """Makes `hub` the Hub of this process until the test ends, with the empty directory `cache`."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub_listing, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(hub_download, "FILE_PAUSES", (0.0,) * 5)
    close_session()  # of another environment


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = 0

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_request(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.request_seen = Request(self.command, path, {k.lower(): v for k, v in self.headers.items()})
        self.hub.requests.append(self.request_seen)
        for pattern, statuses in self.hub.statuses.items():
            if re.search(pattern, path) and (status := next(statuses, None)):
                return self.refuse(status, self.hub.code)
        signed = path.startswith("/objects/")  # as with the Hub, that address is the permission
        if self.hub.token and not signed and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.refuse(401)
        return self.route(path)

    def route(self, path: str) -> None:
        routes = {
            r"/api/models/(.+)/revision/([^/]+)": self.tell_repository,
            r"/api/models/(.+)/tree/([^/]+)": self.tell_tree,
            r"/api/(datasets/[^/]+/[^/]+)/revision/([^/]+)": self.tell_commit,
            r"/api/(datasets/[^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?": self.tell_folder,
            r"/(.+)/resolve/([^/]+)/(.+)": self.send_file,
            r"/api/repos/create": self.create,
            r"/api/models/(.+)/preupload/main": self.tell_modes,
            r"/api/models/(.+)/commit/main": self.commit,
            r"/.+\.git/info/lfs/objects/batch": self.tell_addresses,
            r"/objects/(.+)": self.store,
            r"/api/validate-yaml": lambda: self.answer({}),
        }
        for pattern, act in routes.items():
            if found := re.fullmatch(pattern, path):
                return act(*map(urllib.parse.unquote, found.groups(default="")))
        return self.refuse(404)

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        self.respond(status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode())

    def refuse(self, status: int, code: str = "") -> None:
        self.answer({"error": self.hub.reason}, status, **({"X-Error-Code": code} if code else {}))

    def respond(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.request_seen.status = status
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Returns commit and files, or answers 404."""
        commit = self.hub.refs.get((repo, revision), revision)
        if (repo, commit) in self.hub.snapshots:
            return commit, self.hub.snapshots[repo, commit]
        known = any(name == repo for name, _ in self.hub.snapshots)
        self.refuse(404, "RevisionNotFound" if known else "RepoNotFound")
        return None

    def tell_repository(self, repo: str, revision: str) -> None:
        if found := self.find(repo, revision):
            commit, files = found
            self.answer({"id": repo, "sha": commit, "siblings": [self.entry(n, d) for n, d in files.items()]})

    def entry(self, name: str, data: bytes) -> dict[str, Any]:
        size = self.hub.announced.get(name, len(data))
        large = {"lfs": {"sha256": etag(data), "size": size, "pointerSize": 130}} if len(data) >= LARGE else {}
        return {"rfilename": name, "size": size, "blobId": git_hash(data), **large}

    def tell_tree(self, repo: str, revision: str) -> None:
        if found := self.find(repo, revision):
            files = found[1].items()
            self.answer([{"type": "file", "path": n, "size": len(d), "oid": git_hash(d)} for n, d in files])

    def tell_commit(self, repo: str, revision: str) -> None:
        if found := self.find(repo, revision):
            self.answer({"_id": "1", "id": repo.removeprefix("datasets/"), "sha": found[0]})

    def tell_folder(self, repo: str, revision: str, folder: str) -> None:
        """Answers as the Hub does: hashes of large files are `oid` of `lfs`, and pages follow each other by Link."""
        if not (found := self.find(repo, revision)):
            return None
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        start = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for name, data in sorted(found[1].items()):
            if not name.startswith(start):
                continue
            parts = name[len(start) :].split("/")
            for depth in range(1, len(parts)):
                path = start + "/".join(parts[:depth])
                entries[path] = {"type": "directory", "path": path, "oid": git_hash(path.encode()), "size": 0}
            size = self.hub.announced.get(name, len(data))
            large = {"lfs": {"oid": etag(data), "size": size, "pointerSize": 130}} if len(data) >= LARGE else {}
            entries[name] = {"type": "file", "path": name, "oid": git_hash(data), "size": size, **large}
        if query["recursive"] != ["true"]:
            entries = {path: e for path, e in entries.items() if "/" not in path[len(start) :]}
        if folder and not entries:
            return self.refuse(404, "EntryNotFound")
        first = int(query.get("cursor", ["0"])[0])
        shown = list(entries.values())[first : first + self.hub.page]
        more = {}
        if first + self.hub.page < len(entries):
            there = f"https://elsewhere.example{urllib.parse.urlsplit(self.path).path}"  # only the query counts
            recursive = query["recursive"][0]
            more = {"Link": f'<{there}?recursive={recursive}&cursor={first + self.hub.page}>; rel="next"'}
        return self.answer(shown, **more)

    def send_file(self, repo: str, revision: str, name: str) -> None:
        if not (found := self.find(repo, revision)):
            return None
        commit, files = found
        if name not in files:
            return self.refuse(404, "EntryNotFound")
        data = files[name] if name not in self.hub.damaged else files[name][::-1]
        headers = {"ETag": f'"{etag(files[name])}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if len(data) >= LARGE:
            headers["X-Linked-Size"] = str(len(data))
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and not self.hub.deaf else 0
        if start and start >= len(data):
            return self.respond(416, {"Content-Range": f"bytes */{len(data)}"}, b"")
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        headers["Content-Length"] = str(len(data) - start)
        self.respond(206 if start else 200, headers, b"")
        return self.send_body(name, data[start:]) if self.command == "GET" else None

    def send_body(self, name: str, body: bytes) -> None:
        cut = next(self.hub.cuts.get(name, iter(())), len(body))
        wait = self.hub.stalls.get(name, len(body))
        for piece in (body[: min(cut, wait)], body[wait:cut]):
            try:
                self.wfile.write(piece)
            except OSError:  # the client has gone
                self.close_connection = True
                return
            self.request_seen.sent += len(piece)
            if wait < len(body):
                self.hub.released.wait(30)
        if cut < len(body):
            self.close_connection = True
            if self.hub.reset:  # closing with linger 0 sends a reset
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                self.connection.shutdown(socket.SHUT_RDWR)

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        if any(name == repo for name, _ in self.hub.snapshots):
            return self.answer({"error": "it exists", "url": f"{self.hub.url}/{repo}"}, 409)
        self.hub.add(repo, {})
        return self.answer({"url": f"{self.hub.url}/{repo}"})

    def tell_modes(self, repo: str) -> None:
        files = json.loads(self.body)["files"]
        modes = ["lfs" if file["size"] >= LARGE else "regular" for file in files]
        answers = [
            {"path": f["path"], "uploadMode": m, "shouldIgnore": False} for f, m in zip(files, modes, strict=True)
        ]
        self.answer({"files": answers})

    def tell_addresses(self) -> None:
        objects = json.loads(self.body)["objects"]
        for item in objects:
            item["actions"] = {"upload": {"href": f"{self.hub.url}/objects/{item['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        self.hub.objects[oid] = self.body
        self.answer({})

    def commit(self, repo: str) -> None:
        if not (found := self.find(repo, "main")):
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        new = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
        new |= {x["value"]["path"]: self.hub.objects[x["value"]["oid"]] for x in lines if x["key"] == "lfsFile"}
        commit = self.hub.add(repo, found[1] | new)
        self.answer({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit})


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if len(data) >= LARGE else git_hash(data)
