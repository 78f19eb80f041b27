"""Writes golden/format-N, a checkpoint of the format that is current: run it once before a format is released.

    python -m tests.faults.golden

The values are a formula, so that test_golden.py knows every bit without having trained.
"""

import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from gptjax.checkpoint import Checkpointer
from gptjax.config import ComputeConfig, Config, GPTConfig, MeshConfig, OptimConfig, TrainConfig
from gptjax.model import GPT
from gptjax.optim import make_optimizer
from gptjax.record import FORMAT
from gptjax.sharding import make_mesh
from gptjax.state import make_init

GOLDEN = pathlib.Path(__file__).parent / "golden"
STEP = 7
HISTORY = {"restarts": 2, "skipped_steps": 1, "nonfinite_in_a_row": 0, "validated": 4, "seconds": {"step": 1.5}}
DATA = {"fingerprint": "0123", "data.seed": 3, "data.global_batch_size": 8, "model.block_size": 8}
CONFIG = Config(
    model=GPTConfig(block_size=8, vocab_size=100, n_layer=2, n_head=2, n_embd=16),
    compute=ComputeConfig(scan_unroll=1),  # the default when format 1 was written
    optim=OptimConfig(),
    train=TrainConfig(steps_per_dispatch=1),  # the default then, too
)


def make_golden_state() -> tuple[Any, Any]:
    """Returns the abstract state and the state: leaf i counts up from i, in steps of 2**-10."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    abstract, _ = make_init(GPT(CONFIG.model), make_optimizer(CONFIG.optim), mesh=mesh, seed=0)
    leaves, structure = jax.tree.flatten(abstract)
    filled = [
        jax.device_put((i + np.arange(leaf.size) / 1024).astype(leaf.dtype).reshape(leaf.shape), leaf.sharding)
        for i, leaf in enumerate(leaves)
    ]
    return abstract, jax.tree.unflatten(structure, filled)


def main() -> None:
    directory = GOLDEN / f"format-{FORMAT}"
    shutil.rmtree(directory, ignore_errors=True)
    checkpointer = Checkpointer(str(directory))
    checkpointer.save(make_golden_state()[1], STEP, config=CONFIG, history=HISTORY, data=DATA)
    checkpointer.close()
    for path in directory.rglob("commit_success.txt"):  # whose text is where it was written
        path.write_text("Checkpoint commit was successful")


if __name__ == "__main__":
    main()
