"""gptjax tokenizer: trains on text, leaves validation documents out, and its result is used everywhere."""

import builtins
import json
import subprocess
import sys

import numpy as np
import pytest

from gptjax import tokenizer as command
from gptjax import train_bpe
from gptjax.convert.tokenizer_source import open_tokenizer
from gptjax.data.file_sources import open_files
from gptjax.data.prepare import prepare
from gptjax.data.readers import Reading
from gptjax.data.tokenizer import load_tokenizer
from gptjax.data.tokens import open_split
from gptjax.errors import ConfigError, UnavailableError
from tests.helpers import raises

WORDS = ["the", "tokenizer", "of", "café", "numbers", "1234", "merging", "pairs\n", "  ", "日本語"]


def make_texts(count=80, seed=0):
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, 200)) for _ in range(count)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text").mkdir()
    for number, text in enumerate(make_texts()):
        (tmp_path / "text" / f"{number:02}.txt").write_text(text)
    return tmp_path / "text"


def train(texts, vocab_size=300, **options):
    return command.train_tokenizer(iter(texts), vocab_size=vocab_size, name="mine", **options)


def hide_libraries(monkeypatch, *hidden):
    real = builtins.__import__

    def find(name, *rest):
        if name in hidden:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", find)


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k"])
def test_ranks_are_reproducible_and_ids_equal_those_of_the_library(pattern):
    rustbpe = pytest.importorskip("rustbpe")
    texts = make_texts()
    ours = train(texts, 400, pattern=pattern)
    assert train(texts, 400, pattern=pattern).ranks() == ours.ranks()
    theirs = rustbpe.Tokenizer()
    theirs.train_from_iterator(iter(texts), 399, pattern=ours.pattern)
    for text in make_texts(seed=1):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text


def test_special_tokens_follow_the_merges_and_are_never_encoded():
    tokenizer = train(make_texts(), 300, specials=["<|user|>", "<|assistant|>"])
    assert tokenizer.vocab_size == 300
    assert tokenizer.eot_id == 297
    assert dict(tokenizer.specials) == {"<|endoftext|>": 297, "<|user|>": 298, "<|assistant|>": 299}
    assert max(tokenizer.encode("<|user|> <|endoftext|>")) < 297


@pytest.mark.torch
def test_other_library_trains_the_same_form(monkeypatch):
    pytest.importorskip("tokenizers")
    texts = make_texts()
    expected = train(texts, 300)
    hide_libraries(monkeypatch, "rustbpe")
    other = train(texts, 300)
    assert other.vocab_size == 300
    text = make_texts(seed=1)[0]
    assert other.decode(other.encode(text)) == text
    assert len(other.encode(text)) == pytest.approx(len(expected.encode(text)), rel=0.02)


def test_missing_libraries_are_named(monkeypatch):
    hide_libraries(monkeypatch, "rustbpe", "tokenizers")
    with raises(UnavailableError, remedy="pip install rustbpe", match="no library that trains"):
        train(make_texts())


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k"])
def test_long_runs_of_blanks_are_trained_on(pattern):
    texts = ["word " + " " * 3_000_000 + "\n" * 200_000 + "word", " " * 1_500_000 + "word", *make_texts()]
    tokenizer = train(texts, 300, pattern=pattern)
    assert tokenizer.decode(tokenizer.encode(" " * 5000 + "word")) == " " * 5000 + "word"


@pytest.mark.parametrize("size", [0, 257, 2**21])
def test_vocabulary_of_an_impossible_size_is_refused(size):
    with raises(ConfigError, "--vocab_size", value=size):
        train(make_texts(), size)


def test_special_token_given_twice_is_refused():
    for names in (["a", "a"], ["<|endoftext|>"], [""]):
        with raises(ConfigError, "--special", value=" ".join(names)):
            train(make_texts(), specials=names)


def test_validation_documents_are_left_out_as_prepare_does(folder, tmp_path):
    tokenizer = load_tokenizer("bytes")
    prepare(source=f"text:{folder}", tokenizer=tokenizer, out=str(tmp_path / "out"), window=1, log=lambda line: None)
    split = open_split(str(tmp_path / "out"), "validation", tokenizer=tokenizer)
    kept = tokenizer.decode(np.concatenate([shard.read() for shard in split.shards]))
    source = open_files("text", str(folder), Reading())
    held_out = [text for text, is_validation in command.divide(source, 0.05) if is_validation]
    assert "".join(f"{text}<|endoftext|>" for text in held_out) == kept
    assert 0 < len(held_out) < 20


def test_last_part_of_a_single_document_is_left_out(tmp_path):
    (tmp_path / "input.txt").write_text("x" * 1000 + "y" * 50)
    source = open_files("text", str(tmp_path / "input.txt"), Reading())
    assert list(command.divide(source, 0.05)) == [("x" * 998, False), ("xx" + "y" * 50, True)]


def test_command_writes_a_tokenizer_that_training_takes(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [f"--source=text:{folder}", "--vocab_size=310", "--special=<|user|>"]
    command.main([*flags, "--out=mine.json"])
    said = capsys.readouterr().out
    assert "mine.json: 310 ids, " in said
    assert "bytes per token on" in said
    assert "(gpt2: " in said
    assert "use it: --config.data.tokenizer=mine.json --config.model.vocab_size=310" in said
    ours = load_tokenizer("mine.json")
    command.main([*flags, "--out=hf:theirs"])
    theirs = open_tokenizer("theirs")
    text = make_texts(seed=3)[0]
    assert theirs.encode(text) == ours.encode(text)
    assert json.loads((tmp_path / "theirs/tokenizer.json").read_text())["model"]["type"] == "BPE"
    for out in ("mine.json", "hf:theirs"):
        with raises(ConfigError, "--out", value=out):
            command.main([*flags, f"--out={out}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.json", "text", "theirs"]


def test_text_with_few_pairs_gives_fewer_ids(tmp_path, capsys):
    (tmp_path / "input.txt").write_text("ab " * 100)
    command.main([f"--source=text:{tmp_path}/input.txt", "--vocab_size=2000", f"--out={tmp_path}/mine.json"])
    said = capsys.readouterr().out
    size = load_tokenizer(str(tmp_path / "mine.json")).vocab_size
    assert 257 < size < 2000
    assert f"only {size} ids: the text has no more pairs to merge" in said


def test_pipe_is_refused_because_prepare_reads_it_again():
    with raises(ConfigError, "--source", value="lines:-"):
        command.main(["--source=lines:-", "--out=x.json"])


def test_command_needs_no_jax(folder, tmp_path):
    code = "import sys; from gptjax import tokenizer; tokenizer.main(sys.argv[1:]); print('jax' in sys.modules)"
    flags = [f"--source=text:{folder}", "--vocab_size=300", f"--out={tmp_path}/mine.json"]
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_library_is_found_without_importing_it():
    assert train_bpe.library() in ("rustbpe", "tokenizers", "")
