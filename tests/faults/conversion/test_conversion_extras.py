"""V: a missing or old optional package is named."""

import re
import sys
import types

import pytest

from gptjax.convert import torch_file
from gptjax.errors import UnavailableError

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("form", ["nanogpt", "hf"])
def test_v_missing_torch_error_states_the_extra_to_install(form, hf, refuse, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    parts = {"kind": UnavailableError, "remedy": "pip install 'gptjax[torch]'"}
    refuse(f"hf:{hf}", to=f"nanogpt:{hf}.pt", field=f"{hf}.pt", **parts)
    file = (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    refuse(f"{form}:{hf if form == 'hf' else file}", field=file, **parts)


@pytest.mark.parametrize("version", ["2.9.1", "2.5.0+cu124", "1.13.1"])
def test_v_an_old_torch_is_not_trusted(version, hf, refuse, monkeypatch):
    class OldTorch:
        __version__ = version

        def load(self, *_, **__):
            raise AssertionError("was trusted")

    monkeypatch.setitem(sys.modules, "torch", OldTorch())
    file = (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    refuse(f"hf:{hf}", kind=UnavailableError, field=file, match=rf"{re.escape(version)} .* 2\.10")


@pytest.mark.parametrize("version", ["2.10.0", "2.11.0a0+git1234", "3.0.1+cpu"])
def test_v_safe_torch_is_accepted(version, monkeypatch):
    torch = types.SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert torch_file.import_torch("x") is torch


def test_v_missing_huggingface_hub_error_states_the_extra(refuse, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refuse("hf:someone/tiny", kind=UnavailableError, field="", remedy="pip install 'gptjax[hub]'")
