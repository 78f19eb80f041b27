"""The wording of errors: the one table that pins whole messages, their parts and their exit codes.

Other tests compare `field`, `value`, `remedy` and the exit code, so that a sentence can be improved here alone.
"""

import json

import pytest

from gptjax import coordinator, loss, sharding, workdir
from gptjax.config import GPTConfig, MeshConfig, from_dict, load
from gptjax.convert import formats, huggingface, llmc
from gptjax.convert.model_ref import FORMATS_HELP
from gptjax.data.tokenizer import load_tokenizer
from gptjax.data.tokens import open_split
from gptjax.errors import ConfigError, DataError, UserError, WorkdirError
from gptjax.plan import topology
from gptjax.redaction import refuse_secrets
from gptjax.resume import compare_data, compare_models
from gptjax.sampling_flags import validate_sampling_params

KNOWN_CHIPS = (
    "known: v4, v5e, v5p, v6e, t4, v100, a10, l4, l40s, a6000, 3090, 4090, 5090, a100, h100, h200, b200, "
    "as in v5e:4x4 or h100:8"
)
TOKENIZERS = "give gpt2, bytes, a file or directory of a tokenizer, or hf:OWNER/NAME"
SECRET = "a8f3kd92jf83hd72"
SAMPLING = {"max_new_tokens": 8, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
FILES = {
    "empty.py": "x = 1\n",
    "raises.py": "def get_config():\n    raise OSError('no disk')\n",
    "cut.json": '{"a": [',
    "hf/config.json": json.dumps({"model_type": "gpt2", "n_head": 12, "activation_function": "relu"}),
    "llmc/model.bin": "\x00" * 2000,
    "data/train.bin": "",
    "file": "",
}


def open_data(path):
    open_split(path, "train", tokenizer=load_tokenizer("bytes"))


# (the call, its error's class, field, value, remedy, the whole message)
SHIPPED = "finetune_gpt2, gpt2_large, gpt2_medium, gpt2_small, gpt2_xl, quickstart"
TABLE = [
    # Configs.
    (lambda: from_dict({"model": {"n_layers": 2}}),
     ConfigError, "model.n_layers", None, "nearest: model.n_layer, model.n_head, model.n_embd",
     "model.n_layers: no such config field; nearest: model.n_layer, model.n_head, model.n_embd"),
    (lambda: from_dict({"model": {"n_layer": "two"}}), ConfigError, "model.n_layer", "two", "",
     "model.n_layer=two: expected a whole number"),
    (lambda: from_dict({"model": 3}), ConfigError, "model", 3, "",
     "model=3: expected a section with fields"),
    (lambda: from_dict({"model": {"n_layer": 0}, "optim": {"name": "sgd"}}), ConfigError, "optim.name", "sgd", "",
     "optim.name=sgd: expected one of adamw, lion, adafactor, muon\nmodel.n_layer=0: must be at least 1"),
    (lambda: from_dict({"model": {"dropout": 1.0}}), ConfigError, "model.dropout", 1.0, "",
     "model.dropout=1.0: must be below 1"),
    (lambda: from_dict({"model": {"n_head": 5}}), ConfigError, "model.n_head", 5, "nearest valid: 4, 6",
     "model.n_head=5: must divide model.n_embd=768; nearest valid: 4, 6"),
    (lambda: from_dict({"optim": {"min_lr": 1.0, "peak_lr": 0.1}}), ConfigError, "optim.min_lr", 1.0, "",
     "optim.min_lr=1.0: must not exceed optim.peak_lr=0.1"),
    (lambda: from_dict({"train": {"steps_per_dispatch": 20, "log_every": 50}}),
     ConfigError, "train.log_every", 50, "nearest valid: 40",
     "train.log_every=50: must be a multiple of train.steps_per_dispatch=20; nearest valid: 40"),
    (lambda: load("none.py", {}), ConfigError, "--config", "none.py", f"available: empty.py, raises.py, {SHIPPED}",
     f"--config=none.py: file not found; available: empty.py, raises.py, {SHIPPED}"),
    (lambda: load("raises.py", {}), ConfigError, "--config", "raises.py", "",
     "--config=raises.py: get_config() failed: OSError: no disk"),
    (lambda: load("cut.json", {}), ConfigError, "--config", "cut.json", "expected the config.json of a run",
     "--config=cut.json: not JSON: Expecting value: line 1 column 8 (char 7); expected the config.json of a run"),
    # Flags.
    (lambda: validate_sampling_params(**SAMPLING | {"temperature": -1.0}), ConfigError, "temperature", -1.0, "",
     "temperature=-1.0: must be 0 (the most likely token) or a positive number"),
    (lambda: formats.parse_model_ref("--from", "xyz:abc", ("hf", "llmc")), ConfigError, "--from", "xyz:abc", "",
     f"--from=xyz:abc: expected one of hf, llmc, a colon and a path, such as {FORMATS_HELP}"),
    (lambda: topology.parse_topology("v9:2x2", 1), ConfigError, "--topology", "v9:2x2", KNOWN_CHIPS,
     f"--topology=v9:2x2: no such chip; {KNOWN_CHIPS}"),
    (lambda: coordinator.check_coordinator("nohost", is_here=False), ConfigError, "--coordinator", "nohost", "",
     "--coordinator=nohost: expected HOST:PORT of process 0, as in 10.0.0.2:1234"),
    # Devices and parameters.
    (lambda: sharding.mesh_sizes(MeshConfig(3, 1, 1), 8), ConfigError, "mesh", "3x1x1", "nearest valid: 8x1x1",
     "mesh=3x1x1: data x fsdp x tensor does not fit 8 devices; nearest valid: 8x1x1"),
    (lambda: sharding.mesh_sizes(MeshConfig(1, 8, 1), 8, 2), ConfigError, "mesh.data", 1, "",
     "mesh.data=1: must be a multiple of the 2 slices, since only `data` may span slices"),
    (lambda: loss.choose_loss("triton", platform="cpu", tensor=1),
     ConfigError, "compute.loss", "triton", "try compute.loss=xla",
     "compute.loss=triton: triton needs an NVIDIA GPU, and the mesh is on cpu; try compute.loss=xla"),
    (lambda: sharding.param_spec("h/gate/kernel"), ConfigError, "h/gate/kernel", None, "add one",
     "h/gate/kernel: no row of gptjax.params.PARAMS describes this parameter; add one"),
    # Work directories and resuming.
    (lambda: workdir.WorkdirLock("file/run"), WorkdirError, "--workdir", "file/run", "choose another",
     "--workdir=file/run: cannot be written: Not a directory; choose another"),
    (lambda: workdir.check_bucket("abc://bucket/run"), ConfigError, "abc://bucket/run", None, "use gs:// or s3://",
     "abc://bucket/run: no bucket has the scheme abc://; use gs:// or s3://"),
    (lambda: compare_data({"data.seed": 0}, {"data.seed": 1}, allowed=False),
     ConfigError, "", None, "to resume anyway: --config.data.allow_changed=True",
     ("the data changed since the checkpoint: data.seed was 0, now 1\n"
      "to resume anyway: --config.data.allow_changed=True")),
    (lambda: compare_models(GPTConfig(activation="gelu"), GPTConfig(), "nanogpt:x"),
     ConfigError, "init_from", "nanogpt:x", "to train it: --config.model.activation=gelu",
     ("init_from=nanogpt:x: it has activation=gelu, this run model.activation=gelu_new\n"
     "to train it: --config.model.activation=gelu\n"
     "if nanoGPT is from before May 2023: convert with --activation=gelu_new")),
    (lambda: compare_models(GPTConfig(n_layer=2), GPTConfig(), "hf:x"),
     ConfigError, "init_from", "hf:x", "to train it: --config.model.n_layer=2",
     "init_from=hf:x: it has n_layer=2, this run model.n_layer=12\nto train it: --config.model.n_layer=2"),
    (lambda: refuse_secrets({"data.path": SECRET}), ConfigError, "data.path", None, "",
     "data.path: contains the value of MY_TOKEN, which would be in every checkpoint"),
    # Data and weights.
    (lambda: load_tokenizer("nothing"), ConfigError, "data.tokenizer", "nothing", TOKENIZERS,
     f"data.tokenizer=nothing: no such tokenizer or file; {TOKENIZERS}"),
    (lambda: open_data("nowhere"), DataError, "nowhere", None, "",
     "nowhere: no such directory"),
    (lambda: open_data("hf"), DataError, "hf", None, "its files: none",
     ("hf: no meta.json, and no .bin or .npy file with the word train or training in its name: there is no train "
     "split; its files: none")),
    (lambda: open_data("data"), DataError, "data/train.bin", None, "",
     "data/train.bin: the shard is empty"),
    (lambda: huggingface.read("hf", origin="hf:hf"), DataError, "hf/config.json", None, "",
     ("hf/config.json: activation_function='relu': gptjax computes GPT-2 with \"gelu_new\" or "
     '"gelu_pytorch_tanh" or "gelu_python_tanh" or "gelu_fast" or "gelu_accurate" or "gelu" or '
     '"gelu_python" only')),
    (lambda: llmc.read("llmc/model.bin", origin="llmc:llmc"), DataError, "llmc/model.bin", None, "",
     "llmc/model.bin: not a model of llm.c: starts with 0, expected the magic 20240326"),
    (lambda: huggingface.read("nowhere", origin="hf:nowhere"), DataError, "nowhere", None, "",
     "nowhere: no config.json, so this is no model of transformers"),
]  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("messages")
    for name, text in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("call", "kind", "field", "value", "remedy", "message"), TABLE, ids=[row[-1][:40] for row in TABLE]
)
def test_message_has_its_wording_parts_and_exit_code(call, kind, field, value, remedy, message, directory, monkeypatch):
    monkeypatch.chdir(directory)
    monkeypatch.setenv("MY_TOKEN", SECRET)
    with pytest.raises(UserError) as caught:
        call()
    error = caught.value
    assert str(error) == message
    assert (error.field, error.value, error.remedy) == (field, value, remedy)
    assert isinstance(error, kind)
    assert error.exit_code == kind.exit_code
