"""There is always a validation split, and data that no longer match their source are refused."""

import hashlib
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config import DataConfig
from gptjax.data.assign import Assignment, better_boundary, nearest, shares_of
from gptjax.data.meta import read_meta
from gptjax.data.prepare import ensure_prepared
from gptjax.data.tokens import open_split
from gptjax.errors import ConfigError, DataError
from tests.data.corpus import BYTES, documents_of, interrupted, prepared
from tests.helpers import raises


def tokens_of(out):
    return {split: open_split(str(out), split, tokenizer=BYTES).tokens for split in ("train", "validation")}


def write(folder, sizes, seed=0):
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for number, size in enumerate(sizes):
        (folder / f"{number:03d}.txt").write_text("".join(random.choice(list("abc \n"), size)))
    return f"text:{folder}"


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [2, 5, 40])
def test_few_documents_always_give_a_validation_split(tmp_path, count, seed):
    source = write(tmp_path / "text", [2000] * count, seed)
    prepared(source, tmp_path / "out")
    tokens = tokens_of(tmp_path / "out")
    assert tokens["validation"] >= 1025
    assert tokens["train"] >= 1025
    assert sum(tokens.values()) == 2001 * count
    if count == 40:
        assert tokens["validation"] < sum(tokens.values()) / 3


def test_too_small_split_gets_the_documents_nearest_to_the_boundary(tmp_path):
    source = write(tmp_path / "text", [300] * 30)
    lines = prepared(source, tmp_path / "out", val_fraction=0.01)
    assert any("too few, so it gets the documents nearest to it" in line for line in lines)
    texts = [path.read_text() for path in sorted((tmp_path / "text").iterdir())]
    hashes = [list(hashlib.sha256(text.encode()).digest()) for text in texts]
    shares = sorted(shares_of(np.array(hashes, np.uint8)).tolist())
    boundary = read_meta(str(tmp_path / "out")).options["boundary"]
    assert shares[3] < boundary <= shares[4], "four documents of 301 tokens are a window"
    assert tokens_of(tmp_path / "out") == {"train": 26 * 301, "validation": 4 * 301}


def test_enough_documents_are_assigned_as_ever(tmp_path):
    prepared(write(tmp_path / "text", [400] * 200), tmp_path / "out")
    assert read_meta(str(tmp_path / "out")).options["boundary"] == 0.05


@pytest.mark.parametrize("kind", ["text", "jsonl"])
@pytest.mark.parametrize("fraction", [0.1, 1e-6])
def test_single_document_is_divided_by_position(tmp_path, kind, fraction):
    text = "".join(f"line {number}\n" for number in range(3000))
    path = tmp_path / f"input.{kind}"
    path.write_text(text if kind == "text" else json.dumps({"text": text}))
    prepared(f"{kind}:{path}", tmp_path / "out", val_fraction=fraction)
    [train], [validation] = (documents_of(tmp_path / "out", split) for split in ("train", "validation"))
    assert train + validation == text, "its last part, and nothing twice"
    share = len(validation) / len(text)
    assert share == pytest.approx(0.1, abs=0.01) if fraction == 0.1 else 1024 <= len(validation) < 2400


def test_document_of_a_few_letters_is_divided_too(tmp_path):
    (tmp_path / "input.txt").write_text("ab")
    prepared(f"text:{tmp_path}/input.txt", tmp_path / "out")
    assert tokens_of(tmp_path / "out") == {"train": 2, "validation": 2}


@pytest.mark.parametrize("texts", [[], [""], ["a"], ["same", "same"]])
def test_text_that_cannot_be_divided_is_refused(tmp_path, texts):
    (tmp_path / "text").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    kind = DataError if texts else ConfigError
    with raises(kind, "data.source", value=f"text:{tmp_path}/text", remedy="add " if texts else ""):
        prepared(f"text:{tmp_path}/text", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_both_splits_keep_a_window_at_extreme_fractions(tmp_path, fraction):
    prepared(write(tmp_path / "text", [700] * 12), tmp_path / "out", val_fraction=fraction)
    assert min(tokens_of(tmp_path / "out").values()) >= 1025


def test_window_is_one_more_than_the_block_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "text", [100] * 60)
    path = ensure_prepared(DataConfig(source=source, tokenizer="bytes", val_fraction=1e-6), window=500)
    assert 500 <= tokens_of(path)["validation"] <= 606


def test_interrupted_preparation_keeps_the_better_boundary(tmp_path, monkeypatch):
    source = write(tmp_path / "text", [300] * 30)
    prepared(source, tmp_path / "whole", val_fraction=0.01)
    for groups in (4, 15, 6):  # twice in the first pass or at its end, once in the second
        with interrupted(monkeypatch, groups=groups, batch_bytes=600):
            prepared(source, tmp_path / "out", val_fraction=0.01)
    lines = prepared(source, tmp_path / "out", val_fraction=0.01)
    assert lines[0].startswith("continuing after")
    assert not any("starting over" in line for line in lines)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


# The arithmetic

documents = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 3000)), min_size=2, max_size=40)


@given(documents, st.floats(0.001, 0.999), st.integers(1, 2000))
def test_better_boundary_gives_each_split_as_much_as_possible(texts, boundary, window):
    def tokens_at(boundary):
        below = sum(count for share, count in texts if share < boundary)
        return {"validation": below, "train": sum(count for _, count in texts) - below}

    near = {
        "validation": nearest([text for text in texts if text[0] < boundary], boundary, window),
        "train": nearest([text for text in texts if text[0] >= boundary], boundary, window),
    }
    before = tokens_at(boundary)
    better = better_boundary(before, near, boundary=boundary, window=window)
    if min(before.values()) >= window:
        assert better is None
        return
    if better is None:
        return
    after = tokens_at(better)
    assert min(after.values()) > 0
    assert min(after.values()) >= min(window, min(before.values()))
    small = min(before, key=before.__getitem__)
    assert after[small] > before[small]


def test_single_assignment_ignores_the_hash():
    names, shares = ["a:start", "a:end"], np.array([0.0, 1.0])
    assert Assignment(0.05, is_single=True).is_validation(names, shares).tolist() == [False, True]
    assert Assignment(0.05).is_validation(names, shares).tolist() == [True, False]
    assert Assignment(0.05, names={"a:end"}).is_validation(names, shares).tolist() == [False, True]


# Stale data


def test_meta_records_options_and_files(tmp_path):
    prepared(write(tmp_path / "text", [2000] * 5), tmp_path / "out", val_fraction=0.3)
    meta = read_meta(str(tmp_path / "out"))
    assert meta.options == {
        "val_fraction": 0.3, "boundary": meta.options["boundary"], "is_single": False, "text_feature": "text",
        "encoding": "", "skip_bad": False, "shard_tokens": 100_000_000,
    }  # fmt: skip
    assert (meta.files["number"], meta.files["bytes"]) == (5, 10_000)


def add(folder):
    (folder / "new.txt").write_text("more")


def rename(folder):
    (folder / "000.txt").rename(folder / "00.txt")


def grow(folder):
    with open(folder / "000.txt", "a") as file:
        file.write("more")


@pytest.mark.parametrize(
    ("change", "said"),
    [(add, "from 5 files of 10,000 bytes, and there are 6 files of 10,004 bytes now"), (grow, "5 files of 10,004"),
     (rename, "other names or sizes")],
)  # fmt: skip
def test_changed_files_are_reported_and_never_trained_on_silently(tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    config = DataConfig(source=write(tmp_path / "text", [2000] * 5), tokenizer="bytes")
    path = ensure_prepared(config)
    assert ensure_prepared(config) == path
    change(tmp_path / "text")
    with raises(ConfigError, path, remedy=f"--config.data.path={path}", match=said):
        ensure_prepared(config)
    with raises(ConfigError, str(tmp_path / path), remedy="remove it and prepare again", match=said):
        prepared(config.source, path)
    assert ensure_prepared(DataConfig(source=config.source, path=path)) == path, "taken as it is"


def test_data_stay_usable_where_their_source_is_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = DataConfig(source=write(tmp_path / "text", [2000] * 5), tokenizer="bytes")
    path = ensure_prepared(config)
    (tmp_path / "text").rename(tmp_path / "elsewhere")
    assert ensure_prepared(config) == path


def test_changed_option_is_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "text", [2000] * 5)
    path = ensure_prepared(DataConfig(source=source, tokenizer="bytes"))
    with raises(ConfigError, path, match="with val_fraction=0.05, and val_fraction is 0.3 now"):
        ensure_prepared(DataConfig(source=source, tokenizer="bytes", val_fraction=0.3))


def test_data_of_earlier_versions_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = DataConfig(source=write(tmp_path / "text", [2000] * 5), tokenizer="bytes")
    path = pathlib.Path(ensure_prepared(config))
    meta = json.loads((path / "meta.json").read_text())
    del meta["options"], meta["files"]
    (path / "meta.json").write_text(json.dumps(meta))
    add(tmp_path / "text")
    assert ensure_prepared(config) == str(path)
