"""The text of data.mix, "data/web:70,data/code:30": directories of shards, and the weight of each."""

import decimal
import fractions
import math
import os
import re
from typing import NamedTuple

from gptjax.errors import ConfigError

LARGEST_SUM = 2**20  # of the weights as integers, so that sample numbers times weights fit 64 bits
WEIGHT = re.compile(r"[0-9]+(\.[0-9]+)?")
EXAMPLE = "data/web:70,data/code:30"


class Part(NamedTuple):
    """One directory of a mixture."""

    directory: str
    weight: int  # relative to the other parts
    name: str  # of its metrics


def parse_mix(text: str) -> tuple[Part, ...]:
    """Returns the parts of a mixture. Weights are integers or decimals; they become integers without a common divisor.

    >>> parse_mix("data/web:0.7,data/code:0.3")
    (Part(directory='data/web', weight=7, name='web'), Part(directory='data/code', weight=3, name='code'))

    Raises:
        ConfigError: it has another form, a weight is not positive, or a directory is named twice.
    """
    directories = []
    weights = []
    for item in text.split(","):
        directory, _, weight = item.strip().rpartition(":")
        if not directory or not WEIGHT.fullmatch(weight) or not decimal.Decimal(weight):
            raise ConfigError(
                f"expected directories with positive weights, such as {EXAMPLE}", field="data.mix", value=text
            )
        directories.append(directory)
        weights.append(fractions.Fraction(decimal.Decimal(weight)))
    paths = [os.path.abspath(os.path.expanduser(directory)) for directory in directories]
    if len(set(paths)) < len(paths):
        raise ConfigError("names a directory twice", field="data.mix", value=text)
    numbers = _as_integers(weights)
    if sum(numbers) > LARGEST_SUM:
        raise ConfigError(
            f"the weights are {':'.join(map(str, numbers))} as integers, and their sum must be at most {LARGEST_SUM}",
            field="data.mix",
            value=text,
            remedy="round them",
        )
    return tuple(map(Part, directories, numbers, _names(paths)))


def _as_integers(weights: list[fractions.Fraction]) -> list[int]:
    scale = math.lcm(*(weight.denominator for weight in weights))
    numbers = [int(weight * scale) for weight in weights]
    divisor = math.gcd(*numbers)
    return [number // divisor for number in numbers]


def _names(paths: list[str]) -> list[str]:
    """Returns the last part of each path; with the parts before it, or a number, where two have the same."""
    parts = [path.strip(os.sep).split(os.sep) for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{number}-{part[-1]}" for number, part in enumerate(parts, 1)]


def write_mix(parts: tuple[Part, ...]) -> str:
    """Returns the text of a mixture with absolute paths; "" if one of them has a comma, which the text cannot hold."""
    paths = [os.path.abspath(os.path.expanduser(part.directory)) for part in parts]
    if any("," in path for path in paths):
        return ""
    return ",".join(f"{os.path.abspath(os.path.expanduser(part.directory))}:{part.weight}" for part in parts)
