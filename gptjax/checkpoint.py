"""Checkpoints: save in the background, verify every bit on the way back, fall back to an older one, on any mesh.

A checkpoint is `checkpoints/<step>/` with `params` and `opt_state` as Orbax trees, and a record in Orbax's custom
metadata: step, config, history, data fingerprint, a fingerprint of every array, versions. The record carries its own
checksum.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from gptjax.config import Config, flatten, from_dict
from gptjax.errors import CheckpointError, ConfigError, DivergedError, SaveError, WorkdirError, plain
from gptjax.model import GPT
from gptjax.sharding import make_mesh, nest, param_shardings, path_name
from gptjax.state import TrainState
from gptjax.workdir import is_bucket

log = logging.getLogger("gptjax")
FORMAT = 2  # 1 had all arrays of a tree in one database
MAX_FAILED_SAVES = 3
COUNTERS = "experimental_collect_matching_metrics"  # of tensorstore
TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of what Orbax has not finished
REMOVALS = 20  # attempts, 0.05 s apart, to remove what a failed save has left
RETRY_SECONDS = 2.0  # before the last save of a run is tried again
STEP_NAME = re.compile(r"0|[1-9][0-9]*")  # "007" and "\u00b2" are digits, too, but nothing that a save makes
LARGEST_RECORD = 32 * 2**20  # bytes; one of GPT-2 XL takes ten thousand
CHUNK_BYTES = 16 * 2**20  # of what is written at a time where memory is to be spared
CACHED_WORDS = 2**18  # of a fingerprint at a time: fewer, and threads wait for each other; more, and caches overflow
DAMAGE = (
    ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError,
    FileNotFoundError, NotADirectoryError, IsADirectoryError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint says of itself."""

    step: int
    config: dict[str, Any]
    history: dict[str, Any]  # what happened so far: skipped steps, seconds spent
    data: dict[str, Any]  # fingerprint of the data, and what gives the order of its batches
    fingerprints: dict[str, list[int]]
    versions: dict[str, str]
    format: int = FORMAT


class Damaged(Exception):
    """One checkpoint cannot be trusted; the message is a short reason."""


class Checkpointer:
    """The checkpoints of one work directory. Close it: the last save is finished, or fails, there."""

    def __init__(self, workdir: str, *, keep: int = 1) -> None:
        policies: Any = ocp.training.preservation_policies
        decisions: Any = ocp.training.save_decision_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["val_loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        self.directory = epath.Path(workdir if is_bucket(workdir) else os.path.abspath(workdir)) / "checkpoints"
        self._open = lambda: ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=decisions.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=True,
            context=_saving_context(),
        )
        self._keep = keep  # beside the best one, and the one that is being written
        self._orbax: Any = None
        self._pending: Any = None
        self._failed = 0
        self._state: TrainState | None = None  # of the last save, with what starts it again
        self._start: Callable[[], None] = lambda: None

    def steps(self) -> list[int]:
        """Returns the steps of all finished checkpoints, damaged or not, in rising order."""
        if not self.directory.exists():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if STEP_NAME.fullmatch(path.name))

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
        """Starts to save `state`, which may be donated as soon as this returns; first waits for the save before.

        metrics: of this step's validation, to keep the best by `val_loss`; None where there was none.

        Raises:
            SaveError: saves have failed several times in a row.
            DivergedError: a value is not finite; such a state is never saved.
        """
        self.finish_save()
        trees = {"params": state.params, "opt_state": state.opt_state}
        _refuse_nonfinite(trees, step)
        record = Record(step, config.to_dict(), history, data, fingerprints(trees), versions())
        self._state, self._start = state, functools.partial(self._start_save, step, trees, record, metrics)
        self._start()

    def _start_save(self, step: int, trees: dict[str, Any], record: Record, metrics: dict[str, float] | None) -> None:
        try:
            if self._failed and self._is_saved(step, record):  # what failed came after
                self._failed = 0
                return
            if self._orbax is None:
                self._orbax = self._open()
            self._pending = self._orbax.save_checkpointables_async(
                step, trees, custom_metadata=_seal(record), metrics=metrics
            )
        except Exception as error:  # as in _finish_pending
            self._save_failed(error, MAX_FAILED_SAVES)
            return
        if self._pending is None:  # which is how Orbax answers a step that is not above the newest
            raise SaveError(f"{self.directory}: a checkpoint after step {step} is there already")

    def _is_saved(self, step: int, record: Record) -> bool:
        try:
            return step in self.steps() and self.read_record(step).fingerprints == record.fingerprints
        except Damaged:
            return False

    def finish_save(self) -> None:
        """Returns when no save runs any more, and its state is let go; one that failed counts as in `save`."""
        self._finish_pending(MAX_FAILED_SAVES)
        self._let_go()

    def _let_go(self) -> None:
        self._state, self._start = None, lambda: None

    def wait(self) -> None:
        """Returns when the last save is on disk; if it fails it is tried again, which needs its state: not donated.

        Raises:
            SaveError: it failed MAX_FAILED_SAVES times, or its state is gone.
        """
        while True:
            leaves = jax.tree.leaves(self._state)
            self._finish_pending(1 if any(leaf.is_deleted() for leaf in leaves) else MAX_FAILED_SAVES)
            if not self._failed or self._state is None:
                break
            time.sleep(RETRY_SECONDS)
            self._start()
        self._let_go()
        self._failed = 0

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._close_orbax()

    def _close_orbax(self) -> None:
        if self._orbax is not None:
            self._orbax.close()
            self._orbax = None

    def _finish_pending(self, allowed: int) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
            self._failed = 0
        except Exception as error:  # whatever Orbax met: it is counted, told, and raised at the limit
            self._save_failed(error, allowed)

    def _save_failed(self, error: Exception, allowed: int) -> None:
        self._failed += 1
        orbax, self._orbax = self._orbax, None  # opened anew at the next save, which re-reads the directory
        with contextlib.suppress(Exception):  # it may tell the same failure once more
            if orbax is not None:
                orbax.close()
        self._remove_temporary()
        if self._failed >= allowed:
            self._let_go()
            raise SaveError(f"{self.directory}: {self._failed} saves failed: {_reason(error)}") from error
        log.warning("save failed, training goes on: %s", _reason(error))

    def _remove_temporary(self) -> None:
        """Removes what a failed save has left: on a full disk, it would keep the next one from its place."""
        if jax.process_index() or not self.directory.exists():
            return
        for _ in range(REMOVALS):  # some of the save's threads may still write there
            left = [path for path in self.directory.iterdir() if TEMPORARY in path.name]
            for path in left:
                with contextlib.suppress(OSError):  # then the next save removes it
                    path.rmtree()
            if not left:
                return
            time.sleep(0.05)

    def check_room(self, abstract: TrainState) -> str:
        """Returns a line on the room that checkpoints of `abstract` take, after writing and removing a small file.

        Raises:
            WorkdirError: nothing can be written there, or there is no room for one checkpoint.
        """
        leaves = jax.tree.leaves((abstract.params, abstract.opt_state))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        text = f"checkpoints: {size / 1e9:.3g} GB each, {self._keep + 2} of them at most"
        probe, is_new = self.directory / f".probe-{os.getpid()}", not self.directory.exists()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.write_text("can be written\n")
            probe.unlink()
            free = math.inf if is_bucket(str(self.directory)) else shutil.disk_usage(self.directory).free
            if is_new:  # a run that is refused after this leaves nothing behind
                self.directory.rmdir()
        except OSError as error:
            reason = f"cannot be written: {error.strerror}"
            raise WorkdirError(f"{self.directory}: {reason}; free it, or choose another --workdir") from error
        if free == math.inf:
            return text
        if free < size:
            room = f"a checkpoint takes {size / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"
            raise WorkdirError(f"{self.directory}: {room}; make room, or choose another --workdir")
        missing = (self._keep + 2 - len(self.steps())) * size
        if free < missing:
            log.warning("%s: %.3g GB are free, %.3g GB may be needed", self.directory, free / 1e9, missing / 1e9)
        return f"{text}; {free / 1e9:.3g} GB are free"

    def restore_latest(
        self, abstract: TrainState, *, check: Callable[[Record], None] = lambda record: None
    ) -> tuple[TrainState, Record] | None:
        """Returns the newest checkpoint that is intact, in the placement of `abstract`; None where there are none.

        check: called with each record before its arrays are read; raises to refuse the run.

        Raises:
            CheckpointError: there are checkpoints, and none is intact.
            ConfigError: they are converted weights, from which a run cannot go on.
        """
        refused: list[str] = []
        quarantined = self._quarantined()
        for step in reversed(self.steps()):
            try:
                record = self.read_record(step)
                self._refuse_bare(record)
                check(record)
                return self.restore(record, abstract), record
            except Damaged as damage:
                refused.append(f"step {step}: {damage}")
                self._quarantine(step, damage)
        refused += [path.name for path in quarantined]
        if refused:
            raise CheckpointError(
                f"{self.directory}: no usable checkpoint: {'; '.join(refused)}\n"
                "to start afresh, choose another --workdir or remove that directory"
            )
        return None

    def restore(self, record: Record, abstract: TrainState) -> TrainState:
        """Returns the state of one checkpoint, as `load` does."""
        trees = self.load(record.step, {"params": abstract.params, "opt_state": abstract.opt_state}, record)
        placed = NamedSharding(abstract.step.sharding.mesh, P())
        return TrainState(jax.device_put(jnp.asarray(record.step, jnp.int32), placed), **trees)

    def _refuse_bare(self, record: Record) -> None:
        if not any(name.startswith("opt_state") for name in record.fingerprints):
            raise ConfigError(
                f"--workdir={self.directory.parent}: holds converted weights, with no optimizer state to go on from; "
                f"choose another, with --config.init_from=gptjax:{self.directory.parent}"
            )

    def read_record(self, step: int) -> Record:
        """Returns the record of one checkpoint.

        Raises:
            Damaged: it cannot be read, or its checksum is wrong.
        """
        directory = self.directory / str(step)
        try:
            _refuse_strange_files(directory)
            file = directory / "_CHECKPOINT_METADATA"
            if file.stat().length > LARGEST_RECORD:
                raise ValueError(f"{file.stat().length} bytes")
            values = _unseal(json.loads(file.read_text())["custom_metadata"])
            if values["format"] > FORMAT:
                raise CheckpointError(f"{directory}: made by a newer gptjax {values['versions']}; upgrade this one")
            record = Record(**values)
            if not all(isinstance(value, dict) for value in (record.history, record.data, record.fingerprints)):
                raise TypeError("a field is of the wrong type")
        except CheckpointError:
            raise
        except DAMAGE as error:
            raise Damaged(f"record unreadable ({plain(error)})") from error
        except OSError as error:  # no damage: the disk or its permissions, and the next attempt may succeed
            raise CheckpointError(f"{directory}: cannot be read now: {error.strerror}; nothing was changed") from error
        if record.step != step:
            raise Damaged(f"its record is of step {record.step}")
        return record

    def load(self, step: int, abstract: dict[str, Any], record: Record) -> dict[str, Any]:
        """Returns the named trees of one checkpoint, each leaf checked against its fingerprint, fit for donation.

        Raises:
            Damaged: an array is missing, unreadable or not the one that was saved.
        """
        path = self.directory / str(step)
        try:
            trees = ocp.load_checkpointables(path, abstract)
        except DAMAGE:  # or a Ctrl-C, or a disk that was away for a moment: Orbax makes one error of all of them
            try:
                trees = ocp.load_checkpointables(path, abstract)
            except DAMAGE as error:
                raise Damaged(f"unreadable ({plain(error)})") from error
        found = fingerprints(trees)
        wrong = [name for name, value in found.items() if record.fingerprints.get(name) != value]
        if wrong:
            raise Damaged(f"{wrong[0]} is not what was saved" + (f", nor {len(wrong) - 1} more" if wrong[1:] else ""))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return jax.device_put(trees, shardings, may_alias=False)

    def _quarantined(self) -> list[Any]:
        return (
            sorted(path for path in self.directory.iterdir() if re.match(r"\d+\.corrupt-", path.name))
            if self.directory.exists()
            else []
        )

    def _quarantine(self, step: int, damage: Damaged) -> None:
        reason = re.sub(r"[^a-z0-9]+", "-", str(damage).split("(")[0].lower()).strip("-")[:40]
        name = f"{str(step)[:100]}.corrupt-{reason}"  # of a directory with as many digits as a name may have, too
        target = self.directory / name
        count = 2
        while target.exists():  # the same step was refused for the same reason before
            target, count = self.directory / f"{name}-{count}", count + 1
        log.warning("checkpoint %s/%d refused: %s; renamed to %s", self.directory, step, damage, target.name)
        self._close_orbax()  # it knows this step, and would not save it again
        if jax.process_index() == 0:
            (self.directory / str(step)).rename(target)


def load_params(workdir: str, *, step: int | None = None) -> tuple[Config, Any, int]:
    """Returns (config, params, step) of the newest intact checkpoint, or of `step`, on the devices of this process.

    Raises:
        CheckpointError: there is none.
    """
    checkpointer = Checkpointer(workdir)
    steps = checkpointer.steps()
    if not steps or (step is not None and step not in steps):
        have = ", ".join(map(str, steps)) or "none"
        wanted = "" if step is None else f" of step {step}"
        raise CheckpointError(f"--workdir={workdir}: no checkpoint{wanted}; there are: {have}")
    refused = []
    for candidate in [step] if step is not None else reversed(steps):
        try:
            record = checkpointer.read_record(candidate)
            config = from_dict(record.config)
            params = checkpointer.load(candidate, {"params": _abstract_params(config)}, record)["params"]
        except Damaged as damage:
            refused.append(f"step {candidate}: {damage}")
            log.warning("checkpoint %s/%d refused: %s", checkpointer.directory, candidate, damage)
            continue
        return config, params, candidate
    raise CheckpointError(f"--workdir={workdir}: no usable checkpoint: {'; '.join(refused)}")


def save_params(
    workdir: str, leaves: Iterable[tuple[str, np.ndarray]], *, config: Config, history: dict[str, Any]
) -> None:
    """Writes the checkpoint of step 0, without optimizer state, of (path, array) pairs that come one at a time.

    One leaf at a time is in memory: Orbax saves each by itself, then a tree of zeros that take none, whose arrays on
    disk give way to the leaves.

    Raises:
        OSError: it cannot be written.
    """
    directory = epath.Path(os.path.abspath(workdir)) / "checkpoints"
    context = _saving_context()
    context.memory.deepcopy_host_arrays = False
    context.memory.write_concurrent_bytes = 2 * CHUNK_BYTES
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    prints, zeros, parts = {}, [], epath.Path(tempfile.mkdtemp(prefix="leaves-", dir=os.path.abspath(workdir)))
    try:
        with context:
            for path, leaf in leaves:
                prints[f"params/{path}"] = fingerprint_array(leaf)
                _save_now(parts / path.replace("/", "."), {"params": nest([(path, leaf)])})
                zeros.append((path, np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)))
                del leaf  # before the next one is made
            sealed: Any = _seal(Record(0, config.to_dict(), history, {}, prints, versions()))
            _save_now(directory / "0", {"params": nest(zeros)}, custom_metadata=sealed)
        for part in parts.iterdir():
            (directory / "0" / "params" / part.name).rmtree()
            (part / "params" / part.name).rename(directory / "0" / "params" / part.name)
    finally:
        parts.rmtree()


@contextlib.contextmanager
def without_counters() -> Iterator[None]:
    """Has tensorstore tell none of its counters in this context.

    Orbax reads them four times a save, for a line of its log, and each time tensorstore keeps 4 kB for ever: what it
    makes of JSON is never freed (0.1.74 to 0.1.86).
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


def _saving_context() -> Any:
    """Returns how Orbax saves: each array in a directory of its own, not compressed.

    In one database for all of them, tensorstore would lose some memory at each save, and more of it the more arrays
    there are; compression would gain 7 % of the room, and have a process that saves often grow faster.
    """
    context: Any = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_compression = False
    context.array.saving.enable_write_sharding_file = False  # a fifth of a small save; ours are restored as asked for
    return context


def _save_now(path: Any, trees: dict[str, Any], **options: Any) -> None:
    try:
        ocp.save_checkpointables(path, trees, **options)
    except ValueError as error:  # as which tensorstore tells that a disk is full
        code = re.search(r"os_error_code='(\d+)'", str(error))
        raise OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(plain(error)) from error


class StoredParams:
    """The parameters of one checkpoint, read and verified one at a time, as NumPy arrays."""

    def __init__(self, directory: str, step: int) -> None:
        self._checkpointer, self.step = Checkpointer(directory), step
        self.record = self._checkpointer.read_record(step)
        self.config = from_dict(self.record.config)

    def read(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the float32 parameter at `path`.

        Raises:
            Damaged: it is missing, unreadable or not the one that was saved.
        """
        context: Any = ocp.Context()
        context.pytree.loading.partial_load = True
        context.memory.read_concurrent_bytes = 2 * CHUNK_BYTES
        try:
            wanted: Any = {"params": nest([(path, np.empty(shape, np.float32))])}
        except (ValueError, MemoryError) as error:
            raise Damaged(f"{path} would take more memory than there is") from error
        try:
            with context:
                tree = ocp.load_checkpointables(self._checkpointer.directory / str(self.step), wanted)
        except DAMAGE as error:
            raise Damaged(f"{path} is unreadable ({plain(error)})") from error
        [leaf] = jax.tree.leaves(tree)
        if fingerprint_array(leaf) != self.record.fingerprints.get(f"params/{path}"):
            raise Damaged(f"{path} is not what was saved")
        return leaf


def _refuse_strange_files(directory: Any) -> None:
    """Raises Damaged if a link or a pipe is in the checkpoint: Orbax makes none, and would follow it or wait."""
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            mode = os.lstat(os.path.join(folder, name)).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise Damaged(f"{name!a} is {'a link' if stat.S_ISLNK(mode) else 'not a file'}")


def _abstract_params(config: Config) -> Any:
    mesh = make_mesh(dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1), jax.local_devices()[:1])
    tokens = jax.ShapeDtypeStruct((1, config.model.block_size), jnp.int32)
    shapes = jax.eval_shape(GPT(config.model).init, jax.random.key(0), tokens)["params"]
    shardings = param_shardings(shapes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def fingerprints(tree: Any) -> dict[str, list[int]]:
    """Returns two 32-bit sums for each leaf, by path: any other bit, dtype or shape changes them; placement not."""
    sums = _fingerprint_all(tree)
    return {path_name(path): np.asarray(leaf).tolist() for path, leaf in jax.tree.leaves_with_path(sums)}


@jax.jit  # of a function with a name: a new lambda at each call would be compiled anew at each save
def _fingerprint_all(tree: Any) -> Any:
    return jax.tree.map(_fingerprint, tree)


@jax.jit  # so that leaves of one shape, as those of parameters and moments, are traced once
def _fingerprint(x: jax.Array) -> jax.Array:
    width = x.dtype.itemsize * 8
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
    index, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for dim in reversed(range(x.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= x.shape[dim]
    return jnp.stack([jnp.sum(_mix(bits ^ _mix(index + salt)), dtype=jnp.uint32) for salt in _salts(x)])


def fingerprint_array(x: np.ndarray) -> list[int]:
    """Returns what `fingerprints` does of one 32-bit array in NumPy: without a copy, and nothing to compile."""
    words, salts = np.ascontiguousarray(x).reshape(-1).view(np.uint32), _salts(x)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(lambda start: _sum_words(words, start, salts), range(0, len(words), CACHED_WORDS)))
    return [sum(map(int, column)) % 2**32 for column in zip(*parts, strict=True)]


def _sum_words(words: np.ndarray, start: int, salts: tuple[np.uint32, ...]) -> list[np.uint32]:
    """Returns the part of `_fingerprint`'s sums that the CACHED_WORDS words from `start` on make up."""
    part = words[start : start + CACHED_WORDS]
    index = np.arange(len(part), dtype=np.uint32) + np.uint32(start % 2**32)
    return [np.sum(_mix(part ^ _mix(index + salt)), dtype=np.uint32) for salt in salts]


def _salts(x: Any) -> tuple[np.uint32, np.uint32]:
    kind = zlib.crc32(f"{x.dtype}{x.shape}".encode())
    return np.uint32(0x9E3779B9 ^ kind), np.uint32(0x7F4A7C15 ^ kind)


def _refuse_nonfinite(trees: Any, step: int) -> None:
    counts = jax.tree.leaves_with_path(_count_nonfinite(trees))
    bad = [path_name(path) for path, count in counts if int(count)]
    if bad:
        raise DivergedError(f"step {step}: {bad[0]} is not finite: not saved; the checkpoint before it stands")


@jax.jit
def _count_nonfinite(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x), dtype=jnp.int32), tree)


def _mix(x: Any) -> Any:
    """The finaliser of MurmurHash3 (Appleby, public domain): a bijection of uint32 that spreads every bit."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _seal(record: Record) -> dict[str, str]:
    text = json.dumps(dataclasses.asdict(record), sort_keys=True)
    return {"record": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _unseal(sealed: dict[str, str]) -> dict[str, Any]:
    if hashlib.sha256(sealed["record"].encode()).hexdigest() != sealed["sha256"]:
        raise ValueError("wrong checksum")
    return json.loads(sealed["record"])


def versions() -> dict[str, str]:
    """Returns the versions of what a run's bits depend on."""
    names = ("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    return {name: importlib.metadata.version(name) for name in names}


def compare_configs(old: dict[str, Any], new: Config) -> None:
    """Accepts or refuses to continue a run of config `old` with `new`, noting what changed.

    Raises:
        ConfigError: the model or the optimizer is another one.
    """
    before, after = flatten(from_dict(old)), flatten(new)
    changed = {name: (before[name], after[name]) for name in after if before[name] != after[name]}
    fatal = {n: c for n, c in changed.items() if n.startswith("model.") or n == "optim.name"}
    if fatal:
        raise ConfigError(
            "\n".join(
                f"{n}: the checkpoint has {a!r}, the config {b!r}; choose another --workdir"
                for n, (a, b) in fatal.items()
            )
        )
    for name, (was, now) in changed.items():
        log.info("note: %s changed from %r to %r since the checkpoint", name, was, now)


def _reason(error: Exception) -> str:
    """Returns why something could not be written: the system's words where tensorstore has its number."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else plain(error)
