"""One table of the model's parameters: path, shape, sharding, optimizer role and GPT-2 name."""

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, TypeAlias

from jax.sharding import PartitionSpec as P

from gptjax.config import GPTConfig
from gptjax.errors import ConfigError

# A tree of arrays: parameters, gradients, an optimizer's state. Python's types cannot describe its structure.
PyTree: TypeAlias = Any
VOCAB_MULTIPLE = 128
SHOWN_PATHS = 5  # in an error


class Param(NamedTuple):
    """One parameter of the tree, and the GPT-2 tensors that it is stacked from."""

    path: str  # in the tree
    # Its shape, a letter per dim: L layers, V vocabulary (padded), T positions, D width, 3 of q, k and v, F MLP width.
    dims: str
    spec: P  # `fsdp` shards the model width; `tensor` shards heads, MLP width and vocabulary
    role: Literal["table", "matrix", "vector"]  # embedding or head; hidden matrix; bias or LayerNorm
    # The GPT-2 tensor's name; {} is the layer. "": GPT-2 has none, so that no other format can hold this parameter.
    name: str = ""
    # The shape of one GPT-2 tensor in Hugging Face's layout: V unpadded, Q is 3 D. "": as here, without L.
    dims_there: str = ""

    @property
    def layered(self) -> bool:
        """Whether it is stacked over the layers."""
        return self.dims.startswith("L")

    def tensor_name(self, layer: int | str | None) -> str:
        """Returns the name of one tensor: GPT-2's, or one made from the path, as in h.0.mlp.c_gate.kernel."""
        name = self.name
        if not name:
            name = self.path.replace("/", ".")
            # At most one replacement: the "h." that leads the path of a layer's parameter.
            name = name.replace("h.", "h.{}.", int(self.layered))
        return name.format(layer)

    @property
    def linear(self) -> bool:
        """Whether it is a matrix of a layer: [in, out] in Hugging Face's Conv1D, [out, in] in nn.Linear and llm.c."""
        return self.role == "matrix"

    @property
    def decays(self) -> bool:
        """Whether weight decay applies."""
        return self.role != "vector"

    @property
    def uses_muon(self) -> bool:
        """Whether the muon optimizer updates it with Muon; AdamW updates the others."""
        return self.role == "matrix"


# In the order of llm.c's file. `rows` selects those of a config.
PARAMS = (
    Param("wte/embedding", "VD", P("tensor", "fsdp"), "table", "wte.weight", "VD"),
    Param("wpe/embedding", "TD", P(None, "fsdp"), "table", "wpe.weight", "TD"),
    Param("h/ln_1/scale", "LD", P(None, None), "vector", "h.{}.ln_1.weight", "D"),
    Param("h/ln_1/bias", "LD", P(None, None), "vector", "h.{}.ln_1.bias", "D"),
    Param("h/attn/c_attn/kernel", "LD3D", P(None, "fsdp", None, "tensor"), "matrix", "h.{}.attn.c_attn.weight", "DQ"),
    Param("h/attn/c_attn/bias", "L3D", P(None, None, "tensor"), "vector", "h.{}.attn.c_attn.bias", "Q"),
    Param("h/attn/c_proj/kernel", "LDD", P(None, "tensor", "fsdp"), "matrix", "h.{}.attn.c_proj.weight", "DD"),
    Param("h/attn/c_proj/bias", "LD", P(None, None), "vector", "h.{}.attn.c_proj.bias", "D"),
    Param("h/ln_2/scale", "LD", P(None, None), "vector", "h.{}.ln_2.weight", "D"),
    Param("h/ln_2/bias", "LD", P(None, None), "vector", "h.{}.ln_2.bias", "D"),
    Param("h/mlp/c_fc/kernel", "LDF", P(None, "fsdp", "tensor"), "matrix", "h.{}.mlp.c_fc.weight", "DF"),
    Param("h/mlp/c_fc/bias", "LF", P(None, "tensor"), "vector", "h.{}.mlp.c_fc.bias", "F"),
    Param("h/mlp/c_proj/kernel", "LFD", P(None, "tensor", "fsdp"), "matrix", "h.{}.mlp.c_proj.weight", "FD"),
    Param("h/mlp/c_proj/bias", "LD", P(None, None), "vector", "h.{}.mlp.c_proj.bias", "D"),
    Param("ln_f/scale", "D", P(None), "vector", "ln_f.weight", "D"),
    Param("ln_f/bias", "D", P(None), "vector", "ln_f.bias", "D"),
    Param("lm_head/kernel", "DV", P("fsdp", "tensor"), "table", "lm_head.weight", "VD"),
)
BY_PATH = {param.path: param for param in PARAMS}


def find(path: str) -> Param:
    """Returns the row of the parameter at `path`.

    Raises:
        ConfigError: no row has this path.
    """
    if path not in BY_PATH:
        raise ConfigError(
            "no row of gptjax.params.PARAMS describes this parameter",
            field=path,
            remedy="add one",
        )
    return BY_PATH[path]


def rows(config: GPTConfig) -> list[Param]:
    """Returns the rows that a model of `config` has."""
    return [
        param
        for param in PARAMS
        if (config.bias or not param.path.endswith("/bias"))
        and not (config.tie_embeddings and param.path.startswith("lm_head/"))
    ]


def padded_vocab_size(config: GPTConfig) -> int:
    """Returns the rows of the embedding table: the vocabulary rounded up to a multiple of VOCAB_MULTIPLE."""
    # A TPU's tiles have 128 lanes, and a `tensor` of 2, 4, ... 128 divides it. -(-a // b) rounds up.
    multiples = -(-config.vocab_size // VOCAB_MULTIPLE)
    return multiples * VOCAB_MULTIPLE


def leaf_shape(param: Param, config: GPTConfig) -> tuple[int, ...]:
    """Returns the shape of a parameter: layers stacked, vocabulary padded, q, k and v along a dim of their own."""
    sizes = _sizes(config) | {"V": padded_vocab_size(config)}
    return tuple(sizes[letter] for letter in param.dims)


def tensor_shape(param: Param, config: GPTConfig) -> tuple[int, ...]:
    """Returns the shape of one tensor of that kind: in Hugging Face's layout, or as here where GPT-2 has none."""
    if not param.dims_there:
        stacked = leaf_shape(param, config)
        return stacked[1:] if param.layered else stacked
    sizes = _sizes(config)
    return tuple(sizes[letter] for letter in param.dims_there)


def _sizes(config: GPTConfig) -> dict[str, int]:
    D = config.n_embd
    return {
        "L": config.n_layer,
        "V": config.vocab_size,
        "T": config.block_size,
        "D": D,
        "3": 3,
        "Q": 3 * D,
        "F": 4 * D,
    }


def count_params(config: GPTConfig) -> int:
    """Returns the number of parameters, without vocabulary padding.

    >>> count_params(GPTConfig())
    124439808
    """
    sizes = _sizes(config)
    total = 0
    for param in rows(config):
        total += math.prod(sizes[letter] for letter in param.dims)
    return total


def check_paths(paths: Iterable[str], config: GPTConfig) -> None:
    """Checks that `paths` are the parameters of a model of `config`.

    Raises:
        ConfigError: a path is unknown or missing; one line for each of the first SHOWN_PATHS.
    """
    found = set(paths)
    expected = {param.path for param in rows(config)}
    errors = []
    for path in sorted(found - expected):
        errors.append(ConfigError("no row of gptjax.params.PARAMS describes this parameter", field=path))
    for path in sorted(expected - found):
        errors.append(ConfigError("this parameter of the model is missing", field=path))
    if len(errors) > SHOWN_PATHS:
        more = ConfigError(f"and {len(errors) - SHOWN_PATHS} more")
        errors = [*errors[:SHOWN_PATHS], more]
    if errors:
        raise ConfigError.of(errors)
