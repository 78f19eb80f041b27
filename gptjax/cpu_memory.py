"""What the C library does with freed memory in a run on a CPU, which must be decided before JAX starts."""

import ctypes
import os
from collections.abc import Mapping

# Options of glibc's mallopt, by their numbers in malloc.h, and their values.
OPTIONS = {
    -8: 1,  # M_ARENA_MAX: the other arenas cannot hold a large block
    -4: 0,  # M_MMAP_MAX: no block comes from the system on its own
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: less than 2 GB of free memory is not given back
}
CHOSEN = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # variables of somebody who has chosen already


def keep_freed_memory(environ: Mapping[str, str] = os.environ) -> bool:
    """Has this process keep the memory that it frees, and returns whether it does. It changes no result.

    XLA allocates the temporary buffers of a CPU program again in every step. glibc takes blocks of that size from the
    system and returns them after the step. So each step begins with a page fault for every 4 KiB: 15,000 in the
    quickstart, a third of its time.

    Call it before JAX starts its threads. Nothing happens with another C library than glibc, or where a variable of
    the environment sets up its memory.
    """
    if any(name.startswith(CHOSEN) for name in environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(option, value) for option, value in OPTIONS.items())
