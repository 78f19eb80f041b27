"""Reading continues in the middle of a source, and a long text comes in sections with the tokens of the whole."""

import dataclasses
import functools
import gzip
import itertools
import json
import os
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest

from gptjax.data import readers, sections
from gptjax.data.file_sources import open_files
from gptjax.data.patterns import BYTES_PATTERN, KNOWN, WHOLE_PATTERN
from gptjax.data.readers import Reading
from gptjax.data.source import Place
from gptjax.data.tokenizer import load_tokenizer, make_tokenizer
from gptjax.errors import DataError
from tests.data import corpus
from tests.data.corpus import BYTES, TEXTS, WRITERS, compress, interrupted, read_shards
from tests.helpers import raises

prepared = functools.partial(corpus.prepared, shard_tokens=2000, window=50)  # 50: no second pass
KINDS = ["text", "lines", "jsonl", "csv", "parquet", "lines.gz", "jsonl.xz"]


def write(tmp_path, kind):
    kind, _, suffix = kind.partition(".")
    path = tmp_path / f"data.{kind}"
    WRITERS[kind](path, TEXTS)
    return kind, compress(path, f".{suffix}") if suffix else path


@pytest.mark.parametrize("kind", KINDS)
def test_reading_continues_after_any_document(tmp_path, kind):
    kind, path = write(tmp_path, kind)
    source = open_files(kind, str(path), Reading())
    whole = list(source.read(Place(), None))
    assert [document.text for document in whole] == TEXTS
    for number, document in enumerate(whole, 1):
        rest = source.read(document.place, None)
        assert [document.text for document in rest] == TEXTS[number:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3, 70])
def test_parts_hold_each_document_once_in_order(tmp_path, kind, count):
    kind, path = write(tmp_path, kind)
    source = open_files(kind, str(path), Reading())
    bounds = [source.place_of(part, count) for part in range(count)] + [None]
    assert bounds[0] == Place()
    parts = [list(source.read(start, stop)) for start, stop in itertools.pairwise(bounds)]
    assert [document.text for part in parts for document in part] == TEXTS
    if count == 3 and kind in ("text", "lines", "jsonl", "parquet") and path.suffix not in (".gz", ".xz"):
        assert all(parts)


@pytest.mark.parametrize("kind", ["lines", "jsonl", "parquet"])
def test_resume_does_not_read_the_rows_before_it(tmp_path, kind, monkeypatch):
    """The rows that were read before are damaged, and nothing notices."""
    kind, path = write(tmp_path, kind)
    prepared(f"{kind}:{path}", tmp_path / "expected")
    with interrupted(monkeypatch, groups=3, batch_bytes=2500):
        prepared(f"{kind}:{path}", tmp_path / "out")
    state = path.stat()
    content = bytearray(path.read_bytes())
    content[10:1500] = b"\0" * 1490 if kind == "parquet" else b"?" * 1490
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    lines = prepared(f"{kind}:{path}", tmp_path / "out")
    assert lines[0].startswith("continuing after")
    assert read_shards(tmp_path / "out") == read_shards(tmp_path / "expected")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "jsonl.gz"])
def test_resume_counts_each_bad_row_once(tmp_path, kind, monkeypatch):
    texts = [None if number % 5 < 2 else text for number, text in enumerate(TEXTS)]
    kind, _, suffix = kind.partition(".")
    path = tmp_path / f"data.{kind}"
    WRITERS[kind](path, texts)
    if kind == "csv":
        path.write_bytes(path.read_bytes().replace(b",\r\n", b"\r\n"))  # rows without the field
    path = compress(path, f".{suffix}") if suffix else path
    with interrupted(monkeypatch, groups=3, batch_bytes=2500):
        prepared(f"{kind}:{path}", tmp_path / "out", skip_bad=True)
    lines = prepared(f"{kind}:{path}", tmp_path / "out", skip_bad=True)
    assert f"{kind}:{path}: left out {texts.count(None)} bad rows" in lines


def test_bad_row_after_a_resume_is_named_by_its_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS) + "[]\n")
    source = open_files("jsonl", str(path), Reading())
    place = list(open_files("jsonl", str(path), Reading(skip_bad=True)).read(Place(), None))[30].place
    with raises(DataError, f"{path}:{len(TEXTS) + 1}", match="a list, not an object"):
        list(source.read(place, None))


def test_file_written_since_the_interruption_is_read_from_its_start(tmp_path, monkeypatch):
    kind, path = write(tmp_path, "lines")
    with interrupted(monkeypatch, groups=3, batch_bytes=2500):
        prepared(f"{kind}:{path}", tmp_path / "out")
    content = path.read_text().replace("document 1:", "DOCUMENT 1:")
    path.write_text(content)
    os.utime(path, ns=(1, 1))  # the size is the same, and the time might be
    assert "starting over" in prepared(f"{kind}:{path}", tmp_path / "out")[0]
    prepared(f"{kind}:{path}", tmp_path / "expected")
    assert read_shards(tmp_path / "out") == read_shards(tmp_path / "expected")


def test_file_that_is_no_text_is_refused_after_a_resume_too(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    path.write_bytes(b"".join(b"plain text %d\n" % number for number in range(900)) + b"caf\xe9 \xe9\n" * 60)
    with interrupted(monkeypatch, groups=3, batch_bytes=2500):
        prepared(f"lines:{path}", tmp_path / "out")
    for _ in range(2):
        with raises(DataError, str(path), remedy="latin-1", match="120 of 1"):
            prepared(f"lines:{path}", tmp_path / "out")


# Sections

WORDS = st.sampled_from(
    [" ", "\n", "\r\n", "a", "Word", "é", "日本", "7", "12", "'s", "!", "\t", "don't", "א", "\u0301"]
)


@pytest.mark.parametrize("pattern", sorted(set(KNOWN) - {WHOLE_PATTERN, BYTES_PATTERN}))
@hypothesis.given(words=st.lists(WORDS, min_size=4, max_size=60))
@hypothesis.settings(max_examples=60, deadline=None)
def test_sections_have_the_tokens_of_the_whole(pattern, words):
    text = "".join(words)
    ranks = {bytes([byte]): byte for byte in range(256)} | {b" a": 256, b"aa": 257, b"\n\n": 258, b"Wo": 259}
    ranks |= {b" W": 260, b" Wo": 261, b"\nW": 262, b" \n": 263, b"a ": 264, b"d ": 265, b"'s": 266, b"s ": 267}
    tokenizer = make_tokenizer("test", pattern, ranks)
    for cut in sections._CUT.finditer(text):
        first, last = text[: cut.end()], text[cut.end() :]
        assert tokenizer.encode(first) + tokenizer.encode(last) == tokenizer.encode(text)


def long_texts(tmp_path, count):
    folder = tmp_path / "long"
    folder.mkdir()
    for number in range(count):
        text = " ".join(f"word{number} lines\nand {'x' * (index % 7)}" for index in range(400))
        (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.mark.parametrize("name", ["gpt2", "bytes", "unknown", "characters"])
@pytest.mark.parametrize("count", [1, 12])
def test_long_texts_give_the_same_shards_in_sections(tmp_path, name, count, monkeypatch):
    folder = long_texts(tmp_path, count)
    ranks = {bytes([byte]): byte for byte in range(256)}
    tokenizer = load_tokenizer("bytes" if name in ("unknown", "characters") else name)
    if name == "unknown":
        tokenizer = make_tokenizer("unknown", rf"(?s){BYTES_PATTERN[4:]}|.", ranks)
    if name == "characters":
        (tmp_path / "characters.json").write_text(
            json.dumps({"format": "gptjax-characters-1", "name": "c", "characters": "\n 0123456789adeilnorswx"})
        )
        tokenizer = load_tokenizer(str(tmp_path / "characters.json"))
    prepared(f"text:{folder}", tmp_path / "expected", tokenizer=tokenizer)
    monkeypatch.setattr(readers, "LONG_TEXT", 1000)
    monkeypatch.setattr(sections, "SECTION", 700)
    documents = list(open_files("text", str(folder), Reading()).read(Place(), None))
    assert len(documents) > 8 * count
    if (name, count) != ("unknown", 1):  # which is two documents without sections
        with interrupted(monkeypatch, groups=3, batch_bytes=2500):
            prepared(f"text:{folder}", tmp_path / "out", tokenizer=tokenizer)
    lines = prepared(f"text:{folder}", tmp_path / "out", tokenizer=tokenizer)
    assert ("continuing" in lines[0]) == ((name, count) != ("unknown", 1))
    assert read_shards(tmp_path / "out") == read_shards(tmp_path / "expected")


def test_text_without_a_place_to_cut_is_read_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("x" * 5000)
    monkeypatch.setattr(readers, "LONG_TEXT", 1000)
    monkeypatch.setattr(sections, "SECTION", 700)
    [document] = open_files("text", str(path), Reading()).read(Place(), None)
    assert (len(document.text), document.is_end) == (5000, True)


@pytest.mark.thorough
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_memory_does_not_grow_with_one_long_document(tmp_path, suffix):
    path = tmp_path / f"large{suffix}"
    with gzip.open(path, "wt", compresslevel=1) if suffix else open(path, "w") as file:
        for _ in range(300):
            file.write("some words of a long text\n" * 20_000)
    code = (
        "import resource; from gptjax.data.prepare import prepare; from gptjax.data.tokenizer import load_tokenizer;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; tokenizer = load_tokenizer('bytes');"
        f"import pyarrow; before = peak(); prepare(source={f'text:{path}'!r}, tokenizer=tokenizer,"
        f"out={str(tmp_path / 'out')!r}, processes=1, log=lambda line: None); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150_000, "KiB, of a text of 156 MB"


def test_sections_are_joined_for_patterns_that_nobody_tried():
    ranks = {bytes([byte]): byte for byte in range(256)}
    for pattern in (WHOLE_PATTERN, r"\w+|\W+"):
        assert not sections.keeps_tokens(make_tokenizer("other", pattern, ranks))
    assert not sections.keeps_tokens(make_tokenizer("merges", BYTES_PATTERN, ranks | {b"aa": 256}))
    gpt2 = load_tokenizer("gpt2")
    assert not sections.keeps_tokens(dataclasses.replace(gpt2, prefix_space=True))
    assert sections.keeps_tokens(gpt2)
    assert sections.keeps_tokens(BYTES)
