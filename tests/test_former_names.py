"""A renamed config field keeps its former name in config files, flags, config.json and records, with one warning."""

import copy
import json

import pytest

from gptjax import config, former_names
from gptjax.config import Config, default_config, flatten, from_dict, load
from gptjax.replay.__main__ import parse_flags
from gptjax.resume import compare_configs

OLD = {"compute.unroll": 2, "train.nan_limit": 7, "train.barrier_seconds": 30.0, "train.watchdog_seconds": 60.0}


@pytest.fixture(autouse=True)
def _no_warning_given_yet():
    former_names._warn.cache_clear()


def nested(values):
    found = {}
    for name, value in values.items():
        section, field = name.split(".")
        found.setdefault(section, {})[field] = value
    return found


def expect(found, said, *, warned=True):
    assert {old: flatten(found)[new] for old, new in former_names.RENAMED.items()} == OLD
    lines = [f"{old} is now {new}; the former name still works" for old, new in former_names.RENAMED.items()]
    assert said == lines * warned


def test_every_former_name_leads_to_a_field():
    assert set(OLD) == set(former_names.RENAMED)
    assert set(former_names.RENAMED.values()) <= set(flatten(Config()))
    assert not set(former_names.RENAMED) & set(flatten(Config()))
    assert len({old.rpartition(".")[2] for old in former_names.RENAMED}) == len(former_names.RENAMED)


@pytest.mark.parametrize("assignment", ["c.{} = {}", "c.update_from_flattened_dict({{'{}': {}}})"])
def test_config_files_assign_former_names(assignment, tmp_path, said):
    lines = [assignment.format(name, value) for name, value in OLD.items()]
    body = "\n    ".join(["c = default_config()", *lines, "return c"])
    (tmp_path / "a.py").write_text(f"from gptjax.config import default_config\ndef get_config():\n    {body}\n")
    expect(load(str(tmp_path / "a.py"), {}), said)


@pytest.mark.parametrize(
    ("name", "text", "flags"),
    [
        ("a.py", f"def get_config():\n    return {nested(OLD)}\n", {}),
        ("a.py", "from gptjax.config import default_config as get_config\n", {n: str(v) for n, v in OLD.items()}),
        ("config.json", json.dumps(nested(OLD)), {}),
    ],
    ids=["a plain dict", "flags", "config.json"],
)
def test_configs_and_flags_take_former_names(name, text, flags, tmp_path, said):
    (tmp_path / name).write_text(text)
    expect(load(str(tmp_path / name), flags), said)


def test_replay_takes_former_names(said):
    flags = [f"--config.{name}={value}" for name, value in OLD.items()]
    _, overrides = parse_flags(["--workdir=x", "--step=1", *flags])
    assert list(overrides) == list(former_names.RENAMED.values())
    assert len(said) == len(OLD)


def test_records_with_former_names_report_no_change(said):
    new = from_dict(nested(OLD))
    expect(new, said, warned=False)
    compare_configs(nested(OLD), new)
    assert said == []


def test_the_current_name_wins():
    both = {"compute": {"unroll": 2, "scan_unroll": 3}}
    assert from_dict(both).compute.scan_unroll == 3


def test_a_config_dict_is_read_by_former_names():
    made = default_config()
    made.compute.unroll = 5
    assert made.compute.unroll == made.compute.scan_unroll == made["compute"]["unroll"] == 5
    assert copy.deepcopy(made).compute.unroll == 5
    made.update({"compute": {"unroll": 6}})
    assert made.to_dict()["compute"]["scan_unroll"] == 6
    with pytest.raises(AttributeError, match="unrol"):
        made.compute.unrol = 1
    assert "unroll" not in config.Config().to_dict()["compute"]
