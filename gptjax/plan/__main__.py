"""Plans a run for hardware that you do not have: memory, communication, time and cost, before you rent anything.

    gptjax plan gpt2_xl --topology=v5e:16x16 --config.mesh.fsdp=64
    gptjax plan gpt2_small --topology=v5p:4x4x4 --search

The real TPU compiler (pip install 'gptjax[plan]') compiles the real train step; no TPU is needed. A GPU topology, as
--topology=h100:8 --slices=4 for four nodes of eight, is compiled where 'gptjax[cuda]' is installed, also without a GPU;
otherwise the figures come from formulas, and the report says so. --topology=local plans for this machine's devices.
"""

import argparse
import json
import math
import os
import pathlib
from typing import Any

from gptjax import config as config_module
from gptjax import gpu_memory
from gptjax.cli import Parser, run_cli
from gptjax.config_flags import add_config_flag, parse_config_flags
from gptjax.errors import ConfigError, UserError, WorkdirError
from gptjax.plan.topology import Topology, parse_topology
from gptjax.redaction import say

# Without these, libtpu asks a metadata server which TPUs this machine has, and there are none.
LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
}


def _make_parser() -> Parser:
    parser = Parser(__doc__)
    add_config_flag(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="KIND:SHAPE",
        help="The chips: v5e:4x4, v5p:4x4x4, h100:8, t4:1, ..., or local for those of this machine.",
    )
    parser.add_argument(
        "--slices",
        type=int,
        default=1,
        help="The number of TPU slices, or of GPU nodes, that the network joins.",
    )
    parser.add_argument(
        "--target_tokens",
        type=float,
        default=0,
        help="The number of tokens to train on. By default it is that of the config's steps.",
    )
    parser.add_argument(
        "--price_per_chip_hour",
        type=float,
        default=0,
        help="The price of one chip for one hour, in your currency. By default no cost is printed.",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="Rank the meshes, micro-batches and remat policies that fit, and plan the fastest.",
    )
    parser.add_argument(
        "--overlap",
        action="store_true",
        help="Also print how much of each collective the compiled schedule hides behind computation.",
    )
    parser.add_argument(
        "--json",
        default="",
        metavar="FILE",
        help="Also write the report to this file, or the error with its field, value and remedy. By default "
        "nothing is written.",
    )
    return parser


def _check_number(flag: str, value: float, *, minimum: int) -> None:
    if not math.isfinite(value) or value < minimum:
        raise ConfigError("must be a positive number", field=flag, value=value)


def command(found: dict[str, Any], args: argparse.Namespace) -> str:
    """Returns the command that trains with the candidate that a search found."""
    return f"python -m gptjax.main --config={args.config} {found['overrides']}"


def main(arguments: list[str]) -> None:
    """Plans a config, or searches for the best one, and prints the report.

    Raises:
        UserError: a flag or a config field is wrong, the compiler is missing, or nothing fits.
    """
    args, overrides = parse_config_flags(_make_parser(), arguments)
    try:
        found = _make_report(args, overrides)
    except UserError as error:
        if args.json:
            _write_json(args.json, {"error": _to_json(error)})
        raise
    # The file comes first, so that an error on standard output does not lose it.
    if args.json:
        _write_json(args.json, found)
    from gptjax.plan import report

    for line in report.describe(found):
        say(line)
    if args.overlap:
        for line in report.describe_overlap(found):
            say(line)
    if args.search:
        say(f"start it with: {command(found, args)}")


def _make_report(args: argparse.Namespace, overrides: dict[str, str]) -> dict[str, Any]:
    """Returns the report that the flags ask for. What can be checked without a compiler is checked first."""
    _check_number("--slices", args.slices, minimum=1)
    _check_number("--target_tokens", args.target_tokens, minimum=0)
    _check_number("--price_per_chip_hour", args.price_per_chip_hour, minimum=0)
    config = config_module.load(args.config, overrides)
    requested = _requested_topology(args)
    if requested is not None:
        _avoid_local_chips()
    else:
        _choose_gpu_memory()
    # JAX reads the environment when it is imported, so these imports come after it is set.
    from gptjax.plan import aot, search

    topology = requested or aot.find_local()
    make = search.search if args.search else search.plan
    return make(config, topology, args)


def _requested_topology(args: argparse.Namespace) -> Topology | None:
    """Returns the topology that the flags name, None for the devices of this machine.

    Raises:
        ConfigError: no such topology exists, or --slices contradicts it.
    """
    if args.topology != "local":
        return parse_topology(args.topology, args.slices)
    if args.slices > 1:
        raise ConfigError(
            "--topology=local finds its slices itself",
            field="--slices",
            value=args.slices,
            remedy="leave it out",
        )
    return None


def _avoid_local_chips() -> None:
    """Makes JAX run on the CPU and leave this machine's accelerators to others: the planned chips are elsewhere."""
    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    os.environ["JAX_PLATFORMS"] = "cpu"


def _choose_gpu_memory() -> None:
    """Lets JAX take as much of this machine's GPUs as a run would, because its limit is what the plan has to fit."""
    fraction = gpu_memory.choose_fraction()
    if fraction > 0:
        os.environ[gpu_memory.VARIABLE] = str(fraction)


def _to_json(error: UserError) -> dict[str, Any]:
    """Returns the parts of an error; a value that JSON cannot hold becomes its text."""
    value = error.value if isinstance(error.value, str | int | float | None) else str(error.value)
    return {
        "message": str(error),
        "problem": error.problem,
        "field": error.field,
        "value": value,
        "remedy": error.remedy,
        "exit_code": error.exit_code,
    }


def _write_json(path: str, report: dict[str, Any]) -> None:
    """Writes a report, or an error in its place.

    Raises:
        WorkdirError: the file cannot be written.
    """
    try:
        pathlib.Path(path).write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise WorkdirError(
            f"cannot be written: {error.strerror}",
            field="--json",
            value=path,
            remedy="choose another",
        ) from error


def cli() -> None:
    """Runs the command, and exits with its code."""
    run_cli(main)


if __name__ == "__main__":
    cli()
