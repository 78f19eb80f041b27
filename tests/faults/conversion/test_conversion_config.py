"""V: a config.json that is not GPT-2's, or none, is refused by the field."""

import json

import pytest

from tests.convert import models
from tests.faults.conversion.shared import MIB, WRITERS, assert_equal_bits

pytestmark = pytest.mark.faults


UNSUPPORTED = {
    "activation_function": ["relu", "quick_gelu", None, 3, ["gelu"]],
    "layer_norm_epsilon": [1e-6, 0, float("nan"), "1e-5"],
    "scale_attn_weights": [False, 1],
    "scale_attn_by_inverse_layer_idx": [True],
    "n_inner": [32, "64", -1],
    "reorder_and_upcast_attn": [1, "true"],
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
LONG = "x\n" * 10**6  # which a message must not repeat
for shortened in ("activation_function", "model_type", "quantization_config", "n_layer", "n_inner"):
    UNSUPPORTED[shortened].append(LONG)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in UNSUPPORTED.items() for value in values])
def test_v_config_field_unlike_gpt2_is_refused(name, value, hf, refuse):
    models.edit_json(hf / "config.json", **{name: value})
    refuse(f"hf:{hf}", field=hf / "config.json", match=name)


@pytest.mark.parametrize("rate", [1, -0.1, "0.1", True, float("nan")])
def test_v_invalid_dropout_rate_is_refused(rate, hf, refuse):
    models.edit_json(hf / "config.json", embd_pdrop=rate, attn_pdrop=rate, resid_pdrop=rate)
    refuse(f"hf:{hf}", field=hf / "config.json", match="embd_pdrop")


def test_v_different_dropout_rates_require_the_dropout_flag(model, refuse, accept):
    tensors = models.write_hf(model, config=models.CONFIG | {"embd_pdrop": 0.0, "attn_pdrop": 0.1, "resid_pdrop": 0.2})
    refuse(f"hf:{model}", field=model / "config.json", remedy="--dropout=RATE")
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
def test_v_unreadable_config_json_is_refused(form, what, model, refuse):
    WRITERS[form](model)
    (model / "config.json").write_bytes(BROKEN_JSON[what])
    refuse(f"{form}:{model}", field=model / "config.json")


@pytest.mark.parametrize("depth", [100, 300, 900, 950, 1000, 3000, 10**4])
def test_v_deeply_nested_config_field_is_refused(depth, hf, refuse):
    (hf / "config.json").write_text('{"model_type": ' + "[" * depth + "]" * depth + "}")
    refuse(f"hf:{hf}", field=hf / "config.json")


@pytest.mark.parametrize("form", ["hf", "msgpack"])
def test_v_missing_config_json_is_reported(form, model, refuse):
    WRITERS[form](model)
    (model / "config.json").unlink()
    refuse(f"{form}:{model}", field=model, match="config.json")


def test_v_missing_weights_are_reported(hf, refuse):
    (hf / "model.safetensors").unlink()
    refuse(f"hf:{hf}", field=hf, match="model.safetensors")
    refuse(f"msgpack:{hf}", field=hf, match="flax_model")
