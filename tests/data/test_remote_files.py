"""Sources in buckets: the shards of the same files here, and errors of the network as such."""

import gzip
import io
import json
import pathlib
import sys
from collections.abc import Iterator

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from gptjax.config import DataConfig
from gptjax.data import preparation, remote_files, text_files
from gptjax.data.file_sources import open_files
from gptjax.data.meta import read_meta
from gptjax.data.prepare import default_path, ensure_prepared, prepare
from gptjax.data.readers import Reading
from gptjax.data.remote_files import is_remote, list_remote, open_remote
from gptjax.data.sources import canonical_name, needs_network
from gptjax.data.tokenizer import load_tokenizer
from gptjax.errors import ConfigError, DataError, UnavailableError
from tests.helpers import raises

BYTES = load_tokenizer("bytes")
TEXTS = [f"document {number}: {'x' * (37 * number % 400)}" for number in range(60)]
URL = "memory://bucket/folder"


@pytest.fixture
def bucket() -> Iterator[MemoryFileSystem]:
    """fsspec's file system in this process's memory, which reads as those of gs:// and s3:// do."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def parquet(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "id": range(len(texts))}), file, row_group_size=7)
    return file.getvalue()


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


FILES = {
    "text": {f"{number:03d}": text.encode() for number, text in enumerate(TEXTS)},
    "lines": {"a.txt": "\n".join(TEXTS).encode()},
    "jsonl": {"b.jsonl.gz": gzip.compress(jsonl(TEXTS[30:])), "a/a.jsonl": jsonl(TEXTS[:30])},
    "csv": {"a.csv": b"text\n" + "\n".join(TEXTS).encode()},
    "parquet": {"a.parquet": parquet(TEXTS[:30]), "b.parquet": parquet(TEXTS[30:])},
}


def shards(source: str, out: pathlib.Path, **options: object) -> dict[str, bytes]:
    prepare(source=source, tokenizer=BYTES, out=str(out), log=lambda line: None, shard_tokens=2000, **options)
    return {file.name: file.read_bytes() for file in out.iterdir() if file.suffix == ".bin"}


def documents(source: str, **options: object) -> list[tuple[str, str]]:
    kind, _, path = source.partition(":")
    return list(open_files(kind, path, Reading(**options)).documents())


@pytest.mark.parametrize("kind", FILES)
def test_bucket_gives_the_shards_of_the_same_files_here(
    bucket: MemoryFileSystem, tmp_path: pathlib.Path, kind: str
) -> None:
    for name, data in FILES[kind].items():
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_bytes(data)
        bucket.pipe(f"/bucket/folder/{name}", data)
    expected = shards(f"{kind}:{tmp_path}/here", tmp_path / "expected")
    assert len(expected) > 2
    assert shards(f"{kind}:{URL}/", tmp_path / "out") == expected
    assert documents(f"{kind}:{URL}") == documents(f"{kind}:{tmp_path}/here")
    meta, of_here = read_meta(str(tmp_path / "out")), read_meta(str(tmp_path / "expected"))
    assert meta is not None
    assert of_here is not None
    assert (meta.source, meta.files) == (f"{kind}:{URL}", of_here.files)


def refuse_missing(*_: object, **__: object) -> None:
    raise FileNotFoundError("no such bucket")


@pytest.mark.parametrize("kind", ["lines", "jsonl", "parquet"])
def test_parts_of_a_bucket_have_the_bytes_of_one_process(
    bucket: MemoryFileSystem, tmp_path: pathlib.Path, kind: str
) -> None:
    for name, data in FILES[kind].items():
        bucket.pipe(f"/bucket/folder/{name}", data)
    expected = shards(f"{kind}:{URL}", tmp_path / "expected", window=1)
    for part in ("1/3", "2/3", "3/3"):
        options = {"source": f"{kind}:{URL}", "tokenizer": BYTES, "shard_tokens": 2000, "window": 1}
        prepare(**options, out=str(tmp_path / "out"), log=lambda line: None, part=part)
    assert shards(f"{kind}:{URL}", tmp_path / "out", window=1, part="join") == expected


def test_files_patterns_and_hidden_files(bucket: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/1.txt", "a.txt", "b/2.md", ".hidden", "b/.git/x", "b.log"):
        bucket.pipe(f"/bucket/folder/{name}", name.encode())
    names = {
        URL: ["a.txt", "b.log", "b/1.txt", "b/2.md"],
        f"{URL}/b": ["1.txt", "2.md"],
        f"{URL}/a.txt": ["a.txt"],
        f"{URL}/**/*.txt": ["a.txt", "b/1.txt"],
        f"{URL}/b/?.md": ["2.md"],
    }
    for url, expected in names.items():
        assert [name for name, _ in documents(f"text:{url}")] == expected
    source = open_files("text", URL, Reading())
    assert source.left_out == "left out: 2 hidden files or folders"
    assert source.files == (("a.txt", 5), ("b.log", 5), ("b/1.txt", 7), ("b/2.md", 6))
    with raises(ConfigError, "data.source", value=f"text:{URL}/none", match="no such file or folder"):
        documents(f"text:{URL}/none")
    monkeypatch.setattr(MemoryFileSystem, "find", refuse_missing)  # as s3fs does
    with raises(ConfigError, "data.source", value="text:memory://nobucket", match="no such file or folder"):
        documents("text:memory://nobucket")


def test_name_of_a_bucket_stays_a_url() -> None:
    assert canonical_name("text:gs://bucket/folder/") == "text:gs://bucket/folder"
    assert canonical_name("jsonl:s3://bucket/*.jsonl") == "jsonl:s3://bucket/*.jsonl"
    assert needs_network("text:gs://bucket/folder")
    assert default_path("text:gs://bucket/folder/", "gpt2") == default_path("text:gs://bucket/folder", "gpt2")
    assert default_path("text:gs://bucket/folder", "gpt2").startswith("data/text-folder-")
    assert is_remote("gs://x")
    assert not is_remote("/a/gs://x")
    assert not is_remote("folder:x")


def test_training_does_not_connect(bucket: MemoryFileSystem, tmp_path: pathlib.Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = DataConfig(source="jsonl:gs://bucket/folder", tokenizer="bytes")
    path = default_path(config.source, "bytes")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with raises(ConfigError, path, remedy="prepare --source=jsonl:gs://bucket/folder", match="downloads nothing"):
        ensure_prepared(config)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    bucket.pipe("/bucket/folder/a.jsonl", jsonl(TEXTS))
    config = DataConfig(source=f"jsonl:{URL}", tokenizer="bytes")
    path = default_path(config.source, "bytes")
    prepare(source=config.source, tokenizer=BYTES, out=path, log=lambda line: None, window=1025)
    bucket.pipe("/bucket/folder/b.jsonl", jsonl(TEXTS))
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert ensure_prepared(config) == path


def test_output_in_a_bucket_is_refused(bucket: MemoryFileSystem, tmp_path: pathlib.Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with raises(ConfigError, "out", value="gs://bucket/x", match="a directory of this machine"):
        prepare(source="stdlib", tokenizer=BYTES, out="gs://bucket/x")
    assert not list(tmp_path.iterdir())


def test_changed_files_are_named_by_the_next_preparation(bucket: MemoryFileSystem, tmp_path: pathlib.Path) -> None:
    bucket.pipe("/bucket/folder/a.jsonl", jsonl(TEXTS))
    first = shards(f"jsonl:{URL}", tmp_path / "out")
    assert shards(f"jsonl:{URL}", tmp_path / "out") == first
    bucket.pipe("/bucket/folder/b.jsonl", jsonl(TEXTS))
    with raises(ConfigError, str(tmp_path / "out"), match="from 1 files of .*, and there are 2 files of"):
        shards(f"jsonl:{URL}", tmp_path / "out")
    bucket.rm("/bucket/folder", recursive=True)
    assert shards(f"jsonl:{URL}", tmp_path / "out") == first, "the source has gone"


def test_damaged_content_is_named_as_here(bucket: MemoryFileSystem) -> None:
    bucket.pipe("/bucket/folder/a.jsonl.gz", gzip.compress(jsonl(TEXTS))[:-20])
    bucket.pipe("/bucket/folder/b.parquet", parquet(TEXTS)[:-20])
    bucket.pipe("/bucket/folder/c.jsonl", b"x\n")
    for kind, name, problem in (
        ("jsonl", "a.jsonl.gz", "damaged or cut off"),
        ("parquet", "b.parquet", "is no parquet file"),
        ("jsonl", "c.jsonl", "is no JSON"),
    ):
        with pytest.raises(DataError, match=problem) as caught:
            documents(f"{kind}:{URL}/{name}")
        assert caught.value.field.startswith(f"{URL}/{name}")


@pytest.mark.parametrize(("kind", "name"), [("text", "a.txt"), ("parquet", "a.parquet")])
def test_connection_that_breaks_is_69(bucket: MemoryFileSystem, monkeypatch, kind: str, name: str) -> None:
    bucket.pipe(f"/bucket/folder/{name}", parquet(TEXTS) if kind == "parquet" else b"text")

    def refuse(*_: object) -> bytes:
        raise TimeoutError("no answer")

    monkeypatch.setattr(MemoryFile, "read", refuse)
    with raises(UnavailableError, f"{URL}/{name}", match="cannot be reached", remedy="credentials"):
        documents(f"{kind}:{URL}")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_preparation_continues_after_a_broken_connection(
    bucket: MemoryFileSystem, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(preparation, "BATCH_BYTES", 1000)
    monkeypatch.setattr(remote_files, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(text_files, "CHECKED_BYTES", 1000)
    for name, data in FILES[kind].items():
        bucket.pipe(f"/bucket/folder/{name.removesuffix('.gz')}", gzip.decompress(data) if "gz" in name else data)
    expected = shards(f"{kind}:{URL}", tmp_path / "expected", window=1)
    real, is_broken = MemoryFile.read, True

    def read(file: MemoryFile, size: int = -1) -> bytes:
        if is_broken and file.path.startswith("/bucket/folder/b"):
            raise TimeoutError("no answer")
        return real(file, size)

    monkeypatch.setattr(MemoryFile, "read", read)
    options = {"source": f"{kind}:{URL}", "tokenizer": BYTES, "shard_tokens": 2000, "window": 1}
    with pytest.raises(UnavailableError, match="cannot be reached"):
        prepare(**options, out=str(tmp_path / "out"), log=lambda line: None)
    is_broken = False
    lines: list[str] = []
    prepare(**options, out=str(tmp_path / "out"), log=lines.append)
    assert lines[0].startswith("continuing after ")
    assert shards(f"{kind}:{URL}", tmp_path / "out", window=1) == expected


def test_bucket_that_does_not_answer_is_69(bucket: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryFileSystem, "find", lambda *_, **__: 1 / 0)
    with raises(UnavailableError, URL, match=r"cannot be reached \(ZeroDivisionError: division by zero\)"):
        list_remote(URL)
    with raises(UnavailableError, f"{URL}/gone", match="no such file in the bucket"), open_remote(f"{URL}/gone"):
        pass


@pytest.mark.parametrize(("scheme", "extra"), [("gs", "gptjax[gcs]"), ("s3", "gptjax[s3]")])
def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, scheme: str, extra: str) -> None:
    monkeypatch.setenv(remote_files.EMULATOR, "http://127.0.0.1:9")  # so that Google is not asked first
    for module in ("gcsfs", "s3fs"):
        monkeypatch.setitem(sys.modules, module, None)
    with raises(UnavailableError, f"{scheme}://bucket/x", match="library for this bucket is missing", remedy=extra):
        list_remote(f"{scheme}://bucket/x")


def test_google_out_of_reach_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(remote_files.EMULATOR, raising=False)
    monkeypatch.setattr(remote_files, "GOOGLE", "http://127.0.0.1:9")
    with raises(UnavailableError, "gs://bucket/x", match=r"127\.0\.0\.1:9 does not answer"):
        list_remote("gs://bucket/x")


@pytest.mark.parametrize("scheme", ["file", "http", "xyz", "zip"])
def test_other_schemes_are_refused(scheme: str) -> None:
    with raises(ConfigError, "data.source", value=f"{scheme}://bucket/x", remedy="use gs:// or s3://"):
        list_remote(f"{scheme}://bucket/x")
