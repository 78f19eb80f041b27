"""V: a damaged or foreign llm.c file is refused."""

import numpy as np
import pytest

from tests.convert import models
from tests.faults.conversion.shared import QKV, LittleMemory, assert_equal_bits, putting, set_header

pytestmark = pytest.mark.faults


@pytest.fixture
def bin_file(tmp_path):
    models.write_llmc(tmp_path / "model.bin")
    return tmp_path / "model.bin"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_v_llmc_undamaged_file_is_converted(dtype, accept, tmp_path):
    tensors = models.write_llmc(tmp_path / "model.bin", dtype=dtype)
    assert_equal_bits(accept(f"llmc:{tmp_path}/model.bin"), tensors)


MAGICS = [(0, magic, f" {magic},") for magic in (0, 20240327, 20240520, -1)]
VERSIONS = [(1, version, f" {version};") for version in (4, 1, 0, -3, 2**31 - 1)]


@pytest.mark.parametrize(("at", "value", "named"), [*MAGICS, *VERSIONS, (1, 5, "{size} bytes")])
def test_v_llmc_unknown_magic_or_version_is_refused(at, value, named, bin_file, refuse):
    """Version 5 is known: that of another dtype, of which this file has not the size."""
    set_header(bin_file, **{f"at{at}": value})
    refuse(f"llmc:{bin_file}", field=bin_file, match=named.format(size=bin_file.stat().st_size))


@pytest.mark.parametrize("size", [0, 1, 3, 4, 500, 1023, 1024, 1 / 3, 2 / 3, -1])
def test_v_llmc_truncated_file_is_refused(size, bin_file, refuse):
    whole = bin_file.read_bytes()
    bin_file.write_bytes(whole[: size if size in (0, 1) or isinstance(size, int) else int(size * len(whole))])
    refuse(f"llmc:{bin_file}", field=bin_file)


def test_v_llmc_file_with_an_extra_byte_is_refused(bin_file, refuse):
    whole = bin_file.read_bytes()
    bin_file.write_bytes(whole + b"\0")
    refuse(f"llmc:{bin_file}", field=bin_file, match=f"{len(whole) + 1} bytes, .* {len(whole)}")


@pytest.mark.parametrize("at", range(2, 8))
@pytest.mark.parametrize("value", [2**31 - 1, -1, -(2**31), 0])
def test_v_llmc_impossible_size_is_refused_without_allocation(at, value, bin_file, refuse):
    set_header(bin_file, **{f"at{at}": value})
    with LittleMemory():
        refuse(f"llmc:{bin_file}", field=f"llmc:{bin_file}" if (at, value) == (5, 2**31 - 1) else bin_file)


def test_v_llmc_enormous_sizes_are_refused_without_allocation(bin_file, refuse):
    set_header(bin_file, **{f"at{at}": 2**31 - 1 for at in range(2, 8)})
    with LittleMemory():
        refuse(f"llmc:{bin_file}", field=bin_file)


def test_v_llmc_nonfinite_weight_is_refused(refuse, tmp_path):
    models.write_llmc(tmp_path / "model.bin", changes={QKV: putting(np.nan, (5, 7))})
    refuse(f"llmc:{tmp_path}/model.bin", remedy="--allow_nonfinite", match=rf"{QKV}: 1 .*\[5, 7\]")
