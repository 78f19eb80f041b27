"""Files that torch.save wrote, read without running anything in them."""

import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gptjax.convert.files import plain
from gptjax.convert.weights import DTYPES, Tensor, check_name
from gptjax.errors import DataError, UnavailableError

LEAST_TORCH = (2, 10)  # CVE-2025-32434 and CVE-2026-24747: before it, weights_only=True could be made to run code
REMEDY = "pip install 'gptjax[torch]'"


def import_torch(path: str) -> Any:
    """Returns the module torch.

    Raises:
        UnavailableError: it is missing or too old to read `path` safely.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise UnavailableError(f"{path}: a file of torch.save needs torch: {REMEDY}") from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < LEAST_TORCH:
        least = ".".join(map(str, LEAST_TORCH))
        raise UnavailableError(f"{path}: torch {torch.__version__} is not safe to read it, {least} is: {REMEDY}")
    return torch


def load(path: str) -> Any:
    """Returns what is in the file: tensors and plain Python values only.

    Raises:
        DataError: it is damaged, or has something else in it, of which nothing is run.
        UnavailableError: torch is missing or too old.
    """
    torch = import_torch(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # unpickling can fail in any way, and each one means the same
        reason = str(error).split("WeightsUnpickler error:")[-1] or type(error).__name__
        raise DataError(f"{path}: not a file of tensors and plain values: {plain(reason)}; nothing was run") from error


def tensors(state: Any, path: str) -> dict[str, Tensor]:
    """Returns the tensors of a state_dict.

    Raises:
        DataError: it is not one.
    """
    torch = import_torch(path)
    if not isinstance(state, Mapping) or not state:
        raise DataError(f"{path}: expected a state_dict, found {type(state).__name__}")
    found = {}
    for name, value in state.items():
        check_name(path, name)
        if not isinstance(value, torch.Tensor):
            raise DataError(f"{path}: {name} is a {type(value).__name__}, expected a tensor")
        dtype = DTYPES.get(str(value.dtype).removeprefix("torch."), np.dtype("V1"))
        found[name] = Tensor(tuple(value.shape), dtype, _reader(torch, path, name, value), name)
    return found


def _reader(torch: Any, path: str, name: str, value: Any) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        try:
            dense = value.detach().contiguous()
            if dense.dtype == torch.bfloat16:
                return dense.view(torch.uint16).numpy().view(DTYPES["bfloat16"])
            return dense.numpy()
        except (RuntimeError, TypeError, NotImplementedError) as error:  # sparse, meta, quantised
            raise DataError(f"{path}: {name} is not a plain tensor: {str(error).splitlines()[0]}") from error

    return read


def transposed(tensor: Tensor) -> Tensor:
    """Returns a matrix [out, in] of nn.Linear as [in, out]."""
    return Tensor(tensor.shape[::-1], tensor.dtype, lambda: tensor.read().T, tensor.label)
