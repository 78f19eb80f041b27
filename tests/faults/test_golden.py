"""C5: a checkpoint of every format that was ever released loads, with the bits that were saved."""

import shutil

import jax
import numpy as np
import pytest

from gptjax.checkpoint import Checkpointer
from gptjax.record import FORMAT
from gptjax.sharding import path_name
from gptjax.stored import StoredParams, load_params
from tests.faults import golden
from tests.runs import state_bytes

pytestmark = pytest.mark.faults
FORMATS = [f"format-{number}" for number in range(1, FORMAT + 1)]


def test_c5_every_released_format_has_a_golden_checkpoint():
    assert sorted(path.name for path in golden.GOLDEN.iterdir()) == FORMATS
    files = [path for path in golden.GOLDEN.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2**18 * len(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_c5_golden_checkpoint_loads_bit_equal(name, said, tmp_path):
    shutil.copytree(golden.GOLDEN / name, tmp_path / "run")
    abstract, state = golden.make_golden_state()
    restored, record = Checkpointer(str(tmp_path / "run")).restore_latest(abstract)
    assert int(restored.step) == record.step == golden.STEP
    assert state_bytes(restored) == state_bytes(state)
    assert record.history == golden.HISTORY
    assert record.data == golden.DATA
    assert said == []

    config, params, step = load_params(str(tmp_path / "run"))
    assert (config, step) == (golden.CONFIG, golden.STEP)
    stored = StoredParams(str(tmp_path / "run"), golden.STEP)
    for path, leaf in jax.tree.leaves_with_path(params):
        assert stored.read(path_name(path), leaf.shape).tobytes() == np.asarray(leaf).tobytes()
