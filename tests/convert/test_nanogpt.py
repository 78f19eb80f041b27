"""nanoGPT's checkpoints, against a model with its module names, and an optimizer made as its train.py does."""

import dataclasses
import functools
import os
import pickle
import pickletools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint import Checkpointer
from gptjax.collectives import ONE_DEVICE
from gptjax.config import Config, GPTConfig, OptimConfig, from_dict
from gptjax.convert import __main__ as command
from gptjax.convert import formats, nanogpt, nanogpt_run
from gptjax.convert.beside import GPT2_SHA256
from gptjax.convert.weights import read_tensors
from gptjax.data.tokenizer import load_tokenizer
from gptjax.documents import EndOfText
from gptjax.errors import ConfigError, DataError
from gptjax.model import GPT
from gptjax.optim import make_optimizer as make_optax
from gptjax.optim import make_schedule
from gptjax.sharding import make_mesh
from gptjax.state import TrainState, make_init
from gptjax.step import make_loss_fn, make_train_step
from tests.convert.models import CONFIG, make_tensors, write_hf
from tests.helpers import raises

torch = pytest.importorskip("torch")

from tests.convert.nanogpt_model import ARGS, Model, make_optimizer, save, train  # noqa: E402

pytestmark = pytest.mark.torch

LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def read(directory):
    """Returns the Weights of the directory's ckpt.pt."""
    return nanogpt.read(f"{directory}/ckpt.pt", origin="")


BATCHES = np.random.default_rng(0).integers(0, 50, (50, 4, 9))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(a ckpt.pt of step 0, the losses of nanoGPT's function in 50 steps from there); gradients are clipped."""
    torch.manual_seed(0)
    model = Model(ARGS)
    with torch.no_grad():
        for weight in model.parameters():  # far from initialization, where the two forms of GELU differ
            weight.add_(0.3 * torch.randn(weight.shape))
    path = tmp_path_factory.mktemp("nanogpt") / "ckpt.pt"
    save(path, model, ARGS, iter_num=0)
    return path, train(model, make_optimizer(model), BATCHES)


OPTIM = OptimConfig(schedule="constant", warmup_steps=0, peak_lr=6e-4)


@functools.cache
def make_step(model, optim=OPTIM):
    """gptjax's train step with the settings of nanoGPT's optimizer, at a constant rate, and its optimizer."""
    config = Config(model=model, optim=optim)
    loss_fn = make_loss_fn(GPT(config.model), config, eot=EndOfText(49, "last"))
    optimizer, schedule = make_optax(config.optim), make_schedule(config.optim, 50)
    return jax.jit(make_train_step(loss_fn, optimizer, schedule, config=config, parallel=ONE_DEVICE)), optimizer


def train_gptjax(model, state, optim=OPTIM):
    """The losses of BATCHES from `state` on."""
    step, _ = make_step(model, optim)
    losses = []
    for batch in BATCHES[int(state.step) :]:
        state, metrics = step(state, jnp.asarray(batch[None], jnp.int32))
        losses.append(float(metrics["loss"]))
    return losses


def test_50_training_steps_have_the_losses_of_nanogpt(trained):
    path, expected = trained
    weights = formats.open_weights(formats.ModelRef("nanogpt", str(path)))
    params = formats.load_params(weights, lambda path, leaf: jnp.asarray(leaf))
    losses = {}
    for activation in ("gelu", "gelu_new"):
        model = dataclasses.replace(weights.config, activation=activation)
        opt_state = make_step(model)[1].init(params)
        losses[activation] = train_gptjax(model, TrainState(jnp.int32(0), params, opt_state))
    assert expected[-1] < expected[0] - 0.5, "it learns"
    assert weights.config.activation == "gelu"
    np.testing.assert_allclose(losses["gelu"], expected, rtol=0, atol=1e-5)
    assert np.abs(np.subtract(losses["gelu_new"], expected)).max() > 1e-4


SETTINGS = {"learning_rate": 6e-4, "weight_decay": 0.2, "beta1": 0.8, "beta2": 0.9, "grad_clip": 0.5}
RUN = SETTINGS | {"decay_lr": False, "max_iters": 50, "warmup_iters": 0, "batch_size": 2}
RUN |= {"gradient_accumulation_steps": 2, "min_lr": 1e-5, "dataset": "x"}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """(a ckpt.pt after 20 of 50 steps with SETTINGS, the losses of the steps after it by nanoGPT's function)."""
    torch.manual_seed(1)
    model = Model(ARGS)
    optimizer = make_optimizer(model, SETTINGS)
    train(model, optimizer, BATCHES[:20], grad_clip=0.5)
    path = tmp_path_factory.mktemp("interrupted") / "ckpt.pt"
    save(path, model, ARGS, optimizer=optimizer, iter_num=20, config=RUN)
    return path, train(model, optimizer, BATCHES[20:], grad_clip=0.5)


def test_training_resumes_with_the_moments_of_nanogpt(interrupted, tmp_path, said):
    path, expected = interrupted
    command.main([f"--from=nanogpt:{path}", f"--to=gptjax:{tmp_path}/run", "--tokenizer=bytes"])
    assert any("moments of step 20 are kept" in line for line in said)
    record = Checkpointer(f"{tmp_path}/run").read_record(20)
    config = from_dict(record.config)
    optim = config.optim
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.grad_clip) == (0.8, 0.9, 0.2, 0.5)
    assert (optim.peak_lr, optim.min_lr, optim.schedule, optim.warmup_steps) == (6e-4, 1e-5, "constant", 0)
    assert (config.train.num_steps, config.data.global_batch_size) == (50, 4)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    abstract, _ = make_init(GPT(config.model), make_optax(optim), mesh=mesh, seed=0)
    state, _ = Checkpointer(f"{tmp_path}/run").restore_latest(abstract)
    assert (int(state.step), int(state.opt_state[0].count)) == (20, 20)
    np.testing.assert_allclose(train_gptjax(config.model, state, optim), expected, rtol=0, atol=1e-5)
    fresh = TrainState(state.step, state.params, make_optax(optim).init(state.params))
    assert np.abs(np.subtract(train_gptjax(config.model, fresh, optim), expected)).max() > 1e-4, "moments matter"


def test_moments_and_settings_come_back_to_nanogpt(interrupted, tmp_path, said):
    path, expected = interrupted
    command.main([f"--from=nanogpt:{path}", f"--to=gptjax:{tmp_path}/run"])
    command.main([f"--from=gptjax:{tmp_path}/run", f"--to=nanogpt:{tmp_path}/back.pt"])
    command.main([f"--from=nanogpt:{path}", f"--to=nanogpt:{tmp_path}/direct.pt"])
    before = torch.load(path, weights_only=True)
    for name in ("back.pt", "direct.pt"):
        after = torch.load(tmp_path / name, weights_only=True)
        assert (after["iter_num"], after["best_val_loss"]) == (20, 2.5)
        assert {key: after["config"][key] for key in SETTINGS} == SETTINGS
        assert after["config"]["batch_size"] * after["config"]["gradient_accumulation_steps"] == 4
        assert list(after["model"]) == list(before["model"])
        model = Model(ARGS)
        model.load_state_dict(after["model"])
        optimizer = make_optimizer(model)  # its own settings, which those of the file replace
        optimizer.load_state_dict(after["optimizer"])
        for group, decay in zip(optimizer.param_groups, (0.2, 0.0), strict=True):
            assert (group["betas"], group["weight_decay"]) == ((0.8, 0.9), decay)
        for number, moments in before["optimizer"]["state"].items():
            for kind, value in moments.items():
                assert torch.equal(after["optimizer"]["state"][number][kind], value), (number, kind)
        assert train(model, optimizer, BATCHES[20:], grad_clip=0.5) == expected
    command.main([f"--from=nanogpt:{path}", f"--to=hf:{tmp_path}/hf"])
    assert any("moments are left out" in line for line in said)


def change_optimizer(change):
    def changed(saved):
        change(saved["optimizer"])
        return saved

    return changed


OTHER_OPTIMIZERS = {
    "another order": lambda saved: saved | {"model": dict(reversed(saved["model"].items()))},
    "no step": lambda saved: {name: value for name, value in saved.items() if name != "iter_num"},
    "SGD": change_optimizer(lambda it: it["state"].update({0: {"momentum_buffer": torch.ones(1)}})),
    "another shape": change_optimizer(lambda it: it["state"][3].update(exp_avg=torch.zeros(3))),
    "not a tensor": change_optimizer(lambda it: it["state"][3].update(exp_avg="x")),
    "other counts": change_optimizer(lambda it: it["state"][3].update(step=torch.tensor(19.0))),
    "no count": change_optimizer(lambda it: [moments.pop("step") for moments in it["state"].values()]),
    "a fraction": change_optimizer(lambda it: [moments.update(step=0.5) for moments in it["state"].values()]),
    "NaN": change_optimizer(lambda it: [moments.update(step=float("nan")) for moments in it["state"].values()]),
    "a parameter more": change_optimizer(lambda it: it["state"].update({99: it["state"][0]})),
    "a parameter less": change_optimizer(lambda it: it["state"].pop(27)),
    "AMSGrad": change_optimizer(lambda it: it["param_groups"][0].update(amsgrad=True)),
    "a flag of several values": change_optimizer(lambda it: it["param_groups"][1].update(amsgrad=torch.ones(2))),
    "a step of several values": lambda saved: saved | {"iter_num": torch.ones(2)},
    "no groups": change_optimizer(lambda it: it.update(param_groups=[])),
    "no betas": change_optimizer(lambda it: it["param_groups"][0].pop("betas")),
    "a list": lambda saved: saved | {"optimizer": [1]},
    "a list of states": change_optimizer(lambda it: it.update(state=[1])),
}


@pytest.mark.parametrize("name", OTHER_OPTIMIZERS)
def test_moments_of_another_optimizer_are_left_out(interrupted, tmp_path, name):
    saved = torch.load(interrupted[0], weights_only=True)
    torch.save(OTHER_OPTIMIZERS[name](saved), tmp_path / "ckpt.pt")
    weights = read(tmp_path)
    assert weights.adamw is None
    assert name == "no step" or any("moments are left out" in note for note in weights.notes)


def test_nan_in_a_moment_is_refused(interrupted, tmp_path):
    saved = torch.load(interrupted[0], weights_only=True)
    saved["optimizer"]["state"][5]["exp_avg_sq"][0, 1] = float("nan")
    torch.save(saved, tmp_path / "ckpt.pt")
    source, target = f"--from=nanogpt:{tmp_path}/ckpt.pt", f"--to=gptjax:{tmp_path}/run"
    with raises(DataError, f"nanogpt:{tmp_path}/ckpt.pt", remedy="--allow_nonfinite"):
        command.main([source, target])
    assert not (tmp_path / "run").exists()
    command.main([source, target, "--allow_nonfinite"])


HUGE = 10**400
UNHELD = {  # nanoGPT's settings, and how the note on those that are left out begins
    "text": ({"batch_size": "x"}, "batch_size='x'"),
    "a batch too large": ({"batch_size": HUGE}, "batch_size="),
    "negative": ({"max_iters": -1}, "max_iters=-1"),
    "a tensor": ({"decay_lr": torch.ones(2), "grad_clip": torch.ones(2)}, "grad_clip="),
    "a rate too large": ({"learning_rate": HUGE}, "learning_rate="),
    "NaN": ({"learning_rate": float("nan")}, "learning_rate=nan"),
    "a rate that rises": ({"decay_lr": True, "min_lr": 1e-3}, "min_lr=0.001"),
    "an earlier end": ({"decay_lr": True, "lr_decay_iters": 25}, "lr_decay_iters=25, because"),
}


@pytest.mark.parametrize("name", UNHELD)
def test_settings_without_a_place_are_named_and_others_kept(interrupted, tmp_path, said, name):
    changed, line = UNHELD[name]
    saved = torch.load(interrupted[0], weights_only=True)
    torch.save(saved | {"config": RUN | {"lr_decay_iters": 50} | changed}, tmp_path / "ckpt.pt")
    command.main([f"--from=nanogpt:{tmp_path}/ckpt.pt", f"--to=gptjax:{tmp_path}/run", "--dry_run"])
    assert sum(f"a setting of the run is left out: {line}" in each for each in said) == 1
    config = read(tmp_path).adamw.config
    assert (config.optim.beta1, config.optim.beta2, config.optim.weight_decay) == (0.8, 0.9, 0.2)
    assert config == from_dict(config.to_dict())


def test_settings_of_fine_tuning_with_nanogpt_are_kept(interrupted, tmp_path):
    """As in its finetune_shakespeare.py: a low constant rate, beside defaults for a rate that falls."""
    saved = torch.load(interrupted[0], weights_only=True)
    changed = {"learning_rate": 3e-5, "min_lr": 6e-5, "warmup_iters": 2000, "max_iters": 40, "lr_decay_iters": 600_000}
    torch.save(saved | {"config": RUN | changed}, tmp_path / "ckpt.pt")
    adamw = read(tmp_path).adamw
    rates = make_schedule(adamw.config.optim, adamw.config.train.num_steps)
    assert [float(rates(step)) for step in (0, 20, 39)] == [np.float32(3e-5)] * 3
    assert (adamw.config.optim.beta1, adamw.config.train.num_steps, adamw.left_out) == (0.8, 40, ())


@pytest.mark.parametrize(
    ("optim", "line"),
    [
        ({"schedule": "wsd"}, "optim.schedule=wsd"),
        ({"schedule": "constant", "warmup_steps": 21}, "optim.warmup_steps=21"),
        ({"schedule": "constant", "warmup_steps": 20}, ""),
        ({"schedule": "cosine"}, ""),
    ],
)
def test_schedules_that_nanogpt_lacks_are_named(optim, line):
    lines = nanogpt_run.settings_left_out(Config(optim=OptimConfig(**optim)), 20)
    assert (len(lines) == 1 and lines[0].startswith(line)) if line else lines == []


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("vocab_size", [50, 50304])
def test_nanogpt_checkpoint_is_read_with_config_and_tensors(tmp_path, prefix, bias, vocab_size):
    torch.manual_seed(0)
    args = ARGS | {"bias": bias, "vocab_size": vocab_size}
    model = Model(args)
    save(tmp_path / "ckpt.pt", model, args, prefix)
    weights = nanogpt.read(str(tmp_path / "ckpt.pt"), origin="nanogpt:ckpt.pt")
    assert weights.config == GPTConfig(8, vocab_size, 2, 2, 16, bias=bias, activation="gelu")
    found = dict(read_tensors(weights))
    for name, tensor in model.transformer.state_dict().items():
        expected = tensor.numpy().T if name.split(".", 2)[-1] in LINEAR else tensor.numpy()
        assert np.array_equal(found.pop(name), expected), name
    assert found == {}
    assert weights.history == {"step": 7, "val_loss": 2.5}


@pytest.mark.parametrize("loss", [1e9, float("nan"), torch.tensor(float("inf")), "2.5", None])
def test_missing_best_loss_is_exported_as_unknown(tmp_path, loss):
    """1e9 is what train.py starts with; NaN stays where a validation has diverged."""
    save(tmp_path / "a.pt", Model(ARGS), ARGS)
    saved = torch.load(tmp_path / "a.pt", weights_only=True) | {"best_val_loss": loss, "iter_num": 0}
    torch.save(saved, tmp_path / "a.pt")
    command.main([f"--from=nanogpt:{tmp_path}/a.pt", f"--to=hf:{tmp_path}/b"])
    card = (tmp_path / "b" / "README.md").read_text()
    assert "| validation loss | not known |" in card
    assert "| steps | 0 |" in card
    command.main([f"--from=nanogpt:{tmp_path}/a.pt", f"--to=nanogpt:{tmp_path}/c.pt"])
    assert torch.load(tmp_path / "c.pt", weights_only=True)["best_val_loss"] == 1e9


def test_causal_masks_of_old_checkpoints_are_left_out(tmp_path):
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(2)}
    save(tmp_path / "ckpt.pt", Model(ARGS), ARGS, **masks)
    assert len(read(tmp_path).tensors) == 28


@pytest.mark.parametrize(
    ("name", "problem"), [("ln_f.bias", r"ln_f\.bias occurs twice"), ("lm_head.weight", r"lm_head\.weight is not")]
)
def test_tensor_that_contradicts_another_is_refused(tmp_path, name, problem):
    """The bias with and without its prefix, and a head that is not the table it is tied to."""
    model = Model(ARGS)
    more = {"ln_f.bias": torch.zeros(16), "lm_head.weight": model.lm_head.weight + 1}
    save(tmp_path / "ckpt.pt", model, ARGS, **{name: more[name]})
    with raises(DataError, f"{tmp_path}/ckpt.pt", match=problem):
        read(tmp_path)


SCALARS = {"float64": np.float64(2.5), "float32": np.float32(2.5), "float16": np.float16(2.5)}


@pytest.mark.parametrize("kind", SCALARS)
def test_numpy_scalars_of_a_training_script_are_read(tmp_path, kind):
    sizes = {name: np.int64(ARGS[name]) for name in ("vocab_size", "n_embd")}
    arguments = ARGS | sizes | {"bias": np.bool_(ARGS["bias"]), "dropout": np.float32(0.25)}
    save(tmp_path / "ckpt.pt", Model(ARGS), arguments)
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=False)
    torch.save(saved | {"best_val_loss": SCALARS[kind], "iter_num": np.int32(9)}, tmp_path / "ckpt.pt")
    weights = read(tmp_path)
    assert weights.history == {"step": 9, "val_loss": 2.5}
    assert weights.config.vocab_size == 50
    assert (weights.config.bias, weights.config.dropout) == (ARGS["bias"], 0.25)


@pytest.mark.parametrize(
    "value", [np.zeros(1, object)[0:1], np.str_("x"), np.datetime64("2026-01-01"), np.complex64(1)]
)
def test_other_numpy_values_are_refused(tmp_path, value):
    save(tmp_path / "ckpt.pt", Model(ARGS), ARGS)
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    torch.save(saved | {"best_val_loss": value}, tmp_path / "ckpt.pt")
    with raises(DataError, f"{tmp_path}/ckpt.pt", match="nothing was run"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"bias": 1}, "bias=1, dropout=0.0"),
        ({"bias": None}, "bias=None"),
        ({"dropout": 1}, "dropout=1"),
        ({"n_head": "2"}, "n_head='2'"),
        ({"block_size": None}, "block_size=None"),
    ],
)
def test_invalid_model_args_are_refused(tmp_path, changed, problem):
    save(tmp_path / "ckpt.pt", Model(ARGS), ARGS | changed)
    field = f"{tmp_path}/ckpt.pt" if "dropout" in problem or "bias" in problem else f"{tmp_path}/ckpt.pt: model_args"
    with raises(DataError, field, match=problem):
        read(tmp_path)


def test_missing_bias_argument_means_a_model_with_biases(tmp_path):
    save(tmp_path / "ckpt.pt", Model(ARGS), {name: value for name, value in ARGS.items() if name != "bias"})
    assert read(tmp_path).config.bias


def test_nan_in_a_tied_table_is_reported_as_nonfinite(tmp_path):
    model = Model(ARGS)
    model.lm_head.weight.data[3, 4] = float("nan")
    save(tmp_path / "ckpt.pt", model, ARGS)
    with raises(DataError, remedy="--allow_nonfinite", match=r"\[3, 4\]"):
        dict(read_tensors(read(tmp_path)))


@pytest.fixture
def exported(tmp_path):
    """A ckpt.pt that was made from Hugging Face's form, as nanoGPT loads it."""
    tensors = write_hf(tmp_path / "hf", config=CONFIG | {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2})
    command.main([f"--from=hf:{tmp_path}/hf", f"--to=nanogpt:{tmp_path}/ckpt.pt"])
    return torch.load(tmp_path / "ckpt.pt", map_location="cpu", weights_only=True), tensors


def test_export_loads_into_a_nanogpt_model(exported):
    saved, tensors = exported
    assert set(saved) == {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
    assert saved["model_args"] == ARGS | {"dropout": 0.2}
    model = Model(saved["model_args"])
    assert model.load_state_dict(saved["model"]).missing_keys == []
    assert saved["model"]["lm_head.weight"].data_ptr() == saved["model"]["transformer.wte.weight"].data_ptr()
    weight = model.transformer["h"][1]["mlp"]["c_fc"].weight.detach().numpy()
    assert np.array_equal(weight, tensors["h.1.mlp.c_fc.weight"].T)


@pytest.mark.parametrize("bias", [True, False])
def test_exported_optimizer_state_loads_and_steps(tmp_path, bias):
    args = ARGS | {"bias": bias}
    save(tmp_path / "a.pt", Model(args), args)
    command.main([f"--from=nanogpt:{tmp_path}/a.pt", f"--to=nanogpt:{tmp_path}/b.pt"])
    saved = torch.load(tmp_path / "b.pt", weights_only=True)
    model = Model(saved["model_args"])
    model.load_state_dict(saved["model"])
    optimizer = make_optimizer(model)
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.state_dict()["state"] == {}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    model.lm_head.weight.sum().backward()
    before = model.lm_head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("bias", [True, False])
def test_round_trip_through_gptjax_keeps_tensors_step_and_loss(tmp_path, bias):
    args = ARGS | {"bias": bias}
    model = Model(args)
    save(tmp_path / "a.pt", model, args)
    command.main([f"--from=nanogpt:{tmp_path}/a.pt", f"--to=gptjax:{tmp_path}/b"])
    command.main([f"--from=gptjax:{tmp_path}/b", f"--to=nanogpt:{tmp_path}/c.pt"])
    saved, expected = torch.load(tmp_path / "c.pt", weights_only=True), model.state_dict()
    assert (saved["iter_num"], saved["best_val_loss"]) == (7, 2.5)
    assert set(saved["model"]) == set(expected)
    assert [name for name in expected if not torch.equal(saved["model"][name], expected[name])] == []


def test_missing_biases_are_exported_as_zeros_with_a_note(tmp_path, said):
    args = ARGS | {"bias": False}
    model = Model(args)
    optimizer = make_optimizer(model)
    train(model, optimizer, BATCHES[:1])
    save(tmp_path / "a.pt", model, args, optimizer=optimizer)
    command.main([f"--from=nanogpt:{tmp_path}/a.pt", f"--to=hf:{tmp_path}/b"])
    assert any("has no biases: zeros are written" in line for line in said)
    assert any("AdamW's moments are left out" in line for line in said)


def test_bfloat16_keeps_its_bits(tmp_path):
    write_hf(tmp_path / "a", dtype="bfloat16")
    command.main([f"--from=hf:{tmp_path}/a", f"--to=nanogpt:{tmp_path}/b.pt"])
    saved = torch.load(tmp_path / "b.pt", weights_only=True)["model"]
    expected = make_tensors(dtype="bfloat16")
    assert saved["transformer.ln_f.bias"].dtype == torch.bfloat16
    assert saved["transformer.ln_f.bias"].view(torch.uint16).numpy().tobytes() == expected["ln_f.bias"].tobytes()
    command.main([f"--from=nanogpt:{tmp_path}/b.pt", f"--to=hf:{tmp_path}/c"])
    back = {n: t.tobytes() for n, t in read_tensors(formats.open_weights(formats.ModelRef("hf", f"{tmp_path}/c")))}
    assert back == {name: tensor.tobytes() for name, tensor in expected.items()}


def export(directory, out, *flags, vocab_size=257):
    """Exports a random model of hf:`directory`, made if it is missing, to `out`."""
    if not directory.exists():
        write_hf(directory, config=CONFIG | {"vocab_size": vocab_size})
    command.main([f"--from=hf:{directory}", f"--to=nanogpt:{out}", *flags])


def sample_codec(out_dir):
    """Returns (encode, decode) as sample.py of nanoGPT makes them with init_from=resume; None without meta.pkl."""
    checkpoint = torch.load(os.path.join(out_dir, "ckpt.pt"), map_location="cpu", weights_only=True)
    load_meta = False
    if "config" in checkpoint and "dataset" in checkpoint["config"]:
        meta_path = os.path.join("data", checkpoint["config"]["dataset"], "meta.pkl")
        load_meta = os.path.exists(meta_path)
    if not load_meta:
        return None
    with open(meta_path, "rb") as file:
        meta = pickle.load(file)
    stoi, itos = meta["stoi"], meta["itos"]
    return lambda text: [stoi[c] for c in text], lambda ids: "".join([itos[i] for i in ids])


@pytest.mark.parametrize("vocab_size", [257, 320])
def test_sample_py_encodes_and_decodes_with_a_bytes_model(tmp_path, monkeypatch, said, vocab_size):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    export(tmp_path / "a", "out/ckpt.pt", "--tokenizer=bytes", vocab_size=vocab_size)
    monkeypatch.chdir(tmp_path / "elsewhere")
    encode, decode = sample_codec(tmp_path / "out")
    prompt = "Hello,\n\0 \x7f world \xe9\xff"
    assert encode(prompt) == list(prompt.encode("latin-1"))
    assert decode(encode(prompt)) == prompt
    assert decode(range(vocab_size)) == bytes(range(256)).decode("latin-1")
    assert sorted(os.listdir(tmp_path / "out")) == ["ckpt.pt", "meta.pkl"]
    assert any("meta.pkl beside the model" in line and "data/NAME/meta.pkl" in line for line in said)


def test_meta_pickle_has_nanogpts_content_and_plain_opcodes_only(tmp_path):
    export(tmp_path / "a", tmp_path / "ckpt.pt", "--tokenizer=bytes", vocab_size=260)
    content = (tmp_path / "meta.pkl").read_bytes()
    characters = [chr(byte) for byte in range(256)]
    stoi = {character: number for number, character in enumerate(characters)}
    itos = dict(enumerate([*characters, "", "", "", ""]))
    assert pickle.loads(content) == {"vocab_size": 260, "stoi": stoi, "itos": itos}
    opcodes = {opcode.name for opcode, _, _ in pickletools.genops(content)}
    assert opcodes == {"PROTO", "EMPTY_DICT", "MARK", "BINUNICODE", "BININT", "SETITEMS", "STOP"}


def test_another_meta_pickle_is_kept_unless_forced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "meta.pkl").write_bytes(b"theirs")
    with raises(ConfigError, f"{out}/meta.pkl", remedy="--force replaces it"):
        export(tmp_path / "a", out / "ckpt.pt", "--tokenizer=bytes")
    assert os.listdir(out) == ["meta.pkl"]
    export(tmp_path / "a", out / "ckpt.pt", "--tokenizer=bytes", "--force")
    assert sample_codec(out) is not None
    export(tmp_path / "a", out / "second.pt", "--tokenizer=bytes")
    assert sorted(os.listdir(out)) == ["ckpt.pt", "meta.pkl", "second.pt"]


@pytest.mark.parametrize(("name", "vocab_size"), [("gpt2", 50257), ("", 257)])
def test_model_without_a_bytes_tokenizer_has_no_meta_pickle(tmp_path, name, vocab_size):
    export(tmp_path / "a", tmp_path / "out" / "ckpt.pt", f"--tokenizer={name}", vocab_size=vocab_size)
    assert os.listdir(tmp_path / "out") == ["ckpt.pt"]
    assert sample_codec(tmp_path / "out") is None


def test_the_hash_of_gpt2s_tokenizer_is_known():
    assert load_tokenizer("gpt2").sha256 == GPT2_SHA256
