"""GPT-2 in Flax linen, exactly, with its parameter, FLOP and memory counts by hand.

Letters, everywhere: B batch, T query position, S key position, D model width, N heads, H head width, F MLP width,
V vocabulary, L layers, A accumulation micro-batches, C prompt chunk, M is B*T flattened. They name logical dimensions,
never shards: `x_BTD` is [B, T, D].
"""

import dataclasses
import logging
import math
import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gptjax.attention import SPLASH_HEAD_WIDTH, causal_attention, choose_backend, masked_attention, query_blocks
from gptjax.config import Config, GPTConfig, nearest_divisors
from gptjax.errors import ConfigError
from gptjax.loss import choose_loss, masked_logits
from gptjax.parallel import (
    gather_layer,
    gather_positions,
    gathers,
    keep_mask,
    own_positions,
    sum_positions,
    summed_product,
    tensor_index,
    tensor_parts,
)
from gptjax.pointwise import gelu, layer_norm
from gptjax.sharding import BATCH_AXES, constrain

__all__ = ["GPT", "MLP", "Block", "CausalSelfAttention", "Compute", "GPTConfig"]

log = logging.getLogger("gptjax")
VOCAB_MULTIPLE = 128
LAYER_NORM_EPSILON = 1e-5
INIT_STD = 0.02
REMAT_POLICIES = {
    "none": lambda primitive, *_, **__: primitive.name != "linear_call",  # gathered weights are gathered again
    "full": None,
    "dots": jax.checkpoint_policies.checkpoint_dots,
    "dots_no_batch": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """ComputeConfig with every `auto` decided for one kind of device."""

    attention: str = "xla"
    loss: str = "xla"
    remat: str = "none"
    unroll: int = 1
    dtype: Any = jnp.float32
    reduce_dtype: Any = jnp.float32  # in which shards sum their gradients
    two_stages: bool = False  # the sum over all devices of a TPU slice: in one stage, XLA sends twice the bytes
    flat: bool = True  # [B*T, D] outside attention: faster on CPU and GPU, slower on TPU, a gather under tensor


def resolve_compute(config: Config, mesh: Mesh) -> Compute:
    """Returns how to compute on the devices of `mesh`, present or not, saying once why a fast path is off.

    Raises:
        ConfigError: what is asked for by name cannot run there, or the heads do not divide.
    """
    device = mesh.devices.flat[0]
    compute, model = config.compute, config.model
    dtype = jnp.dtype(_default_dtype(device) if compute.dtype == "auto" else compute.dtype)
    backend, reason = choose_backend(
        compute.attention,
        platform=device.platform,
        dtype=dtype,
        dropout=model.dropout,
        document_mask=config.data.document_mask,
        head_width=model.n_embd // model.n_head,
        block_size=model.block_size,
    )
    cut, both = mesh.shape["tensor"], math.gcd(model.n_head, model.block_size)
    if both % cut:
        near = ", ".join(map(str, nearest_divisors(both, cut)))
        raise ConfigError(
            f"mesh.tensor={cut}: must divide model.n_head={model.n_head} and model.block_size={model.block_size}; "
            f"nearest: {near}"
        )
    if reason:
        log.info("attention: xla, because %s", reason)
    flat = device.platform != "tpu" and mesh.shape["tensor"] == 1
    slices = len({getattr(one, "slice_index", 0) for one in mesh.devices.flat})
    two_stages = device.platform == "tpu" and mesh.shape["fsdp"] == mesh.size // slices
    reduce_dtype = dtype if compute.reduce_dtype == "auto" else jnp.dtype(compute.reduce_dtype)
    loss = choose_loss(compute.loss, platform=device.platform, tensor=cut)
    unroll = choose_unroll(compute.unroll, model.n_layer, device.platform)
    return Compute(backend, loss, compute.remat, unroll, dtype, reduce_dtype, two_stages, flat)


def choose_unroll(unroll: int, n_layer: int, platform: str) -> int:
    """Returns how many layers an iteration of the loop over them computes.

    Without a loop nothing is copied into and out of stacked arrays: GPT-2 small at 64 sequences on H200 200 GB a step
    instead of 306. A TPU moves more without one (v5e, 8 sequences: 36 GB instead of 29).
    """
    if unroll < 0:
        unroll = 0 if platform in ("gpu", "cuda") else 1
    return unroll or n_layer


def _default_dtype(device: Any) -> str:
    if device.platform in ("gpu", "cuda"):  # bfloat16 matrix units came with compute capability 8.0
        return "bfloat16" if float(getattr(device, "compute_capability", 8)) >= 8 else "float32"
    return "bfloat16" if device.platform == "tpu" else "float32"


class CausalSelfAttention(nn.Module):
    """Multi-head attention over earlier positions; `x` is [B, T, D], or [B*T, D] with `batch` = B.

    Where `tensor` cuts the step, `x` has this device's positions, and the parameters are those of its heads.
    """

    config: GPTConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, batch: int, segments_BT: jax.Array | None, cache: Any) -> tuple[jax.Array, Any]:
        c, parts = self.config, tensor_parts()
        x = gather_positions(x)
        width = (3, c.n_embd // parts)
        qkv = nn.DenseGeneral(width, kernel_init=_normal(), **_linear(c, self.compute), name="c_attn")(x)
        heads = (batch, -1, c.n_head // parts, c.n_embd // c.n_head)
        q_BTNH, k_BTNH, v_BTNH = (qkv[..., i, :].reshape(heads) for i in range(3))
        if cache is None:
            key = self.make_rng("dropout") if c.dropout and self.has_rng("dropout") else None
            y_BTNH = causal_attention(
                q_BTNH, k_BTNH, v_BTNH,
                backend=self.compute.attention, segments_BT=segments_BT, dropout=c.dropout, dropout_key=key,
            )  # fmt: skip
        else:
            cache, mask = extend_cache(cache, k_BTNH, v_BTNH)
            y_BTNH = masked_attention(q_BTNH, cache.k_BNSH, cache.v_BNSH, mask)
        y = _summed_linear(c, self.compute)(y_BTNH.reshape(*x.shape[:-1], -1))
        return _dropout(self, y, batch, c.dropout), cache


class LayerNorm(nn.Module):
    """Layer normalisation along the last dimension, in the dtype of its input; parameters float32 [D]."""

    use_bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale_D = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias_D = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32) if self.use_bias else None
        return layer_norm(x, scale_D, bias_D, LAYER_NORM_EPSILON)


class Product(nn.Module):
    """A linear layer that gives its bias beside the product, for what comes next to add."""

    features: int
    use_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        kernel = self.param("kernel", _normal(), (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32) if self.use_bias else None
        return x.astype(self.dtype) @ kernel.astype(self.dtype), bias


class MLP(nn.Module):
    config: GPTConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, batch: int) -> jax.Array:
        c = self.config
        width = 4 * c.n_embd // tensor_parts()
        x, bias_F = Product(width, c.bias, self.compute.dtype, name="c_fc")(gather_positions(x))
        x = _summed_linear(c, self.compute)(gelu(x, bias_F))
        return _dropout(self, x, batch, c.dropout)


class Block(nn.Module):
    """One layer; with a cache, its keys and values are extended and returned (sample.py)."""

    config: GPTConfig
    compute: Compute

    @nn.compact
    def __call__(
        self, x: jax.Array, batch: int, segments_BT: jax.Array | None = None, cache: Any = None
    ) -> tuple[jax.Array, Any]:
        with jax.named_scope("attention"):
            normed = LayerNorm(self.config.bias, name="ln_1")(x)
            y, cache = CausalSelfAttention(self.config, self.compute, name="attn")(normed, batch, segments_BT, cache)
            x = x + y
        with jax.named_scope("mlp"):
            normed = LayerNorm(self.config.bias, name="ln_2")(x)
            x = x + MLP(self.config, self.compute, name="mlp")(normed, batch)
        return constrain(x, P(BATCH_AXES, *[None] * (x.ndim - 1))), cache


class GPT(nn.Module):
    """GPT-2. Dropout is on when apply() is given rngs={'dropout': key}, and off otherwise.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3, and the released
    code's defaults: LayerNorm first, epsilon 1e-5, tanh GELU, learned positions, residual projections scaled at init.
    """

    config: GPTConfig
    compute: Compute = Compute()

    def setup(self) -> None:
        c = self.config
        width = {"features": c.n_embd, "embedding_init": _normal(), "param_dtype": jnp.float32}
        self.wte = nn.Embed(padded_vocab_size(c) // tensor_parts(), **width)
        self.wpe = nn.Embed(c.block_size, **width)
        self.h = scanned_blocks(c, self.compute)
        self.ln_f = LayerNorm(c.bias)
        if not c.tie_embeddings:
            self.lm_head = nn.Dense(padded_vocab_size(c), use_bias=False, kernel_init=_normal(), dtype=jnp.float32)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Returns logits_BTV, float32, of the true vocabulary, for tokens in one document a row."""
        x_BTD = self.hidden(tokens_BT)
        if self.is_initializing() and not self.config.tie_embeddings:
            self.lm_head(x_BTD.astype(jnp.float32))
        head_DV = head(self.variables["params"])
        return masked_logits(x_BTD, head_DV, self.config.vocab_size)[..., : self.config.vocab_size]

    def hidden(self, tokens_BT: jax.Array, starts_BT: jax.Array | None = None) -> jax.Array:
        """Returns x_BTD after the last LayerNorm, what the loss takes; of a step cut over `tensor`, its own positions.

        starts_BT: bool, True where a document starts: attention and positions restart there. None: one document a row.
        """
        segments_BT = None if starts_BT is None else jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32)
        x_BTD = self.embed(tokens_BT, positions(tokens_BT.shape, starts_BT))
        x_BTD = _dropout(self, x_BTD, len(tokens_BT), self.config.dropout)
        x = x_BTD.reshape(-1, self.config.n_embd) if self.compute.flat else x_BTD
        x, _ = self.h(x, tokens_BT.shape[0], segments_BT)
        return self.ln_f(x).reshape(x_BTD.shape)

    def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Returns token plus position embedding; looked up in float32, so that their gradient is summed in float32."""
        x_BTD = self.look_up(tokens_BT) + self.wpe.embedding[own_positions(positions_BT)]
        return constrain(x_BTD.astype(self.compute.dtype), P(BATCH_AXES, None, None))

    def look_up(self, tokens_BT: jax.Array) -> jax.Array:
        """Returns the tokens' rows; where `tensor` cuts the vocabulary they come from one device each, and travel."""
        table_VD = self.wte.embedding
        if tensor_parts() == 1:
            return table_VD[tokens_BT]
        row_BT = tokens_BT - tensor_index() * len(table_VD)
        here_BT = (row_BT >= 0) & (row_BT < len(table_VD))
        x_BTD = jnp.where(here_BT[..., None], table_VD[jnp.where(here_BT, row_BT, 0)], 0.0)
        return sum_positions(x_BTD.astype(self.compute.dtype)).astype(jnp.float32)  # exact: gathered in this dtype

    def final_norm(self, x: jax.Array) -> jax.Array:
        return self.ln_f(x)


def scanned_blocks(config: GPTConfig, compute: Compute) -> nn.Module:
    """Returns the Blocks as one module, whose parameters have a leading dim L however it is unrolled."""
    block: Any = Block
    if gathers():
        how = {"dtype": compute.dtype, "reduce_dtype": compute.reduce_dtype, "two_stages": compute.two_stages}
        whole = lambda variables: {"params": gather_layer(variables["params"], **how)}  # noqa: E731
        block = nn.map_variables(block, "params", trans_in_fn=whole)
    if compute.remat != "none" or gathers():
        policy = REMAT_POLICIES[compute.remat]
        # A loop keeps the compiler from merging the recomputation away; without one it must be told.
        prevent_cse = compute.unroll >= config.n_layer
        block = nn.remat(block, policy=policy, prevent_cse=prevent_cse, static_argnums=(2,))
    scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=typing.cast(Any, nn.broadcast),
        length=config.n_layer,
        unroll=min(compute.unroll, config.n_layer),
    )
    return scanned(config, compute)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """One layer's keys and values so far, heads first as attention reads them, and where the next ones go."""

    k_BNSH: jax.Array
    v_BNSH: jax.Array
    positions_BT: jax.Array


def extend_cache(cache: Cache, k_BTNH: jax.Array, v_BTNH: jax.Array) -> tuple[Cache, jax.Array]:
    """Returns the cache with the new keys and values written at its positions, and the mask [B, 1, T, S] to attend by.

    Positions beyond the cache are dropped. A slot above a query's position may hold leftovers: the mask hides it.
    """
    B, _, N, _ = k_BTNH.shape
    # With a slice for the heads the compiler would transpose the whole cache at each token.
    at = (jnp.arange(B)[:, None, None], jnp.arange(N)[:, None], cache.positions_BT[:, None, :])
    k_BNSH, v_BNSH = (
        whole.at[at].set(jnp.swapaxes(new, 1, 2), mode="drop")
        for whole, new in ((cache.k_BNSH, k_BTNH), (cache.v_BNSH, v_BTNH))
    )
    slots_S = jnp.arange(k_BNSH.shape[2])
    mask = slots_S[None, None, None, :] <= cache.positions_BT[:, None, :, None]
    return Cache(k_BNSH, v_BNSH, cache.positions_BT), mask


def head(params: Any) -> jax.Array:
    """Returns the output head as head_DV: the token embedding transposed, or lm_head when untied."""
    if "lm_head" in params:
        return params["lm_head"]["kernel"]
    return params["wte"]["embedding"].T


def document_starts(tokens_BT: jax.Array, *, eot_id: int, eot_position: str) -> jax.Array:
    """Returns bool [B, T], True where a document starts: position 0, and after ('last') or at ('first') each eot."""
    eot_BT = tokens_BT == eot_id
    if eot_position == "last":
        eot_BT = jnp.roll(eot_BT, 1, axis=1)
    return eot_BT.at[:, 0].set(True)


def positions(shape: tuple[int, ...], starts_BT: jax.Array | None) -> jax.Array:
    """Returns int32 [B, T]: 0, 1, 2, ... from each document's start."""
    position_BT = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    if starts_BT is None:
        return position_BT
    return position_BT - jax.lax.cummax(jnp.where(starts_BT, position_BT, 0), axis=1)


def _normal() -> nn.initializers.Initializer:
    return nn.initializers.normal(INIT_STD)


def _residual_normal(config: GPTConfig) -> nn.initializers.Initializer:
    return nn.initializers.normal(INIT_STD / math.sqrt(2 * config.n_layer))


def _linear(config: GPTConfig, compute: Compute) -> dict[str, Any]:
    return {"use_bias": config.bias, "dtype": compute.dtype, "param_dtype": jnp.float32}


def _summed_linear(config: GPTConfig, compute: Compute) -> nn.Dense:
    """Returns the projection back to the residual stream; `tensor` cuts its kernel by rows."""
    init = _residual_normal(config)
    return nn.Dense(
        config.n_embd, kernel_init=init, dot_general=summed_product, **_linear(config, compute), name="c_proj"
    )


def _dropout(module: nn.Module, x: jax.Array, batch: int, rate: float) -> jax.Array:
    if not rate or not module.has_rng("dropout"):
        return x
    keep = keep_mask(module.make_rng("dropout"), rate, (batch, x.size // batch // x.shape[-1], x.shape[-1]))
    keep = keep.reshape(x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))


def padded_vocab_size(config: GPTConfig) -> int:
    """Returns the rows of the embedding table: the vocabulary rounded up so that matrix units and meshes divide it."""
    return -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def count_params(config: GPTConfig) -> int:
    """Returns the number of parameters, without vocabulary padding.

    >>> count_params(GPTConfig())
    124439808
    """
    D, L, b = config.n_embd, config.n_layer, int(config.bias)
    layer = 12 * D * D + b * 9 * D + 2 * (1 + b) * D  # c_attn, two c_proj, c_fc; their biases; two LayerNorms
    tables = config.vocab_size * D * (1 if config.tie_embeddings else 2) + config.block_size * D
    return L * layer + tables + (1 + b) * D


def train_flops_per_token(config: GPTConfig) -> int:
    """Returns the matrix FLOPs of forward and backward for one token, attention counted in full, remat not counted.

    Source: Chowdhery et al. 2022, "PaLM", appendix B: 6 N + 12 L D T, where N counts the matrices that multiply a
    token: 12 D^2 a layer, and the head over the padded vocabulary.
    """
    D, L, T = config.n_embd, config.n_layer, config.block_size
    matrices = 12 * D * D * L + D * padded_vocab_size(config)
    return 6 * matrices + 12 * L * D * T


def activation_bytes_per_sequence(config: GPTConfig, compute: Compute, loss_chunk: int, tensor: int = 1) -> float:
    """Returns about how many bytes one sequence keeps on a device for the backward pass.

    Per token and layer, in arrays of width D: the layer's input, both LayerNorms' outputs, q, k, v and attention's
    output, the residual stream between, and the two sides of GELU, 4 each: 17, all but the LayerNorms' outputs cut by
    `tensor`. Splash keeps q, k, v and its output padded; plain attention adds the scores of its blocks, in float32
    and in the compute dtype. Remat by dots keeps the products, 9 with the input; full remat the input, and one layer's
    17 at a time. The logits are counted twice, with their gradient. Counted by reading what XLA's GPU and TPU
    compilers laid out.
    """
    D, L, T = config.n_embd, config.n_layer, config.block_size
    size = jnp.dtype(compute.dtype).itemsize
    head_width = D // config.n_head
    padded = max(0, SPLASH_HEAD_WIDTH / head_width - 1) if compute.attention == "splash" else 0
    blocks = query_blocks(T, config.dropout)
    scores = T * config.n_head * (4 + size) * (blocks + 1) / (2 * blocks) if compute.attention == "xla" else 0
    whole = (2 + (15 + 4 * padded) / tensor) * D * size + scores / tensor
    kept = {"none": whole, "full": D * size / tensor}.get(compute.remat, 9 * D * size / tensor + scores / tensor)
    working = whole if compute.remat != "none" else 0
    logits = (loss_chunk or T) * padded_vocab_size(config) / tensor * 2 * size
    return T * (L * kept + working) + logits
