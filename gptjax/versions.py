"""The versions of gptjax and of the libraries that determine the bits of a run."""

import hashlib
import importlib.metadata
import pathlib

from gptjax import __version__

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def versions() -> dict[str, str]:
    """Returns {"gptjax": "0.1.0", "jax": ...} for everything that affects the bits of a run."""
    # gptjax's version comes from the package itself: it may run from a checkout that was never installed.
    found = {"gptjax": __version__}
    for name in LIBRARIES:
        found[name] = importlib.metadata.version(name)
    return found


def source_hash() -> str:
    """Returns a sha256 of gptjax's own source files, in hex: two checkouts may have the same version number."""
    root = pathlib.Path(__file__).parent
    sha256 = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        # The length separates the files: otherwise moved lines could leave the hash unchanged.
        header = f"{path.relative_to(root).as_posix()} {len(content)}\n"
        sha256.update(header.encode())
        sha256.update(content)
    return sha256.hexdigest()
