"""GPT-2 weights from any common form to any other: `python -m gptjax.convert --from=hf:gpt2 --to=gptjax:runs/gpt2`.

Forms: hf:DIR, hf:OWNER/NAME[@REVISION], gptjax:WORKDIR[@STEP], nanogpt:ckpt.pt, llmc:model.bin, and, only to be read,
msgpack:DIR with the old flax_model.msgpack.
The result is read back and compared before it gets its name, so what stands there is whole and right.
"""

from __future__ import annotations  # np.ndarray in a signature would import NumPy

import argparse
import contextlib
import itertools
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from etils import epy

from gptjax import runtime
from gptjax.errors import ConfigError, DataError, WorkdirError
from gptjax.workdir import is_bucket

with epy.lazy_imports():  # so that a wrong flag exits before anything large loads
    import numpy as np

    from gptjax import model as gpt
    from gptjax.convert import formats, hub
    from gptjax.convert import weights as w

log = logging.getLogger("gptjax")
REPORT_SECONDS = 5.0


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line, checked as far as that needs no file."""
    parser = runtime.Parser(__doc__)
    parser.add_argument("--from", dest="source", required=True, metavar="FORMAT:PATH", help="what to convert")
    parser.add_argument("--to", dest="target", default="", metavar="FORMAT:PATH", help="where the result goes")
    parser.add_argument("--dtype", default="", choices=["", "float32", "bfloat16"], help="of an export")
    parser.add_argument("--dropout", type=float, default=None, help="of the result; by default the source's")
    parser.add_argument("--tokenizer", default="", help="gpt2, bytes or a saved tokenizer, instead of the source's own")
    parser.add_argument("--dry_run", action="store_true", help="print the map and what differs; write nothing")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument("--allow_nonfinite", action="store_true", help="convert NaN and infinite weights too")
    parser.add_argument("--push", default="", metavar="OWNER/NAME", help="upload the result of --to=hf:DIR")
    args = parser.parse_strictly(arguments)
    if not args.target and not args.dry_run:
        raise ConfigError("--to is missing: FORMAT:PATH of the result, or --dry_run to look only")
    if args.dropout is not None and not 0 <= args.dropout < 1:
        raise ConfigError(f"--dropout={args.dropout}: must be from 0 to below 1")
    if args.push and not args.target.startswith("hf:"):
        raise ConfigError("--push: only what --to=hf:DIR wrote can be uploaded")
    if args.dtype and args.target.startswith("gptjax:"):
        raise ConfigError(f"--dtype={args.dtype}: parameters of gptjax are float32; choose it at the export")
    return args


def main(arguments: list[str]) -> None:
    args = parse_flags(arguments)
    source = formats.parse_place("--from", args.source, formats.READABLE)
    target = formats.parse_place("--to", args.target, formats.WRITABLE) if args.target else None
    if target and not args.dry_run:
        check_target(source, target, force=args.force)
    weights = formats.open_weights(source, tokenizer=args.tokenizer, dropout=args.dropout)
    if target:
        weights = formats.adapt(weights, target.format)
    form = target.format if target else "gptjax"
    dtype = formats.export_dtype(weights, form, args.dtype)
    describe(weights, formats.differences(weights, form, dtype) if target else [])
    if args.dry_run or target is None:
        print("\n".join(formats.map_table(weights, form, dtype)))
        return
    convert(weights, target, dtype=dtype, force=args.force, allow_nonfinite=args.allow_nonfinite)
    if args.push:
        log.info("uploaded to %s", hub.upload(target.path, args.push))


def describe(weights: w.Weights, differences: list[str]) -> None:
    """Says what is about to be converted, and everything about it that the user should know."""
    c = weights.config
    sizes = f"{c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, {c.block_size} positions, {c.vocab_size} ids"
    tied = "tied" if c.tie_embeddings else "untied"
    log.info("%s: %s parameters, %s, %s, %s", weights.origin, f"{gpt.count_params(c):,}", sizes, tied, weights.dtype)
    for note in (*weights.notes, *differences):
        log.info("  %s", note)


def convert(weights: w.Weights, target: formats.Place, *, dtype: str, force: bool, allow_nonfinite: bool) -> None:
    """Writes `weights` as `target`, reads the result back, compares, and only then gives it its name.

    Raises:
        DataError: a weight is not finite, or the source turns out to be damaged.
        WorkdirError: the target cannot be written.
    """
    start = time.perf_counter()
    source, found = w.Checksum(), w.Checksum()
    sent = source if dtype in (weights.dtype, "float32") else w.Checksum()
    with staged(target.path, force=force) as path:
        tensors = w.read_tensors(weights, checksum=source, allow_nonfinite=allow_nonfinite)
        tensors = tensors if sent is source else rounded(tensors, dtype, sent)
        tensors = with_progress(tensors, gpt.count_params(weights.config))
        formats.write(target, path, weights, tensors, dtype=dtype)
        log.info("source %s  weights sha256 %s", weights.origin, source.hexdigest())
        result = formats.open_weights(formats.Place(target.format, path))
        for _ in w.read_tensors(result, checksum=found, allow_nonfinite=True):
            pass
        if found.hexdigest() != sent.hexdigest():
            raise DataError(f"{target}: what was written is not what is read back: is the disk damaged?")
    log.info("result %s  weights sha256 %s", target, found.hexdigest())
    log.info("read back and compared: done in %.1f s", time.perf_counter() - start)


def rounded(tensors: Iterator[tuple[str, Any]], dtype: str, checksum: w.Checksum) -> Iterator[tuple[str, Any]]:
    """Yields the tensors rounded to `dtype`, and adds those to `checksum`."""
    for name, tensor in tensors:
        cast = np.asarray(tensor, w.DTYPES[dtype])
        checksum.update(name, cast)
        yield name, cast


def with_progress(tensors: Iterator[tuple[str, Any]], total: int) -> Iterator[tuple[str, Any]]:
    """Yields the tensors, with a line every few seconds on how far they have come."""
    done, told = 0, time.perf_counter()
    for name, tensor in tensors:
        yield name, tensor
        done += tensor.size
        if time.perf_counter() - told > REPORT_SECONDS:
            told = time.perf_counter()
            log.info("  %d%% of the parameters", 100 * done // total)


def check_target(source: formats.Place, target: formats.Place, *, force: bool) -> None:
    """Raises ConfigError if nothing can be written as `target`, or what would give way to it is not the user's to lose.

    --force may replace the source itself, but not a directory that has more than the source in it.
    """
    path = target.path
    if is_bucket(path):
        raise ConfigError(f"--to={target}: results are written to this machine's disks; copy them from there")
    if target.format in formats.FILES and os.path.isdir(path):
        raise ConfigError(
            f"--to={target}: is a directory; name a file, such as {os.path.join(path, formats.FILES[target.format])}"
        )
    refuse_existing(path, force=force)
    if holds(path, os.getcwd()):
        raise ConfigError(f"--to={target}: the command runs in that directory; name another")
    if holds(path, source.path) and not holds(source.path, path):
        raise ConfigError(f"--to={target}: has the source {source} in it, which would be lost; name another")


def holds(directory: str, path: str) -> bool:
    """Returns whether `path` is the existing `directory` or lies in it."""
    place = os.path.realpath(directory)
    return os.path.isdir(place) and os.path.commonpath([place, os.path.realpath(path)]) == place


def refuse_existing(path: str, *, force: bool) -> None:
    """Raises ConfigError if something stands at `path` that must not be replaced."""
    if os.path.lexists(os.path.abspath(path)) and not force and not is_empty(path):
        raise ConfigError(f"{path}: exists; --force replaces it")


def is_empty(path: str) -> bool:
    return os.path.isdir(path) and not os.listdir(path)


@contextlib.contextmanager
def staged(path: str, *, force: bool) -> Iterator[str]:
    """Yields a new name beside `path`; what was written there is moved to `path` at the end, or removed on failure.

    A link to an empty directory is followed; any other is replaced, and what it leads to stays.
    """
    final = os.path.realpath(path) if is_empty(path) else os.path.abspath(path)
    parent, name = os.path.split(final)
    made = list(itertools.takewhile(lambda place: not os.path.lexists(place), parents(parent)))
    try:
        os.makedirs(parent, exist_ok=True)
        directory = tempfile.mkdtemp(prefix=f".{name}.partial-", dir=parent)
    except OSError as error:
        raise WorkdirError(f"{path}: cannot be written: {error.strerror}; choose another") from error
    try:
        new = os.path.join(directory, "new")
        yield new
        refuse_existing(path, force=force)  # it may have come meanwhile
        replace(new, final, aside=os.path.join(directory, "old"))
    except OSError as error:
        raise WorkdirError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        for place in made:
            with contextlib.suppress(OSError):  # the result is in it, or somebody else has come to use it
                os.rmdir(place)


def parents(path: str) -> Iterator[str]:
    """Yields `path` and the directories above it."""
    while True:
        yield path
        if path == os.path.dirname(path):
            return
        path = os.path.dirname(path)


def replace(new: str, path: str, *, aside: str) -> None:
    """Moves `new` to `path` and what stood there to `aside`, or raises OSError with all as it was."""
    if not os.path.lexists(path):
        os.rename(new, path)
        return
    os.rename(path, aside)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(aside, path)
        raise


def cli() -> None:
    # Nothing here is worth taking an accelerator for. Not in main(), which notebooks call among other things.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    runtime.run_cli(main)


if __name__ == "__main__":
    cli()
