"""Patterns from files cannot hang or panic, and long runs of blanks are cut where the pattern cuts them."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken_ext.openai_public

from gptjax.config import Config, GPTConfig, TrainConfig
from gptjax.data import patterns
from gptjax.data.patterns import (
    CL100K,
    GPT2_FIRST,
    GPT2_PATTERN,
    KNOWN,
    LLAMA3,
    O200K,
    QWEN2,
    HostilePattern,
    check_pattern,
)
from gptjax.data.prepare import prepare
from gptjax.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from gptjax.errors import DataError, UnavailableError
from gptjax.setup import make_run
from tests.helpers import raises

BYTES = {bytes([byte]): byte for byte in range(256)}
# Of every kind that a pattern tells apart: blanks, line ends, letters of each case, digits, marks, and others.
LETTERS = [*" \t\n\r\xa0\u3000\u2028\x85\x0b\x1c", *"aAs'1\u0663!/\u0301日\u01c5é\0\u200b😀"]
GOES_BACK = r"\s+(?=x)|\s|\S+"  # each blank of a run is tried as the end of a piece, for each blank again
EXPONENTIAL = r"(?:x+x+)+(?=y)|(?s)."


def merging(pattern: str) -> Tokenizer:
    """Any two and three of LETTERS side by side merge, so that a cut in another place shows in the ids."""
    ranks = dict(BYTES)
    for x in LETTERS:
        for y in LETTERS:
            for token in (x + y).encode(), (x + y + x).encode():
                ranks.setdefault(token, len(ranks))
    return make_tokenizer("merging", pattern, ranks)


def save(folder: Path, **changes: object) -> str:
    saved = json.loads(load_tokenizer("bytes")._canonical()) | changes
    (folder / "saved.json").write_text(json.dumps(saved))
    return str(folder / "saved.json")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes too long does so in a second."""
    patterns._judge.cache_clear()
    monkeypatch.setattr(patterns, "SECONDS", 1)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The processes that were started."""
    found, run = [], subprocess.run

    def spy(command: list[str], **options: Any) -> Any:
        found.append(command)
        return run(command, **options)

    patterns._judge.cache_clear()
    monkeypatch.setattr(subprocess, "run", spy)
    return found


def test_known_patterns_equal_those_of_tiktoken(monkeypatch):
    recipes = tiktoken_ext.openai_public
    for download in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(recipes, download, lambda *names, **hashes: {})
    names = ("gpt2", "r50k_base", "cl100k_base", "o200k_base")
    theirs = [getattr(recipes, name)()["pat_str"] for name in names]
    assert theirs == [GPT2_PATTERN, GPT2_PATTERN, CL100K, O200K]


@pytest.mark.faults
@pytest.mark.parametrize("pattern", KNOWN)
def test_z1_a_known_pattern_passes_the_probe_and_needs_no_process(pattern, started):
    assert patterns._try(pattern, patterns.probe(pattern)) == ("", "")
    check_pattern(pattern)
    text = "a" + " b" * patterns.LONG
    assert make_tokenizer("known", pattern, BYTES).encode(text) == list(text.encode())
    assert started == []


@pytest.mark.faults
@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        *((pattern, "is empty") for pattern in ("a*", "", "^", r"(?!\s)|\s|\S", r"(?s).\K|x")),
        *(
            (pattern, "leaves out some")
            for pattern in ("q", r"\p{L}+", r"\w+|\s+", r"(?=a)|\s|\S", r"[\x00-\x{FFFF}]+")
        ),
        *((pattern, "tiktoken does not") for pattern in ("(", "(" * 100_000, r"((a{100}){100}){100}")),
        *(
            (pattern, "million steps")
            for pattern in (EXPONENTIAL, r"(\w+\s?)+(?=;)|(?s).", r"(?:ab|ba|a|b)+(?=;)|(?s).")
        ),
        (GOES_BACK, "a short text"),
    ],
    ids=range(17),
)
def test_z1_saved_tokenizer_with_an_unusable_pattern_is_refused(pattern, why, tmp_path, hasty, capfd):
    path = save(tmp_path, pattern=pattern)
    with raises(DataError, path, remedy="give gpt2, bytes", match=why) as error:
        load_tokenizer(path)
    assert str(error.value).isprintable()
    assert capfd.readouterr() == ("", "")  # Rust's own lines about a panic go nowhere


@pytest.mark.faults
@pytest.mark.parametrize("pattern", [r"(?s)[^\n]+|.", LLAMA3.replace("{1,3}", "{1,2}"), r"(?s)."])
def test_z1_custom_pattern_is_tried_in_one_process_only(pattern, tmp_path, started, monkeypatch):
    path, text = save(tmp_path, pattern=pattern), "some text,\n 12345 of it\u3000 é"
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])  # which is no string
    for _ in range(2):
        assert load_tokenizer(path).encode(text) == list(text.encode())
    assert len(started) == 1


@pytest.mark.faults
def test_z1_a_pattern_that_takes_too_much_memory_is_hostile(hasty, monkeypatch):
    monkeypatch.setattr(patterns, "MEMORY_BYTES", 2**20)
    with pytest.raises(HostilePattern, match="too much memory"):
        check_pattern("(?s)a|.")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("attribute", "value"),
    [("patterns._CHILD", "import no_such_module"), ("patterns.sys.executable", "/nothing/python")],
)
def test_z1_failed_trial_process_does_not_blame_the_pattern(attribute, value, tmp_path, hasty, monkeypatch):
    monkeypatch.setattr(f"gptjax.data.{attribute}", value)
    path = save(tmp_path, pattern="(?s).")
    with raises(UnavailableError, path):
        load_tokenizer(path)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("pattern", "text", "why"),
    [
        (LLAMA3 + "|x", "a" + " " * 1_100_000 + "b", "million steps"),
        (r"(?=.*z)z|(?s).", "a" * 200_000, "1 s to cut"),
        (EXPONENTIAL, "x" * 2000, "cannot cut"),
        ("a*", "ab", "cannot cut"),
        (r"\p{L}+", "a b", "leaves out some"),
        (r"[\x00-\x{FFFF}]+", "a😀", "leaves out some"),
    ],
)
def test_z1_a_text_that_a_pattern_cannot_cut_is_named(pattern, text, why, hasty, capfd):
    tokenizer = make_tokenizer("odd", pattern, BYTES)
    with raises(DataError, "two", match=f"tokenizer odd.*{why}"):
        tokenizer.encode_batch(["a", text], names=["one", "two"])
    assert len(text) < patterns.LONG or capfd.readouterr().err == ""


@pytest.mark.faults
def test_z1_tiktoken_is_called_only_through_the_guard():
    calls = re.compile(r"tiktoken\.Encoding\(|encoding\.\w+\(|_of_pieces\.\w+\(")
    sources = {path.name: path.read_text() for path in Path(patterns.__file__).parents[1].rglob("*.py")}
    assert {name: found for name, source in sources.items() if (found := calls.findall(source))} == {}


@pytest.mark.faults
def test_z1_a_panic_in_any_call_ends_in_the_documented_code():
    encoding = make_tokenizer("odd", "a*", BYTES).encoding
    with raises(patterns.Panic, match="range end index"):
        patterns.guarded(encoding.encode_ordinary, "ab")
    with pytest.raises(UnicodeEncodeError):
        patterns.guarded(encoding.encode_single_token, "\ud800")


@pytest.mark.faults
def test_z1_error_names_the_document_or_the_prompt(tmp_path):
    odd = make_tokenizer("odd", r"\p{L}+", BYTES)
    (tmp_path / "text").mkdir()
    for name in ("one", "two"):
        (tmp_path / "text" / f"{name}.txt").write_text("a" if name == "one" else "a b")
    with raises(DataError, "two.txt", match="tokenizer odd"):
        prepare(source=f"text:{tmp_path / 'text'}", tokenizer=odd, out=str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["text"]
    config = Config(model=GPTConfig(vocab_size=257), train=TrainConfig(sample_every=1, sample_prompt="a b"))
    with raises(DataError, "train.sample_prompt", match="tokenizer odd"):
        make_run(config, tokenizer=odd)


@pytest.mark.faults
def test_z1_text_with_lone_surrogates_is_encoded(hasty):
    tokenizer = make_tokenizer("other", r"(?s)[^\n]+|.", BYTES)
    for text in ("a\ud83d\ude00\n", "a\ud83d b", "\ude00" * patterns.LONG):
        assert bytes(tokenizer.encode(text)) == patterns.utf8(text)


CUTTING = [GPT2_PATTERN, GPT2_FIRST, CL100K, LLAMA3, QWEN2, O200K]


@pytest.mark.faults
@pytest.mark.parametrize("pattern", KNOWN)
def test_z2_cutting_long_blank_runs_does_not_change_ids(pattern, monkeypatch):
    monkeypatch.setattr(patterns, "LONG", 1)  # so that every run of two is cut
    tokenizer, draw, cuts = merging(pattern), random.Random(7), 0
    for _ in range(2000):
        kinds = LETTERS[:10] if draw.random() < 0.6 else LETTERS
        text = "".join(draw.choice(kinds) * draw.choice([1, 1, 2, 3, 7]) for _ in range(draw.randint(1, 14)))
        assert tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text), repr(text)
        cuts += sum(is_piece for _, is_piece in patterns.cut_long_blanks(pattern, text))
    assert (cuts > 500) is (pattern in CUTTING)


@pytest.mark.faults
@pytest.mark.parametrize("blank", [" ", "\t", " \t\n"])
def test_z2_million_blanks_get_the_ids_of_tiktoken(blank, gpt2):
    run, one = blank * (1_100_000 // len(blank)), gpt2.encoding.encode_ordinary
    expected = [*one("a"), *one(run[:-1])]  # tiktoken takes blanks at the end of a text
    for end in ("b", "1", "'s"):
        assert gpt2.encode(f"a{run}{end}") == [*expected, *one(run[-1] + end)]
    assert gpt2.encode(run) == one(run)


@pytest.mark.faults
@pytest.mark.parametrize("pattern", CUTTING)
def test_z2_no_known_pattern_panics_at_a_million_blanks(pattern):
    tokenizer, run = make_tokenizer("known", pattern, BYTES), " \t" * 550_000
    for text in (run, f"a\n{run}!", f"!{run}\n1"):
        assert bytes(tokenizer.encode(text)) == text.encode()


@pytest.mark.faults
@pytest.mark.parametrize("pattern", [GPT2_FIRST, LLAMA3, O200K])  # without possessive quantifiers
def test_z2_no_known_pattern_panics_at_a_million_other_characters(pattern):
    text = "".join(unit * (1_100_000 // len(unit)) + "\n" for unit in ("aA", "A", "1", "!", "日", "\u0301"))
    assert bytes(make_tokenizer("known", pattern, BYTES).encode(text)) == text.encode()


@pytest.mark.faults
def test_z2_a_file_with_a_million_blanks_is_prepared(tmp_path, gpt2):
    (tmp_path / "text").mkdir()
    for number in range(4):
        (tmp_path / "text" / f"{number}.txt").write_text(f"a{' ' * (1_100_000 + number)}b")
    prepare(source=f"text:{tmp_path / 'text'}", tokenizer=gpt2, out=str(tmp_path / "out"), val_fraction=0.5)
    ids = np.concatenate([np.fromfile(path, np.uint16)[512:] for path in sorted((tmp_path / "out").glob("*.bin"))])
    documents = [gpt2.decode(part) for part in np.split(ids, np.flatnonzero(ids == gpt2.eot_id) + 1)]
    assert sorted(len(document) for document in documents if document) == [1_100_015 + n for n in range(4)]
