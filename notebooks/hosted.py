"""Installs gptjax from its checkout into the Python of a hosted notebook, and changes as little as possible.

JAX and its CUDA or TPU libraries belong together, and a hosted runtime comes with a set that fits its driver. So this
keeps the runtime's JAX where it is new enough, and pins its whole family against pip. Otherwise, or where there is no
JAX, pip installs the family that fits the accelerator. Runs with the standard library alone, and is imported by older
versions of Python, too, which it refuses.
"""

import glob
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping

ROOT = pathlib.Path(__file__).resolve().parent.parent
FAMILY = re.compile(r"jax|jaxlib|libtpu|jax-cuda\d+-(pjrt|plugin)|nvidia-.*")
# Modules of gptjax's dependencies that a kernel may have loaded: their package.
IN_USE = {"numpy": "numpy", "google.protobuf": "protobuf", "typing_extensions": "typing-extensions"}
IN_USE |= {"jax": "jax", "jaxlib": "jaxlib", "ml_dtypes": "ml-dtypes", "flax": "flax", "optax": "optax", "rich": "rich"}
IN_USE |= {"huggingface_hub": "huggingface-hub"}
CUDA_13_DRIVER = 580  # the oldest; older drivers run CUDA 12
CUDA_13_CAPABILITY = 7.5  # the oldest; a V100 has 7.0
SHOWN_LINES = 15  # of pip's complaint


def set_up(*extras: str) -> None:
    """Installs gptjax with `extras`, and says what it does about JAX.

    Raises:
        RuntimeError: Python is too old, pip fails, or the session must be restarted; the message says what to do.
    """
    text = (ROOT / "pyproject.toml").read_text()
    check_python(re.search(r'^requires-python = "(.*)"$', text, re.MULTILINE)[1], sys.version_info[:2])
    import tomllib  # Python 3.10 has none, and is refused above

    project = tomllib.loads(text)["project"]
    [oldest] = [need.partition(">=")[2] for need in project["dependencies"] if need.startswith("jax>=")]
    before = installed_versions()
    chosen, pins, reason = choose(oldest, before, find_accelerator(), list(extras))
    print(reason)
    install(ROOT, chosen, pins)
    changed = changed_in_use(before, installed_versions(), set(sys.modules))
    if changed:
        had = f"it had loaded {', '.join(changed)}"
        # Nobody can restart a notebook that Kaggle runs as a batch, and often the mixture works.
        if os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch":
            print(f"old modules stay loaded, because a batch has no restart: {had}")
            return
        # Raised, because "Run all" would go on with a mixture of old and new modules.
        raise RuntimeError(f"restart the session, then run this cell again: {had}; all is installed")


def check_python(needed: str, version: tuple[int, ...]) -> None:
    """Checks the version of Python against requires-python, such as ">=3.11".

    Raises:
        RuntimeError: it is too old.
    """
    oldest = needed.removeprefix(">=")
    if version < as_numbers(oldest):
        here = ".".join(map(str, version))
        raise RuntimeError(f"this runtime has Python {here}, and gptjax needs {oldest}: choose a newer runtime version")


def installed_versions() -> dict[str, str]:
    """Returns the version of each installed package by its name, in small letters with hyphens."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return found


def find_accelerator() -> str:
    """Returns "cuda", "cuda12", "tpu" or "", the extra of gptjax for this machine's accelerator."""
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*") or "TPU_ACCELERATOR_TYPE" in os.environ:
        return "tpu"
    query = ["nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return cuda_extra(answer)


def cuda_extra(answer: str) -> str:
    """Returns the extra for the GPUs that nvidia-smi lists as "DRIVER, CAPABILITY", "" if it lists none.

    >>> cuda_extra("580.65.06, 7.5"), cuda_extra("550.54.15, 7.5"), cuda_extra("580.65.06, 7.0"), cuda_extra("")
    ('cuda', 'cuda12', 'cuda12', '')
    """
    found = re.findall(r"(\d+)[\d.]*, *(\d+\.\d+)", answer)
    if not found:
        return ""
    is_new = all(int(driver) >= CUDA_13_DRIVER and float(cap) >= CUDA_13_CAPABILITY for driver, cap in found)
    return "cuda" if is_new else "cuda12"


def choose(
    oldest: str, installed: Mapping[str, str], accelerator: str, extras: list[str]
) -> tuple[list[str], list[str], str]:
    """Returns (extras to install, pins for pip, what happens as a sentence).

    oldest: the oldest JAX that gptjax runs with.
    """
    version = installed.get("jax", "")
    what = accelerator or "the CPU"
    if not version or as_numbers(version) < as_numbers(oldest):
        why = f"the runtime's JAX {version} is older than {oldest}" if version else "the runtime has no JAX"
        # Two plugins would both register as "cuda", and a driver for CUDA 13 runs CUDA 12, too.
        kept = "cuda12" if accelerator == "cuda" and "jax-cuda12-plugin" in installed else accelerator
        return [*extras, *[kept][: bool(kept)]], [], f"{why}: installing one for {what}"
    pins = [f"{name}=={installed[name]}" for name in sorted(installed) if FAMILY.fullmatch(name)]
    has_support = not accelerator or any(is_plugin(name, accelerator) for name in installed)
    if has_support:
        return extras, pins, f"using the runtime's JAX {version}"
    return [*extras, accelerator], pins, f"using the runtime's JAX {version}, and adding its support for {what}"


def is_plugin(package: str, accelerator: str) -> bool:
    """Returns whether a package makes JAX run on the accelerator, whatever its version of CUDA."""
    if accelerator == "tpu":
        return package == "libtpu"
    return bool(re.fullmatch(r"jax-cuda\d+-plugin", package))


def as_numbers(version: str) -> tuple[int, ...]:
    """Returns the leading numbers of a version.

    >>> as_numbers("0.10.2.dev3") < as_numbers("0.10.11"), as_numbers("0.10rc1")
    (True, (0, 10))
    """
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def install(source: pathlib.Path, extras: list[str], pins: list[str]) -> None:
    """Runs pip for the checkout in `source`.

    Raises:
        RuntimeError: it failed.
    """
    target = f"{source}[{','.join(extras)}]" if extras else str(source)
    with tempfile.TemporaryDirectory() as directory:
        constraints = pathlib.Path(directory, "constraints.txt")
        constraints.write_text("".join(f"{pin}\n" for pin in pins))
        command = [sys.executable, "-m", "pip", "install", "--quiet", target, "--constraint", str(constraints)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        end = "\n".join(done.stderr.strip().splitlines()[-SHOWN_LINES:])
        kept = f" It had to keep {', '.join(pins)}." if pins else ""
        raise RuntimeError(f"pip could not install gptjax.{kept} Is the internet on? It said:\n{end}")


def changed_in_use(before: Mapping[str, str], after: Mapping[str, str], loaded: set[str]) -> list[str]:
    """Returns the packages that this process had loaded before pip replaced them, with both versions."""
    changed = []
    for module, package in IN_USE.items():
        old, new = before.get(package), after.get(package)
        if module in loaded and old and old != new:
            changed.append(f"{package} {old}, now {new}")
    return changed
