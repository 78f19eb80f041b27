"""What a device can do at best: FLOP/s of large matrix products, bytes/s of large copies.

    python benchmarks/ceilings.py [--width=8192] [--out=DIR]

Every other figure is judged by these two, which are below the data sheet's on every machine.
"""

import argparse
from collections.abc import Callable
from typing import Any

import bench
import jax
import jax.numpy as jnp

from gptjax.chips import find_chip

REPEATS = 10  # in one dispatch, so that the host does not count


def make_product(width: int, dtype: Any) -> Callable[[], Any]:
    """Returns REPEATS products of [width, width] matrices, each of which takes the one before."""
    x, w = (jax.random.normal(jax.random.key(i), (width, width), dtype) for i in range(2))
    scale = jnp.asarray(width**-0.5, dtype)

    @jax.jit
    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(REPEATS):
            x = (x @ w) * scale
        return x

    return lambda: jax.block_until_ready(run(x, w))


def make_copy(size: int) -> Callable[[], Any]:
    """Returns REPEATS passes that read and write so many float32."""
    x = jnp.zeros(size)
    run = jax.jit(lambda x: jax.lax.fori_loop(0, REPEATS, lambda i, y: y + i, x))
    return lambda: jax.block_until_ready(run(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=0, help="of the matrices; 0: 8192, on a CPU 2048")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--out", default="", help="directory of the JSON file; default benchmarks/results")
    args = parser.parse_args()
    machine, device = bench.machine(), jax.devices()[0]
    width = args.width or (2048 if device.platform == "cpu" else 8192)
    dtypes = ("float32",) if device.platform == "cpu" else ("bfloat16", "float32")  # those that steps take there
    runs = {f"product {dtype}": make_product(width, dtype) for dtype in dtypes}
    runs["copy"] = make_copy(4 * width**2)
    chip, rows = find_chip(device.device_kind), []
    for name, times in bench.interleave(runs, seconds=args.seconds).items():
        seconds = bench.median(times) / REPEATS
        is_copy = name == "copy"
        rate = (2 * 4 * 4 * width**2 if is_copy else 2 * width**3) / seconds
        best = (chip.memory_bandwidth if is_copy else chip.peak_flops) if chip and name != "product float32" else 0
        row = {"what": name, "ms": 1e3 * seconds, "rate": rate / (1e9 if is_copy else 1e12)}
        row |= {"unit": "GB/s" if is_copy else "TFLOP/s", "% of data sheet": 100 * rate / best if best else ""}
        rows.append(row | {"calls": len(times)})
    print(bench.table(rows))
    print(bench.write("ceilings", rows, machine, args.out))


if __name__ == "__main__":
    main()
