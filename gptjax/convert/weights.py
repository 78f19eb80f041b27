"""A model of any format as lazily read tensors, by GPT-2's names and in Hugging Face's layout."""

import dataclasses
import difflib
import hashlib
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from gptjax.config import Config, GPTConfig, find_problems
from gptjax.convert.names import Shape, into_leaf, layers, shapes
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import DataError
from gptjax.params import leaf_shape, rows

ReadTensor: TypeAlias = Callable[[], np.ndarray]
NamedTensors: TypeAlias = Iterable[tuple[str, np.ndarray]]  # (GPT-2's name, tensor in Hugging Face's layout)

LARGEST_SIZE = 2**31 - 1  # of one dim: the largest int32, as in a file's header
LONGEST_NAME = 200  # characters of a tensor's name; GPT-2's longest has 38
NEAR = 1000  # names among which the nearest to a missing one is searched
LARGEST_NUMBER = 2**63  # absolute value of a number in a history
LONGEST_REPR = 80  # characters of a value in a message
SHOWN_DIMS = 8  # of a shape in a message
HISTORY = {
    "step": int,
    "tokens": int,
    "loss": float,
    "val_loss": float,
    "data": str,
    "config": dict,
}
LAYER = re.compile(r"h\.(0|[1-9][0-9]{0,5})\.")
DTYPES = {
    "float32": np.dtype("float32"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype("float16"),
}
UNKNOWN_DTYPE = np.dtype("V1")  # of a type that NumPy lacks; no parameter may have it


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a source. `read()` returns it in Hugging Face's layout, with `shape` and `dtype`."""

    shape: Shape
    dtype: np.dtype
    read: ReadTensor
    label: str  # its name in the source, for messages


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW's state in a run: moments by the names of the source's tensors, each with the shape of its tensor."""

    config: Config  # of the run, or what other settings of it are in gptjax
    step: int  # finished updates of the run
    count: Tensor  # updates that AdamW has counted: int32, without dims
    first: Mapping[str, Tensor]  # averages of gradients
    second: Mapping[str, Tensor]  # averages of their squares
    left_out: tuple[str, ...] = ()  # settings of the run that `config` cannot hold, as NAME=VALUE


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model to convert. `tensors` are exactly those that `config` requires: `make_weights` has checked it."""

    origin: str  # as in --from, with the resolved revision or step
    config: GPTConfig
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer | None = None
    dtype: str = "float32"  # the default dtype of an export
    history: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # some fields of HISTORY, for the model card
    notes: tuple[str, ...] = ()  # lines for the user
    adamw: AdamW | None = None  # of a checkpoint that a run can resume from


def make_weights(
    origin: str,
    config: GPTConfig,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer: Tokenizer | None = None,
    dtype: str = "",
    history: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
    adamw: AdamW | None = None,
) -> Weights:
    """Returns the Weights after comparing `tensors` strictly with those that `config` requires.

    dtype: of an export; "" means the dtype of the tensors if they share one, otherwise float32.

    Raises:
        DataError: `config` is impossible, or a tensor is missing, unexpected, or has a wrong shape or type.
    """
    config_errors = find_problems(Config(model=config))
    if config_errors:
        raise DataError.about(origin, config_errors[0])
    problem = _compare(config, tensors)
    if problem:
        raise DataError(problem, field=origin)
    return Weights(
        origin=origin,
        config=config,
        tensors=tensors,
        tokenizer=tokenizer,
        dtype=dtype or _common_dtype(tensors),
        history=history or {},
        notes=notes,
        adamw=adamw,
    )


def _common_dtype(tensors: Mapping[str, Tensor]) -> str:
    """Returns the name of the dtype that all tensors share, or float32."""
    found = {tensor.dtype for tensor in tensors.values()}
    names = [name for name, dtype in DTYPES.items() if dtype in found]
    return names[0] if len(names) == 1 else "float32"


def make_history(values: object) -> dict[str, Any]:
    """Returns those of `values` that belong to a history and have its type; numbers must be finite."""
    if not isinstance(values, Mapping):
        return {}
    history = {}
    for name, kind in HISTORY.items():
        value = values.get(name)
        if type(value) is not kind:  # exactly, since True is an int
            continue
        # NaN is not below anything, so the comparison rejects it too.
        if isinstance(value, int | float) and not abs(value) < LARGEST_NUMBER:
            continue
        history[name] = value
    return history


def check_name(path: str, name: object) -> str:
    """Returns the name of a tensor in the file `path`, if it is printable and not too long.

    Raises:
        DataError: it is not printable, or is too long.
    """
    if not isinstance(name, str) or not name.isprintable() or len(name) > LONGEST_NAME:
        raise DataError(f"{short_repr(name)} is not the name of a tensor of GPT-2", field=path)
    return name


def check_sizes(path: str, sizes: Mapping[str, Any]) -> None:
    """Checks sizes that a file announces.

    Raises:
        DataError: one of them is not an integer from 1 to LARGEST_SIZE.
    """
    for name, size in sizes.items():
        if type(size) is int and 1 <= size <= LARGEST_SIZE:
            continue
        expected = f"expected a positive whole number, at most {LARGEST_SIZE}"
        raise DataError(f"{name}={short_repr(size)}: {expected}", field=path)


def short_repr(value: object) -> str:
    """Returns repr(value), shortened for a message however deep or long the value is."""
    short = reprlib.Repr()
    short.maxstring = LONGEST_REPR
    short.maxother = LONGEST_REPR
    return short.repr(value)


def _compare(config: GPTConfig, tensors: Mapping[str, Tensor]) -> str | None:
    """Returns the first difference between `tensors` and a model of `config`, and the number of the others."""
    problem = _compare_layers(config, tensors)
    if problem:
        return problem
    expected = shapes(config)
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    lines = []
    if missing:
        lines.append(_describe_missing(missing[0], extra))
    if extra:
        lines.append(f"{tensors[extra[0]].label}: not a tensor of GPT-2")

    wrong_shape = []
    wrong_dtype = []
    for name, shape in expected.items():
        if name not in tensors:
            continue
        if tensors[name].shape != shape:
            wrong_shape.append(name)
        elif tensors[name].dtype not in DTYPES.values():
            wrong_dtype.append(name)
    if wrong_shape:
        name = wrong_shape[0]
        lines.append(_describe_shape(name, tensors[name], expected[name]))
    if wrong_dtype:
        tensor = tensors[wrong_dtype[0]]
        found = "of an unknown type" if tensor.dtype == UNKNOWN_DTYPE else tensor.dtype
        lines.append(f"{tensor.label} is {found}; expected {', '.join(DTYPES)}")

    if not lines:
        return None
    others = len(missing) + len(extra) + len(wrong_shape) + len(wrong_dtype) - 1
    return f"{lines[0]} (and {others} more)" if others else lines[0]


def _compare_layers(config: GPTConfig, tensors: Mapping[str, Tensor]) -> str | None:
    """Compares n_layer with the tensors, so that no loop is as long as a number in a damaged file."""
    found = set()
    for name in tensors:
        match = LAYER.match(name)
        if match:
            found.add(match[1])
    if found and len(found) != config.n_layer:
        return f"n_layer is {config.n_layer}, but there are tensors of {len(found)} layers"
    if config.n_layer > len(tensors):
        return f"n_layer is {config.n_layer}, but there are only {len(tensors)} tensors"
    return None


def _describe_missing(name: str, extra: list[str]) -> str:
    near = difflib.get_close_matches(name, extra[:NEAR], n=1, cutoff=0.7)
    if near:
        return f"{name} is missing; was it renamed {near[0]}?"
    return f"{name} is missing"


def _describe_shape(name: str, tensor: Tensor, expected: Shape) -> str:
    line = f"{tensor.label} has shape {format_shape(tensor.shape)}, expected {format_shape(expected)}"
    if tensor.shape == expected[::-1]:
        return f"{line}: it looks transposed (nanoGPT layout?)"
    has_vocabulary = name in ("wte.weight", "lm_head.weight")
    if has_vocabulary and tensor.shape[1:] == expected[1:]:
        return f"{line}: vocab_size does not fit"
    return line


def format_shape(sizes: Sequence[int]) -> str:
    """Returns a shape as 2x3x4, at most SHOWN_DIMS dimensions of it."""
    text = "x".join(map(str, sizes[:SHOWN_DIMS]))
    return f"{text}x..." if sizes[SHOWN_DIMS:] else text


def with_biases(weights: Weights) -> Weights:
    """Returns a model that computes the same function and has biases: zeros where `weights` has none."""
    if weights.config.bias:
        return weights
    config = dataclasses.replace(weights.config, bias=True)
    dtype = DTYPES[weights.dtype]

    def zeros(sizes: Shape) -> Tensor:
        return Tensor(sizes, dtype, read=lambda: np.zeros(sizes, dtype), label="zeros")

    tensors = {}
    for name, sizes in shapes(config).items():
        tensors[name] = weights.tensors.get(name) or zeros(sizes)
    note = "the model has no biases: zeros are written for them, which is equal in function"
    return dataclasses.replace(
        weights,
        config=config,
        tensors=tensors,
        notes=(*weights.notes, note),
    )


class Checksum:
    """A sha256 of the weights themselves: equal for equal weights in any format, layout or padding."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def update(self, name: str, tensor: np.ndarray) -> None:
        """Adds a tensor in Hugging Face's layout, in any float dtype, with its name and shape; hashed as float32."""
        header = f"{name} {format_shape(tensor.shape)}\n"
        self._sha256.update(header.encode())
        self._sha256.update(np.ascontiguousarray(tensor, np.float32).data)

    def hexdigest(self) -> str:
        """Returns the sha256 of everything added so far, in hex."""
        return self._sha256.hexdigest()


def read_tensors(
    weights: Weights,
    *,
    source: Mapping[str, Tensor] | None = None,
    checksum: Checksum | None = None,
    allow_nonfinite: bool = False,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, tensor) in the order of params.PARAMS, each with the shape and dtype of its `Tensor`.

    source: the parameters, by default, or moments of AdamW.
    checksum: updated with each tensor.

    Raises:
        DataError: a value is NaN or infinite, which `allow_nonfinite` would accept.
    """
    tensors = weights.tensors if source is None else source
    for row in rows(weights.config):
        for _, name in layers(row, weights.config):
            tensor = tensors[name].read()
            if not allow_nonfinite:
                _require_finite(weights.origin, tensors[name].label, tensor)
            if checksum:
                checksum.update(name, tensor)
            yield name, tensor


def _require_finite(origin: str, label: str, tensor: np.ndarray) -> None:
    finite = np.isfinite(tensor)
    if finite.all():
        return
    count = int((~finite).sum())
    first = np.unravel_index(int(finite.argmin()), tensor.shape)
    raise DataError(
        f"{label}: {count} values are NaN or infinite, the first at {list(map(int, first))}",
        field=origin,
        remedy="--allow_nonfinite converts them anyway",
    )


def read_leaves(weights: Weights, tensors: NamedTensors) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, leaf) of gptjax's tree of parameters, or of AdamW's moments: float32, of `params.leaf_shape`.

    tensors: (name, tensor) in the order of `read_tensors`.
    """
    source = iter(tensors)
    for row in rows(weights.config):
        leaf = np.zeros(leaf_shape(row, weights.config), np.float32)  # the vocabulary's padding stays zero
        for layer, name in layers(row, weights.config):
            found, tensor = next(source)
            assert found == name, f"{found} came where {name} belongs"
            into_leaf(row, leaf, tensor, layer=layer)
        yield row.path, leaf
        del leaf  # before the next one is allocated
