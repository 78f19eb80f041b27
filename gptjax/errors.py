"""The mistakes and misfortunes that a user can meet, each with the exit code it ends a command with."""

OK = 0
BAD_CONFIG = 2  # bad config or flag, existing output; nothing was written
DOES_NOT_FIT = 3  # what was planned is larger than the chips' memory
BAD_DATA = 65  # bad data, no usable checkpoint, bad conversion input
UNAVAILABLE = 69  # a device, a peer, an agreement between hosts, or an extra is missing
DIVERGED = 70  # loss or gradients beyond the policy
CANNOT_WRITE = 73  # the work directory is locked or not writable
SAVE_FAILED = 74  # checkpoints keep failing
PREEMPTED = 75  # a checkpoint was written: start the same command again


def plain(reason: object, *, longest: int = 200) -> str:
    """Returns what another library or a file says as part of one line, with its quotes of a file escaped and cut."""
    line = " ".join(str(reason).split())[:longest] or type(reason).__name__
    return line if line.isprintable() else ascii(line)[1:-1][:longest]


class UserError(ValueError):
    """Ends a command with one message per line, no traceback, and `exit_code`."""

    exit_code = BAD_CONFIG


class ConfigError(UserError):
    exit_code = BAD_CONFIG


class PlanError(UserError):
    exit_code = DOES_NOT_FIT


class DataError(UserError):
    exit_code = BAD_DATA


class CheckpointError(UserError):
    exit_code = BAD_DATA


class UnavailableError(UserError):
    exit_code = UNAVAILABLE


class DivergedError(UserError):
    exit_code = DIVERGED


class WorkdirError(UserError):
    exit_code = CANNOT_WRITE


class SaveError(UserError):
    exit_code = SAVE_FAILED
