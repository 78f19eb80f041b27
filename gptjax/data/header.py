"""The header of a shard of token ids: llm.c's, or none in nanoGPT's files.

llm.c's header is 256 little-endian int32: magic, version, number of tokens, and zeros. The magic gives the type of the
ids that follow: uint16, or uint32 for a larger vocabulary. nanoGPT's files are only uint16 ids.
"""

import dataclasses

import numpy as np

from gptjax.errors import DataError

HEADER_BYTES = 1024
MAGIC_UINT16 = 20240520
MAGIC_UINT32 = 20240801
VERSIONS = {MAGIC_UINT16: 1, MAGIC_UINT32: 7}
DTYPES = {MAGIC_UINT16: np.dtype("<u2"), MAGIC_UINT32: np.dtype("<u4")}
LARGEST_COUNT = 2**31 - 1  # the header has the number of tokens as an int32


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
    return Layout(np.dtype("<u2"), offset=0, count=size // 2)
