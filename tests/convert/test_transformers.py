"""What transformers computes from a model directory, gptjax computes too, at GPT-2's full size; and the way back."""

import logging
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import GPTConfig
from gptjax.convert import __main__ as command
from gptjax.convert import formats
from gptjax.convert.names import shapes
from gptjax.convert.weights import read_leaves, read_tensors
from gptjax.generate import generate
from gptjax.loss import cross_entropy
from gptjax.model import GPT, unembedding
from gptjax.params import count_params, rows
from gptjax.sharding import path_name

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """GPT-2 small as transformers writes it, every weight random."""
    path = tmp_path_factory.mktemp("gpt2") / "theirs"
    torch.manual_seed(0)
    settings = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(settings)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.03 * torch.randn(weight.shape))
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(directory):
    return transformers.GPT2LMHeadModel.from_pretrained(directory, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def weights(directory):
    return formats.open_weights(formats.ModelRef("hf", str(directory)))


@pytest.fixture(scope="module")
def params(weights):
    return formats.load_params(weights, lambda path, leaf: jnp.asarray(leaf))


def tokens_BT(shape):
    return np.random.default_rng(1).integers(50257, size=shape)


def test_imported_model_is_gpt2_small(weights):
    assert weights.config == GPTConfig(dropout=0.0)
    assert count_params(weights.config) == 124_439_808


def test_logits_equal_transformers(theirs, weights, params):
    tokens = tokens_BT((2, 96))
    with torch.no_grad():
        expected_BTV = theirs(torch.from_numpy(tokens)).logits.numpy()
    logits_BTV = jax.jit(GPT(weights.config).apply)({"params": params}, jnp.asarray(tokens, jnp.int32))
    assert logits_BTV.shape == expected_BTV.shape
    assert np.std(expected_BTV) > 0.3
    assert np.abs(logits_BTV - expected_BTV).max() <= 1e-5 * np.abs(expected_BTV).max()


def test_gradients_equal_transformers(theirs, weights, params):
    tokens, config = tokens_BT((1, 65)), weights.config
    theirs.zero_grad()
    theirs(torch.from_numpy(tokens), labels=torch.from_numpy(tokens)).loss.backward()
    named = {name.removeprefix("transformer."): weight.grad.numpy() for name, weight in theirs.named_parameters()}
    expected = dict(read_leaves(weights, ((name, named[name]) for name in shapes(config))))
    theirs.zero_grad(set_to_none=True)

    def loss(params, tokens_BT):
        x_BTD = GPT(config).apply({"params": params}, tokens_BT[:, :-1], method="hidden")
        sums = cross_entropy(x_BTD, unembedding(params), tokens_BT[:, 1:], vocab_size=config.vocab_size, chunk=0)
        return sums.loss / sums.tokens

    grads = jax.jit(jax.grad(loss))(params, jnp.asarray(tokens, jnp.int32))
    found = {path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(grads)}
    assert set(found) == set(expected) == {row.path for row in rows(config)}
    errors = {name: np.linalg.norm(found[name] - e) / np.linalg.norm(e) for name, e in expected.items()}
    assert {name: error for name, error in errors.items() if not error <= 1e-4} == {}


def test_greedy_generation_equals_transformers_for_100_tokens(theirs, weights, params):
    prompt = tokens_BT((7,)).tolist()
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        )[0, len(prompt) :].tolist()  # fmt: skip
    found = generate(GPT(weights.config), params, [prompt], max_new_tokens=100, eot_id=50256, temperature=0)
    assert len(set(expected)) > 5
    assert found == [expected]


@pytest.fixture(scope="module")
def exported(directory, tmp_path_factory):
    """The same model after a stay in gptjax, with GPT-2's tokenizer."""
    base = tmp_path_factory.mktemp("exported")
    command.main([f"--from=hf:{directory}", f"--to=gptjax:{base}/ours", "--tokenizer=gpt2"])
    command.main([f"--from=gptjax:{base}/ours", f"--to=hf:{base}/theirs"])
    return base / "theirs"


@pytest.fixture
def complaints(caplog):
    """What transformers has warned of."""
    transformers.logging.enable_propagation()
    caplog.set_level(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield lambda: [record.getMessage() for record in caplog.records]
    transformers.logging.disable_propagation()


def test_export_loads_into_transformers_unchanged_and_without_warnings(theirs, exported, complaints):
    model, info = transformers.GPT2LMHeadModel.from_pretrained(exported, output_loading_info=True)
    assert {name: list(found) for name, found in info.items() if found} == {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert complaints() == []
    expected, found = theirs.state_dict(), model.state_dict()
    assert set(expected) == set(found)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert tokenizer("Hello world")["input_ids"] == [15496, 995]


def test_complaints_fixture_captures_warnings_of_transformers(exported, complaints, tmp_path):
    settings = transformers.GPT2Config.from_pretrained(exported)
    settings.tie_word_embeddings, settings.add_cross_attention = False, True
    transformers.GPT2LMHeadModel.from_pretrained(exported, config=settings)
    assert complaints() != []


def test_auto_classes_load_the_export(exported, complaints):
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert (model.generation_config.eos_token_id, model.config.n_positions) == (50256, 1024)
    assert model.dtype == torch.float32
    assert complaints() == []


def test_bfloat16_export_equals_the_rounded_original(theirs, directory, tmp_path):
    command.main([f"--from=hf:{directory}", f"--to=hf:{tmp_path}/half", "--dtype=bfloat16"])
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "half")
    assert model.dtype == torch.bfloat16
    rounded = {name: weight.to(torch.bfloat16) for name, weight in theirs.state_dict().items()}
    found = model.state_dict()
    assert [name for name in rounded if not torch.equal(rounded[name], found[name])] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_of_transformers_models_is_bit_equal(dtype, tied, tmp_path):
    settings = transformers.GPT2Config(
        n_positions=16, vocab_size=67, n_layer=2, n_head=2, n_embd=8, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(settings).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "a", max_shard_size="4KB")
    assert (tmp_path / "a" / "model.safetensors.index.json").exists()
    command.main([f"--from=hf:{tmp_path}/a", f"--to=gptjax:{tmp_path}/b"])
    command.main([f"--from=gptjax:{tmp_path}/b", f"--to=hf:{tmp_path}/c"])
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "c").state_dict()
    expected = model.state_dict()
    assert set(back) == set(expected)
    assert {back[name].dtype for name in back} == {getattr(torch, dtype)}
    assert [name for name in expected if not torch.equal(expected[name], back[name])] == []


def test_pickled_and_safetensors_weights_read_the_same(tmp_path):
    settings = transformers.GPT2Config(n_positions=16, vocab_size=67, n_layer=2, n_head=2, n_embd=8)
    model = transformers.GPT2LMHeadModel(settings)
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    torch.save(model.state_dict(), tmp_path / "b" / "pytorch_model.bin")
    torch.save(model.state_dict(), tmp_path / "legacy", _use_new_zipfile_serialization=False)
    read = lambda: {  # noqa: E731
        kind: {
            n: t.tobytes() for n, t in read_tensors(formats.open_weights(formats.ModelRef("hf", f"{tmp_path}/{kind}")))
        }
        for kind in ("a", "b")
    }
    both = read()
    assert both["a"] == both["b"]
    (tmp_path / "b" / "pytorch_model.bin").write_bytes((tmp_path / "legacy").read_bytes())
    assert read() == both
