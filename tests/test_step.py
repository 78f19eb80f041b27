"""One update: what it averages, clips, keeps and reports; and that no option changes its numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from gptjax.collectives import ONE_DEVICE
from gptjax.compute import ResolvedCompute
from gptjax.config import from_dict
from gptjax.dispatch import Batches
from gptjax.documents import EndOfText
from gptjax.loss import NOT_COUNTED, LossSums
from gptjax.model import GPT
from gptjax.optim import make_optimizer, make_schedule
from gptjax.state import TrainState
from gptjax.step import (
    make_eval_step,
    make_gradient_fn,
    make_loss_fn,
    make_multi_step,
    make_token_loss_fn,
    make_train_step,
)
from tests.helpers import jit, random_params

MODEL = {"block_size": 8, "vocab_size": 20, "n_layer": 2, "n_head": 2, "n_embd": 16}
EOT = 3
METRICS = {"loss", "grad_norm", "update_norm", "lr", "tokens", "finite"}


def make_config(**sections):
    optim = {"warmup_steps": 3, "peak_lr": 1e-2, "min_lr": 1e-3} | sections.pop("optim", {})
    return from_dict({"model": MODEL, "optim": optim, "train": {"num_steps": 10, "log_every": 1}} | sections)


def make_tokens(*shape):
    return np.random.default_rng(0).integers(20, size=(*shape, 9)).astype(np.int32)


def gpt_params():
    return random_params(make_config().model, 0.1)


def gpt_loss_fn(config, **compute):
    return make_loss_fn(GPT(config.model, ResolvedCompute(**compute)), config, eot=EndOfText(EOT, "last"))


def make_step(config, loss_fn, optimizer=None, **flags):
    optimizer = optimizer or make_optimizer(config.optim)
    schedule = make_schedule(config.optim, 10)
    return make_train_step(loss_fn, optimizer, schedule, config=config, parallel=ONE_DEVICE, **flags)


def make_state(config, params, step=0, optimizer=None):
    optimizer = optimizer or make_optimizer(config.optim)
    return TrainState(jnp.int32(step), params, optimizer.init(params))


def vector(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def assert_near(actual, expected, tolerance=1e-5):
    """Compares two trees, each as one vector, relative to its length."""
    actual, expected = vector(actual), vector(expected)
    assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


# A stub: the "model" is a row of weights, and its gradient is what the batch says.


def stub_loss_fn(params, tokens, key):
    """Tokens [B, 2] are pairs (value, weight): the loss is the sum of value * weight * w."""
    value_B, weight_B = tokens[:, 0].astype(jnp.float32), tokens[:, 1].astype(jnp.float32)
    return LossSums(params["wte/embedding"][0] * jnp.sum(value_B * weight_B), jnp.float32(0), jnp.sum(weight_B))


def run_stub(config, tokens_ABT, loss_fn=stub_loss_fn, params=None, step=0):
    params = params or {"wte/embedding": jnp.asarray([2.0, 0.5])}
    state = make_state(config, params, step)
    new_state, metrics = make_step(config, loss_fn)(state, jnp.asarray(tokens_ABT))
    return state, new_state, metrics


UNCLIPPED = {"grad_clip": 0.0, "weight_decay": 0.0}


def test_the_mean_is_over_tokens_not_over_micro_batches():
    """Three tokens of loss 2 in the first micro-batch and one of loss 10 in the second: 4 on average, not 6."""
    tokens_ABT = [[[1, 3]], [[5, 1]]]
    _, _, metrics = run_stub(make_config(optim=UNCLIPPED), tokens_ABT)
    assert float(metrics["loss"]) == pytest.approx(2 * (1 * 3 + 5 * 1) / 4)
    assert float(metrics["grad_norm"]) == pytest.approx(2.0)
    assert float(metrics["tokens"]) == 4


def test_metrics_are_float32_scalars_with_expected_names():
    _, new_state, metrics = run_stub(make_config(), [[[1, 3]], [[5, 1]]])
    assert set(metrics) == METRICS
    assert {(value.shape, value.dtype) for value in metrics.values()} == {((), jnp.dtype(jnp.float32))}
    assert float(metrics["finite"]) == 1
    assert new_state.step == 1
    assert new_state.step.dtype == jnp.int32


def test_update_norm_is_how_far_the_parameters_move():
    state, new_state, metrics = run_stub(make_config(), [[[1, 3]]])
    moved = np.linalg.norm(vector(new_state.params) - vector(state.params))
    assert moved > 1e-3
    assert float(metrics["update_norm"]) == pytest.approx(moved, rel=1e-4)


@pytest.mark.parametrize("step", [0, 2, 7])
def test_learning_rate_depends_only_on_the_step(step):
    """With an optimizer state as fresh as at step 0, the update of any step is the schedule's rate times AdamW's."""
    config = make_config(optim=UNCLIPPED)
    state, new_state, metrics = run_stub(config, [[[1, 1]]], step=step)
    rate = float(make_schedule(config.optim, 10)(step))
    assert float(metrics["lr"]) == pytest.approx(rate, rel=1e-6)
    moved = state.params["wte/embedding"] - new_state.params["wte/embedding"]
    np.testing.assert_allclose(moved, [rate, 0.0], rtol=1e-4)  # AdamW's first update is the gradient's sign
    assert new_state.step == step + 1
    assert rate != float(make_schedule(config.optim, 10)(step + 1)), "another step has another rate"


@pytest.mark.parametrize(("clip", "kept"), [(0.0, 1.0), (10.0, 1.0), (0.5, 0.25)])
def test_gradient_norm_is_reported_before_global_clipping(clip, kept):
    """Two weights of gradient 2 / sqrt(2) each have norm 2."""

    def loss_fn(params, tokens, key):
        total = sum(jnp.sum(leaf) for leaf in params.values()) * 2 / np.sqrt(2)
        return LossSums(total, jnp.float32(0), jnp.float32(1))

    sgd = optax.sgd(1.0)
    config = make_config(optim={"grad_clip": clip, "schedule": "constant", "warmup_steps": 0})
    step = make_train_step(loss_fn, sgd, make_schedule(config.optim, 10), config=config, parallel=ONE_DEVICE)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    state, metrics = step(TrainState(jnp.int32(0), params, sgd.init(params)), jnp.zeros((1, 1, 2), jnp.int32))
    assert float(metrics["grad_norm"]) == pytest.approx(2.0, rel=1e-6)
    assert float(metrics["update_norm"]) == pytest.approx(2.0 * kept * 1e-2, rel=1e-5)
    np.testing.assert_allclose(vector(state.params), -1e-2 * kept * np.sqrt(2) * np.ones(2), rtol=1e-5)


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_state_computed_apart_is_the_same(clip):
    """With the same gradients: AdamW would make a full step of the rounding of a gradient that is zero."""
    rng = np.random.default_rng(0)
    shapes = {"wte/embedding": (5, 4), "h/mlp/c_fc/kernel": (2, 4, 8), "ln_f/scale": (4,)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    slopes = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    def loss_fn(params, tokens, key):
        total = sum(jnp.sum(leaf * slopes[name]) for name, leaf in params.items())
        return LossSums(total, jnp.float32(0), jnp.float32(1))

    config = make_config(optim={"grad_clip": clip})
    results = []
    for separate_state in (False, True):
        step = jax.jit(make_step(config, loss_fn, separate_state=separate_state))
        state = make_state(config, params)
        for _ in range(3):
            state, metrics = step(state, make_tokens(1, 2))
        results.append([state.params, *jax.tree.leaves(state.opt_state), metrics["update_norm"]])
    for one, other in zip(*results, strict=True):
        assert_near(one, other, 1e-6)


def test_z_loss_is_trained_on_but_not_reported():
    def loss_fn(params, tokens, key):
        w = params["wte/embedding"][0]
        return LossSums(3.0 * w, w**2, jnp.float32(1))

    for weight, norm in ((0.0, 3.0), (0.5, 3.0 + 0.5 * 2 * 2.0)):
        config = make_config(optim=UNCLIPPED, train={"num_steps": 10, "log_every": 1, "z_loss": weight})
        _, _, metrics = run_stub(config, [[[1, 1]]], loss_fn)
        assert float(metrics["loss"]) == pytest.approx(6.0)
        assert float(metrics["grad_norm"]) == pytest.approx(norm)


# What is not finite


def poisoned(params, tokens, key):
    """Token 1 makes the loss infinite, token 2 the gradient only (of a square root at 0), token 3 the loss a NaN."""
    w, token = params["wte/embedding"][0], tokens[0, 0]
    loss = jnp.where(token == 1, jnp.inf, 0.0) + jnp.where(token == 3, jnp.nan, 0.0) + w
    root = jnp.sqrt(jnp.where(token == 2, 0.0 * w, 1.0 + 0.0 * w))
    return LossSums(loss + root, jnp.float32(0), jnp.float32(1))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("token", [1, 2, 3])
def test_nonfinite_step_changes_only_the_step_count(token, optimizer):
    config = make_config(optim={"name": optimizer})
    params = {"wte/embedding": jnp.asarray([2.0, 0.5]), "h/mlp/c_fc/kernel": jnp.ones((1, 2, 2))}
    good, after_good, good_metrics = run_stub(config, [[[0, 0]]], poisoned, params)
    assert good_metrics["finite"] == 1
    assert not np.array_equal(vector(after_good.params), vector(good.params))
    step = make_step(config, poisoned)
    state, metrics = step(after_good, jnp.asarray([[[0, 0]], [[token, 0]]]))
    assert float(metrics["finite"]) == 0
    assert bool(jnp.isfinite(metrics["loss"])) == (token == 2)
    assert not bool(jnp.isfinite(metrics["grad_norm"])) or token != 2
    assert state.step == after_good.step + 1 == 2
    before, after = ((s.params, s.opt_state) for s in (after_good, state))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_overflowing_update_is_not_applied():
    """Loss and gradient are fine; the learning rate is not."""
    config = make_config(optim={"peak_lr": 3e38, "min_lr": 0.0, "warmup_steps": 0, "schedule": "constant"})
    old, new, metrics = run_stub(config, [[[0, 0]]], poisoned, {"wte/embedding": jnp.asarray([2.0, 0.5])})
    assert bool(jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"]))
    assert not bool(jnp.isfinite(metrics["update_norm"]))
    assert float(metrics["finite"]) == 0
    np.testing.assert_array_equal(vector(new.params), vector(old.params))


def test_nan_parameter_makes_the_step_nonfinite():
    params = gpt_params() | {"ln_f": jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), gpt_params()["ln_f"])}
    state = make_state(make_config(), params, optimizer=MOMENTUM)
    new_state, metrics = compiled_gpt_step(**OPTIONS["accumulated, chunked"])(state, jnp.asarray(make_tokens(2, 4)))
    assert float(metrics["finite"]) == 0
    np.testing.assert_array_equal(vector(new_state.params), vector(params))


def test_a_batch_without_targets_changes_nothing():
    state = gpt_state()
    new_state, metrics = compiled_gpt_step(**OPTIONS["accumulated, chunked"])(state, jnp.full((2, 4, 9), -1, jnp.int32))
    assert float(metrics["tokens"]) == 0
    assert float(metrics["finite"]) == 0
    np.testing.assert_array_equal(vector(new_state.params), vector(state.params))


# The dropout key


def test_dropout_keys_differ_between_micro_batches_steps_and_seeds():
    """The gradient is a uniform number drawn from the key, so that gradients tell keys apart."""

    def loss_fn(params, tokens, key):
        assert key is not None
        return LossSums(params["wte/embedding"][0] * jax.random.uniform(key), jnp.float32(0), jnp.float32(1))

    def drawn(A, step=0, seed=0):
        """Returns the sum over the micro-batches."""
        train = {"num_steps": 10, "log_every": 1, "seed": seed}
        config = make_config(model=MODEL | {"dropout": 0.1}, optim=UNCLIPPED, train=train)
        _, _, metrics = run_stub(config, np.zeros((A, 1, 2), np.int32), loss_fn, step=step)
        return float(metrics["grad_norm"]) * A

    first = drawn(1)
    draws = [first, drawn(2) - first, drawn(3) - drawn(2), drawn(1, step=1), drawn(1, step=2), drawn(1, seed=1)]
    draws.append(drawn(2, step=1) - drawn(1, step=1))
    assert drawn(1) == first
    assert all(0 < draw < 1 for draw in draws)
    assert min(abs(a - b) for i, a in enumerate(draws) for b in draws[:i]) > 1e-3


def test_loss_gets_no_key_without_dropout():
    keys = []

    def loss_fn(params, tokens, key):
        keys.append(key)
        return stub_loss_fn(params, tokens, key)

    run_stub(make_config(), [[[1, 1]]], loss_fn)
    assert keys == [None]


# The model's own step

OPTIONS = {
    "plain": {},
    "accumulated, chunked": {"A": 2, "loss_chunk": 4},
    "accumulated one by one, remat": {"A": 8, "remat": "full"},
    "all, not flat": {"A": 4, "remat": "dots", "scan_unroll": 2, "loss_chunk": 2, "flatten_tokens": False},
}


# Not AdamW: it would divide the key bias's gradient, which is nothing but rounding, by its own size.
MOMENTUM = optax.sgd(1.0, momentum=0.9)


def gpt_state():
    return make_state(make_config(), gpt_params(), optimizer=MOMENTUM)


@functools.cache
def traced_gpt_step(A=1, loss_chunk=0, **compute):
    config = make_config(compute={"loss_chunk": loss_chunk}, optim={"peak_lr": 0.5})
    step = make_step(config, gpt_loss_fn(config, **compute), MOMENTUM)
    return jit(step).trace(gpt_state(), weighted_tokens(A))


@functools.cache
def compiled_gpt_step(**options):
    return traced_gpt_step(**options).lower().compile()


def weighted_tokens(A):
    """The same eight rows in A micro-batches; most targets of the first row, and some of others, have weight 0."""
    tokens_BT = make_tokens(8)
    tokens_BT[0, 2:] = tokens_BT[5, 6:] = -1
    return jnp.asarray(tokens_BT.reshape(A, 8 // A, 9))


@functools.cache
def gpt_updates(name):
    """Returns the state and metrics after two updates."""
    state, tokens_ABT = gpt_state(), weighted_tokens(OPTIONS[name].get("A", 1))
    for _ in range(2):
        state, metrics = compiled_gpt_step(**OPTIONS[name])(state, tokens_ABT)
    return state, metrics


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "plain"])
def test_no_option_changes_the_update(name):
    assert str(traced_gpt_step().jaxpr) != str(traced_gpt_step(**OPTIONS[name]).jaxpr)
    (plain, plain_metrics), (state, metrics) = gpt_updates("plain"), gpt_updates(name)
    assert float(plain_metrics["tokens"]) == 8 * 8 - 7 - 3
    for key in METRICS:
        assert float(metrics[key]) == pytest.approx(float(plain_metrics[key]), rel=1e-5), key
    assert np.linalg.norm(vector(plain.params) - vector(gpt_params())) > 0.1
    assert_near(state.params, plain.params)
    assert_near(state.opt_state, plain.opt_state)


def test_many_steps_at_once_equal_single_steps():
    config = make_config()
    step = make_step(config, stub_loss_fn)
    batches = jnp.asarray(np.random.default_rng(0).integers(1, 9, size=(3, 2, 4, 2)), jnp.int32)
    first = state = make_state(config, {"wte/embedding": jnp.asarray([2.0, 0.5])})
    many = jit(make_multi_step(step))
    last, metrics = many(state, Batches(batches, jnp.int32(3)))
    assert {value.shape for value in metrics.values()} == {(3,)}
    assert len(set(np.asarray(metrics["lr"]).tolist())) == 3
    fewer, first_metrics = many(state, Batches(batches, jnp.int32(2)))
    assert int(fewer.step) == 2
    np.testing.assert_array_equal(first_metrics["loss"], [*metrics["loss"][:2], 0.0])
    single = []
    for tokens_ABT in batches:
        state, measured = step(state, tokens_ABT)
        single.append(measured)
    for name in METRICS:
        np.testing.assert_allclose(metrics[name], [m[name] for m in single], rtol=1e-5, err_msg=name)
    assert int(last.step) == 3
    assert not np.array_equal(vector(last.params), vector(first.params))
    assert_near(last, state)


# The loss function and evaluation


@functools.cache
def eval_step(document_mask=False, eot_position="last"):
    config = make_config(data={"document_mask": document_mask})
    loss_fn = make_loss_fn(GPT(config.model), config, eot=EndOfText(EOT, eot_position))
    return jit(make_eval_step(loss_fn, config, parallel=ONE_DEVICE, eot=EndOfText(EOT, eot_position)))


def test_evaluation_sums_losses_tokens_and_bytes():
    bytes_V = jnp.arange(100, 120)
    tokens_ABT = weighted_tokens(4)
    sums, size = eval_step()(gpt_params(), tokens_ABT, bytes_V)
    targets = np.asarray(tokens_ABT)[:, :, 1:]
    counted = targets[targets >= 0]
    assert float(sums.tokens) == counted.size == 54
    assert size.dtype == jnp.float32
    assert float(size) == (100 + counted).sum()
    assert_near(sums.loss / sums.tokens, first_loss())


def first_loss():
    _, metrics = compiled_gpt_step()(gpt_state(), weighted_tokens(1))
    return metrics["loss"]


@pytest.mark.parametrize(("eot_position", "counts"), [("last", (4, 3)), ("first", (4, 4))])
def test_masked_documents_are_predicted_independently(eot_position, counts):
    """With the mask, the loss of two documents in a row is the sum of each one's in a row of its own."""
    row_T = make_tokens(1)[0]
    row_T[row_T == EOT] = EOT + 1
    row_T[4] = EOT
    second = 5 if eot_position == "last" else 4
    nothing = np.full(9, -1)
    rows = [row_T, np.concatenate([row_T[:5], nothing])[:9], np.concatenate([row_T[second:], nothing])[:9]]
    evaluate = eval_step(True, eot_position)
    whole, *apart = (evaluate(gpt_params(), jnp.int32(row[None, None]), jnp.ones(20, jnp.int32))[0] for row in rows)
    assert tuple(int(sums.tokens) for sums in apart) == counts
    assert int(whole.tokens) == sum(counts)
    assert float(whole.loss) == pytest.approx(sum(float(sums.loss) for sums in apart), rel=1e-5)
    unmasked, _ = eval_step()(gpt_params(), jnp.int32(row_T[None, None]), jnp.ones(20, jnp.int32))
    assert abs(float(unmasked.loss - whole.loss)) > 1e-2


@pytest.mark.parametrize(("document_mask", "targets"), [(False, 2), (True, 1)])
def test_bytes_and_losses_count_the_same_targets(document_mask, targets):
    """Bits per byte divides one by the other."""
    tokens_ABT = jnp.full((1, 1, 9), -1, jnp.int32).at[0, 0, :3].set(jnp.asarray([1, EOT, 4]))
    evaluate = eval_step(document_mask)
    sums, size = evaluate(gpt_params(), jnp.broadcast_to(tokens_ABT, (4, 2, 9)), jnp.full(20, 7))
    assert float(size) == 7 * float(sums.tokens) == 7 * targets * 8


# The parts of the step that gptjax.replay looks at


@pytest.mark.thorough
@pytest.mark.parametrize("chunk", [0, 4])
def test_token_losses_and_gradient_equal_those_of_the_step(chunk):
    """With another dropout mask in each micro-batch, tokens that do not count, at a step that is not the first."""
    changes = {"data": {"document_mask": True}, "compute": {"loss_chunk": chunk}}
    config = make_config(model=MODEL | {"dropout": 0.3}, **changes)
    loss_fn = gpt_loss_fn(config)
    tokens_ABT = jnp.asarray(np.concatenate([make_tokens(1, 4)] * 2))
    state = make_state(config, gpt_params(), step=3, optimizer=optax.identity())
    _, metrics = jit(make_step(config, loss_fn, optax.identity()))(state, tokens_ABT)
    token_loss_fn = jit(make_token_loss_fn(GPT(config.model, ResolvedCompute()), config, eot=EndOfText(EOT, "last")))
    losses_ABT = np.asarray(token_loss_fn(state.params, tokens_ABT, state.step))
    counted = losses_ABT != NOT_COUNTED
    assert 0 < (~counted).sum() == (np.asarray(tokens_ABT)[..., :-1] == EOT).sum()
    assert counted.sum() == float(metrics["tokens"])
    assert losses_ABT[counted].mean() == pytest.approx(float(metrics["loss"]), rel=1e-6)
    assert not np.allclose(losses_ABT[0], losses_ABT[1], rtol=1e-2), "the same tokens with other masks"
    elsewhere = np.asarray(token_loss_fn(state.params, tokens_ABT, jnp.int32(4)))
    assert not np.allclose(elsewhere, losses_ABT, rtol=1e-2), "and at another step"

    gradient_fn = jit(make_gradient_fn(loss_fn, config=config, parallel=ONE_DEVICE))
    grads, sums = gradient_fn(state.params, tokens_ABT, state.step)
    assert float(optax.tree.norm(grads)) == pytest.approx(float(metrics["grad_norm"]), rel=1e-6)
    assert float(sums.loss / sums.tokens) == pytest.approx(float(metrics["loss"]), rel=1e-6)


def test_a_dispatch_of_several_steps_traces_the_step_once():
    traces = []

    def one(state, tokens_ABT):
        traces.append(tokens_ABT.shape)
        return state + jnp.sum(tokens_ABT), {"loss": state * 1.0}

    batches = Batches(jnp.ones((3, 1, 2, 4), jnp.int32), jnp.int32(2))
    state, metrics = jax.jit(make_multi_step(one))(jnp.int32(5), batches)
    assert traces == [(1, 2, 4)]
    assert int(state) == 5 + 2 * 8
    np.testing.assert_array_equal(metrics["loss"], [5.0, 13.0, 0.0])
