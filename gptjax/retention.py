"""The checkpoints that stay, and the files of a failed save, which must go."""

import contextlib
import time

from etils import epath

TEMPORARY = ".orbax-checkpoint-tmp"  # part of the name of a save that Orbax has not finished
REMOVALS = 20  # attempts, 0.05 s apart, to remove the files of a failed save


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
