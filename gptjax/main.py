"""Trains a GPT-2: `gptjax train quickstart`, or with changed fields `gptjax train quickstart --config.train.seed=1`.

Rerun the same command to resume after an interruption. `gptjax config` lists all config fields.
"""

import argparse
import gc
import logging
import time

from gptjax import config, config_files, distributed
from gptjax.cli import Parser, run_cli
from gptjax.config_flags import add_config_flag, parse_config_flags
from gptjax.redaction import refuse_secrets
from gptjax.streams import go_on_without_output


def main(arguments: list[str]) -> int:
    """Reads flags and config, starts JAX, and returns the exit code of the training.

    Raises:
        UserError: a flag or a setting is wrong, or training ends early for an expected reason.
    """
    started = time.perf_counter()  # before the imports below, which count as start-up time in goodput
    args, settings = parse_flags(arguments)
    # Lines that most people do not need, such as the table of parameters, are logged at DEBUG.
    if args.verbose:
        logging.getLogger("gptjax").setLevel(logging.DEBUG)
    distributed.start_jax(
        coordinator=args.coordinator,
        num_processes=args.num_processes,
        process_id=args.process_id,
        join_seconds=args.join_seconds,
    )
    # Imported here because the import takes seconds: mistakes in flags and config are reported first.
    from gptjax.train import train

    # Modules live until the process ends. Scanning them in every collection takes a tenth of the start-up time.
    gc.freeze()
    gc.enable()  # cli() had switched it off

    workdir = args.workdir or config_files.default_workdir(args.config)
    return train(settings, workdir, started=started)


def parse_flags(arguments: list[str]) -> tuple[argparse.Namespace, config.Config]:
    """Returns the command line and the validated config.

    Raises:
        ConfigError: a flag, the config file or a setting is wrong, or a setting contains a secret.
    """
    parser = Parser(__doc__)
    add_config_flag(parser)
    parser.add_argument(
        "--workdir",
        default="",
        metavar="DIR",
        help="The directory of the run. By default it is runs/<name of the config>, or the directory of config.json.",
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="Also print the table of parameters, and at the end where the time went.",
    )
    # Only for clusters that JAX cannot detect: it detects TPU pods and Slurm by itself.
    distributed.add_process_flags(parser)
    args, overrides = parse_config_flags(parser, arguments)

    # From here on a closed stdout is not an error: the output of a run is its work directory.
    go_on_without_output()
    settings = config.load(args.config, overrides)
    refuse_secrets(config.flatten(settings))  # settings are written to config.json, checkpoints and logs
    return args, settings


def cli() -> None:
    """Runs the command, and exits with its code."""
    gc.disable()  # until all modules are imported: collections during imports find no garbage
    run_cli(main)


if __name__ == "__main__":
    cli()
