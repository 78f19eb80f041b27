"""The optimizer and the learning-rate schedule of a config, and the table of parameters with their roles."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath
from optax import contrib

from gptjax.config import OptimConfig
from gptjax.params import PyTree, find
from gptjax.sharding import path_name

# Of x -> a x + b x^3 + c x^5 on singular values, five times. Keller Jordan's, which leaves them in [0.68, 1.14].
QUINTIC = (3.4445, -4.775, 2.0315)
# The minimax polynomials of Amsel et al. 2025, "The Polar Express", for values above 0.001, with a margin for bfloat16.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def make_schedule(config: OptimConfig, num_steps: int) -> Schedule:
    """Returns a function step -> learning rate, float32 scalars; update n (from 0) uses schedule(n).

    Warm-up is linear: update 0 is already above 0, and update `warmup_steps` is at peak_lr. Then `cosine` and `linear`
    fall to min_lr at `num_steps`. `wsd` (warm-up, stable, decay: Hu et al. 2024, "MiniCPM", section 4) keeps peak_lr,
    and falls to min_lr over the last decay_fraction of the run, in the form of decay_shape (sqrt: Hägele et al. 2024,
    "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations"). `constant` keeps peak_lr.
    """
    peak = config.peak_lr
    low = config.min_lr
    warmup = config.warmup_steps

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        # `step` is traced, the config is static, so one branch is compiled. float32 is exact for steps below 2**24.
        t = jnp.asarray(step, jnp.float32)
        if config.schedule == "cosine":
            # max(..., 1): a run may be no longer than its warm-up.
            decay_steps = max(num_steps - warmup, 1)
            done = jnp.clip((t - warmup) / decay_steps, 0.0, 1.0)
            after = low + (peak - low) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        elif config.schedule == "linear":
            # From the end of the warm-up on, as the cosine.
            decay_steps = max(num_steps - warmup, 1)
            done = jnp.clip((t - warmup) / decay_steps, 0.0, 1.0)
            after = peak + (low - peak) * done
        elif config.schedule == "wsd":
            start = num_steps * (1 - config.decay_fraction)
            decay_steps = max(num_steps - start, 1)
            done = jnp.clip((t - start) / decay_steps, 0.0, 1.0)
            # The same expression for every shape, so that `linear` has the bits that it had alone.
            after = peak + (low - peak) * _fallen(done, config)
        else:
            after = jnp.full_like(t, peak)  # an array, like the other branches, for jnp.minimum
        is_warming_up = t < warmup
        # + 1 in numerator and denominator: update 0 is above 0, and update `warmup` is the first one at the peak.
        # jnp.minimum: if the decay begins within the warm-up, the rate must not jump.
        rising = jnp.minimum(peak * (t + 1) / (warmup + 1), after)
        return jnp.where(is_warming_up, rising, after)

    return schedule


def _fallen(done: jax.Array, config: OptimConfig) -> jax.Array:
    """Returns how much of its fall the learning rate has behind it, in [0, 1]. done: of the decay's steps, float32."""
    # A static branch, like those of the schedule: one shape is compiled.
    # `linear` returns `done` itself, which keeps the bits of runs from before there were other shapes.
    if config.decay_shape == "cosine":
        return 0.5 * (1 - jnp.cos(jnp.pi * done))
    if config.decay_shape == "sqrt":
        return jnp.sqrt(done)
    if config.decay_shape == "power":
        return 1 - (1 - done) ** config.decay_power
    return done


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Returns the optimizer at learning rate 1: the step multiplies its updates by schedule(step).

    So the learning rate depends on the step alone and never on a count inside the optimizer's state. The updates
    include the sign: they are added to the parameters.
    """
    b1 = config.beta1
    b2 = config.beta2
    decay = config.weight_decay
    # Decoupled weight decay: it is part of the update, so that the schedule scales it with the rest.
    adamw = optax.adamw(
        1.0,
        b1=b1,
        b2=b2,
        eps=config.eps,
        weight_decay=decay,
        mask=_decay_mask,
    )
    if config.name == "adamw":
        return adamw
    if config.name == "lion":
        return optax.lion(
            1.0,
            b1=b1,
            b2=b2,
            weight_decay=decay,
            mask=_decay_mask,
        )
    if config.name == "adafactor":
        # Its second moments are factored; state_shardings shards rows and columns. It ignores beta1, beta2 and eps.
        return optax.adafactor(
            1.0,
            weight_decay_rate=decay,
            weight_decay_mask=_decay_mask,
        )
    # consistent_rms makes updates as large as AdamW's, so that both take one learning rate (Liu et al. 2025, "Muon is
    # Scalable for LLM Training", section 2.2).
    muon = contrib.muon(
        1.0,
        ns_coeffs=POLAR_EXPRESS if config.muon_coefficients == "polar_express" else QUINTIC,
        beta=config.muon_beta,
        weight_decay=decay,
        nesterov=config.muon_nesterov,
        consistent_rms=0.2 if config.muon_scale == "rms" else None,
        muon_weight_dimension_numbers=_muon_dims,
    )
    # partition gives each optimizer a state for its own parameters only. Muon has no decay mask: all of its parameters
    # are matrices, which decay.
    return optax.partition({"muon": muon, "adamw": adamw}, _muon_labels)


# The masks below are functions of the parameter tree, not trees. optax.partition masks the tree first, so a mask that
# was built for the full tree would not match.
def _by_path(params: PyTree, rule: Callable[[str], object]) -> PyTree:
    def apply_rule(path: KeyPath, _: object) -> object:
        return rule(path_name(path))

    return jax.tree.map_with_path(apply_rule, params)


def _decay_mask(params: PyTree) -> PyTree:
    return _by_path(params, lambda path: find(path).decays)


# Muon is for hidden matrices. AdamW updates the embeddings and the head, although they are matrices, too.
def _muon_labels(params: PyTree) -> PyTree:
    def label(path: str) -> str:
        return "muon" if find(path).uses_muon else "adamw"

    return _by_path(params, label)


def _muon_dims(params: PyTree) -> PyTree:
    """Returns each kernel's matrix dims. Muon treats the others as batch dims: [L, D, 3, D] is 3 L matrices."""

    # All kernels are [L, in, ..., out]. Dims that are neither reduction nor output are batch dims for optax.
    def dims(path: str) -> contrib.MuonDimensionNumbers:
        last = len(find(path).dims) - 1
        return contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=last)

    return _by_path(params, dims)


def parameter_table(params: PyTree, config: OptimConfig) -> list[dict[str, Any]]:
    """Returns a row per parameter: path, shape, whether decay applies, optimizer, sharding.

    params: arrays, or jax.ShapeDtypeStruct.

    Raises:
        ConfigError: params.py does not describe a parameter.
    """
    table = []
    for key, leaf in jax.tree.leaves_with_path(params):
        path = path_name(key)
        param = find(path)
        # Repeats the rules of make_optimizer as names, for parameters.json.
        optimizer = config.name
        if optimizer == "muon" and not param.uses_muon:
            optimizer = "adamw"
        row = {
            "parameter": path,
            "shape": list(leaf.shape),
            "weight_decay": param.decays and config.weight_decay > 0,
            "optimizer": optimizer,
            "sharding": str(param.spec),
        }
        table.append(row)
    return table
