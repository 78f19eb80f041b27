"""hf:OWNER/NAME as a source: the files of one commit, downloaded, verified, and read as files of this machine are."""

import gzip
import io
import itertools
import json
import pathlib
import random
import subprocess
import sys
from collections.abc import Iterator

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants

from gptjax.config import DataConfig
from gptjax.data import hub_source, preparation
from gptjax.data.hub_source import choose, open_hub, parse_place
from gptjax.data.meta import read_meta
from gptjax.data.prepare import default_path, ensure_prepared, prepare
from gptjax.data.readers import Reading
from gptjax.data.sources import canonical_name, needs_network
from gptjax.data.tokenizer import load_tokenizer
from gptjax.errors import ConfigError, DataError, UnavailableError, UserError
from tests import runs
from tests.convert import hub_server
from tests.convert.hub_server import Hub
from tests.helpers import raises

BYTES = load_tokenizer("bytes")
NAME = "someone/corpus"
REPO = f"datasets/{NAME}"  # as the server here calls it
SOURCE = f"hf:{NAME}"
TEXTS = [f"document {number}: {'x' * (37 * number % 400)}" for number in range(60)]


def parquet(texts: list[str], group: int = 7) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), file, row_group_size=group)
    return file.getvalue()


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: text}) + "\n" for text in texts).encode()


FILES = {
    "README.md": b"# about",
    ".gitattributes": b"x",
    "data/train-00000-of-00002.parquet": parquet(TEXTS[:40]),
    "data/train-00001-of-00002.parquet": parquet(TEXTS[40:]),
}


@pytest.fixture
def hub(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        hub_server.use(server, monkeypatch, tmp_path / "cache")
        yield server
        constants.HF_HUB_OFFLINE = False


def documents(name: str = SOURCE, **options: object) -> list[tuple[str, str]]:
    return list(open_hub(name, Reading(**options)).documents())


def shards(source: str, out: pathlib.Path, lines: list[str] | None = None, **options: object) -> dict[str, bytes]:
    log = (lines if lines is not None else []).append
    prepare(source=source, tokenizer=BYTES, out=str(out), log=log, shard_tokens=2000, **options)
    return {file.name: file.read_bytes() for file in out.iterdir() if file.suffix == ".bin"}


def test_data_set_gives_the_shards_of_the_same_files_here(hub: Hub, tmp_path: pathlib.Path) -> None:
    commit = hub.add(REPO, FILES)
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"):
        (tmp_path / "here").mkdir(exist_ok=True)
        (tmp_path / "here" / name).write_bytes(FILES[f"data/{name}"])
    expected = shards(f"parquet:{tmp_path}/here", tmp_path / "expected")
    assert len(expected) > 2
    assert shards(f"{SOURCE}/data", tmp_path / "out") == expected
    meta, of_here = read_meta(str(tmp_path / "out")), read_meta(str(tmp_path / "expected"))
    assert meta is not None
    assert of_here is not None
    assert meta.source == f"{SOURCE}/data"
    assert meta.files == of_here.files | {"revision": commit}
    assert {r.path.split("/resolve/")[1] for r in hub.fetched()} == {f"{commit}/{name}" for name in list(FILES)[2:]}
    assert {r.path for r in hub.fetched()} <= {f"/{REPO}/resolve/{commit}/{name}" for name in FILES}
    names = [name for name, _ in documents(f"{SOURCE}/data")]
    assert names[:2] == ["train-00000-of-00002.parquet:0:0", "train-00000-of-00002.parquet:0:1"]
    assert names[-1] == "train-00001-of-00002.parquet:2:5"
    assert len(hub.fetched()) == 2, "each file once"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", jsonl(TEXTS)),
        ("a.json.gz", gzip.compress(jsonl(TEXTS))),
        ("a.csv", b"text\n" + "\n".join(TEXTS).encode()),
        ("a.parquet", parquet(TEXTS)),
    ],
)
def test_each_kind_of_file_is_read_by_its_suffix(hub: Hub, name: str, data: bytes) -> None:
    hub.add(REPO, {"README.md": b"x", name: data})
    assert [text for _, text in documents()] == TEXTS
    assert [text for _, text in documents(f"{SOURCE}/{name}")] == TEXTS, "one file"
    assert documents(f"{SOURCE}/{name}")[0][0].startswith(f"{name}:")


def test_folder_file_and_pages_of_a_long_list(hub: Hub) -> None:
    hub.add(REPO, {f"{folder}/{number}.txt": f"{folder}{number}".encode() for folder in "ab" for number in range(7)})
    hub.page = 3
    assert documents(f"{SOURCE}/b") == [(f"{number}.txt", f"b{number}") for number in range(7)]
    assert documents(f"{SOURCE}/b/4.txt") == [("4.txt", "b4")]
    assert [name for name, _ in documents()] == [f"{folder}/{number}.txt" for folder in "ab" for number in range(7)]
    assert sum("/tree/" in r.path for r in hub.requests) > 8


def test_parts_of_a_data_set_have_the_bytes_of_one_process(hub: Hub, tmp_path: pathlib.Path) -> None:
    hub.add(REPO, FILES)
    expected = shards(SOURCE, tmp_path / "expected", window=1)
    for part in ("1/2", "2/2"):
        options = {"source": SOURCE, "tokenizer": BYTES, "shard_tokens": 2000, "window": 1}
        prepare(**options, out=str(tmp_path / "out"), log=lambda line: None, part=part)
    assert shards(SOURCE, tmp_path / "out", window=1, part="join") == expected


def test_fields_are_named_and_bad_rows_skipped_as_for_files_here(hub: Hub) -> None:
    hub.add(REPO, {"a.jsonl": jsonl(["one"], "body") + jsonl(["two"])})
    assert documents(text_feature="body", skip_bad=True) == [("a.jsonl:1", "one")]
    with pytest.raises(DataError, match=r"a\.jsonl:1: has no field 'text'"):
        documents()


@pytest.mark.parametrize(
    ("names", "folder", "chosen", "left_out"),
    [
        (["a.parquet", "README.md"], "", ["a.parquet"], ""),
        (["b.jsonl.zst", "a.jsonl"], "", ["a.jsonl", "b.jsonl.zst"], ""),
        (
            ["a.parquet", "b.jsonl", "c.jsonl", "LICENSE.txt"],
            "",
            ["a.parquet"],
            "leaving out 2 .jsonl files and 1 .txt",
        ),
        (["a.jsonl", "dataset_infos.json", ".x.jsonl", ".y/a.jsonl"], "", ["a.jsonl"], ""),
        (["train-0.parquet", "test-0.parquet", "validation-0.parquet"], "", ["train-0.parquet"], "2 files of other sp"),
        (["c/train/0.parquet", "c/test/0.parquet"], "c", ["c/train/0.parquet"], "1 files of other splits"),
        (["c/test/0.parquet"], "c/test", ["c/test/0.parquet"], ""),
        (["train/a.parquet", "train/test.parquet"], "", ["train/a.parquet"], "1 files of other splits"),
        (
            ["train.parquet", "train_eval.parquet", "evaluation.parquet"],
            "",
            ["train.parquet"],
            "2 files of other splits",
        ),
        (["latest/0.parquet", "retrain.parquet"], "", ["latest/0.parquet", "retrain.parquet"], "the top, latest"),
        (["en/0.parquet", "de/0.parquet"], "", ["de/0.parquet", "en/0.parquet"], "of 2 folders (de, en)"),
        (["README.md", "a.parquet.gz", "x.py"], "", [], ""),
    ],
)
def test_files_are_chosen_by_suffix_and_split(names: list[str], folder: str, chosen: list[str], left_out: str) -> None:
    for order in itertools.islice(itertools.permutations(names), 6):
        choice = choose(order, folder)
        assert choice.names == chosen
        assert left_out in choice.left_out
        assert bool(choice.left_out) == bool(left_out)
        assert not left_out or choice.left_out.endswith("name a folder or a file to choose others: " + hub_source.FORM)


def test_choice_among_several_kinds_is_reported(hub: Hub, tmp_path: pathlib.Path) -> None:
    hub.add(REPO, {"a.parquet": parquet(TEXTS), "b.jsonl": jsonl(TEXTS)})
    lines: list[str] = []
    shards(SOURCE, tmp_path / "out", lines)
    assert lines[0].startswith(f"{SOURCE}: reading 1 .parquet files, leaving out 1 .jsonl files; name a folder")


# Names


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("hf:a/b", ("a/b", "", "")),
        ("hf:a/b.c-d/x/y@v1", ("a/b.c-d", "x/y", "v1")),
        ("hf:a/b/x/@refs/convert/parquet", ("a/b", "x", "refs/convert/parquet")),
        ("hf:a/b/x y.jsonl", ("a/b", "x y.jsonl", "")),
    ],
)
def test_names_of_data_sets(name: str, place: tuple[str, str, str]) -> None:
    assert parse_place(name) == place
    assert canonical_name(name) == str(parse_place(name)) == name.replace("/@", "@")
    assert needs_network(name)


@pytest.mark.parametrize(
    "name", ["hf:", "hf:a", "hf:/a/b", "hf:a/b/../c", "hf:a/b//c", "hf:a/b@", "hf:./a/b", "hf:a/b\n"]
)
def test_other_names_are_refused(name: str) -> None:
    with raises(ConfigError, "data.source", value=name, remedy="hf:OWNER/NAME[/FOLDER][@REVISION]"):
        canonical_name(name)


def test_name_of_a_directory_here_reaches_no_server(
    hub: Hub, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with raises(ConfigError, "data.source", value=SOURCE, remedy=f"parquet:{NAME}"):
        documents()
    assert not hub.requests


def test_default_path_has_folder_and_revision() -> None:
    assert default_path(f"{SOURCE}/en@v1", "gpt2") == "data/hf-someone-corpus-en-v1-gpt2"


# Training and staleness


def test_training_downloads_nothing_and_names_the_command(hub: Hub, tmp_path: pathlib.Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = DataConfig(source=f"{SOURCE}@v1", tokenizer="bytes")
    command = f"run: python -m gptjax.data.prepare --source={SOURCE}@v1 --tokenizer=bytes --out="
    with raises(ConfigError, "data/hf-someone-corpus-v1-bytes", remedy=command, match="training downloads nothing"):
        ensure_prepared(config)
    hub.add(REPO, FILES, ref="v1")
    shards(f"{SOURCE}@v1", tmp_path / "data/hf-someone-corpus-v1-bytes")
    requests = len(hub.requests)
    assert ensure_prepared(config) == "data/hf-someone-corpus-v1-bytes"
    assert len(hub.requests) == requests
    with raises(ConfigError, "data/hf-someone-corpus-v1-bytes", match="with val_fraction=0.05"):
        ensure_prepared(DataConfig(source=f"{SOURCE}@v1", tokenizer="bytes", val_fraction=0.1))


def test_another_revision_is_stale(hub: Hub, tmp_path: pathlib.Path) -> None:
    old = hub.add(REPO, FILES)
    first = shards(SOURCE, tmp_path / "out")
    assert shards(SOURCE, tmp_path / "out") == first
    new = hub.add(REPO, {"a.jsonl": jsonl(TEXTS)})
    with raises(ConfigError, str(tmp_path / "out"), match=f"from revision {old}, and it is {new} now"):
        shards(SOURCE, tmp_path / "out")
    with raises(ConfigError, str(tmp_path / "out"), match=f"already prepared from source {SOURCE} and"):
        shards(f"{SOURCE}@{new}", tmp_path / "out")
    constants.HF_HUB_OFFLINE = True
    assert shards(SOURCE, tmp_path / "out") == first, "nothing can be compared"
    constants.HF_HUB_OFFLINE = False
    hub.snapshots.clear()
    assert shards(SOURCE, tmp_path / "out") == first, "the repository has gone"


def test_interrupted_preparation_starts_over_with_another_revision(
    hub: Hub, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "BATCH_BYTES", 1000)
    texts = [f"{text} old" for text in TEXTS]
    hub.add(REPO, {"a.jsonl": jsonl([*texts, "bad\ud800"])})
    with pytest.raises(DataError, match="no valid Unicode"):
        shards(SOURCE, tmp_path / "out")
    assert (tmp_path / "out.partial").is_dir()
    hub.add(REPO, {"a.jsonl": jsonl(TEXTS)})
    lines: list[str] = []
    found = shards(SOURCE, tmp_path / "out", lines)
    assert "its files have changed: starting over" in "".join(lines)
    assert found == shards(SOURCE, tmp_path / "at once")


def test_branch_with_slashes_is_asked_for_and_kept(hub: Hub, tmp_path: pathlib.Path) -> None:
    commit = hub.add(REPO, {"default/train/0000.parquet": parquet(TEXTS)}, ref="refs/convert/parquet")
    name = f"{SOURCE}/default@refs/convert/parquet"
    shards(name, tmp_path / "out")
    meta = read_meta(str(tmp_path / "out"))
    assert meta is not None
    assert (meta.source, meta.files["revision"]) == (name, commit)
    constants.HF_HUB_OFFLINE = True
    assert [text for _, text in documents(name)] == TEXTS


def test_pinned_commit_needs_no_question_for_it(hub: Hub) -> None:
    commit = hub.add(REPO, FILES)
    hub.add(REPO, {"a.jsonl": jsonl(TEXTS)})
    assert len(documents(f"{SOURCE}@{commit}")) == len(TEXTS)
    assert not [r for r in hub.requests if "/revision/" in r.path]


# Faults


def test_damaged_file_is_refused_and_downloaded_again(hub: Hub) -> None:
    hub.add(REPO, {"a.jsonl": jsonl(TEXTS) + random.Random(0).randbytes(hub_server.LARGE)})
    hub.damaged.add("a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl is damaged: its SHA-256 differs"):
        documents()
    hub.damaged.clear()
    assert open_hub(SOURCE, Reading()).files[0][1] > hub_server.LARGE


def test_wrong_size_and_unsafe_names_are_refused(hub: Hub, tmp_path: pathlib.Path) -> None:
    hub.add(REPO, {"a.jsonl": jsonl(TEXTS)})
    hub.announced["a.jsonl"] = 10_000_000
    with pytest.raises(DataError, match=r"not the 10000000 announced"):
        documents()
    hub.add(REPO, {"/a.jsonl": jsonl(TEXTS)})
    with raises(DataError, f"{NAME}@main", match="does not report size and hash"):
        documents()
    assert not list(tmp_path.glob("*.jsonl"))


def test_missing_repository_folder_file_or_data(hub: Hub) -> None:
    with raises(DataError, f"{NAME}@main", match=r"no such repository \(404\)"):
        documents()
    commit = hub.add(REPO, {"README.md": b"x", "scripts/load.py": b"x"})
    with raises(DataError, f"{NAME}@v9", match=r"no such revision \(404\)"):
        documents(f"{SOURCE}@v9")
    with raises(DataError, f"{NAME}@{commit}", match="no file or folder 'en'", remedy="it has: README.md, scripts"):
        documents(f"{SOURCE}/en")
    with raises(DataError, f"{NAME}@{commit}", match=r"no file or folder 'en/a\.jsonl'", remedy="it has: README.md"):
        documents(f"{SOURCE}/en/a.jsonl")
    with raises(DataError, f"{NAME}@main", match="no data that can be read", remedy="@refs/convert/parquet"):
        documents()


def test_gated_or_private_data_set_asks_for_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, FILES)
    hub.statuses["/resolve/"] = itertools.repeat(403)
    hub.code = "GatedRepo"
    with pytest.raises(
        DataError, match=r"access refused \(403\): its owner asks for consent .*; accept them"
    ) as caught:
        documents()
    assert "HF_TOKEN" in caught.value.remedy
    hub.statuses.clear()
    hub.token = "hf_secret"
    with raises(DataError, f"{NAME}@main", match=r"access refused \(401\)", remedy="set HF_TOKEN"):
        documents()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert len(documents()) == len(TEXTS)


def test_no_network_is_69(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.statuses["/api/"] = itertools.repeat(503)
    with raises(UnavailableError, f"{NAME}@main", match="the server has a problem"):
        documents()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with raises(UnavailableError, f"{NAME}@main", match=r"no good answer from http://127\.0\.0\.1:9"):
        documents()


def test_offline_the_cache_is_used_only_if_it_is_complete(hub: Hub, tmp_path: pathlib.Path, said: list[str]) -> None:
    hub.add(REPO, FILES)
    constants.HF_HUB_OFFLINE = True
    with raises(UnavailableError, f"{NAME}@main", match="not in .* HF_HUB_OFFLINE is set"):
        documents()
    constants.HF_HUB_OFFLINE = False
    hub.damaged.add("data/train-00001-of-00002.parquet")
    with pytest.raises(UserError):
        documents()
    hub.damaged.clear()
    commit = hub.refs[REPO, "main"]
    constants.HF_HUB_OFFLINE = True
    with raises(UnavailableError, f"{NAME}@{commit}", match="1 of its 2 files are not in"):
        documents(f"{SOURCE}@{commit}")
    constants.HF_HUB_OFFLINE = False
    expected = documents()
    requests = len(hub.requests)
    constants.HF_HUB_OFFLINE = True
    assert documents() == expected
    assert documents(f"{SOURCE}@{commit}") == expected
    assert "as they are" not in "".join(said)
    # Another program has filled the cache, and has left no list of the files.
    assert documents(f"{SOURCE}/data") == [(name.removeprefix("data/"), text) for name, text in expected]
    assert "2 files as they are in" in said[-1]
    assert len(hub.requests) == requests


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with raises(UnavailableError, match="huggingface_hub is not installed", remedy="gptjax[hub]"):
        documents()


@pytest.mark.faults
def test_killed_download_resumes_and_gives_the_same_bytes(hub: Hub, tmp_path: pathlib.Path) -> None:
    noise = random.Random(0)
    texts = [noise.randbytes(40_000).hex() for _ in range(60)]
    data = parquet(texts)
    cut = len(data) // 2
    hub.add(REPO, {"a.parquet": data})
    hub.stalls["a.parquet"] = cut
    environment = runs.Lab(tmp_path).environment(
        HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"), NO_PROXY="127.0.0.1", TRANSFORMERS_OFFLINE=""
    )
    command = [sys.executable, "-m", "gptjax.data.prepare", f"--source={SOURCE}", "--tokenizer=bytes", "--out=out"]
    options = {"env": environment, "cwd": tmp_path}
    partial = lambda: sum(p.stat().st_size for p in (tmp_path / "hf").rglob("*.gptjax"))  # noqa: E731
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, **options) as process:
        runs.wait_for(lambda: partial() >= cut, process, seconds=60)
        runs.kill(process)
    hub.stalls.clear()
    hub.released.set()
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL, **options)
    assert [r.headers.get("range", "") for r in hub.fetched()] == ["", f"bytes={cut}-"]
    (tmp_path / "a.parquet").write_bytes(data)
    prepare(source=f"parquet:{tmp_path}/a.parquet", tokenizer=BYTES, out=str(tmp_path / "here"), log=lambda _: None)
    for path in (tmp_path / "here").glob("*.bin"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
