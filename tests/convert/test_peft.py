"""PEFT fine-tunes an export of gptjax, and gptjax reads what PEFT and wrappers of torch save of it."""

import numpy as np
import pytest

from gptjax.convert import __main__ as command
from gptjax.convert import formats
from gptjax.convert.formats import ModelRef
from gptjax.convert.weights import read_tensors
from tests.convert.models import CONFIG, write_hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
# Of the libraries among themselves.
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]


@pytest.fixture(scope="module", params=["gelu_new", "gelu"])
def exported(request, tmp_path_factory):
    """An export of gptjax with a tokenizer of bytes."""
    base = tmp_path_factory.mktemp("peft")
    sizes = CONFIG | {"vocab_size": 257, "n_positions": 32, "activation_function": request.param}
    write_hf(base / "theirs", config=sizes | dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0))
    command.main([f"--from=hf:{base}/theirs", f"--to=gptjax:{base}/run", "--tokenizer=bytes"])
    command.main([f"--from=gptjax:{base}/run", f"--to=hf:{base}/export"])
    return base / "export"


@pytest.fixture
def tuned(exported):
    """(the model with trained LoRA adapters, its tokens, the logits before)."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel.from_pretrained(exported)
    tokens = torch.randint(0, 257, (4, 32))
    with torch.no_grad():
        before = model(tokens).logits
    settings = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    adapted = peft.get_peft_model(model, settings)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    for _ in range(3):
        adapted(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted, tokens, before


def test_merged_adapters_come_back_to_gptjax(tuned, exported, tmp_path):
    adapted, tokens, before = tuned
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        expected = merged(tokens).logits
    assert (expected - before).abs().max() > 1e-3, "it was trained"
    merged.save_pretrained(tmp_path / "merged")
    weights = formats.open_weights(ModelRef("hf", str(tmp_path / "merged")))
    assert weights.config == formats.open_weights(ModelRef("hf", str(exported))).config
    found = dict(read_tensors(weights))
    for name, tensor in merged.transformer.state_dict().items():
        assert np.array_equal(found[name], tensor.numpy()), name
    command.main([f"--from=hf:{tmp_path}/merged", f"--to=gptjax:{tmp_path}/run"])
    command.main([f"--from=gptjax:{tmp_path}/run", f"--to=hf:{tmp_path}/again"])
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, expected)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "model."])
def test_state_of_a_wrapped_model_is_read(exported, tmp_path, wrapper):
    """As DataParallel, torch.compile and Lightning save it, beside the export's config.json."""
    model = transformers.GPT2LMHeadModel.from_pretrained(exported)
    wrapped = {"module.": torch.nn.DataParallel(model), "_orig_mod.": torch.compile(model)}.get(wrapper)
    state = {wrapper + name: value for name, value in model.state_dict().items()}
    if wrapped is not None:
        state = wrapped.state_dict()
    assert all(name.startswith(wrapper) for name in state)
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = dict(read_tensors(formats.open_weights(ModelRef("hf", str(tmp_path)))))
    expected = dict(read_tensors(formats.open_weights(ModelRef("hf", str(exported)))))
    assert {n: t.tobytes() for n, t in found.items()} == {n: t.tobytes() for n, t in expected.items()}
