"""refuse(...) and accept(...): conversions that must fail, or must not."""

import pathlib

import ml_dtypes
import numpy as np
import pytest

from gptjax.convert import __main__ as convert
from gptjax.errors import DataError
from tests.convert import models
from tests.helpers import raises, snapshot


@pytest.fixture
def refuse(tmp_path):
    """refuse(source, *flags, to=..., **parts) is as `raises`; the message must be one line, and nothing may change."""

    def refuse(source, *flags, to=None, kind=DataError, field=None, **parts):
        field = str(field) if isinstance(field, pathlib.Path) else field
        before = snapshot(tmp_path)
        with raises(kind, source if field is None else field, **parts) as caught:
            convert.main([f"--from={source}", f"--to={to or f'hf:{tmp_path}/out'}", *flags])
        assert snapshot(tmp_path) == before, "something was written"
        message = str(caught.value)
        assert message.isprintable(), message
        assert len(message) < 600, message

    return refuse


@pytest.fixture
def accept(tmp_path):
    """accept(source, *flags) converts to Hugging Face's form and returns the tensors."""

    def accept(source, *flags, out="accepted"):
        convert.main([f"--from={source}", f"--to=hf:{tmp_path}/{out}", *flags])
        header, data = models.read_header(tmp_path / out / "model.safetensors")
        header.pop("__metadata__")
        kinds = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}
        return {
            name.removeprefix(models.PREFIX): np.frombuffer(
                data[slice(*entry["data_offsets"])], kinds[entry["dtype"]]
            ).reshape(entry["shape"])
            for name, entry in header.items()
        }

    return accept


@pytest.fixture
def model(tmp_path):
    return tmp_path / "model"


@pytest.fixture
def hf(model):
    """The directory of a model as Hugging Face saves it, for the test to damage."""
    models.write_hf(model)
    return model
