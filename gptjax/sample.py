"""Text from a trained model: `python -m gptjax.sample --workdir=DIR --prompt="Once upon a time"`.

Or from weights in any form that gptjax.convert reads: `--model=hf:DIR`, `--model=hf:OWNER/NAME`.

Generation keeps every layer's keys and values in a cache, which grows to block_size positions as they are needed, and
runs one jitted step in two shapes: C prompt tokens at a time, and one token at a time, the sampling inside; on an
accelerator many of the latter in one dispatch. When a row's context outgrows block_size it is cut to its last
block_size // 2 tokens, the cache is filled again from those, and generation goes on.
"""

from __future__ import annotations  # jax.Array in a signature would import JAX

import argparse
import codecs
import contextlib
import dataclasses
import functools
import io
import logging
import pathlib
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epy

from gptjax import chips, runtime, workdir
from gptjax.config import LARGEST_SEED, Config, MeshConfig
from gptjax.errors import ConfigError

with epy.lazy_imports():  # imported at their first use, so that a wrong flag exits before JAX loads
    import jax
    import jax.numpy as jnp

    from gptjax import checkpoint, loss, sharding
    from gptjax import model as gpt
    from gptjax.convert import formats
    from gptjax.data import tokenizer

log = logging.getLogger("gptjax")
PROMPT_CHUNK = 64  # C: prompt tokens per step
MAX_ROWS = 256  # rows generated at the same time, if their caches have room
CACHE_SHARE = 0.25  # of an accelerator's memory, for those caches
CPU_CACHE_BYTES = 2 * 2**30
SMALLEST_CONTEXT = 128  # positions of the caches at first: a token reads all that there are
BURST = 16  # tokens of each row in one dispatch, where the host could not dispatch them as fast as they are made
TOKENIZER_FILE = "tokenizer.json"
SEPARATOR = "-" * 15
PROMPT_HELP = "a text to go on from; may be repeated; without any, the model starts a document"
FLAGS = {  # name: (default, meaning)
    "num_samples": (1, "continuations of each prompt"),
    "max_new_tokens": (200, "tokens at most of each continuation"),
    "temperature": (0.8, "divides the logits; 0 takes the most likely token"),
    "top_k": (0, "only the k most likely tokens; 0 is off"),
    "top_p": (1.0, "only the most likely tokens that sum to this probability; 1 is off"),
    "min_p": (0.0, "only tokens at least so probable, relative to the most likely; 0 is off"),
    "seed": (0, "of the random choices"),
}


class Knobs(NamedTuple):
    """What shapes the choice of the next token: traced scalars, so that changing them compiles nothing."""

    temperature: Any  # 0 takes the most likely token
    top_k: Any  # 0 is off
    top_p: Any  # 1 is off
    min_p: Any  # 0 is off
    seed: Any
    vocab_size: Any  # ids from here on are never chosen


@dataclasses.dataclass
class Row:
    """One prompt and what has come of it."""

    index: int  # among all prompts: with the seed it fixes the row's randomness
    context: list[int]  # what the model sees
    new: list[int] = dataclasses.field(default_factory=list)
    done: bool = False


def generate(
    model: gpt.GPT,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eot_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    vocab_size: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Returns the new ids of each prompt: max_new_tokens, or fewer where end-of-text came first (it is left out).

    A row depends on its prompt, its index, the seed and the knobs, not on the other rows. An empty prompt starts from
    end-of-text; of one longer than block_size the end is used. The knobs are those of `sample_token`.

    params: the tree of `model`, on one device or on the mesh of gptjax.sharding.
    vocab_size: choose only ids below this, for a tokenizer smaller than the model's vocabulary; 0 means all of it.
    on_token: called as on_token(row, id) for each new id as soon as it is known; what it raises ends the generation.

    Raises:
        ConfigError: an argument or a prompt is out of range.
    """
    limit = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
    check_knobs(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    check_prompts(prompts, eot_id=eot_id, vocab_size=limit)
    knobs = Knobs(
        temperature=np.float32(temperature), top_k=np.int32(top_k), top_p=np.float32(top_p), min_p=np.float32(min_p),
        seed=np.uint32(seed), vocab_size=np.int32(limit),
    )  # fmt: skip
    rows = [Row(i, context) for i, context in enumerate(start_contexts(prompts, eot_id, model.config.block_size))]
    mesh = mesh_of(params)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        weights = split_layers(model, params)
        size = padded_rows(min(len(rows), rows_at_once(model, params)), mesh)
        steps = make_steps(model, params, size)
        for first in range(0, len(rows), size):
            _generate_rows(
                model, weights, rows[first : first + size], state=empty_state(model, params, size), steps=steps,
                knobs=knobs, eot_id=eot_id, max_new_tokens=max_new_tokens,
                on_token=on_token or (lambda row, token: None),
            )  # fmt: skip
    return [row.new for row in rows]


def _generate_rows(
    model: gpt.GPT,
    weights: Any,
    rows: list[Row],
    *,
    state: tuple[Any, jax.Array],
    steps: tuple[Callable[..., Any], int],
    knobs: Knobs,
    eot_id: int,
    max_new_tokens: int,
    on_token: Callable[[int, int], None],
) -> None:
    """Fills `new` of these rows, together; ids are read one dispatch late, while the device computes the next."""
    (caches, ids_B), (step, burst), block_size = state, steps, model.config.block_size
    size, n, new_KB, unread = len(ids_B), 0, None, None
    row_B = np.array([row.index for row in rows] + [0] * (size - len(rows)), np.int32)
    fill_B = np.full(size, block_size, np.int32)  # tokens in each row's cache; a full one is filled from its context
    step = functools.partial(step, weights, row_B=row_B, knobs=knobs)
    while n < max_new_tokens:
        if unread is not None and _full(rows, fill_B, block_size):  # their contexts lack the newest id
            _read(rows, unread, eot_id, on_token)
            unread = None
        if all(row.done for row in rows):
            return
        contexts = {b: cut_context(rows[b], block_size) for b in _full(rows, fill_B, block_size)}
        going_B = fill_B < block_size
        fits = not contexts and n + burst <= max_new_tokens and fill_B[going_B].max() + burst <= block_size
        count = burst if fits else 1
        caches = grow(caches, max([*(fill_B[going_B] + count), *map(len, contexts.values())]), block_size)
        if going_B.any():
            last_B = np.where(going_B, 0, -1).astype(np.int32)
            positions_B1 = fill_B[:, None].copy()  # the device may read a NumPy array after this call
            caches, ids_B, new_KB = step(caches, ids_B, None, positions_B1, last_B, n=np.int32(n), count=count)
            fill_B += count * going_B
        if contexts:
            fill_B[list(contexts)] = [len(context) for context in contexts.values()]
            for chunk in prompt_chunks(contexts, size, block_size):
                caches, ids_B, new_KB = step(caches, ids_B, *chunk, n=np.int32(n), count=1)
        if unread is not None:
            _read(rows, unread, eot_id, on_token)
        n, unread = n + count, new_KB
    _read(rows, unread, eot_id, on_token)


def _full(rows: list[Row], fill_B: np.ndarray, block_size: int) -> list[int]:
    return [b for b, row in enumerate(rows) if not row.done and fill_B[b] >= block_size]


def _read(rows: list[Row], new_KB: Any, eot_id: int, on_token: Callable[[int, int], None]) -> None:
    """Waits for the newest ids and gives each to its row, ending those at end-of-text."""
    for ids_B in np.asarray(new_KB).tolist():
        for row, token in zip(rows, ids_B, strict=False):
            row.done |= token == eot_id
            if not row.done:
                row.context.append(token)
                row.new.append(token)
                on_token(row.index, token)


def cut_context(row: Row, block_size: int) -> list[int]:
    """Returns the row's context, after cutting one longer than block_size to its last block_size // 2 tokens."""
    if len(row.context) > block_size:
        del row.context[: -max(1, block_size // 2)]
    return row.context


def prompt_chunks(
    contexts: dict[int, list[int]], size: int, block_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (tokens_BC, positions_BC, last_B) that feed `contexts` to those rows and leave the others as they are.

    last_B: the index of a context's last token where this chunk has it, else -1. A position of block_size is dropped.
    """
    C = min(PROMPT_CHUNK, block_size)
    width = -(-max(map(len, contexts.values())) // C) * C
    tokens_BT = np.zeros((size, width), np.int32)
    positions_BT = np.full((size, width), block_size, np.int32)
    end_B = np.full(size, -1, np.int32)
    for b, context in contexts.items():
        tokens_BT[b, : len(context)] = context
        positions_BT[b, : len(context)] = np.arange(len(context))
        end_B[b] = len(context) - 1
    for start in range(0, width, C):
        here = slice(start, start + C)
        last_B = np.where((end_B >= start) & (end_B < start + C), end_B - start, -1).astype(np.int32)
        yield tokens_BT[:, here], positions_BT[:, here], last_B


def make_steps(model: gpt.GPT, params: Any, size: int) -> tuple[Callable[..., Any], int]:
    """Returns the step for so many rows where the parameters lie, and how many tokens a dispatch of it should make."""
    platform = device_of(params).platform
    # XLA would write one row's products as sums: GPT-2 small on an H200 would move 524 MB a token instead of 265. With
    # two rows and more it moves as much either way, in fewer kernels if it may choose.
    options = (("xla_disable_hlo_passes", "dot-strength-reduction"),) if platform == "gpu" and size == 1 else ()
    return make_step(typing.cast(Any, model), options), 1 if platform == "cpu" else BURST


@functools.lru_cache(maxsize=8)
def make_step(model: Any, options: tuple[tuple[str, Any], ...] = ()) -> Callable[..., Any]:
    """Returns, for a GPT, the jitted step(weights, caches, ids_B, tokens_BC, positions_BC, last_B, *, row_B, n, count,
    knobs) -> (caches, ids_B, new_KB), which consumes the caches; `options` are the compiler's.

    Feeds the chunk and samples the n-th new id of each row from the logits at its index last_B; a row whose last_B is
    negative keeps its id. tokens_BC: None feeds the ids of the step before, with C = 1, `count` times in a loop on the
    device: new_KB has the ids of each.
    """
    extend = make_extend(model)

    def feed(
        weights: Any, state: tuple[Any, jax.Array], tokens_BC: Any, positions_BC: Any, last_B: Any, *,
        row_B: Any, n: Any, knobs: Knobs,
    ) -> tuple[Any, jax.Array]:  # fmt: skip
        caches, ids_B = state
        tokens_BC = ids_B[:, None] if tokens_BC is None else tokens_BC
        caches, logits_BV = extend(weights, caches, tokens_BC, positions_BC, jnp.maximum(last_B, 0))
        column_V = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
        logits_BV = jnp.where(column_V < knobs.vocab_size, logits_BV, -jnp.inf)
        key_B = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(jax.random.key(knobs.seed), row), n))(row_B)
        new_B = sample_token(logits_BV, key_B, knobs.temperature, knobs.top_k, knobs.top_p, knobs.min_p)
        return caches, sharding.constrain(jnp.where(last_B >= 0, new_B, ids_B), jax.sharding.PartitionSpec())

    def step(
        weights: Any, caches: Any, ids_B: Any, tokens_BC: Any, positions_BC: Any, last_B: Any, *,
        row_B: Any, n: Any, count: int, knobs: Knobs,
    ) -> tuple[Any, jax.Array, jax.Array]:  # fmt: skip
        def one(state: Any, i: Any) -> tuple[Any, jax.Array]:
            at_BC = positions_BC + i * (last_B >= 0)[:, None]
            state = feed(weights, state, tokens_BC, at_BC, last_B, row_B=row_B, n=n + i, knobs=knobs)
            return state, state[1]

        if count == 1:
            state, new_B = one((caches, ids_B), 0)
            return *state, new_B[None]
        state, new_KB = jax.lax.scan(one, (caches, ids_B), jnp.arange(count))
        return *state, new_KB

    return jax.jit(step, donate_argnums=1, static_argnames="count", compiler_options=dict(options) or None)


def make_extend(model: gpt.GPT) -> Callable[..., tuple[Any, jax.Array]]:
    """Returns extend(weights, caches, tokens_BC, positions_BC, last_B) -> (caches, logits_BV).

    Computes C more tokens of each row at their positions, and the float32 logits of the true vocabulary after the
    token at index last_B. weights: from `split_layers`. caches: (k_BNSH, v_BNSH) per layer. A cache slot above a
    token's position is hidden from it; a position of block_size or more is not kept.
    """
    config, compute = model.config, model.compute
    block = gpt.Block(config, compute)

    def extend(weights: Any, caches: Any, tokens_BC: Any, positions_BC: Any, last_B: Any) -> tuple[Any, jax.Array]:
        x_BCD: Any = model.apply({"params": weights["tables"]}, tokens_BC, positions_BC, method="embed")
        x = x_BCD.reshape(-1, config.n_embd) if compute.flat else x_BCD
        new_caches = []
        for layer, (k_BNSH, v_BNSH) in zip(weights["layers"], caches, strict=True):
            cache = gpt.Cache(k_BNSH, v_BNSH, positions_BC)
            x, cache = typing.cast(Any, block.apply({"params": layer}, x, tokens_BC.shape[0], None, cache))
            spec = cache_spec(config.n_head)
            new_caches.append(tuple(sharding.constrain(a, spec) for a in (cache.k_BNSH, cache.v_BNSH)))
        x_B1D: Any = jnp.take_along_axis(x.reshape(x_BCD.shape), last_B[:, None, None], axis=1)
        x_B1D = model.apply({"params": weights["tables"]}, x_B1D, method="final_norm")
        logits_B1V = loss.masked_logits(x_B1D, weights["head_DV"], config.vocab_size)
        return new_caches, logits_B1V[:, 0, : config.vocab_size]

    return extend


def split_layers(model: gpt.GPT, params: Any) -> Any:
    """Returns {"tables": everything but the layers, "layers": [one tree per layer], "head_DV": the output head}.

    Matrices are in the dtype of the products, the head also in their layout: reading them is most of a token's time.
    """
    tables = {name: tree for name, tree in params.items() if name != "h"}
    return {"tables": tables, **_make_split(model.config.n_layer, model.compute.dtype)(params)}


@functools.lru_cache(maxsize=8)
def _make_split(n_layer: int, dtype: Any) -> Callable[[Any], dict[str, Any]]:
    def split(params: Any) -> dict[str, Any]:
        stacked = params["h"]
        matrices = jax.tree.map(lambda a: a.astype(dtype), {name: stacked[name] for name in ("attn", "mlp")})
        layers = [jax.tree.map(lambda a, i=i: a[i], stacked | matrices) for i in range(n_layer)]
        return {"layers": layers, "head_DV": gpt.head(params).astype(dtype)}

    return jax.jit(split)


def empty_state(model: gpt.GPT, params: Any, size: int) -> tuple[Any, jax.Array]:
    """Returns (caches, ids_B) of zeros for `size` rows, placed as a step returns them: or it would compile twice."""
    c, mesh = model.config, mesh_of(params)
    placed = lambda spec: (  # noqa: E731
        jax.sharding.NamedSharding(mesh, spec) if mesh else getattr(jax.tree.leaves(params)[0], "sharding", None)
    )
    shape = (size, c.n_head, min(SMALLEST_CONTEXT, c.block_size), c.n_embd // c.n_head)
    zeros = lambda: jnp.zeros(shape, model.compute.dtype, device=placed(cache_spec(c.n_head)))  # noqa: E731
    ids_B = jnp.zeros(size, jnp.int32, device=placed(jax.sharding.PartitionSpec()))
    return [(zeros(), zeros()) for _ in range(c.n_layer)], ids_B


def grow(caches: Any, positions: int, block_size: int) -> Any:
    """Returns the caches with room for so many positions: doubled until they have it, block_size at most."""
    assert positions <= block_size, positions
    size = caches[0][0].shape[2]
    while size < positions:
        size = min(2 * size, block_size)
    return caches if size == caches[0][0].shape[2] else _make_grow(size)(caches)


@functools.lru_cache(maxsize=16)
def _make_grow(size: int) -> Callable[[Any], Any]:
    def pad(cache_BNSH: Any) -> Any:
        wider = jnp.pad(cache_BNSH, ((0, 0), (0, 0), (0, size - cache_BNSH.shape[2]), (0, 0)))
        return sharding.constrain(wider, cache_spec(cache_BNSH.shape[1]))

    return jax.jit(lambda caches: jax.tree.map(pad, caches))


def cache_spec(n_head: int) -> Any:
    """Returns the placement of keys and values BNSH: rows over the data axes, heads over `tensor` if they fit."""
    tensor = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    return jax.sharding.PartitionSpec(sharding.BATCH_AXES, None if n_head % tensor else "tensor", None, None)


def mesh_of(params: Any) -> Any:
    """Returns the mesh on which `params` lie, or None."""
    placed = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return placed.mesh if isinstance(placed, jax.sharding.NamedSharding) else None


def device_of(params: Any) -> Any:
    """Returns one of the devices on which `params` lie, or will."""
    placed = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return next(iter(placed.device_set)) if placed else jax.devices()[0]


def rows_at_once(model: gpt.GPT, params: Any) -> int:
    """Returns how many rows' caches may be in memory at the same time."""
    c, mesh, device = model.config, mesh_of(params), device_of(params)
    row_bytes = 2 * c.n_layer * c.block_size * c.n_embd * jnp.dtype(model.compute.dtype).itemsize
    room = CPU_CACHE_BYTES if device.platform == "cpu" else CACHE_SHARE * chips.device_memory(device)
    return int(max(1, min(MAX_ROWS, room * (mesh.size if mesh else 1) // row_bytes)))


def padded_rows(count: int, mesh: Any) -> int:
    """Returns `count`, or a little more on a mesh: as many rows as its data axes divide."""
    parts = sharding.data_parallel_size(mesh) if mesh else 1
    return -(-count // parts) * parts


def sample_token(logits_BV: Any, key_B: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any) -> jax.Array:
    """Returns ids_B drawn from softmax(logits / temperature), restricted by top_k, then top_p, then min_p.

    temperature: 0 takes the most likely id. All four may be traced. The order, and what each one keeps, are those of
    Hugging Face's generate(); see `filter_logits`.
    """
    scaled_BV = logits_BV / jnp.where(temperature > 0, temperature, 1.0)
    # Sorting the vocabulary can cost more than a small model.
    filtered_BV = jax.lax.cond(
        (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)),
        lambda x: filter_logits(x, top_k, top_p, min_p),
        lambda x: x,
        scaled_BV,
    )
    return jax.lax.cond(
        temperature > 0,
        lambda x: jax.vmap(jax.random.categorical)(key_B, x),
        lambda _: jnp.argmax(logits_BV, axis=-1),
        filtered_BV,
    ).astype(jnp.int32)


def filter_logits(logits_BV: Any, top_k: Any, top_p: Any, min_p: Any) -> jax.Array:
    """Returns the logits with those set to -inf that are not among

    - the top_k largest (0: off),
    - and of these, renormalised, the fewest whose probabilities sum to at least top_p (1: off; Holtzman et al. 2020,
      "The Curious Case of Neural Text Degeneration", section 3.1),
    - and at least min_p times as probable as the most likely (0: off; Nguyen et al. 2024, "Min-p Sampling").

    The most likely id always stays; ids tied with the last one kept stay too.
    """
    V = logits_BV.shape[-1]
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    rank_BV = jax.lax.broadcasted_iota(jnp.int32, sorted_BV.shape, 1)
    kth_B1 = jnp.take(sorted_BV, jnp.clip(jnp.where(top_k > 0, top_k, V), 1, V) - 1, axis=-1)[:, None]
    weight_BV = jax.nn.softmax(jnp.where(sorted_BV >= kth_B1, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(weight_BV, axis=-1) - weight_BV
    in_nucleus_BV = (rank_BV == 0) | (before_BV < top_p) | (top_p >= 1)
    smallest_B1 = jnp.min(jnp.where(in_nucleus_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    least_B1 = sorted_BV[:, :1] + jnp.log(min_p)
    return jnp.where(logits_BV >= jnp.maximum(jnp.maximum(kth_B1, smallest_B1), least_B1), logits_BV, -jnp.inf)


def check_knobs(*, max_new_tokens: int, temperature: float, top_k: int, top_p: float, min_p: float, seed: int) -> None:
    """Raises ConfigError with one line for each value out of range; NaN is."""
    wrong = {
        f"max_new_tokens={max_new_tokens}: must be at least 1": max_new_tokens < 1,
        f"temperature={temperature}: must be 0 (the most likely token) or a positive number": not (
            0 <= temperature < float("inf")
        ),
        f"top_k={top_k}: must be 0 (off) or a number of tokens": not 0 <= top_k <= LARGEST_SEED,
        f"top_p={top_p}: must be above 0 and at most 1 (off)": not 0 < top_p <= 1,
        f"min_p={min_p}: must be from 0 (off) to 1": not 0 <= min_p <= 1,
        f"seed={seed}: must be from 0 to {LARGEST_SEED}": not 0 <= seed <= LARGEST_SEED,
    }
    if any(wrong.values()):
        raise ConfigError("\n".join(line for line, is_wrong in wrong.items() if is_wrong))


def check_prompts(prompts: Sequence[Sequence[int]], *, eot_id: int, vocab_size: int) -> None:
    """Raises ConfigError with one line for each prompt that has an id out of the vocabulary, or if there is none."""
    problems = [] if len(prompts) else ["prompts=[]: needs at least one prompt, which may be empty"]
    if not 0 <= eot_id < vocab_size:
        problems.append(f"eot_id={eot_id}: must be from 0 to {vocab_size - 1}")
    for i, prompt in enumerate(prompts):
        bad = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if bad is not None:
            problems.append(f"prompts[{i}]: id {bad} is not of the vocabulary, 0 to {vocab_size - 1}")
    if problems:
        raise ConfigError("\n".join(problems))


def start_contexts(prompts: Sequence[Sequence[int]], eot_id: int, block_size: int) -> list[list[int]]:
    """Returns what the model sees first of each prompt: its last block_size tokens, or end-of-text if it is empty."""
    longest = max(map(len, prompts))
    if longest > block_size:
        log.warning("a prompt of %d tokens: only its last %d (block_size) are used", longest, block_size)
    return [list(prompt[-block_size:]) or [eot_id] for prompt in prompts]


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line, checked as far as that needs no model.

    Raises:
        ConfigError: a flag is unknown, or its value out of range.
    """
    parser = runtime.Parser(__doc__)
    parser.add_argument("--workdir", default="", metavar="DIR", help="the work directory of a run")
    parser.add_argument("--step", type=int, help="which checkpoint; by default the newest")
    parser.add_argument("--model", default="", metavar="FORMAT:PATH", help="or weights: hf:DIR, llmc:FILE, ...")
    parser.add_argument("--tokenizer", default="", help="gpt2, bytes or a file, instead of the one beside the model")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help=PROMPT_HELP)
    parser.add_argument("--prompt_file", action="append", default=[], metavar="FILE", help="a file that is a prompt")
    for name, (default, meaning) in FLAGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{meaning}; default {default}")
    args = parser.parse_strictly(arguments)
    if bool(args.workdir) == bool(args.model):
        raise ConfigError("what to sample from: give --workdir=DIR or --model=FORMAT:PATH")
    if args.model and args.step is not None:
        raise ConfigError(f"--step={args.step}: is for --workdir; here it is --model=gptjax:WORKDIR@{args.step}")
    if args.num_samples < 1:
        raise ConfigError(f"num_samples={args.num_samples}: must be at least 1")
    check_knobs(**knobs_of(args))
    return args


def knobs_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the flags that are arguments of generate()."""
    return {name: getattr(args, name) for name in FLAGS if name != "num_samples"}


def read_prompts(prompts: Sequence[str], files: Sequence[str]) -> list[str]:
    """Returns the prompts and the texts of the files; [""] if there are neither.

    Raises:
        ConfigError: a file cannot be read.
    """
    texts = list(prompts)
    for name in files:
        try:
            texts.append(pathlib.Path(name).read_bytes().decode())
        except OSError as error:
            raise ConfigError(f"--prompt_file={name}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"--prompt_file={name}: not UTF-8 text (byte {error.start})") from error
    return texts or [""]


def make_writer(decode_bytes: Callable[[list[int]], bytes]) -> Callable[[int | None], None]:
    """Returns write(id), which prints the text that is complete so far: a character may be cut across tokens.

    write(None) prints what is left and ends the line.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(token: int | None) -> None:
        data = b"" if token is None else decode_bytes([token])
        print(decoder.decode(data, final=token is None), end="\n" if token is None else "", flush=True)

    return write


def main(arguments: list[str]) -> None:
    args = parse_flags(arguments)
    texts = [text for text in read_prompts(args.prompt, args.prompt_file) for _ in range(args.num_samples)]
    runtime.start_jax()
    config, params, words = load_model(args)
    compute = dataclasses.replace(config.compute, attention="xla")  # cached attention has no other
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    model = gpt.GPT(config.model, gpt.resolve_compute(dataclasses.replace(config, compute=compute), mesh))
    prompts = [words.encode(text) for text in texts]
    run = functools.partial(generate, model, params, prompts, eot_id=words.eot_id, vocab_size=words.vocab_size)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows what it can
    print_samples(functools.partial(run, **knobs_of(args)), words.decode_bytes, texts)


def load_model(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Returns (config, params on one device, tokenizer) of what --workdir or --model names.

    Raises:
        UserError: it is not there, or damaged.
    """
    if args.model:
        weights = formats.open_model(args.model, tokenizer=args.tokenizer)
        params = formats.load_params(weights, lambda _, leaf: jnp.asarray(leaf))
        return Config(model=weights.config), params, weights.tokenizer
    settings, params, _ = checkpoint.load_params(args.workdir, step=args.step)
    local = workdir.local_directory(args.workdir)
    workdir.fetch_logs(args.workdir, local)
    return settings, params, tokenizer.load_tokenizer(args.tokenizer or str(pathlib.Path(local) / TOKENIZER_FILE))


def print_samples(
    run: Callable[..., list[list[int]]], decode_bytes: Callable[[list[int]], bytes], texts: Sequence[str]
) -> None:
    """Prints each text and its continuation by run(on_token=...): a single one as it is made, several when all are."""
    if len(texts) == 1:
        write = make_writer(decode_bytes)
        print(texts[0], end="", flush=True)
        run(on_token=lambda row, token: write(token))
        write(None)
        return
    for text, new in zip(texts, run(), strict=True):
        print(text + decode_bytes(new).decode(errors="replace"), SEPARATOR, sep="\n", flush=True)


def cli() -> None:
    runtime.run_cli(main)


if __name__ == "__main__":
    cli()
