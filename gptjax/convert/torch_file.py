"""Files written by torch.save, read without running any code in them."""

import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from gptjax.convert.files import require_regular
from gptjax.convert.weights import DTYPES, UNKNOWN_DTYPE, ReadTensor, Tensor, check_name
from gptjax.errors import DataError, UnavailableError, first_line, install, one_line

LEAST_TORCH = (2, 10)  # CVE-2025-32434 and CVE-2026-24747: in older ones a file can run code despite weights_only=True
REMEDY = install("torch")


class _NumpyType:
    """Stands for numpy.dtype in a file: a NumPy scalar's type, by a code such as f8, without NumPy's own unpickling."""

    def __init__(self, code: str, *flags: object) -> None:
        if code not in NUMPY_CODES:
            raise ValueError(f"a NumPy value of type {code}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[object, ...]) -> None:
        order = state[1]
        if order not in ("<", ">", "=", "|"):
            raise ValueError("a NumPy type of an unknown byte order")
        self.dtype = self.dtype.newbyteorder(order)


def _numpy_scalar(kind: _NumpyType, data: bytes) -> bool | int | float:
    """Stands for NumPy's function of a pickled scalar: returns the value as Python's own."""
    [value] = np.frombuffer(data, kind.dtype)
    return value.item()


# What the scalars of a training script are pickled as: best_val_loss as np.float64, a size as np.int64. torch refuses
# NumPy's own functions, which were not written for hostile files; these stand in under their names.
NUMPY_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
NUMPY_SCALARS = [
    (_NumpyType, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),  # NumPy 1
    (_numpy_scalar, "numpy._core.multiarray.scalar"),  # NumPy 2
]


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
    require_regular(path)
    torch = import_torch(path)
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS):
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
            dtype=_dtype(dtype_name),
            read=_reader(torch, path, name, value),
            label=name,
        )
    return found


def _dtype(name: str) -> np.dtype:
    """Returns the dtype of torch's name; `make_weights` refuses a parameter of a type that it cannot convert."""
    if name in DTYPES:
        return DTYPES[name]
    try:
        return np.dtype(name)
    except TypeError:  # quantised and 8-bit types, which NumPy lacks
        return UNKNOWN_DTYPE


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
            reason = first_line(error)
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
