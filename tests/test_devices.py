"""Where JAX finds no device: what the message says to do."""

import pytest

from gptjax import devices
from gptjax.errors import UnavailableError
from tests.helpers import raises


@pytest.mark.parametrize(
    ("wanted", "found", "parts"),
    [
        ("gpu", (), ("plugin for it is not installed", "pip install 'gptjax[cuda]'", "set JAX_PLATFORMS=cpu")),
        ("cuda,cpu", (), ("plugin for it is not installed", "pip install -e '.[cuda]'")),
        ("tpu", (), ("libtpu", "pip install 'gptjax[tpu]'")),
        ("cuda", ("jax_cuda12_plugin",), ("JAX's reason", "unset JAX_PLATFORMS")),
        ("xpu", (), ("JAX's reason", "cpu, cuda or tpu")),
    ],
)
def test_missing_device_is_refused_with_what_to_install(wanted, found, parts, monkeypatch):
    def fail():
        raise RuntimeError("JAX's reason")

    monkeypatch.setattr("jax.devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", wanted)
    monkeypatch.setattr("importlib.util.find_spec", lambda module: module in found or None)
    with raises(UnavailableError, "JAX_PLATFORMS", value=wanted) as caught:
        devices.check_devices()
    assert all(part in str(caught.value) for part in parts), caught.value
