import functools
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from gptjax.config import GPTConfig
from gptjax.convert import huggingface
from gptjax.convert.weights import Tensor, read_tensors
from gptjax.data.tokenizer import load_tokenizer
from gptjax.errors import DataError
from tests.convert.models import CONFIG, PREFIX, buffers, read_header, write_header, write_hf
from tests.helpers import raises

OURS = GPTConfig(block_size=8, vocab_size=50, n_layer=2, n_head=2, n_embd=16, dropout=0.1)


def read(directory, **options):
    return huggingface.read(str(directory), origin="hf:x", **options)


def same(found, expected):
    return {n: (t.dtype, t.tobytes()) for n, t in found.items()} == {
        n: (t.dtype, t.tobytes()) for n, t in expected.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_prefixed_and_sharded_files_give_the_same_tensors(tmp_path, prefix, num_shards, dtype):
    tensors = write_hf(tmp_path, prefix=prefix, num_shards=num_shards, dtype=dtype, extra=buffers(prefix=prefix))
    weights = read(tmp_path)
    assert weights.config == OURS
    assert weights.dtype == dtype
    assert same(dict(read_tensors(weights)), tensors)


def test_a_head_that_repeats_the_table_is_kept_once(tmp_path):
    table = write_hf(tmp_path)["wte.weight"]
    write_hf(tmp_path, extra={"lm_head.weight": table})
    weights = read(tmp_path)
    assert "lm_head.weight" not in weights.tensors
    assert any("lm_head.weight repeats wte.weight" in note for note in weights.notes)


@pytest.mark.parametrize(
    ("dtype", "change"), [("float32", lambda table: table + 1), ("bfloat16", lambda table: table.view("float16"))]
)
def test_tied_head_that_differs_is_refused(tmp_path, dtype, change):
    table = write_hf(tmp_path, dtype=dtype)["wte.weight"]
    write_hf(tmp_path, dtype=dtype, extra={"lm_head.weight": change(table)})
    with raises(DataError, str(tmp_path), remedy="set it to false", match="tie_word_embeddings"):
        read(tmp_path)


def test_tied_head_of_an_unknown_type_is_refused_by_name(tmp_path):
    table = np.zeros((50, 16), np.uint8)
    write_hf(tmp_path, changes={"wte.weight": lambda _: table}, extra={"lm_head.weight": table})
    header, data = read_header(tmp_path / "model.safetensors")
    for name in ("lm_head.weight", "transformer.wte.weight"):
        header[name]["dtype"] = "F8_E4M3"
    write_header(tmp_path / "model.safetensors", header, data)
    with raises(DataError, "hf:x", match=r"transformer\.wte\.weight is of an unknown type"):
        read(tmp_path)


def test_heads_of_an_unknown_dtype_are_compared_by_their_bytes():
    """A pickled tensor's dtype may have no name among DTYPES, and it may have no dimension."""
    one, same, other = (
        Tensor((), np.dtype("V1"), functools.partial(np.array, number), "x") for number in (1.0, 1.0, 2.0)
    )
    assert huggingface._same_tensor(one, same)
    assert not huggingface._same_tensor(one, other)


def test_pickled_file_next_to_safetensors_is_not_looked_at(tmp_path):
    write_hf(tmp_path, num_shards=3)
    (tmp_path / "pytorch_model.bin").symlink_to("/etc/hostname")
    assert huggingface.has_weights(str(tmp_path))


@pytest.mark.parametrize(("vocab_size", "eot"), [(50256, None), (50257, 50256), (50304, 50256)])
def test_end_of_text_id_without_tokenizer_depends_on_vocabulary_size(tmp_path, vocab_size, eot):
    write_hf(tmp_path, config=CONFIG | {"vocab_size": vocab_size, "n_embd": 4})
    config = huggingface.make_config(read(tmp_path), "float32")
    assert (config["bos_token_id"], config["eos_token_id"]) == (eot, eot)


def test_untied_model_requires_and_keeps_its_head(tmp_path):
    head = np.arange(800, dtype=np.float32).reshape(50, 16)
    write_hf(tmp_path, config=CONFIG | {"tie_word_embeddings": False}, extra={"lm_head.weight": head})
    weights = read(tmp_path)
    assert not weights.config.tie_embeddings
    assert np.array_equal(weights.tensors["lm_head.weight"].read(), head)
    write_hf(tmp_path, config=CONFIG | {"tie_word_embeddings": False})
    with raises(DataError, "hf:x", match=r"lm_head\.weight is missing"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("common", "name"),
    [
        ("num_attention_heads", "n_head"),
        ("num_hidden_layers", "n_layer"),
        ("hidden_size", "n_embd"),
        ("max_position_embeddings", "block_size"),
    ],
)
def test_sizes_may_have_their_common_transformers_names(common, name):
    config = huggingface.parse_config({common: 24}, "config.json")
    assert config == GPTConfig(dropout=0.1, **{name: 24})
    field = "n_positions" if name == "block_size" else name
    assert huggingface.parse_config({common: 24, field: 24}, "config.json") == config
    with raises(DataError, "config.json", match=f"{field}=12, but {common}=24"):
        huggingface.parse_config({common: 24, field: 12}, "config.json")
    with raises(DataError, "config.json", match=f"{field}='24'"):
        huggingface.parse_config({common: "24"}, "config.json")


def test_fields_that_are_absent_have_the_defaults_of_transformers():
    assert huggingface.parse_config({}, "config.json") == GPTConfig(dropout=0.1)
    for name, activation in huggingface.ACTIVATIONS.items():
        config = huggingface.parse_config({"activation_function": name}, "config.json")
        assert config == GPTConfig(dropout=0.1, activation=activation)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_export_stores_the_activation(tmp_path, activation):
    write_hf(tmp_path / "a", config=CONFIG | {"activation_function": activation})
    weights = read(tmp_path / "a")
    (tmp_path / "b").mkdir()
    huggingface.write(str(tmp_path / "b"), weights, read_tensors(weights), dtype="float32")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["activation_function"] == activation
    assert read(tmp_path / "b").config == weights.config


CEREBRAS = {"activation_function": "gelu", "n_inner": 64, "scale_attn_weights": True, "reorder_and_upcast_attn": True}


def test_models_like_cerebras_gpt_are_read(tmp_path):
    write_hf(tmp_path / "a", config=CONFIG | CEREBRAS)
    assert read(tmp_path / "a").config.activation == "gelu"


@pytest.mark.parametrize("dtype", ["bool", "uint8", "float16", "int64"])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_buffers_of_any_type_are_left_out(tmp_path, dtype, num_shards):
    extra = {name: mask.astype(dtype) for name, mask in buffers().items()}
    extra |= {"transformer.position_ids": np.arange(8)[None], "transformer.h.0.attn.position_ids": np.arange(8)}
    expected = write_hf(tmp_path / "a", extra=extra, num_shards=num_shards)
    weights = read(tmp_path / "a")
    assert same(dict(read_tensors(weights)), expected)
    assert not any("left out" in note for note in weights.notes)


HEADS = {
    "v_head.summary.weight": (1, 16), "v_head.summary.bias": (1,), "score.weight": (2, 16), "classifier.bias": (2,),
    "qa_outputs.weight": (2, 16), "multiple_choice_head.summary.weight": (1, 16),
}  # fmt: skip


@pytest.mark.parametrize("wrapper", ["", "_orig_mod.", "module.", "model.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_wrappers_of_all_names_are_removed(tmp_path, wrapper, prefix):
    expected = write_hf(tmp_path / "a", prefix=wrapper + prefix, extra=buffers(prefix=wrapper + prefix), num_shards=2)
    assert same(dict(read_tensors(read(tmp_path / "a"))), expected)


def test_a_wrapper_that_not_all_names_have_is_refused(tmp_path):
    write_hf(tmp_path / "a", prefix="module.transformer.", extra={"ln_f.scale": np.ones(16, np.float32)})
    with raises(DataError, f"hf:{tmp_path}/a", match="wte.weight is missing"):
        huggingface.read(str(tmp_path / "a"), origin=f"hf:{tmp_path}/a")


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_heads_of_other_tasks_are_left_out_with_a_note(tmp_path, wrapper):
    for name, shape in HEADS.items():
        for outside in ("", wrapper):  # a head stands beside the wrapped model, or within the wrapper
            extra = {outside + name: np.ones(shape, np.float32)}
            expected = write_hf(tmp_path / name, prefix=wrapper + PREFIX, extra=extra)
            weights = read(tmp_path / name)
            assert same(dict(read_tensors(weights)), expected)
            assert any("left out" in note and outside + name in note for note in weights.notes)


def test_model_of_trl_with_a_value_head_is_read(tmp_path):
    extra = {"v_head.summary.weight": np.ones((1, 16), np.float32)}
    expected = write_hf(tmp_path / "a", prefix="pretrained_model.transformer.", extra=extra)
    assert same(dict(read_tensors(read(tmp_path / "a"))), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_safetensors_library_reads_the_written_file(tmp_path, dtype):
    tensors = write_hf(tmp_path / "a", dtype=dtype)
    weights = read(tmp_path / "a")
    (tmp_path / "b").mkdir()
    huggingface.write(str(tmp_path / "b"), weights, read_tensors(weights), dtype=dtype)
    if dtype != "bfloat16":  # which the library's load_file has no name for
        found = load_file(tmp_path / "b" / "model.safetensors")
        assert same({name.removeprefix("transformer."): t for name, t in found.items()}, tensors)
    assert same(dict(read_tensors(read(tmp_path / "b"))), tensors)
    whole = (tmp_path / "b" / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    assert length % 8 == 0
    assert json.loads(whole[8 : 8 + length])["__metadata__"] == {"format": "pt"}


def test_export_writes_configs_tokenizer_files_and_readme(tmp_path):
    write_hf(tmp_path / "a", config=CONFIG | {"vocab_size": 257})
    weights = huggingface.read(str(tmp_path / "a"), origin="hf:x")
    weights = type(weights)(**vars(weights) | {"tokenizer": load_tokenizer("bytes")})
    (tmp_path / "b").mkdir()
    huggingface.write(str(tmp_path / "b"), weights, read_tensors(weights), dtype="float32")
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "merges.txt", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "vocab.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["architectures"], config["model_type"], config["n_positions"]) == (["GPT2LMHeadModel"], "gpt2", 8)
    assert config["bos_token_id"] == config["eos_token_id"] == 256
    assert [config[n] for n in ("embd_pdrop", "attn_pdrop", "resid_pdrop")] == [0.1] * 3
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == {
        "bos_token_id": 256, "eos_token_id": 256,
    }  # fmt: skip
    assert read(tmp_path / "b").tokenizer.sha256 == load_tokenizer("bytes").sha256
