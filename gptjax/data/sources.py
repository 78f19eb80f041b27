"""The sources of documents: each yields (id, text) in a fixed order."""

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
# Yields the documents of one file, from its path and its name. Their ids begin with the name.
Reader = Callable[[str, str], Iterator[Document]]

TFDS_REMEDY = "rerun the command to continue the download; `pip install tensorflow` helps if its error asks for it"

# Directories of the standard library that do not hold its source text.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents in a fixed order, the same at every call of `documents`, with the totals that are known."""

    name: str
    documents: Callable[[], Iterator[Document]]
    total_documents: int = 0  # 0 if unknown
    total_bytes: int = 0  # 0 if unknown


def needs_network(name: str) -> bool:
    """Returns whether the source may have to be downloaded."""
    return name.startswith("tfds:")


def canonical_name(name: str) -> str:
    """Returns the source's name with an absolute path, so that it is the same in any working directory.

    Raises:
        ConfigError: there is no such kind of source.
    """
    kind, _, path = name.partition(":")
    if kind in READERS and path:
        return f"{kind}:{os.path.abspath(path)}"
    if name == "stdlib" or (kind == "tfds" and path):
        return name
    raise ConfigError(
        f"expected {kinds()}",
        field="data.source",
        value=name,
    )


def open_source(
    name: str,
    *,
    text_feature: str = "text",
    work_dir: str,
) -> Source:
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
    name = f"{kind}:{path}"
    paths = _list_files(path)
    if not paths:
        raise ConfigError(
            "no such file or folder, or no file in it",
            field="data.source",
            value=name,
        )
    read = READERS[kind]
    root = path
    if not os.path.isdir(path):
        root = os.path.dirname(path)

    def documents() -> Iterator[Document]:
        for file in paths:
            yield from read(file, os.path.relpath(file, root))

    return Source(
        name,
        documents,
        total_documents=len(paths) if kind == "text" else 0,
        total_bytes=sum(map(os.path.getsize, paths)),
    )


def _list_files(path: str) -> list[str]:
    """Returns the file, or all files below the folder, sorted by path and without hidden ones."""
    if not os.path.isdir(path):
        return [path] if os.path.isfile(path) else []
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = filter(_is_visible, folders)  # in place: os.walk does not descend into the others
        for name in filter(_is_visible, names):
            file = os.path.join(folder, name)
            if os.path.isfile(file):
                found.append(file)
    return sorted(found)


def _is_visible(name: str) -> bool:
    return not name.startswith(".")


def _read_whole(path: str, name: str) -> Iterator[Document]:
    with _opened(path) as file:
        yield name, file.read()


def _read_lines(path: str, name: str) -> Iterator[Document]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            yield f"{name}:{number}", line.rstrip("\r\n")


# By the kind of source: functions that yield the documents of one file. text: a file is one document.
READERS: dict[str, Reader] = {
    "text": _read_whole,
    "lines": _read_lines,
}


def kinds() -> str:
    """Returns the forms of data.source, for messages."""
    forms = ["stdlib", "tfds:NAME[/CONFIG]"]
    forms += [f"{kind}:PATH" for kind in READERS]
    return ", ".join(forms)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[io.TextIOBase]:
    try:
        with open(
            path,
            encoding="utf-8",
            errors="replace",
            newline="\n",  # keeps the file's line ends
        ) as file:
            yield file
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", field=path) from error


def _open_stdlib(work_dir: str) -> Source:
    # Another Python has another library. The leftovers of an interrupted run with it must not be taken for this one.
    version = platform.python_version()
    builder = _make_stdlib_builder(os.path.join(work_dir, f"python-{version}"))
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS reports a download there, but nothing is downloaded
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
            features = tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "text": tfds.features.Text(),
                }
            )
            return tfds.core.DatasetInfo(
                builder=self,
                features=features,
                disable_shuffling=True,
            )

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
        folders = os.path.dirname(name).split(os.sep)
        if not name.endswith(".py") or LEFT_OUT.intersection(folders):
            continue
        with open(path, "rb") as file, contextlib.suppress(UnicodeDecodeError):  # a few are in other encodings
            yield name, file.read().decode("utf-8")


def _open_tfds(name: str, text_feature: str) -> Source:
    import tensorflow_datasets as tfds  # here, since only prepare needs it

    try:
        builder = tfds.builder(name, file_format="array_record")
    except (ValueError, ImportError) as error:
        raise ConfigError(
            _first_line(error),  # the other lines list all data sets
            field="data.source",
            value=f"tfds:{name}",
        ) from error
    features = list(cast(Iterable[str], builder.info.features or ()))
    if text_feature not in features:
        available = ", ".join(features) or "no features"
        raise ConfigError(
            f"tfds:{name} has {available}",
            field="data.text_feature",
            value=text_feature,
        )
    try:
        builder.download_and_prepare()
    except Exception as error:  # from any library that the data set's own code uses
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise UnavailableError(
            f"cannot be prepared ({reason})",
            field="data.source",
            value=f"tfds:{name}",
            remedy=TFDS_REMEDY,
        ) from error
    return _read_builder(builder, f"tfds:{name}", text_feature)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else ""


def _read_builder(
    builder: "DatasetBuilder",
    name: str,
    text_feature: str,
    *,
    id_feature: str = "",
) -> Source:
    splits = list(builder.info.splits)
    if "train" in splits:  # a data set's own test split stays unseen
        splits = ["train"]

    def documents() -> Iterator[Document]:
        for split in splits:
            rows = cast(Any, builder).as_data_source(split)
            for index in range(len(rows)):
                row = rows[index]
                document_id = f"{split}/{index}"
                if id_feature:
                    document_id = _to_text(row[id_feature])
                yield document_id, _to_text(row[text_feature])

    counts = [builder.info.splits[split].num_examples for split in splits]
    return Source(name, documents, total_documents=sum(counts))


def _to_text(value: str | bytes) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value
