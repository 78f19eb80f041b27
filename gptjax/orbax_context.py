"""Configures Orbax and tensorstore: one uncompressed directory per array, durable saves, and no leaking metrics."""

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

import tensorstore

from gptjax.workdir import is_bucket, sync_path, sync_tree

log = logging.getLogger("gptjax")
COUNTERS = "experimental_collect_matching_metrics"  # tensorstore's function that reads its metrics
CHUNK_BYTES = 16 * 2**20  # read or written at a time where memory use must stay low


def import_orbax() -> Any:
    """Returns Orbax's API, imported at the first call.

    The import takes a tenth of the start of a small run, and a new run needs Orbax only after its first step.
    """
    from orbax.checkpoint import v1 as ocp

    return ocp


@contextlib.contextmanager
def suppress_tensorstore_metrics() -> Iterator[None]:
    """Disables reading tensorstore's metrics in this context, because reading them leaks memory.

    Orbax reads them four times per save, for a line of its log. Each time tensorstore (0.1.74 to 0.1.86) leaks 4 kB in
    its conversion to JSON.
    """
    real = getattr(tensorstore, COUNTERS, None)
    if real is None:  # a newer tensorstore
        yield
        return
    setattr(tensorstore, COUNTERS, lambda *_, **__: [])
    try:
        yield
    finally:
        setattr(tensorstore, COUNTERS, real)


class _DurableRename:
    """Syncs the directory of a save to disk, then gives it its final name. It takes the place of Orbax's snapshot."""

    def __init__(self, temporary: str, final: str) -> None:
        self._temporary, self._final = temporary, final

    async def replace_source(self) -> None:
        await asyncio.to_thread(self._rename)

    def _rename(self) -> None:
        sync_tree(self._temporary)
        os.rename(self._temporary, self._final)
        # A new name survives a power failure once the directory that contains it is synced. The first save of a run may
        # have created checkpoints/ and the work directory, too.
        directory = os.path.abspath(self._final)
        for _ in range(3):  # checkpoints/, the work directory, and the directory that contains it
            directory = os.path.dirname(directory)
            sync_path(directory)


@functools.cache
def _sync_before_rename() -> None:
    """Makes Orbax sync all files of a save before the rename that finishes it; Orbax itself syncs the arrays only.

    Without this, a power failure may leave a step with its final name and an empty record, after the older step was
    removed. Orbax has no public hook for it: it calls `post_finalization_callback` before it last writes the record.
    """
    try:
        from orbax.checkpoint._src.path import atomicity

        kind: Any = atomicity.AtomicRenameTemporaryPath
        real = kind.finalize
    except (ImportError, AttributeError):
        log.warning("unknown version of Orbax: a power failure may damage the newest checkpoint")
        return

    async def finalize(self: Any) -> None:
        if self._snapshot is None and not is_bucket(str(self.get_final())):
            self._snapshot = _DurableRename(str(self.get()), str(self.get_final()))
        await real(self)

    kind.finalize = finalize


def saving_context() -> Any:
    """Returns the Orbax context of a save: durable, one uncompressed directory per array.

    With one database for all arrays, tensorstore leaks memory at each save, in proportion to their number. Compression
    would save 7 % of the space, and make the memory of a process that saves often grow faster.
    """
    _sync_before_rename()
    context: Any = import_orbax().Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_compression = False
    # Restores always give the shardings. Without the file a small save takes a fifth less time.
    context.array.saving.enable_write_sharding_file = False
    return context
