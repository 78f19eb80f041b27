"""Running out of memory: recognises it in exceptions of JAX and NumPy, and reads the requested size; sizes as text."""

import re

# XLA's units are powers of two, whether it writes K or Ki.
UNITS = {
    "": 1.0,
    "K": 2.0**10,
    "M": 2.0**20,
    "G": 2.0**30,
    "T": 2.0**40,
    "P": 2.0**50,
    "E": 2.0**60,
}
SIZES = (
    r"Used ([\d.]+)([KMGTPE]?)i?B? of",  # a TPU's compiler
    r"\(([\d.]+)()B\)",  # a GPU's allocator, which prints the size in GiB first
    r"(?:allocat\w*|request for) ([\d.]+) ?([KMGTPE]?)(?:i?B\b|bytes|\b)",
)
DECIMAL_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def bytes_asked_for(error: BaseException) -> float | None:
    """Returns the bytes requested when memory ran out, 0 where the message has no size; None for other errors."""
    text = str(error)
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in text:
        return None
    for pattern in SIZES:
        found = re.search(pattern, text, re.IGNORECASE)
        if found:
            number = float(found[1].rstrip("."))  # a full stop may end the sentence
            return number * UNITS[found[2].upper()]
    return 0.0


def show(size: float) -> str:
    """Returns the size that could not be allocated, for a message; "more" where it is not known."""
    return show_bytes(size) if size else "more"


def show_bytes(size: float) -> str:
    """Returns a size with three digits, in decimal units.

    >>> show_bytes(3_981_000), show_bytes(999_950_000), show_bytes(0), show_bytes(4.4e15)
    ('3.98 MB', '1 GB', '0 bytes', '4,400 TB')
    """
    for unit, name in DECIMAL_UNITS:
        if size >= 0.9995 * unit:  # rounding to three digits would print 1e+03 of the next smaller unit
            number = size / unit
            return f"{number:.3g} {name}" if number < 999.5 else f"{number:,.0f} {name}"
    return f"{size:.0f} bytes"
