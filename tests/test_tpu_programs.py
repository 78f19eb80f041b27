"""Every program that a run compiles beside its train step (tests/plan), compiled for TPU slices; no TPU is needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import decode, fingerprint, generate, sampling, tree_checks
from gptjax.collectives import ONE_DEVICE
from gptjax.compute import resolve_compute, resolve_parallel
from gptjax.config import Config, GPTConfig, MeshConfig
from gptjax.documents import EndOfText
from gptjax.layer_stats import jit_stats_step
from gptjax.model import GPT
from gptjax.optim import make_optimizer
from gptjax.plan.__main__ import LIBTPU
from gptjax.plan.aot import quiet_compiler
from gptjax.sharding import BATCH_SPEC, make_mesh
from gptjax.state import make_init
from gptjax.step import jit_steps

pytestmark = pytest.mark.plan
MESHES = [MeshConfig(data=2, fsdp=4, tensor=2), MeshConfig(data=1, fsdp=16)]


@pytest.fixture(params=MESHES, ids=["2x4x2", "fsdp"])
def parts(request, monkeypatch):
    """(config, mesh, model, abstract state, init)."""
    pytest.importorskip("libtpu", reason="needs the extra 'plan'")
    for variable, value in LIBTPU.items():
        monkeypatch.setenv(variable, value)
    config = Config(model=GPTConfig(n_layer=2), mesh=request.param)
    with quiet_compiler():
        devices = topologies.get_topology_desc("v5e:4x4", "tpu").devices
    mesh = make_mesh(config.mesh, devices)
    model = GPT(config.model, resolve_compute(config, mesh), resolve_parallel(config, mesh))
    assert model.compute.attention == "splash"
    abstract, init = make_init(model, make_optimizer(config.optim), mesh=mesh, seed=0)
    with quiet_compiler():
        yield config, mesh, model, abstract, init


def test_initial_state_compiles_with_its_shardings(parts):
    *_, abstract, init = parts
    made = init.lower().compile()
    assert jax.tree.leaves(made.output_shardings) == [leaf.sharding for leaf in jax.tree.leaves(abstract)]


def test_evaluation_compiles_with_the_splash_kernel(parts):
    config, mesh, model, abstract, _ = parts
    optimizer, eot = make_optimizer(config.optim), EndOfText(50256, "last")
    _, eval_step = jit_steps(model, optimizer, config, abstract=abstract, eot=eot)
    tokens = jax.ShapeDtypeStruct((2, 32, 1025), jnp.int32, sharding=NamedSharding(mesh, BATCH_SPEC))
    token_bytes = jax.ShapeDtypeStruct((config.model.vocab_size,), jnp.int32, sharding=NamedSharding(mesh, P()))
    assert (
        'custom_call_target="tpu_custom_call"'
        in eval_step.lower(abstract.params, tokens, token_bytes).compile().as_text()
    )


def test_statistics_of_layers_need_little_memory_and_are_replicated(parts):
    config, mesh, model, abstract, _ = parts
    sharding = abstract.step.sharding
    stats_step = jit_stats_step(model, config, eot=EndOfText(50256, "last"), sharding=sharding)
    tokens = jax.ShapeDtypeStruct((2, 32, 1025), jnp.int32, sharding=NamedSharding(mesh, BATCH_SPEC))
    compiled = stats_step.lower(abstract.params, tokens).compile()
    assert 'custom_call_target="tpu_custom_call"' in compiled.as_text(), "the forward pass has the run's own kernel"
    assert all(found.is_fully_replicated for found in jax.tree.leaves(compiled.output_shardings))
    assert compiled.memory_analysis().temp_size_in_bytes < 2**29


def test_save_checks_compile_without_all_gather(parts):
    *_, abstract, _ = parts
    trees = {"params": abstract.params, "opt_state": abstract.opt_state}
    for program in (tree_checks._count_nonfinite, fingerprint._fingerprint_all):
        compiled = program.lower(trees).compile()
        assert "all-gather" not in compiled.as_text(), "each device looks at its own part"


def test_sampling_compiles_within_1_gib_of_temporaries(parts):
    _, mesh, model, abstract, _ = parts
    config, dtype, size = model.config, model.compute.dtype, generate.padded_rows(1, mesh)
    split = decode._make_split(config.n_layer, dtype).lower(abstract.params).compile()
    shapes = jax.eval_shape(decode._make_split(config.n_layer, dtype), abstract.params)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, split.output_shardings
    )
    weights = {"tables": {name: tree for name, tree in abstract.params.items() if name != "h"}, **placed}
    shape = (size, config.n_head, 256, config.n_embd // config.n_head)
    cache = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, decode.cache_spec(config.n_head, mesh)))
    ids_B = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=NamedSharding(mesh, P()))
    chosen = sampling.SamplingParams(
        temperature=np.float32(1), top_k=np.int32(0), top_p=np.float32(1), min_p=np.float32(0),
        seed=np.uint32(0), vocab_size=np.int32(config.vocab_size),
    )  # fmt: skip
    zeros_B = np.zeros(size, np.int32)
    for tokens_BC, width, count in ((np.zeros((size, 64), np.int32), 64, 1), (None, 1, 8)):
        caches = [(cache, cache)] * config.n_layer
        step = decode.make_step(model.clone(parallel=ONE_DEVICE), (), mesh).lower(
            weights, caches, ids_B, tokens_BC, np.zeros((size, width), np.int32), zeros_B,
            row_B=zeros_B, n=np.int32(0), count=count, sampling=chosen,
        )  # fmt: skip
        assert step.compile().memory_analysis().temp_size_in_bytes < 2**30
