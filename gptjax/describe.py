"""Describes the config fields: `gptjax config` lists them all, `gptjax config quickstart` prints a resolved config.

gptjax config                          every field with its default, its choices and its meaning
gptjax config quickstart               every value of a config, as JSON
gptjax config quickstart --config.train.num_steps=10 > mine.json     writes a config for --config=mine.json
"""

import ast
import dataclasses
import inspect
import io
import json
import math
import textwrap
import tokenize
from typing import Any

from gptjax import config as config_module
from gptjax.cli import Parser, run_cli
from gptjax.config import BOUNDS, CHOICES, Config, load
from gptjax.config_flags import add_config_flag, parse_config_flags
from gptjax.config_values import Value
from gptjax.redaction import say

WIDTH = 100  # columns of the list on a terminal


@dataclasses.dataclass(frozen=True)
class Field:
    """One config field."""

    name: str  # dotted, such as train.num_steps
    default: Value
    allowed: str  # choices or bounds, "" if every value of the type is allowed
    meaning: str


@dataclasses.dataclass(frozen=True)
class Section:
    """The fields of one section of the config; `name` is "" for those outside any section."""

    name: str
    meaning: str
    fields: tuple[Field, ...]


def sections() -> list[Section]:
    """Returns every config field, in the order of gptjax/config.py."""
    comments = _comments(inspect.getsource(config_module))
    found = []
    alone = []
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.type):
            kind: Any = field.type
            inner = dataclasses.fields(kind)
            described = [_field(f"{field.name}.{f.name}", f.default, comments[kind.__name__, f.name]) for f in inner]
            found.append(Section(field.name, inspect.getdoc(kind) or "", tuple(described)))
        else:
            alone.append(_field(field.name, field.default, comments["Config", field.name]))
    return [*found, Section("", "", tuple(alone))]


def _field(name: str, default: Any, meaning: str) -> Field:
    allowed = ""
    if name in CHOICES:
        allowed = " | ".join(CHOICES[name])
    elif name in BOUNDS:
        bounds = BOUNDS[name]
        limits = {"at least": bounds.at_least, "below": bounds.below, "at most": bounds.at_most}
        allowed = ", ".join(f"{word} {limit}" for word, limit in limits.items() if math.isfinite(limit))
    elif isinstance(default, bool):
        allowed = "true | false"
    return Field(name, default, allowed, meaning)


def _comments(source: str) -> dict[tuple[str, str], str]:
    """Returns {(class, field): its comment}: the one behind the field, or the lines above it."""
    lines = source.splitlines()
    by_line = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field in node.body:
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            found[node.name, field.target.id] = by_line.get(field.lineno) or _comment_above(field.lineno, lines)
    return found


def _comment_above(line: int, lines: list[str]) -> str:
    """Returns the comment that ends right above `line`, which counts from 1."""
    comment: list[str] = []
    above = line - 2
    while lines[above].lstrip().startswith("#"):
        comment.insert(0, lines[above].strip().removeprefix("#").strip())
        above -= 1
    return " ".join(comment)


def as_text(found: list[Section]) -> str:
    """Returns the fields as lines for a terminal."""
    lines = []
    for section in found:
        if section.name:
            lines += [f"{section.name}: {section.meaning}", ""]
        for field in section.fields:
            flag = f"  --config.{field.name}={show(field.default)}"
            lines.append(f"{flag:<48}  {field.allowed}".rstrip())
            lines += textwrap.wrap(field.meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append("")
    return "\n".join(lines).rstrip()


def as_markdown(found: list[Section]) -> str:
    """Returns the page docs/config.md."""
    lines = [
        "# Config fields",
        "",
        "`gptjax config --markdown` writes this page from gptjax/config.py. A config file sets a field by",
        "`config.train.num_steps = 10`, a command by `--config.train.num_steps=10`.",
        "",
    ]
    for section in found:
        lines += [f"## {section.name or 'Outside the sections'}", ""]
        if section.meaning:
            lines += [section.meaning, ""]
        lines += ["| field | default | allowed | meaning |", "|---|---|---|---|"]
        for field in section.fields:
            cells = (f"`{field.name}`", f"`{show(field.default)}`", field.allowed, field.meaning)
            lines.append(f"| {' | '.join(cell.replace('|', '&#124;').replace('<', '&lt;') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def show(value: Value) -> str:
    """Returns a value as a flag has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "''" if value == "" else str(value)


def main(arguments: list[str]) -> None:
    """Prints all config fields, or the values of one config.

    Raises:
        ConfigError: a flag, the config file or a value is wrong.
    """
    parser = Parser(__doc__)
    add_config_flag(parser)
    parser.add_argument("--markdown", action="store_true", help="Print the list of fields as docs/config.md has it.")
    if not arguments:
        say(as_text(sections()))
        return
    if arguments == ["--markdown"]:
        say(as_markdown(sections()).rstrip())
        return
    args, overrides = parse_config_flags(parser, arguments)
    say(json.dumps(load(args.config, overrides).to_dict(), indent=1))


def cli() -> None:
    """Runs the command, and exits with its code."""
    run_cli(main)


if __name__ == "__main__":
    cli()
