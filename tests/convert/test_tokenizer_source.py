"""data.tokenizer and --tokenizer: gptjax's own forms and Hugging Face's."""

import dataclasses
import json
import shutil

import pytest

from gptjax.convert import tokenizer_source
from gptjax.convert.tokenizer_files import write_tokenizer
from gptjax.convert.tokenizer_source import open_run_tokenizer, open_tokenizer
from gptjax.data.patterns import GPT2_PATTERN
from gptjax.data.tokenizer import load_tokenizer, make_tokenizer
from gptjax.errors import ConfigError, DataError
from tests.helpers import raises


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(a tokenizer with end-of-text at 0, a directory with it in every form)."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"th", b"the", b" the"]
    ranks = {token: number + 1 for number, token in enumerate(tokens)}
    tokenizer = make_tokenizer("mine", GPT2_PATTERN, ranks, specials={"<|endoftext|>": 0})
    directory = tmp_path_factory.mktemp("places")
    write_tokenizer(tokenizer, str(directory / "whole"), block_size=64)
    write_tokenizer(tokenizer, str(directory / "old"), block_size=64)
    (directory / "old" / "tokenizer.json").unlink()
    settings = directory / "old" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    (directory / "run").mkdir()
    tokenizer.save(str(directory / "run" / "tokenizer.json"))
    tokenizer.save(str(directory / "saved.json"))
    shutil.copy(directory / "whole" / "tokenizer.json", directory / "mine.json")  # of Hugging Face
    return tokenizer, directory


FORMS = ["whole", "whole/tokenizer.json", "old", "run", "run/tokenizer.json", "saved.json", "mine.json"]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_tokenizer_is_the_same_one(places, name, monkeypatch):
    tokenizer, directory = places
    opened = open_tokenizer(str(directory / name))
    assert opened.sha256 == tokenizer.sha256
    monkeypatch.chdir(directory / name if (directory / name).is_dir() else (directory / name).parent)
    relative = "." if (directory / name).is_dir() else (directory / name).name
    assert open_tokenizer(relative).ranks() == tokenizer.ranks()
    assert open_tokenizer(f"hf:{relative}").ranks() == tokenizer.ranks(), "as --from=hf: takes a directory"


@pytest.mark.parametrize("name", ["model", "added_tokens", '"model"'])
def test_saved_tokenizer_may_be_named_like_a_huggingface_key(tmp_path, name):
    """A directory called model gives its name to the tokenizer in it."""
    saved = dataclasses.replace(load_tokenizer("bytes"), name=name)
    saved.save(str(tmp_path / "tokenizer.json"))
    assert open_tokenizer(str(tmp_path)).sha256 == saved.sha256
    assert open_tokenizer(str(tmp_path / "tokenizer.json")).sha256 == saved.sha256


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        *((name, "no such file or directory") for name in ("hf:./nothing", "hf:/nothing", "hf:a/b/c")),
        ("it.json", ""),
        (".", "no tokenizer: "),
    ],
)
def test_path_without_a_tokenizer_reaches_no_server(name, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizer_source.hub, "download", lambda *of, kind: pytest.fail("a connection"))
    with raises(ConfigError, "data.tokenizer", value=name, match=problem):
        open_tokenizer(name)


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_built_in_names_win_over_directories(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert open_tokenizer(name).sha256 == load_tokenizer(name).sha256


@pytest.mark.parametrize("text", ['{"model": {', '{"model": 3}', '{"x": 1}', ""])
def test_damaged_tokenizer_file_is_refused_by_its_name(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(DataError) as caught:
            open_tokenizer(str(place))
        assert str(tmp_path) in caught.value.field


def test_tokenizer_of_the_hub_has_the_name_of_its_repository(places, tmp_path):
    """Not that of the commit, which changes with any file of the repository."""
    snapshot = tmp_path / "models--me--it" / "snapshots" / ("0" * 40)
    shutil.copytree(places[1] / "whole", snapshot)
    (snapshot / "tokenizer_config.json").unlink()  # with the name that gptjax stored
    assert open_tokenizer(str(snapshot)).name == "it"


@pytest.fixture
def asked(monkeypatch, places):
    """The names for which a connection was made; each answer is the tokenizer of `places`."""
    names = []
    answer = (str(places[1] / "whole"), "c0ffee")
    monkeypatch.setattr(tokenizer_source.hub, "download", lambda *of, kind: names.append(of) or answer)
    return names


def test_hub_tokenizer_connects_at_a_runs_first_start_only(places, asked, tmp_path):
    tokenizer, _ = places
    assert open_run_tokenizer("hf:me/it@v1", str(tmp_path)).sha256 == tokenizer.sha256
    assert asked == [("me/it", "v1")]
    load_tokenizer("bytes").save(str(tmp_path / "tokenizer.json"))  # another one, to see which is taken
    (tmp_path / "config.json").write_text(json.dumps({"data": {"tokenizer": "hf:me/it@v1"}}))
    assert open_run_tokenizer("hf:me/it@v1", str(tmp_path)).name == "bytes"
    assert len(asked) == 1


@pytest.mark.parametrize("recorded", ['{"data": {"tokenizer": "hf:me/other"}}', '{"data": 3}', "{", ""])
def test_copy_of_another_tokenizer_is_not_taken(places, asked, tmp_path, recorded):
    load_tokenizer("bytes").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(recorded)
    assert open_run_tokenizer("hf:me/it", str(tmp_path)).sha256 == places[0].sha256
    assert len(asked) == 1


def test_run_with_another_tokenizer_ignores_the_copy(tmp_path):
    load_tokenizer("bytes").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"data": {"tokenizer": "gpt2"}}))
    assert open_run_tokenizer("gpt2", str(tmp_path)).name == "gpt2"
