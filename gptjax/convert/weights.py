"""A model in any format as tensors that are not yet read, by GPT-2's names and in Hugging Face's layout."""

import dataclasses
import difflib
import hashlib
import itertools
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from gptjax.config import Config, GPTConfig, find_problems
from gptjax.convert.names import into_leaf, layers, leaf_shape, rows, shapes
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import DataError

LARGEST_SIZE = 2**31 - 1  # of one dim: what an int32 in a file's header can say
LONGEST_NAME = 200  # letters of a tensor's name; the longest of GPT-2's has 38
NEAR = 1000  # names among which the nearest is looked for
LARGEST_NUMBER = 2**63  # that a history can have
HISTORY = {"step": int, "tokens": int, "loss": float, "val_loss": float, "data": str, "config": dict}
LAYER = re.compile(r"h\.(0|[1-9][0-9]{0,5})\.")
DTYPES = {"float32": np.dtype("float32"), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("float16")}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a source: read() gives it in Hugging Face's layout."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    label: str  # what the source calls it, for messages


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model to convert. `tensors` are exactly those of `config`: `make_weights` has seen to that."""

    origin: str  # as in --from, with the revision or step that it came to
    config: GPTConfig
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer | None = None
    dtype: str = "float32"  # of an export, unless another is asked for
    history: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # some of HISTORY: for the model card
    notes: tuple[str, ...] = ()  # what the user should know


def make_weights(origin: str, config: GPTConfig, tensors: Mapping[str, Tensor], **rest: Any) -> Weights:
    """Returns the Weights after a strict comparison of `tensors` with what `config` needs.

    Raises:
        DataError: a tensor is missing, left over, or of another shape or type.
    """
    problem = next(iter(find_problems(Config(model=config))), None) or _compare(config, tensors)
    if problem:
        raise DataError(f"{origin}: {problem}")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    names = [name for name, dtype in DTYPES.items() if dtype in dtypes]
    rest.setdefault("dtype", names[0] if len(names) == 1 else "float32")
    return Weights(origin, config, tensors, **rest)


def make_history(values: object) -> dict[str, Any]:
    """Returns those of `values` that a history has, of the right type and, if numbers, finite; the rest is left out."""
    found = {name: values.get(name) for name in HISTORY} if isinstance(values, Mapping) else {}
    return {
        name: value
        for name, value in found.items()
        if type(value) is HISTORY[name] and (not isinstance(value, int | float) or abs(value) < LARGEST_NUMBER)
    }


def check_name(path: str, name: object) -> str:
    """Returns the name of a tensor in the file `path` if it can be shown as it is.

    Raises:
        DataError: it cannot, and so is not one of GPT-2's.
    """
    if not isinstance(name, str) or not name.isprintable() or len(name) > LONGEST_NAME:
        raise DataError(f"{path}: {show(name)} is not the name of a tensor of GPT-2")
    return name


def check_sizes(path: str, sizes: Mapping[str, Any]) -> None:
    """Raises DataError unless all of them are whole numbers that the size of something can be."""
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size <= LARGEST_SIZE:
            raise DataError(f"{path}: {name}={show(size)}: expected a positive whole number, at most {LARGEST_SIZE}")


def show(value: object) -> str:
    """Returns repr(value) as far as it fits a message, however deep or long the value is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def _compare(config: GPTConfig, tensors: Mapping[str, Tensor]) -> str | None:
    """Returns the first difference between `tensors` and what a model of `config` has, and how many more there are."""
    found = {match[1] for match in map(LAYER.match, tensors) if match}
    if found and len(found) != config.n_layer:  # before anything is as long as a number in a file says
        return f"n_layer is {config.n_layer}, but there are tensors of {len(found)} layers"
    if config.n_layer > len(tensors):
        return f"n_layer is {config.n_layer}, but there are only {len(tensors)} tensors"
    expected = shapes(config)
    missing, extra = [n for n in expected if n not in tensors], [n for n in tensors if n not in expected]
    both = [n for n in expected if n in tensors]
    shaped = [n for n in both if tensors[n].shape != expected[n]]
    typed = [n for n in both if tensors[n].dtype not in DTYPES.values() and n not in shaped]
    tell: list[tuple[list[str], Callable[[str], str]]] = [
        (missing, lambda n: _describe_missing(n, extra)),
        (extra, lambda n: f"{tensors[n].label}: not a tensor of GPT-2"),
        (shaped, lambda n: _describe_shape(n, tensors[n], expected[n])),
        (typed, lambda n: f"{tensors[n].label} is {tensors[n].dtype}; expected {', '.join(DTYPES)}"),
    ]
    lines = [describe_one(names[0]) for names, describe_one in tell if names]
    others = sum(len(names) for names, _ in tell) - 1
    return (lines[0] + (f" (and {others} more)" if others else "")) if lines else None


def _describe_missing(name: str, extra: list[str]) -> str:
    near = difflib.get_close_matches(name, extra[:NEAR], 1, 0.7)
    return f"{name} is missing" + (f"; was it renamed {near[0]}?" if near else "")


def _describe_shape(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> str:
    line = f"{tensor.label} has shape {describe(tensor.shape)}, expected {describe(wanted)}"
    if tensor.shape == wanted[::-1]:
        return f"{line}: it looks transposed (nanoGPT layout?)"
    if name in ("wte.weight", "lm_head.weight") and tensor.shape[1:] == wanted[1:]:
        return f"{line}: vocab_size does not fit"
    return line


def describe(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes[:8])) + ("x..." if sizes[8:] else "")


def with_biases(weights: Weights) -> Weights:
    """Returns a model equal in function that has biases, all zero, where `weights` has none."""
    if weights.config.bias:
        return weights
    config = dataclasses.replace(weights.config, bias=True)
    dtype = DTYPES[weights.dtype]

    def zeros(sizes: tuple[int, ...]) -> Tensor:
        return Tensor(sizes, dtype, lambda: np.zeros(sizes, dtype), "zeros")

    tensors = {name: weights.tensors.get(name) or zeros(sizes) for name, sizes in shapes(config).items()}
    note = "the model has no biases: zeros are written for them, which is equal in function"
    return dataclasses.replace(weights, config=config, tensors=tensors, notes=(*weights.notes, note))


class Checksum:
    """A sha256 of the weights themselves: equal for equal weights in any format, layout or padding."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def update(self, name: str, tensor: np.ndarray) -> None:
        self._sha256.update(f"{name} {describe(tensor.shape)}\n".encode())
        self._sha256.update(np.ascontiguousarray(tensor, np.float32).data)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def read_tensors(
    weights: Weights, *, checksum: Checksum | None = None, allow_nonfinite: bool = False
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, tensor) of all tensors in the order of names.ROWS.

    Raises:
        DataError: a value is NaN or infinite, and that is not allowed.
    """
    names = itertools.chain.from_iterable(layers(row, weights.config) for row in rows(weights.config))
    for _, name in names:
        tensor = weights.tensors[name].read()
        if not allow_nonfinite:
            _refuse_nonfinite(weights, name, tensor)
        if checksum:
            checksum.update(name, tensor)
        yield name, tensor


def _refuse_nonfinite(weights: Weights, name: str, tensor: np.ndarray) -> None:
    finite = np.isfinite(tensor)
    if not finite.all():
        count, first = int((~finite).sum()), np.unravel_index(int(finite.argmin()), tensor.shape)
        raise DataError(
            f"{weights.origin}: {weights.tensors[name].label}: {count} values are NaN or infinite, the first at "
            f"{list(map(int, first))}; --allow_nonfinite converts them all the same"
        )


def read_leaves(weights: Weights, tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, float32 parameter) of gptjax's tree out of `tensors`, which come as read_tensors gives them."""
    source = iter(tensors)
    for row in rows(weights.config):
        leaf = np.zeros(leaf_shape(row, weights.config), np.float32)  # the zeros stay in the vocabulary's padding
        for layer, name in layers(row, weights.config):
            found, tensor = next(source)
            assert found == name, f"{found} came where {name} belongs"
            into_leaf(row, leaf, layer, tensor)
        yield row.path, leaf
        del leaf  # before the next one is made
