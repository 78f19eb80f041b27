"""Files written by torch.save, read without running any code in them."""

import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from gptjax.convert.weights import DTYPES, ReadTensor, Tensor, check_name
from gptjax.errors import DataError, UnavailableError, one_line

LEAST_TORCH = (2, 10)  # CVE-2025-32434 and CVE-2026-24747: in older ones a file can run code despite weights_only=True
REMEDY = "pip install 'gptjax[torch]'"
UNKNOWN_DTYPE = np.dtype("V1")  # `make_weights` rejects it by the tensor's name


def import_torch(path: str) -> Any:
    """Returns the module torch.

    Raises:
        UnavailableError: it is missing or too old to read `path` safely.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise UnavailableError("a file of torch.save needs torch", field=path, remedy=REMEDY) from error
    release = torch.__version__.split("+")[0]
    version = tuple(int(part) for part in release.split(".")[:2])
    if version < LEAST_TORCH:
        least = ".".join(map(str, LEAST_TORCH))
        raise UnavailableError(
            f"torch {torch.__version__} is not safe to read it, {least} is",
            field=path,
            remedy=REMEDY,
        )
    return torch


def load(path: str) -> Any:
    """Returns the content of the file: tensors and plain Python values only.

    Raises:
        DataError: the file is damaged, or contains anything else, such as code. No code of the file runs.
        UnavailableError: torch is missing or too old.
    """
    torch = import_torch(path)
    try:
        return torch.load(
            path,
            map_location="cpu",
            weights_only=True,
            mmap=zipfile.is_zipfile(path),  # only the zip format can be mapped
        )
    except Exception as error:  # unpickling fails in many ways, which all mean the same
        reason = str(error).split("WeightsUnpickler error:")[-1] or type(error).__name__
        raise DataError(
            f"not a file of tensors and plain values: {one_line(reason)}; nothing was run",
            field=path,
        ) from error


def tensors(state: Any, path: str) -> dict[str, Tensor]:
    """Returns the tensors of a state_dict by name, in torch's layout and in their own dtypes.

    Raises:
        DataError: `state` is not a state_dict, or an entry is not a tensor.
    """
    torch = import_torch(path)
    if not isinstance(state, Mapping) or not state:
        raise DataError(f"expected a state_dict, found {type(state).__name__}", field=path)
    found = {}
    for name, value in state.items():
        check_name(path, name)
        if not isinstance(value, torch.Tensor):
            raise DataError(f"{name} is a {type(value).__name__}, expected a tensor", field=path)
        dtype_name = str(value.dtype).removeprefix("torch.")
        found[name] = Tensor(
            shape=tuple(value.shape),
            dtype=DTYPES.get(dtype_name, UNKNOWN_DTYPE),
            read=_reader(torch, path, name, value),
            label=name,
        )
    return found


def _reader(
    torch: Any,
    path: str,
    name: str,
    value: Any,
) -> ReadTensor:
    def read() -> np.ndarray:
        try:
            dense = value.detach().contiguous()
            if dense.dtype == torch.bfloat16:  # which torch cannot give to NumPy
                return dense.view(torch.uint16).numpy().view(DTYPES["bfloat16"])
            return dense.numpy()
        except (RuntimeError, TypeError, NotImplementedError) as error:  # sparse, meta, quantised
            reason = str(error).splitlines()[0]
            raise DataError(f"{name} is not a plain tensor: {reason}", field=path) from error

    return read


def transposed(tensor: Tensor) -> Tensor:
    """Returns an nn.Linear weight [out, in] as [in, out], in the same dtype."""
    return Tensor(
        shape=tensor.shape[::-1],
        dtype=tensor.dtype,
        read=lambda: tensor.read().T,
        label=tensor.label,
    )
