"""The order of an epoch: a random permutation of its windows, computed on demand.

A Feistel network with the round function of the Simon block cipher permutes all numbers of an even number of bits.
Results beyond the last window are permuted again until they are in range (cycle walking). The result is bit-identical
to `grain.experimental.index_shuffle`, which gptjax used at first, but NumPy computes a whole batch at once. There is
one exception: with 2**16 + 1 windows (or 2**18 + 1, ...) Grain returns one window twice and another never.
"""

import functools

import numpy as np

ROUNDS = 4
MIN_BITS = 16  # a network over fewer bits would shuffle poorly
UINT32 = 2**32 - 1


def shuffle(positions: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Returns the windows at `positions` of an epoch, in the permutation that `seed` selects.

    Args:
        positions: int64 [n], each in [0, count).
        count: the number of windows, at most 2**32.
        seed: in [0, 2**32).

    Returns:
        int64 [n], each in [0, count).
    """
    bits = max(MIN_BITS, (count - 1).bit_length())
    bits += bits % 2
    if bits == MIN_BITS:  # few windows: walks would be long, and the whole permutation is small
        permutation = _short_epoch(count, seed)
        return permutation[positions]
    half = bits // 2
    keys = _round_keys(seed, half)
    windows = _encrypt(positions, keys, half)
    while (beyond := np.flatnonzero(windows >= count)).size:
        windows[beyond] = _encrypt(windows[beyond], keys, half)
    return windows


@functools.lru_cache(maxsize=4)  # a batch spans several epochs where they are short
def _short_epoch(count: int, seed: int) -> np.ndarray:
    """Returns the permutation of [0, count), count <= 2**MIN_BITS: int64 [count]."""
    half = MIN_BITS // 2
    keys = _round_keys(seed, half)
    numbers = np.arange(2**MIN_BITS)
    encrypted = _encrypt(numbers, keys, half)
    in_range = numbers < count
    walk = np.where(in_range, numbers, encrypted)  # one step of every walk; windows in range stay
    windows = encrypted[:count]
    while (windows >= count).any():
        walk = walk[walk]  # twice as many steps
        windows = walk[windows]
    return windows


def _encrypt(
    numbers: np.ndarray,
    keys: tuple[int, ...],
    half: int,
) -> np.ndarray:
    """Returns the numbers' images in a permutation of all numbers of 2 * half bits: int64 [n], of int64 [n]."""
    mix = _mixing_table(half)
    left = numbers >> half
    right = numbers & (2**half - 1)
    # Two rounds at a time, so that the halves need not be swapped after each.
    for even_key, odd_key in zip(keys[::2], keys[1::2], strict=True):
        left = left ^ mix[right] ^ even_key
        right = right ^ mix[left] ^ odd_key
    return left << half | right


@functools.lru_cache(maxsize=4)
def _mixing_table(half: int) -> np.ndarray:
    """Returns Simon's round function of each number of `half` bits: int64 [2**half]."""
    numbers = np.arange(2**half)
    mask = 2**half - 1

    def rotate(by: int) -> np.ndarray:
        by %= half
        up = numbers << by
        down = numbers >> (half - by)
        return (up | down) & mask

    return (rotate(1) & rotate(8)) ^ rotate(2)


@functools.lru_cache(maxsize=16)
def _round_keys(seed: int, half: int) -> tuple[int, ...]:
    """Returns one key of `half` bits per round: the output of C++'s std::seed_seq{seed}.generate for ROUNDS words.

    The C++ standard's names for `near` and `far` are p and q; k - 1 is taken modulo ROUNDS, as are the other indices.
    """
    words = [0x8B8B8B8B] * ROUNDS
    shift = (ROUNDS - 1) // 2
    near = (ROUNDS - shift) // 2
    far = near + shift
    # For each k: the number of seeds, then k plus the only seed, then k.
    terms = [1, 1 + seed, *range(2, ROUNDS)]
    for k in range(ROUNDS):
        p = (k + near) % ROUNDS
        q = (k + far) % ROUNDS
        mixed = words[k] ^ words[p] ^ words[k - 1]
        first = _times(1664525, mixed)
        second = first + terms[k] & UINT32
        words[p] = words[p] + first & UINT32
        words[q] = words[q] + second & UINT32
        words[k] = second
    for k in range(ROUNDS):
        p = (k + near) % ROUNDS
        q = (k + far) % ROUNDS
        mixed = words[k] + words[p] + words[k - 1]
        first = _times(1566083941, mixed & UINT32)
        second = first - k & UINT32
        words[p] ^= first
        words[q] ^= second
        words[k] = second
    return tuple(word & (2**half - 1) for word in words)


def _times(factor: int, mixed: int) -> int:
    """Returns the product of `factor` and the scrambled `mixed`, modulo 2**32."""
    scrambled = mixed ^ mixed >> 27
    return factor * scrambled & UINT32
