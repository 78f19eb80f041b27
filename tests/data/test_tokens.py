"""Shards are read as they were written, and every damage ends in a DataError that names it."""

import dataclasses
import hashlib
import json
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptjax.data import tokens
from gptjax.data.header import make_header, token_dtype
from gptjax.data.meta import Meta, ShardMeta, SplitMeta, read_meta, write_meta
from gptjax.data.tokenizer import load_tokenizer
from gptjax.data.tokens import Split, open_shard, open_split
from gptjax.errors import ConfigError, DataError
from tests.helpers import raises

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
    write_meta(str(tmp_path), meta)
    return tmp_path


def open_train(directory: Path, **options: str) -> Split:
    return open_split(str(directory), "train", tokenizer=TOKENIZER, **options)


@pytest.mark.parametrize(
    ("vocab_size", "magic", "version", "width"), [(50257, 20240520, 1, 2), (70000, 20240801, 7, 4)]
)
def test_a_shard_is_read_as_written(vocab_size, magic, version, width, tmp_path):
    path, ids = tmp_path / "shard.bin", random_ids(5000, vocab_size=vocab_size)
    write_shard(path, ids, vocab_size)
    content = path.read_bytes()
    assert struct.unpack("<3i", content[:12]) == (magic, version, 5000)  # llm.c's dataloader.h
    assert not any(content[12:1024])
    assert content[1024:] == b"".join(int(i).to_bytes(width, "little") for i in ids)
    assert np.array_equal(open_shard(str(path), vocab_size).read(), ids)


def test_prepared_split_has_its_shards_tokens_and_bytes(prepared):
    split = open_train(prepared)
    assert [len(shard) for shard in split.shards] == [3000, 1700]
    assert np.array_equal(split.shards[1].read(), random_ids(1700, seed=1))
    assert (split.tokens, split.bytes, split.eot.position, split.vocab_size) == (4700, 4695, "last", 257)
    assert [Path(path).name for path in split.paths] == ["train_000000.bin", "train_000001.bin"]
    assert open_train(prepared, eot_position="first").eot.position == "first"


def test_fingerprint_depends_on_split_and_content(prepared, tmp_path_factory):
    first = open_train(prepared).fingerprint
    assert first == open_train(prepared).fingerprint
    assert first != open_split(str(prepared), "validation", tokenizer=TOKENIZER).fingerprint
    (prepared / "meta.json").unlink()
    foreign = open_train(prepared).fingerprint
    write_shard(prepared / "train_000001.bin", random_ids(1700, seed=9))
    assert len({first, foreign, open_train(prepared).fingerprint}) == 3


def cut(end: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[:end])


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
    "truncated": (cut(-100), "take 7024 bytes"),
    "truncated header": (cut(500), "at byte 500"),
    "wrong magic": (put(0, 123), "magic 123"),
    "wrong version": (put(4, 2), "version 2"),
    "wrong count": (put(8, 2999), "counts 2999"),
    "zero count": (put(8, 0), "counts 0"),
    "header only": (lambda path: path.write_bytes(make_header(0, np.dtype("<u2"))), "counts 0"),
    "negative count": (put(8, -1), "counts -1"),
    "odd size": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "7025 bytes"),
    "odd bare size": (lambda path: path.write_bytes(b"\1" * 2001), "odd size"),
    "large id": (put(1024 + 2 * 77, 257, "<H"), "token 77 is"),
    "large last id": (put(1024 + 2 * 2999, 65535, "<H"), "token 2999 is"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "missing": (Path.unlink, "cannot be read"),
}


@pytest.mark.faults
@pytest.mark.parametrize("name", DAMAGES)
def test_x1_damage_is_named(prepared, name):
    damage, problem = DAMAGES[name]
    path = prepared / "train_000000.bin"
    damage(path)
    with raises(DataError, str(path), match=problem):
        open_shard(str(path), TOKENIZER.vocab_size)
    for call in (open_train, lambda directory: tokens.verify(str(directory))):
        with raises(DataError, str(path)):
            call(prepared)
    (prepared / "meta.json").unlink()  # without which a shard that is missing is none
    for call in (open_train, lambda directory: tokens.verify(str(directory), TOKENIZER)) if name != "missing" else ():
        with raises(DataError, str(path), match=problem):
            call(prepared)


@pytest.mark.faults
def test_x1_a_flipped_bit_is_found_by_its_hash(prepared, monkeypatch):
    flip(prepared / "train_000000.bin")
    with raises(DataError, f"{prepared}/train_000000.bin", match="sha256"):
        open_train(prepared)
    monkeypatch.setattr(tokens, "SMALL_BYTES", 0)
    assert open_train(prepared).tokens == 4700  # too much to hash at every start: verify does
    with raises(DataError, f"{prepared}/train_000000.bin", match="sha256"):
        tokens.verify(str(prepared))


@pytest.mark.faults
def test_x1_headerless_file_in_place_of_a_shard_is_refused(prepared):
    random_ids(3001, vocab_size=200).astype(np.uint16).tofile(prepared / "train_000000.bin")
    with raises(DataError, f"{prepared}/train_000000.bin", match="counts 3000"):
        open_train(prepared)


def test_verify_names_every_damaged_shard(prepared):
    tokens.verify(str(prepared))
    flip(prepared / "train_000001.bin")
    cut(-100)(prepared / "val_000000.bin")
    damaged = [f"{prepared}/train_000001.bin", f"{prepared}/val_000000.bin"]
    with raises(DataError, damaged[0]) as caught:
        tokens.verify(str(prepared))
    assert [error.field for error in caught.value.errors] == damaged


def test_bad_id_inside_a_large_shard_is_found_by_verify(prepared, monkeypatch):
    (prepared / "meta.json").unlink()
    put(1024 + 2 * 1500, 300, "<H")(prepared / "train_000000.bin")
    monkeypatch.setattr(tokens, "EDGE_TOKENS", 100)
    with raises(DataError, f"{prepared}/train_000000.bin", match="token 1500 is"):
        open_train(prepared)
    monkeypatch.setattr(tokens, "SMALL_BYTES", 0)
    assert open_train(prepared).tokens == 4700  # found when it is read, and by verify
    with raises(DataError, f"{prepared}/train_000000.bin", match="token 1500 is"):
        tokens.verify(str(prepared), TOKENIZER)


@pytest.mark.parametrize("at", [0, 99, 2900, 2999])
def test_opening_checks_both_ends(prepared, monkeypatch, at):
    monkeypatch.setattr(tokens, "EDGE_TOKENS", 100)
    path = prepared / "train_000000.bin"
    put(1024 + 2 * at, 300, "<H")(path)
    with raises(DataError, str(path), remedy="restore the shard", match=f"token {at} is id 300"):
        open_shard(str(path), TOKENIZER.vocab_size)


def test_ids_are_checked_in_chunks(prepared, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK_BYTES", 20)
    shard = open_shard(str(prepared / "train_000000.bin"), TOKENIZER.vocab_size)
    tokens.check_all_ids(shard, TOKENIZER.vocab_size)
    put(1024 + 2 * 1093, 300, "<H")(prepared / "train_000000.bin")
    with raises(DataError, shard.path, match="token 1093 is"):
        tokens.check_all_ids(shard, TOKENIZER.vocab_size)


def test_bad_id_position_counts_from_the_shard_start():
    ids = np.arange(100, dtype=np.uint16)
    tokens.check_ids("shard", ids, 100)
    with raises(DataError, "shard", match="token 1093 is"):
        tokens.check_ids("shard", ids, 93, start=1000)


def foreign(directory: Path, *names: str, first: int = 7) -> Path:
    for name in names:
        write_shard(directory / name, np.array([first, *random_ids(100)]))
    return directory


def test_llmc_directory_is_opened_without_meta(tmp_path, caplog, monkeypatch):
    find = os.listdir
    monkeypatch.setattr(tokens.os, "listdir", lambda path: sorted(find(path), reverse=True))
    names = ["fineweb_train_000002.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    foreign(tmp_path, *names, first=EOT)
    with caplog.at_level(logging.INFO, "gptjax"):
        split = open_train(tmp_path)
    assert [Path(path).name for path in split.paths] == sorted(names)[:2]
    assert (split.tokens, split.bytes, split.eot.position) == (202, 0, "first")
    assert [record.message.count("without meta.json") for record in caplog.records] == [1]
    assert open_split(str(tmp_path), "validation", tokenizer=TOKENIZER).tokens == 101


def test_nanogpt_directory_is_opened_without_meta(tmp_path):
    for name in ("train.bin", "val.bin"):
        random_ids(50).astype(np.uint16).tofile(tmp_path / name)
    split = open_train(tmp_path)
    assert (split.tokens, split.eot.position) == (50, "last")
    assert open_train(tmp_path, eot_position="first").eot.position == "first"


def test_directory_without_shards_is_refused(tmp_path):
    for directory in (tmp_path, tmp_path / "nowhere"):
        with raises(DataError, str(directory)):
            open_train(directory)


def test_another_tokenizer_is_refused(prepared):
    with raises(ConfigError, "data.tokenizer", value="gpt2", remedy="set data.tokenizer", match="'bytes'"):
        open_split(str(prepared), "train", tokenizer=load_tokenizer("gpt2"))
    with raises(ConfigError, "data.tokenizer", value="bytes", match="another tokenizer"):
        open_split(str(prepared), "train", tokenizer=dataclasses.replace(load_tokenizer("gpt2"), name="bytes"))


def test_the_same_tokenizer_under_another_name_is_accepted(prepared):
    """Hugging Face's tokenizers are named after their directories."""
    renamed = dataclasses.replace(load_tokenizer("bytes"), name="copy")
    opened = open_split(str(prepared), "train", tokenizer=renamed)
    assert opened.fingerprint == open_train(prepared).fingerprint


def test_meta_is_read_as_written(prepared):
    meta = read_meta(str(prepared))
    assert meta.splits["train"].shards[1] == ShardMeta("train_000001.bin", 1700, meta.splits["train"].shards[1].sha256)
    write_meta(str(prepared), dataclasses.replace(meta, eot_position="first"))
    assert open_train(prepared).eot.position == "first"


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
def test_a_damaged_meta_is_named(prepared, key, value):
    path = prepared / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with raises(DataError, str(path)):
        open_train(prepared)


def test_shards_that_contradict_their_split_are_refused(prepared):
    """A wrong sum would change the windows of an epoch, and a shard that is listed twice its data."""
    path = prepared / "meta.json"
    original = json.loads(path.read_text())

    def refused(change, match):
        values = json.loads(json.dumps(original))
        change(values["splits"])
        path.write_text(json.dumps(values))
        with raises(DataError, str(path), match=match):
            open_train(prepared)

    def listed_twice(splits):
        splits["train"]["shards"].append(splits["train"]["shards"][0])
        splits["train"]["tokens"] += 3000

    def in_both(splits):
        splits["validation"] = splits["train"]

    wrong_sum = "split 'train' has tokens=4701, but its shards have 4700"
    refused(lambda splits: splits["train"].update(tokens=4701), wrong_sum)
    refused(lambda splits: splits["validation"].update(tokens=-1), "split 'validation' has tokens=-1")
    refused(listed_twice, "split 'train' lists 'train_000000.bin', which is listed before")
    refused(in_both, "split 'validation' lists 'train_000000.bin', which is listed before")
    refused(lambda splits: splits["train"]["shards"][1].update(file="../train_000001.bin"), "plain file names")


def test_a_missing_split_is_named(prepared):
    with raises(DataError, str(prepared), match="split 'test'"):
        open_split(str(prepared), "test", tokenizer=TOKENIZER)


def hash_ends(path: Path, size: int) -> list[str]:
    content = path.read_bytes()
    return [hashlib.sha256(part).hexdigest() for part in (content[:size], content[-size:])]


@pytest.mark.parametrize(("count", "edge"), [(3, 2**20), (65, 2**12)])
def test_fingerprint_without_meta_covers_names_sizes_and_ends(count, edge, tmp_path):
    """Another one would stop each run that trains on such data; of many shards, the old one is still known."""
    names = [f"train_{number:03d}.bin" for number in range(count)]
    for number, name in enumerate(names):
        write_shard(tmp_path / name, random_ids(10_000, seed=number))
    split = open_train(tmp_path)

    def fingerprint(size):
        known = [(n, (tmp_path / n).stat().st_size, *hash_ends(tmp_path / n, size)) for n in names]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    assert fingerprint(2**20) != fingerprint(2**12)
    assert split.fingerprint == fingerprint(edge)
    assert tokens.has_former_fingerprint(split, fingerprint(2**20)) is (edge != 2**20)
    assert not tokens.has_former_fingerprint(split, fingerprint(2**13))
    write_shard(tmp_path / names[2], random_ids(10_000, seed=99))
    assert open_train(tmp_path).fingerprint != split.fingerprint


def test_the_ends_of_many_shards_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "SMALL_BYTES", 0)
    monkeypatch.setattr(tokens, "EDGE_TOKENS_OF_ALL", 5000)
    for number in range(5):
        write_shard(tmp_path / f"train_{number}.bin", random_ids(5000, seed=number))
    put(1024 + 2 * 2000, 300, "<H")(tmp_path / "train_3.bin")
    assert open_train(tmp_path).tokens == 25_000  # 1,024 ids at each end, of shards that share 5,000
    put(1024 + 2 * 1000, 300, "<H")(tmp_path / "train_3.bin")
    with raises(DataError, f"{tmp_path}/train_3.bin", match="token 1000 is"):
        open_train(tmp_path)


# Files of other programs


def write_split(folder: Path, name: str, ids: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    if name.endswith(".npy"):
        np.save(path, ids)
    else:
        ids.tofile(path)
    return path


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_numpy_shards_are_a_format(tmp_path, dtype):
    ids = random_ids(3000, vocab_size=200)
    write_split(tmp_path, "edufineweb_train_000001.npy", ids.astype(dtype))
    write_split(tmp_path, "edufineweb_val_000000.npy", ids.astype(dtype)[:500])
    opened = open_split(str(tmp_path), "train", tokenizer=TOKENIZER)
    assert np.array_equal(opened.shards[0].read(), ids)
    assert open_split(str(tmp_path), "validation", tokenizer=TOKENIZER).tokens == 500
    tokens.verify(str(tmp_path), TOKENIZER)


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        (np.zeros(100, np.int64), "holds an array of <i8"),
        (np.zeros((10, 10), np.uint16), r"shape \(10, 10\)"),
        (np.zeros(100, np.float32), "holds an array of <f4"),
        (np.zeros(0, np.uint16), "counts 0 ids"),
    ],
)
def test_numpy_array_of_another_kind_is_refused(tmp_path, ids, problem):
    path = write_split(tmp_path, "train.npy", ids)
    with raises(DataError, str(path), match=problem):
        open_shard(str(path), TOKENIZER.vocab_size)


@pytest.mark.parametrize("size", [7, 9, 60, 127, 200])
def test_cut_numpy_file_is_refused(tmp_path, size):
    path = write_split(tmp_path, "train.npy", random_ids(300).astype(np.uint16))
    path.write_bytes(path.read_bytes()[:size])
    with raises(DataError, str(path)):
        open_shard(str(path), TOKENIZER.vocab_size)


def test_numpy_file_under_another_name_is_named(tmp_path):
    path = write_split(tmp_path, "train.npy", random_ids(300).astype(np.uint16)).rename(tmp_path / "train.bin")
    with raises(DataError, str(path), remedy="end in .npy", match="is a NumPy array"):
        open_shard(str(path), TOKENIZER.vocab_size)
    path = write_split(tmp_path, "val.bin", random_ids(300).astype(np.uint16)).rename(tmp_path / "val.npy")
    with raises(DataError, str(path), match="is no NumPy array, in spite of its name"):
        open_shard(str(path), TOKENIZER.vocab_size)


@pytest.mark.parametrize("dtype", [np.uint32, np.int32, np.int64, np.uint64])
@pytest.mark.parametrize("vocab_size", [65, 257, 50_257, 128_000])
def test_wider_ids_without_a_header_are_recognised(tmp_path, dtype, vocab_size):
    path = write_split(tmp_path, "train.bin", np.random.default_rng(0).integers(0, vocab_size, 5000).astype(dtype))
    bits = 8 * np.dtype(dtype).itemsize
    with raises(DataError, str(path), remedy="numpy.save", match=f"looks like ids of {bits} bits"):
        open_shard(str(path), vocab_size)


@pytest.mark.parametrize("vocab_size", [2, 8, 65, 257, 50_257])
@pytest.mark.parametrize(("seed", "count"), [(0, 5000), (1, 5000), (2, 5000), (3, 5000), (4, 3)])
def test_uint16_ids_of_any_vocabulary_are_taken(tmp_path, vocab_size, seed, count):
    """As nanoGPT writes them: without a header."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, count).astype(np.uint16)
    path = write_split(tmp_path, "train.bin", ids)
    assert np.array_equal(open_shard(str(path), vocab_size).read(), ids)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.bin", "train"), ("retrieval_train_0.bin", "train"), ("fineweb_val_000000.bin", "validation"),
        ("Training-01.npy", "train"), ("valid1.bin", "validation"), ("interval.bin", ""), ("trainset.bin", ""),
        ("constrained_val.bin", "validation"),
    ],
)  # fmt: skip
def test_splits_are_whole_words_of_a_name(tmp_path, name, split):
    write_split(tmp_path, name, random_ids(300).astype(np.uint16))
    for asked in ("train", "validation"):
        if asked == split:
            assert open_split(str(tmp_path), asked, tokenizer=TOKENIZER).tokens == 300
        else:
            with raises(DataError, str(tmp_path), remedy=f"its files: {name}", match=f"no {asked} split"):
                open_split(str(tmp_path), asked, tokenizer=TOKENIZER)


def test_file_of_both_splits_is_refused(tmp_path):
    path = write_split(tmp_path, "train_val.bin", random_ids(300).astype(np.uint16))
    with raises(DataError, str(path), match="says both train and validation"):
        open_split(str(tmp_path), "train", tokenizer=TOKENIZER)


def test_ids_far_below_the_vocabulary_are_reported(tmp_path, caplog):
    gpt2 = load_tokenizer("gpt2")
    write_split(tmp_path, "train.bin", random_ids(20_000, vocab_size=256).astype(np.uint16))
    write_split(tmp_path, "val.bin", random_ids(20_000, vocab_size=50_000).astype(np.uint16))
    with caplog.at_level("WARNING", "gptjax"):
        open_split(str(tmp_path), "train", tokenizer=gpt2)
        assert "go up to 255 only, and gpt2 has 50,257" in caplog.text
        caplog.clear()
        open_split(str(tmp_path), "validation", tokenizer=gpt2)
        open_split(str(tmp_path), "train", tokenizer=TOKENIZER)
        assert not caplog.text
