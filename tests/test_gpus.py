"""Two real GPUs train as one does, by data and by fsdp, wherever two are present; the same on a CPU, everywhere."""

import shutil
import subprocess

import numpy as np
import pytest

from tests import runs


def gpu_count():
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


TWO_GPUS = pytest.mark.skipif(gpu_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("platform", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])
@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_two_devices_train_as_one(lab, tmp_path, platform, axis):
    def losses(name, count, *overrides):
        environment = {"JAX_PLATFORMS": platform, "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(count)))}
        settings = ("train.num_steps=8", "compute.dtype=float32", f"train.micro_batch_size={4 // count}", *overrides)
        precise = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}  # else float32 products are of TF32 on a GPU
        done = lab.train(tmp_path / name, *settings, devices=count, **environment, **precise)
        assert f"{count} x " in done.stderr + done.stdout
        return [row["loss"] for row in runs.rows(tmp_path / name) if "loss" in row]

    alone = losses("one", 1)
    mesh = [f"mesh.{name}={2 if name == axis else 1}" for name in ("data", "fsdp")]
    np.testing.assert_allclose(losses("two", 2, *mesh), alone, rtol=1e-5)
    assert len(alone) == 8
