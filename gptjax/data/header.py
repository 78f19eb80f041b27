"""The header of a shard of token ids: llm.c's, NumPy's in .npy files, or none in nanoGPT's files.

llm.c's header is 256 little-endian int32: magic, version, number of tokens, and zeros. The magic gives the type of the
ids that follow: uint16, or uint32 for a larger vocabulary. nanoGPT's files are only uint16 ids.
"""

import ast
import dataclasses
import struct

import numpy as np

from gptjax.errors import DataError, one_line

HEADER_BYTES = 1024
MAGIC_UINT16 = 20240520
MAGIC_UINT32 = 20240801
VERSIONS = {MAGIC_UINT16: 1, MAGIC_UINT32: 7}
DTYPES = {MAGIC_UINT16: np.dtype("<u2"), MAGIC_UINT32: np.dtype("<u4")}
LARGEST_COUNT = 2**31 - 1  # the header has the number of tokens as an int32
NUMPY_MAGIC = b"\x93NUMPY"
NUMPY_TYPES = {"<u2": np.dtype("<u2"), "<u4": np.dtype("<u4")}
LEAST_WORDS = 64  # uint16 words of a file without header, from which wider ids are recognised
LARGEST_HIGH_WORD = 8  # of ids in more than 16 bits: no vocabulary has more than half a million


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the ids of a shard are in its file, and their type."""

    dtype: np.dtype  # uint16 or uint32, little-endian
    offset: int  # bytes before the first id
    count: int  # tokens


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the type in which a shard keeps ids below `vocab_size`: uint16 or uint32, little-endian."""
    if vocab_size <= 65_535:
        return DTYPES[MAGIC_UINT16]
    return DTYPES[MAGIC_UINT32]


def make_header(count: int, dtype: np.dtype) -> bytes:
    """Returns the 1,024 bytes before the `count` ids of a shard."""
    [magic] = [magic for magic, known in DTYPES.items() if known == dtype]
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:3] = (magic, VERSIONS[magic], count)
    return header.tobytes()


def parse_header(path: str, head: bytes, size: int) -> Layout:
    """Returns the layout of a shard.

    Args:
        path: for messages.
        head: the first HEADER_BYTES bytes of the file, or all of a smaller file.
        size: the size of the file.

    Raises:
        DataError: the file is empty or damaged, or has a header of another format.
    """
    if size == 0:
        raise DataError("the shard is empty", field=path)
    if path.endswith(".npy") or head.startswith(NUMPY_MAGIC):
        return _parse_numpy(path, head, size)
    fields = np.frombuffer(head[:12].ljust(12, b"\0"), "<i4")
    magic, version, count = fields.tolist()
    if magic not in DTYPES:
        return _parse_headerless(path, head, size)
    if size < HEADER_BYTES:
        raise DataError(
            f"the shard ends within its header, at byte {size} of {HEADER_BYTES}",
            field=path,
        )
    if version != VERSIONS[magic]:
        raise DataError(
            f"header version {version}, expected {VERSIONS[magic]} with magic {magic}",
            field=path,
        )
    if count < 1:
        raise DataError(
            f"the header counts {count} tokens, expected at least 1",
            field=path,
        )
    expected = HEADER_BYTES + count * DTYPES[magic].itemsize
    if size != expected:
        raise DataError(
            f"{size} bytes, but the header counts {count} tokens, which take {expected} bytes",
            field=path,
        )
    return Layout(DTYPES[magic], HEADER_BYTES, count)


def _parse_headerless(path: str, head: bytes, size: int) -> Layout:
    # 506 times id 0 after the first six is no text: it is a header with an unknown magic.
    if len(head) == HEADER_BYTES and not any(head[12:]):
        magic = int(np.frombuffer(head[:4], "<i4")[0])
        known = ", ".join(map(str, DTYPES))
        raise DataError(
            f"the header has magic {magic}, expected one of {known}",
            field=path,
        )
    if size % 2:
        raise DataError(
            f"odd size of {size} bytes, which neither llm.c's format nor bare uint16 ids can have",
            field=path,
        )
    width = _guess_width(np.frombuffer(head[: len(head) // 8 * 8], "<u2"))
    if width > 2:
        raise DataError(
            f"looks like ids of {8 * width} bits, and a file without header has uint16",
            field=path,
            remedy="write them by numpy.save as uint16 or uint32 to a file that ends in .npy",
        )
    return Layout(np.dtype("<u2"), offset=0, count=size // 2)


def _guess_width(words: np.ndarray) -> int:
    """Returns the bytes of an id, by the first words of a file without header: uint16 [a multiple of 4]."""
    if len(words) < LEAST_WORDS:
        return 2
    low, second, third, fourth = words.reshape(-1, 4).T
    if not low.any() or max(second.max(), fourth.max()) > LARGEST_HIGH_WORD:
        return 2
    if not third.any() and not fourth.any():
        return 8
    # In text of uint16 ids the words at odd places are as large as those at even places.
    return 4 if min(low.max(), third.max()) > LARGEST_HIGH_WORD else 2


def _parse_numpy(path: str, head: bytes, size: int) -> Layout:
    """Returns the layout of a file that numpy.save has written.

    Raises:
        DataError: it is none, it is named otherwise, or its array is not one of uint16 or uint32 ids.
    """
    if not head.startswith(NUMPY_MAGIC):
        raise DataError("is no NumPy array, in spite of its name", field=path)
    if not path.endswith(".npy"):
        raise DataError("is a NumPy array", field=path, remedy="let its name end in .npy")
    try:
        major = head[6]
        width = 2 if major == 1 else 4
        [length] = struct.unpack_from("<H" if major == 1 else "<I", head, 8)
        offset = 8 + width + length
        described = ast.literal_eval(head[8 + width : offset].decode("latin-1"))
        kind, shape = described["descr"], described["shape"]
        is_flat = isinstance(shape, tuple) and len(shape) == 1 and type(shape[0]) is int
    except (struct.error, SyntaxError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise DataError("has a damaged NumPy header", field=path) from error
    if kind not in NUMPY_TYPES or not is_flat:
        raise DataError(
            f"holds an array of {one_line(kind)} and shape {one_line(shape)}, expected 1-D uint16 or uint32",
            field=path,
        )
    dtype = NUMPY_TYPES[kind]
    expected = offset + shape[0] * dtype.itemsize
    if shape[0] < 1 or size != expected:
        raise DataError(f"{size} bytes, but its header counts {shape[0]} ids, which take {expected} bytes", field=path)
    return Layout(dtype, offset, shape[0])
