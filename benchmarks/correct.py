"""Whether every fast path computes what plain float32 does: losses and gradients on fresh random inputs.

    python benchmarks/correct.py [--case=small] [--seed=...] [--out=DIR]

The reference is attention in plain XLA, layers in a loop, products in float32 at the highest precision. An error is the
norm of the difference by the norm of the reference, over all gradients. Exits with 1 where one is above its limit; what
cannot run on this device says why.
"""

import argparse
import sys
import time
from typing import Any

import bench
import jax
import jax.numpy as jnp
import numpy as np
import optax
from train_step import CASES

from gptjax.config import Config, from_dict
from gptjax.errors import ConfigError
from gptjax.model import GPT, resolve_compute
from gptjax.sample import generate
from gptjax.sharding import make_mesh
from gptjax.step import make_loss_fn

BATCH, LAYERS = 4, 4
EXACT, ROUNDED = 1e-4, 2e-2  # float32 against float32, bfloat16 against float32
PATHS = {  # name: (fields of compute, limit)
    "float32, unrolled": ({"unroll": 0, "dtype": "float32"}, EXACT),
    "float32, loss in chunks": ({"loss_chunk": 32, "dtype": "float32"}, EXACT),
    "float32, full remat": ({"remat": "full", "dtype": "float32"}, EXACT),
    "bfloat16": ({"dtype": "bfloat16"}, ROUNDED),
    "bfloat16, cudnn": ({"dtype": "bfloat16", "attention": "cudnn"}, ROUNDED),
    "bfloat16, cudnn, unrolled": ({"dtype": "bfloat16", "attention": "cudnn", "unroll": 0}, ROUNDED),
    "bfloat16, loss by triton": ({"dtype": "bfloat16", "loss": "triton"}, ROUNDED),
    "bfloat16, splash": ({"dtype": "bfloat16", "attention": "splash"}, ROUNDED),
}


def make_config(case: str, **compute: Any) -> Config:
    _, heads, width, positions, _, vocabulary = CASES[case]
    model = {"n_layer": LAYERS, "n_head": heads, "n_embd": width, "block_size": positions, "vocab_size": vocabulary}
    return from_dict({"model": model, "compute": {"attention": "xla"} | compute, "data": {"global_batch_size": BATCH}})


def make_model(config: Config) -> GPT:
    return GPT(config.model, resolve_compute(config, make_mesh(config.mesh, jax.devices()[:1])))


def gradients(config: Config, params: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
    """Returns the mean loss, and its gradient."""
    loss_fn = make_loss_fn(make_model(config), config, eot_id=0, eot_position="last")

    def mean(params: Any) -> jax.Array:
        sums = loss_fn(params, tokens, None)
        return sums.loss / sums.tokens

    precision = "highest" if config.compute.dtype == "float32" else "default"
    with jax.default_matmul_precision(precision):
        return jax.jit(jax.value_and_grad(mean))(params)


def check_gradients(case: str, params: Any, tokens: jax.Array) -> list[dict[str, Any]]:
    loss, grads = gradients(make_config(case, dtype="float32"), params, tokens)
    rows = []
    for name, (compute, limit) in PATHS.items():
        row: dict[str, Any] = {"path": name, "loss error": "", "gradient error": "", "limit": limit, "verdict": ""}
        rows.append(row)
        try:
            other_loss, other = gradients(make_config(case, **compute), params, tokens)
        except ConfigError as error:
            row["verdict"] = f"not here: {str(error).split(': ', 1)[1].split(';')[0]}"
            continue
        row["loss error"] = float(abs(other_loss - loss) / loss)
        row["gradient error"] = float(optax.tree.norm(optax.tree.sub(other, grads)) / optax.tree.norm(grads))
        row["verdict"] = "right" if max(row["loss error"], row["gradient error"]) < limit else "WRONG"
    return rows


def check_sampling(case: str, params: Any, tokens: jax.Array) -> dict[str, Any]:
    """Greedy decoding through the caches, in this device's own dtype, must choose among the likeliest of plain float32.

    The error is how much less likely the worst choice is, in nats; rounding decides between near ties.
    """
    model, exact = make_model(make_config(case)), make_model(make_config(case, dtype="float32"))
    count = min(64, model.config.block_size // 2)
    prompt = np.asarray(tokens[0, : model.config.block_size // 4]).tolist()
    eot_id = model.config.vocab_size - 1
    new = generate(model, params, [prompt], max_new_tokens=count, eot_id=eot_id, temperature=0.0)[0]
    whole = jnp.asarray([prompt + new])
    with jax.default_matmul_precision("highest"):
        logits_TV = jax.jit(lambda p: exact.apply({"params": p}, whole))(params)[0][len(prompt) - 1 : -1]
    behind = jnp.max(logits_TV, axis=-1) - logits_TV[jnp.arange(len(new)), jnp.asarray(new)]
    row = {"path": "sampling, greedy", "loss error": float(jnp.max(behind)), "gradient error": "", "limit": 0.1}
    return row | {"verdict": "right" if row["loss error"] < row["limit"] else "WRONG"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="small", choices=tuple(CASES), help="whose shape, with four layers")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="default: another at each run")
    parser.add_argument("--out", default="", help="directory of the JSON file; default benchmarks/results")
    args = parser.parse_args()
    machine = bench.machine() | {"seed": args.seed}
    config = make_config(args.case)
    params = jax.jit(make_model(config).init)(jax.random.key(args.seed), np.zeros((1, 8), np.int32))["params"]
    # Larger than initial ones: there attention is uniform and hides its errors.
    params = jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 2 else leaf, params)
    shape = (BATCH, config.model.block_size + 1)
    tokens = jnp.asarray(np.random.default_rng(args.seed).integers(config.model.vocab_size, size=shape, dtype=np.int32))
    rows = [*check_gradients(args.case, params, tokens), check_sampling(args.case, params, tokens)]
    print(bench.table(rows))
    print(bench.write("correct", rows, machine, args.out))
    sys.exit(any(row["verdict"] == "WRONG" for row in rows))


if __name__ == "__main__":
    main()
