"""The command `gptjax`, and `python -m gptjax`: runs a subcommand, or lists them."""

import difflib
import sys

from gptjax import __version__
from gptjax.cli import run_cli
from gptjax.errors import ConfigError, one_line
from gptjax.redaction import print_error, say

COMMANDS = {
    "train": "Train a model, or resume a run.",
    "prepare": "Turn text into token shards.",
    "fetch": "Bring ready token shards from the Hub.",
    "tokenizer": "Train a tokenizer on your text.",
    "sample": "Write text with a model.",
    "evaluate": "Compute the validation loss of a model.",
    "convert": "Bring weights from or to transformers, nanoGPT and llm.c.",
    "plan": "Compute memory, time and cost of a run before it starts.",
    "replay": "Compute one step of a run again, and look at it.",
    "report": "Show what runs did, as a page for a browser.",
    "config": "List all config fields, or print a config.",
}


def usage() -> str:
    """Returns the list of subcommands."""
    lines = [f"gptjax {__version__} trains GPT-2-style language models in JAX.", ""]
    lines += [f"  gptjax {name:<10} {about}" for name, about in COMMANDS.items()]
    lines += ["", "gptjax COMMAND --help describes a command. Begin with: gptjax train quickstart"]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Prints the list of subcommands or the version.

    Raises:
        ConfigError: there is no such command.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        say(usage())
        return
    if arguments[0] == "--version":
        say(f"gptjax {__version__}")
        return
    nearest = difflib.get_close_matches(arguments[0], COMMANDS, n=2)
    raise ConfigError(
        "no such command",
        field=one_line(arguments[0]),
        remedy=f"nearest: {', '.join(nearest)}" if nearest else f"commands: {', '.join(COMMANDS)}",
    )


def cli() -> None:
    """Runs the subcommand that the command line names, and exits with its code."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name.startswith("-") and any(argument.startswith("--config") for argument in sys.argv):
        print_error("note: `gptjax --config=...` is now `gptjax train --config=...`, and still trains")
        sys.argv.insert(1, "train")
        name = "train"
    if name not in COMMANDS:
        run_cli(main)
    sys.argv[:2] = [f"gptjax {name}"]  # which the help of the subcommand shows
    start(name)


def start(name: str) -> None:
    """Runs the subcommand `name` with the flags in sys.argv, and exits with its code."""
    # Each is imported only where it runs, because some imports take seconds.
    match name:
        case "train":
            from gptjax.main import cli as command
        case "prepare":
            from gptjax.data.prepare import cli as command
        case "fetch":
            from gptjax.fetch import cli as command
        case "tokenizer":
            from gptjax.tokenizer import cli as command
        case "sample":
            from gptjax.sample import cli as command
        case "evaluate":
            from gptjax.evaluate import cli as command
        case "convert":
            from gptjax.convert import __main__ as convert

            command = convert.cli
        case "plan":
            from gptjax.plan import __main__ as plan

            command = plan.cli
        case "replay":
            from gptjax.replay import __main__ as replay

            command = replay.cli
        case "report":
            from gptjax.report import __main__ as report

            command = report.cli
        case _:
            from gptjax.describe import cli as command
    command()


if __name__ == "__main__":
    cli()
