"""The flags of a config: --config=NAME, and --config.section.field=VALUE."""

import argparse

from gptjax.cli import Parser
from gptjax.config import FIELD_TYPES
from gptjax.config_files import shipped_names
from gptjax.config_values import nearest_fields
from gptjax.errors import ConfigError, one_line

OVERRIDE = "--config."


def add_config_flag(parser: Parser) -> None:
    """Adds --config, which `parse_config_flags` reads."""
    parser.add_argument(
        "--config",
        default="",
        metavar="NAME",
        help="The config: the name of one that comes with gptjax, such as quickstart, the path of a config file, or "
        "config.json of a run. --config.train.num_steps=10 changes one field, and `gptjax config` lists all of them. "
        "There is no default.",
    )


def parse_config_flags(parser: Parser, arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Returns the command line, and the changed fields as {"model.n_layer": "6"}.

    The config may also stand alone: `quickstart` for --config=quickstart.

    Raises:
        ConfigError: a flag is wrong, or no config is given.
    """
    # argparse does not know the --config.section.field flags, so they end up in `rest`.
    args, rest = parser.parse_known_args(arguments)
    overrides, names = _split(parser, rest)
    given = [name for name in (args.config, *names) if name]
    if len(given) > 1:
        raise ConfigError(f"given twice: {', '.join(map(one_line, given))}", field="--config")
    if not given:
        raise ConfigError(
            "is required",
            field="--config",
            remedy=f"--config=FILE, or one that comes with gptjax: {', '.join(shipped_names())}",
        )
    args.config = given[0]
    return args, overrides


def parse_overrides(parser: Parser, arguments: list[str]) -> dict[str, str]:
    """Returns {"model.n_layer": "6"} for ["--config.model.n_layer=6"], or for the same as two arguments.

    Raises:
        ConfigError: an argument is of another form.
    """
    overrides, names = _split(parser, arguments)
    if names:
        raise parser.unknown(names[0])
    return overrides


def _split(parser: Parser, arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the overrides, and the arguments that stand alone.

    Raises:
        ConfigError: a flag is not known, or lacks its value.
    """
    overrides = {}
    alone = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            alone.append(argument)
            continue
        if not argument.startswith(OVERRIDE):
            raise _unknown(parser, argument)
        name, equals, value = argument.removeprefix(OVERRIDE).partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                flag = one_line(argument)
                raise ConfigError(f"needs a value, as in {flag}=VALUE", field=flag)
            value = rest.pop(0)
        overrides[name] = value
    return overrides, alone


def _unknown(parser: Parser, argument: str) -> ConfigError:
    """Returns the error for a flag that is not known; a config field without --config. is recognised."""
    error = parser.unknown(argument)
    name, equals, value = argument.lstrip("-").partition("=")
    fields = [field for field in nearest_fields(name, FIELD_TYPES) if field == name or field.endswith(f".{name}")]
    if not fields and name and not error.remedy:
        remedy = "`gptjax config` lists the fields, as in --config.train.num_steps=10"
        return ConfigError("no such flag", field=error.field, remedy=remedy)
    if not fields:
        return error
    flags = [f"{OVERRIDE}{field}{equals}{value}" for field in fields]
    return ConfigError("no such flag", field=error.field, remedy=f"write {' or '.join(flags)}")
