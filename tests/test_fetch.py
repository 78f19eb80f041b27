"""gptjax fetch: ready shards of the Hub, verified, resumed after a kill, and trained on at once."""

import dataclasses
import io
import itertools
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator

import numpy as np
import pytest
from huggingface_hub import constants

from gptjax import disk_space, fetch
from gptjax.data import hub_shards
from gptjax.data.header import make_header
from gptjax.data.meta import read_meta
from gptjax.data.tokenizer import load_tokenizer
from gptjax.data.tokens import open_split, verify
from gptjax.errors import ConfigError, DataError, UnavailableError, UserError, WorkdirError
from tests import runs
from tests.convert import hub_server
from tests.convert.hub_server import Hub
from tests.helpers import raises

NAME = "someone/fineweb"
REPO = f"datasets/{NAME}"
SOURCE = f"hf:{NAME}"
GPT2 = load_tokenizer("gpt2")
EOT = GPT2.eot_id
UINT16 = np.dtype("<u2")


def make_ids(number: int, count: int = 3000) -> np.ndarray:
    """Returns ids of documents that begin with end-of-text, as llm.c writes them."""
    text = GPT2.encode("A small café in the town. " * 9)
    ids = np.resize(np.array([EOT, number, *text], UINT16), count)
    ids[0] = EOT
    return ids


def shard(ids: np.ndarray) -> bytes:
    return make_header(len(ids), ids.dtype) + ids.tobytes()


def numpy_shard(ids: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, ids)
    return file.getvalue()


SHARDS = {f"fineweb_train_{number:06d}.bin": shard(make_ids(number)) for number in range(1, 6)}
VALIDATION = {"fineweb_val_000000.bin": shard(make_ids(9, 2000))}
OTHERS = {"README.md": b"x", ".gitattributes": b"x", "gpt2_tokenizer.bin": b"x"}
FILES = OTHERS | SHARDS | VALIDATION


@pytest.fixture
def hub(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        hub_server.use(server, monkeypatch, tmp_path / "cache")
        server.add(REPO, FILES)
        yield server


@pytest.fixture
def out(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "data" / "fineweb"


def bring(out: pathlib.Path, source: str = SOURCE, **options: object) -> list[str]:
    lines: list[str] = []
    fetch.fetch(source, str(out), tokenizer=GPT2, log=lines.append, **options)
    return lines


def shards_in(out: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir() if file.suffix in (".bin", ".npy")}


def names(hub: Hub) -> list[str]:
    return [request.path.split("/")[-1] for request in hub.fetched()]


def first(count: int) -> dict[str, bytes]:
    return VALIDATION | dict(itertools.islice(SHARDS.items(), count))


def test_validation_comes_first_and_then_as_many_training_shards_as_needed(hub: Hub, out: pathlib.Path) -> None:
    lines = bring(out, tokens=6001)
    assert shards_in(out) == first(3)
    assert names(hub) == list(first(3))
    commit = hub.refs[REPO, "main"]
    assert lines[0] == f"{SOURCE}: 4 shards of revision {commit}, 26.1 kB to download"
    assert lines[-2] == f"{out}: 9,000 tokens to train on, 2,000 to validate, gpt2 ids"
    assert lines[-1] == f"use it: gptjax train gpt2_small --config.data.path={out}"
    assert not out.with_name("fineweb.partial").exists()
    verify(str(out))
    train = open_split(str(out), "train", tokenizer=GPT2)
    assert (train.tokens, train.eot.position) == (9000, "first")
    ids = np.concatenate([make_ids(number) for number in range(1, 4)])
    assert train.bytes == len(GPT2.decode_bytes(ids[ids != EOT]))
    meta = read_meta(str(out))
    assert meta is not None
    assert meta.splits["train"].documents == (ids == EOT).sum()
    assert meta.source == SOURCE
    assert meta.files["revision"] == commit
    assert (meta.files["number"], meta.options) == (4, {"train_shards": 5})


def test_complete_data_is_reported_without_a_connection(hub: Hub, out: pathlib.Path) -> None:
    bring(out, tokens=6000)
    before = len(hub.requests)
    assert bring(out, tokens=6000) == bring(out, tokens=3000) == [f"{out}: already complete"]
    bring(out)
    assert shards_in(out) == SHARDS | VALIDATION
    requests = len(hub.requests)
    assert requests > before
    assert bring(out) == bring(out, tokens=1e12) == [f"{out}: already complete"]
    assert len(hub.requests) == requests


def test_more_tokens_add_shards_of_the_same_revision(hub: Hub, out: pathlib.Path, tmp_path: pathlib.Path) -> None:
    old = hub.refs[REPO, "main"]
    bring(out, tokens=1)
    hub.add(REPO, OTHERS | VALIDATION | {name: shard(make_ids(77)) for name in SHARDS})
    before = len(hub.fetched())
    lines = bring(out, tokens=15_000)
    assert lines[0] == f"{out}: adding shards of the same revision, {old}"
    assert shards_in(out) == first(5)
    assert names(hub)[before:] == list(SHARDS)[1:]
    at_once = tmp_path / "at once"
    bring(at_once, f"{SOURCE}@{old}", tokens=15_000)
    grown, whole = read_meta(str(out)), read_meta(str(at_once))
    assert grown is not None
    assert grown == dataclasses.replace(whole, source=SOURCE)
    assert bring(out, tokens=1e9) == [f"{out}: already complete"]


def test_fewer_tokens_than_wanted_are_reported(hub: Hub, out: pathlib.Path) -> None:
    assert f"{SOURCE} has no more training shards" in bring(out, tokens=1e9)
    assert shards_in(out) == SHARDS | VALIDATION


def test_numpy_shards_of_a_folder_and_uint32_are_counted_by_their_headers(hub: Hub, out: pathlib.Path) -> None:
    ids = [make_ids(number).astype(dtype) for number, dtype in enumerate(["<u2", "<u4", "<u4"])]
    files = {f"edu/edufineweb_train_{number}.npy": numpy_shard(of) for number, of in enumerate(ids)}
    hub.add(REPO, {**files, "edu/edufineweb_val_0.npy": numpy_shard(ids[1])})
    bring(out, tokens=5000)
    assert {file.name for file in out.glob("*.npy")} == {
        "edufineweb_train_0.npy",
        "edufineweb_train_1.npy",
        "edufineweb_train_2.npy",
        "edufineweb_val_0.npy",
    }
    assert open_split(str(out), "train", tokenizer=GPT2).tokens == 9000


@pytest.mark.parametrize("tokens", ["0", "-1", "nan"])
def test_impossible_number_of_tokens_is_refused(out: pathlib.Path, tokens: str) -> None:
    with pytest.raises(ConfigError, match=r"--tokens=\S+: must be at least 1"):
        fetch.main([SOURCE, f"--out={out}", f"--tokens={tokens}"])


def test_other_things_at_the_output_are_refused(hub: Hub, out: pathlib.Path) -> None:
    out.mkdir(parents=True)
    (out / "file").write_text("x")
    with raises(ConfigError, str(out), match="was not fetched from", remedy="choose another --out"):
        bring(out)
    shutil.rmtree(out)
    bring(out, tokens=1)
    with raises(ConfigError, str(out), match=f"was not fetched from {SOURCE}@main"):
        bring(out, f"{SOURCE}@main")
    with raises(ConfigError, str(out), match="for the tokenizer gpt2", remedy="--tokenizer=gpt2"):
        fetch.fetch(SOURCE, str(out), tokenizer=load_tokenizer("bytes"))


def test_repository_without_shards_is_refused_and_leaves_nothing(hub: Hub, out: pathlib.Path) -> None:
    for files in ({"a.parquet": b"x"}, VALIDATION, SHARDS):
        hub.add(REPO, files)
        with raises(DataError, f"{NAME}@main", match="no token shards: it needs .bin or .npy files with train and val"):
            bring(out)
    hub.add(REPO, {f"{folder}/{name}": data for folder in ("a", "b") for name, data in FILES.items()})
    with raises(ConfigError, "source", value=SOURCE, match="in 2 folders: a, b", remedy="name one"):
        bring(out)
    with raises(ConfigError, "source", value="hf:x", remedy="write hf:OWNER/NAME"):
        bring(out, "hf:x")
    assert not out.parent.exists()
    bring(out, f"{SOURCE}/b", tokens=1)
    assert shards_in(out) == first(1)


def test_faults_of_the_hub_have_their_codes_and_leave_nothing(hub: Hub, out: pathlib.Path, monkeypatch) -> None:
    with raises(DataError, "someone/none@main", match=r"no such repository \(404\)"):
        bring(out, "hf:someone/none")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with raises(UnavailableError, f"{NAME}@main", match="HF_HUB_OFFLINE is set"):
        bring(out)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.token = "hf_x"
    with raises(DataError, f"{NAME}@main", match=r"access refused \(401\)", remedy="HF_TOKEN"):
        bring(out)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with raises(UnavailableError, f"{NAME}@main", match="no good answer from"):
        bring(out)
    assert not out.parent.exists()


def test_too_little_space_is_reported_before_anything_is_downloaded(hub: Hub, out: pathlib.Path, monkeypatch) -> None:
    free = types.SimpleNamespace(free=20_000)
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _: free)
    with raises(WorkdirError, f"{out}.partial", match=r"40\.1 kB are still to download, and 20 kB are free"):
        bring(out)
    assert not hub.fetched()
    bring(out, tokens=1)
    assert shards_in(out) == first(1)


def test_damaged_shard_is_refused_and_downloaded_again(hub: Hub, out: pathlib.Path, monkeypatch) -> None:
    monkeypatch.setattr(hub_server, "LARGE", 1)  # so that all have a SHA-256
    name = "fineweb_train_000002.bin"
    hub.damaged.add(name)
    with pytest.raises(DataError, match=f"{name} is damaged: its SHA-256 differs"):
        bring(out)
    assert not out.exists()
    hub.damaged.clear()
    before = len(hub.fetched())
    bring(out)
    assert names(hub)[before:] == list(SHARDS)[1:], "the first two were complete"
    assert shards_in(out) == SHARDS | VALIDATION


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (shard(make_ids(1))[:-2], "but the header counts 3000 tokens"),
        (shard(np.full(3000, 60_000, UINT16)), "token 0 is id 60000, but the tokenizer has 50257 ids"),
        (shard(np.append(make_ids(1), UINT16.type(50_257))), "token 3000 is id 50257"),
        (shard(np.where(np.arange(200_000) == 90_000, 60_000, 5).astype(UINT16)), "token 90000 is id 60000"),
    ],
)
def test_shard_that_does_not_fit_its_header_or_tokenizer_is_refused(
    hub: Hub, out: pathlib.Path, data: bytes, problem: str
) -> None:
    hub.add(REPO, FILES | {"fineweb_train_000001.bin": data})
    with pytest.raises(DataError, match=problem):
        bring(out)
    assert not out.exists()


def test_ids_far_below_the_vocabulary_are_reported(hub: Hub, out: pathlib.Path, said: list[str]) -> None:
    hub.add(REPO, FILES | {"fineweb_train_000001.bin": shard(np.arange(20_000, dtype=UINT16) % 256)})
    bring(out, tokens=1)
    assert "is data.tokenizer the one that made them?" in said[-1]


def test_unfinished_fetch_of_another_repository_is_not_continued(hub: Hub, out: pathlib.Path) -> None:
    hub.damaged.add("fineweb_train_000002.bin")
    with pytest.raises(DataError, match="damaged"):
        bring(out)
    hub.damaged.clear()
    hub.add("datasets/other/one", VALIDATION | {"train_000001.bin": shard(make_ids(3))})
    lines = bring(out, "hf:other/one")
    assert lines[0] == f"{out}.partial is of {SOURCE}: starting over"
    assert set(shards_in(out)) == {"fineweb_val_000000.bin", "train_000001.bin"}


def test_interrupted_fetch_keeps_its_revision(hub: Hub, out: pathlib.Path) -> None:
    hub.damaged.add("fineweb_train_000003.bin")
    with pytest.raises(DataError, match="damaged"):
        bring(out)
    hub.damaged.clear()
    old = hub.refs[REPO, "main"]
    hub.add(REPO, OTHERS | VALIDATION | {name: shard(make_ids(77)) for name in SHARDS})
    assert bring(out)[0] == f"continuing after 3 shards of revision {old}"
    assert shards_in(out) == SHARDS | VALIDATION


STOPS = ["write_state", "examine", "_publish", "write_meta", "sync_path", "remove"]


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("name", STOPS)
def test_fetch_stopped_at_any_step_ends_the_same(
    hub: Hub, out: pathlib.Path, monkeypatch, name: str, grows: bool
) -> None:
    """Each call of the step is stopped once before it and once after it."""
    real = getattr(fetch, name)
    if grows:
        bring(out, tokens=1)
    for stop in itertools.count():
        calls = itertools.count()

        def stopping(*arguments: object, calls=calls, stop=stop, **options: object) -> object:
            number = next(calls)
            if 2 * number == stop:
                raise KeyboardInterrupt
            result = real(*arguments, **options)
            if 2 * number + 1 == stop:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(fetch, name, stopping)
        try:
            bring(out, tokens=6001)
        except KeyboardInterrupt:
            if out.exists():
                verify(str(out))  # complete at any moment
            continue
        break
    monkeypatch.setattr(fetch, name, real)
    bring(out, tokens=6001)
    assert stop > 1, "it was stopped"
    assert shards_in(out) == first(3)
    assert len(names(hub)) == len(set(names(hub))), "each file once"
    verify(str(out))
    assert not out.with_name("fineweb.partial").exists()


def test_state_of_another_version_is_not_used(hub: Hub, out: pathlib.Path) -> None:
    partial = out.with_name("fineweb.partial")
    for content in ("{", "[]", '{"source": "x", "more": 1}', json.dumps({"source": SOURCE, "shards": {"a": 3}})):
        (partial / "shards").mkdir(parents=True, exist_ok=True)
        (partial / hub_shards.STATE_FILE).write_text(content)
        (partial / "shards/fineweb_train_000001.bin").write_bytes(b"old")
        bring(out)
        assert shards_in(out) == SHARDS | VALIDATION
        shutil.rmtree(out)


@pytest.mark.faults
@pytest.mark.long
def test_killed_fetch_resumes_and_a_run_trains_on_what_it_brought(
    hub: Hub, lab: runs.Lab, tmp_path: pathlib.Path
) -> None:
    noise = random.Random(0)
    ids = np.array([EOT, *(noise.randrange(50_257) for _ in range(400_000))], UINT16)
    large = shard(ids)
    cut = len(large) // 2
    hub.add(REPO, FILES | {"fineweb_train_000001.bin": large})
    hub.stalls["fineweb_train_000001.bin"] = cut
    out = tmp_path / "fineweb"
    environment = lab.environment(
        HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"), NO_PROXY="127.0.0.1", TRANSFORMERS_OFFLINE=""
    )
    command = [sys.executable, "-m", "gptjax", "fetch", SOURCE, "--out=fineweb", "--tokens=4e5"]

    def received() -> int:
        return sum(path.stat().st_size for path in tmp_path.glob("fineweb.partial/shards/*.gptjax"))

    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        runs.wait_for(lambda: received() >= cut, process, seconds=60)
        runs.kill(process)
    assert not out.exists()
    hub.stalls.clear()
    hub.released.set()
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "400,001 tokens to train on, 2,000 to validate" in done.stdout
    assert [r.headers.get("range", "") for r in hub.fetched("fineweb_train_000001.bin")] == ["", f"bytes={cut}-"]
    assert len(hub.fetched("fineweb_val_000000.bin")) == 1
    assert shards_in(out) == VALIDATION | {"fineweb_train_000001.bin": large}
    overrides = ["data.tokenizer=gpt2", "model.vocab_size=50257", f"data.path={out}", "train.num_steps=2"]
    trained = lab.train(
        tmp_path / "run", *overrides, "train.eval_every=2", "train.eval_batches=1", "data.document_mask=true"
    )
    assert "step 2/2" in trained.stdout
    assert "bits per byte" in trained.stdout


def test_command_reports_a_missing_flag_or_package(monkeypatch: pytest.MonkeyPatch, out: pathlib.Path) -> None:
    with raises(ConfigError, match="--out"):
        fetch.main([SOURCE])
    with raises(ConfigError, "--tokens", value="many", match="expected a number"):
        fetch.main([SOURCE, f"--out={out}", "--tokens=many"])
    with raises(ConfigError, "--out", value="gs://bucket/x", match="a directory of this machine"):
        fetch.main([SOURCE, "--out=gs://bucket/x"])
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with raises(UnavailableError, match="huggingface_hub is not installed", remedy="gptjax[hub]"):
        fetch.main([SOURCE, f"--out={out}"])
    assert not out.parent.exists()


def test_unwritable_output_is_73(hub: Hub, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError) as caught:
        bring(tmp_path / "file" / "out")
    assert caught.value.exit_code == 73
    assert os.listdir(tmp_path) == ["file"]
