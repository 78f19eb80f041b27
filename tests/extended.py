"""Run by test_extending.py where gptjax is a copy with the examples of docs/extending.md: prints what it finds."""

import contextlib
import dataclasses
import json
import pathlib

import jax
import numpy as np

import gptjax
from gptjax import checkpoint, sharding, sizes, state, step
from gptjax import config as c
from gptjax import params as p
from gptjax.compute import resolve_compute, resolve_parallel
from gptjax.convert import formats
from gptjax.data.sources import open_source
from gptjax.documents import EndOfText
from gptjax.errors import UserError
from gptjax.generate import generate
from gptjax.model import GPT
from gptjax.optim import make_optimizer, parameter_table
from gptjax.resume import compare_models

found = {"file": gptjax.__file__}
MODEL = {"block_size": 16, "vocab_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 32, "activation": "swiglu"}
OPTIM = {"name": "sgd", "warmup_steps": 0, "peak_lr": 0.5, "min_lr": 0.1}


def error_of(function, *arguments, **settings):
    try:
        return f"no error: {function(*arguments, **settings)}"
    except UserError as error:
        return str(error)


def train(mesh, count):
    """Returns the metrics of three steps on a mesh, and the state."""
    config = c.from_dict(
        {"model": MODEL, "optim": OPTIM, "mesh": dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))}
    )
    devices = sharding.make_mesh(config.mesh, jax.devices()[:count])
    model = GPT(config.model, resolve_compute(config, devices), resolve_parallel(config, devices))
    optimizer = make_optimizer(config.optim)
    abstract, init = state.make_init(model, optimizer, mesh=devices, seed=0)
    train_step, _ = step.jit_steps(model, optimizer, config, abstract=abstract, eot=EndOfText(0, "last"))
    tokens = np.random.default_rng(0).integers(256, size=(1, 8, 17)).astype(np.int32)
    tokens = jax.device_put(tokens, jax.NamedSharding(devices, sharding.BATCH_SPEC))
    now, rows = init(), []
    for _ in range(3):
        now, metrics = train_step(now, tokens)
        rows.append({name: float(value) for name, value in metrics.items()})
    return rows, now, config, model


alone, now, config, model = train((1, 1, 1), 1)
found["losses"] = [row["loss"] for row in alone]
found["losses on a mesh"] = [row["loss"] for row in train((1, 2, 2), 4)[0]]
found["param_norm"] = alone[0]["param_norm"]
plain = dataclasses.replace(config.model, activation="gelu_new")
made = sum(leaf.size for leaf in jax.tree.leaves(now.params))
found["parameters"] = [made, p.count_params(config.model), p.count_params(plain)]
found["flops"] = sizes.train_flops_per_token(config.model) - sizes.train_flops_per_token(plain)
one = sharding.make_mesh(c.MeshConfig(), jax.devices()[:1])
memory = [sizes.activation_bytes_per_sequence(m, resolve_compute(config, one), 0) for m in (config.model, plain)]
found["memory"] = memory[0] - memory[1]
[found["role"]] = [r for r in parameter_table(now.params, c.OptimConfig(name="muon")) if "gate" in r["parameter"]]

narrow = sharding.make_mesh(c.MeshConfig(fsdp=3), jax.devices()[:3])
wide = dataclasses.replace(config.model, n_embd=34)
found["does not divide"] = error_of(sharding.param_shardings, sharding.abstract_params(wide), narrow)

prompt = [5, 6, 7]
naive = list(prompt)
logits_V = jax.jit(lambda tokens_BT, last: model.apply({"params": now.params}, tokens_BT)[0, last])
for _ in range(9):
    padded = np.zeros((1, 16), np.int32)
    padded[0, : len(naive)] = naive
    naive.append(int(logits_V(padded, len(naive) - 1).argmax()))
ids = generate(model, now.params, [prompt], max_new_tokens=9, eot_id=255, temperature=0.0)
found["sampled"] = [prompt + ids[0], naive]

with contextlib.closing(checkpoint.Checkpointer("run")) as saver:
    saver.save(now, 3, config=config, history={}, data={})
weights = formats.open_weights(formats.parse_model_ref("--from", "gptjax:run", formats.READABLE))
found["exports"] = {to: error_of(formats.adapt, weights, to) for to in ("hf", "nanogpt", "llmc")}
found["init_from"] = error_of(compare_models, plain, config.model, "x")
found["kept"] = formats.adapt(weights, "gptjax").tensors["h.1.mlp.c_gate.kernel"].shape
leaves = formats.load_params(weights, lambda path, leaf: leaf)
read, gate = (tree["h"]["mlp"]["c_gate"]["kernel"] for tree in (leaves, now.params))
found["read back"] = bool(np.array_equal(read, gate))

pathlib.Path("a.txt").write_text("first\n\nsecond")
found["documents"] = list(open_source("blocks:a.txt", work_dir=".").documents())
found["kinds"] = error_of(open_source, "xml:a", work_dir=".")
print(json.dumps(found))
