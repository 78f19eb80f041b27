"""Characters as tokens, and nanoGPT's meta.pkl."""

import json
import os
import pathlib
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax import tokenizer as command
from gptjax.convert.beside import make_side_file
from gptjax.convert.tokenizer_files import write_tokenizer
from gptjax.convert.tokenizer_source import open_tokenizer
from gptjax.data.characters import CharTokenizer, load_meta_pickle, make_characters
from gptjax.data.prepare import prepare
from gptjax.data.tokenizer import load_tokenizer
from gptjax.data.tokens import open_split
from gptjax.documents import NO_EOT
from gptjax.errors import ConfigError, DataError
from tests.helpers import raises

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n日本\x00é"


@pytest.fixture
def saved(tmp_path):
    make_characters("mine", [TEXT]).save(str(tmp_path / "chars.json"))
    return str(tmp_path / "chars.json")


def nanogpt_meta(text):
    """What prepare.py of nanoGPT's shakespeare_char pickles."""
    characters = sorted(set(text))
    return {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: number for number, character in enumerate(characters)},
    }


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_text_survives_and_ids_follow_unicode(text):
    tokenizer = make_characters("mine", [text])
    assert tokenizer.characters == "".join(sorted(set(text)))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode_bytes(np.array(tokenizer.encode(text), np.uint16)) == text.encode()
    assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode())


def test_saved_form_is_loaded_by_every_way(saved, tmp_path):
    for name in (saved, str(tmp_path)):
        if name == str(tmp_path):
            os.rename(saved, tmp_path / "tokenizer.json")
        tokenizer = open_tokenizer(name)
        assert isinstance(tokenizer, CharTokenizer)
        assert tokenizer.encode(TEXT) == make_characters("x", [TEXT]).encode(TEXT)
        assert tokenizer.has_hash(make_characters("other", [TEXT]).sha256, "other")
        assert (tokenizer.eot_id, tokenizer.decode([tokenizer.start_id])) == (NO_EOT, "\n")


def test_unknown_character_is_named():
    tokenizer = make_characters("mine", ["abc"])
    with raises(DataError, "tokenizer mine", remedy="from all of the text", match=r"character '\\xe9' \(U\+00E9\)"):
        tokenizer.encode("abé")
    with raises(DataError, "third"):
        tokenizer.encode_batch(["a", "b", "d"], names=["first", "second", "third"])
    for ids in ([3], [-1]):
        with pytest.raises(KeyError):
            tokenizer.decode(ids)
    with raises(DataError, "--source"):
        make_characters("mine", [""])


@pytest.mark.parametrize(
    "change", [{"characters": "aa"}, {"characters": ""}, {"characters": 3}, {"name": None}, {"characters": "\ud800"}]
)
def test_damaged_saved_form_is_refused(saved, change):
    values = json.loads(pathlib.Path(saved).read_text()) | change
    pathlib.Path(saved).write_text(json.dumps(values))
    with raises(DataError, saved, match="not a saved tokenizer"):
        load_tokenizer(saved)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_meta_pickle_of_any_protocol_is_read_without_pickle(tmp_path, protocol):
    text = TEXT + "".join(map(chr, range(200, 900)))
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(nanogpt_meta(text), protocol))
    tokenizer = load_tokenizer(str(tmp_path / "meta.pkl"))
    assert tokenizer.encode(TEXT) == [nanogpt_meta(text)["stoi"][character] for character in TEXT]


def test_own_meta_pickle_is_read_by_pickle_and_back(tmp_path):
    tokenizer = make_characters("mine", [TEXT])
    side, line = make_side_file(tokenizer, "nanogpt", vocab_size=tokenizer.vocab_size)
    assert "meta.pkl" in line
    assert pickle.loads(side.content) == nanogpt_meta(TEXT)
    (tmp_path / "meta.pkl").write_bytes(side.content)
    assert load_meta_pickle(str(tmp_path / "meta.pkl")).characters == tokenizer.characters


class Hostile:
    def __reduce__(self):
        return os.system, ("true",)


META = nanogpt_meta("abc")
BAD_METAS = {
    "a class": META | {"stoi": Hostile()},
    "a list": META | {"itos": ["a", "b", "c"]},
    "a tuple": META | {"itos": ()},
    "no stoi": {"vocab_size": 3},
    "a gap": META | {"stoi": {"a": 0, "b": 2, "c": 3}},
    "longer tokens": META | {"stoi": {"aa": 0, "b": 1, "c": 2}},
    "another size": META | {"vocab_size": 4},
    "other itos": META | {"itos": {0: "b", 1: "a", 2: "c"}},
    "strings as ids": META | {"stoi": {"a": "0", "b": "1", "c": "2"}},
    "no dict": "abc",
}


@pytest.mark.faults
@pytest.mark.parametrize("name", BAD_METAS)
def test_v_meta_pickle_with_anything_else_is_refused(tmp_path, name):
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(BAD_METAS[name]))
    with raises(DataError, str(path), match=r"is not a meta\.pkl of characters"):
        load_meta_pickle(str(path))


@pytest.mark.faults
def test_v_damaged_meta_pickle_is_refused(tmp_path):
    path = tmp_path / "meta.pkl"
    whole = pickle.dumps(META)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with raises(DataError, str(path)):
            load_meta_pickle(str(path))
    for position in range(len(whole)):
        for bit in (1, 64):
            changed = bytearray(whole)
            changed[position] ^= bit
            path.write_bytes(changed)
            try:
                assert len(load_meta_pickle(str(path)).characters) == 3
            except DataError:
                continue


def test_documents_are_joined_without_a_separator(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number:02}").write_text(f"{number} is a document\n" * 20)
    command.main([f"--source=text:{tmp_path}/text", "--characters", f"--out={tmp_path}/chars.json"])
    tokenizer = load_tokenizer(str(tmp_path / "chars.json"))
    prepare(source=f"text:{tmp_path}/text", tokenizer=tokenizer, out=str(tmp_path / "out"), log=lambda line: None)
    texts = []
    for split in ("train", "validation"):
        opened = open_split(str(tmp_path / "out"), split, tokenizer=tokenizer)
        assert opened.eot.id == NO_EOT
        texts.append(tokenizer.decode(np.concatenate([shard.read() for shard in opened.shards])))
    assert sum(map(len, texts)) == sum(path.stat().st_size for path in (tmp_path / "text").iterdir())
    assert not any("<|" in text for text in texts)


def test_folder_of_nanogpt_needs_the_tokenizer_of_its_meta_pickle(tmp_path):
    """As data/shakespeare_char has it: train.bin, val.bin and meta.pkl."""
    meta = nanogpt_meta(TEXT)
    ids = np.array([meta["stoi"][character] for character in TEXT * 50], np.uint16)
    ids.tofile(tmp_path / "train.bin")
    ids[:500].tofile(tmp_path / "val.bin")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    tokenizer = load_tokenizer(str(tmp_path / "meta.pkl"))
    opened = open_split(str(tmp_path), "train", tokenizer=tokenizer)
    assert tokenizer.decode(opened.shards[0].read()) == TEXT * 50
    for other in (load_tokenizer("gpt2"), make_characters("mine", ["abc"])):
        with raises(ConfigError, "data.tokenizer", value=other.name, remedy=f"data.tokenizer={tmp_path}/meta.pkl"):
            open_split(str(tmp_path), "train", tokenizer=other)


def test_programs_without_characters_refuse_them_by_name(tmp_path):
    tokenizer = make_characters("mine", ["abc\n"])
    with raises(DataError, "tokenizer mine", match="cannot be written for transformers"):
        write_tokenizer(tokenizer, str(tmp_path), block_size=8)
    with raises(DataError, "tokenizer mine", remedy="nanogpt:", match="of characters, without the end-of-text"):
        make_side_file(tokenizer, "llmc", vocab_size=4)
    (tmp_path / "input.txt").write_text("abc")
    with raises(ConfigError, "--out", value="hf:x"):
        command.main([f"--source=text:{tmp_path}/input.txt", "--characters", "--out=hf:x"])
