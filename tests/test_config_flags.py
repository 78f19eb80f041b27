"""--config and the flags of its fields."""

import pytest

from gptjax import config_flags
from gptjax.cli import Parser
from gptjax.config_files import shipped_names
from gptjax.errors import ConfigError
from tests.helpers import raises


def parser() -> Parser:
    made = Parser("what it does")
    made.add_argument("--workdir")
    return made


def parse(*arguments: str) -> tuple[str, dict[str, str]]:
    made = parser()
    config_flags.add_config_flag(made)
    args, overrides = config_flags.parse_config_flags(made, list(arguments))
    return args.config, overrides


def test_overrides_come_in_one_argument_or_two():
    arguments = ["--config.model.n_layer=6", "--config.data.source", "text:a=b", "--config.init_from="]
    expected = {"model.n_layer": "6", "data.source": "text:a=b", "init_from": ""}
    assert config_flags.parse_overrides(parser(), arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "problem", "remedy"),
    [
        (["--config.model.n_layer"], "model.n_layer=VALUE", ""), (["--config.a", "--config.b=1"], "a=VALUE", ""),
        (["--wokdir=x"], "no such flag", "nearest: --workdir"), (["stray"], "no such flag", ""),
        *(([flag], "no such flag", "`gptjax config` lists the fields") for flag in ("-x", "--steps=3")),
    ],
)  # fmt: skip
def test_invalid_arguments_are_refused(arguments, problem, remedy):
    with raises(ConfigError, arguments[0], remedy=remedy, match=problem):
        config_flags.parse_overrides(parser(), arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config=quickstart", "--config.data.seed=3"], ["--config", "quickstart", "--config.data.seed", "3"],
        ["quickstart", "--config.data.seed=3"], ["--config.data.seed", "3", "--workdir", "x", "quickstart"],
    ],
)  # fmt: skip
def test_config_is_a_flag_or_stands_alone(arguments):
    assert parse(*arguments) == ("quickstart", {"data.seed": "3"})


def test_missing_config_lists_those_that_come_with_gptjax():
    with raises(ConfigError, "--config", remedy=", ".join(shipped_names())):
        parse("--config.data.seed=3")
    with raises(ConfigError, "--config", match="twice: a, b"):
        parse("b", "--config=a")


@pytest.mark.parametrize(
    ("flag", "remedy"),
    [
        ("--train.num_steps=10", "--config.train.num_steps=10"),
        ("--num_steps=10", "--config.train.num_steps=10"),
        ("--num_steps", "write --config.train.num_steps"),
        ("-n_layer=2", "--config.model.n_layer=2"),
        ("--seed=1", "--config.data.seed=1 or --config.train.seed=1"),
        ("--workdirr=1", "nearest: --workdir"),
    ],
)
def test_field_without_config_prefix_is_refused_with_its_flag(flag, remedy):
    with raises(ConfigError, flag, remedy=remedy):
        parse("quickstart", flag)
