"""The errors that end a command with a message, and the exit code of each."""

import sys
from collections.abc import Sequence
from typing import Self

_LONGEST_VALUE = 200  # letters of a value or a name in a message
_LONGEST_PATH = 4096  # Linux's limit: a path that was cut could not be found

OK = 0
BAD_CONFIG = 2  # bad config or flag, existing output; nothing was written
DOES_NOT_FIT = 3  # the plan needs more memory than the chips have
BAD_DATA = 65  # bad data, no usable checkpoint, bad conversion input
UNAVAILABLE = 69  # a device, a peer, an extra or a file cannot be used at the moment, or hosts disagree
DIVERGED = 70  # loss or gradients beyond the policy
OUT_OF_MEMORY = 71  # of a device or of the machine
CANNOT_WRITE = 73  # the work directory is locked or not writable
SAVE_FAILED = 74  # checkpoints keep failing
OUTPUT_LOST = 74  # standard output, which is the command's product, cannot be written
PREEMPTED = 75  # a checkpoint was written: rerun the same command


def one_line(reason: object, *, longest: int = 200) -> str:
    """Returns a foreign message for use within one line: escaped if it is not printable, and cut to `longest`."""
    line = " ".join(str(reason).split())[:longest] or type(reason).__name__
    return line if line.isprintable() else ascii(line)[1:-1][:longest]


def first_line(message: object) -> str:
    """Returns the first line of a message."""
    return str(message).partition("\n")[0]


def is_utf8(text: str) -> bool:
    """Returns whether `text` is valid Unicode. Python decodes invalid UTF-8 in arguments and names to surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """Returns a value as a message shows it. Text has quotes only if it is empty, has blanks or is not printable."""
    if isinstance(value, str) and value.isprintable() and value.split() == [value]:
        return _shorten(value)
    try:
        text = repr(value)
    except Exception:  # Python prints no int of more than 4,300 digits, and a config file may hold any object
        text = f"a value of type {type(value).__name__} that cannot be printed"
    return _shorten(one_line(text, longest=sys.maxsize))


def _shorten(text: str) -> str:
    """Cuts a long value or name and says so; a path stays whole."""
    if "/" in text or len(text) <= _LONGEST_VALUE:
        return text[:_LONGEST_PATH]
    return f"{text[:_LONGEST_VALUE]}... ({len(text)} characters)"


def install(extra: str) -> str:
    """Returns the remedy for a missing extra, as a user of a package and a user of a checkout would install it."""
    return f"pip install 'gptjax[{extra}]', or in a checkout: pip install -e '.[{extra}]'"


class UserError(ValueError):
    """Ends a command with one message per line, no traceback, and `exit_code`.

    The message is "FIELD=VALUE: PROBLEM; REMEDY", without the parts that are not given. Tests compare the parts, so a
    sentence can be improved without changing tests.

    Attributes:
        field: the name of the cause: a config field, a flag, a parameter, a file or a directory; "" without a name.
        value: the wrong value of `field`; None if the field has no value.
        problem: the message without the remedy.
        remedy: the user's next step; "" if there is none.
        errors: the errors that `UserError.of` combined into this one, otherwise ().
    """

    exit_code = BAD_CONFIG

    def __init__(self, problem: str = "", *, field: str = "", value: object = None, remedy: str = "") -> None:
        name = field if field.isprintable() else ascii(field)[1:-1]  # the name of a file may contain a line break
        name = _shorten(name)
        subject = name if value is None else f"{name}={shown(value)}"
        self.problem = ": ".join(part for part in (subject, problem) if part)
        super().__init__("; ".join(part for part in (self.problem, remedy) if part))
        self.field = field
        self.value = value
        self.remedy = remedy
        self.errors: tuple[UserError, ...] = ()

    @classmethod
    def of(cls, errors: Sequence["UserError"]) -> Self:
        """Combines at least one error into one that prints a line for each.

        Its field and value are those of the first error, its remedy is the first one that any of them has.
        """
        combined = cls("\n".join(map(str, errors)))
        combined.field = errors[0].field
        combined.value = errors[0].value
        combined.remedy = next((error.remedy for error in errors if error.remedy), "")
        combined.errors = tuple(errors)
        return combined

    @classmethod
    def about(cls, field: str, error: "UserError", *, remedy: str = "") -> Self:
        """Returns an error about `field`, such as a file, whose problem is `error`.

        remedy: replaces that of `error`, which is kept otherwise.
        """
        if error.errors:
            return cls.of([cls.about(field, each, remedy=remedy) for each in error.errors])
        return cls(error.problem, field=field, remedy=remedy or error.remedy)


class ConfigError(UserError):
    """A setting or a flag is wrong; nothing was written."""

    exit_code = BAD_CONFIG


class PlanError(UserError):
    """A plan does not fit into the chips' memory."""

    exit_code = DOES_NOT_FIT


class DataError(UserError):
    """Data, or weights to convert, are missing or damaged."""

    exit_code = BAD_DATA


class CheckpointError(UserError):
    """No checkpoint can be used."""

    exit_code = BAD_DATA


class UnreadableError(CheckpointError):
    """A checkpoint that may be intact cannot be read for the moment: the same command may succeed later."""

    exit_code = UNAVAILABLE


class UnavailableError(UserError):
    """A device, a peer, a server or an optional package is missing, or hosts disagree."""

    exit_code = UNAVAILABLE


class DivergedError(UserError):
    """Loss or gradients are not finite, or spike, beyond train.nan_policy."""

    exit_code = DIVERGED


class OutOfMemoryError(UserError):
    """The memory of a device or of the machine does not suffice."""

    exit_code = OUT_OF_MEMORY


class WorkdirError(UserError):
    """A directory or file cannot be written, or another process holds the work directory."""

    exit_code = CANNOT_WRITE


class SaveError(UserError):
    """Checkpoints cannot be saved."""

    exit_code = SAVE_FAILED


class OutputError(UserError):
    """Standard output cannot be written; where its reader has ended, with no message and exit code 0."""

    exit_code = OUTPUT_LOST
