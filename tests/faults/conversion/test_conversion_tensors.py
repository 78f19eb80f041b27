"""V: tensors that are not exactly GPT-2's are refused in one line that says why, and nothing is written."""

import numpy as np
import pytest

from gptjax.convert import __main__ as convert
from gptjax.errors import ConfigError
from tests.convert import models
from tests.faults.conversion.shared import FC, QKV, WRITERS, LittleMemory, assert_equal_bits, putting, spoil_bits

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("form", WRITERS)
def test_v_untouched_models_are_converted(form, model, accept):
    """Else all the refusals below would show nothing."""
    tensors = WRITERS[form](model)
    assert_equal_bits(accept(f"{form}:{model}"), tensors)


LN1, OTHER_LN1 = "h.0.ln_1.weight", "transformer.h.0.ln1.weight"
ROTARY = "transformer.h.0.rotary.scale"
UNLIKE = {  # what is written, what then changes in config.json, and what the message names
    "wrong shape": ({"changes": {"h.1.ln_2.bias": lambda t: t[:-1]}}, {}, "ln_2.* 15, expected 16"),
    "transposed": ({"changes": {QKV: lambda t: t.T}}, {}, "48x16, expected 16x48: .* transposed"),
    "missing": ({"drop": [FC]}, {}, f"{FC} is missing"),
    "extra": ({"extra": {ROTARY: np.ones(4, "f4")}}, {}, "rotary.*: not"),
    "renamed": ({"drop": [LN1], "extra": {OTHER_LN1: np.ones(16, "f4")}}, {}, f"{LN1} .* h.0.ln1.weight"),
    "vocabulary": ({}, {"vocab_size": 51}, "50x16, expected 51x16: vocab_size"),
    "layers": ({}, {"n_layer": 3}, "n_layer is 3, .* 2 layers"),
    "fewer layers": ({}, {"n_layer": 1}, "n_layer is 1, .* 2 layers"),
    "heads": ({}, {"n_head": 3}, "n_head=3: "),
    "10^9 layers": ({}, {"n_layer": 10**9}, "n_layer is 1000000000, .* 2 layers"),
    "10^9 of no layers": (
        {"config": models.CONFIG | {"n_layer": 0}},
        {"n_layer": 10**9},
        "is 1000000000, .* 4 tensors",
    ),
}


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("what", UNLIKE)
def test_v_tensors_unlike_the_config_are_refused_without_allocation(what, form, model, refuse):
    written, changed, named = UNLIKE[what]
    WRITERS[form](model, **written)
    models.edit_json(model / "config.json", **changed)
    with LittleMemory():
        refuse(f"{form}:{model}", match=named)


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("name", ["n_embd", "vocab_size", "n_positions", "n_head"])
def test_v_enormous_size_is_refused_without_allocation(form, name, model, refuse):
    """10^30 heads or columns: no loop and no memory may follow such a number."""
    WRITERS[form](model)
    models.edit_json(model / "config.json", **{name: 10**30 + 1})
    with LittleMemory():
        refuse(f"{form}:{model}", field=model / "config.json", match=f"{name}=1000000000000000000000000000001")


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_v_nonfinite_weight_is_refused_with_its_position(form, bad, model, refuse):
    WRITERS[form](model, changes={QKV: putting(bad, (5, 7))})
    for to in (f"hf:{model.parent}/out", f"llmc:{model.parent}/out.bin"):
        refuse(f"{form}:{model}", to=to, remedy="--allow_nonfinite", match=r"attn.* 1 values .*\[5, 7\]")


def test_v_hundreds_of_missing_tensors_are_summarized(model, refuse):
    """A prefix that is not GPT-2's makes every name both missing and left over."""
    models.write_hf(model, config=models.CONFIG | {"n_layer": 48}, prefix="base_model.")
    refuse(f"hf:{model}", match=r"wte.weight .* more\)")


@pytest.mark.parametrize("path", [["hf"], ["gptjax", "hf"], ["llmc", "hf"]])
def test_v_allowed_nonfinite_weights_keep_their_bits(path, model, accept, tmp_path):
    tensors = models.write_hf(model, changes={"wte.weight": spoil_bits, "h.1.ln_1.bias": spoil_bits})
    source = f"hf:{model}"
    for form in path[:-1]:
        convert.main([f"--from={source}", f"--to={form}:{tmp_path}/{form}", "--allow_nonfinite"])
        source = f"{form}:{tmp_path}/{form}"
    assert_equal_bits(accept(source, "--allow_nonfinite"), tensors)


def test_v_nonfinite_weights_in_a_gptjax_checkpoint_are_refused(model, refuse, tmp_path):
    models.write_hf(model, changes={QKV: spoil_bits})
    convert.main([f"--from=hf:{model}", f"--to=gptjax:{tmp_path}/run", "--allow_nonfinite"])
    origin = f"gptjax:{tmp_path}/run@0"
    refuse(f"gptjax:{tmp_path}/run", field=origin, remedy="--allow_nonfinite", match=rf"{QKV}: 5 values .*\[0, 0\]")


def test_v_a_float16_infinity_is_found(model, refuse):
    models.write_hf(model, dtype="float16", changes={"ln_f.bias": putting(np.inf, 3)})
    refuse(f"hf:{model}", remedy="--allow_nonfinite", match=r"ln_f.bias: 1 values .*\[3\]")


def test_v_tensor_stored_with_and_without_prefix_is_refused(model, refuse):
    models.write_hf(model, extra={"ln_f.bias": np.zeros(16, np.float32)})
    refuse(f"hf:{model}", field=model / "model.safetensors", match="ln_f.bias .*transformer.ln_f.bias")


def test_v_tensor_in_two_shards_is_refused(model, refuse):
    models.write_hf(model, num_shards=2)
    first, second = sorted(model.glob("*.safetensors"))
    (header, data), (other, _) = models.read_header(first), models.read_header(second)
    name = next(name for name in other if name != "__metadata__")
    shape, start = other[name]["shape"], len(data)
    end = start + 4 * int(np.prod(shape))
    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    models.write_header(first, header, data + bytes(end - start))
    refuse(f"hf:{model}", field=first, match=name)


@pytest.mark.parametrize("target", ["nanogpt", "llmc"])
def test_v_untied_model_is_refused_by_formats_without_a_head(target, model, refuse):
    models.write_hf(
        model, config=models.CONFIG | {"tie_word_embeddings": False}, extra={"lm_head.weight": np.ones((50, 16), "f4")}
    )
    to = f"{target}:{model.parent}/out"
    refuse(f"hf:{model}", to=to, kind=ConfigError, field="--to", value=target, remedy="use hf:DIR")


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
def test_v_hostile_tensor_name_is_refused(what, model, refuse):
    models.write_hf(model)
    header, data = models.read_header(model / "model.safetensors")
    name = HOSTILE_NAMES[what]
    header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
    models.write_header(model / "model.safetensors", header, data)
    refuse(f"hf:{model}", field=None if name.isprintable() and len(name) <= 200 else model / "model.safetensors")
