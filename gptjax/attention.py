"""Causal self-attention: one function, several backends, chosen by name or by the device."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gptjax.errors import ConfigError
from gptjax.parallel import keep_mask
from gptjax.sharding import BATCH_AXES

SPLASH_HEAD_WIDTH = 128  # TPU lanes: narrower heads are padded with zeros
SPLASH_BLOCK = 128
QUERY_BLOCKS = 4
SHORTEST_IN_BLOCKS = 128


def why_not_cudnn(*, platform: str, dtype: jnp.dtype, dropout: float, document_mask: bool, head_width: int) -> str:
    """Returns the reason why cuDNN's fused attention cannot serve, or ''."""
    if platform not in ("gpu", "cuda"):
        return f"cudnn needs an NVIDIA GPU, and the mesh is on {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cudnn needs bfloat16, and compute.dtype is {dtype}"
    if dropout:
        return "cudnn has no attention dropout, and model.dropout > 0"
    if document_mask:
        return "cudnn is used with the causal flag only, and data.document_mask is on"
    if head_width % 8 or head_width > 128:
        return f"cudnn needs a head width that is a multiple of 8 up to 128, and it is {head_width}"
    return ""


def why_not_splash(*, platform: str, dropout: float, block_size: int) -> str:
    """Returns the reason why TPU splash attention cannot serve, or ''."""
    if platform != "tpu":
        return f"splash needs a TPU, and the mesh is on {platform}"
    if dropout:
        return "splash has no attention dropout, and model.dropout > 0"
    if block_size % SPLASH_BLOCK:
        return f"splash needs model.block_size to be a multiple of {SPLASH_BLOCK}, and it is {block_size}"
    return ""


def choose_backend(
    name: str, *, platform: str, dtype: jnp.dtype, dropout: float, document_mask: bool, head_width: int, block_size: int
) -> tuple[str, str]:
    """Returns (backend, reason): what `name` means on `platform`, and why `auto` chose no fused kernel, or ''.

    Raises:
        ConfigError: a backend asked for by name cannot run.
    """
    reasons = {
        "xla": "",
        "cudnn": why_not_cudnn(
            platform=platform, dtype=dtype, dropout=dropout, document_mask=document_mask, head_width=head_width
        ),
        "splash": why_not_splash(platform=platform, dropout=dropout, block_size=block_size),
    }
    if name != "auto":
        if reasons[name]:
            raise ConfigError(f"compute.attention={name!r}: {reasons[name]}; try compute.attention='auto'")
        return name, ""
    fused = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}.get(platform, "xla")
    return ("xla", reasons[fused]) if reasons[fused] else (fused, "")


def causal_attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    *,
    backend: str,
    segments_BT: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Returns softmax(q k^T / sqrt(H)) v [B, T, N, H], each query over the keys up to its own position.

    segments_BT: int32 numbers of documents; a query sees only keys of its own. dropout_key: None means no dropout.
    """
    if backend == "cudnn":
        return jax.nn.dot_product_attention(q_BTNH, k_BTNH, v_BTNH, is_causal=True, implementation="cudnn")
    if backend == "splash":
        return _splash(q_BTNH, k_BTNH, v_BTNH, segments_BT)
    dropping = dropout if dropout_key is not None else 0.0
    T = q_BTNH.shape[1]
    # In blocks of queries, each over the keys up to its end: of four, 5/8 of all scores, and 3/8 are masked anyway.
    size = T // query_blocks(T, dropping)
    q_BNTH, k_BNTH, v_BNTH = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BTNH, v_BTNH))
    parts = []
    for end in range(size, T + 1, size):
        mask = jnp.tril(jnp.ones((size, end), bool), end - size)[None, None]
        if segments_BT is not None:
            mask &= segments_BT[:, None, end - size : end, None] == segments_BT[:, None, None, :end]
        q = q_BNTH[:, :, end - size : end]
        parts.append(_attend(q, k_BNTH[:, :, :end], v_BNTH[:, :, :end], mask, dropping, dropout_key))
    return jnp.swapaxes(jnp.concatenate(parts, axis=2), 1, 2)


def query_blocks(positions: int, dropout: float) -> int:
    """Returns in how many blocks of queries plain attention is computed."""
    whole = dropout or positions % QUERY_BLOCKS or positions < SHORTEST_IN_BLOCKS
    return 1 if whole else QUERY_BLOCKS


def masked_attention(q_BTNH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns attention [B, T, N, H] in plain XLA; mask [B or 1, 1, T, S] is True for seen keys."""
    return jnp.swapaxes(_attend(jnp.swapaxes(q_BTNH, 1, 2), k_BNSH, v_BNSH, mask), 1, 2)


def _attend(
    q_BNTH: jax.Array,
    k_BNSH: jax.Array,
    v_BNSH: jax.Array,
    mask: jax.Array,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Returns attention [B, N, T, H], softmax in float32, heads first.

    The CPU's products of matrices in a batch are twice as fast so, and elsewhere nothing changes.
    """
    scale = 1 / math.sqrt(q_BNTH.shape[-1])
    scores_BNTS = jnp.einsum("BNTH,BNSH->BNTS", q_BNTH, k_BNSH, preferred_element_type=jnp.float32) * scale
    weights_BNTS = jax.nn.softmax(jnp.where(mask, scores_BNTS, jnp.finfo(jnp.float32).min), axis=-1)
    if dropout and dropout_key is not None:
        keep = keep_mask(dropout_key, dropout, weights_BNTS.shape)
        weights_BNTS = jnp.where(keep, weights_BNTS / (1 - dropout), 0.0)
    return jnp.einsum("BNTS,BNSH->BNTH", weights_BNTS.astype(v_BNSH.dtype), v_BNSH)


def _splash(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    """Runs the Pallas kernel on each device's own sequences and heads."""
    if segments_BT is None:
        segments_BT = jnp.zeros(q_BTNH.shape[:2], jnp.int32)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return splash_on_one_device(q_BTNH, k_BTNH, v_BTNH, segments_BT)
    heads = P(BATCH_AXES, None, "tensor", None)
    sharded = jax.shard_map(
        splash_on_one_device, in_specs=(heads, heads, heads, P(BATCH_AXES, None)), out_specs=heads, check_vma=False
    )
    return sharded(q_BTNH, k_BTNH, v_BTNH, segments_BT)


def splash_on_one_device(
    q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, segments_BT: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Returns TPU splash attention [B, T, N, H] of one device's part, heads padded to the kernel's width."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # TPU only, and slow to import

    T, N, H = q_BTNH.shape[1:]
    width = -(-H // SPLASH_HEAD_WIDTH) * SPLASH_HEAD_WIDTH
    block = math.gcd(T, 512)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * N)
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
    pad = functools.partial(jnp.pad, pad_width=((0, 0), (0, 0), (0, 0), (0, width - H)))
    q, k, v = (jnp.moveaxis(pad(x), 2, 1) for x in (q_BTNH / math.sqrt(H), k_BTNH, v_BTNH))
    y: Any = jax.vmap(lambda q, k, v, s: kernel(q, k, v, splash.SegmentIds(s, s)))(q, k, v, segments_BT)
    return jnp.moveaxis(y, 1, 2)[..., :H]
