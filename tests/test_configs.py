"""Every file in configs/: it loads, says how to run it, and its train step traces at full size."""

import ast
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.compute import resolve_compute, resolve_parallel
from gptjax.config import MeshConfig, flatten, load
from gptjax.data.own_tokenizer import is_own, own_size
from gptjax.data.tokenizer import load_tokenizer
from gptjax.documents import EndOfText
from gptjax.errors import ConfigError
from gptjax.model import GPT
from gptjax.optim import make_optimizer, make_schedule
from gptjax.params import count_params, padded_vocab_size
from gptjax.sharding import data_parallel_size, make_mesh
from gptjax.state import make_init
from gptjax.step import make_loss_fn, make_train_step
from tests.helpers import raises

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
PATHS = sorted(CONFIGS.glob("*.py"))
SIZES = {"small": 124_439_808, "medium": 354_823_168, "large": 774_030_080, "xl": 1_557_611_200}
METRICS = {"loss", "grad_norm", "update_norm", "lr", "tokens", "finite"}
EOT = 256

every_config = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def load_file(path, **overrides):
    return load(str(path), overrides)


def docstring(path):
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def abstract_run(config):
    """Returns the abstract state and the train step of `config` on a mesh of 8 CPU devices."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), jax.devices()[:8])
    model = GPT(config.model, resolve_compute(config, mesh), resolve_parallel(config, mesh))
    optimizer = make_optimizer(config.optim)
    abstract, _ = make_init(model, optimizer, mesh=mesh, seed=config.train.seed)
    loss_fn = make_loss_fn(model, config, eot=EndOfText(EOT, "last"))
    schedule = make_schedule(config.optim, config.train.num_steps)
    return mesh, abstract, make_train_step(loss_fn, optimizer, schedule, config=config, parallel=model.parallel)


def shapes(tree):
    return {jax.tree_util.keystr(path): (x.shape, x.dtype) for path, x in jax.tree.leaves_with_path(tree)}


@every_config
def test_docstring_states_command_expected_result_and_cost(path):
    assert re.search(rf"^ *python -m gptjax\.main --config=configs/{path.name}$", docstring(path), re.MULTILINE)
    for statement in ("Expected", "[Cc]ost"):
        assert re.search(rf"\b{statement}\b[^:\n]*:", docstring(path)), statement


@every_config
def test_vocab_size_equals_that_of_the_tokenizer(path):
    config = load_file(path)
    name = config.data.tokenizer
    assert config.model.vocab_size == (own_size(name) if is_own(name) else load_tokenizer(name).vocab_size)


@every_config
def test_train_step_traces_at_full_size(path):
    config = load_file(path)
    mesh, abstract, train_step = abstract_run(config)
    sizes = {jax.tree_util.keystr(p): x.size for p, x in jax.tree.leaves_with_path(abstract.params)}
    padding = (padded_vocab_size(config.model) - config.model.vocab_size) * config.model.n_embd
    assert sum(sizes.values()) - padding * (1 if config.model.tie_embeddings else 2) == count_params(config.model)
    tokens_ABT = jax.ShapeDtypeStruct((2, data_parallel_size(mesh), config.model.block_size + 1), np.int32)
    state, metrics = jax.eval_shape(train_step, abstract, tokens_ABT)
    assert shapes(state) == shapes(abstract)
    assert {name: (x.shape, x.dtype) for name, x in metrics.items()} == dict.fromkeys(METRICS, ((), jnp.float32))


@pytest.mark.parametrize("size", SIZES)
def test_gpt2_config_has_the_published_parameter_count(size):
    path = CONFIGS / f"gpt2_{size}.py"
    config = load_file(path)
    assert count_params(config.model) == SIZES[size]
    in_header = re.findall(r"([\d,]{7,}) parameters", docstring(path))
    assert in_header == ([] if size == "small" else [f"{SIZES[size]:,}"])
    assert (config.model.block_size, config.model.bias, config.model.tie_embeddings) == (1024, True, True)


def test_gpt2_sizes_differ_only_in_shape_and_learning_rate():
    small, *others = (flatten(load_file(CONFIGS / f"gpt2_{size}.py")) for size in SIZES)
    for other in others:
        differing = {name for name in small if small[name] != other[name]}
        assert differing == {"model.n_layer", "model.n_head", "model.n_embd", "optim.peak_lr", "optim.min_lr"}


def test_gpt2_small_has_the_documented_settings():
    config = load_file(CONFIGS / "gpt2_small.py")
    assert config.data.global_batch_size * config.model.block_size == 524_288
    assert (config.model.dropout, config.train.num_steps) == (0.0, 600_000)
    assert (config.data.tokenizer, config.data.source) == ("gpt2", "stdlib")
    promised = {"name": "adamw", "schedule": "cosine", "peak_lr": 6e-4, "min_lr": 6e-5, "warmup_steps": 2000}
    promised |= {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "grad_clip": 1.0}
    assert {name: getattr(config.optim, name) for name in promised} == promised


@every_config
def test_text_overrides_any_field(path):
    before = flatten(load_file(path))
    config = load(str(path), {"model.n_layer": "3", "optim.peak_lr": "1e-3", "model.bias": "false", "init_from": "a"})
    changed = {name: value for name, value in flatten(config).items() if value != before[name]}
    expected = {"model.n_layer": 3, "optim.peak_lr": 1e-3, "model.bias": False, "init_from": "a"}
    assert changed == {name: value for name, value in expected.items() if before[name] != value}
    assert "model.n_layer" in changed


@every_config
@pytest.mark.parametrize(
    ("name", "text", "value", "remedy"),
    [
        ("model.n_layers", "2", None, "nearest: model.n_layer"), ("n_layer", "2", None, "nearest: model.n_layer"),
        ("model", "2", None, None), ("model.n_layer.x", "2", None, None),
        ("model.n_layer", "two", "two", ""), ("model.n_head", "7", 7, "nearest valid: "),
    ],
)  # fmt: skip
def test_a_wrong_override_is_refused(path, name, text, value, remedy):
    with raises(ConfigError, name, value=value, remedy=remedy):
        load(str(path), {name: text})
