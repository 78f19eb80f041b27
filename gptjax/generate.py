"""Autoregressive generation with a KV cache: the loop on the host.

A row is prefilled in chunks of its prompt, and then decoded token by token (decode.py has the compiled programs). An
accelerator decodes several tokens per dispatch. When a row's context exceeds block_size, only its last block_size // 2
tokens are kept, and the cache is refilled from those.
"""

import dataclasses
import functools
import logging
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import chips, sharding
from gptjax import model as gpt
from gptjax.collectives import ONE_DEVICE
from gptjax.decode import device_of, empty_state, grow_caches, make_step, mesh_of, unstack_layers
from gptjax.documents import NO_EOT
from gptjax.errors import ConfigError
from gptjax.sampling import SamplingParams
from gptjax.sampling_flags import validate_sampling_params

log = logging.getLogger("gptjax")
PREFILL_CHUNK = 64  # C: prompt tokens per step
SHORT_CHUNK = 32  # C if no prompt is longer: an own program, in which a short prompt takes half the time on a CPU
MAX_ROWS = 256  # rows generated at the same time, if their caches have room
CACHE_SHARE = 0.25  # of an accelerator's memory, for those caches
CPU_CACHE_BYTES = 2 * 2**30
TOKENS_PER_DISPATCH = 16  # per row, on accelerators: dispatching a single token takes longer than computing it


@dataclasses.dataclass
class Request:
    """One prompt, and the tokens generated from it so far."""

    index: int  # among all prompts: with the seed it fixes the row's randomness
    context: list[int]  # the tokens that the model sees
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
    start_id: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Returns the new ids of each prompt: max_new_tokens, or fewer where end-of-text came first (it is left out).

    A row depends on its prompt, its index, the seed and the sampling parameters, not on the other rows. An empty prompt
    starts from end-of-text; of a prompt longer than block_size only the end is used. The sampling parameters are those
    of `sample_token`.

    params: the tree of `model`, on one device or on the mesh of gptjax.sharding.
    eot_id: end-of-text; NO_EOT where a tokenizer has none.
    vocab_size: choose only ids below this, for a tokenizer smaller than the model's vocabulary; 0 means all of it.
    start_id: from which an empty prompt starts; None means end-of-text.
    on_token: called as on_token(row, id) for each new id as soon as it is known; an exception that it raises ends the
        generation.

    Raises:
        ConfigError: an argument or a prompt is out of range.
    """
    config = model.config
    limit = min(vocab_size or config.vocab_size, config.vocab_size)
    validate_sampling_params(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
    )
    check_prompts(prompts, eot_id=eot_id, vocab_size=limit)
    # NumPy scalars, not Python's: their dtypes are fixed, so that no value has the step compiled a second time.
    sampling = SamplingParams(
        temperature=np.float32(temperature),
        top_k=np.int32(top_k),
        top_p=np.float32(top_p),
        min_p=np.float32(min_p),
        seed=np.uint32(seed),
        vocab_size=np.int32(limit),
    )
    contexts = start_contexts(prompts, eot_id if start_id is None else start_id, config.block_size)
    rows = [Request(i, context) for i, context in enumerate(contexts)]
    model = model.clone(parallel=ONE_DEVICE)  # XLA partitions generation by itself
    weights = unstack_layers(model, params)
    most = min(len(rows), rows_at_once(model, params))
    size = padded_rows(most, mesh_of(params))
    steps = make_steps(model, params, size)
    for first in range(0, len(rows), size):
        _generate_rows(
            model,
            weights,
            rows[first : first + size],
            state=empty_state(model, params, size),
            steps=steps,
            sampling=sampling,
            eot_id=eot_id,
            max_new_tokens=max_new_tokens,
            on_token=on_token or (lambda row, token: None),
        )
    return [row.new for row in rows]


def _generate_rows(
    model: gpt.GPT,
    weights: Any,
    rows: list[Request],
    *,
    state: tuple[Any, jax.Array],
    steps: tuple[Callable[..., Any], int],
    sampling: SamplingParams,
    eot_id: int,
    max_new_tokens: int,
    on_token: Callable[[int, int], None],
) -> None:
    """Fills `new` of these rows, together; ids are read one dispatch behind, while the device computes the next."""
    caches, ids_B = state
    step, burst = steps
    block_size = model.config.block_size
    size = len(ids_B)
    padding = [0] * (size - len(rows))
    row_B = np.array([row.index for row in rows] + padding, np.int32)
    step = functools.partial(step, weights, row_B=row_B, sampling=sampling)
    # Tokens in each row's cache. block_size means full, which a row is at first: it is prefilled from its context.
    # Rows of padding stay full, and are never prefilled.
    cache_length_B = np.full(size, block_size, np.int32)
    n = 0  # new tokens per row that have been dispatched
    new_KB = None
    pending_ids_KB = None  # dispatched, and not read yet
    while n < max_new_tokens:
        # A row is prefilled from its context on the host, which lacks the ids that are pending.
        if pending_ids_KB is not None and _full(rows, cache_length_B, block_size):
            _read(rows, pending_ids_KB, eot_id, on_token)
            pending_ids_KB = None
        if all(row.done for row in rows):
            return
        full = _full(rows, cache_length_B, block_size)
        contexts = {b: cut_context(rows[b], block_size) for b in full}
        decoding_B = cache_length_B < block_size
        # A burst must not exceed any row's cache, and does not wait for a prefill.
        count = 1
        if not contexts and n + burst <= max_new_tokens:
            longest = cache_length_B[decoding_B].max()
            if longest + burst <= block_size:
                count = burst
        decoded_lengths = cache_length_B[decoding_B] + count
        prompt_lengths = map(len, contexts.values())
        caches = grow_caches(caches, max([*decoded_lengths, *prompt_lengths]), block_size)
        if decoding_B.any():
            last_B = np.where(decoding_B, 0, -1).astype(np.int32)
            positions_B1 = cache_length_B[:, None].copy()  # the device may read a NumPy array after this call
            caches, ids_B, new_KB = step(
                caches,
                ids_B,
                None,
                positions_B1,
                last_B,
                n=np.int32(n),
                count=count,
            )
            cache_length_B += count * decoding_B
        if contexts:
            cache_length_B[list(contexts)] = [len(context) for context in contexts.values()]
            for chunk in prompt_chunks(contexts, size, block_size):
                caches, ids_B, new_KB = step(caches, ids_B, *chunk, n=np.int32(n), count=1)
        # Only now, after the next dispatch: waiting for these ids does not leave the device idle.
        if pending_ids_KB is not None:
            _read(rows, pending_ids_KB, eot_id, on_token)
        n += count
        pending_ids_KB = new_KB
    _read(rows, pending_ids_KB, eot_id, on_token)


def _full(
    rows: list[Request],
    cache_length_B: np.ndarray,
    block_size: int,
) -> list[int]:
    """Returns the indices of the rows that must be prefilled."""
    return [b for b, row in enumerate(rows) if not row.done and cache_length_B[b] >= block_size]


def _read(
    rows: list[Request],
    new_KB: Any,
    eot_id: int,
    on_token: Callable[[int, int], None],
) -> None:
    """Waits for the newest ids and gives each to its row, ending those at end-of-text."""
    for ids_B in np.asarray(new_KB).tolist():
        # strict=False: the rows of padding have ids, too.
        for row, token in zip(rows, ids_B, strict=False):
            # A row that is done continues on the device until all are; its further ids are dropped here.
            row.done |= token == eot_id
            if not row.done:
                row.context.append(token)
                row.new.append(token)
                on_token(row.index, token)


def cut_context(row: Request, block_size: int) -> list[int]:
    """Returns the row's context; one longer than block_size first loses all but its last block_size // 2 tokens."""
    # Half, so that the next refill is block_size // 2 tokens away. Learned positions cannot move, so that a sliding
    # window would need a refill for each token.
    if len(row.context) > block_size:
        del row.context[: -max(1, block_size // 2)]
    return row.context


def prompt_chunks(
    contexts: dict[int, list[int]],
    size: int,
    block_size: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (tokens_BC, positions_BC, last_B), all int32, that feed `contexts` to their rows and leave the others.

    last_B: the index of a context's last token where this chunk has it, otherwise -1. A position of block_size is
    dropped.
    """
    longest = max(map(len, contexts.values()))
    C = min(SHORT_CHUNK if longest <= SHORT_CHUNK else PREFILL_CHUNK, PREFILL_CHUNK, block_size)
    width = -(-longest // C) * C  # -(-a // b) rounds up: all chunks have C tokens, so that there is one program
    tokens_BT = np.zeros((size, width), np.int32)
    positions_BT = np.full((size, width), block_size, np.int32)
    end_B = np.full(size, -1, np.int32)
    for b, context in contexts.items():
        length = len(context)
        tokens_BT[b, :length] = context
        positions_BT[b, :length] = np.arange(length)
        end_B[b] = length - 1
    for start in range(0, width, C):
        stop = start + C
        ends_here_B = (end_B >= start) & (end_B < stop)
        last_B = np.where(ends_here_B, end_B - start, -1).astype(np.int32)
        yield tokens_BT[:, start:stop], positions_BT[:, start:stop], last_B


def make_steps(
    model: gpt.GPT,
    params: Any,
    size: int,
) -> tuple[Callable[..., Any], int]:
    """Returns the step for `size` rows on the devices of `params`, and the number of tokens per dispatch of it."""
    platform = device_of(params).platform
    # XLA's dot-strength-reduction turns matmuls of one row into reductions: GPT-2 small on an H200 would move 524 MB
    # per token instead of 265. With two or more rows it moves as much either way, in fewer kernels if it may choose.
    options = ()
    if platform == "gpu" and size == 1:
        options = (("xla_disable_hlo_passes", "dot-strength-reduction"),)
    step = make_step(typing.cast(Any, model), options, mesh_of(params))
    burst = 1 if platform == "cpu" else TOKENS_PER_DISPATCH
    return step, burst


def rows_at_once(model: gpt.GPT, params: Any) -> int:
    """Returns the number of rows whose caches may be in memory at the same time."""
    c = model.config
    mesh = mesh_of(params)
    device = device_of(params)
    itemsize = jnp.dtype(model.compute.dtype).itemsize
    row_bytes = 2 * c.n_layer * c.block_size * c.n_embd * itemsize  # 2: keys and values
    room = CPU_CACHE_BYTES
    if device.platform != "cpu":
        room = CACHE_SHARE * chips.device_memory(device)
    devices = mesh.size if mesh else 1
    fitting = room * devices // row_bytes
    return int(max(1, min(MAX_ROWS, fitting)))


def padded_rows(count: int, mesh: Any) -> int:
    """Returns `count`, rounded up to a multiple of the shards of a batch on `mesh`."""
    shards = sharding.data_parallel_size(mesh) if mesh else 1
    return -(-count // shards) * shards


def check_prompts(
    prompts: Sequence[Sequence[int]],
    *,
    eot_id: int,
    vocab_size: int,
) -> None:
    """Checks that there is a prompt, and that all ids are in the vocabulary.

    Raises:
        ConfigError: the message has one line for each prompt with an id that is not, for eot_id, and for no prompt.
    """
    errors = []
    if not len(prompts):
        problem = "needs at least one prompt, which may be empty"
        errors.append(ConfigError(problem, field="prompts", value=[]))
    largest = vocab_size - 1
    if eot_id != NO_EOT and not 0 <= eot_id < vocab_size:
        problem = f"must be from 0 to {largest}"
        errors.append(ConfigError(problem, field="eot_id", value=eot_id))
    for i, prompt in enumerate(prompts):
        bad = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if bad is not None:
            problem = f"id {bad} is not in the vocabulary, 0 to {largest}"
            errors.append(ConfigError(problem, field=f"prompts[{i}]"))
    if errors:
        raise ConfigError.of(errors)


def start_contexts(
    prompts: Sequence[Sequence[int]],
    start_id: int,
    block_size: int,
) -> list[list[int]]:
    """Returns the first context of each prompt: its last block_size tokens, or `start_id` if it is empty."""
    longest = max(map(len, prompts))
    if longest > block_size:
        log.warning("a prompt of %d tokens: only its last %d (block_size) are used", longest, block_size)
    return [list(prompt[-block_size:]) or [start_id] for prompt in prompts]
