"""V: weights that are not exactly a GPT-2 are refused in one line that says why, and nothing is written."""

import json
import os
import random
import resource
import subprocess
import sys
import tracemalloc
import types

import ml_dtypes
import msgpack as packing
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax.convert import __main__ as convert
from gptjax.convert import huggingface, llmc, msgpack, torch_file
from gptjax.errors import BAD_CONFIG, BAD_DATA, CANNOT_WRITE, UNAVAILABLE, UserError
from tests import runs
from tests.convert import models

pytestmark = pytest.mark.faults

MIB = 2**20
WRITERS = {"hf": models.write_hf, "msgpack": models.write_msgpack}
QKV, FC = "h.1.attn.c_attn.weight", "h.0.mlp.c_fc.weight"
fuzz = settings(
    max_examples=300,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def snapshot(root):
    """Returns everything under `root`, with what a change of contents would change."""
    paths = sorted(root.rglob("*"))
    return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size, p.lstat().st_ino) for p in paths if not p.is_dir()} | {
        str(p): "directory" for p in paths if p.is_dir()
    }


@pytest.fixture
def refuse(tmp_path):
    """refuse(source, *flags, to=..., code=...) returns the message; it must be one line, and nothing may change."""

    def refuse(source, *flags, to=None, code=BAD_DATA):
        before = snapshot(tmp_path)
        with pytest.raises(UserError) as caught:
            convert.main([f"--from={source}", f"--to={to or f'hf:{tmp_path}/out'}", *flags])
        assert snapshot(tmp_path) == before, "something was written"
        message = str(caught.value)
        assert len(message.splitlines()) == 1, message
        assert message.isprintable(), message
        assert len(message) < 600, message
        assert caught.value.exit_code == code, message
        return message

    return refuse


@pytest.fixture
def accept(tmp_path):
    """accept(source, *flags) converts to Hugging Face's form and returns the tensors."""

    def accept(source, *flags, out="accepted"):
        convert.main([f"--from={source}", f"--to=hf:{tmp_path}/{out}", *flags])
        header, data = models.read_header(tmp_path / out / "model.safetensors")
        header.pop("__metadata__")
        kinds = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}
        return {
            name.removeprefix(models.PREFIX): np.frombuffer(
                data[slice(*entry["data_offsets"])], kinds[entry["dtype"]]
            ).reshape(entry["shape"])
            for name, entry in header.items()
        }

    return accept


@pytest.fixture
def model(tmp_path):
    return tmp_path / "model"


def assert_equal_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert found[name].tobytes() == tensor.tobytes(), name


class LittleMemory:
    """Fails if Python and NumPy ever hold more than a few MiB for what happens inside."""

    def __enter__(self):
        tracemalloc.start()

    def __exit__(self, *_):
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 32 * MIB, f"{peak / MIB:.0f} MiB"


# Tensors


@pytest.mark.parametrize("form", ["hf", "msgpack"])
class TestTensors:
    def test_v_untouched_models_are_converted(self, form, model, accept):
        """Else all the refusals below would show nothing."""
        tensors = WRITERS[form](model)
        assert_equal_bits(accept(f"{form}:{model}"), tensors)

    def test_v_wrong_shape(self, form, model, refuse):
        WRITERS[form](model, changes={"h.1.ln_2.bias": lambda t: t[:-1]})
        message = refuse(f"{form}:{model}")
        assert "ln_2" in message
        assert "has shape 15, expected 16" in message

    def test_v_transposed(self, form, model, refuse):
        WRITERS[form](model, changes={QKV: lambda t: t.T})
        message = refuse(f"{form}:{model}")
        assert "has shape 48x16, expected 16x48" in message
        assert "looks transposed (nanoGPT layout?)" in message

    def test_v_missing(self, form, model, refuse):
        WRITERS[form](model, drop=[FC])
        assert f"{FC} is missing" in refuse(f"{form}:{model}")

    def test_v_extra(self, form, model, refuse):
        extra = {"transformer.h.0.rotary.scale": np.ones(4, np.float32)}
        WRITERS[form](model, extra=extra)
        message = refuse(f"{form}:{model}")
        assert "rotary" in message
        assert "not a tensor of GPT-2" in message

    def test_v_renamed(self, form, model, refuse):
        WRITERS[form](model, drop=["h.0.ln_1.weight"], extra={"transformer.h.0.ln1.weight": np.ones(16, np.float32)})
        message = refuse(f"{form}:{model}")
        assert "h.0.ln_1.weight is missing; was it renamed h.0.ln1.weight?" in message

    def test_v_wrong_vocabulary(self, form, model, refuse):
        WRITERS[form](model)
        models.edit_json(model / "config.json", vocab_size=51)
        message = refuse(f"{form}:{model}")
        assert "has shape 50x16, expected 51x16: vocab_size does not fit" in message

    def test_v_wrong_number_of_layers(self, form, model, refuse):
        WRITERS[form](model)
        models.edit_json(model / "config.json", n_layer=3)
        assert "n_layer is 3, but there are tensors of 2 layers" in refuse(f"{form}:{model}")

    def test_v_heads_that_do_not_divide(self, form, model, refuse):
        WRITERS[form](model)
        models.edit_json(model / "config.json", n_head=3)
        message = refuse(f"{form}:{model}")
        assert "n_head=3" in message
        assert "must divide" in message

    def test_v_a_billion_layers(self, form, model, refuse):
        WRITERS[form](model)
        models.edit_json(model / "config.json", n_layer=10**9)
        with LittleMemory():
            assert "n_layer is 1000000000, but there are tensors of 2 layers" in refuse(f"{form}:{model}")

    def test_v_a_billion_layers_and_no_tensor_of_one(self, form, model, refuse):
        WRITERS[form](model, config=models.CONFIG | {"n_layer": 0})
        models.edit_json(model / "config.json", n_layer=10**9)
        with LittleMemory():
            assert "n_layer is 1000000000, but there are only 4 tensors" in refuse(f"{form}:{model}")

    @pytest.mark.parametrize("name", ["n_embd", "vocab_size", "n_positions", "n_head"])
    def test_v_enormous_sizes(self, form, name, model, refuse):
        """10^30 heads or columns: no loop and no memory may follow such a number."""
        WRITERS[form](model)
        models.edit_json(model / "config.json", **{name: 10**30 + 1})
        with LittleMemory():
            assert "1000000000000000000000000000001" in refuse(f"{form}:{model}")

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_v_nonfinite(self, form, bad, model, refuse):
        def spoil(tensor):
            tensor[5, 7] = bad
            return tensor

        WRITERS[form](model, changes={QKV: spoil})
        message = refuse(f"{form}:{model}")
        assert "attn" in message
        assert "1 values are NaN or infinite, the first at [5, 7]" in message
        assert "--allow_nonfinite" in message
        message = refuse(f"{form}:{model}", to=f"llmc:{model.parent}/out.bin")
        assert "[5, 7]" in message


def test_v_missing_and_extra_by_the_hundred_are_told_at_once(model, refuse):
    """A prefix that is not GPT-2's makes every name both missing and left over."""
    config = models.CONFIG | {"n_layer": 48}
    models.write_hf(model, config=config, prefix="base_model.")
    message = refuse(f"hf:{model}")
    assert "wte.weight is missing" in message
    assert "more)" in message


def spoil_bits(tensor):
    """Puts NaNs of several payloads and signs, and infinities, into a float32 tensor."""
    bits = tensor.reshape(-1).view(np.uint32)
    bits[:5] = [0x7FC00001, 0xFFC12345, 0x7FFFFFFF, 0x7F800000, 0xFF800000]
    return tensor


@pytest.mark.parametrize("path", [["hf"], ["gptjax", "hf"], ["llmc", "hf"]])
def test_v_allowed_nonfinite_weights_keep_their_bits(path, model, accept, tmp_path):
    tensors = models.write_hf(model, changes={"wte.weight": spoil_bits, "h.1.ln_1.bias": spoil_bits})
    source = f"hf:{model}"
    for form in path[:-1]:
        convert.main([f"--from={source}", f"--to={form}:{tmp_path}/{form}", "--allow_nonfinite"])
        source = f"{form}:{tmp_path}/{form}"
    assert_equal_bits(accept(source, "--allow_nonfinite"), tensors)


def test_v_nonfinite_weights_in_gptjax_are_refused_too(model, refuse, tmp_path):
    models.write_hf(model, changes={QKV: spoil_bits})
    convert.main([f"--from=hf:{model}", f"--to=gptjax:{tmp_path}/run", "--allow_nonfinite"])
    assert f"{QKV}: 5 values are NaN or infinite, the first at [0, 0]" in refuse(f"gptjax:{tmp_path}/run")


def test_v_a_float16_infinity_is_found(model, refuse):
    def spoil(tensor):
        tensor[3] = np.inf
        return tensor

    models.write_hf(model, dtype="float16", changes={"ln_f.bias": spoil})
    assert "ln_f.bias: 1 values are NaN or infinite, the first at [3]" in refuse(f"hf:{model}")


def test_v_a_tensor_with_and_without_prefix(model, refuse):
    models.write_hf(model, extra={"ln_f.bias": np.zeros(16, np.float32)})
    message = refuse(f"hf:{model}")
    assert "ln_f.bias is there twice" in message
    assert "transformer.ln_f.bias" in message


def test_v_a_tensor_in_two_shards(model, refuse):
    models.write_hf(model, num_shards=2)
    first, second = sorted(model.glob("*.safetensors"))
    (header, data), (other, _) = models.read_header(first), models.read_header(second)
    name = next(name for name in other if name != "__metadata__")
    shape, start = other[name]["shape"], len(data)
    end = start + 4 * int(np.prod(shape))
    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    models.write_header(first, header, data + bytes(end - start))
    message = refuse(f"hf:{model}")
    assert f"{first}: has {name}, which the index does not place there" in message


def test_v_an_lm_head_that_differs_though_tied(model, refuse, accept):
    table = models.make_tensors()["wte.weight"]
    models.write_hf(model, extra={"lm_head.weight": table + np.float32(1e-3)})
    message = refuse(f"hf:{model}")
    assert "lm_head.weight is not transformer.wte.weight" in message
    assert "tie_word_embeddings" in message
    models.write_hf(model, extra={"lm_head.weight": table})
    assert "lm_head.weight" not in accept(f"hf:{model}")


@pytest.mark.parametrize("target", ["nanogpt", "llmc"])
def test_v_untied_models_do_not_fit_formats_of_one_table(target, model, refuse):
    models.write_hf(
        model, config=models.CONFIG | {"tie_word_embeddings": False}, extra={"lm_head.weight": np.ones((50, 16), "f4")}
    )
    message = refuse(f"hf:{model}", to=f"{target}:{model.parent}/out", code=BAD_CONFIG)
    assert f"--to={target}" in message
    assert "untied" in message


HOSTILE_NAMES = {
    "a line break": "transformer.h.0.a\nerror: all is well",
    "an escape sequence": "transformer.\x1b[2Jwte",
    "superscript two": "transformer.h.².ln_1.weight",
    "a layer of 5,000 digits": f"transformer.h.{'9' * 5000}.ln_1.weight",
    "a long name": "x" * 10**6,
    "a zero": "h.00.ln_1.weight",
    "a minus": "h.-1.ln_1.weight",
    "empty": "",
    "h.": "h.",
}


@pytest.mark.parametrize("what", HOSTILE_NAMES)
def test_v_hostile_names_of_tensors(what, model, refuse):
    models.write_hf(model)
    header, data = models.read_header(model / "model.safetensors")
    header[HOSTILE_NAMES[what]] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
    models.write_header(model / "model.safetensors", header, data)
    refuse(f"hf:{model}")


# config.json

UNSUPPORTED = {
    "activation_function": ["relu", "gelu", None, 3],
    "layer_norm_epsilon": [1e-6, 0, float("nan"), "1e-5"],
    "scale_attn_weights": [False, 1],
    "scale_attn_by_inverse_layer_idx": [True],
    "n_inner": [32, "64", -1],
    "reorder_and_upcast_attn": [True],
    "add_cross_attention": [True],
    "model_type": ["llama", None],
    "quantization_config": [{"bits": 4}],
    "is_encoder_decoder": [True],
    "pruned_heads": [{"0": [1]}],
    "tie_word_embeddings": ["yes", 1],
    "n_layer": [0, -1, 1.5, "12", None, True, [2]],
    "n_head": [0, "2"],
    "n_embd": [0, -16],
    "vocab_size": [0, 50.0],
    "n_positions": [0, {}],
    "embd_pdrop": [0.2, 1, -0.1, "0.1", float("nan")],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in UNSUPPORTED.items() for value in values])
def test_v_fields_that_are_not_gpt2s(name, value, model, refuse):
    models.write_hf(model)
    models.edit_json(model / "config.json", **{name: value})
    message = refuse(f"hf:{model}")
    assert f"{model}/config.json: " in message
    assert name in message


@pytest.mark.parametrize("name", ["activation_function", "model_type", "quantization_config", "n_layer", "n_inner"])
def test_v_a_long_value_makes_no_long_message(name, model, refuse):
    models.write_hf(model)
    models.edit_json(model / "config.json", **{name: "x\n" * 10**6})
    assert name in refuse(f"hf:{model}")


@pytest.mark.parametrize("rate", [1, -0.1, "0.1", True, float("nan")])
def test_v_a_rate_of_dropout_that_is_none(rate, model, refuse):
    models.write_hf(model)
    models.edit_json(model / "config.json", embd_pdrop=rate, attn_pdrop=rate, resid_pdrop=rate)
    assert "expected numbers from 0 to below 1" in refuse(f"hf:{model}")


def test_v_rates_of_dropout_that_differ_need_a_choice(model, refuse, accept):
    tensors = models.write_hf(model, config=models.CONFIG | {"embd_pdrop": 0.0, "attn_pdrop": 0.1, "resid_pdrop": 0.2})
    message = refuse(f"hf:{model}")
    assert "embd_pdrop=0.0, attn_pdrop=0.1, resid_pdrop=0.2" in message
    assert "--dropout" in message
    assert_equal_bits(accept(f"hf:{model}", "--dropout=0.3"), tensors)
    written = json.loads((model.parent / "accepted" / "config.json").read_text())
    assert [written[f"{part}_pdrop"] for part in ("embd", "attn", "resid")] == [0.3, 0.3, 0.3]


BROKEN_JSON = {
    "empty": b"",
    "not JSON": b"{'n_layer': 2}",
    "a list": b"[]",
    "a number": b"3",
    "not UTF-8": b'{"n_layer": "\xff"}',
    "UTF-16": json.dumps(models.CONFIG).encode("utf-16"),
    "deep lists": b"[" * 10**6,
    "deep and closed": b"[" * 10**5 + b"]" * 10**5,
    "a number of 5,000 digits": b'{"n_layer": ' + b"9" * 5000 + b"}",
    "a number of 4,000 digits": b'{"n_layer": ' + b"9" * 4000 + b"}",
    "larger than any": b'{"n_layer": 2, "x": "' + b"x" * (33 * MIB) + b'"}',
}


@pytest.mark.parametrize("what", BROKEN_JSON)
@pytest.mark.parametrize("form", ["hf", "msgpack"])
def test_v_a_config_that_is_no_config(form, what, model, refuse):
    WRITERS[form](model)
    (model / "config.json").write_bytes(BROKEN_JSON[what])
    assert "config.json" in refuse(f"{form}:{model}")


@pytest.mark.parametrize("depth", [100, 300, 900, 950, 1000, 3000, 10**4])
def test_v_a_nested_field(depth, model, refuse):
    models.write_hf(model)
    (model / "config.json").write_text('{"model_type": ' + "[" * depth + "]" * depth + "}")
    assert "config.json" in refuse(f"hf:{model}")


@pytest.mark.parametrize("form", ["hf", "msgpack"])
def test_v_no_config(form, model, refuse):
    WRITERS[form](model)
    (model / "config.json").unlink()
    assert f"{model}: no config.json" in refuse(f"{form}:{model}")


def test_v_no_weights(model, refuse):
    models.write_hf(model)
    (model / "model.safetensors").unlink()
    assert "no model.safetensors or pytorch_model.bin" in refuse(f"hf:{model}")
    assert "no flax_model.msgpack" in refuse(f"msgpack:{model}")


# Shards and links


def test_v_a_missing_shard(model, refuse):
    models.write_hf(model, num_shards=3)
    (model / "model-00002-of-00003.safetensors").unlink()
    message = refuse(f"hf:{model}")
    assert "model-00002-of-00003.safetensors is missing" in message


def test_v_a_tensor_that_its_shard_lacks(model, refuse):
    models.write_hf(model, num_shards=2)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["transformer.h.7.x"] = "model-00001-of-00002.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "transformer.h.7.x is missing, which the index places there" in refuse(f"hf:{model}")


@pytest.mark.parametrize("name", ["../other/model.safetensors", "OTHER/model.safetensors", "", ".", "a\nb", "\0", "\\"])
def test_v_an_index_that_names_a_file_elsewhere(name, model, refuse, tmp_path):
    models.write_hf(tmp_path / "other")
    tensors = models.write_hf(model)
    (model / "model.safetensors").unlink()
    places = dict.fromkeys(models.PREFIX + n for n in tensors) | {}
    shard = name.replace("OTHER", f"{tmp_path}/other")
    index = {"weight_map": dict.fromkeys(places, shard)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refuse(f"hf:{model}")
    assert repr(shard) in message


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": ["a"]}']
)
def test_v_an_index_that_is_none(index, model, refuse):
    models.write_hf(model)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(index)
    assert "expected a weight_map" in refuse(f"hf:{model}")


@pytest.mark.parametrize("kind", ["absolute", "relative", "directory", "chain"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "vocab.json", "model-00001-of-00002.safetensors"]
)
def test_v_a_link_out_of_the_directory(kind, name, model, refuse, tmp_path):
    models.write_hf(model, num_shards=2 if "-of-" in name else 1)
    secret = tmp_path / "secret"
    secret.mkdir()
    if (model / name).exists():
        (model / name).rename(secret / name)
    else:
        (secret / name).write_text("{}")
    if kind == "directory":
        (model / "sub").symlink_to(secret)
        (model / name).symlink_to(f"sub/{name}")
    elif kind == "chain":
        (model / "hop").symlink_to(secret / name)
        (model / name).symlink_to("hop")
    else:
        (model / name).symlink_to(secret / name if kind == "absolute" else f"../secret/{name}")
    message = refuse(f"hf:{model}")
    assert repr(name) in message
    assert "is a link that leads out of the directory" in message


def test_v_a_link_from_msgpack_out_of_the_directory(model, refuse, tmp_path):
    models.write_msgpack(model)
    (model / "flax_model.msgpack").rename(tmp_path / "secret")
    (model / "flax_model.msgpack").symlink_to(tmp_path / "secret")
    assert "'flax_model.msgpack' is a link that leads out" in refuse(f"msgpack:{model}")


@pytest.mark.parametrize("num_shards", [1, 2])
def test_v_a_snapshot_of_the_hub_cache_is_accepted(num_shards, accept, tmp_path):
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("c" * 40)
    tensors = models.write_hf(snapshot, num_shards=num_shards)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repository / "blobs" / f"{number:040x}")
        path.symlink_to(f"../../blobs/{number:040x}")
    assert_equal_bits(accept(f"hf:{snapshot}"), tensors)


def test_v_a_pipe_instead_of_a_file(model, refuse):
    models.write_hf(model)
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")
    assert "'model.safetensors' is not a file" in refuse(f"hf:{model}")


# The safetensors file itself


def shift(header, name, by_start, by_end):
    start, end = header[name]["data_offsets"]
    header[name] = header[name] | {"data_offsets": [start + by_start, end + by_end]}


def with_hole(header, data):
    for name in header:
        if name != "__metadata__":
            start = header[name]["data_offsets"][0]
            shift(header, name, 16 * (start > 0), 16 * (start > 0))
    return header, data[:16] + data


def damage_header(what, header, data):
    """Returns (header, data) of a file that is damaged as `what` says."""
    first, last = ("transformer.h.0.attn.c_attn.bias", "transformer.wte.weight")
    if what == "overlap":
        shift(header, first, -4, -4)
    elif what == "hole":
        largest = max((h for n, h in header.items() if n != "__metadata__"), key=lambda h: h["data_offsets"][0])
        largest["data_offsets"] = [end + 4 for end in largest["data_offsets"]]
        data += bytes(4)
    elif what == "beyond the end":
        shift(header, last, 10**6, 10**6)
    elif what == "start after end":
        header[first]["data_offsets"].reverse()
    elif what == "negative":
        header[first]["data_offsets"] = [-4, 0]
    elif what == "short":
        data = data[:-1]
    elif what == "long":
        data += bytes(1)
    elif what == "no data":
        data = b""
    elif what == "enormous shape":
        header[last]["shape"] = [2**62, 16]
    elif what == "shape of no such size":
        header[last]["shape"] = [51, 16]
    elif what == "metadata of numbers":
        header["__metadata__"] = {"format": 3}
    return header, data


@pytest.mark.parametrize(
    "what",
    [
        "overlap",
        "hole",
        "beyond the end",
        "start after end",
        "negative",
        "short",
        "long",
        "no data",
        "enormous shape",
        "shape of no such size",
        "metadata of numbers",
    ],
)
def test_v_damaged_safetensors(what, model, refuse):
    models.write_hf(model)
    file = model / "model.safetensors"
    models.write_header(file, *damage_header(what, *models.read_header(file)))
    with LittleMemory():
        assert f"{file}: not a usable safetensors file" in refuse(f"hf:{model}")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**63 - 1, 2**40, 10**8, 10**8 + 1, 0, 1, 2])
def test_v_impossible_lengths_of_the_header(length, model, refuse):
    models.write_hf(model)
    file = model / "model.safetensors"
    models.write_header(file, *models.read_header(file), length=length)
    with LittleMemory():
        assert f"{file}: not a usable safetensors file" in refuse(f"hf:{model}")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100])
def test_v_cut_off_safetensors(size, model, refuse):
    models.write_hf(model)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert f"{file}: not a usable safetensors file" in refuse(f"hf:{model}")


def test_v_a_header_of_a_hundred_megabytes(model, refuse):
    """It is as valid as such a header can be: a million tensors of no size, and spaces."""
    models.write_hf(model)
    file = model / "model.safetensors"
    header, data = models.read_header(file)
    text = json.dumps(header)[:-1].encode()
    entry = b',"%08d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text += b"".join(entry % number for number in range(10**6)) + b"}"
    models.write_header(file, text.ljust(100_000_000), data)
    with LittleMemory():
        assert f"{file}: not a usable safetensors file: its header takes 100000000 bytes" in refuse(f"hf:{model}")


@pytest.mark.parametrize("name", ["transformer.ln_f.bias", "__metadata__"])
def test_v_a_key_twice_in_the_header(name, model, refuse):
    """One program would take the first, another the last."""
    models.write_hf(model)
    file = model / "model.safetensors"
    header, data = models.read_header(file)
    again = json.dumps({name: header[name]})[1:-1]
    models.write_header(file, json.dumps(header)[:-1].encode() + f", {again}}}".encode(), data)
    message = refuse(f"hf:{model}")
    assert "not a usable safetensors file" in message
    assert f"'{name}' is there twice" in message or f"duplicate field `{name}`" in message


@pytest.mark.parametrize(("stored", "size"), [("F64", 8), ("I8", 1), ("U16", 2), ("BOOL", 1), ("F8_E4M3", 1)])
def test_v_unsupported_types(stored, size, model, refuse):
    models.write_hf(model)
    file = model / "model.safetensors"
    header, data = models.read_header(file)
    name = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][0])
    start = header[name]["data_offsets"][0]
    end = start + size * int(np.prod(header[name]["shape"]))
    header[name] |= {"dtype": stored, "data_offsets": [start, end]}
    models.write_header(file, header, data[:start] + bytes(end - start))
    message = refuse(f"hf:{model}")
    assert f"{name} has type {stored}" in message
    assert "F32, BF16, F16" in message


# llm.c


@pytest.fixture
def bin_file(tmp_path):
    models.write_llmc(tmp_path / "model.bin")
    return tmp_path / "model.bin"


def set_header(path, **fields):
    """Overwrites header fields, named by their position: at0=magic, at1=version ..."""
    whole = bytearray(path.read_bytes())
    for name, value in fields.items():
        at = 4 * int(name.removeprefix("at"))
        whole[at : at + 4] = int(value).to_bytes(4, "little", signed=True)
    path.write_bytes(whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_v_llmc_untouched(dtype, accept, tmp_path):
    tensors = models.write_llmc(tmp_path / "model.bin", dtype=dtype)
    assert_equal_bits(accept(f"llmc:{tmp_path}/model.bin"), tensors)


@pytest.mark.parametrize("magic", [0, 20240327, 20240520, -1])
def test_v_llmc_unknown_magic(magic, bin_file, refuse):
    set_header(bin_file, at0=magic)
    message = refuse(f"llmc:{bin_file}")
    assert f"starts with {magic}, expected the magic 20240326" in message


@pytest.mark.parametrize("version", [4, 1, 0, -3, 2**31 - 1])
def test_v_llmc_unknown_version(version, bin_file, refuse):
    set_header(bin_file, at1=version)
    assert f"version {version}; expected 3 (float32) or 5 (bfloat16)" in refuse(f"llmc:{bin_file}")


def test_v_llmc_version_of_the_other_type(bin_file, refuse):
    set_header(bin_file, at1=5)
    assert f"{bin_file.stat().st_size} bytes, but" in refuse(f"llmc:{bin_file}")


@pytest.mark.parametrize("size", [0, 1, 3, 4, 500, 1023, 1024, 1 / 3, 2 / 3, -1])
def test_v_llmc_cut_off(size, bin_file, refuse):
    whole = bin_file.read_bytes()
    bin_file.write_bytes(whole[: size if size in (0, 1) or isinstance(size, int) else int(size * len(whole))])
    assert str(bin_file) in refuse(f"llmc:{bin_file}")


def test_v_llmc_a_byte_too_long(bin_file, refuse):
    whole = bin_file.read_bytes()
    bin_file.write_bytes(whole + b"\0")
    message = refuse(f"llmc:{bin_file}")
    assert f"{len(whole) + 1} bytes, but the sizes in its header take {len(whole)}" in message


@pytest.mark.parametrize("at", range(2, 8))
@pytest.mark.parametrize("value", [2**31 - 1, -1, -(2**31), 0])
def test_v_llmc_impossible_sizes(at, value, bin_file, refuse):
    set_header(bin_file, **{f"at{at}": value})
    with LittleMemory():
        assert str(bin_file) in refuse(f"llmc:{bin_file}")


def test_v_llmc_all_sizes_enormous(bin_file, refuse):
    set_header(bin_file, **{f"at{at}": 2**31 - 1 for at in range(2, 8)})
    with LittleMemory():
        assert "the sizes in its header take" in refuse(f"llmc:{bin_file}")


def test_v_llmc_nonfinite(refuse, tmp_path):
    def spoil(tensor):
        tensor[5, 7] = np.nan
        return tensor

    models.write_llmc(tmp_path / "model.bin", changes={QKV: spoil})
    assert f"{QKV}: 1 values are NaN or infinite, the first at [5, 7]" in refuse(f"llmc:{tmp_path}/model.bin")


# msgpack

NOT_FLAX = {
    "empty": b"",
    "nothing": packing.packb(None),
    "a number": packing.packb(3),
    "a list": packing.packb([1, 2]),
    "a text": packing.packb("x" * 1000),
    "numbers as keys": packing.packb({1: {2: models.pack_array(np.ones(2))}}),
    "a text for an array": packing.packb({"wte": {"embedding": "x"}}),
    "an array alone": packing.packb(models.pack_array(np.ones(2))),
    "an array of objects": packing.packb(
        {"a": packing.ExtType(1, packing.packb(((1,), "object", b"\x08\0\0\0\0\0\0\0")))}
    ),
    "an array of no such shape": packing.packb({"a": packing.ExtType(1, packing.packb(((9,), "float32", b"\0" * 4)))}),
    "an array of no such type": packing.packb({"a": packing.ExtType(1, packing.packb(((1,), "os.system", b"\0" * 4)))}),
    "chunks of nothing": packing.packb({"a": {"__msgpack_chunked_array__": True}}),
    "an unknown extension": packing.packb({"a": packing.ExtType(77, b"x")}),
    "a complex number": packing.packb({"a": packing.ExtType(2, packing.packb((1.0, 2.0)))}),
    "deep dicts": b"\x81\xa1a" * 10**5 + b"\xc0",
    "deep lists": b"\x91" * 10**6,
    "a list of four billion": b"\xdd\xff\xff\xff\xff",
    "a dict of four billion": b"\xdf\xff\xff\xff\xff",
    "bytes of four billion": b"\xc6\xff\xff\xff\xff",
    "a hostile key": packing.packb({"a\nb\x1b[2J": models.pack_array(np.ones(2, "f4"))}),
    "a hostile key of no array": packing.packb({"a\nb\x1b[2J": 3}),
    "a hostile type": packing.packb({"a": packing.ExtType(1, packing.packb(((1,), "\x1b[2J\n", b"\0" * 4)))}),
    "two things": packing.packb({}) + packing.packb({}),
}


@pytest.mark.parametrize("what", NOT_FLAX)
def test_v_msgpack_of_something_else(what, model, refuse):
    models.write_msgpack(model)
    (model / "flax_model.msgpack").write_bytes(NOT_FLAX[what])
    with LittleMemory():
        refuse(f"msgpack:{model}")


@pytest.mark.parametrize("part", [0.0005, 1 / 3, 2 / 3, 0.9999])
def test_v_msgpack_cut_off(part, model, refuse):
    models.write_msgpack(model)
    file = model / "flax_model.msgpack"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(part * len(whole))])
    assert f"{file}: not a file of flax" in refuse(f"msgpack:{model}")


def test_v_msgpack_with_bits_flipped(model, accept, tmp_path):
    """It has no checksums: a flip in a weight is another weight. But nothing else may come of it."""
    tensors = models.write_msgpack(model)
    file = model / "flax_model.msgpack"
    whole, chance, refused = file.read_bytes(), random.Random(0), 0
    for number in range(60):
        damaged = bytearray(whole)
        damaged[chance.randrange(400)] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        try:
            found = accept(f"msgpack:{model}", "--allow_nonfinite", out=f"out{number}")
        except UserError:
            refused += 1
        else:
            assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in tensors.items()}
    assert refused > 5


@pytest.mark.parametrize("kind", ["float64", "int8", "complex64"])
def test_v_msgpack_of_unsupported_type(kind, model, refuse):
    models.write_msgpack(model, changes={FC: lambda t: t.astype(kind)})
    message = refuse(f"msgpack:{model}")
    assert f"is {kind}; expected float32, bfloat16, float16" in message


# Flags, and the place where the result goes


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--from", "pt:model"),
        ("--from", "model"),
        ("--from", "hf:"),
        ("--from", ""),
        ("--to", "msgpack:out"),
        ("--to", "onnx:out"),
        ("--to", "out"),
        ("--to", "llmc:"),
    ],
)
def test_v_unknown_formats(flag, value, refuse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models.write_hf(tmp_path / "model")
    places = {"--from": "hf:model", "--to": "hf:out"} | {flag: value}
    message = refuse(places["--from"], f"--to={places['--to']}", code=BAD_CONFIG)
    if value or flag == "--from":
        assert f"{flag}={value}" in message


@pytest.mark.parametrize(
    "flags", [["--dropout=1"], ["--dropout=nan"], ["--dtype=float16"], ["--dropuot=0.1"], ["--push=a/b"]]
)
def test_v_bad_flags(flags, refuse, tmp_path):
    models.write_hf(tmp_path / "model")
    message = refuse(f"hf:{tmp_path}/model", *flags, to=f"llmc:{tmp_path}/out", code=BAD_CONFIG)
    assert flags[0].partition("=")[0] in message


@pytest.mark.parametrize("form", ["gptjax", "hf", "llmc", "msgpack"])
def test_v_nothing_to_convert(form, refuse, tmp_path):
    path = tmp_path / "none" / "such" / "model"
    assert str(path) in refuse(f"{form}:{path}")


def test_v_an_empty_directory(refuse, tmp_path):
    (tmp_path / "empty").mkdir()
    for form in ("gptjax", "hf", "llmc", "msgpack"):
        assert f"{tmp_path}/empty" in refuse(f"{form}:{tmp_path}/empty")


def test_v_a_file_where_a_directory_belongs(refuse, tmp_path):
    (tmp_path / "file").write_text("x")
    for form in ("gptjax", "hf", "msgpack"):
        assert f"{tmp_path}/file" in refuse(f"{form}:{tmp_path}/file")


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
@pytest.mark.parametrize("form", ["hf", "llmc", "gptjax"])
def test_v_an_existing_output_is_left_alone(form, kind, model, refuse):
    models.write_hf(model)
    out = model.parent / "out"
    if kind == "file":
        out.write_text("precious")
    elif kind == "directory":
        out.mkdir()
        (out / "precious").write_text("precious")
    else:
        out.symlink_to("nowhere")
    message = refuse(f"hf:{model}", to=f"{form}:{out}", code=BAD_CONFIG)
    if (form, kind) == ("llmc", "directory"):  # --force would not help
        assert message == f"--to=llmc:{out}: is a directory; name a file, such as {out}/model.bin"
    else:
        assert message == f"{out}: exists; --force replaces it"


def test_v_force_replaces_only_when_all_is_well(model, refuse, accept, tmp_path):
    old = models.write_hf(model)
    assert_equal_bits(accept(f"hf:{model}"), old)
    models.write_hf(model, changes={QKV: spoil_bits})
    refuse(f"hf:{model}", "--force", to=f"hf:{tmp_path}/accepted")
    new = models.write_hf(model, seed=1)
    assert_equal_bits(accept(f"hf:{model}", "--force"), new)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "accepted"}


@pytest.mark.parametrize("failing", ["rename", "read back", "write"])
def test_v_force_keeps_the_old_when_the_end_fails(failing, model, refuse, tmp_path, monkeypatch):
    models.write_hf(model)
    out = tmp_path / "out.bin"
    convert.main([f"--from=hf:{model}", f"--to=llmc:{out}"])
    rename, read_header, write = os.rename, llmc.read_header, llmc.write

    def fail_to_rename(source, target):
        if target == str(out) and source.endswith("/new"):
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    def write_and_damage(path, *args, **rest):
        write(path, *args, **rest)
        with open(path, "r+b") as file:
            file.seek(2000)
            file.write(b"\x01\x02")

    def fail_to_write(*_, **__):
        raise OSError(28, "No space left on device")

    if failing == "rename":
        monkeypatch.setattr(os, "rename", fail_to_rename)
    else:
        monkeypatch.setattr(llmc, "write", write_and_damage if failing == "read back" else fail_to_write)
    code = BAD_DATA if failing == "read back" else CANNOT_WRITE
    message = refuse(f"hf:{model}", "--force", to=f"llmc:{out}", code=code)
    reasons = {"rename": "Permission denied", "read back": "not what is read back", "write": "No space left"}
    assert reasons[failing] in message
    assert read_header(str(out))


@pytest.mark.parametrize("form", ["hf", "llmc", "gptjax", pytest.param("nanogpt", marks=pytest.mark.torch)])
def test_v_a_file_that_may_not_grow(form, model, refuse, tmp_path):
    """As on a full disk, which every library tells of in its own way."""
    if form == "nanogpt":
        pytest.importorskip("torch")
    models.write_hf(model, config=models.CONFIG | {"vocab_size": 2000, "n_embd": 64})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, limits[1]))
    try:
        message = refuse(f"hf:{model}", to=f"{form}:{tmp_path}/out", code=CANNOT_WRITE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path}/out: cannot be written: " in message
    assert message.endswith(" written" if form in ("hf", "llmc") else "File too large")


def test_v_directories_made_for_a_result_go_with_it(model, refuse, tmp_path):
    models.write_hf(model, changes={QKV: spoil_bits})
    refuse(f"hf:{model}", to=f"hf:{tmp_path}/some/where/out")


def test_v_a_file_in_the_way(model, refuse, tmp_path):
    models.write_hf(model)
    (tmp_path / "file").write_text("x")
    message = refuse(f"hf:{model}", to=f"hf:{tmp_path}/file/out", code=CANNOT_WRITE)
    assert f"{tmp_path}/file/out: cannot be written" in message


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.isdir("/sys/kernel"), reason="root may write anywhere")
def test_v_a_directory_that_is_not_writable(model, refuse, tmp_path):
    models.write_hf(model)
    place = "/sys/kernel"  # not even root may
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        place = f"{tmp_path}/closed"
    assert "cannot be written" in refuse(f"hf:{model}", to=f"hf:{place}/out", code=CANNOT_WRITE)


# Extras


@pytest.mark.parametrize("form", ["nanogpt", "hf"])
def test_v_without_torch_the_extra_is_named(form, model, refuse, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    models.write_hf(model)
    file = model / "pytorch_model.bin"
    (model / "model.safetensors").rename(file)
    message = refuse(f"{form}:{model if form == 'hf' else file}", code=UNAVAILABLE)
    assert str(file) in message
    assert "pip install 'gptjax[torch]'" in message


def test_v_without_torch_nothing_becomes_nanogpt(model, refuse, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    models.write_hf(model)
    message = refuse(f"hf:{model}", to=f"nanogpt:{model.parent}/ckpt.pt", code=UNAVAILABLE)
    assert "pip install 'gptjax[torch]'" in message


@pytest.mark.parametrize("version", ["2.9.1", "2.5.0+cu124", "1.13.1"])
def test_v_an_old_torch_is_not_trusted(version, model, refuse, monkeypatch):
    class OldTorch:
        __version__ = version

        def load(self, *_, **__):
            raise AssertionError("was trusted")

    monkeypatch.setitem(sys.modules, "torch", OldTorch())
    models.write_hf(model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    message = refuse(f"hf:{model}", code=UNAVAILABLE)
    assert f"torch {version} is not safe" in message
    assert "2.10" in message


@pytest.mark.parametrize("version", ["2.10.0", "2.11.0a0+git1234", "3.0.1+cpu"])
def test_v_a_torch_that_is_safe_is_taken(version, monkeypatch):
    torch = types.SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert torch_file.import_torch("x") is torch


def test_v_without_the_hub_the_extra_is_named(refuse, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'gptjax[hub]'" in refuse("hf:someone/tiny", code=UNAVAILABLE)


# The real command


def write_transposed(root):
    models.write_hf(root / "model", changes={QKV: lambda t: t.T})
    return f"hf:{root}/model"


def write_nan(root):
    models.write_hf(root / "model", changes={QKV: spoil_bits})
    return f"hf:{root}/model"


def write_long_header(root):
    models.write_hf(root / "model")
    file = root / "model" / "model.safetensors"
    models.write_header(file, *models.read_header(file), length=2**63)
    return f"hf:{root}/model"


def write_many_layers(root):
    models.write_llmc(root / "model.bin")
    set_header(root / "model.bin", at4=2**31 - 1)
    return f"llmc:{root}/model.bin"


def write_not_flax(root):
    models.write_msgpack(root / "model")
    (root / "model" / "flax_model.msgpack").write_bytes(b"\x91" * 10**6)
    return f"msgpack:{root}/model"


COMMANDS = {
    "transposed": (write_transposed, BAD_DATA, "looks transposed"),
    "NaN": (write_nan, BAD_DATA, "NaN or infinite"),
    "header of 2^63": (write_long_header, BAD_DATA, "not a usable safetensors file"),
    "2^31 layers": (write_many_layers, BAD_DATA, "the sizes in its header take"),
    "deep msgpack": (write_not_flax, BAD_DATA, "not a file of flax"),
    "unknown format": (lambda root: "pt:model", BAD_CONFIG, "--from=pt:model"),
}


@pytest.mark.parametrize("what", COMMANDS)
def test_v_the_command_says_one_line_and_leaves_nothing(what, tmp_path):
    write, code, reason = COMMANDS[what]
    source = write(tmp_path)
    before = snapshot(tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(runs.OFFLINE), str(runs.REPOSITORY)])}
    command = [sys.executable, "-m", "gptjax.convert", f"--from={source}", f"--to=gptjax:{tmp_path}/run"]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert reason in line
    assert snapshot(tmp_path) == before


# F1: whatever the bytes, only the documented errors


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A small whole model in the three forms, and a directory to damage copies in."""
    root = tmp_path_factory.mktemp("healthy")
    models.write_hf(root / "hf", config=models.CONFIG | {"n_layer": 1})
    models.write_msgpack(root / "msgpack", config=models.CONFIG | {"n_layer": 1})
    models.write_llmc(root / "model.bin", config=models.CONFIG | {"n_layer": 1})
    return root


def read_all(weights):
    for tensor in weights.tensors.values():
        assert tensor.read().shape == tensor.shape


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 16, 48, 2**31, 2**62, 2**63, 2**64, 10**30, 1.5, float("inf"), float("nan"), 10**400]),
    st.text(max_size=8),
    st.sampled_from(["F32", "BF16", "F64", "I8", "h.0.ln_1.weight", "__metadata__", "h.².x", "\n", "transformer."]),
    st.lists(st.one_of(st.integers(-2, 60), st.integers(0, 2**64)), max_size=4),
    st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), st.integers(), max_size=3),
)


@st.composite
def damaged_safetensors(draw):
    """Returns how to change a safetensors file: a function of (header, data) that gives its bytes."""
    edits = draw(
        st.lists(
            st.tuples(
                st.integers(0, 2**16),
                st.sampled_from(["dtype", "shape", "data_offsets", "all", "drop", "name"]),
                ODD,
                st.text(max_size=6),
            ),
            max_size=3,
        )
    )
    patches = draw(st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3)), max_size=2))
    length = draw(st.one_of(st.none(), st.none(), st.integers(-3, 3), st.integers(2**20, 2**64 - 1)))
    tail = draw(st.sampled_from([0, 0, 0, -1, -100, 1, 64]))

    def change(header, data):
        header = json.loads(json.dumps(header))
        for which, field, value, name in edits:
            key = list(header)[which % len(header)] if header else "x"
            if field == "drop":
                header.pop(key, None)
            elif field == "name":
                header[name] = header.pop(key, value)
            elif field == "all" or not isinstance(header.get(key), dict):
                header[key] = value
            else:
                header[key][field] = value
        text = bytearray(json.dumps(header).encode())
        for where, patch in patches:
            at = int(where * len(text))
            text[at : at + len(patch)] = patch
        size = len(text) if length is None else length if length > 3 else max(0, len(text) + length)
        return size.to_bytes(8, "little") + bytes(text) + (data[:tail] if tail < 0 else data + bytes(tail))

    return change


@fuzz
@given(damaged_safetensors())
def test_f1_safetensors(healthy, change):
    file = healthy / "hf" / "model.safetensors"
    original = file.read_bytes()
    try:
        file.write_bytes(change(*models.read_header(file)))
        for attempt in (
            lambda: huggingface.open_safetensors(str(file)),
            lambda: read_all(huggingface.read(str(file.parent), origin="hf:x")),
        ):
            expect_only_user_errors(attempt)
    finally:
        file.write_bytes(original)


@fuzz
@given(
    st.dictionaries(
        st.sampled_from([*huggingface.REQUIRED, *huggingface.SIZES, *huggingface.DROPOUTS, "n_inner"]), ODD, min_size=1
    )
)
def test_f1_configs(healthy, fields):
    file = healthy / "hf" / "config.json"
    original = file.read_bytes()
    try:
        models.edit_json(file, **fields)
        expect_only_user_errors(lambda: read_all(huggingface.read(str(file.parent), origin="hf:x")))
    finally:
        file.write_bytes(original)


WORDS = st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-1, 60), st.sampled_from([128, 16, 2**31 - 1]))


@fuzz
@given(
    st.dictionaries(st.integers(0, 9), WORDS, max_size=4),
    st.sampled_from([0, 0, 0, -1, 1, -4, 4, -1023]),
    st.booleans(),
)
def test_f1_llmc_headers(healthy, fields, tail, fits):
    """fits: the file has as many bytes as the header says, up to a few MiB."""
    original = (healthy / "model.bin").read_bytes()
    file = healthy / "damaged.bin"
    file.write_bytes(original[:tail] if tail < 0 else original + bytes(tail))
    set_header(file, **{f"at{at}": value for at, value in fields.items()})
    if fits:
        T, _, L, _, D, padded = np.frombuffer(file.read_bytes()[8:32], "<i4").tolist()
        size = 1024 + 4 * ((padded + T) * D + L * (12 * D * D + 13 * D) + 2 * D)
        if 0 < size < 4 * MIB:
            file.write_bytes(file.read_bytes()[:size].ljust(size, b"\0"))
    expect_only_user_errors(lambda: llmc.read_header(str(file)))
    expect_only_user_errors(lambda: read_all(llmc.read(str(file), origin="llmc:x")))


@st.composite
def damaged_msgpack(draw):
    """Returns how to change a msgpack file, or bytes to write instead."""
    if draw(st.booleans()):
        return draw(
            st.one_of(
                st.binary(max_size=200),
                st.recursive(
                    st.one_of(st.none(), st.integers(-9, 9), st.text(max_size=4), st.binary(max_size=9)),
                    lambda inner: st.one_of(
                        st.lists(inner, max_size=3),
                        st.dictionaries(
                            st.one_of(st.text(max_size=3), st.sampled_from(["h", "0", "__msgpack_chunked_array__"])),
                            inner,
                            max_size=3,
                        ),
                        st.tuples(st.integers(0, 4), st.binary(max_size=20)).map(lambda pair: packing.ExtType(*pair)),
                    ),
                ).map(packing.packb),
            )
        )
    patches = draw(st.lists(st.tuples(st.integers(0, 600), st.binary(min_size=1, max_size=4)), min_size=1, max_size=3))

    def change(whole):
        whole = bytearray(whole)
        for at, patch in patches:
            whole[at : at + len(patch)] = patch
        return bytes(whole)

    return change


@fuzz
@given(damaged_msgpack())
def test_f1_msgpack(healthy, change):
    file = healthy / "msgpack" / "flax_model.msgpack"
    original = file.read_bytes()
    try:
        file.write_bytes(change if isinstance(change, bytes) else change(original))
        expect_only_user_errors(lambda: read_all(msgpack.read(str(file.parent), origin="msgpack:x")))
    finally:
        file.write_bytes(original)


def expect_only_user_errors(call):
    with LittleMemory():
        try:
            call()
        except UserError as error:
            message = str(error)
            assert message.isprintable(), message
            assert len(message) < 600, message
