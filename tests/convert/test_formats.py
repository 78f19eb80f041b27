import numpy as np
import pytest

from gptjax import evaluate, sample
from gptjax.convert import formats, hub
from gptjax.convert.formats import Place
from gptjax.data.tokenizer import load_tokenizer
from gptjax.errors import ConfigError, DataError
from tests.convert.models import CONFIG, make_tensors, write_hf, write_llmc, write_msgpack


def test_a_place_is_a_format_and_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert formats.parse_place("--from", "hf:a:b", formats.READABLE) == Place("hf", "a:b")
    assert formats.parse_place("--from", "llmc:~/m.bin", formats.READABLE) == Place("llmc", "/home/me/m.bin")
    assert str(Place("hf", "gpt2")) == "hf:gpt2"


@pytest.mark.parametrize("text", ["", "gpt2", "hf:", "huggingface:gpt2", ":x"])
def test_anything_else_is_told_with_the_forms(text):
    with pytest.raises(ConfigError, match=r"--from=.*: expected one of gptjax, hf, .* such as hf:DIR"):
        formats.parse_place("--from", text, formats.READABLE)


def test_msgpack_cannot_be_written():
    with pytest.raises(ConfigError):
        formats.parse_place("--to", "msgpack:x", formats.WRITABLE)


def write(kind, path, **options):
    {"hf": write_hf, "llmc": write_llmc, "msgpack": write_msgpack}[kind](path, **options)
    return Place(kind, str(path))


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
def test_a_source_that_never_has_a_tokenizer_is_taken_for_gpt2_by_its_vocabulary(tmp_path, vocab_size, name):
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


def test_a_model_to_be_used_needs_a_tokenizer(tmp_path):
    write("hf", tmp_path / "m", config=CONFIG | {"vocab_size": 257})
    with pytest.raises(ConfigError, match="has no tokenizer: give one with --tokenizer"):
        formats.open_model(f"hf:{tmp_path}/m")
    assert formats.open_model(f"hf:{tmp_path}/m", tokenizer="bytes").config.dropout == 0


@pytest.mark.parametrize("target", ["nanogpt", "llmc"])
def test_an_untied_model_cannot_go_where_there_is_no_head(tmp_path, target):
    head = np.zeros((50, 16), np.float32)
    place = write("hf", tmp_path / "m", config=CONFIG | {"tie_word_embeddings": False}, extra={"lm_head.weight": head})
    weights = formats.open_weights(place)
    with pytest.raises(ConfigError, match=f"--to={target}: that format has no lm_head"):
        formats.adapt(weights, target)
    assert formats.adapt(weights, "hf") is weights


@pytest.mark.parametrize(
    ("source", "target", "wanted", "expected"),
    [
        ("bfloat16", "hf", "", "bfloat16"),
        ("float16", "hf", "", "float16"),
        ("float16", "llmc", "", "float32"),
        ("bfloat16", "llmc", "", "bfloat16"),
        ("float32", "llmc", "bfloat16", "bfloat16"),
        ("bfloat16", "hf", "float32", "float32"),
        ("bfloat16", "gptjax", "", "float32"),
    ],
)
def test_the_dtype_of_an_export(tmp_path, source, target, wanted, expected):
    weights = formats.open_weights(write("hf", tmp_path / "m", dtype=source))
    assert formats.export_dtype(weights, target, wanted) == expected


@pytest.mark.parametrize("command", [sample, evaluate])
def test_a_step_belongs_to_a_work_directory(command):
    with pytest.raises(ConfigError, match="--step=3: is for --workdir; here it is --model=gptjax:WORKDIR@3"):
        command.parse_flags(["--model=gptjax:a", "--step=3", "--data=b"][: 3 if command is evaluate else 2])


def test_a_model_of_the_hub_is_told_by_its_commit_and_read_from_the_best_of_its_files(tmp_path, monkeypatch):
    """Other programs leave flax_model.msgpack in the same snapshot."""
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", lambda *names: asked.append(names) or (str(tmp_path / "snapshot"), "c0ffee"))
    write("msgpack", tmp_path / "snapshot", seed=1)
    weights = formats.open_weights(Place("hf", "me/it@v1"))
    assert (asked, weights.origin) == ([("me/it", "v1")], "hf:me/it@c0ffee")
    assert weights.tensors["wte.weight"].label == "wte/embedding"
    for num_shards in (2, 1):
        write("hf", tmp_path / "snapshot", num_shards=num_shards)
        assert formats.open_weights(Place("hf", "me/it")).tensors["wte.weight"].label == "transformer.wte.weight"
    assert asked[1:] == [("me/it", "")] * 2


def test_a_file_is_never_looked_for_on_a_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("llmc", tmp_path / "gpt2.bin")
    with pytest.raises(DataError, match=r"gpt2\.bin: no such directory, and not OWNER/NAME"):
        formats.open_weights(Place("hf", "gpt2.bin"))


def test_a_directory_is_never_looked_for_on_a_server(tmp_path):
    (tmp_path / "owner").mkdir()
    with pytest.raises(DataError, match=r"no config\.json"):
        formats.open_weights(Place("hf", str(tmp_path / "owner")))
