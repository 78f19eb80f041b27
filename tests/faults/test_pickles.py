"""V: files of torch.save, which are programs: whatever they want to run does not run, and one line says why."""

import io
import pickle
import zipfile

import numpy as np
import pytest

from gptjax.convert import __main__ as convert
from gptjax.errors import BAD_DATA, DataError
from tests.convert import models

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.faults]

ARGS = {"block_size": 8, "vocab_size": 50, "n_layer": 2, "n_head": 2, "n_embd": 16, "bias": True, "dropout": 0.0}
LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def fired(tmp_path):
    """What a payload would write; a first one shows that it would."""
    proof, path = tmp_path / "proof", tmp_path / "fired"
    pickle.loads(pickle.dumps(Payload(proof))).close()
    assert proof.exists(), "the payload does nothing, so that nothing would be shown"
    yield path
    assert not path.exists(), "the payload ran"


def state(layout="nanogpt"):
    """Returns a state_dict by nanoGPT's names and layout, or by Hugging Face's."""
    tensors = {}
    for name, tensor in models.make_tensors().items():
        turned = layout == "nanogpt" and name.split(".", 2)[-1] in LINEAR
        tensors[models.PREFIX + name] = torch.from_numpy(np.ascontiguousarray(tensor.T if turned else tensor))
    return tensors


def checkpoint(**changes):
    """Returns what nanoGPT saves; a field that is None is left out."""
    saved = {"model": state(), "optimizer": {}, "model_args": ARGS, "iter_num": 1, "best_val_loss": 2.0, "config": {}}
    return {name: value for name, value in (saved | changes).items() if value is not None}


def place(tmp_path, kind, saved, **options):
    """Saves it where the format `kind` looks for it; returns FORMAT:PATH."""
    if kind == "nanogpt":
        torch.save(saved, tmp_path / "ckpt.pt", **options)
        return f"nanogpt:{tmp_path}/ckpt.pt"
    models.make_config(tmp_path / "hf", models.CONFIG)
    torch.save(saved, tmp_path / "hf" / "pytorch_model.bin", **options)
    return f"hf:{tmp_path}/hf"


def refuse(tmp_path, source, named=""):
    """Asserts that the file is refused by its name, in one line with `named`, and that nothing is left."""
    form, _, path = source.partition(":")
    file = path if form == "nanogpt" else f"{path}/pytorch_model.bin"
    fields = (file, f"{file}: model_args", source)  # where it is read, and where it is converted
    with pytest.raises(DataError) as caught:
        convert.main([f"--from={source}", f"--to=llmc:{tmp_path}/out.bin"])
    message = str(caught.value)
    assert caught.value.field in fields
    assert caught.value.exit_code == BAD_DATA
    assert named in message
    assert message.isprintable(), message
    assert len(message) < 600, message
    assert not list(tmp_path.glob("out*")) + list(tmp_path.glob(".out*"))


def test_v_harmless_checkpoint_is_converted(tmp_path):
    """Else the refusals below would show nothing."""
    for kind, saved in (("nanogpt", checkpoint()), ("hf", state("hf"))):
        convert.main([f"--from={place(tmp_path, kind, saved)}", f"--to=llmc:{tmp_path}/{kind}.bin"])
    assert (tmp_path / "nanogpt.bin").read_bytes() == (tmp_path / "hf.bin").read_bytes()


WHERE = {
    "a weight": lambda load: state() | {"transformer.ln_f.bias": load},
    "beside the weights": lambda load: state() | {"x": load},
    "a key": lambda load: state() | {load: torch.ones(2)},
    "instead of all": lambda load: load,
    "in a list": lambda load: [load],
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", ["nanogpt", "hf"])
def test_v_a_payload_does_not_run(kind, where, zipped, fired, tmp_path):
    bad = WHERE[where](Payload(fired))
    saved = checkpoint(model=bad) if kind == "nanogpt" else bad
    refuse(tmp_path, place(tmp_path, kind, saved, _use_new_zipfile_serialization=zipped), "nothing was run")


@pytest.mark.parametrize("field", ["optimizer", "model_args", "iter_num", "best_val_loss", "config"])
def test_v_a_payload_beside_the_model_does_not_run(field, fired, tmp_path):
    refuse(tmp_path, place(tmp_path, "nanogpt", checkpoint(**{field: Payload(fired)})))


def test_v_a_plain_pickle_does_not_run(fired, tmp_path):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "ckpt.pt").write_bytes(pickle.dumps(Payload(fired), protocol))
        refuse(tmp_path, f"nanogpt:{tmp_path}/ckpt.pt")


def test_v_payload_in_a_handmade_zip_does_not_run(fired, tmp_path):
    with zipfile.ZipFile(tmp_path / "ckpt.pt", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Payload(fired), 2))
        file.writestr("archive/version", "3\n")
        file.writestr("archive/constants.pkl", pickle.dumps(Payload(fired), 2))
    refuse(tmp_path, f"nanogpt:{tmp_path}/ckpt.pt")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_v_torchscript_is_refused(tmp_path):
    class Module(torch.nn.Module):
        def forward(self, x):
            return x + 1

    module = torch.jit.trace(Module(), torch.ones(2))
    torch.jit.save(module, str(tmp_path / "ckpt.pt"))
    refuse(tmp_path, f"nanogpt:{tmp_path}/ckpt.pt")


@pytest.mark.parametrize("part", [0, 0.01, 1 / 3, 2 / 3, 0.99])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_v_truncated_checkpoint_is_refused(zipped, part, tmp_path):
    source = place(tmp_path, "nanogpt", checkpoint(), _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "ckpt.pt").read_bytes()
    (tmp_path / "ckpt.pt").write_bytes(whole[: int(part * len(whole))])
    refuse(tmp_path, source)


META = torch.ones(50, 16, device="meta")
CHANGES = {
    "no model": ({"model": None}, "model and model_args"),
    "no model_args": ({"model_args": None}, "model and model_args"),
    "an empty model": ({"model": {}}, "state_dict"),
    "a list of tensors": ({"model": [torch.ones(2)]}, "state_dict, found list"),
    "a number for a weight": ({"model": {"transformer.wte.weight": 3}}, "wte.weight is a int"),
    "model_args of text": ({"model_args": "x"}, "model_args is a str"),
    "a billion layers": ({"model_args": ARGS | {"n_layer": 10**9}}, "n_layer is 1000000000"),
    "10^30 heads": ({"model_args": ARGS | {"n_head": 10**30}}, "n_head=1000000000000000000000000000000: "),
    "a size of text": ({"model_args": ARGS | {"n_embd": "16"}}, "n_embd='16': "),
    "no size": ({"model_args": {}}, "block_size=None: "),
    "a bias of text": ({"model_args": ARGS | {"bias": "no"}}, "bias='no'"),
    "dropout of 2": ({"model_args": ARGS | {"dropout": 2.0}}, "dropout=2.0"),
    "biases that are there": ({"model_args": ARGS | {"bias": False}}, ".bias: "),
    "Hugging Face's layout": ({"model": state("hf")}, "transposed"),
    "a hostile name": ({"model": state() | {"a\nerror: b\x1b[2J": torch.ones(2)}}, r"a\nerror: b\x1b[2J"),
    "a number as a name": ({"model": state() | {3: torch.ones(2)}}, ": 3 "),
    "float64": ({"model": state() | {"transformer.ln_f.bias": torch.ones(16).double()}}, "ln_f.bias is"),
    "sparse": ({"model": state() | {"transformer.wte.weight": torch.ones(50, 16).to_sparse()}}, "wte.weight is not"),
    "on no device": ({"model": state() | {"transformer.wte.weight": META}}, "wte.weight is not"),
    "a stranger": ({"model": state() | {"transformer.x": torch.ones(1)}}, "transformer.x: "),
    "twice": (
        {"model": state() | {"_orig_mod.transformer.ln_f.bias": torch.ones(16)}},
        "_orig_mod.transformer.ln_f.bias: not a tensor of GPT-2",
    ),
    "NaN": ({"model": state() | {"transformer.ln_f.bias": torch.full((16,), torch.nan)}}, ": 16 values"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_v_invalid_nanogpt_checkpoint_is_refused(what, tmp_path):
    changes, named = CHANGES[what]
    refuse(tmp_path, place(tmp_path, "nanogpt", checkpoint(**changes)), named)


def test_v_zero_stride_view_is_refused_by_its_shape(tmp_path):
    """Some bytes can claim to be a matrix of any size, by a stride of zero."""
    wide = torch.ones(1).expand(10**6, 10**6)
    saved = checkpoint(model=state() | {"transformer.wte.weight": wide})
    refuse(tmp_path, place(tmp_path, "nanogpt", saved), "1000000x1000000, expected 50x16")


def test_v_payload_in_a_numpy_file_does_not_run(fired, tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload(fired)], object), allow_pickle=True)
    (tmp_path / "ckpt.pt").write_bytes(buffer.getvalue())
    refuse(tmp_path, f"nanogpt:{tmp_path}/ckpt.pt")
