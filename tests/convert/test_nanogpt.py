"""nanoGPT's checkpoints, against a model with its module names, and an optimizer made as its train.py does."""

import numpy as np
import pytest

from gptjax.config import GPTConfig
from gptjax.convert import __main__ as command
from gptjax.convert import formats, nanogpt
from gptjax.convert.weights import read_tensors
from gptjax.errors import DataError
from tests.convert.models import CONFIG, make_tensors, write_hf
from tests.helpers import raises

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
ARGS = {"block_size": 8, "vocab_size": 50, "n_layer": 2, "n_head": 2, "n_embd": 16, "bias": True, "dropout": 0.0}


class Norm(torch.nn.Module):
    def __init__(self, width, bias):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))
        self.bias = torch.nn.Parameter(torch.zeros(width)) if bias else None


def make_block(D, bias):
    linear = lambda rows, columns: torch.nn.Linear(columns, rows, bias=bias)  # noqa: E731
    attention = torch.nn.ModuleDict({"c_attn": linear(3 * D, D), "c_proj": linear(D, D)})
    mlp = torch.nn.ModuleDict({"c_fc": linear(4 * D, D), "c_proj": linear(D, 4 * D)})
    return torch.nn.ModuleDict({"ln_1": Norm(D, bias), "attn": attention, "ln_2": Norm(D, bias), "mlp": mlp})


class Model(torch.nn.Module):
    """Parameters named and tied as nanoGPT's are."""

    def __init__(self, args):
        super().__init__()
        D, V, bias = args["n_embd"], args["vocab_size"], args["bias"]
        self.transformer = torch.nn.ModuleDict({
            "wte": torch.nn.Embedding(V, D),
            "wpe": torch.nn.Embedding(args["block_size"], D),
            "h": torch.nn.ModuleList([make_block(D, bias) for _ in range(args["n_layer"])]),
            "ln_f": Norm(D, bias),
        })  # fmt: skip
        self.lm_head = torch.nn.Linear(D, V, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight


def make_optimizer(model):
    """Two groups: matrices and tables decay, vectors do not; a tied parameter is there once."""
    parameters = [p for _, p in model.named_parameters() if p.requires_grad]
    decay, rest = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95))


def save(path, model, args, prefix="", **more):
    state = {prefix + name: tensor for name, tensor in (model.state_dict() | more).items()}
    saved = {"model": state, "optimizer": make_optimizer(model).state_dict(), "model_args": args, "iter_num": 7}
    torch.save(saved | {"best_val_loss": torch.tensor(2.5), "config": {"dataset": "x"}}, path)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("vocab_size", [50, 50304])
def test_nanogpt_checkpoint_is_read_with_config_and_tensors(tmp_path, prefix, bias, vocab_size):
    torch.manual_seed(0)
    args = ARGS | {"bias": bias, "vocab_size": vocab_size}
    model = Model(args)
    save(tmp_path / "ckpt.pt", model, args, prefix)
    weights = nanogpt.read(str(tmp_path / "ckpt.pt"), origin="nanogpt:ckpt.pt")
    assert weights.config == GPTConfig(8, vocab_size, 2, 2, 16, bias=bias)
    found = dict(read_tensors(weights))
    for name, tensor in model.transformer.state_dict().items():
        expected = tensor.numpy().T if name.split(".", 2)[-1] in LINEAR else tensor.numpy()
        assert np.array_equal(found.pop(name), expected), name
    assert found == {}
    assert weights.history["step"] == 7


def test_the_best_loss_may_be_a_tensor(tmp_path):
    save(tmp_path / "ckpt.pt", Model(ARGS), ARGS)
    assert nanogpt.read(str(tmp_path / "ckpt.pt"), origin="").history == {"step": 7, "val_loss": 2.5}


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


def test_step_and_best_loss_survive_a_round_trip(tmp_path):
    save(tmp_path / "a.pt", Model(ARGS), ARGS)
    command.main([f"--from=nanogpt:{tmp_path}/a.pt", f"--to=gptjax:{tmp_path}/b"])
    command.main([f"--from=gptjax:{tmp_path}/b", f"--to=nanogpt:{tmp_path}/c.pt"])
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    assert (saved["iter_num"], saved["best_val_loss"]) == (7, 2.5)


def test_causal_masks_of_old_checkpoints_are_left_out(tmp_path):
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(2)}
    save(tmp_path / "ckpt.pt", Model(ARGS), ARGS, **masks)
    assert len(nanogpt.read(str(tmp_path / "ckpt.pt"), origin="").tensors) == 28


def test_a_tensor_with_and_without_prefix_is_refused(tmp_path):
    more = {"_orig_mod.transformer.ln_f.bias": torch.zeros(16)}
    save(tmp_path / "ckpt.pt", Model(ARGS), ARGS, **more)
    with raises(DataError, f"{tmp_path}/ckpt.pt", match=r"ln_f\.bias occurs twice"):
        nanogpt.read(str(tmp_path / "ckpt.pt"), origin="")


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
        nanogpt.read(str(tmp_path / "ckpt.pt"), origin="")


def test_missing_bias_argument_means_a_model_with_biases(tmp_path):
    save(tmp_path / "ckpt.pt", Model(ARGS), {name: value for name, value in ARGS.items() if name != "bias"})
    assert nanogpt.read(str(tmp_path / "ckpt.pt"), origin="").config.bias


def test_nan_in_a_tied_table_is_reported_as_nonfinite(tmp_path):
    model = Model(ARGS)
    model.lm_head.weight.data[3, 4] = float("nan")
    save(tmp_path / "ckpt.pt", model, ARGS)
    with raises(DataError, remedy="--allow_nonfinite", match=r"\[3, 4\]"):
        dict(read_tensors(nanogpt.read(str(tmp_path / "ckpt.pt"), origin="")))


def test_untied_head_is_refused(tmp_path):
    model = Model(ARGS)
    save(tmp_path / "ckpt.pt", model, ARGS, **{"lm_head.weight": model.lm_head.weight + 1})
    with raises(DataError, f"{tmp_path}/ckpt.pt", match=r"lm_head\.weight is not"):
        nanogpt.read(str(tmp_path / "ckpt.pt"), origin="")


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
def test_round_trip_through_gptjax_keeps_every_tensor(tmp_path, bias):
    args = ARGS | {"bias": bias}
    model = Model(args)
    save(tmp_path / "a.pt", model, args)
    command.main([f"--from=nanogpt:{tmp_path}/a.pt", f"--to=gptjax:{tmp_path}/b"])
    command.main([f"--from=gptjax:{tmp_path}/b", f"--to=nanogpt:{tmp_path}/c.pt"])
    found = torch.load(tmp_path / "c.pt", weights_only=True)["model"]
    expected = model.state_dict()
    assert set(found) == set(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_missing_biases_are_exported_as_zeros_with_a_note(tmp_path, said):
    args = ARGS | {"bias": False}
    save(tmp_path / "a.pt", Model(args), args)
    command.main([f"--from=nanogpt:{tmp_path}/a.pt", f"--to=hf:{tmp_path}/b"])
    assert any("has no biases: zeros are written" in line for line in said)


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
