"""The command gptjax and its subcommands, and the list of config fields."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

import gptjax
from gptjax import __main__ as commands
from gptjax import cli, describe
from gptjax.config import FIELD_TYPES, from_dict
from gptjax.errors import ConfigError
from tests.helpers import raises

ROOT = pathlib.Path(__file__).parent.parent


def run(*arguments, expect=0):
    command = [sys.executable, "-m", "gptjax", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == expect, done.stderr
    return done


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_subcommand_is_listed_and_starts(name, monkeypatch, capsys):
    assert f"gptjax {name} " in commands.usage()
    monkeypatch.setattr("sys.argv", ["gptjax", name, "--help"])
    with pytest.raises(SystemExit) as ended:
        commands.cli()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: gptjax {name} ")


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_is_sentences_that_name_each_default(name, monkeypatch):
    parsers = []
    monkeypatch.setattr(cli.Parser, "print_help", lambda self, file=None: parsers.append(self))
    monkeypatch.setattr("sys.argv", ["gptjax", name, "--help"])
    with pytest.raises(SystemExit):
        commands.cli()
    (parser,) = parsers
    assert re.match(r"[A-Z][^`]*[:.]", parser.description), "a sentence first"
    assert "python -m" not in parser.description, "the command is named as it was called"
    assert ".py " not in parser.description, "a file that an installed gptjax does not show"
    formatter = parser._get_formatter()
    for action in parser._actions:
        text = formatter._expand_help(action)
        assert re.fullmatch(r"[A-Z].*\.", text), text
        if action.nargs != 0 and not action.required:
            assert "default" in text, text


def test_default_of_zero_is_printed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gptjax", "sample", "--help"])
    with pytest.raises(SystemExit):
        commands.cli()
    shown = " ".join(capsys.readouterr().out.split())
    assert "The seed of the random choices. The default is 0." in shown


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_command_without_a_subcommand_lists_them(arguments, capsys):
    commands.main(arguments)
    assert capsys.readouterr().out == f"{commands.usage()}\n"


def test_version_is_that_of_the_package(capsys):
    commands.main(["--version"])
    assert capsys.readouterr().out == f"gptjax {gptjax.__version__}\n"


@pytest.mark.parametrize(("name", "remedy"), [("trian", "nearest: train"), ("quickstart", "commands: train, prepare")])
def test_unknown_subcommand_names_the_nearest(name, remedy):
    with raises(ConfigError, name, remedy=remedy):
        commands.main([name])


def test_subcommand_shows_its_own_help_and_exit_code():
    assert run("train", "--help").stdout.startswith("usage: gptjax train ")
    assert run("train", "nothere", expect=2).stderr.startswith("error: --config=nothere: file not found; available: ")
    assert run("nothere", expect=2).stderr.startswith("error: nothere: no such command")


def test_flags_without_a_subcommand_train_with_a_note():
    for flags in (["--config=nothere"], ["--workdir=x", "--config", "nothere"]):
        note, error = run(*flags, expect=2).stderr.splitlines()
        assert note.startswith("note: ")
        assert "gptjax train" in note
        assert error.startswith("error: --config=nothere: file not found")


def test_config_command_prints_a_config_that_can_be_used_again(capsys):
    describe.main(["gpt2_xl", "--config.train.num_steps=7"])
    found = from_dict(json.loads(capsys.readouterr().out))
    assert (found.model.n_layer, found.train.num_steps) == (48, 7)


def test_every_config_field_has_default_allowed_values_and_meaning(capsys):
    fields = [field for section in describe.sections() for field in section.fields]
    assert [field.name for field in fields] == list(FIELD_TYPES)
    assert [field.name for field in fields if not field.meaning] == []
    describe.main([])
    printed = capsys.readouterr().out
    by_name = {field.name: field for field in fields}
    assert by_name["model.n_layer"] == describe.Field("model.n_layer", 12, "at least 1", "blocks")
    assert by_name["optim.beta1"].allowed == "at least 0, below 1"
    assert by_name["train.nan_policy"].meaning.startswith("The reaction to a non-finite step. Only rollback")
    assert by_name["log.tensorboard"].allowed == "true | false"
    assert all(f"--config.{field.name}={describe.show(field.default)}" in printed for field in fields)
    assert max(map(len, printed.splitlines())) <= 120


def test_page_of_config_fields_is_up_to_date():
    """`gptjax config --markdown > docs/config.md` writes it again."""
    assert (ROOT / "docs" / "config.md").read_text() == describe.as_markdown(describe.sections())
