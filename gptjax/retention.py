"""Which checkpoints stay, and the removal of old ones and of the files of a failed save."""

import contextlib
import functools
import logging
import os
import re
import time
from collections.abc import Sequence
from typing import Any

from etils import epath

from gptjax.errors import one_line
from gptjax.orbax_context import import_orbax

log = logging.getLogger("gptjax")
TEMPORARY = ".orbax-checkpoint-tmp"  # part of the name of a save that Orbax has not finished
REMOVALS = 20  # attempts, 0.05 s apart, to remove the files of a failed save


class Retention:
    """Orbax's preservation policy: keeps the newest checkpoints, the best one, and those that cannot be removed.

    Orbax removes the others after a save is complete. A failure of that looks like one of the save, and it would occur
    again at each later save, and leave all later checkpoints in place.
    """

    def __init__(self, keep: int) -> None:
        """keep: how many of the newest checkpoints are kept."""
        self._keep = keep
        self._stuck: set[int] = set()  # steps that cannot be removed
        self._unwanted: list[int] = []  # the steps that Orbax removes after the newest save

    @functools.cached_property
    def _policy(self) -> Any:
        policies: Any = import_orbax().training.preservation_policies
        newest = policies.LatestN(self._keep)
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["val_loss"],
            reverse=True,  # sorts in descending order; the last one, the lowest loss, is kept
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        return policies.AnyPreservationPolicy([newest, best])

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns whether each checkpoint stays. Orbax calls it at each save, in every process."""
        wanted = self._policy.should_preserve(checkpoints, context=context)
        stays = []
        self._unwanted = []
        for checkpoint, is_wanted in zip(checkpoints, wanted, strict=True):
            stays.append(is_wanted or checkpoint.step in self._stuck)
            if not stays[-1]:
                self._unwanted.append(checkpoint.step)
        return stays

    def remove_old(self, directory: epath.Path) -> bool:
        """Removes the checkpoints that Orbax should have removed, with a warning for each where that fails.

        Returns whether one of them cannot be removed.
        """
        before = len(self._stuck)
        for step in self._unwanted:
            path = directory / str(step)
            try:
                if path.exists():
                    path.rmtree()
            except Exception as error:  # of the file system, or of the library that reaches a bucket
                self._stuck.add(step)
                log.warning("%s: the old checkpoint cannot be removed: %s; training continues", path, why(error))
        return len(self._stuck) > before


def remove_unfinished(directory: epath.Path) -> None:
    """Removes the files of a failed save. On a full disk they would leave no room for the next save.

    It never raises OSError: the save has failed already, and the next one removes what is left.
    """
    for _ in range(REMOVALS):  # threads of the save may still be writing there
        unfinished: list[epath.Path] = []
        with contextlib.suppress(OSError):  # the directory was removed or replaced, or cannot be listed now
            unfinished = [path for path in directory.iterdir() if TEMPORARY in path.name]
        if not unfinished:
            return
        for path in unfinished:
            with contextlib.suppress(OSError):
                path.rmtree()
        time.sleep(0.05)


def why(error: Exception) -> str:
    """Returns why a file operation failed: the OS's text for the error's or tensorstore's number, or the message."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    return getattr(error, "strerror", None) or one_line(error)
