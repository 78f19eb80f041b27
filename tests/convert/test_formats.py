import dataclasses

import numpy as np
import pytest

from gptjax import evaluate, sample
from gptjax.config import GPTConfig
from gptjax.convert import formats, hub
from gptjax.convert.formats import ModelRef
from gptjax.convert.weights import Weights
from gptjax.data.tokenizer import load_tokenizer
from gptjax.errors import ConfigError, DataError
from tests.convert.models import CONFIG, make_tensors, write_hf, write_llmc, write_msgpack
from tests.helpers import raises


def test_model_reference_is_a_format_and_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert formats.parse_model_ref("--from", "hf:a:b", formats.READABLE) == ModelRef("hf", "a:b")
    assert formats.parse_model_ref("--from", "llmc:~/m.bin", formats.READABLE) == ModelRef("llmc", "/home/me/m.bin")
    assert str(ModelRef("hf", "gpt2")) == "hf:gpt2"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("gpt2", "hf:openai-community/gpt2"), ("gpt2-xl", "hf:openai-community/gpt2-xl"), ("run", "gptjax:run"),
        ("exported", "hf:exported"), ("ckpt.pt", "nanogpt:ckpt.pt"), ("model.bin", "llmc:model.bin"),
    ],
)  # fmt: skip
def test_model_without_a_format_is_refused_with_what_to_write(text, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").touch()
    (tmp_path / "exported").mkdir()
    for name in ("exported/config.json", "ckpt.pt", "model.bin"):
        (tmp_path / name).touch()
    with raises(ConfigError, "--from", value=text, remedy=f"write --from={meant}"):
        formats.parse_model_ref("--from", text, formats.READABLE)


@pytest.mark.parametrize("text", ["", "nothere", "hf:", "huggingface:gpt2", ":x"])
def test_invalid_model_reference_lists_the_expected_formats(text):
    with raises(ConfigError, "--from", value=text, match=r"gptjax, hf, .* hf:DIR"):
        formats.parse_model_ref("--from", text, formats.READABLE)


def write(kind, path, **options):
    {"hf": write_hf, "llmc": write_llmc, "msgpack": write_msgpack}[kind](path, **options)
    return ModelRef(kind, str(path))


@pytest.mark.parametrize("kind", ["hf", "llmc", "msgpack"])
def test_every_format_gives_the_same_parameters(tmp_path, kind):
    weights = formats.open_weights(write(kind, tmp_path / "m"), dropout=0.0)
    assert weights.origin == f"{kind}:{tmp_path}/m"
    params = formats.load_params(weights, lambda path, leaf: (path, leaf))
    path, leaf = params["h"]["attn"]["c_attn"]["kernel"]
    assert path == "h/attn/c_attn/kernel"
    expected = make_tensors()["h.1.attn.c_attn.weight"].reshape(16, 3, 16)
    assert np.array_equal(leaf[1], expected)


@pytest.mark.parametrize(("vocab_size", "name"), [(50256, None), (50257, "gpt2"), (50304, "gpt2"), (50305, None)])
def test_llmc_source_gets_the_gpt2_tokenizer_by_vocabulary_size(tmp_path, vocab_size, name):
    sizes = CONFIG | {"vocab_size": vocab_size, "n_embd": 4, "n_layer": 1}
    place = write("llmc", tmp_path / "m.bin", config=sizes, padded=50432)
    weights = formats.open_weights(place)
    assert (weights.tokenizer and weights.tokenizer.name) == name
    assert f"vocab_size={vocab_size}" in weights.notes[-1]


def test_a_given_tokenizer_wins_unless_it_is_too_large(tmp_path):
    place = write("hf", tmp_path / "m", config=CONFIG | {"vocab_size": 300})
    assert formats.open_weights(place, tokenizer="bytes").tokenizer.sha256 == load_tokenizer("bytes").sha256
    weights = formats.open_weights(place, tokenizer="gpt2")
    assert weights.tokenizer is None
    assert weights.notes[-1] == "tokenizer gpt2 left out: 50257 ids, vocab_size is less"


def test_open_model_requires_a_tokenizer(tmp_path):
    write("hf", tmp_path / "m", config=CONFIG | {"vocab_size": 257})
    with raises(ConfigError, "--model", value=f"hf:{tmp_path}/m", remedy="--tokenizer"):
        formats.open_model(f"hf:{tmp_path}/m")
    assert formats.open_model(f"hf:{tmp_path}/m", tokenizer="bytes").config.dropout == 0


@dataclasses.dataclass(frozen=True)
class OtherConfig(GPTConfig):
    """A model with a setting that GPT-2 lacks."""

    window: int = 0


@pytest.mark.parametrize(("name", "value"), [("window", 3), ("activation", "relu")])
@pytest.mark.parametrize("target", ["hf", "nanogpt", "llmc"])
def test_setting_unknown_to_gpt2_is_refused_by_exports(target, name, value):
    config = OtherConfig()
    weights = Weights("here", config, {})
    assert formats.adapt(weights, target) is weights
    weights = dataclasses.replace(weights, config=dataclasses.replace(config, **{name: value}))
    assert formats.adapt(weights, "gptjax") is weights
    with raises(ConfigError, f"model.{name}", value=value, remedy=f"--to={target}: "):
        formats.adapt(weights, target)


@pytest.mark.parametrize(
    ("source", "target", "wanted", "expected"),
    [
        ("bfloat16", "hf", "", "bfloat16"), ("float16", "hf", "", "float16"), ("float16", "llmc", "", "float32"),
        ("bfloat16", "llmc", "", "bfloat16"), ("float32", "llmc", "bfloat16", "bfloat16"),
        ("bfloat16", "hf", "float32", "float32"), ("bfloat16", "gptjax", "", "float32"),
    ],
)  # fmt: skip
def test_export_dtype_follows_source_target_and_flag(tmp_path, source, target, wanted, expected):
    weights = formats.open_weights(write("hf", tmp_path / "m", dtype=source))
    assert formats.export_dtype(weights, target, wanted) == expected


@pytest.mark.parametrize("command", [sample, evaluate])
def test_step_flag_requires_the_workdir_flag(command):
    with raises(ConfigError, "--step", value=3, match="gptjax:WORKDIR@3"):
        command.parse_flags(["--model=gptjax:a", "--step=3", "--data=b"][: 3 if command is evaluate else 2])


def test_hub_model_records_its_commit_and_prefers_safetensors(tmp_path, monkeypatch):
    """Other programs leave flax_model.msgpack in the same snapshot."""
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", lambda *names: asked.append(names) or (str(tmp_path / "snapshot"), "c0ffee"))
    write("msgpack", tmp_path / "snapshot", seed=1)
    weights = formats.open_weights(ModelRef("hf", "me/it@v1"))
    assert (asked, weights.origin) == ([("me/it", "v1")], "hf:me/it@c0ffee")
    assert weights.tensors["wte.weight"].label == "wte/embedding"
    for num_shards in (2, 1):
        write("hf", tmp_path / "snapshot", num_shards=num_shards)
        assert formats.open_weights(ModelRef("hf", "me/it")).tensors["wte.weight"].label == "transformer.wte.weight"
    assert asked[1:] == [("me/it", "")] * 2


@pytest.mark.parametrize(("name", "problem"), [("gpt2.bin", "no such directory"), ("./owner", "config.json")])
def test_hf_reference_to_a_local_path_is_not_downloaded(tmp_path, monkeypatch, name, problem):
    monkeypatch.chdir(tmp_path)
    write("llmc", tmp_path / "gpt2.bin")
    (tmp_path / "owner").mkdir()
    with raises(DataError, name, match=problem):
        formats.open_weights(ModelRef("hf", name))
