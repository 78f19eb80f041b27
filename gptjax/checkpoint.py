"""Async checkpoints, verified on restore, with fallback to older ones and resharding.

A checkpoint is `checkpoints/<step>/` with `params` and `opt_state` as Orbax trees, and a record in Orbax's custom
metadata: step, config, history, data fingerprint, a fingerprint of every array, versions. The record carries its own
checksum.
"""

import contextlib
import functools
import logging
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import peers
from gptjax.config import Config
from gptjax.disk_space import measure_free_space
from gptjax.errors import (
    CheckpointError,
    ConfigError,
    SaveError,
    UnavailableError,
    UnreadableError,
    WorkdirError,
)
from gptjax.exhaustion import show_bytes
from gptjax.fingerprint import fingerprints
from gptjax.orbax_context import import_orbax, saving_context
from gptjax.record import FAILURES, CorruptCheckpointError, Record, judge, read_record, seal
from gptjax.retention import Retention, remove_unfinished, why
from gptjax.sharding import check_params
from gptjax.state import TrainState
from gptjax.tree_checks import check_same_arrays, refuse_nonfinite
from gptjax.versions import versions
from gptjax.workdir import check_bucket, is_bucket

log = logging.getLogger("gptjax")
MAX_FAILED_SAVES = 3
RETRY_SECONDS = 2.0  # before the last save of a run is retried
STEP_NAME = re.compile(r"0|[1-9][0-9]*")  # Orbax writes no leading zeros; str.isdigit() would accept "\u00b2"


class Checkpointer:
    """The checkpoints of one work directory. `close` waits for the last save and reports its failure."""

    def __init__(self, workdir: str, *, keep: int = 1) -> None:
        """keep: how many of the newest checkpoints are kept, in addition to the best one.

        Raises:
            ConfigError: the scheme of a bucket is unknown.
            UnavailableError: the bucket cannot be reached, or a library for it is missing.
        """
        check_bucket(workdir)
        root = workdir if is_bucket(workdir) else os.path.abspath(workdir)
        self.directory = epath.Path(root) / "checkpoints"
        self._keep = keep
        self._retention: Any = Retention(keep)
        self._orbax: Any = None  # opened by the first save
        self._pending: Any = None  # Orbax's future of the save that is being written
        self._failed = 0  # number of saves in a row that have failed
        self._cause = ""  # why the first of them failed
        self._record: Record | None = None  # of the newest save
        self._state: TrainState | None = None  # kept until the last save is on disk, because a retry needs it
        self._start: Callable[[], None] = lambda: None  # starts the last save once more

    def _open(self) -> Any:
        ocp = import_orbax()
        decisions: Any = ocp.training.save_decision_policies
        return ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=decisions.FixedIntervalPolicy(1),
            preservation_policy=self._retention,
            cleanup_tmp_directories=True,
            context=saving_context(),
        )

    def steps(self) -> list[int]:
        """Returns the steps of all finished checkpoints, corrupt or not, in ascending order.

        Raises:
            UnreadableError: the directory cannot be read.
        """
        return sorted(int(name) for name in self._names() if STEP_NAME.fullmatch(name))

    def _names(self) -> list[str]:
        try:
            if not self.directory.exists():
                return []
            return [path.name for path in self.directory.iterdir()]
        except OSError as error:
            raise UnreadableError(f"cannot be read now: {why(error)}", field=str(self.directory)) from error

    def save(
        self,
        state: TrainState,
        step: int,
        *,
        config: Config,
        history: dict[str, Any],
        data: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Waits for the previous save, then starts to save `state`, which may be donated when this returns.

        Args:
            state: on the mesh; arrays of any shape, dtype and sharding.
            step: of `state`, above the steps of all checkpoints.
            config: of the run, for the record.
            history: JSON-serialisable, for the record.
            data: identity of the data, for the record.
            metrics: of this step's validation; None if there was none. The lowest `val_loss` is kept as the best one.

        Raises:
            SaveError: MAX_FAILED_SAVES saves in a row have failed, or a newer checkpoint exists.
            DivergedError: a value is not finite; such a state is never saved.
            ConfigError: the parameters are not those of a model of `config`.
        """
        self.wait_for_pending_save()
        check_params(state.params, config.model)
        trees = state.trees
        refuse_nonfinite(trees, step)
        record = Record(
            step=step,
            config=config.to_dict(),
            history=history,
            data=data,
            fingerprints=fingerprints(trees),
            versions=versions(),
        )
        self._state = state
        self._record = record
        self._start = functools.partial(self._start_save, trees, record, metrics)
        self._start()

    def _start_save(self, trees: dict[str, Any], record: Record, metrics: dict[str, float] | None) -> None:
        step = record.step
        try:
            if self._failed and self._is_saved(record):  # a retry: the save failed after its files were complete
                self._failed = 0
                return
            if self._orbax is None:
                self._orbax = self._open()
            self._pending = self._orbax.save_checkpointables_async(
                step,
                dict(trees),  # a copy: Orbax adds the metrics to it, and a retry must not pass them
                custom_metadata=seal(record),
                metrics=metrics,
            )
        except Exception as error:  # as in _finish_pending
            self._save_failed(error, MAX_FAILED_SAVES)
            return
        if self._pending is None:  # Orbax skips a step below the newest one without an error
            raise SaveError(f"a checkpoint after step {step} exists already", field=str(self.directory))

    def _is_saved(self, record: Record) -> bool:
        if record.step not in self.steps():
            return False
        try:
            return self.read_record(record.step).fingerprints == record.fingerprints
        except CorruptCheckpointError:
            return False

    def wait_for_pending_save(self) -> None:
        """Waits for the pending save and releases its state.

        Raises:
            SaveError: it failed, and it was the MAX_FAILED_SAVES-th failure in a row.
        """
        self._finish_pending(MAX_FAILED_SAVES)
        self._release_state()

    def _release_state(self) -> None:
        self._state = None
        self._start = lambda: None

    def wait_until_finished(self) -> None:
        """Waits until the last save is on disk, retrying on failure. A retry requires that its state was not donated.

        Raises:
            SaveError: it was the MAX_FAILED_SAVES-th failure in a row, or it failed and its state was donated.
        """
        while True:
            is_donated = any(leaf.is_deleted() for leaf in jax.tree.leaves(self._state))
            self._finish_pending(1 if is_donated else MAX_FAILED_SAVES)
            if not self._failed or self._state is None:
                break
            time.sleep(RETRY_SECONDS)
            self._start()
        self._release_state()
        self._failed = 0

    def close(self) -> None:
        """Waits for the last save, and closes Orbax.

        Raises:
            SaveError: the last save has failed, as in `wait_until_finished`.
        """
        try:
            self.wait_until_finished()
        finally:
            self._close_orbax()

    def _close_orbax(self) -> None:
        if self._orbax is not None:
            self._orbax.close()
            self._orbax = None

    def _finish_pending(self, allowed: int) -> None:
        pending = self._pending
        self._pending = None
        if pending is None:
            return
        try:
            pending.result()
            self._failed = 0
        except Exception as error:  # Orbax raises many types; each failure is logged, and raised at the limit
            peers.settle()
            if not self._is_complete():
                self._save_failed(error, allowed)
                return
            self._failed = 0
            self._drop_orbax()
            if jax.process_index() or not self._retention.remove_old(self.directory):
                log.warning("the checkpoint is complete, but its save ended with an error: %s", why(error))

    def _is_complete(self) -> bool:
        """Returns whether the newest save has all its files, so that only what follows them can have failed."""
        with contextlib.suppress(CheckpointError):  # it cannot be read now
            return self._record is not None and self._is_saved(self._record)
        return False

    def _save_failed(self, error: Exception, allowed: int) -> None:
        peers.settle()
        if self._failed == 0:
            self._cause = why(error)
        self._failed += 1
        self._drop_orbax()
        if jax.process_index() == 0:
            remove_unfinished(self.directory)
        if self._failed >= allowed:
            self._release_state()
            raise SaveError(f"{self._failed} saves failed: {self._cause}", field=str(self.directory)) from error
        log.warning("checkpoint save failed, training continues: %s", why(error))

    def _drop_orbax(self) -> None:
        """Closes Orbax after a failure. The next save re-opens it, and then it re-reads the directory."""
        with contextlib.suppress(Exception):  # it may raise the same failure once more
            self._close_orbax()
        self._orbax = None

    def check_disk_space(self, abstract: TrainState) -> str:
        """Returns a line with the size of checkpoints of `abstract` and the free space.

        abstract: arrays or jax.ShapeDtypeStructs of any shape and dtype.

        Raises:
            WorkdirError: nothing can be written there, or there is no room for one checkpoint.
        """
        leaves = jax.tree.leaves(abstract.trees)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        most = self._keep + 2  # plus the best checkpoint and the one that is being written
        line = f"checkpoints: {show_bytes(size)} each, at most {most} kept"
        free = measure_free_space(self.directory)
        if free == math.inf:
            return line
        if free < size:
            raise WorkdirError(
                f"a checkpoint takes {show_bytes(size)}, but only {show_bytes(free)} are free",
                field=str(self.directory),
                remedy="make room, or choose another --workdir",
            )
        needed = (most - len(self.steps())) * size
        if free < needed:
            log.warning(
                "%s: %s are free, %s may be needed",
                self.directory,
                show_bytes(free),
                show_bytes(needed),
            )
        return f"{line}; {show_bytes(free)} free"

    def restore_latest(
        self, abstract: TrainState, *, check: Callable[[Record], None] = lambda record: None
    ) -> tuple[TrainState, Record] | None:
        """Returns the newest intact checkpoint and its record; None if no checkpoint exists.

        Args:
            abstract: jax.ShapeDtypeStructs with the shapes, dtypes and shardings of the result.
            check: called with each record before its arrays are read; it raises an error to refuse the checkpoint.

        Raises:
            CheckpointError: checkpoints exist, and none is intact.
            UnreadableError: a checkpoint cannot be read at the moment.
            WorkdirError: a corrupt checkpoint cannot be renamed.
            UnavailableError: this is one of several processes, and it cannot read its shards.
            ConfigError: the work directory holds converted weights, without an optimizer state.
        """
        refused: list[str] = []
        quarantined = sorted(name for name in self._names() if re.match(r"\d+\.corrupt-", name))
        for step in reversed(self.steps()):
            try:
                record = self.read_record(step)
                self._require_opt_state(record)
                check(record)
                return self.restore(record, abstract), record
            except CorruptCheckpointError as damage:
                refused.append(f"step {step}: {damage}")
                self._quarantine(step, damage)
        refused += quarantined
        if refused:
            raise CheckpointError(
                f"no usable checkpoint: {'; '.join(refused)}",
                field=str(self.directory),
                remedy="to start a new run, choose another --workdir or remove that directory",
            )
        return None

    def restore(self, record: Record, abstract: TrainState) -> TrainState:
        """Returns the state of one checkpoint, with the shapes, dtypes and shardings of `abstract`.

        Raises:
            CorruptCheckpointError, UnreadableError, CheckpointError: as in `load`.
        """
        trees = self.load(record.step, abstract.trees, record)
        replicated = NamedSharding(abstract.step.sharding.mesh, P())
        step = jax.device_put(jnp.asarray(record.step, jnp.int32), replicated)
        return TrainState(step, **trees)

    def _require_opt_state(self, record: Record) -> None:
        if any(name.startswith("opt_state") for name in record.fingerprints):
            return
        workdir = str(self.directory.parent)
        raise ConfigError(
            "holds converted weights, without an optimizer state to resume from",
            field="--workdir",
            value=workdir,
            remedy=f"choose another, with --config.init_from=gptjax:{workdir}",
        )

    def read_record(self, step: int) -> Record:
        """Returns the record of one checkpoint.

        Raises:
            CorruptCheckpointError: a part is missing, cannot be parsed, or has a wrong checksum.
            UnreadableError: it cannot be read at the moment.
            CheckpointError: a newer gptjax made it.
        """
        return read_record(self.directory / str(step), step)

    def load(self, step: int, abstract: dict[str, Any], record: Record) -> dict[str, Any]:
        """Returns the named trees of one checkpoint, each leaf verified by its fingerprint and safe to donate.

        abstract: {"params": tree, ...} of jax.ShapeDtypeStructs, with the shapes, dtypes and shardings of the result.

        Raises:
            CorruptCheckpointError: an array is missing, cannot be parsed or differs from the saved one.
            UnreadableError: the checkpoint cannot be read at the moment.
            UnavailableError: it cannot be read, and this is one of several processes.
            CheckpointError: its arrays are not those of `abstract`.
        """
        ocp = import_orbax()
        path = self.directory / str(step)
        check_same_arrays(path, abstract, record)
        try:
            trees = ocp.load_checkpointables(path, abstract)
        except FAILURES as first:  # retried once: a Ctrl-C or a short disk failure may be the cause
            if jax.process_count() > 1:
                self._leave_restore(step, first)
            try:
                trees = ocp.load_checkpointables(path, abstract)
            except FAILURES as error:
                raise judge(path, "unreadable", error) from error
        found = fingerprints(trees)
        wrong = [name for name, value in found.items() if record.fingerprints.get(name) != value]
        if wrong:
            others = f", and {len(wrong) - 1} others" if len(wrong) > 1 else ""
            raise CorruptCheckpointError(f"{wrong[0]}{others}: the fingerprint does not match")
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        [device, *_] = jax.tree.leaves(shardings)[0].device_set
        if device.platform != "cpu":
            return trees  # a copy would hold the state twice, and device memory is never shared with Orbax
        # On a CPU, a donated array could share its memory with a buffer of Orbax.
        return jax.device_put(trees, shardings, may_alias=False)

    def _leave_restore(self, step: int, error: Exception) -> NoReturn:
        """Ends the restore of one of several processes.

        It does not retry: the others may have read their shards, and wait for this process in a barrier of Orbax.

        Raises:
            UnreadableError: the checkpoint cannot be read at the moment.
            UnavailableError: it is corrupt. It was renamed, so that the next start takes another one.
        """
        peers.settle()
        damage = judge(self.directory / str(step), "unreadable", error)
        if not isinstance(damage, CorruptCheckpointError):
            raise damage from error
        self._quarantine(step, damage, by_any=True)
        raise UnavailableError(
            f"{damage} in process {jax.process_index()}",
            field=f"{self.directory}/{step}",
            remedy="restart the command on every host",
        ) from error

    def _quarantine(self, step: int, damage: CorruptCheckpointError, *, by_any: bool = False) -> None:
        """Renames a corrupt checkpoint to N.corrupt-REASON.

        by_any: any process may rename it, not only process 0.

        Raises:
            WorkdirError: it cannot be renamed.
        """
        summary = str(damage).split("(")[0].lower()
        reason = re.sub(r"[^a-z0-9]+", "-", summary).strip("-")[:40]
        name = f"{str(step)[:100]}.corrupt-{reason}"  # shortened: a directory's name may be one number of 255 digits
        target = self.directory / name
        count = 2
        while target.exists():  # the same step was refused for the same reason before
            target = self.directory / f"{name}-{count}"
            count += 1
        self._close_orbax()  # Orbax caches the list of steps, and would refuse to save this step again
        if by_any or jax.process_index() == 0:
            self._rename(step, target, damage)
        log.warning("checkpoint %s/%d refused: %s; renamed to %s", self.directory, step, damage, target.name)

    def _rename(self, step: int, target: epath.Path, damage: CorruptCheckpointError) -> None:
        """Renames a corrupt checkpoint, unless another process has renamed it already.

        Raises:
            WorkdirError: it cannot be renamed.
        """
        try:
            (self.directory / str(step)).rename(target)
        except FileNotFoundError:
            return
        except Exception as error:  # of the file system, or of the library that reaches a bucket
            raise WorkdirError(
                f"damaged ({damage}), and cannot be renamed: {why(error)}; nothing was changed",
                field=f"{self.directory}/{step}",
                remedy="allow writing there, or rename it: the run then resumes from the checkpoint before it",
            ) from error
