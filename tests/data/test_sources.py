"""Sources yield the same documents in the same order at every call, from this machine only."""

import json
import socket
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from huggingface_hub import constants

from gptjax.data import tfds_source
from gptjax.data.readers import Reading
from gptjax.data.source import Source
from gptjax.data.sources import canonical_name, needs_network, open_source
from gptjax.errors import ConfigError, DataError, UnavailableError
from tests.data import corpus
from tests.helpers import failing, raises

BODY = Reading(text_feature="body")


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Path]:
    work_dir = tmp_path_factory.mktemp("stdlib")
    return open_source("stdlib", work_dir=str(work_dir)), work_dir


def write_tree(root: Path) -> Path:
    contents = {"b.txt": "bee\n", "a/z.txt": "zed", "a/b.txt": "", "a.txt": "é \r\n x", ".hidden": "no", ".git/x": "no"}
    for name, text in contents.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(text.encode())
    return root


def test_text_source_yields_files_in_sorted_order(tmp_path):
    source = open_source(f"text:{write_tree(tmp_path)}", work_dir="")
    expected = [("a/b.txt", ""), ("a/z.txt", "zed"), ("a.txt", "é \r\n x"), ("b.txt", "bee\n")]
    assert sorted(expected) == sorted(source.documents())
    assert list(source.documents()) == list(source.documents())
    assert [name for name, _ in source.documents()] == ["a.txt", "a/b.txt", "a/z.txt", "b.txt"]
    assert (source.total_documents, source.total_bytes) == (4, 14)


def test_text_source_replaces_invalid_utf8(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"a\xffb")
    assert list(open_source(f"text:{tmp_path}/x.txt", work_dir="").documents()) == [("x.txt", "a\ufffdb")]


def test_lines_source_yields_each_line_as_a_document(tmp_path):
    (tmp_path / "x.txt").write_bytes("one\r\n\ntwo \u2028 é\nthree".encode())
    (tmp_path / "y.txt").write_bytes(b"four\n")
    source = open_source(f"lines:{tmp_path}", work_dir="")
    texts = {"x.txt:1": "one", "x.txt:2": "", "x.txt:3": "two \u2028 é", "x.txt:4": "three", "y.txt:1": "four"}
    assert list(source.documents()) == list(texts.items())
    assert (source.total_documents, source.total_bytes) == (0, 27)


def test_stdlib_is_the_source_of_this_python(stdlib):
    documents = list(stdlib[0].documents())
    names = [name for name, _ in documents]
    assert names == sorted(names)
    assert len(set(names)) == len(names) == stdlib[0].total_documents
    assert 400 < len(names) < 1500
    assert 8e6 < sum(len(text) for _, text in documents) < 20e6
    root = Path(sysconfig.get_path("stdlib"))
    for name in ("json/decoder.py", "os.py", "asyncio/tasks.py"):
        assert documents[names.index(name)][1] == (root / name).read_bytes().decode()


def test_stdlib_leaves_out_tests_and_packages(stdlib):
    parts = {part for name, _ in stdlib[0].documents() for part in Path(name).parts[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert {"json", "asyncio", "idlelib"} <= parts


def test_stdlib_is_array_record_and_is_prepared_once(stdlib, monkeypatch):
    source, work_dir = stdlib
    assert list(work_dir.rglob("*.array_record*"))
    monkeypatch.setattr(tfds_source, "_read_stdlib", lambda: pytest.fail("prepared again"))
    again = open_source("stdlib", work_dir=str(work_dir))
    assert list(again.documents()) == list(source.documents())
    assert "tensorflow" not in sys.modules


@pytest.fixture
def toy_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = tfds.features.FeaturesDict({"body": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager: object) -> dict:
            return {"test": self._generate_examples("unseen"), "train": self._generate_examples("text é")}

        def _generate_examples(self, text: str) -> object:
            yield from ((i, {"body": f"{text} {i}"}) for i in range(3))

    monkeypatch.setattr(tfds, "builder", lambda name, file_format: Toy(data_dir=tmp_path, file_format=file_format))
    return Toy


def test_tfds_reads_the_training_split(toy_data_set):
    source = open_source("tfds:toy", reading=BODY, work_dir="")
    assert list(source.documents()) == [(f"train/{i}", f"text é {i}") for i in range(3)]
    assert source.total_documents == 3
    with raises(ConfigError, "data.text_feature", value="text", match="has body"):
        open_source("tfds:toy", work_dir="")


def test_failed_tfds_download_is_reported(toy_data_set, monkeypatch):
    monkeypatch.setattr(toy_data_set, "_split_generators", failing(ConnectionError("no route\nto host")))
    with raises(UnavailableError, "data.source", value="tfds:toy", remedy="rerun", match=r"Error: no route\)"):
        open_source("tfds:toy", reading=BODY, work_dir="")


@pytest.fixture
def closed_url() -> str:
    """The address of a server that refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}/data"


def test_tfds_without_a_network_ends_at_once(toy_data_set, monkeypatch, closed_url):
    monkeypatch.setattr(toy_data_set, "url_infos", {closed_url: None})
    monkeypatch.setattr(toy_data_set, "_split_generators", lambda *_: pytest.fail("begun"))
    with raises(UnavailableError, "data.source", value="tfds:toy", remedy="tfds:/DIR", match="does not answer"):
        open_source("tfds:toy", reading=BODY, work_dir="")


def test_tfds_data_on_disk_need_no_network(toy_data_set, monkeypatch, closed_url):
    open_source("tfds:toy", reading=BODY, work_dir="")
    monkeypatch.setattr(toy_data_set, "url_infos", {closed_url: None})
    assert open_source("tfds:toy", reading=BODY, work_dir="").total_documents == 3


def test_tfds_goes_on_from_earlier_downloads_without_a_network(toy_data_set, monkeypatch, closed_url, tmp_path):
    monkeypatch.setattr(toy_data_set, "url_infos", {closed_url: None})
    downloads = tmp_path / "downloads" / "toy"
    (downloads / "archive.gz.tmp.1").mkdir(parents=True)
    with raises(UnavailableError, "data.source", value="tfds:toy"):
        open_source("tfds:toy", reading=BODY, work_dir="")
    (downloads / "archive.gz").touch()
    assert open_source("tfds:toy", reading=BODY, work_dir="").total_documents == 3


def test_tfds_retries_a_failing_server_for_seconds_only(toy_data_set, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/data"
        accepted = []

        def close_connections():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                accepted.append(connection.recv(1))
                connection.close()

        threading.Thread(target=close_connections, daemon=True).start()
        monkeypatch.setattr(toy_data_set, "url_infos", {})
        monkeypatch.setattr(toy_data_set, "_split_generators", lambda _, manager: manager.download(url))
        start = time.monotonic()
        with raises(UnavailableError, "data.source", value="tfds:toy", remedy="rerun"):
            open_source("tfds:toy", reading=BODY, work_dir="")
        assert len(accepted) == 1 + tfds_source.TFDS_RETRIES
        assert time.monotonic() - start < 20
        server.shutdown(socket.SHUT_RDWR)


# c4 is in a part of TFDS that stays unknown if a package for data sets of images is missing.
@pytest.mark.parametrize("name", ["lm1b", "c4"])
def test_known_data_set_without_a_network_is_unavailable(name, monkeypatch):
    monkeypatch.setattr(tfds_source, "can_connect", lambda urls: False)
    with raises(UnavailableError, "data.source", value=f"tfds:{name}", remedy="tfds:/DIR") as error:
        open_source(f"tfds:{name}", work_dir="")
    assert "\n" not in str(error.value)


def test_huggingface_data_set_without_a_network_is_unavailable(monkeypatch, closed_url):
    monkeypatch.setattr(constants, "ENDPOINT", closed_url)
    name = "tfds:huggingface:wikitext/wikitext-2-raw-v1"
    with raises(UnavailableError, "data.source", value=name, remedy="tfds:/DIR", match=closed_url):
        open_source(name, work_dir="")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


# what tfds.builder raises, the error's class, and its remedy
FAILURES = [
    (RuntimeError("x"), UnavailableError, "rerun"),
    (caused(ValueError("x"), ConnectionError()), UnavailableError, "rerun"),
    (caused(AssertionError("x"), caused(KeyError(), TimeoutError())), UnavailableError, "rerun"),
    (ModuleNotFoundError("No module named 'x'"), UnavailableError, "install the package"),
    (ValueError("BuilderConfig x not found"), ConfigError, ""),
    (AssertionError("Dataset cannot be loaded at version x"), ConfigError, ""),
]


@pytest.mark.parametrize(("failure", "kind", "remedy"), FAILURES)
def test_failed_builder_is_unavailable_unless_its_name_is_wrong(failure, kind, remedy, monkeypatch, capsys):
    def fail(name, file_format):
        print("banner")
        raise failure

    monkeypatch.setattr(tfds, "builder", fail)
    with raises(kind, "data.source", value="tfds:toy", remedy=remedy):
        open_source("tfds:toy", work_dir="")
    assert capsys.readouterr().out == ""


@pytest.fixture
def prepared(toy_data_set: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a data set that TFDS has prepared, copied away from TFDS's own directory."""
    open_source("tfds:toy", reading=BODY, work_dir="")
    monkeypatch.setattr(tfds, "builder", lambda *_, **__: pytest.fail("searched by name"))
    return (tmp_path / "toy" / "1.0.0").rename(tmp_path / "copy")


def test_tfds_directory_is_read_without_a_network(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_source, "can_connect", lambda urls: pytest.fail("network"))
    expected = [(f"train/{i}", f"text é {i}") for i in range(3)]
    source = open_source(f"tfds:{prepared}", reading=BODY, work_dir="")
    assert (list(source.documents()), source.total_documents, source.name) == (expected, 3, f"tfds:{prepared}")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(open_source("tfds:~/copy", reading=BODY, work_dir="").documents()) == expected
    with raises(ConfigError, "data.text_feature", value="text", match="has body"):
        open_source(f"tfds:{prepared}", work_dir="")


def test_tfds_directory_is_prepared_for_training(prepared, tmp_path):
    corpus.prepared(f"tfds:{prepared}", tmp_path / "out", text_feature="body", val_fraction=0.5)
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["source"] == f"tfds:{prepared}"


def test_directory_that_tfds_has_not_prepared_is_named(prepared, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with raises(DataError, str(path), remedy="NAME/1.0.0"):
            open_source(f"tfds:{path}", work_dir="")


def change_info(directory: Path, **changes: object) -> None:
    file = directory / "dataset_info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGE = {
    "cut": lambda path: (path / "dataset_info.json").write_text('{"name'),
    "no version": lambda path: change_info(path, version=""),
    "no splits": lambda path: change_info(path, splits=[]),
    "another format": lambda path: change_info(path, fileFormat="tfrecord"),
    "no features": lambda path: (path / "features.json").unlink(),
    "no shard": lambda path: next(path.glob("*train*")).unlink(),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_tfds_directory_is_named(prepared, name):
    DAMAGE[name](prepared)
    with raises(DataError, str(prepared)) as error:
        open_source(f"tfds:{prepared}", reading=BODY, work_dir="")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "stdlib2", "text", "text:", "lines:", "tfds:", "http://x", "stdlib:x"])
def test_unknown_source_name_is_refused(name):
    with raises(ConfigError, "data.source", value=name, match="expected"):
        open_source(name, work_dir="")


@pytest.mark.parametrize(
    ("name", "problem", "remedy"),
    [
        ("tfds:imdb_review/x", "", "nearest: imdb_reviews"),
        ("tfds:no_such_set", "not found", None),
        ("tfds:lm1b/none", "=tfds:lm1b/none: BuilderConfig none not", None),  # without its arguments
        ("text:{}/none", "no such file", None),
        ("lines:{}/none", "no such file", None),
        ("text:{}", "no such file", None),
    ],
)
def test_name_of_nothing_is_refused_in_one_line(name, problem, remedy, tmp_path):
    name = name.format(tmp_path)
    with raises(ConfigError, "data.source", value=name, match=problem, remedy=remedy) as error:
        open_source(name, work_dir="")
    assert "\n" not in str(error.value)


def test_file_deleted_before_reading_is_named(tmp_path):
    source = open_source(f"text:{write_tree(tmp_path)}", work_dir="")
    (tmp_path / "b.txt").unlink()
    with raises(DataError, f"{tmp_path}/b.txt"):
        list(source.documents())


def test_only_tfds_needs_the_network():
    assert needs_network("tfds:lm1b")
    assert not any(map(needs_network, ["stdlib", "text:a", "lines:tfds", "tfds:/a", "tfds:~/a", "tfds:./a"]))


def test_canonical_name_has_an_absolute_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert canonical_name("text:x/../y") == f"text:{tmp_path}/y"
    assert canonical_name("stdlib") == "stdlib"
    assert canonical_name("tfds:lm1b/x") == "tfds:lm1b/x"
    assert canonical_name("tfds:./x/") == canonical_name(f"tfds:{tmp_path}/x") == f"tfds:{tmp_path}/x"
    monkeypatch.setenv("HOME", "/home/me")
    assert canonical_name("tfds:~/x") == "tfds:/home/me/x"


def test_path_without_its_kind_is_refused_with_what_to_write(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    remedies = {"texts": "write text:texts", "./one.txt": "write lines:./one.txt, or text:./one.txt", "no": ""}
    for name in ("rows.jsonl.gz", "rows.csv", "rows.parquet"):
        remedies[name] = f"write {name.split('.')[1]}:{name}"
    for name in ("one.txt", "rows.jsonl.gz", "rows.csv", "rows.parquet"):
        (tmp_path / name).touch()
    for name, remedy in remedies.items():
        with raises(ConfigError, "data.source", value=name, remedy=remedy):
            canonical_name(name)
