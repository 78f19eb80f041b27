"""Recomputes one step of a run and reports it: `gptjax replay --workdir=DIR --step=N`.

Restores the newest checkpoint before the step, or the initial state, and repeats the run's own train steps from there.
Shows the rows and documents of update N, the loss of each token, and the gradient's norm by layer and parameter, on the
screen and in one HTML file. It reads the work directory without a lock, so a run may train in it meanwhile.
--config.section.field=VALUE changes a config field, as mesh.fsdp where this machine has other devices.
"""

import argparse
import os

from gptjax import distributed
from gptjax.cli import Parser, run_cli
from gptjax.config import Config, flatten, unknown_field
from gptjax.config_flags import parse_overrides
from gptjax.errors import ConfigError
from gptjax.former_names import current_name
from gptjax.output_file import write_output
from gptjax.redaction import say
from gptjax.workdir import local_directory

FULL_ROWS = 64  # rows whose text the HTML file has by default


def parse_flags(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Returns the command line, and its changes of config fields under their current names.

    Raises:
        ConfigError: a flag or a config field is wrong.
    """
    parser = _make_parser()
    args, rest = parser.parse_known_args(arguments)
    if args.step < 1:
        raise ConfigError("the first update makes step 1", field="--step", value=args.step)
    if args.rows < 0:
        raise ConfigError("must be at least 0", field="--rows", value=args.rows)
    known = flatten(Config())
    overrides = {}
    for name, text in parse_overrides(parser, rest).items():
        current = current_name(name)
        if current not in known:
            raise unknown_field(current)
        overrides[current] = text
    return args, overrides


def _make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="The work directory of a run.",
    )
    parser.add_argument(
        "--step",
        required=True,
        type=int,
        metavar="N",
        help="The update to repeat: the one that makes step N.",
    )
    parser.add_argument(
        "--out",
        default="",
        metavar="FILE",
        help="The HTML file to write. By default it is replay-N.html in the work directory.",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=FULL_ROWS,
        help="The number of rows whose text the HTML file has; 0 means all.",
    )
    parser.add_argument(
        "--rollbacks",
        type=int,
        default=-1,
        help="Replay the run as it was after this many rollbacks. By default it is the run as it is now.",
    )
    return parser


def main(arguments: list[str]) -> None:
    """Recomputes one update of a run, prints it, and writes its HTML page.

    Raises:
        UserError: the run or the step does not exist, or the page cannot be written.
    """
    args, overrides = parse_flags(arguments)
    distributed.start_jax()
    # start_jax configures JAX before these import it.
    from gptjax.checkpoint import Checkpointer
    from gptjax.convert.tokenizer_source import open_run_tokenizer
    from gptjax.identity import read_identity
    from gptjax.replay import report, update
    from gptjax.setup import make_run
    from gptjax.stored import at_its_data

    records = update.read_records(Checkpointer(args.workdir), read_identity(args.workdir))
    skipped = update.skipped_ranges(records, args.rollbacks)
    config = update.find_config(
        args.workdir,
        args.step,
        records=records,
        overrides=overrides,
    )
    config = update.fit(
        config,
        update.history_of(records, args.step),
        overrides,
    )
    if args.step > config.train.num_steps:
        raise ConfigError(
            f"the run has train.num_steps={config.train.num_steps}",
            field="--step",
            value=args.step,
        )
    newest = next(iter(records.values()), None)
    # A converted checkpoint names no data; those of the config are all there is.
    if newest and newest.data and not any(name.startswith("data.") for name in overrides):
        config = at_its_data(config, newest, flag="--config.data.path")
    tokenizer = open_run_tokenizer(config.data.tokenizer, local_directory(args.workdir))
    run = make_run(config, tokenizer=tokenizer)
    replayed = update.replay(
        run,
        args.workdir,
        args.step,
        records=records,
        skipped=skipped,
    )
    path = args.out or os.path.join(local_directory(args.workdir), f"replay-{args.step}.html")
    # The file comes first, so that an error on standard output does not lose it.
    content = "".join(report.render(replayed, full_rows=args.rows))
    write_output(path, content)
    for line in report.text_lines(replayed):
        say(line)
    say(f"\n{path}")


def cli() -> None:
    """Runs the command, and exits with its code."""
    run_cli(main)


if __name__ == "__main__":
    cli()
