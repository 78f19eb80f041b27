"""transformers' AutoTokenizer makes our ids from our files, and we make its ids from its files."""

import functools
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.convert.tokenizer_files import read_tokenizer, write_tokenizer
from gptjax.data.patterns import CL100K, GPT2_PATTERN, LLAMA3
from gptjax.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, make_tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.torch

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  leading, trailing and\n\n\tmixed   white space \r\n ",
    "\r\n\r\n a\r\r\n\n  b \r\n\t\t\n",
    "don't we'll THEY'RE I'VE 's ''s '\u017f",
    "naïve café, Ωmega, 日本語のテキスト, русский, 👩‍👩‍👧‍👦, e\u0301\u0302, ß ẞ ﬀ",
    "x = 12345678 ** 0.5  # ?!@#$%^&*() ١٢٣ ² Ⅷ",
    "\x00\x01\x00\x7f\ufffd\u200b\u2028\u2029\x85\xa0\u3000\x0b\x0c \u180e",
    "a" * 500 + " " * 500 + "!" * 500 + "\n" * 500 + "1" * 500,
    "a  \nb\nc $  \n  d  ",
    " clean up . , ! ? n't 's these",
]
PATTERNS = {
    "cl100k": CL100K, "llama3": LLAMA3, "gpt2-like": GPT2_PATTERN, "lines": r"(?s)[^\n]+|.", "whole": "(?s).+",
    "ends": r"\s+$|\S+|\s",
}  # fmt: skip


def grow(pattern: str) -> Tokenizer:
    """Byte-pair encoding with enough merges for a wrong cut to show."""
    merged = [bytes(pair) for pair in zip(b"etaoinsh 1  \n\r", b"hnsnrgte 2 \n\n\n", strict=True)]
    merged += [b"  " * 2, b"  " * 4, b"11", b"1111", b" 12", b"\n\n\n\n", "é".encode(), b"'S", b"'Ss", b"\r\n\r\n"]
    tokens = [*(bytes([byte]) for byte in range(256)), *dict.fromkeys(merged)]
    return make_tokenizer("grown", pattern, {token: rank for rank, token in enumerate(tokens)})


def load(folder: Path) -> Any:
    """Returns what AutoTokenizer makes of the folder, without a word."""
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    said: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    finally:
        logger.removeHandler(handler)
    assert said == []
    return tokenizer


@functools.cache
def pair(name: str, root: Path) -> tuple[Tokenizer, Any]:
    ours = load_tokenizer(name) if name in ("gpt2", "bytes") else grow(PATTERNS[name])
    folder = root / name
    write_tokenizer(ours, str(folder), block_size=10_000)
    return ours, load(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


NAMES = ["gpt2", "bytes", *PATTERNS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_transformers_gives_our_ids_for_hard_texts(name, text, root, capfd):
    ours, theirs = pair(name, root)
    ids = theirs(text)["input_ids"]
    assert ids == ours.encode(text)
    assert theirs.decode(ids) == text
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100)
@given(text=st.text(max_size=60) | st.text("aeth1 '\r\n\t12sS.\u017f\x85", max_size=60))
def test_transformers_gives_our_ids_for_any_text(name, root, text):
    ours, theirs = pair(name, root)
    ids = theirs(text)["input_ids"]
    assert ids == ours.encode(text)
    assert theirs.decode(ids) == text


@pytest.mark.parametrize("name", ["gpt2", "cl100k"])
def test_transformers_gives_our_ids_for_every_character(name, root):
    ours, theirs = pair(name, root)
    letters = [chr(code) for code in range(0x20000) if not 0xD800 <= code < 0xE000]  # all planes took 25 s
    for start in range(0, len(letters), 1000):
        text = "".join(f"{letter}  {letter}1" for letter in letters[start : start + 1000])
        assert theirs(text, verbose=False)["input_ids"] == ours.encode(text)


def test_patterns_of_these_tests_give_different_ids():
    ids = {tuple(grow(pattern).encode("".join(TEXTS))) for pattern in PATTERNS.values()}
    assert len(ids) == len(PATTERNS) - 1  # Llama 3's is cl100k's without possessive quantifiers


@pytest.mark.parametrize("name", NAMES)
def test_end_of_text_is_bos_eos_and_unk_in_transformers(name, root):
    ours, theirs = pair(name, root)
    assert [theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id] == [ours.eot_id] * 3
    assert len(theirs) == ours.vocab_size
    assert theirs.model_max_length == 10_000
    assert theirs(f"a{END_OF_TEXT}b")["input_ids"] == [*ours.encode("a"), ours.eot_id, *ours.encode("b")]
    assert theirs(END_OF_TEXT, split_special_tokens=True)["input_ids"] == ours.encode(END_OF_TEXT)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_keeps_the_written_class_and_pre_tokenizer(name, root):
    ours, theirs = pair(name, root)
    wanted = "GPT2Tokenizer" if ours.pattern == GPT2_PATTERN else "TokenizersBackend"
    assert type(theirs).__name__ == wanted
    written = json.loads((root / name / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"]
    assert json.loads(theirs.backend_tokenizer.to_str())["pre_tokenizer"].keys() == written.keys()
    assert json.loads(theirs.backend_tokenizer.to_str())["pre_tokenizer"]["type"] == written["type"]


@pytest.mark.parametrize("name", NAMES)
def test_tokenizers_library_gives_our_ids_from_the_file(name, root):
    ours, _ = pair(name, root)
    theirs = tokenizers.Tokenizer.from_file(str(root / name / "tokenizer.json"))
    for text in TEXTS:
        assert theirs.encode(text).ids == ours.encode(text)
    assert theirs.decode([ours.eot_id], skip_special_tokens=True) == ""


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_resaved_by_transformers_keeps_its_hash(name, root, tmp_path):
    ours, theirs = pair(name, root)
    theirs.save_pretrained(str(tmp_path))
    again, _ = read_tokenizer(str(tmp_path))
    assert again.sha256 == ours.sha256


def test_padding_token_of_transformers_is_left_out(root, tmp_path):
    ours, _ = pair("gpt2", root)
    theirs = load(root / "gpt2")
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    theirs.save_pretrained(str(tmp_path))
    again, line = read_tokenizer(str(tmp_path))
    assert again.sha256 == ours.sha256
    assert "left out: '[PAD]'" in line


def train(folder: Path, *, special_first: bool) -> Any:
    """A tokenizer of their own, on the text of this test."""
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    special = [END_OF_TEXT] if special_first else []
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    theirs.add_special_tokens([END_OF_TEXT])
    folder.mkdir()
    theirs.save(str(folder / "tokenizer.json"))
    return theirs


def test_tokenizer_trained_by_tokenizers_gives_the_same_ids(tmp_path):
    theirs = train(tmp_path / "trained", special_first=False)
    ours, line = read_tokenizer(str(tmp_path / "trained"))
    assert line == "tokenizer 'trained', 601 tokens"
    for text in [*TEXTS, Path(__file__).read_text(encoding="utf-8").replace(END_OF_TEXT, "")]:
        assert ours.encode(text) == theirs.encode(text).ids


# name: special tokens before the tokens of text, the name of end-of-text, add_prefix_space
TRAINED = {
    "course": ([END_OF_TEXT], END_OF_TEXT, False),
    "run_clm_flax": (["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "</s>", False),
    "pad first": (["<pad>", END_OF_TEXT], END_OF_TEXT, True),
}


@pytest.mark.parametrize("name", TRAINED)
def test_tokenizer_trained_with_special_tokens_first_has_the_same_ids(name, tmp_path):
    """Both ways: tokenizers' own file is read, and what is written of it gives the same ids to both programs."""
    specials, eot, prefix_space = TRAINED[name]
    theirs = tokenizers.ByteLevelBPETokenizer(add_prefix_space=prefix_space)
    theirs.train_from_iterator(TEXTS * 3, vocab_size=400, min_frequency=2, special_tokens=specials)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours, _ = read_tokenizer(str(tmp_path))
    assert (ours.eot, ours.eot_id) == (eot, specials.index(eot))
    assert ours.vocab_size == theirs.get_vocab_size()
    write_tokenizer(ours, str(tmp_path / "again"), block_size=64)
    again = load(tmp_path / "again")
    assert (again.eos_token, again.eos_token_id) == (eot, ours.eot_id)
    for text in TEXTS:
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids == again(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids) == again.decode(ids)
    back, _ = read_tokenizer(str(tmp_path / "again"))
    assert back.sha256 == ours.sha256


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", None, "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("in_settings", [True, False, None])
@pytest.mark.parametrize("in_file", [True, False])
def test_prefix_space_is_that_of_transformers(kind, in_settings, in_file, tmp_path):
    theirs = tokenizers.ByteLevelBPETokenizer(add_prefix_space=in_file)
    theirs.train_from_iterator(TEXTS * 3, vocab_size=300, min_frequency=2, special_tokens=[END_OF_TEXT])
    theirs.save(str(tmp_path / "tokenizer.json"))
    stated = {"tokenizer_class": kind, "add_prefix_space": in_settings, "eos_token": END_OF_TEXT}
    values = {name: value for name, value in stated.items() if value is not None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    ours, _ = read_tokenizer(str(tmp_path))
    again = load(tmp_path)
    assert [ours.encode(text) for text in TEXTS] == [again(text)["input_ids"] for text in TEXTS]
    (tmp_path / "tokenizer_config.json").unlink()  # config.json alone makes it a model of GPT-2
    ours, _ = read_tokenizer(str(tmp_path))
    assert not ours.prefix_space
