"""How fast a train step is: tokens a second, MFU, memory, compile time; beside PyTorch's in the same run if asked.

    python benchmarks/train_step.py --cases=toy,char [--vs=torch] [--scan_unroll=1,0] [--remat=none,full] [--batch=8,16]
    python benchmarks/train_step.py --cases=small --batch=32,64 --attention=cudnn,xla
    python benchmarks/train_step.py --cases=small --xla=';xla_gpu_enable_latency_hiding_scheduler=true'
    python benchmarks/train_step.py --cases=toy --steps_per_dispatch=100 --devices=2

Each case is a shape; of lists of settings every combination is measured. The step is the one that trains: AdamW,
clipping, dropout 0, random tokens. MFU counts attention in full (12 L D T a token) against the chip's dense bfloat16
peak, where the table of chips has one. `--vs=torch`: transformers' GPT2LMHeadModel with SDPA, fused AdamW, the same
shapes, dtype and padded vocabulary, eager and by torch.compile, taking turns with ours; ratios are of medians.
`--xla`: options for the compiler, sets of them separated by `;`; a combination that fails is told and left out.
`--devices`: so many, data-parallel; of a CPU, parts of it. `--trace=DIR`: a profile of three steps, for Perfetto.
"""

import argparse
import dataclasses
import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import bench
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.chips import find_chip
from gptjax.compute import resolve_compute, resolve_parallel
from gptjax.config import Config, from_dict
from gptjax.dispatch import Batches, choose_steps_per_dispatch, tokens_sharding
from gptjax.documents import EndOfText
from gptjax.model import GPT
from gptjax.optim import make_optimizer
from gptjax.params import padded_vocab_size
from gptjax.plan.aot import peak_bytes
from gptjax.sharding import make_mesh
from gptjax.sizes import train_flops_per_token
from gptjax.state import make_init
from gptjax.step import jit_steps

CASES = {  # layers, heads, width, positions, batch, vocabulary
    "tiny": (4, 4, 256, 128, 4, 1000),  # for correct.py: small, but cuDNN takes it
    "mini": (2, 2, 64, 32, 2, 65),  # compiles in seconds
    "toy": (4, 4, 128, 64, 12, 65),  # nanoGPT's CPU config
    "char": (6, 6, 384, 256, 16, 65),  # nanoGPT's character model
    "small-cpu": (12, 12, 768, 256, 4, 50257),
    "small": (12, 12, 768, 1024, 32, 50257),
    "medium": (24, 16, 1024, 1024, 16, 50257),
    "large": (36, 20, 1280, 1024, 16, 50257),
    "xl": (48, 25, 1600, 1024, 16, 50257),
}
MANY = 1000  # steps: the schedule never ends


def make_config(case: str, batch: int, settings: dict[str, Any]) -> Config:
    layers, heads, width, positions, default, vocabulary = CASES[case]
    size = batch or default
    model = {"n_layer": layers, "n_head": heads, "n_embd": width, "block_size": positions, "vocab_size": vocabulary}
    train = {"num_steps": MANY, "steps_per_dispatch": settings.pop("steps_per_dispatch"), "micro_batch_size": size}
    every = {"log_every": MANY, "eval_every": 0, "sample_every": 0}
    return from_dict(
        {
            "model": model,
            "compute": settings,
            "train": train | every,
            "data": {"global_batch_size": size},
            "checkpoint": {"save_every": MANY},
        }
    )


def random_tokens(config: Config) -> np.ndarray:
    shape = (1, config.data.global_batch_size, config.model.block_size + 1)
    return np.random.default_rng(0).integers(config.model.vocab_size, size=shape, dtype=np.int32)


@dataclasses.dataclass
class Ours:
    """Our step, compiled; each call is one dispatch, which has ended when it returns."""

    config: Config
    step: Any
    state: Any
    tokens: Any  # of a dispatch
    compile_seconds: float
    most_steps: int  # of a dispatch

    def __call__(self) -> None:
        self.state, metrics = self.step(self.state, self.tokens)
        jax.block_until_ready(metrics)

    def batches(self, steps: int) -> Any:
        """Returns the tokens of a dispatch that makes `steps` steps, at most `most_steps`."""
        if self.most_steps == 1:
            return self.tokens
        return self.tokens._replace(num_steps=jax.device_put(np.int32(steps), self.tokens.num_steps.sharding))


def make_ours(config: Config, *, devices: int = 1, options: dict[str, Any] | None = None) -> Ours:
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    model = GPT(config.model, resolve_compute(config, mesh), resolve_parallel(config, mesh))
    optimizer = make_optimizer(config.optim)
    abstract, init = make_init(model, optimizer, mesh=mesh, seed=0)
    count = choose_steps_per_dispatch(config, mesh)
    step: Any = jit_steps(model, optimizer, config, abstract=abstract, eot=EndOfText(0, "last"))[0]
    tokens: Any = random_tokens(config)
    if count > 1:
        tokens = np.broadcast_to(tokens, (count, *tokens.shape))
    tokens = jax.device_put(tokens, tokens_sharding(mesh, count))
    if count > 1:
        tokens = Batches(tokens, jax.device_put(np.int32(count), NamedSharding(mesh, PartitionSpec())))
    start = time.perf_counter()
    compiled = step.lower(abstract, tokens).compile(compiler_options=options)
    return Ours(config, compiled, init(), tokens, time.perf_counter() - start, count)


def make_torch(config: Config, *, compiled: bool) -> Callable[[], None]:
    """Returns one step of transformers' GPT-2: forward, backward, clipping, fused AdamW."""
    import torch  # pyright: ignore[reportMissingImports]  # an extra
    import transformers  # pyright: ignore[reportMissingImports]  # an extra

    c = config.model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    library: Any = transformers
    theirs = library.GPT2Config(
        vocab_size=padded_vocab_size(c), n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, attn_implementation="sdpa", use_cache=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = library.GPT2LMHeadModel(theirs).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.from_numpy(random_tokens(config)[0, :, :-1].astype(np.int64)).to(device)

    def loss() -> Any:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return model(tokens, labels=tokens).loss

    run = torch.compile(loss) if compiled else loss

    def step() -> None:
        run().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def parse_options(text: str) -> dict[str, Any] | None:
    """Returns the compiler's options of `a=1,b=true`."""
    words = {"true": True, "false": False}
    pairs = [part.split("=", 1) for part in text.split(",") if part]
    return {name: words.get(value, int(value) if value.isdigit() else value) for name, value in pairs} or None


def measure(case: str, batch: int, settings: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a row for our step, and one for each of the peer's."""
    shown = {name: value for name, value in settings.items() if value not in ("auto", "xla", 0, "")}
    options = parse_options(settings.pop("xla"))
    config = make_config(case, batch, dict(settings))
    ours = make_ours(config, devices=args.devices, options=options)
    runs: dict[str, Callable[[], Any]] = {"gptjax": ours}
    if args.vs == "torch":
        runs |= {"torch eager": make_torch(config, compiled=False), "torch compiled": make_torch(config, compiled=True)}
    for run in runs.values():
        run()
        run()
    if args.trace:
        with jax.profiler.trace(args.trace):
            for _ in range(3):
                ours()
    times = bench.interleave(runs, seconds=args.seconds)
    times["gptjax"] = [one / ours.most_steps for one in times["gptjax"]]
    chip, tokens = find_chip(jax.devices()[0].device_kind), config.data.global_batch_size * config.model.block_size
    rows = []
    for name, seconds in times.items():
        step = bench.median(seconds)
        row = {"case": case, "batch": config.data.global_batch_size, "who": name}
        row |= {"settings": " ".join(f"{k}={v}" for k, v in shown.items()) if name == "gptjax" else ""}
        row |= {"ms": 1e3 * step, "tokens/s": tokens / step, "steps": len(seconds)}
        row["MFU %"] = 100 * tokens * train_flops_per_token(config.model) / step / chip.peak_flops if chip else ""
        row["gptjax is x faster"] = step / bench.median(times["gptjax"])
        row["GiB"] = peak_bytes(ours.step) / 2**30 if name == "gptjax" else ""
        row["compile s"] = ours.compile_seconds if name == "gptjax" else ""
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="toy", help=f"of {', '.join(CASES)}")
    parser.add_argument("--batch", default="0", help="sequences; 0: the case's own")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--scan_unroll", default="0", help="layers; 0: all")
    parser.add_argument("--loss", default="xla")
    parser.add_argument("--loss_chunk", default="0")
    parser.add_argument("--steps_per_dispatch", default="1")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--xla", default="", help="sets of compiler options, separated by ';'")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--trace", default="", help="directory of a profile")
    parser.add_argument("--vs", default="", choices=("", "torch"))
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="for each combination, all that take turns together"
    )
    parser.add_argument("--out", default="", help="directory of the JSON file; default benchmarks/results")
    args = parser.parse_args()
    if args.devices > 1:  # has a meaning for CPUs only
        flags = f"--xla_force_host_platform_device_count={args.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    machine = bench.machine()
    numbers = ["batch", "scan_unroll", "loss_chunk", "steps_per_dispatch"]
    names: list[str] = ["attention", "remat", "dtype", "loss", *numbers]
    lists = [[int(v) if name in numbers else v for v in getattr(args, name).split(",")] for name in names]
    names, lists = [*names, "xla"], [*lists, args.xla.split(";")]
    rows: list[dict[str, Any]] = []
    for case, *values in itertools.product(args.cases.split(","), *lists):
        settings = dict(zip(names, values, strict=True))
        try:
            found = measure(case, settings.pop("batch"), settings, args)
        except Exception as error:  # the next combination may fit, and be taken by the compiler
            print(f"{case} {dict(zip(names, values, strict=True))}: left out: {bench.failure(error)}", flush=True)
            continue
        rows += found
        print(bench.table(found), flush=True)
    if not rows:
        raise SystemExit("error: nothing could be measured")
    print(bench.table(rows))
    print(bench.write("train_step", rows, machine, args.out))


if __name__ == "__main__":
    main()
