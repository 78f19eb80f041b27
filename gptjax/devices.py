"""Whether JAX finds the devices that it should, and what to install where it does not."""

import importlib.util
import os
from collections.abc import Mapping

from gptjax.errors import UnavailableError, first_line, install

ACCELERATORS = {"/dev/nvidia0": "cuda", "/dev/accel0": "tpu", "/dev/vfio/0": "tpu"}  # device file -> extra of gptjax
# A name in JAX_PLATFORMS -> the extra of gptjax that installs its plugin, and the modules, any of which is that plugin.
PLUGINS = {
    "cuda": ("cuda", ("jax_cuda13_plugin", "jax_cuda12_plugin")),
    "gpu": ("cuda", ("jax_cuda13_plugin", "jax_cuda12_plugin")),
    "tpu": ("tpu", ("libtpu",)),
}


def expects_accelerator(environ: Mapping[str, str] = os.environ) -> bool:
    """Returns whether JAX will probably run on a GPU or TPU, without starting it."""
    wanted = environ.get("JAX_PLATFORMS", "")
    if wanted:
        return wanted.split(",")[0] != "cpu"
    return bool(_present())


def _present() -> str:
    """Returns the extra of gptjax for the accelerator of this machine, "" without one."""
    return next((extra for path, extra in ACCELERATORS.items() if os.path.exists(path)), "")


def check_devices() -> None:
    """Raises UnavailableError where JAX finds no device of JAX_PLATFORMS, or not the accelerator that is here."""
    import jax

    wanted = os.environ.get("JAX_PLATFORMS", "")
    try:
        platform = jax.devices()[0].platform
    except (RuntimeError, AssertionError) as error:
        raise _no_device(wanted, first_line(error)) from error
    present = _present()
    if platform == "cpu" and present and not wanted:
        raise UnavailableError(
            f"this machine has a {present} device, but JAX sees only its CPU",
            remedy=f"{install(present)}; or set JAX_PLATFORMS=cpu to train on the CPU",
        )


def _no_device(wanted: str, reason: str) -> UnavailableError:
    """Returns the error where JAX finds no device; wanted: JAX_PLATFORMS, reason: JAX's own."""
    extra, modules = PLUGINS.get(wanted.split(",")[0], ("", ()))
    if extra and not any(importlib.util.find_spec(module) for module in modules):
        reason = f"JAX's plugin for it is not installed ({' or '.join(modules)})"
        remedy = f"{install(extra)}; or set JAX_PLATFORMS=cpu"
    else:
        remedy = "unset JAX_PLATFORMS to take what JAX finds, or set it to cpu, cuda or tpu"
    return UnavailableError(
        f"no such device: {reason or 'JAX gives no reason'}",
        field="JAX_PLATFORMS",
        value=wanted or "(unset)",
        remedy=remedy,
    )
