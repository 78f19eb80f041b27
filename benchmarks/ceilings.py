"""What a device can do at best: FLOP/s of large matrix products, bytes/s of large copies, the products of a step.

    python benchmarks/ceilings.py [--width=8192] [--products=small:64] [--out=DIR]

Every other figure is judged by the first two, which are below the data sheet's on every machine. --products=CASE:BATCH
times the 15 products that a train step of that shape is made of, each alone: five forward, and for each of them the
gradients of its input and of its weights. A measurement that raises costs its own row; then this exits with 1.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import bench
import jax
import jax.numpy as jnp
from train_step import CASES

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


def step_products(case: str, batch: int) -> list[tuple[str, int, tuple[int, int, int]]]:
    """Returns (name, runs in a step, sizes M, K, N) of the products of a step without attention's."""
    layers, _, width, positions, _, vocabulary = CASES[case]
    rows, padded = batch * positions, -(-vocabulary // 128) * 128
    linear = {
        "c_attn": (layers, width, 3 * width),
        "attn c_proj": (layers, width, width),
        "c_fc": (layers, width, 4 * width),
        "mlp c_proj": (layers, 4 * width, width),
        "head": (1, width, padded),
    }
    found = []
    for name, (runs, inner, outer) in linear.items():
        found.append((f"{name}, forward", runs, (rows, inner, outer)))
        found.append((f"{name}, gradient of its input", runs, (rows, outer, inner)))
        found.append((f"{name}, gradient of its weights", runs, (inner, rows, outer)))
    return found


def time_product(name: str, sizes: tuple[int, int, int], dtype: Any, seconds: float) -> float:
    """Returns the median seconds of one product x_MK @ w_KN, with operands as they lie in a step."""
    M, K, N = sizes
    x_shape = (K, M) if name.endswith("weights") else (M, K)  # x is transposed where weights get their gradient
    transposed = name.endswith("input") != (name.startswith("head") and not name.endswith("weights"))  # wte is [V, D]
    w_shape = (N, K) if transposed else (K, N)  # and w where the input does
    x, w = (jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate((x_shape, w_shape)))
    contracting = ((0,) if name.endswith("weights") else (1,), (1,) if transposed else (0,))
    product = jax.jit(lambda x, w: jax.lax.dot_general(x, w, (contracting, ((), ()))))

    def run() -> None:
        result = product(x, w)
        for _ in range(REPEATS - 1):
            result = product(x, w)  # only the last is kept: the head's takes 6.6 GB at 64 sequences
        jax.block_until_ready(result)

    run()
    return bench.median(bench.interleave({"": run}, seconds=seconds)[""]) / REPEATS


def products(case: str, batch: int, *, seconds: float, dtype: Any) -> list[dict[str, Any]]:
    """Records a row for each product of a step, and one for all of them."""
    total, work, rows, each = 0.0, 0.0, [], step_products(case, batch)
    for name, runs, sizes in each:
        row: dict[str, Any] = {"what": name, "M x K x N": " x ".join(map(str, sizes)), "runs in a step": runs}
        rows.append(row)
        with bench.own_row("ceilings", row):
            taken = time_product(name, sizes, dtype, seconds / len(each))
            flops = 2 * sizes[0] * sizes[1] * sizes[2]
            total, work = total + runs * taken, work + runs * flops
            row |= {"ms": 1e3 * taken, "rate": flops / taken / 1e12, "unit": "TFLOP/s"}
    row = {"what": f"the {len(each)} products of a step of {case}, B={batch}", "runs in a step": 1}
    if missing := sum("rate" not in one for one in rows):
        row["verdict"] = f"left out: {missing} of them failed"
    else:
        row |= {"ms": 1e3 * total, "rate": work / total / 1e12, "unit": "TFLOP/s"}
    bench.record("ceilings", row)
    return [*rows, row]


def measure(name: str, width: int, seconds: float) -> dict[str, Any]:
    """Records the row of "product DTYPE" or of "copy"."""
    chip, is_copy = find_chip(jax.devices()[0].device_kind), name == "copy"
    row: dict[str, Any] = {"what": name}
    with bench.own_row("ceilings", row):
        run = make_copy(4 * width**2) if is_copy else make_product(width, name.removeprefix("product "))
        times = bench.interleave({name: run}, seconds=seconds)[name]
        taken = bench.median(times) / REPEATS
        rate = (2 * 4 * 4 * width**2 if is_copy else 2 * width**3) / taken
        best = (chip.memory_bandwidth if is_copy else chip.peak_flops) if chip and name != "product float32" else 0
        row |= {"ms": 1e3 * taken, "rate": rate / (1e9 if is_copy else 1e12), "unit": "GB/s" if is_copy else "TFLOP/s"}
        row |= {"% of data sheet": 100 * rate / best if best else "", "calls": len(times)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=0, help="of the matrices; 0: 8192, on a CPU 2048")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--products", default="", metavar="CASE:BATCH", help="time the products of a step, too")
    parser.add_argument("--out", default="", help="directory of the JSON file; default benchmarks/results")
    args = parser.parse_args()
    machine, device = bench.machine(), jax.devices()[0]
    width = args.width or (2048 if device.platform == "cpu" else 8192)
    dtypes = ("float32",) if device.platform == "cpu" else ("bfloat16", "float32")  # those that steps take there
    names = [*(f"product {dtype}" for dtype in dtypes), "copy"]
    rows = [measure(name, width, args.seconds / len(names)) for name in names]  # each is known as soon as it can be
    found = list(rows)
    if args.products:
        case, batch = args.products.split(":")
        found += products(case, int(batch), seconds=args.seconds, dtype=dtypes[0])
    if "GPTJAX_RESULTS" not in os.environ:
        print(bench.table(rows))
    print(bench.write("ceilings", rows, machine, args.out))
    sys.exit(any(row.get("verdict", "").startswith("FAILED") for row in found))


if __name__ == "__main__":
    main()
