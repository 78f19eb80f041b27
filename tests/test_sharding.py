"""Where every array lies, on eight CPU devices, and that the numbers do not depend on it."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.collectives import (
    Parallel,
    all_gather_embeddings,
    all_gather_layer,
    all_reduce_gradients,
    data_parallel_index,
)
from gptjax.compute import resolve_compute, resolve_parallel
from gptjax.config import CHOICES, GPTConfig, MeshConfig, OptimConfig, from_dict
from gptjax.documents import EndOfText
from gptjax.errors import ConfigError
from gptjax.model import GPT
from gptjax.optim import make_optimizer, make_schedule
from gptjax.params import PARAMS
from gptjax.plan.hlo import array_bytes, parse
from gptjax.plan.traffic import read_collectives
from gptjax.sharding import (
    BATCH_SPEC,
    PARAM_SPECS,
    bytes_per_device,
    data_parallel_size,
    make_mesh,
    nest,
    param_shardings,
    param_spec,
    param_specs,
    state_shardings,
)
from gptjax.state import TrainState, make_init
from gptjax.step import make_eval_step, make_loss_fn, make_token_loss_fn, make_train_step
from tests.helpers import abstract_params, by_path, jit, mesh_of, raises


def abstract_state(mesh, optimizer, **model):
    return make_init(GPT(GPTConfig(**model)), make_optimizer(OptimConfig(name=optimizer)), mesh=mesh, seed=0)[0]


# The mesh


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((-1, 1, 1), (8, 1, 1)), ((1, -1, 1), (1, 8, 1)), ((2, 2, 2), (2, 2, 2)),
        ((2, -1, 2), (2, 2, 2)), ((4, 1, -1), (4, 1, 2)), ((8, -1, 1), (8, 1, 1)),
    ],
)  # fmt: skip
def test_mesh_sizes_of_minus_one_are_resolved(sizes, shape):
    mesh = make_mesh(MeshConfig(*sizes))
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))
    assert data_parallel_size(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
    ("sizes", "nearest"),
    [
        ((-1, 3, 1), (2, 4, 1)), ((1, -1, 5), (1, 2, 4)), ((-1, 16, 1), (1, 8, 1)), ((1, 2, 1), (4, 2, 1)),
        ((1, 1, 1), (8, 1, 1)), ((4, 4, 1), (4, 2, 1)), ((-1, 8, 2), (1, 4, 2)), ((3, 1, 1), (8, 1, 1)),
    ],
)  # fmt: skip
def test_impossible_meshes_name_the_nearest_that_can_be_formed(sizes, nearest):
    with raises(
        ConfigError, "mesh", value="x".join(map(str, sizes)), remedy=f"nearest valid: {'x'.join(map(str, nearest))}"
    ):
        make_mesh(MeshConfig(*sizes))
    assert tuple(make_mesh(MeshConfig(*nearest)).shape.values()) == nearest


def test_a_mesh_takes_the_devices_it_is_given():
    devices = jax.devices()[2:6]
    mesh = make_mesh(MeshConfig(fsdp=2), devices)
    assert mesh.shape["data"] == 2
    assert sorted(device.id for device in mesh.devices.flat) == [2, 3, 4, 5]


# The table


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_a_sharding_row(tied, bias):
    params = abstract_params(GPTConfig(n_layer=2, n_embd=96, tie_embeddings=tied, bias=bias))
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    for path, sharding in by_path(param_shardings(params, mesh)).items():
        assert sharding == NamedSharding(mesh, param_spec(path))
        assert len(param_spec(path)) == by_path(params)[path].ndim


def test_every_sharding_row_belongs_to_a_parameter():
    assert set(by_path(abstract_params(GPTConfig(n_layer=1, tie_embeddings=False)))) == set(PARAM_SPECS)
    assert len(PARAM_SPECS) == len(PARAMS)


@pytest.mark.parametrize("path", ["h/attn/c_attn/weight", "xh/attn/c_attn/kernel", "wte/embedding/x", ""])
def test_an_unmatched_path_is_an_error(path):
    with raises(ConfigError, path, remedy="add one"):
        param_spec(path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", CHOICES["optim.name"])
def test_nothing_large_is_replicated_under_fsdp(optimizer, tied):
    """Of GPT-2 small's whole state, optimizer included, each of eight devices holds an eighth of all that is large."""
    mesh = mesh_of(fsdp=8)
    state = abstract_state(mesh, optimizer, tie_embeddings=tied)
    large = {path: leaf for path, leaf in by_path(state).items() if math.prod(leaf.shape) > 100_000}
    moments = {"adamw": 2, "lion": 1, "adafactor": 0, "muon": 1}[optimizer]
    assert len(large) >= (6 + (not tied)) * (1 + moments)
    for path, leaf in large.items():
        assert math.prod(leaf.sharding.shard_shape(leaf.shape)) * 8 == math.prod(leaf.shape), path
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert whole / 8 < bytes_per_device(state) < 1.03 * whole / 8


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon"])
def test_moments_are_placed_like_their_parameters(optimizer):
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    state = abstract_state(mesh, optimizer, tie_embeddings=False)
    params, owners = by_path(state.params), []
    for path, leaf in by_path(state.opt_state).items():
        owner = next((name for name in params if path.endswith(f"/{name}")), None)
        owners.append(owner)
        if owner is None:
            assert leaf.sharding.spec == P(), path
        else:
            assert leaf.shape == params[owner].shape
            assert leaf.sharding.spec == params[owner].sharding.spec, path
    assert set(owners) == {None, *params}


def test_factored_moments_are_sharded_like_their_kept_dims():
    """Adafactor reduces a kernel [L, D, F] to rows [L, D] and columns [L, F]."""
    state = by_path(abstract_state(mesh_of(data=2, fsdp=2, tensor=2), "adafactor").opt_state)

    def placed(kind, path):
        (leaf,) = (leaf for name, leaf in state.items() if f"/{kind}/" in f"/{name}" and name.endswith(path))
        return leaf.shape, tuple(leaf.sharding.spec)

    L, D, F = 12, 768, 3072
    assert placed("v_row", "h/mlp/c_fc/kernel") == ((L, D), (None, "fsdp"))
    assert placed("v_col", "h/mlp/c_fc/kernel") == ((L, F), (None, "tensor"))
    assert placed("v", "h/mlp/c_fc/kernel")[0] == (1,)
    assert placed("v_row", "h/attn/c_proj/kernel") == ((L, D), (None, "tensor")), "of a square kernel, too"
    assert placed("v_col", "h/attn/c_proj/kernel") == ((L, D), (None, "fsdp"))
    assert placed("v_row", "wte/embedding") == ((D,), ("fsdp",))
    assert placed("v_col", "wte/embedding") == ((50304,), ("tensor",))
    assert placed("v_row", "h/attn/c_attn/kernel") == ((L, D, 3), (None, "fsdp", None))
    assert placed("v_col", "h/attn/c_attn/kernel") == ((L, 3, D), (None, None, "tensor"))
    assert placed("v", "h/mlp/c_fc/bias") == ((L, F), (None, "tensor"))
    assert placed("v", "ln_f/scale") == ((D,), (None,))


def test_state_of_no_parameter_is_replicated():
    params = abstract_params(GPTConfig(n_layer=1))
    state = {"count": jax.ShapeDtypeStruct((), jnp.int32), "mu": {"h": {"other": jax.ShapeDtypeStruct((8,), jnp.int8)}}}
    specs = {sharding.spec for sharding in jax.tree.leaves(state_shardings(state, params, mesh_of(fsdp=8)))}
    assert specs == {P()}


def test_a_width_that_does_not_divide_names_the_nearest_mesh():
    params = abstract_params(GPTConfig(n_layer=1, n_head=2, n_embd=100))
    for axis, path in (("fsdp", "h/attn/c_attn/kernel of shape 1x100x3x100"), ("tensor", "h/")):
        with raises(ConfigError, f"mesh.{axis}", value=8, remedy="nearest valid: 2, 4", match=path):
            param_shardings(params, mesh_of(**{axis: 8}))
        param_shardings(params, mesh_of(**{axis: 4}))


# The numbers


MODEL = {"block_size": 16, "vocab_size": 200, "n_layer": 2, "n_head": 2, "n_embd": 32}
MESHES = {name: tuple(map(int, name.split("x"))) for name in ("8x1x1", "1x8x1", "2x4x1", "1x1x2", "2x2x2", "1x2x4")}
MESHES = {"1": (1, 1, 1)} | MESHES
ALL = {"loss_chunk": 8, "remat": "full", "scan_unroll": 2}
HEADS = {"1x2x4": 4}  # which tensor must divide; elsewhere the model's two
OPTIONS = {"2x4x1": ALL, "2x2x2": ALL, "1x2x4": ALL}  # accumulating too, and the same numbers


@functools.cache
def initial_params():
    mesh = mesh_of()
    return jit(make_init(GPT(GPTConfig(**MODEL)), optax.identity(), mesh=mesh, seed=0)[1])().params


@functools.cache
def train(name, *, heads=2, dropout=0.0, dtype="auto", two_stage_collectives=False, **changed):
    """Returns the losses and gradient norms of four updates on a mesh, and the compiled step's text."""
    compute = OPTIONS.get(name, {}) | {"dtype": dtype}
    optim = {"warmup_steps": 0, "peak_lr": 1e-2}
    config = from_dict({"model": MODEL | {"n_head": heads, "dropout": dropout}, "compute": compute, "optim": optim})
    mesh = mesh_of(*MESHES[name])
    compute = dataclasses.replace(resolve_compute(config, mesh), **changed)
    parallel = dataclasses.replace(resolve_parallel(config, mesh), two_stage_collectives=two_stage_collectives)
    model = GPT(config.model, compute, parallel)
    assert model.compute.flatten_tokens == (mesh.shape["tensor"] == 1)
    optimizer, schedule = make_optimizer(config.optim), make_schedule(config.optim, 100)
    abstract, _ = make_init(model, optimizer, mesh=mesh, seed=0)
    loss_fn = make_loss_fn(model, config, eot=EndOfText(0, "last"))
    step = make_train_step(loss_fn, optimizer, schedule, config=config, parallel=model.parallel)
    accumulating = name in OPTIONS and not dropout  # of which the dropout keys are a function
    tokens_ABT = np.random.default_rng(0).integers(200, size=(2 if accumulating else 1, 8 if accumulating else 16, 17))
    batch = jax.device_put(tokens_ABT.astype(np.int32), NamedSharding(mesh, BATCH_SPEC))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = jax.device_put(TrainState(np.int32(0), initial_params(), optimizer.init(initial_params())), shardings)
    metrics = []
    compiled = jit(step, out_shardings=(shardings, None)).lower(abstract, batch).compile()
    for _ in range(4):
        state, measured = compiled(state, batch)
        metrics.append([float(measured["loss"]), float(measured["grad_norm"])])
    return np.asarray(metrics), compiled.as_text()


def traffic(text, name):
    """Returns {(kind, axes): [how often a step, dtypes]} of a compiled step."""
    shape = dict(mesh_of(*MESHES[name]).shape)
    found = {}
    for c in read_collectives(text, shape):
        count, dtypes = found.get((c.kind, c.axes), (0, set()))
        found[c.kind, c.axes] = (count + c.count, dtypes | {c.dtype})
    return found


@pytest.mark.parametrize(
    "name",
    ["2x2x2", *(pytest.param(name, marks=pytest.mark.thorough) for name in MESHES if name not in ("1", "2x2x2"))],
)
def test_losses_agree_between_meshes(name):
    heads = HEADS.get(name, 2)
    (alone, alone_text), (metrics, text) = train("1", heads=heads), train(name, heads=heads)
    assert "all-reduce" not in alone_text
    assert "all-reduce" in text
    assert ("all-gather" in text) == (name != "8x1x1"), "data alone has nothing to gather"
    assert alone[-1, 0] < alone[0, 0] - 0.05, "nothing was learnt"
    np.testing.assert_allclose(metrics, alone, rtol=1e-5)


@functools.cache
def with_every_option(name, heads):
    """Returns loss, gradient norm, tokens of a train step, and evaluation's sums, with options that change the loss."""
    model = MODEL | {"n_head": heads, "tie_embeddings": False, "bias": False, "activation": "gelu"}
    others = {"data": {"document_mask": True}, "train": {"z_loss": 1e-2}, "optim": {"warmup_steps": 0}}
    config = from_dict({"model": model} | others)
    mesh = mesh_of(*MESHES[name])
    model = GPT(config.model, resolve_compute(config, mesh), resolve_parallel(config, mesh))
    optimizer = make_optimizer(config.optim)
    _, init = make_init(model, optimizer, mesh=mesh, seed=0)
    eot = EndOfText(3, "last")
    loss_fn, schedule = make_loss_fn(model, config, eot=eot), make_schedule(config.optim, 100)
    step = make_train_step(loss_fn, optimizer, schedule, config=config, parallel=model.parallel)
    evaluate = make_eval_step(loss_fn, config, parallel=model.parallel, eot=eot)
    tokens_ABT = np.random.default_rng(0).integers(20, size=(1, 16, 17)).astype(np.int32)
    tokens_ABT[0, ::3, 9:] = -1  # what is not there counts for nothing
    batch = jax.device_put(tokens_ABT, NamedSharding(mesh, BATCH_SPEC))
    state = jit(init)()
    _, metrics = jit(step)(state, batch)
    sums, size = jit(evaluate)(state.params, batch, jnp.arange(200, dtype=jnp.int32))
    return [float(metrics[m]) for m in ("loss", "grad_norm", "tokens")], [float(x) for x in (*sums, size)]


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["8x1x1", "2x2x2", "1x2x4"])
def test_loss_options_and_evaluation_agree_between_meshes(name):
    heads = HEADS.get(name, 2)
    alone, found = with_every_option("1", heads), with_every_option(name, heads)
    np.testing.assert_allclose(found[0], alone[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], alone[1], rtol=1e-5)
    assert 100 < alone[1][2] == alone[0][2] < 16 * 16 - 40, "documents' ends and what is not there are left out"


@pytest.mark.parametrize("name", MESHES)
def test_no_device_has_logits_or_state_of_others(name):
    text, mesh = train(name, heads=HEADS.get(name, 2))[1], mesh_of(*MESHES[name])
    config = from_dict({"model": MODEL})
    abstract, _ = make_init(GPT(config.model), make_optimizer(config.optim), mesh=mesh, seed=0)
    entry = list(parse(text).values())[-1]
    arguments = sum(sum(array_bytes(i.shape)) for i in entry if i.opcode == "parameter")
    tokens = 16 * 17 * 4 // data_parallel_size(mesh)
    assert arguments == bytes_per_device(abstract) + tokens, "what a step takes is cut as the table of specs says"
    columns = 256 // mesh.shape["tensor"]
    shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"f\d+\[([\d,]+)\]", text)]
    positions = OPTIONS.get(name, {}).get("loss_chunk", 16)
    sequences = (8 if name in OPTIONS else 16) // data_parallel_size(mesh)
    whole = [dims for dims in shapes if dims[-1] == 256 and math.prod(dims[:-1]) == sequences * positions]
    assert columns == 256 or not whole, "no device gathers logits over the whole vocabulary"
    largest = max(math.prod(dims) for dims in shapes if dims[-1] == columns)
    assert largest == max(sequences * positions, MODEL["n_embd"]) * columns, "its own logits, or its head"


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["8x1x1", "2x4x1", "2x2x2", "1x2x4"])
def test_dropout_masks_do_not_depend_on_sharding(name):
    heads = HEADS.get(name, 2)
    alone, metrics = (train(where, heads=heads, dropout=0.3)[0] for where in ("1", name))
    assert not np.allclose(alone, train("1", heads=heads)[0], rtol=1e-3), "nothing was dropped"
    np.testing.assert_allclose(metrics, alone, rtol=1e-5)


@functools.cache
def token_losses_on(name, heads):
    """Returns the losses [A, B, T] of the tokens of two micro-batches, with dropout and document masks."""
    values = {"model": MODEL | {"n_head": heads, "dropout": 0.3}, "data": {"document_mask": True}}
    config, mesh = from_dict(values), mesh_of(*MESHES[name])
    model = GPT(config.model, resolve_compute(config, mesh), resolve_parallel(config, mesh))
    tokens_ABT = np.random.default_rng(0).integers(20, size=(2, 8, 17)).astype(np.int32)
    batch = jax.device_put(tokens_ABT, NamedSharding(mesh, BATCH_SPEC))
    abstract, _ = make_init(model, optax.identity(), mesh=mesh, seed=0)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.params)
    params = jax.device_put(initial_params(), shardings)
    losses = jit(make_token_loss_fn(model, config, eot=EndOfText(3, "last")))(params, batch, jnp.int32(5))
    return np.asarray(losses)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["2x2x2", "1x2x4"])
def test_each_tokens_loss_agrees_between_meshes(name):
    alone, found = (token_losses_on(where, HEADS.get(name, 2)) for where in ("1", name))
    assert found.shape == (2, 8, 16)
    assert len(np.unique(found)) > 200
    np.testing.assert_allclose(found, alone, rtol=1e-5)


@pytest.mark.thorough
def test_a_sum_in_two_stages_is_the_same_sum():
    (one, one_text), (two, two_text) = train("1x8x1"), train("1x8x1", two_stage_collectives=True)
    in_one, in_two = traffic(one_text, "1x8x1"), traffic(two_text, "1x8x1")
    for kind in ("all-gather", "reduce-scatter"):
        assert in_two[kind, ("fsdp",)][0] == 2 * in_one[kind, ("fsdp",)][0] > 0
    np.testing.assert_allclose(two, one, rtol=1e-5)


@pytest.mark.parametrize("two_stage_collectives", [False, True])
def test_gather_and_scatter_keep_the_order(two_stage_collectives):
    kernel = jnp.arange(4 * 16 * 24, dtype=jnp.float32).reshape(4, 16, 24)
    layer = {"mlp": {"c_fc": {"kernel": kernel[0]}, "c_proj": {"kernel": kernel[0].T}}}
    parallel = Parallel(mesh_of(fsdp=8), two_stage_collectives=two_stage_collectives)

    def there_and_back(layer):
        whole, scatter = jax.vjp(lambda layer: all_gather_layer(layer, parallel), layer)
        return whole, *scatter(jax.tree.map(lambda x: x * (1 + data_parallel_index(parallel)), whole))

    cut = {"mlp": {"c_fc": {"kernel": P("fsdp")}, "c_proj": {"kernel": P(None, "fsdp")}}}
    run = jax.shard_map(there_and_back, mesh=parallel.mesh, in_specs=(cut,), out_specs=(P(), cut), check_vma=False)
    whole, part = jax.jit(run)(layer)
    jax.tree.map(np.testing.assert_array_equal, whole, layer)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b * sum(range(1, 9))), part, layer)


def test_weights_are_gathered_forward_and_backward_and_tables_once():
    found = traffic(train("2x4x1", scan_unroll=1)[1], "2x4x1")
    layers, num_microbatches, weights, tables = MODEL["n_layer"], 2, 4, 2
    assert found["all-gather", ("fsdp",)][0] == 2 * layers * num_microbatches * weights + tables
    assert found["reduce-scatter", ("fsdp",)][0] == layers * num_microbatches * weights + tables
    assert found["all-reduce", ("data",)][0] <= weights + tables + 3, "across data once a step: layers are stacked"
    assert "all-to-all" not in {kind for kind, _ in found}


@pytest.mark.parametrize(("name", "dtype"), [("f32", jnp.float32), ("bf16", jnp.bfloat16)])
@pytest.mark.parametrize(("table_name", "table_dtype"), [("f32", jnp.float32), ("bf16", jnp.bfloat16)])
def test_gradients_are_reduced_in_the_requested_dtypes(name, dtype, table_name, table_dtype):
    mesh = mesh_of(2, 4)
    grads = {"h": {"mlp": {"c_fc": {"kernel": jnp.ones((2, 8, 16))}}}, "wpe": {"embedding": jnp.ones((8, 8))}}
    parallel = Parallel(mesh, reduce_dtype=dtype, table_reduce_dtype=table_dtype)

    def total(grads):
        return all_reduce_gradients(grads, parallel)

    cut = param_specs(grads)
    lowered = jax.jit(jax.shard_map(total, mesh=mesh, in_specs=(cut,), out_specs=cut, check_vma=False)).lower(grads)
    summed = lowered.compile()(grads)["wpe"]["embedding"]
    np.testing.assert_array_equal(summed, 2)
    assert summed.dtype == jnp.float32
    sums = re.findall(r"all_reduce.*?-> tensor<([\dx]+)x(b?f\d+)>", lowered.as_text(), re.DOTALL)
    assert dict(sums) == {"2x2x16": name, "8x2": table_name}


@pytest.mark.parametrize(("name", "dtype"), [("f32", jnp.float32), ("bf16", jnp.bfloat16)])
def test_fsdp_scatters_the_gradients_of_tables_in_the_requested_dtype(name, dtype):
    table = {"wpe": {"embedding": jnp.ones((16, 64))}}
    parallel = Parallel(mesh_of(fsdp=8), reduce_dtype=jnp.bfloat16, table_reduce_dtype=dtype)

    def there_and_back(table):
        whole, scatter = jax.vjp(lambda table: all_gather_embeddings(table, parallel), table)
        return scatter(whole)[0]

    cut = {"wpe": {"embedding": P(None, "fsdp")}}
    run = jax.shard_map(there_and_back, mesh=parallel.mesh, in_specs=(cut,), out_specs=cut, check_vma=False)
    lowered = jax.jit(run).lower(table)
    [sent] = re.findall(r"reduce_scatter.*?-> tensor<[\dx]+x(b?f\d+)>", lowered.as_text(), re.DOTALL)
    assert sent == name
    np.testing.assert_array_equal(lowered.compile()(table)["wpe"]["embedding"], np.full((16, 64), 8, np.float32))


def test_nest_builds_the_tree():
    assert nest([("h/a/b", 1), ("h/a/c", 2), ("d", 3)]) == {"h": {"a": {"b": 1, "c": 2}}, "d": 3}
