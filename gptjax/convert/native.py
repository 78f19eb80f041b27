"""gptjax's own checkpoints as a format to convert from and to."""

import dataclasses
import itertools
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from gptjax.checkpoint import Checkpointer
from gptjax.config import Config, GPTConfig
from gptjax.convert.names import from_leaf, layers
from gptjax.convert.weights import (
    DTYPES,
    AdamW,
    NamedTensors,
    ReadTensor,
    Tensor,
    Weights,
    make_history,
    make_weights,
    read_leaves,
    read_tensors,
)
from gptjax.data.tokenizer import Tokenizer, load_tokenizer
from gptjax.errors import ConfigError, DataError, one_line
from gptjax.fingerprint import fingerprint_array
from gptjax.identity import read_identity
from gptjax.log_reader import newest_rows
from gptjax.optim import make_optimizer
from gptjax.orbax_context import CHUNK_BYTES, saving_context
from gptjax.params import Param, check_paths, leaf_shape, rows, tensor_shape
from gptjax.record import CorruptCheckpointError, Record, seal
from gptjax.sharding import abstract_params, nest, path_name
from gptjax.state import AVERAGE
from gptjax.stored import StoredParams, has_average
from gptjax.versions import versions
from gptjax.workdir import CONFIG_FILE, METRICS_FILE, TOKENIZER_FILE, check_bucket, write_json

log = logging.getLogger("gptjax")
STEP = "[0-9]{1,18}"  # a step as text; int() refuses thousands of digits, and str.isdigit() accepts superscripts
RAW = "@raw"  # at the end of a path: the parameters, where the checkpoint has an average of them, too
# AdamW's state in the opt_state of gptjax.optim: optax's count, and trees like the parameters'.
COUNT, FIRST, SECOND = "0/count", "0/mu/", "0/nu/"
MOST_LAYERS = 10_000  # so that no loop over layers is as long as a number in a damaged file


def read(path: str, *, dropout: float | None = None) -> Weights:
    """Returns the model of WORKDIR, WORKDIR@STEP, or one checkpoint's directory. WORKDIR means its newest checkpoint.

    WORKDIR@STEP,STEP means the mean of several checkpoints. Where a checkpoint has an average of its parameters, that
    is the model, unless the path ends in @raw.

    dropout: of the result; None means the checkpoint's.

    Raises:
        DataError: no such checkpoint exists, or it is damaged.
    """
    workdir, wanted, is_raw = locate(path)
    steps = [_choose_step(workdir, step) for step in wanted or (None,)]
    checkpoints = [_open_checkpoint(workdir, step) for step in steps]
    stored = checkpoints[-1]
    step = stored.step
    if not wanted:
        _require_own(workdir, stored)
    origin = f"gptjax:{workdir}@{','.join(map(str, steps))}{RAW if is_raw else ''}"
    config = stored.config.model
    for checkpoint in checkpoints:
        _check_parameters(checkpoint, config, origin)
    tree = AVERAGE if has_average(stored.record) and not is_raw else "params"
    if dropout is not None:
        config = dataclasses.replace(config, dropout=dropout)

    # An imported model keeps its source's dtype and history until it is trained.
    imported: Any = stored.record.history.get("imported")
    if not isinstance(imported, dict):
        imported = {}
    dtype = imported.get("dtype")
    history = _history(workdir, stored) if step and not imported else make_history(imported.get("history"))
    return make_weights(
        origin,
        config,
        _tensors(workdir, checkpoints, tree=tree),
        dtype=dtype if isinstance(dtype, str) and dtype in DTYPES else "float32",
        tokenizer=read_tokenizer(workdir),
        history=history,
        # The moments belong to the parameters of one step.
        adamw=_adamw(workdir, stored) if len(steps) == 1 and tree == "params" else None,
    )


def _open_checkpoint(workdir: str, step: int) -> StoredParams:
    try:
        return StoredParams(workdir, step)
    except (CorruptCheckpointError, ConfigError) as damage:
        raise _damaged(workdir, step, damage) from damage


def _adamw(workdir: str, stored: StoredParams) -> AdamW | None:
    """Returns AdamW's state in a checkpoint; None where there is none, or another optimizer's."""
    if stored.config.optim.name != "adamw" or f"opt_state/{COUNT}" not in stored.record.fingerprints:
        return None
    return AdamW(
        config=stored.config,
        step=stored.step,
        count=_count(workdir, stored),
        first=_tensors(workdir, [stored], tree="opt_state", prefix=FIRST),
        second=_tensors(workdir, [stored], tree="opt_state", prefix=SECOND),
    )


def _count(workdir: str, stored: StoredParams) -> Tensor:
    def read_count() -> np.ndarray:
        try:
            return stored.read(COUNT, (), tree="opt_state", dtype=np.int32)
        except CorruptCheckpointError as damage:
            raise _damaged(workdir, stored.step, damage) from damage

    return Tensor((), np.dtype(np.int32), read_count, label=COUNT)


def locate(text: str) -> tuple[str, tuple[int, ...], bool]:
    """Returns (work directory, steps or (), whether it ends in @raw) of `text`, as `read` accepts it.

    A path that exists is a work directory or a checkpoint, even if it ends in @STEP or @raw.

    Raises:
        DataError: there is no such directory.
    """
    check_bucket(text)
    path = epath.Path(text)
    if re.fullmatch(STEP, path.name) and path.parent.name == "checkpoints":
        return str(path.parent.parent), (int(path.name),), False
    if path.exists():
        return text, (), False
    if text.endswith(RAW):
        return (*locate(text.removesuffix(RAW))[:2], True)
    match = re.fullmatch(rf"(.+)@({STEP}(?:,{STEP})*)", text)
    if match is None:
        raise DataError("no such directory", field=text)
    workdir, steps = match.groups()
    if not epath.Path(workdir).exists():
        raise DataError("no such directory", field=workdir)
    return workdir, tuple(map(int, steps.split(","))), False


def _choose_step(workdir: str, wanted: int | None) -> int:
    """Returns `wanted` or the newest step, if it has a checkpoint."""
    steps = Checkpointer(workdir).steps()
    if steps and wanted is None:
        return steps[-1]
    if wanted in steps:
        return wanted
    of_step = "" if wanted is None else f" of step {wanted}"
    available = ", ".join(map(str, steps)) or "none"
    raise DataError(f"no checkpoint{of_step}; available: {available}", field=workdir)


def _require_own(workdir: str, stored: StoredParams) -> None:
    """Raises DataError if the newest checkpoint belongs to another run than the work directory."""
    identity = read_identity(workdir)
    if identity.owns(stored.record):
        return
    raise DataError(
        identity.explain(stored.record),
        field=f"{workdir}/checkpoints/{stored.step}",
        remedy=f"to use it anyway: {workdir}@{stored.step}",
    )


def _check_parameters(stored: StoredParams, config: GPTConfig, origin: str) -> None:
    """Raises DataError unless the checkpoint's parameters are those of a model of `config`."""
    if config.n_layer > MOST_LAYERS:
        raise DataError(f"n_layer={config.n_layer}: expected at most {MOST_LAYERS}", field=origin)
    saved = []
    for name in stored.record.fingerprints:
        if name.startswith("params/"):
            saved.append(name.removeprefix("params/"))
    try:
        check_paths(saved, config)
    except ConfigError as error:
        raise DataError.about(origin, error) from error


def _damaged(workdir: str, step: int, damage: Exception) -> DataError:
    others = [str(other) for other in Checkpointer(workdir).steps() if other != step]
    remedy = f"take another with @STEP: {', '.join(others)}" if others else ""
    return DataError(
        f"damaged: {one_line(damage)}",
        field=f"{workdir}/checkpoints/{step}",
        remedy=remedy,
    )


def _tensors(workdir: str, checkpoints: list[StoredParams], *, tree: str, prefix: str = "") -> dict[str, Tensor]:
    """Returns the leaves of `tree` below `prefix`, which has a leaf for each parameter: the mean of all checkpoints."""
    config = checkpoints[-1].config.model
    # One leaf stays in memory: a leaf has all layers of its tensors, which are asked for one after another.
    newest: dict[str, np.ndarray] = {}

    def read_leaf(row: Param) -> np.ndarray:
        if row.path not in newest:
            newest.clear()
            leaves = []
            for stored in checkpoints:
                try:
                    leaves.append(stored.read(prefix + row.path, leaf_shape(row, config), tree=tree))
                except CorruptCheckpointError as damage:
                    raise _damaged(workdir, stored.step, damage) from damage
            newest[row.path] = leaves[0]
            if len(leaves) > 1:
                newest[row.path] = np.asarray(np.mean(leaves, axis=0, dtype=np.float64), np.float32)
        return newest[row.path]

    def reader(row: Param, layer: int | None) -> ReadTensor:
        return lambda: from_leaf(row, read_leaf(row), config, layer=layer)

    tensors = {}
    for row in rows(config):
        for layer, name in layers(row, config):
            tensors[name] = Tensor(
                shape=tensor_shape(row, config),
                dtype=DTYPES["float32"],
                read=reader(row, layer),
                label=prefix + name,
            )
    return tensors


def read_tokenizer(workdir: str) -> Tokenizer | None:
    """Returns the tokenizer that is stored next to the checkpoints, or None.

    Raises:
        DataError: the file is damaged or no regular file.
        UnavailableError: it cannot be read now.
    """
    path = epath.Path(workdir) / TOKENIZER_FILE
    is_there = path.exists() or os.path.lexists(path)  # a link that leads nowhere is reported, too
    return load_tokenizer(str(path)) if is_there else None


def _history(workdir: str, stored: StoredParams) -> dict[str, Any]:
    """Returns the history of a trained checkpoint, for a model card."""
    config = stored.config
    tokens_per_step = config.data.global_batch_size * config.model.block_size
    source = config.data.mix or config.data.path or config.data.source
    fingerprint = stored.record.data.get("fingerprint", "no fingerprint")
    history = {
        "step": stored.step,
        "tokens": stored.step * tokens_per_step,
        "data": f"{source} ({fingerprint})",
        "config": stored.record.config,
    }
    return history | _losses(workdir, stored.step)


def _losses(workdir: str, step: int) -> dict[str, float]:
    """Returns the newest losses up to `step` in metrics.jsonl. If that is damaged or missing, there are none."""
    wanted = ("loss", "val_loss")
    found: dict[str, float] = {}
    try:
        for row in newest_rows(workdir, having=b"loss"):
            if row["step"] <= step:
                losses = {name: row.get(name) for name in wanted}
                found = make_history(losses) | found
            if len(found) == len(wanted):
                break
    except OSError as error:
        reason = error.strerror or one_line(error)
        log.warning("%s/%s: %s: converted without its losses", workdir, METRICS_FILE, reason)
    return found


def write(
    directory: str,
    final: str,
    weights: Weights,
    *,
    tensors: NamedTensors,
    allow_nonfinite: bool = False,
) -> None:
    """Writes a work directory with one checkpoint, config.json and the tokenizer.

    With AdamW's moments the checkpoint is of their step, and a run resumes from it. Otherwise it is of step 0, and has
    parameters only.

    final: the path to which the directory will be moved.
    tensors: (name, tensor) in the order of `read_tensors`.
    allow_nonfinite: accept moments that are NaN or infinite.

    Raises:
        OSError: a file cannot be written.
        DataError: a moment is damaged or not finite.
    """
    tokenizer = weights.tokenizer
    adamw = weights.adamw
    run = adamw.config if adamw else Config()
    config = dataclasses.replace(
        run,
        model=weights.config,
        data=dataclasses.replace(run.data, tokenizer=_tokenizer_name(tokenizer, final)),
        init_from=weights.origin,
    )
    imported = {
        "from": weights.origin,
        "dtype": weights.dtype,
        "history": dict(weights.history),
    }
    leaves = (("params", path, leaf) for path, leaf in read_leaves(weights, tensors))
    if adamw:
        leaves = itertools.chain(leaves, _moment_leaves(weights, adamw, allow_nonfinite=allow_nonfinite))
    save_leaves(
        directory,
        leaves,
        step=adamw.step if adamw else 0,
        config=config,
        history={"imported": imported},
    )
    write_json(f"{directory}/{CONFIG_FILE}", config.to_dict())
    if tokenizer is not None:
        tokenizer.save(f"{directory}/{TOKENIZER_FILE}")


def _tokenizer_name(tokenizer: Tokenizer | None, final: str) -> str:
    """Returns data.tokenizer for `tokenizer`: the name of a built-in one, or the path of the saved file."""
    if tokenizer is None:
        return "gpt2"
    for name in ("gpt2", "bytes"):
        # A file may have the name of a built-in tokenizer and other tokens.
        if tokenizer.name == name and tokenizer.sha256 == load_tokenizer(name).sha256:
            return name
    return os.path.join(os.path.abspath(final), TOKENIZER_FILE)


def _moment_leaves(
    weights: Weights,
    adamw: AdamW,
    *,
    allow_nonfinite: bool,
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields (tree, path, leaf) of AdamW's state."""
    yield "opt_state", COUNT, np.asarray(adamw.count.read(), np.int32)
    for prefix, moments in ((FIRST, adamw.first), (SECOND, adamw.second)):
        tensors = read_tensors(weights, source=moments, allow_nonfinite=allow_nonfinite)
        for path, leaf in read_leaves(weights, tensors):
            yield "opt_state", prefix + path, leaf


def save_leaves(
    workdir: str,
    leaves: Iterable[tuple[str, str, np.ndarray]],
    *,
    step: int = 0,
    config: Config,
    history: dict[str, Any],
) -> None:
    """Writes the checkpoint of `step`.

    One leaf at a time is in memory: Orbax saves each leaf by itself, then a tree of broadcast zeros. Then the leaves'
    directories replace those of the zeros.

    leaves: (tree, path, leaf): the parameters, each of `params.leaf_shape`, float32, and the optimizer's state if any.

    Raises:
        OSError: the checkpoint cannot be written.
    """
    root = os.path.abspath(workdir)
    checkpoint = epath.Path(root) / "checkpoints" / str(step)
    context = saving_context()
    context.memory.deepcopy_host_arrays = False
    context.memory.write_concurrent_bytes = 2 * CHUNK_BYTES
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    fingerprints = {}
    zeros: dict[str, list[tuple[str, np.ndarray]]] = {}
    parts = epath.Path(tempfile.mkdtemp(prefix="leaves-", dir=root))
    try:
        with context:
            for tree, path, leaf in leaves:
                fingerprints[f"{tree}/{path}"] = fingerprint_array(leaf)
                _save_now(parts / f"{tree}.{path.replace('/', '.')}", {tree: nest([(path, leaf)])})
                zero = np.zeros((), leaf.dtype)
                view = np.broadcast_to(zero, leaf.shape)  # takes no memory
                zeros.setdefault(tree, []).append((path, view))
                del leaf  # before the next one is made
            record = Record(step, config.to_dict(), history, {}, fingerprints, versions())
            sealed: Any = seal(record)
            trees = {"params": nest(zeros["params"])}
            if "opt_state" in zeros:
                trees["opt_state"] = _as_optimizer_state(zeros["opt_state"], config)
            _save_now(checkpoint, trees, custom_metadata=sealed)
        for part in parts.iterdir():
            tree, _, name = part.name.partition(".")
            final = checkpoint / tree / name
            final.rmtree()
            (part / tree / name).rename(final)
    finally:
        parts.rmtree()


def _as_optimizer_state(leaves: list[tuple[str, np.ndarray]], config: Config) -> Any:
    """Returns the (path, leaf) pairs as the optimizer's state, whose tuples Orbax distinguishes from dicts."""
    optimizer = make_optimizer(config.optim)
    abstract = jax.eval_shape(optimizer.init, abstract_params(config.model))
    by_path = dict(leaves)
    return jax.tree.map_with_path(lambda path, _: by_path[path_name(path)], abstract)


def _save_now(path: Any, trees: dict[str, Any], **options: Any) -> None:
    try:
        ocp.save_checkpointables(path, trees, **options)
    except ValueError as error:  # tensorstore's type for the errors of a file system, such as a full disk
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise OSError(one_line(error)) from error
        number = int(code[1])
        raise OSError(number, os.strerror(number)) from error
