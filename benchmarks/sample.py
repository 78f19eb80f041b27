"""How fast a model generates: seconds to the first token, then tokens a second; beside PyTorch's in the same run.

    python benchmarks/sample.py --case=small --batch=1,8 --prompt=32,900 [--vs=torch] [--dtype=float32]

Random weights, greedy. The first token's time is that of a call for one token, once all is compiled; tokens a second
are those of the other tokens of a call for many. `--vs=torch`: transformers' `generate` of the same shape and dtype,
with its static cache, taking turns with ours; ratios are of medians.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from typing import Any

import bench
import jax
import numpy as np
from train_step import CASES

from gptjax.compute import resolve_compute
from gptjax.config import Config, GPTConfig, from_dict
from gptjax.generate import generate
from gptjax.model import GPT
from gptjax.params import padded_vocab_size
from gptjax.sharding import make_mesh

Generate = Callable[[int], Any]  # generate(number of new tokens)


def make_ours(config: Config, prompts: list[list[int]]) -> Generate:
    compute = resolve_compute(config, make_mesh(config.mesh, jax.devices()[:1]))
    model = GPT(config.model, compute)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
    # End-of-text gets logit 0, below the largest of thousands of random ones: no row ends early.
    eot, table = config.model.vocab_size - 1, params["wte"]["embedding"]
    params["wte"] = {"embedding": table.at[eot].set(0.0)}

    def run(count: int) -> None:
        rows = generate(model, params, prompts, max_new_tokens=count, eot_id=eot, temperature=0.0)
        assert all(len(row) == count for row in rows), "an end-of-text came"

    return run


def make_torch(config: GPTConfig, dtype: str, prompts: list[list[int]]) -> Generate:
    import torch  # pyright: ignore[reportMissingImports]  # an extra
    import transformers  # pyright: ignore[reportMissingImports]  # an extra

    library: Any = transformers
    device = "cuda" if torch.cuda.is_available() else "cpu"
    theirs = library.GPT2Config(
        vocab_size=padded_vocab_size(config), n_positions=config.block_size, n_layer=config.n_layer,
        n_head=config.n_head, n_embd=config.n_embd, attn_implementation="sdpa", bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = library.GPT2LMHeadModel(theirs).to(device, getattr(torch, dtype)).eval()
    ids = torch.tensor(prompts, device=device)
    mask = torch.ones_like(ids)

    @torch.inference_mode()
    def run(count: int) -> None:
        static = {"cache_implementation": "static", "do_sample": False, "pad_token_id": 0}
        model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, **static)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def measure(batch: int, prompt: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    layers, heads, width, _, _, vocabulary = CASES[args.case]
    model = {"n_layer": layers, "n_head": heads, "n_embd": width, "block_size": 1024, "vocab_size": vocabulary}
    config = from_dict({"model": model, "compute": {"dtype": args.dtype, "attention": "xla"}})
    prompts = np.random.default_rng(0).integers(vocabulary - 1, size=(batch, prompt)).tolist()
    runs = {"gptjax": make_ours(config, prompts)}
    if args.vs:
        runs["torch"] = make_torch(config.model, args.dtype, prompts)
    for run in runs.values():
        run(1)
        run(args.new)
    first = bench.interleave({name: lambda run=run: run(1) for name, run in runs.items()}, seconds=args.seconds / 3)
    many = bench.interleave({name: lambda run=run: run(args.new) for name, run in runs.items()}, seconds=args.seconds)
    rows = []
    for name in runs:
        start, whole = bench.median(first[name]), bench.median(many[name])
        row = {"case": args.case, "batch": batch, "prompt": prompt, "who": name, "first token ms": 1e3 * start}
        rows.append(row | {"tokens/s": batch * (args.new - 1) / (whole - start), "calls": len(many[name])})
    for row in rows:
        row["gptjax is x faster"] = rows[0]["tokens/s"] / row["tokens/s"]
        bench.record("decode", row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="small", choices=tuple(CASES))
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--prompt", default="32,900")
    parser.add_argument("--new", type=int, default=64, help="tokens of a call; prompt and these must fit 1,024")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--vs", default="", choices=("", "torch"))
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--out", default="", help="directory of the JSON file; default benchmarks/results")
    args = parser.parse_args()
    machine = bench.machine()
    sizes = [[int(v) for v in text.split(",")] for text in (args.batch, args.prompt)]
    rows: list[dict[str, Any]] = []
    for batch, prompt in itertools.product(*sizes):
        try:
            rows += measure(batch, prompt, args)
        except Exception as error:  # it costs its own row: another size may fit
            about = {"case": args.case, "batch": batch, "prompt": prompt, "who": "gptjax"}
            rows.append(about | {"verdict": bench.failure(error)})
            bench.record("decode", rows[-1])
    print(bench.table(rows))
    print(bench.write("sample", rows, machine, args.out))
    sys.exit(any("verdict" in row for row in rows))


if __name__ == "__main__":
    main()
