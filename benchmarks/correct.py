"""Whether every fast path computes what plain float32 does, on this device: gradients, 20 updates, sampling, a save.

    python benchmarks/correct.py [--seed=...] [--out=DIR] [--update_losses]

Gradients, on fresh random inputs: the reference is attention in plain XLA, layers in a loop, products in float32 at the
highest precision. An error is the norm of the difference by the norm of the reference, over all gradients. A path whose
program is the reference's own would be compared with itself: that is an error, too.
Updates: the losses of 20 AdamW steps, compared with losses.json, which a CPU computed (--update_losses).
Sampling: greedy decoding through the KV caches, compared with the logits of plain float32.
A save: one checkpoint, restored, verified and compared bit by bit.
Exits with 1 where something is wrong or fails; what cannot run on this device says why. Results are recorded one by
one, and a check that raises costs its own row. Kernels of other compilers come last, as they may end the process.
"""

import argparse
import json
import logging
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import bench
import jax
import jax.numpy as jnp
import numpy as np
import optax
from train_step import CASES

from gptjax.checkpoint import Checkpointer
from gptjax.compute import resolve_compute
from gptjax.config import Config, from_dict
from gptjax.documents import EndOfText
from gptjax.generate import generate
from gptjax.model import GPT
from gptjax.optim import make_optimizer
from gptjax.sharding import make_mesh, path_name
from gptjax.state import TrainState, make_init
from gptjax.step import jit_steps, make_loss_fn

LOSSES = pathlib.Path(__file__).resolve().parent / "losses.json"
EXACT, ROUNDED = 1e-4, 2e-2  # float32 against float32, bfloat16 against float32
ROUNDED_ON_A_CPU = 5e-2  # XLA of JAX 0.11 sums some products there in bfloat16: the head's gradient is 4 % off
PLAIN = {"attention": "xla", "scan_unroll": 1, "dtype": "float32", "loss": "xla"}
RISKY = {"cudnn", "splash", "triton"}  # kernels that XLA does not compile
STEPS = 20
MASKED = {"data": {"document_mask": True}}
DROPPED = {"model": {"dropout": 0.1}}
LARGE = {"model": {"vocab_size": 50257}, "train": {"z_loss": 1e-2}}  # rows of several chunks for the Triton kernel
PATHS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {  # name: (compute, other sections, limit)
    "float32, no loop": ({"scan_unroll": 0}, {}, EXACT),
    "float32, loss in chunks": ({"loss_chunk": 16}, {}, EXACT),
    "float32, full remat": ({"remat": "full"}, {}, EXACT),
    "float32, full remat, no loop": ({"remat": "full", "scan_unroll": 0}, {}, EXACT),
    "float32, document mask, no loop": ({"scan_unroll": 0}, MASKED, EXACT),
    "float32, dropout, no loop": ({"scan_unroll": 0}, DROPPED, EXACT),
    "bfloat16": ({"dtype": "bfloat16"}, {}, ROUNDED),
    "bfloat16, no loop": ({"dtype": "bfloat16", "scan_unroll": 0}, {}, ROUNDED),
    "bfloat16, cudnn": ({"dtype": "bfloat16", "attention": "cudnn"}, {}, ROUNDED),
    "bfloat16, cudnn, no loop": ({"dtype": "bfloat16", "attention": "cudnn", "scan_unroll": 0}, {}, ROUNDED),
    "bfloat16, cudnn, full remat": ({"dtype": "bfloat16", "attention": "cudnn", "remat": "full"}, {}, ROUNDED),
    "bfloat16, loss by triton": ({"dtype": "bfloat16", "loss": "triton"}, {}, ROUNDED),
    "float32, loss by triton in chunks": ({"loss": "triton", "loss_chunk": 16}, {}, EXACT),
    "float32, loss by triton, 50,257 tokens, z-loss": ({"loss": "triton"}, LARGE, EXACT),
    "bfloat16, splash": ({"dtype": "bfloat16", "attention": "splash"}, {}, ROUNDED),
    "bfloat16, document mask, no loop": ({"dtype": "bfloat16", "scan_unroll": 0}, MASKED, ROUNDED),
    "bfloat16, dropout, no loop": ({"dtype": "bfloat16", "scan_unroll": 0}, DROPPED, ROUNDED),
}
UPDATES = {  # name: (compute, limit of a loss)
    "float32": (PLAIN, EXACT),
    "as a run computes here": ({}, ROUNDED),
    "loss by triton": ({"loss": "triton"}, ROUNDED),
}


def make_config(case: str, compute: dict[str, Any], sections: dict[str, Any]) -> Config:
    layers, heads, width, positions, batch, vocabulary = CASES[case]
    model = {"n_layer": layers, "n_head": heads, "n_embd": width, "block_size": positions, "vocab_size": vocabulary}
    optim = {"peak_lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 5}
    return from_dict(
        {
            "model": model | sections.get("model", {}),
            "compute": compute,
            "data": {"global_batch_size": batch} | sections.get("data", {}),
            "train": {"num_steps": STEPS, "micro_batch_size": batch} | sections.get("train", {}),
            "optim": optim,
        }
    )


def make_model(config: Config) -> GPT:
    return GPT(config.model, resolve_compute(config, make_mesh(config.mesh, jax.devices()[:1])))


def make_params(model: GPT, seed: int) -> Any:
    """Returns parameters by NumPy's random numbers, the same on any device and by any JAX.

    They are larger than initial ones: there attention is uniform and hides its errors.
    """
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]

    def fill(path: Any, leaf: Any) -> jax.Array:
        values = random.normal(0, 0.05, leaf.shape).astype(np.float32)
        return jnp.asarray(1 + values if path_name(path).endswith("scale") else values)

    return jax.tree.map_with_path(fill, shapes)


def make_tokens(config: Config, seed: int) -> np.ndarray:
    """Returns int32 [1, B, T+1]: skewed, so that there is something to learn, and with some ends of text (id 0)."""
    shape = (1, config.data.global_batch_size, config.model.block_size + 1)
    skewed = np.random.default_rng(seed).random(shape) ** 3
    return (config.model.vocab_size * skewed).astype(np.int32)


def precision(config: Config) -> Any:
    return jax.default_matmul_precision("highest" if config.compute.dtype == "float32" else "default")


def lower_gradients(config: Config, params: Any, tokens: np.ndarray) -> Any:
    """Returns the function (params -> mean loss and its gradient), lowered and not yet compiled."""
    loss_fn = make_loss_fn(make_model(config), config, eot=EndOfText(0, "last"))
    key = jax.random.key(1) if config.model.dropout else None

    def mean(params: Any) -> jax.Array:
        sums = loss_fn(params, jnp.asarray(tokens[0]), key)
        total = sums.loss + config.train.z_loss * sums.z_loss if config.train.z_loss else sums.loss
        return total / sums.tokens

    with precision(config):
        return jax.jit(jax.value_and_grad(mean)).lower(params)


def allowed(limit: float) -> float:
    return ROUNDED_ON_A_CPU if limit == ROUNDED and jax.devices()[0].platform == "cpu" else limit


def judge(error: float, limit: float) -> str:
    return "right" if error < limit else "WRONG"  # NaN is not below


def is_risky(compute: dict[str, Any]) -> bool:
    return not RISKY.isdisjoint(compute.values())


class Program(NamedTuple):
    """A compiled function (params -> mean loss and its gradient), and what was compiled."""

    text: str
    run: Any


class Gradients:
    """Compares the gradients of paths with those of the plain program of the same config sections."""

    def __init__(self, case: str, seed: int) -> None:
        self.case, self.seed = case, seed
        self.params: dict[str, Any] = {}  # by config sections
        self.plain: dict[str, Future[Program]] = {}  # by config sections

    def check(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Records a row for each path; all are compiled at the same time, as one after another takes minutes."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _, sections, _ in map(PATHS.__getitem__, names):
                if str(sections) not in self.plain:
                    self.plain[str(sections)] = self._start(pool, {}, sections)
            programs = {name: self._start(pool, *PATHS[name][:2]) for name in names}
            return [self._compare(name, program) for name, program in programs.items()]

    def _start(self, pool: Executor, compute: dict[str, Any], sections: dict[str, Any]) -> "Future[Program]":
        """Lowers a program here, and compiles it in `pool`; the future raises what either raised."""
        try:
            config = make_config(self.case, PLAIN | compute, sections)
            lowered = lower_gradients(config, self._params_of(sections), make_tokens(config, self.seed))
        except Exception as error:
            failed: Future[Program] = Future()
            failed.set_exception(error)
            return failed
        return pool.submit(lambda: Program(lowered.as_text(), lowered.compile()))

    def _params_of(self, sections: dict[str, Any]) -> Any:
        if str(sections) not in self.params:
            self.params[str(sections)] = make_params(make_model(make_config(self.case, PLAIN, sections)), self.seed)
        return self.params[str(sections)]

    def _compare(self, name: str, program: "Future[Program]") -> dict[str, Any]:
        _, sections, usual = PATHS[name]
        limit = allowed(usual)
        row: dict[str, Any] = {"path": name, "loss error": "", "error": "", "limit": limit}
        with bench.own_row("correct", row):
            ours, plain, params = program.result(), self.plain[str(sections)].result(), self._params_of(sections)
            loss, grads = plain.run(params)
            other_loss, other_grads = ours.run(params)
            row["loss error"] = float(abs(other_loss - loss) / loss)
            row["error"] = float(optax.tree.norm(optax.tree.sub(other_grads, grads)) / optax.tree.norm(grads))
            row["verdict"] = judge(max(row["loss error"], row["error"]), limit)
            if ours.text == plain.text:
                row["verdict"] = "WRONG: the same program as the reference"
        return row


def train(case: str, compute: dict[str, Any]) -> tuple[Config, TrainState, Any, list[float]]:
    """Returns (config, state, abstract state, losses) of 20 updates, each from the same tokens."""
    config = make_config(case, compute, {})
    mesh, model, optimizer = make_mesh(config.mesh, jax.devices()[:1]), make_model(config), make_optimizer(config.optim)
    with precision(config):
        abstract, init = make_init(model, optimizer, mesh=mesh, seed=0)
        place = lambda leaf, like: jax.device_put(leaf, like.sharding)  # noqa: E731
        params = jax.tree.map(place, make_params(model, 0), abstract.params)
        state, losses = init(), []
        state = TrainState(state.step, params, state.opt_state)
        step: Any = jit_steps(model, optimizer, config, abstract=abstract, eot=EndOfText(0, "last"))[0]
        tokens = jnp.asarray(make_tokens(config, 0))
        for _ in range(STEPS):
            state, metrics = step(state, tokens)
            losses.append(float(metrics["loss"]))
    return config, state, abstract, losses


def check_updates(name: str) -> list[dict[str, Any]]:
    """Records a row for the losses of 20 updates, and after those of float32 one for a save of their state."""
    compute, usual = UPDATES[name]
    limit = allowed(usual)
    row: dict[str, Any] = {"path": f"{STEPS} updates, {name}", "loss error": "", "error": "", "limit": limit}
    trained = None
    with bench.own_row("correct", row):
        stored = np.array(json.loads(LOSSES.read_text())["losses"])
        *trained, losses = train("tiny", compute)
        row["loss error"] = float(np.max(np.abs(np.array(losses) - stored) / stored))
        row["verdict"] = judge(row["loss error"], limit)
    return [row, check_save(trained)] if name == "float32" else [row]


def check_save(trained: Sequence[Any] | None) -> dict[str, Any]:
    """Saves the state of (config, state, abstract), restores it with all its checks, and compares each bit."""
    row: dict[str, Any] = {"path": "a save, restored and verified", "loss error": "", "error": "", "limit": 0}
    with bench.own_row("correct", row), tempfile.TemporaryDirectory() as directory:
        if trained is None:
            row["verdict"] = "left out: there is no state to save"
            return row
        config, state, abstract = trained
        checkpointer = Checkpointer(directory)
        checkpointer.save(state, int(state.step), config=config, history={}, data={})
        checkpointer.close()
        restored = Checkpointer(directory).restore_latest(abstract)
        if restored is None:
            row["verdict"] = "WRONG: no checkpoint was found"
            return row
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(restored[0]), strict=True)
        row["error"] = sum(np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in pairs)
        row["verdict"] = "right" if row["error"] == 0 else "WRONG: arrays differ"
    return row


def check_sampling(case: str, seed: int) -> dict[str, Any]:
    """Greedy decoding through the caches, in this device's own dtype, must choose among the likeliest of plain float32.

    The error is how much less likely the worst choice is, in nats; rounding decides between near ties.
    """
    row: dict[str, Any] = {"path": "sampling, greedy", "loss error": "", "error": "", "limit": 0.1}
    with bench.own_row("correct", row):
        model, exact = make_model(make_config(case, {}, {})), make_model(make_config(case, PLAIN, {}))
        params, tokens = make_params(model, seed), make_tokens(make_config(case, {}, {}), seed)
        count = min(64, model.config.block_size // 2)
        prompt = tokens[0, 0, : model.config.block_size // 4].tolist()
        eot_id = model.config.vocab_size - 1
        new = generate(model, params, [prompt], max_new_tokens=count, eot_id=eot_id, temperature=0.0)[0]
        whole = jnp.asarray([prompt + new])
        with jax.default_matmul_precision("highest"):
            logits_TV = jax.jit(lambda p: exact.apply({"params": p}, whole))(params)[0][len(prompt) - 1 : -1]
        behind = jnp.max(logits_TV, axis=-1) - logits_TV[jnp.arange(len(new)), jnp.asarray(new)]
        row["loss error"] = float(jnp.max(behind)) if new else float("nan")
        row["verdict"] = judge(row["loss error"], row["limit"])
    return row


def check_all(case: str, seed: int) -> list[dict[str, Any]]:
    """Records all rows, plain programs first: a kernel that ends the process costs the rows after it."""
    gradients = Gradients(case, seed)
    rows = [*check_updates("float32"), check_sampling(case, seed)]
    rows += gradients.check([name for name, (compute, _, _) in PATHS.items() if not is_risky(compute)])
    rows += check_updates("as a run computes here")
    rows += gradients.check([name for name, (compute, _, _) in PATHS.items() if is_risky(compute)])
    return rows + check_updates("loss by triton")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="tiny", choices=tuple(CASES), help="for gradients and sampling")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="default: another at each run")
    parser.add_argument("--update_losses", action="store_true", help="write losses.json, on a CPU, and end")
    parser.add_argument("--out", default="", help="directory of the JSON file; default benchmarks/results")
    args = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's notices
    machine = bench.machine() | {"seed": args.seed}
    if args.update_losses:
        losses = train("tiny", PLAIN)[-1]
        made_on = {name: machine[name] for name in ("date", "processor", "jax", "device")}
        LOSSES.write_text(json.dumps({"case": "tiny", "made on": made_on, "losses": losses}, indent=2) + "\n")
        return
    rows = check_all(args.case, args.seed)
    if "GPTJAX_RESULTS" not in os.environ:
        print(bench.table(rows))
    print(bench.write("correct", rows, machine, args.out))
    sys.exit(any(row["verdict"].startswith(("WRONG", "FAILED")) for row in rows))


if __name__ == "__main__":
    main()
