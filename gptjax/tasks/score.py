"""The log-likelihood of continuations after their contexts, sharded over the mesh of a model."""

import bisect
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.collectives import all_gather_embeddings, all_gather_sequence, on_shards
from gptjax.loss import masked_logits
from gptjax.model import GPT, unembedding
from gptjax.sharding import BATCH_AXES, BATCH_SPEC, data_parallel_size
from gptjax.tasks.item import Score

if TYPE_CHECKING:
    from gptjax.data.tokenizer import Tokenizer

SHORTEST = 64  # tokens of the first bucket; each next one is twice as long
TOKENS_PER_DEVICE = 2048  # of a batch


class Pair(NamedTuple):
    """The ids of a context and of its continuation."""

    context: list[int]
    continuation: list[int]


def encode_pair(context: str, continuation: str, tokenizer: "Tokenizer", *, only_last_token: bool = False) -> Pair:
    """Returns the ids of a context and its continuation, tokenized together, as lm-eval does.

    Blanks at the end of the context belong to the continuation. An empty context becomes end-of-text.

    only_last_token: the context is all of the text but its last token.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    whole = tokenizer.encode(kept + continuation)
    if only_last_token:
        return Pair(whole[:-1] or [tokenizer.start_id], whole[-1:])
    if not kept:
        return Pair([tokenizer.start_id], whole)
    before = tokenizer.encode(kept)
    return Pair(before, whole[len(before) :])


def make_score_fn(model: GPT) -> Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns score_fn(params, tokens_and_targets), jitted: the log-probability and the rank of each target.

    tokens_and_targets is int32 [2, B, T]: input tokens, and the token that should follow each, or -1.

    The results are float32 [B, T], 0 without a target, and bool [B, T], whether no other token is likelier; both are
    on all devices.
    """
    parallel = model.parallel

    def score(params: Any, tokens_2BT: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
        params = all_gather_embeddings(params, parallel)
        inputs_BT, targets_BT = tokens_2BT
        x_BTD: Any = model.apply({"params": params}, inputs_BT, None, None, method="hidden")
        # Each device of `tensor` has all positions, and its own shard of the vocabulary.
        x_BTD = all_gather_sequence(x_BTD, parallel)
        logits_BTV = masked_logits(x_BTD, unembedding(params), model.config.vocab_size, parallel=parallel)
        first = jnp.int32(0)
        if parallel.tensor > 1:
            first = jax.lax.axis_index("tensor") * logits_BTV.shape[2]
        column_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2) + first
        is_target_BTV = column_BTV == targets_BT[..., None]
        best_BT = jnp.max(logits_BTV, axis=-1)
        target_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
        if parallel.tensor > 1:
            best_BT = jax.lax.pmax(best_BT, "tensor")
            target_BT = jax.lax.psum(target_BT, "tensor")
        total_BT = jnp.sum(jnp.exp(logits_BTV - best_BT[..., None]), axis=-1)
        if parallel.tensor > 1:
            total_BT = jax.lax.psum(total_BT, "tensor")
        counted_BT = targets_BT >= 0
        logprob_BT = jnp.where(counted_BT, target_BT - best_BT - jnp.log(total_BT), 0.0)
        return logprob_BT, target_BT >= best_BT

    spec = P(BATCH_AXES, None)
    sharded = on_shards(score, parallel, out_specs=lambda _: (spec, spec))
    # On all devices, so that each process can read them.
    out = NamedSharding(parallel.mesh, P()) if parallel.mesh is not None else None
    jitted = jax.jit(sharded, out_shardings=out)
    return lambda params, tokens: jitted(params, tokens, jnp.int32(0))


class Scorer:
    """Scores pairs with a model. A pair's score does not depend on the other pairs, nor on their order.

    Pairs are sorted into buckets by length. All batches of a bucket have the same shape, so each bucket compiles once,
    and a row has the same bits in any batch.
    """

    def __init__(self, model: GPT, mesh: Any) -> None:
        """The model's dropout is not used."""
        self.model = model
        self._mesh = mesh
        self._score = make_score_fn(model)
        self._longest = model.config.block_size
        self._lengths = bucket_lengths(self._longest)

    def score(
        self,
        params: Any,
        pairs: Sequence[Pair],
        *,
        should_stop: Callable[[], bool] = lambda: False,
        on_batch: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Score]:
        """Returns the score of each pair; [] if `should_stop`, which is called before each batch, returns True.

        params: on the mesh.
        on_batch: called before each batch with the number of pairs before it, and of all.
        """
        lengths = [min(len(pair.context) + len(pair.continuation) - 1, self._longest) for pair in pairs]
        order = sorted(range(len(pairs)), key=lambda number: (lengths[number], pairs[number]))
        scores: list[Score | None] = [None] * len(pairs)
        buckets: dict[int, list[int]] = {}
        for number in order:
            bucket = self._lengths[bisect.bisect_left(self._lengths, lengths[number])]
            buckets.setdefault(bucket, []).append(number)
        done = 0
        for length, numbers in buckets.items():
            rows = batch_rows(length, self._mesh)
            for start in range(0, len(numbers), rows):
                on_batch(done, len(pairs))
                if should_stop():
                    return []
                chosen = numbers[start : start + rows]
                found = self._score_batch(params, [pairs[number] for number in chosen], rows, length)
                for number, score in zip(chosen, found, strict=True):
                    scores[number] = score
                done += len(chosen)
        return [score for score in scores if score is not None]

    def _score_batch(self, params: Any, pairs: Sequence[Pair], rows: int, length: int) -> list[Score]:
        tokens_2BT = np.zeros((2, rows, length), np.int32)
        tokens_2BT[1] = -1
        spans = []
        for row, pair in enumerate(pairs):
            whole = [*pair.context, *pair.continuation][-(self._longest + 1) :]
            counted = min(len(pair.continuation), len(whole) - 1)
            end = len(whole) - 1
            tokens_2BT[0, row, :end] = whole[:-1]
            tokens_2BT[1, row, end - counted : end] = whole[len(whole) - counted :]
            spans.append(slice(end - counted, end))
        sharding = NamedSharding(self._mesh, BATCH_SPEC)
        placed = jax.make_array_from_callback(tokens_2BT.shape, sharding, lambda index: tokens_2BT[index])
        logprobs_BT, greedy_BT = map(np.asarray, self._score(params, placed))
        scores = []
        for row, (pair, span) in enumerate(zip(pairs, spans, strict=True)):
            is_cut = len(pair.context) + len(pair.continuation) > self._longest + 1
            # Summed in float64 on the host: the order of a sum on a device depends on the bucket.
            logprob = float(np.sum(logprobs_BT[row, span], dtype=np.float64))
            scores.append(Score(logprob, bool(greedy_BT[row, span].all()), is_cut))
        return scores


def bucket_lengths(longest: int) -> list[int]:
    """Returns the lengths of the buckets for a model of `longest` positions: powers of two, and `longest`."""
    lengths = []
    length = SHORTEST
    while length < longest:
        lengths.append(length)
        length *= 2
    return [*lengths, longest]


def batch_rows(length: int, mesh: Any) -> int:
    """Returns the rows of a batch of sequences of `length` tokens: the same for each device."""
    return max(1, TOKENS_PER_DEVICE // length) * data_parallel_size(mesh)


def count_cut(scores: Iterable[Score]) -> int:
    """Returns how many contexts were cut."""
    return sum(score.is_cut for score in scores)
