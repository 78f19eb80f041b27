"""The command line of every command: flags, logging, and the exit code."""

import argparse
import contextlib
import difflib
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from gptjax import errors, peers
from gptjax.distributed import leave_the_others
from gptjax.errors import ConfigError, OutputError, UserError, is_utf8, one_line
from gptjax.exhaustion import bytes_asked_for, show
from gptjax.redaction import print_error, redact, shown
from gptjax.streams import go_on_without_output, open_streams

log = logging.getLogger("gptjax")
NEAR = 0.7  # difflib's ratio of a mistyped flag and the one that is meant
THREADS_SECONDS = 3.0  # a command that failed waits this long for threads of its libraries
# Raised in Orbax's coroutines and tensorstore's threads after a failed read or save, which was reported already; and by
# an event loop that found no free descriptor, when it is collected.
IGNORED_UNRAISABLE = (
    "Event loop is closed",
    "Encountered error while reading array index",
    "'_UnixSelectorEventLoop' object has no attribute '_ssock'",
)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Ends the help of a flag with its default, unless the help names one or no value was given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        has_value = action.nargs != 0 and action.default not in (None, "", argparse.SUPPRESS) and action.default != []
        if not text or not has_value or "default" in text:
            return text
        return f"{text} The default is %(default)s."


class Parser(argparse.ArgumentParser):
    """Parses a command line. A mistake raises ConfigError, which names the flags that are nearest to a mistyped one."""

    def __init__(self, description: str | None) -> None:
        # By default the usage of a package's command names `__main__.py`.
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        prog = f"python -m {spec.name.removesuffix('.__main__')}" if spec else None
        if sys.argv[0].startswith("gptjax "):  # a subcommand of gptjax/__main__.py
            prog = sys.argv[0]
        super().__init__(
            prog,
            description=description,
            allow_abbrev=False,
            formatter_class=_Help,
            add_help=False,
        )
        super().add_argument("-h", "--help", action="help", help="Show this help and exit.")

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Adds a flag; a number's placeholder is N instead of the flag's own name."""
        if options.get("type") in (int, float):
            options.setdefault("metavar", "N")
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError with argparse's message, about the flag that it names."""
        found = re.fullmatch(r"argument (\S+): (.*)", message, re.DOTALL)
        flag, problem = found.groups() if found else ("", message)
        wrong = re.fullmatch(r"invalid (int|float) value: '(.*)'", problem, re.DOTALL)
        if wrong:
            expected = "a whole number" if wrong[1] == "int" else "a number"
            raise ConfigError(f"expected {expected}", field=flag, value=wrong[2])
        raise ConfigError(one_line(problem), field=flag)

    def print_help(self, file: Any = None) -> None:
        """Prints the help and flushes it, so that an output that cannot be written raises here."""
        super().print_help(file)
        (file or sys.stdout).flush()

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: list[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Returns the parsed flags and the remaining arguments, as argparse does.

        Raises:
            ConfigError: a flag is wrong, or an argument or the current directory is not valid UTF-8, which some
                libraries do not accept as a path or text.
        """
        known, rest = super().parse_known_args(args, namespace)
        for argument in args or ():
            if not is_utf8(argument):
                raise _not_utf8(argument)
        with contextlib.suppress(FileNotFoundError):  # the directory was removed: a write to it reports that
            directory = os.getcwd()
            if not is_utf8(directory):
                raise ConfigError(
                    "the current directory's name is not valid UTF-8",
                    field=one_line(directory),
                    remedy="start the command in another directory",
                )
        return known, rest

    def parse_strictly(self, arguments: list[str]) -> argparse.Namespace:
        """Returns the parsed command line.

        Raises:
            ConfigError: an argument is wrong or not known.
        """
        parsed, rest = self.parse_known_args(arguments)
        if rest:
            raise self.unknown(rest[0])
        return parsed

    def unknown(self, argument: str) -> ConfigError:
        """Returns the error for an argument that is not known, with the nearest flags."""
        flags = list(self._option_string_actions)
        if "--workdir" in flags and os.path.isdir(argument):
            return ConfigError("not a flag", field=one_line(argument), remedy=f"write --workdir={one_line(argument)}")
        nearest = difflib.get_close_matches(argument.split("=")[0], flags, 2, cutoff=NEAR)
        return ConfigError(
            "no such flag",
            field=one_line(argument),
            remedy=f"nearest: {', '.join(nearest)}" if nearest else "",
        )


def _not_utf8(argument: str) -> ConfigError:
    """Returns the error for an argument that is not valid UTF-8; it names the flag, otherwise the argument."""
    flag = argument.partition("=")[0]
    is_readable = flag.startswith("--") and is_utf8(flag)
    return ConfigError(
        "not valid UTF-8 text",
        field=one_line(flag if is_readable else argument),
        remedy="write it in UTF-8, or rename the file that it names",
    )


def run_cli(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs main(arguments) and exits with a documented exit code; a user's mistake never prints a traceback."""
    open_streams()
    start_logging()
    try:
        code = main(sys.argv[1:]) or errors.OK
    except UserError as error:
        code = error.exit_code
        for line in redact(str(error)).split("\n"):  # redacted before it is split: a secret may have several lines
            if line.strip():
                print_error(f"error: {line.rstrip()}")
        go_on_without_output(is_told=isinstance(error, OutputError))
        leave_the_others(code, str(error))
    except KeyboardInterrupt:
        code = errors.PREEMPTED
        print_error("interrupted")
        leave_the_others(code, "interrupted")
    except Exception as error:
        peers.settle()
        code = _report_failure(error)
        leave_the_others(code, repr(error))
    _exit(code)


def _report_failure(error: Exception) -> int:
    """Prints an exception that is no UserError, and returns the exit code."""
    size = bytes_asked_for(error)
    if size is None:  # a bug in gptjax
        print_error("".join(traceback.format_exception(error)).rstrip())
        return 1
    problem = f"out of memory: {show(size)} could not be allocated"
    print_error(f"error: {problem}; ask for fewer rows at a time, or use a device with more memory")
    return errors.OUT_OF_MEMORY


def _exit(code: int) -> NoReturn:
    go_on_without_output()  # only log lines can be pending: if they cannot be written, the exit code stays
    sys.stdout.flush()
    if code not in (errors.OK, errors.PREEMPTED):
        # At exit Python waits for threads. Orbax's may take minutes after failed saves.
        late = threading.Timer(THREADS_SECONDS, os._exit, [code])
        late.daemon = True
        late.start()
    sys.exit(code)


class _Lines(logging.StreamHandler[Any]):
    """Writes log lines to a stream. A line that cannot be written is lost, and does not end the command."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OutputError | OSError):
            super().handleError(record)


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown(redact(super().format(record)))


def start_logging() -> None:
    """Sends gptjax's log lines to stdout without a prefix, and only critical ones of other libraries to stderr."""
    handler = _Lines(sys.stdout)
    handler.setFormatter(_Redacting("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    for name in ("absl", "asyncio", "concurrent.futures", "gcsfs", "s3fs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # Orbax and gcsfs also log a page for each error they raise
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides XLA's notices
    sys.unraisablehook = print_unraisable
    # When one of Orbax's coroutines fails, it never awaits the others. Python warns whenever it collects them.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def print_unraisable(unraisable: Any) -> None:
    """Prints an exception that nothing could catch, except IGNORED_UNRAISABLE."""
    if not str(unraisable.exc_value).startswith(IGNORED_UNRAISABLE):
        sys.__unraisablehook__(unraisable)
