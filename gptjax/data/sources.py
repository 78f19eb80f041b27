"""Where documents come from: each source yields (id, text) in a fixed order."""

import contextlib
import dataclasses
import io
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

from gptjax.errors import ConfigError, DataError, UnavailableError

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

Document = tuple[str, str]  # id and text

KINDS = "stdlib, tfds:NAME[/CONFIG], text:PATH or lines:PATH"
TFDS_REMEDY = "run it again to go on with the download; `pip install tensorflow` helps where its error asks for it"

# Folders of the standard library's directory that are not its source text.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents in a fixed order, the same at every call of `documents`, and as many of the totals as are known."""

    name: str
    documents: Callable[[], Iterator[Document]]
    total_documents: int = 0  # 0 if unknown
    total_bytes: int = 0  # 0 if unknown


def needs_network(name: str) -> bool:
    """Returns whether the source may have to be downloaded."""
    return name.startswith("tfds:")


def canonical_name(name: str) -> str:
    """Returns the name of the source that means the same from any working directory.

    Raises:
        ConfigError: there is no such kind of source.
    """
    kind, _, path = name.partition(":")
    if kind in ("text", "lines") and path:
        return f"{kind}:{os.path.abspath(path)}"
    if name == "stdlib" or (kind == "tfds" and path):
        return name
    raise ConfigError(f"data.source={name!r}: expected {KINDS}")


def open_source(name: str, *, text_feature: str = "text", work_dir: str) -> Source:
    """Returns the source: `stdlib` is prepared under `work_dir`, `tfds:` in TFDS's own directory, files stay in place.

    Raises:
        ConfigError: there is no such source, path, or text feature.
        UnavailableError: a TFDS data set cannot be downloaded.
    """
    kind, _, path = canonical_name(name).partition(":")
    if kind == "stdlib":
        return _open_stdlib(work_dir)
    if kind == "tfds":
        return _open_tfds(path, text_feature)
    return _open_files(kind, path)


def _open_files(kind: str, path: str) -> Source:
    paths = _list_files(path)
    if not paths:
        raise ConfigError(f"data.source={kind}:{path}: no such file or folder, or no file in it")
    read = _read_whole if kind == "text" else _read_lines
    root = path if os.path.isdir(path) else os.path.dirname(path)

    def documents() -> Iterator[Document]:
        for file in paths:
            yield from read(file, os.path.relpath(file, root))

    total_documents = len(paths) if kind == "text" else 0
    return Source(f"{kind}:{path}", documents, total_documents, sum(map(os.path.getsize, paths)))


def _list_files(path: str) -> list[str]:
    """Returns the file, or the files below the folder in rising order of their paths, without hidden ones."""
    if not os.path.isdir(path):
        return [path] if os.path.isfile(path) else []
    found = []
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(folder, name) for name in files if not name.startswith(".")]
    return sorted(file for file in found if os.path.isfile(file))


def _read_whole(path: str, name: str) -> Iterator[Document]:
    with _opened(path) as file:
        yield name, file.read()


def _read_lines(path: str, name: str) -> Iterator[Document]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            yield f"{name}:{number}", line.rstrip("\r\n")


@contextlib.contextmanager
def _opened(path: str) -> Iterator[io.TextIOBase]:
    try:
        # newline="\n": the text is what is in the file, whatever the line ends.
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _open_stdlib(work_dir: str) -> Source:
    # Another Python has another library: what an interrupted run left of it must not pass for this one.
    builder = _make_stdlib_builder(os.path.join(work_dir, f"python-{platform.python_version()}"))
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS's own report: nothing is downloaded here
        builder.download_and_prepare()
    return _read_builder(builder, "stdlib", "text", id_feature="id")


def _make_stdlib_builder(work_dir: str) -> "DatasetBuilder":
    import tensorflow_datasets as tfds  # here, since only prepare needs it

    # In a function, so that importing this module does not import TFDS; unregistered, so that it may be called twice.
    class Stdlib(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """The source text of the running Python's standard library, without its tests."""

        name = "stdlib"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = tfds.features.FeaturesDict({"id": tfds.features.Text(), "text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
            for key, (name, text) in enumerate(_read_stdlib()):
                yield key, {"id": name, "text": text}

    tfds.disable_progress_bar()
    return Stdlib(data_dir=work_dir, file_format="array_record")


def _read_stdlib() -> Iterator[Document]:
    root = sysconfig.get_path("stdlib")
    for path in sorted(_list_files(root)):
        name = os.path.relpath(path, root)
        if not name.endswith(".py") or LEFT_OUT & set(name.split(os.sep)[:-1]):
            continue
        with open(path, "rb") as file, contextlib.suppress(UnicodeDecodeError):  # a few are in other encodings
            yield name, file.read().decode("utf-8")


def _open_tfds(name: str, text_feature: str) -> Source:
    import tensorflow_datasets as tfds  # here, since only prepare needs it

    try:
        builder = tfds.builder(name, file_format="array_record")
    except (ValueError, ImportError) as error:  # its message lists every data set there is
        raise ConfigError(f"data.source=tfds:{name}: {str(error).splitlines()[0]}") from error
    features = list(cast(Iterable[str], builder.info.features or ()))
    if text_feature not in features:
        raise ConfigError(f"data.text_feature={text_feature!r}: tfds:{name} has {', '.join(features) or 'no features'}")
    try:
        builder.download_and_prepare()
    except Exception as error:  # of whatever library the data set's own code uses
        reason = (str(error).splitlines() or [""])[0]
        raise UnavailableError(
            f"tfds:{name} cannot be prepared ({type(error).__name__}: {reason}); {TFDS_REMEDY}"
        ) from error
    return _read_builder(builder, f"tfds:{name}", text_feature)


def _read_builder(builder: "DatasetBuilder", name: str, text_feature: str, *, id_feature: str = "") -> Source:
    # Only the training split where there is one: a data set's own test split stays unseen.
    splits = [split for split in builder.info.splits if split == "train"] or list(builder.info.splits)

    def documents() -> Iterator[Document]:
        for split in splits:
            rows = cast(Any, builder).as_data_source(split)
            for index in range(len(rows)):
                row = rows[index]
                name = _to_text(row[id_feature]) if id_feature else f"{split}/{index}"
                yield name, _to_text(row[text_feature])

    return Source(name, documents, sum(builder.info.splits[split].num_examples for split in splits))


def _to_text(value: str | bytes) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value
