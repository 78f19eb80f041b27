"""Shards are read as they were written, and every damage ends in a DataError that names it."""

import contextlib
import dataclasses
import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data import tokens
from gptjax.data.tokenizer import load_tokenizer
from gptjax.data.tokens import Meta, ShardMeta, Split, SplitMeta, make_header, open_shard, open_split, token_dtype
from gptjax.errors import ConfigError, DataError

TOKENIZER = load_tokenizer("bytes")
EOT = TOKENIZER.eot_id


def write_shard(path: Path, ids: np.ndarray, vocab_size: int = TOKENIZER.vocab_size) -> None:
    dtype = token_dtype(vocab_size)
    path.write_bytes(make_header(len(ids), dtype) + ids.astype(dtype).tobytes())


def random_ids(count: int, seed: int = 0, vocab_size: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, count)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A directory as prepare writes it: two shards to train on, one to validate."""
    splits = {}
    for split, counts in {"train": (3000, 1700), "validation": (900,)}.items():
        known = []
        for index, count in enumerate(counts):
            path = tmp_path / f"{'train' if split == 'train' else 'val'}_{index:06d}.bin"
            write_shard(path, random_ids(count, seed=index))
            known.append(ShardMeta(path.name, count, tokens.hash_file(str(path))))
        splits[split] = SplitMeta(sum(counts), sum(counts) - 5, 5, tuple(known))
    meta = Meta("text:/a", "bytes", TOKENIZER.sha256, TOKENIZER.vocab_size, EOT, "last", splits)
    tokens.write_meta(str(tmp_path), meta)
    return tmp_path


def open_train(directory: Path, **options: str) -> Split:
    return open_split(str(directory), "train", tokenizer=TOKENIZER, **options)


@pytest.mark.parametrize(
    ("vocab_size", "magic", "version", "width"), [(50257, 20240520, 1, 2), (70000, 20240801, 7, 4)]
)
def test_a_shard_is_read_as_written(vocab_size: int, magic: int, version: int, width: int, tmp_path: Path) -> None:
    path, ids = tmp_path / "shard.bin", random_ids(5000, vocab_size=vocab_size)
    write_shard(path, ids, vocab_size)
    content = path.read_bytes()
    assert struct.unpack("<3i", content[:12]) == (magic, version, 5000)  # llm.c's dataloader.h
    assert not any(content[12:1024])
    assert content[1024:] == b"".join(int(i).to_bytes(width, "little") for i in ids)
    assert np.array_equal(open_shard(str(path), vocab_size), ids)


def test_a_nanogpt_file_is_read(tmp_path: Path) -> None:
    ids = random_ids(5000, vocab_size=50257)
    ids.astype(np.uint16).tofile(tmp_path / "train.bin")
    assert np.array_equal(open_shard(str(tmp_path / "train.bin"), 50257), ids)


def test_a_tiny_nanogpt_file_is_read(tmp_path: Path) -> None:
    np.array([1, 2, 3], np.uint16).tofile(tmp_path / "train.bin")
    assert open_shard(str(tmp_path / "train.bin"), 50257).tolist() == [1, 2, 3]


def test_a_prepared_split(prepared: Path) -> None:
    split = open_train(prepared)
    assert [len(shard) for shard in split.shards] == [3000, 1700]
    assert np.array_equal(split.shards[1], random_ids(1700, seed=1))
    assert (split.tokens, split.bytes, split.eot_position, split.vocab_size) == (4700, 4695, "last", 257)
    assert [Path(path).name for path in split.paths] == ["train_000000.bin", "train_000001.bin"]
    assert open_train(prepared, eot_position="first").eot_position == "first"


def test_the_fingerprint_is_of_the_data(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    first = open_train(prepared).fingerprint
    assert first == open_train(prepared).fingerprint
    assert first != open_split(str(prepared), "validation", tokenizer=TOKENIZER).fingerprint
    (prepared / "meta.json").unlink()
    foreign = open_train(prepared).fingerprint
    write_shard(prepared / "train_000001.bin", random_ids(1700, seed=9))
    assert len({first, foreign, open_train(prepared).fingerprint}) == 3


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)


def put(offset: int, value: int, form: str = "<i") -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        struct.pack_into(form, content, offset, value)
        path.write_bytes(content)

    return damage


DAMAGES = {
    "truncated": (cut, "6924 bytes, but the header counts 3000 tokens, which take 7024 bytes"),
    "truncated header": (cut_header, "within its header, at byte 500"),
    "wrong magic": (put(0, 123), "magic 123, expected one of 20240520, 20240801"),
    "wrong version": (put(4, 2), "version 2, expected 1"),
    "wrong count": (put(8, 2999), "the header counts 2999 tokens"),
    "zero count": (put(8, 0), "counts 0 tokens"),
    "header only": (
        lambda path: path.write_bytes(make_header(0, np.dtype("<u2"))),
        "counts 0 tokens, expected at least",
    ),
    "negative count": (put(8, -1), "counts -1 tokens"),
    "odd size": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "7025 bytes, but the header counts 3000"),
    "odd bare size": (lambda path: path.write_bytes(b"\1" * 2001), "odd size of 2001 bytes"),
    "large id": (put(1024 + 2 * 77, 257, "<H"), "token 77 is id 257, but the tokenizer has 257 ids"),
    "large last id": (put(1024 + 2 * 2999, 65535, "<H"), "token 2999 is id 65535"),
    "empty": (lambda path: path.write_bytes(b""), "the shard is empty"),
    "missing": (Path.unlink, "cannot be read"),
}


@pytest.mark.faults
@pytest.mark.parametrize("name", DAMAGES)
def test_x1_damage_is_named(prepared: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    path = prepared / "train_000000.bin"
    damage(path)
    with pytest.raises(DataError, match=message) as error:
        open_shard(str(path), TOKENIZER.vocab_size)
    assert error.value.exit_code == 65
    assert str(path) in str(error.value)
    with pytest.raises(DataError, match=str(path)):
        open_train(prepared)
    with pytest.raises(DataError, match=str(path)):
        tokens.verify(str(prepared))


@pytest.mark.faults
@pytest.mark.parametrize("name", [name for name in DAMAGES if name != "missing"])
def test_x1_damage_of_foreign_shards_is_named(prepared: Path, name: str) -> None:
    (prepared / "meta.json").unlink()
    damage, message = DAMAGES[name]
    damage(prepared / "train_000000.bin")
    with pytest.raises(DataError, match=message):
        open_train(prepared)
    with pytest.raises(DataError, match=message):
        tokens.verify(str(prepared), TOKENIZER)


@pytest.mark.faults
def test_x1_a_flipped_bit_is_found_by_its_hash(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(prepared / "train_000000.bin")
    with pytest.raises(DataError, match=r"train_000000\.bin: the shard is damaged \(sha256"):
        open_train(prepared)
    monkeypatch.setattr(tokens, "SMALL_BYTES", 0)
    assert open_train(prepared).tokens == 4700  # too much to hash at every start: verify does
    with pytest.raises(DataError, match=r"train_000000\.bin: the shard is damaged \(sha256"):
        tokens.verify(str(prepared))


@pytest.mark.faults
def test_x1_a_bare_file_in_place_of_a_prepared_one_is_found(prepared: Path) -> None:
    random_ids(3001, vocab_size=200).astype(np.uint16).tofile(prepared / "train_000000.bin")
    with pytest.raises(DataError, match=r"3001 tokens, but meta\.json counts 3000"):
        open_train(prepared)


def test_verify_names_every_damaged_shard(prepared: Path) -> None:
    tokens.verify(str(prepared))
    flip(prepared / "train_000001.bin")
    cut(prepared / "val_000000.bin")
    with pytest.raises(DataError) as error:
        tokens.verify(str(prepared))
    lines = str(error.value).splitlines()
    assert ["train_000001" in lines[0], "val_000000" in lines[1], len(lines)] == [True, True, 2]


def test_ids_in_the_middle_of_a_large_foreign_shard(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (prepared / "meta.json").unlink()
    put(1024 + 2 * 1500, 300, "<H")(prepared / "train_000000.bin")
    monkeypatch.setattr(tokens, "EDGE_TOKENS", 100)
    with pytest.raises(DataError, match="token 1500 is id 300"):
        open_train(prepared)
    monkeypatch.setattr(tokens, "SMALL_BYTES", 0)
    assert open_train(prepared).tokens == 4700  # found when it is read, and by verify
    with pytest.raises(DataError, match="token 1500 is id 300"):
        tokens.verify(str(prepared), TOKENIZER)


@pytest.mark.parametrize("at", [0, 99, 2900, 2999])
def test_opening_checks_both_ends(prepared: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(tokens, "EDGE_TOKENS", 100)
    put(1024 + 2 * at, 300, "<H")(prepared / "train_000000.bin")
    with pytest.raises(DataError, match=f"token {at} is id 300"):
        open_shard(str(prepared / "train_000000.bin"), TOKENIZER.vocab_size)


def test_check_ids_counts_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "CHUNK_BYTES", 20)
    ids = np.arange(100, dtype=np.uint16)
    tokens.check_ids("shard", ids, 100)
    with pytest.raises(DataError, match="shard: token 1093 is id 93"):
        tokens.check_ids("shard", ids, 93, start=1000)


@settings(max_examples=300, deadline=None)
@given(head=st.binary(max_size=1100), magic=st.sampled_from([b"", struct.pack("<2i", 20240520, 1)]))
def test_any_header_gives_ids_or_a_data_error(
    head: bytes, magic: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.bin"
    path.write_bytes(magic + head)
    with contextlib.suppress(DataError):
        assert len(open_shard(str(path), 65536)) > 0


def foreign(directory: Path, *names: str, first: int = 7) -> Path:
    for name in names:
        write_shard(directory / name, np.array([first, *random_ids(100)]))
    return directory


def test_llmc_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    find = tokens.glob.glob
    monkeypatch.setattr(tokens.glob, "glob", lambda pattern: sorted(find(pattern), reverse=True))
    names = ["fineweb_train_000002.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    foreign(tmp_path, *names, first=EOT)
    with caplog.at_level(logging.INFO, "gptjax"):
        split = open_train(tmp_path)
    assert [Path(path).name for path in split.paths] == sorted(names)[:2]
    assert (split.tokens, split.bytes, split.eot_position) == (202, 0, "first")
    assert [record.message.count("without meta.json") for record in caplog.records] == [1]
    assert open_split(str(tmp_path), "validation", tokenizer=TOKENIZER).tokens == 101


def test_nanogpt_directory(tmp_path: Path) -> None:
    for name in ("train.bin", "val.bin"):
        random_ids(50).astype(np.uint16).tofile(tmp_path / name)
    split = open_train(tmp_path)
    assert (split.tokens, split.eot_position) == (50, "last")
    assert open_train(tmp_path, eot_position="first").eot_position == "first"


def test_a_directory_without_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no meta.json and no \*train\*\.bin"):
        open_train(tmp_path)
    with pytest.raises(DataError, match="no such directory"):
        open_train(tmp_path / "nowhere")


def test_another_tokenizer_is_refused(prepared: Path) -> None:
    with pytest.raises(ConfigError, match=r"prepared with tokenizer 'bytes'.*data\.tokenizer='gpt2'"):
        open_split(str(prepared), "train", tokenizer=load_tokenizer("gpt2"))


def test_meta_is_read_as_written(prepared: Path) -> None:
    meta = tokens.read_meta(str(prepared))
    assert meta is not None
    assert meta.splits["train"].shards[1] == ShardMeta("train_000001.bin", 1700, meta.splits["train"].shards[1].sha256)
    tokens.write_meta(str(prepared), dataclasses.replace(meta, eot_position="first"))
    assert open_train(prepared).eot_position == "first"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2),
        ("vocab_size", "257"),
        ("vocab_size", -1),
        ("eot_position", "middle"),
        ("tokenizer_sha256", None),
        ("splits", []),
        ("splits", {"train": {"tokens": 1, "bytes": 1, "documents": 1, "shards": []}}),
        ("splits", {"train": {"tokens": 1, "bytes": 1, "documents": 1, "shards": [{"file": "../x"}]}}),
    ],
)
def test_a_damaged_meta_is_named(prepared: Path, key: str, value: object) -> None:
    path = prepared / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(DataError, match=r"meta\.json: damaged"):
        open_train(prepared)


def test_a_shard_outside_the_directory_is_refused(prepared: Path) -> None:
    path = prepared / "meta.json"
    path.write_text(path.read_text().replace("train_000001.bin", "../train_000001.bin"))
    with pytest.raises(DataError, match="plain file names"):
        open_train(prepared)


def test_a_missing_split_is_named(prepared: Path) -> None:
    with pytest.raises(DataError, match="no split 'test', only train, validation"):
        open_split(str(prepared), "test", tokenizer=TOKENIZER)


def test_released_shards_are_read_again(prepared: Path) -> None:
    shard = open_train(prepared).shards[0]
    before = shard.copy()
    tokens.release(shard)
    tokens.release(before)  # not mapped: nothing to do
    assert np.array_equal(shard, before)
