"""Runs EleutherAI's lm-eval on a model: `python -m gptjax.lm_eval --model_args workdir=DIR --tasks hellaswag`.

The flags are those of lm-eval, and all of its tasks can be run. From Python:
`lm_eval.simple_evaluate(model=GptjaxLM(workdir=DIR), tasks=["hellaswag"])`. It needs the extra lm-eval, and no torch.
"""

import sys
from typing import TYPE_CHECKING, Any

from gptjax import distributed
from gptjax.cli import Parser, run_cli
from gptjax.errors import UnavailableError, install

if TYPE_CHECKING:
    from gptjax.tasks.harness import GptjaxLM

__all__ = ["GptjaxLM", "cli", "main"]


def __getattr__(name: str) -> Any:
    """Returns GptjaxLM, which cannot be defined without lm-eval."""
    if name != "GptjaxLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from gptjax.tasks import harness
    except ImportError as error:
        raise UnavailableError(f"needs the package lm_eval ({error})", remedy=install("lm-eval")) from error
    return harness.GptjaxLM


def main(arguments: list[str]) -> None:
    """Registers the model `gptjax`, and calls lm-eval's command line with it.

    Raises:
        UserError: lm-eval is missing, or the model is.
    """
    if arguments in ([], ["--help"], ["-h"]):
        Parser(__doc__).parse_strictly(["--help"])
    distributed.start_jax()
    __getattr__("GptjaxLM")
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    flags = ["run", *arguments] if arguments and arguments[0].startswith("-") else arguments
    if "--model" not in flags and "-M" not in flags and flags[:1] == ["run"]:
        flags = [*flags, "--model", "gptjax"]
    sys.argv[1:] = flags
    cli_evaluate()


def cli() -> None:
    """Runs the command, and exits with its code."""
    run_cli(main)


if __name__ == "__main__":
    cli()
