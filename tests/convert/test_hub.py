"""Downloads get exactly what a conversion needs and survive cuts; uploads are one commit; tokens stay private."""

import contextlib
import itertools
import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from gptjax.convert.hub import download
from gptjax.convert.tokenizer_files import write_tokenizer
from gptjax.data.tokenizer import load_tokenizer
from gptjax.errors import ConfigError
from tests import runs
from tests.convert.hub_server import Hub
from tests.helpers import raises

REPO = "someone/tiny-gpt2"
TOKEN = "hf_SecretOfThisTest"
WEIGHTS = random.Random(0).randbytes(25 << 20)
CUT = 15 << 20
SMALL = {"config.json": b'{"model_type": "gpt2"}', "generation_config.json": b"generation", "merges.txt": b"merges"}
SMALL |= {"tokenizer.json": b"tokenizer", "vocab.json": b"vocab", "tokenizer_config.json": b"tokenizer config"}
OTHERS = [".gitattributes", "README.md", "64.tflite", "onnx/config.json", "rust_model.ot", "tf_model.h5"]
OTHER = dict.fromkeys(OTHERS, b"x")
HALF = {"model.safetensors.index.json": b"{}", "model-00001-of-00002.safetensors": b""}
FORMATS = {"model.safetensors": b"safe", "pytorch_model.bin": b"bin", "flax_model.msgpack": b"flax"}

MAIN = """
import json
from gptjax import cli
from gptjax.convert import hub
cli.run_cli(lambda arguments: print(json.dumps(getattr(hub, arguments[0])(*arguments[1:]))))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        yield server


class Client:
    """Starts `download` and `upload` in processes of their own: huggingface_hub reads its settings when imported."""

    def __init__(self, directory: pathlib.Path, url: str) -> None:
        self.home = directory / "hf"
        # XET: the server here has no such storage; downloads never use it.
        off = {f"HF_HUB_DISABLE_{name}": "1" for name in ("PROGRESS_BARS", "TELEMETRY", "XET")}
        off |= {"NO_PROXY": "127.0.0.1", "TRANSFORMERS_OFFLINE": ""}
        self.environment = runs.Lab(directory).environment(HF_ENDPOINT=url, HF_HOME=str(self.home), **off)

    def call(self, *arguments: str, expect: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        command, variables = [sys.executable, "-c", MAIN, *arguments], self.environment | environment
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == expect, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def download(self, *arguments: str, **environment: str) -> tuple[pathlib.Path, str]:
        lines = self.call("download", REPO, *arguments, **environment).stdout.splitlines()
        directory, commit = json.loads(lines[-1])
        return pathlib.Path(directory), commit

    def fail(self, *arguments: str, expect: int, **environment: str) -> str:
        """Returns the one line that says what is wrong."""
        done = self.call(*(arguments or ("download", REPO)), expect=expect, **environment)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.stderr.endswith(f"{line}\n")
        return line

    @contextlib.contextmanager
    def start(self) -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, "-c", MAIN, "download", REPO]
        with subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    def partial_bytes(self) -> int:
        size = 0
        for path in self.home.glob("hub/*/blobs/*.gptjax"):
            with contextlib.suppress(FileNotFoundError):  # it is complete by now
                size += path.stat().st_size
        return size


@pytest.fixture
def client(tmp_path: pathlib.Path, hub: Hub) -> Client:
    return Client(tmp_path, hub.url)


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def ranges(hub: Hub, name: str = "model.safetensors") -> list[tuple[str, int]]:
    return [(r.headers.get("range", ""), r.sent) for r in hub.fetched(name)]


def test_download_fetches_only_the_conversion_files_of_one_commit(hub, client):
    files = SMALL | {"model.safetensors": b"safe"}
    commit = hub.add(REPO, files | OTHER | FORMATS)
    directory, pinned = client.download()
    assert (pinned, directory.name) == (commit, commit)
    assert contents(directory) == files
    assert {r.path.split("/resolve/")[1] for r in hub.fetched()} == {f"{commit}/{name}" for name in files}
    # Ranges of a compressed answer would be of other bytes.
    assert {r.headers["accept-encoding"] for r in hub.fetched()} == {"identity"}
    assert [r.path for r in hub.requests if "/api/" in r.path] == [f"/api/models/{REPO}/revision/main"]


def test_download_logs_the_commit_and_the_remaining_bytes(hub, client):
    commit = hub.add(REPO, SMALL | FORMATS)
    total = sum(map(len, SMALL.values())) + len(b"safe")
    expected = [f"{REPO}@{commit}: {total} bytes to download", f"{REPO}@{commit}: 0 bytes to download"]
    assert [client.call("download", REPO).stdout.splitlines()[0] for _ in expected] == expected
    assert len(hub.fetched()) == len(SMALL) + 1


OPEN_TOKENIZER = """
import sys
from gptjax import cli
from gptjax.convert.tokenizer_source import open_tokenizer
cli.run_cli(lambda arguments: print(open_tokenizer(arguments[0]).sha256))
"""


def test_tokenizer_of_a_repository_is_downloaded_alone_and_once(hub, client, tmp_path):
    tokenizer = load_tokenizer("bytes")
    write_tokenizer(tokenizer, str(tmp_path / "files"), block_size=8)
    files = contents(tmp_path / "files")
    hub.add(REPO, files | {"config.json": b"{}", "model.safetensors": b"not asked for"})

    def opened(**environment):
        command = [sys.executable, "-c", OPEN_TOKENIZER, f"hf:{REPO}"]
        variables = client.environment | environment
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
        return done.returncode, done.stdout.splitlines()[-1:], done.stderr

    assert opened()[:2] == (0, [tokenizer.sha256])
    asked = {r.path.rsplit("/", 1)[1] for r in hub.fetched()}
    assert asked == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    fetched = len(hub.requests)
    assert opened(HF_HUB_OFFLINE="1")[:2] == (0, [tokenizer.sha256])
    assert len(hub.requests) == fetched
    hub.add(REPO, {"config.json": b"{}", "model.safetensors": b"x"})
    code, _, said = opened()
    assert code == 65
    assert "no tokenizer that can be read" in said


@pytest.mark.parametrize("chosen", ["model.safetensors", "pytorch_model.bin", "flax_model.msgpack"])
def test_download_prefers_safetensors_then_bin_then_msgpack(hub, client, chosen):
    names = list(FORMATS)
    left = {name: FORMATS[name] for name in names[names.index(chosen) :]}
    hub.add(REPO, {"config.json": b"{}"} | left)
    assert set(contents(client.download()[0])) == {"config.json", chosen}


@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_shards_come_with_their_index(hub, client, stem):
    name, _, ending = stem.partition(".")
    shards = {f"{name}-0000{i}-of-00002.{ending}": bytes([i]) for i in (1, 2)} | {f"{stem}.index.json": b"{}"}
    hub.add(REPO, {"config.json": b"{}"} | shards | {"flax_model.msgpack": b"", f"{name}-x.{ending}": b""})
    assert contents(client.download()[0]) == {"config.json": b"{}"} | shards


@pytest.mark.parametrize("files", [FORMATS, SMALL, SMALL | HALF])
def test_repository_without_a_complete_model_is_refused(hub, client, files):
    hub.add(REPO, files)
    assert "needs config.json and one of model.safetensors" in client.fail(expect=65)
    assert hub.fetched() == []


def test_revision_may_be_a_tag_or_a_commit(hub, client):
    old = hub.add(REPO, SMALL | {"model.safetensors": b"old"}, ref="v1")
    hub.add(REPO, SMALL | {"model.safetensors": b"new"})
    for revision in ("v1", old):
        directory, commit = client.download(revision)
        assert (commit, (directory / "model.safetensors").read_bytes()) == (old, b"old")
    assert (client.download()[0] / "model.safetensors").read_bytes() == b"new"


@pytest.mark.parametrize("reset", [False, True])
def test_cut_connection_resumes_the_download_by_range(hub, client, reset):
    hub.add(REPO, SMALL | {"model.safetensors": WEIGHTS})
    hub.cuts["model.safetensors"] = iter([CUT])
    hub.reset = reset
    directory, _ = client.download()
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS
    (_, first), (asked, second) = ranges(hub)
    kept = len(WEIGHTS) - second
    assert (first, asked) == (CUT, f"bytes={kept}-")
    assert 0 < kept <= CUT if reset else kept == CUT  # a reset may take what was not yet received


def test_killed_download_resumes_in_a_new_process(hub, client):
    hub.add(REPO, SMALL | {"model.safetensors": WEIGHTS})
    hub.stalls["model.safetensors"] = CUT
    with client.start() as process:
        runs.wait_for(lambda: client.partial_bytes() == CUT, process, seconds=30)
        runs.kill(process)
    hub.stalls.clear()
    hub.released.set()
    line = client.call("download", REPO).stdout.splitlines()[0]
    assert line.endswith(f": {len(WEIGHTS) - CUT} bytes to download")
    assert ranges(hub)[1:] == [(f"bytes={CUT}-", len(WEIGHTS) - CUT)]
    assert contents(client.download()[0])["model.safetensors"] == WEIGHTS


def test_two_processes_get_a_file_once(hub, client):
    hub.add(REPO, SMALL | {"model.safetensors": WEIGHTS})
    hub.stalls["model.safetensors"] = CUT
    with client.start() as first, client.start() as second:
        runs.wait_for(lambda: client.partial_bytes() == CUT, seconds=30)
        runs.wait_for(lambda: sum("/revision/" in r.path for r in hub.requests) == 2, seconds=30)
        time.sleep(0.3)  # the second one comes to the lock
        hub.released.set()
        assert (first.wait(30), second.wait(30)) == (0, 0)
    assert ranges(hub) == [("", len(WEIGHTS))]
    assert contents(client.download(HF_HUB_OFFLINE="1")[0]) == SMALL | {"model.safetensors": WEIGHTS}
    assert not list(client.home.rglob("*.gptjax"))


def test_download_resumes_by_the_same_command_after_giving_up(hub, client):
    hub.add(REPO, SMALL | {"model.safetensors": WEIGHTS})
    hub.cuts["model.safetensors"] = itertools.chain([CUT], itertools.repeat(0))
    line = client.fail(expect=69)
    assert f"no good answer from {hub.url} (RemoteProtocolError); rerun the same command to resume" in line
    attempts = ranges(hub)
    assert 2 < len(attempts) < 10
    hub.cuts.clear()
    directory, _ = client.download()
    assert ranges(hub)[len(attempts) :] == [(f"bytes={CUT}-", len(WEIGHTS) - CUT)]
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS


def test_download_restarts_if_the_server_ignores_ranges(hub, client):
    hub.add(REPO, SMALL | {"model.safetensors": WEIGHTS})
    hub.cuts["model.safetensors"] = iter([CUT])
    hub.deaf = True
    directory, _ = client.download()
    assert ranges(hub) == [("", CUT), (f"bytes={CUT}-", len(WEIGHTS))]
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS


def announce(size):
    return lambda hub: hub.announced.update({"model.safetensors": size})


def refuse_the_range(hub):
    hub.cuts["model.safetensors"] = iter([CUT])
    hub.statuses["/resolve/.*safetensors"] = iter([0, 416])


SIZE = len(WEIGHTS)
WRONG_FILES = {  # the message, and what makes the server send something else
    f"has {SIZE} bytes, not the {SIZE + 1} announced": announce(SIZE + 1),
    f"the server sends more than the {SIZE - 1:,} bytes that are expected": announce(SIZE - 1),
    f"has {CUT} bytes, not the {SIZE} announced": refuse_the_range,
    "is damaged: its SHA-256 differs": lambda hub: hub.damaged.add("model.safetensors"),
}


@pytest.mark.parametrize("message", WRONG_FILES)
def test_wrong_file_is_refused_and_redownloaded(hub, client, message):
    hub.add(REPO, SMALL | {"model.safetensors": WEIGHTS})
    WRONG_FILES[message](hub)
    line = client.fail(expect=65)
    assert "model.safetensors" in line
    assert message in line
    assert not list(client.home.rglob("model.safetensors"))
    hub.announced.clear()
    hub.damaged.clear()
    assert contents(client.download()[0])["model.safetensors"] == WEIGHTS
    assert ranges(hub)[-1] == ("", len(WEIGHTS))


def test_missing_repository_or_revision_is_reported(hub, client):
    hub.add("someone/else", SMALL)
    assert f"{REPO}@main: no such repository (404)" in client.fail(expect=65)
    assert "someone/else@v9: no such revision (404)" in client.fail("download", "someone/else", "v9", expect=65)


def test_private_repository_error_asks_for_a_token(hub, client):
    hub.add(REPO, SMALL | FORMATS)
    hub.token = TOKEN
    assert f"{REPO}@main: access refused (401)" in (line := client.fail(expect=65))
    assert "set HF_TOKEN" in line
    hub.statuses["/resolve/"] = iter([403])
    assert "access refused (403)" in client.fail(expect=65, HF_TOKEN=TOKEN)


def test_server_errors_are_retried_a_few_times(hub, client):
    hub.add(REPO, SMALL | FORMATS)
    hub.statuses["/revision/"] = itertools.repeat(500)
    assert "the server has a problem (500); rerun the same command" in client.fail(expect=69)
    assert [r.status for r in hub.requests] == [500] * 3
    hub.statuses = {"/resolve/.*safetensors": iter([503])}
    client.download()
    assert [r.status for r in hub.fetched("model.safetensors")] == [503, 200]


def test_refused_connection_fails_within_30_seconds(client):
    with socket.socket() as unused:  # bound, but it does not listen
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        start = time.monotonic()
        assert f"no good answer from {url} (ConnectError)" in client.fail(expect=69, HF_ENDPOINT=url)
    assert time.monotonic() - start < 30


def test_invalid_hub_answer_error_names_hf_endpoint(hub, client):
    hub.statuses["/revision/"] = iter([200])
    assert f"{hub.url}: it does not answer as a Hub does; check HF_ENDPOINT" in client.fail(expect=69)


def test_offline_uses_the_cache_without_a_connection(hub, client):
    commit = hub.add(REPO, SMALL | FORMATS)
    found = client.download()
    hub.requests.clear()
    for revision in ("", "main", commit):
        assert client.download(revision, HF_HUB_OFFLINE="1") == found
    assert hub.requests == []
    assert "unset it" in client.fail("download", REPO, "v9", expect=69, HF_HUB_OFFLINE="1")


def test_offline_mode_refuses_an_incomplete_download(hub, client):
    commit = hub.add(REPO, SMALL | FORMATS)
    assert f"{REPO}@main: not in " in client.fail(expect=69, HF_HUB_OFFLINE="1")
    hub.statuses["/resolve/.*safetensors"] = iter([404])
    client.fail(expect=65)
    assert list(client.home.rglob("merges.txt"))
    for revision in ("main", commit):
        assert "HF_HUB_OFFLINE" in client.fail("download", REPO, revision, expect=69, HF_HUB_OFFLINE="1")


def test_huggingface_hub_finds_the_download_in_its_cache(hub, client):
    hub.add(REPO, SMALL | FORMATS)
    directory, _ = client.download()
    code = f"import huggingface_hub as h; print(h.snapshot_download({REPO!r}, local_files_only=True))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=client.environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"{directory}\n"


def test_only_the_environment_token_is_sent_and_never_printed(hub, client):
    hub.add(REPO, SMALL | FORMATS)
    client.home.mkdir()
    (client.home / "token").write_text("hf_OnDisk")
    client.download()
    assert {r.headers.get("authorization") for r in hub.requests} == {None}
    hub.requests.clear()
    hub.add(REPO, SMALL | {"model.safetensors": WEIGHTS})
    hub.token = TOKEN
    hub.cuts["model.safetensors"] = iter([0])
    hub.damaged.add("model.safetensors")
    failed = client.call("download", REPO, expect=65, HF_TOKEN=TOKEN, HF_DEBUG="1")
    assert "Send: curl -X GET" in failed.stderr
    refused = client.call("download", REPO, expect=65, HF_TOKEN="hf_AnotherSecret")
    bad = client.call("download", REPO, expect=2, HF_TOKEN="hf_Another\nSecret é")
    assert {r.headers.get("authorization") for r in hub.requests} == {f"Bearer {TOKEN}", "Bearer hf_AnotherSecret"}
    for done in (failed, refused, bad):
        assert "Secret" not in done.stdout + done.stderr
        assert "HF_TOKEN" in done.stderr or done is failed


NAMES = [(name, "main", "repository") for name in ("a/b/c", "a b", "../x", "a--b/c", "")]
REVISIONS = [(REPO, name, "revision") for name in ("../../x", "/x", "a..b")]


@pytest.mark.parametrize(("repository", "revision", "named"), NAMES + REVISIONS)
def test_invalid_repository_or_revision_name_is_refused(repository, revision, named):
    with raises(ConfigError, f"{repository}@{revision}", match=named):
        download(repository, revision)


def test_unwritable_cache_is_named_in_the_error(client, hub, tmp_path):
    hub.add(REPO, SMALL | FORMATS)
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file" in client.fail(expect=73, HF_HOME=str(tmp_path / "file" / "hf"))


def test_missing_huggingface_hub_error_states_what_to_install(client, tmp_path):
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('not here')\n")
    path = os.pathsep.join([str(tmp_path), client.environment["PYTHONPATH"]])
    for call in (("download", REPO), ("upload", str(tmp_path), REPO)):
        assert "pip install 'gptjax[hub]'" in client.fail(*call, expect=69, PYTHONPATH=path)


@pytest.fixture
def exported(tmp_path: pathlib.Path) -> pathlib.Path:
    directory = tmp_path / "exported"
    files = SMALL | {"model.safetensors": random.Random(1).randbytes(2 << 20), "README.md": b"# x", ".git/x": b"no"}
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return directory


def test_an_upload_is_one_commit_of_all_files(hub, client, exported):
    hub.token = TOKEN
    done = client.call("upload", str(exported), REPO, HF_TOKEN=TOKEN)
    commit = hub.refs[REPO, "main"]
    assert json.loads(done.stdout) == f"{hub.url}/{REPO}/commit/{commit}"
    expected = {name: data for name, data in contents(exported).items() if name != ".git/x"}
    assert hub.snapshots[REPO, commit] == expected
    assert len([r for r in hub.requests if "/commit/" in r.path]) == 1
    assert "Secret" not in done.stdout + done.stderr
    (exported / "merges.txt").write_bytes(b"new")
    client.call("upload", str(exported), REPO, HF_TOKEN=TOKEN)
    assert hub.snapshots[REPO, hub.refs[REPO, "main"]] == expected | {"merges.txt": b"new"}


def test_an_upload_needs_a_token_and_files(hub, client, exported):
    client.home.mkdir()
    (client.home / "token").write_text("hf_OnDisk")
    assert "set HF_TOKEN" in client.fail("upload", str(exported), REPO, expect=2)
    none = str(exported / "none")
    assert "no such directory" in client.fail("upload", none, REPO, expect=2, HF_TOKEN=TOKEN)
    assert "HF_HUB_OFFLINE" in client.fail("upload", str(exported), REPO, expect=69, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
    assert hub.requests == []


def test_refused_upload_reports_the_reason_without_the_token(hub, client, exported):
    hub.token = "another"
    assert "access refused (401)" in client.fail("upload", str(exported), REPO, expect=65, HF_TOKEN=TOKEN)
    assert "not the name" in client.fail("upload", str(exported), "a/b/c", expect=2, HF_TOKEN=TOKEN)
    hub.token, hub.statuses["/commit/"] = "", iter([500, 400])
    assert "the server has a problem (500)" in client.fail("upload", str(exported), REPO, expect=69, HF_TOKEN=TOKEN)
    hub.reason = f"who is {TOKEN}?"
    line = client.fail("upload", str(exported), REPO, expect=65, HF_TOKEN=TOKEN)
    assert line.endswith("the server refuses the request (400): who is (HF_TOKEN)?")
