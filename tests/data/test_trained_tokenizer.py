"""bpe:N: a tokenizer that is trained on the training documents as they are prepared, stored and read with the data."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from gptjax import setup
from gptjax.config import Config, DataConfig, from_dict
from gptjax.convert.tokenizer_source import open_tokenizer, saved_tokenizer
from gptjax.data import own_tokenizer, readers, sections
from gptjax.data.dataset import Dataset
from gptjax.data.file_sources import open_files
from gptjax.data.own_tokenizer import divide
from gptjax.data.prepare import default_path, ensure_prepared, main, prepare
from gptjax.data.readers import Reading
from gptjax.data.tokenizer import Tokenizer, load_tokenizer
from gptjax.data.tokens import Split, open_split
from gptjax.errors import ConfigError
from gptjax.run_data import open_tokenizer_of
from gptjax.train_bpe import library
from gptjax.workdir import write_json
from tests.helpers import raises

pytestmark = pytest.mark.skipif(not library(), reason="no library that trains tokenizers is installed")

WORDS = ["the", "tokenizer", "of", "café", "numbers", "1234", "merging", "pairs\n", "  ", "日本語"]


def make_text(seed: int, words: int = 200) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number:02}.txt").write_text(make_text(number))
    return f"text:{tmp_path / 'text'}"


def run_config(source: str, *, vocab_size: int = 300, path: str = "", tokenizer: str = "bpe:300") -> Config:
    return from_dict(
        {
            "model": {"block_size": 16, "vocab_size": vocab_size, "n_layer": 1, "n_head": 1, "n_embd": 8},
            "data": {"source": source, "path": path, "tokenizer": tokenizer, "global_batch_size": 8},
        }
    )


def test_it_is_the_tokenizer_of_the_training_documents(source: str, tmp_path: Path) -> None:
    data = ensure_prepared(DataConfig(source=source, tokenizer="bpe:300"), window=17)
    assert data == default_path(source, "bpe:300")
    found = load_tokenizer(f"{data}/tokenizer.json")
    assert (found.name, found.vocab_size) == ("bpe:300", 300)
    prepare(source=source, tokenizer="bytes", out=str(tmp_path / "bytes"), window=17)
    as_bytes = load_tokenizer("bytes")
    texts = {}
    for split in ("train", "validation"):
        ours, theirs = open_split(data, split, tokenizer=found), open_split("bytes", split, tokenizer=as_bytes)
        ids = [found.decode_bytes(read_all(ours)), as_bytes.decode_bytes(read_all(theirs))]
        assert ids[0] == ids[1]
        texts[split] = ids[0].decode().split("<|endoftext|>")[:-1]
    trained = own_tokenizer.train_tokenizer(
        iter(texts["train"]), vocab_size=300, name="bpe:300", pattern=own_tokenizer.OWN_PATTERN
    )
    assert trained.sha256 == found.sha256
    everything = [*texts["train"], *texts["validation"]]
    of_everything = own_tokenizer.train_tokenizer(
        iter(everything), vocab_size=300, name="bpe:300", pattern=own_tokenizer.OWN_PATTERN
    )
    assert of_everything.sha256 != found.sha256, "the validation documents would make a difference"


def read_all(split: Split) -> np.ndarray:
    return np.concatenate([shard.read() for shard in split.shards])


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_name_is_enough_for_the_command_and_for_python(source: str, tmp_path: Path, capsys) -> None:
    main([f"--source={source}", "--tokenizer=bpe:300", "--out=a"])
    assert "training a tokenizer of 300 ids" in capsys.readouterr().out
    prepare(source=source, tokenizer="bpe:300", out="b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    main([f"--source={source}", "--tokenizer=bpe:300", "--out=a"])
    assert "training" not in capsys.readouterr().out, "it is there already"
    main(["--tokenizer=bpe:300", "--out=a", "--verify"])
    with raises(ConfigError, "data.tokenizer", value="bpe:301", match="a has the tokenizer 'bpe:300'"):
        main([f"--source={source}", "--tokenizer=bpe:301", "--out=a"])


def test_a_run_prepares_it_and_keeps_it(source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = run_config(source)
    with caplog.at_level(logging.INFO, "gptjax"):
        run = setup.make_run(config)
    assert caplog.text.count("training a tokenizer of 300 ids") == 1
    caplog.clear()
    with caplog.at_level(logging.INFO, "gptjax"):
        assert setup.make_run(config).tokenizer.sha256 == run.tokenizer.sha256
    assert "training a tokenizer" not in caplog.text
    # The copy in the work directory serves when the data are gone, and text that was added does not change it.
    (tmp_path / "run").mkdir()
    assert saved_tokenizer("bpe:300", "run") is None
    write_json("run/config.json", value=config.to_dict())
    run.tokenizer.save("run/tokenizer.json")
    shutil.rmtree("data")
    (tmp_path / "text/more.txt").write_text("entirely different text " * 500)
    saved = saved_tokenizer("bpe:300", "run")
    assert saved is not None
    assert saved.sha256 == run.tokenizer.sha256
    assert setup.make_run(config, tokenizer=saved).tokenizer.sha256 == saved.sha256
    assert load_tokenizer(f"{default_path(source, 'bpe:300')}/tokenizer.json").sha256 == saved.sha256
    assert saved_tokenizer("bpe:301", "run") is None, "another name is another tokenizer"


def test_little_text_has_fewer_ids_than_the_model(source: str, tmp_path: Path) -> None:
    config = run_config(source, tokenizer="bpe:5000", vocab_size=5000)
    run = setup.make_run(config)
    assert 300 < run.tokenizer.vocab_size < 5000
    assert run.token_bytes_V.shape == (run.tokenizer.vocab_size,)
    state = run.init()
    assert isinstance(run.validation_data, Dataset)
    tokens = run.validation_data.validation_batch(0, sharding=run.batch_sharding, num_microbatches=1)
    assert np.isfinite(float(run.eval_step(state.params, tokens, run.token_bytes_V)[0].loss))


@pytest.mark.parametrize("vocab_size", [299, 301])
def test_the_model_must_have_as_many_ids(source: str, tmp_path: Path, vocab_size: int) -> None:
    with raises(ConfigError, "model.vocab_size", value=vocab_size, remedy="set model.vocab_size=300"):
        setup.make_run(run_config(source, vocab_size=vocab_size))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["bpe:", "bpe:257", "bpe:4096x", "bpe:-5", "bpe:1048577", "bpe:٤٠٩٦"])
def test_impossible_sizes_are_refused(source: str, name: str) -> None:
    with raises(ConfigError, "data.tokenizer", value=name, match="from 258 to 1048576"):
        prepare(source=source, tokenizer=name, out="x")
    assert not Path("x").exists()


def test_what_it_cannot_be_trained_on_is_refused(source: str, tmp_path: Path) -> None:
    with raises(ConfigError, "data.tokenizer", value="bpe:300", match="a pipe can be read once"):
        prepare(source="lines:-", tokenizer="bpe:300", out="x")
    with raises(ConfigError, "data.tokenizer", value="bpe:300", remedy="tokenizer.json of the data"):
        open_tokenizer("bpe:300")
    prepare(source=source, tokenizer="bytes", out="bytes")
    with raises(ConfigError, "data.tokenizer", value="bpe:300", match="has the tokenizer 'bytes'"):
        setup.make_run(run_config(source, path="bytes"))
    (tmp_path / "bytes/tokenizer.json").unlink()
    with raises(ConfigError, "data.tokenizer", value="bpe:300", match="has no tokenizer of its own"):
        setup.make_run(run_config(source, path="bytes"))
    with raises(ConfigError, "data.path", value="nothere", match="no data there"):
        setup.make_run(run_config(source, path="nothere"))
    wiki = DataConfig(source="tfds:wiki40b/en", tokenizer="bpe:300")
    with raises(
        ConfigError, default_path(wiki.source, "bpe:300"), match="downloads nothing", remedy="--tokenizer=bpe:300"
    ):
        open_tokenizer_of(Config(data=wiki))


def test_only_the_beginning_of_a_large_source_is_read(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(source)
    monkeypatch.setattr(own_tokenizer, "TRAINED_CHARACTERS", 2000)
    assert train(source).sha256 != whole.sha256


def train(source: str) -> Tokenizer:
    return open_tokenizer_of(Config(data=DataConfig(source=source, tokenizer="bpe:300")))


@pytest.mark.parametrize("count", [1, 9])
def test_long_texts_are_divided_in_sections_as_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    for number in range(count):
        (tmp_path / f"{number}.txt").write_text(f"document {number} of\nmany words " * 200)

    def divided() -> dict[bool, str]:
        found = {True: "", False: ""}
        for text, is_validation in divide(open_files("text", str(tmp_path), Reading()), 0.3):
            found[is_validation] += text
        return found

    expected = divided()
    assert all(expected.values())
    monkeypatch.setattr(readers, "LONG_TEXT", 1000)
    monkeypatch.setattr(sections, "SECTION", 700)
    assert divided() == expected
