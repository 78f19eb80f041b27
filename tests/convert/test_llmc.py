import numpy as np
import pytest

from gptjax.config import GPTConfig
from gptjax.convert import llmc
from gptjax.convert.weights import read_tensors
from tests.convert.models import write_llmc


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_written_file_is_byte_equal_to_the_original(tmp_path, dtype):
    write_llmc(tmp_path / "a.bin", dtype=dtype)
    weights = llmc.read(str(tmp_path / "a.bin"), origin="")
    llmc.write(str(tmp_path / "b.bin"), weights, read_tensors(weights), dtype=dtype)
    assert (tmp_path / "b.bin").read_bytes() == (tmp_path / "a.bin").read_bytes()


def test_header_gives_config_padding_and_dtype(tmp_path):
    write_llmc(tmp_path / "m.bin")
    config, padded, dtype = llmc.read_header(str(tmp_path / "m.bin"))
    assert (config.vocab_size, padded, dtype) == (50, 128, np.dtype("float32"))
