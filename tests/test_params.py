"""One table describes the parameters, and a model that has another one is refused wherever it turns up."""

import contextlib
import copy
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gptjax import params
from gptjax.checkpoint import Checkpointer
from gptjax.config import Config, OptimConfig
from gptjax.convert import formats, native
from gptjax.errors import CheckpointError, ConfigError, DataError
from gptjax.model import GPT
from gptjax.optim import make_optimizer, parameter_table
from gptjax.sharding import abstract_params as described
from gptjax.sharding import check_params, nest
from gptjax.state import TrainState, make_init
from gptjax.stored import load_params
from tests.helpers import abstract_params, by_path, mesh_of, raises, tiny

pytestmark = pytest.mark.usefixtures("quick_compiler")
KINDS = [tiny(), tiny(bias=False), tiny(tie_embeddings=False), tiny(bias=False, tie_embeddings=False)]
EXTRA = "h/mlp/c_gate/kernel"


def shapes_and_dtypes(tree):
    return {path: (leaf.shape, leaf.dtype) for path, leaf in by_path(tree).items()}


class Gated(GPT):
    """GPT-2 with one more vector."""

    def setup(self):
        super().setup()
        self.gate = self.param("gate", jax.nn.initializers.ones, (self.config.n_embd,), jnp.float32)


def with_extra(tree):
    tree = copy.deepcopy(tree)
    tree["h"]["mlp"]["c_gate"] = {"kernel": np.ones((2, 16, 64), np.float32)}
    return tree


def without(tree, path):
    return nest((name, leaf) for name, leaf in by_path(tree).items() if name != path)


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), described(config))


@pytest.mark.parametrize("config", KINDS)
def test_parameter_table_matches_the_model(config):
    assert shapes_and_dtypes(described(config)) == shapes_and_dtypes(abstract_params(config))
    check_params(abstract_params(config), config)


def test_table_rows_are_consistent_between_layouts():
    for param in params.PARAMS:
        assert len(param.spec) == len(param.dims), param.path
        here, there = (sizes.replace("3D", "Q").removeprefix("L") for sizes in (param.dims, param.dims_there))
        assert sorted(here) == sorted(there), param.path
    assert len(params.BY_PATH) == len(params.PARAMS)


@pytest.mark.parametrize("path", ["ln_f/scale", "h/attn/c_attn/kernel"])
def test_extra_missing_or_misshapen_parameter_is_refused(path):
    config, tree = tiny(), described(tiny())
    odd = nest((name, np.zeros((3, 3)) if name == path else leaf) for name, leaf in by_path(tree).items())
    for bad, name, problem in (
        (with_extra(tree), EXTRA, "no row"),
        (without(tree, path), path, "missing"),
        (odd, path, r"shape \(3, 3\)"),
    ):
        with raises(ConfigError, name, match=problem):
            check_params(bad, config)


def test_long_list_of_parameter_errors_is_shortened():
    with raises(ConfigError, "a/b", match="12 more$") as caught:
        params.check_paths(["a/b"], tiny())
    assert len(caught.value.errors) == params.SHOWN_PATHS + 1


@pytest.mark.parametrize(("dims", "count"), [("V", 20), ("LV3D", 2 * 20 * 3 * 16), ("TV", 16 * 20)])
def test_parameter_unknown_to_gpt2_keeps_its_shape_everywhere(dims, count, tmp_path, monkeypatch):
    config = tiny(vocab_size=20)
    before, own = params.count_params(config), params.Param("h/own" if "L" in dims else "own", dims, P(), "vector")
    monkeypatch.setattr(params, "PARAMS", (*params.PARAMS, own))
    monkeypatch.setattr(params, "BY_PATH", params.BY_PATH | {own.path: own})
    assert params.count_params(config) == before + count
    tree = random_params(config)
    state = TrainState(jnp.asarray(3), jax.tree.map(jnp.asarray, tree), {"count": jnp.zeros(())})
    with contextlib.closing(Checkpointer(str(tmp_path))) as checkpointer:
        checkpointer.save(state, 3, config=Config(model=config), history={}, data={})
    weights = formats.open_weights(formats.parse_model_ref("--from", f"gptjax:{tmp_path}", formats.READABLE))
    assert formats.map_table(weights, "gptjax", "float32")
    read = formats.load_params(weights, lambda path, leaf: leaf)
    assert by_path(read)[own.path].shape == params.leaf_shape(own, config)
    assert by_path(read).keys() == by_path(tree).keys()
    jax.tree.map(np.testing.assert_array_equal, by_path(read)[own.path], by_path(tree)[own.path])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_model_with_an_extra_parameter_is_refused(optimizer):
    with raises(ConfigError, "gate"):
        make_init(Gated(tiny()), make_optimizer(OptimConfig(name=optimizer)), mesh=mesh_of(), seed=0)


@pytest.mark.parametrize(
    ("made", "field", "problem"),
    [({"bias": False}, "h/attn/c_attn/bias", "missing"), ({"n_embd": 32}, "wte/embedding", "shape")],
)
def test_model_with_a_missing_or_misshapen_parameter_is_refused(made, field, problem):
    model = types.SimpleNamespace(config=tiny(), clone=lambda **_: GPT(tiny(**made)))
    with raises(ConfigError, field, match=problem):
        make_init(model, make_optimizer(OptimConfig()), mesh=mesh_of(), seed=0)


def test_role_table_refuses_an_extra_parameter():
    with raises(ConfigError, EXTRA):
        parameter_table(with_extra(described(tiny())), OptimConfig())


def save(workdir, tree):
    state = TrainState(jnp.asarray(3), jax.tree.map(jnp.asarray, tree), {"count": jnp.zeros(())})
    with contextlib.closing(Checkpointer(str(workdir))) as checkpointer:
        checkpointer.save(state, 3, config=Config(model=tiny()), history={}, data={})


def test_state_with_an_extra_or_missing_parameter_is_not_saved(tmp_path):
    tree, path = random_params(tiny()), "ln_f/bias"
    for other, name in ((with_extra(tree), EXTRA), (without(tree, path), path)):
        with raises(ConfigError, name):
            save(tmp_path, other)
        assert Checkpointer(str(tmp_path)).steps() == []


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """Saves the checkpoint of a program whose model has other parameters, and returns its work directory."""

    def make(change):
        monkeypatch.setattr("gptjax.checkpoint.check_params", lambda params, config: None)
        save(tmp_path, change(random_params(tiny())))
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("change", "told", "converting"),
    [
        (with_extra, f"has params/{EXTRA}", f"{EXTRA}: no row"),
        (lambda tree: without(tree, "ln_f/bias"), "lacks params/ln_f/bias", "ln_f/bias: .* missing"),
    ],
    ids=["extra", "missing"],
)
def test_checkpoint_with_other_parameters_is_neither_read_nor_converted(stranger, change, told, converting):
    foreign = stranger(change)
    with raises(CheckpointError, f"{foreign}/checkpoints/3", match=told):
        load_params(str(foreign))
    with raises(DataError, f"gptjax:{foreign}@3", match=converting):
        native.read(str(foreign))
    assert Checkpointer(str(foreign)).steps() == [3], "it is not damaged, and stays"


def test_run_does_not_resume_with_an_extra_parameter(stranger):
    foreign = stranger(with_extra)
    abstract, _ = make_init(GPT(tiny()), make_optimizer(OptimConfig()), mesh=mesh_of(), seed=0)
    abstract = dataclasses.replace(abstract, opt_state={"count": abstract.step})
    with raises(CheckpointError, f"{foreign}/checkpoints/3", match=f"has params/{EXTRA}"):
        Checkpointer(str(foreign)).restore_latest(abstract)
    assert Checkpointer(str(foreign)).steps() == [3]
