"""The optimizer, the learning-rate schedule, and which parameter plays which role, all from config and by path."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from gptjax.config import OptimConfig
from gptjax.sharding import param_spec, path_name

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]
DECAYED = r".*/(kernel|embedding)"  # matrices and tables; not biases, not LayerNorm
MUON = r"h/.*/kernel"  # hidden matrices; tables, head, biases and LayerNorm go to AdamW


def make_schedule(config: OptimConfig, num_steps: int) -> Schedule:
    """Returns step -> learning rate, float32; update n (from 0) uses schedule(n).

    Warm-up is linear and reaches peak_lr at update `warmup_steps`, its first update already above 0. `cosine` then
    falls to min_lr at `num_steps`; `wsd` (warm-up, stable, decay: Hu et al. 2024, "MiniCPM", section 4) stays and falls
    linearly over the last decay_fraction of the run; `constant` stays.
    """
    peak, low, warmup = config.peak_lr, config.min_lr, config.warmup_steps

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(step, jnp.float32)
        if config.schedule == "cosine":
            done = jnp.clip((t - warmup) / max(num_steps - warmup, 1), 0.0, 1.0)
            after = low + (peak - low) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        elif config.schedule == "wsd":
            start = num_steps * (1 - config.decay_fraction)
            done = jnp.clip((t - start) / max(num_steps - start, 1), 0.0, 1.0)
            after = peak + (low - peak) * done
        else:
            after = jnp.full_like(t, peak)
        # The smaller one: a decay that begins within the warm-up must not make the rate jump.
        return jnp.where(t < warmup, jnp.minimum(peak * (t + 1) / (warmup + 1), after), after)

    return schedule


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Returns the optimizer at learning rate 1: the step multiplies its updates by schedule(step).

    So the learning rate depends on the step alone and never on a count inside the optimizer's state.
    """
    b1, b2, eps, decay = config.beta1, config.beta2, config.eps, config.weight_decay
    adamw = optax.adamw(1.0, b1=b1, b2=b2, eps=eps, weight_decay=decay, mask=_decay_mask)
    if config.name == "adamw":
        return adamw
    if config.name == "lion":
        return optax.lion(1.0, b1=b1, b2=b2, weight_decay=decay, mask=_decay_mask)
    if config.name == "adafactor":
        return optax.adafactor(1.0, weight_decay_rate=decay, weight_decay_mask=_decay_mask)
    # consistent_rms makes updates as large as AdamW's, so that both take one learning rate (Liu et al. 2025, "Muon is
    # Scalable for LLM Training", section 2.2).
    muon = contrib.muon(
        1.0, beta=config.muon_beta, weight_decay=decay, consistent_rms=0.2, muon_weight_dimension_numbers=_muon_dims
    )
    return optax.partition({"muon": muon, "adamw": adamw}, _muon_labels)


def _by_path(params: Any, rule: Callable[[str], Any]) -> Any:
    return jax.tree.map_with_path(lambda path, _: rule(path_name(path)), params)


def decays(path: str) -> bool:
    return re.fullmatch(DECAYED, path) is not None


def uses_muon(path: str) -> bool:
    return re.fullmatch(MUON, path) is not None


def _decay_mask(params: Any) -> Any:
    return _by_path(params, decays)


def _muon_labels(params: Any) -> Any:
    return _by_path(params, lambda path: "muon" if uses_muon(path) else "adamw")


def _muon_dims(params: Any) -> Any:
    """Orthogonalise each layer's matrix alone, and q, k and v apart: [L, D, 3, D] is 3 L matrices."""
    output = lambda path: 3 if path.endswith("c_attn/kernel") else 2  # noqa: E731
    return _by_path(params, lambda path: contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=output(path)))


def role_table(params: Any, config: OptimConfig) -> list[dict[str, Any]]:
    """Returns a row a parameter: path, shape, whether decay applies, optimizer, sharding. params may be abstract."""
    return [
        {
            "parameter": (path := path_name(key)),
            "shape": list(leaf.shape),
            "weight_decay": decays(path) and config.weight_decay > 0,
            "optimizer": config.name if config.name != "muon" or uses_muon(path) else "adamw",
            "sharding": str(param_spec(path)),
        }
        for key, leaf in jax.tree.leaves_with_path(params)
    ]
