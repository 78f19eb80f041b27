import dataclasses

import numpy as np
import pytest

from gptjax.config import GPTConfig
from gptjax.convert import names
from gptjax.convert.weights import (
    DTYPES,
    Checksum,
    Tensor,
    make_history,
    make_weights,
    read_leaves,
    read_tensors,
    with_biases,
)
from gptjax.errors import DataError
from tests.helpers import raises

CONFIG = GPTConfig(block_size=6, vocab_size=10, n_layer=2, n_head=2, n_embd=4)


def make(config=CONFIG, *, dtype="float32", **changes):
    """Returns the Weights of a model in memory; `changes` replace tensors by name, with _ for the dots."""
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal(shape).astype(DTYPES[dtype]) for name, shape in names.shapes(config).items()}
    for name, value in changes.items():
        (real,) = [n for n in arrays if n.replace(".", "_") == name]
        arrays[real] = value
    tensors = {n: Tensor(a.shape, a.dtype, lambda a=a: a, n) for n, a in arrays.items() if a is not None}
    return make_weights("memory", config, tensors)


def test_make_history_keeps_only_valid_fields():
    told = {"step": 3, "loss": 2.5, "data": "x", "config": {"a": 1}}
    assert make_history(told | {"more": 1}) == told
    wrong = {"step": 2.5, "tokens": 2**63, "loss": float("nan"), "val_loss": float("-inf"), "data": ["x"], "config": 3}
    assert make_history(wrong) == make_history({"step": True, "loss": 10**400}) == make_history([1]) == {}


def test_tensors_are_read_in_the_order_of_the_map():
    weights = make()
    backwards = dataclasses.replace(weights, tensors=dict(reversed(weights.tensors.items())))
    assert [name for name, _ in read_tensors(backwards)] == list(names.shapes(CONFIG))


def test_leaves_are_float32_and_padded_with_zeros():
    weights = make(dtype="bfloat16")
    leaves = dict(read_leaves(weights, read_tensors(weights)))
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype("float32")}
    assert leaves["wte/embedding"].shape == (128, 4)
    assert not leaves["wte/embedding"][10:].any()
    assert np.array_equal(leaves["h/mlp/c_fc/kernel"][1], weights.tensors["h.1.mlp.c_fc.weight"].read())


def test_tensor_out_of_order_raises_an_assertion_error():
    weights = make()
    swapped = sorted(read_tensors(weights), reverse=True)
    with pytest.raises(AssertionError, match=r"ln_f\.weight came where h\.0\.ln_1\.weight belongs"):
        list(read_leaves(weights, swapped))


def checksum(weights):
    found = Checksum()
    for _ in read_tensors(weights, checksum=found):
        pass
    return found.hexdigest()


def test_checksum_depends_on_values_but_not_on_layout():
    weights = make()
    column_major = {
        name: dataclasses.replace(t, read=lambda t=t: np.asfortranarray(t.read()))
        for name, t in weights.tensors.items()
    }
    assert checksum(dataclasses.replace(weights, tensors=column_major)) == checksum(weights)
    bent = weights.tensors["ln_f.bias"].read().copy()
    bent[3] = np.nextafter(bent[3], 9, dtype=np.float32)
    assert checksum(make(ln_f_bias=bent)) != checksum(weights)


def test_checksum_of_bfloat16_equals_that_in_float32():
    half = make(dtype="bfloat16")
    full = {n: dataclasses.replace(t, read=lambda t=t: t.read().astype(np.float32)) for n, t in half.tensors.items()}
    assert checksum(dataclasses.replace(half, tensors=full)) == checksum(half)


def test_weights_dtype_is_float32_if_tensor_dtypes_differ():
    assert make(dtype="float16").dtype == "float16"
    assert make(dtype="float16", ln_f_bias=np.zeros(4, np.float32)).dtype == "float32"
    assert make(dtype="float16", ln_f_bias=np.zeros(4, DTYPES["bfloat16"])).dtype == "float32"


def test_checksum_depends_on_names_shapes_and_values():
    def digest(name, tensor):
        checksum = Checksum()
        checksum.update(name, np.asarray(tensor, np.float32))
        return checksum.hexdigest()

    assert digest("a", [1, 2]) == digest("a", [1, 2])
    assert len({digest("a", [1, 2]), digest("b", [1, 2]), digest("a", [[1, 2]]), digest("a", [2, 1])}) == 4


def test_with_biases_adds_only_zero_biases():
    bare = make(GPTConfig(**vars(CONFIG) | {"bias": False}))
    full = with_biases(bare)
    assert full.config == CONFIG
    arrays = dict(read_tensors(full))
    assert set(arrays) == set(names.shapes(CONFIG))
    assert not any(a.any() for n, a in arrays.items() if n.endswith("bias"))
    assert all(np.array_equal(arrays[name], tensor) for name, tensor in read_tensors(bare))
    assert "zeros are written" in full.notes[-1]
    assert with_biases(full) is full


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"ln_f_bias": None}, r"ln_f\.bias is missing$"),
        ({"ln_f_bias": None, "ln_f_weight": None}, r"ln_f\.weight is missing \(and 1 more\)$"),
        ({"h_0_attn_c_attn_weight": np.zeros((12, 4), "f4")}, r"h\.0\.attn\.c_attn\..* 12x4, .* 4x12: .* transposed"),
        ({"wte_weight": np.zeros((11, 4), "f4")}, "10x4: vocab_size"),
        ({"wpe_weight": np.zeros((6, 4))}, r"wpe\.weight is float64"),
    ],
)
def test_each_tensor_mismatch_is_reported_in_one_line(changes, problem):
    with raises(DataError, "memory", match=problem) as caught:
        make(**changes)
    assert "\n" not in str(caught.value)
