"""Config files: found by path or name, extended, and refused with a reason."""

import json

import pytest

from gptjax.config import base_config, default_config, load
from gptjax.config_files import shipped_directory, shipped_names
from gptjax.errors import ConfigError
from tests.helpers import raises

HEAD = "from gptjax.config import base_config, default_config\n"


def write(path, body, head=HEAD):
    path.write_text(f"{head}def get_config():\n    c = default_config()\n    {body}\n    return c\n")
    return str(path)


def test_name_means_the_file_that_comes_with_gptjax(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("quickstart", {}) == load(str(shipped_directory() / "quickstart.py"), {})
    assert load("gpt2_xl", {"train.num_steps": 7}).train.num_steps == 7
    (tmp_path / "quickstart").mkdir()
    assert load("quickstart", {}).model.n_layer == 2, "a directory is no config file"
    with raises(ConfigError, "--config", value="quickstrat", remedy=", ".join(shipped_names())):
        load("quickstrat", {})


def test_file_of_that_name_wins_over_a_shipped_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "quickstart", "c.model.n_layer = 6")
    assert load("quickstart", {}).model.n_layer == 6


def test_config_file_begins_from_another(tmp_path):
    write(tmp_path / "a.py", "c.model.n_layer = 3")
    other = "c = base_config(__import__('pathlib').Path(__file__).with_name('a.py')); c.model.n_head = 4"
    path = write(tmp_path / "b.py", other)
    found = load(path, {})
    assert (found.model.n_layer, found.model.n_head) == (3, 4)
    (tmp_path / "config.json").write_text(json.dumps(found.to_dict() | {"run_id": "x"}))
    assert base_config(tmp_path / "config.json").to_dict() == found.to_dict()
    assert base_config("quickstart").data.tokenizer == "bpe:3200"
    assert default_config().model.vocab_size == 50257, "the defaults are unchanged"


def test_mistake_in_the_other_config_file_names_that_file(tmp_path):
    inner = write(tmp_path / "a.py", "c.model.n_layers = 3")
    with raises(ConfigError, "--config", value=inner, remedy="model.n_layer"):
        load(write(tmp_path / "b.py", f"c = base_config({inner!r})"), {})
    with raises(ConfigError, "--config", value="nothere"):
        load(write(tmp_path / "c.py", "c = base_config('nothere')"), {})
    path = write(tmp_path / "d.py", "c.model.n_head = 5")
    with raises(ConfigError, "model.n_head", value=5, remedy="nearest valid: 4, 6"):
        load(write(tmp_path / "e.py", f"c = base_config({path!r})"), {})


@pytest.mark.parametrize(
    ("body", "name", "remedy"),
    [
        ("c.model.n_layers = 3", "n_layers", "nearest: model.n_layer"),
        ("c.model.num_steps = 3", "num_steps", "nearest: train.num_steps"),
        ("c.modle.n_layer = 3", "modle", "nearest: model"),
        ("c['train']['log_evry'] = c.model.n_layer", "log_evry", "nearest: train.log_every"),
        ("c.model.n_layer = c.model.n_leyer", "n_leyer", "nearest: model.n_layer"),
        ("c.qqq = 1", "qqq", "gptjax config lists all fields"),
    ],
)
def test_wrong_field_in_a_config_file_names_the_nearest(body, name, remedy, tmp_path):
    path = write(tmp_path / "mine.py", body)
    with raises(ConfigError, "--config", value=path, remedy=remedy) as caught:
        load(path, {})
    assert caught.value.problem.endswith(f"no such config field: {name}")


@pytest.mark.parametrize(
    ("text", "problem", "remedy"),
    [
        *(
            (text, "no get_config", "default_config()")
            for text in ("x = 1", "get_config = 3", "def get_cfg(): pass", "")
        ),
        ("def get_config():\n    x = 1\n", "returns nothing", "returns it"),
        ("def get_config():\n    return 1 / 0\n", "ZeroDivisionError: division by zero", ""),
    ],
)
def test_file_that_gives_no_config_is_refused(text, problem, remedy, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with raises(ConfigError, "--config", value=str(path), remedy=remedy, match=problem):
        load(str(path), {})
