"""What `auto` becomes on which device."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.collectives import Parallel
from gptjax.compute import ResolvedCompute, choose_unroll, resolve_compute, resolve_parallel
from gptjax.config import Config, MeshConfig, from_dict
from gptjax.errors import ConfigError
from gptjax.sharding import make_mesh
from tests.helpers import TINY, raises


def test_compute_is_resolved_from_the_devices_of_the_mesh():
    config = from_dict({"model": TINY, "compute": {"scan_unroll": 0, "remat": "dots"}})
    assert Config().compute.dtype == "auto"
    assert Config().compute.scan_unroll == -1
    cpu = resolve_compute(config, make_mesh(MeshConfig()))
    float32 = jnp.dtype(jnp.float32)
    assert cpu == ResolvedCompute("xla", "xla", "dots", 2, float32, flatten_tokens=True, separate_state=True)
    muon = from_dict({"model": TINY, "optim": {"name": "muon"}})
    assert not resolve_compute(muon, make_mesh(MeshConfig())).separate_state
    assert not resolve_compute(config, make_mesh(MeshConfig(tensor=2))).flatten_tokens


@pytest.mark.parametrize(("kind", "block"), [("TPU v6 lite", 1024), ("TPU v5 lite", 512), ("TPU v9", 512)])
def test_block_of_splash_attention_is_that_of_the_chip(kind, block):
    device = types.SimpleNamespace(platform="tpu", device_kind=kind)
    mesh = types.SimpleNamespace(devices=np.array([device]), shape={"data": 1, "fsdp": 1, "tensor": 1}, size=1)
    resolved = resolve_compute(Config(), mesh)
    assert (resolved.splash_block, resolved.separate_state) == (block, False)


def test_parallel_is_resolved_from_the_mesh():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    bfloat16 = from_dict({"model": TINY, "compute": {"dtype": "bfloat16"}})
    both = resolve_parallel(bfloat16, mesh)
    assert (both.dtype, both.reduce_dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert resolve_compute(bfloat16, mesh).dtype == jnp.bfloat16
    assert (both.fsdp, both.tensor, both.two_stage_collectives) == (2, 2, False)
    exact = from_dict({"model": TINY, "compute": {"dtype": "bfloat16", "reduce_dtype": "float32"}})
    assert resolve_parallel(exact, mesh).reduce_dtype == jnp.float32
    assert both.table_reduce_dtype == jnp.float32
    assert both.axes() == ("data", "fsdp", "tensor")
    assert Parallel(make_mesh(MeshConfig(data=4, tensor=2))).axes(("data", "fsdp")) == ("data",)
    assert (Parallel().axes(), Parallel().fsdp, Parallel().tensor) == ((), 1, 1)


@pytest.mark.parametrize(
    ("name", "reduce_name", "dtype"),
    [("auto", "auto", "bfloat16"), ("auto", "float32", "float32"), ("bfloat16", "float32", "bfloat16")],
)
def test_tables_are_reduced_in_a_dtype_of_their_own(name, reduce_name, dtype):
    compute = {"dtype": "bfloat16", "reduce_dtype": reduce_name, "table_reduce_dtype": name}
    parallel = resolve_parallel(from_dict({"model": TINY, "compute": compute}), make_mesh(MeshConfig(data=8)))
    assert parallel.table_reduce_dtype == jnp.dtype(dtype)
    assert parallel.reduce_dtype == jnp.dtype("bfloat16" if reduce_name == "auto" else reduce_name)


@pytest.mark.parametrize(
    ("scan_unroll", "platform", "layers"),
    [(-1, "gpu", 12), (-1, "cuda", 12), (-1, "tpu", 1), (-1, "cpu", 1), (0, "tpu", 12), (1, "cuda", 1), (3, "cuda", 3)],
)
def test_gpu_unrolls_all_layers_by_default(scan_unroll, platform, layers):
    assert choose_unroll(scan_unroll, 12, platform) == layers


@pytest.mark.parametrize(
    ("n_layer", "platform", "devices", "layers"),
    [(8, "cpu", 1, 8), (9, "cpu", 1, 1), (8, "cpu", 2, 1), (8, "tpu", 1, 1)],
)
def test_small_models_are_unrolled_on_one_cpu_device(n_layer, platform, devices, layers):
    assert choose_unroll(-1, n_layer, platform, num_devices=devices) == layers


def test_heads_not_divisible_by_tensor_are_refused():
    config = from_dict({"model": {"n_head": 25, "n_embd": 100}})
    with raises(ConfigError, "mesh.tensor", value=2, remedy="nearest: 1", match="model.n_head=25"):
        resolve_compute(config, make_mesh(MeshConfig(4, 1, 2)))
