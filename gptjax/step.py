"""The train and evaluation steps: pure functions, and how they are jitted with shardings ("pjit")."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from gptjax.config import Config
from gptjax.loss import LossSums, cross_entropy, token_losses
from gptjax.model import GPT, Compute, document_starts, head
from gptjax.optim import Schedule, make_schedule
from gptjax.parallel import (
    gather_tables,
    on_each_shard,
    own_positions,
    param_specs,
    sum_gradients,
    sum_over_shards,
)
from gptjax.sharding import BATCH_SPEC
from gptjax.state import TrainState

Metrics = dict[str, jax.Array]
StepFn = Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]


class Examples(NamedTuple):
    """What a batch [B, T+1] asks for: inputs, where documents start (or None), and targets, -1 where none counts."""

    inputs_BT: jax.Array
    starts_BT: jax.Array | None
    targets_BT: jax.Array


def make_examples(tokens: jax.Array, config: Config, *, eot_id: int, eot_position: str) -> Examples:
    """Returns the examples in `tokens` [B, T+1], of which negative ones count as nothing.

    With data.document_mask attention and positions restart at each document, and a prediction across documents (from
    a trailing end-of-text) does not count either.
    """
    inputs_BT, targets_BT, starts_BT = jnp.maximum(tokens[:, :-1], 0), tokens[:, 1:], None
    if config.data.document_mask:
        starts_BT = document_starts(inputs_BT, eot_id=eot_id, eot_position=eot_position)
        if eot_position == "last":
            targets_BT = jnp.where(inputs_BT == eot_id, -1, targets_BT)
    return Examples(inputs_BT, starts_BT, targets_BT)


def make_loss_fn(model: GPT, config: Config, *, eot_id: int, eot_position: str) -> Callable[..., LossSums]:
    """Returns loss_fn(params, tokens [B, T+1], dropout_key or None) -> sums over the predictions that count."""
    return _make_loss(cross_entropy, model, config, eot_id=eot_id, eot_position=eot_position)


def make_token_loss_fn(model: GPT, config: Config, *, eot_id: int, eot_position: str) -> Callable[..., jax.Array]:
    """Returns token_loss_fn(params, tokens_ABT, step) -> loss of each prediction of an update: float32 [A, B, T].

    They are what the update of `step` sums, dropout included, one micro-batch in memory at a time.
    """
    loss_fn = _make_loss(token_losses, model, config, eot_id=eot_id, eot_position=eot_position)

    def losses(params: Any, tokens_ABT: jax.Array, step: jax.Array) -> jax.Array:
        whole, key = with_tables(params, model.compute), micro_keys(config, step)
        micro = lambda a: loss_fn(whole, a[1], key(a[0]))  # noqa: E731
        return jax.lax.map(micro, (jnp.arange(tokens_ABT.shape[0]), tokens_ABT))

    def split(params: Any, tokens_ABT: jax.Array, step: jax.Array) -> jax.Array:
        cut, placed = param_specs(params), P(*BATCH_SPEC[:2], "tensor")
        return on_each_shard(losses, in_specs=(cut, BATCH_SPEC, P()), out_specs=placed)(params, tokens_ABT, step)

    return split


def _make_loss(
    reduce: Callable[..., Any], model: GPT, config: Config, *, eot_id: int, eot_position: str
) -> Callable[..., Any]:
    def loss_fn(params: Any, tokens: jax.Array, dropout_key: jax.Array | None) -> Any:
        inputs_BT, starts_BT, targets_BT = make_examples(tokens, config, eot_id=eot_id, eot_position=eot_position)
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        x_BTD: Any = model.apply({"params": params}, inputs_BT, starts_BT, rngs=rngs, method="hidden")
        with jax.named_scope("loss"):
            of = {"vocab_size": model.config.vocab_size, "backend": model.compute.loss}
            return reduce(x_BTD, head(params), targets_BT, chunk=config.compute.loss_chunk, **of)

    return loss_fn


def micro_keys(config: Config, step: jax.Array) -> Callable[[jax.typing.ArrayLike], jax.Array | None]:
    """Returns a micro-step's index -> the dropout key that it has in the update of `step`; None without dropout."""
    step_key = jax.random.fold_in(jax.random.key(config.train.seed), step)
    return lambda index: jax.random.fold_in(step_key, index) if config.model.dropout else None


def make_gradient_fn(
    loss_fn: Callable[..., LossSums], *, config: Config, compute: Compute
) -> Callable[..., tuple[Any, LossSums]]:
    """Returns gradient_fn(params, tokens_ABT, step) -> (mean gradient over all tokens, not clipped, sums)."""
    z_weight = config.train.z_loss

    def summed(params: Any, tokens: jax.Array, key: jax.Array | None) -> tuple[jax.Array, LossSums]:
        sums = loss_fn(params, tokens, key)
        return sums.loss + z_weight * sums.z_loss if z_weight else sums.loss, sums

    def gradients(params: Any, tokens_ABT: jax.Array, step: jax.Array) -> tuple[Any, LossSums]:
        key = micro_keys(config, step)
        whole, scatter = jax.vjp(lambda p: with_tables(p, compute), params)

        def micro_step(index: jax.typing.ArrayLike, tokens: jax.Array) -> tuple[Any, LossSums]:
            return jax.grad(summed, has_aux=True)(whole, tokens, key(index))

        grads, sums = accumulate(micro_step, tokens_ABT)
        return sum_gradients(*scatter(grads), reduce_dtype=compute.reduce_dtype), sum_over_shards(sums)

    def gradient_fn(params: Any, tokens_ABT: jax.Array, step: jax.Array) -> tuple[Any, LossSums]:
        cut = param_specs(params)
        split = on_each_shard(gradients, in_specs=(cut, BATCH_SPEC, P()), out_specs=(cut, P()))
        grads, sums = split(params, tokens_ABT, step)
        with jax.named_scope("update"):
            return jax.tree.map(lambda g: g / sums.tokens, grads), sums

    return gradient_fn


def make_train_step(
    loss_fn: Callable[..., LossSums],
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    config: Config,
    compute: Compute,
) -> StepFn:
    """Returns train_step(state, tokens_ABT) -> (state, metrics), where tokens_ABT is int32 [A, B, T+1].

    One update from the mean over all tokens of the A micro-batches. Where loss, gradient or update is not finite,
    params and optimizer state stay as they are and only `step` moves on. Metrics are float32 scalars: loss, grad_norm
    (before clipping), update_norm, lr, tokens, finite (1 or 0).
    """
    clip, gradient_fn = config.optim.grad_clip, make_gradient_fn(loss_fn, config=config, compute=compute)

    def train_step(state: TrainState, tokens_ABT: jax.Array) -> tuple[TrainState, Metrics]:
        grads, sums = gradient_fn(state.params, tokens_ABT, state.step)
        with jax.named_scope("update"):
            grad_norm = optax.tree.norm(grads)
            if clip:
                grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / (grad_norm + 1e-6)), grads)
            lr = schedule(state.step)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            updates = jax.tree.map(lambda u: lr * u, updates)
            loss = sums.loss / sums.tokens
            update_norm = optax.tree.norm(updates)
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
            keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)  # noqa: E731
            new_state = TrainState(
                step=state.step + 1,
                params=keep(optax.apply_updates(state.params, updates), state.params),
                opt_state=keep(opt_state, state.opt_state),
            )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "lr": lr,
            "tokens": sums.tokens,
            "finite": finite.astype(jnp.float32),
        }
        return new_state, metrics

    return train_step


def with_tables(params: Any, compute: Compute) -> Any:
    """Returns a shard's parameters with the tables whole, once a step for lookup and head of all micro-batches."""
    return gather_tables(params, dtype=compute.dtype, two_stages=compute.two_stages)


def accumulate(micro_step: Callable[..., Any], tokens_ABT: jax.Array) -> Any:
    """Returns the sum over a of micro_step(a, tokens_ABT[a]), a tree of float32, holding one micro-batch at a time."""
    if tokens_ABT.shape[0] == 1:
        return micro_step(0, tokens_ABT[0])
    micro_step, index_A = jax.jit(micro_step), jnp.arange(tokens_ABT.shape[0])  # traced once
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro_step, index_A[0], tokens_ABT[0]))

    def add(total: Any, micro: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, micro_step(*micro)), None

    return jax.lax.scan(add, zeros, (index_A, tokens_ABT))[0]


def make_multi_step(train_step: StepFn) -> StepFn:
    """Returns train_step over K batches [K, A, B, T+1] in one dispatch; metrics gain a leading dim K."""
    return lambda state, batches: jax.lax.scan(train_step, state, batches)


def make_eval_step(
    loss_fn: Callable[..., LossSums], config: Config, *, compute: Compute, eot_id: int, eot_position: str
) -> Callable[..., tuple[LossSums, jax.Array]]:
    """Returns eval_step(params, tokens_ABT, token_bytes_V) -> (summed loss, summed bytes of the counted targets)."""

    def eval_step(params: Any, tokens_ABT: jax.Array, token_bytes_V: jax.Array) -> tuple[LossSums, jax.Array]:
        whole = with_tables(params, compute)

        def micro_step(_: jax.typing.ArrayLike, tokens: jax.Array) -> tuple[LossSums, jax.Array]:
            examples = make_examples(tokens, config, eot_id=eot_id, eot_position=eot_position)
            targets_BT = own_positions(examples.targets_BT)
            size_BT = jnp.where(targets_BT >= 0, token_bytes_V[jnp.maximum(targets_BT, 0)], 0)
            return loss_fn(whole, tokens, None), jnp.sum(size_BT, dtype=jnp.float32)

        return sum_over_shards(accumulate(micro_step, tokens_ABT))

    def split(params: Any, tokens_ABT: jax.Array, token_bytes_V: jax.Array) -> tuple[LossSums, jax.Array]:
        run = on_each_shard(eval_step, in_specs=(param_specs(params), BATCH_SPEC, P()), out_specs=P())
        return run(params, tokens_ABT, token_bytes_V)

    return split


def jit_steps(
    model: GPT,
    optimizer: optax.GradientTransformation,
    config: Config,
    abstract: TrainState,
    *,
    eot_id: int,
    eot_position: str,
) -> tuple[StepFn, Callable[..., Any]]:
    """Returns (train_step, eval_step), jitted; the train step gives its state back where it found it."""
    loss_fn = make_loss_fn(model, config, eot_id=eot_id, eot_position=eot_position)
    schedule = make_schedule(config.optim, config.train.num_steps)
    step = make_train_step(loss_fn, optimizer, schedule, config=config, compute=model.compute)
    if config.train.steps_per_dispatch > 1:
        step = make_multi_step(step)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)), jax.jit(
        make_eval_step(loss_fn, config, compute=model.compute, eot_id=eot_id, eot_position=eot_position)
    )
