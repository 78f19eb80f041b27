"""Schedules at their corners, and each optimizer's roles by parameter path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.config import CHOICES, GPTConfig, OptimConfig
from gptjax.loss import cross_entropy
from gptjax.model import GPT, unembedding
from gptjax.optim import make_optimizer, make_schedule, parameter_table
from gptjax.params import find
from gptjax.sharding import param_shardings, param_spec
from tests.helpers import abstract_params, by_path, jit, mesh_of

OPTIMIZERS = CHOICES["optim.name"]
CONFIG = GPTConfig(block_size=8, vocab_size=16, n_layer=2, n_head=2, n_embd=16, tie_embeddings=False)
MATRICES = {f"h/{layer}/kernel" for layer in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")}
TABLES = {"wte/embedding", "wpe/embedding", "lm_head/kernel"}


def make_tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), abstract_params(CONFIG))


def lr(config, num_steps, *steps):
    schedule = make_schedule(config, num_steps)
    values = [schedule(step) for step in steps]
    assert {value.dtype for value in values} == {jnp.dtype(jnp.float32)}
    return [float(value) for value in values]


# Schedules


def schedule_config(name, **changes):
    return OptimConfig(**({"schedule": name, "peak_lr": 1.0, "min_lr": 0.1, "warmup_steps": 9} | changes))


@pytest.mark.parametrize("name", CHOICES["optim.schedule"])
def test_warmup_is_linear_from_above_zero_to_the_peak(name):
    assert lr(schedule_config(name), 100, *range(10)) == pytest.approx([(n + 1) / 10 for n in range(10)], rel=1e-6)
    assert lr(schedule_config(name, warmup_steps=0), 100, 0) == [1.0]


def test_cosine_schedule_falls_to_min_lr_and_stays():
    config = schedule_config("cosine", warmup_steps=20)
    assert lr(config, 120, 20, 70, 120, 121, 10**6) == pytest.approx([1.0, 0.55, 0.1, 0.1, 0.1], rel=1e-6)
    quarter = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi / 4))
    assert lr(config, 120, 45) == pytest.approx([quarter], rel=1e-6)


def test_wsd_is_flat_then_linear():
    config = schedule_config("wsd", decay_fraction=0.25)
    assert lr(config, 80, 9, 40, 60, 70, 80, 81) == pytest.approx([1.0, 1.0, 1.0, 0.55, 0.1, 0.1], rel=1e-6)
    assert lr(schedule_config("wsd", decay_fraction=0.0), 80, 79) == [1.0]
    assert lr(schedule_config("wsd", decay_fraction=1.0, warmup_steps=0), 80, 0, 40) == pytest.approx([1.0, 0.55])


def test_linear_schedule_falls_to_min_lr_and_stays():
    config = schedule_config("linear", warmup_steps=20)
    assert lr(config, 120, 20, 45, 70, 120, 10**6) == pytest.approx([1.0, 0.775, 0.55, 0.1, 0.1], rel=1e-6)


@pytest.mark.parametrize(
    ("shape", "quarter", "half"),
    [
        ("linear", 0.25, 0.5),
        ("cosine", 0.5 - 8**-0.5, 0.5),
        ("sqrt", 0.5, 0.5**0.5),
        ("power", 1 - 0.75**3, 1 - 0.5**3),
    ],
)
def test_wsd_falls_in_the_shape_that_is_set(shape, quarter, half):
    config = schedule_config("wsd", decay_fraction=0.4, decay_shape=shape, decay_power=3.0)
    wanted = [1 - 0.9 * fallen for fallen in (0.0, quarter, half, 1.0, 1.0)]
    assert lr(config, 100, 60, 70, 80, 100, 101) == pytest.approx(wanted, rel=1e-5)


def test_constant_schedule_stays_at_the_peak():
    assert lr(schedule_config("constant"), 100, 9, 50, 100, 10**6) == [1.0] * 4


def test_wsd_never_jumps_when_its_decay_begins_within_the_warmup():
    config = OptimConfig(schedule="wsd", peak_lr=1.0, min_lr=0.0, warmup_steps=9, decay_fraction=0.9)
    rates = lr(config, 12, *range(13))
    assert max(np.abs(np.diff(rates))) < 0.11
    assert all(rate <= (n + 1) / 10 + 1e-6 for n, rate in enumerate(rates))


@pytest.mark.parametrize("num_steps", [0, 1, 5, 9, 10])
@pytest.mark.parametrize("name", ["cosine", "constant"])
def test_a_run_shorter_than_its_warmup_stays_on_the_warmup(name, num_steps):
    steps = range(min(num_steps, 9))
    assert lr(schedule_config(name), num_steps, *steps, 0) == pytest.approx([(n + 1) / 10 for n in [*steps, 0]])
    assert all(np.isfinite(lr(schedule_config(name), num_steps, 9, 10, 11)))


def test_schedules_are_four_and_traceable():
    curves = {}
    for name in CHOICES["optim.schedule"]:
        schedule = make_schedule(schedule_config(name), 50)
        curves[name] = jit(jax.vmap(schedule))(jnp.arange(60))
        np.testing.assert_allclose(curves[name][30], schedule(30), rtol=1e-6)
        assert (curves[name] > 0).all()
    assert len({tuple(curve.tolist()) for curve in curves.values()}) == 4


# Roles


def test_weight_decay_and_muon_apply_to_the_expected_parameters():
    paths = set(by_path(abstract_params(CONFIG)))
    assert {path for path in paths if find(path).decays} == MATRICES | TABLES
    assert {path for path in paths if find(path).uses_muon} == MATRICES
    assert {"h/ln_1/scale", "h/attn/c_attn/bias", "ln_f/bias"} <= paths - MATRICES - TABLES


@functools.cache
def updates_of(name, weight_decay, zero_grads=False, **options):
    """Returns the optimizer's first updates, at learning rate 1, for the same parameters and gradients."""
    optimizer = make_optimizer(OptimConfig(name=name, weight_decay=weight_decay, **options))
    params, grads = make_tree(0), make_tree(1)
    grads = jax.tree.map(jnp.zeros_like, grads) if zero_grads else grads
    updates, _ = jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(grads, params)
    return by_path(updates)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_shrinks_matrices_and_tables_only(name):
    params, plain, decayed = by_path(make_tree(0)), updates_of(name, 0.0), updates_of(name, 0.25)
    for path, param in params.items():
        rate = 0.25 if path in MATRICES | TABLES else 0.0
        np.testing.assert_allclose(decayed[path], plain[path] - rate * param, rtol=1e-5, atol=1e-5, err_msg=path)


def test_optimizers_differ_and_muon_is_adamw_outside_the_blocks():
    adamw, lion, muon, adafactor = (updates_of(name, 0.0) for name in ("adamw", "lion", "muon", "adafactor"))
    for path in by_path(abstract_params(CONFIG)):
        same = np.allclose(muon[path], adamw[path], rtol=1e-5, atol=1e-6)
        assert same == (path not in MATRICES), path
        assert set(np.unique(lion[path])) == {-1.0, 1.0}
        assert not np.allclose(adafactor[path], adamw[path], rtol=1e-3)


def test_muon_orthogonalises_each_layer_and_query_key_and_value_apart():
    """Newton-Schulz brings the singular values of a matrix close to one, here times 0.2 sqrt(longer side)."""
    for path, update in updates_of("muon", 0.0).items():
        if path not in MATRICES:
            continue
        update = np.asarray(update)
        blocks = np.moveaxis(update, 2, 1).reshape(-1, 16, 16) if path == "h/attn/c_attn/kernel" else update
        assert len(blocks) == (6 if path == "h/attn/c_attn/kernel" else 2)
        for block in blocks:
            values = np.linalg.svd(block, compute_uv=False) / (0.2 * np.sqrt(max(block.shape)))
            assert 0.5 < values.min() <= values.max() < 1.4, path
    raw = np.linalg.svd(np.asarray(by_path(make_tree(1))["h/attn/c_proj/kernel"]), compute_uv=False)
    assert (raw.max(axis=-1) / raw.min(axis=-1) > 5).all(), "the gradient itself is far from orthogonal"


def test_polar_express_comes_nearer_to_orthogonal():
    spread = {}
    for coefficients in CHOICES["optim.muon_coefficients"]:
        kernel = updates_of("muon", 0.0, muon_coefficients=coefficients)["h/mlp/c_proj/kernel"]
        values = np.linalg.svd(np.asarray(kernel), compute_uv=False) / (0.2 * np.sqrt(64))
        spread[coefficients] = np.abs(values - 1).max()
    assert spread["polar_express"] < 0.15 < 0.2 < spread["quintic"]


def test_muon_scales_by_the_shape_where_that_is_set():
    rms, shape = (updates_of("muon", 0.0, muon_scale=scale) for scale in ("rms", "shape"))
    for path, ratio in {"h/mlp/c_fc/kernel": 2.0, "h/mlp/c_proj/kernel": 1.0}.items():
        longer = max(rms[path].shape[1:])
        np.testing.assert_allclose(shape[path], rms[path] * ratio / (0.2 * np.sqrt(longer)), rtol=1e-4, atol=1e-6)
    assert np.array_equal(rms["wte/embedding"], shape["wte/embedding"])


@pytest.mark.parametrize("options", [{}, {"muon_coefficients": "polar_express", "muon_scale": "shape"}], ids=str)
def test_muon_agrees_between_meshes(options):
    alone = updates_of("muon", 0.0, **options)
    optimizer = make_optimizer(OptimConfig(name="muon", weight_decay=0.0, **options))
    shardings = param_shardings(abstract_params(CONFIG), mesh_of(2, 2, 2))
    params, grads = (jax.device_put(make_tree(seed), shardings) for seed in (0, 1))
    updates, _ = jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(grads, params)
    for path, update in by_path(updates).items():
        np.testing.assert_allclose(update, alone[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_muon_without_nesterov_takes_the_momentum_itself():
    """The first momentum points along the gradient in both; the second step differs."""
    found = []
    for nesterov in (True, False):
        optimizer = make_optimizer(OptimConfig(name="muon", weight_decay=0.0, muon_nesterov=nesterov))
        params = make_tree(0)
        state = optimizer.init(params)
        for seed in (1, 2):
            updates, state = jit(optimizer.update)(make_tree(seed), state, params)
        found.append(by_path(updates))
    assert not np.allclose(found[0]["h/mlp/c_fc/kernel"], found[1]["h/mlp/c_fc/kernel"], rtol=1e-2)
    assert np.array_equal(found[0]["wte/embedding"], found[1]["wte/embedding"])


def test_muon_updates_each_block_independently():
    """Scaling one layer's gradient, or its keys', changes no other block's update."""
    optimizer = make_optimizer(OptimConfig(name="muon"))
    params, grads = make_tree(0), make_tree(1)
    scaled = jax.tree.map(lambda leaf: leaf, grads)
    kernel_LD3D = scaled["h"]["attn"]["c_attn"]["kernel"]
    scaled["h"]["attn"]["c_attn"]["kernel"] = kernel_LD3D.at[1, :, 1].multiply(100.0)
    update = jit(lambda g: optimizer.update(g, optimizer.init(params), params)[0])
    before, after = (update(g)["h"]["attn"]["c_attn"]["kernel"] for g in (grads, scaled))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_role_table_has_a_row_a_parameter(name):
    rows = parameter_table(abstract_params(CONFIG), OptimConfig(name=name))
    shapes = {path: list(leaf.shape) for path, leaf in by_path(abstract_params(CONFIG)).items()}
    assert {row["parameter"]: row["shape"] for row in rows} == shapes
    assert {row["parameter"] for row in rows if row["weight_decay"]} == MATRICES | TABLES
    by_name = {row["parameter"] for row in rows if row["optimizer"] == name}
    assert by_name == (MATRICES if name == "muon" else set(shapes))
    assert {row["optimizer"] for row in rows} == ({"muon", "adamw"} if name == "muon" else {name})
    assert all(row["sharding"] == str(param_spec(row["parameter"])) for row in rows)
    assert len({row["sharding"] for row in rows}) > 5
    without = parameter_table(abstract_params(CONFIG), OptimConfig(weight_decay=0.0))
    assert not any(row["weight_decay"] for row in without)


# Learning


@functools.cache
def value_and_grad():
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(16, size=(4, 9)), jnp.int32)

    def loss(params):
        x_BTD = GPT(CONFIG).apply({"params": params}, tokens_BT[:, :-1], method="hidden")
        sums = cross_entropy(x_BTD, unembedding(params), tokens_BT[:, 1:], vocab_size=16)
        return sums.loss / sums.tokens

    params = jit(GPT(CONFIG).init)(jax.random.key(0), tokens_BT[:, :-1])["params"]
    return jit(jax.value_and_grad(loss)), params


@pytest.mark.thorough
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_learns(name):
    """Twenty updates on one batch, at a rate that suits the optimizer, take a good part of the loss away."""
    rate = {"adamw": 1e-2, "lion": 3e-3, "adafactor": 1e-1, "muon": 1e-2}[name]
    optimizer = make_optimizer(OptimConfig(name=name))
    step, params = value_and_grad()
    state = optimizer.init(params)

    @jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates)), state

    first, grads = step(params)
    for _ in range(20):
        params, state = update(params, state, grads)
        last, grads = step(params)
    assert float(first) == pytest.approx(np.log(16), rel=0.05)
    assert last < 0.8 * first
