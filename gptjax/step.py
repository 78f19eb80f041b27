"""The train and evaluation steps as pure functions, and their jit with shardings."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from gptjax.collectives import (
    Parallel,
    all_gather_embeddings,
    all_reduce_gradients,
    local_sequence,
    on_shards,
    psum_all,
)
from gptjax.config import Config
from gptjax.dispatch import Batches, Tokens
from gptjax.documents import EndOfText
from gptjax.examples import make_examples
from gptjax.layer_stats import UPDATE_STATS, norm_and_rms
from gptjax.loss import LossSums, cross_entropy, token_losses
from gptjax.model import GPT, unembedding
from gptjax.optim import Schedule, make_schedule
from gptjax.params import PyTree
from gptjax.sharding import BATCH_AXES
from gptjax.state import TrainState, move_average

# All are pure functions. A LossFn takes this device's arrays, the others global ones. model.py explains the letters.
Metrics = dict[str, Any]  # float32, by name
StepFn = Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]
DispatchFn = Callable[[TrainState, Tokens], tuple[TrainState, Metrics]]
# (params, tokens_ABT, token_bytes_V) -> (sums, bytes)
EvalFn = Callable[[PyTree, jax.Array, jax.Array], tuple[LossSums, jax.Array]]
# (params, tokens_ABT, step) -> (gradients, sums)
GradientFn = Callable[[PyTree, jax.Array, jax.Array], tuple[PyTree, LossSums]]
# (params, tokens [B, T+1], dropout_key) -> sums
LossFn = Callable[[PyTree, jax.Array, jax.Array | None], LossSums]


def make_loss_fn(model: GPT, config: Config, *, eot: EndOfText) -> LossFn:
    """Returns loss_fn(params, tokens, dropout_key or None) -> sums over the predictions that count.

    tokens: int32 [B, T+1]; under shard_map this device's sequences. params: with the embedding tables all-gathered.
    """
    return _make_loss(cross_entropy, model, config, eot=eot)


def make_token_loss_fn(
    model: GPT,
    config: Config,
    *,
    eot: EndOfText,
) -> Callable[..., jax.Array]:
    """Returns token_loss_fn(params, tokens_ABT, step) -> loss of each prediction of an update: float32 [A, B, T].

    These are the per-token terms of the training loss at `step`, with the same dropout. tokens_ABT is int32
    [A, B, T+1]. One micro-batch at a time is in memory.
    """
    loss_fn = _make_loss(token_losses, model, config, eot=eot)

    def losses(
        params: PyTree,
        tokens_ABT: jax.Array,
        step: jax.Array,
    ) -> jax.Array:
        # Gathers the tables as the gradient function does, so that they are rounded to the compute dtype here, too.
        params = all_gather_embeddings(params, model.parallel)
        key_of = microbatch_dropout_keys(config, step)

        def run_microbatch(micro: tuple[jax.Array, jax.Array]) -> jax.Array:
            index, tokens = micro
            return loss_fn(params, tokens, key_of(index))

        # lax.map is a loop; vmap would hold all micro-batches in memory.
        index_A = jnp.arange(tokens_ABT.shape[0])
        return jax.lax.map(run_microbatch, (index_A, tokens_ABT))

    # No sum over devices here: each device returns the losses of its own sequences and positions. `tensor` shards the
    # positions, dim 2.
    spec = P(None, BATCH_AXES, "tensor")
    return on_shards(losses, model.parallel, out_specs=lambda _: spec)


def _make_loss(
    reduce: Callable[..., PyTree],
    model: GPT,
    config: Config,
    *,
    eot: EndOfText,
) -> Callable[..., PyTree]:
    def loss_fn(
        params: PyTree,
        tokens: jax.Array,
        dropout_key: jax.Array | None,
    ) -> PyTree:
        inputs_BT, starts_BT, targets_BT = make_examples(tokens, config, eot=eot)
        x_BTD: Any = model.apply(
            {"params": params},
            inputs_BT,
            starts_BT,
            dropout_key,
            method="hidden",
        )
        # The head is taken from the gathered tables, so that tied embeddings sum both gradients before one scatter.
        with jax.named_scope("loss"):
            return reduce(
                x_BTD,
                unembedding(params),
                targets_BT,
                vocab_size=model.config.vocab_size,
                chunk=config.compute.loss_chunk,
                backend=model.compute.loss,
                parallel=model.parallel,
            )

    return loss_fn


def microbatch_dropout_keys(
    config: Config,
    step: jax.Array,
) -> Callable[[jax.typing.ArrayLike], jax.Array | None]:
    """Returns a function from micro-batch index to its dropout key in the update of `step` (an int32 scalar).

    Without dropout it returns None instead of a key.
    """
    # The seed and the step determine the key, so that a resumed run draws the same masks without a key in its state.
    seed_key = jax.random.key(config.train.seed)
    step_key = jax.random.fold_in(seed_key, step)

    def key_of(index: jax.typing.ArrayLike) -> jax.Array | None:
        if not config.model.dropout:
            return None
        return jax.random.fold_in(step_key, index)

    return key_of


def make_gradient_fn(
    loss_fn: LossFn,
    *,
    config: Config,
    parallel: Parallel,
) -> GradientFn:
    """Returns gradient_fn(params, tokens_ABT, step) -> (mean gradient over all tokens, not clipped, sums).

    tokens_ABT is int32 [A, B, T+1]. The gradient has the shapes, dtypes and shardings of params.
    """
    z_weight = config.train.z_loss

    def loss_sum(
        params: PyTree,
        tokens: jax.Array,
        key: jax.Array | None,
    ) -> tuple[jax.Array, LossSums]:
        sums = loss_fn(params, tokens, key)
        # The loss is a sum over this device's tokens, not a mean, so that gradients add over micro-batches and devices.
        if not z_weight:
            return sums.loss, sums
        return sums.loss + z_weight * sums.z_loss, sums

    def gradients(
        params: PyTree,
        tokens_ABT: jax.Array,
        step: jax.Array,
    ) -> tuple[PyTree, LossSums]:
        key_of = microbatch_dropout_keys(config, step)
        # The embedding tables are all-gathered once per step, for all micro-batches. `gather_vjp` is the transpose of
        # that gather: it reduce-scatters their accumulated gradient, also once. The weights of the layers are
        # all-gathered in each micro-batch, because all of them unsharded would not fit.
        gathered, gather_vjp = jax.vjp(lambda p: all_gather_embeddings(p, parallel), params)

        def run_microbatch(
            index: jax.typing.ArrayLike,
            tokens: jax.Array,
        ) -> tuple[PyTree, LossSums]:
            gradient = jax.grad(loss_sum, has_aux=True)
            return gradient(gathered, tokens, key_of(index))

        grads, sums = accumulate(run_microbatch, tokens_ABT)
        [grads] = gather_vjp(grads)  # not yet summed over the axes that do not shard the parameter
        grads = all_reduce_gradients(grads, parallel)
        return grads, psum_all(sums, parallel)

    # Gradients are sharded as the params are; the sums are replicated.
    sharded = on_shards(
        gradients,
        parallel,
        out_specs=lambda specs: (specs, P()),
    )

    def gradient_fn(
        params: PyTree,
        tokens_ABT: jax.Array,
        step: jax.Array,
    ) -> tuple[PyTree, LossSums]:
        grads, sums = sharded(params, tokens_ABT, step)
        # Divides once, by the tokens of all devices and micro-batches. A mean of means would give the tokens of a
        # heavily padded micro-batch more weight.
        with jax.named_scope("update"):
            mean = jax.tree.map(lambda g: g / sums.tokens, grads)
        return mean, sums

    return gradient_fn


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    config: Config,
    parallel: Parallel,
    separate_state: bool = False,
) -> StepFn:
    """Returns train_step(state, tokens_ABT) -> (state, metrics), where tokens_ABT is int32 [A, B, T+1].

    It makes one update from the mean gradient over all tokens of the A micro-batches. If loss, gradient or update is
    not finite, params and optimizer state stay the same and only `step` increases. Metrics are float32 scalars: loss,
    grad_norm (before clipping), update_norm, lr, tokens, finite (1 or 0). With train.stats_every there is also
    UPDATE_STATS: grad_rms (before clipping) and update_rms, float32 [parts].

    separate_state: computes the optimizer's state apart from the update, with equal values; see ResolvedCompute.
    """
    clip = config.optim.grad_clip
    gradient_fn = make_gradient_fn(loss_fn, config=config, parallel=parallel)

    def train_step(
        state: TrainState,
        tokens_ABT: jax.Array,
    ) -> tuple[TrainState, Metrics]:
        grads, sums = gradient_fn(state.params, tokens_ABT, state.step)
        # Outside of shard_map arrays are global, and XLA partitions the program by the shardings of the state. So a
        # norm covers all shards, and the optimizer needs no explicit collectives.
        with jax.named_scope("update"):
            grad_norm, grad_rms = norm_and_rms(grads, config)
            lr = schedule(state.step)
            # The optimizer runs at learning rate 1, so that its state does not contain the rate (optim.py). `lr` is
            # traced, so a different rate does not recompile the step.
            updates, opt_state = optimizer.update(
                _clip(grads, grad_norm, clip),
                state.opt_state,
                state.params,
            )
            updates = jax.tree.map(lambda u: lr * u, updates)
            if separate_state:
                # The barriers keep XLA from merging the two, and the update from being computed twice.
                updates, again = jax.lax.optimization_barrier((updates, grads))
                _, opt_state = optimizer.update(_clip(again, grad_norm, clip), state.opt_state, state.params)
            loss = sums.loss / sums.tokens
            update_norm, update_rms = norm_and_rms(updates, config)
            # If any entry is not finite, the norm is not finite. The device decides, because the host reads these
            # metrics only after it has dispatched the next step, which would start from a broken state.
            finite = jnp.isfinite(loss)
            finite &= jnp.isfinite(grad_norm)
            finite &= jnp.isfinite(update_norm)
            # A skipped step counts too, because data order and learning rate depend on `step` alone.
            next_step = state.step + 1
            params = optax.apply_updates(state.params, updates)
            new_state = TrainState(
                step=next_step,
                params=_select(finite, params, state.params),
                opt_state=_select(finite, opt_state, state.opt_state),
                average=None,
            )
            # The condition is static: without an average the program is the one from before averages existed.
            if config.optim.ema_decay:
                # A skipped update leaves the average as it is, too.
                average = move_average(state, params, config.optim.ema_decay)
                new_state = dataclasses.replace(new_state, average=_select(finite, average, state.average))
        # The sums are replicated, so each process can read these without a collective.
        metrics: Metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "lr": lr,
            "tokens": sums.tokens,
            "finite": finite.astype(jnp.float32),
        }
        # Static, too. Every step has them, so that all steps of a run are the same program.
        if config.train.stats_every:
            metrics[UPDATE_STATS] = {"grad_rms": grad_rms, "update_rms": update_rms}
        return new_state, metrics

    return train_step


def _clip(grads: PyTree, norm: jax.Array, limit: float) -> PyTree:
    """Returns `grads`, whose global norm is `norm`, with a norm of at most `limit`; 0 means no limit."""
    if not limit:
        return grads
    # 1e-6 as in PyTorch's clip_grad_norm_. If the norm is not finite, the step discards the update.
    return jax.tree.map(lambda g: g * jnp.minimum(1.0, limit / (norm + 1e-6)), grads)


def _select(
    condition: jax.Array,
    new: PyTree,
    old: PyTree,
) -> PyTree:
    # jnp.where, not lax.cond: the select fuses with the computation of `new`. NaNs in `new` do not reach the result.
    def choose(n: jax.Array, o: jax.Array) -> jax.Array:
        return jnp.where(condition, n, o)

    return jax.tree.map(choose, new, old)


def accumulate(run_microbatch: Callable[..., PyTree], tokens_ABT: jax.Array) -> PyTree:
    """Returns the sum over a of run_microbatch(a, tokens_ABT[a]), a tree of float32, holding one micro-batch at a time.

    tokens_ABT: int32 [A, B, T+1].
    """
    if tokens_ABT.shape[0] == 1:
        return run_microbatch(0, tokens_ABT[0])  # no loop, and no buffer of zeros
    # A loop, not an unrolled sum: the activations of one micro-batch are freed before the next one starts. With jit,
    # run_microbatch is traced once for both eval_shape and the scan.
    run_microbatch = jax.jit(run_microbatch)
    index_A = jnp.arange(tokens_ABT.shape[0])
    result = jax.eval_shape(run_microbatch, index_A[0], tokens_ABT[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result)

    def add(
        total: PyTree,
        micro: tuple[jax.Array, jax.Array],
    ) -> tuple[PyTree, None]:
        # Gradients have the dtype of params, float32, also where the matmuls are in bfloat16.
        result = run_microbatch(*micro)
        return jax.tree.map(jnp.add, total, result), None

    total, _ = jax.lax.scan(add, zeros, (index_A, tokens_ABT))
    return total


def make_multi_step(train_step: StepFn) -> Callable[[TrainState, Batches], tuple[TrainState, Metrics]]:
    """Returns the train step for Batches: it makes their first `num_steps` steps in one dispatch.

    Metrics gain a leading dim K, and those from index `num_steps` on are 0.
    """

    train_step = jax.jit(train_step, inline=True)  # traced once, for the shapes of the metrics and for the loop

    # state.step increases inside the loop, so the result is bit-identical to that of as many dispatches of one step.
    def multi_step(state: TrainState, batches: Batches) -> tuple[TrainState, Metrics]:
        tokens_KABT = batches.tokens_KABT
        _, shapes = jax.eval_shape(train_step, state, tokens_KABT[0])
        no_metrics = jax.tree.map(lambda one: jnp.zeros((len(tokens_KABT), *one.shape), one.dtype), shapes)

        def run_step(index: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, metrics = carry
            tokens_ABT = jax.lax.dynamic_index_in_dim(tokens_KABT, index, keepdims=False)
            state, measured = train_step(state, tokens_ABT)
            return state, jax.tree.map(lambda all_K, one: all_K.at[index].set(one), metrics, measured)

        # The number of iterations is no constant of the program. So one program makes dispatches of all lengths, and
        # XLA cannot compile the body of a short one in another way, with other last bits.
        return jax.lax.fori_loop(0, batches.num_steps, run_step, (state, no_metrics))

    return multi_step


def make_eval_step(
    loss_fn: LossFn,
    config: Config,
    *,
    parallel: Parallel,
    eot: EndOfText,
) -> EvalFn:
    """Returns eval_step(params, tokens_ABT, token_bytes_V) -> (summed loss, summed bytes of the counted targets).

    tokens_ABT is int32 [A, B, T+1], token_bytes_V the length of each token in bytes. The sums are float32 scalars.
    """

    def eval_step(
        params: PyTree,
        tokens_ABT: jax.Array,
        token_bytes_V: jax.Array,
    ) -> tuple[LossSums, jax.Array]:
        params = all_gather_embeddings(params, parallel)

        def run_microbatch(
            _: jax.typing.ArrayLike,
            tokens: jax.Array,
        ) -> tuple[LossSums, jax.Array]:
            examples = make_examples(tokens, config, eot=eot)
            # Counts the local sequence, like the loss, because psum_all also sums over `tensor`. jnp.maximum keeps a
            # target of -1 from indexing the last token.
            targets_BT = local_sequence(examples.targets_BT, parallel)
            counted_BT = targets_BT >= 0
            size_BT = token_bytes_V[jnp.maximum(targets_BT, 0)]
            size_BT = jnp.where(counted_BT, size_BT, 0)
            sums = loss_fn(params, tokens, None)  # no key: no dropout
            return sums, jnp.sum(size_BT, dtype=jnp.float32)

        sums = accumulate(run_microbatch, tokens_ABT)
        return psum_all(sums, parallel)

    return on_shards(eval_step, parallel, out_specs=lambda _: P())


def jit_steps(
    model: GPT,
    optimizer: optax.GradientTransformation,
    config: Config,
    *,
    abstract: TrainState,
    eot: EndOfText,
) -> tuple[DispatchFn, EvalFn]:
    """Returns (train_step, eval_step) of `model`, jitted; the output state keeps the shardings of `abstract`.

    train_step makes one step on int32 [A, B, T+1], and several on Batches.
    """
    loss_fn = make_loss_fn(model, config, eot=eot)
    schedule = make_schedule(config.optim, config.train.num_steps)
    step = make_train_step(
        loss_fn,
        optimizer,
        schedule,
        config=config,
        parallel=model.parallel,
        separate_state=model.compute.separate_state,
    )
    multi_step = make_multi_step(step)

    # A run calls it with one of the two only, so jit compiles one program.
    def train_step(state: TrainState, tokens: Tokens) -> tuple[TrainState, Metrics]:
        if isinstance(tokens, Batches):
            return multi_step(state, tokens)
        return step(state, tokens)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    # The state is donated: the new state reuses the buffers of the old one, so memory holds one state, not two.
    # out_shardings fix the shardings of the new state; if XLA chose others, the second call would recompile.
    # The metrics are scalars, which are replicated anyway; the statistics of layers are not.
    metrics_sharding = shardings.step if config.train.stats_every else None
    jitted_step = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, metrics_sharding))
    eval_step = make_eval_step(
        loss_fn,
        config,
        parallel=model.parallel,
        eot=eot,
    )
    return jitted_step, jax.jit(eval_step)
