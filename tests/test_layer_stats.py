"""Statistics of each layer: their values, that they are the same on any mesh and after a kill, and where they go."""

import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from gptjax import layer_stats
from gptjax import step as step_module
from gptjax.collectives import ONE_DEVICE
from gptjax.compute import ResolvedCompute
from gptjax.config import from_dict
from gptjax.divergence import RollBackError
from gptjax.documents import EndOfText
from gptjax.goodput import Stopwatch
from gptjax.history import History
from gptjax.layer_stats import UPDATE_STATS, as_row, make_stats_step, part_names
from gptjax.loop import Loop, _Pending
from gptjax.model import GPT
from gptjax.optim import make_optimizer, make_schedule
from gptjax.setup import train_step_hash
from gptjax.state import TrainState
from gptjax.step import make_loss_fn, make_train_step
from tests import reference_gpt2
from tests.helpers import jit, random_params
from tests.runs import copy_until, losses, make_run_on, rows

MODEL = {"block_size": 16, "vocab_size": 40, "n_layer": 3, "n_head": 2, "n_embd": 16}
EOT = EndOfText(3, "last")
LAYERS = ["h0", "h1", "h2"]


def make_config(**sections):
    optim = {"warmup_steps": 1, "peak_lr": 1e-2, "grad_clip": 0.01}
    train = {"num_steps": 10, "log_every": 1, "stats_every": 1}
    sections["model"] = MODEL | sections.get("model", {})
    return from_dict({"optim": optim, "train": train} | sections)


def rms(*arrays):
    squares = np.concatenate([np.square(np.asarray(x, np.float64)).ravel() for x in arrays])
    return math.sqrt(squares.mean())


def unpadded(tree, config):
    """`tree` without the rows that pad the vocabulary."""
    tree = tree | {"wte": {"embedding": tree["wte"]["embedding"][: config.vocab_size]}}
    if "lm_head" in tree:
        tree["lm_head"] = {"kernel": tree["lm_head"]["kernel"][:, : config.vocab_size]}
    return tree


def parts_rms(tree, config):
    """The RMS of each part, without padding."""
    found = {}
    for layer in range(config.n_layer):
        found[f"h{layer}"] = rms(*(leaf[layer] for leaf in jax.tree.leaves(tree["h"])))
    others = {name: jax.tree.leaves(part) for name, part in unpadded(tree, config).items() if name != "h"}
    return found | {name: rms(*others[name]) for name in ("wte", "wpe", "ln_f", "lm_head") if name in others}


def named(statistic, values):
    return {f"stats/{statistic}/{part}": value for part, value in values.items()}


def batch(config, *shape):
    return np.random.default_rng(0).integers(config.vocab_size, size=(*shape, 17)).astype(np.int32)


@pytest.mark.parametrize("sections", [{}, {"data": {"document_mask": True}}, {"model": {"tie_embeddings": False}}])
def test_forward_pass_is_that_of_numpy(sections, monkeypatch):
    """Over two micro-batches, and in blocks of queries that do not divide the sequence."""
    monkeypatch.setattr(layer_stats, "QUERY_BLOCK", 5)
    config = make_config(**sections)
    params = random_params(config.model)
    tokens_ABT = batch(config.model, 2, 4)
    stats_step = make_stats_step(GPT(config.model, ResolvedCompute()), config, eot=EOT)
    found = as_row(jit(stats_step)(params, tokens_ABT), config.model)
    inputs_BT = tokens_ABT[:, :, :-1].reshape(-1, 16)
    starts_BT = None
    if config.data.document_mask:
        starts_BT = np.roll(inputs_BT == EOT.id, 1, axis=1)
        starts_BT[:, 0] = True
    scores, streams = reference_gpt2.largest_scores(params, inputs_BT, n_head=2, document_starts_BT=starts_BT)
    stream_rms = dict(zip(["embedding", *LAYERS], map(rms, streams), strict=True))
    expected = named("param_rms", parts_rms(params, config.model))
    expected |= named("residual_rms", stream_rms)
    expected |= named("attention_logit", dict(zip(LAYERS, scores, strict=True)))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("positions", [1, 5, 16, 18])
@pytest.mark.parametrize("documents", [True, False])
def test_largest_logit_is_of_a_key_that_may_be_seen(positions, documents, monkeypatch):
    """Keys are longer the later they come, so that a masked pair would have the largest score."""
    monkeypatch.setattr(layer_stats, "QUERY_BLOCK", 5)
    rng = np.random.default_rng(positions)
    qkv_BT3D = rng.standard_normal((8, positions, 3, 16)).astype(np.float32)
    qkv_BT3D[:, :, 1] *= 1 + np.arange(positions)[None, :, None] ** 2
    segments_BT = np.cumsum(rng.random((8, positions)) < 0.3, axis=1).astype(np.int32) if documents else None
    found = layer_stats._largest_logit(jnp.asarray(qkv_BT3D), segments_BT, head_width=8)
    q_BTNH, k_BSNH = (qkv_BT3D[:, :, part].reshape(8, positions, 2, 8) for part in (0, 1))
    scores_BNTS = np.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / math.sqrt(8)
    mask_BTS = np.tril(np.ones((1, positions, positions), bool))
    if documents:
        mask_BTS = mask_BTS & (segments_BT[:, :, None] == segments_BT[:, None, :])
    assert found == pytest.approx(scores_BNTS[np.broadcast_to(mask_BTS[:, None], scores_BNTS.shape)].max(), rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_and_updates_are_those_of_numpy(tied):
    """Gradients before clipping, which here shortens them; updates are the change of the parameters."""
    config = make_config(model={"tie_embeddings": tied})
    params = random_params(config.model)
    tokens_ABT = batch(config.model, 1, 4)
    optimizer = make_optimizer(config.optim)
    loss_fn = make_loss_fn(GPT(config.model, ResolvedCompute()), config, eot=EOT)
    schedule = make_schedule(config.optim, 10)
    step = make_train_step(loss_fn, optimizer, schedule, config=config, parallel=ONE_DEVICE)
    state = TrainState(jnp.int32(1), params, optimizer.init(params))
    new_state, metrics = jit(step)(state, tokens_ABT)
    found = as_row(metrics[UPDATE_STATS], config.model)
    true_params = unpadded(params, config.model)  # so that no probability goes to padding
    _, gradients = reference_gpt2.loss_and_grads(true_params, tokens_ABT[0, :, :-1], tokens_ABT[0, :, 1:], n_head=2)
    changes = jax.tree.map(lambda new, old: np.float64(new) - np.float64(old), new_state.params, params)
    expected = named("grad_rms", parts_rms(gradients, config.model))
    expected |= named("update_rms", parts_rms(changes, config.model))
    assert found == pytest.approx(expected, rel=1e-4)
    assert list(found)[: len(part_names(config.model))] == list(named("grad_rms", parts_rms(params, config.model)))
    assert metrics["grad_norm"] == pytest.approx(np.linalg.norm(ravel_pytree(gradients)[0]), rel=1e-5)
    assert metrics["update_norm"] == pytest.approx(np.linalg.norm(ravel_pytree(changes)[0]), rel=1e-4)


def observe(lab, devices, **sections):
    """Returns the row of statistics after the first update of a run on `devices` devices."""
    run = make_run_on(lab.config(train={"micro_batch_size": 2, "stats_every": 1}, **sections), devices=devices)
    tokens_ABT = run.batch(0)
    state, metrics = run.train_step(run.init(), tokens_ABT)
    found = run.stats_step(state.params, tokens_ABT)
    assert all(array.sharding.is_fully_replicated for array in jax.tree.leaves((metrics, found)))
    return as_row(metrics[UPDATE_STATS] | found, run.config.model)


def test_statistics_do_not_depend_on_the_mesh(lab):
    """Nor on the number of micro-batches: 4 on one device, 1 on eight devices."""
    model = {"dropout": 0.0}
    one = observe(lab, 1, model=model)
    eight = observe(lab, 8, model=model, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    assert eight == pytest.approx(one, rel=1e-5)
    assert len(one) == 3 * 5 + 3 + 2


def test_without_them_nothing_is_added(lab, monkeypatch):
    off, on = (make_run_on(lab.config(train={"stats_every": every})) for every in (0, 4))
    assert off.stats_step is None
    _, metrics = off.train_step(off.init(), off.batch(0))
    assert UPDATE_STATS not in metrics
    program = train_step_hash(off)
    assert program != train_step_hash(on)
    # The step as it was before there were statistics.
    monkeypatch.setattr(step_module, "norm_and_rms", lambda tree, _: (optax.tree.norm(tree), None))
    assert program == train_step_hash(make_run_on(off.config))


def test_logit_that_is_no_number_is_none_on_a_mesh(lab):
    """jax.lax.pmax leaves NaN out."""
    run = make_run_on(lab.config(mesh={"data": 2}, train={"stats_every": 1, "micro_batch_size": 0}), devices=2)
    state = run.init()
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), state.params["h"]["attn"])
    params = state.params | {"h": state.params["h"] | {"attn": broken}}
    assert np.isnan(np.asarray(run.stats_step(params, run.batch(0))["attention_logit"])).all()


def test_sum_by_layers_copies_no_table(lab):
    """A slice of the whole vocabulary would, as it would cut through the shards of `tensor`."""
    run = make_run_on(lab.config(mesh={"data": 1, "tensor": 2}, train={"stats_every": 1}), devices=2)
    function = jax.jit(lambda tree: layer_stats.norm_and_rms(tree, run.config))
    compiled = function.lower(run.abstract_state.params).compile()
    table = run.abstract_state.params["wte"]["embedding"]
    assert compiled.memory_analysis().temp_size_in_bytes < table.size * 4 / 2
    assert "all-gather" not in compiled.as_text()


# Runs


@pytest.fixture(scope="module")
def observed(lab, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("stats") / "run"
    lab.train(workdir, "train.stats_every=4", "checkpoint.keep=8")
    return workdir


def statistics(workdir):
    return {row.pop("step"): row for row in rows(workdir) if any(name.startswith("stats/") for name in row)}


def test_run_reports_them_at_their_steps(observed, reference):
    found = statistics(observed)
    assert list(found) == [4, 8, 12, 16]
    names = {name.rpartition("/")[0].removeprefix("stats/") for name in found[4]}
    assert names == {"grad_rms", "update_rms", "param_rms", "residual_rms", "attention_logit"}
    assert all(value > 0 for row in found.values() for value in row.values())
    metrics = [{row["step"]: row["loss"] for row in rows(run) if "loss" in row} for run in (observed, reference)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)


@pytest.mark.parametrize("fault", ["step:11:kill", "save:2:kill"])
def test_killed_run_reports_the_same(observed, lab, tmp_path, fault):
    settings = ["train.stats_every=4", "checkpoint.keep=8"]
    lab.train(tmp_path / "run", *settings, expect=-9, GPTJAX_FAULT=fault)
    lab.train(tmp_path / "run", *settings)
    assert statistics(tmp_path / "run") == statistics(observed)
    assert losses(tmp_path / "run") == losses(observed)


def test_update_of_a_run_with_statistics_is_replayed(observed, lab, tmp_path):
    module = [sys.executable, "-m", "gptjax.replay", f"--workdir={observed}", f"--out={tmp_path}/page.html"]
    assert "equal to metrics.jsonl, bit for bit" in lab.call([*module, "--step=11"]).stdout


class Recorder:
    """As much of a Reporter as the loop needs here."""

    def __init__(self):
        self.watch, self.rows = Stopwatch(), {}

    def report_step(self, step, row, *, skipped):
        pass

    def report_stats(self, step, row):
        self.rows[step] = row


def drain(recorder, loss, policy):
    """Has a loop process a dispatch that ended at step 8, and returns the rows of statistics so far."""
    config = from_dict({"model": MODEL, "train": {"nan_policy": policy, "log_every": 7}})
    values = np.full(len(part_names(config.model)), loss)
    metrics = {"loss": [loss], "grad_norm": [1.0], "update_norm": [1.0], "finite": [float(np.isfinite(loss))]}
    metrics[UPDATE_STATS] = {"grad_rms": values, "update_rms": values}
    tools = types.SimpleNamespace(
        workdir="runs/x",
        stop_vote=types.SimpleNamespace(result=lambda answer: False),
        watchdog=types.SimpleNamespace(beat=lambda: None),
        watch=recorder.watch,
        checkpointer=types.SimpleNamespace(steps=list),
    )
    run = types.SimpleNamespace(config=config, train_data=None)
    state = types.SimpleNamespace(step=7)
    loop = Loop(run, tools, state=state, history=History(), reporter=recorder, prefetcher=None, compiled=True)
    loop._pending = _Pending(7, 8, metrics, None, {"attention_logit": np.array([1.0, 2.0, 3.0])})
    loop._drain_pending()
    return recorder.rows


def test_undone_steps_report_no_statistics():
    recorder = Recorder()
    with pytest.raises(RollBackError):
        drain(recorder, math.nan, "rollback")
    assert recorder.rows == {}
    assert math.isnan(drain(recorder, math.nan, "skip")[8]["stats/grad_rms/h0"])
    assert drain(recorder, 2.0, "rollback")[8]["stats/grad_rms/ln_f"] == 2.0
    assert recorder.rows[8]["stats/attention_logit/h2"] == 3.0


def test_several_steps_per_dispatch_report_the_last(observed, lab, tmp_path):
    """Of dispatches that end at the steps 1, 3, 4, 6, 8, 9, 12, and so on."""
    lab.train(tmp_path / "run", "train.stats_every=4", "train.log_every=3")
    assert statistics(tmp_path / "run") == statistics(observed)
    assert list(statistics(tmp_path / "run")) == [4, 8, 12, 16]


def test_run_may_begin_to_report_them(reference, lab, tmp_path):
    workdir = copy_until(reference, tmp_path / "run", 8)
    lab.train(workdir, "train.stats_every=4", "checkpoint.keep=8")
    assert list(statistics(workdir)) == [12, 16]
