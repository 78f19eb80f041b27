"""ComputeConfig with every "auto" resolved for the target device."""

import dataclasses
import logging
import math
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from gptjax.attention import choose_backend
from gptjax.chips import DEFAULT_SPLASH_BLOCK, find_chip, has_bfloat16
from gptjax.collectives import Parallel
from gptjax.config import Config
from gptjax.config_values import nearest_divisors
from gptjax.errors import ConfigError
from gptjax.loss import choose_loss

log = logging.getLogger("gptjax")
MOST_LAYERS_WITHOUT_LOOP_ON_CPU = 8


@dataclasses.dataclass(frozen=True)
class ResolvedCompute:
    """ComputeConfig with every `auto` resolved for the target device."""

    attention: str = "xla"
    loss: str = "xla"
    remat: str = "none"
    scan_unroll: int = 1
    dtype: Any = jnp.float32
    # Linear layers multiply [B*T, D]. That is faster on CPU and GPU, and slower on TPU. Under tensor parallelism it
    # would need an all-gather.
    flatten_tokens: bool = True
    splash_block: int = DEFAULT_SPLASH_BLOCK  # positions of a block of splash attention, at most
    # XLA's CPU backend computes one array per pass. By itself it stores AdamW's new moments, the update before and
    # after the learning rate, and then the moments once more behind `finite`: 25 passes over memory. With the update
    # and the moments computed apart, it makes 18. Other backends compute all of them in one pass.
    separate_state: bool = False


def resolve_compute(config: Config, mesh: Mesh) -> ResolvedCompute:
    """Resolves ComputeConfig for a mesh of real or virtual devices. Logs once why a fused kernel is unavailable.

    Raises:
        ConfigError: a backend asked for by name cannot run there, or mesh.tensor does not divide heads and positions.
    """
    device = mesh.devices.flat[0]
    platform = device.platform
    compute = config.compute
    model = config.model
    dtype = resolve_dtype(config, device)
    attention, reason = choose_backend(
        compute.attention,
        platform=platform,
        dtype=dtype,
        has_bfloat16=has_bfloat16(device),
        dropout=model.dropout,
        document_mask=config.data.document_mask,
        head_width=model.n_embd // model.n_head,
        block_size=model.block_size,
    )
    tensor = mesh.shape["tensor"]
    _check_tensor(config, tensor)
    if reason:
        log.info("attention: xla, because %s", reason)
    chip = find_chip(getattr(device, "device_kind", ""))
    return ResolvedCompute(
        attention=attention,
        loss=choose_loss(compute.loss, platform=platform, tensor=tensor),
        remat=compute.remat,
        scan_unroll=choose_unroll(compute.scan_unroll, model.n_layer, platform, num_devices=mesh.size),
        dtype=dtype,
        flatten_tokens=platform != "tpu" and tensor == 1,
        splash_block=chip.splash_block if chip else DEFAULT_SPLASH_BLOCK,
        separate_state=platform == "cpu" and config.optim.name == "adamw",
    )


def _check_tensor(config: Config, tensor: int) -> None:
    model = config.model
    both = math.gcd(model.n_head, model.block_size)
    if both % tensor:
        nearest = nearest_divisors(both, tensor)
        raise ConfigError(
            f"must divide model.n_head={model.n_head} and model.block_size={model.block_size}",
            field="mesh.tensor",
            value=tensor,
            remedy=f"nearest: {', '.join(map(str, nearest))}",
        )


def resolve_parallel(config: Config, mesh: Mesh) -> Parallel:
    """Returns the parallelism of the steps of `config` over `mesh`, whose devices may be virtual."""
    device = mesh.devices.flat[0]
    dtype = resolve_dtype(config, device)
    reduce_name = config.compute.reduce_dtype
    reduce_dtype = dtype if reduce_name == "auto" else jnp.dtype(reduce_name)
    table_name = config.compute.table_reduce_dtype
    table_reduce_dtype = reduce_dtype if table_name == "auto" else jnp.dtype(table_name)
    # Two stages only where `fsdp` covers the devices of a slice: then its devices form a grid.
    slices = len({getattr(one, "slice_index", 0) for one in mesh.devices.flat})
    covers_slice = mesh.shape["fsdp"] == mesh.size // slices
    return Parallel(
        mesh=mesh,
        dtype=dtype,
        reduce_dtype=reduce_dtype,
        table_reduce_dtype=table_reduce_dtype,
        two_stage_collectives=device.platform == "tpu" and covers_slice,
    )


def resolve_dtype(config: Config, device: Any) -> jnp.dtype:
    """Returns the dtype of matrix products and activations on `device`."""
    name = config.compute.dtype
    if name == "auto":
        name = _default_dtype(device)
    return jnp.dtype(name)


def choose_unroll(
    unroll: int,
    n_layer: int,
    platform: str,
    *,
    num_devices: int = 1,
) -> int:
    """Returns the number of layers per iteration of the loop over layers.

    Without a loop nothing is copied into and out of stacked arrays: GPT-2 small at 64 sequences on H200 moves 200 GB
    per step instead of 306. A TPU moves more without one (v5e, 8 sequences: 36 GB instead of 29). On a CPU 4
    layers are 15 % faster without a loop, 6 layers 2 or 16 % by JAX's version, and 12 take twice as long to compile.
    """
    if unroll < 0:
        is_small_on_cpu = platform == "cpu" and num_devices == 1 and n_layer <= MOST_LAYERS_WITHOUT_LOOP_ON_CPU
        unroll = 0 if is_small_on_cpu or platform in ("gpu", "cuda") else 1
    return unroll or n_layer


def _default_dtype(device: Any) -> str:
    if device.platform == "tpu":
        return "bfloat16"
    if device.platform not in ("gpu", "cuda"):
        return "float32"
    return "bfloat16" if has_bfloat16(device) else "float32"
