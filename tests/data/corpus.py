"""One corpus in every form that a source can have, and its preparation."""

import contextlib
import csv
import gzip
import json
import lzma

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from gptjax.data import preparation
from gptjax.data.prepare import prepare
from gptjax.data.tokenizer import load_tokenizer
from gptjax.data.tokens import open_split

BYTES = load_tokenizer("bytes")
TEXTS = [f"document {number}: café, \u2028 \x85 {'x' * (37 * number % 400)}" for number in range(60)]


def as_lines(path, texts):
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def as_jsonl(path, texts):
    path.write_text("".join(json.dumps({"id": 3, "text": text}) + "\n" for text in texts))


def as_csv(path, texts):
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "text"])
        rows.writerows(enumerate(texts))


def as_parquet(path, texts, group=7):
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=group)


def as_text(path, texts):
    path.mkdir()
    for number, text in enumerate(texts):
        (path / f"{number:03d}").write_text(text)


def compress(path, suffix):
    zstd = zstandard.ZstdCompressor(write_checksum=True).compress
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}[suffix]
    packed = path.with_name(path.name + suffix)
    data = path.read_bytes()
    half = len(data) // 2
    packed.write_bytes(pack(data[:half]) + pack(data[half:]))  # two members or frames, as parallel programs write them
    path.unlink()
    return packed


WRITERS = {"lines": as_lines, "jsonl": as_jsonl, "csv": as_csv, "parquet": as_parquet, "text": as_text}


def read_shards(folder):
    """Returns the content of each shard by its name."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix == ".bin"}


def as_tfds(path, texts):
    """Lets TFDS prepare a data set, and returns the directory of its version."""
    import tensorflow_datasets as tfds  # slow to import

    class Corpus(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "corpus"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate({"text": text} for text in texts)

    tfds.disable_progress_bar()
    Corpus(data_dir=str(path), file_format="array_record").download_and_prepare()
    return path / "corpus" / "1.0.0"


def prepared(source, out, **options):
    """Prepares `source` as bytes, and returns the lines that it logs."""
    lines = []
    prepare(source=str(source), out=str(out), log=lines.append, **{"tokenizer": BYTES} | options)
    return lines


@contextlib.contextmanager
def interrupted(monkeypatch, *, groups, batch_bytes):
    """Ends a preparation as a kill does, when the journal names that many groups of documents."""
    write, count = preparation.write_journal, iter(range(1, 10**9))

    def stop(partial, journal):
        write(partial, journal)
        if next(count) == groups:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "BATCH_BYTES", batch_bytes)
        patch.setattr(preparation, "write_journal", stop)
        with pytest.raises(KeyboardInterrupt):
            yield


def documents_of(out, split):
    ids = np.concatenate([shard.read() for shard in open_split(str(out), split, tokenizer=BYTES).shards])
    assert ids[-1] == BYTES.eot_id
    return [BYTES.decode(part[:-1]) for part in np.split(ids, np.flatnonzero(ids == BYTES.eot_id) + 1)[:-1]]
