"""Array fingerprints: two 32-bit sums that depend on every bit, the dtype and the shape, but not on the sharding.

JAX computes them on the devices that hold an array, and NumPy computes the same ones on the host.
"""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.sharding import path_name

CACHED_WORDS = 2**18  # per task: with fewer, threads wait for each other; with more, caches overflow


def fingerprints(tree: Any) -> dict[str, list[int]]:
    """Returns two 32-bit sums for each leaf, by path: any other bit, dtype or shape changes them; placement does not.

    tree: jax arrays of any shape, of 8, 16 or 32 bits.
    """
    sums = _fingerprint_all(tree)
    leaves = jax.tree.leaves_with_path(sums)
    return {path_name(path): np.asarray(leaf).tolist() for path, leaf in leaves}


# jit caches by function: a new lambda at each call would be compiled at each save.
@jax.jit
def _fingerprint_all(tree: Any) -> Any:
    return jax.tree.map(_fingerprint, tree)


@jax.jit  # so that leaves of one shape, as those of parameters and moments, are traced once
def _fingerprint(x: jax.Array) -> jax.Array:
    width = x.dtype.itemsize * 8
    unsigned = jnp.dtype(f"uint{width}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    # Each entry's index in the flattened global array. iota keeps the sharding of x, where a reshape would gather it.
    index = jnp.zeros(x.shape, jnp.uint32)
    stride = 1
    for dim in reversed(range(x.ndim)):
        coordinate = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        index += coordinate * jnp.uint32(stride % 2**32)
        stride *= x.shape[dim]
    # Sums of integers modulo 2**32 are the same in any order, and so on any mesh.
    sums = []
    for salt in _salts(x):
        mixed = _mix(bits ^ _mix(index + salt))
        sums.append(jnp.sum(mixed, dtype=jnp.uint32))
    return jnp.stack(sums)


def fingerprint_array(x: np.ndarray) -> list[int]:
    """Returns the fingerprint of one 32-bit array, as `fingerprints` does, in NumPy.

    It copies nothing, except an array that is not contiguous, and compiles nothing.
    """
    words = np.ascontiguousarray(x).reshape(-1).view(np.uint32)
    salts = _salts(x)
    starts = range(0, len(words), CACHED_WORDS)
    # Threads, since NumPy releases the GIL.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(lambda start: _sum_words(words, start, salts), starts))
    return [sum(map(int, column)) % 2**32 for column in zip(*parts, strict=True)]


def _sum_words(
    words: np.ndarray,
    start: int,
    salts: tuple[np.uint32, ...],
) -> list[np.uint32]:
    """Returns the contribution of CACHED_WORDS words, from `start` on, to the two sums."""
    part = words[start : start + CACHED_WORDS]
    index = np.arange(len(part), dtype=np.uint32) + np.uint32(start % 2**32)
    sums = []
    for salt in salts:
        mixed = _mix(part ^ _mix(index + salt))
        sums.append(np.sum(mixed, dtype=np.uint32))
    return sums


def _salts(x: Any) -> tuple[np.uint32, np.uint32]:
    # The dtype and the shape enter here, so that a reshape or a cast of the same bits has other sums.
    kind = zlib.crc32(f"{x.dtype}{x.shape}".encode())
    return np.uint32(0x9E3779B9 ^ kind), np.uint32(0x7F4A7C15 ^ kind)


def _mix(x: Any) -> Any:
    """The finaliser of MurmurHash3 (Appleby, public domain): a bijection of uint32 that spreads every bit."""
    x = x ^ (x >> 16)
    x = x * np.uint32(0x85EBCA6B)
    x = x ^ (x >> 13)
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
