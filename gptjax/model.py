"""GPT-2 in Flax linen, with the architecture of the released model.

The letters of shapes in all modules: B batch, T query position, S key position, D model width, N heads, H head width,
F MLP width, V vocabulary, L layers, A micro-batches of an update, C prompt chunk, M is B and T flattened. They name
logical dimensions, never shards: `x_BTD` is [B, T, D].
"""

import math
import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.attention import causal_attention, masked_attention
from gptjax.collectives import (
    ONE_DEVICE,
    Parallel,
    all_gather_layer,
    all_gather_sequence,
    local_sequence,
    reduce_scatter_sequence,
    tensor_parallel_index,
)
from gptjax.compute import ResolvedCompute
from gptjax.config import GPTConfig
from gptjax.dropout import DROP_ATTENTION, DROP_ATTENTION_WEIGHTS, DROP_EMBEDDING, DROP_MLP, dropout, fold_key
from gptjax.examples import position_ids
from gptjax.kernels.pointwise import add_bias, gelu, layer_norm
from gptjax.kv_cache import Cache, extend_cache
from gptjax.loss import masked_logits
from gptjax.params import PyTree, padded_vocab_size
from gptjax.remat import REMAT_POLICIES, recomputed

__all__ = ["GPT", "MLP", "Block", "CausalSelfAttention", "GPTConfig"]

LAYER_NORM_EPSILON = 1e-5
INIT_STD = 0.02


class Linear(nn.Module):
    """Returns (x @ kernel, bias): the next operation adds the bias, after a reduce-scatter or fused with GELU.

    x is [B, T, D], kernel float32 [D, *features], bias float32 [*features] or None. The product is [B, T, *features]
    in `compute.dtype`.
    """

    features: tuple[int, ...]
    init_std: float
    use_bias: bool
    compute: ResolvedCompute

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        width = x_BTD.shape[-1]
        dtype = self.compute.dtype
        normal = nn.initializers.normal(self.init_std)
        shape = (width, *self.features)
        kernel = self.param("kernel", normal, shape, jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features, jnp.float32)
        # Parameters stay float32 for the optimizer, and each use casts them. Under FSDP this cast changes nothing,
        # because all_gather_layer casts before it sends.
        x = x_BTD.astype(dtype)
        if self.compute.flatten_tokens:
            x = x.reshape(-1, width)  # one matmul of B*T rows; see ResolvedCompute.flatten_tokens
        # The kernel's first dim is contracted. jnp.dot would contract the second to last, which is wrong for c_attn's
        # [D, 3, D].
        contracting = ((x.ndim - 1,), (0,))
        no_batch = ((), ())
        y = jax.lax.dot_general(x, kernel.astype(dtype), (contracting, no_batch))
        return y.reshape(*x_BTD.shape[:-1], *self.features), bias


class CausalSelfAttention(nn.Module):
    """Causal multi-head self-attention.

    Under tensor parallelism `x_BTD` is this device's shard of the sequence, and the parameters are those of its heads.
    """

    config: GPTConfig
    compute: ResolvedCompute
    parallel: Parallel

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        segments_BT: jax.Array | None,
        *,
        cache: Cache | None,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, Cache | None]:
        """Returns (y [B, T, D] in the compute dtype, the extended cache or None).

        segments_BT: int32 segment ids, one per document; None means one document per row.
        """
        c = self.config
        parallel = self.parallel
        # Sequence parallelism: before c_attn and after c_proj a device has 1 / tensor of the positions. In between it
        # has all positions and 1 / tensor of the heads. The reduce-scatter at the end also sums over the heads.
        x_BTD = all_gather_sequence(x_BTD, parallel)
        B, T, _ = x_BTD.shape  # T: all positions, also under tensor parallelism
        local_width = c.n_embd // parallel.tensor
        local_heads = c.n_head // parallel.tensor
        qkv = Linear(
            features=(3, local_width),
            init_std=INIT_STD,
            use_bias=c.bias,
            compute=self.compute,
            name="c_attn",
        )
        qkv_BT3D = add_bias(*qkv(x_BTD))
        # The kernel is [D, 3, D], so that `tensor` shards q, k and v alike, by heads. Shards of a [D, 3 D] kernel,
        # GPT-2's own layout, would hold q of some heads and k or v of others.
        heads = (B, T, local_heads, c.n_embd // c.n_head)

        # Views of the product, which XLA fuses into what reads them.
        def split_heads(qkv_BT3D: jax.Array) -> list[jax.Array]:
            return [qkv_BT3D[..., n, :].reshape(heads) for n in range(3)]

        if cache is None:
            # Training and evaluation. Only this branch can use fused kernels, because a cache needs a mask of its own.
            # Without the mark a loop over layers stores q, k and v next to their product, with heads of 64 in tiles of
            # 128 lanes, and copies them out of its stack.
            split = recomputed(split_heads) if self.compute.attention == "splash" else split_heads
            q_BTNH, k_BTNH, v_BTNH = split(qkv_BT3D)
            y_BTNH = causal_attention(
                q_BTNH,
                k_BTNH,
                v_BTNH,
                backend=self.compute.attention,
                splash_block=self.compute.splash_block,
                segments_BT=segments_BT,
                dropout=c.dropout,
                dropout_key=fold_key(dropout_key, DROP_ATTENTION_WEIGHTS),
                parallel=parallel,
            )
        else:
            q_BTNH, k_BTNH, v_BTNH = split_heads(qkv_BT3D)
            cache, mask = extend_cache(cache, k_BTNH, v_BTNH)
            y_BTNH = masked_attention(q_BTNH, cache.k_BNSH, cache.v_BNSH, mask=mask)
        projection = Linear(
            features=(c.n_embd,),
            init_std=residual_std(c),
            use_bias=c.bias,
            compute=self.compute,
            name="c_proj",
        )
        y_BTD, bias_D = projection(y_BTNH.reshape(B, T, -1))
        y_BTD = reduce_scatter_sequence(y_BTD, parallel)
        # Row-parallel: the bias is added after the sum, or it would count `tensor` times.
        y_BTD = add_bias(y_BTD, bias_D)
        key = fold_key(dropout_key, DROP_ATTENTION)
        return dropout(y_BTD, c.dropout, key, parallel=parallel), cache


class LayerNorm(nn.Module):
    """Layer normalisation along the last dimension. The result has the dtype of x; parameters are float32 [D]."""

    use_bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1:]
        # Parameters are float32 under mixed precision too: layer_norm computes in float32 for any dtype of x.
        scale_D = self.param("scale", nn.initializers.ones, width, jnp.float32)
        bias_D = None
        if self.use_bias:
            bias_D = self.param("bias", nn.initializers.zeros, width, jnp.float32)
        return layer_norm(x, scale_D, bias_D, epsilon=LAYER_NORM_EPSILON)


class MLP(nn.Module):
    """Two linear layers with GELU between them. `x_BTD` is this device's shard of the sequence under `tensor`."""

    config: GPTConfig
    compute: ResolvedCompute
    parallel: Parallel

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        """Returns y [B, T, D] in the compute dtype."""
        c = self.config
        parallel = self.parallel
        x_BTD = all_gather_sequence(x_BTD, parallel)
        width = 4 * c.n_embd // parallel.tensor  # column-parallel
        expansion = Linear(
            features=(width,),
            init_std=INIT_STD,
            use_bias=c.bias,
            compute=self.compute,
            name="c_fc",
        )
        # gelu adds the bias itself, so that the matmul's output is the only array of this size that backward needs.
        y_BTF, bias_F = expansion(x_BTD)
        y_BTF = gelu(y_BTF, bias_F, approximate=c.activation == "gelu_new")
        projection = Linear(
            features=(c.n_embd,),
            init_std=residual_std(c),
            use_bias=c.bias,
            compute=self.compute,
            name="c_proj",
        )
        y_BTD, bias_D = projection(y_BTF)
        y_BTD = reduce_scatter_sequence(y_BTD, parallel)
        y_BTD = add_bias(y_BTD, bias_D)
        key = fold_key(dropout_key, DROP_MLP)
        return dropout(y_BTD, c.dropout, key, parallel=parallel)


class Block(nn.Module):
    """One transformer layer. With a cache, it also returns the cache with the new keys and values (decode.py)."""

    config: GPTConfig
    compute: ResolvedCompute
    parallel: Parallel = ONE_DEVICE

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        segments_BT: jax.Array | None = None,
        *,
        cache: Cache | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Returns (x [B, T, D] after this layer, the extended cache or None); arguments as CausalSelfAttention's."""
        parts = (self.config, self.compute, self.parallel)
        # Pre-norm, GPT-2's order: the residual stream itself is never normalised before the last LayerNorm.
        # Both branches take the same key: CausalSelfAttention and MLP fold constants of their own into it.
        with jax.named_scope("attention"):
            normed_BTD = LayerNorm(self.config.bias, name="ln_1")(x_BTD)
            attention = CausalSelfAttention(*parts, name="attn")
            y_BTD, cache = attention(normed_BTD, segments_BT, cache=cache, dropout_key=dropout_key)
            x_BTD = x_BTD + y_BTD
        with jax.named_scope("mlp"):
            normed_BTD = LayerNorm(self.config.bias, name="ln_2")(x_BTD)
            y_BTD = MLP(*parts, name="mlp")(normed_BTD, dropout_key)
            x_BTD = x_BTD + y_BTD
        return x_BTD, cache


class GPT(nn.Module):
    """GPT-2. Dropout is on if a `dropout_key` is given.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3, and the released
    code's defaults: LayerNorm first, epsilon 1e-5, tanh GELU, learned positions, residual projections scaled at init.
    """

    config: GPTConfig
    compute: ResolvedCompute = ResolvedCompute()
    parallel: Parallel = ONE_DEVICE

    def setup(self) -> None:
        """Creates the submodules: both embeddings, all layers, the last LayerNorm, and an untied head."""
        c = self.config
        normal = nn.initializers.normal(INIT_STD)
        # Flax checks each parameter's shape against its declaration, so under shard_map this must be the shard's shape.
        rows = padded_vocab_size(c) // self.parallel.tensor
        # The tables are float32 and never cast here: `embed` sums in float32, and the loss casts the head.
        options = {"embedding_init": normal, "param_dtype": jnp.float32}
        self.wte = nn.Embed(rows, c.n_embd, **options)
        self.wpe = nn.Embed(c.block_size, c.n_embd, **options)
        self.h = stacked_blocks(c)
        self.ln_f = LayerNorm(c.bias)
        if not c.tie_embeddings:
            self.lm_head = nn.Dense(
                padded_vocab_size(c),
                use_bias=False,
                kernel_init=normal,
                dtype=jnp.float32,
            )

    def __call__(
        self,
        tokens_BT: jax.Array,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns float32 logits [B, T, V] of the true vocabulary for int32 tokens [B, T], one document per row.

        It initialises the parameters and serves as a reference. Training uses `hidden` and gptjax.loss.
        """
        x_BTD = self.hidden(tokens_BT, dropout_key=dropout_key)
        # Flax creates the parameters of modules that are called during init. `head` below only reads the variables.
        if self.is_initializing() and not self.config.tie_embeddings:
            self.lm_head(x_BTD.astype(jnp.float32))
        head_DV = unembedding(self.variables["params"])
        # masked_logits sets the padded columns to the lowest float; the slice drops them.
        vocab_size = self.config.vocab_size
        return masked_logits(x_BTD, head_DV, vocab_size)[..., :vocab_size]

    def hidden(
        self,
        tokens_BT: jax.Array,
        starts_BT: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns x [B, T, D] after the last LayerNorm, the loss's input; under tensor parallelism its local sequence.

        tokens_BT: int32, all positions also under tensor parallelism.
        starts_BT: bool, True where a document starts: attention and positions restart there. None means one document
            per row.
        """
        segments_BT = None
        if starts_BT is not None:
            segments_BT = jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32)
        positions_BT = position_ids(tokens_BT.shape, starts_BT)
        x_BTD = self.embed(tokens_BT, positions_BT)
        key = fold_key(dropout_key, DROP_EMBEDDING)
        x_BTD = dropout(x_BTD, self.config.dropout, key, parallel=self.parallel)
        if self.is_initializing():
            # Creates the parameters of the layers, which do not depend on the input; the result is unused.
            self.h(jnp.zeros((1, 1, self.config.n_embd)))
        x_BTD = self.layers(x_BTD, segments_BT, dropout_key)
        # LayerNorm works on the local sequence. Under tensor parallelism the loss all-gathers its result.
        return self.ln_f(x_BTD)

    def layers(
        self,
        x_BTD: jax.Array,
        segments_BT: jax.Array | None,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        """Returns x [B, T, D] after all layers: a scan over their stacked parameters, whose first dimension is L."""
        c = self.config
        compute = self.compute
        parallel = self.parallel
        # parent=None: the module is used as a function, and the scan passes its parameters.
        block = Block(c, compute, parallel, parent=None)
        key_L = None
        if dropout_key is not None:
            # One key per layer, scanned with its parameters. The embedding folds a constant into the unsplit key.
            key_L = jax.random.split(dropout_key, c.n_layer)

        def layer(
            x_BTD: jax.Array,
            scanned: tuple[PyTree, jax.Array | None],
        ) -> tuple[jax.Array, None]:
            params, key = scanned
            params = all_gather_layer(params, parallel)  # FSDP; its transpose reduce-scatters the gradients
            variables = {"params": params}
            result = block.apply(variables, x_BTD, segments_BT, dropout_key=key)
            x_BTD, _ = typing.cast(Any, result)
            return x_BTD, None

        # FSDP and a loop with splash attention need jax.checkpoint even without remat: its policy "none" drops the
        # all-gathered weights, and q, k and v. Unrolled layers have no stack of residuals.
        is_loop = compute.scan_unroll < c.n_layer
        drops_qkv = is_loop and compute.attention == "splash"
        if compute.remat != "none" or parallel.fsdp > 1 or drops_qkv:
            # prevent_cse puts optimization barriers around the recomputation, which XLA could otherwise merge with the
            # forward pass. A while loop separates the two already; barriers would only get in the way of fusion.
            prevent_cse = not is_loop
            policy = REMAT_POLICIES[compute.remat]
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=prevent_cse)
        # The raw arrays, not self.h: calling the module would put the layers under Flax's own scan.
        params = self.variables["params"]["h"]
        unroll = min(compute.scan_unroll, c.n_layer)
        scanned_L = (params, key_L)
        x_BTD, _ = jax.lax.scan(layer, x_BTD, scanned_L, unroll=unroll)
        return x_BTD

    def embed(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
    ) -> jax.Array:
        """Returns token plus position embedding [B, T, D] in the compute dtype, for int32 tokens and positions.

        Under tensor parallelism the arguments have all positions, and the result is the local sequence.
        """
        positions_BT = local_sequence(positions_BT, self.parallel)
        # The lookup and the sum are in float32. A gather's transpose is a scatter-add, which then sums the gradients of
        # a frequent token's many occurrences in float32, too.
        x_BTD = self.look_up(tokens_BT) + self.wpe.embedding[positions_BT]
        return x_BTD.astype(self.compute.dtype)

    def look_up(self, tokens_BT: jax.Array) -> jax.Array:
        """Returns float32 token embeddings [B, T, D]; under tensor parallelism those of the local sequence."""
        table_VD = self.wte.embedding
        parallel = self.parallel
        if parallel.tensor == 1:
            return table_VD[tokens_BT]
        # `tensor` shards the vocabulary: each row comes from the one device that owns it, and the others add zeros.
        # A token of another shard looks up row 0, so that no index is out of range or negative (counted from the end).
        row_BT = tokens_BT - tensor_parallel_index(parallel) * len(table_VD)
        is_local_BT = (row_BT >= 0) & (row_BT < len(table_VD))
        is_local_BT1 = is_local_BT[..., None]
        row_BT = jnp.where(is_local_BT, row_BT, 0)
        found_BTD = table_VD[row_BT]
        x_BTD = jnp.where(is_local_BT1, found_BTD, 0.0)
        # Exact in the compute dtype: the table was all-gathered in it, and all but one of the summands are 0.
        x_BTD = x_BTD.astype(self.compute.dtype)
        x_BTD = reduce_scatter_sequence(x_BTD, parallel)
        return x_BTD.astype(jnp.float32)

    def final_norm(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the last LayerNorm of x [B, T, D], in its dtype."""
        return self.ln_f(x_BTD)


def stacked_blocks(config: GPTConfig) -> nn.Module:
    """Returns the layers as one module that creates their parameters, stacked along L. GPT.layers applies them."""
    # nn.scan is used for init only: split_rngs gives each layer's parameters a key of their own. The forward pass is a
    # jax.lax.scan in GPT.layers, where the all-gather of FSDP is a line of the loop.
    # Its ResolvedCompute is the default, plain XLA: initial values do not depend on it.
    scanned = nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=typing.cast(Any, nn.broadcast),
        length=config.n_layer,
    )
    return scanned(config, ResolvedCompute())


def unembedding(params: PyTree) -> jax.Array:
    """Returns the output head, float32 [D, V]: the token embedding transposed, or lm_head when untied."""
    # The transpose is no copy: XLA folds it into the matmul.
    if "lm_head" in params:
        return params["lm_head"]["kernel"]
    return params["wte"]["embedding"].T


def residual_std(config: GPTConfig) -> float:
    """Returns the standard deviation at initialisation of a projection back to the residual stream."""
    # GPT-2 divides by the square root of the number of residual branches: two per layer.
    return INIT_STD / math.sqrt(2 * config.n_layer)
