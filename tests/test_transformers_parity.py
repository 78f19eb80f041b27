"""The same function as Hugging Face's GPT-2: its logits and its gradients, at random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import GPTConfig
from gptjax.loss import cross_entropy
from gptjax.model import GPT, unembedding
from gptjax.params import VOCAB_MULTIPLE

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

CONFIG = GPTConfig(block_size=24, vocab_size=131, n_layer=3, n_head=4, n_embd=32)
PADDED = 2 * VOCAB_MULTIPLE


@functools.cache
def theirs():
    """Returns their model, in float32, with every weight random and large enough to matter."""
    config = transformers.GPT2Config(
        n_positions=CONFIG.block_size, vocab_size=CONFIG.vocab_size, n_layer=CONFIG.n_layer, n_head=CONFIG.n_head,
        n_embd=CONFIG.n_embd, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, attn_implementation="eager",
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            weight.copy_(centre + 0.2 * torch.randn(weight.shape, generator=generator))
    return model


def to_ours(named):
    """Returns our tree of their {name: array}; their Conv1D is [in, out], as our kernels are."""
    D = CONFIG.n_embd
    stack = lambda name: np.stack([named[f"transformer.h.{i}.{name}"] for i in range(CONFIG.n_layer)])  # noqa: E731
    linear = lambda name: {"kernel": stack(f"{name}.weight"), "bias": stack(f"{name}.bias")}  # noqa: E731
    norm = lambda name: {"scale": stack(f"{name}.weight"), "bias": stack(f"{name}.bias")}  # noqa: E731
    c_attn = linear("attn.c_attn")
    rows = PADDED - CONFIG.vocab_size
    return {
        "wte": {"embedding": np.pad(named["transformer.wte.weight"], ((0, rows), (0, 0)))},
        "wpe": {"embedding": named["transformer.wpe.weight"]},
        "h": {
            "ln_1": norm("ln_1"),
            "attn": {
                "c_attn": {
                    "kernel": c_attn["kernel"].reshape(-1, D, 3, D),
                    "bias": c_attn["bias"].reshape(-1, 3, D),
                },
                "c_proj": linear("attn.c_proj"),
            },
            "ln_2": norm("ln_2"),
            "mlp": {"c_fc": linear("mlp.c_fc"), "c_proj": linear("mlp.c_proj")},
        },
        "ln_f": {"scale": named["transformer.ln_f.weight"], "bias": named["transformer.ln_f.bias"]},
    }


def params():
    return to_ours({name: weight.detach().numpy() for name, weight in theirs().named_parameters()})


def tokens_BT():
    return np.random.default_rng(0).integers(CONFIG.vocab_size, size=(3, CONFIG.block_size))


def test_converted_transformers_tree_matches_the_model():
    expected = jax.eval_shape(GPT(CONFIG).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)  # noqa: E731
    assert shapes(params()) == shapes(expected)
    assert theirs().lm_head.weight is theirs().transformer.wte.weight


def test_logits_equal_transformers():
    with torch.no_grad():
        expected_BTV = theirs()(torch.from_numpy(tokens_BT())).logits.numpy()
    logits_BTV = jax.jit(GPT(CONFIG).apply)({"params": params()}, jnp.asarray(tokens_BT(), jnp.int32))
    assert logits_BTV.shape == expected_BTV.shape
    assert np.std(expected_BTV) > 0.5
    assert np.abs(logits_BTV - expected_BTV).max() <= 1e-5 * np.abs(expected_BTV).max()


def test_gradients_equal_transformers():
    tokens = torch.from_numpy(tokens_BT())
    theirs().zero_grad()
    theirs()(tokens, labels=tokens).loss.backward()  # they shift the labels by one
    expected = to_ours({name: weight.grad.numpy() for name, weight in theirs().named_parameters()})

    def loss(params, tokens_BT):
        x_BTD = GPT(CONFIG).apply({"params": params}, tokens_BT[:, :-1], method="hidden")
        sums = cross_entropy(x_BTD, unembedding(params), tokens_BT[:, 1:], vocab_size=CONFIG.vocab_size, chunk=0)
        return sums.loss / sums.tokens

    grads = jax.jit(jax.grad(loss))(params(), jnp.asarray(tokens_BT(), jnp.int32))
    error = jax.tree.map(lambda g, e: float(np.linalg.norm(g - e) / np.linalg.norm(e)), grads, expected)
    assert {jax.tree_util.keystr(p): e for p, e in jax.tree.leaves_with_path(error) if not e <= 1e-4} == {}
