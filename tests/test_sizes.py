"""The counts by hand against the tree, XLA and what compilers lay out."""

import functools

import jax
import jax.numpy as jnp
import pytest

from gptjax.compute import ResolvedCompute
from gptjax.config import GPTConfig
from gptjax.params import count_params
from gptjax.sizes import activation_bytes_per_sequence, train_flops_per_token
from tests.helpers import abstract_params, jit, tiny
from tests.test_model import mean_loss


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count_follows_the_tree(tied, bias):
    config = tiny(tie_embeddings=tied, bias=bias)
    in_tree = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
    tables = 1 if tied else 2
    assert count_params(config) == in_tree - tables * (128 - 40) * 16


def test_flops_agree_with_xla():
    config = GPTConfig(block_size=64, vocab_size=500, n_layer=2, n_head=4, n_embd=256)
    tokens_BT = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    compute = ResolvedCompute(scan_unroll=2)
    step = jit(lambda params, tokens: jax.grad(mean_loss(config, compute))(params, tokens, tokens, None))
    counted = step.lower(abstract_params(config), tokens_BT).compile().cost_analysis()["flops"]
    assert train_flops_per_token(config) * 4 * 64 == pytest.approx(counted, rel=0.1)


def test_activation_bytes_follow_the_options():
    config = GPTConfig()
    size = functools.partial(activation_bytes_per_sequence, config)
    plain, token = size(ResolvedCompute(), 0), 768 * 4
    assert size(ResolvedCompute(remat="full"), 0) < size(ResolvedCompute(remat="dots"), 0) < plain
    assert size(ResolvedCompute(remat="dots_no_batch"), 0) == size(ResolvedCompute(remat="dots"), 0)
    assert plain - size(ResolvedCompute(), 128) == (1024 - 128) * 50304 * 8
    fused = size(ResolvedCompute(attention="cudnn"), 0)
    assert plain - fused == 12 * 1024 * 1024 * 12 * 8 * 5 / 8, "the scores of four blocks of queries"
    assert size(ResolvedCompute(attention="splash"), 0) - fused == 12 * 1024 * 4 * token, "heads of 64 padded to 128"
    assert fused == 12 * 1024 * 17 * token + 1024 * 50304 * 8
    cut = fused - size(ResolvedCompute(attention="cudnn"), 0, tensor=4)
    assert cut == (12 * 1024 * 15 * token + 1024 * 50304 * 8) * 3 / 4


@pytest.mark.parametrize(
    ("compute", "compiled"),
    [  # MB a sequence, as laid out for one H200 (the last: v5e) by the compilers of jax 0.10.2: slope between 8 and 16
        (ResolvedCompute(attention="cudnn", dtype=jnp.bfloat16), 453),
        (ResolvedCompute(attention="cudnn", dtype=jnp.bfloat16, remat="dots"), 366),
        (ResolvedCompute(attention="xla", dtype=jnp.bfloat16), 1085),
        (ResolvedCompute(attention="xla", dtype=jnp.float32), 1751),
        (ResolvedCompute(attention="splash", dtype=jnp.bfloat16), 501),
    ],
)
def test_activation_bytes_are_near_what_the_compilers_lay_out(compute, compiled):
    assert 0.95 * compiled < activation_bytes_per_sequence(GPTConfig(), compute, 0) / 1e6 < 1.25 * compiled
