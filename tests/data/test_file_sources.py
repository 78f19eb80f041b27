"""Files as sources: every kind gives the same documents, and what is no text is refused by its name."""

import gzip
import io
import json
import lzma
import os
import pathlib
import subprocess
import sys
import tempfile
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data.file_sources import find_files, open_files
from gptjax.data.prepare import main as prepare_main
from gptjax.data.readers import Reading
from gptjax.data.sources import canonical_name
from gptjax.data.text_files import CHECKED_BYTES, check_encoding
from gptjax.data.tokenizer import load_tokenizer
from gptjax.data.tokens import open_split
from gptjax.errors import ConfigError, DataError
from tests.data.corpus import (
    BYTES,
    TEXTS,
    WRITERS,
    as_csv,
    as_parquet,
    as_text,
    compress,
    documents_of,
    interrupted,
    prepared,
    read_shards,
)
from tests.helpers import raises

GPT2 = load_tokenizer("gpt2")


def documents(kind, path, **options):
    return list(open_files(kind, str(path), Reading(**options)).documents())


def texts_of(kind, path, **options):
    return [text for _, text in documents(kind, path, **options)]


def shards(kind, path, out, *, tokenizer=BYTES):
    prepared(f"{kind}:{path}", out, tokenizer=tokenizer, shard_tokens=2000)
    return read_shards(out)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["lines", "jsonl", "csv"])
def test_every_kind_gives_the_same_shards(tmp_path, kind, suffix):
    as_text(tmp_path / "text", TEXTS)
    expected = shards("text", tmp_path / "text", tmp_path / "expected")
    path = tmp_path / f"data.{kind}"
    WRITERS[kind](path, TEXTS)
    path = compress(path, suffix) if suffix else path
    assert shards(kind, path, tmp_path / "out") == expected


@pytest.mark.parametrize("group", [1, 7, 1000])
def test_parquet_gives_the_same_shards_with_any_row_groups(tmp_path, group):
    as_text(tmp_path / "text", TEXTS)
    expected = shards("text", tmp_path / "text", tmp_path / "expected")
    as_parquet(tmp_path / "data.parquet", TEXTS, group)
    assert shards("parquet", tmp_path / "data.parquet", tmp_path / "out") == expected
    names = [name for name, _ in documents("parquet", tmp_path / "data.parquet")]
    assert names[8 % group + 8 // group * group] == f"data.parquet:{8 // group}:{8 % group}"


def test_folders_and_patterns_are_read_in_path_order(tmp_path):
    (tmp_path / "b").mkdir()
    for name, text in (("b/1.txt", "two"), ("a.txt", "one"), ("b/2.md", "three"), ("b.log", "no")):
        (tmp_path / name).write_text(text)
    assert documents("text", f"{tmp_path}/b") == [("1.txt", "two"), ("2.md", "three")]
    assert documents("text", f"{tmp_path}/**/*.txt") == [("a.txt", "one"), ("b/1.txt", "two")]
    assert documents("text", f"{tmp_path}/b/?.md") == [("2.md", "three")]
    with raises(ConfigError, "data.source", value=f"text:{tmp_path}/*.none"):
        documents("text", f"{tmp_path}/*.none")


def test_hidden_files_and_linked_folders_are_counted(tmp_path):
    (tmp_path / "real/.git").mkdir(parents=True)
    (tmp_path / "real/.hidden").write_text("x")
    (tmp_path / "real/seen").write_text("x")
    (tmp_path / "real/file_link").symlink_to(tmp_path / "real/seen")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "real/link").symlink_to(tmp_path / "elsewhere")
    found = find_files(str(tmp_path / "real"))
    assert [os.path.basename(path) for path in found.paths] == ["file_link", "seen"]
    assert found.describe() == "left out: 2 hidden files or folders and 1 linked folders"
    assert open_files("text", str(tmp_path / "real"), Reading()).left_out == found.describe()
    (tmp_path / "real/more").write_text("y" * 3000)
    lines = prepared(f"text:{tmp_path}/real", tmp_path / "out")
    assert lines[0] == f"text:{tmp_path}/real: {found.describe()}"


# What is no text


def utf16(text):
    return text.encode("utf-16")


NO_TEXT = {
    "gzip": (gzip.compress(b"text " * 100), "looks like gzip data, which need the suffix .gz"),
    "zstandard": (zstandard.compress(b"text " * 100), "looks like zstandard data"),
    "xz": (lzma.compress(b"text " * 100), "looks like xz data"),
    "png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "looks like a PNG picture"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "looks like a PDF document"),
    "npy": (b"\x93NUMPY\x01\0v\0{}", "looks like a NumPy array"),
    "zip": (b"PK\x03\x04\x14\0\0\0", "looks like a zip archive"),
    "utf-16": (utf16("text with a mark " * 20), "looks like utf-16"),
    "utf-16-le": ("text without a mark ".encode("utf-16-le") * 20, "looks like utf-16-le"),
    "utf-16-be": ("text without a mark ".encode("utf-16-be") * 20, "looks like utf-16-be"),
    "utf-32": ("text".encode("utf-32") * 20, "looks like utf-32"),
    "binary": (b"text\0text" * 50, "holds NUL bytes"),
    "late NUL": (b"text " * 2**19 + b"\0", "holds NUL bytes"),
    "latin-1": ("über café ".encode("latin-1") * 50, "perhaps it is latin-1"),
    "late latin-1": (b"text " * 2**18 + "é".encode("latin-1") * 30_000, "perhaps it is latin-1"),
}


@pytest.mark.parametrize("name", NO_TEXT)
@pytest.mark.parametrize("kind", ["text", "lines"])
def test_file_that_is_no_text_is_refused_with_a_guess(tmp_path, name, kind):
    data, guess = NO_TEXT[name]
    (tmp_path / "file").write_bytes(data)
    with raises(DataError, f"{tmp_path}/file", match=guess):
        documents(kind, tmp_path / "file")


def test_parquet_taken_for_text_is_named(tmp_path):
    as_parquet(tmp_path / "file", TEXTS)
    with raises(DataError, f"{tmp_path}/file", match="a parquet file, which --source=parquet: reads"):
        documents("text", tmp_path / "file")


@pytest.mark.parametrize(
    "text",
    ["PAR1S is a city", "%PDF- is how they begin", "GIF8", "\ufffd" * 500, "日本語\n" * 10_000, "", "a\x07b\x1b[0m",
     "a" * (CHECKED_BYTES - 1) + "é" * 10],
    ids=range(8),
)  # fmt: skip
def test_text_of_any_letters_is_read(tmp_path, text):
    (tmp_path / "file").write_text(text, encoding="utf-8")
    assert texts_of("text", tmp_path / "file") == [text]


def test_few_invalid_bytes_become_replacement_characters(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 5000 + b"\xff" + b"y" * 5000 + b"\xc3")
    assert texts_of("text", tmp_path / "file") == ["x" * 5000 + "\ufffd" + "y" * 5000 + "\ufffd"]


def test_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbfone\r\n\xef\xbb\xbftwo")
    assert texts_of("text", tmp_path / "file") == ["one\r\n\ufefftwo"]
    assert texts_of("lines", tmp_path / "file") == ["one", "\ufefftwo"]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "cp1252", "utf-8"])
def test_encoding_is_used_for_every_kind_of_text(tmp_path, encoding):
    texts = ["café", "über"]
    (tmp_path / "lines").write_bytes("\n".join(texts).encode(encoding))
    (tmp_path / "jsonl").write_bytes('{"text": "café"}\n{"text": "über"}'.encode(encoding))
    (tmp_path / "csv").write_bytes("text\ncafé\nüber\n".encode(encoding))
    for kind in ("lines", "jsonl", "csv"):
        assert texts_of(kind, tmp_path / kind, encoding=encoding) == texts


def test_wrong_encoding_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"abc\xffdef")
    with raises(DataError, f"{tmp_path}/file", remedy="--encoding", match="is not ascii: .* near byte 3"):
        documents("text", tmp_path / "file", encoding="ascii")
    for encoding in ("latin9000", "base64", "rot13"):
        with raises(ConfigError, "--encoding", value=encoding, remedy="utf-16"):
            check_encoding(encoding)


# Compressed files


def test_padding_between_xz_streams_is_allowed(tmp_path):
    (tmp_path / "a.xz").write_bytes(lzma.compress(b"one ") + bytes(8) + lzma.compress(b"two") + bytes(4))
    assert texts_of("text", tmp_path / "a.xz") == ["one two"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_compressed_file_is_named(tmp_path, suffix, damage):
    path = tmp_path / "data.txt"
    path.write_bytes(np.random.default_rng(0).integers(32, 127, 200_000).astype(np.uint8).tobytes())
    packed = compress(path, suffix)
    data = bytearray(packed.read_bytes())
    if damage == "cut":
        data = data[:-20]
    else:
        data[len(data) // 2 + 1000] ^= 0xFF
    packed.write_bytes(data)
    with raises(DataError, str(packed)):
        documents("text", packed)


# Rows

BAD_ROWS = {
    "no JSON": ("{", "is no JSON"),
    "a list": ("[1]", "is a list, not an object"),
    "no field": ('{"body": "x"}', "has no field 'text'"),
    "null": ('{"text": null}', "its field 'text' is null"),
    "a number": ('{"text": 3}', "its field 'text' is a number"),
    "surrogate": ('{"text": "\\ud800"}', "is no valid Unicode"),
    "deep": ("[" * 100_000, "is no JSON"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_named_or_skipped_and_counted(tmp_path, name):
    row, problem = BAD_ROWS[name]
    path = tmp_path / "data.jsonl"
    good = [json.dumps({"text": "x" * 1500 + str(number)}) for number in range(4)]
    path.write_text("\n".join([*good[:2], row, "", *good[2:]]))
    with raises(DataError, f"{path}:3", match=problem):
        documents("jsonl", path)
    assert len(documents("jsonl", path, skip_bad=True)) == 4
    lines = prepared(f"jsonl:{path}", tmp_path / "out", skip_bad=True)
    assert f"jsonl:{path}: left out 1 bad rows" in lines


def test_missing_field_names_those_that_exist(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"title": "a", "body": "b"}')
    with raises(DataError, f"{path}:1", remedy="set data.text_feature; its fields: title, body"):
        documents("jsonl", path)
    assert texts_of("jsonl", path, text_feature="body") == ["b"]
    as_parquet(tmp_path / "data.parquet", ["a"])
    with raises(ConfigError, "data.text_feature", value="body", remedy="its columns: id, text"):
        documents("parquet", tmp_path / "data.parquet", text_feature="body")
    (tmp_path / "data.csv").write_text("title,body\nx,y\n")
    with raises(DataError, f"{tmp_path}/data.csv:1", remedy="its fields: title, body"):
        documents("csv", tmp_path / "data.csv")


def test_csv_keeps_line_breaks_and_long_fields(tmp_path):
    texts = ['one\r\ntwo, "three"', "z" * 300_000, "a\n\nb"]
    as_csv(tmp_path / "data.csv", texts)
    assert texts_of("csv", tmp_path / "data.csv") == texts


def test_csv_with_an_open_quote_is_refused(tmp_path):
    (tmp_path / "data.csv").write_text('text\n"never closed\n')
    with raises(DataError, f"{tmp_path}/data.csv, line 1", match="is no csv"):
        documents("csv", tmp_path / "data.csv")


def test_parquet_nulls_bytes_and_types(tmp_path):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), path)
    with raises(DataError, f"{path}:0:1", match="is null"):
        documents("parquet", path)
    assert texts_of("parquet", path, skip_bad=True) == ["a", "b"]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["é".encode(), b"\xff"]}), path)
    with raises(DataError, f"{path}:0:1", match="is no UTF-8"):
        documents("parquet", path)
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    with raises(DataError, f"{path}:0:0", match="is a number"):
        documents("parquet", path)


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", b"text"])
def test_file_that_is_no_parquet_is_named(tmp_path, content):
    path = tmp_path / "data.parquet"
    path.write_bytes(content)
    with raises(DataError, str(path), match="is no parquet file, or is cut off"):
        documents("parquet", path)
    as_parquet(path, TEXTS)
    path.write_bytes(path.read_bytes()[:-100])
    with raises(DataError, str(path), match="is no parquet file, or is cut off"):
        documents("parquet", path)


# Pipes


def prepare_from_pipe(tmp_path, text, out):
    command = [sys.executable, "-m", "gptjax.data.prepare", "--source=lines:-", "--tokenizer=bytes", f"--out={out}"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120)


def test_pipe_is_read_once(tmp_path):
    done = prepare_from_pipe(tmp_path, "".join(f"{text}\n" for text in TEXTS * 20), "many")
    assert done.returncode == 0, done.stderr
    assert "lines:-: if it is interrupted, it starts over" in done.stdout
    done = prepare_from_pipe(tmp_path, "a\nb\n", "few")
    assert done.returncode == 65
    assert "documents: 2; write it to a file, which can be read twice, or set --val_fraction" in done.stderr
    done = prepare_from_pipe(tmp_path, "only\n", "one")
    assert done.stderr.endswith("documents: 1; write it to a file, which can be read twice\n")
    with raises(ConfigError, "data.source", value="parquet:-"):
        documents("parquet", "-")


def test_interrupted_pipe_starts_over_with_all_of_the_next_one(tmp_path, monkeypatch):
    def give(texts):
        stream = io.BytesIO("".join(f"{text}\n" for text in texts).encode())
        monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BufferedReader(stream)))

    give(TEXTS)
    with interrupted(monkeypatch, groups=1, batch_bytes=1000):
        prepared("lines:-", tmp_path / "out", window=1)
    others = [f"other {text}" for text in TEXTS]
    give(others)
    prepared("lines:-", tmp_path / "out", window=1)
    found = [text for split in ("train", "validation") for text in documents_of(tmp_path / "out", split)]
    assert sorted(found) == sorted(others)


def test_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert canonical_name("jsonl:~/x.jsonl") == f"jsonl:{tmp_path}/x.jsonl"


@pytest.mark.parametrize("kind", ["lines", "jsonl"])
def test_memory_does_not_grow_with_the_size_of_a_file(tmp_path, kind):
    """Measured in a process of its own, over a file that is larger than what it may use."""
    path = tmp_path / "large"
    row = "x" * 1000 if kind == "lines" else json.dumps({"text": "x" * 1000})
    with open(path, "w") as file:
        for _ in range(200):
            file.write(f"{row}\n" * 1000)
    code = (
        "import resource, sys; from gptjax.data.file_sources import open_files;"
        "from gptjax.data.readers import Reading;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak();"
        f"n = sum(1 for _ in open_files({kind!r}, {str(path)!r}, Reading()).documents()); print(n, peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, grown = map(int, done.stdout.split())
    assert count == 200_000
    assert grown < 20_000, "KiB, of a file of 200 MB"


ODD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30) | st.sampled_from(
    [
        "",
        " ",
        "\n\n",
        "\r",
        "\u2028",
        "\ufeff",
        "<|endoftext|>",
        "\u0301",
        "a" * 300,
        " " * 200,
        '"',
        ",",
        "{}",
        "\U0010ffff",
    ]
)


@given(texts=st.lists(ODD, min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_odd_documents_come_back_as_they_were(texts):
    """From each kind of file that can hold any text."""
    expected = sorted(text for text in texts if text)
    if len(set(expected)) < 2:
        return
    for kind in ("jsonl", "csv", "parquet"):
        with tempfile.TemporaryDirectory() as directory:
            folder = pathlib.Path(directory)
            WRITERS[kind](folder / "data", texts)
            shards(kind, folder / "data", folder / "out", tokenizer=GPT2)
            found = []
            for split in ("train", "validation"):
                [*parts, rest] = (
                    np.concatenate(
                        [shard.read() for shard in open_split(str(folder / "out"), split, tokenizer=GPT2).shards]
                    )
                    .tobytes()
                    .split(np.array([GPT2.eot_id], "<u2").tobytes())
                )
                found += [GPT2.decode(np.frombuffer(part, "<u2")) for part in parts]
            assert (sorted(found), rest) == (expected, b""), kind


def test_command_passes_its_options(tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    rows = [json.dumps({"body": "é" * 1500 + str(number)}, ensure_ascii=False) for number in range(5)]
    path.write_bytes("\n".join(["{", *rows]).encode("latin-1"))
    flags = [f"--source=jsonl:{path}", "--tokenizer=bytes", f"--out={tmp_path}/out", "--text_feature=body"]
    prepare_main([*flags, "--encoding=latin-1", "--skip_bad"])
    assert "left out 1 bad rows" in capsys.readouterr().out
