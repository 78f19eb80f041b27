"""Tiny random GPT-2s in other programs' formats, written without gptjax's own code, so that they check it."""

import json
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
from safetensors.numpy import save_file

CONFIG = {"vocab_size": 50, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
PREFIX = "transformer."
CHANGES = Mapping[str, Callable[[np.ndarray], np.ndarray]]  # by name without prefix: gives the tensor to write instead
NO_CHANGES: CHANGES = {}

# In llm.c's order: name, shape in Hugging Face's layout by letters (V T D as usual, Q = 3 D, F = 4 D).
LAYER = (
    ("ln_1.weight", "D"), ("ln_1.bias", "D"), ("attn.c_attn.weight", "DQ"), ("attn.c_attn.bias", "Q"),
    ("attn.c_proj.weight", "DD"), ("attn.c_proj.bias", "D"), ("ln_2.weight", "D"), ("ln_2.bias", "D"),
    ("mlp.c_fc.weight", "DF"), ("mlp.c_fc.bias", "F"), ("mlp.c_proj.weight", "FD"), ("mlp.c_proj.bias", "D"),
)  # fmt: skip


def make_tensors(config: Mapping[str, int] = CONFIG, *, seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Returns all tensors by Hugging Face's names without prefix, in its layout; no two are equal."""
    random, kind = np.random.default_rng(seed), np.dtype(getattr(ml_dtypes, dtype, dtype))
    tensors = {}
    for name, shape in make_shapes(config).items():
        values = 0.02 * random.standard_normal(shape)
        scale = "ln_" in name and name.endswith("weight")
        tensors[name] = (1 + values if scale else values).astype(kind)
    return tensors


def make_shapes(config: Mapping[str, int] = CONFIG) -> dict[str, list[int]]:
    """Returns the shapes of all tensors by Hugging Face's names without prefix, in its layout."""
    D = config["n_embd"]
    sizes = {"V": config["vocab_size"], "T": config["n_positions"], "D": D, "Q": 3 * D, "F": 4 * D}
    shapes = {"wte.weight": "VD", "wpe.weight": "TD"}
    for layer in range(config["n_layer"]):
        shapes |= {f"h.{layer}.{name}": letters for name, letters in LAYER}
    shapes |= {"ln_f.weight": "D", "ln_f.bias": "D"}
    return {name: [sizes[letter] for letter in letters] for name, letters in shapes.items()}


def make_config(directory: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Writes config.json, and the directory before it."""
    directory.mkdir(parents=True, exist_ok=True)
    fields = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **config}
    (directory / "config.json").write_text(json.dumps(fields))


def write_hf(
    directory: pathlib.Path,
    *,
    config: Mapping[str, Any] = CONFIG,
    seed: int = 0,
    dtype: str = "float32",
    prefix: str = PREFIX,
    num_shards: int = 1,
    extra: Mapping[str, np.ndarray] = {},
    drop: Collection[str] = (),
    changes: CHANGES = NO_CHANGES,
) -> dict[str, np.ndarray]:
    """Writes config.json and model.safetensors, whole or in shards; returns the tensors by names without prefix.

    config: sizes, and any other fields of config.json.
    extra: more tensors, by their full names in the file.
    drop: tensors to leave out, by names without prefix.
    """
    tensors = _changed(make_tensors(config, seed=seed, dtype=dtype), drop, changes)
    make_config(directory, config)
    full = {prefix + name: tensor for name, tensor in tensors.items()} | dict(extra)
    if num_shards == 1:
        save_file(full, directory / "model.safetensors", {"format": "pt"})
        return tensors
    places = {}
    for number in range(num_shards):
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        names = list(full)[number::num_shards]
        save_file({name: full[name] for name in names}, directory / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in full.values())}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def buffers(config: Mapping[str, int] = CONFIG, prefix: str = PREFIX) -> dict[str, np.ndarray]:
    """Returns the causal masks that old files hold beside the weights, for `extra` of write_hf."""
    T = config["n_positions"]
    mask = np.tril(np.ones((1, 1, T, T), np.float32))
    masks = {f"{prefix}h.{layer}.attn.bias": mask for layer in range(config["n_layer"])}
    return masks | {f"{prefix}h.{n}.attn.masked_bias": np.array(-1e4, np.float32) for n in range(config["n_layer"])}


def edit_json(path: pathlib.Path, **fields: Any) -> None:
    """Replaces fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def write_llmc(
    path: pathlib.Path,
    *,
    config: Mapping[str, int] = CONFIG,
    seed: int = 0,
    dtype: str = "float32",
    padded: int = 128,
    changes: CHANGES = NO_CHANGES,
) -> dict[str, np.ndarray]:
    """Writes llm.c's .bin with `padded` rows of the embedding; returns the tensors in Hugging Face's layout."""
    tensors = _changed(make_tensors(config, seed=seed, dtype=dtype), (), changes)
    version = {"float32": 3, "bfloat16": 5}[dtype]
    header = np.zeros(256, "<i4")
    sizes = [config[name] for name in ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")]
    header[:8] = [20240326, version, *sizes, padded]
    rest = np.zeros((padded - config["vocab_size"], config["n_embd"]), tensors["wte.weight"].dtype)
    parts = [np.concatenate([tensors["wte.weight"], rest]), tensors["wpe.weight"]]
    for name, letters in LAYER:
        stored = [tensors[f"h.{layer}.{name}"] for layer in range(config["n_layer"])]
        parts += [np.ascontiguousarray(t.T) if len(letters) == 2 else t for t in stored]
    parts += [tensors["ln_f.weight"], tensors["ln_f.bias"]]
    path.write_bytes(header.tobytes() + b"".join(part.tobytes() for part in parts))
    return tensors


def read_llmc_tokenizer(content: bytes) -> tuple[list[bytes], int]:
    """Returns (tokens, id of end-of-text) of a gpt2_tokenizer.bin, as tokenizer.h of llm.c reads them."""
    header = np.frombuffer(content[:1024], "<u4").tolist()
    assert header[:2] == [20240328, 2]
    assert set(header[4:]) == {0}
    tokens, at = [], 1024
    for _ in range(header[2]):
        length = content[at]
        assert length > 0
        tokens.append(content[at + 1 : at + 1 + length])
        at += 1 + length
    assert at == len(content)
    return tokens, header[3]


def write_msgpack(
    directory: pathlib.Path,
    *,
    config: Mapping[str, Any] = CONFIG,
    seed: int = 0,
    dtype: str = "float32",
    prefix: str = PREFIX,
    extra: Mapping[str, np.ndarray] = {},
    drop: Collection[str] = (),
    changes: CHANGES = NO_CHANGES,
) -> dict[str, np.ndarray]:
    """Writes config.json and flax_model.msgpack; returns the tensors in Hugging Face's layout.

    extra: more arrays, by their paths in the file: "transformer.h.0.new.kernel".
    """
    tensors = _changed(make_tensors(config, seed=seed, dtype=dtype), drop, changes)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2", **config}))
    tree: dict[str, Any] = {}
    for name, tensor in [*((prefix + flax_name(n), t) for n, t in tensors.items()), *extra.items()]:
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = pack_array(tensor.T if last == "kernel" else tensor)
    (directory / "flax_model.msgpack").write_bytes(msgpack.packb(tree))
    return tensors


def flax_name(name: str) -> str:
    """Returns "h.0.ln_1.scale" of "h.0.ln_1.weight"."""
    head, last = name.rsplit(".", 1)
    if last == "bias":
        return name
    kind = "embedding" if head in ("wte", "wpe") else "scale" if "ln_" in head else "kernel"
    return f"{head}.{kind}"


def pack_array(array: np.ndarray) -> msgpack.ExtType:
    """Returns an array as flax writes it into msgpack: extension 1 of (shape, dtype, bytes)."""
    return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, np.ascontiguousarray(array).tobytes())))


def read_header(path: pathlib.Path) -> tuple[dict[str, Any], bytes]:
    """Returns (header, data) of a safetensors file."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def write_header(path: pathlib.Path, header: Mapping[str, Any] | bytes, data: bytes, length: int | None = None) -> None:
    """Writes a safetensors file as it is told to, whether that makes sense or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def _changed(tensors: dict[str, np.ndarray], drop: Collection[str], changes: CHANGES) -> dict[str, np.ndarray]:
    unknown = {*drop, *changes} - set(tensors)
    assert not unknown, unknown
    return {
        name: np.ascontiguousarray(changes[name](tensor)) if name in changes else tensor
        for name, tensor in tensors.items()
        if name not in drop
    }
