import pytest

from gptjax.config import GPTConfig
from gptjax.convert import __main__ as command
from gptjax.convert import llmc
from gptjax.convert.weights import read_tensors
from gptjax.data.patterns import GPT2_PATTERN
from gptjax.data.tokenizer import load_tokenizer, make_tokenizer
from gptjax.errors import ConfigError
from tests.convert.models import CONFIG, read_llmc_tokenizer, write_hf, write_llmc
from tests.helpers import raises


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("padded", [50, 128, 200])
def test_llmc_file_is_read_with_its_dtype_and_padding(tmp_path, dtype, padded):
    tensors = write_llmc(tmp_path / "m.bin", dtype=dtype, padded=padded)
    weights = llmc.read(str(tmp_path / "m.bin"), origin="llmc:m.bin")
    assert weights.config == GPTConfig(block_size=8, vocab_size=50, n_layer=2, n_head=2, n_embd=16)
    assert weights.dtype == dtype
    found = dict(read_tensors(weights))
    assert {n: t.tobytes() for n, t in found.items()} == {n: t.tobytes() for n, t in tensors.items()}
    assert found["h.1.mlp.c_fc.weight"].shape == (16, 64)
    assert llmc.read(str(tmp_path / "m.bin"), origin="", dropout=0.2).config.dropout == 0.2


@pytest.mark.parametrize(("name", "vocab_size"), [("bytes", 257), ("bytes", 300), ("gpt2", 50257)])
def test_tokenizer_beside_a_model_is_decoded_as_by_llm_c(tmp_path, said, name, vocab_size):
    write_hf(tmp_path / "a", config=CONFIG | {"vocab_size": vocab_size})
    command.main([f"--from=hf:{tmp_path}/a", f"--to=llmc:{tmp_path}/out/model.bin", f"--tokenizer={name}"])
    tokens, eot = read_llmc_tokenizer((tmp_path / "out" / "gpt2_tokenizer.bin").read_bytes())
    tokenizer = load_tokenizer(name)
    text = "Hello, wörld!\n\0 1234"
    assert b"".join(tokens[number] for number in tokenizer.encode(text)) == text.encode()
    assert (len(tokens), eot, tokens[eot]) == (tokenizer.vocab_size, tokenizer.vocab_size - 1, b"<|endoftext|>")
    assert any("gpt2_tokenizer.bin beside the model" in line for line in said)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpt2_tokenizer.bin", "model.bin"]


@pytest.mark.parametrize(("length", "is_written"), [(255, True), (256, False)])
def test_token_too_long_for_llm_c_leaves_the_tokenizer_out(tmp_path, said, length, is_written):
    tokens = [*(bytes([byte]) for byte in range(256)), b"x" * length]
    make_tokenizer("long", GPT2_PATTERN, {token: rank for rank, token in enumerate(tokens)}).save(tmp_path / "long")
    write_hf(tmp_path / "a", config=CONFIG | {"vocab_size": 258})
    command.main([f"--from=hf:{tmp_path}/a", f"--to=llmc:{tmp_path}/out/m.bin", f"--tokenizer={tmp_path}/long"])
    assert (tmp_path / "out" / "gpt2_tokenizer.bin").exists() == is_written
    assert any("the tokenizer is left out: token 256 has 256 bytes" in line for line in said) != is_written
    assert (tmp_path / "out" / "m.bin").exists()


def test_model_without_tokenizer_has_no_file_beside_it(tmp_path):
    write_hf(tmp_path / "a")
    command.main([f"--from=hf:{tmp_path}/a", f"--to=llmc:{tmp_path}/out/m.bin"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["m.bin"]


def test_model_may_not_take_the_name_of_its_tokenizer(tmp_path):
    write_hf(tmp_path / "a", config=CONFIG | {"vocab_size": 257})
    out = f"{tmp_path}/out/gpt2_tokenizer.bin"
    with raises(ConfigError, out, match="has that name"):
        command.main([f"--from=hf:{tmp_path}/a", f"--to=llmc:{out}", "--tokenizer=bytes"])
    assert not (tmp_path / "out").exists()
