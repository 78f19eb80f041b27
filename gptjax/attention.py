"""Causal self-attention with several backends, chosen by name or by device."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.chips import DEFAULT_SPLASH_BLOCK
from gptjax.collectives import ONE_DEVICE, Parallel
from gptjax.dropout import dropout_mask
from gptjax.errors import ConfigError
from gptjax.remat import recomputed

SPLASH_BLOCK = 128  # the sequence must be a multiple of this
MOST_FUSED_BLOCKS = 4  # of keys: the fused backward pass of splash attention holds a gradient of q for each
QUERY_BLOCKS = 4  # of plain attention
SHORTEST_IN_BLOCKS = 128  # positions; shorter sequences are computed in one block


def why_not_cudnn(
    *,
    platform: str,
    dtype: jnp.dtype,
    has_bfloat16: bool,
    dropout: float,
    document_mask: bool,
    head_width: int,
) -> str:
    """Returns the reason why cuDNN's fused attention cannot be used, or ''."""
    # JAX names the platform of its devices "gpu", and that of a lowering "cuda".
    if platform not in ("gpu", "cuda"):
        return f"cudnn needs an NVIDIA GPU, and the mesh is on {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cudnn needs bfloat16, and compute.dtype is {dtype}"
    # Older GPUs (T4, V100) compute bfloat16 in float32, where XLA's own attention works and cuDNN's does not.
    if not has_bfloat16:
        return "cudnn needs matrix units for bfloat16, which came with compute capability 8.0"
    if dropout:
        return "cudnn has no attention dropout, and model.dropout > 0"
    if document_mask:
        return "cudnn is used with the causal flag only, and data.document_mask is on"
    if head_width % 8 or head_width > 128:
        return f"cudnn needs a head width that is a multiple of 8 up to 128, and it is {head_width}"
    return ""


def why_not_splash(
    *,
    platform: str,
    dropout: float,
    block_size: int,
) -> str:
    """Returns the reason why TPU splash attention cannot be used, or ''."""
    if platform != "tpu":
        return f"splash needs a TPU, and the mesh is on {platform}"
    if dropout:
        return "splash has no attention dropout, and model.dropout > 0"
    # The kernel has no partial blocks. Padding T would need a mask of its own.
    if block_size % SPLASH_BLOCK:
        return f"splash needs model.block_size to be a multiple of {SPLASH_BLOCK}, and it is {block_size}"
    return ""


def choose_backend(
    name: str,
    *,
    platform: str,
    dtype: jnp.dtype,
    has_bfloat16: bool,
    dropout: float,
    document_mask: bool,
    head_width: int,
    block_size: int,
) -> tuple[str, str]:
    """Returns (backend, reason): the backend that compute.attention=`name` means on `platform`.

    reason: why `auto` chose no fused kernel, or ''.

    Raises:
        ConfigError: a backend asked for by name cannot run.
    """
    cudnn_reason = why_not_cudnn(
        platform=platform,
        dtype=dtype,
        has_bfloat16=has_bfloat16,
        dropout=dropout,
        document_mask=document_mask,
        head_width=head_width,
    )
    splash_reason = why_not_splash(
        platform=platform,
        dropout=dropout,
        block_size=block_size,
    )
    reasons = {"xla": "", "cudnn": cudnn_reason, "splash": splash_reason}
    if name != "auto":
        if reasons[name]:
            raise ConfigError(
                reasons[name],
                field="compute.attention",
                value=name,
                remedy="try compute.attention=auto",
            )
        return name, ""
    # "auto" never fails, because plain XLA runs everywhere. Platforms not listed below, such as cpu, have no fused
    # kernel, and so no reason is returned.
    fused_kernels = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}
    fused = fused_kernels.get(platform, "xla")
    if reasons[fused]:
        return "xla", reasons[fused]
    return fused, ""


def causal_attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    *,
    backend: str,
    splash_block: int = DEFAULT_SPLASH_BLOCK,
    segments_BT: jax.Array | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    parallel: Parallel = ONE_DEVICE,
) -> jax.Array:
    """Returns softmax(q k^T / sqrt(H)) v [B, T, N, H] in q's dtype, each query over the keys up to its own position.

    q, k, v: [B, T, N, H] in the compute dtype; under tensor parallelism N is the number of local heads.
    segments_BT: int32 segment ids; a query attends only to keys with its id. dropout_key: None means no dropout.
    """
    # The fused kernels never write the scores to memory, forward or backward. Both compute the softmax in float32, and
    # sum in a different order than XLA, so the backends agree only up to rounding.
    if backend == "cudnn":
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BTNH,
            v_BTNH,
            is_causal=True,
            implementation="cudnn",
        )
    if backend == "splash":
        return splash_attention(q_BTNH, k_BTNH, v_BTNH, segments_BT=segments_BT, largest_block=splash_block)
    if dropout_key is None:
        dropout = 0.0
    # Queries are taken in blocks, each over the keys up to the block's end. With four blocks 5/8 of all scores are
    # computed; the other 3/8 would be masked anyway.
    T = q_BTNH.shape[1]
    size = T // query_blocks(T, dropout)
    q_BNTH = jnp.swapaxes(q_BTNH, 1, 2)
    k_BNTH = jnp.swapaxes(k_BTNH, 1, 2)
    v_BNTH = jnp.swapaxes(v_BTNH, 1, 2)
    # A Python loop, since each block has a different number of keys. Tracing unrolls it.
    parts = []
    for end in range(size, T + 1, size):
        start = end - size
        # Query i of the block is at position start + i, so the diagonal is shifted by `start`.
        all_keys = jnp.ones((size, end), bool)
        # Without documents the mask is a constant of the program, and XLA fuses it into the softmax.
        mask = jnp.tril(all_keys, start)[None, None]
        if segments_BT is not None:
            query_segment = segments_BT[:, None, start:end, None]
            key_segment = segments_BT[:, None, None, :end]
            mask &= query_segment == key_segment
        part = _attend(
            q_BNTH[:, :, start:end],
            k_BNTH[:, :, :end],
            v_BNTH[:, :, :end],
            mask=mask,
            dropout=dropout,
            dropout_key=dropout_key,
            parallel=parallel,
        )
        parts.append(part)
    y_BNTH = jnp.concatenate(parts, axis=2)  # dim 2: queries
    return jnp.swapaxes(y_BNTH, 1, 2)


def query_blocks(positions: int, dropout: float) -> int:
    """Returns the number of query blocks of plain attention."""
    # Dropout hashes an entry's index within the local scores, so query blocks would change the mask.
    if dropout or positions % QUERY_BLOCKS:
        return 1
    if positions < SHORTEST_IN_BLOCKS:
        return 1
    return QUERY_BLOCKS


def masked_attention(
    q_BTNH: jax.Array,
    k_BNSH: jax.Array,
    v_BNSH: jax.Array,
    *,
    mask: jax.Array,
) -> jax.Array:
    """Returns plain XLA attention [B, T, N, H] in v's dtype. mask: bool [B or 1, 1, T, S], True for keys to attend to.

    Keys and values have their heads first, [B, N, S, H], as a KV cache stores them.
    """
    q_BNTH = jnp.swapaxes(q_BTNH, 1, 2)
    y_BNTH = _attend(q_BNTH, k_BNSH, v_BNSH, mask=mask)
    return jnp.swapaxes(y_BNTH, 1, 2)


def _attend(
    q_BNTH: jax.Array,
    k_BNSH: jax.Array,
    v_BNSH: jax.Array,
    *,
    mask: jax.Array,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    parallel: Parallel = ONE_DEVICE,
) -> jax.Array:
    """Returns attention [B, N, T, H], softmax in float32, heads first.

    With heads leading, batched matmuls are twice as fast on a CPU; on GPUs and TPUs nothing changes.
    """
    scale = 1 / math.sqrt(q_BNTH.shape[-1])
    # preferred_element_type: bfloat16 inputs are accumulated in float32, and the softmax gets float32 scores.
    scores_BNTS = jnp.einsum(
        "BNTH,BNSH->BNTS",
        q_BNTH,
        k_BNSH,
        preferred_element_type=jnp.float32,
    )
    # The scale is applied after the matmul, in float32. Splash attention below scales q before it.
    scores_BNTS = scores_BNTS * scale
    # The lowest finite value, not -inf, because a fully masked row would be NaN. A masked score's weight is exactly 0.
    masked_BNTS = jnp.where(mask, scores_BNTS, jnp.finfo(jnp.float32).min)
    weights_BNTS = jax.nn.softmax(masked_BNTS, axis=-1)
    if dropout and dropout_key is not None:
        keep = dropout_mask(dropout_key, dropout, weights_BNTS.shape, parallel=parallel)
        # Applied to the normalised weights, as in GPT-2: a row's sum is 1 in expectation only.
        scaled_BNTS = weights_BNTS / (1 - dropout)
        weights_BNTS = jnp.where(keep, scaled_BNTS, 0.0)
    # The second matmul needs both inputs in the same dtype.
    weights_BNTS = weights_BNTS.astype(v_BNSH.dtype)
    return jnp.einsum("BNTS,BNSH->BNTH", weights_BNTS, v_BNSH)


def splash_attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    largest_block: int = DEFAULT_SPLASH_BLOCK,
    interpret: bool = False,
) -> jax.Array:
    """Returns TPU splash attention [B, T, N, H] on one device.

    q, k, v: [B, T, N, H]. segments_BT: int32, as in causal_attention. largest_block: positions of a block of queries or
    keys, at most. interpret: use Pallas's interpret mode, which runs on any platform.

    On a mesh it must run under shard_map: XLA cannot partition a Pallas kernel.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # TPU only, and slow to import

    T, N, H = q_BTNH.shape[1:]
    # All blocks have one size, which divides T: choose_backend has checked that T is a multiple of SPLASH_BLOCK.
    block = math.gcd(T, largest_block)
    # Fused, one kernel computes all three gradients, and the weights only once. It writes a gradient of q for each
    # block of keys, which are summed after it: of a long sequence these would take much memory.
    is_fused = T // block <= MOST_FUSED_BLOCKS
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=None if is_fused else block,
        block_kv_dq=None if is_fused else block,
        use_fused_bwd_kernel=is_fused,
    )
    # Causal blocks above the diagonal are skipped; the segment ids below mask within the others.
    mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * N)
    kernel = splash.make_splash_mha_single_device(
        mask,
        block_sizes=sizes,
        interpret=interpret,
    )

    def heads_first(qkv: tuple[jax.Array, ...]) -> list[jax.Array]:
        q_BTNH, k_BTNH, v_BTNH = qkv
        # The kernel does not scale.
        return [jnp.moveaxis(x_BTNH, 2, 1) for x_BTNH in (q_BTNH / math.sqrt(H), k_BTNH, v_BTNH)]

    q_BNTH, k_BNTH, v_BNTH = recomputed(heads_first)((q_BTNH, k_BTNH, v_BTNH))

    # The kernel takes one sequence, [N, T, H]; vmap adds the batch as a dimension of its grid.
    def attend(
        q_NTH: jax.Array,
        k_NTH: jax.Array,
        v_NTH: jax.Array,
        segments_T: jax.Array | None,
    ) -> Any:
        segment_ids = None if segments_T is None else splash.SegmentIds(segments_T, segments_T)
        return kernel(q_NTH, k_NTH, v_NTH, segment_ids)

    # Without documents there are no segment ids, which the kernel would read and compare for each pair.
    y_BNTH = jax.vmap(attend)(q_BNTH, k_BNTH, v_BNTH, segments_BT)
    return jnp.moveaxis(y_BNTH, 1, 2)
