"""A fingerprint changes with any bit, dtype and shape, is the same in JAX and NumPy, and depends on no placement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import fingerprint as fingerprint_module
from gptjax.config import MeshConfig
from gptjax.fingerprint import fingerprint_array, fingerprints
from gptjax.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compiler")


def fingerprint(x):
    (value,) = fingerprints({"x": x}).values()
    return tuple(value)


@pytest.mark.parametrize("spec", [P("fsdp"), P(None, "fsdp"), P(("data", "fsdp"), "tensor"), P()])
def test_fingerprints_do_not_depend_on_the_placement(spec):
    x = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    placed = jax.device_put(x, NamedSharding(mesh, spec))
    assert fingerprint(placed) == fingerprint(jnp.asarray(x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "uint8"])
def test_any_bit_flip_changes_both_sums(dtype):
    x = np.asarray(jnp.arange(60).reshape(3, 4, 5).astype(dtype))
    before, rng = fingerprint(x), np.random.default_rng(0)
    for bit in rng.choice(8 * x.nbytes, 40, replace=False).tolist():
        raw = bytearray(x.tobytes())
        raw[bit // 8] ^= 1 << bit % 8
        after = fingerprint(np.frombuffer(bytes(raw), x.dtype).reshape(x.shape))
        assert after[0] != before[0], bit
        assert after[1] != before[1], bit


def test_swap_of_two_elements_changes_the_fingerprint():
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    before = fingerprint(x)
    for i, j in [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((3, 5), (0, 0)), ((1, 2), (2, 1))]:
        y = x.copy()
        y[i], y[j] = x[j], x[i]
        assert fingerprint(y) != before
    assert fingerprint(x[::-1]) != before
    assert fingerprint(x.T.copy()) != before


def test_dtype_and_shape_count_even_where_the_bits_are_equal():
    zeros = [jnp.zeros((4, 6), dtype) for dtype in ("float32", "int32", "uint32", "bfloat16")]
    zeros += [jnp.zeros((6, 4)), jnp.zeros((24,)), jnp.zeros((4, 6, 1))]
    assert len({fingerprint(x) for x in zeros}) == len(zeros)


def test_changes_that_cancel_in_a_sum_are_detected():
    x = np.zeros(8, np.float32)
    y = x.copy()
    y[2], y[3] = 1.0, -1.0
    assert fingerprint(y) != fingerprint(x)
    assert fingerprint(np.float32(0.0)) != fingerprint(np.float32(-0.0))


@pytest.mark.parametrize("shape", [(1,), (7, 3), (2**16,), (3, 2**16 + 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_numpy_finds_the_same_fingerprint(shape, dtype):
    x = np.random.default_rng(0).integers(0, 2**32, shape, np.uint32).view(dtype)
    (expected,) = fingerprints({"x": jnp.asarray(x)}).values()
    assert fingerprint_array(x) == expected
    assert fingerprint_array(np.asfortranarray(x)) == expected
    changed = x.copy()
    changed.reshape(-1).view(np.uint32)[-1] ^= 1
    assert fingerprint_array(changed) != expected


def test_fingerprints_are_compiled_once():
    tree = {"a": jnp.ones(7), "b": jnp.ones((3, 11))}
    compiled = fingerprint_module._fingerprint_all._cache_size
    before = compiled()
    fingerprints(tree)
    assert compiled() == before + 1
    fingerprints({"a": jnp.zeros(7), "b": jnp.zeros((3, 11))})
    assert compiled() == before + 1
