import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import params
from gptjax.config import GPTConfig
from gptjax.convert import names
from gptjax.model import GPT
from gptjax.params import count_params
from gptjax.sharding import path_name

TINY = GPTConfig(block_size=12, vocab_size=131, n_layer=3, n_head=2, n_embd=4)  # 12 positions are 3 n_embd, too
KINDS = {
    "tied": TINY,
    "untied": GPTConfig(**vars(TINY) | {"tie_embeddings": False}),
    "no biases": GPTConfig(**vars(TINY) | {"bias": False}),
}
every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


@every_kind
def test_every_parameter_has_its_row_and_shape(config):
    tree = jax.eval_shape(GPT(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    expected = {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}
    assert {row.path: params.leaf_shape(row, config) for row in params.rows(config)} == expected


@every_kind
def test_named_tensors_add_up_to_the_parameter_count(config):
    assert sum(int(np.prod(shape)) for shape in names.shapes(config).values()) == count_params(config)
    biases = 3 * 6 + 1
    assert len(names.shapes(config)) == 4 + 3 * 12 + (not config.tie_embeddings) - biases * (not config.bias)


@every_kind
def test_tensor_round_trip_through_a_leaf_is_exact(config):
    random = np.random.default_rng(0)
    for row in params.rows(config):
        leaf = np.full(params.leaf_shape(row, config), 7.0, np.float32)
        for layer, name in names.layers(row, config):
            tensor = random.standard_normal(names.shapes(config)[name], dtype=np.float32)
            names.into_leaf(row, leaf, tensor, layer=layer)
            assert np.array_equal(names.from_leaf(row, leaf, config, layer=layer), tensor), name
        untouched = leaf == 7.0
        padding = {"wte/embedding": np.s_[131:], "lm_head/kernel": np.s_[:, 131:]}.get(row.path)
        assert untouched.sum() == (0 if padding is None else (256 - 131) * 4)
        assert padding is None or untouched[padding].all()


def test_q_k_and_v_are_the_thirds_of_c_attn():
    row = next(row for row in params.PARAMS if row.path == "h/attn/c_attn/kernel")
    leaf = np.zeros(params.leaf_shape(row, TINY), np.float32)
    names.into_leaf(row, leaf, np.arange(48, dtype=np.float32).reshape(4, 12), layer=1)
    assert leaf[1, 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert not leaf[0].any()
    assert not leaf[2].any()
